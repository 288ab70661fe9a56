//! Task `tav-published`: TAVDiffusion as published, from text to the latents of picture and sound.
//!
//! ```text
//! L = E |e_v - e(z_v, t, c, z_a)|^2 + a E |e_a - e(z_a, t, c, z_v)|^2 + b L_contrast        z = sqrt(abar_t) x + sqrt(1 - abar_t) e
//! ```
//!
//! t is the same for both streams of a clip. Codecs and text encoder stay as they are, and so do parts of the networks that are not named:
//! latents and states of captions are made once and kept on the device, so that steps repeat. What is written is a folder that
//! `fulgur generate` takes.
//!
//! Reference: TAVGBench (arXiv 2404.14381), sections 4 and 5; the weights of the terms were not published.

mod folder;
mod manifest;
mod options;
mod pool;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::write_png;
use fulgur_datasets::scenes::{ClipSpec, Split};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::diffusion::{Prediction, SolverConfig};
use fulgur_lightnet::params::Params;
use fulgur_tavdiffusion::contrast;
use fulgur_tavdiffusion::diffusion::Guidance;
use fulgur_tavdiffusion::published::{
    ClipSizes, Encoders, Made, Piece, Places, Predicted, PublishedGenerator, TavStart, TrainedTav, Words,
};
use serde_json::Value;

use self::folder::Folder;
pub(crate) use self::options::{Contrast, Options};
use self::pool::{Filling, Origin, Pool, Texts};
use super::mean::mean;
use super::mel_codec::spectrograms;
use super::video_codec::filmstrips;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

/// Share of clips that read the varied wording of their caption instead of the plain one.
const VARIED: f32 = 0.8;

/// The task.
pub(super) struct PublishedTask {
    options: Options,
    params: Params,
    trained: TrainedTav,
    compute: DType,
    pool: Pool,
    held_out: Pool,
    /// States of all texts `[M, L, c]`.
    states: Tensor,
    texts: Vec<String>,
    sizes: ClipSizes,
    /// Remaining signal power after each step.
    signal: Vec<f64>,
    folder: Folder,
    notes: Vec<String>,
}

/// One term of the loss each.
struct Terms {
    video: Tensor,
    audio: Tensor,
    aligned: Option<Tensor>,
}

impl PublishedTask {
    /// Builds the networks, loads what stays as it is, and fills the pool.
    ///
    /// # Errors
    /// Settings or folders that do not fit together, data that are missing, a pool that does not fit the device, `stop` set while it fills.
    pub(super) fn open(options: Options, seed: u64, device: &Device, stop: &AtomicBool) -> TaskResult<Self> {
        options.check()?;
        let compute = compute_dtype(device);
        let codecs = options.codec_places()?;
        let started = options.start.as_ref().map(|dir| Places::read(dir)).transpose()?;
        let start = started.as_ref().map(TavStart::read).transpose()?;
        let (unet, config) = options.network(start.as_ref().map(TavStart::config), &codecs)?;
        let own = |error: fulgur_tavdiffusion::error::Error| format!("[tav-published]: {error}");
        let size = [options.height, options.width];
        let sizes = Encoders::sizes_in(&codecs, options.frames, options.fps, size).map_err(own)?;
        let schedule = noise_schedule(started.as_ref())?;
        let params = Params::random(seed, device);
        let mut trained = TrainedTav::new(&config, &options.trained, start, &params, compute)
            .map_err(|error| format!("[tav-published]: {error}"))?;
        trained.networks.set_recompute(options.recompute);
        fits(&options, &trained, &sizes)?;
        if params.count() == 0 {
            return Err("[tav-published]: trained: the networks have none of these parts".into());
        }

        let spec = ClipSpec {
            width: options.width,
            height: options.height,
            fps: options.fps,
            duration_s: options.frames as f64 / options.fps,
            sample_rate: sizes.rate as u32,
        };
        let origin = Origin::open(&options, spec)?;
        let mut texts = Texts::new();
        let (pool, held_out, left_out) = {
            let encoders = Encoders::load(&codecs, compute, device)?;
            let mut filling = Filling {
                encoders: &encoders,
                sizes,
                spec,
                compute,
                device,
                stop,
                texts: &mut texts,
                left_out: std::collections::BTreeMap::new(),
            };
            match (&origin, &options.manifest) {
                (Origin::Listed(listed), Some(path)) => {
                    filling.left_out.clone_from(&listed.left_out);
                    let pool = filling.listed(path, &listed.trained)?;
                    (pool, filling.listed(path, &listed.held_out)?, filling.left_out)
                }
                (Origin::Composed(clips), _) => {
                    let pool = filling.composed(clips, Split::Train, options.pool)?;
                    let held_out = filling.composed(clips, Split::HeldOutCombination, options.validation)?;
                    (pool, held_out, filling.left_out)
                }
                (Origin::Listed(_), None) => return Err("[tav-published]: manifest is absent".into()),
            }
        };
        let states = {
            let words = Words::load(&codecs, compute, device)?;
            texts.states(&words, compute, stop)?
        };
        let notes = match left_out.is_empty() {
            true => Vec::new(),
            false => {
                let reasons: Vec<_> = left_out
                    .iter()
                    .map(|(reason, n)| format!("{n} {reason}"))
                    .collect();
                vec![format!("clips that are left out: {}", reasons.join(", "))]
            }
        };
        Ok(Self {
            signal: schedule.alpha_bars(),
            folder: Folder {
                unet,
                codecs,
                scheduler: started.and_then(|places| places.find(Piece::Scheduler).map(Path::to_owned)),
            },
            texts: texts.all,
            options,
            params,
            trained,
            compute,
            pool,
            held_out,
            states,
            sizes,
            notes,
        })
    }

