//! The settings of a DHCP server, and what it tells about itself.

use core::net::Ipv4Addr;
use core::time::Duration;

use macaddr::MacAddr6;

/// The settings of a [`DhcpServer`](super::DhcpServer): what it gives out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpConfig {
    /// The server's own address.
    pub server: Ipv4Addr,
    /// The server's own MAC address, the source of its replies.
    pub server_mac: MacAddr6,
    /// The first address for clients without a reservation.
    pub first: Ipv4Addr,
    /// The last address for clients without a reservation. If the range is wider than 65,536
    /// addresses, only the first 65,536 are used.
    pub last: Ipv4Addr,
    /// The subnet's mask.
    pub mask: Ipv4Addr,
    /// The router that clients are told, if there is one.
    pub router: Option<Ipv4Addr>,
    /// The name servers that clients are told. Only the first three are used.
    pub dns: Vec<Ipv4Addr>,
    /// The MTU that clients are told.
    pub mtu: Option<u16>,
    /// How long a lease lasts. It is at least one second, and at most 2^32-1 seconds.
    pub lease_time: Duration,
}

impl DhcpConfig {
    pub(crate) fn lease_time(&self) -> Duration {
        self.lease_time.clamp(Duration::from_secs(1), Duration::from_secs(u32::MAX.into()))
    }

    pub(crate) fn is_on_subnet(&self, address: Ipv4Addr) -> bool {
        let mask = u32::from(self.mask);
        u32::from(address) & mask == u32::from(self.server) & mask
    }

    /// Whether a client can have the address: it is on the subnet, and neither its first, nor its
    /// last, nor the server's.
    pub(crate) fn is_host(&self, address: Ipv4Addr) -> bool {
        let host = u32::from(address) & !u32::from(self.mask);
        self.is_on_subnet(address)
            && host != 0
            && host != !u32::from(self.mask)
            && address != self.server
    }

    pub(crate) fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.server) | !u32::from(self.mask))
    }
}

/// An address that a client has been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DhcpLease {
    /// The client.
    pub mac: MacAddr6,
    /// The address it has.
    pub address: Ipv4Addr,
    /// How long the lease still lasts.
    pub remaining: Duration,
}

/// The station that has an address, as far as a server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressHolder {
    /// The address.
    pub address: Ipv4Addr,
    /// The station that has it.
    pub mac: MacAddr6,
    /// The number of the interface behind which the station was seen last, if that is known and the
    /// interface has not left since.
    pub port: Option<u32>,
    /// Whether the server has given it the address. If not, the station was seen to use it.
    pub leased: bool,
}

/// The error when an address cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// No client of the subnet can have the address.
    #[error("{0} is not an address that the DHCP server can give out")]
    OutOfRange(Ipv4Addr),
    /// Another client has the address, or has it reserved.
    #[error("{address} already belongs to {holder}")]
    Taken {
        /// The address asked for.
        address: Ipv4Addr,
        /// The client that has it.
        holder: MacAddr6,
    },
}

/// The counters of a [`DhcpServer`](super::DhcpServer). Each message that it is given is in one of
/// those from `offers` to `unsent`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DhcpStats {
    /// Offers of an address.
    pub offers: u64,
    /// Requests that were granted, and `INFORM` messages that were answered.
    pub acks: u64,
    /// Requests that were refused.
    pub naks: u64,
    /// Leases that clients released.
    pub releases: u64,
    /// Addresses that clients declined because they found them in use.
    pub declines: u64,
    /// Clients that got no answer because no address was free.
    pub exhausted: u64,
    /// Clients that got no answer yet, because the server asks by ARP whether the address is in
    /// use. They are answered when they retransmit.
    pub probing: u64,
    /// Messages that concern an offer of another server, or are meant for one.
    pub other_server: u64,
    /// Messages that a client sent in the name of another that speaks for itself.
    pub foreign: u64,
    /// Messages of relay agents that are not on the server's subnet. It has no addresses for the
    /// clients behind them.
    pub other_subnet: u64,
    /// Releases and declines of an address that the client does not have.
    pub no_lease: u64,
    /// Messages that were invalid.
    pub malformed: u64,
    /// Replies for which the caller's buffer was too short.
    pub unsent: u64,
    /// Requests that were granted to a client which calls itself by what is no host name. They are counted
    /// in `acks` too.
    pub bad_names: u64,
    /// How often a station claimed an address by ARP that another client had or was being offered.
    /// This counts no message of DHCP.
    pub conflicts: u64,
}
