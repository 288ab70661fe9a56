//! The release's caption file: one clip a line, its name and then its caption.
//!
//! ```text
//! P2RPnCJZMBo_290000_300000.mp4 A dog barks at a ball.
//! -a_b_c-d_1__0_10000.mp4
//! A caption that stands on the line below its clip.
//! ```
//!
//! A line whose first word is a clip's name opens a record. If nothing follows the name, the next line of text that is no
//! name is the caption. Other lines are ignored and counted, and so are names that came before: the first one is kept.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::io::{BufRead, BufReader};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::counts::{Counts, Problem};
use super::error::CaptionError;
use super::lines::{LONGEST, Line, Lines};
use super::record::Record;
use super::token::{Refusal, Token};

/// Flag of a record without a caption.
pub(crate) const NO_CAPTION: &str = "no_caption";
/// Flag of a record whose caption held bytes that are no UTF-8; each run of them is now U+FFFD.
pub(crate) const BROKEN_UTF8: &str = "broken_utf8";

/// The clips of a caption file.
#[derive(Debug)]
pub struct Captions<R = BufReader<File>> {
    lines: Lines<R>,
    length: u64,
    seen: Seen,
    counts: Counts,
    /// A record that waits for its caption.
    open: Option<Pending>,
    /// Records that are complete; at most two.
    ready: VecDeque<Record>,
    ended: bool,
}

/// A record under construction.
#[derive(Debug)]
struct Pending {
    record: Record,
    line: u64,
    fate: Fate,
}

/// What becomes of a record once it is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Kept,
    Duplicate,
    Rejected(Refusal),
}

impl Captions {
    /// Opens a caption file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> Result<Self, CaptionError> {
        let (lines, length) = Lines::open(path)?;
        Ok(Self::over(lines, length))
    }
}

impl<R: BufRead> Captions<R> {
    /// The clips of a text; `name` stands for it in errors.
    pub fn new(name: impl AsRef<Path>, text: R) -> Self {
        Self::over(Lines::new(name.as_ref(), text, LONGEST), 0)
    }

    fn over(lines: Lines<R>, length: u64) -> Self {
        Self {
            lines,
            length,
            seen: Seen::default(),
            counts: Counts::default(),
            open: None,
            ready: VecDeque::new(),
            ended: false,
        }
    }

    /// What was counted so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Bytes that were read, and those of the file (0 where that is not known).
    pub fn position(&self) -> (u64, u64) {
        (self.lines.bytes(), self.length)
    }

    /// The next clip that is kept; none at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn next_clip(&mut self) -> Result<Option<Record>, CaptionError> {
        loop {
            if let Some(record) = self.ready.pop_front() {
                return Ok(Some(record));
            }
            if self.ended {
                return Ok(None);
            }
            let (whole, line) = match self.lines.next()? {
                Some(Line::Whole(bytes)) => (true, Text::of(bytes)),
                Some(Line::Beginning(bytes)) => (false, Text::of(bytes)),
                None => {
                    self.ended = true;
                    self.close();
                    continue;
                }
            };
            self.counts.lines += 1;
            let number = self.lines.number();
            if line.broken {
                self.counts.broken_utf8 += 1;
                self.counts.example(Problem::BrokenUtf8, number, &line.text);
            }
            let mut text = &*line.text;
            if number == 1 {
                text = text.strip_prefix('\u{feff}').unwrap_or(text);
            }
            let text = text.trim();
            let waiting = Waiting {
                counts: &mut self.counts,
                seen: &mut self.seen,
                open: &mut self.open,
                ready: &mut self.ready,
            };
            waiting.take(number, text, whole, line.broken);
        }
    }

    fn close(&mut self) {
        let waiting = Waiting {
            counts: &mut self.counts,
            seen: &mut self.seen,
            open: &mut self.open,
            ready: &mut self.ready,
        };
        waiting.close();
    }
}

/// What a line changes; apart from the line itself, which is borrowed from the file.
struct Waiting<'a> {
    counts: &'a mut Counts,
    seen: &'a mut Seen,
    open: &'a mut Option<Pending>,
    ready: &'a mut VecDeque<Record>,
}

