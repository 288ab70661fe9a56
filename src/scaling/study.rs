//! What a study trains: a TOML file of sizes, architectures, data and budget.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fulgur_lightnet::params::file::read_bounded;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::account::Account;
use crate::train::Recipe;
use crate::train::schedule::Shape;
use crate::train::tasks::outline;

/// Larger files are no studies.
const LARGEST: u64 = 1 << 20;
/// What widths of gated linear units are rounded to where they make up for a mixer's weights.
const ROUND: u64 = 8;
/// Most runs of a study, and most points of a curve.
const MOST: usize = 10_000;
/// The longest run, in steps.
const MOST_STEPS: f64 = 1e9;

/// A study.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Study {
    /// What people should know about it.
    pub about: String,
    /// Tokens to train on: ids of two bytes where the name ends in `.u16`, else text, a byte a token.
    pub tokens: PathBuf,
    /// Tokens of the same kind that are held out; without them the last part of `tokens` is.
    pub held_out_tokens: Option<PathBuf>,
    /// That part.
    pub held_out: f64,
    /// Rows of the embedding; 0 for bytes.
    pub vocabulary: usize,
    /// Tokens of a window.
    pub context: usize,
    /// Windows of a step.
    pub batch: usize,
    /// Passes over the tokens that a run makes.
    pub epochs: f64,
    /// Tokens that a run sees, where that is given instead.
    pub budget: u64,
    /// Seconds that a run trains, where that is given instead: for architectures that differ in speed.
    pub seconds: f64,
    /// Steps of warm-up.
    pub warmup: u64,
    /// The learning rate after warm-up.
    pub shape: Shape,
    /// Where it ends, as a part of the full rate, if it falls.
    pub floor: f64,
    /// The second moment's memory of AdamW.
    pub beta2: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Largest norm of all gradients together.
    pub clip: f64,
    /// Validations along a run, at equal factors of compute; of one that is limited in seconds after 32, 64, 128, .. steps.
    pub points: usize,
    /// Part of the run after which the first one is.
    pub first: f64,
    /// Held-out windows of a validation at most.
    pub validation: usize,
    /// One run for each.
    pub seeds: Vec<u64>,
    /// Factors of a size's learning rate; where there are several, each is tried first.
    pub rates: Vec<f64>,
    /// Part of the budget that a trial of a rate gets.
    pub trial: f64,
    /// Whether heads are embeddings.
    pub tied: bool,
    /// Whether gated linear units are made wider or narrower, by multiples of 8, until layers have as many weights as those
    /// of the first architecture.
    pub equal: bool,
    /// Architectures, or names of `models`.
    pub architectures: Vec<String>,
    /// Sizes.
    pub sizes: Vec<Size>,
    /// What models of a name have besides, as `[lm.model]` of a recipe: `architecture` where that is not the name.
    pub models: BTreeMap<String, Table>,
}

/// The size of a model.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    /// Its name.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// Model width.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Hidden width of gated linear units.
    pub hidden: usize,
    /// The learning rate.
    pub lr: f64,
}

