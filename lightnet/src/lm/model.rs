//! A whole language model.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use fulgur_kernels::cross_entropy::{self, Options};
use fulgur_kernels::embedding::{Ids, lookup, lookup_at};
use fulgur_kernels::exchange::{Kept, StateExchange};
use fulgur_kernels::linear::linear;
use fulgur_kernels::lrpe::token_phases;
use fulgur_kernels::norm::rms_norm_to;
use fulgur_kernels::tape;

use super::block::Block;
use super::config::Config;
use super::layer::{Layer, Names, lower_bounds};
use super::loan::{self, Lender, Loan};
use super::rope::Rotary;
use super::state::State;
use crate::linear::{Linear, Start};
use crate::norm::RmsNorm;
use crate::position::{Grid, MdTpe, TpeConfig};

/// The model.
#[derive(Clone, Debug)]
pub struct LanguageModel {
    config: Config,
    embedding: Tensor,
    tpe: Option<MdTpe>,
    layers: Vec<Arc<Layer>>,
    /// Gains of the norms: of the mixer and of the gated linear unit of each layer, then of the end.
    gains: Vec<Option<Tensor>>,
    /// `[L, d]`, of HGRN.
    lower_bounds: Option<Tensor>,
    /// What does not change while nobody trains.
    fixed: Option<Fixed>,
    restore: Option<Restore>,
    head: Tensor,
    compute: DType,
    recompute: bool,
    /// The other parts, where it sees a part of each sequence.
    exchange: Option<Arc<dyn StateExchange>>,
    /// Who has the weights while they are not needed.
    lender: Option<Arc<dyn Lender>>,
}

/// What a model that nobody trains makes once instead of at each token.
#[derive(Clone, Debug)]
struct Fixed {
    /// Lower bounds of the gates of each layer.
    bounds: Vec<Tensor>,
    /// Frequencies of the positions of each layer that has some.
    frequencies: Vec<Option<Tensor>>,
}

/// What restores masked tokens has before the head: `norm(silu(x W + b))`.
#[derive(Clone, Debug)]
struct Restore {
    dense: Linear,
    norm: RmsNorm,
}

impl LanguageModel {
    /// Takes its tensors from `vb`; branches compute in `compute`.
    ///
    /// # Errors
    /// The shape is none, or a tensor is missing or has another shape.
    pub fn new(config: &Config, compute: DType, vb: &VarBuilder) -> Result<Self> {
        Self::build(config, compute, vb, None)
    }

    /// What one of several ranks has of a model ([`Config::cut_of`]), with its own tensors in `vb`. All `ranks` call the same
    /// methods in the same order.
    ///
    /// # Errors
    /// As [`Self::new`], and layers that do not split over so many ranks.
    pub fn in_tensor_part(
        config: &Config,
        compute: DType,
        vb: &VarBuilder,
        ranks: &Arc<dyn StateExchange>,
    ) -> Result<Self> {
        config
            .check_tensor(ranks.parts())
            .map_err(candle_core::Error::Msg)?;
        Self::build(config, compute, vb, Some(ranks))
    }

