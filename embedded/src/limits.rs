//! The numbers of this crate that are limits or policy, in one place.

use core::num::NonZeroU64;
use core::ops::RangeInclusive;
use core::time::Duration;

// A network.

/// The most ports one network can have.
pub const MAX_PORTS: usize = 1024;
/// The MTUs a network can have. IPv6 needs at least 1,280; an Ethernet frame of 65,535 bytes holds
/// 65,521.
pub const MTU_RANGE: RangeInclusive<u32> = 1280..=65_521;
/// The default MTU.
pub const DEFAULT_MTU: u32 = 1500;
/// The bytes of a VLAN or priority tag (IEEE 802.1Q, 9.3).
pub const VLAN_TAG_LEN: usize = 4;
/// The least bytes of an Ethernet frame without its checksum (IEEE 802.3, 3.2.8). The gateway's own
/// frames are padded to it.
pub const MIN_FRAME_LEN: usize = 60;

// The gateway.

/// The most ICMP errors per second that the gateway sends to one port.
pub const ICMP_ERRORS_PER_SECOND: u32 = 100;
/// The most ICMP errors that the gateway sends to one port at once.
pub const ICMP_ERRORS_AT_ONCE: u32 = 50;
/// The most DHCP messages of one port that are read per second.
pub const DHCP_MESSAGES_PER_SECOND: u32 = 1000;
/// The most DHCP messages of one port that are read at once.
pub const DHCP_MESSAGES_AT_ONCE: u32 = 1000;
/// The longest IP packet of an ICMP error, which quotes as much of its cause as fits (RFC 1812,
/// 4.3.2.3).
pub const ICMP_ERROR_MAX: usize = 576;
/// The longest IP packet of an ICMPv6 error (RFC 4443, 2.4 c).
pub const ICMPV6_ERROR_MAX: usize = 1280;
/// The most router solicitations and DHCPv6 messages of one port that are answered per second.
pub const SOLICITATIONS_PER_SECOND: u32 = 10;
/// The most router solicitations and DHCPv6 messages of one port that are answered at once.
pub const SOLICITATIONS_AT_ONCE: u32 = 20;
/// A port that has got no router advertisement for this long gets one with the next frame that it
/// sends to the gateway (the default of `MaxRtrAdvInterval`, RFC 4861, 6.2.1).
pub const ADVERTISEMENT_INTERVAL: Duration = Duration::from_secs(600);
/// For how many seconds a guest uses the gateway as its default router without another
/// advertisement: the longest possible (RFC 8319, 4), because a silent guest gets none.
pub const ROUTER_LIFETIME: u16 = 65_535;
/// The most addresses of IPv6 that the gateway knows of the stations behind one port. With temporary ones
/// (RFC 8981), a guest has about ten.
pub const NEIGHBORS_PER_PORT: usize = 16;
/// A station that says again that it uses an address is no news before this time is over.
pub const NEIGHBOR_AGAIN: Duration = Duration::from_secs(1);
/// The most IPv6 extension headers of one packet that are read.
pub const IPV6_EXTENSION_HEADERS: usize = 8;

// A port's policy.

/// The most IPv6 extension headers of one packet that are read to find out whether a port may send it.
/// A longer chain counts as what is looked for.
pub const EXTENSION_HEADERS_READ: usize = 16;

/// By default a port sends so many frames to all others per second.
pub const FLOODS_PER_SECOND: NonZeroU64 = NonZeroU64::new(10_000).unwrap();
/// By default a port sends so many frames to all others at once.
pub const FLOODS_AT_ONCE: NonZeroU64 = NonZeroU64::new(1000).unwrap();
/// No frame is longer than this, in bytes: 64 KiB and every header that may be in front.
pub const LONGEST_FRAME: u64 = 128 * 1024;
/// The clocks of two senders, which are read once per batch, differ by less than this.
pub const CLOCK_LAG: Duration = Duration::from_secs(60);

// A port's inbox.

/// The largest number of cells of one inbox, posted or overflow.
pub const MAX_INBOX_CELLS: u32 = 1 << 24;
/// The values of `inbox_depth`: how many buffers one port can have posted.
pub const INBOX_DEPTH_RANGE: RangeInclusive<u32> = 1..=65_536;
/// The most queues of one port.
pub const QUEUES_MAX: usize = 16;
/// The default `inbox_depth`.
pub const DEFAULT_INBOX_DEPTH: u32 = 1024;
/// The most packets that can wait for one port.
pub const MAX_OVERFLOW_DEPTH: u32 = 65_536;
/// By default the overflow ring holds as many of the longest packets as fit in these bytes, within
/// [`DEFAULT_OVERFLOW_DEPTH_RANGE`].
pub const DEFAULT_OVERFLOW_BYTES: usize = 512 * 1024;
/// The least and the greatest default depth of the overflow ring.
pub const DEFAULT_OVERFLOW_DEPTH_RANGE: RangeInclusive<u32> = 16..=256;

// The router.

/// The values of `router_workers`. A sender has a bit of a byte for each worker.
pub const ROUTER_WORKERS_RANGE: RangeInclusive<usize> = 1..=8;
/// How many frames of one port can wait for a worker of the network's router in its buffers, besides those
/// that the worker is at work on.
pub const ROUTER_FRAMES: u32 = 256;
/// How many more frames of one port can wait for it.
pub const ROUTER_OVERFLOW: u32 = 16;
/// How many frames of one port the router takes before the next port has its turn.
pub const ROUTER_BATCH: usize = 64;

