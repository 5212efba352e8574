//! The switch's table: which port a MAC address is behind.
//!
//! The table has two fixed arrays of 8-way buckets, one cache line each. *Pinned* addresses are
//! those that the network assigned to its ports. They are written when a port joins or leaves, and
//! nothing a guest sends can move or replace them. *Learned* addresses come from the source
//! addresses of frames. They age, and a new one replaces another of its bucket if the bucket is full:
//! one of the port that has most addresses there, and of these the oldest. So a guest that makes up
//! addresses pushes out its own, and leaves every other port its share. The hash has a random key, so
//! a guest cannot aim at a bucket.
//!
//! Looking up and learning take no lock. They store only when something has changed, and at most
//! once a second for an address that keeps sending, so the cache lines stay shared between the
//! processors that read them. The table always takes 160 KiB.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use vmring_core::sync::{AtomicU32, AtomicU64, Ordering};

use crate::limits::{TABLE_BUCKETS, TABLE_WAYS};

/// A way without an entry. Its address is the broadcast address, which is neither entered nor
/// looked up, so no way without an entry is ever found. The value 0 would be an entry of
/// 00:00:00:00:00:00, which a guest can send to.
const EMPTY: u64 = u64::MAX;
/// A way whose pinned address was removed while its bucket was full. A search goes on past it. Its
/// address is the broadcast address too, so it is never found.
const TOMBSTONE: u64 = u64::MAX - 1;

/// A MAC address in the low 48 bits, with the first byte highest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(u64);

impl Mac {
    pub(crate) const BROADCAST: Mac = Mac(0xffff_ffff_ffff);

    pub(crate) const fn new(bytes: [u8; 6]) -> Self {
        let [a, b, c, d, e, f] = bytes;
        Self(u64::from_be_bytes([0, 0, a, b, c, d, e, f]))
    }

    /// The address as a number below 2^48.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// The address of such a number, or `None` if the number is larger.
    pub(crate) const fn from_bits(bits: u64) -> Option<Self> {
        if bits <= Self::BROADCAST.0 { Some(Self(bits)) } else { None }
    }

    /// Whether the group bit is set: multicast or broadcast.
    pub(crate) const fn is_group(self) -> bool {
        self.0 & (1 << 40) != 0
    }

    /// Whether no bridge forwards frames to it (IEEE 802.1Q, table 8-1).
    pub(crate) const fn is_reserved(self) -> bool {
        self.0 & !0xf == 0x0180_c200_0000
    }

    /// Whether it can be the address of one interface.
    pub(crate) const fn is_unicast(self) -> bool {
        self.0 != 0 && !self.is_group()
    }
}

/// A port as the table stores it: its index, and whether it is isolated or the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PortRef(u16);

impl PortRef {
    const ISOLATED: u16 = 1 << 15;
    const UPLINK: u16 = 1 << 14;

    pub(crate) fn new(index: usize, isolated: bool) -> Self {
        Self(index as u16 | if isolated { Self::ISOLATED } else { 0 })
    }

    pub(crate) fn uplink(index: usize) -> Self {
        Self(index as u16 | Self::UPLINK)
    }

    pub(crate) fn index(self) -> usize {
        usize::from(self.0 & !(Self::ISOLATED | Self::UPLINK))
    }

    pub(crate) fn is_uplink(self) -> bool {
        self.0 & Self::UPLINK != 0
    }

    /// Whether isolation keeps these two ports apart.
    pub(crate) fn is_apart_from(self, other: Self) -> bool {
        (self.isolated() || other.isolated()) && !self.is_uplink() && !other.is_uplink()
    }

    pub(crate) fn isolated(self) -> bool {
        self.0 & Self::ISOLATED != 0
    }
}

/// Packs a table entry: the address above the port.
fn entry(mac: Mac, port: PortRef) -> u64 {
    mac.0 << 16 | u64::from(port.0)
}

fn mac_of(entry: u64) -> u64 {
    entry >> 16
}

fn port_of(entry: u64) -> PortRef {
    PortRef(entry as u16)
}

/// Where an address is, and the entry that says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub(crate) port: PortRef,
    /// The entry's bucket and way, and whether it was learned.
    place: u32,
    entry: u64,
}

impl Located {
    const LEARNED: u32 = 1 << 31;
}

