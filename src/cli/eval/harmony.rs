//! `fulgur eval harmony`: whether an encoder tells matched sounds from others, and the probe of synchrony early from late ones.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::fetch::DataDir;
use serde::Serialize;

use super::super::answer::{Answer, Report, Status};
use super::super::context::Context;
use super::super::encoder::{EncoderOptions, open_encoder};
use super::super::files::check_output;
use super::super::progress::Unit;
use crate::eval::harmony::{Options, Pairs, Set, Shifts, sets};
use crate::report::clips::{Column, Gallery, Look, Row};

/// Measure whether an encoder tells the sound of a clip from that of another one
///
/// Clips are composed scenes of things in motions that training never shows, and the held-out part of the film where it is prepared.
/// AVHScore of a clip with its own sound is compared with those of its frames with the sounds of all clips in which other things are
/// seen. Then sounds are moved by 250 and 500 ms to both sides, and the probe of synchrony (no network) has to find them. Scenes
/// depend on --seed; 0 is that of training.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur eval harmony --clips 200 --seed 1 --report harmony.html")]
pub(super) struct Arguments {
    /// The encoder: `builtin`, or the folder of one
    #[arg(long, value_name = "builtin|DIR", default_value = "builtin")]
    encoder: PathBuf,
    /// Folder of the prepared sets `stamps`, `backgrounds` and `bbb` [default: $FULGUR_DATA, else ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Scenes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=5000), default_value_t = 200)]
    clips: u16,
    /// Seed of the scenes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Share of scenes with two things
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    two_things: f32,
    /// A page with all clips, their scores and their sounds' waveforms
    #[arg(long, value_name = "PAGE.html")]
    report: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    if let Some(path) = &arguments.report {
        check_output(path)?;
    }
    if !(0.0..=1.0).contains(&arguments.two_things) {
        anyhow::bail!("--two-things: found {}, expected 0 to 1", arguments.two_things);
    }
    let encoder = open_encoder(&arguments.encoder, EncoderOptions::default(), context)?;
    let data = arguments
        .data
        .clone()
        .map_or_else(DataDir::from_env, DataDir::new);
    let options = Options {
        scenes: usize::from(arguments.clips),
        seed: arguments.seed,
        two_things: arguments.two_things,
    };
    let sets = sets(data.path(), &options)?;
    if sets.len() == 1 {
        context.note("the film is not prepared (fulgur data fetch bbb)");
    }
    let began = Instant::now();
    let cancel = context.interrupt.flag();
    let mut found = Vec::new();
    for set in &sets {
        let total = Some(set.len() as u64);
        let mut progress = context.progress(set.name, Unit::Items("clips"));
        let pairs = set.pairs(&*encoder, cancel, |done| progress.set(done as u64, total))?;
        drop(progress);
        let mut progress = context.progress("shifts", Unit::Items("clips"));
        let shifts = match &pairs {
            Some(_) => set.shifts(cancel, |done| progress.set(done as u64, total))?,
            None => None,
        };
        drop(progress);
        let (Some(pairs), Some(shifts)) = (pairs, shifts) else {
            break;
        };
        found.push(Figures {
            set: set.name,
            pairs,
            shifts,
        });
    }
    let harmony = Harmony {
        complete: found.len() == sets.len(),
        encoder: encoder.name().to_owned(),
        seed: arguments.seed,
        report: arguments.report.clone().filter(|_| !found.is_empty()),
        sets: found,
        seconds: began.elapsed().as_secs_f64(),
    };
    if let Some(path) = &harmony.report {
        let page = gallery(&sets, &harmony).page();
        write_atomic(path, |file| file.write_all(page.as_bytes()))?;
    }
    Answer::new(&harmony)
}

/// All clips as a page, the film among them.
fn gallery(sets: &[Set], harmony: &Harmony) -> Gallery {
    let mut rows = Vec::new();
    let mut summary = Vec::new();
    for (set, figures) in sets.iter().zip(&harmony.sets) {
        for (i, ((video, sound), (matched, shuffled))) in set.clips().zip(&figures.pairs.each).enumerate() {
            let offset = fulgur_benchmark::metrics::sync::probe(video, sound)
                .ok()
                .flatten();
            rows.push(Row {
                name: format!("{} {i}", set.name),
                prompt: None,
                look: Look::of(Some(video), Some(sound)),
                values: vec![Some(*matched), *shuffled, offset.map(|offset| offset.offset_ms)],
                notes: Vec::new(),
            });
        }
        let words = format!("{} pairs; encoder {}", figures.pairs.pairs, harmony.encoder);
        summary.push((
            format!("{}: matched above shuffled", set.name),
            figures.pairs.above,
            words,
        ));
    }
    let column = |name: &str, lower_is_better| Column {
        name: name.to_owned(),
        lower_is_better,
    };
    Gallery {
        title: "Matched and shuffled sounds".to_owned(),
        summary,
        columns: vec![
            column("matched", false),
            column("shuffled", true),
            column("offset_ms", true),
        ],
        rows,
    }
}

#[derive(Serialize)]
struct Figures {
    set: &'static str,
    #[serde(flatten)]
    pairs: Pairs,
    shifts: Shifts,
}

#[derive(Serialize)]
struct Harmony {
    encoder: String,
    seed: u64,
    sets: Vec<Figures>,
    report: Option<PathBuf>,
    seconds: f64,
    #[serde(skip)]
    complete: bool,
}

impl Report for Harmony {
    fn status(&self) -> Status {
        match self.complete {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

impl fmt::Display for Harmony {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Figures { set, pairs, shifts } in &self.sets {
            writeln!(
                f,
                "{set}: matched {:.3}, shuffled {:.3}; matched above shuffled in {} of {} pairs (next clip alone: {}), its own sound \
                 first for {} of {} clips",
                pairs.matched,
                pairs.shuffled,
                percent(pairs.above),
                pairs.pairs,
                percent(pairs.above_next),
                percent(Some(pairs.first)),
                pairs.clips
            )?;
            writeln!(
                f,
                "{set}: moved sounds found with the right sign in {} of {} cases, within 100 ms in {}, nothing found in {}",
                percent(shifts.right_sign),
                shifts.cases,
                percent(shifts.within_100_ms),
                shifts.nothing
            )?;
        }
        if let Some(path) = &self.report {
            writeln!(f, "written to {}", path.display())?;
        }
        write!(f, "encoder {}, {:.0} s", self.encoder, self.seconds)
    }
}
