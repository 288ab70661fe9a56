//! Strided CPU matrices, their product, and `[B, N, H, C]` views of tensors.

use crate::scalar::{Real, wide};
use candle_core::{Layout, Result, Storage, StorageRef, Tensor, bail};
use std::ops::Range;

/// A copy of the elements of a tensor of the CPU, row-major.
pub(crate) fn elements<T: Real>(tensor: &Tensor) -> Result<Vec<T>> {
    match &*tensor.storage_and_layout().0 {
        Storage::Cpu(_) => tensor.flatten_all()?.to_vec1::<T>(),
        _ => bail!("operands lie on different devices"),
    }
}

/// A read-only matrix with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix without gaps.
    pub(crate) fn packed(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, [rows, cols], [cols, 1])
    }

    /// A matrix of `shape` whose entry (r, c) lies at `r * strides[0] + c * strides[1]`.
    pub(crate) fn strided(data: &'a [T], shape: [usize; 2], strides: [usize; 2]) -> Self {
        let [rows, cols] = shape;
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * strides[0] + (cols - 1) * strides[1];
            assert!(
                last < data.len(),
                "matrix reaches {last} of {} elements",
                data.len()
            );
        }
        Self {
            data,
            rows,
            cols,
            row_stride: strides[0],
            col_stride: strides[1],
        }
    }

    /// The transpose, without a copy.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

impl<'a, T: Real> Mat<'a, T> {
    /// Rows `rows` and columns `cols`, without a copy.
    pub(crate) fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "a part of a matrix"
        );
        let start = rows.start * self.row_stride + cols.start * self.col_stride;
        Self::strided(
            &self.data[start.min(self.data.len())..],
            [rows.len(), cols.len()],
            [self.row_stride, self.col_stride],
        )
    }

    /// The transpose, copied row-major to `memory`: right factors are read twice as fast with adjacent columns.
    pub(crate) fn turned<'b>(self, memory: &'b mut Vec<T>) -> Mat<'b, T> {
        let (rows, cols) = (self.rows, self.cols);
        memory.resize(rows * cols, T::zero());
        let (full_rows, full_cols) = if self.col_stride == 1 {
            (rows - rows % SIDE, cols - cols % SIDE)
        } else {
            (0, 0)
        };
        wide(
            #[inline(always)]
            || {
                for row in (0..full_rows).step_by(SIDE) {
                    for col in (0..full_cols).step_by(SIDE) {
                        let source = &self.data[row * self.row_stride + col..];
                        turn_tile(source, self.row_stride, &mut memory[col * rows + row..], rows);
                    }
                }
            },
        );
        for col in 0..cols {
            let done = if col < full_cols { full_rows } else { 0 };
            for row in done..rows {
                memory[col * rows + row] = self.data[row * self.row_stride + col * self.col_stride];
            }
        }
        Mat::packed(memory, cols, rows)
    }
}

/// Rows and columns of a tile that is turned in registers.
const SIDE: usize = 8;

/// Turns one tile; its rows are adjacent elements, `stride` apart.
#[inline(always)]
fn turn_tile<T: Real>(source: &[T], stride: usize, out: &mut [T], out_stride: usize) {
    let mut tile = [[T::zero(); SIDE]; SIDE];
    for (row, tile) in tile.iter_mut().enumerate() {
        tile.copy_from_slice(&source[row * stride..][..SIDE]);
    }
    let mut turned = [[T::zero(); SIDE]; SIDE];
    for row in 0..SIDE {
        for col in 0..SIDE {
            turned[col][row] = tile[row][col];
        }
    }
    for (col, turned) in turned.iter().enumerate() {
        out[col * out_stride..][..SIDE].copy_from_slice(turned);
    }
}

/// What happens to the destination of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// Overwrite.
    Set,
    /// Add to what is there.
    Add,
}

/// `dst (+)= a b` in one thread; rows of `dst` are `stride` apart, its columns are adjacent.
pub(crate) fn matmul<T: Real>(dst: &mut [T], stride: usize, a: Mat<T>, b: Mat<T>, into: Into) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner sizes of a product");
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        stride >= n && (m - 1) * stride + n <= dst.len(),
        "product leaves its destination"
    );
    // Safety: `Mat::strided` and the line above bound every index that the product reads or writes, the
    // destination is borrowed mutably, so that it overlaps neither factor, and T is one of f32 and f64.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A `[B, N, H, C]` tensor on the CPU: tokens of one head are the rows of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    data: &'a [T],
    channels: usize,
    strides: [usize; 4],
}

impl<'a, T: Real> View<'a, T> {
    /// Views a tensor of four dimensions whose storage is held in `guard`.
    pub(crate) fn of(tensor: &Tensor, guard: &'a StorageRef<'_>) -> Result<Self> {
        let (_, _, _, channels) = tensor.dims4()?;
        let strides = tensor.stride();
        Ok(Self {
            data: &slice(tensor, guard)?[tensor.layout().start_offset()..],
            channels,
            strides: [strides[0], strides[1], strides[2], strides[3]],
        })
    }

    pub(crate) fn channels(&self) -> usize {
        self.channels
    }

