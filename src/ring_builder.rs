//! [`RingBuilder`]: the settings of a ring, and how its parts are put together.

use std::sync::Arc;
use std::time::Duration;

use vmring_core::{Depths, Pool, Regions, SegmentTable, rings};

use crate::PoolBuilder;
use crate::config::{Direction, Offloads};
use crate::device::bounce::{Bounce, GuestSupport};
use crate::device::seam::{Capabilities, QueueConfig};
use crate::engine::{Engine, EngineParts, Handoff};
use crate::error::{ConfigError, Error};
use crate::lifecycle::InterfaceShared;
use crate::limits::{CANCEL_DEPTH, CLOSE_TIMEOUT, DEPTH, DEPTH_MAX};
use crate::mailbox::{RingPark, RingShared, new_ring_number, register};
use crate::notify::Notifier;
use crate::policy::{IdlePolicy, RetryPolicy};
use crate::poller::{Poller, PollerBuilder};
use crate::pool::HEADROOM_DEFAULT;
use crate::ring::{CompletionQueue, Ring, SubmissionQueue};

/// The thread that polls a ring: its engine takes the submissions, calls the device and publishes
/// the completions.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub enum Drive<'a> {
    /// A thread of the ring's own, as with `IORING_SETUP_SQPOLL`. The default.
    #[default]
    Thread,
    /// A thread that polls other rings too.
    Shared(&'a Poller),
    /// The caller's own thread, inside the calls on the reaping half that look for completions or
    /// wait for them: [`reap`](Ring::reap), [`ready`](CompletionQueue::ready), [`wait`](Ring::wait),
    /// [`submit_and_wait`](Ring::submit_and_wait), [`arm`](Ring::arm),
    /// [`arm_after`](Ring::arm_after), [`poll_ready`](Ring::poll_ready), [`drain`](Ring::drain),
    /// [`cancel_and_wait`](Ring::cancel_and_wait) and [`close`](Ring::close). Between these calls
    /// the engine does nothing. This is for VMMs that already have an I/O thread.
    Inline,
}

/// Builds a [`Ring`]. [`Interface::ring`](crate::Interface::ring) returns one.
///
/// [`build`](Self::build) refuses a setting that does not apply to the ring
/// ([`ConfigError::NotApplicable`]): [`thread_name`](Self::thread_name) and [`cpu`](Self::cpu)
/// without [`Drive::Thread`], the depth of a direction that the ring does not have, and
/// [`frames`](Self::frames), [`headroom`](Self::headroom) or [`prefault`](Self::prefault) with a
/// given [`pool`](Self::pool).
///
/// # Memory
///
/// A ring takes all its memory when it is built. Let `entries` be read depth + write depth + cancel
/// depth, rounded up to a power of two. On a 64-bit machine a ring has:
///
/// | what | bytes |
/// |---|---|
/// | SQ and CQ | 32 x `entries` each (the SQ: 32 x [`sq_depth`](Self::sq_depth), if that is set) |
/// | reads and writes posted to the device | 40 x read depth + 40 x write depth |
/// | frames, unless they come from [`pool`](Self::pool)s | slots x slot size, rounded up to pages |
///
/// and some 5 KiB besides. A ring of depth 256 each way over a device of 1,514-byte packets has 64
/// KiB, 20 KiB, and 832 KiB of frames. Another 80 bytes for each read and write are reserved for
/// slots that a device drops; their pages are touched only if that happens. `performance/` compares
/// this with what the system reports.
///
/// # Examples
///
/// ```
/// use vmring::{Direction, Drive, Interface, Loopback, Poller};
///
/// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
/// let poller = Poller::start()?;
/// let ring = interface.ring(Direction::Both).depth(64).drive(Drive::Shared(&poller)).build()?;
/// assert_eq!(ring.in_flight(), 0);
/// # Ok::<(), vmring::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct RingBuilder<'a> {
    interface: &'a Arc<InterfaceShared>,
    direction: Direction,
    depth: u32,
    read_depth: Option<u32>,
    write_depth: Option<u32>,
    cancel_depth: u32,
    sq_depth: Option<u32>,
    pools: Vec<Pool>,
    segment_tables: Vec<&'a SegmentTable>,
    mergeable_reads: bool,
    receive_offloads: Offloads,
    receive_ecn: bool,
    frames: Option<usize>,
    headroom: Option<usize>,
    prefault: bool,
    drive: Drive<'a>,
    poller: PollerBuilder,
    idle: IdlePolicy,
    retry: RetryPolicy,
    close_timeout: Duration,
    start_index: u32,
}

