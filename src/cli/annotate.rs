//! `fulgur annotate`: descriptions of what is seen and heard in clips.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, bail};
use fulgur_benchmark::annotate::backend::Backend;
use fulgur_benchmark::annotate::config::Config;
use fulgur_benchmark::annotate::openai::Counts;
use fulgur_benchmark::annotate::pipeline;
use serde::Serialize;
use toml::{Table, Value};

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::files::check_output;
use super::lm;
use super::progress::Unit;
use crate::annotate::{Local, Opened, Surroundings, open, settings};
use crate::train::recipe::set;

/// Largest file of settings.
const LARGEST: u64 = 1 << 20;

/// Describe what is seen and heard in clips
///
/// FILE is a manifest, or the release's caption file. Five stages make a caption of each clip: frames (what is seen), audio (what is
/// heard), rewrite (both in better words), merge (both as one), and filters, which leave clips out. A stage is done by
/// `precomputed` (the texts of the manifest itself), `precomputed:FILE` (a table by id, JSONL or CSV), `template` (a rule),
/// `candle-blip:DIR` (a BLIP captioner of Hugging Face, for frames), `tags:ENCODER` (the nearest words of a list for the sound, by
/// CLAP, ImageBind or `builtin`), `openai-http` or `openai-http:MODEL` (a server that speaks the protocol of OpenAI), `lm:DIR` (a
/// language model of ours), or `none`.
///
/// Clips that stay are in the manifest -o, all others in a second one, each with the reason. A run that was stopped goes on with the
/// same command; its manifest is the same as that of a run that was not. Clips that failed are tried again. The exit code is 1
/// where clips failed or the run was stopped.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur annotate clips.jsonl -o annotated.jsonl\n  \
                  fulgur annotate clips.jsonl -o annotated.jsonl --media clips --frames precomputed:seen.csv \\\n    \
                  --audio precomputed:heard.csv --merge openai-http:some-model \\\n    \
                  --set http.base=http://127.0.0.1:8000\n\n\
                  docs/tavgbench.md lists all settings.")]
pub(super) struct Arguments {
    /// Manifest (.jsonl), or caption file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Manifest to write, of the clips that stay
    #[arg(short, long, value_name = "FILE.jsonl")]
    output: PathBuf,
    /// Manifest of the clips that do not [default: OUTPUT.left-out.jsonl]
    #[arg(long, value_name = "FILE.jsonl")]
    left_out: Option<PathBuf>,
    /// Folder of the clips; without it they are not looked at, nor judged by their media
    #[arg(long, value_name = "DIR")]
    media: Option<PathBuf>,
    /// File of settings
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// One setting, such as filters.still=false; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// What describes the picture [default: precomputed]
    #[arg(long, value_name = "BACKEND")]
    frames: Option<Backend>,
    /// What describes the sound [default: precomputed]
    #[arg(long, value_name = "BACKEND")]
    audio: Option<Backend>,
    /// What rewrites both [default: none]
    #[arg(long, value_name = "BACKEND")]
    rewrite: Option<Backend>,
    /// What joins both [default: template]
    #[arg(long, value_name = "BACKEND")]
    merge: Option<Backend>,
    /// Folder of what was done so far [default: OUTPUT.work]
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Throw away what was done so far; answers of servers stay
    #[arg(long)]
    restart: bool,
    /// Clips that are worked on at the same time [default: as many as processors, or as http.concurrency says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
    /// Ask no server and write nothing; count requests and tokens
    #[arg(long)]
    dry_run: bool,
    /// Write the time into the provenance; then a run that was stopped does not give the same manifest
    #[arg(long)]
    times: bool,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let config = arguments.config()?;
    let beside = |more: &str| beside(&arguments.output, more);
    let left_out = arguments
        .left_out
        .clone()
        .unwrap_or_else(|| beside("left-out.jsonl"));
    let work = arguments.work.clone().unwrap_or_else(|| beside("work"));
    for path in [&arguments.output, &left_out] {
        check_output(path)?;
        if same(path, &arguments.file) {
            bail!(
                "{}: found the input, expected another name for what is written",
                path.display()
            );
        }
    }
    if same(&arguments.output, &left_out) || arguments.output == left_out {
        bail!(
            "{}: found the same name twice, expected two manifests",
            left_out.display()
        );
    }
    let stop = Arc::clone(context.interrupt.flag());
    let cache = work.join("answers");
    let opened = open(
        &config,
        &Surroundings {
            media: arguments.media.as_deref(),
            cache: Some(&cache),
            dry_run: arguments.dry_run,
            stop: Arc::clone(&stop),
            language_model: &|dir| {
                let (model, tokenizer, end) = lm::writer(context, dir)?;
                Ok(Local::new(
                    dir,
                    model,
                    tokenizer,
                    end,
                    &config.lm,
                    Arc::clone(&stop),
                ))
            },
            device: &|| context.open_device(),
        },
    )?;
    if arguments.media.is_none() {
        context.note("without --media clips are not judged by their media (filters media, silence, still)");
    }
    let go_on = || !context.interrupt.requested();
    let options = pipeline::Options {
        input: arguments.file.clone(),
        output: arguments.output.clone(),
        left_out: left_out.clone(),
        work: work.clone(),
        settings: settings(
            &config,
            &arguments.file,
            arguments.media.as_deref(),
            arguments.times,
            &go_on,
        )?,
        restart: arguments.restart,
        jobs: arguments.jobs(&config, &opened),
        duplicates: config.filters.duplicates,
        clips_per_video: config.filters.clips_per_video,
        times: arguments.times,
        dry_run: arguments.dry_run,
        cancel: stop,
    };
    let began = Instant::now();
    let shown = Mutex::new(context.progress("annotate", Unit::Items("clips")));
    let report = pipeline::run(&opened.stages, &options, &|progress| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = began.elapsed().as_secs_f64().max(1e-3);
        shown.relabel(format!("annotate, {:.1} clips/s", progress.new as f64 / seconds));
        // What earlier runs did says nothing about the time that is left.
        let before = progress.done - progress.new;
        shown.set(progress.new, Some(progress.total.saturating_sub(before)));
    })?;
    drop(shown);
    if let Some(why) = report.hopeless {
        bail!(
            "{why}; {} clips are done and kept, the same command goes on",
            report.annotated + report.dropped.values().sum::<u64>()
        );
    }
    Answer::new(&Annotated {
        path: arguments.output.clone(),
        left_out,
        work,
        dry_run: arguments.dry_run,
        server: opened.server.map(|server| server.counts()),
        seconds: began.elapsed().as_secs_f64(),
        failures: report.failures.iter().map(Failure::of).collect(),
        clips: report.clips,
        annotated: report.annotated,
        dropped: report.dropped,
        failed: report.failed,
        flags: report.flags,
        duplicates: report.duplicates,
        rejected: report.rejected,
        resumed: report.resumed,
        complete: report.complete,
    })
}

