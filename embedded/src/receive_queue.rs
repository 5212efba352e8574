//! [`ReceiveQueues`]: where senders find a port's receivers, and [`ReceiveQueue`]: which work one of them
//! accepts undone.
//!
//! A port has up to 16 queues, each with a receiver of its own. A sender picks one of those that are open,
//! by the packet's flow: the one that has the greatest hash of the flow and the queue ("rendezvous
//! hashing"). So a queue that closes gives its flows to the others, evenly, and no other flow moves.
//! While one queue is open, nothing is hashed.
//!
//! A queue has up to three inboxes: without headers, with headers, and with headers for large packets.
//! One of them is in use. The [`Shape`] says which one, and what a sender has to do to a packet before.
//! So no buffer is ever filled in a form that its receiver did not post it for.
//!
//! The shape changes while the receiver is closed, and before a new period of the inbox begins (see
//! [`inbox`](crate::inbox)). A sender looks at it twice: before it works on the packet, and after it has
//! loaded the state of the inbox that it claims from. So no packet is accepted that leaves other work
//! than the receiver accepts at that moment.

use std::sync::{Arc, OnceLock};

use crossbeam_utils::CachePadded;
use vmring_core::offload::{OffloadHeader, Offloads};
use vmring_core::sync::{self, AtomicU32, Ordering};

use crate::flow::NextFrame;
use crate::inbox::{Claim, Collector, Delivery, Inbox, PortWake, Refused};
use crate::limits::QUEUES_MAX;
use crate::packet::{Packet, PacketBuffer};
use crate::software::{self, Left};
use crate::stats::Received;
use crate::table::mix;

/// The work that a receiver accepts undone, of what its port has; see
/// [`Receiver::accept`](crate::port::Receiver::accept).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Accepted {
    /// The offloads.
    pub offloads: Offloads,
    /// Whether TCP packets with ECN (`VIRTIO_NET_HDR_GSO_ECN`) are among those that it cuts.
    pub ecn: bool,
}

impl Accepted {
    /// Everything that a port has.
    pub const ALL: Self = Self { offloads: Offloads::ALL, ecn: true };

    /// These offloads, with ECN.
    pub const fn new(offloads: Offloads) -> Self {
        Self { offloads, ecn: true }
    }
}

impl Default for Accepted {
    /// Everything that a port has.
    fn default() -> Self {
        Self::ALL
    }
}

/// The work that a port's receiver does itself, as it is in [`ReceiveQueue`]. It says what its inbox
/// is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape(u32);

impl Shape {
    const CHECKSUM: u32 = 1;
    const TSO4: u32 = 2;
    const TSO6: u32 = 4;
    const USO: u32 = 8;
    const HEADER: u32 = 16;
    /// TCP packets with ECN are not among those that it cuts.
    const WITHOUT_ECN: u32 = 32;
    /// The offloads with which packets are longer than a frame of the network.
    const LARGE: u32 = Self::TSO4 | Self::TSO6 | Self::USO;

    /// The shape of a port with these offloads. With any of them, each packet has a header.
    pub(crate) fn new(offloads: Offloads) -> Self {
        let bits = [
            (offloads.checksum, Self::CHECKSUM),
            (offloads.tso4, Self::TSO4),
            (offloads.tso6, Self::TSO6),
            (offloads.uso, Self::USO),
        ];
        let bits: u32 = bits.iter().map(|(on, bit)| if *on { *bit } else { 0 }).sum();
        let header = if bits != 0 || offloads.virtio_header { Self::HEADER } else { 0 };
        Self(bits | header)
    }

    /// The shape of a receiver that accepts these offloads, as far as its port has them. The header
    /// stays.
    pub(crate) fn accepting(self, accepted: Accepted) -> Self {
        let Accepted { offloads, ecn } = accepted;
        let header = self.0 & Self::HEADER;
        let both = Self::new(self.offloads() & offloads).0 & !Self::HEADER;
        // A receiver that completes no checksums any more cuts nothing either.
        let cannot = self.0 & !both & Self::CHECKSUM != 0;
        let both = if cannot { 0 } else { both };
        let ecn = if ecn || both & (Self::TSO4 | Self::TSO6) == 0 { 0 } else { Self::WITHOUT_ECN };
        Self(header | both | ecn)
    }

