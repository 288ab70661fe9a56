//! The runs of a study: which there are, how long they are, and their recipes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use toml::{Table, Value};

use super::account::Account;
use super::study::{Size, Study, repeats};
use crate::train::Recipe;
use crate::train::schedule::Shape;
use crate::train::tasks::outline;

/// What widths of gated linear units are rounded to where they make up for a mixer's weights.
const ROUND: u64 = 8;
/// The longest run, in steps.
const MOST_STEPS: f64 = 1e9;

/// A run of a study.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Name of its files.
    pub name: String,
    /// The architecture's name.
    pub architecture: String,
    /// The size, with the hidden width that it really has.
    pub size: Size,
    /// Seed of weights and data.
    pub seed: u64,
    /// What it counts.
    pub account: Account,
    /// How long the run is.
    pub length: Length,
    /// How long a trial of a learning rate is.
    pub trial: Length,
    /// Steps after which it is validated besides the last.
    pub validate_at: Vec<u64>,
    /// Tokens that there are to train on.
    pub corpus: u64,
}

/// How long a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// So many steps.
    Steps(u64),
    /// So many seconds.
    Seconds(f64),
}

impl Length {
    /// How much it is among lengths of its kind.
    #[must_use]
    pub fn amount(self) -> f64 {
        match self {
            Self::Steps(steps) => steps as f64,
            Self::Seconds(seconds) => seconds,
        }
    }
}

impl Planned {
    /// Learning rates to try; the one of the run if there is only one.
    #[must_use]
    pub fn rates(&self, study: &Study) -> Vec<f64> {
        study.rates.iter().map(|rate| rate * self.size.lr).collect()
    }

    /// Steps, or seconds, of the run and of all its trials.
    #[must_use]
    pub fn amount(&self, study: &Study) -> f64 {
        let trials = match study.rates.len() {
            1 => 0,
            trials => trials,
        };
        self.length.amount() + self.trial.amount() * trials as f64
    }

    /// Steps of the run and of all its trials, where steps are given.
    #[must_use]
    pub fn steps(&self, study: &Study) -> Option<[u64; 2]> {
        match self.length {
            Length::Steps(steps) => Some([steps, self.amount(study) as u64]),
            Length::Seconds(_) => None,
        }
    }
}

