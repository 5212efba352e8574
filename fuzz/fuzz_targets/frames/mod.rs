//! Frames for the targets that take them: partly made up whole, with right checksums around hostile
//! fields (or few inputs would get past the first check), partly raw.

use arbitrary::Arbitrary;
use core::net::{Ipv4Addr, Ipv6Addr};

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Few addresses, so that they run out.
pub const LAST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 4);
/// The IPv6 prefix of the gateway, whose address is the first after it.
pub const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 1, 0, 0, 0, 0);
const DHCP_COOKIE: [u8; 4] = [99, 130, 83, 99];

#[derive(Arbitrary, Debug)]
pub struct Frame<'a> {
    body: Body<'a>,
    to: Mac,
    from: Mac,
    /// Bytes overwritten last, checksums left as they were.
    spoilt: Option<(u16, u8)>,
    cut: Option<u16>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Mac {
    Gateway,
    Broadcast,
    /// The group of the frame's IPv6 packet, or all nodes.
    Group,
    Guest(u8),
    Port(bool),
    Any([u8; 6]),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Ip {
    Gateway,
    Guest(u8),
    Broadcast,
    Nobody,
    Any([u8; 4]),
}

#[derive(Arbitrary, Debug)]
enum Body<'a> {
    Raw(&'a [u8]),
    Typed { ethertype: u16, payload: &'a [u8] },
    Arp { operation: u8, sender: Ip, target: Ip },
    Ipv4 { ip: Ipv4<'a>, protocol: u8, payload: &'a [u8] },
    Icmp { ip: Ipv4<'a>, kind: Option<u8>, payload: &'a [u8] },
    Udp { ip: Ipv4<'a>, ports: (u16, u16), payload: &'a [u8] },
    Dhcp(Dhcp<'a>),
    Ipv6 { ip: Ipv6<'a>, protocol: u8, payload: &'a [u8] },
    Icmpv6 { ip: Ipv6<'a>, kind: Kind6, target: Ip6, options: &'a [u8] },
    Udp6 { ip: Ipv6<'a>, ports: (u16, u16), payload: &'a [u8] },
    Dhcpv6 { ip: Ipv6<'a>, kind: Option<u8>, client: Option<u8>, ours: bool, options: &'a [u8] },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Ip6 {
    Gateway,
    GatewayLink,
    Guest(u8),
    GuestLink(u8),
    Nobody,
    AllNodes,
    AllRouters,
    DhcpServers,
    /// The group of the gateway's address, or of its link-local one.
    Solicited(bool),
    Outside,
    Any([u8; 16]),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind6 {
    Echo,
    RouterSolicitation,
    NeighborSolicitation,
    NeighborAdvertisement,
    Any(u8, u8),
}

#[derive(Arbitrary, Debug)]
struct Ipv6<'a> {
    to: Ip6,
    from: Ip6,
    /// A hop limit other than 255.
    hops: Option<u8>,
    /// Extension headers, each with its number and what is behind its first two bytes.
    extensions: Vec<(u8, &'a [u8])>,
    /// Added to the right payload length.
    lie: i8,
}

#[derive(Arbitrary, Debug)]
struct Ipv4<'a> {
    to: Ip,
    from: Ip,
    odd: Option<Odd<'a>>,
}

/// What makes an IPv4 header unusual.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Odd<'a> {
    fragment: u16,
    /// Header options, of which at most 40 bytes are taken.
    options: &'a [u8],
    /// Added to the right total length.
    lie: i8,
}

#[derive(Arbitrary, Debug)]
struct Dhcp<'a> {
    to: Ip,
    from: Ip,
    kind: u8,
    client: Option<u8>,
    client_ip: Ip,
    flags: u16,
    relay: Option<Ip>,
    requested: Option<Ip>,
    server: Option<Ip>,
    options: &'a [u8],
    end: bool,
}

impl Mac {
    fn bytes(self, ports: &[[u8; 6]; 2], gateway: [u8; 6]) -> [u8; 6] {
        match self {
            Mac::Gateway => gateway,
            Mac::Broadcast => [0xff; 6],
            Mac::Group => [0x33, 0x33, 0, 0, 0, 1],
            Mac::Guest(n) => guest(n),
            Mac::Port(second) => ports[usize::from(second)],
            Mac::Any(bytes) => bytes,
        }
    }
}

fn guest(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n % 8]
}

impl Ip {
    fn bytes(self) -> [u8; 4] {
        match self {
            Ip::Gateway => GATEWAY.octets(),
            Ip::Guest(n) => [192, 168, 64, 2 + n % 6],
            Ip::Broadcast => [255; 4],
            Ip::Nobody => [0; 4],
            Ip::Any(bytes) => bytes,
        }
    }
}

/// The link-local address of an interface with this MAC address.
pub fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f].into()
}

