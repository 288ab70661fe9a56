//! `fulgur inspect`: what is in a clip, and a sheet that shows it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::bail;
use fulgur_datasets::media::{
    Clip, Info, ReadOptions, Sound, SoundInfo, Video, VideoInfo, probe, read_clip, write_png,
};
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::files::check_output;
use crate::sheet;

/// Size of decoded frames where nobody looks at them, in pixels.
const UNSEEN: (usize, usize) = (2, 2);
/// Bytes that the small frames of a sheet may take together.
const SHEET_BYTES: f64 = 256e6;

/// Show what is in a clip
///
/// The clip is decoded to its end, so that the numbers are those of its frames and samples and not only what its header
/// claims. Any container that FFmpeg reads will do, with picture, sound or both.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur inspect clip.mp4 -o sheet.png")]
pub(super) struct Arguments {
    /// The clip
    clip: PathBuf,
    /// Draw frames, waveform and spectrogram on one time axis
    #[arg(short, long = "output", value_name = "SHEET.png")]
    output: Option<PathBuf>,
}

pub(super) fn run(context: &Context, arguments: Arguments) -> anyhow::Result<Answer> {
    let Arguments { clip: path, output } = arguments;
    if let Some(output) = &output {
        if !output
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("png"))
        {
            bail!(
                "--output: found {}, expected a name that ends in .png",
                output.display()
            );
        }
        check_output(output)?;
    }
    let info = probe(&path)?;
    let options = ReadOptions {
        size: Some(if output.is_some() {
            thumbnail(&info)
        } else {
            UNSEEN
        }),
        cancel: Some(Arc::clone(context.interrupt.flag())),
        ..ReadOptions::default()
    };
    let clip = read_clip(&path, &options)?;
    let inspection = Inspection::new(path, &clip, output);
    if let Some(output) = &inspection.sheet {
        write_png(
            output,
            &sheet::draw(&inspection.title(), clip.video.as_ref(), clip.sound.as_ref()),
        )?;
    }
    Answer::new(&inspection)
}

/// Size of the frames for a sheet: as high as it shows them, or smaller where the clip is so long that its frames would
/// fill the memory.
fn thumbnail(info: &Info) -> (usize, usize) {
    let Some(video) = &info.video else { return UNSEEN };
    let aspect = video.width as f64 / video.height.max(1) as f64;
    let frames = (video.frame_count as f64)
        .max(info.duration_s * video.fps)
        .max(1.0);
    let height = (SHEET_BYTES / (3.0 * aspect * frames))
        .sqrt()
        .min(sheet::FRAME_HEIGHT as f64);
    let pixels = |length: f64| (length.round() as usize).max(2);
    (pixels(height * aspect), pixels(height))
}

#[derive(Serialize)]
struct Inspection {
    path: PathBuf,
    container: String,
    /// Length of the longer of picture and sound.
    duration_s: f64,
    video: Option<Picture>,
    audio: Option<Audio>,
    /// Whether the file breaks off before the length that it declares.
    truncated: bool,
    metadata: BTreeMap<String, String>,
    sheet: Option<PathBuf>,
}

#[derive(Serialize)]
struct Picture {
    codec: String,
    width: usize,
    height: usize,
    frames: usize,
    fps: f64,
    variable_rate: bool,
    start_s: f64,
    duration_s: f64,
}

#[derive(Serialize)]
struct Audio {
    codec: String,
    channels: usize,
    sample_rate: u32,
    duration_s: f64,
    peak: f32,
    /// Mean power of all channels in dB of full scale; null for digital silence.
    rms_db: Option<f64>,
    silent: bool,
}

