//! The settings of a sweep: an architecture and the way its layers go through the tokens.

use fulgur_lightnet::lm::Architecture;
use fulgur_lightnet::lm::classifier::Form;

/// A setting.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// The mixer.
    pub architecture: Architecture,
    /// How layers go through the tokens.
    pub form: Form,
    /// Whether it is among those that a sweep takes if nobody says which.
    pub main: bool,
}

const fn of(name: &'static str, architecture: Architecture, form: Form) -> Setting {
    Setting {
        name,
        architecture,
        form,
        main: false,
    }
}

const fn main(name: &'static str, architecture: Architecture, form: Form) -> Setting {
    Setting {
        main: true,
        ..of(name, architecture, form)
    }
}

use Architecture::{Hgrn1, Hgrn2, Lightnet, Llama, Tnl};
use Form::{Causal, Parallel, Parallel2d, Series, Series2d, Whole};

/// All of them.
pub const SETTINGS: &[Setting] = &[
    main("hgrn2-causal", Hgrn2, Causal),
    main("hgrn2-parallel", Hgrn2, Parallel),
    main("hgrn2-series", Hgrn2, Series),
    main("hgrn2-parallel-2d", Hgrn2, Parallel2d),
    main("hgrn2-series-2d", Hgrn2, Series2d),
    of("hgrn1-causal", Hgrn1, Causal),
    main("hgrn1-parallel", Hgrn1, Parallel),
    of("hgrn1-series", Hgrn1, Series),
    main("hgrn1-parallel-2d", Hgrn1, Parallel2d),
    of("hgrn1-series-2d", Hgrn1, Series2d),
    of("tnl-causal", Tnl, Causal),
    main("tnl-parallel", Tnl, Parallel),
    of("tnl-series", Tnl, Series),
    main("tnl-parallel-2d", Tnl, Parallel2d),
    of("tnl-series-2d", Tnl, Series2d),
    of("lightnet-causal", Lightnet, Causal),
    of("lightnet-parallel", Lightnet, Parallel),
    of("lightnet-series", Lightnet, Series),
    of("lightnet-parallel-2d", Lightnet, Parallel2d),
    of("lightnet-series-2d", Lightnet, Series2d),
    main("lightnet-whole", Lightnet, Whole),
    of("softmax-causal", Llama, Causal),
    main("softmax-whole", Llama, Whole),
];
