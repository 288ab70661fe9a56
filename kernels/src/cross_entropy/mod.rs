//! The loss of a language model's head, in chunks of rows: logits of all tokens never exist together.
//!
//! ```text
//! l = W x     z = log(sum_j exp(l_j))     t: the target     e: label smoothing     c: weight of the z-loss
//! loss = z - (1 - e) l_t - e mean_j(l_j) + c z^2          0 where the target is the ignored id
//! dl_j = exp(l_j - z) (1 + 2 c z) - (1 - e) [j = t] - e / V
//! dx = sum_j dl_j W_j     dW_j = sum over tokens of dl_j x
//! ```
//!
//! The forward pass of a chunk computes logits, losses, and, where a gradient may be wanted, dl in place of the logits and
//! from it dx and the chunk's part of dW. The backward pass only scales both, by the adjoint of the loss and what a token
//! weighs in it: unscaled, dl keeps the precision of its type.
//!
//! Beside `dx` [M, D] (type of `x`) and `dW` [V, D] (f32, f64 with `x`; of bf16 weights a bf16 copy in the backward pass),
//! there are only the logits of a chunk, 64 MiB unless [`Options::chunk`] says otherwise, and on the CPU as much again for
//! parts of dx; on a GPU a bf16 copy of f32 weights while the forward pass runs. Larger chunks read and write dW less
//! often: 8 V D bytes a chunk.
//!
//! | form | file | runs |
//! |---|---|---|
//! | tiles of the vocabulary | `cpu.rs` | CPU, multi-threaded, f32 and f64 |
//! | cuBLAS and one block a row | `cuda.rs`, `cuda/cross_entropy.cu` | GPU, f32 and bf16; sums in f32, logits and dl in the type of `x` |

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod tests;
mod watch;

use crate::autograd::{Gradient, Value, attach2};
use crate::error::OpError;
use crate::tape::{Needs, Set};
use candle_core::{CpuStorage, DType, Error, InplaceOp3, Layout, Result, Tensor};
use std::sync::Mutex;

pub use watch::TargetWatch;

const OP: &str = "cross_entropy";

/// Bytes of the logits of a chunk by default.
const CHUNK_BYTES: usize = 64 << 20;
/// Default chunks of more rows than this are multiples of it.
const CHUNK_ROWS: usize = 128;

/// How the losses of the tokens that count become one number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reduction {
    /// Their mean; 0 if no token counts.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// What the loss is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Tokens whose target is this id, in the vocabulary or not, do not count: loss 0, gradient 0. If none counts, so are
    /// the loss and all gradients.
    pub ignore: Option<u32>,
    /// Share of the target's probability that is spread over the whole vocabulary, in [0, 1).
    pub label_smoothing: f64,
    /// Weight of the squared logarithm of the softmax's denominator.
    pub z_loss: f64,
    /// Rows whose logits exist at a time; by default as many as take 64 MiB. It does not change the result, but for
    /// rounding.
    pub chunk: Option<usize>,
    /// How losses become one number.
    pub reduction: Reduction,
    /// Where a GPU notes down the first target that is out of range.
    pub watch: Option<&'a TargetWatch>,
}

/// The loss of logits `x W^T` for `x` [M, D], `weight` [V, D] and `targets` [M] of type u32: a scalar.
///
/// `x` is f32 or f64 on the CPU and f32 or bf16 on CUDA; the weights, perhaps those of an embedding, are f32 masters or of
/// the type of `x`. The loss is f32, or f64 with `x`. Differentiable in `x` and `weight`, once: the backward pass hands out
/// the memory of the gradients. Where neither is tracked, only the loss is computed.
///
/// Targets may lie on the CPU or with `x`. On the CPU they are checked before anything runs. Those on a GPU are checked
/// by the kernel, and nothing waits for it: a target out of range makes the loss and the gradients NaN, and
/// [`TargetWatch::check`] tells which one it was.
///
/// # Errors
/// If a shape, an element type, a device or an option does not fit; if a target on the CPU is out of range.
pub fn head(x: &Tensor, weight: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let wanted = Wanted {
        dx: x.track_op(),
        dweight: weight.track_op(),
    };
    let head = Head::new(&x, &weight, targets, options, wanted)?;
    let made = head.run()?;
    let (loss, share) = head.reduce(&made.losses, options.reduction)?;
    let gradient = HeadGradient {
        adjoints: Mutex::new(Some([made.dx, made.dweight])),
        share,
    };
    attach2(Value::Tensor(loss), [&x, &weight], gradient)
}

