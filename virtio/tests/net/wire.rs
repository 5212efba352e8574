//! A wire between two interfaces, as a device of the tests': with offloads, with merging, with several
//! readers, and with writes that end late or in another order.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmring::config::{InterfaceConfig, InterfaceInfo};
use vmring::device::{
    Capabilities, Device, Offloads, PollContext, PostedSlot, Progress, Queue, QueueConfig, Wake,
};
use vmring::{Driver, Error, Interface, MacAddr6, Status};

use crate::net::guest::HEADER;

type Packet = ([u8; HEADER], Vec<u8>);

/// What waits for one reader.
#[derive(Default)]
struct Inbox {
    packets: VecDeque<Packet>,
    wake: Option<Wake>,
    is_read: bool,
}

/// What both ends share.
struct Shared {
    /// By end, and then by reader.
    inboxes: [Vec<Mutex<Inbox>>; 2],
    /// Whether writes are kept.
    holds: AtomicBool,
    /// How many writes have been kept.
    kept: AtomicUsize,
    /// Whether reads are kept, and not given back when they are cancelled.
    holds_reads: AtomicBool,
    /// Whether kept writes end in the reverse order.
    reverses: AtomicBool,
}

/// What the tests do to a wire.
#[derive(Clone)]
pub(crate) struct Control(Arc<Shared>);

impl Control {
    /// Keeps writes from now on, or lets those end that were kept, at the next poll.
    pub(crate) fn hold(&self, holds: bool) {
        self.0.holds.store(holds, Ordering::SeqCst);
        self.wake();
    }

    /// Keeps reads from now on, or gives those back that are cancelled.
    pub(crate) fn hold_reads(&self, holds: bool) {
        self.0.holds_reads.store(holds, Ordering::SeqCst);
        self.wake();
    }

    /// A device whose entries can end wakes its rings.
    fn wake(&self) {
        for inbox in self.0.inboxes.iter().flatten() {
            if let Some(wake) = &lock(inbox).wake {
                wake.wake();
            }
        }
    }

    /// How many writes the device has taken.
    pub(crate) fn taken(&self) -> usize {
        self.0.kept.load(Ordering::SeqCst)
    }

    pub(crate) fn reverse(&self) {
        self.0.reverses.store(true, Ordering::SeqCst);
    }

    /// Puts a packet in front of an end, from nowhere.
    pub(crate) fn inject(&self, end: usize, header: [u8; HEADER], packet: Vec<u8>) {
        deliver(&self.0, end, (header, packet));
    }

    /// What arrived at an end and was not read, of all its readers.
    pub(crate) fn waiting(&self, end: usize) -> usize {
        self.0.inboxes[end].iter().map(|inbox| lock(inbox).packets.len()).sum()
    }
}

fn lock(inbox: &Mutex<Inbox>) -> MutexGuard<'_, Inbox> {
    inbox.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One flow stays with one reader: the byte behind the Ethernet header tells.
fn deliver(shared: &Shared, end: usize, packet: Packet) {
    let inboxes = &shared.inboxes[end];
    let flow = usize::from(packet.1.get(14).copied().unwrap_or(0)) % inboxes.len();
    let open = (0..inboxes.len()).map(|i| (flow + i) % inboxes.len());
    let to = open.into_iter().find(|i| lock(&inboxes[*i]).is_read).unwrap_or(flow);
    let mut inbox = lock(&inboxes[to]);
    inbox.packets.push_back(packet);
    let wake = inbox.wake.clone();
    drop(inbox);
    if let Some(wake) = wake {
        wake.wake();
    }
}

