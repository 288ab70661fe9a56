//! Short-time Fourier transform, its inverse and mel bands, as differentiable tensor functions.
//!
//! A transform is a matrix product with windowed cosines and sines, which is what both processors do fastest; around
//! it lie only framing, overlap-add and the magnitude. Frame f is centred on sample f hop; the signal is mirrored at
//! its ends. A signal of S samples has S / hop frames, and the inverse of F frames has hop F samples.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use fulgur_kernels::spectrum::{Mel, MelConfig, Stft};
//! # fn main() -> candle_core::Result<()> {
//! let wave_bs = Tensor::randn(0f32, 1.0, (1, 4000), &Device::Cpu)?;
//! let stft = Stft::new(1024, 640, 160, DType::F32, &Device::Cpu)?;
//! let bands = MelConfig { sample_rate: 16_000, n_fft: 1024, n_mels: 64, fmin: 40.0, fmax: 8000.0 };
//! let mel = Mel::new(bands, DType::F32, &Device::Cpu)?;
//! let log_mel = mel.log(&stft.magnitude(&wave_bs)?, 3e-3)?;
//! assert_eq!(log_mel.dims(), [1, 25, 64]);
//!
//! let (re, im) = stft.complex(&wave_bs)?;
//! let error = (stft.inverse(&re, &im)? - wave_bs)?.abs()?.max_all()?.to_scalar::<f32>()?;
//! assert!(error < 1e-4);
//! # Ok(())
//! # }
//! ```

#[cfg(feature = "cuda")]
mod cuda;
mod frames;
mod log_mel;
mod magnitude;
mod mel;

use crate::error::OpError;
use candle_core::{DType, Device, Result, Tensor};
use frames::Framing;
pub use log_mel::LogMel;
pub use mel::{Mel, MelConfig};
use std::f64::consts::TAU;
use std::sync::{Arc, Mutex, PoisonError};

/// Short-time Fourier transform with a periodic Hann window, forward and inverse.
#[derive(Clone, Debug)]
pub struct Stft {
    n_fft: usize,
    window: usize,
    hop: usize,
    hann: Vec<f64>,
    /// [window, 2 bins]: signal to real and imaginary parts.
    analysis: Tensor,
    /// [2 bins, window]: real and imaginary parts to a windowed signal.
    synthesis: Tensor,
    /// 1 / overlapped squared windows for the number of frames that was asked for last.
    gain: Arc<Mutex<Option<(usize, Tensor)>>>,
}

impl Stft {
    /// A transform of `n_fft` points over frames of `window` samples, one each `hop` samples, for signals of `dtype`
    /// (f32, f64) on `device`.
    ///
    /// # Errors
    /// If `n_fft` or `window` is odd or zero, `window` exceeds `n_fft`, or `hop` is not within 1 to `window / 2`
    /// (a sample that no frame sees could not come back).
    pub fn new(n_fft: usize, window: usize, hop: usize, dtype: DType, device: &Device) -> Result<Self> {
        const OP: &str = "stft";
        if n_fft == 0 || !n_fft.is_multiple_of(2) {
            return Err(OpError::value(OP, "n_fft", n_fft, "an even number above 0").into());
        }
        if window == 0 || !window.is_multiple_of(2) || window > n_fft {
            return Err(OpError::value(OP, "window", window, format!("an even number up to {n_fft}")).into());
        }
        if hop == 0 || hop > window / 2 {
            return Err(OpError::value(OP, "hop", hop, format!("1 to {}", window / 2)).into());
        }
        if !matches!(dtype, DType::F32 | DType::F64) {
            return Err(OpError::value(OP, "dtype", format!("{dtype:?}"), "F32 or F64").into());
        }
        let hann: Vec<f64> = (0..window)
            .map(|j| 0.5 - 0.5 * (TAU * j as f64 / window as f64).cos())
            .collect();
        let circle: Vec<(f64, f64)> = (0..n_fft)
            .map(|i| (TAU * i as f64 / n_fft as f64).sin_cos())
            .collect();
        let (bins, start) = (n_fft / 2 + 1, (n_fft - window) / 2);
        let mut analysis = vec![0.0; window * 2 * bins];
        let mut synthesis = vec![0.0; window * 2 * bins];
        for (j, &weight) in hann.iter().enumerate() {
            for bin in 0..bins {
                let (sin, cos) = circle[bin * (start + j) % n_fft];
                // The bins between the ends stand for themselves and their mirror images.
                let share = if bin == 0 || bin == n_fft / 2 { 1.0 } else { 2.0 } / n_fft as f64;
                for (part, value) in [(bin, cos), (bins + bin, -sin)] {
                    analysis[j * 2 * bins + part] = weight * value;
                    synthesis[part * window + j] = weight * value * share;
                }
            }
        }
        Ok(Self {
            n_fft,
            window,
            hop,
            hann,
            analysis: Tensor::from_vec(analysis, (window, 2 * bins), device)?.to_dtype(dtype)?,
            synthesis: Tensor::from_vec(synthesis, (2 * bins, window), device)?.to_dtype(dtype)?,
            gain: Arc::default(),
        })
    }

