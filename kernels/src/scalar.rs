//! Scalars of the CPU operators: wide instructions, a fast exponential and sums in a fixed order.

use candle_core::WithDType;
use std::ops::Neg;

/// Element of a CPU operator: `f32` for work, `f64` for tests and references.
pub(crate) trait Real: WithDType + Neg<Output = Self> {
    /// e^self. In `f32` a polynomial that vectorises, within 1e-7 of the value; it saturates outside +-87.
    fn exponential(self) -> Self;
    /// Square root.
    fn root(self) -> Self;
    /// Natural logarithm.
    fn logarithm(self) -> Self;
    /// 1 / (1 + e^-self).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).exponential())
    }
}

impl Real for f32 {
    #[inline(always)]
    fn exponential(self) -> Self {
        // Adding this rounds to an integer, which then stands in the low bits of the mantissa.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts; the first has so few bits that its multiples are exact.
        const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
        const TAYLOR: [f32; 6] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5];
        let x = self.clamp(-87.0, 87.0);
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN2[0] - n * LN2[1];
        let mut tail = TAYLOR[0];
        for coefficient in &TAYLOR[1..] {
            tail = tail * r + coefficient;
        }
        let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
        (tail * r * r + r + 1.0) * power
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn logarithm(self) -> Self {
        self.ln()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exponential(self) -> Self {
        self.exp()
    }

    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }

    #[inline(always)]
    fn logarithm(self) -> Self {
        self.ln()
    }
}

/// Runs `body` compiled for AVX2 where the machine has it.
///
/// Nothing is fused or reordered by it, so the results have the same bits on every machine.
#[inline(always)]
pub(crate) fn wide<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has just been found to have AVX2.
            return unsafe { avx2(body) };
        }
    }
    body()
}

const LANES: usize = 16;

/// Sum of `term(a_i, b_i)`, taken in 16 fixed lanes so that it vectorises; the order does not depend on threads.
#[inline(always)]
pub(crate) fn sum_of<T: Real>(a: &[T], b: &[T], term: impl Fn(T, T) -> T) -> T {
    let mut lanes = [T::zero(); LANES];
    let (heads_a, heads_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (tail_a, tail_b) = (heads_a.remainder(), heads_b.remainder());
    for (a, b) in heads_a.zip(heads_b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (&a, &b)) in tail_a.iter().zip(tail_b).enumerate() {
        lanes[lane] += term(a, b);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
    }
    lanes[0]
}

/// Rows of `width` elements that one task handles: small tasks cost more than they give.
pub(crate) fn rows_per_task(width: usize) -> usize {
    const ELEMENTS: usize = 8192;
    (ELEMENTS / width.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_exponential_is_within_1e_7() {
        let (mut worst, mut bits) = (0f64, 1u32);
        // A prime stride visits every exponent and both signs with varied mantissas.
        while f32::from_bits(bits) < 87.0 {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let exact = f64::from(x).exp();
                worst = worst.max(((f64::from(x.exponential()) - exact) / exact).abs());
            }
            bits += 997;
        }
        assert!(worst < 1e-7, "relative error {worst:e}");
        assert!(f32::NAN.exponential().is_nan());
        assert!((-1e30f32).exponential() < 2e-38 && 1e30f32.exponential() > 6e37);
        assert_eq!(0f32.exponential(), 1.0);
    }

    #[test]
    fn sums_of_any_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let a: Vec<f64> = (0..n).map(f64::from).collect();
            let squares: f64 = a.iter().map(|x| x * x).sum();
            assert_eq!(sum_of(&a, &a, |x, y| x * y), squares, "n {n}");
        }
    }
}
