//! A sender and a receiver between which one thing at a time can be changed: where the slots are,
//! how a slot is handed over, what else the sender does for each batch, and who copies.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::guests::inspection::{FROM, Inspection, PACKETS, TO, numbered, packet};
use crate::guests::traffic::{Carried, Receiver, Sender, Traffic, carry};
use crate::queues::{Entry, Queues};
use crate::result::Result;

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of the addresses at a packet's front.
const ADDRESSES: usize = 12;
/// Bytes of a state.
const STATE: usize = size_of::<u64>();

/// How often the receiver looks at fewer packets than the least before it takes them.
const LOOKS: u32 = 2000;

/// How the receiver learns that a slot is filled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Handover {
    /// A state for each packet, eight to a line, and an index that is stored once for a batch.
    Index,
    /// The same, but the index is stored for each packet.
    IndexEach,
    /// A state for each packet, eight to a line, which is stored behind its packet. No index.
    States,
    /// The same states, but those of a line are stored together, behind the last of their packets in
    /// the batch.
    StatesByLine,
    /// The same states, but those of a batch are stored behind all its packets.
    StatesTogether,
    /// A state for each packet, each in a line of its own.
    StatesApart,
    /// A state in the eight bytes in front of the packet.
    InSlot,
}

/// How the sender learns where the next empty slot is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Posted {
    /// By its number alone: slots are filled in turn.
    Number,
    /// By an address in an array, which the receiver writes only if it has changed.
    Kept,
    /// By an address in an array, which the receiver writes each time.
    Written,
}

/// How a packet is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Copying {
    /// By the system's memcpy.
    Memcpy,
    /// By one instruction that repeats.
    Repeated,
    /// By stores that do not take the line into the cache.
    Streaming,
}

/// When the receiver asks for the lines of a batch's packets for writing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asks {
    Never,
    /// Before it reads any of them.
    Before,
    /// When it posts the slots again.
    After,
}

/// The side that copies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Copier {
    /// The sender, out of its frame into the receiver's slot.
    Sender,
    /// The receiver, out of the sender's frame into a buffer of its own.
    Receiver,
    /// Both, as with a socket: the sender into a slot between them, the receiver out of it.
    Both,
}

/// What is changed.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// The slots that are filled in turn.
    pub(super) slots: usize,
    /// How many of them are posted at once.
    pub(super) window: usize,
    /// Bytes from one slot to the next.
    pub(super) stride: usize,
    /// Bytes of a slot in front of the packet.
    pub(super) front: usize,
    /// The cells of the arrays of addresses and states, a power of two.
    pub(super) cells: usize,
    /// Packets that either side handles at once, at most.
    pub(super) batch: usize,
    pub(super) handover: Handover,
    pub(super) posted: Posted,
    /// The sender claims the slots of a batch by one exchange.
    pub(super) claim: bool,
    /// After a batch the sender adds to two counters, fences, and looks at a flag.
    pub(super) ring: bool,
    /// Each side has a submission and a completion queue.
    pub(super) queues: bool,
    /// The sender compares the addresses of a batch's packets before it copies any.
    pub(super) look_up: bool,
    pub(super) copier: Copier,
    /// How the sender copies.
    pub(super) copying: Copying,
    /// The sender asks for the lines of the slot that is this many packets ahead. 0: it does not.
    pub(super) ask_ahead: usize,
    /// When the receiver asks for the lines of a batch's packets for writing.
    pub(super) receiver_asks: Asks,
    /// The frames that the sender sends in turn.
    pub(super) frames: usize,
    /// The sender writes a word to each line of a frame before it sends it, and the packet's number.
    pub(super) fresh: bool,
    /// The receiver writes a word to each line of a packet that it has inspected.
    pub(super) receiver_writes: bool,
    /// The receiver flushes each line of a packet that it has inspected out of the caches.
    pub(super) receiver_flushes: bool,
    /// How often the receiver pauses after a look that has found nothing.
    pub(super) rest: u32,
    /// The receiver leaves packets where they are until there are this many, but not for ever.
    pub(super) least: usize,
}

