//! `/dev/net/tun`: opens queues of a TAP, and queries and sets up open ones. Sources: the kernel's
//! `Documentation/networking/tuntap.rst` and `drivers/net/tun.c`.

use std::ffi::{c_int, c_uint};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use libc::{IFNAMSIZ, c_ulong, ifreq};
use macaddr::MacAddr6;
use vmring_core::offload;

use super::link::is_interface_name;
use crate::config::Offloads;
use crate::error::{Error, TapError};

/// One queue of a TAP: a non-blocking descriptor on which each read and each write moves one frame.
#[derive(Debug)]
pub(crate) struct TapQueueFd(OwnedFd);

#[cfg(test)]
impl TapQueueFd {
    /// Any non-blocking descriptor in the place of a TAP's.
    pub(super) fn over(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsRawFd for TapQueueFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl std::os::fd::AsFd for TapQueueFd {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The flags with which a TAP is opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    /// The TAP has several queues (`IFF_MULTI_QUEUE`).
    pub(crate) multi: bool,
    /// Each frame has an offload header in front (`IFF_VNET_HDR`).
    pub(crate) header: bool,
}

impl Flags {
    fn bits(self) -> c_int {
        let mut bits = libc::IFF_TAP | libc::IFF_NO_PI;
        if self.multi {
            bits |= libc::IFF_MULTI_QUEUE;
        }
        if self.header {
            bits |= libc::IFF_VNET_HDR;
        }
        bits
    }
}

/// What `TUNGETIFF` reports about an open TAP. The flags are those of [`Flags`].
#[derive(Clone, Debug)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) header: bool,
    pub(crate) multi: bool,
}

/// Checks that an interface can have that name. A `%` is not allowed, because the kernel would put
/// a number in its place.
pub(crate) fn check_name(name: &str) -> Result<(), TapError> {
    let odd = |byte: u8| byte.is_ascii_whitespace() || byte == b'%';
    if is_interface_name(name) && !name.bytes().any(odd) {
        Ok(())
    } else {
        Err(TapError::Name(name.to_owned()))
    }
}

/// Opens a queue of the TAP `name`, and creates the TAP if there is none. `name` may contain `%d`,
/// for which the kernel puts a number. Returns the queue and the TAP's name.
pub(crate) fn open(name: &str, flags: Flags) -> Result<(TapQueueFd, String), Error> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun.into(),
            Some(libc::EACCES | libc::EPERM) => Error::PermissionDenied {
                needs:
                    "read and write access to /dev/net/tun: run as root, or let root open it to \
                        this user (most systems have it open to all: chmod 0666 /dev/net/tun)"
                        .to_owned(),
            },
            _ => Error::Io { what: "opening /dev/net/tun", source },
        })?;
    match set_interface(&file, name, flags) {
        Ok(name) => Ok((TapQueueFd(file.into()), name)),
        Err(source) => Err(refusal(name, flags, source)),
    }
}

/// Returns the error for a `TUNSETIFF` that failed.
fn refusal(name: &str, flags: Flags, source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::PermissionDenied {
            needs: format!(
                "CAP_NET_ADMIN to open the TAP '{name}': run as root, or let root prepare it for \
                 this user (ip tuntap add {name} mode tap user NAME), or take a descriptor from \
                 a privileged parent (Tap::from_fd)"
            ),
        },
        Some(libc::EBUSY) => TapError::Taken(name.to_owned()).into(),
        Some(libc::E2BIG | libc::ENFILE) => TapError::TooManyQueues(name.to_owned()).into(),
        // Either the interface is not a TAP, or it has several queues and one was requested, or the
        // other way round. A second attempt with the other flag tells.
        Some(libc::EINVAL) => {
            let other = Flags { multi: !flags.multi, ..flags };
            let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
            match file.and_then(|file| set_interface(&file, name, other)) {
                Ok(name) => TapError::QueueMismatch { name, multi: other.multi }.into(),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    TapError::QueueMismatch { name: name.to_owned(), multi: other.multi }.into()
                }
                Err(_) => TapError::NotATap(name.to_owned()).into(),
            }
        }
        _ => Error::Io { what: "opening the TAP", source },
    }
}

/// Whether this process has the TAP open (`tun_chr_show_fdinfo`). False if the kernel does not tell.
pub(crate) fn is_open_here(name: &str) -> bool {
    let line = format!("iff:\t{name}");
    let Ok(all) = std::fs::read_dir("/proc/self/fdinfo") else { return false };
    all.flatten().any(|entry| {
        std::fs::read_to_string(entry.path())
            .is_ok_and(|text| text.lines().any(|other| other == line))
    })
}

/// Attaches the open `/dev/net/tun` to the TAP `name`. Returns the TAP's name.
fn set_interface(file: &File, name: &str, flags: Flags) -> io::Result<String> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags.bits() as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is.
    unsafe { ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) }?;
    Ok(name_of(&request))
}

