//! What sweeps share: many small runs with one budget, whose results are kept.

use std::io::Write;
use std::path::Path;

use anyhow::Context as _;
use fulgur_datasets::atomic::write_atomic;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::train::Recipe;

/// What of a result is read at most.
const LARGEST_RESULT: u64 = 1 << 20;

/// What a sweep tells its caller.
pub enum Told {
    /// A line.
    Note(String),
    /// So many of all steps of all runs are done.
    Progress(u64, u64, String),
}

/// What all runs of a sweep have in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Steps of each run.
    pub(crate) steps: u64,
    /// Peak of the learning rate.
    pub(crate) lr: f64,
    /// Seed of weights and data.
    pub(crate) seed: u64,
}

impl Budget {
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

/// What lies in a file, if it is there.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = fulgur_lightnet::params::file::read_bounded(path, LARGEST_RESULT)?;
    let value = serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
    Ok(Some(value))
}

/// That the result in a file was made with other options.
pub(crate) fn other_plan(path: &Path) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: made by other options than these; give those, or another --out",
        path.display()
    )
}

/// Writes a value as readable JSON, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_atomic(path, |file| file.write_all(text.as_bytes()))?;
    Ok(())
}
