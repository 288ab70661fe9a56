//! VGGish: a VGG over log-mel patches of 0.96 s, trained on the sounds of YouTube-8M (Hershey et al., arXiv 1609.09430); the
//! features of FAD.
//!
//! Reference: the PyTorch conversion whose tensors are `features.{0,3,6,8,11,13}` and `embeddings.{0,2,4}`, without the last
//! ReLU and without whitening, as the evaluations of generated sound use it. Widths come from the shapes of the weights.
//!
//! ```text
//! 16 kHz -> |STFT| 400/160/512 -> 64 bands 125..7500 Hz -> ln(x + 0.01) -> patches 96x64, one behind the other
//! conv 64, pool, conv 128, pool, conv 256 256, pool, conv 512 512, pool -> (time, band, channel) -> 4096 -> 4096 -> 128
//! ```

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::params::folder;

use super::layers::{Conv, Dense};
use super::spectrogram::{Bands, Padding, Spectrogram};
use super::{FeatureError, Shapes};

/// Samples a second of the waveforms.
pub const RATE: u32 = 16_000;
/// Frames and bands of a patch.
pub const PATCH: [usize; 2] = [96, 64];
const WINDOW: usize = 400;
const HOP: usize = 160;
const N_FFT: usize = 512;
const RANGE: [f64; 2] = [125.0, 7500.0];
const FLOOR: f64 = 0.01;
/// Number of each convolution in the published network, and whether a maximum of 2x2 follows it.
const CONVOLUTIONS: [(usize, bool); 6] = [
    (0, true),
    (3, true),
    (6, false),
    (8, true),
    (11, false),
    (13, true),
];
const LINEAR: [usize; 3] = [0, 2, 4];
/// How often the sides of a patch are halved.
const HALVINGS: usize = 4;
/// Patches that go through the network at a time.
const BATCH: usize = 32;
/// A tensor by which this network is known, beside [`MARK_END`].
pub const MARK: &str = "features.0.weight";
/// See [`MARK`].
pub const MARK_END: &str = "embeddings.4.weight";

/// Widths of a [`Vggish`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VggishConfig {
    /// Of the convolutions.
    pub convolutions: [usize; 6],
    /// Of the linear layers.
    pub linear: [usize; 3],
}

impl Default for VggishConfig {
    fn default() -> Self {
        Self {
            convolutions: [64, 128, 256, 256, 512, 512],
            linear: [4096, 4096, 128],
        }
    }
}

impl VggishConfig {
    /// The widths that weights of these shapes have; the published ones for tensors that are missing.
    pub fn of(shapes: &Shapes) -> Self {
        let mut config = Self::default();
        let width = |name: String, usual: &mut usize| {
            let first = shapes.get(&name).and_then(|shape| shape.first());
            *usual = first.copied().filter(|&width| width > 0).unwrap_or(*usual);
        };
        for ((number, _), usual) in CONVOLUTIONS.iter().zip(&mut config.convolutions) {
            width(format!("features.{number}.weight"), usual);
        }
        for (number, usual) in LINEAR.iter().zip(&mut config.linear) {
            width(format!("embeddings.{number}.weight"), usual);
        }
        config
    }
}

/// Log-mel patches `[n, 96, 64]` of a waveform at 16 kHz, without what is left behind the last whole one.
pub fn patches(wave: &[f32]) -> Result<Tensor> {
    let spectrogram = Spectrogram::new(N_FFT, WINDOW, HOP, Padding::None);
    let bands = Bands::vggish(f64::from(RATE), N_FFT, PATCH[1], RANGE);
    let magnitude: Vec<f64> = spectrogram.power(wave).into_iter().map(f64::sqrt).collect();
    let values = bands.apply(&magnitude, |energy| (energy + FLOOR).ln());
    let size = PATCH[0] * PATCH[1];
    let count = values.len() / size;
    let values: Vec<f32> = values[..count * size].iter().map(|&value| value as f32).collect();
    Tensor::from_vec(values, (count, PATCH[0], PATCH[1]), &Device::Cpu)
}

/// The network.
#[derive(Clone, Debug)]
pub struct Vggish {
    convolutions: Vec<(Conv, bool)>,
    linear: Vec<Dense>,
    device: Device,
}

