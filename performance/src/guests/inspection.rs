//! The packets that are sent, and how a receiver inspects them.

/// The number of different packets that a sender sends in turn.
pub(crate) const PACKETS: usize = 32;
/// The addresses, for contenders that do not look at them.
pub(crate) const TO: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// The position of a packet's number, two bytes. It is not within a word that a receiver adds up.
const NUMBER: usize = 14;

/// A packet whose bytes tell their position in it. Its number is zero.
pub(crate) fn packet(length: usize, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    packet[..6].copy_from_slice(&to);
    packet[6..12].copy_from_slice(&from);
    packet[NUMBER..NUMBER + 2].fill(0);
    packet
}

/// The packets that a sender sends in turn. They differ only in their number.
pub(crate) fn numbered(packet: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    (0..PACKETS as u16).map(|number| {
        let mut packet = packet.to_vec();
        packet[NUMBER..NUMBER + 2].copy_from_slice(&number.to_be_bytes());
        packet
    })
}

/// The sum of one word of each cache line.
#[inline]
pub(crate) fn words(bytes: &[u8]) -> u64 {
    let word = |line: &[u8]| line.first_chunk::<8>().map_or(0, |word| u64::from_ne_bytes(*word));
    let lines = bytes.chunks_exact(64);
    let rest = word(lines.remainder());
    lines.map(word).fold(rest, u64::wrapping_add)
}

/// How closely a receiver looks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    Lengths,
    Words,
    Everything,
}

/// What a receiver has seen.
pub(crate) struct Inspection {
    pub(crate) depth: Depth,
    pub(crate) expected: Vec<u8>,
    pub(crate) packets: u64,
    /// The sum of all words read so far.
    pub(crate) words: u64,
    /// Packets that were not as they were sent.
    pub(crate) wrong: u64,
}

impl Inspection {
    /// Inspects the next packet.
    #[inline]
    pub(crate) fn inspect(&mut self, bytes: &[u8]) {
        self.wrong += u64::from(bytes.len() != self.expected.len());
        match self.depth {
            Depth::Lengths => {}
            Depth::Words => self.words = self.words.wrapping_add(words(bytes)),
            Depth::Everything => self.compare(bytes),
        }
        self.packets += 1;
    }

    #[cold]
    fn compare(&mut self, bytes: &[u8]) {
        let number = (self.packets % PACKETS as u64) as u16;
        let right = bytes.get(..NUMBER) == self.expected.get(..NUMBER)
            && bytes.get(NUMBER..NUMBER + 2) == Some(&number.to_be_bytes())
            && bytes.get(NUMBER + 2..) == self.expected.get(NUMBER + 2..);
        self.wrong += u64::from(!right);
    }
}
