//! The prepared film `bbb`, read through a memory map; it needs no codec library.

use std::ops::Range;
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::media::{MediaError, Picture, decode_picture};
use crate::store::{Mapped, StoreError};

/// Width and height of a frame.
pub const SIDE: usize = 96;
/// Frames a second.
pub const FPS: usize = 12;
/// Samples a second.
pub const SOUND_RATE: u32 = 16_000;
/// Seconds of the film that are for training.
pub const TRAINING_S: Range<usize> = 0..425;
/// Seconds of the film that are held out.
pub const HELD_OUT_S: Range<usize> = 430..488;

/// Name of the prepared file.
pub(crate) const FILE: &str = "bbb.safetensors";

/// The prepared film.
#[derive(Debug)]
pub struct Film {
    file: Mapped,
    offsets: Vec<i64>,
    cuts: Vec<usize>,
}

impl Film {
    /// Opens the prepared set in the folder `dir`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let file = Mapped::open(&dir.join(FILE))?;
        let offsets = file.indices("offsets")?;
        let cuts = file.indices("cuts")?.into_iter();
        let cuts = cuts.filter_map(|cut| usize::try_from(cut).ok()).collect();
        file.expect("jpeg", Dtype::U8, &[0])?;
        file.expect("sound", Dtype::I16, &[0])?;
        Ok(Self { file, offsets, cuts })
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// True when there is no frame.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The frames that begin a scene, in order, the first being 0.
    pub fn cuts(&self) -> &[usize] {
        &self.cuts
    }

    /// True when all of `frames` belong to one scene.
    pub fn in_one_scene(&self, frames: Range<usize>) -> bool {
        !self
            .cuts
            .iter()
            .any(|cut| *cut > frames.start && *cut < frames.end)
    }

    /// Frame `index`, RGB, [`SIDE`] by [`SIDE`].
    ///
    /// # Errors
    /// There is no such frame, or it cannot be decoded.
    pub fn frame(&self, index: usize) -> Result<Picture, MediaError> {
        let label = format!("{}: frame {index}", self.file.path().display());
        decode_picture(self.jpeg(index).unwrap_or_default(), label.as_ref())
    }

    fn jpeg(&self, index: usize) -> Option<&[u8]> {
        let (bytes, _) = self.file.expect("jpeg", Dtype::U8, &[0]).ok()?;
        let from = usize::try_from(*self.offsets.get(index)?).ok()?;
        let to = usize::try_from(*self.offsets.get(index + 1)?).ok()?;
        bytes.get(from..to)
    }

    /// The samples in `range` as f32 in -1..1; beyond the end of the film they are 0.
    pub fn sound(&self, range: Range<usize>) -> Vec<f32> {
        let bytes = self
            .file
            .expect("sound", Dtype::I16, &[0])
            .map_or(&[][..], |(bytes, _)| bytes);
        let samples = bytes.as_chunks::<2>().0;
        let sample = |at: usize| {
            samples
                .get(at)
                .map_or(0.0, |pair| f32::from(i16::from_le_bytes(*pair)) / 32767.0)
        };
        range.map(sample).collect()
    }
}
