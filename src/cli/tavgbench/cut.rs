//! `fulgur tavgbench cut`: clips out of the videos they are parts of.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use fulgur_benchmark::captions::cut::{Options, Outcome, clip_path, cut};
use fulgur_benchmark::captions::{Clips, Record};
use fulgur_datasets::media::WriteOptions;
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::split::Writers;
use super::{NAMED, Read, each_clip};

/// Clips of a batch, for each that is cut at the same time.
const BATCH: usize = 4;

/// Cut clips out of the videos they are parts of
///
/// The video of a clip is VIDEO_ID.mp4 (or mkv, webm, mov, m4v, avi, mpg, mpeg) in --sources. Clips are decoded and encoded anew
/// as H.264 and AAC, so that they begin and end at the frame: a clip holds the frames that appear in [start, end). Clips that
/// are there already are left alone, so that the work goes on where it was stopped. Nothing is downloaded. The exit code is 1
/// where a clip could not be cut, and 2 where none could.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur tavgbench cut release_captions.txt --sources videos -o clips --jobs 4"
)]
pub(super) struct Arguments {
    /// Caption file, or manifest (.jsonl)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder of the videos
    #[arg(long, value_name = "DIR")]
    sources: PathBuf,
    /// Folder of the clips; it is made where it is absent
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Manifest to write, of the clips that are there in the end
    #[arg(long, value_name = "FILE.jsonl")]
    manifest: Option<PathBuf>,
    /// Quality of the picture: 0 (lossless) to 51
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=51), default_value_t = 18)]
    crf: u8,
    /// Bits per second of the sound
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(16_000..=512_000), default_value_t = 192_000)]
    audio_bit_rate: u32,
    /// Clips that are cut at the same time; each of them uses up to 4 threads
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = 2)]
    jobs: u16,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        file,
        sources,
        output,
        manifest,
        ..
    } = arguments;
    if !sources.is_dir() {
        bail!(
            "{}: no such folder, expected that of the videos",
            sources.display()
        );
    }
    let mut clips = Clips::open(file)?;
    std::fs::create_dir_all(output).with_context(|| output.display().to_string())?;
    let mut writers = Writers::open(manifest.as_deref(), None, output)?;
    let options = Options {
        sources: sources.clone(),
        output: output.clone(),
        encoding: WriteOptions {
            crf: arguments.crf,
            audio_bit_rate: arguments.audio_bit_rate,
            ..WriteOptions::default()
        },
        cancel: Some(Arc::clone(context.interrupt.flag())),
    };
    let jobs = usize::from(arguments.jobs);
    let mut answer = Cut {
        path: output.clone(),
        manifest: manifest.clone(),
        clips: 0,
        cut: 0,
        present: 0,
        missing: 0,
        failed: 0,
        problems: Vec::new(),
        stopped: false,
        read: Read::of(&clips),
    };
    let work = |record: &Record| cut(record, &options);
    let whole = each_clip(
        context,
        "cut",
        &mut clips,
        (jobs, BATCH),
        work,
        |mut record, outcome| {
            if outcome == Outcome::Cancelled {
                return Ok(false);
            }
            if let Outcome::Cut(flags) = &outcome {
                flags.iter().for_each(|flag| record.flag(flag));
            }
            if answer.count(&record, outcome)
                && let Some(name) = clip_path(&record, "".as_ref())
            {
                record.video_path = Some(name.to_string_lossy().into_owned());
                writers.write(&record)?;
            }
            Ok(true)
        },
    )?;
    answer.stopped = !whole;
    if answer.stopped {
        answer.manifest = None;
    } else {
        writers.commit()?;
    }
    answer.read = Read::of(&clips);
    Answer::new(&answer)
}

#[derive(Serialize)]
struct Cut {
    path: PathBuf,
    manifest: Option<PathBuf>,
    clips: u64,
    cut: u64,
    present: u64,
    missing: u64,
    failed: u64,
    problems: Vec<Problem>,
    stopped: bool,
    #[serde(flatten)]
    read: Read,
}

#[derive(Serialize)]
struct Problem {
    id: String,
    reason: String,
}

impl Cut {
    /// Counts what became of a clip; whether it is there.
    fn count(&mut self, record: &Record, outcome: Outcome) -> bool {
        self.clips += 1;
        let (counter, reason) = match outcome {
            Outcome::Cut(_) => (&mut self.cut, None),
            Outcome::Present | Outcome::Cancelled => (&mut self.present, None),
            Outcome::Missing(path) => (&mut self.missing, Some(format!("{path}: no such video"))),
            Outcome::Failed(reason) => (&mut self.failed, Some(reason)),
        };
        *counter += 1;
        let there = reason.is_none();
        if let Some(reason) = reason
            && self.problems.len() < NAMED
        {
            let id = record.id.clone();
            self.problems.push(Problem { id, reason });
        }
        there
    }
}

impl Report for Cut {
    fn status(&self) -> Status {
        if self.cut + self.present == 0 {
            Status::Error
        } else if self.stopped || self.missing + self.failed > 0 {
            Status::Partial
        } else {
            Status::Done
        }
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} clips cut, {} were there, {} without a video, {} failed",
            self.path.display(),
            self.cut,
            self.present,
            self.missing,
            self.failed
        )?;
        for problem in &self.problems {
            writeln!(f, "  {}: {}", problem.id, problem.reason)?;
        }
        if let Some(path) = &self.manifest {
            writeln!(f, "{}", path.display())?;
        }
        if self.stopped {
            writeln!(f, "stopped; the same command goes on")?;
        }
        Ok(())
    }
}