impl Waiting<'_> {
    fn take(mut self, line: u64, text: &str, whole: bool, broken: bool) {
        if let Some((token, rest)) = Token::leading(text) {
            self.close_open();
            let fate = match token.times() {
                Ok(_) if !whole => Fate::Rejected(Refusal::LineTooLong),
                Ok(_) if !self.seen.insert(token.text) => Fate::Duplicate,
                Ok(_) => Fate::Kept,
                Err(refusal) => Fate::Rejected(refusal),
            };
            let (start_ms, end_ms) = token.times().unwrap_or_default();
            let record = Record::of_clip(token.id(), token.video_id, start_ms, end_ms);
            *self.open = Some(Pending { record, line, fate });
            if !rest.is_empty() {
                self.caption(rest.trim_start(), broken);
                self.close_open();
            }
            return;
        }
        match self.open.as_mut() {
            Some(open) if !text.is_empty() => {
                if !whole {
                    open.fate = Fate::Rejected(Refusal::LineTooLong);
                }
                self.counts.two_line += u64::from(open.fate == Fate::Kept);
                self.caption(text, broken);
                self.close_open();
            }
            _ => {
                self.counts.ignored_lines += 1;
                self.counts.blank_lines += u64::from(text.is_empty());
                if !text.is_empty() {
                    self.counts.example(Problem::IgnoredLine, line, text);
                }
            }
        }
    }

    fn caption(&mut self, text: &str, broken: bool) {
        if let Some(open) = self.open.as_mut().filter(|open| open.fate == Fate::Kept) {
            open.record.caption = Some(text.to_owned());
            if broken {
                open.record.flag(BROKEN_UTF8);
            }
        }
    }

    fn close(mut self) {
        self.close_open();
    }

    fn close_open(&mut self) {
        let Some(Pending {
            mut record,
            line,
            fate,
        }) = self.open.take()
        else {
            return;
        };
        match fate {
            Fate::Kept => {
                let has_caption = record.caption.is_some();
                self.counts.keep(line, &record.id, has_caption);
                if !has_caption {
                    record.caption = Some(String::new());
                    record.flag(NO_CAPTION);
                }
                self.ready.push_back(record);
            }
            Fate::Duplicate => self.counts.duplicate(line, &record.id),
            Fate::Rejected(refusal) => self.counts.reject(refusal.name(), line, &record.id),
        }
    }
}

/// A line as text.
struct Text {
    text: String,
    broken: bool,
}

impl Text {
    fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let broken = matches!(text, Cow::Owned(_));
        Self {
            text: text.into_owned(),
            broken,
        }
    }
}

/// Names that were seen, as the first 8 bytes of their SHA-256: two names of two million are taken for one with a
/// probability of 1e-7.
#[derive(Debug, Default)]
pub(crate) struct Seen(HashSet<u64, BuildHasherDefault<AsItIs>>);

impl Seen {
    /// Notes a name; whether it is new.
    pub(crate) fn insert(&mut self, name: &str) -> bool {
        self.0.insert(hash(name.as_bytes()))
    }
}

/// The first 8 bytes of the SHA-256, as a number that begins with its highest byte.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let digest = Sha256::digest(bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(first)
}

