//! What is asked of a published generator, checked before anything is loaded.

use fulgur_lightnet::diffusion::Method;

use super::places::Defaults;
use super::windows::{Span, Window, alongside, cover};
use crate::diffusion::Guidance;
use crate::error::Error;

const LONGEST_PROMPT: usize = 1 << 20;
const MOST_STEPS: usize = 1000;
const LONGEST_S: f64 = 600.0;
const LARGEST_SIDE: usize = 2048;
const HIGHEST_FPS: f64 = 120.0;
const STRONGEST_GUIDANCE: f64 = 100.0;
/// Steps of latents of a sound are multiples of this, so that three halvings leave whole numbers: 5 s are 128 of them.
pub(super) const AUDIO_UNIT: usize = 8;
/// A sound alone is denoised in windows beyond so many steps of its latent, which share some.
const LONGEST_SOUND: usize = 256;
const SOUND_OVERLAP: usize = 32;
/// The published loop makes a sound of twice the length, and keeps the beginning.
const REFERENCE_LENGTHS: usize = 2;

/// Which streams are made, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PublishedMode {
    /// Both in one loop.
    #[default]
    Joint,
    /// The published loop: one after the other, the clip reading noise.
    Reference,
    /// The clip alone.
    VideoOnly,
    /// The sound alone.
    AudioOnly,
}

impl PublishedMode {
    /// Whether there are pictures.
    #[must_use]
    pub fn has_video(self) -> bool {
        self != Self::AudioOnly
    }

    /// Whether there is sound.
    #[must_use]
    pub fn has_audio(self) -> bool {
        self != Self::VideoOnly
    }
}

/// A picture that a clip resembles.
#[derive(Clone, Debug, PartialEq)]
pub struct StartPicture {
    /// RGB bytes `[height, width, 3]` of the size of the clip.
    pub pixels: Vec<u8>,
    /// How much of the noise comes on top, above 0 to 1: that part of the steps is run.
    pub strength: f64,
}

/// One clip to make. [`Self::new`] fills in the defaults of a generator.
#[derive(Clone, Debug, PartialEq)]
pub struct PublishedRequest {
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
    /// How they are taken; none for what the folder says.
    pub method: Option<Method>,
    /// Length in seconds.
    pub duration_s: f64,
    /// Frames a second.
    pub fps: f64,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Strength of the text.
    pub guidance: Guidance,
    /// Which streams are made.
    pub mode: PublishedMode,
    /// Frames that are denoised at a time, for clips of more.
    pub window: Option<usize>,
    /// Frames that windows share.
    pub overlap: usize,
    /// What the clip starts from.
    pub start: Option<StartPicture>,
    /// Whether the prompt and what to keep away from are run one after the other: half the memory.
    pub sequential: bool,
    /// Side of the tiles, in pixels, out of which pictures are decoded; none for whole pictures.
    pub tile: Option<usize>,
}

/// What the networks of a generator fix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sizes {
    pub(super) video: Option<VideoSizes>,
    pub(super) audio: Option<AudioSizes>,
}

/// Of the clip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct VideoSizes {
    /// Channels of its latent.
    pub(super) channels: usize,
    /// Pixels a place of it.
    pub(super) factor: usize,
    /// Frames a frame of it.
    pub(super) stride: usize,
    /// Frames of the clip that are denoised at once.
    pub(super) most_frames: usize,
}

/// Of the sound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct AudioSizes {
    /// Channels of its latent.
    pub(super) channels: usize,
    /// Bands of it.
    pub(super) bands: usize,
    /// Samples a step of it.
    pub(super) hop: usize,
    pub(super) rate: usize,
}

/// A request in the units of the networks.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) frames: usize,
    pub(super) samples: usize,
    /// `[C, F, h, w]`, where there are pictures.
    pub(super) video: Option<[usize; 4]>,
    /// `[C, T, bands]` of the sound beside the clip, and of the one that is kept.
    pub(super) audio: Option<[usize; 3]>,
    pub(super) heard: Option<[usize; 3]>,
    pub(super) windows: Vec<Window>,
    /// The windows of a sound that is made alone.
    pub(super) sound_windows: Vec<Window>,
    /// The first step of the clip.
    pub(super) first: usize,
    /// Steps of the latent of a sound over which windows fade into each other.
    pub(super) fade: usize,
}

