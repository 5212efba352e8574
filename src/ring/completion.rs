//! [`Completion`]: what became of one submission.

use std::cell::Cell;
use std::fmt;

use static_assertions::assert_impl_all;
use vmring_core::{Frame, Opcode, Outcome, Reaped};

use crate::error::{CompletionError, EntryError};

/// What a submit asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RingOp {
    /// A packet into the frame.
    Read,
    /// The frame's packet out.
    Write,
    /// Entries to be completed now.
    Cancel,
}

/// What became of one submission.
///
/// The frame comes back on success **and** on error; a cancel has none. Take it with
/// [`take_packet`](Self::take_packet) (an error if there is no packet), [`take_frame`](Self::take_frame) (in any
/// case) or all at once with [`into_parts`](Self::into_parts).
pub struct Completion {
    /// The number given at submit.
    pub user_data: u64,
    /// What was asked.
    pub op: RingOp,
    /// The packet's length in bytes; of a cancel, the number of entries that matched.
    pub result: Result<usize, EntryError>,
    /// A cell, so that the frame can be taken while `user_data` is still read, as the hot loop
    /// wants.
    frame: Cell<Option<Frame>>,
}

assert_impl_all!(Completion: Send);

impl Completion {
    #[inline]
    pub(super) fn new(reaped: Reaped) -> Self {
        let op = match reaped.opcode {
            Opcode::Read => RingOp::Read,
            Opcode::Write => RingOp::Write,
            Opcode::Cancel | Opcode::CancelAll => RingOp::Cancel,
        };
        let result = match reaped.outcome {
            Outcome::Done => Ok(reaped.len as usize),
            failed => Err(Self::error(failed)),
        };
        Self { user_data: reaped.user_data, op, result, frame: Cell::new(reaped.frame) }
    }

    #[cold]
    fn error(outcome: Outcome) -> EntryError {
        EntryError::from_outcome(outcome).err().unwrap_or(EntryError::Abandoned)
    }

    /// The frame of a read or write that succeeded. Otherwise the error, with the frame inside. The
    /// frame is taken: a second call gives an error without one.
    #[inline]
    pub fn take_packet(&self) -> Result<Frame, CompletionError> {
        let (error, frame) = match (self.result, self.frame.take()) {
            (Ok(_), Some(frame)) => return Ok(frame),
            (Ok(_), None) => (EntryError::Abandoned, None),
            (Err(error), frame) => (error, frame),
        };
        Err(CompletionError { error, user_data: self.user_data, frame })
    }

    /// The frame, however it ended; `None` for a cancel, or when it was taken before.
    #[inline]
    pub fn take_frame(&self) -> Option<Frame> {
        self.frame.take()
    }

    /// Everything.
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
            .finish_non_exhaustive()
    }
}
