//! Sounds at another rate as `torchaudio.functional.resample` makes them: published audio networks were trained and are compared on these.
//!
//! ```text
//! y[j] = sum_i x[i] b h(b (i/f - j/t))     h(u) = sinc(u) cos^2(pi u / 2L) for |u| < L
//! ```
//!
//! with f and t the rates without their common divisor, b = 0.99 min(f, t) the band that is kept, and L = 6 zero crossings. The filter
//! is shorter than that of [`super::resample`], and lets a little through that the lower rate cannot hold.

use super::clip::Sound;
use super::error::MediaError;

/// Zero crossings of the filter to each side.
const CROSSINGS: f64 = 6.0;
/// Part of the band that is kept.
const ROLLOFF: f64 = 0.99;
/// Rates that are converted.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;

/// The sound at `rate` samples a second: `ceil(len * rate / sound.sample_rate)` samples, channels kept.
///
/// # Errors
/// A rate outside 1,000 to 768,000 Hz, or fields of `sound` that do not fit each other.
pub fn resample_windowed(sound: &Sound, rate: u32) -> Result<Sound, MediaError> {
    sound.check()?;
    if rate == sound.sample_rate {
        return Ok(sound.clone());
    }
    for (field, value) in [
        ("target sample rate", rate),
        ("sound.sample_rate", sound.sample_rate),
    ] {
        if !RATES.contains(&value) {
            let expected = format!("{} to {} Hz", RATES.start(), RATES.end());
            return Err(MediaError::invalid(field, value, expected));
        }
    }
    let shared = gcd(sound.sample_rate, rate);
    let (from, to) = ((sound.sample_rate / shared) as usize, (rate / shared) as usize);
    let band = from.min(to) as f64 * ROLLOFF;
    let width = (CROSSINGS * from as f64 / band).ceil() as usize;
    let wanted = (sound.len() * to).div_ceil(from);
    let channels = sound.channels;
    let mut samples = vec![0f32; wanted * channels];
    let mut weights = Vec::with_capacity(2 * width + 3);
    // All results of one phase share their weights.
    for phase in 0..to.min(wanted) {
        // The reference divides in f32.
        let shift = f64::from(phase as f32 / to as f32);
        let middle = from as f64 * shift;
        // Weight `at` belongs to the sample `at + first - width` of a block; beyond these all are zero.
        let first = middle.floor() as usize;
        weights.clear();
        weights.extend((first..=first + 2 * width + 2).map(|at| {
            let time = ((at as f64 - width as f64) / from as f64 - shift) * band;
            (filter(time) * band / from as f64) as f32
        }));
        for (block, place) in (phase..wanted).step_by(to).enumerate() {
            let start = block * from + first;
            let low = start.saturating_sub(width);
            let high = (start + weights.len()).saturating_sub(width).min(sound.len());
            for channel in 0..channels {
                let sum: f32 = (low..high)
                    .map(|i| sound.samples[i * channels + channel] * weights[i + width - start])
                    .sum();
                samples[place * channels + channel] = sum;
            }
        }
    }
    Sound::new(samples, channels, rate)
}

/// The windowed sinc.
fn filter(time: f64) -> f64 {
    if time.abs() >= CROSSINGS {
        return 0.0;
    }
    let angle = time * std::f64::consts::PI;
    let window = (angle / CROSSINGS / 2.0).cos().powi(2);
    match angle == 0.0 {
        true => window,
        false => angle.sin() / angle * window,
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_stay_apart_and_lengths_are_rounded_up() {
        let wave: Vec<f32> = (0..999).map(|i| (i as f32 * 0.05).sin()).collect();
        let left = Sound::new(wave.clone(), 1, 44_100).unwrap();
        let both = wave.iter().flat_map(|&x| [x, -x]).collect();
        let both = resample_windowed(&Sound::new(both, 2, 44_100).unwrap(), 16_000).unwrap();
        let alone = resample_windowed(&left, 16_000).unwrap();
        assert_eq!(alone.len(), (999 * 160usize).div_ceil(441));
        assert_eq!(both.channel(0).unwrap(), alone);
        let right = both.channel(1).unwrap();
        assert!(right.samples.iter().zip(&alone.samples).all(|(r, l)| *r == -l));
        assert_eq!(resample_windowed(&left, 44_100).unwrap(), left);
        assert!(resample_windowed(&left, 10).is_err());
        let none = Sound::new(Vec::new(), 1, 8000).unwrap();
        assert!(resample_windowed(&none, 16_000).unwrap().is_empty());
    }
}
