//! Task `classify`: the class of a picture.
//!
//! Pictures are changed on their way into a batch and their classes become shares ([`fulgur_datasets::augment`]). What stochastic depth
//! drops is drawn with the batch, so that steps repeat.

pub(super) mod flops;

use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fulgur_datasets::augment::{self, Augment, Sample, View};
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::mixer::causal::Form;
use fulgur_lightnet::params::{Params, Precision};
use fulgur_lightnet::vision::{Classifier, Config, Kind, Mixer, Size, Tpe, soft_cross_entropy};
use serde::{Deserialize, Serialize};

use super::export::write_part;
use crate::classify::figures::Tally;
use crate::classify::prepare;
use crate::device::compute_dtype;
use crate::distributed::{Ranks, Share};
use crate::train::task::Orders;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Largest batch: beyond all reason.
const MOST: usize = 1 << 20;
/// What is taken from values of 0 to 1, and what they are divided by.
const MIDDLE: f32 = 0.5;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// The pictures, by any name that [`Labelled::open`] takes: a prepared set, a folder with a folder a class, JSONL or IDX.
    pub set: String,
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// Height and width of the pictures; as in the set if absent, where all of its pictures have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<[usize; 2]>,
    /// Pictures in a batch.
    pub batch: usize,
    /// Held-out pictures that a validation takes; 0 for all.
    pub validation: usize,
    /// Share of the classes' weight that is spread over all of them.
    pub label_smoothing: f64,
    /// Probability with which the last branches are dropped; it grows evenly from 0 at the first.
    pub stochastic_depth: f64,
    /// How pictures are changed; by default not at all.
    pub augment: Augment,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            set: "fashion-mnist".to_owned(),
            data: "data".into(),
            size: None,
            batch: 256,
            validation: 0,
            label_smoothing: 0.1,
            stochastic_depth: 0.0,
            augment: Augment::default(),
            model: ModelOptions::default(),
        }
    }
}

/// The network of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ModelOptions {
    /// A standard size, `tiny`, `small` or `base` (also `T`, `S`, `B`), whose numbers the others replace.
    pub size: String,
    /// Side of a patch.
    pub patch: usize,
    /// Layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    /// Width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Heads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<usize>,
    /// Hidden width of the gated linear units.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// How tokens are mixed.
    pub mixer: Mixer,
    /// How the mixer goes through them; the usual way of the mixer if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// MD-TPE.
    pub tpe: Tpe,
    /// MD-LRPE.
    pub lrpe: bool,
    /// Whether gated linear units see neighbours.
    pub token_shift: bool,
    /// What layer scale starts from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layer_scale: Option<f64>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            size: "tiny".to_owned(),
            patch: 4,
            layers: None,
            width: None,
            heads: None,
            hidden: None,
            mixer: Mixer::LightNet,
            form: None,
            tpe: Tpe::TwoSided,
            lrpe: true,
            token_shift: false,
            layer_scale: None,
        }
    }
}

impl ModelOptions {
    /// The network for pictures of these classes, size and number of channels.
    ///
    /// # Errors
    /// Settings that do not fit together.
    fn config(&self, labels: Vec<String>, side: [usize; 2], channels: usize) -> TaskResult<Config> {
        let size = match self.size.as_str() {
            "tiny" | "T" => Size::Tiny,
            "small" | "S" => Size::Small,
            "base" | "B" => Size::Base,
            other => {
                return Err(format!(
                    "[classify.model]: size is {other:?}, expected tiny (T), small (S) or base (B)"
                )
                .into());
            }
        };
        let standard = Config::of(size, labels);
        let width = self.width.unwrap_or(standard.hidden_size);
        // Heads stay 64 wide, and gated linear units in proportion, where a recipe says nothing else.
        let config = Config {
            model_type: Kind::VisionClassifier,
            image_size: side,
            num_channels: channels,
            patch_size: self.patch,
            image_mean: vec![MIDDLE; channels],
            image_std: vec![MIDDLE; channels],
            hidden_size: width,
            num_hidden_layers: self.layers.unwrap_or(standard.num_hidden_layers),
            num_attention_heads: self.heads.unwrap_or((width / 64).max(1)),
            intermediate_size: self.hidden.unwrap_or(width * 8 / 3),
            mixer: self.mixer,
            form: self.form.unwrap_or(self.mixer.form()),
            tpe: self.tpe,
            lrpe: self.lrpe,
            token_shift: self.token_shift,
            layer_scale: self.layer_scale,
            ..standard
        };
        config.check().map_err(|e| {
            let words = e.to_string();
            format!("[classify.model]: {}", words.lines().next().unwrap_or_default())
        })?;
        Ok(config)
    }
}

