//! A queue whose elements are made in their place.
//!
//! `VecDeque::push_back` takes its element by value, so that a slot is put together on the stack first
//! and then copied: a wide load behind narrow stores, for which the processor waits some fifteen cycles.

use std::fmt;
use std::mem::MaybeUninit;

/// First in, first out. Grows when it is full, which a ring's lists never are: their size is the
/// ring's depth.
///
/// Invariant: exactly the cells `head..tail` hold an element, and those are at most all.
pub(crate) struct Fifo<T> {
    /// A power of two, or none.
    cells: Box<[MaybeUninit<T>]>,
    /// Where the oldest is, and where the next comes. Free-running; a cell is found by masking.
    head: usize,
    tail: usize,
}

impl<T> Default for Fifo<T> {
    fn default() -> Self {
        Self::with_capacity(0)
    }
}

impl<T> fmt::Debug for Fifo<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fifo").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl<T> Drop for Fifo<T> {
    fn drop(&mut self) {
        while self.pop_front().is_some() {}
    }
}

impl<T> Fifo<T> {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        let capacity = if capacity == 0 { 0 } else { capacity.next_power_of_two() };
        Self { cells: Box::new_uninit_slice(capacity), head: 0, tail: 0 }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.tail.wrapping_sub(self.head)
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.tail == self.head
    }

    #[inline]
    fn cell(&self, index: usize) -> usize {
        index & self.cells.len().wrapping_sub(1)
    }

    /// The element at `index`, taken out.
    ///
    /// # Safety
    ///
    /// There was one until just now: the caller has moved `head` or `tail` past it, and has left none there
    /// before.
    #[inline(always)]
    unsafe fn take(&self, index: usize) -> T {
        // SAFETY: there is a cell, as something was in it; masking by a power of two finds it, and the
        // caller says that it is full and will not be read again.
        unsafe { self.cells.get_unchecked(self.cell(index)).assume_init_read() }
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
        // SAFETY: there is room, so there are cells; masking by a power of two finds one of them.
        unsafe { self.cells.get_unchecked_mut(cell) }.write(make());
        self.tail = self.tail.wrapping_add(1);
    }

    #[inline]
    pub(crate) fn push_back(&mut self, element: T) {
        self.push_back_with(|| element);
    }

    pub(crate) fn push_front(&mut self, element: T) {
        self.make_room();
        let cell = self.cell(self.head.wrapping_sub(1));
        self.cells[cell].write(element);
        self.head = self.head.wrapping_sub(1);
    }

    /// The oldest.
    #[inline(always)]
    pub(crate) fn pop_front(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        let index = self.head;
        self.head = index.wrapping_add(1);
        // SAFETY: it was in `head..tail`, and is not any more.
        Some(unsafe { self.take(index) })
    }

    /// The newest.
    pub(crate) fn pop_back(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        self.tail = self.tail.wrapping_sub(1);
        // SAFETY: as in `pop_front`.
        Some(unsafe { self.take(self.tail) })
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
        (0..self.len()).map(|i| {
            let cell = self.cell(self.head.wrapping_add(i));
            // SAFETY: it is in `head..tail`.
            unsafe { self.cells[cell].assume_init_ref() }
        })
    }

    /// The elements where they are, oldest first.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim", test))]
    #[inline]
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let len = self.len();
        let start = self.cell(self.head).min(self.cells.len());
        let (behind, first) = self.cells.split_at_mut(start);
        let cells = first.iter_mut().chain(behind).take(len);
        // SAFETY: so many from `head` on are `head..tail`.
        cells.map(|cell| unsafe { cell.assume_init_mut() })
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

    /// Each element is dropped once, wherever it is.
    #[test]
    fn it_drops_what_is_left() {
        let element = std::sync::Arc::new(());
        let mut fifo = Fifo::with_capacity(2);
        for _ in 0..5 {
            fifo.push_back(element.clone());
            drop(fifo.pop_front());
            fifo.push_front(element.clone());
        }
        assert_eq!(std::sync::Arc::strong_count(&element), 6);
        drop(fifo.pop_back());
        assert_eq!(std::sync::Arc::strong_count(&element), 5);
        drop(fifo);
        assert_eq!(std::sync::Arc::strong_count(&element), 1);
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
                prop_assert!(fifo.iter().eq(model.iter()));
                prop_assert!(fifo.iter_mut().eq(model.iter_mut()));
            }
            let mut second = Fifo::default();
            second.append(&mut fifo);
            prop_assert!(second.iter_mut().eq(model.iter_mut()));
        }
    }
}
