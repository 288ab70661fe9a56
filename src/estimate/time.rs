//! How long a step takes on a GPU: what its products, its mixers and its traffic take one after the other.
//!
//! ```text
//! seconds = (products / 0.65 + mixers at their own share) / peak + 6.6 kept / (0.88 bandwidth)
//! ```
//!
//! `kept` is what the step keeps for its way back, which stands for all that goes through memory between the products: each
//! byte of it is written, read again, and met by operators that keep nothing. The three numbers are from whole steps on an
//! H100 (docs/benchmarks-training.md); on other GPUs they are carried over.

use crate::train::peak::Gpu;

/// Share of a GPU's peak that products of the sizes of a model reach.
const PRODUCTS: f64 = 0.65;
/// Share of its bandwidth that a copy reaches.
const COPY: f64 = 0.88;
/// Bytes that move for each that is kept.
const MOVED: f64 = 6.6;

/// What a step does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Work {
    /// Operations of products with weights.
    pub(crate) products: f64,
    /// Operations that the mixers would take the time of at the GPU's peak.
    pub(crate) mixers: f64,
    /// Bytes that its layers keep for the way back.
    pub(crate) kept: f64,
    /// Whether layers run forward again on the way back.
    pub(crate) again: bool,
}

impl Work {
    /// Seconds on `gpu`.
    pub(crate) fn seconds(&self, gpu: Gpu) -> f64 {
        // A third of the work is forward.
        let passes = if self.again { 4.0 / 3.0 } else { 1.0 };
        let computing = (self.products / PRODUCTS + self.mixers) / gpu.peak;
        passes * (computing + MOVED * self.kept / (COPY * gpu.bandwidth))
    }
}
