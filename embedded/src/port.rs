//! A port: an interface's place on a network, and its two halves.
//!
//! A [`Port`] splits into a [`Receiver`], which posts buffers and collects packets, and a
//! [`Sender`], which forwards frames on its caller's own thread.

use core::fmt;
use core::marker::PhantomData;
use core::time::Duration;
use std::sync::Arc;

use macaddr::MacAddr6;
use smoltcp::wire::IPV4_HEADER_LEN;
use vmring_core::GuestBuffer;
use vmring_core::offload::{Checksum, Offloads};
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::flow::NextFrame;
use crate::frame;
use crate::guard;
use crate::inbox::{Claim, Collected, Delivery, PortWake, Refused};
use crate::limits::{LOOKUPS, MAX_PORTS, QUEUES_MAX, SEGMENTS_PER_PACKET, VLAN_TAG_LEN};
use crate::network::{
    Admitted, Audience, JoinError, Membership, Network, PortConfig, Route, WORDS,
};
use crate::packet::{Packet, PacketBuffer};
use crate::policy::{self, Moment, PortLimits, PortRole, SourceRule, Way};
use crate::port_state::PortState;
use crate::receive_queue::{Accepted, QueueEnd, QueueSet, Touched};
use crate::software::{self, Left};
use crate::stats::{DropReason, PortStats, SEND_COUNTERS, SendCounter, Sent, add};
use crate::table::{Located, Mac};
use crate::work::Work;

impl<B: PacketBuffer> Network<B> {
    /// Puts an interface on the network and returns its port.
    ///
    /// # Errors
    ///
    /// If the network is full, if the MAC address is in use or not unicast, or if the number of queues is
    /// impossible.
    pub fn join(self: &Arc<Self>, config: PortConfig) -> Result<Port<B>, JoinError> {
        let Admitted { ends, state, membership } = self.admit(config)?;
        let receivers = ends.into_iter().enumerate().map(|(number, end)| {
            let (state, membership) = (Arc::clone(&state), Arc::clone(&membership));
            let mut receiver = Receiver { end, number, is_open: false, state, membership };
            receiver.reopen();
            receiver
        });
        Ok(Port { receivers: receivers.collect(), sender: Sender::new(membership) })
    }
}

/// An interface's place on a network: a [`Receiver`] for each queue, and a [`Sender`].
///
/// The port leaves the network when all receivers and all senders are dropped, in any order and on
/// any thread.
pub struct Port<B: PacketBuffer> {
    // This order matters: a sender flushes when it is dropped, which may ring a receiver.
    sender: Sender<B>,
    /// One for each queue, and at least one.
    receivers: Vec<Receiver<B>>,
}

impl<B: PacketBuffer> fmt::Debug for Port<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Port").field("mac", &self.mac()).finish_non_exhaustive()
    }
}

impl<B: PacketBuffer> Port<B> {
    /// Splits the port into its two halves, which may go to different threads. If it has several queues,
    /// only the first one's receiver stays.
    pub fn split(self) -> (Receiver<B>, Sender<B>) {
        let Self { sender, mut receivers } = self;
        (receivers.swap_remove(0), sender)
    }

    /// Splits the port into a receiver for each queue, and the sender. They may go to different threads.
    pub fn split_queues(self) -> (Vec<Receiver<B>>, Sender<B>) {
        (self.receivers, self.sender)
    }

    /// Returns the MAC address that the network assigned to the port.
    pub fn mac(&self) -> MacAddr6 {
        self.sender.membership.mac
    }

    /// Returns the length of the longest packet that the port sends, in bytes, and receives unless its
    /// receiver [accepts](Receiver::accept) less. It is the network's, unless the port has a segmentation offload.
    pub fn max_packet_size(&self) -> usize {
        self.sender.membership.longest
    }

    /// Returns the offloads of the port. With any of them it has the header too.
    pub fn offloads(&self) -> Offloads {
        self.sender.membership.offloads
    }

    /// Returns the network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.sender.membership.network
    }

    /// Returns a handle that reads the port's counters. The handle keeps the network alive, but it
    /// does not keep the port on it.
    pub fn monitor(&self) -> Monitor<B> {
        self.sender.monitor()
    }
}

/// Reads a port's counters and changes its limits, from any thread. A monitor keeps the network
/// alive, but the port can leave.
pub struct Monitor<B> {
    network: Arc<Network<B>>,
    index: usize,
    generation: u32,
    mac: MacAddr6,
}

impl<B> Clone for Monitor<B> {
    fn clone(&self) -> Self {
        Self { network: Arc::clone(&self.network), ..*self }
    }
}

impl<B> fmt::Debug for Monitor<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("mac", &self.mac).finish_non_exhaustive()
    }
}

impl<B> Monitor<B> {
    fn new(membership: &Membership<B>) -> Self {
        Self {
            network: Arc::clone(&membership.network),
            index: membership.index,
            generation: membership.generation,
            mac: membership.mac,
        }
    }

    /// Returns the port's counters, or `None` once the port has left.
    pub fn stats(&self) -> Option<PortStats> {
        let state = self.network.port_state(self.index)?;
        let stats = state.stats();
        (state.generation.load(Ordering::Relaxed) == self.generation).then_some(stats)
    }

    /// Replaces the port's limits. All its token buckets are full afterwards, and each sender follows
    /// the new limits from its next batch on. Returns false, and changes nothing, once the port has
    /// left.
    pub fn set_limits(&self, limits: PortLimits) -> bool {
        self.network.set_limits(self.index, self.generation, limits)
    }

    /// Returns the port's MAC address.
    pub fn mac(&self) -> MacAddr6 {
        self.mac
    }

    /// Returns the network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.network
    }
}