impl Study {
    /// The recipe of a run in `dir` at the learning rate `lr`.
    ///
    /// # Errors
    /// Values that no recipe can have.
    pub(super) fn recipe(
        &self,
        run: &Settings<'_>,
        lr: f64,
        length: Length,
        validate_at: &[u64],
        dir: &Path,
    ) -> anyhow::Result<Recipe> {
        let Settings {
            architecture,
            size,
            seed,
        } = *run;
        let mut model = Table::new();
        model.insert("architecture".into(), architecture.into());
        for (name, value) in [
            ("layers", size.layers),
            ("width", size.width),
            ("heads", size.heads),
            ("hidden", size.hidden),
            ("vocabulary", self.vocabulary),
        ] {
            model.insert(name.into(), integer(value as u64)?);
        }
        model.insert("tied".into(), self.tied.into());
        model.extend(self.models.get(architecture).cloned().unwrap_or_default());
        let mut own = Table::new();
        own.insert("tokens".into(), path_value(&self.tokens)?);
        if let Some(path) = &self.held_out_tokens {
            own.insert("held_out_tokens".into(), path_value(path)?);
        }
        own.insert("held_out".into(), self.held_out.into());
        for (name, value) in [
            ("batch", self.batch),
            ("context", self.context),
            ("validation", self.validation),
        ] {
            own.insert(name.into(), integer(value as u64)?);
        }
        own.insert("model".into(), Value::Table(model));
        let validate_at: anyhow::Result<Vec<Value>> = validate_at.iter().map(|&step| integer(step)).collect();
        let shape = match self.shape {
            Shape::Constant => "constant",
            Shape::Cosine => "cosine",
            Shape::Wsd => "wsd",
            Shape::InverseSqrt => "inverse-sqrt",
        };
        let (steps, seconds) = match length {
            Length::Steps(steps) => (steps, 0.0),
            Length::Seconds(seconds) => (0, seconds),
        };
        let log_every = match length {
            Length::Steps(steps) => (steps / 50).clamp(1, LOG_EVERY),
            Length::Seconds(_) => LOG_EVERY,
        };
        let sections = [
            (
                "train",
                vec![
                    ("max_steps", integer(steps)?),
                    ("max_seconds", Value::Float(seconds)),
                    ("ema", Value::Float(0.0)),
                    ("keep", Value::Integer(1)),
                    ("log_every", integer(log_every)?),
                    ("validate_at", Value::Array(validate_at?)),
                    ("keep_best", Value::Boolean(false)),
                ],
            ),
            (
                "optimiser",
                vec![
                    ("lr", Value::Float(lr)),
                    ("beta2", Value::Float(self.beta2)),
                    ("weight_decay", Value::Float(self.weight_decay)),
                    ("clip", Value::Float(self.clip)),
                ],
            ),
            (
                "schedule",
                vec![
                    ("shape", shape.into()),
                    ("warmup", integer(self.warmup)?),
                    ("floor", Value::Float(self.floor)),
                ],
            ),
        ];
        let mut table = Table::new();
        table.insert("task".into(), "lm".into());
        table.insert("seed".into(), integer(seed)?);
        for (name, values) in sections {
            let values = values.into_iter().map(|(key, value)| (key.to_owned(), value));
            table.insert(name.into(), Value::Table(values.collect()));
        }
        table.insert("lm".into(), Value::Table(own));
        let origin = format!("{architecture} of size {}", size.name);
        Ok(Recipe::check(table, origin, dir)?)
    }

    /// All runs, those of the smallest size first, and of one size in the order of architectures. Networks are looked at and
    /// none is built.
    ///
    /// # Errors
    /// A model that cannot be, tokens that cannot be counted, or a budget of no step.
    pub fn runs(&self) -> anyhow::Result<Vec<Planned>> {
        let corpus = self.corpus()?;
        let mut runs = Vec::new();
        for size in &self.sizes {
            let length = self.length(size, corpus)?;
            let (trial, validate_at) = match length {
                Length::Steps(steps) => (
                    Length::Steps(((steps as f64 * self.trial) as u64).max(1)),
                    self.validate_at(steps),
                ),
                Length::Seconds(seconds) => (Length::Seconds(seconds * self.trial), doublings()),
            };
            let mut target = None;
            for architecture in &self.architectures {
                let mut size = size.clone();
                let mut account = self.account(architecture, &size)?;
                if self.equal {
                    let target = *target.get_or_insert(account.weights);
                    size.hidden = matched(&account, &size, target).with_context(|| {
                        format!(
                            "equal: {architecture} of size {}: no such hidden width",
                            size.name
                        )
                    })?;
                    account = self.account(architecture, &size)?;
                }
                for &seed in &self.seeds {
                    let more = match seed == self.seeds[0] {
                        true => String::new(),
                        false => format!("-seed{seed}"),
                    };
                    runs.push(Planned {
                        name: format!("{architecture}-{}{more}", size.name),
                        architecture: architecture.clone(),
                        size: size.clone(),
                        seed,
                        account,
                        length,
                        trial,
                        validate_at: validate_at.clone(),
                        corpus,
                    });
                }
            }
        }
        let flops = |run: &Planned| run.account.flops;
        let first_of = |name: &str| {
            let own = runs.iter().filter(|run| run.size.name == name).map(flops);
            own.fold(f64::INFINITY, f64::min)
        };
        let keys: BTreeMap<String, f64> = self
            .sizes
            .iter()
            .map(|size| (size.name.clone(), first_of(&size.name)))
            .collect();
        runs.sort_by(|a, b| keys[&a.size.name].total_cmp(&keys[&b.size.name]));
        let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        if repeats(&names) {
            bail!("architectures, sizes: two runs would have the same files");
        }
        Ok(runs)
    }

