//! The lower envelope of curves over compute.
//!
//! At each compute of a logarithmic grid the size with the lowest loss wins. Wins say how large a model should be only where
//! smaller and larger ones were there to win: points that the smallest or the largest size wins are dropped, and so are those
//! beyond the end (or before the beginning) of a size that still (or already) was the best there.

use serde::Serialize;

/// Loss over compute of one size.
#[derive(Clone, Debug)]
pub struct Track {
    /// Name of the size.
    pub size: String,
    /// Its weights.
    pub weights: f64,
    /// Operations of a token.
    pub flops: f64,
    /// Compute in PFLOP/s-days and loss, in order.
    pub points: Vec<(f64, f64)>,
}

/// The best size at some compute.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Winner {
    /// Compute, PFLOP/s-days.
    pub compute: f64,
    /// The lowest loss.
    pub loss: f64,
    /// Whose it is.
    pub size: String,
    /// Weights of that size.
    pub weights: f64,
    /// Tokens that it has seen then.
    pub tokens: f64,
    /// Weights for which a parabola through its loss and those of its neighbours is least, over the logarithm of weights: the best
    /// size between sizes. None where a neighbour is missing.
    pub between: Option<f64>,
}

/// Points of the grid that do not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Dropped {
    /// The smallest size won.
    pub smallest: usize,
    /// The largest size won.
    pub largest: usize,
    /// A size that might have won was not there.
    pub unfinished: usize,
}

/// The envelope.
#[derive(Clone, Debug, Default)]
pub struct Envelope {
    /// The points that count.
    pub winners: Vec<Winner>,
    /// All others, in order.
    pub others: Vec<Winner>,
    /// Why they do not.
    pub dropped: Dropped,
}

impl Track {
    /// The loss at `compute`, between the points around it on a line of logarithms; none outside of the curve.
    fn at(&self, compute: f64) -> Option<f64> {
        let next = self.points.partition_point(|point| point.0 < compute);
        let after = self.points.get(next)?;
        if after.0 == compute {
            return Some(after.1);
        }
        let before = self.points.get(next.checked_sub(1)?)?;
        let part = (compute.ln() - before.0.ln()) / (after.0.ln() - before.0.ln());
        Some((before.1.ln() + part * (after.1.ln() - before.1.ln())).exp())
    }

    /// A mean of each loss with its neighbours', whose weights are a half: of logarithms, so that a power law stays one.
    #[must_use]
    pub fn smoothed(&self) -> Self {
        let value = |i: usize| self.points[i].1.ln();
        let smooth = |i: usize| match i {
            0 => self.points[i],
            i if i + 1 == self.points.len() => self.points[i],
            i => {
                let mean = 0.25 * value(i - 1) + 0.5 * value(i) + 0.25 * value(i + 1);
                (self.points[i].0, mean.exp())
            }
        };
        Self {
            points: (0..self.points.len()).map(smooth).collect(),
            ..self.clone()
        }
    }
}

impl Envelope {
    /// The envelope of the tracks of one architecture, at `per_decade` points a decade of compute.
    #[must_use]
    pub fn of(tracks: &[Track], per_decade: usize) -> Self {
        let mut envelope = Self::default();
        let ends = |of: fn(&Track) -> Option<f64>| tracks.iter().filter_map(of);
        let low = ends(|track| Some(track.points.first()?.0)).fold(f64::INFINITY, f64::min);
        let high = ends(|track| Some(track.points.last()?.0)).fold(0.0, f64::max);
        if low > high {
            return envelope;
        }
        let by_weights = |a: &&Track, b: &&Track| a.weights.total_cmp(&b.weights);
        let smallest = tracks.iter().min_by(by_weights).map(|track| track.size.clone());
        let largest = tracks.iter().max_by(by_weights).map(|track| track.size.clone());
        let (from, to) = reliable(tracks);
        let index = |compute: f64| compute.log10() * per_decade as f64;
        for i in index(low).ceil() as i64..=index(high).floor() as i64 {
            let compute = 10f64.powf(i as f64 / per_decade as f64);
            let Some((track, loss)) = best(tracks, compute) else {
                continue;
            };
            let winner = Winner {
                compute,
                loss,
                size: track.size.clone(),
                weights: track.weights,
                tokens: compute * super::PFLOPS_DAY / track.flops,
                between: between(tracks, &track.size, compute),
            };
            let size = Some(&winner.size);
            let reason = if size == smallest.as_ref() {
                &mut envelope.dropped.smallest
            } else if size == largest.as_ref() {
                &mut envelope.dropped.largest
            } else if compute < from || compute > to {
                &mut envelope.dropped.unfinished
            } else {
                envelope.winners.push(winner);
                continue;
            };
            *reason += 1;
            envelope.others.push(winner);
        }
        envelope
    }
}

/// The track with the lowest loss at `compute`.
fn best(tracks: &[Track], compute: f64) -> Option<(&Track, f64)> {
    let there = tracks
        .iter()
        .filter_map(|track| Some((track, track.at(compute)?)));
    there.min_by(|a, b| a.1.total_cmp(&b.1))
}

