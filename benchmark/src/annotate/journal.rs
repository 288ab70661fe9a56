//! What a run has done so far, in a file that only grows: a line a result, written when the result is there.
//!
//! A process that is killed loses the results it was about to write; half a line at the end is cut off when the run goes
//! on. In memory are the places of finished clips, 8 bytes each, and the results of unfinished ones.
//!
//! ```text
//! {"n":17,"stage":"frames","out":["a dog runs"]}
//! {"n":17,"kept":{"id":"...", ...}}
//! {"n":18,"dropped":"silent","record":{...}}
//! {"n":19,"failed":"429 after 5 tries","record":{...}}
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use fulgur_datasets::atomic::write_atomic;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::captions::{CaptionError, Line, Lines, Record, json_fields};

/// Names of files in the folder of a run.
const JOURNAL: &str = "journal.jsonl";
const SETTINGS: &str = "settings.json";
const LOCK: &str = "lock";
/// Bytes that are read at once when results are gathered.
const WINDOW: usize = 1 << 20;

/// What can be wrong with the folder of a run.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another run is at work in it.
    #[error("{}: another run is at work in this folder", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// It belongs to a run with other settings.
    #[error(
        "{}: {field}: found {found}, expected {expected}; the folder belongs to another run: name another one with --work, or \
         start anew with --restart", path.display()
    )]
    Settings {
        /// The folder.
        path: PathBuf,
        /// The setting.
        field: String,
        /// What the folder was made with.
        found: String,
        /// What is asked for.
        expected: String,
    },
    /// A file of the run was changed from outside.
    #[error("{}: damaged: {reason}; start anew with --restart", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A line cannot be read.
    #[error(transparent)]
    Line(#[from] CaptionError),
}

impl JournalError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { path, source }
    }
}

/// What became of a clip.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum End {
    /// It goes into the manifest.
    Kept(Record),
    /// It does not, for this reason.
    Dropped(&'static str, Record),
    /// It could not be done.
    Failed(String, Record),
}

/// Results of stages of one clip.
pub(crate) type Partial = BTreeMap<String, Vec<String>>;

/// The results of a run.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    length: u64,
    /// Place of each clip's last line, plus 1; 0 where it is not finished.
    ends: Vec<u64>,
    partial: HashMap<u64, Partial>,
    finished: u64,
    /// Finished clips that stay.
    kept: u64,
    /// Finished clips that do not, by reason.
    dropped: BTreeMap<String, u64>,
    _lock: File,
}

