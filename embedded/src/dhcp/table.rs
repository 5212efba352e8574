//! Which client has which address, and which address a client gets next.

use core::net::Ipv4Addr;
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use super::config::DhcpConfig;
use crate::limits::{CLAIM_TIME, CLAIMS_PER_PORT, FURTHER_CHOICES, MAX_LEASES, OFFER_TIME};
use crate::table::mix;

/// A MAC address.
pub(super) type Mac = [u8; 6];

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LeaseState {
    /// The server asks by ARP since then whether somebody uses the address.
    Probing {
        since: Duration,
    },
    Offered,
    Leased,
    /// The client gave the address back, or chose another server.
    Released,
    /// The client was moved to another address while it had this one. It may still use it.
    Ended,
}

#[derive(Clone, Copy)]
pub(super) struct LeaseEntry {
    pub(super) mac: Mac,
    pub(super) state: LeaseState,
    /// When the address may be given to another client, in the time of `DhcpServer::handle`.
    pub(super) free_at: Duration,
    /// The Ethernet source of the message that made the entry. It is `mac`, unless somebody spoke
    /// for the client.
    pub(super) via: Mac,
    /// When the server asked last by ARP whether the address is in use.
    pub(super) probed: Option<Duration>,
    /// The interface that the client was last seen at, if it is known.
    pub(super) port: Option<u32>,
}

impl LeaseEntry {
    /// Whether the client can have a use of the address now.
    pub(super) fn is_live(&self, now: Duration) -> bool {
        self.free_at > now && self.state != LeaseState::Released
    }

    pub(super) fn is_running(&self, now: Duration) -> bool {
        self.state == LeaseState::Leased && self.free_at > now
    }
}

/// An address that somebody was seen to use, or that a client found in use.
struct Claim {
    /// The station that uses it, if it is known.
    by: Option<Mac>,
    /// The interface that this was learned from.
    port: u32,
    /// Whether that interface has not left since.
    is_here: bool,
    until: Duration,
}

/// The addresses that are in use although the server did not give them out. Each interface can
/// claim [`CLAIMS_PER_PORT`] at a time, so that none can deny the others the whole range.
#[derive(Default)]
struct Claims {
    by_address: BTreeMap<u32, Claim>,
    /// The addresses that each interface claims, at most [`CLAIMS_PER_PORT`] each.
    by_port: BTreeMap<u32, Vec<u32>>,
}

impl Claims {
    /// Notes a claim. Returns false if the interface has claimed too many addresses.
    fn note(&mut self, address: u32, claim: Claim, now: Duration) -> bool {
        if let Some(known) = self.by_address.get_mut(&address)
            && (known.port == claim.port || known.until > now)
        {
            // The claim of another interface stands as long as it is renewed there.
            if known.port == claim.port {
                known.until = known.until.max(claim.until);
                (known.by, known.is_here) = (claim.by, claim.is_here);
            }
            return true;
        }
        let port = claim.port;
        let of_port = self.by_port.entry(port).or_default();
        if of_port.len() >= CLAIMS_PER_PORT {
            let over = |address: &u32| {
                self.by_address.get(address).is_none_or(|old| old.port != port || old.until <= now)
            };
            let Some(index) = of_port.iter().position(over) else { return false };
            let old = of_port.swap_remove(index);
            if self.by_address.get(&old).is_some_and(|claim| claim.port == port) {
                self.by_address.remove(&old);
            }
        }
        of_port.push(address);
        self.by_address.insert(address, claim);
        true
    }

    /// Whether somebody else than `mac` uses the address.
    fn is_claimed(&self, address: u32, mac: Mac, now: Duration) -> bool {
        self.by_address
            .get(&address)
            .is_some_and(|claim| claim.until > now && claim.by != Some(mac))
    }

    /// Notes that an interface has left. What it claims rests until its time is over.
    fn port_left(&mut self, port: u32) {
        for address in self.by_port.get(&port).into_iter().flatten() {
            if let Some(claim) = self.by_address.get_mut(address).filter(|claim| claim.port == port)
            {
                claim.is_here = false;
            }
        }
    }

    /// Notes that `mac` uses an address, and returns whether that is news. What an interface claims beyond
    /// its limit, or against another's claim, is none.
    fn note_here(&mut self, address: u32, claim: Claim, mac: Mac, now: Duration) -> bool {
        let port = claim.port;
        let was_here = self.is_here(address, mac, port, now);
        self.note(address, claim, now);
        !was_here && self.is_here(address, mac, port, now)
    }

