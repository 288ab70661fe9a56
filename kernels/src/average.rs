//! The moving average of weights, in place: one pass, one launch.
//!
//! ```text
//! average += share (value - average)
//! ```
//!
//! [`follow`] does so for all weights of a model after a step, with the share of step number `t`, unless the norm of its
//! gradients was not finite:
//!
//! ```text
//! share = 1 - min(decay, t / (memory + t - 1))
//! ```

use crate::adamw::Clip;
use crate::error::OpError;
use crate::scalar::wide;
use candle_core::{CpuStorage, DType, Error, InplaceOp2, Layout, Result, Tensor};
use rayon::prelude::*;

const OP: &str = "move_average";
/// Elements of one task.
const BLOCK: usize = 16 * 1024;

/// Moves `average` towards `value` by `share` of their difference. Both are contiguous f32 of one shape and device.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn move_average(average: &Tensor, value: &Tensor, share: f64) -> Result<()> {
    average.inplace_op2(&shaped_like(average, value)?, &Move(share as f32))
}

/// Moves each `(average, value)` after the step of `clip`: as [`move_average`], with the share that follows from the number
/// of steps made, and not at all where this one was skipped. An average forgets with `decay`, which is in [0, 1]; early on
/// faster, so that after `t` steps it has the memory of a `memory`th of them. With a `memory` of 1 the share is constant.
///
/// On a GPU it is one launch, and nothing waits for it.
///
/// # Errors
/// If a setting, a shape, an element type or a device does not fit.
pub fn follow(pairs: &[(&Tensor, &Tensor)], decay: f64, memory: f64, clip: &Clip) -> Result<()> {
    const OP: &str = "follow";
    if !(0.0..=1.0).contains(&decay) {
        return Err(OpError::value(OP, "decay", decay, "0 to 1").into());
    }
    if !(memory.is_finite() && memory >= 1.0) {
        return Err(OpError::value(OP, "memory", memory, "a number of at least 1").into());
    }
    let mut dense = Vec::with_capacity(pairs.len());
    for &(average, value) in pairs {
        for tensor in [average, value] {
            let fits = tensor.dtype() == DType::F32 && tensor.device().same_device(clip.norm().device());
            if !fits || !average.is_contiguous() {
                return Err(misfit(OP));
            }
        }
        if average.elem_count() > 0 {
            dense.push((average, shaped_like(average, value)?));
        }
    }
    if dense.is_empty() {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if clip.norm().device().is_cuda() {
        return crate::adamw::follow(OP, &dense, decay, memory, clip);
    }
    if !clip.factor().to_vec1::<f32>()?[0].is_finite() {
        return Ok(());
    }
    let before = f64::from(clip.made()?) - 1.0;
    let share = 1.0 - decay.min((1.0 + before) / (memory + before));
    dense
        .iter()
        .try_for_each(|(average, value)| average.inplace_op2(value, &Move(share as f32)))
}

/// `value` in order, if it has the shape of `average`.
fn shaped_like(average: &Tensor, value: &Tensor) -> Result<Tensor> {
    if value.dims() != average.dims() {
        return Err(OpError::shape(OP, "value", value, format!("{:?} like average", average.dims())).into());
    }
    value.contiguous()
}

struct Move(f32);

fn misfit(op: &str) -> Error {
    Error::Msg(format!("{op}: operands are not contiguous f32 of one device"))
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
            return Err(misfit(OP));
        };
        let (Some((start, end)), Some((from, to))) = (
            average_layout.contiguous_offsets(),
            value_layout.contiguous_offsets(),
        ) else {
            return Err(misfit(OP));
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
        assert!(move_average(&average, &value.to_dtype(DType::F64)?, 0.5).is_err());
        Ok(())
    }

    #[test]
    fn followers_that_do_not_fit_are_refused() -> Result<()> {
        let average = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
        let clip = crate::adamw::Clipper::new(None, &Device::Cpu)?.measure(&[&average])?;
        let message = |value: &Tensor, decay, memory| {
            let found = follow(&[(&average, value)], decay, memory, &clip);
            found.unwrap_err().to_string()
        };
        assert_eq!(
            message(&average, 1.5, 1.0),
            "follow: decay is 1.5, expected 0 to 1"
        );
        assert_eq!(
            message(&average, 0.5, 0.0),
            "follow: memory is 0, expected a number of at least 1"
        );
        let turned = Tensor::new(&[[1f32, 2.0]], &Device::Cpu)?;
        assert!(message(&turned, 0.5, 1.0).contains("value has shape [1, 2]"));
        let wide = average.to_dtype(DType::F64)?;
        assert!(message(&wide, 0.5, 1.0).contains("not contiguous f32 of one device"));
        assert_eq!(average.to_vec1::<f32>()?, [1.0, 2.0]);
        Ok(())
    }
}
