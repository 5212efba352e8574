//! The resolvers that queries are passed to.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use crate::limits::{DNS_PORT, RESOLVERS};

/// The resolvers that a text in the form of resolv.conf(5) names, as glibc reads it: the first
/// [`RESOLVERS`](crate::limits::RESOLVERS) lines that begin with `nameserver`. A line that begins with `#`
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
fn answering(resolver: SocketAddr) -> SocketAddr {
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Goal: no file makes the reader panic, or name more than it may.
        #[test]
        fn any_file_can_be_read(text in prop::collection::vec(any::<u8>(), 0..300)) {
            let text = [&b"nameserver "[..], &text].concat();
            prop_assert!((1..=RESOLVERS).contains(&parse_resolv_conf(&text, |_| None).len()));
        }
    }
}
