//! The log-mel spectrograms that AudioLDM's codec encodes and its vocoder makes sounds of (Liu et al., arXiv 2301.12503).
//!
//! ```text
//! 16 kHz -> |STFT| 1024/160, mirrored ends -> 64 bands 0..8000 Hz (Slaney) -> ln(max(x, 1e-5))
//! ```
//!
//! The published loader also brings sounds to the same loudness and length; here they stay as they are.

use candle_core::{Device, Tensor};

use super::spectrogram::{Bands, Padding, Spectrogram};

/// Samples a second of the waveforms.
pub const RATE: u32 = 16_000;
/// Bands of the spectrogram.
pub const BANDS: usize = 64;
/// Fewest samples: the signal is mirrored at its ends.
pub const FEWEST_SAMPLES: usize = N_FFT / 2 + 1;
const N_FFT: usize = 1024;
const HOP: usize = 160;
const RANGE: [f64; 2] = [0.0, 8000.0];
const FLOOR: f64 = 1e-5;

/// `[1 + samples / 160, 64]` of a waveform at 16 kHz.
///
/// # Errors
/// Less than 513 samples.
pub fn log_mel(wave: &[f32]) -> candle_core::Result<Tensor> {
    if wave.len() < FEWEST_SAMPLES {
        candle_core::bail!(
            "found {} samples at {RATE} Hz, expected at least {FEWEST_SAMPLES}",
            wave.len()
        );
    }
    let spectrogram = Spectrogram::new(N_FFT, N_FFT, HOP, Padding::Mirror);
    let bands = Bands::slaney(f64::from(RATE), N_FFT, BANDS, RANGE);
    let magnitude: Vec<f64> = spectrogram.power(wave).into_iter().map(f64::sqrt).collect();
    let values = bands.apply(&magnitude, |energy| energy.max(FLOOR).ln());
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    let frames = values.len() / BANDS;
    Tensor::from_vec(values, (frames, BANDS), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, relative_rms, values};

    #[test]
    fn equals_librosa() {
        let tensors = golden("audioldm_mel");
        let found = log_mel(&values(&tensors["wave"])).unwrap();
        let apart = relative_rms(&found, &tensors["mel"]);
        assert!(apart < 1e-5, "{apart}");
    }

    #[test]
    fn short_sounds_are_refused_and_silence_is_the_floor() {
        let line = log_mel(&[0.0; 512]).unwrap_err().to_string();
        assert!(
            line.starts_with("found 512 samples at 16000 Hz, expected at least 513"),
            "{line}"
        );
        let silence = log_mel(&[0.0; 513]).unwrap();
        assert_eq!(silence.dims(), [4, 64]);
        assert!(
            values(&silence)
                .iter()
                .all(|value| (value - 1e-5f32.ln()).abs() < 1e-5)
        );
    }
}
