//! Products of row-major matrices in device memory by cuBLAS: into any place, with gaps between rows, and with an f32
//! result of bf16 factors too.

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::{WrapErr, gemm_reduced_precision_f32};
use candle_core::{CudaDevice, DType, Result, bail};

/// A row-major matrix as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    /// Where its first element lies.
    address: u64,
    /// f32 or bf16.
    dtype: DType,
    /// Rows and columns.
    shape: [usize; 2],
    /// Elements from one row to the next.
    stride: usize,
    /// Whether a product takes its transpose.
    turned: bool,
}

impl Matrix {
    /// The matrix at `address`, without gaps.
    pub(crate) fn new(address: u64, dtype: DType, shape: [usize; 2]) -> Self {
        Self {
            address,
            dtype,
            shape,
            stride: shape[1],
            turned: false,
        }
    }

    /// The same with rows `stride` elements apart.
    pub(crate) fn spread(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// Rows `first` and the `count - 1` after it.
    pub(crate) fn rows(self, first: usize, count: usize) -> Self {
        Self {
            address: self.address + (first * self.stride * self.dtype.size_in_bytes()) as u64,
            shape: [count, self.shape[1]],
            ..self
        }
    }

    /// The transpose, as a factor.
    pub(crate) fn t(self) -> Self {
        Self {
            turned: !self.turned,
            ..self
        }
    }

    /// Rows and columns as a factor.
    fn sides(&self) -> [usize; 2] {
        let [rows, columns] = self.shape;
        if self.turned {
            [columns, rows]
        } else {
            [rows, columns]
        }
    }

    /// The row-major matrix is the transpose to cuBLAS, which counts by columns.
    fn operation(&self) -> sys::cublasOperation_t {
        if self.turned {
            sys::cublasOperation_t::CUBLAS_OP_T
        } else {
            sys::cublasOperation_t::CUBLAS_OP_N
        }
    }

    fn kind(&self) -> Result<sys::cudaDataType> {
        match self.dtype {
            DType::F32 => Ok(sys::cudaDataType_t::CUDA_R_32F),
            DType::BF16 => Ok(sys::cudaDataType_t::CUDA_R_16BF),
            found => bail!("product: {found:?} on CUDA, supported: f32, bf16"),
        }
    }
}

/// `c = a b`, or `c += a b` if it `adds`; sums in f32. `a` and `b` are of one type.
///
/// The order on the stream of `device` is that of the calls. The caller vouches that the matrices lie in memory that is
/// its own, and that `c` overlaps neither factor.
pub(crate) fn product(device: &CudaDevice, a: Matrix, b: Matrix, c: Matrix, adds: bool) -> Result<()> {
    let ([m, k], [inner, n]) = (a.sides(), b.sides());
    if k != inner || c.shape != [m, n] || c.turned || a.dtype != b.dtype {
        bail!("product: {m} x {k} by {inner} x {n} into {:?}", c.shape);
    }
    let compute = if a.dtype == DType::F32 && gemm_reduced_precision_f32() {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32
    } else {
        sys::cublasComputeType_t::CUBLAS_COMPUTE_32F
    };
    let (one, beta) = (1f32, if adds { 1f32 } else { 0f32 });
    let blas = device.cublas_handle();
    device.cuda_stream().context().bind_to_thread().w()?;
    // SAFETY: the sizes fit to one another as checked above, the caller vouches for the memory, and the factors are
    // read from the host before the call returns.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            b.operation(),
            a.operation(),
            n as i32,
            m as i32,
            k as i32,
            (&raw const one).cast(),
            b.address as *const _,
            b.kind()?,
            b.stride as i32,
            a.address as *const _,
            a.kind()?,
            a.stride as i32,
            (&raw const beta).cast(),
            c.address as *mut _,
            c.kind()?,
            c.stride as i32,
            compute,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()
}
