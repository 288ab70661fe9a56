//! The generator: text encoder, two-stream denoiser, codecs and vocoder, loaded once and used for any number of clips.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::folder::{ModelIndex, Part};
use super::request::{Mode, Plan, Request};
use crate::codec::{MelCodec, VideoCodec, Vocoder};
use crate::denoiser::{Denoiser, LatentShape, Latents, TextCondition, noise};
use crate::diffusion::{Objective, Prompts, Sampler};
use crate::error::Error;
use crate::streams::TwoStream;
use crate::text::TextModel;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the prompt.
    Text,
    /// Denoising.
    Denoise,
    /// Latents to frames.
    Picture,
    /// Latents to samples.
    Sound,
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
        let plan = request.plan(&self.index)?;
        let Some(latents) = self.latents(request, &plan, on_progress)? else {
            return Ok(None);
        };
        let mut clip = Clip {
            frames: Vec::new(),
            frame_count: 0,
            width: request.width,
            height: request.height,
            fps: request.fps,
            samples: Vec::new(),
            sample_rate: self.index.sample_rate,
        };
        let step = |stage, done| Progress {
            stage,
            done,
            total: 1,
        };
        if request.mode != Mode::AudioOnly {
            clip.frames = self.picture(&latents.video, request, &plan)?;
            clip.frame_count = plan.frames_out;
            if !on_progress(step(Stage::Picture, 1)) {
                return Ok(None);
            }
        }
        if request.mode != Mode::VideoOnly {
            clip.samples = self.sound(&latents.audio, &plan)?;
            if !on_progress(step(Stage::Sound, 1)) {
                return Ok(None);
            }
        }
        Ok(Some(clip))
    }

    /// Denoised latents of a request; a seed gives the same ones for any number of threads.
    fn latents(
        &self,
        request: &Request,
        plan: &Plan,
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Latents>, Error> {
        let read = |words: &String| Ok::<_, Error>(TextCondition::from(self.text.encode(&[words])?));
        let text = read(&request.prompt)?;
        let negative = read(&request.negative_prompt)?;
        let audio_negative = request.audio_negative_prompt.as_ref().map(read).transpose()?;
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
        let noise = noise(&shape, &[request.seed], self.denoiser.device())?;
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
        Ok(sampler.run(&self.denoiser, &noise, &prompts, request.guidance, &mut on_step)?)
    }

    fn picture(&self, latents: &Tensor, request: &Request, plan: &Plan) -> Result<Vec<u8>, Error> {
        let frames = self.video.decode(latents)?.squeeze(0)?;
        let bytes = frames
            .affine(127.5, 127.5)?
            .round()?
            .clamp(0f32, 255f32)?
            .to_dtype(DType::U8)?;
        let bytes = bytes.flatten_all()?.to_vec1::<u8>()?;
        let size = request.width * request.height * 3;
        // The frame of the model's clock that is shown at each moment of the result's clock.
        let source = |k: usize| {
            let moment = (k as f64 + 0.5) / request.fps;
            ((moment * self.index.fps) as usize).min(plan.frames - 1)
        };
        Ok((0..plan.frames_out)
            .flat_map(|k| bytes[source(k) * size..][..size].iter().copied())
            .collect())
    }

    fn sound(&self, latents: &Tensor, plan: &Plan) -> Result<Vec<f32>, Error> {
        let wave = self.vocoder.forward(&self.mel.decode(latents)?)?.squeeze(0)?;
        let mut samples = wave.clamp(-1f32, 1f32)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        samples.resize(plan.samples_out, 0.0);
        Ok(samples)
    }

    /// What the denoiser predicts.
    pub fn objective(&self) -> Objective {
        self.denoiser.config().objective
    }
}
