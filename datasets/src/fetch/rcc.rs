//! Qt resource archives (`*.rcc`, versions 1 to 3), as GCompris ships them.
//!
//! Header: `qres`, then big-endian u32 version, offset of the tree, of the data and of the names. A tree record has
//! 14 bytes, 22 from version 2 on: name offset u32, flags u16; a folder: number of children u32, first child u32;
//! a file: 4 bytes of locale, data offset u32. A name: u16 length, u32 hash, UTF-16BE. Data: u32 size, bytes; with
//! flag 1 they are a zlib stream after a big-endian u32 with the unpacked length.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;

use flate2::read::ZlibDecoder;
use thiserror::Error;

const COMPRESSED: u16 = 1;
const FOLDER: u16 = 2;
const ZSTD: u16 = 4;
const MAX_RECORDS: usize = 1 << 20;
const MAX_DEPTH: usize = 64;
const MAX_PATH: usize = 4096;
/// Largest unpacked file, in bytes.
pub const MAX_FILE: usize = 64 << 20;

/// What is wrong with an archive.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RccError {
    /// The first bytes are others.
    #[error("magic: found {found:?}, expected \"qres\"")]
    Magic {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// The version is none that is known.
    #[error("version: found {found}, expected 1 to 3")]
    Version {
        /// The version.
        found: u32,
    },
    /// An offset points outside of the archive.
    #[error("{field} at byte {at}: found an archive of {length} bytes, expected {bytes} more")]
    Outside {
        /// What was to be read.
        field: &'static str,
        /// Where.
        at: usize,
        /// Length of the archive.
        length: usize,
        /// How many bytes were needed.
        bytes: usize,
    },
    /// The tree has a cycle, or is larger or deeper than any real one.
    #[error("tree: found more than {limit} {what}")]
    Tree {
        /// "records", "levels" or "bytes in a path".
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A file cannot be unpacked.
    #[error("{path}: found {found}, expected a zlib stream of at most {MAX_FILE} bytes")]
    Content {
        /// The file.
        path: String,
        /// What is wrong.
        found: String,
    },
}

#[derive(Clone, Debug)]
struct Entry {
    flags: u16,
    bytes: Range<usize>,
}

/// An archive: names are read, contents unpacked on demand.
#[derive(Debug)]
pub struct Resources<'a> {
    bytes: &'a [u8],
    entries: BTreeMap<String, Entry>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    tree: usize,
    data: usize,
    names: usize,
    record: usize,
    seen: usize,
    entries: BTreeMap<String, Entry>,
}

impl<'a> Resources<'a> {
    /// Reads the names of the archive `bytes`.
    ///
    /// # Errors
    /// The header, the tree or an offset is damaged.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, RccError> {
        let magic = bytes.get(..4).unwrap_or(bytes);
        if magic != b"qres" {
            return Err(RccError::Magic {
                found: magic.to_vec(),
            });
        }
        let version = u32_at(bytes, 4, "version")?;
        if !(1..=3).contains(&version) {
            return Err(RccError::Version { found: version });
        }
        let mut reader = Reader {
            bytes,
            tree: u32_at(bytes, 8, "offset of the tree")? as usize,
            data: u32_at(bytes, 12, "offset of the data")? as usize,
            names: u32_at(bytes, 16, "offset of the names")? as usize,
            record: if version == 1 { 14 } else { 22 },
            seen: 0,
            entries: BTreeMap::new(),
        };
        reader.visit(0, "", 0)?;
        let entries = reader.entries;
        Ok(Self { bytes, entries })
    }

    /// The paths of all files, sorted, without a leading slash.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The content of the file `path`; None where there is no such file.
    ///
    /// # Errors
    /// The content is packed in a way that is not supported, damaged, or larger than [`MAX_FILE`].
    pub fn file(&self, path: &str) -> Option<Result<Vec<u8>, RccError>> {
        let entry = self.entries.get(path)?;
        Some(self.content(entry).map_err(|found| RccError::Content {
            path: path.to_owned(),
            found,
        }))
    }

    fn content(&self, entry: &Entry) -> Result<Vec<u8>, String> {
        let bytes = &self.bytes[entry.bytes.clone()];
        if entry.flags & ZSTD != 0 {
            return Err("a zstd stream".to_owned());
        }
        if entry.flags & COMPRESSED == 0 {
            return Ok(bytes.to_vec());
        }
        let stream = bytes.get(4..).ok_or("less than 4 bytes")?;
        let mut out = Vec::new();
        ZlibDecoder::new(stream)
            .take(MAX_FILE as u64 + 1)
            .read_to_end(&mut out)
            .map_err(|e| e.to_string())?;
        if out.len() > MAX_FILE {
            Err("more".to_owned())
        } else {
            Ok(out)
        }
    }
}

