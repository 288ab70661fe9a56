//! Sweeps over long sequences: architectures of equal size, each in the ways that its layers can go through the tokens, are trained with the
//! same budget on tasks of the Long Range Arena (arXiv 2011.04006), and one table says how well.
//!
//! Runs and results are kept by task and setting, so that a sweep goes on where it stopped.

mod settings;

use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use candle_core::Device;
use fulgur_datasets::atomic::write_atomic;
use fulgur_datasets::long_range::ListOps;
use fulgur_lightnet::lm::Architecture;
use serde::{Deserialize, Serialize};
use toml::Value;

pub use crate::sweep::Told;
use crate::sweep::{self, Budget, integer, sizes, write_json};
use crate::train::tasks::lra::data::Arena;
use crate::train::{self, Options, Recipe, Report, tasks};
pub use settings::{SETTINGS, Setting};

/// Hidden widths are multiples of this: products of other widths are slow on a GPU.
const GRAIN: usize = 8;

/// The budget that all settings share.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// Steps of each run.
    pub steps: u64,
    /// Seed of weights and of the order of data.
    pub seed: u64,
    /// Peak of the learning rate.
    pub lr: f64,
    /// Layers.
    pub layers: usize,
    /// Model width.
    pub width: usize,
    /// Hidden width of the gated linear units of models without a gate; models with one have less, to be as large.
    pub hidden: usize,
    /// Heads of keys and values.
    pub heads: usize,
    /// Sequences in a batch.
    pub batch: usize,
    /// Held-out sequences that are judged by; of a data set at most all of them.
    pub validation: usize,
    /// Drawn examples to train on: as many as published if absent, new ones without end if 0.
    pub examples: Option<u64>,
    /// Lengths and depths of expressions.
    pub listops: ListOps,
    /// Folder of prepared data sets.
    pub data: PathBuf,
}

/// How a setting did on a task.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Row {
    /// The task.
    pub task: String,
    /// The setting.
    pub setting: String,
    /// Parameters of its model.
    pub parameters: usize,
    /// Share of held-out sequences whose class is the likeliest.
    pub accuracy: Option<f64>,
    /// Binomial standard error of the accuracy.
    pub standard_error: Option<f64>,
    /// Held-out sequences.
    pub n: usize,
    /// Held-out loss, nats a sequence.
    pub loss: Option<f64>,
    /// Sequences a second in training, of the last session.
    pub samples_per_s: f64,
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
    /// One row a task and setting that is done.
    pub rows: Vec<Row>,
    /// Whether all of them are.
    pub finished: bool,
}

/// A task of the sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject(Arena);

impl Subject {
    /// All tasks.
    pub const ALL: [Self; 3] = [Self(Arena::ALL[0]), Self(Arena::ALL[1]), Self(Arena::ALL[2])];

    /// The task of this name.
    ///
    /// # Errors
    /// There is none, or it is one of the arena's that cannot be had, in a line.
    pub fn named(name: &str) -> Result<Self, String> {
        Arena::named(name).map(Self)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    /// Whether the setting can be trained on it: scans of rows and columns need pictures.
    pub fn takes(self, setting: &Setting) -> bool {
        self.0.grid().is_some() || !setting.form.needs_grid()
    }
}

impl Plan {
    /// Hidden width of a setting, so that all have nearly as many parameters: a low-rank gate of the output is paid for.
    fn hidden(&self, architecture: Architecture) -> usize {
        if !matches!(architecture, Architecture::Tnl | Architecture::Lightnet) {
            return self.hidden;
        }
        // 2 d D of the gate are as much as 2 D / 3 of 3 d for each hidden channel; the nearest multiple.
        let rank = self.width / self.heads.max(1);
        let less = (2 * rank + 3 * GRAIN / 2) / (3 * GRAIN) * GRAIN;
        self.hidden.saturating_sub(less).max(1)
    }

