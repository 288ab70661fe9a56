//! Token shift: half of the channels look at the neighbours along each axis of the grid, at the price of a copy.
//!
//! For n axes the first half of the channels falls into 2 n groups of C / (4 n). Group 2 d holds what the token
//! before it along axis d holds there, group 2 d + 1 what the token after it holds; beyond the border is zero. The
//! other channels stay. The gradient is the same shift the other way round.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use crate::error::OpError;
use crate::pass::{forward, same_kind};
use crate::tape::{self, Needs, Set};
use candle_core::{CustomOp1, Layout, Result, Shape, Tensor};

/// Largest number of axes.
const AXES: usize = 3;

/// The shift, or its adjoint when `reverse`. Unused axes come first and have length 1 and an empty group.
#[derive(Clone, Copy, Debug)]
struct TokenShift {
    grid: [usize; AXES],
    axes: usize,
    channels: usize,
    reverse: bool,
}

/// Shifts half of the channels of `x` [B, g1, .., gn, C] by one token to and fro along each of its n axes (1 to 3).
///
/// Differentiable. Elements f32 or f64 on the CPU, f32 or bf16 on CUDA.
///
/// # Errors
/// If `x` has no axis or more than three, fewer than 4 n channels, or an element type that is not supported.
pub fn token_shift(x: &Tensor) -> Result<Tensor> {
    const OP: &str = "token_shift";
    let wrong = || OpError::shape(OP, "x", x, "[B, g1, .., gn, C] with n of 1 to 3 and C >= 4 n");
    let &[_, ref grid @ .., channels] = x.dims() else {
        return Err(wrong().into());
    };
    let axes = grid.len();
    if !(1..=AXES).contains(&axes) || channels < 4 * axes {
        return Err(wrong().into());
    }
    same_kind(OP, &[("x", x)])?;
    let mut padded = [1; AXES];
    padded[AXES - axes..].copy_from_slice(grid);
    let shift = TokenShift {
        grid: padded,
        axes,
        channels,
        reverse: false,
    };
    tape::apply1(&x.contiguous()?, shift, Needs::operands(Set::NONE))
}

impl TokenShift {
    fn output(&self, x: &Layout) -> Shape {
        x.shape().clone()
    }

    /// Channels in each group.
    fn group(&self) -> usize {
        self.channels / (4 * self.axes)
    }

    /// Tokens between neighbours along the axes in use, and the lengths of these axes.
    fn strides(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (AXES - self.axes..AXES).map(|axis| (self.grid[axis + 1..].iter().product(), self.grid[axis]))
    }
}

impl CustomOp1 for TokenShift {
    forward!(1: x x_layout);

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let adjoint = TokenShift {
            reverse: !self.reverse,
            ..*self
        };
        Ok(Some(dy.contiguous()?.apply_op1(adjoint)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, values};

    /// The definition, element by element.
    fn reference(x: &[f64], grid: &[usize], channels: usize) -> Vec<f64> {
        let group = channels / (4 * grid.len());
        let tokens: usize = grid.iter().product();
        let mut y = vec![f64::NAN; x.len()];
        for row in 0..x.len() / channels {
            for c in 0..channels {
                let mut value = x[row * channels + c];
                let (axis, back) = (c / group / 2, (c / group).is_multiple_of(2));
                if axis < grid.len() {
                    let stride: usize = grid[axis + 1..].iter().product();
                    let at = row % tokens / stride % grid[axis];
                    let inside = if back { at > 0 } else { at + 1 < grid[axis] };
                    let from = if back {
                        row.wrapping_sub(stride)
                    } else {
                        row + stride
                    };
                    value = if inside { x[from * channels + c] } else { 0.0 };
                }
                y[row * channels + c] = value;
            }
        }
        y
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for dims in [
            &[2, 5, 4][..],
            &[1, 1, 9],
            &[3, 4, 5, 11],
            &[2, 1, 3, 8],
            &[2, 3, 4, 5, 13],
            &[2, 12, 6, 6, 96],
        ] {
            let x = normal(3, dims);
            let (grid, channels) = (&dims[1..dims.len() - 1], dims[dims.len() - 1]);
            assert_eq!(
                values(&token_shift(&x)?),
                reference(&values(&x), grid, channels),
                "{dims:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for dims in [&[2, 3, 5][..], &[2, 2, 3, 9], &[2, 3, 2, 2, 14]] {
            check_gradients(&[normal(4, dims)], |t| token_shift(&t[0]))?;
            check_precision(&[normal(4, dims)], |t| token_shift(&t[0]), 1e-6)?;
        }
        check_threads(&[normal(5, &[3, 12, 6, 6, 48])], |t| token_shift(&t[0]))
    }

    #[test]
    fn refuses_what_does_not_fit() {
        for dims in [&[2, 8][..], &[2, 4, 3], &[1, 2, 2, 2, 2, 16], &[2, 3, 3, 7]] {
            let message = token_shift(&normal(1, dims)).unwrap_err().to_string();
            let wanted = format!(
                "token_shift: x has shape {dims:?}, expected [B, g1, .., gn, C] with n of 1 to 3 and C >= 4 n"
            );
            assert_eq!(message, wanted);
        }
    }
}
