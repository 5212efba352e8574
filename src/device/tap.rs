//! A TAP of the Linux kernel: the counterpart on Linux of vmnet on macOS. Feature `tap`.
//!
//! ```no_run
//! use vmring::{Direction, Interface, Mode, Tap};
//!
//! // Run as root. Creates tap0, gives the host 192.168.64.1 on it, masquerades, and answers DHCP.
//! let interface = Interface::builder().mode(Mode::Shared).device(Tap::named("tap0")).start()?;
//! let mut ring = interface.ring(Direction::Both).build()?;
//!
//! // A frame for a packet of the host to arrive in.
//! let frame = ring.alloc().expect("a fresh ring has free frames");
//! ring.submit_read(frame, 1)?;
//!
//! // A packet of the guest: an Ethernet header (to all stations, from the guest) and a payload.
//! let mut frame = ring.alloc().expect("a fresh ring has free frames");
//! let guest = interface.mac().into_array();
//! frame.copy_from(&[&[0xff; 6][..], &guest, b"\x88\xb5 hello"].concat())?;
//! ring.submit_write(frame, 2)?;
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! # Where the TAP comes from
//!
//! | constructor | who creates the TAP | who sets it up | privilege needed |
//! |---|---|---|---|
//! | [`Tap::new`] | the interface; the kernel chooses the name | the interface, as the mode says | root or CAP_NET_ADMIN |
//! | [`Tap::named`], no TAP of that name | the interface, under that name | the interface, as the mode says | root or CAP_NET_ADMIN |
//! | [`Tap::named`], a persistent TAP | root (`ip tuntap add t0 mode tap user me`) | root | none |
//! | [`Tap::from_fd`] | the process that opened it | the process that opened it | none |
//!
//! [`Tap::configure`] overrides the third column. When an interface stops, it undoes its own setup
//! and nothing else. A TAP that the interface created is deleted with it.
//!
//! # Modes
//!
//! * [`Mode::Host`]: the host has the first address of the range on the TAP. A DHCP server on the
//!   TAP gives the other addresses out. Nothing is forwarded from the TAP or to it, by IPv4 or
//!   IPv6, whatever the host forwards otherwise.
//! * [`Mode::Shared`]: like host mode, and the host is the router for IPv4. The guest's packets leave
//!   with the host's own address. From outside only answers reach the guest, and what a rule of the
//!   operator's sends there (`dnat`). IPv4 forwarding is on while the interface runs.
//! * [`Mode::Bridged`]: the TAP is a port of the bridge of that name. The network behind the bridge
//!   assigns the addresses. The bridge keeps its MAC address, and the TAP has its MTU. If a smaller
//!   MTU is asked for, the kernel lowers the bridge's until the interface stops.
//!
//! In host and shared mode each TAP is a network of its own: guests of two TAPs reach each other only
//! over a bridge. The rules are in an nftables table `inet vmring_NAME` that belongs to this interface
//! (Linux 5.2 or later), and count what they drop. A range that was asked for is refused if the host
//! has it already. Without one, the first free range is taken, beginning with the mode's own.
//!
//! If the host itself drops what it forwards, as Docker's `FORWARD` policy does, shared mode reaches
//! nobody. [`Tap::forwarding`] says so.
//!
//! # What a guest cannot do to its host
//!
//! A TAP that the interface creates takes nothing from its guest that makes the host a client of it:
//! no IPv6 router advertisement (a route, an address, an MTU), no redirect, no source route, no ARP for
//! other addresses of the host. The kernel's switches of the TAP are set before its link is up; in
//! host and shared mode the rules also drop router advertisements, redirects and packets from
//! addresses outside the network. Where `/proc/sys` is read-only, a TAP without these rules is refused
//! unless its IPv6 switches are safe by default.
//!
//! A persistent TAP is its operator's affair: its switches stay as they are. If a process is killed
//! that has set one up ([`Tap::configure`]), the address, the MTU and the bridge stay, too. What a
//! guest sends to a bridge's network is the affair of that network, as with any machine on it.
//!
//! # IPv4 forwarding
//!
//! Shared mode switches `net.ipv4.ip_forward` on if it is off. The last process that needs it puts it
//! back, unless somebody has written the setting meanwhile. A process that is killed leaves it on; the
//! next interface of host or shared mode puts it back. The table `vmring/ip_forward` is there as long
//! as vmring will do so; whoever deletes it keeps forwarding on.
//!
//! # Other programs
//!
//! udev, systemd-networkd and NetworkManager may change a TAP in the first milliseconds. A start sets
//! again what they change, and fails with [`TapError::Changed`] if that does not hold.
//!
//! # Engines
//!
//! Frames move by io_uring if the kernel is Linux 6.7 or later and no container forbids it. Writes
//! are submitted in batches. On a poller's thread one multishot read fills a ring of provided
//! buffers, which are the posted slots. An inline ring ([`Drive::Inline`](crate::Drive::Inline)) may
//! change threads, so it cannot use the multishot read: it reads by `read(2)`, and writes through
//! io_uring in batches.
//!
//! Without io_uring each frame takes a plain `read(2)` or `write(2)`, or a `readv(2)` or `writev(2)` if it
//! is in several pieces of a guest's memory. The header of a guest's packet is such a piece: a copy of it is
//! checked and sent. [`Tap::engine`] chooses the engine, and
//! [`Interface::counters`](crate::Interface::counters) says which one runs. Which is faster depends
//! on the cost of a system call and on the other load of the machine; `performance/` in the
//! repository measures both. With plain calls each `write(2)` may wake the receiver and cost
//! a context switch; io_uring does so once per batch.
//!
//! The system calls that move frames, for a seccomp list:
//!
//! | engine | reads | writes |
//! |---|---|---|
//! | [`TapEngine::Plain`] | `read`, `readv` | `write`, `writev` |
//! | [`TapEngine::IoUring`], inline ring | `read`, `readv` | `io_uring_enter` |
//! | [`TapEngine::IoUring`], on a poller's thread | `io_uring_enter`; `readv` and `read` on a ring with mergeable reads, and `readv` for a guest's buffer of several pieces | `io_uring_enter` |
//!
//! A queue makes its io_uring by `io_uring_setup`, `io_uring_register` and `mmap` in the first call that
//! drives the ring.
//!
//! Some milliseconds after an inline ring is closed, the kernel tears its io_uring down on the
//! threads that have driven it. A system call that waits on such a thread at that moment may fail
//! with `EINTR`, as if a signal had arrived.
//!
//! # Offload
//!
//! Offloads are requested at start
//! ([`InterfaceBuilder::offloads`](crate::InterfaceBuilder::offloads)). The kernel grants those
//! that it knows; [`Capabilities::offloads`] returns them. If any offload was requested, or if a
//! TAP from descriptors was opened with `IFF_VNET_HDR`, each packet has its 12-byte header in the
//! headroom. With segmentation offload packets may be up to 65,549 bytes long, and 65,553 with a
//! VLAN tag.
//!
//! Otherwise no packet is longer than the MTU plus 14 bytes, or 18 if it has a VLAN tag. A longer
//! packet from the host is dropped and counted; it occurs if somebody has raised the MTU since the
//! start. There is one exception. If the posted frame has space for exactly the MTU plus 18 bytes,
//! the kernel cuts a longer packet off to fit, and does not report it. The length in an IP
//! header shows the cut, so such a packet is dropped as well; a packet that is not IP arrives cut
//! off.
//!
//! # The memory of a guest
//!
//! The kernel reads and writes a guest's buffers where they are
//! ([`RingBuilder::segment_table`](crate::RingBuilder::segment_table)). A read may have up to 256 pieces
//! and a write up to 20. A packet in more pieces goes through a reserved frame.
//!
//! On a ring with [mergeable reads](crate::RingBuilder::mergeable_reads) one packet fills as many posted
//! reads as it needs, at most 256, also by the io_uring engine. The kernel cuts off a packet that is
//! longer than the space it is given, and does not tell. So it reads into the posted reads only while
//! they have space for the longest packet
//! ([`Capabilities::max_packet_size`](crate::device::Capabilities) and the header). If they have less,
//! the packet is read into a frame of the queue, and copied into the reads as soon as they have space
//! for *it*; [`RingStats::bounced_reads`](crate::stats::RingStats) counts these reads. Until then the
//! packets behind it stay in the TAP. The packet is dropped, and counted as "too few reads", when as many
//! reads are posted as the ring is deep, when the same number of reads has been too few for a second,
//! and when the queue is closed.
//!
//! # When the TAP goes away
//!
//! If somebody deletes the TAP, the entries in flight complete with `Status::Os(EBADFD)`, and the
//! rings close for that reason. [`Interface::restart`](crate::Interface::restart) opens the TAP
//! again when it exists again, or creates it again if this interface had created it. New rings can
//! be built afterwards.
//!
//! A link that is down does not close the rings: writes fail with `Status::Os(EIO)` until the link
//! is up again, and reads wait.

