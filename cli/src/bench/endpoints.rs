//! The endpoints that packets move between: two interfaces on one network with a ring each, or one
//! interface whose ring gets back what it writes.

use std::collections::BTreeMap;
use std::iter;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use vmring::{
    Direction, Drive, Driver, Error, Frame, IdlePolicy, Interface, Mode, OffloadHeader, Poller,
    Ring, RingOp,
};

use super::check::Account;
use super::limits::{CLOSE_TIMEOUT, CONTACT_PAUSE, CONTACT_TIMEOUT, SPINS};
use super::setup::{Setup, header_of_tcp, offloads};
use super::summary::RingsSummary;
use crate::device::{DeviceName, embedded};
use crate::dhcp::DhcpArgs;
use crate::failure::Failure;
use crate::nat::NatArgs;

/// Which thread drives the rings, and how it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driving {
    /// The thread that submits and reaps.
    Inline,
    /// A poller thread. Both threads wait with the default policy.
    Poller,
    /// A poller thread. Neither thread sleeps.
    Spinning,
    /// A poller thread. Both threads sleep as soon as there is nothing to do.
    Parked,
}

impl Driving {
    fn idle(self) -> IdlePolicy {
        match self {
            Driving::Inline | Driving::Poller => IdlePolicy::default(),
            // Spins for longer than a round trip takes. After that, the other thread may need this
            // very processor.
            Driving::Spinning => IdlePolicy { spins: SPINS, yields: u32::MAX },
            Driving::Parked => IdlePolicy::PARK,
        }
    }
}

/// Announces the addresses, so that switches on the way learn them. The ethertype is another one
/// for local experiments, not that of the packets that are counted.
const HELLO: [u8; 2] = [0x88, 0xb6];

/// Starts an interface on `network`. A TAP is put on the bridge of this network namespace.
pub(crate) fn start_interface(
    device: DeviceName,
    network: &str,
    offload: bool,
    nat: &NatArgs,
) -> Result<Interface, Error> {
    // The network has a way out if it is asked for, and TAPs have only a bridge between them.
    let mode = if nat.is_given() { Mode::Shared } else { Mode::Host };
    #[cfg(target_os = "linux")]
    let mode = if device.is_tap() { Mode::Bridged(crate::tap::BRIDGE.to_owned()) } else { mode };
    let builder = Interface::builder().mode(mode).offloads(offloads(offload));
    let driver: Box<dyn Driver> = match device {
        DeviceName::Embedded => Box::new(nat.embedded(embedded(network, &DhcpArgs::default()))),
        device => device.driver(network, &DhcpArgs::default())?,
    };
    builder.device(driver).start()
}

/// A ring, and its frames that are not in it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) ring: Ring,
    /// Frames in which packets can be written.
    pub(crate) free: Vec<Frame>,
    /// Packets that have been read, oldest first.
    pub(crate) read: Vec<Frame>,
    /// Frames that will be posted for reading.
    pub(crate) spare: Vec<Frame>,
    /// Writes that have not completed.
    pub(crate) writing: usize,
}

/// See the [module](self). Packets go from the first endpoint to the last.
#[derive(Debug)]
pub(crate) struct Endpoints {
    // The fields are dropped in this order.
    endpoints: Vec<Endpoint>,
    interfaces: Vec<Interface>,
    /// The header of each packet that is counted, with offload.
    header: Option<OffloadHeader>,
    _poller: Option<Poller>,
    /// Packets that the kernel had dropped before.
    dropped_before: u64,
}

impl Endpoints {
    /// Starts endpoints on a network of their own, with space for `window` packets of the setup's size
    /// in flight from each.
    pub(crate) fn start(setup: &Setup, driving: Driving, window: usize) -> Result<Self, Failure> {
        let device = setup.device;
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let dropped_before = dropped(device);
        let network = format!("bench {}", RUNS.fetch_add(1, Ordering::Relaxed));
        let count = if device == DeviceName::Loopback { 1 } else { 2 };
        let interfaces =
            iter::repeat_with(|| start_interface(device, &network, setup.offload, &setup.nat))
                .take(count);
        let interfaces = interfaces.collect::<Result<_, _>>().map_err(Failure::starting)?;
        Ok(Self { dropped_before, ..Self::over(interfaces, driving, window, setup)? })
    }

