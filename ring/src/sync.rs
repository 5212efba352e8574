//! Atomics and shared cells. All code imports them from here, so that loom can replace them.

#[cfg(not(loom))]
mod imp {
    pub use alloc::sync::Arc;
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    /// `core::cell::UnsafeCell` with loom's interface. Every access is a closure, so that the model
    /// checker sees where the access begins and ends. It compiles to nothing.
    #[derive(Debug)]
    #[repr(transparent)]
    pub struct UnsafeCell<T: ?Sized>(core::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        /// A cell that holds `value`.
        pub const fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }

        /// Lends a pointer for reading. A caller that dereferences it claims that nobody writes
        /// meanwhile.
        #[inline(always)]
        pub fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        /// Lends a pointer for writing. A caller that dereferences it claims that nobody else reads
        /// or writes meanwhile.
        #[inline(always)]
        pub fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}

#[cfg(loom)]
mod imp {
    pub use loom::cell::UnsafeCell;
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    /// Yields: under loom, a thread that spins must let the others run.
    pub fn spin_loop() {
        loom::thread::yield_now();
    }
}

/// Atomics over memory that another program has mapped too. They are the processor's in a model as
/// well, because loom cannot put its own into that memory.
pub mod foreign {
    pub use core::sync::atomic::{AtomicU16, AtomicU32, compiler_fence, fence};
}

pub use imp::*;
