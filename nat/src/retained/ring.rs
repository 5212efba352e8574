//! Retains bytes in a ring of the flow's own.
//!
//! The ring comes from a bounded pool when bytes arrive, and goes back when the guest has
//! acknowledged all of them. So an idle flow has none.

use std::io::IoSliceMut;

use crate::buffers::{ByteQueue, Pool};
use crate::output::Port;
use crate::retained::{Found, Retained};
use crate::sockets::{SocketError, Sockets};

/// A ring of bytes that were taken out of a socket.
#[derive(Debug)]
pub(crate) struct Ring {
    port: Port,
    bytes: Option<ByteQueue>,
    /// The socket has said that the stream ends behind these bytes.
    ended: bool,
}

impl<S: Sockets> Retained<S> for Ring {
    fn limit(&self, rings: &Pool) -> u32 {
        rings.block_len() as u32
    }

    fn copy(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        rings: &mut Pool,
        offset: u32,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<Found, SocketError> {
        let wanted: usize = into.iter().map(|slice| slice.len()).sum();
        let offset = offset as usize;
        let mut nothing = false;
        loop {
            let len = self.bytes.as_ref().map_or(0, ByteQueue::len);
            if self.ended || nothing || len >= offset + wanted || len == rings.block_len() {
                break;
            }
            if self.bytes.is_none() {
                self.bytes = rings.take(self.port);
            }
            let Some(bytes) = &mut self.bytes else { return Ok(Found::NoMemory) };
            let mut space = bytes.space();
            let asked: usize = space.iter().map(|slice| slice.len()).sum();
            match sockets.receive(socket, &mut space) {
                Ok(0) => self.ended = true,
                Ok(len) => {
                    bytes.added(len);
                    // Fewer than asked for: there are no more now.
                    nothing = len < asked;
                }
                Err(SocketError::WouldBlock) => nothing = true,
                Err(error) => return Err(error),
            }
        }
        let copied = self.bytes.as_ref().map_or(0, |bytes| bytes.copy(offset, into));
        if copied > 0 {
            return Ok(Found::Bytes(copied));
        }
        self.release_if_empty(rings);
        Ok(if self.ended { Found::End } else { Found::Nothing })
    }

    fn discard(
        &mut self,
        _: &mut S,
        _: &S::Socket,
        rings: &mut Pool,
        len: u32,
    ) -> Result<(), SocketError> {
        if let Some(bytes) = &mut self.bytes {
            bytes.remove(len as usize);
        }
        self.release_if_empty(rings);
        Ok(())
    }

    fn release(&mut self, rings: &mut Pool) {
        if let Some(bytes) = self.bytes.take() {
            rings.give_back(bytes);
        }
    }
}

impl Ring {
    /// No ring yet, for a flow of this port.
    pub(crate) fn new(port: Port) -> Self {
        Self { port, bytes: None, ended: false }
    }

    fn release_if_empty(&mut self, rings: &mut Pool) {
        if let Some(bytes) = self.bytes.take_if(|bytes| bytes.is_empty()) {
            rings.give_back(bytes);
        }
    }
}
