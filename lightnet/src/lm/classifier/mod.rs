//! Classifiers of whole sequences: the layers of a language model under a mean over tokens and a linear head.
//!
//! ```text
//! x = embedding[ids] + positions        or of grey values g: g w + b + positions
//! x = x + mixer(norm(x))                once a stage of the form, with the same parameters
//! x = x + glu(norm(x))                  for each layer
//! logits = mean over tokens of norm(x) W^T
//! ```
//!
//! The [`Form`] says how the mixer of a layer goes through the tokens: one scan, scans in both directions, scans of the rows and columns of
//! a picture, or no scan at all. Sequences of several lengths are packed behind each other, so that there is no padding; LightNet in its own
//! form, which has no packed recurrence, fills them up behind their ends and masks what was filled.
//!
//! ```
//! # fn main() -> candle_core::Result<()> {
//! use candle_core::{DType, Device};
//! use fulgur_kernels::embedding::Ids;
//! use fulgur_lightnet::lm::classifier::{ClassifierConfig, Content, Form, Input, Layout, Positions, SequenceClassifier};
//! use fulgur_lightnet::lm::{Architecture, Config};
//! use fulgur_lightnet::params::Params;
//! let layers = Config { hidden_size: 16, num_attention_heads: 2, vocab_size: 10, ..Config::of(Architecture::Hgrn2) };
//! let config = ClassifierConfig {
//!     classes: 3,
//!     input: Input::Tokens,
//!     form: Form::Parallel,
//!     grid: None,
//!     positions: Positions::Sine,
//!     layers,
//! };
//! let model = SequenceClassifier::new(&config, DType::F32, &Params::random(1, &Device::Cpu).builder())?;
//! let ids = Ids::new(&[7, 3, 9, 1, 2], &[1, 5], 10)?;
//! let logits = model.logits(&Content::Tokens(&ids), &Layout::packed(&[0, 2, 5])?)?;
//! assert_eq!(logits.dims(), [2, 3]);
//! # Ok(()) }
//! ```

mod config;
mod layout;
#[cfg(test)]
mod tests;

pub use config::{ClassifierConfig, Input, Positions};
pub use layout::Layout;

pub use crate::mixer::causal::Form;

use std::path::Path;
use std::sync::Arc;

