//! Composed audible scenes: real cut-outs that come in, land and make their real sound over a background.
//!
//! A [`Scene`] is a pure function of (seed, split, index): what is seen, where and when it lands, which sound starts
//! at that moment and a caption that says so are exact, because the scene is drawn from them. A [`Composer`] draws
//! scenes and renders them to frames, coverage masks and sound; every method takes `&self` and gives the same bits
//! on any thread in any order.
//!
//! ```
//! use fulgur_datasets::scenes::{Composer, Options, Split};
//! # use fulgur_datasets::things::{Cutout, Origin, Source, Thing, Things, Verb, Words};
//! # let origin = || Origin { package: String::new(), path: String::new(), licence: String::new(), holders: String::new() };
//! # let things = Things(vec![Thing {
//! #     id: "bell".into(),
//! #     words: Words { noun: "a bell".into(), verb: Verb { finite: "rings".into(), gerund: "ringing".into() },
//! #         plural: false, other_nouns: vec![], other_verbs: vec![] },
//! #     cutout: Cutout { width: 8, height: 8, rgba: vec![255; 256] },
//! #     sound: (0..8000).map(|i| (i as f32 * 0.3).sin() * 0.2).collect(),
//! #     source: Source { picture: origin(), sound: origin() },
//! # }]);
//! let composer = Composer::new(things, &[], Options::default())?;
//! let scene = composer.scene(Split::Train, 17);
//! let (frames, sound) = (composer.render_frames(&scene), composer.render_sound(&scene));
//! assert_eq!((frames.len(), sound.len()), (48 * 96 * 96 * 3, 64_000));
//! assert!(scene.caption.text.contains("bell"));
//! # Ok::<(), fulgur_datasets::scenes::SceneError>(())
//! ```

mod backdrop;
mod caption;
mod compose;
mod motion;
mod render;
mod sheet;
mod sound;
mod splits;
mod sprite;
#[cfg(test)]
mod tests;
pub(crate) mod wording;

use serde::Serialize;
use thiserror::Error;

pub use backdrop::{Backdrop, Paint};
pub use caption::{Caption, Part, Role};
pub use compose::Composer;
pub use motion::{Hit, Motion, Place, Side};
pub use splits::{Split, is_held_out};

/// Smallest and largest side of a frame, in pixels.
const SIDES: std::ops::RangeInclusive<usize> = 16..=2048;
/// Largest size of a whole clip, in pixels times frames.
const MAX_CLIP_PIXELS: usize = 1 << 30;
/// Sampling rates that sounds can be rendered at, in Hz.
const RATES: std::ops::RangeInclusive<u32> = 16_000..=96_000;

/// Why scenes cannot be composed.
#[derive(Debug, Error)]
pub enum SceneError {
    /// An option has a value that no scene can have.
    #[error("{field}: found {found}, expected {expected}")]
    Option {
        /// The option.
        field: &'static str,
        /// Its value.
        found: String,
        /// The values it may have.
        expected: String,
    },
    /// A thing cannot be drawn or heard.
    #[error("thing {id}: {field}: found {found}, expected {expected}")]
    Thing {
        /// The thing.
        id: String,
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// The values it may have.
        expected: &'static str,
    },
}

/// Size, rate and length of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ClipSpec {
    /// Width in pixels, 16 to 2048.
    pub width: usize,
    /// Height in pixels, 16 to 2048.
    pub height: usize,
    /// Frames per second.
    pub fps: f64,
    /// Length in seconds.
    pub duration_s: f64,
    /// Samples per second of the sound, 16,000 to 96,000.
    pub sample_rate: u32,
}

impl Default for ClipSpec {
    /// 96x96, 12 frames/s, 4 s, 16 kHz.
    fn default() -> Self {
        Self {
            width: 96,
            height: 96,
            fps: 12.0,
            duration_s: 4.0,
            sample_rate: 16_000,
        }
    }
}

impl ClipSpec {
    /// Number of frames.
    pub fn frames(&self) -> usize {
        (self.fps * self.duration_s).round() as usize
    }

    /// Number of sound samples.
    pub fn samples(&self) -> usize {
        (f64::from(self.sample_rate) * self.duration_s).round() as usize
    }

    /// The instant that frame `frame` shows, the middle of its display time, in seconds.
    pub fn frame_time(&self, frame: usize) -> f64 {
        (frame as f64 + 0.5) / self.fps
    }

