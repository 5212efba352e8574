//! The TAP device: network namespaces, a bridge between two TAPs, and the packets that the kernel
//! has dropped.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::thread;

use vmring::{Error, Interface};

use crate::failure::Failure;

/// Runs `f` on a thread in a network namespace of its own. Threads that it starts are in the
/// namespace too. The namespace ends with the last of them.
pub(crate) fn in_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, Failure> {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter()?;
            Ok(f())
        });
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

fn enter() -> Result<(), Failure> {
    // SAFETY: the argument is a plain number. The call concerns this thread and those that it
    // starts.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0 {
        return Ok(());
    }
    const WHAT: &str = "making a network namespace";
    let source = io::Error::last_os_error();
    Err(Failure::starting(match source.raw_os_error() {
        Some(libc::EPERM) => Error::PermissionDenied {
            needs: format!(
                "CAP_SYS_ADMIN for {WHAT}: run as root, or, where /dev/net/tun may be opened by \
                 all, behind 'unshare --user --map-root-user'"
            ),
        },
        _ => Error::Io { what: WHAT, source },
    }))
}

/// The bridge between two TAPs of `vmring bench`.
pub(crate) const BRIDGE: &str = "bench";

/// Makes [`BRIDGE`] in the network namespace of this thread. It learns and forwards at once: a
/// bridge has no spanning tree by default.
pub(crate) fn make_bridge() -> Result<(), Failure> {
    // `SIOCBRADDBR` of the kernel's `linux/sockios.h`.
    const ADD_BRIDGE: libc::Ioctl = 0x89a0;
    // These requests work on any socket.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(no_bridge)?;
    // SAFETY: all zeroes are a valid ifreq, of an interface without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(BRIDGE.bytes()) {
        *to = from as libc::c_char;
    }
    let ask = |what: libc::Ioctl, with: *const libc::c_char| {
        // SAFETY: `with` points at what the request reads, a name or an ifreq, and outlives the
        // call.
        match unsafe { libc::ioctl(socket.as_raw_fd(), what, with) } {
            0 => Ok(()),
            _ => Err(no_bridge(io::Error::last_os_error())),
        }
    };
    ask(ADD_BRIDGE, request.ifr_name.as_ptr())?;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    ask(libc::SIOCSIFFLAGS as libc::Ioctl, (&raw const request).cast())
}

fn no_bridge(source: io::Error) -> Failure {
    Failure::starting(Error::Io { what: "making a bridge between two TAPs", source })
}

/// The engine that runs, or ran.
pub(crate) fn engine(interface: &Interface) -> &'static str {
    let counters = interface.counters();
    let count = |name| counters.iter().find(|(of, _)| *of == name).map_or(0, |(_, n)| *n);
    if count("io_uring") > count("io_uring fallbacks") { "io_uring" } else { "plain" }
}

/// Packets for the guest that the kernel has dropped, because the TAP's queue was full or nobody
/// had opened the TAP. It counts the network namespace of this thread, which has no interface but
/// the TAP.
pub(crate) fn dropped() -> u64 {
    dropped_in(&table(), |_| true)
}

/// Like [`dropped`], for one interface, from a file that stays open: a process that has confined itself
/// opens none.
#[derive(Debug)]
pub(crate) struct KernelDrops {
    name: String,
    table: Option<File>,
}

impl KernelDrops {
    /// For the interface of this name, in the network namespace of this thread.
    pub(crate) fn of(name: String) -> Self {
        Self { name, table: File::open(TABLE).ok() }
    }

    /// How many there are until now.
    pub(crate) fn count(&self) -> u64 {
        let Some(table) = &self.table else { return 0 };
        let mut text = Vec::new();
        let mut piece = [0; 4096];
        while let Ok(len) = table.read_at(&mut piece, text.len() as u64)
            && len > 0
        {
            text.extend_from_slice(&piece[..len]);
        }
        dropped_in(&String::from_utf8_lossy(&text), |of| of == self.name)
    }
}

const TABLE: &str = "/proc/thread-self/net/dev";

/// The kernel's counters of the interfaces in the network namespace of this thread. Without /proc
/// they are unknown.
fn table() -> String {
    fs::read_to_string(TABLE).unwrap_or_default()
}

/// The sum of the drops of all interfaces that count, in the direction of sending
/// (`dev_seq_printf_stats` in the kernel's `net/core/net-procfs.c`): the twelfth number after an
/// interface's name.
fn dropped_in(table: &str, counts: impl Fn(&str) -> bool) -> u64 {
    let lines = table.lines().filter_map(|line| line.split_once(':'));
    let lines = lines.filter(|(name, _)| counts(name.trim()));
    lines.filter_map(|(_, numbers)| numbers.split_whitespace().nth(11)?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_drops_are_found_in_its_table() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    9    0     0          0         0        0       0    0    0    0     0       0          0
  tap0:    1000      10    1    2    3     4          5         6     2000      20    7   42    8     9      10         11
";
        assert_eq!(dropped_in(table, |_| true), 42);
        assert_eq!(dropped_in(table, |name| name == "tap0"), 42);
        assert_eq!(dropped_in(table, |name| name == "lo"), 0);
        assert_eq!(dropped_in("", |_| true), 0);
    }
}
