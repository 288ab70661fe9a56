//! `config.json` of `UNetMotionModel` and `MotionAdapter`: networks over clips, and motion modules for those over pictures.

use std::collections::BTreeMap;

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::super::super::layers::Activation;
use super::super::plan::{MidPlan, MotionPlan, OverFrames, Plan};
use super::{PerBlock, UnetConfig, words};

/// A UNet over clips, as `UNetMotionModel` is configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct MotionUnetConfig {
    in_channels: usize,
    out_channels: usize,
    down_block_types: Vec<String>,
    up_block_types: Vec<String>,
    block_out_channels: Vec<usize>,
    layers_per_block: PerBlock<usize>,
    downsample_padding: usize,
    mid_block_scale_factor: f64,
    act_fn: Activation,
    norm_num_groups: usize,
    norm_eps: f64,
    cross_attention_dim: PerBlock<usize>,
    transformer_layers_per_block: PerBlock<usize>,
    temporal_transformer_layers_per_block: PerBlock<usize>,
    transformer_layers_per_mid_block: Option<usize>,
    temporal_transformer_layers_per_mid_block: Option<OneOrOnly>,
    use_linear_projection: bool,
    num_attention_heads: PerBlock<usize>,
    motion_max_seq_length: usize,
    motion_num_attention_heads: PerBlock<usize>,
    use_motion_mid_block: bool,
    mid_block_layers: usize,
    reverse_transformer_layers_per_block: Value,
    reverse_temporal_transformer_layers_per_block: Value,
    reverse_motion_num_attention_heads: Value,
    encoder_hid_dim: Value,
    encoder_hid_dim_type: Value,
    addition_embed_type: Value,
    time_cond_proj_dim: Value,
    /// Not in files of diffusers, whose norms in residual blocks see one frame: true where they see all, as in the authors' checkpoint.
    resnet_norm_over_frames: bool,
    /// As before, of the norms at the entry of motion modules, which see all frames in diffusers and one in AnimateDiff.
    motion_norm_over_frames: bool,
}

/// A number, or a list of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrOnly {
    /// As it is.
    One(usize),
    /// In a list.
    Only([usize; 1]),
}

impl OneOrOnly {
    fn value(self) -> usize {
        match self {
            Self::One(value) | Self::Only([value]) => value,
        }
    }
}

impl Default for MotionUnetConfig {
    fn default() -> Self {
        let (plain, cross) = ("DownBlockMotion", "CrossAttnDownBlockMotion");
        let (plain_up, cross_up) = ("UpBlockMotion", "CrossAttnUpBlockMotion");
        Self {
            in_channels: 4,
            out_channels: 4,
            down_block_types: words([cross, cross, cross, plain]),
            up_block_types: words([plain_up, cross_up, cross_up, cross_up]),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: PerBlock::All(2),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            act_fn: Activation::Silu,
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: PerBlock::All(1280),
            transformer_layers_per_block: PerBlock::All(1),
            temporal_transformer_layers_per_block: PerBlock::All(1),
            transformer_layers_per_mid_block: None,
            temporal_transformer_layers_per_mid_block: Some(OneOrOnly::One(1)),
            use_linear_projection: false,
            num_attention_heads: PerBlock::All(8),
            motion_max_seq_length: 32,
            motion_num_attention_heads: PerBlock::All(8),
            use_motion_mid_block: true,
            mid_block_layers: 1,
            reverse_transformer_layers_per_block: Value::Null,
            reverse_temporal_transformer_layers_per_block: Value::Null,
            reverse_motion_num_attention_heads: Value::Null,
            encoder_hid_dim: Value::Null,
            encoder_hid_dim_type: Value::Null,
            addition_embed_type: Value::Null,
            time_cond_proj_dim: Value::Null,
            resnet_norm_over_frames: false,
            motion_norm_over_frames: true,
        }
    }
}

