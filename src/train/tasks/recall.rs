//! Task `recall`: multi-query associative recall (MQAR, arXiv 2312.04927), which asks a language model for what it has read.
//!
//! ```text
//! key value  key value  ..  key value    filler ..  key filler ..  key filler ..
//! ^ D pairs                              ^ every key once more, one place in two; its target is its value
//! ```
//!
//! Of V tokens 0 is the filler, those below V / 2 are keys, the others values; the keys of an example differ, and so do its
//! values. Queries stand on even places behind the pairs, at gaps from their beginning that are drawn without replacement with
//! weights `x^(power - 1)`: most are near for small powers. Only queries count in the loss. Every batch is new, drawn from
//! Philox; those of the validation are always the same.

use std::path::Path;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::lm::{Config, LanguageModel};
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::export::{compute_dtype, write_part};
use super::lm::flops;
use super::lm::shape::ModelOptions;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Target of tokens that do not count.
const IGNORED: u32 = u32::MAX;
/// Largest vocabulary, context and batch: beyond all reason.
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
        let Self {
            batch,
            context,
            pairs,
            vocabulary,
            power,
            ..
        } = *self;
        for (name, value) in [("batch", batch), ("context", context), ("vocabulary", vocabulary)] {
            if value == 0 || value > MOST {
                return Err(format!("[recall]: {name} is {value}, expected 1 to {MOST}").into());
            }
        }
        if pairs == 0 || pairs > context / 4 {
            return Err(format!(
                "[recall]: pairs is {pairs}, expected 1 to a quarter of context, {}",
                context / 4
            )
            .into());
        }
        if vocabulary / 2 <= pairs {
            return Err(format!(
                "[recall]: vocabulary is {vocabulary}, expected more than twice the pairs, {pairs}, and 2"
            )
            .into());
        }
        if !(power.is_finite() && power > 0.0) {
            return Err(format!("[recall]: power is {power}, expected a positive number").into());
        }
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

    /// Ids and targets of an example.
    fn example(&self, noise: &mut Philox) -> [Vec<u32>; 2] {
        let Self {
            context,
            pairs,
            vocabulary,
            power,
            ..
        } = *self;
        let (mut ids, mut targets) = (vec![0; context], vec![IGNORED; context]);
        let half = vocabulary / 2;
        let keys = distinct(noise, half - 1, pairs);
        let values = distinct(noise, vocabulary - half, pairs);
        let pair = |at: usize| ((1 + keys[at]) as u32, (half + values[at]) as u32);
        for at in 0..pairs {
            (ids[2 * at], ids[2 * at + 1]) = pair(at);
        }
        // The largest of u^(1 / w) are a draw without replacement by weights w; -log(u) / w is the same order, the smallest first.
        let places = (context - 2 * pairs) / 2;
        let mut drawn: Vec<(f64, usize)> = (0..places)
            .map(|place| {
                let weight = (1.0 + place as f64).powf(power - 1.0);
                let u = 1.0 - f64::from(noise.uniform());
                (-u.max(f64::MIN_POSITIVE).ln() / weight, place)
            })
            .collect();
        drawn.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (at, &(_, place)) in drawn.iter().take(pairs).enumerate() {
            let (key, value) = pair(at);
            let position = 2 * pairs + 2 * place;
            (ids[position], targets[position]) = (key, value);
        }
        [ids, targets]
    }

    fn examples(&self, count: usize, noise: &mut Philox) -> TaskResult<[Tensor; 2]> {
        let (mut ids, mut targets) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let [new, asked] = self.example(noise);
            ids.extend(new);
            targets.extend(asked);
        }
        let tensor = |values| Tensor::from_vec(values, (count, self.context), &Device::Cpu);
        Ok([tensor(ids)?, tensor(targets)?])
    }
}

