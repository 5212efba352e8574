//! The host's end of an embedded network: ARP, ICMP echo and DHCP at the first address.
//!
//! [`Gateway::handle`] is a function from frame to frame. It knows no port, no buffer and no
//! thread, so tests and fuzzers can call it directly. It ignores and counts frames that it does not
//! understand, and nothing in a frame makes it panic. smoltcp parses and emits the packets.

use core::net::Ipv4Addr;
use core::time::Duration;

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_SERVER_PORT, EthernetAddress, EthernetFrame,
    EthernetProtocol, EthernetRepr, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpProtocol,
    Ipv4Packet, Ipv4Repr, UdpPacket,
};
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::dhcp::{DhcpConfig, DhcpServer};

/// The host's end of a network. See the [module](self).
#[derive(Debug)]
pub struct Gateway {
    mac: MacAddr6,
    address: Ipv4Addr,
    mask: Ipv4Addr,
    dhcp: DhcpServer,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    arp_replies: AtomicU64,
    echo_replies: AtomicU64,
    dhcp_replies: AtomicU64,
    fragments: AtomicU64,
    malformed: AtomicU64,
    ignored: AtomicU64,
}

/// What a [`Gateway`] did with the frames it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GatewayStats {
    /// ARP requests for its address that it answered.
    pub arp_replies: u64,
    /// Pings of its address that it answered.
    pub echo_replies: u64,
    /// DHCP messages that it answered. [`DhcpServer::stats`] has the details.
    pub dhcp_replies: u64,
    /// IPv4 fragments, which it does not reassemble.
    pub fragments: u64,
    /// Frames with an invalid length, checksum or field.
    pub malformed: u64,
    /// Valid frames that the gateway has no answer to.
    pub ignored: u64,
}

/// Why a frame gets no reply.
enum NoReply {
    Fragment,
    Malformed,
    Ignored,
    /// The DHCP server keeps its own count.
    Dhcp,
}

fn malformed<E>(_: E) -> NoReply {
    NoReply::Malformed
}

