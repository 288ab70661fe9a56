//! `config.json` of `AutoencoderKL`, with the defaults of diffusers, or what the shapes of an original checkpoint say.

use std::collections::BTreeMap;

use candle_core::{Result, bail};
use serde::Deserialize;

use super::super::layers::Activation;
use super::super::limits::{MOST_BLOCKS, MOST_CHANNELS, MOST_LAYERS, as_long, in_groups, within};

/// Groups of every norm of the original networks, whose shapes do not say it.
const GROUPS: usize = 32;

/// A KL autoencoder as `AutoencoderKL` is configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlConfig {
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    down_block_types: Option<Vec<String>>,
    up_block_types: Option<Vec<String>>,
    pub(crate) block_out_channels: Vec<usize>,
    pub(crate) layers_per_block: usize,
    pub(crate) act_fn: Activation,
    pub(crate) latent_channels: usize,
    pub(crate) norm_num_groups: usize,
    /// What latents are multiplied by before they are noised.
    pub scaling_factor: f64,
    pub(crate) use_quant_conv: bool,
    pub(crate) use_post_quant_conv: bool,
    pub(crate) mid_block_add_attention: bool,
}

impl Default for AutoencoderKlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: None,
            up_block_types: None,
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: Activation::Silu,
            latent_channels: 4,
            norm_num_groups: GROUPS,
            scaling_factor: 0.18215,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl AutoencoderKlConfig {
    /// The autoencoder of pictures of Stable Diffusion 1.x.
    #[must_use]
    pub fn stable_diffusion() -> Self {
        Self {
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            ..Self::default()
        }
    }

    /// The autoencoder of spectrograms of AudioLDM. The factor of its latents lies in the checkpoint.
    #[must_use]
    pub fn audio_ldm(scaling_factor: f64) -> Self {
        Self {
            in_channels: 1,
            out_channels: 1,
            block_out_channels: vec![128, 256, 512],
            layers_per_block: 2,
            latent_channels: 8,
            scaling_factor,
            ..Self::default()
        }
    }

    /// Channels of pictures that are encoded.
    #[must_use]
    pub fn in_channels(&self) -> usize {
        self.in_channels
    }

    /// Channels of pictures that are decoded.
    #[must_use]
    pub fn out_channels(&self) -> usize {
        self.out_channels
    }

    /// Channels of latents.
    #[must_use]
    pub fn latent_channels(&self) -> usize {
        self.latent_channels
    }

    /// How often the sides of a latent go into those of a picture.
    #[must_use]
    pub fn factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1)
    }

    /// Refuses what cannot be built.
    pub(crate) fn check(&self) -> Result<()> {
        within("block_out_channels", self.block_out_channels.len(), MOST_BLOCKS)?;
        for (field, kinds, known) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            let Some(kinds) = kinds else { continue };
            as_long(field, kinds.len(), self.block_out_channels.len())?;
            if let Some(kind) = kinds.iter().find(|kind| *kind != known) {
                bail!("{field} has {kind:?}, expected {known}");
            }
        }
        for &channels in &self.block_out_channels {
            within("block_out_channels", channels, MOST_CHANNELS)?;
            in_groups("block_out_channels", channels, self.norm_num_groups)?;
        }
        within("layers_per_block", self.layers_per_block, MOST_LAYERS)?;
        within("in_channels", self.in_channels, MOST_CHANNELS)?;
        within("out_channels", self.out_channels, MOST_CHANNELS)?;
        within("latent_channels", self.latent_channels, MOST_CHANNELS)?;
        if !(self.scaling_factor > 0.0 && self.scaling_factor.is_finite()) {
            bail!(
                "scaling_factor is {}, expected a number above zero",
                self.scaling_factor
            );
        }
        Ok(())
    }

    /// What the shapes of an original checkpoint say, by names without their prefix; `scaling_factor` is not among them.
    pub(crate) fn of_shapes(shapes: &BTreeMap<String, Vec<usize>>, scaling_factor: f64) -> Result<Self> {
        let size = |name: &str, axis: usize| match shapes.get(name).and_then(|shape| shape.get(axis)) {
            Some(size) => Ok(*size),
            None => bail!("{name} is missing, expected the weights of a KL autoencoder"),
        };
        let part = |half: &str, way: &str| {
            let channels = |i: usize| size(&format!("{half}.{way}.{i}.block.0.conv1.weight"), 0);
            let blocks: Vec<usize> = (0..MOST_BLOCKS).map_while(|i| channels(i).ok()).collect();
            let layers = (0..=MOST_LAYERS)
                .take_while(|j| size(&format!("{half}.{way}.0.block.{j}.conv1.weight"), 0).is_ok())
                .count();
            (blocks, layers)
        };
        let (encoder, decoder) = (part("encoder", "down"), part("decoder", "up"));
        let (blocks, layers) = match encoder.0.is_empty() {
            false => encoder,
            true => (decoder.0, decoder.1.saturating_sub(1)),
        };
        let either = |first: Result<usize>, second: Result<usize>| first.or(second);
        let latent_channels = either(
            size("post_quant_conv.weight", 0),
            size("quant_conv.weight", 0).map(|both| both / 2),
        )?;
        let in_channels = either(
            size("encoder.conv_in.weight", 1),
            size("decoder.conv_out.weight", 0),
        )?;
        let config = Self {
            in_channels,
            out_channels: size("decoder.conv_out.weight", 0).unwrap_or(in_channels),
            block_out_channels: blocks,
            layers_per_block: layers,
            latent_channels,
            scaling_factor,
            ..Self::default()
        };
        config.check()?;
        Ok(config)
    }
}
