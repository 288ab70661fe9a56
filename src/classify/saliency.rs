//! Which pixels a classifier looks at: how much its logit of a class moves with each of them, without any attention to look at.
//!
//! ```text
//! s = max over channels of |d logit / d pixel|, smoothed by a mean over noisy copies and by a Gaussian
//! ```
//!
//! Sources: Simonyan, Vedaldi and Zisserman, arXiv 1312.6034; the mean over noisy copies is SmoothGrad, arXiv 1706.03825.

use candle_core::{DType, Device, Tensor, Var};
use fulgur_datasets::media::{Filter, MediaError, Picture};
use fulgur_kernels::philox::Philox;
use fulgur_kernels::tape;

use super::model::{Model, ModelError};
use super::prepare;

/// Noisy copies.
const COPIES: usize = 16;
/// Standard deviation of their noise, as a share of the range of normalised values.
const NOISE: f32 = 0.1;
/// Seed of it.
const SEED: u64 = 1;
/// Standard deviation of the Gaussian, as a share of the longer side.
const BLUR: f64 = 0.02;
/// This share of the pixels is as bright as can be.
const BRIGHT: f64 = 0.01;
/// Longer side of a picture that shows it, at least.
const SHOWN: usize = 256;
/// Colours of growing saliency.
const COLOURS: [[f32; 3]; 5] = [
    [20.0, 12.0, 60.0],
    [100.0, 20.0, 120.0],
    [200.0, 60.0, 70.0],
    [250.0, 150.0, 30.0],
    [252.0, 250.0, 160.0],
];

/// Saliency `[H, W]` of `class` in `picture`, which is one as [`prepare::fit`] gives it: from 0 to 1.
///
/// # Errors
/// The class is none of the model's, or a failing operation.
pub fn saliency(model: &Model, picture: &Picture, class: usize) -> Result<Vec<f32>, ModelError> {
    let device = model.network.device().clone();
    let gradients = gradients(model, picture, class, &device).map_err(|source| model.failed(source))?;
    let sigma = (BLUR * picture.width.max(picture.height) as f64).max(0.5);
    let mut map = blurred(&gradients, [picture.height, picture.width], sigma);
    let mut sorted = map.clone();
    sorted.sort_by(f32::total_cmp);
    let place = ((1.0 - BRIGHT) * (sorted.len() - 1) as f64).round() as usize;
    let bright = sorted.get(place).copied().unwrap_or(0.0).max(f32::MIN_POSITIVE);
    map.iter_mut()
        .for_each(|value| *value = (*value / bright).min(1.0));
    Ok(map)
}

/// The mean over noisy copies of the largest gradient of a pixel's channels, `[H, W]`.
fn gradients(
    model: &Model,
    picture: &Picture,
    class: usize,
    device: &Device,
) -> candle_core::Result<Vec<f32>> {
    let config = model.config();
    if class >= config.classes() {
        candle_core::bail!("class is {class}, expected less than {}", config.classes());
    }
    let (height, width) = (picture.height, picture.width);
    let clean = prepare::batch(std::slice::from_ref(picture), config, &Device::Cpu)?;
    let count = clean.elem_count();
    let range = 1.0 / config.image_std.iter().copied().fold(f32::INFINITY, f32::min);
    let mut sum = vec![0.0; height * width];
    let together = Model::together(height, width).min(COPIES);
    for first in (0..COPIES).step_by(together) {
        let copies = together.min(COPIES - first);
        let mut values = Vec::with_capacity(copies * count);
        let own = clean.flatten_all()?.to_vec1::<f32>()?;
        for copy in first..first + copies {
            let mut noise = Philox::named(SEED, &format!("saliency/{copy}"));
            values.extend(own.iter().map(|value| value + NOISE * range * noise.normal()));
        }
        let shape = (copies, config.num_channels, height, width);
        let pixels = Var::from_tensor(&Tensor::from_vec(values, shape, device)?)?;
        let (logit, tape) = tape::record(|| {
            let logits = model.network.logits(&pixels, None)?;
            logits.narrow(1, class, 1)?.sum_all()
        });
        let gradients = tape.backward(&logit?)?;
        let Some(gradient) = gradients.get(&pixels) else {
            candle_core::bail!("the logit does not depend on the pixels");
        };
        let largest = gradient.to_dtype(DType::F32)?.abs()?.max(1)?.sum(0)?;
        let largest = largest.flatten_all()?.to_vec1::<f32>()?;
        sum.iter_mut().zip(largest).for_each(|(sum, value)| *sum += value);
    }
    Ok(sum)
}

