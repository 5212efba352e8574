//! The back end of vhost-user, for a network device.
//!
//! A front end (QEMU, cloud-hypervisor, crosvm, user-mode Linux, libkrun, DPDK's virtio-user) shares
//! the memory of its guest, and says where the guest's rings are. [`Session`] speaks with one front
//! end; the device behind it implements [`Backend`]. [`Listener`], [`connect`] and [`adopt`] make
//! connections.
//!
//! The document is QEMU's `docs/interop/vhost-user.rst`. Names of sections here are those of it.
//!
//! # The order of messages
//!
//! Front ends differ in the order in which they set up a ring, and the document fixes little of it.
//! So each message only sets a value. A ring starts when the last of these has arrived: the features,
//! the memory, the number of entries, the addresses, the kick descriptor and, if writes are to be
//! logged, the log. A ring stops at GET_VRING_BASE, and when the front end sets it up again.
//!
//! | a message | does to a ring that runs |
//! |---|---|
//! | SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG | stops it, and starts it again if it is in the new memory |
//! | SET_LOG_BASE, SET_FEATURES that changes `LOG_ALL` only, SET_VRING_ADDR that changes the log only, SET_VRING_KICK | stops it, and starts it again |
//! | SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR, other SET_FEATURES, SET_STATUS 0, RESET_DEVICE, GET_VRING_BASE | stops it until the next SET_VRING_KICK |
//! | SET_VRING_CALL | replaces the event, and signals it once |
//! | SET_VRING_ENABLE | enables or disables it |
//!
//! A ring starts at SET_VRING_KICK, before the first kick can be read, as in DPDK and libvhost-user.
//! A guest may kick its receive ring once only, even before this program was started.
//!
//! # Hostile front ends
//!
//! Every message is checked. What breaks the protocol is an [`Error`], which ends the connection. A
//! connection needs a bounded amount of memory, whatever the front end sends: one message in each
//! direction, 509 regions, three descriptors for each ring.
//!
//! Three things a front end can do that this module cannot prevent:
//!
//! * It can shorten a file that it shares, so that accesses to the memory raise SIGBUS. See the next
//!   section.
//! * It can share a file of a file system that it serves itself (FUSE), so that accesses wait for it.
//!   Demand seals, or use one thread per front end.
//! * It can make its own signals wait; see [`Event`].
//!
//! # Memory that shrinks
//!
//! A page that a file has lost, or for which the file system has no space, raises SIGBUS when it is
//! accessed, on whichever thread accesses it: that of its own guest, or that of another guest, which
//! sends a packet there. The default action of the signal ends the process, and with it every guest.
//! This crate installs no signal handler, because a handler belongs to the program. A program that
//! serves front ends that it does not trust has two ways, and may take both:
//!
//! * It demands seals ([`Settings::demand_seals`]). A file with `F_SEAL_SHRINK` keeps its length. A
//!   full file system still raises SIGBUS. This crate sets that seal itself on every file that allows it
//!   (`MFD_ALLOW_SEALING`), so only files that nobody can seal are refused. The seal stays with the file.
//!   A front end that is to shorten its file later sets `F_SEAL_SEAL` first; that file counts as
//!   [`unsealed`](SessionStats::unsealed).
//! * It handles SIGBUS. It learns from a [`MappingObserver`] which addresses are a front end's. If the
//!   address of the fault (`si_addr`) is one of them, the handler puts private anonymous memory there
//!   (`mmap` with `MAP_FIXED`), marks the connection, wakes its thread, and returns; the access then
//!   succeeds, and the connection ends. If the address is not one of them, the handler restores the
//!   default action and returns. Only functions that are async-signal-safe may be called (`mmap` is a
//!   system call and may). A lock may not be taken.
//!
//! Accesses of the kernel for the program, as in `readv`, raise no signal. They fail with EFAULT.
//!
//! # Examples
//!
//! ```no_run
//! use std::os::fd::AsFd;
//! use std::task::Poll;
//! use vmring_virtio::vhost_user::{Backend, Error, Listener, Progress, Session, Settings};
//!
//! /// Serves one front end after the other. `wait` polls the descriptor, and whatever the device
//! /// waits for.
//! fn serve<B: Backend>(
//!     listener: &Listener,
//!     mut device: B,
//!     mut wait: impl FnMut(std::os::fd::BorrowedFd<'_>, Progress),
//! ) -> std::io::Result<()> {
//!     loop {
//!         let Some(socket) = listener.accept()? else {
//!             wait(listener.as_fd(), Progress::Idle);
//!             continue;
//!         };
//!         let mut session = Session::new(socket, device, Settings::new(1));
//!         loop {
//!             match session.process() {
//!                 Ok(Progress::Closed) => break,
//!                 Ok(progress) => wait(session.as_fd(), progress),
//!                 Err(error) => {
//!                     eprintln!("the connection ends: {error}");
//!                     break;
//!                 }
//!             }
//!         }
//!         while session.end() == Poll::Pending {
//!             wait(session.as_fd(), Progress::Draining);
//!         }
//!         device = session.into_backend();
//!     }
//! }
//! ```

mod backend;
mod connection;
mod error;
pub mod features;
mod listen;
mod mapping;
mod memory;
pub mod message;
mod request;
mod session;
mod state;

pub use crate::config::NetConfig;
pub use crate::event::Event;
pub use backend::{Backend, RingSetup, UsedLog};
pub use error::{Error, MapError};
pub use listen::{Adopted, Listener, adopt, connect};
pub use mapping::MappingObserver;
pub use request::Request;
pub use session::{Progress, Session, SessionStats, Settings};
pub use state::STATE_MAX;
