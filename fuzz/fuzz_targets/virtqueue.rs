//! A virtqueue in memory that holds arbitrary bytes and changes between any two calls. A chain must
//! be what a plain walk of the same bytes finds, or be refused where that walk finds none. Chains come
//! back once, and the rest of the queue keeps its counts.
#![no_main]

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring_core::HeapBacking;
use vmring_core::guest::{GuestMapping, GuestMemory, GuestRegion};
use vmring_virtio::queue::{AddressSpace, Queue, QueueFeatures, QueueLayout, QueueState};

/// The queue's parts, for 16 entries at most. Two regions are adjacent, and a third is apart.
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x140;
const REGIONS: [(u64, u64); 3] = [(0, 0x400), (0x400, 0x403), (0x1001, 0x400)];
const SEGMENTS_MAX: usize = 8;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    shift: u8,
    bits: u8,
    start: u16,
    ops: Vec<Op>,
    memory: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Op {
    /// Changes any bytes.
    Write {
        at: u16,
        bytes: [u8; 8],
    },
    /// Changes a descriptor, in the queue's table or anywhere, to one that may be valid.
    Describe {
        at: u16,
        address: u16,
        len: u8,
        flags: u8,
        next: u8,
    },
    /// Moves the available index so far ahead of the used index.
    Expose {
        ahead: u8,
        heads: [u8; 4],
    },
    Fetch(u8),
    Pop(u8),
    /// The same for single buffers, and how many of them are taken.
    PopSingles(u8, u8),
    Push(u8),
    PushAll(u8),
    Unpop(u8),
    Flush,
    Interrupt,
    EnableNotifications,
    DisableNotifications,
    Succeed {
        gives_up: bool,
    },
    SetMemory {
        without: u8,
    },
}

struct Guest {
    memory: GuestMemory,
    size: u16,
    features: QueueFeatures,
}

impl Guest {
    fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: self.size.into(),
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
            addresses: AddressSpace::Guest,
            used_log: None,
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let mut left = bytes;
        for piece in self.memory.slices(at, bytes.len() as u32).map_while(Result::ok) {
            left = &left[piece.copy_from(left)..];
        }
    }

    fn read<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        for (i, byte) in bytes.iter_mut().enumerate() {
            [*byte] = self.memory.slice(at.checked_add(i as u64)?, 1)?.read()?;
        }
        Some(bytes)
    }

    fn index(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at).expect("the rings are in memory"))
    }

    fn head(&self, index: u16) -> u16 {
        self.index(AVAILABLE + 4 + u64::from(index % self.size) * 2)
    }

    /// The segments of the chain at `head`, or `None` if it is broken or has too many.
    fn walk(&self, head: u16) -> Option<Vec<(u64, u32, bool)>> {
        let mut segments = Vec::new();
        let (mut table, mut entries, mut index) = (0_u64, u64::from(self.size), u64::from(head));
        let mut seen = BTreeSet::new();
        let mut is_indirect = false;
        let mut writable_before = false;
        loop {
            if index >= entries || !seen.insert(index) {
                return None;
            }
            let bytes: [u8; 16] = self.read(table.checked_add(index * 16)?)?;
            let number = |from: usize, to: usize| {
                bytes[from..to].iter().rev().fold(0, |n: u64, byte| n << 8 | u64::from(*byte))
            };
            let (address, len, flags, next) =
                (number(0, 8), number(8, 12), number(12, 14), number(14, 16));
            let (has_next, writable, indirect) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
            if len == 0 {
                return None;
            }
            if indirect {
                if !self.features.indirect || is_indirect || has_next || len % 16 != 0 {
                    return None;
                }
                (is_indirect, table, entries, index) = (true, address, len / 16, 0);
                seen.clear();
                continue;
            }
            if writable_before && !writable {
                return None;
            }
            writable_before = writable;
            let (mut at, end) = (address, address.checked_add(len)?);
            while at < end {
                let region = |(start, len): &&(u64, u64)| (*start..start + len).contains(&at);
                let (start, len) = REGIONS.iter().find(region)?;
                // A region may have been taken away.
                self.memory.slice(at, 1)?;
                let until = end.min(start + len);
                segments.push((at, (until - at) as u32, writable));
                at = until;
            }
            if !has_next {
                return (segments.len() <= SEGMENTS_MAX).then_some(segments);
            }
            index = next;
        }
    }
}

