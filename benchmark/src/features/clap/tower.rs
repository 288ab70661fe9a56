//! HTSAT, the sound tower of CLAP: a spectrogram folded into a square picture, through a Swin transformer (Chen et al., arXiv
//! 2202.00874), without feature fusion.
//!
//! ```text
//! [T, mel] -> norm of each band -> bicubic to [spec ratio, mel] -> ratio parts of time, one below the other: [spec, spec]
//! patches -> stages of blocks, each x + W-MSA(LN x), x + MLP(LN x); every second block with windows shifted by half
//! between stages 2x2 tokens become one of twice the width; at last LN and the mean over all tokens
//! ```
//!
//! Shapes: B batch, h and w tokens down and across, c width, W windows, n tokens of a window, H heads.

use candle_core::{Device, Result, Tensor};
use candle_nn::{Activation, LayerNorm, Module, VarBuilder};
use serde::Deserialize;

use super::super::layers::{BatchNorm, Dense};

/// What is added to the score of two tokens that were brought together by the shift alone.
const APART: f32 = -100.0;
const NORM_EPS: f64 = 1e-5;
/// The parameter of torch's cubic.
const CUBIC: f64 = -0.75;
/// Sizes beyond which a configuration is none.
const MOST_STAGES: usize = 16;
const MOST_SIZE: usize = 1 << 14;

/// One number for both sides, or one each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Sides {
    /// The same for both.
    One(usize),
    /// Down and across.
    Two([usize; 2]),
}

impl Sides {
    fn square(self) -> Option<usize> {
        match self {
            Self::One(side) => Some(side),
            Self::Two([down, across]) => (down == across).then_some(down),
        }
    }
}

/// `audio_config` of a CLAP, with the names of its file; unknown keys are ignored.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct AudioConfig {
    /// Side of a window in tokens.
    pub window_size: usize,
    /// Bands of the spectrogram.
    pub num_mel_bins: usize,
    /// Side of the picture; a multiple of the bands.
    pub spec_size: usize,
    /// Side of a patch.
    pub patch_size: Sides,
    /// From patch to patch.
    pub patch_stride: Sides,
    /// Width of what the projection gets.
    pub hidden_size: usize,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Heads of each stage.
    pub num_attention_heads: Vec<usize>,
    /// Width of the first stage; each further one has twice as much.
    pub patch_embeds_hidden_size: usize,
    /// Whether patches are normalised.
    pub enable_patch_layer_norm: bool,
    /// Has to be false: fusion is not implemented.
    pub enable_fusion: bool,
    /// Width of a hidden layer over that of its block.
    pub mlp_ratio: f64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Activation of the hidden layers.
    pub hidden_act: Activation,
    /// Activation of the projection.
    pub projection_hidden_act: Activation,
    /// Added to the variance in the norms of the blocks.
    pub layer_norm_eps: f64,
}

impl Default for AudioConfig {
    fn default() -> Self {
        Self {
            window_size: 8,
            num_mel_bins: 64,
            spec_size: 256,
            patch_size: Sides::One(4),
            patch_stride: Sides::Two([4, 4]),
            hidden_size: 768,
            depths: vec![2, 2, 6, 2],
            num_attention_heads: vec![4, 8, 16, 32],
            patch_embeds_hidden_size: 96,
            enable_patch_layer_norm: true,
            enable_fusion: false,
            mlp_ratio: 4.0,
            qkv_bias: true,
            hidden_act: Activation::Gelu,
            projection_hidden_act: Activation::Relu,
            layer_norm_eps: 1e-5,
        }
    }
}

