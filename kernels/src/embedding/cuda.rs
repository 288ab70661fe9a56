//! Rows by number on a GPU: launches of `cuda/embedding.cu`.

use super::ids::Order;
use super::{Ids, OP};
use crate::autograd::Value;
use crate::cuda_module::{Module, Slice, THREADS, by_rows, launch, module, pointer, room, zeros};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{Result, Tensor};

const EMBEDDING: Module = module!("embedding");
/// Most positions of a piece.
const PIECE: usize = 32;
/// Columns of a block of `sum_parts`, and most of its second axis.
const LANES: usize = 32;
const MOST_BLOCKS: usize = 65_535;

/// `Piece` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Piece {
    first: u32,
    last: u32,
    target: u32,
    is_part: u32,
}

/// `Parted` of the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Parted {
    row: u32,
    first: u32,
    last: u32,
}

// SAFETY: plain numbers in the layout of C, as the kernels declare them.
unsafe impl DeviceRepr for Piece {}
// SAFETY: as above.
unsafe impl DeviceRepr for Parted {}

/// Who adds what: pieces of bounded length, and ids of more than one of them.
struct Plan {
    pieces: Vec<Piece>,
    parted: Vec<Parted>,
    parts: usize,
}

impl Plan {
    fn new(order: &Order) -> Self {
        let (mut pieces, mut parted, mut parts) = (Vec::with_capacity(order.segments.len()), vec![], 0u32);
        for segment in &order.segments {
            let whole = segment.last - segment.first <= PIECE as u32;
            let before = parts;
            for first in (segment.first..segment.last).step_by(PIECE) {
                pieces.push(Piece {
                    first,
                    last: (first + PIECE as u32).min(segment.last),
                    target: if whole { segment.row } else { parts },
                    is_part: u32::from(!whole),
                });
                parts += u32::from(!whole);
            }
            if !whole {
                parted.push(Parted {
                    row: segment.row,
                    first: before,
                    last: parts,
                });
            }
        }
        Self {
            pieces,
            parted,
            parts: parts as usize,
        }
    }
}

/// Elements that move at once.
fn vector(width: usize, bytes: usize, address: u64) -> usize {
    let widest = 16 / bytes;
    if width.is_multiple_of(widest) && address.is_multiple_of(16) {
        widest
    } else {
        1
    }
}

pub(super) fn forward<X: CudaReal, Y: CudaReal>(table: &Tensor, ids: &Ids, shape: &[usize]) -> Result<Value> {
    let device = table.device().as_cuda_device()?;
    let rows = device.clone_htod(ids.list())?;
    let y = gathered::<X, Y>(table, pointer(device, Some(&rows.as_view())), ids.list().len())?;
    Ok(gpu::value(y, device, &shape.into()))
}

/// The rows `ids` `[B]`, which lie on the device: `[B, D]`.
pub(super) fn forward_at<X: CudaReal, Y: CudaReal>(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let device = table.device().as_cuda_device()?;
    let (count, width) = (ids.elem_count(), table.dim(1)?);
    let y = gathered::<X, Y>(table, Locked::new(OP, ids).start()?, count)?;
    Ok(gpu::tensor(y, device, &(count, width).into()))
}

/// `count` rows, whose numbers lie at the address `rows`.
fn gathered<X: CudaReal, Y: CudaReal>(table: &Tensor, rows: u64, count: usize) -> Result<Slice<Y>> {
    let device = table.device().as_cuda_device()?;
    let (_, width) = table.dims2()?;
    let table = Locked::new(OP, table);
    let address = table.start()?;
    let v = vector(width, size_of::<X>().min(size_of::<Y>()), address);
    let y = room::<Y>(device, count * width)?;
    let suffix = if X::SUFFIX == Y::SUFFIX {
        X::SUFFIX.to_owned()
    } else {
        format!("{}_{}", X::SUFFIX, Y::SUFFIX)
    };
    launch!(device, EMBEDDING, format!("gather_{suffix}_v{v}"), by_rows(count, width / v);
        address, rows, y.as_view(), count as u32, width as u32);
    Ok(y)
}

/// The gradient of the table in f32.
pub(super) fn backward<Y: CudaReal>(table: &Tensor, ids: &Ids, grad: &Tensor) -> Result<Tensor> {
    let device = table.device().as_cuda_device()?;
    let (rows, width) = table.dims2()?;
    let order = ids.order();
    let plan = Plan::new(order);
    let grad = Locked::new(OP, grad);
    let address = grad.start()?;
    let v = vector(width, size_of::<Y>(), address);
    let positions = device.clone_htod(&order.positions)?;
    let pieces = device.clone_htod(&plan.pieces)?;
    let gradient = zeros::<f32>(device, rows * width)?;
    let parts = room::<f32>(device, plan.parts.max(1) * width)?;
    let count = plan.pieces.len();
    launch!(device, EMBEDDING, format!("sum_pieces_{}_v{v}", Y::SUFFIX), by_rows(count, width / v);
        address, positions.as_view(), pieces.as_view(), gradient.as_view(), parts.as_view(),
        count as u32, width as u32);
    for parted in plan.parted.chunks(MOST_BLOCKS) {
        let config = LaunchConfig {
            grid_dim: (width.div_ceil(LANES) as u32, parted.len() as u32, 1),
            block_dim: (LANES as u32, THREADS / LANES as u32, 1),
            shared_mem_bytes: 0,
        };
        let parted = device.clone_htod(parted)?;
        launch!(device, EMBEDDING, "sum_parts", config;
            parts.as_view(), parted.as_view(), gradient.as_view(), width as u32);
    }
    Ok(gpu::tensor(gradient, device, table.shape()))
}
