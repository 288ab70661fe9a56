//! Rows of a table by number: the embedding of tokens.
//!
//! ```text
//! y_i = table[id_i]          dtable[v] = sum over i with id_i = v of dy_i, in the order of i
//! ```
//!
//! Ids come from the host and are checked there, once, so that no GPU has to be waited for. Their order by value, which the
//! gradient needs, is found there as well and only then. Sums are taken in that order, long ones in pieces of fixed
//! lengths: they have the same bits each time and for any number of threads.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod ids;

pub use ids::Ids;

use crate::autograd::{Gradient, Value, attach1};
use crate::error::OpError;
use crate::tape::{Needs, Set};
use candle_core::{DType, Result, Tensor};

const OP: &str = "embedding";

/// The rows `ids` `[..]` of `table` `[V, D]` in `dtype`: `[.., D]`.
///
/// Differentiable in the table, whose gradient is dense and of its type. The table is f32 or f64 on the CPU, f32 or bf16 on
/// CUDA, where bf16 rows of an f32 master are rounded on the way.
///
/// # Errors
/// If the table's shape or element type does not fit, or `ids` were checked against another number of rows.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use fulgur_kernels::embedding::{Ids, lookup};
/// let table = Tensor::new(&[[0f32, 1.0], [2.0, 3.0], [4.0, 5.0]], &Device::Cpu)?;
/// let y = lookup(&table, &Ids::new(&[2, 0], &[2], 3)?, DType::F32)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[4.0, 5.0], [0.0, 1.0]]);
/// # candle_core::Result::Ok(())
/// ```
pub fn lookup(table: &Tensor, ids: &Ids, dtype: DType) -> Result<Tensor> {
    let &[rows, width] = table.dims() else {
        return Err(OpError::shape(OP, "table", table, "[V, D]").into());
    };
    if table.elem_count() == 0 {
        return Err(OpError::shape(OP, "table", table, "at least one element").into());
    }
    if rows != ids.rows() {
        let expected = format!("[{}, D], as the ids were checked", ids.rows());
        return Err(OpError::shape(OP, "table", table, expected).into());
    }
    check_type(table)?;
    let table = table.contiguous()?;
    let shape = [ids.shape(), &[width]].concat();
    let value = forward(&table, ids, &shape, dtype)?;
    attach1(value, &table, Lookup(ids.clone()))?.to_dtype(dtype)
}

/// As [`lookup`] of ids `[B]` of type u32 beside the table: on a GPU nothing waits for them, and a graph that was recorded reads
/// them anew. Not differentiable.
///
/// The caller vouches that all of them are below V: on a GPU nobody looks.
///
/// # Errors
/// If a shape or an element type does not fit; on the CPU as [`Ids::new`].
pub fn lookup_at(table: &Tensor, ids: &Tensor, dtype: DType) -> Result<Tensor> {
    let (&[rows, width], &[_]) = (table.dims(), ids.dims()) else {
        return Err(OpError::shape(OP, "ids", ids, "[B] beside a table [V, D]").into());
    };
    if table.elem_count() * ids.elem_count() == 0 || ids.dtype() != DType::U32 {
        return Err(OpError::shape(OP, "ids", ids, "[B] of u32, at least one").into());
    }
    check_type(table)?;
    let table = table.detach().contiguous()?;
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() {
        let ids = ids.contiguous()?;
        let y = match (table.dtype(), dtype) {
            (DType::BF16, _) => cuda::forward_at::<half::bf16, half::bf16>(&table, &ids),
            (_, DType::BF16) => cuda::forward_at::<f32, half::bf16>(&table, &ids),
            _ => cuda::forward_at::<f32, f32>(&table, &ids),
        };
        return y?.to_dtype(dtype);
    }
    let y = lookup(&table, &Ids::of(ids, rows)?, dtype)?;
    y.reshape((ids.elem_count(), width))
}

fn check_type(table: &Tensor) -> Result<()> {
    let (device, supported, fits) = if table.device().is_cuda() {
        (
            "CUDA",
            "f32, bf16",
            matches!(table.dtype(), DType::F32 | DType::BF16),
        )
    } else {
        (
            "the CPU",
            "f32, f64",
            matches!(table.dtype(), DType::F32 | DType::F64),
        )
    };
    if !fits {
        let found = table.dtype();
        return Err(OpError::DType {
            op: OP,
            field: "table",
            found,
            device,
            supported,
        }
        .into());
    }
    Ok(())
}

/// The rows, in `dtype` where that costs nothing.
fn forward(table: &Tensor, ids: &Ids, shape: &[usize], dtype: DType) -> Result<Value> {
    #[cfg(feature = "cuda")]
    if table.device().is_cuda() {
        return match (table.dtype(), dtype) {
            (DType::BF16, _) => cuda::forward::<half::bf16, half::bf16>(table, ids, shape),
            (_, DType::BF16) => cuda::forward::<f32, half::bf16>(table, ids, shape),
            _ => cuda::forward::<f32, f32>(table, ids, shape),
        };
    }
    let _ = dtype;
    match table.dtype() {
        DType::F64 => cpu::forward::<f64>(table, ids, shape),
        _ => cpu::forward::<f32>(table, ids, shape),
    }
}

