//! The bare operator on named tensors, in the form that `fulgur forward --op` runs.

use super::{Causal, LogDecay, causal};
use crate::named::Inputs;
use candle_core::{Result, Tensor, Var};
use std::collections::HashMap;

/// What the decays belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// A head: `rate` `[H]` with the decay `exp(-rate)`, or log-decays `g` `[B, N, H]`, or neither for no decay.
    Scalar,
    /// A key channel: log-decays `g` `[B, N, H, D]`.
    Vector,
}

impl Gate {
    /// Name of the operator.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar-decay",
            Self::Vector => "vector-decay",
        }
    }
}

/// Runs the causal recurrence with decay on named tensors and returns named tensors in f32.
///
/// Takes `q`, `k` `[B, N, H, D]` and `v` `[B, N, H, E]` in f32, f16 or bf16, decays as [`Gate`] says, optionally
/// `state_in` `[B, H, D, E]`, `do` `[B, N, H, E]` and, with it, `dstate` `[B, H, D, E]`. Gives `o` `[B, N, H, E]` and
/// `state` `[B, H, D, E]`; with `do` also `dq`, `dk`, `dv` and, where their inputs are, `drate` or `dg`, and `dstate_in`:
/// the gradients of `sum(o do) + sum(state dstate)`.
///
/// # Errors
/// One line that lists every missing, unknown or mis-shaped input.
pub fn forward_op(gate: Gate, tensors: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    let scalar = gate == Gate::Scalar;
    let inputs = Inputs {
        op: gate.name(),
        tensors,
        needed: if scalar {
            &["q", "k", "v"]
        } else {
            &["q", "k", "v", "g"]
        },
        known: if scalar {
            &["q", "k", "v", "rate", "g", "state_in", "do", "dstate"]
        } else {
            &["q", "k", "v", "g", "state_in", "do", "dstate"]
        },
    };
    let mut faults = inputs.faults(|q, width| {
        let values = vec![q[0], q[1], q[2], width];
        let state = vec![q[0], q[2], q[3], width];
        vec![
            ("k", q.to_vec()),
            ("v", values.clone()),
            ("rate", vec![q[2]]),
            ("g", if scalar { q[..3].to_vec() } else { q.to_vec() }),
            ("state_in", state.clone()),
            ("do", values),
            ("dstate", state),
        ]
    });
    if tensors.contains_key("rate") && tensors.contains_key("g") && scalar {
        faults.push("both rate and g are given, expected one of them".to_owned());
    }
    inputs.refuse(&faults)?;
    let (q, k, v) = (inputs.needed("q")?, inputs.needed("k")?, inputs.needed("v")?);
    let (rate, g) = (inputs.variable("rate")?, inputs.variable("g")?);
    let state_in = inputs.variable("state_in")?;
    let head = rate.as_ref().map(|rate| rate.neg()).transpose()?;
    let decay = match (gate, &head, &g) {
        (Gate::Vector, _, Some(log)) => LogDecay::Channel(log),
        (Gate::Scalar, _, Some(log)) => LogDecay::Token(log),
        (_, Some(log), None) => LogDecay::Head(log),
        (_, None, None) => LogDecay::None,
    };
    let options = Causal {
        decay,
        initial: state_in.as_ref().map(Var::as_tensor),
        ..Default::default()
    };
    let (o, state) = causal(&q, &k, &v, &options)?;
    let variables = [
        ("dq", Some(&q)),
        ("dk", Some(&k)),
        ("dv", Some(&v)),
        ("drate", rate.as_ref()),
        ("dg", g.as_ref()),
        ("dstate_in", state_in.as_ref()),
    ];
    inputs.outputs(&o, &state, &variables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decay::reference::Sizes;
    use crate::decay::tests::{Case, Kind};
    use crate::testing::{relative_rms, values};
    use candle_core::{DType, Device};

    fn named(entries: &[(&str, &Tensor)]) -> HashMap<String, Tensor> {
        entries
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), (*tensor).clone()))
            .collect()
    }

    #[test]
    fn forward_op_gives_what_the_reference_gives() -> Result<()> {
        let sizes = Sizes {
            b: 2,
            n: 17,
            h: 3,
            d: 5,
            e: 7,
        };
        let kinds = [
            (Kind::Head, Gate::Scalar, "rate"),
            (Kind::Token, Gate::Scalar, "g"),
            (Kind::Channel, Gate::Vector, "g"),
        ];
        for (kind, gate, decay) in kinds {
            // A rate is the negative of a log-decay.
            let sign = if kind == Kind::Head { -1.0 } else { 1.0 };
            let case = Case::new(sizes, kind);
            let inputs = case.inputs();
            let mut entries = HashMap::new();
            let tensors = inputs.iter().chain([&case.d_o, &case.d_state]);
            for (name, tensor) in ["q", "k", "v", "state_in", decay, "do", "dstate"]
                .iter()
                .zip(tensors)
            {
                let tensor = if *name == decay {
                    (tensor * sign)?
                } else {
                    tensor.clone()
                };
                entries.insert((*name).to_owned(), tensor.to_dtype(DType::F32)?);
            }
            let all = forward_op(gate, &entries)?;
            let d_decay = format!("d{decay}");
            let names = ["o", "state", "dq", "dk", "dv", "dstate_in", &d_decay];
            for (name, expected) in names.iter().zip(&case.expected()?) {
                let sign = if *name == d_decay { sign } else { 1.0 };
                let found: Vec<f64> = values(&all[*name]).into_iter().map(|x| x * sign).collect();
                assert!(relative_rms(&found, expected) < 1e-5, "{name}");
            }
            assert_eq!(all.len(), names.len());
            entries.retain(|name, _| {
                ["q", "k", "v"].contains(&name.as_str()) || gate == Gate::Vector && name == "g"
            });
            let few = forward_op(gate, &entries)?;
            let mut names: Vec<_> = few.keys().collect();
            names.sort();
            assert_eq!(names, ["o", "state"]);
        }
        Ok(())
    }

    #[test]
    fn forward_op_lists_every_fault() {
        let q = Tensor::zeros((2, 4, 3, 5), DType::F32, &Device::Cpu).unwrap();
        let wrong = Tensor::zeros((2, 4, 3), DType::F32, &Device::Cpu).unwrap();
        let message = |gate: Gate, entries: &[(&str, &Tensor)]| {
            forward_op(gate, &named(entries)).unwrap_err().to_string()
        };
        let scalar = |entries: &[(&str, &Tensor)]| message(Gate::Scalar, entries);
        let text = scalar(&[("q", &q), ("v", &wrong), ("h", &q), ("rate", &wrong)]);
        for part in [
            "scalar-decay: k is missing",
            "h is unknown",
            "v is [2, 4, 3]",
            "rate is [2, 4, 3], expected [3]",
        ] {
            assert!(text.contains(part) && !text.contains('\n'), "{text}");
        }
        let both = scalar(&[("q", &q), ("k", &q), ("v", &q), ("rate", &wrong), ("g", &wrong)]);
        assert!(both.contains("both rate and g are given"), "{both}");
        let vector = message(Gate::Vector, &[("q", &q), ("k", &q), ("v", &q), ("rate", &wrong)]);
        assert!(
            vector.contains("vector-decay: g is missing") && vector.contains("rate is unknown"),
            "{vector}"
        );
        let gate = scalar(&[("q", &q), ("k", &q), ("v", &q), ("g", &q)]);
        assert!(gate.contains("g is [2, 4, 3, 5], expected [2, 4, 3]"), "{gate}");
        assert!(scalar(&[("q", &q), ("k", &q), ("v", &q), ("dstate", &q)]).contains("dstate needs do"));
        assert!(scalar(&[("q", &wrong), ("k", &q), ("v", &q)]).contains("q is [2, 4, 3]"));
        let whole = q.to_dtype(DType::I64).unwrap();
        assert!(scalar(&[("q", &whole), ("k", &q), ("v", &q)]).contains("q is I64"));
    }
}
