//! The shape of a language model in a recipe.

use fulgur_lightnet::lm::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, Instance, OutputGate, OutputNorm,
    SoftmaxLayers,
};
use serde::{Deserialize, Serialize};

use crate::train::TaskResult;

/// The shape of the model.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ModelOptions {
    /// `tnl`, `transnormer`, `hgrn1`, `hgrn2`, `cosformer2`, `lightnet`, `eos` or `llama`.
    pub architecture: Architecture,
    /// Layers.
    pub layers: usize,
    /// Model width.
    pub width: usize,
    /// Hidden width of the gated linear units.
    pub hidden: usize,
    /// Heads; none of `hgrn1`.
    pub heads: usize,
    /// Of `eos`, the model that it is to be an instance of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
    /// Heads of keys and values of softmax attention; 0 for as many as heads.
    pub key_value_heads: usize,
    /// Width of a head's keys; 0 for the width over the heads, and for 8 in `eos`.
    pub head_width: usize,
    /// Rows of the embedding; 0 for 256, one a byte, and one more for the mask of a model in both directions.
    pub vocabulary: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Added to the mean square in norms.
    pub norm_eps: f64,
    /// Base of the frequencies of rotary positions.
    pub rope_theta: f64,
    /// Standard deviation of the first weights.
    pub init: f64,
    /// Each so many layers the last one is softmax attention instead; 0 for none.
    pub softmax_every: usize,
    /// What else is to be another way than the architecture's.
    pub variant: Variant,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            architecture: Architecture::Tnl,
            layers: 6,
            width: 256,
            hidden: 704,
            heads: 4,
            instance: None,
            key_value_heads: 0,
            head_width: 0,
            vocabulary: 0,
            tied: true,
            norm_eps: 1e-6,
            rope_theta: 1e4,
            init: 0.02,
            softmax_every: 0,
            variant: Variant::default(),
        }
    }
}

/// Fields of [`Config`] that a recipe sets by name, and how they are set.
macro_rules! variants {
    ($($field:ident: $kind:ty,)*) => {
        /// What a recipe changes of an architecture: fields of [`Config`], which says what they do.
        #[derive(Clone, Debug, Default, Deserialize, Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub(crate) struct Variant {
            $(#[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$kind>,)*
            /// Rank of the gate of the output.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub gate_low_rank_dim: Option<usize>,
            /// Eps of the norm of the output.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub output_norm_eps: Option<f64>,
            /// Taps of short convolutions.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub conv_size: Option<usize>,
            /// Tokens over which the slowest frequency of LRPE makes a quarter turn.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub lrpe_longest: Option<usize>,
        }

        impl Variant {
            fn apply(&self, config: &mut Config) {
                $(if let Some(value) = &self.$field {
                    config.$field = value.clone();
                })*
                config.gate_low_rank_dim = self.gate_low_rank_dim.or(config.gate_low_rank_dim);
                config.output_norm_eps = self.output_norm_eps.or(config.output_norm_eps);
                config.conv_size = self.conv_size.or(config.conv_size);
                config.lrpe_longest = self.lrpe_longest.or(config.lrpe_longest);
            }
        }
    };
}

variants! {
    output_norm: OutputNorm,
    elementwise_affine: bool,
    norm_per_head: bool,
    gate_first: bool,
    output_gate: OutputGate,
    scale_queries: bool,
    hidden_act: Activation,
    linear_act: Activation,
    value_act: Activation,
    attention_bias: bool,
    mlp_bias: bool,
    decay_schedule: DecaySchedule,
    lrpe_layers: Vec<usize>,
    scale_embedding: bool,
    use_lower_bound: bool,
    exclusive_lower_bound: bool,
    decay: Decay,
    eos: EosConfig,
    seeded: bool,
    use_lrpe: bool,
    half_lrpe: bool,
    learn_theta: bool,
    token_shift: bool,
    use_tpe: bool,
    tpe_residual: bool,
    bidirectional: bool,
}

impl ModelOptions {
    /// # Errors
    /// A model that is no EOS is to be an instance of it.
    pub(crate) fn check(&self) -> TaskResult<()> {
        match self.instance {
            Some(instance) if self.architecture != Architecture::Eos => Err(format!(
                "[model]: instance is {:?}, expected only with architecture \"eos\", found {:?}",
                instance.name(),
                self.architecture.name()
            )
            .into()),
            _ => Ok(()),
        }
    }

    pub(crate) fn config(&self) -> Config {
        let elementwise = self.architecture == Architecture::Hgrn1;
        let groups = (self.key_value_heads > 0).then_some(self.key_value_heads);
        let softmax = SoftmaxLayers {
            layers: (1..=self.layers.min(1 << 16))
                .filter(|layer| self.softmax_every > 0 && layer.is_multiple_of(self.softmax_every))
                .map(|layer| layer - 1)
                .collect(),
            num_heads: self.heads,
            num_kv_heads: groups,
            qkv_bias: false,
            window_size: None,
            rope_theta: self.rope_theta,
        };
        let llama = self.architecture == Architecture::Llama;
        let plain = Config::of(self.architecture);
        let mut config = Config {
            vocab_size: self.vocabulary,
            hidden_size: self.width,
            intermediate_size: self.hidden,
            num_hidden_layers: self.layers,
            num_attention_heads: if elementwise { self.width } else { self.heads },
            num_key_value_heads: groups.filter(|_| llama),
            head_dim: if elementwise {
                Some(1)
            } else {
                (self.head_width > 0)
                    .then_some(self.head_width)
                    .or(plain.head_dim)
            },
            rms_norm_eps: self.norm_eps,
            rope_theta: self.rope_theta,
            tie_word_embeddings: self.tied,
            initializer_range: self.init,
            attn: if softmax.layers.is_empty() {
                Vec::new()
            } else {
                vec![softmax]
            },
            ..plain
        };
        if let Some(instance) = self.instance {
            config = instance.of(&config);
        }
        self.variant.apply(&mut config);
        if self.vocabulary == 0 {
            config.vocab_size = 256 + usize::from(config.bidirectional);
        }
        config
    }
}
