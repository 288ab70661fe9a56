//! Neighbours of places side by side: a convolution of channels-last pictures is this and one matrix product.
//!
//! ```text
//! y[(b, r, c), (i, j), :] = x[b, r stride + i - before, c stride + j - before, :]        zero outside of the picture
//! ```
//!
//! For networks that nobody trains: no gradient passes.

use crate::error::OpError;
use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

const OP: &str = "unfold";

/// Which neighbours, of which places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Side of the square of neighbours.
    pub size: usize,
    /// From one place to the next.
    pub stride: usize,
    /// Zeros above and to the left of a picture, and below and to the right.
    pub padding: [usize; 2],
}

impl Window {
    /// Results along a side of `length` places; none where the window does not fit.
    #[must_use]
    pub fn results(&self, length: usize) -> usize {
        let padded = length + self.padding[0] + self.padding[1];
        match padded.checked_sub(self.size) {
            Some(rest) if self.stride > 0 && self.size > 0 => rest / self.stride + 1,
            _ => 0,
        }
    }
}

/// Sizes of a call.
#[derive(Clone, Copy, Debug)]
struct Plan {
    high: usize,
    wide: usize,
    channels: usize,
    rows: usize,
    columns: usize,
    window: Window,
}

impl Plan {
    /// Where the values of a tap of a place lie, if not in the border.
    fn source(&self, place: usize, tap: usize) -> Option<usize> {
        let (line, column) = (place / self.columns, place % self.columns);
        let (picture, row) = (line / self.rows, line % self.rows);
        let Window {
            size,
            stride,
            padding,
        } = self.window;
        let inside = |at: usize, length: usize| at.checked_sub(padding[0]).filter(|&at| at < length);
        let row = inside(row * stride + tap / size, self.high)?;
        let column = inside(column * stride + tap % size, self.wide)?;
        Some(((picture * self.high + row) * self.wide + column) * self.channels)
    }
}

/// The neighbours of the results `places` (of `B H' W'` in the order of memory) of `x` [B, H, W, C], tap by tap: [places, size^2 C].
///
/// No gradient passes. f32, f64 or 16 bits on the CPU, f32 or bf16 on CUDA.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use fulgur_kernels::unfold::{Window, unfold};
/// let x = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu)?.reshape((1, 1, 3, 1))?;
/// let window = Window { size: 2, stride: 1, padding: [0, 1] };
/// let y = unfold(&x, window, 1..3)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0, 3.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]);
/// # candle_core::Result::Ok(())
/// ```
///
/// # Errors
/// If the window does not fit, there are not so many places, or an element type or a device is not supported.
pub fn unfold(x: &Tensor, window: Window, places: Range<usize>) -> Result<Tensor> {
    let &[batch, high, wide, channels] = x.dims() else {
        return Err(OpError::shape(OP, "x", x, "[B, H, W, C]").into());
    };
    let plan = Plan {
        high,
        wide,
        channels,
        rows: window.results(high),
        columns: window.results(wide),
        window,
    };
    let all = batch * plan.rows * plan.columns;
    if places.start >= places.end || places.end > all || channels == 0 {
        let found = format!("{}..{}", places.start, places.end);
        return Err(OpError::value(OP, "places", found, format!("a part of 0..{all}")).into());
    }
    let x = x.detach().contiguous()?;
    let taps = window.size * window.size;
    let shape = (places.len(), taps * channels);
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::unfold(&x, plan, places, shape);
    }
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: OP });
    };
    let storage = match &*storage {
        Storage::Cpu(CpuStorage::F32(x)) => CpuStorage::F32(copy(&x[start..end], plan, places)),
        Storage::Cpu(CpuStorage::F64(x)) => CpuStorage::F64(copy(&x[start..end], plan, places)),
        Storage::Cpu(CpuStorage::BF16(x)) => CpuStorage::BF16(copy(&x[start..end], plan, places)),
        Storage::Cpu(CpuStorage::F16(x)) => CpuStorage::F16(copy(&x[start..end], plan, places)),
        other => bail!("{OP}: {:?} on {:?}", other.dtype(), x.device().location()),
    };
    let none = candle_core::op::BackpropOp::none();
    Ok(Tensor::from_storage(Storage::Cpu(storage), shape, none, false))
}

