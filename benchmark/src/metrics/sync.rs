//! How far sound and picture of a clip are apart, without any network: moments where motion changes suddenly, beside onsets of
//! the sound.
//!
//! ```text
//! m[t] = mean difference of frames t - 1 and t
//! V = moments where m falls (something stops) or rises (something starts or appears), weighted by how much
//! A = onsets of the sound, weighted by their strength
//! r(L) = sum over A and V of the weights' product times a bump of (a - v - L), times a wide bump of L
//! offset = the L with the largest r;   confidence = 1 - (largest r elsewhere) / (largest r)
//! ```
//!
//! A positive offset means that the sound is late. Things are heard when they land more often than when they take off, so that
//! stops weigh more than starts. Clips in which much moves at once, or nothing, give low confidence or no offset.

use fulgur_datasets::media::{MediaError, Sound, Video, resample};
use rayon::prelude::*;
use serde::Serialize;

use super::{farneback, onset};

/// Offsets that are looked at, in seconds to either side, and their steps.
const FARTHEST_S: f64 = 1.5;
const STEP_S: f64 = 0.01;
/// Width of the bump in seconds: a frame or two of slow film.
const BUMP_S: f64 = 0.12;
/// Of two offsets that would do, the smaller one is likelier: width of the wide bump in seconds.
const LIKELY_S: f64 = 1.0;
/// How many of its widths the bump reaches.
const REACH: f64 = 4.0;
/// What a start weighs beside a stop.
const START: f64 = 0.1;
/// Decibels below the peak of a sound that can begin: noise in which nothing happens lies below.
const RANGE_DB: f64 = 45.0;
/// Changes of less than this part of the largest one are noise.
const LEAST_CHANGE: f64 = 0.15;
/// Mean difference of bytes below which nothing moves.
const STILL: f64 = 0.05;
/// Offsets nearer than this to the best one are the same.
const SAME_S: f64 = 0.2;
/// Onset strengths come this long after the sound begins: measured on clicks.
const ONSET_DELAY_S: f64 = 0.02;

/// What the probe found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Offset {
    /// Milliseconds that the sound is late; negative where it is early.
    pub offset_ms: f64,
    /// 0 where another offset would do as well, 1 where none would.
    pub confidence: f64,
}

/// A moment and its weight.
type Event = (f64, f64);

/// The offset of a clip; `None` where nothing moves or nothing begins to sound.
///
/// # Errors
/// A sample rate that cannot be converted.
pub fn probe(video: &Video, sound: &Sound) -> Result<Option<Offset>, MediaError> {
    let wave = resample(&sound.mono(), onset::RATE)?;
    Ok(offset(&heard(&wave.samples), &seen(video)))
}

/// Onsets of a waveform at 22,050 Hz.
fn heard(wave: &[f32]) -> Vec<Event> {
    let strength = onset::strength_above(wave, RANGE_DB);
    let seconds = onset::HOP as f64 / f64::from(onset::RATE);
    onset::peaks(&strength)
        .into_iter()
        .map(|frame| (frame as f64 * seconds - ONSET_DELAY_S, strength[frame]))
        .collect()
}

/// Sudden changes of motion.
fn seen(video: &Video) -> Vec<Event> {
    let grey: Vec<Vec<u8>> = (0..video.frame_count)
        .into_par_iter()
        .map(|i| farneback::grey(video.frame(i)))
        .collect();
    let difference = |pair: &[Vec<u8>]| {
        let sum: u64 = pair[0]
            .iter()
            .zip(&pair[1])
            .map(|(a, b)| u64::from(a.abs_diff(*b)))
            .sum();
        sum as f64 / pair[0].len().max(1) as f64
    };
    // Number t of `motion` leads to frame t + 1.
    let motion: Vec<f64> = grey.par_windows(2).map(difference).collect();
    let change = |(t, pair): (usize, &[f64])| {
        let rise = pair[1] - pair[0];
        // What stops did so at the frame that the last motion led to; what starts is seen at the next one.
        if rise < 0.0 {
            (video.times_s[t + 1], -rise)
        } else {
            (video.times_s[t + 2], START * rise)
        }
    };
    let changes: Vec<Event> = motion.windows(2).enumerate().map(change).collect();
    let most = changes.iter().map(|(_, weight)| *weight).fold(0.0, f64::max);
    if most < STILL {
        return Vec::new();
    }
    let counts = |(_, weight): &Event| *weight >= LEAST_CHANGE * most;
    changes.into_iter().filter(counts).collect()
}

