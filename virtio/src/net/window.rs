//! [`Window`]: the chains of a queue that are on their way, in the order in which they were popped.

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It is in the ring.
    Posted,
    /// It ends with this used length.
    Done(u32),
    /// The ring has given it back, and nothing was received into it.
    Cancelled,
}

/// Remembers what became of each chain until it is the chain's turn. A ring may end entries in
/// another order than that in which they were submitted, and a chain that is dropped at once waits
/// for those before it.
///
/// A chain's number counts all chains of the queue, modulo 2^32, and is the `user_data` of its entry.
#[derive(Debug)]
pub(super) struct Window {
    /// What became of each chain. It is [`State::Posted`] where no chain is, so a chain that goes into
    /// the ring and ends in its turn writes nothing here.
    states: Box<[State]>,
    oldest: u32,
    next: u32,
    posted: u32,
    cancelled: u32,
}

/// What is to be done with the oldest chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Push the oldest one with this used length.
    Push(u32),
    /// Give up this many: all that there are. None of them was used.
    Unpop(u16),
    /// Wait.
    Wait,
}

impl Window {
    /// For a queue of this size, which is a power of two. No more chains can be on their way.
    pub(super) fn new(size: u32) -> Self {
        debug_assert!(size.is_power_of_two());
        let states = vec![State::Posted; size as usize].into();
        Self { states, oldest: 0, next: 0, posted: 0, cancelled: 0 }
    }

    /// Where the chain with this number is.
    fn place(&self, number: u32) -> usize {
        number as usize & (self.states.len() - 1)
    }

    /// The number that the next chain gets.
    pub(super) fn next(&self) -> u32 {
        self.next
    }

    /// How many chains are in the ring.
    pub(super) fn posted(&self) -> u32 {
        self.posted
    }

    pub(super) fn is_empty(&self) -> bool {
        self.oldest == self.next
    }

    /// Adds the chain that was popped last, which is in the ring.
    #[inline(always)]
    pub(super) fn add_posted(&mut self) {
        debug_assert!(self.len() < self.states.len() as u32);
        self.next = self.next.wrapping_add(1);
        self.posted += 1;
    }

    /// Adds the chain that was popped last, which was dropped. It ends with the used length 0.
    pub(super) fn add_dropped(&mut self) {
        debug_assert!(self.len() < self.states.len() as u32);
        let place = self.place(self.next);
        self.states[place] = State::Done(0);
        self.next = self.next.wrapping_add(1);
    }

    /// How many chains there are.
    fn len(&self) -> u32 {
        self.next.wrapping_sub(self.oldest)
    }

    /// Ends the chain with this number, which is in the ring. Returns whether a chain with this number
    /// is.
    pub(super) fn end(&mut self, number: u64, state: State) -> bool {
        let Ok(number) = u32::try_from(number) else { return false };
        let place = self.place(number);
        let is_there = number.wrapping_sub(self.oldest) < self.len();
        if !is_there || self.states[place] != State::Posted {
            return false;
        }
        self.posted -= 1;
        self.states[place] = state;
        self.cancelled += u32::from(state == State::Cancelled);
        true
    }

    /// The number of the oldest chain, or the next number if there is none.
    pub(super) fn oldest(&self) -> u32 {
        self.oldest
    }

    /// Ends the oldest chains, at most `most`, as far as they are in the ring. They are not in the window
    /// any more. Returns how many there are.
    #[inline]
    pub(super) fn end_oldest(&mut self, most: usize) -> usize {
        let most = most.min(self.len() as usize);
        // Most windows have no chain that has ended out of its turn.
        let count = if self.posted == self.len() { most } else { self.leading_posted(most) };
        self.posted -= count as u32;
        self.oldest = self.oldest.wrapping_add(count as u32);
        count
    }

    /// How many of the oldest chains, at most `most`, are in the ring.
    #[cold]
    fn leading_posted(&self, most: usize) -> usize {
        let is_posted = |i: &usize| {
            self.states[self.place(self.oldest.wrapping_add(*i as u32))] == State::Posted
        };
        (0..most).take_while(is_posted).count()
    }

    /// Takes the oldest chain, which is not in the ring, out of the window.
    fn remove_oldest(&mut self) {
        let place = self.place(self.oldest);
        self.states[place] = State::Posted;
        self.oldest = self.oldest.wrapping_add(1);
    }

    /// What is to be done next. After [`Step::Push`] the chain is not in the window any more, and
    /// after [`Step::Unpop`] none is.
    pub(super) fn step(&mut self) -> Step {
        if self.is_empty() {
            return Step::Wait;
        }
        let oldest = self.states[self.place(self.oldest)];
        match oldest {
            State::Posted => Step::Wait,
            State::Done(len) => {
                self.remove_oldest();
                Step::Push(len)
            }
            State::Cancelled => self.step_cancelled(),
        }
    }