impl PublishedRequest {
    /// A request with the published settings, or those of the generator's own file.
    pub(super) fn of(prompt: impl Into<String>, defaults: &Defaults, most_frames: usize) -> Self {
        let fps = defaults.fps.unwrap_or(4.0);
        let frames = defaults.frames.unwrap_or(20).min(most_frames.max(1));
        Self {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            audio_negative_prompt: None,
            seed: 0,
            steps: defaults.steps.unwrap_or(40),
            method: None,
            duration_s: frames as f64 / fps,
            fps,
            width: defaults.width.unwrap_or(320),
            height: defaults.height.unwrap_or(256),
            guidance: Guidance {
                video: defaults.guidance_video.unwrap_or(8.0),
                audio: defaults.guidance_audio.unwrap_or(8.0),
            },
            mode: PublishedMode::Joint,
            window: None,
            overlap: 8,
            start: None,
            sequential: false,
            tile: None,
        }
    }

    /// Frames of the clip.
    #[must_use]
    pub fn frames(&self) -> usize {
        ((self.duration_s * self.fps).round() as usize).max(1)
    }

    /// Whether both can be made in one batch: all but texts and seed is the same.
    pub(super) fn goes_with(&self, other: &Self) -> bool {
        let alike = Self {
            prompt: self.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            audio_negative_prompt: self.audio_negative_prompt.clone(),
            seed: self.seed,
            ..other.clone()
        };
        alike == *self
    }

