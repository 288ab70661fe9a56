//! Layer norms over the last axis, one pass each way.
//!
//! ```text
//! m = mean_j x_j     r = 1 / sqrt(mean_j (x_j - m)^2 + eps)     n_j = (x_j - m) r
//! y_j  = n_j w_j + b_j
//!
//! u_j  = dy_j w_j
//! dx_j = r (u_j - mean_i(u_i) - n_j mean_i(u_i n_i))
//! dw_j = sum over rows of dy_j n_j                              db_j = sum over rows of dy_j
//! ```
//!
//! Gain w and bias b may be f32 masters while x is bf16. A row is read where it lies, as long as all rows are equally far
//! apart. Only the inputs are kept for the backward pass.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use super::{check_elements, check_eps, checked_parameter};
use crate::autograd::{GradientOfMany, Value, attach_many};
use crate::error::OpError;
use crate::pass::same_kind;
use crate::strided::in_rows;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

const OP: &str = "layer_norm";

/// `(x - mean(x)) / sqrt(var(x) + eps) * gain + bias` over the last axis of `x` [.., D]; `gain` and `bias` [D] or none. The
/// variance is the mean of squares, not that of a sample.
///
/// Differentiable in all three. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; gain and bias are of its type or f32.
/// Statistics are f32 for bf16.
///
/// # Errors
/// If a shape, an element type or a device does not fit, or `eps` is not a positive number.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[[1f64, 3.0], [5.0, 5.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f64, 10.0], &Device::Cpu)?;
/// let y = fulgur_kernels::norm::layer_norm(&x, None, Some(&bias), 1e-12)?;
/// for (y, expected) in y.flatten_all()?.to_vec1::<f64>()?.iter().zip([-1.0, 11.0, 0.0, 10.0]) {
///     assert!((y - expected).abs() < 1e-9);
/// }
/// # candle_core::Result::Ok(())
/// ```
pub fn layer_norm(x: &Tensor, gain: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    layer_norm_to(x, gain, bias, eps, x.dtype())
}

/// The norm [`layer_norm`] with a result of type `dtype`; bf16 from f32 is one pass on CUDA.
///
/// # Errors
/// As for [`layer_norm`].
pub fn layer_norm_to(
    x: &Tensor,
    gain: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    let Some(&width) = x.dims().last() else {
        return Err(OpError::shape(OP, "x", x, "[.., D]").into());
    };
    check_eps(OP, eps)?;
    same_kind(OP, &[("x", x)])?;
    check_elements(OP, "x", x)?;
    let checked = |field, parameter: Option<&Tensor>| {
        parameter
            .map(|parameter| checked_parameter(OP, field, parameter, x))
            .transpose()
    };
    let (gain, bias) = (checked("gain", gain)?, checked("bias", bias)?);
    let x = in_rows(x)?;
    let op = LayerNorm {
        width,
        rows: x.elem_count() / width,
        eps,
        gain: gain.is_some(),
        bias: bias.is_some(),
    };
    let mut args = vec![&x];
    args.extend(&gain);
    args.extend(&bias);
    attach_many(op.forward(&args, dtype)?, &args, op)?.to_dtype(dtype)
}

/// One call of the operator; its arguments are x and those of gain and bias that there are.
#[derive(Clone, Copy, Debug)]
struct LayerNorm {
    width: usize,
    rows: usize,
    eps: f64,
    gain: bool,
    bias: bool,
}

/// Arguments by name.
#[derive(Clone, Copy)]
struct Named<'a> {
    x: &'a Tensor,
    gain: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
}

impl LayerNorm {
    fn named<'a>(&self, mut args: impl Iterator<Item = &'a Tensor>) -> Result<Named<'a>> {
        let Some(x) = args.next() else {
            candle_core::bail!("{OP}: no arguments")
        };
        let gain = if self.gain { args.next() } else { None };
        let bias = if self.bias { args.next() } else { None };
        Ok(Named { x, gain, bias })
    }

    /// The value, in `dtype` where that costs nothing.
    fn forward(&self, args: &[&Tensor], dtype: DType) -> Result<Value> {
        let named = self.named(args.iter().copied())?;
        #[cfg(feature = "cuda")]
        if named.x.device().is_cuda() {
            return match (named.x.dtype(), dtype) {
                (DType::BF16, _) => cuda::forward::<half::bf16, half::bf16>(self, named),
                (_, DType::BF16) => cuda::forward::<f32, half::bf16>(self, named),
                _ => cuda::forward::<f32, f32>(self, named),
            };
        }
        let _ = dtype;
        match named.x.dtype() {
            DType::F64 => cpu::forward::<f64>(self, named),
            _ => cpu::forward::<f32>(self, named),
        }
    }

    fn gradients(&self, named: Named<'_>, grad: &Tensor) -> Result<Adjoints> {
        #[cfg(feature = "cuda")]
        if named.x.device().is_cuda() {
            return match (named.x.dtype(), grad.dtype()) {
                (DType::BF16, _) => cuda::backward::<half::bf16, half::bf16>(self, named, grad),
                (_, DType::BF16) => cuda::backward::<f32, half::bf16>(self, named, grad),
                _ => cuda::backward::<f32, f32>(self, named, grad),
            };
        }
        match named.x.dtype() {
            DType::F64 => cpu::backward::<f64>(self, named, grad),
            _ => cpu::backward::<f32>(self, named, grad),
        }
    }
}

