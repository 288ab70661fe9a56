//! Norms over the last axis: root-mean-square norms, plain, with a gain, or modulated by a condition (adaLN), and others
//! fused with their neighbours.
//!
//! ```text
//! r   = 1 / sqrt(mean_j x_j^2 + eps)
//! y_j = x_j r (offset + scale_j) + shift_j          offset 0 for a gain, 1 for a modulation
//!
//! g_j      = dy_j (offset + scale_j)
//! dx_j     = r g_j - x_j r^3 mean_i(g_i x_i)
//! dscale_j = sum over rows of dy_j x_j r            dshift_j = sum over rows of dy_j
//! ```
//!
//! A residual stream in f32 may feed products in bf16: the entries ending in `_to` write their result in another type,
//! on a GPU without a pass of its own.
//!
//! [`rms_norm_gated`] ends a mixer: norm and gate in one pass. [`add_norm`] joins a branch to the residual stream and norms
//! the sum for the next one. [`layer_norm`] is the norm with a mean, [`group_norm`] that of pictures.
//!
//! Only the inputs are kept for the backward pass: `r` is found again while the row is read anyway. Sums over rows
//! go through partial sums of fixed runs of rows, so that they have the same bits each time.

mod add;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod gated;
mod group;
mod layer;
#[cfg(feature = "cuda")]
mod mixed;
#[cfg(test)]
mod reference;
#[cfg(feature = "cuda")]
mod rowwise;

pub use add::add_norm;
pub use gated::{Gate, rms_norm_gated};
pub use group::{Groups, group_norm};
pub use layer::{layer_norm, layer_norm_to};

