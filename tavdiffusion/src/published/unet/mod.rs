//! The UNet of latent diffusion over pictures, spectrograms and clips (Rombach et al., 2022; Guo et al., 2023).
//!
//! Reference: `UNet2DConditionModel` and `UNetMotionModel` of diffusers.
//!
//! ```text
//! x = conv(sample);  down: blocks at half the sides each, all results kept;  mid;  up: [x | kept] at twice the sides each;  conv(act(norm(x)))
//! layer = residual block (+ time), transformer over places (+ text), motion module over frames
//! ```
//!
//! The frames of a clip are pictures one after the other, `[B F, H, W, C]`.

mod config;
mod load;
mod motion;
mod names;
mod plan;
mod shapes;

pub use config::{MotionAdapterConfig, MotionUnetConfig, UnetConfig};
pub use load::UnetSizes;
pub use names::UnetNames;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarBuilder;
use fulgur_kernels::tape::recompute;

use self::motion::{MotionModule, MotionShape};
use self::plan::{AttentionPlan, BlockPlan, MidPlan, MotionPlan, Plan};
use super::layers::{
    Conv2d, Downsample, GroupNorm, Padding, Resnet, ResnetShape, TimeEmbedding, TimeShape, Transformer,
    TransformerShape, Upsample,
};

/// A residual block and what follows it.
#[derive(Clone, Debug)]
struct Layer {
    resnet: Resnet,
    attention: Option<Transformer>,
}

impl Layer {
    /// Maps `x` `[B F, H, W, C]` with `sets` sets of statistics of the norms, the pictures of `clips` clips.
    fn forward(
        &self,
        motion: Option<&MotionModule>,
        x: &Tensor,
        time: &Tensor,
        text: Option<&Tensor>,
        [sets, clips]: [usize; 2],
    ) -> Result<Tensor> {
        let mut x = self.resnet.forward(x, Some(time), sets)?;
        if let (Some(attention), Some(text)) = (&self.attention, text) {
            x = attention.forward(&x, text)?;
        }
        match motion {
            Some(motion) => motion.forward(&x, clips),
            None => Ok(x),
        }
    }
}

/// Layers at one resolution on the way down.
#[derive(Clone, Debug)]
struct Down {
    layers: Vec<Layer>,
    downsample: Option<Downsample>,
}

/// Layers at one resolution on the way up.
#[derive(Clone, Debug)]
struct Up {
    layers: Vec<Layer>,
    upsample: Option<Upsample>,
}

/// The narrowest place.
#[derive(Clone, Debug)]
struct Mid {
    first: Resnet,
    /// Attention, and the last residual block.
    rest: Option<(Transformer, Resnet)>,
}

/// The motion modules of all layers: a file of their own may hold them.
#[derive(Clone, Debug)]
struct Motions {
    down: Vec<Vec<MotionModule>>,
    mid: Option<MotionModule>,
    up: Vec<Vec<MotionModule>>,
}

/// A UNet with its weights.
#[derive(Clone, Debug)]
pub struct Unet {
    plan: Plan,
    input: Conv2d,
    time: TimeEmbedding,
    down: Vec<Down>,
    mid: Option<Mid>,
    up: Vec<Up>,
    norm: GroupNorm,
    output: Conv2d,
    motions: Option<Motions>,
    recompute: bool,
}

/// A pass that is under way: what the parts of the network hand on.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    /// `[B F, H, W, C]`.
    pub(crate) x: Tensor,
    /// Results of the way down, the last first to be taken.
    kept: Vec<Tensor>,
    /// Vectors of the steps of time after the activation, `[B, T]`.
    time: Tensor,
    text: Option<Tensor>,
    clips: usize,
    frames: usize,
    /// Whether the sample had an axis of frames.
    is_clip: bool,
}

impl Running {
    /// How many clips, or pictures, the batch holds.
    pub(crate) fn clips(&self) -> usize {
        self.clips
    }
}

/// Builds the parts of a network.
struct Builder<'a> {
    plan: &'a Plan,
}

