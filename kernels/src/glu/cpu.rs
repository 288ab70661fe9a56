//! Gated linear units on the processor: one sweep of vector code, tasks of whole rows.

use super::{Gated, GatedBackward, SwiGlu, SwiGluBackward};
use crate::pass::Pass;
use crate::scalar::{Real, rows_per_task, wide};
use rayon::prelude::*;

impl Pass<1> for SwiGlu {
    const NAME: &'static str = "swiglu";

    fn cpu<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<Vec<T>> {
        let half = self.half;
        let rows = rows_per_task(2 * half);
        let mut y = vec![T::zero(); x.len() / 2];
        y.par_chunks_mut(rows * half)
            .zip(x.par_chunks(rows * 2 * half))
            .for_each(|(y, x)| {
                wide(|| {
                    for (y, x) in y.chunks_exact_mut(half).zip(x.chunks_exact(2 * half)) {
                        let (a, b) = x.split_at(half);
                        for ((y, &a), &b) in y.iter_mut().zip(a).zip(b) {
                            *y = a * a.sigmoid() * b;
                        }
                    }
                });
            });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 1],
    ) -> candle_core::Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::swiglu(self.half, device, operands)
    }
}

impl Pass<2> for SwiGluBackward {
    const NAME: &'static str = "swiglu backward";

    fn cpu<T: Real>(&self, [x, dy]: [&[T]; 2]) -> Vec<Vec<T>> {
        let half = self.half;
        let rows = rows_per_task(2 * half);
        let mut dx = vec![T::zero(); x.len()];
        let y = self.along.then(|| SwiGlu { half }.cpu([x]));
        let tasks = dx
            .par_chunks_mut(rows * 2 * half)
            .zip(x.par_chunks(rows * 2 * half));
        tasks.zip(dy.par_chunks(rows * half)).for_each(|((dx, x), dy)| {
            wide(|| {
                let pairs = dx.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half));
                for ((dx, x), dy) in pairs.zip(dy.chunks_exact(half)) {
                    let ((da, db), (a, b)) = (dx.split_at_mut(half), x.split_at(half));
                    for ((((da, db), &a), &b), &dy) in da.iter_mut().zip(db).zip(a).zip(b).zip(dy) {
                        let s = a.sigmoid();
                        *da = dy * b * s * (T::one() + a * (T::one() - s));
                        *db = dy * a * s;
                    }
                }
            });
        });
        [vec![dx], y.unwrap_or_default()].concat()
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 2],
    ) -> candle_core::Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::swiglu_backward(*self, device, operands)
    }
}

impl Pass<2> for Gated {
    const NAME: &'static str = "gated";

    fn cpu<T: Real>(&self, [x, gate]: [&[T]; 2]) -> Vec<Vec<T>> {
        let task = rows_per_task(1);
        let mut y = vec![T::zero(); x.len()];
        let tasks = y
            .par_chunks_mut(task)
            .zip(x.par_chunks(task))
            .zip(gate.par_chunks(task));
        tasks.for_each(|((y, x), gate)| {
            wide(|| {
                for ((y, &x), &gate) in y.iter_mut().zip(x).zip(gate) {
                    *y = x * gate.sigmoid();
                }
            });
        });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 2],
    ) -> candle_core::Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::gated(device, operands)
    }
}

impl Pass<3> for GatedBackward {
    const NAME: &'static str = "gated backward";

    fn cpu<T: Real>(&self, [x, gate, dy]: [&[T]; 3]) -> Vec<Vec<T>> {
        let task = rows_per_task(1);
        let (mut dx, mut dgate) = (vec![T::zero(); x.len()], vec![T::zero(); x.len()]);
        let results = dx.par_chunks_mut(task).zip(dgate.par_chunks_mut(task));
        let operands = x
            .par_chunks(task)
            .zip(gate.par_chunks(task))
            .zip(dy.par_chunks(task));
        results.zip(operands).for_each(|((dx, dgate), ((x, gate), dy))| {
            wide(|| {
                for ((((dx, dgate), &x), &gate), &dy) in dx.iter_mut().zip(dgate).zip(x).zip(gate).zip(dy) {
                    let s = gate.sigmoid();
                    *dx = dy * s;
                    *dgate = dy * x * s * (T::one() - s);
                }
            });
        });
        vec![dx, dgate]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 3],
    ) -> candle_core::Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::gated_backward(device, operands)
    }
}
