//! The gateway over IPv6: neighbour discovery, router advertisements, ICMPv6 echo, stateless DHCPv6, and
//! a refusal of everything else.

use core::net::Ipv6Addr;
use core::time::Duration;

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetProtocol, Icmpv6DstUnreachable, Icmpv6Message, Icmpv6Packet,
    Icmpv6ParamProblem, Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags,
    NdiscRepr, TcpPacket, UdpPacket,
};
use vmring_core::sync::{AtomicBool, AtomicU64, Ordering};

use super::dhcpv6;
use super::ipv6::{Ipv6Config, group_mac, link_local, solicited_node};
use super::neighbors::{Neighbor, Neighbors};
use super::refusal::{Limiter, TCP_HEADER_LEN, fill_reset};
use super::router::Advertisement;
use crate::frame;
use crate::limits::{
    ADVERTISEMENT_INTERVAL, ICMPV6_ERROR_MAX, IPV6_EXTENSION_HEADERS, MAX_PORTS,
    SOLICITATIONS_AT_ONCE, SOLICITATIONS_PER_SECOND,
};

/// The bytes of an IPv6 header.
const IP_HEADER_LEN: usize = 40;
/// Where it names what follows (RFC 8200, 3).
const NEXT_HEADER_AT: usize = 6;
/// The bytes of an ICMPv6 error before what it quotes (RFC 4443, 3).
const ERROR_HEADER_LEN: usize = 8;
/// The bytes of a UDP header.
const UDP_HEADER_LEN: usize = 8;
/// The bytes of a neighbour solicitation in front of its options (RFC 4861, 4.3).
const NEIGHBOR_LEN: usize = 24;
/// The bytes of a router solicitation in front of its options (RFC 4861, 4.1).
const ROUTER_SOLICITATION_LEN: usize = 8;
/// The option "source link-layer address" (RFC 4861, 4.6.1).
const SOURCE_LINK_LAYER: u8 = 1;
/// The hop limit of neighbour discovery, which no router has forwarded (RFC 4861, 6.1 and 7.1).
const NEIGHBOR_HOPS: u8 = 255;
/// The hop limit of everything else, as that of Linux.
const HOPS: u8 = 64;
/// The code of a reassembly time that is exceeded (RFC 4443, 3.3), for which smoltcp has a name too.
const REASSEMBLY_TIME: u8 = 1;

/// The group of all nodes of a link (RFC 4291, 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// The group of all routers of a link (RFC 4291, 2.7.1).
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
/// The group of all DHCPv6 servers and relay agents of a link (RFC 8415, 7.1).
const DHCP_SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// What a [`Gateway`](super::Gateway) did with the IPv6 packets that it was given. Each packet is in one
/// of these, except in `conflicts`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ipv6Stats {
    /// Neighbour solicitations for its addresses that it answered.
    pub neighbor_advertisements: u64,
    /// Router solicitations that it answered.
    pub router_advertisements: u64,
    /// Pings of its addresses that it answered.
    pub echo_replies: u64,
    /// DHCPv6 Information-requests that it answered.
    pub dhcp_replies: u64,
    /// Router solicitations and DHCPv6 messages that it did not read, because the sender's port had
    /// sent as many as it can send.
    pub solicitations_limited: u64,
    /// TCP segments that it answered with a reset.
    pub refused_tcp: u64,
    /// UDP datagrams that it answered with "port unreachable".
    pub refused_udp: u64,
    /// Packets that it answered with "parameter problem": of an unknown protocol, or with an extension
    /// header or an option that it does not know.
    pub refused_protocol: u64,
    /// Fragmented datagrams that it answered with "fragment reassembly time exceeded".
    pub refused_fragments: u64,
    /// Packets to other addresses that it answered with "no route", "address unreachable" or "beyond
    /// scope".
    pub refused_route: u64,
    /// Packets that it would have refused with an error, if the sender's port had not got as many as
    /// it can get.
    pub errors_limited: u64,
    /// Neighbour discovery that asks nothing of it.
    pub other_neighbors: u64,
    /// Router advertisements and redirects of others, which no guest should send.
    pub foreign_routers: u64,
    /// DHCPv6 messages that it does not answer, because they are no Information-request to all servers,
    /// or one that is for another server or asks for an address.
    pub other_dhcp: u64,
    /// ICMPv6 messages that get no answer.
    pub other_icmp: u64,
    /// TCP segments that are resets themselves.
    pub resets: u64,
    /// The later fragments of datagrams that it refused.
    pub later_fragments: u64,
    /// Packets to a group that it does not serve, and packets to one host in a frame to many.
    pub multicasts: u64,
    /// Packets with an option that says that they are to be dropped, and packets without a payload.
    pub discarded: u64,
    /// Packets whose source is not another host of the network, so that an answer would go astray.
    pub bad_source: u64,
    /// Packets with an invalid length, checksum or field.
    pub malformed: u64,
    /// Replies for which the caller's buffer was too short.
    pub unsent: u64,
    /// Packets of stations that claim one of the gateway's own addresses. They are counted once more, as
    /// what they are.
    pub conflicts: u64,
}

