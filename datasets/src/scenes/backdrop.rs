//! What is behind the things: plain, graded, patterned, or a real picture with a tint, with or without a floor.

use fulgur_kernels::philox::Philox;
use image::RgbImage;
use image::imageops::{self, FilterType};
use serde::Serialize;

use super::{ClipSpec, SceneError, Split};
use crate::media::Picture;

/// One picture in so many is for judging classifiers only.
const JUDGE_PICTURE: usize = 4;
/// Blur of a real picture, in pixels of a frame of 96: it is out of focus behind the things.
const BLUR: f32 = 1.2;
/// Share of a real picture in its mix with a plain colour.
const PICTURE_SHARE: f32 = 0.55;
/// Brightness of the floor relative to the wall.
const FLOOR_SHADE: f32 = 0.78;

/// A colour, red, green and blue in 0..1.
type Colour = [f32; 3];

/// How a backdrop is painted.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Paint {
    /// One colour.
    Plain(Colour),
    /// From one colour to another along a direction, in radians.
    Linear(Colour, Colour, f32),
    /// From one colour in a point (fractions of width and height) to another; for judging only.
    Radial(Colour, Colour, [f32; 2]),
    /// Soft stripes of two colours along a direction in radians, with so many periods; for judging only.
    Stripes(Colour, Colour, f32, f32),
    /// A real picture mixed with a colour.
    Picture {
        /// Position among the given pictures.
        index: usize,
        /// The colour.
        tint: Colour,
        /// True where it is drawn as in a mirror.
        mirrored: bool,
    },
}

/// Everything behind the things of a scene.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Backdrop {
    /// The wall.
    pub paint: Paint,
    /// Upper edge of the floor in pixels from above; None where there is no floor.
    pub floor: Option<f64>,
}

/// Real pictures cut and scaled to the clip's size.
pub(super) struct Pictures(Vec<Vec<u8>>);

impl Pictures {
    pub(super) fn new(pictures: &[Picture], clip: &ClipSpec) -> Result<Self, SceneError> {
        let fitted = pictures.iter().map(|picture| fit(picture, clip));
        Ok(Self(fitted.collect::<Result<_, _>>()?))
    }

    /// Positions of the pictures that `split` may use.
    fn of(&self, split: Split) -> Vec<usize> {
        let judge = split == Split::Judge;
        (0..self.0.len())
            .filter(|index| (index % JUDGE_PICTURE == JUDGE_PICTURE - 1) == judge)
            .collect()
    }
}

/// The middle of the picture in the clip's shape and size, slightly blurred.
fn fit(picture: &Picture, clip: &ClipSpec) -> Result<Vec<u8>, SceneError> {
    let wrong = || SceneError::Option {
        field: "pictures",
        found: format!(
            "{}x{} with {} channels",
            picture.width, picture.height, picture.channels
        ),
        expected: "pictures of at least 1x1 with 3 channels".to_owned(),
    };
    let (width, height) = (picture.width as u32, picture.height as u32);
    let whole = (picture.channels == 3)
        .then(|| RgbImage::from_raw(width, height, picture.pixels.clone()))
        .flatten()
        .filter(|_| width > 0 && height > 0)
        .ok_or_else(wrong)?;
    let scale = (clip.width as f64 / f64::from(width)).max(clip.height as f64 / f64::from(height));
    let cut_width = ((clip.width as f64 / scale).round() as u32).clamp(1, width);
    let cut_height = ((clip.height as f64 / scale).round() as u32).clamp(1, height);
    let cut = imageops::crop_imm(
        &whole,
        (width - cut_width) / 2,
        (height - cut_height) / 2,
        cut_width,
        cut_height,
    );
    let (w, h) = (clip.width as u32, clip.height as u32);
    let scaled = imageops::resize(&cut.to_image(), w, h, FilterType::Triangle);
    let sigma = BLUR * clip.width.min(clip.height) as f32 / 96.0;
    Ok(imageops::blur(&scaled, sigma).into_raw())
}

