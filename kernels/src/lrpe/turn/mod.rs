//! Rows turned by phases, one pass each way: rotary positions, and the doubling of LRPE.
//!
//! ```text
//! double   y = [x cos p, x sin p, rest]            dx = dy_1 cos p + dy_2 sin p
//!                                                  dp = sum over rows of x (dy_2 cos p - dy_1 sin p)
//! copy     y = [x, x, rest]                        dx = dy_1 + dy_2
//! rotate   y_a = x_a cos p - x_b sin p             dx_a = dy_a cos p + dy_b sin p
//!          y_b = x_a sin p + x_b cos p             dx_b = dy_b cos p - dy_a sin p
//!                                                  dp = sum over rows of x_a dx_b - x_b dx_a
//! ```
//!
//! Rows are heads of tokens, `[B, N, H, D]`; all batches share a phase, and all heads do unless each has its own. Sines and
//! cosines are made once for all rows that share them. Phases are f32 beside bf16; [`super::token_phases`] makes those
//! of tokens in a row, [`super::phases`] those of a grid, once for all layers and for queries and keys.

mod cpu;
#[cfg(feature = "cuda")]
pub(super) mod cuda;

use crate::autograd::{Gradient, Value, attach1, attach2};
use crate::error::OpError;
use crate::pass::{check_beside, check_kind};
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

/// Which channels of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Channel c with channel c + D / 2: Llama as Hugging Face stores it.
    Halves,
    /// Channel 2 c with channel 2 c + 1: RoFormer, and Llama as it was published.
    Neighbours,
}

/// What is made of rows and phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Doubled,
    /// As doubled, without phases: what goes with channels that are.
    Copied,
    Rotated(Pairing),
}

/// One call of the operator: batch, tokens, heads, phases of a row, channels behind those that are doubled, and whether each head
/// has its own phases.
#[derive(Clone, Copy, Debug)]
struct Turn {
    form: Form,
    b: usize,
    n: usize,
    h: usize,
    p: usize,
    rest: usize,
    by_head: bool,
    /// Whether the phases are.
    learnt: bool,
}

/// Doubles the first P channels of `x` `[B, N, H, D]` to `[x cos Theta, x sin Theta, rest]` `[B, N, H, D + P]` with phases
/// `[N, P]` or `[N, H, P]`.
///
/// A channel that does not turn has no sine part, so it is not doubled. Differentiable in both. `x` is f32 or f64 on the CPU,
/// f32 or bf16 on CUDA; phases are of its type or f32. The recurrences fuse this; here it serves mixers without one.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn double(x: &Tensor, phase: &Tensor) -> Result<Tensor> {
    apply(x, phase, Form::Doubled)
}

/// Copies the first `turning` channels of `x` `[B, N, H, D]`: `[x, x, rest]` `[B, N, H, D + turning]`, as [`double`] without its
/// phases. Decays of channels that are doubled are.
///
/// Differentiable; element types are those of [`double`].
///
/// # Errors
/// If the shape, the element type or the number of channels does not fit.
pub fn copy(x: &Tensor, turning: usize) -> Result<Tensor> {
    let op = Form::Copied.name();
    let &[b, n, h, d] = x.dims() else {
        return Err(OpError::shape(op, "x", x, "[B, N, H, D]").into());
    };
    if turning > d {
        return Err(OpError::value(op, "turning", turning, format!("at most {d} channels")).into());
    }
    check_kind(op, x)?;
    let turn = Turn {
        form: Form::Copied,
        b,
        n,
        h,
        p: turning,
        rest: d - turning,
        by_head: false,
        learnt: false,
    };
    let x = rows_of(x)?;
    attach1(turn.forward(&x, None)?, &x, turn)
}

/// Turns the pairs of channels of `x` `[B, N, H, D]` by phases `[N, D / 2]` or `[N, H, D / 2]`: rotary positions.
///
/// Differentiable in both. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA, and may be part of a wider projection; phases
/// are of its type or f32.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::lrpe::{Pairing, rotate, rotary_frequencies, token_phases};
/// let x = Tensor::new(&[[[[1f64, 0.0, 0.0, 2.0]], [[1.0, 0.0, 0.0, 2.0]]]], &Device::Cpu)?;
/// let theta = rotary_frequencies(4, 1e4, &Device::Cpu)?;
/// let y = rotate(&x, &token_phases(&theta, 2, 0)?, Pairing::Halves)?;
/// let expected = [1f64.cos(), -2.0 * 0.01f64.sin(), 1f64.sin(), 2.0 * 0.01f64.cos()];
/// for (y, expected) in y.narrow(1, 1, 1)?.flatten_all()?.to_vec1::<f64>()?.iter().zip(expected) {
///     assert!((y - expected).abs() < 1e-12);
/// }
/// # candle_core::Result::Ok(())
/// ```
pub fn rotate(x: &Tensor, phase: &Tensor, pairing: Pairing) -> Result<Tensor> {
    apply(x, phase, Form::Rotated(pairing))
}

