//! Pictures through image: PNG, JPEG, WebP, GIF and BMP in, PNG out.

use std::fs::File;
use std::io::{BufReader, BufWriter, Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ImageDecoder, ImageEncoder, ImageError, ImageFormat, ImageReader, Limits,
};

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

/// Reads a PNG, JPEG, WebP, GIF or BMP file: 4 channels where the file has opacity, else 3. Depths beyond 8 bits are
/// rounded, grey and CMYK become RGB, of an animation the first frame is taken. The format is read from the bytes, not from
/// the name. Pixels are as they are stored: [`read_upright`] turns them.
///
/// # Errors
/// The file is absent, no picture of these formats, broken or cut off, or larger than [`MAX_PICTURE_PIXELS`].
pub fn read_picture(path: &Path) -> Result<Picture, MediaError> {
    decode_picture(&read_bytes(path)?, path)
}

/// As [`read_picture`], turned and mirrored as the orientation in its EXIF data says.
///
/// # Errors
/// As [`read_picture`].
pub fn read_upright(path: &Path) -> Result<Picture, MediaError> {
    decode_upright(&read_bytes(path)?, path)
}

/// Width and height of the picture in a file, as stored, from its header alone.
///
/// # Errors
/// The file is absent, no picture of the formats of [`read_picture`] ([`MediaError::NotMedia`]), one whose header is broken
/// ([`MediaError::Decode`]), or larger than [`MAX_PICTURE_PIXELS`].
pub fn probe_picture(path: &Path) -> Result<(usize, usize), MediaError> {
    let file = File::open(path).map_err(|error| MediaError::io(path, "open", error))?;
    let found = file
        .metadata()
        .map_err(|error| MediaError::io(path, "read", error))?
        .len();
    if found > MAX_FILE_BYTES {
        return Err(too_large(path, "bytes of picture", found, MAX_FILE_BYTES));
    }
    let reader = ImageReader::new(BufReader::new(file))
        .with_guessed_format()
        .map_err(|error| MediaError::io(path, "read", error))?;
    let is_known = reader.format().is_some();
    let size = reader.into_dimensions().map_err(|error| match error {
        ImageError::Unsupported(_) => refused(path, &error),
        _ if !is_known => refused(path, &error),
        // The format is one of ours, its header is not whole.
        _ => MediaError::Decode {
            path: path.to_path_buf(),
            detail: one_line(&error.to_string()),
        },
    })?;
    checked_size(size, path)
}

/// Decodes a picture in memory; `path` is only named in errors. See [`read_picture`].
///
/// # Errors
/// As [`read_picture`], except for those of the disk.
pub fn decode_picture(bytes: &[u8], path: &Path) -> Result<Picture, MediaError> {
    decode(bytes, path, false)
}

/// Decodes a picture in memory; `path` is only named in errors. See [`read_upright`].
///
/// # Errors
/// As [`read_picture`], except for those of the disk.
pub fn decode_upright(bytes: &[u8], path: &Path) -> Result<Picture, MediaError> {
    decode(bytes, path, true)
}

/// Compressed pictures are smaller than their pixels; more than this is no picture that passes the cap.
const MAX_FILE_BYTES: u64 = MAX_PICTURE_PIXELS * 4;

fn read_bytes(path: &Path) -> Result<Vec<u8>, MediaError> {
    let file = File::open(path).map_err(|error| MediaError::io(path, "open", error))?;
    let mut bytes = Vec::new();
    BufReader::new(file)
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| MediaError::io(path, "read", error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(too_large(
            path,
            "bytes of picture",
            bytes.len() as u64,
            MAX_FILE_BYTES,
        ));
    }
    Ok(bytes)
}

fn decode(bytes: &[u8], path: &Path, upright: bool) -> Result<Picture, MediaError> {
    let failed = |error: ImageError| refused(path, &error);
    let open = || {
        ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|error| MediaError::io(path, "read", error))
    };
    checked_size(open()?.into_dimensions().map_err(failed)?, path)?;
    let mut reader = open()?;
    if reader.format() == Some(ImageFormat::Jpeg) && !jpeg_is_whole(bytes) {
        // The decoder fills what is missing with grey.
        return Err(MediaError::not_media(
            path,
            "cut off: a JPEG file without its end",
        ));
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_PICTURE_PIXELS * 16);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder().map_err(failed)?;
    limits.reserve(decoder.total_bytes()).map_err(failed)?;
    decoder.set_limits(limits).map_err(failed)?;
    let orientation = match upright {
        true => decoder.orientation().map_err(failed)?,
        false => Orientation::NoTransforms,
    };
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(failed)?;
    decoded.apply_orientation(orientation);
    let (width, height) = (decoded.width() as usize, decoded.height() as usize);
    let (pixels, channels) = if decoded.color().has_alpha() {
        (decoded.into_rgba8().into_raw(), 4)
    } else {
        (decoded.into_rgb8().into_raw(), 3)
    };
    Picture::new(pixels, width, height, channels)
        .map_err(|error| MediaError::not_media(path, error.to_string()))
}

fn refused(path: &Path, error: &ImageError) -> MediaError {
    MediaError::not_media(path, one_line(&error.to_string()))
}

fn too_large(path: &Path, what: &'static str, found: u64, limit: u64) -> MediaError {
    let path = path.to_path_buf();
    MediaError::TooLarge {
        path,
        what,
        found,
        limit,
    }
}

fn checked_size((width, height): (u32, u32), path: &Path) -> Result<(usize, usize), MediaError> {
    let found = u64::from(width) * u64::from(height);
    if found > MAX_PICTURE_PIXELS {
        return Err(too_large(path, "pixels", found, MAX_PICTURE_PIXELS));
    }
    if found == 0 {
        return Err(MediaError::not_media(path, format!("{width} x {height} pixels")));
    }
    Ok((width as usize, height as usize))
}

/// Whether an end marker follows the first scan: in compressed data every 0xff is stuffed, so none is found by chance.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    const END: [u8; 2] = [0xff, 0xd9];
    // Segments are skipped, because thumbnails in them have ends of their own.
    let mut at = 2;
    while let Some(&[0xff, marker]) = bytes.get(at..at + 2) {
        at += 2;
        match marker {
            SCAN => return bytes[at..].windows(2).any(|pair| pair == END),
            // Fill bytes, and markers without a length.
            0xff => at -= 1,
            0x01 | 0xd0..=0xd8 => {}
            _ => match bytes.get(at..at + 2) {
                Some(&[high, low]) => at += usize::from(u16::from_be_bytes([high, low])),
                _ => return false,
            },
        }
    }
    // Not in the form that is known here: what the decoder says counts.
    at < bytes.len()
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
