//! Task `judge`: the classifiers that say what a clip shows, plays and does, from real composed clips alone.
//!
//! They learn from the split that is kept for them (backgrounds, levels and poses that no generator is trained on) and are
//! validated on combinations of thing and motion that they never saw. Some clips are worn on the way, so that the
//! softness of a codec is no reason to misjudge, and some stand still, so that "nothing happens" is a verdict too.

mod wear;

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_benchmark::judge::{JudgeConfig, Judges, Verdict, apart_ms, median, onset};
use fulgur_datasets::scenes::{Actor, Motion, Split};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::spectrum::LogMel;
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
/// Frames of a clip that the picture judge learns from in one batch.
const FRAMES_OF_CLIP: usize = 4;
/// Clips that go through the judges at a time where no gradient is needed.
const CHUNK: usize = 16;
/// A contact that is seen at most this far from the truth counts as found.
const NEAR_MS: f64 = 100.0;
/// Seed of the wear of validations: the same for all of them.
const VALIDATION_SEED: u64 = 77;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips; always single things.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Largest standard deviation of the noise on pixels.
    pub pixel_noise: f32,
    /// Share of clips that stand still, without a contact to be seen.
    pub still: f32,
    /// Weight of soft labels.
    pub label_smoothing: f64,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// Width of the networks, a multiple of 64.
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
            still: 0.08,
            label_smoothing: 0.05,
            validation: 192,
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
    worn: wear::Shape,
}

impl JudgeTask {
    /// Builds the networks and opens the data.
    ///
    /// # Errors
    /// Data that is not prepared, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        if options.batch == 0 || options.validation == 0 {
            return Err("batch and validation: found 0, expected 1 or more".into());
        }
        let clips = Clips::open(&options.clips)?;
        let spec = clips.spec();
        let params = Params::random(seed, device);
        let things = clips.composer().things().iter();
        let config = JudgeConfig {
            things: things.map(|thing| thing.id.clone()).collect(),
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
        let mel = LogMel::speech_16k(&Device::Cpu)?;
        let worn = wear::Shape {
            spec,
            mel: [mel.frames(spec.samples()), mel.bands()],
            grain: options.pixel_noise,
        };
        Ok(Self {
            options,
            clips,
            params,
            judges,
            config,
            worn,
        })
    }

    /// Clips in the unit range on the device of `batch`, their frames in the order that it says, worn.
    fn worn_clips(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        let bytes = batch.get("clips")?;
        let ordered = bytes.flatten_to(1)?.index_select(batch.get("order")?, 0)?;
        let clips = to_unit(&ordered.reshape(bytes.shape())?)?;
        wear::frames(batch, &wear::moments(batch, &clips)?, batch.get("clip_tiles")?)
    }
}

/// Contact frame as the motion judge counts: the frame that shows the instant.
fn contact_frame(contact_s: f64, fps: f64, frames: usize) -> u32 {
    ((contact_s * fps) as usize).min(frames - 1) as u32
}

/// The one thing of a judge's clip.
fn actor_of(clip: &HostClip) -> TaskResult<&Actor> {
    let actor = clip.scene.as_ref().and_then(|scene| scene.actors.first());
    actor.ok_or_else(|| "a judge's clip has no thing".into())
}

/// What a batch says about its clips.
#[derive(Default)]
struct Labels {
    things: Vec<u32>,
    motions: Vec<u32>,
    /// Frame of first contact, or the number of frames where there is none.
    contacts: Vec<u32>,
    /// 1 where the motion can be told, 0 where the clip stands still.
    moving: Vec<f32>,
    /// For every frame of every clip, which frame of the batch stands there.
    order: Vec<u32>,
    /// Frames of the batch in which the thing is to be seen.
    picks: Vec<u32>,
}

impl Labels {
    fn add(&mut self, actor: &Actor, fps: f64, frames: usize, still: bool, noise: &mut Philox) {
        let base = (self.things.len() * frames) as u32;
        let contact = contact_frame(actor.contact_s, fps, frames);
        let first = (contact as usize + 1).min(frames - 1);
        for _ in 0..FRAMES_OF_CLIP {
            self.picks
                .push(base + (first + noise.below(frames - first)) as u32);
        }
        self.things.push(actor.thing as u32);
        self.motions.push(actor.motion.class() as u32);
        if still {
            let shown = base + noise.below(frames) as u32;
            self.order.extend(std::iter::repeat_n(shown, frames));
            self.contacts.push(frames as u32);
            self.moving.push(0.0);
        } else {
            self.order.extend(base..base + frames as u32);
            self.contacts.push(contact);
            self.moving.push(1.0);
        }
    }

