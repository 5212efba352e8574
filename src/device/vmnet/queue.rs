//! Reading and writing: batches of descriptors over the poller's own slots. No packet is copied here.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::Arc;

use libc::iovec;
use vmring_core::sync::Ordering;
use vmring_core::{Class, offload};

use super::events::check;
use super::ffi::{InterfaceRef, PacketDescriptor, vmnet_read, vmnet_write};
use super::limits::READS_OFFERED_MIN;
use super::started::StartedInterface;
use crate::config::Direction;
use crate::device::context::PollContext;
use crate::device::seam::{Progress, Queue, Wake};
use crate::error::{Error, Status};
use crate::sys::lock;

/// Descriptors with an iovec each, allocated once. They point at slots only during the call for
/// which they were set.
struct Batch {
    descriptors: Box<[PacketDescriptor]>,
    iovecs: Box<[iovec]>,
}

// SAFETY: the pointers are looked at only by the call that follows their being set, on one thread.
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

    /// Sets one: all fields, since vmnet changes some of them in a read. One iovec a packet: with
    /// more, reports differ.
    #[inline]
    fn set(&mut self, i: usize, base: *mut u8, len: usize) {
        let iovec = &mut self.iovecs[i];
        iovec.iov_base = base.cast();
        iovec.iov_len = len;
        self.descriptors[i] =
            PacketDescriptor { vm_pkt_size: len, vm_pkt_iov: iovec, vm_pkt_iovcnt: 1, vm_flags: 0 };
    }

    /// Calls `vmnet_read` or `vmnet_write` with the first `n`, which were just set. Answers with the
    /// status, and the count as far as it can be true.
    ///
    /// # Safety
    ///
    /// The descriptors point at bytes that the caller has to itself, to be written in a read.
    unsafe fn call(
        &mut self,
        function: unsafe extern "C" fn(InterfaceRef, *mut PacketDescriptor, *mut c_int) -> u32,
        started: &StartedInterface,
        n: usize,
    ) -> (Result<(), Status>, usize) {
        let mut count = n as c_int;
        // SAFETY: `port` runs as long as it exists; there are `n` descriptors, as the caller says.
        let status =
            unsafe { function(started.interface(), self.descriptors.as_mut_ptr(), &mut count) };
        (check(status), usize::try_from(count).unwrap_or(0).min(n))
    }
}

pub(crate) struct VmnetQueue {
    /// `None` once it has let go.
    started: Option<Arc<StartedInterface>>,
    reads: Option<Reads>,
    writes: Option<Writes>,
    /// Bytes of the virtio header in front of each packet: 12 or none.
    header: usize,
}

struct Reads {
    batch: Batch,
    /// How many to offer.
    offer: usize,
    /// Events before the last read.
    seen: u64,
    /// The poller has slept since the last read, and that one had found nothing more.
    slept: bool,
    drained: bool,
    /// The last read found packets after a sleep and no event had come.
    surprised: bool,
}

struct Writes {
    batch: Batch,
    /// How many to send one to a call, because a batch failed and vmnet did not say where.
    singly: usize,
}

impl VmnetQueue {
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
            // Now that there is somebody to wake and something to read into.
            if let Err(status) = started.listen() {
                started.release_reading();
                return Err(status.into());
            }
        }
        Ok(Self { started: Some(started), reads, writes, header })
    }

    fn release(&mut self) {
        if let Some(started) = self.started.take()
            && self.reads.take().is_some()
        {
            started.release_reading();
        }
    }
}

impl Reads {
    fn read(
        &mut self,
        started: &StartedInterface,
        cx: &mut PollContext<'_>,
        header: usize,
    ) -> Progress {
        let events = started.events.count();
        let offer = self.offer.min(self.batch.len());
        let mut n = 0;
        for slot in cx.posted_reads().take(offer) {
            let Some(buffer) = slot.buffer_with_header_mut(header) else { break };
            self.batch.set(n, buffer.as_mut_ptr(), buffer.len());
            n += 1;
        }
        if n == 0 {
            // Nothing posted; or, from a wrapper that hides what we need, no headroom.
            if let Some(slot) = cx.take_read() {
                cx.fail(slot, Status::InvalidArgument);
            }
            return Progress::Idle;
        }
        // SAFETY: each descriptor has the room of a slot posted in `cx`, which we have borrowed.
        let (result, count) = unsafe { self.batch.call(vmnet_read, started, n) };
        let slept = std::mem::take(&mut self.slept);
        let surprise = slept && self.drained && events == self.seen;
        self.seen = events;
        let count = match result {
            Ok(()) => count,
            // As much as "nothing there".
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

/// What passes, so that the write is to be tried again: vmnet has no event for it.
fn passes(status: Status) -> bool {
    matches!(status, Status::BufferExhausted | Status::MemFailure)
}

impl Writes {
    fn write(&mut self, started: &StartedInterface, cx: &mut PollContext<'_>, header: usize) {
        // Uncontended unless several rings write.
        let _writing = lock(&started.writing);
        if self.singly == 0 {
            let n = cx.writes().min(self.batch.len());
            if n == 0 {
                return;
            }
            let (result, count) = self.send(started, cx, n, header);
            let sent = match result {
                Ok(()) => count,
                // Whether the count is right after an error is not known: one below what was asked
                // for is taken at its word.
                Err(_) if count < n => count,
                Err(_) => 0,
            };
            complete(cx, sent);
            if result.is_err() {
                self.singly = n - sent;
            }
        }
        // One to a call, each gets its own answer; a batch that failed does not say whose it was.
        while self.singly > 0 && cx.writes() > 0 {
            match self.send(started, cx, 1, header) {
                (Ok(()), 1) => complete(cx, 1),
                // Not taken, without an error: it waits.
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

    fn send(
        &mut self,
        started: &StartedInterface,
        cx: &mut PollContext<'_>,
        n: usize,
        header: usize,
    ) -> (Result<(), Status>, usize) {
        let mut set = 0;
        for slot in cx.posted_writes().take(n) {
            let Some(packet) = slot.packet_with_header_mut(header) else { break };
            self.batch.set(set, packet.as_mut_ptr(), packet.len());
            set += 1;
        }
        if set == 0 {
            // From a wrapper that hides what we need.
            return (Err(Status::InvalidArgument), 0);
        }
        // SAFETY: each descriptor has the packet of a slot posted in `cx`, which we have borrowed.
        unsafe { self.batch.call(vmnet_write, started, set) }
    }
}

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
        // Events are always on. One that came since the last read has rung, and perhaps too early.
        match (&self.started, &mut self.reads) {
            (Some(started), Some(reads)) => {
                reads.slept = started.events.count() == reads.seen;
                // Whatever else woke the poller may have been faster than the event, but not so much
                // faster: one that has not come by now was not going to.
                if std::mem::take(&mut reads.surprised) && reads.slept {
                    started.events.rescued.fetch_add(1, Ordering::Relaxed);
                }
                reads.slept
            }
            _ => true,
        }
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        let _ = cx; // no slot is ever kept
        self.release();
        true
    }
}

impl Drop for VmnetQueue {
    fn drop(&mut self) {
        // Without being closed, if something above panicked.
        self.release();
    }
}

const _: () = assert!(offload::LEN == 12, "the header that vmnet carries");
