//! Where the sequences of a batch lie, and the ways that layers go through them.

use std::sync::Arc;

use candle_core::{Device, Result, bail};
use fulgur_kernels::order::Order;
use serde::{Deserialize, Serialize};

use crate::mixer::causal::{Paths, Way};

/// How a layer goes through the tokens (arXiv 2404.07904): the mixer of a layer is causal, and sees more by scanning more than once
/// with the same parameters.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// One scan from the first token to the last.
    Causal,
    /// Two scans, forwards and backwards, whose results are summed before the norm of the output.
    #[default]
    Parallel,
    /// A scan forwards and then one backwards over its result, each with norm and residual.
    Series,
    /// Four scans of a picture, of rows and of columns in both directions, summed.
    #[serde(rename = "parallel-2d")]
    Parallel2d,
    /// Two scans of rows, summed, and then two of columns over the result.
    #[serde(rename = "series-2d")]
    Series2d,
    /// All tokens meet all others: softmax attention, and LightNet in its own form.
    Whole,
}

impl Form {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Causal,
        Self::Parallel,
        Self::Series,
        Self::Parallel2d,
        Self::Series2d,
        Self::Whole,
    ];

    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Causal => "causal",
            Self::Parallel => "parallel",
            Self::Series => "series",
            Self::Parallel2d => "parallel-2d",
            Self::Series2d => "series-2d",
            Self::Whole => "whole",
        }
    }

    /// Whether tokens have to be those of a picture.
    pub fn needs_grid(self) -> bool {
        matches!(self, Self::Parallel2d | Self::Series2d)
    }

    /// The mixers' ways through `layout`, one after the other, for pictures of `grid` rows and columns.
    ///
    /// # Errors
    /// The form needs a grid and there is none, or a device is out of memory.
    pub(super) fn stages(
        self,
        layout: &Layout,
        grid: Option<[usize; 2]>,
        device: &Device,
    ) -> Result<Vec<Arc<Paths>>> {
        let order = |there: &[u32]| Order::new(there, layout.tokens, device).map(Some);
        let forwards = || Way::through(None);
        let backwards = || Ok::<_, candle_core::Error>(Way::through(order(&layout.reversed())?));
        let rows = |[rows, _]: [usize; 2]| -> Result<Vec<Way>> {
            Ok(vec![forwards().in_parts(rows), backwards()?.in_parts(rows)])
        };
        let columns = |[rows, columns]: [usize; 2]| -> Result<Vec<Way>> {
            let mut there: Vec<u32> = (0..columns)
                .flat_map(|column| (0..rows).map(move |row| (row * columns + column) as u32))
                .collect();
            let down = Way::through(order(&there)?).in_parts(columns);
            there.reverse();
            Ok(vec![down, Way::through(order(&there)?).in_parts(columns)])
        };
        let stages = match (self, grid) {
            (Self::Whole, _) => return Ok(vec![Arc::new(Paths::whole(layout.borders.clone()))]),
            (Self::Causal, _) => vec![vec![forwards()]],
            (Self::Parallel, _) => vec![vec![forwards(), backwards()?]],
            (Self::Series, _) => vec![vec![forwards()], vec![backwards()?]],
            (Self::Parallel2d, Some(grid)) => vec![[rows(grid)?, columns(grid)?].concat()],
            (Self::Series2d, Some(grid)) => vec![rows(grid)?, columns(grid)?],
            (Self::Parallel2d | Self::Series2d, None) => {
                bail!("form is {:?}, expected pictures", self.name())
            }
        };
        let paths = |ways| Arc::new(Paths::along(ways, layout.borders.clone()));
        Ok(stages.into_iter().map(paths).collect())
    }
}

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

    /// The tokens of a row `[N]`, each sequence backwards.
    fn reversed(&self) -> Vec<u32> {
        match &self.borders {
            None => (0..self.tokens as u32).rev().collect(),
            Some(borders) => {
                let sequences = borders.windows(2);
                sequences
                    .flat_map(|ends| (ends[0] as u32..ends[1] as u32).rev())
                    .collect()
            }
        }
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
