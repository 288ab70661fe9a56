//! The element-wise scan of linear-complexity sequence models: expand, oscillate, shrink (EOS, arXiv 2405.17383, type 1).
//!
//! ```text
//!   m_t = o_t (*) m_{t-1} + e_t i_t^T,     y_t = m_t^T s_t
//!   dm_t = s_t dy_t^T + o_{t+1} (*) dm_{t+1}
//!   ds_t = m_t dy_t;   de_t = dm_t i_t;   di_t = dm_t^T e_t;   dlog o_t = dm_t (*) o_t (*) m_{t-1}
//! ```
//!
//! The oscillation is a gate for every element of the memory, K x D, given by its logarithm; axes along which all gates are
//! alike have length 1. Where they are alike along D, [`crate::decay::causal`] does the same with matrix products, many
//! times faster; where they are alike along K, it does with expand and shrink taking the places of one channel each.
//!
//! | form | file | runs |
//! |---|---|---|
//! | reference | `tests.rs` | literal loops in `f64`, for tests |
//! | scan | `cpu.rs` | CPU, multi-threaded over heads and columns of the memory, `f32` and `f64` |
//! | scan | `cuda.rs`, `cuda/eos.cu` | GPU, `f32` and `bf16`, memories of up to 256 rows, in `f32` |
//!
//! Kept for the backward pass: the inputs. Memories are computed again, from one for every 32 tokens on the CPU and for every
//! 16 on a GPU, which keeps those of full gates from the forward pass on, a sixteenth of the gates' size.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;

use crate::autograd::{GradientOfMany, Value, attach_many, attach1};
use crate::decay::{Passed, StateGradient};
use crate::error::OpError;
use crate::exchange::{Direction, StateExchange, arriving};
use crate::sequences;
use crate::slice_math::SliceMath;
use crate::strided::elements;
use candle_core::{DType, Device, Result, Tensor, bail};
use cpu::{Inputs, Lines};
use std::sync::{Arc, Mutex};

const NAME: &str = "eos::scan";

/// What [`scan`] takes besides its operands.
#[derive(Clone, Debug, Default)]
pub struct Options<'a> {
    /// Memory before the first token, `[B, H, K, D]`; zeros if absent. Differentiable.
    pub initial: Option<&'a Tensor>,
    /// Joins the parts of a sequence, as [`crate::decay::Causal::exchange`].
    pub exchange: Option<Arc<dyn StateExchange>>,
    /// Borders of packed sequences in a batch of one, as [`crate::decay::Causal::sequences`]; memories are then
    /// `[S, H, K, D]`.
    pub sequences: Option<&'a [usize]>,
}

/// The scan: `expand`, `shrink` `[B, N, H, K]`, `input` `[B, N, H, D]` and the logarithms of gates `log_oscillation`
/// `[B, N, H, K, D]`, at most zero, each axis of which may be 1, to the output `[B, N, H, D]` in the type of `input` and the
/// final memory `[B, H, K, D]`.
///
/// Inputs are f32, f16, bf16 or f64 on the CPU; work is in f32, or in f64 if any input is. On a GPU they are f32 or bf16, work
/// is in f32, and gates are read where they lie, whatever their strides. Differentiable in all of them, through the output and
/// through the final memory.
///
/// # Errors
/// Shapes that do not fit, element types that are not floats or not for the device, tensors on different devices, more than 256
/// channels K on a GPU, and an exchange that fails.
pub fn scan(
    expand: &Tensor,
    input: &Tensor,
    log_oscillation: &Tensor,
    shrink: &Tensor,
    options: &Options<'_>,
) -> Result<(Tensor, Tensor)> {
    let dims = check(expand, input, log_oscillation, shrink, options)?;
    #[cfg(feature = "cuda")]
    if expand.device().is_cuda() {
        let (y, state) = cuda::scan([expand, input, shrink], log_oscillation, options, dims)?;
        return Ok((y.to_dtype(input.dtype())?, state));
    }
    let all = [
        Some(expand),
        Some(input),
        Some(log_oscillation),
        Some(shrink),
        options.initial,
    ];
    let wide = all.iter().flatten().any(|tensor| tensor.dtype() == DType::F64);
    let dtype = if wide { DType::F64 } else { DType::F32 };
    let dense = |tensor: &Tensor| tensor.to_dtype(dtype)?.contiguous();
    let mut args = vec![
        dense(expand)?,
        dense(input)?,
        dense(shrink)?,
        dense(log_oscillation)?,
    ];
    if let Some(initial) = options.initial {
        args.push(dense(initial)?);
    }
    let pass = Scan {
        lines: Lines::new(dims, options.sequences),
        exchange: options.exchange.clone().filter(|exchange| exchange.parts() > 1),
        packed: options.sequences.is_some(),
    };
    let (y, state) = if wide {
        pass.attach::<f64>(&args)?
    } else {
        pass.attach::<f32>(&args)?
    };
    Ok((y.to_dtype(input.dtype())?, state))
}

