//! A bridge between two TAPs as anybody would write it: one thread, and one system call per packet.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::clock::Processor;
use crate::net::{Tap, VIRTIO_HEADER, check};
use crate::result::Result;
use crate::slots::BATCH;

/// The longest frame that the other side is to segment, with its virtio header.
const LONGEST: usize = VIRTIO_HEADER + 14 + 65_535;

/// How often the relay checks whether it should stop, while nothing arrives.
const LOOK_MS: libc::c_int = 20;

/// Carries packets in both directions until `stop`. Returns the processor time that it took.
pub(crate) fn run(left: &Tap, right: &Tap, stop: &AtomicBool) -> Result<Duration> {
    let processor = Processor::of_this_thread()?;
    let mut buffer = vec![0; LONGEST];
    let mut entries = [left, right].map(|tap| libc::pollfd {
        fd: tap.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: poll reads and writes two entries, which outlive the call.
        check(unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, LOOK_MS) })?;
        for (entry, from, to) in [(entries[0], left, right), (entries[1], right, left)] {
            if entry.revents != 0 {
                carry(from, to, &mut buffer)?;
            }
        }
    }
    Ok(processor.time())
}

/// Carries a batch, or as many packets as there are.
fn carry(from: &Tap, to: &Tap, buffer: &mut [u8]) -> Result<()> {
    for _ in 0..BATCH {
        // SAFETY: the buffer is that long and outlives the call.
        let length =
            unsafe { libc::read(from.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(length) = usize::try_from(length) else {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock {
                return Ok(());
            }
            return Err(error.into());
        };
        let packet = &buffer[..length];
        // SAFETY: the packet is that long and outlives the call.
        let written = unsafe { libc::write(to.as_raw_fd(), packet.as_ptr().cast(), packet.len()) };
        if written < 0 {
            let error = io::Error::last_os_error();
            // A network may lose packets. This one does so while its other end is not up (yet).
            let lost =
                matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS | libc::EIO));
            if !lost {
                return Err(error.into());
            }
        }
    }
    Ok(())
}