fn apply(x: &Tensor, phase: &Tensor, form: Form) -> Result<Tensor> {
    let op = form.name();
    let &[b, n, h, d] = x.dims() else {
        return Err(OpError::shape(op, "x", x, "[B, N, H, D]").into());
    };
    let p = match form {
        Form::Rotated(_) if d % 2 == 0 => d / 2,
        Form::Rotated(_) => return Err(OpError::shape(op, "x", x, "[B, N, H, D] with D even").into()),
        // As many as there are phases for.
        Form::Doubled | Form::Copied => phase.dims().last().map_or(d, |&p| p.min(d)),
    };
    check_kind(op, x)?;
    if phase.dims() != [n, p] && phase.dims() != [n, h, p] {
        let expected = match form {
            Form::Rotated(_) => format!("[{n}, {p}] or [{n}, {h}, {p}]"),
            Form::Doubled | Form::Copied => format!("[{n}, P] or [{n}, {h}, P], P at most {d}"),
        };
        return Err(OpError::shape(op, "phase", phase, expected).into());
    }
    check_beside(op, x, "phase", phase)?;
    let by_head = phase.rank() == 3;
    let turn = Turn {
        form,
        b,
        n,
        h,
        p,
        rest: match form {
            Form::Rotated(_) => 0,
            Form::Doubled | Form::Copied => d - p,
        },
        by_head,
        learnt: phase.track_op(),
    };
    let x = rows_of(x)?;
    attach2(turn.forward(&x, Some(phase))?, [&x, phase], turn)
}

/// `x` as the passes read it: rows may lie anywhere on CUDA, their channels not.
fn rows_of(x: &Tensor) -> Result<Tensor> {
    match x.device().is_cuda() && (x.stride()[3] == 1 || x.dims()[3] == 1) {
        true => Ok(x.clone()),
        false => x.contiguous(),
    }
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::Doubled => "lrpe::double",
            Self::Copied => "lrpe::copy",
            Self::Rotated(_) => "lrpe::rotate",
        }
    }
}

impl Turn {
    /// Channels of a row of x.
    fn width(&self) -> usize {
        match self.form {
            Form::Doubled | Form::Copied => self.p + self.rest,
            Form::Rotated(_) => 2 * self.p,
        }
    }

    /// Channels of a row of the result.
    fn out(&self) -> usize {
        2 * self.p + self.rest
    }

    /// Rows of phases of a token.
    fn groups(&self) -> usize {
        if self.by_head { self.h } else { 1 }
    }

    fn forward(&self, x: &Tensor, phase: Option<&Tensor>) -> Result<Value> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::forward::<half::bf16>(self, x, phase),
                _ => cuda::forward::<f32>(self, x, phase),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::forward::<f64>(self, x, phase),
            _ => cpu::forward::<f32>(self, x, phase),
        }
    }

    fn adjoints(
        &self,
        x: &Tensor,
        phase: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return match x.dtype() {
                DType::BF16 => cuda::backward::<half::bf16>(self, x, phase, &grad),
                _ => cuda::backward::<f32>(self, x, phase, &grad),
            };
        }
        match x.dtype() {
            DType::F64 => cpu::backward::<f64>(self, x, phase, &grad),
            _ => cpu::backward::<f32>(self, x, phase, &grad),
        }
    }
}

impl Gradient<2> for Turn {
    fn name(&self) -> &'static str {
        self.form.name()
    }

    fn needs(&self) -> Needs {
        // The rows count only in the adjoint of phases.
        Needs::operands(if self.learnt { Set::ALL } else { Set::of(&[1]) })
    }

    fn backward(&self, [x, phase]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (dx, dphase) = self.adjoints(x, Some(phase), grad)?;
        let dphase = dphase.map(|dphase| dphase.to_dtype(phase.dtype())).transpose()?;
        Ok([Some(dx), dphase])
    }
}

