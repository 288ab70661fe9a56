//! Opening a GPU so that its memory stays ours between two steps.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{Device, Result};

/// Opens GPU number `ordinal`.
///
/// Freed memory stays in the driver's pool: by default every synchronisation gives it back to the system, and the next
/// step has to map all of it again. All threads share one stream: candle's default gives each its own, and what one thread
/// hands to another may then not be there yet.
///
/// # Errors
/// There is no such GPU, or its driver refuses.
pub fn open_cuda(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    // SAFETY: there is one stream, in whose order everything happens, so that no slice has to wait for another stream.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    let mut keep: u64 = u64::MAX;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the pool belongs to the device that was just opened; the attribute is a 64-bit number that is copied.
    unsafe {
        let pool = result::device::get_default_mem_pool(result::device::get(ordinal as i32).w()?).w()?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast()).w()?;
    }
    Ok(device)
}
