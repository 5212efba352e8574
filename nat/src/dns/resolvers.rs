//! The resolvers that queries are passed to, and which of them a port asks.
//!
//! Each port goes its own way through the list, because a guest can ask for names that take long or fail,
//! and is to move nobody else to another resolver by that.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use crate::limits::{DNS_PORT, RESOLVER_RESTORE, RESOLVER_SILENT, RESOLVERS};

/// Where the resolvers come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resolvers {
    /// The host's own, which are read again when they change:
    /// [`Sockets::resolvers`](crate::Sockets::resolvers).
    #[default]
    Host,
    /// These, in this order. Of more than [`RESOLVERS`], the first are used.
    /// Without any, local names are answered, and every other query is refused.
    Fixed(Vec<SocketAddr>),
}

/// The resolvers that a text in the form of resolv.conf(5) names, as glibc reads it: the first
/// [`RESOLVERS`] lines that begin with `nameserver`. A line that begins with `#`
/// or `;` is a comment, and what is behind an address is ignored. A text that names none means the
/// resolver of the machine itself, 127.0.0.1.
///
/// `scope` says what number a name of an interface has, as in `fe80::1%eth0`. An address with a scope that
/// has none is left out, as is what is no address.
///
/// An unspecified address means the machine itself, too. It is given as the loopback address.
pub fn parse_resolv_conf(text: &[u8], scope: impl Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let mut found = Vec::new();
    for line in text.split(|&byte| byte == b'\n') {
        let Ok(line) = core::str::from_utf8(line) else { continue };
        // A keyword is at the start of its line, and blanks are behind it.
        let Some(rest) = line.strip_prefix("nameserver") else { continue };
        if !rest.starts_with([' ', '\t']) {
            continue;
        }
        let Some(word) = rest.split([' ', '\t', '\r']).find(|word| !word.is_empty()) else {
            continue;
        };
        if let Some(address) = resolver(word, &scope) {
            found.push(address);
            if found.len() == RESOLVERS {
                break;
            }
        }
    }
    if found.is_empty() {
        found.push((Ipv4Addr::LOCALHOST, DNS_PORT).into());
    }
    found
}

fn resolver(word: &str, scope: impl Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    let (address, zone) = match word.split_once('%') {
        Some((address, zone)) => (address, Some(zone)),
        None => (word, None),
    };
    let address = match (address.parse().ok()?, zone) {
        (IpAddr::V4(_), Some(_)) => return None,
        (IpAddr::V6(v6), Some(zone)) if v6.is_unicast_link_local() => {
            let scope = zone.parse().ok().or_else(|| scope(zone))?;
            SocketAddrV6::new(v6, DNS_PORT, 0, scope).into()
        }
        (address, _) => SocketAddr::new(address, DNS_PORT),
    };
    Some(answering(address))
}

/// The address that the answers of a resolver come from, so that they are known as its own. Of an
/// unspecified address it is loopback, and only addresses of a link have a scope.
pub(crate) fn answering(resolver: SocketAddr) -> SocketAddr {
    let port = resolver.port();
    match (resolver.ip().to_canonical(), resolver) {
        (IpAddr::V4(v4), _) if v4.is_unspecified() => (Ipv4Addr::LOCALHOST, port).into(),
        (IpAddr::V6(v6), _) if v6.is_unspecified() => (Ipv6Addr::LOCALHOST, port).into(),
        (IpAddr::V6(v6), SocketAddr::V6(full)) if v6.is_unicast_link_local() => {
            SocketAddrV6::new(v6, port, 0, full.scope_id()).into()
        }
        (ip, _) => SocketAddr::new(ip, port),
    }
}

/// Which resolver a port asks.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Choice {
    current: usize,
    /// When the first one is asked again, in microseconds. 0 is never.
    restore_at: u64,
    /// Since when the current one has been asked and has answered nothing. 0 is never.
    waiting_since: u64,
}

