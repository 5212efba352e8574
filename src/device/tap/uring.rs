//! The engine that uses Linux io_uring.
//!
//! Writes are submitted in batches. A queue on a poller's thread reads by one `READ_MULTISHOT`
//! request over a ring of provided buffers; the buffers are the posted slots. One `io_uring_enter`
//! per poll serves both directions. A provided buffer is one piece, so a slot in several pieces of a
//! guest's memory is filled by `readv(2)`, while the kernel holds no older one. A queue that its owner
//! drives (`Drive::Inline`) reads by `read(2)`, and so does a ring with mergeable reads: one packet at a
//! time can go into its posted slots, so there would be no batch.
//!
//! # Who owns a slot
//!
//! A slot that the kernel may touch is in [`UringState::reads`] or [`UringState::writes`]. It
//! leaves them in two ways only: when the completion that names it arrives; or, for a read, after
//! the multishot request has ended (its last completion has arrived) and the buffer ring has been
//! unregistered. Nothing else takes a slot out. If neither happens, `UringState`'s `drop` leaks the
//! tables on purpose.
//!
//! # Which thread owns a ring
//!
//! A queue on a poller's thread has a ring that only this thread may use (`SINGLE_ISSUER`), and in
//! which the kernel works only during our `io_uring_enter` (`DEFER_TASKRUN`). The first poll
//! creates the ring, because opening the queue may happen on another thread.
//!
//! A queue that its owner drives may change threads between two calls, so its ring has neither
//! flag. Without them a multishot read would interrupt the thread for each packet that arrives.
//! Such a ring therefore has no multishot read and carries writes only. A write is finished when
//! the call that submits it returns, so the kernel holds nothing of ours between two calls, and any
//! thread may make the next call.
//!
//! Both kinds of queue sleep on the TAP's own descriptor: a packet that has arrived stays in the
//! TAP until one of our calls takes it. The ring's descriptor is not enough: the kernel does about
//! 20 pieces of work per call, and when work was left over, neither that descriptor nor the ring's
//! `TASKRUN` flag reported it (seen on Linux 6.18). For this reason every call that brought
//! something is followed by another call.
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
// From `std`, not from `vmring_core::sync`: the kernel reads this word, so it must be a real atomic
// and not loom's.
use std::sync::atomic::{AtomicU16, Ordering};

use super::framing::{Fault, Framing, Outgoing, Space, fault_of, status_of};
use super::limits::{URING_COMPLETIONS, URING_READS, URING_WRITES};
use super::merging::MergingReader;
use super::open::TapQueueFd;
use super::plain::Plain;
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The buffer group of the multishot read.
const GROUP: u16 = 0;
/// The TAP's index among the ring's registered files. A registered file saves the kernel the lookup
/// of the descriptor for each frame.
const FILE: Fixed = Fixed(0);

/// `user_data` of the multishot read.
const READ: u64 = 0;
/// `user_data` of the cancel of the multishot read.
const CANCEL: u64 = 1;
/// `user_data` of write number 0. Write number `n` has `WRITE + n`.
const WRITE: u64 = 2;

/// Checks that this process may create such a ring and that the kernel knows every operation used.
///
/// The check runs on a thread of its own. The kernel tears a ring down some milliseconds after its
/// last descriptor is closed, and then interrupts the system call, if any, that the ring's thread
/// is in, as a signal would.
pub(crate) fn check() -> io::Result<()> {
    let checker = thread::Builder::new().name("vmring-check".to_owned()).spawn(check_here)?;
    checker.join().unwrap_or_else(|_| Err(io::Error::other("the check panicked")))
}

fn check_here() -> io::Result<()> {
    let mut state = UringState::new(true)?;
    let mut probe = Probe::new();
    state.ring.submitter().register_probe(&mut probe)?;
    let known = [
        opcode::ReadMulti::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::AsyncCancel::CODE,
    ];
    if known.into_iter().all(|code| probe.is_supported(code)) {
        state.unregister();
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::Unsupported, "READ_MULTISHOT needs Linux 6.7"))
    }
}

/// The io_uring engine of one queue.
pub(crate) struct Uring {
    fd: Arc<TapQueueFd>,
    /// The queue is bound to one thread, which drives it from now on.
    bound: bool,
    /// `None` before [`prepare`](Self::prepare) and after [`close`](Self::close).
    state: Option<UringState>,
    /// Does the reads if the ring was created before the queue was bound to a thread.
    plain: Plain,
    /// The reads that a cancel wants back from the kernel. The poll that has taken them back clears
    /// it.
    recall: Recall,
}

