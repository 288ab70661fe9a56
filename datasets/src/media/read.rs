//! Reading clips: whole, in part, or frame by frame.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use ffmpeg_next::frame;

use super::clip::{Clip, Info, Sound, Video};
use super::convert::{ToRgb, append_samples};
use super::error::MediaError;
use super::resample::resample;
use super::source::{Piece, Source, Wanted};

/// Slack when a time is compared with the border of a range, in seconds.
const EDGE_S: f64 = 1e-6;
/// Jumps of the sound's timestamps below this are rounding of the container, in seconds.
const JITTER_S: f64 = 0.01;
/// A start earlier than this is decoded up to; later ones are sought.
const SEEK_FROM_S: f64 = 2.0;
/// Sound decoded before the start, so that the decoder has settled, in seconds.
const PREROLL_S: f64 = 0.5;

/// What to read, in which shape, and how much at most.
#[derive(Clone, Debug)]
pub struct ReadOptions {
    /// Start in seconds on the clip's clock; times of the result are relative to it.
    pub start_s: f64,
    /// Length in seconds; `None` reads to the end.
    pub duration_s: Option<f64>,
    /// Frames at most; the sound is not shortened by it.
    pub max_frames: Option<usize>,
    /// Width and height to scale to (area mean when smaller, bicubic else); the aspect is not kept.
    pub size: Option<(usize, usize)>,
    /// Fixed rate: frame k is the one nearest in time to `k / fps`, of two the earlier one.
    pub fps: Option<f64>,
    /// Sample rate in Hz to convert to.
    pub sample_rate: Option<u32>,
    /// Average the channels while decoding.
    pub mono: bool,
    /// Whether the picture is wanted.
    pub video: bool,
    /// Whether the sound is wanted.
    pub sound: bool,
    /// Pixels a frame at most, in the file and after scaling (default 64 Mi).
    pub max_pixels: u64,
    /// Bytes of frames and samples held at most (default 2 GiB); longer films go through [`for_each_frame`].
    pub max_bytes: u64,
    /// Time without a decoded frame after which reading is given up (default 30 s). It is checked at every
    /// read and between packets, not inside a codec.
    pub stall_limit: Duration,
    /// Raised by another thread to give up.
    pub cancel: Option<Arc<AtomicBool>>,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            start_s: 0.0,
            duration_s: None,
            max_frames: None,
            size: None,
            fps: None,
            sample_rate: None,
            mono: false,
            video: true,
            sound: true,
            max_pixels: 64 << 20,
            max_bytes: 2 << 30,
            stall_limit: Duration::from_secs(30),
            cancel: None,
        }
    }
}

impl ReadOptions {
    fn check(&self) -> Result<(), MediaError> {
        if !(self.start_s.is_finite() && self.start_s >= 0.0) {
            return Err(MediaError::invalid(
                "start_s",
                self.start_s,
                "a finite number of seconds, 0 or more",
            ));
        }
        if let Some(duration_s) = self.duration_s
            && !(duration_s.is_finite() && duration_s > 0.0)
        {
            return Err(MediaError::invalid(
                "duration_s",
                duration_s,
                "a positive number of seconds",
            ));
        }
        if let Some(fps) = self.fps
            && !(fps.is_finite() && fps > 0.0 && fps <= 1000.0)
        {
            return Err(MediaError::invalid(
                "fps",
                fps,
                "above 0, at most 1000 frames per second",
            ));
        }
        if let Some((width, height)) = self.size {
            let pixels = (width as u64).checked_mul(height as u64);
            if !pixels.is_some_and(|pixels| (1..=self.max_pixels.min(i32::MAX as u64)).contains(&pixels)) {
                let expected = format!("1 to {} pixels", self.max_pixels);
                return Err(MediaError::invalid("size", format!("{width}x{height}"), expected));
            }
        }
        Ok(())
    }

    fn end_s(&self) -> f64 {
        self.duration_s
            .map_or(f64::INFINITY, |duration_s| self.start_s + duration_s)
    }
}

/// What a container says about itself; nothing is decoded but what its format needs for that.
///
/// # Errors
/// The file is absent, or no media with a picture or a sound stream that can be decoded.
pub fn probe(path: &Path) -> Result<Info, MediaError> {
    Source::open(path, &ReadOptions::default()).map(|source| source.info)
}

