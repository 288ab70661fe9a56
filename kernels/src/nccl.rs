//! NCCL: operations between GPUs, on a stream of their own.
//!
//! The library is loaded when it is first needed, so that a program with it starts without it. Only the few functions that are
//! needed are declared, as `nccl.h` of version 2 has them.
//!
//! An operation reads a copy of what it is given and writes memory of its own; an event tells when it is over. What goes before it
//! on the stream of the device is finished first, and the device waits for the event before it reads the result.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::{Arc, OnceLock};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{DType, Device, Result, Tensor, bail};
use libloading::Library;

use crate::gpu::Locked;

const OP: &str = "nccl";
/// Names under which the library is looked for.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Bytes of an id.
pub const ID_BYTES: usize = 128;

/// Tells the ranks of one communicator from all others; the first makes it and hands it to them.
pub type Id = [u8; ID_BYTES];

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; ID_BYTES]);

/// A communicator of the library.
type Handle = *mut c_void;
type Stream = *mut c_void;
type Status = c_int;
type Reduction =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status;

/// `ncclSuccess` and `ncclInProgress`.
const SUCCESS: Status = 0;
const IN_PROGRESS: Status = 7;

/// What is used of the library.
struct Functions {
    version: unsafe extern "C" fn(*mut c_int) -> Status,
    error: unsafe extern "C" fn(Status) -> *const c_char,
    new_id: unsafe extern "C" fn(*mut UniqueId) -> Status,
    join: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int) -> Status,
    abort: unsafe extern "C" fn(Handle) -> Status,
    failed: unsafe extern "C" fn(Handle, *mut Status) -> Status,
    all_reduce: Reduction,
    reduce_scatter: Reduction,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> Status,
    broadcast:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> Status,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> Status,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> Status,
    /// Last: what is above lies in it.
    _library: Library,
}

/// The library, loaded once.
fn functions() -> Result<&'static Functions> {
    static LOADED: OnceLock<std::result::Result<Functions, String>> = OnceLock::new();
    match LOADED.get_or_init(load) {
        Ok(functions) => Ok(functions),
        Err(reason) => bail!("{reason}"),
    }
}

fn load() -> std::result::Result<Functions, String> {
    let mut reasons = Vec::new();
    for name in NAMES {
        // SAFETY: what the library does when it is loaded is its own affair, as with any that a program is linked to.
        match unsafe { Library::new(name) } {
            Ok(library) => return bind(library).map_err(|error| format!("{name}: {error}")),
            Err(error) => reasons.push(error.to_string().replace('\n', " ")),
        }
    }
    Err(format!("NCCL cannot be loaded: {}", reasons[0]))
}

fn bind(library: Library) -> std::result::Result<Functions, libloading::Error> {
    macro_rules! function {
        ($name:literal) => {
            // SAFETY: the type is that of the declaration in nccl.h.
            *unsafe { library.get($name) }?
        };
    }
    Ok(Functions {
        version: function!("ncclGetVersion"),
        error: function!("ncclGetErrorString"),
        new_id: function!("ncclGetUniqueId"),
        join: function!("ncclCommInitRank"),
        abort: function!("ncclCommAbort"),
        failed: function!("ncclCommGetAsyncError"),
        all_reduce: function!("ncclAllReduce"),
        reduce_scatter: function!("ncclReduceScatter"),
        all_gather: function!("ncclAllGather"),
        broadcast: function!("ncclBroadcast"),
        send: function!("ncclSend"),
        receive: function!("ncclRecv"),
        _library: library,
    })
}

impl Functions {
    fn check(&self, what: &str, status: Status) -> Result<()> {
        if status == SUCCESS || status == IN_PROGRESS {
            return Ok(());
        }
        bail!("{what}: {}", self.words(status))
    }

    fn words(&self, status: Status) -> String {
        // SAFETY: the library gives a text that it never frees, or null.
        let text = unsafe {
            let text = (self.error)(status);
            (!text.is_null()).then(|| CStr::from_ptr(text))
        };
        text.map_or_else(
            || format!("error {status}"),
            |text| text.to_string_lossy().into_owned(),
        )
    }
}

