//! The additive recurrence of LightNet (arXiv 2405.21022) in its non-causal, one-scan form, and, in `causal.rs`, in its
//! causal one.
//!
//! ```text
//!   K = softmax over tokens of the logits, per channel;   S = K^T V;   O = Q S
//!   dQ = dO S^T;   dS = Q^T dO;   dV = K dS;   dlogits_s = K_s (*) (dS v_s - rowsum(S (*) dS))
//! ```
//!
//! With phases (MD-LRPE, see [`crate::lrpe`]) queries and keys are doubled to their cosine and sine parts, keys after
//! the softmax; S then has 2D rows. Nothing doubled is ever stored for the whole sequence.
//!
//! | form | file | runs |
//! |---|---|---|
//! | reference | `reference.rs` | literal loops in `f64`, for tests |
//! | chunked | `chunk.rs` | CPU, multi-threaded, `f32` and `f64` |
//! | composed | `composed.rs` | GPU, out of candle's operators |
//! | fused | `cuda.rs` | GPU, bf16, from the projections as one product leaves them ([`projected`]) |
//!
//! The operator is two nodes of the graph: (logits, v, phase) -> state and (q, state, phase) -> o. Candle adds the
//! adjoints of the state itself, and the exchange between parts of a sequence sits between the two.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use fulgur_kernels::additive::{NonCausal, noncausal};
//! let ones = Tensor::ones((1, 5, 2, 4), DType::F32, &Device::Cpu)?;
//! let (o, state) = noncausal(&ones, &ones, &ones, &NonCausal::default())?;
//! assert_eq!(o.dims(), [1, 5, 2, 4]);
//! // Equal logits: the state is the mean of the values, and every output is the sum of q times it.
//! assert!((state.max_all()?.to_scalar::<f32>()? - 1.0).abs() < 1e-6);
//! assert!((o.min_all()?.to_scalar::<f32>()? - 4.0).abs() < 1e-5);
//! # candle_core::Result::Ok(())
//! ```

mod causal;
mod chunk;
mod composed;
#[cfg(feature = "cuda")]
mod cuda;
mod forward;
mod projected;
pub mod reference;
#[cfg(test)]
mod tests;

pub use causal::{Causal, CausalState, causal, log_sum_before, step, step_in_place};
pub use forward::{causal_forward_op, forward_op};
pub use projected::projected;

use crate::autograd::{Gradient, Value, attach2, attach3};
use crate::error::OpError;
use crate::exchange::{AdditiveState, StateExchange};
use crate::slice_math::SliceMath;
use crate::strided::{View, contiguous};
use candle_core::{DType, Result, StorageRef, Tensor};
use chunk::Dims;
use std::sync::Arc;

const NAME: &str = "additive::noncausal";

/// What [`noncausal`] takes besides queries, logits and values.
#[derive(Clone, Debug, Default)]
pub struct NonCausal<'a> {
    /// Phases of queries and keys in radians, `[N, D]` or `[N, H, D]`; differentiable.
    pub phase: Option<&'a Tensor>,
    /// `[B, N]` of any type, zero where a token is padding: it enters no state. A row without tokens gives zeros.
    pub mask: Option<&'a Tensor>,
    /// Joins the parts of a sequence; `None` for a sequence in one part.
    pub exchange: Option<Arc<dyn StateExchange>>,
}

/// Non-causal additive recurrence: `q`, `logits` `[B, N, H, D]`, `v` `[B, N, H, E]`, of any strides, to the output
/// `[B, N, H, E]` in the type of `v` and the state `[B, H, D, E]`, or `[B, H, 2D, E]` with phases.
///
/// Inputs are f32, f16, bf16 or f64. The state, and all work, is in f32, or in f64 if any input is. Differentiable in
/// `q`, `logits`, `v` and the phases, through the output and through the state.
///
/// Fails on shapes that do not fit, element types that are not floats, and when the exchange fails.
pub fn noncausal(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    options: &NonCausal<'_>,
) -> Result<(Tensor, Tensor)> {
    let form = if q.device().is_cpu() {
        Form::Chunked
    } else {
        Form::Composed
    };
    run(q, logits, v, options, form)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Chunked,
    Composed,
}