/// Which reads a cancel wants back.
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
        // A ring that exists already stays as it is.
        self.bound = true;
    }

    /// Creates the ring if there is none. Must be called on the thread that will drive it.
    pub(crate) fn prepare(&mut self) -> io::Result<()> {
        if self.state.is_none() {
            let mut state = UringState::new(self.bound)?;
            state.ring.submitter().register_files(&[self.fd.as_raw_fd()])?;
            state.link_writes = self.fd.refuses_writes();
            self.state = Some(state);
        }
        Ok(())
    }

    /// Polls once. On a ring with mergeable reads, `merging` reads and the kernel holds no slots for
    /// reads.
    pub(crate) fn poll(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
        merging: Option<&mut MergingReader>,
    ) -> Result<Progress, Status> {
        let Some(state) = &mut self.state else { return Ok(Progress::Idle) };
        state.ask_to_end();
        state.push_writes(cx, framing);
        if self.recall.is_empty() && merging.is_none() {
            state.provide(cx, framing);
            state.arm_multishot();
        }
        state.enter().map_err(|error| status_of(&error))?;
        let result = state.complete(cx, framing);
        if !state.armed && !self.recall.is_empty() {
            let recall = &self.recall;
            state.take_back(cx, framing, |slot| recall.wants(slot))?;
            self.recall.clear();
        }
        if self.recall.is_empty() {
            state.post_dropped(cx);
        }
        result?;
        let more = state.must_enter || state.has_work();
        // On a thread's queue the oldest slot is scattered if the kernel has none and some are posted.
        // A multishot read that is still in flight takes no packet without a buffer.
        let reads_here = !state.single_issuer
            || state.order.is_empty() && self.recall.is_empty() && cx.reads() > 0;
        let read = match merging {
            Some(merging) => merging.read(cx)?,
            None if reads_here => self.plain.read(cx, framing)?,
            None => Progress::Idle,
        };
        if read == Progress::More {
            return Ok(Progress::More);
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    /// Prepares for sleep. Returns true if nothing has arrived since the last poll, so that the
    /// caller may sleep. On a poller's thread the first poll after the sleep always calls
    /// `io_uring_enter`.
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

    /// Takes every slot back from the kernel. Returns false while the kernel still holds some.
    pub(crate) fn close(&mut self, cx: &mut PollContext<'_>, framing: &Framing) -> bool {
        let Some(state) = &mut self.state else { return true };
        state.cancel_requested = true;
        state.ask_to_end();
        if state.enter().is_err() {
            return false;
        }
        // An error, for instance because the TAP is gone, is no reason to keep slots.
        let _ = state.complete(cx, framing);
        if !state.lets_go() {
            return false;
        }
        state.unregister();
        state.rejoin();
        for bid in state.order.drain(..) {
            if let Some(slot) = state.reads[usize::from(bid)].take() {
                cx.cancel(slot);
            }
        }
        self.state = None;
        true
    }
}

/// A ring, and the slots that the kernel holds.
struct UringState {
    ring: IoUring,
    buffers: Buffers,
    /// Only the thread that created the ring may use it (`SINGLE_ISSUER`). If false, the ring
    /// carries no reads.
    single_issuer: bool,
    /// The slots that the kernel may fill, by buffer number.
    reads: Box<[Option<PostedSlot>]>,
    /// The numbers of the buffers that the kernel holds, in the order in which it will fill them.
    order: VecDeque<u16>,
    /// The numbers of the buffers whose packets were dropped. They are older than those of `order`, so the
    /// next packets move into them, and no others are given to the kernel until it has none.
    dropped: VecDeque<u16>,
    /// The numbers of the buffers that the kernel does not hold.
    free_reads: Vec<u16>,
    /// The slots that the kernel may read, by write number.
    writes: Box<[Option<PostedSlot>]>,
    /// The numbers that no write in flight has.
    free_writes: Vec<u16>,
    /// The pieces of the writes from a guest's memory, by write number. Empty until there is one.
    outgoing: Box<[Outgoing]>,
    /// The multishot read is in flight: its last completion has not arrived.
    armed: bool,
    /// A cancel or a close wants the multishot read to end.
    cancel_requested: bool,
    /// The cancel of the multishot read is queued or submitted.
    ending: bool,
    /// The next [`enter`](Self::enter) must make the call even if no flag asks for it: the kernel
    /// may have work for us that neither `TASKRUN` nor the ring's descriptor reports (Linux 6.18).
    must_enter: bool,
    /// Writes that the kernel refused for the moment, with their places in submission order. They
    /// are kept until every write in flight has completed, and are put back in that order.
    refused: Vec<(u64, PostedSlot)>,
    /// The place of each write in submission order, by write number.
    places: Box<[u64]>,
    next_place: u64,
    /// The kernel may refuse a write for the moment, because the TAP has a send buffer limit
    /// ([`TapQueueFd::refuses_writes`]). Writes are linked, so that the kernel does not try those
    /// after a refused one.
    link_writes: bool,
}

/// A request that holds no pointer to memory.
enum Request {
    /// The multishot read on the TAP, which fills buffers of [`GROUP`].
    Read,
    /// The cancel of the multishot read.
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

/// The entry of a write. If the packet is in several pieces, they are put among `all`, at the write's
/// number. `None` as in [`Framing::to_write`].
fn entry_of(
    slot: &mut PostedSlot,
    number: u16,
    all: &mut Box<[Outgoing]>,
    framing: &Framing,
) -> Option<squeue::Entry> {
    let (start, len) = match slot.guest() {
        None => {
            let bytes = slot.packet_with_header_mut(framing.header)?;
            (bytes.as_ptr(), bytes.len())
        }
        Some(_) => {
            if all.is_empty() {
                *all = (0..URING_WRITES).map(|_| Outgoing::default()).collect();
            }
            match framing.to_write(slot, &mut all[usize::from(number)])? {
                [piece] => (piece.iov_base.cast_const().cast(), piece.iov_len),
                pieces => {
                    let entry = opcode::Writev::new(FILE, pieces.as_ptr(), pieces.len() as u32);
                    return Some(tagged(entry.rw_flags(libc::RWF_NOWAIT).build(), number));
                }
            }
        }
    };
    // Without `RWF_NOWAIT` each write would wait by itself for space in the TAP's send buffer, and the
    // kernel would then take the waiting writes in any order.
    let entry = opcode::Write::new(FILE, start, len as u32).rw_flags(libc::RWF_NOWAIT);
    Some(tagged(entry.build(), number))
}

fn tagged(entry: squeue::Entry, number: u16) -> squeue::Entry {
    entry.user_data(WRITE + u64::from(number))
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
            dropped: VecDeque::with_capacity(usize::from(reads)),
            free_reads: (0..reads).rev().collect(),
            writes: (0..URING_WRITES).map(|_| None).collect(),
            free_writes: (0..URING_WRITES).rev().collect(),
            outgoing: Box::default(),
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

    /// Registers the ring of provided buffers with the kernel.
    fn register(&self) -> io::Result<()> {
        let address = self.buffers.memory.as_ptr() as u64;
        // SAFETY: `Buffers::new` made the memory large enough for `URING_READS` entries, and the
        // mapping is page-aligned. `UringState`'s `drop` unmaps it only when no request is left
        // that could use the group, and otherwise leaks it. The buffers that its entries name
        // belong to slots in `reads`, where `provide_one` puts them.
        unsafe {
            self.ring.submitter().register_buf_ring_with_flags(address, URING_READS, GROUP, 0)
        }
    }

    /// Unregisters the TAP and the buffer ring. The kernel tears the ring itself down some time
    /// after it is dropped, and would keep the TAP open until then.
    fn unregister(&mut self) {
        let _ = self.ring.submitter().unregister_files();
        if self.ring.submitter().unregister_buf_ring(GROUP).is_ok() {
            self.buffers.forget_all();
        }
    }

    /// Queues the posted writes until the submission queue or the table of writes is full.
    fn push_writes(&mut self, cx: &mut PollContext<'_>, framing: &Framing) {
        if cx.writes() == 0 || (self.link_writes && self.is_writing()) {
            return;
        }
        let mut queue = self.ring.submission();
        // In a chain every entry but the last has `IOSQE_IO_LINK`. One entry is held back until it
        // is known whether another follows.
        let mut last: Option<squeue::Entry> = None;
        let link = if self.link_writes { squeue::Flags::IO_LINK } else { squeue::Flags::empty() };
        while let Some(&number) = self.free_writes.last() {
            if queue.capacity() - queue.len() <= 2 + usize::from(last.is_some()) {
                break;
            }
            let Some(mut slot) = cx.take_write() else { break };
            if framing.take_dhcp(&mut slot) {
                cx.complete_write(slot);
                continue;
            }
            let Some(entry) = entry_of(&mut slot, number, &mut self.outgoing, framing) else {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            };
            self.free_writes.pop();
            self.writes[usize::from(number)] = Some(slot);
            self.places[usize::from(number)] = self.next_place;
            self.next_place += 1;
            if let Some(entry) = last.replace(entry) {
                // SAFETY: the entry names the bytes of a slot in `writes`, where the loop has put
                // it, or the pieces of that write's number and the header beside them. All stay until
                // `complete` sees the write's completion.
                unsafe { queue.push(&entry.flags(link)) }.expect("the queue has space, as checked");
            }
        }
        if let Some(entry) = last {
            // SAFETY: the entry names the bytes of a slot in `writes`, where the loop has put it, or
            // the pieces of that write's number and the header beside them. All stay until `complete`
            // sees the write's completion.
            unsafe { queue.push(&entry) }.expect("the queue has space, as checked");
        }
    }

    /// Whether a write is in flight.
    fn is_writing(&self) -> bool {
        self.free_writes.len() < usize::from(URING_WRITES)
    }

    /// Gives the kernel the slots of the posted reads, up to `URING_READS` at a time, and up to the
    /// first one that is in several pieces.
    fn provide(&mut self, cx: &mut PollContext<'_>, framing: &Framing) {
        if !self.dropped.is_empty() {
            return;
        }
        while let Some(&number) = self.free_reads.last() {
            let Some(mut slot) = cx.take_read() else { break };
            match framing.to_read(&mut slot) {
                Space::Piece(space, len) => {
                    self.free_reads.pop();
                    self.provide_one(number, slot, (space, len));
                }
                Space::Scattered => {
                    cx.put_back(slot);
                    break;
                }
                Space::Lacking => cx.fail(slot, Status::InvalidArgument),
            }
        }
        self.buffers.publish();
    }

    /// Puts a slot into `reads` and its buffer, which is this piece, into the buffer ring, unpublished.
    fn provide_one(&mut self, number: u16, slot: PostedSlot, (space, len): (*mut u8, usize)) {
        let (address, len) = (space as u64, len as u32);
        self.reads[usize::from(number)] = Some(slot);
        self.order.push_back(number);
        self.buffers.put(number, address, len);
    }

    /// Queues the multishot read if the kernel has buffers and the read is not in flight.
    fn arm_multishot(&mut self) {
        if self.armed || self.order.is_empty() {
            return;
        }
        self.armed = self.push(Request::Read);
    }

    /// Queues the cancel of the multishot read if a cancel or a close wants it and it is not queued
    /// yet.
    fn ask_to_end(&mut self) {
        self.cancel_requested &= self.armed;
        if self.cancel_requested && !self.ending {
            self.ending = self.push(Request::CancelRead);
        }
    }

    /// Queues a request. Returns false if the submission queue is full.
    fn push(&mut self, request: Request) -> bool {
        // SAFETY: neither of the two requests holds a pointer. The read fills only buffers of the
        // group. `provide_one`, which alone adds buffers to the group, keeps their slots in
        // `reads`.
        unsafe { self.ring.submission().push(&request.entry()) }.is_ok()
    }

    /// Whether the kernel reports work that needs an `io_uring_enter`.
    fn has_work(&mut self) -> bool {
        let queue = self.ring.submission();
        queue.taskrun() || queue.cq_overflow()
    }

    /// Whether both queues are empty and, if the kernel has buffers, the multishot read is in
    /// flight.
    fn is_quiet(&mut self) -> bool {
        self.ring.completion().is_empty()
            && self.ring.submission().is_empty()
            && (self.armed || self.order.is_empty())
    }

    /// Submits the queued entries and lets the kernel run its deferred work, in one call. Makes no
    /// call if there is nothing to submit and no work.
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
        // SAFETY: the call passes no pointer (no signal mask). The memory that the queued entries
        // name belongs to slots in `reads` and `writes`: `push_writes` and `push` saw to that.
        match unsafe { self.ring.submitter().enter::<libc::sigset_t>(len, 0, flags, None) } {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // The next call submits the rest: this one was interrupted, or the completions have
                // to be taken first.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME) => {
                    self.must_enter |= work;
                    Ok(())
                }
                _ => Err(error),
            },
        }
    }

    /// Takes the completions that have arrived. Returns an error if the TAP is gone or the
    /// multishot read failed; the slots are accounted for all the same.
    fn complete(&mut self, cx: &mut PollContext<'_>, framing: &Framing) -> Result<(), Status> {
        let mut result = Ok(());
        let Self { ring, reads, order, dropped, free_reads, writes, free_writes, refused, .. } =
            self;
        let (places, link_writes) = (&self.places, self.link_writes);
        for cqe in ring.completion() {
            match cqe.user_data() {
                READ => {
                    self.must_enter = true;
                    if let Some(number) = cqueue::buffer_select(cqe.flags()) {
                        // Buffers complete in order, except where a request has ended and another
                        // has started.
                        match order.front() {
                            Some(front) if *front == number => drop(order.pop_front()),
                            _ => order.retain(|other| *other != number),
                        }
                        if let Some(mut slot) = reads[usize::from(number)].take() {
                            let received = usize::try_from(cqe.result());
                            let len = match (received, framing.to_read(&mut slot)) {
                                (Ok(len), Space::Piece(_, room)) => {
                                    let front = || framing.front(&mut slot);
                                    Some(len).filter(|len| !framing.drops_packet(*len, room, front))
                                }
                                _ => None,
                            };
                            match (len, dropped.is_empty()) {
                                (Some(len), true) => {
                                    free_reads.push(number);
                                    framing.complete_received(cx, slot, len);
                                }
                                (len, _) => {
                                    reads[usize::from(number)] = Some(slot);
                                    dropped.push_back(number);
                                    if let Some(len) = len {
                                        move_up(reads, dropped, free_reads, cx, framing, len);
                                    }
                                }
                            }
                        }
                    }
                    if !cqueue::more(cqe.flags()) {
                        (self.armed, self.cancel_requested, self.ending) = (false, false, false);
                    }
                    match cqe.result() {
                        // ENOBUFS: no buffers are left. ECANCELED: the read was cancelled.
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
                        // An earlier write of its chain was refused.
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
            // Some writes are still in flight. Any of them may be refused too, and may belong
            // before those in `refused`. So the refused writes are put back together, when all have
            // completed. Linked writes in flight also keep `push_writes` from queuing more, so the
            // next poll must make the call.
            self.must_enter |= self.link_writes;
            return result;
        }
        self.refused.sort_unstable_by_key(|(place, _)| *place);
        while let Some((_, slot)) = self.refused.pop() {
            cx.put_back(slot);
        }
        result
    }

    /// Puts the slots whose packets were dropped back to the front of the posted ones, once the kernel has no
    /// others.
    fn post_dropped(&mut self, cx: &mut PollContext<'_>) {
        while self.order.is_empty()
            && let Some(number) = self.dropped.pop_back()
        {
            self.free_reads.push(number);
            if let Some(slot) = self.reads[usize::from(number)].take() {
                cx.put_back(slot);
            }
        }
    }

    /// Puts the buffers whose packets were dropped in front of the others. The kernel must have none.
    fn rejoin(&mut self) {
        while let Some(number) = self.dropped.pop_back() {
            self.order.push_front(number);
        }
    }

    /// Whether no request is in flight, so that the kernel no longer touches any slot.
    fn lets_go(&self) -> bool {
        !self.armed && !self.is_writing()
    }

    /// Takes all buffers back from the kernel. Slots that `wanted` selects complete as cancelled;
    /// the others go to the kernel again, in their order. No multishot read may be in flight.
    fn take_back(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
        wanted: impl Fn(&PostedSlot) -> bool,
    ) -> Result<(), Status> {
        debug_assert!(!self.armed, "the kernel may fill the buffers");
        self.ring.submitter().unregister_buf_ring(GROUP).map_err(|error| status_of(&error))?;
        self.buffers.forget_all();
        self.register().map_err(|_| Status::MemFailure)?;
        self.rejoin();
        for _ in 0..self.order.len() {
            let Some(number) = self.order.pop_front() else { break };
            let Some(mut slot) = self.reads[usize::from(number)].take() else { continue };
            match framing.to_read(&mut slot) {
                Space::Piece(space, len) if !wanted(&slot) => {
                    self.provide_one(number, slot, (space, len));
                }
                // The kernel gets slots of one piece only.
                _ => {
                    self.free_reads.push(number);
                    cx.cancel(slot);
                }
            }
        }
        self.buffers.publish();
        Ok(())
    }
}

/// Moves the packet of `len` bytes in the newest buffer of `dropped` into the oldest one, and completes that
/// read. So reads complete in the order in which they were posted.
#[cold]
fn move_up(
    reads: &mut [Option<PostedSlot>],
    dropped: &mut VecDeque<u16>,
    free_reads: &mut Vec<u16>,
    cx: &mut PollContext<'_>,
    framing: &Framing,
    len: usize,
) {
    let (newest, oldest) = (dropped.back().copied(), dropped.pop_front());
    let (Some(newest), Some(oldest)) = (newest, oldest) else { return };
    let mut space = |number: u16| match framing.to_read(reads[usize::from(number)].as_mut()?) {
        Space::Piece(start, len) => Some((start, len)),
        _ => None,
    };
    if let (Some((from, _)), Some((to, room))) = (space(newest), space(oldest)) {
        // SAFETY: the spaces are of slots in `reads` that the kernel does not hold: of frames, which we own,
        // or in the mapping that a guest's buffer keeps alive. The kernel has written `len` bytes into the
        // first one. A guest may have posted buffers that overlap.
        unsafe { std::ptr::copy(from, to, len.min(room)) };
    }
    if let Some(slot) = reads[usize::from(oldest)].take() {
        free_reads.push(oldest);
        framing.complete_received(cx, slot, len);
    }
}

impl Drop for UringState {
    /// Has work to do only if the queue was not closed, because a caller panicked or the time for
    /// the close ran out. Leaks the slots if the kernel does not release them.
    fn drop(&mut self) {
        let slots = self.reads.iter().chain(&self.writes).flatten().count();
        if slots == 0 && !self.armed {
            return;
        }
        // Returns when every request has ended, or with an error. The loop below finds out which.
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
        tracing::error!(slots, "leaked: the kernel still holds them");
        std::mem::forget(std::mem::take(&mut self.reads));
        std::mem::forget(std::mem::take(&mut self.writes));
        self.buffers.leak();
    }
}

/// The memory of a ring of provided buffers: the entries. The tail is the last field (`resv`) of
/// entry 0 (io_uring_register_buf_ring(3)).
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

    /// Appends a buffer. The kernel sees it after [`publish`](Self::publish).
    fn put(&mut self, number: u16, address: u64, len: u32) {
        let place = usize::from(self.tail & (URING_READS - 1));
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `place` is below `URING_READS`, the number of entries in the memory, which is
        // page-aligned. The kernel reads the buffer fields of an entry only between its head and
        // the published tail. This entry is not there: there are as many buffer numbers as entries,
        // and `UringState` puts a number only when the kernel does not hold it. Entry 0 also
        // contains the tail, in its last two bytes (`resv`), which the kernel may read at any time
        // but never writes. The setters below do not touch `resv`, and the `&AtomicU16` of
        // `publish`, the only other reference to it, has ended: both functions take `&mut self`.
        let entry = unsafe { &mut *self.memory.as_mut_ptr().cast::<BufRingEntry>().add(place) };
        entry.set_addr(address);
        entry.set_len(len);
        entry.set_bid(number);
    }

    /// Shows the kernel all buffers that have been put so far.
    fn publish(&mut self) {
        let base = self.memory.as_mut_ptr().cast::<BufRingEntry>();
        // SAFETY: `base` is the first entry of a buffer ring, which is initialized (the mapping is
        // zeroed). The tail lies in this entry, aligned to two bytes. Only this function writes it;
        // the kernel only reads it. `put`, which makes a reference to the entry, does not run
        // meanwhile, because both functions take `&mut self`.
        let tail = unsafe { &*BufRingEntry::tail(base).cast::<AtomicU16>() };
        // Release: pairs with the kernel's acquire load of the tail (io_uring/kbuf.c,
        // `io_ring_buffer_select`), so that the kernel sees the entries that `put` wrote.
        tail.store(self.tail, Ordering::Release);
    }

    /// Forgets all buffers, after the group has been unregistered. A newly registered group starts
    /// at tail 0.
    fn forget_all(&mut self) {
        self.tail = 0;
        self.publish();
    }

    /// Keeps the memory mapped for ever, because the kernel may still read it.
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