    /// Number of frequencies, `n_fft / 2 + 1`.
    pub fn bins(&self) -> usize {
        self.n_fft / 2 + 1
    }

    /// Samples between frames.
    pub fn hop(&self) -> usize {
        self.hop
    }

    /// Frames of a signal of `samples`.
    pub fn frames(&self, samples: usize) -> usize {
        samples / self.hop
    }

    /// Spectrum [B, F, 2 bins] of a signal [B, S], real parts first.
    ///
    /// # Errors
    /// If the signal is not [B, S], is shorter than one hop or than half a window plus one sample, or has another
    /// element type or device than this transform.
    pub fn packed(&self, wave_bs: &Tensor) -> Result<Tensor> {
        let edge = self.window / 2;
        let shortest = self.hop.max(edge + 1);
        let &[batch, samples] = wave_bs.dims() else {
            return Err(OpError::shape("stft", "wave", wave_bs, "[B, S]").into());
        };
        if samples < shortest || batch == 0 {
            return Err(OpError::shape("stft", "wave", wave_bs, format!("[B, S >= {shortest}]")).into());
        }
        crate::pass::same_kind("stft", &[("matrix", &self.analysis), ("wave", wave_bs)])?;
        let left = wave_bs.narrow(1, 1, edge)?.contiguous()?.flip(&[1])?;
        let right = wave_bs
            .narrow(1, samples - 1 - edge, edge)?
            .contiguous()?
            .flip(&[1])?;
        let padded = Tensor::cat(&[&left, wave_bs, &right], 1)?;
        let frames = self.frames(samples);
        let framing = Framing {
            samples: samples + 2 * edge,
            frames,
            width: self.window,
            hop: self.hop,
        };
        let frames_bfw = frames::frames(&padded, framing)?;
        frames_bfw
            .reshape(((), self.window))?
            .matmul(&self.analysis)?
            .reshape((batch, frames, 2 * self.bins()))
    }

    /// Real and imaginary parts, each [B, F, bins], of a signal [B, S].
    ///
    /// # Errors
    /// As [`Self::packed`].
    pub fn complex(&self, wave_bs: &Tensor) -> Result<(Tensor, Tensor)> {
        let packed = self.packed(wave_bs)?;
        Ok((
            packed.narrow(2, 0, self.bins())?,
            packed.narrow(2, self.bins(), self.bins())?,
        ))
    }

    /// Magnitudes [B, F, bins] of a signal [B, S], never below 1e-6 so that silence has a gradient.
    ///
    /// # Errors
    /// As [`Self::packed`].
    pub fn magnitude(&self, wave_bs: &Tensor) -> Result<Tensor> {
        magnitude::magnitude(&self.packed(wave_bs)?, self.bins())
    }

