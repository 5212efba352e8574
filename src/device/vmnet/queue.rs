//! Reading and writing: vmnet's descriptors point at the poller's own slots, and one call transfers
//! a batch. No packet is copied here.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::Arc;

use libc::iovec;
use vmring_core::guest::Segments;
use vmring_core::sync::Ordering;
use vmring_core::{Class, offload};

use super::events::check;
use super::ffi::{InterfaceRef, PacketDescriptor, vmnet_read, vmnet_write};
use super::limits::READS_OFFERED_MIN;
use super::started::StartedInterface;
use crate::config::Direction;
use crate::device::context::PollContext;
use crate::device::seam::{Progress, Queue, Wake};
use crate::device::slot::PostedSlot;
use crate::error::{Error, Status};
use crate::sys::lock;

/// Descriptors with one iovec each, allocated once. Their pointers are valid only from the `set`
/// that stored them to the end of the next `call`.
struct Batch {
    descriptors: Box<[PacketDescriptor]>,
    iovecs: Box<[iovec]>,
}

// SAFETY: nothing follows the pointers except `call`. Its callers, `Reads::read` and
// `Writes::send`, set all of the descriptors that they pass just before, in the same function and
// so on the same thread. A pointer that is left over from an earlier call, perhaps on another
// thread, is never followed.
unsafe impl Send for Batch {}

impl Batch {
    fn new(len: usize) -> Self {
        let empty = PacketDescriptor {
            vm_pkt_size: 0,
            vm_pkt_iov: null_mut(),
            vm_pkt_iovcnt: 1,
            vm_flags: 0,
        };
        Self {
            descriptors: vec![empty; len].into_boxed_slice(),
            iovecs: vec![iovec { iov_base: null_mut(), iov_len: 0 }; len].into_boxed_slice(),
        }
    }

    fn len(&self) -> usize {
        self.descriptors.len()
    }

    /// Points descriptor `i` at `len` bytes at `base`. It sets all fields, because vmnet changes
    /// some of them in a read. A packet has one iovec: reports differ on whether vmnet takes more
    /// (QEMU says that a write with several fails; hyperkit passes several).
    #[inline]
    fn set(&mut self, i: usize, base: *mut u8, len: usize) {
        let iovec = &mut self.iovecs[i];
        iovec.iov_base = base.cast();
        iovec.iov_len = len;
        self.descriptors[i] =
            PacketDescriptor { vm_pkt_size: len, vm_pkt_iov: iovec, vm_pkt_iovcnt: 1, vm_flags: 0 };
    }

    /// Calls `vmnet_read` or `vmnet_write` with the first `n` descriptors. Returns the status, and
    /// the count of packets that vmnet reported, limited to `0..=n`.
    ///
    /// # Safety
    ///
    /// `n` is at most [`len`](Self::len). The caller has just `set` the first `n` descriptors to
    /// bytes that live through the call and that nobody else uses meanwhile. For a read, the bytes
    /// may be written.
    unsafe fn call(
        &mut self,
        function: unsafe extern "C" fn(InterfaceRef, *mut PacketDescriptor, *mut c_int) -> u32,
        started: &StartedInterface,
        n: usize,
    ) -> (Result<(), Status>, usize) {
        let mut count = n as c_int;
        // SAFETY: the interface runs, because we borrow its `StartedInterface`. The caller promises
        // that the first `n` descriptors exist and point at bytes of its own.
        let status =
            unsafe { function(started.interface(), self.descriptors.as_mut_ptr(), &mut count) };
        (check(status), usize::try_from(count).unwrap_or(0).min(n))
    }
}

/// One ring's endpoint of a vmnet interface.
pub(crate) struct VmnetQueue {
    /// The share of the interface; `None` after `release`.
    started: Option<Arc<StartedInterface>>,
    /// The reading half, if the ring reads.
    reads: Option<Reads>,
    /// The writing half, if the ring writes.
    writes: Option<Writes>,
    /// The size in bytes of the virtio header in front of each packet: 12, or 0 for no header.
    header: usize,
}

/// The state of a queue that reads.
struct Reads {
    batch: Batch,
    /// The number of reads to offer in the next call.
    offer: usize,
    /// The number of events before the last read.
    seen: u64,
    /// Whether the poller has armed its doorbell since the last read and no event had come by then.
    slept: bool,
    /// Whether the last read returned fewer packets than it offered reads, so none were left.
    drained: bool,
    /// Whether a read after a sleep found packets although no event had come.
    surprised: bool,
}

/// The state of a queue that writes.
struct Writes {
    batch: Batch,
    /// The number of packets still to be sent one per call, because their batch failed and vmnet
    /// did not say at which packet.
    singly: usize,
}

