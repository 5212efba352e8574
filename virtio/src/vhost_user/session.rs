//! [`Session`]: one connection with a front end.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::Poll;

use crate::event::Event;
use crate::sys;
use crate::vhost_user::backend::{Backend, RingSetup, UsedLog};
use crate::vhost_user::connection::{Connection, Descriptors, Flushed, Received, backend_request};
use crate::vhost_user::error::Error;
use crate::vhost_user::features::{
    LOG_ALL, NET_F_MTU, NEVER_OFFERED, PROTOCOL_FEATURES, ProtocolFeature,
};
use crate::vhost_user::listen::{Adopted, adopt};
use crate::vhost_user::mapping::{DirtyBitmap, Limits, MappingObserver};
use crate::vhost_user::memory::MemoryTable;
use crate::vhost_user::message::{CONFIG_MAX, Message, RingAddresses, StateDirection};
use crate::vhost_user::request::Request;
use crate::vhost_user::state::Transfer;

/// How many messages one call of [`Session::process`] handles, so that a front end that never stops
/// sending leaves time for others.
const BUDGET: u32 = 64;
/// The most pairs of rings: a message names a ring by eight bits.
const QUEUE_PAIRS_MAX: u16 = 128;
/// The regions that libvhost-user and the vhost crate have at most.
const MEM_SLOTS: usize = 509;
/// The smallest MTU that a guest may be told: that of every IPv4 link (RFC 791).
const MTU_MIN: u64 = 68;
/// The number of BACKEND_CONFIG_CHANGE_MSG (section "Back-end message types").
const CONFIG_CHANGE: u32 = 2;
/// In the answer to SET_DEVICE_STATE_FD: no descriptor comes back, so the front end uses its own.
const NO_DESCRIPTOR: u64 = 1 << 8;
/// The status bit DEVICE_NEEDS_RESET (virtio, "Device Status Field").
const NEEDS_RESET: u8 = 0x40;

/// What a back end offers.
#[derive(Clone)]
#[non_exhaustive]
pub struct Settings {
    /// The number of pairs of a receive and a transmit ring, from 1 to 128.
    pub queue_pairs: u16,
    /// Whether the front end may read the configuration space, and with it the MAC address and the
    /// MTU. cloud-hypervisor, crosvm and libkrun do; QEMU warns of a network back end that offers
    /// it. It is off by default.
    pub config: bool,
    /// The most bytes of memory that the front end may share: 4 TiB by default.
    pub memory_max: u64,
    /// Whether memory, and a dirty log, is refused whose file the front end can make shorter.
    ///
    /// A file that can be sealed against that (`F_SEAL_SHRINK`) is, with or without this. Only memory
    /// files of Linux can, and only if their front end has made them so. QEMU's
    /// `memory-backend-memfd` and crosvm seal theirs; those of other front ends cannot be sealed, so
    /// this is off by default.
    pub demand_seals: bool,
    /// The observer that is told which addresses are the front end's files.
    pub observer: Option<Arc<dyn MappingObserver>>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("queue_pairs", &self.queue_pairs)
            .field("config", &self.config)
            .field("memory_max", &self.memory_max)
            .field("demand_seals", &self.demand_seals)
            .field("observer", &self.observer.is_some())
            .finish()
    }
}

impl Settings {
    /// The default settings, for this number of pairs of rings.
    ///
    /// # Panics
    ///
    /// If it is 0 or more than 128.
    pub fn new(queue_pairs: u16) -> Self {
        assert!((1..=QUEUE_PAIRS_MAX).contains(&queue_pairs), "1 to 128 pairs of rings");
        Self {
            queue_pairs,
            config: false,
            memory_max: 4 << 40,
            demand_seals: false,
            observer: None,
        }
    }
}

/// What [`Session::process`] has reached, and what its owner waits for before it calls it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// Everything that arrived is handled. Wait until the [descriptor](Session::as_fd) is readable,
    /// and for [`Session::transfer`] if there is one.
    Idle,
    /// More may have arrived. Call it again, after others had their turn.
    More,
    /// The front end does not take its reply. Wait until the descriptor is writable.
    Blocked,
    /// The device has not ended what it was asked for. Call it again when the device has got
    /// further.
    Draining,
    /// The front end asks for the result of a transfer. Wait for [`Session::transfer`].
    Transferring,
    /// The front end has closed the connection. Call [`Session::end`].
    Closed,
}

