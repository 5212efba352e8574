//! Frames for the targets that take them: partly made up whole, with right checksums around hostile
//! fields (or few inputs would get past the first check), partly raw.

use arbitrary::Arbitrary;
use core::net::Ipv4Addr;

pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 1);
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// Few addresses, so that they run out.
pub const LAST: Ipv4Addr = Ipv4Addr::new(192, 168, 64, 4);
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
        };
        let mut out = Vec::new();
        out.extend(self.to.bytes(ports, gateway));
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
