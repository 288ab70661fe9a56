//! The affine map of a batch of vectors as one node of the graph.
//!
//! ```text
//! y = x W^T + b     dx = dy W     dW = dy^T x     db = sum over rows of dy
//! ```
//!
//! Weights are f32 masters whatever the type of `x`; they are rounded on the way in, products are summed in f32. One
//! node instead of casts, reshapes, a product and a broadcast sum: candle's backward pass writes, reads and adds a zero
//! tensor for every node that it passes.

#[cfg(feature = "cuda")]
mod few;

use crate::autograd::{Gradient, GradientOfMany, Value, attach_many, attach2, attach3};
use crate::error::OpError;
use crate::glu::swiglu;
use crate::rows::sum_rows;
use crate::scalar::{Real, wide};
use crate::tape::{Needs, Part, Set};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

const OP: &str = "linear";
/// A product of so few channels costs no more than writing its result, which is made again rather than kept.
const NARROW: usize = 256;
/// So many rows on the CPU are multiplied while each row of the weight is read once, as decoding needs it: each result is a sum
/// in an order that does not depend on the other rows. More rows are worth packing.
pub const FEW_ROWS: usize = 16;
/// Products that a thread is worth.
const PRODUCTS_A_TASK: usize = 1 << 15;

/// `x W^T + b` for `x` [.., I], `weight` [O, I] and `bias` [O], in the type of `x`: [.., O].
///
/// Differentiable in all of them. `x` is f32 or f64 on the CPU, f32 or bf16 on CUDA; weights are f32, or f64 with it. Weights
/// that nobody trains may be bf16: up to [`FEW_ROWS`] rows on the CPU read them as they are, and sum in f32; on CUDA few rows of
/// bf16 have a kernel of their own.
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
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    #[cfg(feature = "cuda")]
    if bias.is_none() && is_frozen(&x, &weight) {
        let product = few::product(&x.detach(), &weight.detach(), false)?;
        if let Some(y) = product {
            return Ok(y);
        }
    }
    // The rounded weights serve both directions.
    let narrow = weight.dtype() == DType::BF16 && x.dtype() == DType::F32;
    let is_few = (1..=FEW_ROWS * input).contains(&x.elem_count()) && output > 0;
    let as_it_is = narrow && is_few && x.device().is_cpu();
    let linear = Linear {
        rounded: match as_it_is {
            true => weight.detach(),
            false => weight.detach().to_dtype(x.dtype())?,
        },
    };
    let value = linear.forward(&x, bias.as_ref())?;
    match &bias {
        None => attach2(value, [&x, &weight], linear),
        Some(bias) => attach3(value, [&x, &weight, bias], linear),
    }
}

/// `silu(a) b` for the halves `[a | b]` of `x W^T`, for `x` [.., I] and `weight` [2 O, I]: [.., O], as [`linear`] and
/// [`swiglu`] one after the other; one kernel for few rows of bf16 on CUDA that nobody trains.
///
/// # Errors
/// As those of both.
pub fn linear_swiglu(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let &[both, input] = weight.dims()
        && both % 2 == 0
        && x.dims().last() == Some(&input)
        && is_frozen(x, weight)
    {
        let (x, weight) = (x.contiguous()?, weight.contiguous()?);
        if let Some(y) = few::product(&x, &weight, true)? {
            return Ok(y);
        }
    }
    swiglu(&linear(x, weight, None)?)
}

/// Whether there are gradients of neither.
#[cfg(feature = "cuda")]
fn is_frozen(x: &Tensor, weight: &Tensor) -> bool {
    !x.track_op() && !weight.track_op()
}

