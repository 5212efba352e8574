//! [`Readiness`]: the one descriptor of a device, and how it sleeps. [`Notifier`]: how others wake it.

use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::sync::{AtomicU32, Ordering};

use crate::event::Event;
use crate::selector::Selector;
use crate::sys;

/// The token of the descriptor that [`Notifier`] signals. Those of queues and rings are smaller.
const WAKE: u32 = u32::MAX;
/// The token of descriptors that only wake: those of rings, which `Ring::arm` empties itself.
const RING: u32 = u32::MAX - 1;

/// What the device and its notifiers share.
struct Shared {
    /// Whether somebody has notified since the device looked.
    notified: AtomicU32,
    bell: Doorbell<Wake>,
}

/// The pipe that wakes the device. Its reader is the device's, so no write fails for want of one.
struct Wake(PipeWriter);

impl Park for Wake {
    fn park(&self, _timeout: Option<Duration>) {
        unreachable!("the device sleeps on a descriptor");
    }

    fn unpark(&self) {
        // A pipe that is full wakes as well. While a notifier outlives its device, nobody reads.
        let _ = (&self.0).write(&[1]);
    }
}

/// Tells a device that a guest has notified it. It can be called on the thread of a virtual processor:
/// it costs a fence and a load, and a write to a pipe only if the device sleeps.
#[derive(Clone)]
pub struct Notifier(Arc<Shared>);

impl Notifier {
    /// The guest has made buffers of a queue available.
    ///
    /// The device looks at every queue when it is awake, so the index is for transports that one day
    /// tell queues apart, and any number is allowed.
    pub fn notify(&self, queue: u16) {
        let _ = queue;
        self.wake();
    }

    /// Makes the device's descriptor readable, or its next [`arm`](super::NetDevice::arm) fail.
    pub fn wake(&self) {
        // Release: pairs with the Acquire in `take_notified`. The fences of the bell let either the
        // device see this, or us see that it sleeps.
        self.0.notified.store(1, Ordering::Release);
        self.0.bell.ring();
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Notifier").field("bell", &self.0.bell).finish_non_exhaustive()
    }
}

/// The descriptors that a device waits for, behind one.
pub(super) struct Readiness {
    selector: Selector,
    shared: Arc<Shared>,
    woken: PipeReader,
    /// Whether the device may have slept since the descriptors were looked at.
    armed: bool,
}

impl Readiness {
    pub(super) fn new() -> io::Result<Self> {
        let (woken, wake) = io::pipe()?;
        sys::set_nonblocking(woken.as_fd())?;
        sys::set_nonblocking(wake.as_fd())?;
        let selector = Selector::new()?;
        selector.add(woken.as_fd(), WAKE)?;
        let bell = Doorbell::new(Wake(wake));
        let shared = Arc::new(Shared { notified: AtomicU32::new(0), bell });
        Ok(Self { selector, shared, woken, armed: false })
    }

    pub(super) fn notifier(&self) -> Notifier {
        Notifier(self.shared.clone())
    }

    /// Waits for the kicks of a queue, too.
    pub(super) fn add_kick(&self, index: u16, kick: &Event) -> io::Result<()> {
        self.selector.add(kick.as_fd(), index.into())
    }

    pub(super) fn remove_kick(&self, kick: &Event) {
        self.selector.remove(kick.as_fd());
    }

    /// Waits for the completions of a ring, too.
    pub(super) fn add_ring(&self, ring: BorrowedFd<'_>) -> io::Result<()> {
        self.selector.add(ring, RING)
    }

    pub(super) fn remove_ring(&self, ring: BorrowedFd<'_>) {
        self.selector.remove(ring);
    }

    /// Whether the device may have slept since the last [`wake_up`](Self::wake_up).
    pub(super) fn is_armed(&self) -> bool {
        self.armed
    }

    /// Whether somebody has notified since the last call.
    pub(super) fn take_notified(&self) -> bool {
        // Acquire: pairs with the Release in `wake`. The look at the queues, which follows, sees what
        // was made available before the notification.
        self.shared.notified.load(Ordering::Relaxed) != 0
            && self.shared.notified.swap(0, Ordering::Acquire) != 0
    }

    /// Says that the device is awake after it may have slept, and calls `kicked` with each queue whose
    /// kick is readable.
    pub(super) fn wake_up(&mut self, mut kicked: impl FnMut(u16)) {
        self.armed = false;
        self.shared.bell.disarm();
        let mut is_woken = false;
        self.selector.ready(|token| match token {
            WAKE => is_woken = true,
            RING => {}
            index => kicked(index as u16),
        });
        if is_woken {
            // One write for each time that the device has slept, so this takes them all.
            let _ = self.woken.read(&mut [0; 64]);
        }
    }

    /// Says that the device is about to sleep. Returns false if somebody has notified it meanwhile.
    pub(super) fn arm(&mut self) -> bool {
        self.armed = true;
        self.shared.bell.arm();
        // It comes after the fence in `arm`, which pairs with the fence in `ring`: a notifier whose
        // store this does not see, sees that the device sleeps.
        if self.shared.notified.load(Ordering::Relaxed) != 0 {
            self.shared.bell.disarm();
            return false;
        }
        true
    }
}

impl AsFd for Readiness {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.selector.as_fd()
    }
}
