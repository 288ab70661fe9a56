//! The mean over all elements of a large tensor.

use candle_core::{Result, Tensor};

/// Elements of a row that is summed on its own.
const ROW: usize = 4096;

/// The mean of all elements, a scalar; sums rows first, because one sum over everything keeps one corner of a GPU busy.
pub(super) fn mean(x: &Tensor) -> Result<Tensor> {
    let count = x.elem_count();
    let width = 1 << count.trailing_zeros().min(ROW.ilog2());
    x.contiguous()?
        .reshape((count / width, width))?
        .mean(1)?
        .mean_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn is_the_mean_whatever_the_count() -> Result<()> {
        for n in [1, 7, 12, 8192, 12_288] {
            let x = Tensor::arange(0f32, n as f32, &Device::Cpu)?;
            let found = mean(&x)?.to_scalar::<f32>()?;
            assert!(
                (found - (n as f32 - 1.0) / 2.0).abs() <= 1e-3 * n as f32,
                "{n}: {found}"
            );
        }
        Ok(())
    }
}
