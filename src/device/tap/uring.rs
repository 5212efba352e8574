//! The engine over Linux io_uring: writes in batches, and for a queue on a poller's thread one
//! `READ_MULTISHOT` over a ring of provided buffers, which are the posted slots; one `io_uring_enter`
//! per turn carries both. A queue that its owner drives has its packets by `read(2)`.
//!
//! # Whose a slot is
//!
//! A slot that the kernel may touch stands in [`Kernel::reads`] or [`Kernel::writes`]. It leaves them
//! in two ways only: by the completion that names it, or, for a read, after the multishot request
//! has ended (its last completion is in) and the buffer ring has been unregistered. Nothing else
//! takes a slot out, and if neither happens the tables are leaked on purpose ([`Kernel::drop`]).
//!
//! # Whose a ring is
//!
//! A queue on a poller's thread has a ring for that thread alone (`SINGLE_ISSUER`), in which the
//! kernel works only inside our `io_uring_enter` (`DEFER_TASKRUN`). So the ring is made by the first
//! poll, not where the queue is opened.
//!
//! A queue that its owner drives may change threads between two calls, and so goes without these. A
//! multishot there would interrupt the thread for each packet that comes. It has none: the ring does
//! writes only, which are over when the call that submits them is, so that the kernel has nothing of
//! ours between two calls and any thread may make the next.
//!
//! Either sleeps on the TAP's own descriptor: a packet that came is in the TAP until one of our calls
//! takes it. The ring's descriptor is not enough: when one call did not finish the work (the kernel
//! does about 20 pieces a call), neither it nor the ring's `TASKRUN` flag told of the rest (Linux
//! 6.18). So after a call that brought something comes another one.
//!
//! Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register_buf_ring(3),
//! io_uring_prep_read_multishot(3), io_uring_cancelation(7).

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io, thread};

use io_uring::types::{BufRingEntry, CancelBuilder, Fixed};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use memmap2::MmapMut;
// Not through the door of `vmring_core::sync`: the kernel reads this word, so it must be the real one.
use std::sync::atomic::{AtomicU16, Ordering};

use super::framing::{Fault, Framing, fault_of, status_of};
use super::limits::{URING_COMPLETIONS, URING_READS, URING_WRITES};
use super::open::TapQueueFd;
use super::plain::Plain;
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The buffer group of the reads.
const GROUP: u16 = 0;
/// The TAP, as it is registered with the ring: that saves looking it up for each frame.
const FILE: Fixed = Fixed(0);

/// `user_data` of the multishot request, of its cancel, and of the first write.
const READ: u64 = 0;
const CANCEL: u64 = 1;
const WRITE: u64 = 2;

/// Whether this process may have such a ring and the kernel knows every operation.
///
/// On a thread of its own: the kernel ends a ring some milliseconds after its last descriptor, and
/// interrupts whatever system call the thread that had it is in then, as a signal would.
pub(crate) fn check() -> io::Result<()> {
    let checker = thread::Builder::new().name("vmring-check".to_owned()).spawn(check_here)?;
    checker.join().unwrap_or_else(|_| Err(io::Error::other("the check panicked")))
}

fn check_here() -> io::Result<()> {
    let mut state = UringState::new(true)?;
    let mut probe = Probe::new();
    state.ring.submitter().register_probe(&mut probe)?;
    let known = [opcode::ReadMulti::CODE, opcode::Write::CODE, opcode::AsyncCancel::CODE];
    if known.into_iter().all(|code| probe.is_supported(code)) {
        state.unregister();
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, "READ_MULTISHOT needs Linux 6.7"))
    }
}

pub(crate) struct Uring {
    fd: Arc<TapQueueFd>,
    /// Whether one thread drives from now on.
    bound: bool,
    state: Option<UringState>,
    /// Reads while no thread has bound.
    plain: Plain,
    /// Taken back from the kernel, or put back by it, until the next poll.
    recall: Recall,
}

/// What a cancel is after.
#[derive(Debug, Default)]
struct Recall {
    all: bool,
    targets: Vec<u64>,
}

impl Recall {
    fn is_empty(&self) -> bool {
        !self.all && self.targets.is_empty()
    }

    fn wants(&self, slot: &PostedSlot) -> bool {
        self.all || self.targets.contains(&slot.user_data())
    }

    fn clear(&mut self) {
        self.all = false;
        self.targets.clear();
    }
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring").field("bound", &self.bound).finish_non_exhaustive()
    }
}

