//! Task `image`: pictures out of noise, by class and by text.
//!
//! Pixels of small pictures are denoised as they are, those of larger ones as latents of a codec of pictures, which are encoded once.
//! Everything that is random in a step is drawn with the batch, so that steps repeat.

mod captions;
mod examples;
mod options;

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::labelled::{Labelled, Part};
use fulgur_datasets::media::write_png;
use fulgur_kernels::embedding::Ids;
use fulgur_kernels::philox::Philox;
use fulgur_lightnet::diffusion::Mixture;
use fulgur_lightnet::params::{Params, Precision};
use fulgur_lightnet::vision::{Dit, Wanted};
use fulgur_tavdiffusion::codec::PictureCodec;
use fulgur_tavdiffusion::text::TextModel;

use self::captions::{Captions, Texts};
use self::examples::{Encoding, Examples};
pub(super) use self::options::Options;
use super::export::{copy_part, write_part};
use super::pictures::mirrors;
use crate::device::compute_dtype;
use crate::paint::{CODEC, Painter, Settings, TEXT_ENCODER, Wish, grid};
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Columns of the pictures that are drawn to be looked at, and most of them.
const COLUMNS: usize = 8;
const SAMPLES: usize = 32;

/// The task.
pub(super) struct ImageTask {
    options: Options,
    trained: Examples,
    held_out: Examples,
    captions: Option<Captions>,
    text: Option<TextModel>,
    codec: Option<PictureCodec>,
    params: Params,
    model: Dit,
}

impl ImageTask {
    /// Opens the pictures, encodes them where latents are denoised, and builds the network.
    ///
    /// # Errors
    /// Settings that do not fit together, a set that is not there, a text encoder or a codec that cannot be read, or a stop.
    pub(super) fn open(options: Options, seed: u64, device: &Device, stop: &AtomicBool) -> TaskResult<Self> {
        options.check()?;
        let mut set = Labelled::open(&options.set, &options.data)?;
        set.drop_broken();
        if options.classes {
            set.check_classes()?;
        }
        let codec = options.codec.as_ref().map(|folder| {
            PictureCodec::load(folder, device).map_err(|error| format!("[image]: codec: {error}"))
        });
        let codec = codec.transpose()?;
        let space = options.space(set.is_grey(), codec.as_ref().map(PictureCodec::config))?;
        // What cannot be is refused before pictures are read and encoded; the text is not known yet.
        options.config(&space, set.classes().to_vec(), None)?;
        let mut texts = Texts::new();
        let mut read = |part, flip| {
            let encoding = codec.as_ref().map(|codec| Encoding {
                codec,
                device,
                flip,
                stop,
            });
            Examples::read(&set, part, space, encoding.as_ref(), &mut texts)
        };
        let trained = read(Part::Train, options.flip)?;
        let held_out = read(Part::HeldOut, false)?;
        if trained.len() == 0 {
            return Err(format!("[image]: set {:?}: found no pictures to train on", options.set).into());
        }
        let text = options.text.as_ref();
        let text = text.map(|folder| TextModel::load(folder, device)).transpose()?;
        let captions = text
            .as_ref()
            .map(|model| Captions::encode(model, texts))
            .transpose()?;
        let width = captions.as_ref().map(|captions| captions.width);
        let config = options.config(&space, set.classes().to_vec(), width)?;
        let params = Params::random(seed, device);
        let model = Dit::new(&config, compute_dtype(device), &params.builder())?;
        Ok(Self {
            options,
            trained,
            held_out,
            captions,
            text,
            codec,
            params,
            model,
        })
    }

    /// A batch of these pictures of `from`, at these times, with noise, what is left open and what is mirrored out of `draw`.
    fn prepared(
        &self,
        from: &Examples,
        chosen: &[usize],
        times: Vec<f32>,
        dropout: f32,
        flip: bool,
        draw: &dyn Fn(&str) -> Philox,
    ) -> TaskResult<Batch> {
        let count = chosen.len();
        let clean = from.values(chosen, &mirrors(count, flip, draw("flip")))?;
        let noise = draw("noise").normals(clean.elem_count());
        let noise = Tensor::from_vec(noise, clean.shape(), &Device::Cpu)?;
        let mixture = self.options.model.objective.mixture(&times, &Device::Cpu)?;
        let mut batch = Batch::new(count)
            .with("clean", clean)
            .with("noise", noise)
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
        let count = self.held_out.len();
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
        let chosen = cursor.shuffled(self.trained.len(), self.options.batch);
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
        let count = self.held_out.len().min(self.options.validation);
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
            codec: self.codec.as_ref(),
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
            let names = ["config.json", "model.safetensors", "tokenizer.json"];
            copy_part(from, &folder.join(TEXT_ENCODER), &names)?;
        }
        if let Some(from) = &self.options.codec {
            copy_part(from, &folder.join(CODEC), &["config.json", "model.safetensors"])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
