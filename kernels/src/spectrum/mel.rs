//! Mel filter bank with the HTK scale, as a matrix: mel(f) = 2595 log10(1 + f / 700), triangles of height one.

use crate::error::OpError;
use candle_core::{DType, Device, Result, Tensor};

/// Which bins go into which band.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MelConfig {
    /// Samples per second of the signal.
    pub sample_rate: u32,
    /// Length of the Fourier transform whose `n_fft / 2 + 1` bins come in.
    pub n_fft: usize,
    /// Number of bands.
    pub n_mels: usize,
    /// Lower edge of the first band, in Hz.
    pub fmin: f64,
    /// Upper edge of the last band, in Hz; at most half of the sample rate.
    pub fmax: f64,
}

/// Mel bands of a magnitude spectrogram.
#[derive(Clone, Debug)]
pub struct Mel {
    config: MelConfig,
    bank_km: Tensor,
}

fn to_mel(hertz: f64) -> f64 {
    2595.0 * (1.0 + hertz / 700.0).log10()
}

fn to_hertz(mel: f64) -> f64 {
    700.0 * (10f64.powf(mel / 2595.0) - 1.0)
}

impl MelConfig {
    fn validate(&self) -> Result<()> {
        const OP: &str = "mel";
        if self.n_mels == 0 || self.sample_rate == 0 {
            return Err(OpError::value(OP, "n_mels or sample_rate", 0, "at least 1").into());
        }
        if self.n_fft < 2 || !self.n_fft.is_multiple_of(2) {
            return Err(OpError::value(OP, "n_fft", self.n_fft, "an even number").into());
        }
        let top = f64::from(self.sample_rate) / 2.0;
        if !(0.0 <= self.fmin && self.fmin < self.fmax && self.fmax <= top) {
            let found = format!("{} to {} Hz", self.fmin, self.fmax);
            return Err(OpError::value(OP, "band", found, format!("a range within 0 to {top} Hz")).into());
        }
        Ok(())
    }

    /// The filter bank, `[n_fft / 2 + 1, n_mels]` in rows.
    fn bank(&self) -> Vec<f64> {
        let (low, high) = (to_mel(self.fmin), to_mel(self.fmax));
        let step = (high - low) / (self.n_mels + 1) as f64;
        let edges: Vec<f64> = (0..self.n_mels + 2)
            .map(|i| to_hertz(low + step * i as f64))
            .collect();
        let mut bank = Vec::with_capacity((self.n_fft / 2 + 1) * self.n_mels);
        for bin in 0..=self.n_fft / 2 {
            let hertz = bin as f64 * f64::from(self.sample_rate) / self.n_fft as f64;
            for edge in edges.windows(3) {
                let (rise, fall) = (
                    (hertz - edge[0]) / (edge[1] - edge[0]),
                    (edge[2] - hertz) / (edge[2] - edge[1]),
                );
                bank.push(rise.min(fall).max(0.0));
            }
        }
        bank
    }
}

impl Mel {
    /// The filter bank of `config` for spectrograms of `dtype` on `device`.
    ///
    /// # Errors
    /// If the band is not within 0 to half of the sample rate, or a count is zero.
    pub fn new(config: MelConfig, dtype: DType, device: &Device) -> Result<Self> {
        config.validate()?;
        let shape = (config.n_fft / 2 + 1, config.n_mels);
        let bank_km = Tensor::from_vec(config.bank(), shape, device)?.to_dtype(dtype)?;
        Ok(Self { config, bank_km })
    }

    /// What this was made for.
    pub fn config(&self) -> &MelConfig {
        &self.config
    }

    /// Magnitudes [.., n_fft / 2 + 1] to band energies [.., n_mels], linear.
    ///
    /// # Errors
    /// If the last axis or the element type does not fit.
    pub fn forward(&self, magnitude: &Tensor) -> Result<Tensor> {
        let (bins, bands) = self.bank_km.dims2()?;
        let Some((&last, front)) = magnitude.dims().split_last() else {
            return Err(OpError::shape("mel", "magnitude", magnitude, format!("[.., {bins}]")).into());
        };
        if last != bins {
            return Err(OpError::shape("mel", "magnitude", magnitude, format!("[.., {bins}]")).into());
        }
        let dims: Vec<usize> = front.iter().copied().chain([bands]).collect();
        magnitude
            .reshape(((), bins))?
            .matmul(&self.bank_km)?
            .reshape(dims)
    }

