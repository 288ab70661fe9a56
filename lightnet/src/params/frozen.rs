//! Weights that are only read: for inference, and for a part of a model that another one trains on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::{ParamsError, checkpoint};

/// The tensors of one file, or of the shards of one set of weights. 8-bit tensors are widened when they are loaded. Clones share the tensors.
#[derive(Clone)]
pub struct Frozen {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    device: Device,
    tensors: BTreeMap<String, Tensor>,
    metadata: BTreeMap<String, String>,
    used: Mutex<BTreeSet<String>>,
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Frozen({}, {} tensors)",
            self.shared.path.display(),
            self.shared.tensors.len()
        )
    }
}

impl Frozen {
    /// Loads the file onto `device`.
    ///
    /// # Errors
    /// The file is unreadable or damaged, or an 8-bit tensor lacks its scales.
    pub fn open(path: &Path, device: &Device) -> Result<Self, ParamsError> {
        Self::of_files(path, &[path], device, None, |name, _| Ok(Some(name)))
    }

    /// Loads several files as one set of tensors, which `origin` names in errors: those for whose names `keep` holds, or all. `known`
    /// sees each tensor with its file and gives the name that it shall have, or none where it shall not be there.
    pub(super) fn of_files<P: AsRef<Path>>(
        origin: &Path,
        files: &[P],
        device: &Device,
        keep: Option<&dyn Fn(&str) -> bool>,
        known: impl Fn(String, &Path) -> Result<Option<String>, ParamsError>,
    ) -> Result<Self, ParamsError> {
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        for path in files.iter().map(AsRef::as_ref) {
            let contents = checkpoint::read(path, keep)?;
            for (name, tensor) in contents.tensors {
                if let Some(name) = known(name, path)? {
                    tensors.insert(name, tensor.to_device(device)?);
                }
            }
            metadata.extend(contents.metadata);
        }
        let shared = Shared {
            path: origin.to_path_buf(),
            device: device.clone(),
            tensors,
            metadata,
            used: Mutex::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// A builder (f32 by default; `to_dtype` asks for another type) that gives out the tensors of the file.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, self.shared.device.clone())
    }

    /// The free text of the file's header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.shared.metadata
    }

    /// Whether there are tensors below `prefix`: a decoder may lie alone, without its encoder.
    pub fn has_below(&self, prefix: &str) -> bool {
        self.shared.tensors.keys().any(|name| name.starts_with(prefix))
    }

    /// All tensors by name, widened.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.shared.tensors
    }

    /// Call when the model is built: a tensor that nobody asked for means that this is another model's file.
    ///
    /// # Errors
    /// Lists every unused tensor.
    pub fn all_used(&self) -> Result<(), ParamsError> {
        let used = self.shared.used.lock().unwrap_or_else(PoisonError::into_inner);
        let unexpected: Vec<_> = self
            .shared
            .tensors
            .keys()
            .filter(|name| !used.contains(*name))
            .cloned()
            .collect();
        if unexpected.is_empty() {
            return Ok(());
        }
        let path = self.shared.path.clone();
        Err(ParamsError::Mismatch {
            path,
            missing: Vec::new(),
            unexpected,
            misshaped: Vec::new(),
        })
    }

    fn tensor(&self, name: &str, shape: Option<&Shape>) -> candle_core::Result<&Tensor> {
        let mut mismatch = (Vec::new(), Vec::new());
        match (self.shared.tensors.get(name), shape) {
            (Some(tensor), Some(shape)) if tensor.shape() != shape => {
                mismatch
                    .1
                    .push((name.to_string(), tensor.dims().to_vec(), shape.dims().to_vec()));
            }
            (Some(tensor), _) => {
                self.shared
                    .used
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(name.to_string());
                return Ok(tensor);
            }
            (None, _) => mismatch.0.push(name.to_string()),
        }
        let (missing, misshaped) = mismatch;
        let path = self.shared.path.clone();
        let error = ParamsError::Mismatch {
            path,
            missing,
            unexpected: Vec::new(),
            misshaped,
        };
        Err(candle_core::Error::Msg(error.to_string()))
    }
}

impl SimpleBackend for Frozen {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.tensor(name, Some(&shape))?
            .to_device(device)?
            .to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.tensor(name, None)?.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.shared.tensors.contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Params, Precision};
    use super::*;

    #[test]
    fn names_what_does_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let params = Params::random(1, &Device::Cpu);
        candle_nn::linear(3, 2, params.builder().pp("a")).unwrap();
        candle_nn::linear(3, 2, params.builder().pp("b")).unwrap();
        params.save(&path, &BTreeMap::new(), Precision::F16).unwrap();
        let frozen = Frozen::open(&path, &Device::Cpu).unwrap();
        let error = |from, name: &str| {
            let message = candle_nn::linear(from, 2, frozen.builder().pp(name))
                .unwrap_err()
                .to_string();
            message.lines().next().unwrap().to_string()
        };
        assert!(error(3, "c").contains("1 missing: c.weight"), "{}", error(3, "c"));
        assert!(
            error(4, "a").contains("a.weight (found [2, 3], expected [2, 4])"),
            "{}",
            error(4, "a")
        );
        candle_nn::linear(3, 2, frozen.builder().pp("a")).unwrap();
        assert!(
            frozen
                .all_used()
                .unwrap_err()
                .to_string()
                .contains("2 unexpected: b.bias, b.weight")
        );
        candle_nn::linear(3, 2, frozen.builder().pp("b")).unwrap();
        frozen.all_used().unwrap();
    }
}
