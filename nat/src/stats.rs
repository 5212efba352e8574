//! What becomes of what guests send, counted by reason.
//!
//! Nothing is logged per packet. Everything that is refused or lost has a counter here, for the
//! whole network and for each port.

use core::fmt;
use core::ops::{Index, IndexMut};

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Counter {
            $($(#[$meta])* $name,)*
        }

        impl Counter {
            /// All of them.
            pub const ALL: &[Counter] = &[$(Counter::$name,)*];
        }
    };
}

counters! {
    // What works.
    /// Frames of guests that were handled.
    Frames,
    /// Frames that were given to guests.
    FramesOut,
    /// TCP flows that were opened, in both directions.
    TcpOpened,
    /// TCP flows whose handshake with the guest was completed.
    TcpEstablished,
    /// Bytes of TCP that the host's sockets have taken.
    TcpBytesSent,
    /// Bytes of TCP that guests have acknowledged.
    TcpBytesReceived,

    /// UDP flows that were opened, in both directions.
    UdpOpened,
    /// Datagrams of UDP that the host's sockets have taken.
    UdpSent,
    /// Datagrams of UDP that were given to guests.
    UdpReceived,
    /// ICMP echo flows that were opened.
    EchoOpened,
    /// Echo requests that the host's sockets have taken.
    EchoSent,
    /// Echo replies that were given to guests.
    EchoReceived,
    /// ICMP errors of others that were passed on to guests.
    ErrorsPassed,

    /// Queries of DNS that were given to a resolver. Those over TCP are not counted.
    DnsForwarded,
    /// Answers of resolvers that were given to guests.
    DnsAnswered,
    /// Queries for local names that were answered here.
    DnsLocal,

    // Frames of guests that cannot be read.
    /// The frame is not IPv4 or IPv6.
    NotIp,
    /// A header is cut short, or has a wrong length, version or checksum.
    Malformed,
    /// An IP fragment. They are not put together.
    Fragment,
    /// A transport protocol that is not translated.
    Protocol,
    /// The packet's hop limit was used up. The guest was told.
    HopLimit,
    /// TCP flags that no stack sends together, or a port of 0.
    TcpFlags,
    /// A message of ICMP that is no echo request. Guests get errors and send none.
    IcmpType,
    /// A segment whose sequence numbers are not the flow's.
    TcpSequence,
    /// A message for the gateway's port of DNS that is no query. The guest was told if it can be
    /// answered. A connection of TCP was reset.
    DnsMalformed,

    // What is refused.
    /// The source address is no guest's: loopback, multicast, broadcast or unspecified.
    BadSource,
    /// The source address is not in the network's subnet.
    SourceOutside,
    /// The source address is the gateway's.
    SourceGateway,
    /// The source address is leased to or reserved for another MAC address.
    SourceReserved,
    /// The source address is another port's.
    SourceTaken,
    /// The destination is a loopback address.
    DeniedLoopback,
    /// The destination is unspecified, or in 0.0.0.0/8.
    DeniedUnspecified,
    /// The destination is link-local. Most metadata services of clouds are.
    DeniedLinkLocal,
    /// The destination is a metadata service of a cloud that is not link-local.
    DeniedMetadata,
    /// The destination is multicast or broadcast.
    DeniedMulticast,
    /// The destination is in a reserved range.
    DeniedReserved,
    /// The destination is IPv4 in the form of IPv6: mapped, or translated by a well-known prefix.
    DeniedMapped,
    /// The destination is in the network's own subnet, or its gateway.
    DeniedSubnet,
    /// The destination is an address of the host, or could be one as long as these are unknown.
    DeniedHost,
    /// The destination is a port of the host address that leads nowhere.
    DeniedHostPort,
    /// The destination was denied by a rule.
    DeniedByRule,
    /// The network's or the port's table of flows is full.
    FlowLimit,
    /// Too many flows of the port or the network are half open.
    HalfOpenLimit,
    /// The port or the network opens flows too fast.
    NewFlowLimit,
    /// The translator has used up its descriptors.
    DescriptorLimit,
    /// A flow ended because its port opened another and had no place left.
    Evicted,
    /// The system gives this process no sockets for ICMP echo. The guest got an ICMP error. On Linux,
    /// `net.ipv4.ping_group_range` has to have a group of the process.
    EchoForbidden,
    /// A guest did not get the name that it calls itself, because it is another's, programs rely on it, or the
    /// table is full.
    NameRefused,
    /// A query that is not for guests: an update, a notification, a transfer of a zone, or a query that
    /// there is no resolver for. The guest was told.
    DnsRefused,
    /// A connection of TCP to the gateway's port of DNS was reset, because what it asked for is not to
    /// reach a resolver: a local name, or what [`DnsRefused`](Self::DnsRefused) counts over UDP.
    DnsStreamRefused,
    /// Too many queries of the port or the network wait for their answers. The guest was told.
    DnsPendingLimit,
    /// A query that no resolver could be given, that has met an error on its way, or whose flow made way for
    /// another. The guest was told.
    DnsFailed,
    /// A port forward waited, because it has as many flows as it may have.
    ForwardLimit,
    /// What came for a port forward was dropped or reset after a time, because no guest had its address. No
    /// port counts it.
    NoGuest,
    /// A segment belongs to no flow. The guest got a reset.
    NoFlow,
    /// An ICMP error or a reset was not sent, because the port gets too many.
    ErrorLimit,

    // What the host refused.
    /// The peer refused the connection. The guest got a reset.
    ConnectRefused,
    /// The destination cannot be reached. The guest got an ICMP error.
    ConnectUnreachable,
    /// The peer did not answer in time. The guest got an ICMP error.
    ConnectTimedOut,
    /// The host's rules forbid the connection. The guest got an ICMP error.
    ConnectDenied,
    /// The process has no descriptor left. The guest got an ICMP error.
    NoDescriptor,
    /// The kernel has no memory left for sockets.
    NoMemory,
    /// The host has no port left to connect from. The guest got an ICMP error.
    NoPort,
    /// The host's own addresses could not be read.
    HostAddresses,
    /// The host's resolvers could not be read. Those that were known are asked.
    HostResolvers,
    /// A resolver has answered nothing for a while. The port asks the next one.
    ResolverSilent,
    /// A resolver could not be reached, or has answered that it cannot help. The port asks the next one.
    ResolverFailed,
    /// A call failed in another way.
    OtherError,

    // How flows end, apart from both sides closing.
    /// The guest has reset a flow.
    GuestReset,
    /// The peer has reset a flow.
    WorldReset,
    /// A guest has not answered a handshake, or not acknowledged for too long.
    GuestSilent,
    /// A flow was idle for too long.
    IdleTimeout,
    /// The guest has begun anew with the addresses and ports of a flow.
    Restarted,
    /// A flow ended because its port, or its port forward, has left.
    PortGone,

    // What is repeated, lost or made smaller.
    /// Data was sent to a guest again because of duplicate acknowledgments.
    FastRetransmit,
    /// Data was sent to a guest again because it was not acknowledged in time.
    TimeoutRetransmit,
    /// The last segment was sent to a guest again soon, to find out whether acknowledgments or the segments
    /// at the end were lost.
    TailProbe,
    /// Data was sent to a guest again because it closed or shrank its window.
    WindowRewind,
    /// A guest with a closed window was asked whether it is still closed.
    WindowProbe,
    /// A silent guest was asked whether it still knows a flow.
    KeepAlive,
    /// A port did not take a frame. A segment of TCP is sent later.
    OutputFull,
    /// Bytes that the kernel did not take were kept until it does.
    Spilled,
    /// Bytes that neither the kernel nor the spill took. The guest sends them again.
    SpillFull,
    /// A datagram of a guest was lost, because the host's socket did not take it.
    DatagramLost,
    /// A datagram for a guest was lost, because its port did not take it.
    DatagramRefused,
    /// A datagram of somebody whom the guest has not asked. It was dropped.
    NotAsked,
    /// A datagram of a resolver that answers no query that waits for one. It was dropped.
    DnsUnasked,
    /// A query that no resolver has answered in time. The guest was told that it has failed.
    DnsUnanswered,
    /// A datagram was too long for its way. The host sends the next ones in fragments.
    TooLong,
    /// The system did not take several datagrams in one call. It gets them one by one.
    SegmentsRefused,
    /// Datagrams for guests that were written as IP fragments.
    Fragmented,
    /// All rings for data to guests are in use.
    RingsUsedUp,
    /// A socket got small buffers, because the kernel's memory for sockets is used up.
    SmallBuffers,
}