impl Options {
    /// The network for the pictures of `set`.
    ///
    /// # Errors
    /// Settings that do not fit together.
    fn config(&self, set: &Labelled) -> TaskResult<Config> {
        let Some(side) = self.size.or(set.side()) else {
            return Err("[classify]: size is absent, expected one: pictures of the set have several".into());
        };
        let channels = if set.is_grey() { 1 } else { 3 };
        self.model.config(set.classes().to_vec(), side, channels)
    }

    /// Refuses numbers that are out of range.
    ///
    /// # Errors
    /// The first of them, by name.
    fn check(&self) -> TaskResult<()> {
        if self.batch == 0 || self.batch > MOST {
            return Err(format!("[classify]: batch is {}, expected 1 to {MOST}", self.batch).into());
        }
        for (name, value) in [
            ("label_smoothing", self.label_smoothing),
            ("stochastic_depth", self.stochastic_depth),
        ] {
            if !(0.0..1.0).contains(&value) {
                return Err(format!("[classify]: {name} is {value}, expected 0 up to but not 1").into());
            }
        }
        self.augment
            .check()
            .map_err(|line| format!("[classify.augment]: {line}").into())
    }
}

/// The task.
pub(super) struct ClassifyTask {
    options: Options,
    set: Labelled,
    /// Numbers of the pictures that are trained on, and of those held out.
    parts: [Vec<usize>; 2],
    orders: Orders,
    params: Params,
    model: Classifier,
    /// What the model sees of a picture.
    view: View,
    flops: f64,
    /// The part of batches that this rank takes.
    share: Share,
}

impl ClassifyTask {
    /// Opens the data and builds the network for it.
    ///
    /// # Errors
    /// Settings that do not fit together, or a data set that is not there.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        options.check()?;
        let mut set = opened(&options)?;
        // One broken file among many must not end a run.
        set.drop_broken();
        set.check_classes().map_err(|e| format!("[classify]: set: {e}"))?;
        Self::with(options, set, seed, device)
    }

    /// Of a set that is open.
    fn with(options: Options, set: Labelled, seed: u64, device: &Device) -> TaskResult<Self> {
        let config = options.config(&set)?;
        let params = Params::random(seed, device);
        let model = Classifier::new(&config, compute_dtype(device), &params.builder())?;
        let vars = params.vars().into_iter();
        let shapes = vars.map(|(name, var)| (name, var.dims().to_vec())).collect();
        Ok(Self {
            flops: flops::per_picture(&config, &shapes),
            share: Share::WHOLE,
            view: prepare::view(&config),
            parts: [Part::Train, Part::HeldOut].map(|part| set.part(part)),
            orders: Orders::default(),
            options,
            set,
            params,
            model,
        })
    }

    /// Pictures of a batch as the model takes them, `[B, C, H, W]` on the host.
    fn pixels(batch: &mut augment::Batch) -> TaskResult<Tensor> {
        let values = std::mem::take(&mut batch.pixels);
        Ok(Tensor::from_vec(values, batch.shape.as_slice(), &Device::Cpu)?)
    }
}

/// What stochastic depth multiplies `branches` of `pictures` pictures by, `[branches, pictures]`: 0, or as much as makes the mean 1. The
/// two branches of a layer are dropped with one probability, which grows to `most` in the last layer.
fn kept(branches: usize, pictures: usize, most: f64, noise: &mut Philox) -> Vec<f32> {
    let last = (branches / 2).saturating_sub(1).max(1) as f64;
    let mut kept = Vec::with_capacity(branches * pictures);
    for branch in 0..branches {
        let stays = 1.0 - most * ((branch / 2) as f64 / last);
        kept.extend((0..pictures).map(|_| match noise.chance(stays as f32) {
            true => (1.0 / stays) as f32,
            false => 0.0,
        }));
    }
    kept
}

