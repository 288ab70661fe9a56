//! Kaldi's log filterbank, as ImageBind hears 16 kHz sound.
//!
//! ```text
//! frame m   x[160 m .. 160 m + 400], less its mean; x[i] - 0.97 x[i - 1], the first one its own predecessor; times a symmetric Hann window
//! power     |rfft of 512|^2
//! band b    ln max(sum_k w_bk power_k, 2^-23), triangles equally spaced in mel(f) = 1127 ln(1 + f / 700) from 20 to 8000 Hz
//! ```
//!
//! It is computed in f64. The mean of the whole clip, which the reference takes off first, vanishes with the mean of each frame.

use std::sync::Arc;

use realfft::{RealFftPlanner, RealToComplex};

/// Samples per second that are heard.
pub const SAMPLE_RATE: u32 = 16_000;
/// Samples of a frame, and from one frame to the next.
pub const FRAME: usize = 400;
const SHIFT: usize = 160;
const FFT: usize = 512;
/// Part of the sample before that is taken off.
const EMPHASIS: f64 = 0.97;
/// Lowest and highest frequency of the bands.
const LOW_HZ: f64 = 20.0;
const HIGH_HZ: f64 = 8000.0;
/// Energies below this count as this.
const FLOOR: f64 = f32::EPSILON as f64;

/// Windows, transform and triangles.
#[derive(Clone)]
pub struct Filterbank {
    window: Vec<f64>,
    /// First bin and weights of each band.
    bands: Vec<(usize, Vec<f64>)>,
    fft: Arc<dyn RealToComplex<f64>>,
}

impl std::fmt::Debug for Filterbank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filterbank({} bands)", self.bands.len())
    }
}

fn mel(hertz: f64) -> f64 {
    1127.0 * (1.0 + hertz / 700.0).ln()
}

impl Filterbank {
    /// A bank of so many bands.
    pub fn new(bands: usize) -> Self {
        let (low, high) = (mel(LOW_HZ), mel(HIGH_HZ));
        let step = (high - low) / (bands + 1) as f64;
        let bin_hz = f64::from(SAMPLE_RATE) / FFT as f64;
        // The bin at half the rate has no weight.
        let mels: Vec<f64> = (0..FFT / 2).map(|bin| mel(bin as f64 * bin_hz)).collect();
        let triangle = |band: usize| {
            let left = low + band as f64 * step;
            let weight = |&at: &f64| ((at - left) / step).min((left + 2.0 * step - at) / step).max(0.0);
            let first = mels.iter().position(|at| weight(at) > 0.0).unwrap_or(0);
            let inside = mels[first..]
                .iter()
                .map(weight)
                .take_while(|&weight| weight > 0.0);
            (first, inside.collect())
        };
        let hann = |i: usize| 0.5 - 0.5 * (std::f64::consts::TAU * i as f64 / (FRAME - 1) as f64).cos();
        Self {
            window: (0..FRAME).map(hann).collect(),
            bands: (0..bands).map(triangle).collect(),
            fft: RealFftPlanner::new().plan_fft_forward(FFT),
        }
    }

    /// Bands.
    pub fn bands(&self) -> usize {
        self.bands.len()
    }

    /// Frames of so many samples: those that lie inside.
    pub fn frames(samples: usize) -> usize {
        match samples.checked_sub(FRAME) {
            Some(more) => 1 + more / SHIFT,
            None => 0,
        }
    }

    /// `[frames, bands]` of mono samples at [`SAMPLE_RATE`].
    pub fn log_mel(&self, samples: &[f32]) -> Vec<f32> {
        let mut out = Vec::with_capacity(Self::frames(samples.len()) * self.bands.len());
        let mut input = self.fft.make_input_vec();
        let mut bins = self.fft.make_output_vec();
        let mut scratch = self.fft.make_scratch_vec();
        for frame in samples.windows(FRAME).step_by(SHIFT) {
            let mean = frame.iter().map(|&x| f64::from(x)).sum::<f64>() / FRAME as f64;
            let at = |i: usize| f64::from(frame[i]) - mean;
            for (i, value) in input[..FRAME].iter_mut().enumerate() {
                *value = (at(i) - EMPHASIS * at(i.saturating_sub(1))) * self.window[i];
            }
            input[FRAME..].fill(0.0);
            let transformed = self.fft.process_with_scratch(&mut input, &mut bins, &mut scratch);
            debug_assert!(transformed.is_ok(), "buffers are of the planner's lengths");
            out.extend(self.bands.iter().map(|(first, weights)| {
                let powers = bins[*first..].iter().map(|bin| bin.norm_sqr());
                let energy: f64 = weights.iter().zip(powers).map(|(w, p)| w * p).sum();
                energy.max(FLOOR).ln() as f32
            }));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use fulgur_lightnet::testing;

    #[test]
    fn bands_are_those_of_torchaudio() {
        let golden = testing::tensors("kaldi");
        let values = |name: &str| -> Vec<f32> {
            let tensor = golden[name].to_dtype(DType::F32).unwrap();
            tensor.flatten_all().unwrap().to_vec1().unwrap()
        };
        let bank = Filterbank::new(128);
        let cases: Vec<&str> = golden
            .keys()
            .filter_map(|name| name.strip_prefix("wave."))
            .collect();
        assert_eq!(cases.len(), 5);
        for case in cases {
            let found = bank.log_mel(&values(&format!("wave.{case}")));
            let expected = values(&format!("fbank.{case}"));
            assert_eq!(found.len(), expected.len(), "{case}");
            let square =
                |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let error = square(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let whole = square(&mut expected.iter().copied());
            assert!(
                (error / whole).sqrt() < 1e-3,
                "{case}: {}",
                (error / whole).sqrt()
            );
        }
    }

    #[test]
    fn a_tone_lies_in_its_band() {
        let tone = |i: usize| 0.5 * (std::f64::consts::TAU * 1000.0 * i as f64 / 16_000.0).sin();
        let wave: Vec<f32> = (0..400).map(|i| tone(i) as f32).collect();
        let bands = Filterbank::new(128).log_mel(&wave);
        let loudest = (0..128).max_by(|&a, &b| bands[a].total_cmp(&bands[b]));
        assert_eq!(loudest, Some(43));
        for (band, expected) in [(40, -2.0884), (42, 4.4182), (43, 5.6266), (44, 5.6019)] {
            assert!((bands[band] - expected).abs() < 1e-2, "{band}: {}", bands[band]);
        }
        for (band, expected) in [(20, -13.2965), (64, -15.1944)] {
            assert!((bands[band] - expected).abs() < 0.2, "{band}: {}", bands[band]);
        }
        // No bin of the transform lies in the fourth band.
        assert!((bands[3] - -15.942_385).abs() < 1e-5);
        assert_eq!(
            [
                Filterbank::frames(32_000),
                Filterbank::frames(400),
                Filterbank::frames(399)
            ],
            [198, 1, 0]
        );
    }
}
