//! Recipes: TOML files that say what is trained, on what, how long.
//!
//! ```toml
//! task = "codec"                  # a task of `train/tasks`
//! about = "..."                   # hardware, expected result, command
//! seed = 1
//! run_dir = "runs/codec"          # default: runs/ and the name of the recipe
//! [train]                         # how long and what to note down: see `Train`
//! [optimiser]                     # see `OptimiserConfig`
//! [schedule]                      # see `Schedule`
//! [distributed]                   # several ranks: see `Distributed`
//! [codec]                         # the task's own table, named after the task
//! ```
//!
//! Unknown keys are refused. `--set a.b=c` replaces or adds one value before the recipe is read.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use super::error::{TrainError, one_line};
use super::optimiser::OptimiserConfig;
use super::schedule::Schedule;
use crate::distributed::Distributed;

/// Larger files are no recipes.
const LARGEST: u64 = 1 << 20;

/// How long a run takes and what it notes down.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// A file of weights to start from, such as the `model.safetensors` of a finished run, instead of random ones.
    pub start: Option<PathBuf>,
    /// Steps of the run; 0 leaves it to `max_seconds`.
    pub max_steps: u64,
    /// Seconds of training over all sessions; 0 leaves it to `max_steps`. With both the first one reached ends the run,
    /// and the schedule follows whichever is further. A run that is timed does not resume bit for bit.
    pub max_seconds: f64,
    /// Batches a step; their gradients are averaged.
    pub accumulate: u64,
    /// Memory of the averaged weights; 0 keeps none.
    pub ema: f64,
    /// Threads that prepare batches; they change nothing but the speed.
    pub threads: usize,
    /// Steps between two log lines.
    pub log_every: u64,
    /// Steps between two validations; 0 validates at the end only.
    pub validate_every: u64,
    /// Steps after which there is a validation besides.
    pub validate_at: Vec<u64>,
    /// Whether the weights of the best validation are kept in a file.
    pub keep_best: bool,
    /// Steps between two sheets of samples; 0 samples at the end only.
    pub sample_every: u64,
    /// Seconds between two checkpoints.
    pub checkpoint_seconds: f64,
    /// Checkpoints kept.
    pub keep: usize,
    /// Store moments and averages in checkpoints in 16 bits: half the size, not bit for bit.
    pub compact: bool,
    /// Steps with infinite or undefined gradients that may follow one another before the run gives up.
    pub max_skips: u64,
}

impl Default for Train {
    fn default() -> Self {
        Self {
            start: None,
            max_steps: 0,
            max_seconds: 0.0,
            accumulate: 1,
            ema: 0.999,
            threads: 2,
            log_every: 20,
            validate_every: 0,
            validate_at: Vec::new(),
            keep_best: true,
            sample_every: 0,
            checkpoint_seconds: 300.0,
            keep: 2,
            compact: false,
            max_skips: 20,
        }
    }
}

/// A recipe that has been read and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Name of the task.
    pub task: String,
    /// Seed of weights and data order.
    pub seed: u64,
    /// Where the run is kept.
    pub run_dir: PathBuf,
    /// How long, and what is noted down.
    pub train: Train,
    /// The optimiser.
    pub optimiser: OptimiserConfig,
    /// The learning rate over time.
    pub schedule: Schedule,
    /// How several ranks share the work.
    pub distributed: Distributed,
    /// The task's own table.
    pub own: Table,
    /// Where the recipe came from, for errors.
    pub origin: String,
}

/// The keys that all recipes share.
#[derive(Deserialize)]
struct Shared {
    task: String,
    #[serde(default)]
    #[allow(dead_code, reason = "for people")]
    about: String,
    #[serde(default)]
    seed: u64,
    run_dir: Option<PathBuf>,
    #[serde(default)]
    train: Train,
    #[serde(default)]
    optimiser: OptimiserConfig,
    #[serde(default)]
    schedule: Schedule,
    #[serde(default)]
    distributed: Distributed,
}

