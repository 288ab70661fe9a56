//! What can go wrong between ranks. Every message is one line and names ranks by their numbers in the whole job.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why ranks do not come together.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, thiserror::Error)]
pub enum CommError {
    /// Ranks did not come within the time that others wait for them.
    #[error("rank {rank}: {operation}: waited {waited:?} for {}", ranks(missing))]
    Missing {
        /// Who waited.
        rank: usize,
        /// For what.
        operation: String,
        /// Who did not come.
        missing: Vec<usize>,
        /// How long.
        waited: Duration,
    },
    /// A rank has ended.
    #[error("rank {rank}: {operation}: rank {gone} has ended: {reason}")]
    Gone {
        /// Who waited.
        rank: usize,
        /// For what.
        operation: String,
        /// Who has ended.
        gone: usize,
        /// Its own words, or how it was noticed.
        reason: String,
    },
    /// Ranks called something else, or with something else.
    #[error("{operation}: rank {one} called {first}, rank {other} called {second}")]
    Mismatch {
        /// Which call it was, and of which ranks.
        operation: String,
        /// A rank.
        one: usize,
        /// What it called.
        first: String,
        /// Another rank.
        other: usize,
        /// What that called.
        second: String,
    },
    /// A call that makes no sense.
    #[error("rank {rank}: {operation}: {reason}")]
    Refused {
        /// Who called.
        rank: usize,
        /// What.
        operation: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// Ranks cannot meet at all: wrong numbers, a taken port, another version.
    #[error("rank {rank}: {reason}")]
    Launch {
        /// Who tried.
        rank: usize,
        /// What was found and what was expected.
        reason: String,
    },
    /// A tensor operation failed.
    #[error("rank {rank}: {operation}: {reason}")]
    Tensor {
        /// Where.
        rank: usize,
        /// During what.
        operation: String,
        /// The words of the tensor library.
        reason: String,
    },
}

impl CommError {
    /// The failure of a tensor operation on rank `rank`.
    pub(super) fn tensor(rank: usize, operation: &str, error: &candle_core::Error) -> Self {
        Self::Tensor {
            rank,
            operation: operation.to_owned(),
            reason: error.to_string().lines().next().unwrap_or_default().to_owned(),
        }
    }
}

fn ranks(missing: &[usize]) -> String {
    let numbers: Vec<String> = missing.iter().map(ToString::to_string).collect();
    let noun = if missing.len() == 1 { "rank" } else { "ranks" };
    format!("{noun} {}", numbers.join(", "))
}

impl From<CommError> for candle_core::Error {
    fn from(error: CommError) -> Self {
        Self::Msg(error.to_string())
    }
}
