//! The TAP device, as `vmring info` shows it.

use std::fs::{self, OpenOptions};
use std::io;

use serde::Serialize;
use vmring::device::Offloads;
use vmring::{Interface, Tap, TapEngine, TapError, TapForwarding};

use super::device::{self, DeviceInfo};
use crate::report::{Table, offload_names};
use crate::tap::in_namespace;

/// The device node that TAPs come from.
const NODE: &str = "/dev/net/tun";

/// What depends on this machine and this process.
#[derive(Debug, Serialize)]
pub(crate) struct TapInfo {
    /// Whether `/dev/net/tun` can be opened.
    opens: bool,
    /// The reason why it cannot.
    why_not: Option<String>,
    /// The engine that `auto` stands for.
    engine: &'static str,
    /// The reason why that is not io_uring.
    why_no_io_uring: Option<String>,
    /// The offloads that the kernel grants if all are asked for; `None` if no TAP could be made to
    /// ask.
    offloads: Option<Vec<&'static str>>,
    /// Names of bridges for the mode `bridged:NAME`.
    bridges: Vec<String>,
    /// How this host forwards the packets of guests; `None` if this process may not see it.
    forwarding: Option<ForwardingInfo>,
}

/// [`TapForwarding`] for the report.
#[derive(Debug, Serialize)]
struct ForwardingInfo {
    on: bool,
    by_vmring: bool,
    left_on: bool,
    dropped_by: Vec<String>,
    bridges_too: bool,
}

impl From<TapForwarding> for ForwardingInfo {
    fn from(forwarding: TapForwarding) -> Self {
        let TapForwarding { on, by_vmring, left_on, dropped_by, bridges_too, .. } = forwarding;
        Self { on, by_vmring, left_on, dropped_by, bridges_too }
    }
}

impl ForwardingInfo {
    /// Says who has switched IPv4 forwarding on, and what that means.
    fn switch(&self) -> &'static str {
        match self {
            Self { on: false, .. } => "off; shared mode switches it on",
            Self { left_on: true, .. } => "left on by a killed vmring; the next TAP puts it back",
            Self { by_vmring: true, .. } => "on, for a TAP in shared mode",
            Self { .. } => "on, not by vmring",
        }
    }

    /// What the host does with packets that it forwards.
    fn policy(&self) -> String {
        if self.dropped_by.is_empty() {
            return "no chain drops all".to_owned();
        }
        let modes = if self.bridges_too { "shared and bridged" } else { "shared" };
        format!("drop ({}): no way out in {modes} mode", self.dropped_by.join(", "))
    }
}

/// Tries a TAP in a network namespace of its own, and adds it to the devices.
pub(crate) fn inspect(mut devices: Vec<DeviceInfo>) -> (Vec<DeviceInfo>, TapInfo) {
    let why_not = OpenOptions::new().read(true).write(true).open(NODE).err().map(why_closed);
    let tried = match &why_not {
        Some(why_not) => Err(why_not.clone()),
        None => in_namespace(try_out).map_err(|failure| {
            format!(
                "it cannot be tried out here, but a TAP that root made for this user can be used; \
                 {failure}"
            )
        }),
    };
    let (device, offloads) = tried.unwrap_or_else(|why| (device::unusable(device::TAP, why), None));
    devices.push(device);
    let (engine, why_no_io_uring) = match TapEngine::IoUring.resolve() {
        Ok(_) => ("io_uring", None),
        Err(error) => ("plain", Some(error.to_string())),
    };
    let opens = why_not.is_none();
    let bridges = bridges();
    let forwarding = Tap::forwarding().ok().map(ForwardingInfo::from);
    (devices, TapInfo { opens, why_not, engine, why_no_io_uring, offloads, bridges, forwarding })
}

/// The reason why the node cannot be opened, and what helps.
fn why_closed(error: io::Error) -> String {
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
    let (name, what, needs) = device::TAP;
    let device = device::try_device(name, what, needs, Tap::new());
    let asked = Interface::builder().offloads(Offloads::ALL).device(Tap::new()).start();
    (device, asked.ok().map(|interface| offload_names(interface.capabilities().offloads)))
}

/// Any user may read the bridges here. Without `/sys` none are found.
fn bridges() -> Vec<String> {
    let Ok(interfaces) = fs::read_dir("/sys/class/net") else { return Vec::new() };
    let bridges = interfaces.flatten().filter(|interface| interface.path().join("bridge").is_dir());
    let mut names: Vec<_> =
        bridges.map(|bridge| bridge.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

impl TapInfo {
    /// The table for people.
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
        let unknown = || "unknown: needs root and nf_tables".to_owned();
        let forwarding = self.forwarding.as_ref();
        let rows = rows.into_iter().chain([
            (
                "IPv4 forwarding",
                forwarding.map_or_else(unknown, |forwarding| forwarding.switch().to_owned()),
            ),
            ("forward policy", forwarding.map_or_else(unknown, ForwardingInfo::policy)),
        ]);
        let mut table = Table::default().left();
        for (name, value) in rows {
            table.row([name.to_owned(), value]);
        }
        format!("\nTAP\n{}", table.text())
    }
}
