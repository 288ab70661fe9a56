//! Clips, sounds and pictures in and out.
//!
//! Sounds are `f32` with full scale 1, pictures and frames are RGB bytes. Files are read with caps on what
//! they may make the reader allocate, and written whole or not at all. Picture and sound of a clip share one
//! clock, whose zero is the start of the earlier of the two.
//!
//! WAV and pictures need nothing but this crate; containers, lossy sounds and MP4 come with the feature
//! `media`.

mod clip;
#[cfg(feature = "media")]
mod convert;
#[cfg(feature = "media")]
mod encode;
mod error;
mod picture;
#[cfg(feature = "media")]
mod read;
mod resample;
mod resize;
mod sinc;
#[cfg(feature = "media")]
mod source;
mod wav;
#[cfg(feature = "media")]
mod write;

pub use clip::{Clip, Info, SILENCE, Sound, SoundInfo, Video, VideoInfo};
pub use error::MediaError;
pub use picture::{
    MAX_PICTURE_PIXELS, Picture, decode_picture, decode_upright, probe_picture, read_picture, read_upright,
    write_png,
};
#[cfg(feature = "media")]
pub use read::{Frame, ReadOptions, Streamed, for_each_frame, probe, read_clip, read_sound};
pub use resample::resample;
pub use resize::Filter;
pub use sinc::resample_windowed;
pub use wav::{WavFormat, read_wav, write_wav};
#[cfg(feature = "media")]
pub use write::{METADATA_KEYS, WriteOptions, write_mp4, write_mp4_frames};
