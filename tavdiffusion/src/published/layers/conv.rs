//! Convolutions of channels-last tensors, as matrix products.
//!
//! ```text
//! y[p] = sum over taps k of x[p + offset_k] W_k^T + b
//! ```
//!
//! A padded picture is a list of rows of C channels; the neighbours that a tap reads are the same list, shifted. So the rows of all taps
//! lie side by side after one copy a tap, and one product of width `taps C` gives the result, border rows included, which are cut off.
//! Products are taken of so many rows at a time as fit a budget: the copies stay in cache on a processor, and bounded on a GPU.
//!
//! A transposed convolution is one product into all taps of all inputs, of which those that fall on the same place are added.

use candle_core::{Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::convolution::convolution;
use fulgur_kernels::linear::linear;
use fulgur_kernels::unfold::{Window, unfold};

use super::vector;

/// Values of neighbours that lie side by side at a time, on a processor and on a GPU.
const CPU_BUDGET: usize = 1 << 20;
const GPU_BUDGET: usize = 1 << 28;

/// A kernel [O, I, ..] as the matrix [O, taps I] of the product.
#[derive(Clone, Debug)]
enum Kernel {
    /// Turned once.
    Turned(Tensor),
    /// As it lies in checkpoints: turned at each call while it is trained.
    Trained(Tensor),
}

impl Kernel {
    fn new(weight: Tensor) -> Result<Self> {
        // Weights without values, of an outline, are one zero seen at every place, and must not come to take memory.
        Ok(match weight.track_op() || !weight.is_contiguous() {
            true => Self::Trained(weight),
            false => Self::Turned(turned(&weight)?),
        })
    }

    fn matrix(&self) -> Result<Tensor> {
        match self {
            Self::Turned(matrix) => Ok(matrix.clone()),
            Self::Trained(weight) => turned(weight),
        }
    }
}

/// `[O, I, ..]` to `[O, taps I]`, taps outside.
fn turned(weight: &Tensor) -> Result<Tensor> {
    let (output, input) = (weight.dim(0)?, weight.dim(1)?);
    let taps = weight.elem_count() / (output * input).max(1);
    weight
        .reshape((output, input, taps))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((output, taps * input))
}

fn start(fan_in: usize) -> Init {
    Init::Randn {
        mean: 0.0,
        stdev: (fan_in as f64).powf(-0.5),
    }
}

/// How many places go through one product, each with `width` values of its neighbours.
fn places_at_a_time(x: &Tensor, width: usize) -> usize {
    let budget = match x.device().is_cpu() {
        true => CPU_BUDGET,
        false => GPU_BUDGET,
    };
    (budget / width.max(1)).max(64)
}

/// Products of rows with their neighbours: row r of the result is the sum over taps of `rows[r + offsets[k]] W_k`. Rows whose neighbours
/// are not there, at the end, are zero.
fn over_neighbours(
    rows: &Tensor,
    offsets: &[usize],
    matrix: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let (count, channels) = rows.dims2()?;
    let reach = offsets.iter().copied().max().unwrap_or(0);
    let Some(whole) = count.checked_sub(reach).filter(|&whole| whole > 0) else {
        bail!("convolution: {count} rows, expected more than {reach}");
    };
    let at_a_time = places_at_a_time(rows, channels * offsets.len());
    let mut results = Vec::new();
    for first in (0..whole).step_by(at_a_time) {
        let len = at_a_time.min(whole - first);
        let taps: Vec<Tensor> = offsets
            .iter()
            .map(|offset| rows.narrow(0, first + offset, len))
            .collect::<Result<_>>()?;
        results.push(linear(&Tensor::cat(&taps, 1)?, matrix, bias)?);
    }
    if reach > 0 {
        results.push(Tensor::zeros(
            (reach, matrix.dim(0)?),
            rows.dtype(),
            rows.device(),
        )?);
    }
    Tensor::cat(&results, 0)
}

/// Zeros around a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Padding {
    /// So many on each side.
    Even(usize),
    /// One below and one to the right, as the encoders of autoencoders have it.
    After,
}

impl Padding {
    fn sides(self) -> [usize; 2] {
        match self {
            Self::Even(width) => [width; 2],
            Self::After => [0, 1],
        }
    }
}

