//! The moving average of weights, in place: one pass, one launch.
//!
//! ```text
//! average += share (value - average)
//! ```

use crate::error::OpError;
use crate::scalar::wide;
use candle_core::{CpuStorage, Error, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

const OP: &str = "move_average";
/// Elements of one task.
const BLOCK: usize = 16 * 1024;

/// Moves `average` towards `value` by `share` of their difference. Both are contiguous f32 of one shape and device.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn move_average(average: &Tensor, value: &Tensor, share: f64) -> Result<()> {
    if value.dims() != average.dims() {
        return Err(OpError::shape(OP, "value", value, format!("{:?} like average", average.dims())).into());
    }
    average.inplace_op2(&value.contiguous()?, &Move(share as f32))
}

struct Move(f32);

fn misfit() -> Error {
    Error::Msg(format!("{OP}: operands are not contiguous f32 of one device"))
}

impl InplaceOp2 for Move {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        average: &mut CpuStorage,
        average_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<()> {
        let (CpuStorage::F32(average), CpuStorage::F32(value)) = (average, value) else {
            return Err(misfit());
        };
        let (Some((start, end)), Some((from, to))) = (
            average_layout.contiguous_offsets(),
            value_layout.contiguous_offsets(),
        ) else {
            return Err(misfit());
        };
        let share = self.0;
        average[start..end]
            .par_chunks_mut(BLOCK)
            .zip(value[from..to].par_chunks(BLOCK))
            .for_each(|(average, value)| {
                wide(|| {
                    for (average, &value) in average.iter_mut().zip(value) {
                        *average += share * (value - *average);
                    }
                });
            });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        average: &mut candle_core::CudaStorage,
        average_layout: &Layout,
        value: &candle_core::CudaStorage,
        value_layout: &Layout,
    ) -> Result<()> {
        use crate::cuda_module::{flat, launch, module};
        use candle_core::backend::BackendStorage;
        let device = value.device();
        let value = crate::pass::view::<f32>(OP, value, value_layout)?;
        let average = crate::pass::view::<f32>(OP, average, average_layout)?;
        let count = value.len();
        launch!(device, module!("adamw"), "move_average", flat(count); average, value, self.0, count as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn moves_by_the_share() -> Result<()> {
        let average = Tensor::new(&[[1.0f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let value = Tensor::new(&[[3.0f32, 2.0], [1.0, 8.0]], &Device::Cpu)?;
        move_average(&average, &value, 0.25)?;
        assert_eq!(average.to_vec2::<f32>()?, [[1.5, 2.0], [2.5, 5.0]]);
        assert!(move_average(&average, &value.flatten_all()?, 0.5).is_err());
        assert!(move_average(&average, &value.to_dtype(candle_core::DType::F64)?, 0.5).is_err());
        Ok(())
    }
}
