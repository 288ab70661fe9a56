//! Exponentials of masked logits and sines of phases, over whole slices so that they vectorise.

use crate::scalar::{Real, wide};

/// Element of the recurrences on the CPU: `f32` for work, `f64` for proof.
pub(crate) trait SliceMath: Real {
    /// Negative infinity, the logit of a token that does not count.
    const NEG_INFINITY: Self;

    /// e to the power of each value; for values <= 0. Exactly zero for negative infinity.
    fn exp(values: &mut [Self]);

    /// Sine and cosine of each value of `angle`, in radians.
    fn sin_cos(angle: &[Self], sin: &mut [Self], cos: &mut [Self]);
}

impl SliceMath for f64 {
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    fn exp(values: &mut [Self]) {
        for value in values {
            *value = value.exponential();
        }
    }

    fn sin_cos(angle: &[Self], sin: &mut [Self], cos: &mut [Self]) {
        for ((&angle, sin), cos) in angle.iter().zip(sin).zip(cos) {
            (*sin, *cos) = f64::sin_cos(angle);
        }
    }
}

/// Where the fast exponential saturates, and a weight beside 1 has long vanished.
const SMALLEST_EXPONENT: f32 = -87.0;

impl SliceMath for f32 {
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    fn exp(values: &mut [Self]) {
        wide(
            #[inline(always)]
            || {
                for value in values {
                    let e = value.exponential();
                    *value = if *value < SMALLEST_EXPONENT { 0.0 } else { e };
                }
            },
        );
    }

    fn sin_cos(angle: &[Self], sin: &mut [Self], cos: &mut [Self]) {
        if angle.iter().any(|a| a.abs() > REDUCIBLE) {
            for ((&angle, sin), cos) in angle.iter().zip(sin).zip(cos) {
                (*sin, *cos) = f32::sin_cos(angle);
            }
            return;
        }
        wide(
            #[inline(always)]
            || {
                for ((&angle, sin), cos) in angle.iter().zip(sin).zip(cos) {
                    (*sin, *cos) = sin_cos_f32(angle);
                }
            },
        );
    }
}

/// Adding and subtracting 1.5 * 2^52 rounds to the nearest integer, which then stands in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Largest angle that one product reduces to a quarter turn exactly enough.
const REDUCIBLE: f32 = 1e8;

/// Sine and cosine for |x| <= `REDUCIBLE`: reduced to a quarter turn in `f64`, then polynomials on |r| <= pi / 4.
#[inline(always)]
fn sin_cos_f32(x: f32) -> (f32, f32) {
    let x = f64::from(x);
    let shifted = x * std::f64::consts::FRAC_2_PI + ROUND;
    let quarters = shifted.to_bits() as u32;
    let r = (x - (shifted - ROUND) * std::f64::consts::FRAC_PI_2) as f32;
    let r2 = r * r;
    let s = r + r * r2 * (-1.666_665_5e-1 + r2 * (8.332_161e-3 + r2 * -1.951_529_6e-4));
    let c = 1.0 - 0.5 * r2 + r2 * r2 * (4.166_664_6e-2 + r2 * (-1.388_731_6e-3 + r2 * 2.443_315_7e-5));
    let (sin, cos) = if quarters & 1 == 0 { (s, c) } else { (c, s) };
    let sin_sign = (quarters & 2) << 30;
    let cos_sign = (quarters.wrapping_add(1) & 2) << 30;
    (
        f32::from_bits(sin.to_bits() ^ sin_sign),
        f32::from_bits(cos.to_bits() ^ cos_sign),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_logits_weigh_nothing() {
        let mut values = [0.0f32, f32::NEG_INFINITY, -1e30, -1.0, f32::NAN];
        SliceMath::exp(&mut values);
        assert_eq!(values[..3], [1.0, 0.0, 0.0]);
        assert!((values[3] - (-1f32).exp()).abs() < 1e-7);
        assert!(values[4].is_nan());
    }

    #[test]
    fn sine_and_cosine_are_close_to_the_library() {
        for scale in [1e-4f32, 1.0, 100.0, 1e4, 1e6] {
            for i in -20_000..20_000 {
                let x = scale * i as f32 / 5_000.0;
                let (sin, cos) = sin_cos_f32(x);
                let (exact_sin, exact_cos) = f64::from(x).sin_cos();
                let error = (f64::from(sin) - exact_sin)
                    .abs()
                    .max((f64::from(cos) - exact_cos).abs());
                assert!(error < 2e-7, "angle {x}: error {error}");
            }
        }
        let (mut sin, mut cos) = ([0f32], [0f32]);
        SliceMath::sin_cos(&[f32::NAN], &mut sin, &mut cos);
        assert!(sin[0].is_nan() && cos[0].is_nan());
        SliceMath::sin_cos(&[3e20f32], &mut sin, &mut cos);
        assert_eq!((sin[0], cos[0]), 3e20f32.sin_cos());
    }
}
