//! Pictures through image: PNG, JPEG and WebP in, PNG out.

use std::fs::File;
use std::io::{BufReader, BufWriter, Cursor, Read};
use std::path::Path;

use image::{ColorType, ImageEncoder, ImageError, ImageReader, Limits};

use super::error::MediaError;
use crate::atomic::write_atomic;

/// Pixels beyond which a picture is refused: 64 million, an 8K frame and a half.
pub const MAX_PICTURE_PIXELS: u64 = 64 << 20;

/// A picture in memory, RGB or RGBA bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Row after row: shape `[height, width, channels]`.
    pub pixels: Vec<u8>,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// 3 for RGB, 4 for RGB and opacity (not premultiplied).
    pub channels: usize,
}

impl Picture {
    /// A picture of `[height, width, channels]` bytes.
    ///
    /// # Errors
    /// A size of zero, channels other than 3 or 4, or a length that does not fit.
    pub fn new(pixels: Vec<u8>, width: usize, height: usize, channels: usize) -> Result<Self, MediaError> {
        let picture = Self {
            pixels,
            width,
            height,
            channels,
        };
        picture.check()?;
        Ok(picture)
    }

    /// Whether the fields fit each other.
    fn check(&self) -> Result<(), MediaError> {
        let Self {
            pixels,
            width,
            height,
            channels,
        } = self;
        if !matches!(channels, 3 | 4) {
            return Err(MediaError::invalid(
                "picture.channels",
                channels,
                "3 (RGB) or 4 (RGBA)",
            ));
        }
        let bytes = width
            .checked_mul(*height)
            .and_then(|area| area.checked_mul(*channels));
        if bytes != Some(pixels.len()) || pixels.is_empty() {
            let expected = format!("{width}x{height}x{channels} bytes, more than none");
            return Err(MediaError::invalid(
                "picture.pixels",
                format!("{} bytes", pixels.len()),
                expected,
            ));
        }
        Ok(())
    }

    /// The picture without opacity, over a plain `background`.
    #[must_use]
    pub fn over(&self, background: [u8; 3]) -> Self {
        if self.channels == 3 {
            return self.clone();
        }
        let mut pixels = Vec::with_capacity(self.width * self.height * 3);
        for pixel in self.pixels.chunks_exact(4) {
            let alpha = u32::from(pixel[3]);
            for (&front, &back) in pixel.iter().zip(&background) {
                let mixed = u32::from(front) * alpha + u32::from(back) * (255 - alpha);
                pixels.push(((mixed + 127) / 255) as u8);
            }
        }
        Self {
            pixels,
            width: self.width,
            height: self.height,
            channels: 3,
        }
    }
}

/// Reads a PNG, JPEG or WebP file: 4 channels where the file has opacity, else 3. Depths beyond 8 bits are
/// rounded, grey becomes RGB. The format is read from the bytes, not from the name.
///
/// # Errors
/// The file is absent, no picture of these formats, broken, or larger than [`MAX_PICTURE_PIXELS`].
pub fn read_picture(path: &Path) -> Result<Picture, MediaError> {
    let file = File::open(path).map_err(|error| MediaError::io(path, "open", error))?;
    let mut bytes = Vec::new();
    // Compressed pictures are smaller than their pixels; more than this is no picture that passes the cap.
    let limit = MAX_PICTURE_PIXELS * 4;
    BufReader::new(file)
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| MediaError::io(path, "read", error))?;
    if bytes.len() as u64 > limit {
        let (found, path) = (bytes.len() as u64, path.to_path_buf());
        return Err(MediaError::TooLarge {
            path,
            what: "bytes of picture",
            found,
            limit,
        });
    }
    decode_picture(&bytes, path)
}

/// Decodes a picture in memory; `path` is only named in errors. See [`read_picture`].
///
/// # Errors
/// As [`read_picture`], except for those of the disk.
pub fn decode_picture(bytes: &[u8], path: &Path) -> Result<Picture, MediaError> {
    let failed = |error: ImageError| MediaError::not_media(path, one_line(&error.to_string()));
    let open = || {
        ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|error| MediaError::io(path, "read", error))
    };
    let (width, height) = open()?.into_dimensions().map_err(failed)?;
    let found = u64::from(width) * u64::from(height);
    if found > MAX_PICTURE_PIXELS {
        let (path, limit) = (path.to_path_buf(), MAX_PICTURE_PIXELS);
        return Err(MediaError::TooLarge {
            path,
            what: "pixels",
            found,
            limit,
        });
    }
    let mut reader = open()?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_PICTURE_PIXELS * 16);
    reader.limits(limits);
    let decoded = reader.decode().map_err(failed)?;
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let (pixels, channels) = if decoded.color().has_alpha() {
        (decoded.into_rgba8().into_raw(), 4)
    } else {
        (decoded.into_rgb8().into_raw(), 3)
    };
    Picture::new(pixels, width, height, channels)
        .map_err(|error| MediaError::not_media(path, error.to_string()))
}

/// Writes a PNG file, whole or not at all.
///
/// # Errors
/// The fields of `picture` do not fit each other, or the disk refuses.
pub fn write_png(path: &Path, picture: &Picture) -> Result<(), MediaError> {
    picture.check()?;
    let side = |value: usize| {
        u32::try_from(value)
            .map_err(|_| MediaError::invalid("picture size", value, "at most 4294967295 a side"))
    };
    let (width, height) = (side(picture.width)?, side(picture.height)?);
    let color = if picture.channels == 4 {
        ColorType::Rgba8
    } else {
        ColorType::Rgb8
    };
    let outcome = write_atomic(path, |file| {
        let mut buffered = BufWriter::new(file);
        image::codecs::png::PngEncoder::new(&mut buffered)
            .write_image(&picture.pixels, width, height, color.into())
            .map_err(|error| match error {
                ImageError::IoError(error) => error,
                other => std::io::Error::other(one_line(&other.to_string())),
            })?;
        std::io::Write::flush(&mut buffered)
    });
    outcome.map_err(|error| MediaError::io(path, "write", error))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
