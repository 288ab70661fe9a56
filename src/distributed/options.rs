//! The table `[distributed]` of a recipe.

use serde::{Deserialize, Serialize};

use super::lasp::Method;
use super::outer::OuterOptions;

/// What each rank keeps of its parameters alone, instead of all ranks of all (ZeRO, arXiv 1910.02054).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Shard {
    /// Nothing: all ranks keep all.
    #[default]
    None,
    /// The moments of the optimiser (stage 1).
    Moments,
    /// Moments, and gradients once they are summed (stage 2).
    Gradients,
    /// Moments, gradients, and the matrices of the model while they are not needed (stage 3).
    Parameters,
}

/// How ranks share the work.
///
/// Ranks `g W m .. (g + 1) W m` share sequences, where W is `sequence` and m is `tensor`; the groups g share the rows of a batch.
/// Of them, ranks `m i .. m (i + 1)` have the layers of the model together. A step of the
/// recipe has the same batch for any number of ranks.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distributed {
    /// Ranks; 0 takes as many as there are processes, and one where there are none.
    pub world: usize,
    /// Ranks that share a sequence.
    pub sequence: usize,
    /// How states pass between them.
    pub method: Method,
    /// Ranks that have the layers of the model together.
    #[serde(skip_serializing_if = "is_one")]
    pub tensor: usize,
    /// What ranks keep in shards.
    pub shard: Shard,
    /// Seconds that a rank waits for others.
    pub timeout_s: f64,
    /// Local steps between outer updates instead of gradients that are summed at each step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outer: Option<OuterOptions>,
}

impl Default for Distributed {
    fn default() -> Self {
        Self {
            world: 0,
            sequence: 1,
            method: Method::default(),
            tensor: 1,
            shard: Shard::default(),
            timeout_s: 600.0,
            outer: None,
        }
    }
}

impl Distributed {
    /// The first field that makes no sense: its name, what was found, what was expected.
    pub fn wrong(&self) -> Option<(&'static str, String, String)> {
        let wrong = |field, found: String, expected: &str| Some((field, found, expected.to_owned()));
        if self.sequence == 0 {
            return wrong("distributed.sequence", "0".to_owned(), "1 or more");
        }
        if self.tensor == 0 {
            return wrong("distributed.tensor", "0".to_owned(), "1 or more");
        }
        if self.world > 0 && !self.world.is_multiple_of(self.sequence) {
            let expected = format!("a number that divides the world of {}", self.world);
            return wrong("distributed.sequence", self.sequence.to_string(), &expected);
        }
        if self.tensor > 1 && (self.outer.is_some() || self.shard != Shard::None) {
            let expected = "1 with shards or with workers that take steps of their own";
            return wrong("distributed.tensor", self.tensor.to_string(), expected);
        }
        if !(self.timeout_s > 0.0 && self.timeout_s <= MOST_SECONDS) {
            let expected = format!("above 0, at most {MOST_SECONDS}");
            return wrong("distributed.timeout_s", self.timeout_s.to_string(), &expected);
        }
        if self.outer.is_some() && self.shard != Shard::None {
            let expected = "none, as workers that take steps of their own keep all moments";
            return wrong(
                "distributed.shard",
                format!("{:?}", self.shard).to_lowercase(),
                expected,
            );
        }
        self.outer.as_ref().and_then(OuterOptions::wrong)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde asks")]
fn is_one(count: &usize) -> bool {
    *count == 1
}

/// Longer waits are none.
const MOST_SECONDS: f64 = 1e6;
