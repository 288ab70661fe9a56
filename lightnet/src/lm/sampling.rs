//! How the next token is chosen from logits.
//!
//! ```text
//! 1  repetition penalty r   l_i = l_i / r where l_i > 0, else l_i r     for tokens among the last `penalty_window`
//! 2  temperature t          l_i = l_i / t                               0: the largest, of equal ones the first
//! 3  top-k                  the k largest stay                          0: all
//! 4  top-p                  the fewest likely ones that together reach p
//! 5  min-p                  those at least m times as likely as the likeliest
//! 6  a draw u               the first i, by number, where the sum of what stayed exceeds u times all of it
//! ```
//!
//! Probabilities are f64 softmaxes of what stayed in the step before. Of equally likely tokens those of lower number stay. The draw
//! is a function of the seed, of the number of the sequence in its batch and of the position of the token in its text, so that a
//! text does not depend on how often its making was interrupted, nor on what else is made beside it.

use fulgur_kernels::philox::{block, stream_of};

/// Settings of the choice; see the module for their order.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Over which logits are divided; 0 chooses the likeliest token.
    pub temperature: f64,
    /// How many of the likeliest tokens stay; 0 for all.
    pub top_k: usize,
    /// How much probability stays, above 0 and at most 1.
    pub top_p: f64,
    /// How likely a token must be beside the likeliest, from 0 to 1.
    pub min_p: f64,
    /// What logits of recent tokens are divided by; 1 for nothing.
    pub repetition_penalty: f64,
    /// How many tokens are recent, at most [`MOST_RECENT`].
    pub penalty_window: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// As many of the last tokens are kept.
pub const MOST_RECENT: usize = 1024;

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            penalty_window: 64,
            seed: 0,
        }
    }
}

