//! Where the sequences of a batch lie.

use std::sync::Arc;

use candle_core::{Result, bail};

/// Sequences `[B, N]` of one length, or packed ones behind each other in a batch of one.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(super) batch: usize,
    pub(super) tokens: usize,
    pub(super) borders: Option<Arc<[usize]>>,
}

impl Layout {
    /// `batch` sequences of `tokens` tokens each.
    ///
    /// # Errors
    /// One of them is zero.
    pub fn equal(batch: usize, tokens: usize) -> Result<Self> {
        if batch == 0 || tokens == 0 {
            bail!("{batch} sequences of {tokens} tokens, expected at least one of each");
        }
        Ok(Self {
            batch,
            tokens,
            borders: None,
        })
    }

    /// Sequences between `borders`, which start with 0, end with the number of tokens and always rise.
    ///
    /// # Errors
    /// They do not.
    pub fn packed(borders: &[usize]) -> Result<Self> {
        let tokens = match *borders {
            [0, .., last] => last,
            _ => bail!("borders of packed sequences are {borders:?}, expected 0 and at least one more"),
        };
        if !borders.is_sorted_by(|a, b| a < b) {
            bail!("borders of packed sequences do not rise: every sequence needs a token");
        }
        Ok(Self {
            batch: 1,
            tokens,
            borders: Some(borders.into()),
        })
    }

    /// Number of sequences S.
    pub fn sequences(&self) -> usize {
        self.borders
            .as_ref()
            .map_or(self.batch, |borders| borders.len() - 1)
    }

    /// Tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        let lengths = self.lengths().into_iter();
        lengths.max().unwrap_or(self.tokens)
    }

    /// Tokens of packed sequences; empty where all have the same length.
    pub(super) fn lengths(&self) -> Vec<usize> {
        let borders = self.borders.iter().flat_map(|borders| borders.windows(2));
        borders.map(|ends| ends[1] - ends[0]).collect()
    }

    /// The place of each packed token in its sequence.
    pub(super) fn places(&self) -> Vec<u32> {
        let lengths = self.lengths().into_iter();
        lengths.flat_map(|length| 0..length as u32).collect()
    }

    /// For packed sequences, the tokens at the places `[S, longest]` of a batch that is filled up behind each of them.
    pub(super) fn padded(&self) -> Vec<u32> {
        let longest = self.longest();
        let sequences = self.borders.iter().flat_map(|borders| borders.windows(2));
        sequences
            .flat_map(|ends| (0..longest).map(move |place| (ends[0] + place).min(ends[1] - 1) as u32))
            .collect()
    }
}
