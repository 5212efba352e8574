//! [`Merging`]: makes one packet of many.

use vmring_core::Frame;
use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};

use crate::limits::{DATAGRAMS_PER_PACKET, FLOWS_MERGED, LARGE_PACKET, SEGMENTS_PER_PACKET};

use super::candidate::{Candidate, Class, FlowKey, checksum_at, classify, flags};
use super::checksum::sum;
use super::headers::{IPV4_HEADER_LEN, IPV6_HEADER_LEN};

/// A buffer with a packet in it, and with space behind the packet for others to be appended.
///
/// [`Frame`] is one, and so is `Vec<u8>` with the capacity that it has: it never grows.
pub trait MergeBuffer {
    /// The packet.
    fn packet(&self) -> &[u8];

    /// The packet, to be changed.
    fn packet_mut(&mut self) -> &mut [u8];

    /// The longest packet that the buffer holds, in bytes.
    fn packet_len_max(&self) -> usize;

    /// Makes the packet empty. All of the buffer is space again.
    fn clear(&mut self);

    /// Appends bytes to the packet. Afterwards the packet is so much longer. It is only called with
    /// bytes that fit.
    fn append(&mut self, bytes: &[u8]);
}

impl MergeBuffer for Frame {
    fn packet(&self) -> &[u8] {
        self
    }

    fn packet_mut(&mut self) -> &mut [u8] {
        self
    }

    fn packet_len_max(&self) -> usize {
        self.capacity()
    }

    fn clear(&mut self) {
        self.reset();
    }

    fn append(&mut self, bytes: &[u8]) {
        let len = self.len();
        self.set_len(len + bytes.len()).expect("the caller appends what fits");
        self[len..].copy_from_slice(bytes);
    }
}

impl MergeBuffer for Vec<u8> {
    fn packet(&self) -> &[u8] {
        self
    }

    fn packet_mut(&mut self) -> &mut [u8] {
        self
    }

    fn packet_len_max(&self) -> usize {
        self.capacity()
    }

    fn clear(&mut self) {
        self.clear();
    }

    fn append(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// A packet that comes out of [`Merging`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Outgoing<B> {
    /// The packet. One that was merged with no other is as it was, but perhaps in another buffer.
    pub buffer: B,
    /// The offload header to be sent with it. For a packet that was merged with no other, it is the
    /// one that it came with.
    pub header: OffloadHeader,
    /// How many packets are in this one. It is at least 1.
    pub packets: usize,
}

/// Merges consecutive packets of a flow into one that the receiver cuts again. See the
/// [module](super) for an example.
///
/// It holds packets of at most [`FLOWS_MERGED`] flows until the batch ends and [`flush`](Self::flush)
/// is called. There is no timer. The packets of a flow are in the buffer of its first packet, or in one
/// that was given to [`reuse`](Self::reuse). It allocates nothing after [`new`](Self::new).
#[derive(Debug)]
pub struct Merging<B> {
    receiver: Offloads,
    packet_len_max: usize,
    merges_constant_ids: bool,
    /// The flows under way, in the order in which they began.
    flows: Vec<Flow<B>>,
    /// Empty buffers for flows that begin. The last is used first.
    empty: Vec<B>,
}

/// The identifications of the packets of a flow (IPv4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Idents {
    /// There is only one so far.
    One,
    /// Each is one more than the one before.
    Counted,
    /// All are the same.
    Constant,
}

#[derive(Debug)]
struct Flow<B> {
    /// The first packet. Its buffer holds the headers as they came, and the payload of all packets.
    first: Candidate,
    /// The sum of the pseudo header without the length.
    pseudo: u16,
    header: OffloadHeader,
    buffer: B,
    packets: usize,
    idents: Idents,
    /// FIN and PSH of the packets behind the first.
    last_flags: u8,
}

/// What became of a candidate that was to be appended to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Appended {
    /// It was not, and the flow has not changed.
    No,
    /// It was, and another one may follow.
    Open,
    /// It was, and it is the last of its packet.
    Last,
}

impl<B: MergeBuffer> Merging<B> {
    /// Merges what a receiver with these offloads cuts into segments, into packets of at most
    /// `packet_len_max` bytes.
    ///
    /// TCP is merged if the receiver has `tso4` or `tso6`, and UDP if it has `uso`. Nothing is merged
    /// if it does not complete checksums (`checksum`), or if it takes no header (`virtio_header`).
    pub fn new(receiver: &Offloads, packet_len_max: usize) -> Self {
        let takes_partial = receiver.virtio_header && receiver.checksum;
        Self {
            receiver: if takes_partial { *receiver } else { Offloads::default() },
            packet_len_max,
            merges_constant_ids: false,
            flows: Vec::with_capacity(FLOWS_MERGED),
            empty: Vec::with_capacity(FLOWS_MERGED),
        }
    }

