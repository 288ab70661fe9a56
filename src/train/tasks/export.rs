//! What the tasks share when they write a model.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;
use fulgur_datasets::atomic::write_atomic;
use fulgur_lightnet::params::{Params, Precision};
use serde::Serialize;

use crate::train::TaskResult;

/// Writes `config.json` and `model.safetensors`; `latent` replaces the statistics of a codec's latents.
///
/// # Errors
/// If the folder cannot be written.
pub(super) fn write_part(
    folder: &Path,
    config: &impl Serialize,
    params: &Params,
    latent: Option<(Tensor, Tensor)>,
    precision: Precision,
) -> TaskResult<()> {
    if let Some((mean, std)) = latent {
        let vars = params.vars();
        for (name, value) in [("latent.mean", mean), ("latent.std", std)] {
            vars.get(name)
                .ok_or_else(|| format!("the codec has no tensor `{name}`"))?
                .set(&value)?;
        }
    }
    write_json(&folder.join("config.json"), config)?;
    params.save(&folder.join("model.safetensors"), &BTreeMap::new(), precision)?;
    Ok(())
}

/// Copies these files of a part that was trained before into the folder `to` of a model.
///
/// # Errors
/// A file cannot be read or written.
pub(super) fn copy_part(from: &Path, to: &Path, names: &[&str]) -> TaskResult<()> {
    fs::create_dir_all(to).map_err(|e| format!("{}: {e}", to.display()))?;
    for name in names {
        let file = from.join(name);
        fs::copy(&file, to.join(name)).map_err(|e| format!("{}: {e}", file.display()))?;
    }
    Ok(())
}

/// Writes a value as readable JSON, atomically.
///
/// # Errors
/// If the file cannot be written.
pub(super) fn write_json(path: &Path, value: &impl Serialize) -> TaskResult<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    write_atomic(path, |file| file.write_all(text.as_bytes()))?;
    Ok(())
}