impl VmnetQueue {
    /// Creates a queue that shares `started`. `batches` are the most packets per read and per
    /// write.
    ///
    /// # Errors
    ///
    /// [`Status::SetupIncomplete`] if another queue reads already, and vmnet's status if it refuses
    /// events.
    pub(crate) fn new(
        started: Arc<StartedInterface>,
        direction: Direction,
        wake: Wake,
        batches: (u32, u32),
        header: usize,
    ) -> Result<Self, Error> {
        let reads = direction.reads().then(|| Reads {
            batch: Batch::new(batches.0 as usize),
            offer: READS_OFFERED_MIN,
            seen: 0,
            slept: false,
            drained: false,
            surprised: false,
        });
        let writes =
            direction.writes().then(|| Writes { batch: Batch::new(batches.1 as usize), singly: 0 });
        if reads.is_some() {
            if !started.claim_reading() {
                return Err(Status::SetupIncomplete.into());
            }
            started.events.set_wake(Some(wake));
            // Events may come from here on: the wake to ring is set.
            if let Err(status) = started.listen() {
                started.release_reading();
                return Err(status.into());
            }
        }
        Ok(Self { started: Some(started), reads, writes, header })
    }

    /// Gives up the share of the interface, and the right to read.
    fn release(&mut self) {
        if let Some(started) = self.started.take()
            && self.reads.take().is_some()
        {
            started.release_reading();
        }
    }
}

impl Reads {
    /// Reads one batch into posted reads and completes those that vmnet has filled.
    fn read(
        &mut self,
        started: &StartedInterface,
        cx: &mut PollContext<'_>,
        header: usize,
    ) -> Progress {
        // The count is loaded before the read, with Acquire: see `Events::count`.
        let events = started.events.count();
        let offer = self.offer.min(self.batch.len());
        let mut n = 0;
        for slot in cx.posted_reads().take(offer) {
            let Some((base, len)) = space(slot, header) else { break };
            self.batch.set(n, base, len);
            n += 1;
        }
        if n == 0 {
            // No read is posted; or the first one lacks the headroom, because a wrapper around this
            // device did not ask for it.
            if let Some(slot) = cx.take_read() {
                cx.fail(slot, Status::InvalidArgument);
            }
            return Progress::Idle;
        }
        // SAFETY: the loop above has set `n` descriptors, at most `offer` and so at most the
        // batch's length. Each points at the buffer of another slot, borrowed mutably from `cx`: of
        // a frame, or in the mapping that a guest's buffer keeps alive, where the guest may write
        // too. We borrow `cx` until this function returns, and it does not touch its slots during
        // the call.
        let (result, count) = unsafe { self.batch.call(vmnet_read, started, n) };
        let slept = std::mem::take(&mut self.slept);
        let surprise = slept && self.drained && events == self.seen;
        self.seen = events;
        let count = match result {
            Ok(()) => count,
            // It means the same as a success without packets.
            Err(Status::BufferExhausted) => 0,
            Err(status) => {
                self.drained = true;
                if let Some(slot) = cx.take_read() {
                    cx.fail(slot, status);
                }
                return Progress::Idle;
            }
        };
        for descriptor in &self.batch.descriptors[..count] {
            let Some(slot) = cx.take_shown(Class::Read) else { break };
            let len = descriptor.vm_pkt_size;
            match header {
                0 => cx.complete_read(slot, len),
                _ => cx.complete_read_with_header(slot, len),
            }
        }
        self.surprised |= surprise && count > 0;
        self.offer = (2 * count).max(READS_OFFERED_MIN);
        self.drained = count < n;
        if self.drained { Progress::Idle } else { Progress::More }
    }
}

/// Returns whether a write with this status may succeed later. The poller tries it again, because
/// vmnet has no event that says when.
fn passes(status: Status) -> bool {
    matches!(status, Status::BufferExhausted | Status::MemFailure)
}

impl Writes {
    /// Writes one batch of posted writes and completes those that vmnet has taken.
    fn write(&mut self, started: &StartedInterface, cx: &mut PollContext<'_>, header: usize) {
        // Keeps other rings' writes apart. The lock is contended only if several rings write.
        let _writing = lock(&started.writing);
        if self.singly == 0 {
            let n = cx.writes().min(self.batch.len());
            if n == 0 {
                return;
            }
            let (result, count) = self.send(started, cx, n, header);
            let sent = match result {
                Ok(()) => count,
                // It is not known whether the count is right after an error. A count below the
                // number of packets in the call is believed.
                Err(_) if count < n => count,
                Err(_) => 0,
            };
            complete(cx, sent);
            if result.is_err() {
                self.singly = n - sent;
            }
        }
        // The status of a failed batch does not say which packet failed. One packet per call gives
        // each its own answer.
        while self.singly > 0 && cx.writes() > 0 {
            match self.send(started, cx, 1, header) {
                (Ok(()), 1) => complete(cx, 1),
                // vmnet reported no error and did not take the packet: it stays posted.
                (Ok(()), _) => return,
                (Err(status), _) if passes(status) => return,
                (Err(status), _) => {
                    if let Some(slot) = cx.take_write() {
                        cx.fail(slot, status);
                    }
                }
            }
            self.singly -= 1;
        }
        if cx.writes() == 0 {
            self.singly = 0;
        }
    }

