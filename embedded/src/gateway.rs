//! The host's end of an embedded network: ARP, ICMP echo and DHCP at the first address, their like over
//! IPv6, and a refusal of everything else.
//!
//! [`Gateway::handle`] is a function from frame to frames. It knows no buffer and no thread, so
//! tests and fuzzers can call it directly. Nothing in a frame makes it panic. smoltcp parses and
//! emits the packets.
//!
//! What the gateway does not serve is refused at once, so that nobody waits for it:
//!
//! | packet | answer |
//! |---|---|
//! | a TCP segment to the gateway | a reset |
//! | a UDP datagram to the gateway, except DHCP | ICMP port unreachable |
//! | another protocol to the gateway | ICMP protocol unreachable |
//! | a fragmented datagram to the gateway, for example a big ping | ICMP fragment reassembly time exceeded, for its first fragment |
//! | a packet to another network | ICMP network unreachable: there is no way out |
//! | a packet to another host of the network, which need not come this way | ICMP host unreachable |
//!
//! # IPv6
//!
//! A gateway [with IPv6](Gateway::with_ipv6) has two addresses: a link-local one, and the first of the
//! network's prefix. It answers neighbour solicitations for both, also those of stations that probe
//! whether an address is free, and pings. Router solicitations get an advertisement with the prefix, the
//! MTU, and name servers (RFC 8106). A guest gets its address from it alone (RFC 4862). DHCPv6 tells the
//! name servers and gives out no address.
//!
//! The advertisement names the gateway as a default router while
//! [`set_ipv6_router`](Gateway::set_ipv6_router) says so. It lasts
//! [`ROUTER_LIFETIME`](crate::limits::ROUTER_LIFETIME); the prefix and the name servers last for ever.
//! The gateway has no timer. A [network](crate::network#ipv6) says when it sends advertisements that
//! nobody has asked for.
//!
//! What is not served is refused as over IPv4, by the errors of ICMPv6: port unreachable, parameter
//! problem for a protocol or an option, fragment reassembly time exceeded, no route, and address
//! unreachable. A packet from a link-local address to another network is beyond its scope. An error
//! answers no error, no packet to a group, except for an unknown option, and no later fragment (RFC 4443,
//! 2.4).
//!
//! # Limits
//!//!
//! An ICMP error answers no ICMP error, no broadcast, no later fragment and no invalid packet (RFC
//! 1812, 4.3.2.7), and each port gets at most 100 errors per second. Of the DHCP messages of one port
//! at most 1,000 per second are read, because an answer can ask all ports whether an address is in use. Of
//! the router solicitations and DHCPv6 messages of one port together at most 10 per second are answered.
//! Every frame is counted, by what became of it.
//!
//! The gateway reads a frame with a priority tag (IEEE 802.1Q) like one without a tag. Its own
//! frames have none, and are padded to Ethernet's 60 bytes.

mod dhcpv6;
mod ipv6;
mod neighbors;
mod refusal;
mod router;
mod v6;

use core::fmt;
use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_SERVER_PORT, EthernetAddress, EthernetProtocol,
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, Icmpv4TimeExceeded, IpProtocol,
    Ipv4Packet, Ipv4Repr, TcpPacket, UdpPacket,
};
use vmring_core::sync::{AtomicU64, Ordering};

pub use crate::frame::Answer;
pub use ipv6::Ipv6Config;
pub use neighbors::Neighbor;
pub use v6::Ipv6Stats;

use crate::dhcp::{DhcpConfig, DhcpServer};
use crate::frame::{self, HeaderError};
use crate::limits::{
    DHCP_MESSAGES_AT_ONCE, DHCP_MESSAGES_PER_SECOND, ICMP_ERRORS_AT_ONCE, ICMP_ERRORS_PER_SECOND,
};
pub(crate) use dhcpv6::SERVER_PORT as DHCPV6_SERVER_PORT;
use refusal::{IP_HEADER_LEN, IcmpError, Limiter, RESET_LEN, emit_ip, write_reset};
use v6::Ipv6;

