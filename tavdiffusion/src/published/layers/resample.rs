//! Half and double sides.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;

use super::{Conv2d, Padding};

/// Every second place of a convolution.
#[derive(Clone, Debug)]
pub(crate) struct Downsample(Conv2d);

impl Downsample {
    /// Takes `conv`.
    pub(crate) fn new(channels: usize, padding: Padding, vb: &VarBuilder) -> Result<Self> {
        Conv2d::strided(channels, channels, 3, 2, padding, &vb.pp("conv")).map(Self)
    }

    /// Maps `[B, H, W, C]` to about half the sides.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}

/// A convolution of a picture whose values stand twice along both axes.
#[derive(Clone, Debug)]
pub(crate) struct Upsample(Conv2d);

impl Upsample {
    /// Takes `conv`.
    pub(crate) fn new(channels: usize, vb: &VarBuilder) -> Result<Self> {
        Conv2d::new(channels, channels, 3, &vb.pp("conv")).map(Self)
    }

    /// Maps `[B, H, W, C]` to the sides `size`, twice its own where none are given.
    pub(crate) fn forward(&self, x: &Tensor, size: Option<[usize; 2]>) -> Result<Tensor> {
        let (_, height, width, _) = x.dims4()?;
        self.0
            .forward(&nearest(x, size.unwrap_or([2 * height, 2 * width]))?)
    }
}

/// Each place of a picture of sides `size` has the value of the place of `x` `[B, H, W, C]` that it falls on.
fn nearest(x: &Tensor, [height, width]: [usize; 2]) -> Result<Tensor> {
    let (batch, high, wide, channels) = x.dims4()?;
    if [height, width] == [2 * high, 2 * wide] {
        return x
            .reshape(vec![batch, high, 1, wide, 1, channels])?
            .broadcast_as(vec![batch, high, 2, wide, 2, channels])?
            .contiguous()?
            .reshape((batch, height, width, channels));
    }
    let along = |x: &Tensor, axis: usize, from: usize, to: usize| match from == to {
        true => Ok(x.clone()),
        false => x.index_select(&sources(from, to, x)?, axis),
    };
    along(&along(x, 1, high, height)?, 2, wide, width)
}

/// Which of `from` places each of `to` falls on, in the arithmetic of the reference: f32, rounded down.
fn sources(from: usize, to: usize, x: &Tensor) -> Result<Tensor> {
    let scale = from as f32 / to as f32;
    let places: Vec<u32> = (0..to)
        .map(|place| ((place as f32 * scale) as u32).min(from as u32 - 1))
        .collect();
    Tensor::from_vec(places, to, x.device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn sides_grow_to_any_size() -> Result<()> {
        let x = Tensor::arange(0f32, 6.0, &Device::Cpu)?.reshape((1, 2, 3, 1))?;
        let rows = |size| nearest(&x, size)?.squeeze(0)?.squeeze(2)?.to_vec2::<f32>();
        assert_eq!(
            rows([4, 6])?,
            [
                [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
                [0.0, 0.0, 1.0, 1.0, 2.0, 2.0],
                [3.0, 3.0, 4.0, 4.0, 5.0, 5.0],
                [3.0, 3.0, 4.0, 4.0, 5.0, 5.0],
            ]
        );
        // One place less than twice: the last is cut off. One more: the first stands longest.
        assert_eq!(
            rows([3, 5])?,
            [
                [0.0, 0.0, 1.0, 1.0, 2.0],
                [0.0, 0.0, 1.0, 1.0, 2.0],
                [3.0, 3.0, 4.0, 4.0, 5.0]
            ]
        );
        assert_eq!(rows([2, 7])?[0], [0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0]);
        Ok(())
    }
}