    /// Whether `mac` is known to use the address behind an interface that is there.
    fn is_here(&self, address: u32, mac: Mac, port: u32, now: Duration) -> bool {
        let claim = self.by_address.get(&address);
        claim.is_some_and(|claim| {
            claim.is_here && claim.until > now && (claim.by, claim.port) == (Some(mac), port)
        })
    }

    /// The addresses that stations behind interfaces which are there were seen to use.
    fn used(&self, now: Duration) -> impl Iterator<Item = (u32, Mac, u32)> + '_ {
        let claims = self.by_address.iter();
        let claims = claims.filter(move |(_, claim)| claim.is_here && claim.until > now);
        claims.filter_map(|(&address, claim)| Some((address, claim.by?, claim.port)))
    }

    /// Whether `mac` itself was seen to use the address.
    fn is_used_by(&self, address: u32, mac: Mac, now: Duration) -> bool {
        let claim = self.by_address.get(&address);
        claim.is_some_and(|claim| claim.until > now && claim.by == Some(mac))
    }
}

/// The address that a client without one gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// It is the client's first choice. It can be offered at once.
    First(u32),
    /// It is another address, of which must be asked first whether it is in use.
    Other(u32),
}

/// The addresses of one server: an entry for each that was ever used, and what is known of others.
pub(super) struct LeaseTable {
    config: DhcpConfig,
    first: u32,
    size: u32,
    /// The entries by address.
    entries: BTreeMap<u32, LeaseEntry>,
    /// The addresses by client.
    clients: BTreeMap<Mac, u32>,
    /// The addresses by the time at which they become free.
    queue: BTreeSet<(Duration, u32)>,
    /// The reserved addresses by client, and their clients by address.
    reservations: BTreeMap<Mac, u32>,
    reserved: BTreeMap<u32, Mac>,
    /// What the client of an address calls itself. Whoever has the address later does not have the name.
    host_names: BTreeMap<u32, (Mac, Box<str>)>,
    claims: Claims,
    /// What is known of addresses that the server does not give out.
    beyond: Claims,
    /// Every address of the range that is less than this many after the first has an entry.
    first_unused: u32,
    /// Changes with each change of who has which address.
    changes: u64,
}

impl LeaseTable {
    pub(super) fn new(config: DhcpConfig) -> Self {
        let first = u32::from(config.first);
        let width = u32::from(config.last).wrapping_sub(first);
        let size = if config.last < config.first { 0 } else { width.saturating_add(1) };
        Self {
            config,
            first,
            size: size.min(MAX_LEASES),
            entries: BTreeMap::new(),
            clients: BTreeMap::new(),
            queue: BTreeSet::new(),
            reservations: BTreeMap::new(),
            reserved: BTreeMap::new(),
            host_names: BTreeMap::new(),
            claims: Claims::default(),
            beyond: Claims::default(),
            first_unused: 0,
            changes: 0,
        }
    }

