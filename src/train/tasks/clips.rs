//! The clips that generators, codecs, encoders and judges learn from: composed scenes and pieces of the film.

use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use fulgur_datasets::film::{self, Film};
use fulgur_datasets::pictures;
use fulgur_datasets::scenes::{self, ClipSpec, Composer, Scene, Split};
use fulgur_datasets::things::Things;
use fulgur_kernels::philox::Philox;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::train::TaskResult;

/// Part of a recipe: which clips.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClipOptions {
    /// Folder of prepared data sets.
    pub data: PathBuf,
    /// Share of clips that are pieces of the film instead of scenes.
    pub film: f32,
    /// Share of scenes with two things.
    pub two_things: f32,
    /// Share of scenes before a real picture.
    pub pictures: f32,
    /// Leaves out things whose picture or sound is under the GPL.
    pub without_gpl: bool,
    /// Seed of the scenes.
    pub seed: u64,
}

impl Default for ClipOptions {
    fn default() -> Self {
        Self {
            data: "data".into(),
            film: 0.0,
            two_things: 0.2,
            pictures: 0.25,
            without_gpl: false,
            seed: 0,
        }
    }
}

/// One clip on the host.
pub struct HostClip {
    /// RGB bytes `[F, H, W, 3]`.
    pub frames: Vec<u8>,
    /// How much of each pixel things cover, bytes `[F, H, W]`; zero for the film.
    pub mask: Vec<u8>,
    /// Mono samples.
    pub samples: Vec<f32>,
    /// The truth about a composed clip.
    pub scene: Option<Scene>,
}

/// What a caller needs of a clip; the rest stays empty.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want {
    /// Frames.
    pub frames: bool,
    /// Coverage of the things.
    pub mask: bool,
    /// Sound.
    pub samples: bool,
}

/// The part of the film that is used, decoded: it is read over and over.
struct Reel {
    frames: Vec<u8>,
    sound: Vec<f32>,
}

impl Reel {
    fn new(film: &Film) -> TaskResult<Self> {
        let seconds = film::HELD_OUT_S.end;
        let count = film.len().min(seconds * film::FPS);
        let pictures = (0..count)
            .into_par_iter()
            .map(|i| film.frame(i))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            frames: pictures.into_iter().flat_map(|picture| picture.pixels).collect(),
            sound: film.sound(0..seconds * film::SOUND_RATE as usize),
        })
    }

    /// `count` frames from `start_s`; the last one again beyond the end.
    fn frames(&self, start_s: f64, count: usize) -> Vec<u8> {
        let size = film::SIDE * film::SIDE * 3;
        let first = (start_s * film::FPS as f64).round() as usize;
        let last = self.frames.len() / size - 1;
        (first..first + count)
            .flat_map(|i| &self.frames[i.min(last) * size..][..size])
            .copied()
            .collect()
    }

    /// `count` samples from `start_s`; silence beyond the end.
    fn samples(&self, start_s: f64, count: usize) -> Vec<f32> {
        let first = (start_s * f64::from(film::SOUND_RATE)).round() as usize;
        (first..first + count)
            .map(|i| self.sound.get(i).copied().unwrap_or(0.0))
            .collect()
    }
}

/// Scenes and film, ready to be drawn from.
pub struct Clips {
    composer: Composer,
    film: Option<Reel>,
    film_share: f32,
}

impl Clips {
    /// Opens the prepared sets `stamps` and, where the options ask for them, `backgrounds` and `bbb`, for clips of the
    /// default size.
    ///
    /// # Errors
    /// A set that is not prepared, with the command that prepares it.
    pub fn open(options: &ClipOptions) -> TaskResult<Self> {
        Self::open_as(options, ClipSpec::default())
    }

    /// As [`Self::open`], for clips of any size.
    ///
    /// # Errors
    /// As [`Self::open`], and a size that no clip can have, or that pieces of the film do not have.
    pub fn open_as(options: &ClipOptions, clip: ClipSpec) -> TaskResult<Self> {
        if options.film > 0.0
            && (clip.width, clip.height, clip.fps) != (film::SIDE, film::SIDE, film::FPS as f64)
        {
            let (width, height, fps) = (clip.width, clip.height, clip.fps);
            let expected = format!("{0}x{0} at {1} frames/s, as the film is", film::SIDE, film::FPS);
            return Err(format!(
                "film: found clips of {width}x{height} at {fps} frames/s, expected {expected}"
            )
            .into());
        }
        let dir = options.data.join("stamps");
        let mut things = Things::load(&dir).map_err(|e| format!("{e}; run `fulgur data fetch stamps`"))?;
        if options.without_gpl {
            things.retain_licences(|licence| !licence.contains("GPL"));
        }
        let pictures = if options.pictures > 0.0 {
            let pictures = pictures::load(&options.data.join("backgrounds"));
            pictures.map_err(|e| format!("{e}; run `fulgur data fetch backgrounds`"))?
        } else {
            Vec::new()
        };
        let pictures: Vec<_> = pictures.into_iter().map(|(picture, _)| picture).collect();
        let scene_options = scenes::Options {
            seed: options.seed,
            clip,
            two_things: options.two_things,
            pictures: options.pictures,
            ..scenes::Options::default()
        };
        let film = if options.film > 0.0 {
            let film = Film::open(&options.data.join("bbb"));
            Some(Reel::new(
                &film.map_err(|e| format!("{e}; run `fulgur data fetch bbb`"))?,
            )?)
        } else {
            None
        };
        Ok(Self {
            composer: Composer::new(things, &pictures, scene_options)?,
            film,
            film_share: options.film,
        })
    }

