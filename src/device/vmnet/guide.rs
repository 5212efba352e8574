//! # vmnet, for someone who comes from `Lwt_vmnet` or from C
//!
//! On macOS an [`Interface`](crate::Interface) without a `.device(..)` is a vmnet interface:
//!
//! ```no_run
//! use vmring::{Direction, Interface, Mode};
//!
//! // init ?mode ?uuid ?ipv4_config; vmnet_start_interface
//! let interface = Interface::builder().mode(Mode::Shared).start()?;
//! println!("{} {} {}", interface.mac(), interface.mtu(), interface.max_packet_size());
//! let mut ring = interface.ring(Direction::Both).build()?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! | C | here |
//! |---|---|
//! | `vmnet_start_interface`, its queue, its handler, the dictionary | `start()`: waits, with a timeout, and reads the dictionary for you |
//! | `vmnet_interface_set_event_callback`, `vmnet_read` in a loop | `submit_read` and `reap`; the poller reads in batches until a read comes back short |
//! | `struct vmpktdesc`, `struct iovec` | a [`Frame`](crate::Frame); the descriptors are the driver's, allocated once |
//! | `vmnet_write` | `submit_write`; what was not taken is tried again within a budget, then completes with [`BufferExhausted`](crate::Status::BufferExhausted) |
//! | `vmnet_stop_interface` | `stop()`, or dropping it |
//! | `vmnet_copy_shared_interface_list` | [`shared_interfaces`](super::shared_interfaces) |
//! | `vmnet_interface_add_port_forwarding_rule` and the newer `..._ip_...` | [`add_port_forward`](crate::Interface::add_port_forward), IPv4 and IPv6 |
//! | `vmnet_network_configuration_*`, `vmnet_network_*` (macOS 26) | [`VmnetNetwork`](super::Network) |
//! | `vmnet_enable_virtio_header_key`, `vmnet_enable_tso_key` | [`InterfaceBuilder::offloads`](crate::InterfaceBuilder::offloads), [`Frame::offload`](crate::Frame::offload) |
//!
//! # What it needs
//!
//! | macOS | root | not root |
//! |---|---|---|
//! | up to 15 | works | the restricted entitlement `com.apple.vm.networking`, which Apple grants |
//! | 26 and later | works | `com.apple.security.virtualization`; an ad-hoc signature is enough |
//!
//! vmnet answers a start that is not allowed with 1001 ("failure"), so that is what `start()` calls
//! [`PermissionDenied`](crate::Error::PermissionDenied) unless the process is root; the text says
//! what is missing on the running system. `cargo build` strips signatures, so sign after each build,
//! with the file `examples/vmnet.entitlements`, which has `com.apple.security.virtualization`, and
//! start the program itself (`cargo run` may put the unsigned one back):
//!
//! ```sh
//! cargo build --release --example vmnet
//! codesign --sign - --force --entitlements examples/vmnet.entitlements target/release/examples/vmnet
//! target/release/examples/vmnet
//! ```
//!
//! The restricted entitlement is not for that file: a binary that has it from an ad-hoc signature is
//! killed when it starts. Up to macOS 15, use `sudo`.
//!
//! # What is proved, and what waits for a Mac
//!
//! Nobody has run this driver on a Mac yet. In every run of CI it is compiled, linted and linked for
//! both Apple targets, and the same files run on Linux against a simulated vmnet that aborts on
//! whatever vmnet's header forbids. Where Apple's documents leave a question open, the driver has to
//! be right under both answers, and the simulator gives both:
//!
//! * whether events come again while packets are left unread (reads go on until one comes back
//!   short; a [safety poll](super::Vmnet::safety_poll) looks every 200 ms, and counts what it finds);
//! * whether a failed write has sent a part of its batch (a count below what was asked for is taken
//!   at its word; the others are then sent one by one, so that each gets its own answer; if vmnet
//!   sends some and does not say so, these arrive twice, and none is lost);
//! * whether a success can come with fewer packets than asked for (what is left stays posted);
//! * whether two writers at a time are allowed (a lock keeps them apart), and two readers (one ring
//!   reads);
//! * whether the `max_packet_size` of 65,550 with TSO includes the 12 bytes of the virtio header
//!   (slots have room for both);
//! * whether vmnet keeps copies of the blocks it is given (ours live until it calls them no more).
//!
//! # Sleep
//!
//! macOS does not say when the host has slept, and interfaces have been seen dead afterwards.
//! [`Interface::restart`](crate::Interface::restart) stops and starts with the same identity and MAC:
//! rings, frames and `user_data` stay, what was in flight completes as cancelled, port forwardings
//! are added again.
//!
//! # What is leaked on purpose
//!
//! A start whose handler never comes (its block, queue and handle), an event callback that does not
//! end, and a stop that vmnet does not answer: each may still touch what it was given. The error says
//! so, and an `error` event of `tracing`.
