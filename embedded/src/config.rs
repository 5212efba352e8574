//! The configuration of a network: its mode, addresses, MTU and sizes.

use core::net::{Ipv4Addr, Ipv6Addr};
use core::time::Duration;
use std::path::PathBuf;

use macaddr::MacAddr6;
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::dhcp::{LeaseFileError, ReserveError};
use crate::gateway::Ipv6Config;
use crate::limits::{
    DEFAULT_INBOX_DEPTH, DEFAULT_LEASE_TIME, DEFAULT_MAC_AGEING, DEFAULT_MTU,
    DEFAULT_OVERFLOW_BYTES, DEFAULT_OVERFLOW_DEPTH_RANGE, INBOX_DEPTH_RANGE, LEASE_SECONDS_RANGE,
    MAC_AGEING_SECONDS_RANGE, MAX_DNS_SERVERS, MAX_OVERFLOW_DEPTH, MTU_RANGE, ROUTER_WORKERS_RANGE,
    VLAN_TAG_LEN,
};

/// What the guests of a network can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NetworkMode {
    /// Guests reach each other and the gateway. DHCP names no router.
    Host,
    /// Guests reach each other and the gateway, and DHCP names the gateway as their router.
    #[default]
    Shared,
}

/// The addresses of a network, arranged as in vmnet: the gateway has the first address, and the
/// addresses that DHCP gives out follow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// The gateway's address.
    pub gateway: Ipv4Addr,
    /// The last address DHCP gives out.
    pub end: Ipv4Addr,
    /// The subnet's mask.
    pub mask: Ipv4Addr,
}

impl AddressRange {
    /// Returns the default addresses of a network of this mode: `192.168.64.1` to `.254` in shared
    /// mode, `192.168.128.1` to `.254` in host mode.
    pub const fn of(mode: NetworkMode) -> Self {
        let third = match mode {
            NetworkMode::Shared => 64,
            NetworkMode::Host => 128,
        };
        Self {
            gateway: Ipv4Addr::new(192, 168, third, 1),
            end: Ipv4Addr::new(192, 168, third, 254),
            mask: Ipv4Addr::new(255, 255, 255, 0),
        }
    }

    /// Checks whether a network can have these addresses.
    ///
    /// # Errors
    ///
    /// Returns the first rule that is broken.
    pub fn check(&self) -> Result<(), NetworkConfigError> {
        let (gateway, end, mask) =
            (u32::from(self.gateway), u32::from(self.end), u32::from(self.mask));
        if mask.leading_ones() + mask.trailing_zeros() != 32 || mask == 0 {
            return Err(NetworkConfigError::Mask { mask: self.mask });
        }
        if mask.leading_ones() > 30 {
            return Err(NetworkConfigError::SubnetTooSmall { mask: self.mask });
        }
        if !is_private(self.gateway, mask) {
            return Err(NetworkConfigError::NotPrivate { gateway: self.gateway, mask: self.mask });
        }
        if !is_host(gateway, mask) {
            return Err(NetworkConfigError::Gateway { gateway: self.gateway, mask: self.mask });
        }
        if end & mask != gateway & mask || !is_host(end, mask) {
            return Err(NetworkConfigError::End {
                end: self.end,
                gateway: self.gateway,
                mask: self.mask,
            });
        }
        if end <= gateway {
            return Err(NetworkConfigError::Empty { gateway: self.gateway, end: self.end });
        }
        Ok(())
    }
}

impl Default for AddressRange {
    fn default() -> Self {
        Self::of(NetworkMode::default())
    }
}

/// Returns whether an address is neither the first nor the last of its subnet.
fn is_host(address: u32, mask: u32) -> bool {
    let host = address & !mask;
    host != 0 && host != !mask
}

/// Returns whether the whole subnet is for private use.
fn is_private(address: Ipv4Addr, mask: u32) -> bool {
    let network = u32::from(address) & mask;
    address.is_private()
        && Ipv4Addr::from(network).is_private()
        && Ipv4Addr::from(network | !mask).is_private()
}