impl Arguments {
    /// The settings: those of the file, then single ones, then backends.
    fn config(&self) -> anyhow::Result<Config> {
        let mut table = Table::new();
        let mut name = "--set".to_owned();
        if let Some(path) = &self.config {
            name = path.display().to_string();
            let length = fs::metadata(path).with_context(|| name.clone())?.len();
            if length > LARGEST {
                bail!("{name}: found {length} bytes, expected at most {LARGEST}");
            }
            let text = fs::read_to_string(path).with_context(|| name.clone())?;
            table = text.parse().with_context(|| name.clone())?;
        }
        for argument in &self.set {
            set(&mut table, argument)?;
        }
        let mut config: Config = Value::Table(table).try_into().with_context(|| name)?;
        for (chosen, stage) in [
            (&self.frames, &mut config.frames),
            (&self.audio, &mut config.audio),
            (&self.rewrite, &mut config.rewrite),
            (&self.merge, &mut config.merge),
        ] {
            if let Some(chosen) = chosen {
                *stage = chosen.clone();
            }
        }
        Ok(config)
    }

    fn jobs(&self, config: &Config, opened: &Opened) -> usize {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        match (self.jobs, &opened.server) {
            (Some(jobs), _) => usize::from(jobs),
            // Who waits for a server needs no processor.
            (None, Some(_)) => processors + config.http.concurrency as usize,
            (None, None) => processors,
        }
    }
}

/// `DIR/NAME.more` for `DIR/NAME.jsonl`.
fn beside(output: &Path, more: &str) -> PathBuf {
    output.with_extension(more)
}

/// Whether two names are of one file that is there.
fn same(a: &Path, b: &Path) -> bool {
    matches!((fs::canonicalize(a), fs::canonicalize(b)), (Ok(a), Ok(b)) if a == b)
}

#[derive(Serialize)]
struct Annotated {
    path: PathBuf,
    left_out: PathBuf,
    work: PathBuf,
    clips: u64,
    annotated: u64,
    dropped: BTreeMap<String, u64>,
    failed: u64,
    flags: BTreeMap<String, u64>,
    failures: Vec<Failure>,
    duplicates: u64,
    rejected: u64,
    resumed: u64,
    complete: bool,
    dry_run: bool,
    server: Option<Counts>,
    seconds: f64,
}

#[derive(Serialize)]
struct Failure {
    id: String,
    error: String,
}

impl Failure {
    fn of((id, error): &(String, String)) -> Self {
        Self {
            id: id.clone(),
            error: error.clone(),
        }
    }
}

impl Report for Annotated {
    fn status(&self) -> Status {
        if self.complete && self.failed > 0 && self.failed == self.clips {
            Status::Error
        } else if !self.complete || self.failed > 0 {
            Status::Partial
        } else {
            Status::Done
        }
    }
}

impl fmt::Display for Annotated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dropped: u64 = self.dropped.values().sum();
        writeln!(
            f,
            "{} clips: {} annotated, {dropped} dropped, {} failed",
            self.clips, self.annotated, self.failed
        )?;
        for (reason, count) in &self.dropped {
            writeln!(f, "  dropped, {reason}: {count}")?;
        }
        if self.duplicates + self.rejected > 0 {
            let (duplicates, rejected) = (self.duplicates, self.rejected);
            writeln!(
                f,
                "  passed over: {duplicates} whose id came before, {rejected} that cannot be"
            )?;
        }
        for (flag, count) in &self.flags {
            writeln!(f, "  flag {flag}: {count}")?;
        }
        for failure in &self.failures {
            writeln!(f, "  {}: {}", failure.id, failure.error)?;
        }
        if let Some(Counts {
            requests,
            retries,
            cached,
            tokens,
        }) = self.server
        {
            writeln!(
                f,
                "{requests} requests ({retries} repeated), {cached} answers kept from before, about {tokens} tokens"
            )?;
        }
        if self.dry_run {
            return writeln!(f, "dry run: nobody was asked and nothing was written");
        }
        match self.complete {
            true => writeln!(f, "{}\n{}", self.path.display(), self.left_out.display()),
            false => writeln!(f, "stopped; the same command goes on"),
        }
    }
}
