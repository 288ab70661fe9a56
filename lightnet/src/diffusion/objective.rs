//! What a denoiser is trained to predict.

use candle_core::{Device, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::schedule::{LinearSchedule, STEPS};

/// Objective of training; a model keeps the name of its own in `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Flow matching: `x_t = (1 - t) x + t e`, the network gives the velocity `e - x`.
    Flow,
    /// Denoising diffusion on the published linear schedule: the network gives the noise e.
    Ddpm,
}

impl Objective {
    /// Weights of signal and noise at `times` in [0, 1], as tensors `[B]`.
    pub fn mixture(self, times: &[f32], device: &Device) -> Result<Mixture> {
        let (signal, noise): (Vec<f32>, Vec<f32>) = times.iter().map(|&t| self.weights(t)).unzip();
        let column = |values: Vec<f32>| Tensor::from_vec(values, times.len(), device);
        Ok(Mixture {
            signal: column(signal)?,
            noise: column(noise)?,
        })
    }

    /// Noisy latents and the target for clean `x` `[B, ..]` and noise `e` of the same shape.
    pub fn noisy(self, x: &Tensor, e: &Tensor, mixture: &Mixture) -> Result<(Tensor, Tensor)> {
        let column = |values: &Tensor| {
            let mut shape = vec![1; x.rank()];
            shape[0] = x.dim(0)?;
            values.reshape(shape)?.to_dtype(x.dtype())
        };
        let signal = x.broadcast_mul(&column(&mixture.signal)?)?;
        let noisy = (signal + e.broadcast_mul(&column(&mixture.noise)?)?)?;
        let target = match self {
            Self::Flow => (e - x)?,
            Self::Ddpm => e.clone(),
        };
        Ok((noisy, target))
    }

    fn weights(self, time: f32) -> (f32, f32) {
        match self {
            Self::Flow => (1.0 - time, time),
            Self::Ddpm => {
                let alpha = LinearSchedule::default().alpha_bar(ddpm_step(time) as isize);
                (alpha.sqrt() as f32, (1.0 - alpha).sqrt() as f32)
            }
        }
    }

    /// Training time for a uniform draw `u` and a standard normal draw `z`.
    ///
    /// Flow matching concentrates on the middle and the noisy side (logit-normal, mean 0.4); DDPM is uniform over steps.
    pub fn time(self, u: f32, z: f32) -> f32 {
        match self {
            Self::Flow => 1.0 / (1.0 + (-(0.4 + z)).exp()),
            Self::Ddpm => ((u * STEPS as f32) as usize).min(STEPS - 1) as f32 / (STEPS - 1) as f32,
        }
    }
}

/// Weights of signal and noise, one pair a sample.
#[derive(Clone, Debug)]
pub struct Mixture {
    /// `[B]`.
    pub signal: Tensor,
    /// `[B]`.
    pub noise: Tensor,
}

/// Step of the linear schedule that a time in [0, 1] stands for.
pub fn ddpm_step(time: f32) -> usize {
    (time.clamp(0.0, 1.0) * (STEPS - 1) as f32).round() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_the_flow_are_data_and_noise() -> Result<()> {
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
        let e = Tensor::new(&[[-1f32, 0.5], [0.25, -2.0]], &Device::Cpu)?;
        let (noisy, target) =
            Objective::Flow.noisy(&x, &e, &Objective::Flow.mixture(&[0.0, 1.0], &Device::Cpu)?)?;
        assert_eq!(noisy.to_vec2::<f32>()?, [[1.0, 2.0], [0.25, -2.0]]);
        assert_eq!(target.to_vec2::<f32>()?, (e - x)?.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn ddpm_keeps_unit_power() {
        for t in [0.0, 0.3, 1.0] {
            let (signal, noise) = Objective::Ddpm.weights(t);
            assert!((signal * signal + noise * noise - 1.0).abs() < 1e-6);
        }
        assert_eq!(ddpm_step(Objective::Ddpm.time(0.999_99, 0.0)), STEPS - 1);
    }
}