/// The settings of a network. Start from [`NetworkConfig::of`] and change the public fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Whether there is a gateway, with a DHCP server. Without one the network is a switch and no
    /// more: it answers nothing, and has no address of its own.
    pub gateway: bool,
    /// What guests can reach. Without a gateway it means nothing.
    pub mode: NetworkMode,
    /// The addresses. Without a gateway they mean nothing.
    pub ipv4: AddressRange,
    /// The IPv6 prefix and name servers, or `None` for a network on which the gateway has no IPv6. Guests
    /// exchange IPv6 packets with each other either way.
    pub ipv6: Option<Ipv6Config>,
    /// The length of the largest IP packet. It must be from 1,280 (the least that IPv6 needs) to
    /// 65,521 (what an untagged Ethernet frame of at most 65,535 bytes holds). DHCP and router
    /// advertisements tell it to the guests.
    pub mtu: u32,
    /// How many buffers one port can have posted. It is rounded up to a power of two.
    pub inbox_depth: u32,
    /// How many packets can wait for one port while it has no buffer posted. It is rounded up to a
    /// power of two; with 0 no packet waits. The default, `None`, is as many as fit in 512 KiB, but
    /// at least 16 and at most 256. Memory is touched only as far as it is used.
    pub overflow_depth: Option<u32>,
    /// How long a DHCP lease lasts.
    pub lease_time: Duration,
    /// A learned MAC address is forgotten when no frame has come from it for this long.
    pub mac_ageing: Duration,
    /// The name servers that DHCP tells the guests. The network has none of its own.
    pub dns: Vec<Ipv4Addr>,
    /// The first address that DHCP gives out to guests without a reservation. The default, `None`,
    /// is the one after the gateway's. The last is `ipv4.end`.
    pub dhcp_first: Option<Ipv4Addr>,
    /// The addresses that DHCP keeps for one guest each. They can be any of the subnet.
    pub reservations: Vec<(MacAddr6, Ipv4Addr)>,
    /// The file that remembers the leases. Without one, DHCP finds most addresses again because
    /// they follow from the guests' MAC addresses; see [`dhcp`](crate::dhcp). Each network needs a
    /// file of its own.
    pub lease_file: Option<PathBuf>,
    /// Whether packets for other networks go to a [router](crate::router), and which settings that has, as
    /// names and values. The network only compares them. With `None`, the gateway answers that there is no
    /// way. A router needs a gateway.
    pub router: Option<Vec<(&'static str, String)>>,
    /// How many threads drive the router, within [`ROUTER_WORKERS_RANGE`].
    /// Each has frames of its own. The default is 1.
    pub router_workers: usize,
}

impl NetworkConfig {
    /// Returns the configuration that vmnet has for a mode: its addresses, an MTU of 1,500, and
    /// leases of a day. The gateway has no IPv6. Learned addresses age after 300 seconds.
    pub fn of(mode: NetworkMode) -> Self {
        Self {
            gateway: true,
            mode,
            ipv4: AddressRange::of(mode),
            ipv6: None,
            mtu: DEFAULT_MTU,
            inbox_depth: DEFAULT_INBOX_DEPTH,
            overflow_depth: None,
            lease_time: DEFAULT_LEASE_TIME,
            mac_ageing: DEFAULT_MAC_AGEING,
            dns: Vec::new(),
            dhcp_first: None,
            reservations: Vec::new(),
            lease_file: None,
            router: None,
            router_workers: 1,
        }
    }

    /// Returns the configuration of a switch: a network without a gateway and DHCP, with an MTU of
    /// 1,500. Learned addresses age after 300 seconds.
    pub fn switch() -> Self {
        Self { gateway: false, ..Self::of(NetworkMode::Shared) }
    }

    /// Returns the length of the longest frame: the MTU, an Ethernet header, and a VLAN tag.
    pub fn max_packet_size(&self) -> usize {
        self.mtu as usize + ETHERNET_HEADER_LEN + VLAN_TAG_LEN
    }

