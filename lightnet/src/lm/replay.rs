//! How single tokens go through a model: as they are, or on a GPU by a step that was recorded once.
//!
//! A step of a small model is some hundred kernels, and the host takes longer to launch them than the GPU to run them. Where all
//! that a step keeps has a constant size, it is recorded as a CUDA graph, which reads ids, position and states from fixed places
//! and writes states and logits to fixed places. Keys and values of softmax attention grow, so that their models are not for it.

use candle_core::{Result, Tensor};

use super::model::LanguageModel;
use super::state::State;

#[cfg(feature = "cuda")]
use {fulgur_kernels::graph, recorded::Replay, std::sync::Arc};

/// Single tokens after which a step is recorded: fewer would not make up for it.
#[cfg(feature = "cuda")]
const BEFORE: usize = 2;

/// The way of the single tokens of some sequences. Clones share what was recorded until one of them goes on.
#[derive(Clone, Debug, Default)]
pub(super) struct Stepping {
    /// Single tokens so far.
    #[cfg(feature = "cuda")]
    tokens: usize,
    /// Why no step is recorded.
    refused: Option<String>,
    #[cfg(feature = "cuda")]
    replay: Option<Arc<Replay>>,
}

impl Stepping {
    /// Without records.
    pub(super) fn plain() -> Self {
        Self::refusing(Some("it was asked not to".to_owned()))
    }

    /// Of other rows of the same sequences.
    pub(super) fn begun_anew(&self) -> Self {
        Self::refusing(self.refused.clone())
    }

    fn refusing(refused: Option<String>) -> Self {
        Self {
            refused,
            #[cfg(feature = "cuda")]
            tokens: 0,
            #[cfg(feature = "cuda")]
            replay: None,
        }
    }

    /// Why steps are not recorded, where that is known.
    pub(super) fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }
}

#[cfg(not(feature = "cuda"))]
impl Stepping {
    /// As [`LanguageModel::step`].
    #[allow(clippy::unused_self, reason = "only GPUs record steps")]
    pub(super) fn step(&mut self, model: &LanguageModel, ids: &[u32], state: &mut State) -> Result<Tensor> {
        model.step(ids, state)
    }

    /// Whether tensors of the state and logits are places that the next token is written to.
    #[allow(clippy::unused_self, reason = "only GPUs record steps")]
    pub(super) fn is_recorded(&self) -> bool {
        false
    }

