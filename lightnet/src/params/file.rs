//! Safetensors files: read with every length checked, written atomically and with the same bytes for the same tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo, TensorView};

use super::few_bits::{self, Bits};
use super::{ParamsError, Precision};

/// Larger files are refused before they are read.
const LARGEST_FILE: u64 = 64 << 30;
/// Longer headers are refused before they are read, as the format says.
const LARGEST_HEADER: u64 = 100_000_000;
/// Headers are padded with spaces to this many bytes, so that tensor data is aligned in a memory map.
const ALIGNMENT: usize = 8;

/// The content of a safetensors file.
#[derive(Debug, Default)]
pub struct Contents {
    /// Tensors by name, in the type and shape of the file.
    pub tensors: BTreeMap<String, Tensor>,
    /// The free text of the header.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a safetensors file onto `device`.
///
/// # Errors
/// The file is unreadable, larger than 64 GiB, or not well-formed (lengths, offsets, shapes, element types).
pub fn read(path: &Path, device: &Device) -> Result<Contents, ParamsError> {
    decode(path, &read_bounded(path, LARGEST_FILE)?, device)
}

/// Takes the bytes of a safetensors file apart; `path` names them in errors.
///
/// # Errors
/// The bytes are not well-formed (lengths, offsets, shapes, element types).
pub fn decode(path: &Path, bytes: &[u8], device: &Device) -> Result<Contents, ParamsError> {
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|e| malformed(path, one_line(&e.to_string())))?;
    let file = SafeTensors::deserialize(bytes).map_err(|e| malformed(path, one_line(&e.to_string())))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let tensor = view
            .load(device)
            .map_err(|e| malformed(path, format!("tensor `{name}`: {}", one_line(&e.to_string()))))?;
        tensors.insert(name.to_string(), tensor);
    }
    let metadata = header
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    Ok(Contents { tensors, metadata })
}

/// Names and shapes of the tensors of a safetensors file, from its header alone: the values are not read.
///
/// # Errors
/// The file is unreadable, or its header is not well-formed.
pub fn shapes(path: &Path) -> Result<BTreeMap<String, Vec<usize>>, ParamsError> {
    let (_, header, _) = open(path)?;
    let shape = |(name, info): (String, &TensorInfo)| (name, info.shape.clone());
    Ok(header.tensors().into_iter().map(shape).collect())
}

/// Reads those tensors of a safetensors file, on the CPU, for whose names `keep` holds: the bytes of the others are passed over.
///
/// # Errors
/// As [`read`].
pub fn read_part(path: &Path, keep: impl Fn(&str) -> bool) -> Result<Contents, ParamsError> {
    let io = |source| ParamsError::Io {
        path: path.to_path_buf(),
        source,
    };
    let (mut file, header, start) = open(path)?;
    let length = file.metadata().map_err(io)?.len();
    let mut contents = Contents {
        metadata: header
            .metadata()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        ..Contents::default()
    };
    for (name, info) in header.tensors() {
        if !keep(&name) {
            continue;
        }
        let wrong = |reason: String| malformed(path, format!("tensor `{name}`: {reason}"));
        let (first, end) = info.data_offsets;
        if first > end || start.checked_add(end as u64).is_none_or(|end| end > length) {
            return Err(wrong(format!(
                "bytes {first} to {end} of the values, the file has {length}"
            )));
        }
        let mut bytes = vec![0; end - first];
        file.seek(SeekFrom::Start(start + first as u64)).map_err(io)?;
        file.read_exact(&mut bytes).map_err(io)?;
        let tensor = TensorView::new(info.dtype, info.shape.clone(), &bytes)
            .map_err(|e| wrong(one_line(&e.to_string())))?
            .load(&Device::Cpu)
            .map_err(|e| wrong(one_line(&e.to_string())))?;
        contents.tensors.insert(name, tensor);
    }
    Ok(contents)
}