impl<'a> RingBuilder<'a> {
    pub(crate) fn new(interface: &'a Arc<InterfaceShared>, direction: Direction) -> Self {
        Self {
            interface,
            direction,
            depth: DEPTH,
            read_depth: None,
            write_depth: None,
            cancel_depth: CANCEL_DEPTH,
            sq_depth: None,
            pools: Vec::new(),
            segment_tables: Vec::new(),
            mergeable_reads: false,
            receive_offloads: Offloads::ALL,
            receive_ecn: true,
            frames: None,
            headroom: None,
            prefault: false,
            drive: Drive::Thread,
            poller: Poller::builder(),
            idle: IdlePolicy::default(),
            retry: RetryPolicy::default(),
            close_timeout: CLOSE_TIMEOUT,
            start_index: 0,
        }
    }

    /// Sets how many reads may be in flight, and how many writes: 1 to 65,536 of each. Default:
    /// 256.
    ///
    /// Every depth is rounded up to a power of two, as `io_uring_setup(2)` rounds its entries.
    pub fn depth(mut self, depth: u32) -> Self {
        self.depth = depth;
        self
    }

    /// Sets how many reads may be in flight, if other than [`depth`](Self::depth).
    pub fn read_depth(mut self, depth: u32) -> Self {
        self.read_depth = Some(depth);
        self
    }

    /// Sets how many writes may be in flight, if other than [`depth`](Self::depth).
    pub fn write_depth(mut self, depth: u32) -> Self {
        self.write_depth = Some(depth);
        self
    }

    /// Sets how many cancels may be in flight: 1 to 65,536. Default: 16.
    pub fn cancel_depth(mut self, depth: u32) -> Self {
        self.cancel_depth = depth;
        self
    }

    /// Sets the number of entries of the SQ: 1 to 65,536. Default: one for every credit, so that
    /// the SQ is never full.
    pub fn sq_depth(mut self, depth: u32) -> Self {
        self.sq_depth = Some(depth);
        self
    }

    /// Adds a pool whose frames the ring takes. A ring may have several pools, and a pool may serve
    /// several rings. [`Ring::alloc`] takes from the first. Default: a pool of the ring's own.
    pub fn pool(mut self, pool: &Pool) -> Self {
        self.pools.push(pool.clone());
        self
    }

    /// Adds a segment table whose buffers the ring takes ([`Ring::submit_read_guest`] and
    /// [`Ring::submit_write_guest`]). A ring may have several tables, and a table may serve several
    /// rings. A table with four segments for each entry of the ring is a good size.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use vmring::guest::GuestRegion;
    /// use vmring::{Direction, GuestMemory, GuestMmap, Interface, Loopback, SegmentTable};
    ///
    /// // The guest's memory begins at 0x4000_0000. Its driver has put a packet into it, in two
    /// // pieces, with a header of 12 bytes in front, and has given a buffer for the next packet.
    /// let mapping = Arc::new(GuestMmap::anonymous(1 << 20)?);
    /// let memory = GuestMemory::new([GuestRegion::new(0x4000_0000, mapping)])?;
    /// memory.slice(0x4000_0000, 26).expect("memory").copy_from(&[0; 26]);
    /// memory.slice(0x4000_8000, 6).expect("memory").copy_from(b"hello!");
    ///
    /// let table = SegmentTable::new(memory.clone(), 4 * 512)?;
    /// let interface = Interface::builder().device(Loopback::new(1500)).start()?;
    /// let mut ring = interface.ring(Direction::Both).segment_table(&table).build()?;
    /// ring.submit_read_guest(table.buffer([(0x4001_0000, 2048)], 12)?, 1)?;
    /// ring.submit_write_guest(table.buffer([(0x4000_0000, 26), (0x4000_8000, 6)], 12)?, 2)?;
    /// while ring.in_flight() > 0 {
    ///     ring.wait(1, None);
    ///     assert!(ring.reap().all(|done| done.result == Ok(20)));
    /// }
    /// let arrived = memory.slice(0x4001_0000 + 26, 6).expect("memory");
    /// assert_eq!(arrived.read(), Some(*b"hello!"));
    /// # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
    /// ```
    ///
    /// The ring reserves frames for guests' packets that the device cannot move between the guest's
    /// memory and itself: one for each entry, but at most 32 for reads and 32 for writes.
    pub fn segment_table(mut self, table: &'a SegmentTable) -> Self {
        self.segment_tables.push(table);
        self
    }

