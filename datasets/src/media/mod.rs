//! Clips, sounds and pictures in and out.
//!
//! Sounds are `f32` with full scale 1, pictures and frames are RGB bytes. Files are read with caps on what they may make
//! the reader allocate, and written whole or not at all.

mod clip;
mod error;
mod picture;
mod resample;
mod wav;

pub use clip::{Clip, Info, SILENCE, Sound, SoundInfo, Video, VideoInfo};
pub use error::MediaError;
pub use picture::{MAX_PICTURE_PIXELS, Picture, decode_picture, read_picture, write_png};
pub use resample::resample;
pub use wav::{WavFormat, read_wav, write_wav};
