//! Soundtracks as ImageBind takes them: three clips of two seconds, each a picture of bands and frames.

use std::ops::Range;

use fulgur_datasets::media::{MediaError, Sound, resample_windowed};

use super::filterbank::{FRAME, Filterbank, SAMPLE_RATE};

/// Clips of a soundtrack.
pub const CLIPS: usize = 3;
/// Samples of a clip.
const CLIP: usize = 2 * SAMPLE_RATE as usize;
/// What is taken off the logarithms, and what the rest is divided by.
const MEAN: f32 = -4.268;
const DEVIATION: f32 = 9.138;

/// Samples at [`SAMPLE_RATE`] of the first channel, or of the mean of all.
///
/// # Errors
/// A rate that cannot be converted.
pub fn heard(sound: &Sound, downmix: bool) -> Result<Vec<f32>, MediaError> {
    let one = match downmix {
        true => sound.mono(),
        false => sound.channel(0).unwrap_or_else(|| sound.mono()),
    };
    Ok(resample_windowed(&one, SAMPLE_RATE)?.samples)
}

/// Which of so many samples belong to each of the clips, which are evenly spaced and overlap in short soundtracks; the only one, three
/// times, where there are no more than two seconds.
pub fn clips(samples: usize) -> [Range<usize>; CLIPS] {
    let rate = f64::from(SAMPLE_RATE);
    // The reference takes the last start from the length in seconds, in f64, and multiplies it exactly.
    let last_s = (samples as f64 / rate - CLIP as f64 / rate).max(0.0);
    std::array::from_fn(|k| {
        let start = floor_of_product(last_s, k as u64 * u64::from(SAMPLE_RATE), CLIPS as u64 - 1);
        start.min(samples)..(start + CLIP).min(samples)
    })
}

/// The whole part of `x * by / over`, for a finite `x` of 0 or more, without rounding.
fn floor_of_product(x: f64, by: u64, over: u64) -> usize {
    let bits = x.to_bits();
    let exponent = ((bits >> 52) & 0x7ff) as i32;
    let fraction = u128::from(bits & ((1 << 52) - 1));
    let (mantissa, exponent) = match exponent {
        0 => (fraction, -1074),
        _ => (fraction | 1 << 52, exponent - 1075),
    };
    let product = mantissa * u128::from(by);
    let whole = match exponent {
        0.. => (product << exponent.min(32)) / u128::from(over),
        _ => match u32::try_from(-exponent) {
            // What is divided by more than the product is below one.
            Ok(shift) if shift < 100 => product / (u128::from(over) << shift),
            _ => 0,
        },
    };
    usize::try_from(whole).unwrap_or(usize::MAX)
}

/// One clip `[bands, frames]`: the filterbank, turned, cut or padded with zeros at the end, and scaled. Less than one frame of samples is
/// padded with silence to one.
pub fn picture(bank: &Filterbank, samples: &[f32], frames: usize) -> Vec<f32> {
    let padded: Vec<f32>;
    let samples = if samples.len() < FRAME {
        padded = samples
            .iter()
            .copied()
            .chain(std::iter::repeat(0.0))
            .take(FRAME)
            .collect();
        &padded
    } else {
        samples
    };
    let rows = bank.log_mel(samples);
    let bands = bank.bands();
    let mut out = vec![(0.0 - MEAN) / DEVIATION; bands * frames];
    for (frame, row) in rows.chunks_exact(bands).take(frames).enumerate() {
        for (band, value) in row.iter().enumerate() {
            out[band * frames + frame] = (value - MEAN) / DEVIATION;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clips_are_evenly_spaced() {
        let starts = |seconds: f64| clips((seconds * 16_000.0).round() as usize).map(|clip| clip.start);
        assert_eq!(starts(10.0), [0, 64_000, 128_000]);
        assert_eq!(starts(5.0), [0, 24_000, 48_000]);
        assert_eq!(starts(2.0), [0, 0, 0]);
        assert_eq!(clips(16_000), [0..16_000, 0..16_000, 0..16_000]);
        // 7.3 - 2 is a little less than 5.3 in f64.
        assert_eq!(starts(7.3)[1], 42_399);
        assert!(clips(0).iter().all(Range::is_empty));
        let long = clips(36_000 * 16_000);
        assert_eq!((long[2].len(), long[2].end), (32_000, 36_000 * 16_000));
    }

    #[test]
    fn products_are_not_rounded() {
        assert_eq!(floor_of_product(0.0, 5, 2), 0);
        assert_eq!(floor_of_product(3.0, 7, 2), 10);
        assert_eq!(floor_of_product(1e-300, 16_000, 2), 0);
        // The number next below 5/2 times two is below five.
        assert_eq!(floor_of_product(2.5f64.next_down(), 2, 1), 4);
        assert_eq!(floor_of_product(1e6, 32_000, 2), 16_000_000_000);
    }

    #[test]
    fn pictures_are_padded_and_cut() {
        let bank = Filterbank::new(128);
        let silent = picture(&bank, &vec![0.0; 32_000], 204);
        assert_eq!(silent.len(), 128 * 204);
        assert!((silent[197] - -1.277_565).abs() < 1e-5 && (silent[198] - 0.467_061).abs() < 1e-5);
        let wave: Vec<f32> = (0..40_000).map(|i| (i as f32 * 0.1).sin()).collect();
        let (long, short) = (picture(&bank, &wave, 204), picture(&bank, &wave[..100], 204));
        assert_eq!(long.len(), short.len());
        assert!(short[0] != short[1] && (short[1] - 0.467_061).abs() < 1e-5);
        let rows = bank.log_mel(&wave);
        assert!((long[5 * 204 + 9] - (rows[9 * 128 + 5] + 4.268) / 9.138).abs() < 1e-6);
    }
}
