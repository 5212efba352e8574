//! Questions to a real vmnet that no document answers, for `vmring probe`. The calls that a
//! question takes can harm only the probe's own interfaces. The answers are for an issue report.
//!
//! The probe also reads frames that are not its own, for example the host's multicasts. It does not
//! count them where it can tell them apart. They cause events, though, and events are counted.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::fmt::{self, Write};
use std::hash::{BuildHasher, RandomState};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use libc::iovec;
use vmring_core::offload;

use super::availability::System;
use super::description::{Extras, describe};
use super::ffi::{InterfaceRef, PacketDescriptor, SUCCESS, vmnet_read, vmnet_write};
use super::guest_memory::GuestMemory;
use super::network::VmnetNetwork;
use super::started::{StartedInterface, Timeouts};
use crate::config::{InterfaceConfig, Mode};
use crate::error::Error;

/// The settings of a probe. [`run`](Self::run) asks the questions.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The identities of its two interfaces. Those of further interfaces differ from them in the
    /// first byte.
    pub interface_ids: [[u8; 16]; 2],
    /// How much time there is to put the host to sleep and to wake it, not counting the sleep
    /// itself. `None` leaves out the question about sleep.
    pub sleep: Option<Duration>,
    /// How long to wait for an event that may not come.
    pub patience: Duration,
}

/// What [`Probe::run`] reports while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Told<'a> {
    /// It asks this question now. Show it to a person who waits.
    Asking {
        /// The question's number, from 1 to 12.
        number: u32,
        /// What it is about.
        question: &'a str,
    },
    /// A line of the report. It comes as soon as it is known, so a probe that hangs or crashes has
    /// reported everything before that.
    Line(&'a str),
}

impl Default for Probe {
    /// Random identities, no question about sleep, and a patience of 1.5 seconds.
    fn default() -> Self {
        let half = || RandomState::new().hash_one(0).to_ne_bytes();
        let id = || {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&half());
            id[8..].copy_from_slice(&half());
            id
        };
        Self { interface_ids: [id(), id()], sleep: None, patience: Duration::from_millis(1500) }
    }
}

const TIMEOUTS: Timeouts =
    Timeouts { start: Duration::from_secs(20), stop: Duration::from_secs(10) };
/// How long the probe gives a frame to travel from one interface to the other.
const UNDER_WAY: Duration = Duration::from_millis(50);
/// After this time without a packet, no more are expected.
const QUIET: Duration = Duration::from_millis(100);
/// The longest time that the probe reads, even if others send without end.
const ENOUGH: Duration = Duration::from_secs(5);
/// The EtherType of the probe's frames: Local Experimental EtherType 1 (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const BROADCAST: [u8; 6] = [0xff; 6];
/// The size of a small frame in bytes.
const SMALL: usize = 60;

/// What vmnet answered to a read or a write.
#[derive(Clone, Debug)]
struct Answer {
    status: u32,
    /// The count as vmnet left it. It may be any number.
    count: c_int,
    /// The descriptors' `vm_pkt_size` after the call.
    sizes: Vec<usize>,
}

impl Answer {
    /// Returns how many packets the call transferred; 0 if it failed.
    fn done(&self) -> usize {
        let count = usize::try_from(self.count).unwrap_or(0).min(self.sizes.len());
        if self.status == SUCCESS { count } else { 0 }
    }

    /// Returns those of `packets` that a read has filled, each with its length.
    fn packets<'a>(&self, packets: &'a [Vec<u8>]) -> impl Iterator<Item = &'a [u8]> {
        let sizes = self.sizes.iter().copied().take(self.done());
        packets
            .iter()
            .zip(sizes.collect::<Vec<_>>())
            .map(|(packet, n)| &packet[..n.min(packet.len())])
    }
}

/// Writes status and count, in brackets.
impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", self.status, self.count)
    }
}

/// `vmnet_read` or `vmnet_write`.
type Transfer = unsafe extern "C" fn(InterfaceRef, *mut PacketDescriptor, *mut c_int) -> u32;