/// Version of the library: major, minor, patch.
///
/// # Errors
/// It cannot be loaded.
pub fn version() -> Result<(i32, i32, i32)> {
    let functions = functions()?;
    let mut packed = 0;
    // SAFETY: a place for one number.
    functions.check("ncclGetVersion", unsafe { (functions.version)(&raw mut packed) })?;
    // From 2.9 on two digits are for each of minor and patch.
    let step = if packed < 10_000 { 1000 } else { 10_000 };
    Ok((packed / step, packed % step / 100, packed % 100))
}

/// A new id.
///
/// # Errors
/// The library cannot be loaded, or finds no network.
pub fn new_id() -> Result<Id> {
    let functions = functions()?;
    let mut id = UniqueId([0; ID_BYTES]);
    // SAFETY: a place for one id.
    functions.check("ncclGetUniqueId", unsafe { (functions.new_id)(&raw mut id) })?;
    Ok(id.0.map(|byte| byte as u8))
}

/// What a reduction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Adds.
    Sum,
    /// Takes the largest.
    Max,
}

impl Reduce {
    fn code(self) -> c_int {
        match self {
            Self::Sum => 0,
            Self::Max => 2,
        }
    }
}

/// One rank of a communicator, and its stream.
pub struct Comm {
    handle: Handle,
    functions: &'static Functions,
    device: Device,
    stream: Arc<CudaStream>,
    size: usize,
}

impl std::fmt::Debug for Comm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Comm({} ranks)", self.size)
    }
}

// SAFETY: the handle belongs to no thread.
unsafe impl Send for Comm {}
// SAFETY: the library allows several threads to call with one communicator, as long as calls do not overlap: `Group` of the
// program calls from one thread at a time, and the watch for failures is allowed beside.
unsafe impl Sync for Comm {}

impl Drop for Comm {
    fn drop(&mut self) {
        // Ordinary ends have waited for all operations; after a failure nothing more is to be had.
        // SAFETY: nobody uses the handle afterwards.
        unsafe { (self.functions.abort)(self.handle) };
    }
}

impl Comm {
    /// Joins the other ranks that have this `id`; waits for them.
    ///
    /// # Errors
    /// `device` is no GPU, the library cannot be loaded, or ranks do not meet: two have the same GPU, or there is no way between
    /// them.
    pub fn join(device: &Device, id: &Id, rank: usize, size: usize) -> Result<Self> {
        let functions = functions()?;
        let context = device.as_cuda_device()?.cuda_stream().context().clone();
        context.bind_to_thread().w()?;
        let mut handle = std::ptr::null_mut();
        let id = UniqueId(id.map(|byte| byte as c_char));
        // SAFETY: a place for one handle; the context of the device is that of this thread.
        let status = unsafe { (functions.join)(&raw mut handle, size as c_int, id, rank as c_int) };
        functions.check("ncclCommInitRank", status)?;
        Ok(Self {
            handle,
            functions,
            device: device.clone(),
            stream: context.new_stream().w()?,
            size,
        })
    }

    /// Starts the reduction over all ranks.
    ///
    /// # Errors
    /// A type that the library does not know here, or it refuses.
    pub fn all_reduce(&self, tensor: &Tensor, reduce: Reduce) -> Result<Running> {
        let out = tensor.zeros_like()?;
        self.run("ncclAllReduce", tensor, out, |input, output, code| {
            // SAFETY: both have as many elements of this type, and live until the event.
            unsafe {
                (self.functions.all_reduce)(
                    input,
                    output,
                    tensor.elem_count(),
                    code,
                    reduce.code(),
                    self.handle,
                    self.stream.cu_stream().cast(),
                )
            }
        })
    }

