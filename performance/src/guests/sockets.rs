//! Unix sockets between the guests: datagrams in batches, and a stream with length prefixes, which
//! is how socket_vmnet and QEMU carry packets.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_void, iovec, mmsghdr};

use super::inspection::{FROM, Inspection, PACKETS, TO, numbered, packet};
use super::traffic::{BATCH, Carried, Receiver, Sender, Traffic, carry};
use crate::net::check;
use crate::result::Result;

/// The requested size. The system may give less.
const SEND_BUFFER: c_int = 4 << 20;
/// The most bytes that the receiver of a stream reads at once.
const STREAM_BUFFER: usize = 256 << 10;
/// Bytes of the length that precedes each packet in a stream.
const PREFIX: usize = 4;

/// Two connected non-blocking sockets. The guests spin, like those of the other contenders.
fn pair(kind: c_int) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    let kind = kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the array has space for the two descriptors.
    check(unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the descriptors are new, and nothing else owns them.
    let [from, to] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let size = SEND_BUFFER;
    // The first option is for root and exceeds the system's limit. The second stays within it.
    for option in [libc::SO_SNDBUFFORCE, libc::SO_SNDBUF] {
        // SAFETY: the value is an int, and the length is an int's.
        let set = unsafe {
            let value = (&raw const size).cast::<c_void>();
            let length = size_of_val(&size) as libc::socklen_t;
            libc::setsockopt(from.as_raw_fd(), libc::SOL_SOCKET, option, value, length)
        };
        if set == 0 {
            return Ok((from, to));
        }
    }
    Err(io::Error::last_os_error().into())
}

/// The result of a call that does not block. `None` if nothing was possible.
fn done(result: isize) -> io::Result<Option<usize>> {
    if let Ok(count) = usize::try_from(result) {
        return Ok(Some(count));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        // A Unix socket reports this when it lacks memory that will come back.
        _ if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(None),
        _ => Err(error),
    }
}

fn view(bytes: &mut [u8]) -> iovec {
    iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// Whether the system accepts a datagram of this length.
pub(crate) fn takes_datagrams_of(length: usize) -> Result<bool> {
    let (from, _to) = pair(libc::SOCK_DGRAM)?;
    let bytes = vec![0_u8; length];
    // SAFETY: the buffer has this many readable bytes.
    let sent = unsafe { libc::send(from.as_raw_fd(), bytes.as_ptr().cast(), length, 0) };
    Ok(sent == length as isize)
}

/// Buffers, and for each in turn a header that points at it.
struct Messages {
    headers: Vec<mmsghdr>,
    _iovecs: Vec<iovec>,
    buffers: Vec<Vec<u8>>,
}

// SAFETY: the pointers are into the vectors beside them, whose contents do not move when the
// vectors do.
unsafe impl Send for Messages {}

impl Messages {
    /// Makes `laps` headers for each buffer.
    fn new(mut buffers: Vec<Vec<u8>>, laps: usize) -> Self {
        let lap: Vec<iovec> = buffers.iter_mut().map(|buffer| view(buffer)).collect();
        let mut iovecs = lap.repeat(laps);
        let header = |iovec: &mut iovec| {
            // SAFETY: a message header is plain numbers and pointers, which may be null.
            let mut header: mmsghdr = unsafe { std::mem::zeroed() };
            header.msg_hdr.msg_iov = iovec;
            header.msg_hdr.msg_iovlen = 1;
            header
        };
        let headers = iovecs.iter_mut().map(header).collect();
        Self { headers, _iovecs: iovecs, buffers }
    }
}

struct DatagramSender {
    socket: OwnedFd,
    messages: Messages,
    sent: u64,
}

impl Sender for DatagramSender {
    fn send(&mut self) -> Result<bool> {
        // From any next packet on there are as many headers as a batch has.
        let next = self.sent as usize % PACKETS;
        let headers = &mut self.messages.headers[next..next + BATCH];
        // SAFETY: there are this many headers, and what they point at lives as long as they do.
        let sent = unsafe {
            let fd = self.socket.as_raw_fd();
            libc::sendmmsg(fd, headers.as_mut_ptr(), BATCH as u32, libc::MSG_DONTWAIT)
        };
        let sent = done(sent as isize)?;
        self.sent += sent.unwrap_or(0) as u64;
        Ok(sent.is_some())
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        Ok(Some(self.sent))
    }
}

struct DatagramReceiver {
    socket: OwnedFd,
    messages: Messages,
}

impl Receiver for DatagramReceiver {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let headers = &mut self.messages.headers;
        // SAFETY: there are this many headers; what they point at lives as long as they do, and
        // nothing else writes to it.
        let received = unsafe {
            let (fd, count) = (self.socket.as_raw_fd(), headers.len() as u32);
            let flags = libc::MSG_DONTWAIT;
            libc::recvmmsg(fd, headers.as_mut_ptr(), count, flags, std::ptr::null_mut())
        };
        let Some(received) = done(received as isize)? else { return Ok(false) };
        for (header, buffer) in headers[..received].iter().zip(&self.messages.buffers) {
            inspection.inspect(&buffer[..header.msg_len as usize]);
        }
        Ok(received > 0)
    }
}

