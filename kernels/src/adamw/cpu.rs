//! The optimiser on the processor: plain vector loops over blocks of fixed size.

use super::{MomentUpdate, ParameterUpdate};
use crate::pass::slice;
use crate::scalar::wide;
use candle_core::{CpuStorage, Error, InplaceOp2, InplaceOp3, Layout, Result, Storage, StorageRef};
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 16 * 1024;

/// The elements of a contiguous result.
fn slice_mut<'a>(op: &'static str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        _ => Err(Error::RequiresContiguous { op }),
    }
}

impl MomentUpdate {
    fn run(&self, moments: &mut [f32], gradient: &[f32], scale: f32) {
        let Self { beta1, beta2, .. } = *self;
        let (m, v) = moments.split_at_mut(gradient.len());
        let tasks = m
            .par_chunks_mut(BLOCK)
            .zip(v.par_chunks_mut(BLOCK))
            .zip(gradient.par_chunks(BLOCK));
        tasks.for_each(|((m, v), gradient)| {
            wide(|| {
                for ((m, v), &gradient) in m.iter_mut().zip(v).zip(gradient) {
                    let g = gradient * scale;
                    *m = beta1 * *m + (1.0 - beta1) * g;
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                }
            });
        });
    }
}

impl InplaceOp2 for MomentUpdate {
    fn name(&self) -> &'static str {
        "adamw moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        moments_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        let op = InplaceOp2::name(self);
        let moments = slice_mut(op, moments, moments_layout)?;
        self.run(moments, slice(op, gradient, gradient_layout)?, self.scale);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        moments: &mut candle_core::CudaStorage,
        moments_layout: &Layout,
        gradient: &candle_core::CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<()> {
        self.run_cuda((moments, moments_layout), (gradient, gradient_layout), None)
    }
}

impl InplaceOp3 for MomentUpdate {
    fn name(&self) -> &'static str {
        "adamw moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        moments_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
        scale: &CpuStorage,
        scale_layout: &Layout,
    ) -> Result<()> {
        let op = InplaceOp3::name(self);
        let moments = slice_mut(op, moments, moments_layout)?;
        let scale = slice::<f32>(op, scale, scale_layout)?[0];
        self.run(moments, slice(op, gradient, gradient_layout)?, scale);
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        moments: &mut candle_core::CudaStorage,
        moments_layout: &Layout,
        gradient: &candle_core::CudaStorage,
        gradient_layout: &Layout,
        scale: &candle_core::CudaStorage,
        scale_layout: &Layout,
    ) -> Result<()> {
        let scale = Some((scale, scale_layout));
        self.run_cuda((moments, moments_layout), (gradient, gradient_layout), scale)
    }
}

impl InplaceOp2 for ParameterUpdate {
    fn name(&self) -> &'static str {
        "adamw parameter"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        parameter_layout: &Layout,
        moments: &CpuStorage,
        moments_layout: &Layout,
    ) -> Result<()> {
        let op = InplaceOp2::name(self);
        let parameter = slice_mut(op, parameter, parameter_layout)?;
        let (m, v) = slice::<f32>(op, moments, moments_layout)?.split_at(parameter.len());
        let Self {
            keep,
            rate,
            second,
            eps,
        } = *self;
        let tasks = parameter
            .par_chunks_mut(BLOCK)
            .zip(m.par_chunks(BLOCK))
            .zip(v.par_chunks(BLOCK));
        tasks.for_each(|((parameter, m), v)| {
            wide(|| {
                for ((p, &m), &v) in parameter.iter_mut().zip(m).zip(v) {
                    *p = *p * keep - rate * m / ((v * second).sqrt() + eps);
                }
            });
        });
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        parameter: &mut candle_core::CudaStorage,
        parameter_layout: &Layout,
        moments: &candle_core::CudaStorage,
        moments_layout: &Layout,
    ) -> Result<()> {
        self.run_cuda((parameter, parameter_layout), (moments, moments_layout))
    }
}

/// Sum of squares of all tensors, in f64 within and over blocks of fixed size.
pub(super) fn squared_norm(tensors: &[(StorageRef<'_>, &Layout)]) -> Result<CpuStorage> {
    const OP: &str = "squared_norm";
    let mut sum = 0f64;
    for (storage, layout) in tensors {
        let Storage::Cpu(storage) = &**storage else {
            return Err(Error::Msg(format!(
                "{OP}: tensors lie on different or unsupported devices"
            )));
        };
        let blocks: Vec<f64> = slice::<f32>(OP, storage, layout)?
            .par_chunks(BLOCK)
            .map(|block| {
                wide(|| {
                    let mut lanes = [0f64; 8];
                    for part in block.chunks(lanes.len()) {
                        for (lane, &x) in lanes.iter_mut().zip(part) {
                            *lane += f64::from(x) * f64::from(x);
                        }
                    }
                    lanes.iter().sum::<f64>()
                })
            })
            .collect();
        sum += blocks.iter().sum::<f64>();
    }
    Ok(CpuStorage::F32(vec![sum as f32]))
}
