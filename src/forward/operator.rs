//! Bare operators on named tensors.

use super::Dim::Free;
use super::{Network, Part, Port};

/// LightNet's additive recurrence without causality: `q`, `g` (logits of the gates) and `v` to the output and the state,
/// with `do`, and optionally `dstate`, also to gradients.
#[must_use]
pub fn lightnet_noncausal() -> Part {
    let keys = [Free("B"), Free("N"), Free("H"), Free("D")];
    let values = [Free("B"), Free("N"), Free("H"), Free("E")];
    let state = [Free("B"), Free("H"), Free("D"), Free("E")];
    Part::new(
        "lightnet-noncausal",
        [
            Port::numbers("q", keys),
            Port::numbers("g", keys),
            Port::numbers("v", values),
            Port::numbers("do", values).optional(),
            Port::numbers("dstate", state).optional(),
        ],
        [
            Port::numbers("o", values),
            Port::numbers("state", state),
            Port::numbers("dq", keys).optional(),
            Port::numbers("dg", keys).optional(),
            Port::numbers("dv", values).optional(),
        ],
        |_| {
            let network: Network = Box::new(|inputs| {
                let inputs = inputs.tensors().clone().into_iter().collect();
                let outputs = fulgur_kernels::additive::forward_op(&inputs)?;
                Ok(outputs.into_iter().collect())
            });
            Ok(network)
        },
    )
}
