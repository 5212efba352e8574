//! The settings of a translator.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::dns::resolvers::Resolvers;
use crate::limits;
use crate::prefix::Prefix;

/// What a translator is made with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct NatConfig {
    /// The gateway's MAC address, from which guests get their frames.
    pub gateway_mac: [u8; 6],
    /// The gateway's address, from which guests get ICMP errors.
    pub gateway_v4: Ipv4Addr,
    /// The gateway's address over IPv6.
    pub gateway_v6: Ipv6Addr,
    /// The addresses of guests.
    pub subnet_v4: Prefix,
    /// The addresses of guests over IPv6.
    pub subnet_v6: Prefix,
    /// What may grow, and how far.
    pub limits: Limits,
    /// The resolvers for what guests ask the gateway by DNS, at port 53 over UDP and TCP.
    /// [`Nat::set_resolvers`](crate::Nat::set_resolvers) changes it.
    pub resolvers: Resolvers,
    /// Whether all that a guest sends by UDP from one of its ports comes from one port of the host,
    /// wherever it goes to (endpoint-independent mapping, RFC 4787, 4.1), so that a guest that asks a
    /// server how it looks from outside (STUN) gets a useful answer. Replies come from those whom the
    /// guest has asked only, all the same. Otherwise each destination has a socket of its own, whose
    /// errors are its own.
    pub endpoint_independent: bool,
    /// Whether bytes for guests are always kept in rings of the flows, also where the kernel can keep
    /// them. For tests.
    pub rings_only: bool,
}

impl NatConfig {
    /// Settings for this gateway, with the default limits. The subnets are the gateway's /24 and /64.
    pub fn new(gateway_mac: [u8; 6], gateway_v4: Ipv4Addr, gateway_v6: Ipv6Addr) -> Self {
        let subnet =
            |address, len| Prefix::new(address, len).expect("the address has so many bits");
        Self {
            gateway_mac,
            gateway_v4,
            gateway_v6,
            subnet_v4: subnet(gateway_v4.into(), 24),
            subnet_v6: subnet(gateway_v6.into(), 64),
            limits: Limits::default(),
            resolvers: Resolvers::Host,
            endpoint_independent: false,
            rings_only: false,
        }
    }

    /// Whether what goes to this address is for the gateway's DNS.
    pub(crate) fn is_dns(&self, to: SocketAddr) -> bool {
        let gateways = [IpAddr::from(self.gateway_v4), self.gateway_v6.into()];
        to.port() == limits::DNS_PORT && gateways.contains(&to.ip())
    }
}

/// What a guest can make grow, and how far. Each limit holds for the whole network; those of
/// [`PortLimits`] hold for each port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The most flows of TCP at a time. Those that only wait for late segments do not count.
    pub flows: usize,
    /// The most flows of TCP at a time whose handshake is not complete.
    pub half_open: usize,
    /// The most flows of UDP at a time.
    pub udp_flows: usize,
    /// The most flows of ICMP echo at a time.
    pub echo_flows: usize,
    /// The most queries of DNS at a time that a resolver has not answered. The next one is answered with
    /// an error.
    pub dns_pending: usize,
    /// The most flows that are opened per second. As many can be opened at once.
    pub new_flows_per_second: u32,
    /// What the sockets may cost the kernel, in bytes, as far as it is known. Beyond it, new sockets
    /// get small buffers, and flows offer their guests small windows.
    pub kernel_memory: u64,
    /// The most descriptors. The process's own limit (`RLIMIT_NOFILE`) counts too.
    pub descriptors: usize,
    /// The limits of each port.
    pub port: PortLimits,
}

impl Limits {
    /// What each of several translators of one network may have: its part of each limit, rounded up.
    pub fn share(self, translators: usize) -> Self {
        let n = translators.max(1);
        Self {
            flows: self.flows.div_ceil(n),
            half_open: self.half_open.div_ceil(n),
            udp_flows: self.udp_flows.div_ceil(n),
            echo_flows: self.echo_flows.div_ceil(n),
            dns_pending: self.dns_pending.div_ceil(n),
            new_flows_per_second: self.new_flows_per_second.div_ceil(n as u32),
            kernel_memory: self.kernel_memory.div_ceil(n as u64),
            descriptors: self.descriptors.div_ceil(n),
            port: PortLimits {
                flows: self.port.flows.div_ceil(n),
                half_open: self.port.half_open.div_ceil(n),
                udp_flows: self.port.udp_flows.div_ceil(n),
                echo_flows: self.port.echo_flows.div_ceil(n),
                dns_pending: self.port.dns_pending.div_ceil(n),
                new_flows_per_second: self.port.new_flows_per_second.div_ceil(n as u32),
                kernel_memory: self.port.kernel_memory.div_ceil(n as u64),
                descriptors: self.port.descriptors.div_ceil(n),
                inbox_frames: self.port.inbox_frames.div_ceil(n as u32),
            },
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: limits::TCP_FLOWS,
            half_open: limits::HALF_OPEN,
            udp_flows: limits::UDP_FLOWS,
            echo_flows: limits::ECHO_FLOWS,
            dns_pending: limits::DNS_PENDING,
            new_flows_per_second: limits::NEW_FLOWS_PER_SECOND,
            kernel_memory: limits::KERNEL_MEMORY,
            descriptors: limits::DESCRIPTORS,
            port: PortLimits::default(),
        }
    }
}

/// What the guest of one port can make grow, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortLimits {
    /// The most flows of TCP at a time.
    pub flows: usize,
    /// The most flows of TCP at a time whose handshake is not complete.
    pub half_open: usize,
    /// The most flows of UDP at a time. Beyond it, the oldest of the port that is no stream ends.
    pub udp_flows: usize,
    /// The most flows of ICMP echo at a time. Beyond it, the oldest of the port that is no stream ends.
    pub echo_flows: usize,
    /// The most queries of DNS at a time that a resolver has not answered. The next one is answered with
    /// an error.
    pub dns_pending: usize,
    /// The most flows that are opened per second. As many can be opened at once.
    pub new_flows_per_second: u32,
    /// What the sockets of TCP may cost the kernel, in bytes, and those of datagrams as much. Beyond it, the
    /// port's new sockets get small buffers, and its flows offer small windows.
    pub kernel_memory: u64,
    /// The most descriptors. Whatever the process may have (`RLIMIT_NOFILE`), a quarter is left to others.
    pub descriptors: usize,
    /// How many frames of the guest wait for the translator at most. The windows of the flows that had
    /// data from the guest in the last second together offer half of them: a segment for each, or more
    /// if the guest's frames hold more. The other half is for frames that no window limits, such as
    /// acknowledgments and datagrams. 0 means that there is no such limit.
    pub inbox_frames: u32,
}

/// Three quarters of the network's, so that no port can use up everything.
impl Default for PortLimits {
    fn default() -> Self {
        Self {
            flows: limits::TCP_FLOWS / 4 * 3,
            half_open: limits::HALF_OPEN / 4 * 3,
            udp_flows: limits::UDP_FLOWS / 4 * 3,
            echo_flows: limits::ECHO_FLOWS / 4 * 3,
            dns_pending: limits::DNS_PENDING / 4 * 3,
            new_flows_per_second: limits::NEW_FLOWS_PER_SECOND / 4 * 3,
            kernel_memory: limits::KERNEL_MEMORY / 4 * 3,
            descriptors: limits::DESCRIPTORS / 4 * 3,
            inbox_frames: 0,
        }
    }
}