/// What a session has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionStats {
    /// Messages that were well-formed.
    pub messages: u64,
    /// Requests that were refused without an end of the connection: an MTU that the device cannot
    /// carry, a MAC address that is none, a change of the configuration space, a state that cannot
    /// be transferred, a channel that is no socket.
    pub refused: u64,
    /// Regions of the memory that the front end shares now, whose files it can shorten, because they
    /// cannot be sealed.
    pub unsealed: u64,
}

/// One connection with a front end, and the device behind it.
///
/// It owns no thread and no loop. The owner polls its [descriptor](Self::as_fd), and calls
/// [`process`](Self::process). See the module [`vhost_user`](crate::vhost_user) for an example.
pub struct Session<B> {
    connection: Connection,
    backend: B,
    settings: Settings,
    offered: u64,
    /// It is `None` before SET_FEATURES. Until then no ring starts.
    features: Option<u64>,
    protocol_offered: u64,
    protocol: u64,
    memory: MemoryTable,
    /// The log that the front end has given, whether it is in use or not.
    log: Option<Arc<DirtyBitmap>>,
    rings: Box<[Ring]>,
    status: u8,
    pending: Option<Pending>,
    /// The back end sends its own requests on it.
    channel: Option<OwnedFd>,
    transfer: Transfer,
    stats: SessionStats,
    ended: bool,
}

/// What the front end has set of a ring, and where the ring is.
#[derive(Default)]
struct Ring {
    size: u16,
    addresses: Option<RingAddresses>,
    base: u16,
    /// Without it the ring is stopped. The inner `None` is a ring that is polled.
    kick: Option<Option<Arc<Event>>>,
    call: Option<Arc<Event>>,
    error: Option<Arc<Event>>,
    enabled: bool,
    running: bool,
    stopping: bool,
}

/// A message that is being carried out.
struct Pending {
    request: Request,
    need_reply: bool,
    /// What to do when no ring is stopping any more.
    then: Then,
}

enum Then {
    Answer(Answer),
    Base(usize),
    Memory(MemoryTable),
    Features { features: u64, table: Option<MemoryTable> },
    Log { log: Arc<DirtyBitmap>, table: Option<MemoryTable> },
    Size(usize, u16),
    SetBase(usize, u16),
    Addresses(usize, RingAddresses),
    Kick(usize, Option<Arc<Event>>),
    Status(u8),
    Reset,
    StateFd(Option<StateDirection>, OwnedFd),
    StateCheck,
}

enum Answer {
    /// The request has no reply of its own.
    Done,
    /// The request has no reply of its own, and was not carried out.
    Refused,
    Number(u64),
    State {
        index: u32,
        num: u32,
    },
    /// Bytes of the configuration space, and the flags of the request.
    Config {
        offset: u32,
        len: usize,
        flags: u32,
    },
}

/// The rings to which something happens.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    One(usize),
}

impl<B: Backend> Session<B> {
    /// A session on a new connection.
    pub fn new(socket: UnixStream, backend: B, settings: Settings) -> Self {
        let pairs = settings.queue_pairs.clamp(1, QUEUE_PAIRS_MAX);
        let protocol_offered = (ProtocolFeature::ALL.iter())
            .filter(|feature| **feature != ProtocolFeature::Config || settings.config)
            .fold(0, |bits, feature| bits | feature.bit());
        Self {
            connection: Connection::new(socket),
            offered: (backend.features() & !NEVER_OFFERED) | LOG_ALL | PROTOCOL_FEATURES,
            backend,
            settings,
            features: None,
            protocol_offered,
            protocol: 0,
            memory: MemoryTable::empty(),
            log: None,
            rings: (0..pairs * 2).map(|_| Ring::default()).collect(),
            status: 0,
            pending: None,
            channel: None,
            transfer: Transfer::None,
            stats: SessionStats::default(),
            ended: false,
        }
    }

    /// Handles what has arrived, at most a certain number of messages.
    ///
    /// # Errors
    ///
    /// [`Error`], if the front end breaks the protocol. The connection is over then; call
    /// [`end`](Self::end).
    pub fn process(&mut self) -> Result<Progress, Error> {
        if self.ended {
            return Ok(Progress::Closed);
        }
        let progress = self.process_messages();
        self.ended = matches!(progress, Ok(Progress::Closed) | Err(_));
        progress
    }

