//! A branch joins the residual stream, with or without a gate of its own for each sample (adaLN).
//!
//! ```text
//! y = x + gate (*) branch     dx = dy     dbranch = gate (*) dy     dgate_c = sum over tokens of dy_c branch_c
//! ```
//!
//! The stream may be f32 and the branch bf16: one pass each way, without a cast of either.

use crate::autograd::{Gradient, Value, attach2, attach3};
use crate::error::OpError;
use crate::rows::sum_rows_of_groups;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

const OP: &str = "residual";

/// `x + gate * branch` for `x` and `branch` [B, N, D] and `gate` [B, D], or without a gate for tensors of any one
/// shape; in the type of `x`.
///
/// Differentiable in all of them. On the CPU f32 or f64; on CUDA `x` and `gate` are f32 and `branch` f32 or bf16, or
/// all are bf16.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn add_branch(x: &Tensor, branch: &Tensor, gate: Option<&Tensor>) -> Result<Tensor> {
    if branch.dims() != x.dims() || x.elem_count() == 0 {
        return Err(OpError::shape(OP, "branch", branch, format!("{:?} like x", x.dims())).into());
    }
    let (x, branch) = (x.contiguous()?, branch.contiguous()?);
    let Some(gate) = gate else {
        return attach2(forward(&x, &branch, None, None)?, [&x, &branch], Join);
    };
    let &[batch, _, width] = x.dims() else {
        return Err(OpError::shape(OP, "x", &x, "[B, N, D] with a gate").into());
    };
    if gate.dims() != [batch, width] || gate.dtype() != x.dtype() {
        let expected = format!("[{batch}, {width}] in {:?}", x.dtype());
        return Err(OpError::shape(OP, "gate", gate, expected).into());
    }
    let gate = gate.contiguous()?;
    attach3(
        forward(&x, &branch, Some(&gate), None)?,
        [&x, &branch, &gate],
        Join,
    )
}

/// `x + branch + bias` for `x` and `branch` of one shape [.., D] and `bias` [D] in f32, as [`add_branch`]: the bias of a product of
/// which nobody trains anything costs no pass of its own.
///
/// No gradient passes.
///
/// # Errors
/// As [`add_branch`].
pub fn add_biased(x: &Tensor, branch: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1);
    if branch.dims() != x.dims() || x.elem_count() == 0 {
        return Err(OpError::shape(OP, "branch", branch, format!("{:?} like x", x.dims())).into());
    }
    if bias.dims() != [width] || bias.dtype() != DType::F32 {
        return Err(OpError::shape(OP, "bias", bias, format!("[{width}] in f32")).into());
    }
    let bias = bias.contiguous()?;
    Ok(forward(&x.contiguous()?, &branch.contiguous()?, None, Some(&bias))?.detached())
}

fn forward(x: &Tensor, branch: &Tensor, gate: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Value> {
    let (x, branch) = (x.detach(), branch.detach());
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::forward(&x, &branch, gate, bias);
    }
    let mut branch = branch.to_dtype(x.dtype())?;
    if let Some(bias) = bias {
        branch = branch.broadcast_add(&bias.detach().to_dtype(x.dtype())?)?;
    }
    let scaled = match gate {
        Some(gate) => branch.broadcast_mul(&gate.detach().unsqueeze(1)?)?,
        None => branch,
    };
    Ok(Value::Tensor((x + scaled)?))
}

struct Join;

impl Join {
    /// Adjoints of the branch and of the gate.
    fn gradients(
        &self,
        branch: &Tensor,
        gate: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (branch, gate) = (branch.detach(), gate.map(Tensor::detach));
        #[cfg(feature = "cuda")]
        if grad.device().is_cuda() {
            return cuda::backward(&grad.contiguous()?, &branch, gate.as_ref());
        }
        let Some(gate) = gate else {
            return Ok((grad.to_dtype(branch.dtype())?, None));
        };
        let (batch, tokens, width) = grad.dims3()?;
        let dbranch = grad
            .broadcast_mul(&gate.unsqueeze(1)?)?
            .to_dtype(branch.dtype())?;
        let product = (grad * branch.to_dtype(grad.dtype())?)?.reshape((batch * tokens, width))?;
        Ok((dbranch, Some(sum_rows_of_groups(&product, batch)?)))
    }
}

impl Gradient<2> for Join {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [_, branch]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let (dbranch, _) = self.gradients(branch, None, grad)?;
        Ok([Some(grad.clone()), Some(dbranch)])
    }
}

