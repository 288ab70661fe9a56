//! Gated linear units on a GPU: launches of `cuda/glu.cu`.

use super::SwiGluBackward;
use crate::cuda_module::{Module, aligned, by_rows, flat, launch, module, pointer, room, vector};
pub(super) use crate::cuda_module::{Slice, View};
use crate::pass::CudaReal;
use candle_core::{CudaDevice, Result};

const GLU: Module = module!("glu");

fn name<T: CudaReal>(kernel: &str, vector: usize) -> String {
    format!("{kernel}_{}_v{vector}", T::SUFFIX)
}

pub(super) fn swiglu<T: CudaReal>(
    half: usize,
    device: &CudaDevice,
    [x]: [View<'_, T>; 1],
) -> Result<Vec<Slice<T>>> {
    let rows = x.len() / (2 * half);
    let y = room::<T>(device, rows * half)?;
    let v = vector(&[half], aligned(device, &[&x]));
    launch!(device, GLU, name::<T>("swiglu", v), by_rows(rows, half / v);
        x, y.as_view(), rows as u32, half as u32);
    Ok(vec![y])
}

pub(super) fn swiglu_backward<T: CudaReal>(
    SwiGluBackward { half, along }: SwiGluBackward,
    device: &CudaDevice,
    [x, dy]: [View<'_, T>; 2],
) -> Result<Vec<Slice<T>>> {
    let rows = x.len() / (2 * half);
    let dx = room::<T>(device, x.len())?;
    let y = along.then(|| room::<T>(device, rows * half)).transpose()?;
    let y_at = pointer(device, y.as_ref().map(|y| y.as_view()).as_ref());
    let v = vector(&[half], aligned(device, &[&x, &dy]));
    launch!(device, GLU, name::<T>("swiglu_backward", v), by_rows(rows, half / v);
        x, dy, dx.as_view(), y_at, rows as u32, half as u32);
    Ok([Some(dx), y].into_iter().flatten().collect())
}

pub(super) fn gated<T: CudaReal>(device: &CudaDevice, [x, gate]: [View<'_, T>; 2]) -> Result<Vec<Slice<T>>> {
    let count = x.len();
    let y = room::<T>(device, count)?;
    let v = vector(&[count], aligned(device, &[&x, &gate]));
    launch!(device, GLU, name::<T>("gated", v), flat(count / v); x, gate, y.as_view(), count as u64);
    Ok(vec![y])
}

pub(super) fn gated_backward<T: CudaReal>(
    device: &CudaDevice,
    [x, gate, dy]: [View<'_, T>; 3],
) -> Result<Vec<Slice<T>>> {
    let count = x.len();
    let (dx, dgate) = (room::<T>(device, count)?, room::<T>(device, count)?);
    let v = vector(&[count], aligned(device, &[&x, &gate, &dy]));
    launch!(device, GLU, name::<T>("gated_backward", v), flat(count / v);
        x, gate, dy, dx.as_view(), dgate.as_view(), count as u64);
    Ok(vec![dx, dgate])
}
