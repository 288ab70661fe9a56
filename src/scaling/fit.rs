//! Power laws of the envelope of each architecture.

use std::collections::BTreeMap;

use serde::Serialize;

use super::PFLOPS_DAY;
use super::curve::Curve;
use super::envelope::{Dropped, Envelope, Track, Winner};
use super::line::FEWEST;
pub use super::line::Law;
use super::published::{self, Published};

/// The largest compute is foretold from points of at most its part.
const HELD_BACK: f64 = 3.0;
/// Seed of bootstraps.
const SEED: u64 = 1;

/// What counts as weights and compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// The layers, as in the paper.
    Layers,
    /// The layers and the head.
    WithHead,
}

/// How well the smaller computes foretell the largest.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Points that the law was fitted to.
    pub points: usize,
    /// The largest compute of these.
    pub from: f64,
    /// The largest compute of the envelope.
    pub compute: f64,
    /// The loss foretold there.
    pub predicted: f64,
    /// The loss there.
    pub found: f64,
    /// What it misses by, as a part of the loss.
    pub error: f64,
}

/// The laws of an architecture.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// Loss over compute.
    #[serde(flatten)]
    pub loss: Option<Law>,
    /// Weights of the best size over compute.
    pub n_opt: Option<Law>,
    /// Tokens of the best size over compute.
    pub d_opt: Option<Law>,
    /// Weights of the best size between sizes, by parabolas: without the steps of `n_opt`, which flatten its slope.
    pub n_between: Option<Law>,
    /// Sizes that win, from small to large.
    pub sizes: Vec<String>,
    /// Decades of compute that the envelope spans.
    pub decades: f64,
    /// The envelope.
    pub envelope: Vec<Winner>,
    /// Points of the grid that do not count.
    pub dropped: Dropped,
    /// How well the smaller computes foretell the largest.
    pub prediction: Option<Prediction>,
    /// How well the whole law foretells the end of the largest model, which is outside of it.
    pub beyond: Option<Prediction>,
    /// What was published.
    pub published: Option<Published>,
    /// Why there is no law.
    pub reason: Option<String>,
    /// The curves that the envelope is of, for plots.
    #[serde(skip)]
    pub tracks: Vec<Track>,
    /// Points of the envelope that do not count, for plots.
    #[serde(skip)]
    pub others: Vec<Winner>,
}

/// Fits every architecture, at `per_decade` points a decade of compute.
#[must_use]
pub fn fit(curves: &[Curve], per_decade: usize, counted: Counted) -> BTreeMap<String, Fit> {
    let mut by_name: BTreeMap<String, Vec<&Curve>> = BTreeMap::new();
    for curve in curves {
        by_name
            .entry(curve.row.architecture.clone())
            .or_default()
            .push(curve);
    }
    by_name
        .into_iter()
        .map(|(name, curves)| {
            let fit = of(&name, tracks(&curves, counted), per_decade);
            (name, fit)
        })
        .collect()
}

/// One smooth curve for each size, a mean over seeds.
fn tracks(curves: &[&Curve], counted: Counted) -> Vec<Track> {
    let mut by_size: BTreeMap<&str, Vec<&Curve>> = BTreeMap::new();
    for &curve in curves {
        by_size.entry(&curve.row.size.name).or_default().push(curve);
    }
    let mut tracks: Vec<Track> = by_size
        .into_iter()
        .map(|(size, seeds)| {
            let account = seeds[0].row.account;
            let (weights, flops) = match counted {
                Counted::Layers => (account.weights, account.flops),
                Counted::WithHead => (account.weights + account.head, account.flops_with_head()),
            };
            // By tokens, so that seeds whose curves ended early count as far as they came.
            let mut sums: BTreeMap<u64, (f64, usize)> = BTreeMap::new();
            for point in seeds.iter().flat_map(|curve| &curve.points) {
                let (sum, count) = sums.entry(point.tokens).or_default();
                *sum += point.loss.ln();
                *count += 1;
            }
            let all = sums.into_iter().filter(|(_, (_, count))| *count == seeds.len());
            let points = all.map(|(tokens, (sum, count))| {
                let compute = tokens as f64 * flops / PFLOPS_DAY;
                (compute, (sum / count as f64).exp())
            });
            Track {
                size: size.to_owned(),
                weights: weights as f64,
                flops,
                points: points.collect(),
            }
            .smoothed()
        })
        .collect();
    tracks.sort_by(|a, b| a.weights.total_cmp(&b.weights));
    tracks
}

