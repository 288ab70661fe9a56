//! Power spectrograms and mel bands as the published feature networks were fed with them.
//!
//! Each network has its own window, padding and bands; what they share is here. All of it is in f64, so that a golden file
//! of any reference is met by rounding its result once.

use std::f64::consts::TAU;
use std::sync::Arc;

use rayon::prelude::*;
use realfft::{RealFftPlanner, RealToComplex};

/// What lies beyond the ends of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// Nothing: only whole frames are taken.
    None,
    /// Half a transform of zeros at each end: frame f is centred on sample f hop.
    Zeros,
    /// Half a transform of the mirrored signal at each end, without its last sample.
    Mirror,
}

/// Frames of a signal through a periodic Hann window and a Fourier transform.
#[derive(Clone)]
pub struct Spectrogram {
    n_fft: usize,
    hop: usize,
    padding: Padding,
    /// As long as the window; it lies in the middle of the transform, or at its start without padding.
    window: Vec<f64>,
    transform: Arc<dyn RealToComplex<f64>>,
}

impl std::fmt::Debug for Spectrogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (window, padding) = (self.window.len(), self.padding);
        write!(
            f,
            "Spectrogram({} / {window} / {}, {padding:?})",
            self.n_fft, self.hop
        )
    }
}

impl Spectrogram {
    /// Transforms of `n_fft` points (an even number) of windows of `window` samples, one each `hop` samples.
    ///
    /// # Panics
    /// A size of zero, an odd one, or a window longer than the transform: all of them are constants of a front end.
    pub fn new(n_fft: usize, window: usize, hop: usize, padding: Padding) -> Self {
        assert!(n_fft > 0 && n_fft.is_multiple_of(2) && (1..=n_fft).contains(&window) && hop > 0);
        Self {
            n_fft,
            hop,
            padding,
            window: (0..window)
                .map(|j| 0.5 - 0.5 * (TAU * j as f64 / window as f64).cos())
                .collect(),
            transform: RealFftPlanner::new().plan_fft_forward(n_fft),
        }
    }

    /// Frequencies of a frame, `n_fft / 2 + 1`.
    pub fn bins(&self) -> usize {
        self.n_fft / 2 + 1
    }

    /// Samples that a signal has to have for a frame.
    pub fn shortest(&self) -> usize {
        match self.padding {
            Padding::None => self.window.len(),
            Padding::Zeros => 1,
            Padding::Mirror => self.n_fft / 2 + 1,
        }
    }

    /// Frames of a signal of `samples`.
    pub fn frames(&self, samples: usize) -> usize {
        match (samples < self.shortest(), self.padding) {
            (true, _) => 0,
            (false, Padding::None) => 1 + (samples - self.window.len()) / self.hop,
            (false, _) => 1 + samples / self.hop,
        }
    }

    /// Squares of magnitudes, `[frames, bins]`; nothing of a signal that is too short.
    pub fn power(&self, signal: &[f32]) -> Vec<f64> {
        let frames = self.frames(signal.len());
        let bins = self.bins();
        let mut out = vec![0.0; frames * bins];
        // The window lies in the middle of a padded frame.
        let inset = match self.padding {
            Padding::None => 0,
            Padding::Zeros | Padding::Mirror => (self.n_fft - self.window.len()) / 2,
        };
        let edge = match self.padding {
            Padding::None => 0,
            Padding::Zeros | Padding::Mirror => self.n_fft / 2,
        };
        out.par_chunks_mut(bins).enumerate().for_each_init(
            || (self.transform.make_input_vec(), self.transform.make_output_vec()),
            |(frame, spectrum), (index, out)| {
                frame.fill(0.0);
                let start = (index * self.hop + inset) as isize - edge as isize;
                for (j, weight) in self.window.iter().enumerate() {
                    frame[inset + j] = weight * self.sample(signal, start + j as isize);
                }
                // Lengths are those of the plan.
                if self.transform.process(frame, spectrum).is_ok() {
                    for (out, value) in out.iter_mut().zip(spectrum.iter()) {
                        *out = value.norm_sqr();
                    }
                }
            },
        );
        out
    }

