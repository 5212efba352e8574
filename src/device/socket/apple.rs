//! `recvmsg_x` and `sendmsg_x`, which move many messages in one call. They are private: no header of the
//! SDK declares them, and the App Store may refuse a program that uses them. So they are used only if
//! they are asked for, and found by name.
//!
//! Sources: xnu's `bsd/sys/socket_private.h` and `bsd/kern/uipc_syscalls.c`.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use static_assertions::const_assert_eq;

use super::limits::MESSAGES;

/// `struct msghdr_x`. Older kernels demand that name, control and flags are zero, so they always are.
#[repr(C)]
struct Message {
    name: *mut c_void,
    name_len: libc::socklen_t,
    pieces: *mut libc::iovec,
    piece_count: libc::c_int,
    control: *mut c_void,
    control_len: libc::socklen_t,
    flags: libc::c_int,
    /// How many bytes were received. A call that sends ignores it.
    len: libc::size_t,
}

const_assert_eq!(size_of::<Message>(), 56);

type ReceiveFn =
    unsafe extern "C" fn(libc::c_int, *mut Message, libc::c_uint, libc::c_int) -> libc::ssize_t;
type SendFn =
    unsafe extern "C" fn(libc::c_int, *const Message, libc::c_uint, libc::c_int) -> libc::ssize_t;

/// The two calls, and the headers of the next one.
///
/// One queue reads from a socket, and so one thread at a time. (Before macOS 15.6, receives of many
/// messages on one socket at the same time can hang the kernel.)
pub(super) struct ManyAtOnce {
    receive: ReceiveFn,
    send: SendFn,
    messages: Vec<Message>,
}

// SAFETY: the headers have addresses, which the call uses that has written them, and no other.
unsafe impl Send for ManyAtOnce {}

impl ManyAtOnce {
    /// Finds the calls. `None` if there are none, or if this is macOS before 15.6, whose
    /// `soreceive_m_list` can leave a socket locked (mended in xnu-11417.140.69).
    pub(super) fn find() -> Option<Self> {
        if version() < (15, 6) {
            return None;
        }
        // SAFETY: the names are C strings, and RTLD_DEFAULT is a valid handle.
        let (receive, send) = unsafe {
            (
                libc::dlsym(libc::RTLD_DEFAULT, c"recvmsg_x".as_ptr()),
                libc::dlsym(libc::RTLD_DEFAULT, c"sendmsg_x".as_ptr()),
            )
        };
        if receive.is_null() || send.is_null() {
            return None;
        }
        // SAFETY: the symbols are the system's functions of these types; see the sources above.
        let (receive, send) = unsafe {
            (
                std::mem::transmute::<*mut c_void, ReceiveFn>(receive),
                std::mem::transmute::<*mut c_void, SendFn>(send),
            )
        };
        Some(Self { receive, send, messages: Vec::with_capacity(MESSAGES) })
    }

    pub(super) fn clear(&mut self) {
        self.messages.clear();
    }

    pub(super) fn push(&mut self, pieces: &mut [libc::iovec]) {
        self.messages.push(Message {
            name: std::ptr::null_mut(),
            name_len: 0,
            pieces: pieces.as_mut_ptr(),
            piece_count: pieces.len() as libc::c_int,
            control: std::ptr::null_mut(),
            control_len: 0,
            flags: 0,
            len: 0,
        });
    }

    /// Whether all messages have the same number of pieces. If they have not, the kernel may use an array
    /// for a message that was made for one with fewer pieces.
    pub(super) fn is_uniform(&self) -> bool {
        self.messages.windows(2).all(|two| two[0].piece_count == two[1].piece_count)
    }

    /// Receives messages, and tells the length of each and whether it may be cut. The kernel never says
    /// that it has cut a message, so one that fills its space counts as cut.
    ///
    /// # Safety
    ///
    /// The pieces of the messages are there, and each is memory that stays valid for writing through the
    /// call.
    pub(super) unsafe fn receive(
        &mut self,
        socket: &OwnedFd,
        mut found: impl FnMut(usize, bool),
    ) -> io::Result<usize> {
        let (fd, count) = (socket.as_raw_fd(), self.messages.len() as libc::c_uint);
        let spaces = |message: &Message| {
            // SAFETY: the caller keeps the pieces. Only their lengths are read.
            let pieces =
                unsafe { std::slice::from_raw_parts(message.pieces, message.piece_count as usize) };
            pieces.iter().map(|piece| piece.iov_len).sum::<usize>()
        };
        // SAFETY: there are `count` headers, and the caller answers for the pieces.
        let n =
            unsafe { (self.receive)(fd, self.messages.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        for message in &self.messages[..n] {
            found(message.len, message.len >= spaces(message));
        }
        if n == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(n) }
    }

    /// Sends messages. After some were sent the call returns their number, whatever became of the next.
    ///
    /// # Safety
    ///
    /// The pieces of the messages are there, and each is memory that stays valid for reading through the
    /// call.
    pub(super) unsafe fn send(&mut self, socket: &OwnedFd) -> io::Result<usize> {
        let (fd, count) = (socket.as_raw_fd(), self.messages.len() as libc::c_uint);
        // SAFETY: there are `count` headers, and the caller answers for the pieces.
        let n = unsafe { (self.send)(fd, self.messages.as_ptr(), count, libc::MSG_DONTWAIT) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        if n == 0 { Err(io::Error::from_raw_os_error(libc::ENOBUFS)) } else { Ok(n) }
    }
}

/// The version of macOS: major and minor.
fn version() -> (u32, u32) {
    let mut text = [0_u8; 32];
    let mut len = text.len();
    // SAFETY: the name is a C string; `len` is the number of bytes at `text`, and the call writes at most
    // as many. The new value is null with length 0, so nothing is set.
    let failed = unsafe {
        libc::sysctlbyname(
            c"kern.osproductversion".as_ptr(),
            text.as_mut_ptr().cast(),
            &mut len,
            std::ptr::null_mut(),
            0,
        )
    };
    let text = if failed == 0 { &text[..len.min(text.len())] } else { b"" };
    let text = String::from_utf8_lossy(text);
    let mut parts = text.trim_end_matches('\0').split('.').map(|part| part.parse().ok());
    let mut next = || parts.next().flatten().unwrap_or(0);
    (next(), next())
}
