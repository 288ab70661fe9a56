//! Memory of tensors on the CPU, kept from one step to the next.

/// The largest block that glibc learns to keep, less the little that it adds itself.
const LARGEST: usize = (32 << 20) - (64 << 10);

/// Has the allocator keep what a step frees.
///
/// At first glibc gives every block of more than 128 KiB back to the system, and gets it anew for the next tensor, page by page and
/// zeroed, which is up to a fifth of a small model's step. A block that is freed tells it that such sizes come and go, and it keeps all
/// that are no larger from then on. So one is taken, not touched, and freed. Other allocators make nothing of it.
pub(super) fn keep() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGEST)));
}