/// The loss of every token: [M], f32 or f64 with `x`; without a gradient. Arguments and errors as those of [`head`].
///
/// # Errors
/// As [`head`].
pub fn head_losses(x: &Tensor, weight: &Tensor, targets: &Tensor, options: &Options) -> Result<Tensor> {
    let (x, weight) = (x.detach().contiguous()?, weight.detach().contiguous()?);
    let wanted = Wanted {
        dx: false,
        dweight: false,
    };
    Ok(Head::new(&x, &weight, targets, options, wanted)?.run()?.losses)
}

/// Which gradients are due.
#[derive(Clone, Copy)]
struct Wanted {
    dx: bool,
    dweight: bool,
}

impl Wanted {
    fn any(self) -> bool {
        self.dx || self.dweight
    }
}

/// A checked call.
struct Head<'a> {
    /// [M, D], contiguous.
    x: Tensor,
    /// [V, D], contiguous, in the type of `x`.
    weight: Tensor,
    /// [M], contiguous, on the device of `x`.
    targets: Tensor,
    /// Rows of a chunk.
    chunk: usize,
    wanted: Wanted,
    options: Options<'a>,
}

/// Losses [M] and gradients of their sum.
struct Made {
    losses: Tensor,
    /// [M, D] in the type of `x`.
    dx: Option<Tensor>,
    /// [V, D] in f32, or f64 with `x`.
    dweight: Option<Tensor>,
}

impl<'a> Head<'a> {
    fn new(
        x: &Tensor,
        weight: &Tensor,
        targets: &Tensor,
        options: &Options<'a>,
        wanted: Wanted,
    ) -> Result<Self> {
        let &[rows, width] = x.dims() else {
            return Err(OpError::shape(OP, "x", x, "[M, D]").into());
        };
        if x.elem_count() == 0 {
            return Err(OpError::shape(OP, "x", x, "at least one element").into());
        }
        let vocabulary = match *weight.dims() {
            [vocabulary, inner] if inner == width && vocabulary > 0 => vocabulary,
            _ => return Err(OpError::shape(OP, "weight", weight, format!("[V, {width}]")).into()),
        };
        if targets.dims() != [rows] {
            return Err(OpError::shape(OP, "targets", targets, format!("[{rows}]")).into());
        }
        check_types(x, weight, targets)?;
        check_options(options, vocabulary, x)?;
        // Numbers of rows and of columns are 32-bit in kernels and in cuBLAS.
        for (field, size) in [("number of rows", rows), ("vocabulary", vocabulary)] {
            if i32::try_from(size.next_multiple_of(CHUNK_ROWS)).is_err() {
                return Err(OpError::value(OP, field, size, "less than 2^31").into());
            }
        }
        if targets.device().is_cpu() {
            check_targets(targets, vocabulary, options.ignore)?;
        }
        let chunk = options.chunk.unwrap_or_else(|| {
            let rows = CHUNK_BYTES / (vocabulary * x.dtype().size_in_bytes());
            if rows > CHUNK_ROWS {
                rows - rows % CHUNK_ROWS
            } else {
                rows.max(1)
            }
        });
        Ok(Self {
            x: x.detach(),
            weight: weight.detach().to_dtype(x.dtype())?,
            targets: targets.to_device(x.device())?.contiguous()?,
            chunk: chunk.min(rows),
            wanted,
            options: *options,
        })
    }

    /// M, V and D.
    fn sizes(&self) -> Result<[usize; 3]> {
        let ((rows, width), vocabulary) = (self.x.dims2()?, self.weight.dim(0)?);
        Ok([rows, vocabulary, width])
    }

    fn run(&self) -> Result<Made> {
        #[cfg(feature = "cuda")]
        if self.x.device().is_cuda() {
            return match self.x.dtype() {
                DType::BF16 => cuda::run::<half::bf16>(self),
                _ => cuda::run::<f32>(self),
            };
        }
        match self.x.dtype() {
            DType::F64 => cpu::run::<f64>(self),
            _ => cpu::run::<f32>(self),
        }
    }

    /// The loss, and what a token that counts weighs in it: scalars.
    fn reduce(&self, losses: &Tensor, reduction: Reduction) -> Result<(Tensor, Tensor)> {
        #[cfg(feature = "cuda")]
        if losses.device().is_cuda() {
            return cuda::reduce(losses, &self.targets, self.options.ignore, reduction);
        }
        cpu::reduce(losses, &self.targets, self.options.ignore, reduction)
    }
}

