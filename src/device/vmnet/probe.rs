//! Questions to a real vmnet that no document answers: `vmring probe`. Each is asked with calls that
//! cannot harm more than the probe's own two interfaces, and the answers are for an issue report.

use std::ffi::c_int;
use std::fmt::Write;
use std::thread;
use std::time::{Duration, Instant};

use libc::iovec;

use super::description::{Extras, describe};
use super::ffi::{InterfaceRef, PacketDescriptor, vmnet_read, vmnet_write};
use super::network::Network;
use super::newer::System;
use super::port::{Port, Timeouts};
use crate::error::Error;
use crate::interface::{Config, Mode};

/// What the probe does.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The identities of its two interfaces.
    pub interface_ids: [[u8; 16]; 2],
    /// How long the host has to be put to sleep and woken; `None`: that is not asked.
    pub sleep: Option<Duration>,
}

const TIMEOUTS: Timeouts =
    Timeouts { start: Duration::from_secs(20), stop: Duration::from_secs(10) };
/// How long to wait for what may not come.
const PATIENCE: Duration = Duration::from_millis(1500);

/// One packet's buffer of its own.
struct Buffers {
    bytes: Vec<Vec<u8>>,
    iovecs: Vec<Vec<iovec>>,
    descriptors: Vec<PacketDescriptor>,
}

impl Buffers {
    /// `n` packets of `size` bytes, each in `pieces`.
    fn new(n: usize, size: usize, pieces: usize) -> Self {
        let mut bytes = vec![vec![0_u8; size]; n];
        let piece = size.div_ceil(pieces);
        let mut iovecs: Vec<Vec<iovec>> = bytes
            .iter_mut()
            .map(|packet| {
                let each = |part: &mut [u8]| iovec {
                    iov_base: part.as_mut_ptr().cast(),
                    iov_len: part.len(),
                };
                packet.chunks_mut(piece).map(each).collect()
            })
            .collect();
        let descriptors = iovecs
            .iter_mut()
            .map(|iovecs| PacketDescriptor {
                vm_pkt_size: size,
                vm_pkt_iov: iovecs.as_mut_ptr(),
                vm_pkt_iovcnt: iovecs.len() as u32,
                vm_flags: 0,
            })
            .collect();
        Self { bytes, iovecs, descriptors }
    }

    /// Frames from `from` to `to`, numbered, ready to be written.
    fn filled(n: usize, size: usize, pieces: usize, [from, to]: [[u8; 6]; 2]) -> Self {
        let mut all = Self::new(n, size, pieces);
        for (number, packet) in all.bytes.iter_mut().enumerate() {
            let header = [&to[..], &from, &[0x88, 0xb5], &(number as u32).to_be_bytes()].concat();
            let n = header.len().min(size);
            packet[..n].copy_from_slice(&header[..n]);
        }
        all
    }

    fn call(
        &mut self,
        function: unsafe extern "C" fn(
            *mut std::ffi::c_void,
            *mut PacketDescriptor,
            *mut c_int,
        ) -> u32,
        interface: InterfaceRef,
        count: usize,
    ) -> (u32, c_int) {
        debug_assert_eq!(self.iovecs.len(), self.descriptors.len());
        let mut pktcnt = count.min(self.descriptors.len()) as c_int;
        // SAFETY: the interface is not stopped; descriptors, iovecs and bytes are ours and live.
        let status = unsafe { function(interface, self.descriptors.as_mut_ptr(), &mut pktcnt) };
        (status, pktcnt)
    }

    fn read(&mut self, port: &Port, count: usize) -> (u32, c_int) {
        self.call(vmnet_read, port.interface(), count)
    }

    fn write(&mut self, port: &Port, count: usize) -> (u32, c_int) {
        self.call(vmnet_write, port.interface(), count)
    }
}

/// Two interfaces on one network.
struct Pair {
    ports: [Port; 2],
    macs: [[u8; 6]; 2],
    max: usize,
    limits: (usize, usize),
}

