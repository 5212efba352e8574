//! The names of the devices, as `--device` takes them.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::{io, sync::Mutex};

use vmring::{Driver, Embedded, Error, Loopback, Socket, Vmnet};

use crate::dhcp::DhcpArgs;

/// A device of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceName {
    Embedded,
    Loopback,
    /// Apple's vmnet, or on other systems the simulated one.
    Vmnet,
    /// A socket pair of this type.
    Stream,
    Datagram,
    #[cfg(target_os = "linux")]
    Seqpacket,
    #[cfg(target_os = "linux")]
    Tap,
}

/// The name of the vmnet device: Apple's vmnet, or on other systems the simulated one.
pub(crate) const VMNET: &str = if cfg!(target_os = "macos") { "vmnet" } else { "vmnet-sim" };

/// Packets that may wait in the network for a guest that has posted no frame. A TCP window has
/// fewer packets, so none is dropped.
pub(crate) const QUEUE: u32 = 2048;

impl DeviceName {
    /// The device with this name, or one sentence that says what to use instead: one of `usable`.
    pub(crate) fn of(name: &str, usable: &[&str]) -> Result<Self, String> {
        match name {
            "embedded" => Ok(DeviceName::Embedded),
            "loopback" => Ok(DeviceName::Loopback),
            VMNET => Ok(DeviceName::Vmnet),
            "stream" => Ok(DeviceName::Stream),
            "datagram" => Ok(DeviceName::Datagram),
            #[cfg(target_os = "linux")]
            "seqpacket" => Ok(DeviceName::Seqpacket),
            #[cfg(target_os = "linux")]
            "tap" => Ok(DeviceName::Tap),
            _ => Err(unknown_device(name, usable)),
        }
    }

    /// Whether the other end is the kernel's.
    pub(crate) fn is_tap(self) -> bool {
        #[cfg(target_os = "linux")]
        if self == DeviceName::Tap {
            return true;
        }
        false
    }

    /// Whether a network of this device has a DHCP server of ours.
    pub(crate) fn has_dhcp(self) -> bool {
        self == DeviceName::Embedded || self.is_tap()
    }

    /// A driver for one end of the network with this name, with its own settings, and these of its
    /// DHCP server if it is the embedded network.
    ///
    /// The two ends of a socket pair have the same network's name.
    ///
    /// # Errors
    ///
    /// If the system makes no socket pair.
    pub(crate) fn driver(self, network: &str, dhcp: &DhcpArgs) -> Result<Box<dyn Driver>, Error> {
        Ok(match self {
            DeviceName::Embedded => Box::new(embedded(network, dhcp)),
            DeviceName::Loopback => Box::new(Loopback::new(1500)),
            // As on a Mac, there is one network for each mode.
            DeviceName::Vmnet => Box::new(Vmnet::new()),
            DeviceName::Stream => Box::new(Socket::stream().from_fd(self.socket(network)?)),
            DeviceName::Datagram => Box::new(Socket::datagram().from_fd(self.socket(network)?)),
            #[cfg(target_os = "linux")]
            DeviceName::Seqpacket => Box::new(Socket::seqpacket().from_fd(self.socket(network)?)),
            #[cfg(target_os = "linux")]
            DeviceName::Tap => Box::new(vmring::Tap::new()),
        })
    }

    /// One end of the socket pair of this name: the first call makes the pair, and the second takes the
    /// other end.
    fn socket(self, network: &str) -> Result<OwnedFd, Error> {
        static OTHERS: Mutex<Vec<(String, OwnedFd)>> = Mutex::new(Vec::new());
        let mut others = OTHERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(i) = others.iter().position(|(name, _)| name == network) {
            return Ok(others.swap_remove(i).1);
        }
        let failed = |source| Error::Io { what: "making a socket pair", source };
        let (one, other) = self.socket_pair().map_err(failed)?;
        others.push((network.to_owned(), other));
        Ok(one)
    }

    fn socket_pair(self) -> io::Result<(OwnedFd, OwnedFd)> {
        match self {
            DeviceName::Datagram => {
                UnixDatagram::pair().map(|(one, other)| (one.into(), other.into()))
            }
            #[cfg(target_os = "linux")]
            DeviceName::Seqpacket => seqpacket_pair(),
            _ => UnixStream::pair().map(|(one, other)| (one.into(), other.into())),
        }
    }
}

/// A driver for one end of an embedded network.
pub(crate) fn embedded(network: &str, dhcp: &DhcpArgs) -> Embedded {
    dhcp.embedded(Embedded::network(network).overflow(QUEUE))
}

#[cfg(target_os = "linux")]
fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use std::os::fd::FromRawFd;

    let mut fds = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two numbers.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the system has just opened them, and nobody else knows their numbers.
    let [one, other] = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((one, other))
}

/// The sentence for a device that does not exist here. `usable` lists those that do.
fn unknown_device(name: &str, usable: &[&str]) -> String {
    let what = match name {
        "vmnet" => "the vmnet device exists on macOS only".to_owned(),
        "tap" => "the tap device exists on Linux only".to_owned(),
        _ => format!("there is no device named '{name}'"),
    };
    let usable = match usable {
        [others @ .., last] => format!("{} or {last}", others.join(", ")),
        [] => String::new(),
    };
    format!("{what}; use {usable} ('vmring info' lists devices)")
}