/// A square convolution of `[B, H, W, I]`.
#[derive(Clone, Debug)]
pub(crate) struct Conv2d {
    kernel: Kernel,
    bias: Tensor,
    size: usize,
    stride: usize,
    padding: Padding,
}

impl Conv2d {
    /// Takes `weight` `[output, input, size, size]` and `bias`; the result has the sides of the input.
    pub(crate) fn new(input: usize, output: usize, size: usize, vb: &VarBuilder) -> Result<Self> {
        Self::strided(
            input,
            output,
            size,
            1,
            Padding::Even(size.saturating_sub(1) / 2),
            vb,
        )
    }

    /// As [`Self::new`], of every `stride`-th place of the padded picture.
    pub(crate) fn strided(
        input: usize,
        output: usize,
        size: usize,
        stride: usize,
        padding: Padding,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let hints = start(input * size * size);
        let weight = vb.get_with_hints((output, input, size, size), "weight", hints)?;
        Ok(Self {
            kernel: Kernel::new(weight)?,
            bias: vector(output, "bias", 0.0, vb)?,
            size,
            stride,
            padding,
        })
    }

    /// The kernel in one form or another, for its element type and its device.
    pub(crate) fn weight(&self) -> &Tensor {
        match &self.kernel {
            Kernel::Turned(kernel) | Kernel::Trained(kernel) => kernel,
        }
    }

    /// Maps `x` `[B, H, W, I]` to `[B, H', W', O]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let matrix = self.kernel.matrix()?;
        let (size, stride) = (self.size, self.stride);
        if size == 1 && stride == 1 {
            return linear(x, &matrix, Some(&self.bias));
        }
        if !x.track_op() && !matrix.track_op() && !self.bias.track_op() {
            return self.frozen(x, &matrix);
        }
        if stride == 1 && size % 2 == 1 && self.padding == Padding::Even(size / 2) {
            let at_a_time = places_at_a_time(x, channels * size * size);
            return convolution(x, &matrix, &self.bias, size, at_a_time);
        }
        let [before, after] = self.padding.sides();
        let (high, wide) = (height + before + after, width + before + after);
        if high < size || wide < size {
            bail!("convolution: a picture of {height} x {width}, expected at least {size} with its borders");
        }
        let (rows, columns) = ((high - size) / stride + 1, (wide - size) / stride + 1);
        let x = x
            .pad_with_zeros(2, before, after)?
            .pad_with_zeros(1, before, after)?;
        if stride > 1 {
            let taps = self.spread_taps(&x, [rows, columns])?;
            let y = linear(&Tensor::cat(&taps, 1)?, &matrix, Some(&self.bias))?;
            return y.reshape((batch, rows, columns, ()));
        }
        let flat = x.contiguous()?.reshape((batch * high * wide, channels))?;
        let offsets: Vec<usize> = (0..size)
            .flat_map(|i| (0..size).map(move |j| i * wide + j))
            .collect();
        over_neighbours(&flat, &offsets, &matrix, Some(&self.bias))?
            .reshape((batch, high, wide, ()))?
            .narrow(1, 0, rows)?
            .narrow(2, 0, columns)?
            .contiguous()
    }

    /// Of networks that nobody trains: neighbours are laid side by side in one pass, borders included.
    fn frozen(&self, x: &Tensor, matrix: &Tensor) -> Result<Tensor> {
        let (batch, height, width, channels) = x.dims4()?;
        let window = Window {
            size: self.size,
            stride: self.stride,
            padding: self.padding.sides(),
        };
        let (rows, columns) = (window.results(height), window.results(width));
        if rows * columns == 0 {
            bail!(
                "convolution: a picture of {height} x {width}, expected at least {} with its borders",
                self.size
            );
        }
        let all = batch * rows * columns;
        let at_a_time = places_at_a_time(x, channels * self.size * self.size);
        let results: Vec<Tensor> = (0..all)
            .step_by(at_a_time)
            .map(|first| {
                let places = first..all.min(first + at_a_time);
                linear(&unfold(x, window, places)?, matrix, Some(&self.bias))
            })
            .collect::<Result<_>>()?;
        match &results[..] {
            [one] => one.clone(),
            _ => Tensor::cat(&results, 0)?,
        }
        .reshape((batch, rows, columns, ()))
    }

    /// What each tap reads of a padded picture at every `stride`-th place, `[B H' W', I]` each.
    fn spread_taps(&self, x: &Tensor, [rows, columns]: [usize; 2]) -> Result<Vec<Tensor>> {
        let (batch, high, wide, channels) = x.dims4()?;
        let stride = self.stride;
        // So that each axis is whole strides, and no tap reads beyond them.
        let steps = |places: usize| places + (self.size - 1) / stride;
        let (tall, broad) = (steps(rows), steps(columns));
        let fit = |x: &Tensor, axis: usize, found: usize, expected: usize| match expected > found {
            true => x.pad_with_zeros(axis, 0, expected - found),
            false => x.narrow(axis, 0, expected),
        };
        let x = fit(&fit(x, 1, high, tall * stride)?, 2, wide, broad * stride)?;
        let x = x
            .contiguous()?
            .reshape(vec![batch, tall, stride, broad, stride, channels])?;
        let mut taps = Vec::with_capacity(self.size * self.size);
        for i in 0..self.size {
            for j in 0..self.size {
                let tap = x
                    .narrow(1, i / stride, rows)?
                    .narrow(2, i % stride, 1)?
                    .narrow(3, j / stride, columns)?
                    .narrow(4, j % stride, 1)?;
                taps.push(tap.contiguous()?.reshape((batch * rows * columns, channels))?);
            }
        }
        Ok(taps)
    }
}