/// What [`MacTable::learn`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learned {
    /// The address is behind this port. It was known, or it is known now.
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

    /// Whether all ways were ever in use at once. If so, an address that hashes to this bucket may
    /// be in the next one.
    fn was_full(&self) -> bool {
        self.0.iter().all(|way| way.load(Ordering::Relaxed) != EMPTY)
    }
}

/// The table. See the [module](self).
pub(crate) struct MacTable {
    pinned: Box<[Bucket]>,
    learned: Box<[Bucket]>,
    /// When each learned entry was last seen, in seconds, at the same position as the entry.
    stamps: Box<[[AtomicU32; TABLE_WAYS]]>,
    /// The random key of the hash.
    key: u64,
    /// After how many seconds a learned entry is ignored.
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

    /// Returns the port an address is behind, unless no frame has come from the address for too
    /// long. The address must not be a group address.
    #[inline]
    pub(crate) fn locate(&self, mac: Mac, now: u32) -> Option<Located> {
        let index = self.bucket_index(mac);
        self.locate_pinned(mac, index).or_else(|| {
            let way = self.find_learned(mac, index)?;
            // Relaxed: whoever relies on the entry looks again (`holds`).
            let entry = self.learned[index].0[way].load(Ordering::Relaxed);
            let fresh = self.age(index, way, now) < self.ageing;
            let place = (index * TABLE_WAYS + way) as u32 | Located::LEARNED;
            let located = || Located { port: port_of(entry), place, entry };
            (mac_of(entry) == mac.0 && fresh).then(located)
        })
    }

    /// As [`locate`](Self::locate), for the port alone.
    #[cfg(test)]
    fn lookup(&self, mac: Mac, now: u32) -> Option<PortRef> {
        self.locate(mac, now).map(|located| located.port)
    }

    /// Whether the entry says the same as before.
    #[inline]
    pub(crate) fn holds(&self, located: &Located) -> bool {
        let is_learned = located.place & Located::LEARNED != 0;
        let buckets = if is_learned { &self.learned } else { &self.pinned };
        let place = (located.place & !Located::LEARNED) as usize;
        let way = buckets.get(place / TABLE_WAYS).map(|bucket| &bucket.0[place % TABLE_WAYS]);
        // Acquire: pairs with the Release in `pin` and `learn`. Whoever sees the entry finds the inbox
        // closed that the port's place had before.
        way.is_some_and(|way| way.load(Ordering::Acquire) == located.entry)
    }

    /// Returns the port an address was assigned to.
    pub(crate) fn assigned(&self, mac: Mac) -> Option<PortRef> {
        self.lookup_pinned(mac, self.bucket_index(mac))
    }

    fn lookup_pinned(&self, mac: Mac, index: usize) -> Option<PortRef> {
        self.locate_pinned(mac, index).map(|located| located.port)
    }

    #[inline]
    fn locate_pinned(&self, mac: Mac, index: usize) -> Option<Located> {
        // This almost always reads one bucket: it reads the next only if this one was ever full.
        for step in 0..TABLE_BUCKETS {
            let bucket_index = (index + step) % TABLE_BUCKETS;
            let bucket = &self.pinned[bucket_index];
            for (way, cell) in bucket.0.iter().enumerate() {
                // Relaxed: as in `locate`.
                let entry = cell.load(Ordering::Relaxed);
                if mac_of(entry) == mac.0 {
                    let place = (bucket_index * TABLE_WAYS + way) as u32;
                    return Some(Located { port: port_of(entry), place, entry });
                }
            }
            if !bucket.was_full() {
                return None;
            }
        }
        None
    }

    /// Returns the way of the learned entry of `mac` in its bucket.
    fn find_learned(&self, mac: Mac, index: usize) -> Option<usize> {
        self.learned[index].0.iter().position(|way| mac_of(way.load(Ordering::Relaxed)) == mac.0)
    }

    /// How many seconds ago a learned entry was last seen.
    fn age(&self, index: usize, way: usize, now: u32) -> u32 {
        let age = now.wrapping_sub(self.stamps[index][way].load(Ordering::Relaxed));
        // A sender reads the clock once for a batch, so `now` can be older than a stamp that
        // another sender has stored. The difference wraps, and the entry is young.
        if age > u32::MAX / 2 { 0 } else { age }
    }

