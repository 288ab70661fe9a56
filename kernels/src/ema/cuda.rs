//! The scan as one kernel each way, on a GPU: launches of `cuda/ema.cu`.

use super::{Dims, NAME, Options};
use crate::autograd::{Gradient, Value, attach3};
use crate::cuda_module::{Module, flat, launch, module, room};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use crate::rows::sum_rows;
use candle_core::{DType, Result, Tensor};
use half::bf16;

const EMA: Module = module!("ema");

/// Whether the kernels take such a call: no state that enters, and none that is asked for.
pub(super) fn applies(x: &Tensor, options: &Options<'_>) -> bool {
    let parts = options.exchange.as_ref().map_or(1, |exchange| exchange.parts());
    x.device().is_cuda()
        && matches!(x.dtype(), DType::F32 | DType::BF16)
        && options.initial.is_none()
        && parts == 1
}

pub(super) fn scan(
    x: &Tensor,
    rate: &Tensor,
    weight: &Tensor,
    dims: Dims,
    two_sided: bool,
) -> Result<Tensor> {
    let (x, rate, weight) = (
        x.contiguous()?,
        rate.to_dtype(DType::F32)?.contiguous()?,
        weight.to_dtype(DType::F32)?.contiguous()?,
    );
    let scan = Fused { dims, two_sided };
    let value = match x.dtype() {
        DType::BF16 => scan.forward::<bf16>(&x, &rate, &weight)?,
        _ => scan.forward::<f32>(&x, &rate, &weight)?,
    };
    attach3(value, [&x, &rate, &weight], scan)
}

struct Fused {
    dims: Dims,
    two_sided: bool,
}

impl Fused {
    fn kernel<T: CudaReal>(&self, backward: &str) -> String {
        let kind = if self.two_sided { "two_sided" } else { "one_sided" };
        format!("ema_{kind}{backward}_{}", T::SUFFIX)
    }

    /// Distance of tokens, and number of lines.
    fn lines(&self) -> (usize, usize) {
        let stride = self.dims.rest * self.dims.heads * self.dims.channels;
        (stride, self.dims.outer * stride)
    }

    fn forward<T: CudaReal>(&self, x: &Tensor, rate: &Tensor, weight: &Tensor) -> Result<Value> {
        let device = x.device().as_cuda_device()?;
        let u = room::<T>(device, x.elem_count())?;
        let (stride, lines) = self.lines();
        let Dims {
            n, heads, channels, ..
        } = self.dims;
        let [x, rate, weight] = [x, rate, weight].map(|t| Locked::new(NAME, t));
        launch!(device, EMA, self.kernel::<T>(""), flat(lines);
            x.view::<T>()?, rate.view::<f32>()?, weight.view::<f32>()?, u.as_view(),
            n as u32, stride as u32, heads as u32, channels as u32, lines);
        Ok(gpu::value(u, device, x.shape()))
    }

    fn typed_backward<T: CudaReal>(
        &self,
        [x, rate, weight]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let device = x.device().as_cuda_device()?;
        let grad = grad.contiguous()?;
        let dx = room::<T>(device, x.elem_count())?;
        let (stride, lines) = self.lines();
        let Dims {
            outer,
            n,
            rest,
            heads,
            channels,
        } = self.dims;
        let (drate, dweight) = (room::<f32>(device, lines)?, room::<f32>(device, lines)?);
        let shape = x.shape().clone();
        {
            let [x, grad, rate, weight] = [x, &grad, rate, weight].map(|t| Locked::new(NAME, t));
            launch!(device, EMA, self.kernel::<T>("_backward"), flat(lines);
                x.view::<T>()?, grad.view::<T>()?, rate.view::<f32>()?, weight.view::<f32>()?,
                dx.as_view(), drate.as_view(), dweight.as_view(),
                n as u32, stride as u32, heads as u32, channels as u32, lines);
        }
        let by_head = |shares| {
            let shares = gpu::tensor(shares, device, &(outer * rest, heads * channels).into());
            sum_rows(&shares)?.reshape((heads, channels))?.sum(1)
        };
        Ok([
            Some(gpu::tensor(dx, device, &shape)),
            Some(by_head(drate)?),
            Some(by_head(dweight)?),
        ])
    }
}

impl Gradient<3> for Fused {
    fn name(&self) -> &'static str {
        NAME
    }

    fn backward(&self, args: [&Tensor; 3], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        match grad.dtype() {
            DType::BF16 => self.typed_backward::<bf16>(args, grad),
            _ => self.typed_backward::<f32>(args, grad),
        }
    }
}