/// The half of a port that receives, or the part of one queue of it.
///
/// Dropping it closes it: it waits for copies that are under way, and drops the packets and buffers
/// that are still in it. The packets are counted as [`missed_closed`](PortStats::missed_closed).
pub struct Receiver<B: PacketBuffer> {
    // This order matters: the end is dropped first, so the inbox is closed and empty before the port
    // leaves.
    end: QueueEnd<B>,
    /// The number of its queue.
    number: usize,
    is_open: bool,
    /// The state of this port, for its counters.
    state: Arc<PortState<B>>,
    membership: Arc<Membership<B>>,
}

impl<B: PacketBuffer> fmt::Debug for Receiver<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("mac", &self.membership.mac)
            .field("posted", &self.posted())
            .finish_non_exhaustive()
    }
}

impl<B: PacketBuffer> Receiver<B> {
    /// Returns the MAC address that the network assigned to the port.
    pub fn mac(&self) -> MacAddr6 {
        self.membership.mac
    }

    /// Returns the network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.membership.network
    }

    /// Returns what has passed through the port.
    pub fn stats(&self) -> PortStats {
        self.membership.stats()
    }

    /// Returns a handle that reads the port's counters. The handle keeps the network alive, but it
    /// does not keep the port on it.
    pub fn monitor(&self) -> Monitor<B> {
        Monitor::new(&self.membership)
    }

    /// Returns the length of the longest packet that the receiver gets, in bytes: the port's, or that of
    /// a frame if it [accepts](Self::accept) no segmentation.
    pub fn max_packet_size(&self) -> usize {
        self.membership.network.longest_of(self.end.shape)
    }

    /// Sets which work the receiver accepts undone, of what the port's [offloads](Port::offloads)
    /// include. Senders do the rest. A receiver begins with all of it.
    ///
    /// When the call returns, no packet comes out that leaves other work, and the header stays in front
    /// of each packet. No sender waits for the change. The receiver is closed for a moment, so that
    /// frames which come just then are dropped. Packets that wait for buffers stay, in their order, but
    /// for those that leave work which is not accepted any more: they are dropped. All these are counted
    /// as [`missed_closed`](PortStats::missed_closed).
    ///
    /// A receiver that accepts no segmentation takes buffers of
    /// [`max_packet_size`](Self::max_packet_size), which is that of a frame then. A receiver that is
    /// closed stays closed.
    ///
    /// # Panics
    ///
    /// If a buffer is posted. [Recall](Self::recall) and [collect](Self::collect) all of them first.
    pub fn accept(&mut self, accepted: Accepted) {
        assert_eq!(self.posted(), 0, "a change of what is accepted begins without buffers");
        let shape = self.membership.shape.accepting(accepted);
        if shape == self.end.shape {
            return;
        }
        let was_closed = self.is_closed();
        self.close();
        let network = &self.membership.network;
        let Some(queue) = self.state.queues.get(self.number) else { return };
        let dropped = self.end.change(queue, shape, |shape| network.make_inbox(shape));
        self.state.counters.missed.closed.fetch_add(dropped, Ordering::Relaxed);
        if !was_closed {
            self.reopen();
        }
    }

    /// Sets the callback that wakes this receiver from now on. A sender that is about to wake it may still
    /// call the one before.
    pub fn set_wake(&mut self, wake: PortWake) {
        self.end.set_wake(wake);
    }

    /// Returns the number of the receiver's queue, from 0 on.
    pub fn queue(&self) -> usize {
        self.number
    }

    /// Returns which offloads of the port the receiver accepts; see [`accept`](Self::accept). With any
    /// offload of the port, the header is among them.
    pub fn offloads(&self) -> Offloads {
        self.end.shape.offloads()
    }

    /// Lends a buffer to the network; see [`Collector::post`](crate::inbox::Collector::post).
    ///
    /// Packets that wait for a buffer cause no wake-up, so collect after posting.
    ///
    /// # Errors
    ///
    /// Returns the buffer if `inbox_depth` buffers are posted, or if it has fewer bytes than
    /// [`max_packet_size`](Self::max_packet_size) and is not in the memory of a guest. If the
    /// port has offloads, the bytes behind the header count
    /// ([`header_and_bytes`](PacketBuffer::header_and_bytes)).
    pub fn post(&mut self, buffer: B) -> Result<(), B> {
        self.end.collector.post(buffer)
    }

    /// Like [`post`](Self::post), but senders do not see the buffer before
    /// [`publish`](Self::publish).
    ///
    /// # Errors
    ///
    /// Returns the buffer in the cases in which [`post`](Self::post) does.
    #[inline(always)]
    pub fn stage(&mut self, buffer: B) -> Result<(), B> {
        self.end.collector.stage(buffer)
    }

    /// Stages the buffers that `next` returns; see
    /// [`Collector::stage_all`](crate::inbox::Collector::stage_all).
    ///
    /// # Errors
    ///
    /// Returns a buffer that has too few bytes, as [`post`](Self::post) does.
    #[inline(always)]
    pub fn stage_all(&mut self, next: impl FnMut() -> Option<B>) -> Result<(), B> {
        self.end.collector.stage_all(next)
    }

    /// Shows the senders all buffers that were [staged](Self::stage), with one store.
    #[inline]
    pub fn publish(&mut self) {
        self.end.collector.publish();
        self.count_dropped();
    }

    /// Counts the packets for which the posted buffers were too few.
    #[inline]
    fn count_dropped(&mut self) {
        let dropped = self.end.collector.take_dropped();
        if dropped > 0 {
            self.state.counters.missed.no_buffer.fetch_add(dropped, Ordering::Relaxed);
        }
    }

    /// Returns how many buffers are lent, whether filled or not.
    pub fn posted(&self) -> usize {
        self.end.collector.posted()
    }

    /// Returns whether no further buffer can be posted.
    pub fn is_full(&self) -> bool {
        self.end.collector.is_full()
    }

    /// Returns the next packet and its length, or `None`; see [`Collector::collect`](crate::inbox::Collector::collect). If a packet may
    /// fill several buffers, use [`collect_part`](Self::collect_part).
    #[inline(always)]
    pub fn collect(&mut self) -> Option<(B, usize)> {
        let packet = self.collect_part()?;
        Some((packet.buffer, packet.len))
    }

    /// Returns the next packet, or the next part of one, or `None`; see [`Collector::collect`](crate::inbox::Collector::collect).
    #[inline(always)]
    pub fn collect_part(&mut self) -> Option<Collected<B>> {
        let packet = self.end.collector.collect()?;
        let received = &self.end.received;
        if !packet.more {
            add(if packet.overflow { &received.overflow } else { &received.direct }, 1);
        }
        add(&received.bytes, packet.len as u64);
        Some(packet)
    }

    /// Takes the next packets, as long as each is in one buffer and has not waited; see
    /// [`Collector::collect_run`](crate::inbox::Collector::collect_run). They are counted together.
    #[inline(always)]
    pub fn collect_run(
        &mut self,
        most: u32,
        each: impl FnMut(&mut Option<B>, usize) -> bool,
    ) -> (u32, u64) {
        let (packets, bytes) = self.end.collector.collect_run(most, each);
        let received = &self.end.received;
        add(&received.direct, packets.into());
        add(&received.bytes, bytes);
        (packets, bytes)
    }

    /// Takes back every posted buffer that no sender has claimed; see [`Collector::recall`](crate::inbox::Collector::recall).
    pub fn recall(&mut self, f: impl FnMut(B)) -> usize {
        self.end.collector.recall(f)
    }

    /// Takes back the posted buffers that no sender has claimed and that match, and leaves the
    /// others posted; see [`Collector::recall_if`](crate::inbox::Collector::recall_if).
    pub fn recall_if(&mut self, matches: impl FnMut(&mut B) -> bool, f: impl FnMut(B)) -> usize {
        self.end.collector.recall_if(matches, f)
    }

    /// Announces that the receiver wants to sleep; see [`Collector::arm`](crate::inbox::Collector::arm). Returns true if nothing
    /// can be collected: the wake callback will be called once when that changes. Returns false if
    /// there is something to collect.
    pub fn arm(&mut self) -> bool {
        let asleep = self.end.collector.arm();
        self.count_dropped();
        asleep
    }

    /// Announces that the receiver is awake again; see [`Collector::disarm`](crate::inbox::Collector::disarm).
    pub fn disarm(&mut self) -> bool {
        self.end.collector.disarm()
    }

    /// Refuses further packets and waits for the copies that are under way. Each takes as long as
    /// copying one frame, or a [`Run`]; a run that was forgotten takes for ever.
    ///
    /// When `close` returns, no sender touches a buffer. Packets that have arrived can be
    /// [collected](Self::collect), and the other buffers can be [recalled](Self::recall). The
    /// port's senders can still send. If the port has other receivers that are open, they get the
    /// packets that come from now on.
    pub fn close(&mut self) {
        // The others get its flows before it refuses them.
        self.is_open = false;
        self.membership.network.set_queue_open(&self.membership, self.number, false);
        self.end.collector.close();
    }

    /// Closes the receiver and drops what is in it. Packets are counted as
    /// [`missed_closed`](PortStats::missed_closed). Returns how many there were.
    pub fn discard(&mut self) -> usize {
        self.close();
        let dropped = self.end.collector.discard(drop);
        self.state.counters.missed.closed.fetch_add(dropped as u64, Ordering::Relaxed);
        dropped
    }

    /// Accepts packets again after [`close`](Self::close).
    pub fn reopen(&mut self) {
        self.end.collector.reopen();
        self.is_open = true;
        self.membership.network.set_queue_open(&self.membership, self.number, true);
    }

    /// Returns whether the receiver is closed: [`close`](Self::close) was called, and
    /// [`reopen`](Self::reopen) was not called since.
    pub fn is_closed(&self) -> bool {
        !self.is_open
    }
}

