//! `fulgur init`: a folder with a model of random weights.

mod published;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow, bail};
use candle_core::{DType, Device};
use clap::ValueEnum;
use fulgur_lightnet::config;
use fulgur_lightnet::encoders::imagebind::{Config, Modality, Tower};
use fulgur_lightnet::params::{Params, Precision, file};
use serde::Serialize;

use super::answer::{Answer, Report};

const WEIGHTS: &str = "model.safetensors";
const CONFIG: &str = "config.json";

/// Make a model folder with random weights, for measures and tests
///
/// The configuration is that of ImageBind: vision_embed_dim, vision_num_blocks, vision_num_heads, the same of audio and text, and
/// out_embed_dim; a tower without a width is left out, what is not named is as in the published model. Or it is that of a generator, with
/// `"_class_name": "TavDiffusionPipeline"`: text_encoder, unet, vae, audio_vae, vocoder and scheduler, each with what its own config.json
/// would say, or null; what is not named is as published. Weights depend on the seed and their names alone. What such a model says, or
/// makes, means nothing.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  fulgur init huge.json --random 1 -o imagebind-random\n  fulgur init examples/tavdiffusion-tiny.json \
                  --random 1 -o tiny"
)]
pub(super) struct Arguments {
    /// The configuration, as JSON
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Seed of the weights
    #[arg(long, value_name = "SEED")]
    random: u64,
    /// The folder to write; it is made if need be, and holds no model yet
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// How weights are stored
    #[arg(long, value_enum, default_value_t = Stored::F32)]
    precision: Stored,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stored {
    /// 32 bits
    F32,
    /// 16 bits
    F16,
    /// 16 bits with the range of 32
    Bf16,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<Answer> {
    let Arguments {
        config: from, output, ..
    } = arguments;
    let text = file::read_bounded(from, 1 << 20)?;
    if let Some(config) = published::config(&text) {
        return published::run(arguments, &config);
    }
    let config: Config = config::read(from)?;
    let (weights, copy) = (output.join(WEIGHTS), output.join(CONFIG));
    if weights.exists() || (copy.exists() && fs::canonicalize(&copy).ok() != fs::canonicalize(from).ok()) {
        bail!(
            "{}: holds a model already, expected a new folder",
            output.display()
        );
    }
    let params = Params::random(arguments.random, &Device::Cpu);
    for modality in Modality::ALL {
        if let Some(sizes) = config.fresh(modality, from)? {
            Tower::new(modality, &sizes, DType::F32, &params.builder())?;
        }
    }
    if params.count() == 0 {
        bail!(
            "{}: found no vision_embed_dim, audio_embed_dim or text_embed_dim, expected the sizes of an ImageBind",
            from.display()
        );
    }
    fs::create_dir_all(output).with_context(|| format!("{}: cannot write", output.display()))?;
    params.save(&weights, &note(arguments), arguments.precision.of_files())?;
    file::write_atomically(&copy, |out| std::io::Write::write_all(out, &text))?;
    let bytes = fs::metadata(&weights)
        .map_err(|e| anyhow!("{}: {e}", weights.display()))?
        .len();
    Answer::new(&Made {
        paths: vec![weights, copy],
        tensors: params.vars().len(),
        parameters: params.count(),
        bytes,
    })
}

/// What the files say of themselves.
fn note(arguments: &Arguments) -> BTreeMap<String, String> {
    let words = format!("random weights of seed {}", arguments.random);
    BTreeMap::from([("untrained".to_owned(), words)])
}

impl Stored {
    fn of_files(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::F16 => Precision::F16,
            Self::Bf16 => Precision::BF16,
        }
    }
}

#[derive(Serialize)]
struct Made {
    paths: Vec<PathBuf>,
    tensors: usize,
    parameters: usize,
    bytes: u64,
}

impl Report for Made {}

impl fmt::Display for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tensors, {} parameters, {} bytes of random weights",
            self.tensors, self.parameters, self.bytes
        )?;
        for path in &self.paths {
            write!(f, "\nwritten to {}", path.display())?;
        }
        Ok(())
    }
}
