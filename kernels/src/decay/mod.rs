//! The causal recurrence with decay of lightning attention (arXiv 2401.04658) and its relatives: linear attention,
//! TransNormerLLM, HGRN2.
//!
//! ```text
//!   S_t = diag(a_t) S_{t-1} + k_t v_t^T,     o_t = S_t^T q_t,     a_t = exp(log-decay) in [0, 1]
//!   R_t = q_t do_t^T + diag(a_{t+1}) R_{t+1}
//!   dq_t = S_t do_t;   dk_t = R_t v_t;   dv_t = R_t^T k_t;   dS_init = diag(a_0) R_0
//!   dlog a_t = rowsum((diag(a_t) S_{t-1}) (*) R_t)
//! ```
//!
//! The decay is absent, constant for a head, or given for every token, for all channels of a head or for each. States
//! are true ones: what enters a token or a part of a sequence is exactly S_{t-1}.
//!
//! | form | file | runs |
//! |---|---|---|
//! | reference | `reference.rs` | literal recurrence and adjoint in `f64`, for tests |
//! | chunked | `chunk.rs` and the files it names | CPU, multi-threaded, `f32` and `f64` |
//! | sweeps | `cuda/` and the kernels it names | GPU, `bf16` on tensor cores and `f32` |
//! | one token | `step.rs` | both, for decoding |
//!
//! The output is one node of the graph, over all inputs. The final state is a node behind it, so that adjoints of both
//! meet in one backward pass.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use fulgur_kernels::decay::{Causal, LogDecay, causal};
//! let ones = Tensor::ones((1, 3, 1, 1), DType::F32, &Device::Cpu)?;
//! let half = Tensor::new(&[-std::f32::consts::LN_2], &Device::Cpu)?;
//! let options = Causal { decay: LogDecay::Head(&half), ..Default::default() };
//! let (o, state) = causal(&ones, &ones, &ones, &options)?;
//! let expected = [1.0, 1.5, 1.75];
//! for (o, expected) in o.flatten_all()?.to_vec1::<f32>()?.iter().zip(expected) {
//!     assert!((o - expected).abs() < 1e-6);
//! }
//! assert_eq!(state.dims(), [1, 1, 1, 1]);
//! # candle_core::Result::Ok(())
//! ```

mod channel;
mod chunk;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod forward;
mod gate;
mod late;
mod plan;
pub mod reference;
mod step;
#[cfg(test)]
mod tests;
mod triangle;
mod uniform;

pub use forward::{Gate, forward_op};
pub use step::{Fused, step, step_fused, step_fused_in_place, step_in_place};

use crate::autograd::{Gradient, GradientOfMany, Value, attach_many, attach1};
use crate::error::OpError;
use crate::exchange::{Coming, Direction, StateExchange, start_arriving};
use crate::sequences;
use crate::slice_math::SliceMath;
use crate::strided::{View, contiguous};
use crate::tape::{Needs, Set};
use candle_core::{DType, Device, Result, StorageRef, Tensor, bail};
use chunk::{Decay, Inputs};
use plan::{Dims, Plan};
use std::sync::{Arc, Mutex};

const NAME: &str = "decay::causal";

/// Logarithms of decays, at most zero: zero keeps the state exactly, negative infinity forgets it. Differentiable.
#[derive(Clone, Copy, Debug, Default)]
pub enum LogDecay<'a> {
    /// No decay.
    #[default]
    None,
    /// One constant for every head, `[H]`.
    Head(&'a Tensor),
    /// One for every token and head, `[B, N, H]`.
    Token(&'a Tensor),
    /// One for every token, head and key channel, `[B, N, H, D]`.
    Channel(&'a Tensor),
}

impl<'a> LogDecay<'a> {
    fn tensor(self) -> Option<&'a Tensor> {
        match self {
            Self::None => None,
            Self::Head(log) | Self::Token(log) | Self::Channel(log) => Some(log),
        }
    }

    fn kind(self) -> Kind {
        match self {
            Self::None => Kind::None,
            Self::Head(_) => Kind::Head,
            Self::Token(_) => Kind::Token,
            Self::Channel(_) => Kind::Channel,
        }
    }
}

/// What [`causal`] takes besides queries, keys and values.
#[derive(Clone, Debug, Default)]
pub struct Causal<'a> {
    /// How the state decays.
    pub decay: LogDecay<'a>,
    /// State before the first token, `[B, H, D, E]`; zeros if absent. Differentiable.
    pub initial: Option<&'a Tensor>,
    /// Joins the parts of a sequence; `None` for a sequence in one part. An initial state then adds to what enters
    /// this part: only the first part has one. Backward exchanges too: every part must take its gradients.
    pub exchange: Option<Arc<dyn StateExchange>>,
    /// Borders of packed sequences in a batch of one: starts with 0, ends with N, never falls. The initial and final
    /// states are then `[S, H, D, E]` for S sequences. With an exchange the first sequence goes on from the part before and
    /// the last one into the part behind; either may be empty, so that a border may lie between two parts.
    pub sequences: Option<&'a [usize]>,
}