    fn sample(&self, signal: &[f32], at: isize) -> f64 {
        let last = signal.len() as isize - 1;
        let at = match self.padding {
            Padding::Mirror if at < 0 => -at,
            Padding::Mirror if at > last => 2 * last - at,
            _ => at,
        };
        usize::try_from(at)
            .ok()
            .and_then(|at| signal.get(at))
            .map_or(0.0, |&value| f64::from(value))
    }
}

/// Triangular bands over the bins of a spectrogram.
#[derive(Clone, Debug, PartialEq)]
pub struct Bands {
    bins: usize,
    /// `[bands, bins]`, each with the range of bins that it reaches.
    rows: Vec<(usize, Vec<f64>)>,
}

impl Bands {
    /// Bands on the scale of Slaney's toolbox (linear below 1 kHz, logarithmic above), each of area one: librosa's default.
    pub fn slaney(rate: f64, n_fft: usize, bands: usize, [low, high]: [f64; 2]) -> Self {
        let edges = edges(bands, slaney(low), slaney(high), slaney_hertz);
        let weight = |hertz: f64, edge: &[f64]| {
            let (rise, fall) = (
                (hertz - edge[0]) / (edge[1] - edge[0]),
                (edge[2] - hertz) / (edge[2] - edge[1]),
            );
            rise.min(fall).max(0.0) * 2.0 / (edge[2] - edge[0])
        };
        Self::of(rate, n_fft, &edges, 0, |hertz| hertz, weight)
    }

    /// Bands of height one on the scale `1127 ln(1 + f / 700)`, straight on that scale; bin 0 is left out, as in VGGish.
    pub fn vggish(rate: f64, n_fft: usize, bands: usize, [low, high]: [f64; 2]) -> Self {
        let edges = edges(bands, htk(low), htk(high), |mel| mel);
        let weight = |mel: f64, edge: &[f64]| {
            let (rise, fall) = (
                (mel - edge[0]) / (edge[1] - edge[0]),
                (edge[2] - mel) / (edge[2] - edge[1]),
            );
            rise.min(fall).max(0.0)
        };
        Self::of(rate, n_fft, &edges, 1, htk, weight)
    }

    fn of(
        rate: f64,
        n_fft: usize,
        edges: &[f64],
        first: usize,
        place: impl Fn(f64) -> f64,
        weight: impl Fn(f64, &[f64]) -> f64,
    ) -> Self {
        let bins = n_fft / 2 + 1;
        let places: Vec<f64> = (0..bins)
            .map(|bin| place(bin as f64 * rate / n_fft as f64))
            .collect();
        let row = |edge: &[f64]| {
            let inside = |bin: &usize| weight(places[*bin], edge) > 0.0;
            let start = (first..bins).find(inside).unwrap_or(first);
            let row = (start..bins).map(|bin| weight(places[bin], edge));
            (start, row.take_while(|weight| *weight > 0.0).collect())
        };
        Self {
            bins,
            rows: edges.windows(3).map(row).collect(),
        }
    }

    /// Number of bands.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// `[frames, bins]` to `[frames, bands]`, each value through `finish`.
    pub fn apply(&self, spectrum: &[f64], finish: impl Fn(f64) -> f64 + Sync) -> Vec<f64> {
        let mut out = vec![0.0; spectrum.len() / self.bins * self.rows.len()];
        out.par_chunks_mut(self.rows.len().max(1))
            .zip(spectrum.par_chunks(self.bins))
            .for_each(|(out, frame)| {
                for (out, (start, row)) in out.iter_mut().zip(&self.rows) {
                    let sum: f64 = row.iter().zip(&frame[*start..]).map(|(w, x)| w * x).sum();
                    *out = finish(sum);
                }
            });
        out
    }
}

/// Decibels of power, not below -100 dB.
pub fn decibels(power: f64) -> f64 {
    10.0 * power.max(1e-10).log10()
}

