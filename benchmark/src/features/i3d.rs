//! I3D: Inception inflated to three dimensions, trained on the actions of Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750);
//! the features of FVD and KVD.
//!
//! Reference: the PyTorch conversion whose tensors are called `Conv3d_1a_7x7.conv3d.weight`, ... Widths come from the shapes
//! of the weights.
//!
//! ```text
//! conv 7x7x7 /2 -> max 1x3x3 /(1,2,2) -> conv 1 -> conv 3 -> max 1x3x3 /(1,2,2) -> Mixed 3b 3c -> max 3x3x3 /2
//!   -> Mixed 4b .. 4f -> max 2x2x2 /2 -> Mixed 5b 5c -> mean 2x7x7 /1 -> classes -> mean over time
//! Mixed(x) = cat(conv1(x), conv3(conv1(x)), conv3(conv1(x)), conv1(max3(x)))
//! ```
//!
//! Each convolution is followed by a batch normalisation (eps 1e-5), which is folded into it, and ReLU. Padding is that of
//! TensorFlow's "SAME", also for maxima, where zeros are put in. A convolution over time is a sum of convolutions over height
//! and width, one for each tap, with time as part of the batch: B batch, T time, C channels, H height, W width.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use fulgur_lightnet::params::folder;

use super::layers::{BatchNorm, add_bias};
use super::{FeatureError, Shapes};

/// Sides of a frame.
pub const SIZE: usize = 224;
/// Fewest frames: time is halved three times, and then two moments are averaged.
pub const FEWEST_FRAMES: usize = 9;
/// Shape of the last map before its mean.
const LAST_SIDE: usize = 7;
const RGB: usize = 3;
const EPS: f64 = 1e-5;
const BLOCKS: [&str; 9] = ["3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"];
const BRANCHES: [(&str, usize); 6] = [
    ("b0", 1),
    ("b1a", 1),
    ("b1b", 3),
    ("b2a", 1),
    ("b2b", 3),
    ("b3b", 1),
];
const STEM: [(&str, usize); 3] = [("Conv3d_1a_7x7", 7), ("Conv3d_2b_1x1", 1), ("Conv3d_2c_3x3", 3)];
/// A tensor by which this network is known.
pub const MARK: &str = "Conv3d_1a_7x7.conv3d.weight";

/// Widths of an [`I3d`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct I3dConfig {
    /// Of the three convolutions before the blocks: 64, 64, 192.
    pub stem: [usize; 3],
    /// Of the branches b0, b1a, b1b, b2a, b2b, b3b of each block.
    pub blocks: [[usize; 6]; 9],
    /// Classes: 400.
    pub classes: usize,
}

impl Default for I3dConfig {
    fn default() -> Self {
        Self {
            stem: [64, 64, 192],
            blocks: [
                [64, 96, 128, 16, 32, 32],
                [128, 128, 192, 32, 96, 64],
                [192, 96, 208, 16, 48, 64],
                [160, 112, 224, 24, 64, 64],
                [128, 128, 256, 24, 64, 64],
                [112, 144, 288, 32, 64, 64],
                [256, 160, 320, 32, 128, 128],
                [256, 160, 320, 32, 128, 128],
                [384, 192, 384, 48, 128, 128],
            ],
            classes: 400,
        }
    }
}

impl I3dConfig {
    /// The widths that weights of these shapes have; the published ones for tensors that are missing, so that loading names them.
    pub fn of(shapes: &Shapes) -> Self {
        let usual = Self::default();
        let width = |name: String, usual: usize| {
            let first = shapes.get(&name).and_then(|shape| shape.first());
            first.copied().filter(|&width| width > 0).unwrap_or(usual)
        };
        let mut config = usual.clone();
        for (i, (name, _)) in STEM.iter().enumerate() {
            config.stem[i] = width(format!("{name}.conv3d.weight"), usual.stem[i]);
        }
        for (i, block) in BLOCKS.iter().enumerate() {
            for (j, (branch, _)) in BRANCHES.iter().enumerate() {
                let name = format!("Mixed_{block}.{branch}.conv3d.weight");
                config.blocks[i][j] = width(name, usual.blocks[i][j]);
            }
        }
        config.classes = width("logits.conv3d.weight".to_owned(), usual.classes);
        config
    }
}