fn of(name: &str, tracks: Vec<Track>, per_decade: usize) -> Fit {
    let Envelope {
        winners,
        others,
        dropped,
    } = Envelope::of(&tracks, per_decade);
    let law = |value: fn(&Winner) -> f64, winners: &[Winner]| {
        let points: Vec<_> = winners
            .iter()
            .map(|winner| (winner.compute, value(winner)))
            .collect();
        Law::through(&points, SEED)
    };
    let loss = law(|winner| winner.loss, &winners);
    let between: Vec<_> = winners
        .iter()
        .filter_map(|winner| Some((winner.compute, winner.between?)))
        .collect();
    let mut sizes: Vec<String> = winners.iter().map(|winner| winner.size.clone()).collect();
    sizes.dedup();
    let decades = match (winners.first(), winners.last()) {
        (Some(first), Some(last)) => (last.compute / first.compute).log10(),
        _ => 0.0,
    };
    let prediction = winners.last().and_then(|last| {
        let smaller: Vec<Winner> = winners
            .iter()
            .filter(|winner| winner.compute <= last.compute / HELD_BACK)
            .cloned()
            .collect();
        predict(
            &smaller,
            law(|winner| winner.loss, &smaller)?,
            (last.compute, last.loss),
        )
    });
    let end = tracks.last().and_then(|track| track.points.last().copied());
    let beyond = end.and_then(|end| predict(&winners, loss?, end));
    let reason = loss.is_none().then(|| {
        format!(
            "{} points of an envelope, expected {FEWEST} or more: sizes between the smallest and the largest have to win",
            winners.len()
        )
    });
    Fit {
        loss,
        n_opt: law(|winner| winner.weights, &winners),
        d_opt: law(|winner| winner.tokens, &winners),
        n_between: Law::through(&between, SEED),
        sizes,
        decades,
        envelope: winners,
        dropped,
        prediction,
        beyond,
        published: published::of(name),
        reason,
        tracks,
        others,
    }
}

