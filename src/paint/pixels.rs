//! Pictures as values of the network and back, and side by side.

use anyhow::bail;
use candle_core::{DType, Tensor};
use fulgur_datasets::media::Picture;

/// Pixels between the pictures of a grid.
const GAP: usize = 2;

/// Values of -1 to 1 of an RGB picture, channels last; of one channel the mean of the colours.
pub(crate) fn pixels(picture: &Picture, channels: usize) -> Vec<f32> {
    let value = |byte: f32| byte / 127.5 - 1.0;
    let colours = picture.pixels.chunks_exact(picture.channels);
    match channels {
        1 => colours
            .map(|pixel| {
                let sum: f32 = pixel[..3].iter().map(|&byte| f32::from(byte)).sum();
                value(sum / 3.0)
            })
            .collect(),
        _ => colours
            .flat_map(|pixel| [pixel[0], pixel[1], pixel[2]].map(|byte| value(f32::from(byte))))
            .collect(),
    }
}

/// RGB pictures of values `[B, H, W, 1 or 3]`.
pub(super) fn pictures(x: &Tensor) -> anyhow::Result<Vec<Picture>> {
    let (batch, height, width, channels) = x.dims4()?;
    let bytes = x
        .affine(127.5, 127.5)?
        .round()?
        .clamp(0f32, 255f32)?
        .to_dtype(DType::U8)?;
    (0..batch)
        .map(|i| {
            let bytes: Vec<u8> = bytes.get(i)?.flatten_all()?.to_vec1()?;
            let rgb = match channels {
                1 => bytes.into_iter().flat_map(|grey| [grey; 3]).collect(),
                _ => bytes,
            };
            Ok(Picture::new(rgb, width, height, 3)?)
        })
        .collect()
}

/// RGB pictures of one size in rows of `columns`, on white.
///
/// # Errors
/// No pictures, no columns, or pictures of several sizes.
pub fn grid(pictures: &[Picture], columns: usize) -> anyhow::Result<Picture> {
    let Some(first) = pictures.first().filter(|_| columns > 0) else {
        bail!("a grid of {} pictures in {columns} columns", pictures.len());
    };
    let (w, h) = (first.width, first.height);
    if pictures
        .iter()
        .any(|p| (p.width, p.height, p.channels) != (w, h, 3))
    {
        bail!("a grid of pictures of several sizes");
    }
    let rows = pictures.len().div_ceil(columns);
    let side = |count: usize, length: usize| count * length + (count - 1) * GAP;
    let (width, height) = (side(columns, w), side(rows, h));
    let mut pixels = vec![255u8; width * height * 3];
    for (i, picture) in pictures.iter().enumerate() {
        let (left, top) = ((i % columns) * (w + GAP), (i / columns) * (h + GAP));
        for (y, row) in picture.pixels.chunks_exact(3 * w).enumerate() {
            let at = 3 * ((top + y) * width + left);
            pixels[at..at + 3 * w].copy_from_slice(row);
        }
    }
    Ok(Picture::new(pixels, width, height, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_keep_their_pictures() {
        let one = |value: u8| Picture::new(vec![value; 2 * 3 * 3], 2, 3, 3).unwrap();
        let page = grid(&[one(1), one(2), one(3)], 2).unwrap();
        assert_eq!((page.width, page.height), (6, 8));
        let at = |x: usize, y: usize| page.pixels[3 * (y * page.width + x)];
        assert_eq!(
            [at(0, 0), at(2, 0), at(4, 2), at(1, 5), at(4, 5)],
            [1, 255, 2, 3, 255]
        );
        assert!(grid(&[], 2).is_err());
    }
}
