//! Tasks with long sequences, after the Long Range Arena (arXiv 2011.04006): those whose data can be generated.
//!
//! [`listops`] follows the published generator; [`pathfinder`] draws pictures of the published kind with a generator of its own. Both are
//! pure functions of a seed and an index, so that examples need no files, and examples of different indices are held out from each other.

pub mod listops;
pub mod pathfinder;

pub use listops::{ListOps, ListOpsError};