    /// Signal [B, hop F] whose spectrum comes nearest to real and imaginary parts [B, F, bins].
    ///
    /// # Errors
    /// If the shapes, element types or devices do not fit.
    pub fn inverse(&self, re_bfk: &Tensor, im_bfk: &Tensor) -> Result<Tensor> {
        if re_bfk.dims() != im_bfk.dims() {
            let expected = format!("{:?} like re", re_bfk.dims());
            return Err(OpError::shape("inverse stft", "im", im_bfk, expected).into());
        }
        self.inverse_packed(&Tensor::cat(&[re_bfk, im_bfk], candle_core::D::Minus1)?)
    }

    /// Signal [B, hop F] whose spectrum comes nearest to `packed` [B, F, 2 bins], real parts first.
    ///
    /// # Errors
    /// If the shape, element type or device does not fit.
    pub fn inverse_packed(&self, packed: &Tensor) -> Result<Tensor> {
        const OP: &str = "inverse stft";
        let columns = 2 * self.bins();
        let (batch, frames) = match packed.dims() {
            &[batch, frames, last] if last == columns => (batch, frames),
            _ => return Err(OpError::shape(OP, "spectrum", packed, format!("[B, F, {columns}]")).into()),
        };
        crate::pass::same_kind(OP, &[("matrix", &self.synthesis), ("spectrum", packed)])?;
        let frames_bfw = packed.reshape(((), columns))?.matmul(&self.synthesis)?;
        let frames_bfw = frames_bfw.reshape((batch, frames, self.window))?;
        let framing = Framing {
            samples: self.reach(frames),
            frames,
            width: self.window,
            hop: self.hop,
        };
        let sum_bs = frames::overlap_add(&frames_bfw, framing)?;
        sum_bs
            .narrow(1, self.window / 2, frames * self.hop)?
            .broadcast_mul(&self.gain(frames)?)
    }

    /// Samples from the start of the first frame to the end of the last.
    fn reach(&self, frames: usize) -> usize {
        (frames - 1) * self.hop + self.window
    }

