//! A queue whose elements are constructed in place.
//!
//! `VecDeque::push_back` takes its element by value. The compiler builds a posted slot on the stack
//! with narrow stores, and copies it into the queue with wide loads. The processor waits some
//! fifteen cycles for such a load.

use std::fmt;
use std::mem::MaybeUninit;

/// A queue (first in, first out). It grows when it is full. A ring's lists never grow, because
/// their capacity is the ring's depth.
///
/// Invariant (full cells): exactly the cells `head..tail` hold an element, and there are at most
/// `cells.len()` of them.
pub(crate) struct Fifo<T> {
    /// The number of cells is a power of two, or 0.
    cells: Box<[MaybeUninit<T>]>,
    /// The index of the oldest element, and the index at which the next is pushed. Indices run
    /// freely; masking one gives its cell.
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

    /// Moves the element out of the cell of `index`.
    ///
    /// # Safety
    ///
    /// The cell must hold an element, and `index` must not be in `head..tail` any more: the caller
    /// has just moved `head` or `tail` past it.
    #[inline(always)]
    unsafe fn take(&self, index: usize) -> T {
        // SAFETY: the caller promises that the cell holds an element, so there are cells, and
        // masking by their number, a power of two, gives one of them. The element is not read
        // again, because by the caller's promise `index` has left `head..tail`.
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
        // Each element keeps its index.
        (larger.head, larger.tail) = (self.head, self.head);
        while let Some(element) = self.pop_front() {
            larger.push_back(element);
        }
        *self = larger;
    }

    /// Pushes the element that `make` returns, behind all others. It is constructed in its cell.
    #[inline]
    pub(crate) fn push_back_with(&mut self, make: impl FnOnce() -> T) {
        self.make_room();
        let cell = self.cell(self.tail);
        // SAFETY: `make_room` has left at least one cell free, so there are cells, and masking by
        // their number, a power of two, gives one of them.
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

    /// Removes and returns the oldest element.
    #[inline(always)]
    pub(crate) fn pop_front(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        let index = self.head;
        self.head = index.wrapping_add(1);
        // SAFETY: `index` was in `head..tail`, so its cell holds an element (invariant: full
        // cells), and `head` has just moved past it.
        Some(unsafe { self.take(index) })
    }

    /// Removes and returns the newest element.
    pub(crate) fn pop_back(&mut self) -> Option<T> {
        if self.is_empty() {
            return None;
        }
        self.tail = self.tail.wrapping_sub(1);
        // SAFETY: this index was in `head..tail`, so its cell holds an element (invariant: full
        // cells), and `tail` has just moved in front of it.
        Some(unsafe { self.take(self.tail) })
    }

    /// Moves all elements of `other` to the end of this queue.
    pub(crate) fn append(&mut self, other: &mut Self) {
        while let Some(element) = other.pop_front() {
            self.push_back(element);
        }
    }

    /// Returns the elements, oldest first.
    #[inline]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        (0..self.len()).map(|i| {
            let cell = self.cell(self.head.wrapping_add(i));
            // SAFETY: the index is in `head..tail`, so its cell holds an element (invariant: full
            // cells).
            unsafe { self.cells[cell].assume_init_ref() }
        })
    }

    /// Returns the elements for changing them in place, oldest first.
    #[inline]
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        let len = self.len();
        let start = self.cell(self.head).min(self.cells.len());
        let (behind, first) = self.cells.split_at_mut(start);
        let cells = first.iter_mut().chain(behind).take(len);
        // SAFETY: the iterator yields the first `len` cells from that of `head` on, with the wrap.
        // They are the cells of `head..tail`, which hold elements (invariant: full cells).
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

    /// Goal: each element is dropped once, wherever its cell is. Method: count references to one
    /// element that is pushed at both ends and popped.
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