/// The host's end of a network. See the [module](self).
pub struct Gateway {
    mac: MacAddr6,
    address: Ipv4Addr,
    dhcp: DhcpServer,
    ipv6: Option<Ipv6>,
    errors: Limiter,
    dhcp_messages: Limiter,
    counters: [AtomicU64; COUNTERS],
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gateway")
            .field("mac", &self.mac)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

/// What a [`Gateway`] did with the frames it was given. Each frame is in one of these, except in
/// `arp_conflicts`. A packet of IPv6 is in one of those of `ipv6`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GatewayStats {
    /// ARP requests for its address that it answered.
    pub arp_replies: u64,
    /// Pings of its address that it answered.
    pub echo_replies: u64,
    /// DHCP messages that its DHCP server has seen. [`DhcpServer::stats`] says what became of them.
    pub dhcp_messages: u64,
    /// DHCP messages that its DHCP server has not seen, because the sender's port had sent as many as
    /// it can send.
    pub dhcp_limited: u64,
    /// TCP segments that it answered with a reset.
    pub refused_tcp: u64,
    /// UDP datagrams that it answered with "port unreachable".
    pub refused_udp: u64,
    /// Packets that it answered with "protocol unreachable".
    pub refused_protocol: u64,
    /// Fragmented datagrams that it answered with "fragment reassembly time exceeded".
    pub refused_fragments: u64,
    /// Packets to other addresses that it answered with "network unreachable" or "host
    /// unreachable".
    pub refused_route: u64,
    /// Packets that it would have refused with an ICMP error, if the sender's port had not got as
    /// many as it can get.
    pub errors_limited: u64,
    /// ARP packets that are not requests for its address.
    pub other_arp: u64,
    /// ICMP messages that get no answer: all but echo requests.
    pub other_icmp: u64,
    /// TCP segments that are resets themselves.
    pub resets: u64,
    /// The later fragments of datagrams that it refused.
    pub later_fragments: u64,
    /// IPv4 broadcasts and multicasts, and packets to one host in a broadcast frame.
    pub broadcasts: u64,
    /// Packets of a protocol other than ARP, IPv4 and, if the gateway has it, IPv6.
    pub other_ethertype: u64,
    /// Frames of a VLAN.
    pub vlan: u64,
    /// Frames to another MAC address.
    pub not_for_us: u64,
    /// Packets whose source is not another host of the network, so that an answer would go astray.
    pub bad_source: u64,
    /// Frames with an invalid length, checksum or field.
    pub malformed: u64,
    /// Replies for which the caller's buffer was too short.
    pub unsent: u64,
    /// ARP packets of stations that claim the gateway's own address. They are counted once more, as
    /// what they are.
    pub arp_conflicts: u64,
    /// What it did with packets of IPv6. Without IPv6 all are 0.
    pub ipv6: Ipv6Stats,
}

/// What became of a frame: the counters of [`GatewayStats`], in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    ArpReply,
    EchoReply,
    Dhcp,
    DhcpLimited,
    RefusedTcp,
    RefusedUdp,
    RefusedProtocol,
    RefusedFragments,
    RefusedRoute,
    ErrorLimited,
    OtherArp,
    OtherIcmp,
    Reset,
    LaterFragment,
    Broadcast,
    OtherEthertype,
    Vlan,
    NotForUs,
    BadSource,
    Malformed,
    Unsent,
    ArpConflict,
}

const COUNTERS: usize = Event::ArpConflict as usize + 1;

/// A frame that gets an answer: the frame's length, or whatever the DHCP server or the side of IPv6 says.
enum Answered {
    Frame(Event, usize),
    Dhcp(Answer),
    /// A packet of IPv6, which is counted already, and the length of its answer's frame.
    Ipv6(Option<usize>),
}

fn malformed<E>(_: E) -> Event {
    Event::Malformed
}

/// A frame, and where and when it came in.
struct Arrival<'a> {
    frame: &'a [u8],
    port: u32,
    now: Duration,
    from: EthernetAddress,
    /// The frame is to all, and not to the gateway alone.
    broadcast: bool,
}

