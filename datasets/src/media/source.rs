//! A container opened for reading: streams chosen, decoders open, packets turned into frames on one clock.
//!
//! The bytes come through our own reader, so FFmpeg never sees a path or a URL: any file name works, nothing
//! but the file itself is opened, and every read asks the [`Watch`] first. A loop inside a codec cannot be
//! interrupted from within the process; who decodes hostile files puts that into a child process.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ffmpeg_next as ffmpeg;
use ffmpeg_next::codec::packet::side_data::Type as SideData;
use ffmpeg_next::format::context::{Input, StreamIo};
use ffmpeg_next::format::stream::Disposition;
use ffmpeg_next::{Packet, Rational, Stream, codec, decoder, frame, media};

use super::clip::{Info, SoundInfo, VideoInfo};
use super::error::MediaError;
use super::read::ReadOptions;

/// Containers that are read. Playlists and scripts, which name other files, are not among them.
const CONTAINERS: &str = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,flac,wav,mp3,aac,mpeg,mpegts,flv,asf,\
                          gif,aiff,au,caf,w64,ivf,yuv4mpegpipe,nut";

/// Damaged packets in a row after which the rest of a file counts as lost.
const MAX_BAD_PACKETS: usize = 256;

/// Sample rates of real sounds; a header with any other is broken.
const RATES: std::ops::RangeInclusive<u32> = 1_000..=768_000;
const MAX_CHANNELS: u16 = 64;

/// Starts FFmpeg once and silences its log, which goes to stderr and says nothing that the errors do not say.
pub(super) fn start_ffmpeg() -> Result<(), ffmpeg::Error> {
    static STARTED: OnceLock<Result<(), ffmpeg::Error>> = OnceLock::new();
    *STARTED.get_or_init(|| {
        ffmpeg::init()?;
        ffmpeg::log::set_level(ffmpeg::log::Level::Quiet);
        Ok(())
    })
}

/// Ends reading when nothing comes for too long or when the caller raises a flag.
#[derive(Clone)]
pub(super) struct Watch {
    cancel: Option<Arc<AtomicBool>>,
    limit: Duration,
    progress: Arc<Mutex<Instant>>,
}

impl Watch {
    fn new(options: &ReadOptions) -> Self {
        let progress = Arc::new(Mutex::new(Instant::now()));
        Self {
            cancel: options.cancel.clone(),
            limit: options.stall_limit,
            progress,
        }
    }

    /// Something was decoded or used: the time limit starts anew.
    pub(super) fn progress(&self) {
        *self.progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn cancelled(&self) -> bool {
        self.cancel
            .as_ref()
            .is_some_and(|flag| flag.load(Ordering::Relaxed))
    }

    fn expired(&self) -> bool {
        self.cancelled()
            || self
                .progress
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .elapsed()
                > self.limit
    }

    fn check(&self, path: &Path) -> Result<(), MediaError> {
        if self.cancelled() {
            return Err(MediaError::Cancelled {
                path: path.to_path_buf(),
            });
        }
        if self.expired() {
            return Err(MediaError::TimedOut {
                path: path.to_path_buf(),
                seconds: self.limit.as_secs_f64(),
            });
        }
        Ok(())
    }
}

/// One decoded piece, with its time in seconds on the clip's clock.
pub(super) enum Piece {
    /// A picture and how long it is shown, 0 where the container does not say.
    Picture {
        frame: frame::Video,
        time_s: f64,
        duration_s: f64,
    },
    /// Samples of all channels.
    Samples { frame: frame::Audio, time_s: f64 },
}

/// A chosen stream with its decoder.
struct Track<D> {
    index: usize,
    time_base: Rational,
    decoder: D,
    wanted: bool,
    /// End of the last packet that says how long it is, in seconds on the container's clock.
    packets_end_s: Option<f64>,
    /// Time at which the next frame is due, for streams without timestamps.
    due_s: f64,
}

/// Which streams are still wanted, the answer of a consumer to a piece.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// This stream goes on.
    More,
    /// Nothing more of this stream.
    Enough,
}

/// An open container.
pub(super) struct Source {
    path: PathBuf,
    input: Input,
    video: Option<Track<decoder::Video>>,
    sound: Option<Track<decoder::Audio>>,
    /// Container time of the clip's zero: the earlier start of the two streams.
    origin_s: f64,
    /// What the container says.
    pub(super) info: Info,
    /// Quarter turns clockwise by which the picture is to be shown.
    pub(super) quarter_turns: u8,
    /// Limits of time.
    pub(super) watch: Watch,
    /// Whether something could not be read or decoded.
    pub(super) broken: bool,
}

