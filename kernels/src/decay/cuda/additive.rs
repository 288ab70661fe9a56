//! The causal additive recurrence on tensor cores: sweeps whose keys are logits and whose decays are gates.
//!
//! The gates, `[B, N, H, D]` in f32, are made again in the backward pass: to keep them would take as much as queries and
//! logits together.

use super::super::{Dims, Kind, NAME, Passed, StateGradient};
use super::cut::Cut;
use super::sweep::{Form, Gate, LogDecays, Sweeper};
use super::{Gates, Recurrence};
use crate::additive::{Causal, CausalState};
use crate::autograd::{GradientOfMany, Value, attach_many, attach1};
use crate::log_sum::{self, Scan};
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, Mutex};

/// [`crate::additive::causal`] for checked inputs, or none where the kernels do not take them.
pub(crate) fn additive(
    q: &Tensor,
    logits: &Tensor,
    v: &Tensor,
    options: &Causal<'_>,
    dims: Dims,
) -> Result<Option<(Tensor, CausalState)>> {
    let Dims { b, n, h, d, e } = dims;
    let form = Form::Channel(Gate::Additive);
    let halves = [q, logits, v]
        .iter()
        .all(|t| matches!(t.dtype(), DType::BF16 | DType::F16));
    let fits = q.device().is_cuda() && halves && d % 8 == 0 && e % 8 == 0 && d.max(e) <= form.widest();
    if q.device().is_cuda() {
        tracing::debug!(tensor_cores = fits, b, n, h, d, e, "additive::causal");
    }
    if !fits {
        return Ok(None);
    }
    super::check_size(dims)?;
    let dtype = v.dtype();
    let device = q.device().as_cuda_device()?;
    let [q, logits, v] = [
        q.to_dtype(form.dtype())?,
        logits.to_dtype(form.dtype())?,
        v.to_dtype(form.dtype())?,
    ];
    let wide = |t: &Tensor| t.to_dtype(DType::F32)?.contiguous();
    let initial = match options.initial {
        Some(initial) => Some((wide(&initial.state)?, wide(&initial.log_sum)?)),
        None => None,
    };
    let before = initial.as_ref().map(|(_, log_sum)| log_sum.detach());
    let scan = Scan {
        batch: b,
        ends: options
            .sequences
            .map_or_else(|| vec![n], |borders| borders[1..].to_vec()),
        tokens: n,
        heads: h,
        width: d,
    };
    let dense = dense(&logits.detach())?;
    let z = log_sum::cuda::gates(&scan, &dense, before.as_ref())?;
    let mut decays = LogDecays::new(Kind::Channel, Some(z.clone()), form)?;
    decays.before = before;
    let recurrence = Recurrence {
        sweeper: Sweeper {
            form,
            cut: Arc::new(Cut::new(device, (b, n), options.sequences, form.tiles(e) * h)?),
            decays,
            device: device.clone(),
        },
        dims,
        exchange: None,
        packed: false,
    };
    let state = initial.as_ref().map(|(state, _)| state.detach());
    let (enter, finals, o) = recurrence.forward(&q.detach(), &dense, &v.detach(), state.as_ref())?;
    let last = last_gates(&scan, &z, recurrence.sweeper.decays.before.as_ref())?;
    let (d_state, d_last): (Passed, Passed) = Default::default();
    let mut args = vec![&q, &logits, &v];
    if let Some((state, log_sum)) = &initial {
        args.extend([state, log_sum]);
    }
    let gradient = OutputGradient {
        recurrence: recurrence.with(recurrence.sweeper.decays.forgotten()),
        scan,
        enter,
        finals: finals.clone(),
        d_state: d_state.clone(),
        d_last: d_last.clone(),
    };
    let o = attach_many(o, &args, gradient)?;
    let state = attach1(Value::Tensor(finals), &o, StateGradient { d_state })?;
    let log_sum = attach1(Value::Tensor(last), &o, StateGradient { d_state: d_last })?;
    Ok(Some((o.to_dtype(dtype)?, CausalState { state, log_sum })))
}

