//! Whether the clips of a manifest are there, can be decoded, and are as long as their names say.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use fulgur_datasets::media::{MediaError, ReadOptions, for_each_frame, probe, read_clip};
use serde::Serialize;

use super::record::{Provenance, Record};

/// Size to which frames are scaled that are only counted.
const SMALL: (usize, usize) = (16, 16);
/// Seconds beyond the expected end up to which a clip is decoded.
const BEYOND_S: f64 = 2.0;
/// Seconds that are decoded where nothing is expected.
const UNKNOWN_S: f64 = 600.0;

/// How clips are checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the clips.
    pub media: PathBuf,
    /// Seconds by which a clip may be longer or shorter than its name says.
    pub tolerance_s: f64,
    /// Whether all is decoded, or only the container is read.
    pub decode: bool,
    /// Raised to give up.
    pub cancel: Option<Arc<AtomicBool>>,
}

/// What can be wrong with a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// There is no such file.
    Missing,
    /// It is no media, or nothing in it can be decoded.
    Unreadable,
    /// It has no picture.
    NoVideo,
    /// It has no sound.
    NoAudio,
    /// There is nothing to hear.
    Silent,
    /// It ends before the length that it declares, or is broken.
    Truncated,
    /// It is longer or shorter than its name says.
    DurationOff,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Missing,
        Self::Unreadable,
        Self::NoVideo,
        Self::NoAudio,
        Self::Silent,
        Self::Truncated,
        Self::DurationOff,
    ];

    /// Its name among a record's flags.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unreadable => "unreadable",
            Self::NoVideo => "no_video",
            Self::NoAudio => "no_audio",
            Self::Silent => "silent",
            Self::Truncated => "truncated",
            Self::DurationOff => "duration_off",
        }
    }
}

/// What was found out about a clip.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checked {
    /// Faults, each with words about it.
    pub faults: Vec<(Fault, String)>,
    /// What its media are.
    pub facts: Facts,
}

/// What the media of a clip are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Average frames per second.
    pub fps: Option<f64>,
    /// Number of frames, where all were decoded.
    pub frames: Option<u64>,
    /// Width and height in pixels.
    pub size: Option<(u64, u64)>,
    /// Sample rate in Hz and number of channels.
    pub sound: Option<(u64, u64)>,
    /// Seconds from the earlier start of the two streams to the later end.
    pub duration_s: Option<f64>,
}

/// Checks one clip; none when it was cancelled.
#[must_use]
pub fn check(record: &Record, options: &Options) -> Option<Checked> {
    let path = record.media(&options.media);
    let mut checked = Checked::default();
    let outcome = look(record, &path, options, &mut checked);
    match outcome {
        Ok(()) => {}
        Err(MediaError::Cancelled { .. }) => return None,
        Err(MediaError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            checked
                .faults
                .push((Fault::Missing, format!("{}: no such file", path.display())));
        }
        Err(error) => checked.faults.push((Fault::Unreadable, error.to_string())),
    }
    Some(checked)
}

