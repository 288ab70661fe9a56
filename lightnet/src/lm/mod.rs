//! Causal language models: one skeleton, several token mixers.
//!
//! ```text
//! x = embedding[ids]
//! x = x + mixer(norm(x))        for each layer
//! x = x + glu(norm(x))
//! logits = norm(x) W^T
//! ```
//!
//! Tensors have the names of Hugging Face's LLaMA, whose checkpoints load as they are, or of flash-linear-attention, whose
//! functions differ in details (scale of queries, gate of LightNet, eps of the output norm). The residual stream is f32;
//! branches compute in the type that a [`LanguageModel`] is asked for, `BF16` on a GPU.

mod config;
mod kept;
mod layer;
mod model;
#[cfg(test)]
mod tests;

pub use config::{Architecture, Config, RopeParameters};
pub use model::LanguageModel;
