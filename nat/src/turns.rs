//! Whose turn it is: fair queueing of ports by cost.
//!
//! Each port that has work has an equal share of the translator, counted in what the work costs
//! ([`cost`](crate::cost)), whatever it sends. This is start-time fair queueing (Goyal, Vin and Cheng,
//! 1996): a port has a tag, which is how much it has cost, and the port with the smallest tag has the
//! next turn. A port that has had nothing to do begins at the tag of the port that has the turn, so it
//! saves nothing up. A port that is alone has every turn, whatever its tag is, so nothing is left idle.
//!
//! What is due to sockets waits here too, for the turn of the port of their flows: so a guest whose
//! thousand sockets become ready at once is not in front of another one's single socket.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};

use crate::limits::DEBT_MAX;
use crate::output::Port;
use crate::sockets::{Readiness, Token};

/// What is due to a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due {
    /// What has become of it, if something has.
    pub(crate) readiness: Option<Readiness>,
    /// Whether its flow has more to do from its last turn.
    pub(crate) unfinished: bool,
}

/// A port's part.
#[derive(Debug, Default)]
struct Part {
    /// What it has cost, in units, or the tag that it has begun at. Smaller tags are first.
    tag: u64,
    /// Its sockets to which something is due, in order.
    sockets: VecDeque<Token>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Turns {
    parts: Vec<Part>,
    /// The tag of the port that has had the last turn.
    now: u64,
    /// That port.
    last: u32,
    /// What is due to each socket in a port's list. Each is in one list, once.
    due: HashMap<Token, Due>,
}

impl Turns {
    fn part(&mut self, port: Port) -> &mut Part {
        let index = port.0 as usize;
        if index >= self.parts.len() {
            self.parts.resize_with(index + 1, Part::default);
        }
        &mut self.parts[index]
    }

    fn tag(&self, port: Port) -> u64 {
        self.parts.get(port.0 as usize).map_or(self.now, |part| part.tag.max(self.now))
    }

    /// The port that has the next turn, of those whose guests have sent something and those to whose
    /// sockets something is due.
    pub(crate) fn next(&mut self, waiting: impl Iterator<Item = Port>) -> Option<Port> {
        let with_sockets = || {
            let parts = self.parts.iter().enumerate();
            let due = parts.filter(|(_, part)| !part.sockets.is_empty());
            due.map(|(index, _)| Port(index as u32))
        };
        // Of ports with the same tag, the next by number behind the last one, as in a round.
        let order = |port: Port| (self.tag(port), port.0.wrapping_sub(self.last).wrapping_sub(1));
        let has_due = !self.due.is_empty();
        let due = has_due.then(with_sockets).into_iter().flatten();
        let port = waiting.chain(due).min_by_key(|port| order(*port))?;
        self.now = self.tag(port);
        self.last = port.0;
        Some(port)
    }

    /// Says what a port has cost.
    pub(crate) fn charge(&mut self, port: Port, cost: u64) {
        let now = self.now;
        let part = self.part(port);
        // Work that has come outside of the port's turns makes it wait, but not for long.
        part.tag = (part.tag.max(now) + cost).min(now.saturating_add(DEBT_MAX));
    }

    /// Adds what is due to a socket, whose flow is of this port.
    pub(crate) fn add(&mut self, port: Port, token: Token, due: Due) {
        match self.due.entry(token) {
            Entry::Occupied(mut entry) => {
                let known = entry.get_mut();
                known.unfinished |= due.unfinished;
                known.readiness = match (known.readiness, due.readiness) {
                    (Some(old), Some(new)) => Some(Readiness {
                        readable: old.readable | new.readable,
                        writable: old.writable | new.writable,
                        closed: old.closed | new.closed,
                        urgent: old.urgent | new.urgent,
                        failed: old.failed | new.failed,
                    }),
                    (old, new) => old.or(new),
                };
            }
            Entry::Vacant(entry) => {
                entry.insert(due);
                self.part(port).sockets.push_back(token);
            }
        }
    }

    /// Takes what is due to the next socket of a port.
    pub(crate) fn take(&mut self, port: Port) -> Option<(Token, Due)> {
        let token = self.parts.get_mut(port.0 as usize)?.sockets.pop_front()?;
        Some((token, self.due.remove(&token)?))
    }

