//! All stages over all clips: several clips at a time, to go on where it was stopped, and with one result however often that
//! was.
//!
//! Results are kept in a folder of the run ([`super::journal`]); the manifest is written from them at the end, in the order
//! of the input, so that it does not depend on which clip was finished first. What compares clips with each other is decided
//! in that order too: the cap of clips a video before anything is done, equal captions at the end.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::journal::{End, Gathered, Journal, JournalError, Partial};
use super::media::{Media, MediaFault, MediaReader};
use super::precomputed::MANIFEST;
use super::stage::{
    About, AudioCaptioner, Clip, ClipFilter, FrameCaptioner, Merger, Modality, Rewriter, StageError, Verdict,
    When,
};
use super::texts::{collapsed, joined};
use crate::captions::{CaptionError, Clips, ManifestWriter, Provenance, Record, Seen, hash};

/// Pause between two times that results are put on the disk.
const SYNC_EVERY: Duration = Duration::from_secs(5);
/// Failures that a report names.
const NAMED: usize = 20;

/// What does the work.
#[derive(Default)]
pub struct Stages {
    /// Describes what is seen; without it the manifest's text stays.
    pub frames: Option<Arc<dyn FrameCaptioner>>,
    /// Describes what is heard.
    pub audio: Option<Arc<dyn AudioCaptioner>>,
    /// Says both in better words.
    pub rewrite: Option<Arc<dyn Rewriter>>,
    /// Joins both; without it the manifest's caption stays.
    pub merge: Option<Arc<dyn Merger>>,
    /// Decide which clips stay.
    pub filters: Vec<Box<dyn ClipFilter>>,
    /// Where media are; without it nothing is seen, heard or judged by its media.
    pub media: Option<Box<dyn MediaReader>>,
}

