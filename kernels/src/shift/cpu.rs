//! Token shift on the processor: a few block copies for each token.

use super::{AXES, TokenShift};
use crate::pass::Pass;
use crate::scalar::{Real, rows_per_task};
use rayon::prelude::*;

impl Pass<1> for TokenShift {
    const NAME: &'static str = "token_shift";

    fn cpu<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<Vec<T>> {
        let (width, group) = (self.channels, self.group());
        let mut axes = [(1, 1); AXES];
        for (slot, axis) in axes.iter_mut().zip(self.strides()) {
            *slot = axis;
        }
        let axes = &axes[..self.axes];
        let rows = rows_per_task(width);
        let mut y = vec![T::zero(); x.len()];
        y.par_chunks_mut(rows * width).enumerate().for_each(|(task, y)| {
            for (row, y) in y.chunks_exact_mut(width).enumerate() {
                let row = task * rows + row;
                for (axis, &(stride, length)) in axes.iter().enumerate() {
                    let at = row / stride % length;
                    for side in 0..2 {
                        let channels = (2 * axis + side) * group..(2 * axis + side + 1) * group;
                        let from_before = (side == 0) != self.reverse;
                        let from = match from_before {
                            true if at > 0 => row - stride,
                            false if at + 1 < length => row + stride,
                            _ => continue,
                        };
                        let source = &x[from * width..(from + 1) * width];
                        y[channels.clone()].copy_from_slice(&source[channels]);
                    }
                }
                let rest = 2 * axes.len() * group..width;
                y[rest.clone()].copy_from_slice(&x[row * width..(row + 1) * width][rest]);
            }
        });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        [x]: [super::cuda::View<'_, T>; 1],
    ) -> candle_core::Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::token_shift(self, device, &x)
    }
}
