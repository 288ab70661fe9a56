//! Task `recall`: multi-query associative recall, which asks a language model for what it has read; [`Recall`] says how examples are
//! made.
//!
//! Only queries count in the loss. Every batch is new, drawn from Philox; those of the validation are always the same.

use std::path::Path;

use candle_core::Device;
use fulgur_datasets::text::Recall;
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::{Config, LanguageModel};
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::export::write_part;
use super::lm::flops;
use super::lm::shape::ModelOptions;
use crate::device::compute_dtype;
use crate::lm_eval::recall::{IGNORED, Measured, examples, measure};
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Largest batch: beyond all reason.
const MOST: usize = 1 << 20;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Examples in a batch.
    pub batch: usize,
    /// Tokens of an example.
    pub context: usize,
    /// Pairs D of key and value in it.
    pub pairs: usize,
    /// Tokens V.
    pub vocabulary: usize,
    /// How near queries are: 1 for anywhere.
    pub power: f64,
    /// Examples of a validation.
    pub validation: usize,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch: 64,
            context: 128,
            pairs: 16,
            vocabulary: 1024,
            power: 0.01,
            validation: 512,
            model: ModelOptions::default(),
        }
    }
}

impl Options {
    /// The network, with the vocabulary of the task.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub(super) fn config(&self) -> TaskResult<Config> {
        let (batch, vocabulary) = (self.batch, self.vocabulary);
        if batch == 0 || batch > MOST {
            return Err(format!("[recall]: batch is {batch}, expected 1 to {MOST}").into());
        }
        self.shape()
            .check()
            .map_err(|error| format!("[recall]: {error}"))?;
        self.model.check()?;
        let config = self.model.config();
        if config.bidirectional || ![0, vocabulary].contains(&self.model.vocabulary) {
            return Err(format!(
                "[recall.model]: bidirectional {}, vocabulary {}: expected a causal model of {vocabulary} rows",
                config.bidirectional, self.model.vocabulary
            )
            .into());
        }
        Ok(Config {
            vocab_size: vocabulary,
            ..config
        })
    }

    /// The shape of examples.
    fn shape(&self) -> Recall {
        Recall {
            context: self.context,
            pairs: self.pairs,
            vocabulary: self.vocabulary,
            power: self.power,
        }
    }
}

/// The task.
pub(super) struct RecallTask {
    options: Options,
    params: Params,
    model: LanguageModel,
}

impl RecallTask {
    /// Builds the network.
    ///
    /// # Errors
    /// Settings that do not fit together, or a network that cannot be.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let config = options.config()?;
        let params = Params::random(seed, device);
        let model = LanguageModel::new(&config, compute_dtype(device), &params.builder())?;
        Ok(Self {
            options,
            params,
            model,
        })
    }
}

impl Task for RecallTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "tokens"
    }

    fn flops_per_sample(&self) -> Option<f64> {
        let shapes = self.params.vars().into_iter();
        let shapes = shapes.map(|(name, var)| (name, var.dims().to_vec()));
        let operations = flops::per_token(self.model.config(), &shapes.collect(), self.options.context);
        Some(operations.all())
    }

    fn repeats(&self) -> bool {
        true
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let noise = &mut cursor.noise("recall");
        let [ids, targets] = examples(&self.options.shape(), self.options.batch, noise)?;
        Ok(Batch::new(ids.elem_count())
            .with_ids("ids", Ids::of(&ids, self.options.vocabulary)?)
            .with("targets", targets))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let options = cross_entropy::Options {
            ignore: Some(IGNORED),
            ..Default::default()
        };
        let (ids, targets) = (batch.ids("ids")?, batch.get("targets")?);
        Ok(self.model.loss(ids, targets, &options)?.into())
    }

    /// The loss of queries, and the share of them whose value is the likeliest of all tokens.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let Options {
            batch, validation, ..
        } = self.options;
        let noise = &mut Philox::named(0, "recall/validation");
        let shape = self.options.shape();
        let measured = measure(&self.model, &shape, validation, batch, noise, |_| true)?;
        let Some(Measured { loss, accuracy, .. }) = measured else {
            return Ok(Vec::new());
        };
        Ok(vec![
            ("loss".into(), loss.mean),
            ("accuracy".into(), accuracy.mean),
        ])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, self.model.config(), &self.params, None, Precision::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Options as RunOptions, Recipe, run};

    fn recipe(own: &str, folder: &Path) -> Recipe {
        let text = format!(
            "task = 'recall'\n[train]\nmax_steps = 300\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 1e-2\n[schedule]\n\
             warmup = 20\n[recall]\n{own}\n"
        );
        Recipe::check(text.parse().unwrap(), "test".into(), folder).unwrap()
    }

    /// A gated memory learns to recall three of four values, which guessing does not.
    #[test]
    fn a_small_model_learns_to_recall() {
        let folder = tempfile::tempdir().unwrap();
        let own = "batch = 32\ncontext = 16\npairs = 2\nvocabulary = 16\nvalidation = 100\n[recall.model]\narchitecture = 'eos'\n\
                   layers = 2\nwidth = 32\nhidden = 32\nheads = 1\nhead_width = 16\nvariant = { conv_size = 3 }";
        let recipe = recipe(own, &folder.path().join("run"));
        let task = RecallTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let before = task.validate().unwrap();
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let after = task.validate().unwrap();
        assert!(before[1].1 < 0.3, "{before:?}");
        assert!(after[1].1 > 0.75 && after[0].1 < 0.5 * before[0].1, "{after:?}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (own, words) in [
            ("pairs = 40", "a quarter of context, 32"),
            ("vocabulary = 32", "twice the pairs, 16"),
            ("power = 0.0", "power is 0"),
            (
                "model = { architecture = 'tnl', instance = 'gla' }",
                "only with architecture \"eos\"",
            ),
            ("model = { vocabulary = 7 }", "a causal model of 1024 rows"),
        ] {
            let recipe = recipe(own, folder.path());
            let options: Options = recipe.own().unwrap();
            let line = options.config().unwrap_err().to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
