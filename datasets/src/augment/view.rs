//! What a model sees of a picture, without chance.

use serde::{Deserialize, Serialize};

use super::AugmentError;
use super::operations::luminance;
use crate::media::{Filter, MAX_PICTURE_PIXELS, MediaError, Picture};

/// Size and scale of the pictures that a model takes. Evaluation is that of timm and torchvision: the shorter side is resized to
/// size / crop, the middle is cut out, values are (x / 255 - mean) / std.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct View {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// 3 for RGB, 1 for grey (ITU-R 601).
    pub channels: usize,
    /// How much of the shorter side evaluation sees; 1 is all of it.
    pub crop: f64,
    /// How pictures are resized.
    pub filter: Filter,
    /// Taken off values from 0 to 1, per channel; grey pictures have the first.
    pub mean: [f64; 3],
    /// What is left is divided by it.
    pub std: [f64; 3],
}

impl Default for View {
    fn default() -> Self {
        Self {
            height: 224,
            width: 224,
            channels: 3,
            crop: 0.875,
            filter: Filter::Bicubic,
            mean: [0.5; 3],
            std: [0.5; 3],
        }
    }
}

impl View {
    /// Mean of ImageNet's pictures.
    pub const IMAGENET_MEAN: [f64; 3] = [0.485, 0.456, 0.406];
    /// Their standard deviation.
    pub const IMAGENET_STD: [f64; 3] = [0.229, 0.224, 0.225];
    /// Longest side.
    const MOST: f64 = 16_384.0;

    /// Checks every setting.
    ///
    /// # Errors
    /// A setting is out of its range or no number.
    pub fn check(&self) -> Result<(), AugmentError> {
        AugmentError::check("height", self.height as f64, 1.0..=Self::MOST)?;
        AugmentError::check("width", self.width as f64, 1.0..=Self::MOST)?;
        // The resized picture is larger by the square of it, at least.
        AugmentError::check("crop", self.crop, 0.25..=1.0)?;
        if !matches!(self.channels, 1 | 3) {
            return Err(AugmentError {
                field: "channels".to_owned(),
                found: self.channels.to_string(),
                expected: "1 or 3".to_owned(),
            });
        }
        for (&mean, &std) in self.mean.iter().zip(&self.std) {
            AugmentError::check("mean", mean, -10.0..=10.0)?;
            AugmentError::check("std", std, 1e-3..=10.0)?;
        }
        Ok(())
    }

    /// The middle of an RGB picture in the size of the view, as bytes.
    ///
    /// # Errors
    /// The picture is so long and thin that the resized one would pass [`MAX_PICTURE_PIXELS`].
    pub fn middle(&self, picture: &Picture) -> Result<Picture, MediaError> {
        let (from_width, from_height) = (picture.width as f64, picture.height as f64);
        let target = |side: usize| (side as f64 / self.crop).floor();
        let (high, wide) = (target(self.height), target(self.width));
        let (width, height) = if self.height == self.width {
            // The longer side is rounded down.
            if from_width <= from_height {
                (wide, (high * from_height / from_width).floor())
            } else {
                ((wide * from_width / from_height).floor(), high)
            }
        } else {
            let ratio = (from_height / high).min(from_width / wide);
            (round(from_width / ratio), round(from_height / ratio))
        };
        if width * height > MAX_PICTURE_PIXELS as f64 {
            return Err(MediaError::invalid(
                "resized picture",
                format!("{width} x {height} pixels"),
                format!("at most {MAX_PICTURE_PIXELS}"),
            ));
        }
        let resized = picture.resized(width as usize, height as usize, self.filter)?;
        let first = |whole: usize, part: usize| round((whole - part) as f64 / 2.0) as usize;
        let left = first(resized.width, self.width);
        let top = first(resized.height, self.height);
        resized.cropped(left, top, self.width, self.height)
    }

    /// Appends the values of an RGB picture to `out`: [height, width, channels].
    pub(super) fn normalise(&self, picture: &Picture, out: &mut [f32]) {
        let table = |channel: usize| {
            let (mean, std) = (self.mean[channel], self.std[channel]);
            std::array::from_fn::<f32, 256, _>(|x| ((x as f64 / 255.0 - mean) / std) as f32)
        };
        let pixels = picture.pixels.as_chunks::<3>().0;
        if self.channels == 1 {
            let table = table(0);
            for (value, pixel) in out.iter_mut().zip(pixels) {
                *value = table[usize::from(luminance(pixel))];
            }
            return;
        }
        let tables = [table(0), table(1), table(2)];
        for (values, pixel) in out.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
            for c in 0..3 {
                values[c] = tables[c][usize::from(pixel[c])];
            }
        }
    }
}

/// Half to even, as Python rounds.
pub(super) fn round(value: f64) -> f64 {
    value.round_ties_even()
}
