//! RandAugment (Cubuk and others, arXiv 1909.13719): a few random operations of one magnitude.

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

use super::{AugmentError, Operation};
use crate::media::Picture;

/// Random operations, one after the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RandAugment {
    /// How many.
    pub count: usize,
    /// How strong, 0 to 10.
    pub magnitude: f64,
    /// Standard deviation of the magnitude of each operation; it stays in 0 to 10.
    pub deviation: f64,
    /// Which ones are drawn from.
    pub operations: Vec<Operation>,
    /// What comes in from outside.
    pub fill: [u8; 3],
}

impl Default for RandAugment {
    fn default() -> Self {
        Self {
            count: 2,
            magnitude: 9.0,
            deviation: 0.5,
            operations: Operation::ALL.to_vec(),
            fill: [128; 3],
        }
    }
}

impl RandAugment {
    pub(super) fn check(&self) -> Result<(), AugmentError> {
        AugmentError::check("randaugment.count", self.count as f64, 0.0..=16.0)?;
        AugmentError::check(
            "randaugment.magnitude",
            self.magnitude,
            0.0..=Operation::STRONGEST,
        )?;
        AugmentError::check(
            "randaugment.deviation",
            self.deviation,
            0.0..=Operation::STRONGEST,
        )?;
        if self.operations.is_empty() {
            return Err(AugmentError {
                field: "randaugment.operations".to_owned(),
                found: "none".to_owned(),
                expected: "at least one".to_owned(),
            });
        }
        Ok(())
    }

    pub(super) fn apply(&self, mut picture: Picture, noise: &mut Philox) -> Picture {
        for _ in 0..self.count {
            let operation = self.operations[noise.below(self.operations.len())];
            let magnitude = self.magnitude + self.deviation * f64::from(noise.normal());
            let negative = noise.chance(0.5);
            let magnitude = magnitude.clamp(0.0, Operation::STRONGEST);
            let value = operation.value(magnitude, negative, picture.width, picture.height);
            picture = operation.apply(&picture, value, self.fill);
        }
        picture
    }
}
