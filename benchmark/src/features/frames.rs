//! Frames of clips in the sizes that video networks take.

use candle_core::{Device, Result, Tensor};
use fulgur_datasets::media::Video;

/// How RGB bytes become the numbers of I3D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framing {
    /// Frames that are taken, evenly spaced with the first and the last one.
    pub frames: usize,
    /// Whether frames are padded to a square instead of cut to one.
    pub letterbox: bool,
    /// Whether values are brought to the upper half of the range first, as one published tool does.
    pub upper_half: bool,
}

impl Framing {
    /// Sixteen frames, cut to their middle: as FVD is usually computed.
    pub const USUAL: Self = Self {
        frames: 16,
        letterbox: false,
        upper_half: false,
    };
    /// As the tool of JavisBench computes it: 24 frames in a letterbox, of which it maps 0..255 to 127..255.
    pub const JAVISBENCH: Self = Self {
        frames: 24,
        letterbox: true,
        upper_half: true,
    };

    /// Which of `available` frames are taken: rounded places from the first to the last. Fewer are taken as often as it needs.
    pub fn indices(&self, available: usize) -> Vec<usize> {
        let last = available.saturating_sub(1);
        let steps = self.frames.saturating_sub(1).max(1);
        (0..self.frames)
            .map(|i| round_half_even(i as f64 * last as f64 / steps as f64))
            .collect()
    }

    /// Frames `[1, 3, T, size, size]` from -1 to 1: the shorter side scaled to `size` (bilinear between pixel centres, no
    /// antialiasing) and the middle cut out.
    ///
    /// # Errors
    /// There are no frames.
    pub fn clip(&self, video: &Video, size: usize) -> Result<Tensor> {
        if video.frame_count == 0 || size == 0 {
            candle_core::bail!("no frames: found 0, expected at least 1");
        }
        let indices = self.indices(video.frame_count);
        let plane = size * size;
        let count = indices.len();
        let mut values = vec![0.0; 3 * count * plane];
        for (t, &index) in indices.iter().enumerate() {
            let frame = self.frame(video.frame(index), video.width, video.height, size);
            for c in 0..3 {
                values[(c * count + t) * plane..][..plane].copy_from_slice(&frame[c * plane..][..plane]);
            }
        }
        Tensor::from_vec(values, (1, 3, count, size, size), &Device::Cpu)
    }

    /// Planes `[3, size, size]` of one frame.
    fn frame(&self, rgb: &[u8], width: usize, height: usize, size: usize) -> Vec<f32> {
        let value = |byte: u8| {
            // The tool turns floats into bytes, which cuts off what is behind the point.
            let byte = if self.upper_half {
                ((f64::from(byte) / 255.0 + 1.0) * 127.5).floor() as f32
            } else {
                f32::from(byte)
            };
            byte / 255.0
        };
        let mut square = rgb.iter().map(|&byte| value(byte)).collect::<Vec<f32>>();
        let (mut width, mut height) = (width, height);
        if self.letterbox && width != height {
            let side = width.max(height);
            let (left, top) = ((side - width) / 2, (side - height) / 2);
            // Black bars go through the same mapping.
            let mut padded = vec![value(0); side * side * 3];
            for (y, row) in square.chunks_exact(width * 3).enumerate() {
                padded[((top + y) * side + left) * 3..][..width * 3].copy_from_slice(row);
            }
            (square, width, height) = (padded, side, side);
        }
        let (wide, high) = scaled(width, height, size);
        let (left, top) = ((wide - size) / 2, (high - size) / 2);
        let columns = taps(width, wide, left, size);
        let rows = taps(height, high, top, size);
        let mut out = vec![0.0; 3 * size * size];
        for (y, &(y0, y1, dy)) in rows.iter().enumerate() {
            for (x, &(x0, x1, dx)) in columns.iter().enumerate() {
                for c in 0..3 {
                    let at = |y: usize, x: usize| square[(y * width + x) * 3 + c];
                    let above = at(y0, x0) * (1.0 - dx) + at(y0, x1) * dx;
                    let below = at(y1, x0) * (1.0 - dx) + at(y1, x1) * dx;
                    let value = above * (1.0 - dy) + below * dy;
                    out[(c * size + y) * size + x] = value * 2.0 - 1.0;
                }
            }
        }
        out
    }
}

/// Width and height whose shorter one is `size`; the longer one is rounded up.
fn scaled(width: usize, height: usize, size: usize) -> (usize, usize) {
    let long = |long: usize, short: usize| (long * size).div_ceil(short);
    if width < height {
        (size, long(height, width))
    } else {
        (long(width, height), size)
    }
}

/// The two pixels around each of `count` places from `first` on, and how near the second is.
fn taps(from: usize, to: usize, first: usize, count: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f64 / to as f64;
    (first..first + count)
        .map(|i| {
            let place = ((i as f64 + 0.5) * scale - 0.5).max(0.0);
            let low = (place as usize).min(from - 1);
            (low, (low + 1).min(from - 1), (place - low as f64) as f32)
        })
        .collect()
}

/// As numpy rounds: halves go to the even neighbour.
fn round_half_even(x: f64) -> usize {
    x.round_ties_even() as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, relative_rms, thinned, values};

    #[test]
    fn frames_are_spread_from_first_to_last() {
        assert_eq!(Framing::USUAL.indices(16), (0..16).collect::<Vec<_>>());
        let of = |frames: usize, available: usize| {
            Framing {
                frames,
                ..Framing::USUAL
            }
            .indices(available)
        };
        assert_eq!(of(3, 6), [0, 2, 5]);
        assert_eq!(of(4, 2), [0, 0, 1, 1]);
        assert_eq!(of(2, 1), [0, 0]);
        assert_eq!(of(1, 5), [0]);
    }

    #[test]
    fn clips_are_those_of_torch() {
        let tensors = golden("frames");
        for name in ["wide", "tall", "small"] {
            let frames = &tensors[&format!("frames.{name}")];
            let (count, height, width, _) = frames.dims4().unwrap();
            let bytes: Vec<u8> = values(frames).into_iter().map(|value| value as u8).collect();
            let video = Video::new(bytes, width, height, 8.0).unwrap();
            for (kind, framing) in [("usual", Framing::USUAL), ("javisbench", Framing::JAVISBENCH)] {
                let framing = Framing {
                    frames: count,
                    ..framing
                };
                let found = framing.clip(&video, 16).unwrap();
                assert_eq!(found.dims(), [1, 3, count, 16, 16]);
                let apart = relative_rms(&thinned(&found, 3), &tensors[&format!("{kind}.{name}")]);
                assert!(apart < 1e-5, "{kind}.{name}: {apart}");
            }
        }
    }

    #[test]
    fn nothing_to_see_is_refused() {
        let empty = Video::new(Vec::new(), 4, 4, 8.0).unwrap();
        assert!(Framing::USUAL.clip(&empty, 16).is_err());
    }
}
