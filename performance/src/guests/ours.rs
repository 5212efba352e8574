//! vmring's own network between the guests.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmring::{Direction, Drive, Embedded, Frame, Interface, Poller, Ring};

use super::inspection::{Inspection, PACKETS, numbered, packet};
use super::traffic::{BATCH, Carried, Receiver, Sender, Traffic, WINDOW, carry};
use crate::net::{ETHERNET, FULL_FRAME};
use crate::result::Result;

/// Which thread drives the rings' engines.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driven {
    Inline,
    TwoPollers,
    SharedPoller,
}

impl Driven {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Inline => "vmring, inline",
            Self::TwoPollers => "vmring, two pollers",
            Self::SharedPoller => "vmring, one shared poller",
        }
    }
}

/// Reads that the receiver has posted, if a poller passes them to the network. Up to two windows of
/// them may still be on their way there when the sender is told about them, and one window is in
/// use.
const POLLED_READS: usize = 4 * WINDOW;
/// The reads that the sender is not told about.
const SPARE: u64 = (POLLED_READS - WINDOW) as u64;
/// The longest single sleep of a receiver with a poller.
const NAP: Duration = Duration::from_millis(1);

/// The number of packets that the sender may have sent in all, on a cache line of its own (two,
/// because processors fetch them in pairs).
#[repr(align(128))]
struct Allowed(AtomicU64);

impl Allowed {
    #[inline]
    fn set(&self, packets: u64) {
        // Release: pairs with the Acquire in `OurSender::send`. A sender that sees the number sees
        // what was posted before it.
        self.0.store(packets, Ordering::Release);
    }
}

struct OurSender<'a> {
    ring: Ring,
    /// Frames that are not in flight, each with its packet. The next one is first.
    idle: VecDeque<Frame>,
    allowed: &'a Allowed,
    length: usize,
    submitted: u64,
    sent: u64,
}

impl Sender for OurSender<'_> {
    fn send(&mut self) -> Result<bool> {
        let Self { ring, idle, allowed, length, submitted, sent } = self;
        // Acquire: pairs with the Release in `Allowed::set`. What is allowed has been posted.
        let allowed = allowed.0.load(Ordering::Acquire) - *submitted;
        let mut budget = allowed.min(BATCH as u64);
        let before = (*submitted, *sent);
        let (mut sq, mut cq) = ring.split();
        while budget > 0
            && let Some(frame) = idle.pop_front()
        {
            sq.submit_write(frame, 0)?;
            *submitted += 1;
            budget -= 1;
        }
        for done in cq.reap() {
            let frame = done.take_packet()?;
            if done.result != Ok(*length) {
                return Err(format!("a write gave {:?}", done.result).into());
            }
            *sent += 1;
            if budget > 0 {
                sq.submit_write(frame, 0)?;
                *submitted += 1;
                budget -= 1;
            } else {
                idle.push_back(frame);
            }
        }
        Ok((*submitted, *sent) != before)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        for done in self.ring.reap() {
            self.idle.push_back(done.take_packet()?);
            self.sent += 1;
        }
        Ok((self.ring.in_flight() == 0).then_some(self.sent))
    }
}

struct OurReceiver<'a> {
    ring: Ring,
    allowed: &'a Allowed,
    /// Reads submitted in all.
    submitted: u64,
    /// How many of them the sender was told about.
    told: u64,
    polled: bool,
    /// The batch that is being inspected.
    came: Vec<(Frame, u64)>,
}

impl Receiver for OurReceiver<'_> {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        if self.polled && self.ring.wait(1, Some(NAP)) == 0 {
            return Ok(false);
        }
        let before = self.submitted;
        let (mut sq, mut cq) = self.ring.split();
        let reap = cq.reap();
        // With this call an inline ring has posted what was submitted before it. As long as there
        // is nothing new, the cache line stays with the sender.
        if !self.polled && self.told != before {
            self.allowed.set(before);
            self.told = before;
        }
        // First takes all frames of a batch, then inspects each. So the cache lines of several
        // packets, which have to come from the sender's processor, are fetched at the same time.
        for done in reap.take(BATCH) {
            self.came.push((done.take_packet()?, 0));
        }
        for (frame, _) in &self.came {
            inspection.inspect(frame);
        }
        self.submitted += self.came.len() as u64;
        sq.submit_reads(self.came.drain(..))?;
        if self.polled {
            self.allowed.set(self.submitted - SPARE);
        }
        Ok(self.submitted != before)
    }
}

/// A guest's interface, on a network that carries packets of `length` bytes, or of the usual length
/// if that is more. A port queues a window of packets, for pollers that have not started yet.
fn start(length: usize) -> Result<Interface> {
    let network = Embedded::network("performance-guests").overflow(WINDOW as u32);
    let mtu = length.max(FULL_FRAME) - ETHERNET;
    Ok(Interface::builder().device(network).mtu(mtu as u32).start()?)
}

pub(crate) fn measure(driven: Driven, traffic: Traffic) -> Result<Carried> {
    let length = traffic.length;
    let (a, b) = (start(length)?, start(length)?);
    let poller = if driven == Driven::SharedPoller { Some(Poller::start()?) } else { None };
    let ring = |interface: &Interface, depth: usize| {
        let drive = match (driven, &poller) {
            (_, Some(poller)) => Drive::Shared(poller),
            (Driven::Inline, _) => Drive::Inline,
            _ => Drive::Thread,
        };
        let ring = interface.ring(Direction::Both).depth(depth as u32);
        ring.drive(drive).prefault(true).build()
    };
    let polled = driven != Driven::Inline;
    let reads = if polled { POLLED_READS } else { WINDOW };
    let (sending, mut receiving) = (ring(&a, PACKETS)?, ring(&b, reads)?);
    let expected = packet(length, b.mac().into_array(), a.mac().into_array());
    let mut idle = VecDeque::with_capacity(PACKETS);
    for packet in numbered(&expected) {
        let mut frame = sending.alloc().ok_or("the sender's ring has too few frames")?;
        frame.copy_from(&packet)?;
        idle.push_back(frame);
    }
    for _ in 0..reads {
        let frame = receiving.alloc().ok_or("the receiver's ring has too few frames")?;
        receiving.submit_read(frame, 0)?;
    }
    // An inline ring posts the reads when the receiver first looks, and then allows the packets.
    let allowed = Allowed(AtomicU64::new(if polled { WINDOW as u64 } else { 0 }));
    let allowed = &allowed;
    let sender = OurSender { ring: sending, idle, allowed, length, submitted: 0, sent: 0 };
    let submitted = reads as u64;
    let receiver = OurReceiver {
        ring: receiving,
        allowed,
        submitted,
        told: 0,
        polled,
        came: Vec::with_capacity(BATCH),
    };
    let measured = carry(sender, receiver, expected, traffic)?;
    let drops = [a.drops(), b.drops()].concat();
    if drops.iter().any(|(_, count)| *count != 0) {
        return Err(format!("packets were dropped: {drops:?}").into());
    }
    Ok(measured)
}
