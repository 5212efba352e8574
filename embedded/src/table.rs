//! Which port a MAC address is behind: the switch's memory.
//!
//! Two fixed arrays of 8-way buckets, one cache line each. *Pinned* addresses are those the network
//! assigned to its ports: they are written when a port joins or leaves and nothing a guest sends
//! can move or push them out. *Learned* addresses come from the source addresses of frames, age,
//! and replace the oldest of their bucket when it is full. The hash is keyed at random, so a guest
//! cannot aim at a bucket. Looking up and learning take no lock, and store only when something has
//! changed (at most once a second for an address that keeps talking), so the lines stay shared
//! between the processors that read them. Memory: 160 KiB, whatever happens.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use vmring_core::sync::{AtomicU32, AtomicU64, Ordering};

use crate::limits::{TABLE_BUCKETS, TABLE_WAYS};

/// A way without an entry. Its address is the broadcast address, which is neither entered nor looked
/// up, so that no way without an entry is ever found; 0 would be taken for one of 00:00:00:00:00:00,
/// which a guest can send to.
const EMPTY: u64 = u64::MAX;
/// Once pinned in a bucket that was full, now free; searches go on past it. Not found, as above.
const TOMBSTONE: u64 = u64::MAX - 1;

/// A MAC address in the low 48 bits, first byte highest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(u64);

impl Mac {
    pub(crate) const BROADCAST: Mac = Mac(0xffff_ffff_ffff);

    pub(crate) const fn new(bytes: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = bytes;
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// Whether the group bit is set: multicast or broadcast.
    pub(crate) const fn is_group(self) -> bool {
        self.0 & (1 << 40) != 0
    }

    /// Whether it can be the address of one interface.
    pub(crate) const fn is_unicast(self) -> bool {
        self.0 != 0 && !self.is_group()
    }
}

/// A port as the table remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortRef(u16);

impl PortRef {
    const ISOLATED: u16 = 1 << 15;

    pub(crate) fn new(index: usize, isolated: bool) -> Self {
        Self(index as u16 | if isolated { Self::ISOLATED } else { 0 })
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0 & !Self::ISOLATED)
    }

    pub(crate) fn isolated(self) -> bool {
        self.0 & Self::ISOLATED != 0
    }
}

fn entry(mac: Mac, port: PortRef) -> u64 {
    mac.0 << 16 | u64::from(port.0)
}

fn mac_of(entry: u64) -> u64 {
    entry >> 16
}

fn port_of(entry: u64) -> PortRef {
    PortRef(entry as u16)
}

/// What [`MacTable::learn`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learned {
    /// The address is behind this port; now or already known.
    Here,
    /// The network assigned the address to another port.
    Elsewhere,
}

#[repr(align(64))]
struct Bucket([AtomicU64; TABLE_WAYS]);

impl Bucket {
    fn new() -> Self {
        Self(core::array::from_fn(|_| AtomicU64::new(EMPTY)))
    }

    /// Whether all its ways were ever taken at once, so that an address that belongs here may be
    /// in the next bucket.
    fn was_full(&self) -> bool {
        self.0.iter().all(|way| way.load(Ordering::Relaxed) != EMPTY)
    }
}

pub(crate) struct MacTable {
    pinned: Box<[Bucket]>,
    learned: Box<[Bucket]>,
    /// When each learned entry was last seen, in seconds; same order.
    stamps: Box<[[AtomicU32; TABLE_WAYS]]>,
    key: u64,
    /// Seconds after which a learned entry no longer counts.
    ageing: u32,
}

impl MacTable {
    pub(crate) fn new(ageing: u32) -> Self {
        Self {
            pinned: (0..TABLE_BUCKETS).map(|_| Bucket::new()).collect(),
            learned: (0..TABLE_BUCKETS).map(|_| Bucket::new()).collect(),
            stamps: (0..TABLE_BUCKETS)
                .map(|_| core::array::from_fn(|_| AtomicU32::new(0)))
                .collect(),
            key: RandomState::new().hash_one(0u64),
            ageing,
        }
    }

    fn bucket_index(&self, mac: Mac) -> usize {
        mix(mac.0 ^ self.key) as usize % TABLE_BUCKETS
    }

