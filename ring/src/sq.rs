//! The two ends of the submission queue: [`SqProducer`] and [`SqConsumer`].

use crate::cq::CqConsumer;
use crate::credits::{Class, CreditTaker};
use crate::entry::{Opcode, Sqe};
use crate::frame::Frame;
use crate::queue::{Consumer, Front, Producer, debug_by_queue};
use crate::regions::Regions;
use core::fmt;
use core::mem::ManuallyDrop;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// Why the ring would not take an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushError {
    /// The SQ is full; the poller has not come round yet.
    SqFull,
    /// As many entries of this class are in flight as the ring has credits.
    NoCredit,
    /// The frame is of a pool that the ring does not know.
    ForeignPool,
}

/// The caller's end of the SQ.
pub struct SqProducer {
    sq: Producer<Sqe>,
    credits: CreditTaker,
}

/// The poller's end of the SQ.
pub struct SqConsumer {
    sq: Consumer<Sqe>,
}

assert_impl_all!(SqProducer: Send);
assert_impl_all!(SqConsumer: Send);
assert_not_impl_any!(SqProducer: Sync, Clone);
assert_not_impl_any!(SqConsumer: Sync, Clone);

/// What the poller took from the SQ.
#[derive(Debug)]
pub enum Submission {
    /// A frame to fill or to send.
    Packet {
        /// Which of the two.
        class: Class,
        /// The caller's number.
        user_data: u64,
        /// Where the packet goes, or the packet.
        frame: Frame,
    },
    /// Entries to complete now.
    Cancel {
        /// The caller's number for the cancel itself.
        user_data: u64,
        /// Whose entries; `None`: everybody's.
        target: Option<u64>,
    },
}

impl SqProducer {
    pub(crate) fn new(sq: Producer<Sqe>, credits: CreditTaker) -> Self {
        Self { sq, credits }
    }

    /// Whether an entry of `class` would be taken now.
    #[inline]
    pub fn check(&self, class: Class) -> Result<(), PushError> {
        if !self.credits.has(class) {
            return Err(PushError::NoCredit);
        }
        if !self.sq.has_space() {
            return Err(PushError::SqFull);
        }
        Ok(())
    }

    /// Writes a read or write entry; the poller sees it after [`publish`](Self::publish). A refusal
    /// gives the frame back.
    #[inline(always)]
    pub fn push(
        &self,
        class: Class,
        frame: Frame,
        user_data: u64,
    ) -> Result<(), (PushError, Frame)> {
        let opcode = match class {
            Class::Read => Opcode::Read,
            _ => Opcode::Write,
        };
        if !self.credits.has(class) {
            return Err((PushError::NoCredit, frame));
        }
        let Some(region) = self.sq.regions().find(&frame) else {
            // A full SQ is the first reason, as in `check`.
            let full = !self.sq.has_space();
            return Err((if full { PushError::SqFull } else { PushError::ForeignPool }, frame));
        };
        let (pool, range) = (frame.pool_ptr(), frame.into_raw());
        if !self.sq.push(Sqe::packet(opcode, region, range, user_data)) {
            // SAFETY: `into_raw` gave the slot up and no entry was written, so it is in no other place
            // ("one place per slot"); pool and range are the frame's.
            return Err((PushError::SqFull, unsafe { Frame::from_raw(pool, range) }));
        }
        self.credits.take(class);
        Ok(())
    }

    /// Writes a cancel entry for all entries of `target`, or for all (`None`).
    pub fn push_cancel(&self, target: Option<u64>, user_data: u64) -> Result<(), PushError> {
        if !self.credits.has(Class::Cancel) {
            return Err(PushError::NoCredit);
        }
        let opcode = if target.is_some() { Opcode::Cancel } else { Opcode::CancelAll };
        if !self.sq.push(Sqe::cancel(opcode, target.unwrap_or(0), user_data)) {
            return Err(PushError::SqFull);
        }
        self.credits.take(Class::Cancel);
        Ok(())
    }

    /// The commit point: everything pushed is the poller's from here. Returns whether there was
    /// anything.
    #[inline]
    pub fn publish(&self) -> bool {
        // It is called after a push, so nothing is asked: whoever ignores the answer pays for none.
        let anything = self.sq.has_unpublished();
        self.sq.store_tail();
        anything
    }

    /// As [`publish`](Self::publish), but only when the entries fill cache lines to their ends: for a
    /// run of entries, whose last the caller publishes in any case.
    #[inline]
    pub fn publish_lines(&self) {
        self.sq.publish_lines();
    }

