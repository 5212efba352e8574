//! The settings of the DHCP server that the embedded network and the TAP have in common.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use macaddr::MacAddr6;
use vmring_embedded::dhcp::DhcpStats;
use vmring_embedded::{AddressRange, NetworkConfig, NetworkMode};

use crate::error::ConfigError;

/// What an interface requests of the DHCP server on its network.
#[derive(Clone, Debug, Default)]
pub(crate) struct DhcpSettings {
    pub(crate) lease_time: Option<Duration>,
    /// The first and the last address for guests without a reservation.
    pub(crate) range: Option<(Ipv4Addr, Ipv4Addr)>,
    pub(crate) reservations: Vec<(MacAddr6, Ipv4Addr)>,
    pub(crate) lease_file: Option<PathBuf>,
}

impl DhcpSettings {
    /// Returns the configuration of a network with these addresses and settings, after a check that
    /// they fit.
    pub(crate) fn network(
        &self,
        mode: NetworkMode,
        addresses: AddressRange,
    ) -> Result<NetworkConfig, ConfigError> {
        let invalid = |error: String| ConfigError::Invalid(error);
        addresses.check().map_err(|error| invalid(error.to_string()))?;
        let mut config = NetworkConfig::of(mode);
        config.ipv4 = addresses;
        if let Some((first, last)) = self.range {
            if last < first {
                return Err(invalid(format!(
                    "the addresses for guests cannot begin at {first} and end at {last}"
                )));
            }
            config.dhcp_first = Some(first);
            config.ipv4.end = last;
        }
        config.lease_time = self.lease_time.unwrap_or(config.lease_time);
        config.reservations = self.reservations.clone();
        config.lease_file = self.lease_file.clone();
        config.check().map_err(|error| invalid(error.to_string()))?;
        Ok(config)
    }
}

/// The counters of a DHCP server, by name.
pub(crate) fn dhcp_counters(stats: &DhcpStats) -> [(&'static str, u64); 15] {
    [
        ("DHCP offers", stats.offers),
        ("DHCP acknowledgements", stats.acks),
        ("DHCP refusals", stats.naks),
        ("DHCP releases", stats.releases),
        ("DHCP declines", stats.declines),
        ("DHCP out of addresses", stats.exhausted),
        ("DHCP asked first", stats.probing),
        ("DHCP for another server", stats.other_server),
        ("DHCP for another client", stats.foreign),
        ("DHCP of another subnet", stats.other_subnet),
        ("DHCP without a lease", stats.no_lease),
        ("DHCP malformed", stats.malformed),
        ("DHCP without space", stats.unsent),
        ("DHCP bad names", stats.bad_names),
        ("DHCP conflicts", stats.conflicts),
    ]
}
