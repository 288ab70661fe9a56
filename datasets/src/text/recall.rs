//! Examples of multi-query associative recall (MQAR, arXiv 2312.04927), which asks a language model for what it has read.
//!
//! ```text
//! key value  key value  ..  key value    filler ..  key filler ..  key filler ..
//! ^ D pairs                              ^ every key once more, one place in two; its target is its value
//! ```
//!
//! Of V tokens 0 is the filler, those below V / 2 are keys, the others values; the keys of an example differ, and so do its
//! values. Queries stand on even places behind the pairs, at gaps from their beginning that are drawn without replacement with
//! weights `x^(power - 1)`: most are near for small powers.

use fulgur_kernels::philox::Philox;

/// Largest vocabulary and context: beyond all reason.
const MOST: usize = 1 << 20;

/// Shape of examples.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recall {
    /// Tokens of an example.
    pub context: usize,
    /// Pairs D of key and value in it.
    pub pairs: usize,
    /// Tokens V.
    pub vocabulary: usize,
    /// How near queries are: 1 for anywhere.
    pub power: f64,
}

/// A setting that no examples have.
#[derive(Debug, thiserror::Error)]
#[error("{field} is {found}, expected {expected}")]
pub struct RecallError {
    field: &'static str,
    found: String,
    expected: String,
}

/// One example: tokens, and of each what the next one should be, where that counts.
#[derive(Clone, Debug, PartialEq)]
pub struct RecallExample {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The value, behind the query of its key.
    pub targets: Vec<Option<u32>>,
}

impl Recall {
    /// Whether there are such examples.
    ///
    /// # Errors
    /// There are none; the setting is named.
    pub fn check(&self) -> Result<(), RecallError> {
        let Self {
            context,
            pairs,
            vocabulary,
            power,
        } = *self;
        let wrong = |field, found: String, expected: String| {
            Err(RecallError {
                field,
                found,
                expected,
            })
        };
        for (name, value) in [("context", context), ("vocabulary", vocabulary)] {
            if value == 0 || value > MOST {
                return wrong(name, value.to_string(), format!("1 to {MOST}"));
            }
        }
        if pairs == 0 || pairs > context / 4 {
            let expected = format!("1 to a quarter of context, {}", context / 4);
            return wrong("pairs", pairs.to_string(), expected);
        }
        if vocabulary / 2 <= pairs {
            let expected = format!("more than twice the pairs, {pairs}, and 2");
            return wrong("vocabulary", vocabulary.to_string(), expected);
        }
        if !(power.is_finite() && power > 0.0) {
            return wrong("power", power.to_string(), "a positive number".into());
        }
        Ok(())
    }

    /// Draws an example. The shape has to be one that [`Self::check`] lets pass.
    pub fn example(&self, noise: &mut Philox) -> RecallExample {
        let Self {
            context,
            pairs,
            vocabulary,
            power,
        } = *self;
        let (mut ids, mut targets) = (vec![0; context], vec![None; context]);
        let half = vocabulary / 2;
        let keys = distinct(noise, half - 1, pairs);
        let values = distinct(noise, vocabulary - half, pairs);
        let pair = |at: usize| ((1 + keys[at]) as u32, (half + values[at]) as u32);
        for at in 0..pairs {
            (ids[2 * at], ids[2 * at + 1]) = pair(at);
        }
        // The largest of u^(1 / w) are a draw without replacement by weights w; -log(u) / w is the same order, the smallest first.
        let places = (context - 2 * pairs) / 2;
        let mut drawn: Vec<(f64, usize)> = (0..places)
            .map(|place| {
                let weight = (1.0 + place as f64).powf(power - 1.0);
                let u = 1.0 - f64::from(noise.uniform());
                (-u.max(f64::MIN_POSITIVE).ln() / weight, place)
            })
            .collect();
        drawn.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (at, &(_, place)) in drawn.iter().take(pairs).enumerate() {
            let (key, value) = pair(at);
            let position = 2 * pairs + 2 * place;
            (ids[position], targets[position]) = (key, Some(value));
        }
        RecallExample { ids, targets }
    }
}

/// `count` of `all` numbers, each at most once, in any order.
fn distinct(noise: &mut Philox, all: usize, count: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = Vec::with_capacity(count);
    // Floyd's draw: each step adds a number that is not there yet.
    for most in all - count..all {
        let other = noise.below(most + 1);
        chosen.push(if chosen.contains(&other) { most } else { other });
    }
    let order = noise.permutation(count);
    order.into_iter().map(|at| chosen[at]).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_key_is_asked_for_once_behind_the_pairs() {
        let shape = Recall {
            context: 67,
            pairs: 9,
            vocabulary: 41,
            power: 0.01,
        };
        for seed in 0..50 {
            let example = shape.example(&mut Philox::named(seed, "test"));
            let RecallExample { ids, targets } = &example;
            let pairs: HashMap<u32, u32> = ids[..18].chunks(2).map(|pair| (pair[0], pair[1])).collect();
            assert_eq!(pairs.len(), 9);
            assert!(pairs.keys().all(|key| (1..20).contains(key)));
            let mut values: Vec<_> = pairs.values().collect();
            values.sort_unstable();
            values.dedup();
            assert!(values.len() == 9 && values.iter().all(|value| (20..41).contains(*value)));
            let mut asked = Vec::new();
            for (at, (id, target)) in ids.iter().zip(targets).enumerate() {
                let Some(target) = target else {
                    assert!(at < 18 || *id == 0);
                    continue;
                };
                assert!(at >= 18 && at % 2 == 0);
                assert_eq!(pairs[id], *target);
                asked.push(*id);
            }
            asked.sort_unstable();
            asked.dedup();
            assert_eq!(asked.len(), 9);
            assert_eq!(example, shape.example(&mut Philox::named(seed, "test")));
        }
    }

    /// Small powers put queries near, power 1 anywhere.
    #[test]
    fn gaps_follow_the_power() {
        let mean = |power: f64| {
            let shape = Recall {
                context: 256,
                pairs: 4,
                vocabulary: 1024,
                power,
            };
            let mut noise = Philox::named(1, "test");
            let mut sum = 0.0;
            for _ in 0..200 {
                let example = shape.example(&mut noise);
                let places = (example.targets.iter().enumerate()).filter(|(_, target)| target.is_some());
                sum += places.map(|(at, _)| (at - 8) as f64 / 248.0).sum::<f64>() / 800.0;
            }
            sum
        };
        assert!((mean(1.0) - 0.5).abs() < 0.03, "{}", mean(1.0));
        assert!(mean(0.01) < 0.25, "{}", mean(0.01));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let good = Recall {
            context: 128,
            pairs: 16,
            vocabulary: 1024,
            power: 0.01,
        };
        good.check().unwrap();
        for (shape, words) in [
            (Recall { context: 0, ..good }, "context is 0, expected 1 to"),
            (Recall { pairs: 0, ..good }, "pairs is 0"),
            (
                Recall { pairs: 33, ..good },
                "pairs is 33, expected 1 to a quarter of context, 32",
            ),
            (
                Recall {
                    vocabulary: 33,
                    ..good
                },
                "vocabulary is 33, expected more than twice",
            ),
            (
                Recall {
                    vocabulary: MOST + 1,
                    ..good
                },
                "vocabulary is 1048577",
            ),
            (
                Recall {
                    power: f64::NAN,
                    ..good
                },
                "power is NaN",
            ),
            (Recall { power: -1.0, ..good }, "power is -1"),
        ] {
            let line = shape.check().unwrap_err().to_string();
            assert!(line.contains(words), "{line}");
        }
    }
}