    /// Adds to a batch what belongs to these steps of the schedule: weights of signal and noise, and waves for each network.
    fn at_steps(&self, batch: Batch, steps: &[usize]) -> TaskResult<Batch> {
        let n = steps.len();
        let column = |of: &dyn Fn(f64) -> f64| {
            let values: Vec<f32> = steps.iter().map(|&step| of(self.signal[step]) as f32).collect();
            Tensor::from_vec(values, n, &Device::Cpu)
        };
        let times: Vec<f32> = steps.iter().map(|&step| step as f32).collect();
        let networks = &self.trained.networks;
        let (Some(video), Some(audio)) = (networks.video(), networks.audio()) else {
            return Err("a network is missing".into());
        };
        Ok(batch
            .with("signal", column(&f64::sqrt)?)
            .with("spread", column(&|signal| (1.0 - signal).sqrt())?)
            .with("video_waves", video.waves(&times)?)
            .with("audio_waves", audio.waves(&times)?))
    }

    /// The terms of the loss of the clips that a batch chooses of `pool`.
    fn terms(&self, pool: &Pool, batch: &Batch) -> TaskResult<Terms> {
        let chosen = batch.get("chosen")?;
        let column = |name: &str, rank: usize| {
            let values = batch.get(name)?;
            let mut shape = vec![1; rank];
            shape[0] = values.dim(0)?;
            values.reshape(shape)
        };
        let noisy = |clean: &Tensor, noise: &str| {
            let clean = clean.index_select(chosen, 0)?.to_dtype(DType::F32)?;
            let signal = clean.broadcast_mul(&column("signal", clean.rank())?)?;
            let noise = batch
                .get(noise)?
                .broadcast_mul(&column("spread", clean.rank())?)?;
            (signal + noise)?.to_dtype(self.compute)
        };
        let video = noisy(&pool.video, "video_noise")?;
        let audio = noisy(&pool.audio, "audio_noise")?;
        let text = self.states.index_select(batch.get("texts")?, 0)?;
        let waves = [batch.get("video_waves")?, batch.get("audio_waves")?];
        let made = self
            .trained
            .networks
            .forward_at(Some(&video), Some(&audio), waves, Some(&text))?;
        let Predicted {
            video: Some(video),
            audio: Some(audio),
            places: Some((heard, seen)),
        } = made
        else {
            return Err("a stream is missing".into());
        };
        let off =
            |made: &Tensor, noise: &str| mean(&(made.to_dtype(DType::F32)? - batch.get(noise)?)?.sqr()?);
        let aligned = match (self.options.contrast, self.trained.networks.alignment()) {
            (Contrast::Off, _) => None,
            (Contrast::Wti, Some(heads)) => Some(heads.loss(&heard, &seen)?),
            (Contrast::Wti, None) => return Err("the networks have no heads of an alignment".into()),
            (Contrast::Pooled, _) => {
                let pooled = |places: &Tensor| places.to_dtype(DType::F32)?.mean(1);
                Some(contrast::pooled(&pooled(&heard)?, &pooled(&seen)?)?)
            }
        };
        Ok(Terms {
            video: off(&video, "video_noise")?,
            audio: off(&audio, "audio_noise")?,
            aligned,
        })
    }

