//! Sweeps of the EOS layer (arXiv 2405.17383, section 6): every setting is trained with the same budget on a text and on
//! associative recall, and one table says how well.
//!
//! A setting is a small language model that differs from the first one, all from data with gates of rows, in what its name
//! says. Runs and results are kept by setting, so that a sweep goes on where it stopped.

mod settings;

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context as _, bail};
use candle_core::Device;
use fulgur_datasets::atomic::write_atomic;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub use crate::sweep::Told;
use crate::sweep::{self, Budget, integer, sizes, write_json};
use crate::train::{self, Options, Recipe, Report, tasks};
pub use settings::{SETTINGS, Setting};

/// The budget that all settings share.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// The text, or tokens as the task `lm` takes them.
    pub data: PathBuf,
    /// Rows of the embedding for it; 0 for bytes.
    pub vocabulary: usize,
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

/// A row with the plan that it was made by, as it is kept.
#[derive(Deserialize, Serialize)]
struct Kept {
    plan: Plan,
    row: Row,
}

/// The whole table.
#[derive(Clone, Debug, Serialize)]
pub struct Sweep {
    /// The budget.
    pub plan: Plan,
    /// One row a setting that is done, in the order asked for.
    pub settings: Vec<Row>,
    /// Whether all of them are.
    pub finished: bool,
}

