//! Retains bytes in the socket's receive queue.

use std::io::IoSliceMut;

use crate::buffers::Pool;
use crate::limits::MAX_WINDOW;
use crate::retained::{Found, Retained};
use crate::sockets::{SocketError, Sockets};

/// The receive queue of a socket, read through `SO_PEEK_OFF`.
#[derive(Debug, Default)]
pub(crate) struct KernelQueue {
    next_peek: NextPeek,
}

/// Where the kernel's next peek begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum NextPeek {
    /// At the oldest byte, as long as no offset was set. A flow whose guest acknowledges what the first
    /// peek has found never needs one.
    #[default]
    Oldest,
    /// So many bytes behind it.
    Offset(u32),
    Unknown,
}

impl<S: Sockets> Retained<S> for KernelQueue {
    fn limit(&self, _: &Pool) -> u32 {
        MAX_WINDOW
    }

    fn copy(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        _: &mut Pool,
        offset: u32,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<Found, SocketError> {
        let is_there = match self.next_peek {
            NextPeek::Oldest => offset == 0,
            next => next == NextPeek::Offset(offset),
        };
        if !is_there {
            self.next_peek = NextPeek::Unknown;
            sockets.set_peek_offset(socket, offset)?;
            self.next_peek = NextPeek::Offset(offset);
        }
        match sockets.peek(socket, into) {
            Ok(0) => Ok(Found::End),
            Ok(len) => {
                if self.next_peek != NextPeek::Oldest {
                    self.next_peek = NextPeek::Offset(offset + len as u32);
                }
                Ok(Found::Bytes(len))
            }
            Err(SocketError::WouldBlock) => Ok(Found::Nothing),
            Err(error) => Err(error),
        }
    }

    fn discard(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        _: &mut Pool,
        len: u32,
    ) -> Result<(), SocketError> {
        sockets.discard(socket, len)?;
        // The kernel moves its offset in the same way (`sk_peek_offset_bwd` in include/net/sock.h).
        if let NextPeek::Offset(offset) = &mut self.next_peek {
            *offset = offset.saturating_sub(len);
        }
        Ok(())
    }

    fn release(&mut self, _: &mut Pool) {}
}
