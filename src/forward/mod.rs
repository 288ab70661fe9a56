//! Models, and parts of them, on named tensors: what `fulgur forward` runs, to compare with any other implementation.
//!
//! A family of models is one file and one line in the table `FAMILIES`: a function that recognises a folder and describes the
//! parts of its model without reading weights. Inputs are checked against the description before anything is loaded.
//!
//! ```
//! # use std::collections::BTreeMap;
//! # use candle_core::{DType, Device, Tensor};
//! # use fulgur::lightnet::params::{Params, Precision};
//! # use fulgur::tavdiffusion::codec::{Vocoder, VocoderConfig};
//! use fulgur::forward::Model;
//! # let folder = tempfile::tempdir()?;
//! # let dir = folder.path();
//! # let config = VocoderConfig { bands: 64, stack: [16, 1] };
//! # let params = Params::random(1, &Device::Cpu);
//! # Vocoder::new(&config, &params.builder())?;
//! # std::fs::write(dir.join("config.json"), r#"{"bands": 64, "stack": [16, 1]}"#)?;
//! # params.save(&dir.join("model.safetensors"), &BTreeMap::new(), Precision::F16)?;
//! let model = Model::open(dir)?;
//! let mel = Tensor::zeros((1, 10, 64), DType::F32, &Device::Cpu)?;
//! let inputs = BTreeMap::from([("mel".to_owned(), mel)]);
//! let outputs = model.part(None)?.run("in.safetensors".as_ref(), &inputs, &Device::Cpu)?;
//! assert_eq!(outputs["waveform"].dims(), [1, 1600]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod avhscore;
mod bert;
mod blip;
mod classifier;
mod clip;
mod features;
mod folder;
mod generator;
mod imagebind;
mod lm;
pub mod operator;
mod port;
mod published;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use fulgur_lightnet::config::ConfigError;
use fulgur_lightnet::params::ParamsError;
use serde::Serialize;

pub use folder::Folder;
pub use port::{Content, Dim, Inputs, Port};

/// Any error of a network.
pub type NetworkError = Box<dyn std::error::Error + Send + Sync>;
/// Tensors by name that a network gives.
pub type Outputs = BTreeMap<String, Tensor>;
/// A loaded network: checked inputs in, outputs out.
pub type Network = Box<dyn Fn(&Inputs) -> Result<Outputs, NetworkError>>;

/// Recognises a folder of its family: `None` for any other one.
type Recognise = fn(&Folder) -> Result<Option<Model>, NetworkError>;

/// All families, with the words that list them.
const FAMILIES: [(&str, Recognise); 10] = [
    ("FulgurTwoStream (and each of its parts)", generator::recognise),
    ("fulgur-avhscore", avhscore::recognise),
    ("ImageBind", imagebind::recognise),
    ("clip, clip_text_model, clip_vision_model", clip::recognise),
    ("bert", bert::recognise),
    ("blip", blip::recognise),
    ("vision_classifier", classifier::recognise),
    ("i3d, vggish, panns, clap", features::recognise),
    (
        "UNet2DConditionModel, UNetMotionModel, AutoencoderKL, speecht5_hifigan, pipelines of diffusers, TavDiffusionUnet",
        published::recognise,
    ),
    (
        "llama, hgrn2, lightnet, transnormer, tnl, cosformer2, hgrn1",
        lm::recognise,
    ),
];

