//! The evaluation itself: batches of prompts through the generator, their clips and the real ones before the judges.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use fulgur_benchmark::avhscore::{frame_vectors, mean_cosine};
use fulgur_benchmark::encoder::{EncodeError, Encoder};
use fulgur_benchmark::judge::apart_ms;
use fulgur_datasets::draw::Canvas;
use fulgur_datasets::media::{MediaError, Picture, Sound, Video};
use fulgur_datasets::scenes::{ClipSpec, Scene, Split};
use fulgur_tavdiffusion::pipeline::{Clip, Stage as Making};
use serde::Serialize;

use super::figures::{Figures, Found, Shuffled, Truth, ratio};
use super::jury::{Jury, SAMPLE_RATE};
use super::maker::{Maker, Wanted};
use super::neighbours::{self, Distances, Nearest};
use super::sheet;
use crate::train::TaskResult;
use crate::train::tasks::clips::{
    ClipOptions, Clips, HostClip, Want, frames_tensor, render, samples_tensor, to_unit,
};
use crate::train::tasks::tav;

const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: true,
};
/// Clips on a sheet.
const ON_SHEET: usize = 24;
/// Clips on a sheet of neighbours.
const NEIGHBOURS_ON_SHEET: usize = 16;

/// Why a generator cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The generator refuses a request or fails.
    #[error(transparent)]
    Generator(#[from] fulgur_tavdiffusion::error::Error),
    /// The encoder fails.
    #[error(transparent)]
    Encoder(#[from] EncodeError),
    /// A clip that is none.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The arithmetic fails on the device.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// Parts that do not go together.
    #[error("{field}: found {found}, expected {expected}")]
    Unfit {
        /// What differs.
        field: &'static str,
        /// Its value.
        found: String,
        /// The value that the others need.
        expected: String,
    },
    /// The user stopped before there was anything to tell.
    #[error("stopped before the first clips were judged")]
    Stopped,
}

/// What takes part.
pub struct Parts<'a> {
    /// The generator that is judged.
    pub generator: &'a dyn Maker,
    /// The judges.
    pub jury: &'a Jury,
    /// The encoder of AVHScore.
    pub encoder: &'a dyn Encoder,
    /// Source of the prompts and of their real clips, in the size that the judges look at.
    pub clips: &'a Clips,
    /// Where judges and generator compute.
    pub device: &'a Device,
}

/// Training clips to search for neighbours.
#[derive(Clone, Copy)]
pub struct Training<'a> {
    /// Their source, in the size that the judges look at.
    pub clips: &'a Clips,
    /// How many of them.
    pub count: usize,
}

/// What is evaluated.
#[derive(Clone)]
pub struct Options<'a> {
    /// Number of prompts, at least 1.
    pub prompts: usize,
    /// Seed of the noise of the first clip; the following clips take the following seeds.
    pub seed: u64,
    /// Clips made at a time, at least 1.
    pub batch: usize,
    /// Prompts in the plainest words instead of varied ones.
    pub canonical: bool,
    /// Steps, where not the model's own.
    pub steps: Option<usize>,
    /// Guidance of the picture, where not the model's own.
    pub guidance_video: Option<f64>,
    /// Guidance of the sound, where not the model's own.
    pub guidance_audio: Option<f64>,
    /// Judges real clips that went through the codecs too, where the model has their encoders.
    pub decoded: bool,
    /// Draws a sheet of the first clips.
    pub sheet: bool,
    /// Looks for nearest training clips, and draws a sheet of them.
    pub training: Option<Training<'a>>,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Clips are made and judged; counted in denoising steps.
    Clips,
    /// Training clips are compared.
    Neighbours,
}

/// How far the evaluation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// How much of it is done.
    pub done: u64,
    /// And of how much.
    pub total: u64,
}

/// What was found in one generated clip: two generators are compared prompt by prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// What was asked for.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: u64,
    /// The thing that is seen is the one of the prompt.
    pub picture: bool,
    /// The thing that is heard is.
    pub sound: bool,
    /// The motion is.
    pub motion: bool,
    /// When the sound starts, in seconds, where it does.
    pub onset_s: Option<f64>,
    /// When things meet in the picture, in seconds, where they do.
    pub contact_s: Option<f64>,
    /// Distance of the two in ms, 1,000 without one of them.
    pub onset_error_ms: f64,
    /// How well sound and picture belong together.
    pub avhscore: Option<f64>,
}

