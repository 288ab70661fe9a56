//! Task `image`: pictures out of noise, by class and by text.
//!
//! Pixels are denoised as they are: the task is for small pictures. Everything that is random in a step is drawn with the batch, so that
//! steps repeat.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::augment::View;
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_datasets::media::{Picture, write_png};
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::diffusion::{Mixture, Objective};
use fulgur_lightnet::params::{Params, Precision};
use fulgur_lightnet::vision::{Dit, DitConfig, DitKind, Wanted};
use fulgur_tavdiffusion::text::TextModel;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::export::write_part;
use crate::device::compute_dtype;
use crate::paint::{Painter, Settings, TEXT_ENCODER, Wish, grid};
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Largest batch, longest side, most bytes of all pictures: beyond all reason.
const MOST: usize = 1 << 20;
const LONGEST_SIDE: usize = 1 << 12;
const MOST_BYTES: usize = 8 << 30;
/// Columns of the pictures that are drawn to be looked at, and most of them.
const COLUMNS: usize = 8;
const SAMPLES: usize = 32;
/// Captions that are encoded at once.
const TOGETHER: usize = 64;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// The data set: the name of a prepared one, a folder with a folder per class, or JSONL with captions.
    pub set: String,
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// Height and width of the pictures.
    pub size: [usize; 2],
    /// 1 for grey, 3 for colours; as in the set if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channels: Option<usize>,
    /// Whether the class of a picture steers it.
    pub classes: bool,
    /// Folder of the text encoder whose states of the captions steer it, if they do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<PathBuf>,
    /// Pictures in a batch.
    pub batch: usize,
    /// Held-out pictures of a validation.
    pub validation: usize,
    /// Share of pictures whose class is left open, and share of those whose text is: for guidance.
    pub dropout: f32,
    /// Whether pictures are mirrored, one in two.
    pub flip: bool,
    /// Steps and guidance of the pictures that are drawn to be looked at.
    pub sample_steps: usize,
    /// See above.
    pub sample_guidance: f64,
    /// The network.
    pub model: ModelOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            set: "emoji".to_owned(),
            data: "data".into(),
            size: [64, 64],
            channels: None,
            classes: true,
            text: None,
            batch: 128,
            validation: 256,
            dropout: 0.1,
            flip: false,
            sample_steps: 24,
            sample_guidance: 3.0,
            model: ModelOptions::default(),
        }
    }
}

/// The network of a recipe.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ModelOptions {
    /// Side of a patch.
    pub patch: usize,
    /// Layers.
    pub layers: usize,
    /// Width.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Hidden width of the gated linear units.
    pub hidden: usize,
    /// Every so many layers one reads the text.
    pub text_every: usize,
    /// Whether gated linear units see neighbours.
    pub token_shift: bool,
    /// What it predicts.
    pub objective: Objective,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            patch: 4,
            layers: 8,
            width: 256,
            heads: 4,
            hidden: 352,
            text_every: 2,
            token_shift: true,
            objective: Objective::Flow,
        }
    }
}

/// Pictures of a part of the set, one behind the other.
struct Pixels {
    bytes: Vec<u8>,
    labels: Vec<Option<usize>>,
    /// Numbers of their captions.
    captions: Vec<usize>,
}

/// States of all captions.
struct Captions {
    /// The first one is empty.
    texts: Vec<String>,
    /// `[length, width]` of each.
    states: Vec<Vec<f32>>,
    width: usize,
    longest: usize,
}

/// The task.
pub(super) struct ImageTask {
    options: Options,
    channels: usize,
    trained: Pixels,
    held_out: Pixels,
    captions: Option<Captions>,
    text: Option<TextModel>,
    params: Params,
    model: Dit,
}

impl Options {
    /// # Errors
    /// What cannot be.
    fn check(&self) -> TaskResult<()> {
        let [height, width] = self.size;
        let counts = [
            ("batch", self.batch, MOST),
            ("size", height, LONGEST_SIDE),
            ("size", width, LONGEST_SIDE),
            ("sample_steps", self.sample_steps, 1000),
        ];
        for (field, found, most) in counts {
            if !(1..=most).contains(&found) {
                return Err(format!("[image]: {field} is {found}, expected 1 to {most}").into());
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!(
                "[image]: dropout is {}, expected 0 or more and below 1",
                self.dropout
            )
            .into());
        }
        if !self.sample_guidance.is_finite() || self.sample_guidance < 0.0 {
            let found = self.sample_guidance;
            return Err(format!("[image]: sample_guidance is {found}, expected 0 or more").into());
        }
        if self.channels.is_some_and(|channels| !matches!(channels, 1 | 3)) {
            let found = self.channels.unwrap_or_default();
            return Err(format!("[image]: channels is {found}, expected 1 or 3").into());
        }
        Ok(())
    }