/// Causal recurrence with decay: `q`, `k` `[B, N, H, D]`, `v` `[B, N, H, E]`, of any strides, to the output
/// `[B, N, H, E]` in the type of `v` and the final state `[B, H, D, E]`.
///
/// Inputs are f32, f16, bf16 or, on the CPU, f64. The state is in f32, or in f64 if any input is, and so is all work on
/// the CPU. On a GPU bf16 and f16 are multiplied as bf16 on tensor cores and summed in f32 where D and E are multiples of 8
/// up to 128, unless a decay of heads is learnt; everything else is computed in f32, many times slower, for
/// widths up to 256. What was chosen is a debug event of `tracing`.
///
/// Differentiable in `q`, `k`, `v`, the log-decays and the initial state, through the output and through the final
/// state. Log-decays above zero are not refused: states then grow.
///
/// # Errors
/// Shapes that do not fit, element types that are not floats, tensors on different devices, more than 2^31 elements on a
/// GPU, and an exchange that fails.
pub fn causal(q: &Tensor, k: &Tensor, v: &Tensor, options: &Causal<'_>) -> Result<(Tensor, Tensor)> {
    let dims = check(q, k, v, options)?;
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        let (o, state) = cuda::causal(q, k, v, options, dims)?;
        return Ok((o.to_dtype(v.dtype())?, state));
    }
    let decay = options.decay.tensor();
    let Dims { b, n, h, d, e } = dims;
    tracing::debug!(form = "chunks on the CPU", b, n, h, d, e, decay = ?options.decay.kind(), "decay::causal");
    let dtype = wide_type([Some(q), Some(k), Some(v), decay, options.initial]);
    let operands = Operands {
        q: q.to_dtype(dtype)?,
        k: k.to_dtype(dtype)?,
        v: v.to_dtype(dtype)?,
        decay: match options.decay {
            LogDecay::None => None,
            LogDecay::Head(log) => Some(log.to_dtype(dtype)?.contiguous()?),
            LogDecay::Token(log) | LogDecay::Channel(log) => Some(log.to_dtype(dtype)?),
        },
        initial: match options.initial {
            Some(state) => Some(state.to_dtype(dtype)?.contiguous()?),
            None => None,
        },
    };
    let pass = CausalPass {
        plan: Plan::new(dims, options.sequences.map(|borders| &borders[1..])),
        kind: options.decay.kind(),
        exchange: options.exchange.clone().filter(|exchange| exchange.parts() > 1),
        packed: options.sequences.is_some(),
    };
    let (o, state) = match dtype {
        DType::F64 => pass.attach::<f64>(&operands)?,
        _ => pass.attach::<f32>(&operands)?,
    };
    Ok((o.to_dtype(v.dtype())?, state))
}

/// f64 if any tensor is, else f32.
fn wide_type<'a>(tensors: impl IntoIterator<Item = Option<&'a Tensor>>) -> DType {
    let mut tensors = tensors.into_iter().flatten();
    if tensors.any(|tensor| tensor.dtype() == DType::F64) {
        DType::F64
    } else {
        DType::F32
    }
}

type Named<'a> = (&'static str, Option<&'a Tensor>);

fn check_floats(op: &'static str, tensors: &[Named<'_>]) -> Result<()> {
    for &(field, tensor) in tensors {
        if let Some(tensor) = tensor
            && !matches!(tensor.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64)
        {
            let found = format!("{:?}", tensor.dtype());
            return Err(OpError::value(op, field, found, "f32, f16, bf16 or f64").into());
        }
    }
    Ok(())
}

