//! The TAP device: the demo on it, in a network namespace of its own, and what `info` says of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::thread;

use clap::Args;
use serde::Serialize;
use vmring::device::Offloads;
use vmring::{Error, Interface, MacAddr6, Mode, Tap, TapEngine, TapError};

use crate::args::DemoArgs;
use crate::failure::Failure;
use crate::info::{self, DeviceInfo};
use crate::report::{Table, offload_names};

/// The kernel's end in the demo: a locally administered address.
pub(crate) const HOST_MAC: MacAddr6 = MacAddr6::new(0x02, 0x6b, 0x65, 0x72, 0x6e, 0x01);

/// What only the TAP device has.
#[derive(Args, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TapArgs {
    /// With --device tap: how frames move, auto, io_uring or plain [default: auto]
    #[arg(long, value_name = "NAME")]
    engine: Option<TapEngine>,
    /// With --device tap: ask for checksum offload and TCP segmentation; the guest takes the kernel's
    /// large packets, but makes none itself
    #[arg(long)]
    offload: bool,
}

impl TapArgs {
    /// Refuses what another device does not have.
    pub(crate) fn check_absent(self) -> Result<(), Failure> {
        let given = match self {
            TapArgs { engine: Some(_), .. } => "--engine",
            TapArgs { offload: true, .. } => "--offload",
            _ => return Ok(()),
        };
        Err(Failure::Usage(format!("{given} is for the tap device; add --device tap")))
    }

    pub(crate) fn driver(self) -> Tap {
        Tap::new().engine(self.engine.unwrap_or_default()).host_mac(HOST_MAC)
    }

    pub(crate) fn offloads(self) -> Offloads {
        let mut offloads = Offloads::default();
        (offloads.checksum, offloads.tso4) = (self.offload, self.offload);
        offloads
    }
}

/// Refuses what the demo cannot do on a TAP.
pub(crate) fn check(args: &DemoArgs) -> Result<(), Failure> {
    if let Mode::Bridged(_) = args.mode {
        return Err(Failure::Usage(
            "the demo has the tap device in a network namespace of its own, where there is no \
             bridge; use --mode host or shared"
                .to_owned(),
        ));
    }
    // The kernel takes less; the demo has the same bounds on every device.
    if let Some(mtu) = args.mtu.filter(|mtu| !(1280..=65_521).contains(mtu)) {
        return Err(Failure::Usage(format!(
            "an MTU of {mtu} is not possible; it must be from 1280 to 65521"
        )));
    }
    Ok(())
}

/// Runs `f` on a thread in a network namespace of its own. The threads that it starts are there
/// too, and the namespace goes with the last of them.
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
    // SAFETY: a plain number; it concerns this thread, and those that it starts.
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