/// Logits whose channels lie next to each other.
fn dense(logits: &Tensor) -> Result<Tensor> {
    match logits.stride()[3] {
        1 => Ok(logits.clone()),
        _ => logits.contiguous(),
    }
}

/// Gates of the last tokens; what came before empty sequences.
fn last_gates(scan: &Scan, z: &Tensor, before: Option<&Tensor>) -> Result<Tensor> {
    let last = scan.last_rows(z)?;
    let nothing = match before {
        Some(before) => before.clone(),
        None => last.affine(0.0, log_sum::NOTHING)?,
    };
    scan.unless_empty(&last, &nothing)
}

struct OutputGradient {
    /// Without the gates.
    recurrence: Recurrence,
    scan: Scan,
    enter: Option<Tensor>,
    finals: Tensor,
    d_state: Passed,
    d_last: Passed,
}

fn take(passed: &Arc<Mutex<Option<Tensor>>>) -> Result<Option<Tensor>> {
    match passed.lock() {
        Ok(mut passed) => passed.take().map(|adjoint| adjoint.contiguous()).transpose(),
        Err(_) => bail!("{NAME}: the adjoint of the state was lost in a panic"),
    }
}

impl GradientOfMany for OutputGradient {
    fn name(&self) -> &'static str {
        "additive::causal"
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::ALL)
    }

    fn holds(&self) -> Vec<Tensor> {
        let enter = self.enter.clone().into_iter();
        enter.chain([self.finals.clone()]).collect()
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let (d_state, d_last) = (take(&self.d_state)?, take(&self.d_last)?);
        let [q, logits, v] = [args[0].detach(), args[1].detach(), args[2].detach()];
        // What the last gates pull besides the tokens: their own adjoint, and that of the state, of which they are the scale.
        let through_state = d_state
            .as_ref()
            .map(|d_state| (&self.finals * d_state)?.sum(3))
            .transpose()?;
        let last = match (through_state, &d_last) {
            (Some(state), Some(last)) => Some((state - last)?),
            (Some(state), None) => Some(state),
            (None, Some(last)) => Some(last.neg()?),
            (None, None) => None,
        };
        let before = self.recurrence.sweeper.decays.before.clone();
        let z = log_sum::cuda::gates(&self.scan, &dense(&logits)?, before.as_ref())?;
        let mut decays = LogDecays::new(Kind::Channel, Some(z.clone()), self.recurrence.sweeper.form)?;
        decays.before = before;
        let recurrence = self.recurrence.with(decays);
        let gates = Gates::Logits {
            scan: &self.scan,
            last: last.as_ref(),
        };
        let rows = [&q, &logits, &v];
        let found = recurrence.backward(
            rows,
            self.enter.as_ref(),
            &grad.detach(),
            d_state.as_ref(),
            &gates,
        )?;
        let mut all = vec![Some(found.dq), Some(found.dk), Some(found.dv)];
        if let (Some(log_sum), Some(sums)) = (args.get(4), &found.sums) {
            // The first token's decay scales the state that enters.
            let scale = (log_sum.detach() - self.scan.first_rows(&z)?)?.exp()?;
            let pulled = (scale * self.scan.first_rows(sums)?)?;
            let through_state = (args[3].detach() * &found.d_initial)?.sum(3)?;
            let d_before = (through_state - pulled)?;
            // Empty sequences hand their gates on.
            let handed = d_last.map_or_else(|| d_before.zeros_like(), Ok)?;
            let d_before = self.scan.unless_empty(&d_before, &handed)?;
            all.extend([Some(found.d_initial), Some(d_before)]);
        }
        for (adjoint, arg) in all.iter_mut().zip(args) {
            if !arg.track_op() {
                *adjoint = None;
            }
        }
        Ok(all)
    }
}
