//! A DHCPv4 server (RFC 2131) for one subnet: frames in, frames out.
//!
//! The server can be used alone: give [`DhcpServer::handle`] any Ethernet frame, and it returns
//! what is to be sent. It runs on the thread that calls it and takes a lock that only DHCP and ARP
//! use. smoltcp parses and emits the packets. Nothing a client sends makes the server panic.
//!
//! # Which address a client gets
//!
//! Leases belong to MAC addresses. A client gets the address it had before, as long as no other
//! client needed the address. The first choice of a new client is the address that is reserved for
//! it, or else one that follows from its MAC address, the subnet and the range. So a server that
//! remembers nothing gives most clients their old addresses. If the first choice is taken, the
//! client gets the address it requests, or the next of its further choices, which follow from the
//! same.
//!
//! A first choice that is free is offered at once. With the offer the server asks by ARP whether
//! somebody uses the address; if somebody answers, the client's request is refused, and it gets
//! another address. Any other choice is asked for first, and offered when the client retransmits,
//! unless somebody answered. An address that a station was seen to use, in an ARP packet, is not
//! given out for five minutes, and a declined one for an hour. One interface can block 16 addresses
//! in this way, so none can deny the others the whole range. A lease stands whatever somebody
//! claims by ARP.
//!
//! An offer is kept for a minute. When no address is free the server does not reply, and counts
//! this.
//!
//! # What else it decides
//!
//! - The server is the only one of its network, so it answers every request: a client that it has
//!   no record of and that renews a free address keeps it. One that has restarted and names an
//!   address that is not its first choice is refused and asks again, and does not wait.
//! - The client identifier comes back in each reply (RFC 6842). The server does not tell clients
//!   apart by it, so that a boot loader and the system it boots share an address.
//! - A message whose `chaddr` is not its Ethernet source is served: test tools and clients behind
//!   other agents send such messages. Nobody can release, decline or change what a client got
//!   itself, except the client.
//! - A client that names itself (option 12) is known by that name as long as it has the lease
//!   ([`DhcpServer::host_names`]). Only the client itself sets it, and what is no host name is counted and
//!   ignored.
//! - A relay agent on the server's subnet is served. The messages of others are counted and not
//!   answered, because the server has no addresses for the clients behind them.

mod config;
mod file;
mod host_name;
mod message;
mod table;

use core::net::Ipv4Addr;
use core::ops::{Deref, DerefMut};
use core::time::Duration;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use macaddr::MacAddr6;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DHCP_SERVER_PORT, DhcpMessageType, EthernetAddress,
    EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};
use vmring_core::sync::{AtomicU64, Ordering};

pub use crate::frame::Answer;
pub use config::{AddressHolder, DhcpConfig, DhcpLease, DhcpStats, ReserveError};
pub use file::{LeaseFile, LeaseFileError};
pub use host_name::HostName;

use crate::frame;
use crate::limits::{DECLINE_TIME, MIN_FRAME_LEN, OFFER_TIME, PROBE_TIME};
use file::Journal;
use message::{Message, Reply, emit};
use table::{Choice, LeaseEntry, LeaseState, LeaseTable};

/// What the lock of a server protects.
struct Shared {
    table: LeaseTable,
    stats: DhcpStats,
}

/// The lock. When it is given back, what has changed is known to those who look without it.
struct Locked<'s> {
    shared: MutexGuard<'s, Shared>,
    changes: &'s AtomicU64,
}

impl Deref for Locked<'_> {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Shared {
        &mut self.shared
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.changes.store(self.shared.table.changes(), Ordering::Relaxed);
    }
}

/// A DHCPv4 server for one subnet. See the [module](self).
pub struct DhcpServer {
    config: DhcpConfig,
    /// What [`LeaseTable::changes`] says, for those who look without the lock.
    changes: AtomicU64,
    shared: Mutex<Shared>,
    /// Where leases are noted for the file, if there is one.
    journal: OnceLock<Arc<Journal>>,
}

impl core::fmt::Debug for DhcpServer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("DhcpServer").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What a client's message leads to.
enum Outcome {
    /// A reply, and the address of which is asked by ARP whether it is in use.
    Reply(Reply, Option<Ipv4Addr>),
    /// No reply yet, and the question.
    Ask(Ipv4Addr),
    Silence,
}

