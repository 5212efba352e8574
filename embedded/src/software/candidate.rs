//! [`Candidate`]: a packet that may be merged with others of its flow, and what speaks against it.

use smoltcp::wire::{EthernetProtocol, IpProtocol};
use vmring_core::offload::{Checksum, Gso, OffloadHeader};

use super::checksum::sum;
use super::headers::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, TCP_CHECKSUM_AT, UDP_CHECKSUM_AT, UDP_HEADER_LEN,
    behind_ethernet,
};

/// The don't-fragment bit in the IPv4 header's word of flags and fragment offset (RFC 791, section 3.1).
const DONT_FRAGMENT: u16 = 0x4000;
const TCP_HEADER_LEN: usize = smoltcp::wire::TCP_HEADER_LEN;
/// The longest TCP header (RFC 9293, section 3.1: a length of 15 words).
const TCP_HEADER_LEN_MAX: usize = 60;

/// The bits in byte 13 of a TCP header (RFC 9293, section 3.1).
pub(super) mod flags {
    pub(crate) const FIN: u8 = 0x01;
    const SYN: u8 = 0x02;
    const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    const URG: u8 = 0x20;
    pub(crate) const CWR: u8 = 0x80;
    /// What cannot be repeated in each segment.
    pub(crate) const UNMERGEABLE: u8 = SYN | RST | URG;
    /// What only the last segment of a merged packet has.
    pub(crate) const LAST: u8 = FIN | PSH;
}

/// The flow of a packet: packets with the same key must stay in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FlowKey {
    pub(super) is_v4: bool,
    pub(super) is_tcp: bool,
    /// Source and destination, with zeros behind those of IPv4.
    addresses: [u8; 32],
    ports: [u8; 4],
}

/// What a packet means to the flows under way.
#[derive(Clone, Copy, Debug)]
pub(super) enum Class {
    /// It is neither TCP nor UDP over IP.
    Foreign,
    /// It may be of any flow: a fragment, a packet with IP options or extension headers, or one that
    /// is malformed.
    Unclear,
    /// It is of this flow, and is not to be merged.
    Lone(FlowKey),
    /// It may be merged.
    Candidate(Candidate),
}

/// What is known of the checksum of a transport header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// It is complete, and somebody must verify it.
    Unverified,
    /// It is complete, and is known to be right.
    Verified,
    /// It holds the sum of the pseudo header, and the receiver completes it.
    Partial,
}

/// A packet that may be merged. Its headers are whole, its lengths agree, and its IPv4 header has the
/// right checksum.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) key: FlowKey,
    /// The offsets of the IP header, the transport header and the payload.
    pub(super) ip: usize,
    pub(super) transport: usize,
    pub(super) payload: usize,
    /// The length of the payload in bytes. It is at least 1.
    pub(super) len: usize,
    pub(super) trust: Trust,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Says what a packet with this offload header means to the flows under way.
pub(super) fn classify(packet: &[u8], header: &OffloadHeader) -> Class {
    let Ok((at, ethertype)) = behind_ethernet(packet) else { return Class::Unclear };
    let ip = &packet[at..];
    let (is_v4, ip_header_len) = match ethertype {
        EthernetProtocol::Ipv4 => (true, IPV4_HEADER_LEN),
        EthernetProtocol::Ipv6 => (false, IPV6_HEADER_LEN),
        _ => return Class::Foreign,
    };
    // No position in an offload header can be beyond 16 bits.
    if ip.len() < ip_header_len || u16::try_from(at + ip_header_len + TCP_HEADER_LEN_MAX).is_err() {
        return Class::Unclear;
    }
    let (protocol, is_plain) = if is_v4 { plain_ipv4(ip) } else { plain_ipv6(ip) };
    if !is_plain {
        return Class::Unclear;
    }
    let is_tcp = match IpProtocol::from(protocol) {
        IpProtocol::Tcp => true,
        IpProtocol::Udp => false,
        // The transport header is behind these.
        IpProtocol::HopByHop
        | IpProtocol::Ipv6Route
        | IpProtocol::Ipv6Frag
        | IpProtocol::Ipv6Opts => return Class::Unclear,
        _ => return Class::Foreign,
    };
    let datagram = &ip[ip_header_len..];
    if datagram.len() < if is_tcp { TCP_HEADER_LEN } else { UDP_HEADER_LEN } {
        return Class::Unclear;
    }
    let mut key = FlowKey { is_v4, is_tcp, addresses: [0; 32], ports: [0; 4] };
    let addresses = &ip[if is_v4 { 12 } else { 8 }..ip_header_len];
    key.addresses[..addresses.len()].copy_from_slice(addresses);
    key.ports.copy_from_slice(&datagram[..4]);

    let header_len = if is_tcp { usize::from(datagram[12] >> 4) * 4 } else { UDP_HEADER_LEN };
    let len = match datagram.len().checked_sub(header_len) {
        Some(len) if len > 0 => len,
        _ => return Class::Lone(key),
    };
    let is_sound = match is_tcp {
        true => header_len >= TCP_HEADER_LEN && datagram[13] & flags::UNMERGEABLE == 0,
        false => usize::from(word(datagram, 4)) == datagram.len(),
    };
    let (transport, field) = (at + ip_header_len, checksum_at(is_tcp));
    let trust = match header.checksum {
        Checksum::Complete => Trust::Unverified,
        Checksum::DataValid => Trust::Verified,
        Checksum::Partial { start, offset }
            if usize::from(start) == transport && usize::from(offset) == field =>
        {
            Trust::Partial
        }
        Checksum::Partial { .. } => return Class::Lone(key),
    };
    // In UDP a checksum of 0 is none. In TCP, what is merged and cut again would have 0xffff in its
    // place.
    let is_whole = header.gso == Gso::None && word(datagram, field) != 0;
    if !is_sound || !is_whole {
        return Class::Lone(key);
    }
    Class::Candidate(Candidate {
        key,
        ip: at,
        transport,
        payload: transport + header_len,
        len,
        trust,
    })
}

