//! What happens to each frame, and the counters of it.

use crossbeam_utils::CachePadded;
use vmring_core::sync::{AtomicU64, Ordering};

/// Counters of the packets that a receiver of a port collected. Only that receiver writes them.
#[derive(Default)]
pub(crate) struct Received {
    pub(crate) direct: AtomicU64,
    pub(crate) overflow: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

/// Counters of the packets that a port's receiver missed. Senders write them when they drop a
/// frame.
#[derive(Default)]
pub(crate) struct Missed {
    pub(crate) no_buffer: AtomicU64,
    pub(crate) closed: AtomicU64,
    pub(crate) receive_limit: AtomicU64,
}

/// The counters that each sender keeps for itself and adds to its port's once per batch.
#[derive(Clone, Copy)]
pub(crate) enum SendCounter {
    Packets,
    Bytes,
    Floods,
    ToGateway,
    ToRouter,
    Runt,
    TooBig,
    BadSource,
    Isolated,
    Reserved,
    OwnPort,
    Spoofed,
    Role,
    Unknown,
    SendLimit,
    FloodLimit,
    BadOffload,
    NotSegmentable,
    RouterBusy,
    NoReceiver,
    Completed,
    Cut,
}

/// How many kinds of [`SendCounter`] there are.
pub(crate) const SEND_COUNTERS: usize = SendCounter::Cut as usize + 1;

/// The counters of one port, grouped by writer. Each group has cache lines of its own.
#[derive(Default)]
pub(crate) struct PortCounters {
    pub(crate) missed: CachePadded<Missed>,
    pub(crate) sent: CachePadded<[AtomicU64; SEND_COUNTERS]>,
}

impl PortCounters {
    fn sent(&self, counter: SendCounter) -> u64 {
        self.sent[counter as usize].load(Ordering::Relaxed)
    }

    /// What these counters and those of the receivers have counted.
    pub(crate) fn stats<'r>(&self, all: impl Iterator<Item = &'r Received> + Clone) -> PortStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let received = |counter: fn(&Received) -> &AtomicU64| {
            all.clone().map(|received| get(counter(received))).sum()
        };
        PortStats {
            received_direct: received(|received| &received.direct),
            received_overflow: received(|received| &received.overflow),
            received_bytes: received(|received| &received.bytes),
            missed_no_buffer: get(&self.missed.no_buffer),
            missed_closed: get(&self.missed.closed),
            missed_receive_limit: get(&self.missed.receive_limit),
            sent_packets: self.sent(SendCounter::Packets),
            sent_bytes: self.sent(SendCounter::Bytes),
            sent_floods: self.sent(SendCounter::Floods),
            sent_to_gateway: self.sent(SendCounter::ToGateway),
            sent_to_router: self.sent(SendCounter::ToRouter),
            dropped_runt: self.sent(SendCounter::Runt),
            dropped_too_big: self.sent(SendCounter::TooBig),
            dropped_bad_source: self.sent(SendCounter::BadSource),
            dropped_isolated: self.sent(SendCounter::Isolated),
            dropped_reserved: self.sent(SendCounter::Reserved),
            dropped_own_port: self.sent(SendCounter::OwnPort),
            dropped_spoofed: self.sent(SendCounter::Spoofed),
            dropped_role: self.sent(SendCounter::Role),
            dropped_unknown: self.sent(SendCounter::Unknown),
            dropped_send_limit: self.sent(SendCounter::SendLimit),
            dropped_flood_limit: self.sent(SendCounter::FloodLimit),
            dropped_bad_offload: self.sent(SendCounter::BadOffload),
            dropped_not_segmentable: self.sent(SendCounter::NotSegmentable),
            dropped_router_busy: self.sent(SendCounter::RouterBusy),
            dropped_no_receiver: self.sent(SendCounter::NoReceiver),
            completed_in_software: self.sent(SendCounter::Completed),
            cut_in_software: self.sent(SendCounter::Cut),
        }
    }

    pub(crate) fn reset<'r>(&self, all: impl Iterator<Item = &'r Received>) {
        let Missed { no_buffer, closed, receive_limit } = &*self.missed;
        let missed = [no_buffer, closed, receive_limit];
        let received = all.flat_map(|one| [&one.direct, &one.overflow, &one.bytes]);
        for counter in received.chain(missed).chain(self.sent.iter()) {
            counter.store(0, Ordering::Relaxed);
        }
    }
}

