//! The policy of a network, as data: [`PolicyRules`].
//!
//! Its answers come in this order:
//!
//! 1. The host address, if there is one, leads the ports that are named for it to the host's loopback
//!    address. Its other ports are denied.
//! 2. What is no place in the outside world is denied ([`forbidden`]), and so is the network's own
//!    subnet. No rule opens them.
//! 3. The host's own addresses are denied, unless [`HostAccess::Allow`] is chosen. No rule opens them.
//! 4. Of the rules that match, the one with the longest prefix decides; if there are several, one that
//!    denies. So the order of rules does not matter: `--deny 0.0.0.0/0 --allow 10.0.0.0/8` leaves
//!    10.0.0.0/8 only.
//! 5. What no rule matches is allowed.
//!
//! An IPv6 address that stands for an IPv4 address, as NAT64's do, has to pass 2 to 4 in both forms.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::str::FromStr;

use crate::policy::{Policy, Protocol, Request, Verdict, embedded_v4, forbidden};
use crate::prefix::{Prefix, PrefixError};
use crate::stats::Counter;

/// Why a text is no [`Rule`] or [`HostPort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RuleError {
    /// The prefix cannot be read.
    Prefix(PrefixError),
    /// The ports are no number from 1 to 65535, and no range of them.
    Ports,
    /// The port is no number from 1 to 65535.
    Port,
    /// The protocol is none of `tcp`, `udp` and `icmp`.
    Protocol,
    /// The rule names ports of ICMP, which has none.
    IcmpPorts,
}

impl fmt::Display for RuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefix(error) => return error.fmt(f),
            Self::Ports => "the ports are no number from 1 to 65535, and no range `first-last`",
            Self::Port => "the port is no number from 1 to 65535",
            Self::Protocol => "the protocol is not `tcp`, `udp` or `icmp`",
            Self::IcmpPorts => "ICMP has no ports",
        })
    }
}

impl std::error::Error for RuleError {}

/// Destinations: addresses, and perhaps ports and a protocol. A text has the form
/// `10.0.0.0/8:80-90,tcp`. Ports and protocol may be left out. An IPv6 address that is followed by
/// ports without a prefix length is in brackets, as in `[2001:db8::1]:443`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The addresses.
    pub prefix: Prefix,
    /// The first and the last port. `None` means all, and ICMP, which has none.
    pub ports: Option<(u16, u16)>,
    /// The protocol. `None` means all.
    pub protocol: Option<Protocol>,
}

impl Rule {
    /// Whether a destination is one of these.
    pub fn matches(&self, protocol: Protocol, destination: SocketAddr) -> bool {
        let ports = match self.ports {
            Some((first, last)) => {
                protocol != Protocol::IcmpEcho && (first..=last).contains(&destination.port())
            }
            None => true,
        };
        ports
            && self.protocol.is_none_or(|only| only == protocol)
            && self.prefix.contains(destination.ip())
    }
}

/// Cuts the protocol off the end of a text.
fn cut_protocol(text: &str) -> Result<(&str, Option<Protocol>), RuleError> {
    match text.rsplit_once(',') {
        None => Ok((text, None)),
        Some((rest, "tcp")) => Ok((rest, Some(Protocol::Tcp))),
        Some((rest, "udp")) => Ok((rest, Some(Protocol::Udp))),
        Some((rest, "icmp")) => Ok((rest, Some(Protocol::IcmpEcho))),
        Some(_) => Err(RuleError::Protocol),
    }
}

fn port(text: &str) -> Result<u16, RuleError> {
    let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok());
    number.flatten().filter(|&port| port > 0).ok_or(RuleError::Ports)
}