/// What is worked on.
#[derive(Clone, Debug)]
pub struct Options {
    /// Caption file or manifest.
    pub input: PathBuf,
    /// Manifest of the clips that stay.
    pub output: PathBuf,
    /// Manifest of the others, each with `dropped` or `error`.
    pub left_out: PathBuf,
    /// Folder of the run.
    pub work: PathBuf,
    /// What the results depend on: a folder of a run with other settings is refused.
    pub settings: BTreeMap<String, String>,
    /// Whether results that are there are thrown away.
    pub restart: bool,
    /// Clips that are worked on at the same time.
    pub jobs: usize,
    /// Whether equal captions are left out.
    pub duplicates: bool,
    /// Clips of one video; 0 for any number.
    pub clips_per_video: u32,
    /// Whether the time goes into the provenance; then results depend on when they were made.
    pub times: bool,
    /// Whether nothing is kept and written.
    pub dry_run: bool,
    /// Raised to end.
    pub cancel: Arc<AtomicBool>,
}

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Clips that are done, those of earlier runs included.
    pub done: u64,
    /// Clips that this run has done.
    pub new: u64,
    /// Clips of the input, as far as that can be told.
    pub total: u64,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Clips of the input; of a run that was stopped those that it came to.
    pub clips: u64,
    /// Clips in the manifest; of a run that was stopped those that are done.
    pub annotated: u64,
    /// Clips that were left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Clips that could not be done.
    pub failed: u64,
    /// Clips in the manifest with each flag.
    pub flags: BTreeMap<String, u64>,
    /// The first failures: clip and error.
    pub failures: Vec<(String, String)>,
    /// Clips of the input whose id came before; they are passed over.
    pub duplicates: u64,
    /// Clips of the input that cannot be; they are passed over.
    pub rejected: u64,
    /// Clips that were done by earlier runs.
    pub resumed: u64,
    /// Whether all is done and the manifest is written.
    pub complete: bool,
    /// Why it would be of no use to go on: the first answer that every other clip would get as well.
    pub hopeless: Option<String>,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum AnnotateError {
    /// The input or the output.
    #[error(transparent)]
    File(#[from] CaptionError),
    /// The folder of the run.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Annotates all clips.
///
/// # Errors
/// The input cannot be read, the folder of the run belongs to another one, or the disk refuses. What was done is kept.
pub fn run(
    stages: &Stages,
    options: &Options,
    tell: &(dyn Fn(Progress) + Sync),
) -> Result<Report, AnnotateError> {
    let journal = match options.dry_run {
        true => None,
        false => Some(Journal::open(&options.work, &options.settings, options.restart)?),
    };
    let resumed = journal.as_ref().map_or(0, Journal::finished);
    let feeder = Feeder {
        clips: Clips::open(&options.input)?,
        next: 0,
        videos: HashMap::new(),
        cap: options.clips_per_video,
    };
    let work = Work {
        stages,
        options,
        feeder: Mutex::new(feeder),
        journal: journal.map(Mutex::new),
        tallied: Mutex::new(Report::default()),
        failed: Mutex::new(None),
        stop: AtomicBool::new(false),
        new: AtomicU64::new(0),
        synced: Mutex::new(Instant::now()),
        resumed,
    };
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| work.until_done(tell));
        }
    });
    if let Some(error) = work.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let feeder = work.feeder.into_inner().unwrap_or_else(PoisonError::into_inner);
    let counts = feeder.clips.counts();
    let (duplicates, rejected) = (counts.duplicates, counts.rejected);
    let stopped = work.stop.into_inner() || options.cancel.load(Ordering::SeqCst);
    let Some(journal) = work.journal else {
        let mut report = work.tallied.into_inner().unwrap_or_else(PoisonError::into_inner);
        report.clips = feeder.next;
        report.complete = !stopped;
        (report.duplicates, report.rejected) = (duplicates, rejected);
        return Ok(report);
    };
    let mut journal = journal.into_inner().unwrap_or_else(PoisonError::into_inner);
    journal.sync()?;
    if stopped {
        let tallied = work.tallied.into_inner().unwrap_or_else(PoisonError::into_inner);
        let (kept, dropped) = journal.counts();
        return Ok(Report {
            clips: feeder.next,
            annotated: kept,
            dropped: dropped.clone(),
            duplicates,
            rejected,
            resumed,
            ..tallied
        });
    }
    let mut report = finish(&mut journal, feeder.next, options)?;
    (report.duplicates, report.rejected, report.resumed) = (duplicates, rejected, resumed);
    Ok(report)
}

/// Clips on their way to the workers.
struct Feeder {
    clips: Clips,
    next: u64,
    /// Clips of each video so far.
    videos: HashMap<u64, u32>,
    cap: u32,
}

impl Feeder {
    /// The next clip, its number, and whether its video has enough of them.
    fn next(&mut self) -> Result<Option<(u64, Record, bool)>, CaptionError> {
        let Some(record) = self.clips.next_clip()? else {
            return Ok(None);
        };
        let n = self.next;
        self.next += 1;
        let mut over = false;
        if let (Some(video), true) = (&record.video_id, self.cap > 0) {
            let count = self.videos.entry(hash(video.as_bytes())).or_default();
            over = *count >= self.cap;
            *count += u32::from(!over);
        }
        Ok(Some((n, record, over)))
    }

    fn total(&self) -> u64 {
        let (read, length) = self.clips.position();
        (self.next as f64 * length as f64 / read.max(1) as f64).round() as u64
    }
}

/// What the workers share.
struct Work<'a> {
    stages: &'a Stages,
    options: &'a Options,
    feeder: Mutex<Feeder>,
    journal: Option<Mutex<Journal>>,
    /// What this run did, for reports without a manifest.
    tallied: Mutex<Report>,
    failed: Mutex<Option<AnnotateError>>,
    stop: AtomicBool,
    new: AtomicU64,
    synced: Mutex<Instant>,
    resumed: u64,
}