impl Source {
    /// Opens a file and the decoders of its best streams.
    pub(super) fn open(path: &Path, options: &ReadOptions) -> Result<Self, MediaError> {
        start_ffmpeg()
            .map_err(|error| MediaError::not_media(path, format!("FFmpeg does not start: {error}")))?;
        let watch = Watch::new(options);
        watch.check(path)?;
        let input = open_container(path, &watch)?;
        let mut info = Info {
            container: input.format().name().to_owned(),
            duration_s: if input.duration() > 0 {
                input.duration() as f64 / 1e6
            } else {
                0.0
            },
            metadata: tags(&input),
            ..Info::default()
        };
        let mut quarter_turns = 0;
        let mut starts = Vec::new();
        let best_video = input
            .streams()
            .best(media::Type::Video)
            .filter(|stream| !stream.disposition().contains(Disposition::ATTACHED_PIC));
        let mut video = None;
        if let Some(stream) = best_video {
            quarter_turns = rotation(&stream);
            starts.extend(start_s(&stream));
            let decoder = open_video(path, &stream, options)?;
            let (mut width, mut height) = (decoder.width() as usize, decoder.height() as usize);
            if quarter_turns % 2 == 1 {
                std::mem::swap(&mut width, &mut height);
            }
            info.video = Some(VideoInfo {
                codec: stream.parameters().id().name().to_owned(),
                width,
                height,
                fps: ratio(stream.avg_frame_rate()),
                frame_count: u64::try_from(stream.frames()).unwrap_or(0),
                duration_s: declared_s(&stream),
            });
            video = Some(Track::new(&stream, decoder, options.video));
        }
        let mut sound = None;
        if let Some(stream) = input.streams().best(media::Type::Audio) {
            starts.extend(start_s(&stream));
            let decoder = open_sound(path, &stream)?;
            info.sound = Some(SoundInfo {
                codec: stream.parameters().id().name().to_owned(),
                channels: usize::from(decoder.channels()),
                sample_rate: decoder.rate(),
                duration_s: declared_s(&stream),
            });
            sound = Some(Track::new(&stream, decoder, options.sound));
        }
        if video.is_none() && sound.is_none() {
            return Err(MediaError::not_media(path, "neither a video nor an audio stream"));
        }
        let origin_s = starts.into_iter().reduce(f64::min).unwrap_or(0.0);
        let (path, broken) = (path.to_path_buf(), false);
        Ok(Self {
            path,
            input,
            video,
            sound,
            origin_s,
            info,
            quarter_turns,
            watch,
            broken,
        })
    }

    /// Goes to the last key frame at or before `time_s` on the clip's clock; pieces before it may still come.
    pub(super) fn seek(&mut self, time_s: f64, options: &ReadOptions) -> Result<(), MediaError> {
        let target = ((time_s + self.origin_s) * 1e6) as i64;
        if self.input.seek(target, ..target).is_err() {
            // The position is undefined now: begin again and decode up to the start.
            *self = Self::open(&self.path, options)?;
        }
        Ok(())
    }

    /// Where the last packet of the sound ends, in seconds on the clip's clock, where its packets say so.
    pub(super) fn sound_packets_end_s(&self) -> Option<f64> {
        self.sound
            .as_ref()
            .and_then(|track| track.packets_end_s)
            .map(|end_s| end_s - self.origin_s)
    }

    /// Decodes until the file ends, nothing more is wanted or `take` breaks off with an error.
    pub(super) fn pump(
        &mut self,
        take: &mut dyn FnMut(Piece) -> Result<Wanted, MediaError>,
    ) -> Result<(), MediaError> {
        let mut bad = 0;
        while self.video.as_ref().is_some_and(|track| track.wanted)
            || self.sound.as_ref().is_some_and(|track| track.wanted)
        {
            self.watch.check(&self.path)?;
            let mut packet = Packet::empty();
            match packet.read(&mut self.input) {
                Ok(()) => bad = 0,
                Err(ffmpeg::Error::Eof) => return self.drain(take),
                Err(ffmpeg::Error::InvalidData) if bad < MAX_BAD_PACKETS => {
                    bad += 1;
                    self.broken = true;
                    continue;
                }
                Err(_) => {
                    self.watch.check(&self.path)?;
                    self.broken = true;
                    return self.drain(take);
                }
            }
            self.broken |= packet.is_corrupt();
            let index = packet.stream();
            if let Some(track) = self
                .video
                .as_mut()
                .filter(|track| track.index == index && track.wanted)
            {
                track.note(&packet);
                self.broken |= track.decoder.send_packet(&packet).is_err();
            } else if let Some(track) = self
                .sound
                .as_mut()
                .filter(|track| track.index == index && track.wanted)
            {
                track.note(&packet);
                self.broken |= track.decoder.send_packet(&packet).is_err();
            } else {
                continue;
            }
            self.receive(take)?;
        }
        Ok(())
    }

