//! Packets that leave work to others, in many forms, and what software makes of them.
#![allow(dead_code, reason = "this is a module of several tests, and each uses a part")]

use macaddr::MacAddr6;
use vmring_core::offload::{Checksum, Gso, OffloadHeader, Offloads};
use vmring_embedded::software::{self, Segments};

/// The offloads that the bits of `set` name.
pub(crate) fn offloads(set: u32) -> Offloads {
    let mut offloads = Offloads::default();
    offloads.checksum = set & 1 != 0;
    offloads.tso4 = set & 2 != 0;
    offloads.tso6 = set & 4 != 0;
    offloads.uso = set & 8 != 0;
    offloads
}

/// Every offload.
pub(crate) const ALL: u32 = 15;

/// A generator of numbers that a seed repeats (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % limit as u64) as usize
    }
}

/// The form of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) v4: bool,
    pub(crate) tcp: bool,
    pub(crate) tagged: bool,
    pub(crate) payload: usize,
    /// The bytes of each segment, if it is to be cut.
    pub(crate) segment: Option<u16>,
}

impl Form {
    pub(crate) fn random(random: &mut Random) -> Self {
        let large = random.below(2) == 0;
        Self {
            v4: random.below(2) == 0,
            tcp: random.below(2) == 0,
            tagged: random.below(4) == 0,
            payload: random.below(if large { 30_000 } else { 1400 }),
            segment: large.then(|| 200 + random.below(1200) as u16),
        }
    }

    /// A packet with a partial checksum, and its header.
    pub(crate) fn build(
        &self,
        to: MacAddr6,
        from: MacAddr6,
        number: usize,
    ) -> (Vec<u8>, OffloadHeader) {
        let mut packet = [to.as_bytes(), from.as_bytes()].concat();
        if self.tagged {
            packet.extend([0x81, 0, 0, 5]);
        }
        packet.extend(if self.v4 { [8, 0] } else { [0x86, 0xdd] });
        let transport_len = if self.tcp { 20 } else { 8 };
        let (protocol, field) = if self.tcp { (6, 16) } else { (17, 6) };
        let len = (transport_len + self.payload) as u16;
        if self.v4 {
            packet.extend([0x45, 0]);
            packet.extend((20 + len).to_be_bytes());
            packet.extend([0, number as u8, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(len.to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend([0xfd; 32]);
        }
        let start = packet.len();
        let mut transport = vec![0; transport_len];
        transport[..4].copy_from_slice(&[0xc0, 0, 0, 80]);
        match self.tcp {
            true => (transport[12], transport[13]) = (5 << 4, 0x18),
            false => transport[4..6].copy_from_slice(&len.to_be_bytes()),
        }
        packet.extend(transport);
        packet.extend((0..self.payload).map(|i| ((i * 7 + number) >> 2) as u8));
        let gso = match (self.segment, self.tcp, self.v4) {
            (None, ..) => Gso::None,
            (_, true, true) => Gso::TcpV4,
            (_, true, false) => Gso::TcpV6,
            (_, false, _) => Gso::UdpL4,
        };
        let header = OffloadHeader {
            checksum: Checksum::Partial { start: start as u16, offset: field },
            gso,
            segment_size: self.segment.unwrap_or(0),
            ..OffloadHeader::NONE
        };
        (packet, header)
    }
}

/// The frames that a receiver without offload must see.
pub(crate) fn finished(packet: &[u8], header: &OffloadHeader) -> Vec<Vec<u8>> {
    if header.gso == Gso::None {
        let mut frame = packet.to_vec();
        software::complete_checksum(header, &mut frame).unwrap();
        return vec![frame];
    }
    let segments = Segments::new(header, packet).unwrap();
    let write = |index| {
        let mut frame = vec![0; segments.len_max()];
        let len = segments.write(index, &mut frame).unwrap();
        frame.truncate(len);
        frame
    };
    (0..segments.count()).map(write).collect()
}