impl Choice {
    /// The resolver to ask now, and whether the one before it is passed over because it is silent.
    pub(crate) fn resolver(&mut self, list: &[SocketAddr], now: u64) -> (Option<SocketAddr>, bool) {
        // What was not answered so long ago says nothing of now.
        let is_old = self.waiting_since > 0 && now >= self.waiting_since + RESOLVER_RESTORE;
        if is_old || self.restore_at > 0 && self.restore_at <= now {
            *self = Self::default();
        }
        let silent = self.waiting_since > 0 && now >= self.waiting_since + RESOLVER_SILENT;
        if silent {
            self.advance(list, now);
        }
        (list.get(self.current).copied(), silent)
    }

    /// The one behind a resolver, which has not answered a query that is made again.
    pub(crate) fn behind(&self, list: &[SocketAddr], asked: SocketAddr) -> Option<SocketAddr> {
        let index = list.iter().position(|&other| other == asked);
        list.get((index.unwrap_or(self.current) + 1) % list.len().max(1)).copied()
    }

    /// Notes that a query was given to the current resolver.
    pub(crate) fn asked(&mut self, now: u64) {
        if self.waiting_since == 0 {
            self.waiting_since = now.max(1);
        }
    }

    /// Notes that a resolver has answered.
    pub(crate) fn answered(&mut self) {
        self.waiting_since = 0;
    }

    /// Turns to the next resolver, if this one is the current.
    pub(crate) fn failed(&mut self, list: &[SocketAddr], which: IpAddr, now: u64) -> bool {
        let current = list.get(self.current).is_some_and(|current| current.ip() == which);
        if current {
            self.advance(list, now);
        }
        current
    }

