//! `vmring info`: shows what this machine offers.

mod device;
#[cfg(target_os = "linux")]
mod tap;

use serde::Serialize;
use vmring::{Embedded, Loopback};

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::report::{Table, grouped, print_json, print_report};
use crate::system;
#[cfg(not(target_os = "macos"))]
use device::unusable;
use device::{DeviceInfo, try_device};

/// The whole report.
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
    tap: tap::TapInfo,
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
    vec![try_device(name, what, needs, vmring::Vmnet::new())]
}

#[cfg(not(target_os = "macos"))]
fn vmnet() -> Vec<DeviceInfo> {
    let simulated = try_device(
        "vmnet-sim",
        "the macOS driver over a simulated vmnet, for tests",
        "nothing",
        vmring::Vmnet::new(),
    );
    vec![unusable(VMNET, "it exists on macOS only".to_owned()), simulated]
}

fn devices() -> Vec<DeviceInfo> {
    let mut devices = vec![
        try_device(
            "embedded",
            "a network inside this process, with gateway and DHCP",
            "nothing",
            Embedded::network("info"),
        ),
        try_device(
            "loopback",
            "a wire from an interface back to itself",
            "nothing",
            Loopback::new(1500),
        ),
    ];
    devices.extend(vmnet());
    #[cfg(not(target_os = "linux"))]
    devices.push(device::unusable(device::TAP, "it exists on Linux only".to_owned()));
    devices
}

pub(crate) fn run(args: &InfoArgs) -> Result<(), Failure> {
    let devices = devices();
    #[cfg(target_os = "linux")]
    let (devices, tap) = tap::inspect(devices);
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
    if args.json { print_json(&info) } else { print_report(&info.text()) }
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
        text.push_str(
            "\nCapabilities, with default settings (rings that read, rings that write)\n",
        );
        let heading = ["", "MTU", "max packet", "read batch", "write batch", "rings", "offloads"];
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
