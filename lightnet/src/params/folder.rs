//! The weights of a model folder: `model.safetensors`, `diffusion_pytorch_model.safetensors`, `pytorch_model.bin` or
//! `diffusion_pytorch_model.bin`, or shards of one of them with an index; else the only file `model*.safetensors`, or the only `.pth`, `.pt` or `.ckpt`. A file may also be named itself.
//!
//! The index is that of Hugging Face: `{"weight_map": {"tensor": "file"}}`, with files beside it. [`load`] builds a model of them,
//! [`load_part`] a part of one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use candle_nn::VarBuilder;
use serde::Deserialize;

use super::{Frozen, Outline, ParamsError, checkpoint, few_bits, file};
use crate::config::ConfigError;

/// Files that hold all weights, the best first; their indices have the same name and an ending more.
const WHOLE: [&str; 4] = [
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
];
const INDEX: &str = ".index.json";
/// Beginnings of other names of safetensors files of all weights, such as those of a variant in half precision.
const STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];
/// Part of the name of a shard, which is not all weights.
const SHARD: &str = "-of-";
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
    #[error(
        "{}: found no weights, expected model.safetensors, model.safetensors.index.json, pytorch_model.bin, or one .pth or .ckpt",
        path.display()
    )]
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
    load_part(&weights, |_| true, compute, device, ignored, build)
}

/// As [`load`], of those weights for whose names `part` holds; the others are not read.
///
/// # Errors
/// The weights are damaged, or they are other tensors than those of the model, all of which are listed.
pub fn load_part<M>(
    weights: &Weights,
    part: impl Fn(&str) -> bool,
    compute: DType,
    device: &Device,
    ignored: impl Fn(&str) -> bool,
    build: impl Fn(DType, &VarBuilder) -> candle_core::Result<M>,
) -> Result<M, LoadError> {
    check_part(weights, &part, ignored, |vb| build(DType::F32, vb))?;
    Ok(build(compute, &weights.load_part(device, part)?.builder())?)
}

/// What [`load_part`] checks before it reads any value.
///
/// # Errors
/// As [`load_part`], but for those of the values.
pub fn check_part<M>(
    weights: &Weights,
    part: impl Fn(&str) -> bool,
    ignored: impl Fn(&str) -> bool,
    build: impl Fn(&VarBuilder) -> candle_core::Result<M>,
) -> Result<(), LoadError> {
    let outline = Outline::new();
    build(&outline.builder())?;
    let mut found = weights.shapes()?;
    found.retain(|name, _| part(name));
    Ok(compare(&weights.origin, &outline.shapes(), &found, ignored)?)
}

/// Where the weights of a folder are.
#[derive(Clone, Debug)]
pub struct Weights {
    /// The file, or the index of the shards: names them in errors.
    pub origin: PathBuf,
    files: Vec<PathBuf>,
    /// The shard of each tensor, as the index says.
    map: BTreeMap<String, PathBuf>,
    /// What names begin with.
    prefix: String,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Looks for weights in the folder `dir`, or takes the file of that name; `None` where there are none.
    ///
    /// # Errors
    /// The folder is unreadable, the index is no index or names a file that is not beside it, or there are several files of which
    /// none is known to be the one.
    pub fn find(dir: &Path) -> Result<Option<Self>, ParamsError> {
        if dir.is_file() {
            return Ok(Some(Self::of(dir.to_owned())));
        }
        for name in WHOLE {
            let whole = dir.join(name);
            if whole.is_file() {
                return Ok(Some(Self::of(whole)));
            }
            let index = dir.join(format!("{name}{INDEX}"));
            if index.is_file() {
                return Self::of_index(dir, index).map(Some);
            }
        }
        Ok(only(dir)?.map(Self::of))
    }

    fn of(whole: PathBuf) -> Self {
        Self {
            origin: whole.clone(),
            files: vec![whole],
            map: BTreeMap::new(),
            prefix: String::new(),
        }
    }

    fn of_index(dir: &Path, index: PathBuf) -> Result<Self, ParamsError> {
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
        Ok(Self {
            origin: index,
            files: files.into_iter().collect(),
            map,
            prefix: String::new(),
        })
    }

    /// Looks only at tensors whose names begin with `prefix`, and leaves it out of their names.
    pub fn below(&mut self, prefix: &str) {
        prefix.clone_into(&mut self.prefix);
    }

