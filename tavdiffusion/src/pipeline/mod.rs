//! From a prompt to frames and samples: a model folder, a request, and the loop between them.

mod folder;
mod generate;
pub mod pack;
mod request;

pub use folder::{CLASS_NAME, FILE_NAME, ModelIndex, Part};
pub use generate::{Clip, Generator, Progress, Stage};
pub use request::{Mode, Request};
