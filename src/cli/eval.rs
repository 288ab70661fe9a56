//! `fulgur eval`: how good a model is, on data that it was not trained on.

mod classify;
mod encoder;
mod harmony;
mod image;
mod speed;

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use clap::ValueEnum;
use fulgur_benchmark::judge::Judges;
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::fetch::DataDir;
use fulgur_datasets::media::{Picture, write_png};
use fulgur_tavdiffusion::pipeline::Generator;
use fulgur_tavdiffusion::published::{PublishedGenerator, is_published};
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::encoder::{EncoderOptions, open_encoder};
use super::files::check_output;
use super::progress::{Progress, Unit};
use crate::device::compute_dtype;
use crate::eval::{self, Evaluation, Figures, Jury, Maker, Options, Parts, Stage, Training, clip_spec};
use crate::models;
use crate::train::TaskResult;

/// Judge a model on data that it was not trained on
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur eval tav --judges runs/judge/model"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    subject: Subject,
}

#[derive(Debug, clap::Subcommand)]
enum Subject {
    Tav(TavArguments),
    Classify(classify::Arguments),
    Speed(speed::Arguments),
    Encoder(encoder::Arguments),
    Harmony(harmony::Arguments),
    Image(image::Arguments),
}

/// Judge a generator of audible video on held-out prompts
///
/// Clips are made in memory for captions of things in motions that training never shows. Classifiers trained on real
/// clips alone (recipes/judge.toml) say what is seen, heard and done; the onset of the sound is compared with the contact
/// in the picture; an encoder scores how well sound and picture belong together. Real clips of the same prompts are the
/// ceiling, real pictures with the sound of another clip the floor. Shares are in 0..1; a clip without onset or contact
/// counts as 1,000 ms. Ctrl-C ends with the figures of what was done by then, and exit code 1.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur eval tav --judges runs/judge/model --encoder runs/encoder/model --sheet clips.png\n  \
                  fulgur eval tav --judges runs/judge/model --prompts 50 --neighbours near.png --json"
)]
struct TavArguments {
    /// Folder of the generator, instead of the builtin one
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of the judges, instead of the builtin ones
    #[arg(long, value_name = "DIR")]
    judges: Option<PathBuf>,
    /// The encoder of AVHScore: `builtin`, or the folder of one
    #[arg(long, value_name = "builtin|DIR", default_value = "builtin")]
    encoder: PathBuf,
    /// Folder of the prepared sets `stamps` and `backgrounds` [default: $FULGUR_DATA, else ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Number of prompts
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=2000), default_value_t = 200)]
    prompts: u16,
    /// Seed of prompts and noise; `fulgur generate PROMPT --seed N+i` makes clip i (from 0) alone
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Denoising steps
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// How strongly the picture follows the prompt (1 is off)
    #[arg(long, value_name = "SCALE")]
    guidance_video: Option<f64>,
    /// How strongly the sound follows the prompt (1 is off)
    #[arg(long, value_name = "SCALE")]
    guidance_audio: Option<f64>,
    /// Clips that are made at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=512), default_value_t = 16)]
    batch: u16,
    /// How the prompts are worded
    #[arg(long, value_enum, default_value_t = Wording::Varied)]
    wording: Wording,
    /// Also judge real clips that went through the codecs, where the model has their encoders
    #[arg(long)]
    decoded: bool,
    /// Draw the first clips with their sounds and what was found in them
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
    /// Write what was found in each clip, a JSON object a line, to compare generators prompt by prompt
    #[arg(long, value_name = "FILE.jsonl")]
    clips: Option<PathBuf>,
    /// Look for the nearest training clips by pixels, and draw the first clips above theirs
    #[arg(long, value_name = "FILE.png")]
    neighbours: Option<PathBuf>,
    /// Training clips that are searched for neighbours
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000), default_value_t = 4000)]
    training_clips: u32,
}

/// How prompts are worded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Wording {
    /// In the many ways of the captions
    Varied,
    /// In the plainest words
    Canonical,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.subject {
        Subject::Tav(arguments) => tav(context, arguments),
        Subject::Classify(arguments) => classify::run(context, &arguments),
        Subject::Speed(arguments) => speed::run(context, &arguments),
        Subject::Encoder(arguments) => encoder::run(context, &arguments),
        Subject::Harmony(arguments) => harmony::run(context, &arguments),
        Subject::Image(arguments) => image::run(context, arguments),
    }
}

