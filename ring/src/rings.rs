//! A ring's four halves: the caller's ends of SQ and CQ ([`Submitter`], [`Reaper`]) and the
//! poller's ([`Intake`], [`Outlet`]).
//!
//! This is where a [`Frame`] becomes a queue entry and a queue entry becomes a frame. Each half is
//! `Send` and not `Sync`. All but the [`Submitter`] work through `&mut self`; that one is reached from two
//! places of its thread, by who submits and by who ends a loop in which something was submitted.

use crate::credits::{Class, Giver, Taker, credits};
use crate::entry::{Cqe, Opcode, Outcome, Sqe};
use crate::frame::Frame;
use crate::limits::DEPTH_MAX;
use crate::queue::{Consumer, Front, Producer, Published, queue};
use crate::regions::Regions;
use core::fmt;
use core::mem::ManuallyDrop;
use static_assertions::{assert_impl_all, assert_not_impl_any};

/// How big a ring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Reads that may be in flight.
    pub read: u32,
    /// Writes that may be in flight.
    pub write: u32,
    /// Cancel requests that may be in flight.
    pub cancel: u32,
    /// Entries of the SQ, a power of two. Smaller than the sum of the others is allowed: then a
    /// submit can find the SQ full.
    pub sq: u32,
}

impl Depths {
    /// A ring whose SQ has room for every credit.
    pub fn new(read: u32, write: u32, cancel: u32) -> Self {
        let sum = read.saturating_add(write).saturating_add(cancel).min(DEPTH_MAX);
        Self { read, write, cancel, sq: sum.next_power_of_two() }
    }

    /// Entries of the CQ: at least one for every credit.
    fn cq(&self) -> u32 {
        let sum = u64::from(self.read) + u64::from(self.write) + u64::from(self.cancel);
        assert!(sum <= u64::from(DEPTH_MAX), "a ring of more than {DEPTH_MAX} credits");
        (sum as u32).next_power_of_two()
    }
}

/// The four halves of a ring with `depths` over `regions`. Indices begin at `start`: 0, or any
/// other number to exercise the wrap.
///
/// # Panics
///
/// If the SQ's size is not a power of two or the credits' sum is above [`DEPTH_MAX`].
pub fn rings(depths: Depths, regions: Regions, start: u32) -> (Submitter, Reaper, Intake, Outlet) {
    let (sq_in, sq_out) = queue(depths.sq, regions.clone(), start);
    let (cq_in, cq_out) = queue(depths.cq(), regions, start);
    let (taker, giver) = credits([depths.read, depths.write, depths.cancel]);
    let submitted = sq_in.watch();
    (
        Submitter { sq: sq_in, credits: taker },
        Reaper { cq: cq_out, credits: giver, submitted },
        Intake { sq: sq_out },
        Outlet { cq: cq_in },
    )
}

/// Why the ring would not take an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The SQ is full; the poller has not come round yet.
    SqFull,
    /// As many entries of this class are in flight as the ring has credits.
    NoCredit,
    /// The frame is of a pool that the ring does not know.
    ForeignPool,
}

/// The caller's end of the SQ.
pub struct Submitter {
    sq: Producer<Sqe>,
    credits: Taker,
}

/// The caller's end of the CQ.
pub struct Reaper {
    cq: Consumer<Cqe>,
    credits: Giver,
    submitted: Published<Sqe>,
}

/// The poller's end of the SQ.
pub struct Intake {
    sq: Consumer<Sqe>,
}

/// The poller's end of the CQ.
pub struct Outlet {
    cq: Producer<Cqe>,
}

assert_impl_all!(Submitter: Send);
assert_impl_all!(Reaper: Send);
assert_impl_all!(Intake: Send);
assert_impl_all!(Outlet: Send);
assert_not_impl_any!(Submitter: Sync, Clone);
assert_not_impl_any!(Reaper: Sync, Clone);
assert_not_impl_any!(Intake: Sync, Clone);
assert_not_impl_any!(Outlet: Sync, Clone);

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

/// What the caller took from the CQ.
#[derive(Debug)]
pub struct Reaped {
    /// The caller's number.
    pub user_data: u64,
    /// What was asked.
    pub opcode: Opcode,
    /// How it ended.
    pub outcome: Outcome,
    /// Of a cancel, how many entries it found; else the packet's length in bytes.
    pub len: u32,
    /// The frame, on success and on failure; a cancel has none.
    pub frame: Option<Frame>,
}