    /// A loop over `cq_consumer`'s completions begins. The more entries are on their way, the more are published
    /// together by [`publish_lines`](Self::publish_lines).
    #[inline]
    pub fn begin_run(&self, cq_consumer: &CqConsumer) {
        self.sq.begin_run(cq_consumer.head());
    }

    /// Credits of `class` to be had now; reaping brings more.
    pub fn available(&self, class: Class) -> u32 {
        self.credits.available(class)
    }

    /// Credits of `class` in all.
    pub fn depth(&self, class: Class) -> u32 {
        self.credits.depth(class)
    }

    /// The ring's pools.
    pub fn regions(&self) -> &Regions {
        self.sq.regions()
    }
}

impl SqConsumer {
    pub(crate) fn new(sq: Consumer<Sqe>) -> Self {
        Self { sq }
    }

    /// Submissions that wait, after a look at the queue.
    #[inline]
    pub fn ready(&mut self) -> u32 {
        self.sq.refresh()
    }

    /// Asks for the submissions that [`ready`](Self::ready) saw, all together: for who takes what
    /// another processor has written. A hint, which changes nothing but time.
    #[inline]
    pub fn prefetch(&self) {
        self.sq.prefetch();
    }

    /// How many of the submissions that [`ready`](Self::ready) saw are left.
    #[inline]
    pub fn known(&self) -> u32 {
        self.sq.known()
    }

    /// The next submission among those, to be opened or left; `None` also before a cancel, which
    /// [`pop`](Self::pop) takes.
    #[inline(always)]
    pub fn front(&mut self) -> Option<SqeRef<'_>> {
        let front = self.sq.front()?;
        front.peek(Sqe::is_packet).then_some(SqeRef(front))
    }

    /// Makes room in the SQ for as many submissions as parcels were opened, which until then still count
    /// as there: one store for all of them.
    #[inline]
    pub fn retire(&mut self) {
        self.sq.retire();
    }

    /// How many of those submissions, from the next on and up to `most`, are packets of `class` of which
    /// `like` says so.
    #[inline(always)]
    pub fn leading(&self, class: Class, most: u32, mut like: impl FnMut(&[u8]) -> bool) -> u32 {
        self.sq.leading(most, |sqe, regions| {
            // SAFETY: the entry stays where it is and so does its slot: what is made here is only looked
            // at, and not dropped. `SqProducer::push` placed the entry by a frame of these regions.
            let packet = || ManuallyDrop::new(unsafe { regions.frame_of(sqe) });
            sqe.is_packet() && class_of(sqe) == class && like(&packet())
        })
    }

    /// The next submission among those that [`ready`](Self::ready) saw.
    #[inline]
    pub fn pop(&mut self) -> Option<Submission> {
        self.sq.pop(|sqe, regions| {
            let user_data = sqe.user_data();
            // SAFETY: the entry was taken by `pop`, which yields each once; `SqProducer::push` placed
            // it by a frame of these regions.
            match unsafe { regions.frame(&sqe) } {
                Some(frame) => Submission::Packet { class: class_of(&sqe), user_data, frame },
                None => {
                    let target = (sqe.opcode() == Opcode::Cancel).then(|| sqe.target());
                    Submission::Cancel { user_data, target }
                }
            }
        })
    }
}

/// A packet's submission, still in its queue's memory: whoever opens it copies it once, to where it is to
/// be. Dropped unopened, it stays the queue's next.
pub struct SqeRef<'a>(Front<'a, Sqe>);

impl fmt::Debug for SqeRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.peek(|sqe| f.debug_tuple("SqeRef").field(sqe).finish())
    }
}

impl SqeRef<'_> {
    /// Whether it is to be filled or to be sent.
    #[inline(always)]
    pub fn class(&self) -> Class {
        self.0.peek(class_of)
    }

    /// The frame, and the caller's number.
    #[inline(always)]
    pub fn take(self) -> (Frame, u64) {
        self.0.take(|sqe, regions| {
            // SAFETY: `take` gives each entry once. `SqProducer::push` placed it by a frame of these
            // regions, and `front` has seen that it is a packet's.
            (unsafe { regions.frame_of(sqe) }, sqe.user_data())
        })
    }
}

#[inline(always)]
fn class_of(sqe: &Sqe) -> Class {
    if sqe.opcode() == Opcode::Read { Class::Read } else { Class::Write }
}

debug_by_queue!(SqProducer.sq, SqConsumer.sq);
