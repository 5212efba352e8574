//! The engine for kernels and containers without io_uring: one non-blocking `read(2)` or `write(2)` per
//! frame, or `readv(2)` or `writev(2)` if the frame is in several pieces of a guest's memory.
//!
//! The calls are made in runs, and what the rings ask for happens before and after a run. After a call
//! into the kernel neither the code nor the data of this side is in the processor's first caches, so
//! between two calls there is as little of both as can be.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmring_core::Class;

use super::framing::{Fault, Framing, Outgoing, Pieces, Space, fault_of};
use super::limits::{READ_SEGMENTS_MAX, RUN_MAX};
use super::open::TapQueueFd;
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::device::slot::PostedSlot;
use crate::error::Status;
use crate::fifo::Fifo;

/// The engine of plain system calls for one queue.
#[derive(Debug)]
pub(crate) struct Plain {
    fd: Arc<TapQueueFd>,
    /// The slots of a run of writes, oldest first. Empty between two polls. Those of a run of reads
    /// stay posted.
    slots: Fifo<PostedSlot>,
    /// The place of each slot of a run.
    run: Pieces<RUN_MAX>,
    /// How many bytes the kernel has written into each of them.
    lens: [usize; RUN_MAX],
    /// How many reads the next run takes: one more than the last poll has found packets for at its end,
    /// so that few are taken in vain.
    run_of_reads: usize,
    /// A frame that is written by itself.
    outgoing: Outgoing,
    /// The pieces of a buffer that is filled by itself.
    space: Pieces<READ_SEGMENTS_MAX>,
}

impl Plain {
    pub(crate) fn new(fd: Arc<TapQueueFd>) -> Self {
        Self {
            fd,
            slots: Fifo::with_capacity(RUN_MAX),
            run: Pieces::default(),
            lens: [0; RUN_MAX],
            run_of_reads: 1,
            outgoing: Outgoing::default(),
            space: Pieces::default(),
        }
    }

