//! `fulgur convert`: a checkpoint of PyTorch becomes safetensors.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use fulgur_lightnet::encoders::imagebind;
use fulgur_lightnet::params::folder::Weights;
use fulgur_lightnet::params::{Precision, file};
use serde::Serialize;

use super::answer::{Answer, Report};

/// Names of what is written.
const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.json";

/// Convert a checkpoint of PyTorch to safetensors
///
/// Nothing in the checkpoint is run: it may hold tensors, and the dictionaries around them; objects of libraries that write training
/// checkpoints are passed over, and anything else is refused by name. Of a training checkpoint the weights are taken (state_dict, model, ..). Names stay, but what stands before those of ImageBind is left out. A
/// folder is converted with its config.json, shards become one file.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur convert imagebind_huge.pth -o imagebind\n  fulgur convert --precision f16 clip/pytorch_model.bin -o \
                  clip-f16\n  fulgur convert --prefix module. tavg_checkpoint.ckpt -o tavdiffusion/unet"
)]
pub(super) struct Arguments {
    /// A .pth, .pt, .ckpt, .bin or .safetensors file, or the folder of a model
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The folder to write; it is made if need be
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How numbers are stored
    #[arg(long, value_enum, default_value_t = Stored::AsIs)]
    precision: Stored,
    /// Leave out what stands before all names, such as `module.`
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<String>,
    /// Replace an older model.safetensors in the folder
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stored {
    /// As they are in the checkpoint
    AsIs,
    /// 16 bits
    F16,
    /// 16 bits with the range of 32
    Bf16,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        file: from, output, ..
    } = arguments;
    if fs::symlink_metadata(from).is_err() {
        bail!("{}: there is no such file or folder", from.display());
    }
    let target = output.join(WEIGHTS);
    if target.exists() && !arguments.force {
        bail!("{}: exists already; --force replaces it", target.display());
    }
    let Some(mut weights) = Weights::find(from)? else {
        bail!(
            "{}: found no weights, expected a .safetensors, .bin, .pth or .ckpt",
            from.display()
        );
    };
    let names = weights.shapes()?;
    let prefix = match &arguments.prefix {
        Some(prefix) => match names.keys().find(|name| !name.starts_with(prefix.as_str())) {
            Some(name) => bail!(
                "{}: found tensor `{name}`, expected all names to begin with {prefix}",
                weights.origin.display()
            ),
            None => prefix.clone(),
        },
        None => imagebind::prefix(names.keys().map(String::as_str))
            .unwrap_or_default()
            .to_owned(),
    };
    weights.below(&prefix);
    let loaded = weights.load(&Device::Cpu)?;
    let tensors: &BTreeMap<String, Tensor> = loaded.tensors();
    let precision = match arguments.precision {
        Stored::AsIs => Precision::F32,
        Stored::F16 => Precision::F16,
        Stored::Bf16 => Precision::BF16,
    };
    let failed = |path: &Path| format!("{}: cannot write", path.display());
    fs::create_dir_all(output).with_context(|| failed(output))?;
    // Readers of other libraries ask for this note.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    file::write(&target, tensors, &metadata, precision)?;
    let mut paths = vec![target];
    let config = from.join(CONFIG);
    if config.is_file() {
        let copy = output.join(CONFIG);
        let bytes = fs::read(&config).map_err(|e| anyhow!("{}: {e}", config.display()))?;
        if fs::canonicalize(&config).ok() != fs::canonicalize(&copy).ok() {
            file::write_atomically(&copy, |out| std::io::Write::write_all(out, &bytes))?;
        }
        paths.push(copy);
    }
    let bytes = fs::metadata(&paths[0])?.len();
    Answer::new(&Converted {
        paths,
        tensors: tensors.len(),
        values: tensors.values().map(|tensor| tensor.elem_count() as u64).sum(),
        bytes,
        prefix,
    })
}

#[derive(Serialize)]
struct Converted {
    paths: Vec<PathBuf>,
    tensors: usize,
    values: u64,
    bytes: u64,
    prefix: String,
}

impl Report for Converted {}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tensors, {} values, {} bytes",
            self.tensors, self.values, self.bytes
        )?;
        if !self.prefix.is_empty() {
            write!(f, "; left out the prefix {}", self.prefix)?;
        }
        for path in &self.paths {
            write!(f, "\nwritten to {}", path.display())?;
        }
        Ok(())
    }
}
