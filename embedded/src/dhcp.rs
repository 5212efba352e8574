//! A DHCPv4 server (RFC 2131) for one subnet: frames in, frames out.
//!
//! The server can be used alone: give [`DhcpServer::handle`] any Ethernet frame, and it either
//! writes a reply frame or returns `None`. It runs on the thread that calls it and takes a lock
//! that only DHCP uses. smoltcp parses and emits the packets. Nothing a client sends makes the
//! server panic.
//!
//! Leases belong to MAC addresses. A client gets the address it had before, as long as the server
//! lives and no other client needed the address. A new client gets the address it requests if that
//! is free, or else the first that was never used, or else the one that has been free longest. An
//! offer is kept for a minute. A declined address is not given out for an hour. When no address is
//! free the server does not reply, and counts this. The client identifier option is ignored, so
//! that a boot loader and the system it boots share an address. Relay agents are not served:
//! `giaddr` is ignored.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    DHCP_CLIENT_PORT, DHCP_SERVER_PORT, DhcpFlags, DhcpMessageType, DhcpOption, DhcpPacket,
    DhcpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress,
    IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use vmring_core::view::ETHERNET_HEADER_LEN;

use crate::limits::{DECLINE_TIME, MAX_DNS_SERVERS, MAX_LEASES, OFFER_TIME};

/// The least length of a message. Some old clients need it (RFC 1542, section 2.1).
const MIN_MESSAGE: usize = 300;
/// The bytes of the Ethernet, IPv4 and UDP headers.
const HEADERS: usize = ETHERNET_HEADER_LEN + 20 + 8;

/// The options that the server reads or writes itself, without smoltcp's `DhcpRepr`.
mod option {
    pub(super) const REQUESTED_IP: u8 = 50;
    pub(super) const MESSAGE_TYPE: u8 = 53;
    pub(super) const SERVER_ID: u8 = 54;
    pub(super) const INTERFACE_MTU: u8 = 26;
    pub(super) const BROADCAST_ADDRESS: u8 = 28;
    pub(super) const RENEWAL_TIME: u8 = 58;
    pub(super) const REBINDING_TIME: u8 = 59;
}

/// The settings of a [`DhcpServer`]: what it gives out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DhcpConfig {
    /// The server's own address.
    pub server: Ipv4Addr,
    /// The server's own MAC address, the source of its replies.
    pub server_mac: MacAddr6,
    /// The first address for clients.
    pub first: Ipv4Addr,
    /// The last address for clients. If the range is wider than 65,536 addresses, only the first
    /// 65,536 are used.
    pub last: Ipv4Addr,
    /// The subnet's mask.
    pub mask: Ipv4Addr,
    /// The router that clients are told, if there is one.
    pub router: Option<Ipv4Addr>,
    /// The name servers that clients are told. Only the first three are used.
    pub dns: Vec<Ipv4Addr>,
    /// The MTU that clients are told.
    pub mtu: Option<u16>,
    /// How long a lease lasts. It is at least one second, and at most 2^32-1 seconds.
    pub lease_time: Duration,
}

/// An address that a client has been given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DhcpLease {
    /// The client.
    pub mac: MacAddr6,
    /// The address it has.
    pub address: Ipv4Addr,
    /// How long the lease still lasts.
    pub remaining: Duration,
}

/// The error when an address cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// The address is not one the server gives out.
    #[error("{0} is not one of the addresses the DHCP server gives out")]
    OutOfRange(Ipv4Addr),
    /// Another client has the address, or has it reserved.
    #[error("{address} already belongs to {holder}")]
    Taken {
        /// The address asked for.
        address: Ipv4Addr,
        /// The client that has it.
        holder: MacAddr6,
    },
}

