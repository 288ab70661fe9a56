//! Clips out of the videos they are parts of: decoded, cut at the frame and encoded anew.
//!
//! A clip holds the frames that appear in [start, end), and the sound from its first frame on. Frames are read twice, once
//! for their times and once for their pixels, so that memory does not grow with length or size.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use fulgur_datasets::media::{
    MediaError, ReadOptions, Sound, Video, WriteOptions, for_each_frame, read_clip, write_mp4_frames,
};

use super::record::Record;

/// Endings of videos, in the order in which they are looked for.
pub const ENDINGS: [&str; 8] = ["mp4", "mkv", "webm", "mov", "m4v", "avi", "mpg", "mpeg"];
/// Size of the frames of the first reading.
const SMALL: (usize, usize) = (2, 2);
/// Longest clip: more is a mistake in a name.
const LONGEST_MS: u64 = 3_600_000;
/// Seconds by which the last frame may end before the clip does.
const SHORT_S: f64 = 0.25;

/// How clips are cut.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of the videos, each named by its id.
    pub sources: PathBuf,
    /// Folder of the clips.
    pub output: PathBuf,
    /// How they are encoded.
    pub encoding: WriteOptions,
    /// Raised to give up.
    pub cancel: Option<Arc<AtomicBool>>,
}

/// What became of a clip.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It was cut; its flags.
    Cut(Vec<&'static str>),
    /// It is there already.
    Present,
    /// There is no such video.
    Missing(String),
    /// It cannot be cut.
    Failed(String),
    /// The caller gave up.
    Cancelled,
}

