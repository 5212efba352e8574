//! The messages: what the server reads of a client's, and how it writes its own.

use core::net::Ipv4Addr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpHardware, DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpFlags, DhcpMessageType, DhcpOpCode,
    DhcpPacket, EthernetAddress, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket,
};

use super::config::DhcpConfig;
use crate::frame;
use crate::limits::{DHCP_REPLY_MAX, MAX_DNS_SERVERS};

/// The least length of a message. Some old clients need it (RFC 1542, section 2.1).
const MIN_MESSAGE: usize = 300;
/// The bytes of the IPv4 and UDP headers.
const IP_AND_UDP: usize = 20 + 8;
/// The bytes of a message before its options, with the magic number.
const FIXED: usize = 240;
/// The longest IP packet that every client takes (RFC 2131, section 2).
const MIN_MAX_SIZE: u16 = 576;
const MAGIC: u32 = 0x6382_5363;

/// The codes of the options that the server reads or writes (RFC 2132, RFC 3046).
mod code {
    pub(super) const PAD: u8 = 0;
    pub(super) const SUBNET_MASK: u8 = 1;
    pub(super) const ROUTER: u8 = 3;
    pub(super) const NAME_SERVERS: u8 = 6;
    pub(super) const HOST_NAME: u8 = 12;
    pub(super) const INTERFACE_MTU: u8 = 26;
    pub(super) const BROADCAST_ADDRESS: u8 = 28;
    pub(super) const REQUESTED_IP: u8 = 50;
    pub(super) const LEASE_TIME: u8 = 51;
    pub(super) const OVERLOAD: u8 = 52;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_ID: u8 = 54;
    pub(super) const REQUEST_LIST: u8 = 55;
    pub(super) const MESSAGE: u8 = 56;
    pub(super) const MAX_SIZE: u8 = 57;
    pub(super) const RENEWAL_TIME: u8 = 58;
    pub(super) const REBINDING_TIME: u8 = 59;
    pub(super) const CLIENT_ID: u8 = 61;
    pub(super) const RELAY_AGENT: u8 = 82;
    pub(super) const END: u8 = 255;
}

/// The fields of a client's message that the server uses.
pub(super) struct Message<'a> {
    pub(super) kind: DhcpMessageType,
    xid: u32,
    pub(super) mac: [u8; 6],
    /// The Ethernet source: the client itself, or who speaks for it.
    pub(super) from: [u8; 6],
    pub(super) client_ip: Ipv4Addr,
    pub(super) relay: Ipv4Addr,
    pub(super) requested: Option<Ipv4Addr>,
    /// The server that the message is for. Some clients write 0.0.0.0, because they take `siaddr`
    /// for the server's identity; they mean the server whose offer they have.
    pub(super) server: Option<Ipv4Addr>,
    broadcast: bool,
    client_id: Option<&'a [u8]>,
    /// What the client calls itself.
    pub(super) host_name: Option<&'a [u8]>,
    relay_agent: Option<&'a [u8]>,
    request_list: &'a [u8],
    max_size: u16,
}

/// The options of one field of a message, up to its end mark.
fn options(mut field: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    core::iter::from_fn(move || {
        loop {
            match *field.first()? {
                code::END => return None,
                code::PAD => field = &field[1..],
                kind => {
                    let len = usize::from(*field.get(1)?);
                    let data = field.get(2..2 + len)?;
                    field = &field[2 + len..];
                    return Some((kind, data));
                }
            }
        }
    })
}

