//! A guest in this program: one TCP connection over the embedded network, and nothing else.
//!
//! It has just enough of TCP to move a stream over a network that loses almost nothing. It sends packets of
//! 64 KiB with the header for offload, and sends everything again that is not acknowledged in time.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmring::device::Offloads;
use vmring::device::embedded::nat::NatSettings;
use vmring::{
    Checksum, Direction, Drive, Embedded, Frame, Gso, Interface, Mode, OffloadHeader, Ring, RingOp,
};

use crate::result::Result;

/// Bytes of the headers of Ethernet, IPv4 and TCP.
const HEADERS: usize = ETHERNET + IP + TCP;
const ETHERNET: usize = 14;
const IP: usize = 20;
const TCP: usize = 20;
/// The bytes of a segment on a wire, and of one packet that is cut into such segments.
const MSS: usize = 1460;
const SEGMENT: usize = (65_535 - IP - TCP) / MSS * MSS;
/// The window that the guest offers, and its shift.
const WINDOW: u16 = u16::MAX;
const SHIFT: u8 = 8;
/// Packets in flight in each direction.
const DEPTH: u32 = 256;
const PORT: u16 = 40_000;
/// Longer than an answer takes.
const PATIENCE: Duration = Duration::from_secs(5);
/// After so long without an acknowledgment everything is sent again.
const TIMEOUT: Duration = Duration::from_millis(200);
/// How long the guest sleeps if nothing happens.
const NAP: Duration = Duration::from_millis(20);
/// The sequence number of the guest's SYN. The stream of a measurement passes the largest number.
const FIRST: u32 = 0xffff_0000;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// The byte at this place of the guest's stream.
pub(super) fn byte_at(place: u64) -> u8 {
    (place ^ (place >> 8)) as u8
}

/// See the [module](self).
pub(super) struct Guest {
    ring: Ring,
    /// Frames that are not in flight.
    free: Vec<Frame>,
    /// Frames that are not posted.
    spare: Vec<Frame>,
    mac: [u8; 6],
    gateway_mac: [u8; 6],
    address: Ipv4Addr,
    server: SocketAddrV4,
    /// The sequence number of the next byte that is sent.
    next: u32,
    /// The oldest byte that is not acknowledged.
    oldest: u32,
    /// How many bytes from there on the other side takes, and its shift.
    window: u32,
    shift: u8,
    /// How often the oldest byte was asked for again.
    duplicates: u32,
    /// The sequence number of the next byte that is received.
    expected: u32,
    /// Whether something arrived that is not acknowledged.
    owes_ack: bool,
    ended: bool,
    _interface: Interface,
}

/// A segment that has arrived.
struct Segment<'a> {
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    options: &'a [u8],
    len: usize,
}

impl Guest {
    /// A guest on a network of its own, whose translator has the sockets of the calling thread's namespace,
    /// with a connection to `server`. A server at the loopback address is reached at the gateway's, as a port
    /// of the host that the network opens.
    pub(super) fn connect(mut server: SocketAddrV4) -> Result<Self> {
        let is_here = server.ip().is_loopback();
        let mut settings = NatSettings::new();
        if is_here {
            settings = settings.host_port(server.port().to_string().parse()?);
        }
        let network = Embedded::network("vmring-performance nat").nat(settings);
        let builder = Interface::builder().mode(Mode::Shared).offloads(Offloads::ALL);
        let interface = builder.device(network).start()?;
        let ring = interface.ring(Direction::Both).depth(DEPTH).drive(Drive::Inline);
        let ring = ring.prefault(true).build()?;
        let range = interface.info().ipv4.ok_or("the network has no addresses")?;
        if is_here {
            server.set_ip(range.start);
        }
        let frames = |count| std::iter::from_fn(|| ring.alloc()).take(count).collect::<Vec<_>>();
        let mut guest = Self {
            free: frames(DEPTH as usize),
            spare: frames(DEPTH as usize),
            mac: interface.mac().into_array(),
            gateway_mac: [0xff; 6],
            address: Ipv4Addr::from(u32::from(range.start) + 1),
            server,
            next: FIRST,
            oldest: FIRST,
            window: 0,
            shift: 0,
            duplicates: 0,
            expected: 0,
            owes_ack: false,
            ended: false,
            ring,
            _interface: interface,
        };
        guest.find_gateway(range.start)?;
        guest.shake_hands()?;
        Ok(guest)
    }

