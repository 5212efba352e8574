//! A queue whose elements are made in their place.
//!
//! `VecDeque::push_back` takes its element by value, so that a slot is put together on the stack first
//! and then copied: a wide load behind narrow stores, for which the processor waits some fifteen cycles.

/// First in, first out. Grows when it is full, which a ring's lists never are: their size is the
/// ring's depth.
#[derive(Debug)]
pub(crate) struct Fifo<T> {
    /// A power of two, or none.
    cells: Box<[Option<T>]>,
    /// Where the oldest is, and where the next comes. Free-running; a cell is found by masking.
    head: usize,
    tail: usize,
}

impl<T> Default for Fifo<T> {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl<T> Fifo<T> {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let capacity = if capacity == 0 { 0 } else { capacity.next_power_of_two() };
        Self { cells: (0..capacity).map(|_| None).collect(), head: 0, tail: 0 }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.tail.wrapping_sub(self.head)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.tail == self.head
    }

    /// Where the oldest is, counted from the first element that there ever was.
    #[inline]
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    #[inline]
    fn cell(&self, index: usize) -> usize {
        index & self.cells.len().wrapping_sub(1)
    }

    #[inline]
    fn make_room(&mut self) {
        if self.len() == self.cells.len() {
            self.grow();
        }
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self) {
        let mut larger = Self::with_capacity((self.len() + 1).max(8));
        // Positions stay what they are.
        (larger.head, larger.tail) = (self.head, self.head);
        while let Some(element) = self.pop_front() {
            larger.push_back(element);
        }
        *self = larger;
    }

    /// Makes an element behind all others.
    #[inline]
    pub(crate) fn push_back_with(&mut self, make: impl FnOnce() -> T) {
        self.make_room();
        let cell = self.cell(self.tail);
        let place = &mut self.cells[cell];
        self.tail = self.tail.wrapping_add(1);
        // The cell is empty. Forgetting what was in it saves asking, and with the question the copy:
        // an assignment makes the new element elsewhere, because dropping the old one may panic.
        std::mem::forget(place.replace(make()));
    }

    #[inline]
    pub(crate) fn push_back(&mut self, element: T) {
        self.push_back_with(|| element);
    }

    pub(crate) fn push_front(&mut self, element: T) {
        self.make_room();
        self.head = self.head.wrapping_sub(1);
        let cell = self.cell(self.head);
        self.cells[cell] = Some(element);
    }

    #[inline]
    pub(crate) fn front(&self) -> Option<&T> {
        if self.is_empty() { None } else { self.cells[self.cell(self.head)].as_ref() }
    }

    /// The oldest.
    #[inline]
    pub(crate) fn pop_front(&mut self) -> Option<T> {
        if self.is_empty() { None } else { self.pop_known() }
    }

    /// The oldest, for who knows that there is one: `None` if there is not, and then the list is wrong.
    #[inline(always)]
    pub(crate) fn pop_known(&mut self) -> Option<T> {
        debug_assert!(!self.is_empty());
        let cell = self.cell(self.head);
        self.head = self.head.wrapping_add(1);
        self.cells[cell].take()
    }

    /// The newest.
    pub(crate) fn pop_back(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        self.tail = self.tail.wrapping_sub(1);
        let cell = self.cell(self.tail);
        self.cells[cell].take()
    }

    /// Moves everything of `other` behind what is here.
    pub(crate) fn append(&mut self, other: &mut Self) {
        while let Some(element) = other.pop_front() {
            self.push_back(element);
        }
    }

    /// The elements, oldest first.
    #[inline]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let indices = (0..self.len()).map(|i| self.cell(self.head.wrapping_add(i)));
        indices.filter_map(|cell| self.cells[cell].as_ref())
    }

    /// The elements where they are, oldest first.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim", test))]
    #[inline]
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let len = self.len();
        let start = self.cell(self.head).min(self.cells.len());
        let (behind, first) = self.cells.split_at_mut(start);
        first.iter_mut().chain(behind).flatten().take(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    #[derive(Clone, Debug)]
    enum Step {
        Back(u8),
        Front(u8),
        PopFront,
        PopBack,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => any::<u8>().prop_map(Step::Back),
            1 => any::<u8>().prop_map(Step::Front),
            2 => Just(Step::PopFront),
            1 => Just(Step::PopBack),
        ];
        prop::collection::vec(step, 0..60)
    }

    proptest! {
        #[test]
        fn it_is_a_queue(capacity in 0..6_usize, steps in steps()) {
            let mut fifo = Fifo::with_capacity(capacity);
            let mut model = VecDeque::new();
            for step in steps {
                match step {
                    Step::Back(n) => {
                        fifo.push_back(n);
                        model.push_back(n);
                    }
                    Step::Front(n) => {
                        fifo.push_front(n);
                        model.push_front(n);
                    }
                    Step::PopFront => prop_assert_eq!(fifo.pop_front(), model.pop_front()),
                    Step::PopBack => prop_assert_eq!(fifo.pop_back(), model.pop_back()),
                }
                prop_assert_eq!(fifo.len(), model.len());
                prop_assert_eq!(fifo.is_empty(), model.is_empty());
                prop_assert_eq!(fifo.front(), model.front());
                prop_assert!(fifo.iter().eq(model.iter()));
                prop_assert!(fifo.iter_mut().eq(model.iter_mut()));
            }
            let mut second = Fifo::default();
            second.append(&mut fifo);
            prop_assert!(second.iter_mut().eq(model.iter_mut()));
        }
    }
}