impl Work<'_> {
    fn until_done(&self, tell: &(dyn Fn(Progress) + Sync)) {
        while !self.stop.load(Ordering::SeqCst) && !self.options.cancel.load(Ordering::SeqCst) {
            match self.one() {
                Ok(Some(total)) => {
                    let new = self.new.fetch_add(1, Ordering::SeqCst) + 1;
                    let done = self.resumed + new;
                    tell(Progress {
                        done,
                        new,
                        total: total.max(done),
                    });
                }
                Ok(None) => return,
                Err(error) => {
                    self.stop.store(true, Ordering::SeqCst);
                    let mut first = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(error);
                    return;
                }
            }
        }
    }

    /// Does the next clip; the number of clips as far as it is known, or none where there is nothing left to do.
    fn one(&self) -> Result<Option<u64>, AnnotateError> {
        let (n, record, over_cap, partial, total) = {
            let mut feeder = self.feeder.lock().unwrap_or_else(PoisonError::into_inner);
            loop {
                let Some((n, record, over_cap)) = feeder.next()? else {
                    return Ok(None);
                };
                let mut journal = self
                    .journal
                    .as_ref()
                    .map(|j| j.lock().unwrap_or_else(PoisonError::into_inner));
                if journal.as_ref().is_some_and(|journal| journal.is_finished(n)) {
                    continue;
                }
                let partial = journal
                    .as_mut()
                    .map(|journal| journal.partial(n))
                    .unwrap_or_default();
                break (n, record, over_cap, partial, feeder.total());
            }
        };
        let end = match over_cap {
            true => Ok(End::Dropped("video_cap", record)),
            false => Annotation {
                stages: self.stages,
                times: self.options.times,
                partial,
                keep: &|stage, out| match &self.journal {
                    Some(journal) => journal
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .stage(n, stage, out),
                    None => Ok(()),
                },
            }
            .of(record),
        };
        let end = match end {
            Ok(end) => end,
            Err(Broken::Stopped) => {
                self.stop.store(true, Ordering::SeqCst);
                return Ok(None);
            }
            Err(Broken::Hopeless(why)) => {
                self.stop.store(true, Ordering::SeqCst);
                let mut tallied = self.tallied.lock().unwrap_or_else(PoisonError::into_inner);
                tallied.hopeless.get_or_insert(why);
                return Ok(None);
            }
            Err(Broken::Journal(error)) => return Err(error.into()),
        };
        self.tally(&end);
        if let Some(journal) = &self.journal {
            let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
            journal.end(n, &end)?;
            let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
            if synced.elapsed() >= SYNC_EVERY {
                journal.sync()?;
                *synced = Instant::now();
            }
        }
        Ok(Some(total))
    }

    fn tally(&self, end: &End) {
        let mut report = self.tallied.lock().unwrap_or_else(PoisonError::into_inner);
        match end {
            End::Kept(_) => report.annotated += 1,
            End::Dropped(reason, _) => *report.dropped.entry((*reason).to_owned()).or_default() += 1,
            End::Failed(error, record) => {
                report.failed += 1;
                if report.failures.len() < NAMED {
                    report.failures.push((record.id.clone(), error.clone()));
                }
            }
        }
    }
}

/// Why a clip has no end.
enum Broken {
    Stopped,
    /// No clip can have one.
    Hopeless(String),
    Journal(JournalError),
}

impl From<JournalError> for Broken {
    fn from(error: JournalError) -> Self {
        Self::Journal(error)
    }
}

/// Keeps the result of a stage.
type Keep<'a> = &'a dyn Fn(&str, &[String]) -> Result<(), JournalError>;

/// The stages of one clip.
struct Annotation<'a> {
    stages: &'a Stages,
    times: bool,
    partial: Partial,
    keep: Keep<'a>,
}

/// What ends a clip early, besides the end of the run.
enum Early {
    Drop(&'static str, Option<String>),
    Fail(String),
    Broken(Broken),
}

impl Annotation<'_> {
    fn of(&self, mut record: Record) -> Result<End, Broken> {
        match self.go(&mut record) {
            Ok(()) => Ok(End::Kept(record)),
            Err(Early::Drop(reason, more)) => {
                if let Some(more) = more {
                    record.set_other("error", &more);
                }
                Ok(End::Dropped(reason, record))
            }
            Err(Early::Fail(error)) => Ok(End::Failed(error, record)),
            Err(Early::Broken(broken)) => Err(broken),
        }
    }

