//! Published encoders that more than one crate uses, with the tensor names of their checkpoints.

pub mod bert;
pub mod blip;
pub mod clip;
pub mod clip_tokenizer;
mod gelu;
pub mod imagebind;
mod lazy;
pub mod transformer;

pub use gelu::Gelu;