impl FromStr for Rule {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (rest, protocol) = cut_protocol(text)?;
        // The ports are behind the colon that is behind the prefix. IPv6 has colons of its own.
        let (prefix, ports) = if let Some((address, behind)) =
            rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
        {
            let (len, ports) = match behind.split_once(':') {
                Some((len, ports)) => (len, Some(ports)),
                None => (behind, None),
            };
            if !(len.is_empty() || len.starts_with('/')) || !address.contains(':') {
                return Err(RuleError::Prefix(PrefixError::Address));
            }
            (format!("{address}{len}"), ports)
        } else {
            let at = rest.find('/').unwrap_or(0);
            let one_colon = rest.matches(':').count() == 1;
            match rest[at..].find(':').filter(|_| at > 0 || one_colon) {
                Some(colon) => (rest[..at + colon].to_owned(), Some(&rest[at + colon + 1..])),
                None => (rest.to_owned(), None),
            }
        };
        let prefix = prefix.parse().map_err(RuleError::Prefix)?;
        let ports = match ports {
            None => None,
            Some(ports) => {
                let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
                let (first, last) = (port(first)?, port(last)?);
                if first > last {
                    return Err(RuleError::Ports);
                }
                if protocol == Some(Protocol::IcmpEcho) {
                    return Err(RuleError::IcmpPorts);
                }
                Some((first, last))
            }
        };
        Ok(Self { prefix, ports, protocol })
    }
}

/// Writes the form that [`FromStr`] reads.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.prefix)?;
        match self.ports {
            Some((first, last)) if first == last => write!(f, ":{first}")?,
            Some((first, last)) => write!(f, ":{first}-{last}")?,
            None => {}
        }
        self.protocol.map_or(Ok(()), |protocol| write!(f, ",{protocol}"))
    }
}

/// Whether guests reach the host's own addresses, where services listen that were not meant for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostAccess {
    /// They do not.
    #[default]
    Deny,
    /// They do, as other machines on the host's networks do.
    Allow,
}

/// A port of the host address, which leads to the same port of the host's loopback address. A text
/// has the form `8080` or `8080,tcp`; without a protocol it is TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// The port.
    pub port: u16,
    /// The protocol: TCP or UDP.
    pub protocol: Protocol,
}

impl FromStr for HostPort {
    type Err = RuleError;
    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (text, protocol) = cut_protocol(text)?;
        let protocol = protocol.unwrap_or(Protocol::Tcp);
        if protocol == Protocol::IcmpEcho {
            return Err(RuleError::IcmpPorts);
        }
        let port = port(text).map_err(|_| RuleError::Port)?;
        Ok(Self { port, protocol })
    }
}

/// Writes the form that [`FromStr`] reads.
impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{}", self.port, self.protocol)
    }
}

/// A policy of prefixes and ports. See the [module](self) for what comes before what.
#[derive(Clone, Debug, Default)]
pub struct PolicyRules {
    /// The network's own subnets.
    pub subnets: Vec<Prefix>,
    /// What is denied. The longest prefix decides between this and `allow`.
    pub deny: Vec<Rule>,
    /// What is allowed although a shorter prefix denies it.
    pub allow: Vec<Rule>,
    /// Whether guests reach the host's own addresses.
    pub host_access: HostAccess,
    /// Addresses that lead to the host's loopback address of the same family, for `host_ports`. They
    /// are best in the network's own subnet.
    pub host_address: Vec<IpAddr>,
    /// The ports that the host address leads to.
    pub host_ports: Vec<HostPort>,
    /// The host's own addresses. `None` as long as nobody knows them: then nothing is allowed that
    /// could be one.
    own: Option<Vec<IpAddr>>,
}

impl PolicyRules {
    /// A policy without rules for a network with these subnets.
    pub fn new(subnets: impl IntoIterator<Item = Prefix>) -> Self {
        Self { subnets: subnets.into_iter().collect(), ..Self::default() }
    }

    /// Why an address is denied whatever the rules say.
    fn built_in(&self, address: IpAddr) -> Option<Counter> {
        if let Some(why) = forbidden(address) {
            return Some(why);
        }
        if self.subnets.iter().any(|subnet| subnet.contains(address)) {
            return Some(Counter::DeniedSubnet);
        }
        let is_own = self.own.as_ref().is_none_or(|own| own.contains(&address));
        (self.host_access == HostAccess::Deny && is_own).then_some(Counter::DeniedHost)
    }