    fn put(self, batch: Batch) -> candle_core::Result<Batch> {
        let numbers = |values: Vec<u32>| Tensor::new(values, &Device::Cpu);
        Ok(batch
            .with("things", numbers(self.things)?)
            .with("motions", numbers(self.motions)?)
            .with("contacts", numbers(self.contacts)?)
            .with("moving", Tensor::new(self.moving, &Device::Cpu)?)
            .with("order", numbers(self.order)?)
            .with("picks", numbers(self.picks)?))
    }
}

impl Task for JudgeTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let spec = self.clips.spec();
        let mut noise = cursor.noise("clips");
        let clips: Vec<_> = (0..self.options.batch)
            .map(|_| self.clips.draw(Split::Judge, &mut noise, WANT))
            .collect();
        let mut labels = Labels::default();
        for clip in &clips {
            let still = noise.chance(self.options.still);
            labels.add(actor_of(clip)?, spec.fps, spec.frames(), still, &mut noise);
        }
        let n = clips.len();
        let batch = labels.put(Batch::new(n))?;
        let batch = wear::draw(batch, &self.worn, &mut cursor.noise("wear"))?;
        let mut noise = cursor.noise("tiles");
        Ok(batch
            .with("clips", frames_tensor(&clips, &spec)?)
            .with("samples", samples_tensor(&clips, &spec)?)
            .with("clip_tiles", wear::tiles(n * spec.frames(), &mut noise)?)
            .with("frame_tiles", wear::tiles(n * FRAMES_OF_CLIP, &mut noise)?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let smooth = self.options.label_smoothing;
        let bytes = batch.get("clips")?;
        let things = batch.get("things")?;
        let (n, _, height, width, rgb) = bytes.dims5()?;
        let picked = bytes.flatten_to(1)?.index_select(batch.get("picks")?, 0)?;
        let picked = to_unit(&picked.reshape((n, FRAMES_OF_CLIP, height, width, rgb))?)?;
        let frames = wear::frames(batch, &picked, batch.get("frame_tiles")?)?.flatten_to(1)?;
        let repeated = things
            .unsqueeze(1)?
            .broadcast_as((n, FRAMES_OF_CLIP))?
            .flatten_all()?;
        let picture = mean(&cross_entropy(
            &self.judges.picture.forward(&frames)?,
            &repeated,
            smooth,
        )?)?;
        let mel = wear::mels(batch, &self.judges.sound.mel(batch.get("samples")?)?)?;
        let sound = mean(&cross_entropy(
            &self.judges.sound.forward_mel(&mel)?,
            things,
            smooth,
        )?)?;
        let verdict = self.judges.motion.forward(&self.worn_clips(batch)?)?;
        let moving = batch.get("moving")?;
        let told = cross_entropy(&verdict.motion, batch.get("motions")?, smooth)?;
        // Of clips that stand still nobody can tell the motion.
        let motion = ((told * moving)?.sum_all()? / (moving.sum_all()? + 1e-6)?)?;
        let contact = mean(&cross_entropy(&verdict.contact, batch.get("contacts")?, 0.0)?)?;
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
        let spec = self.clips.spec();
        let device = self.params.device();
        let clips = render(self.options.validation, |i| {
            self.clips.scene(Split::HeldOutCombination, i as u64, WANT)
        });
        let mut noise = Philox::new(VALIDATION_SEED, 0);
        let (mut clean, mut worn) = (Tally::default(), Tally::default());
        let (mut stills, mut disturbed) = (0, 0);
        for chunk in clips.chunks(CHUNK) {
            let n = chunk.len();
            let mut labels = Labels::default();
            for clip in chunk {
                labels.add(actor_of(clip)?, spec.fps, spec.frames(), false, &mut noise);
            }
            let batch = wear::draw(labels.put(Batch::new(n))?, &self.worn, &mut noise)?
                .with("clips", frames_tensor(chunk, &spec)?)
                .with("clip_tiles", wear::tiles(n * spec.frames(), &mut noise)?)
                .to_device(device)?;
            let frames = to_unit(batch.get("clips")?)?;
            let mel = self
                .judges
                .sound
                .mel(&samples_tensor(chunk, &spec)?.to_device(device)?)?;
            let worn_frames = self.worn_clips(&batch)?;
            clean.add(chunk, &self.judges.judge_mel(&frames, &mel)?)?;
            worn.add(
                chunk,
                &self.judges.judge_mel(&worn_frames, &wear::mels(&batch, &mel)?)?,
            )?;
            // The last frame for the whole length of the clip.
            let last = worn_frames.narrow(1, spec.frames() - 1, 1)?;
            let still = last.broadcast_as(worn_frames.shape())?.contiguous()?;
            for verdict in self.judges.judge_mel(&still, &mel)? {
                stills += 1;
                disturbed += usize::from(verdict.contact_s.is_some());
            }
        }
        let mut figures = vec![(
            "error".to_owned(),
            f64::midpoint(clean.mean_error(), worn.mean_error()),
        )];
        figures.extend(clean.figures(""));
        figures.extend(worn.figures("worn_"));
        let disturbed = f64::from(disturbed as u32) / f64::from(stills.max(1) as u32);
        figures.push(("contact_in_still".to_owned(), disturbed));
        Ok(figures)
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, &self.config, &self.params, None, Precision::F16)
    }
}