impl MotionUnetConfig {
    /// The network that this describes.
    ///
    /// # Errors
    /// As those of a UNet over pictures.
    pub(crate) fn plan(&self) -> Result<Plan> {
        for (field, value) in [
            (
                "reverse_temporal_transformer_layers_per_block",
                &self.reverse_temporal_transformer_layers_per_block,
            ),
            (
                "reverse_motion_num_attention_heads",
                &self.reverse_motion_num_attention_heads,
            ),
        ] {
            if !value.is_null() {
                bail!("{field} is {value}, expected null");
            }
        }
        if self.mid_block_layers != 1 {
            bail!("mid_block_layers is {}, expected 1", self.mid_block_layers);
        }
        // Blocks of the same names over pictures.
        let still = |kinds: &[String]| kinds.iter().map(|kind| kind.replace("Motion", "2D")).collect();
        for (field, kinds) in [
            ("down_block_types", &self.down_block_types),
            ("up_block_types", &self.up_block_types),
        ] {
            if let Some(kind) = kinds.iter().find(|kind| !kind.ends_with("Motion")) {
                bail!("{field} has {kind:?}, expected blocks whose names end with Motion");
            }
        }
        let pictures = UnetConfig {
            in_channels: self.in_channels,
            out_channels: self.out_channels,
            down_block_types: still(&self.down_block_types),
            up_block_types: still(&self.up_block_types),
            block_out_channels: self.block_out_channels.clone(),
            layers_per_block: self.layers_per_block.clone(),
            downsample_padding: self.downsample_padding,
            mid_block_scale_factor: self.mid_block_scale_factor,
            act_fn: self.act_fn,
            norm_num_groups: Some(self.norm_num_groups),
            norm_eps: self.norm_eps,
            cross_attention_dim: self.cross_attention_dim.clone(),
            transformer_layers_per_block: self.transformer_layers_per_block.clone(),
            attention_head_dim: self.num_attention_heads.clone(),
            use_linear_projection: self.use_linear_projection,
            reverse_transformer_layers_per_block: self.reverse_transformer_layers_per_block.clone(),
            encoder_hid_dim: self.encoder_hid_dim.clone(),
            encoder_hid_dim_type: self.encoder_hid_dim_type.clone(),
            addition_embed_type: self.addition_embed_type.clone(),
            time_cond_proj_dim: self.time_cond_proj_dim.clone(),
            ..UnetConfig::default()
        };
        let mut plan = pictures.plan()?;
        // Whatever is configured: so it is in the reference.
        plan.last_activation = Activation::Silu;
        if let (MidPlan::Attention(attention, _), Some(layers)) =
            (&mut plan.mid, self.transformer_layers_per_mid_block)
        {
            attention.layers = layers;
        }
        MotionSettings {
            heads: &self.motion_num_attention_heads,
            layers: &self.temporal_transformer_layers_per_block,
            mid_layers: self.use_motion_mid_block.then(|| {
                self.temporal_transformer_layers_per_mid_block
                    .map_or(1, OneOrOnly::value)
            }),
            most_frames: self.motion_max_seq_length,
            over_frames: OverFrames {
                resnets: self.resnet_norm_over_frames,
                motion: self.motion_norm_over_frames,
            },
        }
        .add_to(&mut plan)?;
        Ok(plan)
    }
}

/// Motion modules for a UNet over pictures, as `MotionAdapter` is configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct MotionAdapterConfig {
    block_out_channels: Vec<usize>,
    motion_layers_per_block: PerBlock<usize>,
    motion_transformer_layers_per_block: PerBlock<usize>,
    motion_mid_block_layers_per_block: usize,
    motion_transformer_layers_per_mid_block: OneOrOnly,
    motion_num_attention_heads: PerBlock<usize>,
    motion_norm_num_groups: usize,
    motion_max_seq_length: usize,
    use_motion_mid_block: bool,
    conv_in_channels: Value,
    resnet_norm_over_frames: bool,
    motion_norm_over_frames: bool,
}

impl Default for MotionAdapterConfig {
    fn default() -> Self {
        Self {
            block_out_channels: vec![320, 640, 1280, 1280],
            motion_layers_per_block: PerBlock::All(2),
            motion_transformer_layers_per_block: PerBlock::All(1),
            motion_mid_block_layers_per_block: 1,
            motion_transformer_layers_per_mid_block: OneOrOnly::One(1),
            motion_num_attention_heads: PerBlock::All(8),
            motion_norm_num_groups: 32,
            motion_max_seq_length: 32,
            use_motion_mid_block: true,
            conv_in_channels: Value::Null,
            resnet_norm_over_frames: false,
            motion_norm_over_frames: true,
        }
    }
}

impl MotionAdapterConfig {
    /// The modules of the authors' checkpoint: those of AnimateDiff's first version, for 24 frames, with statistics of residual blocks over
    /// all of them, and none in the middle.
    #[must_use]
    pub fn authors() -> Self {
        Self {
            motion_max_seq_length: 24,
            use_motion_mid_block: false,
            resnet_norm_over_frames: true,
            motion_norm_over_frames: false,
            ..Self::default()
        }
    }