/// A map of rows and columns under a Gaussian, whose weights outside of the map are left out.
fn blurred(map: &[f32], [height, width]: [usize; 2], sigma: f64) -> Vec<f32> {
    let reach = (3.0 * sigma).ceil() as isize;
    let weight = |by: isize| (-0.5 * (by as f64 / sigma).powi(2)).exp();
    let along = |map: &[f32], length: usize, stride: usize, lines: &dyn Fn(usize) -> usize, count: usize| {
        let mut out = vec![0.0; map.len()];
        for line in 0..count {
            let first = lines(line);
            for at in 0..length {
                let (mut sum, mut weights) = (0.0, 0.0);
                for by in -reach..=reach {
                    let Some(other) = at.checked_add_signed(by).filter(|&other| other < length) else {
                        continue;
                    };
                    sum += weight(by) * f64::from(map[first + other * stride]);
                    weights += weight(by);
                }
                out[first + at * stride] = (sum / weights) as f32;
            }
        }
        out
    };
    let rows = along(map, width, 1, &|row| row * width, height);
    along(&rows, height, width, &|column| column, width)
}

/// The picture in grey with its saliency in colours over it, large enough to be looked at.
///
/// # Errors
/// The map is of another size than the picture.
pub fn overlay(picture: &Picture, map: &[f32]) -> Result<Picture, MediaError> {
    let pixels = picture
        .pixels
        .chunks_exact(3)
        .zip(map)
        .flat_map(|(pixel, &value)| {
            let grey = pixel.iter().map(|&level| f32::from(level)).sum::<f32>() / 3.0;
            let place = value.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f32;
            let below = (place as usize).min(COLOURS.len() - 2);
            let part = place - below as f32;
            let strength = 0.25 + 0.55 * value;
            [0, 1, 2].map(|channel| {
                let colour = COLOURS[below][channel] * (1.0 - part) + COLOURS[below + 1][channel] * part;
                (grey * (1.0 - strength) + colour * strength).round() as u8
            })
        });
    let shown = Picture::new(pixels.collect(), picture.width, picture.height, 3)?;
    let longer = picture.width.max(picture.height);
    let times = SHOWN.div_ceil(longer).max(1);
    shown.resized(picture.width * times, picture.height * times, Filter::Bicubic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blurred_point_is_a_gaussian_and_a_plain_map_stays() {
        let mut map = vec![0.0; 15 * 21];
        map[7 * 21 + 10] = 1.0;
        let out = blurred(&map, [15, 21], 1.5);
        let total: f64 = (-5..=5)
            .map(|by| (-0.5 * (f64::from(by) / 1.5).powi(2)).exp())
            .sum();
        for (row, column) in [(7, 10), (6, 10), (7, 12), (5, 7), (7, 16)] {
            let square = ((row as f64 - 7.0).powi(2) + (column as f64 - 10.0).powi(2)) / 2.25;
            let near = (row as f64 - 7.0).abs() <= 5.0 && (column as f64 - 10.0).abs() <= 5.0;
            let expected = if near {
                (-0.5 * square).exp() / total / total
            } else {
                0.0
            };
            let found = f64::from(out[row * 21 + column]);
            assert!(
                (found - expected).abs() < 1e-6,
                "{row} {column}: {found} {expected}"
            );
        }
        let plain = blurred(&[0.5; 12], [3, 4], 2.0);
        assert!(plain.iter().all(|value| (value - 0.5).abs() < 1e-6));
    }

    #[test]
    fn the_overlay_is_dark_where_nothing_is_seen() {
        let picture = Picture::new(vec![90; 2 * 4 * 3], 4, 2, 3).unwrap();
        let shown = overlay(&picture, &[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]).unwrap();
        assert_eq!((shown.width, shown.height), (256, 128));
        let at = |x: usize| {
            shown.pixels[(64 * 256 + x) * 3..][..3]
                .iter()
                .map(|&v| u32::from(v))
                .sum::<u32>()
        };
        assert!(at(240) > at(10) + 150, "{} {}", at(240), at(10));
    }
}