    fn go(&self, record: &mut Record) -> Result<(), Early> {
        let media = self.look(record)?;
        let (frames, sound) = match &media {
            Some(media) => (media.frames.as_slice(), media.sound.as_ref()),
            None => (&[][..], None),
        };
        if let Some(captioner) = &self.stages.frames {
            let about = captioner.about();
            let texts = self.stage("frames", &about, record, |clip| captioner.caption(frames, clip))?;
            record.caption_video = Some(joined(&texts)).filter(|text| !text.is_empty());
            self.stamp(record, "caption_video", "frames", &about, None);
        }
        if let Some(captioner) = &self.stages.audio {
            let about = captioner.about();
            let texts = self.stage("audio", &about, record, |clip| captioner.caption(sound, clip))?;
            record.caption_audio = Some(joined(&texts)).filter(|text| !text.is_empty());
            self.stamp(record, "caption_audio", "audio", &about, None);
        }
        // Frames and sounds are large: they go as soon as nobody looks any more.
        let media = media.filter(|_| self.stages.filters.iter().any(|filter| filter.needs_media()));
        self.judge(When::Captioned, record, media.as_ref())?;
        if let Some(rewriter) = &self.stages.rewrite {
            let about = rewriter.about();
            for (kind, field, name) in [
                (Modality::Visual, "caption_video", "rewrite_visual"),
                (Modality::Audio, "caption_audio", "rewrite_audio"),
            ] {
                let text = match kind {
                    Modality::Visual => record.caption_video.clone(),
                    Modality::Audio => record.caption_audio.clone(),
                };
                let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
                    continue;
                };
                let new = self.text(name, &about, record, |clip| rewriter.rewrite(&text, kind, clip))?;
                let before = record.provenance(field).map(str::to_owned);
                match kind {
                    Modality::Visual => record.caption_video = Some(new),
                    Modality::Audio => record.caption_audio = Some(new),
                }
                self.stamp(record, field, "rewrite", &about, before);
            }
        }
        if let Some(merger) = &self.stages.merge {
            let about = merger.about();
            let video = record.caption_video.clone().unwrap_or_default();
            let audio = record.caption_audio.clone().unwrap_or_default();
            let text = self.text("merge", &about, record, |clip| merger.merge(&video, &audio, clip))?;
            record.caption = Some(text);
            self.stamp(record, "caption", "merge", &about, None);
        }
        self.judge(When::Described, record, media.as_ref())
    }

    /// Opens and decodes the clip, as far as filters leave it.
    fn look(&self, record: &mut Record) -> Result<Option<Media>, Early> {
        let Some(reader) = &self.stages.media else {
            return Ok(None);
        };
        let early = |fault| match fault {
            MediaFault::Missing => Early::Drop("missing", None),
            MediaFault::Unreadable(why) => Early::Drop("unreadable", Some(why)),
            MediaFault::Stopped => Early::Broken(Broken::Stopped),
        };
        let mut media = reader.open(record).map_err(early)?;
        self.judge(When::Opened, record, Some(&media))?;
        reader.decode(record, &mut media).map_err(early)?;
        self.judge(When::Decoded, record, Some(&media))?;
        Ok(Some(media))
    }

    fn judge(&self, when: When, record: &mut Record, media: Option<&Media>) -> Result<(), Early> {
        for filter in self.stages.filters.iter().filter(|filter| filter.when() == when) {
            match filter.judge(record, media) {
                Verdict::Keep => {}
                Verdict::Flag(flag) => record.flag(flag),
                Verdict::Drop(reason) => return Err(Early::Drop(reason, None)),
                Verdict::Fail(why) => return Err(Early::Fail(why)),
            }
        }
        Ok(())
    }

    /// Results of a stage: those of an earlier run, or new ones, which are kept where they cost something.
    fn stage(
        &self,
        name: &str,
        about: &About,
        record: &Record,
        work: impl FnOnce(Clip<'_>) -> Result<Vec<String>, StageError>,
    ) -> Result<Vec<String>, Early> {
        if let Some(out) = self.partial.get(name) {
            return Ok(out.clone());
        }
        let clip = Clip {
            id: &record.id,
            record,
        };
        let out = work(clip).map_err(|error| match error {
            StageError::Clip(why) => Early::Fail(format!("{name}: {why}")),
            StageError::Run(why) => Early::Broken(Broken::Hopeless(format!("{name}: {why}"))),
            StageError::Stopped => Early::Broken(Broken::Stopped),
        })?;
        if about.costly {
            (self.keep)(name, &out).map_err(|error| Early::Broken(error.into()))?;
        }
        Ok(out)
    }

    /// The one text of a stage.
    fn text(
        &self,
        name: &str,
        about: &About,
        record: &Record,
        work: impl FnOnce(Clip<'_>) -> Result<String, StageError>,
    ) -> Result<String, Early> {
        let out = self.stage(name, about, record, |clip| work(clip).map(|text| vec![text]))?;
        Ok(collapsed(&out.join(" ")))
    }

    /// Says where a field is from. What rewriting replaces is told along with it.
    fn stamp(
        &self,
        record: &mut Record,
        field: &str,
        stage: &'static str,
        about: &About,
        before: Option<String>,
    ) {
        if about.backend == MANIFEST {
            return;
        }
        let time = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map(|since| since.as_secs());
        let from = Provenance {
            stage,
            backend: about.backend.clone(),
            model: about.model.clone(),
            prompt_version: about.prompt_version.clone(),
            rule: before
                .map(|before| format!("rewrites {before}"))
                .or_else(|| about.rule.clone()),
            time: time.ok().filter(|_| self.times),
        };
        record.stamp(field, &from);
    }
}

/// Writes both manifests.
fn finish(journal: &mut Journal, clips: u64, options: &Options) -> Result<Report, AnnotateError> {
    let mut report = Report {
        clips,
        complete: true,
        ..Report::default()
    };
    let mut kept = ManifestWriter::create(&options.output)?;
    let mut left_out = ManifestWriter::create(&options.left_out)?;
    let mut captions = Seen::default();
    journal.gather(clips, |found| {
        let (text, dropped, error) = match found {
            Gathered::Kept(text) => (text, None, None),
            Gathered::Dropped(reason, text) => (text, Some(reason), None),
            Gathered::Failed(error, text) => (text, None, Some(error)),
        };
        let mut record = parse(&options.work, text)?;
        let mut dropped = dropped.map(str::to_owned);
        if dropped.is_none() && error.is_none() && options.duplicates {
            let caption = collapsed(record.caption.as_deref().unwrap_or_default()).to_lowercase();
            if !caption.is_empty() && !captions.insert(&caption) {
                dropped = Some("duplicate_caption".to_owned());
            }
        }
        if let Some(reason) = dropped {
            record.set_other("dropped", &reason);
            left_out.write(&record)?;
            *report.dropped.entry(reason).or_default() += 1;
        } else if let Some(error) = error {
            record.set_other("error", error);
            left_out.write(&record)?;
            report.failed += 1;
            if report.failures.len() < NAMED {
                report.failures.push((record.id.clone(), error.to_owned()));
            }
        } else {
            for flag in &record.flags {
                *report.flags.entry(flag.clone()).or_default() += 1;
            }
            kept.write(&record)?;
            report.annotated += 1;
        }
        Ok(())
    })?;
    // The manifest comes last: where it is, all is done.
    left_out.commit()?;
    kept.commit()?;
    Ok(report)
}

fn parse(work: &Path, text: &str) -> Result<Record, JournalError> {
    Record::parse(text).map_err(|wrong| JournalError::Damaged {
        path: work.to_path_buf(),
        reason: format!(
            "{}: found {}, expected {}",
            wrong.field, wrong.found, wrong.expected
        ),
    })
}

#[cfg(test)]
mod tests;
