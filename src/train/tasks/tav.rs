//! Task `tav`: the two-stream denoiser, from text to the latents of picture and sound.
//!
//! Codecs and text encoder are frozen. Latents of many clips are computed once and kept on the device: the pool is a pure
//! function of the recipe, so that a resumed run sees the same data.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::media::{Picture, write_png};
use fulgur_datasets::scenes::Split;
use fulgur_kernels::philox::Philox;
use fulgur_kernels::spectrum::LogMel;
use fulgur_lightnet::config;
use fulgur_lightnet::params::{Frozen, Params, Precision};
use fulgur_tavdiffusion::codec::{MelCodec, VideoCodec};
use fulgur_tavdiffusion::contrast;
use fulgur_tavdiffusion::denoiser::{LatentShape, Latents, TextCondition, noise};
use fulgur_tavdiffusion::diffusion::{Guidance, Mixture, Objective, Prompts, Sampler, sample};
use fulgur_tavdiffusion::streams::{TwoStream, TwoStreamConfig};
use fulgur_tavdiffusion::text::{TextBatch, TextModel};
use serde::{Deserialize, Serialize};

use super::check_stop;
use super::clips::{
    ClipOptions, Clips, HostClip, Want, frames_tensor, mask_tensor, render, samples_tensor, to_unit,
};
use super::export::write_part;
use super::mel_codec::spectrograms;
use super::video_codec::filmstrips;
use crate::device::compute_dtype;
use crate::train::{Batch, Cursor, Losses, Step, Task, TaskResult};

const WANT: Want = Want {
    frames: true,
    mask: true,
    samples: true,
};
/// Clips that are drawn at a time, enough to keep many cores busy.
const RENDERED: usize = 128;
/// Clips that are encoded at a time.
const ENCODED: usize = 32;
/// What makes a quarter whole.
const QUARTER: f64 = 4.0;
/// Clips of a sheet of samples.
const SAMPLES: usize = 6;

/// Recipe of the task.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Clips.
    pub clips: ClipOptions,
    /// Clips in a batch.
    pub batch: usize,
    /// Clips in the pool of latents.
    pub pool: usize,
    /// Folder of the trained video codec.
    pub video_codec: PathBuf,
    /// Folder of the trained mel codec.
    pub mel_codec: PathBuf,
    /// Folder of the trained text encoder.
    pub text_encoder: PathBuf,
    /// Share of samples that see the empty prompt instead of their own.
    pub text_dropout: f32,
    /// Weight of the sound's loss over the picture's.
    pub audio_weight: f64,
    /// How much more the picture's loss weighs where things are: `1 + thing_weight (1 - t)` at diffusion time t, for
    /// they cover a few hundredths of a clip. At the noisy end, where it is open yet what comes where, nothing is added:
    /// a weight that follows the clip would shift what the network expects there.
    pub thing_weight: f64,
    /// Weight of the contrastive alignment of the streams.
    pub contrast_weight: f64,
    /// Held-out scenes of a validation.
    pub validation: usize,
    /// Steps of the sampler for samples.
    pub sample_steps: usize,
    /// Guidance of both streams for samples.
    pub sample_guidance: f64,
    /// The network.
    pub model: TwoStreamConfig,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            clips: clip_options(),
            batch: 128,
            pool: 16_000,
            video_codec: "runs/video-codec/model".into(),
            mel_codec: "runs/mel-codec/model".into(),
            text_encoder: "runs/text/model".into(),
            text_dropout: 0.1,
            audio_weight: 1.0,
            thing_weight: 3.0,
            contrast_weight: 0.1,
            validation: 128,
            sample_steps: 16,
            sample_guidance: 5.0,
            model: TwoStreamConfig::default(),
        }
    }
}

/// The scenes that generators learn from unless a recipe says otherwise: fewer of them before photographs, whose grain
/// costs more learning than it shows, and fewer of two things than other tasks see.
pub(crate) fn clip_options() -> ClipOptions {
    ClipOptions {
        pictures: 0.1,
        two_things: 0.15,
        ..ClipOptions::default()
    }
}