fn colour(random: &mut Philox) -> Colour {
    std::array::from_fn(|_| random.range(0.2, 0.95))
}

impl Backdrop {
    pub(super) fn draw(
        split: Split,
        pictures: &Pictures,
        share: f32,
        floor: Option<f64>,
        random: &mut Philox,
    ) -> Self {
        let (first, second) = (colour(random), colour(random));
        let angle = random.range(0.0, std::f32::consts::TAU);
        let real = random.chance(share);
        let plain = random.chance(0.25);
        let at = [random.uniform(), random.uniform()];
        let mirrored = random.chance(0.5);
        let usable = pictures.of(split);
        let chosen = random.below(usable.len().max(1));
        let paint = match usable.get(chosen) {
            Some(&index) if real => Paint::Picture {
                index,
                tint: first,
                mirrored,
            },
            _ => match (split == Split::Judge, plain) {
                (true, false) => Paint::Radial(first, second, at),
                (true, true) => Paint::Stripes(first, second, angle, 1.0 + 4.0 * at[0]),
                (false, false) => Paint::Linear(first, second, angle),
                (false, true) => Paint::Plain(first),
            },
        };
        Self { paint, floor }
    }

    /// Paints the backdrop: RGB bytes [height, width, 3].
    pub(super) fn paint(&self, pictures: &Pictures, clip: &ClipSpec) -> Vec<u8> {
        let direction = match self.paint {
            Paint::Linear(.., angle) | Paint::Stripes(.., angle, _) => [angle.cos(), angle.sin()],
            _ => [0.0; 2],
        };
        let mut rgb = Vec::with_capacity(clip.width * clip.height * 3);
        for y in 0..clip.height {
            let v = (y as f32 + 0.5) / clip.height as f32;
            let covered = self
                .floor
                .map_or(0.0, |floor| (y as f64 + 1.0 - floor).clamp(0.0, 1.0));
            let shade = 1.0 - (1.0 - FLOOR_SHADE) * covered as f32;
            for x in 0..clip.width {
                let u = (x as f32 + 0.5) / clip.width as f32;
                let pixel = self.pixel(pictures, clip, direction, [x, y], [u, v]);
                rgb.extend(pixel.map(|part| (part * shade * 255.0 + 0.5) as u8));
            }
        }
        rgb
    }

    fn pixel(
        &self,
        pictures: &Pictures,
        clip: &ClipSpec,
        direction: [f32; 2],
        [x, y]: [usize; 2],
        [u, v]: [f32; 2],
    ) -> Colour {
        let mix = |a: &Colour, b: &Colour, share: f32| std::array::from_fn(|c| a[c] + (b[c] - a[c]) * share);
        let along = (2.0 * u - 1.0) * direction[0] + (2.0 * v - 1.0) * direction[1];
        match &self.paint {
            Paint::Plain(colour) => *colour,
            Paint::Linear(a, b, _) => mix(a, b, (0.5 + 0.36 * along).clamp(0.0, 1.0)),
            Paint::Radial(a, b, at) => mix(a, b, (u - at[0]).hypot(v - at[1]).min(1.0)),
            Paint::Stripes(a, b, _, periods) => {
                let wave = (std::f32::consts::PI * periods * along).sin();
                mix(a, b, 0.5 + 0.5 * wave)
            }
            Paint::Picture {
                index,
                tint,
                mirrored,
            } => {
                let x = if *mirrored { clip.width - 1 - x } else { x };
                let at = 3 * (y * clip.width + x);
                let picture = &pictures.0[*index][at..at + 3];
                std::array::from_fn(|c| {
                    PICTURE_SHARE * f32::from(picture[c]) / 255.0 + (1.0 - PICTURE_SHARE) * tint[c]
                })
            }
        }
    }
}