mod dhcp;
mod forwarding;
mod framing;
mod limits;
mod link;
mod merging;
mod namespace;
mod nat;
mod nft;
mod open;
mod plain;
mod policy;
mod setup;
mod subnet;
mod switches;
mod uring;

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, thread};

use framing::{Drops, Framing};
use limits::{IP_MAX, OPEN_PATIENCE, QUEUES_MAX};
use macaddr::MacAddr6;
use merging::MergingReader;
use namespace::Namespace;
use open::{Flags, TapQueueFd};
use plain::Plain;
use setup::Setup;
use uring::Uring;
use vmring_core::offload;
use vmring_core::sync::{AtomicU64, Ordering};
use vmring_core::view::ETHERNET_HEADER_LEN;
use vmring_embedded::limits::VLAN_TAG_LEN;

use crate::config::{Direction, InterfaceConfig, InterfaceInfo, Mode, Offloads};
use crate::device::common::mac_of;
use crate::device::context::PollContext;
use crate::device::dhcp_settings::DhcpSettings;
use crate::device::seam::{
    Capabilities, Device, Driver, Lease, Progress, Queue, QueueConfig, Wake,
};
use crate::error::{ConfigError, Error, Status, TapError};
use crate::sync::Mutex;
use crate::sys::{after, lock};

