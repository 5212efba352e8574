//! What a network's way out is set to.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

use vmring_embedded::limits::ROUTER_WORKERS_RANGE;
use vmring_nat::{ForwardRule, HostAccess, HostPort, Limits, Resolvers, Rule};

/// The way out of a network, as it is set up. The default lets guests reach the outside world, and
/// nobody reach them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NatSettings {
    pub(super) allow: Vec<Rule>,
    pub(super) deny: Vec<Rule>,
    pub(super) host_access: HostAccess,
    pub(super) host_ports: Vec<HostPort>,
    pub(super) forwards: Vec<ForwardRule>,
    pub(super) limits: Limits,
    pub(super) endpoint_independent: bool,
    pub(super) resolvers: Resolvers,
    pub(super) workers: usize,
}

impl Default for NatSettings {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            deny: Vec::new(),
            host_access: HostAccess::default(),
            host_ports: Vec::new(),
            forwards: Vec::new(),
            limits: Limits::default(),
            endpoint_independent: false,
            resolvers: Resolvers::default(),
            workers: *ROUTER_WORKERS_RANGE.start(),
        }
    }
}

impl NatSettings {
    /// How many [workers](Self::workers) there can be.
    pub const WORKERS: RangeInclusive<usize> = ROUTER_WORKERS_RANGE;

    /// The default settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Denies destinations. Of several rules that match, the one with the longest prefix decides.
    pub fn deny(mut self, rule: Rule) -> Self {
        self.deny.push(rule);
        self
    }

    /// Allows destinations that a rule with a shorter prefix denies. What is denied by default, such as
    /// loopback addresses, stays denied.
    pub fn allow(mut self, rule: Rule) -> Self {
        self.allow.push(rule);
        self
    }

    /// Sets whether guests reach the addresses of the host's interfaces, as other machines on the host's
    /// networks do. The default is [`HostAccess::Deny`]. Loopback addresses stay denied.
    pub fn host_access(mut self, access: HostAccess) -> Self {
        self.host_access = access;
        self
    }

    /// Lets guests reach a port of the host's loopback address, 127.0.0.1, as the same port of the
    /// gateway's address, and that of ::1 as that of the gateway's address over IPv6. Without it, the gateway
    /// refuses what comes to its address.
    pub fn host_port(mut self, port: HostPort) -> Self {
        self.host_ports.push(port);
        self
    }

    /// Forwards ports of the host to a guest from the start on. If one of them is not free, the interface
    /// that makes the network does not start.
    pub fn forward(mut self, rule: ForwardRule) -> Self {
        self.forwards.push(rule);
        self
    }

    /// Sets what guests can make grow, and how far.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets whether all that a guest sends by UDP from one of its ports comes from one port of the host,
    /// wherever it goes to (RFC 4787, 4.1). The default is no.
    pub fn endpoint_independent(mut self, yes: bool) -> Self {
        self.endpoint_independent = yes;
        self
    }

    /// Sets which resolvers answer guests that ask the gateway for names, in this order. The default is
    /// the host's own, which are read again when they change. Names of the network, such as
    /// `host.internal`, are answered in any case.
    pub fn resolvers(mut self, resolvers: impl IntoIterator<Item = SocketAddr>) -> Self {
        self.resolvers = Resolvers::Fixed(resolvers.into_iter().collect());
        self
    }

    /// Sets how many threads translate for the network, within [`WORKERS`](Self::WORKERS). The default is 1, which is best unless
    /// one thread is busy all the time and processors are idle.
    ///
    /// What a guest sends from one of its ports is with one thread, so a single flow is no faster. Each thread
    /// has its own descriptors for events, tables and buffers: up to 272 frames of each guest can wait for
    /// each of them. The [limits](Self::limits) hold for all of them together: each has its part, rounded up.
    /// Which part a guest needs follows from its ports, so it may meet a limit a little before it has all of
    /// it.
    ///
    /// An interface that asks for another number than its range has, or than its network has, does not start.
    pub fn workers(mut self, number: usize) -> Self {
        self.workers = number;
        self
    }

    pub(crate) fn number_of_workers(&self) -> usize {
        self.workers
    }

    /// The settings as names and values, by which a network tells whether two are the same.
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        fn list<T: fmt::Display>(items: &[T]) -> String {
            let items: Vec<_> = items.iter().map(T::to_string).collect();
            format!("[{}]", items.join(" "))
        }
        vec![
            ("allow", list(&self.allow)),
            ("deny", list(&self.deny)),
            ("host_access", format!("{:?}", self.host_access)),
            ("host_port", list(&self.host_ports)),
            ("forward", list(&self.forwards)),
            ("nat limits", format!("{:?}", self.limits)),
            ("nat workers", self.workers.to_string()),
            ("endpoint_independent", self.endpoint_independent.to_string()),
            (
                "resolvers",
                match &self.resolvers {
                    Resolvers::Fixed(resolvers) => list(resolvers),
                    _ => "the host's".to_owned(),
                },
            ),
        ]
    }
}