    fn process_messages(&mut self) -> Result<Progress, Error> {
        let mut handled = 0;
        loop {
            match self.connection.flush()? {
                Flushed::All => {}
                Flushed::Blocked => return Ok(Progress::Blocked),
                Flushed::Closed => return Ok(Progress::Closed),
            }
            if let Some(pending) = self.pending.take() {
                if let Some(waits) = self.carry_out(pending)? {
                    return Ok(waits);
                }
                continue;
            }
            if handled == BUDGET {
                return Ok(Progress::More);
            }
            match self.connection.receive()? {
                Received::Message => handled += 1,
                Received::Nothing => {
                    self.transfer.advance();
                    return Ok(Progress::Idle);
                }
                Received::Closed => return Ok(Progress::Closed),
            }
            let (header, payload, descriptors) = self.connection.take();
            let message = Message::parse(header, payload, descriptors.count())?;
            self.stats.messages += 1;
            let (request, need_reply) = (header.request, header.need_reply);
            match self.begin(request, message, descriptors) {
                Ok(then) => self.pending = Some(Pending { request, need_reply, then }),
                Err(error) => return Err(self.refuse(request, need_reply, error)),
            }
        }
    }

    /// Tells the front end, if it asked and can be told at once, that its request has failed.
    fn refuse(&mut self, request: Request, need_reply: bool, error: Error) -> Error {
        if need_reply && self.negotiated(ProtocolFeature::ReplyAck) && !has_reply(request) {
            self.connection.reply(request, &[&1u64.to_ne_bytes()]);
            // The connection ends in any case.
            let _ = self.connection.flush();
        }
        error
    }