use candle_core::{D, DType, Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::cross_entropy;
use fulgur_kernels::embedding::{Ids, lookup};
use fulgur_kernels::linear::linear;
use fulgur_kernels::lrpe::token_phases;
use fulgur_kernels::norm::{add_norm, rms_norm_to};
use fulgur_kernels::order::Order;

use super::layer::{Layer, Names, lower_bounds};
use super::rope::Rotary;
use crate::mixer::causal::{CausalContext, Memory, Paths};
use crate::params::folder::{self, LoadError};

/// Base of the wavelengths of positions.
const BASE: f64 = 1e4;

/// What a batch holds.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Ids `[B, N]`.
    Tokens(&'a Ids),
    /// Grey values `[B, N]`, about -1 to 1.
    Pixels(&'a Tensor),
}

/// The model.
#[derive(Clone, Debug)]
pub struct SequenceClassifier {
    config: ClassifierConfig,
    /// Rows of tokens `[V, d]`, or the map of a grey value `[1, d]`.
    embedding: Tensor,
    /// Beside the map of grey values, `[d]`.
    bias: Option<Tensor>,
    layers: Vec<Layer>,
    /// Gains of the norms: of the mixer and of the gated linear unit of each layer, then of the end.
    gains: Vec<Option<Tensor>>,
    lower_bounds: Option<Tensor>,
    /// `[classes, d]`.
    head: Tensor,
    /// Frequencies of the positions.
    theta: Option<Tensor>,
    compute: DType,
}

impl SequenceClassifier {
    /// Takes its tensors from `vb`; branches compute in `compute`.
    ///
    /// # Errors
    /// The shape is none, or a tensor is missing or has another shape.
    pub fn new(config: &ClassifierConfig, compute: DType, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let layers_config = &config.layers;
        let (width, count) = (layers_config.hidden_size, layers_config.num_hidden_layers);
        let (model, names) = (vb.pp("model"), Names::of(layers_config.architecture));
        let normal = |stdev| Init::Randn { mean: 0.0, stdev };
        // Positions have about unit variance, and what they are added to has so too.
        let (embedding, bias) = match config.input {
            Input::Tokens => {
                let shape = (layers_config.vocab_size, width);
                let table = model
                    .pp(names.embedding)
                    .get_with_hints(shape, "weight", normal(1.0))?;
                (table, None)
            }
            Input::Pixels => {
                let vb = model.pp("pixels");
                let map = vb.get_with_hints((1, width), "weight", normal(1.0))?;
                (map, Some(vb.get_with_hints(width, "bias", Init::Const(0.0))?))
            }
        };
        let gain = |vb: &VarBuilder, norm: usize| {
            let named = names.norms.map(|norms| vb.pp(norms[norm]));
            named
                .map(|vb| vb.get_with_hints(width, "weight", Init::Const(1.0)))
                .transpose()
        };
        let (mut layers, mut gains) = (Vec::new(), Vec::new());
        for index in 0..count {
            let vb = model.pp("layers").pp(index);
            layers.push(Layer::new(layers_config, index, &vb)?);
            gains.push(gain(&vb, 0)?);
            gains.push(gain(&vb, 1)?);
        }
        gains.push(gain(&model, 2)?);
        let bounds = || model.get_with_hints((count, width), "lower_bounds", Init::Const(1.0));
        let lower_bounds = layers_config.has_lower_bounds().then(bounds).transpose()?;
        let head = vb
            .pp("classifier")
            .get_with_hints((config.classes, width), "weight", normal(0.02))?;
        let theta = match config.positions {
            Positions::None => None,
            Positions::Sine => Some(frequencies(width, config.grid.is_some(), vb.device())?),
        };
        Ok(Self {
            config: config.clone(),
            embedding,
            bias,
            layers,
            gains,
            lower_bounds,
            head,
            theta,
            compute,
        })
    }

    /// Loads the model in `dir` onto `device`. All tensors are compared by name and shape before any is read.
    ///
    /// # Errors
    /// The folder holds no such model, or other tensors than its own, all of which are listed.
    pub fn load(dir: &Path, compute: DType, device: &Device) -> std::result::Result<Self, LoadError> {
        let config = ClassifierConfig::read(&dir.join("config.json"))?;
        folder::load(
            dir,
            compute,
            device,
            |_| false,
            |compute, vb| Self::new(&config, compute, vb),
        )
    }

    /// Its shape.
    pub fn config(&self) -> &ClassifierConfig {
        &self.config
    }

    /// Logits `[S, classes]` of the S sequences of `content`, in f32.
    ///
    /// # Errors
    /// Content of another kind or shape than the model's and the layout's, or a failing operation.
    pub fn logits(&self, content: &Content<'_>, layout: &Layout) -> Result<Tensor> {
        linear(&self.features(content, layout)?, &self.head, None)
    }

    /// Mean cross-entropy of `targets` `[S]` of type u32, in nats a sequence.
    ///
    /// # Errors
    /// As [`Self::logits`], or targets on the CPU out of range.
    pub fn loss(&self, content: &Content<'_>, layout: &Layout, targets: &Tensor) -> Result<Tensor> {
        let features = self.features(content, layout)?;
        cross_entropy::head(&features, &self.head, targets, &cross_entropy::Options::default())
    }

    /// Means `[S, d]` over the tokens of each sequence, in f32.
    fn features(&self, content: &Content<'_>, layout: &Layout) -> Result<Tensor> {
        let device = self.embedding.device();
        let config = &self.config;
        if let Some([rows, columns]) = config.grid
            && (layout.borders.is_some() || layout.tokens != rows * columns)
        {
            bail!(
                "pictures have {} tokens, expected {rows} x {columns} in each of equal length",
                layout.tokens
            );
        }
        let places = match &layout.borders {
            None => None,
            Some(_) => Some(Tensor::new(layout.places(), device)?),
        };
        let padded = match &layout.borders {
            None => None,
            Some(_) => Some(Order::new(&layout.padded(), layout.tokens, device)?),
        };
        let ways = Ways {
            stages: config
                .form
                .stages(layout.tokens, layout.borders.as_ref(), config.grid, device)?,
            layout,
            places,
            padded,
        };
        let x = self.embed(content, &ways)?;
        let end = self.run(x, &ways)?.to_dtype(DType::F32)?;
        let Some(padded) = &ways.padded else {
            return end.mean(1);
        };
        // Of packed sequences the mean is a sum with one over the length of each, and nothing at padding.
        let width = config.layers.hidden_size;
        let filled = padded
            .apply(&end)?
            .reshape((layout.sequences(), layout.longest(), width))?;
        let longest = layout.longest();
        let shares: Vec<f32> = layout
            .lengths()
            .into_iter()
            .flat_map(|length| {
                (0..longest).map(move |place| if place < length { 1.0 / length as f32 } else { 0.0 })
            })
            .collect();
        let shares = Tensor::from_vec(shares, (layout.sequences(), 1, longest), device)?;
        shares.matmul(&filled)?.squeeze(1)
    }

    /// The stream before the first layer, `[B, N, d]` in f32.
    fn embed(&self, content: &Content<'_>, ways: &Ways<'_>) -> Result<Tensor> {
        let shape = [ways.layout.batch, ways.layout.tokens];
        let fits = |found: &[usize]| {
            if found == shape {
                return Ok(());
            }
            bail!("content has shape {found:?}, expected {shape:?} for this layout");
        };
        let x = match (content, &self.bias) {
            (Content::Tokens(ids), None) => {
                fits(ids.shape())?;
                lookup(&self.embedding, ids, self.embedding.dtype())?
            }
            (Content::Pixels(values), Some(bias)) => {
                fits(values.dims())?;
                let values = values.to_dtype(self.embedding.dtype())?.unsqueeze(D::Minus1)?;
                values.broadcast_mul(&self.embedding)?.broadcast_add(bias)?
            }
            _ => bail!("content is of another kind than {:?}", self.config.input),
        };
        match &self.theta {
            None => Ok(x),
            Some(theta) => x.broadcast_add(&self.positions(theta, ways)?),
        }
    }

    /// Sines and cosines `[1, N, d]`.
    fn positions(&self, theta: &Tensor, ways: &Ways<'_>) -> Result<Tensor> {
        let waves = |count: usize| -> Result<Tensor> {
            let phases = token_phases(theta, count, 0)?;
            Tensor::cat(&[phases.sin()?, phases.cos()?], D::Minus1)
        };
        let Some([rows, columns]) = self.config.grid else {
            return ways.each(&waves(ways.layout.longest())?)?.unsqueeze(0);
        };
        let half = self.config.layers.hidden_size / 2;
        let down = waves(rows)?.unsqueeze(1)?.broadcast_as((rows, columns, half))?;
        let along = waves(columns)?
            .unsqueeze(0)?
            .broadcast_as((rows, columns, half))?;
        Tensor::cat(&[down, along], D::Minus1)?.reshape((1, rows * columns, 2 * half))
    }

    /// The normalised end `[B, N, d]` of the residual stream that begins with `x`.
    fn run(&self, mut x: Tensor, ways: &Ways<'_>) -> Result<Tensor> {
        let config = &self.config.layers;
        let eps = config.rms_norm_eps;
        let bounds = lower_bounds(config, self.lower_bounds.as_ref())?;
        let mut normed = rms_norm_to(&x, self.gains[0].as_ref(), 1, eps, self.compute)?;
        // Layers with the same positions, most often all, share their phases.
        let mut phases: Option<(Rotary, Tensor)> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(rotary) = layer.rotary()
                && phases.as_ref().is_none_or(|(of, _)| of != rotary)
            {
                let theta = rotary.frequencies(x.device())?.to_dtype(self.embedding.dtype())?;
                let longest = token_phases(&theta, ways.layout.longest(), 0)?;
                phases = Some((*rotary, ways.each(&longest)?));
            }
            let context = CausalContext {
                phase: layer.rotary().and(phases.as_ref()).map(|(_, phase)| phase),
                lower_bound: bounds.get(index),
                ..CausalContext::default()
            };
            let stages = ways.stages.len();
            for (stage, paths) in ways.stages.iter().enumerate() {
                let branch = self.mix(layer, &normed, &context, paths, ways)?;
                let next = 2 * index + usize::from(stage + 1 == stages);
                (x, normed) = add_norm(&x, &branch, self.gains[next].as_ref(), eps)?;
            }
            let branch = layer.expand(&normed, None, None)?;
            (x, normed) = add_norm(&x, &branch, self.gains[2 * index + 2].as_ref(), eps)?;
        }
        Ok(normed)
    }

    /// The branch of the mixer on one stage's paths.
    fn mix(
        &self,
        layer: &Layer,
        normed: &Tensor,
        context: &CausalContext<'_>,
        paths: &Arc<Paths>,
        ways: &Ways<'_>,
    ) -> Result<Tensor> {
        if !self.config.layers.bidirectional {
            let mut memory = match (self.config.form, &ways.layout.borders) {
                (Form::Causal, None) => None,
                (Form::Causal, Some(borders)) => Some(Memory::packed(Arc::clone(borders))),
                _ => Some(Memory::along(Arc::clone(paths))),
            };
            return layer.mix(normed, context, None, memory.as_mut());
        }
        let Some(padded) = &ways.padded else {
            return layer.mix(normed, context, None, None);
        };
        let (sequences, longest) = (ways.layout.sequences(), ways.layout.longest());
        let (_, _, width) = normed.dims3()?;
        let filled = padded.apply(normed)?.reshape((sequences, longest, width))?;
        let mask = match padded.real() {
            Some(real) => Some(real.reshape((sequences, longest))?),
            None => None,
        };
        let branch = layer.mix(&filled, context, mask.as_ref(), None)?;
        padded.undo(&branch.reshape((1, sequences * longest, width))?)
    }
}

/// What a batch's layout means for all layers.
struct Ways<'a> {
    stages: Vec<Arc<Paths>>,
    layout: &'a Layout,
    /// Places of packed tokens in their sequences.
    places: Option<Tensor>,
    /// Packed sequences, filled up to the longest.
    padded: Option<Order>,
}

impl Ways<'_> {
    /// Of rows `[longest, ..]` of places, those of each token of a batch item.
    fn each(&self, rows: &Tensor) -> Result<Tensor> {
        match &self.places {
            None => Ok(rows.clone()),
            Some(places) => rows.index_select(places, 0),
        }
    }
}

/// Frequencies of the positions in a model of this width, of two axes or one.
fn frequencies(width: usize, two: bool, device: &Device) -> Result<Tensor> {
    let count = width / if two { 4 } else { 2 };
    let theta: Vec<f32> = (0..count)
        .map(|at| BASE.powf(-(at as f64) / count as f64) as f32)
        .collect();
    Tensor::new(theta, device)
}
