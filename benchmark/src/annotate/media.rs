//! What stages and filters see and hear of a clip, decoded once.

use fulgur_datasets::media::{Info, Picture, Sound};

/// Seconds of a piece whose level is measured.
const PIECE_S: f64 = 0.05;

/// A clip, opened, and decoded as far as somebody wants it.
#[derive(Clone, Debug, Default)]
pub struct Media {
    /// What the container says.
    pub info: Info,
    /// Frames from the middles of equal parts of the clip, RGB.
    pub frames: Vec<Picture>,
    /// Mean difference of grey between frames half a second apart, of 0 to 1; none of a single one.
    pub motion: Option<f64>,
    /// How loud the sound is.
    pub loudness: Option<Loudness>,
    /// The sound, one channel.
    pub sound: Option<Sound>,
}

/// How loud a sound is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loudness {
    /// Root mean square of all samples, in dB of full scale; minus infinity for digital silence.
    pub rms_db: f64,
    /// Share of pieces of 50 ms below the level of silence.
    pub silent_share: f64,
}

impl Loudness {
    /// Of all channels of a sound; the level of silence is in dB of full scale.
    #[must_use]
    pub fn of(sound: &Sound, silence_db: f64) -> Self {
        let piece = ((PIECE_S * f64::from(sound.sample_rate)).round() as usize).max(1) * sound.channels;
        let energy = |samples: &[f32]| samples.iter().map(|s| f64::from(*s) * f64::from(*s)).sum::<f64>();
        let level = |energy: f64, count: usize| 10.0 * (energy / count.max(1) as f64).log10();
        let (mut all, mut pieces, mut silent) = (0.0, 0usize, 0usize);
        for samples in sound.samples.chunks(piece) {
            let energy = energy(samples);
            all += energy;
            pieces += 1;
            silent += usize::from(level(energy, samples.len()) < silence_db);
        }
        Self {
            rms_db: level(all, sound.samples.len()),
            silent_share: if pieces == 0 {
                1.0
            } else {
                silent as f64 / pieces as f64
            },
        }
    }
}

impl Media {
    /// Seconds that the container declares; 0 where it does not.
    #[must_use]
    pub fn duration_s(&self) -> f64 {
        let video = self.info.video.as_ref().map_or(0.0, |video| video.duration_s);
        let sound = self.info.sound.as_ref().map_or(0.0, |sound| sound.duration_s);
        let streams = f64::max(video, sound);
        if streams > 0.0 {
            streams
        } else {
            self.info.duration_s
        }
    }
}

/// Why a clip cannot be looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MediaFault {
    /// There is no file.
    Missing,
    /// It cannot be read.
    Unreadable(String),
    /// The run is to end.
    Stopped,
}

/// Where the pipeline gets media from.
pub trait MediaReader: Send + Sync {
    /// Opens a clip.
    ///
    /// # Errors
    /// It is not there, or no media.
    fn open(&self, record: &crate::captions::Record) -> Result<Media, MediaFault>;

    /// Decodes what is wanted of a clip that was opened.
    ///
    /// # Errors
    /// Nothing in it can be decoded.
    fn decode(&self, record: &crate::captions::Record, media: &mut Media) -> Result<(), MediaFault>;
}

#[cfg(feature = "media")]
pub use folder::Folder;

#[cfg(feature = "media")]
mod folder {
    //! Clips out of files.

    use std::ops::ControlFlow;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use fulgur_datasets::media::{
        MediaError, Picture, ReadOptions, for_each_frame, probe, read_clip, resample,
    };

    use super::super::config::Looking;
    use super::{Loudness, Media, MediaFault, MediaReader};
    use crate::captions::Record;

    /// Seconds between frames that are compared.
    const COMPARED_S: f64 = 0.5;
    /// Points at which they are compared, across and down.
    const GRID: (usize, usize) = (32, 18);

    /// Clips below a folder.
    #[derive(Clone, Debug)]
    pub struct Folder {
        /// The folder.
        pub root: PathBuf,
        /// What is looked at.
        pub looking: Looking,
        /// Level of silence in dB of full scale.
        pub silence_db: f64,
        /// Whether frames are wanted.
        pub frames: bool,
        /// Whether sound is wanted.
        pub sound: bool,
        /// Raised to give up.
        pub cancel: Option<Arc<AtomicBool>>,
    }

    impl MediaReader for Folder {
        fn open(&self, record: &Record) -> Result<Media, MediaFault> {
            let info = probe(&record.media(&self.root)).map_err(fault)?;
            Ok(Media {
                info,
                ..Media::default()
            })
        }