/// One token: `expand`, `shrink` `[B, H, K]`, `input` `[B, H, D]`, logarithms of gates that broadcast to `[B, H, K, D]`, and
/// the memory before it, to the output `[B, H, D]` in the type of `input` and the memory after it in its own. Not differentiable.
///
/// # Errors
/// Shapes that do not fit, and on a GPU what [`scan`] refuses.
pub fn step(
    expand: &Tensor,
    input: &Tensor,
    log_oscillation: &Tensor,
    shrink: &Tensor,
    memory: &Tensor,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if memory.device().is_cuda() {
        return cuda::step([expand, input, shrink], log_oscillation, memory);
    }
    let wide = |tensor: &Tensor| tensor.detach().to_dtype(memory.dtype())?.contiguous();
    let kept = memory.detach().broadcast_mul(&wide(log_oscillation)?.exp()?)?;
    let added = wide(expand)?.unsqueeze(3)?.matmul(&wide(input)?.unsqueeze(2)?)?;
    let memory = (kept + added)?;
    let y = wide(shrink)?.unsqueeze(2)?.matmul(&memory)?.squeeze(2)?;
    Ok((y.to_dtype(input.dtype())?, memory))
}

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
struct Dims {
    b: usize,
    n: usize,
    h: usize,
    k: usize,
    d: usize,
}

fn check(
    expand: &Tensor,
    input: &Tensor,
    log_oscillation: &Tensor,
    shrink: &Tensor,
    options: &Options<'_>,
) -> Result<Dims> {
    let (Ok((b, n, h, k)), Some(&d)) = (expand.dims4(), input.dims().last()) else {
        return Err(OpError::shape(NAME, "expand", expand, "[B, N, H, K]").into());
    };
    if b * n * h * k * d == 0 {
        return Err(OpError::shape(NAME, "expand", expand, "at least one element").into());
    }
    if input.dims() != [b, n, h, d] {
        return Err(OpError::shape(NAME, "input", input, format!("[{b}, {n}, {h}, D]")).into());
    }
    if shrink.dims() != expand.dims() {
        let expected = format!("{:?} like expand", expand.dims());
        return Err(OpError::shape(NAME, "shrink", shrink, expected).into());
    }
    let whole = [b, n, h, k, d];
    let gates = log_oscillation.dims();
    if gates.len() != 5
        || gates
            .iter()
            .zip(&whole)
            .any(|(&gate, &whole)| gate != 1 && gate != whole)
    {
        let expected = format!("{whole:?}, or 1 along some axes");
        return Err(OpError::shape(NAME, "log_oscillation", log_oscillation, expected).into());
    }
    let sequences = sequences::count(NAME, (b, n), options.sequences)?;
    if let Some(initial) = options.initial
        && initial.dims() != [sequences, h, k, d]
    {
        let expected = format!("[{sequences}, {h}, {k}, {d}]");
        return Err(OpError::shape(NAME, "initial", initial, expected).into());
    }
    let named = [
        ("expand", Some(expand)),
        ("input", Some(input)),
        ("log_oscillation", Some(log_oscillation)),
        ("shrink", Some(shrink)),
        ("initial", options.initial),
    ];
    for (field, tensor) in named {
        let Some(tensor) = tensor else { continue };
        let (fits, expected) = if tensor.device().is_cuda() {
            let fits = matches!(tensor.dtype(), DType::BF16 | DType::F32);
            (fits, "f32 or bf16 on a GPU")
        } else {
            let floats = [DType::F16, DType::BF16, DType::F32, DType::F64];
            (floats.contains(&tensor.dtype()), "f32, f16, bf16 or f64")
        };
        if !fits {
            let found = format!("{:?}", tensor.dtype());
            return Err(OpError::value(NAME, field, found, expected).into());
        }
        if !(tensor.device().is_cpu() || cfg!(feature = "cuda") && tensor.device().is_cuda()) {
            let found = format!("on {:?}", tensor.device().location());
            let expected = "a tensor on the CPU, or on a GPU with the feature `cuda`";
            return Err(OpError::value(NAME, field, found, expected).into());
        }
        if !tensor.device().same_device(expand.device()) {
            let found = format!("on {:?}", tensor.device().location());
            let expected = format!("a tensor on {:?} like expand", expand.device().location());
            return Err(OpError::value(NAME, field, found, expected).into());
        }
    }
    Ok(Dims { b, n, h, k, d })
}

