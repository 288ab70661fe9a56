//! How often a judge sees what was to be drawn, with standard errors.

use fulgur_kernels::philox::Philox;
use serde::Serialize;

use crate::classify::figures::{OfClass, Tally};
use crate::lm_eval::figures::{Estimate, Ratio};

/// Sets of pictures that are drawn again from those that were judged, for the standard errors of means over classes.
const RESAMPLED: usize = 400;

/// Shares of pictures whose class is recognised, within 0..1.
#[derive(Clone, Debug, Serialize)]
pub struct Accuracy {
    /// Pictures.
    pub n: u64,
    /// Classes that they are of.
    pub classes_judged: usize,
    /// The class is the likeliest one; standard errors are binomial.
    pub top1: Estimate,
    /// It is among the five likeliest.
    pub top5: Estimate,
    /// Means over classes; standard errors are those of pictures drawn again.
    pub macro_top1: Estimate,
    /// The same among five.
    pub macro_top5: Estimate,
    /// Cross-entropy, in nats a picture.
    pub loss: f64,
    /// By class, with what it is most often taken for.
    pub classes: Vec<OfClass>,
    /// Pictures by true class, then by the likeliest.
    pub confusion: Vec<Vec<u64>>,
}

impl Accuracy {
    /// Of pictures with a class each and the shares that a judge gives all classes; none of no picture.
    pub fn of<'a>(
        labels: &[String],
        pictures: impl IntoIterator<Item = (usize, &'a [f32])>,
        seed: u64,
    ) -> Option<Self> {
        let mut tally = Tally::new(labels.len());
        let mut hits = Vec::new();
        for (class, shares) in pictures {
            tally.add(class, shares);
            hits.push(Hit::of(class, shares));
        }
        let figures = tally.figures(labels)?;
        let micro = |hit: fn(&Hit) -> bool| {
            let mut ratio = Ratio::default();
            hits.iter().for_each(|own| ratio.add(f64::from(hit(own)), 1.0));
            ratio.estimate()
        };
        let [macro_top1, macro_top5] = means_of_classes(&hits, labels.len(), seed);
        Some(Self {
            n: figures.n,
            classes_judged: figures.classes.iter().filter(|class| class.n > 0).count(),
            top1: micro(|hit| hit.first)?,
            top5: micro(|hit| hit.among_five)?,
            macro_top1,
            macro_top5,
            loss: figures.loss,
            classes: figures.classes,
            confusion: figures.confusion,
        })
    }
}

/// A picture that was judged.
#[derive(Clone, Copy)]
struct Hit {
    class: usize,
    first: bool,
    among_five: bool,
}

impl Hit {
    fn of(class: usize, shares: &[f32]) -> Self {
        let order = crate::classify::ranked(shares);
        Self {
            class,
            first: order.first() == Some(&class),
            among_five: order.iter().take(5).any(|&guess| guess == class),
        }
    }
}

/// Means over classes of the shares among the likeliest one and five, with the deviation of the same of pictures drawn again.
fn means_of_classes(hits: &[Hit], classes: usize, seed: u64) -> [Estimate; 2] {
    let means = hits_by_class(hits.iter(), classes);
    let mut draw = Philox::named(seed, "accuracy");
    let again: Vec<[f64; 2]> = (0..RESAMPLED)
        .map(|_| {
            let drawn = (0..hits.len()).map(|_| &hits[draw.below(hits.len())]);
            hits_by_class(drawn, classes)
        })
        .collect();
    [0, 1].map(|which| {
        let mean = again.iter().map(|means| means[which]).sum::<f64>() / RESAMPLED as f64;
        let squares: f64 = again.iter().map(|means| (means[which] - mean).powi(2)).sum();
        Estimate {
            mean: means[which],
            stderr: (hits.len() > 1).then(|| (squares / (RESAMPLED - 1) as f64).sqrt()),
        }
    })
}

fn hits_by_class<'a>(hits: impl Iterator<Item = &'a Hit>, classes: usize) -> [f64; 2] {
    let mut counts = vec![[0u32; 3]; classes];
    for hit in hits {
        let count = &mut counts[hit.class];
        count[0] += 1;
        count[1] += u32::from(hit.first);
        count[2] += u32::from(hit.among_five);
    }
    let there = counts.iter().filter(|count| count[0] > 0);
    let n = there.clone().count().max(1) as f64;
    [1, 2].map(|which| {
        let shares = there
            .clone()
            .map(|count| f64::from(count[which]) / f64::from(count[0]));
        shares.sum::<f64>() / n
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares with `first` the likeliest and the classes after it in order.
    fn shares(first: usize) -> Vec<f32> {
        (0..8)
            .map(|class| 1.0 - ((class + 8 - first) % 8) as f32 / 8.0)
            .collect()
    }

    #[test]
    fn shares_are_counted_and_have_their_errors() {
        let labels: Vec<String> = ('a'..='h').map(String::from).collect();
        assert!(Accuracy::of(&labels, [], 0).is_none());
        // 30 of class 0, of which 12 are right and 20 among five; 10 of class 3, all right.
        let mut pictures: Vec<(usize, Vec<f32>)> = Vec::new();
        pictures.extend((0..12).map(|_| (0, shares(0))));
        pictures.extend((0..8).map(|_| (0, shares(4))));
        pictures.extend((0..10).map(|_| (0, shares(1))));
        pictures.extend((0..10).map(|_| (3, shares(3))));
        let judge = |seed| {
            let each = pictures.iter().map(|(class, shares)| (*class, shares.as_slice()));
            Accuracy::of(&labels, each, seed).unwrap()
        };
        let found = judge(1);
        assert_eq!((found.n, found.classes_judged), (40, 2));
        assert_eq!((found.top1.mean, found.top5.mean), (22.0 / 40.0, 30.0 / 40.0));
        assert_eq!(
            (found.macro_top1.mean, found.macro_top5.mean),
            (f64::midpoint(0.4, 1.0), f64::midpoint(20.0 / 30.0, 1.0))
        );
        let binomial = |p: f64, n: f64| (p * (1.0 - p) / (n - 1.0)).sqrt();
        assert!((found.top1.stderr.unwrap() - binomial(0.55, 40.0)).abs() < 1e-12);
        // Class 3 is always right; class 0 alone moves the mean.
        let expected = binomial(0.4, 30.0) / 2.0;
        let error = found.macro_top1.stderr.unwrap();
        assert!((error / expected - 1.0).abs() < 0.2, "{error} {expected}");
        assert_eq!(found.classes[0].mistaken_for.as_deref(), Some("b"));
        assert_eq!(judge(1).macro_top1, found.macro_top1);
    }
}
