//! Onsets of a sound by spectral flux, as librosa finds them with its defaults (Boeck, Krebs and Schedl, ISMIR 2012).
//!
//! ```text
//! S = dB of 128 mel bands (22,050 Hz, transforms of 2048 every 512 samples, zeros at the ends), at most 80 dB below its peak
//! strength[t] = mean over bands of max(0, S[t] - S[t - 1]), moved by half a transform
//! an onset    is the largest value of the 30 ms before it, lies 0.07 above the mean of the 100 ms around it (of a strength
//!             from 0 to 1), and comes more than 30 ms after the last one
//! ```

use crate::features::spectrogram::{Bands, Padding, Spectrogram, decibels};

/// Samples a second of the waveforms.
pub const RATE: u32 = 22_050;
/// Samples from frame to frame.
pub const HOP: usize = 512;
const N_FFT: usize = 2048;
const BANDS: usize = 128;
/// Decibels below the peak that count.
const RANGE_DB: f64 = 80.0;
/// How far a strength lies above its surroundings.
const RISE: f64 = 0.07;
/// Frames of 30 and of 100 ms.
const NEAR: usize = 1;
const AROUND: usize = 4;

/// Strength of onsets at each frame, of a waveform at 22,050 Hz; nothing of an empty one.
pub fn strength(wave: &[f32]) -> Vec<f64> {
    strength_above(wave, RANGE_DB)
}

/// As [`strength`], of what is not more than `range_db` decibels below the peak.
pub(super) fn strength_above(wave: &[f32], range_db: f64) -> Vec<f64> {
    if wave.is_empty() {
        return Vec::new();
    }
    let rate = f64::from(RATE);
    let spectrogram = Spectrogram::new(N_FFT, N_FFT, HOP, Padding::Zeros);
    let bands = Bands::slaney(rate, N_FFT, BANDS, [0.0, rate / 2.0]);
    let mut levels = bands.apply(&spectrogram.power(wave), decibels);
    let floor = levels.iter().copied().fold(f64::NEG_INFINITY, f64::max) - range_db;
    levels.iter_mut().for_each(|level| *level = level.max(floor));
    let frames: Vec<&[f64]> = levels.chunks_exact(BANDS).collect();
    let flux = |pair: &[&[f64]]| -> f64 {
        let rises = pair[0]
            .iter()
            .zip(pair[1])
            .map(|(before, now)| (now - before).max(0.0));
        rises.sum::<f64>() / BANDS as f64
    };
    // One frame for the difference, and those of half a transform.
    let mut strength = vec![0.0; 1 + N_FFT / (2 * HOP)];
    strength.extend(frames.windows(2).map(flux));
    strength.truncate(frames.len());
    strength
}

/// Frames of a [`strength`] that are onsets.
pub fn peaks(strength: &[f64]) -> Vec<usize> {
    let low = strength.iter().copied().fold(f64::INFINITY, f64::min);
    let high = strength.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let span = high - low;
    if span.is_nan() || span <= 0.0 || !span.is_finite() {
        return Vec::new();
    }
    let x: Vec<f64> = strength.iter().map(|value| (value - low) / span).collect();
    let mut found = Vec::new();
    let mut n = 0;
    while n < x.len() {
        let most = x[n.saturating_sub(NEAR)..=n].iter().copied().fold(0.0, f64::max);
        let around = &x[n.saturating_sub(AROUND)..(n + AROUND + 1).min(x.len())];
        let mean = around.iter().sum::<f64>() / around.len() as f64;
        if x[n] >= most && x[n] >= mean + RISE {
            found.push(n);
            n += NEAR;
        }
        n += 1;
    }
    found
}

/// Seconds of the onsets of a waveform at 22,050 Hz.
pub fn times(wave: &[f32]) -> Vec<f64> {
    let of = |frame: usize| (frame * HOP) as f64 / f64::from(RATE);
    peaks(&strength(wave)).into_iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, values};

    #[test]
    fn strengths_and_onsets_are_those_of_librosa() {
        let tensors = golden("av_align");
        for name in ["clicks", "noise", "silence", "short"] {
            let found = strength(&values(&tensors[&format!("wave.{name}")]));
            let expected = values(&tensors[&format!("strength.{name}")]);
            assert_eq!(found.len(), expected.len(), "{name}");
            let size = expected.iter().copied().fold(1.0, f32::max);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (*found as f32 - expected).abs() < 1e-3 * size,
                    "{name}: {found} {expected}"
                );
            }
            let onsets: Vec<usize> = tensors[&format!("onsets.{name}")]
                .to_vec1::<i64>()
                .unwrap()
                .into_iter()
                .map(|frame| frame as usize)
                .collect();
            assert_eq!(peaks(&found), onsets, "{name}");
        }
    }

    #[test]
    fn nothing_has_no_onsets() {
        assert!(times(&[]).is_empty() && times(&[0.0; 100]).is_empty());
        assert!(peaks(&[1.0, f64::NAN]).is_empty());
        assert!(peaks(&[f64::INFINITY, 0.0]).is_empty());
    }
}
