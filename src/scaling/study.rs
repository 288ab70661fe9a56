//! What a study trains: a TOML file of sizes, architectures, data and budget.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fulgur_lightnet::params::file::read_bounded;
use serde::{Deserialize, Serialize};
use toml::Table;

use crate::train::schedule::Shape;

/// Larger files are no studies.
const LARGEST: u64 = 1 << 20;
/// Most runs of a study, and most points of a curve.
const MOST: usize = 10_000;

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
    /// Passes over the tokens of this size, instead of the study's `epochs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<f64>,
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
                [self.epochs, self.budget as f64, self.seconds]
                    .into_iter()
                    .filter(|&length| positive(length))
                    .count()
                    == 1
                    && [self.epochs, self.seconds]
                        .into_iter()
                        .all(|length| length == 0.0 || positive(length)),
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
            (
                share(self.first),
                "first",
                self.first.to_string(),
                "above 0 and below 1",
            ),
            (
                self.validation > 0,
                "validation",
                self.validation.to_string(),
                "1 or more",
            ),
            (
                share(self.trial),
                "trial",
                self.trial.to_string(),
                "above 0 and below 1",
            ),
            (
                !self.rates.is_empty()
                    && self.rates.len() <= MOST
                    && all(&self.rates, |rate| rate > 0.0 && rate.is_finite()),
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
        for Size { name, epochs, .. } in &self.sizes {
            if let Some(epochs) = epochs.filter(|&epochs| !positive(epochs) || self.epochs == 0.0) {
                bail!("sizes.{name}: found epochs {epochs}, expected above 0, in a study with epochs");
            }
        }
        let names: Vec<&str> = self.sizes.iter().map(|size| size.name.as_str()).collect();
        if repeats(&names) {
            bail!("sizes: found names {names:?}, expected each once");
        }
        let files = |name: &str| {
            let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !name.is_empty() && name.len() <= 64 && !name.starts_with('.') && name.chars().all(fine)
        };
        let all = names
            .into_iter()
            .chain(self.architectures.iter().map(String::as_str));
        if let Some(name) = all.into_iter().find(|name| !files(name)) {
            bail!("name {name:?}: expected letters, digits, - _ and . that a file may be called");
        }
        if let Some(name) = self.models.keys().find(|name| !self.architectures.contains(name)) {
            bail!(
                "models.{name}: expected one of architectures, {:?}",
                self.architectures
            );
        }
        let runs = self.architectures.len() * self.sizes.len() * self.seeds.len();
        if runs > MOST {
            bail!("sizes: found {runs} runs, expected at most {MOST}");
        }
        Ok(())
    }
}

/// Whether a value comes twice.
pub(super) fn repeats<T: PartialEq>(values: &[T]) -> bool {
    values
        .iter()
        .enumerate()
        .any(|(i, value)| values[..i].contains(value))
}