    /// The work that receivers of both shapes accept undone.
    fn and(self, other: Self) -> Self {
        Self((self.0 & other.0) | ((self.0 | other.0) & Self::WITHOUT_ECN))
    }

    /// The work that is left in a packet with this header once the receiver has done what it does.
    pub(crate) fn left_by(self, header: &OffloadHeader) -> Left {
        match software::left_by(&self.offloads(), header) {
            Left::Nothing if header.ecn && self.0 & Self::WITHOUT_ECN != 0 => {
                Left::Segments { partial: true }
            }
            left => left,
        }
    }

    pub(crate) fn offloads(self) -> Offloads {
        let has = |bit| self.0 & bit != 0;
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.uso) = (has(Self::CHECKSUM), has(Self::USO));
        (offloads.tso4, offloads.tso6) = (has(Self::TSO4), has(Self::TSO6));
        offloads.virtio_header = has(Self::HEADER);
        offloads
    }

    pub(crate) fn has_header(self) -> bool {
        self.0 & Self::HEADER != 0
    }

    pub(crate) fn is_large(self) -> bool {
        self.0 & Self::LARGE != 0
    }

    /// Which of a place's inboxes the receiver uses.
    fn inbox(self) -> usize {
        match self.0 {
            0 => 0,
            _ if self.is_large() => 2,
            _ => 1,
        }
    }
}

/// A set of queues, with a bit for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueSet(u32);

impl QueueSet {
    /// The only queue of the set, or a number above all queues if there is none. `None` if there are
    /// several.
    #[inline(always)]
    fn only(self) -> Option<usize> {
        (self.0 & self.0.wrapping_sub(1) == 0).then_some(self.0.trailing_zeros() as usize)
    }

    pub(crate) fn has(self, number: usize) -> bool {
        self.0 >> number & 1 != 0
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The queue of a flow.
    fn of_flow(self, flow: u64) -> usize {
        let weight = |number: &usize| mix(flow ^ (*number as u64 + 1).wrapping_mul(ODD));
        (0..QUEUES_MAX).filter(|number| self.has(*number)).max_by_key(weight).unwrap_or(QUEUES_MAX)
    }
}

/// Spreads the numbers of queues over all bits.
const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// The queues of a place. They are kept when the port leaves, and reused.
pub(crate) struct ReceiveQueues<B> {
    /// The queues whose receivers are open.
    open: AtomicU32,
    queues: [ReceiveQueue<B>; QUEUES_MAX],
}

impl<B> ReceiveQueues<B> {
    pub(crate) fn new() -> Self {
        let queues = core::array::from_fn(|_| ReceiveQueue::new());
        Self { open: AtomicU32::new(0), queues }
    }

    /// The queues whose receivers are open.
    #[inline]
    pub(crate) fn open_set(&self) -> QueueSet {
        // Acquire: pairs with the AcqRel in `set_open`. The inbox of each queue in the set is open, or
        // is being closed. Whoever has seen an inbox closed does not find its queue in the set, unless it
        // is open again.
        QueueSet(self.open.load(Ordering::Acquire))
    }

    /// Adds a queue whose inbox is open, or takes one away whose inbox is about to be closed. Returns
    /// the set before and after.
    pub(crate) fn set_open(&self, number: usize, on: bool) -> (QueueSet, QueueSet) {
        let bit = 1 << number;
        // AcqRel: pairs with the Acquire in `open_set`, and with the close of the inbox that follows.
        let before = match on {
            true => self.open.fetch_or(bit, Ordering::AcqRel),
            false => self.open.fetch_and(!bit, Ordering::AcqRel),
        };
        (QueueSet(before), QueueSet(if on { before | bit } else { before & !bit }))
    }

    /// The counters of all receivers.
    pub(crate) fn received(&self) -> impl Iterator<Item = &Received> + Clone {
        self.queues.iter().filter_map(|queue| queue.received.get()).map(|received| &***received)
    }

    #[inline]
    pub(crate) fn get(&self, number: usize) -> Option<&ReceiveQueue<B>> {
        self.queues.get(number)
    }