        fn decode(&self, record: &Record, media: &mut Media) -> Result<(), MediaFault> {
            let path = record.media(&self.root);
            if self.frames && media.info.video.is_some() {
                self.see(&path, media).map_err(fault)?;
            }
            if self.sound && media.info.sound.is_some() {
                self.hear(&path, media).map_err(fault)?;
            }
            Ok(())
        }
    }

    impl Folder {
        fn options(&self) -> ReadOptions {
            ReadOptions {
                duration_s: Some(self.looking.max_s),
                cancel: self.cancel.clone(),
                ..ReadOptions::default()
            }
        }

        fn see(&self, path: &Path, media: &mut Media) -> Result<(), MediaError> {
            let Some(video) = &media.info.video else {
                return Ok(());
            };
            let size = fitted(video.width, video.height, self.looking.side);
            let mut duration_s = if video.duration_s > 0.0 {
                video.duration_s
            } else {
                media.info.duration_s
            };
            if duration_s <= 0.0 {
                // The container does not say: the frames do.
                let read = ReadOptions {
                    size: Some((2, 2)),
                    ..self.options()
                };
                for_each_frame(path, &read, |frame| {
                    duration_s = frame.time_s;
                    ControlFlow::Continue(())
                })?;
            }
            let mut picks = Picks::new(self.looking.frames, duration_s.min(self.looking.max_s));
            let mut motion = Motion::default();
            let read = ReadOptions {
                size: Some(size),
                ..self.options()
            };
            for_each_frame(path, &read, |frame| {
                picks.see(frame.rgb, frame.time_s);
                motion.see(frame.rgb, frame.width, frame.height, frame.time_s);
                ControlFlow::Continue(())
            })?;
            media.motion = motion.mean();
            media.frames = picks
                .finish()
                .into_iter()
                .map(|rgb| Picture::new(rgb, size.0, size.1, 3))
                .collect::<Result<_, _>>()?;
            Ok(())
        }

        fn hear(&self, path: &Path, media: &mut Media) -> Result<(), MediaError> {
            let read = ReadOptions {
                video: false,
                ..self.options()
            };
            let Some(sound) = read_clip(path, &read)?.sound else {
                return Ok(());
            };
            media.loudness = Some(Loudness::of(&sound, self.silence_db));
            media.sound = Some(resample(&sound.mono(), self.looking.sample_rate)?);
            Ok(())
        }
    }