impl Shape {
    /// The memory of this shape must be able to hold the packets. The numbers of the packets go with
    /// the frames.
    fn check(&self, length: usize) -> Result<()> {
        let holds = self.stride.is_multiple_of(LINE) && self.front + length <= self.stride;
        let counts = self.window <= self.slots && self.window <= self.cells;
        let numbers = self.fresh || self.frames.is_multiple_of(PACKETS);
        let streams = self.copying != Copying::Streaming || self.front.is_multiple_of(16);
        let state = self.handover != Handover::InSlot
            || (self.front >= STATE && self.front.is_multiple_of(STATE));
        if holds && counts && numbers && state && streams && self.cells.is_power_of_two() {
            return Ok(());
        }
        Err("a shape that cannot be".into())
    }
}

/// Memory that both sides use. It begins with a cache line.
#[repr(C, align(64))]
struct Line(UnsafeCell<[u8; LINE]>);

/// Places for packets.
struct Slots {
    lines: Box<[Line]>,
    stride: usize,
    front: usize,
}

// SAFETY: the sides hand the slots to each other by atomics: see `Shared`. One side touches a slot at
// a time.
unsafe impl Sync for Slots {}

impl Slots {
    fn new(count: usize, stride: usize, front: usize) -> Self {
        let lines = count * stride / LINE;
        let lines = (0..lines).map(|_| Line(UnsafeCell::new([0; LINE]))).collect();
        Self { lines, stride, front }
    }

    /// Where the packet of a slot begins, and the most bytes that it can have.
    #[inline]
    fn at(&self, slot: usize) -> (*mut u8, usize) {
        let lines = &self.lines[slot * self.stride / LINE..][..self.stride / LINE];
        let start = lines.as_ptr().cast_mut().cast::<u8>();
        // SAFETY: `front` is within a slot: see `Shape::check`.
        (unsafe { start.add(self.front) }, self.stride - self.front)
    }

    /// # Safety
    ///
    /// The slot must be the caller's as long as the result is used.
    #[inline]
    unsafe fn view(&self, slot: usize, length: usize) -> &[u8] {
        let (start, room) = self.at(slot);
        assert!(length <= room);
        // SAFETY: it is within the slot, which is the caller's.
        unsafe { std::slice::from_raw_parts(start, length) }
    }

    /// # Safety
    ///
    /// The slot must be the caller's.
    #[inline]
    unsafe fn fill(&self, slot: usize, packet: &[u8], copying: Copying) {
        let (start, room) = self.at(slot);
        assert!(packet.len() <= room);
        // SAFETY: the packet fits, and the slot is the caller's. The lines are cells. For streaming
        // stores, `Shape::check` found that the place is a multiple of 16.
        unsafe {
            match copying {
                Copying::Memcpy => {
                    start.copy_from_nonoverlapping(packet.as_ptr(), packet.len());
                }
                Copying::Repeated => copy::repeated(start, packet),
                Copying::Streaming => copy::streaming(start, packet),
            }
        }
    }

    /// Asks for the lines of a packet, for writing. This changes nothing but the time.
    #[inline]
    fn ask(&self, slot: usize, length: usize) {
        let (start, room) = self.at(slot);
        for at in (0..length.min(room)).step_by(LINE) {
            copy::ask(start.wrapping_add(at));
        }
    }

    /// Flushes the lines of a packet out of the caches. This changes nothing but the time.
    #[inline]
    fn flush(&self, slot: usize, length: usize) {
        let (start, room) = self.at(slot);
        for at in (0..length.min(room)).step_by(LINE) {
            // SAFETY: the byte is within the slot.
            unsafe { copy::flush(start.add(at)) };
        }
    }

