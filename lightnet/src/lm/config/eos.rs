//! What the EOS layer is made of (arXiv 2405.17383): where its expand, oscillation and shrink come from, and the models that are
//! instances of it, by name.

use candle_core::{Result, bail};
use serde::{Deserialize, Serialize};

use super::check::positive;
use super::{Activation, Architecture, Config, DecaySchedule, OutputGate, OutputNorm};

/// Where expand or shrink comes from.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A map of the token, through an activation: one value for each of the k rows.
    #[default]
    Data,
    /// A learnt constant for each element of the memory, k x d.
    Constant,
    /// One minus the gate, of expand alone: what is forgotten makes room. Gates are `keys` or `cumulative`.
    Tied,
}

/// Where the gates of the memory come from; in brackets the number of the type in the paper's code, and what a gate is of.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Oscillation {
    /// Learnt, or fixed (0: k x d).
    Constant,
    /// From the token on both sides: the product of `keys` and `values` (1: k x d).
    Outer,
    /// From the token (2: d).
    Values,
    /// From the token (3: k).
    #[default]
    Keys,
    /// Learnt, or fixed (4: k).
    ConstantKeys,
    /// Learnt, or fixed (5: d).
    ConstantValues,
    /// From the token for each row, times a constant for each element, before the sigmoid (6).
    KeysByConstant,
    /// From the token for each column, times a constant for each element (7).
    ValuesByConstant,
    /// From the token for each column, times a constant for each row (8).
    ValuesByConstantKeys,
    /// From the token for each row, times a constant for each column (9).
    KeysByConstantValues,
    /// None: nothing is forgotten (10, and with phases 11).
    None,
    /// Sums of exponentials of logits over tokens, before and after the token (12: k).
    Cumulative,
    /// One a head: fixed as `decay_schedule` says, or learnt.
    Head,
    /// `exp(-delta A)`, with a step `delta = softplus(x W_1 W_2)` for each column, which also multiplies the input, and A
    /// learnt for each element: the state space model Mamba.
    StateSpace,
}

/// How the memory turns, as if it were complex.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Turn {
    /// Not at all: it is real.
    #[default]
    None,
    /// All rows by one angle a token.
    Shared,
    /// Each row by its own, the frequencies of LRPE.
    Rows,
    /// Each row by an angle that is a map of the token.
    Data,
}

/// How a number u becomes a gate.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GateForm {
    /// `sigmoid(u)^(1 / tau)`.
    #[default]
    Root,
    /// `exp(-sigmoid(u) slope)` with the slopes of ALiBi along the rows, or along the columns where rows are alike.
    Slope,
}

/// What the EOS layer is made of. The size k of the memory is [`Config::head_dim`], the activation of shrink and expand
/// [`Config::linear_act`], and that of the input [`Config::value_act`].
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct EosConfig {
    /// Expand, e.
    pub expand: Source,
    /// Shrink, s.
    pub shrink: Source,
    /// Oscillation, o.
    pub oscillation: Oscillation,
    /// Whether constant gates are slopes of ALiBi instead of learnt.
    pub fixed: bool,
    /// How gates are made.
    pub gate: GateForm,
    /// The root that is taken of them.
    pub tau: f64,
    /// How the memory turns.
    pub turn: Turn,
    /// Activation of expand, where it is not that of shrink.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expand_act: Option<Activation>,
}

impl Default for EosConfig {
    fn default() -> Self {
        Self {
            expand: Source::Data,
            shrink: Source::Data,
            oscillation: Oscillation::Keys,
            fixed: false,
            gate: GateForm::Root,
            tau: 16.0,
            turn: Turn::None,
            expand_act: None,
        }
    }
}

impl EosConfig {
    /// Rows k of the memory of a head where nothing is said.
    pub(crate) const ROWS: usize = 8;

    /// Whether expand or shrink has a value for every element of the memory.
    pub(crate) fn has_full_sides(&self) -> bool {
        self.expand == Source::Constant || self.shrink == Source::Constant
    }

    pub(super) fn check(&self, config: &Config) -> Result<()> {
        use Oscillation::{Constant, ConstantKeys, ConstantValues, Cumulative, Head, Keys};
        if self.shrink == Source::Tied {
            bail!("eos.shrink is \"tied\", expected \"data\" or \"constant\"");
        }
        if self.expand == Source::Tied && !matches!(self.oscillation, Keys | Cumulative) {
            bail!("eos.expand is \"tied\", expected eos.oscillation \"keys\" or \"cumulative\" with it");
        }
        if self.oscillation == Cumulative && self.expand == Source::Constant {
            bail!("eos.oscillation is \"cumulative\", expected eos.expand \"data\" or \"tied\" with it");
        }
        let constants = [Constant, ConstantKeys, ConstantValues, Head];
        if self.fixed && !constants.contains(&self.oscillation) {
            bail!("eos.fixed: only constant gates can be");
        }
        positive("eos.tau", self.tau)?;
        let plain = self.oscillation == Keys && self.gate == GateForm::Root && self.tau == 1.0;
        if config.use_lower_bound && !plain {
            bail!("use_lower_bound needs eos.oscillation \"keys\", eos.gate \"root\" and eos.tau 1");
        }
        Ok(())
    }
}

