//! What the commands of sweeps share: options of the budget, names, progress, and the report.

use std::fmt;
use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;

use super::answer::{Answer, Report, Status};
use super::context::Context;
use super::progress::Unit;
use crate::sweep::{Budget, Place, Results, Told};

/// What all runs have in common; a command sets the defaults that are its own.
#[derive(Debug, clap::Args)]
pub(super) struct Common {
    /// Steps of each run
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Where runs, results and the table go
    #[arg(short, long, value_name = "DIR", default_value = "runs/sweep")]
    pub(super) out: PathBuf,
    /// Seed of weights and data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Peak of the learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Layers of the models
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Their width
    #[arg(long, default_value_t = 128)]
    width: usize,
}

impl Common {
    /// The budget.
    pub(super) fn budget(&self) -> Budget {
        Budget {
            steps: self.steps,
            seed: self.seed,
            lr: self.lr,
            layers: self.layers,
            width: self.width,
        }
    }
}

/// A word for several items, and which they are.
pub(super) type Group<T> = (&'static str, fn(&T) -> bool);

/// Those of `all` that are named, each once, in the order of the names; or those of one of the `groups`, by its name alone.
pub(super) fn chosen<'a, T>(
    flag: &str,
    names: &[String],
    groups: &[Group<T>],
    all: &'a [T],
    name_of: impl Fn(&T) -> &str,
) -> anyhow::Result<Vec<&'a T>> {
    if let [name] = names
        && let Some((_, holds)) = groups.iter().find(|(group, _)| group == name)
    {
        return Ok(all.iter().filter(|item| holds(item)).collect());
    }
    let mut chosen: Vec<&T> = Vec::new();
    for name in names {
        let Some(item) = all.iter().find(|item| name_of(item) == name) else {
            let groups: String = groups.iter().map(|(group, _)| format!("{group}, ")).collect();
            let known: Vec<_> = all.iter().map(&name_of).collect();
            let or = if groups.is_empty() { "" } else { "or " };
            bail!(
                "{flag}: found {name:?}, expected {groups}{or}some of {}",
                known.join(", ")
            );
        };
        if chosen.iter().all(|before| name_of(before) != name) {
            chosen.push(item);
        }
    }
    Ok(chosen)
}

/// Runs a sweep in the folder `out`, whose progress is `label` and in `unit`, and answers with its table.
pub(super) fn swept<S: Results>(
    context: &Context,
    (label, unit): (&str, Unit),
    out: PathBuf,
    sweep: impl FnOnce(Place<'_>, &mut dyn FnMut(Told)) -> anyhow::Result<S>,
) -> anyhow::Result<Answer> {
    let device = context.open_device()?;
    let place = Place {
        out: &out,
        device: &device,
        interrupt: context.interrupt.flag(),
    };
    let mut progress = context.progress(label, unit);
    let sweep = sweep(place, &mut |told| match told {
        Told::Note(line) => context.note(&line),
        Told::Progress(done, all, label) => {
            progress.relabel(label);
            progress.set(done, Some(all));
        }
    })?;
    drop(progress);
    Answer::new(&Swept { path: out, sweep })
}

#[derive(Serialize)]
struct Swept<S> {
    /// The folder with table.md and table.json.
    path: PathBuf,
    #[serde(flatten)]
    sweep: S,
}

impl<S: Results> Report for Swept<S> {
    fn status(&self) -> Status {
        if self.sweep.finished() {
            Status::Done
        } else {
            Status::Partial
        }
    }
}

impl<S: Results> fmt::Display for Swept<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sweep.table())?;
        for line in self.sweep.left() {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "{}", self.path.join("table.md").display())
    }
}
