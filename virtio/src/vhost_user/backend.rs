//! [`Backend`]: what a session asks of the device behind it.

use std::fmt;
use std::sync::Arc;
use std::task::Poll;

use vmring_core::guest::{DirtyLog, GuestMemory};

use crate::config::NetConfig;
use crate::event::Event;

/// The device behind a [`Session`](crate::vhost_user::Session).
///
/// The session calls it from [`Session::process`](crate::vhost_user::Session::process), and answers
/// the front end after the call. A function that returns [`Poll::Pending`] has begun its work and
/// has not ended it. Then the session answers nothing, reads no further message, and calls the
/// function again at the next `process`.
pub trait Backend {
    /// The virtio features of the device. The session adds `VHOST_F_LOG_ALL` and
    /// `VHOST_USER_F_PROTOCOL_FEATURES`, and takes away
    /// [`NEVER_OFFERED`](crate::vhost_user::features::NEVER_OFFERED).
    fn features(&self) -> u64;

    /// The front end has negotiated these virtio features, without the bits that the session adds.
    /// No ring runs.
    fn set_features(&mut self, features: u64);

    /// The guest's memory has changed. No ring runs. The device drops every clone of the memory that
    /// it had before, as the front end may use those addresses for something else.
    ///
    /// `sealed` tells whether every region's file is sealed against shrinking. If it is not, the
    /// front end can make any access to the memory fail with SIGBUS.
    fn set_memory(&mut self, memory: &GuestMemory, sealed: bool);

    /// Starts a ring, and looks at it at once: the front end may have kicked it before.
    ///
    /// # Errors
    ///
    /// Any error ends the connection.
    fn start_ring(
        &mut self,
        index: u16,
        ring: RingSetup,
    ) -> Result<(), Box<dyn core::error::Error + Send + Sync>>;

    /// Stops a ring that runs. When it is ready, nothing of the ring is in flight, nothing accesses
    /// the guest's memory for it, and its last used entries are published. Returns the index of the
    /// next entry of the available ring. Reads that were taken and not completed are given back, so
    /// the index is that of the first of them.
    fn stop_ring(&mut self, index: u16) -> Poll<u16>;

    /// Enables or disables a ring that runs. A disabled ring gets no packets, and the packets that
    /// the guest sends on it are taken and dropped (section "Ring states"). The device looks at a ring
    /// that is enabled, as a guest may kick its receive ring only once.
    fn enable_ring(&mut self, index: u16, enabled: bool);

    /// Replaces the event with which the guest is interrupted for a ring that runs. Without an event
    /// the guest polls. The session signals the new event once, so that no interrupt is lost.
    fn set_call(&mut self, index: u16, call: Option<Arc<Event>>);

    /// The configuration space of the device.
    fn config(&self) -> NetConfig;

    /// The front end tells the guest this MTU. Returns whether the device can carry it.
    fn set_mtu(&mut self, mtu: u16) -> bool;

    /// The guest with this MAC address has moved here, and does not tell the network itself. The
    /// device broadcasts a RARP packet for it.
    fn announce(&mut self, mac: [u8; 6]);

    /// The front end has set the device's status (virtio, "Device Status Field"). With 0 the rings
    /// are stopped before.
    fn set_status(&mut self, status: u8) {
        let _ = status;
    }

    /// The device forgets everything that the guest has set. No ring runs.
    fn reset(&mut self);

    /// The state that a migrated or restored device needs beyond what the front end knows, at most
    /// [`STATE_MAX`](crate::vhost_user::STATE_MAX) bytes. No ring runs.
    fn save(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over what [`save`](Self::save) returned elsewhere. Returns whether it is understood.
    fn load(&mut self, state: &[u8]) -> bool {
        state.is_empty()
    }
}

/// A ring that starts.
#[derive(Clone)]
#[non_exhaustive]
pub struct RingSetup {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The negotiated virtio features, without those of the protocol.
    pub features: u64,
    /// The number of entries, a power of two up to 32768.
    pub size: u16,
    /// The index of the next entry of the available ring. The used ring continues at the index that
    /// is in the guest's memory.
    pub base: u16,
    /// The guest's address of the descriptor table. It is in one region, like the others.
    pub descriptors: u64,
    /// The guest's address of the available ring, with the space for `used_event`.
    pub available: u64,
    /// The guest's address of the used ring, with the space for `avail_event`.
    pub used: u64,
    /// Where writes to the used ring are logged, if they are. Writes to buffers are logged through
    /// the memory's own slices.
    pub used_log: Option<UsedLog>,
    /// Is readable when the guest has added buffers. Without it the ring must be polled; a device that
    /// does not poll refuses to start it.
    pub kick: Option<Arc<Event>>,
    /// Interrupts the guest. Without it the guest polls.
    pub call: Option<Arc<Event>>,
    /// Whether the ring is enabled; see [`Backend::enable_ring`].
    pub enabled: bool,
}

impl fmt::Debug for RingSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingSetup")
            .field("size", &self.size)
            .field("base", &self.base)
            .field("descriptors", &format_args!("{:#x}", self.descriptors))
            .field("available", &format_args!("{:#x}", self.available))
            .field("used", &format_args!("{:#x}", self.used))
            .field("used_log", &self.used_log)
            .field("kick", &self.kick)
            .field("call", &self.call)
            .field("enabled", &self.enabled)
            .finish_non_exhaustive()
    }
}

/// Where writes to a used ring are logged. It may be at other addresses than the ring (section
/// "Migration").
#[derive(Clone)]
pub struct UsedLog {
    pub(super) log: Arc<dyn DirtyLog>,
    pub(super) guest_address: u64,
}

impl UsedLog {
    /// The address that the log has for the ring's first byte.
    pub fn guest_address(&self) -> u64 {
        self.guest_address
    }

    /// Records that `len` bytes of the used ring were written, from its byte `offset` on. Call it
    /// after they were written.
    pub fn mark(&self, offset: u64, len: u64) {
        self.log.mark(self.guest_address.saturating_add(offset), len);
    }
}

impl fmt::Debug for UsedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UsedLog")
            .field("guest_address", &format_args!("{:#x}", self.guest_address))
            .finish_non_exhaustive()
    }
}
