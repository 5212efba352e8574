//! Catches the panics of devices, so that they do not end the thread that called the device.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The code of a device has panicked.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Calls a device and catches its panic.
#[inline]
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    // In a model a panic is loom's finding, and ends the model.
    if cfg!(loom) {
        return Ok(call());
    }
    catch_unwind(AssertUnwindSafe(call)).map_err(drop_payload)
}

/// Drops the payload of a panic. Its destructor is the device's code, and may panic as well. The
/// payload of the second panic is leaked, because otherwise there could be a third one.
#[cold]
fn drop_payload(payload: Box<dyn Any + Send>) -> Panicked {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(payload);
    }
    Panicked
}
