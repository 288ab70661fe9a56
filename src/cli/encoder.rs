//! The encoder of AVHScore that a command was asked for.

use std::path::Path;

use candle_core::{DType, Device};
use clap::ValueEnum;
use fulgur_benchmark::encoder::{BuiltinEncoder, Encoder, ImageBindEncoder, ImageBindOptions};

use super::context::Context;
use crate::device::compute_dtype;
use crate::models;

/// Type of the products of a published encoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Products {
    /// bf16 on a GPU, f32 on the CPU
    #[default]
    Auto,
    /// f32
    F32,
    /// bf16, on a GPU
    Bf16,
    /// f16, on a GPU
    F16,
}

impl Products {
    /// The type on this device.
    pub(super) fn dtype(self, device: &Device) -> anyhow::Result<DType> {
        let dtype = match self {
            Self::Auto => compute_dtype(device),
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        };
        if device.is_cpu() && dtype != DType::F32 {
            anyhow::bail!("--precision {}: on the CPU only f32 is computed", dtype.as_str());
        }
        Ok(dtype)
    }
}

/// How an encoder is opened.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct EncoderOptions {
    /// Type of products.
    pub(super) products: Products,
    /// Hear the mean of all channels.
    pub(super) downmix: bool,
}

/// Opens `builtin` or the encoder in a folder: ImageBind, or one of the builtin's architecture.
pub(super) fn open_encoder(
    name: &Path,
    options: EncoderOptions,
    context: &Context,
) -> anyhow::Result<Box<dyn Encoder>> {
    let dir = models::encoder_named(name)?;
    let device = context.open_device()?;
    if ImageBindEncoder::is_in(&dir)? {
        let options = ImageBindOptions {
            compute: options.products.dtype(&device)?,
            downmix: options.downmix,
        };
        return Ok(Box::new(ImageBindEncoder::open(&dir, options, &device)?));
    }
    if options.products != Products::Auto || options.downmix {
        anyhow::bail!(
            "{}: --precision and --downmix are of published encoders such as ImageBind, this is none",
            dir.display()
        );
    }
    Ok(Box::new(BuiltinEncoder::load(&dir, &device)?))
}