/// How frames move between slots and the kernel: by io_uring or by plain system calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum TapEngine {
    /// io_uring if this process can use it, otherwise plain system calls. The default.
    #[default]
    Auto,
    /// io_uring; the start fails if this process cannot use it. (A ring with `Drive::Inline` still
    /// reads by `read(2)`.)
    IoUring,
    /// One `read(2)`, `write(2)` or `writev(2)` per frame.
    Plain,
}

impl fmt::Display for TapEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TapEngine::Auto => "auto",
            TapEngine::IoUring => "io_uring",
            TapEngine::Plain => "plain",
        })
    }
}

impl FromStr for TapEngine {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "auto" => Ok(TapEngine::Auto),
            "io_uring" => Ok(TapEngine::IoUring),
            "plain" => Ok(TapEngine::Plain),
            _ => Err(ConfigError::Invalid(format!(
                "the engine is auto, io_uring or plain, and not '{text}'"
            ))),
        }
    }
}

impl TapEngine {
    /// Returns the engine that this process will use. For [`Auto`](Self::Auto) this is
    /// [`IoUring`](Self::IoUring) if it works here, otherwise [`Plain`](Self::Plain).
    ///
    /// # Errors
    ///
    /// [`Error::Io`] for [`IoUring`](Self::IoUring), if this process cannot use io_uring or the
    /// kernel is older than Linux 6.7.
    pub fn resolve(self) -> Result<Self, Error> {
        match self {
            TapEngine::Plain => Ok(TapEngine::Plain),
            TapEngine::IoUring => uring::check()
                .map(|()| TapEngine::IoUring)
                .map_err(Error::io("making an io_uring with multishot reads")),
            TapEngine::Auto => Ok(match uring::check() {
                Ok(()) => TapEngine::IoUring,
                Err(error) => {
                    tracing::info!(%error, "io_uring does not work here: the TAP uses plain calls");
                    TapEngine::Plain
                }
            }),
        }
    }
}

/// A TAP of the Linux kernel, as a driver for [`Interface::builder`](crate::Interface::builder).
/// See the [module](self).
#[derive(Debug)]
pub struct Tap {
    source: Source,
    options: Options,
}

#[derive(Debug)]
enum Source {
    /// A name. It may contain `%d`, for which the kernel puts a number.
    Name(String),
    Descriptors(Vec<OwnedFd>),
}

#[derive(Clone, Debug)]
struct Options {
    queues: usize,
    engine: TapEngine,
    dhcp: bool,
    dhcp_settings: DhcpSettings,
    dns: Vec<Ipv4Addr>,
    host_mac: Option<MacAddr6>,
    configure: Option<bool>,
}

impl Default for Tap {
    fn default() -> Self {
        Self::new()
    }
}

impl Tap {
    /// Creates a driver for a new TAP. The kernel chooses its name (`tap0`, `tap1`, ...).
    pub fn new() -> Self {
        Self::of(Source::Name("tap%d".to_owned()))
    }

    /// Creates a driver for the TAP of that name: the persistent TAP if there is one, otherwise a
    /// new one.
    pub fn named(name: impl Into<String>) -> Self {
        Self::of(Source::Name(name.into()))
    }