impl Inspection {
    fn new(path: PathBuf, clip: &Clip, sheet: Option<PathBuf>) -> Self {
        let video = clip.video.as_ref().zip(clip.info.video.as_ref());
        let video = video.map(|(video, info)| Picture::new(video, info));
        let audio = clip.sound.as_ref().zip(clip.info.sound.as_ref());
        let audio = audio.map(|(sound, info)| Audio::new(sound, info));
        let picture_end = video
            .as_ref()
            .map_or(0.0, |video| video.start_s + video.duration_s);
        Self {
            path,
            container: clip.info.container.clone(),
            duration_s: audio
                .as_ref()
                .map_or(0.0, |audio| audio.duration_s)
                .max(picture_end),
            video,
            audio,
            truncated: clip.truncated,
            metadata: clip.info.metadata.clone(),
            sheet,
        }
    }

    /// What stands on top of the sheet.
    fn title(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        let mut title = format!("{}: {:.2} s", Path::new(name).display(), self.duration_s);
        if let Some(video) = &self.video {
            title.push_str(&format!(
                ", {}x{}, {} frames/s",
                video.width,
                video.height,
                rate(video.fps)
            ));
        }
        if let Some(audio) = &self.audio {
            title.push_str(&format!(", {} Hz", audio.sample_rate));
        }
        title
    }
}

impl Picture {
    /// The frames may have been scaled down while they were read; their size is that of the file.
    fn new(video: &Video, info: &VideoInfo) -> Self {
        Self {
            codec: info.codec.clone(),
            width: info.width,
            height: info.height,
            frames: video.frame_count,
            fps: video.fps,
            variable_rate: video.variable_rate,
            start_s: video.times_s.first().copied().unwrap_or(0.0),
            duration_s: video.duration_s(),
        }
    }
}

impl Audio {
    fn new(sound: &Sound, info: &SoundInfo) -> Self {
        let power: f64 = sound
            .samples
            .iter()
            .map(|sample| f64::from(*sample).powi(2))
            .sum();
        let mean = power / sound.samples.len().max(1) as f64;
        Self {
            codec: info.codec.clone(),
            channels: sound.channels,
            sample_rate: sound.sample_rate,
            duration_s: sound.duration_s(),
            peak: sound
                .samples
                .iter()
                .fold(0.0, |peak, sample| peak.max(sample.abs())),
            rms_db: (mean > 0.0).then(|| 10.0 * mean.log10()),
            silent: sound.is_silent(),
        }
    }
}

/// Frames per second without needless digits.
fn rate(fps: f64) -> String {
    let text = format!("{fps:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Report for Inspection {}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken = if self.truncated {
            ", breaks off before its declared end"
        } else {
            ""
        };
        writeln!(
            f,
            "{}: {}, {:.3} s{broken}",
            self.path.display(),
            self.container,
            self.duration_s
        )?;
        match &self.video {
            None => writeln!(f, "picture   none")?,
            Some(video) => {
                let (width, height, frames, codec) = (video.width, video.height, video.frames, &video.codec);
                let varies = if video.variable_rate {
                    " on average (variable rate)"
                } else {
                    ""
                };
                let (fps, seconds) = (rate(video.fps), video.duration_s);
                writeln!(
                    f,
                    "picture   {codec}, {width}x{height}, {frames} frames at {fps}/s{varies}, {seconds:.3} s"
                )?;
            }
        }
        match &self.audio {
            None => writeln!(f, "sound     none")?,
            Some(audio) => {
                let level = match (audio.silent, audio.rms_db) {
                    (false, Some(rms)) => format!("peak {:.3}, mean level {rms:.1} dB", audio.peak),
                    _ => "silent".to_owned(),
                };
                let (codec, rate, channels) = (&audio.codec, audio.sample_rate, audio.channels);
                let plural = if channels == 1 { "" } else { "s" };
                let seconds = audio.duration_s;
                writeln!(
                    f,
                    "sound     {codec}, {rate} Hz, {channels} channel{plural}, {seconds:.3} s, {level}"
                )?;
            }
        }
        for (key, value) in &self.metadata {
            writeln!(f, "tag       {key}: {value}")?;
        }
        if let Some(sheet) = &self.sheet {
            writeln!(f, "sheet     {}", sheet.display())?;
        }
        Ok(())
    }
}
