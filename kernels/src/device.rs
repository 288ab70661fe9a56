//! Opening a GPU so that its memory stays ours between two steps, and what that memory holds.

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
    let pool = pool(ordinal)?;
    // SAFETY: the pool belongs to the device that was just opened; the attribute is a 64-bit number that is copied.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut keep).cast()) }.w()?;
    Ok(device)
}

/// Memory of a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Free, of the whole device.
    pub free: u64,
    /// All of it.
    pub total: u64,
    /// What tensors of this process take up.
    pub used: u64,
    /// The most that they took up since the last [`forget_peak`].
    pub peak: u64,
}

/// What the memory of `device` holds now; none of a CPU.
///
/// # Errors
/// The driver refuses.
pub fn memory(device: &Device) -> Result<Option<Memory>> {
    let Device::Cuda(cuda) = device else {
        return Ok(None);
    };
    device.synchronize()?;
    let (free, total) = result::mem_get_info().w()?;
    let pool = pool(cuda.cuda_stream().context().ordinal())?;
    let of = |attribute| {
        let mut value: u64 = 0;
        // SAFETY: the pool is the device's own; the attribute is a 64-bit number that is written to `value`.
        unsafe { result::mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.w()?;
        Ok::<_, candle_core::Error>(value)
    };
    Ok(Some(Memory {
        free: free as u64,
        total: total as u64,
        used: of(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        peak: of(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
    }))
}

/// Lets the peak of [`memory`] begin anew from what is taken up now.
///
/// # Errors
/// The driver refuses.
pub fn forget_peak(device: &Device) -> Result<()> {
    let Device::Cuda(cuda) = device else {
        return Ok(());
    };
    device.synchronize()?;
    let pool = pool(cuda.cuda_stream().context().ordinal())?;
    // The driver takes no other number here.
    let mut zero: u64 = 0;
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: as in `memory`.
    unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut zero).cast()) }.w()
}

fn pool(ordinal: usize) -> Result<sys::CUmemoryPool> {
    let device = result::device::get(ordinal as i32).w()?;
    // SAFETY: the device is one that the driver just named.
    unsafe { result::device::get_default_mem_pool(device) }.w()
}
