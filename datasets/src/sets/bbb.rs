//! `bbb`: all of Big Buck Bunny, an audible film of 596 s, as small frames and 16 kHz sound.
//!
//! Frames are the square in the middle of the picture, 96 by 96, 12 a second, JPEG. Prepared tensors: `jpeg` u8, the
//! files of all frames one after another; `offsets` i64 [frames + 1]; `cuts` i64, frames that begin a scene, the first
//! being 0; `sound` i16 mono at 16 kHz. Seconds 0 to 425 are for training, 430 to 488 are held out; credits follow.
//!
//! Licence CC-BY 3.0: (c) Blender Foundation, peach.blender.org.

use std::io::Write;
use std::ops::ControlFlow;

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder};

use super::{Job, Set};
use crate::fetch::packages::MOVIEPY;
use crate::fetch::{FetchError, unpack};
use crate::film::FILE;
pub use crate::film::{FPS, Film, HELD_OUT_S, SIDE, SOUND_RATE, TRAINING_S};
use crate::media::{ReadOptions, for_each_frame, read_sound};
use crate::store::{Plain, write_tensors};

pub(super) const SET: Set = Set {
    name: "bbb",
    description: "Big Buck Bunny: 596 s of audible film, 96x96 at 12 frames/s, 16 kHz mono",
    licence: "CC-BY 3.0, (c) Blender Foundation, peach.blender.org",
    packages: &[&MOVIEPY],
    prepare,
};

pub(super) const ARCHIVE: &str =
    "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip";
pub(super) const FILM: &str = "bbb.mp4";
const FILM_SHA256: &str = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0";
/// Frames of the film at 12 a second, within one.
const FRAMES: usize = 7158;
const QUALITY: u8 = 90;
/// Size of the whole picture when its height is [`SIDE`]: 1280 by 720 scaled.
const SCALED_WIDTH: usize = 171;
/// A cut: mean absolute difference of two frames, in 0..255, above this and above twice that of both neighbours.
const CUT: f32 = 24.0;

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    let film = film(job)?;
    let path = film.path();
    job.begin(FRAMES);
    let mut frames = Frames::default();
    let mut failure = None;
    let options = ReadOptions {
        fps: Some(FPS as f64),
        size: Some((SCALED_WIDTH, SIDE)),
        ..ReadOptions::default()
    };
    for_each_frame(path, &options, |frame| {
        let step = frames.push(frame.rgb).and_then(|()| job.advance(frame.index));
        match step {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failure = Some(e);
                ControlFlow::Break(())
            }
        }
    })?;
    if let Some(e) = failure {
        return Err(e);
    }
    let sound = read_sound(path, Some(SOUND_RATE))?.mono();
    let count = frames.offsets.len() - 1;
    if count.abs_diff(FRAMES) > 1 {
        return Err(FetchError::format(
            FILM,
            "frames",
            count.to_string(),
            FRAMES.to_string(),
        ));
    }
    let tensors = vec![
        ("cuts".to_owned(), Plain::i64(&cuts(&frames.changes))),
        ("jpeg".to_owned(), Plain::u8(&[frames.jpeg.len()], frames.jpeg)),
        ("offsets".to_owned(), Plain::i64(&frames.offsets)),
        ("sound".to_owned(), Plain::samples(&sound.samples)),
    ];
    write_tensors(&job.out.join(FILE), tensors, None)?;
    Ok(count)
}

