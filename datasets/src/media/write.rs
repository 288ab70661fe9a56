//! Writing clips: MP4 with H.264 and AAC, ready for streaming, whole or not at all.
//!
//! Picture and sound end together: the sound is cut or padded with silence to the picture's length, every
//! packet carries its duration (else the last frame would be lost), and the AAC encoder's priming is marked
//! in the container's edit list, so that the first sample stands at zero.

use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ffmpeg_next as ffmpeg;

use super::clip::{Sound, Video};
use super::encode::{Encoding, WRITING};
use super::error::MediaError;
use super::resample::resample;
use crate::atomic::AtomicFile;

/// Tags that MP4 has a place for.
pub const METADATA_KEYS: [&str; 14] = [
    "album",
    "album_artist",
    "artist",
    "comment",
    "composer",
    "copyright",
    "date",
    "description",
    "genre",
    "grouping",
    "lyrics",
    "show",
    "synopsis",
    "title",
];

/// Presets of x264, from fast to small.
const PRESETS: [&str; 9] = [
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
];

/// Sample rates of AAC; other sounds are converted to the next higher one.
const AAC_RATES: [u32; 13] = [
    7350, 8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000,
];

/// How a clip is encoded.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Constant rate factor of x264: 0 (lossless) to 51, default 18 (visually lossless).
    pub crf: u8,
    /// Preset of x264, "ultrafast" to "veryslow", default "medium".
    pub preset: &'static str,
    /// Bits per second of the sound, default 192,000; the encoder lowers it to what the sample rate can hold.
    pub audio_bit_rate: u32,
    /// Whether the sound is cut or padded to the picture's length (default).
    pub fit_sound: bool,
    /// Tags; keys are those of [`METADATA_KEYS`].
    pub metadata: BTreeMap<String, String>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            crf: 18,
            preset: "medium",
            audio_bit_rate: 192_000,
            fit_sound: true,
            metadata: BTreeMap::new(),
        }
    }
}

/// Writes an MP4 file: H.264 (x264, 4:2:0, BT.601, limited range) and AAC, index first.
///
/// Evenly spaced frames keep their rate exactly, whole or rational (29.97 becomes 30000/1001 when `fps` is
/// that quotient); with [`Video::variable_rate`] each frame appears at its own time, to 1/90,000 s. A name
/// that is no UTF-8 gets its index at the end of the file.
///
/// # Errors
/// No frame, odd width or height (4:2:0 halves both), times that do not ascend, samples that are not finite,
/// more than 8 channels, an unknown tag, an encoder that is missing, or a disk that refuses; then nothing is
/// left behind.
pub fn write_mp4(
    path: &Path,
    video: &Video,
    sound: Option<&Sound>,
    options: &WriteOptions,
) -> Result<(), MediaError> {
    video.check()?;
    write_mp4_frames(path, video, sound, options, |push| {
        (0..video.frame_count).try_for_each(|index| push(video.frame(index)))
    })
}

/// As [`write_mp4`], with frames that come one at a time, so that no more than one has to be in memory: `feed` gives
/// them to its argument, RGB24 `[height, width, 3]`. Of `video` everything is used but the frames.
///
/// # Errors
/// As [`write_mp4`], another number or size of frames than `video` says, and what `feed` returns.
pub fn write_mp4_frames(
    path: &Path,
    video: &Video,
    sound: Option<&Sound>,
    options: &WriteOptions,
    feed: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), MediaError>) -> Result<(), MediaError>,
) -> Result<(), MediaError> {
    check(video, sound, options)?;
    let sound = sound
        .map(|sound| prepare_sound(sound, video, options))
        .transpose()?
        .filter(|sound| !sound.is_empty());
    let cannot_write = |error| MediaError::io(path, "write", error);
    let mut file = AtomicFile::create(path).map_err(cannot_write)?;
    let sink = file.file().try_clone().map_err(cannot_write)?;
    let name = file.temporary_path().to_str().map(|name| format!("file:{name}"));
    mux(path, sink, name.as_deref(), video, sound.as_ref(), options, feed)?;
    file.commit().map_err(cannot_write)
}

