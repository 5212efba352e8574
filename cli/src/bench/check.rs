//! Whether the packets that arrive are those that were sent: what is in a packet, and what has come
//! of them so far.
//!
//! ```text
//!  0   destination, source
//! 12   ethertype
//! 14   number
//! 22   guard, made from the number
//! 30   body, made from the guard
//! ```
//!
//! With offload there are the headers of IPv4 and TCP in front of the number, so that the packet is one
//! that a device could cut.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::report::grouped;
use crate::stream::Stream;

/// The smallest packet: Ethernet's minimum without the checksum. A shorter one may be padded on the
/// way.
pub(crate) const SMALLEST: u32 = 60;
/// The smallest packet with offload: all headers, the number and the guard.
pub(crate) const SMALLEST_OF_TCP: u32 = (LARGE_HEADERS + MARK) as u32;

/// IEEE 802 reserves it for local experiments, so no stack answers it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// The bytes of the number and the guard.
const MARK: usize = 16;
/// The Ethernet, IPv4 and TCP headers.
pub(crate) const LARGE_HEADERS: usize = 54;
/// An odd number with well-mixed bits.
const FACTOR: u64 = 0xd6e8_feb8_6659_fd93;

/// The packets of one run: how they are made, and how they must arrive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    header: [u8; LARGE_HEADERS],
    /// The bytes of the header, which are in front of the number: 14, or all with offload.
    header_len: usize,
    /// The body of one packet in this many is written and compared. A power of two.
    every: u64,
}

/// What a received packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Number(u64),
    /// One of ours, but not as it was sent.
    Corrupt,
    /// Not one of ours but the network's own, like a kernel's neighbour discovery.
    Other,
}

impl Pattern {
    pub(crate) fn new(from: [u8; 6], to: [u8; 6], every: u64) -> Self {
        let mut header = [0; LARGE_HEADERS];
        header[..6].copy_from_slice(&to);
        header[6..12].copy_from_slice(&from);
        header[12..14].copy_from_slice(&ETHERTYPE);
        Self { header, header_len: 14, every }
    }

    /// As [`new`](Self::new), for packets of TCP over IPv4, all of `len` bytes, whose checksum is left
    /// to the device.
    pub(crate) fn of_tcp(self, len: usize) -> Self {
        let mut header = self.header;
        header[12..14].copy_from_slice(&[8, 0]);
        let ip_len = (len - 14) as u16;
        header[14..18].copy_from_slice(&[0x45, 0, (ip_len >> 8) as u8, ip_len as u8]);
        // No fragments, 64 hops, TCP, and addresses for documentation (RFC 5737).
        header[20..24].copy_from_slice(&[0x40, 0, 64, 6]);
        header[26..34].copy_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
        header[46..48].copy_from_slice(&[0x50, 0x10]);
        Self { header, header_len: LARGE_HEADERS, ..self }
    }

    /// Writes packet number `number`. `packet` has the packet's length, which is at least
    /// [`SMALLEST`], and 10 bytes more with offload.
    pub(crate) fn write(&self, packet: &mut [u8], number: u64) {
        let guard = guard(number);
        let (header, rest) = packet.split_at_mut(self.header_len);
        header.copy_from_slice(&self.header[..self.header_len]);
        rest[..8].copy_from_slice(&number.to_le_bytes());
        rest[8..MARK].copy_from_slice(&guard.to_le_bytes());
        if self.has_body(guard) {
            Stream::new(guard).fill(&mut rest[MARK..]);
        }
    }

    /// Checks a packet that was sent with `len` bytes.
    pub(crate) fn inspect(&self, packet: &[u8], len: usize) -> Found {
        let header = &self.header[..self.header_len];
        if packet.len() < header.len() + MARK || packet[12..14] != header[12..14] {
            return Found::Other;
        }
        let (found, rest) = packet.split_at(header.len());
        let word = |at: usize| u64::from_le_bytes(rest[at..at + 8].try_into().expect("eight"));
        let number = word(0);
        let guard = guard(number);
        let whole = packet.len() == len
            && found == header
            && word(8) == guard
            && (!self.has_body(guard) || Stream::new(guard).starts_with(&rest[MARK..]));
        if whole { Found::Number(number) } else { Found::Corrupt }
    }

    /// Whether the packet claims to have this number. Faster than [`inspect`](Self::inspect), but
    /// no substitute for it.
    pub(crate) fn is_number(&self, packet: &[u8], number: u64) -> bool {
        let at = self.header_len;
        packet.len() >= at + MARK
            && packet[12..14] == self.header[12..14]
            && packet[at..at + 8] == number.to_le_bytes()
    }

