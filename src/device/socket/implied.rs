//! Offload on a wire that has no virtio header: what is left to do of a frame is found in the frame.
//!
//! libkrun with offload, and vmnet with its keys for segmentation and checksums, exchange frames of up to
//! 64 KiB and none of the 12 bytes that would say what they are. The sender leaves checksums to the
//! receiver. A receiver knows nothing of that, so what it gets has whole checksums.
//!
//! A frame that is received gets a header here: the checksum of TCP or UDP is to be completed, whether it
//! was or not, and TCP above the MTU is to be cut. A frame that is sent has its checksum completed over the
//! whole of it, and is not cut.

use vmring_core::offload::{Checksum, Gso, OffloadHeader};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::software::{self, Left};

use super::limits::HEADER_LEN;
use crate::config::Offloads;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const VLAN: [u8; 2] = [0x81, 0x00];
const TCP: u8 = 6;
const UDP: u8 = 17;
/// The fixed parts of headers, in bytes.
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const TCP_LEN: usize = 20;
const UDP_LEN: usize = 8;
/// The flag of TCP that says that a congestion was heeded (RFC 3168).
const CWR: u8 = 0x80;

/// Where the parts of a TCP segment or a UDP datagram are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Transport {
    is_tcp: bool,
    is_v6: bool,
    /// Where IP begins, and where the transport header does.
    ip: usize,
    start: usize,
    /// Where the packet ends. Behind it is padding.
    end: usize,
}

impl Transport {
    /// Finds it. `None` if the frame is something else, a fragment, or IPv6 with extension headers.
    fn of(frame: &[u8]) -> Option<Self> {
        let mut ip = ETHERNET_HEADER_LEN;
        let mut kind = frame.get(ip - 2..ip)?;
        if kind == VLAN {
            ip += 4;
            kind = frame.get(ip - 2..ip)?;
        }
        let packet = frame.get(ip..)?;
        let number = |at: usize| usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]));
        let (is_v6, protocol, header, len) = if kind == IPV4 && packet.len() >= IPV4_LEN {
            let header = usize::from(packet[0] & 0x0f) * 4;
            let is_fragment = number(6) & 0x3fff != 0;
            if packet[0] >> 4 != 4 || header < IPV4_LEN || is_fragment {
                return None;
            }
            (false, packet[9], header, number(2))
        } else if kind == IPV6 && packet.len() >= IPV6_LEN {
            if packet[0] >> 4 != 6 {
                return None;
            }
            (true, packet[6], IPV6_LEN, IPV6_LEN + number(4))
        } else {
            return None;
        };
        let least = match protocol {
            TCP => TCP_LEN,
            UDP => UDP_LEN,
            _ => return None,
        };
        if len < header + least || packet.len() < len {
            return None;
        }
        let (start, end) = (ip + header, ip + len);
        Some(Self { is_tcp: protocol == TCP, is_v6, ip, start, end })
    }

    /// Where the checksum is, counted from the start of the transport header.
    fn field(&self) -> usize {
        if self.is_tcp { 16 } else { 6 }
    }

    /// The sum of the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1).
    fn pseudo_sum(&self, frame: &[u8]) -> u16 {
        let addresses = match self.is_v6 {
            true => &frame[self.ip + 8..self.ip + 40],
            false => &frame[self.ip + 12..self.ip + 20],
        };
        let words =
            addresses.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let protocol = u32::from(if self.is_tcp { TCP } else { UDP });
        // A packet is at most 64 KiB long, and 18 words do not overflow.
        let mut sum = words.sum::<u32>() + protocol + (self.end - self.start) as u32;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}