/// A convolution of `[B, T, I]` along time.
#[derive(Clone, Debug)]
pub(crate) struct Conv1d {
    kernel: Kernel,
    bias: Tensor,
    size: usize,
    dilation: usize,
}

impl Conv1d {
    /// Takes `weight` `[output, input, size]` and `bias`. Zeros around the input make the result as long as it, where `size` is odd.
    pub(crate) fn new(
        input: usize,
        output: usize,
        size: usize,
        dilation: usize,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let weight = vb.get_with_hints((output, input, size), "weight", start(input * size))?;
        Ok(Self {
            kernel: Kernel::new(weight)?,
            bias: vector(output, "bias", 0.0, vb)?,
            size,
            dilation,
        })
    }

    /// Maps `x` `[B, T, I]` to `[B, T', O]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, length, channels) = x.dims3()?;
        let reach = (self.size - 1) * self.dilation;
        let long = length + 2 * (reach / 2);
        let Some(results) = long.checked_sub(reach).filter(|&results| results > 0) else {
            bail!(
                "convolution: {length} steps of time, expected more than {}",
                reach % 2
            );
        };
        let flat = x
            .pad_with_zeros(1, reach / 2, reach / 2)?
            .contiguous()?
            .reshape((batch * long, channels))?;
        let offsets: Vec<usize> = (0..self.size).map(|k| k * self.dilation).collect();
        over_neighbours(&flat, &offsets, &self.kernel.matrix()?, Some(&self.bias))?
            .reshape((batch, long, ()))?
            .narrow(1, 0, results)?
            .contiguous()
    }
}

/// A transposed convolution of `[B, T, I]` along time: `stride` results a step.
#[derive(Clone, Debug)]
pub(crate) struct ConvTranspose1d {
    /// `[I, O, size]`, as checkpoints have it.
    weight: Tensor,
    bias: Tensor,
    size: usize,
    stride: usize,
    padding: usize,
}

impl ConvTranspose1d {
    /// Takes `weight` `[input, output, size]` and `bias`; `padding` results are cut off on both sides.
    pub(crate) fn new(
        input: usize,
        output: usize,
        size: usize,
        stride: usize,
        padding: usize,
        vb: &VarBuilder,
    ) -> Result<Self> {
        Ok(Self {
            weight: vb.get_with_hints(
                (input, output, size),
                "weight",
                start(input * size / stride.max(1)),
            )?,
            bias: vector(output, "bias", 0.0, vb)?,
            size,
            stride,
            padding,
        })
    }

