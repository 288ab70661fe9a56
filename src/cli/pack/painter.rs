//! Generators of pictures: the denoiser, and the parts that lie in folders of their own within its folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use candle_core::Device;
use fulgur_lightnet::params::Precision;
use fulgur_lightnet::params::pack::PackedFolder;
use fulgur_lightnet::vision::DitConfig;

use crate::paint::{CODEC, Model, TEXT_ENCODER};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";

/// Whether `dir` holds a generator of pictures.
pub(super) fn is_picture_generator(dir: &Path) -> bool {
    DitConfig::read(&dir.join(CONFIG)).is_ok()
}

/// A generator of pictures in memory.
pub(super) struct PackedPainter {
    denoiser: PackedFolder,
    parts: Vec<(&'static str, PackedFolder)>,
    /// The encoder that it was trained with, and where it will look for it instead of within its folder.
    elsewhere: Option<(PathBuf, PathBuf)>,
}

impl PackedPainter {
    /// Packs the model in `dir`. `text`, as seen from the folder that is written, is where it will look for its text encoder,
    /// which has to be the one that it has; without it a copy is packed as well.
    pub(super) fn new(dir: &Path, precision: Precision, text: Option<&Path>) -> anyhow::Result<Self> {
        // A damaged model is found before anything is made of it.
        Model::load(dir, &Device::Cpu)?;
        let mut config = DitConfig::read(&dir.join(CONFIG))?;
        let own = dir.join(config.text_encoder.as_deref().unwrap_or(TEXT_ENCODER));
        let (mut parts, mut elsewhere) = (Vec::new(), None);
        match (config.text_dim, text) {
            (None, Some(text)) => {
                bail!(
                    "--text: found {}, expected none: the model reads no texts",
                    text.display()
                )
            }
            (Some(_), Some(text)) => {
                elsewhere = Some((own, text.to_owned()));
                config.text_encoder = Some(text.to_string_lossy().into_owned());
            }
            (Some(_), None) => {
                config.text_encoder = None;
                parts.push((TEXT_ENCODER, PackedFolder::new(&own, precision, |_| true)?));
            }
            (None, None) => {}
        }
        if config.codec_factor.is_some() {
            parts.push((CODEC, PackedFolder::new(&dir.join(CODEC), precision, |_| true)?));
        }
        let mut denoiser = PackedFolder::new(dir, precision, |_| true)?;
        let mut written = serde_json::to_vec_pretty(&config)?;
        written.push(b'\n');
        for (name, bytes) in &mut denoiser.files {
            if *name == CONFIG {
                bytes.clone_from(&written);
            }
        }
        Ok(Self {
            denoiser,
            parts,
            elsewhere,
        })
    }

    pub(super) fn parts(&self) -> Vec<(&'static str, &PackedFolder)> {
        let own = [("denoiser", &self.denoiser)];
        let parts = self.parts.iter().map(|(name, folder)| (*name, folder));
        own.into_iter().chain(parts).collect()
    }

    /// Writes the model into an empty folder, and loads it once if all of it is there.
    pub(super) fn write(&self, dir: &Path) -> anyhow::Result<()> {
        if let Some((own, text)) = &self.elsewhere {
            check_same(own, &dir.join(text))?;
        }
        self.denoiser.write(dir)?;
        for (name, folder) in &self.parts {
            let below = dir.join(name);
            fs::create_dir(&below).with_context(|| format!("{}: cannot write", below.display()))?;
            folder.write(&below)?;
        }
        Model::load(dir, &Device::Cpu).map(|_| ())
    }
}

/// The encoder that the model was trained with is the one that it will find.
fn check_same(own: &Path, named: &Path) -> anyhow::Result<()> {
    let read = |dir: &Path| {
        let path = dir.join(WEIGHTS);
        fs::read(&path).with_context(|| format!("{}: cannot read", path.display()))
    };
    if read(own)? != read(named)? {
        bail!(
            "{}: found other weights, expected those of {}, with which the model was trained",
            named.display(),
            own.display()
        );
    }
    Ok(())
}