impl Gradient<3> for Join {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::of(&[1, 2]))
    }

    fn backward(
        &self,
        [_, branch, gate]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (dbranch, dgate) = self.gradients(branch, Some(gate), grad)?;
        Ok([
            Some(grad.clone()),
            Some(dbranch),
            dgate.map(|dgate| dgate.to_dtype(gate.dtype())).transpose()?,
        ])
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    //! Launches of `cuda/rows.cu`.

    use super::OP;
    use crate::autograd::Value;
    use crate::cuda_module::{launch, room};
    use crate::gpu::{self, Locked};
    use crate::pass::CudaReal;
    use crate::rows::cuda::{ROWS, Runs, suffix, sum_runs};
    use candle_core::{DType, Result, Tensor};
    use half::bf16;

    /// Groups of rows that share a gate, rows of a group, columns.
    fn sizes(x: &Tensor, gate: Option<&Tensor>) -> Result<[usize; 3]> {
        let width = x.dims().last().copied().unwrap_or(1);
        let rows = x.elem_count() / width;
        let groups = gate.map_or(Ok(1), |gate| gate.dim(0))?;
        Ok([groups, rows / groups, width])
    }

    fn kind(x: &Tensor, branch: &Tensor) -> Result<String> {
        Ok(format!("{}_{}", suffix(OP, x)?, suffix(OP, branch)?))
    }

    pub(super) fn forward(
        x: &Tensor,
        branch: &Tensor,
        gate: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Value> {
        match x.dtype() {
            DType::BF16 => typed_forward::<bf16>(x, branch, gate, bias),
            _ => typed_forward::<f32>(x, branch, gate, bias),
        }
    }

    fn typed_forward<X: CudaReal>(
        x: &Tensor,
        branch: &Tensor,
        gate: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Value> {
        let device = x.device().as_cuda_device()?;
        let ([groups, rows, width], kind) = (sizes(x, gate)?, kind(x, branch)?);
        let (x, branch) = (Locked::new(OP, x), Locked::new(OP, branch));
        let gate = gate.map(|gate| Locked::new(OP, gate));
        let gate = gate.as_ref().map_or(Ok((0, true)), Locked::address)?;
        let bias = bias.map(|bias| Locked::new(OP, bias));
        let bias = bias.as_ref().map_or(Ok((0, true)), Locked::address)?;
        let (x_at, branch_at) = (x.address()?, branch.address()?);
        let v = if x_at.1 && branch_at.1 && gate.1 && bias.1 && width % 4 == 0 {
            4
        } else {
            1
        };
        let runs = Runs::new(groups, rows, width, v);
        let y = room::<X>(device, groups * rows * width)?;
        launch!(device, ROWS, format!("residual_{kind}_v{v}"), runs.config;
            x_at.0, branch_at.0, gate.0, bias.0, y.as_view(), width as u32, rows as u32, runs.rows_per_run as u32);
        Ok(gpu::value(y, device, x.shape()))
    }

    pub(super) fn backward(
        dy: &Tensor,
        branch: &Tensor,
        gate: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        match branch.dtype() {
            DType::BF16 => typed_backward::<bf16>(dy, branch, gate),
            _ => typed_backward::<f32>(dy, branch, gate),
        }
    }

    fn typed_backward<Y: CudaReal>(
        dy: &Tensor,
        branch: &Tensor,
        gate: Option<&Tensor>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let device = dy.device().as_cuda_device()?;
        let ([groups, rows, width], kind) = (sizes(dy, gate)?, kind(dy, branch)?);
        let gated = gate.is_some();
        let (dy, branch) = (Locked::new(OP, dy), Locked::new(OP, branch));
        let gate = gate.map(|gate| Locked::new(OP, gate));
        let gate_at = gate.as_ref().map_or(Ok((0, true)), Locked::address)?;
        let dy_at = dy.address()?;
        // Without a gate the branch is not read.
        let branch_at = if gated {
            branch.address()?
        } else {
            (branch.start()?, true)
        };
        let v = if dy_at.1 && branch_at.1 && gate_at.1 && width % 4 == 0 {
            4
        } else {
            1
        };
        let runs = Runs::new(groups, rows, width, v);
        let dbranch = room::<Y>(device, groups * rows * width)?;
        let partials = room::<f32>(device, if gated { groups * runs.runs * width } else { 1 })?;
        launch!(device, ROWS, format!("residual_back_{kind}_v{v}"), runs.config;
            dy_at.0, branch_at.0, gate_at.0, dbranch.as_view(), partials.as_view(),
            width as u32, rows as u32, runs.rows_per_run as u32);
        let dgate = if gated {
            let sums = sum_runs(device, &partials, groups, runs.runs, width)?;
            Some(gpu::tensor(sums, device, &(groups, width).into()))
        } else {
            None
        };
        Ok((gpu::tensor(dbranch, device, branch.shape()), dgate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};

    fn inputs([b, n, d]: [usize; 3]) -> [Tensor; 3] {
        [normal(1, &[b, n, d]), normal(2, &[b, n, d]), normal(3, &[b, d])]
    }

    #[test]
    fn agrees_with_the_formula() -> Result<()> {
        let [x, branch, gate] = inputs([2, 131, 7]);
        let wanted = (&x + branch.broadcast_mul(&gate.unsqueeze(1)?)?)?;
        let found = add_branch(&x, &branch, Some(&gate))?;
        assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-15);
        assert_eq!(values(&add_branch(&x, &branch, None)?), values(&(&x + &branch)?));
        let bias = normal(4, &[7]).to_dtype(DType::F32)?;
        let wanted = (&x + branch.broadcast_add(&bias.to_dtype(DType::F64)?)?)?;
        assert!(relative_rms(&values(&add_biased(&x, &branch, &bias)?), &values(&wanted)) < 1e-15);
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for shape in [[1, 1, 1], [2, 3, 5], [2, 70, 3]] {
            check_gradients(&inputs(shape), |t| add_branch(&t[0], &t[1], Some(&t[2])))?;
            check_gradients(&inputs(shape)[..2], |t| add_branch(&t[0], &t[1], None))?;
        }
        let large = inputs([3, 500, 33]);
        check_precision(&large, |t| add_branch(&t[0], &t[1], Some(&t[2])), 1e-5)?;
        check_threads(&large, |t| add_branch(&t[0], &t[1], Some(&t[2])))
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let [x, branch, gate] = inputs([2, 3, 5]);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(add_branch(&x, &gate, None)),
            "residual: branch has shape [2, 5], expected [2, 3, 5] like x"
        );
        assert_eq!(
            message(add_branch(&x, &branch, Some(&branch))),
            "residual: gate has shape [2, 3, 5], expected [2, 5] in F64"
        );
        assert_eq!(
            message(add_biased(&x, &branch, &gate)),
            "residual: bias has shape [2, 5], expected [5] in f32"
        );
    }
}