/// How often the judges are right about clips whose truth is known, and how far off in time.
#[derive(Default)]
struct Tally {
    clips: usize,
    picture: usize,
    sound: usize,
    motion: usize,
    /// Contacts seen within [`NEAR_MS`] of the truth.
    contact: usize,
    /// Between the contact that is seen and the true one, in ms.
    contact_ms: Vec<f64>,
    /// Between the onset that is heard and the true one.
    onset_ms: Vec<f64>,
    /// Between the onset that is heard and the contact that is seen: what generated clips are judged by.
    offset_ms: Vec<f64>,
}

impl Tally {
    fn add(&mut self, clips: &[HostClip], verdicts: &[Verdict]) -> TaskResult<()> {
        for (clip, verdict) in clips.iter().zip(verdicts) {
            let actor = actor_of(clip)?;
            let heard = onset(&clip.samples).map(|onset| onset.time_s);
            let contact_ms = apart_ms(verdict.contact_s, Some(actor.contact_s));
            self.clips += 1;
            self.picture += usize::from(verdict.picture.first() == Some(&actor.thing));
            self.sound += usize::from(verdict.sound == actor.thing);
            self.motion += usize::from(verdict.motion == actor.motion.class());
            self.contact += usize::from(contact_ms <= NEAR_MS);
            self.contact_ms.push(contact_ms);
            self.onset_ms.push(apart_ms(heard, Some(actor.contact_s)));
            self.offset_ms.push(apart_ms(heard, verdict.contact_s));
        }
        Ok(())
    }

