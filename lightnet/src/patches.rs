//! Cutting a grid of samples into patches and back.

use candle_core::{Result, Tensor};

/// Cuts `x` `[B, n_1 .. n_k, C]` into `[B, n_1/p_1 .. n_k/p_k, p_1 .. p_k * C]`.
///
/// Errors when an axis is not a multiple of its patch.
pub fn to_patches(x: &Tensor, patch: &[usize]) -> Result<Tensor> {
    let k = patch.len();
    let dims = x.dims();
    if dims.len() != k + 2 || dims[1..=k].iter().zip(patch).any(|(n, p)| *p == 0 || n % p != 0) {
        candle_core::bail!("patches: shape {dims:?} does not split into patches of {patch:?}");
    }
    let (batch, channels) = (dims[0], dims[k + 1]);
    let mut split = vec![batch];
    let mut cells = vec![batch];
    for (n, p) in dims[1..=k].iter().zip(patch) {
        split.extend([n / p, *p]);
        cells.push(n / p);
    }
    split.push(channels);
    cells.push(patch.iter().product::<usize>() * channels);
    let order: Vec<usize> = std::iter::once(0)
        .chain((0..k).map(|a| 1 + 2 * a))
        .chain((0..k).map(|a| 2 + 2 * a))
        .chain(std::iter::once(2 * k + 1))
        .collect();
    x.reshape(split)?.permute(order)?.contiguous()?.reshape(cells)
}

/// Inverse of [`to_patches`]: `[B, m_1 .. m_k, p_1 .. p_k * C]` to `[B, m_1 p_1 .. m_k p_k, C]`.
pub fn from_patches(x: &Tensor, patch: &[usize]) -> Result<Tensor> {
    let k = patch.len();
    let dims = x.dims();
    let volume: usize = patch.iter().product();
    if dims.len() != k + 2 || volume == 0 || !dims[k + 1].is_multiple_of(volume) {
        candle_core::bail!("patches: shape {dims:?} does not hold patches of {patch:?}");
    }
    let (batch, channels) = (dims[0], dims[k + 1] / volume);
    let mut split = dims[..=k].to_vec();
    split.extend(patch);
    split.push(channels);
    let mut whole = vec![batch];
    whole.extend(dims[1..=k].iter().zip(patch).map(|(m, p)| m * p));
    whole.push(channels);
    let order: Vec<usize> = std::iter::once(0)
        .chain((0..k).flat_map(|a| [1 + a, 1 + k + a]))
        .chain(std::iter::once(2 * k + 1))
        .collect();
    x.reshape(split)?.permute(order)?.contiguous()?.reshape(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn round_trip_and_order() -> Result<()> {
        let x = Tensor::arange(0f32, 2.0 * 4.0 * 6.0 * 2.0 * 3.0, &Device::Cpu)?.reshape((2, 4, 6, 2, 3))?;
        let patches = to_patches(&x, &[2, 3, 1])?;
        assert_eq!(patches.dims(), [2, 2, 2, 2, 18]);
        // The first patch starts with the first sample's channels, then the next sample of the second axis.
        let first = patches.flatten_all()?.narrow(0, 0, 6)?.to_vec1::<f32>()?;
        assert_eq!(first, [0.0, 1.0, 2.0, 6.0, 7.0, 8.0]);
        let back = from_patches(&patches, &[2, 3, 1])?;
        assert_eq!(
            back.flatten_all()?.to_vec1::<f32>()?,
            x.flatten_all()?.to_vec1::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn uneven_sizes_are_refused() -> Result<()> {
        let x = Tensor::zeros((1, 5, 3), candle_core::DType::F32, &Device::Cpu)?;
        let message = to_patches(&x, &[2]).unwrap_err().to_string();
        assert!(
            message.contains("[1, 5, 3]") && message.contains("[2]"),
            "{message}"
        );
        Ok(())
    }
}
