//! DNS at the gateway: queries of guests are passed to the host's resolvers, and those for local names are
//! answered here.
//!
//! | file | what it holds |
//! |---|---|
//! | `message.rs` | DNS messages, as far as they are read, and answers |
//! | `names.rs` | [`Names`]: the names that the network answers for itself |
//! | `resolvers.rs` | where the resolvers come from, and which of them a port asks |
//! | `stream.rs` | what a guest sends over TCP |
//!
//! A guest asks the gateway's addresses at port 53. A query goes on as it is, to a resolver in place of the
//! gateway, and its answer comes back with the gateway's address. Nothing is cached, and nothing in an
//! answer is changed or judged: the policy looks at the addresses that a guest then connects to, so a name
//! that leads to a forbidden address leads nowhere. The resolver may be at a loopback address, which no
//! guest reaches otherwise, so only queries get there: updates, notifications and transfers of zones are
//! refused, because a resolver may allow its own host more than others. Port 853 is not translated: TLS
//! would hide the questions, and the certificate is not the gateway's.
//!
//! What is remembered of a query until its answer comes is its header and its question. If no resolver
//! answers it, the guest gets a server failure (RFC 2308, 7), because one that hears nothing asks again
//! late (RFC 8906, 3.1). The flow of a guest's datagrams to the gateway ends with its last answer.

pub(crate) mod message;
pub mod names;
pub mod resolvers;
pub(crate) mod stream;

use core::net::{IpAddr, SocketAddr};

use crate::limits::{DNS_ANSWER_MAX, DNS_TIMEOUT, RESOLVER_SILENT, RESOLVERS, RESOLVERS_LOOK};
use crate::output::Port;
use crate::ports::Ports;
use crate::prefix::Prefix;
use crate::stats::Counter;
use crate::table::{Keyed, Table};
use crate::wheel::Wheel;

use message::{
    A, AAAA, ANY, Answer, FORMAT_ERROR, KeptQuery, NAME_ERROR, NO_ERROR, NOT_IMPLEMENTED, PTR,
    Query, QueryError, Question, REFUSED, Reply, SERVER_FAILURE, means_failure, refuse_unread,
};
use names::{Found, Names};
use resolvers::{Choice, Resolvers, answering};

/// What a query is found by: the guest that has asked, and the identifier.
type PendingKey = (Port, SocketAddr, u16);

/// A query that a resolver has not answered yet.
#[derive(Debug)]
struct Pending {
    key: PendingKey,
    query: KeptQuery,
    to: SocketAddr,
    asked_at: u64,
}

impl Keyed for Pending {
    type Key = PendingKey;
    fn key(&self) -> PendingKey {
        self.key
    }
}

/// What a port has.
#[derive(Clone, Copy, Debug, Default)]
struct PortDns {
    choice: Choice,
    pending: usize,
}

/// What becomes of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// It is answered with so many bytes.
    Answer(usize),
    /// It goes to this resolver. It is new, or made again.
    Forward { to: SocketAddr, is_new: bool },
    /// It is dropped.
    Nothing,
}

/// Queries and names of a network.
#[derive(Debug)]
pub(crate) struct Dns {
    pub(crate) names: Names,
    source: Resolvers,
    list: Vec<SocketAddr>,
    /// The host's, as they were last read.
    host: Vec<SocketAddr>,
    /// When the host is to be asked for its resolvers, in microseconds.
    look_at: u64,
    pending: Table<Pending>,
    wheel: Wheel,
    ports: Vec<PortDns>,
}

impl Dns {
    pub(crate) fn new(
        subnets: [Prefix; 2],
        source: Resolvers,
        most_pending: usize,
        now: u64,
    ) -> Self {
        let mut dns = Self {
            names: Names::new(subnets),
            source: Resolvers::Host,
            list: Vec::new(),
            host: Vec::new(),
            look_at: 0,
            pending: Table::new(most_pending),
            wheel: Wheel::new(now),
            ports: Vec::new(),
        };
        dns.set_source(source);
        dns
    }

