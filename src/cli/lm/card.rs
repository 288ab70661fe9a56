//! The card of a packed language model: what can be known of it, and places for what its maker knows.

use std::fmt;
use std::path::{Path, PathBuf};

use fulgur_lightnet::lm::Config;
use serde::Serialize;

use super::super::packing::Stored;
use crate::report::grouped;

/// A file of the folder.
#[derive(Debug, Serialize)]
pub(super) struct FileSize {
    pub(super) name: &'static str,
    pub(super) bytes: u64,
}

/// Loss on a text that was held out, before and after packing.
#[derive(Debug, Serialize)]
pub(super) struct HeldOut {
    pub(super) file: PathBuf,
    /// Tokens of a window.
    pub(super) context: usize,
    /// Tokens that count.
    pub(super) tokens: u64,
    pub(super) nats_per_token: Change,
    pub(super) perplexity: Change,
    pub(super) bits_per_byte: Option<Change>,
}

/// A figure of the model that was trained, and of the packed one.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Change {
    pub(super) before: f64,
    pub(super) after: f64,
}

/// What a card says.
pub(super) struct Card<'a> {
    /// The folder, as it was named.
    pub(super) path: &'a Path,
    pub(super) config: &'a Config,
    pub(super) parameters: u64,
    /// Files but the card.
    pub(super) files: &'a [FileSize],
    pub(super) precision: Stored,
    /// What rounding cost, relative.
    pub(super) error: f64,
    pub(super) held_out: Option<&'a HeldOut>,
}

/// What a maker has to say.
const UNKNOWN: &str = "*Not stated yet.*";

impl fmt::Display for Card<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Config {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            tie_word_embeddings,
            ..
        } = *self.config;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        writeln!(f, "# {name}\n\nA language model that `fulgur lm` reads.\n")?;
        writeln!(f, "## What it is\n\n| | |\n|---|---|")?;
        let head = match tie_word_embeddings {
            true => "the embedding",
            false => "weights of its own",
        };
        let softmax: usize = (self.config.attn.iter())
            .map(|attention| attention.layers.len())
            .sum();
        for (what, value) in [
            ("architecture", self.config.architecture.name().to_owned()),
            ("weights", grouped(self.parameters)),
            ("layers", num_hidden_layers.to_string()),
            ("of them softmax attention", softmax.to_string()),
            ("width", hidden_size.to_string()),
            ("heads", num_attention_heads.to_string()),
            ("gated linear units", intermediate_size.to_string()),
            ("vocabulary", grouped(vocab_size as u64)),
            ("head", head.to_owned()),
        ] {
            if what != "of them softmax attention" || softmax > 0 {
                writeln!(f, "| {what} | {value} |")?;
            }
        }
        writeln!(f, "\n| file | bytes |\n|---|---|")?;
        for file in self.files {
            writeln!(f, "| `{}` | {} |", file.name, grouped(file.bytes))?;
        }
        let all = self.files.iter().map(|file| file.bytes).sum();
        writeln!(f, "| all | {} |\n", grouped(all))?;
        let stored = match self.precision {
            Stored::EightBit => {
                "Matrices are stored in 8 bits with a scale for every 64 values, and widened when they are read"
            }
            Stored::SixBit => {
                "Matrices are stored in 6 bits with a scale for every 64 values, and widened when they are read"
            }
            Stored::F16 => "Weights are stored in 16 bits, and widened when they are read",
            Stored::F32 => "Weights are stored as they were trained",
        };
        writeln!(
            f,
            "{stored}. That cost {:.2} % of the weights (relative root mean square).\n",
            100.0 * self.error
        )?;
        writeln!(
            f,
            "```sh\nfulgur lm generate --model {} --prompt \"The bell\"\n```\n",
            self.path.display()
        )?;
        writeln!(f, "## Measured\n")?;
        match self.held_out {
            None => writeln!(f, "{UNKNOWN}\n")?,
            Some(held_out) => write_losses(f, held_out)?,
        }
        writeln!(
            f,
            "## How it was made\n\n{UNKNOWN} Text, recipe, commands, hardware and time.\n"
        )?;
        writeln!(f, "## What it is for, and its limits\n\n{UNKNOWN}\n")?;
        writeln!(
            f,
            "## Licence\n\n{UNKNOWN} The texts that it learnt from, and their terms."
        )
    }
}

fn write_losses(f: &mut fmt::Formatter<'_>, held_out: &HeldOut) -> fmt::Result {
    let file = held_out.file.file_name().unwrap_or_default().to_string_lossy();
    writeln!(
        f,
        "On {} tokens of `{file}`, in windows of {} that begin with nothing:\n",
        grouped(held_out.tokens),
        grouped(held_out.context as u64)
    )?;
    writeln!(f, "| | before packing | after |\n|---|---|---|")?;
    for (name, change) in [
        ("nats a token", Some(held_out.nats_per_token)),
        ("perplexity", Some(held_out.perplexity)),
        ("bits a byte", held_out.bits_per_byte),
    ] {
        if let Some(Change { before, after }) = change {
            writeln!(f, "| {name} | {before:.4} | {after:.4} |")?;
        }
    }
    writeln!(f)
}
