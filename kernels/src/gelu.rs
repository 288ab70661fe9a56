//! The activations of published encoders behind a bias: GELU with the error function, and its quick form of CLIP.
//!
//! ```text
//! exact   y = z/2 (1 + erf(z / sqrt 2))        quick   y = z / (1 + exp(-1.702 z))        z = x + bias
//! geglu   y = a exact(b)                       [a | b] = x + bias
//! ```
//!
//! For networks that nobody trains: no gradient passes through it.

use crate::error::OpError;
use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor, bail};
use rayon::prelude::*;

const OP: &str = "gelu";
/// Values that a thread takes at least.
const BLOCK: usize = 1 << 12;
/// Slope of the quick form.
const QUICK: f32 = 1.702;

/// Which form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// With the error function.
    #[default]
    Exact,
    /// With the logistic function.
    Quick,
}

impl Form {
    fn at(self, x: f32) -> f32 {
        match self {
            Self::Exact => 0.5 * x * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2)),
            Self::Quick => x / (1.0 + (-QUICK * x).exp()),
        }
    }
}

/// The activation of `x` [.., C] plus `bias` [C] in f32, in the shape and type of `x`: f32 on the CPU, f32 or bf16 on CUDA.
///
/// No gradient passes.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::gelu::{Form, gelu};
/// let x = Tensor::new(&[-1f32, 0.0], &Device::Cpu)?;
/// let bias = Tensor::new(&[1f32, 100.0], &Device::Cpu)?;
/// assert_eq!(gelu(&x, Some(&bias), Form::Exact)?.to_vec1::<f32>()?, [0.0, 100.0]);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// If the bias does not fit, or an element type or a device is not supported.
pub fn gelu(x: &Tensor, bias: Option<&Tensor>, form: Form) -> Result<Tensor> {
    run(x, bias, Some(form))
}

/// `a gelu(b)` for the halves `[a | b]` of `x` [.., 2 m] plus `bias` [2 m] in f32, in the type of `x`: [.., m]. The gated unit of the
/// transformers of Stable Diffusion (Shazeer, 2020), with the error function.
///
/// No gradient passes.
///
/// # Errors
/// As [`gelu`]; also if the last axis is odd.
pub fn geglu(x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match x.dims().last() {
        Some(width) if width % 2 == 0 => run(x, bias, None),
        _ => Err(OpError::shape(OP, "x", x, "[.., 2 m]").into()),
    }
}

