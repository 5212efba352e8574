//! Reading on a ring with mergeable reads: the kernel spreads one packet over several posted reads.
//!
//! A `readv(2)` that has less space than the packet cuts it off. So the kernel reads into the posted
//! reads only if they have space for the longest packet of the interface. Otherwise it reads into a
//! frame of the queue, from which the packet is copied as soon as the reads have space for it. While it
//! waits, nothing else is read, so packets keep their order and the rest stays in the TAP.
//!
//! The posted reads stay with the poller until a packet is in them. So a cancel, a drain and a close
//! find them there, and the kernel holds none between two calls.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use vmring_core::Class;
use vmring_core::sync::Ordering;

use super::dhcp::FRONT;
use super::framing::{Fault, Framing, Pieces, fault_of};
use super::limits::{MERGING_READS_MAX, READ_SEGMENTS_MAX, SHORT_PATIENCE};
use super::open::TapQueueFd;
use super::plain::errno;
use crate::device::bounce::{set_buffer_count, set_count};
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::device::slot::PostedSlot;
use crate::error::Status;
use crate::sys::{after, now};

/// The reading side of a queue whose ring has mergeable reads.
#[derive(Debug)]
pub(crate) struct MergingReader {
    fd: Arc<TapQueueFd>,
    framing: Arc<Framing>,
    /// How many reads can be posted at a time.
    depth: usize,
    /// The places in the first posted reads, for the kernel.
    pieces: Pieces<READ_SEGMENTS_MAX>,
    /// How many bytes each of these reads has for a packet and its offload header.
    rooms: Vec<usize>,
    /// The frame for a packet that is longer than the posted reads may be. It has a byte more than the
    /// longest packet, so that a longer one is seen.
    frame: Box<[u8]>,
    waiting: Option<Waiting>,
}

/// The packet in the frame, which waits for reads.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// The bytes of the packet and its offload header.
    len: usize,
    /// How many reads were posted at the last look.
    posted: usize,
    /// When the packet is given up, if no other number of reads is posted until then. `None` if no
    /// reads were posted.
    until: Option<Instant>,
}

/// What the first posted reads have for a packet.
#[derive(Clone, Copy, Debug)]
struct Gathered {
    room: usize,
    pieces: usize,
    /// No packet can have more space, however many reads are posted.
    is_all: bool,
    /// The oldest read is a frame without space for the offload header.
    is_unfit: bool,
}

impl MergingReader {
    pub(crate) fn new(fd: Arc<TapQueueFd>, framing: Arc<Framing>, depth: u32) -> Self {
        let longest = framing.header + framing.max_packet_size;
        Self {
            fd,
            framing,
            depth: depth as usize,
            pieces: Pieces::default(),
            rooms: Vec::with_capacity(MERGING_READS_MAX),
            frame: vec![0; longest + 1].into(),
            waiting: None,
        }
    }

