//! Decoded media in memory: pictures in a row, samples in a row, one clock for both.

use std::collections::BTreeMap;

use super::error::MediaError;

/// Frames of a film, decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Video {
    /// RGB24, row after row, frame after frame: shape `[frame_count, height, width, 3]`.
    pub frames: Vec<u8>,
    /// Number of frames.
    pub frame_count: usize,
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// When each frame appears, in seconds on the clip's clock; ascending, one a frame.
    pub times_s: Vec<f64>,
    /// Average rate in frames per second: `frame_count` over the time from the first frame to the end of the
    /// last.
    pub fps: f64,
    /// Whether the frames are not evenly spaced.
    pub variable_rate: bool,
}

impl Video {
    /// Evenly spaced frames that start at zero; `frames` is RGB24 `[F, height, width, 3]`.
    ///
    /// # Errors
    /// A size of zero, a length that is no whole number of frames, a rate that is not positive and finite.
    pub fn new(frames: Vec<u8>, width: usize, height: usize, fps: f64) -> Result<Self, MediaError> {
        let bytes = frame_bytes(width, height)?;
        if !frames.len().is_multiple_of(bytes) {
            let expected = format!("a multiple of {bytes} ({width}x{height} RGB)");
            return Err(MediaError::invalid(
                "video.frames",
                format!("{} bytes", frames.len()),
                expected,
            ));
        }
        check_rate("video.fps", fps)?;
        let frame_count = frames.len() / bytes;
        let times_s = (0..frame_count).map(|k| k as f64 / fps).collect();
        Ok(Self {
            frames,
            frame_count,
            width,
            height,
            times_s,
            fps,
            variable_rate: false,
        })
    }

    /// One frame, RGB24 `[height, width, 3]`.
    ///
    /// # Panics
    /// `index` is not below `frame_count`.
    pub fn frame(&self, index: usize) -> &[u8] {
        let bytes = self.width * self.height * 3;
        &self.frames[index * bytes..(index + 1) * bytes]
    }

    /// Seconds from the first frame to the end of the last one.
    pub fn duration_s(&self) -> f64 {
        self.frame_count as f64 / self.fps
    }

    #[cfg(feature = "media")]
    pub(crate) fn check(&self) -> Result<(), MediaError> {
        let bytes = frame_bytes(self.width, self.height)?;
        let expected = self.frame_count.checked_mul(bytes);
        if expected != Some(self.frames.len()) {
            let expected = format!("{} frames of {bytes} bytes", self.frame_count);
            return Err(MediaError::invalid(
                "video.frames",
                format!("{} bytes", self.frames.len()),
                expected,
            ));
        }
        self.check_shape()
    }

    /// Checks everything but the frames themselves.
    #[cfg(feature = "media")]
    pub(crate) fn check_shape(&self) -> Result<(), MediaError> {
        frame_bytes(self.width, self.height)?;
        if self.times_s.len() != self.frame_count {
            let expected = format!("{} (one a frame)", self.frame_count);
            return Err(MediaError::invalid("video.times_s", self.times_s.len(), expected));
        }
        check_rate("video.fps", self.fps)
    }
}

/// Bytes of one RGB24 frame.
fn frame_bytes(width: usize, height: usize) -> Result<usize, MediaError> {
    match width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3)) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(MediaError::invalid(
            "video size",
            format!("{width}x{height}"),
            "a positive width and height",
        )),
    }
}

fn check_rate(field: &'static str, fps: f64) -> Result<(), MediaError> {
    if fps.is_finite() && fps > 0.0 {
        return Ok(());
    }
    Err(MediaError::invalid(
        field,
        fps,
        "a positive number of frames per second",
    ))
}

/// Samples of a sound, decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct Sound {
    /// Interleaved samples, full scale is 1: shape `[len, channels]`.
    pub samples: Vec<f32>,
    /// Number of channels, at least 1.
    pub channels: usize,
    /// Samples per second and channel.
    pub sample_rate: u32,
}

impl Sound {
    /// A sound of interleaved samples.
    ///
    /// # Errors
    /// No channel, a sample rate of zero, or a length that is no multiple of `channels`.
    pub fn new(samples: Vec<f32>, channels: usize, sample_rate: u32) -> Result<Self, MediaError> {
        let sound = Self {
            samples,
            channels,
            sample_rate,
        };
        sound.check()?;
        Ok(sound)
    }

    pub(crate) fn check(&self) -> Result<(), MediaError> {
        if self.channels == 0 {
            return Err(MediaError::invalid("sound.channels", 0, "at least 1"));
        }
        if self.sample_rate == 0 {
            return Err(MediaError::invalid(
                "sound.sample_rate",
                0,
                "a positive rate in Hz",
            ));
        }
        if !self.samples.len().is_multiple_of(self.channels) {
            let expected = format!("a multiple of {} channels", self.channels);
            return Err(MediaError::invalid("sound.samples", self.samples.len(), expected));
        }
        Ok(())
    }

    /// Samples per channel.
    pub fn len(&self) -> usize {
        self.samples.len() / self.channels
    }

