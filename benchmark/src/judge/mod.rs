//! Classifiers that judge generated clips: which thing is seen, which is heard, how it moves and when it lands.
//!
//! They learn from real composed clips alone (other backgrounds, levels and poses than the generator's) and never take
//! part in training or choosing a generator.

mod events;
mod motion;

pub use events::{MISSING_MS, Onset, apart_ms, median, onset};
pub use motion::{MotionJudge, MotionJudgeConfig, MotionVerdict};

use std::path::Path;

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_nn::ops::softmax;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::config::{self, ConfigError};
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
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The things that are seen, the most likely first: five of them, or all where there are fewer.
    pub picture: Vec<usize>,
    /// The thing that is heard.
    pub sound: usize,
    /// The motion.
    pub motion: usize,
    /// First contact or appearance in seconds, where there is one.
    pub contact_s: Option<f64>,
}

/// Last frames of a clip that the picture judge looks at: what came in is there by then.
const LAST_FRAMES: usize = 6;
/// Things that the picture judge names.
const NAMED: usize = 5;
/// Samples a second of every sound.
const SAMPLE_RATE: f64 = 16_000.0;
/// Sides of frames are multiples of this, of the patches of picture and motion alike.
const SIDE_MULTIPLE: usize = 24;
/// Widths are multiples of this: heads are 32 wide, and the motion network is half as wide.
const DIM_MULTIPLE: usize = 64;
/// What a configuration may ask for at most: side of a frame, frames, width and blocks.
const MOST: [usize; 4] = [1024, 1 << 14, 4096, 64];

impl JudgeConfig {
    /// Whether networks of this shape exist; otherwise the field, what was found and what was expected.
    fn check(&self) -> std::result::Result<(), String> {
        let within = |field: &str, found: usize, unit: usize, most: usize| {
            if found > 0 && found.is_multiple_of(unit) && found <= most {
                return Ok(());
            }
            Err(format!(
                "{field}: found {found}, expected a multiple of {unit} up to {most}"
            ))
        };
        within("size", self.size, SIDE_MULTIPLE, MOST[0])?;
        within("frames", self.frames, 1, MOST[1])?;
        within("dim", self.dim, DIM_MULTIPLE, MOST[2])?;
        within("depth", self.depth, 1, MOST[3])?;
        if !(self.fps.is_finite() && self.fps > 0.0) {
            return Err(format!("fps: found {}, expected more than 0", self.fps));
        }
        let samples = (self.duration_s() * SAMPLE_RATE).round();
        if self.samples as f64 != samples {
            let (found, frames, fps) = (self.samples, self.frames, self.fps);
            return Err(format!(
                "samples: found {found}, expected {samples} for {frames} frames at {fps} a second"
            ));
        }
        if self.things.is_empty() || self.motions.is_empty() {
            return Err("things and motions: found an empty list, expected names".into());
        }
        Ok(())
    }