    /// Notes that a frame from `mac` came in at `port`.
    pub(crate) fn learn(&self, mac: Mac, port: PortRef, now: u32) -> Learned {
        let index = self.bucket_index(mac);
        if let Some(owner) = self.lookup_pinned(mac, index) {
            return if owner.index() == port.index() { Learned::Here } else { Learned::Elsewhere };
        }
        let wanted = entry(mac, port);
        let stamps = &self.stamps[index];
        let way = self.find_learned(mac, index).unwrap_or_else(|| self.way_for(index, port, now));
        if stamps[way].load(Ordering::Relaxed) != now {
            // The stamp is stored before the entry, so that a new entry never looks old. If the
            // exchange below fails, another entry gets a newer stamp, which does no harm.
            stamps[way].store(now, Ordering::Relaxed);
        }
        let cell = &self.learned[index].0[way];
        let found = cell.load(Ordering::Relaxed);
        if found != wanted {
            // If another thread has changed the entry meanwhile, the next frame tries again.
            // Release: pairs with the Acquire in `holds`.
            let _ = cell.compare_exchange(found, wanted, Ordering::Release, Ordering::Relaxed);
        }
        Learned::Here
    }

    /// Returns the way of a full bucket, or of one that is not full, that a new address behind `port`
    /// gets. An empty way comes first, then one whose entry is too old to be found. Otherwise it is the
    /// way of the port that has most entries of the bucket, or of `port` if no other has more, and of
    /// these the one whose entry was not seen for longest.
    #[cold]
    fn way_for(&self, index: usize, port: PortRef, now: u32) -> usize {
        let entries: [u64; TABLE_WAYS] =
            core::array::from_fn(|way| self.learned[index].0[way].load(Ordering::Relaxed));
        let of_port =
            |port: usize| entries.iter().filter(|entry| port_of(**entry).index() == port).count();
        let rank = |way: &usize| {
            let (entry, age) = (entries[*way], self.age(index, *way, now));
            if entry == EMPTY {
                return (usize::MAX, false, 0);
            }
            if age >= self.ageing {
                return (TABLE_WAYS + 1, false, age);
            }
            let owner = port_of(entry).index();
            (of_port(owner), owner == port.index(), age)
        };
        (0..TABLE_WAYS).max_by_key(rank).unwrap_or(0)
    }

    /// Forgets that an address was learned, because its station is somewhere else now. Returns the
    /// port if the address was assigned to one.
    pub(crate) fn move_away(&self, mac: Mac) -> Option<PortRef> {
        let index = self.bucket_index(mac);
        let owner = self.lookup_pinned(mac, index);
        if owner.is_none()
            && let Some(way) = self.find_learned(mac, index)
        {
            let cell = &self.learned[index].0[way];
            let found = cell.load(Ordering::Relaxed);
            if mac_of(found) == mac.0 {
                // If this fails, a frame from another port has just moved the address there.
                let _ = cell.compare_exchange(found, EMPTY, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
        owner
    }

    /// Enters an assigned address. The caller holds the lock of the network's members and has
    /// checked that the address is new. There is space for many more addresses than ports.
    pub(crate) fn pin(&self, mac: Mac, port: PortRef) {
        let index = self.bucket_index(mac);
        let free = (0..TABLE_BUCKETS)
            .flat_map(|step| &self.pinned[(index + step) % TABLE_BUCKETS].0)
            .find(|way| matches!(way.load(Ordering::Relaxed), EMPTY | TOMBSTONE));
        if let Some(way) = free {
            // Release: pairs with the Acquire in `holds`.
            way.store(entry(mac, port), Ordering::Release);
        }
    }

    /// Removes an assigned address, and all addresses that were learned behind its port. The caller
    /// holds the lock of the network's members and knows that the port no longer sends.
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
                // If this fails, a frame from another port has just moved the address there.
                let _ = way.compare_exchange(found, EMPTY, Ordering::Relaxed, Ordering::Relaxed);
            }
        }
    }
}

