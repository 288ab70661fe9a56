//! Texts that are there already: in the manifest itself, or in a table by the clips' ids.
//!
//! A table is JSONL, `{"id": "...", "caption": "..."}` a line, or CSV with a head line. Its column `caption_video` speaks of the
//! picture, `caption_audio` of the sound; where a table has no such column, `caption` or `text` is taken. In JSONL a text may
//! be a list of texts. Of a table only hashes of ids and places in the file are kept in memory, 16 bytes a row.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::stage::{About, AudioCaptioner, Clip, FrameCaptioner, Merger, Modality, Rewriter, StageError};
use crate::captions::csv::{CsvReader, Row};
use crate::captions::{CaptionError, Line, Lines, json_fields};
use fulgur_datasets::media::{Picture, Sound};

/// Most bytes of a row.
const LONGEST: usize = 16 << 20;
/// Bytes that are read at once when a row is looked up.
const BUFFER: usize = 4096;
/// Columns that speak of both, for tables that have no other.
const COMMON: [&str; 2] = ["caption", "text"];

/// Name of the backend whose texts stand in the manifest already, and whose provenance is there as well.
pub(crate) const MANIFEST: &str = "manifest";

/// Texts by the ids of clips.
#[derive(Debug)]
pub struct Precomputed(Option<Table>);

impl Precomputed {
    /// The texts that stand in the manifest.
    #[must_use]
    pub fn of_manifest() -> Self {
        Self(None)
    }

    /// The texts of a table.
    ///
    /// # Errors
    /// It cannot be read, or a row is none.
    pub fn open(path: &Path) -> Result<Self, CaptionError> {
        Table::open(path).map(|table| Self(Some(table)))
    }

    fn about_it(&self) -> About {
        let backend = if self.0.is_some() { "precomputed" } else { MANIFEST };
        About {
            backend: backend.to_owned(),
            ..About::default()
        }
    }

    /// Texts of a clip in the first of these columns that has any.
    fn texts(&self, clip: Clip<'_>, columns: &[&str]) -> Result<Vec<String>, StageError> {
        let Some(table) = &self.0 else {
            let known = |column: &&str| match *column {
                "caption_video" => clip.record.caption_video.as_ref(),
                "caption_audio" => clip.record.caption_audio.as_ref(),
                "caption" => clip.record.caption.as_ref(),
                _ => None,
            };
            // `caption` speaks of both: in a manifest, where the others have a place, it is none of them.
            return Ok(columns.iter().take(1).filter_map(known).cloned().collect());
        };
        let row = table
            .row(clip.id)
            .map_err(|error| StageError::Clip(error.to_string()))?;
        let found = row.into_iter().flatten();
        let columns = columns.iter();
        let by_column: Vec<(String, Vec<String>)> = found.collect();
        let texts = columns
            .filter_map(|column| by_column.iter().find(|(name, _)| name == column))
            .map(|(_, texts)| {
                texts
                    .iter()
                    .filter(|text| !text.trim().is_empty())
                    .cloned()
                    .collect::<Vec<_>>()
            })
            .find(|texts| !texts.is_empty());
        Ok(texts.unwrap_or_default())
    }

    fn one(&self, clip: Clip<'_>, columns: &[&str]) -> Result<String, StageError> {
        let texts = self.texts(clip, columns)?;
        texts
            .into_iter()
            .next()
            .ok_or_else(|| StageError::Clip(format!("no precomputed {}", columns[0])))
    }
}

impl FrameCaptioner for Precomputed {
    fn about(&self) -> About {
        self.about_it()
    }

    fn needs_frames(&self) -> bool {
        false
    }

    fn caption(&self, _: &[Picture], clip: Clip<'_>) -> Result<Vec<String>, StageError> {
        self.texts(clip, &["caption_video", COMMON[0], COMMON[1]])
    }
}

impl AudioCaptioner for Precomputed {
    fn about(&self) -> About {
        self.about_it()
    }

    fn needs_sound(&self) -> bool {
        false
    }

    fn caption(&self, _: Option<&Sound>, clip: Clip<'_>) -> Result<Vec<String>, StageError> {
        self.texts(clip, &["caption_audio", COMMON[0], COMMON[1]])
    }
}

impl Rewriter for Precomputed {
    fn about(&self) -> About {
        self.about_it()
    }

    fn rewrite(&self, _: &str, kind: Modality, clip: Clip<'_>) -> Result<String, StageError> {
        match kind {
            Modality::Visual => self.one(clip, &["caption_video"]),
            Modality::Audio => self.one(clip, &["caption_audio"]),
        }
    }
}

impl Merger for Precomputed {
    fn about(&self) -> About {
        self.about_it()
    }

    fn merge(&self, _: &str, _: &str, clip: Clip<'_>) -> Result<String, StageError> {
        self.one(clip, &COMMON)
    }
}

