//! Whether an encoder tells the sound of a clip from that of another one, and whether the probe of synchrony finds how far a sound
//! was moved: on held-out composed scenes and on the held-out part of the film.
//!
//! ```text
//! matched  AVHScore of the frames and the sound of a clip
//! shuffled AVHScore of the frames of a clip and the sound of another one, in which other things are seen
//! above    share of all such pairs of clips whose matched score is the larger one
//! ```

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{anyhow, bail};
use fulgur_benchmark::avhscore::{frame_vectors, mean_cosine};
use fulgur_benchmark::encoder::Encoder;
use fulgur_benchmark::metrics::sync;
use fulgur_datasets::media::{Sound, Video};
use fulgur_datasets::scenes::{ClipSpec, Split};
use serde::Serialize;

use crate::train::tasks::clips::{ClipOptions, Clips, HostClip, Want};

/// Seconds by which sounds are moved for the probe.
const SHIFTS_S: [f64; 4] = [-0.5, -0.25, 0.25, 0.5];
/// An event has to stay so far from both ends of a clip, in seconds.
const EDGES_S: [f64; 2] = [0.1, 0.2];
/// Offsets found within this of the truth are near it, in ms.
const NEAR_MS: f64 = 100.0;
/// Share of the film among clips: any above zero opens it.
const ANY: f32 = 0.5;

const WANT: Want = Want {
    frames: true,
    mask: false,
    samples: true,
};

/// Clips of one kind.
pub struct Set {
    /// Its name in results.
    pub name: &'static str,
    clips: Vec<One>,
}

/// A clip, and what is known of it.
struct One {
    video: Video,
    sound: Sound,
    /// Things that are seen; none of the film.
    things: BTreeSet<String>,
    /// When the first one sounds.
    contact_s: Option<f64>,
}

impl One {
    fn new(clip: HostClip, spec: &ClipSpec) -> anyhow::Result<Self> {
        let actors = clip.scene.as_ref().map_or(&[][..], |scene| &scene.actors);
        Ok(Self {
            things: actors.iter().map(|actor| actor.id.clone()).collect(),
            contact_s: (actors.len() == 1).then(|| actors[0].contact_s),
            video: Video::new(clip.frames, spec.width, spec.height, spec.fps)?,
            sound: Sound::new(clip.samples, 1, spec.sample_rate)?,
        })
    }

    /// The same sound so much later, or earlier.
    fn moved(&self, late_s: f64) -> anyhow::Result<Sound> {
        let by = (late_s * f64::from(self.sound.sample_rate)).round() as isize;
        let samples = &self.sound.samples;
        let at = |i: isize| usize::try_from(i - by).ok().and_then(|i| samples.get(i)).copied();
        let moved = (0..samples.len() as isize)
            .map(|i| at(i).unwrap_or(0.0))
            .collect();
        Ok(Sound::new(moved, 1, self.sound.sample_rate)?)
    }

    /// Whether a moved sound still holds what is to be found.
    fn holds(&self, late_s: f64) -> bool {
        let last = self.sound.duration_s() - EDGES_S[1];
        self.contact_s
            .is_none_or(|contact| (EDGES_S[0]..last).contains(&(contact + late_s)))
    }
}

/// What is compared.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Scenes.
    pub scenes: usize,
    /// Seed of the scenes; those of training and its validation have 0.
    pub seed: u64,
    /// Share of scenes with two things.
    pub two_things: f32,
}

/// Held-out scenes, and the held-out part of the film where it is prepared.
///
/// # Errors
/// The sets `stamps` and `backgrounds` are not prepared.
pub fn sets(data: &Path, options: &Options) -> anyhow::Result<Vec<Set>> {
    if options.scenes < 2 {
        bail!("{} scenes, expected at least 2", options.scenes);
    }
    let film = data.join("bbb").is_dir();
    let clips = Clips::open(&ClipOptions {
        data: data.to_owned(),
        film: if film { ANY } else { 0.0 },
        two_things: options.two_things,
        seed: options.seed,
        ..ClipOptions::default()
    });
    let clips = clips.map_err(|error| anyhow!("{error}"))?;
    let spec = clips.spec();
    let scene = |i: usize| One::new(clips.scene(Split::HeldOutCombination, i as u64, WANT), &spec);
    let mut sets = vec![Set {
        name: "scenes",
        clips: (0..options.scenes).map(scene).collect::<anyhow::Result<_>>()?,
    }];
    if film {
        let pieces = clips.held_out_film(WANT).into_iter();
        sets.push(Set {
            name: "film",
            clips: pieces
                .map(|clip| One::new(clip, &spec))
                .collect::<anyhow::Result<_>>()?,
        });
    }
    Ok(sets)
}

