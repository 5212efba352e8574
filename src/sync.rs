//! The one door through which the library's atomics and locks come, so that loom can stand in for
//! them.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
pub(crate) use vmring_core::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