/// Why no token can be chosen.
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// A setting that means nothing.
    #[error("{field} is {found}, expected {expected}")]
    Setting {
        /// The setting.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// The model gave no numbers.
    #[error("the logit of token {id} after {position} tokens is {value}, expected a finite number")]
    Logit {
        /// The token.
        id: usize,
        /// Tokens before it.
        position: usize,
        /// The logit.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("found no logits to choose from")]
    Nothing,
}

impl Sampling {
    /// Whether all settings mean something.
    ///
    /// # Errors
    /// One does not; it is named.
    pub fn check(&self) -> Result<(), SamplingError> {
        let finite = |value: f64| value.is_finite();
        let settings = [
            (
                "temperature",
                self.temperature,
                finite(self.temperature) && self.temperature >= 0.0,
                "0 or more",
            ),
            (
                "top-p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            ("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1"),
            (
                "repetition-penalty",
                self.repetition_penalty,
                finite(self.repetition_penalty) && self.repetition_penalty > 0.0,
                "above 0",
            ),
        ];
        for (field, value, good, expected) in settings {
            if !good {
                return Err(SamplingError::Setting {
                    field,
                    found: value.to_string(),
                    expected: expected.to_owned(),
                });
            }
        }
        if self.penalty_window > MOST_RECENT {
            return Err(SamplingError::Setting {
                field: "penalty-window",
                found: self.penalty_window.to_string(),
                expected: format!("at most {MOST_RECENT}"),
            });
        }
        Ok(())
    }

    /// Whether the choice is the likeliest token, whatever came before.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// The token after `recent`, in a text that has `position` tokens before it, of the sequence number `row`.
    ///
    /// # Errors
    /// Logits that are no finite numbers, or none at all.
    pub fn choose(
        &self,
        logits: &[f32],
        recent: &[u32],
        row: u32,
        position: usize,
    ) -> Result<u32, SamplingError> {
        if let Some((id, &value)) = logits.iter().enumerate().find(|(_, logit)| !logit.is_finite()) {
            return Err(SamplingError::Logit { id, position, value });
        }
        let mut logits: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        self.penalise(&mut logits, recent);
        if self.temperature == 0.0 {
            let first = |best: Option<usize>, id: usize| match best {
                Some(best) if logits[best] >= logits[id] => Some(best),
                _ => Some(id),
            };
            let best = (0..logits.len())
                .fold(None, first)
                .ok_or(SamplingError::Nothing)?;
            return Ok(best as u32);
        }
        let kept = self.kept(&logits);
        let all: f64 = kept.iter().map(|(_, weight)| weight).sum();
        let target = self.draw(row, position) * all;
        let mut sum = 0.0;
        for &(id, weight) in &kept {
            sum += weight;
            if sum > target {
                return Ok(id);
            }
        }
        // Rounding may leave the sum a hair below all of it.
        kept.last().map(|&(id, _)| id).ok_or(SamplingError::Nothing)
    }

    fn penalise(&self, logits: &mut [f64], recent: &[u32]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let mut seen = recent[recent.len().saturating_sub(self.penalty_window)..].to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = match *logit > 0.0 {
                    true => *logit / self.repetition_penalty,
                    false => *logit * self.repetition_penalty,
                };
            }
        }
    }

    /// Tokens that may be drawn with their weights beside that of the likeliest, by number.
    fn kept(&self, logits: &[f64]) -> Vec<(u32, f64)> {
        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Differences first: a tiny temperature must not make infinities whose difference is no number.
        let weight = |(id, &logit): (usize, &f64)| (id as u32, ((logit - most) / self.temperature).exp());
        let mut kept: Vec<(u32, f64)> = logits.iter().enumerate().map(weight).collect();
        let likelier = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if self.top_k > 0 && self.top_k < kept.len() {
            kept.select_nth_unstable_by(self.top_k, likelier);
            kept.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            kept.sort_unstable_by(likelier);
            let enough = self.top_p * kept.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            let before = |(_, weight): &&(u32, f64)| {
                let wanted = sum < enough;
                sum += weight;
                wanted
            };
            let count = kept.iter().take_while(before).count();
            kept.truncate(count.max(1));
        }
        // The likeliest has weight 1.
        kept.retain(|&(_, weight)| weight >= self.min_p);
        kept.sort_unstable_by_key(|&(id, _)| id);
        kept
    }

    /// Uniform in [0, 1), of 53 random bits.
    fn draw(&self, row: u32, position: usize) -> f64 {
        let position = position as u64;
        let counter = [
            position as u32,
            (position >> 32) as u32,
            row,
            stream_of("lm/sampling") as u32,
        ];
        let words = block(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        let bits = u64::from(words[0]) << 21 | u64::from(words[1]) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_kernels::philox::Philox;

    /// The probabilities, by the words of the module: sets of tokens, and softmaxes of them made anew at each step.
    fn literal(sampling: &Sampling, logits: &[f32], recent: &[u32]) -> Vec<f64> {
        let window = &recent[recent.len() - recent.len().min(sampling.penalty_window)..];
        let logit = |id: usize| {
            let logit = f64::from(logits[id]);
            let repeated = window.contains(&(id as u32));
            let logit = match (repeated, logit > 0.0) {
                (false, _) => logit,
                (true, true) => logit / sampling.repetition_penalty,
                (true, false) => logit * sampling.repetition_penalty,
            };
            logit / sampling.temperature
        };
        let mut kept: Vec<usize> = (0..logits.len()).collect();
        kept.sort_by(|&a, &b| logit(b).partial_cmp(&logit(a)).unwrap().then(a.cmp(&b)));
        let softmax = |kept: &[usize]| -> Vec<f64> {
            let all: f64 = kept.iter().map(|&id| logit(id).exp()).sum();
            kept.iter().map(|&id| logit(id).exp() / all).collect()
        };
        if sampling.top_k > 0 {
            kept.truncate(sampling.top_k);
        }
        if sampling.top_p < 1.0 {
            let shares = softmax(&kept);
            let enough = (1..=kept.len()).find(|&n| shares[..n].iter().sum::<f64>() >= sampling.top_p);
            kept.truncate(enough.unwrap_or(kept.len()));
        }
        let shares = softmax(&kept);
        let count = shares
            .iter()
            .filter(|&&share| share >= sampling.min_p * shares[0])
            .count();
        kept.truncate(count);
        let mut all = vec![0.0; logits.len()];
        for (&id, share) in kept.iter().zip(softmax(&kept)) {
            all[id] = share;
        }
        all
    }

    #[test]
    fn kept_tokens_and_their_shares_are_those_of_the_words() {
        let mut noise = Philox::new(5, 0);
        let logits: Vec<f32> = noise.normals(40).iter().map(|x| 2.0 * x).collect();
        let recent = [3, 9, 9, 17, 30, 2];
        for case in 0..64 {
            let pick = |bit: usize| case >> bit & 1 == 1;
            let sampling = Sampling {
                temperature: if pick(0) { 0.6 } else { 1.7 },
                top_k: if pick(1) { 11 } else { 0 },
                top_p: if pick(2) { 0.8 } else { 1.0 },
                min_p: if pick(3) { 0.07 } else { 0.0 },
                repetition_penalty: if pick(4) { 1.9 } else { 1.0 },
                penalty_window: if pick(5) { 3 } else { 64 },
                seed: 7,
            };
            let expected = literal(&sampling, &logits, &recent);
            let mut penalised: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
            sampling.penalise(&mut penalised, &recent);
            let kept = sampling.kept(&penalised);
            let all: f64 = kept.iter().map(|(_, weight)| weight).sum();
            let mut found = vec![0.0; logits.len()];
            kept.iter()
                .for_each(|&(id, weight)| found[id as usize] = weight / all);
            for (id, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    (found - expected).abs() < 1e-12,
                    "{sampling:?} {id}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn draws_follow_the_shares() {
        let logits = [0.3f32, -1.0, 1.2, 0.0, 0.9];
        let sampling = Sampling {
            top_k: 4,
            seed: 3,
            ..Sampling::default()
        };
        let expected = literal(&sampling, &logits, &[]);
        let mut counts = [0usize; 5];
        const DRAWS: usize = 20_000;
        for position in 0..DRAWS {
            let id = sampling
                .choose(&logits, &[], (position % 3) as u32, position)
                .unwrap();
            counts[id as usize] += 1;
        }
        for (count, share) in counts.iter().zip(expected) {
            let deviation = (share * (1.0 - share) / DRAWS as f64).sqrt();
            assert!(
                (*count as f64 / DRAWS as f64 - share).abs() <= 4.0 * deviation,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn extremes_choose_the_first_of_the_likeliest() {
        let logits = [0.5f32, 2.0, 2.0, -3.0];
        let greedy = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            let chosen: Vec<u32> = (0..50)
                .map(|at| sampling.choose(&logits, &[], 0, at).unwrap())
                .collect();
            chosen
        };
        assert_eq!(greedy(|s| s.temperature = 0.0), [1; 50]);
        assert_eq!(greedy(|s| s.top_k = 1), [1; 50]);
        assert_eq!(greedy(|s| s.top_p = 1e-9), [1; 50]);
        for chosen in [greedy(|s| s.temperature = 1e-300), greedy(|s| s.min_p = 1.0)] {
            assert!(
                chosen.contains(&1) && chosen.contains(&2) && chosen.iter().all(|&id| id == 1 || id == 2)
            );
        }
        let penalised = Sampling {
            temperature: 0.0,
            repetition_penalty: 10.0,
            ..Sampling::default()
        };
        assert_eq!(penalised.choose(&logits, &[1, 2, 9], 0, 3).unwrap(), 0);
    }

    #[test]
    fn what_means_nothing_is_refused() {
        let refused = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            sampling.check().unwrap_err().to_string()
        };
        assert_eq!(
            refused(|s| s.temperature = f64::NAN),
            "temperature is NaN, expected 0 or more"
        );
        assert!(refused(|s| s.temperature = -0.5).contains("temperature is -0.5"));
        assert!(refused(|s| s.top_p = 0.0).contains("above 0 and at most 1"));
        assert!(refused(|s| s.min_p = 1.5).contains("min-p"));
        assert!(refused(|s| s.repetition_penalty = f64::INFINITY).contains("repetition-penalty"));
        assert!(refused(|s| s.penalty_window = 1 << 20).contains("at most 1024"));
        let none = Sampling::default();
        let line = none.choose(&[1.0, f32::NAN], &[], 0, 4).unwrap_err().to_string();
        assert_eq!(
            line,
            "the logit of token 1 after 4 tokens is NaN, expected a finite number"
        );
        assert!(none.choose(&[], &[], 0, 0).is_err());
    }
}
