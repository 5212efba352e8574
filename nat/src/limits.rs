//! The numbers of this crate that are limits or policy, in one place. Times are in microseconds
//! unless the type says otherwise.

use core::time::Duration;

use vmring_embedded::limits::MAX_PORTS as NETWORK_PORTS;

// Frames.

/// The most ports that one translator serves: as many as a network has.
pub const MAX_PORTS: usize = NETWORK_PORTS;
/// The most frames of a guest that are handled together.
pub const BATCH: usize = 64;
/// The most frames that one look at a socket fills.
pub const FRAMES_AT_ONCE: usize = 64;
/// The bytes of the memory in which frames for guests are built. At least four of the longest fit.
pub const SCRATCH_LEN: usize = 4 * 65_700;
/// How often in a row one flow may fill the scratch memory before others have their turn.
pub const TURNS: usize = 4;
/// The most extension headers of an IPv6 packet that are skipped.
pub const EXTENSION_HEADERS: usize = 4;
/// The longest IP packet of an ICMP error (RFC 1812, 4.3.2.3).
pub const ICMP_ERROR_MAX: usize = 576;
/// The longest IPv6 packet of an ICMP error: the least MTU (RFC 4443, 2.4 c).
pub const ICMPV6_ERROR_MAX: usize = 1280;

// Limits of a port and of the network. What a guest can make grow is bounded by them.

/// The default of [`Limits::flows`](crate::config::Limits::flows).
pub const TCP_FLOWS: usize = 2048;
/// The default of [`Limits::half_open`](crate::config::Limits::half_open).
pub const HALF_OPEN: usize = 128;
/// The default of [`Limits::udp_flows`](crate::config::Limits::udp_flows).
pub const UDP_FLOWS: usize = 2048;
/// The default of [`Limits::echo_flows`](crate::config::Limits::echo_flows).
pub const ECHO_FLOWS: usize = 64;
/// The default of [`Limits::new_flows_per_second`](crate::config::Limits::new_flows_per_second).
pub const NEW_FLOWS_PER_SECOND: u32 = 1000;
/// The default of [`Limits::kernel_memory`](crate::config::Limits::kernel_memory): 512 MiB.
pub const KERNEL_MEMORY: u64 = 512 << 20;
/// The default of [`Limits::descriptors`](crate::config::Limits::descriptors).
pub const DESCRIPTORS: usize = 4096;
/// Descriptors of the process that are left to others.
pub const DESCRIPTORS_RESERVED: usize = 64;
/// What an open socket is taken to cost the kernel, in bytes, until more is known.
pub const SOCKET_CHARGE: u32 = 128 * 1024;
/// What a socket of datagrams is taken to cost the kernel, in bytes: Linux's default both ways.
pub const DATAGRAM_CHARGE: u64 = 2 * 212_992;
/// The buffers of a socket that is opened when the kernel's memory is used up, in bytes each way.
pub const SMALL_SOCKET_BUFFER: u32 = 64 * 1024;
/// The most flows without a socket that wait for a late segment of the guest.
pub const TIME_WAIT_FLOWS: usize = 1024;
/// The most ICMP errors and resets for no flow that one port gets per second.
pub const ERRORS_PER_SECOND: u32 = 1000;

/// The default of [`Limits::dns_pending`](crate::config::Limits::dns_pending).
pub const DNS_PENDING: usize = 256;

/// The most addresses that one port has because it uses them. With temporary addresses (RFC 8981) and
/// one address of IPv4, a guest has about ten.
pub const SOURCES_PER_PORT: usize = 16;
/// How old what is known of the host's own addresses may be when a flow is opened.
pub const HOST_ADDRESSES: u64 = 5_000_000;

// What things cost, in units of about 100 ns. See `cost.rs`.

/// A frame of a guest, which is looked at, or one for a guest.
pub const COST_FRAME: u64 = 3;
/// A socket that has become ready.
pub const COST_EVENT: u64 = 2;
/// A system call on a socket that sends nothing.
pub const COST_CALL: u64 = 6;
/// A call that sends bytes of a stream: the packet goes through the host's IP.
pub const COST_STREAM_CALL: u64 = 30;
/// Each datagram that is sent.
pub const COST_DATAGRAM: u64 = 12;
/// A socket of TCP, from its connection to its end.
pub const COST_TCP_SOCKET: u64 = 350;
/// A socket of datagrams, from its opening to its end.
pub const COST_DATAGRAM_SOCKET: u64 = 150;
/// A look at the host's addresses or its resolvers.
pub const COST_HOST_LOOK: u64 = 300;
/// So many bytes that are copied cost one unit.
pub const BYTES_PER_UNIT: u64 = 1024;
/// A turn of a port's sockets ends when it has cost so much: 0.2 ms.
pub const TURN_COST: u64 = 2000;
/// A port's debt grows to no more: 100 ms.
pub const DEBT_MAX: u64 = 1_000_000;

