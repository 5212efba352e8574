//! [`NetStats`]: what a device has counted. [`StatsHandle`] reads it from any thread.

use core::fmt;
use std::sync::Arc;

use vmring_core::sync::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// What a device has counted since it was made. A reset of the guest changes nothing.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct NetStats {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl NetStats {
            /// All counters, by name.
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)+]
            }
        }

        /// The counters themselves. The device alone writes them.
        #[derive(Default)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)+
        }

        impl Counters {
            fn read(&self) -> NetStats {
                NetStats { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Packets that the guest has received.
    rx_packets,
    /// Their bytes, without headers of virtio.
    rx_bytes,
    /// Packets that the guest has sent, and that the interface has taken.
    tx_packets,
    /// Their bytes, without headers of virtio.
    tx_bytes,
    /// Packets for the guest that were lost because the guest's buffer was too small. The buffer was
    /// returned empty.
    rx_too_small,
    /// Buffers for receiving that have no space behind a header. They were returned empty.
    rx_useless,
    /// Packets for the guest that the interface could not deliver for another reason.
    rx_errors,
    /// Packets for the guest that were completed or cut in software, because the guest takes less
    /// than the interface gives.
    rx_software,
    /// Packets for the guest that were copied once more, from frames of the device: all of them, if the
    /// guest takes less than the interface gives, or if the interface cannot fill several mergeable
    /// buffers with one packet.
    rx_copied,
    /// Packets for the guest whose offload could not be done in software. They were lost.
    rx_malformed,
    /// Packets that waited for a driver when it reset the device, or in frames of the device when the
    /// driver changed what it takes. Nobody gets them.
    rx_discarded,
    /// How often the guest had no buffer for receiving when the device was about to sleep or to poll
    /// again.
    rx_no_buffer,
    /// Chains to send without a packet behind a whole header. They were dropped.
    tx_short,
    /// Chains to send whose header is wrong, or asks for what was not negotiated. They were dropped.
    tx_bad_header,
    /// Packets of the guest that are longer than the interface takes. They were dropped.
    tx_too_big,
    /// Packets of the guest on a queue that is disabled. They were dropped.
    tx_disabled,
    /// Packets of the guest that the interface did not take.
    tx_errors,
    /// Packets of the guest that were copied into a frame, because they have more than 256 segments, or
    /// unknown flags in their headers.
    tx_copied,
    /// Chains that break the rules of virtqueues. They were returned empty.
    broken_chains,
    /// Queues whose available index broke the rules. They do nothing until the guest resets the
    /// device.
    broken_queues,
    /// Interrupts that were raised for queues.
    interrupts,
    /// Kicks of the guest that woke the device: signals of kick descriptors, and calls of
    /// [`Notifier::notify`](super::Notifier::notify) that were seen.
    kicks,
    /// How often the device was polled after it had been armed for sleep.
    wakes,
    /// Kick descriptors that nobody can signal any more. They are not waited for.
    kicks_lost,
    /// Commands on the control queue that were carried out.
    commands,
    /// Commands on the control queue that were refused.
    commands_refused,
    /// Announcements of a MAC address that went into the network.
    announcements,
    /// Announcements that did not, because no packet can be sent now.
    announcements_failed,
}

/// A counter that one thread writes and others read.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the device's own thread does, so no read-modify-write operation is needed.
    ///
    /// Relaxed, both: a counter hands over no other data.
    pub(super) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Reads the counters of a device, from any thread, also after the device is gone.
#[derive(Clone)]
pub struct StatsHandle(pub(super) Arc<Counters>);

impl StatsHandle {
    /// What was counted until now. Counters of one moment may differ by what happens meanwhile.
    pub fn stats(&self) -> NetStats {
        self.0.read()
    }
}

impl fmt::Debug for StatsHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.stats().fmt(f)
    }
}
