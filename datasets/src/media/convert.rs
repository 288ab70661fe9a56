//! Decoded frames to RGB bytes and to `f32` samples.

use ffmpeg_next as ffmpeg;
use ffmpeg_next::color::{Range, Space};
use ffmpeg_next::format::{Pixel, Sample, sample};
use ffmpeg_next::frame;
use ffmpeg_next::software::scaling::{Context, Flags};

/// Turns pictures of any format and size into RGB24 of one size.
///
/// swscale does formats and sizes up to full-resolution YUV; the step to RGB is ours, because swscale assumes
/// BT.601 whatever the stream says.
pub(super) struct ToRgb {
    /// Width and height before rotation.
    size: Option<(u32, u32)>,
    quarter_turns: u8,
    scaler: Option<(Definition, Context)>,
}

#[derive(Clone, Copy, PartialEq)]
struct Definition {
    format: Pixel,
    width: u32,
    height: u32,
}

impl ToRgb {
    /// `size` is width and height of the result, else those of the first picture; pictures are turned
    /// clockwise.
    pub(super) fn new(size: Option<(usize, usize)>, quarter_turns: u8) -> Self {
        let turned = |(width, height)| {
            if quarter_turns % 2 == 1 {
                (height, width)
            } else {
                (width, height)
            }
        };
        let size = size
            .map(turned)
            .map(|(width, height)| (width as u32, height as u32));
        Self {
            size,
            quarter_turns,
            scaler: None,
        }
    }

    /// Width and height of the results, known after the first.
    pub(super) fn size(&self) -> Option<(usize, usize)> {
        let (width, height) = self.size?;
        let (width, height) = (width as usize, height as usize);
        Some(if self.quarter_turns % 2 == 1 {
            (height, width)
        } else {
            (width, height)
        })
    }

    /// Appends one picture, RGB24.
    pub(super) fn append(&mut self, picture: &frame::Video, rgb: &mut Vec<u8>) -> Result<(), ffmpeg::Error> {
        let found = Definition {
            format: picture.format(),
            width: picture.width(),
            height: picture.height(),
        };
        let &mut (width, height) = self.size.get_or_insert((found.width, found.height));
        if found.format == Pixel::None || width == 0 || height == 0 || found.width == 0 || found.height == 0 {
            return Err(ffmpeg::Error::InvalidData);
        }
        let luma_chroma = found.format.descriptor().is_some_and(|format| {
            ["yuv", "nv", "p01", "y2", "uyvy", "xyz", "vuy", "ayuv"]
                .iter()
                .any(|kind| format.name().starts_with(kind))
        });
        let target = if luma_chroma { Pixel::YUV444P } else { Pixel::RGB24 };
        if self.scaler.as_ref().is_none_or(|(known, _)| *known != found) {
            let smaller = width < found.width && height < found.height;
            let filter = if smaller { Flags::AREA } else { Flags::BICUBIC };
            let flags = filter | Flags::ACCURATE_RND | Flags::FULL_CHR_H_INT | Flags::BITEXACT;
            let context = Context::get(
                found.format,
                found.width,
                found.height,
                target,
                width,
                height,
                flags,
            )?;
            self.scaler = Some((found, context));
        }
        let Some((_, scaler)) = &mut self.scaler else {
            return Err(ffmpeg::Error::Bug);
        };
        let mut scaled = frame::Video::new(target, width, height);
        if scaled.planes() == 0 {
            return Err(ffmpeg::Error::Other {
                errno: ffmpeg::error::ENOMEM,
            });
        }
        scaler.run(picture, &mut scaled)?;
        let (width, height) = (width as usize, height as usize);
        let start = rgb.len();
        if luma_chroma {
            // swscale itself narrows the formats whose very name says full range.
            let by_name = picture
                .format()
                .descriptor()
                .is_some_and(|format| format.name().starts_with("yuvj"));
            let full_range = picture.color_range() == Range::JPEG && !by_name;
            append_yuv(
                &scaled,
                width,
                height,
                &Matrix::new(picture.color_space(), full_range),
                rgb,
            );
        } else {
            let stride = scaled.stride(0);
            for row in scaled.data(0).chunks(stride).take(height) {
                rgb.extend_from_slice(&row[..3 * width]);
            }
        }
        if self.quarter_turns != 0 {
            let upright = turn(&rgb[start..], width, height, self.quarter_turns);
            rgb.truncate(start);
            rgb.extend_from_slice(&upright);
        }
        Ok(())
    }
}

