//! Token mixers: one file a mixer.

mod lightnet;

pub use lightnet::{LightNet, LightNetConfig, MixerContext};