    /// Creates a driver for a TAP that another process has opened, such as the privileged parent of
    /// a VMM.
    ///
    /// The TAP must have been opened with `IFF_TAP | IFF_NO_PI`, and also with `IFF_VNET_HDR` if
    /// offload is wanted. (Without `IFF_NO_PI` every frame has four more bytes in front. This
    /// cannot be checked here: the kernel does not say whether the flag was set.)
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self::from_fds([fd])
    }

    /// Creates a driver for a TAP with several queues that another process has opened. Takes one
    /// descriptor per queue; otherwise like [`from_fd`](Self::from_fd).
    pub fn from_fds(fds: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self::of(Source::Descriptors(fds.into_iter().collect()))
    }

    fn of(source: Source) -> Self {
        let options = Options {
            queues: 1,
            engine: TapEngine::Auto,
            dhcp: true,
            dhcp_settings: DhcpSettings::default(),
            dns: Vec::new(),
            host_mac: None,
            configure: None,
        };
        Self { source, options }
    }

    /// Sets the number of queues of the TAP, 1 to 256. Default 1.
    ///
    /// Each queue serves one reading ring. The kernel spreads flows over the queues that have a
    /// ring. [`RingBuilder::rings`](crate::RingBuilder::rings) builds rings on all of them. Has no
    /// effect on a TAP from descriptors: there each descriptor is a queue.
    pub fn queues(mut self, queues: usize) -> Self {
        self.options.queues = queues;
        self
    }

    /// Sets how frames move. Default [`TapEngine::Auto`].
    pub fn engine(mut self, engine: TapEngine) -> Self {
        self.options.engine = engine;
        self
    }

    /// Sets whether a DHCP server answers on the TAP in host and shared mode. Default true.
    pub fn dhcp(mut self, yes: bool) -> Self {
        self.options.dhcp = yes;
        self
    }

    /// Sets how long the DHCP server's leases last. Default 24 hours.
    pub fn lease_time(mut self, time: Duration) -> Self {
        self.options.dhcp_settings.lease_time = Some(time);
        self
    }

    /// Sets the addresses that the DHCP server gives to guests without a reservation, the first and
    /// the last. They must lie after the host's address. Default: every address after it, up to the
    /// end of the interface's range.
    pub fn dhcp_range(mut self, first: Ipv4Addr, last: Ipv4Addr) -> Self {
        self.options.dhcp_settings.range = Some((first, last));
        self
    }

    /// Reserves an address of the subnet for the guest with this MAC address. Can be called several
    /// times, for several guests.
    pub fn reserve(mut self, mac: MacAddr6, address: Ipv4Addr) -> Self {
        self.options.dhcp_settings.reservations.push((mac, address));
        self
    }

    /// Sets the file that remembers the DHCP server's leases; it is made if it does not exist. Each
    /// TAP needs a file of its own. A thread of the server writes to it. Without a file most guests
    /// get their old addresses too, because a guest's first choice follows from its MAC address;
    /// see [`vmring_embedded::dhcp`].
    pub fn lease_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.options.dhcp_settings.lease_file = Some(path.into());
        self
    }

    /// Adds name servers that the DHCP server announces. Default none.
    pub fn dns(mut self, servers: impl IntoIterator<Item = Ipv4Addr>) -> Self {
        self.options.dns.extend(servers);
        self
    }

    /// Sets the MAC address of the host's end. Default: the address that the TAP has, which for a
    /// new TAP the kernel chooses.
    pub fn host_mac(mut self, mac: MacAddr6) -> Self {
        self.options.host_mac = Some(mac);
        self
    }

    /// Sets whether the interface sets up the host's end as its mode says: address, DHCP, address
    /// translation, bridge. Default: true for a TAP that the interface creates, false for one that
    /// exists already.
    ///
    /// In both cases the interface brings the TAP up, and sets the MTU and the host's MAC address
    /// if they were requested.
    pub fn configure(mut self, yes: bool) -> Self {
        self.options.configure = Some(yes);
        self
    }
}

impl Tap {
    /// Returns how packets of guests are forwarded in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// [`Error::PermissionDenied`] without CAP_NET_ADMIN; [`Error::Io`] if the kernel has no
    /// nf_tables.
    pub fn forwarding() -> Result<TapForwarding, Error> {
        let looking = |refusal: link::Refusal| refusal.into_error("looking at the nftables rules");
        let mut nft = nft::Nft::open().map_err(looking)?;
        let chains = nft.base_chains().map_err(looking)?;
        let state = forwarding::State::look(&mut nft, &chains)?;
        Ok(TapForwarding {
            on: state.on,
            by_vmring: state.ours,
            left_on: state.on && state.ours && !state.needed,
            dropped_by: policy::forward_drops(&chains),
            bridges_too: policy::bridges_too(),
        })
    }
}

/// How a host forwards the packets of guests. [`Tap::forwarding`] returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TapForwarding {
    /// Whether IPv4 forwarding is on (`net.ipv4.ip_forward`).
    pub on: bool,
    /// Whether vmring has switched it on, and nobody has taken the setting over since.
    pub by_vmring: bool,
    /// Whether vmring has switched it on and no interface needs it any more: a process was killed. The
    /// next interface of host or shared mode puts it back.
    pub left_on: bool,
    /// The chains that drop each IPv4 packet which is forwarded and which no rule of theirs accepts,
    /// like `ip filter FORWARD`. Docker makes such a chain.
    pub dropped_by: Vec<String>,
    /// Whether frames between the ports of a bridge pass the same chains
    /// (`net.bridge.bridge-nf-call-iptables`).
    pub bridges_too: bool,
}