fn check(video: &Video, sound: Option<&Sound>, options: &WriteOptions) -> Result<(), MediaError> {
    video.check_shape()?;
    if video.frame_count == 0 {
        return Err(MediaError::invalid("video.frame_count", 0, "at least 1"));
    }
    if video.width % 2 == 1 || video.height % 2 == 1 {
        let found = format!("{}x{}", video.width, video.height);
        return Err(MediaError::invalid(
            "video size",
            found,
            "an even width and height (4:2:0 chroma)",
        ));
    }
    if video.width.max(video.height) > 16_384 {
        let found = format!("{}x{}", video.width, video.height);
        return Err(MediaError::invalid("video size", found, "at most 16384 a side"));
    }
    if video.fps > 1000.0 {
        return Err(MediaError::invalid(
            "video.fps",
            video.fps,
            "at most 1000 frames per second",
        ));
    }
    let ascend = video.times_s.windows(2).all(|pair| pair[0] < pair[1]);
    let sane = video.times_s.iter().all(|time_s| (0.0..1e6).contains(time_s));
    if video.variable_rate && !(ascend && sane) {
        return Err(MediaError::invalid(
            "video.times_s",
            "other times",
            "ascending seconds from 0 on",
        ));
    }
    if !PRESETS.contains(&options.preset) {
        return Err(MediaError::invalid(
            "preset",
            options.preset,
            format!("one of {}", PRESETS.join(", ")),
        ));
    }
    if options.crf > 51 {
        return Err(MediaError::invalid("crf", options.crf, "0 to 51"));
    }
    for (key, value) in &options.metadata {
        if !METADATA_KEYS.contains(&key.as_str()) {
            return Err(MediaError::invalid(
                "metadata key",
                key,
                format!("one of {}", METADATA_KEYS.join(", ")),
            ));
        }
        if value.contains('\0') {
            return Err(MediaError::invalid(
                "metadata value",
                format!("a NUL in {key}"),
                "text without NUL",
            ));
        }
    }
    if let Some(sound) = sound {
        sound.check()?;
        if sound.channels > 8 {
            return Err(MediaError::invalid(
                "sound.channels",
                sound.channels,
                "at most 8 (AAC)",
            ));
        }
        if !sound.samples.iter().all(|sample| sample.is_finite()) {
            return Err(MediaError::invalid(
                "sound.samples",
                "a NaN or an infinity",
                "finite numbers",
            ));
        }
    }
    Ok(())
}

/// The sound at a rate of AAC and, where wanted, of the picture's length.
fn prepare_sound(sound: &Sound, video: &Video, options: &WriteOptions) -> Result<Sound, MediaError> {
    let highest = AAC_RATES[AAC_RATES.len() - 1];
    let rate = AAC_RATES
        .into_iter()
        .find(|&rate| rate >= sound.sample_rate)
        .unwrap_or(highest);
    let mut sound = resample(sound, rate)?;
    if options.fit_sound {
        let end_s = video.duration_s()
            + if video.variable_rate {
                video.times_s[0]
            } else {
                0.0
            };
        let len = (end_s * f64::from(rate)).round() as usize;
        sound.samples.resize(len * sound.channels, 0.0);
    }
    Ok(sound)
}

/// Keeps the operating system's reason, which FFmpeg reduces to a number or loses.
struct Sink<W> {
    inner: W,
    failed: Arc<Mutex<Option<io::Error>>>,
}

impl<W> Sink<W> {
    fn note<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        outcome.map_err(|error| {
            let copy = io::Error::new(error.kind(), error.to_string());
            self.failed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
            copy
        })
    }
}

impl<W: Write> Write for Sink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let outcome = self.inner.write(bytes);
        if outcome
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
        {
            return outcome;
        }
        self.note(outcome)
    }

    fn flush(&mut self) -> io::Result<()> {
        let outcome = self.inner.flush();
        self.note(outcome)
    }
}

impl<W: Seek> Seek for Sink<W> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        let outcome = self.inner.seek(position);
        self.note(outcome)
    }
}

