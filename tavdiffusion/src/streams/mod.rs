//! The builtin generator's denoiser: two LightNet token streams, picture and sound, that read a text and each other.

mod condition;
mod embed;
mod fusion;
mod two_stream;

pub use two_stream::{StreamConfig, TwoStream, TwoStreamConfig};
