//! A panic of a device ends at the seam.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// A device's code has panicked.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Calls a device: a panic of its goes no further.
#[inline]
pub(crate) fn catch_panic<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| Panicked)
}
