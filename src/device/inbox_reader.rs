//! The reading side of a queue over an inbox, which the loopback and the embedded network share.

use std::collections::VecDeque;

use vmring_core::offload;
use vmring_embedded::inbox::{Collected, Collector};

use crate::device::{PollContext, PostedSlot, Progress};
use crate::limits::INBOX_READS_MAX;
use vmring_embedded::limits::GROUP_MAX;

/// What a queue needs from the receiving end of an inbox. [`Collector`] implements it here, and the
/// receiver of a network's port in `embedded`.
pub(crate) trait InboxEnd: Send {
    /// Posts a slot, which senders do not see before [`publish`](Self::publish).
    fn stage(&mut self, slot: PostedSlot) -> Result<(), PostedSlot>;
    /// Posts the slots that `next` returns, until it returns `None` or there is no space.
    fn stage_all(&mut self, next: impl FnMut() -> Option<PostedSlot>) -> Result<(), PostedSlot>;
    fn publish(&mut self);
    /// How many slots are posted, whether filled or not.
    fn posted(&self) -> usize;
    fn collect(&mut self) -> Option<Collected<PostedSlot>>;
    /// Shows the next packets to `each`, as long as nothing is special about them; see
    /// [`Collector::collect_run`].
    fn collect_run(
        &mut self,
        most: u32,
        each: impl FnMut(&mut Option<PostedSlot>, usize) -> bool,
    ) -> (u32, u64);
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

    #[inline(always)]
    fn stage_all(&mut self, next: impl FnMut() -> Option<PostedSlot>) -> Result<(), PostedSlot> {
        Collector::stage_all(self, next)
    }

    #[inline]
    fn publish(&mut self) {
        Collector::publish(self);
    }

    #[inline(always)]
    fn posted(&self) -> usize {
        Collector::posted(self)
    }

    #[inline(always)]
    fn collect(&mut self) -> Option<Collected<PostedSlot>> {
        Collector::collect(self)
    }

    #[inline(always)]
    fn collect_run(
        &mut self,
        most: u32,
        each: impl FnMut(&mut Option<PostedSlot>, usize) -> bool,
    ) -> (u32, u64) {
        Collector::collect_run(self, most, each)
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

/// The reading side of a queue over an inbox. It posts reads to the inbox, collects packets from
/// it, and takes back the reads that are cancelled.
pub(crate) struct InboxReader<I = Collector<PostedSlot>> {
    pub(super) end: I,
    /// Whether each packet has an offload header in front of it.
    headers: bool,
    armed: bool,
    /// Reads that a cancel took back from the inbox. The next poll completes them.
    cancelled: VecDeque<PostedSlot>,
    /// The reads that one packet fills, each with its part's length. It is empty between two polls.
    parts: Vec<(PostedSlot, usize)>,
}

impl<I: InboxEnd> InboxReader<I> {
    pub(crate) fn new(end: I) -> Self {
        Self::with_headers(end, false)
    }

    /// As [`new`](Self::new). If `headers`, the inbox is one that has an offload header in front of
    /// each packet.
    pub(crate) fn with_headers(end: I, headers: bool) -> Self {
        Self { end, headers, armed: false, cancelled: VecDeque::new(), parts: Vec::new() }
    }

    /// Disarms the inbox if it is armed, and completes the cancelled reads. Each poll begins with
    /// it.
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

    /// Posts the poller's reads to the inbox, as many as it has space for.
    #[inline(always)]
    pub(crate) fn post(&mut self, cx: &mut PollContext<'_>) {
        // Most reads are in the SQ one behind the other.
        let mut staged = Ok(());
        if let Some(mut reads) = cx.submitted_reads() {
            staged = self.end.stage_all(|| reads.next());
        }
        if let Err(slot) = staged {
            cx.put_back(slot);
            return self.end.publish();
        }
        while let Some(slot) = cx.take_read() {
            if let Err(slot) = self.end.stage(slot) {
                cx.put_back(slot);
                break;
            }
        }
        self.end.publish();
    }

    /// Completes the reads that packets have arrived for, at most [`INBOX_READS_MAX`] per call.
    ///
    /// It is not inlined: its loop needs all registers.
    #[inline(never)]
    pub(crate) fn collect(&mut self, cx: &mut PollContext<'_>) -> Progress {
        if self.headers {
            return self.collect_with_headers(cx);
        }
        if self.end.posted() == 0 {
            return Progress::Idle;
        }
        let mut count = 0;
        if let Some(mut reads) = cx.filled_reads(INBOX_READS_MAX) {
            let (packets, bytes) =
                self.end.collect_run(INBOX_READS_MAX, |slot, len| reads.push(slot, len));
            reads.count(packets, bytes);
            if self.end.posted() == 0 {
                return Progress::Idle;
            }
            count = packets;
        }
        self.collect_others(cx, INBOX_READS_MAX - count)
    }

    /// Completes what [`collect`](Self::collect) has left, at most `most` reads. This is mostly nothing.
    #[inline(never)]
    fn collect_others(&mut self, cx: &mut PollContext<'_>, most: u32) -> Progress {
        for _ in 0..most {
            let Some(Collected { buffer, len, more, .. }) = self.end.collect() else {
                return Progress::Idle;
            };
            match more {
                false => cx.complete_filled(buffer, len),
                true => self.complete_group(cx, buffer, len),
            }
        }
        Progress::More
    }

    /// As [`collect`](Self::collect), for an inbox with headers.
    #[inline(never)]
    fn collect_with_headers(&mut self, cx: &mut PollContext<'_>) -> Progress {
        for _ in 0..INBOX_READS_MAX {
            let Some(Collected { buffer, len, more, .. }) = self.end.collect() else {
                return Progress::Idle;
            };
            match more {
                true => self.complete_group(cx, buffer, len),
                // In a guest's buffer the sender has written the right header.
                false if buffer.guest().is_some() => cx.complete_filled(buffer, len),
                false => cx.complete_read_with_header(buffer, offload::LEN + len),
            }
        }
        Progress::More
    }

    /// Completes all reads that one packet fills. Their cells were filled before the first one's state
    /// was stored.
    #[inline(never)]
    fn complete_group(&mut self, cx: &mut PollContext<'_>, first: PostedSlot, len: usize) {
        self.parts.reserve(GROUP_MAX as usize);
        self.parts.push((first, len));
        while let Some(part) = self.end.collect() {
            self.parts.push((part.buffer, part.len));
            if !part.more {
                break;
            }
        }
        let count = self.parts.len();
        for (i, (slot, len)) in self.parts.drain(..).enumerate() {
            cx.complete_part(slot, len, i == 0, (count - 1 - i) as u16);
        }
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
            // The other reads stay posted, where senders find them.
            Some(target) => self.end.recall_target(target, &mut take),
        }
        (self.cancelled.len() - before) as u32
    }

    /// Closes the inbox. Reads with a packet complete with it, all others are cancelled. It waits
    /// only for copies that are under way.
    pub(crate) fn close(&mut self, cx: &mut PollContext<'_>) {
        self.end.close();
        while self.collect(cx) == Progress::More {}
        self.end.recall(&mut |slot| cx.cancel(slot));
        self.cancelled.drain(..).for_each(|slot| cx.cancel(slot));
    }

    /// Closes the inbox without a [`PollContext`]. Every slot is dropped, so it completes as
    /// abandoned.
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
