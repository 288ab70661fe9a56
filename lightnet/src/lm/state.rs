//! What a model keeps of the tokens so far.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor, bail};

use crate::mixer::causal::Memory;

/// The state of a batch of sequences of one length. Clones share tensors, and none sees what another one adds: a clone is a fork.
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

    /// How many sequences there are, once there are tokens.
    pub fn batch(&self) -> Option<usize> {
        self.batch
    }

    /// The state of the sequences `rows` of this one, which may be left out and repeated.
    ///
    /// # Errors
    /// There is no such sequence.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        let Some(batch) = self.batch else {
            return Ok(self.clone());
        };
        if rows.is_empty() || rows.iter().any(|&row| row as usize >= batch) {
            bail!("sequences {rows:?}, expected some of 0 to {}", batch - 1);
        }
        let mut chosen = self.map(|_, tensor| {
            let rows = Tensor::new(rows, tensor.device())?;
            tensor.contiguous()?.index_select(&rows, 0)
        })?;
        chosen.batch = Some(rows.len());
        Ok(chosen)
    }

    /// Several states as one batch, in their order, after as many tokens as the first has had: of models that see positions all
    /// have to have had as many.
    ///
    /// # Errors
    /// States of other models, before their first token, or with other numbers of keys.
    pub(super) fn joined(parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            bail!("no states to join")
        };
        let mut batch = 0;
        for part in parts {
            match part.batch {
                Some(rows) if part.layers.len() == first.layers.len() => batch += rows,
                _ => bail!("a state of another model or without tokens"),
            }
        }
        let layers = (0..first.layers.len()).map(|layer| {
            let memories: Vec<&Memory> = parts.iter().map(|part| &part.layers[layer]).collect();
            Memory::joined(&memories)
        });
        let tpe: Vec<&Tensor> = parts.iter().filter_map(|part| part.tpe.as_ref()).collect();
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            tpe: match tpe.is_empty() {
                true => None,
                false => Some(Tensor::cat(&tpe, 0)?),
            },
            tokens: first.tokens,
            batch: Some(batch),
        })
    }

    /// All tensors by name: `tpe`, and `layer.N.` before what a layer keeps.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let layers = self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let tensors = layer.tensors().into_iter();
            tensors.map(move |(name, tensor)| (format!("layer.{index}.{name}"), tensor.clone()))
        });
        let tpe = self.tpe.iter().map(|tpe| ("tpe".to_owned(), tpe.clone()));
        layers.chain(tpe).collect()
    }

    /// Its like with what `tensor` makes of each tensor and its name.
    pub(super) fn map<E>(
        &self,
        mut tensor: impl FnMut(&str, &Tensor) -> std::result::Result<Tensor, E>,
    ) -> std::result::Result<Self, E> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for (index, layer) in self.layers.iter().enumerate() {
            layers.push(layer.map(|name, of| tensor(&format!("layer.{index}.{name}"), of))?);
        }
        Ok(Self {
            layers,
            tpe: self.tpe.as_ref().map(|of| tensor("tpe", of)).transpose()?,
            ..self.clone()
        })
    }

    /// The same tensors, whose states tokens may be written over: nobody else may read them afterwards.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn in_place(&self) -> Self {
        Self {
            layers: self.layers.iter().map(Memory::in_place).collect(),
            ..self.clone()
        }
    }

    /// A copy that shares nothing.
    #[cfg(any(feature = "cuda", test))]
    pub(super) fn copied(&self) -> Result<Self> {
        self.map(|_, tensor| tensor.force_contiguous())
    }

    /// The same tensors after another number of tokens.
    pub(super) fn at(self, tokens: usize) -> Self {
        Self { tokens, ..self }
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