    fn build(
        config: &Config,
        compute: DType,
        vb: &VarBuilder,
        ranks: Option<&Arc<dyn StateExchange>>,
    ) -> Result<Self> {
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
        let gain = |vb: &VarBuilder, norm: usize| {
            let named = names.norms.map(|norms| vb.pp(norms[norm]));
            named
                .map(|vb| vb.get_with_hints(hidden_size, "weight", Init::Const(1.0)))
                .transpose()
        };
        let (mut layers, mut gains) = (Vec::new(), Vec::new());
        for index in 0..num_hidden_layers {
            let vb = model.pp("layers").pp(index);
            layers.push(Arc::new(match ranks {
                Some(ranks) => Layer::in_tensor_part(config, index, &vb, ranks)?,
                None => Layer::new(config, index, &vb)?,
            }));
            gains.push(gain(&vb, 0)?);
            gains.push(gain(&vb, 1)?);
        }
        gains.push(gain(&model, 2)?);
        let lower_bounds = config
            .has_lower_bounds()
            .then(|| {
                let shape = (num_hidden_layers, hidden_size);
                model.get_with_hints(shape, "lower_bounds", Init::Const(1.0))
            })
            .transpose()?;
        let tpe = TpeConfig {
            dim: hidden_size,
            heads: config.num_attention_heads,
            axes: 1,
            two_sided: config.bidirectional,
            residual: config.tpe_residual,
        };
        let start = Start::Normal(config.initializer_range);
        let restore = || {
            Ok::<_, candle_core::Error>(Restore {
                dense: Linear::new(hidden_size, hidden_size, true, start, &vb.pp("mlm").pp("dense"))?,
                norm: RmsNorm::new(hidden_size, &vb.pp("mlm").pp("norm"))?,
            })
        };
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            table(vb.pp("lm_head"))?
        };
        Ok(Self {
            config: config.clone(),
            embedding,
            tpe: config
                .use_tpe
                .then(|| MdTpe::new(tpe, &model.pp("tpe")))
                .transpose()?,
            layers,
            gains,
            lower_bounds,
            fixed: None,
            restore: config.bidirectional.then(restore).transpose()?,
            head,
            compute,
            recompute: false,
            exchange: None,
            lender: None,
        })
    }

    /// The model of one part of sequences that are split: ids and targets are those of the part, all parts have the same number
    /// of tokens, and `exchange` joins them. Parts call the same methods in the same order, and take gradients together.
    #[must_use]
    pub fn in_parts(self, exchange: Arc<dyn StateExchange>) -> Self {
        Self {
            exchange: Some(exchange).filter(|exchange| exchange.parts() > 1),
            ..self
        }
    }

    /// The model whose units ([`Config::units`]) borrow their weights from `lender` while they work, in training and validation.
    #[must_use]
    pub fn lent_by(self, lender: Arc<dyn Lender>) -> Self {
        Self {
            lender: Some(lender),
            ..self
        }
    }

    /// Whether the backward pass runs each layer again instead of keeping what it made: less memory, more time.
    #[must_use]
    pub fn recomputed(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    /// The model with its maps and its head in `weights`, f32 or bf16, for decoding: they are read as they are then, and what
    /// else does not change from token to token is made once. Nobody can train it afterwards.
    ///
    /// On the CPU, where branches compute in f32, bf16 is half of what a token has to read; everything is still summed in f32.
    ///
    /// # Errors
    /// A failing operation.
    pub fn rounded(mut self, weights: DType) -> Result<Self> {
        for layer in &mut self.layers {
            Arc::make_mut(layer).round(weights)?;
        }
        self.head = self.head.detach().to_dtype(weights)?;
        let bounds = lower_bounds(&self.config, self.lower_bounds.as_ref())?
            .iter()
            .map(Tensor::detach)
            .collect();
        let frequencies = self
            .layers
            .iter()
            .map(|layer| layer.rotary().map(|rotary| self.frequencies(rotary)).transpose())
            .collect::<Result<_>>()?;
        self.fixed = Some(Fixed { bounds, frequencies });
        Ok(self)
    }

    /// Whether it has been made for decoding, by [`Self::rounded`].
    #[cfg(feature = "cuda")]
    pub(super) fn is_rounded(&self) -> bool {
        self.fixed.is_some()
    }

    /// Whether both are one model, and not only of the same weights.
    #[cfg(feature = "cuda")]
    pub(super) fn is(&self, other: &Self) -> bool {
        let layers = self.layers.iter().zip(&other.layers);
        self.embedding.id() == other.embedding.id()
            && self.head.id() == other.head.id()
            && self.compute == other.compute
            && self.layers.len() == other.layers.len()
            && layers.into_iter().all(|(layer, other)| Arc::ptr_eq(layer, other))
    }

    /// Type in which branches compute.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// Frequencies of rotary positions in the type of the stream.
    fn frequencies(&self, rotary: &Rotary) -> Result<Tensor> {
        rotary.frequencies(self.device())?.to_dtype(self.stream())
    }

    /// Its shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where its weights are.
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// A number that tells its weights from others of the same shape: of some rows of embedding and head.
    ///
    /// # Errors
    /// A failing operation.
    pub fn fingerprint(&self) -> Result<String> {
        const ROWS: usize = 16;
        let mut words = String::new();
        for table in [&self.embedding, &self.head] {
            let rows = table.narrow(0, 0, ROWS.min(self.config.vocab_size))?;
            let values: Vec<f32> = rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            let mut hash = 0xcbf2_9ce4_8422_2325u64;
            for value in values {
                hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0000_0100_0000_01b3);
            }
            words.push_str(&format!("{hash:016x}"));
        }
        Ok(words)
    }

    /// Logits `[B, N, V]` of the token after each of `ids` `[B, N]`, in the type of computation; in both directions, of the tokens
    /// themselves.
    ///
    /// # Errors
    /// Ids that are not `[B, N]`, or a failing operation.
    pub fn logits(&self, ids: &Ids) -> Result<Tensor> {
        let hidden = self.hidden(ids, None, None)?;
        self.through_head(|head| linear(&hidden, head, None))
    }

    /// As [`Self::logits`], where tokens at which `mask` `[B, N]` is zero are padding: for models in both directions.
    ///
    /// # Errors
    /// The model is causal, or as [`Self::logits`].
    pub fn masked_logits(&self, ids: &Ids, mask: &Tensor) -> Result<Tensor> {
        if !self.config.bidirectional {
            bail!("a mask of padding is for models in both directions, found a causal one");
        }
        linear(&self.hidden(ids, Some(mask), None)?, &self.head, None)
    }

    /// A state before the first token.
    pub fn start(&self) -> State {
        State::new(self.layers.len())
    }

    /// Logits `[B, N, V]` of the token after each of `ids` `[B, N]`, which go on behind `state`. If it fails, the state is as before.
    ///
    /// # Errors
    /// Ids that are not `[B, N]` with the batch of the tokens before, a model in both directions, or a failing operation.
    pub fn extend(&self, ids: &Ids, state: &mut State) -> Result<Tensor> {
        linear(&self.extended(ids, state)?, &self.head, None)
    }

    /// Logits `[B, V]` of the token after the last of `ids` `[B, N]`, which go on behind `state`.
    ///
    /// # Errors
    /// As [`Self::extend`].
    pub fn prefill(&self, ids: &Ids, state: &mut State) -> Result<Tensor> {
        let hidden = self.extended(ids, state)?;
        let last = hidden.narrow(1, hidden.dim(1)? - 1, 1)?.squeeze(1)?;
        linear(&last, &self.head, None)
    }

    /// Logits `[B, V]` of the token after `ids`, one for each sequence, which go on behind `state`.
    ///
    /// # Errors
    /// As [`Self::extend`], and ids beyond the vocabulary.
    pub fn step(&self, ids: &[u32], state: &mut State) -> Result<Tensor> {
        let ids = Ids::new(ids, &[ids.len(), 1], self.config.vocab_size)?;
        self.prefill(&ids, state)
    }

    /// As [`Self::step`] for ids `[B]` and the number of tokens so far `[1]`, both of type u32 beside the weights, where they are
    /// read when the step is done and not before. The caller vouches for the ids.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn step_at(&self, ids: &Tensor, clock: &Tensor, state: &mut State) -> Result<Tensor> {
        let mut next = state.clone();
        let tokens = Tokens::At { ids, clock };
        let hidden = self.run(&tokens, None, Some(&mut next), None)?.squeeze(1)?;
        *state = next;
        linear(&hidden, &self.head, None)
    }

    fn extended(&self, ids: &Ids, state: &mut State) -> Result<Tensor> {
        if self.config.bidirectional {
            bail!("a model in both directions has no state to go on from");
        }
        // A failure half way must not leave some layers ahead of others.
        let mut next = state.clone();
        let hidden = self.hidden(ids, None, Some(&mut next))?;
        *state = next;
        Ok(hidden)
    }

    /// Mean cross-entropy of `targets` `[B, N]` of type u32, in nats a token, without ever holding all logits.
    ///
    /// # Errors
    /// Shapes that do not fit, targets on the CPU out of range, or a failing operation.
    pub fn loss(&self, ids: &Ids, targets: &Tensor, options: &Options<'_>) -> Result<Tensor> {
        let hidden = self
            .hidden(ids, None, None)?
            .reshape(((), self.config.hidden_size))?;
        self.through_head(|head| cross_entropy::head(&hidden, head, &targets.flatten_all()?, options))
    }

    /// As [`Self::loss`], of packed sequences in a batch of one: `borders` start with 0, end with N and never fall, and tokens see
    /// nothing of other sequences.
    ///
    /// # Errors
    /// As [`Self::loss`], borders that are none, a model in both directions, or one with short convolutions, TPE, or LightNet's
    /// variants of decay, which see across borders.
    pub fn packed_loss(
        &self,
        ids: &Ids,
        targets: &Tensor,
        borders: &[usize],
        options: &Options<'_>,
    ) -> Result<Tensor> {
        let hidden = self
            .packed_hidden(ids, borders)?
            .reshape(((), self.config.hidden_size))?;
        self.through_head(|head| cross_entropy::head(&hidden, head, &targets.flatten_all()?, options))
    }

    /// As [`Self::losses`], of packed sequences.
    ///
    /// # Errors
    /// As [`Self::packed_loss`].
    pub fn packed_losses(
        &self,
        ids: &Ids,
        targets: &Tensor,
        borders: &[usize],
        options: &Options<'_>,
    ) -> Result<Tensor> {
        let hidden = self
            .packed_hidden(ids, borders)?
            .reshape(((), self.config.hidden_size))?;
        self.through_head(|head| cross_entropy::head_losses(&hidden, head, &targets.flatten_all()?, options))
    }

    fn packed_hidden(&self, ids: &Ids, borders: &[usize]) -> Result<Tensor> {
        if self.config.bidirectional || self.tpe.is_some() {
            bail!("packed sequences are not for models in both directions or with TPE");
        }
        self.run(&Tokens::Known(ids), None, None, Some(borders.into()))
    }

    /// The loss of every token `[B N]`, without a gradient.
    ///
    /// # Errors
    /// As [`Self::loss`].
    pub fn losses(&self, ids: &Ids, targets: &Tensor, options: &Options<'_>) -> Result<Tensor> {
        let hidden = self
            .hidden(ids, None, None)?
            .reshape(((), self.config.hidden_size))?;
        self.through_head(|head| cross_entropy::head_losses(&hidden, head, &targets.flatten_all()?, options))
    }

    /// The loss of every token `[B N]`, as [`Self::losses`], of `ids` `[B, N]` that go on behind `state`.
    ///
    /// # Errors
    /// As [`Self::extend`] and [`Self::loss`]; then the state is as before.
    pub fn extend_losses(
        &self,
        ids: &Ids,
        targets: &Tensor,
        state: &mut State,
        options: &Options<'_>,
    ) -> Result<Tensor> {
        let mut next = state.clone();
        let hidden = self
            .extended(ids, &mut next)?
            .reshape(((), self.config.hidden_size))?;
        let targets = targets.flatten_all()?;
        let losses =
            self.through_head(|head| cross_entropy::head_losses(&hidden, head, &targets, options))?;
        *state = next;
        Ok(losses)
    }

    /// `work` with the weights of the head. Adjoints of the loss do not read them; those of logits do, and are not for weights
    /// that are lent.
    fn through_head<T>(&self, work: impl FnOnce(&Tensor) -> Result<T>) -> Result<T> {
        loan::with(self.lender.as_ref(), self.config.head_unit(), || work(&self.head))
    }

    /// The normalised end of the residual stream, `[B, N, d]`.
    fn hidden(&self, ids: &Ids, mask: Option<&Tensor>, state: Option<&mut State>) -> Result<Tensor> {
        self.run(&Tokens::Known(ids), mask, state, None)
    }

    /// As [`Self::hidden`]; without a state, of sequences that may be packed.
    fn run(
        &self,
        ids: &Tokens<'_>,
        mask: Option<&Tensor>,
        mut state: Option<&mut State>,
        packed: Option<Arc<[usize]>>,
    ) -> Result<Tensor> {
        let [batch, tokens] = ids.shape()?;
        let position = match (&state, &self.exchange) {
            (Some(_), Some(_)) => bail!("a model of parts of sequences keeps no state"),
            (Some(state), None) => state.tokens(),
            (None, Some(exchange)) => exchange.position_offset(),
            (None, None) => 0,
        };
        if let Some(state) = state.as_deref_mut() {
            state.advance(batch, tokens)?;
        }
        let eps = self.config.rms_norm_eps;
        let bounds = match &self.fixed {
            Some(fixed) => fixed.bounds.clone(),
            None => lower_bounds(&self.config, self.lower_bounds.as_ref())?,
        };
        let lender = self.lender.as_ref();
        loan::finished(lender, &[1, 0])?;
        let mut x = loan::with(lender, 0, || self.embed(ids, state.as_deref_mut()))?;
        let mut normed = rms_norm_to(&x, self.gains[0].as_ref(), 1, eps, self.compute)?;
        // Layers with the same positions, most often all, share their phases.
        let mut phases: Option<(Rotary, Tensor)> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            if let Some(rotary) = layer.rotary()
                && phases.as_ref().is_none_or(|(of, _)| of != rotary)
            {
                let fixed = self.fixed.as_ref();
                let theta = match fixed.and_then(|fixed| fixed.frequencies[index].clone()) {
                    Some(theta) => theta,
                    None => self.frequencies(rotary)?,
                };
                phases = Some((*rotary, token_phases(&theta, tokens, position)?));
            }
            if index + 2 < self.config.units() {
                // Gradients of this layer's weights may still follow its adjoints; those of the next one are complete.
                loan::finished(lender, &[index + 2])?;
            }
            let block = Block {
                loan: lender.map(|lender| Arc::new(Loan::new(lender.clone(), index + 1))),
                layer: layer.clone(),
                phase: layer
                    .rotary()
                    .and(phases.as_ref())
                    .map(|(_, phase)| phase.clone()),
                lower_bound: bounds.get(index).cloned(),
                mask: mask.cloned(),
                packed: packed.clone(),
                position,
                clock: ids.clock().cloned(),
                gains: [2 * index + 1, 2 * index + 2].map(|gain| self.gains[gain].clone()),
                eps,
                parts: self
                    .exchange
                    .as_ref()
                    .map(|exchange| Arc::new(Kept::new(exchange.clone()))),
            };
            (x, normed) = if let Some(state) = state.as_deref_mut() {
                block.run(&x, &normed, state.layers.get_mut(index))?.into()
            } else if self.recompute {
                let entering = [x, normed];
                let leaving =
                    tape::recompute(move || block.run(&entering[0], &entering[1], None).map(Vec::from))?;
                match <[Tensor; 2]>::try_from(leaving) {
                    Ok([x, normed]) => (x, normed),
                    Err(others) => bail!("a layer gave {} tensors, expected 2", others.len()),
                }
            } else {
                block.run(&x, &normed, None)?.into()
            };
        }
        match &self.restore {
            Some(Restore { dense, norm }) => norm.forward(&dense.forward(&normed)?.silu()?),
            None => Ok(normed),
        }
    }

    /// The stream before the first layer.
    fn embed(&self, ids: &Tokens<'_>, state: Option<&mut State>) -> Result<Tensor> {
        let mut x = match *ids {
            Tokens::Known(ids) => lookup(&self.embedding, ids, self.stream())?,
            Tokens::At { ids, .. } => lookup_at(&self.embedding, ids, self.stream())?.unsqueeze(1)?,
        };
        if self.config.scale_embedding {
            x = (x * (self.config.hidden_size as f64).sqrt())?;
        }
        match (&self.tpe, state) {
            (None, _) => Ok(x),
            (Some(tpe), None) => tpe.forward(&x, &Grid::new(&[x.dim(1)?]), self.exchange.as_ref()),
            (Some(tpe), Some(state)) => {
                let (x, after) = tpe.resume(&x, state.tpe.as_ref())?;
                state.tpe = Some(after);
                Ok(x)
            }
        }
    }

    /// Type of the residual stream.
    fn stream(&self) -> DType {
        self.embedding.dtype()
    }
}

/// Tokens that go through the model.
enum Tokens<'a> {
    /// Ids `[B, N]` that the host knows.
    Known(&'a Ids),
    /// One for each sequence, `[B]`, and how many came before, `[1]`, which the device knows.
    #[cfg_attr(
        not(any(feature = "cuda", test)),
        allow(dead_code, reason = "steps are recorded on GPUs")
    )]
    At { ids: &'a Tensor, clock: &'a Tensor },
}

impl Tokens<'_> {
    fn shape(&self) -> Result<[usize; 2]> {
        match *self {
            Self::Known(ids) => match *ids.shape() {
                [batch, tokens] => Ok([batch, tokens]),
                _ => bail!("ids have shape {:?}, expected [B, N]", ids.shape()),
            },
            Self::At { ids, .. } => Ok([ids.dims1()?, 1]),
        }
    }

    fn clock(&self) -> Option<&Tensor> {
        match *self {
            Self::Known(_) => None,
            Self::At { clock, .. } => Some(clock),
        }
    }
}
