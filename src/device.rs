//! The one seam between the poller and a system: [`Device`], its [`Queue`]s, and the
//! [`PostedSlot`]s they fill and drain.
//!
//! A device is completion-shaped: the poller lends it slots, asks it to make progress without
//! blocking, and gets each slot back by value. Batch calls (vmnet, a TAP's read and write) take a
//! slot and complete it in the same call; a real completion engine (io_uring) keeps it until the
//! kernel lets go. Everything here is safe Rust, and a device cannot break memory safety: a slot
//! cannot be cloned, so it cannot be given back twice, and giving it back takes its memory away.
//!
//! See `examples/device.rs` for a device of one's own.

pub mod embedded;
#[cfg(feature = "fault")]
pub mod fault;
pub mod loopback;
#[cfg(feature = "pcap")]
pub mod pcap;
#[cfg(all(target_os = "linux", feature = "tap"))]
pub mod tap;
#[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
pub mod vmnet;

pub use crate::config::{Offloads, PortForward, Protocol};
use std::collections::VecDeque;
use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use macaddr::MacAddr6;
use static_assertions::const_assert_eq;
use vmring_core::{Class, Frame, Intake, Outcome, Parcel, offload};

use crate::completions::Completions;
use crate::config::{Direction, InterfaceInfo};
use crate::error::{EntryError, Error, Status};
use crate::fifo::Fifo;
use crate::mailbox::{Orphan, RingShared, abandon};

/// What a device can do, as values to ask for instead of systems to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Largest frame that may be written, and the least room of a frame to read into, bytes.
    pub max_packet_size: u32,
    /// Packets per read call.
    pub max_read_batch: u32,
    /// Packets per write call.
    pub max_write_batch: u32,
    /// Bytes the device needs in front of a packet.
    pub headroom: u32,
    /// What the device does to packets on the way.
    pub offloads: Offloads,
    /// Rings that may read at a time.
    pub reading_rings: usize,
    /// Rings that may write at a time.
    pub writing_rings: usize,
    /// How often the poller looks at an idle device although it has not rung. `None`: never.
    pub safety_poll: Option<Duration>,
}

impl Capabilities {
    /// A device of one ring each way, with vmnet's documented batch limit of 200 packets per call
    /// where nothing else is said.
    pub fn new(mtu: u32, max_packet_size: u32) -> Self {
        Self {
            mtu,
            max_packet_size,
            max_read_batch: 200,
            max_write_batch: 200,
            headroom: 0,
            offloads: Offloads::default(),
            reading_rings: 1,
            writing_rings: 1,
            safety_poll: None,
        }
    }
}

/// A network interface of some system. [`Interface`](crate::Interface) owns one; rings drive its
/// queues.
pub trait Device: Send + Sync {
    /// The device's name, as the command's `--device` takes it.
    fn name(&self) -> &str;

    /// What was negotiated at start.
    fn info(&self) -> InterfaceInfo;

    /// What the queues can do. Does not change while the device runs.
    fn capabilities(&self) -> Capabilities;

    /// An endpoint for one ring. The queue calls `wake` whenever packets may have come since it
    /// last said that there were none. The caller keeps to the number of rings in
    /// [`Capabilities`].
    fn queue(&self, direction: Direction, wake: Wake) -> Result<Box<dyn Queue>, Error>;

    /// Ends the interface. Queues that are still there say so when polled.
    fn stop(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Stops and starts anew with the same identity. The poller has closed every queue and asks for
    /// new ones afterwards.
    fn restart(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Forwards a port of the host.
    fn add_port_forward(&self, rule: &PortForward) -> Result<(), Error> {
        let _ = rule;
        Err(self.not_supported("port forwarding"))
    }

    /// Ends a forwarding.
    fn remove_port_forward(&self, protocol: Protocol, external_port: u16) -> Result<(), Error> {
        let _ = (protocol, external_port);
        Err(self.not_supported("port forwarding"))
    }

    /// The forwardings in force.
    fn port_forwards(&self) -> Result<Vec<PortForward>, Error> {
        Err(self.not_supported("port forwarding"))
    }

    /// What the system calls the interface, if it has a name there: `tap0`.
    fn system_name(&self) -> Option<String> {
        None
    }

    /// Names of the interfaces that bridged mode can share.
    fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        Err(self.not_supported("listing shared interfaces"))
    }

    /// The address the network has given to `mac`, if this device hands out addresses and knows.
    fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        let _ = mac;
        None
    }

