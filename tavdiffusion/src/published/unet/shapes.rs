//! UNets of latent diffusion without a configuration: what the names and shapes of their tensors say.
//!
//! They do not say how many heads there are: 8 in networks whose attention is entered through 1x1 convolutions (Stable Diffusion 1.x), and
//! as many of 64 channels as there is room for where it is entered through matrices (2.x).

use std::collections::BTreeMap;

use candle_core::{Result, bail};

use super::super::limits::{MOST_BLOCKS, MOST_LAYERS};
use super::config::{LatentBlock, UnetConfig};

/// Heads of the first networks, and channels of a head of later ones.
const HEADS: usize = 8;
const HEAD: usize = 64;

impl UnetConfig {
    /// The network whose tensors have these shapes, by the names of latent diffusion without a prefix.
    ///
    /// # Errors
    /// They are not those of a UNet of latent diffusion.
    pub(crate) fn of_shapes(shapes: &BTreeMap<String, Vec<usize>>) -> Result<Self> {
        let size = |name: &str, axis: usize| match shapes.get(name).and_then(|shape| shape.get(axis)) {
            Some(size) => Ok(*size),
            None => bail!("{name} is missing, expected the weights of a UNet of latent diffusion"),
        };
        let has = |name: &str| shapes.contains_key(name);
        let mut blocks = vec![LatentBlock::default()];
        for n in 1..=MOST_BLOCKS * (MOST_LAYERS + 1) {
            let entry = format!("input_blocks.{n}");
            if has(&format!("{entry}.0.op.weight")) {
                blocks.push(LatentBlock::default());
                continue;
            }
            let Ok(channels) = size(&format!("{entry}.0.out_layers.3.weight"), 0) else {
                break;
            };
            let Some(block) = blocks.last_mut() else { break };
            block.channels = channels;
            block.layers += 1;
            block.depth = (0..=MOST_LAYERS)
                .take_while(|k| has(&format!("{entry}.1.transformer_blocks.{k}.norm1.weight")))
                .count();
        }
        let reads = |name: &&String| name.ends_with("attn2.to_k.weight");
        let context = match shapes.keys().find(reads) {
            Some(name) => size(name, 1)?,
            None => bail!("attn2.to_k.weight is missing, expected a UNet that reads a text"),
        };
        let linear = shapes
            .iter()
            .any(|(name, shape)| name.ends_with(".1.proj_in.weight") && shape.len() == 2);
        let heads = |channels: usize| match linear {
            true => (channels / HEAD).max(1),
            false => HEADS,
        };
        Ok(Self::of_blocks(
            [size("input_blocks.0.0.weight", 1)?, size("out.2.weight", 0)?],
            &blocks,
            context,
            linear,
            heads,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::UnetNames;
    use super::super::{Unet, UnetConfig};
    use super::*;
    use crate::published::names::Stored;
    use fulgur_lightnet::params::Outline;

    /// The shapes of a network by the names of latent diffusion.
    fn shapes(config: &UnetConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        let outline = Outline::new();
        Unet::new(config, &outline.builder())?;
        let Some(names) = UnetNames::LatentDiffusion("").translation(&config.plan()?) else {
            bail!("no names");
        };
        let stored = |(name, shape): (String, Vec<usize>)| match names(&name) {
            Stored::As(name) => Some((name, shape)),
            _ => None,
        };
        Ok(outline.shapes().into_iter().filter_map(stored).collect())
    }

    #[test]
    fn shapes_say_what_a_configuration_would() -> Result<()> {
        let second = r#"{"block_out_channels": [64, 128, 128], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [1, 2, 2], "cross_attention_dim": 96, "transformer_layers_per_block": [1, 2, 3],
            "use_linear_projection": true, "layers_per_block": 1, "in_channels": 9}"#;
        let second = serde_json::from_str(second).map_err(candle_core::Error::wrap)?;
        for config in [UnetConfig::stable_diffusion(), second] {
            let found = UnetConfig::of_shapes(&shapes(&config)?)?;
            assert_eq!(found.plan()?, config.plan()?);
        }
        assert!(UnetConfig::of_shapes(&BTreeMap::new()).is_err());
        Ok(())
    }
}
