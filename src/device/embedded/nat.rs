//! The way out of an embedded network: network address translation onto sockets of this process.
//!
//! With the feature `nat` a network in shared mode has it, unless [`Embedded::no_nat`](crate::Embedded::no_nat) turns it off. Its
//! guests reach the outside world as a program of this process would: without privileges, a TAP or a
//! route. [`NatSettings`] says what they reach, and which ports of the host lead to them. The settings are
//! the network's: whoever joins it asks for the same ones. [`NatControl`] changes port forwards while the
//! network runs, and shows flows and counters. The [guide] says what works and what is refused, the limits
//! and their defaults, and what a VMM that confines itself has to allow.
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
//! One thread of the network translates for all its guests, `vmring-nat`, or several if
//! [`NatSettings::workers`] says so. It starts with the first packet for outside, or with the first port
//! forward, and ends with the network. Guests' packets reach it as
//! [`vmring_embedded::router`] says: a ring's thread copies them, and makes no system call unless the
//! translator sleeps. A guest that sends faster than it translates loses its own packets, and they are
//! counted ("router busy" among the [`drops`](crate::Interface::drops)).
//!
//! # Names
//!
//! The gateway answers DNS: it asks the host's resolvers ([`NatSettings::resolvers`] names others), and knows
//! `host.internal` and `gateway.internal`, which are its own address. [`vmring_nat::dns`] says which
//! queries go where.
//!
//! A guest that calls itself `web` in DHCP (option 12) is `web.internal`, and `web`, for all guests of the
//! network as long as its lease runs, and its address leads back to that name. Its first label counts, in
//! lower case. A name belongs to who was first: no guest takes another's, nor that of the host or the
//! gateway, nor one that programs look up by themselves, such as `wpad`. What is refused is counted
//! ("NAT name refused", and "DHCP bad names" for what is no host name).
//!
//! # IPv6
//!
//! The network has IPv6 too, unless [`Embedded::no_ipv6`](crate::Embedded::no_ipv6) says otherwise: guests
//! get a prefix and the gateway as their name server by router advertisements, and translated they reach
//! what the host reaches. The advertisements name the gateway as a default router while the host itself has
//! a default route, so that no guest tries IPv6 in vain before IPv4. The host's routes are looked at when
//! the network is made, and while the thread runs every 2 seconds, or every 30 if no guest sends. A change is
//! advertised at once, and twice more; otherwise all guests get an advertisement every 200 to 600 seconds.
//! What is sent to a network that the host has no route to is answered by "no route".
//!
//! # What guests reach
//!
//! The outside world, and nothing of the host, unless the settings say so: no loopback and no link-local
//! address, no metadata service of a cloud, no address of the host itself, and none of the network's own
//! subnet. [`vmring_nat::policy::rules`] has the order of the rules.
//!
//! `settings.rs` is what the network is set to; `translator.rs` starts and ends the threads and asks them;
//! `worker.rs` is the loop of one, `guests.rs` how it sends to guests and what all of them know of guests,
//! `names.rs` what they are called, `ipv6.rs` what they are told and asked over IPv6; `control.rs` is the handle.

pub(super) mod control;
mod guests;
#[doc = include_str!("../../../docs/nat.md")]
pub mod guide {}
mod ipv6;
mod limits;
mod names;
mod settings;
pub(super) mod translator;
mod worker;

pub use control::NatControl;
pub use settings::NatSettings;
pub use vmring_nat::{
    Carried, Counter, Counters, DatagramFlow, FlowInfo, ForwardInfo, ForwardRule, ForwardRuleError,
    Guest, HostAccess, HostPort, Limits, PortLimits, Prefix, PrefixError, Protocol, Rule,
    RuleError,
};
pub use worker::NatReport;