/// Zeros before and behind an axis of `size`, as TensorFlow's "SAME" has them.
fn same(size: usize, kernel: usize, stride: usize) -> (usize, usize) {
    let rest = match size % stride {
        0 => stride,
        rest => rest,
    };
    let total = kernel.saturating_sub(rest);
    (total / 2, total - total / 2)
}

/// Moments `tap, tap + stride, ..` of `x` `[B, T, ..]`, `count` of them, as a batch `[B count, ..]`.
fn moments(x: &Tensor, tap: usize, stride: usize, count: usize) -> Result<Tensor> {
    let taken = if stride == 1 {
        x.narrow(1, tap, count)?.contiguous()?
    } else {
        let indices: Vec<u32> = (0..count).map(|i| (tap + i * stride) as u32).collect();
        x.index_select(&Tensor::new(indices, x.device())?, 1)?
    };
    taken.flatten(0, 1)
}

/// A convolution, its normalisation and ReLU.
#[derive(Clone, Debug)]
struct Unit {
    /// One kernel `[O, I, k, k]` for each moment.
    taps: Vec<Tensor>,
    bias: Tensor,
    stride: usize,
}

impl Unit {
    fn new(input: usize, output: usize, side: usize, stride: usize, vb: &VarBuilder) -> Result<Self> {
        let kernel = vb.get((output, input, side, side, side), "conv3d.weight")?;
        let norm = BatchNorm::new(output, EPS, &vb.pp("bn"))?;
        let (kernel, bias) = norm.fold(&kernel)?;
        let taps = (0..side)
            .map(|tap| kernel.narrow(2, tap, 1)?.squeeze(2)?.contiguous())
            .collect::<Result<_>>()?;
        Ok(Self { taps, bias, stride })
    }

    /// `[B, T, I, H, W]` to `[B, T / stride, O, H / stride, W / stride]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, time, channels, height, width) = x.dims5()?;
        let (side, stride) = (self.taps.len(), self.stride);
        let output = self.bias.elem_count();
        if side == 1 {
            let kernel = self.taps[0].reshape((1, output, channels))?;
            let flat = x.reshape((batch * time, channels, height * width))?;
            let y = add_bias(&kernel.broadcast_matmul(&flat)?, Some(&self.bias))?.relu()?;
            return y.reshape((batch, time, output, height, width));
        }
        let (before, behind) = same(time, side, stride);
        let (top, bottom) = same(height, side, stride);
        let (left, right) = same(width, side, stride);
        let x = x.pad_with_zeros(1, before, behind)?;
        // The convolution pads by itself where both sides get the same.
        let even = (top == bottom && top == left && left == right).then_some(top);
        let x = match even {
            Some(_) => x,
            None => x.pad_with_zeros(3, top, bottom)?.pad_with_zeros(4, left, right)?,
        };
        let count = time.div_ceil(stride);
        let mut sum: Option<Tensor> = None;
        for (tap, kernel) in self.taps.iter().enumerate() {
            let part = moments(&x, tap, stride, count)?.conv2d(kernel, even.unwrap_or(0), stride, 1, 1)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let Some(sum) = sum else {
            candle_core::bail!("a convolution without taps")
        };
        let y = add_bias(&sum, Some(&self.bias))?.relu()?;
        let (_, _, height, width) = y.dims4()?;
        y.reshape((batch, count, output, height, width))
    }
}

/// The largest value of windows of `[time, side, side]`, with zeros around.
fn max_pool(x: &Tensor, [time_side, side]: [usize; 2], [time_stride, stride]: [usize; 2]) -> Result<Tensor> {
    let (batch, time, channels, height, width) = x.dims5()?;
    let (top, bottom) = same(height, side, stride);
    let (left, right) = same(width, side, stride);
    let flat = x
        .flatten(0, 1)?
        .pad_with_zeros(2, top, bottom)?
        .pad_with_zeros(3, left, right)?
        .max_pool2d_with_stride(side, stride)?;
    let (_, _, height, width) = flat.dims4()?;
    let shape = |time: usize| (batch, time, channels, height, width);
    let (before, behind) = same(time, time_side, time_stride);
    let x = flat.reshape(shape(time))?.pad_with_zeros(1, before, behind)?;
    let count = time.div_ceil(time_stride);
    let mut most = moments(&x, 0, time_stride, count)?;
    for tap in 1..time_side {
        most = most.maximum(&moments(&x, tap, time_stride, count)?)?;
    }
    most.reshape(shape(count))
}

