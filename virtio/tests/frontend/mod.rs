//! A front end of vhost-user: it sends what a test says, in the order that a test says, and reads
//! replies. It checks nothing of what it sends.
#![allow(dead_code)] // Several test programs use parts of it.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub(crate) const NEED_REPLY: u32 = 1 << 3;
pub(crate) const VERSION: u32 = 1;
pub(crate) const NO_DESCRIPTOR: u64 = 1 << 8;

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const RESET_OWNER: u32 = 4;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_LOG_BASE: u32 = 6;
pub(crate) const SET_LOG_FD: u32 = 7;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SEND_RARP: u32 = 19;
pub(crate) const NET_SET_MTU: u32 = 20;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;
pub(crate) const SET_STATUS: u32 = 39;
pub(crate) const GET_STATUS: u32 = 40;
pub(crate) const SET_DEVICE_STATE_FD: u32 = 42;
pub(crate) const CHECK_DEVICE_STATE: u32 = 43;

/// A region of the guest's memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region {
    pub(crate) guest_address: u64,
    pub(crate) size: u64,
    pub(crate) user_address: u64,
    pub(crate) mmap_offset: u64,
}

impl Region {
    fn bytes(&self) -> Vec<u8> {
        u64s(&[self.guest_address, self.size, self.user_address, self.mmap_offset])
    }
}

/// A message, with copies of the descriptors that go with it.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Sent {
    pub(crate) fn new(request: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self { request, flags: VERSION, payload: payload.into(), fds: Vec::new() }
    }

    pub(crate) fn number(request: u32, number: u64) -> Self {
        Self::new(request, number.to_ne_bytes())
    }

    /// A ring's index and a number.
    pub(crate) fn state(request: u32, index: u32, num: u32) -> Self {
        Self::new(request, u32s(&[index, num]))
    }

    /// The addresses of a ring: descriptor table, used ring, available ring, log.
    pub(crate) fn addresses(index: u32, flags: u32, addresses: [u64; 4]) -> Self {
        Self::new(SET_VRING_ADDR, [u32s(&[index, flags]), u64s(&addresses)].concat())
    }

    pub(crate) fn table(regions: &[Region]) -> Self {
        let mut payload = u32s(&[regions.len() as u32, 0]);
        regions.iter().for_each(|region| payload.extend(region.bytes()));
        Self::new(SET_MEM_TABLE, payload)
    }

    pub(crate) fn region(request: u32, region: Region) -> Self {
        Self::new(request, [vec![0; 8], region.bytes()].concat())
    }

    /// Bytes of the configuration space.
    pub(crate) fn config(request: u32, offset: u32, flags: u32, bytes: &[u8]) -> Self {
        Self::new(request, [u32s(&[offset, bytes.len() as u32, flags]), bytes.to_vec()].concat())
    }

    /// More bytes at the payload's end.
    pub(crate) fn and(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.payload.extend_from_slice(bytes.as_ref());
        self
    }

    pub(crate) fn with(mut self, fd: impl AsFd) -> Self {
        self.fds.push(fd.as_fd().try_clone_to_owned().expect("a copy of a descriptor"));
        self
    }

    pub(crate) fn need_reply(mut self) -> Self {
        self.flags |= NEED_REPLY;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let header = u32s(&[self.request, self.flags, self.payload.len() as u32]);
        [header, self.payload.clone()].concat()
    }
}

pub(crate) fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

pub(crate) fn u64s(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

/// What a back end has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) payload: Vec<u8>,
}

impl Reply {
    pub(crate) fn number(&self) -> u64 {
        u64::from_ne_bytes(self.payload.as_slice().try_into().expect("eight bytes"))
    }
}

/// One end of the connection.
pub(crate) struct Frontend {
    socket: UnixStream,
}

impl Frontend {
    /// A front end, and the back end's socket.
    pub(crate) fn pair() -> (Self, UnixStream) {
        let (own, other) = UnixStream::pair().expect("a pair of sockets");
        (Self::on(own), other)
    }

    /// A front end on a socket. No read waits longer than a test may.
    pub(crate) fn on(socket: UnixStream) -> Self {
        socket.set_nonblocking(false).expect("a socket's mode");
        socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        socket.set_write_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        Self { socket }
    }

