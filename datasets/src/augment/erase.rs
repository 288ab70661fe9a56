//! Random erasing (Zhong and others, arXiv 1708.04896).

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

use super::AugmentError;
use super::view::round;

/// How often a rectangle is drawn before the picture stays whole.
const TRIES: usize = 10;

/// What stands in an erased rectangle.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// 0, the mean.
    Mean,
    /// One standard normal draw for each value.
    #[default]
    Noise,
}

/// A random rectangle of the normalised picture is overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Erasing {
    /// How many pictures have one.
    pub probability: f64,
    /// Least and largest share of the area, drawn evenly.
    pub area: [f64; 2],
    /// Least and largest height / width, drawn evenly in the logarithm.
    pub ratio: [f64; 2],
    /// What stands in it.
    pub fill: Fill,
}

impl Default for Erasing {
    fn default() -> Self {
        Self {
            probability: 0.25,
            area: [0.02, 1.0 / 3.0],
            ratio: [0.3, 1.0 / 0.3],
            fill: Fill::Noise,
        }
    }
}

impl Erasing {
    pub(super) fn check(&self) -> Result<(), AugmentError> {
        AugmentError::check("erasing.probability", self.probability, 0.0..=1.0)?;
        AugmentError::check_pair("erasing.area", self.area, 0.0..=1.0)?;
        AugmentError::check_pair("erasing.ratio", self.ratio, 0.01..=100.0)
    }

    /// Overwrites a rectangle of `values` `[C, H, W]`, or none.
    pub(super) fn apply(&self, values: &mut [f32], [height, width]: [usize; 2], noise: &mut Philox) {
        if f64::from(noise.uniform()) >= self.probability {
            return;
        }
        let between = |[low, high]: [f64; 2], at: f32| low + (high - low) * f64::from(at);
        for _ in 0..TRIES {
            let target = (height * width) as f64 * between(self.area, noise.uniform());
            let ratio = between(self.ratio.map(f64::ln), noise.uniform()).exp();
            let (h, w) = (
                round((target * ratio).sqrt()) as usize,
                round((target / ratio).sqrt()) as usize,
            );
            if h >= height || w >= width {
                continue;
            }
            let (top, left) = (noise.below(height - h + 1), noise.below(width - w + 1));
            for plane in values.chunks_exact_mut(height * width) {
                for row in plane.chunks_exact_mut(width).skip(top).take(h) {
                    let gone = &mut row[left..left + w];
                    match self.fill {
                        Fill::Mean => gone.fill(0.0),
                        Fill::Noise => gone.fill_with(|| noise.normal()),
                    }
                }
            }
            return;
        }
    }
}
