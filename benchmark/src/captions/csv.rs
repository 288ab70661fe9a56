//! Tables in CSV: the export that trainers of joint generation read, and tables of captions by id.
//!
//! Fields with a comma, a quote or an end of line stand in quotes, and quotes in them are doubled (RFC 4180).

use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};

use fulgur_datasets::atomic::AtomicFile;

use super::error::{CaptionError, Wrong};
use super::lines::{LONGEST, Line, Lines, too_long, utf8};
use super::record::Record;

/// Columns of the export.
pub const COLUMNS: [&str; 12] = [
    "path",
    "id",
    "relpath",
    "num_frames",
    "height",
    "width",
    "aspect_ratio",
    "fps",
    "resolution",
    "audio_path",
    "audio_fps",
    "text",
];

/// What errors call a row.
const ROW: &str = "row";
/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// Writes the export, whole or not at all.
#[derive(Debug)]
pub struct CsvWriter {
    file: AtomicFile,
    buffer: Vec<u8>,
    path: PathBuf,
    media: PathBuf,
}

impl CsvWriter {
    /// Begins a table of clips whose files are in `media`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(path: &Path, media: &Path) -> Result<Self, CaptionError> {
        let mut buffer = Vec::new();
        push_row(&mut buffer, COLUMNS);
        Ok(Self {
            file: AtomicFile::create(path).map_err(CaptionError::io(path, "write"))?,
            buffer,
            path: path.to_path_buf(),
            media: media.to_path_buf(),
        })
    }

    /// Adds a clip. What is not known is an empty field; the aspect ratio is height by width and the resolution their
    /// product, as the readers of this layout have it.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn write(&mut self, record: &Record) -> Result<(), CaptionError> {
        push_row(&mut self.buffer, row(record, &self.media));
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

fn row(record: &Record, media: &Path) -> [String; COLUMNS.len()] {
    fn known(value: Option<impl ToString>) -> String {
        value.map(|value| value.to_string()).unwrap_or_default()
    }
    let path = record.media(media);
    let relative = path.strip_prefix(media).unwrap_or(&path);
    let size = record.width.zip(record.height).filter(|(width, _)| *width > 0);
    // The sound is in the file of the picture unless the record says otherwise.
    let audio = match (&record.audio_path, record.sample_rate) {
        (Some(sound), _) => media.join(sound).to_string_lossy().into_owned(),
        (None, Some(_)) => path.to_string_lossy().into_owned(),
        (None, None) => String::new(),
    };
    [
        path.to_string_lossy().into_owned(),
        record.id.clone(),
        relative.to_string_lossy().into_owned(),
        known(record.frames),
        known(record.height),
        known(record.width),
        known(size.map(|(width, height)| height as f64 / width as f64)),
        known(record.fps),
        known(size.and_then(|(width, height)| width.checked_mul(height))),
        audio,
        known(record.sample_rate),
        record.caption.clone().unwrap_or_default(),
    ]
}

fn push_row(out: &mut Vec<u8>, fields: impl IntoIterator<Item = impl AsRef<str>>) {
    for (i, field) in fields.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        let field = field.as_ref();
        if field.contains([',', '"', '\n', '\r']) {
            out.push(b'"');
            out.extend_from_slice(field.replace('"', "\"\"").as_bytes());
            out.push(b'"');
        } else {
            out.extend_from_slice(field.as_bytes());
        }
    }
    out.push(b'\n');
}

/// The rows of a table, one at a time, each with where it begins in the file.
#[derive(Debug)]
pub(crate) struct CsvReader<R> {
    path: PathBuf,
    lines: Lines<R>,
}

/// A row: where it begins, in bytes; its line; its fields.
pub(crate) type Row = (u64, u64, Vec<String>);

impl<R: BufRead> CsvReader<R> {
    pub(crate) fn new(path: &Path, file: R) -> Self {
        Self {
            path: path.to_path_buf(),
            lines: Lines::new(path, file, LONGEST),
        }
    }

    /// The next row that is not empty; none at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Row>, CaptionError> {
        loop {
            let (start, line) = (self.lines.bytes(), self.lines.number() + 1);
            let Some(row) = self.raw()? else {
                return Ok(None);
            };
            let wrong = |wrong| CaptionError::line(&self.path, line, wrong);
            let text = utf8(&row, ROW).map_err(wrong)?;
            let text = if start == 0 {
                text.trim_start_matches('\u{feff}')
            } else {
                text
            };
            if text.trim().is_empty() {
                continue;
            }
            let fields = split(text).map_err(wrong)?;
            return Ok(Some((start, line, fields)));
        }
    }

    /// The bytes of a row without its end: an end of line in quotes is none.
    fn raw(&mut self) -> Result<Option<Vec<u8>>, CaptionError> {
        let first = self.lines.number() + 1;
        let wrong = |wrong| CaptionError::line(&self.path, first, wrong);
        let mut row = Vec::new();
        let mut quoted = false;
        loop {
            match self.lines.next()? {
                None if quoted => {
                    return Err(wrong(Wrong::new(
                        ROW,
                        "a quote that is not closed",
                        "one that is",
                    )));
                }
                None => return Ok(None),
                Some(Line::Whole(line)) if row.len() + line.len() <= LONGEST => {
                    quoted ^= line.iter().filter(|byte| **byte == b'"').count() % 2 == 1;
                    row.extend_from_slice(line);
                    if !quoted {
                        return Ok(Some(row));
                    }
                    row.push(b'\n');
                }
                Some(_) => return Err(wrong(too_long(ROW))),
            }
        }
    }
}

