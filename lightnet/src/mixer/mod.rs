//! Token mixers: one file a mixer.

pub mod causal;
mod lightnet;

pub use lightnet::{LightNet, LightNetConfig, MixerContext};