impl<B: PacketBuffer> Drop for Receiver<B> {
    fn drop(&mut self) {
        self.discard(); // ends the floods, and counts what is dropped
    }
}

/// The half of a port that sends, on the thread that calls it.
///
/// A port can have several senders, made by [`new_sender`](Self::new_sender). The frames of one
/// sender keep their order.
///
/// [`flush`](Self::flush) wakes the receivers, each once: call it after every batch. Dropping a
/// sender flushes.
pub struct Sender<B: PacketBuffer> {
    membership: Arc<Membership<B>>,
    /// Where the gateway writes its replies.
    reply: Box<[u8]>,
    /// Where a guest's packet is copied to for the gateway.
    question: Box<[u8]>,
    /// The ports that got a frame since the last flush.
    touched: TouchedPorts,
    /// Where the work is done that a receiver does not do itself.
    work: Work,
    /// What was counted since the last flush, by [`SendCounter`].
    counts: Counts,
    /// Whether anything was sent since the last flush.
    unflushed: bool,
    /// The workers of the router that anything was sent to since then, a bit for each.
    routed: u8,
    /// The clock's seconds, which wrap, when the batch began.
    now: u32,
    /// The same time for the limits.
    moment: Moment,
    /// Whether the port had a send limit when the batch began.
    limited: bool,
    /// The source address that needs no check. It is `None` while the port waits for the first.
    own: Option<Mac>,
    /// Whether the port sends from one address only, so that ARP must not name another.
    one_source: bool,
    /// Where a packet is copied to that may be what the port's role forbids. It is empty if the role
    /// forbids nothing.
    suspect: Box<[u8]>,
    not_sync: PhantomData<core::cell::Cell<()>>,
}

impl<B: PacketBuffer> fmt::Debug for Sender<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("mac", &self.membership.mac).finish_non_exhaustive()
    }
}

