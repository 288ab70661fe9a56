//! A UNet as it is built: what the configurations of several libraries come to.

use candle_core::Result;

use super::super::layers::Activation;
use super::super::limits::{
    MOST_BLOCKS, MOST_CHANNELS, MOST_FRAMES, MOST_LAYERS, MOST_TAPS, as_long, in_groups, positive, within,
};

/// Attention of a block to its own places and to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionPlan {
    /// Number of heads.
    pub(crate) heads: usize,
    /// Width of the states of the text.
    pub(crate) context: usize,
    /// Transformer blocks a layer.
    pub(crate) layers: usize,
    /// Whether what should attend to its own places reads the text instead.
    pub(crate) only_text: bool,
}

/// Layers at one resolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockPlan {
    /// Width.
    pub(crate) channels: usize,
    /// Residual blocks.
    pub(crate) layers: usize,
    /// After each residual block.
    pub(crate) attention: Option<AttentionPlan>,
    /// After that.
    pub(crate) motion: Option<MotionPlan>,
}

/// Attention of a block along the frames of a clip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MotionPlan {
    /// Number of heads.
    pub(crate) heads: usize,
    /// Transformer blocks a layer.
    pub(crate) layers: usize,
}

/// The narrowest place of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MidPlan {
    /// There is none.
    Absent,
    /// A residual block.
    Resnet,
    /// Residual blocks around attention, and around motion.
    Attention(AttentionPlan, Option<MotionPlan>),
}

/// Whose values norms take together where there are several frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OverFrames {
    /// Whether residual blocks and the last norm take all frames together.
    pub(crate) resnets: bool,
    /// Whether the norms at the entry of motion modules do.
    pub(crate) motion: bool,
}

/// The whole network. Blocks go up in the order in which they run: the widest, at the smallest sides, first.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plan {
    pub(crate) in_channels: usize,
    pub(crate) out_channels: usize,
    pub(crate) conv_in_kernel: usize,
    pub(crate) conv_out_kernel: usize,
    /// Whether samples come as pictures in [0, 1].
    pub(crate) center_input: bool,
    pub(crate) flip_sin_to_cos: bool,
    pub(crate) freq_shift: f64,
    pub(crate) time_width: usize,
    pub(crate) down: Vec<BlockPlan>,
    pub(crate) mid: MidPlan,
    pub(crate) up: Vec<BlockPlan>,
    pub(crate) downsample_padding: usize,
    pub(crate) mid_divisor: f64,
    pub(crate) activation: Activation,
    /// Before the last convolution.
    pub(crate) last_activation: Activation,
    pub(crate) groups: usize,
    pub(crate) eps: f64,
    pub(crate) scale_shift: bool,
    pub(crate) linear_projection: bool,
    pub(crate) upcast: bool,
    pub(crate) over_frames: OverFrames,
    /// Most frames of a clip; 1 without motion.
    pub(crate) most_frames: usize,
}

impl Plan {
    /// Width of the states of the text, where they are read.
    pub(crate) fn context(&self) -> Option<usize> {
        let blocks = self.down.iter().chain(&self.up);
        let mid = match self.mid {
            MidPlan::Attention(attention, _) => Some(attention),
            MidPlan::Absent | MidPlan::Resnet => None,
        };
        blocks
            .filter_map(|block| block.attention)
            .chain(mid)
            .map(|attention| attention.context)
            .next()
    }

    /// Whether there is attention along frames.
    pub(crate) fn has_motion(&self) -> bool {
        self.down.iter().any(|block| block.motion.is_some())
    }

    /// Refuses what cannot be built.
    pub(crate) fn check(&self) -> Result<()> {
        let blocks = self.down.len();
        within("block_out_channels", blocks, MOST_BLOCKS)?;
        as_long("up_block_types", self.up.len(), blocks)?;
        within("in_channels", self.in_channels, MOST_CHANNELS)?;
        within("out_channels", self.out_channels, MOST_CHANNELS)?;
        within("conv_in_kernel", self.conv_in_kernel, MOST_TAPS)?;
        within("conv_out_kernel", self.conv_out_kernel, MOST_TAPS)?;
        for (field, size) in [
            ("conv_in_kernel", self.conv_in_kernel),
            ("conv_out_kernel", self.conv_out_kernel),
        ] {
            if size.is_multiple_of(2) {
                candle_core::bail!("{field} is {size}, expected an odd number");
            }
        }
        within("time_embedding_dim", self.time_width, 4 * MOST_CHANNELS)?;
        within("motion_max_seq_length", self.most_frames, MOST_FRAMES)?;
        positive("norm_eps", self.eps)?;
        positive("mid_block_scale_factor", self.mid_divisor)?;
        if self.downsample_padding > 1 {
            candle_core::bail!(
                "downsample_padding is {}, expected 0 or 1",
                self.downsample_padding
            );
        }
        if !self.freq_shift.is_finite() {
            candle_core::bail!("freq_shift is {}, expected a number", self.freq_shift);
        }
        let mut widths = Vec::new();
        for block in self.down.iter().chain(&self.up) {
            within("block_out_channels", block.channels, MOST_CHANNELS)?;
            in_groups("block_out_channels", block.channels, self.groups)?;
            within("layers_per_block", block.layers, MOST_LAYERS)?;
            attention(block.attention, block.channels)?;
            motion(block.motion, block.channels)?;
            widths.extend(block.attention.map(|attention| attention.context));
        }
        if let MidPlan::Attention(mid, over) = self.mid {
            let channels = self.down.last().map_or(0, |block| block.channels);
            attention(Some(mid), channels)?;
            motion(over, channels)?;
            widths.push(mid.context);
        }
        if let Some(pair) = widths.windows(2).find(|pair| pair[0] != pair[1]) {
            candle_core::bail!(
                "cross_attention_dim is {} and {}, expected one width of the states of a text",
                pair[0],
                pair[1]
            );
        }
        Ok(())
    }
}

fn attention(plan: Option<AttentionPlan>, channels: usize) -> Result<()> {
    let Some(plan) = plan else { return Ok(()) };
    within("attention_head_dim (the number of heads)", plan.heads, channels)?;
    within("cross_attention_dim", plan.context, MOST_CHANNELS)?;
    within("transformer_layers_per_block", plan.layers, MOST_LAYERS)
}

fn motion(plan: Option<MotionPlan>, channels: usize) -> Result<()> {
    let Some(plan) = plan else { return Ok(()) };
    within("motion_num_attention_heads", plan.heads, channels)?;
    if !channels.is_multiple_of(plan.heads) {
        candle_core::bail!(
            "motion_num_attention_heads is {}, expected a divisor of the {channels} channels",
            plan.heads
        );
    }
    within("temporal_transformer_layers_per_block", plan.layers, MOST_LAYERS)
}