    /// Checks what does not depend on the networks.
    fn check(&self) -> Result<(), Error> {
        let prompts = [
            Some(&self.prompt),
            Some(&self.negative_prompt),
            self.audio_negative_prompt.as_ref(),
        ];
        if let Some(long) = prompts.into_iter().flatten().find(|p| p.len() > LONGEST_PROMPT) {
            let expected = format!("at most {LONGEST_PROMPT} bytes");
            return Err(Error::request(
                "prompt",
                format!("{} bytes", long.len()),
                expected,
            ));
        }
        if self.prompt.trim().is_empty() {
            let expected = "words, such as \"a dog barks\"";
            return Err(Error::request("prompt", "an empty text", expected));
        }
        let between =
            |field: &'static str, found: f64, low: f64, high: f64| match found >= low && found <= high {
                true => Ok(()),
                false => Err(Error::request(field, found, format!("{low} to {high}"))),
            };
        if !(1..=MOST_STEPS).contains(&self.steps) {
            return Err(Error::request("steps", self.steps, format!("1 to {MOST_STEPS}")));
        }
        between("fps", self.fps, 1.0, HIGHEST_FPS)?;
        between("duration", self.duration_s, 1.0 / self.fps, LONGEST_S)?;
        between("guidance-video", self.guidance.video, 0.0, STRONGEST_GUIDANCE)?;
        between("guidance-audio", self.guidance.audio, 0.0, STRONGEST_GUIDANCE)?;
        match &self.start {
            Some(start) if !(start.strength > 0.0 && start.strength <= 1.0) => {
                Err(Error::request("strength", start.strength, "above 0 to 1"))
            }
            Some(_) if !self.mode.has_video() => Err(Error::request(
                "init-image",
                "a picture",
                "none where there is sound alone",
            )),
            _ => Ok(()),
        }
    }

    /// The first step of the clip: all of them without a picture to start from.
    fn first(&self) -> Result<usize, Error> {
        let Some(start) = &self.start else { return Ok(0) };
        let expected = self.width * self.height * 3;
        if start.pixels.len() != expected {
            let found = format!("{} bytes", start.pixels.len());
            return Err(Error::request(
                "init-image",
                found,
                format!("{expected} of the clip's size"),
            ));
        }
        // A hair more than the product, so that 0.7 of 10 steps are 7.
        match (start.strength * self.steps as f64 + 1e-9).floor() as usize {
            0 => Err(Error::request(
                "strength",
                start.strength,
                format!(
                    "at least {}, one of {} steps",
                    1.0 / self.steps as f64,
                    self.steps
                ),
            )),
            run => Ok(self.steps - run.min(self.steps)),
        }
    }

    fn video(&self, sizes: VideoSizes, frames: usize) -> Result<[usize; 4], Error> {
        let unit = sizes.factor;
        for (field, side) in [("width", self.width), ("height", self.height)] {
            if side == 0 || !side.is_multiple_of(unit) || side > LARGEST_SIDE {
                let expected = format!("a multiple of {unit} from {unit} to {LARGEST_SIDE}");
                return Err(Error::request(field, side, expected));
            }
        }
        if sizes.stride > 1 && self.tile.is_some() {
            let found = self.tile.unwrap_or_default();
            let expected = "none: the codec of this folder decodes clips as a whole";
            return Err(Error::request("vae-tile", found, expected));
        }
        if let Some(tile) = self.tile
            && (tile < 4 * unit || !tile.is_multiple_of(unit))
        {
            let expected = format!("a multiple of {unit} from {} on", 4 * unit);
            return Err(Error::request("vae-tile", tile, expected));
        }
        let most = sizes.most_frames;
        match self.window {
            None if frames > most => Err(Error::request(
                "frames",
                format!("{frames} ({} s at {} fps)", self.duration_s, self.fps),
                format!("at most {most}, or --window {most} for a clip out of windows"),
            )),
            Some(window) if !(1..=most).contains(&window) => {
                Err(Error::request("window", window, format!("1 to {most} frames")))
            }
            Some(window) if window < frames && self.overlap >= window => Err(Error::request(
                "overlap",
                self.overlap,
                format!("less than the {window} frames of a window"),
            )),
            _ => Ok([
                sizes.channels,
                frames.div_ceil(sizes.stride),
                self.height / unit,
                self.width / unit,
            ]),
        }
    }

    /// Checks every field and plans the work.
    pub(super) fn plan(&self, sizes: &Sizes) -> Result<Plan, Error> {
        self.check()?;
        let mode = self.mode;
        let frames = if mode.has_video() { self.frames() } else { 0 };
        let missing = |stream: &str, only: &str| {
            let expected = format!("networks for the {stream} in the folder, or --mode {only}");
            Error::request("mode", "a generator without them", expected)
        };
        let video = match (mode.has_video(), sizes.video) {
            (false, _) => None,
            (true, Some(sizes)) => Some(self.video(sizes, frames)?),
            (true, None) => return Err(missing("pictures", "audio-only")),
        };
        let (mut samples, mut audio) = (0, None);
        if mode.has_audio() {
            let Some(sizes) = sizes.audio else {
                return Err(missing("sound", "video-only"));
            };
            // The sound is as long as the pictures are shown.
            let seconds = match frames {
                0 => self.duration_s,
                frames => frames as f64 / self.fps,
            };
            samples = (seconds * sizes.rate as f64).round() as usize;
            let steps = samples.max(1).div_ceil(sizes.hop).next_multiple_of(AUDIO_UNIT);
            audio = Some([sizes.channels, steps, sizes.bands]);
        }
        let heard = audio.map(|[channels, steps, bands]| match mode {
            PublishedMode::Reference => [channels, REFERENCE_LENGTHS * steps, bands],
            _ => [channels, steps, bands],
        });
        let stride = sizes.video.map_or(1, |sizes| sizes.stride);
        let spans = video.map(|[_, frames, ..]| {
            let window = self.window.map_or(frames, |window| (window / stride).max(1));
            cover(frames, window.min(frames), self.overlap / stride)
        });
        let latent_frames = video.map_or(0, |[_, frames, ..]| frames);
        let windows = match (spans, audio) {
            (Some(spans), Some([_, steps, _])) => {
                let heard = alongside(&spans, latent_frames, steps);
                let pair = |(video, audio): (Span, Span)| Window {
                    video: Some(video),
                    audio: Some(audio),
                };
                spans.into_iter().zip(heard).map(pair).collect()
            }
            (Some(spans), None) => spans
                .into_iter()
                .map(|video| Window {
                    video: Some(video),
                    audio: None,
                })
                .collect(),
            (None, _) => Vec::new(),
        };
        let sound_windows = heard.map(|[_, steps, _]| cover(steps, LONGEST_SOUND, SOUND_OVERLAP));
        Ok(Plan {
            frames,
            samples,
            video,
            audio,
            heard,
            windows,
            sound_windows: sound_windows
                .into_iter()
                .flatten()
                .map(|audio| Window {
                    video: None,
                    audio: Some(audio),
                })
                .collect(),
            first: self.first()?,
            fade: SOUND_OVERLAP,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        video: Some(VideoSizes {
            channels: 4,
            factor: 8,
            stride: 1,
            most_frames: 24,
        }),
        audio: Some(AudioSizes {
            channels: 8,
            bands: 16,
            hop: 640,
            rate: 16_000,
        }),
    };

    fn request() -> PublishedRequest {
        PublishedRequest::of("a dog barks", &Defaults::default(), 24)
    }

    #[test]
    fn the_published_clip_is_planned_exactly() {
        let plan = request().plan(&SIZES).unwrap();
        assert_eq!(plan.video, Some([4, 20, 32, 40]));
        assert_eq!((plan.audio, plan.heard), (Some([8, 128, 16]), Some([8, 128, 16])));
        assert_eq!((plan.frames, plan.samples, plan.first), (20, 80_000, 0));
        assert_eq!((plan.windows.len(), plan.sound_windows.len()), (1, 1));
        let reference = PublishedRequest {
            mode: PublishedMode::Reference,
            ..request()
        };
        assert_eq!(reference.plan(&SIZES).unwrap().heard, Some([8, 256, 16]));
        let long = PublishedRequest {
            duration_s: 12.0,
            window: Some(24),
            ..request()
        };
        let plan = long.plan(&SIZES).unwrap();
        assert_eq!((plan.frames, plan.audio), (48, Some([8, 304, 16])));
        let starts: Vec<_> = plan
            .windows
            .iter()
            .map(|w| {
                (
                    w.video.unwrap().start,
                    w.audio.unwrap().start,
                    w.audio.unwrap().len,
                )
            })
            .collect();
        assert_eq!(starts, [(0, 0, 152), (16, 101, 152), (24, 152, 152)]);
        let alone = PublishedRequest {
            duration_s: 20.0,
            mode: PublishedMode::AudioOnly,
            ..request()
        };
        let plan = alone.plan(&SIZES).unwrap();
        assert_eq!((plan.video, plan.frames, plan.samples), (None, 0, 320_000));
        assert_eq!((plan.windows.len(), plan.sound_windows.len()), (0, 3));
    }

    #[test]
    fn a_picture_to_start_from_leaves_steps_out() {
        let with = |strength: f64, steps: usize| PublishedRequest {
            steps,
            start: Some(StartPicture {
                pixels: vec![0; 320 * 256 * 3],
                strength,
            }),
            ..request()
        };
        for (strength, steps, first) in [(1.0, 40, 0), (0.7, 10, 3), (0.5, 5, 3), (0.1, 10, 9)] {
            assert_eq!(with(strength, steps).plan(&SIZES).unwrap().first, first);
        }
        let line = with(0.05, 10).plan(&SIZES).unwrap_err().to_string();
        assert_eq!(
            line,
            "strength: found 0.05, expected at least 0.1, one of 10 steps"
        );
    }

    #[test]
    fn each_wrong_field_is_named_with_what_it_may_be() {
        type Change = fn(&mut PublishedRequest);
        let cases: [(Change, &str); 15] = [
            (|r| r.prompt = " ".into(), "prompt: found an empty text"),
            (|r| r.steps = 0, "steps: found 0, expected 1 to 1000"),
            (
                |r| r.width = 321,
                "width: found 321, expected a multiple of 8 from 8 to 2048",
            ),
            (|r| r.height = 0, "height: found 0"),
            (|r| r.duration_s = f64::NAN, "duration: found NaN"),
            (|r| r.fps = f64::NAN, "fps: found NaN"),
            (|r| r.guidance.video = f64::NAN, "guidance-video: found NaN"),
            (
                |r| r.guidance.audio = -1.0,
                "guidance-audio: found -1, expected 0 to 100",
            ),
            (
                |r| r.duration_s = 6.25,
                "frames: found 25 (6.25 s at 4 fps), expected at most 24, or --window 24",
            ),
            (
                |r| r.window = Some(25),
                "window: found 25, expected 1 to 24 frames",
            ),
            (
                |r| (r.duration_s, r.window) = (8.0, Some(8)),
                "overlap: found 8, expected less than the 8 frames of a window",
            ),
            (
                |r| r.tile = Some(100),
                "vae-tile: found 100, expected a multiple of 8 from 32 on",
            ),
            (
                |r| {
                    r.start = Some(StartPicture {
                        pixels: vec![],
                        strength: f64::NAN,
                    });
                },
                "strength: found NaN, expected above 0 to 1",
            ),
            (
                |r| {
                    r.start = Some(StartPicture {
                        pixels: vec![1],
                        strength: 1.0,
                    });
                },
                "init-image: found 1 bytes, expected 245760 of the clip's size",
            ),
            (
                |r| r.duration_s = 1e6,
                "duration: found 1000000, expected 0.25 to 600",
            ),
        ];
        for (change, words) in cases {
            let mut wrong = request();
            change(&mut wrong);
            let line = wrong.plan(&SIZES).unwrap_err().to_string();
            assert!(line.starts_with(words) && !line.contains('\n'), "{words}: {line}");
        }
        let silent = Sizes { audio: None, ..SIZES };
        let line = request().plan(&silent).unwrap_err().to_string();
        assert!(
            line.contains("networks for the sound in the folder, or --mode video-only"),
            "{line}"
        );
        let blind = Sizes { video: None, ..SIZES };
        let line = request().plan(&blind).unwrap_err().to_string();
        assert!(
            line.contains("networks for the pictures in the folder, or --mode audio-only"),
            "{line}"
        );
    }
}