fn tav(context: &Context, arguments: TavArguments) -> anyhow::Result<Answer> {
    for path in [&arguments.sheet, &arguments.neighbours, &arguments.clips]
        .into_iter()
        .flatten()
    {
        check_output(path)?;
    }
    let began = Instant::now();
    let loaded = Loaded::open(context, &arguments)?;
    let load_seconds = began.elapsed().as_secs_f64();

    let began = Instant::now();
    if arguments.decoded && !loaded.generator.has_encoders() {
        context.note("decoded: skipped, for the model folder has no encoders");
    }
    let parts = Parts {
        generator: &*loaded.generator,
        jury: &loaded.jury,
        encoder: &*loaded.encoder,
        clips: &loaded.clips,
        device: &loaded.device,
    };
    let options = Options {
        prompts: usize::from(arguments.prompts),
        seed: arguments.seed,
        batch: usize::from(arguments.batch),
        canonical: arguments.wording == Wording::Canonical,
        steps: arguments.steps,
        guidance_video: arguments.guidance_video,
        guidance_audio: arguments.guidance_audio,
        decoded: arguments.decoded,
        sheet: arguments.sheet.is_some(),
        training: loaded.training.as_ref().map(|clips| Training {
            clips,
            count: arguments.training_clips as usize,
        }),
    };
    let mut shown: Option<(Stage, Progress)> = None;
    let evaluation = eval::evaluate(&parts, &options, context.interrupt.flag(), &mut |progress| {
        if shown.as_ref().is_none_or(|(stage, _)| *stage != progress.stage) {
            // The old bar has to go before the new one comes.
            shown = None;
            let (label, unit) = match progress.stage {
                Stage::Clips => ("eval", "steps"),
                Stage::Neighbours => ("neighbours", "training clips"),
            };
            shown = Some((progress.stage, context.progress(label, Unit::Items(unit))));
        }
        if let Some((_, bar)) = &mut shown {
            bar.set(progress.done, Some(progress.total));
        }
    })?;
    drop(shown);
    for (path, picture) in [
        (&arguments.sheet, &evaluation.sheet),
        (&arguments.neighbours, &evaluation.neighbour_sheet),
    ] {
        write_sheet(path.as_deref(), picture.as_ref())?;
    }
    if let Some(path) = &arguments.clips {
        write_clips(path, &evaluation.clips)?;
    }
    Answer::new(&Judged {
        model: loaded.generator.name().to_owned(),
        encoder: loaded.encoder.name().to_owned(),
        judges: loaded.judges,
        wording: arguments.wording,
        seed: arguments.seed,
        sheet: arguments.sheet.filter(|_| evaluation.sheet.is_some()),
        neighbour_sheet: arguments
            .neighbours
            .filter(|_| evaluation.neighbour_sheet.is_some()),
        clips: arguments.clips,
        evaluation,
        load_seconds,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// All that takes part, loaded; what fails fast comes first.
struct Loaded {
    device: candle_core::Device,
    judges: PathBuf,
    jury: Jury,
    clips: crate::train::tasks::clips::Clips,
    training: Option<crate::train::tasks::clips::Clips>,
    encoder: Box<dyn fulgur_benchmark::encoder::Encoder>,
    generator: Box<dyn Maker>,
}

impl Loaded {
    fn open(context: &Context, arguments: &TavArguments) -> anyhow::Result<Self> {
        let dir = match &arguments.judges {
            Some(dir) => dir.clone(),
            None => models::judges()?,
        };
        let model = match &arguments.model {
            Some(dir) => dir.clone(),
            None => models::generator()?,
        };
        let data = arguments
            .data
            .clone()
            .map_or_else(DataDir::from_env, DataDir::new);
        let device = context.open_device()?;
        let judges = Judges::load(&dir, &device)?;
        let spec = clip_spec(judges.config());
        let opened = |clips: TaskResult<_>| clips.map_err(|error| anyhow!("{error}"));
        let clips = opened(eval::open_clips(data.path(), arguments.seed, spec))?;
        let training = arguments
            .neighbours
            .as_ref()
            .map(|_| opened(eval::open_training_clips(data.path(), spec)))
            .transpose()?;
        let jury = Jury::new(judges, clips.composer().things())
            .with_context(|| dir.join("config.json").display().to_string())?;
        Ok(Self {
            encoder: open_encoder(&arguments.encoder, EncoderOptions::default(), context)?,
            generator: match is_published(&model)? {
                true => Box::new(PublishedGenerator::open(&model, compute_dtype(&device), &device)?),
                false => Box::new(Generator::load(&model, &device)?),
            },
            device,
            judges: dir,
            jury,
            clips,
            training,
        })
    }
}

fn write_clips(path: &Path, clips: &[eval::Judged]) -> anyhow::Result<()> {
    let mut lines = String::new();
    for clip in clips {
        lines.push_str(&serde_json::to_string(clip)?);
        lines.push('\n');
    }
    write_atomic(path, |file| file.write_all(lines.as_bytes()))
        .with_context(|| format!("{}: cannot write", path.display()))
}

fn write_sheet(path: Option<&Path>, picture: Option<&Picture>) -> anyhow::Result<()> {
    if let (Some(path), Some(picture)) = (path, picture) {
        write_png(path, picture)?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Judged {
    model: String,
    encoder: String,
    judges: PathBuf,
    wording: Wording,
    seed: u64,
    #[serde(flatten)]
    evaluation: Evaluation,
    sheet: Option<PathBuf>,
    neighbour_sheet: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clips: Option<PathBuf>,
    load_seconds: f64,
    seconds: f64,
}

impl Report for Judged {
    fn status(&self) -> Status {
        if self.evaluation.complete {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

/// Width of a column of figures.
const COLUMN: usize = 11;

/// One figure of all columns: its name and how it reads from [`Figures`].
type Line = (&'static str, fn(&Figures) -> String);

const LINES: [Line; 10] = [
    ("picture named", |f| percent(Some(f.picture))),
    ("picture among five", |f| percent(Some(f.picture_top5))),
    ("sound named", |f| percent(Some(f.sound))),
    ("motion recognised", |f| percent(Some(f.motion))),
    ("sound from contact", |f| milliseconds(f.onset_error_ms_median)),
    ("no onset heard", |f| percent(Some(f.onset_missing))),
    ("no contact seen", |f| percent(Some(f.contact_missing))),
    ("onset in time", |f| percent(f.onset_in_time)),
    ("contact in time", |f| percent(f.contact_in_time)),
    ("AVHScore", |f| score(f.avhscore)),
];

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

fn milliseconds(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"))
}

fn score(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |score| format!("{score:.3}"))
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Evaluation {
            n,
            steps,
            guidance_video,
            guidance_audio,
            generated,
            real,
            decoded,
            shuffled,
            avhscore_ratio,
            shuffled_ratio,
            neighbours,
            generate_seconds,
            ..
        } = &self.evaluation;
        writeln!(
            f,
            "{}: {n} held-out prompts, {steps} steps, guidance {guidance_video} and {guidance_audio}, encoder {}",
            self.model, self.encoder
        )?;
        let columns: Vec<(&str, &Figures)> = [
            ("generated", Some(generated)),
            ("real", Some(real)),
            ("decoded", decoded.as_ref()),
        ]
        .into_iter()
        .filter_map(|(name, figures)| Some((name, figures?)))
        .collect();
        write!(f, "{:20}", "")?;
        for (name, _) in &columns {
            write!(f, "{name:>COLUMN$}")?;
        }
        writeln!(f)?;
        for (name, read) in LINES {
            write!(f, "{name:20}")?;
            for (_, figures) in &columns {
                write!(f, "{:>COLUMN$}", read(figures))?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "AVHScore: generated {} of real; shuffled pairs {}, {} of real, {} from contact",
            percent(*avhscore_ratio),
            score(shuffled.avhscore),
            percent(*shuffled_ratio),
            milliseconds(shuffled.onset_error_ms_median)
        )?;
        if let Some(near) = neighbours {
            writeln!(
                f,
                "nearest of {} training clips: generated {} (least {}), real held-out {} (least {}); as a share of the \
                 next ten at least {} and {}",
                near.training_clips,
                score(near.generated_median),
                score(near.generated_least),
                score(near.real_median),
                score(near.real_least),
                percent(near.generated_share_least),
                percent(near.real_share_least)
            )?;
        }
        write!(
            f,
            "loaded in {:.1} s, judged in {:.1} s, of which {generate_seconds:.1} s to make the clips",
            self.load_seconds, self.seconds
        )
    }
}