    pub(crate) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    pub(crate) fn send(&self, message: &Sent) {
        let fds: Vec<_> = message.fds.iter().map(AsFd::as_fd).collect();
        self.send_bytes(&message.bytes(), &fds).expect("the message is sent");
    }

    /// Sends bytes, with descriptors at the first of them.
    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        send_with(&self.socket, bytes, fds)
    }

    /// Waits for a reply. Panics if the connection has ended.
    pub(crate) fn reply(&self) -> Reply {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).expect("the header of a reply");
        let field = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("4"));
        let mut payload = vec![0; field(8) as usize];
        (&self.socket).read_exact(&mut payload).expect("the payload of a reply");
        Reply { request: field(0), flags: field(4), payload }
    }

    /// How many bytes of replies are there.
    pub(crate) fn replied(&self) -> usize {
        let mut len: libc::c_int = 0;
        // SAFETY: the pointer is to a number that lives until the call returns.
        let result = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONREAD, &mut len) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        len as usize
    }
}

/// Sends bytes on a socket, with descriptors at the first of them.
pub(crate) fn send_with(
    socket: &UnixStream,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let data = size_of_val(raw.as_slice()) as u32;
    // SAFETY: these compute sizes.
    let (space, len) = unsafe { (libc::CMSG_SPACE(data), libc::CMSG_LEN(data)) };
    // Words, because a control message is aligned.
    let mut control = vec![0u64; (space as usize).div_ceil(8)];
    let mut slices = [IoSlice::new(bytes)];
    // SAFETY: zero is valid for its numbers and pointers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = slices.as_mut_ptr().cast();
    message.msg_iovlen = 1;
    if !raw.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = space as _;
        // SAFETY: `control` has space for one control message with these descriptors.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = len as _;
            std::ptr::copy_nonoverlapping(
                raw.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                data as usize,
            );
        }
    }
    // SAFETY: the message names `bytes` and `control`, which live until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, 0) };
    match usize::try_from(sent) {
        Ok(sent) => {
            assert_eq!(sent, bytes.len(), "the socket takes a short message whole");
            Ok(())
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// A file without a name, as the memory of a guest.
pub(crate) fn memory(len: u64) -> File {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name =
        format!("vmring-memory-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path);
    let file = file.expect("a file in the folder for temporary files");
    std::fs::remove_file(&path).expect("the file's name");
    file.set_len(len).expect("the length of the file");
    file
}

/// A memory file of Linux, sealed if `seals` is not 0.
#[cfg(target_os = "linux")]
pub(crate) fn memfd(len: u64, flags: u32, seals: libc::c_int) -> io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"vmring-test".as_ptr(), flags | libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened this descriptor.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    if seals != 0 {
        // SAFETY: the call takes numbers only.
        let result = unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, seals) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
    Ok(file)
}

/// How many descriptors of this process are the same file, and whether it is mapped. Other tests of
/// the process do not matter. `None` where the system does not tell.
pub(crate) fn copies(of: impl AsFd) -> Option<usize> {
    let file = File::from(of.as_fd().try_clone_to_owned().expect("a copy"));
    let own = file.metadata().expect("a file's metadata");
    let entries = std::fs::read_dir("/proc/self/fd").ok()?;
    let same = |meta: &std::fs::Metadata| (meta.dev(), meta.ino()) == (own.dev(), own.ino());
    let open =
        entries.filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok()).filter(same).count();
    // Inodes of different devices may have the same number.
    #[cfg(target_os = "linux")]
    let (major, minor) = (libc::major(own.dev()), libc::minor(own.dev()));
    #[cfg(not(target_os = "linux"))]
    let (major, minor) = (0, 0);
    let inode = format!(" {major:02x}:{minor:02x} {} ", own.ino());
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // The copy of this function is none that matters.
    Some(open - 1 + maps.lines().filter(|line| line.contains(&inode)).count())
}

/// A folder that goes with the test.
pub(crate) struct Folder(std::path::PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        use std::sync::atomic::{AtomicU64, Ordering};
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("vmring-folder-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("a folder");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
