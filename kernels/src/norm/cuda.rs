//! Norms on a GPU: launches of `cuda/norm.cu`.

use super::{Norm, NormBackward};
use crate::cuda_module::{Module, THREADS, aligned, launch, module, pointer, room, vector};
pub(super) use crate::cuda_module::{Slice, View};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, Result};

const NORM: Module = module!("norm");

/// Fewest tokens of a group whose partial sums one block takes.
const TOKENS_PER_RUN: usize = 64;
/// Most runs of a group: beyond it the final sum over runs would take longer than it saves.
const MAX_RUNS: usize = 512;

fn warp_per_row(rows: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (rows.div_ceil(THREADS as usize / 32) as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// `T` is the type of x, scale and shift, `U` that of the result; kernels are named after both where they differ.
pub(super) fn suffix<T: CudaReal, U: CudaReal>() -> String {
    if T::SUFFIX == U::SUFFIX {
        T::SUFFIX.into()
    } else {
        format!("{}_{}", T::SUFFIX, U::SUFFIX)
    }
}

/// y of x and, where they are given, scale and shift.
pub(super) fn forward<T: CudaReal, U: CudaReal>(
    norm: &Norm,
    device: &CudaDevice,
    operands: &[View<'_, T>],
) -> Result<Slice<U>> {
    let x = &operands[0];
    let rows = x.len() / norm.width;
    let y = room::<U>(device, x.len())?;
    let views: Vec<&View<'_, T>> = operands.iter().collect();
    let v = vector(&[norm.width], aligned(device, &views));
    launch!(device, NORM, format!("rms_norm_{}_v{v}", suffix::<T, U>()), warp_per_row(rows);
        x.slice(..), pointer(device, operands.get(1)), pointer(device, operands.get(2)), y.as_view(),
        rows as u32, norm.width as u32, norm.heads as u32, norm.tokens_per_group as u32,
        norm.offset as f32, norm.eps as f32);
    Ok(y)
}

/// dx, then dscale where there is a scale, then dshift where it is wanted.
pub(super) fn backward<T: CudaReal, U: CudaReal>(
    backward: &NormBackward,
    device: &CudaDevice,
    x: &View<'_, T>,
    dy: &View<'_, U>,
    scale: Option<&View<'_, T>>,
) -> Result<Vec<Slice<T>>> {
    let Norm {
        width,
        heads,
        tokens_per_group,
        offset,
        eps,
    } = backward.norm;
    let rows = x.len() / width;
    let (dx, inverse) = (room::<T>(device, x.len())?, room::<f32>(device, rows)?);
    let affine: Vec<&View<'_, T>> = [Some(x), scale].into_iter().flatten().collect();
    let v = vector(&[width], aligned(device, &affine) && aligned(device, &[dy]));
    launch!(device, NORM, format!("rms_norm_backward_{}_v{v}", suffix::<T, U>()), warp_per_row(rows);
        x.slice(..), dy.slice(..), pointer(device, scale), dx.as_view(), inverse.as_view(),
        rows as u32, width as u32, heads as u32, tokens_per_group as u32, offset as f32, eps as f32);
    if scale.is_none() {
        return Ok(vec![dx]);
    }
    let columns = heads * width;
    let groups = rows / heads / tokens_per_group;
    let tokens_per_run = TOKENS_PER_RUN.max(tokens_per_group.div_ceil(MAX_RUNS));
    let runs = tokens_per_group.div_ceil(tokens_per_run);
    let partials = room::<f32>(device, groups * runs * 2 * columns)?;
    let dscale = room::<T>(device, groups * columns)?;
    let dshift = if backward.shift {
        Some(room::<T>(device, groups * columns)?)
    } else {
        None
    };
    let config = LaunchConfig {
        grid_dim: (
            columns.div_ceil(THREADS as usize) as u32,
            runs as u32,
            groups as u32,
        ),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    launch!(device, NORM, format!("columns_{}", suffix::<T, U>()), config;
        x.slice(..), dy.slice(..), inverse.as_view(), partials.as_view(),
        width as u32, heads as u32, tokens_per_group as u32, tokens_per_run as u32);
    let config = LaunchConfig {
        grid_dim: (columns.div_ceil(32) as u32, groups as u32, 1),
        block_dim: (32, THREADS / 32, 1),
        shared_mem_bytes: 0,
    };
    let shift_view = dshift.as_ref().map(|slice| slice.as_view());
    launch!(device, NORM, format!("columns_sum_{}", T::SUFFIX), config;
        partials.as_view(), dscale.as_view(), pointer(device, shift_view.as_ref()), columns as u32, runs as u32);
    Ok([Some(dx), Some(dscale), dshift].into_iter().flatten().collect())
}
