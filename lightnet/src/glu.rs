//! Gated linear unit, optionally after a token shift that gives a global mixer its locality.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_kernels::{glu::swiglu, shift::token_shift};

use crate::linear::{Linear, Start};

/// `(silu(x W_1) * x W_2) W_3`.
#[derive(Clone, Debug)]
pub struct Glu {
    input: Linear,
    output: Linear,
}

impl Glu {
    /// `dim -> 2 hidden -> hidden -> dim`; `start` is that of the last map.
    pub fn new(dim: usize, hidden: usize, start: Start, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            input: Linear::new(dim, 2 * hidden, false, Start::FanIn, &vb.pp("input"))?,
            output: Linear::new(hidden, dim, true, start, &vb.pp("output"))?,
        })
    }

    /// Maps `x` `[.., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.output.forward(&swiglu(&self.input.forward(x)?)?)
    }
}

/// Shifts the tokens of a grid: half of the channels come from the neighbours along each axis, zero at the border.
///
/// `x` is `[B, condition + prod(axes), d]`; condition tokens stay as they are.
pub fn shift_on_grid(x: &Tensor, condition: usize, axes: &[usize]) -> Result<Tensor> {
    let (batch, tokens, dim) = x.dims3()?;
    let cells: usize = axes.iter().product();
    if condition + cells != tokens {
        candle_core::bail!("token shift: {tokens} tokens, expected {condition} + {axes:?}");
    }
    let grid = x.narrow(1, condition, cells)?.contiguous()?;
    let shape = [&[batch], axes, &[dim]].concat();
    let shifted = token_shift(&grid.reshape(shape)?)?.reshape((batch, cells, dim))?;
    if condition == 0 {
        return Ok(shifted);
    }
    Tensor::cat(&[&x.narrow(1, 0, condition)?, &shifted], 1)
}