// Offload.

/// The longest IP packet that is to be cut into segments, in bytes: the longest that IPv4 has (RFC 791,
/// section 3.1). The Ethernet header and a tag are in front of it.
pub const LARGE_PACKET: usize = 65_535;
/// The most segments that one packet is cut into: as many as TCP sends with the least segment size of
/// Linux, which is 48 bytes (`TCP_MIN_SND_MSS` in `include/net/tcp.h`). Without this, one packet of a
/// guest would become 65,000.
pub const SEGMENTS_PER_PACKET: usize = LARGE_PACKET.div_ceil(48);
/// The most UDP datagrams that are merged into one packet: as many as Linux merges (`UDP_GRO_CNT_MAX` in
/// `net/ipv4/udp_offload.c`).
pub const DATAGRAMS_PER_PACKET: usize = 64;
/// The flows of which packets are merged at the same time. Another flow ends the oldest. Linux has as
/// many in each of its lists (`MAX_GRO_SKBS` in `net/core/gro.c`).
pub const FLOWS_MERGED: usize = 8;

// The hand-over of packets.

/// How many of a packet's first bytes are copied before the network decides what becomes of it, if it
/// is in the memory of a guest: an ARP packet over Ethernet.
pub const HEAD_LEN: usize = 42;
/// How many of a packet's first bytes are looked at for its flow: an Ethernet header, two tags, the
/// longest IPv4 header, and two ports.
pub const FLOW_HEAD_LEN: usize = 14 + 8 + 60 + 4;
/// The most buffers that one packet fills.
pub const GROUP_MAX: u32 = 256;
/// How many packets of a claim are handed over together, at most: as many as have their states on one
/// cache line.
pub const STATES_AT_ONCE: u32 = 8;
/// A packet of a claim that has more bytes is handed over at once, with those before it.
pub const LONG_PACKET: usize = 1536;
/// A packet of a claim that has no more bytes is handed over at once: that costs less than to wait.
pub const SHORT_PACKET: usize = 256;
/// How many bytes of a buffer's cache lines a sender asks for before it fills the buffer.
pub const ASKED_AHEAD: usize = 2048;
/// How often a receiver that does not sleep looks at a frame for which the posted buffers are too few
/// before it drops the frame.
pub const SHORT_LOOKS: u32 = 10_000;

// The table of MAC addresses.

/// How often an address is looked up for one frame if it moves meanwhile.
pub const LOOKUPS: u32 = 3;
/// The entries of one bucket, which fill one cache line.
pub const TABLE_WAYS: usize = 8;
/// The buckets for assigned addresses. There are as many for learned addresses.
pub const TABLE_BUCKETS: usize = 1024;
/// The values of `mac_ageing`, in seconds.
pub const MAC_AGEING_SECONDS_RANGE: RangeInclusive<u64> = 1..=86_400;
/// By default a learned address is forgotten when no frame has come from it for this long.
pub const DEFAULT_MAC_AGEING: Duration = Duration::from_secs(300);

// DHCP.

/// The values of `lease_time`, in seconds.
pub const LEASE_SECONDS_RANGE: RangeInclusive<u64> = 10..=u32::MAX as u64;
/// The default duration of a lease.
pub const DEFAULT_LEASE_TIME: Duration = Duration::from_secs(86_400);
/// How long an offered address is kept for the client's request.
pub const OFFER_TIME: Duration = Duration::from_secs(60);
/// How long an address is not given out after a client has found it in use.
pub const DECLINE_TIME: Duration = Duration::from_secs(3600);
/// How long an address is not given out after a station was seen to use it.
pub const CLAIM_TIME: Duration = Duration::from_secs(300);
/// The most addresses that the stations behind one port can block by claiming or declining them.
pub const CLAIMS_PER_PORT: usize = 16;
/// How long the server waits at least for an answer to its question whether an address is in use.
pub const PROBE_TIME: Duration = Duration::from_millis(250);
/// How many of a client's choices the server looks at before it takes any address that is free.
pub const FURTHER_CHOICES: usize = 256;
/// The bytes of the longest reply: all headers, the fixed fields, and all options, of which the
/// client identifier and the relay agent's information have up to 257 bytes each.
pub const DHCP_REPLY_MAX: usize = 14 + 28 + 240 + 67 + 257 + 257;
/// The most addresses one server gives out, however wide its range is. This bounds its memory.
pub const MAX_LEASES: u32 = 65_536;
/// The most name servers that DHCP can tell a guest.
pub const MAX_DNS_SERVERS: usize = 3;
/// The most bytes of a lease file that is read.
pub const LEASE_FILE_MAX: u64 = 64 * 1024 * 1024;
/// A lease file is written anew when it has more lines than this, and four times as many as there
/// are leases.
pub const LEASE_FILE_LINES: usize = 1024;
/// How long a lease file may be in use by another network before it is refused.
pub const LEASE_FILE_PATIENCE: Duration = Duration::from_millis(500);
/// How long after a failure the leases that could not be written are written again.
pub const LEASE_FILE_RETRY: Duration = Duration::from_secs(5);
/// How long the end of a network waits for the last leases to be written.
pub const LEASE_FILE_END: Duration = Duration::from_secs(5);
