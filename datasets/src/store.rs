//! Prepared data on disk: safetensors files read through memory maps, written whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, View};
use thiserror::Error;

use crate::atomic::write_atomic;

/// Why a prepared file could not be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The file cannot be opened, mapped or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is damaged or of another kind.
    #[error("{path}: found {found}, expected a safetensors file")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the reader met.
        found: String,
    },
    /// A tensor is missing or of another type or shape.
    #[error("{path}: tensor {name}: found {found}, expected {expected}")]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type and shape, or that there is none.
        found: String,
        /// What was needed.
        expected: String,
    },
}

impl StoreError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// A safetensors file under a memory map: tensors are read from the page cache when they are used.
#[derive(Debug)]
pub struct Mapped {
    path: PathBuf,
    map: Mmap,
    start: usize,
    header: Metadata,
}

impl Mapped {
    /// Maps the file at `path` and checks its header: sizes, offsets and the file's length agree.
    ///
    /// # Errors
    /// The file cannot be opened, or is no whole safetensors file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(StoreError::io(path))?;
        // SAFETY: prepared files get their final name only when they are complete and are never written again;
        // a process that truncates one under us breaks that contract, as with every memory-mapped model file.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(StoreError::io(path))?;
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|e| StoreError::Damaged {
            path: path.to_owned(),
            found: e.to_string(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            map,
            start: 8 + length,
            header,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text of the header's metadata entry `key`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.header.tensors().into_keys().collect();
        names.sort_unstable();
        names
    }

    /// The tensor `name`, if there is one.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let info = self.header.info(name)?;
        let (from, to) = info.data_offsets;
        let bytes = self.map.get(self.start + from..self.start + to)?;
        TensorView::new(info.dtype, info.shape.clone(), bytes).ok()
    }

    /// The bytes and the shape of the tensor `name`, which has to be of `dtype` and as long as `shape`, where 0
    /// stands for any length.
    ///
    /// # Errors
    /// There is no such tensor, or its type or shape differs.
    pub fn expect(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<(&[u8], Vec<usize>), StoreError> {
        let wrong = |found: String| StoreError::Tensor {
            path: self.path.clone(),
            name: name.to_owned(),
            found,
            expected: format!("{dtype:?} {shape:?} (0: any length)"),
        };
        let view = self
            .tensor(name)
            .ok_or_else(|| wrong("no such tensor".to_owned()))?;
        let fits = view.shape().len() == shape.len()
            && view
                .shape()
                .iter()
                .zip(shape)
                .all(|(have, want)| *want == 0 || have == want);
        if view.dtype() != dtype || !fits {
            return Err(wrong(format!("{:?} {:?}", view.dtype(), view.shape())));
        }
        Ok((view.data(), view.shape().to_vec()))
    }

    /// The i64 vector `name`, such as the offsets of packed items, as a copy.
    ///
    /// # Errors
    /// There is no such tensor, or it is no i64 vector.
    pub fn indices(&self, name: &str) -> Result<Vec<i64>, StoreError> {
        let (bytes, _) = self.expect(name, Dtype::I64, &[0])?;
        Ok(bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| i64::from_le_bytes(*word))
            .collect())
    }

    /// The i16 samples `name` as f32 with 32767 as 1.0.
    ///
    /// # Errors
    /// There is no such tensor, or it is no i16 vector.
    pub fn samples(&self, name: &str) -> Result<Vec<f32>, StoreError> {
        let (bytes, _) = self.expect(name, Dtype::I16, &[0])?;
        Ok(bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|pair| f32::from(i16::from_le_bytes(*pair)) / 32767.0)
            .collect())
    }
}

/// An owned tensor on its way into a file.
#[derive(Clone, Debug)]
pub struct Plain {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Plain {
    /// Bytes of the given shape.
    pub fn u8(shape: &[usize], bytes: Vec<u8>) -> Self {
        Self {
            dtype: Dtype::U8,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// A vector of indices.
    pub fn i64(values: &[i64]) -> Self {
        Self {
            dtype: Dtype::I64,
            shape: vec![values.len()],
            bytes: values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    }

    /// Samples in -1..1 as a vector of i16, 32767 being 1.0.
    pub fn samples(values: &[f32]) -> Self {
        let quantised = values
            .iter()
            .map(|x| (x.clamp(-1.0, 1.0) * 32767.0).round() as i16);
        Self {
            dtype: Dtype::I16,
            shape: vec![values.len()],
            bytes: quantised.flat_map(i16::to_le_bytes).collect(),
        }
    }
}

impl View for Plain {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        std::borrow::Cow::Borrowed(&self.bytes)
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// Writes `tensors` to `path` through a temporary file in the same folder. `entry` is the one metadata entry
/// (name and text); with at most one, equal content gives equal bytes.
///
/// # Errors
/// The folder cannot be written, or a tensor's bytes do not fit its shape.
pub fn write_tensors(
    path: &Path,
    tensors: Vec<(String, Plain)>,
    entry: Option<(&str, String)>,
) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(StoreError::io(folder))?;
    let metadata = entry.map(|(key, text)| HashMap::from([(key.to_owned(), text)]));
    // Not `serialize_to_file`: that one replaces the file under our hands by another, which only its owner may read
    // and which nobody has synchronised.
    let bytes = safetensors::serialize(tensors, metadata).map_err(|e| StoreError::Damaged {
        path: path.to_owned(),
        found: e.to_string(),
    })?;
    write_atomic(path, |file| file.write_all(&bytes)).map_err(StoreError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensors = vec![
            ("b".to_owned(), Plain::u8(&[2, 3], vec![1, 2, 3, 4, 5, 6])),
            ("i".to_owned(), Plain::i64(&[-1, 1 << 40])),
            ("s".to_owned(), Plain::samples(&[0.5, -2.0])),
        ];
        write_tensors(&path, tensors, Some(("k", "v".to_owned()))).unwrap();
        let file = Mapped::open(&path).unwrap();
        assert_eq!(file.names(), ["b", "i", "s"]);
        assert_eq!(file.metadata("k"), Some("v"));
        assert_eq!(
            file.expect("b", Dtype::U8, &[0, 3]).unwrap().0,
            [1, 2, 3, 4, 5, 6]
        );
        assert_eq!(file.indices("i").unwrap(), [-1, 1 << 40]);
        let samples = file.samples("s").unwrap();
        assert!((samples[0] - 0.5).abs() < 1e-4);
        assert_eq!(samples[1], -1.0);
        let entries = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(entries, 1, "no temporary file is left");
    }

    #[cfg(unix)]
    #[test]
    fn prepared_files_have_the_mode_of_ordinary_files() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("a.safetensors"), dir.path().join("plain"));
        write_tensors(&ours, vec![("b".to_owned(), Plain::u8(&[1], vec![1]))], None).unwrap();
        std::fs::write(&plain, b"x").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn wrong_shape_and_missing_tensor_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write_tensors(&path, vec![("b".to_owned(), Plain::u8(&[2], vec![1, 2]))], None).unwrap();
        let file = Mapped::open(&path).unwrap();
        let text = file.expect("b", Dtype::U8, &[3]).unwrap_err().to_string();
        assert!(text.contains("tensor b: found U8 [2], expected U8 [3]"), "{text}");
        let text = file.indices("c").unwrap_err().to_string();
        assert!(text.contains("tensor c: found no such tensor"), "{text}");
    }

    #[test]
    fn damaged_files_are_refused_at_every_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write_tensors(&path, vec![("b".to_owned(), Plain::u8(&[5], vec![9; 5]))], None).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(Mapped::open(&path).is_err(), "{length} of {} bytes", whole.len());
        }
    }
}