    /// Checks a message, and begins to carry it out. Nothing has changed if it returns an error.
    fn begin(
        &mut self,
        request: Request,
        message: Message,
        mut descriptors: Descriptors,
    ) -> Result<Then, Error> {
        if let Some(feature) = needs(request).filter(|feature| !self.negotiated(*feature)) {
            return Err(Error::NotNegotiated { request, feature });
        }
        let limits = self.limits();
        let then = match message {
            Message::GetFeatures => Then::Answer(Answer::Number(self.visible())),
            Message::SetFeatures(features) => self.begin_features(features)?,
            // The connection itself is the session. RESET_OWNER is to be ignored.
            Message::SetOwner | Message::ResetOwner => Then::Answer(Answer::Done),
            Message::GetProtocolFeatures => Then::Answer(Answer::Number(self.protocol_offered)),
            Message::SetProtocolFeatures(features) => {
                let bits = features & !self.protocol_offered;
                if bits != 0 {
                    return Err(Error::Features { request, bits });
                }
                self.protocol = features;
                Then::Answer(Answer::Done)
            }
            Message::GetQueueNum => Then::Answer(Answer::Number(self.rings.len() as u64)),
            Message::GetMaxMemSlots => Then::Answer(Answer::Number(MEM_SLOTS as u64)),
            Message::SetMemTable(table) => {
                let table = self.memory.replace(&table, &mut descriptors, limits)?;
                self.begin_memory(request, table)?
            }
            Message::AddMemReg(region) => {
                let table = self.memory.add(&region, &mut descriptors, limits)?;
                self.begin_memory(request, table)?
            }
            Message::RemMemReg(region) => {
                let table = self.memory.remove(&region)?;
                self.begin_memory(request, table)?
            }
            Message::SetLogBase { size, offset } => {
                if !self.negotiated(ProtocolFeature::LogShmfd) {
                    // There is no memory to log into.
                    Then::Answer(Answer::Done)
                } else if descriptors.count() == 0 {
                    return Err(Error::Descriptors { request, count: 0, takes: 1 });
                } else {
                    self.begin_log(size, offset, descriptors.take(0).into())?
                }
            }
            // The event would tell the front end that the log has changed; it looks by itself.
            Message::SetLogFd => Then::Answer(Answer::Done),
            Message::SetVringNum { index, num } => {
                let ring = self.ring(request, index)?;
                // A ring that runs is set up anew, and is kicked again. One that does not may have its
                // kick already.
                self.stop(Which::One(ring), self.rings[ring].running);
                Then::Size(ring, num)
            }
            Message::SetVringBase { index, base } => {
                let ring = self.ring(request, index)?;
                self.stop(Which::One(ring), self.rings[ring].running);
                Then::SetBase(ring, base)
            }
            Message::SetVringAddr { index, addresses } => {
                let index = self.ring(request, index)?;
                let ring = &self.rings[index];
                let same_place = ring.addresses.is_some_and(|old| {
                    (old.descriptors, old.used, old.available)
                        == (addresses.descriptors, addresses.used, addresses.available)
                });
                self.check_used_log(request, ring.size, &addresses, self.memory.dirty_log())?;
                // A running ring gets another log during a migration. Other addresses are those of a
                // ring that is set up anew, and that is kicked again.
                self.stop(Which::One(index), ring.running && !same_place);
                Then::Addresses(index, addresses)
            }
            Message::GetVringBase { index } => {
                let ring = self.ring(request, index)?;
                self.stop(Which::One(ring), true);
                Then::Base(ring)
            }
            Message::SetVringKick { index } => {
                let ring = self.ring(request, index)?;
                let kick = event(request, descriptors, Event::kick)?;
                self.stop(Which::One(ring), false);
                Then::Kick(ring, kick)
            }
            Message::SetVringCall { index } => {
                let index = self.ring(request, index)?;
                let call = event(request, descriptors, Event::new)?;
                let ring = &mut self.rings[index];
                ring.call.clone_from(&call);
                if ring.running {
                    self.backend.set_call(index as u16, call.clone());
                    if let Some(call) = call {
                        // An interrupt may have gone to the old event and was lost there. If this
                        // fails, the front end has closed its end, and waits for nothing.
                        let _ = call.signal();
                    }
                }
                Then::Answer(Answer::Done)
            }
            Message::SetVringErr { index } => {
                let ring = self.ring(request, index)?;
                self.rings[ring].error = event(request, descriptors, Event::new)?;
                Then::Answer(Answer::Done)
            }
            Message::SetVringEnable { index, enable } => {
                let ring = self.ring(request, index)?;
                self.enable(ring, enable);
                Then::Answer(Answer::Done)
            }
            Message::SendRarp { mac } => {
                // A group address is no guest's, and neither is the address 0.
                let good = mac[0] & 1 == 0 && mac != [0; 6];
                if good {
                    self.backend.announce(mac);
                }
                Then::Answer(done_if(good))
            }
            Message::NetSetMtu(mtu) => {
                let mtu = u16::try_from(mtu).ok().filter(|mtu| u64::from(*mtu) >= MTU_MIN);
                Then::Answer(done_if(mtu.is_some_and(|mtu| self.backend.set_mtu(mtu))))
            }
            Message::SetBackendReqFd => {
                let channel = match adopt(descriptors.take(0)) {
                    Ok(Adopted::Connected(socket)) => {
                        sys::no_signal(socket.as_fd()).ok().map(|()| OwnedFd::from(socket))
                    }
                    _ => None,
                };
                let good = channel.is_some();
                self.channel = channel.or(self.channel.take());
                Then::Answer(done_if(good))
            }
            Message::GetConfig(asked) => {
                let (offset, flags) = (asked.offset, asked.flags);
                Then::Answer(Answer::Config { offset, len: asked.bytes().len(), flags })
            }
            Message::SetConfig(change) => {
                // Nothing in the space of a network device can be written by its driver. The flag
                // of a migration says otherwise, but front ends of the vhost crate set the same bit
                // for what the guest writes, and a guest must not choose its MAC address. So a
                // front end may set only what is there already.
                let bytes = self.config_bytes();
                let start = change.offset as usize;
                let same =
                    (bytes.get(start..)).is_some_and(|bytes| bytes.starts_with(change.bytes()));
                Then::Answer(done_if(same))
            }
            Message::ResetDevice => {
                self.stop(Which::All, true);
                Then::Reset
            }
            Message::SetStatus(status) => {
                if status == 0 {
                    // Rings keep their base: QEMU 7 resets the status before it asks for the base.
                    self.stop(Which::All, true);
                }
                Then::Status(status)
            }
            Message::GetStatus => Then::Answer(Answer::Number(self.status.into())),
            Message::SetDeviceStateFd(direction) => Then::StateFd(direction, descriptors.take(0)),
            Message::CheckDeviceState => Then::StateCheck,
        };
        Ok(then)
    }

    fn begin_features(&mut self, features: u64) -> Result<Then, Error> {
        let request = Request::SetFeatures;
        let bits = features & !self.offered;
        if bits != 0 {
            return Err(Error::Features { request, bits });
        }
        let changed = features ^ self.features.unwrap_or(0);
        let log = self.log.clone().filter(|_| features & LOG_ALL != 0);
        let table = match (self.memory.dirty_log(), &log) {
            (None, None) => None,
            (Some(old), Some(new)) if Arc::ptr_eq(old, new) => None,
            _ => Some(self.memory.log(request, log.clone())?),
        };
        self.check_used_logs(request, log.as_ref())?;
        if self.features.is_none() {
            // No ring runs yet.
        } else if changed & !(LOG_ALL | PROTOCOL_FEATURES) != 0 {
            // Another driver is at work, which sets up its rings again (user-mode Linux does so
            // without a GET_VRING_BASE).
            self.stop(Which::All, true);
        } else if changed & LOG_ALL != 0 {
            self.stop(Which::All, false);
        }
        Ok(Then::Features { features, table })
    }

