//! The weights of a model folder: one file `model.safetensors`, or shards with `model.safetensors.index.json`.
//!
//! The index is that of Hugging Face: `{"weight_map": {"tensor": "file"}}`, with files beside it. [`load`] builds a model of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;

use super::{Frozen, Outline, ParamsError, eight_bit, file};
use crate::config::ConfigError;

const WHOLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Largest index that is read: some hundred thousand tensors.
const MOST_BYTES: u64 = 64 << 20;

/// Why a folder gives no model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights.
    #[error(transparent)]
    Weights(#[from] ParamsError),
    /// There are no weights.
    #[error("{}: found no weights, expected model.safetensors or model.safetensors.index.json", path.display())]
    Absent {
        /// The folder.
        path: PathBuf,
    },
    /// An operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Builds a model that computes in `compute` of the weights in `dir`, on `device`. Before any value is read, all tensors are compared by
/// name and shape with those that the model asks for; names for which `ignored` holds may be there or not.
///
/// # Errors
/// There are no weights, they are damaged, or they are other tensors than those of the model, all of which are listed.
pub fn load<M>(
    dir: &Path,
    compute: DType,
    device: &Device,
    ignored: impl Fn(&str) -> bool,
    build: impl Fn(DType, &VarBuilder) -> candle_core::Result<M>,
) -> Result<M, LoadError> {
    let Some(weights) = Weights::find(dir)? else {
        return Err(LoadError::Absent { path: dir.to_owned() });
    };
    let outline = Outline::new();
    build(DType::F32, &outline.builder())?;
    compare(&weights.origin, &outline.shapes(), &weights.shapes()?, ignored)?;
    Ok(build(compute, &weights.load(device)?.builder())?)
}

/// Where the weights of a folder are.
#[derive(Clone, Debug)]
pub struct Weights {
    /// The file, or the index of the shards: names them in errors.
    pub origin: PathBuf,
    files: Vec<PathBuf>,
    /// The shard of each tensor, as the index says.
    map: BTreeMap<String, PathBuf>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Looks for weights in `dir`; `None` where there are none.
    ///
    /// # Errors
    /// The index is unreadable, no index, or names a file that is not beside it.
    pub fn find(dir: &Path) -> Result<Option<Self>, ParamsError> {
        let (whole, index) = (dir.join(WHOLE), dir.join(INDEX));
        if whole.is_file() {
            return Ok(Some(Self {
                origin: whole.clone(),
                files: vec![whole],
                map: BTreeMap::new(),
            }));
        }
        if !index.is_file() {
            return Ok(None);
        }
        let bytes = file::read_bounded(&index, MOST_BYTES)?;
        let fail = |reason: String| ParamsError::Index {
            path: index.clone(),
            reason,
        };
        let Index { weight_map } = serde_json::from_slice(&bytes).map_err(|e| fail(e.to_string()))?;
        let mut map = BTreeMap::new();
        for (tensor, name) in weight_map {
            let plain = Path::new(&name)
                .file_name()
                .is_some_and(|last| last == name.as_str());
            if !plain {
                return Err(fail(format!(
                    "tensor `{tensor}` lies in {name:?}, expected a file beside the index"
                )));
            }
            map.insert(tensor, dir.join(name));
        }
        let files: BTreeSet<PathBuf> = map.values().cloned().collect();
        Ok(Some(Self {
            origin: index,
            files: files.into_iter().collect(),
            map,
        }))
    }

    /// The files of the tensors, in the order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Names and shapes of all tensors, from headers alone; 8-bit tensors have their full shapes, without their scales.
    ///
    /// # Errors
    /// A header is damaged, or a shard does not hold what the index says.
    pub fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>, ParamsError> {
        let mut all = BTreeMap::new();
        for path in &self.files {
            for (name, shape) in file::shapes(path)? {
                self.check(&name, path)?;
                all.insert(name, shape);
            }
        }
        self.complete(|name| all.contains_key(name))?;
        let scales: Vec<String> = all.keys().map(|name| eight_bit::scale_name(name)).collect();
        for scale in scales {
            all.remove(&scale);
        }
        Ok(all)
    }

    /// Loads all tensors onto `device`.
    ///
    /// # Errors
    /// As [`Self::shapes`], and those of [`Frozen::open`].
    pub fn load(&self, device: &Device) -> Result<Frozen, ParamsError> {
        Frozen::of_files(&self.origin, &self.files, device, |name, path| {
            self.check(name, path)
        })
        .and_then(|frozen| {
            self.complete(|name| frozen.tensors().contains_key(name))?;
            Ok(frozen)
        })
    }

    /// The index places a tensor where it was found.
    fn check(&self, name: &str, path: &Path) -> Result<(), ParamsError> {
        if self.map.is_empty() {
            return Ok(());
        }
        let said = match self.map.get(name) {
            Some(said) if said == path => return Ok(()),
            Some(said) => format!("says {}", said.display()),
            None => "does not name it".to_owned(),
        };
        Err(ParamsError::Index {
            path: self.origin.clone(),
            reason: format!("tensor `{name}` lies in {}, the index {said}", path.display()),
        })
    }

    /// Every tensor of the index was found.
    fn complete(&self, found: impl Fn(&str) -> bool) -> Result<(), ParamsError> {
        match self.map.iter().find(|(name, _)| !found(name)) {
            None => Ok(()),
            Some((name, path)) => Err(ParamsError::Index {
                path: self.origin.clone(),
                reason: format!("tensor `{name}` is not in {}", path.display()),
            }),
        }
    }
}

/// Compares what a model expects with what its weights hold; `origin` names them in errors. Names for which `ignored` holds
/// may be there or not.
///
/// # Errors
/// Lists every tensor that is missing, with the shape that is expected, unexpected, or of another shape.
fn compare(
    origin: &Path,
    expected: &BTreeMap<String, Vec<usize>>,
    found: &BTreeMap<String, Vec<usize>>,
    ignored: impl Fn(&str) -> bool,
) -> Result<(), ParamsError> {
    let with_shape = |(name, shape): (&String, &Vec<usize>)| format!("{name} {shape:?}");
    let missing: Vec<String> = expected
        .iter()
        .filter(|(name, _)| !found.contains_key(*name))
        .map(with_shape)
        .collect();
    let unexpected: Vec<String> = found
        .iter()
        .filter(|(name, _)| !expected.contains_key(*name) && !ignored(name))
        .map(with_shape)
        .collect();
    let misshaped: Vec<_> = expected
        .iter()
        .filter_map(|(name, expected)| {
            let found = found.get(name)?;
            (found != expected).then(|| (name.clone(), found.clone(), expected.clone()))
        })
        .collect();
    if missing.is_empty() && unexpected.is_empty() && misshaped.is_empty() {
        return Ok(());
    }
    Err(ParamsError::Mismatch {
        path: origin.to_path_buf(),
        missing,
        unexpected,
        misshaped,
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Params, Precision};
    use super::*;

    fn save(path: &Path, name: &str) {
        let params = Params::random(1, &Device::Cpu);
        candle_nn::linear(3, 2, params.builder().pp(name)).unwrap();
        params.save(path, &BTreeMap::new(), Precision::F32).unwrap();
    }

    fn words<T: std::fmt::Debug>(result: Result<T, ParamsError>) -> String {
        let line = result.unwrap_err().to_string();
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn shards_are_one_set_of_weights() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        assert!(Weights::find(dir).unwrap().is_none());
        save(&dir.join("one.safetensors"), "a");
        save(&dir.join("two.safetensors"), "b");
        let index = |text: &str| std::fs::write(dir.join(INDEX), text).unwrap();
        index(
            r#"{"metadata": {"total_size": 64}, "weight_map": {"a.weight": "one.safetensors", "a.bias": "one.safetensors",
                "b.weight": "two.safetensors", "b.bias": "two.safetensors"}}"#,
        );
        let weights = Weights::find(dir).unwrap().unwrap();
        let names: Vec<String> = weights.shapes().unwrap().into_keys().collect();
        assert_eq!(names, ["a.bias", "a.weight", "b.bias", "b.weight"]);
        let frozen = weights.load(&Device::Cpu).unwrap();
        candle_nn::linear(3, 2, frozen.builder().pp("b")).unwrap();
        assert!(words(frozen.all_used()).contains("2 unexpected: a.bias, a.weight"));

        let refused = |text: &str| {
            index(text);
            words(Weights::find(dir).and_then(|weights| weights.unwrap().shapes()))
        };
        let whole = r#"{"weight_map": {"a.weight": "one.safetensors", "a.bias": "one.safetensors""#;
        for (text, expected) in [
            (
                format!("{whole}, \"c\": \"../x.safetensors\"}}}}"),
                "a file beside the index",
            ),
            (
                format!("{whole}, \"c\": \"one.safetensors\"}}}}"),
                "tensor `c` is not in",
            ),
            (
                format!("{whole}, \"c\": \"gone.safetensors\"}}}}"),
                "gone.safetensors",
            ),
            (
                format!("{whole}, \"b.bias\": \"two.safetensors\"}}}}"),
                "does not name it",
            ),
            (format!("{whole}}}"), "model.safetensors.index.json: "),
        ] {
            let line = refused(&text);
            assert!(line.contains(expected), "{expected}: {line}");
        }
    }

    #[test]
    fn all_that_differs_is_listed() {
        let shapes = |list: &[(&str, &[usize])]| -> BTreeMap<String, Vec<usize>> {
            list.iter()
                .map(|(name, shape)| ((*name).to_owned(), shape.to_vec()))
                .collect()
        };
        let expected = shapes(&[("a", &[2, 3]), ("b", &[4]), ("c", &[5])]);
        let found = shapes(&[("b", &[5]), ("c", &[5]), ("d", &[1]), ("old", &[1])]);
        let line = words(compare(Path::new("w"), &expected, &found, |name| name == "old"));
        assert_eq!(
            line,
            "w: not the weights of this model: 1 missing: a [2, 3]; 1 unexpected: d [1]; 1 of another shape: b (found [5], \
             expected [4])"
        );
        let many: BTreeMap<_, _> = (0..1000).map(|i| (format!("t{i:04}"), vec![1])).collect();
        let line = words(compare(Path::new("w"), &many, &found, |_| true));
        assert!(
            line.contains("1000 missing: t0000 [1], ") && line.ends_with("and 936 more"),
            "{line}"
        );
    }
}
