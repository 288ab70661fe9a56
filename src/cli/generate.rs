//! `fulgur generate`: a prompt becomes an mp4 that shows and sounds it.

mod published;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use fulgur_benchmark::avhscore;
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::media::{Sound, Video, WavFormat, WriteOptions, write_mp4, write_wav};
use fulgur_tavdiffusion::pipeline::{Clip, Generator, Mode, Progress, Request, Stage};
use fulgur_tavdiffusion::published::is_published;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::encoder::{EncoderOptions, open_encoder};
use super::files::check_output;
use super::progress::Unit;
use super::size::Size;
use crate::{models, sheet};

/// Make an audible clip from a text prompt
///
/// Writes an mp4 (H.264 and AAC) and beside it a JSON file with everything that made the clip. The same seed gives the
/// same clip.
///
/// A folder of a published generator (TAVDiffusion, or a pipeline of diffusers such as AnimateDiff's) is named with --model; its parts are
/// loaded one after the other. --mode reference and the options from --solver on are for such folders.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur generate \"a dog barks as it drops in from the left\" -o dog.mp4\n  \
                  fulgur generate \"a bell rings\" --seed 7 --report bell.png -o bell.mp4\n  \
                  fulgur generate \"a dog barks\" --model tavdiffusion/ --size 320x256 --duration 5 --fps 4 -o dog.mp4"
)]
pub(super) struct Arguments {
    /// What to show and to play
    #[arg(value_name = "PROMPT")]
    prompt: String,
    /// The clip to write (.mp4; .wav with --mode audio-only)
    #[arg(short, long, value_name = "CLIP.mp4", default_value = "clip.mp4")]
    output: PathBuf,
    /// Seed of the noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Denoising steps
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Length in seconds
    #[arg(long, value_name = "SECONDS")]
    duration: Option<f64>,
    /// Frames per second
    #[arg(long, value_name = "RATE")]
    fps: Option<f64>,
    /// Size in pixels
    #[arg(long, value_name = "WxH")]
    size: Option<Size>,
    /// How strongly the picture follows the prompt (1 is off)
    #[arg(long, value_name = "SCALE")]
    guidance_video: Option<f64>,
    /// How strongly the sound follows the prompt (1 is off)
    #[arg(long, value_name = "SCALE")]
    guidance_audio: Option<f64>,
    /// What to keep away from
    #[arg(long, value_name = "TEXT", default_value = "")]
    negative_prompt: String,
    /// What the sound keeps away from, when it differs
    #[arg(long, value_name = "TEXT")]
    audio_negative_prompt: Option<String>,
    /// Folder of the generator, instead of the builtin one
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Which streams to make
    #[arg(long, value_enum, default_value_t = Streams::Joint)]
    mode: Streams,
    /// Also draw frames, waveform and spectrogram on one time axis
    #[arg(long, value_name = "SHEET.png")]
    report: Option<PathBuf>,
    #[command(flatten)]
    published: published::Options,
}

/// Which streams to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Streams {
    /// Picture and sound
    Joint,
    /// The sampling loop that was published with TAVDiffusion
    Reference,
    /// A silent mp4
    VideoOnly,
    /// A WAV file
    AudioOnly,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let output = &arguments.output;
    let expected = if arguments.mode == Streams::AudioOnly {
        "wav"
    } else {
        "mp4"
    };
    if !output
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case(expected))
    {
        bail!(
            "{}: found another extension, expected .{expected}",
            output.display()
        );
    }
    let sidecar = output.with_extension("json");
    // Names that cannot be written are found before the work, not after it.
    for path in [Some(output), Some(&sidecar), arguments.report.as_ref()]
        .into_iter()
        .flatten()
    {
        check_output(path)?;
    }
    let folder = match &arguments.model {
        Some(dir) => dir.clone(),
        None => models::generator()?,
    };
    if is_published(&folder)? {
        return published::run(context, &arguments, &folder);
    }
    arguments.published.refuse(&folder)?;
    let Some(mode) = arguments.mode.of_both() else {
        bail!(
            "--mode: found reference, expected joint, video-only or audio-only: {} is no published generator",
            folder.display()
        )
    };
    let began = Instant::now();
    let device = context.open_device()?;
    let generator = Generator::load(&folder, &device)?;
    let load_s = began.elapsed().as_secs_f64();
    let request = arguments.request(&generator, mode);

    let began = Instant::now();
    let mut progress = context.progress("generate", Unit::Items("steps"));
    let stop = context.interrupt.flag();
    let made = generator.generate(&request, &mut |step: Progress| {
        if step.stage == Stage::Denoise {
            progress.set(step.done as u64, Some(step.total as u64));
        }
        !stop.load(Ordering::Relaxed)
    })?;
    drop(progress);
    let Some(clip) = made else {
        bail!("stopped before the clip was finished; nothing was written")
    };
    let generate_s = began.elapsed().as_secs_f64();
    let mut answer = Generated::new(&arguments, &request, &clip, &generator);
    answer.timings = Timings {
        load_s,
        generate_s,
        write_s: 0.0,
    };
    finish(context, &arguments, &clip, answer)
}