    /// Returns the first address for guests without a reservation.
    pub fn dhcp_first(&self) -> Ipv4Addr {
        self.dhcp_first.unwrap_or_else(|| (u32::from(self.ipv4.gateway) + 1).into())
    }

    /// Returns the depth of the overflow ring of a port whose packets have at most `longest` bytes: the
    /// configured one, or the default for such packets.
    pub(crate) fn overflow(&self, longest: usize) -> u32 {
        self.overflow_depth.unwrap_or_else(|| {
            let fitting = (DEFAULT_OVERFLOW_BYTES / longest) as u32;
            let depths = DEFAULT_OVERFLOW_DEPTH_RANGE;
            fitting.clamp(*depths.start(), *depths.end())
        })
    }

    /// Says in which settings this configuration, which a network has, differs from `asked`, such as
    /// `with mtu 1500 and not 9000`.
    pub(crate) fn differences(&self, asked: &Self) -> String {
        let range = |range: &AddressRange| {
            let AddressRange { gateway, end, mask } = range;
            format!("{gateway} to {end} with mask {mask}")
        };
        let depth = |depth: Option<u32>| depth.map_or("its default".to_owned(), |n| n.to_string());
        let first =
            |first: Option<Ipv4Addr>| first.map_or("its default".to_owned(), |a| a.to_string());
        let file = |file: &Option<PathBuf>| {
            file.as_ref().map_or("none".to_owned(), |file| format!("'{}'", file.display()))
        };
        let reserve = |kept: &[(MacAddr6, Ipv4Addr)]| {
            let kept: Vec<_> =
                kept.iter().map(|(mac, address)| format!("{mac}={address}")).collect();
            format!("[{}]", kept.join(", "))
        };
        let ipv6 = |ipv6: &Option<Ipv6Config>| match ipv6 {
            Some(Ipv6Config { prefix, dns }) if dns.is_empty() => format!("{prefix}/64"),
            Some(Ipv6Config { prefix, dns }) => format!("{prefix}/64 with dns {dns:?}"),
            None => "none".to_owned(),
        };
        let has = |gateway: bool| if gateway { "yes" } else { "no" }.to_owned();
        let mut rows = vec![
            ("gateway", has(self.gateway), has(asked.gateway)),
            ("mode", format!("{:?}", self.mode), format!("{:?}", asked.mode)),
            ("ipv4", range(&self.ipv4), range(&asked.ipv4)),
            ("ipv6", ipv6(&self.ipv6), ipv6(&asked.ipv6)),
            ("mtu", self.mtu.to_string(), asked.mtu.to_string()),
            ("inbox_depth", self.inbox_depth.to_string(), asked.inbox_depth.to_string()),
            ("overflow", depth(self.overflow_depth), depth(asked.overflow_depth)),
            ("lease_time", format!("{:?}", self.lease_time), format!("{:?}", asked.lease_time)),
            ("mac_ageing", format!("{:?}", self.mac_ageing), format!("{:?}", asked.mac_ageing)),
            ("dns", format!("{:?}", self.dns), format!("{:?}", asked.dns)),
            ("dhcp_range beginning at", first(self.dhcp_first), first(asked.dhcp_first)),
            ("reserve", reserve(&self.reservations), reserve(&asked.reservations)),
            ("lease_file", file(&self.lease_file), file(&asked.lease_file)),
            ("nat", has(self.router.is_some()), has(asked.router.is_some())),
        ];
        if let (Some(router), Some(wanted)) = (&self.router, &asked.router) {
            let value = |of: &[(&str, String)], name: &str| {
                let found = of.iter().find(|(other, _)| *other == name);
                found.map_or("none".to_owned(), |(_, value)| value.clone())
            };
            let only_wanted = wanted.iter().filter(|(name, _)| value(router, name) == "none");
            for (name, _) in router.iter().chain(only_wanted) {
                rows.push((name, value(router, name), value(wanted, name)));
            }
        }
        let differing: Vec<_> = rows
            .iter()
            .filter(|(_, is, wanted)| is != wanted)
            .map(|(name, is, wanted)| format!("with {name} {is} and not {wanted}"))
            .collect();
        if differing.is_empty() { "with other settings".to_owned() } else { differing.join(", ") }
    }

