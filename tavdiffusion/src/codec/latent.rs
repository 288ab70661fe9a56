//! Standardisation of latents: what the diffusion model sees has mean zero and variance one in every channel.

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// Mean and standard deviation a channel, measured after training and kept with the weights.
#[derive(Clone, Debug)]
pub struct LatentNorm {
    mean: Tensor,
    std: Tensor,
}

impl LatentNorm {
    /// Takes `mean` and `std` `[C]`; they start as zero and one and have no gradient.
    pub fn new(channels: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            mean: vb.get_with_hints(channels, "mean", Init::Const(0.0))?,
            std: vb.get_with_hints(channels, "std", Init::Const(1.0))?,
        })
    }

    /// Raw codec values `[.., C]` to standardised ones.
    pub fn normalise(&self, raw: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.cast(raw.dtype())?;
        raw.broadcast_sub(&mean)?.broadcast_div(&std)
    }

    /// Inverse of [`Self::normalise`].
    pub fn restore(&self, latent: &Tensor) -> Result<Tensor> {
        let (mean, std) = self.cast(latent.dtype())?;
        latent.broadcast_mul(&std)?.broadcast_add(&mean)
    }

    /// Mean and standard deviation a channel of raw values `[.., C]`, in `f32`.
    pub fn measure(raw: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = raw.to_dtype(DType::F32)?.flatten_to(raw.rank() - 2)?;
        let mean = rows.mean(0)?;
        let centred = rows.broadcast_sub(&mean)?;
        Ok((mean, (centred.sqr()?.mean(0)? + 1e-8)?.sqrt()?))
    }

    /// Soft penalty that keeps the channels of a training batch near mean zero and variance one.
    ///
    /// Batch statistics never normalise during training: they would erase the colour of a background.
    pub fn penalty(raw: &Tensor) -> Result<Tensor> {
        let (mean, std) = Self::measure(raw)?;
        mean.sqr()?.mean_all()? + (std - 1.0)?.sqr()?.mean_all()?
    }

    fn cast(&self, dtype: DType) -> Result<(Tensor, Tensor)> {
        Ok((
            self.mean.detach().to_dtype(dtype)?,
            self.std.detach().to_dtype(dtype)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;
    use crate::testing::{apart, normal};

    #[test]
    fn measured_latents_are_standardised_and_restored() -> Result<()> {
        let spread = Tensor::new(&[0.5f32, 3.0, 10.0], &Device::Cpu)?;
        let raw = normal("raw", &[4, 6, 5, 3])?
            .broadcast_mul(&spread)?
            .broadcast_add(&Tensor::new(&[-2f32, 0.0, 7.0], &Device::Cpu)?)?;
        let (mean, std) = LatentNorm::measure(&raw)?;
        assert_eq!((mean.dims(), std.dims()), (&[3][..], &[3][..]));
        let tensors = HashMap::from([("mean".to_owned(), mean), ("std".to_owned(), std)]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let norm = LatentNorm::new(3, &vb)?;
        let standard = norm.normalise(&raw)?;
        assert!(LatentNorm::penalty(&standard)?.to_scalar::<f32>()? < 1e-6);
        assert!(LatentNorm::penalty(&raw)?.to_scalar::<f32>()? > 1.0);
        assert!(apart(&norm.restore(&standard)?, &raw)? < 1e-4);
        Ok(())
    }
}
