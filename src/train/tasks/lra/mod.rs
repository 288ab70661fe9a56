//! Task `lra`: the class of a long sequence, after the Long Range Arena (arXiv 2011.04006).
//!
//! Expressions of ListOps and pictures of Pathfinder are drawn, number by number, the same in every run with the same `seed`; those held out
//! have numbers that are never trained on. Fashion-MNIST has a part for tests, which is held out. Sequences of several lengths are
//! packed behind each other, so that no batch has padding.

pub(crate) mod data;

use std::path::{Path, PathBuf};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use fulgur_datasets::long_range::{ListOps, listops};
use fulgur_lightnet::lm::Architecture;
use fulgur_lightnet::lm::classifier::{
    ClassifierConfig, Content, Form, Input, Layout, Positions, SequenceClassifier,
};
use fulgur_lightnet::params::{Params, Precision};
use serde::{Deserialize, Serialize};

use super::export::write_part;
use super::lm::shape::ModelOptions;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};
use data::{Arena, Source};

/// Largest batch and validation: beyond all reason.
const MOST: usize = 1 << 20;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// `listops`, `pathfinder` or `fashion-mnist`.
    pub task: String,
    /// Sequences in a batch.
    pub batch: usize,
    /// Drawn examples to train on, over and over: as many as published if absent, new ones without end if 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub examples: Option<u64>,
    /// Held-out examples that a validation takes; of a data set at most all of them.
    pub validation: usize,
    /// Seed of drawn examples.
    pub seed: u64,
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// How layers go through the tokens.
    pub form: Form,
    /// How tokens are told where they are.
    pub positions: Positions,
    /// Lengths and depths of expressions.
    pub listops: ListOps,
    /// The layers.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            task: Arena::ListOps.name().to_owned(),
            batch: 64,
            examples: None,
            validation: 2000,
            seed: 0,
            data: "data".into(),
            form: Form::Parallel,
            positions: Positions::Sine,
            listops: ListOps::default(),
            model: ModelOptions::default(),
        }
    }
}

impl Options {
    /// The task that is asked for.
    ///
    /// # Errors
    /// There is none of this name.
    fn arena(&self) -> TaskResult<Arena> {
        Ok(Arena::named(&self.task).map_err(|e| format!("[lra]: task: {e}"))?)
    }

    /// The network.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub(super) fn config(&self) -> TaskResult<ClassifierConfig> {
        let arena = self.arena()?;
        for (name, value) in [("batch", self.batch), ("validation", self.validation)] {
            if value == 0 || value > MOST {
                return Err(format!("[lra]: {name} is {value}, expected 1 to {MOST}").into());
            }
        }
        if arena == Arena::FashionMnist && self.examples.is_some() {
            return Err(
                "[lra]: examples is for tasks whose examples are drawn, fashion-mnist has its own".into(),
            );
        }
        self.model.check()?;
        let ModelOptions {
            vocabulary, variant, ..
        } = &self.model;
        if *vocabulary != 0 {
            return Err(format!("[lra.model]: vocabulary is {vocabulary}, expected none, or 0").into());
        }
        if variant.bidirectional.is_some() {
            return Err("[lra.model.variant]: bidirectional has to be absent, [lra] form says it".into());
        }
        let mut layers = self.model.config();
        layers.vocab_size = match arena.input() {
            Input::Tokens => listops::VOCABULARY,
            Input::Pixels => 1,
        };
        layers.bidirectional = self.form == Form::Whole && layers.architecture == Architecture::Lightnet;
        // Positions are added to all models alike.
        layers.use_tpe = variant.use_tpe.unwrap_or(false);
        let config = ClassifierConfig {
            classes: arena.classes(),
            input: arena.input(),
            form: self.form,
            grid: arena.grid(),
            positions: self.positions,
            layers,
        };
        config.check().map_err(|e| format!("[lra]: {}", first_line(&e)))?;
        Ok(config)
    }
}

/// Where the environment asks for backtraces, messages have one below their line.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The task.
pub(super) struct LraTask {
    options: Options,
    /// Examples to train on; none where they never come again.
    examples: Option<u64>,
    source: Source,
    params: Params,
    model: SequenceClassifier,
}