    fn check(&self) -> Result<(), SceneError> {
        let wrong = |field, found: String, expected: String| {
            Err(SceneError::Option {
                field,
                found,
                expected,
            })
        };
        for (field, side) in [("width", self.width), ("height", self.height)] {
            if !SIDES.contains(&side) {
                return wrong(
                    field,
                    side.to_string(),
                    format!("{} to {}", SIDES.start(), SIDES.end()),
                );
            }
        }
        if !(1.0..=240.0).contains(&self.fps) {
            return wrong("fps", self.fps.to_string(), "1 to 240".to_owned());
        }
        if !(0.5..=600.0).contains(&self.duration_s) {
            return wrong("duration_s", self.duration_s.to_string(), "0.5 to 600".to_owned());
        }
        if !RATES.contains(&self.sample_rate) {
            let expected = format!("{} to {}", RATES.start(), RATES.end());
            return wrong("sample_rate", self.sample_rate.to_string(), expected);
        }
        let pixels = self.width * self.height * self.frames();
        if pixels > MAX_CLIP_PIXELS {
            return wrong(
                "frames",
                pixels.to_string(),
                format!("at most {MAX_CLIP_PIXELS} pixels in all"),
            );
        }
        Ok(())
    }
}

/// What a [`Composer`] composes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Options {
    /// Seed of all scenes.
    pub seed: u64,
    /// Size, rate and length of the clips.
    pub clip: ClipSpec,
    /// Share of scenes with two things.
    pub two_things: f32,
    /// Share of scenes before a real picture, where pictures are given.
    pub pictures: f32,
    /// The motions that occur.
    pub motions: Vec<Motion>,
}

impl Default for Options {
    /// Seed 0, the default clip, 20 % with two things, 25 % before real pictures, every motion.
    fn default() -> Self {
        Self {
            seed: 0,
            clip: ClipSpec::default(),
            two_things: 0.2,
            pictures: 0.25,
            motions: Motion::ALL.to_vec(),
        }
    }
}

/// The part of a clip in which a thing sounds first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Timing {
    /// Anywhere; the caption says nothing about it.
    Unsaid,
    /// 10 to 27 % into the clip.
    Start,
    /// 38 to 52 % into the clip.
    Halfway,
    /// 62 to 80 % into the clip.
    End,
}

impl Timing {
    /// Earliest and latest first sound in a clip of `duration_s` seconds, in seconds.
    pub fn range(self, duration_s: f64) -> (f64, f64) {
        let (low, high) = match self {
            Self::Unsaid => (0.4, 3.2),
            Self::Start => (0.4, 1.1),
            Self::Halfway => (1.5, 2.1),
            Self::End => (2.5, 3.2),
        };
        (low * duration_s / 4.0, high * duration_s / 4.0)
    }
}

/// A rectangle of whole pixels, `x0 <= x < x1` and `y0 <= y < y1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PixelBox {
    /// Left edge.
    pub x0: usize,
    /// Upper edge.
    pub y0: usize,
    /// One past the right edge.
    pub x1: usize,
    /// One past the lower edge.
    pub y1: usize,
}

impl PixelBox {
    /// True where the box holds the pixel.
    pub fn contains(&self, x: usize, y: usize) -> bool {
        (self.x0..self.x1).contains(&x) && (self.y0..self.y1).contains(&y)
    }
}

/// One thing in a scene. Lengths are in pixels of the clip, times in seconds from its start.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Actor {
    /// Position of the thing in the [`Composer`]'s things.
    pub thing: usize,
    /// Its name.
    pub id: String,
    /// How it moves.
    pub motion: Motion,
    /// The third of the frame in which it ends.
    pub place: Place,
    /// True where the caption says the place.
    pub place_said: bool,
    /// When it sounds, as far as the caption says.
    pub timing: Timing,
    /// Instant of the first contact or appearance: its sound starts here.
    pub contact_s: f64,
    /// Every contact that sounds, the first included.
    pub hits: Vec<Hit>,
    /// Middle of its lower edge at rest, from the left.
    pub x: f64,
    /// Its lower edge at rest, from above.
    pub y: f64,
    /// Its longer side at rest.
    pub size: f64,
    /// True where it is drawn as in a mirror.
    pub mirrored: bool,
    /// Rotation at rest, in radians, clockwise.
    pub tilt: f64,
    /// Speed of its sound; 1 is as recorded.
    pub rate: f64,
    /// Factor on its sound.
    pub gain: f32,
    /// Where it is in each frame: every pixel that it covers lies inside. None where it is not to be seen.
    pub boxes: Vec<Option<PixelBox>>,
}

/// A composed scene: the exact truth about a clip.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scene {
    /// Seed of the composer.
    pub seed: u64,
    /// The split it belongs to.
    pub split: Split,
    /// Its number within the split.
    pub index: u64,
    /// One or two things, in the order of their first sounds.
    pub actors: Vec<Actor>,
    /// What is behind them.
    pub backdrop: Backdrop,
    /// Root mean square of the background noise.
    pub noise: f32,
    /// Seed of the background noise.
    pub noise_seed: u64,
    /// What a viewer would say.
    pub caption: Caption,
}
