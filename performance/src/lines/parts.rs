//! The parts of which vmring's own network is made, without a ring in front of them: an inbox, and a
//! network's port.

use std::sync::Arc;

use vmring::Frame;
use vmring::pool::{Pool, PoolBuilder};
use vmring_embedded::inbox::{Collector, Inbox};
use vmring_embedded::port;
use vmring_embedded::{Network, NetworkConfig, NetworkMode, PortConfig};

use crate::guests::inspection::{FROM, Inspection, PACKETS, TO, numbered, packet};
use crate::guests::traffic::{BATCH, Carried, Receiver, Sender, Traffic, WINDOW, carry};
use crate::net::{ETHERNET, FULL_FRAME};
use crate::result::Result;

/// The cells of a port's inbox by default.
const CELLS: u32 = 1024;

/// The frames of one side, in a pool like a ring's.
fn pool(frames: usize, length: usize) -> Result<Pool> {
    Ok(PoolBuilder::new(frames, length).prefault(true).build()?)
}

/// A frame for each packet that is sent in turn.
fn sent_frames(expected: &[u8]) -> Result<Vec<Frame>> {
    let pool = pool(PACKETS, expected.len())?;
    let frame = |packet: Vec<u8>| -> Result<Frame> {
        let mut frame = pool.alloc().ok_or("a pool has too few frames")?;
        frame.copy_from(&packet)?;
        Ok(frame)
    };
    numbered(expected).map(frame).collect()
}

/// The receiving end of either.
trait End: Send {
    fn stage(&mut self, frame: Frame) -> std::result::Result<(), Frame>;
    fn publish(&mut self);
    fn collect(&mut self) -> Option<(Frame, usize)>;
}

impl End for Collector<Frame> {
    #[inline(always)]
    fn stage(&mut self, frame: Frame) -> std::result::Result<(), Frame> {
        Collector::stage(self, frame)
    }

    #[inline]
    fn publish(&mut self) {
        Collector::publish(self);
    }

    #[inline(always)]
    fn collect(&mut self) -> Option<(Frame, usize)> {
        Collector::collect(self).map(|packet| (packet.buffer, packet.len))
    }
}

impl End for port::Receiver<Frame> {
    #[inline(always)]
    fn stage(&mut self, frame: Frame) -> std::result::Result<(), Frame> {
        port::Receiver::stage(self, frame)
    }

    #[inline]
    fn publish(&mut self) {
        port::Receiver::publish(self);
    }

    #[inline(always)]
    fn collect(&mut self) -> Option<(Frame, usize)> {
        port::Receiver::collect(self)
    }
}

struct PartReceiver<E> {
    end: E,
    /// The batch that is being inspected.
    came: Vec<(Frame, usize)>,
}

impl<E: End> PartReceiver<E> {
    /// Posts a window of frames.
    fn new(mut end: E, length: usize) -> Result<Self> {
        let pool = pool(2 * WINDOW, length)?;
        for _ in 0..WINDOW {
            let mut frame = pool.alloc().ok_or("a pool has too few frames")?;
            frame.set_len(frame.capacity())?;
            end.stage(frame).map_err(|_| "an inbox has too few cells")?;
        }
        end.publish();
        Ok(Self { end, came: Vec::with_capacity(BATCH) })
    }
}

impl<E: End> Receiver for PartReceiver<E> {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let Self { end, came } = self;
        while came.len() < BATCH
            && let Some(packet) = end.collect()
        {
            came.push(packet);
        }
        if came.is_empty() {
            return Ok(false);
        }
        for (frame, length) in came.iter() {
            inspection.inspect(&frame[..*length]);
        }
        for (frame, _) in came.drain(..) {
            end.stage(frame).map_err(|_| "an inbox has no room for what came out of it")?;
        }
        end.publish();
        Ok(true)
    }
}

struct InboxSender<'a> {
    inbox: &'a Inbox<Frame>,
    frames: Vec<Frame>,
    sent: usize,
}

impl Sender for InboxSender<'_> {
    fn send(&mut self) -> Result<bool> {
        let Some(mut claim) = self.inbox.claim(BATCH) else { return Ok(false) };
        while claim.left() > 0 {
            if !claim.fill(&self.frames[self.sent % PACKETS]) {
                return Err("a packet is too long".into());
            }
            self.sent += 1;
        }
        drop(claim);
        self.inbox.ring();
        Ok(true)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(Some(self.sent as u64))
    }
}

/// Measures an inbox between a sender that claims a batch at a time and its collector.
pub(super) fn measure_inbox(traffic: Traffic) -> Result<Carried> {
    let expected = packet(traffic.length, TO, FROM);
    let inbox = Arc::new(Inbox::new(CELLS, 0, traffic.length));
    let collector = Inbox::open(&inbox, Arc::new(|| {})).ok_or("a new inbox is open")?;
    let receiver = PartReceiver::new(collector, traffic.length)?;
    let frames = sent_frames(&expected)?;
    carry(InboxSender { inbox: &inbox, frames, sent: 0 }, receiver, expected, traffic)
}

struct PortSender {
    port: port::Sender<Frame>,
    frames: Vec<Frame>,
    header: [u8; ETHERNET],
    sent: usize,
}

impl Sender for PortSender {
    fn send(&mut self) -> Result<bool> {
        let Some(mut run) = self.port.run(self.header, BATCH, |_| {}) else {
            return Ok(false);
        };
        while run.left() > 0 {
            if !run.put(&self.frames[self.sent % PACKETS]) {
                return Err("a packet is too long".into());
            }
            self.sent += 1;
        }
        drop(run);
        self.port.flush();
        Ok(true)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(Some(self.sent as u64))
    }
}

/// Measures two ports of a network, whose sender sends a run at a time.
pub(super) fn measure_port(traffic: Traffic) -> Result<Carried> {
    let mut config = NetworkConfig::of(NetworkMode::Host);
    config.mtu = (traffic.length.max(FULL_FRAME) - ETHERNET) as u32;
    let network = Network::new(config)?;
    let join = |number: u8| network.join(PortConfig::new([number; 16], Arc::new(|| {})));
    let (from, to) = (join(1)?, join(2)?);
    let expected = packet(traffic.length, to.mac().into_array(), from.mac().into_array());
    let header = *expected.first_chunk().ok_or("a packet without a header")?;
    // A posted buffer has space for the longest packet of the network.
    let receiver = PartReceiver::new(to.split().0, network.max_packet_size())?;
    let (_unread, port) = from.split();
    let frames = sent_frames(&expected)?;
    carry(PortSender { port, frames, header, sent: 0 }, receiver, expected, traffic)
}