    /// The port an address is behind, unless nothing has been heard of it for too long. Not for
    /// group addresses.
    #[inline]
    pub(crate) fn lookup(&self, mac: Mac, now: u32) -> Option<PortRef> {
        let index = self.bucket_index(mac);
        self.lookup_pinned(mac, index).or_else(|| {
            let way = self.find_learned(mac, index)?;
            // Relaxed: the entry is one word and carries nothing else.
            let found = self.learned[index].0[way].load(Ordering::Relaxed);
            let age = now.wrapping_sub(self.stamps[index][way].load(Ordering::Relaxed));
            // A clock reading older than the stamp is young, not old.
            let fresh = age < self.ageing || age > u32::MAX / 2;
            (mac_of(found) == mac.0 && fresh).then(|| port_of(found))
        })
    }

    /// The port an address was assigned to.
    pub(crate) fn assigned(&self, mac: Mac) -> Option<PortRef> {
        self.lookup_pinned(mac, self.bucket_index(mac))
    }

    fn lookup_pinned(&self, mac: Mac, index: usize) -> Option<PortRef> {
        // Almost always one bucket: the next is looked at only if this one was ever full.
        for step in 0..TABLE_BUCKETS {
            let bucket = &self.pinned[(index + step) % TABLE_BUCKETS];
            for way in &bucket.0 {
                let found = way.load(Ordering::Relaxed);
                if mac_of(found) == mac.0 {
                    return Some(port_of(found));
                }
            }
            if !bucket.was_full() {
                return None;
            }
        }
        None
    }

    /// Where the learned entry of `mac` is in its bucket.
    fn find_learned(&self, mac: Mac, index: usize) -> Option<usize> {
        self.learned[index].0.iter().position(|way| mac_of(way.load(Ordering::Relaxed)) == mac.0)
    }

    /// Notes that a frame from `mac` came in at `port`.
    pub(crate) fn learn(&self, mac: Mac, port: PortRef, now: u32) -> Learned {
        let index = self.bucket_index(mac);
        if let Some(owner) = self.lookup_pinned(mac, index) {
            return if owner.index() == port.index() { Learned::Here } else { Learned::Elsewhere };
        }
        let wanted = entry(mac, port);
        let stamps = &self.stamps[index];
        let way = self.find_learned(mac, index).unwrap_or_else(|| {
            // An empty way first, else the one that was silent longest.
            (0..TABLE_WAYS)
                .max_by_key(|&way| match self.learned[index].0[way].load(Ordering::Relaxed) {
                    EMPTY => u64::from(u32::MAX) + 1,
                    _ => u64::from(now.wrapping_sub(stamps[way].load(Ordering::Relaxed))),
                })
                .unwrap_or(0)
        });
        if stamps[way].load(Ordering::Relaxed) != now {
            // Before the entry, so that a new one never looks old. If the exchange below fails the
            // wrong entry is a little younger, which does no harm.
            stamps[way].store(now, Ordering::Relaxed);
        }
        let cell = &self.learned[index].0[way];
        let found = cell.load(Ordering::Relaxed);
        if found != wanted {
            // If somebody else changed it meanwhile, the next frame tries again.
            let _ = cell.compare_exchange(found, wanted, Ordering::Relaxed, Ordering::Relaxed);
        }
        Learned::Here
    }

    /// Enters an assigned address. The caller holds the membership lock and has checked that the
    /// address is new; there is room for many more addresses than ports.
    pub(crate) fn pin(&self, mac: Mac, port: PortRef) {
        let index = self.bucket_index(mac);
        let free = (0..TABLE_BUCKETS)
            .flat_map(|step| &self.pinned[(index + step) % TABLE_BUCKETS].0)
            .find(|way| matches!(way.load(Ordering::Relaxed), EMPTY | TOMBSTONE));
        if let Some(way) = free {
            way.store(entry(mac, port), Ordering::Relaxed);
        }
    }