fn run(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    options: &NonCausal<'_>,
    form: Form,
) -> Result<(Tensor, Tensor)> {
    let dims = check(q, logits, v, options)?;
    let output = v.dtype();
    let wide = [Some(q), Some(logits), Some(v), options.phase]
        .iter()
        .flatten()
        .any(|t| t.dtype() == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let [q, logits, v] = [q, logits, v].map(|t| t.to_dtype(dtype));
    let (q, logits, v) = (q?, logits?, v?);
    let phase = options.phase.map(|phase| phase.to_dtype(dtype)).transpose()?;
    let phase = phase.as_ref();
    let context = Arc::new(Context {
        dims,
        form,
        trig: phase.map(|phase| Trig::new(phase, dims.h, form)).transpose()?,
        keep: options.mask.map(|mask| mask.detach().ne(0f64)).transpose()?,
        exchange: options.exchange.clone().filter(|exchange| exchange.parts() > 1),
    });
    let state = context.state(&logits, &v, phase)?;
    let o = match (form, dtype) {
        (Form::Composed, _) => composed::read(&q, &state, phase)?,
        (Form::Chunked, DType::F64) => read_chunked::<f64>(&context, &q, &state, phase)?,
        (Form::Chunked, _) => read_chunked::<f32>(&context, &q, &state, phase)?,
    };
    Ok((o.to_dtype(output)?, state))
}

fn check(q: &Tensor, logits: &Tensor, v: &Tensor, options: &NonCausal<'_>) -> Result<Dims> {
    let Ok((b, n, h, d)) = q.dims4() else {
        return Err(OpError::shape(NAME, "q", q, "[B, N, H, D]").into());
    };
    let e = v.dims().last().copied().unwrap_or(0);
    if b * n * h * d == 0 {
        return Err(OpError::shape(NAME, "q", q, "[B, N, H, D] with at least one element").into());
    }
    if logits.dims() != q.dims() {
        return Err(OpError::shape(NAME, "logits", logits, format!("{:?} like q", q.dims())).into());
    }
    if v.dims() != [b, n, h, e] || e == 0 {
        return Err(OpError::shape(NAME, "v", v, format!("[{b}, {n}, {h}, E] to go with q")).into());
    }
    if let Some(phase) = options.phase
        && phase.dims() != [n, d]
        && phase.dims() != [n, h, d]
    {
        let expected = format!("[{n}, {d}] or [{n}, {h}, {d}]");
        return Err(OpError::shape(NAME, "phase", phase, expected).into());
    }
    if let Some(mask) = options.mask
        && mask.dims() != [b, n]
    {
        return Err(OpError::shape(NAME, "mask", mask, format!("[{b}, {n}]")).into());
    }
    let floats = [
        ("q", Some(q)),
        ("logits", Some(logits)),
        ("v", Some(v)),
        ("phase", options.phase),
    ];
    for (field, tensor) in floats {
        if let Some(tensor) = tensor
            && !matches!(tensor.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64)
        {
            let found = format!("{:?}", tensor.dtype());
            return Err(OpError::value(NAME, field, found, "f32, f16, bf16 or f64").into());
        }
    }
    let width = if options.phase.is_some() { 2 * d } else { d };
    Ok(Dims { b, n, h, d, e, width })
}

/// What both nodes of the graph and their gradients share.
struct Context {
    dims: Dims,
    form: Form,
    trig: Option<Trig>,
    keep: Option<Tensor>,
    exchange: Option<Arc<dyn StateExchange>>,
}

/// Sines and cosines, computed once a call.
enum Trig {
    /// Contiguous `[N, heads, D]` on the CPU.
    Chunked {
        sin: Tensor,
        cos: Tensor,
        heads: usize,
    },
    Composed(composed::Trig),
}

impl Trig {
    fn new(phase: &Tensor, heads: usize, form: Form) -> Result<Self> {
        let phase = phase.detach();
        if form == Form::Composed {
            return Ok(Self::Composed(composed::Trig::new(&phase)?));
        }
        let phase = phase.contiguous()?;
        let heads = if phase.rank() == 2 { 1 } else { heads };
        let (sin, cos) = match phase.dtype() {
            DType::F64 => sin_cos::<f64>(&phase)?,
            _ => sin_cos::<f32>(&phase)?,
        };
        Ok(Self::Chunked { sin, cos, heads })
    }

    fn composed(&self) -> Option<&composed::Trig> {
        match self {
            Self::Composed(trig) => Some(trig),
            Self::Chunked { .. } => None,
        }
    }

    fn lock(&self) -> Option<(StorageRef<'_>, StorageRef<'_>)> {
        match self {
            Self::Chunked { sin, cos, .. } => Some((sin.storage_and_layout().0, cos.storage_and_layout().0)),
            Self::Composed(_) => None,
        }
    }

    fn view<'a, T: SliceMath>(
        &self,
        guards: Option<&'a (StorageRef<'_>, StorageRef<'_>)>,
    ) -> Result<Option<chunk::Trig<'a, T>>> {
        match (self, guards) {
            (Self::Chunked { sin, cos, heads }, Some(guards)) => Ok(Some(chunk::Trig {
                sin: contiguous(sin, &guards.0)?,
                cos: contiguous(cos, &guards.1)?,
                heads: *heads,
            })),
            _ => Ok(None),
        }
    }
}

