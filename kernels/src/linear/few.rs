//! Products of a few rows on a GPU: launches of `cuda/few_rows.cu`.

use super::OP;
use crate::cuda_module::{Module, Slice, launch, module, room};
use crate::gpu::{self, Locked};
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{DType, Result, Tensor};
use half::bf16;

const FEW_ROWS: Module = module!("few_rows");
/// More rows are worth tensor cores.
const MOST_ROWS: usize = 8;
/// Columns of the result of a block, a warp each.
const COLUMNS: u32 = 4;
const WARP: u32 = 32;
/// Elements that a lane reads at once.
const AT_ONCE: usize = 8;

/// `x W^T` [.., O] for `weight` [O, I], or of a weight [2 O, I] the activated product of both halves; none where it is not for
/// these kernels.
pub(super) fn product(x: &Tensor, weight: &Tensor, glu: bool) -> Result<Option<Tensor>> {
    let (output, input) = weight.dims2()?;
    let rows = x.elem_count() / input.max(1);
    let is_bf16 = x.dtype() == DType::BF16 && weight.dtype() == DType::BF16;
    if !(x.device().is_cuda() && is_bf16 && (1..=MOST_ROWS).contains(&rows))
        || input % AT_ONCE != 0
        || output * input == 0
    {
        return Ok(None);
    }
    let output = if glu { output / 2 } else { output };
    let device = x.device().as_cuda_device()?;
    let y: Slice<bf16> = room(device, rows * output)?;
    {
        let (x, weight) = (Locked::new(OP, x), Locked::new(OP, weight));
        let (x, weight) = (x.address()?.0, weight.address()?.0);
        if x % 16 != 0 || weight % 16 != 0 {
            return Ok(None);
        }
        let name = match glu {
            true => format!("few_glu_{}", rows.next_power_of_two()),
            false => format!("few_rows_{}", rows.next_power_of_two()),
        };
        let config = LaunchConfig {
            grid_dim: ((output as u32).div_ceil(COLUMNS), 1, 1),
            block_dim: (COLUMNS * WARP, 1, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, FEW_ROWS, name, config;
            x, weight, y.as_view(), rows as u32, output as u32, input as u32);
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = output;
    }
    Ok(Some(gpu::tensor(y, device, &dims.into())))
}
