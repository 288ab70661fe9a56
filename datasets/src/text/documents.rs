//! Documents and rows out of files, one at a time.
//!
//! A file whose name ends in `.jsonl` has a document a line, `{"text": "..."}` and nothing else; any other file is one document
//! of UTF-8. A document has at most [`MOST`] bytes, so that memory is bounded whatever a file holds.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

/// Most bytes of a document, and of a line of JSONL.
pub const MOST: usize = 16 << 20;

/// A file that is no documents.
#[derive(Debug, Error)]
pub enum TextError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A document that is none.
    #[error("{path}: {place}found {found}, expected {expected}")]
    Document {
        /// The file.
        path: PathBuf,
        /// `line 3: ` of JSONL, nothing of text.
        place: String,
        /// What is there.
        found: String,
        /// What should be.
        expected: String,
    },
}

/// The documents of a file.
#[derive(Debug)]
pub struct Documents(Source);

#[derive(Debug)]
enum Source {
    Rows(Rows<Row>),
    /// A text, until it has been read.
    Text(Option<Bounded>),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    text: String,
}

impl Documents {
    /// Opens a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> Result<Self, TextError> {
        let lines = path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("jsonl"));
        Ok(Self(match lines {
            true => Source::Rows(Rows::open(path, "{\"text\": \"...\"} and no other column")?),
            false => Source::Text(Some(Bounded::open(path, false)?)),
        }))
    }
}

impl Iterator for Documents {
    type Item = Result<String, TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Source::Rows(rows) => Some(rows.next()?.map(|(_, row)| row.text)),
            Source::Text(text) => text.take()?.read().transpose(),
        }
    }
}

/// The rows of a file of JSONL, an object a line, with the numbers of their lines, from 1. Lines of nothing but space are passed
/// over.
///
/// ```
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Row {
///     word: String,
/// }
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("words.jsonl");
/// std::fs::write(&path, "{\"word\": \"bell\"}\n\n{\"name\": 3}\n")?;
/// let mut rows = fulgur_datasets::text::Rows::<Row>::open(&path, "{\"word\": ..}")?;
/// let (line, row) = rows.next().unwrap()?;
/// assert_eq!((line, row.word.as_str()), (1, "bell"));
/// let error = rows.next().unwrap().err().unwrap().to_string();
/// assert!(error.contains("line 3: found unknown field `name`"), "{error}");
/// assert!(rows.next().is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Rows<T> {
    file: Bounded,
    /// What a row should be, for the errors.
    expected: String,
    done: bool,
    row: PhantomData<T>,
}

impl<T: DeserializeOwned> Rows<T> {
    /// Opens a file whose rows are what `expected` says, in words.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path, expected: &str) -> Result<Self, TextError> {
        Ok(Self {
            file: Bounded::open(path, true)?,
            expected: expected.to_owned(),
            done: false,
            row: PhantomData,
        })
    }

    /// About the row that came last: what is in it, and what should be.
    pub fn wrong(&self, found: impl Into<String>, expected: &str) -> TextError {
        self.file.wrong(found, expected)
    }

    fn read(&mut self) -> Result<Option<(usize, T)>, TextError> {
        loop {
            let Some(text) = self.file.read()? else {
                return Ok(None);
            };
            if text.trim().is_empty() {
                continue;
            }
            return match serde_json::from_str(&text) {
                Ok(row) => Ok(Some((self.file.line, row))),
                Err(error) => Err(self.wrong(error.to_string(), &self.expected)),
            };
        }
    }
}

impl<T: DeserializeOwned> Iterator for Rows<T> {
    type Item = Result<(usize, T), TextError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let next = self.read().transpose();
        self.done |= !matches!(next, Some(Ok(_)));
        next
    }
}

/// A file of UTF-8 whose lines, or all of it, have at most [`MOST`] bytes.
#[derive(Debug)]
struct Bounded {
    path: PathBuf,
    file: BufReader<File>,
    lines: bool,
    line: usize,
}