    /// The recipe of a setting on a task.
    ///
    /// # Errors
    /// Values that no recipe can have.
    fn recipe(&self, subject: Subject, setting: &Setting, dir: &Path) -> anyhow::Result<Recipe> {
        let mut model = sizes(&[
            ("layers", self.layers),
            ("width", self.width),
            ("hidden", self.hidden(setting.architecture)),
            ("heads", self.heads),
        ])?;
        model.insert("architecture".into(), setting.architecture.name().into());
        // Weights that keep the variance of what they are given: small models learn slowly from those of large ones.
        model.insert("init".into(), Value::Float((self.width.max(1) as f64).powf(-0.5)));
        let mut own = sizes(&[("batch", self.batch), ("validation", self.validation)])?;
        own.insert("task".into(), subject.name().into());
        own.insert("form".into(), setting.form.name().into());
        own.insert("listops".into(), Value::try_from(self.listops)?);
        let data = self
            .data
            .to_str()
            .with_context(|| format!("--data: {} is not UTF-8", self.data.display()))?;
        own.insert("data".into(), data.into());
        if let Some(examples) = self.examples
            && subject.0 != Arena::FashionMnist
        {
            own.insert("examples".into(), integer(examples)?);
        }
        own.insert("model".into(), Value::Table(model));
        let budget = Budget {
            steps: self.steps,
            lr: self.lr,
            seed: self.seed,
        };
        budget.recipe("lra", own, format!("setting {}", setting.name), dir)
    }
}

/// Trains `settings` on `subjects` in order, and writes `table.md` and `table.json` into `out` after each run. Those whose results are there already
/// are passed over; a run that was interrupted goes on.
///
/// # Errors
/// Results of another plan lie in `out`, a run fails, or the folder cannot be written.
pub fn sweep(
    plan: &Plan,
    subjects: &[Subject],
    settings: &[&Setting],
    out: &Path,
    device: &Device,
    interrupt: &Arc<AtomicBool>,
    mut tell: impl FnMut(Told),
) -> anyhow::Result<Sweep> {
    let mut sweep = Sweep {
        plan: plan.clone(),
        rows: Vec::new(),
        finished: false,
    };
    let runs: Vec<(Subject, &Setting)> = subjects
        .iter()
        .flat_map(|&subject| settings.iter().map(move |&setting| (subject, setting)))
        .filter(|(subject, setting)| subject.takes(setting))
        .collect();
    let all = plan.steps * runs.len() as u64;
    let dir = |(subject, setting): (Subject, &Setting)| out.join(subject.name()).join(setting.name);
    // Results of another plan should be heard of before the first run.
    let known: Vec<Option<Row>> = runs
        .iter()
        .map(|&run| kept(&dir(run).join("result.json"), plan))
        .collect::<anyhow::Result<_>>()?;
    for (index, (&run, known)) in runs.iter().zip(known).enumerate() {
        let (subject, setting) = run;
        let name = format!("{} {}", subject.name(), setting.name);
        if let Some(row) = known {
            tell(Told::Note(format!("{name}: there already")));
            sweep.rows.push(row);
            continue;
        }
        let recipe = plan.recipe(subject, setting, &dir(run))?;
        let task = tasks::build(tasks::TASKS, &recipe, device, interrupt)?;
        let options = Options {
            resume: true,
            interrupt: Arc::clone(interrupt),
            ..Options::default()
        };
        let done = index as u64 * plan.steps;
        let outcome = train::run(&*task, &recipe, &options, |report| match report {
            Report::Note(line) => tell(Told::Note(format!("{name}: {line}"))),
            Report::Progress {
                step,
                loss,
                samples_per_s,
                ..
            } => {
                let label = format!("{name}, loss {loss:.3}, {samples_per_s:.0} samples/s");
                tell(Told::Progress(done + step, all, label));
            }
        })?;
        if !outcome.finished {
            write(&sweep, out)?;
            return Ok(sweep);
        }
        let figures = task.validate().map_err(|e| {
            anyhow::anyhow!("setting {}: validation of {}: {e}", setting.name, subject.name())
        })?;
        let figure = |name: &str| {
            let found = figures.iter().find(|(known, _)| known == name);
            found.map(|(_, value)| *value).filter(|value| value.is_finite())
        };
        let (accuracy, n) = (figure("accuracy"), subject.0.held_out(plan.validation));
        let row = Row {
            task: subject.name().to_owned(),
            setting: setting.name.to_owned(),
            parameters: task.params().count(),
            accuracy,
            standard_error: accuracy.map(|share| standard_error(share, n)),
            n,
            loss: figure("loss"),
            samples_per_s: outcome.samples_per_s,
        };
        let kept = Kept {
            plan: plan.clone(),
            row,
        };
        write_json(&dir(run).join("result.json"), &kept)?;
        sweep.rows.push(kept.row);
        write(&sweep, out)?;
    }
    sweep.finished = true;
    write(&sweep, out)?;
    Ok(sweep)
}

/// Of a share of `n` draws: `sqrt(p (1 - p) / n)`.
fn standard_error(share: f64, n: usize) -> f64 {
    (share * (1.0 - share) / n.max(1) as f64).sqrt()
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
            "| task | setting | parameters | accuracy % | loss | n | samples/s |\n|---|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            let accuracy = match (row.accuracy, row.standard_error) {
                (Some(share), Some(error)) => format!("{:.2} ± {:.2}", 100.0 * share, 100.0 * error),
                _ => "-".to_owned(),
            };
            let loss = row.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
            // Writing to a string does not fail.
            writeln!(
                text,
                "| {} | {} | {} | {accuracy} | {loss} | {} | {:.0} |",
                row.task, row.setting, row.parameters, row.n, row.samples_per_s
            )
            .ok();
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan {
            steps: 2,
            seed: 1,
            lr: 1e-3,
            layers: 1,
            width: 16,
            hidden: 24,
            heads: 2,
            batch: 2,
            validation: 4,
            examples: Some(10),
            listops: ListOps {
                min_length: 4,
                max_length: 12,
                max_depth: 3,
                max_arguments: 4,
            },
            data: "data".into(),
        }
    }

    fn run(plan: &Plan, settings: &[&Setting], out: &Path) -> anyhow::Result<(Sweep, Vec<String>)> {
        let mut notes = Vec::new();
        let flag = Arc::new(AtomicBool::new(false));
        let subjects = [Subject(Arena::ListOps), Subject(Arena::Pathfinder)];
        let sweep = sweep(plan, &subjects, settings, out, &Device::Cpu, &flag, |told| {
            if let Told::Note(line) = told {
                notes.push(line);
            }
        })?;
        Ok((sweep, notes))
    }

    /// All settings train on both kinds of tasks, and what is there is passed over.
    #[test]
    fn every_setting_gets_its_rows_once() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let settings: Vec<&Setting> = SETTINGS.iter().collect();
        let (first, _) = run(&plan(), &settings[..4], &out).unwrap();
        assert!(first.finished && first.rows.len() == 3 + 4);
        let (all, notes) = run(&plan(), &settings, &out).unwrap();
        assert_eq!(notes.len(), 7, "{notes:?}");
        let of_lists = settings
            .iter()
            .filter(|setting| !setting.form.needs_grid())
            .count();
        assert_eq!(all.rows.len(), of_lists + settings.len());
        for row in &all.rows {
            let error = row.standard_error.unwrap();
            let share = row.accuracy.unwrap();
            assert!(row.loss.is_some() && row.n == 4 && row.parameters > 0, "{row:?}");
            assert!((error * error * 4.0 - share * (1.0 - share)).abs() < 1e-12);
        }
        let table = fs::read_to_string(out.join("table.md")).unwrap();
        assert_eq!(table.lines().count(), 2 + all.rows.len());
        assert!(table.contains("| pathfinder | hgrn2-series-2d |"), "{table}");
        let other = Plan { steps: 3, ..plan() };
        let line = run(&other, &settings, &out).unwrap_err().to_string();
        assert!(line.contains("other options"), "{line}");
    }

    /// Parameters differ by less than 2 %, whatever the sizes.
    #[test]
    fn settings_are_equally_large() {
        for (width, hidden, heads, layers) in [(128, 256, 4, 4), (256, 512, 8, 6), (64, 128, 2, 5)] {
            let plan = Plan {
                layers,
                width,
                hidden,
                heads,
                ..plan()
            };
            let counts: Vec<u64> = SETTINGS
                .iter()
                .map(|setting| {
                    let recipe = plan
                        .recipe(Subject(Arena::Pathfinder), setting, Path::new("x"))
                        .unwrap();
                    tasks::outline::needs(&recipe).unwrap().params.count()
                })
                .collect();
            let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(*most as f64 / *least as f64 <= 1.02, "{counts:?}");
        }
    }
}
