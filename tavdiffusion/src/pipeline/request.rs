//! What is asked of a generator, checked before anything is computed.

use super::folder::ModelIndex;
use crate::diffusion::Guidance;
use crate::error::Error;

/// Longest prompt in bytes that is read at all; the text encoder uses the first words of it.
const LONGEST_PROMPT: usize = 1 << 20;
const MOST_STEPS: usize = 1000;
const LONGEST_S: f64 = 60.0;
const LARGEST_SIDE: usize = 1024;
const HIGHEST_FPS: f64 = 120.0;
const STRONGEST_GUIDANCE: f64 = 100.0;

/// Which streams are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Mode {
    /// Picture and sound in one loop.
    #[default]
    Joint,
    /// Both are denoised, the picture alone is decoded.
    VideoOnly,
    /// Both are denoised, the sound alone is decoded.
    AudioOnly,
}

/// One clip to make. [`Request::new`] fills in the defaults of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to show and to play.
    pub prompt: String,
    /// What to keep away from.
    pub negative_prompt: String,
    /// What the sound keeps away from, when it differs.
    pub audio_negative_prompt: Option<String>,
    /// Seed of the noise.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Length in seconds.
    pub duration_s: f64,
    /// Frames per second of the result.
    pub fps: f64,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Strength of the text.
    pub guidance: Guidance,
    /// Which streams are made.
    pub mode: Mode,
}

/// Sizes in the units of the codecs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Frames at the model's own rate, a multiple of the codec's patch.
    pub(super) frames: usize,
    /// Mel frames, a multiple of the codec's patch.
    pub(super) mel_frames: usize,
    /// Frames of the result.
    pub(super) frames_out: usize,
    /// Samples of the result.
    pub(super) samples_out: usize,
}

impl Request {
    /// A request with the defaults of `model`.
    pub fn new(prompt: impl Into<String>, model: &ModelIndex) -> Self {
        Self {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            audio_negative_prompt: None,
            seed: 0,
            steps: model.steps,
            duration_s: model.duration_s,
            fps: model.fps,
            width: model.width,
            height: model.height,
            guidance: Guidance {
                video: model.guidance_video,
                audio: model.guidance_audio,
            },
            mode: Mode::default(),
        }
    }

    /// Whether both can be made in one batch: all but prompt and seed is the same.
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        let alike = Self {
            prompt: self.prompt.clone(),
            seed: self.seed,
            ..other.clone()
        };
        alike == *self
    }

    /// Checks every field and plans the sizes.
    pub(super) fn plan(&self, model: &ModelIndex) -> Result<Plan, Error> {
        let prompts = [
            Some(&self.prompt),
            Some(&self.negative_prompt),
            self.audio_negative_prompt.as_ref(),
        ];
        if let Some(long) = prompts.into_iter().flatten().find(|p| p.len() > LONGEST_PROMPT) {
            let found = format!("{} bytes", long.len());
            return Err(Error::request(
                "prompt",
                found,
                format!("at most {LONGEST_PROMPT} bytes"),
            ));
        }
        if self.prompt.trim().is_empty() {
            return Err(Error::request(
                "prompt",
                "an empty text",
                "words, such as \"a dog barks\"",
            ));
        }
        if !(1..=MOST_STEPS).contains(&self.steps) {
            return Err(Error::request("steps", self.steps, format!("1 to {MOST_STEPS}")));
        }
        let shortest = model.frames_multiple as f64 / model.fps;
        if !(shortest..=LONGEST_S).contains(&self.duration_s) {
            let expected = format!("{shortest:.2} to {LONGEST_S} seconds");
            return Err(Error::request("duration", self.duration_s, expected));
        }
        if !(1.0..=HIGHEST_FPS).contains(&self.fps) {
            return Err(Error::request("fps", self.fps, format!("1 to {HIGHEST_FPS}")));
        }
        let unit = model.size_multiple;
        for (field, side) in [("width", self.width), ("height", self.height)] {
            if side == 0 || side % unit != 0 || side > LARGEST_SIDE {
                let expected = format!("a multiple of {unit} from {unit} to {LARGEST_SIDE}");
                return Err(Error::request(field, side, expected));
            }
        }
        for (field, scale) in [
            ("guidance-video", self.guidance.video),
            ("guidance-audio", self.guidance.audio),
        ] {
            if !(0.0..=STRONGEST_GUIDANCE).contains(&scale) {
                return Err(Error::request(field, scale, format!("0 to {STRONGEST_GUIDANCE}")));
            }
        }
        let up_to = |wanted: f64, unit: usize| (wanted.ceil() as usize).div_ceil(unit) * unit;
        let mel_rate = f64::from(model.sample_rate) / model.hop as f64;
        // A hair less than the product, so that 4 s at 12 frames/s stays 48 frames under rounding.
        let tolerance = 1e-6;
        Ok(Plan {
            frames: up_to(self.duration_s * model.fps - tolerance, model.frames_multiple),
            mel_frames: up_to(self.duration_s * mel_rate - tolerance, model.mel_frames_multiple),
            frames_out: ((self.duration_s * self.fps).round() as usize).max(1),
            samples_out: (self.duration_s * f64::from(model.sample_rate)).round() as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_clip_is_planned_exactly() -> Result<(), Error> {
        let model = ModelIndex::default();
        let plan = Request::new("a dog barks", &model).plan(&model)?;
        assert_eq!(
            plan,
            Plan {
                frames: 48,
                mel_frames: 400,
                frames_out: 48,
                samples_out: 64_000
            }
        );
        let longer = Request {
            duration_s: 5.1,
            fps: 24.0,
            ..Request::new("a dog barks", &model)
        };
        let plan = longer.plan(&model)?;
        assert_eq!(
            plan,
            Plan {
                frames: 64,
                mel_frames: 512,
                frames_out: 122,
                samples_out: 81_600
            }
        );
        Ok(())
    }

    #[test]
    fn each_wrong_field_is_named_with_what_it_may_be() {
        let model = ModelIndex::default();
        let good = Request::new("a dog barks", &model);
        let wrong = [
            (
                Request {
                    prompt: " \n".into(),
                    ..good.clone()
                },
                "prompt: found an empty text",
            ),
            (
                Request {
                    prompt: "a ".repeat(LONGEST_PROMPT),
                    ..good.clone()
                },
                "prompt: found 2097152 bytes",
            ),
            (
                Request {
                    steps: 0,
                    ..good.clone()
                },
                "steps: found 0, expected 1 to 1000",
            ),
            (
                Request {
                    duration_s: f64::NAN,
                    ..good.clone()
                },
                "duration: found NaN",
            ),
            (
                Request {
                    duration_s: 1e9,
                    ..good.clone()
                },
                "duration: found 1000000000",
            ),
            (
                Request {
                    width: 100,
                    ..good.clone()
                },
                "width: found 100, expected a multiple of 16",
            ),
            (
                Request {
                    height: 0,
                    ..good.clone()
                },
                "height: found 0",
            ),
            (
                Request {
                    fps: 0.0,
                    ..good.clone()
                },
                "fps: found 0",
            ),
            (
                Request {
                    guidance: Guidance {
                        video: -1.0,
                        audio: 1.0,
                    },
                    ..good.clone()
                },
                "guidance-video: found -1",
            ),
        ];
        for (request, expected) in wrong {
            let message = request.plan(&model).map(|_| ()).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message} / {expected}");
            assert!(!message.contains('\n'));
        }
    }
}
