//! The settings of a sweep: what differs from the first one, as the table `[lm.model]` of a recipe.

/// A setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// What differs, in TOML.
    pub model: &'static str,
}

const fn of(name: &'static str, model: &'static str) -> Setting {
    Setting { name, model }
}

/// All of them: where each side comes from, the kind of gate, real or complex, the size of the memory, activation and tau; then the
/// instances of table 2 of the paper.
pub const SETTINGS: &[Setting] = &[
    of("data", ""),
    of("expand-constant", "variant.eos.expand = 'constant'"),
    of("shrink-constant", "variant.eos.shrink = 'constant'"),
    of(
        "sides-constant",
        "variant.eos.expand = 'constant'\nvariant.eos.shrink = 'constant'",
    ),
    of("gates-constant", "variant.eos.oscillation = 'constant'"),
    of(
        "all-constant",
        "variant.eos.expand = 'constant'\nvariant.eos.shrink = 'constant'\nvariant.eos.oscillation = 'constant'",
    ),
    of("gates-constant-keys", "variant.eos.oscillation = 'constant-keys'"),
    of(
        "gates-constant-values",
        "variant.eos.oscillation = 'constant-values'",
    ),
    of(
        "gates-fixed-keys",
        "variant.eos.oscillation = 'constant-keys'\nvariant.eos.fixed = true",
    ),
    of("gates-outer", "variant.eos.oscillation = 'outer'"),
    of("gates-values", "variant.eos.oscillation = 'values'"),
    of(
        "gates-keys-by-constant",
        "variant.eos.oscillation = 'keys-by-constant'",
    ),
    of(
        "gates-values-by-constant",
        "variant.eos.oscillation = 'values-by-constant'",
    ),
    of(
        "gates-values-by-constant-keys",
        "variant.eos.oscillation = 'values-by-constant-keys'",
    ),
    of(
        "gates-keys-by-constant-values",
        "variant.eos.oscillation = 'keys-by-constant-values'",
    ),
    of("gates-none", "variant.eos.oscillation = 'none'"),
    of("gates-cumulative", "variant.eos.oscillation = 'cumulative'"),
    of("gates-slope", "variant.eos.gate = 'slope'"),
    of(
        "complex-no-gates",
        "variant.eos.oscillation = 'none'\nvariant.eos.turn = 'rows'\nvariant.learn_theta = true",
    ),
    of("complex", "variant.eos.turn = 'rows'\nvariant.learn_theta = true"),
    of("rows-2", "head_width = 2"),
    of("rows-8", "head_width = 8"),
    of("rows-32", "head_width = 32"),
    of("rows-64", "head_width = 64"),
    of("heads-2", "heads = 2"),
    of("heads-8", "heads = 8"),
    of("act-none", "variant.linear_act = 'none'"),
    of("act-relu", "variant.linear_act = 'relu'"),
    of("act-sigmoid", "variant.linear_act = 'sigmoid'"),
    of("act-1+elu", "variant.linear_act = '1+elu'"),
    of("act-elu", "variant.linear_act = 'elu'"),
    of("act-relu2", "variant.linear_act = 'relu2'"),
    of("act-x2", "variant.linear_act = 'square'"),
    of("tau-1", "variant.eos.tau = 1.0"),
    of("tau-64", "variant.eos.tau = 64.0"),
    of("linear-attention", "instance = 'linear-attention'"),
    of("s4", "instance = 's4'"),
    of("s5", "instance = 's5'"),
    of("tnn", "instance = 'tnn'"),
    of("tnl", "instance = 'tnl'"),
    of("mamba", "instance = 'mamba'"),
    of("rwkv4", "instance = 'rwkv4'"),
    of("cosformer", "instance = 'cosformer'"),
    of("lrpe", "instance = 'lrpe'"),
    of("gateloop", "instance = 'gateloop'"),
    of("hgrn", "instance = 'hgrn'"),
    of("hgrn2", "instance = 'hgrn2'"),
    of("lightnet", "instance = 'lightnet'"),
];
