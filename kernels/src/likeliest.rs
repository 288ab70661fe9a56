//! The largest of each row, where a model's next token is the likeliest one: a few bytes come back from a GPU instead of all logits.

use crate::error::OpError;
use candle_core::{CpuStorage, DType, Result, Storage, Tensor};

const OP: &str = "likeliest";

/// The place of the largest of the first `among` elements of each row of `x` [R, W], the first of equal ones; none for a row
/// with an element among them that is no finite number.
///
/// f32 on the CPU, f32 or bf16 on CUDA, which is waited for.
///
/// # Errors
/// If a shape or an element type does not fit, or `among` is 0 or more than W.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::likeliest::likeliest;
/// let x = Tensor::new(&[[0f32, 2.0, 2.0, 9.0], [1.0, f32::NAN, 0.0, 0.0]], &Device::Cpu)?;
/// assert_eq!(likeliest(&x, 3)?, [Some(1), None]);
/// # candle_core::Result::Ok(())
/// ```
pub fn likeliest(x: &Tensor, among: usize) -> Result<Vec<Option<u32>>> {
    let &[_, width] = x.dims() else {
        return Err(OpError::shape(OP, "x", x, "[R, W]").into());
    };
    if among == 0 || among > width || width > u32::MAX as usize {
        return Err(OpError::value(OP, "among", among, format!("1 to {width}, the width of x")).into());
    }
    let x = x.contiguous()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16) {
        return cuda::likeliest(&x, among);
    }
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(data)) => {
            let rows = data[layout.start_offset()..][..x.elem_count()].chunks_exact(width);
            Ok(rows.map(|row| first_largest(&row[..among])).collect())
        }
        _ => Err(unsupported(&x).into()),
    }
}

fn unsupported(x: &Tensor) -> OpError {
    let (device, supported) = match x.device().is_cuda() {
        true => ("CUDA", "f32, bf16"),
        false => ("the CPU", "f32"),
    };
    let found: DType = x.dtype();
    OpError::DType {
        op: OP,
        field: "x",
        found,
        device,
        supported,
    }
}

/// The place of the largest element, the first of equal ones; none where one is not finite, or there are none.
pub fn first_largest(row: &[f32]) -> Option<u32> {
    if row.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&x| x == most).map(|at| at as u32)
}

#[cfg(feature = "cuda")]
mod cuda {
    //! A launch of `cuda/few_rows.cu`.

    use super::OP;
    use crate::cuda_module::{Module, Slice, launch, module, room};
    use crate::gpu::{self, Locked};
    use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
    use candle_core::{DType, Result, Tensor};

    const FEW_ROWS: Module = module!("few_rows");
    /// Most threads of a block, which reads a row.
    const MOST_THREADS: usize = 1024;
    /// What the kernel says of a row with elements that are not finite.
    const NONE: u32 = u32::MAX;

    pub(super) fn likeliest(x: &Tensor, among: usize) -> Result<Vec<Option<u32>>> {
        let (rows, width) = x.dims2()?;
        if rows == 0 {
            return Ok(Vec::new());
        }
        let device = x.device().as_cuda_device()?;
        let chosen: Slice<u32> = room(device, rows)?;
        {
            let x_data = Locked::new(OP, x);
            let config = LaunchConfig {
                grid_dim: (rows as u32, 1, 1),
                block_dim: (among.next_power_of_two().clamp(32, MOST_THREADS) as u32, 1, 1),
                shared_mem_bytes: 0,
            };
            let name = match x.dtype() {
                DType::BF16 => "likeliest_bf16",
                _ => "likeliest_f32",
            };
            launch!(device, FEW_ROWS, name, config;
                x_data.address()?.0, chosen.as_view(), width as u32, among as u32);
        }
        let chosen: Vec<u32> = gpu::tensor(chosen, device, &rows.into()).to_vec1()?;
        Ok(chosen.into_iter().map(|at| (at != NONE).then_some(at)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_first_of_the_largest_is_found() -> Result<()> {
        let cpu = &Device::Cpu;
        let x = Tensor::new(&[[3f32, -1.0, 3.0], [-5.0, -4.0, f32::INFINITY]], cpu)?;
        assert_eq!(likeliest(&x, 3)?, [Some(0), None]);
        assert_eq!(likeliest(&x, 2)?, [Some(0), Some(1)]);
        let turned = likeliest(&x.t()?, 2)?;
        assert_eq!(turned, [Some(0), Some(0), None]);
        let message = |result: Result<Vec<Option<u32>>>| result.unwrap_err().to_string();
        assert_eq!(
            message(likeliest(&x, 4)),
            "likeliest: among is 4, expected 1 to 3, the width of x"
        );
        assert!(message(likeliest(&x.get(0)?, 1)).contains("[R, W]"));
        let wide = x.to_dtype(DType::F64)?;
        assert!(message(likeliest(&wide, 1)).contains("F64"));
        Ok(())
    }
}