use crate::error::OpError;
use crate::pass::{self, forward, same_kind};
use crate::tape::{self, Needs, Set};
use candle_core::{CustomOp1, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

/// What gradients of [`Norm`] read: operands, not the result.
const READS: Needs = Needs::operands(Set::ALL);

/// Tokens that share one scale and one shift, and what is added to the scale. A token holds `heads` rows of `width`
/// channels, each with statistics of its own.
#[derive(Clone, Copy, Debug)]
struct Norm {
    width: usize,
    heads: usize,
    tokens_per_group: usize,
    offset: f64,
    eps: f64,
}

/// Gradients of [`Norm`]: dx, then dscale where there is a scale, then dshift.
#[derive(Clone, Copy, Debug)]
struct NormBackward {
    norm: Norm,
    shift: bool,
}

/// `x / sqrt(mean(x^2) + eps) * gain` over the last axis of `x` [.., D]; `gain` [D] or none.
///
/// Differentiable in `x` and `gain`. Elements f32 or f64 on the CPU, f32 or bf16 on CUDA (statistics in f32).
///
/// # Errors
/// If a shape, an element type or a device does not fit, or `eps` is not a positive number.
pub fn rms_norm(x: &Tensor, gain: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    rms_norm_to(x, gain, 1, eps, x.dtype())
}

/// The norm [`rms_norm`] with statistics of their own for each of `heads` equal runs of channels, and a result of type
/// `dtype`.
///
/// # Errors
/// As for [`rms_norm`]; also if D does not split into `heads`.
pub fn rms_norm_to(
    x: &Tensor,
    gain: Option<&Tensor>,
    heads: usize,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    const OP: &str = "rms_norm";
    let Some(&columns) = x.dims().last() else {
        return Err(OpError::shape(OP, "x", x, "[.., D]").into());
    };
    check_eps(OP, eps)?;
    same_kind(OP, &[("x", x)])?;
    if heads == 0 || columns % heads != 0 {
        return Err(OpError::shape(OP, "x", x, format!("[.., D] with D a multiple of {heads}")).into());
    }
    let norm = Norm {
        width: columns / heads,
        heads,
        tokens_per_group: x.elem_count() / columns,
        offset: 0.0,
        eps,
    };
    let x = x.contiguous()?;
    let Some(gain) = gain else {
        return tape::apply1(&x, norm, READS)?.to_dtype(dtype);
    };
    if gain.dims() != [columns] {
        return Err(OpError::shape(OP, "gain", gain, format!("[{columns}]")).into());
    }
    same_kind(OP, &[("x", &x), ("gain", gain)])?;
    let gain = gain.contiguous()?;
    #[cfg(feature = "cuda")]
    if mixed::applies(&x, dtype) {
        return mixed::gained(norm, &x, &gain);
    }
    tape::apply2(&x, &gain, norm, READS)?.to_dtype(dtype)
}

/// `x / sqrt(mean(x^2) + eps) * (1 + scale) + shift` over the last axis of `x` [B, N, D]; `scale` and `shift` [B, D].
///
/// Differentiable in all three. Elements f32 or f64 on the CPU, f32 or bf16 on CUDA (statistics in f32).
///
/// # Errors
/// If a shape, an element type or a device does not fit, or `eps` is not a positive number.
pub fn rms_norm_modulated(x_bnd: &Tensor, scale_bd: &Tensor, shift_bd: &Tensor, eps: f64) -> Result<Tensor> {
    rms_norm_modulated_to(x_bnd, scale_bd, shift_bd, eps, x_bnd.dtype())
}

/// The norm [`rms_norm_modulated`] with a result of type `dtype`.
///
/// # Errors
/// As for [`rms_norm_modulated`].
pub fn rms_norm_modulated_to(
    x_bnd: &Tensor,
    scale_bd: &Tensor,
    shift_bd: &Tensor,
    eps: f64,
    dtype: DType,
) -> Result<Tensor> {
    const OP: &str = "rms_norm_modulated";
    let &[batch, tokens_per_group, width] = x_bnd.dims() else {
        return Err(OpError::shape(OP, "x", x_bnd, "[B, N, D]").into());
    };
    check_eps(OP, eps)?;
    for (field, tensor) in [("scale", scale_bd), ("shift", shift_bd)] {
        if tensor.dims() != [batch, width] {
            return Err(OpError::shape(OP, field, tensor, format!("[{batch}, {width}]")).into());
        }
    }
    same_kind(OP, &[("x", x_bnd), ("scale", scale_bd), ("shift", shift_bd)])?;
    let norm = Norm {
        width,
        heads: 1,
        tokens_per_group,
        offset: 1.0,
        eps,
    };
    let (x, scale, shift) = (
        x_bnd.contiguous()?,
        scale_bd.contiguous()?,
        shift_bd.contiguous()?,
    );
    #[cfg(feature = "cuda")]
    if mixed::applies(&x, dtype) {
        return mixed::modulated(norm, &x, &scale, &shift);
    }
    tape::apply3(&x, &scale, &shift, norm, READS)?.to_dtype(dtype)
}

fn check_eps(op: &'static str, eps: f64) -> Result<()> {
    if eps.is_finite() && eps > 0.0 {
        return Ok(());
    }
    Err(OpError::value(op, "eps", eps, "a positive number").into())
}

/// `parameter` `[D]` of a norm over the last axis of `x` `[.., D]`, of its type or an f32 master; contiguous.
fn checked_parameter(
    op: &'static str,
    field: &'static str,
    parameter: &Tensor,
    x: &Tensor,
) -> Result<Tensor> {
    let columns = x.dims().last().copied().unwrap_or(0);
    if parameter.dims() != [columns] {
        return Err(OpError::shape(op, field, parameter, format!("[{columns}]")).into());
    }
    if parameter.dtype() != x.dtype() && parameter.dtype() != DType::F32 {
        let (found, expected) = (
            format!("{:?}", parameter.dtype()),
            format!("{:?} like x, or F32", x.dtype()),
        );
        return Err(OpError::value(op, field, found, expected).into());
    }
    if !parameter.device().same_device(x.device()) {
        let found = format!("on {:?}", parameter.device().location());
        let expected = format!("a tensor on {:?} like x", x.device().location());
        return Err(OpError::value(op, field, found, expected).into());
    }
    parameter.contiguous()
}

/// Errors unless elements of `x` are what norms compute with on its device.
fn check_elements(op: &'static str, field: &'static str, x: &Tensor) -> Result<()> {
    let (device, supported, fits) = if x.device().is_cuda() {
        ("CUDA", "f32, bf16", matches!(x.dtype(), DType::F32 | DType::BF16))
    } else {
        (
            "the CPU",
            "f32, f64",
            matches!(x.dtype(), DType::F32 | DType::F64),
        )
    };
    if fits {
        return Ok(());
    }
    let found = x.dtype();
    Err(OpError::DType {
        op,
        field,
        found,
        device,
        supported,
    }
    .into())
}

impl Norm {
    /// Channels of a token.
    fn columns(&self) -> usize {
        self.heads * self.width
    }

    fn output(&self, x: &Layout) -> Shape {
        x.shape().clone()
    }

    fn backward(self, shift: bool) -> NormBackward {
        NormBackward { norm: self, shift }
    }
}

impl CustomOp1 for Norm {
    forward!(1: x x_layout);

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let grads = pass::tensors(&self.backward(false), [x, dy], &[x.shape()])?;
        Ok(Some(pass::single(grads)))
    }
}

impl CustomOp2 for Norm {
    forward!(2: x x_layout, gain gain_layout);

    fn bwd(
        &self,
        x: &Tensor,
        gain: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let shapes = [x.shape(), gain.shape()];
        let mut grads = pass::tensors(&self.backward(false), [x, dy, gain], &shapes)?.into_iter();
        Ok((grads.next(), grads.next()))
    }
}

impl CustomOp3 for Norm {
    forward!(3: x x_layout, scale scale_layout, shift shift_layout);