fn config(id: [u8; 16], virtio_header: bool) -> Config {
    let mut config = Config::new(Mode::Shared, id);
    config.offloads.virtio_header = virtio_header;
    config.offloads.tso4 = virtio_header;
    config.offloads.tso6 = virtio_header;
    config
}

fn start(id: [u8; 16], system: System, virtio_header: bool) -> Result<Port, Error> {
    let config = config(id, virtio_header);
    let description = describe(&config, &Extras::default(), &system)?;
    Port::start(&description, None, system, TIMEOUTS)
}

impl Pair {
    fn start(ids: [[u8; 16]; 2], system: System) -> Result<Self, Error> {
        let ports = [start(ids[0], system, false)?, start(ids[1], system, false)?];
        let macs = [0, 1].map(|i| {
            let local = [2, 0, 0, 0, 0, i as u8 + 1];
            ports[i].parameters.mac.map_or(local, macaddr::MacAddr6::into_array)
        });
        let (_, max) = ports[0].parameters.sizes().unwrap_or((1500, 1514));
        let (read, write) = ports[0].parameters.batches();
        Ok(Self { ports, macs, max: max as usize, limits: (read as usize, write as usize) })
    }

    /// Sends `n` frames from the first to the second. How many were taken.
    fn send(&self, n: usize) -> usize {
        let mut sent = 0;
        while sent < n {
            let batch = (n - sent).min(self.limits.1);
            match Buffers::filled(batch, 60, 1, self.macs).write(&self.ports[0], batch) {
                (super::ffi::SUCCESS, count) if count > 0 => sent += count as usize,
                _ => break,
            }
        }
        sent
    }

    /// Reads everything that is there at the second, and counts the probe's own frames.
    fn drain(&self) -> usize {
        let mut ours = 0;
        let start = Instant::now();
        loop {
            let mut buffers = Buffers::new(self.limits.0, self.max, 1);
            match buffers.read(&self.ports[1], self.limits.0) {
                (super::ffi::SUCCESS, count) if count > 0 => {
                    let packets = buffers.bytes.iter().take(count as usize);
                    ours += packets.filter(|packet| packet[12..14] == [0x88, 0xb5]).count();
                }
                _ if start.elapsed() < Duration::from_millis(200) => {
                    thread::sleep(Duration::from_millis(10));
                }
                _ => return ours,
            }
        }
    }

    fn events(&self) -> u64 {
        self.ports[1].events.count()
    }
}

