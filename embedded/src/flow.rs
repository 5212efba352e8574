//! [`flow_of`]: which packets belong together, for a receiver with several queues.
//!
//! The packets of a flow go to one queue, so that they keep their order. Both directions of a connection
//! are one flow: a guest that stands between others sees both, and what it knows of the connection is
//! with one processor then. A random key keeps a guest from aiming its flows at one queue of another.

use vmring_core::GuestBuffer;

use crate::frame;
use crate::limits::FLOW_HEAD_LEN;
use crate::packet::Packet;
use crate::table::mix;

/// The protocols whose headers begin with two ports (IANA's protocol numbers).
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What `flow_of` needs of a packet. It is looked at only if its destination has several queues.
#[derive(Clone, Copy, Debug)]
pub enum NextFrame<'p> {
    /// A packet in bytes.
    Bytes(&'p [u8]),
    /// A packet in the memory of a guest.
    Guest(&'p GuestBuffer),
}

impl NextFrame<'_> {
    /// The number of bytes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Guest(buffer) => buffer.len(),
        }
    }

    /// The flow of the packet. A guest may change its packet afterwards. Then another queue of the same
    /// receiver gets it.
    pub(crate) fn flow(&self, key: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => flow_of(bytes, key),
            Self::Guest(buffer) => {
                let mut head = [0; FLOW_HEAD_LEN];
                let len = buffer.copy_to(&mut head);
                flow_of(&head[..len], key)
            }
        }
    }
}

impl Packet<'_> {
    /// The flow of the packet; see [`NextFrame::flow`].
    #[cold]
    pub(crate) fn flow(&self, key: u64) -> u64 {
        match self.bytes() {
            Some(bytes) => flow_of(bytes, key),
            None => {
                let mut head = [0; FLOW_HEAD_LEN];
                let len = self.copy_to(0, &mut head);
                flow_of(&head[..len], key)
            }
        }
    }
}

/// A number that is the same for all packets of a flow, in both directions: of the addresses, the protocol
/// and the ports if the frame is TCP or UDP over IP and no fragment; of the addresses if it is another IP
/// packet; of the MAC addresses otherwise.
pub(crate) fn flow_of(head: &[u8], key: u64) -> u64 {
    let ends = frame::ip_at(head).and_then(|at| {
        let ip = &head[at..];
        match ip.first()? >> 4 {
            4 => ends_of_v4(ip),
            6 => ends_of_v6(ip),
            _ => None,
        }
    });
    let (protocol, [one, other]) = ends.unwrap_or_else(|| {
        let mac = |at: usize| head.get(at..at + 6).map_or(0, number);
        (0, [mac(0), mac(6)])
    });
    // A sum does not tell the ends apart.
    let ends = mix(one ^ key).wrapping_add(mix(other ^ key));
    mix(ends ^ u64::from(protocol))
}

/// The protocol and both ends of an IPv4 packet (RFC 791). All fragments of a packet have the same.
fn ends_of_v4(ip: &[u8]) -> Option<(u8, [u64; 2])> {
    let header = ip.get(..20)?;
    let is_fragment = (header[6] & 0x3f, header[7]) != (0, 0);
    let protocol = header[9];
    let ports = match protocol {
        TCP | UDP if !is_fragment => ip.get(usize::from(header[0] & 15) * 4..),
        _ => None,
    };
    let [from, to] = ports_of(ports);
    let protocol = if ports.is_some() { protocol } else { 0 };
    let end = |address: &[u8], port| number(address) << 16 | u64::from(port);
    Some((protocol, [end(&header[12..16], from), end(&header[16..20], to)]))
}

/// The protocol and both ends of an IPv6 packet (RFC 8200). One with extension headers, such as a
/// fragment, has no ports here.
fn ends_of_v6(ip: &[u8]) -> Option<(u8, [u64; 2])> {
    let header = ip.get(..40)?;
    let protocol = header[6];
    let ports = if matches!(protocol, TCP | UDP) { ip.get(40..) } else { None };
    let [from, to] = ports_of(ports);
    let protocol = if ports.is_some() { protocol } else { 0 };
    let end = |at: usize, port: u16| {
        let (high, low) = (number(&header[at..at + 8]), number(&header[at + 8..at + 16]));
        mix(mix(high) ^ low) ^ u64::from(port)
    };
    Some((protocol, [end(8, from), end(24, to)]))
}

