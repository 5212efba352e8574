//! Stateless DHCPv6 (RFC 8415): it tells name servers, and gives out no addresses.
//!
//! Only the Information-request message is answered. A client that asks for an address gets no answer,
//! because router advertisements say that DHCPv6 has other information only (RFC 4861, 4.2).

use core::net::Ipv6Addr;

/// The port of servers (RFC 8415, 7.2).
pub(crate) const SERVER_PORT: u16 = 547;
/// The port of clients (RFC 8415, 7.2).
pub(super) const CLIENT_PORT: u16 = 546;
/// The length of a server's DUID that is made of its MAC address, in bytes (RFC 8415, 11.4).
pub(super) const DUID_LEN: usize = 10;

// Messages (RFC 8415, 7.3).
const REPLY: u8 = 7;
const INFORMATION_REQUEST: u8 = 11;

// Options (RFC 8415, 21; RFC 3646, 3).
const CLIENT_ID: u16 = 1;
const SERVER_ID: u16 = 2;
const IA_NA: u16 = 3;
const IA_TA: u16 = 4;
const OPTION_REQUEST: u16 = 6;
const DNS_SERVERS: u16 = 23;
const IA_PD: u16 = 25;

/// The bytes of a message in front of its options.
const HEADER_LEN: usize = 4;
/// The bytes of an option in front of its data.
const OPTION_LEN: usize = 4;
/// The longest DUID, in bytes (RFC 8415, 11.1).
const DUID_MAX: usize = 2 + 128;

/// Why a message gets no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ignored {
    /// It is cut short, or an option has a wrong length.
    Malformed,
    /// It is no Information-request, or one that is for another server or asks for an address.
    Other,
}

/// An Information-request.
pub(super) struct Request<'a> {
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    wants_dns: bool,
}

/// The identifier of a server with this MAC address: a DUID of the type "link-layer address" (RFC 8415,
/// 11.4), for Ethernet.
pub(super) fn server_id(mac: [u8; 6]) -> [u8; DUID_LEN] {
    let [a, b, c, d, e, f] = mac;
    [0, 3, 0, 1, a, b, c, d, e, f]
}

/// Reads a message for the server with this identifier.
pub(super) fn parse<'a>(
    message: &'a [u8],
    server: &[u8; DUID_LEN],
) -> Result<Request<'a>, Ignored> {
    let &[kind, a, b, c, ref options @ ..] = message else { return Err(Ignored::Malformed) };
    if kind != INFORMATION_REQUEST {
        return Err(Ignored::Other);
    }
    let mut request = Request { transaction: [a, b, c], client: None, wants_dns: true };
    let mut rest = options;
    while let &[code_high, code_low, len_high, len_low, ref data @ ..] = rest {
        let len = usize::from(u16::from_be_bytes([len_high, len_low]));
        let (data, after) = data.split_at_checked(len).ok_or(Ignored::Malformed)?;
        rest = after;
        match u16::from_be_bytes([code_high, code_low]) {
            CLIENT_ID if data.is_empty() || data.len() > DUID_MAX => {
                return Err(Ignored::Malformed);
            }
            CLIENT_ID => request.client = Some(data),
            // Another server is asked (RFC 8415, 16.12).
            SERVER_ID if data != server => return Err(Ignored::Other),
            IA_NA | IA_TA | IA_PD => return Err(Ignored::Other),
            OPTION_REQUEST if data.len() % 2 != 0 => return Err(Ignored::Malformed),
            OPTION_REQUEST => {
                request.wants_dns =
                    data.chunks_exact(2).any(|code| code == DNS_SERVERS.to_be_bytes());
            }
            _ => {}
        }
    }
    if rest.is_empty() { Ok(request) } else { Err(Ignored::Malformed) }
}

impl Request<'_> {
    /// The name servers that the answer tells.
    fn told<'d>(&self, dns: &'d [Ipv6Addr]) -> &'d [Ipv6Addr] {
        if self.wants_dns { dns } else { &[] }
    }

    /// The bytes of the answer.
    pub(super) fn reply_len(&self, dns: &[Ipv6Addr]) -> usize {
        let client = self.client.map_or(0, |client| OPTION_LEN + client.len());
        let dns = match self.told(dns) {
            [] => 0,
            dns => OPTION_LEN + size_of_val(dns),
        };
        HEADER_LEN + OPTION_LEN + DUID_LEN + client + dns
    }

    /// Writes the answer. `out` has [`reply_len`](Self::reply_len) bytes.
    pub(super) fn write_reply(&self, server: &[u8; DUID_LEN], dns: &[Ipv6Addr], out: &mut [u8]) {
        let mut out = Writer { out, at: 0 };
        out.put(&[REPLY]);
        out.put(&self.transaction);
        out.option(SERVER_ID, server.len());
        out.put(server);
        if let Some(client) = self.client {
            out.option(CLIENT_ID, client.len());
            out.put(client);
        }
        let dns = self.told(dns);
        if !dns.is_empty() {
            out.option(DNS_SERVERS, size_of_val(dns));
            dns.iter().for_each(|server| out.put(&server.octets()));
        }
    }
}

struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) {
        self.out[self.at..self.at + bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }

    fn option(&mut self, code: u16, len: usize) {
        self.put(&code.to_be_bytes());
        self.put(&(len as u16).to_be_bytes());
    }
}