fn check_types(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<()> {
    let (device, supported): (_, &[DType]) = if x.device().is_cuda() {
        ("CUDA", &[DType::F32, DType::BF16])
    } else {
        ("the CPU", &[DType::F32, DType::F64])
    };
    let wrong = |field, tensor: &Tensor, supported| OpError::DType {
        op: OP,
        field,
        found: tensor.dtype(),
        device,
        supported,
    };
    if !supported.contains(&x.dtype()) {
        let names = if x.device().is_cuda() {
            "f32, bf16"
        } else {
            "f32, f64"
        };
        return Err(wrong("x", x, names).into());
    }
    if weight.dtype() != DType::F32 && weight.dtype() != x.dtype() {
        return Err(wrong("weight", weight, "f32 and the type of x").into());
    }
    if targets.dtype() != DType::U32 {
        return Err(wrong("targets", targets, "u32").into());
    }
    let together = weight.device().same_device(x.device())
        && (targets.device().is_cpu() || targets.device().same_device(x.device()));
    if !together || !(x.device().is_cpu() || x.device().is_cuda()) {
        return Err(Error::Msg(format!(
            "{OP}: operands lie on different or unsupported devices"
        )));
    }
    Ok(())
}

fn check_options(options: &Options, vocabulary: usize, x: &Tensor) -> Result<()> {
    let Options {
        label_smoothing,
        z_loss,
        chunk,
        watch,
        ..
    } = *options;
    if !(0.0..1.0).contains(&label_smoothing) {
        return Err(OpError::value(OP, "label_smoothing", label_smoothing, "0 up to but not 1").into());
    }
    if !(z_loss.is_finite() && z_loss >= 0.0) {
        return Err(OpError::value(OP, "z_loss", z_loss, "a number of at least 0").into());
    }
    if chunk == Some(0) {
        return Err(OpError::value(OP, "chunk", 0, "at least 1").into());
    }
    match watch {
        Some(watch) => watch.fits(vocabulary, x.device()),
        None => Ok(()),
    }
}

/// Looks at targets on the CPU.
fn check_targets(targets: &Tensor, vocabulary: usize, ignore: Option<u32>) -> Result<()> {
    let ids = targets.to_vec1::<u32>()?;
    let wrong = |id: u32| id as usize >= vocabulary && Some(id) != ignore;
    match ids.iter().position(|&id| wrong(id)) {
        Some(position) => Err(out_of_range(position, ids[position], vocabulary)),
        None => Ok(()),
    }
}

fn out_of_range(position: usize, id: u32, vocabulary: usize) -> Error {
    // Not `bail!`, which appends a backtrace to the message where backtraces are on.
    Error::Msg(format!(
        "{OP}: targets[{position}] is {id}, expected less than {vocabulary}"
    ))
}

struct HeadGradient {
    /// Gradients of the sum of all losses, until they are handed out.
    adjoints: Mutex<Option<[Option<Tensor>; 2]>>,
    /// What a token weighs in the loss, a scalar.
    share: Tensor,
}

impl Gradient<2> for HeadGradient {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn holds(&self) -> Vec<Tensor> {
        match self.adjoints.lock() {
            Ok(adjoints) => adjoints.iter().flatten().flatten().cloned().collect(),
            Err(_) => Vec::new(),
        }
    }

    fn backward(&self, [_, weight]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let taken = match self.adjoints.lock() {
            Ok(mut adjoints) => adjoints.take(),
            Err(_) => None,
        };
        let Some([dx, dweight]) = taken else {
            return Err(Error::Msg(format!(
                "{OP}: gradients were handed out by an earlier backward pass"
            )));
        };
        let grad = grad.contiguous()?;
        for adjoint in [&dx, &dweight].into_iter().flatten() {
            adjoint.inplace_op3(&grad, &self.share, &Scale)?;
        }
        Ok([dx, dweight.map(|dw| dw.to_dtype(weight.dtype())).transpose()?])
    }
}

/// Multiplies all elements by two scalars, in place.
struct Scale;

impl InplaceOp3 for Scale {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        values: &mut CpuStorage,
        layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
        share: &CpuStorage,
        share_layout: &Layout,
    ) -> Result<()> {
        cpu::scale((values, layout), (grad, grad_layout), (share, share_layout))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        values: &mut candle_core::CudaStorage,
        layout: &Layout,
        grad: &candle_core::CudaStorage,
        grad_layout: &Layout,
        share: &candle_core::CudaStorage,
        share_layout: &Layout,
    ) -> Result<()> {
        cuda::scale((values, layout), (grad, grad_layout), (share, share_layout))
    }
}
