//! The one door through which the library's atomics and locks come, so that loom can stand in for
//! them.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use vmring_core::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// The store to a word that other threads change by an exchange.
pub(crate) trait Overwrite<T> {
    /// Stores `value`.
    ///
    /// In a model this is an exchange too. If a store and an exchange race, loom lets both come last in
    /// the word's order, which an exchange never may, and then finds that the store is lost.
    fn overwrite(&self, value: T, ordering: Ordering);
}

macro_rules! overwrite {
    ($($atomic:ty: $value:ty),*) => {$(
        impl Overwrite<$value> for $atomic {
            #[inline(always)]
            fn overwrite(&self, value: $value, ordering: Ordering) {
                #[cfg(not(loom))]
                self.store(value, ordering);
                #[cfg(loom)]
                self.swap(value, ordering);
            }
        }
    )*};
}

overwrite!(AtomicBool: bool, AtomicU64: u64);
