//! Framing, overlap-add and magnitude on a GPU: launches of `cuda/spectrum.cu`.

use super::frames::Framing;
use crate::cuda_module::{Module, THREADS, by_rows, launch, module, room};
pub(super) use crate::cuda_module::{Slice, View};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, Result};

const SPECTRUM: Module = module!("spectrum");

fn grid(columns: usize, frames: usize, batch: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (
            columns.div_ceil(THREADS as usize) as u32,
            frames as u32,
            batch as u32,
        ),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

pub(super) fn frames<T: CudaReal>(
    framing: Framing,
    device: &CudaDevice,
    x: &View<'_, T>,
) -> Result<Vec<Slice<T>>> {
    let Framing {
        samples,
        frames,
        width,
        hop,
    } = framing;
    let batch = x.len() / samples;
    let y = room::<T>(device, batch * frames * width)?;
    launch!(device, SPECTRUM, format!("frames_{}", T::SUFFIX), grid(width, frames, batch);
        x.slice(..), y.as_view(), samples as u32, width as u32, hop as u32);
    Ok(vec![y])
}

pub(super) fn overlap_add<T: CudaReal>(
    framing: Framing,
    device: &CudaDevice,
    x: &View<'_, T>,
) -> Result<Vec<Slice<T>>> {
    let Framing {
        samples,
        frames,
        width,
        hop,
    } = framing;
    let batch = x.len() / (frames * width);
    let y = room::<T>(device, batch * samples)?;
    launch!(device, SPECTRUM, format!("overlap_add_{}", T::SUFFIX), grid(samples, 1, batch);
        x.slice(..), y.as_view(), samples as u32, frames as u32, width as u32, hop as u32);
    Ok(vec![y])
}

pub(super) fn magnitude<T: CudaReal>(
    bins: usize,
    floor: f32,
    device: &CudaDevice,
    [x]: [View<'_, T>; 1],
) -> Result<Vec<Slice<T>>> {
    let rows = x.len() / (2 * bins);
    let y = room::<T>(device, rows * bins)?;
    launch!(device, SPECTRUM, format!("magnitude_{}", T::SUFFIX), by_rows(rows, bins);
        x, y.as_view(), rows as u32, bins as u32, floor);
    Ok(vec![y])
}

pub(super) fn magnitude_backward<T: CudaReal>(
    bins: usize,
    device: &CudaDevice,
    [x, y, dy]: [View<'_, T>; 3],
) -> Result<Vec<Slice<T>>> {
    let rows = x.len() / (2 * bins);
    let dx = room::<T>(device, x.len())?;
    launch!(device, SPECTRUM, format!("magnitude_backward_{}", T::SUFFIX), by_rows(rows, bins);
        x, y, dy, dx.as_view(), rows as u32, bins as u32);
    Ok(vec![dx])
}
