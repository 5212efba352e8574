//! A timer wheel: one deadline for each flow, and one wake-up for the earliest.
//!
//! Setting, moving and removing a deadline costs the same for any number of flows, and allocates
//! nothing for a flow that is known. The wheel is hierarchical (Varghese and Lauck, 1987, scheme
//! 7): a deadline is in a slot of the level whose digit (to base 64) is the first in which it
//! differs from the present. So everything on a level is earlier than everything on the level
//! above, and nothing wraps round.

use crate::limits::TICK_SHIFT;

const SLOT_BITS: u32 = 6;
const SLOTS: usize = 1 << SLOT_BITS;
/// 64^9 ticks of 8 ms are more than 2^64 microseconds, so every time has a place.
const LEVELS: usize = 9;
/// The list of what has expired, behind the slots of all levels.
const DUE: usize = LEVELS * SLOTS;
const NIL: u32 = u32::MAX;
/// A node in no list.
const NOWHERE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug)]
struct Node {
    previous: u32,
    next: u32,
    /// In ticks.
    at: u64,
    list: u16,
}

/// The wheel.
#[derive(Debug)]
pub(crate) struct Wheel {
    nodes: Vec<Node>,
    lists: Box<[u32]>,
    /// For each level, which of its slots have something in them.
    occupied: [u64; LEVELS],
    /// The tick up to which everything has expired.
    now: u64,
}

impl Wheel {
    /// A wheel that starts at `now`.
    pub(crate) fn new(now: u64) -> Self {
        Self {
            nodes: Vec::new(),
            lists: vec![NIL; DUE + 1].into(),
            occupied: [0; LEVELS],
            now: now >> TICK_SHIFT,
        }
    }

    /// Makes room for the timers 0 to `len` - 1. The only call that allocates.
    pub(crate) fn grow(&mut self, len: usize) {
        if len > self.nodes.len() {
            if len > self.nodes.capacity() {
                self.nodes.reserve_exact(len + len / 8 + 8 - self.nodes.len());
            }
            self.nodes.resize(len, Node { previous: NIL, next: NIL, at: 0, list: NOWHERE });
        }
    }

    /// Sets the deadline of a timer, and forgets the one that it had. It expires up to a tick late,
    /// and not early.
    pub(crate) fn set(&mut self, timer: u32, at: u64) {
        self.clear(timer);
        self.nodes[timer as usize].at = at.div_ceil(1 << TICK_SHIFT);
        self.link(timer);
    }

    /// Forgets the deadline of a timer, if it has one.
    pub(crate) fn clear(&mut self, timer: u32) {
        let node = self.nodes[timer as usize];
        if node.list == NOWHERE {
            return;
        }
        let list = usize::from(node.list);
        match node.previous {
            NIL => self.lists[list] = node.next,
            previous => self.nodes[previous as usize].next = node.next,
        }
        if node.next != NIL {
            self.nodes[node.next as usize].previous = node.previous;
        }
        if self.lists[list] == NIL && list != DUE {
            self.occupied[list / SLOTS] &= !(1 << (list % SLOTS));
        }
        self.nodes[timer as usize].list = NOWHERE;
    }

    /// Puts a node into the list of its deadline.
    fn link(&mut self, timer: u32) {
        let at = self.nodes[timer as usize].at;
        let list = if at <= self.now {
            DUE
        } else {
            let level = ((at ^ self.now).ilog2() / SLOT_BITS) as usize;
            let slot = (at >> (SLOT_BITS * level as u32)) as usize % SLOTS;
            self.occupied[level] |= 1 << slot;
            level * SLOTS + slot
        };
        let next = std::mem::replace(&mut self.lists[list], timer);
        if next != NIL {
            self.nodes[next as usize].previous = timer;
        }
        let node = &mut self.nodes[timer as usize];
        (node.previous, node.next, node.list) = (NIL, next, list as u16);
    }

