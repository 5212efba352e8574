//! Blocks of memory for flows that need some now: a bounded pool, and a queue of bytes in a block.
//!
//! An idle flow has no block. What is given back is kept for the next flow. No port can have all of
//! them.

use std::io::{IoSlice, IoSliceMut};

use crate::output::Port;

/// A bounded pool of blocks of one size.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Vec<Box<[u8]>>,
    made: usize,
    block: usize,
    limit: usize,
    /// How many each port has.
    held: Vec<usize>,
}

impl Pool {
    /// A pool of at most `limit` blocks of `block` bytes. None exists yet.
    pub(crate) fn new(block: usize, limit: usize) -> Self {
        Self { free: Vec::with_capacity(limit), made: 0, block, limit, held: Vec::new() }
    }

    /// Makes room for what is counted for a port. The only call that allocates for a port.
    pub(crate) fn grow(&mut self, port: Port) {
        let len = port.0 as usize + 1;
        if len > self.held.len() {
            self.held.resize(len, 0);
        }
    }

    /// Whether a port's flow would get a queue now.
    pub(crate) fn has_block(&self, port: Port) -> bool {
        self.held[port.0 as usize] < (self.limit / 4 * 3).max(1)
            && (self.made < self.limit || !self.free.is_empty())
    }

    /// An empty queue of bytes for a port's flow, or `None` if all blocks are in use, or three quarters
    /// of them by this port.
    pub(crate) fn take(&mut self, port: Port) -> Option<ByteQueue> {
        if !self.has_block(port) {
            return None;
        }
        let block = self.free.pop().unwrap_or_else(|| {
            self.made += 1;
            vec![0; self.block].into()
        });
        self.held[port.0 as usize] += 1;
        Some(ByteQueue { block, head: 0, len: 0, port })
    }

    /// Takes a queue back, whatever is in it.
    pub(crate) fn give_back(&mut self, queue: ByteQueue) {
        self.held[queue.port.0 as usize] -= 1;
        self.free.push(queue.block);
    }

    /// The bytes of a block.
    pub(crate) fn block_len(&self) -> usize {
        self.block
    }

    /// How many blocks are in use.
    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.made - self.free.len()
    }
}

/// A queue of bytes in one block, used as a ring.
#[derive(Debug)]
pub(crate) struct ByteQueue {
    block: Box<[u8]>,
    head: u32,
    len: u32,
    /// Whose it is.
    port: Port,
}

impl ByteQueue {
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes, in order.
    pub(crate) fn bytes(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.halves(0);
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// The bytes from `offset` on, as two slices.
    fn halves(&self, offset: usize) -> (&[u8], &[u8]) {
        let len = self.len().saturating_sub(offset);
        let at = (self.head as usize + offset.min(self.len())) % self.block.len();
        let first = len.min(self.block.len() - at);
        (&self.block[at..at + first], &self.block[..len - first])
    }

    /// The space behind the bytes. Call [`added`](Self::added) when it has been filled.
    pub(crate) fn space(&mut self) -> [IoSliceMut<'_>; 2] {
        let space = self.block.len() - self.len();
        let at = (self.head as usize + self.len()) % self.block.len();
        let first = space.min(self.block.len() - at);
        let (low, high) = self.block.split_at_mut(at);
        [IoSliceMut::new(&mut high[..first]), IoSliceMut::new(&mut low[..space - first])]
    }

    /// Says that so many bytes were written to [`space`](Self::space).
    pub(crate) fn added(&mut self, len: usize) {
        self.len += len as u32;
        debug_assert!(self.len() <= self.block.len(), "more was added than there was space for");
    }

    /// Appends as many bytes as fit, and returns how many these are.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> usize {
        let mut all = 0;
        for mut space in self.space() {
            let len = space.len().min(bytes.len());
            space[..len].copy_from_slice(&bytes[..len]);
            bytes = &bytes[len..];
            all += len;
        }
        self.added(all);
        all
    }

    /// Copies bytes from `offset` on, as many as there are or fit, and returns how many these are.
    pub(crate) fn copy(&self, offset: usize, into: &mut [IoSliceMut<'_>]) -> usize {
        let (mut first, mut second) = self.halves(offset);
        let mut all = 0;
        for slice in into {
            let mut to = &mut slice[..];
            while !to.is_empty() {
                if first.is_empty() {
                    (first, second) = (second, &[]);
                }
                let len = to.len().min(first.len());
                if len == 0 {
                    return all;
                }
                to[..len].copy_from_slice(&first[..len]);
                (to, first) = (&mut to[len..], &first[len..]);
                all += len;
            }
        }
        all
    }

    /// Removes the oldest bytes.
    pub(crate) fn remove(&mut self, len: usize) {
        debug_assert!(len <= self.len(), "fewer bytes are in the queue");
        let len = len.min(self.len());
        self.head = ((self.head as usize + len) % self.block.len()) as u32;
        self.len -= len as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    /// Goal: one port cannot have all blocks, and what it gives back it can have again.
    #[test]
    fn no_port_has_all_blocks() {
        let mut pool = Pool::new(1, 8);
        pool.grow(Port(1));
        let mut hoard: Vec<_> = std::iter::from_fn(|| pool.take(Port(0))).collect();
        assert_eq!(hoard.len(), 6);
        let other: Vec<_> = std::iter::from_fn(|| pool.take(Port(1))).collect();
        assert_eq!(other.len(), 2);
        pool.give_back(hoard.pop().unwrap());
        assert!(pool.take(Port(0)).is_some());
    }

    proptest! {
        /// Goal: a queue of bytes in a ring is a queue of bytes.
        /// Method: the queue beside `VecDeque`, over a small block, so that it wraps often.
        #[test]
        fn a_byte_queue_is_a_queue(steps in prop::collection::vec((0usize..9, 0usize..9, 0usize..9), 1..50)) {
            let mut pool = Pool::new(7, 1);
            pool.grow(Port(2));
            let mut queue = pool.take(Port(2)).unwrap();
            prop_assert!(pool.take(Port(1)).is_none());
            let mut model = VecDeque::new();
            let mut next = 0u8;
            for (add, offset, remove) in steps {
                let bytes: Vec<u8> = (0..add).map(|i| next.wrapping_add(i as u8)).collect();
                let added = queue.push(&bytes);
                prop_assert_eq!(added, add.min(7 - model.len()));
                model.extend(&bytes[..added]);
                next = next.wrapping_add(added as u8);
                let (mut one, mut two) = ([0; 2], [0; 5]);
                let copied = queue.copy(offset, &mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)]);
                let expected: Vec<u8> = model.iter().copied().skip(offset).take(7).collect();
                prop_assert_eq!(&[&one[..], &two].concat()[..copied], &expected[..]);
                let remove = remove.min(model.len());
                queue.remove(remove);
                model.drain(..remove);
                prop_assert_eq!(queue.len(), model.len());
                prop_assert_eq!(queue.bytes().iter().map(|part| part.len()).sum::<usize>(), queue.len());
            }
            pool.give_back(queue);
            prop_assert_eq!(pool.used(), 0);
        }
    }
}
