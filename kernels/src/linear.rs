//! The affine map of a batch of vectors as one node of the graph.
//!
//! ```text
//! y = x W^T + b     dx = dy W     dW = dy^T x     db = sum over rows of dy
//! ```
//!
//! Weights are f32 masters whatever the type of `x`; they are rounded on the way in, products are summed in f32. One
//! node instead of casts, reshapes, a product and a broadcast sum: candle's backward pass writes, reads and adds a zero
//! tensor for every node that it passes.

use crate::error::OpError;
use crate::rows::sum_rows;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, bail};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, DType};

const OP: &str = "linear";

/// `x W^T + b` for `x` [.., I], `weight` [O, I] and `bias` [O], in the type of `x`: [.., O].
///
/// Differentiable in all of them. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; weights are f32, or f64 with it.
///
/// # Errors
/// If a shape, an element type or a device does not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let &[output, input] = weight.dims() else {
        return Err(OpError::shape(OP, "weight", weight, "[O, I]").into());
    };
    if x.dims().last() != Some(&input) {
        return Err(OpError::shape(OP, "x", x, format!("[.., {input}]")).into());
    }
    if let Some(bias) = bias
        && bias.dims() != [output]
    {
        return Err(OpError::shape(OP, "bias", bias, format!("[{output}]")).into());
    }
    // A GPU rounds the masters inside of the node.
    let master = |tensor: &Tensor| match tensor.device().is_cuda() {
        true => tensor.contiguous(),
        false => tensor.to_dtype(x.dtype())?.contiguous(),
    };
    let (x, weight) = (x.contiguous()?, master(weight)?);
    match bias {
        None => x.apply_op2(&weight, Linear),
        Some(bias) => x.apply_op3(&weight, &master(bias)?, Linear),
    }
}

struct Linear;

/// Rows, inputs and outputs, and the layouts of the two operands of the product.
struct Plan {
    mnk: (usize, usize, usize, usize),
    x: Layout,
    weight_t: Layout,
    shape: Shape,
}

impl Plan {
    fn new(x: &Layout, weight: &Layout) -> Result<Self> {
        let (output, input) = weight.shape().dims2()?;
        let rows = x.shape().elem_count() / input.max(1);
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = output;
        }
        Ok(Self {
            mnk: (1, rows, output, input),
            x: Layout::contiguous_with_offset((rows, input), x.start_offset()),
            weight_t: Layout::contiguous_with_offset((output, input), weight.start_offset())
                .transpose(0, 1)?,
            shape: dims.into(),
        })
    }
}

fn cpu(
    (x, x_layout): (&CpuStorage, &Layout),
    (weight, weight_layout): (&CpuStorage, &Layout),
    bias: Option<(&CpuStorage, &Layout)>,
) -> Result<(CpuStorage, Shape)> {
    let plan = Plan::new(x_layout, weight_layout)?;
    let mut y = x.matmul(weight, plan.mnk, &plan.x, &plan.weight_t)?;
    if let Some((bias, layout)) = bias {
        let first = layout.start_offset();
        match (&mut y, bias) {
            (CpuStorage::F32(y), CpuStorage::F32(bias)) => add_to_rows(y, &bias[first..], plan.mnk.2),
            (CpuStorage::F64(y), CpuStorage::F64(bias)) => add_to_rows(y, &bias[first..], plan.mnk.2),
            _ => bail!(
                "{OP}: {:?} with bias {:?}, expected both f32 or both f64",
                y.dtype(),
                bias.dtype()
            ),
        }
    }
    Ok((y, plan.shape))
}

