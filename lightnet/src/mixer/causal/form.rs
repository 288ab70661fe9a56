//! The ways that a layer of a causal mixer goes through sequences and pictures.

use std::sync::Arc;

use candle_core::{Device, Result, bail};
use fulgur_kernels::order::Order;
use serde::{Deserialize, Serialize};

use super::{Paths, Way};

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

    /// The mixers' ways, one after the other, through `tokens` tokens, which are packed sequences where there are `borders`, and
    /// the cells of pictures where there is a `grid` of rows and columns.
    ///
    /// # Errors
    /// The form needs a grid and there is none, or a device is out of memory.
    pub(crate) fn stages(
        self,
        tokens: usize,
        borders: Option<&Arc<[usize]>>,
        grid: Option<[usize; 2]>,
        device: &Device,
    ) -> Result<Vec<Arc<Paths>>> {
        let order = |there: &[u32]| Order::new(there, tokens, device).map(Some);
        let forwards = || Way::through(None);
        let backwards = || Ok::<_, candle_core::Error>(Way::through(order(&reversed(tokens, borders))?));
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
            (Self::Whole, _) => return Ok(vec![Arc::new(Paths::whole(borders.cloned()))]),
            (Self::Causal, _) => vec![vec![forwards()]],
            (Self::Parallel, _) => vec![vec![forwards(), backwards()?]],
            (Self::Series, _) => vec![vec![forwards()], vec![backwards()?]],
            (Self::Parallel2d, Some(grid)) => vec![[rows(grid)?, columns(grid)?].concat()],
            (Self::Series2d, Some(grid)) => vec![rows(grid)?, columns(grid)?],
            (Self::Parallel2d | Self::Series2d, None) => {
                bail!("form is {:?}, expected pictures", self.name())
            }
        };
        let paths = |ways| Arc::new(Paths::along(ways, borders.cloned()));
        Ok(stages.into_iter().map(paths).collect())
    }
}

/// The tokens of a row `[N]`, each sequence backwards.
fn reversed(tokens: usize, borders: Option<&Arc<[usize]>>) -> Vec<u32> {
    match borders {
        None => (0..tokens as u32).rev().collect(),
        Some(borders) => {
            let sequences = borders.windows(2);
            sequences
                .flat_map(|ends| (ends[0] as u32..ends[1] as u32).rev())
                .collect()
        }
    }
}