impl From<Reply> for Outcome {
    fn from(reply: Reply) -> Self {
        Outcome::Reply(reply, None)
    }
}

/// A client's message, and where and when it came in.
struct Request<'a> {
    message: Message<'a>,
    port: u32,
    now: Duration,
}

impl DhcpServer {
    /// Makes a server that has not given out any address. The caller must check the configuration:
    /// the range must lie in the subnet and contain neither the first nor the last address of it.
    pub fn new(config: DhcpConfig) -> Self {
        let table = LeaseTable::new(config.clone());
        let shared = Shared { table, stats: DhcpStats::default() };
        let changes = AtomicU64::new(0);
        Self { config, changes, shared: Mutex::new(shared), journal: OnceLock::new() }
    }

    /// Returns the server's settings.
    pub fn config(&self) -> &DhcpConfig {
        &self.config
    }

    /// Returns the server's counters.
    pub fn stats(&self) -> DhcpStats {
        self.lock().stats
    }

    /// Returns every lease that is running at `now`, sorted by address.
    pub fn leases(&self, now: Duration) -> Vec<DhcpLease> {
        let shared = self.lock();
        shared.table.entries().filter_map(|(at, entry)| lease(at, entry, now)).collect()
    }

    /// Returns the lease of one client, if it is running at `now`.
    pub fn lease_of(&self, mac: MacAddr6, now: Duration) -> Option<DhcpLease> {
        let (address, entry) = self.lock().table.entry_of(mac.into_array())?;
        lease(address, &entry, now)
    }

    /// Reserves an address for one client, which need not have asked for it. The address can be any
    /// of the subnet, also one beyond the server's range. If the client has a lease on another
    /// address, that lease ends, and nobody gets that address before the lease's time is over.
    ///
    /// # Errors
    ///
    /// If no client can have the address, or if another client has it at `now`.
    pub fn reserve(
        &self,
        mac: MacAddr6,
        address: Ipv4Addr,
        now: Duration,
    ) -> Result<(), ReserveError> {
        let table = &mut self.lock().table;
        if !table.is_host(address) {
            return Err(ReserveError::OutOfRange(address));
        }
        table
            .reserve(mac.into_array(), address.into(), now)
            .map_err(|holder| ReserveError::Taken { address, holder: holder.into() })
    }

    /// Enters a lease that was given out before the server was made, and that lasts for `remaining`
    /// from `now` on. Returns false, and does nothing, if the server cannot give out the address,
    /// or if the address or the client has a lease or an offer.
    pub fn restore(
        &self,
        mac: MacAddr6,
        address: Ipv4Addr,
        remaining: Duration,
        now: Duration,
    ) -> bool {
        self.lock().table.restore(address.into(), mac.into_array(), now + remaining)
    }

    /// Opens a file that remembers the leases, or makes it, and takes over the leases that it has.
    /// From then on the server's leases are written to it, by a thread of its own, until the value
    /// returned is dropped. The first lease that is given or ended starts the thread, on the thread of
    /// [`handle`](Self::handle). Call this after the reservations are made.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or written, is not a lease file, or is in use by another network.
    ///
    /// # Panics
    ///
    /// If the server has had a file already.
    pub fn open_lease_file(&self, path: &Path, now: Duration) -> Result<LeaseFile, LeaseFileError> {
        let file = LeaseFile::open(path, |mac, address, remaining| {
            self.restore(mac, address, remaining, now)
        })?;
        assert!(self.journal.set(file.journal()).is_ok(), "a server has one lease file");
        Ok(file)
    }

    /// Notes that a station was seen to use an address, for example in an ARP packet that came in
    /// at the interface `port`. The server does not give the address to others for a while.
    pub fn learn(&self, mac: MacAddr6, address: Ipv4Addr, port: u32, now: Duration) {
        if !self.config.is_host(address) || EthernetAddress(mac.into_array()).is_multicast() {
            return;
        }
        let shared = &mut *self.lock();
        if shared.table.learn(address.into(), mac.into_array(), port, now) {
            shared.stats.conflicts += 1;
        }
    }

