//! The builtin encoder: two small LightNet towers, trained by us to put a frame near the sound that belongs to it.
//!
//! ```text
//! frame 96x96 -> patches 8x8                 -> tower -> unit vector
//! sound 4 s   -> log-mel -> patches 4 x 16   -> tower -> unit vector; windows are averaged
//! ```
//!
//! It is no ImageBind: it knows the things of its training set and the film. Its name is in every result.

use std::path::Path;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_datasets::media::{Sound, resample};
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::config;
use fulgur_lightnet::params::Frozen;
use image::{RgbImage, imageops};
use serde::{Deserialize, Serialize};

use super::tower::{Tower, TowerConfig};
use super::{EncodeError, Encoder, LoadError};

/// Name of the encoder in results.
pub const NAME: &str = "builtin";
const RGB: usize = 3;
/// Windows of sound at most; longer soundtracks are covered by evenly spaced ones.
const MOST_WINDOWS: usize = 8;
/// Starting temperature of the contrastive loss; it is learned.
const TEMPERATURE: f64 = 0.07;

/// Shape of a [`BuiltinEncoder`] (`config.json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BuiltinConfig {
    /// Height and width that frames are resized to.
    pub size: usize,
    /// Height and width of a picture patch.
    pub patch: usize,
    /// Frames and bands of a sound patch.
    pub sound_patch: [usize; 2],
    /// Seconds of a window of sound.
    pub window_s: f64,
    /// Width of both towers.
    pub dim: usize,
    /// Blocks of each tower.
    pub depth: usize,
    /// Heads of each mixer.
    pub heads: usize,
    /// Width of the common space.
    pub embedding: usize,
}

impl Default for BuiltinConfig {
    fn default() -> Self {
        Self {
            size: 96,
            patch: 8,
            sound_patch: [4, 16],
            window_s: 4.0,
            dim: 160,
            depth: 4,
            heads: 5,
            embedding: 128,
        }
    }
}

/// Picture and sound towers.
#[derive(Clone, Debug)]
pub struct BuiltinEncoder {
    config: BuiltinConfig,
    mel: LogMel,
    picture: Tower,
    sound: Tower,
    log_temperature: Tensor,
    device: Device,
}

