//! The back ends beside testpmd and `vmring serve`: the same library with one thread for both guests,
//! and one that does nothing.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmring::{Embedded, GuestMemory, Interface};
use vmring_virtio::Event;
use vmring_virtio::net::{NetSettings, StatsHandle, VhostUserNet};
use vmring_virtio::vhost_user::{
    Backend, Listener, NetConfig, Progress, RingSetup, Session, Settings,
};

use crate::common::pin;
use crate::result::Result;
use crate::served::Folder;

/// Longer than a start takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a guest that has more is polled, before the other has its turn.
const POLLS_MAX: u32 = 64;

/// Waits for the connections of two front ends, and then runs `turn` with both sessions until it is to
/// stop.
fn serve<B: Backend>(
    listeners: &[Listener; 2],
    stop: &AtomicBool,
    device: impl Fn() -> Result<(B, Settings)>,
    mut turn: impl FnMut(&mut B),
) -> Result<()> {
    let mut sessions: Vec<Session<B>> = Vec::new();
    let mut turns = 0u32;
    while !stop.load(Ordering::Relaxed) {
        if let Some(listener) = listeners.get(sessions.len())
            && let Some(socket) = listener.accept()?
        {
            let (device, settings) = device()?;
            sessions.push(Session::new(socket, device, settings));
        }
        turns = turns.wrapping_add(1);
        for session in &mut sessions {
            turn(session.backend_mut());
            // A look at the socket is a system call.
            if turns.is_multiple_of(64) && session.process()? == Progress::Closed {
                return Ok(());
            }
        }
    }
    for session in &mut sessions {
        let begin = Instant::now();
        while session.end() == Poll::Pending && begin.elapsed() < PATIENCE {
            turn(session.backend_mut());
        }
    }
    Ok(())
}

/// A thread on the second processor.
struct Thread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Thread {
    fn start(body: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = thread::spawn(move || {
            pin(1);
            body(&seen)
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("a back end has ended: {error}");
        }
    }
}

fn listen(folder: &Folder) -> Result<[Listener; 2]> {
    let [a, b] = folder.sockets();
    Ok([Listener::bind(&a)?, Listener::bind(&b)?])
}

/// What a library's thread has counted.
#[derive(Default)]
struct Busy {
    /// Nanoseconds in turns that moved something.
    time: AtomicU64,
    guests: Mutex<Vec<StatsHandle>>,
}

impl Busy {
    /// The nanoseconds, and the frames of all guests, until now.
    fn now(&self) -> [u64; 2] {
        let guests = self.guests.lock().unwrap_or_else(PoisonError::into_inner);
        let frames = guests.iter().map(|guest| guest.stats().tx_packets).sum();
        [self.time.load(Ordering::Relaxed), frames]
    }
}

/// The library with one thread for both guests, which never sleeps.
pub(super) struct Library {
    busy: Arc<Busy>,
    /// What was counted when the clock was restarted.
    before: [u64; 2],
    _thread: Thread,
}

impl Library {
    pub(super) fn start(folder: &Folder) -> Result<Self> {
        let listeners = listen(folder)?;
        let busy = Arc::new(Busy::default());
        let counted = busy.clone();
        let thread = Thread::start(move |stop| {
            let device = || {
                let interface =
                    Interface::builder().device(Embedded::network("performance")).start()?;
                let device = VhostUserNet::new(interface, NetSettings::default())?;
                let mut guests = counted.guests.lock().unwrap_or_else(PoisonError::into_inner);
                guests.push(device.device().stats_handle());
                let settings = device.session_settings();
                Ok((device, settings))
            };
            // One look at the clock for each turn: the end of one is the beginning of the next.
            let mut begin = Instant::now();
            serve(&listeners, stop, device, |guest: &mut VhostUserNet| {
                let mut moved = false;
                for _ in 0..POLLS_MAX {
                    let progress = guest.device_mut().poll();
                    moved |= progress.moved;
                    if !progress.again {
                        break;
                    }
                }
                let end = Instant::now();
                if moved {
                    let passed = end.duration_since(begin).as_nanos() as u64;
                    counted.time.fetch_add(passed, Ordering::Relaxed);
                }
                begin = end;
            })
        });
        Ok(Self { busy, before: [0; 2], _thread: thread })
    }

    pub(super) fn restart_clock(&mut self) {
        self.before = self.busy.now();
    }

