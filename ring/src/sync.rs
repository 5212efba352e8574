//! The one door through which atomics and shared cells come, so that loom can stand in for them.

#[cfg(not(loom))]
mod imp {
    pub use alloc::sync::Arc;
    pub use core::hint::spin_loop;
    pub use core::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };

    /// `core::cell::UnsafeCell` with loom's interface: every access is a closure, which lets the
    /// model checker see where it begins and ends. Compiles to nothing.
    #[derive(Debug)]
    #[repr(transparent)]
    pub struct UnsafeCell<T: ?Sized>(core::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        /// A cell that holds `value`.
        pub const fn new(value: T) -> Self {
            Self(core::cell::UnsafeCell::new(value))
        }

        /// Lends a pointer for reading. Dereferencing it is the caller's claim that nobody writes.
        #[inline(always)]
        pub fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
            f(self.0.get())
        }

        /// Lends a pointer for writing. Dereferencing it is the caller's claim to be alone.
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

    /// Under loom a spinning thread must let the others run.
    pub fn spin_loop() {
        loom::thread::yield_now();
    }
}

pub use imp::*;
