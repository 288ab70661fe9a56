//! The streams of an MP4 file under construction: frames to H.264, samples to AAC, packets to the container.

use std::io::{Seek, Write};

use ffmpeg_next as ffmpeg;
use ffmpeg_next::codec::{self, Id};
use ffmpeg_next::color::{Range, Space};
use ffmpeg_next::format::context::{Output, StreamIo};
use ffmpeg_next::format::{Pixel, Sample, sample};
use ffmpeg_next::software::scaling::{Context as Scaler, Flags};
use ffmpeg_next::{ChannelLayout, Dictionary, Packet, Rational, encoder, frame, threading};

use super::clip::{Sound, Video};
use super::source::start_ffmpeg;
use super::write::WriteOptions;

/// Unit of the timestamps of unevenly spaced frames: 1/90,000 s.
const VARIABLE_CLOCK: i32 = 90_000;

/// Encoder threads: fixed, because x264's result depends on their number.
const THREADS: usize = 4;

/// Instruction sets that x264 is held to, where its own choice is not to be had.
///
/// Its AVX-512 code (x264 0.164) looks into memory that nobody has written when it decides on frame types: equal clips
/// then give different files, in most cases where the height is no multiple of 16. All others give one and the same.
fn instructions() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512f") {
        // Every processor with AVX-512 has it.
        return Some("AVX2");
    }
    None
}

/// The step whose errors are those of the file.
pub(super) const WRITING: &str = "MP4";

/// What a step gives, or its name and FFmpeg's error.
pub(super) type Step<T> = Result<T, (&'static str, ffmpeg::Error)>;

/// A clip on its way into an MP4 container; see [`super::write::write_mp4_frames`].
pub(super) struct Encoding<'a> {
    output: Output,
    pictures: Pictures<'a>,
    samples: Option<Samples<'a>>,
    video: &'a Video,
    pushed: usize,
}

impl<'a> Encoding<'a> {
    /// Opens encoders and container for a clip of this shape; the frames of `video` are not looked at.
    pub(super) fn open<W: Write + Seek + Send + 'static>(
        sink: W,
        name: Option<&str>,
        video: &'a Video,
        sound: Option<&'a Sound>,
        options: &WriteOptions,
    ) -> Step<Self> {
        let writing = |error| (WRITING, error);
        start_ffmpeg().map_err(writing)?;
        let io = StreamIo::from_write_seek(sink).map_err(writing)?;
        let mut output = ffmpeg::format::output_to_stream(io, name, Some("mp4")).map_err(writing)?;
        let mut pictures = Pictures::open(video, options)?;
        pictures.stream =
            add_stream(&mut output, &pictures.encoder, pictures.clock.time_base).map_err(writing)?;
        let samples = match sound {
            Some(sound) => {
                let mut samples = Samples::open(sound, options)?;
                let time_base = Rational(1, sound.sample_rate as i32);
                samples.stream = add_stream(&mut output, &samples.encoder, time_base).map_err(writing)?;
                Some(samples)
            }
            None => None,
        };
        output.set_metadata(
            options
                .metadata
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()))
                .collect(),
        );
        let mut settings = Dictionary::new();
        // Nothing of the clock or of library versions in the file: equal clips give equal containers.
        settings.set("fflags", "+bitexact");
        if name.is_some() {
            settings.set("movflags", "+faststart");
        }
        // The edit lists, which say where the streams end, count in the movie's ticks; milliseconds would cut
        // samples.
        settings.set(
            "movie_timescale",
            &movie_clock(&pictures.clock, sound).to_string(),
        );
        output.write_header_with(settings).map_err(writing)?;
        Ok(Self {
            output,
            pictures,
            samples,
            video,
            pushed: 0,
        })
    }

    /// Frames that came so far.
    pub(super) fn pushed(&self) -> usize {
        self.pushed
    }

    /// The next frame, RGB24, and the sound up to its end.
    pub(super) fn push(&mut self, rgb: &[u8]) -> Step<()> {
        let index = self.pushed;
        self.pictures.push(index, rgb, &mut self.output)?;
        self.pushed += 1;
        if let Some(samples) = &mut self.samples {
            let end_s = self.video.times_s[index] - self.video.times_s[0] + 1.0 / self.video.fps;
            samples.push_until(end_s, &mut self.output)?;
        }
        Ok(())
    }

    /// The end of the clip.
    pub(super) fn finish(mut self) -> Step<()> {
        if let Some(samples) = &mut self.samples {
            samples.push_until(f64::INFINITY, &mut self.output)?;
            samples.finish(&mut self.output)?;
        }
        self.pictures.finish(&mut self.output)?;
        self.output.write_trailer().map_err(|error| (WRITING, error))
    }
}