fn offset(heard: &[Event], seen: &[Event]) -> Option<Offset> {
    let steps = (FARTHEST_S / STEP_S).round() as i32;
    let place = |step: i32| f64::from(step) * STEP_S;
    let mut curve: Vec<(f64, f64)> = (-steps..=steps).map(|step| (place(step), 0.0)).collect();
    for &(a, strength) in heard {
        // Both are in the order of their times, and a film has many of them.
        let near = seen.partition_point(|(v, _)| a - v > FARTHEST_S + REACH * BUMP_S);
        for &(v, weight) in &seen[near..] {
            let apart = a - v;
            if apart < -FARTHEST_S - REACH * BUMP_S {
                break;
            }
            let cell = |late: f64| ((late / STEP_S).round() as i32).clamp(-steps, steps);
            for step in cell(apart - REACH * BUMP_S)..=cell(apart + REACH * BUMP_S) {
                let bump = (-((apart - place(step)) / BUMP_S).powi(2) / 2.0).exp();
                curve[(step + steps) as usize].1 += strength * weight * bump;
            }
        }
    }
    for (late, value) in &mut curve {
        *value *= (-(*late / LIKELY_S).powi(2) / 2.0).exp();
    }
    let best = curve.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1))?;
    if best.1 <= 0.0 {
        return None;
    }
    let elsewhere = curve
        .iter()
        .filter(|(late, _)| (late - best.0).abs() > SAME_S)
        .map(|(_, value)| *value)
        .fold(0.0, f64::max);
    Some(Offset {
        offset_ms: best.0 * 1000.0,
        confidence: 1.0 - elsewhere / best.1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::scenes::{ClipSpec, Composer, Options, Split};
    use fulgur_datasets::things::Things;

    /// The sound later by so many seconds, or earlier.
    fn moved(samples: &[f32], rate: f64, late_s: f64) -> Vec<f32> {
        let by = (late_s * rate).round() as isize;
        (0..samples.len() as isize)
            .map(|i| {
                usize::try_from(i - by)
                    .ok()
                    .and_then(|i| samples.get(i))
                    .copied()
                    .unwrap_or(0.0)
            })
            .collect()
    }

    /// How often the sign of a shift is found, and the shift within 100 ms, among all cases: composed clips of every motion, whose
    /// sound is moved by known amounts.
    fn found(things: Things, seed: u64, clip: ClipSpec, scenes: u64) -> [i32; 3] {
        let options = Options {
            seed,
            clip,
            two_things: 0.0,
            pictures: 0.0,
            ..Options::default()
        };
        let composer = Composer::new(things, &[], options).unwrap();
        let (mut right, mut all, mut near) = (0, 0, 0);
        for index in 0..scenes {
            let scene = composer.scene(Split::HeldOutCombination, index);
            let clip = composer.options().clip;
            let frames = composer.render_frames(&scene);
            let samples = composer.render_sound(&scene);
            let video = Video::new(frames, clip.width, clip.height, clip.fps).unwrap();
            let contact = scene.actors[0].contact_s;
            // A shift that takes the event out of the clip leaves nothing to find.
            let inside = |late: &f64| (0.1..clip.duration_s - 0.2).contains(&(contact + late));
            for late in [-0.5, -0.25, 0.25, 0.5].into_iter().filter(inside) {
                let rate = f64::from(clip.sample_rate);
                let sound = Sound::new(moved(&samples, rate, late), 1, clip.sample_rate).unwrap();
                let found = probe(&video, &sound).unwrap();
                all += 1;
                let ms = found.map_or(0.0, |found| found.offset_ms);
                right += i32::from(ms * late > 0.0);
                near += i32::from((ms / 1000.0 - late).abs() < 0.1);
            }
        }
        [right, near, all]
    }

    /// The sign has to be right in nine of ten cases, and so many of ten offsets within 100 ms.
    fn check(name: &str, [right, near, all]: [i32; 3], near_tenths: i32) {
        eprintln!("{name}: {right} of {all} with the right sign, {near} within 100 ms");
        assert!(
            right * 10 >= all * 9 && near * 10 >= all * near_tenths,
            "{name}: {right} and {near} of {all}"
        );
    }

    /// Things from the 24th on have other colours, forms and pitches than the first eight.
    fn others() -> Things {
        Things(Things::synthetic(40).0.split_off(24))
    }

    #[test]
    fn shifts_of_composed_clips_are_found() {
        let usual = ClipSpec::default();
        check("chosen on", found(Things::synthetic(8), 11, usual, 48), 5);
    }

    /// The probe's constants were chosen on none of these.
    #[test]
    fn shifts_are_found_in_other_scenes() {
        let usual = ClipSpec::default();
        check("other seeds", found(Things::synthetic(8), 2024, usual, 48), 5);
        check("other things", found(others(), 77, usual, 48), 4);
    }

    #[test]
    fn shifts_are_found_in_other_sizes() {
        let large = ClipSpec {
            width: 128,
            height: 112,
            fps: 25.0,
            duration_s: 4.5,
            sample_rate: 44_100,
        };
        check("other sizes", found(others(), 5, large, 24), 4);
    }

    #[test]
    fn events_at_a_fixed_distance_have_that_offset() {
        let seen = [(0.5, 1.0), (1.3, 0.7), (2.9, 1.0)];
        let heard = seen.map(|(time, weight)| (time + 0.3, weight));
        let found = offset(&heard, &seen).unwrap();
        assert!(
            (found.offset_ms - 300.0).abs() < 11.0 && found.confidence > 0.5,
            "{found:?}"
        );
        assert_eq!(offset(&[], &seen), None);
        assert_eq!(offset(&heard, &[]), None);
        let even = [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.5, 1.0), (2.0, 1.0)];
        assert!(offset(&even, &even).unwrap().confidence < 0.5);
    }

    #[test]
    fn still_and_silent_clips_have_none() {
        let video = Video::new(vec![90; 20 * 48], 4, 4, 10.0).unwrap();
        let click: Vec<f32> = (0..16_000).map(|i| if i == 8_000 { 0.9 } else { 0.0 }).collect();
        let sound = Sound::new(click, 1, 16_000).unwrap();
        assert_eq!(probe(&video, &sound).unwrap(), None);
        let empty = Video::new(Vec::new(), 4, 4, 10.0).unwrap();
        assert_eq!(probe(&empty, &sound).unwrap(), None);
    }
}
