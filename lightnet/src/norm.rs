//! Root-mean-square norms over the last dimension.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::norm::{Gate, rms_norm_gated, rms_norm_to};

/// Added to the mean square before the root.
pub const EPS: f64 = 1e-6;

/// `x / rms(x) * gain`, with statistics in `f32`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    gain: Tensor,
    groups: usize,
}

impl RmsNorm {
    /// A norm over all `dim` channels; takes `weight` `[dim]`.
    pub fn new(dim: usize, vb: &VarBuilder) -> Result<Self> {
        Self::grouped(dim, 1, vb)
    }

    /// A norm of its own for each of `groups` equal runs of channels (one a head).
    pub fn grouped(dim: usize, groups: usize, vb: &VarBuilder) -> Result<Self> {
        if groups == 0 || !dim.is_multiple_of(groups) {
            candle_core::bail!("rms norm: {dim} channels do not split into {groups} groups");
        }
        let gain = vb.get_with_hints(dim, "weight", Init::Const(1.0))?;
        Ok(Self { gain, groups })
    }

    /// Normalises `x` `[.., dim]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_to(x, x.dtype())
    }

    /// Normalises `x` `[.., dim]` with a result of type `dtype`.
    pub fn forward_to(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let gain = self.gain.to_dtype(x.dtype())?;
        rms_norm_to(x, Some(&gain), self.groups, EPS, dtype)
    }

    /// Normalises `x` `[.., dim]` and multiplies by `gate` `[.., dim]` after its activation, in one pass.
    pub fn gated(&self, x: &Tensor, gate: &Tensor, activation: Gate) -> Result<Tensor> {
        rms_norm_gated(x, Some(&self.gain), gate, activation, self.groups, EPS)
    }
}
