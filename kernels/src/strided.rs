//! Strided CPU matrices, their product, and `[B, N, H, C]` views of tensors.

use crate::scalar::Real;
use candle_core::{Result, Storage, StorageRef, Tensor, bail};
use std::ops::Range;

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
