//! A whole language model.

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder, ops::softmax};
use fulgur_kernels::cross_entropy::{self, Options};
use fulgur_kernels::embedding::{Ids, lookup};
use fulgur_kernels::linear::linear;
use fulgur_kernels::lrpe::{rotary_frequencies, token_phases};
use fulgur_kernels::norm::{add_norm, rms_norm_to};
use fulgur_kernels::tape;

use super::config::{Architecture, Config};
use super::layer::{Layer, Names};
use crate::mixer::causal::CausalContext;

/// The model.
#[derive(Clone, Debug)]
pub struct LanguageModel {
    config: Config,
    embedding: Tensor,
    layers: Vec<Layer>,
    /// Gains of the norms: of the mixer and of the gated linear unit of each layer, then of the end.
    gains: Vec<Tensor>,
    /// `[L, d]`, of HGRN2.
    lower_bounds: Option<Tensor>,
    head: Tensor,
    compute: DType,
    recompute: bool,
}

impl LanguageModel {
    /// Takes its tensors from `vb`; branches compute in `compute`.
    ///
    /// # Errors
    /// The shape is none, or a tensor is missing or has another shape.
    pub fn new(config: &Config, compute: DType, vb: &VarBuilder) -> Result<Self> {
        config.check()?;
        let Config {
            architecture,
            vocab_size,
            hidden_size,
            num_hidden_layers,
            ..
        } = *config;
        let (model, names) = (vb.pp("model"), Names::of(architecture));
        let normal = Init::Randn {
            mean: 0.0,
            stdev: config.initializer_range,
        };
        let table = |vb: VarBuilder| vb.get_with_hints((vocab_size, hidden_size), "weight", normal);
        let embedding = table(model.pp(names.embedding))?;
        let gain = |vb: VarBuilder| vb.get_with_hints(hidden_size, "weight", Init::Const(1.0));
        let (mut layers, mut gains) = (Vec::new(), Vec::new());
        for index in 0..num_hidden_layers {
            let vb = model.pp("layers").pp(index);
            layers.push(Layer::new(config, index, &vb)?);
            gains.push(gain(vb.pp(names.mixer_norm))?);
            gains.push(gain(vb.pp(names.glu_norm))?);
        }
        gains.push(gain(model.pp("norm"))?);
        let lower_bounds = (architecture == Architecture::Hgrn2)
            .then(|| {
                let shape = (num_hidden_layers, hidden_size);
                model.get_with_hints(shape, "lower_bounds", Init::Const(1.0))
            })
            .transpose()?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            table(vb.pp("lm_head"))?
        };
        Ok(Self {
            config: config.clone(),
            embedding,
            layers,
            gains,
            lower_bounds,
            head,
            compute,
            recompute: false,
        })
    }

    /// Whether the backward pass runs each layer again instead of keeping what it made: less memory, more time.
    #[must_use]
    pub fn recomputed(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Logits `[B, N, V]` of the token after each of `ids` `[B, N]`, in the type of computation.
    ///
    /// # Errors
    /// Ids that are not `[B, N]`, or a failing operation.
    pub fn logits(&self, ids: &Ids) -> Result<Tensor> {
        linear(&self.hidden(ids)?, &self.head, None)
    }

    /// Mean cross-entropy of `targets` `[B, N]` of type u32, in nats a token, without ever holding all logits.
    ///
    /// # Errors
    /// Shapes that do not fit, targets on the CPU out of range, or a failing operation.
    pub fn loss(&self, ids: &Ids, targets: &Tensor, options: &Options<'_>) -> Result<Tensor> {
        let hidden = self.hidden(ids)?.reshape(((), self.config.hidden_size))?;
        cross_entropy::head(&hidden, &self.head, &targets.flatten_all()?, options)
    }

    /// The loss of every token `[B N]`, without a gradient.
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub fn losses(&self, ids: &Ids, targets: &Tensor, options: &Options<'_>) -> Result<Tensor> {
        let hidden = self.hidden(ids)?.reshape(((), self.config.hidden_size))?;
        cross_entropy::head_losses(&hidden, &self.head, &targets.flatten_all()?, options)
    }

    /// The normalised end of the residual stream, `[B, N, d]`.
    fn hidden(&self, ids: &Ids) -> Result<Tensor> {
        let &[_, tokens] = ids.shape() else {
            bail!("ids have shape {:?}, expected [B, N]", ids.shape());
        };
        let eps = self.config.rms_norm_eps;
        let phase = match self.config.architecture {
            Architecture::Llama => {
                let (width, device) = (self.config.head_width(), self.embedding.device());
                let theta =
                    rotary_frequencies(width, self.config.theta(), device)?.to_dtype(self.stream())?;
                Some(token_phases(&theta, tokens, 0)?)
            }
            _ => None,
        };
        let bounds = self.bounds()?;
        let mut x = lookup(&self.embedding, ids, self.stream())?;
        let mut normed = rms_norm_to(&x, Some(&self.gains[0]), 1, eps, self.compute)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let block = Block {
                layer: layer.clone(),
                phase: phase.clone(),
                lower_bound: bounds.get(index).cloned(),
                gains: [2 * index + 1, 2 * index + 2].map(|gain| self.gains[gain].clone()),
                eps,
            };
            (x, normed) = if self.recompute {
                let entering = [x, normed];
                let leaving = tape::recompute(move || block.run(&entering[0], &entering[1]).map(Vec::from))?;
                match <[Tensor; 2]>::try_from(leaving) {
                    Ok([x, normed]) => (x, normed),
                    Err(others) => bail!("a layer gave {} tensors, expected 2", others.len()),
                }
            } else {
                block.run(&x, &normed)?.into()
            };
        }
        Ok(normed)
    }

    /// Type of the residual stream.
    fn stream(&self) -> DType {
        self.embedding.dtype()
    }

    /// HGRN2's lower bounds of gates, one vector a layer: sums of the softmax over layers, from the second on (section 3.2).
    fn bounds(&self) -> Result<Vec<Tensor>> {
        let Some(bounds) = &self.lower_bounds else {
            return Ok(Vec::new());
        };
        let shares = softmax(bounds, 0)?;
        let mut sum = shares.get(0)?.zeros_like()?;
        let mut all = vec![sum.clone()];
        for layer in 1..self.config.num_hidden_layers {
            sum = (sum + shares.get(layer)?)?;
            all.push(sum.clone());
        }
        Ok(all)
    }
}

/// A layer with all that it needs beside the stream.
struct Block {
    layer: Layer,
    phase: Option<Tensor>,
    lower_bound: Option<Tensor>,
    /// Of the norm before the gated linear unit, and of the one after it.
    gains: [Tensor; 2],
    eps: f64,
}

impl Block {
    /// The stream and its norm behind the layer, from those before it.
    fn run(&self, x: &Tensor, normed: &Tensor) -> Result<[Tensor; 2]> {
        let context = CausalContext {
            phase: self.phase.as_ref(),
            lower_bound: self.lower_bound.as_ref(),
        };
        let branch = self.layer.mix(normed, &context)?;
        let (x, normed) = add_norm(x, &branch, Some(&self.gains[0]), self.eps)?;
        let branch = self.layer.expand(&normed)?;
        let (x, normed) = add_norm(&x, &branch, Some(&self.gains[1]), self.eps)?;
        Ok([x, normed])
    }
}
