//! JavisScore: whether every moment of a clip sounds like what it shows (JavisDiT, arXiv 2503.23377).
//!
//! ```text
//! windows of W = 2 s that overlap by O = 1.5 s, the last one at the end of the clip
//! c_j = cos(E_V(frame j), E_A(sound of the window))
//! window = mean of the floor(0.4 N) smallest c_j, of one at least      clip = mean over windows
//! ```
//!
//! Unlike AVHScore a window hears its own two seconds alone, and its worst frames count. It works with any encoder of frames
//! and sounds; published values are those of ImageBind.

use std::sync::atomic::AtomicBool;

use fulgur_datasets::media::{Sound, Video};

use crate::avhscore::{cosine, frame_vectors};
use crate::encoder::{EncodeError, Encoder};

/// Share of a window's frames that count: the worst ones.
const SHARE: f64 = 0.4;

/// How a clip is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Windows {
    /// Seconds of a window.
    pub window_s: f64,
    /// Seconds that two windows share.
    pub overlap_s: f64,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            window_s: 2.0,
            overlap_s: 1.5,
        }
    }
}

impl Windows {
    /// First and last piece, exclusive, of each window over `count` pieces at `rate` a second; one window of all where there are fewer.
    pub fn ranges(&self, count: usize, rate: f64) -> Vec<(usize, usize)> {
        if count == 0 {
            return Vec::new();
        }
        let pieces = |seconds: f64| ((seconds * rate).round() as usize).max(1);
        let (length, step) = (pieces(self.window_s), pieces(self.window_s - self.overlap_s));
        if count <= length {
            return vec![(0, count)];
        }
        let mut ranges: Vec<(usize, usize)> = (0..=count - length)
            .step_by(step)
            .map(|start| (start, start + length))
            .collect();
        if ranges.last().is_some_and(|&(_, end)| end < count) {
            ranges.push((count - length, count));
        }
        ranges
    }
}

/// The value of one window: frames beside its sound; `None` without frames.
pub fn window_score(frames: &[Vec<f32>], sound: &[f32]) -> Option<f64> {
    let mut cosines: Vec<f64> = frames.iter().map(|frame| cosine(frame, sound)).collect();
    cosines.sort_by(f64::total_cmp);
    let count = ((SHARE * cosines.len() as f64) as usize).max(1);
    let worst = cosines.get(..count)?;
    Some(worst.iter().sum::<f64>() / count as f64)
}

/// JavisScore of a clip, over as many windows as both streams have.
///
/// # Errors
/// No frames or no samples, an input that the encoder refuses, or `cancel` is set.
pub fn score(
    encoder: &dyn Encoder,
    video: &Video,
    sound: &Sound,
    windows: Windows,
    cancel: &AtomicBool,
) -> Result<f64, EncodeError> {
    if video.frame_count == 0 {
        return Err(EncodeError::NoFrames);
    }
    if sound.is_empty() {
        return Err(EncodeError::Input(
            "sound: found 0 samples, expected at least 1".to_owned(),
        ));
    }
    // Windows share frames: each is embedded once.
    let all: Vec<usize> = (0..video.frame_count).collect();
    let frames = frame_vectors(encoder, video, &all, cancel)?;
    let seen = windows.ranges(video.frame_count, video.fps);
    let heard = windows.ranges(sound.len(), f64::from(sound.sample_rate));
    let mut values = Vec::with_capacity(seen.len());
    for (&(first, end), &(start, stop)) in seen.iter().zip(&heard) {
        let channels = sound.channels;
        let part = Sound {
            samples: sound.samples[start * channels..stop * channels].to_vec(),
            channels,
            sample_rate: sound.sample_rate,
        };
        values.extend(window_score(&frames[first..end], &encoder.sound(&part)?));
    }
    Ok(values.iter().sum::<f64>() / values.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::golden;

    #[test]
    fn windows_are_those_of_numpy() {
        let tensors = golden("distances");
        let narrow = |rows: Vec<Vec<f64>>| -> Vec<Vec<f32>> {
            rows.into_iter()
                .map(|row| row.into_iter().map(|value| value as f32).collect())
                .collect()
        };
        let sounds = narrow(tensors["javis.sounds"].to_vec2().unwrap());
        let answer: Vec<f64> = tensors["javis.answer"].to_vec1().unwrap();
        for (w, sound) in sounds.iter().enumerate() {
            let frames = narrow(tensors[&format!("javis.frames.{w}")].to_vec2().unwrap());
            let found = window_score(&frames, sound).unwrap();
            assert!((found - answer[w]).abs() < 1e-6, "{w}: {found}");
        }
        assert_eq!(window_score(&[], &sounds[0]), None);
    }

    #[test]
    fn windows_overlap_and_the_last_one_ends_with_the_clip() {
        let usual = Windows::default();
        assert_eq!(
            usual.ranges(48, 12.0),
            [(0, 24), (6, 30), (12, 36), (18, 42), (24, 48)]
        );
        assert_eq!(usual.ranges(50, 12.0).last(), Some(&(26, 50)));
        assert_eq!(usual.ranges(20, 12.0), [(0, 20)]);
        assert_eq!(usual.ranges(0, 12.0), []);
        let apart = Windows {
            window_s: 0.5,
            overlap_s: 0.0,
        };
        assert_eq!(apart.ranges(12, 8.0), [(0, 4), (4, 8), (8, 12)]);
    }

    /// Frames are their first byte, sounds their first sample.
    struct First;

    impl Encoder for First {
        fn name(&self) -> &str {
            "first"
        }
        fn sound_window_s(&self) -> f64 {
            1.0
        }
        fn frames(&self, frames: &[&[u8]], _: usize, _: usize) -> Result<Vec<Vec<f32>>, EncodeError> {
            Ok(frames
                .iter()
                .map(|frame| vec![f32::from(frame[0]), 1.0])
                .collect())
        }
        fn sound(&self, sound: &Sound) -> Result<Vec<f32>, EncodeError> {
            Ok(vec![sound.samples[0], 1.0])
        }
    }

    #[test]
    fn each_window_hears_its_own_sound() {
        // Two seconds at 2 frames a second: frames 0 0 9 9, and a sound that fits each half, or the other one.
        let video = Video::new([[0u8; 3], [0; 3], [9; 3], [9; 3]].concat(), 1, 1, 2.0).unwrap();
        let sound = |a: f32, b: f32| Sound::new([vec![a; 100], vec![b; 100]].concat(), 1, 100).unwrap();
        let windows = Windows {
            window_s: 1.0,
            overlap_s: 0.0,
        };
        let cancel = AtomicBool::new(false);
        let of = |sound: Sound| score(&First, &video, &sound, windows, &cancel).unwrap();
        assert!((of(sound(0.0, 9.0)) - 1.0).abs() < 1e-6);
        assert!(of(sound(9.0, 0.0)) < 0.2);
        cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        let stopped = score(&First, &video, &sound(0.0, 9.0), windows, &cancel);
        assert!(matches!(stopped, Err(EncodeError::Cancelled)));
    }
}
