//! When a sound starts, by energy: the first moment that rises clearly above the quiet part of the clip; and how far
//! such moments are apart.

/// Samples between measurements at 16 kHz: 5 ms.
const HOP: usize = 80;
/// Hops that a level is averaged over: 20 ms.
const WINDOW: usize = 4;
/// How far above the floor the loudest part must be for the clip to have an onset at all.
const LEAST_RISE_DB: f64 = 12.0;
/// Where between floor and peak, in decibels, the onset is taken.
const THRESHOLD: f64 = 0.5;
/// Share of the measurements that lies below the floor: sounds may fill nearly the whole clip.
const FLOOR_QUANTILE: f64 = 0.05;
/// Quietest level that counts, to keep digital silence finite.
const SILENCE_DB: f64 = -70.0;

/// A sound's start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Onset {
    /// Seconds from the start of the clip.
    pub time_s: f64,
    /// Decibels between floor and peak.
    pub rise_db: f64,
}

/// The first onset of mono samples at 16 kHz, or `None` when nothing rises by 12 dB.
pub fn onset(samples: &[f32]) -> Option<Onset> {
    let power: Vec<f64> = samples
        .chunks_exact(HOP)
        .map(|hop| hop.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / HOP as f64)
        .collect();
    let levels: Vec<f64> = power
        .windows(WINDOW)
        .map(|w| (10.0 * (w.iter().sum::<f64>() / WINDOW as f64).max(1e-12).log10()).max(SILENCE_DB))
        .collect();
    let mut sorted = levels.clone();
    sorted.sort_by(f64::total_cmp);
    let floor = *sorted.get((sorted.len() as f64 * FLOOR_QUANTILE) as usize)?;
    let rise_db = sorted.last()? - floor;
    if rise_db < LEAST_RISE_DB {
        return None;
    }
    let at = levels
        .iter()
        .position(|&level| level > floor + THRESHOLD * rise_db)?;
    // The window that first holds the sound ends just behind its start.
    Some(Onset {
        time_s: ((at + WINDOW - 1) * HOP) as f64 / 16_000.0,
        rise_db,
    })
}

/// What a distance in time counts as where an event is missing, in milliseconds.
pub const MISSING_MS: f64 = 1000.0;

/// Milliseconds between two instants in seconds; [`MISSING_MS`] where one is missing.
pub fn apart_ms(a: Option<f64>, b: Option<f64>) -> f64 {
    match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() * 1000.0,
        _ => MISSING_MS,
    }
}

/// The middle value, of an even number the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    #[test]
    fn onset_of_a_tone_in_noise_is_found_within_20_ms() {
        for (seed, start_s) in [(1, 0.4), (2, 1.7), (3, 3.2)] {
            let mut noise = Philox::new(seed, 0);
            let start = (start_s * 16_000.0) as usize;
            let samples: Vec<f32> = (0..64_000)
                .map(|i| {
                    let tone = if i >= start {
                        0.2 * (i as f32 * 0.3).sin()
                    } else {
                        0.0
                    };
                    tone + 0.001 * noise.normal()
                })
                .collect();
            let found = onset(&samples).map_or(-1.0, |o| o.time_s);
            assert!((found - start_s).abs() < 0.02, "{found} for {start_s}");
        }
    }

    #[test]
    fn steady_noise_and_silence_have_no_onset() {
        let mut noise = Philox::new(4, 0);
        let steady: Vec<f32> = (0..64_000).map(|_| 0.05 * noise.normal()).collect();
        assert_eq!(onset(&steady), None);
        assert_eq!(onset(&vec![0.0; 64_000]), None);
        assert_eq!(onset(&[]), None);
    }

    #[test]
    fn what_is_missing_counts_as_a_second() {
        assert!((apart_ms(Some(1.25), Some(1.0)) - 250.0).abs() < 1e-9);
        assert!((apart_ms(Some(1.0), Some(3.5)) - 2500.0).abs() < 1e-9);
        for (a, b) in [(None, Some(1.0)), (Some(1.0), None), (None, None)] {
            assert_eq!(apart_ms(a, b), 1000.0);
        }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[1000.0, 20.0, 40.0, 1000.0]), Some(520.0));
    }
}
