//! A branch joins the residual stream and the norm of the sum feeds the next branch, one pass each way.
//!
//! ```text
//! s   = x + branch                             the stream goes on
//! r   = 1 / sqrt(mean_j s_j^2 + eps)
//! n_j = s_j r w_j                              in the type of the branch
//!
//! u_j       = dn_j w_j
//! dx_j      = ds_j + r u_j - s_j r^3 mean_i(u_i s_i) = dbranch_j
//! dw_j      = sum over rows of dn_j s_j r
//! ```
//!
//! The adjoints of both results meet in one pass. The sum is kept for it; where the stream is f32 it is exact enough to
//! be read instead of its terms.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use super::{check_elements, check_eps, checked_parameter};
use crate::autograd::{GradientOfSeveral, Value, attach_several};
use crate::error::OpError;
use crate::pass::same_kind;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor, bail};
use std::sync::{Arc, OnceLock};

const OP: &str = "add_norm";

/// `sum = residual + branch` in the type of `residual`, and `sum / sqrt(mean(sum^2) + eps) * gain` over its last axis in
/// the type of `branch`, for `residual` and `branch` [.., D] and `gain` [D] or none.
///
/// Differentiable in all three through both results. On the CPU f32 or f64; on CUDA `residual` is f32 and `branch` f32 or
/// bf16, or both are bf16. The gain is of the type of `residual` or f32.
///
/// # Errors
/// If a shape, an element type or a device does not fit, or `eps` is not a positive number.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use fulgur_kernels::norm::add_norm;
/// let (x, branch) = (Tensor::new(&[1f64, 2.0], &Device::Cpu)?, Tensor::new(&[2f64, 2.0], &Device::Cpu)?);
/// let (sum, normed) = add_norm(&x, &branch, None, 1e-12)?;
/// assert_eq!(sum.to_vec1::<f64>()?, [3.0, 4.0]);
/// assert!((normed.to_vec1::<f64>()?[0] - 3.0 / 12.5f64.sqrt()).abs() < 1e-9);
/// # candle_core::Result::Ok(())
/// ```
pub fn add_norm(
    residual: &Tensor,
    branch: &Tensor,
    gain: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let Some(&width) = residual.dims().last() else {
        return Err(OpError::shape(OP, "residual", residual, "[.., D]").into());
    };
    check_eps(OP, eps)?;
    if branch.dims() != residual.dims() {
        let expected = format!("{:?} like residual", residual.dims());
        return Err(OpError::shape(OP, "branch", branch, expected).into());
    }
    same_kind(OP, &[("residual", residual)])?;
    check_elements(OP, "residual", residual)?;
    check_elements(OP, "branch", branch)?;
    if !branch.device().same_device(residual.device()) {
        let found = format!("on {:?}", branch.device().location());
        let expected = format!("a tensor on {:?} like residual", residual.device().location());
        return Err(OpError::value(OP, "branch", found, expected).into());
    }
    if residual.dtype() == DType::BF16 && branch.dtype() == DType::F32 {
        return Err(OpError::value(OP, "branch", "F32", "BF16 like residual").into());
    }
    let gain = gain
        .map(|gain| checked_parameter(OP, "gain", gain, residual))
        .transpose()?;
    let (residual, branch) = (residual.contiguous()?, branch.contiguous()?);
    let op = AddNorm {
        width,
        rows: residual.elem_count() / width,
        eps,
    };
    let values = op.forward(&residual, &branch, gain.as_ref())?;
    let mut args = vec![&residual, &branch];
    args.extend(&gain);
    let kept = Arc::new(OnceLock::new());
    let gradient = Kept {
        op,
        sum: kept.clone(),
    };
    let results = attach_several(values.into(), &args, gradient)?;
    let Ok([sum, normed]) = <[Tensor; 2]>::try_from(results) else {
        bail!("{OP}: two values gave another number of results")
    };
    // Without a graph the node is gone already, and this goes with it.
    if kept.set(sum.detach()).is_err() {
        bail!("{OP}: the sum was kept twice");
    }
    Ok((sum, normed))
}

/// One call of the operator.
#[derive(Clone, Copy, Debug)]
struct AddNorm {
    width: usize,
    rows: usize,
    eps: f64,
}

