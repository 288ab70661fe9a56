//! The optimiser on a GPU: launches of `cuda/adamw.cu`, with tables of tensors in device memory.

use super::{AdamW, Clip, GradientScale, Number, OP, Slot, Step};
use crate::cuda_module::{Module, Slice, THREADS, launch, module, room};
use crate::gpu::{self, Locked};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{CudaDevice, DType, Result, Shape, Tensor};

const ADAMW: Module = module!("adamw");

/// Elements of one block.
const RUN: usize = 16 * 1024;

/// Bits of `kind`.
const BF16_GRADIENT: u32 = 1;
const BF16_MOMENTS: u32 = 2;
const ALIGNED: u32 = 4;

/// `Slot` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct SlotRow {
    parameter: u64,
    moments: u64,
    gradient: u64,
    rounded: u64,
    count: u64,
    first_block: u32,
    kind: u32,
}

/// `Addend` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct AddendRow {
    data: u64,
    count: u64,
    first_block: u32,
    kind: u32,
}

/// `Follower` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct FollowerRow {
    average: u64,
    value: u64,
    count: u64,
    first_block: u32,
    kind: u32,
}

/// `Correction` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Correction {
    counts: u64,
    lr: f64,
    beta1: f64,
    beta2: f64,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for SlotRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for FollowerRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for Correction {}
// SAFETY: as above.
unsafe impl DeviceRepr for AddendRow {}
// SAFETY: as above.
unsafe impl DeviceRepr for Step {}

fn blocks(count: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (count as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

fn bit(tensor: &Tensor, bit: u32) -> u32 {
    if tensor.dtype() == DType::BF16 { bit } else { 0 }
}

/// The row of a slot whose blocks begin at `first_block`.
fn row(slot: &Slot, first_block: usize) -> Result<SlotRow> {
    let address = |tensor: &Tensor| Locked::new(OP, tensor).address();
    let (parameter, moments) = (address(slot.parameter)?, address(slot.moments)?);
    let gradient = address(slot.gradient)?;
    let rounded = slot.rounded.map_or(Ok((0, true)), address)?;
    let count = slot.parameter.elem_count();
    // The second moment lies behind the first.
    let aligned = count.is_multiple_of(4) && parameter.1 && moments.1 && gradient.1 && rounded.1;
    Ok(SlotRow {
        parameter: parameter.0,
        moments: moments.0,
        gradient: gradient.0,
        rounded: rounded.0,
        count: count as u64,
        first_block: first_block as u32,
        kind: bit(slot.gradient, BF16_GRADIENT)
            | bit(slot.moments, BF16_MOMENTS)
            | if aligned { ALIGNED } else { 0 },
    })
}

/// A step on all slots: one launch.
pub(super) fn step(slots: &[Slot], adamw: &AdamW, number: Number, scale: GradientScale) -> Result<()> {
    // Where the device has counted, the kernel puts in what depends on the number.
    let (number, counts) = match number {
        Number::Host(number) => (number, 0),
        Number::Counted(clip) => (1, Locked::new(OP, clip.counts()).start()?),
    };
    let (step, correction) = (
        adamw.constants(number),
        Correction {
            counts,
            lr: adamw.lr,
            beta1: adamw.beta1,
            beta2: adamw.beta2,
        },
    );
    let device = slots[0].parameter.device().as_cuda_device()?;
    let (mut rows, mut count) = (Vec::with_capacity(slots.len()), 0);
    for slot in slots {
        rows.push(row(slot, count)?);
        count += slot.parameter.elem_count().div_ceil(RUN);
    }
    let table = device.clone_htod(&rows)?;
    let (pointer, factor) = match scale {
        GradientScale::Host(factor) => (0, factor as f32),
        GradientScale::Device(factor) => (Locked::new(OP, factor).start()?, 1.0),
    };
    launch!(device, ADAMW, "adamw_step", blocks(count);
        table.as_view(), rows.len() as u32, pointer, factor, step, correction, RUN as u32);
    Ok(())
}

/// Sums of squares of runs of all tensors, in order: one launch.
fn partials(device: &CudaDevice, tensors: &[Tensor]) -> Result<Slice<f64>> {
    let (mut rows, mut count) = (Vec::with_capacity(tensors.len()), 0);
    for tensor in tensors {
        rows.push(AddendRow {
            data: Locked::new(OP, tensor).start()?,
            count: tensor.elem_count() as u64,
            first_block: count as u32,
            kind: bit(tensor, BF16_GRADIENT),
        });
        count += tensor.elem_count().div_ceil(RUN);
    }
    let table = device.clone_htod(&rows)?;
    let partials = room::<f64>(device, count)?;
    launch!(device, ADAMW, "squares", blocks(count);
        table.as_view(), rows.len() as u32, partials.as_view(), RUN as u32);
    Ok(partials)
}

/// Sum of squares of all tensors: one launch, and one for the partial sums.
pub(super) fn squared_norm(tensors: &[Tensor]) -> Result<Tensor> {
    let device = tensors[0].device().as_cuda_device()?;
    let partials = partials(device, tensors)?;
    let sum = room::<f32>(device, 1)?;
    launch!(device, ADAMW, "squares_sum", blocks(1); partials.as_view(), sum.as_view(), partials.len() as u64);
    Ok(gpu::tensor(sum, device, &Shape::from(1)))
}

/// Norm and scale of all tensors, [1] each, and the counts after a step with them.
pub(super) fn clip(tensors: &[Tensor], max_norm: Option<f32>, counts: &Tensor) -> Result<[Tensor; 3]> {
    let device = tensors[0].device().as_cuda_device()?;
    let partials = partials(device, tensors)?;
    let (result, after) = (room::<f32>(device, 2)?, room::<u32>(device, 4)?);
    let before = Locked::new(OP, counts).start()?;
    launch!(device, ADAMW, "clip", blocks(1);
        partials.as_view(), result.as_view(), before, after.as_view(), max_norm.unwrap_or(0.0), partials.len() as u64);
    let result = gpu::tensor(result, device, &Shape::from(2));
    Ok([
        result.narrow(0, 0, 1)?,
        result.narrow(0, 1, 1)?,
        gpu::tensor(after, device, &Shape::from(4)),
    ])
}

/// Moves averages towards their values after the step of `clip`: one launch.
pub(crate) fn follow(
    op: &'static str,
    pairs: &[(&Tensor, Tensor)],
    decay: f64,
    memory: f64,
    clip: &Clip,
) -> Result<()> {
    let device = pairs[0].1.device().as_cuda_device()?;
    let (mut rows, mut count) = (Vec::with_capacity(pairs.len()), 0);
    for (average, value) in pairs {
        let (average, value) = (
            Locked::new(op, average).address()?,
            Locked::new(op, value).address()?,
        );
        let elements = pairs[rows.len()].1.elem_count();
        let aligned = elements.is_multiple_of(4) && average.1 && value.1;
        rows.push(FollowerRow {
            average: average.0,
            value: value.0,
            count: elements as u64,
            first_block: count as u32,
            kind: if aligned { ALIGNED } else { 0 },
        });
        count += elements.div_ceil(RUN);
    }
    let table = device.clone_htod(&rows)?;
    let (scale, counts) = (
        Locked::new(op, clip.factor()).start()?,
        Locked::new(op, clip.counts()).start()?,
    );
    launch!(device, ADAMW, "follow", blocks(count);
        table.as_view(), rows.len() as u32, scale, counts, decay, memory, RUN as u32);
    Ok(())
}
