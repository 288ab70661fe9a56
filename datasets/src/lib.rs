//! Media in and out, data sets and composed audible scenes.
//!
//! [`media`] reads and writes clips, sounds and pictures: MP4 and every other common container through FFmpeg
//! (feature `media`, on by default), WAV through hound, PNG, JPEG and WebP through image. Pictures are RGB
//! bytes, sounds are interleaved `f32`, and both of a clip share one clock that starts at zero.
//!
//! Every file is written through [`atomic`]: a temporary file in the same folder, synchronised, then renamed,
//! so that nothing half-written ever stands under its final name.
//!
//! ```
//! use fulgur_datasets::media::{read_wav, write_wav, Sound, WavFormat};
//!
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("beep.wav");
//! let beep = Sound::new((0..1600).map(|i| (i as f32 * 0.2).sin() * 0.5).collect(), 1, 16_000)?;
//! write_wav(&path, &beep, WavFormat::Float)?;
//! assert_eq!(read_wav(&path)?, beep);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
// Memory maps need one unsafe call: `store::Mapped::open`.
#![deny(unsafe_code)]

pub mod atomic;
pub mod augment;
pub mod draw;
pub mod fetch;
pub mod film;
pub mod labelled;
pub mod long_range;
pub mod media;
pub mod pictures;
pub mod scenes;
#[cfg(feature = "media")]
pub mod sets;
pub mod store;
pub mod text;
pub mod things;
#[cfg(feature = "media")]
pub mod vocabulary;
