//! What a station says to its neighbours about its own addresses: ARP (RFC 826) and neighbour discovery
//! (RFC 4861).

use core::net::IpAddr;

use smoltcp::wire::{
    ArpPacket, ArpRepr, EthernetProtocol, Icmpv6Message, Icmpv6Packet, IpProtocol, Ipv6Packet,
};

use crate::packet::network_layer;

/// The hop limit of neighbour discovery, which no router has forwarded (RFC 4861, 7.1).
const NEIGHBOR_HOPS: u8 = 255;
/// The bytes of a solicitation or an advertisement in front of its options (RFC 4861, 4.3 and 4.4).
const NEIGHBOR_LEN: usize = 24;

/// The address that the sender of a frame uses, with its MAC address, if the frame is an ARP packet, a
/// neighbour solicitation or a neighbour advertisement. A station that probes whether an address is free
/// (RFC 5227, 2.1; RFC 4862, 5.4.2) does not use it yet.
pub(crate) fn used_address(frame: &[u8]) -> Option<([u8; 6], IpAddr)> {
    let (mac, ethertype, payload) = network_layer(frame).ok()?;
    let address = match ethertype {
        EthernetProtocol::Arp => {
            let packet = ArpPacket::new_checked(payload).ok()?;
            let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. } =
                ArpRepr::parse(&packet).ok()?
            else {
                return None;
            };
            // Otherwise somebody else's address is told.
            (source_hardware_addr.0 == mac).then_some(IpAddr::V4(source_protocol_addr))?
        }
        EthernetProtocol::Ipv6 => {
            let packet = Ipv6Packet::new_checked(payload).ok()?;
            let message = packet.payload();
            if packet.version() != 6
                || packet.next_header() != IpProtocol::Icmpv6
                || packet.hop_limit() != NEIGHBOR_HOPS
                || message.len() < NEIGHBOR_LEN
            {
                return None;
            }
            let message = Icmpv6Packet::new_unchecked(message);
            match message.msg_type() {
                Icmpv6Message::NeighborSolicit => packet.src_addr().into(),
                Icmpv6Message::NeighborAdvert => message.target_addr().into(),
                _ => return None,
            }
        }
        _ => return None,
    };
    (!address.is_unspecified()).then_some((mac, address))
}