/// The maps of one `x` by several weights [O1, I], [O2, I], .. side by side, as one product: [.., O1 + O2 + ..]. One to
/// four weights, all f32 masters, or f64 with `x`.
///
/// Differentiable in all of them.
///
/// # Errors
/// As [`linear`]; also if there are no weights or more than four.
pub fn joined(x: &Tensor, weights: &[&Tensor]) -> Result<Tensor> {
    let Some(&input) = x.dims().last() else {
        return Err(OpError::shape(OP, "x", x, "[.., I]").into());
    };
    if weights.is_empty() || weights.len() > 4 {
        return Err(OpError::value(OP, "weights", weights.len(), "one to four").into());
    }
    for weight in weights {
        if weight.rank() != 2 || weight.dims()[1] != input {
            return Err(OpError::shape(OP, "weight", weight, format!("[O, {input}]")).into());
        }
    }
    let x = x.contiguous()?;
    let rounded: Vec<Tensor> = weights
        .iter()
        .map(|weight| weight.detach().to_dtype(x.dtype()))
        .collect::<Result<_>>()?;
    let linear = Linear {
        rounded: Tensor::cat(&rounded, 0)?,
    };
    let value = linear.forward(&x, None)?;
    let args: Vec<&Tensor> = [&x].into_iter().chain(weights.iter().copied()).collect();
    attach_many(value, &args, linear)
}

struct Linear {
    rounded: Tensor,
}

impl Linear {
    fn forward(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Value> {
        let (output, input) = self.rounded.dims2()?;
        let rows = x.elem_count() / input.max(1);
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = output;
        }
        let ((x, x_layout), (weight, weight_layout)) =
            (x.storage_and_layout(), self.rounded.storage_and_layout());
        let x_layout = Layout::contiguous_with_offset((rows, input), x_layout.start_offset());
        let weight_layout = weight_layout.transpose(0, 1)?;
        let mnk = (1, rows, output, input);
        match (&*x, &*weight) {
            (Storage::Cpu(x), Storage::Cpu(weight)) => {
                let mut y = match (x, weight) {
                    (CpuStorage::F32(x), CpuStorage::BF16(weight)) => {
                        let (x, weight) = (
                            &x[x_layout.start_offset()..],
                            &weight[weight_layout.start_offset()..],
                        );
                        CpuStorage::F32(few_rows(x, weight, [rows, output, input]))
                    }
                    _ if rows > FEW_ROWS || rows * output * input == 0 => {
                        x.matmul(weight, mnk, &x_layout, &weight_layout)?
                    }
                    (CpuStorage::F32(x), CpuStorage::F32(weight)) => {
                        let (x, weight) = (
                            &x[x_layout.start_offset()..],
                            &weight[weight_layout.start_offset()..],
                        );
                        CpuStorage::F32(few_rows(x, weight, [rows, output, input]))
                    }
                    (CpuStorage::F64(x), CpuStorage::F64(weight)) => {
                        let (x, weight) = (
                            &x[x_layout.start_offset()..],
                            &weight[weight_layout.start_offset()..],
                        );
                        CpuStorage::F64(few_rows(x, weight, [rows, output, input]))
                    }
                    _ => x.matmul(weight, mnk, &x_layout, &weight_layout)?,
                };
                if let Some(bias) = bias {
                    add_on_cpu(&mut y, bias)?;
                }
                Ok(Value::Cpu(y, dims.into()))
            }
            #[cfg(feature = "cuda")]
            (Storage::Cuda(x), Storage::Cuda(weight)) => {
                let y = x.matmul(weight, mnk, &x_layout, &weight_layout)?;
                if let Some(bias) = bias {
                    add_on_cuda(&y, rows * output, bias)?;
                }
                Ok(Value::Cuda(y, dims.into()))
            }
            _ => bail!("{OP}: x and weight lie on different or unsupported devices"),
        }
    }

    /// What gradients of one map read: the weights that count are the rounded ones.
    fn few_needs(&self) -> Needs {
        let &[output, input] = self.rounded.dims() else {
            return Needs::EVERYTHING;
        };
        Needs::operands(Set::of(&[0]))
            .made_again(input <= NARROW && input < output)
            .first_read_late()
    }

    /// Adjoints of x, weight and bias; `None` for what no gradient is wanted of.
    fn gradients(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let [dx, _, dbias] = self.gradients_of(Part::Sooner, x, weight, bias, grad)?;
        let [_, dweight, _] = self.gradients_of(Part::Later, x, weight, bias, grad)?;
        Ok([dx, dweight, dbias])
    }