fn look(record: &Record, path: &Path, options: &Options, checked: &mut Checked) -> Result<(), MediaError> {
    let info = probe(path)?;
    let expected_s = record.length_ms().map(|ms| ms as f64 / 1000.0);
    let until_s = expected_s.map_or(UNKNOWN_S, |seconds| seconds + options.tolerance_s + BEYOND_S);
    let facts = &mut checked.facts;
    let mut end_s = info.duration_s;
    let mut truncated = false;
    let read = ReadOptions {
        duration_s: Some(until_s),
        size: Some(SMALL),
        cancel: options.cancel.clone(),
        ..ReadOptions::default()
    };
    let declared_s = |seconds: f64| if seconds > 0.0 { seconds } else { info.duration_s };
    let mut ends = Vec::new();
    match &info.video {
        None => checked.faults.push((Fault::NoVideo, "no video stream".into())),
        Some(video) => {
            facts.size = Some((video.width as u64, video.height as u64));
            facts.fps = (video.fps > 0.0).then_some(video.fps);
            ends.push(declared_s(video.duration_s));
            if options.decode {
                let (mut first_s, mut last_s) = (None, 0.0);
                let seen = for_each_frame(path, &read, |frame| {
                    first_s.get_or_insert(frame.time_s);
                    last_s = frame.time_s;
                    ControlFlow::Continue(())
                })?;
                truncated |= seen.truncated;
                let Some(first_s) = first_s else {
                    return Err(MediaError::Decode {
                        path: path.to_path_buf(),
                        detail: "no frame".into(),
                    });
                };
                let gap_s = match seen.frames {
                    0 | 1 => facts.fps.map_or(0.0, f64::recip),
                    frames => (last_s - first_s) / (frames - 1) as f64,
                };
                if gap_s > 0.0 {
                    facts.fps = Some(1.0 / gap_s);
                }
                // What lies beyond the limit was not counted.
                if last_s + 2.0 * gap_s < until_s {
                    facts.frames = Some(seen.frames as u64);
                    ends.pop();
                    ends.push(last_s + gap_s);
                }
            }
        }
    }
    match &info.sound {
        None => checked.faults.push((Fault::NoAudio, "no audio stream".into())),
        Some(sound) => {
            facts.sound = Some((u64::from(sound.sample_rate), sound.channels as u64));
            ends.push(declared_s(sound.duration_s));
            if options.decode {
                let read = ReadOptions { video: false, ..read };
                let clip = read_clip(path, &read)?;
                truncated |= clip.truncated;
                match clip.sound {
                    None => checked.faults.push((Fault::Silent, "no samples".into())),
                    Some(sound) => {
                        if sound.is_silent() {
                            checked.faults.push((Fault::Silent, "nothing to hear".into()));
                        }
                        if sound.duration_s() + 0.01 < until_s {
                            ends.pop();
                            ends.push(sound.duration_s());
                        }
                    }
                }
            }
        }
    }
    let known = ends.into_iter().filter(|end| *end > 0.0).fold(0.0, f64::max);
    if known > 0.0 {
        end_s = known;
    }
    facts.duration_s = (end_s > 0.0).then_some(end_s);
    if truncated {
        checked
            .faults
            .push((Fault::Truncated, "ends before the length that it declares".into()));
    }
    if let (Some(expected_s), Some(found_s)) = (expected_s, facts.duration_s)
        && (found_s - expected_s).abs() > options.tolerance_s
    {
        let words = format!("found {found_s:.3} s, expected {expected_s:.3} s");
        checked.faults.push((Fault::DurationOff, words));
    }
    Ok(())
}

impl Checked {
    /// Writes what was found into the clip's record.
    pub fn fill(&self, record: &mut Record, options: &Options) {
        for fault in Fault::ALL {
            record.unflag(fault.name());
        }
        for (fault, _) in &self.faults {
            record.flag(fault.name());
        }
        if self.faults.iter().any(|(fault, _)| *fault == Fault::Missing) {
            return;
        }
        if record.video_path.is_none() {
            let path = record.media(Path::new(""));
            record.video_path = Some(path.to_string_lossy().into_owned());
        }
        let Facts {
            fps,
            frames,
            size,
            sound,
            duration_s,
        } = self.facts;
        record.fps = fps;
        record.frames = frames;
        (record.width, record.height) = size.unzip();
        (record.sample_rate, record.channels) = sound.unzip();
        record.duration_s = duration_s;
        let from = Provenance {
            stage: "verify",
            backend: if options.decode { "decoded" } else { "container" }.to_owned(),
            ..Provenance::default()
        };
        let known = [
            ("fps", fps.is_some()),
            ("frames", frames.is_some()),
            ("width", size.is_some()),
            ("height", size.is_some()),
            ("sample_rate", sound.is_some()),
            ("channels", sound.is_some()),
            ("duration_s", duration_s.is_some()),
        ];
        for (field, _) in known.into_iter().filter(|(_, known)| *known) {
            record.stamp(field, &from);
        }
    }
}