    /// A number that is another one whenever somebody may have another address than before.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// The addresses that stations were seen to use without a lease, each with the station and the
    /// interface.
    pub(super) fn used(&self, now: Duration) -> impl Iterator<Item = (u32, Mac, u32)> + '_ {
        self.claims.used(now).chain(self.beyond.used(now))
    }

    /// Forgets at which interface clients were seen, because it has left.
    pub(super) fn port_left(&mut self, port: u32) {
        for entry in self.entries.values_mut().filter(|entry| entry.port == Some(port)) {
            entry.port = None;
        }
        self.claims.port_left(port);
        self.beyond.port_left(port);
        self.changes += 1;
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (u32, &LeaseEntry)> {
        self.entries.iter().map(|(&address, entry)| (address, entry))
    }

    pub(super) fn insert(&mut self, address: u32, entry: LeaseEntry) {
        self.take(address);
        if entry.state != LeaseState::Ended {
            self.clients.insert(entry.mac, address);
        }
        self.queue.insert((entry.free_at, address));
        self.entries.insert(address, entry);
        self.changes += 1;
    }

    pub(super) fn remove(&mut self, address: u32) {
        self.take(address);
        self.host_names.remove(&address);
        if let Some(index) = address.checked_sub(self.first) {
            self.first_unused = self.first_unused.min(index);
        }
    }

    /// Notes what the client of an address calls itself.
    pub(super) fn set_host_name(&mut self, address: u32, mac: Mac, name: Box<str>) {
        let name = (mac, name);
        if self.host_names.get(&address) != Some(&name) {
            self.host_names.insert(address, name);
            self.changes += 1;
        }
    }

    /// The addresses whose clients have said what they call themselves.
    pub(super) fn host_names(&self) -> impl Iterator<Item = (u32, &LeaseEntry, &str)> {
        self.host_names.iter().filter_map(|(&address, (mac, name))| {
            let entry = self.entries.get(&address).filter(|entry| entry.mac == *mac)?;
            Some((address, entry, &**name))
        })
    }

    /// Takes an entry out, whose place is filled again or becomes unused.
    fn take(&mut self, address: u32) {
        if let Some(old) = self.entries.remove(&address) {
            self.changes += 1;
            self.queue.remove(&(old.free_at, address));
            if self.clients.get(&old.mac) == Some(&address) {
                self.clients.remove(&old.mac);
            }
        }
    }

    pub(super) fn entry_of(&self, mac: Mac) -> Option<(u32, LeaseEntry)> {
        let address = *self.clients.get(&mac)?;
        Some((address, *self.entries.get(&address)?))
    }

    /// The address that is reserved for a client.
    pub(super) fn reservation_of(&self, mac: Mac) -> Option<u32> {
        self.reservations.get(&mac).copied()
    }

    /// Whether the address is reserved for another client than `mac`.
    pub(super) fn is_reserved_for_other(&self, address: u32, mac: Mac) -> bool {
        self.reserved.get(&address).is_some_and(|holder| *holder != mac)
    }

    /// Whether somebody else than `mac` was seen to use the address.
    pub(super) fn is_claimed(&self, address: u32, mac: Mac, now: Duration) -> bool {
        self.claims.is_claimed(address, mac, now)
    }

    /// Whether `mac` was seen to use the address.
    pub(super) fn is_used_by(&self, address: u32, mac: Mac, now: Duration) -> bool {
        self.claims.is_used_by(address, mac, now)
    }

    fn is_in_range(&self, address: u32) -> bool {
        address.checked_sub(self.first).is_some_and(|index| index < self.size)
            && address != u32::from(self.config.server)
    }

    /// Whether a client can be given an address now: the server gives it out, and nobody else has
    /// it, has it reserved or is known to use it.
    pub(super) fn is_available(&self, address: u32, mac: Mac, now: Duration) -> bool {
        let given_out = match self.reserved.get(&address) {
            Some(holder) => *holder == mac,
            None => self.is_in_range(address),
        };
        let free =
            self.entries.get(&address).is_none_or(|entry| !entry.is_live(now) || entry.mac == mac);
        given_out && free && !self.is_claimed(address, mac, now)
    }

    /// The choices of a client in their order, which depends on its MAC address, the subnet and the
    /// range only: steps of one length, which has no divisor in common with the range's size.
    fn choices(&self, mac: Mac) -> impl Iterator<Item = u32> + use<> {
        let [a, b, c, d, e, f] = mac;
        let mask = u32::from(self.config.mask);
        let network = u64::from(u32::from(self.config.server) & mask);
        let subnet = network << 32 | u64::from(mask);
        let start = mix(u64::from_be_bytes([0, 0, a, b, c, d, e, f]) ^ mix(subnet));
        let (first, size) = (self.first, u64::from(self.size.max(1)));
        let mut step = 1 + mix(start) % size;
        while common_divisor(step, size) != 1 {
            step += 1;
        }
        let start = start % size;
        (0..size).map(move |index| first + ((start + index * step) % size) as u32)
    }

    /// The address that a client gets first: the one that is reserved for it, or else the first of
    /// its choices.
    pub(super) fn first_choice(&self, mac: Mac) -> Option<u32> {
        if self.size == 0 {
            return self.reservation_of(mac);
        }
        self.reservation_of(mac).or_else(|| self.choices(mac).next())
    }

    /// Chooses the address for a client that has none: its first choice, or the address it requests
    /// if that is free, or else the first of its further choices that was never used, or else the
    /// one that has been free longest.
    pub(super) fn choose(
        &mut self,
        mac: Mac,
        requested: Option<u32>,
        now: Duration,
    ) -> Option<Choice> {
        let first = self.first_choice(mac).filter(|&address| self.is_available(address, mac, now));
        if let Some(reserved) = first.filter(|_| self.reservations.contains_key(&mac)) {
            return Some(Choice::First(reserved));
        }
        if let Some(requested) = requested.filter(|&it| self.is_available(it, mac, now)) {
            return Some(if Some(requested) == first {
                Choice::First(requested)
            } else {
                Choice::Other(requested)
            });
        }
        let unused = |table: &Self, address: u32| {
            !table.entries.contains_key(&address) && table.is_available(address, mac, now)
        };
        if let Some(first) = first.filter(|&address| unused(self, address)) {
            return Some(Choice::First(first));
        }
        if self.size > 0
            && let Some(other) =
                self.choices(mac).take(FURTHER_CHOICES).find(|&address| unused(self, address))
        {
            return Some(Choice::Other(other));
        }
        while self.first_unused < self.size
            && self.entries.contains_key(&(self.first + self.first_unused))
        {
            self.first_unused += 1;
        }
        let rest = self.first_unused.min(self.size)..self.size;
        let unused = rest.map(|index| self.first + index).find(|&address| unused(self, address));
        let longest_free = || {
            let ended = self.queue.iter().take_while(|(free_at, _)| *free_at <= now);
            ended.map(|(_, address)| *address).find(|&it| self.is_available(it, mac, now))
        };
        unused.or_else(longest_free).map(Choice::Other)
    }

    /// Notes that a station was seen to use an address. Returns whether a client has the address or
    /// is being offered it.
    pub(super) fn learn(&mut self, address: u32, mac: Mac, port: u32, now: Duration) -> bool {
        let claim = Claim { by: Some(mac), port, is_here: true, until: now + CLAIM_TIME };
        if !self.is_in_range(address) && !self.reserved.contains_key(&address) {
            self.changes += u64::from(self.beyond.note_here(address, claim, mac, now));
            return false;
        }
        match self.entries.get_mut(&address) {
            Some(entry) if entry.mac == mac && entry.is_live(now) => {
                if entry.port != Some(port) {
                    entry.port = Some(port);
                    self.changes += 1;
                }
                return false;
            }
            // A lease stands whatever somebody claims.
            Some(entry) if entry.is_running(now) => return true,
            _ => {}
        }
        let offered = self.entries.get(&address).is_some_and(|entry| entry.is_live(now));
        self.changes += u64::from(self.claims.note_here(address, claim, mac, now));
        offered
    }

    /// Notes that a client found an address in use, and for how long it must rest.
    pub(super) fn decline(&mut self, address: u32, port: u32, rest: Duration, now: Duration) {
        self.remove(address);
        self.claims.note(address, Claim { by: None, port, is_here: true, until: now + rest }, now);
    }

    /// Reserves an address, which the caller has checked, for a client. The client's lease on
    /// another address ends, but nobody else gets that address before its time is over. Returns the
    /// client that has the address or its reservation, if that is another one.
    pub(super) fn reserve(&mut self, mac: Mac, address: u32, now: Duration) -> Result<(), Mac> {
        if let Some(holder) = self.reserved.get(&address).filter(|holder| **holder != mac) {
            return Err(*holder);
        }
        if let Some(entry) = self.entries.get(&address)
            && entry.mac != mac
            && entry.is_live(now)
        {
            return Err(entry.mac);
        }
        if let Some((old, entry)) = self.entry_of(mac).filter(|(old, _)| *old != address) {
            self.remove(old);
            if entry.is_running(now) {
                self.insert(old, LeaseEntry { state: LeaseState::Ended, ..entry });
            }
        }
        if let Some(old) = self.reservations.insert(mac, address) {
            self.reserved.remove(&old);
        }
        self.reserved.insert(address, mac);
        Ok(())
    }

    /// Enters an offer or a probe of an address for a client.
    pub(super) fn hold(&mut self, address: u32, mac: Mac, via: Mac, first: bool, now: Duration) {
        let state = if first { LeaseState::Offered } else { LeaseState::Probing { since: now } };
        if let Some((old, _)) = self.entry_of(mac).filter(|(old, _)| *old != address) {
            self.remove(old);
        }
        let free_at = now + OFFER_TIME;
        self.insert(
            address,
            LeaseEntry { mac, state, free_at, via, probed: Some(now), port: None },
        );
    }

    /// Enters a lease that the server gave out before it was started.
    pub(super) fn restore(&mut self, address: u32, mac: Mac, free_at: Duration) -> bool {
        let known = self.is_in_range(address) || self.reservation_of(mac) == Some(address);
        if !known || self.entries.contains_key(&address) || self.clients.contains_key(&mac) {
            return false;
        }
        let state = LeaseState::Leased;
        self.insert(
            address,
            LeaseEntry { mac, state, free_at, via: mac, probed: None, port: None },
        );
        true
    }

    pub(super) fn is_host(&self, address: Ipv4Addr) -> bool {
        self.config.is_host(address)
    }
}

fn common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