    /// The network for pictures of so many channels, these classes, and texts of this width.
    ///
    /// # Errors
    /// Settings that do not fit together.
    pub(super) fn config(
        &self,
        channels: usize,
        labels: Vec<String>,
        text_dim: Option<usize>,
    ) -> TaskResult<DitConfig> {
        self.check()?;
        let model = &self.model;
        let config = DitConfig {
            model_type: DitKind::VisionDit,
            image_size: self.size,
            num_channels: channels,
            patch_size: model.patch,
            hidden_size: model.width,
            num_hidden_layers: model.layers,
            num_attention_heads: model.heads,
            intermediate_size: model.hidden,
            labels: if self.classes { labels } else { Vec::new() },
            text_dim,
            text_every: model.text_every,
            token_shift: model.token_shift,
            objective: model.objective,
        };
        config.check().map_err(|e| {
            let words = e.to_string();
            format!("[image.model]: {}", words.lines().next().unwrap_or_default())
        })?;
        Ok(config)
    }
}

impl ImageTask {
    /// Opens the pictures and builds the network.
    ///
    /// # Errors
    /// Settings that do not fit together, a set that is not there, or a text encoder that cannot be read.
    pub(super) fn open(options: Options, seed: u64, device: &Device) -> TaskResult<Self> {
        options.check()?;
        let mut set = Labelled::open(&options.set, &options.data)?;
        set.drop_broken();
        if options.classes {
            set.check_classes()?;
        }
        let channels = options.channels.unwrap_or(if set.is_grey() { 1 } else { 3 });
        let mut texts = vec![String::new()];
        let trained = Pixels::read(&set, Part::Train, &options, channels, &mut texts)?;
        let held_out = Pixels::read(&set, Part::HeldOut, &options, channels, &mut texts)?;
        if trained.labels.is_empty() {
            return Err(format!("[image]: set {:?}: found no pictures to train on", options.set).into());
        }
        let text = options.text.as_ref();
        let text = text.map(|folder| TextModel::load(folder, device)).transpose()?;
        let captions = text
            .as_ref()
            .map(|model| Captions::encode(model, texts))
            .transpose()?;
        let width = captions.as_ref().map(|captions| captions.width);
        let config = options.config(channels, set.classes().to_vec(), width)?;
        let params = Params::random(seed, device);
        let model = Dit::new(&config, compute_dtype(device), &params.builder())?;
        Ok(Self {
            options,
            channels,
            trained,
            held_out,
            captions,
            text,
            params,
            model,
        })
    }

    /// Values of a picture.
    fn values(&self) -> usize {
        let [height, width] = self.options.size;
        height * width * self.channels
    }

    /// A batch of these pictures of `from`, at these times, with noise, what is left open and what is mirrored out of `draw`.
    fn prepared(
        &self,
        from: &Pixels,
        chosen: &[usize],
        times: Vec<f32>,
        dropout: f32,
        flip: bool,
        draw: &dyn Fn(&str) -> Philox,
    ) -> TaskResult<Batch> {
        let (count, size) = (chosen.len(), self.values());
        let [height, width] = self.options.size;
        let shape = (count, height, width, self.channels);
        let mut mirrors = draw("flip");
        let mirrored: Vec<bool> = chosen.iter().map(|_| flip && mirrors.chance(0.5)).collect();
        let mut clean = vec![0f32; count * size];
        let pictures = clean.par_chunks_mut(size).zip(chosen).zip(&mirrored);
        pictures.for_each(|((to, &index), &mirrored)| {
            let bytes = &from.bytes[index * size..][..size];
            let row = width * self.channels;
            for (to, from) in to.chunks_exact_mut(row).zip(bytes.chunks_exact(row)) {
                let pixels = to.chunks_exact_mut(self.channels).enumerate();
                for (x, pixel) in pixels {
                    let x = if mirrored { width - 1 - x } else { x };
                    for (to, &byte) in pixel.iter_mut().zip(&from[x * self.channels..]) {
                        *to = f32::from(byte) / 127.5 - 1.0;
                    }
                }
            }
        });
        let noise = draw("noise").normals(count * size);
        let mixture = self.options.model.objective.mixture(&times, &Device::Cpu)?;
        let mut batch = Batch::new(count)
            .with("clean", Tensor::from_vec(clean, shape, &Device::Cpu)?)
            .with("noise", Tensor::from_vec(noise, shape, &Device::Cpu)?)
            .with("signal", mixture.signal)
            .with("spread", mixture.noise)
            .with("time", Tensor::from_vec(times, count, &Device::Cpu)?);
        if !self.model.config().labels.is_empty() {
            let none = self.model.no_class();
            let mut open = draw("class");
            let ids: Vec<u32> = chosen
                .iter()
                .map(|&index| match from.labels[index] {
                    Some(label) if !open.chance(dropout) => label as u32,
                    _ => none,
                })
                .collect();
            batch = batch.with_ids("classes", Ids::new(&ids, &[count], none as usize + 1)?);
        }
        if let Some(captions) = &self.captions {
            let mut open = draw("text");
            let numbers: Vec<usize> = chosen
                .iter()
                .map(|&index| {
                    if open.chance(dropout) {
                        0
                    } else {
                        from.captions[index]
                    }
                })
                .collect();
            let [states, mask] = captions.padded(&numbers)?;
            batch = batch.with("states", states).with("mask", mask);
        }
        Ok(batch)
    }