fn same_device(op: &'static str, tensors: &[Named<'_>]) -> Result<()> {
    let first = tensors[0].1.map(Tensor::device);
    for &(field, tensor) in tensors {
        if let (Some(tensor), Some(first)) = (tensor, first)
            && !tensor.device().same_device(first)
        {
            let found = format!("on {:?}", tensor.device().location());
            let expected = format!("a tensor on {:?} like {}", first.location(), tensors[0].0);
            return Err(OpError::value(op, field, found, expected).into());
        }
    }
    Ok(())
}

pub(crate) fn check(q: &Tensor, k: &Tensor, v: &Tensor, options: &Causal<'_>) -> Result<Dims> {
    let Ok((b, n, h, d)) = q.dims4() else {
        return Err(OpError::shape(NAME, "q", q, "[B, N, H, D]").into());
    };
    let e = v.dims().last().copied().unwrap_or(0);
    if b * n * h * d == 0 {
        return Err(OpError::shape(NAME, "q", q, "[B, N, H, D] with at least one element").into());
    }
    if k.dims() != q.dims() {
        return Err(OpError::shape(NAME, "k", k, format!("{:?} like q", q.dims())).into());
    }
    if v.dims() != [b, n, h, e] || e == 0 {
        return Err(OpError::shape(NAME, "v", v, format!("[{b}, {n}, {h}, E] to go with q")).into());
    }
    let (kind, decay) = (options.decay.kind(), options.decay.tensor());
    let expected = kind.shape(b, n, h, d);
    if let Some(log) = decay
        && log.dims() != expected
    {
        return Err(OpError::shape(NAME, "decay", log, format!("{expected:?}")).into());
    }
    let sequences = sequences::count(NAME, (b, n), options.sequences)?;
    if let Some(state) = options.initial
        && state.dims() != [sequences, h, d, e]
    {
        let expected = format!("[{sequences}, {h}, {d}, {e}]");
        return Err(OpError::shape(NAME, "initial", state, expected).into());
    }
    let named = [
        ("q", Some(q)),
        ("k", Some(k)),
        ("v", Some(v)),
        ("decay", decay),
        ("initial", options.initial),
    ];
    check_floats(NAME, &named)?;
    same_device(NAME, &named)?;
    Ok(Dims { b, n, h, d, e })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    None,
    Head,
    Token,
    Channel,
}

impl Kind {
    fn shape(self, b: usize, n: usize, h: usize, d: usize) -> Vec<usize> {
        match self {
            Self::None => Vec::new(),
            Self::Head => vec![h],
            Self::Token => vec![b, n, h],
            Self::Channel => vec![b, n, h, d],
        }
    }
}

/// All inputs in the type of the computation; decays of heads and the initial state are contiguous.
struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Option<Tensor>,
    initial: Option<Tensor>,
}

impl Operands {
    /// In the order of the arguments of the node.
    fn list(&self) -> Vec<&Tensor> {
        let optional = [&self.decay, &self.initial];
        let all = [&self.q, &self.k, &self.v].into_iter();
        all.chain(optional.into_iter().flatten()).collect()
    }
}

/// One call of the operator.
struct CausalPass {
    plan: Plan,
    kind: Kind,
    exchange: Option<Arc<dyn StateExchange>>,
    packed: bool,
}

impl CausalPass {
    /// Computes output and final state and enters them into the graph.
    fn attach<T: SliceMath>(self, operands: &Operands) -> Result<(Tensor, Tensor)> {
        let Dims { b, n, h, e, .. } = self.plan.dims;
        let Forward { o, finals, entering } = self.forward::<T>(operands)?;
        let state_shape = self.state_shape();
        let d_state = Arc::new(Mutex::new(None));
        let gradient = OutputGradient {
            pass: self,
            entering,
            d_state: d_state.clone(),
        };
        let o = Value::Cpu(T::to_cpu_storage_owned(o), (b, n, h, e).into());
        let o = attach_many(o, &operands.list(), gradient)?;
        let state = Value::Cpu(T::to_cpu_storage_owned(finals), state_shape.into());
        let state = attach1(state, &o, StateGradient { d_state })?;
        Ok((o, state))
    }

