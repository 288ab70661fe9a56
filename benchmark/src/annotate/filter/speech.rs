//! Whether somebody speaks, by rule: voices have a pitch that moves a little from moment to moment, syllables with pauses, and hisses
//! between vowels.
//!
//! ```text
//! of each second, every half second, in frames of 32 ms each 10 ms:
//! v   share of frames that are loud enough and periodic (cross-correlation above 0.55 at 70 to 400 Hz)
//! s   mean step of the pitch between neighbouring periodic frames, in semitones, of steps below one
//! d   deviation of the level in dB, at most 14
//! z   mean and deviation of the rate of zero crossings of loud frames
//! p   1 where the median pitch is that of a voice, 90 to 350 Hz
//! spoken where 6.58 v - 20.3 min(|s - 0.2|, 0.3) + 0.19 d + 11.9 z_dev - 6.85 z_mean + 1.56 p > 6.48
//! ```
//!
//! The numbers come from a regression on spoken names in many languages against sounds of animals and machines, music and a film without
//! words. Animals that call all the time may pass for speakers; whispering does not count.

use crate::annotate::media::Media;
use crate::annotate::stage::{ClipFilter, Verdict, When};
use crate::captions::Record;
use fulgur_datasets::media::{MediaError, Sound, resample};

/// Samples a second that are looked at, of a frame, and from frame to frame.
const RATE: u32 = 16_000;
const FRAME: usize = 512;
const HOP: usize = 160;
/// Periods in samples: 400 and 70 Hz.
const SHORTEST: usize = RATE as usize / 400;
const LONGEST: usize = RATE as usize / 70;
/// Correlation above which a frame is periodic.
const PERIODIC: f64 = 0.55;
/// The shortest period with so much of the best correlation is taken: its multiples are as good.
const NEARLY: f64 = 0.92;
/// Frames of a window and from window to window.
const WINDOW: usize = 100;
const STEP: usize = 50;
/// Levels below this, and so far below the loudest ones, are silence, in dB.
const QUIET_DB: f64 = -55.0;
const RANGE_DB: f64 = 35.0;
/// Share of a window that has to be heard.
const HEARD: f64 = 0.2;
/// Fewest frames that say anything about pitch.
const FEW: usize = 4;

/// Notes clips in which somebody speaks more than a share of the time.
#[derive(Clone, Debug)]
pub struct Speech {
    /// The share.
    pub share: f64,
}

impl ClipFilter for Speech {
    fn when(&self) -> When {
        When::Decoded
    }

    fn judge(&self, _: &Record, media: Option<&Media>) -> Verdict {
        let Some(sound) = media.and_then(|media| media.sound.as_ref()) else {
            return Verdict::Keep;
        };
        match spoken_share(sound) {
            Ok(share) if share > self.share => Verdict::Flag("speech"),
            Ok(_) => Verdict::Keep,
            Err(error) => Verdict::Fail(format!("speech: {error}")),
        }
    }
}

/// Share of seconds in which somebody speaks; 0 of a sound shorter than one.
///
/// # Errors
/// A sample rate that cannot be converted.
pub fn spoken_share(sound: &Sound) -> Result<f64, MediaError> {
    let mono = resample(&sound.mono(), RATE)?;
    let frames = frames(&mono.samples);
    let mut levels: Vec<f64> = frames.iter().map(|frame| frame.level_db).collect();
    levels.sort_by(f64::total_cmp);
    let Some(loudest) = levels.get(levels.len() * 95 / 100) else {
        return Ok(0.0);
    };
    let windows = frames.windows(WINDOW).step_by(STEP);
    let (mut all, mut spoken) = (0usize, 0usize);
    for window in windows {
        all += 1;
        spoken += usize::from(is_spoken(window, *loudest));
    }
    Ok(if all == 0 { 0.0 } else { spoken as f64 / all as f64 })
}

