//! Bytes that came from the world and that the guest has not acknowledged.
//!
//! They must be kept, because a guest may lose them on the way or drop them when it has no memory.
//! [`Retained`] says what the translator needs of them. There are two places, and `place` chooses:
//!
//! - [`kernel`]: the socket's own receive queue. Its bytes are looked at (`MSG_PEEK` from an offset)
//!   and taken out when the guest acknowledges them. The process holds none of them.
//! - [`ring`]: a bounded ring of the flow, for hosts whose kernel cannot look at an offset.

pub(crate) mod kernel;
pub(crate) mod place;
pub(crate) mod ring;

use std::io::IoSliceMut;

use crate::buffers::Pool;
use crate::sockets::{SocketError, Sockets};

/// What is to be had behind an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// So many bytes, at least one. If these are fewer than asked for, the socket has no more now.
    Bytes(usize),
    /// None now. The socket will tell when there are more.
    Nothing,
    /// The end of the stream.
    End,
    /// There is no memory to take them out of the socket. The caller has to ask again.
    NoMemory,
}

/// A place that retains bytes of one socket.
pub(crate) trait Retained<S: Sockets> {
    /// The most bytes that can be retained.
    fn limit(&self, rings: &Pool) -> u32;

    /// Copies bytes of the stream, from `offset` bytes behind the oldest one retained.
    ///
    /// # Errors
    ///
    /// If the connection is gone. Whoever gets this has to remember it, because the next call may
    /// find the end of the stream instead.
    fn copy(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        rings: &mut Pool,
        offset: u32,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<Found, SocketError>;

    /// Forgets the oldest bytes, which the guest has acknowledged.
    ///
    /// # Errors
    ///
    /// If the connection is gone.
    fn discard(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        rings: &mut Pool,
        len: u32,
    ) -> Result<(), SocketError>;

    /// Gives back what it has of `rings`.
    fn release(&mut self, rings: &mut Pool);
}
