//! The options of the way out that the embedded network has.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use clap::Args;
use vmring::Embedded;
use vmring::device::embedded::nat::{ForwardRule, HostPort, Limits, NatSettings, Rule};

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
    #[arg(long, value_name = "ADDRESS", value_parser = resolver)]
    pub(crate) dns: Vec<IpAddr>,
    /// The first addresses of guests over IPv6 [default: a private prefix that follows from the network's
    /// name]
    #[arg(long, value_name = "PREFIX/64", value_parser = prefix)]
    pub(crate) ipv6: Option<Ipv6Addr>,
    /// Leave the network without IPv6
    #[arg(long, conflicts_with = "ipv6")]
    pub(crate) no_ipv6: bool,
    /// Change how far guests can make something grow: flows, half-open, udp-flows, echo-flows,
    /// dns-pending, new-flows-per-second, kernel-memory (bytes) or descriptors; a guest has at most three
    /// quarters of each; can be repeated
    #[arg(long, value_name = "NAME=NUMBER")]
    pub(crate) limit: Vec<Limit>,
    /// Translate by so many threads, from 1 to 8, each with flows of its own; the limits hold for all of
    /// them together [default: 1]
    #[arg(long, value_name = "NUMBER", value_parser = workers)]
    pub(crate) nat_workers: Option<usize>,
    /// Leave guests without a way out
    #[arg(long, conflicts_with_all = ["forward", "deny", "allow", "host_port", "dns", "limit", "nat_workers"])]
    pub(crate) no_nat: bool,
}

/// Reads a prefix of 64 bits.
fn prefix(text: &str) -> Result<Ipv6Addr, String> {
    let wrong =
        || format!("'{text}' is no prefix of IPv6 with 64 bits, like fd12:3456:789a:1::/64");
    text.strip_suffix("/64").and_then(|address| address.parse().ok()).ok_or_else(wrong)
}

/// Reads the address of a resolver.
fn resolver(text: &str) -> Result<IpAddr, String> {
    let wrong = |_| format!("'{text}' is no IP address, and the port of resolvers is {DNS_PORT}");
    text.parse().map_err(wrong)
}

/// Reads a number of threads.
fn workers(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| NatSettings::WORKERS.contains(number));
    let (least, most) = (NatSettings::WORKERS.start(), NatSettings::WORKERS.end());
    number.ok_or_else(|| format!("'{text}' is no number from {least} to {most}"))
}

impl NatArgs {
    /// Refuses the options where there is no embedded network, or where there are two.
    pub(crate) fn check(&self, networks: usize) -> Result<(), Failure> {
        if networks == 1 || !self.is_given() {
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
        } else if !self.limit.is_empty() {
            "--limit"
        } else if self.nat_workers.is_some() {
            "--nat-workers"
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

    /// Whether there is any of the options.
    pub(crate) fn is_given(&self) -> bool {
        *self != Self::default()
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

    /// How many descriptors the way out has at most.
    pub(crate) fn descriptors(&self) -> u64 {
        if self.no_nat { 0 } else { self.limits().descriptors as u64 }
    }

    /// The limits, with those that are given.
    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        self.limit.iter().for_each(|one| one.apply(&mut limits));
        limits
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
        let settings =
            if self.limit.is_empty() { settings } else { settings.limits(self.limits()) };
        let settings = self.nat_workers.iter().fold(settings, |all, one| all.workers(*one));
        if self.dns.is_empty() {
            return settings;
        }
        settings.resolvers(self.dns.iter().map(|address| SocketAddr::new(*address, DNS_PORT)))
    }
}

/// A limit of the way out, as an option names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    what: Limited,
    most: u64,
}

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limited {
    Flows,
    HalfOpen,
    UdpFlows,
    EchoFlows,
    DnsPending,
    NewFlowsPerSecond,
    KernelMemory,
    Descriptors,
}

/// Their names.
const LIMITED: [(&str, Limited); 8] = [
    ("flows", Limited::Flows),
    ("half-open", Limited::HalfOpen),
    ("udp-flows", Limited::UdpFlows),
    ("echo-flows", Limited::EchoFlows),
    ("dns-pending", Limited::DnsPending),
    ("new-flows-per-second", Limited::NewFlowsPerSecond),
    ("kernel-memory", Limited::KernelMemory),
    ("descriptors", Limited::Descriptors),
];
/// The most that a table of flows may be told to hold, so that a number is not taken for a size of memory.
const MOST: u64 = 10_000_000;

impl Limit {
    /// Sets it, and the part of it that one guest has.
    fn apply(self, limits: &mut Limits) {
        let most = self.most as usize;
        let part = most - most / 4;
        let port = &mut limits.port;
        match self.what {
            Limited::Flows => (limits.flows, port.flows) = (most, part),
            Limited::HalfOpen => (limits.half_open, port.half_open) = (most, part),
            Limited::UdpFlows => (limits.udp_flows, port.udp_flows) = (most, part),
            Limited::EchoFlows => (limits.echo_flows, port.echo_flows) = (most, part),
            Limited::DnsPending => (limits.dns_pending, port.dns_pending) = (most, part),
            Limited::NewFlowsPerSecond => {
                (limits.new_flows_per_second, port.new_flows_per_second) =
                    (most as u32, part as u32);
            }
            Limited::KernelMemory => {
                (limits.kernel_memory, port.kernel_memory) = (self.most, self.most - self.most / 4);
            }
            Limited::Descriptors => (limits.descriptors, port.descriptors) = (most, part),
        }
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let names: Vec<&str> = LIMITED.iter().map(|(name, _)| *name).collect();
            format!("a limit must be NAME=NUMBER with one of the names {}", names.join(", "))
        };
        let (name, number) = text.split_once('=').ok_or_else(wrong)?;
        let (_, what) = *LIMITED.iter().find(|(of, _)| *of == name).ok_or_else(wrong)?;
        let most = number.parse().map_err(|_| wrong())?;
        if what != Limited::KernelMemory && most > MOST {
            return Err(format!("{name} must be at most {MOST}"));
        }
        Ok(Self { what, most })
    }
}

