//! Text to audible video: codecs, text encoder, two-stream latent diffusion on LightNet blocks, samplers.
//!
//! Shapes: B batch, F frames, T audio frames, C latent channels, d model width. Pictures are in [-1, 1], sound in
//! [-1, 1] at 16 kHz.
#![forbid(unsafe_code)]

pub mod codec;
pub mod contrast;
pub mod denoiser;
pub mod diffusion;
pub mod error;
mod folder;
pub mod pipeline;
pub mod published;
pub mod streams;
#[cfg(test)]
mod testing;
pub mod text;