/// Models that are instances of the EOS layer (table 2 of the paper).
///
/// Of state space models the recurrence with its diagonal transition; how they are discretised and started is not part of it:
/// constants are learnt as they are.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Instance {
    /// e = k, o = 1, s = q.
    LinearAttention,
    /// Constants for every element, complex.
    S4,
    /// Constants, transitions alike for all channels, complex.
    S5,
    /// Constants for every element, complex.
    Dss,
    /// As S5: the frequencies of a Toeplitz operator are alike for all channels, and fixed.
    Tnn,
    /// One constant gate a head.
    Tnl,
    /// The same.
    Retnet,
    /// e and s from data, `o = exp(-delta A)`.
    Mamba,
    /// e = exp(k), a constant gate for each channel, s = sigmoid(r), without the denominator.
    Rwkv4,
    /// o turns all rows by one angle.
    Cosformer,
    /// o turns each row by its own angle.
    Lrpe,
    /// Gates of rows from data.
    Gla,
    /// The same, complex.
    Gateloop,
    /// Gates of rows and of columns from data: decaying fast weights.
    Dur,
    /// Element-wise, e = 1 - f, o = f.
    Hgrn,
    /// e = 1 - f, o = f for each row.
    Hgrn2,
    /// Running means of values: e = exp(g - z), o = exp(z' - z).
    Lightnet,
}

impl Instance {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::LinearAttention,
        Self::S4,
        Self::S5,
        Self::Dss,
        Self::Tnn,
        Self::Tnl,
        Self::Retnet,
        Self::Mamba,
        Self::Rwkv4,
        Self::Cosformer,
        Self::Lrpe,
        Self::Gla,
        Self::Gateloop,
        Self::Dur,
        Self::Hgrn,
        Self::Hgrn2,
        Self::Lightnet,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::LinearAttention => "linear-attention",
            Self::S4 => "s4",
            Self::S5 => "s5",
            Self::Dss => "dss",
            Self::Tnn => "tnn",
            Self::Tnl => "tnl",
            Self::Retnet => "retnet",
            Self::Mamba => "mamba",
            Self::Rwkv4 => "rwkv4",
            Self::Cosformer => "cosformer",
            Self::Lrpe => "lrpe",
            Self::Gla => "gla",
            Self::Gateloop => "gateloop",
            Self::Dur => "dur",
            Self::Hgrn => "hgrn",
            Self::Hgrn2 => "hgrn2",
            Self::Lightnet => "lightnet",
        }
    }

    /// This instance in the sizes of `sizes`; element-wise ones have heads of one channel.
    #[must_use]
    pub fn of(self, sizes: &Config) -> Config {
        use Oscillation as O;
        let mut config = Config {
            eos: EosConfig::default(),
            ..sizes.clone()
        };
        config.learn_theta = false;
        match self {
            Self::S4 | Self::S5 | Self::Dss | Self::Tnn => {
                (config.eos.expand, config.eos.shrink) = (Source::Constant, Source::Constant);
                config.eos.turn = Turn::Rows;
                config.learn_theta = self != Self::Tnn;
            }
            Self::Rwkv4 | Self::Hgrn => {
                config.num_attention_heads = config.hidden_size;
                config.head_dim = Some(1);
            }
            _ => {}
        }
        config.eos.oscillation = match self {
            Self::LinearAttention | Self::Cosformer | Self::Lrpe => O::None,
            Self::S4 | Self::Dss => O::Constant,
            Self::S5 | Self::Tnn | Self::Rwkv4 => O::ConstantKeys,
            Self::Tnl | Self::Retnet => O::Head,
            Self::Mamba => O::StateSpace,
            Self::Gla | Self::Gateloop | Self::Hgrn | Self::Hgrn2 => O::Keys,
            Self::Dur => O::Outer,
            Self::Lightnet => O::Cumulative,
        };
        match self {
            Self::Tnl | Self::Retnet => config.eos.fixed = true,
            Self::Rwkv4 => {
                config.linear_act = Activation::Sigmoid;
                config.eos.expand_act = Some(Activation::Exp);
                config.eos.tau = 1.0;
            }
            Self::Cosformer => {
                config.eos.turn = Turn::Shared;
                config.linear_act = Activation::Relu;
            }
            Self::Lrpe => config.eos.turn = Turn::Rows,
            Self::Gateloop => config.eos.turn = Turn::Data,
            Self::Hgrn | Self::Hgrn2 => {
                config.eos.expand = Source::Tied;
                config.eos.tau = 1.0;
            }
            Self::Lightnet => config.eos.expand = Source::Tied,
            _ => {}
        }
        config
    }
}

impl Config {
    /// What [`Config::of`] changes for the EOS layer: one head of 8 rows, a layer norm behind it, and no gate.
    pub(super) fn with_eos(self) -> Self {
        if self.architecture != Architecture::Eos {
            return self;
        }
        Self {
            num_attention_heads: 1,
            head_dim: Some(EosConfig::ROWS),
            output_norm: OutputNorm::Layer,
            output_gate: OutputGate::None,
            use_lower_bound: false,
            decay_schedule: DecaySchedule::Alibi,
            ..self
        }
    }
}
