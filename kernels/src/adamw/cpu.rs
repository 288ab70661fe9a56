//! The optimiser on the processor: plain vector loops over blocks of fixed size.

use super::{GradientScale, OP, Slot, Step, different_devices};
use crate::pass::slice;
use crate::scalar::wide;
use candle_core::{CpuStorage, Error, InplaceOp2, Layout, Result, Storage, StorageRef};
use half::bf16;
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 16 * 1024;

/// What gradients and moments consist of.
trait Element: Copy + Send + Sync {
    fn widen(self) -> f32;
    fn round(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(x: f32) -> Self {
        x
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        // bf16 is the upper half of a float.
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// The elements of a contiguous tensor, of the two types that there are.
enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Elements<'a> {
    fn of(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(data), Some((start, end))) => Ok(Self::F32(&data[start..end])),
            (CpuStorage::BF16(data), Some((start, end))) => Ok(Self::Bf16(&data[start..end])),
            _ => Err(Error::RequiresContiguous { op }),
        }
    }
}

/// The elements that a step changes.
enum ElementsMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

impl<'a> ElementsMut<'a> {
    fn of(op: &'static str, storage: &'a mut CpuStorage, layout: &Layout) -> Result<Self> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(data), Some((start, end))) => Ok(Self::F32(&mut data[start..end])),
            (CpuStorage::BF16(data), Some((start, end))) => Ok(Self::Bf16(&mut data[start..end])),
            _ => Err(Error::RequiresContiguous { op }),
        }
    }
}

/// Steps on all slots, one after another; each is shared among threads.
pub(super) fn step(slots: &[Slot], step: &Step, scale: GradientScale) -> Result<()> {
    let scale = match scale {
        GradientScale::Host(scale) => scale as f32,
        GradientScale::Device(scale) => scale.flatten_all()?.to_vec1::<f32>()?[0],
    };
    if !scale.is_finite() {
        return Ok(());
    }
    for slot in slots {
        let moments = MomentUpdate { step: *step, scale };
        slot.moments.inplace_op2(slot.gradient, &moments)?;
        slot.parameter
            .inplace_op2(slot.moments, &ParameterUpdate { step: *step })?;
        if let Some(rounded) = slot.rounded {
            rounded.inplace_op2(slot.parameter, &Rounding)?;
        }
    }
    Ok(())
}

/// First part of a step: the moments from the gradient.
struct MomentUpdate {
    step: Step,
    scale: f32,
}

impl MomentUpdate {
    fn run<M: Element, G: Element>(&self, moments: &mut [M], gradient: &[G]) {
        let (Step { beta1, beta2, .. }, scale) = (self.step, self.scale);
        let (m, v) = moments.split_at_mut(gradient.len());
        let tasks = m
            .par_chunks_mut(BLOCK)
            .zip(v.par_chunks_mut(BLOCK))
            .zip(gradient.par_chunks(BLOCK));
        tasks.for_each(|((m, v), gradient)| {
            wide(|| {
                for ((m, v), &gradient) in m.iter_mut().zip(v).zip(gradient) {
                    let g = gradient.widen() * scale;
                    *m = M::round(beta1 * m.widen() + (1.0 - beta1) * g);
                    *v = M::round(beta2 * v.widen() + (1.0 - beta2) * g * g);
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
        let moments = ElementsMut::of(OP, moments, moments_layout)?;
        match (moments, Elements::of(OP, gradient, gradient_layout)?) {
            (ElementsMut::F32(moments), Elements::F32(gradient)) => self.run(moments, gradient),
            (ElementsMut::F32(moments), Elements::Bf16(gradient)) => self.run(moments, gradient),
            (ElementsMut::Bf16(moments), Elements::F32(gradient)) => self.run(moments, gradient),
            (ElementsMut::Bf16(moments), Elements::Bf16(gradient)) => self.run(moments, gradient),
        }
        Ok(())
    }
}

/// Second part of a step: the parameter from the moments.
struct ParameterUpdate {
    step: Step,
}

impl ParameterUpdate {
    fn run<M: Element>(&self, parameter: &mut [f32], moments: &[M]) {
        let Step {
            keep,
            rate,
            second,
            eps,
            ..
        } = self.step;
        let (m, v) = moments.split_at(parameter.len());
        let tasks = parameter
            .par_chunks_mut(BLOCK)
            .zip(m.par_chunks(BLOCK))
            .zip(v.par_chunks(BLOCK));
        tasks.for_each(|((parameter, m), v)| {
            wide(|| {
                for ((p, &m), &v) in parameter.iter_mut().zip(m).zip(v) {
                    *p = *p * keep - rate * m.widen() / ((v.widen() * second).sqrt() + eps);
                }
            });
        });
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
        let ElementsMut::F32(parameter) = ElementsMut::of(OP, parameter, parameter_layout)? else {
            return Err(Error::RequiresContiguous { op: OP });
        };
        match Elements::of(OP, moments, moments_layout)? {
            Elements::F32(moments) => self.run(parameter, moments),
            Elements::Bf16(moments) => self.run(parameter, moments),
        }
        Ok(())
    }
}

/// Last part of a step: the copy in bf16.
struct Rounding;

impl InplaceOp2 for Rounding {
    fn name(&self) -> &'static str {
        "adamw copy"
    }

    fn cpu_fwd(
        &self,
        rounded: &mut CpuStorage,
        rounded_layout: &Layout,
        parameter: &CpuStorage,
        parameter_layout: &Layout,
    ) -> Result<()> {
        let ElementsMut::Bf16(rounded) = ElementsMut::of(OP, rounded, rounded_layout)? else {
            return Err(Error::RequiresContiguous { op: OP });
        };
        let parameter = slice::<f32>(OP, parameter, parameter_layout)?;
        let tasks = rounded.par_chunks_mut(BLOCK).zip(parameter.par_chunks(BLOCK));
        tasks.for_each(|(rounded, parameter)| {
            for (rounded, &p) in rounded.iter_mut().zip(parameter) {
                *rounded = bf16::round(p);
            }
        });
        Ok(())
    }
}

/// Sum of squares of all tensors, in f64 within and over blocks of fixed size.
pub(super) fn squared_norm(tensors: &[(StorageRef<'_>, &Layout)]) -> Result<CpuStorage> {
    const OP: &str = "squared_norm";
    fn squares<E: Element>(elements: &[E]) -> f64 {
        let blocks: Vec<f64> = elements
            .par_chunks(BLOCK)
            .map(|block| {
                wide(|| {
                    let mut lanes = [0f64; 8];
                    for part in block.chunks(lanes.len()) {
                        for (lane, &x) in lanes.iter_mut().zip(part) {
                            *lane += f64::from(x.widen()) * f64::from(x.widen());
                        }
                    }
                    lanes.iter().sum::<f64>()
                })
            })
            .collect();
        blocks.iter().sum()
    }
    let mut sum = 0f64;
    for (storage, layout) in tensors {
        let Storage::Cpu(storage) = &**storage else {
            return Err(different_devices(OP));
        };
        sum += match Elements::of(OP, storage, layout)? {
            Elements::F32(elements) => squares(elements),
            Elements::Bf16(elements) => squares(elements),
        };
    }
    Ok(CpuStorage::F32(vec![sum as f32]))
}
