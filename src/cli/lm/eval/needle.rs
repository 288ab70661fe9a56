//! `fulgur lm eval needle`: a fact in a long text.

use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::Context as _;
use fulgur_datasets::atomic::write_atomic;
use serde::Serialize;

use super::super::super::answer::{Answer, Report, Status};
use super::super::super::context::Context;
use super::super::super::files::check_output;
use super::super::super::progress::Unit;
use super::super::read_text;
use super::{ModelArguments, note_of_the_end, with_error};
use crate::lm_eval::figures::Estimate;
use crate::lm_eval::needle::{Cell, Found, Kind, Options, Overall, needle};
use crate::report::heat::HeatMaps;

/// A needle in a haystack: a made-up fact in a long text, by length and depth
///
/// The sentence "The magic number of Belwick is 48172." is hidden in the text, and asked for at its end. Two figures are given:
/// written, the share of needles whose number the model writes by the likeliest tokens; and likeliest, the share whose number is the
/// likeliest among --others more numbers with as many digits, which small models may do without being able to copy digits. Both as
/// plain mean and as mean weighted by the distance between needle and question. --kind easy puts the question in front of the
/// needle too. The text is read once and its states are forked, so that lengths cost what lies behind their needles.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur lm eval needle --model DIR --haystack book.txt --lengths 1024,2048,4096 --picture heat.svg\n  fulgur lm eval needle --model DIR --haystack book.txt --lengths 1024 --kind easy --json"
)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The text to hide facts in; - for standard input
    #[arg(long, value_name = "FILE")]
    haystack: PathBuf,
    /// Tokens up to the answer
    #[arg(
        long,
        value_name = "N,..",
        value_delimiter = ',',
        default_value = "512,1024,2048"
    )]
    lengths: Vec<usize>,
    /// Depths of needles, from the beginning of the text to its end
    #[arg(long, value_name = "N", default_value_t = 5)]
    depths: usize,
    /// How hard it is
    #[arg(long, value_enum, default_value_t = Kind::Standard)]
    kind: Kind,
    /// Needles for each length and depth
    #[arg(long, value_name = "N", default_value_t = 10)]
    samples: usize,
    /// Digits of a number
    #[arg(long, value_name = "N", default_value_t = 5)]
    digits: u32,
    /// Other numbers to choose from
    #[arg(long, value_name = "N", default_value_t = 9)]
    others: usize,
    /// Seed of places and numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Draw heat maps of both figures
    #[arg(long, value_name = "OUT.svg")]
    picture: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    let options = Options {
        lengths: arguments.lengths.clone(),
        depths: arguments.depths,
        kind: arguments.kind,
        samples: arguments.samples,
        digits: arguments.digits,
        others: arguments.others,
        seed: arguments.seed,
    };
    options.check()?;
    if let Some(path) = &arguments.picture {
        check_output(path)?;
    }
    let subject = arguments.model.open(context)?;
    let haystack = read_text(&arguments.haystack)?;
    let mut progress = context.progress("needle", Unit::Items("tokens"));
    let found = needle(&subject, &haystack, &options, |done, all| {
        progress.set(done, Some(all));
        !context.interrupt.requested()
    })
    .with_context(|| arguments.haystack.display().to_string())?;
    drop(progress);
    let judged = Judged {
        model: arguments.model.model.clone(),
        haystack: arguments.haystack.clone(),
        kind: arguments.kind,
        digits: arguments.digits,
        seed: arguments.seed,
        picture: arguments.picture.clone(),
        lengths: arguments.lengths.clone(),
        depths: arguments.depths,
        found,
    };
    if let Some(path) = &arguments.picture {
        let picture = judged.picture().draw();
        write_atomic(path, |file| file.write_all(picture.as_bytes()))
            .with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Answer::new(&judged)
}

#[derive(Serialize)]
struct Judged {
    model: PathBuf,
    haystack: PathBuf,
    kind: Kind,
    digits: u32,
    seed: u64,
    picture: Option<PathBuf>,
    lengths: Vec<usize>,
    depths: usize,
    #[serde(flatten)]
    found: Found,
}

impl Judged {
    /// A figure by depth, then length; none where a cell was not done.
    fn grid(&self, figure: impl Fn(&Cell) -> Estimate) -> Vec<Vec<Option<f64>>> {
        let row = |depth: f64| {
            let lengths = self.lengths.iter();
            let cell = |length: &usize| {
                let mut cells = self.found.cells.iter();
                let cell = cells.find(|cell| cell.length == *length && cell.depth == depth);
                cell.map(|cell| figure(cell).mean)
            };
            lengths.map(cell).collect()
        };
        self.depth_values().into_iter().map(row).collect()
    }

    /// All depths that were done.
    fn depth_values(&self) -> Vec<f64> {
        let mut depths: Vec<f64> = self.found.cells.iter().map(|cell| cell.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        depths
    }

    fn picture(&self) -> HeatMaps {
        let kind = match self.kind {
            Kind::Easy => "easy",
            Kind::Standard => "standard",
        };
        let samples = self.found.cells.first().map_or(0, |cell| cell.n);
        let likeliest = format!("likeliest of {:.0}, %", 1.0 / self.found.chance);
        HeatMaps {
            title: format!("Needle in a haystack, {kind}: {samples} needles a field"),
            across: "tokens".into(),
            columns: self.lengths.iter().map(usize::to_string).collect(),
            down: "depth of the needle".into(),
            rows: (self.depth_values().iter())
                .map(|depth| format!("{:.0} %", 100.0 * depth))
                .collect(),
            maps: vec![
                ("number written, %".into(), self.grid(|cell| cell.written)),
                (likeliest, self.grid(|cell| cell.likeliest)),
            ],
        }
    }
}

impl Report for Judged {
    fn status(&self) -> Status {
        match self.found.finished {
            true => Status::Done,
            false => Status::Partial,
        }
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let maps = self.picture();
        for (title, values) in &maps.maps {
            write!(f, "{title:<22}")?;
            maps.columns.iter().try_for_each(|name| write!(f, "{name:>8}"))?;
            writeln!(f)?;
            for (name, row) in maps.rows.iter().zip(values) {
                write!(f, "  depth {name:<14}")?;
                for value in row {
                    match value {
                        Some(value) => write!(f, "{:>8.0}", 100.0 * value)?,
                        None => write!(f, "{:>8}", "-")?,
                    }
                }
                writeln!(f)?;
            }
        }
        for (name, overall) in [
            ("written", self.found.written),
            ("likeliest", self.found.likeliest),
        ] {
            let Some(Overall {
                mean,
                stderr,
                weighted,
                weighted_stderr,
            }) = overall
            else {
                continue;
            };
            write!(f, "{name:<10} {}", with_error(mean, stderr))?;
            if let Some(weighted) = weighted {
                write!(f, ", by distance {}", with_error(weighted, weighted_stderr))?;
            }
            writeln!(f)?;
        }
        writeln!(f, "chance of the likeliest {:.4}", self.found.chance)?;
        if let Some(path) = &self.picture {
            writeln!(f, "written to {}", path.display())?;
        }
        f.write_str(note_of_the_end(self.found.finished))
    }
}