impl Reader<'_> {
    fn visit(&mut self, index: usize, path: &str, depth: usize) -> Result<(), RccError> {
        self.seen += 1;
        if self.seen > MAX_RECORDS {
            return Err(tree("records", MAX_RECORDS));
        }
        if depth > MAX_DEPTH {
            return Err(tree("levels", MAX_DEPTH));
        }
        // At most 2^32 records of 22 bytes: no overflow in 64 bits.
        let at = self.tree.saturating_add(index.saturating_mul(self.record));
        let name = u32_at(self.bytes, at, "tree record")? as usize;
        let flags = u16_at(self.bytes, at.saturating_add(4), "tree record")?;
        let first = u32_at(self.bytes, at.saturating_add(6), "tree record")?;
        let second = u32_at(self.bytes, at.saturating_add(10), "tree record")? as usize;
        let name = if index == 0 {
            String::new()
        } else {
            self.name(name)?
        };
        let separator = if path.is_empty() { "" } else { "/" };
        let path = format!("{path}{separator}{name}");
        if path.len() > MAX_PATH {
            return Err(tree("bytes in a path", MAX_PATH));
        }
        if flags & FOLDER != 0 {
            for child in 0..first as usize {
                self.visit(second.saturating_add(child), &path, depth + 1)?;
            }
            return Ok(());
        }
        let start = self.data.saturating_add(second);
        let size = u32_at(self.bytes, start, "file size")? as usize;
        let from = start.saturating_add(4);
        slice(self.bytes, from, size, "file")?;
        let bytes = from..from + size;
        self.entries.insert(path, Entry { flags, bytes });
        Ok(())
    }

    fn name(&self, offset: usize) -> Result<String, RccError> {
        let at = self.names.saturating_add(offset);
        let units = u16_at(self.bytes, at, "name")? as usize;
        let text = slice(self.bytes, at.saturating_add(6), 2 * units, "name")?;
        let units = text
            .as_chunks::<2>()
            .0
            .iter()
            .map(|pair| u16::from_be_bytes(*pair));
        Ok(char::decode_utf16(units)
            .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect())
    }
}

fn tree(what: &'static str, limit: usize) -> RccError {
    RccError::Tree { what, limit }
}

fn slice<'a>(bytes: &'a [u8], at: usize, length: usize, field: &'static str) -> Result<&'a [u8], RccError> {
    let end = at.checked_add(length);
    end.and_then(|end| bytes.get(at..end)).ok_or(RccError::Outside {
        field,
        at,
        length: bytes.len(),
        bytes: length,
    })
}

fn u32_at(bytes: &[u8], at: usize, field: &'static str) -> Result<u32, RccError> {
    let word = slice(bytes, at, 4, field)?;
    Ok(word.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
}

fn u16_at(bytes: &[u8], at: usize, field: &'static str) -> Result<u16, RccError> {
    let word = slice(bytes, at, 2, field)?;
    Ok(word.iter().fold(0, |value, byte| value << 8 | u16::from(*byte)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;
    use fulgur_kernels::philox::Philox;

    use super::*;

    /// A root with the folder `a` that holds `plain` and `packed`.
    fn archive() -> Vec<u8> {
        let mut packer = ZlibEncoder::new(Vec::new(), Compression::default());
        packer.write_all(&[b'z'; 1000]).unwrap();
        let stream = packer.finish().unwrap();
        let mut data = Vec::new();
        data.extend(5u32.to_be_bytes());
        data.extend(b"hello");
        let packed_at = data.len() as u32;
        data.extend((stream.len() as u32 + 4).to_be_bytes());
        data.extend(1000u32.to_be_bytes());
        data.extend(&stream);
        let mut names = Vec::new();
        let mut offsets = Vec::new();
        for name in ["a", "plain", "packed"] {
            offsets.push(names.len() as u32);
            names.extend((name.len() as u16).to_be_bytes());
            names.extend([0; 4]);
            names.extend(name.encode_utf16().flat_map(u16::to_be_bytes));
        }
        let record = |name: u32, flags: u16, first: u32, second: u32| {
            let mut bytes = name.to_be_bytes().to_vec();
            bytes.extend(flags.to_be_bytes());
            bytes.extend(first.to_be_bytes());
            bytes.extend(second.to_be_bytes());
            bytes.extend([0; 8]);
            bytes
        };
        let records = [
            record(0, FOLDER, 1, 1),
            record(offsets[0], FOLDER, 2, 2),
            record(offsets[1], 0, 0, 0),
            record(offsets[2], COMPRESSED, 0, packed_at),
        ];
        let tree = records.concat();
        let (data_at, names_at) = (20 + tree.len(), 20 + tree.len() + data.len());
        let mut bytes = b"qres".to_vec();
        for word in [3, 20, data_at as u32, names_at as u32] {
            bytes.extend(word.to_be_bytes());
        }
        [bytes, tree, data, names].concat()
    }

    #[test]
    fn files_are_found_and_unpacked() {
        let bytes = archive();
        let resources = Resources::parse(&bytes).unwrap();
        assert_eq!(resources.paths().collect::<Vec<_>>(), ["a/packed", "a/plain"]);
        assert_eq!(resources.file("a/plain").unwrap().unwrap(), b"hello");
        assert_eq!(resources.file("a/packed").unwrap().unwrap(), vec![b'z'; 1000]);
        assert!(resources.file("a").is_none());
    }

    #[test]
    fn damage_is_an_error_or_harmless_and_always_bounded() {
        let whole = archive();
        for length in 0..whole.len() {
            assert!(Resources::parse(&whole[..length]).is_err(), "cut at {length}");
        }
        let mut random = Philox::new(3, 0);
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..1 + random.next_u32() % 3 {
                let at = random.next_u32() as usize % bytes.len();
                bytes[at] = random.next_u32() as u8;
            }
            let Ok(resources) = Resources::parse(&bytes) else {
                continue;
            };
            for path in resources.paths() {
                if let Some(Ok(content)) = resources.file(path) {
                    assert!(content.len() <= MAX_FILE);
                }
            }
        }
    }

    #[test]
    fn a_folder_inside_itself_is_refused() {
        let mut bytes = archive();
        // The folder `a` names itself as its first child.
        bytes[20 + 22 + 10..20 + 22 + 14].copy_from_slice(&1u32.to_be_bytes());
        assert_eq!(Resources::parse(&bytes).unwrap_err(), tree("levels", MAX_DEPTH));
    }
}