    /// Merges packets of IPv4 also if all of them have the same identification and cannot be
    /// fragmented (DF). macOS and others send 0 in all of them.
    ///
    /// An offload header cannot say that they are the same, so the segments that the receiver cuts
    /// have identifications that count up. Nobody may look at them (RFC 6864, section 4.1). Without
    /// this call, the segments are the packets that came, byte for byte.
    #[must_use]
    pub fn with_constant_ids(mut self) -> Self {
        self.merges_constant_ids = true;
        self
    }

    /// Whether anything can be merged for this receiver.
    pub fn is_able(&self) -> bool {
        self.receiver.tso4 || self.receiver.tso6 || self.receiver.uso
    }

    /// Gives a buffer in which the packets of a flow are to be merged, instead of that of the first
    /// one. What is in it is lost. At most [`FLOWS_MERGED`] are kept; if there are as many, the buffer is
    /// returned.
    ///
    /// Give back the buffers of merged packets when they have been sent. The buffer that was used last is
    /// the next, so its memory is in the processor's cache. Without this call each merged packet is in
    /// another buffer, and writing to memory that is not in the cache costs more than all else.
    pub fn reuse(&mut self, mut buffer: B) -> Option<B> {
        if self.empty.len() == FLOWS_MERGED {
            return Some(buffer);
        }
        buffer.clear();
        self.empty.push(buffer);
        None
    }

    /// Whether no packet is held.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// Takes the next packet of the batch, with the offload header that it came with, and gives to
    /// `out` what can go on: this packet, or earlier ones that it ends.
    ///
    /// If the packet is now in another buffer, its own is returned and is free. Otherwise the buffer is
    /// held, or `out` had it. Packets of one flow come out in the order in which they went
    /// in. A packet that is not certain to be mergeable comes out as it is.
    ///
    /// [`Checksum::DataValid`] is believed, and only a device may say it. Remove it from what a guest
    /// sends ([`OffloadHeader::for_sending`]).
    pub fn push(
        &mut self,
        buffer: B,
        header: &OffloadHeader,
        mut out: impl FnMut(Outgoing<B>),
    ) -> Option<B> {
        let mut candidate = match classify(buffer.packet(), header) {
            Class::Candidate(candidate) if self.cuts(&candidate.key) => candidate,
            Class::Candidate(Candidate { key, .. }) | Class::Lone(key) => {
                self.end(&key, &mut out);
                out(unchanged(buffer, header));
                return None;
            }
            Class::Foreign => {
                out(unchanged(buffer, header));
                return None;
            }
            Class::Unclear => {
                self.flush(&mut out);
                out(unchanged(buffer, header));
                return None;
            }
        };
        if let Some(at) = self.position(&candidate.key) {
            let flow = &mut self.flows[at];
            match flow.append(
                &mut candidate,
                buffer.packet(),
                self.packet_len_max,
                self.merges_constant_ids,
            ) {
                Appended::Open => return Some(buffer),
                Appended::Last => {
                    out(self.flows.remove(at).finish());
                    return Some(buffer);
                }
                Appended::No => out(self.flows.remove(at).finish()),
            }
        }
        // Nothing may follow these.
        if candidate.tcp_flags(buffer.packet()) & flags::LAST != 0 {
            out(unchanged(buffer, header));
            return None;
        }
        if self.flows.len() == FLOWS_MERGED {
            out(self.flows.remove(0).finish());
        }
        let packet = buffer.packet();
        let reused = self.empty.pop_if(|empty| empty.packet_len_max() >= packet.len());
        let (buffer, free) = match reused {
            Some(mut reused) => {
                reused.append(packet);
                (reused, Some(buffer))
            }
            None => (buffer, None),
        };
        self.flows.push(Flow {
            pseudo: candidate.pseudo(buffer.packet()),
            first: candidate,
            header: *header,
            buffer,
            packets: 1,
            idents: Idents::One,
            last_flags: 0,
        });
        free
    }

    /// Ends the batch: gives every packet that is held to `out`, in the order in which their flows
    /// began.
    pub fn flush(&mut self, mut out: impl FnMut(Outgoing<B>)) {
        self.flows.drain(..).for_each(|flow| out(flow.finish()));
    }

    fn cuts(&self, key: &FlowKey) -> bool {
        match (key.is_tcp, key.is_v4) {
            (true, true) => self.receiver.tso4,
            (true, false) => self.receiver.tso6,
            (false, _) => self.receiver.uso,
        }
    }

    fn position(&self, key: &FlowKey) -> Option<usize> {
        self.flows.iter().position(|flow| flow.first.key == *key)
    }

    /// Ends one flow, if it is under way.
    fn end(&mut self, key: &FlowKey, out: &mut impl FnMut(Outgoing<B>)) {
        if let Some(at) = self.position(key) {
            out(self.flows.remove(at).finish());
        }
    }
}