/// The offset of the checksum in a transport header.
pub(super) fn checksum_at(is_tcp: bool) -> usize {
    if is_tcp { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT }
}

/// The protocol behind an IPv4 header; and whether the header has no options, is right, and is of the
/// only fragment of a datagram that fills the packet.
fn plain_ipv4(ip: &[u8]) -> (u8, bool) {
    let header = &ip[..IPV4_HEADER_LEN];
    let is_plain = header[0] == 0x45
        && usize::from(word(header, 2)) == ip.len()
        && word(header, 6) & !DONT_FRAGMENT == 0
        // 0 and 0xffff are the same number, and a packet that is cut has 0.
        && sum(0, header) == 0xffff
        && word(header, 10) != 0xffff;
    (header[9], is_plain)
}

/// The protocol behind an IPv6 header, and whether the datagram fills the packet.
fn plain_ipv6(ip: &[u8]) -> (u8, bool) {
    let is_plain = ip[0] >> 4 == 6 && usize::from(word(ip, 4)) == ip.len() - IPV6_HEADER_LEN;
    (ip[6], is_plain)
}

impl Candidate {
    /// The transport header and the payload behind it.
    fn datagram<'p>(&self, packet: &'p [u8]) -> &'p [u8] {
        &packet[self.transport..]
    }

    /// The sum of the pseudo header without the length. It is the same for all packets of a flow.
    pub(super) fn pseudo(&self, packet: &[u8]) -> u16 {
        let addresses = self.ip + if self.key.is_v4 { 12 } else { 8 };
        let protocol = if self.key.is_tcp { IpProtocol::Tcp } else { IpProtocol::Udp };
        sum(sum(0, &packet[addresses..self.transport]), &[0, protocol.into()])
    }

    /// Whether the checksum is right, as far as that must be known. Corruption would otherwise get a
    /// good checksum. `pseudo` is [`pseudo`](Self::pseudo) of any packet of the flow.
    pub(super) fn verify(&mut self, packet: &[u8], pseudo: u16) -> bool {
        let datagram = self.datagram(packet);
        let pseudo = sum(pseudo, &(datagram.len() as u16).to_be_bytes());
        match self.trust {
            Trust::Verified => true,
            Trust::Partial => word(datagram, checksum_at(self.key.is_tcp)) == pseudo,
            Trust::Unverified => {
                let is_right = sum(pseudo, datagram) == 0xffff;
                if is_right {
                    self.trust = Trust::Verified;
                }
                is_right
            }
        }
    }

    /// The flags in byte 13 of the TCP header, and 0 for UDP.
    pub(super) fn tcp_flags(&self, packet: &[u8]) -> u8 {
        if self.key.is_tcp { packet[self.transport + 13] } else { 0 }
    }

    /// The sequence number of the first byte of the payload. Has no meaning for UDP.
    pub(super) fn sequence(&self, packet: &[u8]) -> u32 {
        let at = self.transport + 4;
        u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
    }

    /// The identification of the IPv4 header, and whether the datagram is atomic: it cannot be
    /// fragmented, so nobody looks at its identification (RFC 6864, section 4.1).
    pub(super) fn ident(&self, packet: &[u8]) -> (u16, bool) {
        (word(packet, self.ip + 4), word(packet, self.ip + 6) & DONT_FRAGMENT != 0)
    }

    /// Whether the headers of this packet say the same as those of `other`, apart from the fields that
    /// differ between the segments of one packet: lengths, checksums, sequence number, identification,
    /// and the TCP flags of byte 13.
    pub(super) fn agrees(&self, packet: &[u8], other: &Candidate, others: &[u8]) -> bool {
        if (self.ip, self.transport, self.payload) != (other.ip, other.transport, other.payload)
            || (self.trust == Trust::Partial) != (other.trust == Trust::Partial)
        {
            return false;
        }
        let (ip, transport) = (self.ip, self.transport);
        let same = |from: usize, to: usize| packet[from..to] == others[from..to];
        // The addresses and ports are in the key, and are the same.
        let network = match self.key.is_v4 {
            // Version, length and type of service; flags; time to live.
            true => same(ip, ip + 2) && same(ip + 6, ip + 9),
            // Version, traffic class and flow label; hop limit.
            false => same(ip, ip + 4) && same(ip + 7, ip + 8),
        };
        // Acknowledgment number, length and reserved bits; window; urgent pointer and options.
        let tcp = || {
            same(transport + 8, transport + 13)
                && same(transport + 14, transport + TCP_CHECKSUM_AT)
                && same(transport + TCP_CHECKSUM_AT + 2, self.payload)
        };
        same(0, ip) && network && (!self.key.is_tcp || tcp())
    }
}
