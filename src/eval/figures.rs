//! From verdicts about single clips to the figures of a generator.

use fulgur_benchmark::avhscore::mean_cosine;
use fulgur_benchmark::judge::{Verdict, apart_ms, median};
use fulgur_kernels::philox::Philox;
use serde::Serialize;

/// What the prompt of a clip asks for, in the classes of the judges.
#[derive(Clone, Debug, PartialEq)]
pub struct Truth {
    /// The thing that is to be seen and heard.
    pub thing: usize,
    /// How it is to move.
    pub motion: usize,
    /// Seconds between which it is to sound, where the prompt says a time.
    pub time_s: Option<(f64, f64)>,
}

/// What was found in one clip.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// What the judges say.
    pub verdict: Verdict,
    /// When the sound starts, in seconds, where it does.
    pub onset_s: Option<f64>,
    /// The encoder's vector of every frame.
    pub frames: Vec<Vec<f32>>,
    /// Its vector of the soundtrack.
    pub sound: Vec<f32>,
}

/// Figures of clips made for prompts; shares are in [0, 1].
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The thing that is seen is the one of the prompt.
    pub picture: f64,
    /// It is among the five likeliest.
    pub picture_top5: f64,
    /// The thing that is heard is the one of the prompt.
    pub sound: f64,
    /// The motion is the one of the prompt.
    pub motion: f64,
    /// Median distance of the sound's onset from the contact in the picture, in ms; a clip without one of them counts
    /// as 1,000.
    pub onset_error_ms_median: Option<f64>,
    /// No onset is heard.
    pub onset_missing: f64,
    /// No contact is seen.
    pub contact_missing: f64,
    /// Of the prompts that say a time: the onset is heard in that part of the clip.
    pub onset_in_time: Option<f64>,
    /// The same of the contact that is seen.
    pub contact_in_time: Option<f64>,
    /// Mean AVHScore.
    pub avhscore: Option<f64>,
}

/// Real pictures with the sound of another real clip.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Shuffled {
    /// Mean AVHScore.
    pub avhscore: Option<f64>,
    /// Median distance of onset and contact, as in [`Figures`].
    pub onset_error_ms_median: Option<f64>,
}

impl Figures {
    /// Figures of `found`, which were made for `truths` in this order.
    pub fn of(truths: &[Truth], found: &[Found]) -> Self {
        let share = |hit: &dyn Fn(&Truth, &Found) -> bool| {
            let hits = truths.iter().zip(found).filter(|(t, f)| hit(t, f));
            hits.count() as f64 / found.len().max(1) as f64
        };
        let in_time = |event: &dyn Fn(&Found) -> Option<f64>| {
            let timed = truths.iter().zip(found);
            let timed: Vec<bool> = timed
                .filter_map(|(truth, found)| {
                    let (from, to) = truth.time_s?;
                    Some(event(found).is_some_and(|at| (from..to).contains(&at)))
                })
                .collect();
            let hits = timed.iter().filter(|hit| **hit).count();
            (!timed.is_empty()).then(|| hits as f64 / timed.len() as f64)
        };
        let errors: Vec<f64> = found
            .iter()
            .map(|f| apart_ms(f.onset_s, f.verdict.contact_s))
            .collect();
        Self {
            picture: share(&|t, f| f.verdict.picture.first() == Some(&t.thing)),
            picture_top5: share(&|t, f| f.verdict.picture.contains(&t.thing)),
            sound: share(&|t, f| f.verdict.sound == t.thing),
            motion: share(&|t, f| f.verdict.motion == t.motion),
            onset_error_ms_median: median(&errors),
            onset_missing: share(&|_, f| f.onset_s.is_none()),
            contact_missing: share(&|_, f| f.verdict.contact_s.is_none()),
            onset_in_time: in_time(&|f| f.onset_s),
            contact_in_time: in_time(&|f| f.verdict.contact_s),
            avhscore: mean(found.iter().filter_map(|f| mean_cosine(&f.frames, &f.sound))),
        }
    }
}

impl Shuffled {
    /// The pictures of `found`, each with the sound of another one; without figures where there are not two clips.
    pub fn of(found: &[Found], seed: u64) -> Self {
        let Some(order) = derangement(found.len(), seed) else {
            return Self::default();
        };
        let pairs = || {
            found
                .iter()
                .zip(&order)
                .map(|(seen, &other)| (seen, &found[other]))
        };
        let errors: Vec<f64> = pairs()
            .map(|(seen, heard)| apart_ms(heard.onset_s, seen.verdict.contact_s))
            .collect();
        Self {
            avhscore: mean(pairs().filter_map(|(seen, heard)| mean_cosine(&seen.frames, &heard.sound))),
            onset_error_ms_median: median(&errors),
        }
    }
}

