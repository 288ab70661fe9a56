//! A curve of bounded size out of any number of points: buckets that keep their lowest and highest point, so that a spike
//! of one step in a million is still seen.

/// Buckets of a curve; each is drawn as at most two points. When all are full, neighbours are joined.
const BUCKETS: usize = 1000;
/// How much of a smoothed curve one of its points looks at, as one part of so many on either side.
const SMOOTH: usize = 50;

/// A step and what was measured there.
pub type Point = (u64, f64);

/// Points in the order of their steps.
#[derive(Clone, Debug, Default)]
pub struct Curve {
    buckets: Vec<Bucket>,
    /// Points of a full bucket, less one.
    more: u64,
    /// Values that were no numbers: infinite or undefined.
    pub undefined: u64,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    count: u64,
    /// Sums over the points.
    steps: f64,
    values: f64,
    first: u64,
    last: Point,
    low: Point,
    high: Point,
}

impl Bucket {
    fn new(point: Point) -> Self {
        Self {
            count: 1,
            steps: point.0 as f64,
            values: point.1,
            first: point.0,
            last: point,
            low: point,
            high: point,
        }
    }

    fn join(&mut self, next: Self) {
        self.count += next.count;
        self.steps += next.steps;
        self.values += next.values;
        self.last = next.last;
        if next.low.1 < self.low.1 {
            self.low = next.low;
        }
        if next.high.1 > self.high.1 {
            self.high = next.high;
        }
    }
}

impl Curve {
    /// Appends a point; a value that is no finite number is counted and left out.
    pub fn push(&mut self, step: u64, value: f64) {
        if !value.is_finite() {
            self.undefined += 1;
            return;
        }
        let new = Bucket::new((step, value));
        match self.buckets.last_mut() {
            Some(last) if last.count <= self.more => last.join(new),
            _ => {
                if self.buckets.len() == BUCKETS {
                    self.halve();
                }
                self.buckets.push(new);
            }
        }
    }

    fn halve(&mut self) {
        let join = |pair: &[Bucket]| {
            let mut joined = pair[0];
            pair[1..].iter().for_each(|next| joined.join(*next));
            joined
        };
        self.buckets = self.buckets.chunks(2).map(join).collect();
        self.more = 2 * self.more + 1;
    }

    /// Drops what lies at `step` and later, for a run that goes on from before it; of a bucket that `step` cuts, all is
    /// kept.
    pub fn rewind(&mut self, step: u64) {
        let kept = self.buckets.partition_point(|bucket| bucket.first < step);
        self.buckets.truncate(kept);
    }

    /// Whether there is nothing to draw.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }

