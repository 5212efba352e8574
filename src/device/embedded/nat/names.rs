//! The names of guests: what they call themselves in DHCP becomes what other guests find them by.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use vmring_embedded::dhcp::HostName;
use vmring_nat::Port;
use vmring_nat::dns::names::Names;

/// The names of a network, with those that its guests have or were refused.
pub(super) struct GuestNames {
    table: Names,
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
    /// The names that the network has whoever its guests are.
    pub(super) fn new(table: Names) -> Self {
        Self { table, told: HashMap::new() }
    }

    /// All names, as they are now.
    pub(super) fn table(&self) -> &Names {
        &self.table
    }

    /// Follows what guests that have a lease call themselves now. Returns the port of each guest that does
    /// not get the name that it calls itself, once for each name.
    pub(super) fn follow(&mut self, now: Vec<HostName>) -> Vec<Port> {
        let names = &mut self.table;
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
                    names.free(address.into());
                    kept.push((address, told));
                }
                None => kept.push((address, told)),
            }
        }
        // A guest without a lease has no name, so that another may have it.
        for address in before.into_keys() {
            names.free(address.into());
        }
        let mut refused = Vec::new();
        for (address, mut told) in kept {
            let (port, name) = (Port(told.port), told.name.as_bytes());
            let was_refused = told.is_refused;
            told.is_refused = names.lease(port, told.mac, name, address.into()).is_err();
            // It was counted. The guest that had the name may be gone.
            if told.is_refused && !was_refused {
                refused.push(port);
            }
            self.told.insert(address, told);
        }
        refused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MacAddr6;

    fn host(last: u8, port: Option<u32>, name: &str) -> HostName {
        let mac = MacAddr6::new(2, 0, 0, 0, 0, last);
        HostName { address: Ipv4Addr::new(192, 168, 64, last), mac, port, name: name.into() }
    }

    /// Goal: each guest has the name that it has now, for as long as it has its lease, and one that was
    /// refused has it when it is nobody's. A refusal is counted once.
    #[test]
    fn names_follow_leases() {
        let subnets = ["192.168.64.0/24", "fd00::/64"].map(|subnet| subnet.parse().unwrap());
        let mut names = GuestNames::new(Names::new(subnets));
        let mut refused = 0;
        let mut check = |names: &mut GuestNames, now: &[HostName], expected: &[(&str, u8)]| {
            refused += names.follow(now.to_vec()).len();
            let mut found: Vec<_> = names
                .table()
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
            refused
        };
        let (web, db) = (host(2, Some(0), "web"), host(3, Some(1), "db"));
        check(&mut names, &[web.clone(), db.clone()], &[("db", 3), ("web", 2)]);
        let rival = host(4, Some(2), "web");
        for _ in 0..3 {
            let now = [web.clone(), db.clone(), rival.clone()];
            assert_eq!(check(&mut names, &now, &[("db", 3), ("web", 2)]), 1);
        }
        // The first one gives its lease back, and the other one calls itself something else.
        check(&mut names, &[host(3, Some(1), "sql"), rival.clone()], &[("sql", 3), ("web", 4)]);
        // The same guest is behind another port, or behind none.
        check(&mut names, &[host(3, Some(5), "sql"), rival], &[("sql", 3), ("web", 4)]);
        check(&mut names, &[host(3, None, "sql")], &[]);
        // Another guest has its address.
        check(&mut names, &[host(3, Some(5), "sql")], &[("sql", 3)]);
        let mut other = host(3, Some(6), "new");
        other.mac = MacAddr6::new(2, 0, 0, 0, 9, 9);
        check(&mut names, &[other], &[("new", 3)]);
        assert_eq!(check(&mut names, &[], &[]), 1);
    }
}
