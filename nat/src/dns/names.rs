//! The names that a network answers for itself: [`Names`].
//!
//! The owner of a network names what it likes: the host, the gateway, a service. A guest gets the name
//! that it calls itself in DHCP, below [`DOMAIN`]. Such a name comes from somebody who may be hostile, so
//! it is a plain label, takes nobody else's place, and has none of the names that programs look up by
//! themselves.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::HashMap;

use crate::limits::{ADDRESSES_PER_NAME, LOCAL_NAMES, NAMES_PER_PORT};
use crate::output::Port;
use crate::prefix::Prefix;

/// The domain of the names of guests. It is for private use and never in the public DNS (a resolution of
/// ICANN's board of 2024-07-29).
pub const DOMAIN: &str = "internal";
/// What guests call the host, at the address that the owner gives it.
pub const HOST_NAME: &str = "host.internal";
/// What guests call the gateway, at the address that the owner gives it.
pub const GATEWAY_NAME: &str = "gateway.internal";

/// Labels that no guest gets. Guests find the host and the gateway by the first ones. Programs look the
/// others up by themselves, and believe what they find there: proxies (WPAD), tunnels (ISATAP), the
/// metadata of clouds, the machine itself.
const RESERVED: [&str; 16] = [
    "host",
    "gateway",
    "dns",
    "router",
    "internal",
    "local",
    "localdomain",
    "localhost",
    "broadcasthost",
    "ip6-localhost",
    "ip6-loopback",
    "wpad",
    "isatap",
    "metadata",
    "instance-data",
    "autodiscover",
];

/// Why a name is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NameError {
    /// It has a label that is empty, longer than 63 bytes, or of other characters than letters, digits
    /// and hyphens, or that begins or ends with a hyphen; or it is longer than 253 bytes. A guest's has a
    /// letter too, so that it is no number.
    Form,
    /// Programs rely on it, so no guest gets it.
    Reserved,
    /// It is the owner's, or another guest's.
    Taken,
    /// The table is full, or the port has too many names, or the name too many addresses.
    TooMany,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form => f.write_str("it is no host name"),
            Self::Reserved => f.write_str("no guest may have this name"),
            Self::Taken => f.write_str("somebody else has this name"),
            Self::TooMany => write!(
                f,
                "a network has at most {LOCAL_NAMES} names, a port {NAMES_PER_PORT}, and a name \
                 {ADDRESSES_PER_NAME} addresses"
            ),
        }
    }
}

impl std::error::Error for NameError {}

/// Whose a name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Owner,
    Lease(Port, [u8; 6]),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    by: By,
    addresses: Vec<IpAddr>,
}

/// What is known about a name that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found<'n> {
    /// It is somebody else's to answer.
    Elsewhere,
    /// It has these addresses.
    Addresses(&'n [IpAddr], Zone),
    /// It is an address's, which has this name.
    Pointer(&'n str, Zone),
    /// It is there and has nothing of its own.
    Nothing(Zone),
    /// There is no such name.
    NoName(Zone),
}

/// Where the zone begins in the name that is asked for, counted in bytes. `None` if the name is in no
/// zone of its own, as one without a dot is.
pub(crate) type Zone = Option<usize>;

/// The names that a network answers for itself, without regard to the case of letters. Queries for them
/// go to no resolver. Each name has at most [`ADDRESSES_PER_NAME`] addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    subnets: [Prefix; 2],
    entries: HashMap<Box<str>, Entry>,
    /// The first name of each address.
    by_address: HashMap<IpAddr, Box<str>>,
    pass_unknown: bool,
}

/// Reads a label of a host name (RFC 1123, 2.1), and writes it in lower case.
fn label(bytes: &[u8]) -> Result<String, NameError> {
    let is_fine = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    let hyphen = bytes.first() == Some(&b'-') || bytes.last() == Some(&b'-');
    if bytes.is_empty() || bytes.len() > 63 || hyphen || !bytes.iter().all(is_fine) {
        return Err(NameError::Form);
    }
    Ok(bytes.iter().map(|byte| char::from(byte.to_ascii_lowercase())).collect())
}

