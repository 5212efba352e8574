//! Reads guests' frames, and writes the headers of frames for guests.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Packet,
    Ipv4Repr, Ipv6Packet, Ipv6Repr,
};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::{MIN_FRAME_LEN, VLAN_TAG_LEN};

use crate::config::NatConfig;
use crate::limits::EXTENSION_HEADERS;
use crate::stats::Counter;

/// The EtherType of a C-VLAN tag (IEEE 802.1Q, table 9-1).
const C_TAG: u16 = 0x8100;
/// The hop limit of what this crate sends, as that of Linux.
pub(crate) const HOP_LIMIT: u8 = 64;

/// An IP packet of a guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Datagram<'f> {
    /// The MAC address that it came from.
    pub(crate) mac: [u8; 6],
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// The transport protocol's number.
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// The differentiated services, 6 bits.
    pub(crate) dscp: u8,
    /// What the IP packet carries.
    pub(crate) payload: &'f [u8],
    /// The whole IP packet, for ICMP errors to quote.
    pub(crate) ip: &'f [u8],
}

impl<'f> Datagram<'f> {
    /// Reads a frame. What is behind the IP packet is padding and is ignored. Checksums of transport
    /// headers are not verified: between a guest and this process there is no wire.
    ///
    /// # Errors
    ///
    /// Why the frame cannot be translated.
    pub(crate) fn parse(frame: &'f [u8]) -> Result<Self, Counter> {
        let (mac, ethertype, ip) = network_layer(frame)?;
        match ethertype {
            EthernetProtocol::Ipv4 => Self::parse_v4(mac, ip),
            EthernetProtocol::Ipv6 => Self::parse_v6(mac, ip),
            _ => Err(Counter::NotIp),
        }
    }

    /// Whether the packet goes to a group, or to everybody.
    pub(crate) fn is_to_many(&self, config: &NatConfig) -> bool {
        let to = self.destination;
        to.is_multicast()
            || to == IpAddr::V4(Ipv4Addr::BROADCAST)
            || to.is_ipv4() && config.subnet_v4.is_network_or_broadcast(to)
    }

    /// Whether the packet goes to the gateway's DNS, over UDP or TCP, whose ports are at the same place.
    pub(crate) fn is_dns(&self, config: &NatConfig) -> bool {
        let port = |ports: &[u8]| u16::from_be_bytes([ports[2], ports[3]]);
        matches!(self.protocol, 6 | 17)
            && self.payload.len() >= 4
            && config.is_dns(SocketAddr::new(self.destination, port(self.payload)))
    }

    fn parse_v4(mac: [u8; 6], ip: &'f [u8]) -> Result<Self, Counter> {
        let packet = Ipv4Packet::new_checked(ip).map_err(|_| Counter::Malformed)?;
        if packet.version() != 4 || packet.header_len() < 20 || !packet.verify_checksum() {
            return Err(Counter::Malformed);
        }
        if packet.more_frags() || packet.frag_offset() != 0 {
            return Err(Counter::Fragment);
        }
        Ok(Self {
            mac,
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol: packet.next_header().into(),
            hop_limit: packet.hop_limit(),
            dscp: packet.dscp(),
            payload: packet.payload(),
            ip: &ip[..usize::from(packet.total_len())],
        })
    }

    fn parse_v6(mac: [u8; 6], ip: &'f [u8]) -> Result<Self, Counter> {
        let packet = Ipv6Packet::new_checked(ip).map_err(|_| Counter::Malformed)?;
        if packet.version() != 6 {
            return Err(Counter::Malformed);
        }
        let mut next = packet.next_header();
        let mut payload = packet.payload();
        for _ in 0..EXTENSION_HEADERS {
            match next {
                IpProtocol::HopByHop | IpProtocol::Ipv6Opts => {
                    // RFC 8200, 4.3 and 4.6: the length is in units of 8 bytes, without the first.
                    let &[after, units, ..] = payload else { return Err(Counter::Malformed) };
                    payload =
                        payload.get((usize::from(units) + 1) * 8..).ok_or(Counter::Malformed)?;
                    next = IpProtocol::from(after);
                }
                IpProtocol::Ipv6Frag => return Err(Counter::Fragment),
                _ => break,
            }
        }
        Ok(Self {
            mac,
            source: packet.src_addr().into(),
            destination: packet.dst_addr().into(),
            protocol: next.into(),
            hop_limit: packet.hop_limit(),
            dscp: packet.traffic_class() >> 2,
            payload,
            ip: &ip[..packet.total_len()],
        })
    }
}

