//! The parameters of a model: created by name from a seed, trained, saved, loaded.
//!
//! Any layer that takes a candle `VarBuilder` runs on [`Params`] (trainable, f32) and on [`Frozen`] (read only). The
//! initial value of a tensor depends on the seed and on the tensor's full name alone: not on the device, not on the
//! order in which layers are built.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use candle_core::Device;
//! use fulgur_lightnet::params::{Frozen, Params};
//! let params = Params::random(7, &Device::Cpu);
//! let layer = candle_nn::linear(3, 2, params.builder().pp("head"))?;
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("model.safetensors");
//! params.save(&path, &Default::default(), fulgur_lightnet::params::Precision::F32)?;
//! let frozen = Frozen::open(&path, &Device::Cpu)?;
//! let same = candle_nn::linear(3, 2, frozen.builder().pp("head"))?;
//! frozen.all_used()?;
//! assert_eq!(layer.weight().to_vec2::<f32>()?, same.weight().to_vec2::<f32>()?);
//! # Ok(()) }
//! ```

mod checkpoint;
pub mod few_bits;
pub mod file;
pub mod folder;
mod frozen;
pub mod outline;
pub mod pack;
pub mod torch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::philox::{Philox, stream_of};

pub use frozen::Frozen;
pub use outline::Outline;

/// What can be wrong with a file of weights or with a request for a parameter.
#[derive(Debug, thiserror::Error)]
pub enum ParamsError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no well-formed safetensors file, or too large.
    #[error("{}: not a usable safetensors file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The file is no usable checkpoint of PyTorch.
    #[error("{}: not a usable PyTorch checkpoint: {reason}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The tensors of the file are not those of the model.
    #[error("{}: not the weights of this model: {}", path.display(), differences(missing, unexpected, misshaped))]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// Names that the model has and the file lacks.
        missing: Vec<String>,
        /// Names that the file has and the model lacks.
        unexpected: Vec<String>,
        /// Names with found and expected shapes.
        misshaped: Vec<(String, Vec<usize>, Vec<usize>)>,
    },
    /// The index of shards is damaged, or is not that of the shards.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A value that cannot be stored in the form asked for.
    #[error("{}: tensor `{name}`: {reason}", path.display())]
    Value {
        /// The file being written.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with its values.
        reason: String,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// How floating-point tensors are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Exact: every tensor keeps its type, f32 for parameters that were trained here.
    #[default]
    F32,
    /// 16 bits: half the size, relative error under 2^-11.
    F16,
    /// The upper 16 bits of an f32: relative error under 2^-8, full range.
    BF16,
    /// Matrices in 8 bits with a scale for every 64 values, a quarter of the size: error under 1/250 of the largest of
    /// them. Vectors and small matrices keep their type.
    EightBit,
    /// Matrices in 6 bits with a scale for every 64 values, a fifth of the size: about four times the error of 8 bits.
    /// Vectors and small matrices keep their type, matrices whose last dimension is no multiple of 4 take 8 bits.
    SixBit,
}

/// Trainable parameters by name, all f32. Clones share the same tensors.
#[derive(Clone)]
pub struct Params {
    shared: Arc<Shared>,
}

struct Shared {
    seed: u64,
    device: Device,
    vars: Mutex<BTreeMap<String, Var>>,
    stand_in: Mutex<Option<BTreeMap<String, Tensor>>>,
}

impl std::fmt::Debug for Params {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Params({} tensors, {} values)",
            self.vars().len(),
            self.count()
        )
    }
}