/// The task.
pub(super) struct TavTask {
    options: Options,
    params: Params,
    denoiser: TwoStream,
    video: VideoCodec,
    mel_codec: MelCodec,
    text: TextModel,
    pool: Pool,
    held_out: Pool,
    shape: LatentShape,
    size: (usize, usize),
}

/// Latents on the device and the captions that belong to them.
struct Pool {
    latents: Latents,
    /// Where things are, 0 to 1, for each video latent: `[B, F/4, H/8, W/8, 1]`.
    things: Tensor,
    captions: Vec<[String; 2]>,
}

/// What turns clips into latents.
struct Encoders<'a> {
    clips: &'a Clips,
    video: &'a VideoCodec,
    mel_codec: &'a MelCodec,
    mel: LogMel,
    compute: DType,
    device: &'a Device,
    stop: &'a AtomicBool,
}

impl TavTask {
    /// Builds the network, loads what is frozen and fills the pool.
    ///
    /// # Errors
    /// Data or models that are missing, a pool that does not fit the device, `stop` set while it fills.
    pub(super) fn open(options: Options, seed: u64, device: &Device, stop: &AtomicBool) -> TaskResult<Self> {
        if options.pool == 0 || options.validation == 0 || options.batch == 0 {
            return Err("pool, validation and batch: found 0, expected 1 or more".into());
        }
        let clips = Clips::open(&options.clips)?;
        let compute = compute_dtype(device);
        let dir = &options.video_codec;
        let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
        let video = VideoCodec::new(&config::read(&dir.join("config.json"))?, true, &weights.builder())?;
        let dir = &options.mel_codec;
        let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
        let mel_codec = MelCodec::new(&config::read(&dir.join("config.json"))?, true, &weights.builder())?;
        let text = TextModel::load(&options.text_encoder, device)?;
        let params = Params::random(seed, device);
        let denoiser = TwoStream::new(&options.model, true, compute, &params.builder())?;
        let spec = clips.spec();
        let mel = LogMel::speech_16k(device)?;
        let [t, h, w] = video.grid(spec.frames(), spec.height, spec.width)?;
        let [s, bands] = mel_codec.grid(mel.frames(spec.samples()))?;
        let shape = LatentShape {
            video: [t, h, w, video.config().latent_channels],
            audio: [s, bands, mel_codec.config().latent_channels],
        };
        let encoders = Encoders {
            clips: &clips,
            video: &video,
            mel_codec: &mel_codec,
            mel,
            compute,
            device,
            stop,
        };
        let pool = encoders.pool(Split::Train, options.pool, DType::BF16)?;
        let held_out = encoders.pool(Split::HeldOutCombination, options.validation, DType::F32)?;
        let size = (spec.width, spec.height);
        Ok(Self {
            options,
            params,
            denoiser,
            video,
            mel_codec,
            text,
            pool,
            held_out,
            shape,
            size,
        })
    }

    fn objective(&self) -> Objective {
        self.options.model.objective
    }

    fn text_condition(&self, ids: &Tensor, mask: &Tensor) -> TaskResult<TextCondition> {
        let states = self.text.encoder().forward(ids, mask, None)?;
        Ok(TextCondition {
            states: states.states.detach(),
            mask: states.mask.detach(),
        })
    }

    /// Losses of picture, sound and alignment for clean latents at given times; `weight` is that of the picture's latents.
    fn losses(
        &self,
        clean: &Latents,
        noise: &Latents,
        time: &Tensor,
        mixture: &Mixture,
        text: &TextCondition,
        weight: Option<&Tensor>,
    ) -> TaskResult<(Tensor, Tensor, Option<Tensor>)> {
        let objective = self.objective();
        let (video, video_target) = objective.noisy(&clean.video, &noise.video, mixture)?;
        let (audio, audio_target) = objective.noisy(&clean.audio, &noise.audio, mixture)?;
        let (made, features) = self.denoiser.forward(&Latents { video, audio }, time, text)?;
        let square = |a: &Tensor, b: &Tensor| (a - b)?.sqr();
        let aligned = features
            .map(|(seen, heard)| contrast::pooled(&seen, &heard))
            .transpose()?;
        let mut video = square(&made.video, &video_target)?;
        if let Some(weight) = weight {
            video = video.broadcast_mul(weight)?;
        }
        let audio = square(&made.audio, &audio_target)?;
        Ok((video.mean_all()?, audio.mean_all()?, aligned))
    }