impl Set {
    /// Clips.
    #[must_use]
    pub fn len(&self) -> usize {
        self.clips.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.clips.is_empty()
    }

    /// The clips, as they look and sound.
    pub fn clips(&self) -> impl Iterator<Item = (&Video, &Sound)> {
        self.clips.iter().map(|clip| (&clip.video, &clip.sound))
    }

    /// What an encoder makes of all pairs of clips; `None` where the user stopped it.
    ///
    /// # Errors
    /// The encoder fails.
    pub fn pairs(
        &self,
        encoder: &dyn Encoder,
        cancel: &AtomicBool,
        mut tell: impl FnMut(usize),
    ) -> anyhow::Result<Option<Pairs>> {
        let (mut seen, mut heard) = (Vec::new(), Vec::new());
        for (i, clip) in self.clips.iter().enumerate() {
            if cancel.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let all: Vec<usize> = (0..clip.video.frame_count).collect();
            match frame_vectors(encoder, &clip.video, &all, cancel) {
                Ok(vectors) => seen.push(vectors),
                Err(_) if cancel.load(Ordering::Relaxed) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            heard.push(encoder.sound(&clip.sound)?);
            tell(i + 1);
        }
        let scores: Vec<Vec<f64>> = seen
            .iter()
            .map(|frames| {
                let score = |sound: &Vec<f32>| mean_cosine(frames, sound).unwrap_or(0.0);
                heard.iter().map(score).collect()
            })
            .collect();
        let other = |i: usize, j: usize| {
            i != j && (self.clips[i].things.is_empty() || self.clips[i].things != self.clips[j].things)
        };
        Ok(Some(Pairs::of(&scores, other)))
    }

    /// What the probe finds where sounds are moved; `None` where the user stopped it.
    ///
    /// # Errors
    /// A sound that cannot be converted.
    pub fn shifts(&self, cancel: &AtomicBool, mut tell: impl FnMut(usize)) -> anyhow::Result<Option<Shifts>> {
        let mut shifts = Shifts::default();
        let mut near = 0usize;
        let mut right = 0usize;
        for (i, clip) in self.clips.iter().enumerate() {
            // Which of two things sounds when is not told.
            let clear = clip.contact_s.is_some() || clip.things.is_empty();
            for late_s in SHIFTS_S.into_iter().filter(|late_s| clear && clip.holds(*late_s)) {
                if cancel.load(Ordering::Relaxed) {
                    return Ok(None);
                }
                shifts.cases += 1;
                match sync::probe(&clip.video, &clip.moved(late_s)?)? {
                    Some(found) => {
                        right += usize::from(found.offset_ms * late_s > 0.0);
                        near += usize::from((found.offset_ms - late_s * 1000.0).abs() < NEAR_MS);
                    }
                    None => shifts.nothing += 1,
                }
            }
            tell(i + 1);
        }
        let share = |count: usize| (shifts.cases > 0).then(|| count as f64 / shifts.cases as f64);
        (shifts.right_sign, shifts.within_100_ms) = (share(right), share(near));
        Ok(Some(shifts))
    }
}

/// Matched scores beside shuffled ones.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Pairs {
    /// Clips.
    pub clips: usize,
    /// Pairs of a clip and the sound of another one.
    pub pairs: usize,
    /// Mean AVHScore with its own sound.
    pub matched: f64,
    /// Mean AVHScore of all pairs.
    pub shuffled: f64,
    /// Share of pairs below the matched score of their frames; null without pairs.
    pub above: Option<f64>,
    /// The same with the next clip alone, as a single shuffle has it.
    pub above_next: Option<f64>,
    /// Share of clips whose own sound comes first among all.
    pub first: f64,
    /// Matched score of each clip, and the mean of its shuffled ones.
    #[serde(skip)]
    pub each: Vec<(f64, Option<f64>)>,
}