    /// Lets one packet fill several reads. Without this, each read of a guest's buffer needs space for
    /// the largest packet.
    ///
    /// A packet that is longer than the first posted read goes on in the next ones. Their completions
    /// come one after the other and together: [`Completion::more`](crate::Completion::more) counts them
    /// down. The buffers stay whole packets to a guest that has negotiated `VIRTIO_NET_F_MRG_RXBUF`:
    /// the header in front of the first part has the number of buffers, and the other parts begin with
    /// the first byte of their buffer (virtio 1.2, section 5.1.6.4). If the posted reads are too few for
    /// a packet, all of it waits for more, or all of it is dropped and counted.
    ///
    /// The device must be able to do it
    /// ([`Capabilities::merges_reads`](crate::device::Capabilities::merges_reads)), else
    /// [`build`](Self::build) returns an error.
    #[doc(alias = "VIRTIO_NET_F_MRG_RXBUF")]
    pub fn mergeable_reads(mut self, yes: bool) -> Self {
        self.mergeable_reads = yes;
        self
    }

    /// Sets which work the ring accepts undone in what it reads: checksums to complete, and packets to
    /// cut. What the interface's own [offloads](crate::InterfaceBuilder::offloads) do not include, it
    /// does not get anyway. Default: all that they include.
    ///
    /// The rest is done before a packet is in the read's buffer, by the packet's sender on the embedded
    /// network. An [offload header](crate::OffloadHeader) stays in front of each packet if the interface
    /// has it. A ring that accepts no segmentation gets no packet that is longer than
    /// [`Capabilities::max_frame_size`](crate::device::Capabilities::max_frame_size), and its reads need
    /// space for no more. What the ring writes may leave as much work as before.
    ///
    /// A ring that accepts other work than the one before it on an interface takes over what waits there,
    /// without the packets that leave work which it does not accept; they are dropped and counted.
    ///
    /// The device must be able to do it
    /// ([`Capabilities::receive_offloads`](crate::device::Capabilities::receive_offloads)), else
    /// [`build`](Self::build) returns an error, unless nothing is refused that the interface has.
    ///
    /// ```
    /// use vmring::config::Offloads;
    /// use vmring::{Direction, Embedded, Interface};
    ///
    /// // A guest that cuts nothing itself, beside others that send it 64 KiB at a time.
    /// let embedded = Embedded::network("offloads of a ring");
    /// let interface = Interface::builder().device(embedded).offloads(Offloads::ALL).start()?;
    /// assert_eq!(interface.max_packet_size(), 65_553);
    /// let ring = interface.ring(Direction::Read).receive_offloads(Offloads::default()).build()?;
    /// assert_eq!(ring.capabilities().max_frame_size, 1518);
    /// # Ok::<(), vmring::Error>(())
    /// ```
    pub fn receive_offloads(mut self, offloads: Offloads) -> Self {
        self.receive_offloads = offloads;
        self
    }

    /// Sets whether TCP packets with ECN are among those that the ring accepts uncut
    /// (`VIRTIO_NET_HDR_GSO_ECN`; virtio 1.2, section 5.1.6.4). A guest that has not negotiated
    /// `VIRTIO_NET_F_GUEST_ECN` does not know them. Default: true. The same holds for it as for
    /// [`receive_offloads`](Self::receive_offloads).
    pub fn receive_ecn(mut self, yes: bool) -> Self {
        self.receive_ecn = yes;
        self
    }

    /// Sets the number of frames of the ring's own pool. Default: one for every read and write
    /// credit.
    pub fn frames(mut self, frames: usize) -> Self {
        self.frames = Some(frames);
        self
    }

    /// Sets how many bytes are kept free in front of a fresh frame of the ring's own pool. If the
    /// device needs more, the pool has as many as the device needs. Default: [`HEADROOM_DEFAULT`].
    pub fn headroom(mut self, bytes: usize) -> Self {
        self.headroom = Some(bytes);
        self
    }

    /// Sets whether every page of the ring's own pool is touched now, so that no packet pays for a
    /// page fault. Default: false.
    pub fn prefault(mut self, yes: bool) -> Self {
        self.prefault = yes;
        self
    }

    /// Sets the thread that polls the ring. Default: [`Drive::Thread`].
    pub fn drive(mut self, drive: Drive<'a>) -> Self {
        self.drive = drive;
        self
    }

    /// Sets the thread's name, with [`Drive::Thread`]. See [`PollerBuilder::name`].
    pub fn thread_name(mut self, name: impl Into<String>) -> Self {
        self.poller = self.poller.name(name);
        self
    }

    /// Sets the processor that the thread stays on, with [`Drive::Thread`]. See
    /// [`PollerBuilder::cpu`].
    pub fn cpu(mut self, cpu: usize) -> Self {
        self.poller = self.poller.cpu(cpu);
        self
    }