/// A file with its header, and the place where its values begin.
fn open(path: &Path) -> Result<(File, Metadata, u64), ParamsError> {
    let io = |source| ParamsError::Io {
        path: path.to_path_buf(),
        source,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST_HEADER {
        let reason = format!("a header of {length} bytes, at most {LARGEST_HEADER} are read");
        return Err(malformed(path, reason));
    }
    let mut header = Vec::new();
    (&mut file).take(length).read_to_end(&mut header).map_err(io)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| malformed(path, one_line(&e.to_string())))?;
    Ok((file, header, 8 + length))
}

fn malformed(path: &Path, reason: String) -> ParamsError {
    ParamsError::Malformed {
        path: path.to_path_buf(),
        reason,
    }
}

/// Reads a whole file of at most `limit` bytes.
///
/// # Errors
/// The file is unreadable, no regular file, or larger than `limit`.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ParamsError> {
    let io = |source| ParamsError::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(io)?;
    let info = file.metadata().map_err(io)?;
    let reason = if !info.is_file() {
        "not a regular file".to_string()
    } else if info.len() > limit {
        format!("{} bytes, at most {limit} are read", info.len())
    } else {
        let mut bytes = Vec::with_capacity(usize::try_from(info.len()).unwrap_or(0));
        file.take(limit).read_to_end(&mut bytes).map_err(io)?;
        return Ok(bytes);
    };
    Err(ParamsError::Malformed {
        path: path.to_path_buf(),
        reason,
    })
}

/// Writes `tensors` and `metadata` to one safetensors file, atomically; floating-point tensors as `precision`, integers
/// as they are. The bytes depend on the arguments alone.
///
/// # Errors
/// The file cannot be written, or a finite value does not fit `precision`.
pub fn write(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    precision: Precision,
) -> Result<(), ParamsError> {
    let layout = Layout::new(path, tensors, metadata, precision)?;
    let mut unfit = None;
    write_atomically(path, |out| {
        layout.emit(out).map_err(|error| {
            unfit = Some(error);
            std::io::Error::other("the tensors cannot be written")
        })
    })
    .map_err(|error| unfit.unwrap_or(error))
}

/// The bytes that [`write()`] would put into the file; `path` names them in errors.
///
/// # Errors
/// A finite value does not fit `precision`.
pub fn encode(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    precision: Precision,
) -> Result<Vec<u8>, ParamsError> {
    let mut bytes = Vec::new();
    Layout::new(path, tensors, metadata, precision)?.emit(&mut bytes)?;
    Ok(bytes)
}

/// A file before it is written: its header, and every tensor with the type that it is stored in.
struct Layout<'a> {
    path: &'a Path,
    header: Vec<u8>,
    entries: Vec<(String, Tensor, DType)>,
}

impl<'a> Layout<'a> {
    fn new(
        path: &'a Path,
        tensors: &BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
        precision: Precision,
    ) -> Result<Self, ParamsError> {
        let mut entries = Vec::with_capacity(tensors.len());
        for (name, tensor) in tensors {
            let bits = match precision {
                Precision::EightBit => Some(Bits::Eight),
                Precision::SixBit => Some(Bits::Six),
                Precision::F32 | Precision::F16 | Precision::BF16 => None,
            };
            let Some(bits) = bits.filter(|_| few_bits::applies(tensor)) else {
                entries.push((name.clone(), tensor.clone(), stored(tensor.dtype(), precision)));
                continue;
            };
            if let Some(taken) = Bits::ALL
                .map(|bits| bits.scale_name(name))
                .into_iter()
                .find(|name| tensors.contains_key(name))
            {
                return Err(ParamsError::Value {
                    path: path.to_path_buf(),
                    name: taken,
                    reason: format!("the name is needed for the scales of `{name}`"),
                });
            }
            let narrow = few_bits::narrow(path, name, tensor, bits)?;
            entries.push((narrow.scale_name, narrow.scales, DType::BF16));
            entries.push((name.clone(), narrow.codes, DType::U8));
        }
        // Wide types first keeps every tensor aligned to its element size.
        entries.sort_by_key(|(name, _, dtype)| (std::cmp::Reverse(dtype.size_in_bytes()), name.clone()));
        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), serde_json::json!(metadata));
        }
        let mut offset = 0;
        for (name, tensor, dtype) in &entries {
            let end = offset + tensor.elem_count() * dtype.size_in_bytes();
            let entry = serde_json::json!({
                "dtype": type_name(path, name, *dtype)?, "shape": tensor.dims(), "data_offsets": [offset, end],
            });
            header.insert(name.clone(), entry);
            offset = end;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
        Ok(Self {
            path,
            header,
            entries,
        })
    }

    /// Writes header and tensors, one tensor at a time.
    fn emit(&self, out: &mut impl Write) -> Result<(), ParamsError> {
        let mut put = |bytes: &[u8]| {
            out.write_all(bytes).map_err(|source| ParamsError::Io {
                path: self.path.to_path_buf(),
                source,
            })
        };
        put(&(self.header.len() as u64).to_le_bytes())?;
        put(&self.header)?;
        for (name, tensor, dtype) in &self.entries {
            let bytes = bytes_of(tensor, *dtype).map_err(|reason| ParamsError::Value {
                path: self.path.to_path_buf(),
                name: name.clone(),
                reason,
            })?;
            put(&bytes)?;
        }
        Ok(())
    }
}

