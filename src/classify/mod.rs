//! Classifiers of pictures at work: what they say about a picture, why, and how often they are right.

pub mod figures;
mod model;
pub mod prepare;
pub mod saliency;
pub mod speed;

pub(crate) use model::ranked;
pub use model::{Examined, Guess, Model, ModelError};
