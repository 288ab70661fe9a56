//! `config.json` of `UNet2DConditionModel`, with the defaults of diffusers; `motion` has what there is besides over clips.

mod motion;

pub use motion::{MotionAdapterConfig, MotionUnetConfig};

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::super::layers::Activation;
use super::super::limits::as_long;
use super::plan::{AttentionPlan, BlockPlan, MidPlan, OverFrames, Plan};

/// One value for all blocks, or one a block.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected one value, or a list with one of each block")]
pub(crate) enum PerBlock<T> {
    /// The same for all.
    All(T),
    /// From the largest sides to the smallest.
    Each(Vec<T>),
}

impl<T: Copy> PerBlock<T> {
    /// The value of each of `blocks`.
    pub(crate) fn each(&self, field: &str, blocks: usize) -> Result<Vec<T>> {
        match self {
            Self::All(value) => Ok(vec![*value; blocks]),
            Self::Each(values) => {
                as_long(field, values.len(), blocks)?;
                Ok(values.clone())
            }
        }
    }
}

/// A UNet over pictures or spectrograms, as `UNet2DConditionModel` is configured. Settings that other models of that class use and this
/// one does not understand are refused, not ignored.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct UnetConfig {
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    center_input_sample: bool,
    flip_sin_to_cos: bool,
    freq_shift: f64,
    down_block_types: Vec<String>,
    mid_block_type: Option<String>,
    up_block_types: Vec<String>,
    pub(crate) block_out_channels: Vec<usize>,
    pub(crate) layers_per_block: PerBlock<usize>,
    downsample_padding: usize,
    mid_block_scale_factor: f64,
    act_fn: Activation,
    norm_num_groups: Option<usize>,
    norm_eps: f64,
    pub(crate) cross_attention_dim: PerBlock<usize>,
    transformer_layers_per_block: PerBlock<usize>,
    /// Despite its name, and as every published file has it, the number of heads.
    attention_head_dim: PerBlock<usize>,
    use_linear_projection: bool,
    upcast_attention: bool,
    resnet_time_scale_shift: Option<String>,
    time_embedding_type: String,
    time_embedding_dim: Option<usize>,
    conv_in_kernel: usize,
    conv_out_kernel: usize,
    attention_type: String,
    dual_cross_attention: bool,
    only_cross_attention: PerBlock<bool>,
    num_attention_heads: Value,
    reverse_transformer_layers_per_block: Value,
    encoder_hid_dim: Value,
    encoder_hid_dim_type: Value,
    class_embed_type: Value,
    num_class_embeds: Value,
    addition_embed_type: Value,
    time_embedding_act_fn: Value,
    timestep_post_act: Value,
    time_cond_proj_dim: Value,
}

/// Layers at one resolution of a network whose shapes are all there is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LatentBlock {
    pub(crate) channels: usize,
    /// Residual blocks on the way down.
    pub(crate) layers: usize,
    /// Transformer blocks a layer, none without attention.
    pub(crate) depth: usize,
}

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