// Memory of our own.

/// After so many bytes to a guest, the socket is asked again what it costs.
pub const ASK_AFTER: u32 = 1 << 20;
/// The largest segment that a guest is asked for, whatever its MTU is, in bytes. Linux's first send buffer of
/// a socket takes four of these.
pub const ASKED_MSS: u16 = 16_000;
/// The bytes of a block that holds what the kernel did not take of a batch.
pub const SPILL_BLOCK: usize = 64 * 1024;
/// The most of these blocks: 4 MiB. One port has at most three quarters of them.
pub const SPILL_BLOCKS: usize = 64;
/// The bytes of a ring that holds what the guest has not acknowledged, where the kernel cannot.
pub const RING_LEN: usize = 256 * 1024;
/// The most of these rings: 64 MiB. One port has at most three quarters of them.
pub const RINGS: usize = 256;

// TCP.

/// The least segment size that is sent to a guest, and the default over IPv4 (RFC 9293, 3.7.1).
pub const MIN_MSS: u16 = 536;
/// The segment size over IPv6 of a guest that names none (RFC 9293, 3.7.1).
pub const DEFAULT_MSS_V6: u16 = 1220;
/// The shift of the windows that a guest is offered (RFC 7323, 2.2): up to 16 MiB.
pub const WINDOW_SHIFT: u8 = 8;
/// The largest shift of a guest (RFC 7323, 2.3).
pub const MAX_WINDOW_SHIFT: u8 = 14;
/// The window of a flow that has sent nothing yet, or little in the last two seconds, in segments, if its
/// port's windows are limited together. It grows with what the guest sends.
pub const FIRST_WINDOW: u32 = 16;
/// No window is larger because the guest's frames hold several segments, in bytes. A guest that goes over
/// to frames of one segment may lose some of so many.
pub const LARGE_WINDOW: u32 = 1 << 20;
/// A SYN with a hop limit below this one is a traceroute's: systems begin with 64 or more.
pub const TRACED_HOPS: u8 = 33;
/// No window is taken or offered that is larger, in bytes.
pub const MAX_WINDOW: u32 = 16 << 20;
/// How long the host's `connect` may take. The kernel's own limit is 127 s.
pub const CONNECT_TIMEOUT: u64 = 30_000_000;
/// How long a segment to a guest may stay without an answer, the first time. A guest's delayed
/// acknowledgment takes 40 to 200 ms.
pub const RETRANSMIT_FIRST: u64 = 400_000;
/// How long several segments to a guest may stay without an answer before the last one is sent again, once
/// (RFC 8985, 7). Twice the time that a busy guest takes, about.
pub const TAIL_PROBE: u64 = 20_000;
/// The same for SYN and SYN,ACK (RFC 6298, 2.1).
pub const HANDSHAKE_FIRST: u64 = 1_000_000;
/// The longest time between two attempts.
pub const RETRANSMIT_MAX: u64 = 60_000_000;
/// How often a segment is sent again before the flow ends (RFC 9293, 3.8.3: R2 is at least 100 s;
/// this is about 8 minutes).
pub const RETRANSMITS: u8 = 14;
/// How often SYN and SYN,ACK are sent again: about a minute.
pub const HANDSHAKE_RETRANSMITS: u8 = 5;
/// How many duplicate acknowledgments mean that a segment is lost (RFC 5681, 3.2). Fewer do if
/// fewer segments are on their way (RFC 5827).
pub const DUPLICATE_ACKS: u32 = 3;
/// How soon a flow looks again whether its socket takes more than it took when it said that it takes
/// some.
pub const LOOK_AGAIN: u64 = 10_000;
/// How soon a frame that a port refused is tried again if nobody says that there is space, and how
/// soon a flow looks again for a ring for its bytes.
pub const REFUSED_LOOK: u64 = 100_000;
/// How long a flow may be silent before its guest is asked whether it still knows it.
pub const PROBE_AFTER: u64 = 60_000_000;
/// How long a guest may be silent before its flow ends (RFC 9293, 3.8.4).
pub const IDLE_TIMEOUT: u64 = 7_200_000_000;
/// How long a closed flow answers late segments. There is no wire on which they could be late for
/// long.
pub const TIME_WAIT: u64 = 1_000_000;