    /// What the device counts of itself beyond packets, by name.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Packets the device dropped by itself since it started, by reason; the sum of a network.
    fn drops(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The error for a function that this device lacks.
    fn not_supported(&self, what: &'static str) -> Error {
        Error::NotSupported { what, device: self.name().to_owned() }
    }
}

#[cfg(any(feature = "pcap", feature = "fault"))]
/// For wrappers: passes everything but `queue` (and what is given in braces) on to `self.device`.
macro_rules! delegate_device {
    ($device:ty { $($own:item)* }) => {
        impl $crate::device::Device for $device {
            $($own)*

            fn name(&self) -> &str {
                self.device.name()
            }

            fn info(&self) -> $crate::InterfaceInfo {
                self.device.info()
            }

            fn capabilities(&self) -> $crate::device::Capabilities {
                self.device.capabilities()
            }

            fn stop(&self) -> Result<(), $crate::Error> {
                self.device.stop()
            }

            fn restart(&self) -> Result<(), $crate::Error> {
                self.device.restart()
            }

            fn add_port_forward(&self, rule: &$crate::device::PortForward) -> Result<(), $crate::Error> {
                self.device.add_port_forward(rule)
            }

            fn remove_port_forward(&self, protocol: $crate::device::Protocol, port: u16) -> Result<(), $crate::Error> {
                self.device.remove_port_forward(protocol, port)
            }

            fn port_forwards(&self) -> Result<Vec<$crate::device::PortForward>, $crate::Error> {
                self.device.port_forwards()
            }

            fn shared_interfaces(&self) -> Result<Vec<String>, $crate::Error> {
                self.device.shared_interfaces()
            }

            fn system_name(&self) -> Option<String> {
                self.device.system_name()
            }

            fn lease(&self, mac: $crate::MacAddr6) -> Option<$crate::device::Lease> {
                self.device.lease(mac)
            }

            fn counters(&self) -> Vec<(&'static str, u64)> {
                self.device.counters()
            }

            fn drops(&self) -> Vec<(&'static str, u64)> {
                self.device.drops()
            }
        }
    };
}
#[cfg(any(feature = "pcap", feature = "fault"))]
pub(crate) use delegate_device;

/// An address in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: Ipv4Addr,
    /// How long it is valid, from the last renewal.
    pub duration: Duration,
}

/// What a [`Queue::poll`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No more packets can be read now.
    Idle,
    /// Packets may still wait: call again when slots are posted.
    More,
}

