//! Token shift on a GPU: launches of `cuda/shift.cu`.

use super::{AXES, TokenShift};
use crate::cuda_module::{Module, aligned, by_rows, launch, module, room, vector};
pub(super) use crate::cuda_module::{Slice, View};
use crate::pass::CudaReal;
use candle_core::{CudaDevice, Result};

const SHIFT: Module = module!("shift");

pub(super) fn token_shift<T: CudaReal>(
    shift: &TokenShift,
    device: &CudaDevice,
    x: &View<'_, T>,
) -> Result<Vec<Slice<T>>> {
    let (channels, group) = (shift.channels, shift.group());
    let rows = x.len() / channels;
    let mut axes = [(1, 1); AXES];
    for (slot, (stride, length)) in axes.iter_mut().zip(shift.strides()) {
        *slot = (stride as u32, length as u32);
    }
    let y = room::<T>(device, x.len())?;
    let v = vector(&[channels, group], aligned(device, &[x]));
    launch!(device, SHIFT, format!("token_shift_{}_v{v}", T::SUFFIX), by_rows(rows, channels / v);
        x.slice(..), y.as_view(), rows as u32, channels as u32, group as u32, shift.axes as u32,
        axes[0].0, axes[0].1, axes[1].0, axes[1].1, axes[2].0, axes[2].1, u32::from(shift.reverse));
    Ok(vec![y])
}