/// Calls `vmnet_read` or `vmnet_write` with these packets, each split into `pieces` iovecs.
///
/// # Safety
///
/// `interface` is a handle that a start has returned, and it is not stopped during the call.
unsafe fn call(
    function: Transfer,
    interface: InterfaceRef,
    packets: &mut [&mut [u8]],
    pieces: usize,
) -> Answer {
    let mut iovecs: Vec<Vec<iovec>> = packets
        .iter_mut()
        .map(|packet| {
            let piece = packet.len().div_ceil(pieces).max(1);
            let each =
                |part: &mut [u8]| iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() };
            packet.chunks_mut(piece).map(each).collect()
        })
        .collect();
    let mut descriptors: Vec<PacketDescriptor> = packets
        .iter()
        .zip(&mut iovecs)
        .map(|(packet, iovecs)| PacketDescriptor {
            vm_pkt_size: packet.len(),
            vm_pkt_iov: iovecs.as_mut_ptr(),
            vm_pkt_iovcnt: iovecs.len() as u32,
            vm_flags: 0,
        })
        .collect();
    let mut count = descriptors.len() as c_int;
    // SAFETY: the caller promises a handle that is not stopped during the call. There are `count`
    // descriptors. They and their iovecs are local to this function, and they point at bytes that
    // it has borrowed mutably.
    let status = unsafe { function(interface, descriptors.as_mut_ptr(), &mut count) };
    let sizes = descriptors.iter().map(|descriptor| descriptor.vm_pkt_size).collect();
    Answer { status, count, sizes }
}

/// Returns the packets as slices, in which form `call` takes them.
fn slices(packets: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    packets.iter_mut().map(Vec::as_mut_slice).collect()
}

/// Calls `vmnet_read`. Question 5 calls this from two threads at a time, on purpose.
fn read(started: &StartedInterface, packets: &mut [Vec<u8>], pieces: usize) -> Answer {
    // SAFETY: the interface runs, because we borrow its `StartedInterface`.
    unsafe { call(vmnet_read, started.interface(), &mut slices(packets), pieces) }
}

/// Calls `vmnet_write`.
fn write(started: &StartedInterface, packets: &mut [Vec<u8>], pieces: usize) -> Answer {
    // SAFETY: the interface runs, because we borrow its `StartedInterface`.
    unsafe { call(vmnet_write, started.interface(), &mut slices(packets), pieces) }
}

/// Returns `n` buffers of `size` bytes each.
fn empty_buffers(n: usize, size: usize) -> Vec<Vec<u8>> {
    vec![vec![0; size]; n]
}

/// Returns one of the probe's frames, cut or padded to `size` bytes.
fn frame(number: usize, size: usize, [from, to]: [[u8; 6]; 2]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &ETHERTYPE, &(number as u32).to_be_bytes()].concat();
    frame.resize(size, 0x5a);
    frame
}

/// Returns `n` frames, numbered from 0.
fn frames(n: usize, size: usize, between: [[u8; 6]; 2]) -> Vec<Vec<u8>> {
    (0..n).map(|number| frame(number, size, between)).collect()
}

/// Returns whether a packet is one of the probe's own frames.
fn is_ours(packet: &[u8]) -> bool {
    packet.get(12..14) == Some(&ETHERTYPE)
}

/// Returns the number in a frame of the probe's; `u32::MAX` if the frame is too short for one.
fn number_of(packet: &[u8]) -> u32 {
    packet.get(14..18).and_then(<[u8]>::first_chunk).map_or(u32::MAX, |n| u32::from_be_bytes(*n))
}

/// Two interfaces on one network.
struct Pair {
    started: [StartedInterface; 2],
    /// The MACs of the first and of the second interface, for frames from the first to the second.
    macs: [[u8; 6]; 2],
    /// The largest packet in bytes.
    max: usize,
    /// The most packets per read and per write.
    limits: (usize, usize),
}

/// Returns the settings of one of the probe's interfaces.
fn config(id: [u8; 16], virtio_header: bool) -> InterfaceConfig {
    let mut config = InterfaceConfig::new(Mode::Shared, id);
    config.offloads.virtio_header = virtio_header;
    config.offloads.tso4 = virtio_header;
    config.offloads.tso6 = virtio_header;
    config
}

/// Starts an interface in shared mode.
fn start(id: [u8; 16], system: System, virtio_header: bool) -> Result<StartedInterface, Error> {
    let config = config(id, virtio_header);
    let description = describe(&config, &Extras::default(), &system)?;
    StartedInterface::start(&description, None, system, TIMEOUTS)
}

