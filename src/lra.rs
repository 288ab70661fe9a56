//! Sweeps over long sequences: architectures of equal size, each in the ways that its layers can go through the tokens, are trained with the
//! same budget on tasks of the Long Range Arena (arXiv 2011.04006), and one table says how well.
//!
//! Runs and results are kept by task and setting, so that a sweep goes on where it stopped.

mod settings;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fulgur_datasets::long_range::ListOps;
use fulgur_lightnet::lm::Architecture;
use serde::{Deserialize, Serialize};
use toml::Value;

use crate::sweep::{self, Run, Work, cell, integer, sizes};
pub use crate::sweep::{Budget, Place, Results, Told};
use crate::train::Recipe;
use crate::train::tasks::lra::data::Arena;
pub use settings::{SETTINGS, Setting};

/// Hidden widths are multiples of this: products of other widths are slow on a GPU.
const GRAIN: usize = 8;

/// The budget that all settings share.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Plan {
    /// Steps, seed, learning rate and size.
    #[serde(flatten)]
    pub budget: Budget,
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

impl sweep::Row for Row {
    const KEY: &'static str = "rows";
    const COLUMNS: &'static [&'static str] = &[
        "task",
        "setting",
        "parameters",
        "accuracy %",
        "loss",
        "n",
        "samples/s",
    ];

    fn cells(&self) -> Vec<String> {
        let accuracy = self.accuracy.zip(self.standard_error);
        vec![
            self.task.clone(),
            self.setting.clone(),
            self.parameters.to_string(),
            cell(accuracy, |(share, error)| {
                format!("{:.2} ± {:.2}", 100.0 * share, 100.0 * error)
            }),
            cell(self.loss, |loss| format!("{loss:.4}")),
            self.n.to_string(),
            format!("{:.0}", self.samples_per_s),
        ]
    }
}

/// The whole table.
pub type Sweep = sweep::Sweep<Plan, Row>;

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
        let rank = self.budget.width / self.heads.max(1);
        let less = (2 * rank + 3 * GRAIN / 2) / (3 * GRAIN) * GRAIN;
        self.hidden.saturating_sub(less).max(1)
    }

    /// The recipe of a setting on a task.
    ///
    /// # Errors
    /// Values that no recipe can have.
    fn recipe(&self, subject: Subject, setting: &Setting, dir: &Path) -> anyhow::Result<Recipe> {
        let mut model = self.budget.model(&[
            ("hidden", self.hidden(setting.architecture)),
            ("heads", self.heads),
        ])?;
        model.insert("architecture".into(), setting.architecture.name().into());
        // Weights that keep the variance of what they are given: small models learn slowly from those of large ones.
        let init = (self.budget.width.max(1) as f64).powf(-0.5);
        model.insert("init".into(), Value::Float(init));
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
        self.budget
            .recipe("lra", own, format!("setting {}", setting.name), dir)
    }
}

/// Trains `settings` on `subjects` in order, and writes `table.md` and `table.json` into the folder after each run. Those whose results are there
/// already are passed over; a run that was interrupted goes on.
///
/// # Errors
/// Results of another plan lie in the folder, a run fails, or it cannot be written.
pub fn sweep(
    plan: &Plan,
    subjects: &[Subject],
    settings: &[&Setting],
    place: Place<'_>,
    tell: &mut dyn FnMut(Told),
) -> anyhow::Result<Sweep> {
    let runs: Vec<Run<(Subject, &Setting)>> = subjects
        .iter()
        .flat_map(|&subject| settings.iter().map(move |&setting| (subject, setting)))
        .filter(|(subject, setting)| subject.takes(setting))
        .map(|(subject, setting)| Run {
            name: format!("{} {}", subject.name(), setting.name),
            dir: place.out.join(subject.name()).join(setting.name),
            steps: plan.budget.steps,
            of: (subject, setting),
        })
        .collect();
    Sweep::of(plan, &runs, place, tell, |run, work| one(plan, run, work))
}

/// Trains a setting on a task; none where it was interrupted.
fn one(plan: &Plan, run: &Run<(Subject, &Setting)>, work: &mut Work<'_>) -> anyhow::Result<Option<Row>> {
    let (subject, setting) = run.of;
    let recipe = plan.recipe(subject, setting, &run.dir)?;
    let Some(trained) = work.train(&recipe, &run.name)? else {
        return Ok(None);
    };
    let (accuracy, n) = (trained.figure("accuracy"), subject.0.held_out(plan.validation));
    Ok(Some(Row {
        task: subject.name().to_owned(),
        setting: setting.name.to_owned(),
        parameters: trained.parameters,
        accuracy,
        standard_error: accuracy.map(|share| standard_error(share, n)),
        n,
        loss: trained.figure("loss"),
        samples_per_s: trained.samples_per_s,
    }))
}

/// Of a share of `n` draws: `sqrt(p (1 - p) / n)`.
fn standard_error(share: f64, n: usize) -> f64 {
    (share * (1.0 - share) / n.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use candle_core::Device;

    use super::*;
    use crate::train::tasks;

    fn plan() -> Plan {
        Plan {
            budget: Budget {
                steps: 2,
                seed: 1,
                lr: 1e-3,
                layers: 1,
                width: 16,
            },
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
        let place = Place {
            out,
            device: &Device::Cpu,
            interrupt: &flag,
        };
        let sweep = sweep(plan, &subjects, settings, place, &mut |told| {
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
        let mut other = plan();
        other.budget.steps = 3;
        let line = run(&other, &settings, &out).unwrap_err().to_string();
        assert!(line.contains("other options"), "{line}");
    }

    /// Parameters differ by less than 2 %, whatever the sizes.
    #[test]
    fn settings_are_equally_large() {
        for (width, hidden, heads, layers) in [(128, 256, 4, 4), (256, 512, 8, 6), (64, 128, 2, 5)] {
            let mut plan = Plan {
                hidden,
                heads,
                ..plan()
            };
            (plan.budget.layers, plan.budget.width) = (layers, width);
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
