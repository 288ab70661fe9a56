//! The published networks of text to audible video, as diffusers and transformers run them: the UNet of Stable Diffusion and of Tango,
//! motion modules, the KL autoencoders of pictures and of spectrograms, HiFi-GAN, and TAVDiffusion, which joins them.
//!
//! Checkpoints load by the names that they were published with; those of the original releases are translated (`names`). Inside, pictures
//! are channels-last, `[B F, H, W, C]`, so that every layer is a matrix product over rows of channels: convolutions, norms and attention
//! lie in one file each under `layers/`. At the borders they are `[B, C, H, W]`, as everywhere in the field.
//!
//! Shapes: B batch, F frames, H and W sides, C channels, N tokens, L words, T steps of time.

mod fusion;
mod hifigan;
mod joint;
mod layers;
mod limits;
mod names;
mod pipeline;
mod unet;
mod vae;

pub use fusion::{Aligned, Alignment, Fusion};
pub use hifigan::{HifiGan, HifiGanConfig};
pub use joint::{Direction, Predicted, Reads, TavConfig, TavPart, TavStart, TavUnet, TrainedTav};
pub use pipeline::{
    ClipSizes, Encoders, Heard, Made, PIPELINE, Piece, Places, PublishedGenerator, PublishedMode,
    PublishedRequest, RandomPart, StartPicture, Words, is_published, letters, random_parts, random_weights,
};
pub use unet::{MotionAdapterConfig, MotionUnetConfig, Unet, UnetConfig, UnetNames, UnetSizes};
pub use vae::{AutoencoderKl, AutoencoderKlConfig, Half, Posterior, Tiles};
