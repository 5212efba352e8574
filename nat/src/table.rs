//! A table of flows: a slab with generations, and a keyed hash over it.
//!
//! The table grows when flows are added, up to its limit, and never when they are looked up. The
//! hash is SipHash with random keys, so a guest cannot choose addresses that collide. An id names
//! an entry only until it is removed: the entry that has its place next has another generation.

use std::collections::HashMap;
use std::hash::{Hash, RandomState};

/// The name of an entry of a [`Table`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FlowId {
    /// The place. It is less than the table's limit.
    pub(crate) index: u32,
    /// Which of the entries that have been in this place. It has 24 bits.
    pub(crate) generation: u32,
}

/// What the entries of a table are found by.
pub(crate) trait Keyed {
    /// The key. An entry's does not change.
    type Key: Copy + Eq + Hash;
    /// The entry's key.
    fn key(&self) -> Self::Key;
}

#[derive(Debug)]
struct Slot<F> {
    generation: u32,
    entry: Result<F, u32>,
}

/// The table is full.
#[derive(Debug)]
pub(crate) struct TableFull;

/// A bounded table of entries with unique keys.
#[derive(Debug)]
pub(crate) struct Table<F: Keyed> {
    slots: Vec<Slot<F>>,
    /// The first free place, or the length of `slots`.
    free: u32,
    by_key: HashMap<F::Key, u32, RandomState>,
    limit: usize,
}

impl<F: Keyed> Table<F> {
    /// A table of at most `limit` entries.
    pub(crate) fn new(limit: usize) -> Self {
        let limit = limit.min(u32::MAX as usize / 2);
        Self { slots: Vec::new(), free: 0, by_key: HashMap::default(), limit }
    }

    /// Takes memory for as many entries as there may be, however they come and go: a map that is at most
    /// half full cleans itself without taking more.
    pub(crate) fn reserve(&mut self) {
        self.by_key.reserve(2 * self.limit);
        self.slots.reserve_exact(self.limit.saturating_sub(self.slots.len()));
    }

    /// The number of entries.
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The number of places that have ever been used. Every index is less.
    pub(crate) fn places(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no place for another entry.
    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// The entry with this key.
    pub(crate) fn find(&self, key: &F::Key) -> Option<FlowId> {
        let index = *self.by_key.get(key)?;
        Some(FlowId { index, generation: self.slots[index as usize].generation })
    }

    /// The entry with this id, unless it has been removed.
    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut F> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if slot.generation == id.generation { slot.entry.as_mut().ok() } else { None }
    }

    /// The entry with this id, unless it has been removed.
    pub(crate) fn peek(&self, id: FlowId) -> Option<&F> {
        let slot = self.slots.get(id.index as usize)?;
        if slot.generation == id.generation { slot.entry.as_ref().ok() } else { None }
    }

    /// The id of the entry in this place, if there is one.
    pub(crate) fn at(&self, index: u32) -> Option<FlowId> {
        let slot = self.slots.get(index as usize)?;
        slot.entry.is_ok().then_some(FlowId { index, generation: slot.generation })
    }

    /// All entries.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &F> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref().ok())
    }

    /// The id that the next entry will have.
    pub(crate) fn next_id(&self) -> FlowId {
        let generation = self.slots.get(self.free as usize).map_or(0, |slot| slot.generation);
        FlowId { index: self.free, generation }
    }

    /// Adds an entry whose key is not in the table.
    pub(crate) fn insert(&mut self, entry: F) -> Result<FlowId, TableFull> {
        if self.is_full() {
            return Err(TableFull);
        }
        let (id, key) = (self.next_id(), entry.key());
        match self.slots.get_mut(self.free as usize) {
            Some(slot) => {
                self.free = *slot.entry.as_ref().err().expect("a free slot names the next");
                slot.entry = Ok(entry);
            }
            None => {
                if self.slots.len() == self.slots.capacity() {
                    // An eighth more, where `push` would take twice as much.
                    self.slots.reserve_exact(self.slots.len() / 8 + 8);
                }
                self.slots.push(Slot { generation: 0, entry: Ok(entry) });
                self.free = self.slots.len() as u32;
            }
        }
        let other = self.by_key.insert(key, id.index);
        debug_assert!(other.is_none(), "a key is in the table once");
        Ok(id)
    }

    /// Removes an entry.
    pub(crate) fn remove(&mut self, id: FlowId) -> Option<F> {
        let slot = self.slots.get_mut(id.index as usize)?;
        if slot.generation != id.generation || slot.entry.is_err() {
            return None;
        }
        slot.generation = (slot.generation + 1) & 0xff_ffff;
        let entry = std::mem::replace(&mut slot.entry, Err(self.free)).ok()?;
        self.free = id.index;
        self.by_key.remove(&entry.key());
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Keyed for (u32, char) {
        type Key = u32;
        fn key(&self) -> u32 {
            self.0
        }
    }

    /// Goal: an id names its entry only, and places are used again.
    #[test]
    fn an_id_does_not_outlive_its_entry() {
        let mut table = Table::new(2);
        let a = table.insert((1, 'a')).unwrap();
        let b = table.insert((2, 'b')).unwrap();
        assert!(table.is_full() && table.insert((3, 'c')).is_err());
        assert_eq!(table.find(&1), Some(a));
        assert_eq!(table.remove(a), Some((1, 'a')));
        assert_eq!((table.remove(a), table.find(&1), table.at(a.index)), (None, None, None));
        let c = table.insert((3, 'c')).unwrap();
        assert_eq!((c.index, table.places(), table.len()), (a.index, 2, 2));
        assert_eq!(table.get_mut(a), None);
        assert_eq!(table.get_mut(c), Some(&mut (3, 'c')));
        assert_eq!(table.get_mut(b), Some(&mut (2, 'b')));
    }
}
