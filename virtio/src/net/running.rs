//! [`RunningQueue`]: a queue that runs, with what is on its way in it.

use core::ops::BitOrAssign;
use std::sync::Arc;

use crate::event::Event;
use crate::net::interrupt::Interrupt;
use crate::net::stats::Counters;
use crate::net::window::{State, Step, Window};
use crate::queue::{Chain, ChainError, Queue, QueueState, Single};

/// How many chains a queue is asked for at a time, and the most packets for one interrupt at a busy
/// queue. DPDK has the same.
pub(super) const BURST: u16 = 32;

/// How many segments the walk of a chain keeps. A chain can have 1,024 descriptors, and a few of them
/// may cross regions. Longer ones are broken, because nothing honest is like that.
const SEGMENTS_MAX: usize = 2048;

/// What the queues of a device have in common during a poll.
#[derive(Clone, Copy)]
pub(super) struct Context<'d> {
    pub(super) counters: &'d Counters,
    pub(super) interrupt: &'d dyn Interrupt,
}

/// What one turn of a queue has reached.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Turn {
    /// Whether anything was taken, or given back.
    pub(super) moved: bool,
    /// Whether there may be more.
    pub(super) again: bool,
}

impl BitOrAssign for Turn {
    fn bitor_assign(&mut self, other: Self) {
        self.moved |= other.moved;
        self.again |= other.again;
    }
}

/// A queue that runs.
#[derive(Debug)]
pub(super) struct RunningQueue {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) window: Window,
    ended: Ended,
    pub(super) kick: Option<Arc<Event>>,
    /// Whether the driver wants packets of this queue to be served.
    pub(super) enabled: bool,
    /// Whether chains are left in the queue because the ring below takes no more. Then its next
    /// completion is waited for, and not the guest's next kick.
    pub(super) blocked: bool,
    /// Nothing more is taken out of the queue, because what is on its way is to end.
    pub(super) stopping: bool,
    /// The queue does nothing until it is stopped; see [`BrokenQueue`](crate::queue::BrokenQueue).
    pub(super) broken: bool,
}

/// The oldest chains of the window, which have ended one after the other, as most do, and are given back
/// together. There are none between two calls of [`RunningQueue::settle`].
#[derive(Debug, Default)]
struct Ended {
    count: usize,
    /// Their used lengths.
    lens: [u32; BURST as usize],
}

/// What to do with a chain.
pub(super) enum Verdict {
    /// It is in the ring.
    Posted,
    /// It is dropped, and goes back with the used length 0.
    Dropped,
    /// It stays in the queue.
    Later,
}

/// Decides on the chains that a [`RunningQueue`] takes.
pub(super) trait Serve {
    /// How many chains may be posted now. More of them would be [`Verdict::Later`].
    fn room(&mut self) -> u16;

