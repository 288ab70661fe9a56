//! What evaluations ask of a generator, whatever its kind.

use candle_core::Tensor;
use fulgur_tavdiffusion::diffusion::Guidance;
use fulgur_tavdiffusion::error::Error;
use fulgur_tavdiffusion::pipeline::{Clip, Generator, Progress, Request};
use fulgur_tavdiffusion::published::{PublishedGenerator, PublishedRequest};

/// One clip that is wanted.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// What to show and to play.
    pub prompt: String,
    /// Seed of the noise.
    pub seed: u64,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Frames per second.
    pub fps: f64,
    /// Length in seconds.
    pub duration_s: f64,
    /// Denoising steps.
    pub steps: usize,
    /// Strength of the text.
    pub guidance: Guidance,
}

/// A generator of audible video.
pub trait Maker {
    /// What clips say they were made with.
    fn name(&self) -> &str;

    /// Samples per second of the sound.
    fn sample_rate(&self) -> u32;

    /// Steps and guidance, where nothing else is asked.
    fn settings(&self) -> (usize, Guidance);

    /// Makes clips that differ in prompt and seed alone; `on_progress` returns false to stop, and then there are none.
    ///
    /// # Errors
    /// A clip that the generator cannot make, or arithmetic that fails on the device.
    fn make(
        &self,
        wanted: &[Wanted],
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Vec<Clip>>, Error>;

    /// Whether [`Self::through_codecs`] can be asked.
    fn has_encoders(&self) -> bool {
        false
    }

    /// As [`Generator::through_codecs`].
    ///
    /// # Errors
    /// No encoders, or as there.
    fn through_codecs(&self, frames: &Tensor, waves: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let _ = (frames, waves);
        Err(Error::Tensor(candle_core::Error::msg(
            "the codecs of this generator are not asked",
        )))
    }
}

impl Maker for Generator {
    fn name(&self) -> &str {
        &self.index().name
    }

    fn sample_rate(&self) -> u32 {
        self.index().sample_rate
    }

    fn settings(&self) -> (usize, Guidance) {
        let index = self.index();
        let guidance = Guidance {
            video: index.guidance_video,
            audio: index.guidance_audio,
        };
        (index.steps, guidance)
    }

    fn make(
        &self,
        wanted: &[Wanted],
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Vec<Clip>>, Error> {
        let request = |wanted: &Wanted| Request {
            seed: wanted.seed,
            width: wanted.width,
            height: wanted.height,
            fps: wanted.fps,
            duration_s: wanted.duration_s,
            steps: wanted.steps,
            guidance: wanted.guidance,
            ..Request::new(wanted.prompt.clone(), self.index())
        };
        let requests: Vec<Request> = wanted.iter().map(request).collect();
        self.generate_batch(&requests, on_progress)
    }

    fn has_encoders(&self) -> bool {
        Self::has_encoders(self)
    }

    fn through_codecs(&self, frames: &Tensor, waves: &Tensor) -> Result<(Tensor, Tensor), Error> {
        Self::through_codecs(self, frames, waves)
    }
}

impl Maker for PublishedGenerator {
    fn name(&self) -> &str {
        Self::name(self)
    }

    fn sample_rate(&self) -> u32 {
        Self::sample_rate(self)
    }

    fn settings(&self) -> (usize, Guidance) {
        let request = self.request("");
        (request.steps, request.guidance)
    }

    fn make(
        &self,
        wanted: &[Wanted],
        on_progress: &mut dyn FnMut(Progress) -> bool,
    ) -> Result<Option<Vec<Clip>>, Error> {
        let request = |wanted: &Wanted| PublishedRequest {
            seed: wanted.seed,
            width: wanted.width,
            height: wanted.height,
            fps: wanted.fps,
            duration_s: wanted.duration_s,
            steps: wanted.steps,
            guidance: wanted.guidance,
            ..self.request(&wanted.prompt)
        };
        let requests: Vec<PublishedRequest> = wanted.iter().map(request).collect();
        Ok(self.generate(&requests, on_progress)?.map(|made| made.clips))
    }
}
