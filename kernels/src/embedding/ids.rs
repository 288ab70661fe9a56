//! Numbers of rows, checked on the host, and their order by value.

use super::OP;
#[cfg(feature = "cuda")]
use super::cuda::Placed;
use crate::error::OpError;
use crate::upload::Uploader;
use candle_core::{DType, Result, Tensor};
use std::sync::{Arc, OnceLock};

/// Numbers of rows of a table, all within it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Ids(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    ids: Vec<u32>,
    shape: Vec<usize>,
    rows: usize,
    order: OnceLock<Order>,
    /// Where they lie on a GPU.
    #[cfg(feature = "cuda")]
    placed: Option<Placed>,
}

/// Positions of ids, those of one id side by side, in their order.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) positions: Vec<u32>,
    /// One for each id that occurs, by id.
    pub(super) segments: Vec<Segment>,
}

/// Where the positions of the id `row` stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) row: u32,
    pub(super) first: u32,
    pub(super) last: u32,
}

impl Ids {
    /// Ids of the given shape for a table of `rows` rows.
    ///
    /// # Errors
    /// If there is no id, their number does not fit the shape, or one is not below `rows`.
    pub fn new(ids: &[u32], shape: &[usize], rows: usize) -> Result<Self> {
        if ids.is_empty() || shape.iter().product::<usize>() != ids.len() {
            let expected = format!("as many as {shape:?} has, at least one");
            return Err(OpError::value(OP, "number of ids", ids.len(), expected).into());
        }
        if ids.len() > u32::MAX as usize {
            return Err(OpError::value(OP, "number of ids", ids.len(), "at most 2^32 - 1").into());
        }
        if let Some(at) = ids.iter().position(|&id| id as usize >= rows) {
            let found = format!("{} at {:?}", ids[at], place(at, shape));
            let expected = format!("less than {rows}, the rows of the table");
            return Err(OpError::value(OP, "id", found, expected).into());
        }
        Ok(Self(Arc::new(Inner {
            ids: ids.to_vec(),
            shape: shape.to_vec(),
            rows,
            order: OnceLock::new(),
            #[cfg(feature = "cuda")]
            placed: None,
        })))
    }

    /// Ids from a u32 tensor. One on a GPU has to be waited for: [`Self::new`] does without.
    ///
    /// # Errors
    /// As for [`Self::new`]; also if the tensor is not u32.
    pub fn of(ids: &Tensor, rows: usize) -> Result<Self> {
        if ids.dtype() != DType::U32 {
            return Err(OpError::value(OP, "ids", format!("{:?}", ids.dtype()), "U32").into());
        }
        Self::new(&ids.flatten_all()?.to_vec1()?, ids.dims(), rows)
    }

    /// Their shape.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Rows of the table.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// All of them in a row.
    pub fn list(&self) -> &[u32] {
        &self.0.ids
    }

    /// The same ids, which also lie on the device of `uploader` with their order, without waiting for it. On the CPU they are
    /// what they were.
    ///
    /// # Errors
    /// The device or the page-locked memory of the host is used up.
    pub fn upload(&self, uploader: &mut Uploader) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if uploader.device().is_cuda() {
            return Ok(Self(Arc::new(Inner {
                ids: self.0.ids.clone(),
                shape: self.0.shape.clone(),
                rows: self.0.rows,
                order: OnceLock::new(),
                placed: Some(Placed::upload(self, uploader)?),
            })));
        }
        let _ = uploader;
        Ok(self.clone())
    }

    /// The same ids in memory of their own on the device where they lie: places for [`Self::copy_to`].
    ///
    /// # Errors
    /// They were not uploaded, or the device has no memory left.
    #[cfg(feature = "cuda")]
    pub fn own(&self) -> Result<Self> {
        Ok(Self(Arc::new(Inner {
            ids: self.0.ids.clone(),
            shape: self.0.shape.clone(),
            rows: self.0.rows,
            order: OnceLock::new(),
            placed: Some(self.uploaded()?.copied()?),
        })))
    }

    /// Writes these ids over those of `to` on the device, behind all that was queued before: whatever was recorded with `to` reads
    /// these from then on. The host's list of `to` stays what it was.
    ///
    /// # Errors
    /// One of them was not uploaded, they are for different tables or have different shapes, or the driver refuses.
    #[cfg(feature = "cuda")]
    pub fn copy_to(&self, to: &Self) -> Result<()> {
        if (self.shape(), self.rows()) != (to.shape(), to.rows()) {
            let found = format!("{:?} below {}", self.shape(), self.rows());
            let expected = format!("{:?} below {}", to.shape(), to.rows());
            return Err(OpError::value(OP, "ids", found, expected).into());
        }
        self.uploaded()?.copy_to(to.uploaded()?)
    }

    #[cfg(feature = "cuda")]
    fn uploaded(&self) -> Result<&Placed> {
        self.placed()
            .ok_or_else(|| OpError::value(OP, "ids", "on the host", "uploaded before").into())
    }

    /// Where they lie on a GPU.
    #[cfg(feature = "cuda")]
    pub(super) fn placed(&self) -> Option<&Placed> {
        self.0.placed.as_ref()
    }

    /// The same ids with their order found, in whatever thread this is called.
    #[must_use]
    pub fn ordered(self) -> Self {
        self.order();
        self
    }

    /// Their order, found when it is first asked for.
    pub(super) fn order(&self) -> &Order {
        self.0.order.get_or_init(|| order(&self.0.ids, self.0.rows))
    }
}

