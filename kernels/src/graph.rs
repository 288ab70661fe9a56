//! Work on a GPU that is recorded once and launched again as a whole: a CUDA graph.
//!
//! A launch costs the host some microseconds, and so a step of many small kernels is bound by the host. A graph costs one launch.
//! It repeats the very same kernels on the same addresses: what changes from one time to the next has to lie in memory of the
//! device that the work reads.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::cublas::sys as cublas;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, result, sys};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use crate::gpu::Locked;

const OP: &str = "graph";
/// The variable of the environment that decides: `0` where nothing is to be recorded.
pub const CHOICE: &str = "FULGUR_GRAPHS";
/// Times that work runs before it is recorded: the first loads kernels, the second finds all of them.
const WARM: usize = 2;
/// Bytes of memory for cuBLAS to work in, as many as it takes itself on the largest GPUs. Its own it may take anew while work is
/// recorded, which that forbids.
const WORKSPACE: usize = 32 << 20;

/// Whether the user lets work be recorded: so it is without [`CHOICE`].
///
/// # Errors
/// It is neither 0 nor 1.
pub fn is_allowed() -> Result<bool> {
    match std::env::var_os(CHOICE) {
        None => Ok(true),
        Some(choice) if choice == "1" => Ok(true),
        Some(choice) if choice == "0" => Ok(false),
        Some(choice) => bail!("{CHOICE}: found {choice:?}, expected 0 or 1"),
    }
}

/// Recorded work.
#[derive(Debug)]
pub struct Graph(Recorded);

struct Recorded(CudaGraph);

impl std::fmt::Debug for Recorded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CudaGraph")
    }
}

// SAFETY: the handles belong to no thread, and launches, which may not be concurrent, borrow the graph mutably.
unsafe impl Send for Recorded {}
// SAFETY: as above; nothing can be done through a shared reference.
unsafe impl Sync for Recorded {}

impl Graph {
    /// Runs `work` on the stream of `device` some times as it is, then records it once more without running it.
    ///
    /// All that it reads and writes beside what it makes and drops itself has to live as long as the graph, and each run has to
    /// launch the same. It may neither wait for the device nor take in new values of the host: numbers that it copies from there
    /// stay what they were.
    ///
    /// # Errors
    /// Those of `work`, or the driver cannot record it; the device goes on as before.
    pub fn record(device: &Device, mut work: impl FnMut() -> Result<()>) -> Result<Self> {
        let cuda = device.as_cuda_device()?;
        let stream = cuda.cuda_stream();
        lend_workspace(cuda)?;
        // Shapes and constants that kernels read go to the device in the runs before, and stay there.
        let _constants = cuda.enable_cuda_graph_htod_cache();
        for _ in 0..WARM {
            work()?;
        }
        device.synchronize()?;
        // Other threads are not looked at, nor calls that do not belong to the stream.
        stream
            .begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
            .w()?;
        let made = work().and_then(|()| stream.context().check_err().w());
        if made.is_err() {
            // What was dropped since the driver gave up has left errors of its own, which would be told instead of ending this.
            while stream.context().check_err().is_err() {}
        }
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let ended = stream.end_capture(flags);
        let graph = match (made, ended) {
            (Ok(()), Ok(Some(graph))) => graph,
            (made, ended) => {
                made?;
                ended.w()?;
                bail!("{OP}: nothing was recorded")
            }
        };
        graph.upload().w()?;
        Ok(Self(Recorded(graph)))
    }

    /// Queues the work once more.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn launch(&mut self) -> Result<()> {
        self.0.0.launch().w()
    }
}

/// Gives cuBLAS memory on `device` that stays, once.
fn lend_workspace(device: &CudaDevice) -> Result<()> {
    static LENT: Mutex<Option<HashSet<DeviceId>>> = Mutex::new(None);
    let mut lent = LENT.lock().unwrap_or_else(PoisonError::into_inner);
    let lent = lent.get_or_insert_default();
    if lent.contains(&device.id()) {
        return Ok(());
    }
    // SAFETY: cuBLAS writes it before it reads it.
    let workspace = unsafe { device.alloc::<u8>(WORKSPACE) }?;
    let address = workspace.leak();
    let blas = device.cublas_handle();
    // SAFETY: the memory is as long as that, aligned as the driver aligns all of it, and nobody frees it.
    let status = unsafe { cublas::cublasSetWorkspace_v2(*blas.handle(), address as *mut _, WORKSPACE) };
    if status != cublas::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        bail!("{OP}: cublasSetWorkspace: {status:?}");
    }
    lent.insert(device.id());
    Ok(())
}

/// Writes `values` over the beginning of `to`, contiguous and of type u32, behind all that was queued before.
///
/// # Errors
/// `to` is another tensor, or the driver refuses.
pub fn write(to: &Tensor, values: &[u32]) -> Result<()> {
    if to.dtype() != DType::U32 || to.elem_count() < values.len() {
        bail!(
            "{OP}: {} numbers into {:?} {:?}",
            values.len(),
            to.dtype(),
            to.dims()
        );
    }
    let stream = to.device().as_cuda_device()?.cuda_stream();
    let address = Locked::new(OP, to).address()?.0;
    stream.context().bind_to_thread().w()?;
    // SAFETY: the tensor is as long as that; ordinary memory of the host has been read when the call returns.
    unsafe { result::memcpy_htod_async(address, values, stream.cu_stream()) }.w()
}

/// Writes `from` over `to`, both contiguous and alike; nothing where they are the same memory.
///
/// # Errors
/// They are not alike, or the driver refuses.
pub fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
    if from.dims() != to.dims() || from.dtype() != to.dtype() {
        bail!(
            "{OP}: {:?} {:?} into {:?} {:?}",
            from.dtype(),
            from.dims(),
            to.dtype(),
            to.dims()
        );
    }
    let stream = to.device().as_cuda_device()?.cuda_stream();
    let bytes = to.elem_count() * to.dtype().size_in_bytes();
    let source = Locked::new(OP, from).address()?.0;
    let target = Locked::new(OP, to).address()?.0;
    if source == target || bytes == 0 {
        return Ok(());
    }
    stream.context().bind_to_thread().w()?;
    // SAFETY: both tensors are as long as that, and are two.
    unsafe { result::memcpy_dtod_async(target, source, bytes, stream.cu_stream()) }.w()
}