/// One call. Arguments of the node: expand, input, shrink, log-gates and perhaps the initial memory.
struct Scan {
    lines: Lines,
    exchange: Option<Arc<dyn StateExchange>>,
    packed: bool,
}

impl Scan {
    fn attach<T: SliceMath>(self, args: &[Tensor]) -> Result<(Tensor, Tensor)> {
        let Dims { b, n, h, k, d } = self.lines.dims;
        let sequences = self.lines.sequences();
        let (y, last, entering) = {
            let inputs = Inputs::<T>::new(args)?;
            let own = args.get(4).map(elements::<T>).transpose()?;
            let entering = self.entering(&inputs, own, Direction::Forward, &[])?;
            let (y, last) = self.lines.forward(&inputs, entering.as_deref(), true);
            (y, last, entering)
        };
        let y = Value::Cpu(T::to_cpu_storage_owned(y), (b, n, h, d).into());
        let state = Value::Cpu(T::to_cpu_storage_owned(last), (sequences, h, k, d).into());
        let d_state: Passed = Arc::new(Mutex::new(None));
        let gradient = ScanGradient::<T> {
            scan: self,
            entering,
            d_state: d_state.clone(),
        };
        let y = attach_many(y, &args.iter().collect::<Vec<_>>(), gradient)?;
        let state = attach1(state, &y, StateGradient { d_state })?;
        Ok((y, state))
    }

    /// Memories that enter this part, or, backward, adjoints that arrive at its end: its own and those of other parts.
    fn entering<T: SliceMath>(
        &self,
        inputs: &Inputs<T>,
        own: Option<Vec<T>>,
        direction: Direction,
        d_y: &[T],
    ) -> Result<Option<Vec<T>>> {
        let Some(exchange) = &self.exchange else {
            return Ok(own);
        };
        let Dims { h, k, d, .. } = self.lines.dims;
        let sequences = self.lines.sequences();
        let leaving = match direction {
            Direction::Forward => self.lines.forward(inputs, own.as_deref(), false).1,
            Direction::Backward => self.lines.leaving_adjoints(inputs, d_y, own.as_deref()),
        };
        let tensor = |values| Tensor::from_vec(values, (sequences, h, k, d), &Device::Cpu);
        let (leaving, log) = (tensor(leaving)?, tensor(self.lines.log_totals(inputs))?);
        let others = arriving(exchange, &leaving, &log, direction, self.packed)?;
        let mut entering = others.flatten_all()?.to_dtype(T::DTYPE)?.to_vec1::<T>()?;
        for (entering, own) in entering.iter_mut().zip(own.iter().flatten()) {
            *entering += *own;
        }
        Ok(Some(entering))
    }
}

struct ScanGradient<T> {
    scan: Scan,
    entering: Option<Vec<T>>,
    d_state: Passed,
}

impl<T: SliceMath> GradientOfMany for ScanGradient<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let d_state = match self.d_state.lock() {
            Ok(mut d_state) => d_state.take(),
            Err(_) => bail!("{NAME}: the adjoint of the memory was lost in a panic"),
        };
        let inputs = Inputs::<T>::new(args)?;
        let d_y = elements::<T>(&grad.contiguous()?)?;
        let own = d_state
            .map(|d_state| elements::<T>(&d_state.contiguous()?))
            .transpose()?;
        let arriving = self.scan.entering(&inputs, own, Direction::Backward, &d_y)?;
        let found = self
            .scan
            .lines
            .backward(&inputs, self.entering.as_deref(), &d_y, arriving.as_deref());
        let mut all = vec![found.d_expand, found.d_input, found.d_shrink, found.d_log];
        if args.len() > all.len() {
            all.push(found.d_initial);
        }
        all.into_iter()
            .zip(args)
            .map(|(adjoint, arg)| {
                arg.track_op()
                    .then(|| Tensor::from_vec(adjoint, arg.shape(), arg.device()))
                    .transpose()
            })
            .collect()
    }
}
