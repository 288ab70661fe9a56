//! Classifiers that judge generated clips: which thing is seen, which is heard, how it moves and when it lands.
//!
//! They learn from real composed clips alone (other backgrounds, levels and poses than the generator's) and never take
//! part in training or choosing a generator.

mod events;
mod motion;

pub use events::{Onset, onset};
pub use motion::{MotionJudge, MotionJudgeConfig, MotionVerdict};

use std::path::Path;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::softmax;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::config;
use fulgur_lightnet::params::Frozen;
use serde::{Deserialize, Serialize};

use crate::encoder::{LoadError, Tower, TowerConfig};

const RGB: usize = 3;

/// Names the thing that a frame shows.
#[derive(Clone, Debug)]
pub struct PictureJudge {
    tower: Tower,
    size: usize,
    patch: usize,
}

/// Names the thing that a soundtrack holds.
#[derive(Clone, Debug)]
pub struct SoundJudge {
    tower: Tower,
    mel: LogMel,
    patch: [usize; 2],
}

/// Shape of the judges (`config.json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JudgeConfig {
    /// Names of the things, in the order of the logits.
    pub things: Vec<String>,
    /// Names of the motions, in the order of the logits.
    pub motions: Vec<String>,
    /// Height and width of frames.
    pub size: usize,
    /// Frames of a clip.
    pub frames: usize,
    /// Frames per second.
    pub fps: f64,
    /// Samples of a clip, at 16 kHz.
    pub samples: usize,
    /// Width of the picture and sound networks; the motion network is half as wide.
    pub dim: usize,
    /// Blocks of the networks.
    pub depth: usize,
}

/// All three.
#[derive(Clone, Debug)]
pub struct Judges {
    /// What is seen.
    pub picture: PictureJudge,
    /// What is heard.
    pub sound: SoundJudge,
    /// How it moves.
    pub motion: MotionJudge,
    config: JudgeConfig,
}

/// What the judges say of one clip: indices of things and motions, and the moment of contact.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// The thing that is seen.
    pub picture: usize,
    /// The thing that is heard.
    pub sound: usize,
    /// The motion.
    pub motion: usize,
    /// First contact or appearance in seconds, where there is one.
    pub contact_s: Option<f64>,
}

/// Last frames of a clip that the picture judge looks at: what came in is there by then.
const LAST_FRAMES: usize = 6;

impl Judges {
    /// Takes `picture`, `sound` and `motion`.
    pub fn new(config: &JudgeConfig, vb: &VarBuilder) -> Result<Self> {
        let motion = MotionJudgeConfig {
            frames: config.frames,
            size: config.size,
            motions: config.motions.len(),
            dim: config.dim / 2,
            depth: config.depth,
        };
        Ok(Self {
            picture: PictureJudge::new(config, &vb.pp("picture"))?,
            sound: SoundJudge::new(config, &vb.pp("sound"))?,
            motion: MotionJudge::new(&motion, &vb.pp("motion"))?,
            config: config.clone(),
        })
    }

    /// Loads `config.json` and `model.safetensors` of `dir` onto `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, LoadError> {
        let config: JudgeConfig = config::read(&dir.join("config.json"))?;
        let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
        let judges = Self::new(&config, &weights.builder())?;
        weights.all_used()?;
        Ok(judges)
    }

    /// Shape of the judges, with the names of their classes.
    pub fn config(&self) -> &JudgeConfig {
        &self.config
    }

    /// Judges clips: frames `[B, F, size, size, 3]` in [-1, 1] and waveforms `[B, samples]` at 16 kHz.
    pub fn judge(&self, clips: &Tensor, waves: &Tensor) -> Result<Vec<Verdict>> {
        let (batch, frames) = (clips.dim(0)?, clips.dim(1)?);
        let last = LAST_FRAMES.min(frames);
        let seen = clips
            .narrow(1, frames - last, last)?
            .contiguous()?
            .flatten_to(1)?;
        let seen = softmax(&self.picture.forward(&seen)?.to_dtype(DType::F32)?, D::Minus1)?;
        let seen = top1(&seen.reshape((batch, last, ()))?.mean(1)?)?;
        let heard = top1(&self.sound.forward(waves)?)?;
        let moves = self.motion.forward(clips)?;
        let motion = top1(&moves.motion)?;
        let contact_s = moves.contact_s(self.config.fps)?;
        Ok((0..batch)
            .map(|i| Verdict {
                picture: seen[i] as usize,
                sound: heard[i] as usize,
                motion: motion[i] as usize,
                contact_s: contact_s[i],
            })
            .collect())
    }
}

impl PictureJudge {
    /// Takes the tensors of a [`Tower`].
    pub fn new(config: &JudgeConfig, vb: &VarBuilder) -> Result<Self> {
        let (size, patch) = (config.size, 8);
        let tower = TowerConfig {
            values: patch * patch * RGB,
            axes: vec![size / patch; 2],
            dim: config.dim,
            depth: config.depth,
            heads: config.dim / 32,
            output: config.things.len(),
        };
        Ok(Self {
            tower: Tower::new(&tower, vb)?,
            size,
            patch,
        })
    }

    /// Frames `[B, size, size, 3]` in [-1, 1] to logits `[B, things]`.
    pub fn forward(&self, frames: &Tensor) -> Result<Tensor> {
        let (n, patch) = (self.size / self.patch, self.patch);
        let batch = frames.dim(0)?;
        let patches = frames
            .reshape(vec![batch, n, patch, n, patch, RGB])?
            .permute(vec![0, 1, 3, 2, 4, 5])?
            .contiguous()?
            .reshape((batch, n, n, patch * patch * RGB))?;
        self.tower.forward(&patches)
    }
}

impl SoundJudge {
    /// Takes the tensors of a [`Tower`].
    pub fn new(config: &JudgeConfig, vb: &VarBuilder) -> Result<Self> {
        let mel = LogMel::speech_16k(vb.device())?;
        let patch = [4, 16];
        let frames = mel.frames(config.samples);
        let tower = TowerConfig {
            values: patch[0] * patch[1],
            axes: vec![frames / patch[0], mel.bands() / patch[1]],
            dim: config.dim,
            depth: config.depth,
            heads: config.dim / 32,
            output: config.things.len(),
        };
        Ok(Self {
            tower: Tower::new(&tower, vb)?,
            mel,
            patch,
        })
    }

    /// Waveforms `[B, samples]` at 16 kHz to logits `[B, things]`.
    pub fn forward(&self, waves: &Tensor) -> Result<Tensor> {
        let mel = self.mel.forward(waves)?;
        let (batch, frames, bands) = mel.dims3()?;
        let [pf, pb] = self.patch;
        let (n, m) = (frames / pf, bands / pb);
        let patches = mel
            .narrow(1, 0, n * pf)?
            .contiguous()?
            .reshape((batch, n, pf, m, pb))?
            .permute((0, 1, 3, 2, 4))?
            .contiguous()?
            .reshape((batch, n, m, pf * pb))?;
        self.tower.forward(&patches)
    }
}

/// Index of the largest logit in each row of `[B, classes]`.
pub fn top1(logits: &Tensor) -> Result<Vec<u32>> {
    logits.to_dtype(DType::F32)?.argmax(1)?.to_vec1()
}