    /// Mean square of what the prediction is off by.
    fn error(&self, batch: &Batch) -> TaskResult<Tensor> {
        let mixture = Mixture {
            signal: batch.get("signal")?.clone(),
            noise: batch.get("spread")?.clone(),
        };
        let objective = self.options.model.objective;
        let (x, target) = objective.noisy(batch.get("clean")?, batch.get("noise")?, &mixture)?;
        let wanted = Wanted {
            classes: batch.ids.get("classes"),
            text: match &self.captions {
                Some(_) => Some((batch.get("states")?, batch.get("mask")?)),
                None => None,
            },
        };
        let found = self.model.forward(&x, batch.get("time")?, &wanted)?;
        Ok((found - target)?.sqr()?.mean_all()?)
    }

    /// What the pictures that are drawn to be looked at shall be: classes in turn, or held-out captions.
    fn wishes(&self) -> Vec<Wish> {
        let labels = self.model.config().labels.len();
        let count = self.held_out.labels.len();
        (0..SAMPLES)
            .map(|i| {
                let texts = self.captions.as_ref().filter(|_| count > 0);
                let place = i * count / SAMPLES;
                match texts {
                    Some(captions) => Wish {
                        class: self.held_out.labels[place].filter(|_| labels > 0),
                        prompt: captions.texts[self.held_out.captions[place]].clone(),
                    },
                    None => Wish {
                        class: (labels > 0).then_some(i % labels.max(1)),
                        prompt: String::new(),
                    },
                }
            })
            .collect()
    }
}

impl Task for ImageTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "pictures"
    }

    fn repeats(&self) -> bool {
        true
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let chosen = cursor.shuffled(self.trained.labels.len(), self.options.batch);
        let mut draw = cursor.noise("time");
        let objective = self.options.model.objective;
        let times = (0..chosen.len())
            .map(|_| objective.time(draw.uniform(), draw.normal()))
            .collect();
        let Options { dropout, flip, .. } = self.options;
        self.prepared(&self.trained, &chosen, times, dropout, flip, &|purpose| {
            cursor.noise(purpose)
        })
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        Ok(self.error(batch)?.into())
    }

    /// The loss on held-out pictures, at times that are spread evenly and the same in every validation.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let count = self.held_out.labels.len().min(self.options.validation);
        let mut sum = 0.0;
        let all: Vec<usize> = (0..count).collect();
        for (number, chosen) in all.chunks(self.options.batch).enumerate() {
            let times = chosen
                .iter()
                .map(|&i| ((i as f32 + 0.5) * 0.618_034).fract())
                .collect();
            let draw = |purpose: &str| Philox::named(0, &format!("validation/{purpose}/{number}"));
            let batch = self.prepared(&self.held_out, chosen, times, 0.0, false, &draw)?;
            let batch = batch.to_device(self.params.device())?;
            let error = self.error(&batch)?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
            sum += f64::from(error) * chosen.len() as f64;
        }
        Ok(match count {
            0 => Vec::new(),
            _ => vec![("loss".to_owned(), sum / count as f64)],
        })
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let painter = Painter {
            dit: &self.model,
            text: self.text.as_ref(),
        };
        let settings = Settings {
            steps: self.options.sample_steps,
            guidance: self.options.sample_guidance,
            shift: 1.0,
            seed: 0,
            size: self.options.size,
        };
        let Some(pictures) = painter.paint(&self.wishes(), &settings, None, &mut |_| true)? else {
            return Ok(Vec::new());
        };
        let path = folder.join(format!("pictures-{step:06}.png"));
        write_png(&path, &grid(&pictures, COLUMNS)?)?;
        Ok(vec![path])
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, self.model.config(), &self.params, None, Precision::F32)?;
        if let Some(from) = &self.options.text {
            let to = folder.join(TEXT_ENCODER);
            fs::create_dir_all(&to)?;
            for name in ["config.json", "model.safetensors", "tokenizer.json"] {
                fs::copy(from.join(name), to.join(name))
                    .map_err(|e| format!("{}: {e}", from.join(name).display()))?;
            }
        }
        Ok(())
    }
}