impl<'a> Message<'a> {
    /// Reads a client's message, field by field: smoltcp's `DhcpRepr::parse` refuses client
    /// identifiers that are not Ethernet addresses, and many clients send such identifiers.
    pub(super) fn parse(payload: &'a [u8], from: EthernetAddress) -> Option<Self> {
        let packet = DhcpPacket::new_checked(payload).ok()?;
        if packet.hardware_type() != ArpHardware::Ethernet
            || packet.hardware_len() != 6
            || packet.magic_number() != MAGIC
            || packet.opcode() != DhcpOpCode::Request
            || !packet.client_hardware_address().is_unicast()
            || !from.is_unicast()
        {
            return None;
        }
        let mut message = Self {
            kind: DhcpMessageType::Unknown(0),
            xid: packet.transaction_id(),
            mac: packet.client_hardware_address().0,
            from: from.0,
            client_ip: packet.client_ip(),
            relay: packet.relay_agent_ip(),
            requested: None,
            server: None,
            broadcast: packet.flags().contains(DhcpFlags::BROADCAST),
            client_id: None,
            host_name: None,
            relay_agent: None,
            request_list: &[],
            max_size: MIN_MAX_SIZE,
        };
        let overload = message.read(&payload[FIXED..]);
        // The options go on in `file` and then in `sname` (RFC 2131, section 4.1).
        if overload & 1 != 0 {
            message.read(&payload[108..236]);
        }
        if overload & 2 != 0 {
            message.read(&payload[44..108]);
        }
        (message.kind != DhcpMessageType::Unknown(0)).then_some(message)
    }

    /// Reads the options of one field, and returns which other fields have options.
    fn read(&mut self, field: &'a [u8]) -> u8 {
        let mut overload = 0;
        for (kind, data) in options(field) {
            let address = || <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
            match (kind, data) {
                (code::MESSAGE_TYPE, &[kind]) => self.kind = DhcpMessageType::from(kind),
                (code::OVERLOAD, &[fields]) => overload = fields,
                (code::REQUESTED_IP, _) => self.requested = address().or(self.requested),
                (code::SERVER_ID, _) => self.server = address().or(self.server),
                (code::CLIENT_ID, _) => self.client_id = Some(data),
                (code::HOST_NAME, _) => self.host_name = Some(data),
                (code::RELAY_AGENT, _) => self.relay_agent = Some(data),
                (code::REQUEST_LIST, _) => self.request_list = data,
                (code::MAX_SIZE, &[high, low]) => {
                    self.max_size = u16::from_be_bytes([high, low]).max(MIN_MAX_SIZE);
                }
                _ => {}
            }
        }
        overload
    }

    pub(super) fn is_relayed(&self) -> bool {
        !self.relay.is_unspecified()
    }

    /// Whether the client itself sent the message.
    pub(super) fn is_own(&self) -> bool {
        self.mac == self.from
    }
}

/// What the server replies.
pub(super) enum Reply {
    Offer(Ipv4Addr),
    Ack(Ipv4Addr),
    /// The reply to an `INFORM`, which has no lease.
    Inform,
    /// A refusal, and why.
    Nak(&'static str),
}

impl Reply {
    fn kind(&self) -> DhcpMessageType {
        match self {
            Reply::Offer(_) => DhcpMessageType::Offer,
            Reply::Ack(_) | Reply::Inform => DhcpMessageType::Ack,
            Reply::Nak(_) => DhcpMessageType::Nak,
        }
    }

    fn address(&self) -> Ipv4Addr {
        match *self {
            Reply::Offer(address) | Reply::Ack(address) => address,
            Reply::Inform | Reply::Nak(_) => Ipv4Addr::UNSPECIFIED,
        }
    }
}

/// The options of a reply, as they are written.
struct Options<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Options<'_> {
    /// Writes an option. The caller has made sure that there is space.
    fn put(&mut self, kind: u8, data: &[u8]) {
        let Some(out) = self.out.get_mut(self.len..self.len + 2 + data.len()) else { return };
        out[0] = kind;
        out[1] = data.len() as u8;
        out[2..].copy_from_slice(data);
        self.len += 2 + data.len();
    }
}

/// The options that depend on the settings, in the order in which they are written if the client
/// asks for no other.
struct Settings {
    list: [(u8, [u8; 4 * MAX_DNS_SERVERS], usize); 8],
}