/// The figures of a generator.
#[derive(Clone, Debug, Serialize)]
pub struct Evaluation {
    /// Prompts that were judged.
    pub n: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Guidance of the picture.
    pub guidance_video: f64,
    /// Guidance of the sound.
    pub guidance_audio: f64,
    /// Generated clips.
    pub generated: Figures,
    /// Real clips of the same prompts: the ceiling.
    pub real: Figures,
    /// Real clips after the codecs and the vocoder of the model.
    pub decoded: Option<Figures>,
    /// Real pictures with the sounds of other clips: the floor.
    pub shuffled: Shuffled,
    /// AVHScore of generated clips as a share of that of real ones.
    pub avhscore_ratio: Option<f64>,
    /// AVHScore of shuffled pairs as a share of that of real ones.
    pub shuffled_ratio: Option<f64>,
    /// Distances to the nearest training clips.
    pub neighbours: Option<Distances>,
    /// Seconds in which the generated clips were made.
    pub generate_seconds: f64,
    /// What was found in each generated clip, in the order of the prompts.
    #[serde(skip)]
    pub clips: Vec<Judged>,
    /// Whether all prompts were judged and all training clips compared.
    #[serde(skip)]
    pub complete: bool,
    /// The sheet of the first clips.
    #[serde(skip)]
    pub sheet: Option<Picture>,
    /// The sheet of neighbours.
    #[serde(skip)]
    pub neighbour_sheet: Option<Picture>,
}

/// Opens the prepared sets `stamps` and `backgrounds` in the folder `data`, to compose clips as generators are trained
/// on: of the size that judges look at, drawn from `seed`.
///
/// # Errors
/// A set that is not prepared, with the command that prepares it; a size that no clip can have.
pub fn open_clips(data: &Path, seed: u64, spec: ClipSpec) -> TaskResult<Clips> {
    let options = ClipOptions {
        data: data.to_owned(),
        seed,
        ..ClipOptions::default()
    };
    Clips::open_as(&options, spec)
}

/// Opens the scenes that the builtin generator learnt from, as [`open_clips`] does.
///
/// # Errors
/// As for [`open_clips`].
pub fn open_training_clips(data: &Path, spec: ClipSpec) -> TaskResult<Clips> {
    let options = ClipOptions {
        data: data.to_owned(),
        ..tav::clip_options()
    };
    Clips::open_as(&options, spec)
}

/// Judges a generator. When `cancel` is set the figures cover what was finished by then.
///
/// # Errors
/// Parts that do not go together, a request that the model cannot fulfil, arithmetic that fails, or a stop before the
/// first batch was judged.
pub fn evaluate(
    parts: &Parts<'_>,
    options: &Options<'_>,
    cancel: &AtomicBool,
    on_progress: &mut dyn FnMut(Progress),
) -> Result<Evaluation, EvalError> {
    let rate = parts.generator.sample_rate();
    if rate != SAMPLE_RATE {
        return Err(EvalError::Unfit {
            field: "sample_rate of the model",
            found: rate.to_string(),
            expected: format!("{SAMPLE_RATE}, that of the judges"),
        });
    }
    let scenes = parts.clips.composer().held_out_prompts(options.prompts);
    let prompts: Vec<Prompt> = scenes
        .into_iter()
        .zip(0..)
        .filter_map(|(scene, i)| Prompt::new(parts, options, scene, options.seed.wrapping_add(i)))
        .collect();
    let Some(Wanted { steps, guidance, .. }) = prompts.first().map(|prompt| &prompt.wanted) else {
        return Err(EvalError::Stopped);
    };
    let steps = *steps;
    let progress = |clips: f64| Progress {
        stage: Stage::Clips,
        done: (clips * steps as f64) as u64,
        total: (prompts.len() * steps) as u64,
    };
    let mut rows = Rows::default();
    let mut generate_seconds = 0.0;
    for batch in prompts.chunks(options.batch.max(1)) {
        let wanted: Vec<Wanted> = batch.iter().map(|prompt| prompt.wanted.clone()).collect();
        let before = rows.truths.len() as f64;
        let began = Instant::now();
        let made = parts.generator.make(&wanted, &mut |step| {
            if step.stage == Making::Denoise {
                let share = step.done as f64 / step.total.max(1) as f64;
                on_progress(progress(before + share * wanted.len() as f64));
            }
            !cancel.load(Ordering::Relaxed)
        })?;
        let Some(made) = made else { break };
        generate_seconds += began.elapsed().as_secs_f64();
        rows.add(parts, options, batch, made)?;
    }
    if rows.truths.is_empty() {
        return Err(EvalError::Stopped);
    }
    let found = rows.compare(parts, options, cancel, on_progress)?;
    let real = Figures::of(&rows.truths, &rows.real);
    let generated = Figures::of(&rows.truths, &rows.generated);
    let shuffled = Shuffled::of(&rows.real, options.seed);
    let (neighbours, neighbour_sheet, compared) = match found {
        Some(found) => (Some(found.distances), found.sheet, found.complete),
        None => (None, None, options.training.is_none()),
    };
    Ok(Evaluation {
        n: rows.truths.len(),
        steps,
        guidance_video: guidance.video,
        guidance_audio: guidance.audio,
        avhscore_ratio: ratio(generated.avhscore, real.avhscore),
        shuffled_ratio: ratio(shuffled.avhscore, real.avhscore),
        decoded: (!rows.decoded.is_empty()).then(|| Figures::of(&rows.truths, &rows.decoded)),
        generated,
        real,
        shuffled,
        neighbours,
        generate_seconds,
        clips: rows.judged(&prompts),
        complete: rows.truths.len() == options.prompts && compared,
        sheet: options.sheet.then(|| sheet::contact_sheet(&rows.panels)),
        neighbour_sheet,
    })
}

