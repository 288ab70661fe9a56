//! Sounds at another sample rate.
//!
//! Band-limited conversion in the frequency domain (rubato's synchronous resampler): a fixed ratio, the
//! filter's delay removed, so that an event keeps its time. It runs on one thread and gives the same bits
//! every time.

use rubato::audioadapter_buffers::direct::InterleavedSlice;
use rubato::{Fft, FixedSync, Resampler, WindowFunction};

use super::clip::Sound;
use super::error::MediaError;

/// Rates that are converted; beyond them a header is broken rather than special.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;

/// Input samples per transform, at least: long enough for a steep filter, short enough for little ringing.
const BLOCK: u64 = 1024;

/// The sound at `rate` samples a second: `round(len * rate / sound.sample_rate)` samples, channels kept.
///
/// # Errors
/// A rate outside 1,000 to 768,000 Hz, or fields of `sound` that do not fit each other.
pub fn resample(sound: &Sound, rate: u32) -> Result<Sound, MediaError> {
    sound.check()?;
    if rate == sound.sample_rate {
        return Ok(sound.clone());
    }
    for (field, value) in [
        ("target sample rate", rate),
        ("sound.sample_rate", sound.sample_rate),
    ] {
        if !RATES.contains(&value) {
            return Err(MediaError::invalid(
                field,
                value,
                format!("{} to {} Hz", RATES.start(), RATES.end()),
            ));
        }
    }
    let (from, to) = (u64::from(sound.sample_rate), u64::from(rate));
    let wanted = ((sound.len() as u64 * to + from / 2) / from) as usize;
    let failed =
        |error: &dyn std::fmt::Display| MediaError::invalid("resampler", error, "a convertible sound");
    let mut samples = if sound.is_empty() {
        Vec::new()
    } else {
        // The resampler works in blocks of from / gcd samples and delays by half a transform: an even number
        // of blocks makes that delay whole, so that removing it is exact.
        let block = from / gcd(from, to);
        let transform = BLOCK.div_ceil(block).next_multiple_of(2) * block;
        let mut resampler = Fft::<f32>::new_custom(
            from as usize,
            to as usize,
            transform as usize,
            1,
            sound.channels,
            WindowFunction::BlackmanHarris2,
            FixedSync::Both,
        )
        .map_err(|error| failed(&error))?;
        let input = InterleavedSlice::new(&sound.samples, sound.channels, sound.len())
            .map_err(|error| failed(&error))?;
        resampler
            .process_all(&input, sound.len(), None)
            .map_err(|error| failed(&error))?
            .take_data()
    };
    // The resampler rounds the length up.
    samples.resize(wanted * sound.channels, 0.0);
    Sound::new(samples, sound.channels, rate)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(rate: u32, seconds: f64, hertz: f64) -> Sound {
        let len = (f64::from(rate) * seconds) as usize;
        let step = std::f64::consts::TAU * hertz / f64::from(rate);
        Sound::new(
            (0..len).map(|i| (0.5 * (step * i as f64).sin()) as f32).collect(),
            1,
            rate,
        )
        .unwrap()
    }

    #[test]
    fn a_sine_stays_that_sine() {
        for (from, to) in [
            (48_000, 16_000),
            (16_000, 48_000),
            (44_100, 16_000),
            (22_050, 44_100),
            (11_025, 16_000),
        ] {
            let found = resample(&sine(from, 1.0, 440.0), to).unwrap();
            let expected = sine(to, 1.0, 440.0);
            assert_eq!(found.len(), expected.len(), "{from} -> {to}");
            // The ends see the silence outside of the sound.
            let margin = to as usize / 20;
            let worst = (margin..found.len() - margin)
                .map(|i| (found.samples[i] - expected.samples[i]).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-3, "{from} -> {to}: {worst}");
        }
    }

    #[test]
    fn what_the_lower_rate_cannot_hold_is_removed() {
        let found = resample(&sine(48_000, 1.0, 11_000.0), 16_000).unwrap();
        let peak = found.samples[800..15_200]
            .iter()
            .fold(0.0_f32, |peak, sample| peak.max(sample.abs()));
        assert!(peak < 1e-3, "{peak}");
    }

    #[test]
    fn a_click_keeps_its_time() {
        for (from, to) in [(48_000_u32, 16_000_u32), (44_100, 16_000), (16_000, 44_100)] {
            let mut sound = Sound::new(vec![0.0; from as usize], 1, from).unwrap();
            sound.samples[from as usize / 4] = 1.0;
            let found = resample(&sound, to).unwrap();
            let loudest =
                (0..found.len()).max_by(|&a, &b| found.samples[a].abs().total_cmp(&found.samples[b].abs()));
            let seconds = loudest.unwrap() as f64 / f64::from(to);
            assert!(
                (seconds - 0.25).abs() < 1.0 / f64::from(to),
                "{from} -> {to}: {seconds}"
            );
        }
    }

    #[test]
    fn channels_stay_apart_and_runs_are_equal() {
        let left = sine(48_000, 0.5, 300.0);
        let stereo = left.samples.iter().flat_map(|&sample| [sample, 0.0]).collect();
        let found = resample(&Sound::new(stereo, 2, 48_000).unwrap(), 16_000).unwrap();
        assert_eq!(found.channel(0).unwrap(), resample(&left, 16_000).unwrap());
        assert!(
            found
                .channel(1)
                .unwrap()
                .samples
                .iter()
                .all(|&sample| sample == 0.0)
        );
    }

    #[test]
    fn odd_lengths_and_rates() {
        for len in [0, 1, 2, 7, 1023, 1025] {
            let sound = Sound::new(vec![0.25; len], 1, 16_000).unwrap();
            assert_eq!(resample(&sound, 48_000).unwrap().len(), len * 3);
        }
        let sound = sine(16_000, 0.1, 100.0);
        assert!(resample(&sound, 0).is_err());
        assert!(resample(&sound, 2_000_000).is_err());
        assert_eq!(resample(&sound, 16_001).unwrap().len(), 1600);
    }
}
