//! `fulgur generate` with a folder of a published generator.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::bail;
use candle_core::{DType, Device};
use clap::ValueEnum;
use fulgur_datasets::media::{Filter, read_upright};
use fulgur_lightnet::diffusion::Method;
use fulgur_tavdiffusion::pipeline::{Clip, Progress, Stage};
use fulgur_tavdiffusion::published::{
    Made, PublishedGenerator, PublishedMode, PublishedRequest, StartPicture,
};
use serde::Serialize;

use super::super::answer::Answer;
use super::super::context::Context;
use super::super::progress::Unit;
use super::super::size::Size;
use super::{Arguments, Generated, Streams, Timings, finish};
use crate::device::compute_dtype;

/// What a picture without opacity stands on.
const BACKGROUND: [u8; 3] = [255; 3];
/// How much noise comes on top of a picture, where nothing is said.
const STRENGTH: f64 = 0.8;

/// Options that the builtin generator does not have.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Published generators")]
pub(super) struct Options {
    /// How steps are taken; what the folder says if absent
    #[arg(long, value_enum)]
    solver: Option<SolverName>,
    /// Frames that are denoised at a time, for clips of more frames than the network sees at once
    #[arg(long, value_name = "FRAMES")]
    window: Option<usize>,
    /// Frames that windows share [default: 8]
    #[arg(long, value_name = "FRAMES")]
    overlap: Option<usize>,
    /// A picture that the clip resembles; it is cut to the clip's proportions
    #[arg(long, value_name = "PICTURE")]
    init_image: Option<PathBuf>,
    /// How much of the noise comes on top of it, above 0 to 1 [default: 0.8]
    #[arg(long, value_name = "SHARE", requires = "init_image")]
    strength: Option<f64>,
    /// Run the prompt and the negative prompt one after the other: half the memory (the CPU always does)
    #[arg(long)]
    sequential: bool,
    /// Decode pictures out of tiles of so many pixels a side
    #[arg(long, value_name = "PIXELS")]
    vae_tile: Option<usize>,
    /// Type that the networks compute in, whatever their files hold; bf16 on a GPU and f32 on the CPU if absent
    #[arg(long, value_enum)]
    precision: Option<PrecisionName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SolverName {
    /// DDIM
    Ddim,
    /// DPM-Solver++ of the second order
    Dpm,
    /// Euler steps
    Euler,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionName {
    /// 32 bits
    F32,
    /// 16 bits with the range of 32
    Bf16,
}

impl Options {
    /// Refuses options that the generator in `folder` does not have.
    pub(super) fn refuse(&self, folder: &Path) -> anyhow::Result<()> {
        let given = [
            ("--solver", self.solver.is_some()),
            ("--window", self.window.is_some()),
            ("--overlap", self.overlap.is_some()),
            ("--init-image", self.init_image.is_some()),
            ("--sequential", self.sequential),
            ("--vae-tile", self.vae_tile.is_some()),
            ("--precision", self.precision.is_some()),
        ];
        match given.iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((name, _)) => bail!(
                "{name}: is for published generators, expected --model with a folder of one; {} is none",
                folder.display()
            ),
        }
    }

    fn compute(&self, device: &Device) -> anyhow::Result<DType> {
        let dtype = match self.precision {
            None => return Ok(compute_dtype(device)),
            Some(PrecisionName::F32) => DType::F32,
            Some(PrecisionName::Bf16) => DType::BF16,
        };
        if device.is_cpu() && dtype != DType::F32 {
            bail!("--precision: found {}, expected f32 on the CPU", dtype.as_str());
        }
        Ok(dtype)
    }

    fn method(&self) -> Option<Method> {
        self.solver.map(|name| match name {
            SolverName::Ddim => Method::Ddim,
            SolverName::Dpm => Method::DpmSolver,
            SolverName::Euler => Method::Euler,
        })
    }
}

/// What was asked of a published generator, and how long its stages took.
#[derive(Serialize)]
pub(super) struct Settings {
    mode: &'static str,
    solver: &'static str,
    window: Option<usize>,
    overlap: usize,
    init_image: Option<PathBuf>,
    strength: Option<f64>,
    sequential: bool,
    vae_tile: Option<usize>,
    precision: &'static str,
    device: String,
    /// Seconds by stage, with the time that it takes to load its networks.
    stages: BTreeMap<&'static str, f64>,
}

impl Settings {
    /// The stages in words.
    pub(super) fn stages(&self) -> String {
        let order = [
            Stage::Text,
            Stage::Start,
            Stage::Denoise,
            Stage::Picture,
            Stage::Sound,
        ];
        let parts = order.iter().filter_map(|stage| {
            let seconds = self.stages.get(stage.word())?;
            Some(format!("{} {seconds:.1} s", stage.word()))
        });
        parts.collect::<Vec<_>>().join(", ")
    }
}

fn mode(streams: Streams) -> (PublishedMode, &'static str) {
    match streams {
        Streams::Joint => (PublishedMode::Joint, "joint"),
        Streams::Reference => (PublishedMode::Reference, "reference"),
        Streams::VideoOnly => (PublishedMode::VideoOnly, "video-only"),
        Streams::AudioOnly => (PublishedMode::AudioOnly, "audio-only"),
    }
}

fn solver(method: Option<Method>) -> &'static str {
    match method {
        None | Some(Method::Ddim) => "ddim",
        Some(Method::DpmSolver) => "dpm",
        Some(Method::Euler) => "euler",
    }
}

