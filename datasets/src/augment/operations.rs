//! The operations of RandAugment on RGB bytes, to the bit as Pillow does them.

use serde::{Deserialize, Serialize};

use crate::media::Picture;

/// One of the 14 operations of RandAugment (Cubuk and others, arXiv 1909.13719). What magnitude 10 means is that of torchvision; less is
/// proportional. `+-`: the sign is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Nothing; no magnitude.
    Identity,
    /// Every channel stretched so that it goes from 0 to 255; no magnitude.
    Autocontrast,
    /// Every channel with a flat histogram; no magnitude.
    Equalize,
    /// About the middle, counterclockwise; +-30 degrees.
    Rotate,
    /// Values from a threshold on are inverted; 256, which is none, down to 0.
    Solarize,
    /// Mixed with its grey version; a factor of 1 +- 0.9, 0 being grey.
    Color,
    /// The upper bits are kept; 8 down to 4.
    Posterize,
    /// Mixed with its mean grey; a factor of 1 +- 0.9.
    Contrast,
    /// Mixed with black; a factor of 1 +- 0.9.
    Brightness,
    /// Mixed with a smoothed version; a factor of 1 +- 0.9.
    Sharpness,
    /// Rows are shifted by a part of their number; +-0.3 pixels a row.
    ShearX,
    /// Columns likewise.
    ShearY,
    /// Moved to the side; +-0.45 of the width.
    TranslateX,
    /// Moved up or down; +-0.45 of the height.
    TranslateY,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Identity,
        Self::Autocontrast,
        Self::Equalize,
        Self::Rotate,
        Self::Solarize,
        Self::Color,
        Self::Posterize,
        Self::Contrast,
        Self::Brightness,
        Self::Sharpness,
        Self::ShearX,
        Self::ShearY,
        Self::TranslateX,
        Self::TranslateY,
    ];
    /// The largest magnitude.
    pub const STRONGEST: f64 = 10.0;

    /// What `magnitude` (0 to 10) means: degrees, a factor, a threshold, bits, pixels a row or pixels of a picture of this size. `negative` is the drawn sign.
    pub fn value(self, magnitude: f64, negative: bool, width: usize, height: usize) -> f64 {
        let part = magnitude / Self::STRONGEST;
        let signed = |most: f64| if negative { -part * most } else { part * most };
        match self {
            Self::Identity | Self::Autocontrast | Self::Equalize => 0.0,
            Self::Rotate => signed(30.0),
            Self::Solarize => 256.0 * (1.0 - part),
            Self::Color | Self::Contrast | Self::Brightness | Self::Sharpness => 1.0 + signed(0.9),
            Self::Posterize => 8.0 - (4.0 * part).round(),
            Self::ShearX | Self::ShearY => signed(0.3),
            Self::TranslateX => signed(0.45) * width as f64,
            Self::TranslateY => signed(0.45) * height as f64,
        }
    }

    /// Applies the operation with a value as [`Operation::value`] gives them; `fill` is what comes in from outside. Pictures with opacity
    /// come back as they are.
    #[must_use]
    pub fn apply(self, picture: &Picture, value: f64, fill: [u8; 3]) -> Picture {
        if picture.channels != 3 {
            return picture.clone();
        }
        let moved = |matrix: [f64; 6]| affine(picture, matrix, fill);
        match self {
            Self::Identity => picture.clone(),
            Self::Autocontrast => autocontrast(picture),
            Self::Equalize => equalize(picture),
            Self::Rotate => rotate(picture, value, fill),
            Self::Solarize => mapped(picture, |x| if f64::from(x) < value { x } else { 255 - x }),
            Self::Posterize => {
                let mask = !((1u16 << (8.0 - value.clamp(0.0, 8.0)) as u32) - 1) as u8;
                mapped(picture, |x| x & mask)
            }
            Self::Color => blend(picture, value, |_, pixel| [luminance(pixel); 3]),
            Self::Contrast => {
                let pixels = picture.pixels.as_chunks::<3>().0;
                let sum: u64 = pixels.iter().map(|pixel| u64::from(luminance(pixel))).sum();
                let mean = (sum as f64 / pixels.len() as f64 + 0.5) as u8;
                blend(picture, value, |_, _| [mean; 3])
            }
            Self::Brightness => blend(picture, value, |_, _| [0; 3]),
            Self::Sharpness => {
                let smooth = smoothed(picture);
                blend(picture, value, |index, _| smooth[index])
            }
            Self::ShearX => moved([1.0, value, 0.0, 0.0, 1.0, 0.0]),
            Self::ShearY => moved([1.0, 0.0, 0.0, value, 1.0, 0.0]),
            Self::TranslateX => moved([1.0, 0.0, value, 0.0, 1.0, 0.0]),
            Self::TranslateY => moved([1.0, 0.0, 0.0, 0.0, 1.0, value]),
        }
    }
}