fn add_to_rows<T: Copy + std::ops::AddAssign>(y: &mut [T], bias: &[T], width: usize) {
    for row in y.chunks_exact_mut(width) {
        for (y, &b) in row.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

#[cfg(feature = "cuda")]
fn cuda(
    (x, x_layout): (&CudaStorage, &Layout),
    (weight, weight_layout): (&CudaStorage, &Layout),
    bias: Option<(&CudaStorage, &Layout)>,
) -> Result<(CudaStorage, Shape)> {
    use crate::rows::cuda::launch_add_row;
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let plan = Plan::new(x_layout, weight_layout)?;
    let y = if weight.dtype() == x.dtype() {
        x.matmul(weight, plan.mnk, &plan.x, &plan.weight_t)?
    } else {
        let dense = Layout::contiguous(weight_layout.shape());
        let weight = weight.to_dtype(weight_layout, x.dtype())?;
        x.matmul(&weight, plan.mnk, &plan.x, &dense.transpose(0, 1)?)?
    };
    let Some((bias, layout)) = bias else {
        return Ok((y, plan.shape));
    };
    if bias.dtype() != DType::F32 || !layout.is_contiguous() {
        bail!(
            "{OP}: bias is {:?}, expected contiguous f32 on CUDA",
            bias.dtype()
        );
    }
    let device = y.device().clone();
    let stream = device.cuda_stream();
    let bias = bias.as_cuda_slice::<f32>()?.slice(layout.start_offset()..);
    let bias = (bias.device_ptr(&stream).0, plan.mnk.2);
    let count = plan.shape.elem_count();
    match y.dtype() {
        DType::BF16 => {
            let slice = y.as_cuda_slice::<half::bf16>()?;
            launch_add_row(&device, count, slice.device_ptr(&stream).0, bias, slice)?;
        }
        _ => {
            let slice = y.as_cuda_slice::<f32>()?;
            launch_add_row(&device, count, slice.device_ptr(&stream).0, bias, slice)?;
        }
    }
    Ok((y, plan.shape))
}

/// Adjoints of x, weight and bias; `None` for what no gradient is wanted of.
fn backward(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    grad: &Tensor,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let (output, input) = weight.dims2()?;
    let grad = grad.contiguous()?.reshape(((), output))?;
    let wanted = |tensor: &Tensor, f: &dyn Fn() -> Result<Tensor>| tensor.track_op().then(f).transpose();
    let dx = wanted(x, &|| {
        grad.matmul(&weight.detach().to_dtype(grad.dtype())?)?
            .reshape(x.shape())
    })?;
    let dweight = wanted(weight, &|| {
        let x = x.detach().reshape(((), input))?;
        grad.t()?.matmul(&x)?.to_dtype(weight.dtype())
    })?;
    let dbias = match bias {
        Some(bias) => wanted(bias, &|| sum_rows(&grad)?.to_dtype(bias.dtype()))?,
        None => None,
    };
    Ok((dx, dweight, dbias))
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu((x, x_layout), (weight, weight_layout), None)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda((x, x_layout), (weight, weight_layout), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dweight, _) = backward(x, weight, None, grad)?;
        Ok((dx, dweight))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        cpu((x, x_layout), (weight, weight_layout), Some((bias, bias_layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        cuda((x, x_layout), (weight, weight_layout), Some((bias, bias_layout)))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        backward(x, weight, Some(bias), grad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};

    fn inputs(leading: &[usize], input: usize, output: usize) -> [Tensor; 3] {
        let x = [leading, &[input]].concat();
        [normal(1, &x), normal(2, &[output, input]), normal(3, &[output])]
    }

    #[test]
    fn agrees_with_the_formula() -> Result<()> {
        for (leading, input, output) in [(&[1][..], 1, 1), (&[2, 3], 5, 4), (&[2, 1, 63], 17, 33)] {
            let [x, weight, bias] = inputs(leading, input, output);
            let rows = x.reshape(((), input))?;
            let product = rows.matmul(&weight.t()?)?;
            let found = linear(&x, &weight, None)?;
            assert_eq!(found.dims(), [leading, &[output]].concat());
            assert!(relative_rms(&values(&found), &values(&product)) < 1e-14);
            let found = linear(&x, &weight, Some(&bias))?;
            let wanted = product.broadcast_add(&bias)?;
            assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-14);
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (leading, input, output) in [(&[1][..], 1, 1), (&[2, 3], 5, 4)] {
            let all = inputs(leading, input, output);
            check_gradients(&all, |t| linear(&t[0], &t[1], Some(&t[2])))?;
            check_gradients(&all[..2], |t| linear(&t[0], &t[1], None))?;
        }
        let large = inputs(&[3, 131], 60, 33);
        check_precision(&large, |t| linear(&t[0], &t[1], Some(&t[2])), 1e-5)?;
        check_threads(&large, |t| linear(&t[0], &t[1], Some(&t[2])))
    }

    #[test]
    fn offsets_and_strides_are_seen() -> Result<()> {
        let (x, weight) = (normal(1, &[6, 8]), normal(2, &[7, 4]));
        let (part, rows) = (x.narrow(1, 2, 4)?, weight.narrow(0, 3, 2)?);
        let wanted = part.contiguous()?.matmul(&rows.t()?.contiguous()?)?;
        let found = linear(&part, &rows, None)?;
        assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-14);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let [x, weight, bias] = inputs(&[2], 5, 4);
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        assert_eq!(
            message(linear(&bias, &weight, None)),
            "linear: x has shape [4], expected [.., 5]"
        );
        assert_eq!(
            message(linear(&x, &weight, Some(&bias.narrow(0, 0, 3).unwrap()))),
            "linear: bias has shape [3], expected [4]"
        );
    }
}