impl Uring {
    pub(crate) fn new(fd: Arc<TapQueueFd>) -> Self {
        let plain = Plain::new(fd.clone());
        Self { fd, bound: false, state: None, plain, recall: Recall::default() }
    }

    pub(crate) fn bind_to_thread(&mut self) {
        // A ring that is there already goes on as it is.
        self.bound = true;
    }

    /// Makes the ring, on the thread that is to drive it.
    pub(crate) fn prepare(&mut self) -> io::Result<()> {
        if self.state.is_none() {
            let mut state = UringState::new(self.bound)?;
            state.ring.submitter().register_files(&[self.fd.as_raw_fd()])?;
            state.link_writes = self.fd.refuses_writes();
            self.state = Some(state);
        }
        Ok(())
    }

    pub(crate) fn poll(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<Progress, Status> {
        let Some(state) = &mut self.state else { return Ok(Progress::Idle) };
        state.ask_to_end();
        state.push_writes(cx, framing);
        if self.recall.is_empty() {
            state.provide(cx, framing.header);
            state.arm_multishot();
        }
        state.enter().map_err(|error| status_of(&error))?;
        let result = state.complete(cx, framing);
        if !state.armed && !self.recall.is_empty() {
            let recall = &self.recall;
            state.take_back(cx, framing.header, |slot| recall.wants(slot))?;
            self.recall.clear();
        }
        result?;
        let more = state.must_enter || state.has_work();
        if !state.single_issuer && self.plain.read(cx, framing)? == Progress::More {
            return Ok(Progress::More);
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    /// Whether nothing has come meanwhile. What ends the sleep is to be looked at.
    pub(crate) fn arm(&mut self) -> bool {
        let Some(state) = &mut self.state else { return true };
        let quiet = !state.must_enter && !state.has_work() && state.is_quiet();
        state.must_enter |= state.single_issuer;
        quiet
    }

    pub(crate) fn cancel(&mut self, target: Option<u64>) -> u32 {
        let Some(state) = &mut self.state else { return 0 };
        let slots = state.reads.iter().flatten();
        let matched = slots.filter(|slot| target.is_none_or(|t| t == slot.user_data())).count();
        if matched > 0 {
            match target {
                None => self.recall.all = true,
                Some(target) => self.recall.targets.push(target),
            }
            state.cancel_requested = true;
        }
        matched as u32
    }

    /// Takes everything back from the kernel. False while it still holds on.
    pub(crate) fn close(&mut self, cx: &mut PollContext<'_>, framing: &Framing) -> bool {
        let Some(state) = &mut self.state else { return true };
        state.cancel_requested = true;
        state.ask_to_end();
        if state.enter().is_err() {
            return false;
        }
        // A TAP that is gone is no reason to keep anything.
        let _ = state.complete(cx, framing);
        if !state.lets_go() {
            return false;
        }
        state.unregister();
        for bid in state.order.drain(..) {
            if let Some(slot) = state.reads[usize::from(bid)].take() {
                cx.cancel(slot);
            }
        }
        self.state = None;
        true
    }
}

/// A ring, and what the kernel has of ours.
struct UringState {
    ring: IoUring,
    buffers: Buffers,
    /// For the thread that made it alone. If it is not, there are no reads in it.
    single_issuer: bool,
    /// By buffer number: what the kernel may fill.
    reads: Box<[Option<PostedSlot>]>,
    /// Numbers of the buffers that the kernel has, in the order in which it will fill them.
    order: VecDeque<u16>,
    /// Numbers of buffers that it has not.
    free_reads: Vec<u16>,
    /// By number: what the kernel may read.
    writes: Box<[Option<PostedSlot>]>,
    free_writes: Vec<u16>,
    /// The multishot request is in flight: its last completion has not come.
    armed: bool,
    /// It is to end: for a cancel or a close.
    cancel_requested: bool,
    /// It has been asked to.
    ending: bool,
    /// The kernel may have work for us of which nothing tells.
    must_enter: bool,
    /// Writes that the kernel did not take now, with their places in submission order, until it has
    /// answered for all of them.
    refused: Vec<(u64, PostedSlot)>,
    /// By number: the place of a write in submission order.
    places: Box<[u64]>,
    next_place: u64,
    /// The kernel may refuse a write for a moment: then those behind it are not to be tried.
    link_writes: bool,
}

/// A request that carries no memory of its own.
enum Request {
    /// The multishot read, which fills the buffers of [`GROUP`].
    Read,
    /// The cancel of that read.
    CancelRead,
}

impl Request {
    fn entry(self) -> squeue::Entry {
        match self {
            Request::Read => opcode::ReadMulti::new(FILE, 0, GROUP).build().user_data(READ),
            Request::CancelRead => opcode::AsyncCancel::new(READ).build().user_data(CANCEL),
        }
    }
}

impl UringState {
    fn new(single_issuer: bool) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(URING_COMPLETIONS).dontfork();
        if single_issuer {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        }
        let ring = builder.build(u32::from(URING_WRITES) + 2)?;
        let reads = if single_issuer { URING_READS } else { 0 };
        let buffers = Buffers::new()?;
        let state = Self {
            ring,
            buffers,
            single_issuer,
            reads: (0..reads).map(|_| None).collect(),
            order: VecDeque::with_capacity(usize::from(reads)),
            free_reads: (0..reads).rev().collect(),
            writes: (0..URING_WRITES).map(|_| None).collect(),
            free_writes: (0..URING_WRITES).rev().collect(),
            armed: false,
            cancel_requested: false,
            ending: false,
            must_enter: false,
            refused: Vec::with_capacity(usize::from(URING_WRITES)),
            places: vec![0; usize::from(URING_WRITES)].into(),
            next_place: 0,
            link_writes: false,
        };
        if single_issuer {
            state.register()?;
        }
        Ok(state)
    }

    fn register(&self) -> io::Result<()> {
        let address = self.buffers.memory.as_ptr() as u64;
        // SAFETY: the memory has `URING_READS` entries and lives until the group is unregistered, or for
        // ever; what its entries name is in `reads`.
        unsafe {
            self.ring.submitter().register_buf_ring_with_flags(address, URING_READS, GROUP, 0)
        }
    }

    /// Takes back what is registered, the TAP too: the ring itself ends some time after it is dropped,
    /// and would hold it till then.
    fn unregister(&mut self) {
        let _ = self.ring.submitter().unregister_files();
        if self.ring.submitter().unregister_buf_ring(GROUP).is_ok() {
            self.buffers.forget_all();
        }
    }

    /// Queues the posted writes, as far as there is room.
    fn push_writes(&mut self, cx: &mut PollContext<'_>, framing: &Framing) {
        if cx.writes() == 0 || (self.link_writes && self.is_writing()) {
            return;
        }
        let mut queue = self.ring.submission();
        // Of a chain all but the last name the next.
        let mut last: Option<squeue::Entry> = None;
        let link = if self.link_writes { squeue::Flags::IO_LINK } else { squeue::Flags::empty() };
        while let Some(&number) = self.free_writes.last() {
            if queue.capacity() - queue.len() <= 2 + usize::from(last.is_some()) {
                break;
            }
            let Some(mut slot) = cx.take_write() else { break };
            let Some(bytes) = slot.packet_with_header_mut(framing.header) else {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            };
            if framing.take_dhcp(bytes) {
                cx.complete_write(slot);
                continue;
            }
            // Without the flag the kernel lets each one wait by itself until there is room, and then
            // takes them in any order.
            let entry = opcode::Write::new(FILE, bytes.as_ptr(), bytes.len() as u32)
                .rw_flags(libc::RWF_NOWAIT)
                .build()
                .user_data(WRITE + u64::from(number));
            self.free_writes.pop();
            self.writes[usize::from(number)] = Some(slot);
            self.places[usize::from(number)] = self.next_place;
            self.next_place += 1;
            if let Some(entry) = last.replace(entry) {
                // SAFETY: the bytes are those of a slot in `writes`.
                unsafe { queue.push(&entry.flags(link)) }.expect("there is room, as just seen");
            }
        }
        if let Some(entry) = last {
            // SAFETY: as above.
            unsafe { queue.push(&entry) }.expect("there is room, as seen");
        }
    }

    fn is_writing(&self) -> bool {
        self.free_writes.len() < usize::from(URING_WRITES)
    }

    /// Gives the kernel the posted reads, as far as there is room.
    fn provide(&mut self, cx: &mut PollContext<'_>, header: usize) {
        while let Some(&number) = self.free_reads.last() {
            let Some(slot) = cx.take_read() else { break };
            self.free_reads.pop();
            if let Err(slot) = self.provide_one(number, slot, header) {
                self.free_reads.push(number);
                cx.fail(slot, Status::InvalidArgument);
            }
        }
        self.buffers.publish();
    }

    fn provide_one(
        &mut self,
        number: u16,
        mut slot: PostedSlot,
        header: usize,
    ) -> Result<(), PostedSlot> {
        let Some(room) = slot.buffer_with_header_mut(header) else { return Err(slot) };
        let (address, len) = (room.as_mut_ptr() as u64, room.len() as u32);
        self.reads[usize::from(number)] = Some(slot);
        self.order.push_back(number);
        self.buffers.put(number, address, len);
        Ok(())
    }

    /// Queues the multishot request, if the kernel has buffers and the request is not in flight.
    fn arm_multishot(&mut self) {
        if self.armed || self.order.is_empty() {
            return;
        }
        self.armed = self.push(Request::Read);
    }

    /// Asks the multishot request to end, if it is to and has not been asked.
    fn ask_to_end(&mut self) {
        self.cancel_requested &= self.armed;
        if self.cancel_requested && !self.ending {
            self.ending = self.push(Request::CancelRead);
        }
    }

    /// Queues a request. Returns false if the submission queue is full.
    fn push(&mut self, request: Request) -> bool {
        // SAFETY: a `Request` holds no pointer. The read fills only buffers of the group, and
        // `provide_one`, which alone puts buffers there, keeps their slots in `reads`.
        unsafe { self.ring.submission().push(&request.entry()) }.is_ok()
    }

    /// Whether the kernel has something for us that takes an `io_uring_enter`.
    fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Nothing is queued on either side, and if there are buffers the request that fills them runs.
    fn is_quiet(&mut self) -> bool {
        self.ring.completion().is_empty()
            && self.ring.submission().is_empty()
            && (self.armed || self.order.is_empty())
    }

    /// Submits what is queued and lets the kernel do its work for us, in one call; none if there is
    /// neither.
    fn enter(&mut self) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        let mut queue = self.ring.submission();
        queue.sync();
        let told = queue.taskrun() || queue.cq_overflow();
        let (len, work) = (queue.len() as u32, told || std::mem::take(&mut self.must_enter));
        drop(queue);
        if len == 0 && !work {
            return Ok(());
        }
        let flags = if self.single_issuer || work { GETEVENTS } else { 0 };
        // SAFETY: no argument beyond the flags; what the entries name is in `reads` and `writes`.
        match unsafe { self.ring.submitter().enter::<libc::sigset_t>(len, 0, flags, None) } {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // Later: interrupted, or the completions have to be taken first.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Takes the completions that are there.
    fn complete(&mut self, cx: &mut PollContext<'_>, framing: &Framing) -> Result<(), Status> {
        let mut result = Ok(());
        let Self { ring, reads, order, free_reads, writes, free_writes, refused, .. } = self;
        let (places, link_writes) = (&self.places, self.link_writes);
        for cqe in ring.completion() {
            match cqe.user_data() {
                READ => {
                    self.must_enter = true;
                    if let Some(number) = cqueue::buffer_select(cqe.flags()) {
                        // In order but for requests that ended and began anew.
                        match order.front() {
                            Some(front) if *front == number => drop(order.pop_front()),
                            _ => order.retain(|other| *other != number),
                        }
                        if let Some(slot) = reads[usize::from(number)].take() {
                            free_reads.push(number);
                            match usize::try_from(cqe.result()) {
                                Ok(len) => framing.received(cx, slot, len),
                                Err(_) => cx.put_back(slot),
                            }
                        }
                    }
                    if !cqueue::more(cqe.flags()) {
                        (self.armed, self.cancel_requested, self.ending) = (false, false, false);
                    }
                    match cqe.result() {
                        // No buffers left, or asked to end.
                        0.. => {}
                        error if [-libc::ENOBUFS, -libc::ECANCELED].contains(&error) => {}
                        error => match fault_of(-error) {
                            Fault::Wait => {}
                            Fault::Entry(status) | Fault::Gone(status) => result = Err(status),
                        },
                    }
                }
                CANCEL => {}
                write => {
                    let number = (write - WRITE) as u16;
                    let Some(slot) = writes[usize::from(number)].take() else { continue };
                    free_writes.push(number);
                    let place = places[usize::from(number)];
                    match cqe.result() {
                        0.. => cx.complete_write(slot),
                        // One before it in its chain was refused.
                        error if link_writes && error == -libc::ECANCELED => {
                            refused.push((place, slot));
                        }
                        error => match fault_of(-error) {
                            Fault::Wait => refused.push((place, slot)),
                            Fault::Entry(status) => cx.fail(slot, status),
                            Fault::Gone(status) => {
                                refused.push((place, slot));
                                result = Err(status);
                            }
                        },
                    }
                }
            }
        }
        if self.is_writing() {
            // Those that are out yet hold up the others: put back alone, these would stand behind them.
            self.must_enter |= self.link_writes;
            return result;
        }
        self.refused.sort_unstable_by_key(|(place, _)| *place);
        while let Some((_, slot)) = self.refused.pop() {
            cx.put_back(slot);
        }
        result
    }

    /// Whether the kernel touches nothing of ours any more.
    fn lets_go(&self) -> bool {
        !self.armed && !self.is_writing()
    }

    /// With no multishot request in flight: takes the buffers back, completes those that `wanted`
    /// names as cancelled and gives the others to the kernel again, in their order.
    fn take_back(
        &mut self,
        cx: &mut PollContext<'_>,
        header: usize,
        wanted: impl Fn(&PostedSlot) -> bool,
    ) -> Result<(), Status> {
        debug_assert!(!self.armed, "the state may fill them");
        self.ring.submitter().unregister_buf_ring(GROUP).map_err(|error| status_of(&error))?;
        self.buffers.forget_all();
        self.register().map_err(|_| Status::MemFailure)?;
        for _ in 0..self.order.len() {
            let Some(number) = self.order.pop_front() else { break };
            let Some(slot) = self.reads[usize::from(number)].take() else { continue };
            if wanted(&slot) {
                self.free_reads.push(number);
                cx.cancel(slot);
            } else if let Err(slot) = self.provide_one(number, slot, header) {
                self.free_reads.push(number);
                cx.fail(slot, Status::InvalidArgument);
            }
        }
        self.buffers.publish();
        Ok(())
    }
}

impl Drop for UringState {
    /// Where a queue was not closed: something above us panicked, or time was up.
    fn drop(&mut self) {
        let slots = self.reads.iter().chain(&self.writes).flatten().count();
        if slots == 0 && !self.armed {
            return;
        }
        // Ends every request before it returns, or says that it could not.
        let timeout = io_uring::types::Timespec::from(Duration::from_secs(1));
        let every = CancelBuilder::any();
        let _ = self.ring.submitter().register_sync_cancel(Some(timeout), every);
        for _ in 0..100 {
            if self.enter().is_err() {
                break;
            }
            for cqe in self.ring.completion() {
                match cqe.user_data() {
                    READ if !cqueue::more(cqe.flags()) => self.armed = false,
                    READ | CANCEL => {}
                    write => self.free_writes.push((write - WRITE) as u16),
                }
            }
            let buffers =
                !self.single_issuer || self.ring.submitter().unregister_buf_ring(GROUP).is_ok();
            if self.lets_go() && buffers {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        tracing::error!(slots, "leaked: the state holds on");
        std::mem::forget(std::mem::take(&mut self.reads));
        std::mem::forget(std::mem::take(&mut self.writes));
        self.buffers.leak();
    }
}

/// The memory of a ring of provided buffers: entries, and among them the tail.
struct Buffers {
    memory: MmapMut,
    tail: u16,
    leaked: bool,
}

impl Buffers {
    fn new() -> io::Result<Self> {
        let memory = MmapMut::map_anon(usize::from(URING_READS) * size_of::<BufRingEntry>())?;
        Ok(Self { memory, tail: 0, leaked: false })
    }

    /// Puts a buffer behind the others; the kernel sees it after [`publish`](Self::publish).
    fn put(&mut self, number: u16, address: u64, len: u32) {
        let place = usize::from(self.tail & (URING_READS - 1));
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `place` is one of `URING_READS` entries. The kernel reads an entry only between head and
        // tail, and this one is not: there are no more numbers than entries.
        let entry = unsafe { &mut *self.memory.as_mut_ptr().cast::<BufRingEntry>().add(place) };
        entry.set_addr(address);
        entry.set_len(len);
        entry.set_bid(number);
    }

    fn publish(&mut self) {
        let base = self.memory.as_ptr().cast::<BufRingEntry>();
        // SAFETY: the memory is that of a buffer ring; the tail lies in its first entry, aligned to
        // two bytes, and is written by nobody else.
        let tail = unsafe { &*BufRingEntry::tail(base).cast::<AtomicU16>() };
        // Release: pairs with the kernel's acquire of the tail; it sees the entries.
        tail.store(self.tail, Ordering::Release);
    }

    /// The group has been unregistered: a new one begins at zero.
    fn forget_all(&mut self) {
        self.tail = 0;
        self.publish();
    }

    fn leak(&mut self) {
        self.leaked = true;
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        if self.leaked
            && let Ok(empty) = MmapMut::map_anon(1)
        {
            std::mem::forget(std::mem::replace(&mut self.memory, empty));
        }
    }
}