impl Vggish {
    /// Takes the tensors of the published checkpoint from `vb`.
    pub fn new(config: &VggishConfig, vb: &VarBuilder) -> Result<Self> {
        let mut input = 1;
        let mut convolutions = Vec::with_capacity(CONVOLUTIONS.len());
        for ((number, pool), &output) in CONVOLUTIONS.iter().zip(&config.convolutions) {
            let vb = vb.pp(format!("features.{number}"));
            let (kernel, bias) = (vb.get((output, input, 3, 3), "weight")?, vb.get(output, "bias")?);
            convolutions.push((Conv::new(kernel, Some(bias)), *pool));
            input = output;
        }
        input *= (PATCH[0] >> HALVINGS) * (PATCH[1] >> HALVINGS);
        let mut linear = Vec::with_capacity(LINEAR.len());
        for (number, &output) in LINEAR.iter().zip(&config.linear) {
            linear.push(Dense::new(
                input,
                output,
                true,
                &vb.pp(format!("embeddings.{number}")),
            )?);
            input = output;
        }
        Ok(Self {
            convolutions,
            linear,
            device: vb.device().clone(),
        })
    }

    /// Loads the weights of `dir` onto `device`; those of whitening are not read.
    ///
    /// # Errors
    /// There are none, or not those of a VGGish: all tensors that differ are named.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, FeatureError> {
        let config = VggishConfig::of(&super::shapes(dir)?);
        let whitening = |name: &str| name.starts_with("pproc.");
        Ok(folder::load(dir, DType::F32, device, whitening, |_, vb| {
            Self::new(&config, vb)
        })?)
    }

    /// Patches `[B, 96, 64]` of [`patches`] to vectors `[B, 128]`.
    pub fn forward(&self, patches: &Tensor) -> Result<Tensor> {
        let (_, frames, bands) = patches.dims3()?;
        if [frames, bands] != PATCH {
            candle_core::bail!("vggish: found patches {:?}, expected [B, 96, 64]", patches.dims());
        }
        let mut x = patches.unsqueeze(1)?;
        for (convolution, pool) in &self.convolutions {
            x = convolution.forward(&x)?.relu()?;
            if *pool {
                x = x.max_pool2d(2)?;
            }
        }
        // Channels stood last where the linear layers were trained.
        let mut x = x.permute((0, 2, 3, 1))?.contiguous()?.flatten_from(1)?;
        for (i, layer) in self.linear.iter().enumerate() {
            x = layer.forward(&x)?;
            if i + 1 < self.linear.len() {
                x = x.relu()?;
            }
        }
        Ok(x)
    }

    /// Vectors of a waveform at 16 kHz, one each 0.96 s; none of less.
    pub fn embed(&self, wave: &[f32]) -> Result<Vec<Vec<f64>>> {
        let patches = patches(wave)?;
        let mut rows = Vec::with_capacity(patches.dim(0)?);
        for start in (0..patches.dim(0)?).step_by(BATCH) {
            let count = BATCH.min(patches.dim(0)? - start);
            let part = patches.narrow(0, start, count)?.to_device(&self.device)?;
            rows.extend(super::layers::rows(&self.forward(&part)?)?);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, golden_weights, relative_rms, thinned, values};

    #[test]
    fn equals_a_plain_transcription_in_torch() {
        let tensors = golden("vggish");
        let (weights, outputs) = golden_weights(&tensors);
        let shapes = weights
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect();
        let config = VggishConfig::of(&shapes);
        assert_eq!(config.linear, [24, 20, 12]);
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
        let network = Vggish::new(&config, &vb).unwrap();
        let wave = values(&outputs["wave"]);
        let found = patches(&wave).unwrap();
        assert_eq!(found.dims(), [2, 96, 64]);
        let apart = relative_rms(&thinned(&found, 5), &outputs["patches"]);
        assert!(apart < 1e-5, "patches: {apart}");
        let vectors = network.embed(&wave).unwrap();
        let flat: Vec<f32> = vectors.concat().into_iter().map(|value| value as f32).collect();
        let vectors = Tensor::from_vec(flat, (2, 12), &Device::Cpu).unwrap();
        let apart = relative_rms(&vectors, &outputs["vectors"]);
        assert!(apart < 2e-5, "vectors: {apart}");
        // Of less than a patch there is nothing, and no error.
        assert!(network.embed(&wave[..15_000]).unwrap().is_empty());
        assert!(network.embed(&[]).unwrap().is_empty());
        let wide = Tensor::zeros((1, 96, 65), DType::F32, &Device::Cpu).unwrap();
        assert!(network.forward(&wide).is_err());
    }

    #[test]
    fn the_published_widths_are_the_usual_ones() {
        let outline = fulgur_lightnet::params::Outline::new();
        Vggish::new(&VggishConfig::default(), &outline.builder()).unwrap();
        assert_eq!(VggishConfig::of(&outline.shapes()), VggishConfig::default());
        assert_eq!(outline.shapes()["embeddings.0.weight"], [4096, 12_288]);
    }
}