    fn length(&self, size: &Size, corpus: u64) -> anyhow::Result<Length> {
        if self.seconds > 0.0 {
            return Ok(Length::Seconds(self.seconds));
        }
        let budget = match self.budget {
            0 => size.epochs.unwrap_or(self.epochs) * corpus as f64,
            budget => budget as f64,
        };
        let per_step = self.batch as f64 * self.context as f64;
        let steps = (budget / per_step).floor();
        if !(2.0..=MOST_STEPS).contains(&steps) {
            bail!(
                "epochs, budget: found {steps} steps of {per_step} tokens, expected 2 to {MOST_STEPS}; {} has {corpus}",
                self.tokens.display()
            );
        }
        Ok(Length::Steps(steps as u64))
    }

    /// Steps of validations before the end.
    fn validate_at(&self, steps: u64) -> Vec<u64> {
        let first = (steps as f64 * self.first).max(1.0);
        let factor = steps as f64 / first;
        let point = |i: usize| first * factor.powf(i as f64 / (self.points - 1) as f64);
        let mut at: Vec<u64> = (0..self.points - 1).map(|i| point(i).round() as u64).collect();
        at.dedup();
        at.retain(|&step| step < steps);
        at
    }

    fn account(&self, architecture: &str, size: &Size) -> anyhow::Result<Account> {
        let run = Settings {
            architecture,
            size,
            seed: self.seeds[0],
        };
        let recipe = self.recipe(&run, size.lr, Length::Steps(1), &[], Path::new(""))?;
        let (config, params) = outline::language_model(&recipe).map_err(|error| {
            let words = error.to_string();
            let words = words.lines().next().unwrap_or_default();
            let words = words.trim_start_matches(&format!("{}: ", recipe.origin));
            anyhow::anyhow!("{}: {words}", recipe.origin)
        })?;
        Ok(Account::of(&config, &params.shapes(), self.context))
    }

    /// Tokens to train on, by the size of the file.
    pub(super) fn corpus(&self) -> anyhow::Result<u64> {
        let name = self.tokens.display();
        let bytes = std::fs::metadata(&self.tokens)
            .with_context(|| name.to_string())?
            .len();
        let ending = self.tokens.extension().unwrap_or_default();
        if ending == "jsonl" {
            bail!(
                "{name}: found documents, expected token ids (.u16) or text, whose number of tokens is known"
            );
        }
        let tokens = if ending == "u16" { bytes / 2 } else { bytes };
        Ok(match self.held_out_tokens {
            Some(_) => tokens,
            None => tokens - (tokens as f64 * self.held_out) as u64,
        })
    }

    /// What the results of a run depend on: the study without its other runs.
    pub(super) fn of_run(&self, run: &Planned) -> Self {
        let mut own = self.clone();
        own.about = String::new();
        own.equal = false;
        own.architectures = vec![run.architecture.clone()];
        own.sizes = vec![run.size.clone()];
        own.seeds = vec![run.seed];
        own.models.retain(|name, _| *name == run.architecture);
        own
    }
}

/// Steps of validations of a run whose number of steps is not known.
fn doublings() -> Vec<u64> {
    (5..30).map(|power| 1 << power).collect()
}

/// Steps between two log lines at most.
const LOG_EVERY: u64 = 20;

/// What tells one run from another.
#[derive(Clone, Copy)]
pub(super) struct Settings<'a> {
    pub(super) architecture: &'a str,
    pub(super) size: &'a Size,
    pub(super) seed: u64,
}

impl<'a> From<&'a Planned> for Settings<'a> {
    fn from(run: &'a Planned) -> Self {
        Self {
            architecture: &run.architecture,
            size: &run.size,
            seed: run.seed,
        }
    }
}

