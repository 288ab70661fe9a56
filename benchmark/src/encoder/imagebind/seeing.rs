//! Pictures and videos as ImageBind and CLIP take them.

use candle_core::{DType, Device, Result, Tensor};
use fulgur_datasets::augment::View;
use fulgur_datasets::media::{Filter, MediaError, Picture, Video};
use rayon::prelude::*;

use super::super::EncodeError;

/// Mean and deviation of CLIP's pictures, of values from 0 to 1.
pub const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// The deviation.
pub const DEVIATION: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
const RGB: usize = 3;

/// Clips of a video, crops of a clip, and their product.
const CLIPS: usize = 5;
const CROPS: usize = 3;
/// Views of a video.
pub const VIEWS: usize = CLIPS * CROPS;
/// Seconds of a clip.
const CLIP_S: f64 = 2.0;

/// The shorter side to `side` by Pillow's bicubic, the square in the middle, scaled.
pub fn view(side: usize) -> View {
    View {
        height: side,
        width: side,
        channels: RGB,
        crop: 1.0,
        filter: Filter::Bicubic,
        mean: MEAN,
        std: DEVIATION,
    }
}

/// Frames of any one size, RGB bytes, through a square view: `[B, side, side, 3]` u8 on the CPU.
///
/// # Errors
/// Frames whose bytes do not fit their size.
pub fn fitted(
    view: &View,
    frames: &[&[u8]],
    width: usize,
    height: usize,
) -> std::result::Result<Tensor, EncodeError> {
    let fit = |frame: &&[u8]| {
        let picture = Picture::new(frame.to_vec(), width, height, RGB)?;
        Ok(view.middle(&picture)?.pixels)
    };
    let fitted: Vec<Vec<u8>> = frames
        .par_iter()
        .map(fit)
        .collect::<std::result::Result<_, MediaError>>()
        .map_err(|e| EncodeError::Input(e.to_string()))?;
    let shape = (frames.len(), view.height, view.width, RGB);
    Ok(Tensor::from_vec(fitted.concat(), shape, &Device::Cpu)?)
}

/// Bytes `[B, side, side, 3]` as networks take them: `[B, 3, side, side]` in f32 on `device`, less [`MEAN`] and divided by
/// [`DEVIATION`].
///
/// # Errors
/// The device has no memory.
pub fn normalised(frames: &Tensor, device: &Device) -> Result<Tensor> {
    // (x / 255 - mean) / deviation
    let scale: Vec<f32> = DEVIATION.map(|d| (1.0 / (255.0 * d)) as f32).into();
    let shift: Vec<f32> = std::array::from_fn::<f32, RGB, _>(|c| (MEAN[c] / DEVIATION[c]) as f32).into();
    let row = |values| Tensor::from_vec(values, (1, RGB, 1, 1), device);
    let pixels = frames.to_device(device)?.permute((0, 3, 1, 2))?.contiguous()?;
    let pixels = pixels.to_dtype(DType::F32)?.broadcast_mul(&row(scale)?)?;
    pixels.broadcast_sub(&row(shift)?)
}

/// First and last frame of each clip of a video of `count` frames; the clips are evenly spaced.
fn clip_frames(count: usize, fps: f64) -> [[usize; 2]; CLIPS] {
    let last_s = (count as f64 / fps - CLIP_S).max(0.0);
    let most = count.saturating_sub(1);
    std::array::from_fn(|k| {
        let start_s = last_s * k as f64 / (CLIPS - 1) as f64;
        let first = ((fps * start_s).ceil() as usize).min(most);
        let end = ((fps * (start_s + CLIP_S)).ceil() as usize).min(count);
        [first, end.saturating_sub(1).max(first)]
    })
}

