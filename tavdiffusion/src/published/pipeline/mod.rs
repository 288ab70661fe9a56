//! Clips out of published networks: a folder of diffusers, or one of TAVDiffusion, from a text to frames and samples.
//!
//! Codecs and text encoder may also be those of the builtin generator: networks of the published kind that were trained on their latents.
//!
//! Stages run one after the other, and each loads what it needs and frees it: the text encoder, the networks that denoise, the decoder of
//! pictures, the decoder of spectrograms with its vocoder.
//!
//! - `joint`: both streams in one loop, at the same steps; a stream reads what the other is at that step.
//! - `reference`: the published loop. The clip reads fresh noise at each step in place of a sound, and the sound is made alone.
//! - `video-only`, `audio-only`: one stream, whose network alone is loaded.

mod codecs;
mod decode;
mod denoise;
mod generator;
mod places;
mod random;
mod request;
mod windows;
mod words;

pub use codecs::{ClipSizes, Encoders, Heard};
pub use generator::{Made, PublishedGenerator};
pub use places::{PIPELINE, Piece, Places, is_published};
pub(super) use random::published_config;
pub use random::{RandomPart, letters, random_parts, random_weights};
pub use request::{PublishedMode, PublishedRequest, StartPicture};
pub use words::Words;