/// Four branches side by side.
#[derive(Clone, Debug)]
struct Mixed {
    branches: [Unit; 6],
}

impl Mixed {
    fn new(input: usize, widths: &[usize; 6], vb: &VarBuilder) -> Result<Self> {
        let unit = |i: usize, input: usize| {
            let (name, side) = BRANCHES[i];
            Unit::new(input, widths[i], side, 1, &vb.pp(name))
        };
        Ok(Self {
            branches: [
                unit(0, input)?,
                unit(1, input)?,
                unit(2, widths[1])?,
                unit(3, input)?,
                unit(4, widths[3])?,
                unit(5, input)?,
            ],
        })
    }

    fn output(widths: &[usize; 6]) -> usize {
        widths[0] + widths[2] + widths[4] + widths[5]
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [b0, b1a, b1b, b2a, b2b, b3b] = &self.branches;
        let parts = [
            b0.forward(x)?,
            b1b.forward(&b1a.forward(x)?)?,
            b2b.forward(&b2a.forward(x)?)?,
            b3b.forward(&max_pool(x, [3, 3], [1, 1])?)?,
        ];
        Tensor::cat(&parts, 2)
    }
}

/// The network.
#[derive(Clone, Debug)]
pub struct I3d {
    stem: [Unit; 3],
    blocks: Vec<Mixed>,
    classes: Tensor,
    bias: Tensor,
}

impl I3d {
    /// Takes the tensors of the published checkpoint from `vb`.
    pub fn new(config: &I3dConfig, vb: &VarBuilder) -> Result<Self> {
        let mut input = RGB;
        let mut unit = |i: usize, stride: usize| {
            let (name, side) = STEM[i];
            let unit = Unit::new(input, config.stem[i], side, stride, &vb.pp(name));
            input = config.stem[i];
            unit
        };
        let stem = [unit(0, 2)?, unit(1, 1)?, unit(2, 1)?];
        let mut blocks = Vec::with_capacity(BLOCKS.len());
        for (name, widths) in BLOCKS.iter().zip(&config.blocks) {
            blocks.push(Mixed::new(input, widths, &vb.pp(format!("Mixed_{name}")))?);
            input = Mixed::output(widths);
        }
        let logits = vb.pp("logits.conv3d");
        Ok(Self {
            stem,
            blocks,
            classes: logits
                .get((config.classes, input, 1, 1, 1), "weight")?
                .reshape((config.classes, input))?,
            bias: logits.get(config.classes, "bias")?,
        })
    }

    /// Loads the weights of `dir` onto `device`.
    ///
    /// # Errors
    /// There are none, or not those of an I3D: all tensors that differ are named.
    pub fn load(dir: &Path, device: &Device) -> std::result::Result<Self, FeatureError> {
        let config = I3dConfig::of(&super::shapes(dir)?);
        let counter = |name: &str| name.ends_with(".num_batches_tracked");
        Ok(folder::load(dir, DType::F32, device, counter, |_, vb| {
            Self::new(&config, vb)
        })?)
    }