/// The counters of a [`DhcpServer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DhcpStats {
    /// Offers of an address.
    pub offers: u64,
    /// Requests that were granted, and `INFORM` messages that were answered.
    pub acks: u64,
    /// Requests that were refused.
    pub naks: u64,
    /// Leases that clients released.
    pub releases: u64,
    /// Addresses that clients declined because they found them in use.
    pub declines: u64,
    /// Clients that got no answer because no address was free.
    pub exhausted: u64,
    /// Messages that were invalid, or that did not come from the client they named.
    pub malformed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum LeaseState {
    Offered,
    Leased,
    Released,
    /// A client found the address in use. The entry belongs to no client.
    Declined,
    /// The address is kept for one client for ever.
    Reserved,
}

#[derive(Clone, Copy)]
struct LeaseEntry {
    mac: [u8; 6],
    state: LeaseState,
    /// When the address may be given to another client, in the time of [`DhcpServer::handle`].
    free_at: Duration,
}

/// All addresses that were ever used, with three indices of the same entries.
#[derive(Default)]
struct LeaseTable {
    size: u32,
    /// The entries by address, counted from the first.
    entries: BTreeMap<u32, LeaseEntry>,
    /// The addresses by client. Declined addresses have no client.
    clients: BTreeMap<[u8; 6], u32>,
    /// The addresses by the time at which they become free. Reserved addresses never do.
    queue: BTreeSet<(Duration, u32)>,
    /// Every address before this one has been used.
    first_unused: u32,
    stats: DhcpStats,
}

impl LeaseTable {
    fn insert(&mut self, offset: u32, entry: LeaseEntry) {
        self.remove(offset);
        if entry.state != LeaseState::Declined {
            self.clients.insert(entry.mac, offset);
        }
        if entry.state != LeaseState::Reserved {
            self.queue.insert((entry.free_at, offset));
        }
        self.entries.insert(offset, entry);
    }

    fn remove(&mut self, offset: u32) {
        if let Some(old) = self.entries.remove(&offset) {
            self.queue.remove(&(old.free_at, offset));
            if self.clients.get(&old.mac) == Some(&offset) {
                self.clients.remove(&old.mac);
            }
        }
    }

    fn entry_of(&self, mac: [u8; 6]) -> Option<(u32, LeaseEntry)> {
        let offset = *self.clients.get(&mac)?;
        Some((offset, *self.entries.get(&offset)?))
    }

    fn is_free(&self, offset: u32, now: Duration) -> bool {
        offset < self.size
            && self
                .entries
                .get(&offset)
                .is_none_or(|entry| entry.state != LeaseState::Reserved && entry.free_at <= now)
    }

    /// Chooses the address for a client that has none: the one it requests if that is free, or else
    /// the first that was never used, or else the one that has been free longest.
    fn choose(&mut self, requested: Option<u32>, now: Duration) -> Option<u32> {
        if let Some(requested) = requested.filter(|&offset| self.is_free(offset, now)) {
            return Some(requested);
        }
        while self.first_unused < self.size && self.entries.contains_key(&self.first_unused) {
            self.first_unused += 1;
        }
        if self.first_unused < self.size {
            return Some(self.first_unused);
        }
        self.queue.first().filter(|(free_at, _)| *free_at <= now).map(|(_, offset)| *offset)
    }
}

/// The fields of a client's message that the server uses.
struct Message {
    kind: DhcpMessageType,
    xid: u32,
    secs: u16,
    mac: [u8; 6],
    client_ip: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    broadcast: bool,
}

/// What the server answers.
struct Answer {
    kind: DhcpMessageType,
    address: Ipv4Addr,
}

/// A DHCPv4 server for one subnet. See the [module](self).
pub struct DhcpServer {
    config: DhcpConfig,
    table: Mutex<LeaseTable>,
}

impl core::fmt::Debug for DhcpServer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DhcpServer").field("config", &self.config).finish_non_exhaustive()
    }
}

impl DhcpServer {
    /// Makes a server that has not given out any address. The caller must check the configuration:
    /// the range must lie in the subnet and contain neither the server nor the broadcast address.
    pub fn new(config: DhcpConfig) -> Self {
        let width = u32::from(config.last).wrapping_sub(u32::from(config.first));
        let size = if config.last < config.first { 0 } else { width.saturating_add(1) };
        let table = LeaseTable { size: size.min(MAX_LEASES), ..LeaseTable::default() };
        Self { config, table: Mutex::new(table) }
    }