    fn state_shape(&self) -> (usize, usize, usize, usize) {
        let Dims { h, d, e, .. } = self.plan.dims;
        (self.plan.sequences(), h, d, e)
    }

    fn forward<T: SliceMath>(&self, operands: &Operands) -> Result<Forward<T>> {
        let list = operands.list();
        let guards = lock(&list);
        let inputs = self.inputs::<T>(&list, &guards)?;
        let totals = chunk::log_totals(&self.plan, inputs.decay);
        let mut states = chunk::local_states(&self.plan, &inputs);
        let initial = match (&operands.initial, guards.last()) {
            (Some(initial), Some(guard)) => Some(contiguous::<T>(initial, guard)?),
            _ => None,
        };
        if let Some(exchange) = &self.exchange {
            // What tokens of a chunk give to each other is computed while the states of other parts are on their way.
            let coming = self.started(&**exchange, &totals, &states, initial, Direction::Forward)?;
            let mut o = chunk::outputs(&self.plan, &inputs, None);
            let entering = joined(coming, initial)?;
            let direction = Direction::Forward;
            let finals = chunk::scan(&self.plan, &totals, &mut states, Some(&entering), direction);
            late::add_outputs(&self.plan, &inputs, &states, &mut o);
            let entering = Some(entering);
            return Ok(Forward { o, finals, entering });
        }
        let entering = initial.map(<[T]>::to_vec);
        let finals = chunk::scan(
            &self.plan,
            &totals,
            &mut states,
            entering.as_deref(),
            Direction::Forward,
        );
        let o = chunk::outputs(&self.plan, &inputs, Some(&states));
        Ok(Forward { o, finals, entering })
    }

    fn inputs<'a, T: SliceMath>(
        &self,
        list: &[&'a Tensor],
        guards: &'a [StorageRef<'a>],
    ) -> Result<Inputs<'a, T>> {
        let decay = match self.kind {
            Kind::None => Decay::None,
            Kind::Head => Decay::Head(contiguous(list[3], &guards[3])?),
            Kind::Token => Decay::Token(View::of(&list[3].unsqueeze(3)?, &guards[3])?),
            Kind::Channel => Decay::Channel(View::of(list[3], &guards[3])?),
        };
        Ok(Inputs {
            q: View::of(list[0], &guards[0])?,
            k: View::of(list[1], &guards[1])?,
            v: View::of(list[2], &guards[2])?,
            decay,
        })
    }

    /// Hands what leaves this part (states, or their adjoints backward) to the others, and starts to wait for what enters it.
    fn started<'a, T: SliceMath>(
        &self,
        exchange: &'a dyn StateExchange,
        totals: &[T],
        locals: &[T],
        own: Option<&[T]>,
        direction: Direction,
    ) -> Result<Coming<'a>> {
        let (sequences, h, d, e) = self.state_shape();
        let leaving = chunk::leaving(&self.plan, totals, locals, own, direction);
        let leaving = Tensor::from_vec(leaving, (sequences, h, d, e), &Device::Cpu)?;
        let log = chunk::sequence_totals(&self.plan, totals);
        let width = log.len() / (sequences * h);
        let log = Tensor::from_vec(log, (sequences, h, width, 1), &Device::Cpu)?;
        start_arriving(exchange, &leaving, &log, direction, self.packed)
    }

    fn backward<T: SliceMath>(
        &self,
        args: &[Tensor],
        entering: Option<&[T]>,
        d_o: &Tensor,
        d_state: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let list: Vec<&Tensor> = args.iter().collect();
        let guards = lock(&list);
        let inputs = self.inputs::<T>(&list, &guards)?;
        let d_o_guard = d_o.storage_and_layout().0;
        let d_o = View::of(d_o, &d_o_guard)?;
        let totals = chunk::log_totals(&self.plan, inputs.decay);
        let adjoints = chunk::local_adjoints(&self.plan, &inputs, d_o);
        let own = d_state
            .map(|d_state| d_state.flatten_all()?.to_vec1::<T>())
            .transpose()?;
        let has_decay = self.kind != Kind::None;
        let want_decay = has_decay && args[3].track_op();
        let (found, d_initial) = self.adjoints(
            &inputs,
            d_o,
            (&totals, entering),
            (adjoints, own.as_deref()),
            want_decay,
        )?;
        let mut all = vec![found.dq, found.dk, found.dv];
        if has_decay {
            all.push(found.dlog);
        }
        if args.len() > all.len() {
            all.push(d_initial);
        }
        all.into_iter()
            .zip(args)
            .map(|(adjoint, arg)| {
                let wanted = arg.track_op();
                wanted
                    .then(|| Tensor::from_vec(adjoint, arg.shape(), arg.device()))
                    .transpose()
            })
            .collect()
    }
}