impl Task for ClassifyTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "images"
    }

    fn flops_per_sample(&self) -> Option<f64> {
        Some(self.flops)
    }

    fn repeats(&self) -> bool {
        true
    }

    fn notes(&self) -> Vec<String> {
        let summary = self.set.skipped().summary();
        summary
            .map(|line| format!("{}: {line}", self.options.set))
            .into_iter()
            .collect()
    }

    fn distribute(&mut self, ranks: &Ranks) -> TaskResult<()> {
        let share = ranks.share();
        if share.parts > 1 {
            let found = share.parts;
            return Err(
                format!("distributed.sequence is {found}, expected 1: pictures are not split").into(),
            );
        }
        share.rows(self.options.batch)?;
        self.share = share;
        Ok(())
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let (options, train) = (&self.options, &self.parts[0]);
        let (size, classes) = (options.batch, self.set.classes().len());
        let first = cursor.index.wrapping_mul(size as u64);
        let samples: Vec<Sample> = (first..)
            .zip(self.orders.batch(cursor, train.len(), size))
            .map(|(number, place)| Sample {
                picture: train[place],
                number,
            })
            .collect();
        let mut drawn = options
            .augment
            .batch(&self.view, &self.set, &samples, cursor.seed)?;
        let targets = drawn.soft_targets(classes, options.label_smoothing as f32);
        let mut batch = Batch::new(size).with("pixels", Self::pixels(&mut drawn)?).with(
            "targets",
            Tensor::from_vec(targets, (size, classes), &Device::Cpu)?,
        );
        if options.stochastic_depth > 0.0 {
            let branches = self.model.branches();
            let drawn = kept(
                branches,
                size,
                options.stochastic_depth,
                &mut cursor.noise("stochastic depth"),
            );
            batch = batch.with("kept", Tensor::from_vec(drawn, (branches, size), &Device::Cpu)?);
        }
        if self.share == Share::WHOLE {
            return Ok(batch);
        }
        Ok(batch.rows(self.share.rows(size)?, |name| usize::from(name == "kept"))?)
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let kept = match self.options.stochastic_depth > 0.0 {
            true => Some(batch.get("kept")?),
            false => None,
        };
        let logits = self.model.logits(batch.get("pixels")?, kept)?;
        Ok(soft_cross_entropy(&logits, batch.get("targets")?)?.into())
    }

    /// The loss of held-out pictures, and the shares of them whose class is the likeliest, and among the five likeliest.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let config = self.model.config();
        let held_out = &self.parts[1];
        let count = match self.options.validation {
            0 => held_out.len(),
            asked => asked.min(held_out.len()),
        };
        let mut tally = Tally::new(config.classes());
        for indices in held_out[..count].chunks(self.options.batch) {
            let mut batch = self.view.batch(&self.set, indices)?;
            let pixels = Self::pixels(&mut batch)?.to_device(self.params.device())?;
            let logits = self.model.logits(&pixels, None)?.detach();
            let shares = candle_nn::ops::softmax(&logits, candle_core::D::Minus1)?.to_vec2::<f32>()?;
            for (target, shares) in batch.targets.iter().zip(&shares) {
                tally.add(target.class, shares);
            }
        }
        let Some(figures) = tally.figures(&config.labels) else {
            return Err("no picture is held out".into());
        };
        Ok(vec![
            ("loss".to_owned(), figures.loss),
            ("top1".to_owned(), figures.top1),
            ("top5".to_owned(), figures.top5),
        ])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, self.model.config(), &self.params, None, Precision::F32)
    }
}

/// The pictures of a recipe, as they are.
fn opened(options: &Options) -> TaskResult<Labelled> {
    let set = Labelled::open(&options.set, &options.data);
    set.map_err(|e| format!("[classify]: set: {e}").into())
}

