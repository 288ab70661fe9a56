//! Language models of every architecture, and what configurations may change in them.

mod decoding;
mod gradients;
mod instances;
mod packing;
mod parts;
mod published;
mod sight;
mod size;
mod tensor;

use candle_core::{Result, Tensor};
use fulgur_kernels::philox::Philox;

use super::{
    Activation, Architecture, Config, Decay, DecaySchedule, EosConfig, Instance, Oscillation, OutputGate,
    OutputNorm, SoftmaxLayers, Turn,
};

const ALL: [Architecture; 8] = Architecture::ALL;

fn shape(architecture: Architecture) -> Config {
    let elementwise = architecture == Architecture::Hgrn1;
    Config {
        vocab_size: 31,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 3,
        num_attention_heads: if elementwise { 24 } else { 2 },
        head_dim: elementwise.then_some(1),
        initializer_range: 0.3,
        ..Config::of(architecture)
    }
}

fn draw(count: usize, rows: u64, name: &str) -> Vec<u32> {
    let mut noise = Philox::named(5, name);
    (0..count).map(|_| (noise.next_u64() % rows) as u32).collect()
}

fn far(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}

fn square(t: &Tensor) -> Result<f32> {
    t.sqr()?.sum_all()?.to_scalar()
}

/// Every architecture, and what configurations may change in it.
fn variants() -> Vec<(&'static str, Config)> {
    use Architecture::{Cosformer2, Hgrn1, Hgrn2, Lightnet, Llama, Tnl, Transnormer};
    type Change = fn(&mut Config);
    let changes: [(&'static str, Architecture, Change); 27] = [
        ("tnl", Tnl, |_| ()),
        ("tnl, norm a head, gate first", Tnl, |c| {
            (c.norm_per_head, c.gate_first) = (true, true);
        }),
        ("tnl, layer norm a head", Tnl, |c| {
            (c.norm_per_head, c.output_norm) = (true, OutputNorm::Layer);
        }),
        ("tnl, layer norm, 1 + elu", Tnl, |c| {
            (c.output_norm, c.linear_act) = (OutputNorm::Layer, Activation::OnePlusElu);
        }),
        ("tnl, lrpe and no decay", Tnl, |c| {
            (c.lrpe_layers, c.decay_schedule) = (vec![0, 2], DecaySchedule::None);
        }),
        ("tnl, short convolutions", Tnl, |c| c.conv_size = Some(4)),
        ("tnl, narrow keys, tied", Tnl, |c| {
            (c.head_dim, c.tie_word_embeddings) = (Some(5), true);
        }),
        ("tnl, hybrid", Tnl, |c| c.attn = hybrid()),
        ("transnormer", Transnormer, |_| ()),
        ("transnormer, biases, linear decays", Transnormer, |c| {
            (c.attention_bias, c.mlp_bias) = (true, true);
            c.decay_schedule = DecaySchedule::Linear8;
        }),
        ("hgrn1", Hgrn1, |_| ()),
        ("hgrn1, short convolutions, exclusive bounds", Hgrn1, |c| {
            (c.conv_size, c.exclusive_lower_bound) = (Some(3), true);
        }),
        ("hgrn2", Hgrn2, |_| ()),
        ("hgrn2, no bounds, convolutions", Hgrn2, |c| {
            (c.use_lower_bound, c.conv_size) = (false, Some(3));
        }),
        ("hgrn2, sigmoid, silu values", Hgrn2, |c| {
            (c.linear_act, c.value_act) = (Activation::Sigmoid, Activation::Silu);
        }),
        ("hgrn2, hybrid, no gain", Hgrn2, |c| {
            (c.attn, c.elementwise_affine, c.hidden_act) = (hybrid(), false, Activation::None);
        }),
        ("cosformer2", Cosformer2, |_| ()),
        ("cosformer2, learnt, all channels, no tpe", Cosformer2, |c| {
            (c.learn_theta, c.half_lrpe, c.use_tpe) = (true, false, false);
        }),
        ("lightnet", Lightnet, |_| ()),
        ("lightnet, seeded, convolutions, silu gate", Lightnet, |c| {
            (c.seeded, c.conv_size, c.output_gate) = (true, Some(2), OutputGate::Silu);
        }),
        ("lightnet, tpe and lrpe", Lightnet, |c| {
            (c.use_tpe, c.use_lrpe, c.learn_theta, c.tpe_residual) = (true, true, true, true);
        }),
        ("lightnet, half lrpe, seeded", Lightnet, |c| {
            (c.use_lrpe, c.half_lrpe, c.seeded) = (true, true, true);
        }),
        ("lightnet, lrpe over 512 tokens", Lightnet, |c| {
            (c.use_lrpe, c.lrpe_longest) = (true, Some(512));
        }),
        ("lightnet, scalar decay", Lightnet, |c| c.decay = Decay::Scalar),
        ("lightnet, tied scalar decay, lrpe, hybrid", Lightnet, |c| {
            (c.decay, c.use_lrpe, c.attn) = (Decay::Tied, true, hybrid());
        }),
        ("llama", Llama, |_| ()),
        ("llama, groups, biases, head_dim", Llama, |c| {
            (c.num_key_value_heads, c.head_dim) = (Some(1), Some(6));
            (c.attention_bias, c.mlp_bias) = (true, true);
        }),
    ];
    let of = |(name, architecture, change): (_, _, Change)| {
        let mut config = shape(architecture);
        change(&mut config);
        (name, config)
    };
    let mut all: Vec<_> = changes.into_iter().map(of).collect();
    let small = Config {
        head_dim: Some(3),
        ..shape(Architecture::Eos)
    };
    all.extend(Instance::ALL.map(|instance| {
        let mut config = instance.of(&small);
        // Differences across a bend are no slope.
        if config.linear_act == Activation::Relu {
            config.linear_act = Activation::Silu;
        }
        (instance.name(), config)
    }));
    let turned = |name, oscillation, fixed, turn| {
        let mut config = small.clone();
        config.eos = EosConfig {
            oscillation,
            fixed,
            turn,
            ..EosConfig::default()
        };
        (name, config)
    };
    all.extend([
        turned("eos, values, turning", Oscillation::Values, false, Turn::Rows),
        turned(
            "eos, fixed columns",
            Oscillation::ConstantValues,
            true,
            Turn::None,
        ),
        turned(
            "eos, rows by columns",
            Oscillation::KeysByConstantValues,
            false,
            Turn::Data,
        ),
        turned(
            "eos, cumulative keys",
            Oscillation::Cumulative,
            false,
            Turn::Shared,
        ),
        turned("eos, a head", Oscillation::Head, false, Turn::Rows),
    ]);
    all
}

/// The second of three layers is softmax attention.
fn hybrid() -> Vec<SoftmaxLayers> {
    vec![SoftmaxLayers {
        layers: vec![1],
        num_heads: 6,
        num_kv_heads: Some(2),
        qkv_bias: true,
        window_size: None,
        rope_theta: 100.0,
    }]
}

fn bidirectional() -> Config {
    Config {
        bidirectional: true,
        use_tpe: true,
        use_lrpe: true,
        half_lrpe: true,
        learn_theta: true,
        ..shape(Architecture::Lightnet)
    }
}
