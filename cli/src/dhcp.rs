//! The options of the DHCP server of a network.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use vmring::{Embedded, MacAddr6};

use crate::failure::Failure;

/// Options of the DHCP server that the embedded network has, and a TAP in host and shared mode.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "DHCP server (embedded network, and a TAP in host and shared mode)")]
pub(crate) struct DhcpArgs {
    /// How long a guest's address is valid, at least 10 [default: 86400]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(10..))]
    pub(crate) lease_time: Option<u32>,
    /// The addresses for guests without a reservation, like 192.168.64.100-192.168.64.199
    /// [default: all after the gateway's]
    #[arg(long, value_name = "FIRST-LAST")]
    pub(crate) dhcp_range: Option<Range>,
    /// Keep an address for one guest, like 52:54:00:12:34:56=192.168.64.10; can be repeated
    #[arg(long, value_name = "MAC=ADDRESS")]
    pub(crate) reserve: Vec<Reservation>,
    /// Remember the leases in this file, so that a restart changes no address
    #[arg(long, value_name = "FILE")]
    pub(crate) lease_file: Option<PathBuf>,
}

/// Gives a driver the settings. Both drivers have these methods, and no trait.
macro_rules! with_settings {
    ($settings:expr, $driver:expr) => {{
        let mut driver = $driver;
        if let Some(seconds) = $settings.lease_time {
            driver = driver.lease_time(Duration::from_secs(seconds.into()));
        }
        if let Some(Range { first, last }) = $settings.dhcp_range {
            driver = driver.dhcp_range(first, last);
        }
        for one in &$settings.reserve {
            driver = driver.reserve(one.mac, one.address);
        }
        match &$settings.lease_file {
            Some(file) => driver.lease_file(file),
            None => driver,
        }
    }};
}

impl DhcpArgs {
    /// Refuses the options on a network that has no DHCP server of ours, or on two of them.
    pub(crate) fn check(&self, servers: usize) -> Result<(), Failure> {
        if servers == 1 || *self == Self::default() {
            return Ok(());
        }
        let given = if self.lease_time.is_some() {
            "--lease-time"
        } else if self.dhcp_range.is_some() {
            "--dhcp-range"
        } else if self.reserve.is_empty() {
            "--lease-file"
        } else {
            "--reserve"
        };
        let why = if servers == 0 {
            "nothing here has a DHCP server; the embedded network has one, and a TAP in host and \
             shared mode"
        } else {
            "both ends have a DHCP server; let one end be a TAP without a mode"
        };
        Err(Failure::Usage(format!("{given} cannot be used: {why}")))
    }

    /// Gives a driver of the embedded network these settings.
    pub(crate) fn embedded(&self, driver: Embedded) -> Embedded {
        with_settings!(self, driver)
    }

    /// Gives a driver of a TAP these settings.
    #[cfg(target_os = "linux")]
    pub(crate) fn tap(&self, driver: vmring::Tap) -> vmring::Tap {
        with_settings!(self, driver)
    }
}

/// The first and the last address of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = |part: &str| part.parse().ok();
        text.split_once('-')
            .and_then(|(first, last)| Some(Self { first: address(first)?, last: address(last)? }))
            .ok_or_else(|| {
                format!(
                    "a range must be FIRST-LAST, like 192.168.64.100-192.168.64.199, and not \
                     '{text}'"
                )
            })
    }
}

/// An address that is kept for one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    mac: MacAddr6,
    address: Ipv4Addr,
}

impl FromStr for Reservation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split_once('=')
            .and_then(|(mac, address)| {
                let mac = mac.parse().ok().filter(MacAddr6::is_unicast)?;
                Some(Self { mac, address: address.parse().ok()? })
            })
            .ok_or_else(|| {
                format!(
                    "a reservation must be MAC=ADDRESS, like 52:54:00:12:34:56=192.168.64.10, and \
                     not '{text}'"
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_reservations_are_read_or_refused_in_a_sentence() {
        let range: Range = "10.0.0.5-10.0.0.9".parse().unwrap();
        assert_eq!(range.first, Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(range.last, Ipv4Addr::new(10, 0, 0, 9));
        for wrong in ["", "10.0.0.5", "10.0.0.5-", "10.0.0.5-9", "10.0.0.5/24"] {
            let sentence = wrong.parse::<Range>().unwrap_err();
            assert!(sentence.contains("FIRST-LAST"), "{sentence}");
        }
        let one: Reservation = "52:54:00:12:34:56=10.0.0.7".parse().unwrap();
        assert_eq!(one.mac, MacAddr6::new(0x52, 0x54, 0, 0x12, 0x34, 0x56));
        assert_eq!(one.address, Ipv4Addr::new(10, 0, 0, 7));
        for wrong in ["", "10.0.0.7", "52:54:00:12:34=10.0.0.7", "01:00:5e:00:00:01=10.0.0.7"] {
            let sentence = wrong.parse::<Reservation>().unwrap_err();
            assert!(sentence.contains("MAC=ADDRESS"), "{sentence}");
        }
    }

    #[test]
    fn options_are_for_one_server() {
        let none = DhcpArgs::default();
        let some = DhcpArgs { lease_time: Some(60), ..DhcpArgs::default() };
        for servers in 0..3 {
            assert!(none.check(servers).is_ok());
            assert_eq!(some.check(servers).is_ok(), servers == 1);
        }
        let said = |args: DhcpArgs| args.check(0).unwrap_err().to_string();
        let file = DhcpArgs { lease_file: Some("leases".into()), ..DhcpArgs::default() };
        assert!(said(file).starts_with("--lease-file cannot be used: nothing here"));
        let reserve = vec!["52:54:00:12:34:56=10.0.0.7".parse().unwrap()];
        let reserve = DhcpArgs { reserve, ..DhcpArgs::default() };
        assert!(said(reserve).starts_with("--reserve cannot be used"));
    }
}
