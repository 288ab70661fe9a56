//! Clips of a manifest: which of them, and what is read of their media.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgur_benchmark::captions::split::{Part, Rule};
use fulgur_benchmark::captions::{Manifest, Record};

use super::Options;
use crate::train::TaskResult;

/// Of clips that no part is named for, one in so many is held out, and at least one.
const HELD_OUT: usize = 10;

/// A clip with its media.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) caption: String,
    pub(super) video: PathBuf,
    pub(super) audio: Option<PathBuf>,
}

/// The clips of a manifest that are trained on, and those that are held out.
#[derive(Clone, Debug, Default)]
pub(super) struct Listed {
    pub(super) trained: Vec<Entry>,
    pub(super) held_out: Vec<Entry>,
    /// Clips that are left out, by reason.
    pub(super) left_out: BTreeMap<&'static str, usize>,
}

/// Reads the manifest of a recipe, as far as its clips are wanted.
///
/// # Errors
/// It cannot be read, names a file that is not there, or has no clips to train on or to hold out.
pub(super) fn read(path: &Path, options: &Options) -> TaskResult<Listed> {
    let folder = match &options.media {
        Some(folder) => folder.clone(),
        None => path.parent().unwrap_or(Path::new(".")).to_owned(),
    };
    let mut manifest = Manifest::open(path)?;
    let mut listed = Listed::default();
    let mut marked = false;
    while let Some(record) = manifest.next_clip()? {
        let (part, is_marked) = part(&record);
        marked |= is_marked && part != Part::Train;
        let Some(caption) = record.caption_text() else {
            *listed.left_out.entry("no caption").or_default() += 1;
            continue;
        };
        let (to, most) = match part {
            Part::Train => (&mut listed.trained, options.pool),
            Part::Val | Part::Test => (&mut listed.held_out, options.validation),
        };
        // Where nothing is held out yet, some of those to train on will be.
        if to.len() >= most.saturating_add(options.validation) {
            continue;
        }
        let entry = Entry {
            caption: caption.to_owned(),
            video: record.media(&folder),
            audio: record.audio_path.as_ref().map(|audio| folder.join(audio)),
            id: record.id,
        };
        for file in [Some(&entry.video), entry.audio.as_ref()].into_iter().flatten() {
            if !file.is_file() {
                return Err(format!(
                    "{}: clip {:?}: there is no {}, expected its media in {} (tav-published.media names another folder)",
                    path.display(),
                    entry.id,
                    file.display(),
                    folder.display()
                )
                .into());
            }
        }
        to.push(entry);
    }
    if listed.held_out.is_empty() && !marked {
        let held = (listed.trained.len() / HELD_OUT).max(1).min(options.validation);
        let first = listed.trained.len().saturating_sub(held);
        listed.held_out = listed.trained.split_off(first);
    }
    listed.trained.truncate(options.pool);
    listed.held_out.truncate(options.validation);
    if listed.trained.is_empty() || listed.held_out.is_empty() {
        return Err(format!(
            "{}: found {} clips to train on and {} to hold out, expected some of both",
            path.display(),
            listed.trained.len(),
            listed.held_out.len()
        )
        .into());
    }
    Ok(listed)
}

/// The part that a clip is in, and whether the manifest says so.
fn part(record: &Record) -> (Part, bool) {
    match record.split.as_deref() {
        Some("train") => (Part::Train, true),
        Some("val") => (Part::Val, true),
        Some("test") => (Part::Test, true),
        _ => match &record.video_id {
            Some(id) => (Rule::default().part(id), false),
            None => (Part::Train, false),
        },
    }
}

#[cfg(feature = "media")]
mod media {
    //! Frames and samples of a clip.

    use fulgur_datasets::media::{ReadOptions, Sound, read_clip, read_sound};
    use fulgur_datasets::scenes::ClipSpec;

    use super::Entry;
    use crate::train::TaskResult;
    use crate::train::tasks::clips::HostClip;

    impl Entry {
        /// The beginning of a clip in size, rate and length of `spec`, or why it cannot be used.
        ///
        /// # Errors
        /// Its media cannot be decoded.
        pub(in super::super) fn read(&self, spec: &ClipSpec) -> TaskResult<Result<HostClip, &'static str>> {
            let (count, size) = (spec.frames(), spec.width * spec.height * 3);
            let options = ReadOptions {
                duration_s: Some(spec.duration_s),
                max_frames: Some(count),
                size: Some((spec.width, spec.height)),
                fps: Some(spec.fps),
                sample_rate: Some(spec.sample_rate),
                mono: true,
                ..ReadOptions::default()
            };
            let failed = |error: fulgur_datasets::media::MediaError| format!("clip {:?}: {error}", self.id);
            let clip = read_clip(&self.video, &options).map_err(failed)?;
            let apart = self
                .audio
                .as_ref()
                .map(|path| read_sound(path, Some(spec.sample_rate)));
            let sound = match apart.transpose().map_err(failed)? {
                Some(sound) => Some(sound.mono()),
                None => clip.sound.as_ref().map(Sound::mono),
            };
            let Some(video) = clip.video.filter(|video| video.frame_count >= count) else {
                return Ok(Err("too short"));
            };
            let Some(sound) = sound else {
                return Ok(Err("no sound"));
            };
            let (mut frames, mut samples) = (video.frames, sound.samples);
            frames.truncate(count * size);
            samples.resize(spec.samples(), 0.0);
            Ok(Ok(HostClip {
                frames,
                mask: Vec::new(),
                samples,
                scene: None,
            }))
        }
    }
}

#[cfg(not(feature = "media"))]
impl Entry {
    /// As with media, which this build does not read.
    pub(super) fn read(
        &self,
        _: &fulgur_datasets::scenes::ClipSpec,
    ) -> TaskResult<Result<super::super::clips::HostClip, &'static str>> {
        Err(format!(
            "clip {:?}: this program was built without media, expected the feature `media`",
            self.id
        )
        .into())
    }
}