    /// A batch without its steps.
    fn chosen(&self, clips: Vec<u32>, texts: Vec<u32>, noise: [Vec<f32>; 2]) -> TaskResult<Batch> {
        let n = clips.len();
        let [video, audio] = noise;
        let shape = |own: &[usize]| [&[n], own].concat();
        Ok(Batch::new(n)
            .with("chosen", Tensor::from_vec(clips, n, &Device::Cpu)?)
            .with("texts", Tensor::from_vec(texts, n, &Device::Cpu)?)
            .with(
                "video_noise",
                Tensor::from_vec(video, shape(&self.sizes.video), &Device::Cpu)?,
            )
            .with(
                "audio_noise",
                Tensor::from_vec(audio, shape(&self.sizes.audio), &Device::Cpu)?,
            ))
    }

    /// Clips of the first `count` held-out captions, by the folder that is written to `to` for them.
    fn made(&self, to: &Path, count: usize) -> TaskResult<Option<Made>> {
        fs::create_dir_all(to).map_err(|error| format!("{}: {error}", to.display()))?;
        self.folder
            .write(to, &self.options, &self.trained, &self.params, false)?;
        let generator = PublishedGenerator::open(to, self.compute, self.params.device())?;
        let requests: Vec<_> = (0..count)
            .map(|clip| {
                let text = self.held_out.captions[clip][0] as usize;
                let mut request = generator.request(&self.texts[text]);
                request.seed = clip as u64;
                request.guidance = Guidance {
                    video: self.options.sample_guidance,
                    audio: self.options.sample_guidance,
                };
                request
            })
            .collect();
        Ok(generator.generate(&requests, &mut |_| true)?)
    }

    fn values(&self) -> [usize; 2] {
        [
            self.sizes.video.iter().product(),
            self.sizes.audio.iter().product(),
        ]
    }
}

/// What the folder `dir` says of its networks.
///
/// # Errors
/// As [`TavStart::config_in`].
pub(crate) fn described(dir: &Path) -> TaskResult<Value> {
    Ok(TavStart::config_in(&Places::read(dir)?)?)
}

/// The schedule of the folder that training starts from, or the published one.
fn noise_schedule(start: Option<&Places>) -> TaskResult<SolverConfig> {
    let Some(places) = start else {
        return Ok(SolverConfig::published());
    };
    let schedule = places.noise_schedule()?;
    if schedule.prediction_type != Prediction::Noise {
        return Err(format!(
            "[tav-published]: start: prediction_type is {:?}, expected epsilon, the noise",
            schedule.prediction_type
        )
        .into());
    }
    Ok(schedule)
}

/// Refuses clips and terms of the loss that the networks are not for.
fn fits(options: &Options, trained: &TrainedTav, sizes: &ClipSizes) -> TaskResult<()> {
    let networks = &trained.networks;
    let (Some(video), Some(audio)) = (networks.video(), networks.audio()) else {
        return Err("a network is missing".into());
    };
    let most = video.most_frames().unwrap_or(1);
    if sizes.video[1] > most {
        return Err(format!(
            "[tav-published]: frames is {}, expected at most {}: unet.motion.motion_max_seq_length is {most}, of {} frames each",
            options.frames,
            most * sizes.stride,
            sizes.stride
        )
        .into());
    }
    let (wide, narrow) = (video.bottleneck(), audio.bottleneck());
    if options.contrast == Contrast::Pooled && wide != narrow {
        return Err(format!(
            "[tav-published]: contrast is pooled and the narrowest places have {wide} and {narrow} channels, expected as many, or wti or off"
        )
        .into());
    }
    Ok(())
}

