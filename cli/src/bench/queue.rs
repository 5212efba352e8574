//! [`Queue`]: numbers from one thread to another, and nothing else.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A value on cache lines of its own: two, because processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Line<T>(pub(crate) T);

/// A queue of a fixed number of numbers, a power of two. There are never more numbers than places, and each
/// is in one place: so whoever has a number to put has room for it, and only one index is needed.
#[derive(Debug)]
pub(crate) struct Queue {
    cells: Box<[AtomicU64]>,
    /// How many numbers were put in all.
    published: Line<AtomicUsize>,
}

/// The end that puts numbers in.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    queue: &'a Queue,
    next: usize,
}

/// The end that takes numbers out.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    queue: &'a Queue,
    next: usize,
}

impl Queue {
    /// # Panics
    ///
    /// If the number of places is no power of two.
    pub(crate) fn new(places: usize) -> Self {
        assert!(places.is_power_of_two());
        let cells = (0..places).map(|_| AtomicU64::new(0)).collect();
        Self { cells, published: Line::default() }
    }

    /// Both ends. What was put in before is still there.
    pub(crate) fn ends(&mut self, taken: usize) -> (Writer<'_>, Reader<'_>) {
        let next = *self.published.0.get_mut();
        let queue = &*self;
        (Writer { queue, next }, Reader { queue, next: taken })
    }

    #[inline]
    fn cell(&self, number: usize) -> &AtomicU64 {
        &self.cells[number & (self.cells.len() - 1)]
    }
}

impl Writer<'_> {
    /// Puts a number in. The reader does not see it before [`publish`](Self::publish).
    #[inline]
    pub(crate) fn put(&mut self, number: u64) {
        // Relaxed: `publish` hands it over. The reader has taken what was in the cell: the number that is put
        // in came back from it, through a queue that orders what it did before.
        self.queue.cell(self.next).store(number, Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
    }

    /// Hands over what was put in.
    #[inline]
    pub(crate) fn publish(&self) {
        // Release: pairs with the Acquire in `Reader::ready`.
        self.queue.published.0.store(self.next, Ordering::Release);
    }
}

impl Reader<'_> {
    /// How many numbers can be taken.
    #[inline]
    pub(crate) fn ready(&self) -> usize {
        // Acquire: pairs with the Release in `Writer::publish`.
        self.queue.published.0.load(Ordering::Acquire).wrapping_sub(self.next)
    }

    /// Takes the next number, which must be [ready](Self::ready).
    #[inline]
    pub(crate) fn take(&mut self) -> u64 {
        // Relaxed: `ready` has acquired it.
        let number = self.queue.cell(self.next).load(Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
        number
    }

    /// How many numbers were taken in all.
    pub(crate) fn taken(&self) -> usize {
        self.next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Sixteen numbers go round between two threads. Each side looks at what it takes.
    #[test]
    fn numbers_arrive_whole_and_in_order() {
        const ROUNDS: u64 = 20_000;
        let (mut there, mut back) = (Queue::new(16), Queue::new(16));
        let (mut send, mut receive) = there.ends(0);
        let (mut give_back, mut come_back) = back.ends(0);
        thread::scope(|scope| {
            scope.spawn(move || {
                for number in 0..ROUNDS {
                    while receive.ready() == 0 {
                        thread::yield_now();
                    }
                    assert_eq!(receive.take(), number);
                    give_back.put(number);
                    give_back.publish();
                }
            });
            for number in 0..ROUNDS {
                if number >= 16 {
                    while come_back.ready() == 0 {
                        thread::yield_now();
                    }
                    assert_eq!(come_back.take(), number - 16);
                }
                send.put(number);
                send.publish();
            }
        });
    }

    #[test]
    fn what_is_put_is_not_there_before_it_is_published() {
        let mut queue = Queue::new(2);
        let (mut writer, mut reader) = queue.ends(0);
        writer.put(7);
        assert_eq!(reader.ready(), 0);
        writer.publish();
        assert_eq!((reader.ready(), reader.take(), reader.ready()), (1, 7, 0));
        let taken = reader.taken();
        let (_, reader) = queue.ends(taken);
        assert_eq!(reader.ready(), 0);
    }
}