impl AudioConfig {
    /// Refuses what is not implemented or cannot be.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |field: &str, found: String, expected: String| -> Result<()> {
            candle_core::bail!("audio_config.{field} is {found}, expected {expected}")
        };
        if self.enable_fusion {
            return refuse("enable_fusion", "true".into(), "false".into());
        }
        for (field, value) in [
            ("window_size", self.window_size),
            ("num_mel_bins", self.num_mel_bins),
            ("spec_size", self.spec_size),
            ("hidden_size", self.hidden_size),
            ("patch_embeds_hidden_size", self.patch_embeds_hidden_size),
        ] {
            if !(1..=MOST_SIZE).contains(&value) {
                return refuse(field, value.to_string(), format!("1 to {MOST_SIZE}"));
            }
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0) {
            return refuse(
                "mlp_ratio",
                self.mlp_ratio.to_string(),
                "above 0, at most 64".into(),
            );
        }
        if !self.spec_size.is_multiple_of(self.num_mel_bins) {
            let expected = format!("a multiple of {} bands", self.num_mel_bins);
            return refuse("spec_size", self.spec_size.to_string(), expected);
        }
        let (stages, heads) = (self.depths.len(), self.num_attention_heads.len());
        if !(1..=MOST_STAGES).contains(&stages) || heads != stages {
            let found = format!("of {stages} stages beside heads of {heads}");
            return refuse("depths", found, format!("1 to {MOST_STAGES} stages in both"));
        }
        let side = self.grid()?;
        for (stage, (&depth, &heads)) in self.depths.iter().zip(&self.num_attention_heads).enumerate() {
            let side = side >> stage;
            if !side.is_multiple_of(self.window_size) || side == 0 || (side << stage) != self.grid()? {
                let expected = format!("a divisor of the {side} tokens of stage {stage}");
                return refuse("window_size", self.window_size.to_string(), expected);
            }
            let width = self.patch_embeds_hidden_size << stage;
            if heads == 0 || !width.is_multiple_of(heads) || !(1..=MOST_SIZE).contains(&depth) {
                let expected =
                    format!("a divisor of the width {width} of stage {stage}, and a depth above 0");
                return refuse("num_attention_heads", heads.to_string(), expected);
            }
        }
        let width = self.patch_embeds_hidden_size << (stages - 1);
        if width != self.hidden_size || width > MOST_SIZE {
            let expected = format!("{width}, the width of the last stage");
            return refuse("hidden_size", self.hidden_size.to_string(), expected);
        }
        Ok(())
    }

    /// Side of a patch.
    fn patch(&self) -> Result<usize> {
        match (self.patch_size.square(), self.patch_stride.square()) {
            (Some(size), Some(stride)) if size == stride && (1..=self.spec_size).contains(&size) => Ok(size),
            _ => candle_core::bail!(
                "audio_config.patch_size is {:?} with a stride of {:?}, expected the same side for all",
                self.patch_size,
                self.patch_stride
            ),
        }
    }

    /// Patches a side.
    fn grid(&self) -> Result<usize> {
        Ok(self.spec_size / self.patch()?)
    }
}

fn layer_norm(width: usize, eps: f64, vb: &VarBuilder) -> Result<LayerNorm> {
    Ok(LayerNorm::new(
        vb.get(width, "weight")?,
        vb.get(width, "bias")?,
        eps,
    ))
}

/// `[B, h, w, c]` to windows `[B W, n, c]`.
fn cut(x: &Tensor, window: usize) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    let (down, across) = (height / window, width / window);
    x.reshape(vec![batch, down, window, across, window, channels])?
        .permute(vec![0, 1, 3, 2, 4, 5])?
        .contiguous()?
        .reshape((batch * down * across, window * window, channels))
}

/// The reverse of [`cut`], of a square of `side`.
fn join(windows: &Tensor, side: usize, window: usize) -> Result<Tensor> {
    let (all, _, channels) = windows.dims3()?;
    let count = side / window;
    let batch = all / (count * count);
    windows
        .reshape(vec![batch, count, count, window, window, channels])?
        .permute(vec![0, 1, 3, 2, 4, 5])?
        .contiguous()?
        .reshape((batch, side, side, channels))
}

/// Which of two tokens of a window may see each other when the square was rolled by `shift`: `[W, n, n]`.
fn shift_mask(side: usize, window: usize, shift: usize, device: &Device) -> Result<Tensor> {
    let region = |place: usize| usize::from(place + window >= side) + usize::from(place + shift >= side);
    let count = side / window;
    let n = window * window;
    let mut mask = Vec::with_capacity(count * count * n * n);
    for block in 0..count * count {
        let (down, across) = (block / count * window, block % count * window);
        let of = |token: usize| (region(down + token / window), region(across + token % window));
        for a in 0..n {
            mask.extend((0..n).map(|b| if of(a) == of(b) { 0.0 } else { APART }));
        }
    }
    Tensor::from_vec(mask, (count * count, n, n), device)
}

/// Where the bias of two tokens of a window stands in its table, `[n n]`.
fn relative_index(window: usize) -> Vec<u32> {
    let (n, span) = (window * window, 2 * window - 1);
    let mut index = Vec::with_capacity(n * n);
    for a in 0..n {
        for b in 0..n {
            let down = a / window + window - 1 - b / window;
            let across = a % window + window - 1 - b % window;
            index.push((down * span + across) as u32);
        }
    }
    index
}

