//! Our CUDA kernels as they reach the device: compiled code in the program, loaded once for each device, launched by name.
//!
//! Each file of `kernels/cuda` is there twice: as machine code for compute capability 9.0, and as PTX for 8.0, which the
//! driver compiles for whatever else it finds. `FULGUR_KERNELS=sm80` asks for the latter everywhere.

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum as Attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaView, DeviceRepr, LaunchConfig, ValidAsZeroBits,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, Result, bail};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Contiguous operand of a kernel.
pub(crate) type View<'a, T> = CudaView<'a, T>;
/// Result of a kernel.
pub(crate) type Slice<T> = CudaSlice<T>;

/// Threads of a block in all our kernels.
pub(crate) const THREADS: u32 = 256;

/// Compute capability of [`Module::machine_code`].
const NATIVE: (i32, i32) = (9, 0);

/// Names what the program loads: unset for the best there is, `sm80` for PTX.
const CHOICE: &str = "FULGUR_KERNELS";

/// One file of `kernels/cuda`.
#[derive(Clone, Copy)]
pub(crate) struct Module {
    /// The file's name.
    pub(crate) name: &'static str,
    /// What nvcc made of it for compute capability 8.0.
    pub(crate) ptx: &'static str,
    /// What ptxas made of that for 9.0.
    pub(crate) machine_code: &'static [u8],
}

/// The module compiled from `kernels/cuda/NAME.cu`.
macro_rules! module {
    ($name:literal) => {
        $crate::cuda_module::Module {
            name: $name,
            ptx: include_str!(concat!(env!("OUT_DIR"), "/", $name, ".ptx")),
            machine_code: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".cubin")),
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
        let name = $name;
        let name: &str = name.as_ref();
        let config: candle_core::cuda_backend::cudarc::driver::LaunchConfig = $config;
        let function = $module.function($device, name, config.shared_mem_bytes)?;
        let stream = $device.cuda_stream();
        let mut builder = stream.launch_builder(&function);
        $(
            let argument = $argument;
            builder.arg(&argument);
        )+
        $crate::probe::begin($device, name)?;
        // SAFETY: each call site passes the arguments of the kernel's signature, with the lengths that it indexes.
        unsafe { builder.launch(config) }.w()?;
        $crate::probe::end($device)?;
    }};
}
pub(crate) use launch;

/// Bytes of shared memory that every kernel may use without asking.
const SHARED_BYTES: u32 = 48 * 1024;

/// A module on a device, and its kernels that were launched so far.
struct Loaded {
    module: Arc<CudaModule>,
    functions: HashMap<String, Allowed>,
}

/// A kernel and the shared memory that it was allowed.
struct Allowed {
    function: CudaFunction,
    shared_bytes: u32,
}

static LOADED: Mutex<Option<HashMap<(DeviceId, &'static str), Loaded>>> = Mutex::new(None);

impl Module {
    /// Its kernel `name`, which may use `shared_bytes` of shared memory.
    pub(crate) fn function(self, device: &CudaDevice, name: &str, shared_bytes: u32) -> Result<CudaFunction> {
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let loaded = loaded.get_or_insert_default();
        let Loaded { module, functions } = match loaded.entry((device.id(), self.name)) {
            Entry::Occupied(loaded) => loaded.into_mut(),
            Entry::Vacant(place) => place.insert(Loaded {
                module: self.load(device)?,
                functions: HashMap::new(),
            }),
        };
        if !functions.contains_key(name) {
            let function = module.load_function(name).w()?;
            functions.insert(
                name.to_owned(),
                Allowed {
                    function,
                    shared_bytes: SHARED_BYTES,
                },
            );
        }
        let Some(kernel) = functions.get_mut(name) else {
            bail!("kernel {name}: lost after loading")
        };
        if shared_bytes > kernel.shared_bytes {
            let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            kernel.function.set_attribute(most, shared_bytes as i32).w()?;
            kernel.shared_bytes = shared_bytes;
        }
        Ok(kernel.function.clone())
    }

    fn load(self, device: &CudaDevice) -> Result<Arc<CudaModule>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        let native = !plain_kernels()? && context.compute_capability().w()? == NATIVE;
        let code = if native {
            Ptx::from_binary(self.machine_code.to_vec())
        } else {
            Ptx::from_src(self.ptx)
        };
        context.load_module(code).w()
    }
}

/// Whether the user asked for the kernels that run on every device.
fn plain_kernels() -> Result<bool> {
    static PLAIN: OnceLock<std::result::Result<bool, String>> = OnceLock::new();
    let plain = PLAIN.get_or_init(|| match std::env::var_os(CHOICE) {
        None => Ok(false),
        Some(choice) if choice == "sm80" => Ok(true),
        Some(choice) => Err(format!("{CHOICE}: found {choice:?}, expected nothing or sm80")),
    });
    plain.clone().map_err(candle_core::Error::msg)
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
pub(crate) fn aligned<T>(device: &CudaDevice, views: &[&View<'_, T>]) -> bool {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let stream = device.cuda_stream();
    views
        .iter()
        .all(|view| view.device_ptr(&stream).0 % (4 * size_of::<T>() as u64) == 0)
}

/// Address of a view for an argument that may be null.
pub(crate) fn pointer<T>(device: &CudaDevice, view: Option<&View<'_, T>>) -> u64 {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let stream = device.cuda_stream();
    view.map_or(0, |view| view.device_ptr(&stream).0)
}

/// Room for `count` elements that a kernel writes before anything reads them.
pub(crate) fn room<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<Slice<T>> {
    if let Some(room) = crate::probe::poisoned_room(device, count)? {
        return Ok(room);
    }
    // SAFETY: every kernel writes all elements of its results.
    unsafe { device.alloc::<T>(count) }
}

/// Zeros for kernels that write some elements only.
pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(device: &CudaDevice, count: usize) -> Result<Slice<T>> {
    use candle_core::cuda_backend::cudarc::driver::DevicePtr;
    let zeros = device.alloc_zeros::<T>(count)?;
    crate::probe::unguarded(zeros.device_ptr(&device.cuda_stream()).0);
    Ok(zeros)
}