/// A table whose rows are read when they are wanted.
#[derive(Debug)]
struct Table {
    path: PathBuf,
    /// Head line of CSV; none of JSONL.
    columns: Option<Vec<String>>,
    /// Hashes of ids with the places of their rows, in order.
    index: Vec<(u64, u64)>,
    file: Mutex<File>,
}

/// Columns of a row with their texts.
type Texts = Vec<(String, Vec<String>)>;

impl Table {
    fn open(path: &Path) -> Result<Self, CaptionError> {
        let is_csv = path
            .extension()
            .is_some_and(|ending| ending.eq_ignore_ascii_case("csv"));
        let io = |source| CaptionError::Io {
            path: path.to_path_buf(),
            action: "open",
            source,
        };
        let mut table = Self {
            path: path.to_path_buf(),
            columns: None,
            index: Vec::new(),
            file: Mutex::new(File::open(path).map_err(io)?),
        };
        if is_csv {
            let file = BufReader::with_capacity(1 << 20, File::open(path).map_err(io)?);
            let mut rows = CsvReader::new(path, file);
            let head = rows.next()?.map(|(_, _, fields)| fields).unwrap_or_default();
            let columns: Vec<String> = head.iter().map(|name| name.trim().to_owned()).collect();
            let Some(id) = columns.iter().position(|name| name == "id") else {
                return Err(table.wrong(1, "columns", &columns.join(","), "one called id"));
            };
            let width = columns.len();
            table.columns = Some(columns);
            while let Some((offset, line, fields)) = rows.next()? {
                if fields.len() != width {
                    let found = format!("{} fields", fields.len());
                    return Err(table.wrong(line, "row", &found, &format!("{width}, as in the head line")));
                }
                table.index.push((key(&fields[id]), offset));
            }
        } else {
            let (mut lines, _) = Lines::open(path)?;
            loop {
                let offset = lines.bytes();
                let row = match lines.next()? {
                    None => break,
                    Some(Line::Whole(bytes)) if bytes.iter().all(u8::is_ascii_whitespace) => continue,
                    Some(Line::Whole(bytes)) => parse(bytes),
                    Some(Line::Beginning(_)) => Err((
                        "line".to_owned(),
                        "more".to_owned(),
                        format!("at most {LONGEST} bytes"),
                    )),
                };
                let line = lines.number();
                let row =
                    row.map_err(|(field, found, expected)| table.wrong(line, &field, &found, &expected))?;
                let id = row
                    .iter()
                    .find(|(name, _)| name == "id")
                    .and_then(|(_, texts)| texts.first());
                let id = id.ok_or_else(|| table.wrong(line, "id", "none", "a string that names the clip"))?;
                table.index.push((key(id), offset));
            }
        }
        table.index.sort_unstable();
        Ok(table)
    }

    fn wrong(&self, line: u64, field: &str, found: &str, expected: &str) -> CaptionError {
        CaptionError::Line {
            path: self.path.clone(),
            line,
            field: field.to_owned(),
            found: found.chars().take(80).collect(),
            expected: expected.to_owned(),
        }
    }

    /// The first row of a clip.
    fn row(&self, id: &str) -> Result<Option<Texts>, CaptionError> {
        let wanted = key(id);
        let first = self.index.partition_point(|(hash, _)| *hash < wanted);
        let same = self.index[first..].iter().take_while(|(hash, _)| *hash == wanted);
        for (_, offset) in same {
            let row = self.read(*offset)?;
            let name = row
                .iter()
                .find(|(name, _)| name == "id")
                .and_then(|(_, texts)| texts.first());
            if name.is_some_and(|name| stem(name) == stem(id)) {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    fn read(&self, offset: u64) -> Result<Texts, CaptionError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(offset))
            .map_err(|source| CaptionError::Io {
                path: self.path.clone(),
                action: "read",
                source,
            })?;
        let changed = || self.wrong(0, "row", "another one than before", "a file that stays as it is");
        let reader = BufReader::with_capacity(BUFFER, &mut *file);
        if let Some(columns) = &self.columns {
            let row: Option<Row> = CsvReader::new(&self.path, reader).next()?;
            let (_, _, fields) = row
                .filter(|row| row.2.len() == columns.len())
                .ok_or_else(changed)?;
            let fields = fields.into_iter().map(|field| vec![field]);
            return Ok(columns.iter().cloned().zip(fields).collect());
        }
        let mut lines = Lines::new(&self.path, reader, LONGEST);
        match lines.next()? {
            Some(Line::Whole(bytes)) => parse(bytes).map_err(|_| changed()),
            _ => Err(changed()),
        }
    }
}

/// The columns of a line of JSON that hold texts.
fn parse(bytes: &[u8]) -> Result<Texts, (String, String, String)> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        (
            "line".to_owned(),
            format!("no UTF-8 at byte {}", error.valid_up_to()),
            "UTF-8".to_owned(),
        )
    })?;
    let fields = json_fields(text).map_err(|wrong| (wrong.field, wrong.found, wrong.expected))?;
    let texts = |value: &str| -> Vec<String> {
        if let Ok(text) = serde_json::from_str::<String>(value) {
            return vec![text];
        }
        // Numbers and objects are no texts; a column of them is passed over.
        serde_json::from_str(value).unwrap_or_default()
    };
    Ok(fields
        .into_iter()
        .map(|(name, value)| (name, texts(value)))
        .collect())
}