/// From luma and chroma to RGB, in 1/65536.
struct Matrix {
    black: i32,
    luma: i32,
    red_v: i32,
    green_u: i32,
    green_v: i32,
    blue_u: i32,
}

impl Matrix {
    /// Streams that do not name their colours are BT.601, as every common reader assumes.
    fn new(space: Space, full_range: bool) -> Self {
        let (kr, kb) = match space {
            Space::BT709 => (0.2126, 0.0722),
            Space::BT2020NCL | Space::BT2020CL => (0.2627, 0.0593),
            Space::SMPTE240M => (0.212, 0.087),
            Space::FCC => (0.30, 0.11),
            _ => (0.299, 0.114),
        };
        let kg = 1.0 - kr - kb;
        let (black, luma, chroma) = if full_range {
            (0, 1.0, 1.0)
        } else {
            (16, 255.0 / 219.0, 255.0 / 224.0)
        };
        let fixed = |value: f64| (value * 65536.0).round() as i32;
        Self {
            black,
            luma: fixed(luma),
            red_v: fixed(chroma * 2.0 * (1.0 - kr)),
            green_u: fixed(chroma * 2.0 * (1.0 - kb) * kb / kg),
            green_v: fixed(chroma * 2.0 * (1.0 - kr) * kr / kg),
            blue_u: fixed(chroma * 2.0 * (1.0 - kb)),
        }
    }
}

fn append_yuv(picture: &frame::Video, width: usize, height: usize, matrix: &Matrix, rgb: &mut Vec<u8>) {
    let plane = |index| picture.data(index).chunks(picture.stride(index));
    rgb.reserve(width * height * 3);
    for ((y, u), v) in plane(0).zip(plane(1)).zip(plane(2)).take(height) {
        for ((&y, &u), &v) in y[..width].iter().zip(&u[..width]).zip(&v[..width]) {
            let luma = (i32::from(y) - matrix.black) * matrix.luma + 32768;
            let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
            let byte = |value: i32| (value >> 16).clamp(0, 255) as u8;
            rgb.extend_from_slice(&[
                byte(luma + matrix.red_v * v),
                byte(luma - matrix.green_u * u - matrix.green_v * v),
                byte(luma + matrix.blue_u * u),
            ]);
        }
    }
}

/// RGB24 of `width` x `height`, turned clockwise.
fn turn(rgb: &[u8], width: usize, height: usize, quarter_turns: u8) -> Vec<u8> {
    let mut turned = Vec::with_capacity(rgb.len());
    let (to_width, to_height) = if quarter_turns % 2 == 1 {
        (height, width)
    } else {
        (width, height)
    };
    for row in 0..to_height {
        for column in 0..to_width {
            let (x, y) = match quarter_turns % 4 {
                1 => (row, height - 1 - column),
                2 => (width - 1 - column, height - 1 - row),
                3 => (width - 1 - row, column),
                _ => (column, row),
            };
            turned.extend_from_slice(&rgb[3 * (y * width + x)..][..3]);
        }
    }
    turned
}