    /// Tokens `range` of one head as a matrix `[tokens, C]`.
    pub(crate) fn tokens(&self, batch: usize, range: &Range<usize>, head: usize) -> Mat<'a, T> {
        let [sb, sn, sh, sc] = self.strides;
        Mat::strided(
            &self.data[batch * sb + range.start * sn + head * sh..],
            [range.len(), self.channels],
            [sn, sc],
        )
    }

    /// Copies tokens `range` of one head to `out`, row-major.
    pub(crate) fn pack(&self, batch: usize, range: &Range<usize>, head: usize, out: &mut [T]) {
        let mat = self.tokens(batch, range, head);
        for (row, out) in out.chunks_exact_mut(self.channels).take(mat.rows).enumerate() {
            let source = &mat.data[row * mat.row_stride..];
            if mat.col_stride == 1 {
                out.copy_from_slice(&source[..self.channels]);
            } else {
                for (col, out) in out.iter_mut().enumerate() {
                    *out = source[col * mat.col_stride];
                }
            }
        }
    }
}

/// Distance between neighbouring rows of a layout `[.., D]`, if all are equal and nothing lies between the channels.
pub(crate) fn row_stride(layout: &Layout) -> Option<usize> {
    let (&width, leading) = layout.dims().split_last()?;
    let (&channel, strides) = layout.stride().split_last()?;
    if width > 1 && channel != 1 {
        return None;
    }
    let mut found: Option<(usize, usize)> = None;
    for (&length, &stride) in leading
        .iter()
        .zip(strides)
        .rev()
        .filter(|(length, _)| **length > 1)
    {
        found = match found {
            None => Some((stride, stride * length)),
            Some((first, next)) if next == stride => Some((first, stride * length)),
            Some(_) => return None,
        };
    }
    Some(found.map_or(width, |(first, _)| first))
}

/// The tensor itself where [`row_stride`] finds rows, else a dense copy.
pub(crate) fn in_rows(x: &Tensor) -> Result<Tensor> {
    match row_stride(x.layout()) {
        Some(_) => Ok(x.clone()),
        None => x.contiguous(),
    }
}

/// A `[.., D]` tensor on the CPU whose rows lie at equal distances.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    width: usize,
    stride: usize,
}

impl<'a, T: Real> Rows<'a, T> {
    /// Views a tensor whose storage is held in `guard`.
    pub(crate) fn of(tensor: &Tensor, guard: &'a StorageRef<'_>) -> Result<Self> {
        let (Some(stride), Some(&width)) = (row_stride(tensor.layout()), tensor.dims().last()) else {
            bail!(
                "expected rows at equal distances, found strides {:?}",
                tensor.stride()
            );
        };
        Ok(Self {
            data: &slice(tensor, guard)?[tensor.layout().start_offset()..],
            width,
            stride,
        })
    }

    /// The elements of one row.
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        &self.data[row * self.stride..][..self.width]
    }
}

/// The whole CPU storage of `tensor`; element 0 of the tensor lies at its layout's offset.
pub(crate) fn slice<'a, T: Real>(tensor: &Tensor, guard: &'a StorageRef<'_>) -> Result<&'a [T]> {
    match &**guard {
        Storage::Cpu(storage) => storage.as_slice::<T>(),
        _ => bail!(
            "expected a tensor on the cpu, found one on {:?}",
            tensor.device().location()
        ),
    }
}

/// The elements of a contiguous CPU tensor.
pub(crate) fn contiguous<'a, T: Real>(tensor: &Tensor, guard: &'a StorageRef<'_>) -> Result<&'a [T]> {
    let Some((start, end)) = tensor.layout().contiguous_offsets() else {
        bail!(
            "expected a contiguous tensor, found strides {:?}",
            tensor.stride()
        );
    };
    Ok(&slice(tensor, guard)?[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_at_equal_distances() -> Result<()> {
        let x = Tensor::zeros((3, 4, 10), candle_core::DType::F64, &candle_core::Device::Cpu)?;
        let stride = |t: Tensor| row_stride(t.layout());
        assert_eq!(stride(x.clone()), Some(10));
        assert_eq!(stride(x.narrow(2, 3, 5)?), Some(10));
        assert_eq!(stride(x.narrow(1, 0, 1)?), Some(40));
        assert_eq!(stride(x.narrow(1, 0, 2)?), None);
        assert_eq!(stride(x.narrow(0, 1, 1)?.narrow(1, 0, 2)?), Some(10));
        assert_eq!(stride(x.transpose(0, 1)?), None);
        assert_eq!(stride(x.transpose(1, 2)?), None);
        assert_eq!(stride(x.narrow(2, 0, 1)?.transpose(1, 2)?), None);
        assert_eq!(stride(x.narrow(0, 0, 1)?.narrow(1, 0, 1)?), Some(10));
        Ok(())
    }

    #[test]
    fn parts_and_turned_copies() {
        let data: Vec<f64> = (0..30 * 40).map(f64::from).collect();
        for (rows, cols) in [(1, 1), (8, 8), (9, 17), (16, 7), (30, 40)] {
            for transposed in [false, true] {
                let mat = if transposed {
                    Mat::strided(&data, [rows, cols], [1, 30])
                } else {
                    Mat::strided(&data, [rows, cols], [40, 1])
                };
                let at = |row: usize, col: usize| data[row * mat.row_stride + col * mat.col_stride];
                let mut memory = vec![f64::NAN; 3];
                mat.turned(&mut memory);
                for (i, &value) in memory.iter().enumerate() {
                    assert_eq!(value, at(i % rows, i / rows));
                }
                let part = mat.part(rows / 2..rows, cols / 3..cols).turned(&mut memory);
                assert_eq!((part.rows, part.cols), (cols - cols / 3, rows - rows / 2));
                assert_eq!(part.data[0], at(rows / 2, cols / 3));
            }
        }
    }
}
