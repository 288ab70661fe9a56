//! `austen`: the six novels of Jane Austen; *Sense and Sensibility* is held out.
//!
//! Prepared tensors: one u8 vector of UTF-8 text by the name of each novel, lines joined by newlines. Beside them
//! `train.jsonl` and `held_out.jsonl` for language models, a novel a document.

use std::io::Read;
use std::path::Path;

use flate2::read::ZlibDecoder;
use safetensors::tensor::Dtype;

use super::{Job, Set};
use crate::fetch::packages::AUSTEN;
use crate::fetch::{FetchError, unpack};
use crate::store::{Mapped, Plain, StoreError, write_tensors};
use crate::text::Split;

pub(super) const SET: Set = Set {
    name: "austen",
    description: "six novels of Jane Austen as text, 4.0 million characters",
    licence: "public domain",
    packages: &[&AUSTEN],
    prepare,
};

/// The novel that is not for training.
pub const HELD_OUT: &str = "sense_and_sensibility";

const FILE: &str = "austen.safetensors";
pub(super) const RDB: &str = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb";
/// Beginning of the novel, by which it is told from the others, and its name here.
const NOVELS: [(&str, &str); 6] = [
    ("EMMA", "emma"),
    ("MANSFIELD PARK", "mansfield_park"),
    ("NORTHANGER ABBEY", "northanger_abbey"),
    ("PERSUASION", "persuasion"),
    ("PRIDE AND PREJUDICE", "pride_and_prejudice"),
    ("SENSE AND SENSIBILITY", HELD_OUT),
];
/// Largest unpacked chunk, in bytes; the novels have less than a million characters.
const MAX_CHUNK: u64 = 16 << 20;
/// Header of a string in R's XDR format: an ASCII, and a UTF-8 element of a character vector.
const STRING: [[u8; 4]; 2] = [[0, 4, 0, 9], [0, 0, 0x80, 9]];

/// The prepared novels.
#[derive(Debug)]
pub struct Austen(Mapped);

impl Austen {
    /// Opens the prepared set in the folder `dir`.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Mapped::open(&dir.join(FILE)).map(Self)
    }

    /// The text of the novel `name`.
    ///
    /// # Errors
    /// There is no novel of that name, or its bytes are no UTF-8.
    pub fn novel(&self, name: &str) -> Result<&str, StoreError> {
        let (bytes, _) = self.0.expect(name, Dtype::U8, &[0])?;
        std::str::from_utf8(bytes).map_err(|e| StoreError::Tensor {
            path: self.0.path().to_owned(),
            name: name.to_owned(),
            found: e.to_string(),
            expected: "UTF-8".to_owned(),
        })
    }

    /// The names of the novels for training, in alphabetical order.
    pub fn training() -> impl Iterator<Item = &'static str> {
        NOVELS
            .iter()
            .map(|(_, name)| *name)
            .filter(|name| *name != HELD_OUT)
    }
}

fn prepare(job: &Job<'_>) -> Result<usize, FetchError> {
    job.begin(NOVELS.len());
    let entries = job.read(0, &|path| path == RDB)?;
    let mut split = Split::create(job.out).map_err(FetchError::io(job.out, "write"))?;
    let mut tensors = Vec::new();
    for (name, text) in named(job.entry(&entries, RDB)?)? {
        split
            .push_to(&text, name == HELD_OUT)
            .map_err(FetchError::io(job.out, "write"))?;
        let bytes = text.into_bytes();
        tensors.push((name.to_owned(), Plain::u8(&[bytes.len()], bytes)));
        job.advance(tensors.len())?;
    }
    split.commit().map_err(FetchError::io(job.out, "write"))?;
    write_tensors(&job.out.join(FILE), tensors, None)?;
    Ok(NOVELS.len())
}

/// The novels of the database by name.
fn named(rdb: &[u8]) -> Result<Vec<(&'static str, String)>, FetchError> {
    let mut texts = novels(rdb)?;
    let take = |(beginning, name)| {
        let Some(index) = texts.iter().position(|text| is_novel(text, beginning)) else {
            let expected = format!("a text that begins {beginning:?}");
            return Err(FetchError::format(RDB, name, "no such chunk", expected));
        };
        Ok((name, texts.swap_remove(index)))
    };
    NOVELS.into_iter().map(take).collect()
}