    /// Like [`learn`](Self::learn), from a frame: does nothing if it is not an ARP packet of the
    /// station that sent it.
    pub fn learn_from_arp(&self, frame: &[u8], port: u32, now: Duration) {
        let Ok((header, payload)) = frame::split(frame) else { return };
        if header.ethertype == EthernetProtocol::Arp
            && let Ok(packet) = ArpPacket::new_checked(payload)
            && let Ok(ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. }) =
                ArpRepr::parse(&packet)
            && source_hardware_addr == header.from
        {
            self.learn(source_hardware_addr.0.into(), source_protocol_addr, port, now);
        }
    }

    /// Returns who has which address at `now`: every lease that is running, and each address that a
    /// station was seen to use without one, in the last five minutes. An interface that has left is
    /// not named.
    pub fn holders(&self, now: Duration) -> Vec<AddressHolder> {
        let table = &self.lock().table;
        let leases = table.entries().filter(|(_, entry)| entry.is_running(now));
        let leases = leases.map(|(address, entry)| AddressHolder {
            address: address.into(),
            mac: entry.mac.into(),
            port: entry.port,
            leased: true,
        });
        let used = table.used(now).map(|(address, mac, port)| AddressHolder {
            address: address.into(),
            mac: mac.into(),
            port: Some(port),
            leased: false,
        });
        leases.chain(used).collect()
    }

    /// Returns what clients whose leases are running at `now` call themselves, sorted by address.
    pub fn host_names(&self, now: Duration) -> Vec<HostName> {
        let table = &self.lock().table;
        let running = table.host_names().filter(|(_, entry, _)| entry.is_running(now));
        let name = |(address, entry, name): (u32, &LeaseEntry, &str)| HostName {
            address: address.into(),
            mac: entry.mac.into(),
            port: entry.port,
            name: name.into(),
        };
        running.map(name).collect()
    }

    /// Returns a number that is another one when [`holders`](Self::holders) or
    /// [`host_names`](Self::host_names) may say something else than before, apart from what ends with time. It takes no lock.
    pub fn changes(&self) -> u64 {
        // Relaxed: whoever sees a new number looks under the lock.
        self.changes.load(Ordering::Relaxed)
    }

    /// Forgets which clients are behind an interface, because it has left. Their leases stay.
    pub fn port_left(&self, port: u32) {
        self.lock().table.port_left(port);
    }

    fn lock(&self) -> Locked<'_> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { shared, changes: &self.changes }
    }

    /// Answers a frame that came in at the interface `port`: if it is a DHCP message that gets a
    /// reply, writes the reply frame to the start of `reply`. Returns `None` if the frame is not a
    /// message for this server. `now` is the time since some fixed moment.
    ///
    /// No reply is longer than [`DHCP_REPLY_MAX`](crate::limits::DHCP_REPLY_MAX). If `reply` is
    /// shorter, some replies are not sent, which is counted.
    pub fn handle(
        &self,
        frame: &[u8],
        port: u32,
        reply: &mut [u8],
        now: Duration,
    ) -> Option<Answer> {
        let (header, payload) = frame::split(frame).ok()?;
        if header.ethertype != EthernetProtocol::Ipv4 {
            return None;
        }
        let ip = Ipv4Packet::new_checked(payload).ok()?;
        if ip.header_len() < 20 || ip.next_header() != IpProtocol::Udp {
            return None;
        }
        let checksums = ChecksumCapabilities::default();
        let repr = Ipv4Repr::parse(&ip, &checksums).ok()?;
        // A client that has no address may also send to its subnet's broadcast address.
        let to_us = repr.dst_addr == self.config.server
            || repr.dst_addr.is_broadcast()
            || repr.dst_addr == self.config.broadcast();
        if !to_us || ip.more_frags() || ip.frag_offset() != 0 {
            return None;
        }
        let udp = UdpPacket::new_checked(ip.payload()).ok()?;
        let (from, to) = (IpAddress::from(repr.src_addr), IpAddress::from(repr.dst_addr));
        let ports = UdpRepr::parse(&udp, &from, &to, &checksums).ok()?;
        if ports.dst_port != DHCP_SERVER_PORT {
            return None;
        }
        let shared = &mut *self.lock();
        let Some(message) = Message::parse(udp.payload(), header.from) else {
            shared.stats.malformed += 1;
            return Some(Answer::default());
        };
        let request = Request { message, port, now };
        let (sent, asked) = match self.decide(shared, &request) {
            Outcome::Reply(out, asked) => {
                let sent = emit(&self.config, &request.message, &out, reply);
                match (&sent, out) {
                    (None, _) => shared.stats.unsent += 1,
                    (_, Reply::Offer(_)) => shared.stats.offers += 1,
                    (_, Reply::Ack(_) | Reply::Inform) => shared.stats.acks += 1,
                    (_, Reply::Nak(_)) => shared.stats.naks += 1,
                }
                (sent, asked)
            }
            Outcome::Ask(address) => {
                shared.stats.probing += 1;
                (None, Some(address))
            }
            Outcome::Silence => (None, None),
        };
        Some(Answer { reply: sent, to_all: asked.and_then(|address| self.question(address)) })
    }

    /// The ARP request that asks whether an address is in use. The server names its own address in
    /// it and not 0.0.0.0, which a station that probes the same address would take for a rival
    /// (RFC 5227, 2.1.1).
    pub(crate) fn question(&self, address: Ipv4Addr) -> Option<[u8; MIN_FRAME_LEN]> {
        let mac = EthernetAddress(self.config.server_mac.into_array());
        let request = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: mac,
            source_protocol_addr: self.config.server,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: address,
        };
        let mut frame = [0; MIN_FRAME_LEN];
        let len = request.buffer_len();
        let to = EthernetAddress::BROADCAST;
        let (payload, _) = frame::begin(&mut frame, to, mac, EthernetProtocol::Arp, len)?;
        request.emit(&mut ArpPacket::new_unchecked(payload));
        Some(frame)
    }

    /// Decides what to answer (RFC 2131, section 4.3).
    fn decide(&self, shared: &mut Shared, request: &Request<'_>) -> Outcome {
        let Shared { table, stats } = shared;
        let message = &request.message;
        if message.is_relayed() && !self.config.is_host(message.relay) {
            stats.other_subnet += 1;
            return Outcome::Silence;
        }
        if let Some((address, entry)) = table.entry_of(message.mac)
            && entry.via != message.from
        {
            if message.is_own() {
                self.take_over(table, request, address, entry);
            } else if self.gives_up(message) {
                // Nobody gives up what the client itself has, or what another got for it.
                stats.foreign += 1;
                return Outcome::Silence;
            }
        }
        match message.kind {
            DhcpMessageType::Discover => self.discover(table, stats, request),
            DhcpMessageType::Request => self.request(table, stats, request),
            DhcpMessageType::Release => {
                self.release(table, stats, request);
                Outcome::Silence
            }
            DhcpMessageType::Decline => {
                self.decline(table, stats, request);
                Outcome::Silence
            }
            DhcpMessageType::Inform => {
                if self.config.is_host(message.client_ip) {
                    Reply::Inform.into()
                } else {
                    stats.other_subnet += 1;
                    Outcome::Silence
                }
            }
            _ => {
                stats.malformed += 1;
                Outcome::Silence
            }
        }
    }

    /// Whether the message ends a lease or an offer of this server.
    fn gives_up(&self, message: &Message<'_>) -> bool {
        match message.kind {
            DhcpMessageType::Release | DhcpMessageType::Decline => true,
            DhcpMessageType::Request => !self.is_for_us(message),
            _ => false,
        }
    }

    /// Handles an entry that somebody got in the name of a client which now speaks for itself. The
    /// client keeps it if it has a lease and asks for no other address. Otherwise the entry does
    /// not bind the client, and the address rests until the lease's time is over.
    fn take_over(
        &self,
        table: &mut LeaseTable,
        request: &Request<'_>,
        address: u32,
        entry: LeaseEntry,
    ) {
        let message = &request.message;
        let named = message.requested.unwrap_or(message.client_ip);
        let asks_for_other =
            message.kind == DhcpMessageType::Request && named != Ipv4Addr::from(address);
        if !entry.is_running(request.now) {
            table.remove(address);
        } else if asks_for_other {
            table.remove(address);
            table.insert(address, LeaseEntry { state: LeaseState::Ended, ..entry });
        } else {
            table.insert(address, LeaseEntry { via: message.mac, ..entry });
        }
    }

    /// Returns the client's entry if the message, a release or a decline, is about it. Counts why
    /// not, otherwise.
    fn entry_for(
        &self,
        table: &LeaseTable,
        stats: &mut DhcpStats,
        message: &Message<'_>,
        address: Option<Ipv4Addr>,
    ) -> Option<(u32, LeaseEntry)> {
        if !self.is_for_us(message) {
            stats.other_server += 1;
            return None;
        }
        let entry =
            table.entry_of(message.mac).filter(|(at, _)| Some(Ipv4Addr::from(*at)) == address);
        if entry.is_none() {
            stats.no_lease += 1;
        }
        entry
    }

    fn is_for_us(&self, message: &Message<'_>) -> bool {
        message.server.is_none_or(|server| server == self.config.server || server.is_unspecified())
    }

    fn release(&self, table: &mut LeaseTable, stats: &mut DhcpStats, request: &Request<'_>) {
        let message = &request.message;
        if let Some((address, entry)) =
            self.entry_for(table, stats, message, Some(message.client_ip))
        {
            stats.releases += 1;
            let state = LeaseState::Released;
            table.insert(address, LeaseEntry { state, free_at: request.now, ..entry });
            self.note(address, message.mac, Duration::ZERO);
        }
    }

    fn decline(&self, table: &mut LeaseTable, stats: &mut DhcpStats, request: &Request<'_>) {
        let message = &request.message;
        if let Some((address, _)) = self.entry_for(table, stats, message, message.requested) {
            stats.declines += 1;
            table.decline(address, request.port, DECLINE_TIME, request.now);
            self.note(address, message.mac, Duration::ZERO);
        }
    }

    fn discover(
        &self,
        table: &mut LeaseTable,
        stats: &mut DhcpStats,
        request: &Request<'_>,
    ) -> Outcome {
        let &Request { ref message, now, .. } = request;
        let mac = message.mac;
        if let Some((address, entry)) = table.entry_of(mac) {
            // Only the client itself, or who got the lease for it, moves it to another address.
            let better = table.reservation_of(mac).filter(|&reserved| {
                entry.via == message.from
                    && reserved != address
                    && table.is_available(reserved, mac, now)
            });
            let keeps = entry.via != message.from || !table.is_reserved_for_other(address, mac);
            let usable = entry.is_running(now) && keeps || table.is_available(address, mac, now);
            if usable && better.is_none() {
                return self.offer_again(table, stats, request, address, entry);
            }
            table.remove(address);
        }
        let requested = message.requested.map(u32::from);
        match table.choose(mac, requested, now) {
            Some(Choice::First(address)) => {
                table.hold(address, mac, message.from, true, now);
                Outcome::Reply(Reply::Offer(address.into()), Some(address.into()))
            }
            Some(Choice::Other(address)) => {
                table.hold(address, mac, message.from, false, now);
                Outcome::Ask(address.into())
            }
            None => {
                stats.exhausted += 1;
                Outcome::Silence
            }
        }
    }

    /// Offers a client the address that it has or had, unless the server still waits for an answer
    /// to its question.
    fn offer_again(
        &self,
        table: &mut LeaseTable,
        stats: &mut DhcpStats,
        request: &Request<'_>,
        address: u32,
        entry: LeaseEntry,
    ) -> Outcome {
        let &Request { ref message, now, .. } = request;
        if let LeaseState::Probing { since } = entry.state
            && now < since + PROBE_TIME
        {
            stats.probing += 1;
            return Outcome::Silence;
        }
        // An offer shortens no lease.
        let free_at = now + OFFER_TIME;
        let running = entry.is_running(now);
        let ask = !running && entry.probed.is_none_or(|last| now >= last + PROBE_TIME);
        if !running || entry.free_at <= free_at && entry.via == message.from {
            let (state, via) = (LeaseState::Offered, message.from);
            let probed = if ask { Some(now) } else { entry.probed };
            table.insert(address, LeaseEntry { state, free_at, via, probed, ..entry });
        }
        Outcome::Reply(Reply::Offer(address.into()), ask.then(|| address.into()))
    }

    fn request(
        &self,
        table: &mut LeaseTable,
        stats: &mut DhcpStats,
        request: &Request<'_>,
    ) -> Outcome {
        let &Request { ref message, now, .. } = request;
        let mac = message.mac;
        let known = table.entry_of(mac);
        if !self.is_for_us(message) {
            // The client has chosen another server, so our offer ends.
            stats.other_server += 1;
            if let Some((address, entry)) = known.filter(|(_, entry)| !entry.is_running(now)) {
                let state = LeaseState::Released;
                let free_at = entry.free_at.min(now);
                table.insert(address, LeaseEntry { state, free_at, ..entry });
            }
            return Outcome::Silence;
        }
        // In the states SELECTING and INIT-REBOOT a client names the address in an option. In
        // RENEWING and REBINDING it is the client's own address.
        let renews = message.requested.is_none() && !message.client_ip.is_unspecified();
        let wanted = match message.requested {
            Some(address) => address,
            None if renews => message.client_ip,
            None => {
                stats.malformed += 1;
                return Outcome::Silence;
            }
        };
        let address = u32::from(wanted);
        if !self.config.is_on_subnet(wanted) {
            return Reply::Nak("the address is of another network").into();
        }
        if table.is_reserved_for_other(address, mac) {
            return Reply::Nak("the address is reserved for another client").into();
        }
        if table
            .reservation_of(mac)
            .is_some_and(|reserved| reserved != address && table.is_available(reserved, mac, now))
        {
            return Reply::Nak("another address is reserved for the client").into();
        }
        match known {
            Some((at, _)) if at != address => {
                return Reply::Nak("the client has or was offered another address").into();
            }
            Some((_, entry)) if entry.is_running(now) => {}
            Some((_, LeaseEntry { state: LeaseState::Probing { .. }, .. })) => {
                return Reply::Nak("the address was not offered").into();
            }
            Some((at, _)) if !table.is_available(at, mac, now) => {
                table.remove(at);
                return Reply::Nak("the address is in use").into();
            }
            Some(_) => {}
            // We have no record of the client, for example because we have restarted. A client that
            // uses the address keeps it. One that does not use it yet is refused, so that it asks
            // for an offer and is told at once what it can have.
            None => {
                let uses = renews || table.is_used_by(address, mac, now);
                if message.server.is_some() || !uses || !table.is_available(address, mac, now) {
                    return Reply::Nak("there is no record of the client").into();
                }
            }
        }
        let lease_time = self.config.lease_time();
        // A lease that the client got itself stays its own, whoever renews it.
        let via = match known {
            Some((_, entry)) if entry.is_running(now) => entry.via,
            _ => message.from,
        };
        let (state, free_at) = (LeaseState::Leased, now + lease_time);
        let port = match message.is_own() {
            true => Some(request.port),
            false => known.and_then(|(_, entry)| entry.port),
        };
        table.insert(address, LeaseEntry { mac, state, free_at, via, probed: None, port });
        // Nobody names another.
        if let Some(name) = message.host_name.filter(|_| message.is_own()) {
            match host_name::label(name) {
                Some(label) => table.set_host_name(address, mac, label),
                None => stats.bad_names += 1,
            }
        }
        self.note(address, mac, lease_time);
        Reply::Ack(wanted).into()
    }

    /// Notes for the file that a client has an address for this long from now on.
    fn note(&self, address: u32, mac: [u8; 6], remaining: Duration) {
        if let Some(journal) = self.journal.get() {
            journal.note(address.into(), mac.into(), remaining);
        }
    }
}

fn lease(address: u32, entry: &LeaseEntry, now: Duration) -> Option<DhcpLease> {
    entry.is_running(now).then(|| DhcpLease {
        mac: entry.mac.into(),
        address: address.into(),
        remaining: entry.free_at - now,
    })
}
