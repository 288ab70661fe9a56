//! The shape of a classifier of sequences, as its `config.json` says.

use std::path::Path;

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use super::super::config::Config;
use super::Form;
use crate::config::{ConfigError, LONGEST_SIDE, MOST_CLASSES, read_checked};

/// What sequences are made of.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Input {
    /// Ids below the size of the vocabulary.
    Tokens,
    /// Grey values, which a linear map takes to the width of the model.
    Pixels,
}

/// How tokens are told where they are.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// They are not.
    None,
    /// Fixed sines and cosines are added: of the place in the sequence, or half of the channels of the row and half of the column.
    #[default]
    Sine,
}

/// The shape.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "model_type", rename = "sequence_classifier")]
pub struct ClassifierConfig {
    /// Number of classes.
    pub classes: usize,
    /// What sequences are made of.
    pub input: Input,
    /// How layers go through the tokens.
    pub form: Form,
    /// Rows and columns of pictures, whose tokens follow each other row by row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<[usize; 2]>,
    /// How tokens are told where they are.
    #[serde(default)]
    pub positions: Positions,
    /// The layers, as those of a language model.
    pub layers: Config,
}

impl ClassifierConfig {
    /// Refuses shapes that no model can have.
    ///
    /// # Errors
    /// A size is zero or beyond all reason, or the form is not for this input or these layers.
    pub fn check(&self) -> Result<()> {
        self.layers.check()?;
        if self.classes < 2 || self.classes > MOST_CLASSES {
            bail!("classes is {}, expected 2 to {MOST_CLASSES}", self.classes);
        }
        match self.grid {
            Some([rows, columns]) => {
                let sides = 1..=LONGEST_SIDE;
                if !sides.contains(&rows) || !sides.contains(&columns) {
                    bail!("grid is {rows} x {columns}, expected sides of 1 to {LONGEST_SIDE}");
                }
            }
            None if self.form.needs_grid() => {
                bail!(
                    "form is {:?}, expected one of {} where there is no grid",
                    self.form.name(),
                    Form::ALL
                        .iter()
                        .filter(|form| !form.needs_grid())
                        .map(|form| form.name())
                        .collect::<Vec<_>>()
                        .join(", ")
                );
            }
            None => {}
        }
        let whole = self.form == Form::Whole;
        let layers = &self.layers;
        if layers.bidirectional != (whole && layers.scans_nothing()) {
            bail!(
                "bidirectional is {}, expected {} with {} layers of form {:?}",
                layers.bidirectional,
                !layers.bidirectional,
                layers.architecture.name(),
                self.form.name()
            );
        }
        if whole && !layers.sees_all() {
            bail!(
                "form is \"whole\", expected only with llama and lightnet, found {}, which scans",
                layers.architecture.name()
            );
        }
        if layers.use_tpe {
            bail!("use_tpe is true, expected false: a classifier adds its own positions");
        }
        if layers.token_shift {
            bail!("token_shift is true, expected false: it is for language models");
        }
        let halves = 2 * self.grid.map_or(1, |_| 2);
        if self.positions == Positions::Sine && !layers.hidden_size.is_multiple_of(halves) {
            bail!(
                "hidden_size is {}, expected a multiple of {halves} for positions of sines",
                layers.hidden_size
            );
        }
        Ok(())
    }

    /// Reads `config.json`.
    ///
    /// # Errors
    /// The file is unreadable, or describes a model that cannot be.
    pub fn read(path: &Path) -> std::result::Result<Self, ConfigError> {
        read_checked(path, Self::check)
    }
}

impl Config {
    /// Whether its mixer can be one that meets all tokens at once instead of a scan: LightNet.
    fn scans_nothing(&self) -> bool {
        self.architecture == super::super::Architecture::Lightnet
    }

    /// Whether all of its layers can meet all tokens at once.
    fn sees_all(&self) -> bool {
        use super::super::Architecture::{Lightnet, Llama};
        matches!(self.architecture, Lightnet | Llama)
    }
}
