//! Checkpoints of PyTorch (`.pth`, `.ckpt`, `.bin`), read without running anything.
//!
//! `torch.save` writes a zip archive: `data.pkl` is a pickle that says which tensors there are, and `data/KEY` are their elements, stored as
//! they are. A tensor is a view of such an entry, with an offset and strides. Names are the keys of the dictionary at the root, or of the
//! one in it that holds the weights (`state_dict`, `model`, ..).
//!
//! Every size is compared with the file before anything is allocated. The form before PyTorch 1.6, which is no archive, is refused.

mod pickle;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use zip::{CompressionMethod, ZipArchive};

use super::ParamsError;
use pickle::{Element, Heap, Value};

/// Longest `data.pkl`: some hundred thousand tensors.
const LONGEST_PICKLE: u64 = 64 << 20;
/// Most entries of an archive, and most axes of a tensor.
const MOST_ENTRIES: usize = 1 << 20;
const MOST_AXES: usize = 16;
/// Views may overlap: all tensors together may take so many times the bytes of the file, and a little more.
const MOST_COPIES: u64 = 8;
const SPARE_BYTES: u64 = 1 << 20;
/// Where the weights of a checkpoint are, if they are not at its root.
const TABLES: [&str; 8] = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "generator",
    "weights",
];
/// How an archive begins, and how a pickle of the older form does: with a number that is always the same.
const ARCHIVE: &[u8] = b"PK\x03\x04";
const OLDER: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// A tensor of a checkpoint.
#[derive(Clone, Debug)]
struct Stored {
    element: Element,
    shape: Vec<usize>,
    stride: Vec<usize>,
    /// First element within the entry.
    offset: usize,
    /// Elements from the first to the last, both included.
    reach: usize,
    /// First byte of the entry in the file.
    start: u64,
}

/// A checkpoint whose tensors are known and not yet read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Stored>,
}

impl Checkpoint {
    /// Reads what `path` says about its tensors; their elements stay where they are.
    ///
    /// # Errors
    /// The file is unreadable, damaged, of the form before PyTorch 1.6, names what is no part of a tensor, or holds no tensors.
    pub fn open(path: &Path) -> Result<Self, ParamsError> {
        let fail = |reason: String| ParamsError::Checkpoint {
            path: path.to_owned(),
            reason,
        };
        let io = |source| ParamsError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(io)?;
        let info = file.metadata().map_err(io)?;
        if !info.is_file() {
            return Err(fail("not a regular file".to_owned()));
        }
        let mut head = Vec::new();
        (&mut file)
            .take(OLDER.len() as u64)
            .read_to_end(&mut head)
            .map_err(io)?;
        if head.starts_with(OLDER) {
            return Err(fail(
                "the form of PyTorch before 1.6; load it with torch.load once and save it anew with torch.save".to_owned(),
            ));
        }
        if !head.starts_with(ARCHIVE) {
            return Err(fail("no zip archive, as torch.save writes it".to_owned()));
        }
        file.rewind().map_err(io)?;
        let mut archive = ZipArchive::new(BufReader::new(file))
            .map_err(|e| fail(format!("a damaged zip archive: {}", one_line(&e.to_string()))))?;
        let tensors = tensors_of(&mut archive, info.len()).map_err(fail)?;
        Ok(Self {
            path: path.to_owned(),
            tensors,
        })
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |(name, stored): (&String, &Stored)| (name.clone(), stored.shape.clone());
        self.tensors.iter().map(shape).collect()
    }

    /// Reads the tensors for whose names `keep` holds, on the CPU. Floating-point types stay, bool becomes `U8`, and integers become
    /// `I64` or `U8`.
    ///
    /// # Errors
    /// The file is unreadable, or shorter than it was.
    pub fn read(&self, keep: impl Fn(&str) -> bool) -> Result<BTreeMap<String, Tensor>, ParamsError> {
        let io = |source| ParamsError::Io {
            path: self.path.clone(),
            source,
        };
        let mut file = File::open(&self.path).map_err(io)?;
        let mut tensors = BTreeMap::new();
        for (name, stored) in self.tensors.iter().filter(|(name, _)| keep(name)) {
            let size = stored.element.bytes() as usize;
            let mut bytes = vec![0; stored.reach * size];
            let first = stored.start + (stored.offset * size) as u64;
            file.seek(SeekFrom::Start(first)).map_err(io)?;
            file.read_exact(&mut bytes).map_err(io)?;
            if !stored.is_contiguous() {
                bytes = gather(&bytes, stored, size);
            }
            tensors.insert(name.clone(), to_tensor(&bytes, stored)?);
        }
        Ok(tensors)
    }
}