/// The hidden width with which layers have nearest to `target` weights.
fn matched(account: &Account, size: &Size, target: u64) -> Option<usize> {
    let a_unit = 3 * (size.layers * size.width) as u64;
    let others = account.weights.checked_sub(a_unit * size.hidden as u64)?;
    let hidden = (target.checked_sub(others)? as f64 / (a_unit * ROUND) as f64).round() as u64 * ROUND;
    (hidden > 0).then_some(hidden as usize)
}

fn integer(value: u64) -> anyhow::Result<Value> {
    let value = i64::try_from(value).with_context(|| format!("{value} is beyond all numbers of a recipe"))?;
    Ok(Value::Integer(value))
}

fn path_value(path: &Path) -> anyhow::Result<Value> {
    let text = path.to_str();
    Ok(text
        .with_context(|| format!("{}: a name that is not UTF-8", path.display()))?
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A study of the repository, with tokens that are there.
    fn committed(name: &str, tokens: &Path) -> Study {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(name);
        let study = Study::load(&path).unwrap();
        let file = tokens.join("train.u16");
        std::fs::File::create(&file).unwrap().set_len(50_000_000).unwrap();
        Study {
            tokens: file,
            ..study
        }
    }

    #[test]
    fn the_study_of_scaling_has_the_sizes_it_names() {
        let folder = tempfile::tempdir().unwrap();
        let runs = committed("scaling.toml", folder.path()).runs().unwrap();
        assert_eq!(runs.len(), 7 * 4);
        let llama: Vec<f64> = runs
            .iter()
            .filter(|run| run.architecture == "llama")
            .map(|run| run.account.weights as f64 / 1e6)
            .collect();
        assert!(llama.is_sorted() && (0.3..0.4).contains(&llama[2]) && (9.5..10.5).contains(&llama[6]));
        for run in &runs {
            let tokens = match run.length {
                Length::Steps(steps) => steps * 16 * 512,
                Length::Seconds(_) => panic!("{run:?}"),
            };
            let longer = ["0.3M", "0.8M", "1.8M"].contains(&run.size.name.as_str());
            let epochs = if longer { 4 } else { 2 };
            assert!(tokens <= epochs * run.corpus && tokens > epochs * run.corpus - 16 * 512);
            assert_eq!(run.validate_at.len(), 35);
            assert!(run.validate_at.is_sorted() && run.size.width.is_multiple_of(16 * run.size.heads));
            // The table's 12 L d^2 with widths of units to a multiple of 8.
            let whole = 12 * run.size.layers * run.size.width.pow(2);
            assert!(
                (run.account.weights as f64 / whole as f64 - 1.0).abs() < 0.2,
                "{run:?}"
            );
        }
    }

    #[test]
    fn equal_studies_have_equal_weights() {
        let folder = tempfile::tempdir().unwrap();
        for (name, count) in [
            ("architectures.toml", 6),
            ("masked.toml", 2),
            ("masked-long.toml", 2),
        ] {
            let runs = committed(name, folder.path()).runs().unwrap();
            assert_eq!(runs.len(), count);
            for run in &runs {
                let ratio = run.account.weights as f64 / runs[0].account.weights as f64;
                assert!((ratio - 1.0).abs() < 0.005, "{}: {ratio}", run.name);
            }
        }
        let runs = committed("architectures.toml", folder.path()).runs().unwrap();
        assert_eq!(runs[0].architecture, "llama");
        assert!((28e6..31e6).contains(&(runs[0].account.parameters as f64)));
        let timed = committed("masked.toml", folder.path()).runs().unwrap();
        assert_eq!(
            (timed[0].length, timed[0].trial),
            (Length::Seconds(120.0), Length::Seconds(12.0))
        );
        assert_eq!(timed[0].validate_at[..3], [32, 64, 128]);
    }

    #[test]
    fn validations_are_at_equal_factors() {
        let study = Study {
            points: 5,
            first: 0.01,
            ..Study::default()
        };
        assert_eq!(study.validate_at(10_000), [100, 316, 1000, 3162]);
        // Where steps are fewer than points, each is one.
        let study = Study { points: 40, ..study };
        assert_eq!(study.validate_at(5), [1, 2, 3, 4]);
    }
}