impl TapForwarding {
    /// Says what drops the packets of the guest behind this TAP, and what helps. Returns `None` if
    /// nothing is known to, and in host mode, where no packet is forwarded.
    pub fn obstacle(&self, tap: &str, mode: &Mode) -> Option<String> {
        let concerned = match mode {
            Mode::Shared => true,
            Mode::Bridged(_) => self.bridges_too,
            Mode::Host => false,
        };
        (concerned && !self.dropped_by.is_empty()).then(|| {
            format!(
                "this host drops what it forwards (policy drop of {}), so the guest behind '{tap}' \
                 reaches nobody beyond unless a rule there accepts it: iptables -I FORWARD -i {tap} \
                 -j ACCEPT; iptables -I FORWARD -o {tap} -j ACCEPT (or the same in nft)",
                self.dropped_by.join(" and ")
            )
        })
    }
}

impl Driver for Tap {
    fn start(self: Box<Self>, config: &InterfaceConfig) -> Result<Arc<dyn Device>, Error> {
        let Tap { source, options } = *self;
        let queues = match &source {
            Source::Name(name) => {
                if name != "tap%d" {
                    open::check_name(name)?;
                }
                options.queues
            }
            Source::Descriptors(fds) => fds.len(),
        };
        if !(1..=QUEUES_MAX).contains(&queues) {
            let sentence = format!("a TAP has 1 to {QUEUES_MAX} queues, and not {queues}");
            return Err(ConfigError::Invalid(sentence).into());
        }
        if config.isolated && matches!(config.mode, Mode::Bridged(_)) {
            let device = "tap".to_owned();
            return Err(Error::NotSupported { what: "isolation on a bridge", device });
        }
        let engine = options.engine.resolve()?;
        let source = match source {
            Source::Name(name) => Origin::Name { name, made: false },
            Source::Descriptors(fds) => {
                let adopted = fds.into_iter().map(TapQueueFd::adopt).collect::<Result<_, _>>()?;
                Origin::Descriptors(adopted)
            }
        };
        let mut origin = source;
        let namespace = Namespace::here().map_err(Error::io("looking at the network namespace"))?;
        let drops = Arc::<Drops>::default();
        let running = Running::start(&mut origin, None, &options, engine, config, drops.clone())?;
        Ok(Arc::new(TapDevice {
            info: running.info(config),
            caps: running.caps(),
            config: config.clone(),
            options,
            engine,
            name: running.name.clone(),
            fallbacks: Arc::default(),
            drops,
            namespace,
            origin: Mutex::new(origin),
            running: Mutex::new(Some(running)),
        }))
    }
}

/// Where the queues' descriptors come from, at the start and at each restart.
#[derive(Debug)]
enum Origin {
    Name {
        name: String,
        /// This interface has created the TAP, so a restart may create it again.
        made: bool,
    },
    /// The descriptors that were passed in. They are kept as long as the interface lives, because
    /// nothing can open them again.
    Descriptors(Vec<TapQueueFd>),
}

/// The device of a started TAP, which may be stopped and restarted.
struct TapDevice {
    info: InterfaceInfo,
    caps: Capabilities,
    config: InterfaceConfig,
    options: Options,
    engine: TapEngine,
    name: String,
    /// Counts the queues that fell back to plain system calls, because they could not create their
    /// io_uring.
    fallbacks: Arc<AtomicU64>,
    drops: Arc<Drops>,
    /// The network namespace of the start. A restart takes place there.
    namespace: Namespace,
    origin: Mutex<Origin>,
    /// `None` while stopped.
    running: Mutex<Option<Running>>,
}

/// An open TAP.
struct Running {
    name: String,
    queue_states: Arc<Mutex<Vec<QueueState>>>,
    framing: Arc<Framing>,
    setup: Setup,
    mtu: u32,
    offloads: Offloads,
}

/// A queue of the TAP, and how many rings use it.
#[derive(Debug)]
struct QueueState {
    fd: Arc<TapQueueFd>,
    /// The TAP has been opened for several queues (`IFF_MULTI_QUEUE`).
    multi: bool,
    /// A ring reads from this queue.
    reader: bool,
    /// The number of rings that write to this queue.
    writers: usize,
    /// The kernel puts frames into this queue (`IFF_ATTACH_QUEUE`).
    attached: bool,
}