impl Gradient<1> for Turn {
    fn name(&self) -> &'static str {
        self.form.name()
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [x]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        Ok([Some(self.adjoints(x, None, grad)?.0)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::D;

    const FORMS: [Form; 3] = [
        Form::Doubled,
        Form::Rotated(Pairing::Halves),
        Form::Rotated(Pairing::Neighbours),
    ];

    /// Rows, and phases of every head or one for all.
    fn inputs(form: Form, [b, n, h, p]: [usize; 4], by_head: bool) -> [Tensor; 2] {
        let width = if form == Form::Doubled { p } else { 2 * p };
        let phase = if by_head { vec![n, h, p] } else { vec![n, p] };
        [normal(1, &[b, n, h, width]), (normal(2, &phase) * 3.0).unwrap()]
    }

    /// The definition, entry by entry.
    fn literal(form: Form, [b, n, h, p]: [usize; 4], x: &[f64], phase: &[f64]) -> Vec<f64> {
        let by_head = phase.len() != n * p;
        let mut y = vec![f64::NAN; b * n * h * 2 * p];
        for row in 0..b * n * h {
            let (token, head) = (row / h % n, row % h);
            for c in 0..p {
                let at = if by_head {
                    (token * h + head) * p + c
                } else {
                    token * p + c
                };
                let (sin, cos) = phase[at].sin_cos();
                let y = &mut y[row * 2 * p..][..2 * p];
                let (a, b) = match form {
                    Form::Rotated(Pairing::Neighbours) => (2 * c, 2 * c + 1),
                    _ => (c, p + c),
                };
                if form == Form::Doubled {
                    y[a] = x[row * p + c] * cos;
                    y[b] = x[row * p + c] * sin;
                } else {
                    let x = &x[row * 2 * p..][..2 * p];
                    y[a] = x[a] * cos - x[b] * sin;
                    y[b] = x[a] * sin + x[b] * cos;
                }
            }
        }
        y
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for form in FORMS {
            for by_head in [false, true] {
                for sizes in [[1, 1, 1, 1], [2, 7, 3, 5], [3, 33, 2, 16]] {
                    let [x, phase] = inputs(form, sizes, by_head);
                    let found = values(&apply(&x, &phase, form)?);
                    let wanted = literal(form, sizes, &values(&x), &values(&phase));
                    assert!(relative_rms(&found, &wanted) < 1e-14, "{form:?} {sizes:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for form in FORMS {
            for by_head in [false, true] {
                for sizes in [[1, 1, 1, 1], [2, 3, 2, 5]] {
                    check_gradients(&inputs(form, sizes, by_head), |t| apply(&t[0], &t[1], form))?;
                }
                let large = inputs(form, [2, 131, 3, 20], by_head);
                check_precision(&large, |t| apply(&t[0], &t[1], form), 1e-5)?;
                check_threads(&large, |t| apply(&t[0], &t[1], form))?;
            }
        }
        Ok(())
    }

    #[test]
    fn fixed_phases_have_no_gradient() -> Result<()> {
        for form in FORMS {
            let [x, phase] = inputs(form, [2, 3, 2, 5], false);
            check_gradients(&[x], |t| apply(&t[0], &phase, form))?;
        }
        Ok(())
    }

    /// Queries and keys as columns of one projection.
    #[test]
    fn views_are_the_same_as_copies() -> Result<()> {
        for form in FORMS {
            let (wide, [_, phase]) = (normal(3, &[2, 5, 44]), inputs(form, [2, 5, 3, 4], false));
            let width = if form == Form::Doubled { 4 } else { 8 };
            let part = |t: &Tensor| {
                t.reshape((2, 5, 11, 4))?
                    .narrow(2, 2, 3 * width / 4)?
                    .reshape((2, 5, 3, width))
            };
            let columns = |t: &Tensor| -> Result<Tensor> { apply(&part(t)?, &phase, form) };
            let dense = apply(&part(&wide)?.force_contiguous()?, &phase, form)?;
            assert_eq!(values(&columns(&wide)?), values(&dense));
            let turned = normal(4, &[2, 3, 5, width]).transpose(1, 2)?;
            let found = apply(&turned, &phase, form)?;
            assert_eq!(
                values(&found),
                values(&apply(&turned.contiguous()?, &phase, form)?)
            );
            check_gradients(&[wide], |t| columns(&t[0]))?;
        }
        Ok(())
    }

    /// Channels behind those that have phases stay as they are.
    #[test]
    fn the_rest_stays() -> Result<()> {
        for by_head in [false, true] {
            for ([b, n, h, p], rest) in [([1, 1, 1, 1], 1), ([2, 5, 3, 4], 4), ([3, 33, 2, 7], 2)] {
                let [_, phase] = inputs(Form::Doubled, [b, n, h, p], by_head);
                let x = normal(6, &[b, n, h, p + rest]);
                let composed = |x: &Tensor, phase: &Tensor| -> Result<Tensor> {
                    let turning = double(&x.narrow(3, 0, p)?.contiguous()?, phase)?;
                    Tensor::cat(&[&turning, &x.narrow(3, p, rest)?], 3)
                };
                assert_eq!(values(&double(&x, &phase)?), values(&composed(&x, &phase)?));
                check_gradients(&[x.clone(), phase], |t| double(&t[0], &t[1]))?;
                let copied = |x: &Tensor| Tensor::cat(&[&x.narrow(3, 0, p)?, x], 3);
                assert_eq!(values(&copy(&x, p)?), values(&copied(&x)?));
                check_gradients(&[x], |t| copy(&t[0], p))?;
            }
        }
        let large = normal(7, &[2, 131, 3, 20]);
        let phase = normal(8, &[131, 13]);
        check_precision(std::slice::from_ref(&large), |t| copy(&t[0], 13), 1e-6)?;
        check_threads(std::slice::from_ref(&large), |t| copy(&t[0], 13))?;
        check_precision(&[large.clone(), phase.clone()], |t| double(&t[0], &t[1]), 1e-5)?;
        check_threads(&[large, phase], |t| double(&t[0], &t[1]))
    }

    /// A rotation keeps lengths, and scores of rotated rows depend on the difference of their phases alone.
    #[test]
    fn rotations_keep_scores() -> Result<()> {
        for pairing in [Pairing::Halves, Pairing::Neighbours] {
            let [x, phase] = inputs(Form::Rotated(pairing), [2, 7, 3, 5], false);
            let other = normal(5, x.dims());
            let score = |shift: f64| -> Result<Vec<f64>> {
                let phase = (&phase + shift)?;
                let product = (rotate(&x, &phase, pairing)? * rotate(&other, &phase, pairing)?)?;
                Ok(values(&product.sum(D::Minus1)?))
            };
            let plain = values(&(&x * &other)?.sum(D::Minus1)?);
            assert!(relative_rms(&score(0.0)?, &plain) < 1e-13);
            assert!(relative_rms(&score(1.7)?, &plain) < 1e-13);
        }
        Ok(())
    }

    /// The two pairings are one rotation of channels in another order.
    #[test]
    fn pairings_differ_in_the_order_of_channels() -> Result<()> {
        let [x, phase] = inputs(Form::Rotated(Pairing::Halves), [2, 7, 3, 5], false);
        let halves = rotate(&x, &phase, Pairing::Halves)?;
        let shuffled = |t: &Tensor| {
            t.reshape((2, 7, 3, 2, 5))?
                .transpose(3, 4)?
                .reshape((2, 7, 3, 10))
        };
        let neighbours = rotate(&shuffled(&x)?, &phase, Pairing::Neighbours)?;
        assert_eq!(values(&shuffled(&halves)?), values(&neighbours));
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let (x, phase) = (normal(1, &[2, 3, 4, 6]), normal(2, &[3, 3]));
        assert_eq!(
            message(rotate(&phase, &phase, Pairing::Halves)),
            "lrpe::rotate: x has shape [3, 3], expected [B, N, H, D]"
        );
        assert_eq!(
            message(rotate(&x.narrow(3, 0, 5).unwrap(), &phase, Pairing::Halves)),
            "lrpe::rotate: x has shape [2, 3, 4, 5], expected [B, N, H, D] with D even"
        );
        assert_eq!(
            message(double(&x.narrow(3, 0, 2).unwrap(), &phase)),
            "lrpe::double: phase has shape [3, 3], expected [3, P] or [3, 4, P], P at most 2"
        );
        assert_eq!(
            message(copy(&x, 7)),
            "lrpe::copy: turning is 7, expected at most 6 channels"
        );
        let half = phase.to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(rotate(&x, &half, Pairing::Halves)),
            "lrpe::rotate: phase is F16, expected F64 like x, or F32"
        );
        let half = x.to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(rotate(&half, &phase, Pairing::Halves)),
            "lrpe::rotate: x is F16, expected f32 or f64 on the CPU, f32 or bf16 on CUDA"
        );
    }
}
