//! Which frames would make a station the router or the DHCP server of others.
//!
//! These are router advertisements and redirects of IPv6, and what DHCP servers tell clients. A
//! [`PortRole`](crate::policy::PortRole) can forbid them, as RA Guard (RFC 6105, with the rules of RFC 7113)
//! and DHCPv6-Shield (RFC 7610) do.
//!
//! A receiver looks at all of a packet, so this has to find what a stack would find behind tags, extension
//! headers and options. A packet whose headers do not end within its first fragment counts as one of those
//! that are looked for, because no sound station sends it (RFC 7112, 5).

use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::frame;
use crate::limits::{EXTENSION_HEADERS_READ, HEAD_LEN, VLAN_TAG_LEN};

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// The bytes of an IPv6 header, and of an IPv4 header without options.
const IPV6_LEN: usize = 40;
const IPV4_LEN: usize = 20;

// Protocols, and the extension headers of IPv6 (IANA's "Protocol Numbers").
const HOP_BY_HOP: u8 = 0;
const UDP: u8 = 17;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const ICMPV6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;

/// The port at which clients listen to servers of DHCP (RFC 2131, 4.1) and DHCPv6 (RFC 8415, 7.2).
const DHCP_CLIENT: u16 = 68;
const DHCPV6_CLIENT: u16 = 546;
/// Messages of ICMPv6 (RFC 4861, 4.2 and 4.5).
const ROUTER_ADVERTISEMENT: u8 = 134;
const REDIRECT: u8 = 137;

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Finds the EtherType behind all tags, and where the packet begins.
fn network_layer(bytes: &[u8]) -> Option<(u16, usize)> {
    let mut at = ETHERNET_HEADER_LEN;
    loop {
        match word(bytes, at - 2)? {
            tag if frame::is_tag(tag) => at += VLAN_TAG_LEN,
            ethertype => return Some((ethertype, at)),
        }
    }
}

/// Whether a frame may be one that [`serves`]. `head` is the first [`HEAD_LEN`] bytes of it, or the whole
/// frame if it is shorter.
pub(crate) fn may_serve(head: &[u8]) -> bool {
    let is_hidden = head.len() >= HEAD_LEN;
    let Some((ethertype, at)) = network_layer(head) else { return is_hidden };
    match ethertype {
        IPV4 => match (head.get(at), head.get(at + 9)) {
            (Some(0x45), Some(&UDP)) => {
                word(head, at + IPV4_LEN + 2).map_or(is_hidden, |to| to == DHCP_CLIENT)
            }
            (Some(_), Some(protocol)) => *protocol == UDP,
            _ => is_hidden,
        },
        IPV6 => head
            .get(at + 6)
            .map_or(is_hidden, |&next| matches!(next, UDP | ICMPV6) || is_extension(next)),
        _ => false,
    }
}

/// Whether frames with this Ethernet header may be IP packets.
pub(crate) fn may_be_ip([.., high, low]: [u8; ETHERNET_HEADER_LEN]) -> bool {
    let ethertype = u16::from_be_bytes([high, low]);
    matches!(ethertype, IPV4 | IPV6) || frame::is_tag(ethertype)
}

fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP
            | ROUTING
            | FRAGMENT
            | AUTHENTICATION
            | DESTINATION_OPTIONS
            | MOBILITY
            | HOST_IDENTITY
            | SHIM6
    )
}

/// Whether a frame would make its sender a router or a DHCP server.
pub(crate) fn serves(frame: &[u8]) -> bool {
    let Some((ethertype, at)) = network_layer(frame) else { return false };
    match ethertype {
        IPV4 => serves_v4(&frame[at..]).unwrap_or(false),
        // Whatever is cut short might be one.
        IPV6 if frame.len() >= at + IPV6_LEN => serves_v6(&frame[at..]).unwrap_or(true),
        _ => false,
    }
}

fn serves_v4(packet: &[u8]) -> Option<bool> {
    let header_len = usize::from(packet.first()? & 0x0f) * 4;
    let offset = word(packet, 6)? & 0x1fff;
    if *packet.get(9)? != UDP || offset != 0 {
        return Some(false);
    }
    Some(word(packet, header_len + 2)? == DHCP_CLIENT)
}