/// [`gelu`] of a form, [`geglu`] without.
fn run(x: &Tensor, bias: Option<&Tensor>, form: Option<Form>) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    if let Some(bias) = bias
        && (bias.dims() != [width] || bias.dtype() != DType::F32)
    {
        return Err(OpError::shape(OP, "bias", bias, format!("[{width}] in f32")).into());
    }
    let mut dims = x.dims().to_vec();
    if let (None, Some(last)) = (form, dims.last_mut()) {
        *last = width / 2;
    }
    let x = x.detach().contiguous()?;
    let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
    if x.elem_count() == 0 {
        return Tensor::zeros(dims, x.dtype(), x.device());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::run(&x, bias.as_ref(), form, dims);
    }
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) =
        (&*storage, layout.contiguous_offsets())
    else {
        bail!(
            "{OP}: found {:?} on {:?}, expected f32 on the CPU, f32 or bf16 on CUDA",
            storage.dtype(),
            x.device().location()
        );
    };
    let bias = match bias {
        Some(bias) => bias.to_vec1::<f32>()?,
        None => vec![0.0; width],
    };
    let made = dims.last().copied().unwrap_or(1);
    let mut out = vec![0f32; (end - start) / width * made];
    out.par_chunks_mut(made)
        .zip(values[start..end].par_chunks(width))
        .with_min_len(BLOCK.div_ceil(width))
        .for_each(|(out, values)| {
            let form = form.unwrap_or_default();
            // Of a gated unit these are the second half.
            let (gates, gate_bias) = (&values[width - made..], &bias[width - made..]);
            for ((out, &x), &bias) in out.iter_mut().zip(gates).zip(gate_bias) {
                *out = form.at(x + bias);
            }
            if made < width {
                for ((out, &x), &bias) in out.iter_mut().zip(values).zip(&bias) {
                    *out *= x + bias;
                }
            }
        });
    Tensor::from_vec(out, dims, x.device())
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/gelu.cu`.

    use super::{Form, OP};
    use crate::cuda_module::{Module, launch, module, room};
    use crate::gpu::{self, Locked};
    use crate::pass::CudaReal;
    use crate::rows::cuda::{Runs, suffix};
    use candle_core::{DType, Result, Tensor};
    use half::bf16;

    const GELU: Module = module!("gelu");

    pub(super) fn run(
        x: &Tensor,
        bias: Option<&Tensor>,
        form: Option<Form>,
        dims: Vec<usize>,
    ) -> Result<Tensor> {
        suffix(OP, x)?;
        match x.dtype() {
            DType::BF16 => typed::<bf16>(x, bias, form, dims),
            _ => typed::<f32>(x, bias, form, dims),
        }
    }

    fn typed<T: CudaReal>(
        x: &Tensor,
        bias: Option<&Tensor>,
        form: Option<Form>,
        dims: Vec<usize>,
    ) -> Result<Tensor> {
        let device = x.device().as_cuda_device()?;
        let made = dims.last().copied().unwrap_or(1);
        let rows = dims.iter().product::<usize>() / made;
        let x = Locked::new(OP, x);
        let bias = bias.map(|bias| Locked::new(OP, bias));
        let (x_at, bias_at) = (
            x.address()?,
            bias.as_ref().map_or(Ok((0, true)), Locked::address)?,
        );
        let vectors = x_at.1 && bias_at.1 && made.is_multiple_of(4);
        let v = if vectors { 4 } else { 1 };
        let kernel = match form {
            Some(Form::Exact) => "gelu_exact",
            Some(Form::Quick) => "gelu_quick",
            None => "geglu",
        };
        let y = room::<T>(device, rows * made)?;
        launch!(device, GELU, format!("{kernel}_{}_v{v}", T::SUFFIX), Runs::new(1, rows, made, v).config;
            x_at.0, bias_at.0, y.as_view(), rows as u32, made as u32);
        Ok(gpu::tensor(y, device, &dims.into()))
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
            let close = y.iter().zip(expected).all(|(y, e)| (y - e).abs() < 2e-6);
            assert!(close, "{y:?} {expected:?}");
            Ok::<_, candle_core::Error>(())
        };
        let exact = [-0.004_049_694, -0.158_655_25, 0.0, 0.345_731_23, 1.954_499_7];
        near(gelu(&x, None, Form::Exact)?, exact)?;
        let quick = [-0.018_071_31, -0.154_204_23, 0.0, 0.350_388_44, 1.935_658_6];
        near(gelu(&x, None, Form::Quick)?, quick)?;
        let bias = Tensor::new(&[1f32, -2.0, 0.25, 7.0, 0.5], &Device::Cpu)?;
        near(gelu(&(&x - &bias)?, Some(&bias), Form::Exact)?, exact)
    }

    #[test]
    fn rows_share_a_bias() -> Result<()> {
        for shape in [&[5usize][..], &[3, 1], &[2, 3001, 5], &[0, 4]] {
            let x = Tensor::randn(0f32, 2.0, shape, &Device::Cpu)?;
            let bias = Tensor::randn(0f32, 1.0, *shape.last().unwrap_or(&1), &Device::Cpu)?;
            let found = gelu(&x, Some(&bias), Form::Exact)?;
            let wanted = x.broadcast_add(&bias)?.gelu_erf()?;
            assert_eq!(found.dims(), wanted.dims());
            if x.elem_count() > 0 {
                let far = (found - wanted)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(far < 2e-6, "{shape:?} {far}");
            }
        }
        Ok(())
    }

    #[test]
    fn half_of_a_row_gates_the_other() -> Result<()> {
        let x = Tensor::randn(0f32, 2.0, (3, 7, 10), &Device::Cpu)?;
        let bias = Tensor::randn(0f32, 1.0, 10, &Device::Cpu)?;
        let z = x.broadcast_add(&bias)?;
        let wanted = (z.narrow(2, 0, 5)? * z.narrow(2, 5, 5)?.contiguous()?.gelu_erf()?)?;
        let found = geglu(&x, Some(&bias))?;
        assert_eq!(found.dims(), [3, 7, 5]);
        assert!((found - wanted)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-5);
        let odd = geglu(&x.narrow(2, 0, 9)?, None).unwrap_err().to_string();
        assert_eq!(odd, "gelu: x has shape [3, 7, 9], expected [.., 2 m]");
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(gelu(&x, Some(&x), Form::Exact)),
            "gelu: bias has shape [2, 3], expected [3] in f32"
        );
        let wide = x.to_dtype(DType::F64).unwrap();
        assert!(message(gelu(&wide, None, Form::Quick)).starts_with("gelu: found F64 on Cpu"));
    }
}