    /// Sets how the ring's own thread waits for work (with [`Drive::Thread`]), and how
    /// [`Ring::wait`] waits for completions.
    pub fn idle(mut self, idle: IdlePolicy) -> Self {
        self.idle = idle;
        self
    }

    /// Sets what happens when the device takes fewer writes than it was offered.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = retry;
        self
    }

    /// Sets how long a close waits for the device to release its slots. Default: 2 seconds.
    pub fn close_timeout(mut self, timeout: Duration) -> Self {
        self.close_timeout = timeout;
        self
    }

    /// Sets where the queues' free-running indices begin, to exercise their wrap in tests.
    #[doc(hidden)]
    pub fn start_index(mut self, index: u32) -> Self {
        self.start_index = index;
        self
    }

    /// Builds `n` equal rings, for a device with several queues, such as a TAP with
    /// `Tap::queues(n)`. With [`Drive::Thread`] each ring has a poller of its own. Each has a pool
    /// of its own unless one was given.
    ///
    /// # Errors
    ///
    /// Those of [`build`](Self::build). The rings that were built before the error are closed.
    pub fn rings(self, n: usize) -> Result<Vec<Ring>, Error> {
        (0..n).map(|_| self.clone().build()).collect()
    }

    /// Refuses a setting of something that this ring does not have.
    fn refuse_unused(&self) -> Result<(), ConfigError> {
        let own_thread = matches!(self.drive, Drive::Thread);
        let own_pool = self.pools.is_empty();
        let refused = |what, why| Err(ConfigError::NotApplicable { what, why });
        if let Some(what) = self.poller.thread_setting().filter(|_| !own_thread) {
            return refused(what, "the ring has no thread of its own");
        }
        if self.read_depth.is_some() && !self.direction.reads() {
            return refused("read depth", "the ring only writes");
        }
        if self.write_depth.is_some() && !self.direction.writes() {
            return refused("write depth", "the ring only reads");
        }
        if self.mergeable_reads && !self.direction.reads() {
            return refused("mergeable reads", "the ring only writes");
        }
        if self.mergeable_reads && !self.interface.device.capabilities().merges_reads {
            return refused("mergeable reads", "the device fills one read with each packet");
        }
        let caps = self.interface.device.capabilities();
        let refuses = self.refuses(&caps);
        if refuses && !self.direction.reads() {
            return refused("receive offloads", "the ring only writes");
        }
        if refuses && !caps.receive_offloads {
            return refused("receive offloads", "the device has the same for every ring");
        }
        for (what, set) in [
            ("number of frames", self.frames.is_some()),
            ("headroom", self.headroom.is_some()),
            ("prefault", self.prefault),
        ] {
            if set && !own_pool {
                return refused(what, "the ring's pool was given");
            }
        }
        Ok(())
    }

    /// Whether the ring does not accept everything that the interface may leave undone.
    fn refuses(&self, caps: &Capabilities) -> bool {
        let header = caps.offloads.virtio_header;
        let mut both = caps.offloads & self.receive_offloads;
        both.virtio_header = header;
        let no_ecn = !self.receive_ecn && (both.tso4 || both.tso6);
        both != caps.offloads || no_ecn
    }

    /// Builds the ring. Nothing is in flight on it.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for an invalid size, for a pool that does not suit the device, for a
    /// setting that does not apply to this ring (the processor of a thread that the ring does not
    /// have, the frames of a pool that was given), for a [`cpu`](Self::cpu) that this process may
    /// not run on, and while the interface is stopped or restarts; [`Error::Memory`] if the system
    /// does not have that much memory; [`Error::TooManyRings`] if the device has as many rings as it
    /// can serve; [`Error::Io`] if the system refuses a thread; and the errors of the device.
    pub fn build(self) -> Result<Ring, Error> {
        let caps = self.interface.device.capabilities();
        self.refuse_unused()?;
        let depth_of = |what, uses: bool, set: Option<u32>| match uses {
            true => round_depth(what, set.unwrap_or(self.depth)),
            false => Ok(0),
        };
        let read = depth_of("read depth", self.direction.reads(), self.read_depth)?;
        let write = depth_of("write depth", self.direction.writes(), self.write_depth)?;
        let cancel = round_depth("cancel depth", self.cancel_depth)?;
        let mut depths = Depths::new(read, write, cancel);
        if let Some(sq) = self.sq_depth {
            depths.sq = round_depth("SQ depth", sq)?;
        }
        let Offloads { tso4, tso6, uso, .. } = caps.offloads & self.receive_offloads;
        let is_cut = caps.receive_offloads && !(tso4 || tso6 || uso);
        let read_size = if is_cut { caps.max_frame_size } else { caps.max_packet_size };
        let packet = match self.direction.writes() {
            true => caps.max_packet_size,
            false => read_size,
        } as usize;
        let pools = if self.pools.is_empty() {
            let frames = self.frames.unwrap_or((read + write) as usize);
            let headroom = self.headroom.unwrap_or(HEADROOM_DEFAULT).max(caps.headroom as usize);
            let pool = PoolBuilder::new(frames, packet).headroom(headroom);
            vec![pool.prefault(self.prefault).build()?]
        } else {
            self.pools
        };
        for pool in &pools {
            let room = pool.capacity() as usize;
            if self.direction.reads() && room < read_size as usize {
                let needed = read_size as usize;
                return Err(ConfigError::PoolTooSmall { capacity: room, needed }.into());
            }
            let (headroom, needed) = (pool.layout().headroom as usize, caps.headroom as usize);
            if headroom < needed {
                return Err(ConfigError::PoolHeadroom { headroom, needed }.into());
            }
        }
        let regions = Regions::new(pools).and_then(|regions| {
            self.segment_tables.iter().try_fold(regions, |all, table| all.with_segment_table(table))
        });
        let too_many = "a ring takes at most 65,536 pools and segment tables";
        let regions = regions.ok_or_else(|| ConfigError::Invalid(too_many.to_owned()))?;
        let support = GuestSupport {
            read_segments: caps.read_segments,
            write_segments: caps.write_segments,
            headroom: caps.headroom,
            max_packet_size: caps.max_packet_size,
            read_size,
            offloads: caps.offloads,
            merges: self.mergeable_reads,
            checks_headers: caps.checks_headers,
        };
        let bounces = regions.has_segment_table() && !support.takes_all(self.direction.reads());
        let bounce = bounces.then(|| Bounce::new([read, write], support)).transpose()?;

        let permit = self.interface.acquire(self.direction)?;
        let number = new_ring_number();
        let notifier = Arc::new(Notifier::default());
        let own_poller;
        let poller = match self.drive {
            Drive::Inline => None,
            Drive::Shared(poller) => Some(poller),
            Drive::Thread => {
                own_poller = self.poller.idle(self.idle).start()?;
                Some(&own_poller)
            }
        };
        let (park, place) = match poller {
            None => (RingPark::Inline(notifier.clone()), None),
            Some(poller) => {
                let place = poller.shared().reserve()?;
                (RingPark::Poller { poller: poller.shared().set.clone(), place }, Some(place))
            }
        };
        let slots = (read + write) as usize;
        let shared = Arc::new(RingShared::new(number, park, notifier.clone(), slots));
        register(&shared);
        self.interface.add(&shared);
        let (sq_producer, cq_consumer, sq_consumer, cq_producer) =
            rings(depths, regions, self.start_index);
        let engine = Engine::new(EngineParts {
            sq_consumer,
            cq_producer,
            bounce,
            merging_depth: self.mergeable_reads.then_some(read),
            interface: self.interface.clone(),
            queue: QueueConfig {
                direction: self.direction,
                receive_offloads: self.receive_offloads,
                receive_ecn: self.receive_ecn,
            },
            shared: shared.clone(),
            retry: self.retry,
            close_timeout: self.close_timeout,
            permit,
            depths: (read as usize, write as usize),
        });
        let engine = match (engine, poller, place) {
            (Err(error), Some(poller), Some(place)) => {
                poller.shared().unreserve(place);
                return Err(error);
            }
            (engine, ..) => engine?,
        };
        let (engine, remote) = match (poller, place) {
            (Some(poller), Some(place)) => {
                let handoff = Arc::new(Handoff::default());
                poller.shared().adopt(place, engine, handoff.clone());
                (None, Some((handoff, poller.shared().clone())))
            }
            _ => (Some(Box::new(engine)), None),
        };
        tracing::debug!(ring = number, direction = %self.direction, ?depths, "ring built");
        let sq = SubmissionQueue::new(sq_producer, shared.clone(), caps, read_size);
        let cq = CompletionQueue::new(
            cq_consumer,
            shared,
            notifier,
            engine,
            remote,
            self.idle,
            self.close_timeout,
            caps,
        );
        Ok(Ring::new(sq, cq))
    }
}

/// Returns the depth that a ring gets when it is asked for `value`.
fn round_depth(what: &'static str, value: u32) -> Result<u32, ConfigError> {
    match value {
        0 => Err(ConfigError::Zero { what }),
        1..=DEPTH_MAX => Ok(value.next_power_of_two()),
        _ => Err(ConfigError::TooLarge { what, value: value.into(), max: DEPTH_MAX.into() }),
    }
}