/// Appends all samples of a decoded frame, interleaved, full scale 1; with `mono` the mean of the channels.
pub(super) fn append_samples(
    sound: &frame::Audio,
    mono: bool,
    out: &mut Vec<f32>,
) -> Result<(), ffmpeg::Error> {
    let (channels, len) = (usize::from(sound.channels()), sound.samples());
    if len == 0 {
        return Ok(());
    }
    let planes = sound.planes();
    let planar = sound.is_planar();
    if channels == 0 || planes != if planar { channels } else { 1 } {
        return Err(ffmpeg::Error::InvalidData);
    }
    match sound.format() {
        Sample::U8(_) => append(sound, mono, out, |value: u8| (f32::from(value) - 128.0) / 128.0),
        Sample::I16(_) => append(sound, mono, out, |value: i16| f32::from(value) / 32768.0),
        Sample::I32(_) => append(sound, mono, out, |value: i32| {
            (f64::from(value) / 2_147_483_648.0) as f32
        }),
        // Damaged streams decode to values that are no numbers; silence harms nobody downstream.
        Sample::F32(_) => append(
            sound,
            mono,
            out,
            |value: f32| if value.is_finite() { value } else { 0.0 },
        ),
        Sample::F64(_) => append(sound, mono, out, |value: f64| {
            if value.is_finite() { value as f32 } else { 0.0 }
        }),
        Sample::None | Sample::I64(_) => return Err(ffmpeg::Error::InvalidData),
    }
    Ok(())
}

fn append<T: frame::audio::Sample + Copy>(
    sound: &frame::Audio,
    mono: bool,
    out: &mut Vec<f32>,
    scale: impl Fn(T) -> f32,
) {
    let (channels, len) = (usize::from(sound.channels()), sound.samples());
    let planes: Vec<&[T]> = (0..sound.planes()).map(|index| sound.plane::<T>(index)).collect();
    let planar = matches!(
        sound.format(),
        Sample::U8(sample::Type::Planar)
            | Sample::I16(sample::Type::Planar)
            | Sample::I32(sample::Type::Planar)
            | Sample::F32(sample::Type::Planar)
            | Sample::F64(sample::Type::Planar)
    );
    let at = |i: usize, channel: usize| {
        scale(if planar {
            planes[channel][i]
        } else {
            planes[0][i * channels + channel]
        })
    };
    let share = 1.0 / channels as f32;
    for i in 0..len {
        if mono && channels > 1 {
            out.push((0..channels).map(|channel| at(i, channel)).sum::<f32>() * share);
        } else {
            out.extend((0..channels).map(|channel| at(i, channel)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_turn_clockwise() {
        // a b c / d e f
        let rgb: Vec<u8> = (0..6).flat_map(|pixel| [pixel; 3]).collect();
        let first = |turned: &[u8]| turned.iter().step_by(3).copied().collect::<Vec<_>>();
        assert_eq!(first(&turn(&rgb, 3, 2, 1)), [3, 0, 4, 1, 5, 2]);
        assert_eq!(first(&turn(&rgb, 3, 2, 2)), [5, 4, 3, 2, 1, 0]);
        assert_eq!(first(&turn(&rgb, 3, 2, 3)), [2, 5, 1, 4, 0, 3]);
    }

    #[test]
    fn matrices_map_black_white_and_red() {
        for (space, red) in [(Space::BT470BG, [81, 90, 240]), (Space::BT709, [63, 102, 240])] {
            let matrix = Matrix::new(space, false);
            for (yuv, expected) in [
                ([16, 128, 128], [0; 3]),
                ([235, 128, 128], [255; 3]),
                (red, [255, 0, 0]),
            ] {
                let mut picture = frame::Video::new(Pixel::YUV444P, 2, 2);
                for (plane, value) in yuv.into_iter().enumerate() {
                    picture.data_mut(plane).fill(value);
                }
                let mut rgb = Vec::new();
                append_yuv(&picture, 2, 2, &matrix, &mut rgb);
                assert_eq!(rgb.len(), 12);
                for (found, expected) in rgb.iter().zip(expected.iter().cycle()) {
                    assert!(found.abs_diff(*expected) <= 2, "{space:?} {yuv:?}: {rgb:?}");
                }
            }
        }
    }
}
