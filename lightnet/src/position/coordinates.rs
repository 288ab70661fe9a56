//! Where a token is in the whole, as Fourier features: relative encodings cannot tell left from right.
//!
//! Coordinates are fractions of each axis, so that any size is a valid input.

use candle_core::{Device, Result, Tensor};

/// Octaves of an axis' fraction.
const OCTAVES: usize = 5;
/// Features of an axis.
pub const FRACTION_WIDTH: usize = 2 * OCTAVES;

/// Features `[N, 10 k]` of the tokens of a grid with `axes` of k lengths, row-major: sines and cosines of five octaves of each
/// fraction, axis by axis.
///
/// # Errors
/// The device has no memory left.
pub fn fractions(axes: &[usize], device: &Device) -> Result<Tensor> {
    let parts: Vec<Tensor> = (0..axes.len())
        .map(|axis| spread(&along(axes[axis], device)?, axes, axis))
        .collect::<Result<_>>()?;
    Tensor::cat(&parts, 1)
}

/// `features` `[n, c]` of the places of one axis for all tokens of a grid: `[N, c]`.
///
/// # Errors
/// `n` is not the length of that axis.
pub fn spread(features: &Tensor, axes: &[usize], axis: usize) -> Result<Tensor> {
    let outer: usize = axes[..axis].iter().product();
    let inner: usize = axes[axis + 1..].iter().product();
    let width = features.dim(1)?;
    features
        .reshape((1, axes[axis], 1, width))?
        .broadcast_as((outer, axes[axis], inner, width))?
        .contiguous()?
        .reshape((axes.iter().product::<usize>(), width))
}

fn along(n: usize, device: &Device) -> Result<Tensor> {
    let mut values = Vec::with_capacity(n * FRACTION_WIDTH);
    for i in 0..n {
        let fraction = (i as f64 + 0.5) / n as f64;
        for octave in 0..OCTAVES {
            let (sin, cos) = (std::f64::consts::PI * fraction * f64::from(1u32 << octave)).sin_cos();
            values.extend([sin as f32, cos as f32]);
        }
    }
    Tensor::from_vec(values, (n, FRACTION_WIDTH), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_the_features_of_their_row_and_column() -> Result<()> {
        let all = fractions(&[2, 3], &Device::Cpu)?.to_vec2::<f32>()?;
        assert_eq!((all.len(), all[0].len()), (6, 2 * FRACTION_WIDTH));
        let middle = std::f32::consts::FRAC_PI_2;
        // Row 1 of 2 is at three quarters, column 1 of 3 in the middle.
        assert!((all[4][0] - (1.5 * middle).sin()).abs() < 1e-6);
        assert!((all[4][FRACTION_WIDTH] - 1.0).abs() < 1e-6 && all[4][FRACTION_WIDTH + 1].abs() < 1e-6);
        assert_eq!(all[0][FRACTION_WIDTH..], all[3][FRACTION_WIDTH..]);
        assert_eq!(all[3][..FRACTION_WIDTH], all[5][..FRACTION_WIDTH]);
        Ok(())
    }
}
