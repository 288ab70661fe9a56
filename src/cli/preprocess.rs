//! `fulgur preprocess`: what a published model is fed with, made of a file.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use candle_core::Tensor;
use clap::ValueEnum;
use fulgur_benchmark::features::audioldm;
use fulgur_datasets::media::read_sound;
use serde::Serialize;

use super::answer::{Answer, Report};
use super::context::Context;
use super::files::check_output;
use crate::tensors;

/// Name of the tensor in the file.
const NAME: &str = "features";

/// Make the input of a published model from a picture or a sound
///
/// Writes `features` (f32), as the model's own preprocessing makes it: to compare with it, or to run a model through fulgur forward.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  fulgur preprocess audioldm-mel bell.wav --out mel.safetensors")]
pub(super) struct Arguments {
    /// Which preprocessing
    #[arg(value_name = "KIND")]
    kind: Kind,
    /// The picture or sound
    file: PathBuf,
    /// Where to write the tensor
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
}

/// A preprocessing.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    /// Log-mel spectrogram [frames, 64] of AudioLDM at 16 kHz, without its gain normalisation
    AudioldmMel,
}

impl Kind {
    fn run(self, file: &Path) -> anyhow::Result<Tensor> {
        match self {
            Self::AudioldmMel => audioldm_mel(file),
        }
    }
}

pub(super) fn run(_: &Context, arguments: &Arguments) -> anyhow::Result<Answer> {
    check_output(&arguments.out)?;
    let features = arguments.kind.run(&arguments.file)?;
    let shape = features.dims().to_vec();
    tensors::write_f32(&arguments.out, &BTreeMap::from([(NAME.to_owned(), features)]))?;
    Answer::new(&Written {
        path: arguments.out.clone(),
        features: shape,
    })
}

fn audioldm_mel(file: &Path) -> anyhow::Result<Tensor> {
    let sound = read_sound(file, Some(audioldm::RATE))?.mono();
    audioldm::log_mel(&sound.samples).map_err(|error| anyhow!("{}: {error}", file.display()))
}

#[derive(Serialize)]
struct Written {
    path: PathBuf,
    /// Its shape.
    features: Vec<usize>,
}

impl Report for Written {}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "features {:?} written to {}",
            self.features,
            self.path.display()
        )
    }
}
