//! `/dev/net/tun`: opening queues of a TAP, and what is asked of an open one. Sources: the kernel's
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

/// One queue of a TAP: a non-blocking descriptor on which each read and each write is one frame.
#[derive(Debug)]
pub(crate) struct TapQueueFd(OwnedFd);

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

/// How a TAP is to be opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    /// `IFF_MULTI_QUEUE`.
    pub(crate) multi: bool,
    /// `IFF_VNET_HDR`: an offload header in front of each frame.
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

/// What an open TAP says of itself.
#[derive(Clone, Debug)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) header: bool,
    pub(crate) multi: bool,
}

/// Whether an interface can have that name. A `%` would be a wish for a number, not a name.
pub(crate) fn check_name(name: &str) -> Result<(), TapError> {
    let odd = |byte: u8| byte.is_ascii_whitespace() || byte == b'%';
    if is_interface_name(name) && !name.bytes().any(odd) {
        Ok(())
    } else {
        Err(TapError::Name(name.to_owned()))
    }
}

/// Opens a queue of the TAP `name`, which is made if there is none. `name` may hold `%d`, for which
/// the kernel puts a number; the answer has the name.
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
        // Either it is no TAP, or it is one of the other kind. One way to find out is to try.
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

fn set_interface(file: &File, name: &str, flags: Flags) -> io::Result<String> {
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = flags.bits() as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`.
    unsafe { ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) }?;
    Ok(name_of(&request))
}

fn request(name: &str) -> ifreq {
    // SAFETY: all zeroes are an `ifreq`: an empty name and a number of zero.
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

/// # Safety
///
/// `argument` is what `request` reads and writes.
unsafe fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
    // SAFETY: as the caller says.
    match unsafe { libc::ioctl(fd, request, argument) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl TapQueueFd {
    /// Takes over a descriptor that somebody else has opened.
    pub(crate) fn adopt(fd: OwnedFd) -> Result<Self, Error> {
        // SAFETY: F_GETFL takes no argument and `fd` is open.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        // SAFETY: F_SETFL takes a number.
        let set = flags >= 0
            && unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } == 0;
        if set {
            Ok(Self(fd))
        } else {
            Err(Error::io("making the TAP's descriptor non-blocking")(io::Error::last_os_error()))
        }
    }

    /// Another descriptor of the same queue.
    pub(crate) fn another(&self) -> Result<Self, Error> {
        self.0.try_clone().map(Self).map_err(Error::io("duplicating the TAP's descriptor"))
    }

    /// What it is attached to.
    pub(crate) fn describe(&self) -> Result<Described, Error> {
        let mut request = request("");
        // SAFETY: TUNGETIFF writes an `ifreq`.
        let asked = unsafe { ioctl(self.as_raw_fd(), libc::TUNGETIFF, &mut request) };
        if let Err(error) = asked {
            return Err(match error.raw_os_error() {
                Some(libc::EBADFD) => TapError::Descriptor(
                    "it is /dev/net/tun and not attached to an interface (TUNSETIFF)",
                ),
                _ => TapError::Descriptor("it does not answer to TUNGETIFF"),
            }
            .into());
        }
        // SAFETY: TUNGETIFF sets the flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(TapError::Descriptor("it is a TUN, which has no Ethernet").into());
        }
        // Whether it was opened with IFF_NO_PI is not to be seen: TUNGETIFF has another flag with the
        // same value (IFF_NOFILTER).
        Ok(Described {
            name: name_of(&request),
            header: flags & libc::IFF_VNET_HDR != 0,
            multi: flags & libc::IFF_MULTI_QUEUE != 0,
        })
    }

    /// The MAC address of the host's end.
    pub(crate) fn host_mac(&self) -> Result<MacAddr6, Error> {
        let mut request = request("");
        // SAFETY: SIOCGIFHWADDR writes an `ifreq`.
        unsafe { ioctl(self.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request) }
            .map_err(Error::io("asking the TAP for its MAC address"))?;
        // SAFETY: SIOCGIFHWADDR sets the address.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        let bytes: [u8; 6] = std::array::from_fn(|i| address.sa_data[i] as u8);
        Ok(bytes.into())
    }

    /// Sets the offload header's length and byte order to those of virtio 1.x.
    pub(crate) fn set_header(&self) -> Result<(), Error> {
        let mut len = offload::LEN as c_int;
        // SAFETY: TUNSETVNETHDRSZ reads a number.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETVNETHDRSZ, &mut len) }
            .map_err(Error::io("setting the TAP's offload header to 12 bytes"))?;
        let mut little = 1;
        // SAFETY: TUNSETVNETLE reads a number.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETVNETLE, &mut little) }
            .map_err(Error::io("setting the TAP's offload header to little-endian"))
    }

    /// Asks for offloads; answers with what the kernel grants, which may be less.
    pub(crate) fn set_offloads(&self, wanted: Offloads) -> Result<Offloads, Error> {
        let mut asked = wanted;
        // All segmentation rests on checksums.
        asked.checksum |= asked.tso4 || asked.tso6 || asked.uso;
        loop {
            let bits = c_ulong::from(offload_bits(asked));
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            if unsafe { libc::ioctl(self.as_raw_fd(), libc::TUNSETOFFLOAD, bits) } >= 0 {
                return Ok(Offloads { virtio_header: true, ..asked });
            }
            let error = io::Error::last_os_error();
            // A kernel that does not know a bit refuses all: USO came with 6.2.
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

    /// Whether somebody has set how many bytes written may be under way (TUNSETSNDBUF); if nobody has,
    /// the kernel takes any number.
    pub(crate) fn refuses_writes(&self) -> bool {
        let mut room: c_int = c_int::MAX;
        // SAFETY: TUNGETSNDBUF writes a number.
        let asked = unsafe { ioctl(self.as_raw_fd(), libc::TUNGETSNDBUF, &mut room) };
        asked.is_err() || room != c_int::MAX
    }

    /// Of a TAP with several queues: whether the kernel puts frames into this one.
    pub(crate) fn attach(&self, yes: bool) -> io::Result<()> {
        let mut request = request("");
        let bits = if yes { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = bits as libc::c_short;
        // SAFETY: TUNSETQUEUE reads an `ifreq`.
        unsafe { ioctl(self.as_raw_fd(), libc::TUNSETQUEUE, &mut request) }
    }
}

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
