//! Residual blocks of two convolutions, between which the step of time is added.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::linear::{Linear, Start};

use super::{Activation, Conv2d, GroupNorm};

/// What a residual block is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetShape {
    /// Channels of the input.
    pub(crate) input: usize,
    /// Channels of the result.
    pub(crate) output: usize,
    /// Width of the vector of the step of time, where it is added.
    pub(crate) time: Option<usize>,
    /// Whether that vector also scales what is normed.
    pub(crate) scale_shift: bool,
    /// Groups of the norms.
    pub(crate) groups: usize,
    /// Added to variances.
    pub(crate) eps: f64,
    /// Before each convolution.
    pub(crate) activation: Activation,
    /// What the sum is divided by.
    pub(crate) divisor: f64,
}

/// `x + conv(act(norm(conv(act(norm(x))) + time)))`.
#[derive(Clone, Debug)]
pub(crate) struct Resnet {
    shape: ResnetShape,
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Resnet {
    /// Takes `norm1`, `conv1`, `norm2`, `conv2`; `time_emb_proj` where there is time, `conv_shortcut` where the channels change.
    pub(crate) fn new(shape: ResnetShape, vb: &VarBuilder) -> Result<Self> {
        let ResnetShape {
            input,
            output,
            groups,
            eps,
            ..
        } = shape;
        let width = if shape.scale_shift { 2 * output } else { output };
        let time = shape
            .time
            .map(|time| Linear::new(time, width, true, Start::FanIn, &vb.pp("time_emb_proj")));
        let shortcut = (input != output).then(|| Conv2d::new(input, output, 1, &vb.pp("conv_shortcut")));
        Ok(Self {
            shape,
            norm1: GroupNorm::new(groups, input, eps, &vb.pp("norm1"))?,
            conv1: Conv2d::new(input, output, 3, &vb.pp("conv1"))?,
            time: time.transpose()?,
            norm2: GroupNorm::new(groups, output, eps, &vb.pp("norm2"))?,
            conv2: Conv2d::new(output, output, 3, &vb.pp("conv2"))?,
            shortcut: shortcut.transpose()?,
        })
    }

    /// Maps `x` `[P, H, W, input]` to `[P, H, W, output]`. `time` `[B, T]` is the vector of the step after the activation, where P is B
    /// times the frames of a clip; norms take `sets` sets of statistics: P, or B where frames share them.
    pub(crate) fn forward(&self, x: &Tensor, time: Option<&Tensor>, sets: usize) -> Result<Tensor> {
        let activation = self.shape.activation;
        let mut h = self.conv1.forward(&self.norm1.activated(x, sets, activation)?)?;
        let mut scale = None;
        if let (Some(map), Some(time)) = (&self.time, time) {
            let time = map.forward(time)?;
            let clips = time.dim(0)?;
            match self.shape.scale_shift {
                false => h = each_clip(&h, clips, |h| h.broadcast_add(&time.unsqueeze(1)?))?,
                true => scale = Some(time),
            }
        }
        let h = match scale {
            None => self.norm2.activated(&h, sets, activation)?,
            Some(time) => {
                let time = time.unsqueeze(1)?;
                let output = self.shape.output;
                let (scale, shift) = (
                    (time.narrow(2, 0, output)? + 1.0)?,
                    time.narrow(2, output, output)?,
                );
                let h = each_clip(&self.norm2.forward(&h, sets)?, time.dim(0)?, |h| {
                    h.broadcast_mul(&scale)?.broadcast_add(&shift)
                })?;
                activation.forward(&h)?
            }
        };
        let h = self.conv2.forward(&h)?;
        let x = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x)?,
            None => x.clone(),
        };
        let sum = (x + h)?;
        match self.shape.divisor == 1.0 {
            true => Ok(sum),
            false => sum / self.shape.divisor,
        }
    }
}

/// Applies `f` to the places of each clip, `[B, F H W, C]`.
fn each_clip(x: &Tensor, clips: usize, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let channels = x.dim(3)?;
    f(&x.reshape((clips, (), channels))?)?.reshape(x.shape())
}