    /// Whether this packet has a body. That is decided by the guard and not by the number: every
    /// n-th number would always be in the same few frames, and at the same place in each batch.
    fn has_body(&self, guard: u64) -> bool {
        // Uses the highest bits of the product, which depend on all bits of the number.
        (guard >> 27) & (self.every - 1) == 0
    }
}

fn guard(number: u64) -> u64 {
    (number ^ FACTOR).wrapping_mul(FACTOR).rotate_left(32)
}

/// What has happened to the packets so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account {
    /// The numbers below this were sent.
    pub(crate) sent: u64,
    /// Packets that arrived unchanged; each number counts once.
    pub(crate) arrived: u64,
    /// Packets that the device refused, and reported.
    pub(crate) refused: u64,
    reordered: u64,
    duplicated: u64,
    corrupt: u64,
    other: u64,
    /// One more than the highest number that has arrived.
    pub(crate) next: u64,
    /// The numbers below `next` that have not arrived.
    missing: BTreeSet<u64>,
}

/// The same, added up over several runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Totals {
    pub(crate) sent: u64,
    pub(crate) arrived: u64,
    /// Sent, but never arrived.
    pub(crate) lost: u64,
    /// Arrived after a packet that was sent later.
    pub(crate) reordered: u64,
    /// Arrived another time.
    pub(crate) duplicated: u64,
    pub(crate) corrupt: u64,
    /// Writes that the device refused, and reported.
    pub(crate) refused: u64,
    /// Packets of others that were on the network.
    pub(crate) other: u64,
}

impl Account {
    pub(crate) fn record(&mut self, found: Found) {
        match found {
            Found::Other => self.other += 1,
            Found::Number(number) if number < self.sent => self.record_number(number),
            // Never sent.
            Found::Number(_) | Found::Corrupt => self.corrupt += 1,
        }
    }

    #[inline]
    fn record_number(&mut self, number: u64) {
        if number >= self.next {
            if number > self.next {
                self.missing.extend(self.next..number);
            }
            self.next = number + 1;
        } else if self.missing.remove(&number) {
            self.reordered += 1;
        } else {
            self.duplicated += 1;
            return;
        }
        self.arrived += 1;
    }

    /// Packets that were sent and that nothing is known about yet. After waiting for them long
    /// enough, they are lost.
    pub(crate) fn under_way(&self) -> u64 {
        self.sent.saturating_sub(self.arrived + self.refused + self.corrupt)
    }

    /// The totals. Called when nothing can arrive any more.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            sent: self.sent,
            arrived: self.arrived,
            lost: self.under_way(),
            reordered: self.reordered,
            duplicated: self.duplicated,
            corrupt: self.corrupt,
            refused: self.refused,
            other: self.other,
        }
    }
}

impl Totals {
    pub(crate) fn add(&mut self, other: &Totals) {
        self.sent += other.sent;
        self.arrived += other.arrived;
        self.lost += other.lost;
        self.reordered += other.reordered;
        self.duplicated += other.duplicated;
        self.corrupt += other.corrupt;
        self.refused += other.refused;
        self.other += other.other;
    }