impl Running {
    /// Opens the TAP and sets it up. At a restart, `again` is the name that the TAP had before.
    fn start(
        origin: &mut Origin,
        again: Option<&str>,
        options: &Options,
        engine: TapEngine,
        config: &InterfaceConfig,
        drops: Arc<Drops>,
    ) -> Result<Self, Error> {
        let wants = config.offloads != Offloads::default();
        let mut setup = Setup::open()?;
        let (fds, name, header, multi, fresh, index) = match origin {
            Origin::Name { name, made } => {
                let flags = Flags { multi: options.queues > 1, header: wants };
                let wanted = again.unwrap_or(name);
                let before = if wanted.contains('%') { None } else { setup.find(wanted)? };
                if again.is_some() && before.is_none() && !*made {
                    return Err(TapError::Gone(wanted.to_owned()).into());
                }
                let (first, name) = open_patiently(wanted, flags)?;
                // The TAP that `find` saw may have been deleted before `open`, which has then
                // created another one under the same name. Its index tells them apart.
                let now = setup.find(&name)?.ok_or_else(|| TapError::Gone(name.clone()))?;
                let there = before.is_some_and(|before| before.index == now.index);
                *made = !there;
                let mut fds = vec![first];
                for _ in 1..options.queues {
                    fds.push(open::open(&name, flags)?.0);
                }
                let fds: Vec<_> = fds.into_iter().map(Arc::new).collect();
                (fds, name, wants, flags.multi, !there, Some(now.index))
            }
            Origin::Descriptors(adopted) => {
                let described: Vec<_> =
                    adopted.iter().map(TapQueueFd::describe).collect::<Result<_, _>>()?;
                let first = &described[0];
                if described.iter().any(|other| other.name != first.name) {
                    return Err(
                        TapError::Descriptor("the descriptors belong to different TAPs").into()
                    );
                }
                let fds = adopted.iter().map(TapQueueFd::another).collect::<Result<Vec<_>, _>>()?;
                let fds = fds.into_iter().map(Arc::new).collect();
                (fds, first.name.clone(), first.header, first.multi, false, None)
            }
        };
        let mut offloads = Offloads::default();
        if header {
            fds[0].set_header()?;
            offloads = fds[0].set_offloads(config.offloads)?;
        } else {
            // A persistent TAP may still have offloads from an earlier use. Its packets would need
            // a header, which this descriptor does not carry.
            fds[0].set_offloads(offloads)?;
        }
        let mut queue_states: Vec<_> = fds
            .into_iter()
            .map(|fd| QueueState { fd, multi, reader: false, writers: 0, attached: true })
            .collect();
        let asked = setup::Asked {
            name: &name,
            index,
            fresh,
            configure: options.configure.unwrap_or(fresh),
            config,
            host_mac: options.host_mac,
            dhcp: options.dhcp,
            dhcp_settings: &options.dhcp_settings,
            dns: &options.dns,
        };
        let (mtu, dhcp) = setup.apply(&asked, &queue_states[0].fd)?;
        for state in queue_states.iter_mut().skip(1) {
            state.attach(false);
        }
        let segments = offloads.tso4 || offloads.tso6 || offloads.uso;
        let longest = if segments { IP_MAX.max(mtu) } else { mtu };
        let framing = Framing {
            header: if header { offload::LEN } else { 0 },
            max_packet_size: longest as usize + ETHERNET_HEADER_LEN + VLAN_TAG_LEN,
            offloads,
            dhcp,
            drops,
        };
        tracing::info!(tap = name, mtu, ?offloads, %engine, queues = queue_states.len(), "opened");
        if asked.configure
            && let Some(obstacle) =
                Tap::forwarding().ok().and_then(|f| f.obstacle(&name, &config.mode))
        {
            tracing::warn!("{obstacle}");
        }
        Ok(Self {
            name,
            queue_states: Arc::new(Mutex::new(queue_states)),
            framing: Arc::new(framing),
            setup,
            mtu,
            offloads,
        })
    }

    fn info(&self, config: &InterfaceConfig) -> InterfaceInfo {
        let max = self.framing.max_packet_size as u32;
        let mut info = InterfaceInfo::new(config, mac_of(config), self.mtu, max);
        info.ipv4 = self.setup.range();
        info
    }

    fn caps(&self) -> Capabilities {
        let mut caps = Capabilities::new(self.mtu, self.framing.max_packet_size as u32);
        caps.max_read_batch = limits::URING_WRITES.into();
        caps.max_write_batch = limits::URING_WRITES.into();
        caps.headroom = self.framing.header as u32;
        caps.offloads = self.offloads;
        caps.read_segments = limits::READ_SEGMENTS_MAX as u32;
        caps.write_segments = limits::WRITE_SEGMENTS_MAX as u32;
        caps.merges_reads = true;
        caps.reading_rings = lock(&self.queue_states).len();
        caps.writing_rings = usize::MAX;
        caps
    }
}

/// Opens the TAP; while it is taken, tries again for up to [`OPEN_PATIENCE`].
///
/// A child process holds a copy of this process's descriptors until it executes its program. So a
/// queue that this process has just closed may still be taken for a moment.
fn open_patiently(name: &str, flags: Flags) -> Result<(TapQueueFd, String), Error> {
    let deadline = after(OPEN_PATIENCE);
    loop {
        match open::open(name, flags) {
            Err(Error::Tap(TapError::Taken(_))) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(Error::Tap(TapError::Taken(name))) if open::is_open_here(&name) => {
                return Err(TapError::TakenHere(name).into());
            }
            outcome => return outcome,
        }
    }
}

