//! The pictures of a part of a set at one size, in memory: what generators of pictures and their codecs learn from.

use fulgur_datasets::augment::View;
use fulgur_datasets::labelled::Labelled;
use fulgur_datasets::media::Picture;
use fulgur_kernels::philox::Philox;
use rayon::prelude::*;

use crate::train::TaskResult;

/// Largest batch, longest side and most bytes of all pictures: beyond all reason.
pub(super) const MOST: usize = 1 << 20;
pub(super) const LONGEST_SIDE: usize = 1 << 12;
pub(super) const MOST_BYTES: usize = 8 << 30;

/// Size and channels of all pictures of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// Height and width.
    pub size: [usize; 2],
    /// 1 for grey, 3 for colours.
    pub channels: usize,
}

impl Frame {
    /// Values of a picture.
    pub(super) fn values(self) -> usize {
        let [height, width] = self.size;
        height * width * self.channels
    }

    /// The middles of these pictures of `set`, one behind the other as bytes.
    ///
    /// # Errors
    /// More than [`MOST_BYTES`] of them, or a picture that cannot be read.
    pub(super) fn read(self, set: &Labelled, chosen: &[usize]) -> TaskResult<Vec<u8>> {
        let (size, [height, width]) = (self.values(), self.size);
        if chosen.len().saturating_mul(size) > MOST_BYTES {
            let count = chosen.len();
            return Err(format!(
                "set: found {count} pictures of {width}x{height}, expected at most {MOST_BYTES} bytes of them"
            )
            .into());
        }
        let mut bytes = vec![0u8; chosen.len() * size];
        let view = View::filled(self.size);
        bytes
            .par_chunks_mut(size)
            .zip(chosen)
            .try_for_each(|(to, &index)| {
                let picture = view.middle(&set.picture(index)?)?;
                to.copy_from_slice(&levels(picture, self.channels));
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            })?;
        Ok(bytes)
    }

    /// Values in [-1, 1] of the bytes of a picture, or of its mirror image.
    pub(super) fn unit(self, bytes: &[u8], mirrored: bool, to: &mut [f32]) {
        let ([_, width], channels) = (self.size, self.channels);
        let row = width * channels;
        for (to, from) in to.chunks_exact_mut(row).zip(bytes.chunks_exact(row)) {
            for (x, pixel) in to.chunks_exact_mut(channels).enumerate() {
                let x = if mirrored { width - 1 - x } else { x };
                for (to, &byte) in pixel.iter_mut().zip(&from[x * channels..]) {
                    *to = f32::from(byte) / 127.5 - 1.0;
                }
            }
        }
    }
}

/// Which of so many pictures are mirrored: one in two where `flip` asks for it, else none.
pub(super) fn mirrors(count: usize, flip: bool, mut noise: Philox) -> Vec<bool> {
    (0..count).map(|_| flip && noise.chance(0.5)).collect()
}

/// Bytes of one channel, the mean of the colours, or of three.
pub(crate) fn levels(picture: Picture, channels: usize) -> Vec<u8> {
    let mean = |pixel: &[u8]| (pixel.iter().map(|&byte| u32::from(byte)).sum::<u32>() / 3) as u8;
    match channels {
        1 => picture.pixels.chunks_exact(3).map(mean).collect(),
        _ => picture.pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::labelled::Item;

    #[test]
    fn pictures_are_read_and_mirrored() {
        let item = |pixels: [u8; 6]| Item {
            picture: Picture::new(pixels.to_vec(), 2, 1, 3).unwrap(),
            label: Some(0),
            caption: None,
            key: "a".to_owned(),
        };
        let items = vec![item([0, 0, 0, 255, 255, 255]), item([255, 0, 0, 0, 30, 60])];
        let set = Labelled::in_memory("test", vec!["a".to_owned()], items).unwrap();
        let colours = Frame {
            size: [1, 2],
            channels: 3,
        };
        let bytes = colours.read(&set, &[1, 0]).unwrap();
        assert_eq!(bytes, [255, 0, 0, 0, 30, 60, 0, 0, 0, 255, 255, 255]);
        let grey = Frame {
            channels: 1,
            ..colours
        };
        let levels = grey.read(&set, &[1]).unwrap();
        assert_eq!(levels, [85, 30]);
        let mut values = [0f32; 6];
        colours.unit(&bytes[..6], true, &mut values);
        let expected = [0u8, 30, 60, 255, 0, 0].map(|byte| f32::from(byte) / 127.5 - 1.0);
        assert_eq!(values, expected);
        let mut values = [0f32; 2];
        grey.unit(&[0, 255], false, &mut values);
        assert_eq!(values, [-1.0, 1.0]);
        let huge = Frame {
            size: [1 << 12, 1 << 12],
            channels: 3,
        };
        let line = huge.read(&set, &vec![0; 1000]).unwrap_err().to_string();
        assert!(
            line.starts_with("set: found 1000 pictures of 4096x4096"),
            "{line}"
        );
        assert_eq!(mirrors(3, false, Philox::new(1, 0)), [false; 3]);
        let many = mirrors(1000, true, Philox::new(1, 0));
        assert!((430..570).contains(&many.iter().filter(|&&own| own).count()));
    }
}