/// Makes [`BRIDGE`] in the network namespace of this thread. It learns and forwards at once: a bridge
/// has no spanning tree unless it is told to.
pub(crate) fn make_bridge() -> Result<(), Failure> {
    // `SIOCBRADDBR` of the kernel's `linux/sockios.h`.
    const ADD_BRIDGE: libc::Ioctl = 0x89a0;
    // Any socket takes these requests.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(no_bridge)?;
    // SAFETY: zeroes are one, of an interface without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(BRIDGE.bytes()) {
        *to = from as libc::c_char;
    }
    let ask = |what: libc::Ioctl, with: *const libc::c_char| {
        // SAFETY: `with` is live, and what the request reads: a name or an ifreq.
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

/// Packets for the guest that the kernel has dropped, because the TAP's queue was full or nobody had
/// opened it. Of the network namespace of this thread, where there is no interface but the TAP.
pub(crate) fn dropped() -> u64 {
    // Without /proc nobody knows.
    fs::read_to_string("/proc/thread-self/net/dev").map_or(0, |table| dropped_in(&table))
}

/// The sum of the drops of what was sent (`dev_seq_printf_stats` in the kernel's
/// `net/core/net-procfs.c`): the twelfth number behind an interface's name.
fn dropped_in(table: &str) -> u64 {
    let lines = table.lines().filter_map(|line| line.split_once(':'));
    lines.filter_map(|(_, numbers)| numbers.split_whitespace().nth(11)?.parse::<u64>().ok()).sum()
}

/// Where a TAP comes from.
const NODE: &str = "/dev/net/tun";

/// What of a TAP depends on this machine and this process.
#[derive(Debug, Serialize)]
pub(crate) struct TapInfo {
    /// Whether `/dev/net/tun` may be opened.
    opens: bool,
    /// Why not.
    why_not: Option<String>,
    /// Which engine `auto` is.
    engine: &'static str,
    /// Why it is not io_uring.
    why_no_io_uring: Option<String>,
    /// What the kernel grants to who asks for all; `None` if no TAP could be made to ask.
    offloads: Option<Vec<&'static str>>,
    /// Those that may be named in the mode `bridged:NAME`.
    bridges: Vec<String>,
}

/// Tries a TAP out, in a network namespace for it alone; adds it to the devices.
pub(crate) fn look(mut devices: Vec<DeviceInfo>) -> (Vec<DeviceInfo>, TapInfo) {
    let why_not = OpenOptions::new().read(true).write(true).open(NODE).err().map(closed);
    let tried = match &why_not {
        Some(why_not) => Err(why_not.clone()),
        None => in_namespace(try_out).map_err(|failure| {
            format!(
                "it cannot be tried out here, but a TAP that root made for this user can be used; \
                 {failure}"
            )
        }),
    };
    let (device, offloads) = tried.unwrap_or_else(|why| (info::unusable(info::TAP, why), None));
    devices.push(device);
    let (engine, why_no_io_uring) = match TapEngine::IoUring.resolve() {
        Ok(_) => ("io_uring", None),
        Err(error) => ("plain", Some(error.to_string())),
    };
    let opens = why_not.is_none();
    let bridges = bridges();
    (devices, TapInfo { opens, why_not, engine, why_no_io_uring, offloads, bridges })
}

/// Why the node cannot be opened, and what helps.
fn closed(error: io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun.to_string(),
        Some(libc::EACCES | libc::EPERM) => {
            format!(
                "permission denied: read and write access to {NODE}: run as root, or let root give \
                 this user access"
            )
        }
        _ => format!("opening {NODE}: {error}"),
    }
}

fn try_out() -> (DeviceInfo, Option<Vec<&'static str>>) {
    let (name, what, needs) = info::TAP;
    let device = info::tried(name, what, needs, Tap::new());
    let asked = Interface::builder().offloads(Offloads::ALL).device(Tap::new()).start();
    (device, asked.ok().map(|interface| offload_names(interface.capabilities().offloads)))
}

/// Anybody may read them here; without a `/sys` there are none to be seen.
fn bridges() -> Vec<String> {
    let Ok(interfaces) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let bridges = interfaces.flatten().filter(|interface| interface.path().join("bridge").is_dir());
    let mut names: Vec<_> =
        bridges.map(|bridge| bridge.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

impl TapInfo {
    /// For people.
    pub(crate) fn text(&self) -> String {
        let list = |names: Vec<&str>| match names[..] {
            [] => "none".to_owned(),
            _ => names.join(", "),
        };
        let why = |why: &Option<String>| why.clone().unwrap_or_default();
        let rows = [
            (NODE, if self.opens { "may be opened".to_owned() } else { why(&self.why_not) }),
            (
                "engine",
                match &self.why_no_io_uring {
                    None => self.engine.to_owned(),
                    Some(why) => format!("{}, no io_uring: {why}", self.engine),
                },
            ),
            (
                "offloads granted",
                self.offloads.clone().map_or_else(|| "unknown: no TAP to ask".to_owned(), list),
            ),
            ("bridges", list(self.bridges.iter().map(String::as_str).collect())),
        ];
        let mut table = Table::default().left();
        for (name, value) in rows {
            table.row([name.to_owned(), value]);
        }
        format!("\nTAP\n{}", table.text())
    }
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
        assert_eq!(dropped_in(table), 42);
        assert_eq!(dropped_in(""), 0);
    }
}
