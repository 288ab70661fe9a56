//! Lines of a file with a bound on their length, so that no file can ask for more memory than that.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::error::{CaptionError, Wrong};

/// Most bytes of a line that are kept.
pub(crate) const LONGEST: usize = 16 << 20;
/// Bytes that are read at once.
const BUFFER: usize = 1 << 20;

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// Its first bytes: it is longer than the bound.
    Beginning(&'a [u8]),
}

impl<'a> Line<'a> {
    /// The whole line as text; `field` is what errors call it.
    pub(crate) fn text(&self, field: &'static str) -> Result<&'a str, Wrong> {
        match self {
            Self::Whole(bytes) => utf8(bytes, field),
            Self::Beginning(_) => Err(too_long(field)),
        }
    }
}

/// A line or a row of a table that is longer than the bound.
pub(crate) fn too_long(field: &'static str) -> Wrong {
    Wrong::new(field, "more", format!("at most {LONGEST} bytes"))
}

/// Bytes of a file as text.
pub(crate) fn utf8<'a>(bytes: &'a [u8], field: &'static str) -> Result<&'a str, Wrong> {
    std::str::from_utf8(bytes).map_err(|error| {
        let found = format!("no UTF-8 at byte {}", error.valid_up_to());
        Wrong::new(field, found, "UTF-8")
    })
}

/// The lines of a file, one at a time.
#[derive(Debug)]
pub(crate) struct Lines<R> {
    path: PathBuf,
    file: R,
    buffer: Vec<u8>,
    bound: usize,
    number: u64,
    bytes: u64,
}

impl Lines<BufReader<File>> {
    /// Opens a file; its length in bytes comes with it.
    pub(crate) fn open(path: &Path) -> Result<(Self, u64), CaptionError> {
        let file = File::open(path).map_err(CaptionError::io(path, "open"))?;
        let found = file.metadata().map_err(CaptionError::io(path, "open"))?;
        if found.is_dir() {
            return Err(CaptionError::io(path, "read")(io::ErrorKind::IsADirectory.into()));
        }
        let lines = Self::new(path, BufReader::with_capacity(BUFFER, file), LONGEST);
        Ok((lines, found.len()))
    }
}

impl<R: BufRead> Lines<R> {
    pub(crate) fn new(path: &Path, file: R, bound: usize) -> Self {
        Self {
            path: path.to_path_buf(),
            file,
            buffer: Vec::new(),
            bound,
            number: 0,
            bytes: 0,
        }
    }

    /// The file's name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Number of the line that came last, from 1.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Bytes that were read up to the end of the line that came last.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next line; none at the end of the file.
    pub(crate) fn next(&mut self) -> Result<Option<Line<'_>>, CaptionError> {
        self.buffer.clear();
        let mut long = false;
        let mut any = false;
        loop {
            let chunk = match self.file.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(CaptionError::io(&self.path, "read")(error)),
            };
            if chunk.is_empty() {
                break;
            }
            any = true;
            let (part, used, ends) = match chunk.iter().position(|byte| *byte == b'\n') {
                Some(at) => (&chunk[..at], at + 1, true),
                None => (chunk, chunk.len(), false),
            };
            let room = self.bound - self.buffer.len();
            long |= part.len() > room;
            self.buffer.extend_from_slice(&part[..part.len().min(room)]);
            self.file.consume(used);
            self.bytes += used as u64;
            if ends {
                break;
            }
        }
        if !any {
            return Ok(None);
        }
        self.number += 1;
        Ok(Some(if long {
            Line::Beginning(&self.buffer)
        } else {
            Line::Whole(&self.buffer)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of lines, whether they are whole, and their bytes.
    fn lines(text: &[u8], capacity: usize) -> Vec<(u64, bool, Vec<u8>)> {
        let mut lines = Lines::new(Path::new("x"), BufReader::with_capacity(capacity, text), 8);
        let mut all = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            let (whole, bytes) = match line {
                Line::Whole(bytes) => (true, bytes.to_vec()),
                Line::Beginning(bytes) => (false, bytes.to_vec()),
            };
            all.push((lines.number(), whole, bytes));
        }
        assert_eq!(lines.bytes(), text.len() as u64);
        all
    }

    #[test]
    fn lines_are_whole_up_to_the_bound_whatever_the_buffer() {
        let text = b"one\n\n12345678\n123456789 and more\nlast";
        let expected = [
            (1, true, b"one".to_vec()),
            (2, true, Vec::new()),
            (3, true, b"12345678".to_vec()),
            (4, false, b"12345678".to_vec()),
            (5, true, b"last".to_vec()),
        ];
        for capacity in [1, 3, 1000] {
            assert_eq!(lines(text, capacity), expected, "{capacity}");
        }
        assert_eq!(lines(b"", 4), []);
        assert_eq!(lines(b"\n", 4), [(1, true, Vec::new())]);
    }

    #[test]
    fn folders_and_absent_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("none.txt");
        assert!(
            Lines::open(folder.path())
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
        assert!(
            Lines::open(&absent)
                .unwrap_err()
                .to_string()
                .contains("none.txt: cannot open")
        );
    }
}
