//! Many messages in one call of the system, where it has such calls: `recvmmsg` and `sendmmsg` on Linux,
//! and `recvmsg_x` and `sendmsg_x` on macOS, if they are asked for. Elsewhere one call each.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::limits::{MESSAGES, READ_SEGMENTS_MAX};
use super::packet::Pieces;
use super::sys::{self, Address};

/// Messages that one call moves: the pieces of memory of each, and what became of it.
pub(super) struct Batch {
    pub(super) pieces: Pieces,
    /// Where the pieces of each message end.
    ends: Vec<usize>,
    /// The sender of each message, if it is asked for.
    senders: Vec<Address>,
    /// What was received.
    pub(super) received: Vec<Received>,
    calls: imp::Calls,
}

/// A message that was received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received {
    /// Its length in bytes, of those that fit.
    pub(super) len: usize,
    /// Whether bytes are missing that did not fit.
    pub(super) cut: bool,
}

impl Batch {
    /// Makes an empty batch. `many_at_once` asks for the calls of macOS that move many messages.
    pub(super) fn new(many_at_once: bool) -> Self {
        Self {
            pieces: Pieces::with_capacity(MESSAGES * (1 + READ_SEGMENTS_MAX)),
            ends: Vec::with_capacity(MESSAGES),
            senders: Vec::new(),
            received: Vec::with_capacity(MESSAGES),
            calls: imp::Calls::new(many_at_once),
        }
    }

    pub(super) fn clear(&mut self) {
        self.pieces.0.clear();
        self.ends.clear();
        self.received.clear();
    }

    /// Ends a message, whose pieces have been added.
    pub(super) fn end_message(&mut self) {
        self.ends.push(self.pieces.0.len());
    }

    /// The sender of a message, of a call that asked for it.
    pub(super) fn sender(&self, i: usize) -> &Address {
        &self.senders[i]
    }

    /// Receives as many messages as there are and as have pieces here. Returns how many, at least one.
    ///
    /// # Safety
    ///
    /// Each piece is memory that stays valid for writing through the call.
    pub(super) unsafe fn receive(
        &mut self,
        socket: &OwnedFd,
        with_senders: bool,
    ) -> io::Result<usize> {
        if with_senders {
            self.senders.clear();
            self.senders.resize(self.ends.len(), Address::none());
        }
        let senders = if with_senders { &mut self.senders[..] } else { &mut [] };
        let messages = Messages { pieces: &mut self.pieces.0, ends: &self.ends, from: 0 };
        // SAFETY: the caller answers for the pieces.
        unsafe { self.calls.receive(socket, messages, senders, &mut self.received) }
    }

    /// Sends the messages from number `from` on, as many as the system takes. Returns how many, at least
    /// one.
    ///
    /// # Safety
    ///
    /// Each piece is memory that stays valid for reading through the call.
    pub(super) unsafe fn send(&mut self, socket: &OwnedFd, from: usize) -> io::Result<usize> {
        let messages = Messages { pieces: &mut self.pieces.0, ends: &self.ends, from };
        // SAFETY: the caller answers for the pieces.
        unsafe { self.calls.send(socket, messages) }
    }
}

/// The pieces of the messages of one call.
struct Messages<'a> {
    pieces: &'a mut [libc::iovec],
    ends: &'a [usize],
    /// The first message of the call.
    from: usize,
}

impl Messages<'_> {
    fn count(&self) -> usize {
        self.ends.len() - self.from
    }

    /// The pieces of message `i` of the call.
    fn pieces(&mut self, i: usize) -> &mut [libc::iovec] {
        let i = self.from + i;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &mut self.pieces[start..self.ends[i]]
    }
}

/// Receives message `i`.
///
/// # Safety
///
/// The conditions are those of [`Batch::receive`].
#[cfg(not(target_os = "linux"))]
unsafe fn receive_one(
    socket: &OwnedFd,
    messages: &mut Messages<'_>,
    i: usize,
    sender: Option<&mut Address>,
) -> io::Result<Received> {
    let mut unused = Address::none();
    let wanted = sender.is_some();
    let sender = sender.unwrap_or(&mut unused);
    let (name, name_len) = sender.space();
    let (name, name_len) = if wanted { (name, name_len) } else { (std::ptr::null_mut(), 0) };
    let mut message = sys::header(name, name_len, messages.pieces(i));
    // SAFETY: the message names an address and pieces, for which the caller answers.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    sender.set_len(message.msg_namelen);
    Ok(Received { len, cut: message.msg_flags & libc::MSG_TRUNC != 0 })
}

/// Receives messages one by one.
///
/// # Safety
///
/// The conditions are those of [`Batch::receive`].
#[cfg(not(target_os = "linux"))]
unsafe fn receive_singly(
    socket: &OwnedFd,
    mut messages: Messages<'_>,
    senders: &mut [Address],
    received: &mut Vec<Received>,
) -> io::Result<usize> {
    for i in 0..messages.count() {
        // SAFETY: the caller answers for the pieces.
        match unsafe { receive_one(socket, &mut messages, i, senders.get_mut(i)) } {
            Ok(one) => received.push(one),
            Err(error) if i == 0 => return Err(error),
            Err(_) => break,
        }
    }
    Ok(received.len())
}

/// Sends messages one by one.
///
/// # Safety
///
/// The conditions are those of [`Batch::send`].
#[cfg(not(target_os = "linux"))]
unsafe fn send_singly(socket: &OwnedFd, mut messages: Messages<'_>) -> io::Result<usize> {
    for i in 0..messages.count() {
        // SAFETY: the caller answers for the pieces.
        match unsafe { sys::send_pieces(socket, messages.pieces(i)) } {
            Ok(_) => {}
            Err(error) if i == 0 => return Err(error),
            Err(_) => return Ok(i),
        }
    }
    Ok(messages.count())
}

