//! The short convolution on a GPU: launches of `cuda/short_conv.cu`.

use super::ShortConv;
use crate::autograd::Value;
use crate::cuda_module::{Module, THREADS, launch, module, room};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use crate::rows::cuda::sum_runs;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{DType, Result, Tensor};

const SHORT_CONV: Module = module!("short_conv");
/// Threads that keep a GPU busy.
const BUSY: usize = 1 << 17;
/// Fewest tokens of a run, so that what runs read twice stays little, and most runs whose sums are added up at the end.
const SHORTEST_RUN: usize = 16;
const SUMMED: usize = 512;

/// `Sizes` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Sizes {
    batch: u32,
    tokens: u32,
    out: u32,
    channels: u32,
    taps: u32,
    before: u32,
    run: u32,
    runs: u32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for Sizes {}

/// How a kernel is launched.
struct Plan {
    suffix: String,
    sizes: Sizes,
    config: LaunchConfig,
}

impl Plan {
    /// Of a kernel that reads `tokens` and writes, or reads too, `out`; with at most `most` runs.
    fn new<T: CudaReal>(
        call: &ShortConv,
        [tokens, out]: [usize; 2],
        before: usize,
        addresses: &[u64],
        most: usize,
    ) -> Self {
        let widest = 16 / size_of::<T>();
        let aligned =
            call.channels.is_multiple_of(widest) && addresses.iter().all(|at| at.is_multiple_of(16));
        let (taps, vector) = match (call.taps, aligned) {
            (..=4, true) => ("w4", widest),
            (5..=8, true) => ("w8", widest),
            (..=4, false) => ("w4", 1),
            (5..=8, false) => ("w8", 1),
            _ => ("any", 1),
        };
        let threads = call.batch * (call.channels / vector);
        let wanted = BUSY.div_ceil(threads).min(out.div_ceil(SHORTEST_RUN));
        let wanted = wanted.min((most / call.batch).max(1));
        let run = out.div_ceil(wanted);
        let runs = out.div_ceil(run);
        Self {
            suffix: format!("{taps}_{}_v{vector}", T::SUFFIX),
            sizes: Sizes {
                batch: call.batch as u32,
                tokens: tokens as u32,
                out: out as u32,
                channels: call.channels as u32,
                taps: call.taps as u32,
                before: before as u32,
                run: run as u32,
                runs: runs as u32,
            },
            config: LaunchConfig {
                grid_dim: ((threads * runs).div_ceil(THREADS as usize) as u32, 1, 1),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            },
        }
    }
}

fn single(weights: &Tensor) -> Result<Tensor> {
    weights.detach().to_dtype(DType::F32)?.contiguous()
}

pub(super) fn forward<T: CudaReal>(call: &ShortConv, x: &Tensor, weights: &Tensor) -> Result<Value> {
    const OP: &str = "short_conv";
    let device = x.device().as_cuda_device()?;
    let weights = single(weights)?;
    let (x, weights) = (Locked::new(OP, x), Locked::new(OP, &weights));
    let (x_at, weights_at) = (x.start()?, weights.start()?);
    let plan = Plan::new::<T>(call, [call.tokens, call.out], call.before, &[x_at], usize::MAX);
    let shape = (call.batch, call.out, call.channels);
    let y = room::<T>(device, call.batch * call.out * call.channels)?;
    let kernel = format!("short_conv_{}", plan.suffix);
    launch!(device, SHORT_CONV, kernel, plan.config; x_at, weights_at, y.as_view(), plan.sizes, 0u32);
    Ok(gpu::value(y, device, &shape.into()))
}

/// Adjoints of tokens and weights, the latter in f32.
pub(super) fn backward<T: CudaReal>(
    call: &ShortConv,
    x: &Tensor,
    weights: &Tensor,
    grad: &Tensor,
) -> Result<[Tensor; 2]> {
    const OP: &str = "short_conv";
    let device = x.device().as_cuda_device()?;
    let (x_shape, weights_shape, weights) = (x.shape(), weights.shape(), single(weights)?);
    let (x, weights, grad) = (
        Locked::new(OP, x),
        Locked::new(OP, &weights),
        Locked::new(OP, grad),
    );
    let (x_at, weights_at, grad_at) = (x.start()?, weights.start()?, grad.start()?);

    let before = call.taps - 1 - call.before;
    let plan = Plan::new::<T>(call, [call.out, call.tokens], before, &[grad_at], usize::MAX);
    let dx = room::<T>(device, call.batch * call.tokens * call.channels)?;
    let kernel = format!("short_conv_{}", plan.suffix);
    launch!(device, SHORT_CONV, kernel, plan.config; grad_at, weights_at, dx.as_view(), plan.sizes, 1u32);

    let plan = Plan::new::<T>(
        call,
        [call.tokens, call.out],
        call.before,
        &[x_at, grad_at],
        SUMMED,
    );
    let (runs, count) = (call.batch * plan.sizes.runs as usize, call.channels * call.taps);
    let partials = room::<f32>(device, runs * count)?;
    let kernel = format!("short_conv_weights_{}", plan.suffix);
    launch!(device, SHORT_CONV, kernel, plan.config; x_at, grad_at, partials.as_view(), plan.sizes);
    let sums = match runs {
        1 => partials,
        _ => sum_runs(device, &partials, 1, runs, count)?,
    };
    Ok([
        gpu::tensor(dx, device, x_shape),
        gpu::tensor(sums, device, weights_shape),
    ])
}