impl Pairs {
    /// Of scores of frames (rows) with sounds (columns), where `other` says which may be compared.
    fn of(scores: &[Vec<f64>], other: impl Fn(usize, usize) -> bool) -> Self {
        let n = scores.len();
        let share = |(above, all): (usize, usize)| (all > 0).then(|| above as f64 / all as f64);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let (mut all, mut next, mut first) = ((0, 0), (0, 0), 0);
        let (mut matched, mut shuffled, mut each) = (Vec::new(), Vec::new(), Vec::new());
        for (i, row) in scores.iter().enumerate() {
            let others: Vec<usize> = (0..n).filter(|&j| other(i, j)).collect();
            let above = others.iter().filter(|&&j| row[i] > row[j]).count();
            all = (all.0 + above, all.1 + others.len());
            first += usize::from(above == others.len());
            if let Some(&j) = others.iter().find(|&&j| j > i).or(others.first()) {
                next = (next.0 + usize::from(row[i] > row[j]), next.1 + 1);
            }
            let values: Vec<f64> = others.iter().map(|&j| row[j]).collect();
            each.push((row[i], (!values.is_empty()).then(|| mean(&values))));
            matched.push(row[i]);
            shuffled.extend(values);
        }
        Self {
            clips: n,
            pairs: all.1,
            matched: mean(&matched),
            shuffled: mean(&shuffled),
            above: share(all),
            above_next: share(next),
            first: first as f64 / n.max(1) as f64,
            each,
        }
    }
}

/// What the probe of synchrony found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Shifts {
    /// Clips times shifts.
    pub cases: usize,
    /// Of these, where nothing was found.
    pub nothing: usize,
    /// Share with the right sign.
    pub right_sign: Option<f64>,
    /// Share within 100 ms of the truth.
    pub within_100_ms: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_as_by_hand() {
        let scores = [
            vec![0.5, 0.1, 0.6, 0.2],
            vec![0.3, 0.4, 0.2, 0.4],
            vec![0.0, 0.0, 0.3, 0.1],
            vec![0.9, 0.1, 0.1, 0.8],
        ];
        // The first and the last show the same.
        let other = |i: usize, j: usize| i != j && !([0, 3].contains(&i) && [0, 3].contains(&j));
        let pairs = Pairs::of(&scores, other);
        assert_eq!((pairs.clips, pairs.pairs), (4, 10));
        // Rows: 1 of 2, 2 of 3 (a tie is none), 3 of 3, 2 of 2.
        assert_eq!(pairs.above, Some(0.8));
        // With clips 1, 2, 3 and 1.
        assert_eq!(pairs.above_next, Some(1.0));
        assert_eq!(pairs.first, 0.5);
        assert!((pairs.matched - 0.5).abs() < 1e-12);
        assert!((pairs.shuffled - (0.7 + 0.9 + 0.1 + 0.2) / 10.0).abs() < 1e-12);
        assert_eq!(Pairs::of(&[vec![0.2]], |_, _| false).above, None);
    }

    #[test]
    fn sounds_are_moved_and_events_kept() {
        let samples: Vec<f32> = (0..16_000).map(|i| i as f32 / 16_000.0).collect();
        let one = One {
            video: Video::new(vec![0; 12], 2, 2, 1.0).unwrap(),
            sound: Sound::new(samples, 1, 16_000).unwrap(),
            things: BTreeSet::new(),
            contact_s: Some(0.4),
        };
        let later = one.moved(0.25).unwrap();
        assert_eq!(
            (later.samples[3999], later.samples[4001]),
            (0.0, one.sound.samples[1])
        );
        let earlier = one.moved(-0.25).unwrap();
        assert_eq!(
            (earlier.samples[0], earlier.samples[15_999]),
            (one.sound.samples[4000], 0.0)
        );
        assert!(one.holds(0.25) && one.holds(-0.25) && !one.holds(0.5) && !one.holds(-0.5));
    }
}