fn sin_cos<T: SliceMath>(phase: &Tensor) -> Result<(Tensor, Tensor)> {
    let guard = phase.storage_and_layout().0;
    let (sin, cos) = chunk::sin_cos(contiguous::<T>(phase, &guard)?);
    let device = phase.device();
    Ok((
        Tensor::from_vec(sin, phase.shape(), device)?,
        Tensor::from_vec(cos, phase.shape(), device)?,
    ))
}

/// Runs `$body` with `$trig: Option<chunk::Trig<$t>>` of a context.
macro_rules! with_trig {
    ($context:expr, $t:ty, $trig:ident => $body:expr) => {{
        let guards = $context.trig.as_ref().and_then(Trig::lock);
        let $trig = match &$context.trig {
            Some(trig) => trig.view::<$t>(guards.as_ref())?,
            None => None,
        };
        $body
    }};
}

impl Context {
    fn keep_vec(&self) -> Result<Option<Vec<bool>>> {
        let Some(keep) = &self.keep else { return Ok(None) };
        Ok(Some(
            keep.flatten_all()?
                .to_vec1::<u8>()?
                .into_iter()
                .map(|keep| keep != 0)
                .collect(),
        ))
    }

    /// The state of all tokens of all parts as a node of the graph.
    ///
    /// One flat buffer holds `[state | max | den]`: the statistics are saved for the gradient.
    fn state(self: &Arc<Self>, logits: &Tensor, v: &Tensor, phase: Option<&Tensor>) -> Result<Tensor> {
        let Dims { b, h, e, width, .. } = self.dims;
        let value = match (self.form, logits.dtype()) {
            (Form::Composed, _) => {
                let trig = self.trig.as_ref().and_then(Trig::composed);
                let sums = composed::sums(&logits.detach(), &v.detach(), trig, self.keep.as_ref())?;
                Value::Tensor(self.pack(&self.reduce(sums)?)?)
            }
            (Form::Chunked, DType::F64) => self.state_chunked::<f64>(logits, v)?,
            (Form::Chunked, _) => self.state_chunked::<f32>(logits, v)?,
        };
        let gradient = StateGradient(self.clone());
        let packed = match phase {
            None => attach2(value, [logits, v], gradient)?,
            Some(phase) => attach3(value, [logits, v, phase], gradient)?,
        };
        packed.narrow(0, 0, b * h * width * e)?.reshape((b, h, width, e))
    }

    fn reduce(&self, sums: AdditiveState) -> Result<AdditiveState> {
        match &self.exchange {
            Some(exchange) => exchange.reduce(sums),
            None => Ok(sums),
        }
    }