/// A held-out scene, what its caption asks for, and how the generator is asked.
struct Prompt {
    scene: Scene,
    truth: Truth,
    wanted: Wanted,
}

impl Prompt {
    /// A clip in the size that the judges look at; `None` of a scene without a thing.
    fn new(parts: &Parts<'_>, options: &Options<'_>, scene: Scene, seed: u64) -> Option<Self> {
        let truth = parts.jury.truth(&scene)?;
        let caption = &scene.caption;
        let words = if options.canonical {
            &caption.canonical
        } else {
            &caption.text
        };
        let spec = parts.jury.spec();
        let (steps, mut guidance) = parts.generator.settings();
        guidance.video = options.guidance_video.unwrap_or(guidance.video);
        guidance.audio = options.guidance_audio.unwrap_or(guidance.audio);
        let wanted = Wanted {
            prompt: words.clone(),
            seed,
            width: spec.width,
            height: spec.height,
            fps: spec.fps,
            duration_s: spec.duration_s,
            steps: options.steps.unwrap_or(steps),
            guidance,
        };
        Some(Self { scene, truth, wanted })
    }
}

/// What is known of the prompts that are done, one entry a prompt in each list.
#[derive(Default)]
struct Rows {
    truths: Vec<Truth>,
    generated: Vec<Found>,
    real: Vec<Found>,
    /// Empty unless asked for.
    decoded: Vec<Found>,
    /// Panels of the first clips, where a sheet is wanted.
    panels: Vec<Canvas>,
    /// Generated and real clips as [`neighbours::small`], where neighbours are wanted.
    small: [Vec<Vec<u8>>; 2],
    /// Prompts and frames of the first generated clips, where neighbours are wanted.
    kept: Vec<(String, Vec<u8>)>,
}

/// What the search for neighbours found.
struct Compared {
    distances: Distances,
    sheet: Option<Picture>,
    complete: bool,
}

impl Rows {
    fn add(
        &mut self,
        parts: &Parts<'_>,
        options: &Options<'_>,
        prompts: &[Prompt],
        made: Vec<Clip>,
    ) -> Result<(), EvalError> {
        let generated: Vec<HostClip> = made.into_iter().map(on_host).collect();
        let real = render(prompts.len(), |i| {
            parts.clips.rendered(prompts[i].scene.clone(), WANT)
        });
        let found = examine(parts, &generated)?;
        for ((Prompt { truth, wanted, .. }, clip), found) in prompts.iter().zip(&generated).zip(found) {
            if options.sheet && self.panels.len() < ON_SHEET {
                let panel = sheet::panel(&wanted.prompt, clip, truth, &found, parts.jury);
                self.panels.push(panel);
            }
            if options.training.is_some() && self.kept.len() < NEIGHBOURS_ON_SHEET {
                self.kept.push((wanted.prompt.clone(), clip.frames.clone()));
            }
            self.truths.push(truth.clone());
            self.generated.push(found);
        }
        self.real.extend(examine(parts, &real)?);
        if options.decoded && parts.generator.has_encoders() {
            self.decoded
                .extend(examine(parts, &through_codecs(parts, &real)?)?);
        }
        if options.training.is_some() {
            for (small, clips) in self.small.iter_mut().zip([&generated, &real]) {
                let spec = parts.jury.spec();
                small.extend(clips.iter().map(|clip| neighbours::small(&clip.frames, spec)));
            }
        }
        Ok(())
    }

