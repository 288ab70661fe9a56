//! Rows by number on the processor: copies, and sums of which each belongs to one task.

use super::Ids;
use crate::autograd::Value;
use crate::scalar::{Real, rows_per_task, wide};
use crate::strided::contiguous;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

pub(super) fn forward<T: Real>(table: &Tensor, ids: &Ids, shape: &[usize]) -> Result<Value> {
    let (_, width) = table.dims2()?;
    let guard = table.storage_and_layout().0;
    let table = contiguous::<T>(table, &guard)?;
    let list = ids.list();
    let mut y = vec![T::zero(); list.len() * width];
    let rows = rows_per_task(width);
    y.par_chunks_mut(rows * width)
        .zip(list.par_chunks(rows))
        .for_each(|(y, ids)| {
            for (y, &id) in y.chunks_exact_mut(width).zip(ids) {
                y.copy_from_slice(&table[id as usize * width..][..width]);
            }
        });
    Ok(Value::Cpu(T::to_cpu_storage_owned(y), shape.into()))
}

pub(super) fn backward<T: Real>(table: &Tensor, ids: &Ids, grad: &Tensor) -> Result<Tensor> {
    let (_, width) = table.dims2()?;
    let guard = grad.storage_and_layout().0;
    let dy = contiguous::<T>(grad, &guard)?;
    let order = ids.order();
    let mut sums = vec![T::zero(); ids.rows() * width];
    let rows = rows_per_task(width);
    sums.par_chunks_mut(rows * width)
        .enumerate()
        .for_each(|(task, sums)| {
            let (from, to) = (task * rows, task * rows + sums.len() / width);
            let start = order.segments.partition_point(|s| (s.row as usize) < from);
            let own = order.segments[start..]
                .iter()
                .take_while(|s| (s.row as usize) < to);
            wide(
                #[inline(always)]
                || {
                    for segment in own {
                        let sum = &mut sums[(segment.row as usize - from) * width..][..width];
                        for &position in &order.positions[segment.first as usize..segment.last as usize] {
                            for (sum, &dy) in sum.iter_mut().zip(&dy[position as usize * width..]) {
                                *sum += dy;
                            }
                        }
                    }
                },
            );
        });
    Tensor::from_vec(sums, table.shape(), table.device())
}