/// Brightness of a colour, ITU-R 601 in whole numbers.
pub(super) fn luminance(&[red, green, blue]: &[u8; 3]) -> u8 {
    let sum = u32::from(red) * 19595 + u32::from(green) * 38470 + u32::from(blue) * 7471;
    ((sum + 0x8000) >> 16) as u8
}

fn with_pixels(picture: &Picture, pixels: Vec<u8>) -> Picture {
    Picture { pixels, ..*picture }
}

fn mapped(picture: &Picture, of: impl Fn(u8) -> u8) -> Picture {
    with_pixels(picture, picture.pixels.iter().map(|&x| of(x)).collect())
}

/// Between another picture (factor 0) and this one (factor 1), or beyond.
fn blend(picture: &Picture, factor: f64, other: impl Fn(usize, &[u8; 3]) -> [u8; 3]) -> Picture {
    // Pillow's factor has single precision.
    let factor = factor as f32;
    if factor == 1.0 {
        return picture.clone();
    }
    let pixels = picture.pixels.as_chunks::<3>().0;
    let mixed = pixels.iter().enumerate().flat_map(|(index, pixel)| {
        let other = other(index, pixel);
        std::array::from_fn::<u8, 3, _>(|c| {
            let (to, from) = (f32::from(pixel[c]), f32::from(other[c]));
            // The cast cuts off at both ends.
            (from + factor * (to - from)) as u8
        })
    });
    with_pixels(picture, mixed.collect())
}

/// The mean with weight 5 in the middle and 1 around it; the border stays.
fn smoothed(picture: &Picture) -> Vec<[u8; 3]> {
    let pixels = picture.pixels.as_chunks::<3>().0;
    let (width, height) = (picture.width, picture.height);
    let mut out = pixels.to_vec();
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            let around = (y - 1..=y + 1).flat_map(|row| &pixels[row * width + x - 1..=row * width + x + 1]);
            let mut sum = pixels[y * width + x].map(|value| 4 * u32::from(value));
            for pixel in around {
                for (sum, &value) in sum.iter_mut().zip(pixel) {
                    *sum += u32::from(value);
                }
            }
            // Thirteenths are never halfway between two bytes.
            out[y * width + x] = sum.map(|sum| ((2 * sum + 13) / 26) as u8);
        }
    }
    out
}

fn histograms(picture: &Picture) -> [[usize; 256]; 3] {
    let mut counts = [[0; 256]; 3];
    for pixel in picture.pixels.as_chunks::<3>().0 {
        for (counts, &value) in counts.iter_mut().zip(pixel) {
            counts[usize::from(value)] += 1;
        }
    }
    counts
}

fn looked_up(picture: &Picture, tables: &[[u8; 256]; 3]) -> Picture {
    let pixels = picture.pixels.as_chunks::<3>().0.iter();
    let pixels =
        pixels.flat_map(|pixel| std::array::from_fn::<u8, 3, _>(|c| tables[c][usize::from(pixel[c])]));
    with_pixels(picture, pixels.collect())
}

