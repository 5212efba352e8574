//! [`Interrupt`]: how the device interrupts its guest.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::event::Event;

/// Interrupts a guest. The VMM implements it.
///
/// The device calls it from the thread that polls the device, with no lock of its own held, and at
/// most once for each queue and burst. Raising an interrupt may be costly, and it may do anything but
/// call the device.
pub trait Interrupt: Send + Sync {
    /// The used ring of a queue has new entries, and the driver wants to know.
    fn queue(&self, index: u16);

    /// The configuration space has changed, or the device needs a reset. The transport counts the
    /// generation of the space up (virtio 1.2, section 2.5.1) before it interrupts.
    fn config(&self);
}

/// Interrupts that are signalled on an [`Event`] for each queue, as over vhost-user, or with the
/// `irqfd` of KVM. An event may be replaced at any time. Without one the guest polls.
pub struct EventInterrupt {
    queues: Box<[Mutex<Option<Arc<Event>>>]>,
    config: Mutex<Option<Arc<Event>>>,
}

impl EventInterrupt {
    /// For a device with this many queues, without events.
    pub fn new(queues: u16) -> Self {
        Self { queues: (0..queues).map(|_| Mutex::default()).collect(), config: Mutex::default() }
    }

    /// Sets the event of a queue. A driver may have waited for the event before, so the new one is to
    /// be [signalled](Event::signal) once.
    pub fn set_queue(&self, index: u16, event: Option<Arc<Event>>) {
        if let Some(place) = self.queues.get(usize::from(index)) {
            *place.lock().unwrap_or_else(PoisonError::into_inner) = event;
        }
    }

    /// Sets the event that is signalled when the configuration space has changed.
    pub fn set_config(&self, event: Option<Arc<Event>>) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = event;
    }
}

/// Signals outside of the lock. If it fails, the other side has closed its end, and waits for nothing.
fn signal(place: &Mutex<Option<Arc<Event>>>) {
    let event = place.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(event) = event {
        let _ = event.signal();
    }
}

impl Interrupt for EventInterrupt {
    fn queue(&self, index: u16) {
        if let Some(place) = self.queues.get(usize::from(index)) {
            signal(place);
        }
    }

    fn config(&self) {
        signal(&self.config);
    }
}

impl fmt::Debug for EventInterrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventInterrupt").field("queues", &self.queues.len()).finish_non_exhaustive()
    }
}
