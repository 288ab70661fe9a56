//! The bare operator on named tensors, in the form that `fulgur forward --op` runs.

use super::{Causal, LogDecay, causal};
use candle_core::{DType, Error, Result, Tensor, Var};
use std::collections::HashMap;

const OP: &str = "decay";
const KNOWN: [&str; 9] = [
    "q",
    "k",
    "v",
    "g_head",
    "g_token",
    "g_channel",
    "state_in",
    "do",
    "dstate",
];
/// Log-decays by kind, of which at most one is given.
const DECAYS: [&str; 3] = ["g_head", "g_token", "g_channel"];

/// Runs the causal recurrence with decay on named tensors and returns named tensors in f32.
///
/// Takes `q`, `k` `[B, N, H, D]` and `v` `[B, N, H, E]` in f32, f16 or bf16, optionally log-decays as one of `g_head`
/// `[H]`, `g_token` `[B, N, H]` and `g_channel` `[B, N, H, D]`, `state_in` `[B, H, D, E]`, `do` `[B, N, H, E]` and, with
/// it, `dstate` `[B, H, D, E]`. Gives `o` `[B, N, H, E]` and `state` `[B, H, D, E]`; with `do` also `dq`, `dk`, `dv`
/// and, where their inputs are, `dg_head`, `dg_token` or `dg_channel`, and `dstate_in`: the gradients of `sum(o do) +
/// sum(state dstate)`.
///
/// # Errors
/// One line that lists every missing, unknown or mis-shaped input.
pub fn forward_op(inputs: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    check(inputs)?;
    let variable = |name: &str| match inputs.get(name) {
        Some(tensor) => Var::from_tensor(&tensor.detach().to_dtype(DType::F32)?).map(Some),
        None => Ok(None),
    };
    let (Some(q), Some(k), Some(v)) = (variable("q")?, variable("k")?, variable("v")?) else {
        return fault("needs inputs q, k and v");
    };
    let [head, token, channel] = DECAYS.map(variable);
    let (head, token, channel) = (head?, token?, channel?);
    let state_in = variable("state_in")?;
    let decay = match (&head, &token, &channel) {
        (Some(log), _, _) => LogDecay::Head(log),
        (_, Some(log), _) => LogDecay::Token(log),
        (_, _, Some(log)) => LogDecay::Channel(log),
        _ => LogDecay::None,
    };
    let options = Causal {
        decay,
        initial: state_in.as_ref().map(Var::as_tensor),
        ..Default::default()
    };
    let (o, state) = causal(&q, &k, &v, &options)?;
    let mut outputs = HashMap::from([("o".to_owned(), o.detach()), ("state".to_owned(), state.detach())]);
    let Some(d_o) = inputs.get("do") else {
        return Ok(outputs);
    };
    let mut loss = (&o * d_o.to_dtype(DType::F32)?)?.sum_all()?;
    if let Some(dstate) = inputs.get("dstate") {
        loss = (loss + (&state * dstate.to_dtype(DType::F32)?)?.sum_all()?)?;
    }
    let grads = loss.backward()?;
    let named = [
        ("dq", Some(&q)),
        ("dk", Some(&k)),
        ("dv", Some(&v)),
        ("dg_head", head.as_ref()),
        ("dg_token", token.as_ref()),
        ("dg_channel", channel.as_ref()),
        ("dstate_in", state_in.as_ref()),
    ];
    for (name, var) in named {
        if let Some(grad) = var.and_then(|var| grads.get(var)) {
            outputs.insert(name.to_owned(), grad.clone());
        }
    }
    Ok(outputs)
}

fn check(inputs: &HashMap<String, Tensor>) -> Result<()> {
    let mut faults: Vec<String> = ["q", "k", "v"]
        .iter()
        .filter(|name| !inputs.contains_key(**name))
        .map(|name| format!("{name} is missing"))
        .collect();
    let mut names: Vec<&String> = inputs.keys().collect();
    names.sort();
    for &name in &names {
        let dtype = inputs[name].dtype();
        if !KNOWN.contains(&name.as_str()) {
            faults.push(format!("{name} is unknown, known are {}", KNOWN.join(", ")));
        } else if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            faults.push(format!("{name} is {dtype:?}, expected f32, f16 or bf16"));
        }
    }
    if DECAYS.iter().filter(|name| inputs.contains_key(**name)).count() > 1 {
        faults.push(format!("more than one of {}", DECAYS.join(", ")));
    }
    if inputs.contains_key("dstate") && !inputs.contains_key("do") {
        faults.push("dstate needs do beside it".to_owned());
    }
    faults.extend(shape_faults(inputs));
    if faults.is_empty() {
        Ok(())
    } else {
        fault(&faults.join("; "))
    }
}

