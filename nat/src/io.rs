//! What a translator of one protocol works with, beside its own flows.

use core::net::{IpAddr, SocketAddr};

use vmring_core::offload::OffloadHeader;

use crate::config::NatConfig;
use crate::cost;
use crate::dns::Dns;
use crate::icmp::{self, Reason};
use crate::limits::HOST_ADDRESSES;
use crate::output::{Full, Output, Port};
use crate::packet::{Addresses, Datagram, padded};
use crate::policy::sources::Sources;
use crate::policy::{Policy, Protocol, Request, Verdict, forbidden};
use crate::ports::Ports;
use crate::sockets::{DatagramError, Sockets};
use crate::stats::Counter;

/// Sockets, frames, rules and time, borrowed for one call.
pub(crate) struct Io<'a, S: Sockets> {
    pub(crate) sockets: &'a mut S,
    pub(crate) policy: &'a mut dyn Policy,
    pub(crate) sources: &'a mut Sources,
    /// When the host's own addresses are to be read again, in microseconds.
    pub(crate) addresses_at: &'a mut u64,
    pub(crate) dns: &'a mut Dns,
    pub(crate) config: &'a NatConfig,
    pub(crate) ports: &'a mut Ports,
    /// Memory in which frames are built: [`SCRATCH_LEN`](crate::limits::SCRATCH_LEN) bytes.
    pub(crate) scratch: &'a mut [u8],
    pub(crate) out: &'a mut dyn Output,
    /// In microseconds.
    pub(crate) now: u64,
}

