//! The names of the devices, as `--device` takes them.

use vmring::{Driver, Embedded, Loopback, Vmnet};

use crate::dhcp::DhcpArgs;

/// A device of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceName {
    Embedded,
    Loopback,
    /// Apple's vmnet, or on other systems the simulated one.
    Vmnet,
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
    pub(crate) fn driver(self, network: &str, dhcp: &DhcpArgs) -> Box<dyn Driver> {
        match self {
            DeviceName::Embedded => {
                Box::new(dhcp.embedded(Embedded::network(network).overflow(QUEUE)))
            }
            DeviceName::Loopback => Box::new(Loopback::new(1500)),
            // As on a Mac, there is one network for each mode.
            DeviceName::Vmnet => Box::new(Vmnet::new()),
            #[cfg(target_os = "linux")]
            DeviceName::Tap => Box::new(vmring::Tap::new()),
        }
    }
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
