//! What sweeps share: many small runs with one budget, whose results are kept, make one table, and are gone on with.
//!
//! A sweep of plain runs is a plan, a [`Row`] for what comes out of a run, and recipes to train for it: [`Sweep::of`] does the rest.

mod table;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use candle_core::Device;
use fulgur_datasets::atomic::write_atomic;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::train::{self, Options, Outcome, Recipe, Report, Task, TrainError, tasks};
pub use table::Results;
pub(crate) use table::{Row, Sweep, cell, markdown};

/// What of a result is read at most.
const LARGEST_RESULT: u64 = 1 << 20;

/// What a sweep tells its caller.
pub enum Told {
    /// A line.
    Note(String),
    /// So many of all steps of all runs are done, or so many of all parts of the work.
    Progress(u64, u64, String),
}

/// Where a sweep works.
#[derive(Clone, Copy)]
pub struct Place<'a> {
    /// The folder of its results.
    pub out: &'a Path,
    /// The device.
    pub device: &'a Device,
    /// Set from elsewhere to stop.
    pub interrupt: &'a Arc<AtomicBool>,
}

impl Place<'_> {
    /// Trains a recipe, or goes on with it where it stopped.
    pub(crate) fn train(
        &self,
        recipe: &Recipe,
        report: impl FnMut(Report),
    ) -> Result<(Box<dyn Task>, Outcome), TrainError> {
        let task = tasks::build(tasks::TASKS, recipe, self.device, self.interrupt)?;
        let options = Options {
            resume: true,
            interrupt: Arc::clone(self.interrupt),
            ..Options::default()
        };
        let outcome = train::run(&*task, recipe, &options, report)?;
        Ok((task, outcome))
    }
}

/// What all runs of a sweep have in common.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Budget {
    /// Steps of each run.
    pub steps: u64,
    /// Seed of weights and data.
    pub seed: u64,
    /// Peak of the learning rate.
    pub lr: f64,
    /// Layers.
    pub layers: usize,
    /// Model width.
    pub width: usize,
}

impl Budget {
    /// The table of a model of this size, with more sizes.
    pub(crate) fn model(&self, more: &[(&str, usize)]) -> anyhow::Result<Table> {
        let mut model = sizes(&[("layers", self.layers), ("width", self.width)])?;
        model.extend(sizes(more)?);
        Ok(model)
    }

    /// The recipe of a run of `task` with its `own` table, in the folder `dir`; errors name `origin`. The weights at the end count, not
    /// their average, and the learning rate rises for a twentieth of the steps.
    ///
    /// # Errors
    /// Values that no recipe can have.
    pub(crate) fn recipe(
        &self,
        task: &str,
        own: Table,
        origin: String,
        dir: &Path,
    ) -> anyhow::Result<Recipe> {
        let warmup = (self.steps / 20).max(1);
        let shared = [
            (
                "train",
                vec![
                    ("max_steps", integer(self.steps)?),
                    ("ema", Value::Float(0.0)),
                    ("keep", Value::Integer(1)),
                ],
            ),
            ("optimiser", vec![("lr", Value::Float(self.lr))]),
            ("schedule", vec![("warmup", integer(warmup)?)]),
        ];
        let mut table = Table::new();
        table.insert("task".into(), task.into());
        table.insert("seed".into(), integer(self.seed)?);
        for (name, values) in shared {
            let values = values.into_iter().map(|(key, value)| (key.to_owned(), value));
            table.insert(name.into(), Value::Table(values.collect()));
        }
        table.insert(task.into(), Value::Table(own));
        Ok(Recipe::check(table, origin, dir)?)
    }
}

/// A number of a recipe.
pub(crate) fn integer(value: u64) -> anyhow::Result<Value> {
    let value = i64::try_from(value).with_context(|| format!("{value} is beyond all numbers of a recipe"))?;
    Ok(Value::Integer(value))
}

/// A table of numbers.
pub(crate) fn sizes(values: &[(&str, usize)]) -> anyhow::Result<Table> {
    let values = values.iter();
    values
        .map(|(key, value)| Ok(((*key).to_owned(), integer(*value as u64)?)))
        .collect()
}

/// A run of a sweep.
pub(crate) struct Run<T> {
    /// Its name, in what is told.
    pub(crate) name: String,
    /// The folder of its result.
    pub(crate) dir: PathBuf,
    /// Steps of all its recipes.
    pub(crate) steps: u64,
    /// What is trained.
    pub(crate) of: T,
}

/// A run at work.
pub(crate) struct Work<'a> {
    name: &'a str,
    place: Place<'a>,
    /// Steps of what was trained before, and of all runs.
    steps: [u64; 2],
    tell: &'a mut dyn FnMut(Told),
}

/// What training and the validation behind it gave.
pub(crate) struct Trained {
    /// Parameters of the model.
    pub(crate) parameters: usize,
    /// Samples a second.
    pub(crate) samples_per_s: f64,
    figures: Vec<(String, f64)>,
}

