//! Pictures as a classifier takes them: of its size and channels, less the mean, divided by the deviation.

use candle_core::{Device, Result, Tensor};
use fulgur_datasets::media::Picture;
use fulgur_lightnet::vision::Config;
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Rgb, RgbImage};

/// Which pixels a classifier sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// The middle of the picture, resized (bicubic) until it fills the size that the model is made for.
    #[default]
    Model,
    /// The picture as it is, cut around its middle to whole patches. A side of less than a patch is resized to one.
    Native,
}

/// What pictures with opacity lie on.
const BACKGROUND: [u8; 3] = [255; 3];

/// The part of `picture` that a model of this shape sees, in colours.
#[must_use]
pub fn fit(picture: &Picture, config: &Config, how: Fit) -> Picture {
    let picture = picture.over(BACKGROUND);
    let patch = config.patch_size;
    let [height, width] = match how {
        Fit::Model => config.image_size,
        Fit::Native => [picture.height, picture.width].map(|side| (side / patch * patch).max(patch)),
    };
    let covers = picture.height >= height && picture.width >= width;
    let resized = match how {
        Fit::Native if covers => picture,
        _ => {
            let scale = |side: usize, of: usize| side as f64 / of as f64;
            let scale = scale(height, picture.height).max(scale(width, picture.width));
            let side = |of: usize, least: usize| ((of as f64 * scale).round() as usize).max(least);
            resize(&picture, side(picture.height, height), side(picture.width, width))
        }
    };
    let (top, left) = ((resized.height - height) / 2, (resized.width - width) / 2);
    let rows = (top..top + height).flat_map(|row| {
        let first = (row * resized.width + left) * 3;
        resized.pixels[first..first + width * 3].iter().copied()
    });
    Picture {
        pixels: rows.collect(),
        width,
        height,
        channels: 3,
    }
}

/// A picture in colours of another size.
pub(super) fn resize(picture: &Picture, height: usize, width: usize) -> Picture {
    if (picture.height, picture.width) == (height, width) {
        return picture.clone();
    }
    let (from_width, from_height) = (picture.width as u32, picture.height as u32);
    let image: RgbImage = ImageBuffer::from_fn(from_width, from_height, |x, y| {
        let first = (y as usize * picture.width + x as usize) * 3;
        Rgb([0, 1, 2].map(|channel| picture.pixels[first + channel]))
    });
    let resized = imageops::resize(&image, width as u32, height as u32, FilterType::CatmullRom);
    Picture {
        pixels: resized.into_raw(),
        width,
        height,
        channels: 3,
    }
}

/// The values `[C, H, W]` of a picture in colours.
#[must_use]
pub fn values(picture: &Picture, config: &Config) -> Vec<f32> {
    let pixels = || picture.pixels.chunks_exact(3);
    let channels = (0..config.num_channels).flat_map(|channel| {
        let (mean, std) = (config.image_mean[channel], config.image_std[channel]);
        pixels().map(move |pixel| {
            let level = match config.num_channels {
                1 => grey(pixel),
                _ => pixel[channel],
            };
            (f32::from(level) / 255.0 - mean) / std
        })
    });
    channels.collect()
}

/// Luma of ITU-R BT.601 in fixed point, as Pillow has it.
fn grey(pixel: &[u8]) -> u8 {
    let weights = [19_595, 38_470, 7_471];
    let sum: u32 = pixel
        .iter()
        .zip(weights)
        .map(|(&level, weight)| u32::from(level) * weight)
        .sum();
    ((sum + 0x8000) >> 16) as u8
}

/// Pictures of one size as a batch `[B, C, H, W]` on `device`.
///
/// # Errors
/// The device is out of memory.
pub fn batch(pictures: &[Picture], config: &Config, device: &Device) -> Result<Tensor> {
    let Some(first) = pictures.first() else {
        candle_core::bail!("a batch needs a picture");
    };
    let shape = (pictures.len(), config.num_channels, first.height, first.width);
    let values: Vec<f32> = pictures
        .iter()
        .flat_map(|picture| values(picture, config))
        .collect();
    Tensor::from_vec(values, shape, device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::vision::Size;

    fn config(side: [usize; 2], channels: usize) -> Config {
        Config {
            image_size: side,
            patch_size: 4,
            num_channels: channels,
            image_mean: vec![0.5; channels],
            image_std: vec![0.25; channels],
            ..Config::of(Size::Tiny, vec!["a".into(), "b".into()])
        }
    }

    /// Red grows to the right, green downwards.
    fn slope(height: usize, width: usize) -> Picture {
        let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 7]));
        Picture::new(pixels.collect(), width, height, 3).unwrap()
    }

    #[test]
    fn native_pictures_are_cut_around_their_middle_and_never_resized() {
        let seen = fit(&slope(21, 14), &config([8, 8], 3), Fit::Native);
        assert_eq!((seen.height, seen.width), (20, 12));
        assert_eq!(seen.pixels[..3], [1, 0, 7]);
        assert_eq!(seen.pixels[seen.pixels.len() - 3..], [12, 19, 7]);
        let tiny = fit(&slope(1, 9), &config([8, 8], 3), Fit::Native);
        assert_eq!((tiny.height, tiny.width), (4, 8));
    }

    #[test]
    fn others_fill_the_size_of_the_model() {
        let config = config([8, 16], 3);
        for (height, width) in [(8, 16), (1, 1), (200, 90), (90, 200), (8, 17)] {
            let seen = fit(&slope(height, width), &config, Fit::Model);
            assert_eq!((seen.height, seen.width), (8, 16), "{height} x {width}");
        }
        assert_eq!(fit(&slope(8, 16), &config, Fit::Model), slope(8, 16));
        // A wide picture keeps its middle: 8 of the 32 columns go on each side.
        let seen = fit(&slope(8, 32), &config, Fit::Model);
        assert_eq!(seen.pixels[0], 8);
    }

    #[test]
    fn values_are_normalised_by_channel() {
        let picture = Picture::new(vec![0, 255, 102, 102, 102, 102], 2, 1, 3).unwrap();
        let near = |found: Vec<f32>, expected: &[f32]| {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        };
        near(
            values(&picture, &config([8, 8], 3)),
            &[-2.0, -0.4, 2.0, -0.4, -0.4, -0.4],
        );
        // 0.587 * 255 + 0.114 * 102 = 161.3.
        near(
            values(&picture, &config([8, 8], 1)),
            &[(161.0 / 255.0 - 0.5) / 0.25, -0.4],
        );
    }
}
