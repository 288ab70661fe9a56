//! Task `judge`: the classifiers that say what a clip shows, plays and does, from real composed clips alone.

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_benchmark::judge::{JudgeConfig, Judges, onset};
use fulgur_datasets::scenes::{Motion, Split};
use fulgur_lightnet::params::{Params, Precision};
use serde::Deserialize;

use super::clips::{ClipOptions, Clips, HostClip, Want, frames_tensor, render, samples_tensor, to_unit};
use super::export::write_part;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: true,
};
/// Frames of a clip that the picture judge learns from in one batch.
const FRAMES_OF_CLIP: usize = 4;
/// Clips that go through the judges at a time where no gradient is needed.
const CHUNK: usize = 16;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips; always single things.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Largest standard deviation of the noise on pixels.
    pub pixel_noise: f32,
    /// Weight of soft labels.
    pub label_smoothing: f64,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// Width of the networks, a multiple of 96.
    pub dim: usize,
    /// Blocks of the networks.
    pub depth: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: ClipOptions {
                two_things: 0.0,
                seed: 1,
                ..ClipOptions::default()
            },
            batch: 48,
            pixel_noise: 0.1,
            label_smoothing: 0.05,
            validation: 96,
            dim: 192,
            depth: 4,
        }
    }
}

/// The task.
pub(super) struct JudgeTask {
    options: Options,
    clips: Clips,
    params: Params,
    judges: Judges,
    config: JudgeConfig,
}

impl JudgeTask {
    /// Builds the networks and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let clips = Clips::open(&options.clips)?;
        let spec = clips.spec();
        let params = Params::random(seed, device);
        let config = JudgeConfig {
            things: clips
                .composer()
                .things()
                .iter()
                .map(|thing| thing.id.clone())
                .collect(),
            motions: Motion::ALL
                .iter()
                .map(|motion| motion.name().to_owned())
                .collect(),
            size: spec.width,
            frames: spec.frames(),
            fps: spec.fps,
            samples: spec.samples(),
            dim: options.dim,
            depth: options.depth,
        };
        let judges = Judges::new(&config, &params.builder())?;
        Ok(Self {
            options,
            clips,
            params,
            judges,
            config,
        })
    }
}

/// Contact frame as the motion judge counts: the frame that shows the instant.
fn contact_frame(contact_s: f64, fps: f64, frames: usize) -> u32 {
    ((contact_s * fps) as usize).min(frames - 1) as u32
}