/// Starts an interface on a network object, with the virtio header.
fn start_on(
    network: &VmnetNetwork,
    id: [u8; 16],
    system: System,
) -> Result<StartedInterface, Error> {
    let extras = Extras { on_network: true, ..Extras::default() };
    let description = describe(&config(id, true), &extras, &system)?;
    StartedInterface::start(&description, Some(network), system, TIMEOUTS)
}

impl Probe {
    /// Returns the identities of two further interfaces.
    fn other_ids(&self, which: u8) -> [[u8; 16]; 2] {
        self.interface_ids.map(|mut id| {
            id[0] ^= which;
            id
        })
    }
}

impl Pair {
    /// Starts both interfaces in shared mode.
    fn start(ids: [[u8; 16]; 2], system: System) -> Result<Self, Error> {
        let started = [start(ids[0], system, false)?, start(ids[1], system, false)?];
        let macs = [0, 1].map(|i| {
            let local = [2, 0, 0, 0, 0, i as u8 + 1];
            started[i].parameters.mac.map_or(local, macaddr::MacAddr6::into_array)
        });
        let (_, max) = started[0].parameters.sizes().unwrap_or((1500, 1514));
        let (read, write) = started[0].parameters.batches();
        Ok(Self { started, macs, max: max as usize, limits: (read as usize, write as usize) })
    }

    /// Sends `n` small numbered frames from the first to the second, and returns how many vmnet
    /// took.
    fn send(&self, n: usize) -> usize {
        let mut all = frames(n, SMALL, self.macs);
        let mut sent = 0;
        while sent < n {
            let end = n.min(sent + self.limits.1);
            match write(&self.started[0], &mut all[sent..end], 1).done() {
                0 => break,
                taken => sent += taken,
            }
        }
        sent
    }

    /// Reads at the second until no more packets come, and returns the probe's own frames.
    fn collect(&self) -> Vec<Vec<u8>> {
        let mut ours = Vec::new();
        let (start, mut last) = (Instant::now(), Instant::now());
        let mut buffers = empty_buffers(self.limits.0, self.max);
        while last.elapsed() < QUIET && start.elapsed() < ENOUGH {
            let answer = read(&self.started[1], &mut buffers, 1);
            if answer.done() == 0 {
                thread::sleep(Duration::from_millis(5));
                continue;
            }
            last = Instant::now();
            let packets = answer.packets(&buffers).filter(|packet| is_ours(packet));
            ours.extend(packets.map(<[u8]>::to_vec));
        }
        ours
    }

