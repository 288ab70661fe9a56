//! Exponential moving average along one axis with a decay a head: the scan of TPE (LightNet, arXiv 2405.21022).
//!
//! ```text
//!   u_t = lambda_h u_{t-1} + w_h x_t = sum_{s<=t} w_h lambda_h^{t-s} x_s,     lambda_h = exp(-rate_h)
//!   a_t = du_t + lambda_h a_{t+1};   dx_t = w_h a_t;   dw_h = sum x_t a_t;   drate_h = -lambda_h sum u_{t-1} a_t
//! ```
//!
//! Decays are given as rates, so that lambda = 1 is exact and slow decays keep their digits; powers of lambda over a
//! distance are exponentials of a product. The two-sided form weighs by `lambda^|t-s|`.
//!
//! | form | file | runs |
//! |---|---|---|
//! | reference | `reference.rs` | the convolution written out in `f64`, for tests |
//! | chunked | `chunk.rs` | CPU, multi-threaded, `f32` and `f64` |
//! | composed | `composed.rs` | GPU: Toeplitz products inside chunks and between them |
//! | fused | `cuda.rs` | GPU, where no state enters or is asked for: one thread a line, of long ones a segment |

mod chunk;
mod composed;
#[cfg(feature = "cuda")]
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use crate::autograd::{Gradient, Value, attach3};
use crate::error::OpError;
use crate::exchange::{Direction, StateExchange, incoming};
use crate::scalar::Real;
use crate::strided::contiguous;
use candle_core::{DType, Result, Tensor};
use chunk::Dims;
use std::sync::Arc;

const NAME: &str = "ema::scan";

/// What the scans take besides values, decays and weights.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The axis that is scanned; it lies before the last two, which are heads and channels.
    pub axis: usize,
    /// Weighs by `lambda^|t-s|` over all tokens instead of `lambda^(t-s)` over earlier ones.
    pub two_sided: bool,
    /// State before the first token, shaped like `x` without the axis; zeros if absent. One-sided only.
    pub initial: Option<&'a Tensor>,
    /// Joins the parts of a sequence that is split along the axis; `None` for a sequence in one part.
    pub exchange: Option<Arc<dyn StateExchange>>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            axis: 1,
            two_sided: false,
            initial: None,
            exchange: None,
        }
    }
}

/// Scans `x`, usually `[batch, n, H, C]`, with `lambda = sigmoid(gamma)`, gamma `[H]`, and weights `[H]`.
///
/// The result has shape and type of `x`. See [`scan_with_rate`], which also gives the state.
pub fn scan(x: &Tensor, gamma: &Tensor, weight: &Tensor, options: &Options<'_>) -> Result<Tensor> {
    let rate = rate_of(gamma)?;
    #[cfg(feature = "cuda")]
    if cuda::applies(x, options) {
        let dims = check(x, &rate, weight, options)?;
        return cuda::scan(x, &rate, weight, dims, options.two_sided);
    }
    Ok(scan_with_rate(x, &rate, weight, options)?.0)
}

/// The rate of `lambda = sigmoid(gamma)`: `ln(1 + exp(-gamma))` in f64, with all its digits for lambda close to 1.
/// Differentiable; a gamma below -80 counts as -80.
pub fn rate_of(gamma: &Tensor) -> Result<Tensor> {
    (gamma.to_dtype(DType::F64)?.maximum(-80f64)?.neg()?.exp()? + 1.0)?.log()
}

