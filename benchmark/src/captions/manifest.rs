//! Manifests: a clip a line, as JSON.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use fulgur_datasets::atomic::AtomicFile;

use super::counts::{Counts, Problem};
use super::error::CaptionError;
use super::lines::Lines;
use super::parser::Seen;
use super::record::Record;
use super::token::Refusal;

/// The clips of a manifest, one at a time. Names that came before and clips that end before they start are passed over and
/// counted; a line that is no record ends the reading, for what is lost by then would be lost for good.
#[derive(Debug)]
pub struct Manifest {
    lines: Lines<io::BufReader<File>>,
    length: u64,
    seen: Seen,
    counts: Counts,
}

impl Manifest {
    /// Opens a manifest.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(path: &Path) -> Result<Self, CaptionError> {
        let (lines, length) = Lines::open(path)?;
        Ok(Self {
            lines,
            length,
            seen: Seen::default(),
            counts: Counts::default(),
        })
    }

    /// What was counted so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Bytes that were read, and those of the file.
    pub fn position(&self) -> (u64, u64) {
        (self.lines.bytes(), self.length)
    }

    /// The next clip; none at the end of the file.
    ///
    /// # Errors
    /// The file cannot be read, or a line is no record.
    pub fn next_clip(&mut self) -> Result<Option<Record>, CaptionError> {
        loop {
            let text = match self.lines.next()? {
                None => return Ok(None),
                Some(line) => line.text("line").map(str::to_owned),
            };
            self.counts.lines += 1;
            let line = self.lines.number();
            let wrong = |wrong| CaptionError::line(self.lines.path(), line, wrong);
            let text = text.map_err(wrong)?;
            if text.trim().is_empty() {
                self.counts.ignored_lines += 1;
                self.counts.blank_lines += 1;
                continue;
            }
            let record = Record::parse(&text).map_err(wrong)?;
            if let (Some(start), Some(end)) = (record.start_ms, record.end_ms)
                && end <= start
            {
                self.counts
                    .reject(Refusal::EndNotAfterStart.name(), line, &record.id);
                continue;
            }
            if !self.seen.insert(&record.id) {
                self.counts.duplicate(line, &record.id);
                continue;
            }
            if record.flags.iter().any(|flag| flag == super::parser::BROKEN_UTF8) {
                self.counts.broken_utf8 += 1;
                self.counts.example(Problem::BrokenUtf8, line, &record.id);
            }
            self.counts
                .keep(line, &record.id, record.caption_text().is_some());
            return Ok(Some(record));
        }
    }
}

/// Writes a manifest, whole or not at all.
#[derive(Debug)]
pub struct ManifestWriter {
    file: AtomicFile,
    buffer: Vec<u8>,
    path: PathBuf,
}

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

impl ManifestWriter {
    /// Begins a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path) -> Result<Self, CaptionError> {
        Ok(Self {
            file: AtomicFile::create(path).map_err(CaptionError::io(path, "write"))?,
            buffer: Vec::new(),
            path: path.to_path_buf(),
        })
    }

    /// Adds a clip.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&mut self, record: &Record) -> Result<(), CaptionError> {
        self.write_line(&record.to_json())
    }

    /// Adds a line that is ready.
    pub(crate) fn write_line(&mut self, line: &str) -> Result<(), CaptionError> {
        self.buffer.extend_from_slice(line.as_bytes());
        self.buffer.push(b'\n');
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CaptionError> {
        let written = self.file.file().write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(CaptionError::io(&self.path, "write"))
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The disk refuses; then nothing is left behind.
    pub fn commit(mut self) -> Result<(), CaptionError> {
        self.flush()?;
        self.file.commit().map_err(CaptionError::io(&self.path, "write"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::LONGEST;
    use super::*;

    fn read(text: &[u8]) -> Result<(Vec<Record>, Counts), String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        std::fs::write(&path, text).unwrap();
        let mut manifest = Manifest::open(&path).unwrap();
        let mut records = Vec::new();
        while let Some(record) = manifest.next_clip().map_err(|error| error.to_string())? {
            records.push(record);
        }
        assert_eq!(manifest.position(), (text.len() as u64, text.len() as u64));
        Ok((records, manifest.counts().clone()))
    }

    #[test]
    fn what_is_read_and_written_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.jsonl");
        let text = "{\"id\":\"a\",\"caption\":\"A bell.\",\"flags\":[],\"mine\":[1.0]}\n{\"id\":\"b\",\"flags\":[]}\n";
        let (records, counts) = read(text.as_bytes()).unwrap();
        assert_eq!((counts.records, counts.captions, counts.no_caption), (2, 1, 1));
        let mut writer = ManifestWriter::create(&path).unwrap();
        for record in &records {
            writer.write(record).unwrap();
        }
        assert!(!path.exists());
        writer.commit().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn clips_that_come_again_or_cannot_be_are_counted() {
        let text = "{\"id\":\"a\",\"start_ms\":0,\"end_ms\":5}\n\n{\"id\":\"a\"}\n{\"id\":\"b\",\"start_ms\":5,\"end_ms\":5}\n\
                    {\"id\":\"c\"}";
        let (records, counts) = read(text.as_bytes()).unwrap();
        let ids: Vec<&str> = records.iter().map(|record| record.id.as_str()).collect();
        assert_eq!(ids, ["a", "c"]);
        assert_eq!(
            (counts.duplicates, counts.rejected, counts.ignored_lines),
            (1, 1, 1)
        );
    }

    #[test]
    fn a_line_that_is_no_record_is_named() {
        let good = "{\"id\":\"a\"}\n";
        for (line, words) in [
            (
                &b"{\"id\":\"b\",\"fps\":\"x\"}\n"[..],
                "line 2: fps: found \"x\", expected a finite number",
            ),
            (b"{\"id\":\"b\"", "line 2: line: found EOF while parsing"),
            (
                b"{\"id\":\"\xff\"}\n",
                "line 2: line: found no UTF-8 at byte 7, expected UTF-8",
            ),
            (b"text\n", "line 2: line: found expected"),
        ] {
            let error = read(&[good.as_bytes(), line].concat()).unwrap_err();
            assert!(error.contains(words), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
        let long = vec![b' '; LONGEST + 1];
        assert!(
            read(&long)
                .unwrap_err()
                .contains("line 1: line: found more, expected at most")
        );
    }
}