impl Names {
    /// No names, for a network with these subnets. Names of their addresses (`PTR`) are answered here.
    pub fn new(subnets: [Prefix; 2]) -> Self {
        let (entries, by_address) = (HashMap::new(), HashMap::new());
        Self { subnets, entries, by_address, pass_unknown: false }
    }

    /// Gives a name these addresses and no others, whoever had it. A dot at its end is ignored. A name
    /// without a dot is found as it is and by no other name. With no address, the name is there and has
    /// none.
    ///
    /// # Errors
    ///
    /// [`Form`](NameError::Form) or [`TooMany`](NameError::TooMany). Nothing has changed then.
    pub fn set(&mut self, name: &str, addresses: &[IpAddr]) -> Result<(), NameError> {
        let name = name.strip_suffix('.').unwrap_or(name);
        if name.len() > 253 {
            return Err(NameError::Form);
        }
        let labels: Result<Vec<_>, _> =
            name.split('.').map(|part| label(part.as_bytes())).collect();
        let name = labels?.join(".");
        let is_new = !self.entries.contains_key(&*name);
        if addresses.len() > ADDRESSES_PER_NAME || is_new && self.entries.len() >= LOCAL_NAMES {
            return Err(NameError::TooMany);
        }
        self.remove_entry(&name);
        for &address in addresses {
            self.point(address, &name);
        }
        let entry = Entry { by: By::Owner, addresses: addresses.to_vec() };
        self.entries.insert(name.into(), entry);
        Ok(())
    }

    /// Removes a name, whoever has it. Returns whether it was there.
    pub fn remove(&mut self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        self.remove_entry(&name)
    }