    /// Checks whether a network can have this configuration.
    ///
    /// # Errors
    ///
    /// Returns the first rule that is broken.
    pub fn check(&self) -> Result<(), NetworkConfigError> {
        if self.gateway {
            self.ipv4.check()?;
        } else {
            let of_the_gateway = [
                ("dns", !self.dns.is_empty()),
                ("dhcp_first", self.dhcp_first.is_some()),
                ("reservations", !self.reservations.is_empty()),
                ("lease_file", self.lease_file.is_some()),
                ("router", self.router.is_some()),
                ("ipv6", self.ipv6.is_some()),
            ];
            if let Some((setting, _)) = of_the_gateway.iter().find(|(_, set)| *set) {
                return Err(NetworkConfigError::NoGateway { setting });
            }
        }
        if let Some(first) = self.dhcp_first
            && !(first > self.ipv4.gateway && first <= self.ipv4.end)
        {
            let AddressRange { gateway, end, .. } = self.ipv4;
            return Err(NetworkConfigError::First { first, gateway, end });
        }
        for (index, (mac, address)) in self.reservations.iter().enumerate() {
            let before = &self.reservations[..index];
            if before.iter().any(|(other, taken)| other == mac || taken == address) {
                return Err(NetworkConfigError::ReservedTwice { mac: *mac, address: *address });
            }
        }
        if !ROUTER_WORKERS_RANGE.contains(&self.router_workers) {
            return Err(NetworkConfigError::RouterWorkers { workers: self.router_workers });
        }
        if !MTU_RANGE.contains(&self.mtu) {
            return Err(NetworkConfigError::Mtu { mtu: self.mtu });
        }
        if !INBOX_DEPTH_RANGE.contains(&self.inbox_depth) {
            return Err(NetworkConfigError::InboxDepth { depth: self.inbox_depth });
        }
        match self.overflow_depth {
            Some(depth) if depth > MAX_OVERFLOW_DEPTH => {
                return Err(NetworkConfigError::OverflowDepth { depth });
            }
            _ => {}
        }
        if !LEASE_SECONDS_RANGE.contains(&self.lease_time.as_secs()) {
            return Err(NetworkConfigError::LeaseTime { lease_time: self.lease_time });
        }
        if !MAC_AGEING_SECONDS_RANGE.contains(&self.mac_ageing.as_secs()) {
            return Err(NetworkConfigError::MacAgeing { mac_ageing: self.mac_ageing });
        }
        if self.dns.len() > MAX_DNS_SERVERS {
            return Err(NetworkConfigError::Dns { count: self.dns.len() });
        }
        if let Some(ipv6) = &self.ipv6 {
            if !ipv6.has_valid_prefix() {
                return Err(NetworkConfigError::Ipv6Prefix { prefix: ipv6.prefix });
            }
            if ipv6.dns.len() > MAX_DNS_SERVERS {
                return Err(NetworkConfigError::Dns { count: ipv6.dns.len() });
            }
            if let Some(address) = ipv6.invalid_dns() {
                return Err(NetworkConfigError::Ipv6Dns { address });
            }
        }
        Ok(())
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self::of(NetworkMode::default())
    }
}

