//! Running logarithms of sums of exponentials along tokens, the gates of the causal additive recurrence of LightNet (arXiv
//! 2405.21022).
//!
//! ```text
//!   z_t = log(exp(z_{t-1}) + exp(g_t)),     z_{-1} = `before`, or no weight at all
//!   y_t = dz_t + exp(z_t - z_{t+1}) y_{t+1};   dg_t = exp(g_t - z_t) y_t;   dbefore = exp(before - z_0) y_0
//! ```
//!
//! All exponents are at most zero. Where nothing has had weight yet, z is [`NOTHING`], a finite number far below all others:
//! differences of gates are then never infinity minus infinity.
//!
//! | form | file | runs |
//! |---|---|---|
//! | scan | `cpu.rs` | CPU, multi-threaded over channels, `f32` and `f64` |
//! | slices | `cuda.rs`, `cuda/decay_additive.cu` | GPU, `f32`, and from logits in `bf16` |

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod tests;

use crate::autograd::{GradientOfMany, attach_many};
use crate::error::OpError;
use candle_core::{DType, Result, Tensor};

const NAME: &str = "log_sum";

/// Stands for the logarithm of zero.
pub const NOTHING: f64 = -1e30;

/// Sums from the first token to each, of logits `[B, N, H, D]` of any strides, in f32 or, if the logits are, in f64.
///
/// `before` is what the sums start from, `[S, H, D]`; `borders` are those of packed sequences in a batch of one, as
/// [`crate::decay::Causal::sequences`]. Differentiable in the logits and in `before`.
///
/// # Errors
/// Shapes that do not fit, element types that are not floats; on a GPU f64, and an odd number of channels of all heads.
pub fn log_sum(logits: &Tensor, before: Option<&Tensor>, borders: Option<&[usize]>) -> Result<Tensor> {
    let Ok((b, n, h, d)) = logits.dims4() else {
        return Err(OpError::shape(NAME, "logits", logits, "[B, N, H, D]").into());
    };
    if logits.elem_count() == 0 {
        return Err(OpError::shape(NAME, "logits", logits, "at least one element").into());
    }
    let ends = borders.map_or_else(|| vec![n], |borders| borders[1..].to_vec());
    let sequences = b * ends.len();
    if let Some(before) = before
        && before.dims() != [sequences, h, d]
    {
        let expected = format!("[{sequences}, {h}, {d}]");
        return Err(OpError::shape(NAME, "before", before, expected).into());
    }
    let dtype = match logits.dtype() {
        DType::F64 => DType::F64,
        DType::F32 | DType::F16 | DType::BF16 => DType::F32,
        found => {
            let expected = "f32, f16, bf16 or f64";
            return Err(OpError::value(NAME, "logits", format!("{found:?}"), expected).into());
        }
    };
    let logits = logits.to_dtype(dtype)?.contiguous()?;
    let before = before
        .map(|before| before.to_dtype(dtype)?.contiguous())
        .transpose()?;
    let scan = Scan {
        batch: b,
        ends,
        tokens: n,
        heads: h,
        width: d,
    };
    let z = scan.run(&logits.detach(), before.as_ref().map(Tensor::detach).as_ref())?;
    let mut args = vec![&logits];
    args.extend(before.as_ref());
    attach_many(crate::autograd::Value::Tensor(z), &args, scan)
}

/// Sizes of a call.
#[derive(Debug)]
pub(crate) struct Scan {
    pub(crate) batch: usize,
    /// Ends of the sequences of a batch.
    pub(crate) ends: Vec<usize>,
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) width: usize,
}

impl Scan {
    fn columns(&self) -> usize {
        self.heads * self.width
    }

    /// Batch, first and last token of each sequence.
    fn sequences(&self) -> Vec<(usize, usize, usize)> {
        let starts = || std::iter::once(0).chain(self.ends.iter().copied());
        (0..self.batch)
            .flat_map(|batch| {
                starts()
                    .zip(&self.ends)
                    .map(move |(start, &end)| (batch, start, end))
            })
            .collect()
    }

    fn run(&self, logits: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if logits.device().is_cuda() {
            return cuda::gates(self, logits, before);
        }
        match logits.dtype() {
            DType::F64 => cpu::gates::<f64>(self, logits, before),
            _ => cpu::gates::<f32>(self, logits, before),
        }
    }

    /// The sums of the backward pass.
    fn pull(&self, terms: &Tensor, z: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if terms.device().is_cuda() {
            return cuda::pull(self, cuda::Terms::Dense(terms), z, None);
        }
        match terms.dtype() {
            DType::F64 => cpu::pull::<f64>(self, terms, z),
            _ => cpu::pull::<f32>(self, terms, z),
        }
    }

    /// Rows of the first tokens of all sequences, `[S, H, D]`; of empty ones whatever lies there.
    pub(crate) fn first_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.rows_at(x, |start, _| start.min(self.tokens - 1))
    }

    /// Rows of the last tokens of all sequences.
    #[cfg(feature = "cuda")]
    pub(crate) fn last_rows(&self, x: &Tensor) -> Result<Tensor> {
        self.rows_at(x, |start, end| end.max(start + 1).min(self.tokens) - 1)
    }

    /// Of `[S, ..]`: `rows` of sequences with tokens, `others` of empty ones.
    pub(crate) fn unless_empty(&self, rows: &Tensor, others: &Tensor) -> Result<Tensor> {
        let full: Vec<u8> = self
            .sequences()
            .iter()
            .map(|&(_, start, end)| u8::from(end > start))
            .collect();
        if !full.contains(&0) {
            return Ok(rows.clone());
        }
        let mut shape = vec![1; rows.rank()];
        shape[0] = full.len();
        let full = Tensor::from_vec(full, shape, rows.device())?;
        full.broadcast_as(rows.shape())?
            .contiguous()?
            .where_cond(rows, others)
    }

    fn rows_at(&self, x: &Tensor, token: impl Fn(usize, usize) -> usize) -> Result<Tensor> {
        let rows: Vec<u32> = self
            .sequences()
            .iter()
            .map(|&(batch, start, end)| (batch * self.tokens + token(start, end)) as u32)
            .collect();
        let count = rows.len();
        let rows = Tensor::from_vec(rows, count, x.device())?;
        x.reshape((self.batch * self.tokens, self.columns()))?
            .index_select(&rows, 0)?
            .reshape((count, self.heads, self.width))
    }
}

impl GradientOfMany for Scan {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, args: &[Tensor], z: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (logits, z) = (args[0].detach(), z.detach());
        let y = self.pull(&grad.detach().contiguous()?, &z)?;
        let mut adjoints = vec![Some(((&logits - &z)?.exp()? * &y)?)];
        if let Some(before) = args.get(1) {
            let weight = (before.detach() - self.first_rows(&z)?)?.exp()?;
            let adjoint = (weight * self.first_rows(&y)?)?;
            adjoints.push(Some(self.unless_empty(&adjoint, &adjoint.zeros_like()?)?));
        }
        Ok(adjoints)
    }
}