    /// Asks for the gateway's address by ARP.
    fn find_gateway(&mut self, gateway: Ipv4Addr) -> Result<()> {
        let mut request = [0; 60];
        request[..6].fill(0xff);
        request[6..12].copy_from_slice(&self.mac);
        request[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request[22..28].copy_from_slice(&self.mac);
        request[28..32].copy_from_slice(&self.address.octets());
        request[38..42].copy_from_slice(&gateway.octets());
        let mut frame = self.free.pop().ok_or("there is no frame")?;
        frame.copy_from(&request)?;
        self.ring.submit_writes([(frame, 0)])?;
        let found = self.until(|packet| {
            let is_reply = packet.len() >= 42 && packet[12..14] == [8, 6] && packet[21] == 2;
            is_reply.then(|| packet[22..28].try_into().expect("six bytes"))
        })?;
        self.gateway_mac = found;
        Ok(())
    }

    fn shake_hands(&mut self) -> Result<()> {
        let [high, low] = (MSS as u16).to_be_bytes();
        let options = [2, 4, high, low, 1, 3, 3, SHIFT];
        self.send(SYN, &options, 0)?;
        self.next = FIRST.wrapping_add(1);
        self.oldest = self.next;
        let own = self.next;
        let (seq, window, shift) = self.until(|packet| {
            let segment = parse(packet)?;
            (segment.flags & (SYN | ACK) == SYN | ACK && segment.ack == own)
                .then(|| (segment.seq, segment.window, shift_of(segment.options)))
        })?;
        (self.expected, self.window, self.shift) =
            (seq.wrapping_add(1), window.into(), shift.unwrap_or(0));
        self.send(ACK, &[], 0)
    }

    /// Waits for a packet of which `wanted` makes something.
    fn until<T>(&mut self, wanted: impl Fn(&[u8]) -> Option<T>) -> Result<T> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            self.post()?;
            self.ring.wait(1, Some(NAP));
            let mut found = None;
            for done in self.ring.reap() {
                let op = done.op;
                let Some(frame) = done.take_frame() else { continue };
                if op == RingOp::Write {
                    self.free.push(frame);
                } else {
                    found = found.or_else(|| wanted(&frame));
                    self.spare.push(frame);
                }
            }
            if let Some(found) = found {
                return Ok(found);
            }
        }
        Err("the gateway does not answer the scripted guest".into())
    }

    fn post(&mut self) -> Result<()> {
        self.ring.submit_reads(self.spare.drain(..).map(|frame| (frame, 0)))?;
        Ok(())
    }

    /// Sends one segment from `next` on, whose data is what the frame has.
    fn send(&mut self, flags: u8, options: &[u8], len: usize) -> Result<()> {
        let mut frame = self.free.pop().ok_or("there is no frame")?;
        self.fill(&mut frame, flags, options, len)?;
        self.ring.submit_writes([(frame, 0)])?;
        self.owes_ack = false;
        Ok(())
    }

    /// Writes the headers of a segment. `len` bytes of data follow them.
    fn fill(&self, frame: &mut Frame, flags: u8, options: &[u8], len: usize) -> Result<()> {
        let total = HEADERS + options.len() + len;
        frame.set_len(total)?;
        let packet = &mut frame[..];
        packet[..6].copy_from_slice(&self.gateway_mac);
        packet[6..12].copy_from_slice(&self.mac);
        packet[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        packet[16..18].copy_from_slice(&((total - ETHERNET) as u16).to_be_bytes());
        packet[18..26].copy_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
        packet[26..30].copy_from_slice(&self.address.octets());
        packet[30..34].copy_from_slice(&self.server.ip().octets());
        let sum = !fold(words(&packet[14..34]));
        packet[24..26].copy_from_slice(&sum.to_be_bytes());
        packet[34..36].copy_from_slice(&PORT.to_be_bytes());
        packet[36..38].copy_from_slice(&self.server.port().to_be_bytes());
        packet[38..42].copy_from_slice(&self.next.to_be_bytes());
        packet[42..46].copy_from_slice(&self.expected.to_be_bytes());
        packet[46] = (((TCP + options.len()) / 4) as u8) << 4;
        packet[47] = flags;
        packet[48..50].copy_from_slice(&WINDOW.to_be_bytes());
        packet[50..54].fill(0);
        packet[54..54 + options.len()].copy_from_slice(options);
        // The sum of the pseudo-header; the device adds the rest.
        let pseudo = words(&packet[26..34]) + 6 + (total - ETHERNET - IP) as u32;
        packet[50..52].copy_from_slice(&fold(pseudo).to_be_bytes());
        let is_long = len > MSS;
        frame.set_offload(&OffloadHeader {
            checksum: Checksum::Partial { start: 34, offset: 16 },
            gso: if is_long { Gso::TcpV4 } else { Gso::None },
            segment_size: if is_long { MSS as u16 } else { 0 },
            header_len: (HEADERS + options.len()) as u16,
            ..OffloadHeader::NONE
        })?;
        Ok(())
    }

    /// Sends bytes until `stop`. If `checked` is given, only so many, each the one of its place.
    pub(super) fn send_stream(&mut self, stop: &AtomicBool, checked: Option<u64>) -> Result<()> {
        let first = self.next;
        let (mut progress, mut before) = (Instant::now(), self.oldest);
        while !stop.load(Ordering::Relaxed) {
            self.take_all()?;
            self.post()?;
            if self.ended {
                return Err("the translator has ended the connection".into());
            }
            if self.oldest != before {
                (progress, before) = (Instant::now(), self.oldest);
            }
            let done = u64::from(self.oldest.wrapping_sub(first));
            if checked.is_some_and(|all| done >= all) {
                return Ok(());
            }
            let lost = self.duplicates >= 3 || progress.elapsed() > TIMEOUT;
            if lost && self.next != self.oldest {
                self.next = self.oldest;
                (progress, self.duplicates) = (Instant::now(), 0);
            }
            if self.send_what_fits(first, checked)? == 0 {
                self.ring.wait(1, Some(NAP));
            }
        }
        Ok(())
    }

    /// Sends what the window and the frames allow. Returns the number of packets.
    fn send_what_fits(&mut self, first: u32, checked: Option<u64>) -> Result<usize> {
        let mut batch = Vec::new();
        while let Some(mut frame) = self.free.pop() {
            let under_way = self.next.wrapping_sub(self.oldest);
            let place = u64::from(self.next.wrapping_sub(first));
            let left = checked.map_or(SEGMENT as u64, |all| all.saturating_sub(place));
            let space = self.window.saturating_sub(under_way) as usize;
            let len = SEGMENT.min(left as usize).min(space);
            // A silly window is not used while something is under way (RFC 9293, 3.8.6.2.1).
            if len == 0 || (len < SEGMENT && len as u64 != left && under_way > 0) {
                self.free.push(frame);
                break;
            }
            self.fill(&mut frame, ACK | PSH, &[], len)?;
            if checked.is_some() {
                let bytes = frame[HEADERS..].iter_mut().zip(place..);
                bytes.for_each(|(byte, place)| *byte = byte_at(place));
            }
            self.next = self.next.wrapping_add(len as u32);
            self.owes_ack = false;
            batch.push((frame, 0));
        }
        let count = batch.len();
        self.ring.submit_writes(batch)?;
        Ok(count)
    }

    /// Receives bytes until `stop`, and adds them up in `received`. Each is compared with the one of its
    /// place if `checked`.
    pub(super) fn receive_stream(
        &mut self,
        stop: &AtomicBool,
        received: &AtomicU64,
        checked: bool,
    ) -> Result<()> {
        let first = self.expected;
        while !stop.load(Ordering::Relaxed) {
            let wrong = self.take_all_and(|place, bytes| {
                let place = u64::from(place.wrapping_sub(first));
                checked && bytes.iter().zip(place..).any(|(byte, place)| *byte != byte_at(place))
            })?;
            if wrong {
                return Err("the scripted guest received other bytes than were sent".into());
            }
            self.post()?;
            // The last 32 bits are enough: a look comes long before 4 GiB have passed.
            let more = self
                .expected
                .wrapping_sub(first.wrapping_add(received.load(Ordering::Relaxed) as u32));
            received.fetch_add(more.into(), Ordering::Relaxed);
            if self.owes_ack {
                self.send(ACK, &[], 0)?;
            } else {
                if self.ended {
                    return Ok(());
                }
                self.ring.wait(1, Some(NAP));
            }
        }
        Ok(())
    }

    fn take_all(&mut self) -> Result<()> {
        self.take_all_and(|_, _| false).map(drop)
    }

    /// Takes what has arrived. Returns whether `wrong` says so of the data of any segment, which it is given
    /// with its sequence number.
    fn take_all_and(&mut self, wrong: impl Fn(u32, &[u8]) -> bool) -> Result<bool> {
        let mut is_wrong = false;
        for done in self.ring.reap() {
            let op = done.op;
            let Some(frame) = done.take_frame() else { continue };
            if op == RingOp::Write {
                self.free.push(frame);
                continue;
            }
            if let Some(segment) = parse(&frame) {
                if segment.flags & RST != 0 {
                    return Err("the translator has reset the connection".into());
                }
                let (ack, window) = (segment.ack, u32::from(segment.window) << self.shift);
                let newly = ack.wrapping_sub(self.oldest) as i32;
                if newly > 0 {
                    // What was sent again may be acknowledged further than it was sent.
                    if (ack.wrapping_sub(self.next) as i32) > 0 {
                        self.next = ack;
                    }
                    (self.oldest, self.duplicates) = (ack, 0);
                } else if newly == 0 && segment.len == 0 && window == self.window {
                    self.duplicates += 1;
                }
                if newly >= 0 {
                    self.window = window;
                }
                if segment.len > 0 {
                    self.owes_ack = true;
                    if segment.seq == self.expected {
                        is_wrong |= wrong(segment.seq, &frame[frame.len() - segment.len..]);
                        self.expected = self.expected.wrapping_add(segment.len as u32);
                    }
                }
                self.ended |= segment.flags & FIN != 0;
            }
            self.spare.push(frame);
        }
        Ok(is_wrong)
    }
}