#[derive(Clone, Debug)]
struct Attention {
    query: Dense,
    key: Dense,
    value: Dense,
    output: Dense,
    /// `[1, H, n, n]`.
    bias: Tensor,
    heads: usize,
}

impl Attention {
    fn new(width: usize, heads: usize, window: usize, qkv_bias: bool, vb: &VarBuilder) -> Result<Self> {
        let own = vb.pp("self");
        let dense = |name: &str| Dense::new(width, width, qkv_bias, &own.pp(name));
        let (n, span) = (window * window, 2 * window - 1);
        let table = own.get((span * span, heads), "relative_position_bias_table")?;
        let index = Tensor::from_vec(relative_index(window), n * n, vb.device())?;
        Ok(Self {
            query: dense("query")?,
            key: dense("key")?,
            value: dense("value")?,
            output: Dense::new(width, width, true, &vb.pp("output.dense"))?,
            bias: table
                .contiguous()?
                .index_select(&index, 0)?
                .reshape((n, n, heads))?
                .permute((2, 0, 1))?
                .contiguous()?
                .unsqueeze(0)?,
            heads,
        })
    }

    /// Windows `[B W, n, c]`; `mask` is `[W, n, n]`.
    fn forward(&self, x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (all, n, width) = x.dims3()?;
        let split = |dense: &Dense| {
            dense
                .forward(x)?
                .reshape((all, n, self.heads, width / self.heads))?
                .transpose(1, 2)?
                .contiguous()
        };
        let scale = ((width / self.heads) as f64).powf(-0.5);
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let mut scores = (query.matmul(&key.t()?)? * scale)?.broadcast_add(&self.bias)?;
        if let Some(mask) = mask {
            let windows = mask.dim(0)?;
            scores = scores
                .reshape((all / windows, windows, self.heads, n, n))?
                .broadcast_add(&mask.reshape((1, windows, 1, n, n))?)?
                .reshape((all, self.heads, n, n))?;
        }
        let mixed = candle_nn::ops::softmax_last_dim(&scores)?
            .matmul(&value)?
            .transpose(1, 2)?
            .reshape((all, n, width))?;
        self.output.forward(&mixed)
    }
}

#[derive(Clone, Debug)]
struct Block {
    before: LayerNorm,
    attention: Attention,
    after: LayerNorm,
    inner: Dense,
    outer: Dense,
    activation: Activation,
    window: usize,
    /// How far the square is rolled, and the mask for it.
    shifted: Option<(usize, Tensor)>,
}

impl Block {
    fn new(config: &AudioConfig, stage: usize, number: usize, vb: &VarBuilder) -> Result<Self> {
        let width = config.patch_embeds_hidden_size << stage;
        let (side, window) = (config.grid()? >> stage, config.window_size);
        let hidden = (config.mlp_ratio * width as f64) as usize;
        let shift = window / 2;
        let shifted = (number % 2 == 1 && side > window && shift > 0)
            .then(|| Ok::<_, candle_core::Error>((shift, shift_mask(side, window, shift, vb.device())?)))
            .transpose()?;
        let norm = |name: &str| layer_norm(width, config.layer_norm_eps, &vb.pp(name));
        let heads = config.num_attention_heads[stage];
        Ok(Self {
            before: norm("layernorm_before")?,
            attention: Attention::new(width, heads, window, config.qkv_bias, &vb.pp("attention"))?,
            after: norm("layernorm_after")?,
            inner: Dense::new(width, hidden, true, &vb.pp("intermediate.dense"))?,
            outer: Dense::new(hidden, width, true, &vb.pp("output.dense"))?,
            activation: config.hidden_act,
            window,
            shifted,
        })
    }

    /// `[B, h, h, c]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let side = x.dim(1)?;
        let mut square = self.before.forward(x)?;
        let roll = |square: &Tensor, by: i32| square.roll(by, 1)?.roll(by, 2);
        if let Some((shift, _)) = &self.shifted {
            square = roll(&square, -(*shift as i32))?;
        }
        let mask = self.shifted.as_ref().map(|(_, mask)| mask);
        let windows = self.attention.forward(&cut(&square, self.window)?, mask)?;
        square = join(&windows, side, self.window)?;
        if let Some((shift, _)) = &self.shifted {
            square = roll(&square, *shift as i32)?;
        }
        let x = (x + square)?;
        let inner = self.inner.forward(&self.after.forward(&x)?)?;
        x + self.outer.forward(&self.activation.forward(&inner)?)?
    }
}

