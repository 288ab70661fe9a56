//! A sum and its norm on a GPU: launches of `cuda/add_norm.cu`.

use super::{AddNorm, Adjoints, OP};
use crate::autograd::Value;
use crate::cuda_module::{Module, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::norm::rowwise::{Runs, Sharing, address_or_null, wide};
use crate::pass::CudaReal;
use candle_core::{Result, Tensor};

const ADD_NORM: Module = module!("add_norm");

/// Kernels are named after both types where they differ.
fn suffix<X: CudaReal, Y: CudaReal>() -> String {
    crate::norm::cuda::suffix::<X, Y>()
}

pub(super) fn forward<X: CudaReal, Y: CudaReal>(
    op: &AddNorm,
    [residual, branch]: [&Tensor; 2],
    gain: Option<&Tensor>,
) -> Result<[Value; 2]> {
    let device = residual.device().as_cuda_device()?;
    let (shape, count) = (residual.shape(), op.rows * op.width);
    let gain = wide(gain)?;
    let gain = gain.as_ref().map(|t| Locked::new(OP, t));
    let gain_at = address_or_null(gain.as_ref())?;
    let (x, branch) = (Locked::new(OP, residual), Locked::new(OP, branch));
    let (x_at, branch_at) = (x.start()?, branch.start()?);
    let bytes = size_of::<X>().min(size_of::<Y>());
    let sharing = Sharing::new(op.width, bytes, &[], &[x_at, branch_at, gain_at]);
    let (sum, normed) = (room::<X>(device, count)?, room::<Y>(device, count)?);
    let kernel = format!("add_norm_{}_v{}", suffix::<X, Y>(), sharing.vector);
    launch!(device, ADD_NORM, kernel, sharing.launch(op.rows);
        x_at, branch_at, gain_at, sum.as_view(), normed.as_view(), op.rows as u32, op.width as u32,
        sharing.threads as u32, op.eps as f32);
    Ok([gpu::value(sum, device, shape), gpu::value(normed, device, shape)])
}

pub(super) fn backward<X: CudaReal, Y: CudaReal>(
    op: &AddNorm,
    sum: &Tensor,
    gain: Option<&Tensor>,
    d_sum: Option<&Tensor>,
    d_normed: &Tensor,
) -> Result<Adjoints> {
    let device = sum.device().as_cuda_device()?;
    let (shape, width) = (sum.shape(), op.width);
    let learnt = gain.is_some_and(Tensor::track_op);
    let gain = wide(gain)?;
    let gain = gain.as_ref().map(|t| Locked::new(OP, t));
    let d_sum = d_sum.map(|t| Locked::new(OP, t));
    let (gain_at, d_sum_at) = (address_or_null(gain.as_ref())?, address_or_null(d_sum.as_ref())?);
    let (sum, d_normed) = (Locked::new(OP, sum), Locked::new(OP, d_normed));
    let (sum_at, d_normed_at) = (sum.start()?, d_normed.start()?);
    let bytes = size_of::<X>().min(size_of::<Y>());
    let sharing = Sharing::new(width, bytes, &[], &[sum_at, gain_at, d_sum_at, d_normed_at]);
    let runs = Runs::new(op.rows, 1, sharing, learnt);
    let d_residual = room::<X>(device, op.rows * width)?;
    // The same tensor serves both where they have one type.
    let d_branch = (X::SUFFIX != Y::SUFFIX)
        .then(|| room::<Y>(device, op.rows * width))
        .transpose()?;
    let d_branch_view = d_branch.as_ref().map(|d_branch| d_branch.as_view());
    let partials = learnt.then(|| runs.partials(device, width)).transpose()?;
    let partials_view = partials.as_ref().map(|partials| partials.as_view());
    let kernel = format!("add_norm_backward_{}_v{}", suffix::<X, Y>(), sharing.vector);
    launch!(device, ADD_NORM, kernel, sharing.launch(runs.runs);
        sum_at, gain_at, d_sum_at, d_normed_at, d_residual.as_view(), pointer(device, d_branch_view.as_ref()),
        pointer(device, partials_view.as_ref()), op.rows as u32, width as u32, runs.runs as u32,
        runs.tokens_per_run as u32, sharing.threads as u32, op.eps as f32);
    let d_gain = match partials {
        Some(partials) => Some(gpu::tensor(
            runs.sum(device, &partials, width)?,
            device,
            &width.into(),
        )),
        None => None,
    };
    let d_residual = gpu::tensor(d_residual, device, shape);
    Ok(Adjoints {
        d_branch: match d_branch {
            Some(d_branch) => gpu::tensor(d_branch, device, shape),
            None => d_residual.clone(),
        },
        d_residual,
        d_gain,
    })
}