    fn begin_memory(&mut self, request: Request, table: MemoryTable) -> Result<Then, Error> {
        self.check_used_logs(request, table.dirty_log())?;
        self.stop(Which::All, false);
        Ok(Then::Memory(table))
    }

    fn begin_log(&mut self, size: u64, offset: u64, file: File) -> Result<Then, Error> {
        let request = Request::SetLogBase;
        let log = DirtyBitmap::map(&file, offset, size, self.limits())
            .map_err(|source| Error::Map { request, source })?;
        let log = Arc::new(log);
        let mut table = None;
        if self.features.unwrap_or(0) & LOG_ALL != 0 {
            table = Some(self.memory.log(request, Some(log.clone()))?);
            self.check_used_logs(request, Some(&log))?;
            self.stop(Which::All, false);
        }
        Ok(Then::Log { log, table })
    }

    /// "The bit offset of the last byte of the ring must fall within the size supplied."
    fn check_used_log(
        &self,
        request: Request,
        size: u16,
        addresses: &RingAddresses,
        log: Option<&Arc<DirtyBitmap>>,
    ) -> Result<(), Error> {
        let Some(log) = log.filter(|_| addresses.logged) else { return Ok(()) };
        let last = addresses.log.checked_add(used_len(size) - 1);
        match last.is_some_and(|address| log.covers(address)) {
            true => Ok(()),
            false => Err(Error::LogTooShort { request, address: last.unwrap_or(u64::MAX) }),
        }
    }

