//! The reference device: packets that are written to an interface are read from the same interface,
//! in order.

use std::sync::Arc;

use vmring_core::sync::{self, AtomicUsize, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::inbox::{Delivery, Inbox, Refused};

use crate::config::{Direction, InterfaceConfig, InterfaceInfo};
use crate::device::common::{mac_of, no_offloads};
use crate::device::context::PollContext;
use crate::device::inbox_reader::InboxReader;
use crate::device::seam::{Capabilities, Device, Driver, Progress, Queue, Wake};
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
}

impl Loop {
    fn new(info: InterfaceInfo) -> Self {
        let inbox = sync::Arc::new(Inbox::new(
            INBOX_READS_MAX,
            LOOPBACK_QUEUE,
            info.max_packet_size as usize,
        ));
        Self { info, shared: Arc::new(LoopShared { inbox, writers: AtomicUsize::new(0) }) }
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
        caps
    }

    fn queue(&self, direction: Direction, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let collector = if direction.reads() {
            let wake = Arc::new(move || wake.wake());
            // The library opens one reading queue at a time (`Capabilities::reading_rings`), so the
            // last one has closed.
            Some(Inbox::open(&self.shared.inbox, wake).ok_or(Status::SetupIncomplete)?)
        } else {
            None
        };
        let tx = direction.writes().then(|| Writer::new(&self.shared));
        Ok(Box::new(LoopQueue { tx, rx: collector.map(InboxReader::new), lends: false }))
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
    tx: Option<Writer>,
    rx: Option<InboxReader>,
    /// Whether the poller's reads are posted to the inbox.
    lends: bool,
}

impl LoopQueue {
    /// Whether the poller's reads must be posted to the inbox: other rings may fill them, or
    /// packets wait for them there. Otherwise they stay with the poller, where this ring's own
    /// writes find them.
    fn has_to_lend(&self) -> bool {
        !self.tx.as_ref().is_some_and(|tx| tx.is_alone() && !tx.inbox().frames_wait())
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
            write(cx, tx.inbox(), self.rx.as_mut().filter(|_| !self.lends));
        }
        Ok(self.rx.as_mut().map_or(Progress::Idle, |rx| rx.collect(cx)))
    }

    fn arm(&mut self) -> bool {
        // Arm first, look afterwards: a writer that comes after the look rings.
        let armed = self.rx.as_mut().is_none_or(InboxReader::arm);
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
/// reads.
#[inline(always)]
fn write(cx: &mut PollContext<'_>, inbox: &Inbox<PostedSlot>, own: Option<&mut InboxReader>) {
    let mut sent = false;
    let max = inbox.max_frame();
    // One claim for as many packets as buffers are posted for. The rest goes one by one.
    if own.as_ref().is_none_or(|rx| rx.end.posted() > 0)
        && let Some(mut claim) =
            inbox.claim(cx.leading_writes(|packet| packet.frame().is_some() && packet.len() <= max))
    {
        while claim.left() > 0
            && let Some(slot) = cx.take_write()
        {
            claim.fill(slot.frame_bytes());
            cx.complete_write(slot);
        }
        sent = true;
    }
    if let Some(rx) = own {
        // Reads that are still in the inbox are older than the poller's, so they are filled first.
        rx.collect(cx);
        if rx.end.posted() == 0 {
            pass(cx);
        }
    }
    while let Some(slot) = cx.take_write() {
        match inbox.deliver(slot.frame_bytes()) {
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
}

/// Copies each write into the next read, as long as there are both.
#[inline(always)]
fn pass(cx: &mut PollContext<'_>) {
    while let Some(from) = cx.take_write() {
        let Some(mut to) = cx.take_read() else { return cx.put_back(from) };
        let len = from.len();
        let space = to.buffer_mut().and_then(|buffer| buffer.get_mut(..len));
        if let (Some(packet), Some(space)) = (from.frame(), space) {
            space.copy_from_slice(packet);
            cx.complete_write(from);
            cx.complete_read(to, len);
        } else {
            cx.fail(from, Status::PacketTooBig);
            cx.put_back(to);
        }
    }
}