/// What is known of a frame.
#[derive(Clone, Copy, Debug)]
struct Frame {
    level_db: f64,
    correlation: f64,
    pitch_hz: f64,
    crossings: f64,
}

fn frames(samples: &[f32]) -> Vec<Frame> {
    let reach = FRAME + LONGEST;
    let count = (samples.len() + HOP).saturating_sub(reach) / HOP;
    (0..count)
        .map(|i| frame(&samples[i * HOP..i * HOP + reach]))
        .collect()
}

fn frame(samples: &[f32]) -> Frame {
    let mean = samples.iter().map(|&x| f64::from(x)).sum::<f64>() / samples.len() as f64;
    let samples: Vec<f64> = samples.iter().map(|&x| f64::from(x) - mean).collect();
    let now = &samples[..FRAME];
    // Energy of all samples before each.
    let mut before = Vec::with_capacity(samples.len() + 1);
    let mut sum = 0.0;
    before.push(sum);
    for sample in &samples {
        sum += sample * sample;
        before.push(sum);
    }
    let own = before[FRAME];
    let correlation = |lag: usize| {
        let later = &samples[lag..lag + FRAME];
        let product: f64 = now.iter().zip(later).map(|(a, b)| a * b).sum();
        product / (own * (before[lag + FRAME] - before[lag])).max(1e-12).sqrt()
    };
    let all: Vec<f64> = (SHORTEST..=LONGEST).map(correlation).collect();
    let best = (0..all.len()).fold(0, |best, i| if all[i] > all[best] { i } else { best });
    let peak = (1..all.len() - 1)
        .find(|&i| all[i] > NEARLY * all[best] && all[i] >= all[i - 1] && all[i] >= all[i + 1])
        .unwrap_or(best);
    let crossings = now
        .windows(2)
        .filter(|pair| (pair[0] < 0.0) != (pair[1] < 0.0))
        .count();
    Frame {
        level_db: 10.0 * (own / FRAME as f64 + 1e-12).log10(),
        correlation: all[best],
        pitch_hz: f64::from(RATE) / (peak + SHORTEST) as f64,
        crossings: crossings as f64 / (FRAME - 1) as f64,
    }
}

