//! Learning-rate schedules: a factor between 0 and 1 over the course of a run.

use serde::{Deserialize, Serialize};

/// The shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// The full rate until the end.
    Constant,
    /// Half a cosine from the full rate to `floor`.
    #[default]
    Cosine,
    /// Warm-up, stable, decay: the full rate, then a straight line to `floor` over the last `decay` part.
    Wsd,
    /// The full rate at the end of warm-up, then falling with the square root of the step.
    InverseSqrt,
}

/// A schedule: linear warm-up from zero, then a shape.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// What follows the warm-up.
    pub shape: Shape,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Where `cosine` and `wsd` end, as a part of the full rate.
    pub floor: f64,
    /// The part of the run over which `wsd` decays.
    pub decay: f64,
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            shape: Shape::Cosine,
            warmup: 100,
            floor: 0.0,
            decay: 0.2,
        }
    }
}

impl Schedule {
    /// The factor for `step` (from 0) of a run of which the part `progress` (0 to 1) is done. The first step has the
    /// factor `1 / warmup`, step `warmup - 1` the full rate.
    pub fn factor(&self, step: u64, progress: f64) -> f64 {
        let warm = if step < self.warmup {
            (step + 1) as f64 / self.warmup as f64
        } else {
            1.0
        };
        let progress = progress.clamp(0.0, 1.0);
        let between = |part: f64| self.floor + (1.0 - self.floor) * part;
        warm * match self.shape {
            Shape::Constant => 1.0,
            Shape::Cosine => between(0.5 * (1.0 + (std::f64::consts::PI * progress).cos())),
            Shape::Wsd if self.decay > 0.0 => between(((1.0 - progress) / self.decay).min(1.0)),
            Shape::Wsd => 1.0,
            Shape::InverseSqrt => {
                let warmup = self.warmup.max(1) as f64;
                (warmup / ((step + 1) as f64).max(warmup)).sqrt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_pass_through_known_points() {
        let of = |shape, warmup| Schedule {
            shape,
            warmup,
            floor: 0.1,
            decay: 0.25,
        };
        let close =
            |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        for shape in [Shape::Constant, Shape::Cosine, Shape::Wsd, Shape::InverseSqrt] {
            close(of(shape, 10).factor(0, 0.0), 0.1);
            close(of(shape, 10).factor(9, 0.0), 1.0);
            close(of(shape, 0).factor(0, 0.0), 1.0);
        }
        close(of(Shape::Constant, 0).factor(500, 0.9), 1.0);
        close(of(Shape::Cosine, 0).factor(500, 0.5), 0.55);
        close(of(Shape::Cosine, 0).factor(500, 1.0), 0.1);
        close(of(Shape::Wsd, 0).factor(500, 0.75), 1.0);
        close(of(Shape::Wsd, 0).factor(500, 0.875), 0.55);
        close(of(Shape::Wsd, 0).factor(500, 1.0), 0.1);
        close(of(Shape::InverseSqrt, 100).factor(399, 0.1), 0.5);
    }
}