/// One ring's endpoint of a device, driven by one thread at a time.
pub trait Queue: Send {
    /// Makes progress without blocking: takes posted slots from `io` and completes them, or keeps
    /// them to complete in a later call. What it leaves, or puts back, stays posted in its order.
    /// `Err` means that the device is dead for good: everything in flight completes with the
    /// status and the ring closes.
    fn poll(&mut self, io: &mut Io<'_>) -> Result<Progress, Status>;

    /// From here on one thread drives the queue, a poller's, and this is it. Without this call, which
    /// comes before the first [`poll`](Self::poll), the queue may be driven by another thread each
    /// time.
    fn settle(&mut self) {}

    /// The poller is about to sleep: from here on a packet must ring the `wake`. False if there is
    /// something to do already.
    fn arm(&mut self) -> bool {
        true
    }

    /// Asks for slots that the queue keeps, all or those of one `user_data`, to be completed soon:
    /// with their packet, or by [`Io::cancel`]. Returns how many match. A packet must not get
    /// lost by it.
    fn cancel(&mut self, target: Option<u64>) -> u32 {
        let _ = target;
        0
    }

    /// Lets go of everything: gives back what it keeps, through `io`. Called until it answers true
    /// (nothing kept) or the close has waited long enough.
    fn close(&mut self, io: &mut Io<'_>) -> bool {
        let _ = io;
        true
    }

    /// A descriptor that is readable when there is something to do; the poller sleeps on it. Asked
    /// for when the queue is opened, and anew after each [`arm`](Self::arm).
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A device's way to say that there is something to do. Cheap while the poller is awake.
#[derive(Clone)]
pub struct Wake(Inner);

#[derive(Clone)]
enum Inner {
    Ring(Arc<RingShared>),
    Call(Arc<dyn Fn() + Send + Sync>),
}

impl Wake {
    pub(crate) fn ring(shared: Arc<RingShared>) -> Self {
        Self(Inner::Ring(shared))
    }

    /// A wake that calls a function: for wrappers, and for driving a queue by hand.
    pub fn from_fn(f: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Inner::Call(Arc::new(f)))
    }

    /// Rings. Callable from any thread, at any time, any number of times.
    pub fn wake(&self) {
        match &self.0 {
            Inner::Ring(shared) => shared.device_rang(),
            Inner::Call(f) => f(),
        }
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

/// A slot lent to a device: a frame to fill or to send. Not `Clone`; ends by being completed through
/// [`Io`].
///
/// If it is dropped instead, the entry completes as [`EntryError::Abandoned`] and the frame goes
/// back to the caller. If it is forgotten, the slot is lost and counted as such at close.
// In this order what stands behind the class and the ring is 32 bytes, which are copied in pieces that do
// not overlap. (The class is looked at by itself: it says whether an `Option` of a slot has one.) Reading
// overlapping pieces back costs some fifteen cycles.
#[repr(C)]
pub struct PostedSlot {
    class: Class,
    /// The ring to which the entry belongs: a number, not a pointer, so that a slot costs no
    /// reference count.
    ring: u32,
    /// `None` only in the moment between completing and dropping.
    frame: Option<Frame>,
    user_data: u64,
}

// As the docs of `RingBuilder` say.
#[cfg(target_pointer_width = "64")]
const_assert_eq!(size_of::<PostedSlot>(), 40);

impl PostedSlot {
    #[inline(always)]
    pub(crate) fn new(frame: Frame, user_data: u64, ring: u32, class: Class) -> Self {
        Self { frame: Some(frame), user_data, ring, class }
    }

    /// The slot of ring number `ring` that a parcel of that class was submitted with.
    #[inline(always)]
    fn unpack(parcel: Parcel<'_>, ring: u32, class: Class) -> Self {
        let (frame, user_data) = parcel.open();
        Self::new(frame, user_data, ring, class)
    }

    #[inline(always)]
    pub(crate) fn into_frame(mut self) -> (Frame, u64, Class) {
        let frame = self.frame.take();
        let (user_data, class) = (self.user_data, self.class);
        // Nothing is left to drop, and nobody need ask.
        std::mem::forget(self);
        (frame.expect("a posted slot has its frame until it is completed"), user_data, class)
    }

    /// The number the caller gave.
    #[inline]
    pub fn user_data(&self) -> u64 {
        self.user_data
    }

    /// Whether it is to be filled rather than sent.
    #[inline]
    pub fn is_read(&self) -> bool {
        self.class == Class::Read
    }

    /// Of a write: the packet.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        self.frame().as_ref()
    }

    /// Of a read: where the packet goes, at least `max_packet_size` bytes. Of a write: the packet
    /// and the room behind it.
    #[inline]
    pub fn room_mut(&mut self) -> &mut [u8] {
        self.frame_mut().room_mut()
    }

    /// As [`room_mut`](Self::room_mut), from `header` bytes before the packet: for devices that put
    /// an offload header there. `None` if there is less headroom.
    #[inline]
    pub fn room_behind_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        self.frame_mut().room_behind_header_mut(header)
    }

    /// Of a write: the packet, from `header` bytes before it. `None` if there is less headroom.
    #[inline]
    pub fn packet_behind_header_mut(&mut self, header: usize) -> Option<&mut [u8]> {
        let len = header + self.packet().len();
        self.room_behind_header_mut(header)?.get_mut(..len)
    }

    /// Of a write: the packet, to be changed in place.
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.frame_mut().as_mut()
    }