/// `bands + 2` places at equal distances, as `back` turns them.
fn edges(bands: usize, low: f64, high: f64, back: impl Fn(f64) -> f64) -> Vec<f64> {
    let step = (high - low) / (bands + 1) as f64;
    (0..bands + 2).map(|i| back(low + step * i as f64)).collect()
}

fn htk(hertz: f64) -> f64 {
    1127.0 * (hertz / 700.0).ln_1p()
}

/// Where Slaney's scale becomes logarithmic, in Hz, and its steps.
const KNEE: f64 = 1000.0;
const PER_MEL: f64 = 200.0 / 3.0;
const LOG_STEP: f64 = 27.0;

fn slaney(hertz: f64) -> f64 {
    if hertz < KNEE {
        hertz / PER_MEL
    } else {
        KNEE / PER_MEL + (hertz / KNEE).ln() * LOG_STEP / 6.4f64.ln()
    }
}

fn slaney_hertz(mel: f64) -> f64 {
    let knee = KNEE / PER_MEL;
    if mel < knee {
        mel * PER_MEL
    } else {
        KNEE * ((mel - knee) * 6.4f64.ln() / LOG_STEP).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The transform by its definition, on a signal that is padded as numpy pads it.
    fn plain(padded: &[f64], n_fft: usize, window: usize, hop: usize, inset: usize) -> Vec<f64> {
        let frames = 1 + (padded.len() - if inset == 0 { window } else { n_fft }) / hop;
        let mut out = Vec::new();
        for frame in 0..frames {
            for bin in 0..=n_fft / 2 {
                let (mut re, mut im) = (0.0, 0.0);
                for j in 0..window {
                    let hann = 0.5 - 0.5 * (TAU * j as f64 / window as f64).cos();
                    let angle = TAU * (bin * (inset + j)) as f64 / n_fft as f64;
                    let value = hann * padded[frame * hop + inset + j];
                    re += value * angle.cos();
                    im -= value * angle.sin();
                }
                out.push(re * re + im * im);
            }
        }
        out
    }

    #[test]
    fn powers_are_those_of_the_definition() {
        let signal: Vec<f32> = (0..45).map(|i| ((i * i) as f32 * 0.1).sin()).collect();
        let wide: Vec<f64> = signal.iter().map(|&value| f64::from(value)).collect();
        for (padding, padded, inset) in [
            (Padding::None, wide.clone(), 0),
            (Padding::Zeros, [&[0.0; 8][..], &wide, &[0.0; 8]].concat(), 3),
            (
                Padding::Mirror,
                [
                    wide[1..9].iter().rev().copied().collect::<Vec<_>>(),
                    wide.clone(),
                    wide[36..44].iter().rev().copied().collect(),
                ]
                .concat(),
                3,
            ),
        ] {
            let spectrogram = Spectrogram::new(16, 10, 4, padding);
            let found = spectrogram.power(&signal);
            let expected = plain(&padded, 16, 10, 4, inset);
            assert_eq!(found.len(), spectrogram.frames(45) * 9);
            assert_eq!(found.len(), expected.len(), "{padding:?}");
            let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            assert!(apart.fold(0.0, f64::max) < 1e-12, "{padding:?}");
        }
        let mirror = Spectrogram::new(16, 10, 4, Padding::Mirror);
        assert_eq!((mirror.frames(8), mirror.frames(9)), (0, 3));
        assert!(mirror.power(&signal[..8]).is_empty());
    }

    #[test]
    fn scales_turn_back() {
        for hertz in [20.0, 999.0, 1000.0, 1001.0, 14_000.0] {
            assert!((slaney_hertz(slaney(hertz)) - hertz).abs() < 1e-9);
        }
        assert!((slaney(1000.0) - 15.0).abs() < 1e-12);
        let bands = Bands::vggish(16_000.0, 512, 64, [125.0, 7500.0]);
        assert_eq!(bands.len(), 64);
        assert!(bands.rows.iter().all(|(start, _)| *start > 0));
    }
}