/// The vertex of the parabola through the losses of `size` and of its neighbours.
fn between(tracks: &[Track], size: &str, compute: f64) -> Option<f64> {
    let mut sorted: Vec<&Track> = tracks.iter().collect();
    sorted.sort_by(|a, b| a.weights.total_cmp(&b.weights));
    let middle = sorted.iter().position(|track| track.size == size)?;
    let point = |index: usize| {
        let track = sorted.get(index)?;
        Some((track.weights.ln(), track.at(compute)?.ln()))
    };
    let (below, own, above) = (point(middle.checked_sub(1)?)?, point(middle)?, point(middle + 1)?);
    let slope = |from: (f64, f64), to: (f64, f64)| (to.1 - from.1) / (to.0 - from.0);
    let bend = (slope(own, above) - slope(below, own)) / (above.0 - below.0);
    // The slope between two points is that of the parabola half way.
    let vertex = f64::midpoint(below.0, own.0) - slope(below, own) / (2.0 * bend);
    (bend > 0.0 && vertex.is_finite()).then(|| vertex.exp())
}

/// Between which computes no size is missing that might win: from the last beginning to the first end of one that is the best
/// there.
fn reliable(tracks: &[Track]) -> (f64, f64) {
    let wins = |track: &Track, compute: f64| {
        best(tracks, compute).is_some_and(|(found, _)| found.size == track.size)
    };
    let last_end = tracks
        .iter()
        .filter_map(|track| Some(track.points.last()?.0))
        .fold(0.0, f64::max);
    let first_start = tracks
        .iter()
        .filter_map(|track| Some(track.points.first()?.0))
        .fold(f64::INFINITY, f64::min);
    let (mut from, mut to) = (first_start, last_end);
    for track in tracks {
        let (Some(first), Some(last)) = (track.points.first(), track.points.last()) else {
            continue;
        };
        if wins(track, last.0) && last.0 < last_end {
            to = to.min(last.0);
        }
        if wins(track, first.0) && first.0 > first_start {
            from = from.max(first.0);
        }
    }
    (from, to)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Loss over compute of a model of `n` weights, as a sum of what its size and its tokens leave: the least of it over n is a
    /// power law.
    fn track(size: &str, n: f64, last: f64) -> Track {
        let flops = 6.0 * n;
        let loss = |c: f64| {
            let tokens = c * crate::scaling::PFLOPS_DAY / flops;
            30.0 * n.powf(-0.2) + 30.0 * tokens.powf(-0.2)
        };
        let computes = (0..=120).map(|i| 1e-9 * 10f64.powf(f64::from(i) / 20.0));
        Track {
            size: size.to_owned(),
            weights: n,
            flops,
            points: computes.filter(|c| *c <= last).map(|c| (c, loss(c))).collect(),
        }
    }

    fn tracks(last: f64) -> Vec<Track> {
        ["a", "b", "c", "d", "e"]
            .iter()
            .enumerate()
            .map(|(i, size)| track(size, 1e5 * 3f64.powi(i as i32), last))
            .collect()
    }

    #[test]
    fn edge_winners_are_dropped() {
        let envelope = Envelope::of(&tracks(1e-3), 10);
        let sizes: Vec<&str> = envelope
            .winners
            .iter()
            .map(|winner| winner.size.as_str())
            .collect();
        assert!(
            sizes.iter().all(|size| ["b", "c", "d"].contains(size)),
            "{sizes:?}"
        );
        for size in ["b", "c", "d"] {
            assert!(sizes.contains(&size), "{sizes:?}");
        }
        let Dropped {
            smallest,
            largest,
            unfinished,
        } = envelope.dropped;
        assert!(smallest > 0 && largest > 0, "{:?}", envelope.dropped);
        assert_eq!(unfinished, 0);
        assert_eq!(envelope.others.len(), smallest + largest);
        for winner in &envelope.winners {
            // A sum of equal powers is least where both are equal: the best of these sizes has about as many tokens as weights.
            let ratio = winner.tokens / winner.weights;
            assert!((0.3..=3.5).contains(&ratio), "{winner:?}");
            let best = (winner.compute * crate::scaling::PFLOPS_DAY / 6.0).sqrt();
            assert!(
                (winner.between.unwrap() / best - 1.0).abs() < 0.005,
                "{winner:?}, {best}"
            );
        }
    }

    /// Beyond the end of a size that nobody had overtaken, the next best is no winner.
    #[test]
    fn points_past_an_unbeaten_end_do_not_count() {
        let whole = Envelope::of(&tracks(1e-3), 10);
        let mut cut = tracks(1e-3);
        let unbeaten = whole
            .winners
            .iter()
            .find(|winner| winner.size == "c")
            .unwrap()
            .compute;
        cut[2].points.retain(|point| point.0 <= unbeaten * 1.01);
        let envelope = Envelope::of(&cut, 10);
        assert!(envelope.dropped.unfinished > 0);
        assert!(
            envelope
                .winners
                .iter()
                .all(|winner| winner.compute <= unbeaten * 1.01)
        );
    }

    #[test]
    fn losses_lie_between_points() {
        let track = Track {
            size: "a".into(),
            weights: 1.0,
            flops: 6.0,
            points: vec![(1.0, 4.0), (100.0, 1.0)],
        };
        assert_eq!(track.at(1.0), Some(4.0));
        assert!((track.at(10.0).unwrap() - 2.0).abs() < 1e-12);
        assert_eq!((track.at(0.9), track.at(101.0)), (None, None));
        let law: Vec<_> = (0..9).map(|i| 2f64.powi(i)).map(|c| (c, c.powf(-0.1))).collect();
        let smooth = Track {
            points: law.clone(),
            ..track
        }
        .smoothed();
        for (found, expected) in smooth.points.iter().zip(law) {
            assert!((found.1 - expected.1).abs() < 1e-12);
        }
        assert!(Envelope::of(&[], 10).winners.is_empty());
    }
}