    fn check_used_logs(
        &self,
        request: Request,
        log: Option<&Arc<DirtyBitmap>>,
    ) -> Result<(), Error> {
        for ring in &self.rings {
            if let Some(addresses) = &ring.addresses {
                self.check_used_log(request, ring.size, addresses, log)?;
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits<'_> {
        Limits {
            slots: MEM_SLOTS,
            bytes: self.settings.memory_max,
            demand_seals: self.settings.demand_seals,
            observer: self.settings.observer.as_ref(),
        }
    }

    fn ring(&self, request: Request, index: u32) -> Result<usize, Error> {
        let rings = self.rings.len();
        match index as usize {
            ring if ring < rings => Ok(ring),
            _ => Err(Error::RingIndex { request, index, rings }),
        }
    }

    fn negotiated(&self, feature: ProtocolFeature) -> bool {
        self.protocol & feature.bit() != 0
    }

    /// Lets rings stop. With `forget_kick` they stay stopped until the front end kicks them again.
    fn stop(&mut self, which: Which, forget_kick: bool) {
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if which == Which::All || which == Which::One(index) {
                ring.stopping = ring.running;
                if forget_kick {
                    ring.kick = None;
                }
            }
        }
    }

    fn enable(&mut self, index: usize, enabled: bool) {
        let ring = &mut self.rings[index];
        let changed = std::mem::replace(&mut ring.enabled, enabled) != enabled;
        if changed && ring.running {
            self.backend.enable_ring(index as u16, enabled);
        }
    }

    /// The features that the front end is told now.
    fn visible(&self) -> u64 {
        let has_mtu = self.settings.config || self.negotiated(ProtocolFeature::Mtu);
        if has_mtu { self.offered } else { self.offered & !NET_F_MTU }
    }

    fn config_bytes(&self) -> [u8; CONFIG_MAX] {
        // Fields behind those that the device has are zero. A front end may know more of them.
        let mut bytes = [0; CONFIG_MAX];
        let known = self.backend.config().bytes();
        bytes[..known.len()].copy_from_slice(&known);
        bytes
    }

    /// Stops the rings that are to stop. Returns whether all of them have.
    fn stopped(&mut self) -> bool {
        let mut all = true;
        for (index, ring) in self.rings.iter_mut().enumerate().filter(|(_, ring)| ring.stopping) {
            match self.backend.stop_ring(index as u16) {
                Poll::Ready(base) => {
                    (ring.base, ring.running, ring.stopping) = (base, false, false);
                }
                Poll::Pending => all = false,
            }
        }
        all
    }

    /// Carries a message out, as soon as the rings have stopped, and answers it. Returns what it
    /// waits for, if it does.
    fn carry_out(&mut self, pending: Pending) -> Result<Option<Progress>, Error> {
        if !self.stopped() {
            self.pending = Some(pending);
            return Ok(Some(Progress::Draining));
        }
        let Pending { request, need_reply, then } = pending;
        // A ring that the front end asks for must start, or the front end would wait for it. Others
        // start when the rest of them is there.
        let mut asked_for = None;
        let answer = match then {
            Then::Answer(answer) => answer,
            Then::Base(index) => {
                Answer::State { index: index as u32, num: self.rings[index].base.into() }
            }
            Then::Memory(table) => {
                self.set_memory(table);
                Answer::Done
            }
            Then::Features { features, table } => {
                let old = self.features.replace(features);
                let bits = features & !(LOG_ALL | PROTOCOL_FEATURES);
                if old.is_none_or(|old| old & !(LOG_ALL | PROTOCOL_FEATURES) != bits) {
                    self.backend.set_features(bits);
                }
                if let Some(table) = table {
                    self.set_memory(table);
                }
                if features & PROTOCOL_FEATURES == 0 {
                    // "The back-end must enable all rings immediately."
                    (0..self.rings.len()).for_each(|index| self.enable(index, true));
                }
                Answer::Done
            }
            Then::Log { log, table } => {
                self.log = Some(log);
                if let Some(table) = table {
                    self.set_memory(table);
                }
                Answer::Number(0)
            }
            Then::Size(index, size) => {
                self.rings[index].size = size;
                asked_for = Some(index);
                Answer::Done
            }
            Then::SetBase(index, base) => {
                self.rings[index].base = base;
                Answer::Done
            }
            Then::Addresses(index, addresses) => {
                self.rings[index].addresses = Some(addresses);
                asked_for = Some(index);
                Answer::Done
            }
            Then::Kick(index, kick) => {
                self.rings[index].kick = Some(kick);
                asked_for = Some(index);
                Answer::Done
            }
            Then::Status(status) => {
                self.status = status;
                self.backend.set_status(status);
                Answer::Done
            }
            Then::Reset => {
                for ring in &mut self.rings {
                    let (call, error) = (ring.call.take(), ring.error.take());
                    *ring = Ring { call, error, ..Ring::default() };
                }
                (self.features, self.status) = (None, 0);
                if self.memory.dirty_log().is_some() {
                    let table = self.memory.log(request, None)?;
                    self.set_memory(table);
                }
                self.backend.reset();
                Answer::Done
            }
            Then::StateFd(direction, fd) => self.begin_transfer(direction, fd),
            Then::StateCheck => {
                self.transfer.advance();
                if self.transfer.waits_for().is_some() {
                    self.pending = Some(Pending { request, need_reply, then: Then::StateCheck });
                    return Ok(Some(Progress::Transferring));
                }
                let well = match std::mem::take(&mut self.transfer) {
                    Transfer::Loaded(state) => self.backend.load(&state),
                    Transfer::Ended { well } => well,
                    _ => false,
                };
                self.stats.refused += u64::from(!well);
                Answer::Number(u64::from(!well))
            }
        };
        if let Err(error) = self.start_rings(request, asked_for) {
            return Err(self.refuse(request, need_reply, error));
        }
        self.answer(request, need_reply, answer);
        Ok(None)
    }

    fn set_memory(&mut self, table: MemoryTable) {
        let unsealed = table.unsealed();
        self.stats.unsealed = unsealed as u64;
        self.backend.set_memory(table.guest(), unsealed == 0);
        // Without clones of the device, the old mappings end here.
        self.memory = table;
    }

    fn begin_transfer(&mut self, direction: Option<StateDirection>, fd: OwnedFd) -> Answer {
        // "The vhost-user device is suspended", which means that every ring is stopped.
        let suspended = self.rings.iter().all(|ring| !ring.running);
        let idle = self.transfer.waits_for().is_none();
        let transfer = match direction.filter(|_| suspended && idle) {
            Some(StateDirection::Save) => Transfer::save(fd, &self.backend.save()),
            Some(StateDirection::Load) => Transfer::load(fd),
            None => None,
        };
        match transfer {
            Some(transfer) => {
                self.transfer = transfer;
                self.transfer.advance();
                Answer::Number(NO_DESCRIPTOR)
            }
            None => {
                self.stats.refused += 1;
                Answer::Number(NO_DESCRIPTOR | 1)
            }
        }
    }

    /// Starts every ring that is complete and does not run.
    fn start_rings(&mut self, request: Request, asked_for: Option<usize>) -> Result<(), Error> {
        let Some(features) = self.features.filter(|_| !self.memory.is_empty()) else {
            return Ok(());
        };
        // QEMU, when it starts a device during a migration, kicks the rings before it gives the
        // log. What they wrote until then would be missing at the destination.
        let lacks_log = features & LOG_ALL != 0
            && self.negotiated(ProtocolFeature::LogShmfd)
            && self.memory.dirty_log().is_none();
        if lacks_log {
            return Ok(());
        }
        for index in 0..self.rings.len() {
            let ring = &self.rings[index];
            let (Some(addresses), Some(kick)) = (ring.addresses, ring.kick.clone()) else {
                continue;
            };
            if ring.running || ring.size == 0 {
                continue;
            }
            self.check_used_log(request, ring.size, &addresses, self.memory.dirty_log())?;
            let found = self.find(index, &addresses);
            let [descriptors, available, used] = match found {
                Ok(parts) => parts,
                Err(error) if asked_for == Some(index) => return Err(error),
                // The memory was taken away, perhaps to be added again in another shape.
                Err(_) => continue,
            };
            let used_log = (self.memory.dirty_log().filter(|_| addresses.logged))
                .map(|log| UsedLog { log: log.clone(), guest_address: addresses.log });
            let setup = RingSetup {
                memory: self.memory.guest().clone(),
                features: features & !(LOG_ALL | PROTOCOL_FEATURES),
                size: ring.size,
                base: ring.base,
                descriptors,
                available,
                used,
                used_log,
                kick,
                call: ring.call.clone(),
                enabled: ring.enabled,
            };
            let index16 = index as u16;
            self.backend
                .start_ring(index16, setup)
                .map_err(|source| Error::Backend { index: index16, source })?;
            self.rings[index].running = true;
        }
        Ok(())
    }

    /// The guest's addresses of a ring's parts.
    fn find(&self, index: usize, addresses: &RingAddresses) -> Result<[u64; 3], Error> {
        let size = self.rings[index].size;
        let parts = [
            ("descriptor table", addresses.descriptors, 16 * u64::from(size)),
            ("available ring", addresses.available, 6 + 2 * u64::from(size)),
            ("used ring", addresses.used, used_len(size)),
        ];
        let mut found = [0; 3];
        for (place, (part, address, len)) in found.iter_mut().zip(parts) {
            let slice = self.memory.guest().slice_of_user(address, len as u32);
            let outside = Error::RingAddress { index: index as u16, part, address };
            *place = slice.ok_or(outside)?.guest_address();
        }
        Ok(found)
    }

    fn answer(&mut self, request: Request, need_reply: bool, answer: Answer) {
        let wants_ack = need_reply && self.negotiated(ProtocolFeature::ReplyAck);
        match answer {
            Answer::Done if wants_ack => self.connection.reply(request, &[&0u64.to_ne_bytes()]),
            Answer::Done => {}
            Answer::Refused => {
                self.stats.refused += 1;
                if wants_ack {
                    self.connection.reply(request, &[&1u64.to_ne_bytes()]);
                }
            }
            Answer::Number(number) => self.connection.reply(request, &[&number.to_ne_bytes()]),
            Answer::State { index, num } => {
                self.connection.reply(request, &[&index.to_ne_bytes(), &num.to_ne_bytes()]);
            }
            Answer::Config { offset, len, flags } => {
                let space = self.config_bytes();
                let start = offset as usize;
                match space.get(start..start.saturating_add(len)) {
                    Some(bytes) => {
                        let header = [offset, len as u32, flags].map(u32::to_ne_bytes);
                        self.connection.reply(request, &[header.as_flattened(), bytes]);
                    }
                    // "Uses zero length of payload to indicate an error."
                    None => {
                        self.stats.refused += 1;
                        self.connection.reply(request, &[]);
                    }
                }
            }
        }
    }

    /// Stops every ring and gives the guest's memory back. It is ready when nothing of this
    /// connection touches that memory any more. Until then call it again when the device has got
    /// further. The front end gets no further reply.
    pub fn end(&mut self) -> Poll<()> {
        self.ended = true;
        self.pending = None;
        self.stop(Which::All, true);
        if !self.stopped() {
            return Poll::Pending;
        }
        if !self.memory.is_empty() {
            self.set_memory(MemoryTable::empty());
        }
        (self.log, self.channel, self.transfer) = (None, None, Transfer::None);
        self.rings.iter_mut().for_each(|ring| *ring = Ring::default());
        Poll::Ready(())
    }

    /// The device, for the next connection. Call [`end`](Self::end) before, until it is ready.
    pub fn into_backend(self) -> B {
        self.backend
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The device.
    pub fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// What was counted.
    pub fn stats(&self) -> SessionStats {
        self.stats
    }

    /// The descriptor on which a transfer of the device's state waits: until it is writable for
    /// [`Save`](StateDirection::Save), readable for [`Load`](StateDirection::Load). `None` if there
    /// is no transfer.
    pub fn transfer(&self) -> Option<(BorrowedFd<'_>, StateDirection)> {
        self.transfer.waits_for()
    }

    /// Marks the device as broken, until the guest resets it: the bit DEVICE_NEEDS_RESET is in the
    /// answers to GET_STATUS, and the error event of the ring is signalled.
    pub fn set_needs_reset(&mut self, index: u16) {
        self.status |= NEEDS_RESET;
        if let Some(error) = self.rings.get(usize::from(index)).and_then(|ring| ring.error.as_ref())
        {
            // If this fails, the front end has closed its end.
            let _ = error.signal();
        }
    }

    /// Tells the front end that the configuration space has changed, for example the link's status.
    /// Returns whether it could be told: the front end must have negotiated CONFIG and given a
    /// channel, and must take what is sent on it.
    pub fn notify_config(&mut self) -> bool {
        if !self.negotiated(ProtocolFeature::Config) {
            return false;
        }
        let Some(channel) = &self.channel else { return false };
        let message = backend_request(CONFIG_CHANGE);
        match sys::send(channel.as_fd(), &message) {
            Ok(len) if len == message.len() => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            // After a part of a message nothing else can be said on the channel.
            _ => {
                self.channel = None;
                false
            }
        }
    }
}

impl<B> AsFd for Session<B> {
    /// The socket of the connection.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl<B: fmt::Debug> fmt::Debug for Session<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("backend", &self.backend)
            .field("settings", &self.settings)
            .field("features", &self.features)
            .field("protocol", &self.protocol)
            .field("memory", self.memory.guest())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

fn done_if(good: bool) -> Answer {
    match good {
        true => Answer::Done,
        false => Answer::Refused,
    }
}

/// The bytes of a used ring, with `avail_event`.
fn used_len(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// The event that came with a message, or `None` if the message says that there is none.
fn event(
    request: Request,
    mut descriptors: Descriptors,
    make: impl FnOnce(OwnedFd) -> io::Result<Option<Event>>,
) -> Result<Option<Arc<Event>>, Error> {
    if descriptors.count() == 0 {
        return Ok(None);
    }
    match make(descriptors.take(0)) {
        Ok(Some(event)) => Ok(Some(Arc::new(event))),
        // A descriptor that cannot even be asked what it is (`O_PATH`) is none either.
        Ok(None) | Err(_) => Err(Error::NotAnEvent { request }),
    }
}

/// The protocol feature without which a request is illegal.
fn needs(request: Request) -> Option<ProtocolFeature> {
    Some(match request {
        Request::GetQueueNum => ProtocolFeature::Mq,
        Request::SendRarp => ProtocolFeature::Rarp,
        Request::NetSetMtu => ProtocolFeature::Mtu,
        Request::SetBackendReqFd => ProtocolFeature::BackendReq,
        Request::GetConfig | Request::SetConfig => ProtocolFeature::Config,
        Request::ResetDevice => ProtocolFeature::ResetDevice,
        Request::GetMaxMemSlots | Request::AddMemReg | Request::RemMemReg => {
            ProtocolFeature::ConfigureMemSlots
        }
        Request::SetStatus | Request::GetStatus => ProtocolFeature::Status,
        Request::SetDeviceStateFd | Request::CheckDeviceState => ProtocolFeature::DeviceState,
        _ => return None,
    })
}

/// Whether a request has a reply of its own (section "Communication").
fn has_reply(request: Request) -> bool {
    matches!(
        request,
        Request::GetFeatures
            | Request::GetProtocolFeatures
            | Request::GetVringBase
            | Request::SetLogBase
            | Request::GetQueueNum
            | Request::GetConfig
            | Request::GetMaxMemSlots
            | Request::GetStatus
            | Request::SetDeviceStateFd
            | Request::CheckDeviceState
    )
}