/// Four tokens become one of twice the width.
#[derive(Clone, Debug)]
struct Merge {
    norm: LayerNorm,
    reduction: Dense,
}

impl Merge {
    fn new(width: usize, vb: &VarBuilder) -> Result<Self> {
        Ok(Self {
            norm: layer_norm(4 * width, NORM_EPS, &vb.pp("norm"))?,
            reduction: Dense::new(4 * width, 2 * width, false, &vb.pp("reduction"))?,
        })
    }

    /// `[B, h, h, c]` to `[B, h / 2, h / 2, 2 c]`; the four come column by column.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, side, _, width) = x.dims4()?;
        let half = side / 2;
        let four = x
            .reshape(vec![batch, half, 2, half, 2, width])?
            .permute(vec![0, 1, 3, 4, 2, 5])?
            .contiguous()?
            .reshape((batch, half, half, 4 * width))?;
        self.reduction.forward(&self.norm.forward(&four)?)
    }
}

#[derive(Clone, Debug)]
struct Stage {
    blocks: Vec<Block>,
    merge: Option<Merge>,
}

/// The tower, below `audio_model.audio_encoder`.
#[derive(Clone, Debug)]
pub struct AudioTower {
    config: AudioConfig,
    bands: BatchNorm,
    kernel: Tensor,
    bias: Tensor,
    patch_norm: Option<LayerNorm>,
    stages: Vec<Stage>,
    norm: LayerNorm,
}

impl AudioTower {
    /// Takes the tensors of `ClapAudioEncoder` from `vb`; `config` was checked.
    pub(super) fn new(config: &AudioConfig, vb: &VarBuilder) -> Result<Self> {
        let (width, patch) = (config.patch_embeds_hidden_size, config.patch()?);
        let embed = vb.pp("patch_embed");
        let mut stages = Vec::with_capacity(config.depths.len());
        for (stage, &depth) in config.depths.iter().enumerate() {
            let vb = vb.pp(format!("layers.{stage}"));
            let blocks = (0..depth).map(|i| Block::new(config, stage, i, &vb.pp(format!("blocks.{i}"))));
            let last = stage + 1 == config.depths.len();
            let merge = (!last).then(|| Merge::new(width << stage, &vb.pp("downsample")));
            stages.push(Stage {
                blocks: blocks.collect::<Result<_>>()?,
                merge: merge.transpose()?,
            });
        }
        let norm = |width: usize, name: &str| layer_norm(width, NORM_EPS, &vb.pp(name));
        Ok(Self {
            bands: BatchNorm::new(config.num_mel_bins, NORM_EPS, &vb.pp("batch_norm"))?,
            kernel: embed.get((width, 1, patch, patch), "proj.weight")?,
            bias: embed.get(width, "proj.bias")?,
            patch_norm: config
                .enable_patch_layer_norm
                .then(|| norm(width, "patch_embed.norm"))
                .transpose()?,
            stages,
            norm: norm(config.hidden_size, "norm")?,
            config: config.clone(),
        })
    }

    /// Spectrograms `[B, 1, T, mel]` to vectors `[B, hidden_size]`.
    pub(super) fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let config = &self.config;
        let (batch, channels, frames, bands) = features.dims4()?;
        let ratio = config.spec_size / config.num_mel_bins;
        let longest = config.spec_size * ratio;
        if channels != 1 || bands != config.num_mel_bins || !(1..=longest).contains(&frames) {
            candle_core::bail!(
                "input_features: found {:?}, expected [B, 1, T, {}] with T of 1 to {longest}",
                features.dims(),
                config.num_mel_bins
            );
        }
        let x = self.bands.forward(features, 3)?.squeeze(1)?;
        let x = if frames < longest {
            let matrix = Tensor::from_vec(cubic(frames, longest), (1, longest, frames), x.device())?;
            matrix.broadcast_matmul(&x.contiguous()?)?
        } else {
            x
        };
        let square = x
            .reshape((batch, ratio, config.spec_size, bands))?
            .permute((0, 1, 3, 2))?
            .contiguous()?
            .reshape((batch, 1, config.spec_size, config.spec_size))?;
        let patches = square.conv2d(&self.kernel, 0, config.patch()?, 1, 1)?;
        let mut x = patches
            .permute((0, 2, 3, 1))?
            .contiguous()?
            .broadcast_add(&self.bias)?;
        if let Some(norm) = &self.patch_norm {
            x = norm.forward(&x)?;
        }
        for Stage { blocks, merge } in &self.stages {
            for block in blocks {
                x = block.forward(&x)?;
            }
            if let Some(merge) = merge {
                x = merge.forward(&x)?;
            }
        }
        // The reference sorts the tokens by frequency before it averages all of them.
        self.norm.forward(&x)?.flatten(1, 2)?.mean(1)
    }
}

