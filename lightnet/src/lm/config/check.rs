//! What shapes of models can be.

use candle_core::{Result, bail};

use super::{Architecture, Config, Decay};

/// Most layers that are built.
pub(super) const MOST_LAYERS: usize = 4096;
/// Most heads of a layer.
const MOST_HEADS: usize = 1 << 14;
/// Widest model and vocabulary.
pub(super) const WIDEST: usize = 1 << 24;
/// Widest head.
const WIDEST_HEAD: usize = 1 << 14;
/// Most taps of a short convolution.
const MOST_TAPS: usize = 64;

/// Refuses a number that is not above zero.
pub(super) fn positive(name: &str, value: f64) -> Result<()> {
    if !(value.is_finite() && value > 0.0) {
        bail!("{name} is {value}, expected a positive number");
    }
    Ok(())
}

/// Refuses what another size, which has a name too, does not divide.
fn multiple(name: &str, size: usize, (of, by): (&str, usize)) -> Result<()> {
    if by == 0 || !size.is_multiple_of(by) {
        bail!("{name} is {size}, expected a multiple of {of}, {by}");
    }
    Ok(())
}

/// Refuses what does not divide another size, which has a name too.
fn divisor(name: &str, size: usize, (of, whole): (&str, usize)) -> Result<()> {
    if size == 0 || !whole.is_multiple_of(size) {
        bail!("{name} is {size}, expected a divisor of {of}, {whole}");
    }
    Ok(())
}

impl Config {
    /// Refuses shapes that no model can have.
    ///
    /// # Errors
    /// A size is zero or beyond all reason, or heads do not divide what they share.
    pub fn check(&self) -> Result<()> {
        self.check_sizes()?;
        let (width, heads) = (self.hidden_size, self.num_attention_heads);
        if self.key_size() > WIDEST {
            bail!(
                "head_dim is {}, expected keys of at most {WIDEST} channels in {heads} heads",
                self.head_width()
            );
        }
        let softmax = self.architecture == Architecture::Llama;
        if self.head_dim.is_none() {
            multiple("hidden_size", width, ("num_attention_heads", heads))?;
        }
        let groups = self.key_value_heads();
        divisor("num_key_value_heads", groups, ("num_attention_heads", heads))?;
        if softmax && !self.head_width().is_multiple_of(2) {
            bail!(
                "head_dim is {}, expected an even width for rotary positions",
                self.head_width()
            );
        }
        let values = self.value_size();
        if !softmax {
            let name = if self.value_dim.is_some() {
                "hidden_dim"
            } else {
                "hidden_size"
            };
            multiple(name, values, ("the number of heads", heads))?;
        }
        if self.architecture == Architecture::Eos {
            self.eos.check(self)?;
        }
        if self.has_lower_bounds() && self.key_size() != width {
            bail!(
                "use_lower_bound needs as many key channels as hidden_size, {width}, found {}: {heads} heads of {}",
                self.key_size(),
                self.head_width()
            );
        }
        if self.architecture == Architecture::Hgrn1 && self.head_width() != 1 {
            bail!(
                "head_dim is {}, expected 1: hgrn1 is element-wise",
                self.head_width()
            );
        }
        let both_ways = [Architecture::Lightnet, Architecture::Llama];
        if self.bidirectional && !both_ways.contains(&self.architecture) {
            bail!(
                "bidirectional: only lightnet and llama can be, found {}",
                self.architecture.name()
            );
        }
        if self.bidirectional && (self.decay != Decay::Vector || self.seeded) {
            bail!("bidirectional: decay has to be \"vector\", and seeded false");
        }
        if self.token_shift && !(self.bidirectional && width >= 4) {
            bail!(
                "token_shift: only a bidirectional model of at least 4 channels can look at the token behind"
            );
        }
        if self.lrpe_longest == Some(0) {
            bail!("lrpe_longest is 0, expected a number of tokens");
        }
        if self.bidirectional && !self.attn.is_empty() {
            bail!("bidirectional: attn has to be absent, softmax layers are causal");
        }
        let transnormer = self.architecture == Architecture::Transnormer;
        if transnormer && (self.conv_size.is_some() || self.key_size() != values) {
            bail!("transnormer has neither short convolutions nor keys of another width than values");
        }
        if let Some(&layer) = self
            .lrpe_layers
            .iter()
            .find(|&&layer| layer >= self.num_hidden_layers)
        {
            bail!(
                "lrpe_layers names layer {layer}, expected less than {}",
                self.num_hidden_layers
            );
        }
        if self.use_tpe {
            multiple("use_tpe: hidden_size", width, ("the number of heads", heads))?;
        }
        self.check_hybrid()?;
        for (name, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("output_norm_eps", self.output_eps()),
            ("rope_theta", self.rope_theta),
        ] {
            positive(name, value)?;
        }
        if !(self.initializer_range.is_finite() && self.initializer_range >= 0.0) {
            bail!(
                "initializer_range is {}, expected a number that is not negative",
                self.initializer_range
            );
        }
        Ok(())
    }

    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, WIDEST),
            ("hidden_size", self.hidden_size, WIDEST),
            ("intermediate_size", self.intermediate_size, WIDEST),
            ("num_hidden_layers", self.num_hidden_layers, MOST_LAYERS),
            ("num_attention_heads", self.num_attention_heads, self.most_heads()),
            ("head_dim", self.head_width(), WIDEST_HEAD),
            ("num_key_value_heads", self.key_value_heads(), self.most_heads()),
            ("hidden_dim", self.value_size(), WIDEST),
            ("gate_low_rank_dim", self.gate_rank(), WIDEST),
            ("conv_size", self.conv_size.unwrap_or(1), MOST_TAPS),
        ];
        for (name, size, most) in sizes {
            if size == 0 || size > most {
                bail!("{name} is {size}, expected 1 to {most}");
            }
        }
        Ok(())
    }

    /// Channels of HGRN1, and of instances of EOS, are heads to the formulas, but nothing is kept for each.
    fn most_heads(&self) -> usize {
        if matches!(self.architecture, Architecture::Hgrn1 | Architecture::Eos) {
            WIDEST
        } else {
            MOST_HEADS
        }
    }

    fn check_hybrid(&self) -> Result<()> {
        let mut seen = Vec::new();
        for attn in &self.attn {
            let (heads, groups) = (attn.num_heads, attn.num_kv_heads.unwrap_or(attn.num_heads));
            if self.architecture == Architecture::Llama {
                bail!("attn: every layer of llama is softmax attention already");
            }
            if heads == 0 || heads > MOST_HEADS || !self.hidden_size.is_multiple_of(heads) {
                bail!(
                    "attn.num_heads is {heads}, expected a divisor of hidden_size, {}, of at most {MOST_HEADS}",
                    self.hidden_size
                );
            }
            divisor("attn.num_kv_heads", groups, ("attn.num_heads", heads))?;
            if !(self.hidden_size / heads).is_multiple_of(2) {
                bail!(
                    "attn.num_heads is {heads}, expected heads of an even width for rotary positions, hidden_size is {}",
                    self.hidden_size
                );
            }
            if let Some(window) = attn.window_size {
                bail!("attn.window_size is {window}, only null is supported");
            }
            positive("attn.rope_theta", attn.rope_theta)?;
            for &layer in &attn.layers {
                if layer >= self.num_hidden_layers || seen.contains(&layer) {
                    bail!(
                        "attn.layers names layer {layer}, expected each once and less than num_hidden_layers, {}",
                        self.num_hidden_layers
                    );
                }
                seen.push(layer);
            }
        }
        Ok(())
    }
}