/// Why a model cannot be run on the given tensors.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// No folder of a model that is known.
    #[error("{}: found {found}, expected a model of one of these kinds: {known}", path.display())]
    Kind {
        /// The folder.
        path: PathBuf,
        /// What it says it is.
        found: String,
        /// The kinds that can be run.
        known: String,
    },
    /// The part was not named, or there is none of that name.
    #[error("{}: {found}, expected --part with one of: {known}", path.display())]
    Part {
        /// The folder.
        path: PathBuf,
        /// What was asked for.
        found: String,
        /// The parts of the model.
        known: String,
    },
    /// Tensors that are not those that the part takes.
    #[error("{}: {faults}", path.display())]
    Inputs {
        /// Where the tensors come from.
        path: PathBuf,
        /// Everything that is wrong.
        faults: String,
    },
    /// A short file of the model folder.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of tensors.
    #[error(transparent)]
    Weights(#[from] ParamsError),
    /// The network cannot be loaded or run.
    #[error(transparent)]
    Network(#[from] NetworkError),
}

/// A model folder that was recognised.
#[derive(Debug, Serialize)]
pub struct Model {
    /// The folder.
    pub path: PathBuf,
    /// What it is: its `model_type` or `_class_name`, or the name of its family.
    pub kind: String,
    /// What can be run of it.
    pub parts: Vec<Part>,
}

impl Model {
    /// Recognises the model in `dir` and describes its parts; no weights are read.
    ///
    /// # Errors
    /// No model folder, a model of no known family, a configuration that is damaged.
    pub fn open(dir: &Path) -> Result<Self, ForwardError> {
        let folder = Folder::open(dir)?;
        if let Some(model) = known(&folder)? {
            return Ok(model);
        }
        Err(ForwardError::Kind {
            path: dir.to_owned(),
            found: folder.words(),
            known: FAMILIES.map(|(name, _)| name).join(", "),
        })
    }

    /// The part of this name; a model of one part needs none.
    ///
    /// # Errors
    /// There is no such part, or no name and several parts.
    pub fn part(&self, name: Option<&str>) -> Result<&Part, ForwardError> {
        let found = match (name, self.parts.as_slice()) {
            (None, [only]) => return Ok(only),
            (None, parts) => format!("found {} parts", parts.len()),
            (Some(name), parts) => match parts.iter().find(|part| part.name == name) {
                Some(part) => return Ok(part),
                None => format!("found no part {name}"),
            },
        };
        let known: Vec<&str> = self.parts.iter().map(|part| part.name.as_str()).collect();
        Err(ForwardError::Part {
            path: self.path.clone(),
            found,
            known: known.join(", "),
        })
    }
}

/// Something that runs on named tensors.
#[derive(Serialize)]
pub struct Part {
    /// Name within the model.
    pub name: String,
    /// What it takes.
    pub inputs: Vec<Port>,
    /// What it gives.
    pub outputs: Vec<Port>,
    #[serde(skip)]
    load: Load,
}

type Load = Box<dyn Fn(&Device) -> Result<Network, NetworkError>>;

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Part({}: {:?} -> {:?})", self.name, self.inputs, self.outputs)
    }
}

impl Part {
    fn new(
        name: impl Into<String>,
        inputs: impl Into<Vec<Port>>,
        outputs: impl Into<Vec<Port>>,
        load: impl Fn(&Device) -> Result<Network, NetworkError> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            inputs: inputs.into(),
            outputs: outputs.into(),
            load: Box::new(load),
        }
    }

    /// Loads the network onto `device` once, to see that it is whole.
    ///
    /// # Errors
    /// Weights that cannot be loaded.
    pub fn check(&self, device: &Device) -> Result<(), ForwardError> {
        drop((self.load)(device)?);
        Ok(())
    }

    /// Checks `tensors`, loads the network onto `device` and runs it; `origin` names the tensors in errors.
    ///
    /// # Errors
    /// Inputs that are missing, unknown, of another shape or type; weights that cannot be loaded; arithmetic that fails.
    pub fn run(
        &self,
        origin: &Path,
        tensors: &BTreeMap<String, Tensor>,
        device: &Device,
    ) -> Result<Outputs, ForwardError> {
        let inputs = Inputs::check(&self.inputs, tensors, device)
            .map_err(NetworkError::from)?
            .map_err(|faults| ForwardError::Inputs {
                path: origin.to_owned(),
                faults,
            })?;
        let network = (self.load)(device)?;
        Ok(network(&inputs)?)
    }
}

/// The model of the first family that knows the folder.
fn known(folder: &Folder) -> Result<Option<Model>, NetworkError> {
    for (_, recognise) in FAMILIES {
        if let Some(model) = recognise(folder)? {
            return Ok(Some(model));
        }
    }
    Ok(None)
}

/// Names beside their tensors, as outputs.
fn named<const N: usize>(tensors: [(&str, Tensor); N]) -> Outputs {
    tensors
        .into_iter()
        .map(|(name, tensor)| (name.to_owned(), tensor))
        .collect()
}