/// The interfaces at both ends of a wire with these capabilities.
pub(crate) fn wire(change: impl FnOnce(&mut Capabilities)) -> ([Interface; 2], Control) {
    let mut caps = Capabilities::new(1500, 1518);
    caps.writing_rings = 8;
    change(&mut caps);
    let inboxes = || (0..caps.reading_rings).map(|_| Mutex::default()).collect();
    let shared = Arc::new(Shared {
        inboxes: [inboxes(), inboxes()],
        holds: AtomicBool::new(false),
        kept: AtomicUsize::new(0),
        holds_reads: AtomicBool::new(false),
        reverses: AtomicBool::new(false),
    });
    let interfaces = [0, 1].map(|end| {
        let driver = WireDriver { end, caps, shared: shared.clone() };
        Interface::builder().device(driver).start().expect("a wire")
    });
    (interfaces, Control(shared))
}

/// Everything that a TAP of Linux does with offload, for packets of up to 64 KiB.
pub(crate) fn offloading(caps: &mut Capabilities) {
    caps.offloads = Offloads::ALL;
    caps.headroom = HEADER as u32;
    caps.max_packet_size = 65550;
    (caps.read_segments, caps.write_segments) = (256, 256);
}

struct WireDriver {
    end: usize,
    caps: Capabilities,
    shared: Arc<Shared>,
}

impl Driver for WireDriver {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, self.end as u8 + 1);
        let info = InterfaceInfo::new(config, mac, self.caps.mtu, self.caps.max_packet_size);
        let Self { end, caps, shared } = *self;
        Ok(Arc::new(WireDevice { end, caps, shared, info }))
    }
}

struct WireDevice {
    end: usize,
    caps: Capabilities,
    shared: Arc<Shared>,
    info: InterfaceInfo,
}

impl Device for WireDevice {
    fn name(&self) -> &str {
        "wire"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.caps
    }

    fn queue(&self, config: QueueConfig, wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let direction = config.direction;
        let reader = if direction.reads() {
            let inboxes = &self.shared.inboxes[self.end];
            let free = inboxes.iter().position(|inbox| !lock(inbox).is_read);
            let reader = free.ok_or(Status::SetupIncomplete)?;
            let mut inbox = lock(&inboxes[reader]);
            (inbox.is_read, inbox.wake) = (true, Some(wake.clone()));
            Some(reader)
        } else {
            None
        };
        Ok(Box::new(WireQueue {
            end: self.end,
            caps: self.caps,
            shared: self.shared.clone(),
            reader,
            kept: VecDeque::new(),
            kept_reads: VecDeque::new(),
            is_cancelled: false,
            wake,
        }))
    }
}

struct WireQueue {
    end: usize,
    caps: Capabilities,
    shared: Arc<Shared>,
    reader: Option<usize>,
    kept: VecDeque<PostedSlot>,
    kept_reads: VecDeque<PostedSlot>,
    is_cancelled: bool,
    wake: Wake,
}

impl WireQueue {
    fn send(&self, slot: &mut PostedSlot) {
        let mut packet = vec![0; slot.len()];
        slot.copy_to(&mut packet);
        let header = match slot.guest().map(|guest| guest.header()) {
            Some(header) => header,
            None if self.caps.headroom > 0 => {
                slot.packet_with_header_mut(HEADER).and_then(|bytes| bytes.first_chunk().copied())
            }
            None => None,
        };
        deliver(&self.shared, 1 - self.end, (header.unwrap_or_default(), packet));
    }

    fn receive(&self, cx: &mut PollContext<'_>, reader: usize) {
        loop {
            if cx.reads() == 0 {
                return;
            }
            let mut inbox = lock(&self.shared.inboxes[self.end][reader]);
            let Some((header, packet)) = inbox.packets.pop_front() else { return };
            drop(inbox);
            let mut slot = cx.take_read().expect("it was there");
            let room = slot.guest().map(|guest| guest.capacity());
            if self.caps.merges_reads && room.is_some_and(|room| room < packet.len()) {
                match self.merge(cx, slot, &packet) {
                    Ok(()) => continue,
                    Err(()) => {
                        // All of it waits for more buffers.
                        let mut inbox = lock(&self.shared.inboxes[self.end][reader]);
                        inbox.packets.push_front((header, packet));
                        return;
                    }
                }
            }
            if slot.guest().is_some() || self.caps.headroom == 0 {
                match slot.copy_from(&packet) {
                    Err(_) => cx.fail(slot, Status::PacketTooBig),
                    Ok(()) if self.caps.headroom == 0 => cx.complete_read(slot, packet.len()),
                    Ok(()) => {
                        slot.guest_mut().expect("it is a guest's").set_header(&header);
                        cx.complete_read_with_header(slot, HEADER + packet.len());
                    }
                }
            } else {
                let space = slot.buffer_with_header_mut(HEADER).expect("headroom");
                space[..HEADER].copy_from_slice(&header);
                space[HEADER..][..packet.len()].copy_from_slice(&packet);
                cx.complete_read_with_header(slot, HEADER + packet.len());
            }
        }
    }

