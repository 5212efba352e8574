//! `vmring info`: what this machine offers.

use serde::Serialize;
use vmring::device::Capabilities;
use vmring::{Driver, Embedded, Error, Interface, Loopback};

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::report::{Table, grouped, offload_names, print, print_json};
use crate::system;

/// Everything.
#[derive(Debug, Serialize)]
struct Info {
    version: &'static str,
    system: &'static str,
    architecture: &'static str,
    page_size: usize,
    processors: usize,
    root: bool,
    devices: Vec<DeviceInfo>,
    #[cfg(target_os = "linux")]
    tap: crate::tap::TapInfo,
}

#[derive(Debug, Serialize)]
pub(crate) struct DeviceInfo {
    name: &'static str,
    what: &'static str,
    /// What a process must have to use it.
    needs: &'static str,
    pub(crate) usable: bool,
    /// Why it is not usable here.
    pub(crate) why_not: Option<String>,
    /// With default settings; `None` if it is not usable.
    pub(crate) capabilities: Option<CapabilitiesInfo>,
}

#[derive(Debug, Serialize)]
pub(crate) struct CapabilitiesInfo {
    mtu: u32,
    max_packet_size: u32,
    max_read_batch: u32,
    max_write_batch: u32,
    headroom: u32,
    /// `None`: any number.
    reading_rings: Option<usize>,
    writing_rings: Option<usize>,
    offloads: Vec<&'static str>,
}

impl From<Capabilities> for CapabilitiesInfo {
    fn from(caps: Capabilities) -> Self {
        let any = |rings| (rings != usize::MAX).then_some(rings);
        Self {
            mtu: caps.mtu,
            max_packet_size: caps.max_packet_size,
            max_read_batch: caps.max_read_batch,
            max_write_batch: caps.max_write_batch,
            headroom: caps.headroom,
            reading_rings: any(caps.reading_rings),
            writing_rings: any(caps.writing_rings),
            offloads: offload_names(caps.offloads),
        }
    }
}

/// A device of this version: tried out, not only described.
pub(crate) fn tried(
    name: &'static str,
    what: &'static str,
    needs: &'static str,
    driver: impl Driver,
) -> DeviceInfo {
    let tried: Result<Capabilities, Error> =
        Interface::builder().device(driver).start().map(|interface| interface.capabilities());
    let (capabilities, why_not) = match tried {
        Ok(caps) => (Some(caps.into()), None),
        Err(error) => (None, Some(error.to_string())),
    };
    DeviceInfo { name, what, needs, usable: why_not.is_none(), why_not, capabilities }
}

/// A device that is not usable here, and why.
pub(crate) fn unusable(
    (name, what, needs): (&'static str, &'static str, &'static str),
    why_not: String,
) -> DeviceInfo {
    DeviceInfo { name, what, needs, usable: false, why_not: Some(why_not), capabilities: None }
}

const VMNET: (&str, &str, &str) = (
    "vmnet",
    "Apple's network for virtual machines",
    "root or the entitlement com.apple.vm.networking; from macOS 26 on the entitlement \
     com.apple.security.virtualization is enough",
);

#[cfg(target_os = "macos")]
fn vmnet() -> Vec<DeviceInfo> {
    let (name, what, needs) = VMNET;
    vec![tried(name, what, needs, vmring::Vmnet::new())]
}

#[cfg(not(target_os = "macos"))]
fn vmnet() -> Vec<DeviceInfo> {
    let simulated = tried(
        "vmnet-sim",
        "the macOS driver over a simulated vmnet, for tests",
        "nothing",
        vmring::Vmnet::new(),
    );
    vec![unusable(VMNET, "it exists on macOS only".to_owned()), simulated]
}

pub(crate) const TAP: (&str, &str, &str) = (
    "tap",
    "a network interface of the host's kernel",
    "root or the capability CAP_NET_ADMIN, or a TAP interface that was made for this user",
);

fn devices() -> Vec<DeviceInfo> {
    let mut devices = vec![
        tried(
            "embedded",
            "a network inside this process, with gateway and DHCP",
            "nothing",
            Embedded::network("info"),
        ),
        tried(
            "loopback",
            "a wire from an interface back to itself",
            "nothing",
            Loopback::new(1500),
        ),
    ];
    devices.extend(vmnet());
    #[cfg(not(target_os = "linux"))]
    devices.push(unusable(TAP, "it exists on Linux only".to_owned()));
    devices
}

pub(crate) fn run(args: &InfoArgs) -> Result<(), Failure> {
    let devices = devices();
    #[cfg(target_os = "linux")]
    let (devices, tap) = crate::tap::look(devices);
    let info = Info {
        version: env!("CARGO_PKG_VERSION"),
        system: std::env::consts::OS,
        architecture: std::env::consts::ARCH,
        page_size: vmring::page_size(),
        processors: system::processors(),
        root: system::is_root(),
        devices,
        #[cfg(target_os = "linux")]
        tap,
    };
    if args.json { print_json(&info) } else { print(&info.text()) }
}

impl Info {
    fn text(&self) -> String {
        let mut text = format!(
            "vmring {} on {} ({}): {} processors, pages of {} bytes, {}\n\nDevices\n",
            self.version,
            self.system,
            self.architecture,
            self.processors,
            grouped(self.page_size as u64),
            if self.root { "root" } else { "not root" },
        );
        let mut table = Table::new(&["", "usable here", "what it is"]).left();
        for device in &self.devices {
            let usable = if device.usable { "yes" } else { "no" };
            table.row([device.name, usable, device.what].map(str::to_owned));
        }
        text.push_str(&table.text());
        text.push_str("\nWhat they need\n");
        let mut table = Table::default().left();
        for device in &self.devices {
            table.row([device.name, device.needs].map(str::to_owned));
            if let Some(why_not) = &device.why_not {
                table.row([String::new(), format!("not usable: {why_not}")]);
            }
        }
        text.push_str(&table.text());
        text.push_str("\nCapabilities, with default settings\n");
        let heading = [
            "",
            "MTU",
            "max packet",
            "read batch",
            "write batch",
            "rings (read, write)",
            "offloads",
        ];
        let mut table = Table::new(&heading).left();
        for device in &self.devices {
            let Some(caps) = &device.capabilities else { continue };
            let rings = |n: Option<usize>| n.map_or_else(|| "any".to_owned(), |n| n.to_string());
            table.row([
                device.name.to_owned(),
                caps.mtu.to_string(),
                caps.max_packet_size.to_string(),
                caps.max_read_batch.to_string(),
                caps.max_write_batch.to_string(),
                format!("{}, {}", rings(caps.reading_rings), rings(caps.writing_rings)),
                if caps.offloads.is_empty() { "none".to_owned() } else { caps.offloads.join(", ") },
            ]);
        }
        text.push_str(&table.text());
        #[cfg(target_os = "linux")]
        text.push_str(&self.tap.text());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_version_has_is_usable_without_privileges() {
        for device in devices() {
            let here = matches!(device.name, "embedded" | "loopback" | "vmnet-sim");
            if device.name == "vmnet" && cfg!(target_os = "macos") {
                continue; // needs a privilege
            }
            assert_eq!(device.usable, here, "{}", device.name);
            assert_eq!(device.capabilities.is_some(), here, "{}", device.name);
            assert_eq!(device.why_not.is_none(), here, "{}", device.name);
        }
    }
}