    /// What to do with the usual chain, which has this number in the window.
    fn serve_single(&mut self, single: Single<'_>, number: u32) -> Verdict;

    /// The same for a chain of any shape.
    fn serve(&mut self, chain: Chain<'_>, number: u32) -> Verdict;
}

impl<F: FnMut(Chain<'_>, u32) -> Verdict> Serve for F {
    fn room(&mut self) -> u16 {
        u16::MAX
    }

    fn serve_single(&mut self, single: Single<'_>, number: u32) -> Verdict {
        self(single.chain(), number)
    }

    fn serve(&mut self, chain: Chain<'_>, number: u32) -> Verdict {
        self(chain, number)
    }
}

/// What [`RunningQueue::next`] has found.
pub(super) enum Next<R> {
    /// A chain, and what was made of it.
    Chain(R),
    /// The guest has made nothing more available.
    Nothing,
    /// There are so many broken chains that others have their turn first.
    Later,
}

impl RunningQueue {
    pub(super) fn new(index: u16, queue: Queue, kick: Option<Arc<Event>>, enabled: bool) -> Self {
        let window = Window::new(queue.layout().size);
        let queue = queue.with_segments_max(SEGMENTS_MAX);
        let (blocked, stopping, broken) = (false, false, false);
        let ended = Ended::default();
        Self { index, queue, window, ended, kick, enabled, blocked, stopping, broken }
    }

    /// Takes at most `most` chains out of the queue, and lets `server` decide on each. Returns how many
    /// were taken, broken ones included.
    #[inline(never)]
    pub(super) fn take<S: Serve>(&mut self, cx: Context<'_>, most: u16, server: &mut S) -> u16 {
        // Nothing is behind a chain that is to be given up. The ring gives back what is before it.
        self.blocked = self.window.has_cancelled();
        if self.broken || self.stopping || self.blocked {
            return 0;
        }
        let mut taken = 0;
        // A burst may begin with what is left of the one before, and go on with what is new.
        while taken < most {
            let count = self.fetch(cx, most - taken);
            if count == 0 {
                break;
            }
            // If there is no room, one chain is tried all the same: the ring may be closed.
            let count = count.min(server.room().max(1));
            let Self { queue, window, blocked, .. } = self;
            let popped = queue.pop_singles(count, |single| {
                match server.serve_single(single, window.next()) {
                    Verdict::Posted => window.add_posted(),
                    Verdict::Dropped => window.add_dropped(),
                    Verdict::Later => *blocked = true,
                }
                !*blocked
            });
            taken += popped;
            if popped == 0 && !self.blocked {
                self.blocked = !self.serve_next(cx, server);
                taken += u16::from(!self.blocked);
            }
            if self.blocked {
                break;
            }
        }
        taken
    }

    /// Serves the next chain, of any shape. It is apart, so that the usual chain stays in registers.
    /// Returns whether the chain was taken. Otherwise it stays in the queue.
    #[inline(never)]
    fn serve_next(&mut self, cx: Context<'_>, server: &mut dyn Serve) -> bool {
        let verdict = match self.queue.pop() {
            Some(Ok(chain)) => server.serve(chain, self.window.next()),
            Some(Err(error)) => {
                broken_chain(cx, error);
                return true;
            }
            // There is one, because `fetch` has said so.
            None => return false,
        };
        match verdict {
            Verdict::Posted => self.window.add_posted(),
            Verdict::Dropped => self.window.add_dropped(),
            Verdict::Later => {
                self.queue.unpop(1);
                return false;
            }
        }
        true
    }

    /// Looks for at most `most` chains. Returns how many there are.
    #[inline]
    fn fetch(&mut self, cx: Context<'_>, most: u16) -> u16 {
        self.queue.fetch(most).unwrap_or_else(|_| {
            self.broken = true;
            cx.counters.broken_queues.add(1);
            // DEVICE_NEEDS_RESET is set, and the driver is told (virtio 1.2, section 2.1.2).
            cx.interrupt.config();
            0
        })
    }

    /// Takes the next chain, and lets `f` see it. The caller pushes it, or gives it up.
    pub(super) fn next<R>(&mut self, cx: Context<'_>, f: impl FnOnce(Chain<'_>) -> R) -> Next<R> {
        if self.broken || self.stopping {
            return Next::Nothing;
        }
        let mut left = BURST;
        while left > 0 {
            if self.fetch(cx, BURST) == 0 {
                return Next::Nothing;
            }
            match self.queue.pop() {
                Some(Ok(chain)) => return Next::Chain(f(chain)),
                Some(Err(error)) => broken_chain(cx, error),
                None => return Next::Nothing,
            }
            left -= 1;
        }
        Next::Later
    }

    /// Ends the chain with this number, which is in the ring. It goes back with the next
    /// [`settle`](Self::settle), or when those before it have ended. Returns whether a chain with this
    /// number is in the ring.
    #[inline(always)]
    pub(super) fn end(&mut self, number: u64, state: State) -> bool {
        self.end_next(number, state) || self.end_other(number, state)
    }

    /// Ends a chain that continues those that have ended before it, if there is space for its length.
    #[inline(always)]
    fn end_next(&mut self, number: u64, state: State) -> bool {
        let State::Done(len) = state else { return false };
        let Ended { count, lens } = &mut self.ended;
        let next = self.window.oldest().wrapping_add(*count as u32);
        let Some(place) = lens.get_mut(*count).filter(|_| number == u64::from(next)) else {
            return false;
        };
        *place = len;
        *count += 1;
        true
    }

    #[inline(never)]
    fn end_other(&mut self, number: u64, state: State) -> bool {
        self.push_ended();
        self.end_next(number, state) || self.window.end(number, state)
    }

    /// Pushes the oldest chains, which have ended one after the other.
    #[inline]
    fn push_ended(&mut self) {
        let Ended { count, lens } = &mut self.ended;
        let count = self.window.end_oldest(std::mem::take(count));
        self.queue.push_all(&lens[..count]);
    }

    /// Gives chains back whose turn it is, all at once, and interrupts the guest if it wants that.
    #[inline]
    pub(super) fn settle(&mut self, cx: Context<'_>) {
        self.push_ended();
        loop {
            match self.window.step() {
                Step::Push(len) => self.queue.push(len),
                Step::Unpop(count) => self.queue.unpop(count),
                Step::Wait => break,
            }
        }
        self.queue.flush();
        if self.queue.needs_interrupt() {
            cx.counters.interrupts.add(1);
            cx.interrupt.queue(self.index);
        }
    }

    /// Asks the guest for kicks, before the device sleeps. Returns whether it may sleep.
    pub(super) fn arm(&mut self) -> bool {
        // What is left in a queue that is blocked is no reason to stay awake.
        self.broken || self.stopping || self.blocked || !self.queue.enable_notifications()
    }

    /// How far the queue is. Nothing is on its way.
    pub(super) fn state(&self) -> QueueState {
        debug_assert!(self.window.is_empty());
        self.queue.state()
    }
}

#[cold]
fn broken_chain(cx: Context<'_>, error: ChainError) {
    let _ = error;
    cx.counters.broken_chains.add(1);
}