    /// How many points were taken in.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.count).sum()
    }

    /// The newest point.
    #[must_use]
    pub fn last(&self) -> Option<Point> {
        self.buckets.last().map(|bucket| bucket.last)
    }

    /// The lowest point, the first of equals.
    #[must_use]
    pub fn lowest(&self) -> Option<Point> {
        let lower = |low: Point, next: Point| if next.1 < low.1 { next } else { low };
        self.buckets.iter().map(|bucket| bucket.low).reduce(lower)
    }

    /// The highest point, the first of equals.
    #[must_use]
    pub fn highest(&self) -> Option<Point> {
        let higher = |high: Point, next: Point| if next.1 > high.1 { next } else { high };
        self.buckets.iter().map(|bucket| bucket.high).reduce(higher)
    }

    /// At most 2,000 points, with every extreme among them.
    #[must_use]
    pub fn points(&self) -> Vec<(f64, f64)> {
        let extremes = self.buckets.iter().flat_map(|bucket| {
            let (low, high) = (bucket.low, bucket.high);
            if low.0 == high.0 {
                vec![low]
            } else if low.0 < high.0 {
                vec![low, high]
            } else {
                vec![high, low]
            }
        });
        extremes.map(|(step, value)| (step as f64, value)).collect()
    }

    /// The means of the buckets, each averaged with its neighbours on both sides (weights fall linearly), so that the
    /// smooth curve does not lag behind. A single spike is left to the points: a mean is first replaced by the median of
    /// itself and its two neighbours.
    #[must_use]
    pub fn smoothed(&self) -> Vec<(f64, f64)> {
        let mean = |bucket: &Bucket| {
            let n = bucket.count as f64;
            (bucket.steps / n, bucket.values / n)
        };
        let raw: Vec<(f64, f64)> = self.buckets.iter().map(mean).collect();
        let mut means = raw.clone();
        for (middle, three) in means.iter_mut().skip(1).zip(raw.windows(3)) {
            let mut values = [three[0].1, three[1].1, three[2].1];
            values.sort_by(f64::total_cmp);
            middle.1 = values[1];
        }
        let reach = means.len() / SMOOTH;
        let near = |i: usize| {
            // The window shrinks towards the ends, or they would be drawn to one side.
            let reach = reach.min(i).min(means.len() - 1 - i);
            let window = means[i - reach..=i + reach].iter().enumerate();
            let (sum, weights) = window.fold((0.0, 0.0), |(sum, weights), (j, (_, value))| {
                let weight = (reach + 1 - j.abs_diff(reach)) as f64;
                (sum + weight * value, weights + weight)
            });
            (means[i].0, sum / weights)
        };
        (0..means.len()).map(near).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_points_stay_few_and_keep_their_spikes() {
        let mut curve = Curve::default();
        for step in 1..=1_000_000u64 {
            let value = match step {
                123_457 => 500.0,
                700_001 => -3.0,
                999_999 => f64::NAN,
                _ => 1.0 + 1.0 / step as f64,
            };
            curve.push(step, value);
        }
        let points = curve.points();
        assert!((1000..=2000).contains(&points.len()), "{}", points.len());
        assert!(points.contains(&(123_457.0, 500.0)) && points.contains(&(700_001.0, -3.0)));
        assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert_eq!((curve.undefined, curve.count()), (1, 999_999));
        assert_eq!(curve.last(), Some((1_000_000, 1.0 + 1e-6)));
        assert_eq!(
            (curve.lowest(), curve.highest()),
            (Some((700_001, -3.0)), Some((123_457, 500.0)))
        );
        assert!(curve.smoothed().len() <= BUCKETS);
    }

    #[test]
    fn few_points_are_drawn_as_they_are() {
        let mut curve = Curve::default();
        for step in 0..BUCKETS as u64 {
            curve.push(10 * step, step as f64);
        }
        let points = curve.points();
        assert_eq!(points.len(), BUCKETS);
        assert_eq!((points[0], points[999]), ((0.0, 0.0), (9990.0, 999.0)));
        // A straight line stays straight up to its ends.
        for ((x, y), (step, value)) in curve.smoothed().into_iter().zip(points) {
            assert!((x - step).abs() < 1e-9 && (y - value).abs() < 1e-9, "{x} {y}");
        }
        let empty = Curve::default();
        assert!(empty.is_empty() && empty.points().is_empty() && empty.smoothed().is_empty());
        assert_eq!((empty.last(), empty.lowest()), (None, None));
    }

    #[test]
    fn smoothing_takes_noise_away() {
        let mut curve = Curve::default();
        for step in 0..5000 {
            curve.push(step, 3.0 + if step % 2 == 0 { 1.0 } else { -1.0 });
        }
        let inner = |points: Vec<(f64, f64)>| -> f64 {
            let values = points.iter().skip(20).map(|(_, value)| (value - 3.0).abs());
            values.take(400).fold(0.0, f64::max)
        };
        assert_eq!(inner(curve.points()), 1.0);
        assert!(inner(curve.smoothed()) < 1e-9);
    }

    #[test]
    fn a_spike_is_drawn_and_does_not_bend_the_smooth_curve() {
        let mut curve = Curve::default();
        for step in 0..500 {
            curve.push(step, if step == 250 { 1e6 } else { 2.0 });
        }
        assert!(curve.points().contains(&(250.0, 1e6)));
        assert!(curve.smoothed().iter().all(|(_, value)| *value == 2.0));
    }

    #[test]
    fn rewinding_drops_the_later_steps() {
        let mut curve = Curve::default();
        (1..=10).for_each(|step| curve.push(step, step as f64));
        curve.rewind(4);
        assert_eq!((curve.last(), curve.highest()), (Some((3, 3.0)), Some((3, 3.0))));
        curve.push(4, 0.5);
        assert_eq!((curve.count(), curve.lowest()), (4, Some((4, 0.5))));
        curve.rewind(0);
        assert!(curve.is_empty());
    }
}