/// What became of a packet: the counters of [`Ipv6Stats`], in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    NeighborAdvertisement,
    RouterAdvertisement,
    EchoReply,
    DhcpReply,
    SolicitationLimited,
    RefusedTcp,
    RefusedUdp,
    RefusedProtocol,
    RefusedFragments,
    RefusedRoute,
    ErrorLimited,
    OtherNeighbor,
    ForeignRouter,
    OtherDhcp,
    OtherIcmp,
    Reset,
    LaterFragment,
    Multicast,
    Discarded,
    BadSource,
    Malformed,
    Unsent,
    Conflict,
}

const COUNTERS: usize = Event::Conflict as usize + 1;

fn malformed<E>(_: E) -> Event {
    Event::Malformed
}

/// An IPv6 packet, and where and when it came in.
pub(super) struct Arrival<'a> {
    /// What is behind the Ethernet header.
    pub(super) bytes: &'a [u8],
    pub(super) port: u32,
    pub(super) now: Duration,
    pub(super) from: EthernetAddress,
    /// The frame is to many, and not to the gateway alone.
    pub(super) to_many: bool,
}

/// The header of a packet and where its payload is.
struct Header<'a> {
    from: Ipv6Addr,
    to: Ipv6Addr,
    /// The differentiated services, which are six bits.
    dscp: u8,
    /// The IP packet, without what is behind it in the frame.
    packet: &'a [u8],
}

/// What a packet carries behind its extension headers.
struct Transport {
    protocol: IpProtocol,
    /// Where its header begins.
    at: usize,
    /// Where the header before names it.
    named_at: usize,
}

/// Why what a packet carries is not read.
enum Stop {
    Malformed,
    /// The packet is a fragment of the payload at `at`.
    Fragment {
        transport: Transport,
        is_first: bool,
    },
    /// A header or an option is unknown.
    Problem {
        code: Icmpv6ParamProblem,
        /// Where it is.
        at: usize,
        /// Whether senders to a group are told as well.
        to_groups: bool,
    },
    /// There is nothing to be read, or an option says that the packet is to be dropped.
    Discard,
}

/// An ICMPv6 error.
#[derive(Clone, Copy)]
struct IcmpError {
    kind: Icmpv6Message,
    code: u8,
    /// The word in front of what the error quotes.
    word: u32,
}

impl IcmpError {
    fn unreachable(why: Icmpv6DstUnreachable) -> Self {
        Self { kind: Icmpv6Message::DstUnreachable, code: why.into(), word: 0 }
    }

    fn problem(code: Icmpv6ParamProblem, at: usize) -> Self {
        Self { kind: Icmpv6Message::ParamProblem, code: code.into(), word: at as u32 }
    }

    const REASSEMBLY: Self =
        Self { kind: Icmpv6Message::TimeExceeded, code: REASSEMBLY_TIME, word: 0 };
}

/// The gateway's side of IPv6.
pub(super) struct Ipv6 {
    config: Ipv6Config,
    mac: EthernetAddress,
    link_local: Ipv6Addr,
    mtu: Option<u32>,
    /// The MAC addresses of the groups that it is a member of.
    groups: [[u8; 6]; 5],
    /// Whether it leads to the world.
    is_router: AtomicBool,
    /// When each port is to get an advertisement that it has not asked for, in milliseconds. At 0 it is to
    /// get one now.
    due: Box<[AtomicU64]>,
    solicitations: Limiter,
    neighbors: Neighbors,
    counters: [AtomicU64; COUNTERS],
}

