//! The way out for the guests of vmring's embedded network: network address translation onto sockets
//! of the host.
//!
//! Each TCP connection of a guest becomes a socket of the process, so a guest reaches the world
//! without a privilege, a TAP or a route. The guest's TCP ends here and the socket's begins, and no
//! payload is held in between: what a guest sends is acknowledged when the kernel has taken it, and
//! what comes for a guest stays in the kernel's receive queue until the guest has acknowledged it.
//! Datagrams of UDP, and echo requests of ICMP, go through sockets of their own kind and come back as
//! frames.
//!
//! # What goes where
//!
//! The pure part makes no system call, reads no clock and allocates nothing per packet. It is tested
//! with a model of the kernel and a clock that moves when told.
//!
//! - [`nat`]: [`Nat`], the translator: frames, readiness and time go in
//! - [`output`]: where frames for guests go, which may refuse them
//! - [`sockets`]: what is needed of the host's sockets
//! - [`policy`]: who may reach what, and which address is whose; [`prefix`]: prefixes of addresses
//! - [`config`] and [`limits`]: settings, and the numbers that are limits or policy
//! - [`stats`]: what is counted
//! - `tcp`: the flows of TCP; `retained`: bytes that the guest has not acknowledged, in the kernel or
//!   in a ring; `seq`: sequence numbers
//! - `datagram`: the flows of UDP and ICMP echo
//! - [`dns`]: queries to the gateway, resolvers, and the names that a network answers for itself
//! - `forward`: port forwards, through which flows of both come in
//! - `turns`: whose turn it is, by what each port costs; `cost`: what the calls on sockets cost
//! - `table`, `wheel`, `buffers`, `ports`: bounded tables, timers, memory and limits, for every
//!   protocol
//! - `packet`, `icmp`, `endpoint`: headers, read and written, and addresses; `io`: what each protocol
//!   works with
//!
//! The other part is [`sys`]: real sockets, over epoll on Linux and kqueue on macOS.
//!
//! A protocol has a file of its own, which has its flows in a `Table`, their deadlines in a `Wheel`
//! and a `Kind` of token. [`Nat`] sorts frames and readiness to it.
//!
//! # Example
//!
//! ```
//! use core::time::Duration;
//! use vmring_core::offload::{OffloadHeader, Offloads};
//! use vmring_nat::{Full, GuestFrame, Link, Nat, NatConfig, Output, Port};
//! use vmring_nat::sys::{Events, Host};
//!
//! /// A guest's receive queue.
//! struct Guest(Vec<Vec<u8>>);
//!
//! impl Output for Guest {
//!     fn link(&self, _: Port) -> Link {
//!         Link { mtu: 1500, offloads: Offloads::default(), longest: 1514 }
//!     }
//!     fn send(&mut self, _: Port, frame: &[u8], _: &OffloadHeader) -> Result<(), Full> {
//!         self.0.push(frame.to_vec());
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> std::io::Result<()> {
//! let (mut guest, start) = (Guest(Vec::new()), std::time::Instant::now());
//! let gateway = ([2, 0, 0, 0, 0, 1], "192.168.64.1".parse().unwrap(), "fd00::1".parse().unwrap());
//! let config = NatConfig::new(gateway.0, gateway.1, gateway.2);
//! let mut nat = Nat::new(config, Host::new()?, start.elapsed());
//!
//! // A worker's turn:
//! let frames: &[GuestFrame<'_>] = &[]; // what the guest has sent
//! nat.from_guest(Port(0), frames, start.elapsed(), &mut guest);
//! let next = nat.on_time(start.elapsed(), &mut guest);
//! assert_eq!(next, None); // nothing is to come
//! let mut events = Events::new(256);
//! nat.sockets().wait(Some(Duration::ZERO), &mut events)?; // or until `next`
//! for (token, readiness) in events.iter() {
//!     nat.on_ready(token, readiness, start.elapsed(), &mut guest);
//! }
//! # Ok(())
//! # }
//! ```

mod buffers;
pub mod config;
mod cost;
mod datagram;
pub mod dns;
mod endpoint;
mod forward;
mod icmp;
mod io;
pub mod limits;
pub mod nat;
pub mod output;
mod packet;
pub mod policy;
mod ports;
pub mod prefix;
mod retained;
mod seq;
pub mod sockets;
pub mod stats;
pub mod sys;
mod table;
mod tcp;
mod turns;
mod wait;
mod wheel;

pub use config::{Limits, NatConfig, PortLimits};
pub use datagram::DatagramFlow;
pub use dns::names::{NameError, Names};
pub use dns::resolvers::{Resolvers, parse_resolv_conf};
pub use forward::text::ForwardRuleError;
pub use forward::{ForwardError, ForwardInfo, ForwardRule};
pub use nat::{GuestFrame, Nat};
pub use output::{Full, Link, Output, Port};
pub use policy::rules::{HostAccess, HostPort, PolicyRules, Rule, RuleError};
pub use policy::sources::{Guest, Sources};
pub use policy::{Policy, Protocol, Request, Verdict, WorldOnly};
pub use prefix::{Prefix, PrefixError};
pub use sockets::{
    Capabilities, ConnectOptions, DatagramError, Incoming, Outgoing, Readiness, Route, SendSpace,
    SocketError, Sockets, Token,
};
pub use stats::{Carried, Counter, Counters};
pub use tcp::FlowInfo;
