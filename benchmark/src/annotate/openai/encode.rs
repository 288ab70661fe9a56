//! Pictures and sounds as text.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fulgur_datasets::media::{Picture, Sound};
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;

/// Quality of the pictures, of 1 to 100.
const QUALITY: u8 = 85;

/// A picture as a JPEG in an address.
pub(super) fn jpeg_url(picture: &Picture) -> Result<String, String> {
    let opaque;
    let picture = match picture.channels {
        3 => picture,
        _ => {
            opaque = picture.over([255, 255, 255]);
            &opaque
        }
    };
    let mut bytes = Vec::new();
    let (width, height) = (picture.width as u32, picture.height as u32);
    JpegEncoder::new_with_quality(&mut bytes, QUALITY)
        .encode(&picture.pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(|error| format!("a frame of {width}x{height}: {error}"))?;
    Ok(format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes)))
}

/// The bytes of a WAV file of 16 bits, in base64.
pub(super) fn wav_base64(sound: &Sound) -> String {
    let bytes_a_frame = 2 * sound.channels as u32;
    let data = 2 * sound.samples.len() as u32;
    let mut wav = Vec::with_capacity(44 + data as usize);
    wav.extend_from_slice(b"RIFF");
    wav.extend_from_slice(&(36 + data).to_le_bytes());
    wav.extend_from_slice(b"WAVEfmt ");
    wav.extend_from_slice(&16u32.to_le_bytes());
    wav.extend_from_slice(&1u16.to_le_bytes());
    wav.extend_from_slice(&(sound.channels as u16).to_le_bytes());
    wav.extend_from_slice(&sound.sample_rate.to_le_bytes());
    wav.extend_from_slice(&(sound.sample_rate * bytes_a_frame).to_le_bytes());
    wav.extend_from_slice(&(bytes_a_frame as u16).to_le_bytes());
    wav.extend_from_slice(&16u16.to_le_bytes());
    wav.extend_from_slice(b"data");
    wav.extend_from_slice(&data.to_le_bytes());
    for sample in &sound.samples {
        let value = (sample * 32_768.0).round().clamp(-32_768.0, 32_767.0) as i16;
        wav.extend_from_slice(&value.to_le_bytes());
    }
    STANDARD.encode(wav)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fulgur_datasets::media::{decode_picture, read_wav};

    #[test]
    fn readers_of_files_read_what_is_sent() {
        let folder = tempfile::tempdir().unwrap();
        let sound = Sound::new(vec![0.0, 0.5, -1.0, 0.25], 1, 16_000).unwrap();
        let path = folder.path().join("a.wav");
        std::fs::write(&path, STANDARD.decode(wav_base64(&sound)).unwrap()).unwrap();
        assert_eq!(read_wav(&path).unwrap(), sound);
        let picture = Picture::new([200, 30, 60].repeat(64), 8, 8, 3).unwrap();
        let url = jpeg_url(&picture).unwrap();
        let jpeg = STANDARD
            .decode(url.strip_prefix("data:image/jpeg;base64,").unwrap())
            .unwrap();
        let read = decode_picture(&jpeg, folder.path()).unwrap();
        assert_eq!((read.width, read.height), (8, 8));
        let close = read
            .pixels
            .iter()
            .zip(&picture.pixels)
            .all(|(a, b)| a.abs_diff(*b) < 12);
        assert!(close, "{:?}", &read.pixels[..3]);
    }
}
