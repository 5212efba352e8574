//! [`Completion`]: the result of one submission, with its frame. [`Peek`]: the next one, which is still
//! in its queue.

use std::cell::Cell;
use std::fmt;
use std::ops::Deref;

use static_assertions::assert_impl_all;
use vmring_core::{Cqe, CqeRef, Frame, Opcode, Outcome, Reaped};

use crate::error::{CompletionError, EntryError};

/// What a submission asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RingOp {
    /// To fill the frame with a packet.
    Read,
    /// To send the frame's packet.
    Write,
    /// To complete other entries now.
    Cancel,
}

/// The result of one submission, as a CQE is in io_uring.
///
/// The frame comes back on success **and** on error; a cancel has none. Nor has an entry with a
/// guest's buffer: its packet is in the guest's own memory, and `user_data` says which buffer it was.
/// [`take_packet`](Self::take_packet) takes the frame if there is a packet in it and is an error
/// otherwise, [`take_frame`](Self::take_frame) takes it in any case, and
/// [`into_parts`](Self::into_parts) takes everything at once.
pub struct Completion {
    /// The number that the caller gave at submit.
    pub user_data: u64,
    /// What the submission asked for.
    pub op: RingOp,
    /// On success, the packet's length in bytes; for a cancel, the number of entries that it found.
    /// On failure, the reason.
    pub result: Result<usize, EntryError>,
    /// How many of the next completions have the rest of this packet: 0 if none has. It counts down
    /// to 0 with each of them. Only a ring with [mergeable
    /// reads](crate::RingBuilder::mergeable_reads) has such packets.
    pub more: u16,
    /// A cell, so that the frame can be taken through `&self` while `user_data` is still read, as
    /// the hot loop does.
    frame: Cell<Option<Frame>>,
}

assert_impl_all!(Completion: Send);

impl From<Opcode> for RingOp {
    #[inline]
    fn from(opcode: Opcode) -> Self {
        match opcode {
            Opcode::Read => RingOp::Read,
            Opcode::Write => RingOp::Write,
            Opcode::Cancel | Opcode::CancelAll => RingOp::Cancel,
        }
    }
}

#[inline]
fn result_of(outcome: Outcome, len: u32) -> Result<usize, EntryError> {
    match outcome {
        Outcome::Done => Ok(len as usize),
        failed => Err(error_of(failed)),
    }
}

#[cold]
fn error_of(outcome: Outcome) -> EntryError {
    EntryError::from_outcome(outcome).err().unwrap_or(EntryError::Abandoned)
}

impl Completion {
    #[inline]
    pub(super) fn new(reaped: Reaped) -> Self {
        Self {
            user_data: reaped.user_data,
            op: reaped.opcode.into(),
            result: result_of(reaped.outcome, reaped.len),
            more: reaped.more,
            frame: Cell::new(reaped.frame),
        }
    }

    /// Takes the frame of a read or write that succeeded.
    ///
    /// # Errors
    ///
    /// [`CompletionError`] with the reason, and with the frame inside, if the entry failed.
    /// [`EntryError::NoPacket`], without a frame, if the entry succeeded but is a cancel, or if its
    /// frame was taken before, or if the packet is in the memory of a guest.
    #[inline]
    pub fn take_packet(&self) -> Result<Frame, CompletionError> {
        let (error, frame) = match (self.result, self.frame.take()) {
            (Ok(_), Some(frame)) => return Ok(frame),
            (Ok(_), None) => (EntryError::NoPacket, None),
            (Err(error), frame) => (error, frame),
        };
        Err(CompletionError { error, user_data: self.user_data, frame })
    }

    /// Takes the frame, whether the entry succeeded or failed. Returns `None` for a cancel, if the
    /// frame was taken before, and if the entry had a guest's buffer.
    #[inline]
    pub fn take_frame(&self) -> Option<Frame> {
        self.frame.take()
    }

    /// Takes the completion apart into `user_data`, `result` and the frame, which is `None` for a
    /// cancel, if it was taken before, and if the entry had a guest's buffer.
    pub fn into_parts(self) -> (u64, Result<usize, EntryError>, Option<Frame>) {
        (self.user_data, self.result, self.frame.into_inner())
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("user_data", &self.user_data)
            .field("op", &self.op)
            .field("result", &self.result)
            .field("more", &self.more)
            .finish_non_exhaustive()
    }
}

/// What a completion says while it is still in the queue. The fields are those of [`Completion`],
/// which also has the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompletionInfo {
    /// The number that the caller gave at submit.
    pub user_data: u64,
    /// What the submission asked for.
    pub op: RingOp,
    /// On success, the packet's length in bytes; for a cancel, the number of entries that it found.
    /// On failure, the reason.
    pub result: Result<usize, EntryError>,
    /// How many of the next completions have the rest of this packet.
    pub more: u16,
}

impl CompletionInfo {
    pub(super) fn new(cqe: &Cqe) -> Self {
        Self {
            user_data: cqe.user_data(),
            op: cqe.opcode().into(),
            result: result_of(cqe.outcome(), cqe.len()),
            more: cqe.more(),
        }
    }
}

/// The next completion, which is still in the queue. [`CompletionQueue::peek`] returns it. It
/// dereferences to the [`CompletionInfo`].
///
/// [`take`](Self::take) takes the completion. If a `Peek` is dropped, or forgotten, the completion
/// stays where it is: it is the next one, its credit is not returned, and its frame stays with the
/// ring.
///
/// [`CompletionQueue::peek`]: crate::CompletionQueue::peek
pub struct Peek<'a> {
    info: CompletionInfo,
    next: CqeRef<'a>,
}

impl<'a> Peek<'a> {
    pub(super) fn new(next: CqeRef<'a>) -> Self {
        Self { info: CompletionInfo::new(next.cqe()), next }
    }

    /// Takes the completion out of the queue, with its frame. This returns its credit.
    pub fn take(self) -> Completion {
        Completion::new(self.next.take())
    }
}

impl Deref for Peek<'_> {
    type Target = CompletionInfo;

    fn deref(&self) -> &CompletionInfo {
        &self.info
    }
}

impl fmt::Debug for Peek<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Peek").field(&self.info).finish()
    }
}
