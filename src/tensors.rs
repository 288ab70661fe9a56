//! Named tensors in safetensors files: the door of `fulgur forward` to any other implementation.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use fulgur_datasets::atomic::write_atomic;
use safetensors::SafeTensors;

/// Why a file of tensors cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TensorsError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// "read" or "write".
        action: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// The bytes are no safetensors file.
    #[error("{}: not a safetensors file: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with them.
        source: safetensors::SafeTensorError,
    },
    /// A tensor cannot be taken over.
    #[error("{}: tensor `{name}`: {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        name: String,
        /// The reason.
        source: Box<candle_core::Error>,
    },
}

/// Reads every tensor of a file in its own element type onto `device`.
///
/// # Errors
/// A file that cannot be read, that is truncated or is no safetensors file, or an element type that is unknown.
pub fn read(path: &Path, device: &Device) -> Result<HashMap<String, Tensor>, TensorsError> {
    let bytes = fs::read(path).map_err(|source| TensorsError::Io {
        path: path.to_owned(),
        action: "read",
        source,
    })?;
    let file = SafeTensors::deserialize(&bytes).map_err(|source| TensorsError::Format {
        path: path.to_owned(),
        source,
    })?;
    let load = |(name, view): (String, safetensors::tensor::TensorView<'_>)| match view.load(device) {
        Ok(tensor) => Ok((name, tensor)),
        Err(source) => Err(TensorsError::Tensor {
            path: path.to_owned(),
            name,
            source: Box::new(source),
        }),
    };
    file.tensors().into_iter().map(load).collect()
}

/// Writes tensors as f32, whole or not at all; an older file of that name is replaced.
///
/// # Errors
/// A tensor that cannot be brought to the CPU as f32, a missing or read-only folder, a full disk.
///
/// ```
/// use std::collections::BTreeMap;
/// use candle_core::{DType, Device, Tensor};
///
/// let path = tempfile::tempdir()?.keep().join("out.safetensors");
/// let ones = Tensor::ones((2, 3), DType::BF16, &Device::Cpu)?;
/// fulgur::tensors::write_f32(&path, &BTreeMap::from([("o".to_owned(), ones)]))?;
/// let back = fulgur::tensors::read(&path, &Device::Cpu)?;
/// assert_eq!((back["o"].dims(), back["o"].dtype()), (&[2, 3][..], DType::F32));
/// # std::fs::remove_dir_all(path.parent().unwrap())?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_f32(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<(), TensorsError> {
    let mut ready = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor
            .to_device(&Device::Cpu)
            .and_then(|tensor| tensor.to_dtype(DType::F32)?.contiguous());
        let tensor = tensor.map_err(|source| TensorsError::Tensor {
            path: path.to_owned(),
            name: name.clone(),
            source: Box::new(source),
        })?;
        ready.push((name.as_str(), tensor));
    }
    let bytes = safetensors::serialize(ready, None).map_err(|source| TensorsError::Format {
        path: path.to_owned(),
        source,
    })?;
    write_atomic(path, |file| file.write_all(&bytes)).map_err(|source| TensorsError::Io {
        path: path.to_owned(),
        action: "write",
        source,
    })
}