#[cfg(target_os = "linux")]
mod imp {
    use crate::device::socket::batch::*;
    use crate::device::socket::sys::FLAGS;

    /// The headers of one call.
    pub(super) struct Calls(Vec<libc::mmsghdr>);

    // SAFETY: the headers have addresses, which the call uses that has written them, and no other.
    unsafe impl Send for Calls {}

    impl Calls {
        pub(super) fn new(_: bool) -> Self {
            Self(Vec::with_capacity(MESSAGES))
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::receive`].
        pub(super) unsafe fn receive(
            &mut self,
            socket: &OwnedFd,
            mut messages: Messages<'_>,
            senders: &mut [Address],
            received: &mut Vec<Received>,
        ) -> io::Result<usize> {
            self.0.clear();
            for i in 0..messages.count() {
                let (name, len) = match senders.get_mut(i) {
                    Some(sender) => sender.space(),
                    None => (std::ptr::null_mut(), 0),
                };
                let msg_hdr = sys::header(name, len, messages.pieces(i));
                self.0.push(libc::mmsghdr { msg_hdr, msg_len: 0 });
            }
            let (fd, count) = (socket.as_raw_fd(), self.0.len() as libc::c_uint);
            let no_limit = std::ptr::null_mut();
            // SAFETY: there are `count` headers. They name addresses that are borrowed, and pieces, for
            // which the caller answers.
            let n = unsafe {
                libc::recvmmsg(fd, self.0.as_mut_ptr(), count, libc::MSG_DONTWAIT as _, no_limit)
            };
            let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
            for (i, message) in self.0[..n].iter().enumerate() {
                let cut = message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
                received.push(Received { len: message.msg_len as usize, cut });
                if let Some(sender) = senders.get_mut(i) {
                    sender.set_len(message.msg_hdr.msg_namelen);
                }
            }
            Ok(n)
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::send`].
        pub(super) unsafe fn send(
            &mut self,
            socket: &OwnedFd,
            mut messages: Messages<'_>,
        ) -> io::Result<usize> {
            self.0.clear();
            for i in 0..messages.count() {
                let msg_hdr = sys::header(std::ptr::null_mut(), 0, messages.pieces(i));
                self.0.push(libc::mmsghdr { msg_hdr, msg_len: 0 });
            }
            let (fd, count) = (socket.as_raw_fd(), self.0.len() as libc::c_uint);
            // musl's function of this name makes one call for each message, for kernels that read the
            // padding of a header. Here it is zero.
            // SAFETY: there are `count` headers. They name pieces, for which the caller answers.
            let n =
                unsafe { libc::syscall(libc::SYS_sendmmsg, fd, self.0.as_mut_ptr(), count, FLAGS) };
            usize::try_from(n).map_err(|_| io::Error::last_os_error())
        }
    }
}

#[cfg(target_os = "macos")]
mod imp {
    use crate::device::socket::apple::ManyAtOnce;
    use crate::device::socket::batch::*;

    /// The calls that move many messages, if they are asked for and safe here.
    pub(super) struct Calls(Option<ManyAtOnce>);

    impl Calls {
        pub(super) fn new(many_at_once: bool) -> Self {
            Self(many_at_once.then(ManyAtOnce::find).flatten())
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::receive`].
        pub(super) unsafe fn receive(
            &mut self,
            socket: &OwnedFd,
            mut messages: Messages<'_>,
            senders: &mut [Address],
            received: &mut Vec<Received>,
        ) -> io::Result<usize> {
            if let Some(calls) = self.0.as_mut().filter(|_| senders.is_empty()) {
                calls.clear();
                for i in 0..messages.count() {
                    calls.push(messages.pieces(i));
                }
                // A call with messages of different numbers of pieces goes wrong in the kernel.
                if calls.is_uniform() {
                    // SAFETY: the caller answers for the pieces.
                    return unsafe {
                        calls.receive(socket, |len, cut| received.push(Received { len, cut }))
                    };
                }
            }
            // SAFETY: the caller answers for the pieces.
            unsafe { receive_singly(socket, messages, senders, received) }
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::send`].
        pub(super) unsafe fn send(
            &mut self,
            socket: &OwnedFd,
            mut messages: Messages<'_>,
        ) -> io::Result<usize> {
            if let Some(calls) = &mut self.0 {
                calls.clear();
                for i in 0..messages.count() {
                    calls.push(messages.pieces(i));
                }
                if calls.is_uniform() {
                    // SAFETY: the caller answers for the pieces.
                    return unsafe { calls.send(socket) };
                }
            }
            // SAFETY: the caller answers for the pieces.
            unsafe { send_singly(socket, messages) }
        }
    }
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
mod imp {
    use crate::device::socket::batch::*;

    pub(super) struct Calls;

    impl Calls {
        pub(super) fn new(_: bool) -> Self {
            Self
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::receive`].
        pub(super) unsafe fn receive(
            &mut self,
            socket: &OwnedFd,
            messages: Messages<'_>,
            senders: &mut [Address],
            received: &mut Vec<Received>,
        ) -> io::Result<usize> {
            // SAFETY: the caller answers for the pieces.
            unsafe { receive_singly(socket, messages, senders, received) }
        }

        /// # Safety
        ///
        /// The conditions are those of [`Batch::send`].
        pub(super) unsafe fn send(
            &mut self,
            socket: &OwnedFd,
            messages: Messages<'_>,
        ) -> io::Result<usize> {
            // SAFETY: the caller answers for the pieces.
            unsafe { send_singly(socket, messages) }
        }
    }
}