impl Submitter {
    /// Whether an entry of `class` would be taken now.
    #[inline]
    pub fn check(&self, class: Class) -> Result<(), Refusal> {
        if !self.credits.any(class) {
            return Err(Refusal::NoCredit);
        }
        if !self.sq.has_room() {
            return Err(Refusal::SqFull);
        }
        Ok(())
    }

    /// Writes a read or write entry; the poller sees it after [`publish`](Self::publish). A refusal
    /// gives the frame back.
    #[inline(always)]
    pub fn push(&self, class: Class, frame: Frame, user_data: u64) -> Result<(), (Refusal, Frame)> {
        let opcode = match class {
            Class::Read => Opcode::Read,
            _ => Opcode::Write,
        };
        if !self.credits.any(class) {
            return Err((Refusal::NoCredit, frame));
        }
        let Some(vacant) = self.sq.vacant() else { return Err((Refusal::SqFull, frame)) };
        let Some(region) = vacant.regions().find(&frame) else {
            return Err((Refusal::ForeignPool, frame));
        };
        self.credits.take(class);
        vacant.write(Sqe::packet(opcode, region, frame.into_raw(), user_data));
        Ok(())
    }

    /// Writes a cancel entry for all entries of `target`, or for all (`None`).
    pub fn push_cancel(&self, target: Option<u64>, user_data: u64) -> Result<(), Refusal> {
        self.check(Class::Cancel)?;
        let opcode = if target.is_some() { Opcode::Cancel } else { Opcode::CancelAll };
        let vacant = self.sq.vacant().ok_or(Refusal::SqFull)?;
        self.credits.take(Class::Cancel);
        vacant.write(Sqe::cancel(opcode, target.unwrap_or(0), user_data));
        Ok(())
    }

    /// The commit point: everything pushed is the poller's from here. Returns whether there was
    /// anything.
    #[inline]
    pub fn publish(&self) -> bool {
        // It is called after a push, so nothing is asked: whoever ignores the answer pays for none.
        let anything = self.sq.is_behind();
        self.sq.publish_anyway();
        anything
    }

    /// As [`publish`](Self::publish), but only when the entries fill cache lines to their ends: for a
    /// run of entries, whose last the caller publishes in any case.
    #[inline]
    pub fn publish_lines(&self) {
        self.sq.publish_lines();
    }

    /// A loop over `reaper`'s completions begins. The more entries are on their way, the more are published
    /// together by [`publish_lines`](Self::publish_lines).
    #[inline]
    pub fn begin_run(&self, reaper: &Reaper) {
        self.sq.begin_run(reaper.cq.head());
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

impl Reaper {
    /// Completions that wait, after a look at the queue.
    #[inline]
    pub fn ready(&mut self) -> u32 {
        self.cq.refresh()
    }

    /// Asks for the completions that [`ready`](Self::ready) saw, all together: for who reaps what
    /// another processor has written. A hint, which changes nothing but time.
    #[inline]
    pub fn prefetch(&self) {
        self.cq.prefetch();
    }

    /// Submissions not reaped yet. What another thread submits meanwhile may be missing.
    #[inline]
    pub fn in_flight(&self) -> u32 {
        self.submitted.count().wrapping_sub(self.cq.head())
    }

    /// The index that the CQ's tail reaches when `n` completions wait.
    pub fn index_of(&self, n: u32) -> u32 {
        self.cq.head().wrapping_add(n)
    }

    /// The next completion among those that [`ready`](Self::ready) saw. The entry is retired and
    /// its credit returned before the frame exists.
    #[inline]
    pub fn pop(&mut self) -> Option<Reaped> {
        let Self { cq, credits, .. } = self;
        cq.pop(|cqe, regions| {
            credits.give(cqe.opcode());
            // SAFETY: the entry was taken by `pop`, which yields each once; the poller's `push`
            // placed it by a frame of these regions.
            let frame = unsafe { regions.frame(&cqe) };
            Reaped {
                user_data: cqe.user_data(),
                opcode: cqe.opcode(),
                outcome: cqe.outcome(),
                len: cqe.len(),
                frame,
            }
        })
    }

    /// How many of the completions that `ready` saw are left.
    #[inline]
    pub fn known(&self) -> u32 {
        self.cq.known()
    }

    /// The ring's pools.
    pub fn regions(&self) -> &Regions {
        self.cq.regions()
    }
}

impl Intake {
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
    pub fn front(&mut self) -> Option<Parcel<'_>> {
        let front = self.sq.front()?;
        front.look(Sqe::is_packet).then_some(Parcel(front))
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
            // at, and not dropped. `Submitter::push` placed the entry by a frame of these regions.
            let packet = || ManuallyDrop::new(unsafe { regions.frame_of(sqe) });
            sqe.is_packet() && class_of(sqe) == class && like(&packet())
        })
    }

    /// The next submission among those that [`ready`](Self::ready) saw.
    #[inline]
    pub fn pop(&mut self) -> Option<Submission> {
        self.sq.pop(|sqe, regions| {
            let user_data = sqe.user_data();
            // SAFETY: the entry was taken by `pop`, which yields each once; `Submitter::push` placed
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
pub struct Parcel<'a>(Front<'a, Sqe>);

impl fmt::Debug for Parcel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.look(|sqe| f.debug_tuple("Parcel").field(sqe).finish())
    }
}