impl CausalPass {
    /// Adjoints of the inputs and of the states that entered, given what every chunk adds to the adjoint of the state, and the
    /// own adjoint of the final states.
    fn adjoints<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        d_o: View<T>,
        (totals, entering): (&[T], Option<&[T]>),
        (mut adjoints, own): (Vec<T>, Option<&[T]>),
        want_decay: bool,
    ) -> Result<(chunk::Adjoints<T>, Vec<T>)> {
        let plan = &self.plan;
        let coming = match &self.exchange {
            Some(exchange) => Some(self.started(&**exchange, totals, &adjoints, own, Direction::Backward)?),
            None => None,
        };
        let mut states = chunk::local_states(plan, inputs);
        let finals = chunk::scan(plan, totals, &mut states, entering, Direction::Forward);
        // With other parts, first the adjoints without theirs, which are on their way.
        let mut passed = vec![T::zero(); if coming.is_some() { adjoints.len() } else { 0 }];
        let mut d_initial = chunk::scan(plan, totals, &mut adjoints, own, Direction::Backward);
        let mut saved = chunk::Saved {
            states: &states,
            finals: &finals,
            adjoints: &adjoints,
        };
        let fused = want_decay && coming.is_none();
        let mut found = chunk::backward(plan, inputs, d_o, saved, fused);
        if let Some(coming) = coming {
            let others = joined::<T>(coming, None)?;
            let more = chunk::scan(plan, totals, &mut passed, Some(&others), Direction::Backward);
            late::add_adjoints(plan, inputs, &passed, &mut found);
            chunk::add(&mut d_initial, &more);
            if want_decay {
                chunk::add(&mut passed, &adjoints);
                saved.adjoints = &passed;
                found.dlog = late::gates(plan, inputs, saved, &found);
            }
        }
        Ok((found, d_initial))
    }
}

/// What has come from other parts, with the `own`.
fn joined<T: SliceMath>(coming: Coming<'_>, own: Option<&[T]>) -> Result<Vec<T>> {
    let mut entering = coming.wait()?.flatten_all()?.to_dtype(T::DTYPE)?.to_vec1::<T>()?;
    if let Some(own) = own {
        chunk::add(&mut entering, own);
    }
    Ok(entering)
}

fn lock<'a>(list: &[&'a Tensor]) -> Vec<StorageRef<'a>> {
    list.iter().map(|tensor| tensor.storage_and_layout().0).collect()
}

/// Results of the forward pass, and the states that entered, for backward.
struct Forward<T> {
    o: Vec<T>,
    finals: Vec<T>,
    entering: Option<Vec<T>>,
}

/// The adjoint of the final state on its way to the node of the output.
pub(crate) type Passed = Arc<Mutex<Option<Tensor>>>;

/// Backward of the output, and of the final state behind it.
struct OutputGradient<T> {
    pass: CausalPass,
    entering: Option<Vec<T>>,
    d_state: Passed,
}

impl<T: SliceMath> GradientOfMany for OutputGradient<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let d_state = match self.d_state.lock() {
            Ok(mut d_state) => d_state.take(),
            Err(_) => bail!("{NAME}: the adjoint of the state was lost in a panic"),
        };
        self.pass
            .backward::<T>(args, self.entering.as_deref(), grad, d_state.as_ref())
    }
}

/// The final state as a node behind the output: hands its adjoint over and gives the output a zero, so that the node
/// of the output runs.
pub(crate) struct StateGradient {
    pub(crate) d_state: Passed,
}

impl Gradient<1> for StateGradient {
    fn name(&self) -> &'static str {
        "decay::causal-state"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [o]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        match self.d_state.lock() {
            Ok(mut d_state) => *d_state = Some(grad.detach()),
            Err(_) => bail!("{}: an adjoint was lost in a panic", Gradient::<1>::name(self)),
        }
        Ok([Some(o.detach().zeros_like()?)])
    }
}