    /// Those of [`Self::gradients`] that read x, which is that of the weight, or those that do not.
    fn gradients_of(
        &self,
        part: Part,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        let (output, input) = weight.dims2()?;
        let grad = grad.contiguous()?.reshape(((), output))?;
        let wanted = |tensor: &Tensor, f: &dyn Fn() -> Result<Tensor>| tensor.track_op().then(f).transpose();
        if part == Part::Later {
            let dweight = wanted(weight, &|| {
                let x = x.detach().reshape(((), input))?;
                grad.t()?.matmul(&x)?.to_dtype(weight.dtype())
            })?;
            return Ok([None, dweight, None]);
        }
        let dx = wanted(x, &|| {
            let weight = self.rounded.to_dtype(grad.dtype())?;
            grad.matmul(&weight)?.reshape(x.shape())
        })?;
        let dbias = match bias {
            Some(bias) => wanted(bias, &|| sum_rows(&grad)?.to_dtype(bias.dtype()))?,
            None => None,
        };
        Ok([dx, None, dbias])
    }
}

/// Element of a weight that products in `T` read.
trait Weight<T>: Copy + Send + Sync {
    /// A row of the weight in `T`, in `room` where it is not so already.
    fn widened<'a>(row: &'a [Self], room: &'a mut Vec<T>) -> &'a [T];
}

impl<T: Real> Weight<T> for T {
    #[inline(always)]
    fn widened<'a>(row: &'a [Self], _: &'a mut Vec<T>) -> &'a [T] {
        row
    }
}

impl Weight<f32> for bf16 {
    #[inline(always)]
    fn widened<'a>(row: &'a [Self], room: &'a mut Vec<f32>) -> &'a [f32] {
        room.resize(row.len(), 0.0);
        for (wide, narrow) in room.iter_mut().zip(row) {
            // The upper half of an f32; `to_f32` looks for what is no number, and does not vectorise.
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
        room
    }
}

/// `x W^T` of a few rows of `x` [R, I] and `weight` [O, I]: [R, O].
fn few_rows<T: Real, W: Weight<T>>(x: &[T], weight: &[W], [rows, output, input]: [usize; 3]) -> Vec<T> {
    let (x, weight) = (&x[..rows * input], &weight[..output * input]);
    // By columns, so that threads write to places of their own.
    let mut columns = vec![T::zero(); output * rows];
    let block = (PRODUCTS_A_TASK / (rows * input)).max(1);
    let parts = columns
        .par_chunks_mut(block * rows)
        .zip(weight.par_chunks(block * input));
    parts.for_each(|(columns, weights)| {
        wide(
            #[inline(always)]
            || {
                let mut room = Vec::new();
                for (column, weight) in columns.chunks_exact_mut(rows).zip(weights.chunks_exact(input)) {
                    let weight = W::widened(weight, &mut room);
                    for (y, x) in column.iter_mut().zip(x.chunks_exact(input)) {
                        *y = dot(x, weight);
                    }
                }
            },
        );
    });
    if rows == 1 {
        return columns;
    }
    (0..rows * output)
        .map(|at| columns[at % output * rows + at / output])
        .collect()
}

/// Partial sums of a dot product: enough for several additions to be under way at once.
const LANES: usize = 32;

/// `sum_i a_i b_i` in fixed lanes. The lanes are whole arrays, and are summed in a function of their own: otherwise the compiler works on
/// them one by one.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let ((parts_a, tail_a), (parts_b, tail_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in parts_a.iter().zip(parts_b) {
        add_products(&mut lanes, a, b);
    }
    if !tail_a.is_empty() {
        let mut rest = [[T::zero(); LANES]; 2];
        rest[0][..tail_a.len()].copy_from_slice(tail_a);
        rest[1][..tail_b.len()].copy_from_slice(tail_b);
        add_products(&mut lanes, &rest[0], &rest[1]);
    }
    sum_of_lanes(&lanes)
}

#[inline(always)]
fn add_products<T: Real>(lanes: &mut [T; LANES], a: &[T; LANES], b: &[T; LANES]) {
    for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
        *lane += a * b;
    }
}

