//! Mixup and CutMix of two pictures.

use fulgur_kernels::philox::Philox;

use super::Augment;

/// What becomes of a pair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mix {
    /// Each stays itself.
    None,
    /// Each keeps so much of itself and has the rest of the other.
    Whole(f32),
    /// They exchange a rectangle: top, left, height, width.
    Part([usize; 4]),
}

impl Mix {
    pub(super) fn draw(options: &Augment, [height, width]: [usize; 2], noise: &mut Philox) -> Self {
        let Augment { mixup, cutmix, .. } = *options;
        let cut = cutmix > 0.0 && (mixup == 0.0 || noise.chance(0.5));
        if cut {
            let side = (1.0 - beta(cutmix, noise)).sqrt();
            let span = |length: usize, noise: &mut Philox| {
                let half = (length as f64 * side) as usize / 2;
                let middle = noise.below(length);
                (middle.saturating_sub(half), (middle + half).min(length))
            };
            let (top, bottom) = span(height, noise);
            let (left, right) = span(width, noise);
            return Self::Part([top, left, bottom - top, right - left]);
        }
        if mixup > 0.0 {
            return Self::Whole(beta(mixup, noise) as f32);
        }
        Self::None
    }

    /// How much each keeps of itself.
    pub(super) fn kept(self, [height, width]: [usize; 2]) -> f32 {
        match self {
            Self::None => 1.0,
            Self::Whole(kept) => kept,
            Self::Part([_, _, h, w]) => 1.0 - (h * w) as f32 / (height * width) as f32,
        }
    }

    /// Mixes two pictures `[C, H, W]`.
    pub(super) fn apply(self, first: &mut [f32], second: &mut [f32], [height, width]: [usize; 2]) {
        match self {
            Self::None => {}
            Self::Whole(kept) => {
                for (a, b) in first.iter_mut().zip(second) {
                    (*a, *b) = (kept * *a + (1.0 - kept) * *b, kept * *b + (1.0 - kept) * *a);
                }
            }
            Self::Part([top, left, h, w]) => {
                let area = height * width;
                let planes = first.chunks_exact_mut(area).zip(second.chunks_exact_mut(area));
                for (first, second) in planes {
                    for row in top..top + h {
                        let range = row * width + left..row * width + left + w;
                        first[range.clone()].swap_with_slice(&mut second[range]);
                    }
                }
            }
        }
    }
}

/// A draw from Beta(a, a), as a ratio of two draws of the gamma distribution in logarithms, so that small parameters do not underflow.
fn beta(a: f64, noise: &mut Philox) -> f64 {
    let (first, second) = (log_gamma_draw(a, noise), log_gamma_draw(a, noise));
    1.0 / (1.0 + (second - first).exp())
}

/// The logarithm of a draw from Gamma(a, 1) (Marsaglia and Tsang, 2000).
fn log_gamma_draw(a: f64, noise: &mut Philox) -> f64 {
    // In (0, 1], so that logarithms are finite.
    let positive = |noise: &mut Philox| 1.0 - f64::from(noise.uniform());
    if a < 1.0 {
        let below = positive(noise).ln() / a;
        return log_gamma_draw(a + 1.0, noise) + below;
    }
    let d = a - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = f64::from(noise.normal());
        let v = (1.0 + c * x).powi(3);
        if v > 0.0 && positive(noise).ln() < 0.5 * x * x + d - d * v + d * v.ln() {
            return (d * v).ln();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beta_has_its_mean_and_variance() {
        for a in [0.1, 0.8, 1.0, 3.0] {
            let mut noise = Philox::new(5, 0);
            let draws: Vec<f64> = (0..20_000).map(|_| beta(a, &mut noise)).collect();
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
            assert!((mean - 0.5).abs() < 0.015, "{a}: {mean}");
            let expected = 0.25 / (2.0 * a + 1.0);
            assert!(
                (variance / expected - 1.0).abs() < 0.05,
                "{a}: {variance} {expected}"
            );
        }
        let mut noise = Philox::new(5, 1);
        assert!((0..1000).all(|_| (0.0..=1.0).contains(&beta(1e-9, &mut noise))));
    }
}