impl Default for Study {
    fn default() -> Self {
        Self {
            about: String::new(),
            tokens: PathBuf::new(),
            held_out_tokens: None,
            held_out: 0.01,
            vocabulary: 0,
            context: 512,
            batch: 32,
            epochs: 0.0,
            budget: 0,
            seconds: 0.0,
            warmup: 100,
            shape: Shape::Constant,
            floor: 0.1,
            beta2: 0.95,
            weight_decay: 0.1,
            clip: 1.0,
            points: 40,
            first: 0.01,
            validation: 512,
            seeds: vec![1],
            rates: vec![1.0],
            trial: 0.1,
            tied: true,
            equal: false,
            architectures: Vec::new(),
            sizes: Vec::new(),
            models: BTreeMap::new(),
        }
    }
}

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
    /// Reads a study.
    ///
    /// # Errors
    /// The file is unreadable or no TOML, a key is unknown or missing, or a value is out of range.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        let bytes = read_bounded(path, LARGEST)?;
        let text = String::from_utf8(bytes)
            .ok()
            .with_context(|| format!("{name}: not UTF-8 text"))?;
        let study: Self = toml::from_str(&text).map_err(|error| {
            let line = error
                .span()
                .and_then(|span| text.get(..span.start))
                .map(|before| format!("line {}: ", before.matches('\n').count() + 1));
            let message = error.message().replace('\n', ", ");
            anyhow::anyhow!("{name}: {}{message}", line.unwrap_or_default())
        })?;
        study.check().with_context(|| name.to_string())?;
        Ok(study)
    }

    fn check(&self) -> anyhow::Result<()> {
        let share = |value: f64| value > 0.0 && value < 1.0;
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let all = |values: &[f64], holds: fn(f64) -> bool| values.iter().all(|&value| holds(value));
        let rules = [
            (
                !self.tokens.as_os_str().is_empty(),
                "tokens",
                "nothing".to_owned(),
                "a file of tokens",
            ),
            (
                self.held_out_tokens.is_some() || share(self.held_out),
                "held_out",
                self.held_out.to_string(),
                "above 0 and below 1, or held_out_tokens",
            ),
            (self.context > 0, "context", self.context.to_string(), "1 or more"),
            (self.batch > 0, "batch", self.batch.to_string(), "1 or more"),
            (
                [self.epochs, self.budget as f64, self.seconds].into_iter().filter(|&length| positive(length)).count() == 1
                    && [self.epochs, self.seconds].into_iter().all(|length| length == 0.0 || positive(length)),
                "epochs, budget, seconds",
                format!("{}, {} and {}", self.epochs, self.budget, self.seconds),
                "one of them above 0",
            ),
            (
                (0.0..=1.0).contains(&self.floor),
                "floor",
                self.floor.to_string(),
                "0 to 1",
            ),
            (
                (2..=MOST).contains(&self.points),
                "points",
                self.points.to_string(),
                "2 to 10000",
            ),
            (share(self.first), "first", self.first.to_string(), "above 0 and below 1"),
            (
                self.validation > 0,
                "validation",
                self.validation.to_string(),
                "1 or more",
            ),
            (share(self.trial), "trial", self.trial.to_string(), "above 0 and below 1"),
            (
                !self.rates.is_empty() && self.rates.len() <= MOST && all(&self.rates, |rate| rate > 0.0 && rate.is_finite()),
                "rates",
                format!("{:?}", self.rates),
                "factors above 0",
            ),
            (
                !self.seeds.is_empty() && !repeats(&self.seeds),
                "seeds",
                format!("{:?}", self.seeds),
                "at least one, each once",
            ),
            (
                !self.architectures.is_empty() && !repeats(&self.architectures),
                "architectures",
                format!("{:?}", self.architectures),
                "at least one, each once",
            ),
            (
                !self.sizes.is_empty() && self.sizes.len() <= MOST,
                "sizes",
                self.sizes.len().to_string(),
                "at least one table [[sizes]]",
            ),
        ];
        if let Some((_, field, found, expected)) = rules.into_iter().find(|(holds, ..)| !holds) {
            bail!("{field}: found {found}, expected {expected}");
        }
        let names: Vec<&str> = self.sizes.iter().map(|size| size.name.as_str()).collect();
        if repeats(&names) {
            bail!("sizes: found names {names:?}, expected each once");
        }
        let files = |name: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(fine)
        };
        let all = names.into_iter().chain(self.architectures.iter().map(String::as_str));
        if let Some(name) = all.into_iter().find(|name| !files(name)) {
            bail!("name {name:?}: expected letters, digits, - _ and . that a file may be called");
        }
        if let Some(name) = self.models.keys().find(|name| !self.architectures.contains(name)) {
            bail!("models.{name}: expected one of architectures, {:?}", self.architectures);
        }
        let runs = self.architectures.len() * self.sizes.len() * self.seeds.len();
        if runs > MOST {
            bail!("sizes: found {runs} runs, expected at most {MOST}");
        }
        Ok(())
    }

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
        let length = self.length(corpus)?;
        let (trial, validate_at) = match length {
            Length::Steps(steps) => (
                Length::Steps(((steps as f64 * self.trial) as u64).max(1)),
                self.validate_at(steps),
            ),
            Length::Seconds(seconds) => (Length::Seconds(seconds * self.trial), doublings()),
        };
        let mut runs = Vec::new();
        for size in &self.sizes {
            let mut target = None;
            for architecture in &self.architectures {
                let mut size = size.clone();
                let mut account = self.account(architecture, &size)?;
                if self.equal {
                    let target = *target.get_or_insert(account.weights);
                    size.hidden = matched(&account, &size, target).with_context(|| {
                        format!("equal: {architecture} of size {}: no such hidden width", size.name)
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

    fn length(&self, corpus: u64) -> anyhow::Result<Length> {
        if self.seconds > 0.0 {
            return Ok(Length::Seconds(self.seconds));
        }
        let budget = match self.budget {
            0 => self.epochs * corpus as f64,
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
            bail!("{name}: found documents, expected token ids (.u16) or text, whose number of tokens is known");
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

fn repeats<T: PartialEq>(values: &[T]) -> bool {
    values
        .iter()
        .enumerate()
        .any(|(i, value)| values[..i].contains(value))
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
