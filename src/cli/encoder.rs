//! The encoder of AVHScore that a command was asked for.

use std::path::Path;

use fulgur_benchmark::encoder::{BuiltinEncoder, Encoder};

use super::context::Context;
use crate::models;

/// Opens `builtin` or the encoder in a folder.
pub(super) fn open_encoder(name: &Path, context: &Context) -> anyhow::Result<Box<dyn Encoder>> {
    let dir = if name == Path::new("builtin") {
        models::encoder()?
    } else {
        name.to_owned()
    };
    let device = context.open_device()?;
    Ok(Box::new(BuiltinEncoder::load(&dir, &device)?))
}