/// An order of `n` things in which none keeps its place, drawn evenly from the single cycles (Sattolo's shuffle); `None`
/// of fewer than two.
pub fn derangement(n: usize, seed: u64) -> Option<Vec<usize>> {
    if n < 2 {
        return None;
    }
    let mut noise = Philox::named(seed, "derangement");
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, noise.below(i));
    }
    Some(order)
}

/// `part` as a share of `whole`, where both are there and `whole` is more than nothing.
pub fn ratio(part: Option<f64>, whole: Option<f64>) -> Option<f64> {
    let (part, whole) = (part?, whole.filter(|whole| *whole > 0.0)?);
    Some(part / whole)
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0), |(sum, n), value| (sum + value, n + 1));
    (n > 0).then(|| sum / f64::from(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clip of thing `thing`, whose vectors point along that axis.
    fn found(thing: usize, motion: usize, onset_s: Option<f64>, contact_s: Option<f64>) -> Found {
        let axis: Vec<f32> = (0..6).map(|i| if i == thing { 2.0 } else { 0.0 }).collect();
        Found {
            verdict: Verdict {
                picture: (0..5).map(|i| (thing + i) % 6).collect(),
                sound: thing,
                motion,
                contact_s,
            },
            onset_s,
            frames: vec![axis.clone(); 3],
            sound: axis,
        }
    }

    fn truth(thing: usize, motion: usize, time_s: Option<(f64, f64)>) -> Truth {
        Truth {
            thing,
            motion,
            time_s,
        }
    }

    #[test]
    fn shares_count_what_the_prompts_asked_for() {
        let truths = [
            truth(0, 1, Some((0.2, 1.3))),
            truth(1, 1, Some((0.2, 1.3))),
            truth(2, 0, None),
            truth(5, 0, Some((1.3, 2.3))),
        ];
        let mut found = [
            found(0, 1, Some(1.0), Some(1.05)),
            found(0, 1, Some(2.0), Some(1.0)),
            found(2, 1, None, Some(0.5)),
            found(5, 0, Some(2.0), None),
        ];
        // Thing 5 is seen last but one of six, and so not among five.
        found[3].verdict.picture = vec![0, 1, 2, 3, 4];
        let figures = Figures::of(&truths, &found);
        // Clip 1 shows thing 0 first, but 1 second.
        assert_eq!((figures.picture, figures.picture_top5), (0.5, 0.75));
        assert_eq!((figures.sound, figures.motion), (0.75, 0.75));
        assert_eq!((figures.onset_missing, figures.contact_missing), (0.25, 0.25));
        assert_eq!(figures.onset_in_time, Some(2.0 / 3.0));
        assert_eq!(figures.contact_in_time, Some(2.0 / 3.0));
        // 50, 1000, missing, missing: the middle two are both a second.
        assert_eq!(figures.onset_error_ms_median, Some(1000.0));
        assert!((figures.avhscore.unwrap() - 1.0).abs() < 1e-9);
        let two = Figures::of(&truths[..3], &found[..3]);
        assert_eq!(two.onset_error_ms_median, Some(1000.0));
        let one = Figures::of(&truths[..1], &found[..1]);
        assert!((one.onset_error_ms_median.unwrap() - 50.0).abs() < 1e-6);
        assert_eq!(Figures::of(&truths[2..3], &found[2..3]).onset_in_time, None);
    }

    #[test]
    fn shuffled_pairs_belong_together_less() {
        let found: Vec<Found> = (0..6)
            .map(|i| found(i, 0, Some(i as f64), Some(i as f64)))
            .collect();
        let shuffled = Shuffled::of(&found, 3);
        assert_eq!(shuffled.avhscore, Some(0.0));
        assert!(shuffled.onset_error_ms_median.unwrap() >= 1000.0);
        assert_eq!(Shuffled::of(&found[..1], 3), Shuffled::default());
    }

    #[test]
    fn a_derangement_moves_everything_and_follows_its_seed() {
        assert_eq!((derangement(0, 1), derangement(1, 1)), (None, None));
        assert_eq!(derangement(2, 9), Some(vec![1, 0]));
        for (n, seed) in [(3, 1), (7, 2), (200, 3), (200, 4)] {
            let order = derangement(n, seed).unwrap();
            assert!(order.iter().enumerate().all(|(i, &to)| i != to), "{order:?}");
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..n));
            assert_eq!(derangement(n, seed), Some(order));
        }
        assert_ne!(derangement(200, 3), derangement(200, 4));
    }

    #[test]
    fn a_ratio_needs_something_to_be_compared_with() {
        assert_eq!(ratio(Some(0.3), Some(0.6)), Some(0.5));
        assert_eq!(ratio(Some(-0.3), Some(0.6)), Some(-0.5));
        for (part, whole) in [
            (None, Some(1.0)),
            (Some(1.0), None),
            (Some(1.0), Some(0.0)),
            (Some(1.0), Some(-1.0)),
        ] {
            assert_eq!(ratio(part, whole), None);
        }
    }
}