#[inline(never)]
fn sum_of_lanes<T: Real>(lanes: &[T; LANES]) -> T {
    let mut lanes = *lanes;
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            let other = lanes[lane + width];
            lanes[lane] += other;
        }
    }
    lanes[0]
}

fn add_on_cpu(y: &mut CpuStorage, bias: &Tensor) -> Result<()> {
    let bias = bias.to_dtype(y.dtype())?;
    let (storage, layout) = bias.storage_and_layout();
    let (first, width) = (layout.start_offset(), bias.elem_count());
    match (y, &*storage) {
        (CpuStorage::F32(y), Storage::Cpu(CpuStorage::F32(bias))) => {
            add_to_rows(y, &bias[first..first + width]);
        }
        (CpuStorage::F64(y), Storage::Cpu(CpuStorage::F64(bias))) => {
            add_to_rows(y, &bias[first..first + width]);
        }
        (y, _) => bail!("{OP}: {:?} on the CPU, supported: f32, f64", y.dtype()),
    }
    Ok(())
}

fn add_to_rows<T: Copy + std::ops::AddAssign>(y: &mut [T], bias: &[T]) {
    for row in y.chunks_exact_mut(bias.len()) {
        for (y, &b) in row.iter_mut().zip(bias) {
            *y += b;
        }
    }
}

/// Adds the bias to `count` results in place.
#[cfg(feature = "cuda")]
fn add_on_cuda(y: &CudaStorage, count: usize, bias: &Tensor) -> Result<()> {
    use crate::rows::cuda::launch_add_row;
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let bias = bias.to_dtype(DType::F32)?;
    let width = bias.elem_count();
    let locked = crate::gpu::Locked::new(OP, &bias);
    let bias = (locked.address()?.0, width);
    let device = y.device();
    let stream = device.cuda_stream();
    match y.dtype() {
        DType::BF16 => {
            let slice = y.as_cuda_slice::<bf16>()?;
            launch_add_row(device, count, slice.device_ptr(&stream).0, bias, slice)
        }
        DType::F32 => {
            let slice = y.as_cuda_slice::<f32>()?;
            launch_add_row(device, count, slice.device_ptr(&stream).0, bias, slice)
        }
        found => bail!("{OP}: {found:?} on CUDA, supported: f32, bf16"),
    }
}

impl Gradient<2> for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        self.few_needs()
    }

    fn again(&self, [x, _]: [&Tensor; 2]) -> Result<Value> {
        self.forward(x, None)
    }

    fn part(&self, part: Part, [x, weight]: [&Tensor; 2], grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let [dx, dweight, _] = self.gradients_of(part, x, weight, None, grad)?;
        Ok([dx, dweight])
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.rounded.clone()]
    }

    fn backward(&self, [x, weight]: [&Tensor; 2], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 2]> {
        let [dx, dweight, _] = self.gradients(x, weight, None, grad)?;
        Ok([dx, dweight])
    }
}

impl GradientOfMany for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::of(&[0]))
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.rounded.clone()]
    }

    fn backward(&self, args: &[Tensor], _: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let [x, weights @ ..] = args else {
            bail!("{OP}: no arguments")
        };
        let (output, input) = self.rounded.dims2()?;
        let grad = grad.contiguous()?.reshape(((), output))?;
        let dx = match x.track_op() {
            true => Some(grad.matmul(&self.rounded)?.reshape(x.shape())?),
            false => None,
        };
        let mut all = vec![dx];
        if weights.iter().any(Tensor::track_op) {
            let rows = x.detach().reshape(((), input))?;
            let together = grad.t()?.matmul(&rows)?;
            let mut first = 0;
            for weight in weights {
                let count = weight.dim(0)?;
                all.push(Some(together.narrow(0, first, count)?.to_dtype(weight.dtype())?));
                first += count;
            }
        } else {
            all.extend(weights.iter().map(|_| None));
        }
        Ok(all)
    }
}

