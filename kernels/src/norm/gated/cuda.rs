//! The gated norm on a GPU: launches of `cuda/norm_gated.cu`.

use super::{Gate, Gated, OP};
use crate::autograd::Value;
use crate::cuda_module::{Module, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::norm::rowwise::{Runs, Sharing, address_or_null, wide};
use crate::pass::CudaReal;
use crate::strided::row_stride;
use candle_core::{Result, Tensor};

const NORM_GATED: Module = module!("norm_gated");

impl Gate {
    /// Its number in the kernels.
    fn number(self) -> u32 {
        match self {
            Self::Identity => 0,
            Self::Sigmoid => 1,
            Self::Silu => 2,
        }
    }
}

fn stride(x: &Tensor) -> Result<usize> {
    row_stride(x.layout()).ok_or(candle_core::Error::RequiresContiguous { op: OP })
}

pub(super) fn forward<T: CudaReal>(
    op: &Gated,
    x: &Tensor,
    gate: &Tensor,
    gain: Option<&Tensor>,
) -> Result<Value> {
    let device = x.device().as_cuda_device()?;
    let (shape, rows) = (x.shape(), op.tokens * op.heads);
    let gain = wide(gain)?;
    let gain = gain.as_ref().map(|gain| Locked::new(OP, gain));
    let gain_at = address_or_null(gain.as_ref())?;
    let strides = [stride(x)?, stride(gate)?];
    let (x, gate) = (Locked::new(OP, x), Locked::new(OP, gate));
    let (x_at, gate_at) = (x.start()?, gate.start()?);
    let sharing = Sharing::new(op.width, size_of::<T>(), &strides, &[x_at, gate_at, gain_at]);
    let y = room::<T>(device, rows * op.width)?;
    launch!(device, NORM_GATED, format!("rms_norm_gated_{}_v{}", T::SUFFIX, sharing.vector), sharing.launch(rows);
        x_at, gate_at, gain_at, y.as_view(), rows as u32, op.width as u32, op.heads as u32,
        strides[0] as u64, strides[1] as u64, sharing.threads as u32, op.activation.number(), op.eps as f32);
    Ok(gpu::value(y, device, shape))
}

pub(super) fn backward<T: CudaReal>(
    op: &Gated,
    [x, gate]: [&Tensor; 2],
    gain: Option<&Tensor>,
    grad: &Tensor,
) -> Result<[Option<Tensor>; 3]> {
    let device = x.device().as_cuda_device()?;
    let (shape, columns) = (x.shape(), op.columns());
    let learnt = gain.is_some_and(Tensor::track_op);
    let gain = wide(gain)?;
    let gain = gain.as_ref().map(|gain| Locked::new(OP, gain));
    let gain_at = address_or_null(gain.as_ref())?;
    let strides = [stride(x)?, stride(gate)?];
    let (x, gate, grad) = (Locked::new(OP, x), Locked::new(OP, gate), Locked::new(OP, grad));
    let (x_at, gate_at, grad_at) = (x.start()?, gate.start()?, grad.start()?);
    let addresses = [x_at, gate_at, grad_at, gain_at];
    let sharing = Sharing::new(op.width, size_of::<T>(), &strides, &addresses);
    let runs = Runs::new(op.tokens, op.heads, sharing, learnt);
    let (dx, dgate) = (
        room::<T>(device, op.tokens * columns)?,
        room::<T>(device, op.tokens * columns)?,
    );
    let partials = learnt.then(|| runs.partials(device, columns)).transpose()?;
    let partials_view = partials.as_ref().map(|partials| partials.as_view());
    let kernel = format!("rms_norm_gated_backward_{}_v{}", T::SUFFIX, sharing.vector);
    launch!(device, NORM_GATED, kernel, sharing.launch(runs.runs * op.heads);
        x_at, gate_at, gain_at, grad_at, dx.as_view(), dgate.as_view(),
        pointer(device, partials_view.as_ref()),
        op.tokens as u32, op.width as u32, op.heads as u32, strides[0] as u64, strides[1] as u64,
        runs.runs as u32, runs.tokens_per_run as u32, sharing.threads as u32, op.activation.number(), op.eps as f32);
    let dgain = partials
        .map(|partials| {
            let sums = runs.sum(device, &partials, columns)?;
            Ok::<_, candle_core::Error>(gpu::tensor(sums, device, &columns.into()))
        })
        .transpose()?;
    Ok([
        Some(gpu::tensor(dx, device, shape)),
        Some(gpu::tensor(dgate, device, shape)),
        dgain,
    ])
}
