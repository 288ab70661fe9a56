//! PANNs Cnn14 at 16 kHz: a convolution network over log-mel spectrograms, trained on AudioSet (Kong et al., arXiv 1912.10211);
//! the features and classes of FD_PANNs, IS and KL.
//!
//! Reference: `Cnn14_16k` of the authors, whose tensor names are kept; what their file holds of the transform and the bands
//! is computed here. Widths come from the shapes of the weights.
//!
//! ```text
//! 16 kHz -> |STFT|^2 512/160, mirrored ends -> 64 bands 50..8000 Hz -> dB -> norm of each band
//! six times: (conv3x3, norm, ReLU) twice, mean of 2x2 (not the last) -> mean over bands -> max + mean over time
//! fc1, ReLU = embedding [2048] -> fc_audioset = logits [527]
//! ```

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::params::folder;

use super::layers::{BatchNorm, Conv, Dense};
use super::spectrogram::{Bands, Padding, Spectrogram, decibels};
use super::{FeatureError, Shapes};

/// Samples a second of the waveforms.
pub const RATE: u32 = 16_000;
/// Bands of the spectrogram.
pub const BANDS: usize = 64;
/// Fewest frames: time is halved five times.
pub const FEWEST_FRAMES: usize = 32;
const N_FFT: usize = 512;
const HOP: usize = 160;
const RANGE: [f64; 2] = [50.0, 8000.0];
const BLOCKS: usize = 6;
const EPS: f64 = 1e-5;
/// A tensor by which this network is known.
pub const MARK: &str = "fc_audioset.weight";

/// Widths of a [`Panns`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PannsConfig {
    /// Of the blocks.
    pub blocks: [usize; BLOCKS],
    /// Of the embedding.
    pub embedding: usize,
    /// Classes.
    pub classes: usize,
}

impl Default for PannsConfig {
    fn default() -> Self {
        Self {
            blocks: [64, 128, 256, 512, 1024, 2048],
            embedding: 2048,
            classes: 527,
        }
    }
}

impl PannsConfig {
    /// The widths that weights of these shapes have; the published ones for tensors that are missing.
    pub fn of(shapes: &Shapes) -> Self {
        let mut config = Self::default();
        let width = |name: &str, usual: &mut usize| {
            let first = shapes.get(name).and_then(|shape| shape.first());
            *usual = first.copied().filter(|&width| width > 0).unwrap_or(*usual);
        };
        for (i, usual) in config.blocks.iter_mut().enumerate() {
            width(&format!("conv_block{}.conv1.weight", i + 1), usual);
        }
        width("fc1.weight", &mut config.embedding);
        width(MARK, &mut config.classes);
        config
    }
}

/// Log-mel spectrogram `[frames, 64]` of a waveform at 16 kHz; empty for one of less than 257 samples.
pub fn log_mel(wave: &[f32]) -> Result<Tensor> {
    let spectrogram = Spectrogram::new(N_FFT, N_FFT, HOP, Padding::Mirror);
    let bands = Bands::slaney(f64::from(RATE), N_FFT, BANDS, RANGE);
    let values = bands.apply(&spectrogram.power(wave), decibels);
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    let frames = values.len() / BANDS;
    Tensor::from_vec(values, (frames, BANDS), &Device::Cpu)
}

/// Two convolutions with their norms.
#[derive(Clone, Debug)]
struct Block {
    convolutions: [Conv; 2],
}