impl Stored {
    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (&size, &stride) in self.shape.iter().zip(&self.stride).rev() {
            if size != 1 && stride != expected {
                return false;
            }
            expected *= size;
        }
        self.reach == self.count()
    }
}

/// The elements of a view one after the other; `bytes` begins with its first one.
fn gather(bytes: &[u8], stored: &Stored, size: usize) -> Vec<u8> {
    let count = stored.count();
    let mut out = Vec::with_capacity(count * size);
    let mut index = vec![0; stored.shape.len()];
    let mut at = 0;
    for _ in 0..count {
        out.extend_from_slice(&bytes[at * size..(at + 1) * size]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            at += stored.stride[axis];
            if index[axis] < stored.shape[axis] {
                break;
            }
            at -= stored.stride[axis] * stored.shape[axis];
            index[axis] = 0;
        }
    }
    out
}

fn to_tensor(bytes: &[u8], stored: &Stored) -> candle_core::Result<Tensor> {
    let (shape, cpu) = (&stored.shape, &Device::Cpu);
    let raw = |dtype| Tensor::from_raw_buffer(bytes, dtype, shape, cpu);
    match stored.element {
        Element::F64 => raw(DType::F64),
        Element::F32 => raw(DType::F32),
        Element::F16 => raw(DType::F16),
        Element::BF16 => raw(DType::BF16),
        Element::I64 => raw(DType::I64),
        Element::U8 | Element::Bool => raw(DType::U8),
        Element::I32 => {
            let values = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| i64::from(i32::from_le_bytes(b)));
            Tensor::from_iter(values, cpu)?.reshape(shape.as_slice())
        }
        Element::I16 => {
            let values = bytes
                .as_chunks()
                .0
                .iter()
                .map(|&b| i64::from(i16::from_le_bytes(b)));
            Tensor::from_iter(values, cpu)?.reshape(shape.as_slice())
        }
        Element::I8 => {
            let values = bytes.iter().map(|&b| i64::from(b.cast_signed()));
            Tensor::from_iter(values, cpu)?.reshape(shape.as_slice())
        }
    }
}

type Archive = ZipArchive<BufReader<File>>;

/// An entry that is stored as it is: where its bytes begin, and how many there are.
fn entry(archive: &mut Archive, name: &str, length: u64) -> Result<(u64, u64), String> {
    let missing = || format!("there is no entry {name}");
    let index = archive.index_for_name(name).ok_or_else(missing)?;
    let entry = archive
        .by_index_raw(index)
        .map_err(|e| format!("entry {name}: {}", one_line(&e.to_string())))?;
    if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
        return Err(format!(
            "entry {name} is compressed or encrypted, expected it as torch.save stores it"
        ));
    }
    let (start, size) = (entry.data_start().ok_or_else(missing)?, entry.size());
    if size != entry.compressed_size() || start.checked_add(size).is_none_or(|end| end > length) {
        return Err(format!(
            "entry {name} has {size} bytes from {start} on, the file has {length}"
        ));
    }
    Ok((start, size))
}

fn tensors_of(archive: &mut Archive, length: u64) -> Result<BTreeMap<String, Stored>, String> {
    const PICKLE: &str = "data.pkl";
    if archive.len() > MOST_ENTRIES {
        return Err(format!(
            "{} entries, at most {MOST_ENTRIES} are read",
            archive.len()
        ));
    }
    let mut folders: Vec<String> = Vec::new();
    for name in archive.file_names() {
        let Ok(name) = name else { continue };
        match name.strip_suffix(PICKLE) {
            Some(before) if before.is_empty() || before.ends_with('/') => folders.push(before.to_owned()),
            _ => {}
        }
    }
    let [folder] = folders.as_slice() else {
        return Err(format!("{} entries {PICKLE}, expected one", folders.len()));
    };
    let folder = folder.clone();
    let (start, size) = entry(archive, &format!("{folder}{PICKLE}"), length)?;
    if size > LONGEST_PICKLE {
        return Err(format!(
            "{PICKLE} has {size} bytes, at most {LONGEST_PICKLE} are read"
        ));
    }
    let read = |archive: &mut Archive, name: &str| -> Result<Vec<u8>, String> {
        let index = archive.index_for_name(name).unwrap_or(usize::MAX);
        let entry = archive.by_index_raw(index).map_err(|e| e.to_string())?;
        let mut bytes = Vec::new();
        entry
            .take(LONGEST_PICKLE)
            .read_to_end(&mut bytes)
            .map_err(|e| e.to_string())?;
        Ok(bytes)
    };
    let order = format!("{folder}byteorder");
    if archive.index_for_name(&order).is_some() {
        entry(archive, &order, length)?;
        let order = read(archive, &order)?;
        if order != b"little" {
            return Err(format!(
                "byteorder is {:?}, expected little",
                String::from_utf8_lossy(&order)
            ));
        }
    }
    let bytes = read(archive, &format!("{folder}{PICKLE}"))?;
    if bytes.len() as u64 != size {
        return Err(format!("{PICKLE} from {start} on ends early"));
    }
    let (heap, root) = pickle::read(&bytes).map_err(|reason| format!("{PICKLE} {reason}"))?;
    let mut found = BTreeMap::new();
    let mut entries: HashMap<String, (u64, u64)> = HashMap::new();
    let mut total: u64 = 0;
    for (name, value) in table(&heap, root)? {
        let Some(view) = heap.view(value) else {
            if value == Value::Foreign {
                return Err(format!(
                    "`{name}` is an object of another class, expected a tensor"
                ));
            }
            continue;
        };
        let storage = heap.storage(view);
        let within = match entries.get(&storage.key) {
            Some(&within) => within,
            None => {
                let within = entry(archive, &format!("{folder}data/{}", storage.key), length)?;
                entries.insert(storage.key.clone(), within);
                within
            }
        };
        let stored = place(view, storage, within).map_err(|reason| format!("tensor `{name}`: {reason}"))?;
        total = total.saturating_add(stored.count() as u64 * stored.element.bytes());
        if total > length.saturating_mul(MOST_COPIES) + SPARE_BYTES {
            return Err(format!(
                "its tensors would take more than {MOST_COPIES} times the {length} bytes of the file"
            ));
        }
        found.insert(name.to_owned(), stored);
    }
    Ok(found)
}