/// The type that a tensor of type `dtype` is stored in.
fn stored(dtype: DType, precision: Precision) -> DType {
    let float = matches!(dtype, DType::F32 | DType::F64 | DType::F16 | DType::BF16);
    match precision {
        Precision::F16 if float => DType::F16,
        Precision::BF16 if float => DType::BF16,
        _ => dtype,
    }
}

/// Writes a file under a temporary name beside `path`, syncs it and renames it: `path` is never seen half-written.
///
/// # Errors
/// The folder is not writable, the disk is full, or `fill` fails; the temporary file is removed.
pub fn write_atomically(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&File>) -> std::io::Result<()>,
) -> Result<(), ParamsError> {
    let temporary = beside(path);
    let written = (|| {
        let file = File::create(&temporary)?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        fill(&mut out)?;
        out.flush()?;
        drop(out);
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        sync_folder(path)
    })();
    written.map_err(|source| {
        // What failed is reported; a temporary file that cannot be removed either adds nothing.
        let _ = std::fs::remove_file(&temporary);
        ParamsError::Io {
            path: path.to_path_buf(),
            source,
        }
    })
}

fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Makes a rename of `path` durable.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

fn type_name(path: &Path, name: &str, dtype: DType) -> Result<&'static str, ParamsError> {
    Ok(match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::U32 => "U32",
        DType::U8 => "U8",
        other => {
            let reason = format!("element type {other:?} cannot be stored");
            return Err(ParamsError::Value {
                path: path.to_path_buf(),
                name: name.to_string(),
                reason,
            });
        }
    })
}

