//! The memory under a pool.

use alloc::boxed::Box;
use core::ptr::NonNull;

/// Memory for a [`Pool`](crate::Pool) to stand on. It is dropped with the pool, which is when the last handle is
/// gone and the last slot is home.
///
/// # Safety
///
/// From construction until drop, `len()` bytes at `base()` must be valid for reads and writes,
/// initialised, at a fixed address, and reached by nobody but the pool.
pub unsafe trait Backing: Send {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;
    /// How many bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A backing on the heap, for tests and for places without an operating system.
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
        // SAFETY: `new` leaked exactly this slice, and nobody else frees it.
        drop(unsafe { Box::from_raw(bytes) });
    }
}

// SAFETY: the pointer is to bytes this value alone owns.
unsafe impl Send for HeapBacking {}
// SAFETY: the bytes are initialised, stay where they are until drop, and `new` gave away no other
// way to reach them.
unsafe impl Backing for HeapBacking {
    fn base(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }
}