    /// Asks other resolvers from now on.
    pub(crate) fn set_source(&mut self, source: Resolvers) {
        let list = match &source {
            Resolvers::Host => self.host.clone(),
            Resolvers::Fixed(list) => list.clone(),
        };
        self.look_at = if source == Resolvers::Host { 0 } else { u64::MAX };
        self.source = source;
        self.set_list(&list);
    }

    /// The resolvers that are asked now.
    pub(crate) fn list(&self) -> &[SocketAddr] {
        &self.list
    }

    pub(crate) fn source(&self) -> &Resolvers {
        &self.source
    }

    fn set_list(&mut self, list: &[SocketAddr]) {
        let list: Vec<_> = list.iter().take(RESOLVERS).copied().map(answering).collect();
        if list != self.list {
            self.list = list;
            for port in &mut self.ports {
                port.choice = Choice::default();
            }
        }
    }

    /// Whether the host is to be asked for its resolvers now. It is not to be asked again for a while.
    pub(crate) fn wants_look(&mut self, now: u64) -> bool {
        let wants = self.look_at <= now;
        if wants {
            self.look_at = now + RESOLVERS_LOOK;
        }
        wants
    }

    /// The host's resolvers have changed.
    pub(crate) fn changed(&mut self, list: &[SocketAddr]) {
        self.host = list[..list.len().min(RESOLVERS)].to_vec();
        if self.source == Resolvers::Host {
            self.set_list(list);
        }
    }

    fn port(&mut self, port: Port) -> &mut PortDns {
        let index = port.0 as usize;
        if index >= self.ports.len() {
            self.ports.resize(index + 1, PortDns::default());
        }
        &mut self.ports[index]
    }

    /// The resolver that a port asks now.
    pub(crate) fn resolver(
        &mut self,
        port: Port,
        ports: &mut Ports,
        now: u64,
    ) -> Option<SocketAddr> {
        self.port(port);
        let choice = &mut self.ports[port.0 as usize].choice;
        let (resolver, silent) = choice.resolver(&self.list, now);
        if silent {
            ports.count(port, Counter::ResolverSilent);
        }
        resolver
    }

    /// A resolver cannot be reached. The port asks the next one from now on.
    pub(crate) fn failed(&mut self, port: Port, which: IpAddr, ports: &mut Ports, now: u64) {
        self.port(port);
        let choice = &mut self.ports[port.0 as usize].choice;
        if choice.failed(&self.list, which, now) {
            ports.count(port, Counter::ResolverFailed);
        }
    }

    /// Decides about a guest's query. An answer is in `out`. A query that is to go to a resolver is pending
    /// from now on.
    pub(crate) fn ask(
        &mut self,
        (port, guest): (Port, SocketAddr),
        message: &[u8],
        out: &mut [u8; DNS_ANSWER_MAX],
        ports: &mut Ports,
        now: u64,
    ) -> Asked {
        let (counter, asked) = match Query::parse(message) {
            Err(QueryError::Silent) => (Counter::DnsMalformed, Asked::Nothing),
            Err(QueryError::Format) => {
                (Counter::DnsMalformed, Asked::Answer(refuse_unread(message, FORMAT_ERROR, out)))
            }
            Err(QueryError::Opcode) => {
                (Counter::DnsRefused, Asked::Answer(refuse_unread(message, NOT_IMPLEMENTED, out)))
            }
            Ok(query) => match self.answer_here(&query, out) {
                Some((counter, len)) => (counter, Asked::Answer(len)),
                None => match self.forward(port, guest, &query, ports, now) {
                    Ok((to, is_new)) => return Asked::Forward { to, is_new },
                    Err((counter, code)) => (counter, Asked::Answer(query.refuse(code, out))),
                },
            },
        };
        ports.count(port, counter);
        asked
    }