pub(crate) fn measure_datagrams(traffic: Traffic) -> Result<Carried> {
    let (from, to) = pair(libc::SOCK_DGRAM)?;
    let expected = packet(traffic.length, TO, FROM);
    let messages = Messages::new(numbered(&expected).collect(), 1 + BATCH.div_ceil(PACKETS));
    let sender = DatagramSender { socket: from, messages, sent: 0 };
    // Longer than the packets, so that a packet that is too long is noticed.
    let messages = Messages::new(vec![vec![0; traffic.length + 64]; BATCH], 1);
    carry(sender, DatagramReceiver { socket: to, messages }, expected, traffic)
}

struct StreamSender {
    socket: OwnedFd,
    /// A length and a packet in turn.
    pieces: Vec<Vec<u8>>,
    /// The pieces to be sent in this call.
    iovecs: Vec<libc::iovec>,
    /// Bytes of a packet with its length.
    each: usize,
    /// Bytes of the batch that are already written.
    written: usize,
    /// Packets of the earlier batches.
    sent: u64,
}

// SAFETY: the list of pointers is empty between calls.
unsafe impl Send for StreamSender {}

impl StreamSender {
    /// Continues the batch up to its byte `end`, which is the last one of a packet.
    fn write(&mut self, end: usize) -> Result<bool> {
        let (first, skipped) = (self.written / self.each, self.written % self.each);
        let pieces = &mut self.pieces[2 * first..2 * (end / self.each)];
        let in_length = skipped.min(PREFIX);
        let skip = [in_length, skipped - in_length].into_iter().chain(std::iter::repeat(0));
        self.iovecs
            .extend(pieces.iter_mut().zip(skip).map(|(piece, skip)| view(&mut piece[skip..])));
        // SAFETY: there are this many, and they point at pieces that do not move.
        let written = unsafe {
            let (fd, count) = (self.socket.as_raw_fd(), self.iovecs.len() as c_int);
            libc::writev(fd, self.iovecs.as_ptr(), count)
        };
        self.iovecs.clear();
        let Some(written) = done(written)? else { return Ok(false) };
        self.written += written;
        if self.written == PACKETS * self.each {
            self.written = 0;
            self.sent += PACKETS as u64;
        }
        Ok(written > 0)
    }
}

impl Sender for StreamSender {
    fn send(&mut self) -> Result<bool> {
        self.write(PACKETS * self.each)
    }

    fn finish(&mut self) -> Result<Option<u64>> {
        let end = self.written.next_multiple_of(self.each);
        if self.written < end {
            self.write(end)?;
        }
        let packets = self.sent + (self.written / self.each) as u64;
        Ok(self.written.is_multiple_of(self.each).then_some(packets))
    }
}

struct StreamReceiver {
    socket: OwnedFd,
    buffer: Vec<u8>,
    /// Bytes in the buffer that are not inspected yet.
    filled: usize,
}

impl Receiver for StreamReceiver {
    fn receive(&mut self, inspection: &mut Inspection) -> Result<bool> {
        let room = &mut self.buffer[self.filled..];
        // SAFETY: the buffer has this much space.
        let got =
            unsafe { libc::read(self.socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        match done(got)? {
            None => return Ok(false),
            Some(0) => return Err("the stream is at its end, or a packet is too long".into()),
            Some(got) => self.filled += got,
        }
        let mut rest = &self.buffer[..self.filled];
        while let Some((prefix, behind)) = rest.split_first_chunk::<PREFIX>()
            && let Some((packet, behind)) =
                behind.split_at_checked(u32::from_be_bytes(*prefix) as usize)
        {
            inspection.inspect(packet);
            rest = behind;
        }
        let left = rest.len();
        // The part of a packet that is there moves to the front, where the rest will follow it.
        self.buffer.copy_within(self.filled - left..self.filled, 0);
        self.filled = left;
        Ok(true)
    }
}

pub(crate) fn measure_stream(traffic: Traffic) -> Result<Carried> {
    let (from, to) = pair(libc::SOCK_STREAM)?;
    let expected = packet(traffic.length, TO, FROM);
    let length = u32::try_from(traffic.length)?.to_be_bytes();
    let sender = StreamSender {
        socket: from,
        pieces: numbered(&expected).flat_map(|packet| [length.to_vec(), packet]).collect(),
        iovecs: Vec::with_capacity(2 * PACKETS),
        each: PREFIX + traffic.length,
        written: 0,
        sent: 0,
    };
    let buffer = vec![0; STREAM_BUFFER];
    carry(sender, StreamReceiver { socket: to, buffer, filled: 0 }, expected, traffic)
}
