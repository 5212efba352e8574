//! The options of the way out that the embedded network has.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use clap::Args;
use vmring::Embedded;
use vmring::device::embedded::nat::{ForwardRule, HostPort, NatSettings, Rule};

use crate::failure::Failure;

/// The port of resolvers.
const DNS_PORT: u16 = 53;

/// Options of the way out of an embedded network in shared mode.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
#[command(next_help_heading = "Way out (embedded network in shared mode)")]
pub(crate) struct NatArgs {
    /// Lead ports of the host to a guest, like 8080=192.168.64.2:80 or 0.0.0.0:5000-5009=192.168.64.2,udp;
    /// can be repeated. Without an address the host's loopback address is listened at. The guest may
    /// also be named by its MAC address
    #[arg(long, value_name = "[ADDRESS:]PORT[-LAST]=GUEST[:PORT][,udp]")]
    pub(crate) forward: Vec<ForwardRule>,
    /// Keep guests from reaching these destinations, like 10.0.0.0/8 or 0.0.0.0/0:25,tcp; can be repeated
    #[arg(long, value_name = "PREFIX[:PORT[-LAST]][,tcp|,udp]")]
    pub(crate) deny: Vec<Rule>,
    /// Let guests reach these destinations although a shorter prefix denies them; can be repeated
    #[arg(long, value_name = "PREFIX[:PORT[-LAST]][,tcp|,udp]")]
    pub(crate) allow: Vec<Rule>,
    /// Let guests reach this port of the host's loopback address at the gateway's address, like 8080 or
    /// 53,udp; can be repeated. Over IPv6 it is that of ::1
    #[arg(long, value_name = "PORT[,udp]")]
    pub(crate) host_port: Vec<HostPort>,
    /// Ask this resolver when guests ask the gateway for names; can be repeated
    /// [default: the host's resolvers]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dns: Vec<IpAddr>,
    /// The first addresses of guests over IPv6 [default: a private prefix that follows from the network's
    /// name]
    #[arg(long, value_name = "PREFIX/64", value_parser = prefix)]
    pub(crate) ipv6: Option<Ipv6Addr>,
    /// Leave the network without IPv6
    #[arg(long, conflicts_with = "ipv6")]
    pub(crate) no_ipv6: bool,
    /// Leave guests without a way out
    #[arg(long, conflicts_with_all = ["forward", "deny", "allow", "host_port", "dns"])]
    pub(crate) no_nat: bool,
}

/// Reads a prefix of 64 bits.
fn prefix(text: &str) -> Result<Ipv6Addr, String> {
    let wrong =
        || format!("'{text}' is no prefix of IPv6 with 64 bits, like fd12:3456:789a:1::/64");
    text.strip_suffix("/64").and_then(|address| address.parse().ok()).ok_or_else(wrong)
}

impl NatArgs {
    /// Refuses the options where there is no embedded network, or where there are two.
    pub(crate) fn check(&self, networks: usize) -> Result<(), Failure> {
        if networks == 1 || *self == Self::default() {
            return Ok(());
        }
        let given = if self.no_nat {
            "--no-nat"
        } else if !self.forward.is_empty() {
            "--forward"
        } else if !self.deny.is_empty() {
            "--deny"
        } else if !self.allow.is_empty() {
            "--allow"
        } else if !self.host_port.is_empty() {
            "--host-port"
        } else if !self.dns.is_empty() {
            "--dns"
        } else if self.no_ipv6 {
            "--no-ipv6"
        } else {
            "--ipv6"
        };
        let why = match networks {
            0 => "nothing here is an embedded network, which has a way out of its own",
            _ => "both ends are embedded networks, and each would have a way out of its own",
        };
        Err(Failure::Usage(format!("{given} cannot be used: {why}")))
    }

    /// Gives a driver of the embedded network these settings.
    pub(crate) fn embedded(&self, driver: Embedded) -> Embedded {
        let driver = match self.ipv6 {
            _ if self.no_ipv6 => driver.no_ipv6(),
            None => driver,
            prefix => driver.ipv6(prefix),
        };
        if self.no_nat {
            return driver.no_nat();
        }
        let forwards = self.forward.iter().fold(self.rules(), |rules, one| rules.forward(*one));
        driver.nat(forwards)
    }

    /// Whether a port of the host is forwarded that takes a privilege to listen on.
    pub(crate) fn has_low_port(&self) -> bool {
        self.forward.iter().any(|rule| (1..1024).contains(&rule.port))
    }

    /// The settings without the forwards.
    fn rules(&self) -> NatSettings {
        let settings = self.deny.iter().fold(NatSettings::new(), |all, one| all.deny(*one));
        let settings = self.allow.iter().fold(settings, |all, one| all.allow(*one));
        let settings = self.host_port.iter().fold(settings, |all, one| all.host_port(*one));
        if self.dns.is_empty() {
            return settings;
        }
        settings.resolvers(self.dns.iter().map(|address| SocketAddr::new(*address, DNS_PORT)))
    }
}
