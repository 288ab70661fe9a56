//! Sweeps of the EOS layer (arXiv 2405.17383, section 6): every setting is trained with the same budget on a text and on
//! associative recall, and one table says how well.
//!
//! A setting is a small language model that differs from the first one, all from data with gates of rows, in what its name
//! says. Runs and results are kept by setting, so that a sweep goes on where it stopped.

mod settings;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::sweep::{self, Run, Work, cell, sizes};
pub use crate::sweep::{Budget, Place, Results, Told};
use crate::train::Recipe;
pub use settings::{SETTINGS, Setting};

/// The budget that all settings share.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// The text, or tokens as the task `lm` takes them.
    pub data: PathBuf,
    /// Rows of the embedding for it; 0 for bytes.
    pub vocabulary: usize,
    /// Steps, seed, learning rate and size.
    #[serde(flatten)]
    pub budget: Budget,
    /// Windows of text in a batch.
    pub batch: usize,
    /// Tokens of a window.
    pub context: usize,
    /// Examples of recall in a batch.
    pub recall_batch: usize,
    /// Tokens of such an example.
    pub recall_context: usize,
    /// Pairs of key and value in it.
    pub pairs: usize,
    /// Its vocabulary.
    pub recall_vocabulary: usize,
    /// Taps of short convolutions in models of recall; 0 for none.
    pub recall_convolution: usize,
    /// Examples of recall, and windows of text at most, that are judged by.
    pub validation: usize,
}

/// How a setting did.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Parameters of the model of text.
    pub parameters: usize,
    /// Held-out loss of the text, nats a token.
    pub loss: Option<f64>,
    /// Loss of recall, nats a query.
    pub recall_loss: Option<f64>,
    /// Share of queries answered rightly.
    pub recall_accuracy: Option<f64>,
}

impl sweep::Row for Row {
    const KEY: &'static str = "settings";
    const COLUMNS: &'static [&'static str] = &[
        "setting",
        "parameters",
        "held-out loss",
        "perplexity",
        "recall loss",
        "recall accuracy",
    ];

    fn cells(&self) -> Vec<String> {
        let number = |value: Option<f64>| cell(value, |value| format!("{value:.4}"));
        vec![
            self.name.clone(),
            self.parameters.to_string(),
            number(self.loss),
            number(self.loss.map(f64::exp).filter(|value| value.is_finite())),
            number(self.recall_loss),
            number(self.recall_accuracy),
        ]
    }
}

/// The whole table.
pub type Sweep = sweep::Sweep<Plan, Row>;

impl Plan {
    /// The recipes of a setting: of text and of recall.
    ///
    /// # Errors
    /// A setting that is no table, or values that no recipe can have.
    fn recipes(&self, setting: &Setting, dir: &Path) -> anyhow::Result<[Recipe; 2]> {
        let model = |vocabulary: usize, taps: usize| -> anyhow::Result<Table> {
            let mut model: Table = setting
                .model
                .parse()
                .with_context(|| format!("setting {}", setting.name))?;
            let sizes = [("hidden", self.budget.width * 2), ("vocabulary", vocabulary)];
            model.insert("architecture".into(), "eos".into());
            model.extend(self.budget.model(&sizes)?);
            model.entry("heads").or_insert(Value::Integer(1));
            model.entry("head_width").or_insert(Value::Integer(BASE_ROWS));
            if taps > 0 {
                let variant = model.entry("variant").or_insert_with(|| Table::new().into());
                let variant = variant.as_table_mut().context("variant: expected a table")?;
                variant.insert("conv_size".into(), sweep::integer(taps as u64)?);
            }
            Ok(model)
        };
        let recipe = |task: &str, own: Table| -> anyhow::Result<Recipe> {
            let origin = format!("setting {}", setting.name);
            self.budget.recipe(task, own, origin, &dir.join(task))
        };
        let Some(data) = self.data.to_str() else {
            bail!("--data: {} is not UTF-8", self.data.display())
        };
        let mut text = sizes(&[
            ("batch", self.batch),
            ("context", self.context),
            ("validation", self.validation),
        ])?;
        text.insert("tokens".into(), data.into());
        text.insert("held_out".into(), Value::Float(HELD_OUT));
        text.insert("model".into(), Value::Table(model(self.vocabulary, 0)?));
        let mut recall = sizes(&[
            ("batch", self.recall_batch),
            ("context", self.recall_context),
            ("pairs", self.pairs),
            ("vocabulary", self.recall_vocabulary),
            ("validation", self.validation),
        ])?;
        recall.insert("model".into(), Value::Table(model(0, self.recall_convolution)?));
        Ok([recipe("lm", text)?, recipe("recall", recall)?])
    }
}

/// Rows of the memory where a setting does not name them.
const BASE_ROWS: i64 = 16;
/// Share of the text that is held out.
const HELD_OUT: f64 = 0.05;