/// The header of a frame that was received. Its checksum is made partial, if it has one. `None` if the frame
/// is longer than the MTU and nothing can cut it.
pub(super) fn infer(frame: &mut [u8], mtu: usize, offloads: &Offloads) -> Option<[u8; HEADER_LEN]> {
    let found = Transport::of(frame);
    let is_long = match &found {
        Some(transport) => transport.end - transport.ip > mtu,
        // A VLAN tag is counted as a part of the frame.
        None => frame.len() > mtu + ETHERNET_HEADER_LEN + 4,
    };
    let mut header = OffloadHeader::NONE;
    if let Some(transport) = found {
        let at = transport.start + transport.field();
        let has_none = !transport.is_tcp && !transport.is_v6 && frame[at..at + 2] == [0, 0];
        // A device sums to the end of the frame, so padding would be in the sum.
        let is_padded = frame[transport.end..].iter().any(|byte| *byte != 0);
        if offloads.checksum && !has_none && !is_padded {
            let sum = transport.pseudo_sum(frame);
            frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            let (start, offset) = (transport.start as u16, transport.field() as u16);
            header.checksum = Checksum::Partial { start, offset };
        }
        if is_long && transport.is_tcp {
            let tcp = usize::from(frame[transport.start + 12] >> 4) * 4;
            if tcp < TCP_LEN || transport.start + tcp > transport.end {
                return None;
            }
            let headers = transport.start + tcp - transport.ip;
            header.gso = if transport.is_v6 { Gso::TcpV6 } else { Gso::TcpV4 };
            header.segment_size = mtu.checked_sub(headers).filter(|size| *size > 0)? as u16;
            header.ecn = frame[transport.start + 13] & CWR != 0;
        }
    }
    if is_long && header.gso == Gso::None {
        return None;
    }
    header.validate(frame.len()).ok()?;
    if software::left_by(offloads, &header) != Left::Nothing {
        return None;
    }
    let mut bytes = [0; HEADER_LEN];
    header.write(&mut bytes);
    Some(bytes)
}