/// The fields of a row.
pub(crate) fn split(row: &str) -> Result<Vec<String>, Wrong> {
    let row = row.trim_end_matches(['\r', '\n']);
    let mut fields = Vec::new();
    let mut rest = row;
    loop {
        let Some(inner) = rest.strip_prefix('"') else {
            let end = rest.find(',').unwrap_or(rest.len());
            fields.push(rest[..end].to_owned());
            match rest.get(end + 1..) {
                Some(after) => rest = after,
                None => return Ok(fields),
            }
            continue;
        };
        let mut field = String::new();
        let mut inner = inner;
        loop {
            let end = inner
                .find('"')
                .ok_or_else(|| Wrong::new("row", "a quote that is not closed", "one that is"))?;
            field.push_str(&inner[..end]);
            inner = &inner[end + 1..];
            match inner.strip_prefix('"') {
                Some(after) => {
                    field.push('"');
                    inner = after;
                }
                None => break,
            }
        }
        fields.push(field);
        match inner.strip_prefix(',') {
            Some(after) => rest = after,
            None if inner.is_empty() => return Ok(fields),
            None => return Err(Wrong::new("row", inner, "a comma after a quoted field")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &[u8]) -> Result<Vec<Row>, String> {
        let mut reader = CsvReader::new(Path::new("t.csv"), std::io::BufReader::with_capacity(3, text));
        let mut rows = Vec::new();
        while let Some(row) = reader.next().map_err(|error| error.to_string())? {
            rows.push(row);
        }
        Ok(rows)
    }

    #[test]
    fn rows_are_read_as_they_are_written() {
        let table = [
            vec!["plain", "", "a,b"],
            vec!["say \"hi\"", "two\nlines\r\nthree", "\u{e9}"],
            vec!["\"", ",", ""],
        ];
        let mut text = Vec::new();
        for row in &table {
            push_row(&mut text, row);
        }
        let read = rows(&text).unwrap();
        assert_eq!(read.len(), 3);
        for ((offset, _, fields), row) in read.iter().zip(&table) {
            assert_eq!(fields, row);
            assert!(*offset == 0 || text[*offset as usize - 1] == b'\n');
        }
        let lines: Vec<u64> = read.iter().map(|(_, line, _)| *line).collect();
        assert_eq!(lines, [1, 2, 5]);
    }

    #[test]
    fn ends_of_lines_and_marks_of_other_systems_are_known() {
        let read = rows(b"\xef\xbb\xbfid,text\r\n\r\na,\"b\"\r\nc,").unwrap();
        let fields: Vec<&[String]> = read.iter().map(|(_, _, fields)| fields.as_slice()).collect();
        assert_eq!(fields, [["id", "text"], ["a", "b"], ["c", ""]]);
    }

    #[test]
    fn rows_that_are_none_are_named() {
        for (text, words) in [
            (
                &b"a\n\"open"[..],
                "t.csv: line 2: row: found a quote that is not closed",
            ),
            (
                b"\"a\"b,c\n",
                "line 1: row: found b,c, expected a comma after a quoted field",
            ),
            (b"a,\xff\n", "line 1: row: found no UTF-8 at byte 2"),
        ] {
            let error = rows(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_export_has_the_columns_of_its_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.csv");
        let mut writer = CsvWriter::create(&path, Path::new("clips")).unwrap();
        let line = r#"{"id":"a","caption":"A bell, loud.","fps":29.97,"frames":300,"width":640,"height":360,"sample_rate":16000,"flags":[]}"#;
        writer.write(&Record::parse(line).unwrap()).unwrap();
        writer
            .write(&Record::parse(r#"{"id":"b","video_path":"sub/b.mkv"}"#).unwrap())
            .unwrap();
        writer.commit().unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "path,id,relpath,num_frames,height,width,aspect_ratio,fps,resolution,audio_path,audio_fps,text\n\
             clips/a.mp4,a,a.mp4,300,360,640,0.5625,29.97,230400,clips/a.mp4,16000,\"A bell, loud.\"\n\
             clips/sub/b.mkv,b,sub/b.mkv,,,,,,,,,\n"
        );
    }
}