    /// Gives a guest the name that it calls itself (DHCP's option 12), below [`DOMAIN`], for an address
    /// that it has leased. Its first label counts. Other guests find it with and without the domain. The
    /// name that the guest had before is nobody's, and so is an address of the same family that it had.
    ///
    /// # Errors
    ///
    /// Why the guest does not get it. Nothing has changed then.
    pub fn lease(
        &mut self,
        port: Port,
        mac: [u8; 6],
        host_name: &[u8],
        address: IpAddr,
    ) -> Result<(), NameError> {
        // Some clients end it with zeros (RFC 2132, 2).
        let end = host_name.iter().position(|&byte| byte == 0).unwrap_or(host_name.len());
        let first = host_name[..end].split(|&byte| byte == b'.').next().unwrap_or_default();
        let label = label(first)?;
        if label.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NameError::Form);
        }
        if RESERVED.contains(&&*label) {
            return Err(NameError::Reserved);
        }
        // A name of the owner's without a dot would be answered instead.
        if self.entries.contains_key(&*label) {
            return Err(NameError::Taken);
        }
        let name = format!("{label}.{DOMAIN}");
        let by = By::Lease(port, mac);
        let held = self.entries.get(&*name);
        if held.is_some_and(|entry| entry.by != by) {
            return Err(NameError::Taken);
        }
        if held.is_some_and(|entry| entry.addresses.contains(&address)) {
            return Ok(());
        }
        let is_ports = |entry: &Entry| matches!(entry.by, By::Lease(other, _) if other == port);
        let before = self.entries.iter().find(|(_, entry)| entry.by == by).map(|(n, _)| n.clone());
        if before.is_none()
            && (self.entries.len() >= LOCAL_NAMES
                || self.entries.values().filter(|entry| is_ports(entry)).count() >= NAMES_PER_PORT)
        {
            return Err(NameError::TooMany);
        }
        let mut addresses = Vec::new();
        if let Some(before) = before {
            let entry = self.entries.get(&before);
            addresses = entry.map_or_else(Vec::new, |entry| entry.addresses.clone());
            addresses.retain(|other| other.is_ipv4() != address.is_ipv4());
            self.remove_entry(&before);
        }
        addresses.push(address);
        for &address in &addresses {
            self.point(address, &name);
        }
        self.entries.insert(name.into(), Entry { by, addresses });
        Ok(())
    }

    /// Takes an address from the guest's name that has it: its lease has ended. A name without an address
    /// is nobody's.
    pub fn free(&mut self, address: IpAddr) {
        let has = |entry: &Entry| entry.by != By::Owner && entry.addresses.contains(&address);
        let names: Vec<_> =
            self.entries.iter().filter(|(_, entry)| has(entry)).map(|(n, _)| n.clone()).collect();
        for name in names {
            let Some(entry) = self.entries.get_mut(&name) else { continue };
            entry.addresses.retain(|&other| other != address);
            if entry.addresses.is_empty() {
                self.entries.remove(&name);
            }
            self.unpoint(address, &name);
        }
    }

    /// Forgets the names of a port's guests. A guest that comes back asks for its lease, and so for its
    /// name, again.
    pub fn port_left(&mut self, port: Port) {
        let is_ports = |entry: &Entry| matches!(entry.by, By::Lease(other, _) if other == port);
        let names: Vec<_> = self
            .entries
            .iter()
            .filter(|(_, entry)| is_ports(entry))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            self.remove_entry(&name);
        }
    }

    /// Whether names right below [`DOMAIN`] that nobody has go to the resolvers. If not, which is the
    /// default, there is no such name, and nobody outside learns what was asked for. A host whose own
    /// network has names there needs it.
    pub fn pass_unknown(&mut self, pass: bool) {
        self.pass_unknown = pass;
    }

    /// All names with their addresses, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[IpAddr])> {
        self.entries.iter().map(|(name, entry)| (&**name, &entry.addresses[..]))
    }

    fn remove_entry(&mut self, name: &str) -> bool {
        let Some(entry) = self.entries.remove(name) else { return false };
        for address in entry.addresses {
            self.unpoint(address, name);
        }
        true
    }

    fn point(&mut self, address: IpAddr, name: &str) {
        self.by_address.entry(address).or_insert_with(|| name.into());
    }

    /// Notes that a name does not have an address any more. Another one's may be next.
    fn unpoint(&mut self, address: IpAddr, name: &str) {
        if self.by_address.get(&address).is_some_and(|first| &**first == name) {
            self.by_address.remove(&address);
            let next = self.entries.iter().find(|(_, entry)| entry.addresses.contains(&address));
            if let Some(next) = next.map(|(name, _)| name.clone()) {
                self.by_address.insert(address, next);
            }
        }
    }

    /// Looks a name up, which is in lower case and ends without a dot.
    pub(crate) fn find(&self, name: &str) -> Found<'_> {
        let below = match name.strip_suffix(DOMAIN) {
            Some("") => return Found::Nothing(Some(0)),
            Some(rest) => rest.strip_suffix('.'),
            None => None,
        };
        // The domain's zone begins behind what is below it.
        let zone = |name: &str| match below {
            Some(below) => Some(below.len() + 1),
            None => name.contains('.').then_some(0),
        };
        if let Some(entry) = self.entries.get(name) {
            return Found::Addresses(&entry.addresses, zone(name));
        }
        if let Some(below) = below {
            return match below.rsplit_once('.') {
                None if self.pass_unknown => Found::Elsewhere,
                None => Found::NoName(zone(name)),
                // Deeper names are ours if the one that they are below is. If not, they may be the
                // host's network's: metadata.google.internal is one.
                Some((_, parent)) => {
                    let parent = &name[name.len() - parent.len() - 1 - DOMAIN.len()..];
                    match self.entries.contains_key(parent) {
                        true => Found::NoName(zone(name)),
                        false => Found::Elsewhere,
                    }
                }
            };
        }
        if !name.contains('.') {
            let mut full = [0; 63 + 1 + DOMAIN.len()];
            let len = name.len();
            if len > 0 && len <= 63 {
                full[..len].copy_from_slice(name.as_bytes());
                full[len] = b'.';
                full[len + 1..][..DOMAIN.len()].copy_from_slice(DOMAIN.as_bytes());
                let full = core::str::from_utf8(&full[..len + 1 + DOMAIN.len()]);
                let entry = full.ok().and_then(|full| self.entries.get(full));
                if let Some(entry) = entry {
                    return Found::Addresses(&entry.addresses, None);
                }
            }
            return Found::Elsewhere;
        }
        let Some(address) = reverse(name) else { return Found::Elsewhere };
        let zone = name.find('.').map(|dot| dot + 1);
        match self.by_address.get(&address) {
            Some(name) => Found::Pointer(name, zone),
            // RFC 6303, 3: nobody else knows the names of these.
            None if self.subnets.iter().any(|subnet| subnet.contains(address)) => {
                Found::NoName(zone)
            }
            None => Found::Elsewhere,
        }
    }
}