/// Weights `[to, from]` of a cubic interpolation that keeps the ends in place.
fn cubic(from: usize, to: usize) -> Vec<f32> {
    let near = |x: f64| ((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((CUBIC * x - 5.0 * CUBIC) * x + 8.0 * CUBIC) * x - 4.0 * CUBIC;
    let mut matrix = vec![0.0; to * from];
    let scale = if to > 1 {
        (from - 1) as f64 / (to - 1) as f64
    } else {
        0.0
    };
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let place = i as f64 * scale;
        let first = place.floor();
        let t = place - first;
        for (offset, weight) in [
            (-1.0, far(t + 1.0)),
            (0.0, near(t)),
            (1.0, near(1.0 - t)),
            (2.0, far(2.0 - t)),
        ] {
            let at = (first + offset).clamp(0.0, (from - 1) as f64) as usize;
            row[at] += weight as f32;
        }
    }
    matrix
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_come_back_in_their_places() -> Result<()> {
        let x = Tensor::arange(0f32, 2.0 * 64.0 * 3.0, &Device::Cpu)?.reshape((2, 8, 8, 3))?;
        let windows = cut(&x, 4)?;
        assert_eq!(windows.dims(), [8, 16, 3]);
        // The second token of the second window of the first square is its fifth and sixth column.
        let token = windows.get(1)?.get(1)?.to_vec1::<f32>()?;
        assert_eq!(token, [15.0, 16.0, 17.0]);
        assert_eq!(
            join(&windows, 8, 4)?.flatten_all()?.to_vec1::<f32>()?,
            x.flatten_all()?.to_vec1::<f32>()?
        );
        Ok(())
    }

    #[test]
    fn masks_part_what_the_shift_brought_together() -> Result<()> {
        let mask = shift_mask(8, 4, 2, &Device::Cpu)?;
        assert_eq!(mask.dims(), [4, 16, 16]);
        let whole = mask.get(0)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_eq!(whole, 0.0);
        // In the last window rows 0 and 1 came from the bottom, 2 and 3 from the top.
        let last = mask.get(3)?.to_vec2::<f32>()?;
        assert_eq!(
            (last[0][1], last[0][2], last[0][8], last[10][15]),
            (0.0, APART, APART, 0.0)
        );
        Ok(())
    }

    #[test]
    fn interpolation_keeps_ends_and_lines() {
        let matrix = cubic(5, 9);
        let line: Vec<f32> = (0..5).map(|i| i as f32).collect();
        let found: Vec<f32> = matrix
            .chunks_exact(5)
            .map(|row| row.iter().zip(&line).map(|(w, x)| w * x).sum())
            .collect();
        assert!((found[0]).abs() < 1e-6 && (found[8] - 4.0).abs() < 1e-6);
        assert!(
            (found[4] - 2.0).abs() < 1e-6 && (found[3] - 1.5).abs() < 1e-6,
            "{found:?}"
        );
        assert_eq!(cubic(1, 3), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn odd_configurations_are_refused() {
        let good = AudioConfig::default();
        good.check().unwrap();
        let refused = |change: fn(&mut AudioConfig), words: &str| {
            let mut config = AudioConfig::default();
            change(&mut config);
            let line = config.check().unwrap_err().to_string();
            assert!(line.contains(words), "{words}: {line}");
        };
        refused(|c| c.enable_fusion = true, "enable_fusion is true");
        refused(|c| c.window_size = 0, "window_size is 0");
        refused(|c| c.window_size = 7, "window_size is 7");
        refused(|c| c.spec_size = 100, "spec_size is 100");
        refused(|c| c.mlp_ratio = f64::NAN, "mlp_ratio is NaN");
        refused(|c| c.depths = vec![], "depths is of 0 stages");
        refused(|c| c.num_attention_heads[1] = 7, "num_attention_heads is 7");
        refused(|c| c.hidden_size = 700, "hidden_size is 700");
        refused(|c| c.patch_size = Sides::Two([4, 8]), "patch_size is");
        refused(|c| c.depths[2] = 1 << 40, "a depth above 0");
    }
}
