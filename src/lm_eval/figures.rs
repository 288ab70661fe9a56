//! Figures with standard errors.

use serde::Serialize;

/// A mean, or a ratio of sums, and how far it may be off.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The value.
    pub mean: f64,
    /// Its standard error; none of a single observation.
    pub stderr: Option<f64>,
}

impl Estimate {
    /// The same in another unit.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        Self {
            mean: self.mean * factor,
            stderr: self.stderr.map(|stderr| stderr * factor),
        }
    }

    /// The mean of independent figures, weighed; none without any weight.
    pub fn weighed(figures: impl IntoIterator<Item = (Self, f64)>) -> Option<Self> {
        let (mut sum, mut variance, mut weights) = (0.0, Some(0.0), 0.0);
        for (figure, weight) in figures {
            sum += weight * figure.mean;
            weights += weight;
            if weight > 0.0 {
                let own = figure.stderr.map(|stderr| (weight * stderr).powi(2));
                variance = variance.zip(own).map(|(all, own)| all + own);
            }
        }
        (weights > 0.0).then(|| Self {
            mean: sum / weights,
            stderr: variance.map(|variance| f64::sqrt(variance) / weights),
        })
    }
}

/// Observations `(x, w)` that come one by one, and the ratio of their sums `r = sum x / sum w`: a mean where all `w` are 1.
///
/// The standard error is that of a ratio of D independent observations, `sqrt(D / (D - 1) sum (x - r w)^2) / sum w`; of a mean, the
/// sample's standard deviation over `sqrt(D)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ratio {
    count: usize,
    x: f64,
    w: f64,
    xx: f64,
    xw: f64,
    ww: f64,
}

impl Ratio {
    /// One more observation.
    pub fn add(&mut self, x: f64, w: f64) {
        self.count += 1;
        self.x += x;
        self.w += w;
        self.xx += x * x;
        self.xw += x * w;
        self.ww += w * w;
    }

    /// All observations of another.
    pub fn join(&mut self, other: &Self) {
        self.count += other.count;
        self.x += other.x;
        self.w += other.w;
        self.xx += other.xx;
        self.xw += other.xw;
        self.ww += other.ww;
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The ratio; none without any weight.
    pub fn estimate(&self) -> Option<Estimate> {
        if self.w <= 0.0 {
            return None;
        }
        let mean = self.x / self.w;
        let stderr = (self.count > 1).then(|| {
            let squares = self.xx - 2.0 * mean * self.xw + mean * mean * self.ww;
            let count = self.count as f64;
            // What is left of equal observations is rounding, which may be negative.
            (count / (count - 1.0) * squares.max(0.0)).sqrt() / self.w
        });
        Some(Estimate { mean, stderr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ratio(observations: &[(f64, f64)]) -> Option<Estimate> {
        let mut all = Ratio::default();
        observations.iter().for_each(|&(x, w)| all.add(x, w));
        assert_eq!(all.count(), observations.len());
        all.estimate()
    }

    #[test]
    fn means_have_the_standard_error_of_samples() {
        assert_eq!(ratio(&[]), None);
        let one = ratio(&[(3.0, 1.0)]).unwrap();
        assert_eq!((one.mean, one.stderr), (3.0, None));
        // Deviation of 1, 2, 3, 4 is sqrt(5 / 3).
        let four = ratio(&[1.0, 2.0, 3.0, 4.0].map(|x| (x, 1.0))).unwrap();
        assert_eq!(four.mean, 2.5);
        assert!((four.stderr.unwrap() - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-12);
        // Of shares p of n it is sqrt(p (1 - p) / (n - 1)).
        let shares: Vec<_> = (0..10).map(|at| (f64::from(u8::from(at < 3)), 1.0)).collect();
        let share = ratio(&shares).unwrap();
        assert!((share.stderr.unwrap() - (0.3f64 * 0.7 / 9.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn ratios_weigh_by_size() {
        let found = ratio(&[(10.0, 4.0), (6.0, 2.0), (1.0, 1.0)]).unwrap();
        let r = 17.0 / 7.0;
        let squares = (10.0f64 - 4.0 * r).powi(2) + (6.0f64 - 2.0 * r).powi(2) + (1.0 - r).powi(2);
        assert!((found.mean - r).abs() < 1e-12);
        assert!((found.stderr.unwrap() - (1.5 * squares).sqrt() / 7.0).abs() < 1e-12);
        // Always the same share leaves no doubt.
        let same = ratio(&[(2.0, 4.0), (3.0, 6.0)]).unwrap();
        assert!(same.stderr.unwrap() < 1e-7 && (same.mean - 0.5).abs() < 1e-12);
    }

    #[test]
    fn means_of_figures_add_their_variances() {
        let figure = |mean, stderr| Estimate { mean, stderr };
        let both = [(figure(1.0, Some(0.3)), 1.0), (figure(3.0, Some(0.4)), 1.0)];
        let mean = Estimate::weighed(both).unwrap();
        assert!((mean.mean - 2.0).abs() < 1e-12 && (mean.stderr.unwrap() - 0.25).abs() < 1e-12);
        let one = Estimate::weighed([(figure(1.0, Some(0.3)), 2.0), (figure(9.0, None), 0.0)]);
        let one = one.unwrap();
        assert!((one.mean - 1.0).abs() < 1e-12 && (one.stderr.unwrap() - 0.3).abs() < 1e-12);
        assert_eq!(Estimate::weighed([(figure(1.0, None), 0.0)]), None);
        assert_eq!(
            Estimate::weighed([(figure(1.0, None), 1.0)]).unwrap().stderr,
            None
        );
        assert_eq!(figure(2.0, Some(0.5)).times(2.0), figure(4.0, Some(1.0)));
    }
}
