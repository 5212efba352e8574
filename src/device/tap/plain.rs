//! The engine for kernels and containers without io_uring: one non-blocking `read(2)` or `write(2)` per
//! frame, or `readv(2)` or `writev(2)` if the frame is in several pieces of a guest's memory.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::framing::{Fault, Framing, Outgoing, Pieces, Space, fault_of};
use super::limits::READ_SEGMENTS_MAX;
use super::open::TapQueueFd;
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::device::slot::PostedSlot;
use crate::error::Status;

/// The engine of plain system calls for one queue.
#[derive(Debug)]
pub(crate) struct Plain {
    fd: Arc<TapQueueFd>,
    /// The frame that is being written.
    outgoing: Outgoing,
    /// The pieces of the buffer that is being filled.
    space: Pieces<READ_SEGMENTS_MAX>,
}

impl Plain {
    pub(crate) fn new(fd: Arc<TapQueueFd>) -> Self {
        Self { fd, outgoing: Outgoing::default(), space: Pieces::default() }
    }

    /// Writes the posted frames until none is left or the kernel refuses one for the moment.
    /// Returns an error if the TAP is gone.
    pub(crate) fn write(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<(), Status> {
        while let Some(mut slot) = cx.take_write() {
            if framing.take_dhcp(&mut slot) {
                cx.complete_write(slot);
                continue;
            }
            let Some(pieces) = framing.to_write(&mut slot, &mut self.outgoing) else {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            };
            let fd = self.fd.as_raw_fd();
            // SAFETY: `pieces` borrows the slot and `outgoing` for the whole call. They are bytes of the
            // slot's frame, or in the mapping that its guest's buffer keeps alive, and a header in
            // `outgoing`.
            let written = unsafe {
                match pieces {
                    [piece] => libc::write(fd, piece.iov_base, piece.iov_len),
                    _ => libc::writev(fd, pieces.as_ptr(), pieces.len() as libc::c_int),
                }
            };
            if written >= 0 {
                cx.complete_write(slot);
                continue;
            }
            match fault_of(errno()) {
                Fault::Wait => {
                    cx.put_back(slot);
                    break;
                }
                Fault::Entry(status) => cx.fail(slot, status),
                Fault::Gone(status) => {
                    cx.put_back(slot);
                    return Err(status);
                }
            }
        }
        Ok(())
    }

    /// Fills the posted reads until the TAP has no more frames. Returns [`Progress::More`] if every
    /// posted read has been filled, so that the TAP may have more frames. Returns an error if the
    /// TAP is gone or the read fails.
    pub(crate) fn read(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<Progress, Status> {
        while let Some(mut slot) = cx.take_read() {
            let len = match framing.to_read(&mut slot) {
                // SAFETY: the space is the slot's, `len` bytes long: of its frame, which we own, or in
                // the mapping that its guest's buffer keeps alive. The slot stays here during the
                // call.
                Space::Piece(space, len) => unsafe {
                    libc::read(self.fd.as_raw_fd(), space.cast(), len)
                },
                Space::Scattered => self.read_scattered(&slot, framing),
                Space::Lacking => {
                    cx.fail(slot, Status::InvalidArgument);
                    continue;
                }
            };
            if let Ok(len) = usize::try_from(len) {
                framing.complete_received(cx, slot, len);
                continue;
            }
            let fault = fault_of(errno());
            cx.put_back(slot);
            return match fault {
                Fault::Wait => Ok(Progress::Idle),
                Fault::Entry(status) | Fault::Gone(status) => Err(status),
            };
        }
        Ok(Progress::More)
    }

    /// Reads into a guest's buffer of several pieces. Returns what the kernel returns.
    #[cold]
    fn read_scattered(&mut self, slot: &PostedSlot, framing: &Framing) -> libc::ssize_t {
        let segments = slot.guest().into_iter().flat_map(|guest| framing.space_of(guest));
        let count = self.space.put(0, segments);
        let space = self.space.first(count);
        // SAFETY: the pieces are in the mapping that the slot's buffer keeps alive, and the slot is
        // borrowed during the call.
        unsafe { libc::readv(self.fd.as_raw_fd(), space.as_ptr(), count as libc::c_int) }
    }
}

pub(super) fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