fn predict(winners: &[Winner], law: Law, (compute, found): (f64, f64)) -> Option<Prediction> {
    let predicted = law.at(compute);
    Some(Prediction {
        points: winners.len(),
        from: winners.last()?.compute,
        compute,
        predicted,
        found,
        error: (predicted / found - 1.0).abs(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::account::Account;
    use crate::scaling::published::Power;
    use crate::scaling::{Point, Row, Size};

    /// Curves whose envelope is `loss`, with its least at the size `n_opt` of each compute.
    fn synthetic(loss: Power, n_opt: Power, sizes: usize, seed: u64) -> Vec<Curve> {
        (0..sizes)
            .map(|i| {
                let weights = (3e5 * 35f64.powf(i as f64 / (sizes - 1) as f64)).round();
                let flops = 6.5 * weights;
                let points = (0..60).map(|j| {
                    let tokens = 200_000.0 * 2000f64.powf(f64::from(j) / 59.0);
                    let compute = tokens * flops / PFLOPS_DAY;
                    let off = (weights / n_opt.at(compute)).ln();
                    Point {
                        step: 1 + j as u64,
                        tokens: tokens as u64,
                        flops: tokens * flops,
                        loss: loss.at(compute) * (1.0 + 0.004 * off * off),
                        train_loss: None,
                        tokens_per_s: None,
                    }
                });
                Curve {
                    points: points.collect(),
                    row: Row {
                        name: format!("tnl-{i}"),
                        architecture: "tnl".into(),
                        size: Size {
                            name: format!("size {i}"),
                            layers: 1,
                            width: 1,
                            heads: 1,
                            hidden: 1,
                            lr: 1e-3,
                            epochs: None,
                        },
                        seed,
                        account: Account {
                            weights: weights as u64,
                            parameters: 0,
                            head: 1000,
                            flops,
                        },
                        steps: 60,
                        tokens: 0,
                        epochs: 1.0,
                        flops: 0.0,
                        lr: 1e-3,
                        trials: Vec::new(),
                        edge: false,
                        loss: None,
                        tokens_per_s: None,
                        seconds: 0.0,
                        stopped: None,
                    },
                }
            })
            .collect()
    }

    /// N_opt of the published kind, moved so that these sizes are the best at these computes.
    fn laws() -> [Power; 2] {
        let alpha = 0.65;
        let n_opt = Power {
            alpha,
            beta: 1.8e6 / 2e-6f64.powf(alpha),
        };
        let loss = Power {
            alpha: -0.0768,
            beta: 1.2,
        };
        [loss, n_opt]
    }

    #[test]
    fn known_exponents_are_recovered() {
        let [loss, n_opt] = laws();
        let fits = fit(&synthetic(loss, n_opt, 9, 1), 10, Counted::Layers);
        let fit = &fits["tnl"];
        let found = fit.loss.unwrap();
        assert!((found.alpha - loss.alpha).abs() < 1e-3, "{found:?}");
        assert!((found.beta / loss.beta - 1.0).abs() < 0.02, "{found:?}");
        assert!(found.interval[0] <= found.alpha && found.alpha <= found.interval[1]);
        assert!(found.interval[1] - found.interval[0] < 0.004, "{found:?}");
        let weights = fit.n_opt.unwrap();
        assert!((weights.alpha - n_opt.alpha).abs() < 0.05, "{weights:?}");
        let between = fit.n_between.unwrap();
        assert!((between.alpha - n_opt.alpha).abs() < 2e-3, "{between:?}");
        // D = C / 6.5 N.
        let tokens = fit.d_opt.unwrap();
        assert!((tokens.alpha - (1.0 - n_opt.alpha)).abs() < 0.05, "{tokens:?}");
        assert!(fit.envelope.len() >= 12 && fit.sizes.len() == 7 && fit.decades > 1.0);
        assert!(
            fit.dropped.smallest > 0 && fit.dropped.largest > 0,
            "{:?}",
            fit.dropped
        );
        let prediction = fit.prediction.unwrap();
        assert!(prediction.error < 0.002 && prediction.from * 3.0 <= prediction.compute * 1.001);
        assert!(fit.beyond.unwrap().compute > prediction.compute);
        assert_eq!(fit.published.unwrap().loss.beta, 3.5391);
    }

    #[test]
    fn seeds_are_averaged_and_heads_counted() {
        let [loss, n_opt] = laws();
        let mut curves = synthetic(loss, n_opt, 5, 1);
        let one = fit(&curves, 10, Counted::Layers);
        let other = Power {
            beta: loss.beta * 1.21,
            ..loss
        };
        curves.extend(synthetic(other, n_opt, 5, 2));
        let both = fit(&curves, 10, Counted::Layers);
        let ratio = both["tnl"].loss.unwrap().beta / one["tnl"].loss.unwrap().beta;
        assert!((ratio - 1.1).abs() < 1e-6, "{ratio}");
        let heads = fit(&curves, 10, Counted::WithHead);
        assert_eq!(
            heads["tnl"].tracks[0].weights,
            both["tnl"].tracks[0].weights + 1000.0
        );
        assert_eq!(heads["tnl"].tracks[0].flops, both["tnl"].tracks[0].flops + 6000.0);
    }

    /// Two sizes have nothing between them.
    #[test]
    fn without_a_size_between_there_is_no_law() {
        let [loss, n_opt] = laws();
        let fits = fit(&synthetic(loss, n_opt, 2, 1), 10, Counted::Layers);
        let fit = &fits["tnl"];
        assert!(fit.loss.is_none() && fit.n_opt.is_none() && fit.prediction.is_none());
        assert!(
            fit.reason.as_ref().unwrap().starts_with("0 points"),
            "{:?}",
            fit.reason
        );
        let json = serde_json::to_value(fit).unwrap();
        assert!(json.get("alpha").is_none() && json["envelope"].as_array().unwrap().is_empty());
    }
}
