//! The generator: text encoder, two-stream denoiser, codecs and vocoder, loaded once and used for any number of clips.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_kernels::spectrum::LogMel;

use super::folder::{ModelIndex, Part};
use super::request::{Mode, Plan, Request};
use crate::codec::{MelCodec, VideoCodec, Vocoder};
use crate::denoiser::{Denoiser, LatentShape, Latents, TextCondition, noise};
use crate::diffusion::{Objective, Prompts, Sampler, sample};
use crate::error::Error;
use crate::streams::TwoStream;
use crate::text::TextModel;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the prompt.
    Text,
    /// A picture to a latent, for clips that start from one.
    Start,
    /// Denoising.
    Denoise,
    /// Latents to frames.
    Picture,
    /// Latents to samples.
    Sound,
}

impl Stage {
    /// In one word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Start => "start",
            Self::Denoise => "denoise",
            Self::Picture => "picture",
            Self::Sound => "sound",
        }
    }
}

/// How far a clip is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Steps of the stage that are done.
    pub done: usize,
    /// Steps of the stage.
    pub total: usize,
}

/// A finished clip.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    /// RGB bytes `[frame_count, height, width, 3]`; empty without a picture.
    pub frames: Vec<u8>,
    /// Number of frames.
    pub frame_count: usize,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Frames per second.
    pub fps: f64,
    /// Mono samples in [-1, 1]; empty without sound.
    pub samples: Vec<f32>,
    /// Samples per second.
    pub sample_rate: u32,
}

/// A loaded generator.
pub struct Generator {
    index: ModelIndex,
    text: TextModel,
    denoiser: TwoStream,
    video: VideoCodec,
    mel: MelCodec,
    vocoder: Vocoder,
}

impl Generator {
    /// Loads the model folder `dir` onto `device`.
    ///
    /// # Errors
    /// A missing or unreadable file, weights that are missing, unexpected or of another shape.
    pub fn load(dir: &Path, device: &Device) -> Result<Self, Error> {
        let index = ModelIndex::read(dir)?;
        // Products in bf16 only where the hardware makes them fast.
        let compute = if device.is_cuda() { DType::BF16 } else { DType::F32 };
        let folder = |part: Part| dir.join(part.folder());
        Ok(Self {
            index,
            text: TextModel::load(&folder(Part::TextEncoder), device)?,
            denoiser: TwoStream::load(&folder(Part::Denoiser), compute, device)?,
            video: VideoCodec::load(&folder(Part::VideoCodec), device)?,
            mel: MelCodec::load(&folder(Part::MelCodec), device)?,
            vocoder: Vocoder::load(&folder(Part::Vocoder), device)?,
        })
    }

    /// What the model is and its defaults.
    pub fn index(&self) -> &ModelIndex {
        &self.index
    }

