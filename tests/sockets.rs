//! Pairs of sockets, and peers that do what a test says.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::{env, fs, process};

use vmring::{Interface, Ring, RingOp, Socket};

use crate::support::{reap, unique};

/// A folder for the sockets of one test. It goes with the test.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        let path = env::temp_dir().join(unique(&format!("vmring-{}", process::id())));
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether there is a file of this name.
pub(crate) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// A payload with its length in front, as a stream has it.
pub(crate) fn framed(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
}

/// Writes a payload with its length.
pub(crate) fn write_framed(stream: &mut UnixStream, payload: &[u8]) {
    stream.write_all(&framed(payload)).expect("the wire takes it");
}

/// The next payload of a stream. `None` at its end, which must not be within a payload.
pub(crate) fn read_framed(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    if stream.read(&mut length[..1]).expect("a length in time") == 0 {
        return None;
    }
    stream.read_exact(&mut length[1..]).expect("the rest of a length");
    let mut payload = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut payload).expect("a whole payload");
    Some(payload)
}

/// The count of this name among an interface's counters and drops.
pub(crate) fn count(interface: &Interface, name: &str) -> u64 {
    let all = interface.counters().into_iter().chain(interface.drops());
    let mut found = all.filter(|(is, _)| *is == name);
    found.next().unwrap_or_else(|| panic!("nothing counts '{name}'")).1
}

/// Sends each packet that arrives back, with its addresses exchanged, until `done` returns true. Panics
/// if a read fails. A write may fail: its peer may have gone.
pub(crate) fn echo_until(ring: &mut Ring, mut done: impl FnMut(&Ring) -> bool) {
    while !done(ring) {
        while let Some(frame) = ring.alloc() {
            if ring.submit_read(frame, 0).is_err() {
                break;
            }
        }
        ring.wait(1, Some(std::time::Duration::from_millis(5)));
        for seen in reap(ring) {
            if seen.op != RingOp::Read {
                continue;
            }
            seen.result.expect("a read succeeds");
            let mut frame = seen.frame.expect("a read has a frame");
            let packet = frame.to_vec();
            frame.reset();
            let answer = [&packet[6..12], &packet[..6], &packet[12..]].concat();
            frame.copy_from(&answer).expect("it fitted before");
            let _ = ring.submit_write(frame, 0);
        }
    }
}

/// A kind of wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Stream,
    StreamWithHeaders,
    Datagram,
    DatagramWithHeaders,
    #[cfg(target_os = "linux")]
    SeqpacketWithHeaders,
    #[cfg(target_os = "linux")]
    Seqpacket,
}

impl Wire {
    pub(crate) const ALL: &[Wire] = &[
        Wire::Stream,
        Wire::StreamWithHeaders,
        Wire::Datagram,
        Wire::DatagramWithHeaders,
        #[cfg(target_os = "linux")]
        Wire::SeqpacketWithHeaders,
        #[cfg(target_os = "linux")]
        Wire::Seqpacket,
    ];

    /// Those whose frames have a virtio header in front.
    pub(crate) const WITH_HEADERS: &[Wire] = &[
        Wire::StreamWithHeaders,
        Wire::DatagramWithHeaders,
        #[cfg(target_os = "linux")]
        Wire::SeqpacketWithHeaders,
    ];

    /// A driver of this kind that has no socket yet.
    pub(crate) fn driver(self) -> Socket {
        match self {
            Wire::Stream => Socket::stream(),
            Wire::StreamWithHeaders => Socket::stream().virtio_header(true),
            Wire::Datagram => Socket::datagram(),
            Wire::DatagramWithHeaders => Socket::datagram().virtio_header(true),
            #[cfg(target_os = "linux")]
            Wire::SeqpacketWithHeaders => Socket::seqpacket().virtio_header(true),
            #[cfg(target_os = "linux")]
            Wire::Seqpacket => Socket::seqpacket(),
        }
    }

    /// Whether a virtio header is in front of each frame.
    pub(crate) fn has_headers(self) -> bool {
        match self {
            Wire::StreamWithHeaders | Wire::DatagramWithHeaders => true,
            #[cfg(target_os = "linux")]
            Wire::SeqpacketWithHeaders => true,
            _ => false,
        }
    }

    /// Two sockets that are connected to each other.
    pub(crate) fn sockets(self) -> [OwnedFd; 2] {
        match self {
            Wire::Stream | Wire::StreamWithHeaders => {
                let (one, other) = UnixStream::pair().expect("a pair of sockets");
                [one.into(), other.into()]
            }
            Wire::Datagram | Wire::DatagramWithHeaders => {
                let (one, other) = UnixDatagram::pair().expect("a pair of sockets");
                [one.into(), other.into()]
            }
            #[cfg(target_os = "linux")]
            Wire::Seqpacket | Wire::SeqpacketWithHeaders => seqpacket_pair(),
        }
    }

    /// Drivers for the two ends of a wire.
    pub(crate) fn pair(self) -> [Socket; 2] {
        self.sockets().map(|socket| self.driver().from_fd(socket))
    }
}

#[cfg(target_os = "linux")]
fn seqpacket_pair() -> [OwnedFd; 2] {
    use std::os::fd::FromRawFd;

    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two numbers.
    let made = unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the system has just opened them, and nobody else knows their numbers.
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}
