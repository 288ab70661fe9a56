//! WAV files through hound: integers of 8 to 32 bits and 32-bit floats in, 16-bit integers or floats out.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use hound::{SampleFormat, WavReader, WavSpec, WavWriter};

use super::clip::Sound;
use super::error::MediaError;
use crate::atomic::write_atomic;

/// How the samples of a WAV file are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WavFormat {
    /// 16-bit integers; samples beyond full scale are clipped.
    #[default]
    Int16,
    /// 32-bit floats, bit for bit.
    Float,
}

/// Reads a WAV file; integers are scaled so that full scale is 1.
///
/// # Errors
/// The file is absent, no WAV, of an unsupported sample format, or ends before the length it declares.
pub fn read_wav(path: &Path) -> Result<Sound, MediaError> {
    let failed = |error| from_hound(path, "read", error);
    let file = File::open(path).map_err(|error| MediaError::io(path, "open", error))?;
    let on_disk = file
        .metadata()
        .map_err(|error| MediaError::io(path, "read", error))?
        .len();
    let mut reader = WavReader::new(BufReader::new(file)).map_err(failed)?;
    let spec = reader.spec();
    // The header's length is a promise; only what the file can hold is allocated for.
    let bytes = u64::from(reader.len()) * u64::from(spec.bits_per_sample.div_ceil(8));
    if bytes > on_disk {
        let detail = format!("declares {bytes} bytes of samples, the file has {on_disk}");
        return Err(MediaError::Decode {
            path: path.to_path_buf(),
            detail,
        });
    }
    let mut samples = Vec::with_capacity(reader.len() as usize);
    match spec.sample_format {
        SampleFormat::Float => {
            for sample in reader.samples::<f32>() {
                samples.push(sample.map_err(failed)?);
            }
        }
        SampleFormat::Int => {
            let scale = 1.0 / (1_i64 << (spec.bits_per_sample - 1)) as f64;
            for sample in reader.samples::<i32>() {
                samples.push((f64::from(sample.map_err(failed)?) * scale) as f32);
            }
        }
    }
    Sound::new(samples, usize::from(spec.channels), spec.sample_rate)
        .map_err(|error| MediaError::not_media(path, error.to_string()))
}

/// Writes a WAV file, whole or not at all. Samples that are not numbers are refused for [`WavFormat::Int16`].
///
/// # Errors
/// More than 65,535 channels, samples that are not numbers, or the disk refuses.
pub fn write_wav(path: &Path, sound: &Sound, format: WavFormat) -> Result<(), MediaError> {
    sound.check()?;
    let channels = u16::try_from(sound.channels)
        .map_err(|_| MediaError::invalid("sound.channels", sound.channels, "at most 65535"))?;
    if format == WavFormat::Int16 && sound.samples.iter().any(|sample| sample.is_nan()) {
        return Err(MediaError::invalid("sound.samples", "NaN", "numbers"));
    }
    let (bits_per_sample, sample_format) = match format {
        WavFormat::Int16 => (16, SampleFormat::Int),
        WavFormat::Float => (32, SampleFormat::Float),
    };
    let spec = WavSpec {
        channels,
        sample_rate: sound.sample_rate,
        bits_per_sample,
        sample_format,
    };
    let outcome = write_atomic(path, |file| {
        let write = || -> Result<(), hound::Error> {
            let mut writer = WavWriter::new(BufWriter::new(file), spec)?;
            for &sample in &sound.samples {
                match format {
                    WavFormat::Int16 => writer.write_sample(to_i16(sample))?,
                    WavFormat::Float => writer.write_sample(sample)?,
                }
            }
            writer.finalize()
        };
        write().map_err(|error| match error {
            hound::Error::IoError(error) => error,
            other => std::io::Error::other(other.to_string()),
        })
    });
    outcome.map_err(|error| MediaError::io(path, "write", error))
}

/// Rounds to the nearest 16-bit value; the scale is the one that [`read_wav`] divides by.
fn to_i16(sample: f32) -> i16 {
    (sample * 32768.0).round().clamp(-32768.0, 32767.0) as i16
}

fn from_hound(path: &Path, action: &'static str, error: hound::Error) -> MediaError {
    match error {
        hound::Error::IoError(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
            MediaError::io(path, action, error)
        }
        other => MediaError::not_media(path, format!("WAV: {other}")),
    }
}