    fn shares(&self) -> [(&'static str, f64); 4] {
        let share = |count: usize| count as f64 / self.clips.max(1) as f64;
        [
            ("picture_top1", share(self.picture)),
            ("sound_top1", share(self.sound)),
            ("motion_top1", share(self.motion)),
            ("contact_found", share(self.contact)),
        ]
    }

    /// Mean over the four questions of the share of wrong answers.
    fn mean_error(&self) -> f64 {
        let shares = self.shares();
        1.0 - shares.iter().map(|(_, share)| share).sum::<f64>() / shares.len() as f64
    }

    fn figures(&self, prefix: &str) -> Vec<(String, f64)> {
        let times = [
            ("contact_ms", &self.contact_ms),
            ("onset_ms", &self.onset_ms),
            ("offset_ms", &self.offset_ms),
        ];
        let times = times.map(|(name, values)| (name, median(values).unwrap_or(f64::NAN)));
        let all = self.shares().into_iter().chain(times);
        all.map(|(name, value)| (format!("{prefix}{name}"), value))
            .collect()
    }
}

fn mean(values: &Tensor) -> candle_core::Result<Tensor> {
    values.mean_all()
}

/// Cross-entropy `[B]` of logits `[B, classes]` against class indices `[B]`, labels smoothed evenly.
fn cross_entropy(logits: &Tensor, classes: &Tensor, smooth: f64) -> candle_core::Result<Tensor> {
    let log_p = log_softmax(&logits.to_dtype(DType::F32)?, D::Minus1)?;
    let right = log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?;
    let even = log_p.mean(1)?;
    (right * (smooth - 1.0))? - (even * smooth)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::fetch::DataDir;
    use fulgur_datasets::things::{self, Things};

    fn options(data: &Path) -> Options {
        Options {
            clips: ClipOptions {
                data: data.to_owned(),
                pictures: 0.0,
                ..Options::default().clips
            },
            batch: 6,
            still: 0.5,
            validation: 4,
            dim: 64,
            depth: 1,
            ..Options::default()
        }
    }

    #[test]
    fn a_batch_tells_still_clips_from_moving_ones() -> TaskResult<()> {
        let dir = tempfile::tempdir()?;
        things::save(&Things::synthetic(4), &dir.path().join("stamps"))?;
        let task = JudgeTask::open(options(dir.path()), 1, &Device::Cpu)?;
        let cursor = Cursor { seed: 3, index: 5 };
        let batch = task.batch(&cursor)?;
        let frames = task.clips.spec().frames() as u32;
        let numbers = |name: &str| batch.get(name)?.to_vec1::<u32>();
        let (order, contacts, picks) = (numbers("order")?, numbers("contacts")?, numbers("picks")?);
        let moving = batch.get("moving")?.to_vec1::<f32>()?;
        let still = moving.iter().filter(|&&moving| moving == 0.0).count();
        assert!((1..6).contains(&still), "{still} of 6 stand still");
        for (clip, shown) in order.chunks_exact(frames as usize).enumerate() {
            let base = clip as u32 * frames;
            assert!(shown.iter().all(|at| (base..base + frames).contains(at)));
            let stands = shown.iter().all(|at| *at == shown[0]);
            assert_eq!((stands, contacts[clip] == frames), (moving[clip] == 0.0, stands));
            let picked = &picks[clip * FRAMES_OF_CLIP..][..FRAMES_OF_CLIP];
            assert!(picked.iter().all(|at| (base..base + frames).contains(at)));
            assert!(stands || picked.iter().all(|at| *at > base + contacts[clip]));
        }
        // The same cursor gives the same batch, with or without threads beside it.
        let again = task.batch(&cursor)?;
        for (name, tensor) in &batch.tensors {
            let gap = (tensor.to_dtype(DType::F32)? - again.get(name)?.to_dtype(DType::F32)?)?;
            assert_eq!(gap.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{name}");
        }
        Ok(())
    }

    #[test]
    fn the_loss_reaches_every_weight_and_the_figures_are_shares() -> TaskResult<()> {
        let dir = tempfile::tempdir()?;
        things::save(&Things::synthetic(4), &dir.path().join("stamps"))?;
        let task = JudgeTask::open(options(dir.path()), 1, &Device::Cpu)?;
        let cursor = Cursor { seed: 3, index: 0 };
        let step = Step {
            number: 0,
            progress: 0.0,
            cursor,
        };
        let losses = task.loss(&task.batch(&cursor)?, &step)?;
        assert!(losses.total.to_scalar::<f32>()?.is_finite());
        let gradients = losses.total.backward()?;
        for (name, var) in task.params.vars() {
            let gradient = gradients.get(&var).ok_or(format!("{name} has no gradient"))?;
            let size = gradient.sqr()?.sum_all()?.to_scalar::<f32>()?;
            assert!(size.is_finite(), "{name}: {size}");
        }
        let figures = task.validate()?;
        assert_eq!(figures[0].0, "error");
        for name in [
            "picture_top1",
            "sound_top1",
            "motion_top1",
            "contact_found",
            "worn_picture_top1",
            "worn_motion_top1",
            "contact_in_still",
        ] {
            let value = figures
                .iter()
                .find(|figure| figure.0 == name)
                .map(|figure| figure.1);
            assert!(
                value.is_some_and(|value| (0.0..=1.0).contains(&value)),
                "{name}: {value:?}"
            );
        }
        task.export(dir.path())?;
        let judges = Judges::load(dir.path(), &Device::Cpu)?;
        assert_eq!(judges.config(), &task.config);
        Ok(())
    }

    #[test]
    fn onsets_of_real_sounds_are_heard_where_they_are() -> TaskResult<()> {
        let data = DataDir::from_env();
        if !data.set("stamps").is_dir() {
            eprintln!(
                "skipped: {} is absent (fulgur data fetch stamps)",
                data.set("stamps").display()
            );
            return Ok(());
        }
        let clips = Clips::open(&ClipOptions {
            data: data.path().to_owned(),
            pictures: 0.0,
            ..Options::default().clips
        })?;
        let want = Want {
            frames: false,
            ..WANT
        };
        // As recorded, and under a hiss of -46 dB as a vocoder may leave it.
        for hiss in [0.0, 0.005] {
            let mut errors = Vec::new();
            for scene in clips.composer().held_out_prompts(200) {
                let mut noise = Philox::new(scene.noise_seed, 1);
                let mut clip = clips.rendered(scene, want);
                clip.samples
                    .iter_mut()
                    .for_each(|sample| *sample += hiss * noise.normal());
                let heard = onset(&clip.samples).map(|onset| onset.time_s);
                errors.push(apart_ms(heard, Some(actor_of(&clip)?.contact_s)));
            }
            errors.sort_by(f64::total_cmp);
            let quantile = |share: f64| errors[(share * (errors.len() - 1) as f64) as usize];
            let (half, most) = (quantile(0.5), quantile(0.95));
            assert!(
                half < 10.0 && most < 30.0,
                "hiss {hiss}: median {half:.1}, 95 % {most:.1} ms"
            );
        }
        Ok(())
    }
}
