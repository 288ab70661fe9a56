//! `config.json` as libraries write it: which names they use, what they take where a name is absent, and what of it is not
//! supported here.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::rope::{RopeParameters, Scaling};
use super::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, OutputGate, OutputNorm, SoftmaxLayers,
};

/// Eps of the norm before HGRN2's output map in flash-linear-attention, whatever `norm_eps` says.
const HGRN2_OUTPUT_EPS: f64 = 1e-5;
/// The same of LightNet.
const LIGHTNET_OUTPUT_EPS: f64 = 1e-6;
/// Widths of flash-linear-attention's gated linear units are multiples of this where they are not given.
const GLU_MULTIPLE: usize = 256;

/// One set of softmax layers, or several.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(untagged)]
enum OneOrMore {
    One(SoftmaxLayers),
    More(Vec<SoftmaxLayers>),
}

macro_rules! published {
    ($($(#[$attribute:meta])* $name:ident: $kind:ty,)*) => {
        /// All keys that are looked at; others are ignored, and null is as good as absent.
        #[derive(Clone, Debug, Default, Deserialize, Serialize)]
        #[serde(default)]
        pub(super) struct Published {
            $($(#[$attribute])* #[serde(skip_serializing_if = "Option::is_none")] $name: Option<$kind>,)*
        }

        /// All of them.
        #[cfg(test)]
        const KEYS: &[&str] = &[$(stringify!($name)),*];
    };
}

published! {
    model_type: Architecture,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    rms_norm_eps: f64,
    hidden_act: String,
    attention_bias: bool,
    mlp_bias: bool,
    rope_theta: f64,
    rope_parameters: RopeParameters,
    rope_scaling: RopeParameters,
    max_position_embeddings: f64,
    partial_rotary_factor: f64,
    quantization_config: Value,
    tie_word_embeddings: bool,
    initializer_range: f64,
    // flash-linear-attention
    num_heads: usize,
    expand_ratio: usize,
    hidden_ratio: f64,
    norm_eps: f64,
    elementwise_affine: bool,
    gate_low_rank_dim: usize,
    use_short_conv: bool,
    conv_size: usize,
    share_conv_kernel: bool,
    use_lower_bound: bool,
    attn: OneOrMore,
    attnres_block_size: usize,
    // TransNormerLLM
    decoder_embed_dim: usize,
    decoder_layers: usize,
    decoder_attention_heads: usize,
    glu_dim: i64,
    hidden_dim: usize,
    no_scale_embedding: bool,
    norm_type: String,
    linear_use_lrpe: Value,
    linear_use_lrpe_list: Vec<Value>,
    linear_act_fun: Activation,
    bias: bool,
    init_std: f64,
    // Ours
    output_norm_eps: f64,
    output_norm: OutputNorm,
    norm_per_head: bool,
    gate_first: bool,
    output_gate: OutputGate,
    scale_queries: bool,
    linear_act: Activation,
    value_act: Activation,
    decay_schedule: DecaySchedule,
    lrpe_layers: Vec<usize>,
    scale_embedding: bool,
    exclusive_lower_bound: bool,
    decay: Decay,
    eos: EosConfig,
    seeded: bool,
    use_lrpe: bool,
    half_lrpe: bool,
    learn_theta: bool,
    lrpe_longest: usize,
    token_shift: bool,
    use_tpe: bool,
    tpe_residual: bool,
    bidirectional: bool,
}

type Read<T> = Result<T, String>;

impl Published {
    /// Takes the model to be of this kind where it does not say.
    pub(super) fn assume(&mut self, kind: Option<Architecture>) {
        self.model_type = self.model_type.or(kind);
    }

    /// Refuses what asks for another function than any that is here.
    fn refuse(&self) -> Read<()> {
        if let Some(found) = &self.quantization_config {
            return Err(format!(
                "quantization_config is {found}, only weights that are not quantised are supported"
            ));
        }
        // Older files say so without having any convolution.
        if self.share_conv_kernel == Some(true) && self.use_short_conv == Some(true) {
            return Err("share_conv_kernel is true, only false is supported".into());
        }
        if let Some(size) = self.attnres_block_size {
            return Err(format!("attnres_block_size is {size}, only null is supported"));
        }
        if let Some(factor) = self.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(format!("partial_rotary_factor is {factor}, only 1 is supported"));
        }
        Ok(())
    }

    fn activation(&self, otherwise: Activation) -> Read<Activation> {
        match self.hidden_act.as_deref() {
            None => Ok(otherwise),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("none") => Ok(Activation::None),
            Some(other) => Err(format!(
                "hidden_act is {other:?}, supported are \"silu\", \"swish\" and \"none\""
            )),
        }
    }

    /// What all kinds share, on top of what this kind is.
    fn shared(&self, architecture: Architecture, defaults: [usize; 3]) -> Read<Config> {
        let of = Config::of(architecture);
        let [vocabulary, width, layers] = defaults;
        let given = |name: &str, value: Option<usize>, default: usize| match value {
            None if default == 0 => Err(format!("{name} is missing, expected a number")),
            value => Ok(value.unwrap_or(default)),
        };
        let conv = self.use_short_conv.unwrap_or(false);
        Ok(Config {
            vocab_size: given("vocab_size", self.vocab_size, vocabulary)?,
            hidden_size: given("hidden_size", self.hidden_size.or(self.decoder_embed_dim), width)?,
            num_hidden_layers: given(
                "num_hidden_layers",
                self.num_hidden_layers.or(self.decoder_layers),
                layers,
            )?,
            rms_norm_eps: self.norm_eps.or(self.rms_norm_eps).unwrap_or(of.rms_norm_eps),
            output_norm_eps: self.output_norm_eps,
            output_norm: self.output_norm.unwrap_or(of.output_norm),
            elementwise_affine: self.elementwise_affine.unwrap_or(of.elementwise_affine),
            norm_per_head: self.norm_per_head.unwrap_or(of.norm_per_head),
            gate_first: self.gate_first.unwrap_or(of.gate_first),
            output_gate: self.output_gate.unwrap_or(of.output_gate),
            gate_low_rank_dim: self.gate_low_rank_dim,
            scale_queries: self.scale_queries.unwrap_or(false),
            hidden_act: self.activation(of.hidden_act)?,
            linear_act: self.linear_act.or(self.linear_act_fun).unwrap_or(of.linear_act),
            value_act: self.value_act.unwrap_or(of.value_act),
            attention_bias: self.attention_bias.or(self.bias).unwrap_or(false),
            mlp_bias: self.mlp_bias.or(self.bias).unwrap_or(false),
            conv_size: conv.then(|| self.conv_size.unwrap_or(4)),
            decay_schedule: self.decay_schedule.unwrap_or(of.decay_schedule),
            lrpe_layers: self.lrpe_layers.clone().unwrap_or(of.lrpe_layers.clone()),
            scale_embedding: self.scale_embedding.unwrap_or(of.scale_embedding),
            use_lower_bound: self.use_lower_bound.unwrap_or(of.use_lower_bound),
            exclusive_lower_bound: self.exclusive_lower_bound.unwrap_or(false),
            decay: self.decay.unwrap_or_default(),
            eos: self.eos.unwrap_or_default(),
            seeded: self.seeded.unwrap_or(of.seeded),
            use_lrpe: self.use_lrpe.unwrap_or(of.use_lrpe),
            half_lrpe: self.half_lrpe.unwrap_or(of.half_lrpe),
            learn_theta: self.learn_theta.unwrap_or(of.learn_theta),
            lrpe_longest: self.lrpe_longest.or(of.lrpe_longest),
            token_shift: self.token_shift.unwrap_or(of.token_shift),
            use_tpe: self.use_tpe.unwrap_or(of.use_tpe),
            tpe_residual: self.tpe_residual.unwrap_or(of.tpe_residual),
            bidirectional: self.bidirectional.unwrap_or(false),
            attn: match self.attn.clone() {
                None => Vec::new(),
                Some(OneOrMore::One(attn)) => vec![attn],
                Some(OneOrMore::More(attn)) => attn,
            },
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            initializer_range: self.initializer_range.or(self.init_std).unwrap_or(0.02),
            ..of
        })
    }

    /// LLaMA as transformers configures it.
    fn llama(&self) -> Read<Config> {
        let config = self.shared(Architecture::Llama, [32000, 4096, 32])?;
        let rope = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let theta = rope.and_then(|rope| rope.rope_theta).or(self.rope_theta);
        Ok(Config {
            intermediate_size: self.intermediate_size.unwrap_or(11008),
            num_attention_heads: self.num_attention_heads.unwrap_or(32),
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rope_theta: theta.unwrap_or(1e4),
            rope_scaling: match rope {
                Some(rope) => rope.scaling(self.max_position_embeddings)?,
                None => Scaling::None,
            },
            ..config
        })
    }

    /// HGRN2 and LightNet as flash-linear-attention configures them.
    fn flash_linear_attention(&self, architecture: Architecture) -> Read<Config> {
        let config = self.shared(architecture, [32000, 2048, 24])?;
        let width = config.hidden_size;
        let hgrn2 = architecture == Architecture::Hgrn2;
        let heads = self.num_heads.or(self.num_attention_heads);
        let expand = match self.expand_ratio.or(self.head_dim) {
            Some(expand) => expand,
            None if heads.is_some() => divided("hidden_size", width, "num_heads", heads)?,
            None => 128,
        };
        // Files of ours say how queries are scaled. In others HGRN2 goes by its expand ratio alone.
        let ours = self.scale_queries.is_some();
        let heads = match heads {
            Some(heads) if ours || !hgrn2 => heads,
            _ => width / expand.max(1),
        };
        if heads == 0 {
            return Err(format!(
                "expand_ratio is {expand}, expected 1 to hidden_size, {width}"
            ));
        }
        let eps = if hgrn2 {
            HGRN2_OUTPUT_EPS
        } else {
            LIGHTNET_OUTPUT_EPS
        };
        // LightNet of that library does not hand this base to its softmax layers.
        let mut attn = config.attn.clone();
        if !hgrn2 && !ours {
            attn.iter_mut()
                .for_each(|attn| attn.rope_theta = super::rope_theta());
        }
        Ok(Config {
            intermediate_size: self.glu_width(width)?,
            num_attention_heads: heads,
            head_dim: Some(expand),
            output_norm_eps: Some(self.output_norm_eps.unwrap_or(eps)),
            output_gate: match (self.output_gate, hgrn2) {
                (Some(gate), _) => gate,
                (None, true) => OutputGate::None,
                (None, false) => OutputGate::Silu,
            },
            gate_low_rank_dim: Some(self.gate_low_rank_dim.unwrap_or(128)),
            scale_queries: self.scale_queries.unwrap_or(true),
            attn,
            ..config
        })
    }

    /// The width that flash-linear-attention takes where none is given: two thirds of `hidden_ratio` widths, rounded up.
    fn glu_width(&self, width: usize) -> Read<usize> {
        if let Some(given) = self.intermediate_size {
            return Ok(given);
        }
        let ratio = self.hidden_ratio.unwrap_or(4.0);
        let wide = width as f64 * ratio * 2.0 / 3.0;
        if !(wide >= 0.0 && wide < super::check::WIDEST as f64) {
            return Err(format!(
                "hidden_ratio is {ratio}, expected a positive number of hidden_size, {width}"
            ));
        }
        Ok((wide as usize).next_multiple_of(GLU_MULTIPLE))
    }

    /// TransNormerLLM as its published code configures it.
    fn transnormer(&self) -> Read<Config> {
        let config = self.shared(Architecture::Transnormer, [64000, 1024, 24])?;
        if let Some(norm) = self.norm_type.as_deref().filter(|&norm| norm != "simplermsnorm") {
            return Err(format!(
                "norm_type is {norm:?}, only \"simplermsnorm\" is supported"
            ));
        }
        let (width, layers) = (config.hidden_size, config.num_hidden_layers);
        let heads = self
            .decoder_attention_heads
            .or(self.num_attention_heads)
            .unwrap_or(8);
        let values = self.hidden_dim.unwrap_or(width);
        let on = |value: &Value| value.as_bool() == Some(true) || value.as_f64().is_some_and(|v| v != 0.0);
        let lrpe_layers = match (&self.lrpe_layers, &self.linear_use_lrpe_list) {
            (Some(layers), _) => layers.clone(),
            (None, Some(list)) if !list.is_empty() => {
                if list.len() < layers {
                    return Err(format!(
                        "linear_use_lrpe_list has {} entries, expected one for each of {layers} layers",
                        list.len()
                    ));
                }
                (0..layers).filter(|&layer| on(&list[layer])).collect()
            }
            _ if self.linear_use_lrpe.as_ref().is_some_and(on) && layers <= super::check::MOST_LAYERS => {
                (0..layers).collect()
            }
            _ => Vec::new(),
        };
        if !lrpe_layers.is_empty() && values != width {
            return Err(format!(
                "hidden_dim is {values}, expected decoder_embed_dim, {width}, where layers have LRPE"
            ));
        }
        let glu = match (self.intermediate_size, self.glu_dim.unwrap_or(2816)) {
            (Some(size), _) => size,
            (None, -1) => width,
            (None, size) => usize::try_from(size)
                .map_err(|_| format!("glu_dim is {size}, expected a positive number or -1"))?,
        };
        Ok(Config {
            intermediate_size: glu,
            num_attention_heads: heads,
            head_dim: Some(divided(
                "hidden_dim",
                values,
                "decoder_attention_heads",
                Some(heads),
            )?),
            value_dim: Some(values),
            lrpe_layers,
            scale_embedding: self
                .scale_embedding
                .unwrap_or(!self.no_scale_embedding.unwrap_or(false)),
            // Transformers ties unless it is told otherwise.
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(true),
            ..config
        })
    }

    /// The kinds that only this project writes.
    fn ours(&self, architecture: Architecture) -> Read<Config> {
        let config = self.shared(architecture, [0; 3])?;
        let width = config.hidden_size;
        let elementwise = architecture == Architecture::Hgrn1;
        Ok(Config {
            intermediate_size: self
                .intermediate_size
                .ok_or("intermediate_size is missing, expected a number")?,
            num_attention_heads: if elementwise {
                width
            } else {
                self.num_attention_heads
                    .ok_or("num_attention_heads is missing, expected a number")?
            },
            head_dim: if elementwise {
                Some(1)
            } else {
                self.head_dim.or(config.head_dim)
            },
            ..config
        })
    }
}

fn divided(name: &str, value: usize, by_name: &str, by: Option<usize>) -> Read<usize> {
    match by {
        Some(by) if by > 0 && value.is_multiple_of(by) => Ok(value / by),
        Some(by) => Err(format!(
            "{name} is {value}, expected a multiple of {by_name}, {by}"
        )),
        None => Err(format!(
            "{by_name} is missing, expected a divisor of {name}, {value}"
        )),
    }
}

impl TryFrom<Published> for Config {
    type Error = String;

    fn try_from(file: Published) -> Read<Self> {
        file.refuse()?;
        match file.model_type {
            None => Err(format!(
                "model_type is missing, expected one of {}",
                Architecture::ALL.map(Architecture::name).join(", ")
            )),
            Some(Architecture::Llama) => file.llama(),
            Some(kind @ (Architecture::Hgrn2 | Architecture::Lightnet)) => file.flash_linear_attention(kind),
            Some(Architecture::Transnormer) => file.transnormer(),
            Some(kind) => file.ours(kind),
        }
    }
}

impl From<Config> for Published {
    fn from(config: Config) -> Self {
        use Architecture::{Cosformer2, Eos, Hgrn2, Lightnet, Llama, Tnl, Transnormer};
        let of = Config::of(config.architecture);
        let kind = config.architecture;
        let (llama, transnormer) = (kind == Llama, kind == Transnormer);
        let library = matches!(kind, Hgrn2 | Lightnet);
        let gated = matches!(kind, Tnl | Cosformer2 | Lightnet)
            || kind == Eos && config.output_gate != OutputGate::None;
        fn unless<T: PartialEq>(value: T, default: &T) -> Option<T> {
            (value != *default).then_some(value)
        }
        Self {
            model_type: Some(kind),
            vocab_size: Some(config.vocab_size),
            hidden_size: (!transnormer).then_some(config.hidden_size),
            decoder_embed_dim: transnormer.then_some(config.hidden_size),
            intermediate_size: (!transnormer).then_some(config.intermediate_size),
            glu_dim: transnormer.then_some(config.intermediate_size as i64),
            num_hidden_layers: (!transnormer).then_some(config.num_hidden_layers),
            decoder_layers: transnormer.then_some(config.num_hidden_layers),
            num_attention_heads: (!library && !transnormer).then_some(config.num_attention_heads),
            num_heads: library.then_some(config.num_attention_heads),
            decoder_attention_heads: transnormer.then_some(config.num_attention_heads),
            num_key_value_heads: llama.then_some(config.key_value_heads()),
            head_dim: (!library && !transnormer).then_some(config.head_width()),
            expand_ratio: library.then_some(config.head_width()),
            hidden_dim: transnormer.then_some(config.value_size()),
            rms_norm_eps: (!library).then_some(config.rms_norm_eps),
            norm_eps: library.then_some(config.rms_norm_eps),
            output_norm_eps: (!llama && (library || config.output_norm_eps.is_some()))
                .then_some(config.output_eps()),
            output_norm: unless(config.output_norm, &of.output_norm),
            elementwise_affine: library
                .then_some(config.elementwise_affine)
                .or(unless(config.elementwise_affine, &of.elementwise_affine)),
            norm_per_head: unless(config.norm_per_head, &of.norm_per_head),
            gate_first: unless(config.gate_first, &of.gate_first),
            output_gate: (gated || config.output_gate != of.output_gate).then_some(config.output_gate),
            gate_low_rank_dim: gated.then_some(config.gate_rank()),
            scale_queries: library
                .then_some(config.scale_queries)
                .or(unless(config.scale_queries, &of.scale_queries)),
            hidden_act: match config.hidden_act {
                Activation::None => (!transnormer).then(|| "none".to_owned()),
                _ if library => Some("swish".to_owned()),
                _ => Some("silu".to_owned()),
            },
            linear_act: unless(config.linear_act, &of.linear_act),
            value_act: unless(config.value_act, &of.value_act),
            attention_bias: llama.then_some(config.attention_bias),
            mlp_bias: llama.then_some(config.mlp_bias),
            bias: transnormer.then_some(config.attention_bias),
            use_short_conv: unless(config.conv_size.is_some(), &false),
            conv_size: config.conv_size,
            rope_theta: llama.then_some(config.rope_theta),
            rope_parameters: llama.then(|| rope_parameters(&config)),
            decay_schedule: unless(config.decay_schedule, &of.decay_schedule),
            lrpe_layers: (transnormer || !config.lrpe_layers.is_empty()).then_some(config.lrpe_layers),
            scale_embedding: unless(config.scale_embedding, &of.scale_embedding),
            use_lower_bound: (kind == Hgrn2)
                .then_some(config.use_lower_bound)
                .or(unless(config.use_lower_bound, &of.use_lower_bound)),
            exclusive_lower_bound: unless(config.exclusive_lower_bound, &false),
            decay: unless(config.decay, &Decay::Vector),
            eos: (kind == Eos).then_some(config.eos),
            seeded: unless(config.seeded, &false),
            use_lrpe: unless(config.use_lrpe, &of.use_lrpe),
            half_lrpe: unless(config.half_lrpe, &of.half_lrpe),
            learn_theta: unless(config.learn_theta, &of.learn_theta),
            lrpe_longest: config.lrpe_longest,
            token_shift: unless(config.token_shift, &of.token_shift),
            use_tpe: unless(config.use_tpe, &of.use_tpe),
            tpe_residual: unless(config.tpe_residual, &of.tpe_residual),
            bidirectional: unless(config.bidirectional, &false),
            attn: match config.attn.len() {
                0 => None,
                1 => config.attn.into_iter().next().map(OneOrMore::One),
                _ => Some(OneOrMore::More(config.attn)),
            },
            tie_word_embeddings: Some(config.tie_word_embeddings),
            initializer_range: (!transnormer).then_some(config.initializer_range),
            init_std: transnormer.then_some(config.initializer_range),
            ..Self::default()
        }
    }
}

fn rope_parameters(config: &Config) -> RopeParameters {
    let plain = RopeParameters {
        rope_theta: Some(config.rope_theta),
        ..Default::default()
    };
    match config.rope_scaling {
        Scaling::None => RopeParameters {
            rope_type: Some("default".into()),
            ..plain
        },
        Scaling::Linear(factor) => RopeParameters {
            rope_type: Some("linear".into()),
            factor: Some(factor),
            ..plain
        },
        Scaling::ByWavelength {
            factor,
            low,
            high,
            context,
        } => RopeParameters {
            rope_type: Some("llama3".into()),
            factor: Some(factor),
            low_freq_factor: Some(low),
            high_freq_factor: Some(high),
            original_max_position_embeddings: Some(context),
            ..plain
        },
    }
}

#[cfg(test)]
mod tests;