impl Plan {
    /// The recipes of a setting: of text and of recall.
    ///
    /// # Errors
    /// A setting that is no table, or values that no recipe can have.
    fn recipes(&self, setting: &Setting, dir: &Path) -> anyhow::Result<[Recipe; 2]> {
        let model = |vocabulary: usize| -> anyhow::Result<Table> {
            let mut model: Table = setting
                .model
                .parse()
                .with_context(|| format!("setting {}", setting.name))?;
            let sizes = [
                ("layers", self.layers),
                ("width", self.width),
                ("hidden", self.width * 2),
                ("heads", 1),
                ("vocabulary", vocabulary),
            ];
            model.insert("architecture".into(), "eos".into());
            for (name, size) in sizes {
                model.insert(name.into(), integer(size as u64)?);
            }
            model.entry("head_width").or_insert(Value::Integer(BASE_ROWS));
            Ok(model)
        };
        let recipe = |task: &str, own: Table| -> anyhow::Result<Recipe> {
            let budget = Budget {
                steps: self.steps,
                lr: self.lr,
                seed: self.seed,
            };
            budget.recipe(task, own, format!("setting {}", setting.name), &dir.join(task))
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
        text.insert("model".into(), Value::Table(model(self.vocabulary)?));
        let mut recall = sizes(&[
            ("batch", self.recall_batch),
            ("context", self.recall_context),
            ("pairs", self.pairs),
            ("vocabulary", self.recall_vocabulary),
            ("validation", self.validation),
        ])?;
        recall.insert("model".into(), Value::Table(model(0)?));
        Ok([recipe("lm", text)?, recipe("recall", recall)?])
    }
}

/// Rows of the memory where a setting does not name them.
const BASE_ROWS: i64 = 16;
/// Share of the text that is held out.
const HELD_OUT: f64 = 0.05;

/// Trains `settings` in order, and writes `table.md` and `table.json` into `out` after each. Those whose results are there
/// already are passed over; a run that was interrupted goes on.
///
/// # Errors
/// Results of another plan lie in `out`, a run fails, or the folder cannot be written.
pub fn sweep(
    plan: &Plan,
    settings: &[&Setting],
    out: &Path,
    device: &Device,
    interrupt: &Arc<AtomicBool>,
    mut tell: impl FnMut(Told),
) -> anyhow::Result<Sweep> {
    let mut sweep = Sweep {
        plan: plan.clone(),
        settings: Vec::new(),
        finished: false,
    };
    let all = 2 * plan.steps * settings.len() as u64;
    // Results of another plan should be heard of before the first run.
    let known: Vec<Option<Row>> = settings
        .iter()
        .map(|setting| kept(&result_path(out, setting), plan))
        .collect::<anyhow::Result<_>>()?;
    for (index, (setting, known)) in settings.iter().zip(known).enumerate() {
        if let Some(row) = known {
            tell(Told::Note(format!("{}: there already", setting.name)));
            sweep.settings.push(row);
            continue;
        }
        let dir = out.join(setting.name);
        let mut row = Row {
            name: setting.name.to_owned(),
            parameters: 0,
            loss: None,
            recall_loss: None,
            recall_accuracy: None,
        };
        for (part, recipe) in plan.recipes(setting, &dir)?.iter().enumerate() {
            let task = tasks::build(tasks::TASKS, recipe, device, interrupt)?;
            let options = Options {
                resume: true,
                interrupt: Arc::clone(interrupt),
                ..Options::default()
            };
            let done = (2 * index + part) as u64 * plan.steps;
            let outcome = train::run(&*task, recipe, &options, |report| match report {
                Report::Note(line) => tell(Told::Note(format!("{}: {line}", setting.name))),
                Report::Progress { step, loss, .. } => {
                    let label = format!("{} {}, loss {loss:.3}", setting.name, recipe.task);
                    tell(Told::Progress(done + step, all, label));
                }
            })?;
            if !outcome.finished {
                write(&sweep, out)?;
                return Ok(sweep);
            }
            let figures = task.validate().map_err(|e| {
                anyhow::anyhow!("setting {}: validation of {}: {e}", setting.name, recipe.task)
            })?;
            let figure = |name: &str| {
                let found = figures.iter().find(|(known, _)| known == name);
                found.map(|(_, value)| *value).filter(|value| value.is_finite())
            };
            if part == 0 {
                row.parameters = task.params().count();
                row.loss = figure("loss");
            } else {
                (row.recall_loss, row.recall_accuracy) = (figure("loss"), figure("accuracy"));
            }
        }
        let kept = Kept {
            plan: plan.clone(),
            row,
        };
        write_json(&result_path(out, setting), &kept)?;
        sweep.settings.push(kept.row);
        write(&sweep, out)?;
    }
    sweep.finished = true;
    write(&sweep, out)?;
    Ok(sweep)
}

fn result_path(out: &Path, setting: &Setting) -> PathBuf {
    out.join(setting.name).join("result.json")
}

/// The result that lies there, if any.
fn kept(path: &Path, plan: &Plan) -> anyhow::Result<Option<Row>> {
    let kept: Option<Kept> = sweep::read_json(path)?;
    match kept {
        Some(kept) if kept.plan != *plan => Err(sweep::other_plan(path)),
        kept => Ok(kept.map(|kept| kept.row)),
    }
}

fn write(sweep: &Sweep, out: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    write_json(&out.join("table.json"), sweep)?;
    let table = sweep.table();
    write_atomic(&out.join("table.md"), |file| file.write_all(table.as_bytes()))?;
    Ok(())
}

impl Sweep {
    /// The table in Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| setting | parameters | held-out loss | perplexity | recall loss | recall accuracy |\n|---|---|---|---|---|---|\n",
        );
        let cell = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
        for row in &self.settings {
            // Writing to a string does not fail.
            writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} |",
                row.name,
                row.parameters,
                cell(row.loss),
                cell(row.loss.map(f64::exp).filter(|value| value.is_finite())),
                cell(row.recall_loss),
                cell(row.recall_accuracy),
            )
            .ok();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: &Path) -> Plan {
        let data = dir.join("text.txt");
        fs::write(&data, "one two three four ".repeat(60)).unwrap();
        Plan {
            data,
            vocabulary: 0,
            steps: 2,
            seed: 1,
            lr: 1e-3,
            layers: 1,
            width: 16,
            batch: 2,
            context: 12,
            recall_batch: 4,
            recall_context: 64,
            pairs: 4,
            recall_vocabulary: 32,
            validation: 8,
        }
    }

    fn run(plan: &Plan, settings: &[&Setting], dir: &Path) -> anyhow::Result<(Sweep, Vec<String>)> {
        let mut notes = Vec::new();
        let flag = Arc::new(AtomicBool::new(false));
        let sweep = sweep(plan, settings, &dir.join("out"), &Device::Cpu, &flag, |told| {
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
        assert!(first.finished && first.settings.len() == 3);
        let (all, notes) = run(&plan, &settings, folder.path()).unwrap();
        assert_eq!(notes.len(), 3, "{notes:?}");
        assert_eq!(all.settings.len(), SETTINGS.len());
        for (row, setting) in all.settings.iter().zip(SETTINGS) {
            assert_eq!(row.name, setting.name);
            let figures = [row.loss, row.recall_loss, row.recall_accuracy];
            assert!(figures.iter().all(Option::is_some), "{row:?}");
        }
        let table = fs::read_to_string(folder.path().join("out/table.md")).unwrap();
        assert_eq!(table.lines().count(), 2 + SETTINGS.len());
        assert!(table.contains("| mamba |"));
        let other = Plan { steps: 3, ..plan };
        let line = run(&other, &settings, folder.path()).unwrap_err().to_string();
        assert!(line.contains("other options"), "{line}");
    }

    /// The default sizes stay within three million parameters, and no two settings are the same model.
    #[test]
    fn settings_are_small_and_differ() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan {
            layers: 4,
            width: 128,
            recall_vocabulary: 1024,
            ..plan(folder.path())
        };
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