    /// Takes what the decoders still hold back.
    fn drain(&mut self, take: &mut dyn FnMut(Piece) -> Result<Wanted, MediaError>) -> Result<(), MediaError> {
        if let Some(track) = self.video.as_mut().filter(|track| track.wanted) {
            let _ = track.decoder.send_eof();
        }
        if let Some(track) = self.sound.as_mut().filter(|track| track.wanted) {
            let _ = track.decoder.send_eof();
        }
        self.receive(take)
    }

    /// Hands over every frame that is ready.
    fn receive(
        &mut self,
        take: &mut dyn FnMut(Piece) -> Result<Wanted, MediaError>,
    ) -> Result<(), MediaError> {
        let origin_s = self.origin_s;
        let mut broken = false;
        if let Some(track) = self.video.as_mut().filter(|track| track.wanted) {
            let (time_base, rate) = (
                track.time_base,
                self.info.video.as_ref().map_or(0.0, |video| video.fps),
            );
            broken |= track.each(
                |decoder| {
                    let mut frame = frame::Video::empty();
                    decoder.receive_frame(&mut frame).map(|()| frame)
                },
                |frame, due_s| {
                    let time_s = frame.timestamp().map_or(due_s, |pts| seconds(pts, time_base));
                    let mut duration_s = seconds(frame.packet().duration.max(0), time_base);
                    if duration_s == 0.0 && rate > 0.0 {
                        duration_s = 1.0 / rate;
                    }
                    (
                        Piece::Picture {
                            frame,
                            time_s: time_s - origin_s,
                            duration_s,
                        },
                        time_s + duration_s,
                    )
                },
                &self.watch,
                take,
            )?;
        }
        if let Some(track) = self.sound.as_mut().filter(|track| track.wanted) {
            let time_base = track.time_base;
            broken |= track.each(
                |decoder| {
                    let mut frame = frame::Audio::empty();
                    decoder.receive_frame(&mut frame).map(|()| frame)
                },
                |frame, due_s| {
                    let time_s = frame.timestamp().map_or(due_s, |pts| seconds(pts, time_base));
                    let end_s = time_s + frame.samples() as f64 / f64::from(frame.rate().max(1));
                    (
                        Piece::Samples {
                            frame,
                            time_s: time_s - origin_s,
                        },
                        end_s,
                    )
                },
                &self.watch,
                take,
            )?;
        }
        self.broken |= broken;
        Ok(())
    }
}

impl<D> Track<D> {
    fn new(stream: &Stream, decoder: D, wanted: bool) -> Self {
        let due_s = start_s(stream).unwrap_or(0.0);
        Self {
            index: stream.index(),
            time_base: stream.time_base(),
            decoder,
            wanted,
            packets_end_s: None,
            due_s,
        }
    }

    fn note(&mut self, packet: &Packet) {
        if let (Some(pts), duration) = (packet.pts(), packet.duration())
            && duration > 0
        {
            let end_s = seconds(pts.saturating_add(duration), self.time_base);
            self.packets_end_s = Some(self.packets_end_s.map_or(end_s, |known| known.max(end_s)));
        }
    }

    /// Receives frames until the decoder wants more packets; answers whether the decoder complained.
    fn each<F>(
        &mut self,
        receive: impl Fn(&mut D) -> Result<F, ffmpeg::Error>,
        piece: impl Fn(F, f64) -> (Piece, f64),
        watch: &Watch,
        take: &mut dyn FnMut(Piece) -> Result<Wanted, MediaError>,
    ) -> Result<bool, MediaError> {
        loop {
            match receive(&mut self.decoder) {
                Ok(frame) => {
                    let (piece, end_s) = piece(frame, self.due_s);
                    self.due_s = end_s;
                    let answer = take(piece)?;
                    watch.progress();
                    if answer == Wanted::Enough {
                        self.wanted = false;
                        return Ok(false);
                    }
                }
                Err(ffmpeg::Error::Eof) => return Ok(false),
                Err(ffmpeg::Error::Other { errno }) if errno == ffmpeg::error::EAGAIN => return Ok(false),
                Err(_) => return Ok(true),
            }
        }
    }
}

