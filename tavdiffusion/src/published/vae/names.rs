//! Names of KL autoencoders in the files of their first releases.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::names::{Stored, Translation, below, indexed};

/// What may come before all names: nothing, or the place of the autoencoder in a file of latent diffusion.
const PREFIXES: [&str; 2] = ["", "first_stage_model."];
/// The only attention.
const ATTENTION: &str = "mid_block.attentions.0";

/// By which names a file holds an autoencoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VaeNames {
    /// Those of diffusers.
    Diffusers,
    /// Those of diffusers before attention was renamed, as most published folders have them.
    Older,
    /// Those of latent diffusion, after a prefix.
    LatentDiffusion(&'static str),
}

impl VaeNames {
    /// The names that `shapes` are of.
    pub(crate) fn of(shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        let has = |name: &str| shapes.contains_key(name);
        for prefix in PREFIXES {
            if has(&format!("{prefix}decoder.mid.block_1.norm1.weight"))
                || has(&format!("{prefix}encoder.mid.block_1.norm1.weight"))
            {
                return Self::LatentDiffusion(prefix);
            }
        }
        let older = ["encoder", "decoder"].map(|half| has(&format!("{half}.{ATTENTION}.query.weight")));
        match older.contains(&true) {
            true => Self::Older,
            false => Self::Diffusers,
        }
    }

    /// What comes before all names; tensors without it are of other networks.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::LatentDiffusion(prefix) => prefix,
            Self::Diffusers | Self::Older => "",
        }
    }

    /// From the names of diffusers to these, for an autoencoder of so many resolutions.
    pub(crate) fn translation(self, blocks: usize) -> Option<Translation> {
        match self {
            Self::Diffusers => None,
            Self::Older => Some(Arc::new(|name: &str| Stored::As(older(name)))),
            Self::LatentDiffusion(prefix) => Some(Arc::new(move |name: &str| {
                match original(name, blocks) {
                    Some((name, true)) => Stored::Pointwise(format!("{prefix}{name}")),
                    Some((name, false)) => Stored::As(format!("{prefix}{name}")),
                    // The same in both.
                    None => Stored::As(format!("{prefix}{name}")),
                }
            })),
        }
    }
}

fn older(name: &str) -> String {
    let Some((half, rest)) = name.split_once(&format!(".{ATTENTION}.")) else {
        return name.to_owned();
    };
    [
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ]
    .iter()
    .find_map(|(from, to)| Some(format!("{half}.{ATTENTION}.{to}.{}", below(rest, from)?)))
    .unwrap_or_else(|| name.to_owned())
}

/// A name of latent diffusion, and whether a matrix lies there as a convolution.
fn original(name: &str, blocks: usize) -> Option<(String, bool)> {
    let (half, rest) = name.split_once('.')?;
    if !matches!(half, "encoder" | "decoder") {
        return None;
    }
    let whole = |rest: String| Some((format!("{half}.{rest}"), false));
    if let Some(rest) = below(rest, "conv_norm_out") {
        return whole(format!("norm_out.{rest}"));
    }
    if let Some(rest) = below(rest, ATTENTION) {
        for (from, to) in [
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ] {
            if let Some(rest) = below(rest, from) {
                let matrix = from != "group_norm" && rest == "weight";
                return Some((format!("{half}.mid.attn_1.{to}.{rest}"), matrix));
            }
        }
        return None;
    }
    if let Some((j, rest)) = below(rest, "mid_block.resnets").and_then(indexed) {
        return whole(format!("mid.block_{}.{}", j + 1, resnet(rest)));
    }
    let (way, index, rest) = match half {
        "encoder" => {
            let (i, rest) = below(rest, "down_blocks").and_then(indexed)?;
            ("down", i, rest)
        }
        _ => {
            let (i, rest) = below(rest, "up_blocks").and_then(indexed)?;
            // The first on the way up has the smallest sides, and the last number.
            ("up", blocks.checked_sub(i + 1)?, rest)
        }
    };
    if let Some((j, rest)) = below(rest, "resnets").and_then(indexed) {
        return whole(format!("{way}.{index}.block.{j}.{}", resnet(rest)));
    }
    let rest = below(rest, &format!("{way}samplers.0"))?;
    whole(format!("{way}.{index}.{way}sample.{rest}"))
}

fn resnet(name: &str) -> String {
    match below(name, "conv_shortcut") {
        Some(rest) => format!("nin_shortcut.{rest}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_lie_where_latent_diffusion_has_them() {
        for (name, expected, matrix) in [
            ("encoder.conv_in.weight", None, false),
            ("quant_conv.bias", None, false),
            (
                "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
                Some("encoder.down.1.block.0.nin_shortcut.bias"),
                false,
            ),
            (
                "encoder.down_blocks.0.downsamplers.0.conv.weight",
                Some("encoder.down.0.downsample.conv.weight"),
                false,
            ),
            (
                "decoder.up_blocks.0.resnets.2.norm1.bias",
                Some("decoder.up.3.block.2.norm1.bias"),
                false,
            ),
            (
                "decoder.up_blocks.2.upsamplers.0.conv.bias",
                Some("decoder.up.1.upsample.conv.bias"),
                false,
            ),
            (
                "decoder.mid_block.resnets.1.conv2.bias",
                Some("decoder.mid.block_2.conv2.bias"),
                false,
            ),
            (
                "decoder.mid_block.attentions.0.group_norm.weight",
                Some("decoder.mid.attn_1.norm.weight"),
                false,
            ),
            (
                "encoder.mid_block.attentions.0.to_out.0.weight",
                Some("encoder.mid.attn_1.proj_out.weight"),
                true,
            ),
            (
                "encoder.mid_block.attentions.0.to_q.bias",
                Some("encoder.mid.attn_1.q.bias"),
                false,
            ),
            ("decoder.conv_norm_out.bias", Some("decoder.norm_out.bias"), false),
        ] {
            let expected = expected.map(|expected| (expected.to_owned(), matrix));
            assert_eq!(original(name, 4), expected, "{name}");
        }
        assert_eq!(
            older("decoder.mid_block.attentions.0.to_out.0.bias"),
            "decoder.mid_block.attentions.0.proj_attn.bias"
        );
        assert_eq!(
            older("decoder.mid_block.attentions.0.group_norm.bias"),
            "decoder.mid_block.attentions.0.group_norm.bias"
        );
    }
}
