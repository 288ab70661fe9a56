//! What safetensors files hold, from their headers: the values are not read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use fulgur_lightnet::params::few_bits;
use fulgur_lightnet::params::outline::values_of;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::EstimateError;

const ENDING: &str = "safetensors";
/// Longer headers are refused, as the format says.
const LONGEST_HEADER: u64 = 100_000_000;
/// The length of the header, before it.
const PREFIX: u64 = 8;
/// Bytes of a value once it is loaded.
const WIDE: u64 = 4;

/// A tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored {
    /// Its part of the model: the folder of its file, where that is one of several.
    pub(super) folder: Option<String>,
    /// Its name.
    pub(super) name: String,
    /// Parameters in it: none in integers, and none in the scales of others.
    pub(super) parameters: u64,
    /// Bytes of it in the file.
    pub(super) bytes: u64,
    /// Bytes of it in memory, where floating-point numbers are f32.
    pub(super) loaded: u64,
}

/// The files of a model folder: those in it, else those in the folders in it.
pub(super) fn files(dir: &Path) -> Result<Vec<PathBuf>, EstimateError> {
    let own = files_in(dir)?;
    if !own.is_empty() {
        return Ok(own);
    }
    let mut below = Vec::new();
    for path in list(dir)? {
        if path.is_dir() {
            below.extend(files_in(&path)?);
        }
    }
    if below.is_empty() {
        return Err(EstimateError::NoModel {
            path: dir.to_owned(),
            reason: "no .safetensors file in it or in the folders in it".to_owned(),
        });
    }
    Ok(below)
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>, EstimateError> {
    let weights = |path: &PathBuf| path.extension().is_some_and(|ending| ending == ENDING) && path.is_file();
    Ok(list(dir)?.into_iter().filter(weights).collect())
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, EstimateError> {
    let io = |source| EstimateError::Io {
        path: dir.to_owned(),
        source,
    };
    let items = fs::read_dir(dir).map_err(io)?;
    let mut paths = items
        .map(|item| Ok(item?.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(io)?;
    paths.sort();
    Ok(paths)
}

/// The tensors of `path` by name; `folder` is noted in each.
pub(super) fn read(path: &Path, folder: Option<&str>) -> Result<Vec<Stored>, EstimateError> {
    let header = header(path)?;
    let tensors: BTreeMap<_, _> = header.tensors().into_iter().collect();
    let coded = |name: &str| tensors.get(name).is_some_and(|info| info.dtype == Dtype::U8);
    // Matrices in few bits by name, with the shapes that they have once they are loaded.
    let mut wide: BTreeMap<String, Vec<usize>> = tensors
        .iter()
        .map(|(name, info)| ((*name).clone(), info.shape.clone()))
        .collect();
    few_bits::widen_shapes(&mut wide);
    let scaled: BTreeSet<&str> = tensors
        .keys()
        .filter_map(|name| few_bits::of_scales(name).filter(|name| coded(name)))
        .collect();
    let one = |(name, info): (&String, &&safetensors::tensor::TensorInfo)| {
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        let values = values_of(wide.get(name).unwrap_or(&info.shape));
        let of_codes = few_bits::of_scales(name).is_some_and(coded);
        let has_scales = scaled.contains(name.as_str());
        let (parameters, loaded) = match () {
            () if of_codes => (0, 0),
            () if has_scales || is_float(info.dtype) => (values, WIDE.saturating_mul(values)),
            () => (0, bytes),
        };
        Stored {
            folder: folder.map(str::to_owned),
            name: name.clone(),
            parameters,
            bytes,
            loaded,
        }
    };
    Ok(tensors.iter().map(one).collect())
}

fn header(path: &Path) -> Result<Metadata, EstimateError> {
    let io = |source| EstimateError::Io {
        path: path.to_owned(),
        source,
    };
    let refuse = |reason: String| EstimateError::NoModel {
        path: path.to_owned(),
        reason,
    };
    let mut file = File::open(path).map_err(io)?;
    let size = file.metadata().map_err(io)?.len();
    let mut length = [0; PREFIX as usize];
    if size < PREFIX {
        return Err(refuse(format!("{size} bytes are no safetensors file")));
    }
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER.min(size - PREFIX) {
        return Err(refuse(format!(
            "no safetensors file: a header of {length} bytes in a file of {size}"
        )));
    }
    let mut text = Vec::new();
    file.take(length).read_to_end(&mut text).map_err(io)?;
    let header: Metadata = serde_json::from_slice(&text).map_err(|error| {
        let words = error.to_string();
        refuse(format!(
            "no safetensors file: {}",
            words.lines().next().unwrap_or_default()
        ))
    })?;
    let expected = PREFIX + length + header.data_len() as u64;
    if size != expected {
        return Err(refuse(format!(
            "{size} bytes, expected {expected} as its header says"
        )));
    }
    Ok(header)
}

fn is_float(dtype: Dtype) -> bool {
    !matches!(
        dtype,
        Dtype::BOOL
            | Dtype::U8
            | Dtype::I8
            | Dtype::U16
            | Dtype::I16
            | Dtype::U32
            | Dtype::I32
            | Dtype::U64
            | Dtype::I64
    )
}