    #[inline]
    fn frame(&self) -> &Frame {
        self.frame.as_ref().expect("a posted slot has its frame until it is completed")
    }

    #[inline]
    fn frame_mut(&mut self) -> &mut Frame {
        self.frame.as_mut().expect("a posted slot has its frame until it is completed")
    }
}

impl AsMut<[u8]> for PostedSlot {
    #[inline]
    fn as_mut(&mut self) -> &mut [u8] {
        self.room_mut()
    }
}

impl Drop for PostedSlot {
    #[inline]
    fn drop(&mut self) {
        if let Some(frame) = self.frame.take() {
            abandon(self.ring, Orphan { frame, user_data: self.user_data, class: self.class });
        }
    }
}

impl fmt::Debug for PostedSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostedSlot")
            .field("user_data", &self.user_data)
            .field("class", &self.class)
            .finish_non_exhaustive()
    }
}

/// A device's code has panicked.
#[derive(Debug)]
pub(crate) struct Panicked;

/// Calls a device: a panic of its goes no further.
#[inline]
pub(crate) fn guard<T>(call: impl FnOnce() -> T) -> Result<T, Panicked> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|_| Panicked)
}

/// Where a completed slot goes: to its ring, or, behind a wrapper, to the wrapper's list. Two known
/// ways and no trait object, so that a completion costs no call.
pub(crate) enum Sink<'a> {
    Ring(&'a mut Completions),
    Wrapper(&'a mut VecDeque<Done>),
}

/// A slot that a queue is done with.
#[derive(Debug)]
pub struct Done {
    slot: PostedSlot,
    outcome: Outcome,
}

impl Done {
    /// Whether it succeeded, and if so with how many bytes.
    pub fn result(&self) -> Result<usize, EntryError> {
        EntryError::from_outcome(self.outcome).map(|()| self.slot.packet().len())
    }

    /// The slot.
    pub fn slot(&self) -> &PostedSlot {
        &self.slot
    }

    /// The slot's packet, to be changed in place.
    pub fn packet_mut(&mut self) -> &mut [u8] {
        self.slot.packet_mut()
    }
}

/// Slots posted and not taken, in submission order.
#[derive(Debug, Default)]
pub(crate) struct Posted {
    pub(crate) reads: Fifo<PostedSlot>,
    pub(crate) writes: Fifo<PostedSlot>,
}

impl Posted {
    #[inline(always)]
    fn list(&mut self, class: Class) -> &mut Fifo<PostedSlot> {
        if class == Class::Read { &mut self.reads } else { &mut self.writes }
    }

    /// Posts the packets of ring number `ring` that its SQ has, up to a cancel.
    pub(crate) fn take_in(&mut self, intake: &mut Intake, ring: u32) {
        while let Some(parcel) = intake.front() {
            let class = parcel.class();
            self.list(class).push_back_with(|| PostedSlot::unpack(parcel, ring, class));
        }
    }
}

/// A batch: the posted slots that a queue may take in one [`poll`](Queue::poll), and the way back
/// for what it has completed.
pub struct Io<'a> {
    /// The ring whose slots these are; 0 for a wrapper's, which only hands them through.
    ring: u32,
    /// What earlier calls have left: older than whatever is in the SQ.
    posted: &'a mut Posted,
    /// What was submitted since then, taken by the device out of the SQ itself. A wrapper has none.
    intake: Option<&'a mut Intake>,
    sink: Sink<'a>,
    /// How many reads and writes may be taken in this call, if there are as many.
    limits: [usize; 2],
    /// How many of them may still be: what is put back may be taken again.
    left: [usize; 2],
}