const KEYS: [&str; 8] = [
    "task",
    "about",
    "seed",
    "run_dir",
    "train",
    "optimiser",
    "schedule",
    "distributed",
];

impl Recipe {
    /// Reads a recipe file and applies `--set` arguments in order.
    ///
    /// # Errors
    /// The file is unreadable or no TOML, a key is unknown or missing, or a value is out of range.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, TrainError> {
        let origin = path.display().to_string();
        let refuse = |reason: String| TrainError::Recipe {
            origin: origin.clone(),
            reason,
        };
        let bytes = fulgur_lightnet::params::file::read_bounded(path, LARGEST)?;
        let text = String::from_utf8(bytes).map_err(|_| refuse("not UTF-8 text".into()))?;
        let mut table: Table = text
            .parse()
            .map_err(|e: toml::de::Error| refuse(explain(&e, &text)))?;
        for argument in sets {
            set(&mut table, argument)?;
        }
        let stem = path.file_stem().unwrap_or_default();
        Self::check(table, origin, &Path::new("runs").join(stem))
    }

    /// Checks a recipe given as a table; errors call it `origin`, and the run goes to `run_dir` where it names none.
    ///
    /// # Errors
    /// A key is unknown or missing, or a value is out of range.
    pub fn check(mut table: Table, origin: String, run_dir: &Path) -> Result<Self, TrainError> {
        let refuse = |reason: String| TrainError::Recipe {
            origin: origin.clone(),
            reason,
        };
        let task = table
            .get("task")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_string();
        let own = match table.remove(&task) {
            None => Table::new(),
            Some(_) if KEYS.contains(&task.as_str()) => return Err(refuse(format!("unknown task `{task}`"))),
            Some(Value::Table(own)) => own,
            Some(other) => {
                return Err(refuse(format!(
                    "`{task}` is a {}, expected a table",
                    other.type_str()
                )));
            }
        };
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let known = KEYS.join(", ");
            return Err(refuse(format!(
                "unknown key `{key}`, expected one of {known} and the table of the task `{task}`"
            )));
        }
        let shared: Shared = table
            .try_into()
            .map_err(|e: toml::de::Error| refuse(explain(&e, "")))?;
        let Shared {
            seed,
            train,
            optimiser,
            schedule,
            distributed,
            ..
        } = shared;
        let run_dir = shared.run_dir.unwrap_or_else(|| run_dir.to_path_buf());
        let recipe = Self {
            task: shared.task,
            seed,
            run_dir,
            train,
            optimiser,
            schedule,
            distributed,
            own,
            origin,
        };
        recipe.check_ranges()?;
        Ok(recipe)
    }

    /// The task's own table as the task's own type. What it leaves out, at any depth, is as in the type's default.
    ///
    /// # Errors
    /// A key is unknown or has another type.
    pub fn own<T: Default + DeserializeOwned + Serialize>(&self) -> Result<T, TrainError> {
        let refuse = |reason: String| TrainError::Recipe {
            origin: self.origin.clone(),
            reason,
        };
        let mut whole =
            Table::try_from(T::default()).map_err(|e| refuse(one_line(&e.to_string()).to_string()))?;
        let mut strange = Vec::new();
        merge(&mut whole, &self.own, &[], &mut strange);
        let told = |field: &Strange| refuse(field.words(&self.task));
        let value: T = whole.try_into().map_err(|e: toml::de::Error| {
            let refused =
                |field: &&Strange| e.message().starts_with(&format!("unknown field `{}`", field.key));
            let field = strange.iter().find(refused);
            field.map_or_else(|| refuse(format!("[{}]: {}", self.task, explain(&e, ""))), told)
        })?;
        // Optional fields are missing in the defaults; what the type does not know at all is missing in the value too.
        let taken = Table::try_from(&value).map_err(|e| refuse(one_line(&e.to_string()).to_string()))?;
        match strange.iter().find(|field| !field.is_in(&taken)) {
            None => Ok(value),
            Some(field) => Err(told(field)),
        }
    }

    /// The recipe with all its values, as TOML.
    pub fn resolved(&self) -> String {
        let mut table = Table::new();
        table.insert("task".into(), self.task.clone().into());
        // TOML integers are signed; larger seeds are refused by `check_ranges`.
        table.insert("seed".into(), (self.seed as i64).into());
        let mut section = |name: &str, value: Result<Value, toml::ser::Error>| {
            if let Ok(value) = value {
                table.insert(name.into(), value);
            }
        };
        section("train", Value::try_from(&self.train));
        section("optimiser", Value::try_from(&self.optimiser));
        section("schedule", Value::try_from(self.schedule));
        if self.distributed != Distributed::default() {
            section("distributed", Value::try_from(&self.distributed));
        }
        section(&self.task, Ok(Value::Table(self.own.clone())));
        table.to_string()
    }

    fn check_ranges(&self) -> Result<(), TrainError> {
        let Self {
            train,
            optimiser,
            schedule,
            ..
        } = self;
        let below_one = |x: f64| (0.0..1.0).contains(&x);
        let positive = |x: f64| x > 0.0 && x.is_finite();
        let rules = [
            (
                i64::try_from(self.seed).is_ok(),
                "seed",
                "at most 2^63 - 1",
                self.seed.to_string(),
            ),
            (
                train.max_seconds >= 0.0 && train.max_seconds.is_finite(),
                "train.max_seconds",
                "0 or more",
                train.max_seconds.to_string(),
            ),
            (
                train.max_steps > 0 || train.max_seconds > 0.0,
                "train",
                "max_steps or max_seconds",
                "neither".into(),
            ),
            (
                train.accumulate > 0,
                "train.accumulate",
                "1 or more",
                train.accumulate.to_string(),
            ),
            (
                train.log_every > 0,
                "train.log_every",
                "1 or more",
                train.log_every.to_string(),
            ),
            (
                below_one(train.ema),
                "train.ema",
                "0 or more and below 1",
                train.ema.to_string(),
            ),
            (
                positive(train.checkpoint_seconds),
                "train.checkpoint_seconds",
                "more than 0",
                train.checkpoint_seconds.to_string(),
            ),
            (
                positive(optimiser.lr),
                "optimiser.lr",
                "more than 0",
                optimiser.lr.to_string(),
            ),
            (
                below_one(optimiser.beta1),
                "optimiser.beta1",
                "0 or more and below 1",
                optimiser.beta1.to_string(),
            ),
            (
                below_one(optimiser.beta2),
                "optimiser.beta2",
                "0 or more and below 1",
                optimiser.beta2.to_string(),
            ),
            (
                positive(optimiser.eps),
                "optimiser.eps",
                "more than 0",
                optimiser.eps.to_string(),
            ),
            (
                optimiser.weight_decay >= 0.0 && optimiser.weight_decay.is_finite(),
                "optimiser.weight_decay",
                "0 or more",
                optimiser.weight_decay.to_string(),
            ),
            (
                positive(optimiser.muon_size),
                "optimiser.muon_size",
                "more than 0",
                optimiser.muon_size.to_string(),
            ),
            (
                optimiser.clip >= 0.0,
                "optimiser.clip",
                "0 or more",
                optimiser.clip.to_string(),
            ),
            (
                (0.0..=1.0).contains(&schedule.floor),
                "schedule.floor",
                "0 to 1",
                schedule.floor.to_string(),
            ),
            (
                (0.0..=1.0).contains(&schedule.decay),
                "schedule.decay",
                "0 to 1",
                schedule.decay.to_string(),
            ),
        ];
        let wrong = rules.into_iter().find(|(holds, ..)| !holds);
        let wrong = wrong.map(|(_, field, expected, found)| (field, found, expected.to_owned()));
        let compact = self.distributed.outer.is_some() && train.compact;
        let unfit = compact.then(|| {
            let expected = "false, as outer updates are not exact in 16 bits".to_owned();
            ("train.compact", "true".to_owned(), expected)
        });
        match wrong.or_else(|| self.distributed.wrong()).or(unfit) {
            None => Ok(()),
            Some((field, found, expected)) => Err(TrainError::Recipe {
                origin: self.origin.clone(),
                reason: format!("{field}: found {found}, expected {expected}"),
            }),
        }
    }
}

