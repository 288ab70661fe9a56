//! Norms on a GPU: launches of `cuda/norm.cu`.

use super::{Norm, NormBackward};
use crate::cuda_module::{Module, THREADS, aligned, launch, module, pointer, room, vector};
pub(super) use crate::cuda_module::{Slice, View};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, Result};

const NORM: Module = module!("norm");

/// Fewest rows of a group whose partial sums one block takes.
const ROWS_PER_RUN: usize = 64;
/// Most runs of a group: beyond it the final sum over runs would take longer than it saves.
const MAX_RUNS: usize = 512;

fn warp_per_row(rows: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (rows.div_ceil(THREADS as usize / 32) as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

pub(super) fn forward<T: CudaReal>(
    norm: &Norm,
    device: &CudaDevice,
    operands: &[View<'_, T>],
) -> Result<Vec<Slice<T>>> {
    let x = &operands[0];
    let rows = x.len() / norm.width;
    let y = room::<T>(device, x.len())?;
    let views: Vec<&View<'_, T>> = operands.iter().collect();
    let v = vector(&[norm.width], aligned(device, &views));
    launch!(device, NORM, format!("rms_norm_{}_v{v}", T::SUFFIX), warp_per_row(rows);
        x.slice(..), pointer(device, operands.get(1)), pointer(device, operands.get(2)), y.as_view(),
        rows as u32, norm.width as u32, norm.rows_per_group as u32, norm.offset as f32, norm.eps as f32);
    Ok(vec![y])
}

pub(super) fn backward<T: CudaReal>(
    backward: &NormBackward,
    device: &CudaDevice,
    operands: &[View<'_, T>],
) -> Result<Vec<Slice<T>>> {
    let Norm {
        width,
        rows_per_group,
        offset,
        eps,
    } = backward.norm;
    let (x, dy, scale) = (&operands[0], &operands[1], operands.get(2));
    let rows = x.len() / width;
    let (dx, inverse) = (room::<T>(device, x.len())?, room::<f32>(device, rows)?);
    let views: Vec<&View<'_, T>> = operands.iter().collect();
    let v = vector(&[width], aligned(device, &views));
    launch!(device, NORM, format!("rms_norm_backward_{}_v{v}", T::SUFFIX), warp_per_row(rows);
        x.slice(..), dy.slice(..), pointer(device, scale), dx.as_view(), inverse.as_view(),
        rows as u32, width as u32, rows_per_group as u32, offset as f32, eps as f32);
    if scale.is_none() {
        return Ok(vec![dx]);
    }
    let groups = rows / rows_per_group;
    let rows_per_run = ROWS_PER_RUN.max(rows_per_group.div_ceil(MAX_RUNS));
    let runs = rows_per_group.div_ceil(rows_per_run);
    let partials = room::<f32>(device, groups * runs * 2 * width)?;
    let dscale = room::<T>(device, groups * width)?;
    let dshift = if backward.shift {
        Some(room::<T>(device, groups * width)?)
    } else {
        None
    };
    let config = LaunchConfig {
        grid_dim: (
            width.div_ceil(THREADS as usize) as u32,
            runs as u32,
            groups as u32,
        ),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    };
    launch!(device, NORM, format!("columns_{}", T::SUFFIX), config;
        x.slice(..), dy.slice(..), inverse.as_view(), partials.as_view(),
        width as u32, rows_per_group as u32, rows_per_run as u32);
    let config = LaunchConfig {
        grid_dim: (width.div_ceil(32) as u32, groups as u32, 1),
        block_dim: (32, THREADS / 32, 1),
        shared_mem_bytes: 0,
    };
    let shift_view = dshift.as_ref().map(|slice| slice.as_view());
    launch!(device, NORM, format!("columns_sum_{}", T::SUFFIX), config;
        partials.as_view(), dscale.as_view(), pointer(device, shift_view.as_ref()), width as u32, runs as u32);
    Ok([Some(dx), Some(dscale), dshift].into_iter().flatten().collect())
}
