//! Rows by number on a GPU: launches of `cuda/embedding.cu`.

use super::{Ids, OP};
use crate::autograd::Value;
use crate::cuda_module::{Module, Slice, THREADS, by_rows, launch, module, pointer, room, zeros};
use crate::gpu::{self, Locked};
use crate::graph;
use crate::pass::CudaReal;
use crate::upload::Uploader;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{Device, Result, Tensor};

const EMBEDDING: Module = module!("embedding");
/// Most positions of a piece.
const PIECE: usize = 32;
/// Columns of a block of `sum_parts`, and most of its second axis.
const LANES: usize = 32;
const MOST_BLOCKS: usize = 65_535;

/// Of a piece or an id in parts that is none: tables have a length that depends on the number of ids only.
const NONE: u32 = u32::MAX;
/// Numbers of a `Piece` of the kernels: first, last, target, whether that is a part.
const PIECE_NUMBERS: usize = 4;
/// Numbers of a `Parted` of the kernels: row, first, last.
const PARTED_NUMBERS: usize = 3;

/// Ids and their order in memory of a GPU, of type u32. Lengths follow from the number of ids and of rows.
#[derive(Debug)]
pub(super) struct Placed {
    /// Rows in the order of the ids.
    rows: Tensor,
    /// Positions by id.
    positions: Tensor,
    /// Who adds what: pieces of bounded length.
    pieces: Tensor,
    /// Ids of more than one piece.
    parted: Tensor,
}

/// Most pieces, ids in parts, and parts of them, of `count` ids of a table of `rows` rows.
fn most(count: usize, rows: usize) -> [usize; 3] {
    let parted = count / (PIECE + 1);
    [count / PIECE + count.min(rows), parted, count / PIECE + parted]
}

impl Placed {
    pub(super) fn upload(ids: &Ids, uploader: &mut Uploader) -> Result<Self> {
        let (pieces, parted) = plan(ids);
        let mut upload = |numbers: Vec<u32>| {
            let count = numbers.len();
            uploader.upload(&Tensor::from_vec(numbers, count, &Device::Cpu)?)
        };
        Ok(Self {
            rows: upload(ids.list().to_vec())?,
            positions: upload(ids.order().positions.clone())?,
            pieces: upload(pieces)?,
            parted: upload(parted)?,
        })
    }

    fn all(&self) -> [&Tensor; 4] {
        [&self.rows, &self.positions, &self.pieces, &self.parted]
    }

    /// The same in memory of its own.
    pub(super) fn copied(&self) -> Result<Self> {
        Ok(Self {
            rows: self.rows.copy()?,
            positions: self.positions.copy()?,
            pieces: self.pieces.copy()?,
            parted: self.parted.copy()?,
        })
    }

    /// Writes it over `to`.
    pub(super) fn copy_to(&self, to: &Self) -> Result<()> {
        for (from, to) in self.all().into_iter().zip(to.all()) {
            graph::copy(from, to)?;
        }
        Ok(())
    }
}

/// Pieces, and ids of more than one of them, as the kernels read them.
fn plan(ids: &Ids) -> (Vec<u32>, Vec<u32>) {
    let [most_pieces, most_parted, _] = most(ids.list().len(), ids.rows());
    let mut pieces = Vec::with_capacity(most_pieces * PIECE_NUMBERS);
    let mut parted = Vec::with_capacity(most_parted.max(1) * PARTED_NUMBERS);
    let mut parts = 0;
    for segment in &ids.order().segments {
        let whole = segment.last - segment.first <= PIECE as u32;
        let before = parts;
        for first in (segment.first..segment.last).step_by(PIECE) {
            let last = (first + PIECE as u32).min(segment.last);
            let target = if whole { segment.row } else { parts };
            pieces.extend([first, last, target, u32::from(!whole)]);
            parts += u32::from(!whole);
        }
        if !whole {
            parted.extend([segment.row, before, parts]);
        }
    }
    pieces.resize(most_pieces * PIECE_NUMBERS, NONE);
    parted.resize(most_parted.max(1) * PARTED_NUMBERS, NONE);
    (pieces, parted)
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
    let y = if let Some(placed) = ids.placed() {
        gathered::<X, Y>(table, Locked::new(OP, &placed.rows).start()?, ids.list().len())?
    } else {
        let rows = device.clone_htod(ids.list())?;
        gathered::<X, Y>(table, pointer(device, Some(&rows.as_view())), ids.list().len())?
    };
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
    let here;
    let placed = if let Some(placed) = ids.placed() {
        placed
    } else {
        here = Placed::upload(ids, &mut Uploader::new(table.device()))?;
        &here
    };
    let [most_pieces, most_parted, most_parts] = most(ids.list().len(), rows);
    let grad = Locked::new(OP, grad);
    let address = grad.start()?;
    let v = vector(width, size_of::<Y>(), address);
    let gradient = zeros::<f32>(device, rows * width)?;
    let parts = room::<f32>(device, most_parts.max(1) * width)?;
    let (positions, pieces) = (
        Locked::new(OP, &placed.positions).start()?,
        Locked::new(OP, &placed.pieces).start()?,
    );
    launch!(device, EMBEDDING, format!("sum_pieces_{}_v{v}", Y::SUFFIX), by_rows(most_pieces, width / v);
        address, positions, pieces, gradient.as_view(), parts.as_view(), most_pieces as u32, width as u32);
    for first in (0..most_parted).step_by(MOST_BLOCKS) {
        let config = LaunchConfig {
            grid_dim: (
                width.div_ceil(LANES) as u32,
                (most_parted - first).min(MOST_BLOCKS) as u32,
                1,
            ),
            block_dim: (LANES as u32, THREADS / LANES as u32, 1),
            shared_mem_bytes: 0,
        };
        let parted = placed.parted.narrow(0, first * PARTED_NUMBERS, PARTED_NUMBERS)?;
        launch!(device, EMBEDDING, "sum_parts", config;
            parts.as_view(), Locked::new(OP, &parted).start()?, gradient.as_view(), width as u32);
    }
    Ok(gpu::tensor(gradient, device, table.shape()))
}