/// `count` of `all` numbers, each at most once, in any order.
fn distinct(noise: &mut Philox, all: usize, count: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::with_capacity(count);
    // Floyd's draw: each step adds a number that is not there yet.
    for most in all - count..all {
        let other = noise.below(most + 1);
        chosen.push(if chosen.contains(&other) { most } else { other });
    }
    let order = noise.permutation(count);
    order.into_iter().map(|at| chosen[at]).collect()
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

    fn ids(&self, ids: &Tensor) -> TaskResult<Ids> {
        Ok(Ids::of(ids, self.options.vocabulary)?)
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

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let [ids, targets] = self
            .options
            .examples(self.options.batch, &mut cursor.noise("recall"))?;
        Ok(Batch::new(ids.elem_count())
            .on_host("ids", ids)
            .with("targets", targets))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let options = cross_entropy::Options {
            ignore: Some(IGNORED),
            ..Default::default()
        };
        let ids = self.ids(batch.get("ids")?)?;
        Ok(self.model.loss(&ids, batch.get("targets")?, &options)?.into())
    }

    /// The loss of queries, and the share of them whose value is the likeliest of all tokens.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let Options {
            batch, validation, ..
        } = self.options;
        let mut noise = Philox::named(0, "recall/validation");
        let (mut loss, mut right, mut count) = (0.0, 0.0, 0usize);
        for first in (0..validation).step_by(batch) {
            let [ids, targets] = self.options.examples(batch.min(validation - first), &mut noise)?;
            let asked = targets.flatten_all()?.to_vec1::<u32>()?;
            let (at, values): (Vec<u32>, Vec<u32>) = (0u32..)
                .zip(asked)
                .filter(|&(_, target)| target != IGNORED)
                .unzip();
            let device = self.params.device();
            let at = Tensor::new(at, device)?;
            let values = Tensor::new(values, device)?;
            let logits = self.model.logits(&self.ids(&ids)?)?.flatten_to(1)?;
            let logits = logits.index_select(&at, 0)?.to_dtype(DType::F32)?;
            let likelihood = log_softmax(&logits, D::Minus1)?.gather(&values.unsqueeze(1)?, 1)?;
            loss -= f64::from(likelihood.sum_all()?.to_scalar::<f32>()?);
            let hits = logits.argmax(D::Minus1)?.eq(&values)?;
            right += f64::from(hits.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?);
            count += values.elem_count();
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let mean = |sum: f64| sum / count as f64;
        Ok(vec![
            ("loss".into(), mean(loss)),
            ("accuracy".into(), mean(right)),
        ])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, self.model.config(), &self.params, None, Precision::F32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::train::{Options as RunOptions, Recipe, run};

    #[test]
    fn every_key_is_asked_for_once_behind_the_pairs() {
        let options = Options {
            context: 67,
            pairs: 9,
            vocabulary: 41,
            ..Options::default()
        };
        for seed in 0..50 {
            let [ids, targets] = options.example(&mut Philox::named(seed, "test"));
            let pairs: HashMap<u32, u32> = ids[..18].chunks(2).map(|pair| (pair[0], pair[1])).collect();
            assert_eq!(pairs.len(), 9);
            assert!(pairs.keys().all(|key| (1..20).contains(key)));
            let mut values: Vec<_> = pairs.values().collect();
            values.sort_unstable();
            values.dedup();
            assert!(values.len() == 9 && values.iter().all(|value| (20..41).contains(*value)));
            let mut asked = Vec::new();
            for (at, (id, target)) in ids.iter().zip(&targets).enumerate() {
                if *target == IGNORED {
                    assert!(at < 18 || *id == 0);
                    continue;
                }
                assert!(at >= 18 && at % 2 == 0);
                assert_eq!(pairs[id], *target);
                asked.push(*id);
            }
            asked.sort_unstable();
            asked.dedup();
            assert_eq!(asked.len(), 9);
            assert_eq!([ids, targets], options.example(&mut Philox::named(seed, "test")));
        }
    }

    /// Small powers put queries near, power 1 anywhere.
    #[test]
    fn gaps_follow_the_power() {
        let mean = |power: f64| {
            let options = Options {
                context: 256,
                pairs: 4,
                power,
                ..Options::default()
            };
            let mut noise = Philox::named(1, "test");
            let mut sum = 0.0;
            for _ in 0..200 {
                let [_, targets] = options.example(&mut noise);
                let places = targets
                    .iter()
                    .enumerate()
                    .filter(|(_, target)| **target != IGNORED);
                sum += places.map(|(at, _)| (at - 8) as f64 / 248.0).sum::<f64>() / 800.0;
            }
            sum
        };
        assert!((mean(1.0) - 0.5).abs() < 0.03, "{}", mean(1.0));
        assert!(mean(0.01) < 0.25, "{}", mean(0.01));
    }

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
