//! The way out of an embedded network: network address translation onto sockets of this process.
//!
//! With the feature `nat` a network in shared mode has it, unless [`Embedded::no_nat`] turns it off. Its
//! guests reach the outside world as a program of this process would: without privileges, a TAP or a
//! route. [`NatSettings`] says what they reach, and which ports of the host lead to them. The settings are
//! the network's: whoever joins it asks for the same ones. [`NatControl`] changes port forwards while the
//! network runs, and shows flows and counters.
//!
//! ```
//! use vmring::device::embedded::nat::{NatControl, NatSettings};
//! use vmring::{Embedded, Interface};
//!
//! let control = NatControl::default();
//! // Guests reach a server at port 8080 of the host's loopback address as 192.168.64.1:8080, no private
//! // network of 10.0.0.0/8, and one resolver in it.
//! let settings = NatSettings::new()
//!     .host_port("8080".parse()?)
//!     .deny("10.0.0.0/8".parse()?)
//!     .allow("10.0.0.53:53,udp".parse()?);
//! let driver = Embedded::network("way out").nat(settings).nat_control(&control);
//! let guest = Interface::builder().device(driver).start()?;
//!
//! // A port of the host that the system chooses leads to a guest, which need not be there yet.
//! let at = control.add_forward(&"0=192.168.64.2:22".parse()?)?;
//! assert!(at.ip().is_loopback());
//! # drop(guest);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The thread
//!
//! One thread of the network translates for all its guests, `vmring-nat`. It starts with the first packet
//! for outside, or with the first port forward, and ends with the network. Guests' packets reach it as
//! [`vmring_embedded::router`] says: a ring's thread copies them, and makes no system call unless the
//! translator sleeps. A guest that sends faster than it translates loses its own packets, and they are
//! counted ("router busy" among the [`drops`](crate::Interface::drops)).
//!
//! # What guests reach
//!
//! The outside world, and nothing of the host, unless the settings say so: no loopback and no link-local
//! address, no metadata service of a cloud, no address of the host itself, and none of the network's own
//! subnet. [`vmring_nat::policy::rules`] has the order of the rules.
//!
//! `worker.rs` is the thread's loop, `guests.rs` what it knows of guests and how it sends to them,
//! `control.rs` the handle.

pub(super) mod control;
mod guests;
mod limits;
mod worker;

use std::any::Any;
use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::thread;

use vmring_embedded::{Network, NetworkConfig, Router, RouterEnd};
use vmring_nat::sys::{Host, Waker};

use crate::device::slot::PostedSlot;
use crate::error::Error;
use crate::sync::Mutex;
use crate::sys::lock;
use worker::{Commands, Worker};

pub use control::{NatControl, NatReport};
pub use vmring_nat::{
    Counter, Counters, DatagramFlow, FlowInfo, ForwardInfo, ForwardRule, ForwardRuleError, Guest,
    HostAccess, HostPort, Limits, PortLimits, Prefix, PrefixError, Protocol, Rule, RuleError,
};

/// The way out of a network, as it is set up. The default lets guests reach the outside world, and
/// nobody reach them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatSettings {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    host_access: HostAccess,
    host_ports: Vec<HostPort>,
    forwards: Vec<ForwardRule>,
    limits: Limits,
    endpoint_independent: bool,
}

impl NatSettings {
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
    /// gateway's address. Without it, the gateway refuses what comes to its address.
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

    /// The settings as names and values, by which a network tells whether two are the same.
    pub(super) fn rows(&self) -> Vec<(&'static str, String)> {
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
            ("endpoint_independent", self.endpoint_independent.to_string()),
        ]
    }
}

/// The translator of a network: what it is set to, and its thread while that runs.
pub(super) struct Translator {
    settings: NatSettings,
    network: NetworkConfig,
    gateway_mac: [u8; 6],
    commands: Arc<Commands>,
    thread: Mutex<Option<Running>>,
    /// Whether the forwards of the settings are there.
    has_forwards: Mutex<bool>,
}

struct Running {
    thread: thread::JoinHandle<()>,
    waker: Waker,
}

/// Gives a network its way out, unless it has it, and adds the forwards that it is set to.
pub(super) fn set_up(
    network: &Arc<Network<PostedSlot>>,
    settings: &NatSettings,
) -> Result<(), Error> {
    let Some(gateway) = network.gateway() else { return Ok(()) };
    let router = network.set_router(Arc::new(Translator {
        settings: settings.clone(),
        network: network.config().clone(),
        gateway_mac: gateway.mac().into_array(),
        commands: Arc::default(),
        thread: Mutex::new(None),
        has_forwards: Mutex::new(false),
    }));
    match router.and_then(|router| translator(router.clone())) {
        Some(translator) => translator.add_forwards(network),
        None => Ok(()),
    }
}

/// The translator that a router is.
fn translator(router: Arc<dyn Router<PostedSlot>>) -> Option<Arc<Translator>> {
    router.as_any().downcast().ok()
}

/// The translator of a network, if it has one.
fn translator_of(network: &Network<PostedSlot>) -> Option<Arc<Translator>> {
    translator(network.router()?.clone())
}

impl Translator {
    /// Adds the forwards of the settings: all of them or none. Only the first call does.
    fn add_forwards(&self, network: &Network<PostedSlot>) -> Result<(), Error> {
        // The lock is held so that nobody joins before they are there.
        let mut has_forwards = lock(&self.has_forwards);
        if *has_forwards {
            return Ok(());
        }
        let mut added = Vec::new();
        for rule in &self.settings.forwards {
            match control::add(self, network, rule) {
                Ok(at) => added.push((rule, at)),
                Err(error) => {
                    for (rule, at) in added {
                        for index in 0..rule.count {
                            let at = SocketAddr::new(at.ip(), at.port() + index);
                            // It was there a moment ago.
                            let _ = control::remove(self, rule.protocol, at, true);
                        }
                    }
                    return Err(error);
                }
            }
        }
        *has_forwards = true;
        Ok(())
    }
}

impl Router<PostedSlot> for Translator {
    fn start(&self, mut end: RouterEnd<PostedSlot>) -> io::Result<()> {
        let host = Host::new()?;
        let waker = host.waker();
        let wake = waker.clone();
        end.set_wake(Arc::new(move || wake.wake()));
        let worker = Worker::new(host, &self.settings, &self.network, self.gateway_mac);
        let commands = Arc::clone(&self.commands);
        let thread = thread::Builder::new()
            .name("vmring-nat".to_owned())
            .spawn(move || worker::run(worker, end, &commands))?;
        let before = lock(&self.thread).replace(Running { thread, waker });
        if let Some(before) = before {
            // It has dropped the network's end, so it is about to end.
            let _ = before.thread.join();
        }
        Ok(())
    }

    fn stop(&self) {
        let running = lock(&self.thread).take();
        if let Some(Running { thread, waker }) = running {
            self.commands.stop();
            waker.wake();
            // It panicked, if it returns an error. That was printed.
            let _ = thread.join();
        }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn ports_of_gateway(&self) -> Vec<(u8, u16)> {
        let port = |port: &HostPort| {
            let number = match port.protocol {
                Protocol::Tcp => 6,
                Protocol::Udp => 17,
                _ => return None,
            };
            Some((number, port.port))
        };
        self.settings.host_ports.iter().filter_map(port).collect()
    }
}

/// The gateway's address over IPv6, which no guest is told yet.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfd76, 0x6d72, 0x696e, 0x67, 0, 0, 0, 1);
