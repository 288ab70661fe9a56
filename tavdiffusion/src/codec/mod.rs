//! Codecs between media and latents: video frames, still pictures, log-mel spectrograms, and the vocoder that makes sound of a
//! spectrogram.
//!
//! All of them are patches, linear maps and token-shift blocks: matrix products, no convolutions. A token shift takes
//! half of the channels from the neighbours along each axis, so that a stack of blocks sees a growing neighbourhood and
//! works for any length and size.

mod latent;
mod mel;
mod picture;
mod stack;
mod video;
mod vocoder;

pub use latent::LatentNorm;
pub use mel::{MelCodec, MelCodecConfig};
pub use picture::PictureCodec;
pub use stack::ShiftStack;
pub use video::{VideoCodec, VideoCodecConfig};
pub use vocoder::{Vocoder, VocoderConfig};