/// Applies one `a.b=c`; `c` is a TOML value, or a text where it is none.
pub(crate) fn set(table: &mut Table, argument: &str) -> Result<(), TrainError> {
    let refuse = |reason: &str| TrainError::Recipe {
        origin: format!("--set {argument}"),
        reason: reason.to_string(),
    };
    let (path, text) = argument
        .split_once('=')
        .ok_or_else(|| refuse("expected KEY=VALUE, as in train.max_steps=100"))?;
    let value = format!("v = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("v"));
    let value = value.unwrap_or_else(|| Value::String(text.to_string()));
    let mut keys: Vec<&str> = path.split('.').map(str::trim).collect();
    let last = keys
        .pop()
        .filter(|last| !last.is_empty())
        .ok_or_else(|| refuse("the key is empty"))?;
    let mut table = table;
    for key in keys {
        let entry = table.entry(key).or_insert_with(|| Value::Table(Table::new()));
        table = entry
            .as_table_mut()
            .ok_or_else(|| refuse(&format!("`{key}` is a value, expected a table")))?;
    }
    table.insert(last.to_string(), value);
    Ok(())
}

/// A field that the defaults do not have: an optional one, or a mistake.
struct Strange {
    /// Names of the tables above it, below that of the task.
    above: Vec<String>,
    key: String,
    /// What the defaults have in its place.
    known: Vec<String>,
}

impl Strange {
    fn words(&self, task: &str) -> String {
        let table: Vec<&str> = [task]
            .into_iter()
            .chain(self.above.iter().map(String::as_str))
            .collect();
        format!(
            "[{}]: unknown field `{}`, expected one of {}",
            table.join("."),
            self.key,
            self.known.join(", ")
        )
    }

    fn is_in(&self, table: &Table) -> bool {
        let place = self
            .above
            .iter()
            .try_fold(table, |table, key| table.get(key)?.as_table());
        place.is_some_and(|table| table.contains_key(&self.key))
    }
}

/// Lays the values of `own` over `defaults`, table by table; `above` names the tables above these. What the defaults do
/// not have is noted in `strange`.
fn merge(defaults: &mut Table, own: &Table, above: &[String], strange: &mut Vec<Strange>) {
    let known: Vec<String> = defaults.keys().cloned().collect();
    for (key, value) in own {
        match (defaults.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(own)) => {
                let above = [above, std::slice::from_ref(key)].concat();
                merge(below, own, &above, strange);
            }
            (Some(slot), value) => *slot = value.clone(),
            (None, _) => {
                strange.push(Strange {
                    above: above.to_vec(),
                    key: key.clone(),
                    known: known.clone(),
                });
                defaults.insert(key.clone(), value.clone());
            }
        }
    }
}