    /// Returns the server's settings.
    pub fn config(&self) -> &DhcpConfig {
        &self.config
    }

    /// Returns the server's counters.
    pub fn stats(&self) -> DhcpStats {
        self.table().stats
    }

    /// Returns every lease that is running at `now`, sorted by address.
    pub fn leases(&self, now: Duration) -> Vec<DhcpLease> {
        let table = self.table();
        table
            .entries
            .iter()
            .filter_map(|(&offset, entry)| self.running_lease(offset, entry, now))
            .collect()
    }

    /// Returns the lease of one client, if it is running at `now`.
    pub fn lease_of(&self, mac: MacAddr6, now: Duration) -> Option<DhcpLease> {
        let (offset, entry) = self.table().entry_of(mac.into_array())?;
        self.running_lease(offset, &entry, now)
    }

    fn running_lease(&self, offset: u32, entry: &LeaseEntry, now: Duration) -> Option<DhcpLease> {
        let running =
            matches!(entry.state, LeaseState::Leased | LeaseState::Reserved) && entry.free_at > now;
        running.then(|| DhcpLease {
            mac: entry.mac.into(),
            address: self.address(offset),
            remaining: entry.free_at - now,
        })
    }

    /// Reserves an address for one client, which need not have asked for it. If the client has a
    /// lease on another address, that lease ends.
    ///
    /// # Errors
    ///
    /// If the server does not give out the address, or if another client has it at `now`.
    pub fn reserve(
        &self,
        mac: MacAddr6,
        address: Ipv4Addr,
        now: Duration,
    ) -> Result<(), ReserveError> {
        let mut table = self.table();
        let offset = self.offset(&table, address).ok_or(ReserveError::OutOfRange(address))?;
        let mac = mac.into_array();
        if let Some(entry) = table.entries.get(&offset)
            && entry.mac != mac
            && !table.is_free(offset, now)
        {
            return Err(ReserveError::Taken { address, holder: entry.mac.into() });
        }
        let mut free_at = Duration::ZERO;
        if let Some((old, entry)) = table.entry_of(mac) {
            if old == offset && entry.state != LeaseState::Offered {
                free_at = entry.free_at; // the lease goes on
            }
            table.remove(old);
            table.first_unused = table.first_unused.min(old);
        }
        table.insert(offset, LeaseEntry { mac, state: LeaseState::Reserved, free_at });
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, LeaseTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.config.first).wrapping_add(offset))
    }

    fn offset(&self, table: &LeaseTable, address: Ipv4Addr) -> Option<u32> {
        let offset = u32::from(address).checked_sub(u32::from(self.config.first))?;
        (offset < table.size).then_some(offset)
    }

    fn is_on_subnet(&self, address: Ipv4Addr) -> bool {
        let mask = u32::from(self.config.mask);
        u32::from(address) & mask == u32::from(self.config.server) & mask
    }

    /// Answers a frame: if it is a DHCP message that gets a reply, writes the reply frame to the
    /// start of `reply` and returns its length. `now` is the time since some fixed moment.
    ///
    /// No reply is longer than 346 bytes. If `reply` is shorter, some replies are not sent.
    pub fn handle(&self, frame: &[u8], reply: &mut [u8], now: Duration) -> Option<usize> {
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        if ethernet.ethertype() != EthernetProtocol::Ipv4 {
            return None;
        }
        let ip = Ipv4Packet::new_checked(ethernet.payload()).ok()?;
        if ip.header_len() < 20 || ip.next_header() != IpProtocol::Udp {
            return None;
        }
        let checksums = ChecksumCapabilities::default();
        let repr = Ipv4Repr::parse(&ip, &checksums).ok()?;
        let to_us = repr.dst_addr == self.config.server || repr.dst_addr.is_broadcast();
        if !to_us || ip.more_frags() || ip.frag_offset() != 0 {
            return None;
        }
        let udp = UdpPacket::new_checked(ip.payload()).ok()?;
        let (from, to) = (IpAddress::from(repr.src_addr), IpAddress::from(repr.dst_addr));
        let ports = UdpRepr::parse(&udp, &from, &to, &checksums).ok()?;
        if ports.dst_port != DHCP_SERVER_PORT {
            return None;
        }
        // A client can speak only for itself, so its neighbours cannot touch its leases.
        let Some(message) = parse(udp.payload()).filter(|message| {
            message.mac == ethernet.src_addr().0 && ethernet.src_addr().is_unicast()
        }) else {
            self.table().stats.malformed += 1;
            return None;
        };
        let answer = self.answer(&message, now)?;
        self.emit(&message, &answer, reply)
    }

    /// Decides what to answer (RFC 2131, section 4.3).
    fn answer(&self, message: &Message, now: Duration) -> Option<Answer> {
        let table = &mut *self.table();
        match message.kind {
            DhcpMessageType::Discover => self.answer_discover(table, message, now),
            DhcpMessageType::Request => self.answer_request(table, message, now),
            DhcpMessageType::Release => {
                if let Some((offset, entry)) = self.entry_for(table, message, message.client_ip) {
                    table.stats.releases += 1;
                    match entry.state {
                        LeaseState::Reserved => {
                            table.insert(offset, LeaseEntry { free_at: Duration::ZERO, ..entry });
                        }
                        _ => {
                            let state = LeaseState::Released;
                            table.insert(offset, LeaseEntry { state, free_at: now, ..entry });
                        }
                    }
                }
                None
            }
            DhcpMessageType::Decline => {
                if let Some((offset, entry)) =
                    message.requested.and_then(|address| self.entry_for(table, message, address))
                {
                    table.stats.declines += 1;
                    if entry.state != LeaseState::Reserved {
                        let free_at = now + DECLINE_TIME;
                        table.insert(
                            offset,
                            LeaseEntry { state: LeaseState::Declined, free_at, ..entry },
                        );
                    }
                }
                None
            }
            DhcpMessageType::Inform => {
                if !self.is_on_subnet(message.client_ip) {
                    return None;
                }
                table.stats.acks += 1;
                Some(Answer { kind: DhcpMessageType::Ack, address: Ipv4Addr::UNSPECIFIED })
            }
            _ => {
                table.stats.malformed += 1;
                None
            }
        }
    }

    /// Returns the client's entry, if it is for `address` and the message is meant for this server.
    fn entry_for(
        &self,
        table: &LeaseTable,
        message: &Message,
        address: Ipv4Addr,
    ) -> Option<(u32, LeaseEntry)> {
        let ours = message.server.is_none_or(|server| server == self.config.server);
        table.entry_of(message.mac).filter(|(offset, _)| ours && self.address(*offset) == address)
    }

    fn answer_discover(
        &self,
        table: &mut LeaseTable,
        message: &Message,
        now: Duration,
    ) -> Option<Answer> {
        let offset = match table.entry_of(message.mac) {
            Some((offset, _)) => offset,
            None => {
                let requested = message.requested.and_then(|address| self.offset(table, address));
                let Some(offset) = table.choose(requested, now) else {
                    table.stats.exhausted += 1;
                    return None;
                };
                offset
            }
        };
        let free_at = now + OFFER_TIME;
        match table.entries.get(&offset).copied() {
            // An offer shortens no lease and ends no reservation.
            Some(entry) if entry.mac == message.mac && entry.state == LeaseState::Reserved => {}
            Some(entry)
                if entry.mac == message.mac
                    && entry.state == LeaseState::Leased
                    && entry.free_at > free_at => {}
            _ => table.insert(
                offset,
                LeaseEntry { mac: message.mac, state: LeaseState::Offered, free_at },
            ),
        }
        table.stats.offers += 1;
        Some(Answer { kind: DhcpMessageType::Offer, address: self.address(offset) })
    }

    fn answer_request(
        &self,
        table: &mut LeaseTable,
        message: &Message,
        now: Duration,
    ) -> Option<Answer> {
        let known = table.entry_of(message.mac);
        if message.server.is_some_and(|server| server != self.config.server) {
            // The client has chosen another server, so our offer ends.
            if let Some((offset, entry)) = known.filter(|(_, e)| e.state == LeaseState::Offered) {
                table.insert(
                    offset,
                    LeaseEntry { state: LeaseState::Released, free_at: now, ..entry },
                );
            }
            return None;
        }
        // In the states SELECTING and INIT-REBOOT a client names the address in an option. In
        // RENEWING and REBINDING it is the client's own address.
        let wanted = match message.requested {
            Some(address) => address,
            None if !message.client_ip.is_unspecified() => message.client_ip,
            None => {
                table.stats.malformed += 1;
                return None;
            }
        };
        let Some((offset, entry)) = known else {
            // We have no record of the client. We refuse if the message answers an offer that we
            // did not make, or if the address is of another network. Otherwise we must not reply
            // (RFC 2131, 4.3.2), and the client starts again.
            let is_refused = message.server.is_some() || !self.is_on_subnet(wanted);
            return is_refused.then(|| refuse(table));
        };
        if self.address(offset) != wanted {
            return Some(refuse(table));
        }
        let state =
            if entry.state == LeaseState::Reserved { entry.state } else { LeaseState::Leased };
        table.insert(offset, LeaseEntry { state, free_at: now + self.lease_time(), ..entry });
        table.stats.acks += 1;
        Some(Answer { kind: DhcpMessageType::Ack, address: wanted })
    }

    fn lease_time(&self) -> Duration {
        self.config.lease_time.clamp(Duration::from_secs(1), Duration::from_secs(u32::MAX.into()))
    }

    /// Writes the reply frame.
    fn emit(&self, message: &Message, answer: &Answer, reply: &mut [u8]) -> Option<usize> {
        let config = &self.config;
        let nak = answer.kind == DhcpMessageType::Nak;
        let with_lease = !nak && !answer.address.is_unspecified();
        let lease = self.lease_time().as_secs() as u32;
        let renewal = (lease / 2).to_be_bytes();
        let rebinding = (lease - lease / 8).to_be_bytes();
        let mtu = config.mtu.unwrap_or(0).to_be_bytes();
        let broadcast = Ipv4Addr::from(u32::from(config.server) | !u32::from(config.mask)).octets();
        let extra = [
            DhcpOption { kind: option::BROADCAST_ADDRESS, data: &broadcast },
            DhcpOption { kind: option::RENEWAL_TIME, data: &renewal },
            DhcpOption { kind: option::REBINDING_TIME, data: &rebinding },
            DhcpOption { kind: option::INTERFACE_MTU, data: &mtu },
        ];
        // The reply to an INFORM has no times, and a refusal has none of these options.
        let mut options = [extra[0]; 4];
        let mut count = 0;
        for option in extra {
            let wanted = match option.kind {
                option::RENEWAL_TIME | option::REBINDING_TIME => with_lease,
                option::INTERFACE_MTU => !nak && config.mtu.is_some(),
                _ => !nak,
            };
            if wanted {
                options[count] = option;
                count += 1;
            }
        }
        let repr = DhcpRepr {
            message_type: answer.kind,
            transaction_id: message.xid,
            secs: message.secs,
            client_hardware_address: EthernetAddress(message.mac),
            client_ip: if answer.kind == DhcpMessageType::Ack {
                message.client_ip
            } else {
                Ipv4Addr::UNSPECIFIED
            },
            your_ip: if nak { Ipv4Addr::UNSPECIFIED } else { answer.address },
            server_ip: Ipv4Addr::UNSPECIFIED,
            router: config.router.filter(|_| !nak),
            subnet_mask: (!nak).then_some(config.mask),
            relay_agent_ip: Ipv4Addr::UNSPECIFIED,
            broadcast: message.broadcast,
            requested_ip: None,
            client_identifier: None,
            server_identifier: Some(config.server),
            parameter_request_list: None,
            dns_servers: (!nak && !config.dns.is_empty())
                .then(|| config.dns.iter().copied().take(MAX_DNS_SERVERS).collect()),
            max_size: None,
            lease_duration: with_lease.then_some(lease),
            renew_duration: None, // smoltcp parses these two but does not emit them
            rebind_duration: None,
            additional_options: &options[..count],
        };
        // The destination (RFC 2131, 4.1): a refusal is broadcast. Other replies go to the address
        // that the client has. If it has none, they are broadcast if it asks for that, or else go
        // to the address that it will have.
        let (to_ip, to_mac) = if nak {
            (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST)
        } else if !message.client_ip.is_unspecified() {
            (message.client_ip, EthernetAddress(message.mac))
        } else if message.broadcast {
            (Ipv4Addr::BROADCAST, EthernetAddress::BROADCAST)
        } else {
            (answer.address, EthernetAddress(message.mac))
        };
        let message_len = repr.buffer_len().max(MIN_MESSAGE);
        let len = HEADERS + message_len;
        let out = reply.get_mut(..len)?;
        out.fill(0);
        let checksums = ChecksumCapabilities::default();
        let mut ethernet = EthernetFrame::new_unchecked(out);
        EthernetRepr {
            src_addr: EthernetAddress(config.server_mac.into_array()),
            dst_addr: to_mac,
            ethertype: EthernetProtocol::Ipv4,
        }
        .emit(&mut ethernet);
        let mut ip = Ipv4Packet::new_unchecked(ethernet.payload_mut());
        Ipv4Repr {
            src_addr: config.server,
            dst_addr: to_ip,
            next_header: IpProtocol::Udp,
            payload_len: 8 + message_len,
            hop_limit: 64,
        }
        .emit(&mut ip, &checksums);
        let mut udp = UdpPacket::new_unchecked(ip.payload_mut());
        let mut written = Ok(());
        UdpRepr { src_port: DHCP_SERVER_PORT, dst_port: DHCP_CLIENT_PORT }.emit(
            &mut udp,
            &config.server.into(),
            &to_ip.into(),
            message_len,
            |payload| written = repr.emit(&mut DhcpPacket::new_unchecked(payload)),
            &checksums,
        );
        written.ok().map(|()| len)
    }
}

