//! The queue of a stream: whole payloads out of one receive buffer, and many frames in one call.
//!
//! No slot stays with the queue between two polls, so a cancel, a drain and a close have nothing to wait
//! for. What is received of a payload that is not whole stays in the receive buffer; what is not sent of
//! a payload that the system took in part is copied, once, and goes first.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::counters::add_one;
use super::framing::Piece;
use super::limits::{
    HEADER_LEN, LENGTH_LEN, PIECES_MAX, RECEIVES_PER_POLL, STREAM_BYTES, STREAM_FRAMES,
    WRITE_SEGMENTS_MAX,
};
use super::link::{Connection, End, Handle, Received, errno, is_busy};
use super::packet::{Layout, Pieces};
use super::sys;
use super::watch::Watch;
use crate::config::Direction;
use crate::device::context::PollContext;
use crate::device::seam::{Progress, Queue};
use crate::device::slot::PostedSlot;
use crate::error::Status;
use crate::sync::Ordering;
use crate::sys::lock;

/// The bytes in front of a frame: its length, and the virtio header if there is one.
type Front = [u8; LENGTH_LEN + HEADER_LEN];

/// One ring's queue of a stream.
pub(super) struct StreamQueue {
    handle: Handle,
    layout: Layout,
    direction: Direction,
    /// The frames of one call. Empty between two polls.
    batch: Vec<PostedSlot>,
    fronts: Box<[Front]>,
    pieces: Pieces,
    /// Whether the last poll left reads posted.
    wants_bytes: bool,
    watch: Watch,
}

impl StreamQueue {
    pub(super) fn new(handle: Handle, layout: Layout, direction: Direction) -> Self {
        Self {
            handle,
            layout,
            direction,
            batch: Vec::with_capacity(STREAM_FRAMES),
            fronts: vec![[0; LENGTH_LEN + HEADER_LEN]; STREAM_FRAMES].into_boxed_slice(),
            pieces: Pieces::with_capacity(PIECES_MAX),
            wants_bytes: false,
            watch: Watch::default(),
        }
    }

    /// Sends the posted writes until none is left or the system takes no more.
    fn write(
        &mut self,
        cx: &mut PollContext<'_>,
        connection: &Arc<Connection>,
    ) -> Result<(), Status> {
        if connection.takes_no_more.load(Ordering::Relaxed) {
            self.refuse(cx);
            return Ok(());
        }
        let mut unsent = lock(&connection.unsent);
        match unsent.flush(&connection.socket) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                drop(unsent);
                self.handle.takes_no_more(connection, &error)?;
                self.refuse(cx);
                return Ok(());
            }
        }
        loop {
            let len = self.gather(cx);
            if self.batch.is_empty() {
                return Ok(());
            }
            // SAFETY: the pieces are bytes of `fronts`, of the frames in `batch`, and in the mappings
            // that the guests' buffers in `batch` keep alive. All stay through the call.
            let sent = unsafe { sys::send_pieces(&connection.socket, &mut self.pieces.0) };
            match sent {
                Ok(sent) => {
                    if self.settle(cx, sent, &mut unsent.bytes) {
                        add_one(&self.handle.counters().partial);
                    }
                    if sent < len {
                        return Ok(());
                    }
                }
                Err(error) => {
                    self.put_back(cx);
                    if is_busy(&error) {
                        return Ok(());
                    }
                    drop(unsent);
                    self.handle.takes_no_more(connection, &error)?;
                    self.refuse(cx);
                    return Ok(());
                }
            }
        }
    }

    /// Takes writes for one call. Returns the number of their bytes.
    fn gather(&mut self, cx: &mut PollContext<'_>) -> usize {
        self.pieces.0.clear();
        let front_len = LENGTH_LEN + self.layout.header();
        let mut bytes = 0;
        while self.batch.len() < STREAM_FRAMES
            && bytes < STREAM_BYTES
            && self.pieces.0.len() + 1 + WRITE_SEGMENTS_MAX <= PIECES_MAX
            && let Some(mut slot) = cx.take_write()
        {
            let header = match self.layout.front_of(&mut slot) {
                Ok(header) => header,
                Err(status) => {
                    cx.fail(slot, status);
                    continue;
                }
            };
            let front = &mut self.fronts[self.batch.len()];
            let length = (self.layout.header() + slot.len()) as u32;
            front[..LENGTH_LEN].copy_from_slice(&length.to_be_bytes());
            if let Some(header) = header {
                front[LENGTH_LEN..].copy_from_slice(&header);
            }
            self.pieces.push_bytes(&front[..front_len]);
            self.pieces.push_packet(&slot);
            bytes += front_len + slot.len();
            self.batch.push(slot);
        }
        bytes
    }

    /// Completes the writes of which the system took every byte, or a part: of that one the rest is
    /// copied into `rest`. Puts the others back. Returns whether there is such a rest.
    fn settle(&mut self, cx: &mut PollContext<'_>, mut sent: usize, rest: &mut Vec<u8>) -> bool {
        let front_len = LENGTH_LEN + self.layout.header();
        let mut done = 0;
        let mut partial = false;
        for (front, slot) in self.fronts.iter().zip(&self.batch) {
            let len = front_len + slot.len();
            if sent < len {
                if sent > 0 {
                    partial = true;
                    keep_rest(&front[..front_len], slot, sent, rest);
                    done += 1;
                }
                break;
            }
            sent -= len;
            done += 1;
        }
        for slot in self.batch.drain(..done) {
            cx.complete_write(slot);
        }
        self.put_back(cx);
        partial
    }

    /// Puts the writes of a call back that was not made.
    fn put_back(&mut self, cx: &mut PollContext<'_>) {
        while let Some(slot) = self.batch.pop() {
            cx.put_back(slot);
        }
    }

    /// Fails the posted writes, because there is nobody who takes them.
    #[cold]
    fn refuse(&mut self, cx: &mut PollContext<'_>) {
        refuse_writes(cx, &self.handle);
    }

    /// Fills the posted reads until there is no whole payload any more.
    fn read(
        &mut self,
        cx: &mut PollContext<'_>,
        connection: &Arc<Connection>,
    ) -> Result<Progress, Status> {
        let mut received = lock(&connection.received);
        let mut receives = 0;
        let end = loop {
            match self.deliver(cx, &mut received) {
                Err(end) => break end,
                // No read is left, or the poll may take no more.
                Ok(true) => return Ok(Progress::More),
                Ok(false) if cx.reads() == 0 => return Ok(Progress::Idle),
                Ok(false) if receives == RECEIVES_PER_POLL => return Ok(Progress::More),
                Ok(false) => receives += 1,
            }
            match received.receive(&connection.socket) {
                Ok((0, _)) => {
                    let within = received.parser.is_within_payload(received.undelivered());
                    break End::Gone { within };
                }
                Ok((_, true)) => {}
                // There were fewer bytes than space, so these were all.
                Ok((_, false)) => match self.deliver(cx, &mut received) {
                    Err(end) => break end,
                    Ok(true) => return Ok(Progress::More),
                    Ok(false) => return Ok(Progress::Idle),
                },
                Err(error) if is_busy(&error) => return Ok(Progress::Idle),
                Err(error) => match errno(&error) {
                    libc::ECONNRESET | libc::ENOTCONN | libc::EPIPE => {
                        let within = received.parser.is_within_payload(received.undelivered());
                        break End::Gone { within };
                    }
                    errno => break End::Failed(errno),
                },
            }
        };
        drop(received);
        self.handle.end(connection, end)?;
        // The next peer may wait already.
        Ok(Progress::More)
    }

    /// Delivers whole payloads of the receive buffer while there are reads for them. Returns whether
    /// payloads are left there for which there is no read.
    fn deliver(&self, cx: &mut PollContext<'_>, received: &mut Received) -> Result<bool, End> {
        let counters = self.handle.counters();
        loop {
            let (parser, bytes) = received.parts();
            let (used, piece) = parser.next(bytes).map_err(|above| {
                tracing::warn!(%above, "a wire's peer is not understood");
                End::AboveMaximum
            })?;
            match piece {
                Piece::Incomplete => return Ok(false),
                Piece::Nothing => {}
                Piece::Unfit(unfit) => counters.count_unfit(unfit),
                Piece::Payload(payload) => {
                    let Some(slot) = cx.take_read() else { return Ok(true) };
                    if let Some(slot) = self.layout.deliver(cx, slot, payload) {
                        add_one(&counters.bad_header);
                        cx.put_back(slot);
                    }
                }
            }
            received.consume(used);
        }
    }
}