/// The film in a temporary file.
pub(super) fn film(job: &Job<'_>) -> Result<tempfile::NamedTempFile, FetchError> {
    let outer = job.read(0, &|path| path == ARCHIVE)?;
    let cancel = &job.options.cancel;
    let inner = unpack::read_zip_bytes(
        job.entry(&outer, ARCHIVE)?,
        ARCHIVE,
        &|path| path.ends_with(FILM),
        cancel,
    )?;
    let bytes = inner.into_values().next();
    let bytes = bytes.ok_or_else(|| FetchError::format(ARCHIVE, FILM, "no such file", "the film"))?;
    // Beside the set, not in the system's folder for temporary files: that one may be small or in memory.
    let folder = job.out.parent().unwrap_or(job.out);
    let mut file = tempfile::Builder::new()
        .suffix(".mp4")
        .tempfile_in(folder)
        .map_err(FetchError::io(folder, "write to"))?;
    file.write_all(&bytes)
        .map_err(FetchError::io(file.path(), "write"))?;
    let found = crate::fetch::sha256_of(file.path(), cancel)?;
    if found != FILM_SHA256 {
        return Err(FetchError::Hash {
            path: FILM.into(),
            found,
            expected: FILM_SHA256.to_owned(),
        });
    }
    Ok(file)
}

/// Frames on their way into the file.
struct Frames {
    jpeg: Vec<u8>,
    offsets: Vec<i64>,
    previous: Vec<u8>,
    /// Mean absolute difference to the frame before, from the second frame on.
    changes: Vec<f32>,
}

impl Default for Frames {
    fn default() -> Self {
        Self {
            jpeg: Vec::new(),
            offsets: vec![0],
            previous: Vec::new(),
            changes: Vec::new(),
        }
    }
}

impl Frames {
    /// Adds the middle of a frame of [`SCALED_WIDTH`] by [`SIDE`].
    fn push(&mut self, rgb: &[u8]) -> Result<(), FetchError> {
        let left = 3 * ((SCALED_WIDTH - SIDE) / 2);
        let rows = rgb.chunks_exact(3 * SCALED_WIDTH);
        let square: Vec<u8> = rows
            .flat_map(|row| &row[left..left + 3 * SIDE])
            .copied()
            .collect();
        JpegEncoder::new_with_quality(&mut self.jpeg, QUALITY)
            .write_image(&square, SIDE as u32, SIDE as u32, ExtendedColorType::Rgb8)
            .map_err(|e| FetchError::format(FILM, "frame", e.to_string(), "pixels that JPEG can hold"))?;
        self.offsets.push(self.jpeg.len() as i64);
        if !self.previous.is_empty() {
            let pairs = self.previous.iter().zip(&square);
            let sum: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
            self.changes.push(sum as f32 / square.len() as f32);
        }
        self.previous = square;
        Ok(())
    }
}

/// Frames that begin a scene; `changes[i]` lies between frames i and i + 1.
fn cuts(changes: &[f32]) -> Vec<i64> {
    let at = |index: Option<usize>| index.and_then(|i| changes.get(i)).copied().unwrap_or(0.0);
    let is_cut = |i: &usize| {
        let neighbours = at(i.checked_sub(1)).max(at(Some(i + 1)));
        changes[*i] > CUT && changes[*i] > 2.0 * neighbours
    };
    let begins = (0..changes.len()).filter(is_cut).map(|i| i as i64 + 1);
    std::iter::once(0).chain(begins).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::decode_picture;

    #[test]
    fn a_cut_is_one_large_change_among_small_ones() {
        assert_eq!(cuts(&[1.0, 2.0, 60.0, 3.0, 40.0, 45.0, 42.0, 1.0]), [0, 3]);
        assert_eq!(cuts(&[]), [0]);
    }

    #[test]
    fn frames_are_cropped_in_the_middle() {
        let mut frames = Frames::default();
        let row: Vec<u8> = (0..SCALED_WIDTH).flat_map(|x| [(x / 2 * 2) as u8; 3]).collect();
        frames.push(&row.repeat(SIDE)).unwrap();
        let picture = decode_picture(&frames.jpeg, "frame".as_ref()).unwrap();
        assert_eq!((picture.width, picture.height), (SIDE, SIDE));
        let left = (SCALED_WIDTH - SIDE) / 2;
        assert!(
            picture.pixels[0].abs_diff(left as u8) <= 4,
            "{}",
            picture.pixels[0]
        );
    }
}