    /// Clips of the first held-out captions, as latents.
    fn sampled(&self, n: usize) -> TaskResult<Option<Latents>> {
        let captions: Vec<&str> = self
            .held_out
            .captions
            .iter()
            .take(n)
            .map(|c| c[0].as_str())
            .collect();
        let text = TextCondition::from(self.text.encode(&captions)?);
        let negative = TextCondition::from(self.text.encode(&vec![""; captions.len()])?);
        let seeds: Vec<u64> = (0..captions.len() as u64).collect();
        let start = noise(&self.shape, &seeds, self.params.device())?;
        let steps = self.options.sample_steps;
        let sampler = Sampler {
            objective: self.objective(),
            steps,
            shift: 1.5,
        };
        let prompts = Prompts {
            text,
            negative,
            audio_negative: None,
        };
        let scale = self.options.sample_guidance;
        let guidance = Guidance {
            video: scale,
            audio: scale,
        };
        Ok(sample(
            &sampler,
            &self.denoiser,
            &start,
            &prompts,
            guidance,
            &mut |_| true,
        )?)
    }
}

impl Encoders<'_> {
    /// Latents of the first `n` scenes of `split`; the next clips are drawn while the last ones are encoded.
    fn pool(&self, split: Split, n: usize, dtype: DType) -> TaskResult<Pool> {
        let (mut video, mut audio, mut things) = (Vec::new(), Vec::new(), Vec::new());
        let mut captions = Vec::with_capacity(n);
        let clips = self.clips;
        std::thread::scope(|scope| {
            let (sender, rendered) = std::sync::mpsc::sync_channel(1);
            scope.spawn(move || {
                for start in (0..n).step_by(RENDERED) {
                    let chunk = render(RENDERED.min(n - start), |i| {
                        clips.scene(split, (start + i) as u64, WANT)
                    });
                    // The receiver leaves early on an error or a stop.
                    if sender.send(chunk).is_err() {
                        return;
                    }
                }
            });
            for chunk in rendered {
                for clips in chunk.chunks(ENCODED) {
                    check_stop(self.stop, "the pool of latents was filled")?;
                    let latents = self.encode(clips)?;
                    video.push(latents.video.to_dtype(dtype)?);
                    audio.push(latents.audio.to_dtype(dtype)?);
                    let mask = mask_tensor(clips, &self.clips.spec())?.to_device(self.device)?;
                    things.push(coverage(&mask, latents.video.dims5()?)?.to_dtype(dtype)?);
                    captions.extend(
                        clips
                            .iter()
                            .filter_map(|clip| clip.scene.as_ref())
                            .map(|scene| [scene.caption.text.clone(), scene.caption.canonical.clone()]),
                    );
                }
            }
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        })?;
        let latents = Latents {
            video: Tensor::cat(&video, 0)?,
            audio: Tensor::cat(&audio, 0)?,
        };
        let things = Tensor::cat(&things, 0)?;
        Ok(Pool {
            latents,
            things,
            captions,
        })
    }

    fn encode(&self, clips: &[HostClip]) -> TaskResult<Latents> {
        let spec = self.clips.spec();
        let frames = to_unit(&frames_tensor(clips, &spec)?.to_device(self.device)?)?;
        let samples = samples_tensor(clips, &spec)?.to_device(self.device)?;
        let mel = self.mel.forward(&samples)?;
        Ok(Latents {
            video: self
                .video
                .encode(&frames.to_dtype(self.compute)?)?
                .to_dtype(DType::F32)?
                .detach(),
            audio: self
                .mel_codec
                .encode(&mel.to_dtype(self.compute)?)?
                .to_dtype(DType::F32)?
                .detach(),
        })
    }
}

