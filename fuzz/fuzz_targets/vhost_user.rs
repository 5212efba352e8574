//! Messages of a hostile vhost-user front end, with descriptors of all kinds. The session must not
//! panic, must reply only where the protocol wants it, and must leave nothing of a front end behind.
#![no_main]

#[path = "../../virtio/tests/frontend/mod.rs"]
mod frontend;

use arbitrary::Arbitrary;
use frontend::{Frontend, NEED_REPLY, Sent, VERSION};
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use vmring_core::guest::GuestMemory;
use vmring_virtio::vhost_user::features::{LOG_ALL, PROTOCOL_FEATURES};
use vmring_virtio::vhost_user::message::{HEADER_LEN, Header, Message, PAYLOAD_MAX};
use vmring_virtio::vhost_user::{
    Backend, Event, NetConfig, Progress, RingSetup, Session, Settings,
};

const PAGE: u64 = 0x1000;
const SIZE: u64 = 16 * PAGE;
const USER: u64 = 0x7f00_0000_0000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// Any bytes, in any pieces.
    Bytes(Vec<u8>, Vec<Attached>),
    /// A message that is framed as it must be.
    Framed {
        request: u8,
        need_reply: bool,
        payload: Vec<u8>,
        attached: Vec<Attached>,
    },
    /// Messages that are right, so that the session gets far.
    Features(u8),
    ProtocolFeatures(u32),
    Table(Vec<Place>),
    Add(Place),
    Remove(Place),
    Num(u8, u8),
    Base(u8, u16),
    Addresses {
        ring: u8,
        logged: bool,
        pages: [u8; 3],
        log: u8,
    },
    Kick(u8, bool),
    Call(u8, bool),
    Enable(u8, bool),
    Stop(u8),
    Log {
        size: u8,
        offset: u8,
    },
    Config {
        offset: u8,
        len: u8,
    },
    Status(u8),
    Reset,
    State {
        load: bool,
    },
    CheckState,
    /// The device is not ready to stop, so many times.
    Drain(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Attached {
    Memory,
    Short,
    Pipe,
    Folder,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Place {
    guest: u8,
    user: u8,
    pages: u8,
    offset: u8,
}

impl Place {
    fn region(self) -> frontend::Region {
        frontend::Region {
            guest_address: u64::from(self.guest % 32) * PAGE,
            size: u64::from(self.pages % 18) * PAGE,
            user_address: USER + u64::from(self.user % 32) * PAGE,
            mmap_offset: u64::from(self.offset % 20) * (PAGE / 2),
        }
    }
}

/// The descriptors that are attached, opened once.
struct Kinds {
    memory: File,
    short: File,
    pipe: OwnedFd,
    folder: File,
    _other: OwnedFd,
}

fn kinds() -> &'static Kinds {
    static KINDS: OnceLock<Kinds> = OnceLock::new();
    KINDS.get_or_init(|| {
        let (other, pipe) = std::io::pipe().expect("a pipe");
        Kinds {
            memory: frontend::memory(SIZE),
            short: frontend::memory(10),
            pipe: pipe.into(),
            folder: File::open("/").expect("a folder"),
            _other: other.into(),
        }
    })
}

impl Attached {
    fn fd(self) -> BorrowedFd<'static> {
        match self {
            Attached::Memory => kinds().memory.as_fd(),
            Attached::Short => kinds().short.as_fd(),
            Attached::Pipe => kinds().pipe.as_fd(),
            Attached::Folder => kinds().folder.as_fd(),
        }
    }
}

/// A device that checks what the session promises it.
#[derive(Default)]
struct Device {
    running: BTreeSet<u16>,
    drains: u8,
}

impl Backend for Device {
    fn features(&self) -> u64 {
        1 << 32
    }

    fn set_features(&mut self, _features: u64) {
        assert!(self.running.is_empty());
    }

    fn set_memory(&mut self, _memory: &GuestMemory, _sealed: bool) {
        assert!(self.running.is_empty());
    }

