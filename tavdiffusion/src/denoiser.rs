//! What every generator behind the pipeline has in common: latents in, a prediction of the same shape out.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_kernels::philox::Philox;

use crate::text::TextStates;

/// Latents of picture and sound, standardised.
#[derive(Clone, Debug)]
pub struct Latents {
    /// `[B, F/4, H/8, W/8, C]`.
    pub video: Tensor,
    /// `[B, T/4, bands/16, C]`.
    pub audio: Tensor,
}

impl Latents {
    /// Applies `f` to both streams.
    pub fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            video: f(&self.video)?,
            audio: f(&self.audio)?,
        })
    }

    /// Applies `f` to both streams of two latents.
    pub fn zip(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            video: f(&self.video, &other.video)?,
            audio: f(&self.audio, &other.audio)?,
        })
    }

    /// Joins two batches.
    pub fn cat(first: &Self, second: &Self) -> Result<Self> {
        first.zip(second, |a, b| Tensor::cat(&[a, b], 0))
    }

    /// Samples `start .. start + len` of the batch.
    pub fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|x| x.narrow(0, start, len))
    }
}

/// Sizes of one clip's latents: `[F/4, H/8, W/8, C]` and `[T/4, bands/16, C]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentShape {
    /// Video time, height, width, channels.
    pub video: [usize; 4],
    /// Audio time, bands, channels.
    pub audio: [usize; 3],
}

/// Standard normal latents of one clip each for `seeds`.
///
/// Noise is drawn on the host, one stream a seed and modality, so that a seed gives the same noise on every device and
/// at every place of a batch.
pub fn noise(shape: &LatentShape, seeds: &[u64], device: &Device) -> Result<Latents> {
    let draw = |name: &str, dims: &[usize]| {
        let count = dims.iter().product();
        let mut values = Vec::with_capacity(count * seeds.len());
        for &seed in seeds {
            values.extend(Philox::named(seed, name).normals(count));
        }
        Tensor::from_vec(values, [&[seeds.len()], dims].concat(), device)
    };
    Ok(Latents {
        video: draw("noise.video", &shape.video)?,
        audio: draw("noise.audio", &shape.audio)?,
    })
}

/// Text of a batch as a network reads it.
#[derive(Clone, Debug)]
pub struct TextCondition {
    /// Token states `[B, L, c]`.
    pub states: Tensor,
    /// 1 for words, 0 for padding, `[B, L]`.
    pub mask: Tensor,
}

impl From<TextStates> for TextCondition {
    fn from(TextStates { states, mask, .. }: TextStates) -> Self {
        Self { states, mask }
    }
}

impl TextCondition {
    /// Joins two batches, padding the shorter text.
    pub fn cat(first: &Self, second: &Self) -> Result<Self> {
        let length = first.states.dim(1)?.max(second.states.dim(1)?);
        let pad = |x: &Tensor| x.pad_with_zeros(1, 0, length - x.dim(1)?);
        Ok(Self {
            states: Tensor::cat(&[pad(&first.states)?, pad(&second.states)?], 0)?,
            mask: Tensor::cat(&[pad(&first.mask)?, pad(&second.mask)?], 0)?,
        })
    }
}

/// A network that denoises both streams at one diffusion time.
pub trait Denoiser: Send + Sync {
    /// `latents` are noisy at `time` `[B]` in [0, 1] (0 clean, 1 noise); the result is the prediction that the
    /// objective of training asked for.
    fn predict(&self, latents: &Latents, time: &Tensor, text: &TextCondition) -> Result<Latents>;

    /// Device of the weights.
    fn device(&self) -> &Device;

    /// Dtype of the latents that `predict` takes and gives.
    fn dtype(&self) -> DType {
        DType::F32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_of_a_seed_does_not_depend_on_its_batch() -> Result<()> {
        let shape = LatentShape {
            video: [2, 3, 3, 4],
            audio: [5, 2, 3],
        };
        let alone = noise(&shape, &[7], &Device::Cpu)?;
        let batch = noise(&shape, &[1, 7, 2], &Device::Cpu)?.narrow(1, 1)?;
        for (a, b) in [(&alone.video, &batch.video), (&alone.audio, &batch.audio)] {
            assert_eq!(
                a.flatten_all()?.to_vec1::<f32>()?,
                b.flatten_all()?.to_vec1::<f32>()?
            );
        }
        let other = noise(&shape, &[8], &Device::Cpu)?;
        assert_ne!(
            alone.video.flatten_all()?.to_vec1::<f32>()?,
            other.video.flatten_all()?.to_vec1::<f32>()?
        );
        Ok(())
    }
}