/// Where things are, `[B, F/4, H/8, W/8, 1]`, from how much of each pixel they cover, bytes `[B, F, H, W, 1]`, for video
/// latents of shape `latents`: 1 from a quarter of a latent's pixels on.
fn coverage(
    mask: &Tensor,
    (b, t, h, w, _): (usize, usize, usize, usize, usize),
) -> candle_core::Result<Tensor> {
    let (_, frames, height, width, _) = mask.dims5()?;
    let cells = [b * t, frames / t, h, height / h, w, width / w];
    let share = mask.to_dtype(DType::F32)?.reshape(&cells)?.mean((1, 3, 5))?;
    share
        .affine(QUARTER / 255.0, 0.0)?
        .clamp(0.0, 1.0)?
        .reshape((b, t, h, w, 1))
}

impl Task for TavTask {
    fn params(&self) -> &Params {
        &self.params
    }

    fn batch(&self, cursor: &Cursor) -> TaskResult<Batch> {
        let n = self.options.batch;
        let chosen = cursor.shuffled(self.pool.captions.len(), n);
        let mut draw = cursor.noise("text");
        let texts: Vec<&str> = chosen
            .iter()
            .map(|&i| {
                let [varied, canonical] = &self.pool.captions[i];
                let words = if draw.chance(0.8) { varied } else { canonical };
                if draw.chance(self.options.text_dropout) {
                    ""
                } else {
                    words
                }
            })
            .collect();
        let longest = self.text.encoder().config().max_position_embeddings;
        let TextBatch { ids, mask, .. } = self.text.tokenizer().batch(&texts, longest, &Device::Cpu)?;
        let mut draw = cursor.noise("time");
        let time: Vec<f32> = (0..n)
            .map(|_| self.objective().time(draw.uniform(), draw.normal()))
            .collect();
        let mixture = self.objective().mixture(&time, &Device::Cpu)?;
        let noise_like = |shape: &[usize], purpose: &str| {
            let shape = [&[n], shape].concat();
            Tensor::from_vec(
                cursor.noise(purpose).normals(shape.iter().product()),
                shape,
                &Device::Cpu,
            )
        };
        let chosen: Vec<u32> = chosen.into_iter().map(|i| i as u32).collect();
        Ok(Batch::new(n)
            .with("chosen", Tensor::from_vec(chosen, n, &Device::Cpu)?)
            .with("ids", ids)
            .with("mask", mask)
            .with("signal", mixture.signal)
            .with("spread", mixture.noise)
            .with("time", Tensor::from_vec(time, n, &Device::Cpu)?)
            .with("video_noise", noise_like(&self.shape.video, "video")?)
            .with("audio_noise", noise_like(&self.shape.audio, "audio")?))
    }

    fn loss(&self, batch: &Batch, _: &Step) -> TaskResult<Losses> {
        let chosen = batch.get("chosen")?;
        let clean = self
            .pool
            .latents
            .map(|x| x.index_select(chosen, 0)?.to_dtype(DType::F32))?;
        let noise = Latents {
            video: batch.get("video_noise")?.clone(),
            audio: batch.get("audio_noise")?.clone(),
        };
        let text = self.text_condition(batch.get("ids")?, batch.get("mask")?)?;
        let mixture = Mixture {
            signal: batch.get("signal")?.clone(),
            noise: batch.get("spread")?.clone(),
        };
        let time = batch.get("time")?;
        let things = self.pool.things.index_select(chosen, 0)?.to_dtype(DType::F32)?;
        let near = (time.affine(-1.0, 1.0)? * self.options.thing_weight)?.reshape(((), 1, 1, 1, 1))?;
        let weight = (things.broadcast_mul(&near)? + 1.0)?;
        let (video, audio, aligned) = self.losses(&clean, &noise, time, &mixture, &text, Some(&weight))?;
        let mut total = (&video + (&audio * self.options.audio_weight)?)?;
        let mut parts = vec![("video", video), ("audio", audio)];
        if let Some(aligned) = aligned {
            total = (total + (&aligned * self.options.contrast_weight)?)?;
            parts.push(("aligned", aligned));
        }
        Ok(Losses { total, parts })
    }