    fn pack(&self, sums: &AdditiveState) -> Result<Tensor> {
        let parts = [sums.normalise()?, sums.max.clone(), sums.den.clone()];
        let [state, max, den] = parts.map(|part| part.flatten_all());
        Tensor::cat(&[state?, max?, den?], 0)
    }

    /// State, maximum and denominator of a packed buffer, detached.
    fn unpack(&self, packed: &Tensor) -> Result<[Tensor; 3]> {
        let Dims {
            b, h, d, e, width, ..
        } = self.dims;
        let (states, channels) = (b * h * width * e, b * h * d);
        let packed = packed.detach();
        Ok([
            packed.narrow(0, 0, states)?.reshape((b, h, width, e))?,
            packed.narrow(0, states, channels)?.reshape((b, h, d))?,
            packed
                .narrow(0, states + channels, channels)?
                .reshape((b, h, d))?,
        ])
    }

    fn state_chunked<T: SliceMath>(&self, logits: &Tensor, v: &Tensor) -> Result<Value> {
        let Dims {
            b, h, d, e, width, ..
        } = self.dims;
        let keep = self.keep_vec()?;
        let (logits_guard, v_guard) = (logits.storage_and_layout().0, v.storage_and_layout().0);
        let logits_view = View::<T>::of(logits, &logits_guard)?;
        let v_view = View::<T>::of(v, &v_guard)?;
        let mut sums =
            with_trig!(self, T, trig => chunk::sums(self.dims, logits_view, v_view, trig, keep.as_deref()));
        if self.exchange.is_some() {
            let device = logits.device();
            let sums = AdditiveState {
                max: Tensor::from_vec(sums.max, (b, h, d), device)?,
                den: Tensor::from_vec(sums.den, (b, h, d), device)?,
                num: Tensor::from_vec(sums.num, (b, h, width, e), device)?,
            };
            return Ok(Value::Tensor(self.pack(&self.reduce(sums)?)?));
        }
        chunk::normalise(self.dims, &sums.den, &mut sums.num);
        let mut packed = sums.num;
        packed.extend_from_slice(&sums.max);
        packed.extend_from_slice(&sums.den);
        let len = packed.len();
        Ok(Value::Cpu(T::to_cpu_storage_owned(packed), len.into()))
    }

    fn state_gradients(
        &self,
        [logits, v]: [&Tensor; 2],
        phase: Option<&Tensor>,
        packed: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [state, max, den] = self.unpack(packed)?;
        let [dstate, _, _] = self.unpack(grad)?;
        let dstate = match &self.exchange {
            Some(exchange) => exchange.sum(&dstate)?,
            None => dstate,
        };
        if self.form == Form::Composed {
            let trig = self.trig.as_ref().and_then(Trig::composed);
            let inputs = (&logits.detach(), &v.detach());
            let (dlogits, dv, dphase) =
                composed::state_backward(inputs, trig, self.keep.as_ref(), (&max, &den), (&state, &dstate))?;
            let dphase = match (dphase, phase) {
                (Some(dphase), Some(phase)) => Some(dphase.transpose(0, 1)?.reshape(phase.shape())?),
                _ => None,
            };
            return Ok([Some(dlogits), Some(dv), dphase]);
        }
        match logits.dtype() {
            DType::F64 => {
                self.state_gradients_chunked::<f64>([logits, v], phase, [&max, &den, &state, &dstate])
            }
            _ => self.state_gradients_chunked::<f32>([logits, v], phase, [&max, &den, &state, &dstate]),
        }
    }