/// The ports of a transport header, or 0 if they are not there.
fn ports_of(transport: Option<&[u8]>) -> [u16; 2] {
    match transport.and_then(|bytes| bytes.first_chunk()) {
        Some(&[a, b, c, d]) => [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])],
        None => [0, 0],
    }
}

/// At most eight bytes as a number.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const KEY: u64 = 7;

    fn v4(from: [u8; 4], to: [u8; 4], protocol: u8, fragment: u16, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 40, 0, 1];
        frame.extend(fragment.to_be_bytes());
        frame.extend([64, protocol, 0, 0]);
        frame.extend([from, to].concat());
        ports.iter().for_each(|port| frame.extend(port.to_be_bytes()));
        frame.extend([0; 16]);
        frame
    }

    fn v6(from: u8, to: u8, next: u8, ports: [u16; 2]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 20];
        frame.extend([next, 64]);
        for end in [from, to] {
            frame.extend([0xfd; 15]);
            frame.push(end);
        }
        ports.iter().for_each(|port| frame.extend(port.to_be_bytes()));
        frame.extend([0; 16]);
        frame
    }

    #[test]
    fn a_flow_is_its_ends_and_its_protocol() {
        let (a, b) = ([10, 0, 0, 1], [10, 0, 0, 2]);
        let one = v4(a, b, TCP, 0, [1000, 80]);
        let flow = |frame: &[u8]| flow_of(frame, KEY);
        assert_eq!(flow(&one), flow(&v4(b, a, TCP, 0, [80, 1000])), "both directions");
        for other in [
            v4(a, b, UDP, 0, [1000, 80]),
            v4(a, b, TCP, 0, [1001, 80]),
            v4(a, b, TCP, 0, [1000, 81]),
            v4(a, b, TCP, 0, [80, 1000]),
            v4(a, [10, 0, 0, 3], TCP, 0, [1000, 80]),
        ] {
            assert_ne!(flow(&one), flow(&other));
        }
        // The fragments of a packet, whose ports only the first one has; and DF, which is none.
        let first = v4(a, b, UDP, 0x2000, [1000, 80]);
        let later = v4(a, b, UDP, 0x2001, [9, 9]);
        let last = v4(a, b, UDP, 5, [7, 8]);
        assert_eq!([flow(&first), flow(&first)], [flow(&later), flow(&last)]);
        assert_eq!(flow(&one), flow(&v4(a, b, TCP, 0x4000, [1000, 80])));
        // ICMP has no ports, and goes with the fragments.
        assert_eq!(flow(&v4(a, b, 1, 0, [1, 2])), flow(&v4(a, b, 1, 0, [3, 4])));
        let six = v6(1, 2, TCP, [1000, 80]);
        assert_eq!(flow(&six), flow(&v6(2, 1, TCP, [80, 1000])));
        assert_ne!(flow(&six), flow(&v6(1, 2, TCP, [1000, 81])));
        assert_ne!(flow(&six), flow(&v6(1, 3, TCP, [1000, 80])));
        // A fragment header.
        assert_eq!(flow(&v6(1, 2, 44, [1, 2])), flow(&v6(1, 2, 44, [3, 4])));
        // Options in front of the ports, and a tag in front of all.
        let mut options = one.clone();
        options[14] = 0x46;
        options.splice(34..34, [1, 1, 1, 0]);
        assert_eq!(flow(&one), flow(&options));
        let mut tagged = one.clone();
        tagged.splice(12..12, [0x81, 0, 0, 5]);
        assert_eq!(flow(&one), flow(&tagged));
        // No IP: the MAC addresses.
        let mut arp = one.clone();
        arp[12..14].copy_from_slice(&[8, 6]);
        let mut back = arp.clone();
        back[..12].rotate_left(6);
        back[20..].fill(0xaa);
        assert_eq!(flow(&arp), flow(&back));
        back[0] = 0x22;
        assert_ne!(flow(&arp), flow(&back));
    }

    #[test]
    fn any_bytes_have_a_flow() {
        let whole = [v4([1; 4], [2; 4], TCP, 0, [1, 2]), v6(1, 2, TCP, [1, 2])];
        for frame in whole {
            for len in 0..frame.len() {
                flow_of(&frame[..len], KEY);
                let mut strange = frame[..len].to_vec();
                if let Some(version) = strange.get_mut(14) {
                    *version |= 0x0f;
                    flow_of(&strange, KEY);
                }
            }
        }
    }
}