    fn validate(&self) -> TaskResult<Vec<(String, f64)>> {
        let n = self.held_out.captions.len();
        let batch = self.options.batch.min(n);
        let (mut video, mut audio) = (0.0, 0.0);
        for start in (0..n).step_by(batch) {
            let count = batch.min(n - start);
            let clean = self.held_out.latents.narrow(start, count)?;
            let seeds: Vec<u64> = (start..start + count).map(|i| i as u64).collect();
            let noise = noise(&self.shape, &seeds, self.params.device())?;
            // Times spread evenly: the same for every validation.
            let time: Vec<f32> = (start..start + count)
                .map(|i| (Philox::new(5, i as u64).uniform() + i as f32) / n as f32 % 1.0)
                .collect();
            let captions: Vec<&str> = self.held_out.captions[start..start + count]
                .iter()
                .map(|c| c[0].as_str())
                .collect();
            let text = TextCondition::from(self.text.encode(&captions)?);
            let device = self.params.device();
            let mixture = self.objective().mixture(&time, device)?;
            let time = Tensor::from_vec(time, count, device)?;
            let (v, a, _) = self.losses(&clean, &noise, &time, &mixture, &text, None)?;
            let share = count as f64 / n as f64;
            video += f64::from(v.to_scalar::<f32>()?) * share;
            audio += f64::from(a.to_scalar::<f32>()?) * share;
        }
        Ok(vec![
            ("loss".to_owned(), video + audio),
            ("video".to_owned(), video),
            ("audio".to_owned(), audio),
        ])
    }

    fn sample(&self, folder: &Path, step: u64) -> TaskResult<Vec<PathBuf>> {
        let Some(latents) = self.sampled(SAMPLES)? else {
            return Ok(Vec::new());
        };
        let frames = self
            .video
            .decode(&latents.video)?
            .affine(127.5, 127.5)?
            .round()?
            .to_dtype(DType::U8)?;
        let clips: Vec<Vec<u8>> = (0..frames.dim(0)?)
            .map(|i| frames.get(i)?.flatten_all()?.to_vec1())
            .collect::<Result<_, _>>()?;
        let rows: Vec<&[u8]> = clips.iter().map(Vec::as_slice).collect();
        let (width, height) = self.size;
        let pictures: Picture = filmstrips(&rows, width, height)?;
        let sounds = spectrograms(&self.mel_codec.decode(&latents.audio)?)?;
        let paths = [
            folder.join(format!("video-{step:06}.png")),
            folder.join(format!("mel-{step:06}.png")),
        ];
        write_png(&paths[0], &pictures)?;
        write_png(&paths[1], &sounds)?;
        Ok(paths.to_vec())
    }

    fn export(&self, folder: &Path) -> TaskResult<()> {
        write_part(folder, &self.options.model, &self.params, None, Precision::F16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coverage_follows_the_grid_of_the_latents() {
        let mut mask = vec![0u8; 8 * 16 * 24];
        // One eighth of the latents' first cell, and all of the last.
        for frame in 0..8 {
            for y in 0..16 {
                for x in 0..24 {
                    let first = frame < 4 && y < 8 && x < 1;
                    let last = frame >= 4 && y >= 8 && x >= 16;
                    mask[(frame * 16 + y) * 24 + x] = if first || last { 255 } else { 0 };
                }
            }
        }
        let mask = Tensor::from_vec(mask, (1, 8, 16, 24, 1), &Device::Cpu).unwrap();
        let found = coverage(&mask, (1, 2, 2, 3, 20)).unwrap();
        assert_eq!(found.dims(), [1, 2, 2, 3, 1]);
        let mut expected = [0f32; 12];
        (expected[0], expected[11]) = (0.5, 1.0);
        let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
        assert!(
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6),
            "{found:?}"
        );
    }
}
