//! [`Connection`]: whole messages from a socket, and replies to it, in pieces of any size.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::sys::{self, Control};
use crate::vhost_user::error::Error;
use crate::vhost_user::message::{DESCRIPTORS_MAX, HEADER_LEN, Header, PAYLOAD_MAX, VERSION};
use crate::vhost_user::request::Request;

/// In the flags of a header: the message is a reply.
const REPLY: u32 = 1 << 2;

fn header(number: u32, flags: u32, size: u32) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    for (to, value) in bytes.chunks_exact_mut(4).zip([number, flags, size]) {
        to.copy_from_slice(&value.to_ne_bytes());
    }
    bytes
}

/// A request of the back end without a payload, that wants no reply.
pub(super) fn backend_request(number: u32) -> [u8; HEADER_LEN] {
    header(number, VERSION, 0)
}

/// The descriptors of one message. Those that nobody takes are closed.
#[derive(Default)]
pub(super) struct Descriptors {
    fds: [Option<OwnedFd>; DESCRIPTORS_MAX],
    /// How many came. More than [`DESCRIPTORS_MAX`] are counted and closed.
    count: usize,
}

impl Descriptors {
    fn push(&mut self, fd: OwnedFd) {
        if let Some(free) = self.fds.get_mut(self.count) {
            *free = Some(fd);
        }
        self.count += 1;
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// The descriptor of this place, which must be one that came.
    pub(super) fn take(&mut self, place: usize) -> OwnedFd {
        self.fds[place].take().expect("the message was checked for its descriptors")
    }
}

/// What [`Connection::receive`] has.
pub(super) enum Received {
    /// A whole message is there; see [`Connection::take`].
    Message,
    /// The rest of a message has not arrived.
    Nothing,
    /// The front end has closed the connection, between two messages.
    Closed,
}

/// What became of a reply.
pub(super) enum Flushed {
    /// There is nothing left to send.
    All,
    /// The socket takes no more now.
    Blocked,
    /// The front end has closed the connection.
    Closed,
}

/// A message is at most `HEADER_LEN + PAYLOAD_MAX` bytes, in both directions. There is at most one
/// message in each, so nothing here grows.
pub(super) struct Connection {
    socket: UnixStream,
    /// A socket that cannot be told to raise no signal has lost its peer already (macOS).
    usable: bool,
    control: Control,
    incoming: [u8; HEADER_LEN + PAYLOAD_MAX],
    received: usize,
    header: Option<Header>,
    descriptors: Descriptors,
    outgoing: [u8; HEADER_LEN + PAYLOAD_MAX],
    sent: usize,
    to_send: usize,
}

impl Connection {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            usable: sys::no_signal(socket.as_fd()).is_ok(),
            socket,
            control: Control::new(),
            incoming: [0; HEADER_LEN + PAYLOAD_MAX],
            received: 0,
            header: None,
            descriptors: Descriptors::default(),
            outgoing: [0; HEADER_LEN + PAYLOAD_MAX],
            sent: 0,
            to_send: 0,
        }
    }

    /// Receives what there is of the next message.
    pub(super) fn receive(&mut self) -> Result<Received, Error> {
        if !self.usable {
            return Ok(Received::Closed);
        }
        loop {
            let wanted = match self.header {
                None => HEADER_LEN,
                Some(header) => HEADER_LEN + header.size as usize,
            };
            if self.received == wanted {
                if self.header.is_some() {
                    return Ok(Received::Message);
                }
                let bytes = self.incoming.first_chunk().expect("it is longer than a header");
                self.header = Some(Header::parse(bytes)?);
                continue;
            }
            let space = &mut self.incoming[self.received..wanted];
            let descriptors = &mut self.descriptors;
            let mut found = |fd| descriptors.push(fd);
            match sys::receive(self.socket.as_fd(), space, &mut self.control, &mut found) {
                Ok(received) if received.lost => return Err(Error::DescriptorsLost),
                Ok(received) if received.len > 0 => self.received += received.len,
                Ok(_) if self.received > 0 => {
                    return Err(Error::Truncated { received: self.received });
                }
                Ok(_) => return Ok(Received::Closed),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Received::Nothing),
                    // The front end went without reading its last replies.
                    io::ErrorKind::ConnectionReset if self.received == 0 => {
                        return Ok(Received::Closed);
                    }
                    _ => return Err(error.into()),
                },
            }
        }
    }

    /// The message that [`receive`](Self::receive) has. The next one can be received after that.
    pub(super) fn take(&mut self) -> (Header, &[u8], Descriptors) {
        let header = self.header.take().expect("a whole message was received");
        self.received = 0;
        let payload = &self.incoming[HEADER_LEN..HEADER_LEN + header.size as usize];
        (header, payload, std::mem::take(&mut self.descriptors))
    }

    /// Puts a reply into the buffer for [`flush`](Self::flush). The last reply must have been sent.
    pub(super) fn reply(&mut self, request: Request, parts: &[&[u8]]) {
        debug_assert_eq!(self.sent, self.to_send, "there is one reply at a time");
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let header = header(request as u32, VERSION | REPLY, len as u32);
        self.outgoing[..HEADER_LEN].copy_from_slice(&header);
        let mut end = HEADER_LEN;
        for part in parts {
            self.outgoing[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
        (self.sent, self.to_send) = (0, end);
    }

    /// Sends what is left of the reply.
    pub(super) fn flush(&mut self) -> Result<Flushed, Error> {
        while self.sent < self.to_send {
            match sys::send(self.socket.as_fd(), &self.outgoing[self.sent..self.to_send]) {
                Ok(len) => self.sent += len,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(Flushed::Blocked),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                        return Ok(Flushed::Closed);
                    }
                    _ => return Err(error.into()),
                },
            }
        }
        Ok(Flushed::All)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