fn copy<T: Copy + Default + Send + Sync>(x: &[T], plan: Plan, places: Range<usize>) -> Vec<T> {
    let (taps, channels) = (plan.window.size * plan.window.size, plan.channels);
    let mut y = vec![T::default(); places.len() * taps * channels];
    y.par_chunks_mut(taps * channels)
        .with_min_len(64)
        .enumerate()
        .for_each(|(at, y)| {
            for (tap, y) in y.chunks_exact_mut(channels).enumerate() {
                if let Some(from) = plan.source(places.start + at, tap) {
                    y.copy_from_slice(&x[from..from + channels]);
                }
            }
        });
    y
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/unfold.cu`.

    use super::{OP, Plan};
    use crate::cuda_module::{Module, launch, module, room};
    use crate::gpu::{self, Locked};
    use crate::pass::CudaReal;
    use crate::rows::cuda::suffix;
    use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
    use candle_core::{DType, Result, Tensor};
    use half::bf16;
    use std::ops::Range;

    const UNFOLD: Module = module!("unfold");
    /// Threads of a block along the words of a place, and along taps.
    const BLOCK: [usize; 2] = [32, 8];
    /// Blocks that keep the GPU busy.
    const BLOCKS: usize = 1 << 14;

    /// As in the kernel.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Unfold {
        high: u32,
        wide: u32,
        words: u32,
        rows: u32,
        columns: u32,
        size: u32,
        stride: u32,
        before: u32,
        first: u32,
        count: u32,
    }

    // SAFETY: ten words of 32 bits, in the order of the kernel's structure.
    unsafe impl DeviceRepr for Unfold {}

    pub(super) fn unfold(
        x: &Tensor,
        plan: Plan,
        places: Range<usize>,
        shape: (usize, usize),
    ) -> Result<Tensor> {
        suffix(OP, x)?;
        match x.dtype() {
            DType::BF16 => typed::<bf16>(x, plan, places, shape),
            _ => typed::<f32>(x, plan, places, shape),
        }
    }

    fn typed<T: CudaReal>(
        x: &Tensor,
        plan: Plan,
        places: Range<usize>,
        shape: (usize, usize),
    ) -> Result<Tensor> {
        let device = x.device().as_cuda_device()?;
        let x = Locked::new(OP, x);
        let from = x.start()?;
        let (place, element) = (plan.channels * size_of::<T>(), size_of::<T>());
        let word = if place.is_multiple_of(16) && from.is_multiple_of(16) {
            16
        } else {
            element
        };
        let y = room::<T>(device, shape.0 * shape.1)?;
        let unfold = Unfold {
            high: plan.high as u32,
            wide: plan.wide as u32,
            words: (place / word) as u32,
            rows: plan.rows as u32,
            columns: plan.columns as u32,
            size: plan.window.size as u32,
            stride: plan.window.stride as u32,
            before: plan.window.padding[0] as u32,
            first: places.start as u32,
            count: places.len() as u32,
        };
        let taps = places.len() * plan.window.size * plan.window.size;
        let config = LaunchConfig {
            grid_dim: (taps.div_ceil(BLOCK[1]).min(BLOCKS) as u32, 1, 1),
            block_dim: (BLOCK[0] as u32, BLOCK[1] as u32, 1),
            shared_mem_bytes: 0,
        };
        launch!(device, UNFOLD, format!("unfold_{word}"), config; from, y.as_view(), unfold);
        Ok(gpu::tensor(y, device, &shape.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use candle_core::DType;

    /// By borders of zeros and one place after another.
    fn expected(x: &Tensor, window: Window) -> Result<Vec<Vec<f64>>> {
        let (batch, high, wide, _) = x.dims4()?;
        let Window {
            size,
            stride,
            padding,
        } = window;
        let x = x
            .pad_with_zeros(1, padding[0], padding[1])?
            .pad_with_zeros(2, padding[0], padding[1])?;
        let mut rows = Vec::new();
        for b in 0..batch {
            for r in 0..window.results(high) {
                for c in 0..window.results(wide) {
                    let part = x
                        .narrow(0, b, 1)?
                        .narrow(1, r * stride, size)?
                        .narrow(2, c * stride, size)?;
                    rows.push(part.flatten_all()?.to_vec1::<f64>()?);
                }
            }
        }
        Ok(rows)
    }

    #[test]
    fn neighbours_lie_side_by_side() -> Result<()> {
        for (size, stride, padding) in [
            (3, 1, [1, 1]),
            (3, 2, [1, 1]),
            (3, 2, [0, 1]),
            (2, 3, [2, 0]),
            (1, 1, [0, 0]),
        ] {
            let window = Window {
                size,
                stride,
                padding,
            };
            let x = normal(1, &[2, 5, 7, 3]);
            let wanted = expected(&x, window)?;
            assert_eq!(
                unfold(&x, window, 0..wanted.len())?.to_vec2::<f64>()?,
                wanted,
                "{window:?}"
            );
            let part = unfold(&x, window, 3..wanted.len() - 1)?;
            assert_eq!(part.to_vec2::<f64>()?, wanted[3..wanted.len() - 1]);
            let narrow = unfold(&x.to_dtype(DType::BF16)?, window, 0..2)?;
            assert_eq!(narrow.dtype(), DType::BF16);
        }
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let window = Window {
            size: 3,
            stride: 1,
            padding: [0, 0],
        };
        let x = normal(1, &[1, 4, 4, 2]);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(unfold(&x, window, 2..5)),
            "unfold: places is 2..5, expected a part of 0..4"
        );
        let wide = Window { size: 5, ..window };
        assert_eq!(
            message(unfold(&x, wide, 0..1)),
            "unfold: places is 0..1, expected a part of 0..0"
        );
        assert!(
            message(unfold(&x.flatten_to(1).unwrap(), window, 0..1))
                .starts_with("unfold: x has shape [4, 4, 2]")
        );
    }
}