impl<S: Sockets> Io<'_, S> {
    pub(crate) fn count(&mut self, port: Port, counter: Counter) {
        self.ports.count(port, counter);
    }

    /// The address that a guest sees of a peer that comes in: its own, so that the guest can tell who it
    /// is. What is no place in the world, as loopback is, is in the guest's own subnet or has another
    /// family than the guest, has the gateway's address, so that answers come back here.
    pub(crate) fn seen_source(&self, from: SocketAddr, guest: IpAddr) -> SocketAddr {
        let ip = from.ip();
        let is_kept = ip.is_ipv4() == guest.is_ipv4()
            && forbidden(ip).is_none()
            && !self.sources.is_inside(ip);
        let seen = match guest {
            _ if is_kept => ip,
            IpAddr::V4(_) => self.config.gateway_v4.into(),
            IpAddr::V6(_) => self.config.gateway_v6.into(),
        };
        SocketAddr::new(seen, from.port())
    }

    /// What a guest is told of an error that a packet has met on the way to `to`, which the guest knows as
    /// `remote`, and from whom: a router on the way is named, so that traceroute shows it. `None` if the
    /// packet was too long (RFC 1191, 4; RFC 8201, 4), or the error is the host's own.
    pub(crate) fn passed(
        &self,
        error: &DatagramError,
        to: SocketAddr,
        remote: IpAddr,
        guest: IpAddr,
    ) -> Option<(IpAddr, Reason)> {
        let same_family = to.is_ipv4() == guest.is_ipv4();
        let (kind, code) = error.icmp?;
        let reason = match (kind, code) {
            (3, 4) if to.is_ipv4() => return None,
            (2, _) if to.is_ipv6() => return None,
            // Destination unreachable, time exceeded and parameter problem.
            (3 | 11 | 12, _) if to.is_ipv4() && same_family => Reason::Passed(kind, code),
            (1 | 3 | 4, _) if to.is_ipv6() && same_family => Reason::Passed(kind, code),
            (3, 3) if to.is_ipv4() => Reason::NoPort,
            (1, 4) if to.is_ipv6() => Reason::NoPort,
            _ => Reason::NoHost,
        };
        // The peer has the name that the guest knows, and what is no place in the world the gateway's.
        let from = match error.offender {
            Some(offender) if offender == to.ip() => remote,
            Some(offender)
                if offender.is_ipv4() == guest.is_ipv4()
                    && forbidden(offender).is_none()
                    && !self.sources.is_inside(offender) =>
            {
                offender
            }
            _ if guest.is_ipv4() => self.config.gateway_v4.into(),
            _ => self.config.gateway_v6.into(),
        };
        Some((from, reason))
    }

    /// Whether another socket may be opened.
    pub(crate) fn has_descriptor(&self) -> bool {
        let limit = self.config.limits.descriptors.min(self.sockets.capabilities().descriptors);
        self.ports.descriptors() < limit
    }

    /// Whether another socket may be opened for a port. Whatever the system lets the process have, the port
    /// leaves a quarter to others.
    pub(crate) fn has_descriptor_for(&self, port: Port) -> bool {
        let all = self.sockets.capabilities().descriptors;
        let own = self.config.limits.port.descriptors.min(all - all / 4);
        self.has_descriptor() && self.ports.descriptors_of(port) < own
    }

    /// Decides about a new flow of a guest. Where it leads to, or why it may not be opened.
    pub(crate) fn decide(
        &mut self,
        (port, mac): (Port, [u8; 6]),
        protocol: Protocol,
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Result<SocketAddr, Counter> {
        self.sources.check(port, mac, source.ip(), self.now)?;
        if self.policy.wants_host_addresses() && *self.addresses_at <= self.now {
            *self.addresses_at = self.now + HOST_ADDRESSES;
            // The old ones hold if there is no descriptor for a look.
            match self.sockets.host_addresses() {
                Ok(addresses) => self.policy.set_host_addresses(&addresses),
                Err(_) => self.count(port, Counter::HostAddresses),
            }
        }
        match self.policy.decide(&Request { port, protocol, source, destination }) {
            Verdict::Allow { to } => Ok(to),
            Verdict::Deny(why) => Err(why),
        }
    }

    /// Looks whether the host has other resolvers now, if it is time to.
    pub(crate) fn look_at_resolvers(&mut self, port: Port) {
        if self.dns.wants_look(self.now) {
            match self.sockets.resolvers() {
                Ok(Some(list)) => self.dns.changed(&list),
                Ok(None) => {}
                // The old ones are asked.
                Err(_) => self.count(port, Counter::HostResolvers),
            }
        }
    }

    /// Where a guest's connection to the gateway's DNS leads to, or why it leads nowhere.
    pub(crate) fn resolver(
        &mut self,
        (port, mac): (Port, [u8; 6]),
        source: IpAddr,
    ) -> Result<SocketAddr, Counter> {
        self.sources.check(port, mac, source, self.now)?;
        self.look_at_resolvers(port);
        self.dns.resolver(port, self.ports, self.now).ok_or(Counter::DnsRefused)
    }

    /// Gives a port a frame that leaves nothing to do. `frame` has space for padding behind `len`
    /// bytes.
    pub(crate) fn send_plain(
        &mut self,
        port: Port,
        frame: &mut [u8],
        len: usize,
    ) -> Result<(), Full> {
        let padded = padded(len);
        frame[len..padded].fill(0);
        self.send(port, &frame[..padded], &OffloadHeader::NONE)
    }

    /// Gives a port a frame, and counts it.
    pub(crate) fn send(
        &mut self,
        port: Port,
        frame: &[u8],
        header: &OffloadHeader,
    ) -> Result<(), Full> {
        let sent = self.out.send(port, frame, header);
        self.ports.spent += cost::frame(frame.len());
        let counter = if sent.is_ok() { Counter::FramesOut } else { Counter::OutputFull };
        self.count(port, counter);
        sent
    }

    /// Tells a guest by ICMP why its packet goes nowhere, unless the port gets too many errors. An
    /// error that the port does not take is lost, as on any link.
    pub(crate) fn send_error(
        &mut self,
        port: Port,
        reason: Reason,
        to_mac: [u8; 6],
        cause: &[u8],
        to: IpAddr,
    ) {
        let from = match to {
            IpAddr::V4(_) => self.config.gateway_v4.into(),
            IpAddr::V6(_) => self.config.gateway_v6.into(),
        };
        self.send_error_from(port, from, reason, to_mac, cause, to);
    }

    /// [`send_error`](Self::send_error) that says that it comes from somebody else, of the same family
    /// as `to`.
    pub(crate) fn send_error_from(
        &mut self,
        port: Port,
        from: IpAddr,
        reason: Reason,
        to_mac: [u8; 6],
        cause: &[u8],
        to: IpAddr,
    ) {
        if !self.ports.may_err(port, self.now) {
            return;
        }
        let addresses = Addresses { from_mac: self.config.gateway_mac, to_mac, from, to };
        let mut frame = [0; icmp::ERROR_MAX];
        let len = icmp::write(reason, &addresses, cause, &mut frame);
        let _ = self.send_plain(port, &mut frame, len);
    }

    /// [`send_error`](Self::send_error) about a packet that has just come. Nobody is told of an error,
    /// of what goes to many, or of what no single host has sent (RFC 1122, 3.2.2; RFC 4443, 2.4 e).
    pub(crate) fn send_error_about(&mut self, port: Port, reason: Reason, cause: &Datagram<'_>) {
        let sender = forbidden(cause.source);
        let has_sender = matches!(sender, None | Some(Counter::DeniedLinkLocal));
        let is_error = icmp::is_error(cause.protocol.into(), cause.payload);
        if is_error || !has_sender || cause.is_to_many(self.config) {
            return;
        }
        self.send_error(port, reason, cause.mac, cause.ip, cause.source);
    }
}