/// The views of a video `[15, 3, 2, side, side]`, clip by clip, of each its crops along the longer axis: frames are resized without
/// antialiasing, as the reference does to videos.
pub fn views(video: &Video, side: usize) -> Vec<f32> {
    let (width, height) = (video.width, video.height);
    let short = width.min(height);
    let longer = |long: usize| (long as f64 / short as f64 * side as f64).floor() as usize;
    let (wide, high) = match width < height {
        true => (side, longer(height)),
        false => (longer(width), side),
    };
    let middle = |whole: usize| (whole - side).div_ceil(2);
    let plane = side * side;
    let mut out = vec![0f32; VIEWS * RGB * 2 * plane];
    for (clip, frames) in clip_frames(video.frame_count, video.fps).into_iter().enumerate() {
        for (t, &frame) in frames.iter().enumerate() {
            for crop in 0..CROPS {
                let along = |whole: usize| [0, middle(whole), whole - side][crop];
                let (left, top) = match high > wide {
                    true => (middle(wide), along(high)),
                    false => (along(wide), middle(high)),
                };
                let columns = taps(width, wide, left, side);
                let rows = taps(height, high, top, side);
                let pixels = video.frame(frame);
                for channel in 0..RGB {
                    let at = (((clip * CROPS + crop) * RGB + channel) * 2 + t) * plane;
                    let (mean, deviation) = (MEAN[channel] as f32, DEVIATION[channel] as f32);
                    let value =
                        |x: usize, y: usize| f32::from(pixels[(y * width + x) * RGB + channel]) / 255.0;
                    for (row, &(y, v)) in out[at..at + plane].chunks_exact_mut(side).zip(&rows) {
                        let below = (y + 1).min(height - 1);
                        for (out, &(x, u)) in row.iter_mut().zip(&columns) {
                            let right = (x + 1).min(width - 1);
                            let upper = value(x, y) * (1.0 - u) + value(right, y) * u;
                            let lower = value(x, below) * (1.0 - u) + value(right, below) * u;
                            *out = (upper * (1.0 - v) + lower * v - mean) / deviation;
                        }
                    }
                }
            }
        }
    }
    out
}

/// Of the places `first .. first + count` of `to`, the place among `from` at or before each, and how far it is to the next.
fn taps(from: usize, to: usize, first: usize, count: usize) -> Vec<(usize, f32)> {
    let scale = from as f32 / to as f32;
    let tap = |place: usize| {
        let at = ((place as f32 + 0.5) * scale - 0.5).max(0.0);
        let low = (at as usize).min(from - 1);
        (low, at - low as f32)
    };
    (first..first + count).map(tap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_lightnet::testing;

    #[test]
    fn clips_of_short_and_long_videos() {
        assert_eq!(
            clip_frames(240, 24.0),
            [[0, 47], [48, 95], [96, 143], [144, 191], [192, 239]]
        );
        assert_eq!(clip_frames(24, 24.0), [[0, 23]; 5]);
        assert_eq!(clip_frames(1, 24.0), [[0, 0]; 5]);
        assert_eq!(clip_frames(100, 10.0)[1], [20, 39]);
        let odd = clip_frames(73, 10.0);
        assert_eq!((odd[0], odd[4]), ([0, 19], [53, 72]));
    }

    #[test]
    fn views_are_those_of_the_reference() {
        let golden = testing::tensors("views");
        for (case, side) in [("wide", 8), ("high", 12), ("square", 7)] {
            let frames = &golden[&format!("{case}.frames")];
            let (_, height, width, _) = frames.dims4().unwrap();
            let bytes = frames.flatten_all().unwrap().to_vec1::<u8>().unwrap();
            let video = Video::new(bytes, width, height, 6.0).unwrap();
            let found = views(&video, side);
            assert_eq!(found.len(), VIEWS * 3 * 2 * side * side);
            // Every fifth value is there.
            let expected = golden[&format!("{case}.views")].to_vec1::<f32>().unwrap();
            assert_eq!(expected.len(), found.len().div_ceil(5));
            let worst = found
                .iter()
                .step_by(5)
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            assert!(worst < 1e-4, "{case}: {worst}");
        }
    }
}