/// Trains `settings` in order, and writes `table.md` and `table.json` into the folder after each. Those whose results are there
/// already are passed over; a run that was interrupted goes on.
///
/// # Errors
/// Results of another plan lie in the folder, a run fails, or it cannot be written.
pub fn sweep(
    plan: &Plan,
    settings: &[&Setting],
    place: Place<'_>,
    tell: &mut dyn FnMut(Told),
) -> anyhow::Result<Sweep> {
    let runs: Vec<Run<&Setting>> = settings
        .iter()
        .map(|&setting| Run {
            name: setting.name.to_owned(),
            dir: place.out.join(setting.name),
            steps: 2 * plan.budget.steps,
            of: setting,
        })
        .collect();
    Sweep::of(plan, &runs, place, tell, |run, work| one(plan, run, work))
}

/// Trains a setting on the text and on recall; none where it was interrupted.
fn one(plan: &Plan, run: &Run<&Setting>, work: &mut Work<'_>) -> anyhow::Result<Option<Row>> {
    let mut trained = Vec::new();
    for recipe in plan.recipes(run.of, &run.dir)? {
        let label = format!("{} {}", run.name, recipe.task);
        let Some(part) = work.train(&recipe, &label)? else {
            return Ok(None);
        };
        trained.push(part);
    }
    let [text, recall] = &trained[..] else {
        bail!("{}: found {} recipes, expected 2", run.name, trained.len())
    };
    Ok(Some(Row {
        name: run.name.clone(),
        parameters: text.parameters,
        loss: text.figure("loss"),
        recall_loss: recall.figure("loss"),
        recall_accuracy: recall.figure("accuracy"),
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use candle_core::Device;

    use super::*;
    use crate::train::tasks;

    fn plan(dir: &Path) -> Plan {
        let data = dir.join("text.txt");
        fs::write(&data, "one two three four ".repeat(60)).unwrap();
        Plan {
            data,
            vocabulary: 0,
            budget: Budget {
                steps: 2,
                seed: 1,
                lr: 1e-3,
                layers: 1,
                width: 16,
            },
            batch: 2,
            context: 12,
            recall_batch: 4,
            recall_context: 64,
            pairs: 4,
            recall_vocabulary: 32,
            recall_convolution: 3,
            validation: 8,
        }
    }

    fn run(plan: &Plan, settings: &[&Setting], dir: &Path) -> anyhow::Result<(Sweep, Vec<String>)> {
        let mut notes = Vec::new();
        let flag = Arc::new(AtomicBool::new(false));
        let place = Place {
            out: &dir.join("out"),
            device: &Device::Cpu,
            interrupt: &flag,
        };
        let sweep = sweep(plan, settings, place, &mut |told| {
            if let Told::Note(line) = told {
                notes.push(line);
            }
        })?;
        Ok((sweep, notes))
    }

    /// All settings train on both tasks, and what is there is passed over.
    #[test]
    fn every_setting_gets_a_row_once() {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(folder.path());
        let settings: Vec<&Setting> = SETTINGS.iter().collect();
        let (first, _) = run(&plan, &settings[..3], folder.path()).unwrap();
        assert!(first.finished && first.rows.len() == 3);
        let (all, notes) = run(&plan, &settings, folder.path()).unwrap();
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert_eq!(all.rows.len(), SETTINGS.len());
        for (row, setting) in all.rows.iter().zip(SETTINGS) {
            assert_eq!(row.name, setting.name);
            let figures = [row.loss, row.recall_loss, row.recall_accuracy];
            assert!(figures.iter().all(Option::is_some), "{row:?}");
        }
        let table = fs::read_to_string(folder.path().join("out/table.md")).unwrap();
        assert_eq!(table.lines().count(), 2 + SETTINGS.len());
        assert!(table.contains("| mamba |"));
        let mut other = plan;
        other.budget.steps = 3;
        let line = run(&other, &settings, folder.path()).unwrap_err().to_string();
        assert!(line.contains("other options"), "{line}");
    }

    /// The default sizes stay within three million parameters, and no two settings are the same model.
    #[test]
    fn settings_are_small_and_differ() {
        let folder = tempfile::tempdir().unwrap();
        let mut plan = Plan {
            recall_vocabulary: 1024,
            ..plan(folder.path())
        };
        (plan.budget.layers, plan.budget.width) = (4, 128);
        let mut seen: Vec<(String, Table)> = Vec::new();
        for setting in SETTINGS {
            for recipe in plan.recipes(setting, folder.path()).unwrap() {
                let count = tasks::outline::needs(&recipe).unwrap().params.count();
                assert!(count <= 3_000_000, "{}: {count}", setting.name);
                let other = seen
                    .iter()
                    .find(|(task, own)| *task == recipe.task && *own == recipe.own);
                assert!(other.is_none(), "{} twice", setting.name);
                seen.push((recipe.task, recipe.own));
            }
        }
        assert!(SETTINGS.len() >= 20);
    }
}