impl Pixels {
    fn read(
        set: &Labelled,
        part: Part,
        options: &Options,
        channels: usize,
        texts: &mut Vec<String>,
    ) -> TaskResult<Self> {
        let chosen = set.part(part);
        let [height, width] = options.size;
        let size = height * width * channels;
        if chosen.len().saturating_mul(size) > MOST_BYTES {
            return Err(format!(
                "[image]: {} pictures of {width}x{height}, expected at most {MOST_BYTES} bytes of them",
                chosen.len()
            )
            .into());
        }
        let mut bytes = vec![0u8; chosen.len() * size];
        let view = View::filled(options.size);
        bytes
            .par_chunks_mut(size)
            .zip(&chosen)
            .try_for_each(|(to, &index)| {
                let picture = view.middle(&set.picture(index)?)?;
                to.copy_from_slice(&levels(picture, channels));
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            })?;
        let mut numbers: BTreeMap<String, usize> = texts.iter().cloned().zip(0..).collect();
        let captions = chosen
            .iter()
            .map(|&index| {
                let caption = set.caption(index).unwrap_or_default();
                *numbers.entry(caption.to_owned()).or_insert_with(|| {
                    texts.push(caption.to_owned());
                    texts.len() - 1
                })
            })
            .collect();
        Ok(Self {
            bytes,
            labels: chosen.iter().map(|&index| set.label(index)).collect(),
            captions,
        })
    }
}

/// Bytes of one channel, the mean of the colours, or of three.
pub(crate) fn levels(picture: Picture, channels: usize) -> Vec<u8> {
    let mean = |pixel: &[u8]| (pixel.iter().map(|&byte| u32::from(byte)).sum::<u32>() / 3) as u8;
    match channels {
        1 => picture.pixels.chunks_exact(3).map(mean).collect(),
        _ => picture.pixels,
    }
}

impl Captions {
    fn encode(model: &TextModel, texts: Vec<String>) -> TaskResult<Self> {
        let mut states = Vec::with_capacity(texts.len());
        let (mut width, mut longest) = (0, 0);
        for texts in texts.chunks(TOGETHER) {
            let found = model.encode(texts)?;
            width = found.states.dim(2)?;
            let lengths: Vec<f32> = found.mask.to_dtype(DType::F32)?.sum(1)?.to_vec1()?;
            let rows = found.states.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
            for (i, length) in lengths.into_iter().enumerate() {
                let length = length as usize;
                longest = longest.max(length);
                states.push(rows.get(i)?.narrow(0, 0, length)?.flatten_all()?.to_vec1()?);
            }
        }
        Ok(Self {
            texts,
            states,
            width,
            longest,
        })
    }

