//! Events: the block that vmnet calls when packets are available. It counts the event and wakes the
//! reading ring, and does nothing else.
//!
//! Apple does not document whether vmnet calls the block again while packets are left unread. The
//! driver is right in both cases. Reads go on until one returns fewer packets than were asked for.
//! The queue compares [`Events::count`] with the count before its last read, so it notices an event
//! that came meanwhile. And the safety poll reads now and then although no event came.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use block2::RcBlock;
use dispatch2::DispatchQueue;
use vmring_core::sync::{AtomicU64, Ordering};

use super::ffi::{InterfaceRef, Object, PACKETS_AVAILABLE, vmnet_interface_set_event_callback};
use crate::device::seam::Wake;
use crate::error::Status;
use crate::sync::Mutex;
use crate::sys::lock;

/// The state that the event block shares with the driver.
#[derive(Debug, Default)]
pub(crate) struct Events {
    /// The number of events so far.
    count: AtomicU64,
    /// The number of polls that found packets although no event had come before them.
    pub(crate) rescued: AtomicU64,
    /// The wake of the ring that reads; `None` while no ring reads.
    wake: Mutex<Option<Wake>>,
}

thread_local! {
    /// Whether this thread is running an event block.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Returns whether the calling thread is running an event block. Such a thread must not wait for
/// the last event to end, because it would wait for itself.
pub(crate) fn inside_event() -> bool {
    INSIDE.get()
}

impl Events {
    /// Returns the number of events so far.
    pub(crate) fn count(&self) -> u64 {
        // Acquire: pairs with the Release in `happened`. If this load sees an event, a read after
        // it finds the packets that the event announced.
        self.count.load(Ordering::Acquire)
    }

    /// Sets what an event wakes.
    pub(crate) fn set_wake(&self, wake: Option<Wake>) {
        let before = std::mem::replace(&mut *lock(&self.wake), wake);
        drop(before); // outside the lock: it may be the last reference to a ring's state
    }

    /// Counts an event and wakes the ring that reads. vmnet's block calls this.
    fn happened(&self) {
        // Release: pairs with the Acquire in `count`. A poller that goes to sleep cannot miss the
        // event because of the fences in the doorbell's `arm` and `ring_if`: the poller arms its
        // doorbell and then loads the count, and we add to the count and then ring the doorbell.
        self.count.fetch_add(1, Ordering::Release);
        // This lock and the clone's reference count cost something for each event, not for each
        // packet.
        let wake = lock(&self.wake).clone();
        if let Some(wake) = wake {
            let outer = INSIDE.replace(true);
            // This may run a caller's `Waker`. The notifier catches a panic of that.
            wake.wake();
            INSIDE.set(outer);
        }
    }
}

/// The event block of an interface. The driver keeps it until vmnet cannot call it any more: vmnet
/// probably keeps a copy of its own, but no document promises that (the row "does vmnet keep blocks
/// and queues?" of the open questions in ARCHITECTURE.md).
pub(crate) struct Callback(RcBlock<dyn Fn(u32, Object)>);

// SAFETY: `set` is the only constructor. Its block captures an `Arc<Events>` and nothing else, which
// is `Send` and `Sync`. The blocks runtime counts references to a block atomically, so any thread
// may release it.
unsafe impl Send for Callback {}

impl Callback {
    /// Asks vmnet to report events to `events` from `queue`, which must be serial.
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
        // SAFETY: the caller promises a started interface. Block and queue have the types that
        // vmnet.h declares. They live until no event can come: `Running` keeps both until
        // `stop_here` has turned events off and waited for the last one, or leaks them.
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

    /// Asks vmnet to call the block no more. A call that is running goes on.
    ///
    /// # Safety
    ///
    /// `interface` is started and not stopped.
    pub(crate) unsafe fn clear(interface: InterfaceRef) -> Result<(), Status> {
        // SAFETY: the caller promises a started interface. vmnet.h allows null for both queue and
        // block, and says that this turns events off.
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

/// Converts one of vmnet's status codes into a result.
pub(crate) fn check(status: u32) -> Result<(), Status> {
    Status::from_code(status).map_or(Ok(()), Err)
}