/// Returns an `ifreq` with this name, cut off at `IFNAMSIZ - 1` bytes, and zeroes.
fn request(name: &str) -> ifreq {
    // SAFETY: an `ifreq` consists of integers and of a union of integers and pointers, so all
    // zeroes are a valid value: an empty name and the number 0.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

fn name_of(request: &ifreq) -> String {
    let bytes: Vec<u8> =
        request.ifr_name.iter().map(|c| *c as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Calls ioctl(2) with a pointer.
///
/// # Safety
///
/// `argument` must point to a value of the type that `request` reads or writes.
unsafe fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
    // SAFETY: the caller guarantees that `argument` points to what `request` reads or writes. An
    // invalid `fd` only makes the call fail.
    match unsafe { libc::ioctl(fd, request, argument) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl TapQueueFd {
    /// Takes over a descriptor that another process has opened, and makes it non-blocking.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        // SAFETY: F_GETFL takes no argument, and `fd` keeps the descriptor open.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: F_SETFL takes a number and no pointer, and `fd` keeps the descriptor open.
        let set = flags >= 0
            && unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } == 0;
        if set {
            Ok(Self(fd))
        } else {
            Err(Error::io("making the TAP's descriptor non-blocking")(io::Error::last_os_error()))
        }
    }

    /// Duplicates the descriptor. The new one belongs to the same queue.
    pub(crate) fn another(&self) -> Result<Self, Error> {
        self.0.try_clone().map(Self).map_err(Error::io("duplicating the TAP's descriptor"))
    }

    /// Returns the name and the flags of the TAP to which the descriptor is attached.
    pub(crate) fn describe(&self) -> Result<Described, Error> {
        let mut request = request("");
        // SAFETY: TUNGETIFF writes an `ifreq`, which `request` is.
        let asked = unsafe { ioctl(self.as_raw_fd(), libc::TUNGETIFF, &mut request) };
        if let Err(error) = asked {
            return Err(match error.raw_os_error() {
                Some(libc::EBADFD) => TapError::Descriptor(
                    "it is /dev/net/tun, but not attached to an interface (TUNSETIFF)",
                ),
                _ => TapError::Descriptor("it does not answer TUNGETIFF"),
            }
            .into());
        }
        // SAFETY: TUNGETIFF has succeeded, and it sets this field of the union, the flags. Any
        // bytes are valid flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::Descriptor("it is a TUN, which has no Ethernet").into());
        }
        // It cannot be found out whether the TAP was opened with IFF_NO_PI: in the answer of
        // TUNGETIFF another flag has the same value (IFF_NOFILTER).
        Ok(Described {
            name: name_of(&request),
            header: flags & libc::IFF_VNET_HDR != 0,
            multi: flags & libc::IFF_MULTI_QUEUE != 0,
        })
    }

    /// Returns the MAC address of the host's end.
    pub(crate) fn host_mac(&self) -> Result<MacAddr6, Error> {
        let mut request = request("");
        // SAFETY: SIOCGIFHWADDR writes an `ifreq`, which `request` is.
        unsafe { ioctl(self.as_raw_fd(), libc::SIOCGIFHWADDR as libc::Ioctl, &mut request) }
            .map_err(Error::io("asking the TAP for its MAC address"))?;
        // SAFETY: SIOCGIFHWADDR has succeeded, and it sets this field of the union, the address.
        // Any bytes are a valid address.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let bytes: [u8; 6] = std::array::from_fn(|i| address.sa_data[i] as u8);
        Ok(bytes.into())
    }

    /// Sets the offload header's length and byte order to those of virtio 1.x.
    pub(crate) fn set_header(&self) -> Result<(), Error> {
        let mut len = offload::LEN as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads a C `int`, which `len` is.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETVNETHDRSZ, &mut len) }
            .map_err(Error::io("setting the TAP's offload header to 12 bytes"))?;
        let mut little = 1;
        // SAFETY: TUNSETVNETLE reads a C `int`, which `little` is.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETVNETLE, &mut little) }
            .map_err(Error::io("setting the TAP's offload header to little-endian"))
    }

    /// Requests offloads. Returns those that the kernel grants, which may be fewer.
    pub(crate) fn set_offloads(&self, wanted: Offloads) -> Result<Offloads, Error> {
        let mut asked = wanted;
        // Every segmentation offload requires checksum offload.
        asked.checksum |= asked.tso4 || asked.tso6 || asked.uso;
        loop {
            let bits = c_ulong::from(offload_bits(asked));
            // SAFETY: TUNSETOFFLOAD takes its argument by value, so no memory is involved.
            if unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, bits) } >= 0 {
                let mut taken = asked;
                taken.virtio_header = true;
                return Ok(taken);
            }
            let error = io::Error::last_os_error();
            // A kernel that does not know one of the bits refuses the whole request. USO exists
            // since Linux 6.2.
            match error.raw_os_error() {
                Some(libc::EINVAL) if asked.uso => asked.uso = false,
                Some(libc::EINVAL) if asked.tso4 || asked.tso6 => {
                    (asked.tso4, asked.tso6) = (false, false);
                }
                Some(libc::EINVAL) if asked.checksum => asked.checksum = false,
                _ => return Err(Error::io("setting the TAP's offloads")(error)),
            }
        }
    }

    /// Whether the kernel may refuse a write for the moment. It does so only if somebody has
    /// limited the bytes of written frames that may be in flight (`TUNSETSNDBUF`). True if the
    /// limit cannot be read.
    pub(crate) fn refuses_writes(&self) -> bool {
        let mut room: c_int = c_int::MAX;
        // SAFETY: TUNGETSNDBUF writes a C `int`, which `room` is.
        let asked = unsafe { ioctl(self.as_raw_fd(), libc::TUNGETSNDBUF, &mut room) };
        asked.is_err() || room != c_int::MAX
    }

    /// Attaches this queue of a TAP with several queues, so that the kernel puts frames into it, or
    /// detaches it.
    pub(crate) fn attach(&self, yes: bool) -> io::Result<()> {
        let mut request = request("");
        let bits = if yes { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = bits as libc::c_short;
        // SAFETY: TUNSETQUEUE reads an `ifreq`, which `request` is.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &mut request) }
    }
}

/// Returns the argument of `TUNSETOFFLOAD`.
fn offload_bits(offloads: Offloads) -> c_uint {
    let mut bits = 0;
    for (asked, bit) in [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ] {
        if asked {
            bits |= bit;
        }
    }
    bits
}