    /// Length of a clip in seconds.
    pub fn duration_s(&self) -> f64 {
        self.frames as f64 / self.fps
    }
}

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
    /// A missing or unreadable file, a configuration that no judges have, weights that are missing, unexpected or of
    /// another shape.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, LoadError> {
        let path = dir.join("config.json");
        let config: JudgeConfig = config::read(&path)?;
        config.check().map_err(|detail| ConfigError { path, detail })?;
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
        self.judge_mel(clips, &self.sound.mel(waves)?)
    }

    /// Judges clips whose sound is a spectrogram already, as [`SoundJudge::mel`] gives it.
    pub fn judge_mel(&self, clips: &Tensor, mel: &Tensor) -> Result<Vec<Verdict>> {
        let (batch, frames) = (clips.dim(0)?, clips.dim(1)?);
        let last = LAST_FRAMES.min(frames);
        let seen = clips
            .narrow(1, frames - last, last)?
            .contiguous()?
            .flatten_to(1)?;
        let seen = softmax(&self.picture.forward(&seen)?.to_dtype(DType::F32)?, D::Minus1)?;
        let seen = seen.reshape((batch, last, ()))?.mean(1)?.to_vec2::<f32>()?;
        let heard = top1(&self.sound.forward_mel(mel)?)?;
        let moves = self.motion.forward(clips)?;
        let motion = top1(&moves.motion)?;
        let contact_s = moves.contact_s(self.config.fps)?;
        Ok((0..batch)
            .map(|i| Verdict {
                picture: most_likely(&seen[i]),
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

    /// Waveforms `[B, samples]` at 16 kHz to the spectrograms that the network hears, `[B, samples / 160, 64]`.
    pub fn mel(&self, waves: &Tensor) -> Result<Tensor> {
        self.mel.forward(waves)
    }

    /// Spectrograms to logits `[B, things]`.
    pub fn forward_mel(&self, mel: &Tensor) -> Result<Tensor> {
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

/// Positions of the largest values, the largest first.
fn most_likely(row: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
    order.truncate(NAMED);
    order
}

/// Index of the largest logit in each row of `[B, classes]`.
fn top1(logits: &Tensor) -> Result<Vec<u32>> {
    logits.to_dtype(DType::F32)?.argmax(1)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::params::{Params, Precision};

    type Change = fn(&mut JudgeConfig);

    fn small() -> JudgeConfig {
        let names = |kind: &str, n: usize| (0..n).map(|i| format!("{kind} {i}")).collect();
        JudgeConfig {
            things: names("thing", 7),
            motions: names("motion", 3),
            size: 24,
            frames: 6,
            fps: 12.0,
            samples: 8000,
            dim: 64,
            depth: 1,
        }
    }

    #[test]
    fn a_clip_is_judged_alike_alone_and_in_a_batch() -> Result<()> {
        let config = small();
        let judges = Judges::new(&config, &Params::random(3, &Device::Cpu).builder())?;
        let clips = Tensor::randn(0f32, 0.5, (3, 6, 24, 24, 3), &Device::Cpu)?;
        let waves = Tensor::randn(0f32, 0.1, (3, 8000), &Device::Cpu)?;
        let all = judges.judge(&clips, &waves)?;
        let one = judges.judge(&clips.narrow(0, 1, 1)?, &waves.narrow(0, 1, 1)?)?;
        let (a, b) = (&all[1], &one[0]);
        assert_eq!((&a.picture, a.sound, a.motion), (&b.picture, b.sound, b.motion));
        let mut named = a.picture.clone();
        named.sort_unstable();
        named.dedup();
        assert!(named.len() == NAMED && named.iter().all(|&i| i < 7), "{named:?}");
        Ok(())
    }

    #[test]
    fn the_most_likely_come_first() {
        assert_eq!(most_likely(&[0.1, 0.4, 0.2, 0.05, 0.15, 0.1]), [1, 2, 4, 0, 5]);
        assert_eq!(most_likely(&[0.3, 0.7]), [1, 0]);
    }

    #[test]
    fn a_shape_that_no_judges_have_is_one_line_and_no_panic() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let params = Params::random(3, &Device::Cpu);
        Judges::new(&small(), &params.builder()).map_err(std::io::Error::other)?;
        let weights = dir.path().join("model.safetensors");
        let saved = params.save(&weights, &Default::default(), Precision::F16);
        saved.map_err(std::io::Error::other)?;
        let load = |config: &JudgeConfig| {
            std::fs::write(dir.path().join("config.json"), serde_json::to_string(config)?)?;
            Ok::<_, std::io::Error>(Judges::load(dir.path(), &Device::Cpu))
        };
        assert!(load(&small())?.is_ok());
        let wrong: [(Change, &str); 6] = [
            (|c| c.size = 0, "size: found 0, expected a multiple of 24"),
            (|c| c.dim = 96, "dim: found 96, expected a multiple of 64"),
            (|c| c.frames = usize::MAX, "frames: found"),
            (|c| c.fps = -1.0, "fps: found -1"),
            (|c| c.samples = 1, "samples: found 1, expected 8000 for 6 frames"),
            (|c| c.things.clear(), "things and motions: found an empty list"),
        ];
        for (change, words) in wrong {
            let mut config = small();
            change(&mut config);
            let message = load(&config)?.map(|_| ()).unwrap_err().to_string();
            assert!(
                message.contains(words) && message.contains("config.json"),
                "{message}"
            );
            assert!(!message.contains('\n'), "{message}");
        }
        Ok(())
    }
}