impl Default for UnetConfig {
    fn default() -> Self {
        let (plain, cross) = ("DownBlock2D", "CrossAttnDownBlock2D");
        let (plain_up, cross_up) = ("UpBlock2D", "CrossAttnUpBlock2D");
        Self {
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0.0,
            down_block_types: words([cross, cross, cross, plain]),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".to_owned()),
            up_block_types: words([plain_up, cross_up, cross_up, cross_up]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::All(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            act_fn: Activation::Silu,
            norm_num_groups: Some(32),
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::All(1280),
            transformer_layers_per_block: PerBlock::All(1),
            attention_head_dim: PerBlock::All(8),
            use_linear_projection: false,
            upcast_attention: false,
            resnet_time_scale_shift: None,
            time_embedding_type: "positional".to_owned(),
            time_embedding_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            attention_type: "default".to_owned(),
            dual_cross_attention: false,
            only_cross_attention: PerBlock::All(false),
            num_attention_heads: Value::Null,
            reverse_transformer_layers_per_block: Value::Null,
            encoder_hid_dim: Value::Null,
            encoder_hid_dim_type: Value::Null,
            class_embed_type: Value::Null,
            num_class_embeds: Value::Null,
            addition_embed_type: Value::Null,
            time_embedding_act_fn: Value::Null,
            timestep_post_act: Value::Null,
            time_cond_proj_dim: Value::Null,
        }
    }
}

impl UnetConfig {
    /// The network of Stable Diffusion 1.x.
    #[must_use]
    pub fn stable_diffusion() -> Self {
        Self {
            cross_attention_dim: PerBlock::All(768),
            ..Self::default()
        }
    }

    /// The network of Tango, over spectrograms, that reads states of this width.
    #[must_use]
    pub fn tango(cross_attention_dim: usize) -> Self {
        Self {
            in_channels: 8,
            out_channels: 8,
            cross_attention_dim: PerBlock::All(cross_attention_dim),
            attention_head_dim: PerBlock::Each(vec![5, 10, 20, 20]),
            use_linear_projection: true,
            upcast_attention: true,
            ..Self::default()
        }
    }

    /// A network of these channels in and out, and blocks from the largest sides to the smallest, each with `heads` of its channels.
    pub(crate) fn of_blocks(
        [in_channels, out_channels]: [usize; 2],
        blocks: &[LatentBlock],
        context: usize,
        linear: bool,
        heads: impl Fn(usize) -> usize,
    ) -> Self {
        let each = |of: &dyn Fn(&LatentBlock) -> usize| PerBlock::Each(blocks.iter().map(of).collect());
        let kinds = |cross: &str, plain: &str| -> Vec<String> {
            let kind = |block: &LatentBlock| if block.depth > 0 { cross } else { plain };
            blocks.iter().map(|block| kind(block).to_owned()).collect()
        };
        let mut up = kinds("CrossAttnUpBlock2D", "UpBlock2D");
        up.reverse();
        // The middle is as deep as the last block with attention.
        let deepest = blocks
            .iter()
            .rev()
            .map(|block| block.depth)
            .find(|&depth| depth > 0);
        Self {
            in_channels,
            out_channels,
            down_block_types: kinds("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types: up,
            block_out_channels: blocks.iter().map(|block| block.channels).collect(),
            layers_per_block: each(&|block| block.layers),
            cross_attention_dim: PerBlock::All(context),
            transformer_layers_per_block: each(&|block| match block.depth {
                0 => deepest.unwrap_or(1),
                depth => depth,
            }),
            attention_head_dim: each(&|block| heads(block.channels)),
            use_linear_projection: linear,
            ..Self::default()
        }
    }

    /// Refuses what this network does not do.
    fn understood(&self) -> Result<()> {
        for (field, value) in [
            ("num_attention_heads", &self.num_attention_heads),
            (
                "reverse_transformer_layers_per_block",
                &self.reverse_transformer_layers_per_block,
            ),
            ("encoder_hid_dim", &self.encoder_hid_dim),
            ("encoder_hid_dim_type", &self.encoder_hid_dim_type),
            ("class_embed_type", &self.class_embed_type),
            ("num_class_embeds", &self.num_class_embeds),
            ("addition_embed_type", &self.addition_embed_type),
            ("time_embedding_act_fn", &self.time_embedding_act_fn),
            ("timestep_post_act", &self.timestep_post_act),
            ("time_cond_proj_dim", &self.time_cond_proj_dim),
        ] {
            if !value.is_null() {
                bail!("{field} is {value}, expected null");
            }
        }
        for (field, found, expected) in [
            ("time_embedding_type", &self.time_embedding_type, "positional"),
            ("attention_type", &self.attention_type, "default"),
        ] {
            if found != expected {
                bail!("{field} is {found:?}, expected {expected:?}");
            }
        }
        if self.dual_cross_attention {
            bail!("dual_cross_attention is true, expected false");
        }
        Ok(())
    }

    /// The network that this describes.
    ///
    /// # Errors
    /// A setting that is not understood, contradicts another, or is beyond all reason.
    pub(crate) fn plan(&self) -> Result<Plan> {
        self.understood()?;
        let blocks = self.block_out_channels.len();
        as_long("down_block_types", self.down_block_types.len(), blocks)?;
        as_long("up_block_types", self.up_block_types.len(), blocks)?;
        let layers = self.layers_per_block.each("layers_per_block", blocks)?;
        let heads = self.attention_head_dim.each("attention_head_dim", blocks)?;
        let contexts = self.cross_attention_dim.each("cross_attention_dim", blocks)?;
        let depths = self
            .transformer_layers_per_block
            .each("transformer_layers_per_block", blocks)?;
        let only = self.only_cross_attention.each("only_cross_attention", blocks)?;
        let attention = |i: usize| AttentionPlan {
            heads: heads[i],
            context: contexts[i],
            layers: depths[i],
            only_text: only[i],
        };
        let block = |i: usize, extra: usize, cross: bool| BlockPlan {
            channels: self.block_out_channels[i],
            layers: layers[i].saturating_add(extra),
            attention: cross.then(|| attention(i)),
            motion: None,
        };
        let mut down = Vec::with_capacity(blocks);
        for (i, kind) in self.down_block_types.iter().enumerate() {
            let cross = is_cross("down_block_types", kind, ["CrossAttnDownBlock2D", "DownBlock2D"])?;
            down.push(block(i, 0, cross));
        }
        let mut up = Vec::with_capacity(blocks);
        for (i, kind) in self.up_block_types.iter().enumerate() {
            let cross = is_cross("up_block_types", kind, ["CrossAttnUpBlock2D", "UpBlock2D"])?;
            up.push(block(blocks - 1 - i, 1, cross));
        }
        let mid = match self.mid_block_type.as_deref() {
            None => MidPlan::Absent,
            Some("UNetMidBlock2D") => MidPlan::Resnet,
            Some("UNetMidBlock2DCrossAttn") if blocks > 0 => {
                let own = AttentionPlan {
                    only_text: false,
                    ..attention(blocks - 1)
                };
                MidPlan::Attention(own, None)
            }
            Some(other) => {
                bail!("mid_block_type is {other:?}, expected UNetMidBlock2DCrossAttn or UNetMidBlock2D")
            }
        };
        let scale_shift = match self.resnet_time_scale_shift.as_deref() {
            None | Some("default") => false,
            Some("scale_shift") => true,
            Some(other) => bail!("resnet_time_scale_shift is {other:?}, expected default or scale_shift"),
        };
        let Some(groups) = self.norm_num_groups else {
            bail!("norm_num_groups is null, expected a number");
        };
        let waves = self.block_out_channels.first().copied().unwrap_or(0);
        let plan = Plan {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            conv_in_kernel: self.conv_in_kernel,
            conv_out_kernel: self.conv_out_kernel,
            center_input: self.center_input_sample,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift,
            time_width: self.time_embedding_dim.unwrap_or(waves.saturating_mul(4)),
            down,
            mid,
            up,
            downsample_padding: self.downsample_padding,
            mid_divisor: self.mid_block_scale_factor,
            activation: self.act_fn,
            last_activation: self.act_fn,
            groups,
            eps: self.norm_eps,
            scale_shift,
            linear_projection: self.use_linear_projection,
            upcast: self.upcast_attention,
            over_frames: OverFrames {
                resnets: false,
                motion: false,
            },
            most_frames: 1,
        };
        plan.check()?;
        Ok(plan)
    }
}

/// Whether a block is of the first kind, with attention, and not of the second.
fn is_cross(field: &str, kind: &str, [cross, plain]: [&str; 2]) -> Result<bool> {
    match kind {
        _ if kind == cross => Ok(true),
        _ if kind == plain => Ok(false),
        _ => bail!("{field} has {kind:?}, expected {cross} or {plain}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> String {
        let config: UnetConfig = serde_json::from_str(json).unwrap();
        let line = config.plan().unwrap_err().to_string();
        line.lines().next().unwrap_or_default().to_owned()
    }

    #[test]
    fn defaults_are_those_of_the_library() {
        let config: UnetConfig = serde_json::from_str("{}").unwrap();
        let plan = config.plan().unwrap();
        let heads: Vec<_> = plan.down.iter().map(|b| b.attention.map(|a| a.heads)).collect();
        assert_eq!(heads, [Some(8), Some(8), Some(8), None]);
        let up: Vec<_> = plan
            .up
            .iter()
            .map(|b| (b.channels, b.layers, b.attention.is_some()))
            .collect();
        assert_eq!(
            up,
            [(1280, 3, false), (1280, 3, true), (640, 3, true), (320, 3, true)]
        );
        assert_eq!(
            (plan.time_width, plan.context(), plan.has_motion()),
            (1280, Some(1280), false)
        );
        let tango = UnetConfig::tango(768).plan().unwrap();
        assert_eq!(
            tango.up[1].attention.map(|a| (a.heads, a.context)),
            Some((20, 768))
        );
        let motion: MotionUnetConfig = serde_json::from_str("{}").unwrap();
        let plan = motion.plan().unwrap();
        assert!(plan.has_motion() && plan.over_frames.motion && !plan.over_frames.resnets);
        assert!(matches!(plan.mid, MidPlan::Attention(_, Some(_))));
        let authors = MotionAdapterConfig::authors()
            .plan(&UnetConfig::stable_diffusion())
            .unwrap();
        assert!(matches!(authors.mid, MidPlan::Attention(_, None)));
        assert_eq!(authors.most_frames, 24);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (json, words) in [
            (
                r#"{"addition_embed_type": "text_time"}"#,
                "addition_embed_type is \"text_time\", expected null",
            ),
            (r#"{"num_class_embeds": 10}"#, "num_class_embeds is 10"),
            (r#"{"mid_block_type": "X"}"#, "mid_block_type is \"X\""),
            (
                r#"{"down_block_types": ["DownBlock2D"]}"#,
                "down_block_types has 1 entries, expected 4",
            ),
            (
                r#"{"down_block_types": ["A", "DownBlock2D", "DownBlock2D", "DownBlock2D"]}"#,
                "down_block_types has \"A\", expected CrossAttnDownBlock2D or DownBlock2D",
            ),
            (
                r#"{"attention_head_dim": [8]}"#,
                "attention_head_dim has 1 entries",
            ),
            (r#"{"attention_head_dim": 0}"#, "the number of heads) is 0"),
            (
                r#"{"block_out_channels": [320, 640, 1280, 1281]}"#,
                "expected a multiple of norm_num_groups 32",
            ),
            (
                r#"{"layers_per_block": 1000000000}"#,
                "layers_per_block is 1000000000, expected 1 to 64",
            ),
            (
                r#"{"norm_eps": 0}"#,
                "norm_eps is 0, expected a number above zero",
            ),
            (
                r#"{"cross_attention_dim": [1, 2, 3, 4]}"#,
                "cross_attention_dim is 1 and 2",
            ),
            (
                r#"{"only_cross_attention": [true, false]}"#,
                "only_cross_attention has 2 entries, expected 4",
            ),
            (
                r#"{"conv_in_kernel": 2}"#,
                "conv_in_kernel is 2, expected an odd number",
            ),
            (r#"{"block_out_channels": []}"#, "entries, expected 0"),
        ] {
            let line = refused(json);
            assert!(line.contains(words), "{words}: {line}");
        }
        let motion: MotionUnetConfig = serde_json::from_str(r#"{"motion_num_attention_heads": 7}"#).unwrap();
        let line = motion.plan().unwrap_err().to_string();
        assert!(
            line.contains("motion_num_attention_heads is 7, expected a divisor of the 320 channels"),
            "{line}"
        );
    }
}
