//! The log-mel front end that the project's networks share.

use super::{Mel, MelConfig, Stft};
use candle_core::{DType, Device, Result, Tensor};

const SAMPLE_RATE: u32 = 16_000;
const N_FFT: usize = 1024;
const WINDOW: usize = 640;
const HOP: usize = 160;
const BANDS: usize = 64;
const LOWEST_HZ: f64 = 40.0;
const HIGHEST_HZ: f64 = 8000.0;
/// Magnitudes below this are silence: it keeps the noise floor from filling the range.
const FLOOR: f64 = 3e-3;
/// Mean and standard deviation of log-mels of composed scenes, rounded; they bring values near unit range.
const MEAN: f64 = -3.5;
const STD: f64 = 2.5;

/// Waveforms at 16 kHz to standardised log-mel spectrograms: 64 bands from 40 to 8,000 Hz, 100 frames a second.
#[derive(Clone, Debug)]
pub struct LogMel {
    stft: Stft,
    mel: Mel,
}

impl LogMel {
    /// The front end for `f32` waveforms on `device`.
    ///
    /// # Errors
    /// If the device cannot hold its tables.
    pub fn speech_16k(device: &Device) -> Result<Self> {
        let bands = MelConfig {
            sample_rate: SAMPLE_RATE,
            n_fft: N_FFT,
            n_mels: BANDS,
            fmin: LOWEST_HZ,
            fmax: HIGHEST_HZ,
        };
        Ok(Self {
            stft: Stft::new(N_FFT, WINDOW, HOP, DType::F32, device)?,
            mel: Mel::new(bands, DType::F32, device)?,
        })
    }

    /// Samples per second that waveforms must have.
    pub fn sample_rate(&self) -> u32 {
        SAMPLE_RATE
    }

    /// Number of bands.
    pub fn bands(&self) -> usize {
        BANDS
    }

    /// Samples between frames.
    pub fn hop(&self) -> usize {
        HOP
    }

    /// Frames of `samples` samples.
    pub fn frames(&self, samples: usize) -> usize {
        self.stft.frames(samples)
    }

    /// Waveforms `[B, S]` to spectrograms `[B, S / 160, 64]`.
    ///
    /// # Errors
    /// As [`Stft::packed`].
    pub fn forward(&self, wave_bs: &Tensor) -> Result<Tensor> {
        (self.mel.log(&self.stft.magnitude(wave_bs)?, FLOOR)? - MEAN)? / STD
    }

    /// Natural logarithm of the mel magnitudes from standardised values.
    ///
    /// # Errors
    /// If the arithmetic fails on the device.
    pub fn to_log(&self, standardised: &Tensor) -> Result<Tensor> {
        standardised.affine(STD, MEAN)
    }

    /// Standard deviation that differences of standardised values are multiplied with to be in natural-log units.
    pub fn scale(&self) -> f64 {
        STD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_the_lowest_value_and_a_tone_peaks_in_its_band() -> Result<()> {
        let mel = LogMel::speech_16k(&Device::Cpu)?;
        let silence = mel.forward(&Tensor::zeros((1, 16_000), DType::F32, &Device::Cpu)?)?;
        assert_eq!(silence.dims(), [1, 100, 64]);
        let lowest = ((FLOOR.ln() - MEAN) / STD) as f32;
        assert!((silence.max_all()?.to_scalar::<f32>()? - lowest).abs() < 1e-5);
        let tone: Vec<f32> = (0..16_000)
            .map(|i| (std::f32::consts::TAU * 1000.0 * i as f32 / 16e3).sin())
            .collect();
        let bands = mel.forward(&Tensor::from_vec(tone, (1, 16_000), &Device::Cpu)?)?;
        let peak = bands.get(0)?.get(50)?.argmax(0)?.to_scalar::<u32>()?;
        // mel(1 kHz) = 1000 lies at (1000 - 61.6) / (2840 - 61.6) of the 65 steps: band 21 is centred nearest.
        assert!((20..=22).contains(&peak), "{peak}");
        Ok(())
    }
}
