//! The optimiser on a GPU: launches of `cuda/adamw.cu`.

use super::{MomentUpdate, ParameterUpdate};
use crate::cuda_module::{Module, THREADS, flat, launch, module, pointer, room};
use crate::gpu;
use crate::pass::view;
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaStorage, Error, Layout, Result, Storage, StorageRef};

const ADAMW: Module = module!("adamw");

/// Elements whose squares one block adds.
const RUN: usize = 16 * 1024;

impl MomentUpdate {
    pub(super) fn run_cuda(
        &self,
        (moments, moments_layout): (&mut CudaStorage, &Layout),
        (gradient, gradient_layout): (&CudaStorage, &Layout),
        scale: Option<(&CudaStorage, &Layout)>,
    ) -> Result<()> {
        const OP: &str = "adamw moments";
        let device = gradient.device();
        let gradient = view::<f32>(OP, gradient, gradient_layout)?;
        let scale = scale
            .map(|(storage, layout)| view::<f32>(OP, storage, layout))
            .transpose()?;
        let moments = view::<f32>(OP, moments, moments_layout)?;
        let count = gradient.len();
        launch!(device, ADAMW, "adamw_moments", flat(count);
            moments, gradient, pointer(device, scale.as_ref()), self.scale, self.beta1, self.beta2, count as u64);
        Ok(())
    }
}

impl ParameterUpdate {
    pub(super) fn run_cuda(
        &self,
        (parameter, parameter_layout): (&mut CudaStorage, &Layout),
        (moments, moments_layout): (&CudaStorage, &Layout),
    ) -> Result<()> {
        const OP: &str = "adamw parameter";
        let device = moments.device();
        let moments = view::<f32>(OP, moments, moments_layout)?;
        let parameter = view::<f32>(OP, parameter, parameter_layout)?;
        let count = parameter.len();
        launch!(device, ADAMW, "adamw_parameter", flat(count);
            parameter, moments, self.keep, self.rate, self.second, self.eps, count as u64);
        Ok(())
    }
}

/// Sum of squares of all tensors: one launch for each, and one for all partial sums.
pub(super) fn squared_norm(tensors: &[(StorageRef<'_>, &Layout)]) -> Result<CudaStorage> {
    const OP: &str = "squared_norm";
    let mut views = Vec::with_capacity(tensors.len());
    let mut device = None;
    for (storage, layout) in tensors {
        let Storage::Cuda(storage) = &**storage else {
            return Err(Error::Msg(format!("{OP}: tensors lie on different devices")));
        };
        device = Some(storage.device());
        views.push(view::<f32>(OP, storage, layout)?);
    }
    let Some(device) = device else {
        return Err(Error::Msg(format!("{OP}: no tensor")));
    };
    let blocks: usize = views.iter().map(|view| view.len().div_ceil(RUN)).sum();
    let partials = room::<f64>(device, blocks)?;
    let mut first = 0;
    for view in views {
        let count = view.len();
        let own = count.div_ceil(RUN);
        launch!(device, ADAMW, "squares", blocks_of(own);
            view, partials.slice(first..first + own), RUN as u32, count as u64);
        first += own;
    }
    let sum = room::<f32>(device, 1)?;
    launch!(device, ADAMW, "squares_sum", blocks_of(1); partials.as_view(), sum.as_view(), blocks as u64);
    Ok(gpu::storage(sum, device))
}

fn blocks_of(count: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (count as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}