    /// Calls `vmnet_write` with the oldest `n` posted writes, and returns its status and count.
    ///
    /// `n` is at most the batch's length.
    fn send(
        &mut self,
        started: &StartedInterface,
        cx: &mut PollContext<'_>,
        n: usize,
        header: usize,
    ) -> (Result<(), Status>, usize) {
        let mut set = 0;
        for slot in cx.posted_writes().take(n) {
            let Some((base, len)) = packet(slot, header) else { break };
            self.batch.set(set, base, len);
            set += 1;
        }
        if set == 0 {
            // The first one lacks the headroom: a wrapper around this device did not ask for it.
            return (Err(Status::InvalidArgument), 0);
        }
        // SAFETY: the loop above has set `set` descriptors, at most `n`. Setting one beyond the
        // batch's length would have panicked. Each points at the packet of another slot, borrowed
        // mutably from `cx`: of a frame, or in the mapping that a guest's buffer keeps alive. We
        // borrow `cx` until this function returns, and it does not touch its slots during the call.
        // vmnet only reads the packet.
        unsafe { self.batch.call(vmnet_write, started, set) }
    }
}

/// The space of a posted read: for the header, if there is one, and the packet. `None` if the slot lacks
/// space for the header.
#[inline(always)]
fn space(slot: &mut PostedSlot, header: usize) -> Option<(*mut u8, usize)> {
    if slot.guest().is_some() {
        return guest_space(slot, header);
    }
    let buffer = slot.buffer_with_header_mut(header)?;
    Some((buffer.as_mut_ptr(), buffer.len()))
}

/// The packet of a posted write, with its header, if there is one. `None` if the slot lacks the header.
#[inline(always)]
fn packet(slot: &mut PostedSlot, header: usize) -> Option<(*mut u8, usize)> {
    if let Some(guest) = slot.guest() {
        return one(guest.packet()).filter(|_| header == 0);
    }
    let packet = slot.packet_with_header_mut(header)?;
    Some((packet.as_mut_ptr(), packet.len()))
}

#[inline(never)]
fn guest_space(slot: &PostedSlot, header: usize) -> Option<(*mut u8, usize)> {
    let guest = slot.guest()?;
    one(if header > 0 { guest.segments() } else { guest.space() })
}

/// The only segment of a guest's buffer. The capabilities ask for no more.
fn one(mut segments: Segments<'_>) -> Option<(*mut u8, usize)> {
    let segment = segments.next()?;
    segments.next().is_none().then_some((segment.as_ptr(), segment.len() as usize))
}

/// Completes the oldest `sent` posted writes.
fn complete(cx: &mut PollContext<'_>, sent: usize) {
    for _ in 0..sent {
        let Some(slot) = cx.take_shown(Class::Write) else { break };
        cx.complete_write(slot);
    }
}

impl Queue for VmnetQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let Some(started) = &self.started else { return Ok(Progress::Idle) };
        if let Some(writes) = &mut self.writes {
            writes.write(started, cx, self.header);
        }
        Ok(match &mut self.reads {
            Some(reads) => reads.read(started, cx, self.header),
            None => Progress::Idle,
        })
    }

    fn arm(&mut self) -> bool {
        // Events are always on. One that came since the last read has rung already, perhaps before
        // the poller armed its doorbell, so the count is compared here: see `Events::happened`.
        match (&self.started, &mut self.reads) {
            (Some(started), Some(reads)) => {
                reads.slept = started.events.count() == reads.seen;
                // After a sleep a read found packets although no event had come. Something else may
                // have woken the poller a little before the event. But an event that has not come
                // by now was not going to come: the packets were rescued.
                if std::mem::take(&mut reads.surprised) && reads.slept {
                    // Relaxed: a statistic that guards nothing.
                    started.events.rescued.fetch_add(1, Ordering::Relaxed);
                }
                reads.slept
            }
            _ => true,
        }
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let _ = cx; // no slot is kept between calls
        self.release();
        true
    }
}

impl Drop for VmnetQueue {
    fn drop(&mut self) {
        // The queue is dropped without `close` if its engine panicked.
        self.release();
    }
}

const _: () = assert!(offload::LEN == 12, "the header that vmnet carries");