impl AddNorm {
    fn forward(&self, residual: &Tensor, branch: &Tensor, gain: Option<&Tensor>) -> Result<[Value; 2]> {
        #[cfg(feature = "cuda")]
        if residual.device().is_cuda() {
            return match (residual.dtype(), branch.dtype()) {
                (DType::BF16, _) => cuda::forward::<half::bf16, half::bf16>(self, [residual, branch], gain),
                (_, DType::BF16) => cuda::forward::<f32, half::bf16>(self, [residual, branch], gain),
                _ => cuda::forward::<f32, f32>(self, [residual, branch], gain),
            };
        }
        match residual.dtype() {
            DType::F64 => cpu::forward::<f64>(self, residual, branch, gain),
            _ => cpu::forward::<f32>(self, residual, branch, gain),
        }
    }

    fn gradients(
        &self,
        sum: &Tensor,
        gain: Option<&Tensor>,
        d_sum: Option<&Tensor>,
        d_normed: &Tensor,
    ) -> Result<Adjoints> {
        #[cfg(feature = "cuda")]
        if sum.device().is_cuda() {
            return match (sum.dtype(), d_normed.dtype()) {
                (DType::BF16, _) => {
                    cuda::backward::<half::bf16, half::bf16>(self, sum, gain, d_sum, d_normed)
                }
                (_, DType::BF16) => cuda::backward::<f32, half::bf16>(self, sum, gain, d_sum, d_normed),
                _ => cuda::backward::<f32, f32>(self, sum, gain, d_sum, d_normed),
            };
        }
        match sum.dtype() {
            DType::F64 => cpu::backward::<f64>(self, sum, gain, d_sum, d_normed),
            _ => cpu::backward::<f32>(self, sum, gain, d_sum, d_normed),
        }
    }
}

struct Adjoints {
    d_residual: Tensor,
    /// In the type of the branch.
    d_branch: Tensor,
    /// In the type of the computation, where there is a gain that is learnt.
    d_gain: Option<Tensor>,
}

/// The operator with the sum that it made, which lies outside of the graph.
struct Kept {
    op: AddNorm,
    sum: Arc<OnceLock<Tensor>>,
}