/// Reads a clip, or the part of it that the options name.
///
/// A file that breaks off gives what decodes, with [`Clip::truncated`] set.
///
/// # Errors
/// Absent or unreadable files, no media, nothing decodable, a limit passed, cancelled, or options out of
/// range.
pub fn read_clip(path: &Path, options: &ReadOptions) -> Result<Clip, MediaError> {
    let mut frames = Vec::new();
    let mut times_s = Vec::new();
    let mut size = (0, 0);
    let mut read = Reading::start(path, options)?;
    let mut keep = |shown: &Frame<'_>| {
        size = (shown.width, shown.height);
        times_s.push(shown.time_s);
        frames.extend_from_slice(shown.rgb);
        ControlFlow::Continue(())
    };
    read.run(&mut keep)?;
    let outcome = read.finish(&mut keep)?;
    let frame_count = times_s.len();
    let video = (frame_count > 0).then(|| {
        let (fps, variable_rate) = match options.fps {
            Some(fps) => (fps, false),
            None => (
                frame_count as f64 / (outcome.picture_end_s - times_s[0]),
                varies(&times_s),
            ),
        };
        Video {
            frames,
            frame_count,
            width: size.0,
            height: size.1,
            times_s,
            fps,
            variable_rate,
        }
    });
    let sound = match (outcome.sound, options.sample_rate) {
        (Some(sound), Some(rate)) => Some(resample(&sound, rate)?),
        (sound, _) => sound,
    };
    if video.is_none() && sound.is_none() && outcome.truncated {
        let detail = "neither a frame nor a sample survives".to_owned();
        return Err(MediaError::Decode {
            path: path.to_path_buf(),
            detail,
        });
    }
    Ok(Clip {
        video,
        sound,
        info: outcome.info,
        truncated: outcome.truncated,
    })
}

/// Reads the sound of any container, or of a sound file (OGG, FLAC, WAV, MP3, ...), at its own rate or at
/// `rate`.
///
/// # Errors
/// As [`read_clip`], and [`MediaError::NoStream`] without sound.
pub fn read_sound(path: &Path, rate: Option<u32>) -> Result<Sound, MediaError> {
    let clip = read_clip(
        path,
        &ReadOptions {
            video: false,
            sample_rate: rate,
            ..ReadOptions::default()
        },
    )?;
    clip.sound.ok_or_else(|| MediaError::NoStream {
        path: path.to_path_buf(),
        wanted: "audio",
    })
}

/// One frame on its way through [`for_each_frame`].
#[derive(Debug)]
pub struct Frame<'a> {
    /// Position in the row of delivered frames.
    pub index: usize,
    /// When it appears, in seconds after `start_s`.
    pub time_s: f64,
    /// RGB24, shape `[height, width, 3]`.
    pub rgb: &'a [u8],
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
}

/// What [`for_each_frame`] went through.
#[derive(Clone, Debug, PartialEq)]
pub struct Streamed {
    /// Number of frames delivered.
    pub frames: usize,
    /// What the container said.
    pub info: Info,
    /// Whether the file breaks off before the length that it declares.
    pub truncated: bool,
}

/// Decodes the picture frame by frame, one in memory at a time; `see` may break off.
///
/// # Errors
/// As [`read_clip`], and [`MediaError::NoStream`] without picture.
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use std::path::Path;
/// use fulgur_datasets::media::{ReadOptions, for_each_frame};
/// let options = ReadOptions { fps: Some(12.0), size: Some((128, 72)), ..ReadOptions::default() };
/// let mut mean = Vec::new();
/// for_each_frame(Path::new("film.mp4"), &options, |frame| {
///     let sum: u64 = frame.rgb.iter().map(|&byte| u64::from(byte)).sum();
///     mean.push((frame.time_s, sum / frame.rgb.len() as u64));
///     ControlFlow::Continue(())
/// })?;
/// # Ok::<(), fulgur_datasets::media::MediaError>(())
/// ```
pub fn for_each_frame(
    path: &Path,
    options: &ReadOptions,
    mut see: impl FnMut(&Frame<'_>) -> ControlFlow<()>,
) -> Result<Streamed, MediaError> {
    let options = ReadOptions {
        sound: false,
        video: true,
        max_bytes: u64::MAX,
        ..options.clone()
    };
    let mut read = Reading::start(path, &options)?;
    if read.source.info.video.is_none() {
        return Err(MediaError::NoStream {
            path: path.to_path_buf(),
            wanted: "video",
        });
    }
    read.run(&mut see)?;
    let outcome = read.finish(&mut see)?;
    Ok(Streamed {
        frames: outcome.frames,
        info: outcome.info,
        truncated: outcome.truncated,
    })
}

/// A reader at work.
struct Reading<'a> {
    options: &'a ReadOptions,
    source: Source,
    pictures: Pictures<'a>,
    sound: Samples<'a>,
}