/// Completes the checksum of a frame that is to be sent, which has its header in front. The header says
/// afterwards that nothing is left. Returns false if the header is wrong.
pub(super) fn finish(bytes: &mut [u8], offloads: &Offloads) -> bool {
    let Some((front, frame)) = bytes.split_first_chunk_mut::<HEADER_LEN>() else { return false };
    let Ok(header) = OffloadHeader::parse_ignoring_reserved(front) else { return false };
    if header.validate(frame.len()).is_err()
        || software::left_by(offloads, &header) != Left::Nothing
    {
        return false;
    }
    let whole = OffloadHeader { checksum: header.checksum, ..OffloadHeader::NONE };
    let completed = software::complete_checksum(&whole, frame).is_ok();
    front.fill(0);
    completed
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: usize = 1500;

    fn offloads() -> Offloads {
        let mut offloads = Offloads::ALL;
        offloads.uso = false;
        offloads
    }

    /// A frame with this payload in it, whose checksum is complete.
    fn frame(is_v6: bool, is_tcp: bool, tag: bool, payload: usize) -> Vec<u8> {
        let transport = if is_tcp { TCP_LEN + 12 } else { UDP_LEN };
        let len = transport + payload;
        let mut frame = vec![2; 12];
        if tag {
            frame.extend([0x81, 0, 0, 7]);
        }
        let protocol = if is_tcp { TCP } else { UDP };
        if is_v6 {
            frame.extend(IPV6);
            frame.extend([0x60, 0, 0, 0, (len >> 8) as u8, len as u8, protocol, 64]);
            frame.extend([0xfd; 16]);
            frame.extend([0xfe; 16]);
        } else {
            let total = IPV4_LEN + len;
            frame.extend(IPV4);
            frame.extend([0x45, 0, (total >> 8) as u8, total as u8, 0, 0, 0x40, 0, 64, protocol]);
            frame.extend([0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let start = frame.len();
        frame.extend((0..len).map(|i| (i * 7) as u8));
        if is_tcp {
            frame[start + 12] = 8 << 4;
            frame[start + 13] = 0x10;
        } else {
            frame[start + 4..start + 6].copy_from_slice(&(len as u16).to_be_bytes());
        }
        let found = Transport::of(&frame).expect("it is found");
        assert_eq!((found.start, found.end), (start, frame.len()));
        let at = start + found.field();
        let sum = found.pseudo_sum(&frame);
        frame[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let partial = Checksum::Partial { start: start as u16, offset: found.field() as u16 };
        let header = OffloadHeader { checksum: partial, ..OffloadHeader::NONE };
        software::complete_checksum(&header, &mut frame).expect("it can be completed");
        frame
    }

    fn parsed(header: [u8; HEADER_LEN]) -> OffloadHeader {
        OffloadHeader::parse(&header).expect("a header")
    }

    /// Goal: whatever a sender leaves, the frame with its header completes to the same bytes as the whole
    /// frame.
    #[test]
    fn a_frame_is_completed_whatever_was_left_of_it() {
        for (is_v6, is_tcp, tag) in
            [(false, true, false), (false, false, true), (true, true, true), (true, false, false)]
        {
            for payload in [1, 100, 1400, 60_000] {
                if payload > MTU && !is_tcp {
                    continue;
                }
                let whole = frame(is_v6, is_tcp, tag, payload);
                let found = Transport::of(&whole).expect("it is found");
                for left in [None, Some([0, 0]), Some([0x12, 0x34])] {
                    let mut sent = whole.clone();
                    let at = found.start + found.field();
                    if let Some(left) = left.filter(|_| is_tcp || is_v6) {
                        sent[at..at + 2].copy_from_slice(&left);
                    }
                    let header = infer(&mut sent, MTU, &offloads()).expect("it can be delivered");
                    let parsed = parsed(header);
                    assert!(matches!(parsed.checksum, Checksum::Partial { .. }));
                    let is_long = found.end - found.ip > MTU;
                    let gso = match (is_long, is_v6) {
                        (false, _) => Gso::None,
                        (true, false) => Gso::TcpV4,
                        (true, true) => Gso::TcpV6,
                    };
                    assert_eq!(parsed.gso, gso);
                    if is_long {
                        let ip = if is_v6 { IPV6_LEN } else { IPV4_LEN };
                        assert_eq!(usize::from(parsed.segment_size), MTU - ip - TCP_LEN - 12);
                    }
                    let mut bytes = [&header[..], &sent].concat();
                    assert!(finish(&mut bytes, &offloads()));
                    assert_eq!(bytes[..HEADER_LEN], [0; HEADER_LEN]);
                    assert!(bytes[HEADER_LEN..] == whole, "{is_v6} {is_tcp} {payload}");
                    // A frame that could not be sent is finished again, and stays as it is.
                    assert!(finish(&mut bytes, &offloads()));
                    assert!(bytes[HEADER_LEN..] == whole);
                }
            }
        }
    }

    /// Goal: what has no checksum to complete stays as it is, and what nothing can cut is refused.
    #[test]
    fn other_frames_stay_as_they_are_or_are_too_long() {
        let plain = |mut frame: Vec<u8>| {
            let before = frame.clone();
            let header = infer(&mut frame, MTU, &offloads()).expect("it can be delivered");
            assert_eq!((parsed(header), frame), (OffloadHeader::NONE, before));
        };
        let mut arp = vec![0; 60];
        arp[12..14].copy_from_slice(&[8, 6]);
        plain(arp);
        // A fragment, a datagram without a checksum, one with something behind it.
        let mut fragment = frame(false, true, false, 100);
        fragment[20] = 0x20;
        plain(fragment);
        let mut none = frame(false, false, false, 100);
        none[40..42].fill(0);
        plain(none);
        plain([frame(false, false, false, 5), vec![9]].concat());
        // Lengths that are wrong.
        for (at, value) in [(14, 0x44), (14, 0x65), (16, 0xff), (17, 10)] {
            let mut wrong = frame(false, true, false, 10);
            wrong[at] = value;
            plain(wrong);
        }
        for cut in 0..54 {
            let mut short = frame(false, true, false, 100)[..cut].to_vec();
            let _ = infer(&mut short, MTU, &offloads());
        }
        let refused = |mut frame: Vec<u8>, offloads: Offloads| {
            assert_eq!(infer(&mut frame, MTU, &offloads), None);
        };
        refused(frame(false, false, false, 1500), offloads());
        refused(vec![0; 1519], offloads());
        let mut checksum = Offloads::default();
        (checksum.checksum, checksum.virtio_header) = (true, true);
        refused(frame(false, true, false, 1500), checksum);
        let mut no_space = frame(false, true, false, 1500);
        no_space[46] = 0xf0;
        let header = infer(&mut no_space, 68, &offloads());
        assert_eq!(header, None, "no payload fits behind its headers");
        for offset in [0, 4 << 4] {
            let mut wrong = frame(false, true, false, 1500);
            wrong[46] = offset;
            refused(wrong, offloads());
        }
    }
}
