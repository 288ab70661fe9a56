//! The activations of published encoders: GELU with the error function, and its quick form of CLIP.
//!
//! ```text
//! gelu(x) = x/2 (1 + erf(x / sqrt 2))        quick_gelu(x) = x / (1 + exp(-1.702 x))
//! ```
//!
//! On the CPU all threads share one pass; on a GPU they are candle's operators. No gradient passes through them.

use candle_core::backend::BackendStorage;
use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use serde::Deserialize;

/// Values that a thread takes at a time.
const BLOCK: usize = 1 << 12;
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
        if x.device().is_cpu() && x.dtype() == candle_core::DType::F32 {
            return x.contiguous()?.apply_op1_no_bwd(&self);
        }
        match self {
            Self::Exact => x.gelu_erf(),
            Self::Quick => x * candle_nn::ops::sigmoid(&(x * QUICK)?)?,
        }
    }

    fn at(self, x: f32) -> f32 {
        match self {
            Self::Exact => 0.5 * x * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::Quick => x / (1.0 + (-QUICK as f32 * x).exp()),
        }
    }
}

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("gelu: found {:?}, expected f32 side by side", storage.dtype());
        };
        let mut out = vec![0f32; end - start];
        let blocks = out
            .par_chunks_mut(BLOCK)
            .zip(values[start..end].par_chunks(BLOCK));
        blocks.for_each(|(out, values)| {
            for (out, &x) in out.iter_mut().zip(values) {
                *out = self.at(x);
            }
        });
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn values_are_those_of_the_formulas() -> Result<()> {
        // From a table of the normal distribution, and of the logistic one.
        let x = Tensor::new(&[-3f32, -1.0, 0.0, 0.5, 2.0], &Device::Cpu)?;
        let near = |y: Tensor, expected: [f32; 5]| {
            let y = y.to_vec1::<f32>()?;
            assert!(
                y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 2e-6),
                "{y:?} {expected:?}"
            );
            Ok::<_, candle_core::Error>(())
        };
        near(
            Gelu::Exact.apply(&x)?,
            [-0.004_049_694, -0.158_655_25, 0.0, 0.345_731_23, 1.954_499_7],
        )?;
        near(
            Gelu::Quick.apply(&x)?,
            [-0.018_071_31, -0.154_204_23, 0.0, 0.350_388_44, 1.935_658_6],
        )?;
        let many = Tensor::randn(0f32, 2.0, (3, 5000), &Device::Cpu)?;
        let far = (Gelu::Exact.apply(&many.t()?)? - many.t()?.contiguous()?.gelu_erf()?)?.abs()?;
        assert!(far.max_all()?.to_scalar::<f32>()? < 1e-6);
        Ok(())
    }
}