    /// Writes a word to each line of a packet: what is there already.
    ///
    /// # Safety
    ///
    /// The slot must be the caller's.
    #[inline]
    unsafe fn dirty(&self, slot: usize, length: usize) {
        let (start, room) = self.at(slot);
        assert!(length <= room);
        for at in (0..length).step_by(LINE) {
            // SAFETY: the byte is within the slot, which is the caller's. The lines are cells.
            unsafe {
                let byte = start.add(at);
                byte.write_volatile(byte.read_volatile());
            }
        }
    }

    /// The state in front of a slot's packet.
    #[inline]
    fn state(&self, slot: usize) -> &AtomicU64 {
        let (start, _) = self.at(slot);
        // SAFETY: `Shape::check` found at least eight bytes in front of the packet, at an offset that
        // is a multiple of eight in a slot that begins with a line. Both sides use these bytes only as
        // this atomic.
        unsafe { AtomicU64::from_ptr(start.sub(STATE).cast()) }
    }
}

/// What needs instructions of the processor. Elsewhere it is what comes closest.
#[cfg(target_arch = "x86_64")]
mod copy {
    use core::arch::asm;
    use core::arch::x86_64::{__m128i, _mm_clflush, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    /// Copies by `rep movsb`.
    ///
    /// # Safety
    ///
    /// `to` must be valid for writes of the packet's length, and nothing may overlap.
    #[inline]
    pub(super) unsafe fn repeated(to: *mut u8, packet: &[u8]) {
        // SAFETY: it reads the packet and writes as many bytes at `to`, which the caller allows. The
        // direction flag is clear, as everywhere (System V ABI).
        unsafe {
            asm!(
                "rep movsb",
                inout("rcx") packet.len() => _,
                inout("rsi") packet.as_ptr() => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Copies by streaming stores, which are complete when this returns.
    ///
    /// # Safety
    ///
    /// The conditions of [`repeated`] hold, and `to` is a multiple of 16.
    #[inline]
    pub(super) unsafe fn streaming(to: *mut u8, packet: &[u8]) {
        let chunks = packet.chunks_exact(size_of::<__m128i>());
        let rest = chunks.remainder();
        let mut to = to;
        for chunk in chunks {
            // SAFETY: the chunk has 16 bytes, and so has the place, which is a multiple of 16.
            unsafe {
                _mm_stream_si128(to.cast(), _mm_loadu_si128(chunk.as_ptr().cast()));
                to = to.add(size_of::<__m128i>());
            }
        }
        // SAFETY: the rest fits behind the chunks. The fence orders the streaming stores before the
        // stores behind it, which no other ordering does.
        unsafe {
            to.copy_from_nonoverlapping(rest.as_ptr(), rest.len());
            _mm_sfence();
        }
    }

    /// Asks for a line, for writing.
    #[inline]
    pub(super) fn ask(place: *const u8) {
        // SAFETY: a prefetch accesses nothing and never faults (AMD64 APM volume 3, PREFETCHW).
        unsafe {
            asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags, readonly));
        }
    }

    /// Flushes a line.
    ///
    /// # Safety
    ///
    /// `place` must be valid for reads.
    #[inline]
    pub(super) unsafe fn flush(place: *const u8) {
        // SAFETY: it is subject to the checks of a load, which the caller allows, and keeps what is
        // in the line (AMD64 APM volume 3, CLFLUSH).
        unsafe { _mm_clflush(place) };
    }
}

/// What needs instructions of the processor. Elsewhere it is what comes closest.
#[cfg(not(target_arch = "x86_64"))]
mod copy {
    /// # Safety
    ///
    /// `to` must be valid for writes of the packet's length, and nothing may overlap.
    pub(super) unsafe fn repeated(to: *mut u8, packet: &[u8]) {
        // SAFETY: the caller's promise.
        unsafe { to.copy_from_nonoverlapping(packet.as_ptr(), packet.len()) };
    }

    pub(super) use repeated as streaming;

    pub(super) fn ask(_: *const u8) {}

    /// # Safety
    ///
    /// There is nothing to be aware of here.
    pub(super) unsafe fn flush(_: *const u8) {}
}

/// A value on lines of its own (two, because processors fetch them in pairs).
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

/// What both sides use. Packet `i` is in cell `i` of each array, modulo its length. The sender owns
/// the slots of the packets from `filled` to `posted`, and the receiver those before.
struct Shared {
    shape: Shape,
    /// The receiver's slots, or the slots between the two sides. If the receiver copies, the sender's
    /// frames.
    slots: Slots,
    /// Stored by the receiver: packets before this one may be sent.
    posted: Apart<AtomicU32>,
    /// Stored by the sender: packets before this one are there. Not with each handover.
    filled: Apart<AtomicU32>,
    /// Packets that the sender has claimed slots for.
    claimed: Apart<AtomicU32>,
    /// Whether the receiver sleeps, which it never does.
    asleep: Apart<AtomicU32>,
    counters: Apart<[AtomicU64; 2]>,
    /// The numbers of the posted slots, or of the sent frames.
    addresses: Box<[AtomicU64]>,
    /// The index that a state is for, and the packet's length.
    states: Box<[StateLine]>,
}

/// States that share a cache line.
#[derive(Default)]
#[repr(align(64))]
struct StateLine([AtomicU64; LINE / STATE]);

impl Shared {
    fn new(shape: Shape) -> Self {
        let apart = shape.handover == Handover::StatesApart;
        let lines = if apart { shape.cells } else { shape.cells.div_ceil(LINE / STATE) };
        let cell = |cell: usize| AtomicU64::new((cell % shape.slots) as u64);
        Self {
            shape,
            slots: Slots::new(shape.slots, shape.stride, shape.front),
            posted: Apart(AtomicU32::new(shape.window as u32)),
            filled: Apart::default(),
            claimed: Apart::default(),
            asleep: Apart::default(),
            counters: Apart::default(),
            addresses: (0..shape.cells).map(cell).collect(),
            states: (0..lines).map(|_| StateLine::default()).collect(),
        }
    }

    /// The slot of packet `index` if slots are filled in turn.
    #[inline]
    fn slot(&self, index: u32) -> usize {
        index as usize % self.shape.slots
    }

    #[inline]
    fn address(&self, index: u32) -> &AtomicU64 {
        &self.addresses[index as usize & (self.addresses.len() - 1)]
    }

    #[inline]
    fn state(&self, index: u32) -> &AtomicU64 {
        let cell = index as usize & (self.addresses.len() - 1);
        match self.shape.handover {
            Handover::InSlot => self.slots.state(self.slot(index)),
            Handover::StatesApart => &self.states[cell].0[0],
            _ => &self.states[cell / (LINE / STATE)].0[cell % (LINE / STATE)],
        }
    }
}

/// The state of packet `index`. No packet is empty.
#[inline]
fn state_of(index: u32, length: usize) -> u64 {
    u64::from(index) << 32 | length as u64
}

struct PairSender<'a> {
    shared: &'a Shared,
    /// The frames that the sender copies. If the receiver copies, they are `shared.slots`.
    frames: &'a Slots,
    length: usize,
    addresses: [u8; ADDRESSES],
    queues: Option<Queues>,
    sent: u32,
}

impl PairSender<'_> {
    /// The frame of packet `index`. It is the sender's until the packet's state is stored, and if the
    /// sender copies, for ever.
    #[inline]
    fn frame(&self, index: u32) -> usize {
        let Shape { copier, slots, frames, .. } = self.shared.shape;
        index as usize % if copier == Copier::Receiver { slots } else { frames }
    }