    /// The modules of a file of AnimateDiff, which has no configuration, for the UNet over pictures `unet`: its shapes say how many frames
    /// there are places for, and whether there is a module in the middle. Norms are those of diffusers.
    pub(crate) fn of_shapes(unet: &UnetConfig, shapes: &BTreeMap<String, Vec<usize>>) -> Self {
        let own = Self::default();
        let table = shapes.iter().find(|(name, _)| name.ends_with(".pos_encoder.pe"));
        let places = table.and_then(|(_, shape)| shape.get(1)).copied();
        Self {
            block_out_channels: unet.block_out_channels.clone(),
            motion_layers_per_block: unet.layers_per_block.clone(),
            motion_norm_num_groups: unet.norm_num_groups.unwrap_or(own.motion_norm_num_groups),
            motion_max_seq_length: places.unwrap_or(own.motion_max_seq_length),
            use_motion_mid_block: shapes
                .keys()
                .any(|name| name.starts_with("mid_block.motion_modules.")),
            ..own
        }
    }

    /// The modules in the UNet over pictures `unet`.
    ///
    /// # Errors
    /// The two do not fit, or as [`UnetConfig::plan`].
    pub(crate) fn plan(&self, unet: &UnetConfig) -> Result<Plan> {
        let mut plan = unet.plan()?;
        let blocks = unet.block_out_channels.len();
        if self.block_out_channels != unet.block_out_channels {
            bail!(
                "block_out_channels of the motion modules is {:?}, expected {:?} as in the UNet",
                self.block_out_channels,
                unet.block_out_channels
            );
        }
        let layers = |field, layers: &PerBlock<usize>| layers.each(field, blocks);
        let found = layers("motion_layers_per_block", &self.motion_layers_per_block)?;
        let expected = layers("layers_per_block", &unet.layers_per_block)?;
        if found != expected {
            bail!("motion_layers_per_block is {found:?}, expected {expected:?} as in the UNet");
        }
        if self.motion_norm_num_groups != plan.groups {
            bail!(
                "motion_norm_num_groups is {}, expected {} as in the UNet",
                self.motion_norm_num_groups,
                plan.groups
            );
        }
        if self.motion_mid_block_layers_per_block != 1 || !self.conv_in_channels.is_null() {
            bail!(
                "motion_mid_block_layers_per_block is {} and conv_in_channels {}, expected 1 and null",
                self.motion_mid_block_layers_per_block,
                self.conv_in_channels
            );
        }
        MotionSettings {
            heads: &self.motion_num_attention_heads,
            layers: &self.motion_transformer_layers_per_block,
            mid_layers: self
                .use_motion_mid_block
                .then(|| self.motion_transformer_layers_per_mid_block.value()),
            most_frames: self.motion_max_seq_length,
            over_frames: OverFrames {
                resnets: self.resnet_norm_over_frames,
                motion: self.motion_norm_over_frames,
            },
        }
        .add_to(&mut plan)?;
        Ok(plan)
    }
}

/// What both kinds of files say of motion modules.
struct MotionSettings<'a> {
    heads: &'a PerBlock<usize>,
    layers: &'a PerBlock<usize>,
    mid_layers: Option<usize>,
    most_frames: usize,
    over_frames: OverFrames,
}

impl MotionSettings<'_> {
    fn add_to(&self, plan: &mut Plan) -> Result<()> {
        let blocks = plan.down.len();
        let heads = self.heads.each("motion_num_attention_heads", blocks)?;
        let layers = self
            .layers
            .each("temporal_transformer_layers_per_block", blocks)?;
        let motion = |i: usize, layers: usize| MotionPlan {
            heads: heads[i],
            layers,
        };
        for (i, &layers) in layers.iter().enumerate() {
            plan.down[i].motion = Some(motion(i, layers));
            plan.up[blocks - 1 - i].motion = Some(motion(i, layers));
        }
        if let (MidPlan::Attention(_, mid), Some(layers)) = (&mut plan.mid, self.mid_layers) {
            *mid = Some(motion(blocks - 1, layers));
        }
        plan.most_frames = self.most_frames;
        plan.over_frames = self.over_frames;
        plan.check()
    }
}
