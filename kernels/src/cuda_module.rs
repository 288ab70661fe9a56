//! Our CUDA kernels as they reach the device: PTX in the program, loaded once for each device, launched by name.

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DeviceRepr, LaunchConfig, ValidAsZeroBits,
};

/// Contiguous operand of a kernel.
pub(crate) type View<'a, T> = CudaView<'a, T>;
/// Result of a kernel.
pub(crate) type Slice<T> = CudaSlice<T>;

/// Threads of a block in all our kernels.
pub(crate) const THREADS: u32 = 256;

/// One file of `kernels/cuda`.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// Name under which the device keeps it.
    pub(crate) name: &'static str,
    /// What nvcc made of it.
    pub(crate) ptx: &'static str,
}

/// The module compiled from `kernels/cuda/NAME.cu`.
macro_rules! module {
    ($name:literal) => {
        $crate::cuda_module::Module {
            name: concat!("fulgur_", $name),
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
        }
    };
}
pub(crate) use module;

/// Launches a kernel: `launch!(device, MODULE, "name", config; arguments)`. Views of slices stand for pointers.
///
/// The caller vouches that arguments have the kernel's types and that its accesses stay inside of the slices.
macro_rules! launch {
    ($device:expr, $module:expr, $name:expr, $config:expr; $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::{WrapErr, cudarc::driver::PushKernelArg};
        let name: String = $name.into();
        let config: candle_core::cuda_backend::cudarc::driver::LaunchConfig = $config;
        let function = $device.get_or_load_custom_func(&name, $module.name, $module.ptx)?;
        $crate::cuda_module::allow_shared(&function, config.shared_mem_bytes)?;
        let mut builder = function.builder();
        $(
            let argument = $argument;
            builder.arg(&argument);
        )+
        $crate::probe::begin($device, &name)?;
        // SAFETY: each call site passes the arguments of the kernel's signature, with the lengths that it indexes.
        unsafe { builder.launch(config) }.w()?;
        $crate::probe::end($device)?;
    }};
}
pub(crate) use launch;

/// Bytes of shared memory that every kernel may use without asking.
const SHARED_BYTES: u32 = 48 * 1024;

/// Lets a kernel use more shared memory than the default.
pub(crate) fn allow_shared(
    function: &candle_core::cuda_backend::cudarc::driver::CudaFunction,
    bytes: u32,
) -> candle_core::Result<()> {
    use candle_core::cuda_backend::{WrapErr, cudarc::driver::sys::CUfunction_attribute_enum as Attribute};
    if bytes > SHARED_BYTES {
        function
            .set_attribute(
                Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes as i32,
            )
            .w()?;
    }
    Ok(())
}

/// One thread for each of `count` elements.
pub(crate) fn flat(count: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (count.div_ceil(THREADS as usize) as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: 0,
    }
}

/// Blocks of several rows: threads along `columns` (at most [`THREADS`] of them, then they loop), the rest over rows.
pub(crate) fn by_rows(rows: usize, columns: usize) -> LaunchConfig {
    let across = (columns.max(1) as u32).next_power_of_two().clamp(32, THREADS);
    let down = THREADS / across;
    LaunchConfig {
        grid_dim: (rows.div_ceil(down as usize) as u32, 1, 1),
        block_dim: (across, down, 1),
        shared_mem_bytes: 0,
    }
}

/// Elements that a thread can move at once: 4 where all `lengths` and the operands' addresses allow it, else 1.
pub(crate) fn vector(lengths: &[usize], aligned: bool) -> usize {
    if aligned && lengths.iter().all(|length| length % 4 == 0) {
        4
    } else {
        1
    }
}

/// Whether a vector of four elements may be read at the start of each view.
pub(crate) fn aligned<T>(device: &candle_core::CudaDevice, views: &[&View<'_, T>]) -> bool {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let stream = device.cuda_stream();
    views
        .iter()
        .all(|view| view.device_ptr(&stream).0 % (4 * size_of::<T>() as u64) == 0)
}

/// Address of a view for an argument that may be null.
pub(crate) fn pointer<T>(device: &candle_core::CudaDevice, view: Option<&View<'_, T>>) -> u64 {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let stream = device.cuda_stream();
    view.map_or(0, |view| view.device_ptr(&stream).0)
}

/// Room for `count` elements that a kernel writes before anything reads them.
pub(crate) fn room<T: DeviceRepr>(
    device: &candle_core::CudaDevice,
    count: usize,
) -> candle_core::Result<Slice<T>> {
    if let Some(room) = crate::probe::poisoned_room(device, count)? {
        return Ok(room);
    }
    // SAFETY: every kernel writes all elements of its results.
    unsafe { device.alloc::<T>(count) }
}

/// Zeros for kernels that write some elements only.
pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
    device: &candle_core::CudaDevice,
    count: usize,
) -> candle_core::Result<Slice<T>> {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let zeros = device.alloc_zeros::<T>(count)?;
    crate::probe::unguarded(zeros.device_ptr(&device.cuda_stream()).0);
    Ok(zeros)
}