impl Settings {
    fn of(config: &DhcpConfig, reply: &Reply) -> Self {
        let lease = config.lease_time().as_secs() as u32;
        let mut list = [(code::PAD, [0; 4 * MAX_DNS_SERVERS], 0); 8];
        let mut count = 0;
        let mut add = |kind, parts: &[&[u8]]| {
            let (its_kind, data, len) = &mut list[count];
            *its_kind = kind;
            for part in parts {
                data[*len..*len + part.len()].copy_from_slice(part);
                *len += part.len();
            }
            count += 1;
        };
        if !matches!(reply, Reply::Nak(_)) {
            if !matches!(reply, Reply::Inform) {
                add(code::LEASE_TIME, &[&lease.to_be_bytes()]);
                add(code::RENEWAL_TIME, &[&(lease / 2).to_be_bytes()]);
                add(code::REBINDING_TIME, &[&(lease - lease / 8).to_be_bytes()]);
            }
            add(code::SUBNET_MASK, &[&config.mask.octets()]);
            if let Some(router) = config.router {
                add(code::ROUTER, &[&router.octets()]);
            }
            if !config.dns.is_empty() {
                let mut servers = [0; 4 * MAX_DNS_SERVERS];
                let count = config.dns.len().min(MAX_DNS_SERVERS);
                for (server, out) in config.dns.iter().zip(servers.chunks_exact_mut(4)) {
                    out.copy_from_slice(&server.octets());
                }
                add(code::NAME_SERVERS, &[&servers[..4 * count]]);
            }
            add(code::BROADCAST_ADDRESS, &[&config.broadcast().octets()]);
            if let Some(mtu) = config.mtu {
                add(code::INTERFACE_MTU, &[&mtu.to_be_bytes()]);
            }
        }
        Self { list }
    }

    fn len(&self) -> usize {
        self.list.iter().filter(|option| option.0 != code::PAD).map(|option| 2 + option.2).sum()
    }

    /// Leaves out the options that a client needs least, until `space` is enough.
    fn fit(&mut self, space: usize) {
        let least = [
            code::BROADCAST_ADDRESS,
            code::REBINDING_TIME,
            code::RENEWAL_TIME,
            code::INTERFACE_MTU,
            code::NAME_SERVERS,
        ];
        for kind in least {
            if self.len() <= space {
                return;
            }
            self.take(kind);
        }
    }

    fn take(&mut self, kind: u8) -> Option<([u8; 4 * MAX_DNS_SERVERS], usize)> {
        let option = self.list.iter_mut().find(|option| option.0 == kind)?;
        option.0 = code::PAD;
        Some((option.1, option.2))
    }

    /// Writes the options, first those that the client requests, in its order (RFC 2132, 9.8). The
    /// subnet mask comes before the router in any case (RFC 2132, 3.3).
    fn write(mut self, requested: &[u8], out: &mut Options<'_>) {
        let mut put = |settings: &mut Self, kind| {
            if let Some((data, len)) = settings.take(kind) {
                out.put(kind, &data[..len]);
            }
        };
        let rest = self.list.map(|option| option.0);
        for &kind in requested.iter().chain(&rest).filter(|kind| **kind != code::PAD) {
            if kind == code::ROUTER {
                put(&mut self, code::SUBNET_MASK);
            }
            put(&mut self, kind);
        }
    }
}