impl Ip6 {
    fn bytes(self, gateway: [u8; 6]) -> [u8; 16] {
        let group = |last: u16, rest: u16| Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, rest, last);
        let own = Ipv6Addr::from_bits(PREFIX.to_bits() | 1);
        let solicited = |address: Ipv6Addr| {
            let low = address.to_bits() & 0xff_ffff;
            Ipv6Addr::from_bits(0xff02_0000_0000_0000_0000_0001_ff00_0000 | low)
        };
        let address = match self {
            Ip6::Gateway => own,
            Ip6::GatewayLink => link_local(gateway),
            Ip6::Guest(n) => Ipv6Addr::from_bits(PREFIX.to_bits() | (0x100 + u128::from(n % 8))),
            Ip6::GuestLink(n) => link_local(guest(n)),
            Ip6::Nobody => Ipv6Addr::UNSPECIFIED,
            Ip6::AllNodes => group(1, 0),
            Ip6::AllRouters => group(2, 0),
            Ip6::DhcpServers => group(2, 1),
            Ip6::Solicited(true) => solicited(link_local(gateway)),
            Ip6::Solicited(false) => solicited(own),
            Ip6::Outside => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
            Ip6::Any(bytes) => bytes.into(),
        };
        address.octets()
    }
}

/// The pseudo header's checksum and that of a transport header together.
pub fn checksum6(from: &[u8], to: &[u8], protocol: u8, message: &[u8]) -> u16 {
    let len = (message.len() as u32).to_be_bytes();
    checksum(&[from, to, &len, &[0, protocol], message])
}

fn ipv6(ip: &Ipv6, protocol: u8, payload: &[u8], gateway: [u8; 6]) -> Vec<u8> {
    let mut body = Vec::new();
    let mut next = protocol;
    for (kind, content) in ip.extensions.iter().take(10).rev() {
        let units = (content.len().min(64) + 2).div_ceil(8);
        let mut header = vec![next, units as u8 - 1];
        header.extend(&content[..content.len().min(64)]);
        header.resize(units * 8, 0);
        header.extend(&body);
        body = header;
        // These are mostly those that are known.
        next = [0, 60, 43, 44, 60, 0, *kind, 59][usize::from(kind % 8)];
    }
    body.extend(payload);
    let mut out = vec![0x60, 0, 0, 0];
    out.extend((body.len() as u16).wrapping_add_signed(ip.lie.into()).to_be_bytes());
    out.extend([next, ip.hops.unwrap_or(255)]);
    out.extend(ip.from.bytes(gateway));
    out.extend(ip.to.bytes(gateway));
    out.extend(body);
    out
}

fn icmpv6(ip: &Ipv6, kind: Kind6, target: Ip6, options: &[u8], gateway: [u8; 6]) -> Vec<u8> {
    let (kind, code) = match kind {
        Kind6::Echo => (128, 0),
        Kind6::RouterSolicitation => (133, 0),
        Kind6::NeighborSolicitation => (135, 0),
        Kind6::NeighborAdvertisement => (136, 0),
        Kind6::Any(kind, code) => (kind, code),
    };
    let mut out = vec![kind, code, 0, 0, 0, 0, 0, 0];
    if matches!(kind, 135 | 136) {
        out.extend(target.bytes(gateway));
    }
    out.extend(options);
    let sum = checksum6(&ip.from.bytes(gateway), &ip.to.bytes(gateway), 58, &out);
    out[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv6(ip, 58, &out, gateway)
}

fn udp6(ip: &Ipv6, (from, to): (u16, u16), payload: &[u8], gateway: [u8; 6]) -> Vec<u8> {
    let len = (8 + payload.len()) as u16;
    let mut out = Vec::new();
    for field in [from, to, len, 0] {
        out.extend(field.to_be_bytes());
    }
    out.extend(payload);
    let sum = checksum6(&ip.from.bytes(gateway), &ip.to.bytes(gateway), 17, &out);
    let sum = if sum == 0 { 0xffff } else { sum };
    out[6..8].copy_from_slice(&sum.to_be_bytes());
    ipv6(ip, 17, &out, gateway)
}

/// The internet checksum. Over bytes that contain a right one it is 0.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !sum as u16
}

fn ipv4(ip: &Ipv4, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let Odd { fragment, options, lie } =
        ip.odd.unwrap_or(Odd { fragment: 0x4000, options: &[], lie: 0 });
    let words = options.len().min(40) / 4;
    let total = (20 + 4 * words + payload.len()) as u16;
    let total = total.wrapping_add_signed(lie.into());
    let mut out = vec![0x40 | (5 + words as u8), 0];
    out.extend(total.to_be_bytes());
    out.extend([0, 1]);
    out.extend(fragment.to_be_bytes());
    out.extend([64, protocol, 0, 0]);
    out.extend(ip.from.bytes());
    out.extend(ip.to.bytes());
    out.extend(&options[..4 * words]);
    let sum = checksum(&[&out]);
    out[10..12].copy_from_slice(&sum.to_be_bytes());
    out.extend(payload);
    out
}

