//! Names of UNets in the files of their first releases.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::names::{Stored, Translation, below, indexed};
use super::motion::TABLE;
use super::plan::Plan;

/// What comes before the names of the UNet in files of Stable Diffusion.
const STABLE_DIFFUSION: &str = "model.diffusion_model.";
/// What may come before names of latent diffusion.
const LATENT_DIFFUSION: [&str; 2] = [STABLE_DIFFUSION, ""];

/// By which names a file holds a UNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnetNames {
    /// Those of diffusers.
    Diffusers,
    /// Those of latent diffusion, after this prefix.
    LatentDiffusion(&'static str),
    /// Those of diffusers, but for motion modules, which are named as in AnimateDiff: the authors' checkpoint.
    AnimateDiff,
}

impl UnetNames {
    /// The names that `shapes` are of.
    #[must_use]
    pub fn of(shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        for prefix in LATENT_DIFFUSION {
            if shapes.contains_key(&format!("{prefix}input_blocks.0.0.weight")) {
                return Self::LatentDiffusion(prefix);
            }
        }
        let animated = shapes.keys().any(|name| name.contains(".temporal_transformer."));
        match animated {
            true => Self::AnimateDiff,
            false => Self::Diffusers,
        }
    }

    /// What comes before all names; tensors without it are of other networks.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::LatentDiffusion(prefix) => prefix,
            Self::Diffusers | Self::AnimateDiff => "",
        }
    }

    /// From the names of diffusers to these, for a network of this plan.
    pub(in crate::published) fn translation(self, plan: &Plan) -> Option<Translation> {
        match self {
            Self::Diffusers => None,
            Self::AnimateDiff => Some(Arc::new(|name: &str| Stored::As(animate_diff(name)))),
            Self::LatentDiffusion(prefix) => {
                let places = Places::of(plan);
                Some(Arc::new(move |name: &str| {
                    Stored::As(format!(
                        "{prefix}{}",
                        places.name(name).unwrap_or_else(|| name.to_owned())
                    ))
                }))
            }
        }
    }
}

/// A name of diffusers as AnimateDiff has it: only motion modules differ.
fn animate_diff(name: &str) -> String {
    const MODULES: &str = ".motion_modules.";
    let Some((block, rest)) = name.split_once(MODULES) else {
        return name.to_owned();
    };
    let Some((module, rest)) = rest.split_once('.') else {
        return name.to_owned();
    };
    let inner = match below(rest, "transformer_blocks").and_then(indexed) {
        None => rest.to_owned(),
        Some((layer, rest)) => {
            let renamed = [
                ("attn1", "attention_blocks.0"),
                ("attn2", "attention_blocks.1"),
                ("norm1", "norms.0"),
                ("norm2", "norms.1"),
                ("norm3", "ff_norm"),
            ]
            .iter()
            .find_map(|(from, to)| Some(format!("{to}.{}", below(rest, from)?)));
            let rest = match renamed {
                Some(renamed) => renamed,
                None if rest == TABLE => "attention_blocks.0.pos_encoder.pe".to_owned(),
                None => rest.to_owned(),
            };
            format!("transformer_blocks.{layer}.{rest}")
        }
    };
    format!("{block}{MODULES}{module}.temporal_transformer.{inner}")
}

/// Where the layers of diffusers lie in the lists `input_blocks` and `output_blocks`.
struct Places {
    /// First entry of each block on the way down, and its layers.
    down: Vec<(usize, usize)>,
    /// As before on the way up, and whether the block has attention.
    up: Vec<(usize, usize, bool)>,
}

impl Places {
    fn of(plan: &Plan) -> Self {
        let mut next = 1;
        let mut down = Vec::new();
        for block in &plan.down {
            down.push((next, block.layers));
            next += block.layers + 1;
        }
        let mut next = 0;
        let mut up = Vec::new();
        for block in &plan.up {
            up.push((next, block.layers, block.attention.is_some()));
            next += block.layers;
        }
        Self { down, up }
    }

    fn name(&self, name: &str) -> Option<String> {
        for (from, to) in [
            ("conv_in", "input_blocks.0.0"),
            ("time_embedding.linear_1", "time_embed.0"),
            ("time_embedding.linear_2", "time_embed.2"),
            ("conv_norm_out", "out.0"),
            ("conv_out", "out.2"),
        ] {
            if let Some(rest) = below(name, from) {
                return Some(format!("{to}.{rest}"));
            }
        }
        if let Some(rest) = below(name, "mid_block") {
            if let Some((j, rest)) = below(rest, "resnets").and_then(indexed) {
                return Some(format!("middle_block.{}.{}", 2 * j, resnet(rest)?));
            }
            let (_, rest) = below(rest, "attentions").and_then(indexed)?;
            return Some(format!("middle_block.1.{rest}"));
        }
        if let Some((i, rest)) = below(name, "down_blocks").and_then(indexed) {
            let &(first, layers) = self.down.get(i)?;
            if let Some(rest) = below(rest, "downsamplers.0.conv") {
                return Some(format!("input_blocks.{}.0.op.{rest}", first + layers));
            }
            return layer("input_blocks", first, rest);
        }
        let (i, rest) = below(name, "up_blocks").and_then(indexed)?;
        let &(first, layers, attention) = self.up.get(i)?;
        if let Some(rest) = below(rest, "upsamplers.0.conv") {
            let place = if attention { 2 } else { 1 };
            return Some(format!(
                "output_blocks.{}.{place}.conv.{rest}",
                first + layers - 1
            ));
        }
        layer("output_blocks", first, rest)
    }
}