    /// Maps `x` `[B, T, I]` to `[B, (T - 1) stride + size - 2 padding, O]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, length, input) = x.dims3()?;
        let output = self.weight.dim(1)?;
        let whole = (length - 1) * self.stride + self.size;
        let Some(kept) = whole.checked_sub(2 * self.padding).filter(|&kept| kept > 0) else {
            bail!("transposed convolution: {length} steps of time give nothing between its borders");
        };
        // All taps of a step, as whole strides.
        let strides = self.size.div_ceil(self.stride);
        let taps = strides * self.stride;
        let matrix = self
            .weight
            .permute((2, 1, 0))?
            .contiguous()?
            .pad_with_zeros(0, 0, taps - self.size)?
            .reshape((taps * output, input))?;
        let made = linear(x, &matrix, None)?.reshape((batch, length, strides, self.stride * output))?;
        // The a-th stride of step t falls on stride t + a of the result.
        let mut sum: Option<Tensor> = None;
        for a in 0..strides {
            let part =
                made.narrow(2, a, 1)?
                    .squeeze(2)?
                    .contiguous()?
                    .pad_with_zeros(1, a, strides - 1 - a)?;
            sum = Some(match sum {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        let Some(sum) = sum else {
            bail!("transposed convolution: no taps");
        };
        sum.reshape((batch, (length + strides - 1) * self.stride, output))?
            .narrow(1, self.padding, kept)?
            .broadcast_add(&self.bias.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{apart, normal, perturb};
    use candle_core::{Device, Var};
    use fulgur_lightnet::params::Params;

    fn channels_last(x: &Tensor) -> Result<Tensor> {
        x.permute((0, 2, 3, 1))?.contiguous()
    }

    /// Candle's own convolution is the independent computation.
    #[test]
    fn pictures_are_convolved() -> Result<()> {
        for (size, stride, padding, [height, width]) in [
            (3, 1, Padding::Even(1), [5, 7]),
            (1, 1, Padding::Even(0), [4, 3]),
            (5, 1, Padding::Even(2), [6, 4]),
            (3, 1, Padding::Even(1), [1, 1]),
            (3, 2, Padding::Even(1), [5, 8]),
            (3, 2, Padding::Even(1), [1, 2]),
            (3, 2, Padding::After, [6, 7]),
            (3, 2, Padding::After, [5, 2]),
            (3, 3, Padding::Even(1), [9, 7]),
        ] {
            let params = Params::random(2, &Device::Cpu);
            let conv = Conv2d::strided(3, 5, size, stride, padding, &params.builder())?;
            perturb(&params, 0.3)?;
            let x = normal("x", &[2, 3, height, width])?;
            let vars = params.vars();
            let [before, after] = padding.sides();
            let padded = x
                .pad_with_zeros(2, before, after)?
                .pad_with_zeros(3, before, after)?;
            let expected = padded
                .conv2d(vars["weight"].as_tensor(), 0, stride, 1, 1)?
                .broadcast_add(&vars["bias"].as_tensor().reshape((1, 5, 1, 1))?)?;
            let found = conv.forward(&channels_last(&x)?)?;
            let far = apart(&found, &channels_last(&expected)?)?;
            assert!(
                far < 1e-5,
                "{size} {stride} {padding:?} {height} x {width}: {far}"
            );
            // Nobody wants gradients of this one: another way.
            let frozen = Conv2d {
                kernel: Kernel::new(vars["weight"].as_tensor().detach())?,
                bias: conv.bias.detach(),
                ..conv.clone()
            };
            let far = apart(
                &frozen.forward(&channels_last(&x.detach())?)?,
                &channels_last(&expected)?,
            )?;
            assert!(far < 1e-5, "frozen {size} {stride} {padding:?}: {far}");
        }
        Ok(())
    }

    #[test]
    fn parts_of_many_rows_are_the_whole() -> Result<()> {
        let params = Params::random(2, &Device::Cpu);
        let conv = Conv2d::new(40, 3, 3, &params.builder())?;
        // More values of neighbours than the budget.
        let x = normal("x", &[2, 40, 51, 37])?;
        assert!(x.elem_count() * 9 > CPU_BUDGET);
        let expected = x.conv2d(params.vars()["weight"].as_tensor(), 1, 1, 1, 1)?;
        assert!(apart(&conv.forward(&channels_last(&x)?)?, &channels_last(&expected)?)? < 1e-4);
        let frozen = Conv2d {
            kernel: Kernel::new(params.vars()["weight"].as_tensor().detach())?,
            bias: conv.bias.detach(),
            ..conv.clone()
        };
        assert!(apart(&frozen.forward(&channels_last(&x)?)?, &channels_last(&expected)?)? < 1e-4);
        Ok(())
    }

    #[test]
    fn sounds_are_convolved_both_ways() -> Result<()> {
        let x = normal("x", &[2, 6, 9])?;
        let last = |x: &Tensor| x.transpose(1, 2)?.contiguous();
        for (size, dilation) in [(3, 1), (7, 1), (3, 5), (11, 3), (1, 1), (4, 1)] {
            let params = Params::random(3, &Device::Cpu);
            let conv = Conv1d::new(6, 4, size, dilation, &params.builder())?;
            let padding = (size - 1) * dilation / 2;
            let expected = x.conv1d(params.vars()["weight"].as_tensor(), padding, 1, dilation, 1)?;
            let far = apart(&conv.forward(&last(&x)?)?, &last(&expected)?)?;
            assert!(far < 1e-5, "{size} {dilation}: {far}");
        }
        for (size, stride) in [(16, 5), (8, 2), (4, 2), (4, 4), (3, 1), (5, 2)] {
            let params = Params::random(3, &Device::Cpu);
            let padding = (size - stride) / 2;
            let conv = ConvTranspose1d::new(6, 4, size, stride, padding, &params.builder())?;
            perturb(&params, 0.2)?;
            let expected = scattered(&x, &params, [size, stride, padding])?;
            let far = apart(&conv.forward(&last(&x)?)?, &last(&expected)?)?;
            assert!(far < 1e-5, "{size} {stride}: {far}");
        }
        Ok(())
    }

    /// A transposed convolution by its definition: each value of `x` `[B, I, T]` is added to `size` results. Candle's own is another one
    /// where the kernel is as long as the stride.
    fn scattered(x: &Tensor, params: &Params, [size, stride, padding]: [usize; 3]) -> Result<Tensor> {
        let vars = params.vars();
        let weight = vars["weight"].to_vec3::<f32>()?;
        let bias = vars["bias"].to_vec1::<f32>()?;
        let (batch, _, length) = x.dims3()?;
        let kept = (length - 1) * stride + size - 2 * padding;
        let mut results = vec![0f32; batch * bias.len() * kept];
        for (b, channels) in x.to_vec3::<f32>()?.iter().enumerate() {
            for (o, offset) in bias.iter().enumerate() {
                let row = &mut results[(b * bias.len() + o) * kept..][..kept];
                row.fill(*offset);
                for (input, values) in channels.iter().enumerate() {
                    for (t, value) in values.iter().enumerate() {
                        for (k, factor) in weight[input][o].iter().enumerate() {
                            if let Some(place) = (t * stride + k).checked_sub(padding)
                                && let Some(result) = row.get_mut(place)
                            {
                                *result += value * factor;
                            }
                        }
                    }
                }
            }
        }
        Tensor::from_vec(results, (batch, bias.len(), kept), &Device::Cpu)
    }

    #[test]
    fn gradients_are_those_of_a_convolution() -> Result<()> {
        let params = Params::random(4, &Device::Cpu);
        let conv = Conv2d::new(3, 2, 3, &params.builder())?;
        let x = Var::from_tensor(&normal("x", &[1, 3, 4, 5])?)?;
        let weight = params.vars()["weight"].clone();
        let ours = conv.forward(&channels_last(&x)?)?.sqr()?.sum_all()?.backward()?;
        let expected = x.conv2d(&weight, 1, 1, 1, 1)?.sqr()?.sum_all()?.backward()?;
        for var in [x.as_tensor(), weight.as_tensor()] {
            let (Some(found), Some(expected)) = (ours.get(var), expected.get(var)) else {
                bail!("no gradient");
            };
            assert!(apart(found, expected)? < 1e-4);
        }
        Ok(())
    }
}