impl QueueState {
    /// Attaches the queue, so that the kernel puts frames into it, or detaches it. Has no effect on
    /// a TAP that was not opened for several queues. A failure is only logged.
    fn attach(&mut self, yes: bool) {
        if self.multi && self.attached != yes {
            match self.fd.attach(yes) {
                Ok(()) => self.attached = yes,
                Err(error) => {
                    tracing::warn!(%error, attach = yes, "cannot attach or detach a queue")
                }
            }
        }
    }

    fn is_used(&self) -> bool {
        self.reader || self.writers > 0
    }
}

/// Detaches the queues that no ring uses, so that they get no frames, and attaches the others. If
/// no queue is in use, the first one stays attached.
fn tidy(queue_states: &mut [QueueState]) {
    let any = queue_states.iter().any(QueueState::is_used);
    for (i, state) in queue_states.iter_mut().enumerate() {
        let yes = state.is_used() || (!any && i == 0);
        if yes {
            state.attach(true);
        }
    }
    for (i, state) in queue_states.iter_mut().enumerate() {
        if !(state.is_used() || (!any && i == 0)) {
            state.attach(false);
        }
    }
}

impl Device for TapDevice {
    fn name(&self) -> &str {
        "tap"
    }

    fn info(&self) -> InterfaceInfo {
        self.info.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.caps
    }

    fn queue(&self, config: QueueConfig, _wake: Wake) -> Result<Box<dyn Queue>, Error> {
        let direction = config.direction;
        let running = lock(&self.running);
        let running = running.as_ref().ok_or(Status::SetupIncomplete)?;
        let mut queue_states = lock(&running.queue_states);
        let place = if direction.reads() {
            let free = queue_states.iter().position(|state| !state.reader);
            // The caller builds no more reading rings than `Capabilities::reading_rings`, and opens
            // a queue only when an earlier ring of it has closed. So one is free.
            free.ok_or(Status::SetupIncomplete)?
        } else {
            queue_states.iter().position(QueueState::is_used).unwrap_or(0)
        };
        let state = &mut queue_states[place];
        state.reader |= direction.reads();
        state.writers += usize::from(direction.writes());
        let fd = state.fd.clone();
        tidy(&mut queue_states);
        let engine = match self.engine {
            TapEngine::Plain => Engine::Plain(Box::new(Plain::new(fd.clone()))),
            _ => Engine::Uring(Box::new(Uring::new(fd.clone()))),
        };
        Ok(Box::new(TapQueue {
            engine,
            fd,
            framing: running.framing.clone(),
            queue_states: running.queue_states.clone(),
            place,
            direction,
            may_fall_back: self.options.engine == TapEngine::Auto,
            fallbacks: self.fallbacks.clone(),
            merging: None,
            prepared: false,
        }))
    }

    fn stop(&self) -> Result<(), Error> {
        let Some(running) = lock(&self.running).take() else { return Ok(()) };
        let Running { queue_states, mut setup, .. } = running;
        let result = setup.undo();
        drop(queue_states);
        result
    }

    fn restart(&self) -> Result<(), Error> {
        let before = self.stop();
        if let Err(error) = before {
            // The TAP may be gone, and with it all that had to be undone.
            tracing::debug!(%error, "the TAP's earlier settings were not all restored");
        }
        let origin = &mut *lock(&self.origin);
        let mut config = self.config.clone();
        // Rings and guests know the MTU of the start, so it stays.
        config.mtu = Some(self.info.mtu);
        // So does the network's range.
        config.ipv4 = self.info.ipv4;
        let name = Some(self.name.as_str());
        let drops = self.drops.clone();
        let start = || Running::start(origin, name, &self.options, self.engine, &config, drops);
        let entering = Error::io("going back to the TAP's network namespace");
        let running = self.namespace.run(start).map_err(entering)??;
        if running.offloads != self.caps.offloads {
            let what = "fewer offloads than before the restart";
            return Err(Error::Answer { device: "tap", what });
        }
        *lock(&self.running) = Some(running);
        Ok(())
    }