    /// Like [`start`](Self::start), over one interface, or over two on the same network.
    pub(crate) fn over(
        interfaces: Vec<Interface>,
        driving: Driving,
        window: usize,
        setup: &Setup,
    ) -> Result<Self, Failure> {
        let mut endpoints =
            Self::open(interfaces, driving, window, setup).map_err(Failure::starting)?;
        endpoints.make_contact()?;
        Ok(endpoints)
    }

    fn open(
        interfaces: Vec<Interface>,
        driving: Driving,
        window: usize,
        setup: &Setup,
    ) -> Result<Self, Error> {
        let poller = match driving {
            Driving::Inline => None,
            _ => {
                let poller = Poller::builder().name("poller").idle(driving.idle());
                let poller = match setup.cpu {
                    Some(cpu) => poller.cpu(cpu),
                    None => poller,
                };
                Some(poller.start()?)
            }
        };
        let mtu = interfaces[0].mtu() as usize;
        let header = setup.offload.then(|| header_of_tcp(setup.size, mtu));
        // A write's credit may come back after the packet has arrived.
        let depth = (2 * window).next_power_of_two();
        let open = |interface: &Interface| {
            let ring = interface
                .ring(Direction::Both)
                .depth(depth as u32)
                .drive(poller.as_ref().map_or(Drive::Inline, Drive::Shared))
                .idle(driving.idle())
                .close_timeout(CLOSE_TIMEOUT)
                .prefault(true)
                .build()?;
            let frames = |n| iter::from_fn(|| ring.alloc()).take(n).collect::<Vec<_>>();
            let (spare, mut free) = (frames(depth), frames(depth));
            for frame in &mut free {
                // The full length is set once, so that the body of a packet outside the sample is
                // this frame's own.
                frame.reset();
                make_ready(frame, setup.size, header.as_ref());
            }
            let read = Vec::with_capacity(depth);
            Ok::<_, Error>(Endpoint { ring, free, read, spare, writing: 0 })
        };
        let endpoints = interfaces.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { endpoints, interfaces, header, _poller: poller, dropped_before: 0 })
    }

    pub(crate) fn first(&mut self) -> &mut Endpoint {
        &mut self.endpoints[0]
    }

    pub(crate) fn last(&mut self) -> &mut Endpoint {
        self.endpoints.last_mut().expect("there is one")
    }

    /// Whether what is written comes back to the same ring.
    pub(crate) fn is_loop(&self) -> bool {
        self.endpoints.len() == 1
    }

    /// The addresses of the first endpoint and the last.
    pub(crate) fn addresses(&self) -> [[u8; 6]; 2] {
        let last = self.interfaces.len() - 1;
        [0, last].map(|i| self.interfaces[i].mac().into_array())
    }

    /// The endpoint that sends and the one that receives, for two threads.
    ///
    /// # Panics
    ///
    /// If there is only one.
    pub(crate) fn two(&mut self) -> [&mut Endpoint; 2] {
        let [first, last] = &mut self.endpoints[..] else { panic!("there is only one endpoint") };
        [first, last]
    }

    /// Handles what has completed. Returns the number of completions.
    #[inline]
    pub(crate) fn collect(&mut self, account: &mut Account) -> usize {
        self.endpoints.iter_mut().map(|end| end.collect(account)).sum()
    }

    /// Posts the free frames for reading, on all rings.
    #[inline]
    pub(crate) fn post(&mut self) -> Result<(), Failure> {
        self.endpoints.iter_mut().try_for_each(Endpoint::post)
    }

    /// Sends packets until the first endpoint has heard from the last.
    fn make_contact(&mut self) -> Result<(), Failure> {
        let [to, from] = self.addresses();
        let hello = [&to[..], &from, &HELLO, &[0; 46]].concat();
        let start = Instant::now();
        while start.elapsed() < CONTACT_TIMEOUT {
            self.post()?;
            let last = self.last();
            if let Some(mut frame) = last.free.pop() {
                let len = frame.len();
                frame.copy_from(&hello).expect("a frame has room for the smallest packet");
                last.write(iter::once(frame))?;
                last.ring.wait(1, Some(CONTACT_PAUSE));
                // The frame gets its former length again when the write completes.
                if self.listen_for(&hello) {
                    self.finish_hellos(len);
                    return Ok(());
                }
            }
        }
        Err(Failure::Step(format!(
            "what one end writes does not arrive at the other within {} seconds",
            CONTACT_TIMEOUT.as_secs()
        )))
    }

    /// Waits a while for the hello. Returns whether the first endpoint has received it.
    fn listen_for(&mut self, hello: &[u8]) -> bool {
        let start = Instant::now();
        let mut heard = false;
        while !heard && start.elapsed() < CONTACT_PAUSE {
            self.collect(&mut Account::default());
            let first = self.first();
            heard = first.read.iter().any(|frame| **frame == *hello);
            first.spare.append(&mut first.read);
            thread::yield_now();
        }
        heard
    }

    /// Waits for the writes of the hellos, and makes their frames `len` bytes long again.
    fn finish_hellos(&mut self, len: usize) {
        let start = Instant::now();
        while self.last().writing > 0 && start.elapsed() < CONTACT_TIMEOUT {
            self.collect(&mut Account::default());
            thread::yield_now();
        }
        let header = self.header;
        for frame in &mut self.last().free {
            make_ready(frame, len, header.as_ref());
        }
    }

    /// Closes the rings and returns their counters. Adds what the devices dropped to `drops`.
    pub(crate) fn end(
        mut self,
        device: DeviceName,
        drops: &mut BTreeMap<&'static str, u64>,
    ) -> Result<RingsSummary, Failure> {
        let rings = RingsSummary::of(self.endpoints.iter().map(|end| &end.ring));
        let kernel = dropped(device).saturating_sub(self.dropped_before);
        let counted = self.interfaces.iter().flat_map(Interface::drops);
        for (reason, n) in counted.chain([("for a full TAP", kernel)]).filter(|(_, n)| *n > 0) {
            *drops.entry(reason).or_default() += n;
        }
        for end in &mut self.endpoints {
            end.ring.close().map_err(step)?;
        }
        Ok(rings)
    }

    /// How frames are moved, where there is a choice.
    #[cfg(target_os = "linux")]
    pub(crate) fn engine(&self) -> &'static str {
        crate::tap::engine(&self.interfaces[0])
    }
}

