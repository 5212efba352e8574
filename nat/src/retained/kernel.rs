//! Retains bytes in the socket's receive queue.

use std::io::IoSliceMut;

use crate::buffers::Pool;
use crate::limits::MAX_WINDOW;
use crate::retained::{Found, Retained};
use crate::sockets::{SocketError, Sockets};

/// The receive queue of a socket, read through `SO_PEEK_OFF`.
#[derive(Debug, Default)]
pub(crate) struct KernelQueue {
    /// Where the kernel's next peek begins, if that is known.
    offset: Option<u32>,
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
        if self.offset != Some(offset) {
            self.offset = None;
            sockets.set_peek_offset(socket, offset)?;
            self.offset = Some(offset);
        }
        match sockets.peek(socket, into) {
            Ok(0) => Ok(Found::End),
            Ok(len) => {
                self.offset = Some(offset + len as u32);
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
        self.offset = self.offset.map(|offset| offset.saturating_sub(len));
        Ok(())
    }

    fn release(&mut self, _: &mut Pool) {}
}