    fn system_name(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn shared_interfaces(&self) -> Result<Vec<String>, Error> {
        let mut running = lock(&self.running);
        running.as_mut().ok_or(Status::SetupIncomplete)?.setup.bridges()
    }

    fn lease(&self, mac: MacAddr6) -> Option<Lease> {
        lock(&self.running).as_ref()?.framing.dhcp.as_ref()?.lease(mac)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let fallbacks = self.fallbacks.load(Ordering::Relaxed);
        let mut counters = vec![
            ("io_uring", u64::from(self.engine == TapEngine::IoUring)),
            ("io_uring fallbacks", fallbacks),
        ];
        if let Some(running) = &*lock(&self.running) {
            counters.push(("queues", lock(&running.queue_states).len() as u64));
            let forwarding = running.setup.turned_forwarding_on();
            counters.push(("IPv4 forwarding turned on", forwarding.into()));
            if let Some(dhcp) = &running.framing.dhcp {
                counters.extend(dhcp.counters());
            }
        }
        counters
    }

    fn drops(&self) -> Vec<(&'static str, u64)> {
        let Drops { too_big, malformed, too_few_reads } = &*self.drops;
        vec![
            ("too big", too_big.load(Ordering::Relaxed)),
            ("malformed", malformed.load(Ordering::Relaxed)),
            ("too few reads", too_few_reads.load(Ordering::Relaxed)),
        ]
    }
}

#[derive(Debug)]
enum Engine {
    Uring(Box<Uring>),
    Plain(Box<Plain>),
}

/// One ring's queue of a TAP.
struct TapQueue {
    engine: Engine,
    fd: Arc<TapQueueFd>,
    framing: Arc<Framing>,
    queue_states: Arc<Mutex<Vec<QueueState>>>,
    /// The index of the queue in `queue_states`.
    place: usize,
    direction: Direction,
    may_fall_back: bool,
    fallbacks: Arc<AtomicU64>,
    /// Reads, if the ring has mergeable reads.
    merging: Option<Box<MergingReader>>,
    /// [`prepare`](Self::prepare) has been called.
    prepared: bool,
}

impl TapQueue {
    /// Prepares the engine, on the thread that drives it, before its first use. If the io_uring
    /// cannot be created and the engine is [`TapEngine::Auto`], plain system calls take its place.
    #[cold]
    fn prepare(&mut self, merging_depth: Option<u32>) -> Result<(), Status> {
        if let Some(depth) = merging_depth {
            let reader = MergingReader::new(self.fd.clone(), self.framing.clone(), depth);
            self.merging = Some(Box::new(reader));
        }
        if let Engine::Uring(uring) = &mut self.engine
            && let Err(error) = uring.prepare()
        {
            if !self.may_fall_back {
                tracing::error!(%error, "a queue of the TAP got no io_uring");
                return Err(Status::MemFailure);
            }
            tracing::warn!(%error, "a queue of the TAP got no io_uring, so it uses plain calls");
            self.fallbacks.fetch_add(1, Ordering::Relaxed);
            self.engine = Engine::Plain(Box::new(Plain::new(self.fd.clone())));
        }
        self.prepared = true;
        Ok(())
    }
}

impl Queue for TapQueue {
    fn bind_to_thread(&mut self) {
        if let Engine::Uring(uring) = &mut self.engine {
            uring.bind_to_thread();
        }
    }

    fn poll(&mut self, cx: &mut PollContext<'_>) -> Result<Progress, Status> {
        if !self.prepared {
            self.prepare(cx.merging_depth())?;
        }
        let Self { engine, framing, merging, .. } = self;
        let merging = merging.as_deref_mut();
        match engine {
            Engine::Uring(uring) => uring.poll(cx, framing, merging),
            Engine::Plain(plain) => {
                plain.write(cx, framing)?;
                match merging {
                    None => plain.read(cx, framing),
                    Some(merging) => merging.read(cx),
                }
            }
        }
    }

    fn arm(&mut self) -> bool {
        match &mut self.engine {
            Engine::Uring(uring) => uring.arm(),
            Engine::Plain(_) => true,
        }
    }

    fn cancel(&mut self, target: Option<u64>) -> u32 {
        if let Some(merging) = &mut self.merging {
            merging.renew();
        }
        match &mut self.engine {
            Engine::Uring(uring) => uring.cancel(target),
            Engine::Plain(_) => 0,
        }
    }

    fn close(&mut self, cx: &mut PollContext<'_>) -> bool {
        match &mut self.engine {
            Engine::Uring(uring) => uring.close(cx, &self.framing),
            Engine::Plain(_) => true,
        }
    }

    /// While a packet waits for reads, the TAP may be readable, and nothing is read.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        let waits = self.merging.as_ref().is_some_and(|merging| merging.is_waiting());
        (!waits).then(|| self.fd.as_fd())
    }

    fn deadline(&self) -> Option<Instant> {
        self.merging.as_ref()?.deadline()
    }
}

impl Drop for TapQueue {
    fn drop(&mut self) {
        let mut queue_states = lock(&self.queue_states);
        let state = &mut queue_states[self.place];
        state.reader &= !self.direction.reads();
        state.writers -= usize::from(self.direction.writes());
        tidy(&mut queue_states);
    }
}
