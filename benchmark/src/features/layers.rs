//! Layers that the published networks of pictures and sounds share, for inference.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;

/// A batch normalisation with its statistics, as a factor and a shift of each channel.
#[derive(Clone, Debug)]
pub(super) struct BatchNorm {
    scale: Tensor,
    shift: Tensor,
}

impl BatchNorm {
    /// Takes `weight`, `bias`, `running_mean` and `running_var` of `channels`.
    pub(super) fn new(channels: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        let get = |name: &str| vb.get(channels, name);
        let (weight, bias) = (get("weight")?, get("bias")?);
        let (mean, variance) = (get("running_mean")?, get("running_var")?);
        let scale = (weight / (variance + eps)?.sqrt()?)?;
        let shift = (bias - (mean * &scale)?)?;
        Ok(Self { scale, shift })
    }

    /// `x` `[.., C, ..]` with the channels along `axis`.
    pub(super) fn forward(&self, x: &Tensor, axis: usize) -> Result<Tensor> {
        let mut shape = vec![1; x.rank()];
        shape[axis] = self.scale.elem_count();
        x.broadcast_mul(&self.scale.reshape(shape.as_slice())?)?
            .broadcast_add(&self.shift.reshape(shape)?)
    }

    /// A convolution `[O, ..]` without bias before this: the one that does both, and its bias.
    pub(super) fn fold(&self, kernel: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut shape = vec![1; kernel.rank()];
        shape[0] = self.scale.elem_count();
        let kernel = kernel.broadcast_mul(&self.scale.reshape(shape)?)?;
        Ok((kernel, self.shift.clone()))
    }
}

/// A convolution over height and width with stride 1 that keeps their sizes, then a bias.
#[derive(Clone, Debug)]
pub(super) struct Conv {
    kernel: Tensor,
    bias: Option<Tensor>,
}

impl Conv {
    /// Of a kernel `[O, I, k, k]` with odd k and, perhaps, a bias `[O]`.
    pub(super) fn new(kernel: Tensor, bias: Option<Tensor>) -> Self {
        Self { kernel, bias }
    }

    /// `[B, I, H, W]` to `[B, O, H, W]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let side = self.kernel.dim(3)?;
        add_bias(&x.conv2d(&self.kernel, side / 2, 1, 1, 1)?, self.bias.as_ref())
    }
}

/// Adds `bias` `[C]` to `[B, C, ..]`.
pub(super) fn add_bias(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let Some(bias) = bias else {
        return Ok(x.clone());
    };
    let mut shape = vec![1; x.rank()];
    shape[1] = bias.elem_count();
    x.broadcast_add(&bias.reshape(shape)?)
}

/// `x W^T + b` of `x` `[.., I]`.
#[derive(Clone, Debug)]
pub(super) struct Dense {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Dense {
    /// Takes `weight` `[output, input]` and, if `bias`, `bias`.
    pub(super) fn new(input: usize, output: usize, bias: bool, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            weight: vb.get((output, input), "weight")?,
            bias: bias.then(|| vb.get(output, "bias")).transpose()?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (output, input) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = output;
        }
        let y = x
            .reshape(((), input))?
            .matmul(&self.weight.t()?)?
            .reshape(shape)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// Softmax in f64 of logits.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}

/// Rows of a matrix in f64.
pub(crate) fn rows(matrix: &Tensor) -> Result<Vec<Vec<f64>>> {
    matrix.to_dtype(DType::F64)?.to_vec2()
}