fn unchanged<B>(buffer: B, header: &OffloadHeader) -> Outgoing<B> {
    Outgoing { buffer, header: *header, packets: 1 }
}

impl<B: MergeBuffer> Flow<B> {
    /// Appends the payload of a packet of this flow, if it is the next segment. What is compared is
    /// what Linux compares (`tcp_gro_receive`, `udp_gro_receive_segment`, `inet_gro_flush`,
    /// `ipv6_gro_receive`).
    fn append(
        &mut self,
        next: &mut Candidate,
        packet: &[u8],
        packet_len_max: usize,
        merges_constant_ids: bool,
    ) -> Appended {
        let Self { first, pseudo, buffer, packets, .. } = self;
        let held = buffer.packet();
        let len = held.len() + next.len;
        let most = if first.key.is_tcp { SEGMENTS_PER_PACKET } else { DATAGRAMS_PER_PACKET };
        // The length of an IPv4 packet counts its header, and that of an IPv6 packet does not.
        let counted = if first.key.is_v4 { first.ip } else { first.ip + IPV6_HEADER_LEN };
        if len > packet_len_max.min(buffer.packet_len_max())
            || len - counted > LARGE_PACKET
            || *packets == most
            || next.len > first.len
            || !next.agrees(packet, first, held)
        {
            return Appended::No;
        }
        if first.key.is_tcp {
            // CWR begins a packet, and FIN and PSH end one. All others are the same in each segment.
            let differing = first.tcp_flags(held) ^ next.tcp_flags(packet);
            let expected = first.sequence(held).wrapping_add((held.len() - first.payload) as u32);
            if differing & !(flags::LAST | flags::CWR) != 0
                || next.tcp_flags(packet) & flags::CWR != 0
                || next.sequence(packet) != expected
            {
                return Appended::No;
            }
        }
        let mut idents = self.idents;
        if first.key.is_v4 {
            let ((begin, is_atomic), (ident, _)) = (first.ident(held), next.ident(packet));
            idents = match idents {
                Idents::One if merges_constant_ids && is_atomic && ident == begin => {
                    Idents::Constant
                }
                Idents::One => Idents::Counted,
                decided => decided,
            };
            let offset = if idents == Idents::Constant { 0 } else { *packets as u16 };
            if ident != begin.wrapping_add(offset) {
                return Appended::No;
            }
        }
        // The first is verified when there is a second, so a packet that is alone costs nothing.
        if *packets == 1 && !first.verify(held, *pseudo) || !next.verify(packet, *pseudo) {
            return Appended::No;
        }
        let last_flags = next.tcp_flags(packet) & flags::LAST;
        buffer.append(&packet[next.payload..]);
        (self.idents, self.packets) = (idents, self.packets + 1);
        self.last_flags = last_flags;
        match next.len < first.len || last_flags != 0 {
            true => Appended::Last,
            false => Appended::Open,
        }
    }

    /// The packet and its header. If it is more than one, its headers are made those of one that is to
    /// be cut.
    fn finish(self) -> Outgoing<B> {
        let Self { first, pseudo, header, mut buffer, packets, last_flags, .. } = self;
        if packets == 1 {
            return unchanged(buffer, &header);
        }
        let Candidate { key, ip, transport, payload, .. } = first;
        let packet = buffer.packet_mut();
        let ecn = first.tcp_flags(packet) & flags::CWR != 0;
        // The casts do not truncate: `append` lets no packet grow beyond `LARGE_PACKET`.
        let (ip_len, len) = ((packet.len() - ip) as u16, (packet.len() - transport) as u16);
        let field = checksum_at(key.is_tcp);
        if key.is_v4 {
            let header = &mut packet[ip..ip + IPV4_HEADER_LEN];
            header[2..4].copy_from_slice(&ip_len.to_be_bytes());
            header[10..12].fill(0);
            let checksum = !sum(0, header);
            header[10..12].copy_from_slice(&checksum.to_be_bytes());
        } else {
            packet[ip + 4..ip + 6].copy_from_slice(&len.to_be_bytes());
        }
        let datagram = &mut packet[transport..];
        match key.is_tcp {
            true => datagram[13] |= last_flags,
            false => datagram[4..6].copy_from_slice(&len.to_be_bytes()),
        }
        let pseudo = sum(pseudo, &len.to_be_bytes());
        datagram[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
        let header = OffloadHeader {
            // These casts do not truncate: `classify` takes no packet whose headers are so long.
            checksum: Checksum::Partial { start: transport as u16, offset: field as u16 },
            gso: match (key.is_tcp, key.is_v4) {
                (true, true) => Gso::TcpV4,
                (true, false) => Gso::TcpV6,
                (false, _) => Gso::UdpL4,
            },
            ecn,
            segment_size: first.len as u16,
            header_len: payload as u16,
            num_buffers: 0,
        };
        Outgoing { buffer, header, packets }
    }
}
