//! The reference device: packets that are written to an interface are read from the same interface,
//! in order.

use std::sync::Arc;

use vmring_core::Buffer;
use vmring_core::guest::SEGMENTS_MAX;
use vmring_core::sync::{self, AtomicU64, AtomicUsize, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::inbox::{Delivery, Inbox, Refused};

use crate::config::{InterfaceConfig, InterfaceInfo};
use crate::device::bounce::is_complete;
use crate::device::common::{mac_of, no_offloads};
use crate::device::context::PollContext;
use crate::device::inbox_reader::InboxReader;
use crate::device::seam::{Capabilities, Device, Driver, Progress, Queue, QueueConfig, Wake};
use crate::device::slot::PostedSlot;
use crate::error::{ConfigError, Error, Status};
use crate::limits::{INBOX_READS_MAX, LOOPBACK_QUEUE};

/// A driver for [`Interface::builder`](crate::Interface::builder) whose interface is connected to
/// itself: a packet that is written is read again.
///
/// One ring can read, and any number of rings can write. If no read is posted, up to 256 packets
/// wait. After that the device takes no more, and writes complete with [`Status::BufferExhausted`]
/// once the retry budget is used up.
///
/// If the ring that reads is also the only ring that writes, its writes fill its own reads
/// directly. When another ring is built that writes, the reads become available to it at the next
/// poll of the reading ring.
#[derive(Clone, Debug)]
pub struct Loopback {
    mtu: u32,
}

impl Loopback {
    /// Returns a driver for IP packets of up to `mtu` bytes, which must be 1 to 65,521. An Ethernet
    /// frame has 14 bytes more. The MTU of the interface's settings, if there is one, overrides
    /// `mtu`.
    pub fn new(mtu: u32) -> Self {
        Self { mtu }
    }
}

impl Driver for Loopback {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        no_offloads(config, "loopback")?;
        let mtu = config.mtu.unwrap_or(self.mtu);
        if !(1..=65_521).contains(&mtu) {
            let sentence = format!("a loopback's MTU must be 1 to 65,521 bytes, not {mtu}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        let mac = mac_of(config);
        Ok(Arc::new(Loop::new(InterfaceInfo::new(
            config,
            mac,
            mtu,
            mtu + ETHERNET_HEADER_LEN as u32,
        ))))
    }
}

struct Loop {
    info: InterfaceInfo,
    shared: Arc<LoopShared>,
}

/// The state that the interface's rings share.
struct LoopShared {
    inbox: sync::Arc<Inbox<PostedSlot>>,
    /// How many rings can write.
    writers: AtomicUsize,
    /// How many packets were dropped because the posted reads were too few for them.
    dropped: AtomicU64,
}

impl Loop {
    fn new(info: InterfaceInfo) -> Self {
        let inbox = sync::Arc::new(Inbox::new(
            INBOX_READS_MAX,
            LOOPBACK_QUEUE,
            info.max_packet_size as usize,
        ));
        Self {
            info,
            shared: Arc::new(LoopShared {
                inbox,
                writers: AtomicUsize::new(0),
                dropped: AtomicU64::new(0),
            }),
        }
    }
}

impl Device for Loop {
    fn name(&self) -> &str {
        "loopback"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.info.mtu, self.info.max_packet_size);
        caps.writing_rings = usize::MAX;
        (caps.read_segments, caps.write_segments) = (SEGMENTS_MAX, SEGMENTS_MAX);
        caps.merges_reads = true;
        caps.checks_headers = true;
        caps
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        vec![("too few reads", self.shared.dropped.load(Ordering::Relaxed))]
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let direction = config.direction;
        let collector = if direction.reads() {
            let wake = Arc::new(move || wake.wake());
            // The library opens one reading queue at a time (`Capabilities::reading_rings`), so the
            // last one has closed.
            Some(Inbox::open(&self.shared.inbox, wake).ok_or(Status::SetupIncomplete)?)
        } else {
            None
        };
        let tx = direction.writes().then(|| Writer::new(&self.shared));
        Ok(Box::new(LoopQueue {
            shared: self.shared.clone(),
            tx,
            rx: collector.map(InboxReader::new),
            lends: false,
            merges: false,
        }))
    }
}

/// The writing side of a ring. It counts itself in [`LoopShared::writers`].
struct Writer(Arc<LoopShared>);

impl Writer {
    fn new(shared: &Arc<LoopShared>) -> Self {
        // Relaxed here and in the functions below: the count hands over no data. A reader that does
        // not see this writer yet has lent no reads, so the writer's packet waits in the inbox. The
        // fence of `Inbox::ring` pairs with that of `Collector::arm`: the reader is woken or sees
        // the packet (`frames_wait`), and lends its reads.
        shared.writers.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }

    fn inbox(&self) -> &Inbox<PostedSlot> {
        &self.0.inbox
    }

    fn is_alone(&self) -> bool {
        self.0.writers.load(Ordering::Relaxed) == 1
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.writers.fetch_sub(1, Ordering::Relaxed);
    }
}

struct LoopQueue {
    shared: Arc<LoopShared>,
    tx: Option<Writer>,
    rx: Option<InboxReader>,
    /// Whether the poller's reads are posted to the inbox.
    lends: bool,
    /// Whether a packet was seen that fills several reads, which is the inbox's work.
    merges: bool,
}

impl LoopQueue {
    /// Whether the poller's reads must be posted to the inbox: other rings may fill them, or
    /// packets wait for them there. Otherwise they stay with the poller, where this ring's own
    /// writes find them.
    fn has_to_lend(&self) -> bool {
        self.merges
            || !self.tx.as_ref().is_some_and(|tx| tx.is_alone() && !tx.inbox().frames_wait())
    }
}

impl LoopQueue {
    fn count_dropped(&mut self) {
        let dropped = self.rx.as_mut().map_or(0, |rx| rx.end.take_dropped());
        if dropped > 0 {
            self.shared.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
    }
}

impl Queue for LoopQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        self.lends = self.has_to_lend();
        if let Some(rx) = &mut self.rx {
            rx.begin_poll(cx);
            if self.lends {
                rx.post(cx);
            }
        }
        if let Some(tx) = &self.tx {
            self.merges |= write(cx, tx.inbox(), self.rx.as_mut().filter(|_| !self.lends));
        }
        let progress = self.rx.as_mut().map_or(Progress::Idle, |rx| rx.collect(cx));
        if self.merges {
            self.count_dropped();
        }
        Ok(progress)
    }

    fn arm(&mut self) -> bool {
        // Arm first, look afterwards: a writer that comes after the look rings.
        let armed = self.rx.as_mut().is_none_or(InboxReader::arm);
        self.count_dropped();
        armed && (self.lends || !self.has_to_lend())
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        self.rx.as_mut().map_or(0, |rx| rx.cancel(target))
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        if let Some(mut rx) = self.rx.take() {
            rx.close(cx);
        }
        self.tx = None;
        true
    }
}

