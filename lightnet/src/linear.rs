//! Affine maps with weights `[out, in]`, as every checkpoint of the field stores them.

use candle_core::{Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::linear::linear;

/// How a map starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Start {
    /// Normal with standard deviation `in^-1/2`: keeps the variance of its input.
    FanIn,
    /// Normal with the given standard deviation.
    Normal(f64),
    /// All zero: the branch behind it starts silent.
    Zero,
}

/// `y = x W^T + b` over the last dimension.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes `weight` `[output, input]` from `vb`, and `bias` `[output]` when asked for.
    pub fn new(input: usize, output: usize, bias: bool, start: Start, vb: &VarBuilder) -> Result<Self> {
        let init = match start {
            Start::FanIn => Init::Randn {
                mean: 0.0,
                stdev: (input as f64).powf(-0.5),
            },
            Start::Normal(stdev) => Init::Randn { mean: 0.0, stdev },
            Start::Zero => Init::Const(0.0),
        };
        let weight = vb.get_with_hints((output, input), "weight", init)?;
        let bias = bias
            .then(|| vb.get_with_hints(output, "bias", Init::Const(0.0)))
            .transpose()?;
        Ok(Self { weight, bias })
    }

    /// The weight, `[output, input]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias, where there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Width of the result.
    pub fn output(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Maps `x` `[.., input]` to `[.., output]` in the dtype of `x`; master weights are rounded on the way.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        linear(x, &self.weight, self.bias.as_ref())
    }
}