impl fmt::Debug for Io<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Io")
            .field("posted", &self.posted)
            .field("intake", &self.intake)
            .field("left", &self.left)
            .finish_non_exhaustive()
    }
}

impl<'a> Io<'a> {
    pub(crate) fn new(
        ring: u32,
        posted: &'a mut Posted,
        intake: Option<&'a mut Intake>,
        sink: Sink<'a>,
        limits: [u32; 2],
    ) -> Self {
        let limits = limits.map(|limit| limit as usize);
        Self { ring, posted, intake, sink, limits, left: limits }
    }

    /// How many reads and writes were taken and not put back; below 0 if more came back of earlier calls.
    pub(crate) fn taken(&self) -> [i64; 2] {
        [0, 1].map(|i| self.limits[i] as i64 - self.left[i] as i64)
    }

    /// Reads that may be taken in this call.
    #[inline]
    pub fn reads(&mut self) -> usize {
        self.take_in();
        self.posted.reads.len().min(self.left[0])
    }

    /// Writes that may be taken in this call.
    #[inline]
    pub fn writes(&mut self) -> usize {
        self.take_in();
        self.posted.writes.len().min(self.left[1])
    }

    /// Takes the read posted longest ago.
    #[inline(always)]
    pub fn take_read(&mut self) -> Option<PostedSlot> {
        self.take(Class::Read)
    }

    /// Takes the write submitted longest ago.
    #[inline(always)]
    pub fn take_write(&mut self) -> Option<PostedSlot> {
        self.take(Class::Write)
    }

    #[inline(always)]
    fn take(&mut self, class: Class) -> Option<PostedSlot> {
        let i = list_of(class);
        if self.left[i] == 0 {
            return None;
        }
        let slot = match self.posted.list(class).pop_front() {
            Some(slot) => slot,
            None => self.fetch(class)?,
        };
        self.left[i] -= 1;
        Some(slot)
    }

    /// The next of `wanted` in the SQ. What stands before it is posted.
    #[inline(always)]
    fn fetch(&mut self, wanted: Class) -> Option<PostedSlot> {
        let intake = self.intake.as_deref_mut()?;
        loop {
            let parcel = intake.front()?;
            let class = parcel.class();
            if class == wanted {
                return Some(PostedSlot::unpack(parcel, self.ring, class));
            }
            self.posted.list(class).push_back_with(|| PostedSlot::unpack(parcel, self.ring, class));
        }
    }

    /// Posts what is in the SQ, for who looks at several slots before taking one.
    #[inline]
    fn take_in(&mut self) {
        if let Some(intake) = self.intake.as_deref_mut()
            && intake.known() > 0
        {
            self.posted.take_in(intake, self.ring);
        }
    }

    /// Whether the SQ's next is a write. What earlier calls have left is in no common order.
    #[inline]
    pub(crate) fn is_write_next(&mut self) -> bool {
        let front = self.intake.as_deref_mut().and_then(Intake::front);
        front.is_some_and(|parcel| parcel.class() == Class::Write)
    }

    /// How many of the writes that may be taken, from the oldest on, are like that. There may be more of
    /// them behind.
    #[inline]
    pub(crate) fn leading_writes(&mut self, mut like: impl FnMut(&[u8]) -> bool) -> usize {
        let most = self.left[1];
        if self.posted.writes.is_empty() && self.is_write_next() {
            let most = u32::try_from(most).unwrap_or(u32::MAX);
            return self.intake.as_ref().map_or(0, |intake| intake.leading(Class::Write, most, like))
                as usize;
        }
        self.take_in();
        let writes = self.posted.writes.iter().take(most);
        writes.take_while(|slot| like(slot.packet())).count()
    }