/// What has passed through a port. What a sender counts appears here when it flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStats {
    /// Packets that were collected and had been copied straight into a posted buffer.
    pub received_direct: u64,
    /// Packets that were collected and had waited in the overflow ring.
    pub received_overflow: u64,
    /// The bytes of all packets that were collected.
    pub received_bytes: u64,
    /// Packets for this port that were dropped because no buffer was posted and the overflow ring
    /// was full.
    pub missed_no_buffer: u64,
    /// Packets for this port that were dropped because its receiver was closed, or that waited in it when
    /// it was dropped.
    pub missed_closed: u64,
    /// Packets for this port that were dropped because they were over its receive limit.
    pub missed_receive_limit: u64,
    /// Frames of this port that were delivered, flooded, or given to the gateway or the router.
    pub sent_packets: u64,
    /// The bytes of these frames.
    pub sent_bytes: u64,
    /// The frames among them that went to all other ports: broadcasts, multicasts, and frames to
    /// unknown addresses.
    pub sent_floods: u64,
    /// The frames of this port that the gateway has seen.
    pub sent_to_gateway: u64,
    /// The frames of this port that were given to the network's [router](crate::router).
    pub sent_to_router: u64,
    /// Frames too short for an Ethernet header.
    pub dropped_runt: u64,
    /// Frames longer than the MTU and the Ethernet header, and the tag if they have one. Of a packet that
    /// is to be cut, this is said of its segments.
    pub dropped_too_big: u64,
    /// Frames whose source address is not unicast, is the gateway's, or is another port's.
    pub dropped_bad_source: u64,
    /// Frames that did not reach their destination because of isolation.
    pub dropped_isolated: u64,
    /// Frames to an address that no bridge forwards to (IEEE 802.1Q, table 8-1).
    pub dropped_reserved: u64,
    /// Frames whose destination is behind the port that sent them.
    pub dropped_own_port: u64,
    /// Frames from a source address that this port may not send from, and ARP packets that name
    /// another sender; see [`SourceRule`](crate::policy::SourceRule). At an uplink they are frames in
    /// the name of another port: somebody forges them, or the uplink leads back to itself.
    pub dropped_spoofed: u64,
    /// Router advertisements, redirects, and messages of DHCP servers, which this port may not send; see
    /// [`PortRole`](crate::policy::PortRole).
    pub dropped_role: u64,
    /// Frames to an unknown address that were for no port: from the uplink, or while the network's
    /// uplink was away.
    pub dropped_unknown: u64,
    /// Frames over this port's send limit.
    pub dropped_send_limit: u64,
    /// Frames to all ports over this port's flood limit. The gateway got the broadcasts among them.
    pub dropped_flood_limit: u64,
    /// Packets whose offload header is not true of them, or asks for what the port did not negotiate.
    pub dropped_bad_offload: u64,
    /// Packets that a receiver does not cut itself, and that software cannot cut either
    /// ([`SoftwareError`](crate::software::SoftwareError)), or that would be too many segments. A packet
    /// to several ports counts once for each such port.
    pub dropped_not_segmentable: u64,
    /// Frames for the network's [router](crate::router) that were dropped because too many of this port
    /// waited for it.
    pub dropped_router_busy: u64,
    /// Frames that their receiver did not accept. The receiver's port counts them as missed.
    pub dropped_no_receiver: u64,
    /// How often a checksum of this port's packets was completed for a receiver that does not do it:
    /// once for each receiver.
    pub completed_in_software: u64,
    /// How often a packet of this port was cut into segments for a receiver that does not do it: once
    /// for each receiver.
    pub cut_in_software: u64,
}