impl LraTask {
    /// Builds the network and opens the data.
    ///
    /// # Errors
    /// Settings that do not fit together, a network that cannot be, or a data set that is not there.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        let config = options.config()?;
        let arena = options.arena()?;
        let source = Source::open(arena, options.listops, options.seed, &options.data)?;
        let params = Params::random(seed, device);
        let model = SequenceClassifier::new(&config, compute_dtype(device), &params.builder())?;
        let task = Self {
            examples: Some(options.examples.unwrap_or(arena.published())).filter(|&count| count > 0),
            options,
            source,
            params,
            model,
        };
        // What a mixer refuses should be heard of before the first step.
        task.logits(&task.source.examples(&[0], true)?.to_device(device)?)
            .map_err(|e| e.to_string().lines().next().unwrap_or_default().to_owned())?;
        Ok(task)
    }

    /// Calls `of` with the content of a batch and its layout.
    fn with<T>(
        &self,
        batch: &Batch,
        of: impl FnOnce(&Content<'_>, &Layout) -> candle_core::Result<T>,
    ) -> TaskResult<T> {
        Ok(match self.model.config().input {
            Input::Tokens => {
                let borders = batch.get("borders")?.to_vec1::<u32>()?;
                let borders: Vec<usize> = borders.into_iter().map(|border| border as usize).collect();
                of(&Content::Tokens(batch.ids("ids")?), &Layout::packed(&borders)?)?
            }
            Input::Pixels => {
                let pixels = batch.get("pixels")?;
                let (count, tokens) = pixels.dims2()?;
                of(&Content::Pixels(pixels), &Layout::equal(count, tokens)?)?
            }
        })
    }

    fn logits(&self, batch: &Batch) -> TaskResult<Tensor> {
        self.with(batch, |content, layout| self.model.logits(content, layout))
    }

    /// Numbers of the examples of a batch.
    fn numbers(&self, cursor: &Cursor) -> Vec<u64> {
        let size = self.options.batch;
        match self.examples {
            Some(count) => {
                let chosen = cursor.shuffled(count as usize, size);
                chosen.into_iter().map(|number| number as u64).collect()
            }
            None => {
                let first = cursor.index * size as u64;
                (first..first + size as u64).collect()
            }
        }
    }
}

