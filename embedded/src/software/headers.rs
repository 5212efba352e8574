//! The headers of a packet, read and checked up to the payload.

use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6ExtHeader, Ipv6Packet, TcpPacket,
    UdpPacket,
};

use super::checksum::sum;
use super::error::SoftwareError;

/// The EtherTypes of a VLAN tag (IEEE 802.1Q and 802.1ad), and the length of a tag in bytes.
const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
const VLAN_TAG_LEN: usize = 4;
/// The offset of the checksum in a TCP header and in a UDP header.
pub(super) const TCP_CHECKSUM_AT: usize = 16;
pub(super) const UDP_CHECKSUM_AT: usize = 6;
pub(super) const UDP_HEADER_LEN: usize = 8;
pub(super) const IPV4_HEADER_LEN: usize = smoltcp::wire::IPV4_HEADER_LEN;
pub(super) const IPV6_HEADER_LEN: usize = smoltcp::wire::IPV6_HEADER_LEN;

/// What the headers in front of the transport header say.
pub(super) struct Ip {
    pub(super) transport: usize,
    pub(super) protocol: IpProtocol,
    /// The sum of the addresses of the pseudo header. `None` if the destination in the IP header is
    /// not the final one (an IPv6 routing header).
    pub(super) addresses: Option<u16>,
}

/// Returns the offset behind the Ethernet header and its VLAN tags, and the EtherType of what is
/// there.
pub(super) fn behind_ethernet(packet: &[u8]) -> Result<(usize, EthernetProtocol), SoftwareError> {
    let ethernet = EthernetFrame::new_checked(packet)
        .map_err(|_| SoftwareError::Malformed { what: "Ethernet" })?;
    let mut at = EthernetFrame::<&[u8]>::header_len();
    let mut ethertype = ethernet.ethertype();
    while VLAN_TAGS.contains(&ethertype.into()) {
        let tag = packet.get(at..at + VLAN_TAG_LEN);
        let tag = tag.ok_or(SoftwareError::Malformed { what: "VLAN" })?;
        ethertype = u16::from_be_bytes([tag[2], tag[3]]).into();
        at += VLAN_TAG_LEN;
    }
    Ok((at, ethertype))
}

fn length(what: &'static str, said: usize, is: usize) -> Result<(), SoftwareError> {
    if said == is { Ok(()) } else { Err(SoftwareError::Length { what, said, is }) }
}

pub(super) fn ipv4(packet: &[u8], at: usize) -> Result<Ip, SoftwareError> {
    let malformed = SoftwareError::Malformed { what: "IPv4" };
    let bytes = &packet[at..];
    if bytes.len() < IPV4_HEADER_LEN {
        return Err(malformed);
    }
    let ip = Ipv4Packet::new_unchecked(bytes);
    length("IPv4", ip.total_len().into(), bytes.len())?;
    let header_len = usize::from(ip.header_len());
    if ip.version() != 4 || header_len < IPV4_HEADER_LEN || header_len > bytes.len() {
        return Err(malformed);
    }
    if ip.more_frags() || ip.frag_offset() != 0 {
        return Err(SoftwareError::Fragment);
    }
    let addresses = sum(sum(0, &ip.src_addr().octets()), &ip.dst_addr().octets());
    let (transport, protocol) = (at + header_len, ip.next_header());
    Ok(Ip { transport, protocol, addresses: Some(addresses) })
}

pub(super) fn ipv6(packet: &[u8], at: usize) -> Result<Ip, SoftwareError> {
    let bytes = &packet[at..];
    let malformed = SoftwareError::Malformed { what: "IPv6" };
    if bytes.len() < IPV6_HEADER_LEN {
        return Err(malformed);
    }
    let ip = Ipv6Packet::new_unchecked(bytes);
    length("IPv6", ip.total_len(), bytes.len())?;
    if ip.version() != 6 {
        return Err(malformed);
    }
    let mut addresses = Some(sum(sum(0, &ip.src_addr().octets()), &ip.dst_addr().octets()));
    let mut protocol = ip.next_header();
    let mut transport = at + IPV6_HEADER_LEN;
    loop {
        match protocol {
            IpProtocol::HopByHop | IpProtocol::Ipv6Opts | IpProtocol::Ipv6Route => {}
            IpProtocol::Ipv6Frag => return Err(SoftwareError::Fragment),
            _ => return Ok(Ip { transport, protocol, addresses }),
        }
        let extension = Ipv6ExtHeader::new_checked(&packet[transport..])
            .map_err(|_| SoftwareError::Malformed { what: "IPv6 extension" })?;
        // The payload of a routing header begins with its type and the number of addresses that are
        // left (RFC 8200, 4.4).
        let rest = extension.payload();
        if protocol == IpProtocol::Ipv6Route && rest[1] > 0 {
            addresses = None;
        }
        transport += 2 + rest.len();
        protocol = extension.next_header();
    }
}

/// Returns the length of the TCP header, whether its flags forbid segments, and its checksum field.
pub(super) fn tcp(datagram: &[u8]) -> Result<(usize, bool, u16), SoftwareError> {
    let tcp =
        TcpPacket::new_checked(datagram).map_err(|_| SoftwareError::Malformed { what: "TCP" })?;
    let flagged = tcp.syn() || tcp.rst() || tcp.urg();
    Ok((tcp.header_len().into(), flagged, tcp.checksum()))
}

/// Returns the length of the UDP header, false because it has no flags, and its checksum field.
pub(super) fn udp(datagram: &[u8]) -> Result<(usize, bool, u16), SoftwareError> {
    if datagram.len() < UDP_HEADER_LEN {
        return Err(SoftwareError::Malformed { what: "UDP" });
    }
    let udp = UdpPacket::new_unchecked(datagram);
    length("UDP", udp.len().into(), datagram.len())?;
    Ok((UDP_HEADER_LEN, false, udp.checksum()))
}