    /// Answers a query for a local name, and one that goes to nobody.
    fn answer_here(
        &self,
        query: &Query<'_>,
        out: &mut [u8; DNS_ANSWER_MAX],
    ) -> Option<(Counter, usize)> {
        let question = &query.question;
        if question.is_transfer() {
            return Some((Counter::DnsRefused, query.refuse(REFUSED, out)));
        }
        let mut text = Question::text_memory();
        let found = self.names.find(question.text(&mut text));
        let (code, zone) = match found {
            Found::Elsewhere => return None,
            Found::NoName(zone) => (NAME_ERROR, zone),
            Found::Addresses(_, zone) | Found::Pointer(_, zone) | Found::Nothing(zone) => {
                (NO_ERROR, zone)
            }
        };
        if !question.is_internet() {
            return Some((Counter::DnsRefused, query.refuse(REFUSED, out)));
        }
        let mut reply = match Reply::new(query, code, true, out) {
            Ok(reply) => reply,
            Err(len) => return Some((Counter::DnsMalformed, len)),
        };
        let mut is_empty = true;
        match found {
            Found::Addresses(addresses, _) => {
                let wanted = |address: &&IpAddr| match question.kind {
                    A => address.is_ipv4(),
                    AAAA => address.is_ipv6(),
                    kind => kind == ANY,
                };
                for &address in addresses.iter().filter(wanted) {
                    reply.address(address);
                    is_empty = false;
                }
            }
            Found::Pointer(name, _) if matches!(question.kind, PTR | ANY) => {
                reply.pointer(name);
                is_empty = false;
            }
            _ => {}
        }
        if let Some(zone) = zone.filter(|_| is_empty) {
            reply.authority(zone);
        }
        Some((Counter::DnsLocal, reply.finish()))
    }

    /// Notes that a query goes to a resolver, and says to which, and whether the query is new.
    ///
    /// # Errors
    ///
    /// Why it goes to none, and the code of the answer.
    fn forward(
        &mut self,
        port: Port,
        guest: SocketAddr,
        query: &Query<'_>,
        ports: &mut Ports,
        now: u64,
    ) -> Result<(SocketAddr, bool), (Counter, u16)> {
        let resolver = self.resolver(port, ports, now);
        let mut to = resolver.ok_or((Counter::DnsRefused, REFUSED))?;
        let key = (port, guest, query.id);
        if let Some(id) = self.pending.find(&key) {
            let choice = self.port(port).choice;
            let Some(pending) = self.pending.get_mut(id) else {
                return Err((Counter::DnsPendingLimit, SERVER_FAILURE));
            };
            // A resolver that answers others may still drop this one.
            let same = pending.query.asks(&query.question);
            let again = same && now >= pending.asked_at + RESOLVER_SILENT;
            if again && pending.to == to {
                to = choice.behind(&self.list, to).unwrap_or(to);
            }
            if !same || pending.to != to {
                pending.asked_at = now;
            }
            (pending.query, pending.to) = (query.keep(), to);
            self.wheel.set(id.index, now + DNS_TIMEOUT);
            self.port(port).choice.asked(now);
            return Ok((to, false));
        }
        if self.port(port).pending >= ports.limits.port.dns_pending {
            return Err((Counter::DnsPendingLimit, SERVER_FAILURE));
        }
        if self.pending.places() == 0 {
            // Queries come and go too often to grow with them.
            self.pending.reserve();
        }
        let pending = Pending { key, query: query.keep(), to, asked_at: now };
        // The table's limit is the network's.
        let Ok(id) = self.pending.insert(pending) else {
            return Err((Counter::DnsPendingLimit, SERVER_FAILURE));
        };
        self.wheel.grow(self.pending.places());
        self.wheel.set(id.index, now + DNS_TIMEOUT);
        let state = self.port(port);
        state.pending += 1;
        state.choice.asked(now);
        Ok((to, true))
    }