    /// Clips `[B, 3, T, 224, 224]` from -1 to 1, of nine frames at least, to the mean logits `[B, classes]`.
    pub fn forward(&self, clips: &Tensor) -> Result<Tensor> {
        let (_, channels, time, height, width) = clips.dims5()?;
        let halved = |size: usize| size.div_ceil(32) == LAST_SIDE;
        if channels != RGB || time < FEWEST_FRAMES || !halved(height) || !halved(width) {
            candle_core::bail!(
                "i3d: found clips {:?}, expected [B, 3, T, {SIZE}, {SIZE}] with T of {FEWEST_FRAMES} at least",
                clips.dims()
            );
        }
        let x = clips.permute((0, 2, 1, 3, 4))?.contiguous()?;
        let x = max_pool(&self.stem[0].forward(&x)?, [1, 3], [1, 2])?;
        let x = self.stem[2].forward(&self.stem[1].forward(&x)?)?;
        let mut x = max_pool(&x, [1, 3], [1, 2])?;
        for (name, block) in BLOCKS.iter().zip(&self.blocks) {
            match *name {
                "4b" => x = max_pool(&x, [3, 3], [2, 2])?,
                "5b" => x = max_pool(&x, [2, 2], [2, 2])?,
                _ => {}
            }
            x = block.forward(&x)?;
        }
        let x = x.mean(4)?.mean(3)?;
        let pairs = x.dim(1)? - 1;
        let x = ((x.narrow(1, 0, pairs)? + x.narrow(1, 1, pairs)?)? * 0.5)?;
        // The classes are linear, so that their mean over time is that of their inputs.
        x.mean(1)?.matmul(&self.classes.t()?)?.broadcast_add(&self.bias)
    }
}

/// Whether weights of these shapes are those of an I3D.
pub fn recognises(shapes: &BTreeMap<String, Vec<usize>>) -> bool {
    shapes.contains_key(MARK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::testing::{golden, golden_weights, relative_rms};

    #[test]
    fn paddings_are_those_of_tensorflow() {
        assert_eq!(same(224, 7, 2), (2, 3));
        assert_eq!(same(9, 7, 2), (3, 3));
        assert_eq!(same(56, 3, 2), (0, 1));
        assert_eq!(same(7, 3, 2), (1, 1));
        assert_eq!(same(5, 3, 1), (1, 1));
        assert_eq!(same(4, 2, 2), (0, 0));
        assert_eq!(same(5, 2, 2), (0, 1));
        assert_eq!(same(5, 1, 1), (0, 0));
    }

    /// Waves of colour, so that the file need not hold them.
    fn clips(time: usize) -> Tensor {
        let mut values = Vec::with_capacity(RGB * time * SIZE * SIZE);
        for c in 0..RGB {
            for t in 0..time {
                for y in 0..SIZE {
                    for x in 0..SIZE {
                        let phase = 0.07 * x as f64 + 0.11 * y as f64 + 0.9 * t as f64 + 2.0 * c as f64;
                        values.push((phase.sin() * (0.013 * x as f64 * (t + 1) as f64).cos()) as f32);
                    }
                }
            }
        }
        Tensor::from_vec(values, (1, RGB, time, SIZE, SIZE), &Device::Cpu).unwrap()
    }

    #[test]
    fn equals_a_plain_transcription_in_torch() {
        let tensors = golden("i3d");
        let (weights, outputs) = golden_weights(&tensors);
        let shapes = weights
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect();
        let config = I3dConfig::of(&shapes);
        assert_eq!((config.stem, config.classes), ([4, 4, 12], 10));
        let vb = VarBuilder::from_tensors(weights.into_iter().collect(), DType::F32, &Device::Cpu);
        let network = I3d::new(&config, &vb).unwrap();
        for time in [9, 16] {
            let found = network.forward(&clips(time)).unwrap();
            let apart = relative_rms(&found, &outputs[&format!("logits.{time}")]);
            assert!(apart < 2e-5, "{time}: {apart}");
        }
        for bad in [
            Tensor::zeros((1, 3, 8, 224, 224), DType::F32, &Device::Cpu).unwrap(),
            Tensor::zeros((1, 3, 9, 225, 224), DType::F32, &Device::Cpu).unwrap(),
            Tensor::zeros((1, 4, 9, 224, 224), DType::F32, &Device::Cpu).unwrap(),
        ] {
            assert!(
                network
                    .forward(&bad)
                    .unwrap_err()
                    .to_string()
                    .starts_with("i3d: found")
            );
        }
    }

    #[test]
    fn the_published_widths_are_the_usual_ones() {
        let outline = fulgur_lightnet::params::Outline::new();
        I3d::new(&I3dConfig::default(), &outline.builder()).unwrap();
        // What the transcription counts at these widths: weights, norms with their statistics, and classes.
        assert_eq!(outline.count(), 12_711_824);
        assert_eq!(I3dConfig::of(&outline.shapes()), I3dConfig::default());
        assert!(recognises(&outline.shapes()));
    }
}