impl Builder<'_> {
    fn resnet(&self, input: usize, output: usize, divisor: f64, vb: &VarBuilder) -> Result<Resnet> {
        let plan = self.plan;
        let shape = ResnetShape {
            input,
            output,
            time: Some(plan.time_width),
            scale_shift: plan.scale_shift,
            groups: plan.groups,
            eps: plan.eps,
            activation: plan.activation,
            divisor,
        };
        Resnet::new(shape, vb)
    }

    fn attention(&self, channels: usize, attention: AttentionPlan, vb: &VarBuilder) -> Result<Transformer> {
        let shape = TransformerShape {
            channels,
            heads: attention.heads,
            context: attention.context,
            layers: attention.layers,
            groups: self.plan.groups,
            linear: self.plan.linear_projection,
            upcast: self.plan.upcast,
            only_text: attention.only_text,
        };
        Transformer::new(&shape, vb)
    }

    fn motion(&self, channels: usize, motion: MotionPlan, vb: &VarBuilder) -> Result<MotionModule> {
        let shape = MotionShape {
            channels,
            groups: self.plan.groups,
            most_frames: self.plan.most_frames,
            over_frames: self.plan.over_frames.motion,
        };
        MotionModule::new(motion, &shape, vb)
    }

    /// All motion modules, where there are any.
    fn motions(&self, vb: &VarBuilder) -> Result<Option<Motions>> {
        let of_blocks = |blocks: &[BlockPlan], name: &str| {
            let of_block = |(i, block): (usize, &BlockPlan)| {
                let vb = vb.pp(name).pp(i).pp("motion_modules");
                let layers = block
                    .motion
                    .into_iter()
                    .flat_map(|plan| (0..block.layers).map(move |j| (plan, j)));
                layers
                    .map(|(plan, j)| self.motion(block.channels, plan, &vb.pp(j)))
                    .collect()
            };
            blocks
                .iter()
                .enumerate()
                .map(of_block)
                .collect::<Result<Vec<Vec<_>>>>()
        };
        if !self.plan.has_motion() {
            return Ok(None);
        }
        let mid = match self.plan.mid {
            MidPlan::Attention(_, Some(plan)) => {
                let channels = self.plan.down.last().map_or(0, |block| block.channels);
                Some(self.motion(channels, plan, &vb.pp("mid_block.motion_modules.0"))?)
            }
            _ => None,
        };
        Ok(Some(Motions {
            down: of_blocks(&self.plan.down, "down_blocks")?,
            mid,
            up: of_blocks(&self.plan.up, "up_blocks")?,
        }))
    }

    /// Layer `j` of a block.
    fn layer(&self, block: &BlockPlan, input: usize, j: usize, vb: &VarBuilder) -> Result<Layer> {
        let channels = block.channels;
        let attention = block
            .attention
            .map(|plan| self.attention(channels, plan, &vb.pp("attentions").pp(j)));
        Ok(Layer {
            resnet: self.resnet(input, channels, 1.0, &vb.pp("resnets").pp(j))?,
            attention: attention.transpose()?,
        })
    }

    fn down(&self, vb: &VarBuilder) -> Result<Vec<Down>> {
        let blocks = &self.plan.down;
        let padding = match self.plan.downsample_padding {
            0 => Padding::After,
            width => Padding::Even(width),
        };
        let block = |(i, block): (usize, &BlockPlan)| {
            let vb = vb.pp("down_blocks").pp(i);
            let before = blocks[i.saturating_sub(1)].channels;
            let layers = (0..block.layers)
                .map(|j| self.layer(block, if j == 0 { before } else { block.channels }, j, &vb))
                .collect::<Result<_>>()?;
            let downsample = (i + 1 < blocks.len())
                .then(|| Downsample::new(block.channels, padding, &vb.pp("downsamplers.0")));
            Ok(Down {
                layers,
                downsample: downsample.transpose()?,
            })
        };
        blocks.iter().enumerate().map(block).collect()
    }

    fn mid(&self, vb: &VarBuilder) -> Result<Option<Mid>> {
        let channels = self.plan.down.last().map_or(0, |block| block.channels);
        let vb = vb.pp("mid_block");
        let resnet =
            |j: usize| self.resnet(channels, channels, self.plan.mid_divisor, &vb.pp("resnets").pp(j));
        let rest = match self.plan.mid {
            MidPlan::Absent => return Ok(None),
            MidPlan::Resnet => None,
            MidPlan::Attention(attention, _) => Some((
                self.attention(channels, attention, &vb.pp("attentions.0"))?,
                resnet(1)?,
            )),
        };
        Ok(Some(Mid {
            first: resnet(0)?,
            rest,
        }))
    }

    fn up(&self, vb: &VarBuilder) -> Result<Vec<Up>> {
        let blocks = &self.plan.up;
        let block = |(i, block): (usize, &BlockPlan)| {
            let vb = vb.pp("up_blocks").pp(i);
            let below = blocks[i.saturating_sub(1)].channels;
            // What is kept last at a resolution comes from the one with larger sides.
            let above = blocks[(i + 1).min(blocks.len() - 1)].channels;
            let layers = (0..block.layers)
                .map(|j| {
                    let own = if j == 0 { below } else { block.channels };
                    let kept = if j + 1 == block.layers {
                        above
                    } else {
                        block.channels
                    };
                    self.layer(block, own + kept, j, &vb)
                })
                .collect::<Result<_>>()?;
            let upsample =
                (i + 1 < blocks.len()).then(|| Upsample::new(block.channels, &vb.pp("upsamplers.0")));
            Ok(Up {
                layers,
                upsample: upsample.transpose()?,
            })
        };
        blocks.iter().enumerate().map(block).collect()
    }
}

