//! The sizes that problems of all recurrences have.

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Batch.
    pub b: usize,
    /// Tokens.
    pub n: usize,
    /// Heads.
    pub h: usize,
    /// Key width of a head.
    pub d: usize,
    /// Value width of a head.
    pub e: usize,
}
