//! Named tensors in safetensors files: the door of `fulgur forward` to any other implementation.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use fulgur_lightnet::params::{ParamsError, Precision, file};

/// Reads every tensor of a file in its own element type onto `device`.
///
/// # Errors
/// A file that cannot be read, that is truncated or is no safetensors file, or an element type that is unknown.
pub fn read(path: &Path, device: &Device) -> Result<BTreeMap<String, Tensor>, ParamsError> {
    Ok(file::read(path, device)?.tensors)
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
pub fn write_f32(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<(), ParamsError> {
    let wide = |(name, tensor): (&String, &Tensor)| {
        let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Ok((name.clone(), tensor))
    };
    let tensors = tensors.iter().map(wide).collect::<Result<_, ParamsError>>()?;
    file::write(path, &tensors, &BTreeMap::new(), Precision::F32)
}
