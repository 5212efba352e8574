//! The settings of an interface and what was negotiated: mode, addresses, offloads, directions.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use macaddr::MacAddr6;
pub use vmring_core::offload::Offloads;

use crate::error::ConfigError;

/// The kind of network that an interface is on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
#[doc(alias = "operating_modes_t")]
#[non_exhaustive]
pub enum Mode {
    /// The host and the other interfaces in this mode, and nothing beyond the host.
    #[doc(alias = "VMNET_HOST_MODE")]
    Host,
    /// Like [`Host`](Self::Host), and the networks beyond the host through network address
    /// translation. The default.
    #[default]
    #[doc(alias = "VMNET_SHARED_MODE")]
    Shared,
    /// A port on the network of a physical interface of this name.
    #[doc(alias = "VMNET_BRIDGED_MODE")]
    Bridged(String),
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mode::Host => f.write_str("host"),
            Mode::Shared => f.write_str("shared"),
            Mode::Bridged(name) => write!(f, "bridged:{name}"),
        }
    }
}

impl FromStr for Mode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "host" => Ok(Mode::Host),
            "shared" => Ok(Mode::Shared),
            _ => match text.strip_prefix("bridged:") {
                Some(name) if !name.is_empty() => Ok(Mode::Bridged(name.to_owned())),
                _ => Err(ConfigError::Invalid(format!(
                    "the mode must be host, shared or bridged:INTERFACE, not '{text}'"
                ))),
            },
        }
    }
}

/// The IPv4 addresses of a host or shared network.
///
/// Apple's rule holds on every device: the first address is the gateway's, the addresses after it
/// up to `end` are given out by DHCP, and all are private (RFC 1918).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ipv4Range {
    /// The gateway's address.
    #[doc(alias = "vmnet_start_address_key")]
    pub start: Ipv4Addr,
    /// The last address that is given out.
    #[doc(alias = "vmnet_end_address_key")]
    pub end: Ipv4Addr,
    /// The subnet mask.
    #[doc(alias = "vmnet_subnet_mask_key")]
    pub mask: Ipv4Addr,
}

impl FromStr for Ipv4Range {
    type Err = ConfigError;

    /// Parses a range like `192.168.64.1/24`: the gateway's address and the length of the mask in
    /// bits. The range ends at the last address before the broadcast address.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || {
            ConfigError::Invalid(format!(
                "a subnet must be GATEWAY/BITS, for example 192.168.64.1/24, not '{text}'"
            ))
        };
        let (start, bits) = text.split_once('/').ok_or_else(wrong)?;
        let start: Ipv4Addr = start.parse().map_err(|_| wrong())?;
        let bits: u32 = bits.parse().ok().filter(|bits| *bits <= 32).ok_or_else(wrong)?;
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        let end = (u32::from(start) | !mask).saturating_sub(1);
        Ok(Self { start, end: end.into(), mask: mask.into() })
    }
}

/// The settings with which a [`Driver`](crate::Driver) is to start an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InterfaceConfig {
    /// The kind of network.
    pub mode: Mode,
    /// The interface's identity, a UUID. The same identity gives the same MAC address.
    pub interface_id: [u8; 16],
    /// The MAC address. `None`: the driver allocates one.
    pub mac: Option<MacAddr6>,
    /// The network's addresses. `None`: the mode's default.
    pub ipv4: Option<Ipv4Range>,
    /// The MTU in bytes. `None`: the driver's default.
    pub mtu: Option<u32>,
    /// Whether no packets pass between this interface and the others of the network.
    pub isolated: bool,
    /// The work that the device is to do for the guest. What the device in fact does is in its
    /// [`Capabilities`](crate::device::Capabilities).
    pub offloads: Offloads,
}

impl InterfaceConfig {
    /// Returns settings with this mode and identity that leave everything else to the driver.
    pub(crate) fn new(mode: Mode, interface_id: [u8; 16]) -> Self {
        let offloads = Offloads::default();
        Self { mode, interface_id, mac: None, ipv4: None, mtu: None, isolated: false, offloads }
    }
}

/// What was negotiated when an interface was started. Corresponds to `Lwt_vmnet`'s type `t`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InterfaceInfo {
    /// The kind of network.
    pub mode: Mode,
    /// The interface's identity, a UUID.
    pub interface_id: [u8; 16],
    /// The MAC address that the guest is to use.
    pub mac: MacAddr6,
    /// The largest IP packet, in bytes.
    pub mtu: u32,
    /// The largest Ethernet frame, in bytes.
    pub max_packet_size: u32,
    /// The network's addresses, if the device reports them.
    pub ipv4: Option<Ipv4Range>,
    /// The IPv6 prefix of a shared network, of 64 bits, if the device reports it: vmnet and the embedded
    /// network do.
    #[doc(alias = "vmnet_nat66_prefix_key")]
    pub nat66_prefix: Option<Ipv6Addr>,
}

impl InterfaceInfo {
    /// Returns the mode, the identity and the addresses of `config`, together with the values that
    /// the driver has decided.
    pub fn new(config: &InterfaceConfig, mac: MacAddr6, mtu: u32, max_packet_size: u32) -> Self {
        let InterfaceConfig { mode, interface_id, ipv4, .. } = config.clone();
        let nat66_prefix = None;
        Self { mode, interface_id, mac, mtu, max_packet_size, ipv4, nat66_prefix }
    }
}

/// The forwarding of a TCP or UDP port of the host to a port of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The host's port.
    pub external_port: u16,
    /// The guest's address.
    pub internal_address: IpAddr,
    /// The guest's port.
    pub internal_port: u16,
}

/// A protocol whose ports can be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Protocol {
    /// IP protocol 6.
    Tcp,
    /// IP protocol 17.
    Udp,
}

/// The directions in which a ring moves packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the device to the caller.
    Read,
    /// From the caller to the device.
    Write,
    /// Both ways.
    Both,
}

impl Direction {
    /// Returns true for `Read` and `Both`.
    pub fn reads(self) -> bool {
        self != Direction::Write
    }

    /// Returns true for `Write` and `Both`.
    pub fn writes(self) -> bool {
        self != Direction::Read
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Read => "reading",
            Direction::Write => "writing",
            Direction::Both => "reading and writing",
        })
    }
}
