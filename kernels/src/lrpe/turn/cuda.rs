//! Turned rows on a GPU: launches of `cuda/lrpe.cu`.

use super::{Form, Pairing, Turn};
use crate::autograd::Value;
use crate::cuda_module::{Module, THREADS, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use crate::rows::cuda::sum_runs;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Result, Tensor};

pub(in crate::lrpe) const LRPE: Module = module!("lrpe");
/// Threads that keep a GPU busy.
const BUSY: usize = 1 << 17;
/// Most chunks whose sums are added up at the end, and most that a launch may have.
const SUMMED: usize = 64;
const MOST: usize = 1 << 15;

/// `Rows` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rows {
    batch: u32,
    tokens: u32,
    heads: u32,
    groups: u32,
    phases: u32,
    rest: u32,
    batch_stride: u64,
    token_stride: u64,
    head_stride: u64,
    rows_per_chunk: u32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for Rows {}

/// How a call is launched.
struct Plan {
    vector: usize,
    chunks: usize,
    rows: Rows,
    config: LaunchConfig,
}

impl Plan {
    fn new(turn: &Turn, x: &Tensor, bytes: usize, addresses: &[u64], most: usize) -> Self {
        let strides = x.stride();
        let widest = 16 / bytes;
        let fits = turn.p.is_multiple_of(widest)
            && turn.rest.is_multiple_of(widest)
            && strides[..3].iter().all(|stride| stride.is_multiple_of(widest))
            && addresses.iter().all(|address| address.is_multiple_of(16));
        let vector = if fits { widest } else { 1 };
        let (groups, threads) = (turn.groups(), turn.n * ((turn.p + turn.rest) / vector));
        let all = turn.b * turn.h / groups;
        let wanted = BUSY.div_ceil(threads * groups).min(most);
        let rows_per_chunk = all.div_ceil(wanted);
        let chunks = all.div_ceil(rows_per_chunk);
        Self {
            vector,
            chunks,
            rows: Rows {
                batch: turn.b as u32,
                tokens: turn.n as u32,
                heads: turn.h as u32,
                groups: groups as u32,
                phases: turn.p as u32,
                rest: turn.rest as u32,
                batch_stride: strides[0] as u64,
                token_stride: strides[1] as u64,
                head_stride: strides[2] as u64,
                rows_per_chunk: rows_per_chunk as u32,
            },
            config: LaunchConfig {
                grid_dim: (
                    threads.div_ceil(THREADS as usize) as u32,
                    chunks as u32,
                    groups as u32,
                ),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            },
        }
    }
}

impl Form {
    fn kernel(self) -> &'static str {
        match self {
            Self::Doubled => "doubled",
            Self::Copied => "copied",
            Self::Rotated(Pairing::Halves) => "halves",
            Self::Rotated(Pairing::Neighbours) => "neighbours",
        }
    }
}

fn single(phase: &Tensor) -> Result<Tensor> {
    phase.detach().to_dtype(DType::F32)?.contiguous()
}

/// Without phases (of the copy) their address is null.
pub(super) fn forward<T: CudaReal>(turn: &Turn, x: &Tensor, phase: Option<&Tensor>) -> Result<Value> {
    let device = x.device().as_cuda_device()?;
    let (op, phase) = (turn.form.name(), phase.map(single).transpose()?);
    let (x_locked, phase) = (
        Locked::new(op, x),
        phase.as_ref().map(|phase| Locked::new(op, phase)),
    );
    let x_at = x_locked.start()?;
    let phase_at = phase.as_ref().map_or(Ok(0), Locked::start)?;
    let plan = Plan::new(turn, x, size_of::<T>(), &[x_at, phase_at], MOST);
    let shape = (turn.b, turn.n, turn.h, turn.out());
    let y = room::<T>(device, turn.b * turn.n * turn.h * turn.out())?;
    let kernel = format!("{}_{}_v{}", turn.form.kernel(), T::SUFFIX, plan.vector);
    launch!(device, LRPE, kernel, plan.config; x_at, phase_at, y.as_view(), plan.rows);
    Ok(gpu::value(y, device, &shape.into()))
}

pub(super) fn backward<T: CudaReal>(
    turn: &Turn,
    x: &Tensor,
    given: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Tensor, Option<Tensor>)> {
    let device = x.device().as_cuda_device()?;
    let learnt = given.filter(|phase| phase.track_op());
    let (op, phase) = (turn.form.name(), given.map(single).transpose()?);
    let (x_locked, grad) = (Locked::new(op, x), Locked::new(op, grad));
    let phase = phase.as_ref().map(|phase| Locked::new(op, phase));
    let (x_at, grad_at) = (x_locked.start()?, grad.start()?);
    let phase_at = phase.as_ref().map_or(Ok(0), Locked::start)?;
    let most = if learnt.is_some() { SUMMED } else { MOST };
    let plan = Plan::new(turn, x, size_of::<T>(), &[x_at, phase_at, grad_at], most);
    let dx = room::<T>(device, turn.b * turn.n * turn.h * turn.width())?;
    let phases = turn.n * turn.groups() * turn.p;
    let partials = learnt
        .map(|_| room::<f32>(device, plan.chunks * phases))
        .transpose()?;
    let partials_view = partials.as_ref().map(|partials| partials.as_view());
    let kernel = format!("{}_back_{}_v{}", turn.form.kernel(), T::SUFFIX, plan.vector);
    launch!(device, LRPE, kernel, plan.config;
        x_at, phase_at, grad_at, dx.as_view(), pointer(device, partials_view.as_ref()), plan.rows);
    let dphase = match (partials, learnt) {
        (Some(partials), Some(phase)) if plan.chunks == 1 => {
            Some(gpu::tensor(partials, device, phase.shape()))
        }
        (Some(partials), Some(phase)) => {
            let sums = sum_runs(device, &partials, 1, plan.chunks, phases)?;
            Some(gpu::tensor(sums, device, phase.shape()))
        }
        _ => None,
    };
    Ok((gpu::tensor(dx, device, x.shape()), dphase))
}
