//! The bare operators on named tensors: what `fulgur forward --op lightnet-noncausal` and `lightnet-causal` run.

use super::{Causal, CausalState, NonCausal, causal, noncausal};
use crate::named::Inputs;
use candle_core::{Result, Tensor};
use std::collections::HashMap;

/// Runs the non-causal additive recurrence on named tensors and returns named tensors in f32.
///
/// Takes `q`, `g` (the logits) `[B, N, H, D]` and `v` `[B, N, H, E]` in f32, f16 or bf16, optionally `do`
/// `[B, N, H, E]` and, with it, `dstate` `[B, H, D, E]`. Gives `o` `[B, N, H, E]` and `state` `[B, H, D, E]`; with
/// `do` also `dq`, `dg` and `dv`, the gradients of `sum(o do) + sum(state dstate)`.
///
/// Fails in one line that lists every missing, unknown or mis-shaped input. `state_in` is refused: the form has no
/// order, so that no state comes before its tokens.
pub fn forward_op(tensors: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    let inputs = Inputs {
        op: "lightnet-noncausal",
        tensors,
        needed: &["q", "g", "v"],
        known: &["q", "g", "v", "do", "dstate"],
    };
    if tensors.contains_key("state_in") {
        return inputs
            .fault("state_in is not an input: the form has no order, so no state comes before its tokens");
    }
    inputs.refuse(&inputs.faults(shapes))?;
    let (q, g, v) = (inputs.needed("q")?, inputs.needed("g")?, inputs.needed("v")?);
    let (o, state) = noncausal(&q, &g, &v, &NonCausal::default())?;
    inputs.outputs(
        &o,
        &state,
        &[("dq", Some(&q)), ("dg", Some(&g)), ("dv", Some(&v))],
    )
}

/// Runs the causal additive recurrence on named tensors and returns named tensors in f32.
///
/// Inputs are those of [`forward_op`] and, both or none, `state_in` `[B, H, D, E]` and `log_sum_in` `[B, H, D]`: what
/// tokens before the first have left. Gives `o`, `state` and `log_sum`; with `do` also `dq`, `dg`, `dv` and, where their
/// inputs are, `dstate_in` and `dlog_sum_in`.
///
/// # Errors
/// One line that lists every missing, unknown or mis-shaped input.
pub fn causal_forward_op(tensors: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    let inputs = Inputs {
        op: "lightnet-causal",
        tensors,
        needed: &["q", "g", "v"],
        known: &["q", "g", "v", "state_in", "log_sum_in", "do", "dstate"],
    };
    let mut faults = inputs.faults(|q, width| {
        let mut all = shapes(q, width);
        all.push(("state_in", vec![q[0], q[2], q[3], width]));
        all.push(("log_sum_in", vec![q[0], q[2], q[3]]));
        all
    });
    if tensors.contains_key("state_in") != tensors.contains_key("log_sum_in") {
        faults.push("state_in and log_sum_in come together: a mean and its weight".to_owned());
    }
    inputs.refuse(&faults)?;
    let (q, g, v) = (inputs.needed("q")?, inputs.needed("g")?, inputs.needed("v")?);
    let (state_in, log_sum_in) = (inputs.variable("state_in")?, inputs.variable("log_sum_in")?);
    let initial = match (&state_in, &log_sum_in) {
        (Some(state), Some(log_sum)) => Some(CausalState {
            state: state.as_tensor().clone(),
            log_sum: log_sum.as_tensor().clone(),
        }),
        _ => None,
    };
    let options = Causal {
        initial: initial.as_ref(),
        ..Default::default()
    };
    let (o, last) = causal(&q, &g, &v, &options)?;
    let variables = [
        ("dq", Some(&q)),
        ("dg", Some(&g)),
        ("dv", Some(&v)),
        ("dstate_in", state_in.as_ref()),
        ("dlog_sum_in", log_sum_in.as_ref()),
    ];
    let mut outputs = inputs.outputs(&o, &last.state, &variables)?;
    outputs.insert("log_sum".to_owned(), last.log_sum.detach());
    Ok(outputs)
}