    /// The composer of the scenes.
    pub fn composer(&self) -> &Composer {
        &self.composer
    }

    /// Size, rate and length of every clip.
    pub fn spec(&self) -> ClipSpec {
        self.composer.options().clip
    }

    /// A clip for training: a scene of `split`, or a piece of the film's training part.
    pub fn draw(&self, split: Split, noise: &mut Philox, want: Want) -> HostClip {
        match &self.film {
            Some(film) if noise.chance(self.film_share) => self.film_clip(film, noise, want),
            _ => self.rendered(self.composer.scene(split, noise.next_u64()), want),
        }
    }

    /// Scene `index` of `split`, rendered.
    pub fn scene(&self, split: Split, index: u64, want: Want) -> HostClip {
        self.rendered(self.composer.scene(split, index), want)
    }

    /// The held-out part of the film in clips, end to end.
    pub fn held_out_film(&self, want: Want) -> Vec<HostClip> {
        let Some(film) = &self.film else { return Vec::new() };
        let (spec, part) = (self.spec(), film::HELD_OUT_S);
        let count = (part.len() as f64 / spec.duration_s) as usize;
        (0..count)
            .map(|i| self.film_at(film, part.start as f64 + i as f64 * spec.duration_s, want))
            .collect()
    }

    /// A scene of the composer, rendered.
    pub fn rendered(&self, scene: Scene, want: Want) -> HostClip {
        let render = |wanted: bool, f: &dyn Fn() -> Vec<u8>| if wanted { f() } else { Vec::new() };
        HostClip {
            frames: render(want.frames, &|| self.composer.render_frames(&scene)),
            mask: render(want.mask, &|| self.composer.render_mask(&scene)),
            samples: if want.samples {
                self.composer.render_sound(&scene)
            } else {
                Vec::new()
            },
            scene: Some(scene),
        }
    }

    fn film_clip(&self, film: &Reel, noise: &mut Philox, want: Want) -> HostClip {
        let latest = film::TRAINING_S.end as f64 - self.spec().duration_s;
        self.film_at(film, latest * f64::from(noise.uniform()), want)
    }

    fn film_at(&self, film: &Reel, start_s: f64, want: Want) -> HostClip {
        let spec = self.spec();
        let pixels = spec.frames() * spec.width * spec.height;
        HostClip {
            frames: if want.frames {
                film.frames(start_s, spec.frames())
            } else {
                Vec::new()
            },
            mask: if want.mask { vec![0; pixels] } else { Vec::new() },
            samples: if want.samples {
                film.samples(start_s, spec.samples())
            } else {
                Vec::new()
            },
            scene: None,
        }
    }
}

/// Frames of several clips as bytes `[B, F, H, W, 3]`.
pub fn frames_tensor(clips: &[HostClip], spec: &ClipSpec) -> candle_core::Result<Tensor> {
    let bytes = joined(clips, |clip| &clip.frames);
    Tensor::from_vec(
        bytes,
        vec![clips.len(), spec.frames(), spec.height, spec.width, 3],
        &Device::Cpu,
    )
}

/// Coverage of several clips as bytes `[B, F, H, W, 1]`.
pub fn mask_tensor(clips: &[HostClip], spec: &ClipSpec) -> candle_core::Result<Tensor> {
    let bytes = joined(clips, |clip| &clip.mask);
    Tensor::from_vec(
        bytes,
        vec![clips.len(), spec.frames(), spec.height, spec.width, 1],
        &Device::Cpu,
    )
}

/// Sound of several clips `[B, S]`.
pub fn samples_tensor(clips: &[HostClip], spec: &ClipSpec) -> candle_core::Result<Tensor> {
    let samples = joined(clips, |clip| &clip.samples);
    Tensor::from_vec(samples, (clips.len(), spec.samples()), &Device::Cpu)
}

/// The parts of several clips one after another; whole slices are copied, for clips are large.
fn joined<T: Copy>(clips: &[HostClip], part: impl Fn(&HostClip) -> &[T]) -> Vec<T> {
    clips.iter().map(part).collect::<Vec<_>>().concat()
}

/// Bytes to [-1, 1].
pub fn to_unit(bytes: &Tensor) -> candle_core::Result<Tensor> {
    bytes.to_dtype(DType::F32)?.affine(1.0 / 127.5, -1.0)
}

/// Renders clips on all cores, in order.
pub fn render(n: usize, one: impl Fn(usize) -> HostClip + Sync + Send) -> Vec<HostClip> {
    (0..n).into_par_iter().map(one).collect()
}