    fn fault(error: MediaError) -> MediaFault {
        match error {
            MediaError::Cancelled { .. } => MediaFault::Stopped,
            MediaError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                MediaFault::Missing
            }
            error => MediaFault::Unreadable(error.to_string()),
        }
    }

    /// A size with the same aspect whose longer side is at most `side`.
    fn fitted(width: usize, height: usize, side: usize) -> (usize, usize) {
        let longer = width.max(height).max(1);
        let scaled = |length: usize| {
            if longer <= side {
                length.max(1)
            } else {
                (length * side / longer).max(1)
            }
        };
        (scaled(width), scaled(height))
    }

    /// The frames that are shown at the middles of equal parts of a clip.
    struct Picks {
        times_s: Vec<f64>,
        kept: Vec<Vec<u8>>,
        shown: Vec<u8>,
    }

    impl Picks {
        fn new(count: usize, duration_s: f64) -> Self {
            let time = |k: usize| (k as f64 + 0.5) / count as f64 * duration_s;
            Self {
                times_s: (0..count).map(time).collect(),
                kept: Vec::new(),
                shown: Vec::new(),
            }
        }

        fn see(&mut self, rgb: &[u8], time_s: f64) {
            while self.kept.len() < self.times_s.len() && time_s > self.times_s[self.kept.len()] {
                let frame = if self.shown.is_empty() {
                    rgb.to_vec()
                } else {
                    self.shown.clone()
                };
                self.kept.push(frame);
            }
            if self.kept.len() < self.times_s.len() {
                self.shown.clear();
                self.shown.extend_from_slice(rgb);
            }
        }

        fn finish(mut self) -> Vec<Vec<u8>> {
            while self.kept.len() < self.times_s.len() && !self.shown.is_empty() {
                self.kept.push(self.shown.clone());
            }
            self.kept
        }
    }

    /// How much the picture changes.
    #[derive(Default)]
    struct Motion {
        before: Vec<f64>,
        due_s: f64,
        sum: f64,
        count: usize,
    }

    impl Motion {
        fn see(&mut self, rgb: &[u8], width: usize, height: usize, time_s: f64) {
            if time_s < self.due_s {
                return;
            }
            self.due_s = time_s + COMPARED_S;
            let points = (0..GRID.1).flat_map(|j| (0..GRID.0).map(move |i| (i, j)));
            let grey: Vec<f64> = points
                .map(|(i, j)| {
                    let (x, y) = (
                        (2 * i + 1) * width / (2 * GRID.0),
                        (2 * j + 1) * height / (2 * GRID.1),
                    );
                    let at = 3 * (y.min(height - 1) * width + x.min(width - 1));
                    let [r, g, b] = [rgb[at], rgb[at + 1], rgb[at + 2]].map(f64::from);
                    (0.299 * r + 0.587 * g + 0.114 * b) / 255.0
                })
                .collect();
            if !self.before.is_empty() {
                let difference: f64 = grey.iter().zip(&self.before).map(|(a, b)| (a - b).abs()).sum();
                self.sum += difference / grey.len() as f64;
                self.count += 1;
            }
            self.before = grey;
        }

        fn mean(&self) -> Option<f64> {
            (self.count > 0).then(|| self.sum / self.count as f64)
        }
    }

    #[cfg(test)]
    mod tests {
        use fulgur_datasets::media::{Sound, Video, WriteOptions, write_mp4};

        use super::*;

        #[test]
        fn a_clip_is_seen_at_its_middles_and_heard() {
            let folder = tempfile::tempdir().unwrap();
            let frames = (0..100u8).flat_map(|k| vec![2 * k; 64 * 36 * 3]).collect();
            let video = Video::new(frames, 64, 36, 25.0).unwrap();
            let tone = (0..64_000).map(|i| {
                if i < 32_000 {
                    0.0
                } else {
                    0.5 * (i as f32 * 0.2).sin()
                }
            });
            let sound = Sound::new(tone.collect(), 1, 16_000).unwrap();
            let path = folder.path().join("a.mp4");
            write_mp4(&path, &video, Some(&sound), &WriteOptions::default()).unwrap();
            let reader = Folder {
                root: folder.path().to_path_buf(),
                looking: Looking {
                    frames: 4,
                    side: 32,
                    ..Looking::default()
                },
                silence_db: -60.0,
                frames: true,
                sound: true,
                cancel: None,
            };
            let record = Record::parse(r#"{"id":"a"}"#).unwrap();
            let mut media = reader.open(&record).unwrap();
            assert!((media.duration_s() - 4.0).abs() < 0.05 && media.frames.is_empty());
            reader.decode(&record, &mut media).unwrap();
            // Shown at 0.5, 1.5, 2.5 and 3.5 s are frames 12, 37, 62 and 87.
            assert_eq!(media.frames.len(), 4);
            for (picture, grey) in media.frames.iter().zip([24.0, 74.0, 124.0, 174.0]) {
                assert_eq!((picture.width, picture.height), (32, 18));
                assert!(
                    (f64::from(picture.pixels[300]) - grey).abs() < 4.0,
                    "{} {grey}",
                    picture.pixels[300]
                );
            }
            // 13 frames between comparisons of 12.5, two levels each.
            assert!(
                (media.motion.unwrap() - 26.0 / 255.0).abs() < 0.01,
                "{:?}",
                media.motion
            );
            let loudness = media.loudness.unwrap();
            assert!((loudness.silent_share - 0.5).abs() < 0.04, "{loudness:?}");
            assert!(
                (loudness.rms_db - 10.0 * (0.125f64 / 2.0).log10()).abs() < 0.5,
                "{loudness:?}"
            );
            assert_eq!(media.sound.unwrap().sample_rate, 16_000);
            let absent = Record::parse(r#"{"id":"b"}"#).unwrap();
            assert_eq!(reader.open(&absent).unwrap_err(), MediaFault::Missing);
            std::fs::write(folder.path().join("b.mp4"), "none").unwrap();
            assert!(matches!(reader.open(&absent), Err(MediaFault::Unreadable(_))));
        }

        #[test]
        fn sizes_keep_their_aspect() {
            assert_eq!(fitted(1920, 1080, 512), (512, 288));
            assert_eq!(fitted(100, 60, 512), (100, 60));
            assert_eq!(fitted(10_000, 1, 16), (16, 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_all_channels() {
        // Channels of opposite sign are silent only when they are averaged.
        let samples = (0..8000).map(|i| if i % 2 == 0 { 0.1 } else { -0.1 }).collect();
        let loudness = Loudness::of(&Sound::new(samples, 2, 8000).unwrap(), -60.0);
        assert!(
            (loudness.rms_db + 20.0).abs() < 1e-4 && loudness.silent_share == 0.0,
            "{loudness:?}"
        );
        let none = Loudness::of(&Sound::new(Vec::new(), 1, 8000).unwrap(), -60.0);
        assert_eq!(none.silent_share, 1.0);
        let zeros = Loudness::of(&Sound::new(vec![0.0; 100], 1, 8000).unwrap(), -60.0);
        assert_eq!((zeros.rms_db, zeros.silent_share), (f64::NEG_INFINITY, 1.0));
    }
}