    /// 1 / sum of the squared windows over each of the `hop frames` samples of an inverse, [hop frames].
    fn gain(&self, frames: usize) -> Result<Tensor> {
        let mut kept = self.gain.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((count, gain)) = &*kept
            && *count == frames
        {
            return Ok(gain.clone());
        }
        let mut squares = vec![0.0; self.reach(frames)];
        for frame in 0..frames {
            for (sum, weight) in squares[frame * self.hop..].iter_mut().zip(&self.hann) {
                *sum += weight * weight;
            }
        }
        let covered = &squares[self.window / 2..self.window / 2 + frames * self.hop];
        let gain: Vec<f64> = covered.iter().map(|sum| 1.0 / sum).collect();
        let gain = Tensor::new(gain, self.synthesis.device())?.to_dtype(self.synthesis.dtype())?;
        *kept = Some((frames, gain.clone()));
        Ok(gain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};

    const CPU: Device = Device::Cpu;
    /// (n_fft, window, hop): the mel front end, the vocoder, a hop that does not divide, the tightest hop.
    const SHAPES: [[usize; 3]; 4] = [[1024, 640, 160], [640, 640, 160], [64, 50, 12], [16, 8, 4]];

    /// Sample `i` of a signal mirrored at both ends.
    fn mirrored(x: &[f64], i: isize) -> f64 {
        let last = x.len() as isize - 1;
        let i = i.abs();
        x[(if i > last { 2 * last - i } else { i }) as usize]
    }

    #[test]
    fn agrees_with_a_fast_fourier_transform() -> Result<()> {
        for [n_fft, window, hop] in SHAPES {
            let wave = normal(1, &[2, 3 * window + 5]);
            let stft = Stft::new(n_fft, window, hop, DType::F64, &CPU)?;
            let (re, im) = stft.complex(&wave)?;
            let (re_found, im_found) = (values(&re), values(&im));
            let fft = realfft::RealFftPlanner::<f64>::new().plan_fft_forward(n_fft);
            let (mut re_wanted, mut im_wanted) = (vec![], vec![]);
            for signal in wave.to_vec2::<f64>()? {
                for frame in 0..signal.len() / hop {
                    let mut points = vec![0.0; n_fft];
                    let start = (n_fft - window) / 2;
                    for j in 0..window {
                        let at = (frame * hop + j) as isize - (window / 2) as isize;
                        points[start + j] = stft.hann[j] * mirrored(&signal, at);
                    }
                    let mut bins = fft.make_output_vec();
                    fft.process(&mut points, &mut bins).expect("lengths match");
                    re_wanted.extend(bins.iter().map(|c| c.re));
                    im_wanted.extend(bins.iter().map(|c| c.im));
                }
            }
            assert!(relative_rms(&re_found, &re_wanted) < 1e-12);
            assert!(relative_rms(&im_found, &im_wanted) < 1e-12);
            let squares: Vec<f64> = re_wanted
                .iter()
                .zip(&im_wanted)
                .map(|(a, b)| (a * a + b * b).sqrt())
                .collect();
            assert!(relative_rms(&values(&stft.magnitude(&wave)?), &squares) < 1e-10);
        }
        Ok(())
    }

    #[test]
    fn inverse_brings_the_signal_back() -> Result<()> {
        for [n_fft, window, hop] in SHAPES {
            let wave = normal(2, &[2, hop * 13]);
            for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-5)] {
                let stft = Stft::new(n_fft, window, hop, dtype, &CPU)?;
                let wave = wave.to_dtype(dtype)?;
                let (re, im) = stft.complex(&wave)?;
                let back = stft.inverse(&re, &im)?;
                assert_eq!(back.dims(), wave.dims());
                let error = relative_rms(&values(&back), &values(&wave));
                assert!(error < tolerance, "{n_fft} {window} {hop} {dtype:?}: {error:e}");
            }
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let stft = Stft::new(16, 12, 5, DType::F64, &CPU)?;
        check_gradients(&[normal(3, &[2, 33])], |t| stft.magnitude(&t[0]))?;
        check_gradients(&[normal(4, &[2, 3, 9]), normal(5, &[2, 3, 9])], |t| {
            stft.inverse(&t[0], &t[1])
        })?;
        let signal = [normal(6, &[2, 1600])];
        let run = |t: &[Tensor]| {
            let stft = Stft::new(640, 640, 160, t[0].dtype(), &CPU)?;
            stft.inverse_packed(&stft.packed(&t[0])?)
        };
        check_precision(&signal, run, 1e-5)?;
        check_threads(&signal, run)
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let make = |n_fft, window, hop| Stft::new(n_fft, window, hop, DType::F32, &CPU);
        let message = |found: Result<Stft>| found.unwrap_err().to_string();
        assert_eq!(
            message(make(640, 1024, 160)),
            "stft: window is 1024, expected an even number up to 640"
        );
        assert_eq!(
            message(make(640, 640, 400)),
            "stft: hop is 400, expected 1 to 320"
        );
        assert_eq!(
            message(make(641, 640, 160)),
            "stft: n_fft is 641, expected an even number above 0"
        );
        let stft = make(640, 640, 160).unwrap();
        let wave = Tensor::zeros((1, 320), DType::F32, &CPU).unwrap();
        let error = stft.packed(&wave).unwrap_err().to_string();
        assert_eq!(error, "stft: wave has shape [1, 320], expected [B, S >= 321]");
        let error = stft.packed(&normal(1, &[1, 800])).unwrap_err().to_string();
        assert_eq!(error, "stft: wave is F64, expected F32 like matrix");
        let error = stft.inverse_packed(&wave).unwrap_err().to_string();
        assert_eq!(
            error,
            "inverse stft: spectrum has shape [1, 320], expected [B, F, 642]"
        );
    }
}