/// The network of a recipe, for the classes and pictures of its set, of which none is decoded.
///
/// # Errors
/// Settings that do not fit together, or a set that is not there.
pub(super) fn outlined(options: &Options) -> TaskResult<Config> {
    options.check()?;
    options.config(&opened(options)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    use crate::train::{Options as RunOptions, Recipe, Report, run};
    use fulgur_datasets::labelled::Item;
    use fulgur_datasets::media::Picture;

    fn recipe(steps: u64, own: &str, folder: &Path) -> Recipe {
        let text = format!(
            "task = 'classify'\n[train]\nmax_steps = {steps}\nema = 0.9\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 3e-3\n[schedule]\n\
             warmup = 10\n[classify]\n{own}\n"
        );
        Recipe::check(text.parse().unwrap(), "test".into(), folder).unwrap()
    }

    /// Two classes of noisy 8 x 8 pictures: stripes that lie, and stripes that stand.
    fn stripes_of(count: usize) -> Labelled {
        let items = (0..count).map(|number| {
            let mut noise = Philox::new(number as u64, 0);
            let (label, phase) = (number % 2, noise.below(2));
            let pixels = (0..64).flat_map(|place| {
                let line = if label == 0 { place / 8 } else { place % 8 };
                let level = (line / 2 + phase) % 2 * 150 + noise.below(100);
                [level as u8; 3]
            });
            Item {
                picture: Picture {
                    pixels: pixels.collect(),
                    width: 8,
                    height: 8,
                    channels: 3,
                },
                label: Some(label),
                caption: None,
                key: number.to_string(),
            }
        });
        let classes = ["lying", "standing"].map(str::to_owned).to_vec();
        Labelled::in_memory("stripes", classes, items.collect()).unwrap()
    }

    fn stripes(recipe: &Recipe) -> ClassifyTask {
        let options: Options = recipe.own().unwrap();
        options.check().unwrap();
        ClassifyTask::with(options, stripes_of(300), 1, &Device::Cpu).unwrap()
    }

    /// Every mixer learns stripes, mixed and with dropped branches; the exported model has the same logits.
    #[test]
    fn small_models_learn_two_classes() {
        let folder = tempfile::tempdir().unwrap();
        for mixer in Mixer::ALL {
            let own = format!(
                "batch = 32\nstochastic_depth = 0.1\nlabel_smoothing = 0.05\n[classify.augment]\npad = 1\nmixup = 0.1\n[classify.model]\n\
                 mixer = '{}'\nlayers = 2\nwidth = 16\nheads = 2\nhidden = 24\npatch = 2\n",
                mixer.name()
            );
            let recipe = recipe(60, &own, &folder.path().join(mixer.name()));
            let task = stripes(&recipe);
            let before = task.validate().unwrap();
            run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
            let exported = recipe.run_dir.join("model");
            let loaded = Classifier::load(&exported, candle_core::DType::F32, &Device::Cpu).unwrap();
            assert_eq!(loaded.config(), task.model.config());
            task.params.load(&exported.join("model.safetensors")).unwrap();
            let after = task.validate().unwrap();
            assert!(before[1].1 < 0.8, "{mixer:?}: {before:?}");
            assert!(after[1].1 > 0.95 && after[0].1 < 0.4, "{mixer:?}: {after:?}");
            assert_eq!(after[2], ("top5".to_owned(), 1.0));
        }
    }

    /// Batches are functions of their number; targets sum to one, and say what is in the picture.
    #[test]
    fn batches_hold_shares_of_classes() {
        let folder = tempfile::tempdir().unwrap();
        let own = "batch = 16\nlabel_smoothing = 0.2\nstochastic_depth = 0.5\naugment = { cutmix = 0.3 }\n\
                   model = { layers = 3, width = 16, heads = 2, patch = 2 }";
        let recipe = recipe(1, own, folder.path());
        let task = stripes(&recipe);
        let batch = |index| task.batch(&Cursor { seed: 1, index }).unwrap();
        let list = |batch: &Batch, name: &str| {
            batch
                .get(name)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        let first = batch(0);
        assert_eq!(first.get("pixels").unwrap().dims(), [16, 3, 8, 8]);
        assert_eq!(first.get("kept").unwrap().dims(), [6, 16]);
        for name in ["pixels", "targets", "kept"] {
            assert_eq!(list(&first, name), list(&batch(0), name));
            assert_ne!(list(&first, name), list(&batch(1), name));
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let again = pool.unwrap().install(|| batch(0));
            assert_eq!(list(&first, "pixels"), list(&again, "pixels"), "{threads}");
        }
        let targets = list(&first, "targets");
        let mut plain = 0;
        for (place, target) in targets.chunks(2).enumerate() {
            assert!((target[0] + target[1] - 1.0).abs() < 1e-6);
            assert!(target.iter().all(|&share| (0.099..0.901).contains(&share)));
            let train = &task.parts[0];
            let index = train[Cursor { seed: 1, index: 0 }.shuffled(train.len(), 16)[place]];
            let own = task.view.batch(&task.set, &[index]).unwrap().pixels;
            if list(&first, "pixels")[place * 192..][..192] == own[..] {
                plain += 1;
                assert!((target[index % 2] - 0.9).abs() < 1e-6);
            }
        }
        assert!((3..14).contains(&plain), "{plain}");
    }

    /// The rows that groups of ranks take make up the batch, and drop the branches that are dropped in it.
    #[test]
    fn groups_take_rows_of_a_batch() {
        let folder = tempfile::tempdir().unwrap();
        let own =
            "batch = 8\nstochastic_depth = 0.5\nmodel = { layers = 2, width = 16, heads = 2, patch = 2 }";
        let mut task = stripes(&recipe(1, own, folder.path()));
        let cursor = Cursor { seed: 1, index: 3 };
        let whole = task.batch(&cursor).unwrap();
        let parts: Vec<Batch> = (0..4)
            .map(|group| {
                task.share = Share {
                    group,
                    groups: 4,
                    ..Share::WHOLE
                };
                task.batch(&cursor).unwrap()
            })
            .collect();
        for (name, axis) in [("pixels", 0), ("targets", 0), ("kept", 1)] {
            let rows: Vec<&Tensor> = parts.iter().map(|part| part.get(name).unwrap()).collect();
            let joined = Tensor::cat(&rows, axis).unwrap();
            let list = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(list(&joined), list(whole.get(name).unwrap()), "{name}");
        }
        assert!(parts.iter().all(|part| (part.samples, part.share) == (2, 0.25)));
    }

    /// A run that is interrupted and goes on ends with the same bits.
    #[test]
    fn resumed_runs_equal_those_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let own = "batch = 16\nstochastic_depth = 0.2\n[classify.augment]\npad = 1\nflip = 0.5\nerasing = { probability = 0.5 }\n\
                   randaugment = { count = 1 }\nmixup = 0.2\ncutmix = 1.0\n\
                   [classify.model]\nlayers = 1\nwidth = 16\nheads = 2\nhidden = 24\npatch = 2";
        let model = |name: &str, stops: bool| {
            let mut recipe = recipe(9, own, &folder.path().join(name));
            (recipe.train.log_every, recipe.train.threads) = (1, if stops { 3 } else { 1 });
            let options = RunOptions::default();
            if stops {
                let interrupt = std::sync::Arc::clone(&options.interrupt);
                let outcome = run(&stripes(&recipe), &recipe, &options, |report| {
                    if matches!(report, Report::Progress { step: 4, .. }) {
                        interrupt.store(true, Ordering::Relaxed);
                    }
                });
                assert_eq!(
                    (
                        outcome.unwrap().finished,
                        interrupt.swap(false, Ordering::Relaxed)
                    ),
                    (false, true)
                );
            }
            let options = RunOptions {
                resume: stops,
                ..options
            };
            assert!(
                run(&stripes(&recipe), &recipe, &options, |_| {})
                    .unwrap()
                    .finished
            );
            std::fs::read(recipe.run_dir.join("model/model.safetensors")).unwrap()
        };
        assert!(model("whole", false) == model("parts", true));
    }

    /// The mean of what is kept is one in every layer, and the first is never dropped.
    #[test]
    fn what_is_dropped_is_made_up_for() {
        let drawn = kept(8, 20_000, 0.4, &mut Philox::new(2, 0));
        for (branch, drawn) in drawn.chunks(20_000).enumerate() {
            let stays = 1.0 - 0.4 * (branch / 2) as f64 / 3.0;
            let mean = drawn.iter().sum::<f32>() / 20_000.0;
            assert!((mean - 1.0).abs() < 0.03, "{branch}: {mean}");
            let zeros = drawn.iter().filter(|&&kept| kept == 0.0).count() as f64 / 20_000.0;
            assert!((zeros - (1.0 - stays)).abs() < 0.01, "{branch}: {zeros}");
        }
        assert!(drawn[..40_000].iter().all(|&kept| kept == 1.0));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (own, words) in [
            ("set = 'imagenet'", "set: imagenet: no such pictures"),
            ("batch = 0", "batch is 0"),
            ("label_smoothing = 1.0", "label_smoothing is 1"),
            ("stochastic_depth = nan", "stochastic_depth is NaN"),
            (
                "augment = { flip = 2.0 }",
                "[classify.augment]: flip: found 2, expected 0 to 1",
            ),
            (
                "augment = { erasing = { area = [0.5, nan] } }",
                "[classify.augment]: erasing.area: found NaN",
            ),
            ("data = 'nowhere'", "fulgur data fetch fashion-mnist"),
        ] {
            let recipe = recipe(1, own, folder.path());
            let line = match ClassifyTask::open(recipe.own().unwrap(), 1, &Device::Cpu) {
                Ok(_) => panic!("{own}: not refused"),
                Err(e) => e.to_string(),
            };
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
        let set = stripes_of(20);
        for (own, words) in [
            ("model = { size = 'huge' }", "size is \"huge\""),
            ("model = { patch = 5 }", "multiples of the patch_size 5"),
            ("size = [30, 28]", "multiples of the patch_size 4"),
            ("model = { form = 'parallel' }", "expected whole"),
            ("model = { layer_scale = -1.0 }", "layer_scale is -1"),
        ] {
            let recipe = recipe(1, own, folder.path());
            let options: Options = recipe.own().unwrap();
            let line = options.config(&set).unwrap_err().to_string();
            assert!(line.contains(words) && !line.contains('\n'), "{line}");
        }
    }
}