/// A chain that was fetched, and its segments as they were then. A guest that changes a chain that it has
/// exposed gets either the one or the other.
struct Fetched {
    head: u16,
    then: Option<Vec<(u64, u32, bool)>>,
}

fuzz_target!(|input: Input| {
    let regions: Vec<_> = REGIONS
        .iter()
        .map(|(start, len)| {
            let mapping: Arc<dyn GuestMapping> = Arc::new(HeapBacking::new(*len as usize));
            GuestRegion::new(*start, mapping)
        })
        .collect();
    let has = |bit: u8| input.bits & (1 << bit) != 0;
    let features = QueueFeatures { event_idx: has(0), indirect: has(1), in_order: has(2) };
    let memory = GuestMemory::new(regions.clone()).expect("valid regions");
    let mut guest = Guest { memory, size: 1 << (input.shift % 5), features };
    for (start, _) in REGIONS {
        guest.write(start, &input.memory[(start as usize / 4).min(input.memory.len())..]);
    }
    let new = |guest: &Guest, state| {
        let queue = Queue::new(guest.memory.clone(), guest.layout(), guest.features, state);
        queue.map(|queue| queue.with_segments_max(SEGMENTS_MAX))
    };
    let state = QueueState { next_available: input.start, next_used: input.start };
    let mut queue = new(&guest, state).expect("the layout is valid");
    // The heads that were fetched and not popped, in both directions of time.
    let mut heads: VecDeque<Fetched> = VecDeque::new();
    // What was popped and not pushed, and whether it is whole.
    let mut popped: VecDeque<(Fetched, bool)> = VecDeque::new();
    for op in &input.ops {
        match op {
            Op::Write { at, bytes } => guest.write((*at % 0x1500).into(), bytes),
            Op::Describe { at, address, len, flags, next } => {
                let mut bytes = [0; 16];
                bytes[..2].copy_from_slice(&(address % 0x1500).to_le_bytes());
                bytes[8] = *len;
                bytes[12] = flags & 7;
                bytes[14] = next % 20;
                guest.write((*at % 0x1500).into(), &bytes);
            }
            Op::Expose { ahead, heads } => {
                let used = guest.index(USED + 2);
                for (i, head) in heads.iter().enumerate() {
                    let slot = used.wrapping_add(i as u16) % guest.size;
                    guest.write(AVAILABLE + 4 + u64::from(slot) * 2, &[head % 20, 0]);
                }
                let index = used.wrapping_add((ahead % 20).into());
                guest.write(AVAILABLE + 2, &index.to_le_bytes());
            }
            Op::Fetch(most) => {
                let before = queue.state().next_available.wrapping_add(heads.len() as u16);
                let Ok(ready) = queue.fetch((*most).into()) else {
                    assert!(heads.is_empty() && queue.fetch(1).is_err() && queue.pop().is_none());
                    let used = guest.index(USED + 2);
                    let state = QueueState { next_available: used, next_used: used };
                    queue = new(&guest, state).expect("the layout is valid");
                    popped.clear();
                    continue;
                };
                if heads.is_empty() {
                    let fetched = |i| {
                        let head = guest.head(before.wrapping_add(i));
                        Fetched { head, then: guest.walk(head) }
                    };
                    heads.extend((0..ready).map(fetched));
                }
                assert_eq!(usize::from(ready), heads.len().min((*most).into()));
            }
            Op::Pop(count) => {
                for _ in 0..*count {
                    let Some(chain) = queue.pop() else {
                        assert!(heads.is_empty());
                        break;
                    };
                    let fetched = heads.pop_front().expect("it was fetched");
                    let (then, now) = (&fetched.then, guest.walk(fetched.head));
                    let found = chain.ok().map(|chain| {
                        let part = |s: vmring_core::guest::GuestSlice<'_>, writable| {
                            (s.guest_address(), s.len(), writable)
                        };
                        let readable = chain.readable().map(|s| part(s, false));
                        let all: Vec<_> =
                            readable.chain(chain.writable().map(|s| part(s, true))).collect();
                        let is = |other: &Option<_>| other.as_ref() == Some(&all);
                        assert!(is(&now) || is(then), "{all:?}, {now:?}, {then:?}");
                        let len: u64 = all.iter().map(|s| u64::from(s.1)).sum();
                        assert_eq!(len, chain.readable_len() + chain.writable_len());
                        // This may be the queue itself.
                        chain.writable().for_each(|s| assert!(s.copy_from(&[*count; 7]) > 0));
                    });
                    assert!(found.is_some() || now.is_none() || then.is_none());
                    let is_whole = found.is_some();
                    popped.push_back((fetched, is_whole));
                    return_broken(&mut popped);
                }
            }
            Op::PopSingles(most, takes) => {
                let mut taken = 0;
                let count = queue.pop_singles((*most).into(), |single| {
                    let buffer = single.readable().or(single.writable()).expect("either");
                    let is_writable = single.writable().is_some();
                    let all = vec![(buffer.guest_address(), buffer.len(), is_writable)];
                    let fetched = heads.front().expect("it was fetched");
                    assert_eq!(guest.walk(fetched.head), Some(all));
                    if taken == u16::from(*takes) {
                        return false;
                    }
                    taken += 1;
                    popped.push_back((heads.pop_front().expect("seen above"), true));
                    true
                });
                assert_eq!(count, taken);
            }
            Op::PushAll(count) => {
                let count = u16::from(*count).min(queue.outstanding());
                queue.push_all(&vec![0; count.into()]);
                for _ in 0..count {
                    assert!(popped.pop_front().is_some_and(|(_, whole)| whole));
                    return_broken(&mut popped);
                }
            }
            Op::Push(count) => {
                for _ in 0..u16::from(*count).min(queue.outstanding()) {
                    queue.push(0);
                    assert!(popped.pop_front().is_some_and(|(_, whole)| whole));
                    return_broken(&mut popped);
                }
            }
            Op::Unpop(count) => {
                let count = u16::from(*count).min(queue.outstanding());
                queue.unpop(count);
                let kept = queue.outstanding();
                while popped.iter().filter(|(_, whole)| *whole).count() > kept.into() {
                    let (fetched, _) = popped.pop_back().expect("there are more");
                    heads.push_front(fetched);
                }
            }
            Op::Flush => {
                queue.flush();
                let QueueState { next_available, next_used } = queue.state();
                let waiting = next_available.wrapping_sub(next_used);
                assert_eq!(usize::from(waiting), popped.len());
            }
            Op::Interrupt => {
                let _ = queue.needs_interrupt();
                assert!(!queue.needs_interrupt());
            }
            Op::EnableNotifications => {
                let more = guest.index(AVAILABLE + 2) != queue.state().next_available;
                assert_eq!(queue.enable_notifications(), more);
            }
            Op::DisableNotifications => queue.disable_notifications(),
            Op::Succeed { gives_up } => {
                if *gives_up {
                    queue.unpop(queue.outstanding());
                    queue.flush();
                }
                queue = new(&guest, queue.state()).expect("the state is a queue's");
                heads.clear();
                popped.clear();
            }
            Op::SetMemory { without } => {
                let mut regions = regions.clone();
                // The first one holds the rings.
                let without = usize::from(*without % 4);
                if without < regions.len() {
                    regions.remove(without);
                }
                let memory = GuestMemory::new(regions).expect("valid regions");
                let set = queue.set_memory(memory.clone());
                assert_eq!(set.is_ok(), without != 0);
                if set.is_ok() {
                    guest.memory = memory;
                }
            }
        }
        let whole = popped.iter().filter(|(_, whole)| *whole).count();
        assert_eq!(usize::from(queue.outstanding()), whole);
    }
});

/// A broken chain comes back when it is the oldest.
fn return_broken(popped: &mut VecDeque<(Fetched, bool)>) {
    while popped.front().is_some_and(|(_, whole)| !whole) {
        popped.pop_front();
    }
}