    /// What was found in each generated clip.
    fn judged(&self, prompts: &[Prompt]) -> Vec<Judged> {
        let rows = prompts.iter().zip(self.truths.iter().zip(&self.generated));
        rows.map(|(Prompt { wanted, .. }, (truth, found))| Judged {
            prompt: wanted.prompt.clone(),
            seed: wanted.seed,
            picture: found.verdict.picture.first() == Some(&truth.thing),
            sound: found.verdict.sound == truth.thing,
            motion: found.verdict.motion == truth.motion,
            onset_s: found.onset_s,
            contact_s: found.verdict.contact_s,
            onset_error_ms: apart_ms(found.onset_s, found.verdict.contact_s),
            avhscore: mean_cosine(&found.frames, &found.sound),
        })
        .collect()
    }

    /// Searches the training clips for neighbours, where that is wanted; `None` where it was stopped at once.
    fn compare(
        &self,
        parts: &Parts<'_>,
        options: &Options<'_>,
        cancel: &AtomicBool,
        on_progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<Compared>, EvalError> {
        let Some(Training { clips, count }) = options.training else {
            return Ok(None);
        };
        let [generated, real] = &self.small;
        let queries: Vec<Vec<u8>> = generated.iter().chain(real).cloned().collect();
        let (nearest, searched) =
            neighbours::search(&queries, clips, count, parts.device, cancel, &mut |done| {
                on_progress(Progress {
                    stage: Stage::Neighbours,
                    done: done as u64,
                    total: count as u64,
                });
            })?;
        if searched == 0 {
            return Ok(None);
        }
        let (of_generated, of_real) = nearest.split_at(generated.len());
        Ok(Some(Compared {
            distances: Distances::of(of_generated, of_real, searched),
            sheet: Some(self.neighbour_sheet(parts, clips, of_generated, of_real)),
            complete: searched == count,
        }))
    }

    fn neighbour_sheet(
        &self,
        parts: &Parts<'_>,
        training: &Clips,
        generated: &[Nearest],
        real: &[Nearest],
    ) -> Picture {
        let shown = render(self.kept.len(), |i| {
            training.scene(Split::Train, generated[i].index, neighbours::WANT)
        });
        let pairs: Vec<sheet::Pair<'_>> = self
            .kept
            .iter()
            .zip(&shown)
            .enumerate()
            .map(|(i, ((prompt, frames), training))| sheet::Pair {
                prompt,
                generated: frames,
                nearest: generated[i],
                training,
                real: real[i],
            })
            .collect();
        sheet::neighbour_sheet(&pairs, parts.jury.spec())
    }
}

fn on_host(clip: Clip) -> HostClip {
    HostClip {
        frames: clip.frames,
        mask: Vec::new(),
        samples: clip.samples,
        scene: None,
    }
}

/// Judges clips and looks up their vectors.
fn examine(parts: &Parts<'_>, clips: &[HostClip]) -> Result<Vec<Found>, EvalError> {
    let spec = parts.jury.spec();
    // What was made is judged to the end, even when the user wants to stop.
    let never = AtomicBool::new(false);
    let verdicts = parts.jury.judge(clips, parts.device)?;
    let one = |clip: &HostClip, (verdict, onset_s)| {
        let video = Video::new(clip.frames.clone(), spec.width, spec.height, spec.fps)?;
        let sound = Sound::new(clip.samples.clone(), 1, spec.sample_rate)?;
        let indices: Vec<usize> = (0..video.frame_count).collect();
        Ok(Found {
            verdict,
            onset_s,
            frames: frame_vectors(parts.encoder, &video, &indices, &never)?,
            sound: parts.encoder.sound(&sound)?,
        })
    };
    clips
        .iter()
        .zip(verdicts)
        .map(|(clip, found)| one(clip, found))
        .collect()
}

/// Clips as the codecs of the generator give them back.
fn through_codecs(parts: &Parts<'_>, clips: &[HostClip]) -> Result<Vec<HostClip>, EvalError> {
    let spec = parts.jury.spec();
    let frames = to_unit(&frames_tensor(clips, spec)?.to_device(parts.device)?)?;
    let samples = samples_tensor(clips, spec)?.to_device(parts.device)?;
    let (frames, samples) = parts.generator.through_codecs(&frames, &samples)?;
    let frames = bytes(&frames)?.flatten_from(1)?.to_vec2::<u8>()?;
    let samples = samples.to_vec2::<f32>()?;
    Ok(frames
        .into_iter()
        .zip(samples)
        .map(|(frames, samples)| HostClip {
            frames,
            mask: Vec::new(),
            samples,
            scene: None,
        })
        .collect())
}

/// [-1, 1] to bytes.
fn bytes(frames: &Tensor) -> candle_core::Result<Tensor> {
    frames
        .affine(127.5, 127.5)?
        .round()?
        .clamp(0f32, 255f32)?
        .to_dtype(DType::U8)
}