fn serves_v6(packet: &[u8]) -> Option<bool> {
    let (mut next, mut at) = (*packet.get(6)?, IPV6_LEN);
    for _ in 0..EXTENSION_HEADERS_READ {
        let after = *packet.get(at)?;
        let len = match next {
            UDP => return Some(word(packet, at + 2)? == DHCPV6_CLIENT),
            ICMPV6 => return Some(matches!(after, ROUTER_ADVERTISEMENT | REDIRECT)),
            FRAGMENT => {
                if word(packet, at + 2)? >> 3 != 0 {
                    // Its first fragment shows what it is.
                    return Some(false);
                }
                8
            }
            // Its unit is 4 bytes (RFC 4302, 2.2).
            AUTHENTICATION => (usize::from(*packet.get(at + 1)?) + 2) * 4,
            _ if is_extension(next) => (usize::from(*packet.get(at + 1)?) + 1) * 8,
            _ => return Some(false),
        };
        (next, at) = (after, at + len);
    }
    None
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((payload.len() as u16).to_be_bytes());
        frame.extend([next, 255]);
        frame.extend([0xfe; 32]);
        frame.extend(payload);
        frame
    }

    fn v4(header: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45 + (header.len() / 4) as u8, 0, 0, 99, 0, 1]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, 17, 0, 0, 9, 9, 9, 9, 8, 8, 8, 8]);
        frame.extend(header);
        frame.extend(payload);
        frame
    }

    fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
        [&frame[..12], &[0x81, 0, 0, 0].repeat(tags), &frame[12..]].concat()
    }

    /// Goal: no disguise that a stack sees through hides a router or a server, and what a guest sends
    /// otherwise passes. Method: each packet plain, behind tags, and behind each extension header.
    #[test]
    fn routers_and_servers_are_found_whatever_is_in_front_of_them() {
        let advert = [134, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let redirect = [137, 0, 0, 0, 0, 0, 0, 0];
        let solicit = [133, 0, 0, 0, 0, 0, 0, 0];
        let (dhcpv6, asks) = ([2, 35, 2, 34, 0, 8, 0, 0], [2, 34, 2, 35, 0, 8, 0, 0]);
        let (dhcp, asks_v4) = ([0, 67, 0, 68, 0, 8, 0, 0], [0, 68, 0, 67, 0, 8, 0, 0]);
        let tcp = [2, 34, 2, 34, 0, 0, 0, 0];
        let cases: [(u8, &[u8], bool); 6] = [
            (ICMPV6, &advert, true),
            (ICMPV6, &redirect, true),
            (ICMPV6, &solicit, false),
            (UDP, &dhcpv6, true),
            (UDP, &asks, false),
            (6, &tcp, false),
        ];
        let mut frames = Vec::new();
        for (protocol, payload, is_one) in cases {
            frames.push((v6(protocol, payload), is_one));
            for extension in [HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, MOBILITY, FRAGMENT] {
                let header = [protocol, 0, 0, 0, 0, 0, 0, 0];
                frames.push((v6(extension, &[&header[..], payload].concat()), is_one));
                // Two of them, of which the first one is long.
                let mut long = [0; 24];
                (long[0], long[1]) = (extension, 2);
                let inner = [&header[..], payload].concat();
                if extension != FRAGMENT {
                    frames.push((v6(DESTINATION_OPTIONS, &[&long[..], &inner].concat()), is_one));
                }
            }
            let authentication = [&[protocol, 2, 0, 0][..], &[0; 12], payload].concat();
            frames.push((v6(AUTHENTICATION, &authentication), is_one));
        }
        frames.push((v4(&[], 0x4000, &dhcp), true));
        frames.push((v4(&[], 0x2000, &dhcp), true));
        frames.push((v4(&[1; 8], 0, &dhcp), true));
        frames.push((v4(&[1; 40], 0, &dhcp), true));
        frames.push((v4(&[], 0, &asks_v4), false));
        frames.push((v4(&[], 0x2001, &dhcp), false));
        // A later fragment shows nothing, and a chain that does not end within the first one is no packet.
        frames.push((v6(FRAGMENT, &[ICMPV6, 0, 0, 8, 0, 0, 0, 0, 134, 0]), false));
        frames.push((v6(FRAGMENT, &[DESTINATION_OPTIONS, 0, 0, 1, 0, 0, 0, 0, ICMPV6, 9]), true));
        frames.push((v6(DESTINATION_OPTIONS, &[DESTINATION_OPTIONS, 0].repeat(4)), true));
        frames.push((v6(HOP_BY_HOP, &[0, 0, 0, 0, 0, 0, 0, 0].repeat(1000)), true));
        for (number, (frame, is_one)) in frames.iter().enumerate() {
            for tags in 0..4 {
                let frame = tagged(frame, tags);
                assert_eq!(serves(&frame), *is_one, "frame {number} with {tags} tags");
                let head = &frame[..frame.len().min(HEAD_LEN)];
                assert!(!is_one || may_serve(head), "frame {number} with {tags} tags");
            }
        }
        // What most guests send costs no second look.
        assert!(!may_serve(&v6(6, &tcp)[..HEAD_LEN]));
        assert!(!may_serve(&v4(&[], 0, &asks_v4)[..HEAD_LEN]));
        for len in 0..80 {
            let _ = serves(&tagged(&v6(HOP_BY_HOP, &[0; 26]), 1)[..len]);
            let _ = serves(&v4(&[1; 40], 0, &[0; 8])[..len.min(80)]);
        }
    }
}