    /// Writes the posted frames until none is left or the kernel refuses one for the moment.
    /// Returns an error if the TAP is gone.
    pub(crate) fn write(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<(), Status> {
        loop {
            let (count, alone) = self.gather_writes(cx, framing);
            let is_last = count < RUN_MAX && alone.is_none();
            let mut taken = self.write_run(cx, count);
            match alone {
                Some(slot) if taken == Ok(true) => taken = self.write_alone(cx, slot, framing),
                Some(slot) => cx.put_back(slot),
                None => {}
            }
            // What the kernel has not taken.
            while let Some(slot) = self.slots.pop_back() {
                cx.put_back(slot);
            }
            if is_last || taken != Ok(true) {
                return taken.map(|_| ());
            }
        }
    }

    /// Takes the frames of the next run, at most [`RUN_MAX`], and their bytes. Returns how many they
    /// are, and the frame behind them if that one has to be written by itself.
    #[inline]
    fn gather_writes(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> (usize, Option<PostedSlot>) {
        for count in 0..RUN_MAX {
            let Some(mut slot) = cx.take_write() else { return (count, None) };
            let Some((start, len)) = framing.piece_to_write(&mut slot) else {
                return (count, Some(slot));
            };
            self.run.put_space(count, start, len);
            self.slots.push_back(slot);
        }
        (RUN_MAX, None)
    }

    /// Writes the first `count` frames, and completes them. Returns false if the kernel refuses one for
    /// the moment, and an error if the TAP is gone. In both cases that frame and those behind it are
    /// still in `slots`.
    #[inline]
    fn write_run(&mut self, cx: &mut PollContext<'_>, count: usize) -> Result<bool, Status> {
        let mut at = 0;
        loop {
            let run = &self.run.first(count)[at..];
            // SAFETY: the pieces are of the slots in `slots`, which stay there during the call: bytes of
            // a frame, or in the mapping that a guest's buffer keeps alive.
            let (written, errno) = unsafe { write_each(self.fd.as_raw_fd(), run) };
            for _ in 0..written {
                let Some(slot) = self.slots.pop_front() else { break };
                cx.complete_write(slot);
            }
            at += written;
            if at == count {
                return Ok(true);
            }
            match fault_of(errno) {
                Fault::Wait => return Ok(false),
                Fault::Gone(status) => return Err(status),
                Fault::Entry(status) => {
                    if let Some(slot) = self.slots.pop_front() {
                        cx.fail(slot, status);
                    }
                    at += 1;
                }
            }
        }
    }

    /// Writes a frame that is in several pieces, or that the DHCP server may take. Returns false if the
    /// kernel refuses it for the moment, and an error if the TAP is gone. In both cases the frame is
    /// posted again.
    fn write_alone(
        &mut self,
        cx: &mut PollContext<'_>,
        mut slot: PostedSlot,
        framing: &Framing,
    ) -> Result<bool, Status> {
        if framing.take_dhcp(&mut slot) {
            cx.complete_write(slot);
            return Ok(true);
        }
        let Some(pieces) = framing.to_write(&mut slot, &mut self.outgoing) else {
            cx.fail(slot, Status::InvalidArgument);
            return Ok(true);
        };
        let fd = self.fd.as_raw_fd();
        let (count, errno) = match pieces {
            // SAFETY: `pieces` borrows the slot and `outgoing` for the whole call. They are bytes of the
            // slot's frame, or in the mapping that its guest's buffer keeps alive, and a header in
            // `outgoing`.
            [_] => unsafe { write_each(fd, pieces) },
            // SAFETY: as above.
            _ => match unsafe { libc::writev(fd, pieces.as_ptr(), pieces.len() as libc::c_int) } {
                0.. => (1, 0),
                _ => (0, errno()),
            },
        };
        if count == 1 {
            cx.complete_write(slot);
            return Ok(true);
        }
        match fault_of(errno) {
            Fault::Entry(status) => cx.fail(slot, status),
            fault => {
                cx.put_back(slot);
                return if let Fault::Gone(status) = fault { Err(status) } else { Ok(false) };
            }
        }
        Ok(true)
    }

    /// Fills the posted reads until the TAP has no more frames. Returns [`Progress::More`] if it may
    /// have more. Returns an error if the TAP is gone or the read fails.
    ///
    /// A packet that is dropped leaves its read posted. A host that sends such packets all the time does
    /// not keep this call for ever.
    pub(crate) fn read(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<Progress, Status> {
        let mut dropped = 0;
        while dropped < RUN_MAX {
            let (count, other) = self.gather_reads(cx, framing);
            let outcome = match (count, other) {
                (0, None) => return Ok(Progress::More),
                (0, Some(space)) => self.read_alone(cx, space, framing),
                _ => self.read_run(cx, count, framing),
            };
            match outcome {
                Ok(more) => dropped += more,
                Err(Fault::Wait) => return Ok(Progress::Idle),
                Err(Fault::Entry(status) | Fault::Gone(status)) => return Err(status),
            }
        }
        Ok(Progress::More)
    }

    /// Collects the places of the first posted reads, as many as a run has. Returns how many they are,
    /// and what is behind them if that cannot be filled in a run.
    #[inline]
    fn gather_reads(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> (usize, Option<Space>) {
        let mut count = 0;
        for slot in cx.posted_reads().take(self.run_of_reads) {
            match framing.to_read(slot) {
                Space::Piece(start, len) => self.run.put_space(count, start, len),
                other => return (count, Some(other)),
            }
            count += 1;
        }
        (count, None)
    }

    /// Fills the first `count` posted reads, and completes them. Returns how many packets were dropped, or
    /// an error if the kernel has not enough packets.
    ///
    /// The read that was posted first completes first, so a packet behind one that is dropped moves into
    /// an earlier read.
    #[inline]
    fn read_run(
        &mut self,
        cx: &mut PollContext<'_>,
        count: usize,
        framing: &Framing,
    ) -> Result<usize, Fault> {
        let Self { fd, run, lens, .. } = self;
        // SAFETY: the pieces are of the first posted reads, which stay posted during the call: of a frame,
        // which we own, or in the mapping that a guest's buffer keeps alive.
        let (filled, errno) = unsafe { read_each(fd.as_raw_fd(), run.first(count), lens) };
        let mut places = run.first(filled).iter().zip(&*lens);
        let kept = match places.any(|(place, len)| framing.may_drop(*len, place.iov_len)) {
            true => self.drop_some(cx, filled, framing),
            false => filled,
        };
        for len in &self.lens[..kept] {
            let Some(slot) = cx.take_shown(Class::Read) else { break };
            framing.complete_received(cx, slot, *len);
        }
        if filled < count {
            self.run_of_reads = filled + 1;
            return Err(fault_of(errno));
        }
        self.run_of_reads = RUN_MAX.min(2 * self.run_of_reads);
        Ok(filled - kept)
    }

    /// Drops those of the first `filled` packets that [`Framing::drops_packet`] names. Those behind a dropped
    /// one move into earlier reads. Returns how many are left.
    #[cold]
    fn drop_some(&mut self, cx: &mut PollContext<'_>, filled: usize, framing: &Framing) -> usize {
        let Self { run, lens, .. } = self;
        let mut kept = 0;
        for (at, slot) in cx.posted_reads().take(filled).enumerate() {
            let (len, room) = (lens[at], run.first(filled)[at].iov_len);
            if framing.drops_packet(len, room, || framing.front(slot)) {
                continue;
            }
            if kept < at {
                let (from, to) = (&run.first(filled)[at], &run.first(filled)[kept]);
                // SAFETY: the pieces are of the first posted reads, which are still posted: of a frame, which
                // we own, or in the mapping that a guest's buffer keeps alive.
                unsafe { move_bytes(from, to, len) };
                lens[kept] = len;
            }
            kept += 1;
        }
        kept
    }

    /// Fills the first posted read, which is several pieces of a guest's memory, or fails it, because it
    /// lacks space for the offload header. Returns how many packets were dropped, or an error if the kernel
    /// has none.
    #[cold]
    fn read_alone(
        &mut self,
        cx: &mut PollContext<'_>,
        space: Space,
        framing: &Framing,
    ) -> Result<usize, Fault> {
        if let Space::Lacking = space {
            if let Some(slot) = cx.take_shown(Class::Read) {
                cx.fail(slot, Status::InvalidArgument);
            }
            return Ok(0);
        }
        let Some(slot) = cx.posted_reads().next() else { return Ok(0) };
        let segments = slot.guest().into_iter().flat_map(|guest| framing.space_of(guest));
        let count = self.space.put(0, segments);
        let space = self.space.first(count);
        // SAFETY: the pieces are in the mapping that the slot's buffer keeps alive, and the slot stays
        // posted during the call.
        let len = unsafe { libc::readv(self.fd.as_raw_fd(), space.as_ptr(), count as libc::c_int) };
        let Ok(len) = usize::try_from(len) else { return Err(fault_of(errno())) };
        let room = self.space.len_of(0, count);
        if framing.drops_packet(len, room, || framing.front(slot)) {
            return Ok(1);
        }
        if let Some(slot) = cx.take_shown(Class::Read) {
            framing.complete_received(cx, slot, len);
        }
        Ok(0)
    }
}

/// Writes one piece by each call, until the kernel does not take one. Returns how many it has taken, and
/// the error if that is not all.
///
/// # Safety
///
/// The pieces are readable during the call.
#[inline]
unsafe fn write_each(fd: RawFd, pieces: &[libc::iovec]) -> (usize, i32) {
    for (i, piece) in pieces.iter().enumerate() {
        // SAFETY: the caller promises that the piece is readable.
        if unsafe { call(libc::SYS_write, fd, piece) } < 0 {
            return (i, errno());
        }
    }
    (pieces.len(), 0)
}

/// Reads into one piece by each call, until the kernel has no packet. Returns how many it has filled, and
/// the error if that is not all. Their lengths are in `lens`.
///
/// # Safety
///
/// The pieces are writable during the call, and nobody else uses them.
#[inline]
unsafe fn read_each(
    fd: RawFd,
    pieces: &[libc::iovec],
    lens: &mut [usize; RUN_MAX],
) -> (usize, i32) {
    for (i, (piece, len)) in pieces.iter().zip(lens).enumerate() {
        // SAFETY: the caller promises that the piece is writable, and that nobody else uses it.
        match usize::try_from(unsafe { call(libc::SYS_read, fd, piece) }) {
            Ok(read) => *len = read,
            Err(_) => return (i, errno()),
        }
    }
    (pieces.len(), 0)
}

/// Moves the first `len` bytes of one piece to the beginning of another. If that one has fewer, it gets as
/// many as it has.
///
/// # Safety
///
/// The first piece is readable, and the second one writable.
#[cold]
unsafe fn move_bytes(from: &libc::iovec, to: &libc::iovec, len: usize) {
    let len = len.min(to.iov_len);
    // SAFETY: the caller promises that the pieces are there. A guest may have posted buffers that overlap.
    unsafe { std::ptr::copy(from.iov_base.cast::<u8>(), to.iov_base.cast(), len) };
}

/// Makes the system call `number`, that of `read(2)` or `write(2)`, for a piece.
///
/// The functions of the C library do the same, and let the thread be cancelled meanwhile
/// (pthread_cancel(3)). In a process with several threads that takes two atomic operations for each call.
///
/// # Safety
///
/// For a write the piece is readable during the call. For a read it is writable, and nobody else uses
/// it.
#[inline(always)]
unsafe fn call(number: libc::c_long, fd: RawFd, piece: &libc::iovec) -> libc::c_long {
    // SAFETY: both calls take a descriptor, an address and a length. The caller promises that the kernel
    // may use the piece.
    unsafe { libc::syscall(number, fd, piece.iov_base, piece.iov_len) }
}

pub(super) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use vmring_core::Pool;
    use vmring_core::sync::Ordering;

    use super::*;
    use crate::config::Offloads;
    use crate::device::context::{CompletedSlot, Posted, Sink};
    use crate::error::EntryError;
    use crate::pool::PoolBuilder;

    const MTU_FRAME: usize = 1518;
    /// The length of a frame that is written. The buffer of a socket holds about a hundred.
    const FRAME: usize = 1500;

    /// An engine over any descriptor, with the slots that are posted to it and those that it has
    /// completed.
    struct Bench {
        plain: Plain,
        framing: Framing,
        pool: Pool,
        posted: Posted,
        done: VecDeque<CompletedSlot>,
    }

    impl Bench {
        fn over(fd: impl Into<OwnedFd>) -> Self {
            let drops = Arc::default();
            Self {
                plain: Plain::new(Arc::new(TapQueueFd::over(fd.into()))),
                framing: Framing {
                    header: 0,
                    max_packet_size: MTU_FRAME,
                    offloads: Offloads::default(),
                    dhcp: None,
                    drops,
                },
                pool: PoolBuilder::new(256, 2 * MTU_FRAME).build().expect("a small pool"),
                posted: Posted::default(),
                done: VecDeque::new(),
            }
        }

        fn post(&mut self, class: Class, number: u64) {
            let mut frame = self.pool.alloc().expect("a free frame");
            if class == Class::Write {
                frame.copy_from(&[number as u8; FRAME]).expect("it fits");
            }
            let slot = PostedSlot::new(frame.into(), number, 0, class);
            self.posted.list(class).push_back(slot);
        }

        fn poll<T>(
            &mut self,
            call: fn(&mut Plain, &mut PollContext<'_>, &Framing) -> Result<T, Status>,
        ) -> Result<T, Status> {
            let sink = Sink::Relay(&mut self.done);
            let mut cx = PollContext::new(0, &mut self.posted, None, sink, [u32::MAX; 2]);
            call(&mut self.plain, &mut cx, &self.framing)
        }

        /// The numbers of the completed slots, oldest first, each with its packet's length or its error.
        fn done(&mut self) -> Vec<(u64, Result<usize, EntryError>)> {
            let done = |done: CompletedSlot| (done.slot().user_data(), done.result());
            self.done.drain(..).map(done).collect()
        }
    }

    /// `/dev/zero` is a host that always has a packet, and each fills the buffer, which is longer than
    /// the longest packet. The test ends only if the call does.
    #[test]
    fn packets_that_are_too_long_do_not_keep_a_poll_for_ever() {
        let mut bench = Bench::over(File::open("/dev/zero").expect("it is everywhere"));
        for number in 0..100 {
            bench.post(Class::Read, number);
        }
        for polls in 1..=3 {
            assert_eq!(bench.poll(Plain::read), Ok(Progress::More));
            assert!(bench.framing.drops.too_big.load(Ordering::Relaxed) >= polls * RUN_MAX as u64);
        }
        assert_eq!(bench.done(), []);
        let numbers: Vec<_> = bench.posted.reads.iter().map(PostedSlot::user_data).collect();
        assert_eq!(numbers, (0..100).collect::<Vec<_>>(), "they are posted in their order");
    }

    /// A packet that is dropped is in the middle of a run.
    #[test]
    fn a_dropped_packet_leaves_no_read_behind() {
        let (host, tap) = UnixDatagram::pair().expect("a pair");
        tap.set_nonblocking(true).expect("a socket can be");
        let mut bench = Bench::over(tap);
        for number in 0..5 {
            bench.post(Class::Read, number);
        }
        for len in [60, MTU_FRAME + 1, 61] {
            host.send(&vec![0; len]).expect("it has space");
        }
        assert_eq!(bench.poll(Plain::read), Ok(Progress::Idle));
        assert_eq!(bench.done(), [(0, Ok(60)), (1, Ok(61))]);
        let numbers: Vec<_> = bench.posted.reads.iter().map(PostedSlot::user_data).collect();
        assert_eq!(numbers, [2, 3, 4]);
    }

    /// The buffer of a socket takes some datagrams, and then refuses one for the moment.
    #[test]
    fn what_the_kernel_refuses_for_the_moment_is_written_later_in_order() {
        let (host, tap) = UnixDatagram::pair().expect("a pair");
        tap.set_nonblocking(true).expect("a socket can be");
        host.set_nonblocking(true).expect("a socket can be");
        let mut bench = Bench::over(tap);
        const ALL: u64 = 200;
        for number in 0..ALL {
            bench.post(Class::Write, number);
        }
        let (mut came, mut polls) = (Vec::new(), 0);
        while came.len() < ALL as usize {
            assert_eq!(bench.poll(Plain::write), Ok(()));
            polls += 1;
            let mut packet = [0; 2 * MTU_FRAME];
            let before = came.len();
            while let Ok(len) = host.recv(&mut packet) {
                assert_eq!(len, FRAME);
                came.push(u64::from(packet[0]));
            }
            assert!(came.len() > before, "a poll into an empty buffer writes something");
        }
        assert!(polls > 1, "the buffer took all {ALL} at once");
        assert_eq!(came, (0..ALL).collect::<Vec<_>>());
        let done = bench.done();
        assert_eq!(done, (0..ALL).map(|number| (number, Ok(FRAME))).collect::<Vec<_>>());
    }

    /// `/dev/full` refuses each write by itself.
    #[test]
    fn a_frame_that_the_kernel_refuses_fails_alone() {
        let full = File::options().write(true).open("/dev/full").expect("it is everywhere");
        let mut bench = Bench::over(full);
        for number in 0..50 {
            bench.post(Class::Write, number);
        }
        assert_eq!(bench.poll(Plain::write), Ok(()));
        let failed = Err(EntryError::Device(Status::Os(libc::ENOSPC)));
        assert_eq!(bench.done(), (0..50).map(|number| (number, failed)).collect::<Vec<_>>());
        assert!(bench.posted.writes.is_empty());
    }

    /// The descriptor cannot be written, which is what a TAP that is gone looks like.
    #[test]
    fn a_tap_that_is_gone_leaves_the_frames_posted() {
        let mut zero = File::open("/dev/zero").expect("it is everywhere");
        zero.read_exact(&mut [0]).expect("it is readable");
        let mut bench = Bench::over(zero);
        for number in 0..50 {
            bench.post(Class::Write, number);
        }
        assert_eq!(bench.poll(Plain::write), Err(Status::Os(libc::EBADF)));
        let numbers: Vec<_> = bench.posted.writes.iter().map(PostedSlot::user_data).collect();
        assert_eq!(numbers, (0..50).collect::<Vec<_>>(), "they are posted in their order");
    }
}
