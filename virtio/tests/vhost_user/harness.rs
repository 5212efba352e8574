//! A session with a device that records what it is asked, and a front end.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, pipe};
use std::sync::Arc;
use std::task::Poll;

use vmring_core::guest::GuestMemory;
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES, ProtocolFeature};
use vmring_virtio::vhost_user::{
    Backend, Error, Event, NetConfig, Progress, RingSetup, Session, Settings,
};

use crate::frontend::*;

/// What the device offers: VERSION_1, MRG_RXBUF, and the control queue, which the session hides.
pub(crate) const DEVICE_FEATURES: u64 = (1 << 32) | (1 << 15) | (1 << 17);
/// What a front end acknowledges of it.
pub(crate) const FEATURES: u64 = (1 << 32) | (1 << 15) | PROTOCOL_FEATURES;
pub(crate) const LOGGED: u64 = FEATURES | LOG_ALL;
pub(crate) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x0a];

/// A call of the session to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Features(u64),
    Memory { regions: usize, sealed: bool },
    Start { index: u16, base: u16, enabled: bool },
    Stop(u16),
    Enable(u16, bool),
    Interrupt(u16, bool),
    Mtu(u16),
    Announce([u8; 6]),
    Status(u8),
    Reset,
    Load(Vec<u8>),
}

#[derive(Default)]
pub(crate) struct Device {
    pub(crate) calls: Vec<Call>,
    pub(crate) memory: Option<GuestMemory>,
    pub(crate) rings: BTreeMap<u16, RingSetup>,
    /// How many packets a ring has taken: its base moves that far.
    pub(crate) taken: u16,
    /// How often a stop is not ready.
    pub(crate) drains: u32,
    pub(crate) refuses_start: bool,
    pub(crate) more_features: u64,
    pub(crate) state: Vec<u8>,
}

impl Backend for Device {
    fn features(&self) -> u64 {
        DEVICE_FEATURES | self.more_features
    }

    fn set_features(&mut self, features: u64) {
        assert!(self.rings.is_empty(), "features change while no ring runs");
        self.calls.push(Call::Features(features));
    }

    fn set_memory(&mut self, memory: &GuestMemory, sealed: bool) {
        assert!(self.rings.is_empty(), "memory changes while no ring runs");
        self.calls.push(Call::Memory { regions: memory.regions().len(), sealed });
        self.memory = Some(memory.clone());
    }

