//! Rows and columns of a matrix: one row added to all, and the sum over rows that is its gradient.
//!
//! ```text
//! y_rc = x_rc + b_c          dx = dy          db_c = sum over r of dy_rc
//! ```
//!
//! Sums go through partial sums of fixed runs of rows, so that they have the same bits each time and for any number of
//! threads.

use crate::autograd::{Gradient, Value, attach2};
use crate::error::OpError;
use crate::scalar::{Real, rows_per_task};
use crate::tape::{Needs, Set};
#[cfg(feature = "cuda")]
use candle_core::DType;
use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use rayon::prelude::*;

/// Rows whose sum is taken by one task.
const ROWS_PER_PARTIAL: usize = 64;

/// Adds `row` [w1, .., wn] to every row of `x` [.., w1, .., wn].
///
/// Differentiable in both. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; `row` is of its type or f32. The result
/// has the type of `x`.
///
/// # Errors
/// If the shape of `row` is not the end of that of `x`, or an element type or a device does not fit.
pub fn add_row(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    const OP: &str = "add_row";
    if row.elem_count() == 0 || !x.dims().ends_with(row.dims()) {
        return Err(OpError::shape(OP, "row", row, format!("the end of {:?}", x.dims())).into());
    }
    let (x, row) = (x.contiguous()?, row.contiguous()?);
    let (a, b) = (x.detach(), row.detach());
    let value = if x.device().is_cuda() {
        on_cuda(&a, &b)?
    } else {
        let width = row.elem_count();
        let b = b.to_dtype(a.dtype())?.flatten_all()?;
        Value::Tensor(a.reshape(((), width))?.broadcast_add(&b)?.reshape(a.shape())?)
    };
    attach2(value, [&x, &row], AddRow)
}

struct AddRow;

impl Gradient<2> for AddRow {
    fn name(&self) -> &'static str {
        "add_row"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [_, row]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let drow = row
            .track_op()
            .then(|| {
                let rows = grad.contiguous()?.reshape(((), row.elem_count()))?;
                sum_rows(&rows)?.to_dtype(row.dtype())?.reshape(row.shape())
            })
            .transpose()?;
        Ok([Some(grad.clone()), drow])
    }
}

/// The sum over the rows of a contiguous `x` [R, C]: [C], in f64 for f64 and in f32 for all other types. No graph.
pub(crate) fn sum_rows(x: &Tensor) -> Result<Tensor> {
    sum_rows_of_groups(x, 1)?.squeeze(0)
}

/// The sums over the rows of `groups` equal groups of a contiguous `x` [groups R, C]: [groups, C].
pub(crate) fn sum_rows_of_groups(x: &Tensor, groups: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let x = x.detach();
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: "sum_rows" });
    };
    let shape = (groups, width);
    match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => {
            Tensor::from_vec(sums(&data[start..end], groups, width), shape, x.device())
        }
        Storage::Cpu(CpuStorage::F64(data)) => {
            Tensor::from_vec(sums(&data[start..end], groups, width), shape, x.device())
        }
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => {
            drop(storage);
            cuda::sum_rows(&x, groups, rows / groups, width)
        }
        _ => bail!(
            "sum_rows: found {:?} of {rows} rows, expected f32 or f64 on the CPU, f32 or bf16 on CUDA",
            x.dtype()
        ),
    }
}

