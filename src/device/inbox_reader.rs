//! The reading side of a queue over an inbox: the loopback and the embedded network share it.

use std::collections::VecDeque;

use vmring_embedded::inbox::Collector;

use crate::device::{PollContext, PostedSlot, Progress};
use crate::limits::INBOX_READS_MAX;

/// What a queue needs of its end of an inbox: [`Collector`] here, a network's receiver in
/// `embedded`.
pub(crate) trait InboxEnd: Send {
    /// Not shown to senders before `publish`.
    fn stage(&mut self, slot: PostedSlot) -> Result<(), PostedSlot>;
    fn publish(&mut self);
    fn collect(&mut self) -> Option<(PostedSlot, usize)>;
    fn recall(&mut self, f: &mut dyn FnMut(PostedSlot));
    fn recall_target(&mut self, target: u64, f: &mut dyn FnMut(PostedSlot));
    fn arm(&mut self) -> bool;
    fn disarm(&mut self);
    fn close(&mut self);
}

impl InboxEnd for Collector<PostedSlot> {
    #[inline(always)]
    fn stage(&mut self, slot: PostedSlot) -> Result<(), PostedSlot> {
        Collector::stage(self, slot)
    }

    #[inline]
    fn publish(&mut self) {
        Collector::publish(self);
    }

    #[inline(always)]
    fn collect(&mut self) -> Option<(PostedSlot, usize)> {
        Collector::collect(self).map(|packet| (packet.buffer, packet.len))
    }

    fn recall(&mut self, f: &mut dyn FnMut(PostedSlot)) {
        Collector::recall(self, f);
    }

    fn recall_target(&mut self, target: u64, f: &mut dyn FnMut(PostedSlot)) {
        Collector::recall_if(self, |slot| slot.user_data() == target, f);
    }

    fn arm(&mut self) -> bool {
        Collector::arm(self)
    }

    fn disarm(&mut self) {
        Collector::disarm(self);
    }

    fn close(&mut self) {
        Collector::close(self);
    }
}

/// The reading side of a queue over an inbox: posts reads there, collects packets, takes back what
/// is cancelled.
pub(crate) struct InboxReader<I = Collector<PostedSlot>> {
    pub(super) end: I,
    armed: bool,
    /// Taken back from the inbox by a cancel, to be completed at the next poll.
    cancelled: VecDeque<PostedSlot>,
}

impl<I: InboxEnd> InboxReader<I> {
    pub(crate) fn new(end: I) -> Self {
        Self { end, armed: false, cancelled: VecDeque::new() }
    }

    /// Awake again: completes what was cancelled.
    #[inline(always)]
    pub(crate) fn begin_poll(&mut self, cx: &mut PollContext<'_>) {
        if self.armed {
            self.armed = false;
            self.end.disarm();
        }
        while let Some(slot) = self.cancelled.pop_front() {
            cx.cancel(slot);
        }
    }

    /// Posts the poller's reads, as many as fit.
    #[inline(always)]
    pub(crate) fn post(&mut self, cx: &mut PollContext<'_>) {
        while let Some(slot) = cx.take_read() {
            if let Err(slot) = self.end.stage(slot) {
                cx.put_back(slot);
                break;
            }
        }
        self.end.publish();
    }

    /// Completes the packets that are there, at most the posted.
    #[inline(always)]
    pub(crate) fn collect(&mut self, cx: &mut PollContext<'_>) -> Progress {
        for _ in 0..INBOX_READS_MAX {
            let Some((slot, len)) = self.end.collect() else {
                return Progress::Idle;
            };
            cx.complete_read(slot, len);
        }
        Progress::More
    }

    pub(crate) fn arm(&mut self) -> bool {
        self.armed = self.end.arm();
        self.armed && self.cancelled.is_empty()
    }

    pub(crate) fn cancel(&mut self, target: Option<u64>) -> u32 {
        let before = self.cancelled.len();
        let mut take = |slot| self.cancelled.push_back(slot);
        match target {
            None => self.end.recall(&mut take),
            // The others stay where senders find them.
            Some(target) => self.end.recall_target(target, &mut take),
        }
        (self.cancelled.len() - before) as u32
    }

    /// Ends the reading: packets that came complete, the rest is cancelled. Waits only for copies
    /// that are under way.
    pub(crate) fn close(&mut self, cx: &mut PollContext<'_>) {
        self.end.close();
        while let Some((slot, len)) = self.end.collect() {
            cx.complete_read(slot, len);
        }
        self.end.recall(&mut |slot| cx.cancel(slot));
        self.cancelled.drain(..).for_each(|slot| cx.cancel(slot));
    }

    /// Ends the reading without an [`PollContext`]: every slot is dropped, and so completes as abandoned.
    pub(crate) fn abandon(&mut self) {
        self.end.close();
        while self.end.collect().is_some() {}
        self.end.recall(&mut drop);
        self.cancelled.clear();
    }

    pub(crate) fn into_inner(self) -> I {
        self.end
    }
}