impl Params {
    /// An empty store on `device`; tensors are created when a layer first asks for them, drawn from `seed`.
    pub fn random(seed: u64, device: &Device) -> Self {
        let shared = Shared {
            seed,
            device: device.clone(),
            vars: Mutex::default(),
            stand_in: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Parameters with these values, f32 on `device`, in memory of their own.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn of(tensors: &BTreeMap<String, Tensor>, device: &Device) -> candle_core::Result<Self> {
        let params = Self::random(0, device);
        for (name, tensor) in tensors {
            let own = tensor.detach().to_dtype(DType::F32)?.to_device(device)?.copy()?;
            params.shared.lock().insert(name.clone(), Var::from_tensor(&own)?);
        }
        Ok(params)
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// All parameters created so far, by full name.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        self.shared.lock().clone()
    }

    /// How many values all parameters hold together.
    pub fn count(&self) -> usize {
        self.shared.lock().values().map(|var| var.elem_count()).sum()
    }

    /// A builder for layers; it creates what it is asked for. Only f32 is given out: a copy in another type would not
    /// follow the updates, so layers convert where they compute.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), DType::F32, self.shared.device.clone())
    }

    /// Saves all parameters to one safetensors file, atomically, with `metadata` in its header.
    ///
    /// # Errors
    /// The file cannot be written, or a value does not fit `precision`.
    pub fn save(
        &self,
        path: &Path,
        metadata: &BTreeMap<String, String>,
        precision: Precision,
    ) -> Result<(), ParamsError> {
        file::write(path, &self.values(), metadata, precision)
    }

    /// The values by name: those of the parameters, or those that stand in for them.
    pub fn values(&self) -> BTreeMap<String, Tensor> {
        let stand_in = self.shared.stand_in.lock();
        if let Some(values) = &*stand_in.unwrap_or_else(PoisonError::into_inner) {
            return values.clone();
        }
        let vars = self.vars().into_iter();
        vars.map(|(name, var)| (name, var.as_detached_tensor())).collect()
    }

    /// Runs `work`, in which `values` are saved instead of those of the parameters: of models that several ranks have only
    /// together, while one of them writes the whole.
    pub fn with_values<T>(&self, values: BTreeMap<String, Tensor>, work: impl FnOnce() -> T) -> T {
        let set = |values| {
            *self
                .shared
                .stand_in
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = values;
        };
        set(Some(values));
        let result = work();
        set(None);
        result
    }

    /// Replaces every parameter by the tensor of the same name in the file; files in fewer bits are widened. The
    /// model must have been built before, so that its names are known.
    ///
    /// # Errors
    /// The file is unreadable, or lacks tensors, has others, or has other shapes: then nothing is changed.
    pub fn load(&self, path: &Path) -> Result<(), ParamsError> {
        let tensors = few_bits::widen(path, file::read(path, &Device::Cpu)?.tensors)?;
        self.assign(path, &tensors)
    }

    /// Replaces every parameter by the tensor of the same name in `tensors`; `origin` names them in errors.
    ///
    /// # Errors
    /// As [`Params::load`].
    pub fn assign(&self, origin: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<(), ParamsError> {
        let vars = self.vars();
        check_same(origin, &vars, tensors)?;
        for (name, var) in &vars {
            // A copy, because a variable cannot be set from a tensor that shares its storage.
            var.set(
                &tensors[name]
                    .to_dtype(DType::F32)?
                    .to_device(&self.shared.device)?
                    .copy()?,
            )?;
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Var>> {
        // The map is whole after any panic: entries are inserted complete.
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_same<T: AsRef<Tensor>>(
    origin: &Path,
    vars: &BTreeMap<String, Var>,
    tensors: &BTreeMap<String, T>,
) -> Result<(), ParamsError> {
    let missing: Vec<_> = vars
        .keys()
        .filter(|name| !tensors.contains_key(*name))
        .cloned()
        .collect();
    let unexpected: Vec<_> = tensors
        .keys()
        .filter(|name| !vars.contains_key(*name))
        .cloned()
        .collect();
    let misshaped: Vec<_> = vars
        .iter()
        .filter_map(|(name, var)| {
            let found = tensors.get(name)?.as_ref().dims();
            (found != var.dims()).then(|| (name.clone(), found.to_vec(), var.dims().to_vec()))
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

/// Names of one kind that a list of differences holds.
const MOST_LISTED: usize = 64;

fn differences(
    missing: &[String],
    unexpected: &[String],
    misshaped: &[(String, Vec<usize>, Vec<usize>)],
) -> String {
    let shapes: Vec<String> = misshaped
        .iter()
        .map(|(name, found, expected)| format!("{name} (found {found:?}, expected {expected:?})"))
        .collect();
    let kinds = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", &shapes),
    ];
    let parts: Vec<String> = kinds
        .iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(kind, names)| {
            let more = names.len().saturating_sub(MOST_LISTED);
            let listed = names[..names.len() - more].join(", ");
            let rest = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            format!("{} {kind}: {listed}{rest}", names.len())
        })
        .collect();
    parts.join("; ")
}

/// Draws the initial value of `name`: on the host, from the seed and the name alone.
fn draw(seed: u64, name: &str, shape: &Shape, init: Init) -> Vec<f32> {
    let n = shape.elem_count();
    let stream = stream_of(name);
    let uniform = |low: f64, high: f64| {
        let draw = |noise: &mut Philox| noise.range(low as f32, high as f32);
        Philox::fill(seed, stream, n, draw)
    };
    let normal = |mean: f64, deviation: f64| {
        let draw = |noise: &mut Philox| (mean + deviation * f64::from(noise.normal())) as f32;
        Philox::fill(seed, stream, n, draw)
    };
    match init {
        Init::Const(value) => vec![value as f32; n],
        Init::Uniform { lo, up } => uniform(lo, up),
        Init::Randn { mean, stdev } => normal(mean, stdev),
        Init::Kaiming {
            dist,
            fan,
            non_linearity,
        } => {
            let deviation = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            match dist {
                // A uniform law of this half-width has this deviation.
                NormalOrUniform::Uniform => uniform(-3f64.sqrt() * deviation, 3f64.sqrt() * deviation),
                NormalOrUniform::Normal => normal(0.0, deviation),
            }
        }
    }
}

impl SimpleBackend for Params {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        if dtype != DType::F32 || !device.same_device(&self.shared.device) {
            candle_core::bail!(
                "parameter `{name}`: asked for as {dtype:?}, trainable parameters are f32 on one device"
            );
        }
        let mut vars = self.shared.lock();
        if let Some(var) = vars.get(name) {
            if var.shape() != &shape {
                candle_core::bail!(
                    "parameter `{name}`: exists with shape {:?}, asked for as {shape:?}",
                    var.shape()
                );
            }
            return Ok(var.as_tensor().clone());
        }
        let var = Var::from_vec(draw(self.shared.seed, name, &shape, init), shape, device)?;
        vars.insert(name.to_string(), var.clone());
        Ok(var.as_tensor().clone())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Device) -> candle_core::Result<Tensor> {
        match self.shared.lock().get(name) {
            Some(var) if dtype == DType::F32 => Ok(var.as_tensor().clone()),
            Some(_) => {
                candle_core::bail!("parameter `{name}`: asked for as {dtype:?}, trainable parameters are f32")
            }
            None => candle_core::bail!("parameter `{name}`: asked for without a shape before it exists"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.shared.lock().contains_key(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_nn::Module;

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn two_layers(params: &Params, reversed: bool) {
        let mut order = [("a", 4, 3), ("b", 3, 5)];
        if reversed {
            order.reverse();
        }
        for (name, from, to) in order {
            candle_nn::linear(from, to, params.builder().pp(name)).unwrap();
        }
    }

    #[test]
    fn values_depend_on_seed_and_name_only() {
        let (first, second, other) = (
            Params::random(1, &Device::Cpu),
            Params::random(1, &Device::Cpu),
            Params::random(2, &Device::Cpu),
        );
        two_layers(&first, false);
        two_layers(&second, true);
        two_layers(&other, false);
        let names: Vec<_> = first.vars().into_keys().collect();
        assert_eq!(names, ["a.bias", "a.weight", "b.bias", "b.weight"]);
        assert_eq!(first.count(), 4 * 3 + 3 + 3 * 5 + 5);
        for (name, var) in first.vars() {
            assert_eq!(values(&var), values(&second.vars()[&name]), "{name}");
            assert_ne!(values(&var), values(&other.vars()[&name]), "{name}");
        }
        assert_ne!(
            values(&first.vars()["a.weight"])[..5],
            values(&first.vars()["b.weight"])[..5]
        );
    }

    #[test]
    fn init_kinds_have_their_moments() {
        use candle_nn::init::{FanInOut, NonLinearity};
        let params = Params::random(3, &Device::Cpu);
        let vb = params.builder();
        let kaiming = |dist| Init::Kaiming {
            dist,
            fan: FanInOut::FanIn,
            non_linearity: NonLinearity::ReLU,
        };
        let cases = [
            ("const", Init::Const(0.5), 0.5, 0.0),
            (
                "randn",
                Init::Randn {
                    mean: 2.0,
                    stdev: 0.1,
                },
                2.0,
                0.1,
            ),
            (
                "uniform",
                Init::Uniform { lo: -1.0, up: 3.0 },
                1.0,
                4.0 / 12f64.sqrt(),
            ),
            (
                "kaiming_uniform",
                kaiming(NormalOrUniform::Uniform),
                0.0,
                (2.0 / 100f64).sqrt(),
            ),
            (
                "kaiming_normal",
                kaiming(NormalOrUniform::Normal),
                0.0,
                (2.0 / 100f64).sqrt(),
            ),
        ];
        for (name, init, mean, deviation) in cases {
            let x = values(&vb.get_with_hints((400, 100), name, init).unwrap());
            let n = x.len() as f64;
            let found = x.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let spread = (x.iter().map(|&x| (f64::from(x) - found).powi(2)).sum::<f64>() / n).sqrt();
            assert!(
                (found - mean).abs() < 0.02 * (1.0 + deviation),
                "{name}: mean {found}"
            );
            assert!(
                (spread - deviation).abs() < 0.02 * deviation + 1e-9,
                "{name}: deviation {spread}"
            );
        }
    }

    #[test]
    fn layers_train_through_the_store() {
        let params = Params::random(3, &Device::Cpu);
        let layer = candle_nn::linear(2, 1, params.builder()).unwrap();
        let x = Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap();
        let gradients = layer.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
        assert_eq!(
            values(gradients.get(&params.vars()["weight"]).unwrap()),
            [1.0, 1.0]
        );
        let weight = &params.vars()["weight"];
        weight
            .set(&Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap())
            .unwrap();
        assert_eq!(values(layer.weight()), [0.0, 0.0]);
        // The same name is the same tensor; another shape or type is refused.
        let again = params.builder().get((1, 2), "weight").unwrap();
        assert_eq!(again.id(), weight.as_tensor().id());
        assert!(
            params
                .builder()
                .get((2, 2), "weight")
                .unwrap_err()
                .to_string()
                .contains("exists with shape")
        );
        assert!(
            params
                .builder()
                .to_dtype(DType::BF16)
                .get((1, 2), "weight")
                .is_err()
        );
    }

    #[test]
    fn saves_and_loads_strictly() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let (saved, loaded) = (Params::random(1, &Device::Cpu), Params::random(2, &Device::Cpu));
        two_layers(&saved, false);
        two_layers(&loaded, false);
        let metadata = BTreeMap::from([("kind".to_string(), "toy".to_string())]);
        for (precision, tolerance) in [
            (Precision::F32, 0.0),
            (Precision::F16, 1.0 / 2048.0),
            (Precision::BF16, 1.0 / 256.0),
        ] {
            saved.save(&path, &metadata, precision).unwrap();
            assert_eq!(file::read(&path, &Device::Cpu).unwrap().metadata, metadata);
            loaded.load(&path).unwrap();
            for (name, var) in saved.vars() {
                for (x, y) in values(&var).iter().zip(values(&loaded.vars()[&name])) {
                    assert!(
                        (x - y).abs() <= tolerance * x.abs() + 1e-7 * f32::from(tolerance > 0.0),
                        "{name}"
                    );
                }
            }
        }
        let names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["w.safetensors"]);

        let other = Params::random(2, &Device::Cpu);
        candle_nn::linear(4, 2, other.builder().pp("a")).unwrap();
        candle_nn::linear(4, 2, other.builder().pp("c")).unwrap();
        let before = values(&other.vars()["a.weight"]);
        let message = other.load(&path).unwrap_err().to_string();
        for part in [
            "2 missing: c.bias, c.weight",
            "2 unexpected: b.bias, b.weight",
            "found [3, 4], expected [2, 4]",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(!message.contains('\n'));
        assert_eq!(before, values(&other.vars()["a.weight"]));
    }
}
