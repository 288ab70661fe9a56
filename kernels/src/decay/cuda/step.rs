//! One token of the recurrence on a GPU: a launch of `decay_step` in `cuda/decay_plain.cu`.

use super::sweep::{LogDecayArg, PLAIN};
use crate::cuda_module::{Slice, THREADS, launch, pointer, room};
use crate::decay::LogDecay;
use crate::decay::step::{Fused, NAME};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Result, Tensor};
use half::bf16;

/// [`super::super::step`] for checked inputs on a GPU; `in_place` of a contiguous state of f32.
pub(in crate::decay) fn step(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: LogDecay<'_>,
    state: &Tensor,
    in_place: bool,
) -> Result<(Tensor, Tensor)> {
    let dtype = match [q, k, v].iter().all(|t| t.dtype() == DType::BF16) {
        true => DType::BF16,
        false => DType::F32,
    };
    let mut rows = Vec::with_capacity(3);
    for row in [q, k, v] {
        rows.push(row.detach().to_dtype(dtype)?.contiguous()?);
    }
    let state = state.detach().to_dtype(DType::F32)?.contiguous()?;
    let log = log_decay
        .tensor()
        .map(|log| log.detach().to_dtype(DType::F32)?.contiguous())
        .transpose()?;
    let (b, h, d, e) = state.dims4()?;
    let (o, after) = {
        let locked: Vec<Locked<'_>> = rows.iter().map(|row| Locked::new(NAME, row)).collect();
        let mut starts = [0; 3];
        for (start, row) in starts.iter_mut().zip(&locked) {
            *start = row.start()?;
        }
        let token = Token {
            keys: (h * d) as i64,
            values: (h * e) as i64,
            ..Token::default()
        };
        match dtype {
            DType::BF16 => launched::<bf16>(starts, token, log.as_ref(), &state, in_place)?,
            _ => launched::<f32>(starts, token, log.as_ref(), &state, in_place)?,
        }
    };
    Ok((o.reshape((b, h, e))?.to_dtype(v.dtype())?, after))
}

/// [`super::super::step_fused`] for checked inputs on a GPU, in f32 or bf16; `in_place` of a contiguous state.
pub(in crate::decay) fn step_fused(
    wide: &Tensor,
    fused: Fused,
    log_decay: LogDecay<'_>,
    state: &Tensor,
    in_place: bool,
) -> Result<(Tensor, Tensor)> {
    let wide = wide.detach().contiguous()?;
    let state = state.detach().contiguous()?;
    let log = log_decay.tensor().map(|log| log.detach().contiguous());
    let log = log.transpose()?;
    let [keys, _] = fused.widths();
    let locked = Locked::new(NAME, &wide);
    let (start, stride) = (locked.start()?, wide.dim(1)? as i64);
    let bytes = wide.dtype().size_in_bytes() as u64;
    let starts = [0, 1, 2].map(|part| start + part * keys as u64 * bytes);
    let token = Token {
        keys: stride,
        values: stride,
        silu: fused
            .silu
            .iter()
            .rev()
            .fold(0, |bits, &silu| 2 * bits + i32::from(silu)),
        unused: 0,
    };
    match wide.dtype() {
        DType::BF16 => launched::<bf16>(starts, token, log.as_ref(), &state, in_place),
        _ => launched::<f32>(starts, token, log.as_ref(), &state, in_place),
    }
}

/// `Token` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Token {
    keys: i64,
    values: i64,
    silu: i32,
    unused: i32,
}

// SAFETY: plain numbers in the layout of C, as the kernel declares them.
unsafe impl DeviceRepr for Token {}

/// The output `[B, H E]` and the state after rows of type `T` that begin at `starts`.
fn launched<T: CudaReal>(
    [q, k, v]: [u64; 3],
    token: Token,
    log: Option<&Tensor>,
    before: &Tensor,
    in_place: bool,
) -> Result<(Tensor, Tensor)> {
    let device = before.device().as_cuda_device()?;
    let (b, h, d, e) = before.dims4()?;
    let after: Option<Slice<f32>> = match in_place {
        true => None,
        false => Some(room(device, b * h * d * e)?),
    };
    let o: Slice<T> = room(device, b * h * e)?;
    {
        let state = Locked::new(NAME, before);
        // A thread reads each element before it writes it, and nobody else does either.
        let written = match &after {
            Some(after) => pointer(device, Some(&after.as_view())),
            None => state.address()?.0,
        };
        let log = decays(log, h, d)?;
        let vector = if e % 4 == 0 && state.address()?.1 { 4 } else { 1 };
        let config = LaunchConfig {
            grid_dim: ((b * h) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, PLAIN, format!("decay_step_{}_{vector}", T::SUFFIX), config;
            q, k, v, token, log, state.view::<f32>()?,
            written, o.as_view(), h as i32, d as i32, e as i32);
    }
    let after = match after {
        Some(after) => gpu::tensor(after, device, &(b, h, d, e).into()),
        None => before.clone(),
    };
    Ok((gpu::tensor(o, device, &(b, h * e).into()), after))
}

/// Contiguous log-decays `[H]`, `[B, H]` or `[B, H, D]`.
fn decays(log: Option<&Tensor>, h: usize, d: usize) -> Result<LogDecayArg> {
    let Some(log) = log else {
        return Ok(LogDecayArg::default());
    };
    let (batch, head, channel) = match log.rank() {
        1 => (0, 1, 0),
        2 => (h, 1, 0),
        _ => (h * d, d, 1),
    };
    Ok(LogDecayArg {
        data: Locked::new(NAME, log).start()?,
        batch: batch as i64,
        token: 0,
        head: head as i64,
        channel,
    })
}