/// A question's number, its words, and what to do for the answer.
type Question = (u32, &'static str, fn(&Pair, &Probe, System) -> String);

const QUESTIONS: &[Question] = &[
    (1, "several iovecs in one packet", several_iovecs),
    (2, "the count after a write that failed or was not taken whole; 1007", counts_after_failure),
    (3, "more packets than the limit", beyond_the_limit),
    (4, "another event while packets are left unread", events_while_unread),
    (5, "two readers at a time", two_readers),
    (6, "the virtio header and max_packet_size", virtio_header),
    (7, "the virtio header on a network object", header_on_a_network),
    (8, "reading and writing right after the start", right_after_start),
    (9, "the host's sleep", host_sleep),
    (10, "packets that wait unread before some are dropped", queue_depth),
    (11, "a shared mapping as a buffer", shared_mapping),
    (12, "the shortest frame that is taken", shortest_frame),
];

impl Probe {
    /// Asks everything; the report as text. Each answer stands alone: one that fails says so, and the
    /// next is asked.
    ///
    /// # Errors
    ///
    /// The interfaces could not be started.
    pub fn run(&self, progress: &mut dyn FnMut(u32, &str)) -> Result<String, Error> {
        let system = System::look();
        let pair = Pair::start(self.interface_ids, system)?;
        let mut report = String::new();
        let parameters = &pair.ports[0].parameters;
        // Writing to a String does not fail.
        let _ = writeln!(report, "vmring {} on {}", env!("CARGO_PKG_VERSION"), system.macos);
        let _ = writeln!(report, "root: {}", system.root);
        let _ = writeln!(report, "parameters: {parameters:?}");
        for (number, words, ask) in QUESTIONS {
            progress(*number, words);
            pair.drain();
            let answer = ask(&pair, self, system);
            let _ = writeln!(report, "{number:2}. {words}: {answer}");
        }
        Ok(report)
    }
}

fn several_iovecs(pair: &Pair, _: &Probe, _: System) -> String {
    let write = Buffers::filled(1, 60, 2, pair.macs).write(&pair.ports[0], 1);
    thread::sleep(Duration::from_millis(50));
    let read = Buffers::new(1, pair.max, 2).read(&pair.ports[1], 1);
    format!("write with 2: {write:?}; read with 2: {read:?} (status, count)")
}

fn counts_after_failure(pair: &Pair, _: &Probe, _: System) -> String {
    let mut mixed = Buffers::filled(4, 60, 1, pair.macs);
    // The third is longer than allowed.
    let long = Buffers::filled(1, pair.max + 100, 1, pair.macs);
    mixed.descriptors[2] = long.descriptors[0];
    let failed = mixed.write(&pair.ports[0], 4);
    let arrived = pair.drain();
    let mut seen = Vec::new();
    for _ in 0..64 {
        let batch = pair.limits.1;
        let answer = Buffers::filled(batch, pair.max, 1, pair.macs).write(&pair.ports[0], batch);
        if !seen.contains(&answer) {
            seen.push(answer);
        }
    }
    format!(
        "4 with the third too long: {failed:?}, {arrived} arrived; 64 full writes of {}: {seen:?}",
        pair.limits.1
    )
}

fn beyond_the_limit(pair: &Pair, _: &Probe, _: System) -> String {
    let (read, write) = (pair.limits.0 + 1, pair.limits.1 + 1);
    let write = Buffers::filled(write, 60, 1, pair.macs).write(&pair.ports[0], write);
    let read = Buffers::new(read, pair.max, 1).read(&pair.ports[1], read);
    format!("write of one more than {}: {write:?}; read: {read:?}", pair.limits.1)
}

fn events_while_unread(pair: &Pair, _: &Probe, _: System) -> String {
    if let Err(status) = pair.ports[1].listen() {
        return format!("no events: {status}");
    }
    let before = pair.events();
    pair.send(3);
    thread::sleep(PATIENCE);
    let first = pair.events() - before;
    let read = Buffers::new(1, pair.max, 1).read(&pair.ports[1], 1);
    thread::sleep(PATIENCE);
    let after_read = pair.events() - before - first;
    pair.send(1);
    thread::sleep(PATIENCE);
    let after_more = pair.events() - before - first - after_read;
    format!(
        "3 packets: {first} events; one of them read ({read:?}): {after_read} more; a fourth \
         packet: {after_more} more"
    )
}

fn two_readers(pair: &Pair, _: &Probe, _: System) -> String {
    pair.send(32);
    let mut answers = Vec::new();
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = Vec::new();
                    for _ in 0..64 {
                        let answer = Buffers::new(1, pair.max, 1).read(&pair.ports[1], 1);
                        if !seen.contains(&answer) {
                            seen.push(answer);
                        }
                    }
                    seen
                })
            })
            .collect();
        answers.extend(readers.into_iter().map(|reader| reader.join().unwrap_or_default()));
    });
    format!("the different answers of each: {answers:?}")
}