/// A TOML error in one line, with the line number where it is known.
fn explain(error: &toml::de::Error, text: &str) -> String {
    let message = error.message().replace('\n', ", ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) if !text.is_empty() => format!("line {}: {message}", before.matches('\n').count() + 1),
        _ => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "task = \"toy\"\nseed = 4\n[train]\nmax_steps = 10\n[toy]\nwidth = 3\n";

    #[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Toy {
        width: usize,
        name: String,
        start: Option<PathBuf>,
        model: ToyModel,
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    struct ToyModel {
        dim: usize,
        depth: usize,
        seed: Option<u64>,
    }

    impl Default for ToyModel {
        fn default() -> Self {
            Self {
                dim: 8,
                depth: 2,
                seed: None,
            }
        }
    }

    fn load(text: &str, sets: &[&str]) -> Result<Recipe, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.toml");
        std::fs::write(&path, text).unwrap();
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Recipe::load(&path, &sets).map_err(|e| e.to_string())
    }

    #[test]
    fn reads_sets_and_resolves() {
        let recipe = load(
            TEXT,
            &[
                "train.max_steps=20",
                "optimiser.lr=3e-4",
                "toy.name=a b",
                "toy.model.depth=3",
                "schedule.shape=\"wsd\"",
            ],
        )
        .unwrap();
        assert_eq!(
            (recipe.seed, recipe.train.max_steps, recipe.optimiser.lr),
            (4, 20, 3e-4)
        );
        assert_eq!(recipe.run_dir, Path::new("runs/tiny"));
        assert_eq!(
            recipe.own::<Toy>().unwrap(),
            Toy {
                width: 3,
                name: "a b".into(),
                start: None,
                model: ToyModel {
                    depth: 3,
                    ..ToyModel::default()
                }
            }
        );
        let again = load(&recipe.resolved(), &[]).unwrap();
        assert_eq!(
            (&again.train, &again.own, again.schedule),
            (&recipe.train, &recipe.own, recipe.schedule)
        );
    }

    /// A field without a default is no unknown one.
    #[test]
    fn optional_fields_may_be_given() {
        let recipe = load(TEXT, &["toy.start=a/b", "toy.model.seed=5"]).unwrap();
        let toy: Toy = recipe.own().unwrap();
        assert_eq!(toy.start.as_deref(), Some(Path::new("a/b")));
        assert_eq!(toy.model.seed, Some(5));
        for (set, words) in [
            ("toy.start=3", "[toy]: invalid type: integer"),
            ("toy.model.seed=x", "[toy]: invalid type: string"),
        ] {
            let message = load(TEXT, &[set]).unwrap().own::<Toy>().unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
        // The first mistake is named even where an optional field is given besides it.
        let recipe = load(TEXT, &["toy.model.seed=5", "toy.model.height=3"]).unwrap();
        let message = recipe.own::<Toy>().unwrap_err().to_string();
        assert!(
            message.contains("[toy.model]: unknown field `height`"),
            "{message}"
        );
    }

    #[test]
    fn mistakes_are_named_in_one_line() {
        let cases: [(&str, &[&str], &str); 12] = [
            (TEXT, &["train.max_stops=3"], "unknown field `max_stops`"),
            (TEXT, &["colour=3"], "unknown key `colour`"),
            (TEXT, &["train=3"], "invalid type: integer"),
            (TEXT, &["train.max_steps.x=3"], "`max_steps` is a value"),
            (TEXT, &["width"], "expected KEY=VALUE"),
            (TEXT, &["=3"], "the key is empty"),
            (
                TEXT,
                &["optimiser.lr=nan"],
                "optimiser.lr: found NaN, expected more than 0",
            ),
            (
                TEXT,
                &["train.max_steps=0"],
                "found neither, expected max_steps or max_seconds",
            ),
            (TEXT, &["train.max_steps=-1"], "invalid value: integer `-1`"),
            (TEXT, &["schedule.shape=round"], "unknown variant `round`"),
            ("task = \"toy\"\nseed = = 3\n", &[], "line 2: "),
            ("seed = 3\n", &[], "missing field `task`"),
        ];
        for (text, sets, words) in cases {
            let message = load(text, sets).unwrap_err();
            assert!(
                message.contains(words) && !message.contains('\n'),
                "{sets:?}: {message}"
            );
        }
        for (set, words) in [
            (
                "toy.depth=3",
                "tiny.toml: [toy]: unknown field `depth`, expected one of model, name, width",
            ),
            (
                "toy.model.height=3",
                "tiny.toml: [toy.model]: unknown field `height`",
            ),
            ("toy.model=3", "tiny.toml: [toy]: invalid type: integer"),
            ("toy.width=wide", "tiny.toml: [toy]: invalid type: string"),
        ] {
            let message = load(TEXT, &[set]).unwrap().own::<Toy>().unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
