//! The network of a server, as the command line has it.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use vmring::device::vmnet::{IsolatedNetwork, Service, VmnetNetwork};
use vmring::{Error, Interface, InterfaceBuilder, Ipv4Range, MacAddr6, Mode, Vmnet};

use crate::bridge::spec::Spec;
use crate::device::VMNET;
use crate::vmnet::VmnetSpec;

/// What the command line of another helper says of the network, and that of `vmring serve` does not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetworkSettings {
    /// Host or shared, for a network inside this process.
    pub(crate) mode: Mode,
    /// The identity of the network's interface.
    pub(crate) interface_id: Option<[u8; 16]>,
    /// The MAC address of the first guest on a network inside this process. The guest may use another one.
    pub(crate) guest_mac: Option<MacAddr6>,
    /// vmnet's own settings.
    pub(crate) ipv4: Option<Ipv4Range>,
    pub(crate) isolated: bool,
    /// The identity of an isolated network in host mode.
    pub(crate) identifier: Option<[u8; 16]>,
    pub(crate) nat66_prefix: Option<Ipv6Addr>,
    /// Whether the network has no DHCP server (macOS 26).
    pub(crate) without_dhcp: bool,
}

impl NetworkSettings {
    /// Creates the network object that the command line asks for, if it does.
    pub(crate) fn create(
        &self,
        spec: &VmnetSpec,
        mtu: Option<u32>,
    ) -> Result<Option<VmnetNetwork>, Error> {
        if !self.without_dhcp {
            return spec.create(mtu);
        }
        let network = VmnetNetwork::builder(spec.mode.clone()).without(Service::Dhcp);
        let network = match self.ipv4 {
            Some(range) => network.ipv4(range.start, range.mask),
            None => network,
        };
        let network = match mtu {
            Some(mtu) => network.mtu(mtu),
            None => network,
        };
        let network = match self.nat66_prefix {
            Some(prefix) => network.ipv6(prefix, 64),
            None => network,
        };
        network.create().map(Some)
    }

    /// Starts an interface of vmnet with these settings. Those of a network object are the object's.
    pub(crate) fn vmnet(
        &self,
        (builder, vmnet): (InterfaceBuilder, Vmnet),
    ) -> Result<Interface, Error> {
        let builder = builder.isolated(self.isolated);
        if self.without_dhcp {
            return builder.device(vmnet).start();
        }
        let builder = match self.ipv4 {
            Some(range) => builder.ipv4(range),
            None => builder,
        };
        let builder = match self.interface_id {
            Some(id) => builder.interface_id(id),
            None => builder,
        };
        let vmnet = match self.nat66_prefix {
            Some(prefix) => vmnet.nat66_prefix(prefix),
            None => vmnet,
        };
        let vmnet = match self.identifier {
            Some(identifier) => {
                vmnet.isolated_network(IsolatedNetwork { identifier, host: None, host_ipv6: None })
            }
            None => vmnet,
        };
        builder.device(vmnet).start()
    }
}

/// One `--network`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkSpec(pub(crate) Spec);

impl FromStr for NetworkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = text.split(':').next().unwrap_or_default();
        let tap = if cfg!(target_os = "linux") { ", tap:NAME" } else { "" };
        match kind {
            "embedded" | VMNET => text.parse().map(Self),
            #[cfg(target_os = "linux")]
            "tap" => text.parse().map(Self),
            _ if kind == "vmnet" => Err(format!(
                "the vmnet device exists on macOS only; use embedded:NAME{tap} or {VMNET}"
            )),
            _ => Err(format!(
                "'{text}' is no network of a server; use embedded:NAME{tap} or {VMNET}"
            )),
        }
    }
}

impl fmt::Display for NetworkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl NetworkSpec {
    /// Whether it leads to a network outside of this process, which takes privileges to start. The
    /// simulated vmnet is inside.
    pub(crate) fn needs_privileges(&self) -> bool {
        !matches!(self.0, Spec::Embedded { .. }) && !self.is_simulated()
    }

    /// Whether it is an embedded network, which has a way out of its own.
    pub(crate) fn is_embedded(&self) -> bool {
        self.0.is_embedded()
    }

    /// Whether it has a DHCP server of ours.
    pub(crate) fn has_dhcp(&self) -> bool {
        self.0.has_dhcp()
    }

    /// What keeps the guests from what the network promises, as far as it is known.
    pub(crate) fn obstacle(&self) -> Option<String> {
        self.0.obstacle()
    }

    pub(crate) fn is_tap(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { .. }) {
            return true;
        }
        false
    }

    pub(crate) fn is_simulated(&self) -> bool {
        matches!(self.0, Spec::Vmnet(_)) && !cfg!(target_os = "macos")
    }

    /// Whether the host's end of a TAP is set up, and is put back at the end.
    pub(crate) fn changes_host(&self) -> bool {
        #[cfg(target_os = "linux")]
        if matches!(self.0, Spec::Tap { mode: Some(_), .. }) {
            return true;
        }
        false
    }
}
