//! `fulgur tavgbench verify`: whether the clips are there and whole.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use fulgur_benchmark::captions::verify::{Checked, Fault, Options, check};
use fulgur_benchmark::captions::{Clips, Record};
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::split::Writers;
use super::{NAMED, Read, each_clip};

/// Clips of a batch, for each that is looked at at the same time.
const BATCH: usize = 8;

/// Check that clips are there, can be decoded and have their length
///
/// The file of a clip is its video_path in a manifest, taken from --media where it is relative, else its name in --media. Clips
/// are decoded up to 2 s beyond the length that their name says. With -o a manifest is written with what was found: frames
/// per second, number and size of frames, sample rate, channels, length, and flags of what is wrong. The exit code is 1 where
/// anything is wrong with any clip, and 2 where none is there.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur tavgbench verify release_captions.txt --media clips\n  \
                  fulgur tavgbench verify manifest.jsonl --media clips -o verified.jsonl --csv verified.csv"
)]
pub(super) struct Arguments {
    /// Caption file, or manifest (.jsonl)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Folder of the clips
    #[arg(long, value_name = "DIR")]
    media: PathBuf,
    /// Manifest to write
    #[arg(short, long, value_name = "FILE.jsonl")]
    output: Option<PathBuf>,
    /// Table to write, with the columns of `fulgur tavgbench split --csv`
    #[arg(long, value_name = "FILE.csv")]
    csv: Option<PathBuf>,
    /// Write clips without a fault alone
    #[arg(long)]
    only_good: bool,
    /// Seconds by which a clip may be longer or shorter than its name says
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    tolerance: f64,
    /// Read containers without decoding: faster, and blind for damage inside
    #[arg(long)]
    quick: bool,
    /// Clips that are looked at at the same time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256), default_value_t = 2)]
    jobs: u16,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        file,
        media,
        output,
        csv,
        tolerance,
        ..
    } = arguments;
    if !(tolerance.is_finite() && *tolerance >= 0.0) {
        bail!("--tolerance: found {tolerance}, expected a finite number of seconds, 0 or more");
    }
    if !media.is_dir() {
        bail!("{}: no such folder, expected that of the clips", media.display());
    }
    let mut clips = Clips::open(file)?;
    let mut writers = Writers::open(output.as_deref(), csv.as_deref(), media)?;
    let options = Options {
        media: media.clone(),
        tolerance_s: *tolerance,
        decode: !arguments.quick,
        cancel: Some(Arc::clone(context.interrupt.flag())),
    };
    let jobs = usize::from(arguments.jobs);
    let mut answer = Verified {
        path: file.clone(),
        output: output.clone(),
        csv: csv.clone(),
        ok: 0,
        checked: 0,
        hours: 0.0,
        faults: Fault::ALL.map(|fault| (fault.name(), 0)).into(),
        problems: Vec::new(),
        stopped: false,
        read: Read::of(&clips),
    };
    let work = |record: &Record| check(record, &options);
    let whole = each_clip(
        context,
        "verify",
        &mut clips,
        (jobs, BATCH),
        work,
        |mut record, found| {
            let Some(found) = found else {
                return Ok(false);
            };
            answer.count(&record, &found);
            found.fill(&mut record, &options);
            if !arguments.only_good || found.faults.is_empty() {
                writers.write(&record)?;
            }
            Ok(true)
        },
    )?;
    answer.stopped = !whole;
    if answer.stopped {
        // Half a manifest would be taken for a whole one.
        (answer.output, answer.csv) = (None, None);
    } else {
        writers.commit()?;
    }
    answer.read = Read::of(&clips);
    Answer::new(&answer)
}

#[derive(Serialize)]
struct Verified {
    path: PathBuf,
    output: Option<PathBuf>,
    csv: Option<PathBuf>,
    checked: u64,
    ok: u64,
    /// Of the clips whose length was found.
    hours: f64,
    faults: BTreeMap<&'static str, u64>,
    problems: Vec<Problem>,
    stopped: bool,
    #[serde(flatten)]
    read: Read,
}

#[derive(Serialize)]
struct Problem {
    id: String,
    fault: Fault,
    reason: String,
}

impl Verified {
    fn count(&mut self, record: &Record, found: &Checked) {
        self.checked += 1;
        self.ok += u64::from(found.faults.is_empty());
        self.hours += found.facts.duration_s.unwrap_or(0.0) / 3600.0;
        for (fault, reason) in &found.faults {
            *self.faults.entry(fault.name()).or_default() += 1;
            if self.problems.len() < NAMED {
                self.problems.push(Problem {
                    id: record.id.clone(),
                    fault: *fault,
                    reason: reason.clone(),
                });
            }
        }
    }
}

impl Report for Verified {
    fn status(&self) -> Status {
        if self.faults[Fault::Missing.name()] == self.checked {
            Status::Error
        } else if self.stopped || self.ok < self.checked {
            Status::Partial
        } else {
            Status::Done
        }
    }
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} of {} clips without a fault, {:.2} hours",
            self.ok, self.checked, self.hours
        )?;
        for (fault, count) in self.faults.iter().filter(|(_, count)| **count > 0) {
            writeln!(f, "{:<13} {count}", fault.replace('_', " "))?;
        }
        for problem in &self.problems {
            writeln!(
                f,
                "  {}: {}: {}",
                problem.id,
                problem.fault.name(),
                problem.reason
            )?;
        }
        if self.stopped {
            writeln!(f, "stopped; nothing was written")?;
        }
        for path in [&self.output, &self.csv].into_iter().flatten() {
            writeln!(f, "{}", path.display())?;
        }
        Ok(())
    }
}