    fn start_ring(
        &mut self,
        index: u16,
        ring: RingSetup,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.refuses_start {
            return Err("there is no room".into());
        }
        self.calls.push(Call::Start { index, base: ring.base, enabled: ring.enabled });
        // The parts of a ring are in the memory that it is started with.
        let parts = [(ring.descriptors, 16), (ring.available, 8), (ring.used, 14)];
        assert!(parts.iter().all(|(address, len)| ring.memory.slice(*address, *len).is_some()));
        assert!(self.rings.insert(index, ring).is_none(), "ring {index} runs already");
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Poll<u16> {
        assert!(self.rings.contains_key(&index), "ring {index} runs");
        if self.drains > 0 {
            self.drains -= 1;
            return Poll::Pending;
        }
        self.calls.push(Call::Stop(index));
        let ring = self.rings.remove(&index).expect("it runs");
        Poll::Ready(ring.base.wrapping_add(self.taken))
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) {
        self.calls.push(Call::Enable(index, enabled));
        self.rings.get_mut(&index).expect("it runs").enabled = enabled;
    }

    fn set_call(&mut self, index: u16, call: Option<Arc<Event>>) {
        self.calls.push(Call::Interrupt(index, call.is_some()));
        self.rings.get_mut(&index).expect("it runs").call = call;
    }

    fn config(&self) -> NetConfig {
        NetConfig { mac: MAC, status: 1, max_virtqueue_pairs: 2, mtu: 1500 }
    }

    fn set_mtu(&mut self, mtu: u16) -> bool {
        self.calls.push(Call::Mtu(mtu));
        mtu <= 9000
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.calls.push(Call::Announce(mac));
    }

    fn set_status(&mut self, status: u8) {
        self.calls.push(Call::Status(status));
    }

    fn reset(&mut self) {
        assert!(self.rings.is_empty(), "a reset finds no ring running");
        self.calls.push(Call::Reset);
    }

    fn save(&mut self) -> Vec<u8> {
        self.state.clone()
    }

    fn load(&mut self, state: &[u8]) -> bool {
        self.calls.push(Call::Load(state.to_vec()));
        state != b"wrong"
    }
}

/// A guest's memory of 1 MiB at 0x10000, which the front end has at 0x7f0000000000.
pub(crate) const GUEST: u64 = 0x1_0000;
pub(crate) const USER: u64 = 0x7f00_0000_0000;
pub(crate) const SIZE: u64 = 1 << 20;

pub(crate) fn region() -> Region {
    Region { guest_address: GUEST, size: SIZE, user_address: USER, mmap_offset: 0 }
}

/// The front end's addresses of a ring's parts: descriptor table, used ring, available ring.
pub(crate) fn ring_at(index: u32) -> [u64; 4] {
    let at = USER + u64::from(index) * 0x1_0000;
    [at, at + 0x2000, at + 0x1000, GUEST + u64::from(index) * 0x1_0000 + 0x2000]
}

/// The other ends of a ring's events.
pub(crate) struct Events {
    pub(crate) kick: PipeWriter,
    pub(crate) call: PipeReader,
    pub(crate) error: PipeReader,
    ends: (PipeReader, PipeWriter, PipeWriter),
}

impl Events {
    pub(crate) fn new() -> Self {
        let [(kick_end, kick), (call, call_end), (error, error_end)] =
            std::array::from_fn(|_| pipe().expect("a pipe"));
        Self { kick, call, error, ends: (kick_end, call_end, error_end) }
    }

    pub(crate) fn set_kick(&self, index: u64) -> Sent {
        Sent::number(SET_VRING_KICK, index).with(&self.ends.0)
    }

    pub(crate) fn set_call(&self, index: u64) -> Sent {
        Sent::number(SET_VRING_CALL, index).with(&self.ends.1)
    }

    pub(crate) fn set_err(&self, index: u64) -> Sent {
        Sent::number(SET_VRING_ERR, index).with(&self.ends.2)
    }

    /// The descriptors that messages have copies of.
    pub(crate) fn copies(&self) -> Option<usize> {
        let ends = [copies(&self.ends.0)?, copies(&self.ends.1)?, copies(&self.ends.2)?];
        // A pipe is one file with two ends.
        Some(ends.iter().sum::<usize>() - 6)
    }
}

/// How many bytes a pipe has.
pub(crate) fn signalled(pipe: &PipeReader) -> usize {
    use std::os::fd::AsRawFd;
    let mut len: libc::c_int = 0;
    // SAFETY: the pointer is to a number that lives until the call returns.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut len) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    len as usize
}

pub(crate) struct Harness {
    pub(crate) frontend: Frontend,
    pub(crate) session: Session<Device>,
    pub(crate) memory: File,
    pub(crate) events: Vec<Events>,
}

pub(crate) fn settings() -> Settings {
    let mut settings = Settings::new(2);
    settings.config = true;
    settings
}

impl Harness {
    pub(crate) fn new() -> Self {
        Self::with(settings(), Device::default())
    }

    pub(crate) fn with(settings: Settings, device: Device) -> Self {
        let (frontend, socket) = Frontend::pair();
        let session = Session::new(socket, device, settings);
        let events = (0..4).map(|_| Events::new()).collect();
        Self { frontend, session, memory: memory(SIZE), events }
    }