impl Gateway {
    /// Makes a gateway with the IPv4 and MAC addresses of the server in `dhcp`.
    pub fn new(dhcp: DhcpConfig) -> Self {
        Self {
            mac: dhcp.server_mac,
            address: dhcp.server,
            dhcp: DhcpServer::new(dhcp),
            ipv6: None,
            errors: Limiter::new(ICMP_ERRORS_PER_SECOND, ICMP_ERRORS_AT_ONCE),
            dhcp_messages: Limiter::new(DHCP_MESSAGES_PER_SECOND, DHCP_MESSAGES_AT_ONCE),
            counters: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Gives the gateway IPv6 addresses. The caller must check the configuration: the prefix has 64 bits.
    /// The gateway tells guests the MTU that DHCP tells them.
    #[must_use]
    pub fn with_ipv6(mut self, config: Ipv6Config) -> Self {
        let mtu = self.dhcp.config().mtu.map(u32::from);
        self.ipv6 = Some(Ipv6::new(config, self.mac, mtu));
        self
    }

    /// Returns its IPv6 settings, if it has IPv6.
    pub fn ipv6(&self) -> Option<&Ipv6Config> {
        self.ipv6.as_ref().map(Ipv6::config)
    }

    /// Returns its link-local address, if it has IPv6.
    pub fn link_local(&self) -> Option<Ipv6Addr> {
        self.ipv6.as_ref().map(Ipv6::link_local)
    }

    /// Sets whether guests use the gateway as their default router of IPv6. At first they do not.
    /// Returns whether this has changed. Then guests are to be told, by
    /// [`router_advertisement`](Self::router_advertisement).
    ///
    /// It should be so while the host has a default route itself. Otherwise guests would try IPv6 in vain
    /// before they try IPv4.
    pub fn set_ipv6_router(&self, is_router: bool) -> bool {
        self.ipv6.as_ref().is_some_and(|ipv6| ipv6.set_router(is_router))
    }

    /// Writes a router advertisement for all stations to the start of `out`, and returns the length of its
    /// frame. `None` if the gateway has no IPv6 or if `out` is too short.
    pub fn router_advertisement(&self, out: &mut [u8]) -> Option<usize> {
        self.ipv6.as_ref()?.advertise(out)
    }

    /// As [`router_advertisement`](Self::router_advertisement), if a port has got none for
    /// [`ADVERTISEMENT_INTERVAL`](crate::limits::ADVERTISEMENT_INTERVAL), or none since it has joined.
    pub(crate) fn router_advertisement_if_due(
        &self,
        port: u32,
        out: &mut [u8],
        now: Duration,
    ) -> Option<usize> {
        self.ipv6.as_ref()?.advertise_if_due(port, now, out)
    }

    /// Returns a number that is another one when [`neighbors`](Self::neighbors) has more. It is 0 at first.
    /// It takes no lock.
    pub fn neighbor_changes(&self) -> u64 {
        self.ipv6.as_ref().map_or(0, |ipv6| ipv6.neighbors().changes())
    }

    /// Returns which stations have said since `change` that they use an address of the prefix, in
    /// neighbour solicitations to the gateway or in advertisements, in that order. `change` is a number that
    /// [`neighbor_changes`](Self::neighbor_changes) has returned. An interface that has left is not named.
    pub fn neighbors(&self, change: u64) -> Vec<Neighbor> {
        self.ipv6.as_ref().map_or_else(Vec::new, |ipv6| ipv6.neighbors().after(change))
    }

    /// Writes the question who uses an address of the prefix (RFC 4861, 4.3), for all stations, to the
    /// start of `out`. Returns the length of its frame. `None` if the gateway has no IPv6 or if `out` is too
    /// short.
    pub fn neighbor_solicitation(&self, address: Ipv6Addr, out: &mut [u8]) -> Option<usize> {
        self.ipv6.as_ref()?.solicit(address, out)
    }

    /// As [`neighbor_solicitation`](Self::neighbor_solicitation), for an address of IPv4 (RFC 826).
    pub fn arp_request(&self, address: Ipv4Addr, out: &mut [u8]) -> Option<usize> {
        let question = self.dhcp.question(address)?;
        out.get_mut(..question.len())?.copy_from_slice(&question);
        Some(question.len())
    }

    /// Says that another interface has got this number.
    pub(crate) fn port_joined(&self, port: u32) {
        if let Some(ipv6) = &self.ipv6 {
            ipv6.port_joined(port);
        }
    }

    /// Forgets who is behind an interface, because it has left.
    pub(crate) fn port_left(&self, port: u32) {
        self.dhcp.port_left(port);
        if let Some(ipv6) = &self.ipv6 {
            ipv6.neighbors().forget(port);
        }
    }

    /// Returns whether frames to this group are for the gateway too: broadcasts, and those of the groups
    /// of IPv6 that it is a member of.
    pub fn hears(&self, group: MacAddr6) -> bool {
        group.is_broadcast() || self.hears_group(group.into_array())
    }

    fn hears_group(&self, group: [u8; 6]) -> bool {
        self.ipv6.as_ref().is_some_and(|ipv6| ipv6.hears(group))
    }

    /// Returns its MAC address.
    pub fn mac(&self) -> MacAddr6 {
        self.mac
    }

    /// Returns its IPv4 address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns its DHCP server.
    pub fn dhcp(&self) -> &DhcpServer {
        &self.dhcp
    }

    /// Returns what it has done so far.
    pub fn stats(&self) -> GatewayStats {
        let get = |event: Event| self.counters[event as usize].load(Ordering::Relaxed);
        GatewayStats {
            arp_replies: get(Event::ArpReply),
            echo_replies: get(Event::EchoReply),
            dhcp_messages: get(Event::Dhcp),
            dhcp_limited: get(Event::DhcpLimited),
            refused_tcp: get(Event::RefusedTcp),
            refused_udp: get(Event::RefusedUdp),
            refused_protocol: get(Event::RefusedProtocol),
            refused_fragments: get(Event::RefusedFragments),
            refused_route: get(Event::RefusedRoute),
            errors_limited: get(Event::ErrorLimited),
            other_arp: get(Event::OtherArp),
            other_icmp: get(Event::OtherIcmp),
            resets: get(Event::Reset),
            later_fragments: get(Event::LaterFragment),
            broadcasts: get(Event::Broadcast),
            other_ethertype: get(Event::OtherEthertype),
            vlan: get(Event::Vlan),
            not_for_us: get(Event::NotForUs),
            bad_source: get(Event::BadSource),
            malformed: get(Event::Malformed),
            unsent: get(Event::Unsent),
            arp_conflicts: get(Event::ArpConflict),
            ipv6: self.ipv6.as_ref().map(Ipv6::stats).unwrap_or_default(),
        }
    }

    fn count(&self, event: Event) {
        self.counters[event as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Answers a frame: writes the reply, if there is one, to the start of `reply`. `port` is the
    /// number of the interface that the frame came from, which has limits of its own. `now` is the
    /// time since some fixed moment.
    ///
    /// No reply is longer than the frame and 28 bytes, or 48 bytes over IPv6, or than
    /// [`DHCP_REPLY_MAX`](crate::limits::DHCP_REPLY_MAX), whichever is more. If `reply` is shorter,
    /// some replies are not sent, which is counted.
    pub fn handle(&self, frame: &[u8], port: u32, reply: &mut [u8], now: Duration) -> Answer {
        match self.answer(frame, port, reply, now) {
            Ok(Answered::Frame(event, len)) => {
                self.count(event);
                Answer { reply: Some(len), to_all: None }
            }
            Ok(Answered::Ipv6(reply)) => Answer { reply, to_all: None },
            Ok(Answered::Dhcp(answer)) => {
                self.count(Event::Dhcp);
                answer
            }
            Err(event) => {
                self.count(event);
                Answer::default()
            }
        }
    }

    fn answer(
        &self,
        frame: &[u8],
        port: u32,
        reply: &mut [u8],
        now: Duration,
    ) -> Result<Answered, Event> {
        let (header, payload) = frame::split(frame).map_err(|error| match error {
            HeaderError::Runt => Event::Malformed,
            HeaderError::Vlan => Event::Vlan,
        })?;
        let from = header.from;
        let broadcast = header.to.is_broadcast();
        let is_ipv6 = header.ethertype == EthernetProtocol::Ipv6;
        let to_group = broadcast || is_ipv6 && self.hears_group(header.to.0);
        if header.to != self.ethernet() && !to_group {
            return Err(Event::NotForUs);
        }
        if !from.is_unicast() {
            return Err(Event::BadSource);
        }
        let arrival = Arrival { frame, port, now, from, broadcast };
        match header.ethertype {
            EthernetProtocol::Arp => {
                let len = self.answer_arp(&arrival, payload, reply)?;
                Ok(Answered::Frame(Event::ArpReply, len))
            }
            EthernetProtocol::Ipv4 => self.answer_ipv4(&arrival, payload, reply),
            EthernetProtocol::Ipv6 => {
                let ipv6 = self.ipv6.as_ref().ok_or(Event::OtherEthertype)?;
                let arrival = v6::Arrival { bytes: payload, port, now, from, to_many: to_group };
                Ok(Answered::Ipv6(ipv6.handle(&arrival, &self.errors, reply)))
            }
            _ => Err(Event::OtherEthertype),
        }
    }

    fn ethernet(&self) -> EthernetAddress {
        EthernetAddress(self.mac.into_array())
    }

    fn answer_arp(
        &self,
        arrival: &Arrival<'_>,
        payload: &[u8],
        reply: &mut [u8],
    ) -> Result<usize, Event> {
        let packet = ArpPacket::new_checked(payload).map_err(malformed)?;
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = ArpRepr::parse(&packet).map_err(malformed)?
        else {
            return Err(Event::OtherArp);
        };
        if source_protocol_addr == self.address {
            self.count(Event::ArpConflict);
        } else if source_hardware_addr == arrival.from {
            let mac = source_hardware_addr.0.into();
            self.dhcp.learn(mac, source_protocol_addr, arrival.port, arrival.now);
        }
        if operation != ArpOperation::Request || target_protocol_addr != self.address {
            return Err(Event::OtherArp);
        }
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: self.ethernet(),
            source_protocol_addr: self.address,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let (to, len) = (arrival.from, answer.buffer_len());
        let (out, len) = frame::begin(reply, to, self.ethernet(), EthernetProtocol::Arp, len)
            .ok_or(Event::Unsent)?;
        answer.emit(&mut ArpPacket::new_unchecked(out));
        Ok(len)
    }

    fn answer_ipv4(
        &self,
        arrival: &Arrival<'_>,
        payload: &[u8],
        reply: &mut [u8],
    ) -> Result<Answered, Event> {
        let ip = Ipv4Packet::new_checked(payload).map_err(malformed)?;
        // smoltcp accepts a header that is shorter than its own fields.
        if ip.version() != 4
            || usize::from(ip.header_len()) < IP_HEADER_LEN
            || !ip.verify_checksum()
        {
            return Err(Event::Malformed);
        }
        let packet = &payload[..usize::from(ip.total_len())];
        let is_fragment = ip.more_frags() || ip.frag_offset() != 0;
        let to = ip.dst_addr();
        let to_us = to == self.address;
        let to_subnet = to == self.dhcp.config().broadcast();
        let to_all = to.is_broadcast() || to_subnet || to.is_multicast();
        // A client that asks for an address has none yet, so its source is looked at by the server.
        if ip.next_header() == IpProtocol::Udp
            && (to_us || to_all)
            && !is_fragment
            && UdpPacket::new_checked(ip.payload()).map_err(malformed)?.dst_port()
                == DHCP_SERVER_PORT
        {
            if !self.dhcp_messages.allows(arrival.port, arrival.now) {
                return Err(Event::DhcpLimited);
            }
            let answer = self.dhcp.handle(arrival.frame, arrival.port, reply, arrival.now);
            return answer.map(Answered::Dhcp).ok_or(Event::Malformed);
        }
        if to_all || arrival.broadcast {
            return Err(Event::Broadcast);
        }
        if !self.dhcp.config().is_host(ip.src_addr()) {
            return Err(Event::BadSource);
        }
        if ip.frag_offset() != 0 {
            return Err(Event::LaterFragment);
        }
        let mut refuse = |event, error| self.refuse(arrival, &ip, packet, event, error, reply);
        if !to_us {
            let unreachable = if self.dhcp.config().is_on_subnet(to) {
                Icmpv4DstUnreachable::HostUnreachable
            } else {
                Icmpv4DstUnreachable::NetUnreachable
            };
            return refuse(Event::RefusedRoute, IcmpError::Unreachable(unreachable));
        }
        if is_fragment {
            let expired = IcmpError::TimeExceeded(Icmpv4TimeExceeded::FragExpired);
            return refuse(Event::RefusedFragments, expired);
        }
        match ip.next_header() {
            IpProtocol::Icmp => {
                let len = self.answer_echo(arrival, &ip, reply)?;
                Ok(Answered::Frame(Event::EchoReply, len))
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(ip.payload()).map_err(malformed)?;
                if !udp.verify_checksum(&ip.src_addr().into(), &to.into()) {
                    return Err(Event::Malformed);
                }
                let unreachable = IcmpError::Unreachable(Icmpv4DstUnreachable::PortUnreachable);
                refuse(Event::RefusedUdp, unreachable)
            }
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(ip.payload()).map_err(malformed)?;
                if !tcp.verify_checksum(&ip.src_addr().into(), &to.into()) {
                    return Err(Event::Malformed);
                }
                if tcp.rst() {
                    return Err(Event::Reset);
                }
                let (out, len) = self.begin_ip(arrival, RESET_LEN, reply)?;
                write_reset(&tcp, self.addresses(&ip, RESET_LEN), out);
                Ok(Answered::Frame(Event::RefusedTcp, len))
            }
            _ => {
                let unreachable = IcmpError::Unreachable(Icmpv4DstUnreachable::ProtoUnreachable);
                refuse(Event::RefusedProtocol, unreachable)
            }
        }
    }

    /// The addresses of an answer to `ip` whose IP packet has `len` bytes.
    fn addresses(&self, ip: &Ipv4Packet<&[u8]>, len: usize) -> Ipv4Repr {
        Ipv4Repr {
            src_addr: self.address,
            dst_addr: ip.src_addr(),
            next_header: IpProtocol::Icmp,
            payload_len: len - IP_HEADER_LEN,
            hop_limit: 64,
        }
    }

    /// Writes the Ethernet header of an answer. Returns its IP packet of `len` bytes, to be
    /// written, and the length of the frame.
    fn begin_ip<'a>(
        &self,
        arrival: &Arrival<'_>,
        len: usize,
        reply: &'a mut [u8],
    ) -> Result<(&'a mut [u8], usize), Event> {
        frame::begin(reply, arrival.from, self.ethernet(), EthernetProtocol::Ipv4, len)
            .ok_or(Event::Unsent)
    }

    /// Answers with an ICMP error, unless the packet is an ICMP error itself.
    fn refuse(
        &self,
        arrival: &Arrival<'_>,
        ip: &Ipv4Packet<&[u8]>,
        packet: &[u8],
        event: Event,
        error: IcmpError,
        reply: &mut [u8],
    ) -> Result<Answered, Event> {
        if ip.next_header() == IpProtocol::Icmp && !is_icmp_query(ip.payload()) {
            return Err(Event::OtherIcmp);
        }
        if !self.errors.allows(arrival.port, arrival.now) {
            return Err(Event::ErrorLimited);
        }
        let len = IcmpError::len(packet);
        let (out, frame_len) = self.begin_ip(arrival, len, reply)?;
        error.write(packet, self.addresses(ip, len), out);
        Ok(Answered::Frame(event, frame_len))
    }

    fn answer_echo(
        &self,
        arrival: &Arrival<'_>,
        ip: &Ipv4Packet<&[u8]>,
        reply: &mut [u8],
    ) -> Result<usize, Event> {
        let checksums = ChecksumCapabilities::default();
        let packet = Icmpv4Packet::new_checked(ip.payload()).map_err(malformed)?;
        if !packet.verify_checksum() {
            return Err(Event::Malformed);
        }
        if packet.msg_type() != Icmpv4Message::EchoRequest {
            return Err(Event::OtherIcmp);
        }
        let Icmpv4Repr::EchoRequest { ident, seq_no, data } =
            Icmpv4Repr::parse(&packet, &checksums).map_err(malformed)?
        else {
            return Err(Event::Malformed);
        };
        let echo = Icmpv4Repr::EchoReply { ident, seq_no, data };
        let len = IP_HEADER_LEN + echo.buffer_len();
        let (out, frame_len) = self.begin_ip(arrival, len, reply)?;
        let mut out = Ipv4Packet::new_unchecked(out);
        // The reply has the services that the request had (RFC 1812, 4.3.2.5).
        emit_ip(&self.addresses(ip, len), ip.dscp(), &mut out);
        echo.emit(&mut Icmpv4Packet::new_unchecked(out.payload_mut()), &checksums);
        Ok(frame_len)
    }
}

/// Whether an ICMP message is a query, which an ICMP error may answer (RFC 1812, 4.3.1).
fn is_icmp_query(message: &[u8]) -> bool {
    let kind = message.first().copied().map(Icmpv4Message::from);
    matches!(
        kind,
        Some(
            Icmpv4Message::EchoRequest
                | Icmpv4Message::EchoReply
                | Icmpv4Message::RouterSolicit
                | Icmpv4Message::Timestamp
                | Icmpv4Message::TimestampReply
        )
    )
}