    /// Makes a clip; `on_progress` returns false to stop, and then there is no clip.
    ///
    /// # Errors
    /// A request that the model cannot fulfil, or arithmetic that fails on the device.
    pub fn generate(
        &self,
        request: &Request,
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Clip>, Error> {
        let clips = self.generate_batch(std::slice::from_ref(request), on_progress)?;
        Ok(clips.and_then(|mut clips| clips.pop()))
    }

    /// Makes several clips at a time, from requests that differ in prompt and seed alone. Its neighbours in a batch
    /// change a clip by no more than rounding.
    ///
    /// # Errors
    /// As [`Self::generate`], and requests that do not go together.
    pub fn generate_batch(
        &self,
        requests: &[Request],
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Vec<Clip>>, Error> {
        let Some(request) = requests.first() else {
            return Ok(Some(Vec::new()));
        };
        let plan = request.plan(&self.index)?;
        for other in &requests[1..] {
            other.plan(&self.index)?;
            if !request.goes_with(other) {
                let found = "requests of different settings";
                return Err(Error::request(
                    "batch",
                    found,
                    "differences in prompt and seed alone",
                ));
            }
        }
        let Some(latents) = self.latents(requests, &plan, on_progress)? else {
            return Ok(None);
        };
        let blank = Clip {
            frames: Vec::new(),
            frame_count: 0,
            width: request.width,
            height: request.height,
            fps: request.fps,
            samples: Vec::new(),
            sample_rate: self.index.sample_rate,
        };
        let mut clips = vec![blank; requests.len()];
        let step = |stage, done| Progress {
            stage,
            done,
            total: 1,
        };
        if request.mode != Mode::AudioOnly {
            for (clip, frames) in clips
                .iter_mut()
                .zip(self.pictures(&latents.video, request, &plan)?)
            {
                clip.frames = frames;
                clip.frame_count = plan.frames_out;
            }
            if !on_progress(step(Stage::Picture, 1)) {
                return Ok(None);
            }
        }
        if request.mode != Mode::VideoOnly {
            for (clip, samples) in clips.iter_mut().zip(self.sounds(&latents.audio, &plan)?) {
                clip.samples = samples;
            }
            if !on_progress(step(Stage::Sound, 1)) {
                return Ok(None);
            }
        }
        Ok(Some(clips))
    }

    /// Denoised latents of requests; a seed gives the same ones for any number of threads.
    fn latents(
        &self,
        requests: &[Request],
        plan: &Plan,
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Latents>, Error> {
        let Some(request) = requests.first() else {
            return Ok(None);
        };
        let read = |words: &[&str]| Ok::<_, Error>(TextCondition::from(self.text.encode(words)?));
        let prompts: Vec<&str> = requests.iter().map(|r| r.prompt.as_str()).collect();
        let repeated = |words: &String| read(&vec![words.as_str(); requests.len()]);
        let text = read(&prompts)?;
        let negative = repeated(&request.negative_prompt)?;
        let audio_negative = request.audio_negative_prompt.as_ref().map(repeated).transpose()?;
        if !on_progress(Progress {
            stage: Stage::Text,
            done: 1,
            total: 1,
        }) {
            return Ok(None);
        }
        let config = self.denoiser.config();
        let [t, h, w] = self.video.grid(plan.frames, request.height, request.width)?;
        let [s, bands] = self.mel.grid(plan.mel_frames)?;
        let shape = LatentShape {
            video: [t, h, w, config.video.channels],
            audio: [s, bands, config.audio.channels],
        };
        let seeds: Vec<u64> = requests.iter().map(|r| r.seed).collect();
        let noise = noise(&shape, &seeds, self.denoiser.device())?;
        let sampler = Sampler {
            objective: config.objective,
            steps: request.steps,
            shift: self.index.shift,
        };
        let prompts = Prompts {
            text,
            negative,
            audio_negative,
        };
        let mut on_step = |step: crate::diffusion::Step| {
            on_progress(Progress {
                stage: Stage::Denoise,
                done: step.done,
                total: step.total,
            })
        };
        Ok(sample(
            &sampler,
            &self.denoiser,
            &noise,
            &prompts,
            request.guidance,
            &mut on_step,
        )?)
    }

    /// Frames of each clip of a batch.
    fn pictures(&self, latents: &Tensor, request: &Request, plan: &Plan) -> Result<Vec<Vec<u8>>, Error> {
        let frames = self.video.decode(latents)?;
        let bytes = frames
            .affine(127.5, 127.5)?
            .round()?
            .clamp(0f32, 255f32)?
            .to_dtype(DType::U8)?;
        let size = request.width * request.height * 3;
        // The frame of the model's clock that is shown at each moment of the result's clock.
        let source = |k: usize| {
            let moment = (k as f64 + 0.5) / request.fps;
            ((moment * self.index.fps) as usize).min(plan.frames - 1)
        };
        let rows = bytes.flatten_from(1)?.to_vec2::<u8>()?;
        Ok(rows
            .iter()
            .map(|bytes| {
                (0..plan.frames_out)
                    .flat_map(|k| bytes[source(k) * size..][..size].iter().copied())
                    .collect()
            })
            .collect())
    }

    /// Samples of each clip of a batch.
    fn sounds(&self, latents: &Tensor, plan: &Plan) -> Result<Vec<Vec<f32>>, Error> {
        let waves = self.vocoder.forward(&self.mel.decode(latents)?)?;
        let mut rows = waves.clamp(-1f32, 1f32)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        for samples in &mut rows {
            samples.resize(plan.samples_out, 0.0);
        }
        Ok(rows)
    }

    /// Whether the folder holds the encoders of both codecs, which [`Self::through_codecs`] needs and generating does
    /// not.
    pub fn has_encoders(&self) -> bool {
        self.video.has_encoder() && self.mel.has_encoder()
    }

    /// Real clips as codecs and vocoder give them back: the best that the generator could do. Frames
    /// `[B, F, H, W, 3]` in [-1, 1], `F` a multiple of the codec's patch, and waveforms `[B, S]` at the model's rate;
    /// the result has the same shapes and ranges.
    ///
    /// # Errors
    /// A folder without encoders, sizes that the codecs do not take, or arithmetic that fails on the device.
    pub fn through_codecs(&self, frames: &Tensor, waves: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let samples = waves.dim(1)?;
        let unit = self.index.hop * self.index.mel_frames_multiple;
        let padded = waves.pad_with_zeros(1, 0, samples.next_multiple_of(unit) - samples)?;
        let mel = LogMel::speech_16k(self.denoiser.device())?.forward(&padded)?;
        let heard = self.vocoder.forward(&self.mel.decode(&self.mel.encode(&mel)?)?)?;
        let seen = self.video.decode(&self.video.encode(frames)?)?;
        Ok((seen, heard.narrow(1, 0, samples)?.clamp(-1f32, 1f32)?))
    }

    /// What the denoiser predicts.
    pub fn objective(&self) -> Objective {
        self.denoiser.config().objective
    }
}