impl Block {
    fn new(input: usize, output: usize, vb: &VarBuilder) -> Result<Self> {
        let conv = |number: usize, input: usize| {
            let kernel = vb.get((output, input, 3, 3), &format!("conv{number}.weight"))?;
            let norm = BatchNorm::new(output, EPS, &vb.pp(format!("bn{number}")))?;
            let (kernel, bias) = norm.fold(&kernel)?;
            Ok::<_, candle_core::Error>(Conv::new(kernel, Some(bias)))
        };
        Ok(Self {
            convolutions: [conv(1, input)?, conv(2, output)?],
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [first, second] = &self.convolutions;
        second.forward(&first.forward(x)?.relu()?)?.relu()
    }
}

/// What the network says of sounds.
#[derive(Clone, Debug)]
pub struct Heard {
    /// `[B, 2048]`.
    pub embedding: Tensor,
    /// `[B, 527]`, before the sigmoid.
    pub logits: Tensor,
}

/// The network.
#[derive(Clone, Debug)]
pub struct Panns {
    norm: BatchNorm,
    blocks: Vec<Block>,
    embedding: Dense,
    classes: Dense,
    device: Device,
}

impl Panns {
    /// Takes the tensors of the published checkpoint from `vb`.
    pub fn new(config: &PannsConfig, vb: &VarBuilder) -> Result<Self> {
        let mut input = 1;
        let mut blocks = Vec::with_capacity(BLOCKS);
        for (i, &output) in config.blocks.iter().enumerate() {
            blocks.push(Block::new(input, output, &vb.pp(format!("conv_block{}", i + 1)))?);
            input = output;
        }
        Ok(Self {
            norm: BatchNorm::new(BANDS, EPS, &vb.pp("bn0"))?,
            blocks,
            embedding: Dense::new(input, config.embedding, true, &vb.pp("fc1"))?,
            classes: Dense::new(config.embedding, config.classes, true, &vb.pp("fc_audioset"))?,
            device: vb.device().clone(),
        })
    }

    /// Loads the weights of `dir` onto `device`.
    ///
    /// # Errors
    /// There are none, or not those of a Cnn14: all tensors that differ are named.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, FeatureError> {
        let config = PannsConfig::of(&super::shapes(dir)?);
        let front_end = |name: &str| {
            name.starts_with("spectrogram_extractor.")
                || name.starts_with("logmel_extractor.")
                || name.ends_with(".num_batches_tracked")
        };
        Ok(folder::load(dir, DType::F32, device, front_end, |_, vb| {
            Self::new(&config, vb)
        })?)
    }

    /// Spectrograms `[B, T, 64]` of [`log_mel`], of 32 frames at least.
    pub fn forward(&self, mel: &Tensor) -> Result<Heard> {
        let (_, frames, bands) = mel.dims3()?;
        if bands != BANDS || frames < FEWEST_FRAMES {
            candle_core::bail!(
                "panns: found spectrograms {:?}, expected [B, T, {BANDS}] with T of {FEWEST_FRAMES} at least",
                mel.dims()
            );
        }
        let mut x = self.norm.forward(mel, 2)?.unsqueeze(1)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x)?;
            if i + 1 < self.blocks.len() {
                x = x.avg_pool2d(2)?;
            }
        }
        let x = x.mean(3)?;
        let x = (x.max(2)? + x.mean(2)?)?;
        let embedding = self.embedding.forward(&x)?.relu()?;
        let logits = self.classes.forward(&embedding)?;
        Ok(Heard { embedding, logits })
    }

    /// Embedding and logits of a waveform at 16 kHz; `None` of one that is shorter than 32 frames.
    pub fn embed(&self, wave: &[f32]) -> Result<Option<(Vec<f64>, Vec<f64>)>> {
        let mel = log_mel(wave)?;
        if mel.dim(0)? < FEWEST_FRAMES {
            return Ok(None);
        }
        let heard = self.forward(&mel.unsqueeze(0)?.to_device(&self.device)?)?;
        let row = |tensor: &Tensor| tensor.squeeze(0)?.to_dtype(DType::F64)?.to_vec1();
        Ok(Some((row(&heard.embedding)?, row(&heard.logits)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, golden_weights, relative_rms, thinned, values};

    #[test]
    fn equals_a_plain_transcription_in_torch() {
        let tensors = golden("panns");
        let (weights, outputs) = golden_weights(&tensors);
        let shapes = weights
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect();
        let config = PannsConfig::of(&shapes);
        assert_eq!((config.embedding, config.classes), (14, 11));
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
        let network = Panns::new(&config, &vb).unwrap();
        let wave = values(&outputs["wave"]);
        let mel = log_mel(&wave).unwrap();
        assert_eq!(mel.dims(), [101, 64]);
        let apart = relative_rms(&thinned(&mel, 3), &outputs["mel"]);
        assert!(apart < 1e-5, "mel: {apart}");
        let heard = network.forward(&mel.unsqueeze(0).unwrap()).unwrap();
        for (name, found) in [("embedding", &heard.embedding), ("logits", &heard.logits)] {
            let apart = relative_rms(found, &outputs[name]);
            assert!(apart < 2e-5, "{name}: {apart}");
        }
        let (row, logits) = network.embed(&wave).unwrap().unwrap();
        assert_eq!((row.len(), logits.len()), (14, 11));
        for short in [0, 256, 257, 4_800] {
            assert_eq!(network.embed(&wave[..short]).unwrap(), None, "{short}");
        }
        let short = Tensor::zeros((1, 31, 64), DType::F32, &Device::Cpu).unwrap();
        assert!(network.forward(&short).is_err());
    }

    #[test]
    fn the_published_widths_are_the_usual_ones() {
        let outline = fulgur_lightnet::params::Outline::new();
        Panns::new(&PannsConfig::default(), &outline.builder()).unwrap();
        assert_eq!(PannsConfig::of(&outline.shapes()), PannsConfig::default());
    }
}