    fn state_gradients_chunked<T: SliceMath>(
        &self,
        [logits, v]: [&Tensor; 2],
        phase: Option<&Tensor>,
        saved: [&Tensor; 4],
    ) -> Result<[Option<Tensor>; 3]> {
        let keep = self.keep_vec()?;
        let saved = saved.map(Tensor::contiguous);
        let [max, den, state, dstate] = saved;
        let (max, den, state, dstate) = (max?, den?, state?, dstate?);
        let guards = [logits, v, &max, &den, &state, &dstate].map(|t| t.storage_and_layout().0);
        let saved = chunk::Saved {
            max: contiguous::<T>(&max, &guards[2])?,
            den: contiguous(&den, &guards[3])?,
            state: contiguous(&state, &guards[4])?,
            dstate: contiguous(&dstate, &guards[5])?,
        };
        let (logits_view, v_view) = (View::of(logits, &guards[0])?, View::of(v, &guards[1])?);
        let wanted = phase.filter(|phase| phase.track_op());
        let adjoints = with_trig!(self, T, trig =>
            chunk::state_backward(self.dims, logits_view, v_view, trig, keep.as_deref(), saved, wanted.is_some()));
        let device = logits.device();
        Ok([
            Some(Tensor::from_vec(adjoints.dlogits, logits.shape(), device)?),
            Some(Tensor::from_vec(adjoints.dv, v.shape(), device)?),
            wanted
                .map(|phase| Tensor::from_vec(adjoints.dphase, phase.shape(), device))
                .transpose()?,
        ])
    }
}

struct StateGradient(Arc<Context>);

impl Gradient<2> for StateGradient {
    fn name(&self) -> &'static str {
        "additive-state"
    }

    fn backward(&self, args: [&Tensor; 2], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let [dlogits, dv, _] = self.0.state_gradients(args, None, res, grad)?;
        Ok([dlogits, dv])
    }
}

impl Gradient<3> for StateGradient {
    fn name(&self) -> &'static str {
        "additive-state"
    }

    fn backward(&self, args: [&Tensor; 3], res: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        self.0
            .state_gradients([args[0], args[1]], Some(args[2]), res, grad)
    }
}

fn read_chunked<T: SliceMath>(
    context: &Arc<Context>,
    q: &Tensor,
    state: &Tensor,
    phase: Option<&Tensor>,
) -> Result<Tensor> {
    let Dims { b, n, h, e, .. } = context.dims;
    let value = {
        let (q_guard, state_guard) = (q.storage_and_layout().0, state.storage_and_layout().0);
        let (q_view, state) = (View::<T>::of(q, &q_guard)?, contiguous(state, &state_guard)?);
        let o = with_trig!(context, T, trig => chunk::read(context.dims, q_view, state, trig));
        Value::Cpu(T::to_cpu_storage_owned(o), (b, n, h, e).into())
    };
    let gradient = ReadGradient(context.clone());
    match phase {
        None => attach2(value, [q, state], gradient),
        Some(phase) => attach3(value, [q, state, phase], gradient),
    }
}

struct ReadGradient(Arc<Context>);

impl ReadGradient {
    fn gradients<T: SliceMath>(
        &self,
        [q, state]: [&Tensor; 2],
        phase: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let guards = [q, state, grad].map(|t| t.storage_and_layout().0);
        let (q_view, grad_view) = (View::<T>::of(q, &guards[0])?, View::of(grad, &guards[2])?);
        let state_slice = contiguous(state, &guards[1])?;
        let wanted = phase.filter(|phase| phase.track_op());
        let adjoints = with_trig!(self.0, T, trig =>
            chunk::read_backward(self.0.dims, q_view, state_slice, trig, grad_view, wanted.is_some()));
        let device = q.device();
        Ok([
            Some(Tensor::from_vec(adjoints.dq, q.shape(), device)?),
            Some(Tensor::from_vec(adjoints.dstate, state.shape(), device)?),
            wanted
                .map(|phase| Tensor::from_vec(adjoints.dphase, phase.shape(), device))
                .transpose()?,
        ])
    }

    fn typed(
        &self,
        args: [&Tensor; 2],
        phase: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        match grad.dtype() {
            DType::F64 => self.gradients::<f64>(args, phase, grad),
            _ => self.gradients::<f32>(args, phase, grad),
        }
    }
}

impl Gradient<2> for ReadGradient {
    fn name(&self) -> &'static str {
        "additive-read"
    }

    fn backward(&self, args: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let [dq, dstate, _] = self.typed(args, None, grad)?;
        Ok([dq, dstate])
    }
}

impl Gradient<3> for ReadGradient {
    fn name(&self) -> &'static str {
        "additive-read"
    }

    fn backward(&self, args: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        self.typed([args[0], args[1]], Some(args[2]), grad)
    }
}
