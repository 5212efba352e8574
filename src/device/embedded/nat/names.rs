//! The names of guests: what they call themselves in DHCP becomes what other guests find them by.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use vmring_embedded::dhcp::HostName;
use vmring_nat::sys::Host;
use vmring_nat::{Nat, Port};

/// The names of guests, as a translator has got them.
#[derive(Default)]
pub(super) struct GuestNames {
    /// Whose name each address has or was refused.
    told: HashMap<Ipv4Addr, Told>,
}

struct Told {
    mac: [u8; 6],
    port: u32,
    name: Box<str>,
    is_refused: bool,
}

impl GuestNames {
    /// Tells the translator what guests that have a lease call themselves now.
    pub(super) fn follow(&mut self, now: Vec<HostName>, nat: &mut Nat<Host>) {
        let mut before = std::mem::take(&mut self.told);
        let mut kept = Vec::with_capacity(now.len());
        for host in now {
            let HostName { address, mac, port: Some(port), name } = host else { continue };
            let told = Told { mac: mac.into_array(), port, name, is_refused: false };
            let is_same = |old: &Told| (old.mac, old.port) == (told.mac, told.port);
            match before.remove(&address) {
                Some(old) if is_same(&old) => {
                    let is_refused = old.is_refused && old.name == told.name;
                    kept.push((address, Told { is_refused, ..told }));
                }
                Some(_) => {
                    nat.names_mut().free(address.into());
                    kept.push((address, told));
                }
                None => kept.push((address, told)),
            }
        }
        // A guest without a lease has no name, so that another may have it.
        for address in before.into_keys() {
            nat.names_mut().free(address.into());
        }
        for (address, mut told) in kept {
            let (port, name) = (Port(told.port), told.name.as_bytes());
            told.is_refused = match told.is_refused {
                // It was counted. Whoever had the name may be gone.
                true => nat.names_mut().lease(port, told.mac, name, address.into()).is_err(),
                false => nat.lease_name(port, told.mac, name, address.into()).is_err(),
            };
            self.told.insert(address, told);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmring_nat::{Counter, NatConfig};

    use super::*;
    use crate::MacAddr6;

    fn nat() -> Nat<Host> {
        let gateway = ("192.168.64.1".parse().unwrap(), "fd00::1".parse().unwrap());
        let config = NatConfig::new([2, 0, 0, 0, 0, 1], gateway.0, gateway.1);
        Nat::new(config, Host::new().expect("descriptors"), Duration::ZERO)
    }

    fn host(last: u8, port: Option<u32>, name: &str) -> HostName {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, last);
        HostName { address: Ipv4Addr::new(192, 168, 64, last), mac, port, name: name.into() }
    }

    /// Goal: each guest has the name that it has now, for as long as it has its lease, and one that was
    /// refused has it when it is nobody's. A refusal is counted once.
    #[test]
    fn names_follow_leases() {
        let (mut nat, mut names) = (nat(), GuestNames::default());
        let mut check = |nat: &mut Nat<Host>, now: &[HostName], expected: &[(&str, u8)]| {
            names.follow(now.to_vec(), nat);
            let mut found: Vec<_> = nat
                .names()
                .iter()
                .map(|(name, addresses)| match addresses {
                    [std::net::IpAddr::V4(address)] => (name.to_owned(), address.octets()[3]),
                    other => panic!("{name}: {other:?}"),
                })
                .collect();
            found.sort();
            let expected: Vec<_> =
                expected.iter().map(|(name, last)| (format!("{name}.internal"), *last)).collect();
            assert_eq!(found, expected);
        };
        let (web, db) = (host(2, Some(0), "web"), host(3, Some(1), "db"));
        check(&mut nat, &[web.clone(), db.clone()], &[("db", 3), ("web", 2)]);
        let rival = host(4, Some(2), "web");
        for _ in 0..3 {
            let now = [web.clone(), db.clone(), rival.clone()];
            check(&mut nat, &now, &[("db", 3), ("web", 2)]);
            assert_eq!(nat.counters()[Counter::NameRefused], 1);
        }
        // The first one gives its lease back, and the other one calls itself something else.
        check(&mut nat, &[host(3, Some(1), "sql"), rival.clone()], &[("sql", 3), ("web", 4)]);
        // The same guest is behind another port, or behind none.
        check(&mut nat, &[host(3, Some(5), "sql"), rival], &[("sql", 3), ("web", 4)]);
        check(&mut nat, &[host(3, None, "sql")], &[]);
        // Another guest has its address.
        check(&mut nat, &[host(3, Some(5), "sql")], &[("sql", 3)]);
        let mut other = host(3, Some(6), "new");
        other.mac = MacAddr6::new(2, 0, 0, 0, 9, 9);
        check(&mut nat, &[other], &[("new", 3)]);
        // Its port goes and comes, and nobody has looked meanwhile.
        nat.names_mut().port_left(Port(6));
        let mut other = host(3, Some(6), "new");
        other.mac = MacAddr6::new(2, 0, 0, 0, 9, 9);
        check(&mut nat, &[other], &[("new", 3)]);
        check(&mut nat, &[], &[]);
        assert_eq!(nat.counters()[Counter::NameRefused], 1);
    }
}