fn open_container(path: &Path, watch: &Watch) -> Result<Input, MediaError> {
    // A pipe would block in `open`, a folder fails in `read` only.
    let found = std::fs::metadata(path).map_err(|error| MediaError::io(path, "open", error))?;
    if !found.is_file() {
        return Err(MediaError::not_media(path, "not a regular file"));
    }
    if found.len() == 0 {
        return Err(MediaError::not_media(path, "the file is empty"));
    }
    let file = File::open(path).map_err(|error| MediaError::io(path, "open", error))?;
    let refused = |error: ffmpeg::Error| match watch.check(path) {
        Err(stopped) => stopped,
        Ok(()) => MediaError::not_media(path, error.to_string()),
    };
    let io = StreamIo::from_read_seek(file).map_err(refused)?;
    let options =
        ffmpeg::Dictionary::from_iter([("format_whitelist", CONTAINERS), ("protocol_whitelist", "none")]);
    let asked = watch.clone();
    ffmpeg::format::input_from_stream_with_interrupt(io, None, Some(options), move || asked.expired())
        .map_err(refused)
}

fn open_video(path: &Path, stream: &Stream, options: &ReadOptions) -> Result<decoder::Video, MediaError> {
    let mut settings = ffmpeg::Dictionary::new();
    settings.set("max_pixels", &options.max_pixels.min(i32::MAX as u64).to_string());
    let opened = open_decoder(stream, settings).and_then(decoder::Opened::video);
    let decoder = opened.map_err(|error| undecodable(path, stream, error))?;
    let found = u64::from(decoder.width()) * u64::from(decoder.height());
    if found > options.max_pixels {
        let (path, limit) = (path.to_path_buf(), options.max_pixels);
        return Err(MediaError::TooLarge {
            path,
            what: "pixels a frame",
            found,
            limit,
        });
    }
    Ok(decoder)
}

fn open_sound(path: &Path, stream: &Stream) -> Result<decoder::Audio, MediaError> {
    let opened = open_decoder(stream, ffmpeg::Dictionary::new()).and_then(decoder::Opened::audio);
    let decoder = opened.map_err(|error| undecodable(path, stream, error))?;
    if !RATES.contains(&decoder.rate()) || decoder.channels() > MAX_CHANNELS {
        let detail = format!("{} channels at {} Hz", decoder.channels(), decoder.rate());
        return Err(MediaError::Decode {
            path: path.to_path_buf(),
            detail,
        });
    }
    Ok(decoder)
}

fn open_decoder(stream: &Stream, settings: ffmpeg::Dictionary) -> Result<decoder::Opened, ffmpeg::Error> {
    let parameters = stream.parameters();
    let found = decoder::find(parameters.id()).ok_or(ffmpeg::Error::DecoderNotFound)?;
    let mut decoder = codec::Context::from_parameters(parameters)?.decoder();
    // Padding of lossy sound is cut by time, for which the decoder needs to know the unit.
    decoder.set_packet_time_base(stream.time_base());
    decoder.open_as_with(found, settings)
}

fn undecodable(path: &Path, stream: &Stream, error: ffmpeg::Error) -> MediaError {
    let detail = format!("{}: {error}", stream.parameters().id().name());
    MediaError::Decode {
        path: path.to_path_buf(),
        detail,
    }
}

/// The container's tags. FFmpeg promises UTF-8; damaged files break the promise.
fn tags(input: &Input) -> BTreeMap<String, String> {
    let text = |value: &str| String::from_utf8_lossy(value.as_bytes()).into_owned();
    input
        .metadata()
        .iter()
        .map(|(key, value)| (text(key).to_lowercase(), text(value)))
        .collect()
}

/// Quarter turns clockwise that the stream's display matrix asks for.
fn rotation(stream: &Stream) -> u8 {
    for side in stream.side_data() {
        let data = side.data();
        if side.kind() != SideData::DisplayMatrix || data.len() < 8 {
            continue;
        }
        let entry =
            |k: usize| i32::from_ne_bytes([data[4 * k], data[4 * k + 1], data[4 * k + 2], data[4 * k + 3]]);
        let angle = f64::from(entry(1)).atan2(f64::from(entry(0)));
        return (angle / std::f64::consts::FRAC_PI_2).round().rem_euclid(4.0) as u8;
    }
    0
}

fn start_s(stream: &Stream) -> Option<f64> {
    (stream.start_time() != i64::MIN).then(|| seconds(stream.start_time(), stream.time_base()))
}

fn declared_s(stream: &Stream) -> f64 {
    if stream.duration() > 0 {
        seconds(stream.duration(), stream.time_base())
    } else {
        0.0
    }
}

/// Dividing once, after an exact product, gives `k / 12.0` and not its neighbour for frame k of 12 a second.
fn seconds(ticks: i64, time_base: Rational) -> f64 {
    ticks as f64 * f64::from(time_base.numerator()) / f64::from(time_base.denominator().max(1))
}

fn ratio(rate: Rational) -> f64 {
    let value = f64::from(rate.numerator()) / f64::from(rate.denominator());
    if value.is_finite() && value > 0.0 {
        value
    } else {
        0.0
    }
}
