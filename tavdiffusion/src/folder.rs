//! Folders of single networks: `config.json` and `model.safetensors`.

use std::path::Path;

use candle_core::Device;
use fulgur_lightnet::config;
use fulgur_lightnet::params::Frozen;
use serde::de::DeserializeOwned;

use crate::error::Error;

/// Loads the network in `dir` onto `device`; `build` makes it of its configuration and its weights.
///
/// # Errors
/// A missing or unreadable file, weights that are missing, unexpected or of another shape.
pub(crate) fn load<C: DeserializeOwned, M>(
    dir: &Path,
    device: &Device,
    build: impl FnOnce(&C, &Frozen) -> candle_core::Result<M>,
) -> Result<M, Error> {
    let config = config::read(&dir.join("config.json"))?;
    let weights = Frozen::open(&dir.join("model.safetensors"), device)?;
    let network = build(&config, &weights).map_err(|error| Error::model(dir, error))?;
    weights.all_used()?;
    Ok(network)
}
