//! What a model keeps of the tokens so far.

use candle_core::{Result, Tensor, bail};

use crate::mixer::causal::Memory;

/// The state of a batch of sequences of one length. Clones share tensors, which nobody writes to: a clone is a fork.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub(super) layers: Vec<Memory>,
    /// Of TPE, `[B, 1, H, d / H]`.
    pub(super) tpe: Option<Tensor>,
    tokens: usize,
    batch: Option<usize>,
}

impl State {
    /// Before the first token of a model with so many layers.
    pub(super) fn new(layers: usize) -> Self {
        Self {
            layers: vec![Memory::default(); layers],
            ..Self::default()
        }
    }

    /// How many tokens each sequence has had.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes of all that is kept. Only keys and values of softmax attention grow with the number of tokens.
    pub fn bytes(&self) -> usize {
        let tpe = self.tpe.iter();
        let tpe: usize = tpe
            .map(|tpe| tpe.elem_count() * tpe.dtype().size_in_bytes())
            .sum();
        self.layers.iter().map(Memory::bytes).sum::<usize>() + tpe
    }

    /// Notes down `tokens` more tokens of `batch` sequences.
    pub(super) fn advance(&mut self, batch: usize, tokens: usize) -> Result<()> {
        match self.batch {
            Some(before) if before != batch => {
                bail!("{batch} sequences, expected {before} like the tokens before")
            }
            _ => self.batch = Some(batch),
        }
        self.tokens += tokens;
        Ok(())
    }
}
