//! The bare operator on named tensors: what `fulgur forward --op lightnet-noncausal` runs.

use super::{NonCausal, noncausal};
use candle_core::{DType, Error, Result, Tensor, Var};
use std::collections::HashMap;

const OP: &str = "lightnet-noncausal";
const KNOWN: [&str; 5] = ["q", "g", "v", "do", "dstate"];

/// Runs the non-causal additive recurrence on named tensors and returns named tensors in f32.
///
/// Takes `q`, `g` (the logits) `[B, N, H, D]` and `v` `[B, N, H, E]` in f32, f16 or bf16, optionally `do`
/// `[B, N, H, E]` and, with it, `dstate` `[B, H, D, E]`. Gives `o` `[B, N, H, E]` and `state` `[B, H, D, E]`; with
/// `do` also `dq`, `dg` and `dv`, the gradients of `sum(o do) + sum(state dstate)`.
///
/// Fails in one line that lists every missing, unknown or mis-shaped input. `state_in` is refused: the form has no
/// order, so that no state comes before its tokens.
pub fn forward_op(inputs: &HashMap<String, Tensor>) -> Result<HashMap<String, Tensor>> {
    check(inputs)?;
    let wide = |name: &str| {
        inputs
            .get(name)
            .map(|t| t.detach().to_dtype(DType::F32))
            .transpose()
    };
    let (Some(q), Some(g), Some(v)) = (wide("q")?, wide("g")?, wide("v")?) else {
        return fault("needs inputs q, g and v");
    };
    let vars = [q, g, v].map(|tensor| Var::from_tensor(&tensor));
    let [q, g, v] = vars;
    let (q, g, v) = (q?, g?, v?);
    let (o, state) = noncausal(&q, &g, &v, &NonCausal::default())?;
    let mut outputs = HashMap::from([
        ("o".to_owned(), o.detach()),
        ("state".to_owned(), state.detach().contiguous()?),
    ]);
    let Some(d_o) = wide("do")? else {
        return Ok(outputs);
    };
    let mut loss = (&o * d_o)?.sum_all()?;
    if let Some(dstate) = wide("dstate")? {
        loss = (loss + (&state * dstate)?.sum_all()?)?;
    }
    let grads = loss.backward()?;
    for (name, var) in [("dq", &q), ("dg", &g), ("dv", &v)] {
        let grad = match grads.get(var) {
            Some(grad) => grad.clone(),
            None => var.zeros_like()?,
        };
        outputs.insert(name.to_owned(), grad);
    }
    Ok(outputs)
}

fn check(inputs: &HashMap<String, Tensor>) -> Result<()> {
    if inputs.contains_key("state_in") {
        return fault("state_in is not an input: the form has no order, so no state comes before its tokens");
    }
    let mut faults: Vec<String> = ["q", "g", "v"]
        .iter()
        .filter(|name| !inputs.contains_key(**name))
        .map(|name| format!("{name} is missing"))
        .collect();
    let mut names: Vec<&String> = inputs.keys().collect();
    names.sort();
    for &name in &names {
        if !KNOWN.contains(&name.as_str()) {
            faults.push(format!("{name} is unknown, known are {}", KNOWN.join(", ")));
        }
    }
    if inputs.contains_key("dstate") && !inputs.contains_key("do") {
        faults.push("dstate needs do beside it".to_owned());
    }
    let dims = |name: &str| inputs.get(name).map(|tensor| tensor.dims().to_vec());
    if let Some(q) = dims("q") {
        if q.len() != 4 || q.contains(&0) {
            faults.push(format!("q is {q:?}, expected [B, N, H, D]"));
        } else {
            let value_width = dims("v").and_then(|v| v.last().copied()).unwrap_or(0).max(1);
            let values = vec![q[0], q[1], q[2], value_width];
            let state = vec![q[0], q[2], q[3], value_width];
            for (name, expected) in [("g", q), ("v", values.clone()), ("do", values), ("dstate", state)] {
                if let Some(found) = dims(name)
                    && found != expected
                {
                    faults.push(format!("{name} is {found:?}, expected {expected:?}"));
                }
            }
        }
    }
    for &name in &names {
        let dtype = inputs[name].dtype();
        if KNOWN.contains(&name.as_str()) && !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            faults.push(format!("{name} is {dtype:?}, expected f32, f16 or bf16"));
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        fault(&faults.join("; "))
    }
}

/// Not through `bail!`, which appends a backtrace to the line where the environment asks for one.
fn fault<T>(text: &str) -> Result<T> {
    Err(Error::Msg(format!("{OP}: {text}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::additive::reference::Sizes;
    use crate::additive::tests::Case;
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