impl Parcel<'_> {
    /// Whether it is to be filled or to be sent.
    #[inline(always)]
    pub fn class(&self) -> Class {
        self.0.look(class_of)
    }

    /// The frame, and the caller's number.
    #[inline(always)]
    pub fn open(self) -> (Frame, u64) {
        self.0.take(|sqe, regions| {
            // SAFETY: `take` gives each entry once. `Submitter::push` placed it by a frame of these
            // regions, and `front` has seen that it is a packet's.
            (unsafe { regions.frame_of(sqe) }, sqe.user_data())
        })
    }
}

#[inline(always)]
fn class_of(sqe: &Sqe) -> Class {
    if sqe.opcode() == Opcode::Read { Class::Read } else { Class::Write }
}

impl Outlet {
    /// Writes the completion of a read or write; seen after [`publish`](Self::publish).
    ///
    /// # Panics
    ///
    /// If the CQ is full or the frame foreign: each completion answers one submission, and the
    /// credits make room for it.
    #[inline(always)]
    pub fn push(&mut self, class: Class, frame: Frame, user_data: u64, outcome: Outcome) {
        let opcode = match class {
            Class::Read => Opcode::Read,
            _ => Opcode::Write,
        };
        let region = self.cq.regions().find(&frame);
        // Taken apart first: with a frame in hand that a panic would have to drop, the compiler keeps
        // it in memory instead of in registers.
        let (pool, place) = (frame.header(), frame.into_raw());
        if let Some(region) = region
            && let Some(vacant) = self.cq.vacant()
        {
            return vacant.write(Cqe::packet(opcode, region, place, user_data, outcome));
        }
        // SAFETY: the frame was given up above, and became nothing else.
        drop(unsafe { Frame::from_raw(pool, place) });
        misused();
    }

    /// Writes the completion of a cancel that found `matched` entries.
    pub fn push_cancel(&mut self, all: bool, matched: u32, user_data: u64) {
        let opcode = if all { Opcode::CancelAll } else { Opcode::Cancel };
        let vacant = self.cq.vacant().expect("no more completions than credits");
        vacant.write(Cqe::cancel(opcode, matched, user_data));
    }

    /// Shows everything pushed to the reaper, with one store. Returns whether there was anything.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.cq.publish()
    }

    /// Completions shown and not reaped. A snapshot.
    #[inline]
    pub fn backlog(&self) -> u32 {
        self.cq.backlog()
    }

    /// The CQ's tail: the number of completions ever shown, plus the start index.
    #[inline]
    pub fn index(&self) -> u32 {
        self.cq.published()
    }
}

#[cold]
fn misused() -> ! {
    panic!("more completions than credits, or a frame that is not the ring's");
}

macro_rules! debug_by_queue {
    ($($half:ident.$queue:ident),*) => {$(
        impl fmt::Debug for $half {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_tuple(stringify!($half)).field(&self.$queue).finish()
            }
        }
    )*};
}
debug_by_queue!(Submitter.sq, Reaper.cq, Intake.sq, Outlet.cq);