/// The error when a configuration is invalid: the rule that it breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkConfigError {
    /// The one bits of the mask are not contiguous, or there are none.
    #[error(
        "{mask} is not a subnet mask: its one bits must be contiguous, from the first bit on, as in 255.255.255.0"
    )]
    Mask {
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The subnet is too small.
    #[error(
        "a subnet with mask {mask} is too small for a gateway and a guest; use 255.255.255.252 or \
         wider"
    )]
    SubnetTooSmall {
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The subnet is not within one of the ranges for private use.
    #[error(
        "the subnet of {gateway} with mask {mask} is not for private use; take one within \
         10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16"
    )]
    NotPrivate {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The gateway's address is the first or last of its subnet.
    #[error(
        "{gateway} cannot be the gateway: with mask {mask} it is the first or last address of the \
         subnet; use one between them"
    )]
    Gateway {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The range ends outside the subnet, or on its broadcast address.
    #[error(
        "the range of the gateway {gateway} cannot end at {end}: with mask {mask} no host of its \
         subnet can have that address"
    )]
    End {
        /// The end of the range.
        end: Ipv4Addr,
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The range has no address for a guest.
    #[error(
        "no address is left for guests: the range ends at {end}, and must end after the gateway \
         {gateway}"
    )]
    Empty {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The end of the range.
        end: Ipv4Addr,
    },
    /// The range of DHCP begins outside the subnet's range.
    #[error(
        "the addresses for guests cannot begin at {first}; they lie after {gateway} and end at {end}"
    )]
    First {
        /// The first address for guests.
        first: Ipv4Addr,
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The end of the range.
        end: Ipv4Addr,
    },
    /// A setting of the gateway or its DHCP server, on a network that has none.
    #[error("the setting {setting} is for a gateway, and the network has none: leave it out")]
    NoGateway {
        /// The name of the setting.
        setting: &'static str,
    },
    /// A guest or an address is in two reservations.
    #[error("the reservation of {address} for {mac} contradicts another one")]
    ReservedTwice {
        /// The guest.
        mac: MacAddr6,
        /// The address.
        address: Ipv4Addr,
    },
    /// An address cannot be reserved.
    #[error("an address cannot be reserved: {error}")]
    Reservation {
        /// Why not.
        error: ReserveError,
    },
    /// The lease file cannot be used.
    #[error(transparent)]
    LeaseFile {
        /// Why not.
        error: LeaseFileError,
    },
    /// The number of the router's workers is outside [`ROUTER_WORKERS_RANGE`].
    #[error("a router with {workers} workers is not possible; it has from 1 to 8")]
    RouterWorkers {
        /// The number asked for.
        workers: usize,
    },
    /// The MTU is out of range.
    #[error("an MTU of {mtu} is not possible; it must be from 1280 to 65521")]
    Mtu {
        /// The MTU.
        mtu: u32,
    },
    /// The number of posted buffers is out of range.
    #[error("an inbox_depth of {depth} buffers is not possible; it must be from 1 to 65536")]
    InboxDepth {
        /// The depth.
        depth: u32,
    },
    /// The overflow ring is too long.
    #[error("an overflow of {depth} waiting packets is not possible; it must be at most 65536")]
    OverflowDepth {
        /// The depth.
        depth: u32,
    },
    /// The lease time is out of range.
    #[error("a lease_time of {lease_time:?} is not possible; it must be from 10 to 2^32-1 seconds")]
    LeaseTime {
        /// The lease time.
        lease_time: Duration,
    },
    /// The ageing time is out of range.
    #[error("a mac_ageing of {mac_ageing:?} is not possible; it must be from a second to a day")]
    MacAgeing {
        /// The ageing time.
        mac_ageing: Duration,
    },
    /// Too many name servers.
    #[error("a network cannot announce {count} name servers (dns); it must be at most 3")]
    Dns {
        /// The number of name servers.
        count: usize,
    },
    /// The IPv6 prefix is not one of 64 bits for hosts.
    #[error(
        "{prefix}/64 cannot be the prefix of a network; take one within fd00::/8, or a global one, whose \
         last 64 bits are 0"
    )]
    Ipv6Prefix {
        /// The prefix.
        prefix: Ipv6Addr,
    },
    /// A name server's IPv6 address is unspecified, loopback or multicast.
    #[error("a name server (dns) cannot have the address {address}, because no guest can reach it")]
    Ipv6Dns {
        /// The address.
        address: Ipv6Addr,
    },
}
