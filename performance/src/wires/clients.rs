//! [`Clients`]: two clients of a carrier, which are the same for every carrier. One thread is both.
//!
//! They send and receive many frames with each call, and never more than a window is under way, so that
//! nothing is lost in a carrier that drops what does not fit. They do not sleep: a client that has
//! nothing to do looks again after some microseconds. So no carrier pays for waking them.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use super::load::{Load, Wire};
use crate::net::check;
use crate::result::Result;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a client has nothing to do before it looks again.
const PAUSE: Duration = Duration::from_micros(10);
/// How long nothing arrives until nothing is under way.
const QUIET: Duration = Duration::from_millis(30);
/// One call sends so many frames, and so many bytes, at most.
const BATCH: usize = 64;
const BATCH_BYTES: usize = 128 * 1024;

/// The buffers of the sockets: those of vfkit. A relay's sockets have the same ones.
pub(super) fn set_buffers(socket: &OwnedFd) -> Result<()> {
    for (name, bytes) in [(libc::SO_SNDBUFFORCE, 1_048_576), (libc::SO_RCVBUFFORCE, 4 * 1_048_576)]
    {
        let value: libc::c_int = bytes;
        let len = size_of_val(&value) as libc::socklen_t;
        let value = (&raw const value).cast();
        // SAFETY: the value has `len` bytes, which the call reads.
        check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value, len) })?;
    }
    Ok(())
}

/// What two clients have done.
#[derive(Clone, Copy)]
pub(super) struct Flow {
    pub(super) packets: u64,
    pub(super) time: Duration,
}

/// See the [module](self).
pub(super) struct Clients {
    sockets: [OwnedFd; 2],
    load: Load,
    sender: Sender,
    receiver: Receiver,
}

impl Clients {
    /// Two clients that are connected. They get to know each other.
    pub(super) fn new(sockets: [OwnedFd; 2], load: Load) -> Result<Self> {
        sockets.iter().try_for_each(set_buffers)?;
        let (sender, receiver) = (Sender::new(load), Receiver::new(load));
        let mut clients = Self { sockets, load, sender, receiver };
        clients.meet()?;
        Ok(clients)
    }

    /// Lets a switch learn where both are, and a datagram socket who its peer is. A relay carries the same
    /// frames.
    fn meet(&mut self) -> Result<()> {
        let announcements = [0, 1].map(|from| self.load.announcement(from));
        let (mut reached, begin) = ([false; 2], Instant::now());
        while reached != [true; 2] {
            for (socket, announcement) in self.sockets.iter().zip(&announcements) {
                send_now(socket, announcement)?;
            }
            thread::sleep(Duration::from_millis(5));
            for (socket, reached) in self.sockets.iter().zip(&mut reached) {
                *reached |= self.receiver.receive(socket)? > 0;
            }
            if begin.elapsed() > PATIENCE {
                return Err("the clients do not reach each other".into());
            }
        }
        self.quiet()
    }