/// What a reader leaves when it is done.
struct Outcome {
    sound: Option<Sound>,
    info: Info,
    frames: usize,
    picture_end_s: f64,
    truncated: bool,
}

impl<'a> Reading<'a> {
    fn start(path: &'a Path, options: &'a ReadOptions) -> Result<Self, MediaError> {
        options.check()?;
        let mut source = Source::open(path, options)?;
        // Sound alone decodes hundreds of times faster than it plays, and some of its formats seek badly.
        if source.info.video.is_some() && options.start_s > SEEK_FROM_S {
            source.seek(options.start_s - PREROLL_S, options)?;
        }
        let declared_s = source.info.sound.as_ref().map_or(0.0, |sound| sound.duration_s);
        let pictures = Pictures::new(path, options, source.quarter_turns);
        let sound = Samples {
            path,
            options,
            declared_s,
            sound: None,
            stopped: false,
        };
        Ok(Self {
            options,
            source,
            pictures,
            sound,
        })
    }

    fn run(&mut self, see: &mut dyn FnMut(&Frame<'_>) -> ControlFlow<()>) -> Result<(), MediaError> {
        let Self {
            source,
            pictures,
            sound,
            ..
        } = self;
        source.pump(&mut |piece| match piece {
            Piece::Picture {
                frame,
                time_s,
                duration_s,
            } => pictures.take(frame, time_s, duration_s, see),
            Piece::Samples { frame, time_s } => sound.take(&frame, time_s),
        })
    }

    fn finish(mut self, see: &mut dyn FnMut(&Frame<'_>) -> ControlFlow<()>) -> Result<Outcome, MediaError> {
        self.pictures.flush(see)?;
        let packets_end_s = self.source.sound_packets_end_s();
        let sound_s = self.sound.end_s();
        let sound = self.sound.finish(packets_end_s);
        let end_s = self.options.end_s();
        // Declared lengths of formats without an index are guesses from the bit rate.
        let guessed = matches!(self.source.info.container.as_str(), "mp3" | "aac");
        let short = |declared_s: f64, found_s: f64, slack_s: f64| {
            !guessed && declared_s > 0.0 && found_s + slack_s < declared_s.min(end_s)
        };
        let mut truncated = self.source.broken;
        if let Some(video) = &self.source.info.video
            && self.options.video
            && !self.pictures.stopped
        {
            let slack_s = if video.fps > 0.0 { 2.0 / video.fps } else { 0.25 };
            truncated |= short(video.duration_s, self.pictures.reached_s, slack_s.max(0.1));
        }
        if let Some(declared) = &self.source.info.sound
            && self.options.sound
        {
            truncated |= short(declared.duration_s, sound_s, 0.1);
        }
        Ok(Outcome {
            sound,
            info: self.source.info,
            frames: self.pictures.delivered,
            picture_end_s: self.pictures.end_s,
            truncated,
        })
    }
}

/// Chooses frames, converts them and hands them on.
struct Pictures<'a> {
    path: &'a Path,
    options: &'a ReadOptions,
    convert: ToRgb,
    rgb: Vec<u8>,
    bytes: u64,
    delivered: usize,
    /// The latest frame, while a fixed rate decides between it and the next.
    held: Option<(frame::Video, f64)>,
    /// End of the last delivered frame, relative to the start.
    end_s: f64,
    /// End of the last decoded frame on the clip's clock.
    reached_s: f64,
    /// Whether the caller or the number of frames ended it.
    stopped: bool,
}

impl<'a> Pictures<'a> {
    fn new(path: &'a Path, options: &'a ReadOptions, quarter_turns: u8) -> Self {
        Self {
            path,
            options,
            convert: ToRgb::new(options.size, quarter_turns),
            rgb: Vec::new(),
            bytes: 0,
            delivered: 0,
            held: None,
            end_s: 0.0,
            reached_s: 0.0,
            stopped: options.max_frames == Some(0),
        }
    }

