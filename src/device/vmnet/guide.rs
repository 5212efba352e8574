//! # vmnet for users of `Lwt_vmnet` or of the C interface
//!
//! On macOS an [`Interface`](crate::Interface) built without `.device(..)` is a vmnet interface:
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
//! | `vmnet_start_interface`, its queue, its handler, the dictionary | `start()`, which waits with a timeout and reads the dictionary |
//! | `vmnet_interface_set_event_callback`, `vmnet_read` in a loop | `submit_read` and `reap`; the poller reads in batches until a read comes back short |
//! | `struct vmpktdesc`, `struct iovec` | a [`Frame`](crate::Frame); the driver allocates the descriptors once |
//! | `vmnet_write` | `submit_write`; a packet that vmnet did not take is retried within a budget, then completes with [`BufferExhausted`](crate::Status::BufferExhausted) |
//! | `vmnet_stop_interface` | `stop()`, or dropping the interface |
//! | `vmnet_copy_shared_interface_list` | [`shared_interfaces`](super::shared_interfaces) |
//! | `vmnet_interface_add_port_forwarding_rule` and the newer `..._ip_...` | [`add_port_forward`](crate::Interface::add_port_forward), for IPv4 and IPv6 |
//! | `vmnet_network_configuration_*`, `vmnet_network_*` (macOS 26) | [`VmnetNetwork`](super::VmnetNetwork) |
//! | `vmnet_enable_virtio_header_key`, `vmnet_enable_tso_key` | [`InterfaceBuilder::offloads`](crate::InterfaceBuilder::offloads), [`Frame::offload`](crate::Frame::offload) |
//!
//! # Privileges
//!
//! | macOS | as root | not as root |
//! |---|---|---|
//! | up to 15 | works | needs the restricted entitlement `com.apple.vm.networking`, which only Apple grants |
//! | 26 and later | works | needs the entitlement `com.apple.security.virtualization`; an ad-hoc signature is enough |
//!
//! vmnet answers a start without the privilege with 1001 ("failure"). Unless the process runs as
//! root, `start()` therefore reports 1001 as
//! [`PermissionDenied`](crate::Error::PermissionDenied). The message says what the running system
//! requires.
//!
//! `cargo build` strips signatures, so sign after each build. The file
//! `examples/vmnet.entitlements` has `com.apple.security.virtualization`. Start the signed program
//! itself: `cargo run` may replace it with an unsigned one.
//!
//! ```sh
//! cargo build --release --example vmnet
//! codesign --sign - --force --entitlements examples/vmnet.entitlements target/release/examples/vmnet
//! target/release/examples/vmnet
//! ```
//!
//! Do not add the restricted entitlement to that file: macOS kills a binary at its start if an
//! ad-hoc signature gives it that entitlement. Up to macOS 15, use `sudo`.
//!
//! # What is proved, and what waits for a Mac
//!
//! Nobody has run this driver on a Mac yet. Every CI run compiles, lints and links it for both
//! Apple targets. The same files run on Linux against a simulated vmnet, which aborts on everything
//! that vmnet's header forbids. Apple's documents leave some questions open. The driver is written
//! to be right under both answers, and the simulator gives both:
//!
//! * Do events come again while packets are left unread? Reads go on until one returns fewer
//!   packets than were asked for. A [safety poll](super::Vmnet::safety_poll) looks every 200 ms and
//!   counts what it finds.
//! * Has a failed write sent a part of its batch? If the count is below the number of packets in
//!   the call, the driver believes the count. It sends the other packets one by one, so that each
//!   gets its own answer. If vmnet has sent some of those without saying so, they arrive twice;
//!   none is lost.
//! * Can a successful write take fewer packets than asked for? The others stay posted.
//! * May two threads write at a time, or read? A lock keeps writers apart, and only one ring reads.
//! * Does the `max_packet_size` of 65,550 with TSO include the 12 bytes of the virtio header? Slots
//!   have space for both.
//! * Does vmnet keep copies of the blocks it is given? The driver keeps its own references until
//!   vmnet cannot call the blocks any more.
//!
//! For one open question the driver has to assume an answer: from which threads may vmnet's
//! functions be called? Apple does not say. The driver assumes any thread, and one read beside one
//! write: hyperkit and vmnet-helper read and write in that way.
//!
//! # Sleep
//!
//! vmnet does not say that the host has slept, and users have reported interfaces that were dead
//! afterwards. [`Interface::restart`](crate::Interface::restart) stops the interface and starts it
//! with the same identity and MAC. Rings, frames and `user_data` stay. What was in flight completes
//! as cancelled. Port forwardings are added again.
//!
//! # What is leaked on purpose
//!
//! The driver leaks what vmnet may still touch, in three cases: a start whose handler never runs
//! (its block, queue and handle), an event callback that does not end, and a stop that vmnet
//! refuses or does not answer. The returned error and an `error` event of `tracing` say so.
