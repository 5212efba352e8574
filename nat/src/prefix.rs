//! Prefixes of addresses, as routes and rules have them.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use core::str::FromStr;

/// Why a text is no [`Prefix`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PrefixError {
    /// The part in front of the slash is no address.
    Address,
    /// The part behind the slash is no number of bits that the address has.
    Length,
}

impl fmt::Display for PrefixError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Address => "the prefix does not begin with an IP address",
            Self::Length => "the prefix's length is no number of bits of its address",
        })
    }
}

impl std::error::Error for PrefixError {}

/// The addresses that begin with the same bits. A text has the form `10.0.0.0/8`; an address alone
/// is a prefix of its full length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    address: IpAddr,
    len: u8,
}

impl Prefix {
    /// The prefix of the first `len` bits of an address. The other bits are cleared.
    ///
    /// # Errors
    ///
    /// [`PrefixError::Length`] if the address does not have so many bits.
    pub fn new(address: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let address = match address {
            IpAddr::V4(v4) if len <= 32 => {
                Ipv4Addr::from(u32::from(v4) & mask(len, 32) as u32).into()
            }
            IpAddr::V6(v6) if len <= 128 => Ipv6Addr::from(u128::from(v6) & mask(len, 128)).into(),
            _ => return Err(PrefixError::Length),
        };
        Ok(Self { address, len })
    }

    /// The first address.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The number of bits that the addresses share.
    // A prefix is not a collection, so there is no `is_empty`.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u8 {
        self.len
    }

    /// Whether an address begins with these bits. One of the other family does not.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.len).is_ok_and(|prefix| prefix == *self)
    }

    /// Whether an address names this network or everybody in it, and so no host (RFC 1122, 3.2.1.3;
    /// the anycast address of routers, RFC 4291, 2.6.1).
    pub fn is_network_or_broadcast(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) if self.len < 31 && self.contains(address) => {
                let host = !(mask(self.len, 32) as u32);
                [0, host].contains(&(u32::from(v4) & host))
            }
            IpAddr::V6(_) if self.len < 127 => address == self.address,
            _ => false,
        }
    }
}

/// A number of `bits` bits, of which the first `len` are 1.
fn mask(len: u8, bits: u32) -> u128 {
    let ones = u128::MAX >> (128 - bits);
    ones ^ ones.checked_shr(len.into()).unwrap_or(0)
}

impl FromStr for Prefix {
    type Err = PrefixError;
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (address, len) = match text.split_once('/') {
            Some((address, len)) => (address, Some(len)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| PrefixError::Address)?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let len = match len {
            Some(len) => len.parse().map_err(|_| PrefixError::Length)?,
            None => all,
        };
        Self::new(address, len)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_contains_what_begins_with_its_bits() {
        let cases = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("0.0.0.0/0", "255.255.255.255", true),
            ("0.0.0.0/0", "::1", false),
            ("192.0.2.7", "192.0.2.7", true),
            ("192.0.2.7", "192.0.2.6", false),
            ("::/0", "ffff::", true),
            ("fd00::/64", "fd00::ffff:0:0:1", true),
            ("fd00::/64", "fd00:0:0:1::1", false),
            ("2001:db8::1/128", "2001:db8::1", true),
            ("2001:db8::1/128", "2001:db8::2", false),
        ];
        for (prefix, address, contains) in cases {
            let prefix: Prefix = prefix.parse().unwrap();
            assert_eq!(prefix.contains(address.parse().unwrap()), contains, "{prefix} {address}");
        }
        let prefix: Prefix = "10.1.2.3/8".parse().unwrap();
        assert_eq!(prefix.to_string(), "10.0.0.0/8");
        assert_eq!("10.0.0.0/33".parse::<Prefix>(), Err(PrefixError::Length));
        assert_eq!("::/129".parse::<Prefix>(), Err(PrefixError::Length));
        assert_eq!("10.0.0.0/x".parse::<Prefix>(), Err(PrefixError::Length));
        assert_eq!("10.0.0/8".parse::<Prefix>(), Err(PrefixError::Address));
    }

    #[test]
    fn a_network_and_everybody_in_it_are_no_host() {
        let is_no_host = |prefix: &str, address: &str| {
            let prefix: Prefix = prefix.parse().unwrap();
            prefix.is_network_or_broadcast(address.parse().unwrap())
        };
        assert!(is_no_host("192.168.64.0/24", "192.168.64.0"));
        assert!(is_no_host("192.168.64.0/24", "192.168.64.255"));
        assert!(!is_no_host("192.168.64.0/24", "192.168.64.254"));
        assert!(!is_no_host("192.168.64.0/24", "192.168.65.0"));
        assert!(!is_no_host("192.168.64.0/31", "192.168.64.0"));
        assert!(is_no_host("fd00::/64", "fd00::"));
        assert!(!is_no_host("fd00::/64", "fd00::ffff:ffff:ffff:ffff"));
    }
}