    /// Whether a packet waits for reads. Until there are more, the TAP has nothing for this queue.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// When the packet that waits is given up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.waiting?.until
    }

    /// Lets the packet that waits wait anew, because reads are taken back.
    pub(crate) fn renew(&mut self) {
        if let Some(waiting) = &mut self.waiting {
            waiting.until = None;
        }
    }

    /// Fills the posted reads until the TAP has no more packets, or until the reads are too few. Returns
    /// [`Progress::More`] if the TAP may have more for the reads that are posted. Returns an error if
    /// the TAP is gone or the read fails.
    pub(crate) fn read(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let longest = self.frame.len() - 1;
        // A packet that is dropped takes no read, so the packets are counted.
        for _ in 0..MERGING_READS_MAX {
            let wanted = self.waiting.map_or(longest, |waiting| waiting.len);
            let gathered = self.gather(cx, wanted);
            if gathered.is_unfit {
                if let Some(slot) = cx.take_shown(Class::Read) {
                    cx.fail(slot, Status::InvalidArgument);
                }
                continue;
            }
            if self.rooms.is_empty() {
                // They are taken back, if there are some.
                self.renew();
                break;
            }
            let has_room = gathered.room >= wanted;
            if !has_room && cx.is_short_of_reads() {
                // The next call may take more reads.
                break;
            }
            if let Some(waiting) = self.waiting {
                if has_room {
                    self.deliver(cx, waiting.len);
                } else if gathered.is_all || self.gives_up(cx.posted_in_all()) {
                    self.framing.drops.too_few_reads.fetch_add(1, Ordering::Relaxed);
                } else {
                    return Ok(Progress::Idle);
                }
                self.waiting = None;
                continue;
            }
            let read = match has_room {
                true => self.read_into_posted(gathered),
                false => self.read_into_frame(),
            };
            match read {
                Ok(len) if has_room => self.receive(cx, len, gathered.room),
                Ok(len) => {
                    let front = || std::array::from_fn(|i| self.frame[self.framing.header + i]);
                    if !self.framing.drops_packet(len, self.frame.len(), front) {
                        self.waiting = Some(Waiting { len, posted: 0, until: None });
                    }
                }
                Err(Fault::Wait) => return Ok(Progress::Idle),
                Err(Fault::Entry(status) | Fault::Gone(status)) => return Err(status),
            }
        }
        Ok(Progress::More)
    }

    /// Whether the packet that waits is given up, now that `posted` reads are too few for it: the guest
    /// cannot post more, or has not for a long time.
    fn gives_up(&mut self, posted: usize) -> bool {
        let Some(waiting) = &mut self.waiting else { return false };
        if posted >= self.depth {
            return true;
        }
        match waiting.until {
            Some(until) if waiting.posted == posted => until <= now(),
            _ => {
                (waiting.posted, waiting.until) = (posted, Some(after(SHORT_PATIENCE)));
                false
            }
        }
    }

    /// Collects the places in the first posted reads, until they have space for `wanted` bytes.
    fn gather(&mut self, cx: &mut PollContext<'_>, wanted: usize) -> Gathered {
        self.rooms.clear();
        let mut gathered = Gathered { room: 0, pieces: 0, is_all: false, is_unfit: false };
        for slot in cx.posted_reads().take(MERGING_READS_MAX) {
            if gathered.room >= wanted {
                break;
            }
            let is_first = self.rooms.is_empty();
            // A reserved frame stands for a guest's buffer, and has a whole packet or nothing.
            if !is_first && slot.is_reserved() {
                gathered.is_all = true;
                break;
            }
            let Gathered { room, pieces, .. } = &mut gathered;
            let before = *room;
            if let Some(guest) = slot.guest() {
                let mut segments = match is_first {
                    true => self.framing.space_of(guest),
                    false => guest.segments(),
                };
                let end = self.pieces.put(*pieces, segments.by_ref());
                if segments.next().is_some() {
                    gathered.is_all = true;
                    break;
                }
                *room += self.pieces.len_of(*pieces, end);
                *pieces = end;
            } else {
                let header = if is_first { self.framing.header } else { 0 };
                let Some(bytes) = slot.buffer_with_header_mut(header) else {
                    gathered.is_unfit = true;
                    break;
                };
                if !self.pieces.put_bytes(*pieces, bytes) {
                    gathered.is_all = true;
                    break;
                }
                *room += bytes.len();
                *pieces += 1;
            }
            self.rooms.push(gathered.room - before);
        }
        gathered.is_all |= self.rooms.len() == MERGING_READS_MAX;
        gathered
    }

    fn read_into_posted(&mut self, gathered: Gathered) -> Result<usize, Fault> {
        let pieces = self.pieces.first(gathered.pieces);
        let fd = self.fd.as_raw_fd();
        // SAFETY: the pieces are of the slots that `gather` has just seen, which stay posted during the
        // call: of a frame, which we own, or in the mapping that a guest's buffer keeps alive.
        result(unsafe {
            match pieces {
                [piece] => libc::read(fd, piece.iov_base, piece.iov_len),
                _ => libc::readv(fd, pieces.as_ptr(), pieces.len() as libc::c_int),
            }
        })
    }

    fn read_into_frame(&mut self) -> Result<usize, Fault> {
        let Self { fd, frame, .. } = self;
        // SAFETY: the frame is ours, and as long as the call is told.
        result(unsafe { libc::read(fd.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len()) })
    }

    /// Completes the reads into which the kernel has written `len` bytes, or leaves them posted if the
    /// packet is dropped.
    fn receive(&mut self, cx: &mut PollContext<'_>, len: usize, room: usize) {
        let count = self.rooms.len();
        if !self.framing.drops_packet(len, room, || front_of(cx, count)) {
            self.complete(cx, len);
        }
    }

    /// Copies the packet that waits into the posted reads, and completes them.
    fn deliver(&mut self, cx: &mut PollContext<'_>, len: usize) {
        let mut rest = &self.frame[..len];
        for (i, (slot, room)) in cx.posted_reads().zip(&self.rooms).enumerate() {
            let (part, behind) = rest.split_at(rest.len().min(*room));
            if let Some(guest) = slot.guest() {
                match i {
                    0 => self.framing.space_of(guest).copy_from(part),
                    _ => guest.segments().copy_from(part),
                };
            } else {
                let header = if i == 0 { self.framing.header } else { 0 };
                let space = slot.buffer_with_header_mut(header).unwrap_or_default();
                space[..part.len()].copy_from_slice(part);
            }
            rest = behind;
        }
        let reads = self.complete(cx, len);
        cx.count_bounced_reads(reads);
    }

    /// Completes the first reads, which have `len` bytes: the offload header, if the TAP has one, and a
    /// packet. Returns how many reads these are.
    fn complete(&mut self, cx: &mut PollContext<'_>, len: usize) -> usize {
        let mut count = 0;
        let mut left = len;
        for room in &self.rooms {
            count += 1;
            if left <= *room {
                break;
            }
            left -= room;
        }
        let mut left = len;
        for i in 0..count {
            let Some(mut slot) = cx.take_shown(Class::Read) else { break };
            let part = left.min(self.rooms[i]);
            left -= part;
            match count {
                1 if self.framing.header > 0 => cx.complete_read_with_header(slot, part),
                1 => cx.complete_read(slot, part),
                _ => {
                    let header = if i == 0 { self.framing.header } else { 0 };
                    if i == 0 {
                        self.set_header(&mut slot, count as u16);
                    }
                    let more = (count - 1 - i) as u16;
                    cx.complete_part(slot, part - header, i == 0, more);
                }
            }
        }
        count
    }

    /// Says in the header of a packet how many buffers it fills.
    fn set_header(&self, first: &mut PostedSlot, count: u16) {
        let Some(guest) = first.guest_mut() else { return };
        match self.framing.header {
            0 => set_count(guest, count),
            _ => set_buffer_count(guest, count),
        }
    }
}

impl Drop for MergingReader {
    /// Counts the packet that waits, if there is one: the queue is closed.
    fn drop(&mut self) {
        let waiting = u64::from(self.is_waiting());
        self.framing.drops.too_few_reads.fetch_add(waiting, Ordering::Relaxed);
    }
}

/// A copy of the first bytes of a packet, behind its offload header, in the first `count` posted reads.
#[cold]
fn front_of(cx: &mut PollContext<'_>, count: usize) -> [u8; FRONT] {
    let mut front = [0; FRONT];
    let mut at = 0;
    for (i, slot) in cx.posted_reads().take(count).enumerate() {
        let to = &mut front[at..];
        at += match (slot.guest(), i) {
            (Some(guest), 0) => guest.space().copy_to(to),
            (Some(guest), _) => guest.segments().copy_to(to),
            (None, _) => {
                let space = slot.buffer_mut().unwrap_or_default();
                let len = space.len().min(to.len());
                to[..len].copy_from_slice(&space[..len]);
                len
            }
        };
    }
    front
}

/// What a read has returned.
fn result(returned: libc::ssize_t) -> Result<usize, Fault> {
    usize::try_from(returned).map_err(|_| fault_of(errno()))
}