impl Gradient<3> for Linear {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        self.few_needs()
    }

    fn again(&self, [x, _, bias]: [&Tensor; 3]) -> Result<Value> {
        self.forward(x, Some(bias))
    }

    fn part(
        &self,
        part: Part,
        [x, weight, bias]: [&Tensor; 3],
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        self.gradients_of(part, x, weight, Some(bias), grad)
    }

    fn holds(&self) -> Vec<Tensor> {
        vec![self.rounded.clone()]
    }

    fn backward(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        self.gradients(x, weight, Some(bias), grad)
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
    fn few_rows_are_rows_on_their_own() -> Result<()> {
        for (output, input) in [(1, 1), (37, 5), (300, 259)] {
            let weight = Tensor::randn(0f32, 1.0, (output, input), &candle_core::Device::Cpu)?;
            let x = Tensor::randn(0f32, 1.0, (FEW_ROWS + 1, input), &candle_core::Device::Cpu)?;
            let all = linear(&x, &weight, None)?;
            let few = linear(&x.narrow(0, 1, FEW_ROWS)?, &weight, None)?;
            let far = (few.clone() - all.narrow(0, 1, FEW_ROWS)?)?.abs()?.max_all()?;
            assert!(far.to_scalar::<f32>()? < 2e-4, "{output} {input}");
            for row in 0..FEW_ROWS {
                let alone = linear(&x.narrow(0, 1 + row, 1)?, &weight, None)?;
                let same = few.narrow(0, row, 1)?;
                assert_eq!(alone.to_vec2::<f32>()?, same.to_vec2::<f32>()?);
            }
        }
        Ok(())
    }

    /// As if the weight had been widened first, to the last bit where rows are few.
    #[test]
    fn weights_of_16_bits_are_read_as_they_are() -> Result<()> {
        let cpu = &candle_core::Device::Cpu;
        for (output, input) in [(1, 1), (37, 5), (300, 259), (33, 64)] {
            let weight = Tensor::randn(0f32, 1.0, (output, input), cpu)?.to_dtype(DType::BF16)?;
            let bias = Tensor::randn(0f32, 1.0, output, cpu)?;
            for rows in [1, 3, FEW_ROWS, FEW_ROWS + 1] {
                let x = Tensor::randn(0f32, 1.0, (rows, input), cpu)?;
                let found = linear(&x, &weight, Some(&bias))?;
                let wanted = linear(&x, &weight.to_dtype(DType::F32)?, Some(&bias))?;
                assert_eq!(found.to_vec2::<f32>()?, wanted.to_vec2::<f32>()?, "{rows}");
            }
        }
        // Gradients of x see the same weights.
        let weight = Tensor::randn(0f32, 1.0, (4, 3), cpu)?.to_dtype(DType::BF16)?;
        let x = candle_core::Var::randn(0f32, 1.0, (2, 3), cpu)?;
        let gradients = linear(&x, &weight, None)?.sum_all()?.backward()?;
        let wanted = weight
            .to_dtype(DType::F32)?
            .sum_keepdim(0)?
            .broadcast_as((2, 3))?;
        let far = (gradients.get(&x).unwrap() - wanted)?.abs()?.max_all()?;
        assert!(far.to_scalar::<f32>()? < 1e-6);
        Ok(())
    }

    #[test]
    fn joined_maps_are_the_maps() -> Result<()> {
        let x = normal(1, &[2, 3, 5]);
        let weights = [normal(2, &[4, 5]), normal(3, &[1, 5]), normal(4, &[6, 5])];
        let found = joined(&x, &weights.iter().collect::<Vec<_>>())?;
        let alone: Vec<Tensor> = weights
            .iter()
            .map(|weight| linear(&x, weight, None))
            .collect::<Result<_>>()?;
        assert!(relative_rms(&values(&found), &values(&Tensor::cat(&alone, 2)?)) < 1e-14);
        for count in 1..=3 {
            let inputs = [std::slice::from_ref(&x), &weights[..count]].concat();
            check_gradients(&inputs, |t| joined(&t[0], &t[1..].iter().collect::<Vec<_>>()))?;
        }
        let message = joined(&x, &[]).unwrap_err().to_string();
        assert_eq!(message, "linear: weights is 0, expected one to four");
        Ok(())
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
