//! Random parts of pictures.

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

use super::AugmentError;
use super::view::round;
use crate::media::Picture;

/// How often a part is drawn before the middle is taken.
const TRIES: usize = 10;

/// A random resized crop as in torchvision: a part of a random share of the area with a random ratio of the sides, resized to the view.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RandomCrop {
    /// Least and largest share of the area, drawn evenly.
    pub area: [f64; 2],
    /// Least and largest width / height, drawn evenly in the logarithm.
    pub ratio: [f64; 2],
}

impl Default for RandomCrop {
    fn default() -> Self {
        Self {
            area: [0.08, 1.0],
            ratio: [3.0 / 4.0, 4.0 / 3.0],
        }
    }
}

impl RandomCrop {
    pub(super) fn check(&self) -> Result<(), AugmentError> {
        AugmentError::check_pair("crop.area", self.area, 1e-3..=1.0)?;
        AugmentError::check_pair("crop.ratio", self.ratio, 0.01..=100.0)
    }

    /// Left, top, width and height of a part of a picture of `width` by `height`.
    pub(super) fn draw(&self, width: usize, height: usize, noise: &mut Philox) -> [usize; 4] {
        let area = width as f64 * height as f64;
        let between = |[low, high]: [f64; 2], at: f32| low + (high - low) * f64::from(at);
        let logarithms = self.ratio.map(f64::ln);
        for _ in 0..TRIES {
            let target = area * between(self.area, noise.uniform());
            let ratio = between(logarithms, noise.uniform()).exp();
            let (w, h) = (
                round((target * ratio).sqrt()) as usize,
                round((target / ratio).sqrt()) as usize,
            );
            if (1..=width).contains(&w) && (1..=height).contains(&h) {
                let left = noise.below(width - w + 1);
                return [left, noise.below(height - h + 1), w, h];
            }
        }
        let ratio = width as f64 / height as f64;
        let (mut w, mut h) = (width, height);
        if ratio < self.ratio[0] {
            h = (round(width as f64 / self.ratio[0]) as usize).clamp(1, height);
        } else if ratio > self.ratio[1] {
            w = (round(height as f64 * self.ratio[1]) as usize).clamp(1, width);
        }
        [(width - w) / 2, (height - h) / 2, w, h]
    }
}

/// Moves the picture by up to `pad` pixels to each side, black coming in.
pub(super) fn shift(picture: &mut Picture, pad: usize, noise: &mut Philox) {
    let (x, y) = (noise.below(2 * pad + 1), noise.below(2 * pad + 1));
    let down = pad.saturating_sub(y).min(picture.height);
    let up = y.saturating_sub(pad).min(picture.height);
    let line = picture.width * picture.channels;
    let pixels = &mut picture.pixels;
    let end = pixels.len();
    pixels.copy_within(up * line..end - down * line, down * line);
    pixels[..down * line].fill(0);
    pixels[end - up * line..].fill(0);
    let right = pad.saturating_sub(x).min(picture.width) * picture.channels;
    let left = x.saturating_sub(pad).min(picture.width) * picture.channels;
    for row in pixels.chunks_exact_mut(line) {
        row.copy_within(left..line - right, right);
        row[..right].fill(0);
        row[line - left..].fill(0);
    }
}

/// Changes left and right.
pub(super) fn flip(picture: &mut Picture) {
    for row in picture
        .pixels
        .as_chunks_mut::<3>()
        .0
        .chunks_exact_mut(picture.width)
    {
        row.reverse();
    }
}