impl<B: PacketBuffer> Sender<B> {
    fn new(membership: Arc<Membership<B>>) -> Self {
        // DHCP replies are shorter than the smallest MTU.
        let network = &membership.network;
        let longest = if network.gateway.is_some() { network.max_packet_size } else { 0 };
        let space = vec![0; longest].into_boxed_slice();
        Self {
            reply: space.clone(),
            question: space,
            work: Work::new(&membership.offloads, membership.longest, network.max_packet_size),
            touched: TouchedPorts::new(),
            counts: Counts::default(),
            unflushed: false,
            routed: 0,
            now: 0,
            moment: Moment::ZERO,
            limited: false,
            own: (membership.source != SourceRule::LearnOnce)
                .then(|| Mac::new(membership.mac.into_array())),
            one_source: membership.source != SourceRule::Any,
            suspect: match membership.role {
                PortRole::Any => Box::default(),
                PortRole::Host => vec![0; membership.longest].into(),
            },
            membership,
            not_sync: PhantomData,
        }
    }

    /// Makes a sender of the same port, for another thread.
    pub fn new_sender(&self) -> Self {
        Self::new(Arc::clone(&self.membership))
    }

    /// Returns the MAC address that the network assigned to the port.
    pub fn mac(&self) -> MacAddr6 {
        self.membership.mac
    }

    /// Returns the network the port is on.
    pub fn network(&self) -> &Arc<Network<B>> {
        &self.membership.network
    }

    /// Returns what has passed through the port.
    pub fn stats(&self) -> PortStats {
        self.membership.stats()
    }

    /// Returns a handle that reads the port's counters. The handle keeps the network alive, but it
    /// does not keep the port on it.
    pub fn monitor(&self) -> Monitor<B> {
        Monitor::new(&self.membership)
    }

    /// Forwards one frame. A frame that cannot be delivered is dropped and counted.
    ///
    /// It waits for no packet and no buffer, only for a receiver that is in the middle of
    /// [`recall_if`](Receiver::recall_if). A receiver that sleeps is woken at the next
    /// [`flush`](Self::flush).
    pub fn send(&mut self, frame: &[u8]) -> Sent {
        self.send_packet(Packet::from(frame))
    }

    /// As [`send`](Self::send), for a packet that may be in the memory of a guest, and that may leave
    /// work to others.
    pub fn send_packet(&mut self, frame: Packet<'_>) -> Sent {
        self.begin();
        let sent = self.forward(frame);
        let counter = match sent {
            Sent::Forwarded => SendCounter::Packets,
            Sent::Flooded { .. } => {
                self.count(SendCounter::Floods, 1);
                SendCounter::Packets
            }
            Sent::Gateway => SendCounter::Packets,
            Sent::Dropped(reason) => counter_of(reason),
        };
        self.count(counter, 1);
        if matches!(counter, SendCounter::Packets) {
            self.count(SendCounter::Bytes, frame.len() as u64);
        }
        sent
    }

