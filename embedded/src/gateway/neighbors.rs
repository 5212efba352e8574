//! Which addresses of IPv6 the stations behind each interface use, as their neighbour discovery shows (RFC
//! 4861, 7.2). It is for a router, which has to know where an address is before it has sent anything there.
//!
//! An interface makes nothing grow: it has [`NEIGHBORS_PER_PORT`] addresses here, the last that it has
//! spoken of, and takes no place of another.

use core::net::Ipv6Addr;
use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use macaddr::MacAddr6;
use vmring_core::sync::{AtomicU64, Ordering};

use crate::limits::{NEIGHBOR_AGAIN, NEIGHBORS_PER_PORT};

/// A station that uses an address of IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbor {
    /// The address, which begins with the network's prefix.
    pub address: Ipv6Addr,
    /// The MAC address that the station has sent from.
    pub mac: MacAddr6,
    /// The number of the interface that it is behind.
    pub port: u32,
}

struct Entry {
    address: Ipv6Addr,
    mac: MacAddr6,
    /// The number of the change that this is.
    number: u64,
    at: Duration,
}

/// What each interface has said.
#[derive(Default)]
pub(super) struct Neighbors {
    /// The number of the last change.
    changes: AtomicU64,
    /// Neighbour discovery takes the lock, and no other packet.
    ports: Mutex<BTreeMap<u32, Vec<Entry>>>,
}

impl Neighbors {
    fn ports(&self) -> MutexGuard<'_, BTreeMap<u32, Vec<Entry>>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a station uses an address.
    pub(super) fn note(&self, neighbor: Neighbor, now: Duration) {
        let Neighbor { address, mac, port } = neighbor;
        let mut ports = self.ports();
        let entries = ports.entry(port).or_default();
        let known = entries.iter().position(|entry| entry.address == address);
        if let Some(Entry { mac: before, at, .. }) = known.map(|index| &entries[index])
            && *before == mac
            && (*at..*at + NEIGHBOR_AGAIN).contains(&now)
        {
            return;
        }
        // Relaxed: the lock orders those who add.
        let number = self.changes.load(Ordering::Relaxed) + 1;
        let entry = Entry { address, mac, number, at: now };
        let oldest = || {
            let by_age = entries.iter().enumerate().min_by_key(|(_, entry)| entry.number);
            by_age.map(|(index, _)| index).filter(|_| entries.len() >= NEIGHBORS_PER_PORT)
        };
        match known.or_else(oldest) {
            Some(index) => entries[index] = entry,
            None => entries.push(entry),
        }
        // Relaxed: whoever sees the number looks under the lock.
        self.changes.store(number, Ordering::Relaxed);
    }

    /// The number of the last change. It takes no lock.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Those that were noted after the change of this number, in their order.
    pub(super) fn after(&self, number: u64) -> Vec<Neighbor> {
        let ports = self.ports();
        let all = ports.iter().flat_map(|(&port, entries)| entries.iter().map(move |e| (port, e)));
        let mut found: Vec<_> = all.filter(|(_, entry)| entry.number > number).collect();
        found.sort_unstable_by_key(|(_, entry)| entry.number);
        let neighbor = |(port, entry): (u32, &Entry)| Neighbor {
            address: entry.address,
            mac: entry.mac,
            port,
        };
        found.into_iter().map(neighbor).collect()
    }

    /// Forgets what an interface has said: it has left, or another one has its number.
    pub(super) fn forget(&self, port: u32) {
        self.ports().remove(&port);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn at(port: u32, last: u16) -> Neighbor {
        let address = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last);
        Neighbor { address, mac: MacAddr6::new(2, 0, 0, 0, 0, port as u8), port }
    }

    /// Goal: an interface that speaks of ever more addresses keeps the last ones, and takes none of
    /// another's.
    #[test]
    fn an_interface_has_few_addresses_and_takes_none_of_anothers() {
        let neighbors = Neighbors::default();
        neighbors.note(at(1, 9), Duration::ZERO);
        for last in 0..1000 {
            neighbors.note(at(0, last), Duration::ZERO);
        }
        let all = neighbors.after(0);
        assert_eq!(all.len(), NEIGHBORS_PER_PORT + 1);
        assert_eq!((all[0], all[NEIGHBORS_PER_PORT]), (at(1, 9), at(0, 999)));
        neighbors.forget(0);
        assert_eq!(neighbors.after(0), [at(1, 9)]);
    }

    #[test]
    fn what_was_said_a_moment_ago_is_no_news() {
        let neighbors = Neighbors::default();
        neighbors.note(at(0, 1), Duration::from_secs(5));
        let seen = neighbors.changes();
        neighbors.note(at(0, 1), Duration::from_secs(5) + NEIGHBOR_AGAIN / 2);
        assert_eq!((neighbors.changes(), neighbors.after(seen)), (seen, vec![]));
        // It is again later, and if the station has another MAC address.
        neighbors.note(at(0, 1), Duration::from_secs(5) + NEIGHBOR_AGAIN);
        assert_eq!(neighbors.after(seen), [at(0, 1)]);
        let seen = neighbors.changes();
        let moved = Neighbor { mac: MacAddr6::new(2, 9, 9, 9, 9, 9), ..at(0, 1) };
        neighbors.note(moved, Duration::from_secs(5) + NEIGHBOR_AGAIN);
        assert_eq!(neighbors.after(seen), [moved]);
    }
}