    /// Natural logarithm of the bands, after raising them to at least `floor`: [.., n_mels].
    ///
    /// # Errors
    /// As [`Self::forward`]; also if `floor` is not positive.
    pub fn log(&self, magnitude: &Tensor, floor: f64) -> Result<Tensor> {
        if floor.is_nan() || floor <= 0.0 {
            return Err(OpError::value("mel", "floor", floor, "a positive number").into());
        }
        self.forward(magnitude)?.maximum(floor)?.log()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, normal, values};

    const CONFIG: MelConfig = MelConfig {
        sample_rate: 16_000,
        n_fft: 1024,
        n_mels: 64,
        fmin: 40.0,
        fmax: 8000.0,
    };

    #[test]
    fn scale_and_triangles() -> Result<()> {
        // The HTK scale puts 1000 mel at 1000 Hz, to the precision of its constants.
        assert!((to_mel(1000.0) - 1000.0).abs() < 0.02);
        assert!((to_hertz(to_mel(440.0)) - 440.0).abs() < 1e-9);
        let bank = CONFIG.bank();
        // Between the centres of the first and last band, falling and rising flanks add up to one.
        let step = (to_mel(8000.0) - to_mel(40.0)) / 65.0;
        let inner = to_hertz(to_mel(40.0) + step)..to_hertz(to_mel(40.0) + step * 64.0);
        for (bin, weights) in bank.chunks_exact(64).enumerate() {
            let hertz = bin as f64 * 15.625;
            let sum: f64 = weights.iter().sum();
            let expected = if inner.contains(&hertz) { 1.0 } else { sum.min(1.0) };
            assert!((sum - expected).abs() < 1e-9, "bin {bin}: {sum}");
        }
        Ok(())
    }

    #[test]
    fn a_tone_lands_in_its_band() -> Result<()> {
        let mel = Mel::new(CONFIG, DType::F64, &Device::Cpu)?;
        let mut magnitude = vec![0.0; 513];
        magnitude[64] = 2.0; // 1000 Hz
        let bands = values(&mel.forward(&Tensor::from_vec(magnitude, (1, 513), &Device::Cpu)?)?);
        let best = (0..64).max_by(|&a, &b| bands[a].total_cmp(&bands[b])).unwrap();
        let step = (to_mel(8000.0) - to_mel(40.0)) / 65.0;
        let centre = to_hertz(to_mel(40.0) + step * (best + 1) as f64);
        assert!((centre - 1000.0).abs() < 30.0, "band {best} at {centre} Hz");
        Ok(())
    }

    #[test]
    fn log_has_a_floor_and_a_gradient() -> Result<()> {
        let config = MelConfig {
            sample_rate: 100,
            n_fft: 16,
            n_mels: 3,
            fmin: 0.0,
            fmax: 50.0,
        };
        let mel = Mel::new(config, DType::F64, &Device::Cpu)?;
        let silence = mel.log(&Tensor::zeros((2, 9), DType::F64, &Device::Cpu)?, 3e-3)?;
        assert!(values(&silence).iter().all(|&v| (v - 3e-3f64.ln()).abs() < 1e-12));
        let magnitude = (normal(1, &[2, 4, 9]).sqr()? + 0.1)?;
        check_gradients(&[magnitude], |t| mel.log(&t[0], 3e-3))
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let error = Mel::new(
            MelConfig {
                fmax: 9000.0,
                ..CONFIG
            },
            DType::F32,
            &Device::Cpu,
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "mel: band is 40 to 9000 Hz, expected a range within 0 to 8000 Hz"
        );
        let mel = Mel::new(CONFIG, DType::F32, &Device::Cpu).unwrap();
        let error = mel
            .forward(&Tensor::zeros((2, 9), DType::F32, &Device::Cpu).unwrap())
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "mel: magnitude has shape [2, 9], expected [.., 513]"
        );
    }
}
