//! The activations of published encoders by the names of their configurations: GELU with the error function, and its quick form of
//! CLIP. No gradient passes through them.

use candle_core::{DType, Result, Tensor};
use fulgur_kernels::gelu::{Form, gelu};
use serde::Deserialize;

/// Slope of the quick form.
const QUICK: f64 = 1.702;

/// Which form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Gelu {
    /// With the error function.
    #[default]
    #[serde(rename = "gelu")]
    Exact,
    /// With the logistic function.
    #[serde(rename = "quick_gelu")]
    Quick,
}

impl Gelu {
    /// The activation of every value, in the type of `x`.
    ///
    /// # Errors
    /// The device has no memory.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        self.behind(x, None)
    }

    /// The activation of `x` `[.., C]` plus `bias` `[C]` in f32, in the type of `x`.
    ///
    /// # Errors
    /// The bias does not fit, or the device has no memory.
    pub fn behind(self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        if x.dtype() == DType::F32 || (x.dtype() == DType::BF16 && x.device().is_cuda()) {
            let form = match self {
                Self::Exact => Form::Exact,
                Self::Quick => Form::Quick,
            };
            return gelu(x, bias, form);
        }
        let x = match bias {
            Some(bias) => x.broadcast_add(&bias.to_dtype(x.dtype())?)?,
            None => x.clone(),
        };
        match self {
            Self::Exact => x.gelu_erf(),
            Self::Quick => &x * candle_nn::ops::sigmoid(&(&x * QUICK)?)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// f16 goes through other operators than f32.
    #[test]
    fn types_agree() -> Result<()> {
        let x = Tensor::randn(0f32, 2.0, (3, 50), &Device::Cpu)?;
        let bias = Tensor::randn(0f32, 1.0, 50, &Device::Cpu)?;
        for form in [Gelu::Exact, Gelu::Quick] {
            let wanted = form.behind(&x, Some(&bias))?;
            let found = form
                .behind(&x.to_dtype(DType::F16)?, Some(&bias))?
                .to_dtype(DType::F32)?;
            let far = (&found - &wanted)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(far > 0.0 && far < 1e-2, "{far}");
            let plain = form.apply(&x.broadcast_add(&bias)?)?;
            assert!((plain - wanted)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
        }
        Ok(())
    }
}