/// Sends the poller's writes. `own` is this ring's reading side, if no other ring can fill its
/// reads. Returns whether a packet was longer than its next read.
#[inline(always)]
fn write(
    cx: &mut PollContext<'_>,
    inbox: &Inbox<PostedSlot>,
    own: Option<&mut InboxReader>,
) -> bool {
    let (mut sent, mut merges) = (false, false);
    let max = inbox.max_frame();
    // One claim for as many packets as buffers are posted for. The rest goes one by one.
    if own.as_ref().is_none_or(|rx| rx.end.posted() > 0)
        && let Some(mut claim) = inbox.claim(cx.leading_writes(|packet| is_sendable(packet, max)))
    {
        while claim.left() > 0
            && let Some(slot) = cx.take_write()
        {
            match slot.guest() {
                None => claim.fill(slot.frame_bytes()),
                Some(guest) => claim.fill_packet(guest.into()),
            };
            cx.complete_write(slot);
        }
        sent = true;
    }
    if let Some(rx) = own {
        // Reads that are still in the inbox are older than the poller's, so they are filled first.
        rx.collect(cx);
        if rx.end.posted() == 0 {
            merges = pass(cx);
        }
    }
    while let Some(slot) = cx.take_write() {
        let delivery = match slot.guest() {
            None => inbox.deliver(slot.frame_bytes()),
            Some(guest) if is_complete(guest) => inbox.deliver_packet(guest.into()),
            Some(_) => {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            }
        };
        match delivery {
            Delivery::Direct | Delivery::Overflow => {
                cx.complete_write(slot);
                sent = true;
            }
            Delivery::Dropped(Refused::TooBig) => cx.fail(slot, Status::PacketTooBig),
            Delivery::Dropped(_) => {
                cx.put_back(slot);
                break;
            }
        }
    }
    if sent {
        inbox.ring();
    }
    merges
}

/// Whether a claim takes a packet.
#[inline(always)]
fn is_sendable(packet: &Buffer, max: usize) -> bool {
    packet.len() <= max && packet.guest().is_none_or(is_complete)
}

/// Copies each write into the next read, as long as there are both. Returns whether a packet was longer
/// than its read.
#[inline(always)]
fn pass(cx: &mut PollContext<'_>) -> bool {
    // Those that were submitted by turns, as a loop that submits again what it has reaped does.
    cx.end_pairs(|packet, space| {
        space.copy_from_slice(packet);
        true
    });
    while let Some(from) = cx.take_write() {
        let Some(mut to) = cx.take_read() else {
            cx.put_back(from);
            break;
        };
        let len = from.len();
        let space = to.buffer_mut().and_then(|buffer| buffer.get_mut(..len));
        if let (Some(packet), Some(space)) = (from.frame(), space) {
            space.copy_from_slice(packet);
            cx.complete_write(from);
            cx.complete_read(to, len);
        } else if !pass_guest(cx, from, to) {
            return true;
        }
    }
    false
}

/// Copies a write into a read if one of the two is in the memory of a guest. Puts both back and returns
/// false if the packet is longer than the read.
#[inline(never)]
fn pass_guest(cx: &mut PollContext<'_>, from: PostedSlot, mut to: PostedSlot) -> bool {
    if from.guest().is_some_and(|guest| !is_complete(guest)) {
        cx.fail(from, Status::InvalidArgument);
        cx.put_back(to);
        return true;
    }
    match to.copy_from_slot(&from) {
        Ok(len) => {
            cx.complete_write(from);
            cx.complete_read(to, len);
            true
        }
        Err(_) => {
            cx.put_back(from);
            cx.put_back(to);
            false
        }
    }
}