    /// Whether the rules deny a destination.
    fn by_rules(&self, protocol: Protocol, destination: SocketAddr) -> bool {
        let longest = |rules: &[Rule]| {
            let matching = rules.iter().filter(|rule| rule.matches(protocol, destination));
            matching.map(|rule| rule.prefix.len()).max()
        };
        match (longest(&self.deny), longest(&self.allow)) {
            (Some(deny), allow) => allow.is_none_or(|allow| deny >= allow),
            (None, _) => false,
        }
    }
}

impl Policy for PolicyRules {
    fn decide(&mut self, request: &Request) -> Verdict {
        let (protocol, destination) = (request.protocol, request.destination);
        if self.host_address.contains(&destination.ip()) {
            let port = HostPort { port: destination.port(), protocol };
            let loopback: IpAddr = match destination {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            return if self.host_ports.contains(&port) {
                Verdict::Allow { to: SocketAddr::new(loopback, destination.port()) }
            } else {
                Verdict::Deny(Counter::DeniedHostPort)
            };
        }
        let forms = [Some(destination.ip()), embedded_v4(destination.ip()).map(IpAddr::V4)];
        for address in forms.into_iter().flatten() {
            if let Some(why) = self.built_in(address) {
                return Verdict::Deny(why);
            }
            if self.by_rules(protocol, SocketAddr::new(address, destination.port())) {
                return Verdict::Deny(Counter::DeniedByRule);
            }
        }
        Verdict::Allow { to: destination }
    }

    fn wants_host_addresses(&self) -> bool {
        self.host_access == HostAccess::Deny
    }

    fn set_host_addresses(&mut self, addresses: &[IpAddr]) {
        let own = self.own.get_or_insert_default();
        own.clear();
        own.extend_from_slice(addresses);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Port;

    fn policy() -> PolicyRules {
        let subnets = ["192.168.64.0/24", "fd00::/64"].map(|text| text.parse().unwrap());
        let mut policy = PolicyRules::new(subnets);
        policy.set_host_addresses(&["198.51.100.7", "2001:db8:7::1"].map(|a| a.parse().unwrap()));
        policy
    }

    fn ask(policy: &mut PolicyRules, protocol: Protocol, destination: &str) -> Verdict {
        let source = "192.168.64.2:4000".parse().unwrap();
        let destination = destination.parse().unwrap();
        policy.decide(&Request { port: Port(0), protocol, source, destination })
    }

    fn denied(policy: &mut PolicyRules, destination: &str) -> Option<Counter> {
        match ask(policy, Protocol::Tcp, destination) {
            Verdict::Allow { to } => {
                assert_eq!(to, destination.parse().unwrap());
                None
            }
            Verdict::Deny(why) => Some(why),
        }
    }

    #[test]
    fn rules_are_read_as_they_are_written() {
        let rule = |text: &str| text.parse::<Rule>();
        let prefix = |text: &str| text.parse::<Prefix>().unwrap();
        let expect = |text, p, ports, protocol| {
            let expected = Rule { prefix: prefix(p), ports, protocol };
            assert_eq!(rule(text), Ok(expected), "{text}");
            assert_eq!(rule(&expected.to_string()), Ok(expected), "{expected}");
        };
        expect("10.0.0.0/8:80-90,tcp", "10.0.0.0/8", Some((80, 90)), Some(Protocol::Tcp));
        expect("10.0.0.0/8", "10.0.0.0/8", None, None);
        expect("10.0.0.1:53,udp", "10.0.0.1/32", Some((53, 53)), Some(Protocol::Udp));
        expect("10.0.0.1,icmp", "10.0.0.1/32", None, Some(Protocol::IcmpEcho));
        expect("2001:db8::/32:443", "2001:db8::/32", Some((443, 443)), None);
        expect("2001:db8::/32", "2001:db8::/32", None, None);
        expect("2001:db8::1", "2001:db8::1/128", None, None);
        expect("[2001:db8::1]:443,tcp", "2001:db8::1/128", Some((443, 443)), Some(Protocol::Tcp));
        expect("[2001:db8::]/32:1-65535", "2001:db8::/32", Some((1, 65535)), None);
        expect("[2001:db8::1]", "2001:db8::1/128", None, None);
        expect("::/0", "::/0", None, None);
        let wrong = [
            ("", RuleError::Prefix(PrefixError::Address)),
            ("10.0.0.0/8:", RuleError::Ports),
            ("10.0.0.0/8:0", RuleError::Ports),
            ("10.0.0.0/8:+80", RuleError::Ports),
            ("10.0.0.0/8:90-80", RuleError::Ports),
            ("10.0.0.0/8:65536", RuleError::Ports),
            ("10.0.0.0/8:80-", RuleError::Ports),
            ("10.0.0.0/40", RuleError::Prefix(PrefixError::Length)),
            ("10.0.0.0/8,sctp", RuleError::Protocol),
            ("10.0.0.0/8:80,icmp", RuleError::IcmpPorts),
            ("[10.0.0.1]:80", RuleError::Prefix(PrefixError::Address)),
            ("[::1]x:80", RuleError::Prefix(PrefixError::Address)),
        ];
        for (text, error) in wrong {
            assert_eq!(rule(text), Err(error), "{text}");
        }
        let port = |text: &str| text.parse::<HostPort>();
        assert_eq!(port("8080"), Ok(HostPort { port: 8080, protocol: Protocol::Tcp }));
        assert_eq!(port("53,udp"), Ok(HostPort { port: 53, protocol: Protocol::Udp }));
        assert_eq!(port("53,udp").unwrap().to_string(), "53,udp");
        for text in ["0", "80-90", ""] {
            assert_eq!(port(text), Err(RuleError::Port), "{text}");
        }
        assert_eq!(port("1,icmp"), Err(RuleError::IcmpPorts));
    }

    /// Goal: neither the network, nor the host, nor IPv4 in another form is reached, whatever rules
    /// there are.
    #[test]
    fn what_is_built_in_is_denied_whatever_the_rules_say() {
        let mut policy = policy();
        policy.allow = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
        let cases = [
            ("127.0.0.1:80", Counter::DeniedLoopback),
            ("169.254.169.254:80", Counter::DeniedLinkLocal),
            ("[fd00:ec2::254]:80", Counter::DeniedMetadata),
            ("192.168.64.1:22", Counter::DeniedSubnet),
            ("192.168.64.9:22", Counter::DeniedSubnet),
            ("192.168.64.255:22", Counter::DeniedSubnet),
            ("[fd00::1]:22", Counter::DeniedSubnet),
            ("198.51.100.7:22", Counter::DeniedHost),
            ("[2001:db8:7::1]:22", Counter::DeniedHost),
            ("[64:ff9b::198.51.100.7]:22", Counter::DeniedHost),
            ("[64:ff9b::192.168.64.9]:22", Counter::DeniedSubnet),
            ("[64:ff9b::127.0.0.1]:22", Counter::DeniedMapped),
            ("[2002:c0a8:4009::1]:22", Counter::DeniedSubnet),
            ("[2002:7f00:1::1]:22", Counter::DeniedMapped),
            ("[::ffff:8.8.8.8]:22", Counter::DeniedMapped),
        ];
        for (destination, why) in cases {
            assert_eq!(denied(&mut policy, destination), Some(why), "{destination}");
        }
        for destination in ["8.8.8.8:53", "[2001:db8::1]:53", "[64:ff9b::8.8.8.8]:53", "10.0.0.1:1"]
        {
            assert_eq!(denied(&mut policy, destination), None, "{destination}");
        }
        policy.host_access = HostAccess::Allow;
        assert_eq!(denied(&mut policy, "198.51.100.7:22"), None);
        assert_eq!(denied(&mut policy, "192.168.64.1:22"), Some(Counter::DeniedSubnet));
    }

    /// Goal: a host whose addresses could not be read gives no guest a way to them.
    #[test]
    fn as_long_as_the_hosts_addresses_are_unknown_none_is_reached() {
        let mut policy = PolicyRules::new([]);
        assert_eq!(denied(&mut policy, "8.8.8.8:53"), Some(Counter::DeniedHost));
        assert!(policy.wants_host_addresses());
        policy.set_host_addresses(&[]);
        assert_eq!(denied(&mut policy, "8.8.8.8:53"), None);
        policy.set_host_addresses(&["8.8.8.8".parse().unwrap()]);
        assert_eq!(denied(&mut policy, "8.8.8.8:53"), Some(Counter::DeniedHost));
        policy.set_host_addresses(&["8.8.4.4".parse().unwrap()]);
        assert_eq!(denied(&mut policy, "8.8.8.8:53"), None);
    }

    #[test]
    fn the_longest_prefix_decides_and_then_denial() {
        let mut policy = policy();
        policy.deny = vec!["10.0.0.0/8".parse().unwrap(), "10.1.2.3".parse().unwrap()];
        policy.allow =
            vec!["10.1.0.0/16:80-90,tcp".parse().unwrap(), "10.0.0.0/8:7".parse().unwrap()];
        assert_eq!(denied(&mut policy, "10.2.0.1:80"), Some(Counter::DeniedByRule));
        assert_eq!(denied(&mut policy, "10.1.0.1:80"), None);
        assert_eq!(denied(&mut policy, "10.1.0.1:90"), None);
        assert_eq!(denied(&mut policy, "10.1.0.1:91"), Some(Counter::DeniedByRule));
        assert_eq!(denied(&mut policy, "10.1.2.3:80"), Some(Counter::DeniedByRule));
        // Two rules of the same length.
        assert_eq!(denied(&mut policy, "10.2.0.1:7"), Some(Counter::DeniedByRule));
        assert_eq!(denied(&mut policy, "11.0.0.1:80"), None);
        // A rule about IPv4 holds in the form of IPv6 too.
        assert_eq!(denied(&mut policy, "[64:ff9b::10.2.0.1]:80"), Some(Counter::DeniedByRule));
        // A rule for a protocol is for no other.
        let by_rule = Verdict::Deny(Counter::DeniedByRule);
        assert_eq!(ask(&mut policy, Protocol::Udp, "10.1.0.1:80"), by_rule);
        assert_eq!(ask(&mut policy, Protocol::IcmpEcho, "10.1.0.1:0"), by_rule);
        policy.deny = vec!["10.0.0.0/8:80".parse().unwrap()];
        let allowed = Verdict::Allow { to: "10.2.0.1:0".parse().unwrap() };
        assert_eq!(ask(&mut policy, Protocol::IcmpEcho, "10.2.0.1:0"), allowed);
    }

    #[test]
    fn the_host_address_leads_its_ports_to_loopback_and_no_others() {
        let mut policy = policy();
        policy.host_address = ["192.168.64.254", "fd00::fe"].map(|a| a.parse().unwrap()).into();
        policy.host_ports = vec!["8080".parse().unwrap(), "53,udp".parse().unwrap()];
        let to = |text: &str| Verdict::Allow { to: text.parse().unwrap() };
        let none = Verdict::Deny(Counter::DeniedHostPort);
        let cases = [
            (Protocol::Tcp, "192.168.64.254:8080", to("127.0.0.1:8080")),
            (Protocol::Tcp, "[fd00::fe]:8080", to("[::1]:8080")),
            (Protocol::Udp, "192.168.64.254:53", to("127.0.0.1:53")),
            (Protocol::Tcp, "192.168.64.254:53", none),
            (Protocol::Udp, "192.168.64.254:8080", none),
            (Protocol::IcmpEcho, "192.168.64.254:0", none),
        ];
        for (protocol, destination, verdict) in cases {
            assert_eq!(ask(&mut policy, protocol, destination), verdict, "{destination}");
        }
    }
}
