//! What a model sees of a picture, without chance.

use serde::{Deserialize, Serialize};

use super::AugmentError;
use super::operations::luminance;
use crate::media::{Filter, MediaError, Picture};

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

    /// A view of pictures in RGB that sees all of the shorter side, of this height and width.
    #[must_use]
    pub fn filled([height, width]: [usize; 2]) -> Self {
        Self {
            height,
            width,
            crop: 1.0,
            ..Self::default()
        }
    }

    /// The middle of an RGB picture in the size of the view, as bytes.
    ///
    /// # Errors
    /// The view has no pixels, or more than [`MAX_PICTURE_PIXELS`](crate::media::MAX_PICTURE_PIXELS).
    pub fn middle(&self, picture: &Picture) -> Result<Picture, MediaError> {
        let (whole, corner) = self.place(picture);
        picture.resized_part(whole, corner, [self.width, self.height], self.filter)
    }

    /// As [`Self::middle`], without a copy where the picture has the size of the view and all of it is seen.
    pub(super) fn own_middle(&self, picture: Picture) -> Result<Picture, MediaError> {
        let size = [self.width, self.height];
        match self.place(&picture) {
            (whole, [0, 0]) if whole == size && size == [picture.width, picture.height] => Ok(picture),
            (whole, corner) => picture.resized_part(whole, corner, size, self.filter),
        }
    }

    /// Width and height that a picture is resized to, and column and row where its middle begins.
    fn place(&self, picture: &Picture) -> ([usize; 2], [usize; 2]) {
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
        let whole = [width as usize, height as usize];
        let first = |whole: usize, part: usize| round(whole.saturating_sub(part) as f64 / 2.0) as usize;
        (whole, [first(whole[0], self.width), first(whole[1], self.height)])
    }

    /// RGB pictures of one size, whichever it is, as values `[B, C, H, W]`.
    #[must_use]
    pub fn normalised(&self, pictures: &[Picture]) -> Vec<f32> {
        let area = |picture: &Picture| picture.width * picture.height * self.channels;
        let size = pictures.first().map_or(1, area);
        let scale = Scale::of(self);
        let mut values = vec![0.0; pictures.len() * size];
        for (values, picture) in values.chunks_exact_mut(size).zip(pictures) {
            scale.apply(picture, values);
        }
        values
    }
}

/// What every byte of a channel becomes.
pub(super) struct Scale(Vec<[f32; 256]>);

impl Scale {
    pub(super) fn of(view: &View) -> Self {
        let tables = view.mean.iter().zip(&view.std).take(view.channels);
        Self(
            tables
                .map(|(mean, std)| std::array::from_fn(|x| ((x as f64 / 255.0 - mean) / std) as f32))
                .collect(),
        )
    }

    /// Writes the values of an RGB picture, channel after channel; of one channel those of its luminance.
    pub(super) fn apply(&self, picture: &Picture, values: &mut [f32]) {
        let pixels = picture.pixels.as_chunks::<3>().0;
        if let [table] = self.0.as_slice() {
            for (value, pixel) in values.iter_mut().zip(pixels) {
                *value = table[usize::from(luminance(pixel))];
            }
            return;
        }
        let planes = values.chunks_exact_mut(pixels.len().max(1));
        for (channel, (plane, table)) in planes.zip(&self.0).enumerate() {
            for (value, pixel) in plane.iter_mut().zip(pixels) {
                *value = table[usize::from(pixel[channel])];
            }
        }
    }
}

/// Half to even, as Python rounds.
pub(super) fn round(value: f64) -> f64 {
    value.round_ties_even()
}
