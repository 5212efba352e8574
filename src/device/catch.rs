//! Catches the panics of devices, so that they do not end the thread that called the device.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// The code of a device has panicked.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Calls a device and catches its panic.
#[inline]
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| Panicked)
}
