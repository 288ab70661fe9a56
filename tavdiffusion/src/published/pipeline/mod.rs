//! Clips out of published networks: a folder of diffusers, or one of TAVDiffusion, from a text to frames and samples.
//!
//! Stages run one after the other, and each loads what it needs and frees it: the text encoder, the networks that denoise, the decoder of
//! pictures, the decoder of spectrograms with its vocoder.
//!
//! - `joint`: both streams in one loop, at the same steps; a stream reads what the other is at that step.
//! - `reference`: the published loop. The clip reads fresh noise at each step in place of a sound, and the sound is made alone.
//! - `video-only`, `audio-only`: one stream, whose network alone is loaded.

mod decode;
mod denoise;
mod generator;
mod places;
mod random;
mod request;
mod windows;
mod words;

pub use generator::{Made, PublishedGenerator};
pub use places::{PIPELINE, Piece, Places, is_published};
pub use random::{RandomPart, letters, random_parts, random_weights};
pub use request::{PublishedMode, PublishedRequest, StartPicture};