/// The segment of a frame, if it is one of TCP over IPv4.
fn parse(frame: &[u8]) -> Option<Segment<'_>> {
    if frame.len() < HEADERS || frame[12..14] != [8, 0] || frame[14] != 0x45 || frame[23] != 6 {
        return None;
    }
    let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
    let total = ETHERNET + usize::from(word(16));
    let data = ETHERNET + IP + usize::from(frame[46] >> 4) * 4;
    (HEADERS..=total).contains(&data).then_some(())?;
    // A short packet is padded to Ethernet's length.
    (total == frame.len() || (total < frame.len() && data == total)).then_some(())?;
    Some(Segment {
        seq: long(38),
        ack: long(42),
        flags: frame[47],
        window: word(48),
        options: &frame[HEADERS..data],
        len: total - data,
    })
}

/// The window shift among the options of a SYN (RFC 7323, 2.2).
fn shift_of(mut options: &[u8]) -> Option<u8> {
    loop {
        match options {
            [3, 3, shift, ..] => return Some(*shift),
            [1, rest @ ..] => options = rest,
            [0, ..] | [] => return None,
            [_, len, ..] => options = options.get(usize::from((*len).max(2))..)?,
            [_] => return None,
        }
    }
}

/// The sum of 16-bit words.
fn words(bytes: &[u8]) -> u32 {
    bytes.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum()
}

/// Adds the carries (RFC 1071).
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_shift_is_found_among_other_options() {
        assert_eq!(shift_of(&[2, 4, 5, 180, 1, 3, 3, 7]), Some(7));
        assert_eq!(shift_of(&[2, 4, 5, 180]), None);
        assert_eq!(shift_of(&[8, 10, 0]), None);
        assert_eq!(shift_of(&[2, 0, 3, 3, 9]), Some(9));
    }

    #[test]
    fn a_header_sums_to_zero_with_its_checksum() {
        let header = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1];
        let rest = [0xc0, 0xa8, 0, 0xc7];
        assert_eq!(!fold(words(&header) + words(&rest)), 0);
    }
}