/// A residual block or a transformer of the list `list`.
fn layer(list: &str, first: usize, rest: &str) -> Option<String> {
    if let Some((j, rest)) = below(rest, "resnets").and_then(indexed) {
        return Some(format!("{list}.{}.0.{}", first + j, resnet(rest)?));
    }
    let (j, rest) = below(rest, "attentions").and_then(indexed)?;
    Some(format!("{list}.{}.1.{rest}", first + j))
}

/// A part of a residual block.
fn resnet(name: &str) -> Option<String> {
    [
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    ]
    .iter()
    .find_map(|(from, to)| Some(format!("{to}.{}", below(name, from)?)))
}

#[cfg(test)]
mod tests {
    use super::super::config::UnetConfig;
    use super::*;

    fn latent(name: &str) -> String {
        let plan = UnetConfig::stable_diffusion().plan().unwrap();
        let translation = UnetNames::LatentDiffusion(STABLE_DIFFUSION)
            .translation(&plan)
            .unwrap();
        match translation(name) {
            Stored::As(name) => name.strip_prefix(STABLE_DIFFUSION).unwrap().to_owned(),
            other => panic!("{other:?}"),
        }
    }

    /// Places that the published checkpoint has.
    #[test]
    fn layers_lie_where_stable_diffusion_has_them() {
        for (name, expected) in [
            ("conv_in.bias", "input_blocks.0.0.bias"),
            ("time_embedding.linear_2.weight", "time_embed.2.weight"),
            (
                "down_blocks.0.resnets.1.norm1.weight",
                "input_blocks.2.0.in_layers.0.weight",
            ),
            (
                "down_blocks.0.downsamplers.0.conv.bias",
                "input_blocks.3.0.op.bias",
            ),
            (
                "down_blocks.1.resnets.0.conv_shortcut.bias",
                "input_blocks.4.0.skip_connection.bias",
            ),
            (
                "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight",
                "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
            ),
            (
                "down_blocks.3.resnets.1.conv2.bias",
                "input_blocks.11.0.out_layers.3.bias",
            ),
            (
                "mid_block.resnets.1.time_emb_proj.bias",
                "middle_block.2.emb_layers.1.bias",
            ),
            (
                "mid_block.attentions.0.proj_in.weight",
                "middle_block.1.proj_in.weight",
            ),
            (
                "up_blocks.0.resnets.2.conv1.bias",
                "output_blocks.2.0.in_layers.2.bias",
            ),
            (
                "up_blocks.0.upsamplers.0.conv.bias",
                "output_blocks.2.1.conv.bias",
            ),
            (
                "up_blocks.1.attentions.0.norm.bias",
                "output_blocks.3.1.norm.bias",
            ),
            (
                "up_blocks.2.upsamplers.0.conv.weight",
                "output_blocks.8.2.conv.weight",
            ),
            (
                "up_blocks.3.attentions.2.proj_out.bias",
                "output_blocks.11.1.proj_out.bias",
            ),
            ("conv_norm_out.weight", "out.0.weight"),
            ("conv_out.bias", "out.2.bias"),
        ] {
            assert_eq!(latent(name), expected);
        }
    }

    #[test]
    fn motion_modules_are_named_as_in_animate_diff() {
        let module = "up_blocks.1.motion_modules.2";
        for (name, expected) in [
            ("proj_in.weight", "proj_in.weight"),
            (
                "transformer_blocks.0.attn2.to_out.0.bias",
                "transformer_blocks.0.attention_blocks.1.to_out.0.bias",
            ),
            (
                "transformer_blocks.0.norm3.bias",
                "transformer_blocks.0.ff_norm.bias",
            ),
            (
                "transformer_blocks.0.ff.net.2.bias",
                "transformer_blocks.0.ff.net.2.bias",
            ),
            (
                "transformer_blocks.0.pos_embed.pe",
                "transformer_blocks.0.attention_blocks.0.pos_encoder.pe",
            ),
        ] {
            assert_eq!(
                animate_diff(&format!("{module}.{name}")),
                format!("{module}.temporal_transformer.{expected}")
            );
        }
        assert_eq!(animate_diff("conv_in.bias"), "conv_in.bias");
    }
}