    /// Removes an assigned address, and everything learned about its port. The caller holds the
    /// membership lock and knows that the port sends no more.
    pub(crate) fn forget(&self, mac: Mac, port: usize) {
        let index = self.bucket_index(mac);
        let pinned = (0..TABLE_BUCKETS).find_map(|step| {
            let bucket = &self.pinned[(index + step) % TABLE_BUCKETS];
            let is_it = |way: &&AtomicU64| mac_of(way.load(Ordering::Relaxed)) == mac.0;
            bucket.0.iter().find(is_it).map(|way| (bucket, way))
        });
        if let Some((bucket, way)) = pinned {
            let free = if bucket.was_full() { TOMBSTONE } else { EMPTY };
            way.store(free, Ordering::Relaxed);
        }
        for way in self.learned.iter().flat_map(|bucket| &bucket.0) {
            let found = way.load(Ordering::Relaxed);
            if found != EMPTY && port_of(found).index() == port {
                // If it fails, another port has just claimed the address.
                let _ = way.compare_exchange(found, EMPTY, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }
}

/// The finalizer of splitmix64: every bit of the input moves about half the bits of the output.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn mac(number: u64) -> Mac {
        Mac(0x0200_0000_0000 | number)
    }

    fn port(index: usize) -> PortRef {
        PortRef::new(index, false)
    }

    #[test]
    fn a_learned_address_moves_with_its_last_frame() {
        let table = MacTable::new(300);
        assert_eq!(table.lookup(mac(1), 0), None);
        table.learn(mac(1), port(3), 0);
        assert_eq!(table.lookup(mac(1), 0), Some(port(3)));
        table.learn(mac(1), PortRef::new(4, true), 0);
        assert_eq!(table.lookup(mac(1), 0), Some(PortRef::new(4, true)));
    }

    /// No way without an entry is taken for one, whatever was there.
    #[test]
    fn the_address_zero_is_behind_no_port() {
        let table = MacTable::new(300);
        let zero = Mac::new([0; 6]);
        for index in 0..1024 {
            table.pin(mac(index), port(index as usize));
        }
        for index in 0..1024 {
            table.learn(mac(0x10_0000 + index), port(7), 0);
            table.forget(mac(index), index as usize);
        }
        assert_eq!((table.lookup(zero, 0), table.assigned(zero)), (None, None));
        assert_eq!(table.lookup(zero, 1000), None);
    }

    #[test]
    fn a_silent_address_ages_and_a_talking_one_does_not() {
        let table = MacTable::new(300);
        let start = u32::MAX - 100; // across the wrap of the clock
        table.learn(mac(1), port(1), start);
        table.learn(mac(2), port(2), start);
        table.learn(mac(2), port(2), start.wrapping_add(200));
        assert_eq!(table.lookup(mac(1), start.wrapping_add(299)), Some(port(1)));
        assert_eq!(table.lookup(mac(1), start.wrapping_add(300)), None);
        assert_eq!(table.lookup(mac(2), start.wrapping_add(300)), Some(port(2)));
        // A reader whose clock lags behind the writer's.
        assert_eq!(table.lookup(mac(2), start.wrapping_add(199)), Some(port(2)));
    }

    #[test]
    fn a_flood_of_made_up_addresses_pushes_out_no_assigned_one() {
        let table = MacTable::new(300);
        for index in 0..1024 {
            table.pin(mac(index), port(index as usize));
        }
        for number in 0..200_000 {
            table.learn(mac(0x10_0000 + number), port(7), 1);
        }
        for index in 0..1024 {
            assert_eq!(table.lookup(mac(index), 1), Some(port(index as usize)));
        }
    }

    #[test]
    fn an_assigned_address_is_not_learned_elsewhere() {
        let table = MacTable::new(300);
        table.pin(mac(1), port(1));
        assert_eq!(table.learn(mac(1), port(1), 0), Learned::Here);
        assert_eq!(table.learn(mac(1), port(2), 0), Learned::Elsewhere);
        assert_eq!(table.lookup(mac(1), 0), Some(port(1)));
    }

    #[test]
    fn a_port_that_leaves_is_forgotten_and_the_others_are_not() {
        let table = MacTable::new(300);
        // Twice as many as a port table holds, in and out, so that buckets fill and hold tombstones.
        for round in 0..20u64 {
            for index in 0..1024 {
                table.pin(mac(round << 20 | index), port(index as usize));
            }
            for index in 0..1024 {
                assert!(table.assigned(mac(round << 20 | index)).is_some());
            }
            table.learn(mac(0xff_ffff_0000), port(5), 0);
            table.learn(mac(0xff_ffff_0001), port(6), 0);
            table.forget(mac(round << 20 | 5), 5);
            assert_eq!(table.lookup(mac(0xff_ffff_0000), 0), None);
            assert_eq!(table.lookup(mac(0xff_ffff_0001), 0), Some(port(6)));
            assert_eq!(table.assigned(mac(round << 20 | 5)), None);
            for index in (0..1024).filter(|&index| index != 5) {
                assert_eq!(table.assigned(mac(round << 20 | index)), Some(port(index as usize)));
                table.forget(mac(round << 20 | index), index as usize);
            }
        }
        // Tombstones are rare, so looking up an unknown address stays one bucket.
        let full = table.pinned.iter().filter(|bucket| bucket.was_full()).count();
        assert!(full < 8, "{full} buckets were full");
    }
}