    /// Prepares up to `wanted` frames that all begin with this Ethernet header: looks up once where
    /// they go, and claims buffers there in one step.
    ///
    /// `frames` gives the frames to its argument, in order, until that returns false. It is called only if
    /// it is needed: if a buffer of the receiver may be smaller than the network's longest packet, and if
    /// the port has several queues. In the latter case only as many frames as belong to the first one's
    /// queue are prepared. If it gives none, they are as long as any, and several queues give `None`.
    ///
    /// Returns `None` if the frames do not all go to one port, if that port has no buffer posted, or
    /// none that is large enough, or if a limit of either port stands in the way, which a limit of
    /// bytes always does. [`send`](Self::send) handles each frame in these cases.
    ///
    /// A receiver that sleeps is woken at the next [`flush`](Self::flush), as after
    /// [`send`](Self::send).
    #[inline(never)]
    pub fn run(
        &mut self,
        header: [u8; ETHERNET_HEADER_LEN],
        wanted: usize,
        mut frames: impl FnMut(&mut dyn FnMut(NextFrame<'_>) -> bool),
    ) -> Option<Run<'_, B>> {
        let [a, b, c, d, e, f, from @ .., _, _] = header;
        let (to, from) = (Mac::new([a, b, c, d, e, f]), Mac::new(from));
        if to.is_group() {
            return None;
        }
        self.begin();
        if !self.suspect.is_empty() && guard::may_be_ip(header) {
            return None;
        }
        let Self { membership, touched, counts, now, own, moment, limited, one_source, .. } = self;
        let network = &*membership.network;
        let port = membership.port;
        membership.admit_source(own, from, *now).ok()?;
        if *one_source && policy::may_be_arp(header) {
            return None;
        }
        // The gateway's address is behind no port.
        let (index, route) = match network.table.locate(to, *now) {
            Some(Located { port: target, .. })
                if target.index() == port.index() || target.is_apart_from(port) =>
            {
                None
            }
            Some(located) => Some((located.port.index(), Route::Known(located))),
            None if Some(to) == network.gateway_mac => None,
            None => match network.audience_of_unknown(port) {
                Audience::Uplink(index) => Some((index, Route::Uplink)),
                _ => None,
            },
        }?;
        let state = network.port_state(index)?;
        let key = network.flow_key;
        let (number, wanted, queue) = state.queues.pick_for_run(wanted, key, &mut frames)?;
        let longest = || longest_of(wanted, &mut frames);
        let is_for_it = || route.holds(network, index);
        let sending = if *limited { membership.port_state() } else { None };
        let receiving = state.policy.is_limited(Way::Receive).then_some(state);
        let claim = if sending.is_none() && receiving.is_none() {
            queue.claim(wanted, longest, is_for_it)?
        } else {
            let limits = [(Way::Send, sending), (Way::Receive, receiving)]
                .map(|(way, state)| (way, state.map(|state| &state.policy)));
            policy::within(limits, wanted, *moment, |wanted| {
                let claim = queue.claim(wanted, longest, is_for_it);
                (claim.as_ref().map_or(0, Claim::left), claim)
            })?
        };
        touched.add(index, number);
        let longest = network.max_untagged_size;
        Some(Run { claim, counts, packets: 0, bytes: 0, longest, header })
    }

    /// Begins a batch, if none has begun: reads the clock once, for all its frames.
    #[inline]
    fn begin(&mut self) {
        if !self.unflushed {
            self.unflushed = true;
            let now = self.membership.network.read_clock();
            (self.now, self.moment) = (now.as_secs() as u32, Moment::new(now));
            self.limited = self
                .membership
                .port_state()
                .is_some_and(|state| state.policy.is_limited(Way::Send));
        }
    }

    /// Adds to a counter of this batch.
    fn count(&mut self, counter: SendCounter, amount: u64) {
        self.counts.add(counter, amount);
    }

    /// Sends a frame where it belongs, unless the role of the port forbids it.
    #[inline]
    fn forward(&mut self, frame: Packet<'_>) -> Sent {
        if !self.suspect.is_empty() && guard::may_serve(frame.head()) {
            return self.forward_suspect(frame);
        }
        self.forward_permitted(frame)
    }

    /// Looks at all headers of a frame before it is sent. The sender has a copy of it by then, which its
    /// guest cannot change.
    #[cold]
    fn forward_suspect(&mut self, frame: Packet<'_>) -> Sent {
        let mut copy = core::mem::take(&mut self.suspect);
        let sent = if frame.len() > copy.len() {
            Sent::Dropped(DropReason::TooBig)
        } else {
            let len = frame.copy_to(0, &mut copy);
            if guard::serves(&copy[..len]) {
                Sent::Dropped(DropReason::Role)
            } else {
                let packet = Packet::from(&copy[..len]).with_offload(frame.offload());
                self.forward_permitted(packet)
            }
        };
        self.suspect = copy;
        sent
    }

    /// Decides where a frame goes, by the rules of the [`network`](crate::network) module, and
    /// sends it there.
    fn forward_permitted(&mut self, frame: Packet<'_>) -> Sent {
        let port = self.membership.port;
        let network = &*self.membership.network;
        let frames = if frame.asks() {
            match self.check_offload(&frame) {
                Ok(frames) => frames,
                Err(reason) => return Sent::Dropped(reason),
            }
        } else if frame.len() > network.max_untagged_size
            && (frame.len() > network.max_packet_size || !frame::is_tagged(frame.head()))
        {
            return Sent::Dropped(DropReason::TooBig);
        } else {
            1
        };
        let Some(&[a, b, c, d, e, f, g, h, i, j, k, l, ..]) =
            frame.head().first_chunk::<ETHERNET_HEADER_LEN>()
        else {
            return Sent::Dropped(DropReason::Runt);
        };
        let (to, from) = (Mac::new([a, b, c, d, e, f]), Mac::new([g, h, i, j, k, l]));
        if let Err(reason) = self.membership.admit_source(&mut self.own, from, self.now) {
            return Sent::Dropped(reason);
        }
        if self.one_source && policy::names_other_sender(frame.head()) {
            return Sent::Dropped(DropReason::Spoofed);
        }
        if self.limited
            && let Some(state) = self.membership.port_state()
            && !state.policy.admits(Way::Send, frames, frame.len(), self.moment)
        {
            return Sent::Dropped(DropReason::SendLimit);
        }
        if to.is_group() {
            if to.is_reserved() {
                return Sent::Dropped(DropReason::Reserved);
            }
            let gateway = network.gateway_hears(port, to);
            let audience = network.audience_of_group(port);
            if gateway && let Err(reason) = self.ask_gateway(frame) {
                self.count(counter_of(reason), 1);
            }
            return match audience {
                Audience::Nobody(_) if gateway => Sent::Gateway,
                audience => self.flood(audience, frame, frames),
            };
        }
        if Some(to) == network.gateway_mac {
            if let Some((router, outbox)) =
                network.router.as_ref().zip(self.membership.outbox.as_ref())
                && let Some(worker) = router.takes(&frame, self.now)
            {
                let delivery = outbox.deliver(worker, frame);
                return self.sent_to_router(worker, delivery);
            }
            return match self.ask_gateway(frame) {
                Ok(()) => Sent::Gateway,
                Err(reason) => Sent::Dropped(reason),
            };
        }
        // If the address has moved since it was looked up, it is looked up again.
        for _ in 0..LOOKUPS {
            let network = &*self.membership.network;
            let (index, route) = match network.table.locate(to, self.now) {
                Some(Located { port: target, .. }) if target.index() == port.index() => {
                    return Sent::Dropped(DropReason::OwnPort);
                }
                Some(Located { port: target, .. }) if target.is_apart_from(port) => {
                    return Sent::Dropped(DropReason::Isolated);
                }
                Some(located) => (located.port.index(), Route::Known(located)),
                None => match network.audience_of_unknown(port) {
                    Audience::Uplink(index) => (index, Route::Uplink),
                    audience => return self.flood(audience, frame, frames),
                },
            };
            match self.deliver(index, route, frame) {
                Ok(()) => return Sent::Forwarded,
                Err(DropReason::Closed)
                    if !route.holds(&self.membership.network, index) && !frame.asks() => {}
                Err(reason) => return Sent::Dropped(reason),
            }
        }
        Sent::Dropped(DropReason::Closed)
    }

    /// Checks a packet that leaves work to others. Returns how many frames it is once it is cut.
    #[cold]
    fn check_offload(&self, frame: &Packet<'_>) -> Result<usize, DropReason> {
        let Membership { network, offloads, longest, .. } = &*self.membership;
        let header = frame.offload();
        // The checksum is that of a transport header behind an IP header. Else whoever completes it
        // would write into what was decided by: a tag, an EtherType, or the sender that ARP names.
        let is_transport = |start: u16| {
            let ip = frame::ip_at(frame.head());
            ip.is_some_and(|at| usize::from(start) >= at + IPV4_HEADER_LEN)
        };
        let is_sound = match header.checksum {
            Checksum::Partial { start, .. } => is_transport(start),
            _ => false,
        };
        if !is_sound
            || header.validate(frame.len()).is_err()
            || software::left_by(offloads, header) != Left::Nothing
        {
            return Err(DropReason::BadOffload);
        }
        let tag = if frame::is_tagged(frame.head()) { 0 } else { VLAN_TAG_LEN };
        let (frames, segment) = frame.segments();
        if frame.len() > longest - tag || segment > network.max_packet_size - tag {
            return Err(DropReason::TooBig);
        }
        if frames > SEGMENTS_PER_PACKET {
            return Err(DropReason::NotSegmentable);
        }
        Ok(frames)
    }

    /// Does what is left of a packet's work, and passes each frame that results to `each`.
    #[cold]
    fn finish(
        &mut self,
        frame: Packet<'_>,
        left: Left,
        mut each: impl FnMut(&mut Self, Packet<'_>),
    ) -> Result<(), DropReason> {
        let network = &*self.membership.network;
        let longest = match frame::is_tagged(frame.head()) {
            true => network.max_packet_size,
            false => network.max_untagged_size,
        };
        let mut work = core::mem::take(&mut self.work);
        let finished = work.finish(frame, left, longest, |frame| each(self, frame));
        self.work = work;
        finished?;
        match left {
            Left::Checksum => self.count(SendCounter::Completed, 1),
            Left::Segments { .. } => self.count(SendCounter::Cut, 1),
            _ => {}
        }
        Ok(())
    }

    /// Does what a port does not do itself, and copies each frame that results to it. It is an error if
    /// the port accepted none of them.
    #[cold]
    fn deliver_finished(
        &mut self,
        index: usize,
        route: Route<B>,
        frame: Packet<'_>,
        left: Left,
    ) -> Result<(), DropReason> {
        let mut delivered = Err(DropReason::NoBuffer);
        self.finish(frame, left, |sender, frame| {
            let result = sender.deliver_to(index, route, frame, true);
            if delivered.is_err() {
                delivered = result;
            }
        })?;
        delivered
    }

    /// Copies a frame to one port, and does before what its receiver does not do itself.
    ///
    /// The index may be stale by a moment. A port that has left has a closed inbox. A port that has taken
    /// its place gets the frame only if `route` holds for it too.
    fn deliver(
        &mut self,
        index: usize,
        route: Route<B>,
        frame: Packet<'_>,
    ) -> Result<(), DropReason> {
        self.deliver_to(index, route, frame, false)
    }

    /// As [`deliver`](Self::deliver). If `is_finished`, the frame is what was left of a packet after the
    /// work that its receiver did not accept.
    fn deliver_to(
        &mut self,
        index: usize,
        route: Route<B>,
        frame: Packet<'_>,
        is_finished: bool,
    ) -> Result<(), DropReason> {
        let network = &*self.membership.network;
        let Some(state) = network.port_state(index) else { return Err(DropReason::Closed) };
        let missed = &state.counters.missed;
        let mut is_admitted = false;
        // A queue that has closed since it was picked gives its frames to another. So often can that be.
        for _ in 0..=QUEUES_MAX {
            let Some((number, queue)) = state.queues.pick(|| frame.flow(network.flow_key)) else {
                break;
            };
            let shape = queue.shape();
            if frame.asks() {
                let left = shape.left_by(frame.offload());
                if left != Left::Nothing && is_finished {
                    // The receiver has just refused what it accepted before, and was closed for it.
                    break;
                }
                if left != Left::Nothing {
                    return self.deliver_finished(index, route, frame, left);
                }
            }
            if !is_admitted
                && state.policy.is_limited(Way::Receive)
                && !state.policy.admits(Way::Receive, frame.segments().0, frame.len(), self.moment)
            {
                missed.receive_limit.fetch_add(1, Ordering::Relaxed);
                return Err(DropReason::ReceiveLimit);
            }
            is_admitted = true;
            match queue.deliver(shape, frame, || route.holds(network, index)) {
                Delivery::Direct | Delivery::Overflow => {
                    self.touched.add(index, number);
                    return Ok(());
                }
                Delivery::Dropped(Refused::NoBuffer) => {
                    missed.no_buffer.fetch_add(1, Ordering::Relaxed);
                    return Err(DropReason::NoBuffer);
                }
                Delivery::Dropped(Refused::TooBig) => return Err(DropReason::TooBig),
                Delivery::Dropped(Refused::Closed | Refused::Stale) => {}
            }
        }
        // Another port has missed nothing.
        if route.holds(network, index) {
            missed.closed.fetch_add(1, Ordering::Relaxed);
        }
        Err(DropReason::Closed)
    }

    /// Copies a frame to an audience, except this port, if the flood limit of this port allows it.
    #[cold]
    fn flood(&mut self, audience: Audience, frame: Packet<'_>, frames: usize) -> Sent {
        if let Audience::Nobody(reason) = audience {
            return Sent::Dropped(reason);
        }
        let admits = |state: &PortState<B>| state.policy.admits_flood(frames, self.moment);
        if !self.membership.port_state().is_some_and(admits) {
            return Sent::Dropped(DropReason::FloodLimit);
        }
        let own = Some(self.membership.index);
        let reached = match audience {
            Audience::Uplink(index) => {
                u32::from(self.deliver_to_one_of_all(index, Route::Uplink, frame))
            }
            Audience::NotIsolated => self.send_to_all(|network| &network.floodable, own, frame),
            Audience::All => self.send_to_all(|network| &network.open, own, frame),
            Audience::Anonymous => self.send_to_all(|network| &network.anonymous, own, frame),
            Audience::Nobody(_) => 0,
        };
        Sent::Flooded { reached }
    }

    /// Copies a frame to all ports of a set, except one. Returns how many accepted it.
    fn send_to_all(
        &mut self,
        set: fn(&Network<B>) -> &[AtomicU64; WORDS],
        except: Option<usize>,
        frame: Packet<'_>,
    ) -> u32 {
        let mut reached = 0;
        for word in 0..WORDS {
            // Acquire: pairs with the Release in `Network::set_open`; the ports are ready.
            let mut ports = set(&self.membership.network)[word].load(Ordering::Acquire);
            if let Some(except) = except.filter(|except| except / 64 == word) {
                ports &= !(1 << (except % 64));
            }
            while ports != 0 {
                let index = word * 64 + ports.trailing_zeros() as usize;
                ports &= ports - 1;
                let delivered = self.deliver_to_one_of_all(index, Route::Member(set), frame);
                reached += u32::from(delivered);
            }
        }
        reached
    }

    /// Copies a frame that is for all to one port, and counts it if it cannot be made such as the port
    /// takes it. Returns whether the port accepted it.
    fn deliver_to_one_of_all(&mut self, index: usize, route: Route<B>, frame: Packet<'_>) -> bool {
        let delivered = self.deliver(index, route, frame);
        if let Err(reason) = delivered
            && !matches!(counter_of(reason), SendCounter::NoReceiver)
        {
            self.count(counter_of(reason), 1);
        }
        delivered.is_ok()
    }

    /// Notes what became of a frame for a worker of the router.
    fn sent_to_router(&mut self, worker: usize, delivery: Delivery) -> Sent {
        match delivery {
            Delivery::Direct | Delivery::Overflow => {
                self.routed |= 1 << worker;
                self.count(SendCounter::ToRouter, 1);
                Sent::Gateway
            }
            Delivery::Dropped(Refused::TooBig) => Sent::Dropped(DropReason::TooBig),
            Delivery::Dropped(_) => {
                // It is told all the same, because it may not run.
                self.routed |= 1 << worker;
                Sent::Dropped(DropReason::RouterBusy)
            }
        }
    }

    /// Gives the gateway a frame, once all its work is done. Its reply comes back to this port and no
    /// other. What it asks all goes to all, also to this port, behind which there may be several stations.
    fn ask_gateway(&mut self, frame: Packet<'_>) -> Result<(), DropReason> {
        if !frame.asks() {
            self.ask_gateway_finished(frame);
            return Ok(());
        }
        let left = software::left_by(&Offloads::default(), frame.offload());
        self.finish(frame, left, Self::ask_gateway_finished)
    }

    fn ask_gateway_finished(&mut self, frame: Packet<'_>) {
        let network = &*self.membership.network;
        let Some(gateway) = &network.gateway else { return };
        let (port, now) = (self.membership.index as u32, network.read_clock());
        // `forward` has checked that it is no longer than a packet of the network.
        let len = frame.copy_to(0, &mut self.question);
        let answer = gateway.handle(&self.question[..len], port, &mut self.reply, now);
        self.count(SendCounter::ToGateway, 1);
        if let Some(len) = answer.reply {
            let reply = core::mem::take(&mut self.reply);
            // If the port has no buffer for the reply, `deliver` counts the drop.
            let _ = self.deliver(self.membership.index, Route::Own, Packet::from(&reply[..len]));
            self.reply = reply;
        }
        if let Some(question) = answer.to_all {
            self.send_to_all(|network| &network.open, None, Packet::from(&question[..]));
        }
        self.advertise_if_due(now);
    }

    /// Gives this port a router advertisement, if it has got none for long.
    fn advertise_if_due(&mut self, now: Duration) {
        let Membership { network, index, port, .. } = &*self.membership;
        let Some(gateway) = network.gateway.as_ref().filter(|_| !port.is_uplink()) else { return };
        let due = gateway.router_advertisement_if_due(*index as u32, &mut self.reply, now);
        if let Some(len) = due {
            let advertisement = core::mem::take(&mut self.reply);
            let packet = Packet::from(&advertisement[..len]);
            let _ = self.deliver(self.membership.index, Route::Own, packet);
            self.reply = advertisement;
        }
    }

    /// Wakes every receiver that sleeps and got a frame since the last flush, each once, and
    /// publishes this sender's counters. It costs almost nothing if nothing was sent.
    pub fn flush(&mut self) {
        if !core::mem::take(&mut self.unflushed) {
            return;
        }
        let network = &*self.membership.network;
        if let Some(state) = self.membership.port_state() {
            self.counts.take(|counter, count| {
                state.counters.sent[counter].fetch_add(count, Ordering::Relaxed);
            });
        }
        let routed = core::mem::take(&mut self.routed);
        if routed != 0
            && let Some(router) = &network.router
        {
            router.ring(self.membership.index, routed);
        }
        self.touched.take(|index, queues| {
            if let Some(state) = network.port_state(index) {
                state.queues.ring(queues);
            }
        });
    }
}

/// What a sender has counted since its last flush.
#[derive(Default)]
struct Counts {
    sums: [u64; SEND_COUNTERS],
    /// A bit for each counter that was added to.
    used: u32,
}

const _: () = assert!(SEND_COUNTERS <= u32::BITS as usize);

impl Counts {
    #[inline(always)]
    fn add(&mut self, counter: SendCounter, amount: u64) {
        self.sums[counter as usize] += amount;
        self.used |= 1 << counter as usize;
    }

    /// Gives each counter that was added to, with its sum, to `each`.
    fn take(&mut self, mut each: impl FnMut(usize, u64)) {
        let mut used = core::mem::take(&mut self.used);
        while used != 0 {
            let counter = used.trailing_zeros() as usize;
            each(counter, core::mem::take(&mut self.sums[counter]));
            used &= used - 1;
        }
    }
}

/// The ports that a sender has given frames to since its last flush.
struct TouchedPorts {
    /// A bit for each word of `ports` that is not 0.
    words: u32,
    /// A bit for each port.
    ports: [u64; WORDS],
    /// Which queues of each port.
    queues: Box<[Touched]>,
}

const _: () = assert!(WORDS <= u32::BITS as usize);

impl TouchedPorts {
    fn new() -> Self {
        let queues = vec![Touched::default(); MAX_PORTS].into();
        Self { words: 0, ports: [0; WORDS], queues }
    }

    #[inline(always)]
    fn add(&mut self, port: usize, queue: usize) {
        self.words |= 1 << (port / 64);
        self.ports[port / 64] |= 1 << (port % 64);
        self.queues[port].add(queue);
    }

    /// Gives each port, with its queues, to `each`.
    fn take(&mut self, mut each: impl FnMut(usize, QueueSet)) {
        let mut words = core::mem::take(&mut self.words);
        while words != 0 {
            let word = words.trailing_zeros() as usize;
            let mut ports = core::mem::take(&mut self.ports[word]);
            while ports != 0 {
                let port = word * 64 + ports.trailing_zeros() as usize;
                each(port, self.queues[port].take());
                ports &= ports - 1;
            }
            words &= words - 1;
        }
    }
}

/// The length of the longest of the next `count` frames. If they are not shown, they may have any length.
#[cold]
fn longest_of(
    count: usize,
    frames: &mut impl FnMut(&mut dyn FnMut(NextFrame<'_>) -> bool),
) -> usize {
    let (mut longest, mut seen) = (None, 0);
    frames(&mut |frame| {
        longest = longest.max(Some(frame.len()));
        seen += 1;
        seen < count
    });
    longest.unwrap_or(usize::MAX)
}

/// What counts the frames that were dropped for this reason.
fn counter_of(reason: DropReason) -> SendCounter {
    match reason {
        DropReason::Runt => SendCounter::Runt,
        DropReason::TooBig => SendCounter::TooBig,
        DropReason::BadSource => SendCounter::BadSource,
        DropReason::Isolated => SendCounter::Isolated,
        DropReason::Reserved => SendCounter::Reserved,
        DropReason::OwnPort => SendCounter::OwnPort,
        DropReason::Spoofed => SendCounter::Spoofed,
        DropReason::Role => SendCounter::Role,
        DropReason::Unknown => SendCounter::Unknown,
        DropReason::SendLimit => SendCounter::SendLimit,
        DropReason::FloodLimit => SendCounter::FloodLimit,
        DropReason::BadOffload => SendCounter::BadOffload,
        DropReason::NotSegmentable => SendCounter::NotSegmentable,
        DropReason::RouterBusy => SendCounter::RouterBusy,
        DropReason::NoBuffer | DropReason::Closed | DropReason::ReceiveLimit => {
            SendCounter::NoReceiver
        }
    }
}

/// Frames of one sender to one port, whose buffers are already claimed; see [`Sender::run`].
///
/// The receiver waits for them, so put them at once. Buffers that are left when the run is dropped
/// become packets of no bytes.
///
/// # Leaks
///
/// Do not forget a run, for example with [`mem::forget`](core::mem::forget): the port gets no later
/// packet, and its [`Receiver`]'s [`close`](Receiver::close) and drop wait for ever. See [`Claim`]
/// for why they cannot give up.
pub struct Run<'a, B: PacketBuffer> {
    claim: Claim<'a, B>,
    counts: &'a mut Counts,
    /// What was put, which is counted when the run is dropped.
    packets: u64,
    bytes: u64,
    /// The longest frame that can be put.
    longest: usize,
    /// What each frame begins with.
    header: [u8; ETHERNET_HEADER_LEN],
}

impl<B: PacketBuffer> fmt::Debug for Run<'_, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("left", &self.left()).finish_non_exhaustive()
    }
}

impl<B: PacketBuffer> Run<'_, B> {
    /// Returns how many frames are still to be put. The receiver waits for them.
    #[inline]
    pub fn left(&self) -> usize {
        self.claim.left()
    }

