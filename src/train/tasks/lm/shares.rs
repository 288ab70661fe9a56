//! The part of a batch that one of several ranks takes: some rows of it, and of those some tokens.

use candle_core::{Device, Tensor};
use fulgur_kernels::exchange::part_borders;

use super::LmTask;
use super::masking::IGNORED;
use super::packing::Packed;
use crate::train::{Batch, TaskResult};

/// The share of `task` of a batch of `ids` and `targets` `[B, N]`, which are those of all ranks.
///
/// # Errors
/// A failing operation, or a batch that does not split.
pub(super) fn of(task: &LmTask, ids: &Tensor, targets: &Tensor) -> TaskResult<Batch> {
    let share = &task.share;
    let rows = share.rows(ids.dim(0)?)?;
    let own_rows = |x: &Tensor| x.narrow(0, rows.start, rows.len())?.contiguous();
    if let Some(end) = task.end {
        let all = counted(&Packed::of(ids, targets, end)?.targets)?;
        let packed = Packed::of(&own_rows(ids)?, &own_rows(targets)?, end)?;
        let range = share.tokens(packed.ids.dim(1)?)?;
        let own = |x: &Tensor| x.narrow(1, range.start, range.len())?.contiguous();
        let (ids, targets) = (own(&packed.ids)?, own(&packed.targets)?);
        let borders: Vec<u32> = part_borders(&packed.borders, &range)
            .into_iter()
            .map(|border| border as u32)
            .collect();
        let batch = batch(task, &ids, targets, all)?;
        return Ok(batch.on_host("borders", Tensor::new(borders, &Device::Cpu)?));
    }
    let range = share.tokens(ids.dim(1)?)?;
    let own = |x: &Tensor| own_rows(x)?.narrow(1, range.start, range.len())?.contiguous();
    batch(task, &own(ids)?, own(targets)?, counted(targets)?)
}

/// A batch of a rank, out of all ranks' `all` tokens that count.
fn batch(task: &LmTask, ids: &Tensor, targets: Tensor, all: usize) -> TaskResult<Batch> {
    let mut batch = Batch::new(ids.elem_count()).with_ids("ids", task.ids(ids)?);
    batch.share = counted(&targets)? as f64 / all.max(1) as f64;
    Ok(batch.with("targets", targets))
}

/// Targets that are not ignored.
fn counted(targets: &Tensor) -> TaskResult<usize> {
    let targets = targets.flatten_all()?.to_vec1::<u32>()?;
    Ok(targets.iter().filter(|&&target| target != IGNORED).count())
}