/// Counts and makes a refusal.
fn refuse(table: &mut LeaseTable) -> Answer {
    table.stats.naks += 1;
    Answer { kind: DhcpMessageType::Nak, address: Ipv4Addr::UNSPECIFIED }
}

/// Reads a client's message, field by field: smoltcp's `DhcpRepr::parse` refuses client identifiers
/// that are not Ethernet addresses, and many clients send such identifiers.
fn parse(payload: &[u8]) -> Option<Message> {
    let packet = DhcpPacket::new_checked(payload).ok()?;
    let is_ethernet = packet.hardware_type() == smoltcp::wire::ArpHardware::Ethernet
        && packet.hardware_len() == 6;
    if !is_ethernet
        || packet.magic_number() != 0x6382_5363
        || packet.opcode() != smoltcp::wire::DhcpOpCode::Request
    {
        return None;
    }
    let mut kind = None;
    let mut requested = None;
    let mut server = None;
    for option in packet.options() {
        let address = || <[u8; 4]>::try_from(option.data).ok().map(Ipv4Addr::from);
        match option.kind {
            option::MESSAGE_TYPE if option.data.len() == 1 => {
                kind = Some(DhcpMessageType::from(option.data[0]));
            }
            option::REQUESTED_IP => requested = address().or(requested),
            option::SERVER_ID => server = address().or(server),
            _ => {}
        }
    }
    Some(Message {
        kind: kind?,
        xid: packet.transaction_id(),
        secs: packet.secs(),
        mac: packet.client_hardware_address().0,
        client_ip: packet.client_ip(),
        requested,
        server,
        broadcast: packet.flags().contains(DhcpFlags::BROADCAST),
    })
}