fn increment(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Gateway {
    /// Makes a gateway with the IPv4 and MAC addresses of the server in `dhcp`.
    pub fn new(dhcp: DhcpConfig) -> Self {
        Self {
            mac: dhcp.server_mac,
            address: dhcp.server,
            mask: dhcp.mask,
            dhcp: DhcpServer::new(dhcp),
            counters: Counters::default(),
        }
    }

    /// Returns its MAC address.
    pub fn mac(&self) -> MacAddr6 {
        self.mac
    }

    /// Returns its IPv4 address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns its DHCP server.
    pub fn dhcp(&self) -> &DhcpServer {
        &self.dhcp
    }

    /// Returns what it has done so far.
    pub fn stats(&self) -> GatewayStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GatewayStats {
            arp_replies: get(&self.counters.arp_replies),
            echo_replies: get(&self.counters.echo_replies),
            dhcp_replies: get(&self.counters.dhcp_replies),
            fragments: get(&self.counters.fragments),
            malformed: get(&self.counters.malformed),
            ignored: get(&self.counters.ignored),
        }
    }

    /// Answers a frame: writes the reply to the start of `reply` and returns its length, or returns
    /// `None` if there is no reply. The reply is for the interface that sent the frame. `now` is
    /// the time since some fixed moment.
    ///
    /// No reply is longer than the frame or 346 bytes, whichever is more. If `reply` is shorter,
    /// some replies are not sent.
    pub fn handle(&self, frame: &[u8], reply: &mut [u8], now: Duration) -> Option<usize> {
        match self.answer(frame, reply, now) {
            Ok((len, counter)) => {
                increment(counter);
                Some(len)
            }
            Err(no_reply) => {
                match no_reply {
                    NoReply::Fragment => increment(&self.counters.fragments),
                    NoReply::Malformed => increment(&self.counters.malformed),
                    NoReply::Ignored => increment(&self.counters.ignored),
                    NoReply::Dhcp => {}
                }
                None
            }
        }
    }

    fn answer(
        &self,
        frame: &[u8],
        reply: &mut [u8],
        now: Duration,
    ) -> Result<(usize, &AtomicU64), NoReply> {
        let ethernet = EthernetFrame::new_checked(frame).map_err(malformed)?;
        let to = ethernet.dst_addr();
        let from = ethernet.src_addr();
        if !(to == self.ethernet() || to.is_broadcast()) || !from.is_unicast() {
            return Err(NoReply::Ignored);
        }
        match ethernet.ethertype() {
            EthernetProtocol::Arp => {
                let len = self.answer_arp(from, ethernet.payload(), reply)?;
                Ok((len, &self.counters.arp_replies))
            }
            EthernetProtocol::Ipv4 => {
                let ip = Ipv4Packet::new_checked(ethernet.payload()).map_err(malformed)?;
                // smoltcp accepts a header that is shorter than its own fields.
                if ip.version() != 4 || ip.header_len() < 20 || !ip.verify_checksum() {
                    return Err(NoReply::Malformed);
                }
                let for_us = ip.dst_addr() == self.address || ip.dst_addr().is_broadcast();
                if !for_us {
                    return Err(NoReply::Ignored);
                }
                if ip.more_frags() || ip.frag_offset() != 0 {
                    return Err(NoReply::Fragment);
                }
                match ip.next_header() {
                    IpProtocol::Icmp => {
                        let len = self.answer_echo(from, &ip, reply)?;
                        Ok((len, &self.counters.echo_replies))
                    }
                    IpProtocol::Udp => {
                        let udp = UdpPacket::new_checked(ip.payload()).map_err(malformed)?;
                        if udp.dst_port() != DHCP_SERVER_PORT {
                            return Err(NoReply::Ignored);
                        }
                        let len = self.dhcp.handle(frame, reply, now).ok_or(NoReply::Dhcp)?;
                        Ok((len, &self.counters.dhcp_replies))
                    }
                    _ => Err(NoReply::Ignored),
                }
            }
            _ => Err(NoReply::Ignored),
        }
    }

    fn ethernet(&self) -> EthernetAddress {
        EthernetAddress(self.mac.into_array())
    }

    /// Writes the Ethernet header of a reply and returns the `len` bytes after it.
    fn write_header<'a>(
        &self,
        reply: &'a mut [u8],
        to: EthernetAddress,
        ethertype: EthernetProtocol,
        len: usize,
    ) -> Result<&'a mut [u8], NoReply> {
        let out = reply.get_mut(..ETHERNET_HEADER_LEN + len).ok_or(NoReply::Ignored)?;
        let header = EthernetRepr { src_addr: self.ethernet(), dst_addr: to, ethertype };
        header.emit(&mut EthernetFrame::new_unchecked(&mut *out));
        Ok(&mut out[ETHERNET_HEADER_LEN..])
    }

    fn answer_arp(
        &self,
        from: EthernetAddress,
        payload: &[u8],
        reply: &mut [u8],
    ) -> Result<usize, NoReply> {
        let packet = ArpPacket::new_checked(payload).map_err(malformed)?;
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        } = ArpRepr::parse(&packet).map_err(malformed)?
        else {
            return Err(NoReply::Ignored);
        };
        if operation != ArpOperation::Request || target_protocol_addr != self.address {
            return Err(NoReply::Ignored);
        }
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: self.ethernet(),
            source_protocol_addr: self.address,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        let len = answer.buffer_len();
        let payload = self.write_header(reply, from, EthernetProtocol::Arp, len)?;
        answer.emit(&mut ArpPacket::new_unchecked(payload));
        Ok(ETHERNET_HEADER_LEN + len)
    }

    fn answer_echo(
        &self,
        from: EthernetAddress,
        ip: &Ipv4Packet<&[u8]>,
        reply: &mut [u8],
    ) -> Result<usize, NoReply> {
        let checksums = ChecksumCapabilities::default();
        let packet = Icmpv4Packet::new_checked(ip.payload()).map_err(malformed)?;
        if packet.msg_type() != Icmpv4Message::EchoRequest {
            return Err(NoReply::Ignored);
        }
        let Icmpv4Repr::EchoRequest { ident, seq_no, data } =
            Icmpv4Repr::parse(&packet, &checksums).map_err(malformed)?
        else {
            return Err(NoReply::Malformed);
        };
        // Answer only neighbours, and no broadcast, whether as source or destination.
        let (source, mask) = (u32::from(ip.src_addr()), u32::from(self.mask));
        let network = u32::from(self.address) & mask;
        if ip.dst_addr() != self.address
            || source & mask != network
            || source == network
            || source == network | !mask
            || ip.src_addr() == self.address
        {
            return Err(NoReply::Ignored);
        }
        let echo = Icmpv4Repr::EchoReply { ident, seq_no, data };
        let header = Ipv4Repr {
            src_addr: self.address,
            dst_addr: ip.src_addr(),
            next_header: IpProtocol::Icmp,
            payload_len: echo.buffer_len(),
            hop_limit: 64,
        };
        let len = header.buffer_len() + echo.buffer_len();
        let payload = self.write_header(reply, from, EthernetProtocol::Ipv4, len)?;
        let mut out = Ipv4Packet::new_unchecked(payload);
        header.emit(&mut out, &checksums);
        echo.emit(&mut Icmpv4Packet::new_unchecked(out.payload_mut()), &checksums);
        Ok(ETHERNET_HEADER_LEN + len)
    }
}
