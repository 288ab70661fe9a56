//! Bare operators on named tensors.

use fulgur_kernels::decay::Gate;

use super::Dim::Free;
use super::{Network, Part, Port};

/// The causal recurrence with decay: `q`, `k`, `v` and decays, `rate` or `g`, to the output and the final state, with `do`,
/// and optionally `dstate`, also to gradients.
#[must_use]
pub fn causal_decay(gate: Gate) -> Part {
    let keys = [Free("B"), Free("N"), Free("H"), Free("D")];
    let values = [Free("B"), Free("N"), Free("H"), Free("E")];
    let state = [Free("B"), Free("H"), Free("D"), Free("E")];
    let mut inputs = vec![
        Port::numbers("q", keys),
        Port::numbers("k", keys),
        Port::numbers("v", values),
        Port::numbers("state_in", state).optional(),
        Port::numbers("do", values).optional(),
        Port::numbers("dstate", state).optional(),
    ];
    let mut outputs = vec![
        Port::numbers("o", values),
        Port::numbers("state", state),
        Port::numbers("dq", keys).optional(),
        Port::numbers("dk", keys).optional(),
        Port::numbers("dv", values).optional(),
        Port::numbers("dstate_in", state).optional(),
    ];
    match gate {
        Gate::Scalar => {
            let tokens = [Free("B"), Free("N"), Free("H")];
            inputs.push(Port::numbers("rate", [Free("H")]).optional());
            inputs.push(Port::numbers("g", tokens).optional());
            outputs.push(Port::numbers("drate", [Free("H")]).optional());
            outputs.push(Port::numbers("dg", tokens).optional());
        }
        Gate::Vector => {
            inputs.push(Port::numbers("g", keys));
            outputs.push(Port::numbers("dg", keys).optional());
        }
    }
    Part::new(gate.name(), inputs, outputs, move |_| {
        let network: Network = Box::new(move |inputs| {
            let inputs = inputs.tensors().clone().into_iter().collect();
            let outputs = fulgur_kernels::decay::forward_op(gate, &inputs)?;
            Ok(outputs.into_iter().collect())
        });
        Ok(network)
    })
}

/// LightNet's additive recurrence without causality: `q`, `g` (logits of the gates) and `v` to the output and the state,
/// with `do`, and optionally `dstate`, also to gradients.
#[must_use]
pub fn lightnet_noncausal() -> Part {
    let (inputs, outputs) = lightnet_ports();
    Part::new("lightnet-noncausal", inputs, outputs, |_| {
        let network: Network = Box::new(|inputs| {
            let inputs = inputs.tensors().clone().into_iter().collect();
            let outputs = fulgur_kernels::additive::forward_op(&inputs)?;
            Ok(outputs.into_iter().collect())
        });
        Ok(network)
    })
}

/// LightNet's causal additive recurrence: as [`lightnet_noncausal`], and what tokens before the first have left.
#[must_use]
pub fn lightnet_causal() -> Part {
    let (mut inputs, mut outputs) = lightnet_ports();
    let state = [Free("B"), Free("H"), Free("D"), Free("E")];
    let sums = [Free("B"), Free("H"), Free("D")];
    inputs.extend([
        Port::numbers("state_in", state).optional(),
        Port::numbers("log_sum_in", sums).optional(),
    ]);
    outputs.extend([
        Port::numbers("log_sum", sums),
        Port::numbers("dstate_in", state).optional(),
        Port::numbers("dlog_sum_in", sums).optional(),
    ]);
    Part::new("lightnet-causal", inputs, outputs, |_| {
        let network: Network = Box::new(|inputs| {
            let inputs = inputs.tensors().clone().into_iter().collect();
            let outputs = fulgur_kernels::additive::causal_forward_op(&inputs)?;
            Ok(outputs.into_iter().collect())
        });
        Ok(network)
    })
}

/// What both forms take and give.
fn lightnet_ports() -> (Vec<Port>, Vec<Port>) {
    let keys = [Free("B"), Free("N"), Free("H"), Free("D")];
    let values = [Free("B"), Free("N"), Free("H"), Free("E")];
    let state = [Free("B"), Free("H"), Free("D"), Free("E")];
    let inputs = vec![
        Port::numbers("q", keys),
        Port::numbers("g", keys),
        Port::numbers("v", values),
        Port::numbers("do", values).optional(),
        Port::numbers("dstate", state).optional(),
    ];
    let outputs = vec![
        Port::numbers("o", values),
        Port::numbers("state", state),
        Port::numbers("dq", keys).optional(),
        Port::numbers("dg", keys).optional(),
        Port::numbers("dv", values).optional(),
    ];
    (inputs, outputs)
}
