//! "Packets are available": the block that vmnet calls counts and rings, and does nothing else.
//!
//! Whether vmnet calls it again while packets are left unread is not documented. The driver is right
//! either way: a read goes on until it comes back short, an event that came meanwhile is seen by
//! [`Events::unseen`], and the poller looks now and then although nothing rang (the safety poll).

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Mutex};

use block2::RcBlock;
use dispatch2::DispatchQueue;
use vmring_core::sync::{AtomicU64, Ordering};

use super::ffi::{InterfaceRef, Object, PACKETS_AVAILABLE, vmnet_interface_set_event_callback};
use crate::device::seam::Wake;
use crate::error::Status;
use crate::sys::lock;

/// What the event block shares with the driver.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// Events so far.
    count: AtomicU64,
    /// Polls without an event before them that found packets.
    pub(crate) rescued: AtomicU64,
    /// The reading ring's wake, while there is one.
    wake: Mutex<Option<Wake>>,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this is the thread of an event block that is running: nothing may wait for events to end
/// there.
pub(crate) fn inside_event() -> bool {
    INSIDE.get()
}

impl Events {
    pub(crate) fn count(&self) -> u64 {
        // Acquire: pairs with the Release in `happened`; a read that follows finds the packets.
        self.count.load(Ordering::Acquire)
    }

    pub(crate) fn set_wake(&self, wake: Option<Wake>) {
        let before = std::mem::replace(&mut *lock(&self.wake), wake);
        drop(before); // outside the lock: it may be the last of a ring
    }

    fn happened(&self) {
        // Release: pairs with the Acquire in `count`. Against a poller that goes to sleep the
        // doorbell's fences decide: it arms and then counts, we count and then ring.
        self.count.fetch_add(1, Ordering::Release);
        // A lock and a reference count for an event, never for a packet.
        let wake = lock(&self.wake).clone();
        if let Some(wake) = wake {
            let outer = INSIDE.replace(true);
            // It may run somebody's waker; the notifier catches a panic of that.
            wake.wake();
            INSIDE.set(outer);
        }
    }
}

/// The callback of an interface, while it is set. Ours to keep until vmnet calls it no more: that
/// vmnet keeps a copy is to be expected and nowhere promised.
pub(crate) struct Callback(RcBlock<dyn Fn(u32, Object)>);

// SAFETY: the block owns what it needs, which is `Send` and `Sync`, and is counted atomically.
unsafe impl Send for Callback {}

impl Callback {
    /// Asks vmnet to call `events` from `queue`, which is serial.
    ///
    /// # Safety
    ///
    /// `interface` is started and not stopped.
    pub(crate) unsafe fn set(
        interface: InterfaceRef,
        queue: &DispatchQueue,
        events: &Arc<Events>,
    ) -> Result<Self, Status> {
        let events = events.clone();
        let block = RcBlock::new(move |_mask: u32, _event: Object| events.happened());
        // SAFETY: the interface is as the caller says; block and queue have the declared types.
        check(unsafe {
            vmnet_interface_set_event_callback(
                interface,
                PACKETS_AVAILABLE,
                Some(queue),
                Some(&block),
            )
        })?;
        Ok(Self(block))
    }

    /// Asks vmnet to call nobody any more. A call under way goes on.
    ///
    /// # Safety
    ///
    /// `interface` is started and not stopped.
    pub(crate) unsafe fn clear(interface: InterfaceRef) -> Result<(), Status> {
        // SAFETY: as the caller says; both null turn events off (vmnet.h).
        check(unsafe {
            vmnet_interface_set_event_callback(interface, PACKETS_AVAILABLE, None, None)
        })
    }
}

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Callback").field(&RcBlock::as_ptr(&self.0)).finish()
    }
}

/// A status of vmnet's as a result.
pub(crate) fn check(status: u32) -> Result<(), Status> {
    Status::from_code(status).map_or(Ok(()), Err)
}