    /// Looks whether a datagram of a resolver answers a query of a guest, which is not pending any more
    /// then.
    ///
    /// # Errors
    ///
    /// Why the guest is not to get it.
    pub(crate) fn answered(
        &mut self,
        (port, guest): (Port, SocketAddr),
        from: IpAddr,
        message: &[u8],
        ports: &mut Ports,
        now: u64,
    ) -> Result<(), Counter> {
        let answer = Answer::parse(message).ok_or(Counter::DnsUnasked)?;
        let found = self.pending.find(&(port, guest, answer.id));
        let id = found.ok_or(Counter::DnsUnasked)?;
        let pending = self.pending.peek(id);
        let asks = |question: &Question<'_>| pending.is_some_and(|one| one.query.asks(question));
        if answer.question.is_some_and(|question| !asks(&question)) {
            return Err(Counter::DnsUnasked);
        }
        self.remove(id.index);
        self.port(port).choice.answered();
        if means_failure(answer.code) {
            // The guest asks again, and somebody else then.
            self.failed(port, from, ports, now);
        }
        Ok(())
    }

    /// Gives up a query that was not sent, or has met an error. The answer that says so is in `out`. Without
    /// an identifier it is any query of this guest. Returns the length of the answer, or `None` if there is
    /// no such query.
    pub(crate) fn give_up(
        &mut self,
        (port, guest): (Port, SocketAddr),
        id: Option<u16>,
        out: &mut [u8; DNS_ANSWER_MAX],
        ports: &mut Ports,
    ) -> Option<usize> {
        let index = match id {
            Some(id) => self.pending.find(&(port, guest, id))?.index,
            None => (0..self.pending.places() as u32).find(|&index| {
                let pending = self.pending.at(index).and_then(|id| self.pending.peek(id));
                pending.is_some_and(|pending| (pending.key.0, pending.key.1) == (port, guest))
            })?,
        };
        ports.count(port, Counter::DnsFailed);
        Some(self.fail(index, out)?.1)
    }

    /// Removes a query, and writes the answer that it has failed. Returns whose it was, and the length.
    fn fail(&mut self, index: u32, out: &mut [u8; DNS_ANSWER_MAX]) -> Option<(PendingKey, usize)> {
        let pending = self.pending.peek(self.pending.at(index)?)?;
        let failed = (pending.key, pending.query.refuse(SERVER_FAILURE, out));
        self.remove(index);
        Some(failed)
    }

    fn remove(&mut self, index: u32) {
        let Some(pending) = self.pending.at(index).and_then(|id| self.pending.remove(id)) else {
            return;
        };
        self.wheel.clear(index);
        self.port(pending.key.0).pending -= 1;
    }

    /// Gives up a query that was not answered in time. The answer that says so is in `out`. Returns which
    /// guest it is for, and its length, or `None` if there is no such query.
    pub(crate) fn expired(
        &mut self,
        out: &mut [u8; DNS_ANSWER_MAX],
        ports: &mut Ports,
        now: u64,
    ) -> Option<(Port, SocketAddr, usize)> {
        while let Some(index) = self.wheel.expired(now) {
            if let Some(((port, guest, _), len)) = self.fail(index, out) {
                ports.count(port, Counter::DnsUnanswered);
                return Some((port, guest, len));
            }
        }
        None
    }

    /// When [`expired`](Self::expired) is to be called next.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.wheel.next()
    }

    /// Forgets a port's queries, and the names of its guests.
    pub(crate) fn port_left(&mut self, port: Port) {
        for index in 0..self.pending.places() as u32 {
            let pending = self.pending.at(index).and_then(|id| self.pending.peek(id));
            if pending.is_some_and(|pending| pending.key.0 == port) {
                self.remove(index);
            }
        }
        *self.port(port) = PortDns::default();
        self.names.port_left(port);
    }
}