/// The novels for training, out of the files of the package.
pub(super) fn training_texts(entries: &unpack::Entries) -> Result<Vec<String>, FetchError> {
    let rdb = entries.get(RDB).map(Vec::as_slice);
    let rdb = rdb.ok_or_else(|| FetchError::format(AUSTEN.file, RDB, "no such file", "a file"))?;
    let training = named(rdb)?.into_iter().filter(|(name, _)| *name != HELD_OUT);
    Ok(training.map(|(_, text)| text).collect())
}

fn is_novel(text: &str, beginning: &str) -> bool {
    let first = text.trim_start().lines().next().unwrap_or_default();
    first.to_uppercase().starts_with(beginning)
}

/// The character vectors of a lazy-load database: chunks of a big-endian u32 with the unpacked length and a zlib
/// stream, one after another.
fn novels(mut rdb: &[u8]) -> Result<Vec<String>, FetchError> {
    let mut texts = Vec::new();
    while !rdb.is_empty() {
        let wrong =
            |found: String| FetchError::format(RDB, format!("chunk {}", texts.len()), found, "a zlib stream");
        let (head, stream) = rdb
            .split_first_chunk::<4>()
            .ok_or_else(|| wrong(format!("{} bytes", rdb.len())))?;
        let length = u64::from(u32::from_be_bytes(*head));
        if length > MAX_CHUNK {
            return Err(wrong(format!("a length of {length}")));
        }
        let mut unpacker = ZlibDecoder::new(stream);
        let mut bytes = Vec::new();
        let read = (&mut unpacker).take(length + 1).read_to_end(&mut bytes);
        read.map_err(|e| wrong(e.to_string()))?;
        if bytes.len() as u64 != length {
            return Err(wrong(format!("{} bytes, announced {length}", bytes.len())));
        }
        rdb = &stream[unpacker.total_in() as usize..];
        texts.push(lines(&bytes).join("\n"));
    }
    Ok(texts)
}

/// All strings of a serialised object, in order.
fn lines(bytes: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let text = (at + 8)
            .checked_add(length)
            .and_then(|end| bytes.get(at + 8..end));
        match text {
            Some(text) if STRING.iter().any(|header| head.starts_with(header)) => {
                lines.push(String::from_utf8_lossy(text).into_owned());
                at += 8 + length;
            }
            // Other parts of the object are made of words too.
            _ => at += 1,
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    fn chunk(strings: &[&str]) -> Vec<u8> {
        let mut object = b"X\n".to_vec();
        object.extend([0, 0, 0, 16, 0, 0, 0, strings.len() as u8]);
        for text in strings {
            object.extend(STRING[0]);
            object.extend((text.len() as u32).to_be_bytes());
            object.extend(text.as_bytes());
        }
        let mut packer = ZlibEncoder::new(Vec::new(), Compression::default());
        packer.write_all(&object).unwrap();
        [
            (object.len() as u32).to_be_bytes().to_vec(),
            packer.finish().unwrap(),
        ]
        .concat()
    }

    #[test]
    fn chunks_become_texts() {
        let rdb = [chunk(&["EMMA", "", "by Jane"]), chunk(&["PERSUASION", "x"])].concat();
        let texts = novels(&rdb).unwrap();
        assert_eq!(texts, ["EMMA\n\nby Jane", "PERSUASION\nx"]);
        assert!(is_novel(&texts[0], "EMMA"));
        assert!(!is_novel(&texts[1], "EMMA"));
    }

    #[test]
    fn damaged_chunks_are_refused() {
        let whole = chunk(&["EMMA", "by Jane"]);
        for length in 1..whole.len() {
            assert!(novels(&whole[..length]).is_err(), "{length} of {}", whole.len());
        }
        let mut long = whole;
        long[..4].copy_from_slice(&u32::MAX.to_be_bytes());
        let text = novels(&long).unwrap_err().to_string();
        assert!(text.contains("chunk 0: found a length of 4294967295"), "{text}");
    }
}
