//! `fulgur tavgbench`: the data set TAVGBench.

#[cfg(feature = "media")]
mod cut;
mod split;
mod stats;
#[cfg(feature = "media")]
mod verify;

use std::fmt;

#[cfg(feature = "media")]
use fulgur_benchmark::captions::Record;
use fulgur_benchmark::captions::{Clips, Counts};
#[cfg(feature = "media")]
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::Serialize;

use super::answer::Answer;
use super::context::Context;
use super::progress::{Progress, Unit};

/// Problems of clips that an answer names.
#[cfg(feature = "media")]
const NAMED: usize = 20;

/// Work with the captions and clips of TAVGBench
///
/// FILE is the release's caption file, a clip a line: its name, such as P2RPnCJZMBo_290000_300000.mp4, and its caption; or a
/// manifest, a JSON object a line, whose name ends in .jsonl. Both are read as a stream: millions of clips take a hash each.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = false,
    after_help = "Example:\n  fulgur tavgbench stats release_captions.txt"
)]
pub(super) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    Stats(stats::Arguments),
    Split(split::Arguments),
    #[cfg(feature = "media")]
    Verify(verify::Arguments),
    #[cfg(feature = "media")]
    Cut(cut::Arguments),
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    match arguments.action {
        Action::Stats(arguments) => stats::run(context, &arguments),
        Action::Split(arguments) => split::run(context, &arguments),
        #[cfg(feature = "media")]
        Action::Verify(arguments) => verify::run(context, &arguments),
        #[cfg(feature = "media")]
        Action::Cut(arguments) => cut::run(context, &arguments),
    }
}

/// Clips between two looks at the progress.
const EVERY: u64 = 4096;

/// Shows how far a file was read, now and then.
struct Reading {
    progress: Progress,
    clips: u64,
}

impl Reading {
    fn new(context: &Context, label: &str) -> Self {
        Self {
            progress: context.progress(label, Unit::Bytes),
            clips: 0,
        }
    }

    /// After each clip.
    fn tell(&mut self, clips: &Clips) {
        self.clips += 1;
        if self.clips.is_multiple_of(EVERY) {
            let (read, length) = clips.position();
            self.progress.set(read, Some(length.max(read)));
        }
    }
}

/// Works on all clips of a file, `jobs` at the same time and `share` for each of them at a time, and takes what comes of them in their
/// order; `take` says whether to go on. Whether all were taken: else the user stopped it.
///
/// # Errors
/// The file cannot be read, or those of `take`.
#[cfg(feature = "media")]
fn each_clip<T: Send>(
    context: &Context,
    label: &str,
    clips: &mut Clips,
    (jobs, share): (usize, usize),
    work: impl Fn(&Record) -> T + Sync + Send,
    mut take: impl FnMut(Record, T) -> anyhow::Result<bool>,
) -> anyhow::Result<bool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(jobs).build()?;
    let mut progress = context.progress(label, Unit::Items("clips"));
    progress.set(0, None);
    let (mut batch, mut done) = (Vec::new(), 0u64);
    loop {
        let next = clips.next_clip()?;
        let last = next.is_none();
        batch.extend(next);
        if batch.len() < jobs * share && !last {
            continue;
        }
        let results: Vec<T> = pool.install(|| batch.par_iter().map(&work).collect());
        for (record, result) in batch.drain(..).zip(results) {
            if !take(record, result)? {
                return Ok(false);
            }
            done += 1;
        }
        let (read, length) = clips.position();
        let expected = (done as f64 * length as f64 / read.max(1) as f64) as u64;
        progress.set(done, Some(expected.max(done)));
        if context.interrupt.requested() {
            return Ok(false);
        }
        if last {
            return Ok(true);
        }
    }
}

/// What every answer tells about the file that was read.
#[derive(Serialize)]
struct Read {
    kind: &'static str,
    #[serde(flatten)]
    counts: Counts,
}

impl Read {
    fn of(clips: &Clips) -> Self {
        Self {
            kind: clips.kind(),
            counts: clips.counts().clone(),
        }
    }
}

impl fmt::Display for Read {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts {
            records,
            captions,
            duplicates,
            ignored_lines,
            rejected,
            two_line,
            broken_utf8,
            ..
        } = &self.counts;
        writeln!(f, "{records} clips, {captions} with a caption")?;
        let odd = [
            (*duplicates, "duplicate names"),
            (*ignored_lines, "ignored lines"),
            (*rejected, "rejected"),
            (*two_line, "captions below their names"),
            (*broken_utf8, "lines of broken UTF-8"),
        ];
        let odd: Vec<String> = odd
            .iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, words)| format!("{count} {words}"))
            .collect();
        if !odd.is_empty() {
            writeln!(f, "{}", odd.join(", "))?;
        }
        for (problem, examples) in &self.counts.examples {
            // Their name as in JSON.
            let name = serde_json::to_value(problem).unwrap_or_default();
            for example in examples.iter().take(2) {
                let name = name.as_str().unwrap_or_default().replace('_', " ");
                writeln!(f, "  line {}: {name}: {}", example.line, example.text)?;
            }
        }
        Ok(())
    }
}
