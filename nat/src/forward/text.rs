//! Port forwards as text.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

use crate::forward::ForwardRule;
use crate::policy::Protocol;
use crate::policy::sources::Guest;

/// Why a text is no [`ForwardRule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ForwardRuleError {
    /// There is no `=` between the host's side and the guest's.
    NoGuest,
    /// What is in front of the host's port is no IP address.
    Bind,
    /// The host's ports are no number from 0 to 65535, and no range of numbers from 1 on.
    Ports,
    /// The guest is no IP address and no MAC address.
    Guest,
    /// The guest's port is no number from 1 to 65535, or the range goes beyond that.
    GuestPort,
    /// The host's port is 0, and the guest's is not named.
    GuestPortMissing,
    /// The protocol is neither `tcp` nor `udp`.
    Protocol,
}

impl fmt::Display for ForwardRuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoGuest => {
                "a port forward has the form `[ADDRESS:]PORT[-LAST]=GUEST[:PORT][,tcp|,udp]`, and \
                 there is no `=`"
            }
            Self::Bind => {
                "what is in front of the host's port is no IP address (one of IPv6 is in brackets)"
            }
            Self::Ports => {
                "the host's ports are no number from 0 to 65535, and no range `first-last` of such \
                 numbers from 1 on"
            }
            Self::Guest => {
                "the guest is neither an IP address (one of IPv6 in brackets, if a port follows) nor \
                 a MAC address"
            }
            Self::GuestPort => "the guest's ports are not all from 1 to 65535",
            Self::GuestPortMissing => {
                "the host's port is 0, which lets the system choose one, so the guest's must be named"
            }
            Self::Protocol => "the protocol is neither `tcp` nor `udp`",
        })
    }
}

impl std::error::Error for ForwardRuleError {}

fn number(text: &str) -> Option<u16> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Splits a text into an address and what is behind it and a colon. `None` if it begins with neither.
fn split_address(text: &str) -> Option<(IpAddr, Option<&str>)> {
    if let Some((inner, rest)) = text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        let address: Ipv6Addr = inner.parse().ok()?;
        return match rest {
            "" => Some((address.into(), None)),
            _ => Some((address.into(), Some(rest.strip_prefix(':')?))),
        };
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some((address, None));
    }
    let (address, rest) = text.split_once(':')?;
    Some((address.parse::<Ipv4Addr>().ok()?.into(), Some(rest)))
}

/// Splits a text into a MAC address and what is behind it and a colon.
fn split_mac(text: &str) -> Option<([u8; 6], Option<&str>)> {
    let mut mac = [0; 6];
    let mut parts = text.splitn(7, ':');
    for byte in &mut mac {
        let part = parts.next()?;
        let is_hex = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = is_hex.then(|| u8::from_str_radix(part, 16).ok()).flatten()?;
    }
    Some((mac, parts.next()))
}

/// Reads `[ADDRESS:]PORT[-LAST]=GUEST[:PORT][,tcp|,udp]`: what comes to the ports of the host's address
/// goes to the guest's ports, the first of which is `PORT`. Without an address, the host's loopback
/// address is listened at. With port 0 the system chooses one. `GUEST` is an IP address or a MAC address.
/// Without a port of its own it gets the same ones. An IPv6 address that a port follows is in brackets.
/// Without a protocol it is TCP.
impl FromStr for ForwardRule {
    type Err = ForwardRuleError;
    fn from_str(text: &str) -> Result<Self, ForwardRuleError> {
        use ForwardRuleError as E;
        let (rest, protocol) = match text.rsplit_once(',') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(E::Protocol),
        };
        let (host, guest) = rest.split_once('=').ok_or(E::NoGuest)?;
        let (bind, ports) = match host.contains(':') {
            false => (None, host),
            true => match split_address(host).ok_or(E::Bind)? {
                (bind, Some(ports)) => (Some(bind), ports),
                (_, None) => return Err(E::Ports),
            },
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let (port, last) = (number(first).ok_or(E::Ports)?, number(last).ok_or(E::Ports)?);
        if last < port || port == 0 && ports.contains('-') {
            return Err(E::Ports);
        }
        let count = (last - port).checked_add(1).ok_or(E::Ports)?;
        let (guest, guest_port) = match split_mac(guest) {
            Some((mac, port)) => (Guest::Mac(mac), port),
            None => {
                let (address, port) = split_address(guest).ok_or(E::Guest)?;
                (Guest::Address(address), port)
            }
        };
        let guest_port = match guest_port {
            None if port == 0 => return Err(E::GuestPortMissing),
            None => port,
            Some(text) => number(text).filter(|port| *port > 0).ok_or(E::GuestPort)?,
        };
        guest_port.checked_add(count - 1).ok_or(E::GuestPort)?;
        let mut rule = Self::new(protocol, port, guest, guest_port);
        rule.count = count;
        rule.bind = bind.unwrap_or(rule.bind);
        Ok(rule)
    }
}