pub(super) fn run(context: &Context, arguments: &Arguments, folder: &Path) -> anyhow::Result<Answer> {
    let began = Instant::now();
    let device = context.open_device()?;
    let compute = arguments.published.compute(&device)?;
    let generator = PublishedGenerator::open(folder, compute, &device)?;
    let request = request(arguments, &generator)?;
    let load_s = began.elapsed().as_secs_f64();

    let began = Instant::now();
    let mut progress = context.progress(Stage::Text.word(), Unit::Items("steps"));
    let mut shown = Stage::Text;
    let stop = context.interrupt.flag();
    let made = generator.generate(std::slice::from_ref(&request), &mut |step: Progress| {
        if step.stage != shown {
            // A bar of its own for each stage, so that the time left is that of the stage.
            progress = context.progress(step.stage.word(), unit(step.stage));
            shown = step.stage;
        }
        progress.set(step.done as u64, Some(step.total as u64));
        !stop.load(Ordering::Relaxed)
    })?;
    drop(progress);
    let Some(Made { clips, seconds }) = made else {
        bail!("stopped before the clip was finished; nothing was written")
    };
    let Some(clip) = clips.into_iter().next() else {
        bail!("the generator made no clip")
    };
    let timings = Timings {
        load_s,
        generate_s: began.elapsed().as_secs_f64(),
        write_s: 0.0,
    };
    let settings = Settings {
        mode: mode(arguments.mode).1,
        solver: solver(request.method),
        window: request.window,
        overlap: request.overlap,
        init_image: arguments.published.init_image.clone(),
        strength: request.start.as_ref().map(|start| start.strength),
        sequential: request.sequential,
        vae_tile: request.tile,
        precision: compute.as_str(),
        device: crate::device::device_name(&device),
        stages: seconds.into_iter().map(|(stage, s)| (stage.word(), s)).collect(),
    };
    let answer = answer(arguments, &request, &clip, &generator, timings, settings);
    finish(context, arguments, &clip, answer)
}

fn unit(stage: Stage) -> Unit {
    match stage {
        Stage::Picture => Unit::Items("frames"),
        _ => Unit::Items("steps"),
    }
}

fn request(arguments: &Arguments, generator: &PublishedGenerator) -> anyhow::Result<PublishedRequest> {
    let options = &arguments.published;
    let mut request = generator.request(&arguments.prompt);
    request.negative_prompt.clone_from(&arguments.negative_prompt);
    request
        .audio_negative_prompt
        .clone_from(&arguments.audio_negative_prompt);
    request.seed = arguments.seed;
    request.steps = arguments.steps.unwrap_or(request.steps);
    request.duration_s = arguments.duration.unwrap_or(request.duration_s);
    if let Some(fps) = arguments.fps {
        if arguments.duration.is_none() {
            // As many frames, faster or slower.
            request.duration_s = request.frames() as f64 / fps;
        }
        request.fps = fps;
    }
    if let Some(Size { width, height }) = arguments.size {
        (request.width, request.height) = (width, height);
    }
    let guidance = &mut request.guidance;
    guidance.video = arguments.guidance_video.unwrap_or(guidance.video);
    guidance.audio = arguments.guidance_audio.unwrap_or(guidance.audio);
    request.mode = mode(arguments.mode).0;
    request.method = options.method().or(request.method);
    request.window = options.window;
    request.overlap = options.overlap.unwrap_or(request.overlap);
    request.sequential |= options.sequential;
    request.tile = options.vae_tile;
    if let Some(path) = &options.init_image {
        let (width, height) = (request.width, request.height);
        request.start = Some(StartPicture {
            pixels: start_picture(path, [width, height])?,
            strength: options.strength.unwrap_or(STRENGTH),
        });
    }
    Ok(request)
}

/// RGB bytes of the middle of the picture that has these proportions, in this size.
fn start_picture(path: &Path, [width, height]: [usize; 2]) -> anyhow::Result<Vec<u8>> {
    let picture = read_upright(path)?.over(BACKGROUND);
    let scale = (width as f64 / picture.width as f64).max(height as f64 / picture.height as f64);
    let covering = |side: usize, least: usize| ((side as f64 * scale).round() as usize).max(least);
    let whole = [covering(picture.width, width), covering(picture.height, height)];
    let corner = [(whole[0] - width) / 2, (whole[1] - height) / 2];
    let part = picture.resized_part(whole, corner, [width, height], Filter::Bicubic)?;
    Ok(part.pixels)
}

fn answer(
    arguments: &Arguments,
    request: &PublishedRequest,
    clip: &Clip,
    generator: &PublishedGenerator,
    timings: Timings,
    settings: Settings,
) -> Generated {
    let duration_s = match clip.frame_count {
        0 => request.duration_s,
        frames => frames as f64 / request.fps,
    };
    Generated {
        path: arguments.output.clone(),
        prompt: request.prompt.clone(),
        seed: request.seed,
        duration_s,
        fps: request.fps,
        frames: clip.frame_count,
        width: clip.width,
        height: clip.height,
        sample_rate: Some(clip.sample_rate).filter(|&rate| rate > 0),
        model: generator.name().to_owned(),
        avhscore: None,
        timings,
        negative_prompt: request.negative_prompt.clone(),
        audio_negative_prompt: request.audio_negative_prompt.clone(),
        steps: request.steps,
        guidance_video: request.guidance.video,
        guidance_audio: request.guidance.audio,
        report: arguments.report.clone(),
        version: env!("CARGO_PKG_VERSION"),
        published: Some(settings),
    }
}