    /// Reads one packet at a time at the second, in `pieces` iovecs, until it is one of the probe's
    /// own, or a read fails, or nothing has come for `QUIET`. The packet is in the buffer.
    fn receive(&self, buffer: &mut [u8], pieces: usize) -> Answer {
        let start = Instant::now();
        loop {
            // SAFETY: the interface runs, because `self` owns its `StartedInterface`.
            let answer = unsafe {
                call(vmnet_read, self.started[1].interface(), &mut [&mut *buffer], pieces)
            };
            let foreign = answer.done() == 1 && !is_ours(buffer);
            let nothing = answer.status == SUCCESS && answer.count == 0;
            if !(foreign || nothing) || start.elapsed() > QUIET {
                return answer;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Returns the number of the second's events so far.
    fn events(&self) -> u64 {
        self.started[1].events.count()
    }
}

/// A question's number, its words, and what to do for the answer.
type Question = (u32, &'static str, fn(&Pair, &Probe, System) -> String);

/// All questions. The sleep comes last, because it may leave the interfaces dead.
const QUESTIONS: &[Question] = &[
    (1, "several iovecs in one packet", several_iovecs),
    (2, "the count after a write that failed or was not taken whole; 1007", counts_after_failure),
    (3, "more packets than the limit", beyond_the_limit),
    (4, "another event while packets are left unread", events_while_unread),
    (5, "two readers at a time", two_readers),
    (6, "the virtio header and max_packet_size", virtio_header),
    (7, "the virtio header on a network object", header_on_a_network),
    (8, "reading and writing right after the start", right_after_start),
    (10, "packets that wait unread before some are dropped", queue_depth),
    (11, "a virtual machine's memory as a buffer", guest_memory),
    (12, "the shortest frame that is taken", shortest_frame),
    (9, "the host's sleep", host_sleep),
];

impl Probe {
    /// Asks all questions, one after the other. `tell` gets the report line by line.
    ///
    /// A question that fails says so in its answer, and the next one is asked. A pair in brackets
    /// in an answer is what a call returned: its status (1000 is success) and its count.
    ///
    /// # Errors
    ///
    /// The errors of a start, if one of the two interfaces could not be started.
    pub fn run(&self, tell: &mut dyn FnMut(Told<'_>)) -> Result<(), Error> {
        let system = System::look();
        let pair = Pair::start(self.interface_ids, system)?;
        let parameters = &pair.started[0].parameters;
        let (version, processor) = (env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
        tell(Told::Line(&format!("vmring {version} on {}, {processor}", system.macos)));
        tell(Told::Line(&format!("root: {}", system.root)));
        tell(Told::Line(&format!("parameters: {parameters:?}")));
        for (number, question, ask) in QUESTIONS {
            tell(Told::Asking { number: *number, question });
            pair.collect();
            let answer = ask(&pair, self, system);
            tell(Told::Line(&format!("{number:2}. {question}: {answer}")));
        }
        Ok(())
    }
}

fn several_iovecs(pair: &Pair, _: &Probe, _: System) -> String {
    let written = write(&pair.started[0], &mut frames(1, SMALL, pair.macs), 2);
    let arrived = pair.collect();
    let whole = arrived.first().is_some_and(|packet| *packet == frame(0, SMALL, pair.macs));
    // A packet of the largest size fills both iovecs of the read.
    let mut long = frames(1, pair.max, pair.macs);
    let sent = write(&pair.started[0], &mut long, 1);
    let mut buffer = vec![0; pair.max];
    let read = pair.receive(&mut buffer, 2);
    format!(
        "write with 2: {written}, {} arrived, right: {whole}; read with 2 of a packet of {} bytes \
         (its write: {sent}): {read}, {:?} bytes, right: {}",
        arrived.len(),
        pair.max,
        read.sizes,
        read.done() == 1 && buffer == long[0],
    )
}

fn counts_after_failure(pair: &Pair, _: &Probe, _: System) -> String {
    let mut mixed = frames(4, SMALL, pair.macs);
    // The third frame is longer than vmnet allows.
    mixed[2].resize(pair.max + 100, 0);
    let failed = write(&pair.started[0], &mut mixed, 1);
    let arrived: Vec<u32> = pair.collect().iter().map(|packet| number_of(packet)).collect();
    let batch = pair.limits.1;
    let mut full = frames(batch, pair.max, pair.macs);
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..64 {
        *seen.entry(write(&pair.started[0], &mut full, 1).to_string()).or_default() += 1;
    }
    format!(
        "4 with the third too long: {failed}, arrived {arrived:?}; 64 full writes of {batch} (answer: \
         how often): {seen:?}, arrived {}",
        pair.collect().len()
    )
}

fn beyond_the_limit(pair: &Pair, _: &Probe, _: System) -> String {
    let (reads, writes) = pair.limits;
    let written = write(&pair.started[0], &mut frames(writes + 1, SMALL, pair.macs), 1);
    let arrived = pair.collect().len();
    let sent = pair.send(reads + 1);
    thread::sleep(UNDER_WAY);
    let read = read(&pair.started[1], &mut empty_buffers(reads + 1, pair.max), 1);
    format!(
        "write of one more than {writes}: {written}, {arrived} arrived; read of one more than \
         {reads}, after {sent} were sent: {read}"
    )
}

fn events_while_unread(pair: &Pair, probe: &Probe, _: System) -> String {
    if let Err(status) = pair.started[1].listen() {
        return format!("no events: {status}");
    }
    let mut before = pair.events();
    let mut news = || {
        thread::sleep(probe.patience);
        let now = pair.events();
        now - std::mem::replace(&mut before, now)
    };
    pair.send(3);
    let first = news();
    let mut buffer = vec![0; pair.max];
    let read = pair.receive(&mut buffer, 1);
    let after_read = news();
    pair.send(1);
    let after_more = news();
    format!(
        "3 packets: {first} events; one of them read {read}: {after_read} more; a fourth packet: \
         {after_more} more"
    )
}

fn two_readers(pair: &Pair, _: &Probe, _: System) -> String {
    let sent = pair.send(32);
    thread::sleep(UNDER_WAY);
    let reader = || {
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        let mut numbers = Vec::new();
        let mut buffers = empty_buffers(1, pair.max);
        for _ in 0..64 {
            let answer = read(&pair.started[1], &mut buffers, 1);
            *seen.entry(answer.to_string()).or_default() += 1;
            let packets = answer.packets(&buffers).filter(|packet| is_ours(packet));
            numbers.extend(packets.map(number_of));
        }
        (seen, numbers)
    };
    let both = thread::scope(|scope| {
        let readers = [0, 1].map(|_| scope.spawn(reader));
        readers.map(|reader| reader.join().unwrap_or_default())
    });
    let mut all: Vec<u32> = both.iter().flat_map(|(_, numbers)| numbers.clone()).collect();
    let read = all.len();
    all.sort_unstable();
    all.dedup();
    format!(
        "{sent} sent; the answers of each (and how often): {:?}, {:?}; read {read}, {} different, {} \
         left",
        both[0].0,
        both[1].0,
        all.len(),
        pair.collect().len()
    )
}

/// Returns a broadcast frame with a virtio header in front, `size` bytes together.
fn with_header(number: usize, size: usize, header: &[u8; offload::LEN]) -> Vec<u8> {
    let between = [[2, 0, 0, 0, 0, 1], BROADCAST];
    [&header[..], &frame(number, size - offload::LEN, between)].concat()
}

/// Writes frames with a virtio header on the first interface, and reports what the second receives.
fn headers(started: &[StartedInterface; 2]) -> String {
    let Some((mtu, max)) = started[0].parameters.sizes() else { return "no sizes".to_owned() };
    let (mtu, max) = (mtu as usize, max as usize);
    let mut answer = format!("mtu {mtu}, max_packet_size {max}");
    let none = [0; offload::LEN];
    let mut one_buffer = none;
    one_buffer[10] = 1;
    let mut checksum = none;
    // flags = VIRTIO_NET_HDR_F_NEEDS_CSUM, csum_start = 14, csum_offset = 16, little-endian (virtio
    // 1.2, 5.1.6): the checksum covers byte 14 to the end, and its place is byte 14 + 16.
    (checksum[0], checksum[6], checksum[8]) = (1, 14, 16);
    let small = SMALL + offload::LEN;
    let wanted = [
        ("no flag", small, none),
        ("one buffer", small, one_buffer),
        ("a checksum to be completed", small, checksum),
        ("as long as the MTU allows", mtu + 14 + offload::LEN, none),
        ("max_packet_size with the header", max, none),
        ("max_packet_size and the header", max + offload::LEN, none),
    ];
    for (number, (what, size, header)) in wanted.into_iter().enumerate() {
        let written = write(&started[0], &mut [with_header(number, size, &header)], 1);
        let _ = write!(answer, "; {what}, write of {size}: {written}");
    }
    thread::sleep(UNDER_WAY);
    for _ in 0..64 {
        let mut buffers = empty_buffers(1, max + offload::LEN);
        let read = read(&started[1], &mut buffers, 1);
        let Some(packet) = read.packets(&buffers).next() else {
            let _ = write!(answer, "; last read {read}");
            break;
        };
        let size = packet.len();
        if packet.get(offload::LEN..).is_some_and(is_ours) {
            let (header, frame) = packet.split_at(offload::LEN);
            let number = number_of(frame);
            let _ = write!(answer, "; number {number} came with {size} bytes, {header:02x?}");
        } else if is_ours(packet) {
            let number = number_of(packet);
            let _ = write!(answer, "; number {number} came with {size} bytes and no header");
        }
    }
    answer
}

fn virtio_header(_: &Pair, probe: &Probe, system: System) -> String {
    match probe.other_ids(0x55).map(|id| start(id, system, true)) {
        [Ok(a), Ok(b)] => headers(&[a, b]),
        [Err(error), _] | [_, Err(error)] => format!("not started: {error}"),
    }
}

fn header_on_a_network(_: &Pair, probe: &Probe, system: System) -> String {
    let network = match VmnetNetwork::builder(Mode::Shared).create() {
        Ok(network) => network,
        Err(error) => return format!("no network: {error}"),
    };
    match probe.other_ids(0xaa).map(|id| start_on(&network, id, system)) {
        [Ok(a), Ok(b)] => headers(&[a, b]),
        [Err(error), _] | [_, Err(error)] => format!("not started: {error}"),
    }
}

fn right_after_start(_: &Pair, probe: &Probe, system: System) -> String {
    let id = probe.other_ids(0x33)[0];
    let mut answer = "no handle".to_owned();
    let started =
        describe(&config(id, false), &Extras::default(), &system).and_then(|description| {
            StartedInterface::start_with(&description, None, system, TIMEOUTS, |interface| {
                // Larger than any packet: the interface's own limit is not known yet.
                let mut buffer = vec![0; 128 * 1024];
                // SAFETY: the start has just returned this handle. `start_with` stops the
                // interface, if at all, after this closure has returned.
                let read = unsafe { call(vmnet_read, interface, &mut [&mut buffer], 1) };
                let mut frame = frame(0, SMALL, [[2, 0, 0, 0, 0, 1], BROADCAST]);
                // SAFETY: the handle is the one of the read, and `start_with` does not stop the
                // interface before this closure has returned.
                let write = unsafe { call(vmnet_write, interface, &mut [&mut frame], 1) };
                answer = format!("before the handler was waited for: read {read}, write {write}");
            })
        });
    match started {
        Ok(_) => answer,
        Err(error) => format!("{answer}; not started: {error}"),
    }
}

fn host_sleep(pair: &Pair, probe: &Probe, _: System) -> String {
    let Some(time) = probe.sleep else {
        return "not asked; say how many seconds you need to let the host sleep and wake it"
            .to_owned();
    };
    if let Err(status) = pair.started[1].listen() {
        return format!("no events: {status}");
    }
    let before = pair.events();
    // On macOS the first of these clocks stops while the host sleeps: std's `Instant` there uses
    // CLOCK_UPTIME_RAW.
    let (awake, wall) = (Instant::now(), SystemTime::now());
    thread::sleep(time);
    let slept = wall.elapsed().unwrap_or_default().saturating_sub(awake.elapsed());
    let meanwhile = pair.events() - before;
    let sent = pair.send(8);
    thread::sleep(probe.patience);
    let events = pair.events() - before - meanwhile;
    let arrived = pair.collect().len();
    format!(
        "it slept {} s, {meanwhile} events meanwhile; then {sent} of 8 were taken, {events} events, \
         {arrived} arrived",
        slept.as_secs()
    )
}

fn queue_depth(pair: &Pair, _: &Probe, _: System) -> String {
    let sent = pair.send(8192);
    thread::sleep(UNDER_WAY);
    let arrived = pair.collect().len();
    format!("{sent} sent and none read meanwhile: {arrived} waited")
}

fn guest_memory(pair: &Pair, _: &Probe, _: System) -> String {
    let (mut memory, why_not) = match GuestMemory::new() {
        Ok(made) => made,
        Err(error) => return format!("no memory: {error}"),
    };
    let wanted = frame(7, SMALL, pair.macs);
    memory.bytes[..SMALL].copy_from_slice(&wanted);
    let [sender, _] = &pair.started;
    // SAFETY: the interface runs, because `pair` owns its `StartedInterface`.
    let written =
        unsafe { call(vmnet_write, sender.interface(), &mut [&mut memory.bytes[..SMALL]], 1) };
    memory.bytes.fill(0);
    let read = pair.receive(&mut memory.bytes, 1);
    let right = read.done() == 1 && memory.bytes[..SMALL] == wanted[..];
    let whose = why_not.map_or_else(
        || "in a virtual machine's memory".to_owned(),
        |why_not| format!("in memory of no virtual machine ({why_not})"),
    );
    format!("{whose}: write {written}, read {read}, right: {right}")
}

fn shortest_frame(pair: &Pair, _: &Probe, _: System) -> String {
    let mut answer = String::new();
    for size in [1, 4, 13, 14, 15, 18, 59, 60] {
        let written = write(&pair.started[0], &mut [frame(0, size, pair.macs)], 1);
        let _ = write!(answer, "{size} bytes: {written}; ");
    }
    let arrived: Vec<usize> = pair.collect().iter().map(Vec::len).collect();
    format!("{answer}of ours arrived with lengths {arrived:?}")
}