    /// Copies the next frame to the port. The frame must begin with the run's Ethernet header. Returns
    /// false, and does nothing, if the frame is longer than the run was made for, or than the network's
    /// longest frame without a tag, or if no frame is left to put. [`send`](Sender::send) takes a
    /// longer frame if it has a tag.
    #[inline]
    pub fn put(&mut self, frame: &[u8]) -> bool {
        let done = frame.len() <= self.longest && self.claim.fill(frame);
        self.count(done, frame.len());
        done
    }

    /// Copies the next frames to the port, as [`put`](Self::put) does, until one is too long or no frame is
    /// left to put. Returns how many there were, and their bytes.
    #[inline(always)]
    pub fn put_all<'f>(&mut self, frames: impl Iterator<Item = &'f [u8]>) -> (usize, u64) {
        let (count, bytes) = self.claim.fill_all(frames, self.longest);
        (self.packets, self.bytes) = (self.packets + count as u64, self.bytes + bytes);
        (count, bytes)
    }

    /// As [`put`](Self::put), for a packet in the memory of a guest. The receiver gets the run's
    /// header, whatever the guest has written there since it was read.
    #[inline]
    pub fn put_guest(&mut self, frame: &GuestBuffer) -> bool {
        let done = frame.len() <= self.longest && self.claim.fill_guest(frame, &self.header);
        self.count(done, frame.len());
        done
    }

    #[inline]
    fn count(&mut self, done: bool, len: usize) {
        if done {
            self.packets += 1;
            self.bytes += len as u64;
        }
    }
}

impl<B: PacketBuffer> Drop for Run<'_, B> {
    #[inline]
    fn drop(&mut self) {
        self.counts.add(SendCounter::Packets, self.packets);
        self.counts.add(SendCounter::Bytes, self.bytes);
    }
}

impl<B: PacketBuffer> Drop for Sender<B> {
    fn drop(&mut self) {
        self.flush();
    }
}