/// The address that a name of the reverse zones stands for (RFC 1035, 3.5; RFC 3596, 2.5).
fn reverse(name: &str) -> Option<IpAddr> {
    if let Some(v4) = name.strip_suffix(".in-addr.arpa") {
        let mut octets = [0; 4];
        let mut parts = v4.split('.');
        for octet in octets.iter_mut().rev() {
            let part = parts.next()?;
            let leads = part.len() > 1 && part.starts_with('0');
            if leads || !part.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            *octet = part.parse().ok()?;
        }
        return parts.next().is_none().then(|| Ipv4Addr::from(octets).into());
    }
    let v6 = name.strip_suffix(".ip6.arpa")?;
    let mut bits = 0u128;
    if v6.len() != 63 {
        return None;
    }
    for (index, part) in v6.split('.').enumerate() {
        let (&[digit], 0..=31) = (part.as_bytes(), index) else { return None };
        bits |= u128::from(char::from(digit).to_digit(16)?) << (4 * index);
    }
    Some(Ipv6Addr::from(bits).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
    const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];

    fn names() -> Names {
        Names::new(["192.168.64.0/24".parse().unwrap(), "fd00::/64".parse().unwrap()])
    }

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn addresses(names: &Names, name: &str) -> Vec<IpAddr> {
        match names.find(name) {
            Found::Addresses(addresses, _) => addresses.to_vec(),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Goal: a guest is found by the name that it calls itself, with and without the domain, and back by
    /// its address; a new name and a new address take the place of the old ones.
    #[test]
    fn a_guest_has_one_name() {
        let mut names = names();
        names.lease(Port(1), A, b"Web.example.com\0\0", at("192.168.64.2")).unwrap();
        for name in ["web", "web.internal"] {
            assert_eq!(addresses(&names, name), [at("192.168.64.2")]);
        }
        let reverse = "2.64.168.192.in-addr.arpa";
        assert_eq!(names.find(reverse), Found::Pointer("web.internal", Some(2)));
        names.lease(Port(1), A, b"web", at("fd00::2")).unwrap();
        assert_eq!(addresses(&names, "web"), [at("192.168.64.2"), at("fd00::2")]);
        names.lease(Port(1), A, b"db", at("192.168.64.3")).unwrap();
        assert_eq!(addresses(&names, "db"), [at("fd00::2"), at("192.168.64.3")]);
        assert_eq!((names.find("web"), names.iter().count()), (Found::Elsewhere, 1));
        assert_eq!(names.find(reverse), Found::NoName(Some(2)));
        names.free(at("192.168.64.3"));
        assert_eq!(addresses(&names, "db"), [at("fd00::2")]);
        names.free(at("fd00::2"));
        assert_eq!((names.iter().count(), names.by_address.len()), (0, 0));
    }

    /// Goal: a guest takes nobody's name: not the host's or the gateway's, whether they are there or not,
    /// nor the owner's, nor another guest's, nor one that programs believe in.
    #[test]
    fn a_guest_takes_no_other_name() {
        let mut names = names();
        names.set("db.internal", &[at("192.0.2.1")]).unwrap();
        names.set("Printer.", &[at("192.0.2.2")]).unwrap();
        names.lease(Port(1), A, b"web", at("192.168.64.2")).unwrap();
        let mut lease = |name: &[u8]| names.lease(Port(2), B, name, at("192.168.64.3"));
        for name in RESERVED {
            assert_eq!(lease(name.as_bytes()), Err(NameError::Reserved), "{name}");
            let upper = format!("{}.x", name.to_ascii_uppercase());
            assert_eq!(lease(upper.as_bytes()), Err(NameError::Reserved), "{upper}");
        }
        for name in ["db", "DB.internal", "printer", "web", "WEB", "web.internal", "web.other"] {
            assert_eq!(lease(name.as_bytes()), Err(NameError::Taken), "{name}");
        }
        let long = [b'a'; 64];
        let bad: [&[u8]; 12] = [
            b"", b".", b".web", b"-a", b"a-", b"a_b", b"a b", b"a\xff", b"\0web", b"127", b"a/b",
            &long,
        ];
        for name in bad {
            assert_eq!(lease(name), Err(NameError::Form), "{name:?}");
        }
        lease(&long[..63]).unwrap();
        // Another MAC address of the same port is another guest.
        let other = names.lease(Port(1), B, b"web", at("192.168.64.9"));
        assert_eq!(other, Err(NameError::Taken));
        assert_eq!(addresses(&names, "web"), [at("192.168.64.2")]);
        // The owner takes what it likes.
        names.set("web.internal", &[at("192.0.2.3")]).unwrap();
        assert_eq!(addresses(&names, "web"), [at("192.0.2.3")]);
        names.port_left(Port(1));
        assert_eq!(addresses(&names, "web"), [at("192.0.2.3")]);
        names.free(at("192.0.2.3"));
        assert!(names.remove("WEB.internal.") && !names.remove("web.internal"));
        names.lease(Port(1), A, b"web", at("192.168.64.2")).unwrap();
        names.port_left(Port(1));
        assert_eq!(names.find("web"), Found::Elsewhere);
    }

    /// Goal: names below the domain that nobody has are not asked for outside, unless the owner says so,
    /// and names of others are.
    #[test]
    fn the_domain_is_answered_for_one_level_deep() {
        let mut names = names();
        names.set(HOST_NAME, &[at("192.168.64.254")]).unwrap();
        assert_eq!(names.find("internal"), Found::Nothing(Some(0)));
        assert_eq!(names.find("hosts.internal"), Found::NoName(Some(6)));
        assert_eq!(names.find("a.b.host.internal"), Found::NoName(Some(9)));
        assert_eq!(names.find("a.host.internal"), Found::NoName(Some(7)));
        for name in ["metadata.google.internal", "xinternal", "internal.com", "", "a.example"] {
            assert_eq!(names.find(name), Found::Elsewhere, "{name}");
        }
        names.pass_unknown(true);
        assert_eq!(names.find("hosts.internal"), Found::Elsewhere);
        assert_eq!(addresses(&names, HOST_NAME), [at("192.168.64.254")]);
    }

    /// Goal: names of addresses are found in both families, those of the subnets that nobody has are not
    /// asked for outside, and what only looks like one is.
    #[test]
    fn an_address_has_a_name() {
        let mut names = names();
        names.set("a.example", &[at("192.0.2.1"), at("fd00::1")]).unwrap();
        names.set("b.example", &[at("192.0.2.1")]).unwrap();
        let v6 = "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa";
        assert_eq!(names.find(v6), Found::Pointer("a.example", Some(2)));
        assert_eq!(names.find("1.2.0.192.in-addr.arpa"), Found::Pointer("a.example", Some(2)));
        names.remove("a.example");
        assert_eq!(names.find("1.2.0.192.in-addr.arpa"), Found::Pointer("b.example", Some(2)));
        assert_eq!(names.find(v6), Found::NoName(Some(2)));
        assert_eq!(names.find("77.64.168.192.in-addr.arpa"), Found::NoName(Some(3)));
        let others = "8.8.8.8.in-addr.arpa 64.168.192.in-addr.arpa 1.2.64.168.192.in-addr.arpa \
             01.64.168.192.in-addr.arpa 256.64.168.192.in-addr.arpa +1.64.168.192.in-addr.arpa \
             in-addr.arpa 0.d.f.ip6.arpa ip6.arpa";
        for name in others.split_whitespace() {
            assert_eq!(names.find(name), Found::Elsewhere, "{name}");
        }
        let too_deep = v6.replacen("1.0.", "1.00", 1);
        assert_eq!(names.find(&too_deep), Found::Elsewhere);
    }

    /// Goal: no guest makes the table grow, or keeps others out of it.
    #[test]
    fn the_table_is_bounded() {
        let mut names = names();
        for n in 0..1000u16 {
            let mac = [2, 0, 0, 1, (n >> 8) as u8, n as u8];
            let _ = names.lease(Port(0), mac, format!("a{n}").as_bytes(), at("192.168.64.2"));
        }
        assert_eq!(names.iter().count(), NAMES_PER_PORT);
        names.lease(Port(1), B, b"b", at("192.168.64.3")).unwrap();
        for n in 0..3000 {
            let _ = names.set(&format!("n{n}"), &[at("192.0.2.1")]);
        }
        assert_eq!(names.iter().count(), LOCAL_NAMES);
        let full = names.lease(Port(2), A, b"c", at("192.168.64.4"));
        assert_eq!(full, Err(NameError::TooMany));
        assert_eq!(names.set("one-more", &[]), Err(NameError::TooMany));
        assert_eq!(names.set("n1", &[at("::1"); 9]), Err(NameError::TooMany));
        names.set("n1", &[]).unwrap();
        assert!(addresses(&names, "n1").is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Goal: whatever guests call themselves, each name is one guest's, leads to its own addresses
        /// only, and every address leads back to a name that has it.
        #[test]
        fn every_name_is_one_guests(
            steps in prop::collection::vec((0u8..6, 0u8..4, 0usize..6, 0u8..4), 1..80),
        ) {
            let words = ["web", "WEB.x", "db", "host", "wpad", "n-1"];
            let mut names = names();
            names.set(HOST_NAME, &[at("192.168.64.254")]).unwrap();
            for (what, guest, word, last) in steps {
                let (port, mac) = (Port(guest.into()), [2, 0, 0, 0, 0, guest]);
                // Each guest has its own addresses.
                let address = IpAddr::from([192, 168, 64, 10 * guest + last + 1]);
                match what {
                    0..=3 => {
                        let _ = names.lease(port, mac, words[word].as_bytes(), address);
                    }
                    4 => names.free(address),
                    _ => names.port_left(port),
                }
                for (name, entry) in &names.entries {
                    prop_assert!(!entry.addresses.is_empty());
                    for address in &entry.addresses {
                        prop_assert!(names.by_address.contains_key(address));
                        if let (By::Lease(port, _), IpAddr::V4(v4)) = (entry.by, address) {
                            prop_assert_eq!(u32::from((v4.octets()[3] - 1) / 10), port.0);
                            prop_assert!(&**name != HOST_NAME);
                        }
                    }
                }
                for (address, name) in &names.by_address {
                    prop_assert!(names.entries[name].addresses.contains(address));
                }
                prop_assert_eq!(addresses(&names, HOST_NAME), [at("192.168.64.254")]);
            }
        }
    }
}