struct Lookup(Ids);

impl Gradient<1> for Lookup {
    fn name(&self) -> &'static str {
        OP
    }

    fn needs(&self) -> Needs {
        Needs::operands(Set::NONE)
    }

    fn backward(&self, [table]: [&Tensor; 1], _: &Tensor, grad: &Tensor) -> Result<[Option<Tensor>; 1]> {
        let grad = grad.contiguous()?;
        #[cfg(feature = "cuda")]
        if table.device().is_cuda() {
            let sums = match grad.dtype() {
                DType::BF16 => cuda::backward::<half::bf16>(table, &self.0, &grad)?,
                _ => cuda::backward::<f32>(table, &self.0, &grad)?,
            };
            return Ok([Some(sums.to_dtype(table.dtype())?)]);
        }
        Ok([Some(match table.dtype() {
            DType::F64 => cpu::backward::<f64>(table, &self.0, &grad)?,
            _ => cpu::backward::<f32>(table, &self.0, &grad)?,
        })])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, check_precision, check_threads, normal, relative_rms, values};
    use candle_core::{Device, Var};

    /// Ids of which half are the same, and some do not occur.
    fn ids(shape: &[usize], rows: usize) -> Ids {
        let count: usize = shape.iter().product();
        let ids: Vec<u32> = (0..count)
            .map(|i| if i % 2 == 0 { rows / 2 } else { i * i * 7 % rows } as u32)
            .collect();
        Ids::new(&ids, shape, rows).unwrap()
    }

    #[test]
    fn agrees_with_the_definition() -> Result<()> {
        for (shape, rows, width) in [
            (&[1][..], 1, 1),
            (&[2, 3], 5, 4),
            (&[3, 131], 17, 33),
            (&[2, 1, 700], 300, 8),
        ] {
            let (table, ids) = (normal(1, &[rows, width]), ids(shape, rows));
            let y = lookup(&table, &ids, DType::F64)?;
            assert_eq!(y.dims(), [shape, &[width]].concat());
            let (list, found) = (values(&table), values(&y));
            for (i, &id) in ids.list().iter().enumerate() {
                let row = id as usize * width;
                assert_eq!(found[i * width..(i + 1) * width], list[row..row + width]);
            }
        }
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        for (shape, rows, width) in [(&[1][..], 1, 1), (&[2, 3], 5, 4), (&[71], 7, 3)] {
            let ids = ids(shape, rows);
            check_gradients(&[normal(1, &[rows, width])], |t| lookup(&t[0], &ids, DType::F64))?;
        }
        let many = ids(&[3, 1000], 257);
        let table = [normal(1, &[257, 33])];
        check_precision(&table, |t| lookup(&t[0], &many, t[0].dtype()), 1e-5)?;
        check_threads(&table, |t| lookup(&t[0], &many, t[0].dtype()))
    }

    /// The gradient of a master has its type though the rows were rounded, and is that of one-hot products.
    #[test]
    fn rows_may_be_of_another_type() -> Result<()> {
        let table = Var::from_tensor(&normal(1, &[5, 4]).to_dtype(DType::F32)?)?;
        let ids = Ids::new(&[3, 1, 3], &[3], 5)?;
        let y = lookup(&table, &ids, DType::F16)?;
        assert_eq!(y.dtype(), DType::F16);
        let weights = Tensor::new(
            &[
                [1f32, 2.0, 3.0, 4.0],
                [5.0, 6.0, 7.0, 8.0],
                [0.5, 0.25, 0.0, -1.0],
            ],
            &Device::Cpu,
        )?;
        let grads = (y.to_dtype(DType::F32)? * &weights)?.sum_all()?.backward()?;
        let found = grads.get(&table).expect("a gradient");
        assert_eq!(found.dtype(), DType::F32);
        let expected = [
            [0f32; 4],
            [5.0, 6.0, 7.0, 8.0],
            [0.0; 4],
            [1.5, 2.25, 3.0, 3.0],
            [0.0; 4],
        ];
        assert_eq!(found.to_vec2::<f32>()?, expected);
        Ok(())
    }

    #[test]
    fn views_of_tables_are_the_same_as_copies() -> Result<()> {
        let ids = ids(&[7], 5);
        let table = normal(1, &[4, 5]).t()?;
        let found = lookup(&table, &ids, DType::F64)?;
        let wanted = lookup(&table.contiguous()?, &ids, DType::F64)?;
        assert!(relative_rms(&values(&found), &values(&wanted)) < 1e-15);
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let message = |result: Result<Tensor>| result.unwrap_err().to_string();
        let ids = ids(&[2, 3], 5);
        assert_eq!(
            message(lookup(&normal(1, &[5]), &ids, DType::F64)),
            "embedding: table has shape [5], expected [V, D]"
        );
        assert_eq!(
            message(lookup(&normal(1, &[4, 3]), &ids, DType::F64)),
            "embedding: table has shape [4, 3], expected [5, D], as the ids were checked"
        );
        let table = normal(1, &[5, 3]).to_dtype(DType::F16).unwrap();
        assert_eq!(
            message(lookup(&table, &ids, DType::F16)),
            "embedding: table is F16 on the CPU, supported: f32, f64"
        );
    }
}