    /// The work that each open receiver accepts undone. `None` if none is open.
    pub(crate) fn accepted_by_all(&self) -> Option<Shape> {
        let open = self.open_set();
        let open = self.queues.iter().enumerate().filter(|(number, _)| open.has(*number));
        open.map(|(_, queue)| queue.shape()).reduce(Shape::and)
    }

    /// The queue of a packet, by its flow if several are open. `None` if none is.
    #[inline(always)]
    pub(crate) fn pick(&self, flow: impl FnOnce() -> u64) -> Option<(usize, &ReceiveQueue<B>)> {
        let open = self.open_set();
        let number = open.only().unwrap_or_else(|| open.of_flow(flow()));
        Some((number, self.get(number)?))
    }

    /// The queue of the next frames of a sender, and how many of them are for it, at most `wanted`. `None`
    /// if no queue is open, or if several are and `frames` does not show a frame.
    #[inline(always)]
    pub(crate) fn pick_for_run(
        &self,
        wanted: usize,
        key: u64,
        frames: &mut impl FnMut(&mut dyn FnMut(NextFrame<'_>) -> bool),
    ) -> Option<(usize, usize, &ReceiveQueue<B>)> {
        let open = self.open_set();
        let (number, count) = match open.only() {
            Some(number) => (number, wanted),
            None => leading(open, wanted, key, frames)?,
        };
        Some((number, count, self.get(number)?))
    }
}

/// The queue of the first of the next frames, and how many frames are for it, at most `wanted`.
#[cold]
fn leading(
    open: QueueSet,
    wanted: usize,
    key: u64,
    frames: &mut impl FnMut(&mut dyn FnMut(NextFrame<'_>) -> bool),
) -> Option<(usize, usize)> {
    let (mut first, mut count) = (None, 0);
    frames(&mut |frame| {
        let number = open.of_flow(frame.flow(key));
        let is_same = *first.get_or_insert(number) == number;
        count += usize::from(is_same);
        is_same && count < wanted
    });
    first.map(|number| (number, count))
}

impl<B: PacketBuffer> ReceiveQueues<B> {
    /// About how many frames the open receivers take now.
    pub(crate) fn space(&self) -> usize {
        let open = self.open_set();
        let open = self.queues.iter().enumerate().filter(|(number, _)| open.has(*number));
        open.filter_map(|(_, queue)| queue.inbox(queue.shape())).map(Inbox::space).sum()
    }

    /// Wakes the receivers of these queues that sleep.
    #[inline]
    pub(crate) fn ring(&self, queues: QueueSet) {
        let mut left = queues.0;
        while left != 0 {
            let queue = self.get(left.trailing_zeros() as usize);
            if let Some(inbox) = queue.and_then(|queue| queue.inbox(queue.shape())) {
                inbox.ring();
            }
            left &= left - 1;
        }
    }
}

/// The queues of a port that a sender has used since it last woke their receivers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Touched(u16);

impl Touched {
    #[inline]
    pub(crate) fn add(&mut self, number: usize) {
        self.0 |= 1 << (number % QUEUES_MAX);
    }

    pub(crate) fn take(&mut self) -> QueueSet {
        QueueSet(core::mem::take(&mut self.0).into())
    }
}

/// What senders reach of a receiver. It is kept when the port leaves, and reused.
pub(crate) struct ReceiveQueue<B> {
    /// The [`Shape`] of the receiver that has the place now.
    shape: AtomicU32,
    /// The inboxes, by [`Shape::inbox`]. Each is made for the first receiver that needs it.
    inboxes: [OnceLock<sync::Arc<Inbox<B>>>; 3],
    /// What its receiver counts.
    received: OnceLock<Arc<CachePadded<Received>>>,
}

impl<B> ReceiveQueue<B> {
    pub(crate) fn new() -> Self {
        let inboxes = core::array::from_fn(|_| OnceLock::new());
        Self { shape: AtomicU32::new(0), inboxes, received: OnceLock::new() }
    }

    #[inline]
    pub(crate) fn shape(&self) -> Shape {
        // Acquire: pairs with the Release in `set_shape`. Whoever sees the shape finds the inbox closed
        // in which the receiver was before, or a later state of it.
        Shape(self.shape.load(Ordering::Acquire))
    }

    fn set_shape(&self, shape: Shape) {
        // Release: pairs with the Acquire in `shape`.
        self.shape.store(shape.0, Ordering::Release);
    }

    /// The inbox for this shape. `None` if there was no such receiver.
    #[inline]
    pub(crate) fn inbox(&self, shape: Shape) -> Option<&Inbox<B>> {
        self.inboxes[shape.inbox()].get().map(|inbox| &**inbox)
    }
}

impl<B: PacketBuffer> ReceiveQueue<B> {
    /// Delivers a packet whose work was done as a receiver of this shape needs it. The packet is stale
    /// if the receiver has another shape by now, or if `is_for_it` says that it is not for the port that
    /// has the place now.
    #[inline]
    pub(crate) fn deliver(
        &self,
        shape: Shape,
        packet: Packet<'_>,
        is_for_it: impl Fn() -> bool,
    ) -> Delivery {
        match self.inbox(shape) {
            Some(inbox) => inbox.deliver_if(packet, || self.shape() == shape && is_for_it()),
            None => Delivery::Dropped(Refused::Closed),
        }
    }

    /// Claims buffers for packets that leave no work; see [`Inbox::claim_for`]. `is_for_it` is that of
    /// [`deliver`](Self::deliver).
    #[inline(always)]
    pub(crate) fn claim(
        &self,
        wanted: usize,
        longest: impl FnOnce() -> usize,
        is_for_it: impl Fn() -> bool,
    ) -> Option<Claim<'_, B>> {
        let shape = self.shape();
        // The shape says what the buffers are like.
        self.inbox(shape)?.claim_if(wanted, longest, || self.shape() == shape && is_for_it())
    }

    /// Begins to receive in this shape. The inbox stays closed, until the collector reopens it. `None` if
    /// the queue has a receiver.
    pub(crate) fn open(
        &self,
        shape: Shape,
        wake: PortWake,
        make: impl FnOnce(Shape) -> Inbox<B>,
    ) -> Option<QueueEnd<B>> {
        let collector = Inbox::open_later(self.inbox_or(shape, make), wake.clone())?;
        self.set_shape(shape);
        let received = Arc::clone(self.received.get_or_init(Arc::default));
        Some(QueueEnd { collector, shape, received, wake })
    }

    /// The inbox for this shape, which is made if there was none.
    fn inbox_or(&self, shape: Shape, make: impl FnOnce(Shape) -> Inbox<B>) -> &sync::Arc<Inbox<B>> {
        self.inboxes[shape.inbox()].get_or_init(|| sync::Arc::new(make(shape)))
    }
}

/// What a receiver has of its queue.
pub(crate) struct QueueEnd<B: PacketBuffer> {
    pub(crate) collector: Collector<B>,
    pub(crate) shape: Shape,
    /// What it counts. It has this by itself, so that no packet pays for finding its queue.
    pub(crate) received: Arc<CachePadded<Received>>,
    /// What wakes the receiver, to open another inbox with.
    wake: PortWake,
}

impl<B: PacketBuffer> QueueEnd<B> {
    /// Sets what wakes the receiver from now on.
    pub(crate) fn set_wake(&mut self, wake: PortWake) {
        self.wake = wake.clone();
        self.collector.set_wake(wake);
    }

    /// Goes on in another shape. The collector is closed and has no buffers. Packets that wait stay if
    /// they leave no other work than the receiver accepts now. Returns how many were dropped.
    pub(crate) fn change(
        &mut self,
        queue: &ReceiveQueue<B>,
        shape: Shape,
        make: impl FnOnce(Shape) -> Inbox<B>,
    ) -> u64 {
        let waiting = self.collector.take_waiting();
        let inbox = queue.inbox_or(shape, make);
        if !sync::Arc::ptr_eq(inbox, self.collector.inbox()) {
            let collector = Inbox::open_later(inbox, self.wake.clone());
            // The queue has one receiver, so its other inboxes have none.
            self.collector = collector.expect("the other inboxes of the queue are free");
        }
        let mut dropped = 0;
        for (header, frame) in waiting {
            let packet = Packet::from(&*frame).with_offload(&header);
            let is_kept =
                shape.left_by(&header) == Left::Nothing && self.collector.put_waiting(packet);
            dropped += u64::from(!is_kept);
        }
        queue.set_shape(shape);
        self.shape = shape;
        dropped
    }
}
