//! The linear noise schedule that the published system uses (1,000 steps, betas from 0.00085 to 0.012).

/// Steps of the schedule.
pub(super) const STEPS: usize = 1000;
pub(super) const FIRST_BETA: f64 = 0.00085;
pub(super) const LAST_BETA: f64 = 0.012;

/// Cumulative products of `1 - beta`.
#[derive(Clone, Debug)]
pub struct LinearSchedule {
    alpha_bar: Vec<f64>,
}

impl Default for LinearSchedule {
    fn default() -> Self {
        let beta = |t: usize| FIRST_BETA + t as f64 * (LAST_BETA - FIRST_BETA) / (STEPS - 1) as f64;
        let mut product = 1.0;
        let alpha_bar = (0..STEPS)
            .map(|t| {
                product *= 1.0 - beta(t);
                product
            })
            .collect();
        Self { alpha_bar }
    }
}

impl LinearSchedule {
    /// Remaining signal power at step `t`; 1 for steps before the first, the last value beyond the end.
    pub fn alpha_bar(&self, t: isize) -> f64 {
        match usize::try_from(t) {
            Err(_) => 1.0,
            Ok(t) => self.alpha_bar[t.min(STEPS - 1)],
        }
    }

    /// Steps of a sampler of `count` steps, noisiest first: leading spacing with offset 1.
    pub fn timesteps(count: usize) -> Vec<usize> {
        let count = count.clamp(1, STEPS);
        let ratio = STEPS / count;
        (0..count).rev().map(|k| (ratio * k + 1).min(STEPS - 1)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that follow from the published betas.
    #[test]
    fn published_values() {
        let schedule = LinearSchedule::default();
        let known = [
            (0, 0.99915),
            (1, 0.998_289_57),
            (26, 0.973_477_03),
            (501, 0.159_735_95),
            (951, 0.002_782_95),
            (976, 0.002_078_36),
            (999, 0.001_578_96),
        ];
        for (t, value) in known {
            assert!(
                (schedule.alpha_bar(t) - value).abs() < 1e-8,
                "{t}: {}",
                schedule.alpha_bar(t)
            );
        }
        assert_eq!(schedule.alpha_bar(-24), 1.0);
        let steps = LinearSchedule::timesteps(40);
        assert_eq!((steps.len(), steps[0], steps[1], steps[39]), (40, 976, 951, 1));
    }
}