/// Writes the clip, what made it, and where it is asked for its sheet.
fn finish(
    context: &Context,
    arguments: &Arguments,
    clip: &Clip,
    mut answer: Generated,
) -> anyhow::Result<Answer> {
    let output = &arguments.output;
    let sidecar = output.with_extension("json");
    let began = Instant::now();
    let video = match clip.frame_count {
        0 => None,
        _ => Some(Video::new(
            clip.frames.clone(),
            clip.width,
            clip.height,
            clip.fps,
        )?),
    };
    let sound = match clip.samples.len() {
        0 => None,
        _ => Some(Sound::new(clip.samples.clone(), 1, clip.sample_rate)?),
    };
    write_media(output, video.as_ref(), sound.as_ref(), arguments)?;
    answer.timings.write_s = began.elapsed().as_secs_f64();
    answer.avhscore = match (&video, &sound) {
        (Some(video), Some(sound)) => score(context, video, sound),
        _ => None,
    };
    let json = serde_json::to_string_pretty(&answer)?;
    write_atomic(&sidecar, |file| file.write_all(json.as_bytes()))
        .with_context(|| format!("{}: cannot write", sidecar.display()))?;
    if let Some(path) = &arguments.report {
        let picture = sheet::draw(&arguments.prompt, video.as_ref(), sound.as_ref());
        fulgur_datasets::media::write_png(path, &picture)?;
    }
    Answer::new(&answer)
}

/// AVHScore of the clip where the builtin encoder is at hand; a clip is worth having without.
fn score(context: &Context, video: &Video, sound: &Sound) -> Option<f64> {
    let scored = open_encoder(Path::new("builtin"), EncoderOptions::default(), context).and_then(|encoder| {
        Ok(avhscore::score(
            &*encoder,
            video,
            Some(sound),
            None,
            &AtomicBool::new(false),
        )?)
    });
    match scored {
        Ok(score) => score.avhscore,
        Err(error) => {
            context.note(&format!("not scored: {error}"));
            None
        }
    }
}

fn write_media(
    path: &Path,
    video: Option<&Video>,
    sound: Option<&Sound>,
    arguments: &Arguments,
) -> anyhow::Result<()> {
    match (video, sound) {
        (Some(video), sound) => {
            let metadata = BTreeMap::from([
                ("title".to_owned(), arguments.prompt.chars().take(200).collect()),
                (
                    "comment".to_owned(),
                    format!("made by fulgur, seed {}", arguments.seed),
                ),
            ]);
            write_mp4(
                path,
                video,
                sound,
                &WriteOptions {
                    metadata,
                    ..WriteOptions::default()
                },
            )?;
        }
        (None, Some(sound)) => write_wav(path, sound, WavFormat::Int16)?,
        (None, None) => bail!("{}: neither picture nor sound was made", path.display()),
    }
    Ok(())
}

impl Arguments {
    fn request(&self, generator: &Generator, mode: Mode) -> Request {
        let mut request = Request::new(self.prompt.clone(), generator.index());
        request.negative_prompt.clone_from(&self.negative_prompt);
        request
            .audio_negative_prompt
            .clone_from(&self.audio_negative_prompt);
        request.seed = self.seed;
        request.steps = self.steps.unwrap_or(request.steps);
        request.duration_s = self.duration.unwrap_or(request.duration_s);
        request.fps = self.fps.unwrap_or(request.fps);
        if let Some(Size { width, height }) = self.size {
            (request.width, request.height) = (width, height);
        }
        request.guidance.video = self.guidance_video.unwrap_or(request.guidance.video);
        request.guidance.audio = self.guidance_audio.unwrap_or(request.guidance.audio);
        request.mode = mode;
        request
    }
}

impl Streams {
    /// The mode of a generator whose streams are denoised together.
    fn of_both(self) -> Option<Mode> {
        match self {
            Self::Joint => Some(Mode::Joint),
            Self::VideoOnly => Some(Mode::VideoOnly),
            Self::AudioOnly => Some(Mode::AudioOnly),
            Self::Reference => None,
        }
    }
}

/// The answer, and the sidecar file.
#[derive(Serialize)]
struct Generated {
    path: PathBuf,
    prompt: String,
    seed: u64,
    duration_s: f64,
    fps: f64,
    frames: usize,
    width: usize,
    height: usize,
    /// None without sound.
    sample_rate: Option<u32>,
    model: String,
    avhscore: Option<f64>,
    timings: Timings,
    negative_prompt: String,
    audio_negative_prompt: Option<String>,
    steps: usize,
    guidance_video: f64,
    guidance_audio: f64,
    report: Option<PathBuf>,
    version: &'static str,
    /// What only published generators are asked.
    #[serde(flatten)]
    published: Option<published::Settings>,
}

#[derive(Serialize, Default)]
struct Timings {
    load_s: f64,
    generate_s: f64,
    write_s: f64,
}

impl Generated {
    fn new(arguments: &Arguments, request: &Request, clip: &Clip, generator: &Generator) -> Self {
        Self {
            path: arguments.output.clone(),
            prompt: request.prompt.clone(),
            seed: request.seed,
            duration_s: request.duration_s,
            fps: request.fps,
            frames: clip.frame_count,
            width: clip.width,
            height: clip.height,
            sample_rate: Some(clip.sample_rate),
            model: generator.index().name.clone(),
            avhscore: None,
            timings: Timings::default(),
            negative_prompt: request.negative_prompt.clone(),
            audio_negative_prompt: request.audio_negative_prompt.clone(),
            steps: request.steps,
            guidance_video: request.guidance.video,
            guidance_audio: request.guidance.audio,
            report: arguments.report.clone(),
            version: env!("CARGO_PKG_VERSION"),
            published: None,
        }
    }
}

impl Report for Generated {}

impl fmt::Display for Generated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            frames,
            width,
            height,
            duration_s,
            seed,
            timings,
            ..
        } = self;
        writeln!(
            f,
            "{}: {duration_s} s, {frames} frames of {width}x{height}, seed {seed}",
            self.path.display()
        )?;
        if let Some(score) = self.avhscore {
            writeln!(f, "AVHScore {score:.3} (builtin encoder)")?;
        }
        match &self.published {
            Some(settings) => write!(f, "{}", settings.stages()),
            None => write!(
                f,
                "loaded in {:.1} s, made in {:.1} s",
                timings.load_s, timings.generate_s
            ),
        }
    }
}
