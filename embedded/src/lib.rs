//! The in-process network of vmring: a learning switch, a gateway and a DHCP server.
//!
//! Packets go in and packets come out. The crate runs wherever Rust does and needs no privileges.
//!
//! A [`Network`] connects up to 1,024 ports. Each [`Port`] has a [`Receiver`] and a [`Sender`]. The
//! receiver lends empty buffers to the network and gets them back with packets. The thread that
//! calls the sender does the forwarding: it copies each frame once, straight into a buffer that the
//! receiver has posted. A buffer is anything that exclusively owns bytes ([`PacketBuffer`]), or is in
//! the memory of a guest. A port can leave checksums and segments to others; see
//! [`network`](network#offload).
//!
//! ```
//! use std::sync::Arc;
//! use vmring_embedded::{Network, NetworkConfig, PortConfig, Sent};
//!
//! let network = Network::<Vec<u8>>::new(NetworkConfig::default())?;
//! let port = |id| PortConfig::new([id; 16], Arc::new(|| {}));
//! let (mut alice, mut alice_sends) = network.join(port(1))?.split();
//! let (mut bob, _bob_sends) = network.join(port(2))?.split();
//!
//! bob.post(vec![0; network.max_packet_size()]).unwrap();
//! let mut frame = Vec::new();
//! frame.extend(bob.mac().as_bytes());
//! frame.extend(alice.mac().as_bytes());
//! frame.extend(b"\x88\xb5hello");
//! assert_eq!(alice_sends.send(&frame), Sent::Forwarded);
//! alice_sends.flush(); // wakes bob if he sleeps
//!
//! let (buffer, len) = bob.collect().unwrap();
//! assert_eq!(buffer[..len], frame);
//! # assert!(alice.collect().is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`network`]: networks, their members and the rules of forwarding
//! - [`packet`]: what is delivered, and the buffers that it is delivered to
//! - [`port`]: an interface's place on a network, and its two halves
//! - [`policy`]: what a port may do: source addresses, and limits that can change
//! - [`software`]: completes checksums and cuts large packets into segments
//! - [`stats`]: what happens to each frame, and the counters of it
//! - [`limits`]: the numbers that are limits or policy
//! - [`clock`]: where a network gets its time from
//! - [`inbox`]: how a frame gets into a receiver's buffer, and why this is safe
//! - [`gateway`]: ARP, ICMP and refusals at the network's first address, and the same over IPv6
//! - [`router`]: the way to other networks
//! - [`dhcp`]: the DHCPv4 server, which can be used alone

mod announce;
pub mod clock;
pub mod config;
pub mod dhcp;
mod flow;
mod frame;
pub mod gateway;
mod guard;
pub mod inbox;
pub mod limits;
#[cfg(all(test, loom))]
mod models;
pub mod network;
pub mod packet;
pub mod policy;
pub mod port;
mod port_state;
mod receive_queue;
pub mod router;
pub mod software;
pub mod stats;
mod table;
mod work;

pub use config::{AddressRange, NetworkConfig, NetworkConfigError, NetworkMode};
pub use dhcp::DhcpLease;
pub use flow::NextFrame;
pub use gateway::Ipv6Config;
pub use network::{JoinError, Network, OpenError, PortConfig, Registry};
pub use packet::{Packet, PacketBuffer};
pub use policy::{PortLimits, PortPolicy, PortRole, Rate, RateLimit, SourceRule};
pub use port::{Monitor, Port, Receiver, Sender};
pub use receive_queue::Accepted;
pub use router::{PortFull, Router, RouterBatch, RouterEnd, RouterLink};
pub use stats::{DropReason, PortStats, Sent};