    /// All files, in the order of their names.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Names and shapes of all tensors, from headers alone; tensors in few bits have their full shapes, without their scales.
    ///
    /// # Errors
    /// A header is damaged, or a shard does not hold what the index says.
    pub fn shapes(&self) -> Result<BTreeMap<String, Vec<usize>>, ParamsError> {
        let mut all = BTreeMap::new();
        for path in &self.files {
            for (name, shape) in checkpoint::shapes(path)? {
                self.check(&name, path)?;
                all.insert(name, shape);
            }
        }
        self.complete(|name| all.contains_key(name))?;
        if !self.prefix.is_empty() {
            let below = all
                .into_iter()
                .filter_map(|(name, shape)| Some((name.strip_prefix(&self.prefix)?.to_owned(), shape)));
            all = below.collect();
        }
        few_bits::widen_shapes(&mut all);
        Ok(all)
    }

    /// Loads all tensors onto `device`.
    ///
    /// # Errors
    /// As [`Self::shapes`], and those of [`Frozen::open`].
    pub fn load(&self, device: &Device) -> Result<Frozen, ParamsError> {
        let frozen = self.open(device, None)?;
        self.complete(|name| {
            let below = name.strip_prefix(&self.prefix);
            below.is_none_or(|name| frozen.tensors().contains_key(name))
        })?;
        Ok(frozen)
    }

    /// Loads those tensors onto `device` for whose names `part` holds, and reads no others.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_part(&self, device: &Device, part: impl Fn(&str) -> bool) -> Result<Frozen, ParamsError> {
        self.open(
            device,
            Some(&|name| name.strip_prefix(&self.prefix).is_some_and(&part)),
        )
    }

    fn open(&self, device: &Device, keep: Option<&dyn Fn(&str) -> bool>) -> Result<Frozen, ParamsError> {
        Frozen::of_files(&self.origin, &self.files, device, keep, |name, path| {
            self.check(&name, path)?;
            Ok(name.strip_prefix(&self.prefix).map(str::to_owned))
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

/// The only file of weights in `dir`: a safetensors file with a usual name, else a checkpoint of PyTorch.
fn only(dir: &Path) -> Result<Option<PathBuf>, ParamsError> {
    let io = |source| ParamsError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut names = Vec::new();
    match std::fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                let path = entry.map_err(io)?.path();
                if path.is_file() {
                    names.push(path);
                }
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error)),
    }
    names.sort();
    let ending = |path: &Path| {
        path.extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default()
            .to_owned()
    };
    let named = |path: &Path, stems: &[&str]| {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        !name.contains(SHARD) && stems.iter().any(|stem| name.starts_with(stem))
    };
    let safe = |path: &&PathBuf| ending(path) == checkpoint::SAFE && named(path, &STEMS);
    let torch = |path: &&PathBuf| {
        let ending = ending(path);
        // Many other things end in .bin.
        checkpoint::TORCH.contains(&ending.as_str())
            && (ending != "bin" || named(path, &["pytorch_model", "diffusion_pytorch_model"]))
    };
    let found: Vec<&PathBuf> = match names.iter().filter(safe).collect::<Vec<_>>() {
        found if found.is_empty() => names.iter().filter(torch).collect(),
        found => found,
    };
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some((*only).clone())),
        several => {
            let list = several
                .iter()
                .take(8)
                .map(|path| path.file_name().unwrap_or_default().to_string_lossy());
            Err(ParamsError::Index {
                path: dir.to_owned(),
                reason: format!(
                    "{} files of weights ({}), expected one, or an index",
                    several.len(),
                    list.collect::<Vec<_>>().join(", ")
                ),
            })
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
        let index = |text: &str| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
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
    fn files_of_other_names_are_found_and_prefixes_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        std::fs::write(dir.join("training_args.bin"), "x").unwrap();
        save(&dir.join("other.safetensors"), "c");
        assert!(Weights::find(dir).unwrap().is_none());
        save(&dir.join("model.fp16.safetensors"), "net.a");
        let mut weights = Weights::find(dir).unwrap().unwrap();
        assert!(weights.origin.ends_with("model.fp16.safetensors"));
        weights.below("net.");
        let names: Vec<String> = weights.shapes().unwrap().into_keys().collect();
        assert_eq!(names, ["a.bias", "a.weight"]);
        let part = weights.load_part(&Device::Cpu, |name| name == "a.bias").unwrap();
        assert_eq!(part.tensors().keys().collect::<Vec<_>>(), ["a.bias"]);
        assert_eq!(weights.load(&Device::Cpu).unwrap().tensors().len(), 2);
        save(&dir.join("model_ema.safetensors"), "a");
        let line = words(Weights::find(dir));
        assert!(
            line.contains("2 files of weights (model.fp16.safetensors, model_ema"),
            "{line}"
        );
        save(&dir.join("model.safetensors"), "a");
        let found = Weights::find(dir).unwrap().unwrap();
        assert!(found.origin.ends_with("model.safetensors"));
        let named = Weights::find(&dir.join("other.safetensors")).unwrap().unwrap();
        assert_eq!(named.shapes().unwrap()["c.bias"], [2]);
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
