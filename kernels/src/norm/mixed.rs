//! Norms of an f32 stream whose result is bf16, on a GPU: one kernel each way instead of a norm and a cast.

use super::{Norm, NormBackward, cuda};
use crate::autograd::{Gradient, Value, attach2, attach3};
use crate::gpu::{self, Locked};
use crate::tape::Needs;
use candle_core::{DType, Result, Tensor};
use half::bf16;

const NAME: &str = "rms_norm";

/// Whether a norm of `x` with a result of `dtype` is of this kind.
pub(super) fn applies(x: &Tensor, dtype: DType) -> bool {
    x.device().is_cuda() && x.dtype() == DType::F32 && dtype == DType::BF16
}

pub(super) fn gained(norm: Norm, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    attach2(forward(norm, &[x, gain])?, [x, gain], Mixed(norm))
}

pub(super) fn modulated(norm: Norm, x: &Tensor, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    attach3(forward(norm, &[x, scale, shift])?, [x, scale, shift], Mixed(norm))
}

fn forward(norm: Norm, operands: &[&Tensor]) -> Result<Value> {
    let device = operands[0].device().as_cuda_device()?;
    let locked: Vec<Locked> = operands.iter().map(|t| Locked::new(NAME, t)).collect();
    let views = locked
        .iter()
        .map(Locked::view::<f32>)
        .collect::<Result<Vec<_>>>()?;
    let y = cuda::forward::<f32, bf16>(&norm, device, &views)?;
    Ok(gpu::value(y, device, operands[0].shape()))
}

struct Mixed(Norm);

impl Mixed {
    fn gradients(&self, [x, scale]: [&Tensor; 2], shift: bool, grad: &Tensor) -> Result<Vec<Tensor>> {
        let device = x.device().as_cuda_device()?;
        let grad = grad.contiguous()?;
        let (x, scale, grad) = (
            Locked::new(NAME, x),
            Locked::new(NAME, scale),
            Locked::new(NAME, &grad),
        );
        let backward = NormBackward { norm: self.0, shift };
        let results =
            cuda::backward::<f32, bf16>(&backward, device, &x.view()?, &grad.view()?, Some(&scale.view()?))?;
        let shapes = [x.shape(), scale.shape(), scale.shape()];
        Ok(results
            .into_iter()
            .zip(shapes)
            .map(|(slice, shape)| gpu::tensor(slice, device, shape))
            .collect())
    }
}

impl Gradient<2> for Mixed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        super::READS
    }

    fn backward(&self, [x, gain]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let mut grads = self.gradients([x, gain], false, grad)?.into_iter();
        Ok([grads.next(), grads.next()])
    }
}

impl Gradient<3> for Mixed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        super::READS
    }

    fn backward(
        &self,
        [x, scale, _]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let mut grads = self.gradients([x, scale], true, grad)?.into_iter();
        Ok([grads.next(), grads.next(), grads.next()])
    }
}
