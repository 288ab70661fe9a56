//! What `fulgur pack` and `fulgur lm pack` share: how weights are stored, and which folders may be written.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;
use fulgur_datasets::atomic::AtomicFolder;
use fulgur_lightnet::params::Precision;
use fulgur_tavdiffusion::pipeline::{FILE_NAME, Part};
use serde::Serialize;

use crate::paint::{CODEC, TEXT_ENCODER};

/// The card of a model, which may be there before the model.
pub(super) const CARD: &str = "README.md";
/// Files of a network's folder.
const FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
/// Files of a language model's folder.
pub(super) const LANGUAGE_FILES: [&str; 4] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "generation_config.json",
];

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
pub(super) enum Stored {
    /// Matrices in 8 bits with a scale for every 64 weights
    #[value(name = "8bit")]
    #[serde(rename = "8bit")]
    EightBit,
    /// Matrices in 6 bits with a scale for every 64 weights: about four times the error of 8 bits
    #[value(name = "6bit")]
    #[serde(rename = "6bit")]
    SixBit,
    /// 16 bits
    #[serde(rename = "f16")]
    F16,
    /// As they were trained
    #[serde(rename = "f32")]
    F32,
}

impl From<Stored> for Precision {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::EightBit => Self::EightBit,
            Stored::SixBit => Self::SixBit,
            Stored::F16 => Self::F16,
            Stored::F32 => Self::F32,
        }
    }
}

/// What is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    Generator,
    Network,
    PictureGenerator,
    LanguageModel,
}

impl Kind {
    fn words(self) -> &'static str {
        match self {
            Self::Generator => "generator",
            Self::Network => "network",
            Self::PictureGenerator => "generator of pictures",
            Self::LanguageModel => "language model",
        }
    }

    /// Files that are written into its folder, or into those of a generator's parts.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Generator | Self::Network | Self::PictureGenerator => &FILES,
            Self::LanguageModel => &LANGUAGE_FILES,
        }
    }

    /// Folders of parts within its own.
    fn parts(self) -> Vec<&'static str> {
        match self {
            Self::Generator => Part::ALL.map(Part::folder).to_vec(),
            Self::PictureGenerator => vec![TEXT_ENCODER, CODEC],
            Self::Network | Self::LanguageModel => Vec::new(),
        }
    }

    /// Whether a folder holds an older model of this kind.
    fn is(self, dir: &Path) -> bool {
        let has = |name: &str| dir.join(name).is_file();
        match self {
            Self::Generator => has(FILE_NAME),
            Self::Network | Self::PictureGenerator | Self::LanguageModel => {
                has(FILES[0]) && has(FILES[1]) && !has(FILE_NAME)
            }
        }
    }
}

/// The folder with the model: that of a run is called `model`.
pub(super) fn model_folder(dir: &Path) -> PathBuf {
    let below = dir.join("model");
    if !dir.join(FILES[0]).is_file() && below.join(FILES[0]).is_file() {
        below
    } else {
        dir.to_owned()
    }
}

/// Checks that the folder may be written, and lists the files of an older one that stay.
pub(super) fn check_target(dir: &Path, kind: Kind, force: bool) -> anyhow::Result<Vec<PathBuf>> {
    let refuse = |path: &Path, words: String| anyhow::anyhow!("{}: {words}", path.display());
    let Ok(found) = fs::symlink_metadata(dir) else {
        return Ok(Vec::new());
    };
    if !found.is_dir() {
        return Err(refuse(dir, "exists and is not a folder".into()));
    }
    let entries = list(dir)?;
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    if let [(path, name, true)] = entries.as_slice()
        && name == CARD
    {
        return Ok(vec![path.clone()]);
    }
    let words = kind.words();
    if !kind.is(dir) {
        let problem =
            format!("found a folder that holds no {words}, expected a new name or an older {words}");
        return Err(refuse(dir, problem));
    }
    if !force {
        return Err(refuse(
            dir,
            format!("holds a {words} already; --force replaces it"),
        ));
    }
    let parts = kind.parts();
    let foreign = |path: &Path| {
        refuse(
            path,
            format!("found in the {words} to replace, where pack does not write it; move it away"),
        )
    };
    let mut kept = Vec::new();
    for (path, name, is_file) in entries {
        if parts.contains(&name.as_str()) {
            for (path, name, is_file) in list(&path)? {
                if !is_file || !kind.files().contains(&name.as_str()) {
                    return Err(foreign(&path));
                }
            }
        } else if !is_file {
            return Err(foreign(&path));
        } else if (kind == Kind::Generator && name != FILE_NAME)
            || (kind != Kind::Generator && !kind.files().contains(&name.as_str()))
        {
            kept.push(path);
        }
    }
    Ok(kept)
}

/// Paths in a folder, with their names and whether they are plain files, sorted.
fn list(dir: &Path) -> anyhow::Result<Vec<(PathBuf, String, bool)>> {
    let read = || -> std::io::Result<Vec<_>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            entries.push((entry.path(), name, entry.file_type()?.is_file()));
        }
        entries.sort();
        Ok(entries)
    };
    read().with_context(|| format!("{}: cannot read", dir.display()))
}

/// Writes a folder under a temporary name by `fill`, with the files that stay, and gives it its own.
pub(super) fn write_folder<T>(
    output: &Path,
    kept: &[PathBuf],
    fill: impl FnOnce(&Path) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let failed = || format!("{}: cannot write", output.display());
    if let Some(parent) = output.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    let folder = AtomicFolder::create(output).with_context(failed)?;
    let dir = folder.temporary_path();
    let filled = fill(dir)?;
    for path in kept {
        let name = path.file_name().unwrap_or_default();
        fs::copy(path, dir.join(name)).with_context(|| format!("{}: cannot copy", path.display()))?;
    }
    folder.commit().with_context(failed)?;
    Ok(filled)
}
