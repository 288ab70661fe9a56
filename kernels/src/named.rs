//! Bare operators on named tensors, as `fulgur forward --op` runs them: checks of inputs, and gradients by name.

use candle_core::{DType, Error, Result, Tensor, Var};
use std::collections::HashMap;

/// Tensors by name.
pub(crate) type Named = HashMap<String, Tensor>;

/// What an operator takes.
pub(crate) struct Inputs<'a> {
    /// Name of the operator, for error messages.
    pub(crate) op: &'static str,
    pub(crate) tensors: &'a Named,
    pub(crate) needed: &'a [&'static str],
    /// All names, the needed ones among them.
    pub(crate) known: &'a [&'static str],
}

impl Inputs<'_> {
    /// Everything that is wrong with the inputs. `shapes` gives the expected shapes for those of q, `[B, N, H, D]`, and the
    /// width of v.
    pub(crate) fn faults(
        &self,
        shapes: impl Fn(&[usize], usize) -> Vec<(&'static str, Vec<usize>)>,
    ) -> Vec<String> {
        let mut faults: Vec<String> = self
            .needed
            .iter()
            .filter(|name| !self.tensors.contains_key(**name))
            .map(|name| format!("{name} is missing"))
            .collect();
        let mut names: Vec<&String> = self.tensors.keys().collect();
        names.sort();
        for name in names {
            let dtype = self.tensors[name].dtype();
            if !self.known.contains(&name.as_str()) {
                faults.push(format!("{name} is unknown, known are {}", self.known.join(", ")));
            } else if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
                faults.push(format!("{name} is {dtype:?}, expected f32, f16 or bf16"));
            }
        }
        if self.tensors.contains_key("dstate") && !self.tensors.contains_key("do") {
            faults.push("dstate needs do beside it".to_owned());
        }
        let dims = |name: &str| self.tensors.get(name).map(|tensor| tensor.dims().to_vec());
        match dims("q") {
            Some(q) if q.len() != 4 || q.contains(&0) => {
                faults.push(format!("q is {q:?}, expected [B, N, H, D]"));
            }
            Some(q) => {
                let width = dims("v").and_then(|v| v.last().copied()).unwrap_or(0).max(1);
                for (name, expected) in shapes(&q, width) {
                    if let Some(found) = dims(name).filter(|found| *found != expected) {
                        faults.push(format!("{name} is {found:?}, expected {expected:?}"));
                    }
                }
            }
            None => {}
        }
        faults
    }

    /// Errors in one line that lists all of `faults`, if there are any.
    pub(crate) fn refuse(&self, faults: &[String]) -> Result<()> {
        if faults.is_empty() {
            Ok(())
        } else {
            self.fault(&faults.join("; "))
        }
    }

    /// Not through `bail!`, which appends a backtrace to the line where the environment asks for one.
    pub(crate) fn fault<T>(&self, text: &str) -> Result<T> {
        Err(Error::Msg(format!("{}: {text}", self.op)))
    }

    /// An input in f32, as a variable.
    pub(crate) fn variable(&self, name: &str) -> Result<Option<Var>> {
        match self.tensors.get(name) {
            Some(tensor) => Var::from_tensor(&tensor.detach().to_dtype(DType::F32)?).map(Some),
            None => Ok(None),
        }
    }

    /// An input that there has to be.
    pub(crate) fn needed(&self, name: &str) -> Result<Var> {
        match self.variable(name)? {
            Some(variable) => Ok(variable),
            None => self.fault(&format!("{name} is missing")),
        }
    }

    /// Outputs `o` and `state` and, where `do` is given, the gradients of `sum(o do) + sum(state dstate)` for the variables,
    /// by the names beside them.
    pub(crate) fn outputs(
        &self,
        o: &Tensor,
        state: &Tensor,
        variables: &[(&'static str, Option<&Var>)],
    ) -> Result<Named> {
        let mut outputs = HashMap::from([
            ("o".to_owned(), o.detach()),
            ("state".to_owned(), state.detach().contiguous()?),
        ]);
        let wide = |name: &str| {
            let tensor = self.tensors.get(name);
            tensor.map(|t| t.detach().to_dtype(DType::F32)).transpose()
        };
        let Some(d_o) = wide("do")? else {
            return Ok(outputs);
        };
        let mut loss = (o * d_o)?.sum_all()?;
        if let Some(dstate) = wide("dstate")? {
            loss = (loss + (state * dstate)?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        for &(name, variable) in variables {
            if let Some(variable) = variable {
                let grad = match grads.get(variable) {
                    Some(grad) => grad.clone(),
                    None => variable.zeros_like()?,
                };
                outputs.insert(name.to_owned(), grad);
            }
        }
        Ok(outputs)
    }
}