impl BuiltinEncoder {
    /// Takes `picture`, `sound` and `log_temperature` from `vb`.
    pub fn new(config: &BuiltinConfig, vb: &VarBuilder) -> Result<Self> {
        let mel = LogMel::speech_16k(vb.device())?;
        let [frames, bands] = config.sound_patch;
        let (size, patch) = (config.size, config.patch);
        if patch == 0 || size % patch != 0 || frames == 0 || bands == 0 || mel.bands() % bands != 0 {
            candle_core::bail!(
                "builtin encoder: patches {patch} of {size} pixels, {frames}x{bands} of the mel"
            );
        }
        let window = mel.frames((config.window_s * f64::from(mel.sample_rate())) as usize);
        let tower = |values: usize, axes: [usize; 2]| TowerConfig {
            values,
            axes: axes.to_vec(),
            dim: config.dim,
            depth: config.depth,
            heads: config.heads,
            output: config.embedding,
        };
        let start = Init::Const((1.0 / TEMPERATURE).ln());
        Ok(Self {
            picture: Tower::new(
                &tower(patch * patch * RGB, [size / patch, size / patch]),
                &vb.pp("picture"),
            )?,
            sound: Tower::new(
                &tower(frames * bands, [window / frames, mel.bands() / bands]),
                &vb.pp("sound"),
            )?,
            log_temperature: vb.get_with_hints(1, "log_temperature", start)?,
            device: vb.device().clone(),
            config: config.clone(),
            mel,
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, LoadError> {
        let config = config::read(&dir.join("config.json"))?;
        let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
        let encoder = Self::new(&config, &weights.builder())?;
        weights.all_used()?;
        Ok(encoder)
    }

    /// Frames `[B, size, size, 3]` in [-1, 1] to unit vectors `[B, embedding]`.
    pub fn embed_frames(&self, frames: &Tensor) -> Result<Tensor> {
        let patch = self.config.patch;
        let (batch, n) = (frames.dim(0)?, self.config.size / patch);
        let patches = frames
            .reshape(vec![batch, n, patch, n, patch, RGB])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .contiguous()?
            .reshape((batch, n, n, patch * patch * RGB))?;
        unit(&self.picture.forward(&patches)?)
    }

    /// Waveforms `[B, samples]` at 16 kHz, one window each, to unit vectors `[B, embedding]`.
    pub fn embed_sound(&self, waves: &Tensor) -> Result<Tensor> {
        let mel = self.mel.forward(waves)?;
        let [pf, pb] = self.config.sound_patch;
        let (batch, frames, bands) = mel.dims3()?;
        let (frames, bands) = (frames / pf, bands / pb);
        let patches = mel
            .narrow(1, 0, frames * pf)?
            .contiguous()?
            .reshape((batch, frames, pf, bands, pb))?
            .permute((0, 1, 3, 2, 4))?
            .contiguous()?
            .reshape((batch, frames, bands, pf * pb))?;
        unit(&self.sound.forward(&patches)?)
    }

    /// Symmetric contrastive loss of matched unit vectors `[B, embedding]`; pairs of equal `classes` `[B]` (u32) are no
    /// negatives of each other.
    pub fn loss(&self, seen: &Tensor, heard: &Tensor, classes: &Tensor) -> Result<Tensor> {
        let n = classes.dim(0)?;
        // The temperature stays at 0.01 or above, as is usual: sharper ones make training brittle.
        let scale = self.log_temperature.clamp(0f64, 100f64.ln())?.exp()?;
        let scores = seen.matmul(&heard.t()?)?.broadcast_mul(&scale)?;
        let diagonal = Tensor::eye(n, DType::F32, &self.device)?;
        let same = classes
            .unsqueeze(1)?
            .broadcast_eq(&classes.unsqueeze(0)?)?
            .to_dtype(DType::F32)?;
        let scores = (scores + ((same - &diagonal)? * -1e9)?)?;
        let matched = |scores: &Tensor| {
            (candle_nn::ops::log_softmax(scores, D::Minus1)? * &diagonal)?.sum_all()? / n as f64
        };
        (matched(&scores)? + matched(&scores.t()?.contiguous()?)?)? * -0.5
    }
}

impl Encoder for BuiltinEncoder {
    fn name(&self) -> &str {
        NAME
    }

    fn sound_window_s(&self) -> f64 {
        self.config.window_s
    }

    fn frames(
        &self,
        frames: &[&[u8]],
        width: usize,
        height: usize,
    ) -> std::result::Result<Vec<Vec<f32>>, EncodeError> {
        let size = self.config.size;
        let mut values = Vec::with_capacity(frames.len() * size * size * RGB);
        for frame in frames {
            let fitted = fit(frame, width, height, size)?;
            values.extend(fitted.iter().map(|&x| f32::from(x) / 127.5 - 1.0));
        }
        let frames = Tensor::from_vec(values, (frames.len(), size, size, RGB), &self.device)?;
        Ok(self.embed_frames(&frames)?.to_dtype(DType::F32)?.to_vec2()?)
    }

    fn sound(&self, sound: &Sound) -> std::result::Result<Vec<f32>, EncodeError> {
        let rate = self.mel.sample_rate();
        let mono = resample(&sound.mono(), rate).map_err(|e| EncodeError::Input(e.to_string()))?;
        let window = (self.config.window_s * f64::from(rate)).round() as usize;
        let mut samples = mono.samples;
        samples.resize(samples.len().max(window), 0.0);
        let count = samples.len().div_ceil(window).min(MOST_WINDOWS);
        let last = samples.len() - window;
        let starts = (0..count).map(|i| if count > 1 { i * last / (count - 1) } else { 0 });
        let waves: Vec<f32> = starts
            .flat_map(|start| samples[start..start + window].to_vec())
            .collect();
        let vectors = self.embed_sound(&Tensor::from_vec(waves, (count, window), &self.device)?)?;
        Ok(vectors.mean(0)?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

fn unit(x: &Tensor) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.sum_keepdim(D::Minus1)? + 1e-8)?.sqrt()?)
}

/// Resizes the short side to `size` and cuts the centre; RGB bytes in and out.
fn fit(frame: &[u8], width: usize, height: usize, size: usize) -> std::result::Result<Vec<u8>, EncodeError> {
    if (width, height) == (size, size) {
        return Ok(frame.to_vec());
    }
    let invalid = || EncodeError::Input(format!("frame of {width}x{height} with {} bytes", frame.len()));
    let dims = (
        u32::try_from(width).map_err(|_| invalid())?,
        u32::try_from(height).map_err(|_| invalid())?,
    );
    let picture = RgbImage::from_raw(dims.0, dims.1, frame.to_vec()).ok_or_else(invalid)?;
    let short = width.min(height).max(1);
    let scaled = |n: usize| (n * size).div_ceil(short).max(size) as u32;
    let (w, h) = (scaled(width), scaled(height));
    let picture = imageops::resize(&picture, w, h, imageops::FilterType::CatmullRom);
    let size = size as u32;
    let (x, y) = ((w - size) / 2, (h - size) / 2);
    Ok(imageops::crop_imm(&picture, x, y, size, size)
        .to_image()
        .into_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::params::Params;

    fn small() -> Result<BuiltinEncoder> {
        let config = BuiltinConfig {
            size: 24,
            window_s: 0.5,
            dim: 32,
            depth: 1,
            heads: 1,
            embedding: 8,
            ..BuiltinConfig::default()
        };
        BuiltinEncoder::new(&config, &Params::random(4, &Device::Cpu).builder())
    }

    #[test]
    fn pictures_and_sounds_become_unit_vectors_alone_or_together() -> Result<()> {
        let encoder = small()?;
        let lengths = |x: &Tensor| x.sqr()?.sum(D::Minus1)?.to_vec1::<f32>();
        let frames = Tensor::randn(0f32, 0.5, (3, 24, 24, 3), &Device::Cpu)?;
        let waves = Tensor::randn(0f32, 0.1, (3, 8000), &Device::Cpu)?;
        let (seen, heard) = (encoder.embed_frames(&frames)?, encoder.embed_sound(&waves)?);
        for vectors in [&seen, &heard] {
            assert_eq!(vectors.dims(), [3, 8]);
            assert!(lengths(vectors)?.iter().all(|x| (x - 1.0).abs() < 1e-3));
        }
        let alone = encoder.embed_frames(&frames.narrow(0, 2, 1)?)?;
        let difference = (seen.narrow(0, 2, 1)? - alone)?.abs()?.max_all()?;
        assert!(difference.to_scalar::<f32>()? < 1e-5);
        Ok(())
    }

    #[test]
    fn the_loss_prefers_matched_pairs_and_spares_equal_classes() -> Result<()> {
        let encoder = small()?;
        let eye = Tensor::eye(4, DType::F32, &Device::Cpu)?;
        let turned = eye.index_select(&Tensor::new(&[1u32, 2, 3, 0], &Device::Cpu)?, 0)?;
        let classes = Tensor::new(&[0u32, 1, 2, 3], &Device::Cpu)?;
        let loss = |seen: &Tensor, heard: &Tensor, classes: &Tensor| {
            encoder.loss(seen, heard, classes)?.to_scalar::<f32>()
        };
        let (matched, wrong) = (loss(&eye, &eye, &classes)?, loss(&eye, &turned, &classes)?);
        assert!(matched < 0.01 && wrong > 5.0, "{matched} {wrong}");
        // Where all show one thing there is nothing to be told apart.
        let same = Tensor::zeros(4, DType::U32, &Device::Cpu)?;
        let spared = loss(&eye, &turned, &same)?;
        assert!(spared.abs() < 1e-5, "{spared}");
        Ok(())
    }

    #[test]
    fn frames_are_cut_from_the_centre() {
        // A white column in the middle of a wide black frame stays in the middle.
        let (width, height, size) = (64, 32, 16);
        let frame: Vec<u8> = (0..width * height)
            .flat_map(|i| [if (30..34).contains(&(i % width)) { 255 } else { 0 }; 3])
            .collect();
        let fitted = fit(&frame, width, height, size).expect("a frame that fits");
        assert_eq!(fitted.len(), size * size * 3);
        let row: Vec<u8> = fitted.iter().step_by(3).take(size).copied().collect();
        assert!(
            row[7] > 150 && row[8] > 150 && row[0] == 0 && row[15] == 0,
            "{row:?}"
        );
        assert!(fit(&frame, width, height + 1, size).is_err());
    }
}