    fn start_ring(
        &mut self,
        index: u16,
        ring: RingSetup,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        assert!(self.running.insert(index) && index < 4 && ring.size.is_power_of_two());
        let size = u32::from(ring.size);
        // Each part is whole, and can be read, written and logged.
        for (address, len) in [
            (ring.descriptors, 16 * size),
            (ring.available, 6 + 2 * size),
            (ring.used, 6 + 8 * size),
        ] {
            let part = ring.memory.slice(address, len).expect("it is in the memory");
            let bytes = part.skip(len - 1).expect("its end").read::<1>().expect("one byte");
            part.skip(len - 1).expect("its end").copy_from(&bytes);
            part.mark_dirty(len);
        }
        if let Some(log) = &ring.used_log {
            log.mark(0, (6 + 8 * size).into());
        }
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Poll<u16> {
        assert!(self.running.contains(&index));
        if self.drains > 0 {
            self.drains -= 1;
            return Poll::Pending;
        }
        self.running.remove(&index);
        Poll::Ready(7)
    }

    fn enable_ring(&mut self, index: u16, _enabled: bool) {
        assert!(self.running.contains(&index));
    }

    fn set_call(&mut self, index: u16, _call: Option<Arc<Event>>) {
        assert!(self.running.contains(&index));
    }

    fn config(&self) -> NetConfig {
        NetConfig::default()
    }

    fn set_mtu(&mut self, mtu: u16) -> bool {
        assert!(mtu >= 68);
        mtu <= 9000
    }

    fn announce(&mut self, mac: [u8; 6]) {
        assert!(mac[0] & 1 == 0);
    }

    fn reset(&mut self) {
        assert!(self.running.is_empty());
    }
}

fn sent(step: &Step) -> Option<Sent> {
    let kinds = kinds();
    let ring = |ring: u8| u32::from(ring % 5);
    Some(match step {
        Step::Features(bits) => {
            let bit = |n: u8, bit: u64| if bits & (1 << n) == 0 { bit } else { 0 };
            let features =
                bit(0, PROTOCOL_FEATURES) | bit(1, 1 << 32) | (bit(2, LOG_ALL) ^ LOG_ALL);
            Sent::number(frontend::SET_FEATURES, features)
        }
        Step::ProtocolFeatures(without) => {
            let all = (1 << 20) - 1;
            let offered = all & !0x0006_1dc0;
            Sent::number(frontend::SET_PROTOCOL_FEATURES, offered & !u64::from(*without))
        }
        Step::Table(places) => {
            let places = &places[..places.len().min(8)];
            let regions: Vec<_> = places.iter().map(|place| place.region()).collect();
            regions.iter().fold(Sent::table(&regions), |sent, _| sent.with(&kinds.memory))
        }
        Step::Add(place) => Sent::region(frontend::ADD_MEM_REG, place.region()).with(&kinds.memory),
        Step::Remove(place) => Sent::region(frontend::REM_MEM_REG, place.region()),
        Step::Num(index, size) => {
            Sent::state(frontend::SET_VRING_NUM, ring(*index), 1 << (size % 10))
        }
        Step::Base(index, base) => {
            Sent::state(frontend::SET_VRING_BASE, ring(*index), (*base).into())
        }
        Step::Addresses { ring: index, logged, pages, log } => {
            let [descriptors, used, available] =
                pages.map(|page| USER + u64::from(page % 36) * PAGE);
            let log = u64::from(*log) * 0x333;
            let addresses = [descriptors, used, available, log];
            Sent::addresses(ring(*index), (*logged).into(), addresses)
        }
        Step::Kick(index, polled) | Step::Call(index, polled) => {
            let request = match step {
                Step::Kick(..) => frontend::SET_VRING_KICK,
                _ => frontend::SET_VRING_CALL,
            };
            let index = u64::from(ring(*index));
            match polled {
                true => Sent::number(request, frontend::NO_DESCRIPTOR | index),
                false => Sent::number(request, index).with(&kinds.pipe),
            }
        }
        Step::Enable(index, on) => {
            Sent::state(frontend::SET_VRING_ENABLE, ring(*index), (*on).into())
        }
        Step::Stop(index) => Sent::state(frontend::GET_VRING_BASE, ring(*index), 0),
        Step::Log { size, offset } => {
            let numbers = frontend::u64s(&[(*size).into(), (*offset).into()]);
            Sent::new(frontend::SET_LOG_BASE, numbers).with(&kinds.memory)
        }
        Step::Config { offset, len } => {
            let bytes = vec![0; usize::from(*len)];
            Sent::config(frontend::GET_CONFIG, (*offset).into(), 0, &bytes)
        }
        Step::Status(status) => Sent::number(frontend::SET_STATUS, (*status).into()),
        Step::Reset => Sent::new(frontend::RESET_DEVICE, []),
        Step::State { load } => {
            // The end of this pipe's other side is there at once.
            let (reader, writer) = std::io::pipe().expect("a pipe");
            let state = Sent::state(frontend::SET_DEVICE_STATE_FD, (*load).into(), 0);
            if *load { state.with(&reader) } else { state.with(&writer) }
        }
        Step::CheckState => Sent::new(frontend::CHECK_DEVICE_STATE, []),
        Step::Bytes(..) | Step::Framed { .. } | Step::Drain(_) => return None,
    })
}

fuzz_target!(|steps: Vec<Step>| {
    let (frontend, socket) = Frontend::pair();
    let mut settings = Settings::new(2);
    settings.config = true;
    let mut session = Session::new(socket, Device::default(), settings);
    'steps: for step in &steps[..steps.len().min(200)] {
        let (bytes, fds): (Vec<u8>, Vec<BorrowedFd<'_>>);
        let message;
        match step {
            Step::Drain(times) => {
                session.backend_mut().drains = times % 8;
                continue;
            }
            Step::Bytes(raw, attached) => {
                // The parser alone, too.
                if let Some((header, payload)) = raw.split_first_chunk::<HEADER_LEN>()
                    && let Ok(header) = Header::parse(header)
                {
                    assert!(header.size as usize <= PAYLOAD_MAX);
                    let _ = Message::parse(header, payload, attached.len());
                }
                bytes = raw[..raw.len().min(1000)].to_vec();
                fds = attached.iter().take(20).map(|attached| attached.fd()).collect();
            }
            Step::Framed { request, need_reply, payload, attached } => {
                let mut sent = Sent::new((*request % 46).into(), payload.clone());
                sent.payload.truncate(400);
                sent.flags = if *need_reply { VERSION | NEED_REPLY } else { VERSION };
                bytes = sent.bytes();
                fds = attached.iter().take(20).map(|attached| attached.fd()).collect();
            }
            step => {
                message = sent(step).expect("the others are above");
                bytes = message.bytes();
                fds = message.fds.iter().map(AsFd::as_fd).collect();
            }
        }
        if bytes.is_empty() {
            continue;
        }
        frontend.send_bytes(&bytes, &fds).expect("the session reads all that is sent");
        for tries in 0.. {
            match session.process() {
                Ok(Progress::Idle) => break,
                Ok(Progress::More) => {}
                Ok(Progress::Draining) => assert!(tries < 100),
                // A framed message may begin a transfer that nobody ends.
                Ok(Progress::Transferring) => break 'steps,
                Ok(progress) => panic!("{progress:?}"),
                Err(error) => {
                    assert!(error.to_string().len() > 20);
                    break 'steps;
                }
            }
        }
        while frontend.replied() > 0 {
            assert_eq!(frontend.reply().flags, VERSION | 4);
        }
    }
    session.backend_mut().drains = 0;
    assert_eq!(session.end(), Poll::Ready(()));
    drop((session.into_backend(), frontend));
    // What is left adds up, so it is enough to look sometimes.
    static RUNS: AtomicU32 = AtomicU32::new(0);
    if !RUNS.fetch_add(1, Ordering::Relaxed).is_multiple_of(64) {
        return;
    }
    let left = frontend::copies(&kinds().memory);
    assert!(matches!(left, None | Some(1)), "the memory is still open: {left:?}");
});
