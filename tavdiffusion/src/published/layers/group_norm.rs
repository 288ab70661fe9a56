//! Group norms of channels-last tensors.
//!
//! While they are trained, the values of one group and one picture (or of one group and all frames of a clip) are brought side by side, and
//! normed as one row: the statistics are those of the layer norm, in f32 and in two sweeps. Otherwise they are an operator of their own,
//! with the activation that follows.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::norm::{Groups, group_norm, layer_norm};

use super::{Activation, vector};

/// A norm over groups of channels and all places.
#[derive(Clone, Debug)]
pub(crate) struct GroupNorm {
    groups: usize,
    eps: f64,
    gain: Tensor,
    bias: Tensor,
}

impl GroupNorm {
    /// Takes `weight` and `bias` `[channels]`.
    pub(crate) fn new(groups: usize, channels: usize, eps: f64, vb: &VarBuilder) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            bail!("group norm: {channels} channels do not split into {groups} groups");
        }
        Ok(Self {
            groups,
            eps,
            gain: vector(channels, "weight", 1.0, vb)?,
            bias: vector(channels, "bias", 0.0, vb)?,
        })
    }

    /// Normalises `x` `[.., C]`, which is `sets` tensors one after the other, each over its own values.
    pub(crate) fn forward(&self, x: &Tensor, sets: usize) -> Result<Tensor> {
        match self.is_frozen(x) {
            true => self.fused(x, sets, false),
            false => self.composed(x, sets),
        }
    }

    /// [`Self::forward`] and then `activation`.
    pub(crate) fn activated(&self, x: &Tensor, sets: usize, activation: Activation) -> Result<Tensor> {
        match activation == Activation::Silu && self.is_frozen(x) {
            true => self.fused(x, sets, true),
            false => activation.forward(&self.forward(x, sets)?),
        }
    }

    /// Whether nobody wants a gradient, and there is an operator for the type.
    fn is_frozen(&self, x: &Tensor) -> bool {
        let wide = match x.device().is_cpu() {
            true => matches!(x.dtype(), DType::F32 | DType::F64),
            false => matches!(x.dtype(), DType::F32 | DType::BF16),
        };
        wide && !x.track_op() && !self.gain.track_op() && !self.bias.track_op()
    }

    fn fused(&self, x: &Tensor, sets: usize, silu: bool) -> Result<Tensor> {
        let of = Groups {
            sets,
            groups: self.groups,
            eps: self.eps,
            silu,
        };
        group_norm(x, &self.gain, &self.bias, of)
    }

    fn composed(&self, x: &Tensor, sets: usize) -> Result<Tensor> {
        let channels = self.gain.elem_count();
        let places = x.elem_count() / (sets * channels).max(1);
        let (groups, width) = (self.groups, channels / self.groups);
        let rows = x
            .reshape((sets, places, groups, width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape((sets * groups, places * width))?;
        let dtype = x.dtype();
        layer_norm(&rows, None, None, self.eps)?
            .reshape((sets, groups, places, width))?
            .transpose(1, 2)?
            .contiguous()?
            .reshape(x.shape())?
            .broadcast_mul(&self.gain.to_dtype(dtype)?)?
            .broadcast_add(&self.bias.to_dtype(dtype)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use candle_core::Device;
    use fulgur_lightnet::params::Params;

    /// The definition in f64, one value at a time; `x` is `[S, N, C]`.
    fn expected(x: &Tensor, gain: &Tensor, bias: &Tensor, groups: usize, eps: f64) -> Result<Tensor> {
        let (sets, places, channels) = x.dims3()?;
        let (gain, bias) = (gain.to_vec1::<f32>()?, bias.to_vec1::<f32>()?);
        let values = x.to_dtype(DType::F64)?.to_vec3::<f64>()?;
        let width = channels / groups;
        let mut y = Vec::new();
        for set in &values {
            for place in set {
                for (c, value) in place.iter().enumerate() {
                    let first = c / width * width;
                    let group: Vec<f64> = set
                        .iter()
                        .flat_map(|p| p[first..first + width].to_vec())
                        .collect();
                    let mean = group.iter().sum::<f64>() / group.len() as f64;
                    let variance = group.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / group.len() as f64;
                    let normed = (value - mean) / (variance + eps).sqrt();
                    y.push((normed * f64::from(gain[c]) + f64::from(bias[c])) as f32);
                }
            }
        }
        Tensor::from_vec(y, (sets, places, channels), x.device())
    }

    #[test]
    fn statistics_are_those_of_a_group() -> Result<()> {
        for (sets, groups, channels) in [(1, 1, 4), (3, 2, 6), (2, 6, 6)] {
            let params = Params::random(5, &Device::Cpu);
            let norm = GroupNorm::new(groups, channels, 1e-6, &params.builder())?;
            perturb(&params, 0.5)?;
            let x = (normal("x", &[sets, 7, channels])? + 3.0)?;
            let vars = params.vars();
            let wanted = expected(
                &x,
                vars["weight"].as_tensor(),
                vars["bias"].as_tensor(),
                groups,
                1e-6,
            )?;
            // As pictures: sets are the same values.
            let pictures = x.reshape((sets, 1, 7, channels))?;
            let far = apart(&norm.forward(&pictures, sets)?.reshape(x.shape())?, &wanted)?;
            assert!(far < 2e-5, "{far}");
            // Nobody wants gradients of these: the other form, and the activation with it.
            let frozen = GroupNorm {
                gain: norm.gain.detach(),
                bias: norm.bias.detach(),
                ..norm.clone()
            };
            assert!(frozen.is_frozen(&pictures) && !norm.is_frozen(&pictures));
            let far = apart(&frozen.forward(&pictures, sets)?.reshape(x.shape())?, &wanted)?;
            assert!(far < 2e-5, "{far}");
            let active = frozen.activated(&pictures, sets, Activation::Silu)?;
            assert!(apart(&active.reshape(x.shape())?, &wanted.silu()?)? < 2e-5);
        }
        let params = Params::random(5, &Device::Cpu);
        assert!(GroupNorm::new(4, 6, 1e-6, &params.builder()).is_err());
        Ok(())
    }
}
