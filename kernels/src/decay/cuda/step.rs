//! One token of the recurrence on a GPU: a launch of `decay_step` in `cuda/decay_plain.cu`.

use super::sweep::{LogDecayArg, PLAIN};
use crate::cuda_module::{Slice, THREADS, launch, room};
use crate::decay::{LogDecay, step::NAME};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{DType, Result, Tensor};
use half::bf16;

/// [`super::super::step`] for checked inputs on a GPU.
pub(in crate::decay) fn step(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: LogDecay<'_>,
    state: &Tensor,
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
    let (o, after) = match dtype {
        DType::BF16 => typed::<bf16>(&rows, log.as_ref(), &state)?,
        _ => typed::<f32>(&rows, log.as_ref(), &state)?,
    };
    Ok((o.to_dtype(v.dtype())?, after))
}

fn typed<T: CudaReal>(rows: &[Tensor], log: Option<&Tensor>, state: &Tensor) -> Result<(Tensor, Tensor)> {
    let device = state.device().as_cuda_device()?;
    let (b, h, d, e) = state.dims4()?;
    let after: Slice<f32> = room(device, b * h * d * e)?;
    let o: Slice<T> = room(device, b * h * e)?;
    {
        let locked: Vec<Locked<'_>> = rows.iter().map(|row| Locked::new(NAME, row)).collect();
        let state = Locked::new(NAME, state);
        let log = decays(log, h, d)?;
        let vector = if e % 4 == 0 && state.address()?.1 { 4 } else { 1 };
        let config = LaunchConfig {
            grid_dim: ((b * h) as u32, 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, PLAIN, format!("decay_step_{}_{vector}", T::SUFFIX), config;
            locked[0].view::<T>()?, locked[1].view::<T>()?, locked[2].view::<T>()?, log, state.view::<f32>()?,
            after.as_view(), o.as_view(), h as i32, d as i32, e as i32);
    }
    Ok((
        gpu::tensor(o, device, &(b, h, e).into()),
        gpu::tensor(after, device, &(b, h, d, e).into()),
    ))
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