/// The little-endian bytes of `tensor` as `dtype`.
fn bytes_of(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>, String> {
    let text = |e: candle_core::Error| one_line(&e.to_string());
    let flat = tensor
        .flatten_all()
        .and_then(|t| t.to_device(&Device::Cpu))
        .map_err(text)?;
    macro_rules! plain {
        ($element:ty) => {
            flat.to_dtype(dtype)
                .and_then(|t| t.to_vec1::<$element>())
                .map_err(text)?
                .into_iter()
                .flat_map(<$element>::to_le_bytes)
                .collect()
        };
    }
    Ok(match dtype {
        DType::F32 => plain!(f32),
        DType::F64 => plain!(f64),
        DType::I64 => plain!(i64),
        DType::U32 => plain!(u32),
        DType::U8 => flat.to_vec1::<u8>().map_err(text)?,
        DType::F16 | DType::BF16 => {
            let wide = flat
                .to_dtype(DType::F32)
                .and_then(|t| t.to_vec1::<f32>())
                .map_err(text)?;
            let narrow = |x: f32| {
                let bits = if dtype == DType::F16 {
                    f16::from_f32(x).to_bits()
                } else {
                    bf16::from_f32(x).to_bits()
                };
                let back = if dtype == DType::F16 {
                    f16::from_bits(bits).to_f32()
                } else {
                    bf16::from_bits(bits).to_f32()
                };
                (x.is_finite() == back.is_finite()).then_some(bits.to_le_bytes())
            };
            let mut bytes = Vec::with_capacity(2 * wide.len());
            for x in wide {
                bytes.extend(narrow(x).ok_or_else(|| format!("{x} does not fit {dtype:?}"))?);
            }
            bytes
        }
        other => return Err(format!("element type {other:?} cannot be stored")),
    })
}

fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> BTreeMap<String, Tensor> {
        let cpu = &Device::Cpu;
        BTreeMap::from([
            ("a".to_string(), Tensor::new(&[1f32, -2.5, 3e-3], cpu).unwrap()),
            ("b".to_string(), Tensor::new(&[[1u8, 2], [3, 255]], cpu).unwrap()),
            ("c".to_string(), Tensor::new(&[7i64, -9], cpu).unwrap()),
        ])
    }

    #[test]
    fn same_tensors_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let metadata: BTreeMap<_, _> = (0..20).map(|i| (format!("key{i}"), i.to_string())).collect();
        let write_one = |name: &str| {
            let path = folder.path().join(name);
            write(&path, &sample(), &metadata, Precision::F32).unwrap();
            (std::fs::read(&path).unwrap(), read(&path, &Device::Cpu).unwrap())
        };
        let ((first, contents), (second, _)) = (write_one("x"), write_one("y"));
        assert_eq!(first, second);
        assert_eq!(contents.metadata, metadata);
        assert_eq!(contents.tensors["c"].to_vec1::<i64>().unwrap(), [7, -9]);
        assert_eq!(contents.tensors["b"].to_vec2::<u8>().unwrap(), [[1, 2], [3, 255]]);
        assert_eq!(
            contents.tensors["a"].to_vec1::<f32>().unwrap(),
            [1f32, -2.5, 3e-3]
        );
    }

    #[test]
    fn a_part_of_a_file_is_that_part() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let metadata = BTreeMap::from([("kind".to_owned(), "toy".to_owned())]);
        write(&path, &sample(), &metadata, Precision::F32).unwrap();
        let part = read_part(&path, |name| name == "c").unwrap();
        assert_eq!(part.metadata, metadata);
        assert_eq!(part.tensors.keys().collect::<Vec<_>>(), ["c"]);
        assert_eq!(part.tensors["c"].to_vec1::<i64>().unwrap(), [7, -9]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = read_part(&path, |_| true).unwrap_err().to_string();
            assert!(
                message.contains("w.safetensors") && !message.contains('\n'),
                "{message}"
            );
        }
    }

    #[test]
    fn damaged_files_are_one_line_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write(&path, &sample(), &BTreeMap::new(), Precision::F32).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|n| whole[..n].to_vec()).collect();
        damaged.push([whole.clone(), vec![0]].concat());
        damaged.push([u64::MAX.to_le_bytes().to_vec(), vec![b'{'; 64]].concat());
        damaged.push(b"hello, this is no safetensors file at all".to_vec());
        let huge = br#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#;
        damaged.push([&(huge.len() as u64).to_le_bytes()[..], huge, &[0; 16]].concat());
        for bytes in damaged {
            std::fs::write(&path, &bytes).unwrap();
            let message = read(&path, &Device::Cpu).unwrap_err().to_string();
            assert!(
                message.contains("w.safetensors") && !message.contains('\n'),
                "{message}"
            );
        }
        assert!(
            read(folder.path(), &Device::Cpu)
                .unwrap_err()
                .to_string()
                .contains("regular file")
        );
        assert!(read(&folder.path().join("absent"), &Device::Cpu).is_err());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        write(&path, &sample(), &BTreeMap::new(), Precision::F32).unwrap();
        let before = std::fs::read(&path).unwrap();
        let large = BTreeMap::from([("big".to_string(), Tensor::new(&[1e6f32], &Device::Cpu).unwrap())]);
        let message = write(&path, &large, &BTreeMap::new(), Precision::F16)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("`big`") && message.contains("1000000"),
            "{message}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        write(&path, &large, &BTreeMap::new(), Precision::BF16).unwrap();
    }
}
