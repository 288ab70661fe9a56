//! Steps of time as vectors.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};

use super::Activation;

/// Longest period of the waves.
const LONGEST_PERIOD: f32 = 10_000.0;

/// How steps of time are written as waves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeShape {
    /// Number of waves, sines and cosines together.
    pub(crate) waves: usize,
    /// Width of the vector.
    pub(crate) output: usize,
    /// Whether cosines come first.
    pub(crate) flip: bool,
    /// Taken from the number of frequencies where they are spread.
    pub(crate) shift: f64,
    /// Between the two maps.
    pub(crate) activation: Activation,
}

/// Waves of a step of time through two maps.
#[derive(Clone, Debug)]
pub(crate) struct TimeEmbedding {
    shape: TimeShape,
    first: Linear,
    second: Linear,
}

impl TimeEmbedding {
    /// Takes `linear_1` and `linear_2`.
    pub(crate) fn new(shape: TimeShape, vb: &VarBuilder) -> Result<Self> {
        let TimeShape { waves, output, .. } = shape;
        Ok(Self {
            shape,
            first: Linear::new(waves, output, true, Start::FanIn, &vb.pp("linear_1"))?,
            second: Linear::new(output, output, true, Start::FanIn, &vb.pp("linear_2"))?,
        })
    }

    /// The waves `[B, waves]` of B steps of time, f32 on the CPU: what [`Self::forward`] would have to ask a device for.
    pub(crate) fn waves(&self, steps: &[f32]) -> Result<Tensor> {
        waves(steps, &self.shape, &Device::Cpu)
    }

    /// `time` `[B]`, in steps, or its waves `[B, waves]`, to `[B, output]` of type `dtype`.
    pub(crate) fn forward(&self, time: &Tensor, dtype: DType) -> Result<Tensor> {
        let waves = match time.rank() {
            2 => time.clone(),
            _ => waves(&time.to_dtype(DType::F32)?.to_vec1()?, &self.shape, time.device())?,
        }
        .to_dtype(dtype)?;
        let hidden = self.shape.activation.forward(&self.first.forward(&waves)?)?;
        self.second.forward(&hidden)
    }
}

/// Sines and cosines `[B, waves]` of B steps of time, f32. They are computed on the host as the reference does it, in f32: at step 999
/// the last bits of a frequency are seen in the third decimal of its wave.
fn waves(steps: &[f32], shape: &TimeShape, device: &Device) -> Result<Tensor> {
    let half = shape.waves / 2;
    let spread = (half as f64 - shape.shift) as f32;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| (-LONGEST_PERIOD.ln() * i as f32 / spread).exp())
        .collect();
    let mut values = Vec::with_capacity(steps.len() * shape.waves);
    for step in steps {
        let sines = frequencies.iter().map(|frequency| (step * frequency).sin());
        let cosines = frequencies.iter().map(|frequency| (step * frequency).cos());
        match shape.flip {
            true => values.extend(cosines.chain(sines)),
            false => values.extend(sines.chain(cosines)),
        }
    }
    let pairs = Tensor::from_vec(values, (steps.len(), 2 * half), device)?;
    pairs.pad_with_zeros(D::Minus1, 0, shape.waves % 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_sines_and_cosines_of_the_step() -> Result<()> {
        let (time, cpu) = ([0f32, 3.0], &Device::Cpu);
        let shape = |waves, flip, shift| TimeShape {
            waves,
            output: 4,
            flip,
            shift,
            activation: Activation::Silu,
        };
        let found = waves(&time, &shape(4, true, 0.0), cpu)?.to_vec2::<f32>()?;
        assert_eq!(found[0], [1.0, 1.0, 0.0, 0.0]);
        let expected = [3f32.cos(), 0.03f32.cos(), 3f32.sin(), 0.03f32.sin()];
        for (found, expected) in found[1].iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        // With a shift of one the last frequency is 1 / 10,000; an odd width ends with a zero.
        let found = waves(&time, &shape(5, false, 1.0), cpu)?.to_vec2::<f32>()?;
        let expected = [3f32.sin(), 3e-4f32.sin(), 3f32.cos(), 3e-4f32.cos(), 0.0];
        for (found, expected) in found[1].iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        Ok(())
    }
}
