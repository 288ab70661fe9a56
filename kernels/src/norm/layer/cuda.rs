//! Layer norms on a GPU: launches of `cuda/layer_norm.cu`.

use super::{Adjoints, LayerNorm, Named, OP};
use crate::autograd::Value;
use crate::cuda_module::{Module, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::norm::cuda::suffix;
use crate::norm::rowwise::{Runs, Sharing, address_or_null, wide};
use crate::pass::CudaReal;
use crate::strided::row_stride;
use candle_core::{Result, Tensor};

const LAYER_NORM: Module = module!("layer_norm");

fn stride(x: &Tensor) -> Result<usize> {
    row_stride(x.layout()).ok_or(candle_core::Error::RequiresContiguous { op: OP })
}

pub(super) fn forward<X: CudaReal, Y: CudaReal>(op: &LayerNorm, named: Named<'_>) -> Result<Value> {
    let device = named.x.device().as_cuda_device()?;
    let (gain, bias) = (wide(named.gain)?, wide(named.bias)?);
    let (gain, bias) = (
        gain.as_ref().map(|t| Locked::new(OP, t)),
        bias.as_ref().map(|t| Locked::new(OP, t)),
    );
    let (gain_at, bias_at) = (address_or_null(gain.as_ref())?, address_or_null(bias.as_ref())?);
    let x_stride = stride(named.x)?;
    let x = Locked::new(OP, named.x);
    let x_at = x.start()?;
    let bytes = size_of::<X>().min(size_of::<Y>());
    let sharing = Sharing::new(op.width, bytes, &[x_stride], &[x_at, gain_at, bias_at]);
    let y = room::<Y>(device, op.rows * op.width)?;
    let kernel = format!("layer_norm_{}_v{}", suffix::<X, Y>(), sharing.vector);
    launch!(device, LAYER_NORM, kernel, sharing.launch(op.rows);
        x_at, gain_at, bias_at, y.as_view(), op.rows as u32, op.width as u32, x_stride as u64,
        sharing.threads as u32, op.eps as f32);
    Ok(gpu::value(y, device, named.x.shape()))
}

pub(super) fn backward<X: CudaReal, Y: CudaReal>(
    op: &LayerNorm,
    named: Named<'_>,
    grad: &Tensor,
) -> Result<Adjoints> {
    let device = named.x.device().as_cuda_device()?;
    let width = op.width;
    let learnt = [named.gain, named.bias]
        .into_iter()
        .flatten()
        .any(Tensor::track_op);
    let gain = wide(named.gain)?;
    let gain = gain.as_ref().map(|t| Locked::new(OP, t));
    let gain_at = address_or_null(gain.as_ref())?;
    let x_stride = stride(named.x)?;
    let (x, grad) = (Locked::new(OP, named.x), Locked::new(OP, grad));
    let (x_at, grad_at) = (x.start()?, grad.start()?);
    let bytes = size_of::<X>().min(size_of::<Y>());
    let sharing = Sharing::new(width, bytes, &[x_stride], &[x_at, gain_at, grad_at]);
    let runs = Runs::new(op.rows, 1, sharing, learnt);
    let dx = room::<X>(device, op.rows * width)?;
    let partials = learnt.then(|| runs.partials(device, 2 * width)).transpose()?;
    let partials_view = partials.as_ref().map(|partials| partials.as_view());
    let kernel = format!("layer_norm_backward_{}_v{}", suffix::<X, Y>(), sharing.vector);
    launch!(device, LAYER_NORM, kernel, sharing.launch(runs.runs);
        x_at, gain_at, grad_at, dx.as_view(), pointer(device, partials_view.as_ref()),
        op.rows as u32, width as u32, x_stride as u64, runs.runs as u32, runs.tokens_per_run as u32,
        sharing.threads as u32, op.eps as f32);
    let parameters = match partials {
        None => None,
        Some(partials) => {
            let sums = runs.sum(device, &partials, 2 * width)?;
            let sums = gpu::tensor(sums, device, &(2, width).into());
            Some([sums.get(0)?, sums.get(1)?])
        }
    };
    Ok(Adjoints {
        dx: gpu::tensor(dx, device, named.x.shape()),
        parameters,
    })
}
