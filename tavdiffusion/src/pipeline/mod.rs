//! From a prompt to frames and samples: a model folder, a request, and the loop between them.

mod folder;
mod generate;
mod request;

pub use folder::{ModelIndex, Part};
pub use generate::{Clip, Generator, Progress, Stage};
pub use request::{Mode, Request};
