//! What tests and benchmarks ask of our launches on a GPU: times of single kernels, and memory that betrays careless kernels.
//!
//! Both are off unless asked for, and cost a comparison then.

use crate::cuda_module::Slice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, DevicePtr, DeviceRepr, result, sys};
use candle_core::{CudaDevice, Result};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

thread_local! {
    static LAUNCHES: RefCell<Option<Vec<Launch>>> = const { RefCell::new(None) };
}

/// A kernel on its way, between two events.
pub(crate) struct Launch {
    name: String,
    begin: CudaEvent,
    end: Option<CudaEvent>,
}

/// Runs `work` and returns the milliseconds of each launch of our kernels on this thread, in order. Products of cuBLAS and
/// candle's own kernels are not among them.
///
/// # Errors
/// Those of `work` and of the driver.
pub fn time_launches<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<(String, f64)>)> {
    LAUNCHES.set(Some(Vec::new()));
    let done = work();
    let launches = LAUNCHES.take().unwrap_or_default();
    let done = done?;
    let mut times = Vec::with_capacity(launches.len());
    for Launch { name, begin, end } in launches {
        let Some(end) = end else { continue };
        times.push((name, f64::from(begin.elapsed_ms(&end).w()?)));
    }
    Ok((done, times))
}

fn event(device: &CudaDevice) -> Result<CudaEvent> {
    let timing = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
    device.cuda_stream().record_event(timing).w()
}

/// Before a launch.
pub(crate) fn begin(device: &CudaDevice, name: &str) -> Result<()> {
    LAUNCHES.with_borrow_mut(|launches| {
        if let Some(launches) = launches {
            launches.push(Launch {
                name: name.to_owned(),
                begin: event(device)?,
                end: None,
            });
        }
        Ok(())
    })
}

/// After it.
pub(crate) fn end(device: &CudaDevice) -> Result<()> {
    LAUNCHES.with_borrow_mut(|launches| {
        if let Some(launch) = launches.as_mut().and_then(|launches| launches.last_mut()) {
            launch.end = Some(event(device)?);
        }
        Ok(())
    })
}

/// Bytes behind each result that nothing may write.
const GUARD: usize = 256;
/// Of poisoned memory: a NaN in every type of floats.
const POISON: u8 = 0xff;

static POISONED: AtomicBool = AtomicBool::new(false);
static TRESPASSES: AtomicUsize = AtomicUsize::new(0);
/// Where guards begin, by the address of their memory.
static GUARDS: Mutex<Option<HashMap<u64, u64>>> = Mutex::new(None);

/// Whether, from now on, memory for results is full of NaN before kernels write it, and has guard bytes behind it, which are
/// looked at when a result becomes a tensor. For tests: every result then waits for the GPU.
pub fn poison(poisoned: bool) {
    POISONED.store(poisoned, Ordering::Relaxed);
}

/// Results so far behind which something was written.
pub fn trespasses() -> usize {
    TRESPASSES.load(Ordering::Relaxed)
}

/// Poisoned room for `count` elements, or none where nothing was asked for.
pub(crate) fn poisoned_room<T: DeviceRepr>(device: &CudaDevice, count: usize) -> Result<Option<Slice<T>>> {
    if !POISONED.load(Ordering::Relaxed) {
        return Ok(None);
    }
    let stream = device.cuda_stream();
    let guard = GUARD / size_of::<T>();
    // SAFETY: all of it is written below.
    let whole = unsafe { device.alloc::<T>(count + guard) }?;
    let bytes = size_of::<T>() * (count + guard);
    let start = whole.leak();
    // SAFETY: `start` is an allocation of that many bytes on this stream, which nothing else owns any more.
    unsafe { result::memset_d8_async(start, POISON, bytes, stream.cu_stream()) }.w()?;
    let behind = start + (size_of::<T>() * count) as u64;
    GUARDS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_default()
        .insert(start, behind);
    // SAFETY: the allocation is longer than that, and its owner is the slice from now on.
    Ok(Some(unsafe { stream.upgrade_device_ptr(start, count) }))
}

/// Memory at `start` came from elsewhere: it has no guard, whatever was there before.
pub(crate) fn unguarded(start: u64) {
    if POISONED.load(Ordering::Relaxed)
        && let Some(guards) = &mut *GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
    {
        guards.remove(&start);
    }
}

/// Looks at the guard bytes behind a result.
pub(crate) fn look_behind<T>(device: &CudaDevice, slice: &Slice<T>) {
    if !POISONED.load(Ordering::Relaxed) {
        return;
    }
    let stream = device.cuda_stream();
    let start = slice.device_ptr(&stream).0;
    let mut guards = GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(behind) = guards.as_mut().and_then(|guards| guards.remove(&start)) else {
        return;
    };
    let mut found = [0u8; GUARD];
    // SAFETY: the allocation of the slice goes on that far.
    let copied = stream
        .synchronize()
        .and_then(|()| unsafe { result::memcpy_dtoh_sync(&mut found, behind) });
    if copied.is_err() || found != [POISON; GUARD] {
        TRESPASSES.fetch_add(1, Ordering::Relaxed);
    }
}