    /// The first slot that has something in it, and the tick at which it begins.
    fn first(&self) -> Option<(usize, u64)> {
        let level = self.occupied.iter().position(|&occupied| occupied != 0)?;
        let slot = self.occupied[level].trailing_zeros() as usize;
        let shift = SLOT_BITS * level as u32;
        let above = self.now >> (shift + SLOT_BITS) << (shift + SLOT_BITS);
        Some((level * SLOTS + slot, above | ((slot as u64) << shift)))
    }

    /// Takes a timer whose deadline has come by `now`, in no particular order among those of one
    /// call. The timer has no deadline afterwards.
    pub(crate) fn expired(&mut self, now: u64) -> Option<u32> {
        let target = now >> TICK_SHIFT;
        loop {
            let due = self.lists[DUE];
            if due != NIL {
                self.clear(due);
                return Some(due);
            }
            match self.first() {
                Some((list, begins)) if begins <= target => {
                    self.now = begins;
                    let mut timer = std::mem::replace(&mut self.lists[list], NIL);
                    self.occupied[list / SLOTS] &= !(1 << (list % SLOTS));
                    while timer != NIL {
                        let next = self.nodes[timer as usize].next;
                        self.nodes[timer as usize].list = NOWHERE;
                        self.link(timer);
                        timer = next;
                    }
                }
                _ => {
                    self.now = self.now.max(target);
                    return None;
                }
            }
        }
    }

    /// The time at which [`expired`](Self::expired) may have something. It is not later than the
    /// earliest deadline, rounded up to a tick.
    pub(crate) fn next(&self) -> Option<u64> {
        if self.lists[DUE] != NIL {
            return Some(self.now << TICK_SHIFT);
        }
        self.first().map(|(_, begins)| begins << TICK_SHIFT)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::limits::TICK;

    #[derive(Clone, Debug)]
    enum Step {
        Set { timer: u32, after: u64 },
        Clear { timer: u32 },
        Wait { time: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let time = (0u32..41).prop_flat_map(|bits| 0u64..1 << bits);
        prop_oneof![
            3 => (0u32..16, time.clone()).prop_map(|(timer, after)| Step::Set { timer, after }),
            1 => (0u32..16).prop_map(|timer| Step::Clear { timer }),
            3 => time.prop_map(|time| Step::Wait { time }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Goal: a timer expires once, at its deadline or at most a tick later, and `next` is never
        /// later than that.
        /// Method: the wheel beside a plain map, with waits of microseconds to weeks. Whoever waits
        /// calls as often as `next` says.
        #[test]
        fn timers_expire_once_and_in_time(start in 0u64..1 << 63, steps in prop::collection::vec(step(), 1..60)) {
            let tick = TICK.as_micros() as u64;
            let mut wheel = Wheel::new(start);
            wheel.grow(16);
            let mut model = BTreeMap::new();
            let mut now = start;
            for step in steps {
                match step {
                    Step::Set { timer, after } => {
                        wheel.set(timer, now + after);
                        model.insert(timer, now + after);
                    }
                    Step::Clear { timer } => {
                        wheel.clear(timer);
                        model.remove(&timer);
                    }
                    Step::Wait { time } => {
                        let end = now + time;
                        let mut calls = 0;
                        loop {
                            let next = wheel.next().unwrap_or(u64::MAX);
                            now = end.min(next.max(now));
                            while let Some(timer) = wheel.expired(now) {
                                let deadline = model.remove(&timer);
                                prop_assert!(deadline.is_some(), "it expired twice, or was cleared");
                                let deadline = deadline.unwrap();
                                prop_assert!(deadline <= now, "early");
                                prop_assert!(now < deadline + 2 * tick || now < start + 2 * tick, "late");
                            }
                            calls += 1;
                            prop_assert!(calls < 200, "it spins");
                            if now >= end {
                                break;
                            }
                        }
                        let late = model.values().any(|&deadline| deadline + tick <= now);
                        prop_assert!(!late, "it has not expired");
                    }
                }
            }
        }
    }
}