/// Hashes of hashes are those hashes.
#[derive(Debug, Default)]
pub(crate) struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &[u8]) -> (Vec<Record>, Counts) {
        let mut captions = Captions::new("release.txt", text);
        let mut records = Vec::new();
        while let Some(record) = captions.next_clip().unwrap() {
            records.push(record);
        }
        (records, captions.counts().clone())
    }

    fn captions(records: &[Record]) -> Vec<(&str, &str)> {
        records
            .iter()
            .map(|record| (&record.id[..11], record.caption.as_deref().unwrap()))
            .collect()
    }

    #[test]
    fn records_have_their_captions_on_their_line_or_below() {
        let text = "P2RPnCJZMBo_290000_300000.mp4 A dog barks.\r\n\
                    -abcdefghij_0_10000.mp4\n\
                    Below its name.\n\
                    a_b_c_d_e_f_0_10000.mp4   \n\
                    \n\
                    \tAfter a blank line. \n\
                    klmnopqrstu_0_10000.mp4\n\
                    vwxyzABCDEF_0_10000.mp4 The one before has none.\n\
                    GHIJKLMNOPQ_0_10000.mp4";
        let (records, counts) = parse(text.as_bytes());
        assert_eq!(
            captions(&records),
            [
                ("P2RPnCJZMBo", "A dog barks."),
                ("-abcdefghij", "Below its name."),
                ("a_b_c_d_e_f", "After a blank line."),
                ("klmnopqrstu", ""),
                ("vwxyzABCDEF", "The one before has none."),
                ("GHIJKLMNOPQ", ""),
            ]
        );
        assert_eq!((counts.records, counts.captions, counts.no_caption), (6, 4, 2));
        assert_eq!(
            (counts.two_line, counts.ignored_lines, counts.blank_lines),
            (2, 1, 1)
        );
        assert_eq!((counts.lines, counts.rejected, counts.duplicates), (9, 0, 0));
        let first = &records[0];
        assert_eq!((first.start_ms, first.end_ms), (Some(290_000), Some(300_000)));
        assert_eq!(first.video_id.as_deref(), Some("P2RPnCJZMBo"));
        assert!(first.flags.is_empty());
        assert_eq!(records[5].flags, ["no_caption"]);
    }

    #[test]
    fn the_first_of_equal_names_is_kept_and_others_are_counted() {
        let text = "P2RPnCJZMBo_0_10000.mp4 First.\n\
                    P2RPnCJZMBo_0_10000.mp4\n\
                    The caption of the second.\n\
                    P2RPnCJZMBo_10000_20000.mp4 Another part.\n\
                    P2RPnCJZMBo_00_10000.mp4 Another name.\n\
                    P2RPnCJZMBo_0_10000.mp4 Third.\n";
        let (records, counts) = parse(text.as_bytes());
        let all: Vec<&str> = records
            .iter()
            .map(|record| record.caption.as_deref().unwrap())
            .collect();
        assert_eq!(all, ["First.", "Another part.", "Another name."]);
        assert_eq!(
            (counts.duplicates, counts.ignored_lines, counts.two_line),
            (2, 0, 0)
        );
        let examples = &counts.examples[&Problem::Duplicate];
        assert_eq!((examples[0].line, examples[1].line), (2, 6));
    }

    #[test]
    fn clips_that_cannot_be_are_rejected_with_their_captions() {
        let text = "P2RPnCJZMBo_10_10.mp4 No length.\n\
                    P2RPnCJZMBo_10_5.mp4\n\
                    Its caption.\n\
                    P2RPnCJZMBo_10_5.mp4 Again.\n\
                    P2RPnCJZMBo_0_18446744073709551616.mp4 Too long.\n\
                    P2RPnCJZMBo_10_20.mp4 Fine.\n";
        let (records, counts) = parse(text.as_bytes());
        assert_eq!(captions(&records), [("P2RPnCJZMBo", "Fine.")]);
        assert_eq!(
            (counts.rejected, counts.duplicates, counts.ignored_lines),
            (4, 0, 0)
        );
        assert_eq!(counts.rejected_reasons["end_not_after_start"], 3);
        assert_eq!(counts.rejected_reasons["time_too_large"], 1);
    }

    #[test]
    fn junk_is_ignored_and_counted() {
        let text = b"\xef\xbb\xbfP2RPnCJZMBo_0_10000.mp4 After a byte order mark.\n\
                     junk before anything\n\
                     http://example.org/P2RPnCJZMBo_0_10000.mp4 no name\n\
                     \n\
                     \x00\x01\x02\n\
                     \xff\xfe broken junk\n\
                     abcdefghijk_0_10000.mp4 caf\xe9 and \xff\xff.\n";
        let (records, counts) = parse(text);
        assert_eq!(
            captions(&records),
            [
                ("P2RPnCJZMBo", "After a byte order mark."),
                ("abcdefghijk", "caf\u{fffd} and \u{fffd}\u{fffd}."),
            ]
        );
        assert_eq!(
            (counts.ignored_lines, counts.blank_lines, counts.broken_utf8),
            (5, 1, 2)
        );
        assert_eq!(records[1].flags, ["broken_utf8"]);
        let lines: Vec<u64> = counts.examples[&Problem::BrokenUtf8]
            .iter()
            .map(|e| e.line)
            .collect();
        assert_eq!(lines, [6, 7]);
    }

    #[test]
    fn endless_lines_take_bounded_memory() {
        let mut text = b"P2RPnCJZMBo_0_10000.mp4 ".to_vec();
        text.resize(LONGEST + 100, b'a');
        text.extend_from_slice(b"\nabcdefghijk_0_10000.mp4\n");
        let long = text.len() + LONGEST + 1;
        text.resize(long, b'b');
        text.extend_from_slice(b"\n");
        text.resize(text.len() + LONGEST + 1, b'c');
        text.extend_from_slice(b"\nGHIJKLMNOPQ_0_10000.mp4 Fine.\n");
        let (records, counts) = parse(&text);
        assert_eq!(captions(&records), [("GHIJKLMNOPQ", "Fine.")]);
        assert_eq!((counts.rejected, counts.ignored_lines), (2, 1));
        assert_eq!(counts.rejected_reasons["line_too_long"], 2);
    }

    #[test]
    fn an_empty_file_has_no_records() {
        let (records, counts) = parse(b"");
        assert!(records.is_empty());
        assert_eq!(counts, Counts::default());
    }
}