/// Cuts one clip, unless it is there already: its file is `ID.mp4` in the folder of the clips.
#[must_use]
pub fn cut(record: &Record, options: &Options) -> Outcome {
    let Some(output) = clip_path(record, &options.output) else {
        return Outcome::Failed(format!("{:?} is no name of a file", record.id));
    };
    if output.is_file() {
        return Outcome::Present;
    }
    let (Some(video), Some(start), Some(length)) = (&record.video_id, record.start_ms, record.length_ms())
    else {
        return Outcome::Failed("no video_id, start_ms and end_ms".into());
    };
    if length > LONGEST_MS {
        return Outcome::Failed(format!(
            "found a clip of {length} ms, expected at most {LONGEST_MS}"
        ));
    }
    let Some(source) = is_name(video).then(|| find(&options.sources, video)).flatten() else {
        let path = options.sources.join(video);
        return Outcome::Missing(format!("{}.{{{}}}", path.display(), ENDINGS.join(",")));
    };
    match write(
        &source,
        &output,
        start as f64 / 1000.0,
        length as f64 / 1000.0,
        options,
    ) {
        Ok(flags) => Outcome::Cut(flags),
        Err(MediaError::Cancelled { .. }) => Outcome::Cancelled,
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// The file of a clip; none where its id is no name of a file.
#[must_use]
pub fn clip_path(record: &Record, folder: &Path) -> Option<PathBuf> {
    let stem = record.id.strip_suffix(".mp4").unwrap_or(&record.id);
    is_name(stem).then(|| folder.join(format!("{stem}.mp4")))
}

/// Whether a text names a file in a folder, and nothing outside of it.
fn is_name(text: &str) -> bool {
    let plain = |c: char| !(c.is_control() || matches!(c, '/' | '\\' | ':'));
    !text.is_empty() && text.len() <= 200 && !text.starts_with('.') && text.chars().all(plain)
}

fn find(folder: &Path, video: &str) -> Option<PathBuf> {
    let paths = ENDINGS
        .iter()
        .map(|ending| folder.join(format!("{video}.{ending}")));
    paths.into_iter().find(|path| path.is_file())
}

fn write(
    source: &Path,
    output: &Path,
    start_s: f64,
    length_s: f64,
    options: &Options,
) -> Result<Vec<&'static str>, MediaError> {
    let read = ReadOptions {
        start_s,
        duration_s: Some(length_s),
        size: Some(SMALL),
        cancel: options.cancel.clone(),
        ..ReadOptions::default()
    };
    let clip = read_clip(source, &read)?;
    let declared = clip.info.video.as_ref().ok_or_else(|| MediaError::NoStream {
        path: source.to_path_buf(),
        wanted: "video",
    })?;
    let Some(times) = clip.video else {
        return Err(MediaError::Decode {
            path: source.to_path_buf(),
            detail: format!("no frame between {start_s} s and {} s", start_s + length_s),
        });
    };
    // Chroma of half the size needs even sides.
    let even = |side: usize| (side / 2 * 2).max(2);
    let (width, height) = (even(declared.width), even(declared.height));
    let mut flags = Vec::new();
    let first_s = times.times_s[0];
    if first_s + times.duration_s() + SHORT_S < length_s {
        flags.push("short");
    }
    // Sound begins with the first frame, so that both stay together.
    let sound = clip.sound.map(|sound| from(sound, first_s));
    match &sound {
        None => flags.push("no_audio"),
        Some(sound) if sound.is_silent() => flags.push("silent"),
        Some(_) => {}
    }
    let shape = Video {
        frames: Vec::new(),
        times_s: times.times_s.iter().map(|time_s| time_s - first_s).collect(),
        width,
        height,
        ..times
    };
    let read = ReadOptions {
        size: Some((width, height)),
        ..read
    };
    write_mp4_frames(output, &shape, sound.as_ref(), &options.encoding, |push| {
        let mut failed = Ok(());
        for_each_frame(source, &read, |frame| {
            failed = push(frame.rgb);
            match failed {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        failed
    })?;
    Ok(flags)
}

/// The sound without its first `start_s` seconds.
fn from(mut sound: Sound, start_s: f64) -> Sound {
    let skip = (start_s * f64::from(sound.sample_rate)).round() as usize;
    let skip = skip.min(sound.len()) * sound.channels;
    sound.samples.drain(..skip);
    sound
}

#[cfg(test)]
mod tests {
    use fulgur_datasets::media::{probe, write_mp4};

    use super::*;

    /// A video of 6 s whose frames get brighter one by one, with a click at each full second.
    fn source(path: &Path) {
        let frames = (0..150u8).flat_map(|k| vec![k + 50; 66 * 34 * 3]).collect();
        let video = Video::new(frames, 66, 34, 25.0).unwrap();
        let mut samples = vec![0.0f32; 6 * 16_000];
        for second in 0..6 {
            let click = &mut samples[second * 16_000..][..400];
            click
                .iter_mut()
                .enumerate()
                .for_each(|(i, s)| *s = 0.8 * (i as f32 * 0.7).sin());
        }
        let sound = Sound::new(samples, 1, 16_000).unwrap();
        write_mp4(path, &video, Some(&sound), &WriteOptions::default()).unwrap();
    }

    fn options(folder: &Path) -> Options {
        let output = folder.join("clips");
        std::fs::create_dir_all(&output).unwrap();
        Options {
            sources: folder.to_path_buf(),
            output,
            encoding: WriteOptions::default(),
            cancel: None,
        }
    }

    fn record(name: &str) -> Record {
        Record::parse(&format!("{{\"id\":\"{name}\"}}")).unwrap()
    }

    #[test]
    fn a_clip_holds_the_frames_and_the_sound_of_its_times() {
        let folder = tempfile::tempdir().unwrap();
        source(&folder.path().join("P2RPnCJZMBo.mp4"));
        let options = options(folder.path());
        // Frame 50 appears at 2 s; 4.01 s lies behind frame 100 at 4 s.
        let clip = record("P2RPnCJZMBo_2000_4010");
        assert_eq!(cut(&clip, &options), Outcome::Cut(Vec::new()));
        let path = clip_path(&clip, &options.output).unwrap();
        let read = read_clip(&path, &ReadOptions::default()).unwrap();
        let video = read.video.unwrap();
        assert_eq!((video.frame_count, video.width, video.height), (51, 66, 34));
        let grey = |index: usize| f64::from(video.frame(index)[3 * 66 * 17 + 99]);
        assert!(
            (grey(0) - 100.0).abs() < 3.0 && (grey(50) - 150.0).abs() < 3.0,
            "{} {}",
            grey(0),
            grey(50)
        );
        let sound = read.sound.unwrap();
        let energy = |from_s: f64| {
            let at = (from_s * f64::from(sound.sample_rate)) as usize;
            sound.samples[at..at + 300].iter().map(|s| s * s).sum::<f32>()
        };
        assert!(energy(0.0) > 10.0 && energy(1.0) > 10.0 && energy(0.5) < 0.1);
        assert!(path.metadata().unwrap().len() > 0 && probe(&path).unwrap().video.unwrap().codec == "h264");
        assert_eq!(cut(&clip, &options), Outcome::Present);
    }

    #[test]
    fn sound_begins_with_the_first_frame() {
        let folder = tempfile::tempdir().unwrap();
        source(&folder.path().join("P2RPnCJZMBo.mp4"));
        let options = options(folder.path());
        // The first frame at or after 1.97 s is the one at 2 s, where a click begins.
        let clip = record("P2RPnCJZMBo_1970_2970");
        assert_eq!(cut(&clip, &options), Outcome::Cut(Vec::new()));
        let read = read_clip(
            &clip_path(&clip, &options.output).unwrap(),
            &ReadOptions::default(),
        )
        .unwrap();
        let sound = read.sound.unwrap();
        let first = sound.samples.iter().position(|s| s.abs() > 0.2).unwrap() as f64;
        // AAC smears it over a few ms; left where it was, it would come 30 ms late.
        assert!(first / f64::from(sound.sample_rate) < 0.015, "{first}");
    }

    #[test]
    fn videos_that_are_not_there_or_end_before_are_told() {
        let folder = tempfile::tempdir().unwrap();
        source(&folder.path().join("P2RPnCJZMBo.mp4"));
        let options = options(folder.path());
        let outcome = |name: &str| cut(&record(name), &options);
        assert!(
            matches!(outcome("abcdefghijk_0_1000"), Outcome::Missing(path) if path.contains("abcdefghijk"))
        );
        let beyond = outcome("P2RPnCJZMBo_90000_100000");
        assert!(
            matches!(&beyond, Outcome::Failed(why) if why.contains("no frame between 90 s and 100 s")),
            "{beyond:?}"
        );
        assert_eq!(outcome("P2RPnCJZMBo_5000_15000"), Outcome::Cut(vec!["short"]));
        assert!(matches!(outcome("P2RPnCJZMBo_0_36000000"), Outcome::Failed(_)));
        assert!(matches!(outcome("../P2RPnCJZMBo"), Outcome::Failed(_)));
        std::fs::write(folder.path().join("abcdefghijk.mkv"), "no video").unwrap();
        assert!(
            matches!(outcome("abcdefghijk_0_1000"), Outcome::Failed(why) if why.contains("not a media file"))
        );
        let present: Vec<_> = std::fs::read_dir(&options.output).unwrap().collect();
        assert_eq!(present.len(), 1);
    }
}
