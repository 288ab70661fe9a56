//! `fulgur tavgbench stats`: what the data set is made of.

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fulgur_benchmark::captions::Clips;
use fulgur_benchmark::captions::statistics::{Shares, Statistics, Summary};
use fulgur_benchmark::captions::tally::{Figures, Tally};
use fulgur_datasets::atomic::write_atomic;
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::{Read, Reading};
use crate::report::histogram::Histogram;

/// Bins of a histogram, at most.
const BINS: u64 = 60;
/// Values of a field that are shown to people.
const SHOWN: usize = 6;

/// Count clips, hours, words and sentences
///
/// Words are pieces between white space; sentences end with . ! or ? before white space or the end. Percentiles are those of
/// NumPy's default. Lines that are odd are counted, and the first of each kind named. The exit code is 1 where the file
/// holds no clip.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur tavgbench stats release_captions.txt\n  \
                  fulgur tavgbench stats manifest.jsonl --pictures plots --json")]
pub(super) struct Arguments {
    /// Caption file, or manifest (.jsonl)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Draw histograms of lengths, words and sentences as SVG files into this folder
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let mut clips = Clips::open(&arguments.file)?;
    let mut statistics = Statistics::default();
    let mut reading = Reading::new(context, "stats");
    while let Some(record) = clips.next_clip()? {
        statistics.add(&record);
        reading.tell(&clips);
        if context.interrupt.requested() {
            bail!("{}: stopped before its end", arguments.file.display());
        }
    }
    drop(reading);
    let pictures = match &arguments.pictures {
        Some(folder) => draw(&statistics, folder)?,
        None => Vec::new(),
    };
    Answer::new(&Counted {
        path: arguments.file.clone(),
        read: Read::of(&clips),
        summary: statistics.summary(),
        pictures,
    })
}

fn draw(statistics: &Statistics, folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let all: [(&str, &str, &str, &str, &Tally, f64); 3] = [
        (
            "duration.svg",
            "Length of clips",
            "seconds",
            "clips",
            &statistics.lengths,
            1e-3,
        ),
        (
            "words.svg",
            "Words a caption",
            "words",
            "captions",
            &statistics.words,
            1.0,
        ),
        (
            "sentences.svg",
            "Sentences a caption",
            "sentences",
            "captions",
            &statistics.sentences,
            1.0,
        ),
    ];
    let mut drawn = Vec::new();
    for (file, title, values, counted, tally, unit) in all {
        let bins = tally.histogram(BINS);
        let bins: Vec<(f64, u64)> = bins
            .iter()
            .map(|(from, count)| (*from as f64 * unit, *count))
            .collect();
        let svg = Histogram {
            title,
            values,
            counted,
            bins: &bins,
        }
        .draw();
        let path = folder.join(file);
        write_atomic(&path, |file| file.write_all(svg.as_bytes()))
            .with_context(|| path.display().to_string())?;
        drawn.push(path);
    }
    Ok(drawn)
}

#[derive(Serialize)]
struct Counted {
    path: PathBuf,
    #[serde(flatten)]
    read: Read,
    #[serde(flatten)]
    summary: Summary,
    pictures: Vec<PathBuf>,
}

impl Report for Counted {
    fn status(&self) -> Status {
        if self.read.counts.records == 0 {
            Status::Partial
        } else {
            Status::Done
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary {
            hours,
            duration_s,
            words,
            sentences,
            ..
        } = &self.summary;
        write!(f, "{}", self.read)?;
        writeln!(f, "{hours:.2} hours")?;
        row(f, "length, s", duration_s)?;
        row(f, "words", words)?;
        row(f, "sentences", sentences)?;
        for (name, shares) in [
            ("splits", &self.summary.splits),
            ("flags", &self.summary.flags),
            ("fps", &self.summary.fps),
            ("sizes", &self.summary.sizes),
            ("sample rates", &self.summary.sample_rates),
        ] {
            if !shares.is_empty() {
                writeln!(f, "{name:<12} {}", most(shares))?;
            }
        }
        for path in &self.pictures {
            writeln!(f, "{}", path.display())?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, figures: &Figures) -> fmt::Result {
    let Figures {
        mean: Some(mean),
        min: Some(min),
        median: Some(median),
        p95: Some(p95),
        max: Some(max),
        ..
    } = figures
    else {
        return writeln!(f, "{name:<12} none");
    };
    writeln!(
        f,
        "{name:<12} mean {mean:.2}, min {min}, median {median}, 95 % below {p95:.2}, max {max}"
    )
}

/// The most frequent values of a field.
fn most(shares: &Shares) -> String {
    let mut sorted: Vec<_> = shares.iter().collect();
    sorted.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let mut words: Vec<String> = sorted
        .iter()
        .take(SHOWN)
        .map(|(value, count)| format!("{value} {count}"))
        .collect();
    if sorted.len() > SHOWN {
        words.push(format!("and {} more", sorted.len() - SHOWN));
    }
    words.join(", ")
}
