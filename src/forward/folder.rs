//! What a model folder says about itself: the `model_type` or `_class_name` of its JSON files, and its tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fulgur_lightnet::config::{self, ConfigError};
use fulgur_lightnet::params::folder::Weights;
use fulgur_tavdiffusion::pipeline::FILE_NAME as INDEX;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ForwardError;

const CONFIG: &str = "config.json";

/// A folder with a model, before its family is known.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    class: Option<String>,
    shapes: BTreeMap<String, Vec<usize>>,
}

/// The keys by which the model folders of the field say what they are.
#[derive(Default, Deserialize)]
struct Marks {
    model_type: Option<String>,
    #[serde(rename = "_class_name")]
    class_name: Option<String>,
}

impl Folder {
    /// Reads the marks of `dir` and the header of its weights. A published checkpoint may lie without a configuration, and its file may
    /// be named instead of a folder.
    ///
    /// # Errors
    /// No model folder, or files that are damaged.
    pub fn open(dir: &Path) -> Result<Self, ForwardError> {
        let (index, config) = (dir.join(INDEX), dir.join(CONFIG));
        let weights = Weights::find(dir)?;
        let marks: Marks = if index.is_file() {
            config::read(&index)?
        } else if weights.is_none() || config.is_file() {
            config::read(&config)?
        } else {
            // Checkpoints of networks of one size have no configuration: their tensors say what they are.
            Marks::default()
        };
        let shapes = match weights {
            Some(weights) => weights.shapes()?,
            None => BTreeMap::new(),
        };
        Ok(Self {
            path: dir.to_owned(),
            class: marks.model_type.or(marks.class_name),
            shapes,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `model_type`, else `_class_name`, where there is one.
    pub fn class(&self) -> Option<&str> {
        self.class.as_deref()
    }

    /// Whether the weights have tensors below `prefix`.
    pub fn has_below(&self, prefix: &str) -> bool {
        self.shapes.keys().any(|name| name.starts_with(prefix))
    }

    /// Names of all tensors of the weights.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// Shape of a tensor of the weights.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    /// Shapes of all tensors of the weights.
    pub fn shapes(&self) -> &BTreeMap<String, Vec<usize>> {
        &self.shapes
    }

    /// `config.json` as the family understands it.
    ///
    /// # Errors
    /// The file does not describe a `C`.
    pub fn config<C: DeserializeOwned>(&self) -> Result<C, ConfigError> {
        config::read(&self.path.join(CONFIG))
    }

    /// What the folder says it is, for errors.
    pub(super) fn words(&self) -> String {
        match &self.class {
            Some(class) => format!("model_type or _class_name {class:?}"),
            None => format!(
                "neither model_type nor _class_name, and {} tensors",
                self.shapes.len()
            ),
        }
    }
}
