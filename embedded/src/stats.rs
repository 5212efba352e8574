//! What becomes of each frame, and the counters that say how often.

use crossbeam_utils::CachePadded;
use vmring_core::sync::{AtomicU64, Ordering};

/// Counters of what a port's receiver got, written by its receiver only.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) direct: AtomicU64,
    pub(crate) overflow: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

/// Counters of what a port's receiver did not get, written by senders when they drop.
#[derive(Default)]
pub(crate) struct Missed {
    pub(crate) no_buffer: AtomicU64,
    pub(crate) closed: AtomicU64,
}

/// What senders count for themselves and publish once per batch.
#[derive(Clone, Copy)]
pub(crate) enum SendCounter {
    Packets,
    Bytes,
    Floods,
    ToGateway,
    Runt,
    TooBig,
    BadSource,
    Isolated,
    OwnPort,
    NoReceiver,
}

pub(crate) const SEND_COUNTERS: usize = SendCounter::NoReceiver as usize + 1;

/// The counters of one port, on a cache line for each of their writers.
#[derive(Default)]
pub(crate) struct PortCounters {
    pub(crate) received: CachePadded<Received>,
    pub(crate) missed: CachePadded<Missed>,
    pub(crate) sent: CachePadded<[AtomicU64; SEND_COUNTERS]>,
}

impl PortCounters {
    fn sent(&self, counter: SendCounter) -> u64 {
        self.sent[counter as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn stats(&self) -> PortStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortStats {
            received_direct: get(&self.received.direct),
            received_overflow: get(&self.received.overflow),
            received_bytes: get(&self.received.bytes),
            missed_no_buffer: get(&self.missed.no_buffer),
            missed_closed: get(&self.missed.closed),
            sent_packets: self.sent(SendCounter::Packets),
            sent_bytes: self.sent(SendCounter::Bytes),
            sent_floods: self.sent(SendCounter::Floods),
            sent_to_gateway: self.sent(SendCounter::ToGateway),
            dropped_runt: self.sent(SendCounter::Runt),
            dropped_too_big: self.sent(SendCounter::TooBig),
            dropped_bad_source: self.sent(SendCounter::BadSource),
            dropped_isolated: self.sent(SendCounter::Isolated),
            dropped_own_port: self.sent(SendCounter::OwnPort),
            dropped_no_receiver: self.sent(SendCounter::NoReceiver),
        }
    }

    pub(crate) fn reset(&self) {
        let all = [
            &self.received.direct,
            &self.received.overflow,
            &self.received.bytes,
            &self.missed.no_buffer,
            &self.missed.closed,
        ];
        for counter in all.into_iter().chain(self.sent.iter()) {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

/// What has passed through a port. What senders count appears when they flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStats {
    /// Packets collected that were copied straight into a posted buffer.
    pub received_direct: u64,
    /// Packets collected that waited in the overflow ring.
    pub received_overflow: u64,
    /// Their bytes, of both.
    pub received_bytes: u64,
    /// Packets for this port dropped because no buffer was posted and the overflow ring was full.
    pub missed_no_buffer: u64,
    /// Packets for this port dropped because its receiver was closed.
    pub missed_closed: u64,
    /// Frames this port sent that went somewhere.
    pub sent_packets: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Those of them that went to all other ports: broadcasts, multicasts, unknown addresses.
    pub sent_floods: u64,
    /// Those of them the gateway has seen.
    pub sent_to_gateway: u64,
    /// Frames too short for an Ethernet header.
    pub dropped_runt: u64,
    /// Frames longer than the network's `max_packet_size`.
    pub dropped_too_big: u64,
    /// Frames whose source address is not unicast, is the gateway's, or is another port's.
    pub dropped_bad_source: u64,
    /// Frames that isolation keeps from their destination.
    pub dropped_isolated: u64,
    /// Frames whose destination is behind the port they come from.
    pub dropped_own_port: u64,
    /// Frames whose receiver did not take them; counted at the receiver as missed.
    pub dropped_no_receiver: u64,
}

impl PortStats {
    /// Every packet that was on its way to or from this port and was dropped. Those whose receiver
    /// did not take them count at the receiver, once.
    pub fn drops(&self) -> u64 {
        self.missed_no_buffer
            + self.missed_closed
            + self.dropped_runt
            + self.dropped_too_big
            + self.dropped_bad_source
            + self.dropped_isolated
            + self.dropped_own_port
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sent {
    /// Delivered to the one port its destination is behind.
    Forwarded,
    /// Offered to all other ports: `reached` of them took it. A broadcast also reached the
    /// gateway.
    Flooded {
        /// How many took it.
        reached: u32,
    },
    /// Given to the gateway.
    Gateway,
    /// Not delivered.
    Dropped(DropReason),
}

/// Why a frame was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DropReason {
    /// Too short.
    #[error("the frame is shorter than an Ethernet header")]
    Runt,
    /// Too long.
    #[error("the frame is longer than the network's largest packet")]
    TooBig,
    /// Its source address is not the sender's to use.
    #[error("the source address is not unicast, or belongs to the gateway or another interface")]
    BadSource,
    /// Isolation.
    #[error("an isolated interface exchanges frames with the gateway only")]
    Isolated,
    /// Its destination is behind the port it came from.
    #[error("the destination is where the frame came from")]
    OwnPort,
    /// The receiver has no buffer posted and its overflow ring is full.
    #[error("the receiver has no buffer for it")]
    NoBuffer,
    /// The receiver is closed.
    #[error("the receiver is closed")]
    Closed,
}

/// Adds to a counter that only one thread writes.
#[inline]
pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}