impl Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = LIMITED.iter().find(|(_, what)| *what == self.what).map_or("", |(name, _)| name);
        write!(f, "{name}={}", self.most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_holds_for_the_network_and_three_quarters_of_it_for_a_guest() {
        let of = |text: &str| {
            let mut limits = Limits::default();
            text.parse::<Limit>().expect("a limit").apply(&mut limits);
            limits
        };
        let limits = of("flows=400");
        assert_eq!((limits.flows, limits.port.flows), (400, 300));
        assert_eq!(of("half-open=4").port.half_open, 3);
        assert_eq!(of("udp-flows=1").port.udp_flows, 1);
        assert_eq!(of("echo-flows=8").port.echo_flows, 6);
        assert_eq!(of("dns-pending=0").port.dns_pending, 0);
        let limits = of("new-flows-per-second=8000");
        assert_eq!((limits.new_flows_per_second, limits.port.new_flows_per_second), (8000, 6000));
        assert_eq!(of("kernel-memory=99999999999").kernel_memory, 99_999_999_999);
        assert_eq!(of("kernel-memory=8").port.kernel_memory, 6);
        let limits = of("descriptors=80");
        assert_eq!((limits.descriptors, limits.port.descriptors), (80, 60));
        // The numbers that nobody changes stay: a guest has three quarters of them, too.
        for (name, what) in LIMITED {
            let mut limits = Limits::default();
            let most = match what {
                Limited::Flows => limits.flows as u64,
                Limited::HalfOpen => limits.half_open as u64,
                Limited::UdpFlows => limits.udp_flows as u64,
                Limited::EchoFlows => limits.echo_flows as u64,
                Limited::DnsPending => limits.dns_pending as u64,
                Limited::NewFlowsPerSecond => limits.new_flows_per_second.into(),
                Limited::KernelMemory => limits.kernel_memory,
                Limited::Descriptors => limits.descriptors as u64,
            };
            let limit: Limit = format!("{name}={most}").parse().expect("a limit");
            assert_eq!(limit.to_string(), format!("{name}={most}"));
            limit.apply(&mut limits);
            assert_eq!(limits, Limits::default(), "{name}");
        }
    }

    /// The numbers that the guide page has are those of the code.
    #[test]
    fn the_guide_has_the_limits() {
        let limits = Limits::default();
        let port = limits.port;
        let of = |what| match what {
            Limited::Flows => (limits.flows as u64, port.flows as u64),
            Limited::HalfOpen => (limits.half_open as u64, port.half_open as u64),
            Limited::UdpFlows => (limits.udp_flows as u64, port.udp_flows as u64),
            Limited::EchoFlows => (limits.echo_flows as u64, port.echo_flows as u64),
            Limited::DnsPending => (limits.dns_pending as u64, port.dns_pending as u64),
            Limited::NewFlowsPerSecond => {
                (limits.new_flows_per_second.into(), port.new_flows_per_second.into())
            }
            Limited::KernelMemory => (limits.kernel_memory, port.kernel_memory),
            Limited::Descriptors => (limits.descriptors as u64, port.descriptors as u64),
        };
        let guide = include_str!("../../docs/nat.md");
        for (name, what) in LIMITED {
            let (most, port) = of(what);
            let row = format!("\n| `{name}` | {most} | {port} | ");
            assert!(guide.contains(&row), "the guide has no row {row}");
        }
    }

    #[test]
    fn what_is_no_limit_is_refused_in_a_sentence() {
        for wrong in ["flows", "flow=3", "flows=", "flows=-1", "=4", "flows=many"] {
            let why = wrong.parse::<Limit>().unwrap_err();
            assert!(why.contains("NAME=NUMBER") && why.contains("half-open"), "{wrong}: {why}");
        }
        let why = "flows=10000001".parse::<Limit>().unwrap_err();
        assert!(why.contains("at most 10000000"), "{why}");
    }
}
