//! The scan on a GPU, launches of `cuda/ema.cu`: one kernel each way, and where lines are long three, over segments of them.

use super::{Dims, NAME, Options};
use crate::autograd::{Gradient, Value, attach3};
use crate::cuda_module::{Module, Slice, flat, launch, module, pointer, room};
use crate::gpu::{self, Locked};
use crate::pass::CudaReal;
use crate::rows::sum_rows;
use candle_core::{DType, Result, Tensor};
use half::bf16;

const EMA: Module = module!("ema");
/// Longest lines that one thread walks along; longer ones fall into segments of so many tokens forward, and backward.
const LONGEST_WALK: usize = 64;
const SEGMENT: usize = 32;
const BACK_SEGMENT: usize = 16;

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

    /// What enters each segment of `values` from before it and from behind it, where that is wanted: `[segments, lines]`.
    fn carries<T: CudaReal>(
        &self,
        [values, rate]: [&Tensor; 2],
        length: usize,
        wanted: [bool; 2],
    ) -> Result<[Option<Slice<f32>>; 2]> {
        let device = values.device().as_cuda_device()?;
        let (stride, lines) = self.lines();
        let Dims {
            n, heads, channels, ..
        } = self.dims;
        let segments = n.div_ceil(length);
        let buffer = |wanted: bool| wanted.then(|| room::<f32>(device, segments * lines)).transpose();
        let [before, behind] = [buffer(wanted[0])?, buffer(wanted[1])?];
        let views = [before.as_ref(), behind.as_ref()].map(|slice| slice.map(Slice::as_view));
        let [values, rate] = [values, rate].map(|t| Locked::new(NAME, t));
        let name = if length == SEGMENT { "sums" } else { "back_sums" };
        launch!(device, EMA, format!("ema_{name}_{}", T::SUFFIX), flat(segments * lines);
            values.view::<T>()?, rate.view::<f32>()?, pointer(device, views[0].as_ref()), pointer(device, views[1].as_ref()),
            n as u32, stride as u32, heads as u32, channels as u32, lines);
        launch!(device, EMA, "ema_carries", flat(lines);
            pointer(device, views[0].as_ref()), pointer(device, views[1].as_ref()), rate.view::<f32>()?,
            segments as u32, length as u32, heads as u32, channels as u32, lines);
        Ok([before, behind])
    }

    fn forward<T: CudaReal>(&self, x: &Tensor, rate: &Tensor, weight: &Tensor) -> Result<Value> {
        let device = x.device().as_cuda_device()?;
        let u = room::<T>(device, x.elem_count())?;
        let (stride, lines) = self.lines();
        let Dims {
            n, heads, channels, ..
        } = self.dims;
        if n > LONGEST_WALK {
            let carries = self.carries::<T>([x, rate], SEGMENT, [true, self.two_sided])?;
            let [before, behind] = [&carries[0], &carries[1]].map(|slice| slice.as_ref().map(Slice::as_view));
            let [x, rate, weight] = [x, rate, weight].map(|t| Locked::new(NAME, t));
            launch!(device, EMA, self.kernel::<T>("_segments"), flat(n.div_ceil(SEGMENT) * lines);
                x.view::<T>()?, rate.view::<f32>()?, weight.view::<f32>()?,
                pointer(device, before.as_ref()), pointer(device, behind.as_ref()), u.as_view(),
                n as u32, stride as u32, heads as u32, channels as u32, lines);
            return Ok(gpu::value(u, device, x.shape()));
        }
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
        // Shares of lines, or of their segments.
        let segments = if n > LONGEST_WALK {
            n.div_ceil(BACK_SEGMENT)
        } else {
            1
        };
        let (drate, dweight) = (
            room::<f32>(device, segments * lines)?,
            room::<f32>(device, segments * lines)?,
        );
        let shape = x.shape().clone();
        if n > LONGEST_WALK {
            let of_x = self.carries::<T>([x, rate], BACK_SEGMENT, [true, self.two_sided])?;
            let of_grad = self.carries::<T>([&grad, rate], BACK_SEGMENT, [self.two_sided, true])?;
            let [x, grad, rate, weight] = [x, &grad, rate, weight].map(|t| Locked::new(NAME, t));
            let views = [&of_x[0], &of_x[1], &of_grad[0], &of_grad[1]]
                .map(|slice| slice.as_ref().map(Slice::as_view));
            let [before, behind, grad_before, grad_behind] =
                views.each_ref().map(|view| pointer(device, view.as_ref()));
            launch!(device, EMA, self.kernel::<T>("_segments_backward"), flat(segments * lines);
                x.view::<T>()?, grad.view::<T>()?, rate.view::<f32>()?, weight.view::<f32>()?,
                before, behind, grad_before, grad_behind,
                dx.as_view(), drate.as_view(), dweight.as_view(),
                n as u32, stride as u32, heads as u32, channels as u32, lines);
        } else {
            let [x, grad, rate, weight] = [x, &grad, rate, weight].map(|t| Locked::new(NAME, t));
            launch!(device, EMA, self.kernel::<T>("_backward"), flat(lines);
                x.view::<T>()?, grad.view::<T>()?, rate.view::<f32>()?, weight.view::<f32>()?,
                dx.as_view(), drate.as_view(), dweight.as_view(),
                n as u32, stride as u32, heads as u32, channels as u32, lines);
        }
        let by_head = |shares| {
            let shares = gpu::tensor(
                shares,
                device,
                &(segments * outer * rest, heads * channels).into(),
            );
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
