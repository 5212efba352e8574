//! How a device interrupts its guest: through a function of the VMM, or through what is set later.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vmring_virtio::net::Interrupt;

/// Why a guest is interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptCause {
    /// The used ring of this queue has new entries.
    Queue(u16),
    /// The configuration space has changed, or the device needs a reset.
    Config,
}

/// Interrupts a guest by a call of a function. See [`interrupt_fn`].
pub struct InterruptFn<F>(F);

/// An [`Interrupt`] that calls a function, which may do anything but call the device. It is called on
/// the device's thread, with no lock of the device held.
pub fn interrupt_fn<F>(function: F) -> Arc<InterruptFn<F>>
where
    F: Fn(InterruptCause) + Send + Sync + 'static,
{
    Arc::new(InterruptFn(function))
}

impl<F: Fn(InterruptCause) + Send + Sync> Interrupt for InterruptFn<F> {
    fn queue(&self, index: u16) {
        self.0(InterruptCause::Queue(index));
    }

    fn config(&self) {
        self.0(InterruptCause::Config);
    }
}

impl<F> fmt::Debug for InterruptFn<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptFn").finish_non_exhaustive()
    }
}

/// The interrupt of the current activation. A device exists before there is one.
#[derive(Default)]
pub(crate) struct CurrentInterrupt(Mutex<Option<Arc<dyn Interrupt>>>);

impl CurrentInterrupt {
    pub(crate) fn set(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        // The old one is dropped outside of the lock.
        let _old = std::mem::replace(&mut *self.lock(), interrupt);
    }

    /// It is called outside of the lock.
    fn get(&self) -> Option<Arc<dyn Interrupt>> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupt for CurrentInterrupt {
    fn queue(&self, index: u16) {
        if let Some(interrupt) = self.get() {
            interrupt.queue(index);
        }
    }

    fn config(&self) {
        if let Some(interrupt) = self.get() {
            interrupt.config();
        }
    }
}

impl fmt::Debug for CurrentInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CurrentInterrupt").field("is_set", &self.lock().is_some()).finish()
    }
}