impl Task for LraTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn repeats(&self) -> bool {
        // Lists end elsewhere in every batch.
        self.model.config().input == Input::Pixels
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        self.source.examples(&self.numbers(cursor), false)
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let targets = batch.get("targets")?;
        let loss = self.with(batch, |content, layout| self.model.loss(content, layout, targets))?;
        Ok(loss.into())
    }

    /// The loss of held-out sequences, and the share of them whose class is the likeliest.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let count = self.options.arena()?.held_out(self.options.validation);
        let numbers: Vec<u64> = (0..count as u64).collect();
        let (mut loss, mut right) = (0.0, 0.0);
        for numbers in numbers.chunks(self.options.batch) {
            let batch = self.source.examples(numbers, true)?;
            let batch = batch.to_device(self.params.device())?;
            let targets = batch.get("targets")?;
            let logits = self.logits(&batch)?.to_dtype(DType::F32)?.detach();
            let likelihood = log_softmax(&logits, D::Minus1)?.gather(&targets.unsqueeze(1)?, 1)?;
            loss -= f64::from(likelihood.sum_all()?.to_scalar::<f32>()?);
            let hits = logits.argmax(D::Minus1)?.eq(targets)?;
            right += f64::from(hits.to_dtype(DType::F32)?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(vec![
            ("loss".into(), loss / count as f64),
            ("accuracy".into(), right / count as f64),
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

    fn recipe(steps: u64, own: &str, folder: &Path) -> Recipe {
        let text = format!(
            "task = 'lra'\n[train]\nmax_steps = {steps}\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 5e-3\n[schedule]\n\
             warmup = 20\n[lra]\n{own}\n"
        );
        Recipe::check(text.parse().unwrap(), "test".into(), folder).unwrap()
    }

    fn accuracy(figures: &[(String, f64)]) -> f64 {
        figures[1].1
    }

    /// Lists of two to four digits: their values are learnt far beyond guessing, and the exported model has the same logits.
    #[test]
    fn a_small_model_learns_short_lists() {
        let folder = tempfile::tempdir().unwrap();
        let own = "batch = 64\nexamples = 0\nvalidation = 400\npositions = 'none'\n\
                   listops = { min_length = 4, max_length = 6, max_depth = 2, max_arguments = 4 }\n[lra.model]\n\
                   architecture = 'hgrn2'\nlayers = 2\nwidth = 32\nhidden = 64\nheads = 2\ninit = 0.18";
        let recipe = recipe(250, own, &folder.path().join("run"));
        let task = LraTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let before = task.validate().unwrap();
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let after = task.validate().unwrap();
        assert!(accuracy(&before) < 0.3, "{before:?}");
        assert!(
            accuracy(&after) > 0.5 && after[0].1 < 0.7 * before[0].1,
            "{after:?}"
        );
        let exported = folder.path().join("run/model");
        let loaded = SequenceClassifier::load(&exported, DType::F32, &Device::Cpu).unwrap();
        let batch = task.source.examples(&[0, 1, 2], true).unwrap();
        let logits = |model: &SequenceClassifier| {
            let logits = task.with(&batch, |content, layout| model.logits(content, layout));
            logits.unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(logits(&loaded), logits(&task.model));
    }

    /// Every step of a run sees each example at most once an epoch, and batches do not depend on what was drawn before.
    #[test]
    fn batches_are_functions_of_their_number() {
        let folder = tempfile::tempdir().unwrap();
        let own = "task = 'pathfinder'\nbatch = 4\nexamples = 8\nvalidation = 4\n[lra.model]\narchitecture = 'tnl'\nlayers = 1\n\
                   width = 16\nhidden = 16\nheads = 2";
        let recipe = recipe(1, own, folder.path());
        let task = LraTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let cursor = |index| Cursor { seed: 1, index };
        let mut epoch: Vec<u64> = (0..2).flat_map(|index| task.numbers(&cursor(index))).collect();
        epoch.sort_unstable();
        assert_eq!(epoch, (0..8).collect::<Vec<_>>());
        let pixels = |index| {
            let batch = task.batch(&cursor(index)).unwrap();
            batch.get("pixels").unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(pixels(1), pixels(1));
        assert_ne!(pixels(1), pixels(0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (own, words) in [
            ("task = 'retrieval'", "retrieval is not available"),
            ("task = 'weave'", "found \"weave\", expected one of listops"),
            ("batch = 0", "batch is 0"),
            ("task = 'fashion-mnist'\nexamples = 3", "examples is for tasks"),
            ("form = 'series-2d'", "where there is no grid"),
            (
                "form = 'whole'\nmodel = { architecture = 'hgrn2' }",
                "only with llama and lightnet",
            ),
            ("model = { vocabulary = 7 }", "vocabulary is 7"),
            (
                "model = { variant = { bidirectional = true } }",
                "bidirectional has to be absent",
            ),
            (
                "listops = { max_depth = 2 }",
                "[lra.listops]: no expression of 500 to 2000 tokens",
            ),
            ("listops = { min_length = 0 }", "min_length is 0"),
            (
                "listops = { min_length = 4, max_length = 9, max_depth = 2 }\nmodel = { width = 16, heads = 2, layers = 1, variant = { \
                 conv_size = 3 } }",
                "not for short convolutions",
            ),
            (
                "task = 'fashion-mnist'\ndata = 'nowhere'",
                "fulgur data fetch fashion-mnist",
            ),
        ] {
            let recipe = recipe(1, own, folder.path());
            let options: Options = recipe.own().unwrap();
            let line = match LraTask::open(options, 1, &Device::Cpu) {
                Ok(_) => panic!("{own}: not refused"),
                Err(e) => e.to_string(),
            };
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
