//! The limits of ports, which their owner can change while they are in use.

use std::fmt;
use std::sync::{Arc, Weak};

use vmring_embedded::{Monitor, PortLimits};

use crate::device::slot::PostedSlot;
use crate::sync::Mutex;
use crate::sys::lock;

/// A view of a port and of its network. `None` while the interface is stopped, so that a stopped
/// interface does not keep the network alive.
pub(super) type PortMonitor = Mutex<Option<Monitor<PostedSlot>>>;

struct Shared {
    limits: PortLimits,
    ports: Vec<Weak<PortMonitor>>,
}

/// The limits of the interfaces that are started with it, from any thread.
///
/// Each interface has these limits for itself, whatever the others use. A clone is a second handle to
/// the same limits. They hold after a stop and a restart too.
///
/// ```
/// use std::num::NonZeroU64;
/// use vmring::device::embedded::{LimitsControl, PortLimits, Rate};
/// use vmring::{Embedded, Interface};
///
/// let control = LimitsControl::new(PortLimits::default());
/// let driver = Embedded::network("limits").limits(&control);
/// let guest = Interface::builder().device(driver).start()?;
///
/// // Later: a million bytes per second to the guest, and 64 KiB at once.
/// let per_second = NonZeroU64::new(1_000_000).expect("not 0");
/// let burst = NonZeroU64::new(65_536).expect("not 0");
/// let mut limits = control.get();
/// limits.receive.bytes = Some(Rate { per_second, burst });
/// control.set(limits);
/// # drop(guest);
/// # Ok::<(), vmring::Error>(())
/// ```
#[derive(Clone)]
pub struct LimitsControl(Arc<Mutex<Shared>>);

impl Default for LimitsControl {
    fn default() -> Self {
        Self::new(PortLimits::default())
    }
}

impl fmt::Debug for LimitsControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LimitsControl").field(&self.get()).finish()
    }
}

impl LimitsControl {
    /// Makes a handle with these limits. It has no interface yet.
    pub fn new(limits: PortLimits) -> Self {
        Self(Arc::new(Mutex::new(Shared { limits, ports: Vec::new() })))
    }

    /// Returns the limits.
    pub fn get(&self) -> PortLimits {
        lock(&self.0).limits
    }

    /// Replaces the limits. All token buckets of the interfaces are full afterwards, and each ring
    /// follows the new limits from its next batch on. It takes a lock, but no packet waits for it.
    pub fn set(&self, limits: PortLimits) {
        let mut shared = lock(&self.0);
        shared.limits = limits;
        shared.ports.retain(|port| port.strong_count() > 0);
        for port in shared.ports.iter().filter_map(Weak::upgrade) {
            apply(&port, limits);
        }
    }

    /// Adds a port that has joined its network with the limits `joined`, or has joined it again.
    pub(super) fn attach(&self, port: &Arc<PortMonitor>, joined: PortLimits) {
        let mut shared = lock(&self.0);
        if !shared.ports.iter().any(|known| known.as_ptr() == Arc::as_ptr(port)) {
            shared.ports.push(Arc::downgrade(port));
        }
        // They have changed meanwhile, and the change has not reached the port.
        if shared.limits != joined {
            apply(port, shared.limits);
        }
    }
}

fn apply(port: &PortMonitor, limits: PortLimits) {
    if let Some(monitor) = &*lock(port) {
        // A port that has left gets the limits when it joins again.
        let _ = monitor.set_limits(limits);
    }
}