impl PortStats {
    /// Returns how many packets to or from this port were dropped. A frame that its receiver did
    /// not accept counts once, at the receiver's port.
    pub fn drops(&self) -> u64 {
        self.missed_no_buffer
            + self.missed_closed
            + self.missed_receive_limit
            + self.dropped_runt
            + self.dropped_too_big
            + self.dropped_bad_source
            + self.dropped_isolated
            + self.dropped_reserved
            + self.dropped_own_port
            + self.dropped_spoofed
            + self.dropped_role
            + self.dropped_unknown
            + self.dropped_send_limit
            + self.dropped_flood_limit
            + self.dropped_bad_offload
            + self.dropped_not_segmentable
            + self.dropped_router_busy
    }
}

/// What happened to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Sent {
    /// It was delivered to the one port that its destination is behind, or may be behind.
    Forwarded,
    /// It was offered to all other ports that it is for, and `reached` of them accepted it. A
    /// broadcast, and a frame to a group that the gateway is a member of, reached the gateway as well, if
    /// there is one.
    Flooded {
        /// How many ports accepted it.
        reached: u32,
    },
    /// It was given to the gateway, or to the network's router behind it.
    Gateway,
    /// It was not delivered.
    Dropped(DropReason),
}

/// Why a frame was not delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DropReason {
    /// It is too short for an Ethernet header.
    #[error("the frame is shorter than an Ethernet header")]
    Runt,
    /// It is longer than the network's MTU and the Ethernet header, and the tag if it has one.
    #[error("the frame is longer than the network's largest packet")]
    TooBig,
    /// Its source address is not unicast, or belongs to the gateway or to another port.
    #[error("the source address is not unicast, or belongs to the gateway or another interface")]
    BadSource,
    /// Its own port or the destination's port is isolated, and neither end is the gateway or the
    /// uplink.
    #[error("an isolated interface exchanges frames with the gateway and the uplink only")]
    Isolated,
    /// Its destination is one that no bridge forwards to, 01:80:C2:00:00:00 to 01:80:C2:00:00:0F
    /// (IEEE 802.1Q, table 8-1).
    #[error("a frame to a reserved address is for the sender's own bridge and not forwarded")]
    Reserved,
    /// Its destination is behind the port that sent it.
    #[error("the destination is behind the interface that sent the frame")]
    OwnPort,
    /// The policy of its port forbids the source address, or it is an ARP packet that names another
    /// sender, or it comes from the uplink in the name of another port.
    #[error("the interface may not send from this source address, or an ARP packet names another")]
    Spoofed,
    /// It would make its sender the router or the DHCP server of others, and the role of its port forbids
    /// that.
    #[error("the interface may be no router and no DHCP server for others")]
    Role,
    /// Its destination is unknown, and it is from the uplink, or the network's uplink is away.
    #[error("the destination is unknown, and no interface may have it")]
    Unknown,
    /// It is over the send limit of its port.
    #[error("the frame is over the interface's send limit")]
    SendLimit,
    /// It is for all ports, and over the flood limit of its port. If it is a broadcast, the gateway
    /// got it.
    #[error("the frame is for all, and over the interface's flood limit")]
    FloodLimit,
    /// Its offload header is not true of it, or asks for what its port did not negotiate.
    #[error("the offload header is wrong, or asks for what the interface did not negotiate")]
    BadOffload,
    /// The receiver does not cut it itself, and software cannot cut it either, or it would be too many
    /// segments.
    #[error("the packet cannot be cut into segments")]
    NotSegmentable,
    /// It is for the network's router, and too many frames of its port wait for that.
    #[error("too many frames of the interface wait for the network's router")]
    RouterBusy,
    /// It is over the receive limit of the destination's port.
    #[error("the frame is over the receiver's limit")]
    ReceiveLimit,
    /// The receiver has no buffer posted and its overflow ring is full.
    #[error("the receiver has no buffer for the frame")]
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
