//! Batches of pictures for models: evaluation without chance, training with it.
//!
//! [`View`] is what a model sees: size, channels, mean and deviation; evaluation takes the middle of a picture. [`Augment`] adds chance:
//! random resized crops, shifts, flips, RandAugment, erasing, mixup and cutmix. Everything is a function of (seed, number of the draw)
//! alone, so that batches have the same bits for any number of threads and however they are cut at even places.
//!
//! ```
//! use fulgur_datasets::augment::{Augment, Sample, View};
//! use fulgur_datasets::labelled::{Item, Labelled};
//! use fulgur_datasets::media::Picture;
//!
//! let item = |label: usize| Item {
//!     picture: Picture { pixels: vec![255; 300], width: 10, height: 10, channels: 3 },
//!     label: Some(label),
//!     caption: None,
//!     key: String::new(),
//! };
//! let set = Labelled::in_memory("white", vec!["a".into(), "b".into()], vec![item(0), item(1)])?;
//! let view = View { height: 8, width: 8, crop: 1.0, ..View::default() };
//! let samples = [Sample { picture: 0, number: 0 }, Sample { picture: 1, number: 1 }];
//! let batch = Augment { flip: 0.5, mixup: 0.2, ..Augment::default() }.batch(&view, &set, &samples, 7)?;
//! assert_eq!((batch.shape, batch.pixels[0]), ([2, 3, 8, 8], 1.0));
//! let soft = batch.soft_targets(2, 0.0);
//! assert!((soft[0] + soft[1] - 1.0).abs() < 1e-6);
//! # Ok::<(), fulgur_datasets::labelled::LabelledError>(())
//! ```

mod batch;
mod crop;
mod erase;
mod mix;
mod operations;
mod randaugment;
mod view;

use serde::{Deserialize, Serialize};

pub use batch::{Batch, Sample, Target};
pub use crop::RandomCrop;
pub use erase::{Erasing, Fill};
pub use operations::Operation;
pub use randaugment::RandAugment;
pub use view::View;

/// A setting that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: found {found}, expected {expected}")]
pub struct AugmentError {
    /// The setting, such as `crop.area`.
    pub field: String,
    /// What it is.
    pub found: String,
    /// What it may be.
    pub expected: String,
}

impl AugmentError {
    /// Whether `value` lies in `range`; no number is outside of all.
    fn check(field: &str, value: f64, range: std::ops::RangeInclusive<f64>) -> Result<(), Self> {
        if range.contains(&value) {
            return Ok(());
        }
        Err(Self {
            field: field.to_owned(),
            found: value.to_string(),
            expected: format!("{} to {}", range.start(), range.end()),
        })
    }

    /// Whether both values lie in `range`, the first not above the second.
    fn check_pair(
        field: &str,
        [low, high]: [f64; 2],
        range: std::ops::RangeInclusive<f64>,
    ) -> Result<(), Self> {
        Self::check(field, low, range.clone())?;
        Self::check(field, high, range)?;
        if low <= high {
            return Ok(());
        }
        Err(Self {
            field: field.to_owned(),
            found: format!("[{low}, {high}]"),
            expected: "the smaller one first".to_owned(),
        })
    }
}

/// Chance in training. By default there is none, and training sees what evaluation sees.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// A random part of the picture in the size of the view; without it the middle as in evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<RandomCrop>,
    /// Then a shift by up to so many pixels to each side, black coming in: a crop of the padded picture.
    pub pad: usize,
    /// Probability of left and right being changed.
    pub flip: f64,
    /// Random operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub randaugment: Option<RandAugment>,
    /// A rectangle of the normalised picture that is overwritten.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub erasing: Option<Erasing>,
    /// Mixup (arXiv 1710.09412): parts are drawn from Beta(mixup, mixup); off if 0.
    pub mixup: f64,
    /// CutMix (arXiv 1905.04899): parts are drawn from Beta(cutmix, cutmix); off if 0. With both, each pair has one or the other with
    /// equal chance.
    pub cutmix: f64,
}

impl Augment {
    /// Most pixels of a shift.
    const MOST_PAD: usize = 1 << 12;

    /// Checks every setting.
    ///
    /// # Errors
    /// A setting is out of its range or no number.
    pub fn check(&self) -> Result<(), AugmentError> {
        AugmentError::check("flip", self.flip, 0.0..=1.0)?;
        AugmentError::check("mixup", self.mixup, 0.0..=100.0)?;
        AugmentError::check("cutmix", self.cutmix, 0.0..=100.0)?;
        AugmentError::check("pad", self.pad as f64, 0.0..=Self::MOST_PAD as f64)?;
        if let Some(crop) = &self.crop {
            crop.check()?;
        }
        if let Some(randaugment) = &self.randaugment {
            randaugment.check()?;
        }
        if let Some(erasing) = &self.erasing {
            erasing.check()?;
        }
        Ok(())
    }
}