    /// States `[B, L, c]` of these captions and their mask `[B, L]`, L the longest of all.
    fn padded(&self, numbers: &[usize]) -> candle_core::Result<[Tensor; 2]> {
        let room = self.longest * self.width;
        let mut states = vec![0f32; numbers.len() * room];
        let mut mask = vec![0f32; numbers.len() * self.longest];
        let rows = states
            .chunks_exact_mut(room)
            .zip(mask.chunks_exact_mut(self.longest));
        for ((row, mask), &number) in rows.zip(numbers) {
            let own = &self.states[number];
            row[..own.len()].copy_from_slice(own);
            mask[..own.len() / self.width].fill(1.0);
        }
        let count = numbers.len();
        Ok([
            Tensor::from_vec(states, (count, self.longest, self.width), &Device::Cpu)?,
            Tensor::from_vec(mask, (count, self.longest), &Device::Cpu)?,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paint::Model;
    use crate::train::{Options as RunOptions, Recipe, run};

    /// Two classes of flat pictures, bright and dark, as files in folders.
    fn folder(root: &Path) {
        for (name, level) in [("bright", 220u8), ("dark", 30)] {
            fs::create_dir_all(root.join(name)).unwrap();
            for i in 0..24u8 {
                let picture = Picture::new(vec![level + i % 5; 9 * 9 * 3], 9, 9, 3).unwrap();
                write_png(&root.join(name).join(format!("{i}.png")), &picture).unwrap();
            }
        }
    }

    fn recipe(own: &str, root: &Path) -> Recipe {
        let text = format!(
            "task = 'image'\n[train]\nmax_steps = 260\nema = 0.0\ncheckpoint_seconds = 1e9\n[optimiser]\nlr = 5e-3\n[schedule]\n\
             warmup = 20\n[image]\nset = '{}'\n{own}\n",
            root.join("set").display()
        );
        Recipe::check(text.parse().unwrap(), "test".into(), &root.join("run")).unwrap()
    }

    const SMALL: &str = "size = [8, 8]\nchannels = 1\nbatch = 16\nsample_steps = 4\n[image.model]\npatch = 4\nlayers = 1\nwidth = 16\n\
                         heads = 2\nhidden = 16";

    #[test]
    fn classes_are_learnt_and_the_exported_model_draws_them() {
        let root = tempfile::tempdir().unwrap();
        folder(&root.path().join("set"));
        let recipe = recipe(SMALL, root.path());
        let task = ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        assert_eq!(task.trained.labels.len() + task.held_out.labels.len(), 48);
        let before = task.validate().unwrap();
        run(&task, &recipe, &RunOptions::default(), |_| {}).unwrap();
        let after = task.validate().unwrap();
        assert!(after[0].1 < 0.5 * before[0].1, "{before:?} {after:?}");
        let model = Model::load(&recipe.run_dir.join("model"), &Device::Cpu).unwrap();
        let class = |name: &str| Wish {
            class: Some(model.class(name).unwrap()),
            ..Wish::default()
        };
        let settings = Settings {
            steps: 12,
            guidance: 1.5,
            shift: 1.0,
            seed: 1,
            size: [8, 8],
        };
        let wishes = [class("bright"), class("dark")];
        let drawn = model.painter().paint(&wishes, &settings, None, &mut |_| true);
        let levels: Vec<f64> = drawn
            .unwrap()
            .unwrap()
            .iter()
            .map(|picture| {
                let sum: f64 = picture.pixels.iter().map(|&byte| f64::from(byte)).sum();
                sum / picture.pixels.len() as f64
            })
            .collect();
        assert!(levels[0] > levels[1] + 90.0, "{levels:?}");
        let shown = task.sample(root.path(), 7).unwrap();
        assert!(shown[0].ends_with("pictures-000007.png") && shown[0].exists());
    }

    #[test]
    fn batches_are_functions_of_their_number() {
        let root = tempfile::tempdir().unwrap();
        folder(&root.path().join("set"));
        let recipe = recipe(&format!("flip = true\ndropout = 0.5\n{SMALL}"), root.path());
        let task = ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu).unwrap();
        let batch = |index| task.batch(&Cursor { seed: 3, index }).unwrap();
        let values = |batch: &Batch, name: &str| -> Vec<f32> {
            let tensor = batch.get(name).unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        for name in ["clean", "noise", "time"] {
            assert_eq!(values(&batch(1), name), values(&batch(1), name));
        }
        assert_ne!(values(&batch(1), "noise"), values(&batch(0), "noise"));
        let ids: Vec<u32> = (0..8)
            .flat_map(|i| batch(i).ids("classes").unwrap().list().to_vec())
            .collect();
        let open = ids.iter().filter(|&&id| id == 2).count();
        assert!((40..90).contains(&open), "{open} of {} left open", ids.len());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let root = tempfile::tempdir().unwrap();
        folder(&root.path().join("set"));
        for (own, words) in [
            ("batch = 0", "batch is 0, expected 1 to"),
            ("dropout = 1.0", "dropout is 1, expected 0 or more and below 1"),
            ("channels = 2", "channels is 2, expected 1 or 3"),
            ("size = [8, 9]\n[image.model]\npatch = 4", "image_size is [8, 9]"),
            ("text = 'nowhere'", "nowhere"),
        ] {
            let recipe = recipe(own, root.path());
            let line = match ImageTask::open(recipe.own().unwrap(), 1, &Device::Cpu) {
                Ok(_) => panic!("{own}"),
                Err(error) => error.to_string(),
            };
            assert!(line.contains(words), "{own}: {line}");
        }
    }
}
