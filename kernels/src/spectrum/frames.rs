//! Overlapping frames of a signal, and their overlap-add: each is the gradient of the other.
//!
//! ```text
//! frames       y[b, f, j] = x[b, f hop + j]
//! overlap-add  y[b, s]    = sum over f of x[b, f, s - f hop]      gathered by sample, so in a fixed order
//! ```

use crate::pass::{Pass, forward};
use crate::scalar::{Real, wide};
use crate::tape::{self, Needs, Set};
use candle_core::{CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// How frames lie in a signal of `samples`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Framing {
    pub(super) samples: usize,
    pub(super) frames: usize,
    pub(super) width: usize,
    pub(super) hop: usize,
}

/// [`Framing`] from signal to frames.
#[derive(Clone, Copy, Debug)]
struct Frames(Framing);

/// [`Framing`] from frames to signal.
#[derive(Clone, Copy, Debug)]
struct OverlapAdd(Framing);

/// The frames [B, F, width] of a signal [B, samples]; the last frame must end inside of it.
pub(super) fn frames(signal_bs: &Tensor, framing: Framing) -> Result<Tensor> {
    debug_assert!((framing.frames - 1) * framing.hop + framing.width <= framing.samples);
    tape::apply1(
        &signal_bs.contiguous()?,
        Frames(framing),
        Needs::operands(Set::NONE),
    )
}

/// The signal [B, samples] that frames [B, F, width] add up to.
pub(super) fn overlap_add(frames_bfw: &Tensor, framing: Framing) -> Result<Tensor> {
    debug_assert!((framing.frames - 1) * framing.hop + framing.width <= framing.samples);
    tape::apply1(
        &frames_bfw.contiguous()?,
        OverlapAdd(framing),
        Needs::operands(Set::NONE),
    )
}

impl Frames {
    fn output(&self, signal: &Layout) -> Shape {
        Shape::from((signal.dims()[0], self.0.frames, self.0.width))
    }
}

impl OverlapAdd {
    fn output(&self, frames: &Layout) -> Shape {
        Shape::from((frames.dims()[0], self.0.samples))
    }
}

impl CustomOp1 for Frames {
    forward!(1: x x_layout);

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(overlap_add(dy, self.0)?))
    }
}

impl CustomOp1 for OverlapAdd {
    forward!(1: x x_layout);

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(frames(dy, self.0)?))
    }
}

impl Pass<1> for Frames {
    const NAME: &'static str = "frames";

    fn cpu<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<Vec<T>> {
        let Framing {
            samples,
            frames,
            width,
            hop,
        } = self.0;
        let mut y = vec![T::zero(); x.len() / samples * frames * width];
        y.par_chunks_mut(frames * width)
            .zip(x.par_chunks(samples))
            .for_each(|(y, x)| {
                y.par_chunks_mut(width)
                    .with_min_len(16)
                    .enumerate()
                    .for_each(|(frame, y)| {
                        y.copy_from_slice(&x[frame * hop..frame * hop + width]);
                    });
            });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        [x]: [super::cuda::View<'_, T>; 1],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::frames(self.0, device, &x)
    }
}

impl Pass<1> for OverlapAdd {
    const NAME: &'static str = "overlap_add";

    fn cpu<T: Real>(&self, [x]: [&[T]; 1]) -> Vec<Vec<T>> {
        let Framing {
            samples,
            frames,
            width,
            hop,
        } = self.0;
        let mut y = vec![T::zero(); x.len() / (frames * width) * samples];
        y.par_chunks_mut(samples)
            .zip(x.par_chunks(frames * width))
            .for_each(|(y, x)| {
                y.par_chunks_mut(hop)
                    .with_min_len(16)
                    .enumerate()
                    .for_each(|(block, y)| {
                        // Frame f reaches this block of `hop` samples while (block - f) hop < width.
                        let first = (block + 1).saturating_sub(width.div_ceil(hop));
                        for frame in first..frames.min(block + 1) {
                            let part = &x[frame * width..(frame + 1) * width][(block - frame) * hop..];
                            wide(|| y.iter_mut().zip(part).for_each(|(y, &part)| *y += part));
                        }
                    });
            });
        vec![y]
    }

    #[cfg(feature = "cuda")]
    fn cuda<T: crate::pass::CudaReal>(
        &self,
        device: &candle_core::CudaDevice,
        [x]: [super::cuda::View<'_, T>; 1],
    ) -> Result<Vec<super::cuda::Slice<T>>> {
        super::cuda::overlap_add(self.0, device, &x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_threads, normal, values};

    #[test]
    fn both_ways_against_the_definition() -> Result<()> {
        for (samples, frames_count, width, hop) in [(20, 5, 8, 3), (21, 6, 4, 2), (7, 1, 7, 9), (19, 4, 3, 5)]
        {
            let framing = Framing {
                samples,
                frames: frames_count,
                width,
                hop,
            };
            let (x, z) = (normal(1, &[2, samples]), normal(2, &[2, frames_count, width]));
            let (y, w) = (values(&frames(&x, framing)?), values(&overlap_add(&z, framing)?));
            let mut sum = vec![0.0; w.len()];
            for b in 0..2 {
                for f in 0..frames_count {
                    for j in 0..width {
                        let (sample, at) = (b * samples + f * hop + j, (b * frames_count + f) * width + j);
                        assert_eq!(y[at], values(&x)[sample]);
                        sum[sample] += values(&z)[at];
                    }
                }
            }
            assert_eq!(w, sum, "{framing:?}");
            check_gradients(&[x], |t| frames(&t[0], framing))?;
            check_gradients(&[z], |t| overlap_add(&t[0], framing))?;
        }
        let framing = Framing {
            samples: 64_480,
            frames: 400,
            width: 640,
            hop: 160,
        };
        check_threads(&[normal(3, &[1, 400, 640])], |t| overlap_add(&t[0], framing))
    }
}