/// Writes the form that [`FromStr`] reads.
impl fmt::Display for ForwardRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = core::net::SocketAddr::new(self.bind, self.port);
        write!(f, "{at}")?;
        if self.count > 1 {
            write!(f, "-{}", self.port.saturating_add(self.count - 1))?;
        }
        write!(f, "={}:{},{}", self.guest, self.guest_port, self.protocol)
    }
}

/// Writes the address as it is in front of a port: one of IPv6 in brackets.
impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(IpAddr::V4(address)) => address.fmt(f),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Mac([a, b, c, d, e, g]) => {
                write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a forward is read as it is written, and written as it is read.
    #[test]
    fn forwards_are_read_as_they_are_written() {
        let v4 = |text: &str| Guest::Address(text.parse().unwrap());
        let mac = Guest::Mac([2, 0, 0, 0, 0, 0xab]);
        let cases = [
            ("8080=192.168.64.2:80", "127.0.0.1", 8080, 1, v4("192.168.64.2"), 80, Protocol::Tcp),
            ("8080=192.168.64.2", "127.0.0.1", 8080, 1, v4("192.168.64.2"), 8080, Protocol::Tcp),
            ("0=192.168.64.2:22,udp", "127.0.0.1", 0, 1, v4("192.168.64.2"), 22, Protocol::Udp),
            ("0.0.0.0:53=10.0.0.2:53,udp", "0.0.0.0", 53, 1, v4("10.0.0.2"), 53, Protocol::Udp),
            ("[::]:80=10.0.0.2:8080,tcp", "::", 80, 1, v4("10.0.0.2"), 8080, Protocol::Tcp),
            ("80-89=10.0.0.2:8000", "127.0.0.1", 80, 10, v4("10.0.0.2"), 8000, Protocol::Tcp),
            ("1-65535=10.0.0.2", "127.0.0.1", 1, 65535, v4("10.0.0.2"), 1, Protocol::Tcp),
            ("22=02:00:00:00:00:aB:22", "127.0.0.1", 22, 1, mac, 22, Protocol::Tcp),
            ("22=02:00:00:00:00:ab", "127.0.0.1", 22, 1, mac, 22, Protocol::Tcp),
            ("22=[fd00::2]:23", "::1", 22, 1, v4("fd00::2"), 23, Protocol::Tcp),
            ("22=fd00::2", "::1", 22, 1, v4("fd00::2"), 22, Protocol::Tcp),
        ];
        for (text, bind, port, count, guest, guest_port, protocol) in cases {
            let rule: ForwardRule = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            let bind: IpAddr = bind.parse().unwrap();
            let expected =
                ForwardRule { bind, count, ..ForwardRule::new(protocol, port, guest, guest_port) };
            assert_eq!(rule, expected, "{text}");
            assert_eq!(rule.to_string().parse(), Ok(rule), "{rule}");
        }
    }

    /// Goal: what is wrong with a text is named.
    #[test]
    fn a_wrong_forward_says_what_is_wrong() {
        use ForwardRuleError as E;
        let cases = [
            ("", E::NoGuest),
            ("8080", E::NoGuest),
            ("8080:192.168.64.2:80", E::NoGuest),
            ("host:80=10.0.0.2", E::Bind),
            ("::1:80=10.0.0.2", E::Ports),
            ("127.0.0.1:=10.0.0.2:1", E::Ports),
            ("=10.0.0.2:1", E::Ports),
            ("65536=10.0.0.2:1", E::Ports),
            ("+80=10.0.0.2:1", E::Ports),
            ("90-80=10.0.0.2:1", E::Ports),
            ("0-9=10.0.0.2:1", E::Ports),
            ("80-=10.0.0.2:1", E::Ports),
            ("80=", E::Guest),
            ("80=guest", E::Guest),
            ("80=guest:80", E::Guest),
            ("80=[10.0.0.2]:80", E::Guest),
            ("80=02:00:00:00:00:0g:80", E::Guest),
            ("80=10.0.0.2:0", E::GuestPort),
            ("80=10.0.0.2:http", E::GuestPort),
            ("80=10.0.0.2:", E::GuestPort),
            ("80-90=10.0.0.2:65530", E::GuestPort),
            ("0=10.0.0.2", E::GuestPortMissing),
            ("80=10.0.0.2:80,icmp", E::Protocol),
            ("80=10.0.0.2:80,", E::Protocol),
        ];
        for (text, error) in cases {
            assert_eq!(text.parse::<ForwardRule>(), Err(error), "{text}");
        }
    }
}