/// Adjoints in the type of the computation; those of parameters are there if any parameter is.
struct Adjoints {
    dx: Tensor,
    /// Of gain and bias.
    parameters: Option<[Tensor; 2]>,
}

impl GradientOfMany for LayerNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let named = self.named(args.iter())?;
        let Adjoints { dx, parameters } = self.gradients(named, &grad.contiguous()?)?;
        let mut all = vec![Some(dx)];
        for (at, parameter) in [named.gain, named.bias].into_iter().enumerate() {
            let Some(parameter) = parameter else { continue };
            let adjoint = parameters.as_ref().map(|adjoints| &adjoints[at]);
            all.push(
                adjoint
                    .map(|adjoint| adjoint.to_dtype(parameter.dtype()))
                    .transpose()?,
            );
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};

    const EPS: f64 = 1e-6;

    /// The definition, row by row.
    fn literal(x: &[f64], gain: Option<&[f64]>, bias: Option<&[f64]>, width: usize) -> Vec<f64> {
        let mut y = vec![f64::NAN; x.len()];
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            let mean = x.iter().sum::<f64>() / width as f64;
            let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            for j in 0..width {
                let normed = (x[j] - mean) / (variance + EPS).sqrt();
                y[j] = normed * gain.map_or(1.0, |gain| gain[j]) + bias.map_or(0.0, |bias| bias[j]);
            }
        }
        y
    }

    fn inputs([b, n, d]: [usize; 3]) -> [Tensor; 3] {
        [normal(1, &[b, n, d]), normal(2, &[d]), normal(3, &[d])]
    }

    /// Without parameters, with either and with both; the second number counts inputs.
    type Entry = fn(&[Tensor]) -> Result<Tensor>;
    const ENTRIES: [(Entry, usize); 4] = [
        (|t| layer_norm(&t[0], None, None, EPS), 1),
        (|t| layer_norm(&t[0], Some(&t[1]), None, EPS), 2),
        (|t| layer_norm(&t[0], None, Some(&t[1]), EPS), 2),
        (|t| layer_norm(&t[0], Some(&t[1]), Some(&t[2]), EPS), 3),
    ];

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for shape in [[1, 1, 2], [2, 3, 5], [2, 131, 63], [3, 7, 48]] {
            let t = inputs(shape);
            // Far from zero, where sums of squares lose digits.
            let x = (&t[0] + 100.0)?;
            let (x, gain, bias) = (x.clone(), &t[1], &t[2]);
            let lists = [values(&x), values(gain), values(bias)];
            let found = values(&layer_norm(&x, Some(gain), Some(bias), EPS)?);
            let wanted = literal(&lists[0], Some(&lists[1]), Some(&lists[2]), shape[2]);
            assert!(relative_rms(&found, &wanted) < 1e-12);
            let found = values(&layer_norm(&x, None, Some(bias), EPS)?);
            let wanted = literal(&lists[0], None, Some(&lists[2]), shape[2]);
            assert!(relative_rms(&found, &wanted) < 1e-12);
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (entry, count) in ENTRIES {
            for shape in [[1, 1, 3], [2, 3, 5], [2, 70, 3], [2, 5, 12]] {
                check_gradients(&inputs(shape)[..count], entry)?;
            }
            for shape in [[1, 1, 60], [2, 63, 60], [3, 500, 33]] {
                check_precision(&inputs(shape)[..count], entry, 1e-5)?;
            }
            check_threads(&inputs([3, 700, 33])[..count], entry)?;
        }
        Ok(())
    }

    #[test]
    fn views_are_the_same_as_copies() -> Result<()> {
        let wide = normal(1, &[2, 5, 26]);
        let view = wide.narrow(2, 3, 12)?;
        let found = layer_norm(&view, None, None, EPS)?;
        assert_eq!(
            values(&found),
            values(&layer_norm(&view.force_contiguous()?, None, None, EPS)?)
        );
        check_gradients(&[wide], |t| layer_norm(&t[0].narrow(2, 3, 12)?, None, None, EPS))
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let [x, gain, _] = inputs([2, 3, 5]);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(layer_norm(&x, Some(&gain), Some(&x), EPS)),
            "layer_norm: bias has shape [2, 3, 5], expected [5]"
        );
        assert_eq!(
            message(layer_norm(&x, None, None, 0.0)),
            "layer_norm: eps is 0, expected a positive number"
        );
        let half = x.to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(layer_norm(&half, None, None, EPS)),
            "layer_norm: x is F16 on the CPU, supported: f32, f64"
        );
    }
}