/// Scans `x` `[.., n, .., H, C]` along `options.axis` with `lambda = exp(-rate)`; `rate` (>= 0) and `weight` are `[H]`.
///
/// Gives `u` in shape and type of `x`, and the state after the last token, shaped like `x` without the axis, in f32
/// (f64 if `x` is); in the two-sided form the state of the scan from the first token. Inputs are f32, f16, bf16 or
/// f64; work is in f32 unless `x` is f64. Differentiable in `x`, `rate`, `weight` and the initial state.
///
/// Fails on shapes that do not fit, on an initial state for the two-sided form, and when the exchange fails.
pub fn scan_with_rate(
    x: &Tensor,
    rate: &Tensor,
    weight: &Tensor,
    options: &Options<'_>,
) -> Result<(Tensor, Tensor)> {
    let form = if x.device().is_cpu() {
        Form::Chunked
    } else {
        Form::Composed
    };
    run(x, rate, weight, options, form)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Chunked,
    Composed,
}

fn run(
    x: &Tensor,
    rate: &Tensor,
    weight: &Tensor,
    options: &Options<'_>,
    form: Form,
) -> Result<(Tensor, Tensor)> {
    let dims = check(x, rate, weight, options)?;
    let dtype = if x.dtype() == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    let Dims {
        outer,
        n,
        rest,
        heads,
        channels,
    } = dims;
    let x_flat = x
        .to_dtype(dtype)?
        .contiguous()?
        .reshape((outer, n, rest, heads, channels))?;
    let (rate, weight) = (
        rate.to_dtype(dtype)?.contiguous()?,
        weight.to_dtype(dtype)?.contiguous()?,
    );
    let scan = Scan {
        dims,
        form,
        exchange: options.exchange.clone().filter(|e| e.parts() > 1),
    };
    let initial = match options.initial {
        Some(state) => Some(
            state
                .to_dtype(dtype)?
                .reshape((outer, 1, rest, heads, channels))?,
        ),
        None => None,
    };
    let mut u = scan.directed(&x_flat, &rate, &weight, Direction::Forward, initial.as_ref())?;
    let mut state_dims = x.dims().to_vec();
    state_dims.remove(options.axis);
    let state = u.narrow(1, n - 1, 1)?.reshape(state_dims)?;
    if options.two_sided {
        let back = scan.directed(&x_flat, &rate, &weight, Direction::Backward, None)?;
        // Both scans count the token itself.
        u = ((u + back)? - x_flat.broadcast_mul(&weight.reshape((heads, 1))?)?)?;
    }
    Ok((u.reshape(x.shape())?.to_dtype(x.dtype())?, state))
}

fn check(x: &Tensor, rate: &Tensor, weight: &Tensor, options: &Options<'_>) -> Result<Dims> {
    let (axis, rank) = (options.axis, x.rank());
    if rank < 3 || axis + 2 >= rank || x.elem_count() == 0 {
        let expected = format!("[.., n, .., heads, channels] with n on axis {axis}, none of them 0");
        return Err(OpError::shape(NAME, "x", x, expected).into());
    }
    let heads = x.dims()[rank - 2];
    for (field, tensor) in [("rate or gamma", rate), ("weight", weight)] {
        if tensor.dims() != [heads] {
            return Err(OpError::shape(NAME, field, tensor, format!("[{heads}], one for each head")).into());
        }
    }
    if let Some(state) = options.initial {
        let mut expected = x.dims().to_vec();
        expected.remove(axis);
        if state.dims() != expected {
            return Err(OpError::shape(NAME, "initial", state, format!("{expected:?}")).into());
        }
        if options.two_sided {
            return Err(OpError::value(NAME, "initial", "given", "none in the two-sided form").into());
        }
    }
    for (field, tensor) in [("x", x), ("rate or gamma", rate), ("weight", weight)] {
        if !matches!(tensor.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let found = format!("{:?}", tensor.dtype());
            return Err(OpError::value(NAME, field, found, "f32, f16, bf16 or f64").into());
        }
    }
    Ok(Dims {
        outer: x.dims()[..axis].iter().product(),
        n: x.dims()[axis],
        rest: x.dims()[axis + 1..rank - 2].iter().product(),
        heads,
        channels: x.dims()[rank - 1],
    })
}

struct Scan {
    dims: Dims,
    form: Form,
    exchange: Option<Arc<dyn StateExchange>>,
}