    #[cold]
    fn step_cancelled(&mut self) -> Step {
        let count = self.len();
        if self.cancelled == count {
            (self.next, self.cancelled) = (self.oldest, 0);
            // No place has a chain any more.
            self.states.fill(State::Posted);
            // No queue has more than 2^15 entries.
            return Step::Unpop(count as u16);
        }
        if self.posted > 0 && self.cancelled + self.posted == count {
            return Step::Wait;
        }
        // A later chain was used. The available index cannot move back behind it, so this one goes
        // back empty.
        self.cancelled -= 1;
        self.remove_oldest();
        Step::Push(0)
    }

    /// Whether chains came back unused, and have not been given up yet. No more are to be posted
    /// meanwhile.
    pub(super) fn has_cancelled(&self) -> bool {
        self.cancelled > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn posted(count: u32) -> Window {
        let mut window = Window::new(8);
        (0..count).for_each(|_| window.add_posted());
        window
    }

    #[test]
    fn chains_end_in_the_order_in_which_they_were_popped() {
        let mut window = posted(2);
        window.add_dropped();
        assert!(window.end(1, State::Done(7)));
        assert_eq!(window.step(), Step::Wait);
        assert!(window.end(0, State::Done(5)));
        let steps: [_; 4] = std::array::from_fn(|_| window.step());
        assert_eq!(steps, [Step::Push(5), Step::Push(7), Step::Push(0), Step::Wait]);
    }

    #[test]
    fn the_oldest_chains_end_at_once() {
        let mut window = posted(4);
        assert!(window.end(2, State::Done(7)));
        assert_eq!((window.end_oldest(1), window.oldest()), (1, 1));
        assert_eq!(window.end_oldest(3), 1, "the third has ended already");
        assert_eq!(window.end_oldest(3), 0);
        assert_eq!((window.step(), window.posted()), (Step::Push(7), 1));
        assert_eq!(window.end_oldest(3), 1, "there are no more");
        assert_eq!((window.end_oldest(1), window.is_empty()), (0, true));
    }

    /// Goal: a place says nothing of the chain that had it before. Method: each of the four ways in which
    /// a chain leaves the window, and the same places again.
    #[test]
    fn a_place_that_is_used_again_is_in_the_ring() {
        let mut window = posted(3);
        window.add_dropped();
        window.end(1, State::Cancelled);
        assert_eq!(window.end_oldest(1), 1);
        window.end(2, State::Done(6));
        let steps: [_; 4] = std::array::from_fn(|_| window.step());
        assert_eq!(steps, [Step::Push(0), Step::Push(6), Step::Push(0), Step::Wait]);
        (0..8).for_each(|_| window.add_posted());
        (4..12).for_each(|number| assert!(window.end(number, State::Cancelled)));
        assert_eq!((window.step(), window.posted()), (Step::Unpop(8), 0));
        (0..8).for_each(|_| window.add_posted());
        assert_eq!((window.end_oldest(8), window.posted()), (8, 0));
        assert!(window.states.iter().all(|state| *state == State::Posted));
    }

    #[test]
    fn numbers_that_are_not_on_their_way_are_refused() {
        let mut window = posted(2);
        assert!(!window.end(2, State::Done(0)));
        assert!(!window.end(u64::MAX, State::Done(0)));
        assert!(window.end(0, State::Done(0)));
        assert!(!window.end(0, State::Done(0)), "it has ended already");
    }

    #[test]
    fn cancelled_chains_are_given_up_when_nothing_is_behind_them() {
        let mut window = posted(3);
        window.end(0, State::Done(9));
        window.end(1, State::Cancelled);
        assert_eq!((window.step(), window.step()), (Step::Push(9), Step::Wait));
        window.end(2, State::Cancelled);
        assert_eq!((window.step(), window.step()), (Step::Unpop(2), Step::Wait));
        assert!(window.is_empty());
        // The numbers are given again.
        assert_eq!(window.next(), 1);
    }

    #[test]
    fn a_cancelled_chain_before_a_used_one_goes_back_empty() {
        let mut window = posted(3);
        window.end(0, State::Cancelled);
        window.end(1, State::Done(4));
        let steps: [_; 3] = std::array::from_fn(|_| window.step());
        assert_eq!(steps, [Step::Push(0), Step::Push(4), Step::Wait]);
        window.end(2, State::Cancelled);
        assert_eq!(window.step(), Step::Unpop(1));
    }

    #[test]
    fn numbers_wrap() {
        let mut window = Window { oldest: u32::MAX, next: u32::MAX, ..Window::new(4) };
        window.add_posted();
        window.add_posted();
        assert!(window.end(0, State::Done(2)));
        assert!(window.end(u32::MAX.into(), State::Done(1)));
        assert_eq!((window.step(), window.step()), (Step::Push(1), Step::Push(2)));
    }
}