/// Indices of element number `at` of a tensor of the given shape.
fn place(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut place = vec![0; shape.len()];
    for (index, &length) in place.iter_mut().zip(shape).rev() {
        *index = at % length;
        at /= length;
    }
    place
}

/// A counting sort.
fn order(ids: &[u32], rows: usize) -> Order {
    let mut next = vec![0u32; rows];
    for &id in ids {
        next[id as usize] += 1;
    }
    let mut segments = Vec::new();
    let mut first = 0;
    for (row, next) in next.iter_mut().enumerate() {
        let count = std::mem::replace(next, first);
        if count > 0 {
            let last = first + count;
            let row = row as u32;
            segments.push(Segment { row, first, last });
            first = last;
        }
    }
    let mut positions = vec![0; ids.len()];
    for (position, &id) in ids.iter().enumerate() {
        let next = &mut next[id as usize];
        positions[*next as usize] = position as u32;
        *next += 1;
    }
    Order { positions, segments }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn order_is_stable_and_complete() {
        let ids = Ids::new(&[4, 1, 4, 0, 1, 4], &[6], 6).unwrap();
        let Order { positions, segments } = ids.order();
        assert_eq!(positions, &[3, 1, 4, 0, 2, 5]);
        let segment = |row, first, last| Segment { row, first, last };
        assert_eq!(segments, &[segment(0, 0, 1), segment(1, 1, 3), segment(4, 3, 6)]);
    }

    #[test]
    fn tensors_and_lists_are_the_same() -> Result<()> {
        let ids = Tensor::new(&[[3u32, 1], [0, 2], [2, 2]], &Device::Cpu)?;
        let (found, turned) = (Ids::of(&ids, 4)?, Ids::of(&ids.t()?, 4)?);
        assert_eq!(
            (found.list(), found.shape()),
            (&[3, 1, 0, 2, 2, 2][..], &[3, 2][..])
        );
        assert_eq!(
            (turned.list(), turned.shape()),
            (&[3, 0, 2, 1, 2, 2][..], &[2, 3][..])
        );
        Ok(())
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let message = |result: Result<Ids>| result.unwrap_err().to_string();
        assert_eq!(
            message(Ids::new(&[0, 1, 2, 3, 4, 9], &[2, 3], 5)),
            "embedding: id is 9 at [1, 2], expected less than 5, the rows of the table"
        );
        assert_eq!(
            message(Ids::new(&[0, 1], &[3], 5)),
            "embedding: number of ids is 2, expected as many as [3] has, at least one"
        );
        assert_eq!(
            message(Ids::new(&[], &[0], 5)),
            "embedding: number of ids is 0, expected as many as [0] has, at least one"
        );
        let ids = Tensor::new(&[1i64], &Device::Cpu).unwrap();
        assert_eq!(message(Ids::of(&ids, 5)), "embedding: ids is I64, expected U32");
    }
}
