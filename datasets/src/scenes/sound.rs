//! Rendering the sound of a scene: every hit plays the thing's sound from its exact instant.

use fulgur_kernels::philox::block;

use super::compose::Composer;
use super::{Actor, Scene};
use crate::things::SOUND_RATE;

/// The last instants of a clip, in seconds, over which what still sounds is faded out.
const FADE_S: f64 = 0.01;
/// Mean and standard deviation of the sum of four random bytes.
const BYTES: (f32, f32) = (510.0, 147.801);

/// Frames in which the level of a recording is measured, in samples (10 ms).
const LEVEL_FRAME: usize = SOUND_RATE as usize / 100;
/// Level relative to the loudest frame from which on a sound is taken to be heard, as a factor (-14 dB).
const HEARD: f32 = 0.2;
/// Ramp at the start of a sound that was cut, in samples (5 ms).
const RAMP: usize = SOUND_RATE as usize / 200;

/// Cuts what is before the audible onset of a recording: many begin with breath or room noise, and a listener (or
/// an onset detector) would take the sound to come late.
pub(super) fn start_at_onset(sound: &mut Vec<f32>) {
    let level = |frame: &[f32]| frame.iter().map(|x| x * x).sum::<f32>() / frame.len() as f32;
    let loudest = sound.chunks(LEVEL_FRAME).map(level).fold(0.0, f32::max);
    let heard = |frame: &[f32]| level(frame) >= HEARD * HEARD * loudest;
    let first = sound.chunks(LEVEL_FRAME).position(heard).unwrap_or(0);
    if first > 0 {
        sound.drain(..first * LEVEL_FRAME);
        for (i, sample) in sound.iter_mut().take(RAMP).enumerate() {
            *sample *= (i + 1) as f32 / RAMP as f32;
        }
    }
}

impl Composer {
    /// The sound of `scene`: mono, `ClipSpec::samples` values in -1..1.
    pub fn render_sound(&self, scene: &Scene) -> Vec<f32> {
        let clip = &self.options.clip;
        let mut out = noise(scene.noise, scene.noise_seed, clip.samples());
        for actor in &scene.actors {
            let sound = &self.things[actor.thing].sound;
            for hit in &actor.hits {
                play(
                    &mut out,
                    sound,
                    actor,
                    hit.time_s,
                    actor.gain * hit.gain,
                    clip.sample_rate,
                );
            }
        }
        let fade = ((FADE_S * f64::from(clip.sample_rate)) as usize).min(out.len());
        let last = out.len() - fade;
        for (i, sample) in out[last..].iter_mut().enumerate() {
            *sample *= 1.0 - (i + 1) as f32 / fade as f32;
        }
        for sample in &mut out {
            *sample = sample.clamp(-1.0, 1.0);
        }
        out
    }
}

/// Adds `sound` from `start_s` on, by cubic interpolation.
fn play(out: &mut [f32], sound: &[f32], actor: &Actor, start_s: f64, gain: f32, sample_rate: u32) {
    let start = start_s * f64::from(sample_rate);
    let first = start.ceil().max(0.0);
    let step = actor.rate * f64::from(SOUND_RATE) / f64::from(sample_rate);
    let at = |i: isize| {
        usize::try_from(i)
            .ok()
            .and_then(|i| sound.get(i))
            .copied()
            .unwrap_or(0.0)
    };
    for (k, sample) in out.iter_mut().skip(first as usize).enumerate() {
        let position = (first - start + k as f64) * step;
        let whole = position as usize;
        if whole >= sound.len() {
            break;
        }
        let t = (position - whole as f64) as f32;
        let [a, b, c, d] = match sound.get(whole.wrapping_sub(1)..whole + 3) {
            Some(&[a, b, c, d]) => [a, b, c, d],
            _ => std::array::from_fn(|i| at(whole as isize - 1 + i as isize)),
        };
        let cubic =
            b + 0.5 * t * (c - a + t * (2.0 * a - 5.0 * b + 4.0 * c - d + t * (3.0 * (b - c) + d - a)));
        *sample += gain * cubic;
    }
}

/// Nearly normal noise: each sample is the centred sum of the four bytes of one word.
fn noise(rms: f32, seed: u64, samples: usize) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let scale = rms / BYTES.1;
    let mut out = Vec::with_capacity(samples + 4);
    for position in 0..samples.div_ceil(4) as u32 {
        let words = block([position, 0, 0, 0], key);
        out.extend(words.map(|word| {
            // The four bytes are added two at a time.
            let pairs = (word & 0x00ff_00ff) + ((word >> 8) & 0x00ff_00ff);
            let sum = (pairs + (pairs >> 16)) & 0xffff;
            (sum as i32 as f32 - BYTES.0) * scale
        }));
    }
    out.truncate(samples);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_beginning_is_cut_and_a_loud_one_kept() {
        let loud: Vec<f32> = (0..8000).map(|i| (i as f32 * 0.3).sin() * 0.3).collect();
        let mut kept = loud.clone();
        start_at_onset(&mut kept);
        assert_eq!(kept, loud);
        let mut late: Vec<f32> = loud[..3200]
            .iter()
            .map(|x| x * 0.1)
            .chain(loud.iter().copied())
            .collect();
        start_at_onset(&mut late);
        assert_eq!(late.len(), loud.len());
        assert_eq!(late[RAMP..], loud[RAMP..]);
        assert!(late[0].abs() < 0.01);
        let mut silent = vec![0.0; 100];
        start_at_onset(&mut silent);
        assert_eq!(silent.len(), 100);
    }

    #[test]
    fn noise_has_the_stated_level_and_no_offset() {
        let noise = noise(0.01, 5, 100_001);
        assert_eq!(noise.len(), 100_001);
        let mean = noise.iter().sum::<f32>() / noise.len() as f32;
        let power = noise.iter().map(|x| x * x).sum::<f32>() / noise.len() as f32;
        assert!(
            mean.abs() < 1e-4 && (power.sqrt() / 0.01 - 1.0).abs() < 0.01,
            "{mean} {power}"
        );
    }
}