/// Writes the frame of a reply (RFC 2131, tables 3 and 5, and section 4.1) and returns its length,
/// or `None` if `out` is too short.
pub(super) fn emit(
    config: &DhcpConfig,
    message: &Message<'_>,
    reply: &Reply,
    out: &mut [u8],
) -> Option<usize> {
    let nak = matches!(reply, Reply::Nak(_));
    let mut bytes = [0; DHCP_REPLY_MAX];
    let body = &mut bytes[..DHCP_REPLY_MAX - frame_overhead()];
    let mut packet = DhcpPacket::new_unchecked(&mut body[..]);
    packet.set_opcode(DhcpOpCode::Reply);
    packet.set_hardware_type(ArpHardware::Ethernet);
    packet.set_hardware_len(6);
    packet.set_transaction_id(message.xid);
    packet.set_client_hardware_address(EthernetAddress(message.mac));
    packet.set_client_ip(match reply {
        Reply::Ack(_) | Reply::Inform => message.client_ip,
        Reply::Offer(_) | Reply::Nak(_) => Ipv4Addr::UNSPECIFIED,
    });
    packet.set_your_ip(reply.address());
    packet.set_relay_agent_ip(message.relay);
    // A relay agent must broadcast a refusal (RFC 2131, 4.3.2).
    let broadcast = message.broadcast || nak && message.is_relayed();
    packet.set_flags(if broadcast { DhcpFlags::BROADCAST } else { DhcpFlags::empty() });
    packet.set_magic_number(MAGIC);

    let mut options = Options { out: &mut body[FIXED..], len: 0 };
    options.put(code::MESSAGE_TYPE, &[reply.kind().into()]);
    options.put(code::SERVER_ID, &config.server.octets());
    // The identifier goes back unaltered (RFC 6842, section 3).
    if let Some(id) = message.client_id {
        options.put(code::CLIENT_ID, id);
    }
    if let Reply::Nak(why) = reply {
        options.put(code::MESSAGE, why.as_bytes());
    }
    let mut settings = Settings::of(config, reply);
    let longest = usize::from(message.max_size) - IP_AND_UDP - FIXED;
    settings.fit(longest.saturating_sub(options.len + 1));
    settings.write(message.request_list, &mut options);
    // A relay agent's information goes back unaltered, as the last option (RFC 3046, 2.2).
    if let Some(information) = message.relay_agent.filter(|_| message.is_relayed()) {
        options.put(code::RELAY_AGENT, information);
    }
    options.out[options.len] = code::END;
    let message_len = (FIXED + options.len + 1).max(MIN_MESSAGE);

    // The destination (RFC 2131, 4.1): the relay agent, or all for a refusal, or the address that
    // the client has. If it has none, all if it asks for that, or else the address that it will
    // have.
    let client = EthernetAddress(message.mac);
    let (to_ip, to_mac, to_port) = if message.is_relayed() {
        (message.relay, EthernetAddress(message.from), DHCP_SERVER_PORT)
    } else if nak {
        (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST, DHCP_CLIENT_PORT)
    } else if !message.client_ip.is_unspecified() {
        (message.client_ip, client, DHCP_CLIENT_PORT)
    } else if message.broadcast {
        (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST, DHCP_CLIENT_PORT)
    } else {
        (reply.address(), client, DHCP_CLIENT_PORT)
    };
    let from_mac = EthernetAddress(config.server_mac.into_array());
    let ip_len = IP_AND_UDP + message_len;
    let (payload, len) = frame::begin(out, to_mac, from_mac, EthernetProtocol::Ipv4, ip_len)?;
    let mut ip = Ipv4Packet::new_unchecked(payload);
    Ipv4Repr {
        src_addr: config.server,
        dst_addr: to_ip,
        next_header: IpProtocol::Udp,
        payload_len: 8 + message_len,
        hop_limit: 64,
    }
    .emit(&mut ip, &ChecksumCapabilities::default());
    let mut udp = UdpPacket::new_unchecked(ip.payload_mut());
    udp.set_src_port(DHCP_SERVER_PORT);
    udp.set_dst_port(to_port);
    udp.set_len((8 + message_len) as u16);
    udp.payload_mut().copy_from_slice(&bytes[..message_len]);
    udp.fill_checksum(&config.server.into(), &to_ip.into());
    Some(len)
}

/// The bytes of a reply's frame before its message.
const fn frame_overhead() -> usize {
    vmring_core::view::ETHERNET_HEADER_LEN + IP_AND_UDP
}