/// A clip's id with or without the ending of its file.
fn stem(id: &str) -> &str {
    id.strip_suffix(".mp4").unwrap_or(id)
}

fn key(id: &str) -> u64 {
    crate::captions::hash(stem(id).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::captions::Record;

    fn seen(table: &Precomputed, id: &str) -> Vec<String> {
        let record = Record::default();
        FrameCaptioner::caption(table, &[], Clip { id, record: &record }).unwrap()
    }

    fn heard(table: &Precomputed, id: &str) -> Vec<String> {
        let record = Record::default();
        AudioCaptioner::caption(table, None, Clip { id, record: &record }).unwrap()
    }

    fn table(name: &str, text: &str) -> Result<Precomputed, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        // The file stays readable after its folder is gone, for it is open.
        Precomputed::open(&path).map_err(|error| error.to_string())
    }

    #[test]
    fn rows_are_found_by_id() {
        let jsonl = "{\"id\":\"a\",\"caption_video\":\"seen\",\"caption_audio\":\"heard\"}\n\n\
                     {\"id\":\"b.mp4\",\"caption\":[\"one\",\"\",\"two\"],\"score\":0.5}\n\
                     {\"id\":\"a\",\"caption_video\":\"again\"}\n{\"id\":\"c\",\"text\":\"  \"}";
        let jsonl = table("t.jsonl", jsonl).unwrap();
        let csv =
            "id,caption_audio,caption_video\r\na,heard,seen\r\n\"b\",\"two\nlines, \"\"quoted\"\"\",\r\n";
        let csv = table("t.csv", csv).unwrap();
        for table in [&jsonl, &csv] {
            assert_eq!(seen(table, "a"), ["seen"]);
            assert_eq!(heard(table, "a.mp4"), ["heard"]);
            assert!(seen(table, "d").is_empty() && seen(table, "c").is_empty());
        }
        assert_eq!(seen(&jsonl, "b"), ["one", "two"]);
        assert_eq!(heard(&csv, "b"), ["two\nlines, \"quoted\""]);
        assert!(seen(&csv, "b").is_empty());
    }

    #[test]
    fn many_rows_are_told_apart() {
        let text: String = (0..3000)
            .map(|i| format!("{{\"id\":\"clip{i}\",\"caption\":\"text {i}\"}}\n"))
            .collect();
        let table = table("t.jsonl", &text).unwrap();
        for i in [0, 1, 1499, 2999] {
            assert_eq!(seen(&table, &format!("clip{i}")), [format!("text {i}")]);
        }
    }

    #[test]
    fn tables_that_are_none_are_named() {
        for (name, text, words) in [
            (
                "t.csv",
                "name,caption\na,b\n",
                "t.csv: line 1: columns: found name,caption, expected one called id",
            ),
            (
                "t.csv",
                "id,caption\na\n",
                "line 2: row: found 1 fields, expected 2",
            ),
            ("t.csv", "", "expected one called id"),
            (
                "t.jsonl",
                "{\"id\":\"a\"}\n{\"caption\":\"x\"}\n",
                "t.jsonl: line 2: id: found none",
            ),
            ("t.jsonl", "{\"id\":5}\n", "line 1: id: found none"),
            ("t.jsonl", "no json\n", "line 1: line: found expected"),
        ] {
            let error = table(name, text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn the_manifest_is_a_table_too() {
        let record = Record {
            caption: Some("both".into()),
            caption_audio: Some("heard".into()),
            ..Record::default()
        };
        let clip = Clip {
            id: "a",
            record: &record,
        };
        let table = Precomputed::of_manifest();
        assert!(FrameCaptioner::caption(&table, &[], clip).unwrap().is_empty());
        assert_eq!(AudioCaptioner::caption(&table, None, clip).unwrap(), ["heard"]);
        assert_eq!(table.merge("", "", clip).unwrap(), "both");
        assert_eq!(table.rewrite("", Modality::Audio, clip).unwrap(), "heard");
        let error = table.rewrite("", Modality::Visual, clip).unwrap_err().to_string();
        assert_eq!(error, "no precomputed caption_video");
    }
}