impl Ipv6 {
    pub(super) fn new(config: Ipv6Config, mac: MacAddr6, mtu: Option<u32>) -> Self {
        let link_local = link_local(mac);
        let own = [link_local, config.gateway()].map(solicited_node);
        let groups = [ALL_NODES, ALL_ROUTERS, DHCP_SERVERS, own[0], own[1]].map(group_mac);
        Self {
            config,
            mac: EthernetAddress(mac.into_array()),
            link_local,
            mtu,
            groups,
            is_router: AtomicBool::new(false),
            due: (0..MAX_PORTS).map(|_| AtomicU64::new(0)).collect(),
            solicitations: Limiter::new(SOLICITATIONS_PER_SECOND, SOLICITATIONS_AT_ONCE),
            neighbors: Neighbors::default(),
            counters: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    pub(super) fn config(&self) -> &Ipv6Config {
        &self.config
    }

    pub(super) fn link_local(&self) -> Ipv6Addr {
        self.link_local
    }

    pub(super) fn neighbors(&self) -> &Neighbors {
        &self.neighbors
    }

    /// Notes that the sender of a packet uses an address, if it can be a guest's of the prefix.
    fn note(&self, arrival: &Arrival<'_>, address: Ipv6Addr) {
        if self.config.contains(address) && self.is_host(address) {
            let neighbor = Neighbor { address, mac: arrival.from.0.into(), port: arrival.port };
            self.neighbors.note(neighbor, arrival.now);
        }
    }

    /// Writes the question who uses an address, for all stations, to the start of `out`, and returns the
    /// length of its frame. `None` if `out` is too short.
    pub(super) fn solicit(&self, target_addr: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
        let lladdr = Some(self.mac.into());
        let question = NdiscRepr::NeighborSolicit { target_addr, lladdr };
        let (from, to) = (self.link_local, solicited_node(target_addr));
        let (mac, len) = (EthernetAddress(group_mac(to)), question.buffer_len());
        let begun = self.begin(mac, (from, to), IpProtocol::Icmpv6, NEIGHBOR_HOPS, len, out);
        let (out, frame_len) = begun.ok()?;
        let mut out = Icmpv6Packet::new_unchecked(out);
        question.emit(&mut out);
        out.fill_checksum(&from, &to);
        Some(frame_len)
    }

    /// Whether it is a member of a group with this MAC address.
    pub(super) fn hears(&self, group: [u8; 6]) -> bool {
        self.groups.contains(&group)
    }

    /// Sets whether it leads to the world. Returns whether that has changed.
    pub(super) fn set_router(&self, is_router: bool) -> bool {
        // Relaxed: the value publishes nothing else.
        self.is_router.swap(is_router, Ordering::Relaxed) != is_router
    }

    pub(super) fn is_router(&self) -> bool {
        self.is_router.load(Ordering::Relaxed)
    }

    pub(super) fn stats(&self) -> Ipv6Stats {
        let get = |event: Event| self.counters[event as usize].load(Ordering::Relaxed);
        Ipv6Stats {
            neighbor_advertisements: get(Event::NeighborAdvertisement),
            router_advertisements: get(Event::RouterAdvertisement),
            echo_replies: get(Event::EchoReply),
            dhcp_replies: get(Event::DhcpReply),
            solicitations_limited: get(Event::SolicitationLimited),
            refused_tcp: get(Event::RefusedTcp),
            refused_udp: get(Event::RefusedUdp),
            refused_protocol: get(Event::RefusedProtocol),
            refused_fragments: get(Event::RefusedFragments),
            refused_route: get(Event::RefusedRoute),
            errors_limited: get(Event::ErrorLimited),
            other_neighbors: get(Event::OtherNeighbor),
            foreign_routers: get(Event::ForeignRouter),
            other_dhcp: get(Event::OtherDhcp),
            other_icmp: get(Event::OtherIcmp),
            resets: get(Event::Reset),
            later_fragments: get(Event::LaterFragment),
            multicasts: get(Event::Multicast),
            discarded: get(Event::Discarded),
            bad_source: get(Event::BadSource),
            malformed: get(Event::Malformed),
            unsent: get(Event::Unsent),
            conflicts: get(Event::Conflict),
        }
    }

    fn count(&self, event: Event) {
        self.counters[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Answers a packet: writes the frame of the reply, if there is one, to the start of `reply`, and
    /// returns its length.
    pub(super) fn handle(
        &self,
        arrival: &Arrival<'_>,
        errors: &Limiter,
        reply: &mut [u8],
    ) -> Option<usize> {
        match self.answer(arrival, errors, reply) {
            Ok((event, len)) => {
                self.count(event);
                Some(len)
            }
            Err(event) => {
                self.count(event);
                None
            }
        }
    }

    /// Writes an advertisement to all stations to the start of `out`, and returns the length of its
    /// frame. `None` if `out` is too short.
    pub(super) fn advertise(&self, out: &mut [u8]) -> Option<usize> {
        self.write_advertisement(EthernetAddress(group_mac(ALL_NODES)), ALL_NODES, out)
    }

    /// As [`advertise`](Self::advertise), if the port has had none for long.
    pub(super) fn advertise_if_due(
        &self,
        port: u32,
        now: Duration,
        out: &mut [u8],
    ) -> Option<usize> {
        let due = self.due[port as usize % MAX_PORTS].load(Ordering::Relaxed);
        let (now_ms, interval) =
            (now.as_millis() as u64, ADVERTISEMENT_INTERVAL.as_millis() as u64);
        // A moment beyond the interval comes from before the clock was set back.
        if (now_ms..=now_ms + interval).contains(&due) && due != now_ms {
            return None;
        }
        let len = self.advertise(out)?;
        self.has_advertised(port, now);
        Some(len)
    }

    /// Says that a port has another guest, which has got no advertisement.
    pub(super) fn port_joined(&self, port: u32) {
        self.due[port as usize % MAX_PORTS].store(0, Ordering::Relaxed);
    }

    fn has_advertised(&self, port: u32, now: Duration) {
        // Relaxed: the value publishes nothing else. Two senders of a port may each send one.
        let next = (now + ADVERTISEMENT_INTERVAL).as_millis() as u64;
        self.due[port as usize % MAX_PORTS].store(next, Ordering::Relaxed);
    }

    fn write_advertisement(
        &self,
        mac: EthernetAddress,
        to: Ipv6Addr,
        out: &mut [u8],
    ) -> Option<usize> {
        let Self { config, mtu, .. } = self;
        let is_router = self.is_router();
        let advertisement = Advertisement { config, mac: self.mac, mtu: *mtu, is_router };
        let len = advertisement.len();
        let addresses = (self.link_local, to);
        let (out, frame_len) =
            self.begin(mac, addresses, IpProtocol::Icmpv6, NEIGHBOR_HOPS, len, out).ok()?;
        advertisement.write(self.link_local, to, out);
        Some(frame_len)
    }

    /// Whether an address is the gateway's.
    fn is_own(&self, address: Ipv6Addr) -> bool {
        address == self.link_local || address == self.config.gateway()
    }

    /// Whether an address can be another host's: it is link-local, or of the prefix and not the anycast
    /// address of its routers (RFC 4291, 2.6.1).
    fn is_host(&self, address: Ipv6Addr) -> bool {
        let of_prefix = self.config.contains(address) && address != self.config.prefix;
        (address.is_unicast_link_local() || of_prefix) && !self.is_own(address)
    }

    /// The address from which an answer to a packet goes: the one that the packet was for, or the one of
    /// the same scope as its sender's.
    fn answers_from(&self, header: &Header<'_>) -> Ipv6Addr {
        if self.is_own(header.to) {
            header.to
        } else if header.from.is_unicast_link_local() {
            self.link_local
        } else {
            self.config.gateway()
        }
    }

    fn answer(
        &self,
        arrival: &Arrival<'_>,
        errors: &Limiter,
        reply: &mut [u8],
    ) -> Result<(Event, usize), Event> {
        let ip = Ipv6Packet::new_checked(arrival.bytes).map_err(malformed)?;
        if ip.version() != 6 {
            return Err(Event::Malformed);
        }
        let header = Header {
            from: ip.src_addr(),
            to: ip.dst_addr(),
            dscp: ip.traffic_class() >> 2,
            packet: &arrival.bytes[..ip.total_len()],
        };
        let Header { from, to, packet, .. } = header;
        if to.is_multicast() {
            if !self.hears(group_mac(to)) || to.segments()[0] != ALL_NODES.segments()[0] {
                return Err(Event::Multicast);
            }
        } else if arrival.to_many {
            // RFC 1122, 3.3.6 demands this of IPv4, and it holds here too.
            return Err(Event::Multicast);
        }
        if self.is_own(from) {
            self.count(Event::Conflict);
        }
        // A station without an address does neighbour discovery only (RFC 4861, 4.1 and 4.3).
        if !self.is_host(from) && !from.is_unspecified() {
            return Err(Event::BadSource);
        }
        let transport = transport(packet);
        let mut refuse = |event, error, protocol, at| {
            let cause = (&header, protocol, at);
            self.refuse(arrival, cause, errors, event, error, reply)
        };
        if !to.is_multicast() && !self.is_own(to) {
            let why = if to.is_unicast_link_local() || self.config.contains(to) {
                Icmpv6DstUnreachable::AddrUnreachable
            } else if from.is_unicast_link_local() {
                Icmpv6DstUnreachable::BeyondScope
            } else {
                Icmpv6DstUnreachable::NoRoute
            };
            // What it carries matters only if it may be an error itself.
            let Transport { protocol, at, .. } = match transport {
                Ok(transport) => transport,
                Err(Stop::Fragment { transport, is_first: true }) => transport,
                Err(Stop::Fragment { .. }) => return Err(Event::LaterFragment),
                // A router looks at no more than the options for every hop (RFC 8200, 4).
                Err(Stop::Problem { .. } | Stop::Discard) => {
                    let (protocol, at, named_at) = (IpProtocol::Ipv6NoNxt, packet.len(), 0);
                    Transport { protocol, at, named_at }
                }
                Err(Stop::Malformed) => return Err(Event::Malformed),
            };
            return refuse(Event::RefusedRoute, IcmpError::unreachable(why), protocol, at);
        }
        let Transport { protocol, at, named_at } = match transport {
            Ok(transport) => transport,
            Err(Stop::Malformed) => return Err(Event::Malformed),
            Err(Stop::Discard) => return Err(Event::Discarded),
            Err(Stop::Fragment { is_first: false, .. }) => return Err(Event::LaterFragment),
            Err(Stop::Fragment { .. } | Stop::Problem { to_groups: false, .. })
                if to.is_multicast() =>
            {
                return Err(Event::Multicast);
            }
            Err(Stop::Fragment { transport: Transport { protocol, at, .. }, .. }) => {
                return refuse(Event::RefusedFragments, IcmpError::REASSEMBLY, protocol, at);
            }
            Err(Stop::Problem { code, at, .. }) => {
                let error = IcmpError::problem(code, at);
                return refuse(Event::RefusedProtocol, error, IpProtocol::Ipv6NoNxt, packet.len());
            }
        };
        let payload = &packet[at..];
        if protocol == IpProtocol::Icmpv6 {
            return self.answer_icmp(arrival, &header, payload, reply);
        }
        if from.is_unspecified() {
            return Err(Event::BadSource);
        }
        match protocol {
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(payload).map_err(malformed)?;
                // A checksum is mandatory (RFC 8200, 8.1).
                if udp.checksum() == 0 || !udp.verify_checksum(&from.into(), &to.into()) {
                    return Err(Event::Malformed);
                }
                if udp.dst_port() == dhcpv6::SERVER_PORT {
                    let len = self.answer_dhcp(arrival, &header, udp.payload(), reply)?;
                    return Ok((Event::DhcpReply, len));
                }
                if to.is_multicast() {
                    return Err(Event::Multicast);
                }
                let error = IcmpError::unreachable(Icmpv6DstUnreachable::PortUnreachable);
                refuse(Event::RefusedUdp, error, protocol, at)
            }
            _ if to.is_multicast() => Err(Event::Multicast),
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(payload).map_err(malformed)?;
                if !tcp.verify_checksum(&from.into(), &to.into()) {
                    return Err(Event::Malformed);
                }
                if tcp.rst() {
                    return Err(Event::Reset);
                }
                let (mac, addresses) = (arrival.from, (to, from));
                let (out, len) =
                    self.begin(mac, addresses, IpProtocol::Tcp, HOPS, TCP_HEADER_LEN, reply)?;
                fill_reset(&tcp, to.into(), from.into(), out);
                Ok((Event::RefusedTcp, len))
            }
            _ => {
                let unknown = Icmpv6ParamProblem::UnrecognizedNxtHdr;
                refuse(Event::RefusedProtocol, IcmpError::problem(unknown, named_at), protocol, at)
            }
        }
    }

    fn answer_icmp(
        &self,
        arrival: &Arrival<'_>,
        header: &Header<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Result<(Event, usize), Event> {
        let &Header { from, to, packet, .. } = header;
        let &[kind, code, ..] = message else { return Err(Event::Malformed) };
        if message.len() < ERROR_HEADER_LEN
            || !Icmpv6Packet::new_unchecked(message).verify_checksum(&from, &to)
        {
            return Err(Event::Malformed);
        }
        let kind = Icmpv6Message::from(kind);
        // RFC 4861, 6.1 and 7.1.
        let is_from_link =
            code == 0 && Ipv6Packet::new_unchecked(packet).hop_limit() == NEIGHBOR_HOPS;
        match kind {
            Icmpv6Message::EchoRequest if from.is_unspecified() => Err(Event::BadSource),
            Icmpv6Message::EchoRequest => {
                let len = self.answer_echo(arrival, header, message, reply)?;
                Ok((Event::EchoReply, len))
            }
            Icmpv6Message::NeighborSolicit
            | Icmpv6Message::NeighborAdvert
            | Icmpv6Message::RouterSolicit
                if !is_from_link =>
            {
                Err(Event::Malformed)
            }
            Icmpv6Message::NeighborSolicit => {
                let len = self.answer_neighbor(arrival, header, message, reply)?;
                Ok((Event::NeighborAdvertisement, len))
            }
            Icmpv6Message::NeighborAdvert => {
                if message.len() < NEIGHBOR_LEN || !options_are_valid(&message[NEIGHBOR_LEN..]) {
                    return Err(Event::Malformed);
                }
                let target = Icmpv6Packet::new_unchecked(message).target_addr();
                if self.is_own(target) {
                    self.count(Event::Conflict);
                }
                self.note(arrival, target);
                Err(Event::OtherNeighbor)
            }
            Icmpv6Message::RouterSolicit => {
                let options = &message[ROUTER_SOLICITATION_LEN..];
                if !options_are_valid(options) || from.is_unspecified() && names_source(options) {
                    return Err(Event::Malformed);
                }
                if !self.solicitations.allows(arrival.port, arrival.now) {
                    return Err(Event::SolicitationLimited);
                }
                let (mac, to) = reply_to(arrival, header);
                let len = self.write_advertisement(mac, to, reply).ok_or(Event::Unsent)?;
                self.has_advertised(arrival.port, arrival.now);
                Ok((Event::RouterAdvertisement, len))
            }
            Icmpv6Message::RouterAdvert | Icmpv6Message::Redirect => Err(Event::ForeignRouter),
            _ => Err(Event::OtherIcmp),
        }
    }

    /// Answers a neighbour solicitation (RFC 4861, 7.2.4), also that of a station which checks whether
    /// the address is free (RFC 4862, 5.4.3).
    fn answer_neighbor(
        &self,
        arrival: &Arrival<'_>,
        header: &Header<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Result<usize, Event> {
        let options = message.get(NEIGHBOR_LEN..).ok_or(Event::Malformed)?;
        let target_addr = Icmpv6Packet::new_unchecked(message).target_addr();
        let probes = header.from.is_unspecified();
        if !options_are_valid(options)
            || target_addr.is_multicast()
            || probes && (names_source(options) || header.to != solicited_node(target_addr))
        {
            return Err(Event::Malformed);
        }
        self.note(arrival, header.from);
        if !self.is_own(target_addr) {
            return Err(Event::OtherNeighbor);
        }
        let mut flags = NdiscNeighborFlags::ROUTER | NdiscNeighborFlags::OVERRIDE;
        if !probes {
            flags |= NdiscNeighborFlags::SOLICITED;
        }
        let lladdr = Some(self.mac.into());
        let answer = NdiscRepr::NeighborAdvert { flags, target_addr, lladdr };
        let (mac, to) = reply_to(arrival, header);
        let (addresses, len) = ((target_addr, to), answer.buffer_len());
        let (out, frame_len) =
            self.begin(mac, addresses, IpProtocol::Icmpv6, NEIGHBOR_HOPS, len, reply)?;
        let mut out = Icmpv6Packet::new_unchecked(out);
        answer.emit(&mut out);
        out.fill_checksum(&target_addr, &to);
        Ok(frame_len)
    }

    fn answer_echo(
        &self,
        arrival: &Arrival<'_>,
        header: &Header<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Result<usize, Event> {
        let checksums = ChecksumCapabilities::default();
        let packet = Icmpv6Packet::new_checked(message).map_err(malformed)?;
        let parsed = Icmpv6Repr::parse(&header.from, &header.to, &packet, &checksums);
        let Ok(Icmpv6Repr::EchoRequest { ident, seq_no, data }) = parsed else {
            return Err(Event::Malformed);
        };
        let echo = Icmpv6Repr::EchoReply { ident, seq_no, data };
        let (from, to) = (self.answers_from(header), header.from);
        let (addresses, len) = ((from, to), echo.buffer_len());
        let (out, frame_len) =
            self.begin(arrival.from, addresses, IpProtocol::Icmpv6, HOPS, len, reply)?;
        echo.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(out), &checksums);
        // The reply has the services that the request had.
        let ip = &mut reply[frame_len.min(frame::PAYLOAD_AT)..];
        Ipv6Packet::new_unchecked(ip).set_traffic_class(header.dscp << 2);
        Ok(frame_len)
    }

    fn answer_dhcp(
        &self,
        arrival: &Arrival<'_>,
        header: &Header<'_>,
        message: &[u8],
        reply: &mut [u8],
    ) -> Result<usize, Event> {
        // A server ignores what is sent to it alone (RFC 8415, 16).
        if header.to != DHCP_SERVERS {
            return Err(Event::OtherDhcp);
        }
        if !self.solicitations.allows(arrival.port, arrival.now) {
            return Err(Event::SolicitationLimited);
        }
        let server = dhcpv6::server_id(self.mac.0);
        let request = dhcpv6::parse(message, &server).map_err(|ignored| match ignored {
            dhcpv6::Ignored::Malformed => Event::Malformed,
            dhcpv6::Ignored::Other => Event::OtherDhcp,
        })?;
        let dns = &self.config.dns[..];
        let (from, to) = (self.link_local, header.from);
        let len = UDP_HEADER_LEN + request.reply_len(dns);
        let (out, frame_len) =
            self.begin(arrival.from, (from, to), IpProtocol::Udp, HOPS, len, reply)?;
        request.write_reply(&server, dns, &mut out[UDP_HEADER_LEN..]);
        let mut udp = UdpPacket::new_unchecked(out);
        udp.set_src_port(dhcpv6::SERVER_PORT);
        udp.set_dst_port(dhcpv6::CLIENT_PORT);
        udp.set_len(len as u16);
        udp.fill_checksum(&from.into(), &to.into());
        Ok(frame_len)
    }

    /// Answers with an ICMPv6 error, unless the packet is an error itself or has no sender (RFC 4443, 2.4
    /// e). What the packet carries begins at byte `at` and is of `protocol`.
    fn refuse(
        &self,
        arrival: &Arrival<'_>,
        (header, protocol, at): (&Header<'_>, IpProtocol, usize),
        errors: &Limiter,
        event: Event,
        error: IcmpError,
        reply: &mut [u8],
    ) -> Result<(Event, usize), Event> {
        if header.from.is_unspecified() {
            return Err(Event::BadSource);
        }
        if protocol == IpProtocol::Icmpv6 && !is_query(&header.packet[at..]) {
            return Err(Event::OtherIcmp);
        }
        if !errors.allows(arrival.port, arrival.now) {
            return Err(Event::ErrorLimited);
        }
        let longest = ICMPV6_ERROR_MAX - IP_HEADER_LEN - ERROR_HEADER_LEN;
        let quoted = &header.packet[..header.packet.len().min(longest)];
        let (from, to) = (self.answers_from(header), header.from);
        let len = ERROR_HEADER_LEN + quoted.len();
        let (out, frame_len) =
            self.begin(arrival.from, (from, to), IpProtocol::Icmpv6, HOPS, len, reply)?;
        out[ERROR_HEADER_LEN - 4..ERROR_HEADER_LEN].copy_from_slice(&error.word.to_be_bytes());
        out[ERROR_HEADER_LEN..].copy_from_slice(quoted);
        let mut icmp = Icmpv6Packet::new_unchecked(out);
        icmp.set_msg_type(error.kind);
        icmp.set_msg_code(error.code);
        icmp.fill_checksum(&from, &to);
        Ok((event, frame_len))
    }

    /// Writes the Ethernet and the IP header of a packet. Returns its payload of `len` bytes, to be
    /// written, and the length of the frame.
    fn begin<'a>(
        &self,
        mac: EthernetAddress,
        (src_addr, dst_addr): (Ipv6Addr, Ipv6Addr),
        next_header: IpProtocol,
        hop_limit: u8,
        len: usize,
        out: &'a mut [u8],
    ) -> Result<(&'a mut [u8], usize), Event> {
        let ip_len = IP_HEADER_LEN + len;
        let begun = frame::begin(out, mac, self.mac, EthernetProtocol::Ipv6, ip_len);
        let (out, frame_len) = begun.ok_or(Event::Unsent)?;
        let (head, payload) = out.split_at_mut(IP_HEADER_LEN);
        Ipv6Repr { src_addr, dst_addr, next_header, payload_len: len, hop_limit }
            .emit(&mut Ipv6Packet::new_unchecked(head));
        Ok((payload, frame_len))
    }
}

/// Where the answer to neighbour discovery goes: to who has asked, or to all stations behind its port if
/// it has no address yet.
fn reply_to(arrival: &Arrival<'_>, header: &Header<'_>) -> (EthernetAddress, Ipv6Addr) {
    match header.from {
        from if from.is_unspecified() => (EthernetAddress(group_mac(ALL_NODES)), ALL_NODES),
        from => (arrival.from, from),
    }
}

/// Whether an ICMPv6 message is informational, so that an error may answer it (RFC 4443, 2.1), and no
/// redirect.
fn is_query(message: &[u8]) -> bool {
    message
        .first()
        .is_some_and(|&kind| kind >= 128 && Icmpv6Message::from(kind) != Icmpv6Message::Redirect)
}

/// The options of neighbour discovery, each with its number (RFC 4861, 4.6), and at the end `None` for
/// one with an invalid length.
fn options(mut rest: &[u8]) -> impl Iterator<Item = Option<u8>> {
    core::iter::from_fn(move || {
        let &[kind, units, ..] = rest else {
            return (!core::mem::take(&mut rest).is_empty()).then_some(None);
        };
        // The unit is 8 bytes.
        match rest.get(usize::from(units) * 8..) {
            Some(after) if units > 0 => {
                rest = after;
                Some(Some(kind))
            }
            _ => {
                rest = &[];
                Some(None)
            }
        }
    })
}

fn options_are_valid(bytes: &[u8]) -> bool {
    options(bytes).all(|option| option.is_some())
}

fn names_source(bytes: &[u8]) -> bool {
    options(bytes).any(|option| option == Some(SOURCE_LINK_LAYER))
}

/// Finds what a packet carries, behind its extension headers (RFC 8200, 4).
fn transport(packet: &[u8]) -> Result<Transport, Stop> {
    let (mut named_at, mut at) = (NEXT_HEADER_AT, IP_HEADER_LEN);
    for _ in 0..IPV6_EXTENSION_HEADERS {
        let protocol = IpProtocol::from(packet[named_at]);
        let byte = |index: usize| packet.get(index).copied().ok_or(Stop::Malformed);
        match protocol {
            // It comes first or not at all (RFC 8200, 4.1).
            IpProtocol::HopByHop if at != IP_HEADER_LEN => {
                let code = Icmpv6ParamProblem::UnrecognizedNxtHdr;
                return Err(Stop::Problem { code, at: named_at, to_groups: false });
            }
            IpProtocol::HopByHop | IpProtocol::Ipv6Opts => {
                let end = at + (usize::from(byte(at + 1)?) + 1) * 8;
                let options = packet.get(..end).ok_or(Stop::Malformed)?;
                check_options(options, at + 2)?;
                (named_at, at) = (at, end);
            }
            IpProtocol::Ipv6Route => {
                // A route that is used up is skipped, and no other is known (RFC 8200, 4.4).
                if byte(at + 3)? != 0 {
                    let code = Icmpv6ParamProblem::ErroneousHdrField;
                    return Err(Stop::Problem { code, at: at + 2, to_groups: false });
                }
                let end = at + (usize::from(byte(at + 1)?) + 1) * 8;
                (named_at, at) = (at, end);
            }
            IpProtocol::Ipv6Frag => {
                let field = u16::from_be_bytes([byte(at + 2)?, byte(at + 3)?]);
                byte(at + 7)?;
                let protocol = IpProtocol::from(packet[at]);
                let transport = Transport { protocol, at: at + 8, named_at: at };
                return Err(Stop::Fragment { transport, is_first: field >> 3 == 0 });
            }
            IpProtocol::Ipv6NoNxt => return Err(Stop::Discard),
            _ if at > packet.len() => return Err(Stop::Malformed),
            protocol => return Ok(Transport { protocol, at, named_at }),
        }
        if at > packet.len() {
            return Err(Stop::Malformed);
        }
    }
    Err(Stop::Malformed)
}

/// Looks for an option that a node must not skip although it does not know it (RFC 8200, 4.2), from
/// byte `at` of a header that ends with `bytes`.
fn check_options(bytes: &[u8], mut at: usize) -> Result<(), Stop> {
    const PAD1: u8 = 0;
    const PADN: u8 = 1;
    /// The option of RFC 2711.
    const ROUTER_ALERT: u8 = 5;
    while at < bytes.len() {
        let kind = bytes[at];
        if kind == PAD1 {
            at += 1;
            continue;
        }
        let len = usize::from(*bytes.get(at + 1).ok_or(Stop::Malformed)?);
        if at + 2 + len > bytes.len() {
            return Err(Stop::Malformed);
        }
        let code = Icmpv6ParamProblem::UnrecognizedOption;
        match kind >> 6 {
            _ if matches!(kind, PADN | ROUTER_ALERT) => {}
            0 => {}
            1 => return Err(Stop::Discard),
            action => return Err(Stop::Problem { code, at, to_groups: action == 2 }),
        }
        at += 2 + len;
    }
    Ok(())
}
