//! Networks that are trained in part: what is trained are parameters, what is not are weights of a folder that stay as they are.
//!
//! Parameters begin as the weights of the folder, too, as far as it has them; others, such as an attention that it lacks, begin anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor, bail};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use fulgur_lightnet::config as files;
use fulgur_lightnet::params::Params;
use fulgur_lightnet::params::folder::{self, LoadError, Weights};
use serde_json::{Value, json};

use super::super::names::{below, translated};
use super::super::pipeline::{Piece, Places};
use super::super::unet::Unet;
use super::config::{AUDIO, FUSIONS};
use super::{CLASS_NAME, InFile, TABLES, TavConfig, TavPart, TavUnet};
use crate::error::Error;

/// Weights by the names of [`TavUnet`], or by those that follow a prefix of them.
struct Source {
    prefix: &'static str,
    builder: VarBuilder<'static>,
}

impl Source {
    /// The name of a tensor in it, where it may have one.
    fn name<'a>(&self, name: &'a str) -> Option<&'a str> {
        match self.prefix {
            "" => Some(name),
            prefix => below(name, prefix),
        }
    }
}

/// Where networks begin whose training goes on from a folder: their weights, on the host, and what the folder says of them.
pub struct TavStart {
    config: Value,
    sources: Vec<Source>,
}

impl std::fmt::Debug for TavStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TavStart({} sources)", self.sources.len())
    }
}

impl TavStart {
    /// Reads the networks of a generator: both in one folder, or a `UNet2DConditionModel` with a `MotionAdapter` and another
    /// `UNet2DConditionModel` over spectrograms.
    ///
    /// # Errors
    /// A network that is missing, of another class, or without a configuration; tensors that are missing, unexpected or of another shape:
    /// all are listed.
    pub fn read(places: &Places) -> std::result::Result<Self, Error> {
        let unet = places.require(Piece::Unet, "pictures")?;
        if TavUnet::is_in(unet)? {
            let file = InFile::find(unet)?;
            let build =
                |vb: &VarBuilder| TavUnet::new(&file.config, &translated(vb, file.translation.clone()));
            folder::check_part(&file.weights, |_| true, |name| file.is_ignored(name), build)?;
            let frozen = file.weights.load(&Device::Cpu).map_err(LoadError::from)?;
            let builder = translated(&frozen.builder(), file.translation.clone());
            return Ok(Self {
                config: Self::config_in(places)?,
                sources: vec![Source { prefix: "", builder }],
            });
        }
        let motion = places.require(Piece::MotionAdapter, "motion")?;
        let audio = places.require(Piece::AudioUnet, "sounds")?;
        let [still, moved] = Unet::builders_with_motion(unet, motion)?;
        let heard = Unet::builder_in(audio)?;
        let source = |prefix, builder| Source { prefix, builder };
        // Modules first: the network over pictures has none of them.
        let mut sources = vec![source("", moved), source(AUDIO, heard), source("", still)];
        if let Some(weights) = fusion_in(places)? {
            let frozen = weights.load(&Device::Cpu).map_err(LoadError::from)?;
            sources.push(source("", frozen.builder()));
        }
        Ok(Self {
            config: Self::config_in(places)?,
            sources,
        })
    }

    /// What a folder says of its networks, as one `config.json` of both; no weight is read.
    ///
    /// # Errors
    /// A network that is missing, of another class, or without a configuration.
    pub fn config_in(places: &Places) -> std::result::Result<Value, Error> {
        let unet = places.require(Piece::Unet, "pictures")?;
        if TavUnet::is_in(unet)? {
            let path = unet.join("config.json");
            return match path.is_file() {
                true => Ok(files::read(&path)?),
                false => authors(unet),
            };
        }
        let motion = places.require(Piece::MotionAdapter, "motion")?;
        let audio = places.require(Piece::AudioUnet, "sounds")?;
        let fuse = match fusion_in(places)? {
            None => "apart",
            Some(weights) => {
                let shapes = weights.shapes().map_err(LoadError::from)?;
                match FUSIONS.map(|name| shapes.keys().any(|key| below(key, name).is_some())) {
                    [true, true] => "both",
                    [true, false] => "v_from_a",
                    [false, true] => "a_from_v",
                    [false, false] => "apart",
                }
            }
        };
        Ok(json!({
            "_class_name": CLASS_NAME,
            "video": described(unet, "UNet2DConditionModel")?,
            "motion": described(motion, "MotionAdapter")?,
            "audio": described(audio, "UNet2DConditionModel")?,
            "fuse": fuse,
        }))
    }

    /// What the folder says of its networks, as their `config.json` has it.
    #[must_use]
    pub fn config(&self) -> &Value {
        &self.config
    }

    fn find(&self, name: &str) -> Option<(&Source, String)> {
        self.sources.iter().find_map(|source| {
            let own = source.name(name)?;
            source
                .builder
                .contains_tensor(own)
                .then(|| (source, own.to_owned()))
        })
    }

