//! The place in which a flow's bytes are retained.

use std::io::IoSliceMut;

use crate::buffers::Pool;
use crate::retained::kernel::KernelQueue;
use crate::retained::ring::Ring;
use crate::retained::{Found, Retained};
use crate::sockets::{SocketError, Sockets};

/// One of the two places.
#[derive(Debug)]
pub(crate) enum Place {
    Kernel(KernelQueue),
    Ring(Ring),
}

impl<S: Sockets> Retained<S> for Place {
    fn limit(&self, rings: &Pool) -> u32 {
        match self {
            Place::Kernel(kernel) => Retained::<S>::limit(kernel, rings),
            Place::Ring(ring) => Retained::<S>::limit(ring, rings),
        }
    }

    fn copy(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        rings: &mut Pool,
        offset: u32,
        into: &mut [IoSliceMut<'_>],
    ) -> Result<Found, SocketError> {
        match self {
            Place::Kernel(kernel) => kernel.copy(sockets, socket, rings, offset, into),
            Place::Ring(ring) => ring.copy(sockets, socket, rings, offset, into),
        }
    }

    fn discard(
        &mut self,
        sockets: &mut S,
        socket: &S::Socket,
        rings: &mut Pool,
        len: u32,
    ) -> Result<(), SocketError> {
        match self {
            Place::Kernel(kernel) => kernel.discard(sockets, socket, rings, len),
            Place::Ring(ring) => ring.discard(sockets, socket, rings, len),
        }
    }

    fn release(&mut self, rings: &mut Pool) {
        match self {
            Place::Kernel(kernel) => Retained::<S>::release(kernel, rings),
            Place::Ring(ring) => Retained::<S>::release(ring, rings),
        }
    }
}