    /// The nanoseconds for each frame, without those of empty polls.
    pub(super) fn busy_ns(&self) -> Result<f64> {
        let now = self.busy.now();
        let [time, frames] = [0, 1].map(|i| (now[i] - self.before[i]) as f64);
        if frames == 0.0 {
            return Err("no frame was counted".into());
        }
        Ok(time / frames)
    }
}

/// A back end that gives every buffer back at once, and looks at none: those with frames, and those for
/// frames, as if one of the asked length had come. So the front end does all that it can.
pub(super) struct Nothing {
    _thread: Thread,
}

impl Nothing {
    pub(super) fn start(folder: &Folder, len: u32) -> Result<Self> {
        let listeners = listen(folder)?;
        let thread = Thread::start(move |stop| {
            let device = || Ok((Idler { rings: Vec::new(), len }, Settings::new(1)));
            serve(&listeners, stop, device, Idler::give_back)
        });
        Ok(Self { _thread: thread })
    }
}

/// The device of [`Nothing`].
struct Idler {
    rings: Vec<(u16, Returned)>,
    /// The bytes of each frame.
    len: u32,
}

/// The available ring and the used ring of a queue, in the memory of a front end.
struct Returned {
    _memory: GuestMemory,
    available: *mut u16,
    used: *mut u16,
    size: u16,
    next: u16,
    /// The used length of each buffer.
    len: u32,
}

// SAFETY: the pointers are into the memory of the front end, which `_memory` keeps mapped, and which any
// thread may access.
unsafe impl Send for Returned {}

/// Features: VERSION_1, MRG_RXBUF and IN_ORDER (virtio 1.2, sections 5.1.3 and 6).
const FEATURES: u64 = 1 << 32 | 1 << 15 | 1 << 35;
/// The used ring's flag: no notifications are wanted (section 2.7.8).
const NO_NOTIFY: u16 = 1;
const VIRTIO_HEADER: u32 = 12;

impl Returned {
    fn new(ring: &RingSetup, len: u32) -> Option<Self> {
        let size = u32::from(ring.size);
        let available = ring.memory.slice(ring.available, 4 + size * 2)?.as_ptr().cast();
        let used = ring.memory.slice(ring.used, 4 + size * 8)?.as_ptr().cast::<u16>();
        // SAFETY: the used ring's flags are its first field.
        unsafe { used.write_volatile(NO_NOTIFY) };
        let memory = ring.memory.clone();
        Some(Self { _memory: memory, available, used, size: ring.size, next: ring.base, len })
    }

    fn give_back(&mut self) {
        // SAFETY: the second field of the available ring is its index, which is aligned (section 2.7).
        let index = unsafe { AtomicU16::from_ptr(self.available.add(1)) };
        let available = index.load(Ordering::Acquire);
        if available == self.next {
            return;
        }
        while self.next != available {
            let place = usize::from(self.next & (self.size - 1));
            // SAFETY: the entries are behind two fields, and there are `size` of them.
            let head = unsafe { self.available.add(2 + place).read_volatile() };
            let element = u64::from(self.len) << 32 | u64::from(head);
            // SAFETY: the elements are behind two fields, there are `size` of them, and each has 8 bytes.
            unsafe { self.used.add(2 + place * 4).cast::<u64>().write_unaligned(element) };
            self.next = self.next.wrapping_add(1);
        }
        // SAFETY: the second field of the used ring is its index, which is aligned.
        unsafe { AtomicU16::from_ptr(self.used.add(1)) }.store(self.next, Ordering::Release);
    }
}

impl Idler {
    fn give_back(&mut self) {
        self.rings.iter_mut().for_each(|(_, ring)| ring.give_back());
    }
}

impl Backend for Idler {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn set_features(&mut self, _: u64) {}

    fn set_memory(&mut self, _: &GuestMemory, _: bool) {}

    fn start_ring(
        &mut self,
        index: u16,
        ring: RingSetup,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let len = if index == 0 { VIRTIO_HEADER + self.len } else { 0 };
        let ring = Returned::new(&ring, len).ok_or("a ring is not in the memory")?;
        self.rings.push((index, ring));
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Poll<u16> {
        let place = self.rings.iter().position(|(number, _)| *number == index);
        Poll::Ready(place.map_or(0, |place| self.rings.remove(place).1.next))
    }

    fn enable_ring(&mut self, _: u16, _: bool) {}

    fn set_call(&mut self, _: u16, _: Option<Arc<Event>>) {}

    fn config(&self) -> NetConfig {
        NetConfig { mac: [2; 6], status: 1, max_virtqueue_pairs: 1, mtu: 1500 }
    }

    fn set_mtu(&mut self, _: u16) -> bool {
        false
    }

    fn announce(&mut self, _: [u8; 6]) {}

    fn reset(&mut self) {
        self.rings.clear();
    }
}