impl Endpoint {
    /// Handles what has completed. Returns the number of completions.
    #[inline]
    pub(crate) fn collect(&mut self, account: &mut Account) -> usize {
        let mut completed = 0;
        for done in self.ring.reap() {
            completed += 1;
            let is_well = done.result.is_ok();
            let Some(frame) = done.take_frame() else { continue };
            if done.op == RingOp::Write {
                self.writing -= 1;
                account.refused += u64::from(!is_well);
                self.free.push(frame);
            } else if is_well {
                self.read.push(frame);
            } else {
                self.spare.push(frame);
            }
        }
        completed
    }

    /// Posts the free frames for reading.
    #[inline]
    pub(crate) fn post(&mut self) -> Result<(), Failure> {
        if !self.spare.is_empty() {
            let frames = iter::from_fn(|| self.spare.pop().map(|frame| (frame, 0)));
            self.ring.submit_reads(frames).map_err(step)?;
        }
        Ok(())
    }

    /// Writes as many of `frames` as there are credits for.
    #[inline]
    pub(crate) fn write(&mut self, frames: impl Iterator<Item = Frame>) -> Result<(), Failure> {
        let frames = frames.map(|frame| (frame, 0));
        self.writing += self.ring.submit_writes(frames).map_err(step)?;
        Ok(())
    }

    /// Like [`write`](Self::write), for `n` of the free frames. `fill` makes a packet of each.
    #[inline]
    pub(crate) fn send(
        &mut self,
        n: usize,
        mut fill: impl FnMut(&mut Frame),
    ) -> Result<(), Failure> {
        let free = &mut self.free;
        let frames = iter::from_fn(|| {
            let mut frame = free.pop()?;
            fill(&mut frame);
            Some((frame, 0))
        });
        self.writing += self.ring.submit_writes(frames.take(n)).map_err(step)?;
        Ok(())
    }
}

/// Gives a frame the length and the header that each of its packets has.
fn make_ready(frame: &mut Frame, len: usize, header: Option<&OffloadHeader>) {
    frame.set_len(len).expect("a frame has room for the largest packet");
    if let Some(header) = header {
        frame.set_offload(header).expect("a frame has headroom for a header");
    }
}

fn step(error: impl Into<Error>) -> Failure {
    Failure::Step(error.into().to_string())
}

/// Packets that the kernel has dropped in this network namespace.
fn dropped(device: DeviceName) -> u64 {
    #[cfg(target_os = "linux")]
    if device.is_tap() {
        return crate::tap::dropped();
    }
    let _ = device;
    0
}