impl Bounded {
    fn open(path: &Path, lines: bool) -> Result<Self, TextError> {
        let wrong = |source| TextError::Read {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(wrong)?;
        if file.metadata().map_err(wrong)?.is_dir() {
            return Err(wrong(std::io::ErrorKind::IsADirectory.into()));
        }
        Ok(Self {
            path: path.to_owned(),
            file: BufReader::with_capacity(1 << 20, file),
            lines,
            line: 0,
        })
    }

    fn wrong(&self, found: impl Into<String>, expected: &str) -> TextError {
        TextError::Document {
            path: self.path.clone(),
            place: match self.lines {
                true => format!("line {}: ", self.line),
                false => String::new(),
            },
            found: found.into(),
            expected: expected.to_owned(),
        }
    }

    /// The next line without its end, or everything; none at the end of the file.
    fn read(&mut self) -> Result<Option<String>, TextError> {
        let mut bytes = Vec::new();
        let limit = MOST as u64 + 2;
        let mut limited = self.file.by_ref().take(limit);
        let read = match self.lines {
            true => limited.read_until(b'\n', &mut bytes),
            false => limited.read_to_end(&mut bytes),
        };
        let count = read.map_err(|source| TextError::Read {
            path: self.path.clone(),
            source,
        })?;
        self.line += 1;
        if count == 0 {
            return Ok(None);
        }
        if bytes.last() == Some(&b'\n') && self.lines {
            bytes.pop();
        }
        if bytes.len() > MOST {
            return Err(self.wrong("more", &format!("at most {MOST} bytes a document")));
        }
        String::from_utf8(bytes).map(Some).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            self.wrong(format!("no UTF-8 at byte {at}"), "UTF-8")
        })
    }
}

/// A document as a line of JSONL, with its end.
pub fn line_of(text: &str) -> String {
    // A map of one string is always JSON.
    format!("{}\n", serde_json::json!({ "text": text }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let documents = Documents::open(&path).map_err(|error| error.to_string())?;
        documents
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }

    #[test]
    fn lines_and_files_are_documents() {
        let lines = [line_of("a \"b\"\nc"), "\n".into(), line_of("")].concat();
        assert_eq!(read("x.jsonl", lines.as_bytes()).unwrap(), ["a \"b\"\nc", ""]);
        assert_eq!(
            read("x.jsonl", b"{\"text\": \"no end of line\"}").unwrap(),
            ["no end of line"]
        );
        assert_eq!(read("x.txt", b"one\ntwo\n").unwrap(), ["one\ntwo\n"]);
        assert!(read("x.txt", b"").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_document_is_told_in_one_line() {
        let good = line_of("fine");
        let second = |bytes: &[u8]| read("x.jsonl", &[good.as_bytes(), bytes].concat()).unwrap_err();
        for (bytes, words) in [
            (&b"{\"text\": \"x\", \"url\": 3}\n"[..], "unknown field `url`"),
            (b"{\"url\": \"x\"}\n", "unknown field `url`"),
            (b"{}\n", "missing field `text`"),
            (b"{\"text\": 3}\n", "expected a string"),
            (b"plain words\n", "expected value"),
            (b"{\"text\": \"\xff\"}\n", "no UTF-8 at byte 10"),
        ] {
            let line = second(bytes);
            assert!(line.contains("line 2: found ") && line.contains(words), "{line}");
            assert_eq!(line.lines().count(), 1);
        }
        let line = read("x.txt", b"ab\xc3").unwrap_err();
        assert!(line.contains("no UTF-8 at byte 2"), "{line}");
        let long = vec![b'a'; MOST + 1];
        assert!(
            read("x.txt", &long)
                .unwrap_err()
                .contains("found more, expected at most")
        );
        assert!(
            read("x.jsonl", &vec![b'a'; 3 * MOST])
                .unwrap_err()
                .contains("line 1: found more")
        );
        assert_eq!(read("x.txt", &long[1..]).unwrap()[0].len(), MOST);
    }
}
