//! Catches the panics of devices, so that they do not end the thread that called the device.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The code of a device has panicked.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Calls a device and catches its panic.
#[inline]
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(drop_payload)
}

/// Drops what a panic carried. That is the device's code too, and may panic in its turn. What the second
/// panic carries is leaked, or this would have no end.
#[cold]
fn drop_payload(payload: Box<dyn Any + Send>) -> Panicked {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(payload);
    }
    Panicked
}