fn sums<T: Real>(x: &[T], groups: usize, width: usize) -> Vec<T> {
    let rows = x.len() / width;
    let per_group = rows / groups;
    let runs = per_group.div_ceil(ROWS_PER_PARTIAL);
    let mut partials = vec![T::zero(); groups * runs * width];
    partials
        .par_chunks_mut(width)
        .with_min_len(rows_per_task(ROWS_PER_PARTIAL * width))
        .enumerate()
        .for_each(|(at, sums)| {
            let (group, run) = (at / runs, at % runs);
            let first = group * per_group + run * ROWS_PER_PARTIAL;
            let last = (first + ROWS_PER_PARTIAL).min((group + 1) * per_group);
            for row in x[first * width..last * width].chunks_exact(width) {
                for (sum, &value) in sums.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        });
    let mut totals = vec![T::zero(); groups * width];
    for (total, partials) in totals
        .chunks_exact_mut(width)
        .zip(partials.chunks_exact(runs * width))
    {
        for partial in partials.chunks_exact(width) {
            for (total, &part) in total.iter_mut().zip(partial) {
                *total += part;
            }
        }
    }
    totals
}

#[cfg(feature = "cuda")]
fn on_cuda(x: &Tensor, row: &Tensor) -> Result<Value> {
    cuda::add_row(x, &row.to_dtype(DType::F32)?.contiguous()?)
}

#[cfg(not(feature = "cuda"))]
fn on_cuda(x: &Tensor, _: &Tensor) -> Result<Value> {
    bail!(
        "add_row: {:?} in a build without the feature `cuda`",
        x.device().location()
    )
}

#[cfg(feature = "cuda")]
pub(crate) mod cuda {
    //! Launches of `cuda/rows.cu`.

    use crate::autograd::Value;
    use crate::cuda_module::{Module, Slice, THREADS, launch, module, room};
    use crate::error::OpError;
    use crate::gpu::{self, Locked};
    use crate::pass::CudaReal;
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
    use candle_core::{CudaDevice, DType, Result, Tensor};
    use half::bf16;

    /// The kernels of the file.
    pub(crate) const ROWS: Module = module!("rows");
    /// Threads of a block along the columns.
    const LANES: usize = 32;
    /// Fewest rows of a run.
    const ROWS_PER_RUN: usize = 32;
    /// Blocks that keep the GPU busy.
    const BLOCKS: usize = 2048;

    /// How a matrix of groups of rows falls into blocks.
    #[derive(Clone, Copy)]
    pub(crate) struct Runs {
        /// Rows of a block.
        pub(crate) rows_per_run: usize,
        /// Blocks along the rows of a group.
        pub(crate) runs: usize,
        /// The launch.
        pub(crate) config: LaunchConfig,
    }

    impl Runs {
        /// For vectors of `v` columns.
        pub(crate) fn new(groups: usize, rows_per_group: usize, width: usize, v: usize) -> Self {
            let across = width.div_ceil(LANES * v);
            let wanted = BLOCKS.div_ceil(across * groups).max(1);
            let rows_per_run = rows_per_group.div_ceil(wanted).max(ROWS_PER_RUN);
            let runs = rows_per_group.div_ceil(rows_per_run);
            Self {
                rows_per_run,
                runs,
                config: LaunchConfig {
                    grid_dim: (across as u32, runs as u32, groups as u32),
                    block_dim: (LANES as u32, THREADS / LANES as u32, 1),
                    shared_mem_bytes: 0,
                },
            }
        }
    }

    /// What kernel names say of a type.
    pub(crate) fn suffix(op: &'static str, tensor: &Tensor) -> Result<&'static str> {
        match tensor.dtype() {
            DType::F32 => Ok(f32::SUFFIX),
            DType::BF16 => Ok(bf16::SUFFIX),
            found => Err(OpError::DType {
                op,
                field: "operand",
                found,
                device: "CUDA",
                supported: "f32, bf16",
            }
            .into()),
        }
    }

    pub(super) fn sum_rows(x: &Tensor, groups: usize, rows: usize, width: usize) -> Result<Tensor> {
        const OP: &str = "sum_rows";
        let device = x.device().as_cuda_device()?;
        let suffix = suffix(OP, x)?;
        let operand = Locked::new(OP, x);
        let (address, aligned) = operand.address()?;
        let v = if aligned && width.is_multiple_of(4) { 4 } else { 1 };
        let runs = Runs::new(groups, rows, width, v);
        let partials = room::<f32>(device, groups * runs.runs * width)?;
        launch!(device, ROWS, format!("sum_rows_{suffix}_v{v}"), runs.config;
            address, partials.as_view(), width as u32, rows as u32, runs.rows_per_run as u32);
        let sums = sum_runs(device, &partials, groups, runs.runs, width)?;
        Ok(gpu::tensor(sums, device, &(groups, width).into()))
    }

    /// The sums over the runs of `partials` [groups, runs, width].
    pub(crate) fn sum_runs(
        device: &CudaDevice,
        partials: &Slice<f32>,
        groups: usize,
        runs: usize,
        width: usize,
    ) -> Result<Slice<f32>> {
        let sums = room::<f32>(device, groups * width)?;
        let config = LaunchConfig {
            grid_dim: (width.div_ceil(LANES) as u32, groups as u32, 1),
            block_dim: (LANES as u32, THREADS / LANES as u32, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, ROWS, "sum_runs", config;
            partials.as_view(), sums.as_view(), width as u32, runs as u32);
        Ok(sums)
    }

    pub(super) fn add_row(x: &Tensor, row: &Tensor) -> Result<Value> {
        match x.dtype() {
            DType::BF16 => typed_add_row::<bf16>(x, row),
            _ => typed_add_row::<f32>(x, row),
        }
    }

    fn typed_add_row<T: CudaReal>(x: &Tensor, row: &Tensor) -> Result<Value> {
        const OP: &str = "add_row";
        let device = x.device().as_cuda_device()?;
        let y = room::<T>(device, x.elem_count())?;
        let (width, row) = (row.elem_count(), Locked::new(OP, row));
        let count = x.elem_count();
        let x = Locked::new(OP, x);
        launch_add_row::<T>(device, count, x.address()?.0, (row.address()?.0, width), &y)?;
        Ok(gpu::value(y, device, x.shape()))
    }

    /// Writes `x + row` to `y`, which may be `x`; addresses of `count` elements and of a row of f32 with its width.
    pub(crate) fn launch_add_row<T: CudaReal>(
        device: &CudaDevice,
        count: usize,
        x: u64,
        (row, width): (u64, usize),
        y: &Slice<T>,
    ) -> Result<()> {
        let aligned = x.is_multiple_of(4 * size_of::<T>() as u64) && row.is_multiple_of(16);
        let v = if aligned && width.is_multiple_of(4) { 4 } else { 1 };
        let rows = count / width;
        let runs = Runs::new(1, rows, width, v);
        launch!(device, ROWS, format!("add_row_{}_v{v}", T::SUFFIX), runs.config;
            x, row, y.as_view(), rows as u32, width as u32);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, values};
    use candle_core::{DType, Device};

    #[test]
    fn adds_a_row_of_one_or_more_axes() -> Result<()> {
        let (x, row) = (normal(1, &[3, 4, 5]), normal(2, &[4, 5]));
        let wanted = values(&x.broadcast_add(&row)?);
        assert_eq!(values(&add_row(&x, &row)?), wanted);
        let row = normal(3, &[5]);
        assert_eq!(values(&add_row(&x, &row)?), values(&x.broadcast_add(&row)?));
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (x, row) in [(&[1, 1][..], &[1][..]), (&[3, 4, 5], &[4, 5]), (&[70, 3], &[3])] {
            check_gradients(&[normal(1, x), normal(2, row)], |t| add_row(&t[0], &t[1]))?;
        }
        check_precision(
            &[normal(1, &[500, 33]), normal(2, &[33])],
            |t| add_row(&t[0], &t[1]),
            1e-5,
        )?;
        check_threads(&[normal(1, &[3000, 33]), normal(2, &[33])], |t| {
            add_row(&t[0], &t[1])
        })
    }

    #[test]
    fn sums_of_groups_are_sums_of_their_rows() -> Result<()> {
        let x = normal(4, &[3 * 131, 7]);
        let wanted = values(&x.reshape((3, 131, 7))?.sum(1)?);
        let found = values(&sum_rows_of_groups(&x, 3)?);
        assert!(crate::testing::relative_rms(&found, &wanted) < 1e-14);
        Ok(())
    }

    #[test]
    fn a_row_that_does_not_fit_is_refused() {
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        let row = Tensor::zeros(2, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            add_row(&x, &row).unwrap_err().to_string(),
            "add_row: row has shape [2], expected the end of [2, 3]"
        );
    }
}