fn add_stream(
    output: &mut Output,
    encoder: &impl AsRef<codec::Context>,
    time_base: Rational,
) -> Result<usize, ffmpeg::Error> {
    let mut stream = output.add_stream_with(encoder.as_ref())?;
    stream.set_time_base(time_base);
    Ok(stream.index())
}

/// When frames appear, in ticks.
struct Clock {
    time_base: Rational,
    ticks: Vec<i64>,
    /// End of the last frame.
    end: i64,
}

impl Clock {
    fn new(video: &Video) -> Self {
        if !video.variable_rate {
            let (num, den) = rational(video.fps);
            let count = video.frame_count as i64;
            return Self {
                time_base: Rational(den, num),
                ticks: (0..count).collect(),
                end: count,
            };
        }
        let tick = |seconds: f64| (seconds * f64::from(VARIABLE_CLOCK)).round() as i64;
        let mut ticks: Vec<i64> = video.times_s.iter().map(|&time_s| tick(time_s)).collect();
        for k in 1..ticks.len() {
            ticks[k] = ticks[k].max(ticks[k - 1] + 1);
        }
        let end = tick(video.times_s[0] + video.duration_s()).max(ticks[ticks.len() - 1] + 1);
        Self {
            time_base: Rational(1, VARIABLE_CLOCK),
            ticks,
            end,
        }
    }

    /// How long the frame that appears at `pts` is shown.
    fn duration(&self, pts: i64) -> i64 {
        let next = self.ticks.partition_point(|&tick| tick <= pts);
        self.ticks.get(next).copied().unwrap_or(self.end) - pts
    }
}

/// Ticks per second in which the ends of picture and sound are whole numbers, or the sound's alone where that
/// is too fine.
fn movie_clock(clock: &Clock, sound: Option<&Sound>) -> i32 {
    let frames = i64::from(clock.time_base.denominator());
    let samples = sound.map_or(1, |sound| i64::from(sound.sample_rate));
    let (mut a, mut b) = (frames, samples);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let common = frames / a * samples;
    // At least milliseconds, as players expect.
    let common = if common < 1000 {
        common * (1000 / common + 1)
    } else {
        common
    };
    i32::try_from(common).unwrap_or(if sound.is_some() {
        samples as i32
    } else {
        frames as i32
    })
}

/// The simplest quotient within a billionth of `fps`: 12/1, 30000/1001, ...
fn rational(fps: f64) -> (i32, i32) {
    // Continued fraction; (p, q) and the convergent before it.
    let (mut before, mut now) = ((0_i64, 1_i64), (1_i64, 0_i64));
    let mut rest = fps;
    for _ in 0..32 {
        let whole = rest.floor();
        let next = (whole as i64 * now.0 + before.0, whole as i64 * now.1 + before.1);
        if next.0 > 1_000_000 || next.1 > 1_000_000 {
            break;
        }
        (before, now) = (now, next);
        if (now.0 as f64 / now.1 as f64 - fps).abs() <= fps * 1e-9 {
            break;
        }
        rest = 1.0 / (rest - whole);
    }
    (now.0.max(1) as i32, now.1.max(1) as i32)
}

/// The picture stream under construction.
struct Pictures<'a> {
    video: &'a Video,
    clock: Clock,
    encoder: encoder::Video,
    scaler: Scaler,
    stream: usize,
}