    /// The reads that may be taken, oldest first, where they are: for a device that fills before it
    /// knows how many it will take.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline]
    pub(crate) fn posted_reads(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.reads();
        self.posted.reads.iter_mut().take(limit)
    }

    /// As [`posted_reads`](Self::posted_reads), for writes.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline]
    pub(crate) fn posted_writes(&mut self) -> impl Iterator<Item = &mut PostedSlot> {
        let limit = self.writes();
        self.posted.writes.iter_mut().take(limit)
    }

    /// Takes the oldest of those that [`posted_reads`](Self::posted_reads) or
    /// [`posted_writes`](Self::posted_writes) has shown: there is no need to look into the SQ.
    #[cfg(any(target_os = "macos", feature = "vmnet-sim"))]
    #[inline(always)]
    pub(crate) fn take_shown(&mut self, class: Class) -> Option<PostedSlot> {
        let slot = self.posted.list(class).pop_front()?;
        self.left[list_of(class)] -= 1;
        Some(slot)
    }

    /// Puts a taken slot back to the front of its list: it is posted again as if never taken. Put
    /// several back in the reverse order of taking.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, slot: PostedSlot) {
        if self.is_foreign(slot.ring) {
            return;
        }
        self.left[list_of(slot.class)] += 1;
        self.posted.list(slot.class).push_front(slot);
    }

    /// A packet of `len` bytes stands in the slot. A length beyond the slot's room completes it as
    /// refused with `InvalidArgument` instead: a device cannot make anybody read outside.
    #[inline(always)]
    pub fn complete_read(&mut self, mut slot: PostedSlot, len: usize) {
        match slot.frame_mut().set_len(len) {
            Ok(()) => self.finish(slot, Outcome::Done),
            Err(_) => self.fail(slot, Status::InvalidArgument),
        }
    }

    /// An offload header and behind it a packet, `len` bytes together, stand in the slot, where
    /// [`PostedSlot::room_behind_header_mut`] said. Lengths that cannot be complete it as refused with
    /// `InvalidArgument`.
    pub fn complete_read_with_header(&mut self, mut slot: PostedSlot, len: usize) {
        let packet = len.checked_sub(offload::LEN);
        let outcome = match packet.map(|len| slot.frame_mut().received_with_offload(len)) {
            Some(Ok(())) => Outcome::Done,
            _ => Status::InvalidArgument.into(),
        };
        self.finish(slot, outcome);
    }

    /// The slot's packet was sent.
    #[inline(always)]
    pub fn complete_write(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Done);
    }

    /// The device refuses this slot.
    #[cold]
    #[inline(never)]
    pub fn fail(&mut self, slot: PostedSlot, status: Status) {
        self.finish(slot, status.into());
    }

    /// The slot was given back because of a cancel or a close.
    #[inline]
    pub fn cancel(&mut self, slot: PostedSlot) {
        self.finish(slot, Outcome::Cancelled);
    }

    /// Passes on what an inner queue completed: for wrappers.
    pub fn forward(&mut self, done: Done) {
        let Done { slot, outcome } = done;
        self.finish(slot, outcome);
    }

    /// Always inlined, with all that it calls, and the slot taken apart first: it then never leaves the
    /// registers, where a call, or a panic that has to drop it, would want it in memory, written in
    /// small pieces and read back in large ones.
    #[inline(always)]
    fn finish(&mut self, slot: PostedSlot, outcome: Outcome) {
        let ring = slot.ring;
        let (frame, user_data, class) = slot.into_frame();
        if self.is_foreign(ring) {
            return abandon(ring, Orphan { frame, user_data, class });
        }
        match &mut self.sink {
            Sink::Ring(completions) => completions.done(class, frame, user_data, outcome),
            Sink::Wrapper(list) => {
                let slot = PostedSlot::new(frame, user_data, ring, class);
                list.push_back(Done { slot, outcome });
            }
        }
    }

    /// Whether a device has mixed up two rings' slots. Such a slot completes on its own ring as
    /// abandoned.
    #[inline(always)]
    fn is_foreign(&self, ring: u32) -> bool {
        // Nearly always they are the same.
        self.ring != ring && self.is_a_ring()
    }

    #[cold]
    fn is_a_ring(&self) -> bool {
        self.ring != 0
    }
}