    /// Starts to gather the tensors of all ranks, `[size, ..]`.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Running> {
        let shape = [&[self.size], tensor.dims()].concat();
        let out = Tensor::zeros(shape, tensor.dtype(), &self.device)?;
        self.run("ncclAllGather", tensor, out, |input, output, code| {
            // SAFETY: the output has room for all ranks.
            unsafe {
                (self.functions.all_gather)(
                    input,
                    output,
                    tensor.elem_count(),
                    code,
                    self.handle,
                    self.stream.cu_stream().cast(),
                )
            }
        })
    }

    /// Starts the sum of rows `[size, ..]` over all ranks, of which each gets its own.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn reduce_scatter(&self, rows: &Tensor) -> Result<Running> {
        let out = Tensor::zeros(&rows.dims()[1..], rows.dtype(), &self.device)?;
        let count = out.elem_count();
        self.run("ncclReduceScatter", rows, out, |input, output, code| {
            // SAFETY: the input has a row for each rank, the output one.
            unsafe {
                (self.functions.reduce_scatter)(
                    input,
                    output,
                    count,
                    code,
                    Reduce::Sum.code(),
                    self.handle,
                    self.stream.cu_stream().cast(),
                )
            }
        })
    }

    /// Starts to hand the tensor of rank `root` to all.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn broadcast(&self, root: usize, tensor: &Tensor) -> Result<Running> {
        let out = tensor.zeros_like()?;
        self.run("ncclBroadcast", tensor, out, |input, output, code| {
            // SAFETY: as in `all_reduce`.
            unsafe {
                (self.functions.broadcast)(
                    input,
                    output,
                    tensor.elem_count(),
                    code,
                    root as c_int,
                    self.handle,
                    self.stream.cu_stream().cast(),
                )
            }
        })
    }

    /// Starts to send a tensor to another rank.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn send(&self, to: usize, tensor: &Tensor) -> Result<Running> {
        let nothing = Tensor::zeros(1, tensor.dtype(), &self.device)?;
        self.run("ncclSend", tensor, nothing, |input, _, code| {
            // SAFETY: the input has as many elements.
            unsafe {
                let stream = self.stream.cu_stream().cast();
                (self.functions.send)(input, tensor.elem_count(), code, to as c_int, self.handle, stream)
            }
        })
    }

    /// Starts to receive a tensor like `like` from another rank.
    ///
    /// # Errors
    /// As [`Self::all_reduce`].
    pub fn receive(&self, from: usize, like: &Tensor) -> Result<Running> {
        let (out, nothing) = (like.zeros_like()?, Tensor::zeros(1, like.dtype(), &self.device)?);
        self.run("ncclRecv", &nothing, out, |_, output, code| {
            // SAFETY: the output has room for as many elements.
            unsafe {
                let stream = self.stream.cu_stream().cast();
                (self.functions.receive)(
                    output,
                    like.elem_count(),
                    code,
                    from as c_int,
                    self.handle,
                    stream,
                )
            }
        })
    }

    /// What has failed behind the calls so far, if anything has.
    pub fn failure(&self) -> Option<String> {
        let mut status = SUCCESS;
        // SAFETY: a place for one status.
        let asked = unsafe { (self.functions.failed)(self.handle, &raw mut status) };
        let bad = [asked, status]
            .into_iter()
            .find(|&status| status != SUCCESS && status != IN_PROGRESS);
        bad.map(|status| self.functions.words(status))
    }

    /// Has `launch` done on the stream behind what the device has been given so far, with addresses and the code of the type.
    fn run(
        &self,
        what: &str,
        input: &Tensor,
        output: Tensor,
        launch: impl FnOnce(*const c_void, *mut c_void, c_int) -> Status,
    ) -> Result<Running> {
        let code = match input.dtype() {
            DType::U8 => 1,
            DType::U32 => 3,
            DType::I64 => 4,
            DType::F32 => 7,
            DType::BF16 => 9,
            other => bail!("{what}: found {other:?}, expected F32, BF16, U8, U32 or I64"),
        };
        // A copy, so that the original may change meanwhile.
        let input = input.detach().force_contiguous()?;
        let main = self.device.as_cuda_device()?.cuda_stream();
        self.stream.wait(&main.record_event(None).w()?).w()?;
        let from = Locked::new(OP, &input).address()?.0;
        let to = Locked::new(OP, &output).address()?.0;
        self.functions
            .check(what, launch(from as *const c_void, to as *mut c_void, code))?;
        Ok(Running {
            over: self.stream.record_event(None).w()?,
            main,
            input: Some(input),
            output,
        })
    }
}

/// An operation that was started.
pub struct Running {
    over: CudaEvent,
    /// The stream of the device.
    main: Arc<CudaStream>,
    /// Lives until it is over.
    input: Option<Tensor>,
    output: Tensor,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Running({:?})", self.output.dims())
    }
}

impl Running {
    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.over.is_complete()
    }

    /// The result, which the device reads once the operation is over; call it then.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn result(mut self) -> Result<Tensor> {
        self.main.wait(&self.over).w()?;
        self.input = None;
        Ok(self.output.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Memory that is still read or written must not be given to others; to wait could be for ever, where a rank has ended.
        if !self.over.is_complete()
            && let Some(input) = self.input.take()
        {
            std::mem::forget((input, self.output.clone()));
        }
    }
}