    fn merge(&self, cx: &mut PollContext<'_>, first: PostedSlot, packet: &[u8]) -> Result<(), ()> {
        let (mut slots, mut left, mut next) = (Vec::new(), packet.len(), Some(first));
        while left > 0 {
            let Some(slot) = next.take().or_else(|| cx.take_read()) else {
                slots.into_iter().rev().for_each(|(slot, _)| cx.put_back(slot));
                return Err(());
            };
            let guest = slot.guest().expect("a ring that merges has a guest's buffers only");
            let header = if slots.is_empty() { 0 } else { guest.header_len() };
            let len = left.min(guest.capacity() + header);
            left -= len;
            slots.push((slot, len));
        }
        let mut copied = 0;
        for (i, (slot, len)) in slots.iter_mut().enumerate() {
            let guest = slot.guest_mut().expect("the same");
            let skip = if i == 0 { guest.header_len() } else { 0 };
            guest.segments().skip_bytes(skip).copy_from(&packet[copied..copied + *len]);
            copied += *len;
        }
        cx.complete_read_parts(slots);
        Ok(())
    }
}

impl Queue for WireQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        while let Some(slot) = cx.take_write() {
            self.kept.push_back(slot);
            self.shared.kept.fetch_add(1, Ordering::SeqCst);
        }
        if !self.shared.holds.load(Ordering::SeqCst) {
            let reverses = self.shared.reverses.load(Ordering::SeqCst);
            let mut kept: Vec<_> = self.kept.drain(..).collect();
            kept.iter_mut().for_each(|slot| self.send(slot));
            if reverses {
                kept.reverse();
            }
            kept.into_iter().for_each(|slot| cx.complete_write(slot));
        }
        let holds_reads = self.shared.holds_reads.load(Ordering::SeqCst);
        if holds_reads {
            while let Some(slot) = cx.take_read() {
                self.kept_reads.push_back(slot);
            }
        } else if self.is_cancelled {
            self.is_cancelled = false;
            self.kept_reads.drain(..).for_each(|slot| cx.cancel(slot));
        } else {
            self.kept_reads.drain(..).rev().for_each(|slot| cx.put_back(slot));
        }
        if let Some(reader) = self.reader.filter(|_| !holds_reads) {
            self.receive(cx, reader);
        }
        Ok(Progress::Idle)
    }

    fn arm(&mut self) -> bool {
        if !self.kept.is_empty() {
            // It is woken through the first inbox of its end.
            lock(&self.shared.inboxes[self.end][0]).wake.get_or_insert_with(|| self.wake.clone());
        }
        true
    }

    fn cancel(&mut self, _target: Option<u64>) -> u32 {
        self.is_cancelled = !self.kept_reads.is_empty();
        self.kept_reads.len() as u32
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        self.kept.drain(..).for_each(|slot| cx.cancel(slot));
        self.kept_reads.drain(..).for_each(|slot| cx.cancel(slot));
        if let Some(reader) = self.reader {
            let mut inbox = lock(&self.shared.inboxes[self.end][reader]);
            (inbox.is_read, inbox.wake) = (false, None);
            inbox.packets.clear();
        }
        true
    }
}