    /// Sends the next packet into its slot.
    #[inline]
    fn put(&self, index: u32) {
        let Shape { posted, handover, copier, copying, ask_ahead, fresh, .. } = self.shared.shape;
        let (shared, frame) = (self.shared, self.frame(index));
        if fresh {
            let number = (index as usize % PACKETS) as u16;
            // SAFETY: the frame is the sender's, see `frame`.
            unsafe {
                self.frames.dirty(frame, self.length);
                let (start, _) = self.frames.at(frame);
                start.add(14).cast::<[u8; 2]>().write(number.to_be_bytes());
            }
        }
        // Relaxed: the Acquire of `posted`, or the Release of the handover, orders these.
        if copier == Copier::Receiver {
            shared.address(index).store(frame as u64, Ordering::Relaxed);
        } else {
            let slot = match posted {
                Posted::Number => shared.slot(index),
                _ => shared.address(index).load(Ordering::Relaxed) as usize,
            };
            // SAFETY: the frame is the sender's, see `frame`. The slot's packet is before `posted`,
            // and its state is not stored yet, so it is the sender's.
            unsafe { shared.slots.fill(slot, self.frames.view(frame, self.length), copying) };
            if ask_ahead > 0 {
                let ahead = shared.slot(index.wrapping_add(ask_ahead as u32));
                shared.slots.ask(ahead, self.length);
            }
        }
        let order = match handover {
            Handover::Index | Handover::IndexEach => Ordering::Relaxed,
            Handover::StatesByLine | Handover::StatesTogether => return,
            // Release: pairs with the Acquire in `receive`.
            _ => Ordering::Release,
        };
        shared.state(index).store(state_of(index, self.length), order);
        if handover == Handover::IndexEach {
            // Release: pairs with the Acquire in `receive`.
            shared.filled.0.store(index.wrapping_add(1), Ordering::Release);
        }
    }
}