impl<'a> Pictures<'a> {
    fn open(video: &'a Video, options: &WriteOptions) -> Step<Self> {
        let failed = |error| ("H.264 (libx264)", error);
        let clock = Clock::new(video);
        let (width, height) = (video.width as u32, video.height as u32);
        let found = encoder::find_by_name("libx264").ok_or(failed(ffmpeg::Error::EncoderNotFound))?;
        let mut context = codec::Context::new_with_codec(found);
        context.set_flags(codec::Flags::GLOBAL_HEADER);
        context.set_threading(threading::Config::count(THREADS));
        let mut settings = context.encoder().video().map_err(failed)?;
        settings.set_width(width);
        settings.set_height(height);
        settings.set_format(Pixel::YUV420P);
        settings.set_time_base(clock.time_base);
        if video.variable_rate {
            // MP4 stores durations in decoding order: with reordering they would not be those of the frames.
            settings.set_max_b_frames(0);
        }
        let (num, den) = rational(video.fps);
        settings.set_frame_rate(Some(Rational(num, den)));
        settings.set_colorspace(Space::SMPTE170M);
        settings.set_color_range(Range::MPEG);
        let mut x264 = Dictionary::new();
        x264.set("crf", &options.crf.to_string());
        x264.set("preset", options.preset);
        if let Some(instructions) = instructions() {
            x264.set("x264-params", &format!("asm={instructions}"));
        }
        let encoder = settings.open_as_with(found, x264).map_err(failed)?;
        let flags = Flags::BICUBIC | Flags::ACCURATE_RND | Flags::FULL_CHR_H_INP | Flags::BITEXACT;
        let scaler =
            Scaler::get(Pixel::RGB24, width, height, Pixel::YUV420P, width, height, flags).map_err(failed)?;
        Ok(Self {
            video,
            clock,
            encoder,
            scaler,
            stream: 0,
        })
    }

    fn push(&mut self, index: usize, picture: &[u8], output: &mut Output) -> Step<()> {
        let failed = |error| ("H.264", error);
        let (width, height) = (self.video.width, self.video.height);
        let mut rgb = frame::Video::new(Pixel::RGB24, width as u32, height as u32);
        let mut yuv = frame::Video::new(Pixel::YUV420P, width as u32, height as u32);
        if rgb.planes() == 0 || yuv.planes() == 0 {
            return Err(failed(ffmpeg::Error::Other {
                errno: ffmpeg::error::ENOMEM,
            }));
        }
        let stride = rgb.stride(0);
        let rows = picture.chunks_exact(3 * width);
        for (to, from) in rgb.data_mut(0).chunks_mut(stride).zip(rows) {
            to[..3 * width].copy_from_slice(from);
        }
        self.scaler.run(&rgb, &mut yuv).map_err(failed)?;
        yuv.set_color_space(Space::SMPTE170M);
        yuv.set_color_range(Range::MPEG);
        yuv.set_pts(Some(self.clock.ticks[index]));
        self.encoder.send_frame(&yuv).map_err(failed)?;
        self.write_ready(output)
    }

    fn finish(&mut self, output: &mut Output) -> Step<()> {
        self.encoder.send_eof().map_err(|error| ("H.264", error))?;
        self.write_ready(output)
    }

    fn write_ready(&mut self, output: &mut Output) -> Step<()> {
        let clock = &self.clock;
        write_packets(
            &mut self.encoder,
            self.stream,
            clock.time_base,
            output,
            |packet| {
                let duration = packet.pts().map_or(1, |pts| clock.duration(pts));
                packet.set_duration(duration);
            },
        )
    }
}

/// The sound stream under construction.
struct Samples<'a> {
    sound: &'a Sound,
    encoder: encoder::Audio,
    layout: ChannelLayout,
    /// Samples per packet.
    block: usize,
    /// Samples sent so far.
    sent: usize,
    stream: usize,
}