/// The place of a class in a pair of reads and writes.
#[inline(always)]
pub(crate) fn list_of(class: Class) -> usize {
    usize::from(class != Class::Read)
}

/// A private pair of lists for a wrapper: it takes slots from the poller's [`Io`], posts those it
/// likes to the queue it wraps, and sees what that queue completes.
#[derive(Debug, Default)]
pub struct Relay {
    posted: Posted,
    done: VecDeque<Done>,
    held: [i64; 2],
}

impl Relay {
    /// Posts a slot to the inner queue.
    pub fn post(&mut self, slot: PostedSlot) {
        self.posted.list(slot.class).push_back(slot);
    }

    /// Slots posted and not taken by the inner queue: reads and writes.
    pub fn posted(&self) -> (usize, usize) {
        (self.posted.reads.len(), self.posted.writes.len())
    }

    /// Polls the inner queue with what is posted.
    pub fn poll(&mut self, queue: &mut dyn Queue) -> Result<Progress, Status> {
        let before = self.with_us();
        let sink = Sink::Wrapper(&mut self.done);
        let mut io = Io::new(0, &mut self.posted, None, sink, [u32::MAX; 2]);
        let result = queue.poll(&mut io);
        self.settle(before);
        result
    }

    /// As [`poll`](Self::poll) with everything that `io` offers; what the inner queue leaves posted
    /// is put back.
    pub fn pass_through(
        &mut self,
        queue: &mut dyn Queue,
        io: &mut Io<'_>,
    ) -> Result<Progress, Status> {
        while let Some(slot) = io.take_read() {
            self.post(slot);
        }
        while let Some(slot) = io.take_write() {
            self.post(slot);
        }
        let result = self.poll(queue);
        self.put_back(io);
        result
    }

    /// Puts what the inner queue left posted back to the poller.
    #[cold]
    #[inline(never)]
    pub fn put_back(&mut self, io: &mut Io<'_>) {
        for list in [&mut self.posted.reads, &mut self.posted.writes] {
            while let Some(slot) = list.pop_back() {
                io.put_back(slot);
            }
        }
    }

    /// Asks the inner queue to close.
    pub fn close(&mut self, queue: &mut dyn Queue) -> bool {
        let before = self.with_us();
        let mut io = Io::new(0, &mut self.posted, None, Sink::Wrapper(&mut self.done), [0; 2]);
        let closed = queue.close(&mut io);
        self.settle(before);
        closed
    }

    /// Slots that are posted or done, by class: what a call of the inner queue takes off this sum, it
    /// keeps.
    fn with_us(&self) -> [i64; 2] {
        let (reads, writes) = self.posted();
        let mut sum = [reads as i64, writes as i64];
        for done in &self.done {
            sum[list_of(done.slot.class)] += 1;
        }
        sum
    }

    fn settle(&mut self, before: [i64; 2]) {
        let now = self.with_us();
        self.held[0] += before[0] - now[0];
        self.held[1] += before[1] - now[1];
    }

    /// What the inner queue has completed, oldest first.
    pub fn next_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// Slots the inner queue keeps: reads and writes.
    pub fn kept(&self) -> (usize, usize) {
        (self.held[0].max(0) as usize, self.held[1].max(0) as usize)
    }
}