impl Sender for PairSender<'_> {
    fn send(&mut self) -> Result<bool> {
        let shared = self.shared;
        let Shape { batch, claim, ring, look_up, handover, .. } = shared.shape;
        let mut most = batch;
        if let Some(queues) = &mut self.queues {
            queues.turn(batch, |entry| entry)?;
            most = most.min(queues.waiting());
        }
        // Acquire: pairs with the Release in `receive`. The receiver no longer uses these slots.
        let posted = shared.posted.0.load(Ordering::Acquire);
        let (start, count) = (self.sent, most.min(posted.wrapping_sub(self.sent) as usize));
        if count == 0 {
            return Ok(false);
        }
        let end = start.wrapping_add(count as u32);
        let indices = || (0..count as u32).map(|offset| start.wrapping_add(offset));
        if look_up {
            for index in indices() {
                // SAFETY: the frame is the sender's, see `frame`.
                let front = unsafe { self.frames.view(self.frame(index), ADDRESSES) };
                if front != self.addresses {
                    return Err("a frame has other addresses".into());
                }
            }
        }
        if claim {
            let (old, failed) = (Ordering::AcqRel, Ordering::Acquire);
            let claimed = shared.claimed.0.compare_exchange(start, end, old, failed);
            claimed.map_err(|_| "somebody else has claimed")?;
        }
        let store = |index| {
            // Release: pairs with the Acquire in `receive`.
            shared.state(index).store(state_of(index, self.length), Ordering::Release);
        };
        let mut pending = start;
        for index in indices() {
            self.put(index);
            let next = index.wrapping_add(1);
            let line_ends = next == end || (next as usize).is_multiple_of(LINE / STATE);
            if handover == Handover::StatesByLine && line_ends {
                while pending != next {
                    store(pending);
                    pending = pending.wrapping_add(1);
                }
            }
        }
        match handover {
            // Release: pairs with the Acquire in `receive`.
            Handover::Index => shared.filled.0.store(end, Ordering::Release),
            Handover::StatesTogether => indices().for_each(store),
            _ => {}
        }
        self.sent = end;
        if ring {
            let [packets, bytes] = &shared.counters.0;
            packets.fetch_add(count as u64, Ordering::Relaxed);
            bytes.fetch_add((count * self.length) as u64, Ordering::Relaxed);
            // As a doorbell has it, whose other half would be in a receiver that sleeps.
            fence(Ordering::SeqCst);
            if shared.asleep.0.load(Ordering::Acquire) != 0 {
                return Err("the receiver sleeps".into());
            }
        }
        let length = self.length as u32;
        if let Some(queues) = &mut self.queues {
            queues.complete(count, |entry| Entry { length, ..entry })?;
        }
        Ok(true)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(Some(u64::from(self.sent)))
    }
}