fn autocontrast(picture: &Picture) -> Picture {
    let tables = histograms(picture).map(|counts| {
        let low = counts.iter().position(|&count| count > 0).unwrap_or(0);
        let high = counts.iter().rposition(|&count| count > 0).unwrap_or(0);
        if high <= low {
            return std::array::from_fn(|value| value as u8);
        }
        let scale = 255.0 / (high - low) as f64;
        let offset = -(low as f64) * scale;
        std::array::from_fn(|value| (value as f64 * scale + offset) as u8)
    });
    looked_up(picture, &tables)
}

fn equalize(picture: &Picture) -> Picture {
    let tables = histograms(picture).map(|counts| {
        let same = std::array::from_fn(|value| value as u8);
        let present = counts.iter().filter(|&&count| count > 0);
        let Some(last) = present.clone().next_back() else {
            return same;
        };
        let step = (counts.iter().sum::<usize>() - last) / 255;
        if present.count() <= 1 || step == 0 {
            return same;
        }
        let mut sum = step / 2;
        counts.map(|count| {
            let level = sum / step;
            sum += count;
            level.min(255) as u8
        })
    });
    looked_up(picture, &tables)
}

fn rotate(picture: &Picture, degrees: f64, fill: [u8; 3]) -> Picture {
    if degrees == 0.0 {
        return picture.clone();
    }
    let (sin, cos) = (-degrees.rem_euclid(360.0).to_radians()).sin_cos();
    let rounded = |value: f64| (value * 1e15).round() / 1e15;
    let (sin, cos) = (rounded(sin), rounded(cos));
    let (x, y) = (picture.width as f64 / 2.0, picture.height as f64 / 2.0);
    let matrix = [
        cos,
        sin,
        cos * -x + sin * -y + x,
        -sin,
        cos,
        -sin * -x + cos * -y + y,
    ];
    affine(picture, matrix, fill)
}

/// Every pixel (x, y) from (a x + b y + c, d x + e y + f), the nearest one.
fn affine(picture: &Picture, [a, b, c, d, e, f]: [f64; 6], fill: [u8; 3]) -> Picture {
    let (width, height) = (picture.width, picture.height);
    let source = picture.pixels.as_chunks::<3>().0;
    let mut out = vec![fill; source.len()];
    let inside = |at: i64, length: usize| usize::try_from(at).ok().filter(|&at| at < length);
    if b == 0.0 && d == 0.0 {
        let places = |start: f64, step: f64, length: usize| {
            let mut at = start + step * 0.5;
            let mut places = Vec::with_capacity(length);
            for _ in 0..length {
                places.push(if at < 0.0 { None } else { inside(at as i64, length) });
                at += step;
            }
            places
        };
        let columns = places(c, a, width);
        for (row, from) in out.chunks_exact_mut(width).zip(places(f, e, height)) {
            let Some(from) = from else { continue };
            for (pixel, column) in row.iter_mut().zip(&columns) {
                if let Some(column) = column {
                    *pixel = source[from * width + column];
                }
            }
        }
        return with_pixels(picture, out.into_flattened());
    }
    // 16 bits behind the point.
    let fixed = |value: f64| (value * 65536.0 + 0.5).floor() as i64;
    let (step_x, step_y) = ([fixed(a), fixed(d)], [fixed(b), fixed(e)]);
    let mut start = [fixed(c + a * 0.5 + b * 0.5), fixed(f + d * 0.5 + e * 0.5)];
    for row in out.chunks_exact_mut(width) {
        let [mut x, mut y] = start;
        for pixel in row {
            if let (Some(x), Some(y)) = (inside(x >> 16, width), inside(y >> 16, height)) {
                *pixel = source[y * width + x];
            }
            x += step_x[0];
            y += step_x[1];
        }
        start = [start[0] + step_y[0], start[1] + step_y[1]];
    }
    with_pixels(picture, out.into_flattened())
}