    /// To how many sockets something is due.
    pub(crate) fn due(&self) -> usize {
        self.due.len()
    }

    /// Forgets a port, whose number another port may get.
    pub(crate) fn forget(&mut self, port: Port) {
        if let Some(part) = self.parts.get_mut(port.0 as usize) {
            for token in part.sockets.drain(..) {
                self.due.remove(&token);
            }
            part.tag = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Goal: of ports that always have work, none gets more than another by more than one turn of each,
        /// whatever a turn of each costs, and however others come and go.
        #[test]
        fn ports_with_work_have_equal_shares(
            costs in prop::collection::vec(1..20_000u64, 2..8),
            comes in prop::collection::vec((any::<prop::sample::Index>(), 0..30u32), 0..20),
        ) {
            let (mut turns, mut spent) = (Turns::default(), vec![0; costs.len()]);
            // The first two always have work, and the others sometimes.
            let mut until = vec![u32::MAX, u32::MAX];
            until.resize(costs.len(), 0);
            let mut comes = comes.into_iter();
            for turn in 0..2000 {
                if turn % 100 == 0 && let Some((who, long)) = comes.next() {
                    let who = who.index(costs.len());
                    until[who] = until[who].max(turn + long);
                }
                let waiting = (0..costs.len()).filter(|who| until[*who] > turn);
                let port = turns.next(waiting.map(|who| Port(who as u32)));
                let port = port.expect("two have work");
                let who = port.0 as usize;
                prop_assert!(until[who] > turn, "it has no work");
                spent[who] += costs[who];
                turns.charge(port, costs[who]);
                prop_assert!(spent[0].abs_diff(spent[1]) <= costs[0] + costs[1], "{spent:?}");
            }
        }
    }

    /// Goal: who is alone has every turn and owes nothing for it, and who has had nothing to do has saved
    /// nothing up.
    #[test]
    fn who_was_alone_owes_nothing_and_who_was_idle_has_saved_nothing() {
        let mut turns = Turns::default();
        let [busy, idle] = [Port(7), Port(3)];
        for _ in 0..1000 {
            assert_eq!(turns.next([busy].into_iter()), Some(busy));
            turns.charge(busy, 500);
        }
        // From now on they take turns, the one with work for twice as much every second time.
        let mut had = [0, 0];
        for _ in 0..300 {
            let port = turns.next([busy, idle].into_iter()).unwrap();
            had[usize::from(port == idle)] += 1;
            turns.charge(port, if port == idle { 200 } else { 100 });
        }
        assert!((195..=205).contains(&had[0]) && (95..=105).contains(&had[1]), "{had:?}");
    }

    /// Goal: work that came outside of a port's turns makes it wait for so long, and not for ever.
    #[test]
    fn debts_are_paid_and_bounded() {
        let mut turns = Turns::default();
        let [debtor, other] = [Port(0), Port(1)];
        turns.charge(debtor, 10 * DEBT_MAX);
        let mut others = 0;
        while turns.next([debtor, other].into_iter()) == Some(other) {
            turns.charge(other, 1000);
            others += 1;
        }
        assert_eq!(others, DEBT_MAX / 1000);
    }

    /// Goal: a socket is in its port's list once, whatever is told of it, and a port that has left has none.
    #[test]
    fn what_is_due_to_a_socket_is_kept_once() {
        let (mut turns, port) = (Turns::default(), Port(2));
        let ready = |readable, closed| {
            let readiness = Readiness { readable, closed, ..Readiness::default() };
            Due { readiness: Some(readiness), unfinished: false }
        };
        for _ in 0..100 {
            turns.add(port, Token(1), ready(true, false));
            turns.add(port, Token(2), ready(false, true));
            turns.add(port, Token(1), Due { readiness: None, unfinished: true });
        }
        turns.add(port, Token(1), ready(false, true));
        assert_eq!((turns.due(), turns.next([].into_iter())), (2, Some(port)));
        let both = Due { unfinished: true, ..ready(true, true) };
        assert_eq!(turns.take(port), Some((Token(1), both)));
        assert_eq!(turns.take(port), Some((Token(2), ready(false, true))));
        assert_eq!((turns.take(port), turns.next([].into_iter())), (None, None));
        turns.add(port, Token(3), ready(true, false));
        turns.forget(port);
        assert_eq!((turns.due(), turns.take(port)), (0, None));
    }
}