impl Journal {
    /// Opens the folder of a run, and takes it for this process. Settings that differ from those of an earlier run in it are
    /// refused; with `restart` its results are thrown away first.
    pub(crate) fn open(
        folder: &Path,
        settings: &BTreeMap<String, String>,
        restart: bool,
    ) -> Result<Self, JournalError> {
        std::fs::create_dir_all(folder).map_err(JournalError::io(folder))?;
        let lock = take(folder)?;
        let path = folder.join(JOURNAL);
        let known = folder.join(SETTINGS);
        if restart {
            for file in [&path, &known] {
                match std::fs::remove_file(file) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(JournalError::io(file)(error));
                    }
                    _ => {}
                }
            }
        }
        compare(&known, folder, settings)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(JournalError::io(&path))?;
        let mut journal = Self {
            path,
            file,
            length: 0,
            ends: Vec::new(),
            partial: HashMap::new(),
            finished: 0,
            kept: 0,
            dropped: BTreeMap::new(),
            _lock: lock,
        };
        journal.replay()?;
        Ok(journal)
    }

    /// Reads what is there, and cuts off what is no whole line.
    fn replay(&mut self) -> Result<(), JournalError> {
        let (mut lines, length) = Lines::open(&self.path)?;
        let mut good = 0;
        while let Some(Line::Whole(bytes)) = lines.next()? {
            let Some(entry) = Entry::parse(bytes) else {
                break;
            };
            // The last line may be whole but for its end, and then the next one would be written behind it.
            if lines.bytes() == length
                && !ends_with_newline(&mut self.file, length).map_err(JournalError::io(&self.path))?
            {
                break;
            }
            match entry {
                Entry::Stage { n, stage, out } => {
                    self.partial.entry(n).or_default().insert(stage, out);
                }
                // What failed is tried again.
                Entry::Failed => {}
                Entry::Kept { n } => self.finish(n, good + 1, Kind::Kept),
                Entry::Dropped { n, reason } => self.finish(n, good + 1, Kind::Dropped(&reason)),
            }
            good = lines.bytes();
        }
        if good < length {
            self.file.set_len(good).map_err(JournalError::io(&self.path))?;
        }
        self.length = good;
        self.file
            .seek(SeekFrom::End(0))
            .map_err(JournalError::io(&self.path))?;
        Ok(())
    }

    /// Notes where the last line of a clip is.
    fn finish(&mut self, n: u64, place: u64, kind: Kind<'_>) {
        let at = n as usize;
        if at >= self.ends.len() {
            self.ends.resize(at + 1, 0);
        }
        if self.ends[at] == 0 {
            self.finished += 1;
            match kind {
                Kind::Kept => self.kept += 1,
                Kind::Dropped(reason) => *self.dropped.entry(reason.to_owned()).or_default() += 1,
                Kind::Failed => {}
            }
        }
        self.ends[at] = place;
        self.partial.remove(&n);
    }

    /// Finished clips that stay, and those that do not, by reason.
    pub(crate) fn counts(&self) -> (u64, &BTreeMap<String, u64>) {
        (self.kept, &self.dropped)
    }

    /// Whether a clip is finished.
    pub(crate) fn is_finished(&self, n: u64) -> bool {
        self.ends.get(n as usize).is_some_and(|place| *place > 0)
    }

    /// Clips that are finished.
    pub(crate) fn finished(&self) -> u64 {
        self.finished
    }

    /// Results of an unfinished clip.
    pub(crate) fn partial(&mut self, n: u64) -> Partial {
        self.partial.remove(&n).unwrap_or_default()
    }

    /// Keeps the result of a stage.
    pub(crate) fn stage(&mut self, n: u64, stage: &str, out: &[String]) -> Result<(), JournalError> {
        let line = serde_json::json!({ "n": n, "stage": stage, "out": out });
        self.append(&line.to_string()).map(drop)
    }

    /// Keeps what became of a clip.
    pub(crate) fn end(&mut self, n: u64, end: &End) -> Result<(), JournalError> {
        let kind = match end {
            End::Kept(_) => Kind::Kept,
            End::Dropped(reason, _) => Kind::Dropped(reason),
            End::Failed(..) => Kind::Failed,
        };
        let line = match end {
            End::Kept(record) => format!("{{\"n\":{n},\"kept\":{}}}", record.to_json()),
            End::Dropped(reason, record) => {
                format!(
                    "{{\"n\":{n},\"dropped\":{},\"record\":{}}}",
                    quoted(reason),
                    record.to_json()
                )
            }
            End::Failed(error, record) => {
                format!(
                    "{{\"n\":{n},\"failed\":{},\"record\":{}}}",
                    quoted(error),
                    record.to_json()
                )
            }
        };
        let place = self.append(&line)?;
        self.finish(n, place + 1, kind);
        Ok(())
    }

    fn append(&mut self, line: &str) -> Result<u64, JournalError> {
        let place = self.length;
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        // In one piece: what the system has taken survives the end of this process.
        if let Err(error) = self.file.write_all(&bytes) {
            // What follows must not stand behind half a line.
            self.file.set_len(place).map_err(JournalError::io(&self.path))?;
            self.file
                .seek(SeekFrom::Start(place))
                .map_err(JournalError::io(&self.path))?;
            return Err(JournalError::io(&self.path)(error));
        }
        self.length += bytes.len() as u64;
        Ok(place)
    }

    /// Puts what was written on the disk.
    pub(crate) fn sync(&self) -> Result<(), JournalError> {
        self.file.sync_data().map_err(JournalError::io(&self.path))
    }

    /// Gives what became of clip 0, 1, ... to `take`: what kind it is, why, and the record's JSON text.
    pub(crate) fn gather(
        &mut self,
        clips: u64,
        mut take: impl FnMut(Gathered<'_>) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        let mut window = Window::default();
        for n in 0..clips {
            let damaged = |reason: &str| JournalError::Damaged {
                path: self.path.clone(),
                reason: format!("clip {n}: {reason}"),
            };
            let place = self.ends.get(n as usize).copied().unwrap_or(0);
            if place == 0 {
                return Err(damaged("not finished"));
            }
            let line = window
                .line(&mut self.file, place - 1, self.length)
                .map_err(JournalError::io(&self.path))?
                .ok_or_else(|| damaged("its line does not end"))?;
            let fields = json_fields(line).map_err(|_| damaged("its line is no JSON"))?;
            let field = |name: &str| {
                fields
                    .iter()
                    .find(|(known, _)| known == name)
                    .map(|(_, text)| *text)
            };
            let text =
                |raw: &str| serde_json::from_str::<String>(raw).map_err(|_| damaged("its reason is no text"));
            let record = || field("record").ok_or_else(|| damaged("it has no record"));
            if let Some(record) = field("kept") {
                take(Gathered::Kept(record))?;
            } else if let Some(reason) = field("dropped") {
                take(Gathered::Dropped(&text(reason)?, record()?))?;
            } else if let Some(error) = field("failed") {
                take(Gathered::Failed(&text(error)?, record()?))?;
            } else {
                return Err(damaged("its line is none of an end"));
            }
        }
        self.file
            .seek(SeekFrom::End(0))
            .map_err(JournalError::io(&self.path))?;
        Ok(())
    }
}