impl Task for JudgeTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let spec = self.clips.spec();
        let size = spec.width * spec.height * 3;
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..self.options.batch)
            .map(|_| self.clips.draw(Split::Judge, &mut noise, WANT))
            .collect();
        let n = clips.len();
        let (mut frames, mut things, mut motions, mut contacts) = (vec![], vec![], vec![], vec![]);
        for clip in &clips {
            let actor = clip.scene.as_ref().and_then(|scene| scene.actors.first());
            let actor = actor.ok_or("a judge's clip has no thing")?;
            let contact = contact_frame(actor.contact_s, spec.fps, spec.frames());
            let first = (contact as usize + 1).min(spec.frames() - 1);
            for _ in 0..FRAMES_OF_CLIP {
                let frame = first + noise.below(spec.frames() - first);
                frames.extend_from_slice(&clip.frames[frame * size..][..size]);
            }
            things.push(actor.thing as u32);
            motions.push(actor.motion.class() as u32);
            contacts.push(contact);
        }
        let picture_shape = (n * FRAMES_OF_CLIP, spec.height, spec.width, 3);
        let mut grain = cursor.noise("grain");
        let strength: Vec<f32> = (0..picture_shape.0)
            .map(|_| self.options.pixel_noise * grain.uniform())
            .collect();
        let grain = grain.normals(frames.len());
        Ok(Batch::new(n)
            .with("clips", frames_tensor(&clips, &spec)?)
            .with("samples", samples_tensor(&clips, &spec)?)
            .with("frames", Tensor::from_vec(frames, picture_shape, &Device::Cpu)?)
            .with("grain", Tensor::from_vec(grain, picture_shape, &Device::Cpu)?)
            .with(
                "strength",
                Tensor::from_vec(strength, (picture_shape.0, 1, 1, 1), &Device::Cpu)?,
            )
            .with("things", Tensor::from_vec(things, n, &Device::Cpu)?)
            .with("motions", Tensor::from_vec(motions, n, &Device::Cpu)?)
            .with("contacts", Tensor::from_vec(contacts, n, &Device::Cpu)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let smooth = self.options.label_smoothing;
        let grain = batch.get("grain")?.broadcast_mul(batch.get("strength")?)?;
        let frames = (to_unit(batch.get("frames")?)? + grain)?;
        let things = batch.get("things")?;
        let n = things.dim(0)?;
        let repeated = things
            .unsqueeze(1)?
            .broadcast_as((n, FRAMES_OF_CLIP))?
            .flatten_all()?;
        let picture = cross_entropy(&self.judges.picture.forward(&frames)?, &repeated, smooth)?;
        let sound = cross_entropy(&self.judges.sound.forward(batch.get("samples")?)?, things, smooth)?;
        let verdict = self.judges.motion.forward(&to_unit(batch.get("clips")?)?)?;
        let motion = cross_entropy(&verdict.motion, batch.get("motions")?, smooth)?;
        let contact = cross_entropy(&verdict.contact, batch.get("contacts")?, 0.0)?;
        let total = (((&picture + &sound)? + &motion)? + &contact)?;
        let parts = vec![
            ("picture", picture),
            ("sound", sound),
            ("motion", motion),
            ("contact", contact),
        ];
        Ok(Losses { total, parts })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let n = self.options.validation;
        let spec = self.clips.spec();
        let clips = render(n, |i| self.clips.scene(Split::HeldOutCombination, i as u64, WANT));
        let (mut picture, mut sound, mut motion, mut errors) = (0.0, 0.0, 0.0, Vec::new());
        for chunk in clips.chunks(CHUNK) {
            let frames = frames_tensor(chunk, &spec)?.to_device(self.params.device())?;
            let samples = samples_tensor(chunk, &spec)?.to_device(self.params.device())?;
            let verdicts = self.judges.judge(&to_unit(&frames)?, &samples)?;
            for (clip, verdict) in chunk.iter().zip(verdicts) {
                let Some(actor) = clip.scene.as_ref().and_then(|s| s.actors.first()) else {
                    continue;
                };
                picture += f64::from(verdict.picture == actor.thing);
                sound += f64::from(verdict.sound == actor.thing);
                motion += f64::from(verdict.motion == actor.motion.class());
                errors.push(offset_ms(clip, verdict.contact_s));
            }
        }
        errors.sort_by(f64::total_cmp);
        let share = |count: f64| count / n as f64;
        let worst = share(picture).min(share(sound)).min(share(motion));
        Ok(vec![
            ("error".to_owned(), 1.0 - worst),
            ("picture_top1".to_owned(), share(picture)),
            ("sound_top1".to_owned(), share(sound)),
            ("motion_top1".to_owned(), share(motion)),
            (
                "offset_ms".to_owned(),
                errors.get(errors.len() / 2).copied().unwrap_or(f64::NAN),
            ),
        ])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, &self.config, &self.params, None, Precision::F16)
    }
}

/// Distance between the onset that is heard and the contact that is seen; a second where one is missing.
fn offset_ms(clip: &HostClip, contact_s: Option<f64>) -> f64 {
    match (onset(&clip.samples), contact_s) {
        (Some(heard), Some(seen)) => (heard.time_s - seen).abs() * 1000.0,
        _ => 1000.0,
    }
}

/// Mean cross-entropy of logits `[B, classes]` against class indices `[B]`, labels smoothed evenly.
fn cross_entropy(logits: &Tensor, classes: &Tensor, smooth: f64) -> candle_core::Result<Tensor> {
    let log_p = log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?;
    let right = log_p.gather(&classes.unsqueeze(1)?, 1)?.mean_all()?;
    let even = log_p.mean_all()?;
    (right * (smooth - 1.0))? - (even * smooth)?
}