    /// Everything is negotiated, the memory is there, and no ring is set up.
    pub(crate) fn negotiated() -> Self {
        let mut harness = Self::new();
        harness.negotiate(FEATURES);
        harness
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        let memory = self.memory.try_clone().expect("a copy of a descriptor");
        self.negotiate_on(features, &memory);
    }

    /// Like [`negotiate`](Self::negotiate), with another file as the memory.
    pub(crate) fn negotiate_on(&mut self, features: u64, memory: &File) {
        let offered = self.number(Sent::new(GET_PROTOCOL_FEATURES, []));
        self.tell(Sent::number(SET_PROTOCOL_FEATURES, offered));
        self.tell(Sent::number(SET_FEATURES, features));
        self.tell(Sent::table(&[region()]).with(memory));
    }

    /// Rings 0 and 1 run, and are enabled.
    pub(crate) fn running() -> Self {
        let mut harness = Self::negotiated();
        for index in 0..2 {
            harness.set_up(index, 0);
            harness.tell(Sent::state(SET_VRING_ENABLE, index, 1));
        }
        harness.calls();
        harness
    }

    /// Sets a ring up, the kick last.
    pub(crate) fn set_up(&mut self, index: u32, base: u32) {
        self.tell(Sent::state(SET_VRING_NUM, index, 256));
        self.tell(Sent::state(SET_VRING_BASE, index, base));
        self.tell(Sent::addresses(index, 0, ring_at(index)));
        self.tell(self.events[index as usize].set_call(index.into()));
        self.tell(self.events[index as usize].set_kick(index.into()));
    }

    /// Sends a message, and lets the session handle it. There is no reply.
    pub(crate) fn tell(&mut self, message: Sent) {
        self.frontend.send(&message);
        assert_eq!(self.process(), Progress::Idle, "{message:?}");
        assert_eq!(self.frontend.replied(), 0, "{message:?} has no reply");
    }

    /// Sends a message, and returns the reply.
    pub(crate) fn ask(&mut self, message: Sent) -> Reply {
        self.frontend.send(&message);
        assert_eq!(self.process(), Progress::Idle, "{message:?}");
        assert!(self.frontend.replied() > 0, "{message:?} has a reply");
        let reply = self.frontend.reply();
        assert_eq!((reply.request, reply.flags), (message.request, VERSION | 4));
        assert_eq!(self.frontend.replied(), 0, "{message:?} has one reply");
        reply
    }

    pub(crate) fn number(&mut self, message: Sent) -> u64 {
        self.ask(message).number()
    }

    /// Sends a message that ends the connection, and returns why.
    pub(crate) fn refused(&mut self, message: Sent) -> Error {
        self.frontend.send(&message);
        let error = self.session.process().expect_err("the session refuses this");
        assert!(matches!(self.session.process(), Ok(Progress::Closed)));
        error
    }

    pub(crate) fn process(&mut self) -> Progress {
        self.session.process().unwrap_or_else(|error| panic!("{error}: {error:?}"))
    }

    /// The calls since the last time.
    pub(crate) fn calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.session.backend_mut().calls)
    }

    /// Ends the session, and sees that nothing of the front end is left in it.
    pub(crate) fn end(mut self) {
        assert_eq!(self.session.end(), Poll::Ready(()));
        let device = self.session.into_backend();
        assert!(device.rings.is_empty());
        drop(device);
        assert!(matches!(copies(&self.memory), None | Some(1)), "the memory is closed");
        let events: Option<usize> = self.events.iter().map(Events::copies).sum();
        assert!(matches!(events, None | Some(0)), "the events are closed: {events:?}");
    }
}

/// The bits of all protocol features but these.
pub(crate) fn all_but(without: &[ProtocolFeature]) -> u64 {
    let bits = |list: &[ProtocolFeature]| list.iter().fold(0, |bits, one| bits | one.bit());
    bits(&ProtocolFeature::ALL) & !bits(without)
}