    fn get(&self, shape: &Shape, name: &str, init: Init, dtype: DType) -> Option<Result<Tensor>> {
        let (source, own) = self.find(name)?;
        Some(
            source
                .builder
                .get_with_hints_dtype(shape.clone(), &own, init, dtype),
        )
    }
}

/// Attentions between networks that lie apart, where the folder has them.
fn fusion_in(places: &Places) -> std::result::Result<Option<Weights>, Error> {
    let Some(dir) = places.find(Piece::Fusion) else {
        return Ok(None);
    };
    match Weights::find(dir).map_err(LoadError::from)? {
        Some(weights) => Ok(Some(weights)),
        None => Err(LoadError::Absent { path: dir.to_owned() }.into()),
    }
}

/// What the authors' checkpoint is, which has no configuration.
fn authors(unet: &std::path::Path) -> std::result::Result<Value, Error> {
    const READS: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight";
    let shapes = super::shapes_in(unet)?;
    let reads = shapes
        .iter()
        .find(|(name, _)| name.ends_with(&format!("{AUDIO}.{READS}")));
    let width = reads.and_then(|(_, shape)| shape.get(1)).copied();
    let mut config = super::super::pipeline::published_config("unet")?;
    if let Some(width) = width {
        config["audio"]["cross_attention_dim"] = json!(width);
    }
    Ok(config)
}

/// The configuration in `dir`, of this class.
fn described(dir: &std::path::Path, class: &str) -> std::result::Result<Value, Error> {
    let path = dir.join("config.json");
    let config: Value = files::read(&path)?;
    match config["_class_name"].as_str() {
        Some(found) if found == class => Ok(config),
        found => Err(Error::model(
            &path,
            format!(
                "_class_name: found {}, expected {class} of a network that is trained",
                found.unwrap_or("none")
            ),
        )),
    }
}

/// Gives out parameters of the parts that are trained, and weights of the folder of the others.
struct Mixed {
    params: Params,
    start: Option<Arc<TavStart>>,
    trained: BTreeSet<TavPart>,
    kept: Arc<Mutex<BTreeMap<String, Shape>>>,
}

impl SimpleBackend for Mixed {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let stored = |dtype| self.start.as_ref()?.get(&shape, name, init, dtype);
        if !self.trained.contains(&TavPart::of(name)) {
            let Some(tensor) = stored(dtype) else {
                let part = TavPart::of(name).word();
                bail!(
                    "{name}: is not in the folder, expected it there, or {part:?} among the parts that are trained"
                )
            };
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.insert(name.to_owned(), shape.clone());
            return tensor?.to_device(device);
        }
        let own = self.params.builder();
        let is_new = !own.contains_tensor(name);
        let tensor = own.get_with_hints_dtype(shape.clone(), name, init, DType::F32)?;
        if is_new
            && let Some(start) = stored(DType::F32)
            && let Some(var) = self.params.vars().get(name)
        {
            var.set(&start?.to_device(device)?.copy()?)?;
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("{name}: asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        // Tables follow from their size.
        let is_table = TABLES.iter().any(|table| name.ends_with(table));
        !is_table
            && self
                .start
                .as_ref()
                .is_some_and(|start| start.find(name).is_some())
    }
}

/// Networks of which some parts are trained.
pub struct TrainedTav {
    /// The networks.
    pub networks: TavUnet,
    start: Option<Arc<TavStart>>,
    kept: BTreeMap<String, Shape>,
}

impl std::fmt::Debug for TrainedTav {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TrainedTav({} tensors are not trained)", self.kept.len())
    }
}

impl TrainedTav {
    /// Builds the networks of `config`, whose parts `trained` become parameters in `params`; the others are taken from `start` in
    /// `compute`.
    ///
    /// # Errors
    /// Networks that cannot be; a part that is not trained and not in `start`, or has another shape there.
    pub fn new(
        config: &TavConfig,
        trained: &BTreeSet<TavPart>,
        start: Option<TavStart>,
        params: &Params,
        compute: DType,
    ) -> Result<Self> {
        config.check()?;
        let start = start.map(Arc::new);
        let kept = Arc::new(Mutex::new(BTreeMap::new()));
        let mixed = Mixed {
            params: params.clone(),
            start: start.clone(),
            trained: trained.clone(),
            kept: Arc::clone(&kept),
        };
        let vb = VarBuilder::from_backend(Box::new(mixed), compute, params.device().clone());
        let networks = TavUnet::new(config, &vb)?;
        let kept = std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Self {
            networks,
            start,
            kept,
        })
    }

    /// All tensors by name, f32 on the host: the parameters in `params` and what is not trained, as the folder has it.
    ///
    /// # Errors
    /// A failing operation.
    pub fn tensors(&self, params: &Params) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = BTreeMap::new();
        for (name, var) in params.vars() {
            tensors.insert(name, var.as_detached_tensor());
        }
        for (name, shape) in &self.kept {
            let stored = self
                .start
                .as_ref()
                .and_then(|start| start.get(shape, name, Init::Const(0.0), DType::F32));
            let Some(tensor) = stored else {
                bail!("{name}: is not in the folder any more")
            };
            tensors.insert(name.clone(), tensor?);
        }
        Ok(tensors)
    }
}