fn shape_faults(inputs: &HashMap<String, Tensor>) -> Vec<String> {
    let dims = |name: &str| inputs.get(name).map(|tensor| tensor.dims().to_vec());
    let Some(q) = dims("q") else {
        return Vec::new();
    };
    if q.len() != 4 || q.contains(&0) {
        return vec![format!("q is {q:?}, expected [B, N, H, D]")];
    }
    let value_width = dims("v").and_then(|v| v.last().copied()).unwrap_or(0).max(1);
    let values = vec![q[0], q[1], q[2], value_width];
    let state = vec![q[0], q[2], q[3], value_width];
    let expected = [
        ("k", q.clone()),
        ("v", values.clone()),
        ("g_head", vec![q[2]]),
        ("g_token", q[..3].to_vec()),
        ("g_channel", q),
        ("state_in", state.clone()),
        ("do", values),
        ("dstate", state),
    ];
    expected
        .into_iter()
        .filter_map(|(name, expected)| {
            let found = dims(name).filter(|found| *found != expected)?;
            Some(format!("{name} is {found:?}, expected {expected:?}"))
        })
        .collect()
}

/// Not through `bail!`, which appends a backtrace to the line where the environment asks for one.
fn fault<T>(text: &str) -> Result<T> {
    Err(Error::Msg(format!("{OP}: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decay::reference::Sizes;
    use crate::decay::tests::{Case, Kind};
    use crate::testing::{relative_rms, values};
    use candle_core::Device;

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
            (Kind::Head, "head"),
            (Kind::Token, "token"),
            (Kind::Channel, "channel"),
        ];
        for (kind, suffix) in kinds {
            let case = Case::new(sizes, kind);
            let inputs = case.inputs();
            let gate = format!("g_{suffix}");
            let mut entries = HashMap::new();
            let tensors = inputs.iter().chain([&case.d_o, &case.d_state]);
            for (name, tensor) in ["q", "k", "v", "state_in", &gate, "do", "dstate"]
                .iter()
                .zip(tensors)
            {
                entries.insert((*name).to_owned(), tensor.to_dtype(DType::F32)?);
            }
            let all = forward_op(&entries)?;
            let d_gate = format!("dg_{suffix}");
            let names = ["o", "state", "dq", "dk", "dv", "dstate_in", &d_gate];
            for (name, expected) in names.iter().zip(&case.expected()?) {
                assert!(relative_rms(&values(&all[*name]), expected) < 1e-5, "{name}");
            }
            assert_eq!(all.len(), names.len());
            entries.retain(|name, _| ["q", "k", "v"].contains(&name.as_str()));
            let few = forward_op(&entries)?;
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
        let message = |entries: &[(&str, &Tensor)]| forward_op(&named(entries)).unwrap_err().to_string();
        let text = message(&[("q", &q), ("v", &wrong), ("g", &q), ("g_head", &wrong)]);
        for part in [
            "k is missing",
            "g is unknown",
            "v is [2, 4, 3]",
            "g_head is [2, 4, 3], expected [3]",
        ] {
            assert!(text.contains(part) && !text.contains('\n'), "{text}");
        }
        let both = message(&[
            ("q", &q),
            ("k", &q),
            ("v", &q),
            ("g_token", &wrong),
            ("g_channel", &q),
        ]);
        assert!(
            both.contains("more than one of g_head, g_token, g_channel"),
            "{both}"
        );
        assert!(message(&[("q", &q), ("k", &q), ("v", &q), ("dstate", &q)]).contains("dstate needs do"));
        assert!(message(&[("q", &wrong), ("k", &q), ("v", &q)]).contains("q is [2, 4, 3]"));
        let whole = q.to_dtype(DType::I64).unwrap();
        assert!(message(&[("q", &whole), ("k", &q), ("v", &q)]).contains("q is I64"));
    }
}