/// What became of a clip, with the JSON text of its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gathered<'a> {
    Kept(&'a str),
    Dropped(&'a str, &'a str),
    Failed(&'a str, &'a str),
}

/// How a clip ended.
enum Kind<'a> {
    Kept,
    Dropped(&'a str),
    Failed,
}

/// A line of the journal, as far as it matters when a run goes on.
enum Entry {
    Stage { n: u64, stage: String, out: Vec<String> },
    Kept { n: u64 },
    Dropped { n: u64, reason: String },
    Failed,
}

impl Entry {
    fn parse(line: &[u8]) -> Option<Self> {
        let fields = json_fields(std::str::from_utf8(line).ok()?).ok()?;
        let field = |name: &str| {
            fields
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, text)| *text)
        };
        let n = field("n")?.parse().ok().filter(|n| *n < 1 << 40)?;
        if let Some(stage) = field("stage") {
            let stage = serde_json::from_str(stage).ok()?;
            let out = serde_json::from_str(field("out")?).ok()?;
            return Some(Self::Stage { n, stage, out });
        }
        if let Some(reason) = field("dropped") {
            let reason = serde_json::from_str(reason).ok()?;
            return Some(Self::Dropped { n, reason });
        }
        if field("failed").is_some() {
            return Some(Self::Failed);
        }
        field("kept").map(|_| Self::Kept { n })
    }
}

/// A part of the journal in memory; results of neighbouring clips are neighbours, mostly.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn line(&mut self, file: &mut File, place: u64, length: u64) -> io::Result<Option<&str>> {
        let mut size = WINDOW as u64;
        loop {
            let inside = place
                .checked_sub(self.start)
                .filter(|at| *at < self.bytes.len() as u64);
            let end = inside.and_then(|at| {
                let rest = &self.bytes[at as usize..];
                rest.iter()
                    .position(|byte| *byte == b'\n')
                    .map(|end| (at as usize, at as usize + end))
            });
            if let Some((from, to)) = end {
                return Ok(std::str::from_utf8(&self.bytes[from..to]).ok());
            }
            if self.start == place && self.start + self.bytes.len() as u64 >= length {
                return Ok(None);
            }
            self.start = place;
            self.bytes.clear();
            file.seek(SeekFrom::Start(place))?;
            Read::take(&mut *file, size.min(length.saturating_sub(place))).read_to_end(&mut self.bytes)?;
            size *= 2;
        }
    }
}

fn ends_with_newline(file: &mut File, length: u64) -> io::Result<bool> {
    let mut last = [0];
    file.seek(SeekFrom::Start(length.saturating_sub(1)))?;
    file.read_exact(&mut last)?;
    Ok(last == [b'\n'])
}

/// Takes the folder for this process, until it ends, however it ends.
fn take(folder: &Path) -> Result<File, JournalError> {
    let path = folder.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(JournalError::io(&path))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(JournalError::Locked {
            path: folder.to_path_buf(),
        }),
        Err(error) => Err(JournalError::io(&path)(error.into())),
    }
}