    fn bwd(
        &self,
        x: &Tensor,
        scale: &Tensor,
        shift: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let shapes = [x.shape(), scale.shape(), shift.shape()];
        let mut grads = pass::tensors(&self.backward(true), [x, dy, scale], &shapes)?.into_iter();
        Ok((grads.next(), grads.next(), grads.next()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::Device;

    type Entry = fn(&[Tensor]) -> Result<Tensor>;
    const EPS: f64 = 1e-6;

    fn entries() -> [(Entry, usize); 4] {
        [
            (|t| rms_norm(&t[0], None, EPS), 1),
            (|t| rms_norm(&t[0], Some(&t[1].get(0)?), EPS), 2),
            (|t| rms_norm_modulated(&t[0], &t[1], &t[2], EPS), 3),
            (|t| grouped(&t[0], &t[1].get(0)?), 2),
        ]
    }

    /// Three heads where each keeps four channels: the gradient of a norm of one number is all cancellation.
    fn grouped(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        let width = gain.elem_count();
        let heads = if width.is_multiple_of(3) && width >= 12 {
            3
        } else {
            1
        };
        rms_norm_to(x, Some(gain), heads, EPS, x.dtype())
    }

    fn inputs([b, n, d]: [usize; 3], count: usize) -> Vec<Tensor> {
        let shapes = [vec![b, n, d], vec![b, d], vec![b, d]];
        shapes[..count]
            .iter()
            .enumerate()
            .map(|(i, s)| normal(i as u64, s))
            .collect()
    }

    #[test]
    fn agrees_with_reference() -> Result<()> {
        for [b, n, d] in [[1, 1, 1], [2, 3, 5], [2, 131, 63], [3, 7, 48]] {
            let t = inputs([b, n, d], 3);
            let (x, scale, shift) = (values(&t[0]), values(&t[1]), values(&t[2]));
            let wanted = [
                reference::rms_norm(&x, d, n, EPS, 1.0, &vec![0.0; b * d], &vec![0.0; b * d]),
                reference::rms_norm(&x, d, b * n, EPS, 0.0, &scale[..d], &vec![0.0; d]),
                reference::rms_norm(&x, d, n, EPS, 1.0, &scale, &shift),
            ];
            for ((entry, _), wanted) in entries().iter().zip(&wanted) {
                let error = relative_rms(&values(&entry(&t)?), wanted);
                assert!(error < 1e-12, "shape {:?}: {error:e}", [b, n, d]);
            }
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (entry, count) in entries() {
            for shape in [[1, 1, 1], [2, 3, 5], [2, 70, 3], [2, 5, 12]] {
                check_gradients(&inputs(shape, count), entry)?;
            }
            for shape in [[1, 1, 60], [2, 63, 60], [3, 500, 33]] {
                check_precision(&inputs(shape, count), entry, 1e-5)?;
            }
            check_threads(&inputs([3, 700, 33], count), entry)?;
        }
        Ok(())
    }

    /// Heads are rows of their own with their own part of the gain.
    #[test]
    fn heads_are_separate_norms() -> Result<()> {
        let (x, gain) = (normal(0, &[2, 7, 12]), normal(1, &[12]));
        let all = rms_norm_to(&x, Some(&gain), 3, EPS, DType::F64)?;
        for head in 0..3 {
            let part = |t: &Tensor| t.narrow(t.rank() - 1, 4 * head, 4)?.contiguous();
            let alone = rms_norm(&part(&x)?, Some(&part(&gain)?), EPS)?;
            assert!(relative_rms(&values(&part(&all)?), &values(&alone)) < 1e-14);
        }
        assert!(rms_norm_to(&x, Some(&gain), 5, EPS, DType::F64).is_err());
        Ok(())
    }

    #[test]
    fn strided_input_is_the_same_as_a_copy() -> Result<()> {
        let x = normal(0, &[2, 5, 7]);
        let t = x.transpose(1, 2)?;
        assert_eq!(
            values(&rms_norm(&t, None, EPS)?),
            values(&rms_norm(&t.contiguous()?, None, EPS)?)
        );
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let t = inputs([2, 3, 5], 3);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let gain = Tensor::zeros(4, DType::F64, &Device::Cpu).unwrap();
        assert_eq!(
            message(rms_norm(&t[0], Some(&gain), EPS)),
            "rms_norm: gain has shape [4], expected [5]"
        );
        assert_eq!(
            message(rms_norm_modulated(&t[1], &t[1], &t[2], EPS)),
            "rms_norm_modulated: x has shape [2, 5], expected [B, N, D]"
        );
        assert_eq!(
            message(rms_norm(&t[0], None, 0.0)),
            "rms_norm: eps is 0, expected a positive number"
        );
        let half = t[0].to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(rms_norm(&half, None, EPS)),
            "rms_norm: operand is F16 on the CPU, supported: f32, f64"
        );
    }
}