impl Task for PublishedTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn unit(&self) -> &'static str {
        "clips"
    }

    fn repeats(&self) -> bool {
        true
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let n = self.options.batch;
        let chosen = cursor.shuffled(self.pool.len(), n);
        let mut draw = cursor.noise("text");
        let texts = chosen
            .iter()
            .map(|&clip| {
                let [varied, plain] = self.pool.captions[clip];
                let own = if draw.chance(VARIED) { varied } else { plain };
                if draw.chance(self.options.text_dropout) {
                    0
                } else {
                    own
                }
            })
            .collect();
        let mut draw = cursor.noise("time");
        let last = self.signal.len() - 1;
        let steps: Vec<usize> = (0..n)
            .map(|_| ((draw.uniform() * self.signal.len() as f32) as usize).min(last))
            .collect();
        let [video, audio] = self.values();
        let noise = [
            cursor.noise("video").normals(n * video),
            cursor.noise("audio").normals(n * audio),
        ];
        let chosen = chosen.into_iter().map(|clip| clip as u32).collect();
        self.at_steps(self.chosen(chosen, texts, noise)?, &steps)
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let Terms {
            video,
            audio,
            aligned,
        } = self.terms(&self.pool, batch)?;
        let mut total = (&video + (&audio * self.options.audio_weight)?)?;
        let mut parts = vec![("video", video), ("audio", audio)];
        if let Some(aligned) = aligned {
            total = (total + (&aligned * self.options.contrast_weight)?)?;
            parts.push(("aligned", aligned));
        }
        Ok(Losses { total, parts })
    }

    /// The loss on held-out clips, at steps that are spread evenly and with noise that is the same in every validation.
    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let count = self.held_out.len();
        let (mut video, mut audio) = (0.0, 0.0);
        let clips: Vec<usize> = (0..count).collect();
        let [video_values, audio_values] = self.values();
        for some in clips.chunks(self.options.batch) {
            let noise = |name: &str, values: usize| -> Vec<f32> {
                some.iter()
                    .flat_map(|&clip| Philox::named(clip as u64, name).normals(values))
                    .collect()
            };
            let noise = [
                noise("validation.video", video_values),
                noise("validation.audio", audio_values),
            ];
            let texts = some.iter().map(|&clip| self.held_out.captions[clip][0]).collect();
            let numbers = some.iter().map(|&clip| clip as u32).collect();
            let steps: Vec<usize> = some
                .iter()
                .map(|&clip| ((clip as f64 + 0.5) / count as f64 * self.signal.len() as f64) as usize)
                .collect();
            let batch = self.at_steps(self.chosen(numbers, texts, noise)?, &steps)?;
            let terms = self.terms(&self.held_out, &batch.to_device(self.params.device())?)?;
            let share = some.len() as f64 / count as f64;
            video += f64::from(terms.video.to_scalar::<f32>()?) * share;
            audio += f64::from(terms.audio.to_scalar::<f32>()?) * share;
        }
        Ok(vec![
            ("loss".to_owned(), video + audio),
            ("video".to_owned(), video),
            ("audio".to_owned(), audio),
        ])
    }

    /// Clips of the first held-out captions, by the folder as it would be written now.
    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let count = self.options.samples.min(self.held_out.len());
        if count == 0 {
            return Ok(Vec::new());
        }
        let written = folder.join(format!("model-{step:06}.part"));
        let made = self.made(&written, count);
        // Also of what could not be made.
        if written.is_dir() {
            fs::remove_dir_all(&written).map_err(|error| format!("{}: {error}", written.display()))?;
        }
        let Some(made) = made? else {
            return Ok(Vec::new());
        };
        let rows: Vec<&[u8]> = made.clips.iter().map(|clip| clip.frames.as_slice()).collect();
        let pictures = filmstrips(&rows, self.options.width, self.options.height)?;
        let longest = made
            .clips
            .iter()
            .map(|clip| clip.samples.len())
            .max()
            .unwrap_or(0);
        let waves: Vec<f32> = made.clips.iter().flat_map(|clip| clip.samples.clone()).collect();
        let waves = Tensor::from_vec(waves, (count, longest), &Device::Cpu)?;
        let sounds = spectrograms(&LogMel::speech_16k(&Device::Cpu)?.forward(&waves)?)?;
        let paths = [
            folder.join(format!("video-{step:06}.png")),
            folder.join(format!("mel-{step:06}.png")),
        ];
        write_png(&paths[0], &pictures)?;
        write_png(&paths[1], &sounds)?;
        Ok(paths.to_vec())
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        let copies = self.options.copy_codecs;
        self.folder
            .write(folder, &self.options, &self.trained, &self.params, copies)
    }
}

/// Settings of a folder that is written.
pub(super) fn defaults(options: &Options) -> Value {
    serde_json::json!({
        "_class_name": "TavDiffusionPipeline",
        "frames": options.frames,
        "fps": options.fps,
        "width": options.width,
        "height": options.height,
        "steps": options.sample_steps,
        "guidance_video": options.sample_guidance,
        "guidance_audio": options.sample_guidance,
    })
}