    /// A sentence about what must not happen, if it has happened. With `may_lose`, the device does
    /// not promise to deliver packets.
    pub(crate) fn wrong(&self, may_lose: bool) -> Option<String> {
        let lost = if may_lose { 0 } else { self.lost };
        let counts = [(self.corrupt, "corrupt"), (self.duplicated, "doubled"), (lost, "lost")];
        let wrong: Vec<_> = counts
            .into_iter()
            .filter(|(n, _)| *n > 0)
            .map(|(n, what)| format!("{} {what}", grouped(n)))
            .collect();
        (!wrong.is_empty()).then(|| {
            let (sent, wrong) = (grouped(self.sent), wrong.join(", "));
            format!("not all of {sent} packets arrived as they were sent: {wrong}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const TO: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// The totals for `packets`, if the numbers below `sent` were sent.
    fn told(sent: u64, packets: &[Vec<u8>]) -> Totals {
        let pattern = Pattern::new(FROM, TO, 1);
        let mut account = Account { sent, ..Account::default() };
        packets.iter().for_each(|packet| account.record(pattern.inspect(packet, 100)));
        account.totals()
    }

    fn packets(n: u64) -> Vec<Vec<u8>> {
        let packet = |number| {
            let mut packet = vec![0; 100];
            Pattern::new(FROM, TO, 1).write(&mut packet, number);
            packet
        };
        (0..n).map(packet).collect()
    }

    #[test]
    fn one_wrong_bit_of_a_large_packet_is_told() {
        const LEN: usize = 70;
        let pattern = Pattern::new(FROM, TO, 1).of_tcp(LEN);
        let mut packet = vec![0; LEN];
        pattern.write(&mut packet, 7);
        assert_eq!(pattern.inspect(&packet, LEN), Found::Number(7));
        assert!(pattern.is_number(&packet, 7) && !pattern.is_number(&packet, 8));
        for i in 0..LEN {
            packet[i] ^= 4;
            let wrong = if matches!(i, 12 | 13) { Found::Other } else { Found::Corrupt };
            assert_eq!(pattern.inspect(&packet, LEN), wrong, "{i}");
            packet[i] ^= 4;
        }
    }

    fn all_well(n: u64) -> Totals {
        Totals { sent: n, arrived: n, ..Totals::default() }
    }

    #[test]
    fn packets_as_they_were_sent_are_all_well() {
        let totals = told(9, &packets(9));
        assert_eq!(totals, all_well(9));
        assert_eq!(totals.wrong(false), None);
    }

    #[test]
    fn one_wrong_bit_anywhere_is_told() {
        for i in 0..100 {
            let mut packets = packets(3);
            packets[1][i] ^= 4;
            let totals = told(3, &packets);
            // With another ethertype it does not count as ours, so ours is lost.
            let is_other = matches!(i, 12 | 13);
            let (corrupt, lost, other) = if is_other { (0, 1, 1) } else { (1, 0, 0) };
            assert_eq!(totals, Totals { arrived: 2, corrupt, lost, other, ..all_well(3) }, "{i}");
            assert!(totals.wrong(false).is_some());
        }
        for len in [99, 101, 20] {
            let mut packets = packets(3);
            packets[1].resize(len, 0);
            assert_ne!(told(3, &packets), all_well(3), "{len}");
        }
    }

    #[test]
    fn a_lost_packet_is_told() {
        for gone in 0..4 {
            let mut packets = packets(4);
            packets.remove(gone);
            let totals = told(4, &packets);
            assert_eq!(totals, Totals { arrived: 3, lost: 1, ..all_well(4) }, "{gone}");
            assert_eq!(
                totals.wrong(false).unwrap(),
                "not all of 4 packets arrived as they were sent: 1 lost"
            );
            assert_eq!(totals.wrong(true), None, "where the device may");
        }
    }

    #[test]
    fn a_doubled_packet_is_told() {
        for twice in 0..4 {
            let mut packets = packets(4);
            packets.push(packets[twice].clone());
            let totals = told(4, &packets);
            assert_eq!(totals, Totals { duplicated: 1, ..all_well(4) }, "{twice}");
            assert!(totals.wrong(true).unwrap().ends_with("as they were sent: 1 doubled"));
        }
    }

    #[test]
    fn swapped_packets_are_told() {
        let mut packets = packets(4);
        packets.swap(1, 2);
        let totals = told(4, &packets);
        assert_eq!(totals, Totals { reordered: 1, ..all_well(4) });
        assert_eq!(totals.wrong(false), None, "a network may");
    }

    #[test]
    fn a_number_that_was_never_sent_is_none() {
        assert_eq!(told(2, &packets(3)), Totals { corrupt: 1, ..all_well(2) });
    }

    #[test]
    fn what_the_device_refused_is_not_lost() {
        let account = Account { sent: 5, arrived: 3, refused: 1, ..Account::default() };
        assert_eq!((account.under_way(), account.totals().lost), (1, 1));
    }

    /// A body outside the sample is not checked. A body in the sample is checked to the last byte.
    #[test]
    fn of_a_sample_one_body_in_so_many_is_compared() {
        let pattern = Pattern::new(FROM, TO, 16);
        let mut compared = [0; 32];
        for number in 0..64_000 {
            let mut packet = vec![0; 100];
            pattern.write(&mut packet, number);
            assert_eq!(pattern.inspect(&packet, 100), Found::Number(number));
            packet[99] ^= 1;
            compared[number as usize % 32] +=
                u32::from(pattern.inspect(&packet, 100) == Found::Corrupt);
        }
        let all: u32 = compared.iter().sum();
        assert!((3_800..4_200).contains(&all), "{all}");
        assert!(compared.iter().all(|n| *n > 0), "at every place of a batch: {compared:?}");
    }
}