/// Writes the settings of a new run, or compares them with those of the run that the folder belongs to.
fn compare(path: &Path, folder: &Path, settings: &BTreeMap<String, String>) -> Result<(), JournalError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = serde_json::to_string_pretty(settings)
                .map_err(|error| JournalError::io(path)(error.into()))?;
            return write_atomic(path, |file| file.write_all(text.as_bytes()))
                .map_err(JournalError::io(path));
        }
        Err(error) => return Err(JournalError::io(path)(error)),
    };
    let known: BTreeMap<String, String> =
        serde_json::from_str(&text).map_err(|error| JournalError::Damaged {
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
    let names = settings.keys().chain(known.keys());
    for name in names {
        let (found, expected) = (known.get(name), settings.get(name));
        if found != expected {
            let words = |value: Option<&String>| value.cloned().unwrap_or_else(|| "nothing".to_owned());
            return Err(JournalError::Settings {
                path: folder.to_path_buf(),
                field: name.clone(),
                found: words(found),
                expected: words(expected),
            });
        }
    }
    Ok(())
}

fn quoted(text: &str) -> String {
    // A string always becomes JSON.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("seed".to_owned(), seed.to_owned())])
    }

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            ..Record::default()
        }
    }

    fn all(journal: &mut Journal, clips: u64) -> Vec<String> {
        let mut all = Vec::new();
        journal
            .gather(clips, |found| {
                all.push(format!("{found:?}"));
                Ok(())
            })
            .unwrap();
        all
    }

    #[test]
    fn results_come_back_in_the_order_of_the_clips() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
        journal.stage(2, "frames", &["half".to_owned()]).unwrap();
        journal.end(1, &End::Kept(record("b"))).unwrap();
        journal.end(0, &End::Dropped("silent", record("a"))).unwrap();
        journal
            .stage(3, "frames", &["x".to_owned(), "y".to_owned()])
            .unwrap();
        journal
            .end(4, &End::Failed("429\n\"no\"".to_owned(), record("e")))
            .unwrap();
        assert!(matches!(
            Journal::open(folder.path(), &settings("1"), false),
            Err(JournalError::Locked { .. })
        ));
        drop(journal);
        let mut journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
        assert_eq!(
            (
                journal.is_finished(0),
                journal.is_finished(1),
                journal.is_finished(2)
            ),
            (true, true, false)
        );
        // What failed is tried again.
        assert_eq!((journal.is_finished(4), journal.finished()), (false, 2));
        assert_eq!(journal.partial(3)["frames"], ["x", "y"]);
        assert!(journal.partial(0).is_empty());
        for n in 2..5 {
            journal.end(n, &End::Kept(record("later"))).unwrap();
        }
        let found = all(&mut journal, 5);
        assert_eq!(found[0], r#"Dropped("silent", "{\"id\":\"a\",\"flags\":[]}")"#);
        assert!(found[1].contains("b") && found[4].contains("later"));
        // Writing goes on at the end.
        journal
            .end(5, &End::Failed("late".to_owned(), record("f")))
            .unwrap();
        assert!(all(&mut journal, 6)[5].starts_with("Failed(\"late\""));
        let error = journal.gather(7, |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("clip 6: not finished"), "{error}");
    }

    #[test]
    fn any_beginning_of_a_journal_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
        for n in 0..6 {
            journal.stage(n, "frames", &[format!("text {n}")]).unwrap();
            journal.end(n, &End::Kept(record(&format!("clip {n}")))).unwrap();
        }
        drop(journal);
        let path = folder.path().join(JOURNAL);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
            let done = journal.finished();
            assert!((0..6).all(|n| journal.is_finished(n) == (n < done)), "{cut}");
            for n in done..6 {
                journal.end(n, &End::Kept(record(&format!("clip {n}")))).unwrap();
            }
            let found = all(&mut journal, 6);
            assert!((0..6).all(|n| found[n].contains(&format!("clip {n}"))), "{cut}");
        }
        // So is one with nonsense in it, up to there.
        let mut broken = whole.clone();
        broken[whole.len() / 2] = 0xff;
        std::fs::write(&path, &broken).unwrap();
        let journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
        assert!((2..4).contains(&journal.finished()));
    }

    #[test]
    fn other_settings_are_refused_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path(), &settings("1"), false).unwrap();
        journal.end(0, &End::Kept(record("a"))).unwrap();
        drop(journal);
        let error = Journal::open(folder.path(), &settings("2"), false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("seed: found 1, expected 2;") && error.contains("--restart"),
            "{error}"
        );
        let journal = Journal::open(folder.path(), &settings("2"), true).unwrap();
        assert_eq!(journal.finished(), 0);
    }
}