impl Unet {
    /// A UNet over pictures, with the tensors of `vb` by the names of diffusers.
    ///
    /// # Errors
    /// A network that cannot be; a tensor that is missing or has another shape.
    pub fn new(config: &UnetConfig, vb: &VarBuilder) -> Result<Self> {
        Self::of_plan(config.plan()?, vb)
    }

    /// A UNet over clips.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn over_clips(config: &MotionUnetConfig, vb: &VarBuilder) -> Result<Self> {
        Self::of_plan(config.plan()?, vb)
    }

    /// A UNet over pictures with motion modules.
    ///
    /// # Errors
    /// As [`Self::new`]; modules of another network.
    pub fn with_motion(config: &UnetConfig, motion: &MotionAdapterConfig, vb: &VarBuilder) -> Result<Self> {
        Self::of_plan(motion.plan(config)?, vb)
    }

    pub(crate) fn of_plan(plan: Plan, vb: &VarBuilder) -> Result<Self> {
        plan.check()?;
        let builder = Builder { plan: &plan };
        let widest = plan.down[0].channels;
        let time = TimeShape {
            waves: widest,
            output: plan.time_width,
            flip: plan.flip_sin_to_cos,
            shift: plan.freq_shift,
            activation: plan.activation,
        };
        Ok(Self {
            input: Conv2d::new(plan.in_channels, widest, plan.conv_in_kernel, &vb.pp("conv_in"))?,
            time: TimeEmbedding::new(time, &vb.pp("time_embedding"))?,
            down: builder.down(vb)?,
            mid: builder.mid(vb)?,
            up: builder.up(vb)?,
            norm: GroupNorm::new(plan.groups, widest, plan.eps, &vb.pp("conv_norm_out"))?,
            output: Conv2d::new(
                widest,
                plan.out_channels,
                plan.conv_out_kernel,
                &vb.pp("conv_out"),
            )?,
            motions: builder.motions(vb)?,
            recompute: false,
            plan,
        })
    }

    /// Puts the motion modules of `plan`, whose layers are those of this network, between its layers.
    fn set_in_motion(&mut self, plan: Plan, motions: Option<Motions>) {
        self.plan = plan;
        self.motions = motions;
    }

    /// Whether a step of training keeps the results of layers alone, and makes what lies within them again on its way back: less memory
    /// for more time.
    pub fn set_recompute(&mut self, recompute: bool) {
        self.recompute = recompute;
    }

    /// The waves `[B, W]` of B steps of time, f32 on the CPU, which [`Self::forward`] takes in place of the steps: then it asks a device
    /// for nothing.
    ///
    /// # Errors
    /// A failing operation.
    pub fn waves(&self, steps: &[f32]) -> Result<Tensor> {
        self.time.waves(steps)
    }

    /// Channels of the sample.
    #[must_use]
    pub fn in_channels(&self) -> usize {
        self.plan.in_channels
    }

    /// Width of the states of the text that are read, where they are.
    #[must_use]
    pub fn context(&self) -> Option<usize> {
        self.plan.context()
    }

    /// Channels at the narrowest place.
    #[must_use]
    pub fn bottleneck(&self) -> usize {
        self.plan.down.last().map_or(0, |block| block.channels)
    }

    /// Most frames of a clip, where the network is one over clips.
    #[must_use]
    pub fn most_frames(&self) -> Option<usize> {
        self.plan.has_motion().then_some(self.plan.most_frames)
    }

    /// What the network predicts for `sample` `[B, C, H, W]`, or `[B, C, F, H, W]` over clips, of sides of any size, at the steps
    /// `timestep` `[B]`, or their [`Self::waves`], reading `text` `[B, L, c]`, which is given once a clip: the shape of `sample`, with the channels of the output.
    ///
    /// # Errors
    /// Shapes that do not fit, more frames than there are places for, no text where one is read.
    pub fn forward(&self, sample: &Tensor, timestep: &Tensor, text: Option<&Tensor>) -> Result<Tensor> {
        let mut running = self.encode(sample, timestep, text)?;
        self.middle(&mut running)?;
        self.decode(running)
    }

    /// The way down.
    pub(crate) fn encode(
        &self,
        sample: &Tensor,
        timestep: &Tensor,
        text: Option<&Tensor>,
    ) -> Result<Running> {
        let (x, clips, frames) = self.pictures(sample)?;
        if timestep.dims() != [clips] && timestep.dims() != [clips, self.plan.down[0].channels] {
            bail!(
                "timestep is {:?}, expected [{clips}], one a sample",
                timestep.dims()
            );
        }
        if let Some(width) = self.context() {
            match text {
                Some(text) if text.rank() == 3 && text.dim(0)? == clips && text.dim(2)? == width => {}
                Some(text) => bail!(
                    "encoder_hidden_states is {:?}, expected [{clips}, L, {width}]",
                    text.dims()
                ),
                None => bail!("encoder_hidden_states is missing, expected [{clips}, L, {width}]"),
            }
        }
        let x = match self.plan.center_input {
            true => ((x * 2.0)? - 1.0)?,
            false => x,
        };
        let text = text.map(|text| text.to_dtype(x.dtype())).transpose()?;
        let time = self.time.forward(timestep, x.dtype())?;
        let mut running = Running {
            x: self.input.forward(&x)?,
            kept: Vec::new(),
            time: self.plan.activation.forward(&time)?,
            text,
            clips,
            frames,
            is_clip: sample.rank() == 5,
        };
        running.kept.push(running.x.clone());
        let motions = self.motions.as_ref();
        for (i, block) in self.down.iter().enumerate() {
            for (j, layer) in block.layers.iter().enumerate() {
                running.x = self.run(layer, module(motions.map(|m| &m.down), i, j), &running)?;
                running.kept.push(running.x.clone());
            }
            if let Some(downsample) = &block.downsample {
                running.x = downsample.forward(&running.x)?;
                running.kept.push(running.x.clone());
            }
        }
        Ok(running)
    }

    /// The narrowest place.
    pub(crate) fn middle(&self, running: &mut Running) -> Result<()> {
        let Some(mid) = &self.mid else {
            return Ok(());
        };
        let sets = self.sets(running);
        let time = Some(running.time.clone());
        let mut x = mid.first.forward(&running.x, time.as_ref(), sets)?;
        if let Some((attention, last)) = &mid.rest {
            if let Some(text) = &running.text {
                x = attention.forward(&x, text)?;
            }
            if let Some(motion) = self.motions.as_ref().and_then(|m| m.mid.as_ref()) {
                x = motion.forward(&x, running.clips)?;
            }
            x = last.forward(&x, time.as_ref(), sets)?;
        }
        running.x = x;
        Ok(())
    }

    /// The way up.
    pub(crate) fn decode(&self, mut running: Running) -> Result<Tensor> {
        let motions = self.motions.as_ref();
        for (i, block) in self.up.iter().enumerate() {
            for (j, layer) in block.layers.iter().enumerate() {
                let Some(kept) = running.kept.pop() else {
                    bail!("no result of the way down is left");
                };
                running.x = Tensor::cat(&[&running.x, &kept], 3)?;
                running.x = self.run(layer, module(motions.map(|m| &m.up), i, j), &running)?;
            }
            if let Some(upsample) = &block.upsample {
                let size = match running.kept.last() {
                    Some(kept) => Some([kept.dim(1)?, kept.dim(2)?]),
                    None => None,
                };
                running.x = upsample.forward(&running.x, size)?;
            }
        }
        let active = self
            .norm
            .activated(&running.x, self.sets(&running), self.plan.last_activation)?;
        let x = self.output.forward(&active)?;
        let (_, height, width, channels) = x.dims4()?;
        match running.is_clip {
            false => x.permute((0, 3, 1, 2))?.contiguous(),
            true => x
                .reshape((running.clips, running.frames, height, width, channels))?
                .permute((0, 4, 1, 2, 3))?
                .contiguous(),
        }
    }

    /// `[B, C, H, W]` or `[B, C, F, H, W]` to pictures `[B F, H, W, C]`, with the numbers of clips and frames.
    fn pictures(&self, sample: &Tensor) -> Result<(Tensor, usize, usize)> {
        let channels = self.plan.in_channels;
        let most = self.plan.most_frames;
        let (x, clips, frames) = match *sample.dims() {
            [clips, c, height, width] if c == channels && height * width > 0 => {
                (sample.permute((0, 2, 3, 1))?, clips, 1)
            }
            [clips, c, frames, height, width] if c == channels && frames * height * width > 0 => {
                let x = sample.permute((0, 2, 3, 4, 1))?.contiguous()?;
                (x.reshape((clips * frames, height, width, c))?, clips, frames)
            }
            _ => bail!(
                "sample is {:?}, expected [B, {channels}, H, W] or [B, {channels}, F, H, W]",
                sample.dims()
            ),
        };
        if frames > most {
            bail!(
                "sample has {frames} frames, expected at most {most} (motion_max_seq_length): longer clips need windows"
            );
        }
        Ok((x.contiguous()?, clips, frames))
    }

    /// How many sets of statistics the norms of residual blocks take.
    fn sets(&self, running: &Running) -> usize {
        match self.plan.over_frames.resnets {
            true => running.clips,
            false => running.clips * running.frames,
        }
    }

    fn run(&self, layer: &Layer, motion: Option<&MotionModule>, running: &Running) -> Result<Tensor> {
        let sets = self.sets(running);
        if !self.recompute {
            let Running {
                x, time, text, clips, ..
            } = running;
            return layer.forward(motion, x, time, text.as_ref(), [sets, *clips]);
        }
        let (layer, motion, clips) = (layer.clone(), motion.cloned(), running.clips);
        let (x, time, text) = (running.x.clone(), running.time.clone(), running.text.clone());
        let made = recompute(move || {
            let x = layer.forward(motion.as_ref(), &x, &time, text.as_ref(), [sets, clips])?;
            Ok(vec![x])
        })?;
        match made.into_iter().next() {
            Some(x) => Ok(x),
            None => bail!("a layer gave nothing"),
        }
    }

    /// Element type of the weights: samples of it are computed in it without rounding weights at each call.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.input.weight().dtype()
    }

    /// Device of the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.input.weight().device()
    }
}

/// The module of layer `j` of block `i`, where there is one.
fn module(blocks: Option<&Vec<Vec<MotionModule>>>, i: usize, j: usize) -> Option<&MotionModule> {
    blocks?.get(i)?.get(j)
}

#[cfg(test)]
mod tests;