    /// Waits until nothing is under way.
    fn quiet(&mut self) -> Result<()> {
        let mut last = Instant::now();
        while last.elapsed() < QUIET {
            for socket in &self.sockets {
                if self.receiver.receive(socket)? > 0 {
                    last = Instant::now();
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Sends a window of frames, and compares what arrives with it.
    pub(super) fn check(&mut self) -> Result<()> {
        let [a, b] = &self.sockets;
        let len = self.load.payload_len();
        let whole = self.load.window * len;
        let (mut sent, mut received, begin) = (0, 0, Instant::now());
        while received < whole {
            if sent < whole {
                sent += self.sender.send(a, sent, whole - sent)?;
            }
            let n = self.receiver.receive(b)?;
            let expected = self.sender.payloads.iter().cycle();
            let at = received % self.sender.payloads.len();
            if !self.receiver.bytes().zip(expected.skip(at)).all(|(a, b)| a == b) {
                return Err(format!("other bytes arrive after {} frames", received / len).into());
            }
            received += n;
            if begin.elapsed() > PATIENCE {
                return Err(format!("{received} of {whole} bytes arrive").into());
            }
        }
        self.quiet()
    }

    /// Lets one client send to the other for this time. `between` is called when the clock starts and
    /// when it stops.
    pub(super) fn flow(
        &mut self,
        time: Duration,
        mut between: impl FnMut() -> Result<()>,
    ) -> Result<Flow> {
        let [a, b] = &self.sockets;
        let window = self.load.window * self.load.payload_len();
        // Less is not worth a call, while more is under way.
        let least = window.min(self.sender.payloads.len());
        let (mut sent, mut received, mut start, mut at_start) = (0, 0, None, 0);
        let mut last = Instant::now();
        loop {
            let room = window - (sent - received);
            let done = if room >= least { self.sender.send(a, sent, room)? } else { 0 };
            sent += done;
            let n = self.receiver.receive(b)?;
            received += n;
            let now = Instant::now();
            if done + n > 0 {
                last = now;
            } else if now.duration_since(last) > PATIENCE {
                return Err(format!("of {sent} bytes {received} have arrived").into());
            } else {
                while now.elapsed() < PAUSE {
                    std::hint::spin_loop();
                }
            }
            match start {
                // What came until the window had passed twice is not measured.
                None if received >= 2 * window => {
                    between()?;
                    (start, at_start) = (Some(Instant::now()), received);
                }
                Some(start) if now.duration_since(start) >= time => {
                    let time = start.elapsed();
                    between()?;
                    let packets = (received - at_start) / self.load.payload_len();
                    self.finish(sent, received)?;
                    return Ok(Flow { packets: packets as u64, time });
                }
                _ => {}
            }
        }
    }

    /// Sends the rest of the last frame, and waits until everything has arrived.
    fn finish(&mut self, mut sent: usize, mut received: usize) -> Result<()> {
        let [a, b] = &self.sockets;
        let begin = Instant::now();
        let all = sent.next_multiple_of(self.load.payload_len());
        while received < all {
            if sent < all {
                sent += self.sender.send(a, sent, all - sent)?;
            }
            received += self.receiver.receive(b)?;
            if begin.elapsed() > PATIENCE {
                return Err(format!("of {all} bytes {received} arrive").into());
            }
        }
        self.quiet()
    }

    /// Lets one frame go there and one come back, again and again for this time. Here the clients sleep.
    /// Returns the nanoseconds of each time.
    pub(super) fn ping_pong(&mut self, time: Duration) -> Result<Vec<f64>> {
        let payloads = [0, 1].map(|from| self.load.payload(from, 0));
        let mut trips = Vec::new();
        let begin = Instant::now();
        while begin.elapsed() < time {
            let start = Instant::now();
            for from in [0, 1] {
                send_now(&self.sockets[from], &payloads[from])?;
                let mut missing = payloads[from].len();
                while missing > 0 {
                    missing -= self.receiver.wait(&self.sockets[1 - from], missing)?;
                }
            }
            trips.push(start.elapsed().as_nanos() as f64);
        }
        Ok(trips)
    }
}

/// What a client sends: a batch of payloads, again and again.
struct Sender {
    load: Load,
    payloads: Vec<u8>,
}

impl Sender {
    fn new(load: Load) -> Self {
        let count = (BATCH_BYTES / load.payload_len()).clamp(1, BATCH);
        let payloads = (0..count).flat_map(|number| load.payload(0, number)).collect();
        Self { load, payloads }
    }

    /// Sends at most `most` bytes. `sent` is how many were sent before. Returns how many bytes were sent.
    fn send(&self, to: &OwnedFd, sent: usize, most: usize) -> Result<usize> {
        let at = sent % self.payloads.len();
        let end = (at + most).min(self.payloads.len());
        let payload = self.load.payload_len();
        match self.load.wire {
            Wire::Stream => Ok(send_now(to, &self.payloads[at..end])?),
            Wire::Datagram => {
                let mut pieces: Vec<_> =
                    self.payloads[at..end].chunks_exact(payload).map(piece_of).collect();
                let count = pieces.len() as libc::c_uint;
                let mut messages = messages(&mut pieces);
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: there are `count` messages, which name pieces of `payloads`. The call reads them.
                let n = unsafe {
                    libc::sendmmsg(to.as_raw_fd(), messages.as_mut_ptr(), count, flags as _)
                };
                Ok(none_if_busy(n as isize)? * payload)
            }
        }
    }
}

/// What a client receives into.
struct Receiver {
    wire: Wire,
    space: Vec<u8>,
    /// The length of each message, or of what was received of a stream.
    lengths: Vec<usize>,
    /// The space of each message.
    stride: usize,
}

impl Receiver {
    fn new(load: Load) -> Self {
        let stride = match load.wire {
            Wire::Stream => 2 * BATCH_BYTES,
            Wire::Datagram => load.payload_len().next_multiple_of(64),
        };
        let count = if load.wire == Wire::Stream { 1 } else { BATCH };
        Self { wire: load.wire, space: vec![0; count * stride], lengths: Vec::new(), stride }
    }

    /// Receives what there is and fits. Returns how many bytes.
    fn receive(&mut self, from: &OwnedFd) -> Result<usize> {
        self.lengths.clear();
        let Self { wire, space, lengths, stride } = self;
        match wire {
            Wire::Stream => {
                let flags = libc::MSG_DONTWAIT;
                let (to, len) = (space.as_mut_ptr().cast(), space.len());
                // SAFETY: the pointer and the length are those of `space`, which is exclusively borrowed.
                let len = unsafe { libc::recv(from.as_raw_fd(), to, len, flags) };
                if len == 0 {
                    return Err("the carrier has ended".into());
                }
                lengths.push(none_if_busy(len)?);
            }
            Wire::Datagram => {
                let mut pieces: Vec<_> = space.chunks_exact_mut(*stride).map(space_of).collect();
                let count = pieces.len() as libc::c_uint;
                let mut messages = messages(&mut pieces);
                let (fd, to) = (from.as_raw_fd(), messages.as_mut_ptr());
                // SAFETY: there are `count` messages, which name pieces of `space`, which is exclusively
                // borrowed.
                let n = unsafe {
                    libc::recvmmsg(fd, to, count, libc::MSG_DONTWAIT as _, ptr::null_mut())
                };
                let n = none_if_busy(n as isize)?;
                lengths.extend(messages[..n].iter().map(|message| message.msg_len as usize));
            }
        }
        Ok(lengths.iter().sum())
    }

    /// The bytes of the last call.
    fn bytes(&self) -> impl Iterator<Item = &u8> {
        let spaces = self.space.chunks_exact(self.stride);
        spaces.zip(&self.lengths).flat_map(|(space, len)| &space[..*len])
    }

    /// Sleeps until something comes, and receives at most `most` bytes.
    fn wait(&mut self, from: &OwnedFd, most: usize) -> Result<usize> {
        let to = self.space[..most].as_mut_ptr().cast();
        // SAFETY: there are `most` bytes of `space`, which is exclusively borrowed.
        let len = unsafe { libc::recv(from.as_raw_fd(), to, most, 0) };
        match check(len as libc::c_int)? {
            0 => Err("the carrier has ended".into()),
            len => Ok(len as usize),
        }
    }
}

/// What a call reads.
fn piece_of(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// What a call writes to.
fn space_of(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// The messages of one call, each with one piece.
pub(super) fn messages(pieces: &mut [libc::iovec]) -> Vec<libc::mmsghdr> {
    let message = |piece: &mut libc::iovec| {
        // SAFETY: it consists of numbers and pointers, for which zero is valid.
        let mut message: libc::mmsghdr = unsafe { mem::zeroed() };
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (piece, 1);
        message
    };
    pieces.iter_mut().map(message).collect()
}

/// Sends what the socket takes now. Returns how many bytes.
fn send_now(to: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are those of `bytes`, which the call only reads.
    none_if_busy(unsafe { libc::send(to.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// The result of a call. It is 0 if the call would have to wait.
fn none_if_busy(result: isize) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(result) => Ok(result),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            error => Err(error),
        },
    }
}
