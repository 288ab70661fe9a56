//! From a sound file to the sound of a thing: mono, from its onset on, at one level, short, faded.

use std::io::Write;

use crate::fetch::FetchError;
use crate::media::read_sound;
use crate::things::{MAX_SOUND, SOUND_PEAK, SOUND_RATE, SOUND_RMS};

/// Length of the frames over which levels are taken: 5 ms.
const FRAME: usize = SOUND_RATE as usize / 200;
/// The onset is the first frame within so much of the loudest one (26 dB).
const ONSET: f32 = 0.05;
/// Frames within so much of the loudest one are active (32 dB).
const ACTIVE: f32 = 0.025;
/// A sound whose loudest frame is below this (-80 dBFS) is silence.
const SILENT: f32 = 1e-4;
/// Kept before the onset so that the attack is whole: 2.5 ms.
const LEAD: usize = FRAME / 2;
/// Fade at the beginning: 1 ms, against a click.
const FADE_IN: usize = SOUND_RATE as usize / 1000;
/// Fade at the end: 50 ms.
const FADE_OUT: usize = SOUND_RATE as usize / 20;

/// The sound of the file `bytes`; the extension of `path` tells the format, and `path` names it in errors.
pub(super) fn trim(bytes: &[u8], path: &str) -> Result<Vec<f32>, FetchError> {
    let ending = path.rsplit_once('.').map_or("", |(_, ending)| ending);
    let mut file = tempfile::Builder::new()
        .suffix(&format!(".{ending}"))
        .tempfile()
        .map_err(FetchError::io(&std::env::temp_dir(), "write to"))?;
    file.write_all(bytes)
        .map_err(FetchError::io(file.path(), "write"))?;
    let sound = read_sound(file.path(), Some(SOUND_RATE))?.mono();
    shape(sound.samples).ok_or_else(|| FetchError::format(path, "sound", "silence", "a sound"))
}

/// Cuts `samples` at the onset and after the last activity, sets the level and fades; None for silence.
fn shape(mut samples: Vec<f32>) -> Option<Vec<f32>> {
    let mean = samples.iter().map(|x| f64::from(*x)).sum::<f64>() / samples.len().max(1) as f64;
    samples.iter_mut().for_each(|x| *x -= mean as f32);
    let levels = levels(&samples);
    let loudest = levels.iter().copied().fold(0.0, f32::max);
    if loudest < SILENT {
        return None;
    }
    let onset = levels.iter().position(|level| *level >= ONSET * loudest)? * FRAME;
    samples.drain(..onset.saturating_sub(LEAD));
    samples.truncate(MAX_SOUND);
    let levels = self::levels(&samples);
    let loudest = levels.iter().copied().fold(0.0, f32::max);
    let active: Vec<usize> = (0..levels.len())
        .filter(|i| levels[*i] > ACTIVE * loudest)
        .collect();
    samples.truncate((active.last()? + 1) * FRAME);
    let power = active.iter().map(|i| f64::from(levels[*i]).powi(2)).sum::<f64>() / active.len() as f64;
    let peak = samples.iter().fold(0.0f32, |peak, x| peak.max(x.abs()));
    let gain = (SOUND_RMS / power.sqrt() as f32).min(SOUND_PEAK / peak);
    let length = samples.len();
    let fade = FADE_OUT.min(length);
    for (index, sample) in samples.iter_mut().enumerate() {
        let out = (length - index) as f32 / fade as f32;
        let rise = (index + 1) as f32 / FADE_IN as f32;
        *sample *= gain * out.min(rise).min(1.0);
    }
    Some(samples)
}

/// Root mean square of every whole frame.
fn levels(samples: &[f32]) -> Vec<f32> {
    let frames = samples.chunks_exact(FRAME);
    frames
        .map(|frame| (frame.iter().map(|x| x * x).sum::<f32>() / FRAME as f32).sqrt())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tone(length: usize, amplitude: f32) -> impl Iterator<Item = f32> {
        (0..length).map(move |i| amplitude * (i as f32 * 0.3).sin())
    }

    #[test]
    fn silence_before_and_after_is_cut_and_the_level_is_set() {
        let mut samples = vec![0.0; 4000];
        samples.extend(tone(8000, 0.02));
        samples.extend(vec![0.0; 4000]);
        let sound = shape(samples).unwrap();
        assert!(sound.len().abs_diff(8000) <= 2 * FRAME, "{}", sound.len());
        let middle = &sound[1000..7000];
        let rms = (middle.iter().map(|x| x * x).sum::<f32>() / 6000.0).sqrt();
        assert!((rms - SOUND_RMS).abs() < 0.01, "{rms}");
        assert!(
            sound[..LEAD + FRAME].iter().any(|x| x.abs() > 0.05),
            "starts at its onset"
        );
        assert!(sound.last().unwrap().abs() < 1e-3);
    }

    #[test]
    fn long_sounds_are_cut_and_peaks_bounded() {
        let mut samples: Vec<f32> = tone(50_000, 0.01).collect();
        samples[100] = 1.0;
        let sound = shape(samples).unwrap();
        assert_eq!(sound.len(), MAX_SOUND);
        assert!(sound.iter().all(|x| x.abs() <= SOUND_PEAK + 1e-6));
    }

    #[test]
    fn silence_is_no_sound() {
        assert_eq!(shape(vec![0.25; 16_000]), None);
        assert_eq!(shape(Vec::new()), None);
    }
}
