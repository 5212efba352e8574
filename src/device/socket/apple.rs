//! `recvmsg_x` and `sendmsg_x`, which move many messages in one call. They are private: no header of the
//! SDK declares them, and the App Store may refuse a program that uses them. So they are used only if
//! they are asked for, and found by name.
//!
//! Sources: xnu's `bsd/sys/socket_private.h` and `bsd/kern/uipc_syscalls.c`.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use static_assertions::const_assert_eq;

#[cfg(target_os = "macos")]
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
    #[cfg(target_os = "macos")]
    pub(super) fn find() -> Option<Self> {
        if !is_safe(&version()) {
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

/// Whether this version of macOS, such as `15.6.1`, receives many messages without a lock that stays.
fn is_safe(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    let mut next = || parts.next().flatten().unwrap_or(0);
    (next(), next()) >= (15, 6)
}

/// The version of macOS, or nothing.
#[cfg(target_os = "macos")]
fn version() -> String {
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
    String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()
}

/// The calls as xnu has them, made of `recvmsg` and `sendmsg`. They stop at the first message that fails,
/// and say only then how many there were; they cut a message in silence.
#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// The header for the public calls. Each check is one that older kernels make
    /// (`internalize_recv_msghdr_array`), or one of what this program promises.
    fn checked(message: &Message, flags: libc::c_int) -> libc::msghdr {
        assert!(message.name.is_null() && message.control.is_null());
        assert_eq!((message.name_len, message.control_len, message.flags), (0, 0, 0));
        assert!((1..=1024).contains(&message.piece_count));
        assert_eq!(flags, libc::MSG_DONTWAIT, "no other flag, such as MSG_PEEK, is allowed");
        // SAFETY: all zeroes are a valid header.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = message.pieces;
        header.msg_iovlen = message.piece_count as _;
        header
    }

    fn count(done: usize, all: libc::c_uint) -> libc::ssize_t {
        if done == 0 && all > 0 { -1 } else { done as libc::ssize_t }
    }

    unsafe extern "C" fn receive(
        fd: libc::c_int,
        messages: *mut Message,
        all: libc::c_uint,
        flags: libc::c_int,
    ) -> libc::ssize_t {
        // SAFETY: the caller has as many messages there.
        let messages = unsafe { std::slice::from_raw_parts_mut(messages, all as usize) };
        let mut done = 0;
        for message in messages {
            let mut header = checked(message, flags);
            // SAFETY: the caller answers for the pieces.
            let len = unsafe { libc::recvmsg(fd, &mut header, flags) };
            let Ok(len) = usize::try_from(len) else { break };
            message.len = len;
            done += 1;
        }
        count(done, all)
    }

    unsafe extern "C" fn send(
        fd: libc::c_int,
        messages: *const Message,
        all: libc::c_uint,
        flags: libc::c_int,
    ) -> libc::ssize_t {
        // SAFETY: the caller has as many messages there.
        let messages = unsafe { std::slice::from_raw_parts(messages, all as usize) };
        let mut done = 0;
        for message in messages {
            let header = checked(message, flags);
            // SAFETY: the caller answers for the pieces.
            if unsafe { libc::sendmsg(fd, &header, flags) } < 0 {
                break;
            }
            done += 1;
        }
        count(done, all)
    }

    fn calls() -> ManyAtOnce {
        ManyAtOnce { receive, send, messages: Vec::new() }
    }

    fn piece(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        let (a, b) = UnixDatagram::pair().expect("a pair");
        (a.into(), b.into())
    }

    /// Goal: the calls are used only where they cannot hang the kernel.
    #[test]
    fn versions_before_15_6_are_left_alone() {
        for safe in ["15.6", "15.6.1", "15.10", "16", "26.0", "26.1.2"] {
            assert!(is_safe(safe), "{safe}");
        }
        for other in ["15.5", "15.5.9", "15", "14.7.8", "11.0", "", "15.x", "x.9"] {
            assert!(!is_safe(other), "{other}");
        }
    }

    /// Goal: messages with different numbers of pieces are known, for they must not go into one call.
    #[test]
    fn messages_of_one_call_have_equal_numbers_of_pieces() {
        for (counts, uniform) in [
            (&[][..], true),
            (&[2], true),
            (&[1, 1, 1], true),
            (&[1, 2], false),
            (&[2, 2, 1], false),
        ] {
            let (mut calls, mut bytes) = (calls(), [0; 4]);
            let mut pieces = [piece(&mut bytes), piece(&mut bytes)];
            counts.iter().for_each(|count| calls.push(&mut pieces[..*count]));
            assert_eq!(calls.is_uniform(), uniform, "{counts:?}");
            calls.clear();
            assert!(calls.is_uniform());
        }
    }

    /// Goal: a message that the kernel has cut in silence counts as cut: it fills its space, which is one
    /// byte longer than the longest message that fits.
    #[test]
    fn a_message_that_fills_its_space_counts_as_cut() {
        const LONGEST: usize = 20;
        let (near, far) = pair();
        let mut out = calls();
        let mut sent =
            [[1; 10].to_vec(), [2; LONGEST].to_vec(), [3; 21].to_vec(), [4; 40].to_vec()];
        let mut pieces: Vec<_> = sent.iter_mut().map(|bytes| [piece(bytes)]).collect();
        pieces.iter_mut().for_each(|pieces| out.push(pieces));
        // SAFETY: the bytes live through the call.
        assert_eq!(unsafe { out.send(&near) }.expect("it has space"), 4);

        let (mut calls, mut found) = (calls(), Vec::new());
        let mut space = [[0; LONGEST + 1]; 5];
        // Each has two pieces, whose space counts together.
        let mut pieces: Vec<_> = space
            .iter_mut()
            .map(|space| {
                let (first, rest) = space.split_at_mut(7);
                [piece(first), piece(rest)]
            })
            .collect();
        pieces.iter_mut().for_each(|pieces| calls.push(pieces));
        // SAFETY: the space lives through the call, and nothing else uses it meanwhile.
        let n = unsafe { calls.receive(&far, |len, cut| found.push((len, cut))) };
        assert_eq!(n.expect("messages"), 4, "the fifth is not there, and that is no error");
        assert_eq!(found, [(10, false), (LONGEST, false), (21, true), (21, true)]);
        assert_eq!([0, 1, 2, 3].map(|i| space[i][0]), [1, 2, 3, 4]);
        assert_eq!(space[0][10], 0);
    }

    /// Goal: a call that moved nothing is an error that can be waited for, and the kernel's own error is
    /// passed on.
    #[test]
    fn nothing_moved_is_an_error() {
        unsafe extern "C" fn none(
            _: libc::c_int,
            _: *mut Message,
            _: libc::c_uint,
            _: libc::c_int,
        ) -> libc::ssize_t {
            0
        }
        unsafe extern "C" fn none_sent(
            _: libc::c_int,
            _: *const Message,
            _: libc::c_uint,
            _: libc::c_int,
        ) -> libc::ssize_t {
            0
        }
        let (near, far) = pair();
        let mut bytes = [0; 8];
        let mut pieces = [piece(&mut bytes)];
        let mut silent = ManyAtOnce { receive: none, send: none_sent, messages: Vec::new() };
        let mut real = calls();
        silent.push(&mut pieces);
        real.push(&mut pieces);
        // SAFETY: the bytes live through the calls.
        let errors = unsafe {
            let received = |calls: &mut ManyAtOnce| {
                calls.receive(&far, |_, _| panic!("nothing came")).expect_err("nothing came")
            };
            let errors = [received(&mut silent), received(&mut real)];
            let refused = silent.send(&near).expect_err("nothing went");
            assert_eq!(refused.raw_os_error(), Some(libc::ENOBUFS));
            errors
        };
        assert!(errors.iter().all(|error| error.kind() == io::ErrorKind::WouldBlock), "{errors:?}");
        drop(far);
        // SAFETY: as above.
        let gone = unsafe { real.send(&near) }.expect_err("nobody is there");
        assert_ne!(gone.kind(), io::ErrorKind::WouldBlock, "{gone}");
    }
}