/// What has gone through a flow, or through all flows of a port forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Carried {
    /// Bytes of the guest that the host's socket has taken.
    pub bytes_sent: u64,
    /// Bytes for the guest: with TCP those that it has acknowledged, else those that its port has taken.
    pub bytes_received: u64,
    /// Datagrams of the guest that the host's socket has taken. TCP has none.
    pub datagrams_sent: u64,
    /// Datagrams that the guest's port has taken.
    pub datagrams_received: u64,
}

impl Carried {
    /// Adds what has gone through another flow.
    pub(crate) fn add(&mut self, other: &Self) {
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.datagrams_sent += other.datagrams_sent;
        self.datagrams_received += other.datagrams_received;
    }
}

/// What a port forward has and has done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) flows: usize,
    pub(crate) accepted: u64,
    pub(crate) refused: u64,
    pub(crate) carried: Carried,
}

/// The value of each [`Counter`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Counters([u64; Counter::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([0; Counter::ALL.len()])
    }
}

impl Counters {
    /// Adds to a counter. It stays at the largest number instead of starting again.
    pub(crate) fn add(&mut self, counter: Counter, n: u64) {
        let value = &mut self.0[counter as usize];
        *value = value.saturating_add(n);
    }

    /// Adds what was counted elsewhere.
    pub fn add_all(&mut self, others: &Self) {
        for (value, other) in self.0.iter_mut().zip(&others.0) {
            *value = value.saturating_add(*other);
        }
    }

    /// Each counter with its value.
    pub fn iter(&self) -> impl Iterator<Item = (Counter, u64)> + '_ {
        Counter::ALL.iter().map(|&counter| (counter, self[counter]))
    }
}

impl Index<Counter> for Counters {
    type Output = u64;
    fn index(&self, counter: Counter) -> &u64 {
        &self.0[counter as usize]
    }
}

impl IndexMut<Counter> for Counters {
    fn index_mut(&mut self, counter: Counter) -> &mut u64 {
        &mut self.0[counter as usize]
    }
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter().filter(|&(_, value)| value > 0)).finish()
    }
}
