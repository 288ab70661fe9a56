//! Pictures as a classifier takes them: of its size and channels, less the mean, divided by the deviation.

use candle_core::{Device, Result, Tensor};
use fulgur_datasets::augment::View;
use fulgur_datasets::labelled::BACKGROUND;
use fulgur_datasets::media::{MediaError, Picture};
use fulgur_lightnet::vision::Config;

/// Most patches of a picture that goes in as it is: each tensor of a layer of the base size has 200 MB then.
const MOST_PATCHES: usize = 1 << 16;

/// Which pixels a classifier sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// The middle of the picture, resized (bicubic) until it fills the size that the model is made for.
    #[default]
    Model,
    /// The picture as it is, cut around its middle to whole patches. A side of less than a patch is resized to one.
    Native,
}

/// How a model of this shape sees pictures, in training and after.
#[must_use]
pub fn view(config: &Config) -> View {
    let each = |values: &[f32]| {
        // Grey pictures have the first.
        std::array::from_fn(|channel| f64::from(values[channel.min(values.len() - 1)]))
    };
    View {
        channels: config.num_channels,
        mean: each(&config.image_mean),
        std: each(&config.image_std),
        ..View::filled(config.image_size)
    }
}

/// The part of `picture` that a model of this shape sees, in colours.
///
/// # Errors
/// It would have more pixels than pictures may have: those of a hair, as it is, in patches. Or it has more than 65,536 patches as it is.
pub fn fit(picture: &Picture, config: &Config, how: Fit) -> std::result::Result<Picture, MediaError> {
    let picture = picture.over(BACKGROUND);
    let patch = config.patch_size;
    let [height, width] = match how {
        Fit::Model => config.image_size,
        Fit::Native => [picture.height, picture.width].map(|side| (side / patch * patch).max(patch)),
    };
    let patches = (height / patch) * (width / patch);
    if how == Fit::Native && patches > MOST_PATCHES {
        return Err(MediaError::Invalid {
            field: "picture",
            found: format!(
                "{} x {} pixels in {patches} patches of {patch}",
                picture.width, picture.height
            ),
            expected: format!("at most {MOST_PATCHES} of them, or its middle, without --native"),
        });
    }
    if how == Fit::Native && picture.height >= height && picture.width >= width {
        let (left, top) = ((picture.width - width) / 2, (picture.height - height) / 2);
        return picture.cropped(left, top, width, height);
    }
    View::filled([height, width]).middle(&picture)
}

/// Pictures of one size as a batch `[B, C, H, W]` on `device`.
///
/// # Errors
/// There are none, or the device is out of memory.
pub fn batch(pictures: &[Picture], config: &Config, device: &Device) -> Result<Tensor> {
    let Some(first) = pictures.first() else {
        candle_core::bail!("a batch needs a picture");
    };
    let shape = (pictures.len(), config.num_channels, first.height, first.width);
    Tensor::from_vec(view(config).normalised(pictures), shape, device)
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
        let native = |height, width| fit(&slope(height, width), &config([8, 8], 3), Fit::Native).unwrap();
        let seen = native(21, 14);
        assert_eq!((seen.height, seen.width), (20, 12));
        assert_eq!(seen.pixels[..3], [1, 0, 7]);
        assert_eq!(seen.pixels[seen.pixels.len() - 3..], [12, 19, 7]);
        let tiny = native(1, 9);
        assert_eq!((tiny.height, tiny.width), (4, 8));
    }

    #[test]
    fn others_fill_the_size_of_the_model() {
        let config = config([8, 16], 3);
        let filled = |height, width| fit(&slope(height, width), &config, Fit::Model).unwrap();
        for (height, width) in [(8, 16), (1, 1), (200, 90), (90, 200), (8, 17)] {
            let seen = filled(height, width);
            assert_eq!((seen.height, seen.width), (8, 16), "{height} x {width}");
        }
        assert_eq!(filled(8, 16), slope(8, 16));
        // A wide picture keeps its middle: 8 of the 32 columns go on each side.
        assert_eq!(filled(8, 32).pixels[0], 8);
    }

    /// One row of a million pixels: filled whole it would be 128 million columns of 128 rows.
    #[test]
    fn a_hair_costs_no_more_than_its_middle() {
        let pixels = (0..1_000_000).flat_map(|x| [(x / 499_990 * 100) as u8; 3]);
        let hair = Picture::new(pixels.collect(), 1_000_000, 1, 3).unwrap();
        let seen = fit(&hair, &config([128, 128], 3), Fit::Model).unwrap();
        assert_eq!((seen.height, seen.width), (128, 128));
        assert_eq!(seen.pixels, [100; 128 * 128 * 3]);
        let shorter = hair.cropped(0, 0, 200_000, 1).unwrap();
        let line = fit(&shorter, &config([8, 8], 3), Fit::Native).unwrap();
        assert_eq!((line.height, line.width), (4, 200_000));
        let line = fit(&hair, &config([8, 8], 3), Fit::Native).unwrap_err();
        assert_eq!(
            line.to_string(),
            "picture: found 1000000 x 1 pixels in 250000 patches of 4, expected at most 65536 of them, or its middle, without --native"
        );
        let patch = Config {
            patch_size: 128,
            ..config([128, 128], 3)
        };
        let line = fit(&hair, &patch, Fit::Native).unwrap_err().to_string();
        assert!(line.starts_with("picture size: found 999936 x 128"), "{line}");
    }

    #[test]
    fn values_are_normalised_by_channel() {
        let picture = Picture::new(vec![0, 255, 102, 102, 102, 102], 2, 1, 3).unwrap();
        let near = |channels: usize, expected: &[f32]| {
            let pictures = [picture.clone(), picture.clone()];
            let values = batch(&pictures, &config([8, 8], channels), &Device::Cpu).unwrap();
            assert_eq!(values.dims(), [2, channels, 1, 2]);
            let values = values.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (found, expected) in values.iter().zip(expected.iter().chain(expected)) {
                assert!((found - expected).abs() < 1e-5, "{found} {expected}");
            }
        };
        near(3, &[-2.0, -0.4, 2.0, -0.4, -0.4, -0.4]);
        // 0.587 * 255 + 0.114 * 102 = 161.3.
        near(1, &[(161.0 / 255.0 - 0.5) / 0.25, -0.4]);
    }
}
