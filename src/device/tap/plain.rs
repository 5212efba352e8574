//! The engine for kernels and containers without io_uring: one non-blocking `read(2)` or `write(2)`
//! per frame.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::framing::{Fault, Framing, fault_of};
use super::open::TapQueueFd;
use crate::device::context::PollContext;
use crate::device::seam::Progress;
use crate::error::Status;

/// The engine of plain system calls for one queue.
#[derive(Debug)]
pub(crate) struct Plain {
    fd: Arc<TapQueueFd>,
}

impl Plain {
    pub(crate) fn new(fd: Arc<TapQueueFd>) -> Self {
        Self { fd }
    }

    /// Writes the posted frames until none is left or the kernel refuses one for the moment.
    /// Returns an error if the TAP is gone.
    pub(crate) fn write(
        &mut self,
        cx: &mut PollContext<'_>,
        framing: &Framing,
    ) -> Result<(), Status> {
        while let Some(mut slot) = cx.take_write() {
            let Some(bytes) = slot.packet_with_header_mut(framing.header) else {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            };
            if framing.take_dhcp(bytes) {
                cx.complete_write(slot);
                continue;
            }
            let fd = self.fd.as_raw_fd();
            // SAFETY: `bytes` borrows the slot for the whole call, and the length passed is its
            // length.
            let written = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
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
            let Some(room) = slot.buffer_with_header_mut(framing.header) else {
                cx.fail(slot, Status::InvalidArgument);
                continue;
            };
            let fd = self.fd.as_raw_fd();
            // SAFETY: `room` borrows the slot exclusively for the whole call, and the length passed
            // is its length.
            let len = unsafe { libc::read(fd, room.as_mut_ptr().cast(), room.len()) };
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
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
