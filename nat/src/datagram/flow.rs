//! Flows of datagrams, and the sockets that they go through.

use core::fmt;
use core::hash::{Hash, Hasher};
use core::net::{IpAddr, SocketAddr};
use std::collections::VecDeque;

use crate::limits::{DNS_TIMEOUT, ECHO_TIMEOUT, UDP_STREAM_AFTER, UDP_STREAM_TIMEOUT, UDP_TIMEOUT};
use crate::output::Port;
use crate::policy::Protocol;
use crate::policy::sources::Guest;
use crate::stats::Carried;
use crate::table::{FlowId, Keyed};
use crate::wait::GuestWait;

/// What a flow is found by: both addresses are as the guest sees them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) port: Port,
    pub(crate) protocol: Protocol,
    /// The guest's address. Echo has its identifier for a port.
    pub(crate) guest: SocketAddr,
    /// The peer's address. Echo has port 0.
    pub(crate) remote: SocketAddr,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (port, protocol) = (self.port.0, self.protocol);
        write!(f, "port {port}: {protocol:?} {} - {}", self.guest, self.remote)
    }
}

/// A few words, where the derived one would hash every field.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for address in [self.guest.ip(), self.remote.ip()] {
            match address {
                IpAddr::V4(v4) => state.write_u32(v4.into()),
                IpAddr::V6(v6) => state.write_u128(v6.into()),
            }
        }
        let ports = u32::from(self.guest.port()) << 16 | u32::from(self.remote.port());
        let echo = u64::from(self.protocol == Protocol::IcmpEcho) << 63;
        state.write_u64(echo | u64::from(self.port.0) << 32 | u64::from(ports));
    }
}

/// A flow.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) key: Key,
    /// The peer, as the host sees it.
    pub(crate) to: SocketAddr,
    /// Where the guest's frames come from.
    pub(crate) mac: [u8; 6],
    /// The socket.
    pub(crate) outlet: FlowId,
    /// Whether the peer has opened it, through a port forward.
    pub(crate) inbound: bool,
    /// The host's address that the peer has sent to, from which answers are to come.
    pub(crate) from: Option<IpAddr>,
    pub(crate) guest_sent: bool,
    pub(crate) world_sent: bool,
    /// Whether both sides have sent for a while.
    pub(crate) stream: bool,
    /// Whether it is one of queries to the gateway.
    pub(crate) dns: bool,
    /// How many of these wait for an answer, or were not answered.
    pub(crate) queries: u32,
    pub(crate) carried: Carried,
    /// In microseconds.
    pub(crate) opened_at: u64,
    pub(crate) used_at: u64,
}

impl Flow {
    /// A flow that nobody has used yet.
    pub(crate) fn new(key: Key, to: SocketAddr, mac: [u8; 6], outlet: FlowId, now: u64) -> Self {
        Self {
            key,
            to,
            mac,
            outlet,
            inbound: false,
            from: None,
            guest_sent: false,
            world_sent: false,
            stream: false,
            dns: false,
            queries: 0,
            carried: Carried::default(),
            opened_at: now,
            used_at: now,
        }
    }

    /// How long it lives when it is not used, in microseconds.
    pub(crate) fn lives(&self) -> u64 {
        match self.key.protocol {
            Protocol::IcmpEcho => ECHO_TIMEOUT,
            _ if self.dns => DNS_TIMEOUT,
            _ if self.stream => UDP_STREAM_TIMEOUT,
            _ => UDP_TIMEOUT,
        }
    }

    /// Notes that the guest or the world has sent something.
    pub(crate) fn used(&mut self, by_guest: bool, now: u64) {
        self.used_at = now;
        self.guest_sent |= by_guest;
        self.world_sent |= !by_guest;
        self.stream |=
            self.guest_sent && self.world_sent && now >= self.opened_at + UDP_STREAM_AFTER;
    }
}

impl Keyed for Flow {
    type Key = Key;
    fn key(&self) -> Key {
        self.key
    }
}

/// What a socket is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OutletKey {
    /// The only flow's.
    Own(Key),
    /// All flows' of a guest's address and port, to peers over IPv4 or over IPv6.
    Mapping(Port, SocketAddr, bool),
    /// All flows' of a port forward.
    Forward(u64),
}

/// Where flows of a port forward go.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) guest: Guest,
    pub(crate) guest_port: u16,
    /// The most flows at a time.
    pub(crate) most: usize,
    pub(crate) young: Young,
    pub(crate) wait: GuestWait,
    /// How many flows were let in.
    pub(crate) accepted: u64,
    /// How many datagrams were dropped.
    pub(crate) refused: u64,
    /// What has gone through flows that have ended.
    pub(crate) carried: Carried,
}

impl Inbound {
    pub(crate) fn new(guest: Guest, guest_port: u16, most: usize) -> Self {
        Self {
            guest,
            guest_port,
            most,
            young: Young::default(),
            wait: GuestWait::default(),
            accepted: 0,
            refused: 0,
            carried: Carried::default(),
        }
    }
}

/// A socket.
#[derive(Debug)]
pub(crate) struct Outlet<T> {
    pub(crate) key: OutletKey,
    pub(crate) socket: T,
    /// The port of its flows. A port forward's flows may be of any.
    pub(crate) port: Port,
    /// Whether it is a socket of IPv4.
    pub(crate) v4: bool,
    /// The hop limit and the differentiated services of what it sends, if they were ever set.
    pub(crate) ip_fields: Option<(u8, u8)>,
    /// Whether it refuses several datagrams at once.
    pub(crate) no_segments: bool,
    /// The port that it has on the host because it is its guest's.
    pub(crate) kept_port: Option<u16>,
    /// How many flows go through it.
    pub(crate) flows: usize,
    /// Where new flows of a port forward go.
    pub(crate) inbound: Option<Box<Inbound>>,
    /// Whether it is in the list of its port or in that of those that wait for guests, and in that of those
    /// that have more to read.
    pub(crate) waiting: bool,
    pub(crate) queued: bool,
}

impl<T> Outlet<T> {
    pub(crate) fn new(key: OutletKey, socket: T, port: Port, v4: bool) -> Self {
        Self {
            key,
            socket,
            port,
            v4,
            ip_fields: None,
            no_segments: false,
            kept_port: None,
            flows: 0,
            inbound: None,
            waiting: false,
            queued: false,
        }
    }
}

impl<T> Keyed for Outlet<T> {
    type Key = OutletKey;
    fn key(&self) -> OutletKey {
        self.key
    }
}

/// The flows that count for one limit, and which of them may be evicted, from the oldest on. The list has
/// ids of flows that are gone too.
#[derive(Debug, Default)]
pub(crate) struct Young {
    pub(crate) queue: VecDeque<FlowId>,
    /// How many flows there are, with the streams.
    pub(crate) count: usize,
}

impl Young {
    /// Adds a flow. If the list is mostly stale, it is cleaned first.
    pub(crate) fn push(&mut self, id: FlowId, stale: impl Fn(&FlowId) -> bool) {
        if self.queue.len() >= 2 * self.count + 64 {
            self.queue.retain(|other| !stale(other));
        }
        self.queue.push_back(id);
        self.count += 1;
    }
}