    /// `state` as tensors that stay what they are.
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "only GPUs record steps"
    )]
    pub(super) fn kept(&self, state: &State) -> Result<State> {
        Ok(state.clone())
    }

    /// Leaves what was recorded: state and logits become tensors that stay what they are.
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "only GPUs record steps"
    )]
    pub(super) fn leave(&mut self, _: &mut State, _: &mut Option<Tensor>) -> Result<()> {
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl Stepping {
    /// As [`LanguageModel::step`]; of a step that was recorded, states and logits are places that the next one is written to.
    pub(super) fn step(&mut self, model: &LanguageModel, ids: &[u32], state: &mut State) -> Result<Tensor> {
        if let Some(replay) = &mut self.replay {
            // Others that share it would see their states change.
            let alone = Arc::get_mut(replay).filter(|replay| replay.serves(model, ids, state));
            match alone {
                Some(replay) => return replay.step(model, ids, state),
                None => self.leave(state, &mut None)?,
            }
        }
        if self.refused.is_none() && self.tokens >= BEFORE {
            let replay = match graph::is_allowed()? {
                true => Replay::new(model, state),
                false => Err(candle_core::Error::Msg(format!("{} is 0", graph::CHOICE))),
            };
            match replay {
                Ok(mut replay) => {
                    tracing::debug!(batch = ids.len(), "decoding by a recorded step");
                    *state = replay.state();
                    let logits = replay.step(model, ids, state);
                    self.replay = Some(Arc::new(replay));
                    return logits;
                }
                Err(error) => {
                    tracing::debug!(%error, "decoding without a recorded step");
                    self.refused = Some(error.to_string());
                }
            }
        }
        self.tokens += 1;
        model.step(ids, state)
    }

    /// Whether tensors of the state and logits are places that the next token is written to.
    pub(super) fn is_recorded(&self) -> bool {
        self.replay.is_some()
    }

    /// `state` as tensors that stay what they are.
    pub(super) fn kept(&self, state: &State) -> Result<State> {
        match self.replay {
            Some(_) => state.copied(),
            None => Ok(state.clone()),
        }
    }

    /// Leaves what was recorded: state and logits become tensors that stay what they are.
    pub(super) fn leave(&mut self, state: &mut State, logits: &mut Option<Tensor>) -> Result<()> {
        if self.replay.is_some() {
            *state = state.copied()?;
            *logits = logits.as_ref().map(Tensor::force_contiguous).transpose()?;
            self.replay = None;
            self.tokens = 0;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod recorded {
    use candle_core::{DType, Result, Tensor, bail};
    use fulgur_kernels::embedding::Ids;
    use fulgur_kernels::graph::{self, Graph};

    use super::super::model::LanguageModel;
    use super::super::state::State;

    /// A step that was recorded, with all that it reads and writes.
    #[derive(Debug)]
    pub(super) struct Replay {
        /// Goes before what it works on.
        graph: Graph,
        /// Whose weights it reads.
        model: LanguageModel,
        /// `[B + 1]` of type u32: ids, then how many tokens came before.
        input: Tensor,
        /// Before the step and after it.
        state: State,
        /// `[B, V]`, after it.
        logits: Tensor,
    }

    impl Replay {
        /// Of steps of `model` behind `state`, which stays what it is.
        ///
        /// # Errors
        /// Why there is none for such a model, or what the driver says.
        pub(super) fn new(model: &LanguageModel, state: &State) -> Result<Self> {
            let device = model.device();
            if !device.is_cuda() {
                bail!("the model is not on a GPU");
            }
            if !model.is_rounded() {
                bail!("weights are made anew at each token");
            }
            let Some(batch) = state.batch() else {
                bail!("there are no tokens yet");
            };
            let before = state.tensors();
            if let Some(name) = before.keys().find(|name| name.ends_with(".keys")) {
                bail!("{name} grow with each token");
            }
            // As an ordinary step leaves them.
            let mut after = state.clone();
            let logits = model.step(&vec![0; batch], &mut after)?.force_contiguous()?;
            for (name, tensor) in after.tensors() {
                let alike =
                    |before: &Tensor| before.dims() == tensor.dims() && before.dtype() == tensor.dtype();
                if !before.get(&name).is_some_and(alike) {
                    bail!("{name} changes its shape");
                }
            }
            drop(after);
            let input = Tensor::zeros(batch + 1, DType::U32, device)?;
            let (ids, clock) = (input.narrow(0, 0, batch)?, input.narrow(0, batch, 1)?);
            let places = state.copied()?;
            let fixed = places.tensors();
            let graph = Graph::record(device, || {
                let mut next = places.in_place();
                let found = model.step_at(&ids, &clock, &mut next)?;
                graph::copy(&found.contiguous()?, &logits)?;
                for (name, tensor) in next.tensors() {
                    match fixed.get(&name) {
                        Some(place) => graph::copy(&tensor.contiguous()?, place)?,
                        None => bail!("{name} is new"),
                    }
                }
                Ok(())
            })?;
            // The runs before it was recorded went on behind the state.
            for (name, tensor) in &before {
                if let Some(place) = fixed.get(name) {
                    graph::copy(&tensor.contiguous()?, place)?;
                }
            }
            Ok(Self {
                graph,
                model: model.clone(),
                input,
                state: places,
                logits,
            })
        }

        /// Whether it is for such a step.
        pub(super) fn serves(&self, model: &LanguageModel, ids: &[u32], state: &State) -> bool {
            self.model.is(model) && self.state.batch() == Some(ids.len()) && state.batch() == Some(ids.len())
        }

        /// Its places, as the state that they hold.
        pub(super) fn state(&self) -> State {
            self.state.clone()
        }

        /// The logits after `ids` behind what its places hold, which is `state`.
        pub(super) fn step(
            &mut self,
            model: &LanguageModel,
            ids: &[u32],
            state: &mut State,
        ) -> Result<Tensor> {
            let checked = Ids::new(ids, &[ids.len()], model.config().vocab_size)?;
            let Ok(tokens) = u32::try_from(state.tokens()) else {
                bail!("{} tokens, expected less than 2^32", state.tokens());
            };
            graph::write(&self.input, &[checked.list(), &[tokens]].concat())?;
            state.advance(ids.len(), 1)?;
            self.graph.launch()?;
            Ok(self.logits.clone())
        }
    }
}
