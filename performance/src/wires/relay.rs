//! Relays between two sockets: one that reads and writes each frame by itself, and one that looks at
//! nothing. Each is one thread.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::net::check;
use crate::result::Result;

/// How often a relay checks whether it should stop, while nothing arrives.
const LOOK_MS: libc::c_int = 20;
/// How many frames of one side are carried before the other side is looked at.
const BATCH: usize = 64;
/// The length in front of each frame of a stream, in bytes.
const LENGTH: usize = 4;
/// The longest frame, with a header in front.
const LONGEST: usize = 131_072;
/// What one call of the relay that looks at nothing takes.
const AT_ONCE: usize = 256 * 1024;
/// The space of a message that is carried in a batch.
const MESSAGE: usize = 2048;

/// How the bytes get from one socket to the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One call receives a frame of a stream and the length of the next one, and one sends the frame. It is
    /// the fewest calls a frame that are possible without more frames in one call.
    Frames,
    /// One call receives a message, and one sends it.
    Messages,
    /// One call receives what there is of a stream, and one sends it: two hops, and nothing else.
    Bytes,
    /// One call receives the messages that there are, and one sends them: the same for messages.
    Batches,
}

/// Carries both directions until `stop`.
pub(super) fn run(sockets: &[OwnedFd; 2], way: Way, stop: &AtomicBool) -> Result<()> {
    if way == Way::Batches {
        return run_batches(sockets, stop);
    }
    let mut directions = [Direction::new(way), Direction::new(way)];
    let mut entries = poll_entries(sockets);
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: poll reads and writes two entries, which outlive the call.
        check(unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, LOOK_MS) })?;
        for (from, direction) in directions.iter_mut().enumerate() {
            if entries[from].revents == 0 {
                continue;
            }
            for _ in 0..BATCH {
                match direction.carry(way, &sockets[from], &sockets[1 - from])? {
                    Carried::Some => {}
                    Carried::Nothing => break,
                    // The clients have gone, and the measurement is over.
                    Carried::End => return Ok(()),
                }
            }
        }
    }
    Ok(())
}

/// Carries messages in batches, both ways.
fn run_batches(sockets: &[OwnedFd; 2], stop: &AtomicBool) -> Result<()> {
    let mut space = vec![0; BATCH * MESSAGE];
    let mut pieces: Vec<_> = space
        .chunks_exact_mut(MESSAGE)
        .map(|bytes| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: MESSAGE })
        .collect();
    let mut messages = super::clients::messages(&mut pieces);
    let mut entries = poll_entries(sockets);
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: poll reads and writes two entries, which outlive the call.
        check(unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, LOOK_MS) })?;
        for from in [0, 1].into_iter().filter(|&from| entries[from].revents != 0) {
            let (to, from) = (sockets[1 - from].as_raw_fd(), sockets[from].as_raw_fd());
            let (first, count, flags) =
                (messages.as_mut_ptr(), BATCH as libc::c_uint, libc::MSG_DONTWAIT);
            // SAFETY: there are `count` messages, which name pieces of `space`, which nobody else has.
            let n = unsafe { libc::recvmmsg(from, first, count, flags as _, std::ptr::null_mut()) };
            let Ok(n) = usize::try_from(n) else { continue };
            for (message, piece) in messages[..n].iter().zip(&mut pieces) {
                piece.iov_len = message.msg_len as usize;
            }
            let mut sent = 0;
            while sent < n {
                let (first, left) = (messages[sent..].as_mut_ptr(), (n - sent) as libc::c_uint);
                // SAFETY: there are `left` messages, which name pieces of `space`.
                let more = unsafe { libc::sendmmsg(to, first, left, libc::MSG_NOSIGNAL as _) };
                // A client that has gone takes nothing.
                sent += usize::try_from(more).unwrap_or(n);
            }
            pieces[..n].iter_mut().for_each(|piece| piece.iov_len = MESSAGE);
        }
    }
    Ok(())
}

fn poll_entries(sockets: &[OwnedFd; 2]) -> [libc::pollfd; 2] {
    let entry = |socket: &OwnedFd| libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    sockets.each_ref().map(entry)
}

enum Carried {
    Some,
    Nothing,
    End,
}

struct Direction {
    bytes: Vec<u8>,
    /// How many bytes of the next frame are there.
    there: usize,
}

impl Direction {
    fn new(way: Way) -> Self {
        let space = if way == Way::Bytes { AT_ONCE } else { LENGTH + LONGEST + LENGTH };
        Self { bytes: vec![0; space], there: 0 }
    }

    fn carry(&mut self, way: Way, from: &OwnedFd, to: &OwnedFd) -> Result<Carried> {
        let Self { bytes, there } = self;
        if way != Way::Frames {
            let Some(len) = receive(from, bytes)? else { return Ok(Carried::Nothing) };
            if len == 0 {
                return Ok(Carried::End);
            }
            send(to, &bytes[..len])?;
            return Ok(Carried::Some);
        }
        let frame = |bytes: &[u8], there: usize| {
            let length = bytes.first_chunk().filter(|_| there >= LENGTH);
            length.map(|length| LENGTH + u32::from_be_bytes(*length) as usize)
        };
        let wanted = frame(bytes, *there).map_or(LENGTH, |frame| frame + LENGTH);
        if wanted > bytes.len() {
            return Err("a client sends what is no frame".into());
        }
        let Some(len) = receive(from, &mut bytes[*there..wanted])? else {
            return Ok(Carried::Nothing);
        };
        if len == 0 {
            return Ok(Carried::End);
        }
        *there += len;
        if let Some(frame) = frame(bytes, *there).filter(|frame| *there >= *frame) {
            send(to, &bytes[..frame])?;
            bytes.copy_within(frame..*there, 0);
            *there -= frame;
        }
        Ok(Carried::Some)
    }
}

/// Receives what there is. `None` if there is nothing.
fn receive(from: &OwnedFd, to: &mut [u8]) -> io::Result<Option<usize>> {
    let flags = libc::MSG_DONTWAIT;
    // SAFETY: the pointer and the length are those of `to`, which is exclusively borrowed.
    let len = unsafe { libc::recv(from.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), flags) };
    match usize::try_from(len) {
        Ok(len) => Ok(Some(len)),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            error if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(0)),
            error => Err(error),
        },
    }
}

/// Sends all of it, and waits for the peer if it must.
fn send(to: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let flags = libc::MSG_NOSIGNAL;
        // SAFETY: the pointer and the length are those of `bytes`, which the call only reads.
        let len = unsafe { libc::send(to.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
        match usize::try_from(len) {
            Ok(len) => bytes = &bytes[len..],
            Err(_) => match io::Error::last_os_error() {
                // The client has gone. The next look at its socket says so.
                error if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}
