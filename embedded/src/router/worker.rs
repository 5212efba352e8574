//! Which worker of a router has a packet.
//!
//! Only the guest's own end counts: its protocol and its port. So all that a guest sends from one port is
//! with one worker, as a translator needs that gives it one port outside. The guest's address does not
//! count: what comes in for a port of a guest that has no address yet has its worker all the same. A random
//! key keeps guests from agreeing on one worker. A guest that finds out which of its ports are with which
//! worker has no more of that worker than its share.

use smoltcp::wire::IpProtocol;

use crate::limits::IPV6_EXTENSION_HEADERS;
use crate::packet::Packet;
use crate::table::mix;

/// The types of echo requests (RFC 792; RFC 4443, 4.1).
const ECHO_V4: u8 = 8;
const ECHO_V6: u8 = 128;
/// Where an echo request has its identifier.
const IDENTIFIER_AT: usize = 4;

/// The worker for a packet whose IP header begins at byte `at`. A packet without a port, such as a
/// fragment, is the first worker's.
///
/// A guest may change its packet afterwards. Then it is with a worker that has no flow of it, and is a flow
/// of its own there.
pub(crate) fn of_packet(packet: &Packet<'_>, at: usize, key: u64, workers: usize) -> usize {
    guest_port(packet, at).map_or(0, |(protocol, port)| of_port(protocol, port, key, workers))
}

/// The worker for a port of guests.
pub(crate) fn of_port(protocol: u8, port: u16, key: u64, workers: usize) -> usize {
    let hash = mix(key ^ (u64::from(protocol) << 16 | u64::from(port)));
    // The upper half of the hash, as a part of `workers`.
    (((hash >> 32) * workers as u64) >> 32) as usize
}

/// The protocol of a packet, and the port or the identifier of its sender.
fn guest_port(packet: &Packet<'_>, at: usize) -> Option<(u8, u16)> {
    let mut header = [0; 20];
    if packet.read_at(at, &mut header) < header.len() {
        return None;
    }
    let (protocol, at) = match header[0] >> 4 {
        // Only the first fragment of a packet has ports (RFC 791, 3.2).
        4 if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 => return None,
        4 => (header[9], at + usize::from(header[0] & 0xf) * 4),
        6 => transport_v6(packet, header[6], at + 40)?,
        _ => return None,
    };
    let echo = match IpProtocol::from(protocol) {
        IpProtocol::Tcp | IpProtocol::Udp => None,
        IpProtocol::Icmp => Some(ECHO_V4),
        IpProtocol::Icmpv6 => Some(ECHO_V6),
        _ => return None,
    };
    let mut bytes = [0; IDENTIFIER_AT + 2];
    if packet.read_at(at, &mut bytes) < bytes.len() {
        return None;
    }
    let [kind, second, .., high, low] = bytes;
    match echo {
        None => Some((protocol, u16::from_be_bytes([kind, second]))),
        Some(echo) if kind == echo => Some((protocol, u16::from_be_bytes([high, low]))),
        Some(_) => None,
    }
}

/// What is behind the extension headers of a packet of IPv6 that a router reads, and at which byte it
/// begins. `next` is the protocol of the header at byte `at`. `None` if there are too many headers, or the
/// packet ends before.
pub(super) fn transport_v6(packet: &Packet<'_>, next: u8, at: usize) -> Option<(u8, usize)> {
    let (mut protocol, mut at) = (next, at);
    for _ in 0..IPV6_EXTENSION_HEADERS {
        if !matches!(protocol.into(), IpProtocol::HopByHop | IpProtocol::Ipv6Opts) {
            return Some((protocol, at));
        }
        let mut bytes = [0; 2];
        if packet.read_at(at, &mut bytes) < bytes.len() {
            return None;
        }
        // The length is in units of 8 bytes, without the first (RFC 8200, 4.3 and 4.6).
        (protocol, at) = (bytes[0], at + (usize::from(bytes[1]) + 1) * 8);
    }
    None
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const AT: usize = 14;
    const KEY: u64 = 11;

    fn v4(protocol: u8, fragment: u16, from: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; AT];
        frame.extend([0x45, 0, 0, 0, 0, 0]);
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0, 192, 168, 64, from, 198, 51, 100, 7]);
        frame.extend(payload);
        frame
    }

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; AT];
        frame.extend([0x60, 0, 0, 0, 0, 20, next, 64]);
        frame.extend([0xfd; 32]);
        frame.extend(payload);
        frame
    }

    fn end(frame: &[u8]) -> Option<(u8, u16)> {
        guest_port(&Packet::from(frame), AT)
    }

    /// Goal: what a guest sends from one of its ports has one end, whomever it goes to, and what has no port
    /// has none.
    #[test]
    fn an_end_is_a_protocol_and_a_port() {
        let ports = [0x0f, 0xa0, 0, 80, 0, 0, 0, 0];
        let echo = |kind: u8| [kind, 0, 1, 2, 0x12, 0x34, 0, 1];
        assert_eq!(end(&v4(6, 0, 2, &ports)), Some((6, 4000)));
        assert_eq!(end(&v4(17, 0x4000, 9, &ports)), Some((17, 4000)), "DF is no fragment");
        assert_eq!(end(&v6(17, &ports)), Some((17, 4000)));
        assert_eq!(end(&v4(1, 0, 2, &echo(8))), Some((1, 0x1234)));
        assert_eq!(end(&v6(58, &echo(128))), Some((58, 0x1234)));
        let mut options = v4(6, 0, 2, &[&[1, 1, 1, 0][..], &ports].concat());
        options[AT] = 0x46;
        assert_eq!(end(&options), Some((6, 4000)));
        let header = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
        let extended = v6(0, &[header(60), header(6), ports].concat());
        assert_eq!(end(&extended), Some((6, 4000)));
        let without = [
            ("a fragment", v4(17, 0x2000, 2, &ports)),
            ("a later fragment", v4(17, 5, 2, &ports)),
            ("a fragment of IPv6", v6(44, &[header(17), ports].concat())),
            ("an echo reply", v4(1, 0, 2, &echo(0))),
            ("an error", v6(58, &echo(1))),
            ("GRE", v4(47, 0, 2, &ports)),
            ("too many headers", v6(0, &[header(0); 9].concat())),
        ];
        for (what, frame) in without {
            assert_eq!(end(&frame), None, "{what}");
        }
        for frame in [v4(6, 0, 2, &ports), extended] {
            for len in 0..frame.len() {
                end(&frame[..len]);
            }
        }
    }

    /// Goal: the ports of one guest spread over all workers, and so do those of services.
    #[test]
    fn ports_spread_over_workers() {
        for workers in 1..=8 {
            for (protocol, first) in [(6, 32_768), (17, 49_152), (6, 1), (1, 0)] {
                let mut counts = vec![0; workers];
                for port in first..first + 4096u16 {
                    counts[of_port(protocol, port, KEY, workers)] += 1;
                }
                let fair = 4096 / workers;
                assert!(
                    counts.iter().all(|count| (fair * 3 / 4..=fair * 5 / 4).contains(count)),
                    "{counts:?}"
                );
            }
        }
        let moved = (0..1000).filter(|&port| of_port(6, port, KEY, 8) != of_port(6, port, 12, 8));
        assert!(moved.count() > 700, "another key, other workers");
    }
}