    /// Whether there is no sample at all.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Length in seconds.
    pub fn duration_s(&self) -> f64 {
        self.len() as f64 / f64::from(self.sample_rate)
    }

    /// The mean of all channels as a sound of one channel.
    #[must_use]
    pub fn mono(&self) -> Self {
        let samples = if self.channels == 1 {
            self.samples.clone()
        } else {
            let scale = 1.0 / self.channels as f32;
            self.samples
                .chunks_exact(self.channels)
                .map(|frame| frame.iter().sum::<f32>() * scale)
                .collect()
        };
        Self {
            samples,
            channels: 1,
            sample_rate: self.sample_rate,
        }
    }

    /// One channel as a sound of its own, or `None` where `index` is not below `channels`.
    pub fn channel(&self, index: usize) -> Option<Self> {
        (index < self.channels).then(|| Self {
            samples: self
                .samples
                .iter()
                .skip(index)
                .step_by(self.channels)
                .copied()
                .collect(),
            channels: 1,
            sample_rate: self.sample_rate,
        })
    }

    /// Whether nothing can be heard: no sample reaches [`SILENCE`]. An empty sound is silent.
    pub fn is_silent(&self) -> bool {
        self.samples.iter().all(|sample| sample.abs() < SILENCE)
    }
}

/// Peak below which a sound counts as silent: -80 dB of full scale, above the noise of lossy codecs and of
/// dither.
pub const SILENCE: f32 = 1e-4;

/// What a container says about itself, before anything is decoded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Info {
    /// Name of the container format.
    pub container: String,
    /// Length in seconds as the container declares it, 0 where it does not.
    pub duration_s: f64,
    /// The picture stream that would be read, absent for a sound file.
    pub video: Option<VideoInfo>,
    /// The sound stream that would be read, absent for a silent film.
    pub sound: Option<SoundInfo>,
    /// Tags of the container, keys in lower case: `title`, `comment`, `description`, ...
    pub metadata: BTreeMap<String, String>,
}

/// What a container says about its picture stream.
#[derive(Clone, Debug, PartialEq)]
pub struct VideoInfo {
    /// Name of the codec.
    pub codec: String,
    /// Width in pixels as shown (after the container's rotation).
    pub width: usize,
    /// Height in pixels as shown.
    pub height: usize,
    /// Declared average rate in frames per second, 0 where unknown.
    pub fps: f64,
    /// Declared number of frames, 0 where unknown.
    pub frame_count: u64,
    /// Declared length in seconds, 0 where unknown.
    pub duration_s: f64,
}

/// What a container says about its sound stream.
#[derive(Clone, Debug, PartialEq)]
pub struct SoundInfo {
    /// Name of the codec.
    pub codec: String,
    /// Number of channels.
    pub channels: usize,
    /// Samples per second and channel.
    pub sample_rate: u32,
    /// Declared length in seconds, 0 where unknown.
    pub duration_s: f64,
}

/// A decoded clip. Time zero is where its earlier stream starts; `sound` has its first sample there.
#[derive(Clone, Debug, PartialEq)]
pub struct Clip {
    /// The picture, `None` without a picture stream or when it held no frame in the range.
    pub video: Option<Video>,
    /// The sound, `None` without a sound stream or when it held no sample in the range.
    pub sound: Option<Sound>,
    /// What the container said.
    pub info: Info,
    /// Whether the file ends, or is broken, before the length that it declares; what decoded is here.
    pub truncated: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_averaged_and_picked() {
        let sound = Sound::new(vec![1.0, 0.0, 0.5, 0.25, -1.0, 0.0], 2, 8000).unwrap();
        assert_eq!(sound.mono().samples, [0.5, 0.375, -0.5]);
        assert_eq!(sound.channel(1).unwrap().samples, [0.0, 0.25, 0.0]);
        assert!(sound.channel(2).is_none());
        assert_eq!(sound.duration_s(), 3.0 / 8000.0);
        assert!(!sound.is_silent());
        assert!(Sound::new(vec![0.00009; 4], 1, 8000).unwrap().is_silent());
        assert!(Sound::new(Vec::new(), 1, 8000).unwrap().is_silent());
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        assert!(Sound::new(vec![0.0; 3], 2, 8000).is_err());
        assert!(Sound::new(Vec::new(), 0, 8000).is_err());
        assert!(Sound::new(Vec::new(), 1, 0).is_err());
        assert!(Video::new(vec![0; 11], 2, 2, 12.0).is_err());
        assert!(Video::new(vec![0; 12], 2, 2, 0.0).is_err());
        assert!(Video::new(vec![0; 12], 2, 2, f64::NAN).is_err());
        assert!(Video::new(Vec::new(), usize::MAX, 2, 12.0).is_err());
        let video = Video::new(vec![7; 24], 2, 2, 12.0).unwrap();
        assert_eq!((video.frame_count, video.times_s[1]), (2, 1.0 / 12.0));
        assert_eq!(video.frame(1), [7; 12]);
    }
}
