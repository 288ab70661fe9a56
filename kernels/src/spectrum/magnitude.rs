//! Magnitude of packed complex numbers, in one pass forward and backward.
//!
//! ```text
//! y = sqrt(re^2 + im^2 + 1e-12)      dre = dy re / y      dim = dy im / y
//! ```
//!
//! The small term keeps the gradient finite in silence; it is 120 dB below a bin of magnitude one.

use crate::pass::{self, Pass, forward};
use crate::scalar::{Real, rows_per_task, wide};
use crate::tape::{self, Needs};
use candle_core::{CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

const FLOOR: f64 = 1e-12;

#[derive(Clone, Copy, Debug)]
struct Magnitude {
    bins: usize,
}

/// Gradient of [`Magnitude`] from x, y and dy.
#[derive(Clone, Copy, Debug)]
struct MagnitudeBackward {
    bins: usize,
}

/// `packed` [.., 2 bins], real parts first, to magnitudes [.., bins].
pub(super) fn magnitude(packed: &Tensor, bins: usize) -> Result<Tensor> {
    tape::apply1(&packed.contiguous()?, Magnitude { bins }, Needs::EVERYTHING)
}

impl Magnitude {
    fn output(&self, packed: &Layout) -> Shape {
        let mut dims = packed.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.bins;
        }
        Shape::from(dims)
    }
}

impl CustomOp1 for Magnitude {
    forward!(1: x x_layout);

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let grads = pass::tensors(&MagnitudeBackward { bins: self.bins }, [x, y, dy], &[x.shape()])?;
        Ok(Some(pass::single(grads)))
    }
}

impl Pass<1> for Magnitude {
    const NAME: &'static str = "magnitude";

    fn cpu<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<Vec<T>> {
        let (bins, floor) = (self.bins, T::from_f64(FLOOR));
        let rows = rows_per_task(2 * bins);
        let mut y = vec![T::zero(); x.len() / 2];
        y.par_chunks_mut(rows * bins)
            .zip(x.par_chunks(rows * 2 * bins))
            .for_each(|(y, x)| {
                wide(|| {
                    for (y, x) in y.chunks_exact_mut(bins).zip(x.chunks_exact(2 * bins)) {
                        let (re, im) = x.split_at(bins);
                        for ((y, &re), &im) in y.iter_mut().zip(re).zip(im) {
                            *y = (re * re + im * im + floor).root();
                        }
                    }
                });
            });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 1],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::magnitude(self.bins, FLOOR as f32, device, operands)
    }
}

impl Pass<3> for MagnitudeBackward {
    const NAME: &'static str = "magnitude backward";

    fn cpu<T: Real>(&self, [x, y, dy]: [&[T]; 3]) -> Vec<Vec<T>> {
        let bins = self.bins;
        let rows = rows_per_task(2 * bins);
        let mut dx = vec![T::zero(); x.len()];
        let tasks = dx
            .par_chunks_mut(rows * 2 * bins)
            .zip(x.par_chunks(rows * 2 * bins));
        let tasks = tasks
            .zip(y.par_chunks(rows * bins))
            .zip(dy.par_chunks(rows * bins));
        tasks.for_each(|(((dx, x), y), dy)| {
            wide(|| {
                let pairs = dx.chunks_exact_mut(2 * bins).zip(x.chunks_exact(2 * bins));
                for (((dx, x), y), dy) in pairs.zip(y.chunks_exact(bins)).zip(dy.chunks_exact(bins)) {
                    let ((dre, dim), (re, im)) = (dx.split_at_mut(bins), x.split_at(bins));
                    let parts = dre.iter_mut().zip(dim).zip(re).zip(im);
                    for ((((dre, dim), &re), &im), (&y, &dy)) in parts.zip(y.iter().zip(dy)) {
                        let share = dy / y;
                        *dre = share * re;
                        *dim = share * im;
                    }
                }
            });
        });
        vec![dx]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        operands: [super::cuda::View<'_, T>; 3],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::magnitude_backward(self.bins, device, operands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, values};

    #[test]
    fn values_gradients_and_silence() -> Result<()> {
        let x = Tensor::new(&[[3f64, 0.0, 5.0, 4.0, 0.0, 12.0]], x_device())?;
        let y = values(&magnitude(&x, 3)?);
        assert!(
            y.iter()
                .zip([5.0, 1e-6, 13.0])
                .all(|(a, b)| (a - b).abs() < 1e-12),
            "{y:?}"
        );
        check_gradients(&[normal(1, &[3, 10])], |t| magnitude(&t[0], 5))?;
        check_precision(&[normal(1, &[63, 66])], |t| magnitude(&t[0], 33), 1e-6)?;
        check_threads(&[normal(1, &[100, 514])], |t| magnitude(&t[0], 257))?;
        let silence = candle_core::Var::zeros((2, 6), candle_core::DType::F32, x_device())?;
        let grads = magnitude(&silence, 3)?.sum_all()?.backward()?;
        assert!(
            values(grads.get(&silence).expect("a gradient"))
                .iter()
                .all(|&g| g == 0.0)
        );
        Ok(())
    }

    fn x_device() -> &'static candle_core::Device {
        &candle_core::Device::Cpu
    }
}