// Port forwards.

/// The most port forwards of a network. Each port of a range is one.
pub const FORWARDS: usize = 1024;
/// The default of [`ForwardRule::max_flows`](crate::ForwardRule::max_flows).
pub const FORWARD_FLOWS: usize = 256;
/// How many connections wait for one forward at most.
pub const BACKLOG: u32 = 128;
/// The most connections that a forward takes before others have their turn.
pub const ACCEPTS_AT_ONCE: usize = 16;
/// How soon a forward looks again that cannot take connections.
pub const FORWARD_LOOK: u64 = 100_000;
/// How soon a forward looks again for its guest.
pub const GUEST_LOOK: u64 = 250_000;
/// How long connections and datagrams wait for a guest that has no address yet.
pub const GUEST_WAIT: u64 = 30_000_000;

// Datagrams.

/// How long a flow of UDP lives that is no stream (net.netfilter.nf_conntrack_udp_timeout).
pub const UDP_TIMEOUT: u64 = 30_000_000;
/// How long a stream of UDP lives (net.netfilter.nf_conntrack_udp_timeout_stream).
pub const UDP_STREAM_TIMEOUT: u64 = 120_000_000;
/// A flow of UDP is a stream if it is used for so long and in both directions (nf_conntrack_proto_udp.c).
pub const UDP_STREAM_AFTER: u64 = 2_000_000;
/// How long a flow of ICMP echo lives.
pub const ECHO_TIMEOUT: u64 = 60_000_000;
/// The least port of a guest that its flow keeps on the host. The lower ones are for the host's services,
/// which a guest is not to keep from starting.
pub const KEPT_PORT_MIN: u16 = 1024;
/// The most messages that one look at a socket takes.
pub const MESSAGES: usize = 16;
/// The bytes in front of a received message, for the headers of its frame.
pub const HEADROOM: usize = 96;
/// The bytes of a received message and its headers: the longest datagram, and some.
pub const MESSAGE_LEN: usize = HEADROOM + 65_536;
/// The most datagrams in one frame of a guest (Linux's `UDP_MAX_SEGMENTS`).
pub const GUEST_SEGMENTS: usize = 128;
/// The most errors that are taken from a socket in one go.
pub const ERRORS_AT_ONCE: usize = 16;

// DNS.

/// The port of DNS (RFC 1035, 4.2).
pub const DNS_PORT: u16 = 53;
/// The most resolvers that are asked (`MAXNS` in resolv.conf(5)).
pub const RESOLVERS: usize = 3;
/// How old what is known of the host's resolvers may be when a guest asks.
pub const RESOLVERS_LOOK: u64 = 5_000_000;
/// After this time without an answer, the next query goes to the next resolver. A guest asks again after
/// 5 s (resolv.conf(5)), so its second query finds another resolver.
pub const RESOLVER_SILENT: u64 = 2_000_000;
/// After this time, the first resolver is asked again.
pub const RESOLVER_RESTORE: u64 = 60_000_000;
/// How long the answer to a query is waited for, and how long a flow of queries lives after its last one.
/// A resolver may take so long to find out that nobody knows a name.
pub const DNS_TIMEOUT: u64 = 10_000_000;
/// How long a connection to a resolver may take to be made.
pub const DNS_CONNECT_TIMEOUT: u64 = 3_000_000;
/// The longest answer that the translator gives itself: one that needs no EDNS (RFC 1035, 4.2.1).
pub const DNS_ANSWER_MAX: usize = 512;
/// The most names that a network answers for itself.
pub const LOCAL_NAMES: usize = 2048;
/// The most names that the guests of one port get.
pub const NAMES_PER_PORT: usize = 16;
/// The most addresses of one name.
pub const ADDRESSES_PER_NAME: usize = 8;
/// The most bytes of a file that names resolvers that are read.
pub const RESOLV_CONF_MAX: u64 = 64 * 1024;

/// A tick of the timer wheel.
pub const TICK: Duration = Duration::from_micros(1 << TICK_SHIFT);
/// The tick is 2 to this power, in microseconds: 8 ms.
pub(crate) const TICK_SHIFT: u32 = 13;