/// Splits a frame into its source, and the type and the bytes of what it carries. A tag of VLAN 0 is
/// skipped: it carries a priority only.
///
/// # Errors
///
/// Why the frame is not read.
fn network_layer(frame: &[u8]) -> Result<([u8; 6], EthernetProtocol, &[u8]), Counter> {
    let ethernet = EthernetFrame::new_checked(frame).map_err(|_| Counter::Malformed)?;
    let mut ethertype = u16::from(ethernet.ethertype());
    let mut payload = &frame[ETHERNET_HEADER_LEN..];
    if ethertype == C_TAG {
        let [priority, vlan, high, low, rest @ ..] = payload else {
            return Err(Counter::Malformed);
        };
        if priority & 0x0f != 0 || *vlan != 0 {
            return Err(Counter::NotIp);
        }
        ethertype = u16::from_be_bytes([*high, *low]);
        payload = rest;
        debug_assert_eq!(frame.len() - payload.len(), ETHERNET_HEADER_LEN + VLAN_TAG_LEN);
    }
    Ok((ethernet.src_addr().0, EthernetProtocol::from(ethertype), payload))
}

/// Between whom a frame for a guest goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    /// The gateway's MAC address.
    pub(crate) from_mac: [u8; 6],
    /// The guest's MAC address.
    pub(crate) to_mac: [u8; 6],
    pub(crate) from: IpAddr,
    /// The guest's address. It is of the same family.
    pub(crate) to: IpAddr,
}

impl Addresses {
    /// The bytes of the Ethernet and the IP header.
    pub(crate) fn header_len(&self) -> usize {
        ETHERNET_HEADER_LEN + if self.to.is_ipv4() { 20 } else { 40 }
    }

    /// Writes both headers to the start of a frame, which ends with the IP packet, and returns what
    /// is behind them.
    pub(crate) fn emit<'f>(&self, protocol: IpProtocol, frame: &'f mut [u8]) -> &'f mut [u8] {
        let (header_len, len) = (self.header_len(), frame.len());
        let payload_len = len - header_len;
        let ethertype =
            if self.to.is_ipv4() { EthernetProtocol::Ipv4 } else { EthernetProtocol::Ipv6 };
        EthernetRepr {
            src_addr: EthernetAddress(self.from_mac),
            dst_addr: EthernetAddress(self.to_mac),
            ethertype,
        }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame[..ETHERNET_HEADER_LEN]));
        let ip = &mut frame[ETHERNET_HEADER_LEN..];
        match (self.from, self.to) {
            (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
                let hop_limit = HOP_LIMIT;
                Ipv4Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit }
                    .emit(&mut Ipv4Packet::new_unchecked(ip), &ChecksumCapabilities::default());
            }
            (from, to) => {
                let (src_addr, dst_addr) = (v6(from), v6(to));
                let hop_limit = HOP_LIMIT;
                Ipv6Repr { src_addr, dst_addr, next_header: protocol, payload_len, hop_limit }
                    .emit(&mut Ipv6Packet::new_unchecked(ip));
            }
        }
        &mut frame[header_len..]
    }

    /// The sum of the pseudo header as it stands in a checksum field that is left to the reader: not
    /// complemented (RFC 9293, 3.1; RFC 8200, 8.1).
    pub(crate) fn pseudo_sum(&self, protocol: IpProtocol, len: usize) -> u16 {
        let mut sum = u32::from(u8::from(protocol)) + (len as u32 >> 16) + (len as u32 & 0xffff);
        let mut add = |address: IpAddr| match address {
            IpAddr::V4(v4) => {
                let word = u32::from(v4);
                sum += (word >> 16) + (word & 0xffff);
            }
            IpAddr::V6(v6) => sum += v6.segments().into_iter().map(u32::from).sum::<u32>(),
        };
        add(self.from);
        add(self.to);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// The length of a frame with so many bytes, with its padding.
pub(crate) fn padded(len: usize) -> usize {
    len.max(MIN_FRAME_LEN)
}