struct PairReceiver<'a> {
    shared: &'a Shared,
    /// The buffers that the receiver copies to, if it copies.
    own: Option<&'a Slots>,
    queues: Option<Queues>,
    received: u32,
    posted: u32,
    /// Looks in a row that have found less than the least.
    looks: u32,
    /// The batch that is being inspected: slots and lengths.
    came: Vec<(usize, usize)>,
}

impl PairReceiver<'_> {
    /// The number of packets that are there, at most a batch.
    #[inline]
    fn ready(&self) -> usize {
        let Shape { batch, handover, .. } = self.shared.shape;
        match handover {
            Handover::Index | Handover::IndexEach => {
                // Acquire: pairs with the Release in `send` or `put`.
                let filled = self.shared.filled.0.load(Ordering::Acquire);
                batch.min(filled.wrapping_sub(self.received) as usize)
            }
            _ => {
                let most = batch.min(self.posted.wrapping_sub(self.received) as usize) as u32;
                let there = |offset: &u32| {
                    let index = self.received.wrapping_add(*offset);
                    // Acquire: pairs with the Release in `put` or `send`. The length is never zero,
                    // so the state of packet zero is not zero.
                    let state = self.shared.state(index).load(Ordering::Acquire);
                    (state >> 32) as u32 == index && state as u32 != 0
                };
                (0..most).take_while(there).count()
            }
        }
    }
}

impl Receiver for PairReceiver<'_> {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let count = self.ready();
        self.looks = if count < self.shared.shape.least { self.looks + 1 } else { 0 };
        if count == 0 || (1..LOOKS).contains(&self.looks) {
            (0..self.shared.shape.rest).for_each(|_| std::hint::spin_loop());
            return Ok(false);
        }
        let Self { shared, own, queues, received, posted, came, .. } = self;
        let Shape { copier, receiver_asks, receiver_writes, receiver_flushes, .. } = shared.shape;
        let by = shared.shape.posted;
        for _ in 0..count {
            // Relaxed: `ready` has acquired it.
            let length = shared.state(*received).load(Ordering::Relaxed) as u32 as usize;
            let slot = match copier {
                Copier::Receiver => shared.address(*received).load(Ordering::Relaxed) as usize,
                _ => shared.slot(*received),
            };
            came.push((slot, length));
            *received = received.wrapping_add(1);
        }
        if receiver_asks == Asks::Before {
            came.iter().for_each(|(slot, length)| shared.slots.ask(*slot, *length));
        }
        if let Some(own) = own {
            for (slot, length) in came.iter() {
                // SAFETY: `ready` has found the packet, so its slot is the receiver's until `posted`
                // is stored below. The buffers of the receiver's own are always its own.
                unsafe { own.fill(*slot, shared.slots.view(*slot, *length), Copying::Memcpy) };
            }
        }
        let places = own.unwrap_or(&shared.slots);
        for (slot, length) in came.iter() {
            // SAFETY: as above.
            inspection.inspect(unsafe { places.view(*slot, *length) });
        }
        if receiver_writes {
            for (slot, length) in came.iter() {
                // SAFETY: as above.
                unsafe { places.dirty(*slot, *length) };
            }
        }
        if receiver_asks == Asks::After {
            came.iter().for_each(|(slot, length)| places.ask(*slot, *length));
        }
        if receiver_flushes {
            came.iter().for_each(|(slot, length)| places.flush(*slot, *length));
        }
        if let Some(queues) = queues {
            queues.complete(count, |entry| entry)?;
            queues.turn(count, |entry| entry)?;
        }
        for _ in came.drain(..) {
            let slot = shared.slot(*posted) as u64;
            let address = shared.address(*posted);
            // Relaxed: published by the store of `posted`.
            let write = match by {
                _ if copier == Copier::Receiver => false,
                Posted::Number => false,
                Posted::Kept => address.load(Ordering::Relaxed) != slot,
                Posted::Written => true,
            };
            if write {
                address.store(slot, Ordering::Relaxed);
            }
            *posted = posted.wrapping_add(1);
        }
        // Release: pairs with the Acquire in `send`. The receiver no longer uses these slots.
        shared.posted.0.store(*posted, Ordering::Release);
        Ok(true)
    }
}