    fn advance(&mut self, list: &[SocketAddr], now: u64) {
        self.waiting_since = 0;
        self.current = (self.current + 1) % list.len().max(1);
        if self.current == 0 {
            self.restore_at = 0;
        } else if self.restore_at == 0 {
            self.restore_at = now + RESOLVER_RESTORE;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Vec<String> {
        let scope = |name: &str| (name == "eth0").then_some(7);
        let found = parse_resolv_conf(text.as_bytes(), scope);
        found.iter().map(ToString::to_string).collect()
    }

    /// Goal: a file is read as glibc reads it (res_init.c, `res_vinit_1`).
    #[test]
    fn a_file_is_read_as_the_c_library_reads_it() {
        let text = "# nameserver 192.0.2.9\n; nameserver 192.0.2.8\nsearch example.com\n\
             nameserver 127.0.0.53\nnameserver\t2001:db8::1  # a comment\r\n nameserver 192.0.2.7\n\
             nameservers 192.0.2.6\nnameserver192.0.2.5\noptions edns0 trust-ad\n\
             nameserver fe80::1%eth0 x\nnameserver 192.0.2.4\n";
        assert_eq!(parse(text), ["127.0.0.53:53", "[2001:db8::1]:53", "[fe80::1%7]:53"]);
        // What is no address is left out and does not count.
        let text = "nameserver\nnameserver \nnameserver x\nnameserver 1.2.3.4.5\nnameserver \
             fe80::2%wlan9\nnameserver 192.0.2.1%eth0\nnameserver fe80::3%12\nnameserver \
             2001:db8::2%eth0\nnameserver ::1";
        assert_eq!(parse(text), ["[fe80::3%12]:53", "[2001:db8::2]:53", "[::1]:53"]);
        assert_eq!(parse("nameserver 0.0.0.0\nnameserver ::"), ["127.0.0.1:53", "[::1]:53"]);
        assert_eq!(parse("nameserver ::ffff:192.0.2.1"), ["192.0.2.1:53"]);
        for text in ["", "search a\n", "nameserver x", "#nameserver 192.0.2.1"] {
            assert_eq!(parse(text), ["127.0.0.1:53"], "{text}");
        }
        let mut bytes = b"nameserver \xff\xfe\nnameserver 192.0.2.1\n\0\0".to_vec();
        bytes.extend([b'x'; 5000]);
        let found = parse_resolv_conf(&bytes, |_| None);
        assert_eq!(found, [SocketAddr::from(([192, 0, 2, 1], 53))]);
    }

    /// Goal: the address of a resolver is the one that its answers come from.
    #[test]
    fn an_answer_is_known_by_its_address() {
        let mapped = "[::ffff:0.0.0.0]:9".parse().unwrap();
        assert_eq!(answering(mapped), "127.0.0.1:9".parse().unwrap());
        let odd = |ip: &str| SocketAddrV6::new(ip.parse().unwrap(), 9, 7, 3);
        let plain = |ip: &str, scope| SocketAddrV6::new(ip.parse().unwrap(), 9, 0, scope).into();
        assert_eq!(answering(odd("2001:db8::1").into()), plain("2001:db8::1", 0));
        assert_eq!(answering(odd("fe80::1").into()), plain("fe80::1", 3));
    }

    fn list(len: usize) -> Vec<SocketAddr> {
        (0..len).map(|n| ([192, 0, 2, n as u8], 53).into()).collect()
    }

    /// Goal: a silent resolver is passed over, one that answers is not, and the order comes back.
    #[test]
    fn a_silent_resolver_is_passed_over_for_a_while() {
        let list = list(3);
        let mut choice = Choice::default();
        let second = 1_000_000;
        assert_eq!(choice.resolver(&list, second), (Some(list[0]), false));
        choice.asked(second);
        assert_eq!(choice.resolver(&list, 2 * second), (Some(list[0]), false));
        choice.asked(2 * second);
        choice.answered();
        choice.asked(4 * second);
        assert_eq!(choice.resolver(&list, 5 * second), (Some(list[0]), false));
        assert_eq!(choice.resolver(&list, 6 * second), (Some(list[1]), true));
        assert_eq!(choice.resolver(&list, 7 * second), (Some(list[1]), false));
        choice.asked(7 * second);
        assert_eq!(choice.resolver(&list, 9 * second), (Some(list[2]), true));
        choice.asked(9 * second);
        assert_eq!(choice.resolver(&list, 11 * second), (Some(list[0]), true));
        choice.asked(11 * second);
        assert_eq!(choice.resolver(&list, 13 * second), (Some(list[1]), true));
        assert_eq!(choice.resolver(&list, 73 * second), (Some(list[0]), false));
        // Only the one that is asked can fail, and a list of one stays.
        assert!(!choice.failed(&list, list[1].ip(), 73 * second));
        assert!(choice.failed(&list, list[0].ip(), 73 * second));
        assert_eq!(choice.behind(&list, list[2]), Some(list[0]));
        let mut choice = Choice::default();
        choice.asked(second);
        assert_eq!(choice.resolver(&list[..1], 9 * second), (Some(list[0]), true));
        assert_eq!(choice.behind(&list[..1], list[0]), Some(list[0]));
        assert_eq!(choice.resolver(&[], 99 * second), (None, false));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Goal: whatever happens, there is a resolver to ask if there is one at all, and the first is
        /// asked again a minute after the last failure at most.
        #[test]
        fn there_is_always_a_resolver(
            len in 1usize..4,
            steps in prop::collection::vec((0u8..4, 0u64..30_000_000), 0..50),
        ) {
            let list = list(len);
            let (mut choice, mut now) = (Choice::default(), 1);
            for (what, wait) in steps {
                now += wait;
                let (resolver, _) = choice.resolver(&list, now);
                prop_assert!(resolver.is_some_and(|resolver| list.contains(&resolver)));
                match what {
                    0 => choice.asked(now),
                    1 => choice.answered(),
                    2 => {
                        choice.failed(&list, resolver.unwrap().ip(), now);
                    }
                    _ => {}
                }
            }
            choice.answered();
            prop_assert_eq!(choice.resolver(&list, now + RESOLVER_RESTORE).0, Some(list[0]));
        }

        /// Goal: no file makes the reader panic, or name more than it may.
        #[test]
        fn any_file_can_be_read(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let text = [&b"nameserver "[..], &text].concat();
            prop_assert!((1..=RESOLVERS).contains(&parse_resolv_conf(&text, |_| None).len()));
        }
    }
}
