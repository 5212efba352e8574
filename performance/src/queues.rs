//! The least that a ring can be: a submission and a completion queue of a well-maintained crate,
//! with entries as large as vmring's, which carry numbers of buffers that nothing protects. The
//! difference between a contender with these queues and one without is what queues cost, whoever
//! writes them.

use rtrb::{Consumer, Producer, RingBuffer};

use crate::result::Result;

/// An entry of 32 bytes, like vmring's.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    pub(crate) user_data: u64,
    pub(crate) buffer: u32,
    pub(crate) offset: u32,
    pub(crate) length: u32,
    pub(crate) header: u32,
    pub(crate) kind: u64,
}

/// Both ends of both queues, because one thread drives them, as it drives an inline ring.
pub(crate) struct Queues {
    submit: Producer<Entry>,
    take: Consumer<Entry>,
    complete: Producer<Entry>,
    reap: Consumer<Entry>,
}

impl Queues {
    pub(crate) fn new(depth: usize) -> Self {
        let (submit, take) = RingBuffer::new(depth);
        let (complete, reap) = RingBuffer::new(depth);
        Self { submit, take, complete, reap }
    }

    /// Submits buffers `0..count`.
    pub(crate) fn fill(&mut self, count: u32) -> Result<()> {
        for buffer in 0..count {
            self.submit.push(Entry { buffer, ..Entry::default() })?;
        }
        Ok(())
    }

    /// Reaps up to `most` entries and submits them again, as `each` changes them. Returns their
    /// number.
    #[inline(always)]
    pub(crate) fn turn(&mut self, most: usize, each: impl FnMut(Entry) -> Entry) -> Result<usize> {
        let count = self.reap.slots().min(most);
        let reaped = self.reap.read_chunk(count)?;
        let chunk = self.submit.write_chunk_uninit(count)?;
        Ok(chunk.fill_from_iter(reaped.into_iter().map(each)))
    }

    /// The number of submissions that wait.
    #[inline(always)]
    pub(crate) fn waiting(&self) -> usize {
        self.take.slots()
    }

    /// Takes `count` submissions and completes them, as `each` changes them.
    #[inline(always)]
    pub(crate) fn complete(
        &mut self,
        count: usize,
        each: impl FnMut(Entry) -> Entry,
    ) -> Result<usize> {
        let taken = self.take.read_chunk(count)?;
        let chunk = self.complete.write_chunk_uninit(count)?;
        Ok(chunk.fill_from_iter(taken.into_iter().map(each)))
    }

    /// Takes `count` submissions and puts the numbers of their buffers into a queue.
    #[inline(always)]
    pub(crate) fn pass_on(&mut self, count: usize, to: &mut Producer<u32>) -> Result<()> {
        let taken = self.take.read_chunk(count)?;
        let chunk = to.write_chunk_uninit(count)?;
        chunk.fill_from_iter(taken.into_iter().map(|entry| entry.buffer));
        Ok(())
    }

    /// Completes what was [passed on](Self::pass_on) before: the buffers that come back, with their
    /// lengths. Returns their number.
    #[inline(always)]
    pub(crate) fn complete_from<T>(
        &mut self,
        from: &mut Consumer<T>,
        most: usize,
        each: impl Fn(T) -> (u32, u32),
    ) -> Result<usize> {
        let count = from.slots().min(most);
        let back = from.read_chunk(count)?;
        let chunk = self.complete.write_chunk_uninit(count)?;
        Ok(chunk.fill_from_iter(back.into_iter().map(|one| {
            let (buffer, length) = each(one);
            Entry { buffer, length, ..Entry::default() }
        })))
    }
}