    fn take(
        &mut self,
        picture: frame::Video,
        time_s: f64,
        duration_s: f64,
        see: &mut dyn FnMut(&Frame<'_>) -> ControlFlow<()>,
    ) -> Result<Wanted, MediaError> {
        if self.stopped {
            return Ok(Wanted::Enough);
        }
        let Some(fps) = self.options.fps else {
            if time_s + EDGE_S >= self.options.end_s() {
                return Ok(Wanted::Enough);
            }
            self.reached_s = self.reached_s.max(time_s + duration_s);
            if time_s + EDGE_S >= self.options.start_s {
                let relative_s = time_s - self.options.start_s;
                self.end_s = (relative_s + duration_s).min(self.options.duration_s.unwrap_or(f64::INFINITY));
                self.deliver(&picture, relative_s, see)?;
            }
            return Ok(if self.stopped {
                Wanted::Enough
            } else {
                Wanted::More
            });
        };
        let next_s = time_s - self.options.start_s;
        if let Some((held, held_s)) = self.held.take() {
            while !self.stopped && self.due_s(fps) < self.length_s() && {
                let due_s = self.due_s(fps);
                due_s - held_s <= next_s - due_s
            } {
                self.deliver(&held, self.due_s(fps), see)?;
            }
        }
        self.held = Some((picture, next_s));
        self.reached_s = self.reached_s.max(time_s + duration_s);
        let done = self.stopped || self.due_s(fps) >= self.length_s();
        Ok(if done { Wanted::Enough } else { Wanted::More })
    }

    /// At the end of a fixed-rate reading the last frame stays until its own end.
    fn flush(&mut self, see: &mut dyn FnMut(&Frame<'_>) -> ControlFlow<()>) -> Result<(), MediaError> {
        let (Some(fps), Some((held, _))) = (self.options.fps, self.held.take()) else {
            return Ok(());
        };
        let length_s = self
            .length_s()
            .min(self.reached_s - self.options.start_s - EDGE_S);
        while !self.stopped && self.due_s(fps) < length_s {
            self.deliver(&held, self.due_s(fps), see)?;
        }
        self.end_s = self.due_s(fps);
        Ok(())
    }

    fn due_s(&self, fps: f64) -> f64 {
        self.delivered as f64 / fps
    }

    fn length_s(&self) -> f64 {
        self.options
            .duration_s
            .map_or(f64::INFINITY, |duration_s| duration_s - EDGE_S)
    }

    fn deliver(
        &mut self,
        picture: &frame::Video,
        time_s: f64,
        see: &mut dyn FnMut(&Frame<'_>) -> ControlFlow<()>,
    ) -> Result<(), MediaError> {
        let pixels = u64::from(picture.width()) * u64::from(picture.height());
        if pixels > self.options.max_pixels {
            let (path, limit) = (self.path.to_path_buf(), self.options.max_pixels);
            return Err(MediaError::TooLarge {
                path,
                what: "pixels a frame",
                found: pixels,
                limit,
            });
        }
        self.rgb.clear();
        if let Err(error) = self.convert.append(picture, &mut self.rgb) {
            let detail = format!("picture of {}x{}: {error}", picture.width(), picture.height());
            return Err(MediaError::Decode {
                path: self.path.to_path_buf(),
                detail,
            });
        }
        self.bytes += self.rgb.len() as u64;
        if self.bytes > self.options.max_bytes {
            let (path, limit) = (self.path.to_path_buf(), self.options.max_bytes);
            return Err(MediaError::TooLarge {
                path,
                what: "bytes of frames",
                found: self.bytes,
                limit,
            });
        }
        let Some((width, height)) = self.convert.size() else {
            return Ok(());
        };
        let shown = Frame {
            index: self.delivered,
            time_s,
            rgb: &self.rgb,
            width,
            height,
        };
        self.stopped |= see(&shown).is_break();
        self.delivered += 1;
        self.stopped |= self.options.max_frames.is_some_and(|max| self.delivered >= max);
        Ok(())
    }
}

/// Lays decoded samples on the clip's clock.
struct Samples<'a> {
    path: &'a Path,
    options: &'a ReadOptions,
    declared_s: f64,
    sound: Option<Sound>,
    stopped: bool,
}

impl Samples<'_> {
    fn take(&mut self, frame: &frame::Audio, time_s: f64) -> Result<Wanted, MediaError> {
        if self.stopped || time_s + EDGE_S >= self.options.end_s() {
            return Ok(Wanted::Enough);
        }
        let channels = if self.options.mono {
            1
        } else {
            usize::from(frame.channels())
        };
        let mut decoded = Vec::with_capacity(frame.samples() * channels);
        if append_samples(frame, self.options.mono, &mut decoded).is_err() || frame.rate() == 0 {
            let detail = format!(
                "sound of {} channels, format {:?}",
                frame.channels(),
                frame.format()
            );
            return Err(MediaError::Decode {
                path: self.path.to_path_buf(),
                detail,
            });
        }
        if decoded.is_empty() {
            return Ok(Wanted::More);
        }
        let started = self.sound.is_some();
        let sound = self.sound.get_or_insert_with(|| Sound {
            samples: Vec::new(),
            channels,
            sample_rate: frame.rate(),
        });
        if sound.channels != channels || sound.sample_rate != frame.rate() {
            // A stream that changes its shape on the way is spliced from two; the first is the clip.
            self.stopped = true;
            return Ok(Wanted::Enough);
        }
        let rate = f64::from(sound.sample_rate);
        let have = sound.len() as i64;
        let mut place = ((time_s - self.options.start_s) * rate).round() as i64;
        // Timestamps are rounded by some containers and wild in damaged files; sound is continuous by nature.
        let jitter = started && ((place - have).abs() as f64) <= JITTER_S * rate;
        let wild = self.declared_s > 0.0 && time_s > self.declared_s + 1.0;
        if jitter || wild {
            place = have;
        }
        let gap = usize::try_from(place - have).unwrap_or(0);
        let skip = usize::try_from(have - place).unwrap_or(0);
        let fresh = decoded.len().saturating_sub(skip.saturating_mul(channels));
        let bytes = (sound.samples.len() as u64 + gap as u64 * channels as u64 + fresh as u64) * 4;
        if bytes > self.options.max_bytes {
            let (path, limit) = (self.path.to_path_buf(), self.options.max_bytes);
            return Err(MediaError::TooLarge {
                path,
                what: "bytes of samples",
                found: bytes,
                limit,
            });
        }
        sound.samples.resize(sound.samples.len() + gap * channels, 0.0);
        let first = decoded.len() - fresh;
        sound.samples.extend_from_slice(&decoded[first..]);
        Ok(Wanted::More)
    }

    /// End of what was decoded, on the clip's clock.
    fn end_s(&self) -> f64 {
        self.options.start_s + self.sound.as_ref().map_or(0.0, Sound::duration_s)
    }

    /// Cuts the codec's padding and what lies behind the range.
    fn finish(self, packets_end_s: Option<f64>) -> Option<Sound> {
        let mut sound = self.sound?;
        let rate = f64::from(sound.sample_rate);
        let mut len = sound.len();
        if let Some(duration_s) = self.options.duration_s {
            len = len.min((duration_s * rate).round() as usize);
        }
        // AAC fills its last packet; the packet's duration says how much of it is sound.
        if let Some(end_s) = packets_end_s {
            let end = ((end_s - self.options.start_s) * rate).round();
            if end >= 0.0 && (end as usize) < len && len - (end as usize) < LONGEST_PACKET {
                len = end as usize;
            }
        }
        sound.samples.truncate(len * sound.channels);
        (!sound.is_empty()).then_some(sound)
    }
}

/// Samples of the longest packet of a lossy codec (HE-AAC, Vorbis, MP3 are below).
const LONGEST_PACKET: usize = 4096;

/// Whether frames are unevenly spaced beyond the rounding of a container's clock (1 ms in Matroska).
fn varies(times_s: &[f64]) -> bool {
    let gaps = times_s.windows(2).map(|pair| pair[1] - pair[0]);
    let (shortest, longest) = gaps.fold((f64::INFINITY, 0.0_f64), |(short, long), gap| {
        (short.min(gap), long.max(gap))
    });
    longest - shortest > (0.1 * longest).max(0.003)
}