/// Encodes and multiplexes into `inner`; `name` is where the muxer can read its own output back, to move the
/// index.
fn mux<W: Write + Seek + Send + 'static>(
    path: &Path,
    inner: W,
    name: Option<&str>,
    video: &Video,
    sound: Option<&Sound>,
    options: &WriteOptions,
    feed: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), MediaError>) -> Result<(), MediaError>,
) -> Result<(), MediaError> {
    let failed = Arc::new(Mutex::new(None));
    let sink = Sink {
        inner,
        failed: Arc::clone(&failed),
    };
    let told = |(step, error): (&'static str, ffmpeg::Error)| match error {
        ffmpeg::Error::Other { errno } if step == WRITING => {
            MediaError::io(path, "write", io::Error::from_raw_os_error(errno))
        }
        error => MediaError::Encode {
            path: path.to_path_buf(),
            detail: format!("{step}: {error}"),
        },
    };
    let encode = || {
        let mut encoding = Encoding::open(sink, name, video, sound, options).map_err(told)?;
        let bytes = video.width * video.height * 3;
        feed(&mut |rgb| {
            if rgb.len() != bytes || encoding.pushed() == video.frame_count {
                let found = format!("frame {} of {} bytes", encoding.pushed() + 1, rgb.len());
                let expected = format!("{} frames of {bytes} bytes", video.frame_count);
                return Err(MediaError::invalid("video.frames", found, expected));
            }
            encoding.push(rgb).map_err(told)
        })?;
        if encoding.pushed() < video.frame_count {
            let expected = format!("{} frames", video.frame_count);
            return Err(MediaError::invalid("video.frames", encoding.pushed(), expected));
        }
        encoding.finish().map_err(told)
    };
    let outcome = encode();
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(MediaError::io(path, "write", error)),
        None => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    /// A disk with room for so many bytes.
    struct Full(Cursor<Vec<u8>>, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.0.position() as usize + bytes.len() > self.1 {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Full {
        fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
            self.0.seek(position)
        }
    }

    #[test]
    fn a_full_disk_is_named_wherever_it_fills() {
        let video = Video::new(vec![90; 32 * 32 * 3 * 12], 32, 32, 12.0).unwrap();
        let sound = Sound::new(vec![0.25; 16_000], 1, 16_000).unwrap();
        let path = Path::new("clip.mp4");
        let options = WriteOptions::default();
        let write = |room| {
            mux(
                path,
                Full(Cursor::new(Vec::new()), room),
                None,
                &video,
                Some(&sound),
                &options,
                |push| (0..12).try_for_each(|index| push(video.frame(index))),
            )
        };
        for room in [0, 40, 1000] {
            let error = write(room).unwrap_err().to_string();
            assert_eq!(error, "clip.mp4: cannot write: no storage space", "{room}");
        }
        write(1 << 20).unwrap();
    }

    #[test]
    fn frames_that_come_one_by_one_make_the_same_file() {
        let frames = (0..12 * 32 * 32 * 3).map(|i| (i / 97 % 251) as u8).collect();
        let video = Video::new(frames, 32, 32, 12.0).unwrap();
        let sound = Sound::new(vec![0.25; 16_000], 1, 16_000).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("a.mp4"), folder.path().join("b.mp4"));
        let options = WriteOptions::default();
        write_mp4(&whole, &video, Some(&sound), &options).unwrap();
        let shape = Video {
            frames: Vec::new(),
            ..video.clone()
        };
        let write = |count: usize| {
            write_mp4_frames(&parts, &shape, Some(&sound), &options, |push| {
                (0..count).try_for_each(|index| push(video.frame(index % 12)))
            })
        };
        write(12).unwrap();
        assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&parts).unwrap());
        std::fs::remove_file(&parts).unwrap();
        for count in [11, 13] {
            let error = write(count).unwrap_err().to_string();
            assert!(error.starts_with("video.frames: found"), "{error}");
        }
        let short = write_mp4_frames(&parts, &shape, None, &options, |push| push(&[0; 7]));
        assert!(short.unwrap_err().to_string().contains("frame 1 of 7 bytes"));
        assert!(!parts.exists());
    }
}
