//! Vocoder: log-mel spectrogram to waveform through the spectrum, one frame in, one frame out.
//!
//! ```text
//! log-mel [B,T,64] -> linear -> token-shift blocks over time -> log-magnitude and phase of 640 points -> inverse STFT
//! ```
//! All work is a matrix product a frame, 100 a second, instead of convolutions at 16 kHz.

use std::path::Path;

use candle_core::{Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::spectrum::Stft;
use fulgur_lightnet::linear::{Linear, Start};
use serde::{Deserialize, Serialize};

use super::ShiftStack;
use crate::error::Error;
use crate::folder;

/// Points of the transform and hop, in samples at 16 kHz.
const POINTS: usize = 640;
const HOP: usize = 160;
/// Largest log-magnitude, so that an untrained or surprised network cannot overflow.
const LOUDEST: f64 = 6.0;

/// Shape of a [`Vocoder`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocoderConfig {
    /// Bands of the spectrogram.
    pub bands: usize,
    /// Width and depth.
    pub stack: [usize; 2],
}

impl Default for VocoderConfig {
    fn default() -> Self {
        Self {
            bands: 64,
            stack: [240, 5],
        }
    }
}

/// The network.
#[derive(Clone, Debug)]
pub struct Vocoder {
    config: VocoderConfig,
    input: Linear,
    stack: ShiftStack,
    output: Linear,
    stft: Stft,
}

impl Vocoder {
    /// Takes `input`, `stack` and `output`.
    pub fn new(config: &VocoderConfig, vb: &VarBuilder) -> Result<Self> {
        let [dim, depth] = config.stack;
        let stft = Stft::new(POINTS, POINTS, HOP, vb.dtype(), vb.device())?;
        Ok(Self {
            input: Linear::new(config.bands, dim, true, Start::FanIn, &vb.pp("input"))?,
            stack: ShiftStack::new(1, dim, depth, &vb.pp("stack"))?,
            output: Linear::new(dim, 3 * stft.bins(), true, Start::FanIn, &vb.pp("output"))?,
            config: config.clone(),
            stft,
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, Error> {
        folder::load(dir, device, |config, weights| {
            Self::new(config, &weights.builder())
        })
    }

    /// Shape of the network.
    pub fn config(&self) -> &VocoderConfig {
        &self.config
    }

    /// Standardised log-mel `[B, T, bands]` to waveforms `[B, 160 T]` at 16 kHz, not clamped.
    pub fn forward(&self, mel: &Tensor) -> Result<Tensor> {
        let bins = self.stft.bins();
        let h = self
            .output
            .forward(&self.stack.forward(&self.input.forward(mel)?)?)?
            .to_dtype(mel.dtype())?;
        let part = |index: usize| h.narrow(2, index * bins, bins);
        let magnitude = part(0)?.clamp(-20.0, LOUDEST)?.exp()?;
        // A direction instead of an angle: no wrap at pi, and a gradient everywhere.
        let (x, y) = (part(1)?, part(2)?);
        let length = ((x.sqr()? + y.sqr()?)? + 1e-8)?.sqrt()?;
        let scale = (magnitude / length)?;
        self.stft.inverse(&(x * &scale)?, &(y * &scale)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal};
    use fulgur_lightnet::params::Params;

    fn vocoder() -> Result<Vocoder> {
        let config = VocoderConfig {
            stack: [16, 1],
            ..VocoderConfig::default()
        };
        Vocoder::new(&config, &Params::random(2, &Device::Cpu).builder())
    }

    #[test]
    fn every_frame_is_160_samples() -> Result<()> {
        let vocoder = vocoder()?;
        for (batch, frames) in [(1, 4), (2, 7), (1, 100)] {
            let wave = vocoder.forward(&normal("mel", &[batch, frames, 64])?)?;
            assert_eq!(wave.dims(), [batch, 160 * frames]);
            assert!(wave.abs()?.max_all()?.to_scalar::<f32>()?.is_finite());
        }
        Ok(())
    }

    #[test]
    fn absurd_spectrograms_give_finite_sound() -> Result<()> {
        let vocoder = vocoder()?;
        for gain in [0.0, 1e4, -1e4] {
            let wave = vocoder.forward(&(normal("mel", &[1, 20, 64])? * gain)?)?;
            let largest = wave.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(largest.is_finite(), "gain {gain}: {largest}");
        }
        Ok(())
    }

    #[test]
    fn sound_depends_on_near_frames_alone_and_not_on_the_batch() -> Result<()> {
        let vocoder = vocoder()?;
        let mel = normal("mel", &[2, 30, 64])?;
        let changed = Tensor::cat(&[&mel.narrow(1, 0, 29)?, &normal("other", &[2, 1, 64])?], 1)?;
        let (a, b) = (vocoder.forward(&mel)?, vocoder.forward(&changed)?);
        assert!(apart(&a, &b)? > 0.0);
        // One block looks one frame far, and a frame's window reaches two hops to either side.
        let early = 160 * (30 - 1 - 1 - 2);
        assert_eq!(apart(&a.narrow(1, 0, early)?, &b.narrow(1, 0, early)?)?, 0.0);
        let alone = vocoder.forward(&mel.narrow(0, 1, 1)?)?;
        assert!(apart(&a.narrow(0, 1, 1)?, &alone)? < 1e-5);
        Ok(())
    }

    #[test]
    fn another_number_of_bands_is_refused() -> Result<()> {
        let message = vocoder()?.forward(&normal("mel", &[1, 8, 80])?).unwrap_err();
        assert!(message.to_string().contains("80"), "{message}");
        Ok(())
    }
}