impl Scan {
    /// One-sided scan of `x` `[outer, n, rest, H, C]`, with what enters from before and from other parts.
    fn directed(
        &self,
        x: &Tensor,
        rate: &Tensor,
        weight: &Tensor,
        direction: Direction,
        initial: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Dims { n, heads, .. } = self.dims;
        let mut u = match (self.form, x.dtype()) {
            (Form::Composed, _) => composed::scan(x, rate, weight, direction == Direction::Backward)?,
            (Form::Chunked, DType::F64) => chunked::<f64>(self.dims, x, rate, weight, direction)?,
            (Form::Chunked, _) => chunked::<f32>(self.dims, x, rate, weight, direction)?,
        };
        if initial.is_none() && self.exchange.is_none() {
            return Ok(u);
        }
        let per_head = rate.reshape((1, 1, 1, heads, 1))?;
        let steps: Vec<f64> = match direction {
            Direction::Forward => (1..=n).map(|i| -(i as f64)).collect(),
            Direction::Backward => (1..=n).rev().map(|i| -(i as f64)).collect(),
        };
        let steps = Tensor::from_vec(steps, (1, n, 1, 1, 1), x.device())?.to_dtype(x.dtype())?;
        let powers = steps.broadcast_mul(&per_head)?.exp()?;
        if let Some(state) = initial {
            u = u.broadcast_add(&powers.broadcast_mul(state)?)?;
        }
        if let Some(exchange) = &self.exchange {
            let last = if direction == Direction::Forward { n - 1 } else { 0 };
            let state = u.narrow(1, last, 1)?.contiguous()?;
            let entering = incoming(exchange, &state, &(per_head * -(n as f64))?, direction)?;
            u = u.broadcast_add(&powers.broadcast_mul(&entering)?)?;
        }
        Ok(u)
    }
}

fn chunked<T: Real>(
    dims: Dims,
    x: &Tensor,
    rate: &Tensor,
    weight: &Tensor,
    direction: Direction,
) -> Result<Tensor> {
    let value = {
        let guards = [x, rate, weight].map(|t| t.storage_and_layout().0);
        let (rate, weight) = (
            contiguous::<T>(rate, &guards[1])?,
            contiguous(weight, &guards[2])?,
        );
        let u = chunk::scan(dims, contiguous(x, &guards[0])?, rate, Some(weight), direction);
        Value::Cpu(T::to_cpu_storage_owned(u), x.shape().clone())
    };
    attach3(value, [x, rate, weight], ScanGradient { dims, direction })
}

struct ScanGradient {
    dims: Dims,
    direction: Direction,
}

impl ScanGradient {
    fn typed<T: Real>(
        &self,
        [x, rate, weight]: [&Tensor; 3],
        u: &Tensor,
        du: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let du = du.contiguous()?;
        let guards = [x, rate, weight, u, &du].map(|t| t.storage_and_layout().0);
        let adjoints = chunk::backward(
            self.dims,
            chunk::Saved {
                x: contiguous::<T>(x, &guards[0])?,
                rate: contiguous(rate, &guards[1])?,
                weight: contiguous(weight, &guards[2])?,
                u: contiguous(u, &guards[3])?,
            },
            contiguous(&du, &guards[4])?,
            self.direction,
        );
        let device = x.device();
        Ok([
            Some(Tensor::from_vec(adjoints.dx, x.shape(), device)?),
            Some(Tensor::from_vec(adjoints.drate, rate.shape(), device)?),
            Some(Tensor::from_vec(adjoints.dweight, weight.shape(), device)?),
        ])
    }
}

impl Gradient<3> for ScanGradient {
    fn name(&self) -> &'static str {
        "ema-scan"
    }

    fn backward(&self, args: [&Tensor; 3], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        match grad.dtype() {
            DType::F64 => self.typed::<f64>(args, res, grad),
            _ => self.typed::<f32>(args, res, grad),
        }
    }
}
