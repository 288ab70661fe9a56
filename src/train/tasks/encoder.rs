//! Task `encoder`: the builtin AVHScore encoder, frames and soundtracks of one clip pulled together.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_benchmark::encoder::{BuiltinConfig, BuiltinEncoder};
use fulgur_datasets::scenes::Split;
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::clips::{ClipOptions, Clips, HostClip, Want, frames_tensor, render, samples_tensor, to_unit};
use super::export::write_part;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: true,
};

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips.
    pub clips: ClipOptions,
    /// Clips in a batch; the others of a batch are the negatives.
    pub batch: usize,
    /// Standard deviation of the noise on pixels: generated frames are not quite clean.
    pub pixel_noise: f32,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// The network.
    pub model: BuiltinConfig,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: ClipOptions {
                film: 0.15,
                ..ClipOptions::default()
            },
            batch: 128,
            pixel_noise: 0.05,
            validation: 64,
            model: BuiltinConfig::default(),
        }
    }
}

/// The task.
pub(super) struct EncoderTask {
    options: Options,
    clips: Clips,
    params: Params,
    encoder: BuiltinEncoder,
}

impl EncoderTask {
    /// Builds the network and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let clips = Clips::open(&options.clips)?;
        let params = Params::random(seed, device);
        let encoder = BuiltinEncoder::new(&options.model, &params.builder())?;
        Ok(Self {
            options,
            clips,
            params,
            encoder,
        })
    }

    /// One frame of a clip in which all its things are to be seen, if there is one.
    fn pick(&self, clip: &HostClip, u: f32) -> usize {
        let frames = self.clips.spec().frames();
        let first = clip
            .scene
            .iter()
            .flat_map(|scene| &scene.actors)
            .map(|actor| actor.boxes.iter().position(Option::is_some).unwrap_or(0));
        let first = first.max().unwrap_or(0).min(frames - 1);
        first + ((frames - first) as f32 * u) as usize
    }
}

impl Task for EncoderTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let spec = self.clips.spec();
        let size = spec.width * spec.height * 3;
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..self.options.batch)
            .map(|_| self.clips.draw(Split::Train, &mut noise, WANT))
            .collect();
        let mut frames = Vec::with_capacity(clips.len() * size);
        let mut classes = Vec::with_capacity(clips.len());
        for (i, clip) in clips.iter().enumerate() {
            let frame = self.pick(clip, noise.uniform());
            frames.extend_from_slice(&clip.frames[frame * size..][..size]);
            // Scenes of the same things are no negatives of each other; each piece of the film is its own class.
            let class = clip.scene.as_ref().map_or(u32::MAX - i as u32, |scene| {
                scene
                    .actors
                    .iter()
                    .map(|actor| actor.thing as u32 + 1)
                    .fold(0, |code, id| code * 1009 + id)
            });
            classes.push(class);
        }
        let shape = (clips.len(), spec.height, spec.width, 3);
        let mut grain = cursor.noise("grain");
        let strength: Vec<f32> = clips
            .iter()
            .map(|_| self.options.pixel_noise * grain.uniform())
            .collect();
        let grain = grain.normals(frames.len());
        Ok(Batch::new(clips.len())
            .with("frames", Tensor::from_vec(frames, shape, &Device::Cpu)?)
            .with("grain", Tensor::from_vec(grain, shape, &Device::Cpu)?)
            .with(
                "strength",
                Tensor::from_vec(strength, (clips.len(), 1, 1, 1), &Device::Cpu)?,
            )
            .with("samples", samples_tensor(&clips, &spec)?)
            .with("classes", Tensor::from_vec(classes, clips.len(), &Device::Cpu)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let grain = batch.get("grain")?.broadcast_mul(batch.get("strength")?)?;
        let frames = (to_unit(batch.get("frames")?)? + grain)?;
        let seen = self.encoder.embed_frames(&frames)?;
        let heard = self.encoder.embed_sound(batch.get("samples")?)?;
        Ok(self.encoder.loss(&seen, &heard, batch.get("classes")?)?.into())
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let n = self.options.validation;
        let clips = render(n, |i| self.clips.scene(Split::HeldOutCombination, i as u64, WANT));
        let spec = self.clips.spec();
        let device = self.params.device();
        let heard = self
            .encoder
            .embed_sound(&samples_tensor(&clips, &spec)?.to_device(device)?)?;
        let mut scores = Vec::with_capacity(n);
        for clip in &clips {
            let frames = frames_tensor(std::slice::from_ref(clip), &spec)?
                .squeeze(0)?
                .to_device(device)?;
            let seen = self.encoder.embed_frames(&to_unit(&frames)?)?;
            // Row of cosines of this clip's frames, averaged, with the sounds of all clips.
            scores.push(
                seen.matmul(&heard.t()?)?
                    .mean(0)?
                    .to_dtype(DType::F32)?
                    .to_vec1::<f32>()?,
            );
        }
        let matched = scores
            .iter()
            .enumerate()
            .map(|(i, row)| f64::from(row[i]))
            .sum::<f64>()
            / n as f64;
        let shuffled = scores
            .iter()
            .enumerate()
            .map(|(i, row)| f64::from(row[(i + 1) % n]))
            .sum::<f64>()
            / n as f64;
        let right = scores.iter().enumerate().filter(|(i, row)| {
            let best = row
                .iter()
                .enumerate()
                .max_by(|a, b| a.1.total_cmp(b.1))
                .map(|(j, _)| j);
            best == Some(*i)
        });
        Ok(vec![
            ("shuffled_minus_matched".to_owned(), shuffled - matched),
            ("avhscore_matched".to_owned(), matched),
            ("avhscore_shuffled".to_owned(), shuffled),
            ("retrieval_top1".to_owned(), right.count() as f64 / n as f64),
        ])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, &self.options.model, &self.params, None, Precision::F16)
    }
}