fn udp(ip: &Ipv4, (from, to): (u16, u16), payload: &[u8]) -> Vec<u8> {
    let len = (8 + payload.len()) as u16;
    let mut out = Vec::new();
    for field in [from, to, len, 0] {
        out.extend(field.to_be_bytes());
    }
    out.extend(payload);
    let sum = checksum(&[&ip.from.bytes(), &ip.to.bytes(), &[0, 17], &len.to_be_bytes(), &out]);
    out[6..8].copy_from_slice(&sum.to_be_bytes());
    ipv4(ip, 17, &out)
}

fn dhcp(dhcp: &Dhcp, from: [u8; 6]) -> Vec<u8> {
    let mut out = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0];
    out.extend(dhcp.flags.to_be_bytes());
    out.extend(dhcp.client_ip.bytes());
    out.extend([0; 8]);
    out.extend(dhcp.relay.unwrap_or(Ip::Nobody).bytes());
    out.extend(dhcp.client.map_or(from, guest));
    out.extend([0; 10 + 192]);
    out.extend(DHCP_COOKIE);
    out.extend([53, 1, dhcp.kind % 10]);
    for (code, ip) in [(50, dhcp.requested), (54, dhcp.server)] {
        if let Some(ip) = ip {
            out.extend([code, 4]);
            out.extend(ip.bytes());
        }
    }
    out.extend(dhcp.options);
    if dhcp.end {
        out.push(255);
    }
    let ip = Ipv4 { to: dhcp.to, from: dhcp.from, odd: None };
    udp(&ip, (68, 67), &out)
}

impl Frame<'_> {
    pub fn bytes(&self, ports: &[[u8; 6]; 2], gateway: [u8; 6]) -> Vec<u8> {
        let from = self.from.bytes(ports, gateway);
        let (ethertype, payload) = match &self.body {
            Body::Raw(bytes) => return bytes.to_vec(),
            Body::Typed { ethertype, payload } => (*ethertype, payload.to_vec()),
            Body::Arp { operation, sender, target } => {
                let mut out = vec![0, 1, 8, 0, 6, 4, 0, operation % 4];
                out.extend(from);
                out.extend(sender.bytes());
                out.extend([0; 6]);
                out.extend(target.bytes());
                (0x0806, out)
            }
            Body::Ipv4 { ip, protocol, payload } => (0x0800, ipv4(ip, *protocol, payload)),
            Body::Icmp { ip, kind, payload } => {
                let mut out = vec![kind.unwrap_or(8), 0, 0, 0, 0, 1, 0, 1];
                out.extend(*payload);
                let sum = checksum(&[&out]);
                out[2..4].copy_from_slice(&sum.to_be_bytes());
                (0x0800, ipv4(ip, 1, &out))
            }
            Body::Udp { ip, ports, payload } => (0x0800, udp(ip, *ports, payload)),
            Body::Dhcp(message) => (0x0800, dhcp(message, from)),
            Body::Ipv6 { ip, protocol, payload } => (0x86dd, ipv6(ip, *protocol, payload, gateway)),
            Body::Icmpv6 { ip, kind, target, options } => {
                (0x86dd, icmpv6(ip, *kind, *target, options, gateway))
            }
            Body::Udp6 { ip, ports, payload } => (0x86dd, udp6(ip, *ports, payload, gateway)),
            Body::Dhcpv6 { ip, kind, client, ours, options } => {
                let mut out = vec![kind.unwrap_or(11), 1, 2, 3];
                if let Some(client) = client {
                    out.extend([0, 1, 0, 10, 0, 3, 0, 1]);
                    out.extend(guest(*client));
                }
                if *ours {
                    out.extend([0, 2, 0, 10, 0, 3, 0, 1]);
                    out.extend(gateway);
                }
                out.extend(*options);
                (0x86dd, udp6(ip, (546, 547), &out, gateway))
            }
        };
        let mut out = Vec::new();
        let to = match (self.to, payload.get(24..40)) {
            (Mac::Group, Some([.., a, b, c, d])) if ethertype == 0x86dd => {
                [0x33, 0x33, *a, *b, *c, *d]
            }
            (to, _) => to.bytes(ports, gateway),
        };
        out.extend(to);
        out.extend(from);
        out.extend(ethertype.to_be_bytes());
        out.extend(payload);
        if let (Some((at, byte)), false) = (self.spoilt, out.is_empty()) {
            let at = usize::from(at) % out.len();
            out[at] = byte;
        }
        out.truncate(self.cut.map_or(usize::MAX, usize::from));
        out
    }
}