/// Names and values of the dictionary with the weights.
fn table(heap: &Heap, root: Value) -> Result<Vec<(&str, Value)>, String> {
    let named = |value: Value| -> Vec<(&str, Value)> {
        let pairs = heap.dict(value).unwrap_or_default();
        let named = pairs
            .iter()
            .filter_map(|&(key, value)| Some((heap.text(key)?, value)));
        named.collect()
    };
    let holds = |value: Value| named(value).iter().any(|(_, value)| heap.view(*value).is_some());
    let top = named(root);
    if holds(root) {
        return Ok(top);
    }
    let inner: Vec<(&str, Value)> = top.into_iter().filter(|(_, value)| holds(*value)).collect();
    let known = TABLES
        .iter()
        .find_map(|table| inner.iter().find(|(name, _)| name == table));
    match (known, inner.as_slice()) {
        (Some((_, value)), _) | (None, [(_, value)]) => Ok(named(*value)),
        (None, []) => Err("holds no dictionary of tensors".to_owned()),
        (None, several) => {
            let names: Vec<&str> = several.iter().take(8).map(|(name, _)| *name).collect();
            Err(format!(
                "holds several dictionaries of tensors ({}), expected one, or {}",
                names.join(", "),
                TABLES.join(", ")
            ))
        }
    }
}

/// A view of an entry that begins at `start` and has `size` bytes.
fn place(
    view: &pickle::View,
    storage: &pickle::Storage,
    (start, size): (u64, u64),
) -> Result<Stored, String> {
    let outside = || {
        format!(
            "sizes {:?} with strides {:?} from {} on reach beyond the {} elements of its storage, an entry of {size} bytes",
            view.shape, view.stride, view.offset, storage.count
        )
    };
    if view.shape.len() > MOST_AXES {
        return Err(format!("{} axes, at most {MOST_AXES} are read", view.shape.len()));
    }
    let bytes = storage.count.checked_mul(storage.element.bytes());
    if bytes.is_none_or(|bytes| bytes > size) {
        return Err(outside());
    }
    // Empty axes do not make the others harmless.
    let most = view
        .shape
        .iter()
        .try_fold(storage.element.bytes(), |all, &n| all.checked_mul(n.max(1)));
    most.ok_or_else(outside)?;
    let count: u64 = view.shape.iter().product();
    let mut reach = 0;
    if count > 0 {
        // From the first element to the last one.
        let last = view
            .shape
            .iter()
            .zip(&view.stride)
            .try_fold(0u64, |last, (&n, &stride)| {
                last.checked_add((n - 1).checked_mul(stride)?)
            });
        let last = last.ok_or_else(outside)?;
        let end = view.offset.checked_add(last);
        if end.is_none_or(|end| end >= storage.count) {
            return Err(outside());
        }
        reach = last + 1;
    }
    let whole = |n: u64| usize::try_from(n).map_err(|_| outside());
    let all = |list: &[u64]| list.iter().map(|&n| whole(n)).collect::<Result<Vec<_>, _>>();
    Ok(Stored {
        element: storage.element,
        shape: all(&view.shape)?,
        stride: all(&view.stride)?,
        offset: match count {
            0 => 0,
            _ => whole(view.offset)?,
        },
        reach: whole(reach)?,
        start,
    })
}

fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