fn is_spoken(window: &[Frame], loudest_db: f64) -> bool {
    let heard = |frame: &Frame| frame.level_db > loudest_db - RANGE_DB && frame.level_db > QUIET_DB;
    let voiced = |frame: &Frame| heard(frame) && frame.correlation > PERIODIC;
    let loud: Vec<f64> = window.iter().filter(|f| heard(f)).map(|f| f.crossings).collect();
    if (loud.len() as f64) < HEARD * window.len() as f64 {
        return false;
    }
    let mut pitches: Vec<f64> = window.iter().filter(|f| voiced(f)).map(|f| f.pitch_hz).collect();
    let share = pitches.len() as f64 / window.len() as f64;
    let steps: Vec<f64> = window
        .windows(2)
        .filter(|pair| voiced(&pair[0]) && voiced(&pair[1]))
        .map(|pair| 12.0 * (pair[1].pitch_hz / pair[0].pitch_hz).log2().abs())
        .filter(|step| *step < 1.0)
        .collect();
    let step = if steps.len() >= FEW { mean(&steps) } else { 0.0 };
    pitches.sort_by(f64::total_cmp);
    let median = if pitches.len() >= FEW {
        pitches[pitches.len() / 2]
    } else {
        0.0
    };
    // Below this all is silence.
    let levels: Vec<f64> = window.iter().map(|f| f.level_db.max(loudest_db - 40.0)).collect();
    let voice = if (90.0..350.0).contains(&median) {
        1.56
    } else {
        0.0
    };
    6.58 * share - 20.3 * (step - 0.2).abs().min(0.3)
        + 0.19 * deviation(&levels).min(14.0)
        + 11.9 * deviation(&loud)
        - 6.85 * mean(&loud)
        + voice
        > 6.48
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn deviation(values: &[f64]) -> f64 {
    let middle = mean(values);
    let squares: Vec<f64> = values.iter().map(|value| (value - middle).powi(2)).collect();
    mean(&squares).sqrt()
}

#[cfg(test)]
mod tests {
    use std::f32::consts::TAU;

    use super::*;
    use fulgur_kernels::philox::Philox;

    const SECONDS: usize = 6;

    fn sound(at: impl FnMut(f32) -> f32) -> Sound {
        let times = (0..SECONDS * RATE as usize).map(|i| i as f32 / RATE as f32);
        Sound::new(times.map(at).collect(), 1, RATE).unwrap()
    }

    /// A buzz whose pitch falls through each syllable, four syllables a second, each behind a hiss.
    fn voice(pitch_hz: f32) -> Sound {
        let (mut noise, mut phase) = (Philox::named(1, "hiss"), 0f32);
        sound(|t| {
            let within = (t * 4.0).fract();
            let falling = pitch_hz * (1.25 - 0.4 * within + 0.03 * (t * 31.0).sin());
            phase = (phase + falling / RATE as f32).fract();
            match within {
                0.0..0.15 => 0.04 * noise.range(-1.0, 1.0),
                0.15..0.8 => {
                    let open = ((within - 0.15) / 0.65 * std::f32::consts::PI).sin();
                    let buzz: f32 = (1..20).map(|k| (TAU * phase * k as f32).sin() / k as f32).sum();
                    0.2 * open * buzz
                }
                _ => 0.0,
            }
        })
    }

    #[test]
    fn voices_are_told_from_other_sounds() {
        for pitch in [110.0, 160.0, 220.0] {
            let share = spoken_share(&voice(pitch)).unwrap();
            assert!(share > 0.8, "{pitch} Hz: {share}");
        }
        let mut noise = Philox::named(2, "noise");
        let others = [
            ("silence", sound(|_| 0.0)),
            ("noise", sound(|_| 0.3 * noise.range(-1.0, 1.0))),
            ("a tone", sound(|t| 0.3 * (TAU * 200.0 * t).sin())),
            (
                "a chord",
                sound(|t| {
                    [220.0, 277.2, 329.6]
                        .map(|f: f32| (TAU * f * t).sin())
                        .iter()
                        .sum::<f32>()
                        * 0.1
                }),
            ),
            (
                "a tune",
                sound(|t| {
                    let note = [262.0, 294.0, 330.0, 392.0][(t * 2.0) as usize % 4];
                    0.3 * (TAU * note * t).sin() * (-3.0 * (t * 2.0).fract()).exp()
                }),
            ),
            (
                "clicks",
                sound(|t| if (t * 5.0).fract() < 0.002 { 0.9 } else { 0.0 }),
            ),
        ];
        for (name, other) in others {
            let share = spoken_share(&other).unwrap();
            assert!(share < 0.3, "{name}: {share}");
        }
        let short = Sound::new(vec![0.1; 4000], 1, RATE).unwrap();
        assert_eq!(spoken_share(&short).unwrap(), 0.0);
        assert_eq!(
            spoken_share(&Sound::new(Vec::new(), 2, 44_100).unwrap()).unwrap(),
            0.0
        );
    }

    #[test]
    fn clips_of_speech_are_noted() {
        let filter = Speech { share: 0.8 };
        let judge = |sound: Option<Sound>| {
            let media = Media {
                sound,
                ..Media::default()
            };
            filter.judge(&Record::default(), Some(&media))
        };
        assert_eq!(judge(Some(voice(150.0))), Verdict::Flag("speech"));
        assert_eq!(judge(Some(sound(|t| (TAU * 90.0 * t).sin()))), Verdict::Keep);
        assert_eq!(
            (judge(None), filter.judge(&Record::default(), None)),
            (Verdict::Keep, Verdict::Keep)
        );
    }
}