/// Carries packets between a sender and a receiver of this shape.
pub(super) fn measure(shape: Shape, traffic: Traffic) -> Result<Carried> {
    shape.check(traffic.length)?;
    let expected = packet(traffic.length, TO, FROM);
    let shared = Shared::new(shape);
    let stored = if shape.copier == Copier::Receiver { shape.slots } else { shape.frames };
    let frames = Slots::new(stored, shape.stride, shape.front);
    let own = Slots::new(shape.slots, shape.stride, shape.front);
    let receiver_copies = shape.copier != Copier::Sender;
    let sent_from = if shape.copier == Copier::Receiver { &shared.slots } else { &frames };
    let packets: Vec<Vec<u8>> = numbered(&expected).collect();
    for (frame, packet) in (0..stored).zip(packets.iter().cycle()) {
        // SAFETY: nobody else uses the slots yet.
        unsafe { sent_from.fill(frame, packet, Copying::Memcpy) };
    }
    let queues = |entries: usize| -> Result<Option<Queues>> {
        if !shape.queues {
            return Ok(None);
        }
        let mut queues = Queues::new(shape.window.max(entries));
        queues.fill(entries as u32)?;
        Ok(Some(queues))
    };
    let sender = PairSender {
        shared: &shared,
        frames: sent_from,
        length: traffic.length,
        addresses: *expected.first_chunk().ok_or("a packet without addresses")?,
        queues: queues(shape.window.min(PACKETS))?,
        sent: 0,
    };
    let receiver = PairReceiver {
        shared: &shared,
        own: receiver_copies.then_some(&own),
        queues: queues(shape.window)?,
        received: 0,
        posted: shape.window as u32,
        looks: 0,
        came: Vec::with_capacity(shape.batch),
    };
    carry(sender, receiver, expected, traffic)
}

#[cfg(test)]
mod tests {
    use super::super::LEAST;
    use super::*;

    #[test]
    fn a_shape_holds_its_packets_or_is_refused() {
        let length = 1514;
        let refused = |shape: Shape| shape.check(length).is_err();
        assert!(!refused(LEAST));
        assert!(refused(Shape { front: 64, ..LEAST }), "the packet ends behind its slot");
        assert!(refused(Shape { stride: 1600 + 8, ..LEAST }), "a slot begins within a line");
        assert!(refused(Shape { window: LEAST.slots + 1, ..LEAST }), "too many are posted");
        assert!(refused(Shape { cells: LEAST.window / 2, ..LEAST }), "too few cells");
        assert!(refused(Shape { cells: 3 * LEAST.cells, ..LEAST }), "not a power of two");
        assert!(refused(Shape { frames: 33, ..LEAST }), "a frame would have two numbers");
        assert!(!refused(Shape { frames: 33, fresh: true, ..LEAST }));
        assert!(refused(Shape { handover: Handover::InSlot, ..LEAST }), "no room for a state");
    }
}
