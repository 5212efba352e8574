//! The memory under a pool.

use crate::guest::region::GuestMapping;
use alloc::boxed::Box;
use core::ptr::NonNull;

/// Memory for a [`Pool`](crate::Pool). It is dropped with the pool, which is when the last handle
/// is gone and the last slot has returned.
///
/// # Safety
///
/// From construction until drop, `len()` bytes at `base()` must be valid for reads and writes,
/// initialised, at a fixed address, and accessed by nobody but the pool.
pub unsafe trait Backing: Send {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;
    /// The number of bytes.
    fn len(&self) -> usize;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A backing on the heap, for tests and for systems without an operating system. It can be the memory
/// of a guest too.
#[derive(Debug)]
pub struct HeapBacking {
    base: NonNull<u8>,
    len: usize,
}

impl HeapBacking {
    /// `len` zeroed bytes.
    pub fn new(len: usize) -> Self {
        let bytes = Box::leak(alloc::vec![0_u8; len].into_boxed_slice());
        Self { len: bytes.len(), base: NonNull::from(bytes).cast() }
    }
}

impl Drop for HeapBacking {
    fn drop(&mut self) {
        let bytes = core::ptr::slice_from_raw_parts_mut(self.base.as_ptr(), self.len);
        // SAFETY: `new` leaked exactly this slice, this value alone owns it, and this is the only
        // place that frees it.
        drop(unsafe { Box::from_raw(bytes) });
    }
}

// SAFETY: the pointer is to bytes that this value alone owns, since `new` leaked them.
unsafe impl Send for HeapBacking {}
// SAFETY: a shared value gives away the address and the length only.
unsafe impl Sync for HeapBacking {}
// SAFETY: `new` made the bytes initialised and kept no other pointer to them; they are not moved
// before `drop` frees them.
unsafe impl Backing for HeapBacking {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: the bytes are mapped at a fixed address before `drop` frees them, and there is no reference
// to them.
unsafe impl GuestMapping for HeapBacking {
    fn start(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }
}