/// Fails the posted writes, because there is no peer.
pub(super) fn refuse_writes(cx: &mut PollContext<'_>, handle: &Handle) {
    while let Some(slot) = cx.take_write() {
        add_one(&handle.counters().no_peer);
        cx.fail(slot, Status::Os(libc::ENOTCONN));
    }
}

/// Copies the bytes of a payload that come after the first `sent`.
fn keep_rest(front: &[u8], slot: &PostedSlot, sent: usize, rest: &mut Vec<u8>) {
    let len = front.len() + slot.len();
    rest.clear();
    rest.resize(len - sent, 0);
    let of_front = front.get(sent..).unwrap_or_default();
    let (to_front, to_packet) = rest.split_at_mut(of_front.len());
    to_front.copy_from_slice(of_front);
    let skip = sent.saturating_sub(front.len());
    match (slot.packet(), slot.guest()) {
        (Some(packet), _) => to_packet.copy_from_slice(&packet[skip..]),
        (None, Some(guest)) => {
            guest.packet().skip_bytes(skip).copy_to(to_packet);
        }
        (None, None) => {}
    }
}

impl Queue for StreamQueue {
    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        let Some(connection) = self.handle.connection()? else {
            self.refuse(cx);
            self.wants_bytes = true;
            return Ok(Progress::Idle);
        };
        self.write(cx, &connection)?;
        let progress = match self.direction.reads() {
            true => self.read(cx, &connection)?,
            false => Progress::Idle,
        };
        self.wants_bytes = cx.reads() > 0;
        Ok(progress)
    }

    fn arm(&mut self) -> bool {
        let sending = self.is_sending();
        let Some(connection) = self.handle.current() else { return true };
        if sending {
            self.watch.set(connection.number, &connection.socket, self.wants_bytes);
        }
        if !self.direction.reads() {
            return true;
        }
        let received = lock(&connection.received);
        !received.parser.finds(received.undelivered())
    }

    fn is_sending(&self) -> bool {
        let current = self.handle.current();
        current.is_some_and(|connection| !lock(&connection.unsent).is_empty())
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self.watch.descriptor() {
            _ if !self.is_sending() => self.handle.descriptor(),
            // Bytes that cannot be taken must not wake anybody.
            None => self.handle.descriptor().filter(|_| self.wants_bytes),
            watch => watch,
        }
    }
}
