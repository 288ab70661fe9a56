//! Power laws through points, by least squares of logarithms, with bootstrap intervals.

use fulgur_kernels::philox::Philox;
use serde::{Deserialize, Serialize};

use super::published::Power;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;
/// Percentiles of an interval.
const INTERVAL: [f64; 2] = [0.025, 0.975];
/// Fewest points that a law is fitted to.
pub(super) const FEWEST: usize = 3;

/// `beta C^alpha` with what is known of its quality.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Law {
    /// The exponent.
    pub alpha: f64,
    /// The value at one PFLOP/s-day.
    pub beta: f64,
    /// 95 % of the exponents of resampled points.
    pub interval: [f64; 2],
    /// The same of beta.
    pub beta_interval: [f64; 2],
    /// Root mean square of what the logarithms of values miss the line by.
    pub residual: f64,
}

impl Law {
    /// The law through points of compute and value, all above 0; none where there are fewer than three, or all at one
    /// compute. The same seed gives the same interval.
    #[must_use]
    pub fn through(points: &[(f64, f64)], seed: u64) -> Option<Self> {
        if points.len() < FEWEST {
            return None;
        }
        let logs: Vec<(f64, f64)> = points.iter().map(|(c, value)| (c.ln(), value.ln())).collect();
        let (alpha, intercept) = line(logs.iter().copied())?;
        let missed = logs.iter().map(|(x, y)| (y - intercept - alpha * x).powi(2));
        let residual = (missed.sum::<f64>() / logs.len() as f64).sqrt();
        let mut noise = Philox::named(seed, "scaling/bootstrap");
        let (mut alphas, mut betas) = (Vec::new(), Vec::new());
        for _ in 0..RESAMPLES {
            let drawn: Vec<_> = logs
                .iter()
                .map(|_| logs[(noise.next_u64() % logs.len() as u64) as usize])
                .collect();
            // A resample of one point only says nothing about slopes.
            if let Some((alpha, intercept)) = line(drawn.into_iter()) {
                alphas.push(alpha);
                betas.push(intercept.exp());
            }
        }
        Some(Self {
            alpha,
            beta: intercept.exp(),
            interval: interval(alphas),
            beta_interval: interval(betas),
            residual,
        })
    }

    /// The value at `compute`, in PFLOP/s-days.
    #[must_use]
    pub fn at(&self, compute: f64) -> f64 {
        self.power().at(compute)
    }

    /// Without intervals.
    #[must_use]
    pub fn power(&self) -> Power {
        Power {
            alpha: self.alpha,
            beta: self.beta,
        }
    }
}

/// Slope and intercept of least squares; none of points that are all above one another.
fn line(points: impl ExactSizeIterator<Item = (f64, f64)> + Clone) -> Option<(f64, f64)> {
    let count = points.len() as f64;
    let mean = |of: fn((f64, f64)) -> f64| points.clone().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|point| point.0), mean(|point| point.1));
    let (mut spread, mut joint) = (0.0, 0.0);
    for (px, py) in points {
        spread += (px - x).powi(2);
        joint += (px - x) * (py - y);
    }
    let slope = joint / spread;
    slope.is_finite().then_some((slope, y - slope * x))
}

/// The percentiles of values.
fn interval(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1) as f64;
    INTERVAL.map(|part| {
        values
            .get((part * last).round() as usize)
            .copied()
            .unwrap_or(f64::NAN)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noisy(seed: u64, noise: f64) -> Vec<(f64, f64)> {
        let mut draw = Philox::named(seed, "test");
        (0..24)
            .map(|i| {
                let c = 1e-6 * 10f64.powf(f64::from(i) / 10.0);
                let off = noise * f64::from(draw.normal());
                (c, 3.5 * c.powf(-0.08) * off.exp())
            })
            .collect()
    }

    #[test]
    fn a_law_is_recovered_exactly() {
        let law = Law::through(&noisy(1, 0.0), 1).unwrap();
        assert!((law.alpha + 0.08).abs() < 1e-12 && (law.beta - 3.5).abs() < 1e-9);
        assert!(law.residual < 1e-12);
        assert!((law.at(1e-3) - 3.5 * 1e-3f64.powf(-0.08)).abs() < 1e-9);
    }

    /// 95 % of the intervals of many draws hold the exponent, give or take; and intervals grow with the noise.
    #[test]
    fn intervals_cover_the_exponent() {
        let held = (0..60).filter(|&seed| {
            let law = Law::through(&noisy(seed, 0.02), seed).unwrap();
            (law.interval[0]..=law.interval[1]).contains(&-0.08)
        });
        assert!((48..=60).contains(&held.count()));
        let width = |noise: f64| {
            let [low, high] = Law::through(&noisy(3, noise), 3).unwrap().interval;
            high - low
        };
        assert!(width(0.04) > 1.5 * width(0.02));
        let law = Law::through(&noisy(4, 0.02), 9).unwrap();
        assert_eq!(Some(law), Law::through(&noisy(4, 0.02), 9));
    }

    #[test]
    fn too_little_gives_no_law() {
        assert_eq!(Law::through(&[(1.0, 2.0), (2.0, 1.0)], 1), None);
        assert_eq!(Law::through(&[(1.0, 2.0); 5], 1), None);
    }
}