fn virtio_header(_: &Pair, probe: &Probe, system: System) -> String {
    let mut ids = probe.interface_ids;
    ids.iter_mut().for_each(|id| id[15] ^= 0x55);
    let pair = match ids.map(|id| start(id, system, true)) {
        [Ok(a), Ok(b)] => [a, b],
        [a, b] => return format!("not started: {:?}, {:?}", a.err(), b.err()),
    };
    let Some((mtu, max)) = pair[0].parameters.sizes() else { return "no sizes".to_owned() };
    let mut answer = format!("mtu {mtu}, max_packet_size {max}");
    let macs = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
    // A broadcast, so that no MAC needs to be known.
    for size in [60 + 12, mtu as usize + 14 + 12, max as usize, max as usize + 12] {
        let mut buffers = Buffers::new(1, size, 1);
        let packet = &mut buffers.bytes[0][12..];
        packet[..6].fill(0xff);
        packet[6..12].copy_from_slice(&macs[0]);
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        let written = buffers.write(&pair[0], 1);
        let _ = write!(answer, "; write of {size}: {written:?}");
    }
    thread::sleep(Duration::from_millis(50));
    let mut buffers = Buffers::new(1, max as usize + 12, 1);
    if let (super::ffi::SUCCESS, 1) = buffers.read(&pair[1], 1) {
        let size = buffers.descriptors[0].vm_pkt_size;
        let _ = write!(answer, "; received {size} bytes, header {:02x?}", &buffers.bytes[0][..12]);
    }
    answer
}

fn header_on_a_network(_: &Pair, probe: &Probe, system: System) -> String {
    let network = match Network::builder(Mode::Shared).create() {
        Ok(network) => network,
        Err(error) => return format!("no network: {error}"),
    };
    let mut id = probe.interface_ids[0];
    id[15] ^= 0xaa;
    let extras = Extras { on_network: true, ..Extras::default() };
    let port = describe(&config(id, true), &extras, &system)
        .and_then(|description| Port::start(&description, Some(&network), system, TIMEOUTS));
    match port {
        Ok(port) => format!("started: {:?}", port.parameters),
        Err(error) => format!("not started: {error}"),
    }
}

fn right_after_start(_: &Pair, probe: &Probe, system: System) -> String {
    let mut id = probe.interface_ids[1];
    id[15] ^= 0xaa;
    let mut answer = String::new();
    let started =
        describe(&config(id, false), &Extras::default(), &system).and_then(|description| {
            Port::start_with(&description, None, system, TIMEOUTS, |interface| {
                let read = Buffers::new(1, 2048, 1).call(vmnet_read, interface, 1);
                let macs = [[2, 0, 0, 0, 0, 1], [0xff; 6]];
                let write = Buffers::filled(1, 60, 1, macs).call(vmnet_write, interface, 1);
                answer = format!("before the handler: read {read:?}, write {write:?}");
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
    thread::sleep(time);
    let sent = pair.send(8);
    let (arrived, events) = (pair.drain(), pair.events());
    format!("afterwards {sent} of 8 were taken, {arrived} arrived, {events} events in all")
}

fn queue_depth(pair: &Pair, _: &Probe, _: System) -> String {
    let sent = pair.send(8192);
    let arrived = pair.drain();
    format!("{sent} sent and none read meanwhile: {arrived} waited")
}

fn shared_mapping(pair: &Pair, _: &Probe, _: System) -> String {
    let Ok(mut memory) = memmap2::MmapOptions::new().len(64 * 1024).map_anon() else {
        return "no memory".to_owned();
    };
    let mut buffers = Buffers::filled(1, 60, 1, pair.macs);
    memory[..60].copy_from_slice(&buffers.bytes[0]);
    buffers.iovecs[0][0].iov_base = memory.as_mut_ptr().cast();
    let write = buffers.write(&pair.ports[0], 1);
    thread::sleep(Duration::from_millis(50));
    let mut buffers = Buffers::new(1, pair.max, 1);
    buffers.iovecs[0][0].iov_base = memory.as_mut_ptr().cast();
    let read = buffers.read(&pair.ports[1], 1);
    format!(
        "write {write:?}, read {read:?} (memory that a hypervisor has mapped needs its entitlement \
         and is not asked)"
    )
}

fn shortest_frame(pair: &Pair, _: &Probe, _: System) -> String {
    let mut answer = String::new();
    for size in [1, 4, 13, 14, 15, 59, 60] {
        let written = Buffers::filled(1, size, 1, pair.macs).write(&pair.ports[0], 1);
        let _ = write!(answer, "{size} bytes: {written:?}; ");
    }
    answer
}
