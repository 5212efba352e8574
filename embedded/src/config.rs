//! What a network is like: mode, addresses, MTU and sizes.

use core::net::Ipv4Addr;
use core::time::Duration;

use crate::limits::{
    DEFAULT_INBOX_DEPTH, DEFAULT_LEASE_TIME, DEFAULT_MAC_AGEING, DEFAULT_MTU,
    DEFAULT_OVERFLOW_BYTES, DEFAULT_OVERFLOW_DEPTH_RANGE, INBOX_DEPTH_RANGE, LEASE_SECONDS_RANGE,
    MAC_AGEING_SECONDS_RANGE, MAX_DNS_SERVERS, MAX_OVERFLOW_DEPTH, MTU_RANGE,
};

/// Bytes of an Ethernet header. A frame is longer than its IP packet by this.
pub(crate) const ETHERNET_HEADER_LEN: usize = 14;

/// What guests can reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NetworkMode {
    /// Each other and the gateway; DHCP names no router.
    Host,
    /// The same, and the gateway is their router.
    #[default]
    Shared,
}

/// The addresses of a network, as vmnet has them: the gateway is the first, the range it gives out
/// by DHCP begins behind it.
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
    /// What a network of this mode has unless told otherwise: `192.168.64.1` to `.254` in shared
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

    /// Whether a network can have these addresses.
    ///
    /// # Errors
    ///
    /// A sentence on the first rule that is broken.
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

/// Whether an address is neither its subnet's first nor its last.
fn is_host(address: u32, mask: u32) -> bool {
    let host = address & !mask;
    host != 0 && host != !mask
}

/// Whether the whole subnet is for private use.
fn is_private(address: Ipv4Addr, mask: u32) -> bool {
    let network = u32::from(address) & mask;
    address.is_private()
        && Ipv4Addr::from(network).is_private()
        && Ipv4Addr::from(network | !mask).is_private()
}

/// How a network is made. The fields are public: start from [`NetworkConfig::of`] a mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// What guests can reach.
    pub mode: NetworkMode,
    /// The addresses.
    pub ipv4: AddressRange,
    /// The largest IP packet, from 1,280 (the least IPv6 works with) to 65,521 (what an Ethernet
    /// frame of at most 65,535 bytes holds). DHCP tells it to the guests.
    pub mtu: u32,
    /// How many buffers one port can have posted; rounded up to a power of two.
    pub inbox_depth: u32,
    /// How many packets wait for one port while it has no buffer posted; rounded up to a power of
    /// two, 0 for none. `None`: as many as fit in 512 KiB, but from 16 to 256. The memory is
    /// touched only as far as it is used.
    pub overflow_depth: Option<u32>,
    /// How long a DHCP lease lasts.
    pub lease_time: Duration,
    /// After how long a silence a learned MAC address is forgotten.
    pub mac_ageing: Duration,
    /// The name servers DHCP tells the guests. The network has none of its own.
    pub dns: Vec<Ipv4Addr>,
}

impl NetworkConfig {
    /// The configuration vmnet has for a mode: its addresses, an MTU of 1,500, leases of a day.
    /// Learned addresses age after 300 seconds.
    pub fn of(mode: NetworkMode) -> Self {
        Self {
            mode,
            ipv4: AddressRange::of(mode),
            mtu: DEFAULT_MTU,
            inbox_depth: DEFAULT_INBOX_DEPTH,
            overflow_depth: None,
            lease_time: DEFAULT_LEASE_TIME,
            mac_ageing: DEFAULT_MAC_AGEING,
            dns: Vec::new(),
        }
    }

    /// The longest frame: the MTU and an Ethernet header.
    pub fn max_packet_size(&self) -> usize {
        self.mtu as usize + ETHERNET_HEADER_LEN
    }

    /// The overflow ring's cells, with the default worked out.
    pub(crate) fn overflow(&self) -> u32 {
        self.overflow_depth.unwrap_or_else(|| {
            let fitting = (DEFAULT_OVERFLOW_BYTES / self.max_packet_size()) as u32;
            let depths = DEFAULT_OVERFLOW_DEPTH_RANGE;
            fitting.clamp(*depths.start(), *depths.end())
        })
    }

    /// Whether a network can be made like this.
    ///
    /// # Errors
    ///
    /// A sentence on the first rule that is broken.
    pub fn check(&self) -> Result<(), NetworkConfigError> {
        self.ipv4.check()?;
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
        Ok(())
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self::of(NetworkMode::default())
    }
}

/// Why a network cannot be made as asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkConfigError {
    /// The mask has holes, or is empty.
    #[error("{mask} is not a subnet mask: its one bits must stand together in front")]
    Mask {
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The subnet is too small.
    #[error(
        "a subnet with mask {mask} has no room for a gateway and a guest; use 255.255.255.252 or \
         wider"
    )]
    SubnetTooSmall {
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The subnet is not private.
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
    /// The gateway has an address no host may have.
    #[error("{gateway} cannot be the gateway: with mask {mask} it is the first or last address")]
    Gateway {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The range ends outside the subnet, or on its broadcast address.
    #[error("{end} cannot end the range of {gateway}: with mask {mask} no host there has it")]
    End {
        /// The end of the range.
        end: Ipv4Addr,
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The mask.
        mask: Ipv4Addr,
    },
    /// The range has no address for a guest.
    #[error("no address is left for guests: the range ends at {end}, the gateway is {gateway}")]
    Empty {
        /// The gateway's address.
        gateway: Ipv4Addr,
        /// The end of the range.
        end: Ipv4Addr,
    },
    /// The MTU is out of range.
    #[error("an MTU of {mtu} is not possible; it must be from 1280 to 65521")]
    Mtu {
        /// The MTU.
        mtu: u32,
    },
    /// The number of posted buffers is out of range.
    #[error("{depth} posted buffers are not possible; it must be from 1 to 65536")]
    InboxDepth {
        /// The depth.
        depth: u32,
    },
    /// The overflow ring is too long.
    #[error("{depth} waiting packets are not possible; it must be at most 65536")]
    OverflowDepth {
        /// The depth.
        depth: u32,
    },
    /// The lease time is out of range.
    #[error("a lease of {lease_time:?} is not possible; it must be from 10 seconds to 2^32-1")]
    LeaseTime {
        /// The lease time.
        lease_time: Duration,
    },
    /// The ageing time is out of range.
    #[error("ageing after {mac_ageing:?} is not possible; it must be from a second to a day")]
    MacAgeing {
        /// The ageing time.
        mac_ageing: Duration,
    },
    /// Too many name servers.
    #[error("{count} name servers are too many; DHCP tells guests of at most 3")]
    Dns {
        /// How many.
        count: usize,
    },
}
