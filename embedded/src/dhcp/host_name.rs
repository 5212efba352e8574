//! The names that clients call themselves (option 12; RFC 2132, 3.14).

use core::net::Ipv4Addr;

use macaddr::MacAddr6;

/// The name of a client that has a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName {
    /// The address that the client has leased.
    pub address: Ipv4Addr,
    /// The client.
    pub mac: MacAddr6,
    /// The number of the interface behind which the client was seen last, if that is known and the
    /// interface has not left since.
    pub port: Option<u32>,
    /// The first label of what it calls itself, in lower case: 1 to 63 letters, digits and hyphens, and no
    /// hyphen at either end (RFC 1123, 2.1). It is what the client says, so two may say the same.
    pub name: Box<str>,
}

/// Reads the first label of a client's name. `None` if that is no host name.
pub(super) fn label(name: &[u8]) -> Option<Box<str>> {
    // Some clients end it with zeros (RFC 2132, 2).
    let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    let first = name[..end].split(|&byte| byte == b'.').next()?;
    let is_fine = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
    let hyphen = first.first() == Some(&b'-') || first.last() == Some(&b'-');
    if first.is_empty() || first.len() > 63 || hyphen || !first.iter().all(is_fine) {
        return None;
    }
    Some(first.iter().map(|byte| char::from(byte.to_ascii_lowercase())).collect())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_first_label_in_lower_case() {
        let read = |name: &[u8]| label(name).map(String::from);
        for (name, expected) in
            [(&b"Web-1"[..], "web-1"), (b"db.example.com", "db"), (b"a\0\0", "a"), (b"7", "7")]
        {
            assert_eq!(read(name).as_deref(), Some(expected));
        }
        assert!(read(&[b'x'; 63]).is_some());
        let bad: [&[u8]; 11] = [
            b"",
            b"\0web",
            b".web",
            b"-a",
            b"a-",
            b"a_b",
            b"a b",
            b"a\xff",
            b"a/b",
            b"a\nb",
            &[b'x'; 64],
        ];
        for name in bad {
            assert_eq!(read(name), None, "{name:?}");
        }
    }
}
