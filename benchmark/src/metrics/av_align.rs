//! AV-Align: whether what is heard to begin and what is seen to move happen at the same moments (Yariv et al., arXiv 2309.16429).
//!
//! ```text
//! A = onsets of the sound                 V = frames whose mean flow is larger than before and after, over the rate
//! I = onsets with a peak of motion less than one frame away
//! AV-Align = I / (|A| + |V| - I + 1e-6)
//! ```
//!
//! Flow is that of OpenCV (Farneback), onsets are those of librosa. The measure is known to be weak where much moves at once.

use fulgur_datasets::media::{MediaError, Sound, Video, resample};
use rayon::prelude::*;

use super::{farneback, onset};

const EPS: f64 = 1e-6;

/// AV-Align of onsets and peaks of motion, in seconds, of frames at `fps`.
pub fn score(onsets: &[f64], peaks: &[f64], fps: f64) -> f64 {
    let frame = 1.0 / fps;
    let near = |onset: &&f64| {
        peaks
            .iter()
            .any(|peak| peak - frame < **onset && **onset < peak + frame)
    };
    let matched = onsets.iter().filter(near).count() as f64;
    matched / (onsets.len() as f64 + peaks.len() as f64 - matched + EPS)
}

/// Mean flow into each frame from the one before; the first one gets that of the second. Nothing of less than two frames.
pub fn motion(video: &Video) -> Vec<f64> {
    let grey: Vec<Vec<u8>> = (0..video.frame_count)
        .into_par_iter()
        .map(|i| farneback::grey(video.frame(i)))
        .collect();
    let (width, height) = (video.width, video.height);
    let mut motion: Vec<f64> = grey
        .par_windows(2)
        .map(|pair| farneback::mean_magnitude(&farneback::flow(&pair[0], &pair[1], width, height)))
        .collect();
    if let Some(&first) = motion.first() {
        motion.insert(0, first);
    }
    motion
}

/// Where values are larger than those on both sides.
pub fn local_peaks(values: &[f64]) -> Vec<usize> {
    let middle = |(i, around): (usize, &[f64])| {
        let [before, own, behind] = around else {
            return None;
        };
        (own > before && own > behind).then_some(i + 1)
    };
    values.windows(3).enumerate().filter_map(middle).collect()
}

/// Seconds of the onsets of a soundtrack.
///
/// # Errors
/// A sample rate that cannot be converted.
pub fn onsets(sound: &Sound) -> Result<Vec<f64>, MediaError> {
    Ok(onset::times(&resample(&sound.mono(), onset::RATE)?.samples))
}

/// AV-Align of a clip.
///
/// # Errors
/// As [`onsets`].
pub fn av_align(video: &Video, sound: &Sound) -> Result<f64, MediaError> {
    let peaks = local_peaks(&motion(video));
    let peaks: Vec<f64> = peaks.into_iter().map(|frame| frame as f64 / video.fps).collect();
    Ok(score(&onsets(sound)?, &peaks, video.fps))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::golden;

    #[test]
    fn scores_are_those_of_the_definition() {
        let tensors = golden("av_align");
        for case in 0..4 {
            let of = |name: &str| tensors[&format!("case.{case}.{name}")].to_vec1::<f64>().unwrap();
            let answer = of("answer");
            let found = score(&of("audio"), &of("video"), answer[0]);
            assert!((found - answer[1]).abs() < 1e-12, "{case}: {found}");
        }
    }

    /// A bright square that jumps, and a click at each jump.
    #[test]
    fn jumps_with_clicks_are_aligned_and_late_clicks_are_not() {
        let (size, fps, frames) = (48, 8.0, 24);
        let jumps = [6, 15];
        let mut pixels = Vec::new();
        for frame in 0..frames {
            let place = 4 + 3 * jumps.iter().filter(|&&jump| frame >= jump).count();
            for y in 0..size {
                for x in 0..size {
                    let wave = ((x * 7 + y * 5) % 23) as f64 / 23.0;
                    let inside = (place..place + 24).contains(&x) && (10..34).contains(&y);
                    let value = if inside {
                        128.0 + 100.0 * (((x - place) as f64) * 0.9).sin()
                    } else {
                        60.0 + 20.0 * wave
                    };
                    pixels.extend([value as u8; 3]);
                }
            }
        }
        let video = Video::new(pixels, size, size, fps).unwrap();
        let clicks = |late: f64| {
            let mut samples = vec![0.0f32; 22_050 * 3];
            for jump in jumps {
                let start = ((jump as f64 / fps + late) * 22_050.0) as usize;
                for (i, sample) in samples[start..].iter_mut().take(6_000).enumerate() {
                    *sample = 0.4 * (i as f32 * 0.4).sin() * (-(i as f32) / 500.0).exp();
                }
            }
            Sound::new(samples, 1, 22_050).unwrap()
        };
        let peaks = local_peaks(&motion(&video));
        assert_eq!(peaks, jumps);
        let aligned = av_align(&video, &clicks(0.0)).unwrap();
        let late = av_align(&video, &clicks(0.4)).unwrap();
        assert!(aligned > 0.99 && late == 0.0, "{aligned} {late}");
    }

    #[test]
    fn short_clips_have_no_peaks() {
        let one = Video::new(vec![9; 3 * 16], 4, 4, 8.0).unwrap();
        assert!(motion(&one).is_empty());
        assert!(local_peaks(&[]).is_empty() && local_peaks(&[1.0, 2.0]).is_empty());
        assert_eq!(local_peaks(&[1.0, 2.0, 2.0, 1.0, 3.0, 0.0]), [4]);
        let silence = Sound::new(vec![0.0; 4000], 1, 8000).unwrap();
        assert_eq!(av_align(&one, &silence).unwrap(), 0.0);
    }
}