impl Trained {
    /// A figure of the validation; none if it is absent or not finite.
    pub(crate) fn figure(&self, name: &str) -> Option<f64> {
        let found = self.figures.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| *value).filter(|value| value.is_finite())
    }
}

impl Work<'_> {
    /// Trains a recipe, or goes on with it, and validates; none if it was interrupted. Progress names it `label`.
    pub(crate) fn train(&mut self, recipe: &Recipe, label: &str) -> anyhow::Result<Option<Trained>> {
        let (name, [before, all]) = (self.name, self.steps);
        let (task, outcome) = self.place.train(recipe, |report| {
            (self.tell)(match report {
                Report::Note(line) => Told::Note(format!("{name}: {line}")),
                Report::Progress {
                    step,
                    loss,
                    samples_per_s,
                    ..
                } => {
                    let label = format!("{label}, loss {loss:.3}, {samples_per_s:.0} samples/s");
                    Told::Progress(before + step, all, label)
                }
            });
        })?;
        if !outcome.finished {
            return Ok(None);
        }
        self.steps[0] += recipe.train.max_steps;
        let figures = task
            .validate()
            .map_err(|e| anyhow::anyhow!("{}: validation of {label}: {e}", recipe.origin))?;
        Ok(Some(Trained {
            parameters: task.params().count(),
            samples_per_s: outcome.samples_per_s,
            figures,
        }))
    }
}

/// A row with the plan that it was made by, as it is kept.
#[derive(Deserialize, Serialize)]
struct Kept<P, R> {
    plan: P,
    row: R,
}

impl<P: Clone + PartialEq + DeserializeOwned + Serialize, R: Row> Sweep<P, R> {
    /// Trains `runs` in order, each by `one`, which gives none where it was interrupted, and writes `table.md` and `table.json` into the
    /// folder after each. Those whose results are there already are passed over; a run that was interrupted goes on.
    ///
    /// # Errors
    /// Results of another plan lie there, a run fails, or a folder cannot be written.
    pub(crate) fn of<T>(
        plan: &P,
        runs: &[Run<T>],
        place: Place<'_>,
        tell: &mut dyn FnMut(Told),
        mut one: impl FnMut(&Run<T>, &mut Work<'_>) -> anyhow::Result<Option<R>>,
    ) -> anyhow::Result<Self> {
        let mut sweep = Self {
            plan: plan.clone(),
            rows: Vec::new(),
            finished: false,
        };
        let all = runs.iter().map(|run| run.steps).sum();
        let result = |run: &Run<T>| run.dir.join("result.json");
        // Results of another plan should be heard of before the first run.
        let known: Vec<Option<R>> = runs
            .iter()
            .map(|run| kept(&result(run), plan))
            .collect::<anyhow::Result<_>>()?;
        let mut before = 0;
        for (run, known) in runs.iter().zip(known) {
            if let Some(row) = known {
                tell(Told::Note(format!("{}: there already", run.name)));
                sweep.rows.push(row);
            } else {
                let mut work = Work {
                    name: &run.name,
                    place,
                    steps: [before, all],
                    tell,
                };
                let Some(row) = one(run, &mut work)? else {
                    sweep.write(place.out)?;
                    return Ok(sweep);
                };
                write_json(&result(run), &Kept { plan, row: &row })?;
                sweep.rows.push(row);
                sweep.write(place.out)?;
            }
            before += run.steps;
        }
        sweep.finished = true;
        sweep.write(place.out)?;
        Ok(sweep)
    }

    fn write(&self, out: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(out).with_context(|| out.display().to_string())?;
        write_tables(out, self, &self.table())
    }
}

/// The result that lies there, if any.
fn kept<P: PartialEq + DeserializeOwned, R: DeserializeOwned>(
    path: &Path,
    plan: &P,
) -> anyhow::Result<Option<R>> {
    let kept: Option<Kept<P, R>> = read_json(path)?;
    match kept {
        Some(kept) if kept.plan != *plan => anyhow::bail!(
            "{}: made by other options than these; give those, or another --out",
            path.display()
        ),
        kept => Ok(kept.map(|kept| kept.row)),
    }
}

/// What lies in a file, if it is there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fulgur_lightnet::params::file::read_bounded(path, LARGEST_RESULT)?;
    let value = serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    Ok(Some(value))
}

/// Writes a value as readable JSON, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_text(path, &text)
}

/// Writes `table.json` and `table.md` into a folder.
pub(crate) fn write_tables(out: &Path, json: &impl Serialize, markdown: &str) -> anyhow::Result<()> {
    write_json(&out.join("table.json"), json)?;
    write_text(&out.join("table.md"), markdown)
}

fn write_text(path: &Path, text: &str) -> anyhow::Result<()> {
    write_atomic(path, |file| file.write_all(text.as_bytes())).with_context(|| path.display().to_string())
}