impl<'a> Samples<'a> {
    fn open(sound: &'a Sound, options: &WriteOptions) -> Step<Self> {
        let failed = |error| ("AAC", error);
        let found = encoder::find(Id::AAC).ok_or(failed(ffmpeg::Error::EncoderNotFound))?;
        let layout = ChannelLayout::default(sound.channels as i32);
        let mut context = codec::Context::new_with_codec(found);
        context.set_flags(codec::Flags::GLOBAL_HEADER);
        let mut settings = context.encoder().audio().map_err(failed)?;
        settings.set_rate(sound.sample_rate as i32);
        settings.set_channel_layout(layout);
        settings.set_channels(sound.channels as i32);
        settings.set_format(Sample::F32(sample::Type::Planar));
        settings.set_bit_rate(options.audio_bit_rate as usize);
        settings.set_time_base(Rational(1, sound.sample_rate as i32));
        let encoder = settings.open_as(found).map_err(failed)?;
        let block = (encoder.frame_size() as usize).max(1);
        Ok(Self {
            sound,
            encoder,
            layout,
            block,
            sent: 0,
            stream: 0,
        })
    }

    fn push_until(&mut self, end_s: f64, output: &mut Output) -> Step<()> {
        let failed = |error| ("AAC", error);
        let rate = f64::from(self.sound.sample_rate);
        while self.sent < self.sound.len() && (self.sent as f64) < end_s * rate {
            let len = self.block.min(self.sound.len() - self.sent);
            let mut block = frame::Audio::new(Sample::F32(sample::Type::Planar), len, self.layout);
            block.set_rate(self.sound.sample_rate);
            if block.planes() != self.sound.channels {
                return Err(failed(ffmpeg::Error::InvalidData));
            }
            let channels = self.sound.channels;
            let interleaved = &self.sound.samples[self.sent * channels..(self.sent + len) * channels];
            for channel in 0..channels {
                let plane = block.plane_mut::<f32>(channel);
                for (to, from) in plane
                    .iter_mut()
                    .zip(interleaved.iter().skip(channel).step_by(channels))
                {
                    *to = *from;
                }
            }
            block.set_pts(Some(self.sent as i64));
            self.sent += len;
            self.encoder.send_frame(&block).map_err(failed)?;
            self.write_ready(output)?;
        }
        Ok(())
    }

    fn finish(&mut self, output: &mut Output) -> Step<()> {
        self.encoder.send_eof().map_err(|error| ("AAC", error))?;
        self.write_ready(output)
    }

    fn write_ready(&mut self, output: &mut Output) -> Step<()> {
        let time_base = Rational(1, self.sound.sample_rate as i32);
        write_packets(&mut self.encoder, self.stream, time_base, output, |_| ())
    }
}

/// Writes what an encoder has ready.
fn write_packets(
    encoder: &mut encoder::Encoder,
    stream: usize,
    time_base: Rational,
    output: &mut Output,
    finish: impl Fn(&mut Packet),
) -> Step<()> {
    let writing = |error| (WRITING, error);
    let to = output
        .stream(stream)
        .map_or(time_base, |stream| stream.time_base());
    loop {
        let mut packet = Packet::empty();
        match encoder.receive_packet(&mut packet) {
            Ok(()) => {}
            Err(ffmpeg::Error::Eof) => return Ok(()),
            Err(ffmpeg::Error::Other { errno }) if errno == ffmpeg::error::EAGAIN => return Ok(()),
            Err(error) => return Err(("encoder", error)),
        }
        finish(&mut packet);
        packet.set_stream(stream);
        packet.rescale_ts(time_base, to);
        packet.write_interleaved(output).map_err(writing)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_become_their_simplest_quotient() {
        assert_eq!(rational(12.0), (12, 1));
        assert_eq!(rational(12.5), (25, 2));
        assert_eq!(rational(30000.0 / 1001.0), (30_000, 1001));
        assert_eq!(rational(24000.0 / 1001.0), (24_000, 1001));
        assert_eq!(rational(0.5), (1, 2));
        assert_eq!(rational(1.0 / 3.0), (1, 3));
    }
}