/// The finalizer of splitmix64: every bit of the input changes about half the bits of the output.
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

    /// Addresses that all belong into one bucket of `table`.
    fn of_one_bucket(table: &MacTable, count: usize) -> Vec<Mac> {
        let bucket = table.bucket_index(mac(0));
        let same = |mac: &Mac| table.bucket_index(*mac) == bucket;
        (0..).map(mac).filter(same).take(count).collect()
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

    /// A way without an entry is never taken for an entry, whatever was in it before.
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
        let start = u32::MAX - 100; // so that the clock wraps
        table.learn(mac(1), port(1), start);
        table.learn(mac(2), port(2), start);
        table.learn(mac(2), port(2), start.wrapping_add(200));
        assert_eq!(table.lookup(mac(1), start.wrapping_add(299)), Some(port(1)));
        assert_eq!(table.lookup(mac(1), start.wrapping_add(300)), None);
        assert_eq!(table.lookup(mac(2), start.wrapping_add(300)), Some(port(2)));
        // The reader's clock lags behind the writer's, by half of what it can count at most.
        for lag in [1, u32::MAX / 2 + 1] {
            let now = start.wrapping_add(200).wrapping_sub(lag);
            assert_eq!(table.lookup(mac(2), now), Some(port(2)));
        }
        let later = start.wrapping_add(200).wrapping_add(u32::MAX / 2);
        assert_eq!(table.lookup(mac(2), later), None);
    }

    /// A full bucket gives up the entry that was not seen for longest. That is not an entry whose
    /// stamp is newer than the clock of the sender that needs the space.
    #[test]
    fn the_oldest_entry_of_a_full_bucket_makes_space() {
        for start in [1000, u32::MAX - 3] {
            let at = |second: u32| start.wrapping_add(second);
            let table = MacTable::new(300);
            let macs = of_one_bucket(&table, TABLE_WAYS + 1);
            let (new, old) = macs.split_last().unwrap();
            for (index, &mac) in old.iter().enumerate() {
                // The fourth is the oldest. The first was seen after the clock was read.
                let second = [10, 5, 5, 1, 5, 5, 5, 5][index];
                table.learn(mac, port(index), at(second));
            }
            table.learn(*new, port(99), at(9));
            assert_eq!(table.lookup(*new, at(9)), Some(port(99)));
            for (index, &mac) in old.iter().enumerate() {
                let expected = (index != 3).then(|| port(index));
                assert_eq!(table.lookup(mac, at(9)), expected, "{index} from {start}");
            }
        }
    }

    /// Goal: a port that makes up addresses takes no port more than its share of a bucket.
    #[test]
    fn a_flood_of_made_up_addresses_leaves_other_ports_their_share() {
        let table = MacTable::new(300);
        let same = of_one_bucket(&table, 1000);
        let (honest, forged) = same.split_at(4);
        let known = |now| honest.iter().filter(|mac| table.lookup(**mac, now).is_some()).count();
        for (index, &mac) in honest.iter().enumerate() {
            table.learn(mac, port(index / 2), 0);
        }
        for (number, &mac) in forged.iter().enumerate() {
            table.learn(mac, port(9), 1 + number as u32 / 10);
            assert_eq!(known(100), 4, "after {number}");
        }
        // A second such port shares with the first what the honest ones leave.
        for &mac in forged {
            table.learn(mac, port(8), 100);
        }
        assert_eq!(known(100), 4);
        // An entry that is too old is free for everybody.
        for (index, &mac) in honest.iter().enumerate() {
            table.learn(mac, port(index / 2), 400);
        }
        assert_eq!(known(400), 4);
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

    /// An address that found its bucket full is in the next one. It is still found after an
    /// address of the full bucket has left, and the place that became free is used again.
    #[test]
    fn a_full_bucket_hides_no_address_when_one_leaves() {
        let table = MacTable::new(300);
        let same = of_one_bucket(&table, TABLE_WAYS + 2);
        for (index, &mac) in same.iter().enumerate() {
            table.pin(mac, port(index));
        }
        for leaves in 0..same.len() {
            table.forget(same[leaves], leaves);
            assert_eq!(table.assigned(same[leaves]), None);
            for index in (0..same.len()).filter(|&index| index != leaves) {
                assert_eq!(table.assigned(same[index]), Some(port(index)), "{leaves} left");
            }
            table.pin(same[leaves], port(leaves));
            assert_eq!(table.assigned(same[leaves]), Some(port(leaves)));
        }
        let next = &table.pinned[(table.bucket_index(same[0]) + 1) % TABLE_BUCKETS];
        let used = next.0.iter().filter(|way| way.load(Ordering::Relaxed) != EMPTY).count();
        assert_eq!(used, 2, "those that left made space in their own bucket");
    }

    #[test]
    fn a_port_that_leaves_is_forgotten_and_the_others_are_not() {
        let table = MacTable::new(300);
        // As many ports as a network can have join and leave, many times, so that buckets fill and
        // hold tombstones.
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
        // Full buckets are rare, so looking up an unknown address still reads one bucket.
        let full = table.pinned.iter().filter(|bucket| bucket.was_full()).count();
        assert!(full < 8, "{full} buckets were full");
    }
}