fn shapes(q: &[usize], width: usize) -> Vec<(&'static str, Vec<usize>)> {
    let values = vec![q[0], q[1], q[2], width];
    let state = vec![q[0], q[2], q[3], width];
    vec![
        ("g", q.to_vec()),
        ("v", values.clone()),
        ("do", values),
        ("dstate", state),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::additive::reference::Sizes;
    use crate::additive::tests::Case;
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
        let case = Case::new(
            Sizes {
                b: 2,
                n: 17,
                h: 3,
                d: 5,
                e: 7,
            },
            false,
            false,
        );
        let expected = case.expected();
        let f32_of = |t: &Tensor| t.to_dtype(DType::F32);
        let (q, g, v) = (f32_of(&case.q)?, f32_of(&case.logits)?, f32_of(&case.v)?);
        let (d_o, dstate) = (f32_of(&case.d_o)?, f32_of(&case.d_state)?);
        let all = forward_op(&named(&[
            ("q", &q),
            ("g", &g),
            ("v", &v),
            ("do", &d_o),
            ("dstate", &dstate),
        ]))?;
        for (name, expected) in ["o", "state", "dq", "dg", "dv"].iter().zip(&expected) {
            assert_eq!(all[*name].dtype(), DType::F32);
            assert!(relative_rms(&values(&all[*name]), expected) < 1e-5, "{name}");
        }
        assert_eq!(all.len(), 5);
        let few = forward_op(&named(&[("q", &q), ("g", &g), ("v", &v)]))?;
        let mut names: Vec<_> = few.keys().collect();
        names.sort();
        assert_eq!(names, ["o", "state"]);
        let half = forward_op(&named(&[
            ("q", &q.to_dtype(DType::BF16)?),
            ("g", &g.to_dtype(DType::BF16)?),
            ("v", &v.to_dtype(DType::BF16)?),
            ("do", &d_o.to_dtype(DType::BF16)?),
        ]))?;
        assert!(half.values().all(|t| t.dtype() == DType::F32));
        assert!(relative_rms(&values(&half["o"]), &expected[0]) < 2e-2);
        Ok(())
    }

    #[test]
    fn the_causal_form_reads_as_much_as_there_is() -> Result<()> {
        let normal = |seed, shape: &[usize]| crate::testing::normal(seed, shape).to_dtype(DType::F32);
        let (q, g, v) = (
            normal(1, &[2, 6, 3, 5])?,
            normal(2, &[2, 6, 3, 5])?,
            normal(3, &[2, 6, 3, 7])?,
        );
        let whole = causal_forward_op(&named(&[("q", &q), ("g", &g), ("v", &v), ("do", &v)]))?;
        let mut names: Vec<_> = whole.keys().collect();
        names.sort();
        assert_eq!(names, ["dg", "dq", "dv", "log_sum", "o", "state"]);
        // The last token reads what the form without order reads.
        let all = forward_op(&named(&[("q", &q), ("g", &g), ("v", &v)]))?;
        let last = |t: &Tensor| t.narrow(1, 5, 1).map(|t| values(&t));
        assert!(relative_rms(&last(&whole["o"])?, &last(&all["o"])?) < 1e-5);
        assert!(relative_rms(&values(&whole["state"]), &values(&all["state"])) < 1e-5);
        // Two halves are the whole.
        let half = |t: &Tensor, i: usize| t.narrow(1, 3 * i, 3)?.contiguous();
        let first = causal_forward_op(&named(&[
            ("q", &half(&q, 0)?),
            ("g", &half(&g, 0)?),
            ("v", &half(&v, 0)?),
        ]))?;
        let second = causal_forward_op(&named(&[
            ("q", &half(&q, 1)?),
            ("g", &half(&g, 1)?),
            ("v", &half(&v, 1)?),
            ("do", &half(&v, 1)?),
            ("state_in", &first["state"]),
            ("log_sum_in", &first["log_sum"]),
        ]))?;
        assert!(relative_rms(&values(&second["o"]), &values(&half(&whole["o"], 1)?)) < 1e-5);
        assert!(second.contains_key("dstate_in") && second.contains_key("dlog_sum_in"));
        let alone = causal_forward_op(&named(&[
            ("q", &q),
            ("g", &g),
            ("v", &v),
            ("state_in", &first["state"]),
        ]));
        assert!(alone.unwrap_err().to_string().contains("come together"));
        Ok(())
    }

    #[test]
    fn forward_op_lists_every_fault() {
        let q = Tensor::zeros((2, 4, 3, 5), DType::F32, &Device::Cpu).unwrap();
        let wrong = Tensor::zeros((2, 4, 3), DType::F32, &Device::Cpu).unwrap();
        let message = |entries: &[(&str, &Tensor)]| forward_op(&named(entries)).unwrap_err().to_string();
        let text = message(&[("q", &q), ("v", &wrong), ("k", &q)]);
        for part in ["g is missing", "k is unknown", "v is [2, 4, 3]"] {
            assert!(text.contains(part) && !text.contains('\n'), "{text}");
        }
        assert!(message(&[("q", &q), ("g", &q), ("v", &q), ("state_in", &q)]).contains("state_in"));
        assert!(message(&[("q", &q), ("g", &q), ("v", &q), ("dstate", &q)]).contains("dstate needs do"));
        assert!(message(&[("q", &wrong), ("g", &q), ("v", &q)]).contains("q is [2, 4, 3]"));
        let whole = q.to_dtype(DType::I64).unwrap();
        assert!(message(&[("q", &whole), ("g", &q), ("v", &q)]).contains("q is I64"));
    }
}
