//! Random operations on interfaces, rings, pollers, wrappers and front-ends at once, and a plain
//! model of what must come of them: `liveness_model` draws short lists of operations, `soak` runs
//! them at full speed.
//!
//! The model is about liveness. Each submission completes at most once, and exactly once unless the
//! device lost it; every call returns; and when nothing is left to do, nobody is woken or polls any
//! more. What is in the packets, and in which order they come, is the subject of `model`.

pub(crate) mod counted;
pub(crate) mod frontend;
pub(crate) mod nasty;
pub(crate) mod operation;
pub(crate) mod processor;
pub(crate) mod seat;
pub(crate) mod setup;
pub(crate) mod world;

use std::any::Any;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Far longer than anything here takes. What reaches this hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// In this time nobody may be woken or poll when nothing is left to do.
pub(crate) const QUIET: Duration = Duration::from_millis(50);
/// How long a ring's close waits for a device that may lose slots.
pub(crate) const SHORT_CLOSE: Duration = Duration::from_millis(40);
/// What every panic on purpose says, so that it is told from a failure.
pub(crate) const ON_PURPOSE: &str = "as it was told to";

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a panic is one of those on purpose.
pub(crate) fn is_on_purpose(panic: &(dyn Any + Send)) -> bool {
    panic.downcast_ref::<String>().is_some_and(|text| text.contains(ON_PURPOSE))
        || panic.downcast_ref::<&str>().is_some_and(|text| text.contains(ON_PURPOSE))
}