impl GradientOfSeveral for Kept {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::of(&[2]))
    }

    fn holds(&self) -> Vec<Tensor> {
        self.sum.get().cloned().into_iter().collect()
    }

    fn backward(&self, args: &[Tensor], adjoints: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
        let [residual, branch, rest @ ..] = args else {
            bail!("{OP}: {} arguments, expected 2 or 3", args.len())
        };
        let gain = rest.first();
        let dense = |index: usize| match adjoints.get(index) {
            Some(Some(adjoint)) => adjoint.contiguous().map(Some),
            _ => Ok(None),
        };
        let (d_sum, d_normed) = (dense(0)?, dense(1)?);
        let Some(sum) = self.sum.get() else {
            bail!("{OP}: no sum was kept")
        };
        let found = match (&d_sum, &d_normed) {
            (_, Some(d_normed)) => self.op.gradients(sum, gain, d_sum.as_ref(), d_normed)?,
            // Only the stream goes on.
            (Some(d_sum), None) => Adjoints {
                d_residual: d_sum.clone(),
                d_branch: d_sum.to_dtype(branch.dtype())?,
                d_gain: gain.map(Tensor::zeros_like).transpose()?,
            },
            (None, None) => bail!("{OP}: no adjoint"),
        };
        debug_assert_eq!(residual.shape(), found.d_residual.shape());
        let mut all = vec![Some(found.d_residual), Some(found.d_branch)];
        if let Some(gain) = gain {
            let d_gain = found.d_gain.map(|d_gain| d_gain.detach().to_dtype(gain.dtype()));
            all.push(d_gain.transpose()?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::norm::rms_norm;
    use crate::residual::add_branch;
    use crate::tape;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::Var;

    const EPS: f64 = 1e-6;

    fn inputs([b, n, d]: [usize; 3]) -> [Tensor; 3] {
        [normal(1, &[b, n, d]), normal(2, &[b, n, d]), normal(3, &[d])]
    }

    /// Both results in a row.
    fn both(t: &[Tensor]) -> Result<Tensor> {
        let (sum, normed) = add_norm(&t[0], &t[1], t.get(2), EPS)?;
        Tensor::cat(&[&sum, &normed.to_dtype(sum.dtype())?], 0)
    }

    #[test]
    fn is_the_addition_and_the_norm() -> Result<()> {
        for shape in [[1, 1, 1], [2, 3, 5], [2, 131, 63], [3, 7, 48]] {
            let [x, branch, gain] = inputs(shape);
            let (x_list, branch_list, weights) = (values(&x), values(&branch), values(&gain));
            let (sum, normed) = add_norm(&x, &branch, Some(&gain), EPS)?;
            let wanted: Vec<f64> = x_list.iter().zip(&branch_list).map(|(a, b)| a + b).collect();
            assert_eq!(values(&sum), wanted);
            let mut norm = vec![];
            for row in wanted.chunks_exact(shape[2]) {
                let mean = row.iter().map(|s| s * s).sum::<f64>() / row.len() as f64;
                norm.extend(row.iter().zip(&weights).map(|(s, w)| s / (mean + EPS).sqrt() * w));
            }
            assert!(relative_rms(&values(&normed), &norm) < 1e-14);
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for count in [2, 3] {
            for shape in [[1, 1, 2], [2, 3, 5], [2, 70, 3], [2, 5, 12]] {
                let t = &inputs(shape)[..count];
                check_gradients(t, both)?;
                check_gradients(t, |t| Ok(add_norm(&t[0], &t[1], t.get(2), EPS)?.1))?;
            }
            for shape in [[1, 1, 60], [2, 63, 60], [3, 500, 33]] {
                check_precision(&inputs(shape)[..count], both, 1e-5)?;
            }
        }
        // Only the stream goes on: the gain has no part in it.
        check_gradients(&inputs([2, 3, 5]), |t| {
            Ok(add_norm(&t[0], &t[1], t.get(2), EPS)?.0)
        })?;
        check_threads(&inputs([3, 700, 33]), both)
    }

    /// Layers in a row, where each sum is used twice, against separate operators: with candle's graph and on a tape.
    #[test]
    fn streams_of_several_branches() -> Result<()> {
        let network = |t: &[Tensor], fused: bool| -> Result<Tensor> {
            let (mut stream, mut normed) = (t[0].clone(), t[1].clone());
            for _ in 0..3 {
                let branch = (normed.tanh()? * 3.0)?;
                (stream, normed) = if fused {
                    add_norm(&stream, &branch, Some(&t[2]), EPS)?
                } else {
                    let sum = add_branch(&stream, &branch, None)?;
                    (sum.clone(), rms_norm(&sum, Some(&t[2]), EPS)?)
                };
            }
            (stream.sqr()? + normed)?.mean_all()
        };
        let vars: Vec<Var> = inputs([2, 9, 6])
            .iter()
            .map(Var::from_tensor)
            .collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let wanted = network(&tensors, false)?.backward()?;
        let found = network(&tensors, true)?.backward()?;
        let (loss, tape) = tape::record(|| network(&tensors, true));
        let taped = tape.backward(&loss?)?;
        for var in &vars {
            let wanted = values(wanted.get(var).expect("a gradient"));
            for store in [&found, &taped] {
                assert!(relative_rms(&values(store.get(var).expect("a gradient")), &wanted) < 1e-13);
            }
        }
        Ok(())
    }

    /// A second walk through one graph finds nothing left over from the first.
    #[test]
    fn results_may_be_walked_back_from_one_at_a_time() -> Result<()> {
        let [x, branch, gain] = inputs([2, 3, 5]);
        let x = Var::from_tensor(&x)?;
        let (sum, normed) = add_norm(&x, &branch, Some(&gain), EPS)?;
        let weights = normal(4, &[2, 3, 5]);
        let loss = |t: &Tensor| (t * &weights)?.sum_all();
        let gradient =
            |loss: Tensor| -> Result<Vec<f64>> { Ok(values(loss.backward()?.get(&x).expect("a gradient"))) };
        let (of_sum, of_normed) = (gradient(loss(&sum)?)?, gradient(loss(&normed)?)?);
        let of_both = gradient((loss(&sum)? + loss(&normed)?)?)?;
        assert_eq!(of_sum, values(&weights));
        let added: Vec<f64> = of_sum.iter().zip(&of_normed).map(|(a, b)| a + b).collect();
        assert!(relative_rms(&of_both, &added) < 1e-14);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let [x, branch, gain] = inputs([2, 3, 5]);
        let message = |result: Result<(Tensor, Tensor)>| result.unwrap_err().to_string();
        assert_eq!(
            message(add_norm(&x, &gain, None, EPS)),
            "add_norm: branch has shape [5], expected [2, 3, 5] like residual"
        );
        assert_eq!(
            message(add_norm(&x, &branch, Some(&x), EPS)),
            "add_norm: gain has shape [2, 3, 5], expected [5]"
        );
        assert_eq!(
            message(add_norm(&x, &branch.to_dtype(DType::F16).unwrap(), None, EPS)),
            "add_norm: branch is F16 on the CPU, supported: f32, f64"
        );
        assert_eq!(
            message(add_norm(&x, &branch, None, f64::NAN)),
            "add_norm: eps is NaN, expected a positive number"
        );
    }
}
