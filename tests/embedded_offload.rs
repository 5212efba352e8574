//! Offload between interfaces of one embedded network, through rings: in frames and in the memory of
//! guests, and whatever the two interfaces negotiated.

use std::collections::HashMap;

use vmring::device::Progress;
use vmring::device::fault::Faults;
use vmring::{
    ConfigError, Direction, Drive, EntryError, Error, Frame, Gso, Interface, Loopback, MacAddr6,
    OFFLOAD_LEN, OffloadHeader, Poller, Ring, RingOp, Status, SubmitErrorKind,
};
use vmring_embedded::software::{self, Left};

use crate::form::{ALL, Form, Random, finished, offloads};
use crate::guest_memory::{Guest, HEADER};
use crate::support::{
    LONG, Script, ScriptQueue, Way, every_way, guarded, quiet_network, scaled, stage, unique,
};

const READS: u32 = 32;
const WRITES: u32 = 8;
/// The number of a write is this or above.
const FIRST_WRITE: u64 = 1_000_000;
/// The bytes of a small buffer of a guest, which a mergeable ring has. One frame of the network fits.
const SMALL: u32 = 4096;

/// Where the packets of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Frames,
    /// Every other one in the memory of a guest.
    Both,
    /// As `Both`, and a packet may fill several small reads.
    Mergeable,
}

/// An interface with its ring and its guest.
struct Station {
    interface: Interface,
    ring: Ring,
    guest: Guest,
    memory: Memory,
    spare: Vec<Frame>,
    next_write: u64,
    writing: usize,
    /// The parts of a packet that is not complete: the first one's header, and the bytes.
    parts: Option<(OffloadHeader, Vec<u8>, u16)>,
    /// What has arrived, made such as a receiver without offload sees it.
    arrived: Vec<Vec<u8>>,
    failed: Vec<EntryError>,
}

impl Station {
    fn start(network: &str, set: u32, memory: Memory, drive: Drive<'_>) -> Self {
        let driver = quiet_network(network).overflow(256);
        let builder = Interface::builder().offloads(offloads(set)).device(driver);
        let interface = builder.start().expect("a port");
        let caps = interface.capabilities();
        assert_eq!(caps.offloads.virtio_header, set != 0);
        assert_eq!(caps.headroom as usize, if set == 0 { 0 } else { OFFLOAD_LEN });
        assert_eq!(caps.max_packet_size, if set & !1 == 0 { 1518 } else { 65_553 });
        let guest = Guest::new((READS + WRITES) as usize, caps.max_packet_size as usize);
        let builder = interface.ring(Direction::Both).read_depth(READS).write_depth(WRITES);
        let builder = builder.drive(drive).segment_table(guest.table());
        let builder = builder.mergeable_reads(memory == Memory::Mergeable);
        let ring = builder.build().expect("a ring");
        let mut station = Self {
            interface,
            ring,
            guest,
            memory,
            spare: Vec::new(),
            next_write: FIRST_WRITE,
            writing: 0,
            parts: None,
            arrived: Vec::new(),
            failed: Vec::new(),
        };
        station.spare.extend(std::iter::from_fn(|| station.ring.alloc()));
        (0..u64::from(READS)).for_each(|number| station.post(number));
        station
    }

    fn mac(&self) -> MacAddr6 {
        self.interface.mac()
    }

    /// Whether the read or write of this number has a guest's buffer.
    fn is_guests(&self, number: u64) -> bool {
        self.memory != Memory::Frames && number % 2 == 1
    }

    fn post(&mut self, number: u64) {
        if self.is_guests(number) {
            let buffer = match self.memory {
                Memory::Mergeable => {
                    let longest = self.interface.capabilities().max_packet_size + HEADER;
                    self.guest.buffer_of(number, SMALL.min(longest))
                }
                _ => self.guest.buffer(number),
            };
            self.ring.submit_read_guest(buffer, number).expect("a credit");
        } else {
            let frame = self.spare.pop().expect("a frame");
            self.ring.submit_read(frame, number).expect("a credit");
        }
    }

    /// Sends a packet. Returns false, and sends nothing, if it is refused at once.
    fn send(&mut self, packet: &[u8], header: &OffloadHeader) -> bool {
        let number = self.next_write;
        self.next_write += 1;
        if self.is_guests(number) {
            let mut buffer = self.guest.packet(number, packet);
            let mut bytes = [0; OFFLOAD_LEN];
            header.write(&mut bytes);
            assert!(buffer.set_header(&bytes));
            self.ring.submit_write_guest(buffer, number).expect("a credit");
        } else {
            let mut frame = self.spare.pop().expect("a frame");
            frame.reset();
            frame.copy_from(packet).expect("it fits");
            frame.set_offload(header).expect("there is headroom");
            if let Err(refused) = self.ring.submit_write(frame, number) {
                assert_eq!(refused.kind, SubmitErrorKind::OffloadNotNegotiated);
                self.spare.push(refused.frame);
                return false;
            }
        }
        self.writing += 1;
        true
    }

    /// Takes what has completed, and posts the reads again. Returns whether there was anything.
    fn take(&mut self) -> bool {
        let mut done = Vec::new();
        for completion in self.ring.reap() {
            let more = completion.more;
            let op = completion.op;
            let (number, result, frame) = completion.into_parts();
            done.push((op, number, result, frame, more));
        }
        let moved = !done.is_empty();
        for (op, number, result, frame, more) in done {
            assert_eq!(frame.is_none(), self.is_guests(number));
            match op {
                RingOp::Read => {
                    let len = result.expect("no read fails");
                    self.take_part(number, len, frame.as_ref(), more);
                }
                _ => {
                    self.writing -= 1;
                    self.failed.extend(result.err());
                }
            }
            match frame {
                Some(frame) => self.spare.push(frame),
                None => self.guest.free(number),
            }
            if op == RingOp::Read {
                self.post(number);
            }
        }
        moved
    }

    fn take_part(&mut self, number: u64, len: usize, frame: Option<&Frame>, more: u16) {
        let negotiated = self.interface.capabilities().offloads;
        let is_first = self.parts.is_none();
        let (header, bytes) = match frame {
            Some(frame) => {
                assert_eq!(frame.len(), len);
                let header = frame.offload().expect("a sound header");
                assert_eq!(header.is_some(), negotiated.virtio_header && is_first);
                let plain = OffloadHeader { num_buffers: 1, ..OffloadHeader::NONE };
                (header.unwrap_or(plain), frame.to_vec())
            }
            None => {
                let all = self.guest.all_bytes(number);
                let at = if is_first { HEADER as usize } else { 0 };
                let header = all.first_chunk().filter(|_| is_first);
                let header = header.map(|bytes| OffloadHeader::parse(bytes).expect("sound"));
                (header.unwrap_or_default(), all[at..at + len].to_vec())
            }
        };
        let (_, packet, left) = self.parts.get_or_insert((header, Vec::new(), more));
        assert_eq!(*left, more);
        *left = left.saturating_sub(1);
        packet.extend(bytes);
        if is_first {
            assert_eq!(header.num_buffers, more + 1, "{header:?}");
        }
        if more > 0 {
            return;
        }
        let (header, packet, _) = self.parts.take().expect("it was just there");
        assert_eq!(software::left_by(&negotiated, &header), Left::Nothing, "{header:?}");
        match header.is_plain() {
            true => self.arrived.push(packet),
            false => self.arrived.extend(finished(&packet, &header)),
        }
    }
}

/// Takes what completes until every station has what is expected of it, and nothing more.
fn settle(stations: &mut [Station], expected: &mut HashMap<usize, Vec<Vec<u8>>>) {
    let start = std::time::Instant::now();
    let missing = |stations: &[Station], expected: &HashMap<usize, Vec<Vec<u8>>>| {
        let lacks =
            |(to, frames): (&usize, &Vec<Vec<u8>>)| stations[*to].arrived.len() < frames.len();
        expected.iter().any(lacks) || stations.iter().any(|station| station.writing > 0)
    };
    while missing(stations, expected) {
        let mut moved = false;
        for station in stations.iter_mut() {
            moved |= station.take();
        }
        if !moved {
            assert!(start.elapsed() < LONG, "packets are missing");
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }
    for (to, station) in stations.iter_mut().enumerate() {
        let frames = expected.remove(&to).unwrap_or_default();
        let arrived = std::mem::take(&mut station.arrived);
        assert_eq!(arrived.len(), frames.len());
        assert!(arrived == frames, "the packets to {to} differ");
    }
}

/// Goal: between any two interfaces, and from one to all, each gets what it negotiated, and what comes
/// out of it is what a receiver without offload must see: all of it, and in order. Method: an interface
/// of each of the 16 sets, random packets, and `software` on the whole packet beside it.
fn body(memory: Memory, way: Way, poller: &Poller) {
    let network = unique("offload");
    let start = |set| Station::start(&network, set, memory, way.drive(poller));
    let mut stations: Vec<_> = (0..16).map(start).collect();
    let macs: Vec<_> = stations.iter().map(Station::mac).collect();
    let random = &mut Random(11);
    // A packet for which too few small buffers are posted may be dropped, so there is one at a time.
    let burst = if memory == Memory::Mergeable { 1 } else { 4 };
    let (mut sent, mut refused, mut cut) = (0, 0, 0);
    let rounds = scaled(150) as usize;
    for round in 0..rounds {
        stage(format!("{memory:?} {way:?} round {round}"));
        let mut expected: HashMap<usize, Vec<Vec<u8>>> = HashMap::new();
        let (mut failing, from) = (0, random.below(16));
        for number in 0..burst {
            let to = (from + 1 + random.below(15)) % 16;
            let to_all = random.below(10) == 0;
            let form = Form::random(random);
            let limit = stations[from].interface.capabilities().max_packet_size as usize;
            let group = MacAddr6::new(1, 0, 0x5e, 0, 0, 1);
            let destination = if to_all { group } else { macs[to] };
            let (packet, mut header) = form.build(destination, macs[from], number);
            let own = stations[from].interface.capabilities().offloads;
            if packet.len() > limit || !own.virtio_header && random.below(2) == 0 {
                continue;
            }
            // A packet of which nothing is left goes to all kinds of interfaces too.
            let plain = header.gso == Gso::None && random.below(3) == 0;
            let frames = finished(&packet, &header);
            let packet = if plain { frames[0].clone() } else { packet };
            header = if plain { OffloadHeader::NONE } else { header };
            let allowed = software::left_by(&own, &header) == Left::Nothing;
            match (stations[from].send(&packet, &header), allowed) {
                (true, true) => {
                    sent += 1;
                    cut += usize::from(frames.len() > 1);
                    let all = (0..16).filter(|other| *other != from);
                    all.filter(|other| to_all || *other == to)
                        .for_each(|to| expected.entry(to).or_default().extend(frames.clone()));
                }
                // A guest's header is read later, and its write fails then.
                (true, false) => failing += 1,
                (false, false) => refused += 1,
                (false, true) => panic!("{header:?} was refused"),
            }
        }
        settle(&mut stations, &mut expected);
        let failed = std::mem::take(&mut stations[from].failed);
        assert_eq!(failed.len(), failing);
        assert!(failed.iter().all(|error| *error == EntryError::Device(Status::InvalidArgument)));
        refused += failing;
    }
    // Under a sanitizer there are fewer rounds.
    let all_kinds = sent > rounds / 15 && cut >= rounds / 50 && refused >= rounds / 50;
    assert!(all_kinds, "{sent} {cut} {refused} in {rounds} rounds");
    for mut station in stations {
        let drops = station.interface.drops();
        assert!(drops.iter().all(|(_, count)| *count == 0), "{drops:?}");
        station.ring.cancel_and_wait(LONG).expect("it lets go");
        station.spare.extend(station.ring.reap().filter_map(|done| done.take_frame()));
        assert_eq!(station.spare.len() as u32, READS + WRITES, "a frame is missing");
        assert_eq!(station.guest.table().slots_in_use(), 0, "a guest's buffer is missing");
        let stats = station.ring.stats();
        // A guest's buffer is used as it is, so each packet is copied once.
        assert_eq!((stats.bounced_reads, stats.bounced_writes), (0, 0));
        station.ring.close().expect("it closes");
    }
}

#[test]
fn every_set_of_offloads_in_frames() {
    guarded(|| every_way(|way, poller| body(Memory::Frames, way, poller)));
}

#[test]
fn every_set_of_offloads_in_the_memory_of_guests() {
    guarded(|| every_way(|way, poller| body(Memory::Both, way, poller)));
}

#[test]
fn every_set_of_offloads_over_several_reads() {
    guarded(|| every_way(|way, poller| body(Memory::Mergeable, way, poller)));
}

/// Goal: a guest's hostile header costs its packet, and the interface goes on.
#[test]
fn a_hostile_header_of_a_guest_fails_its_write() {
    guarded(|| {
        let network = unique("offload");
        let start = |set| Station::start(&network, set, Memory::Both, Drive::Inline);
        let mut stations = vec![start(ALL), start(0)];
        let (from, to) = (stations[0].mac(), stations[1].mac());
        let form = Form { v4: true, tcp: true, tagged: false, payload: 3000, segment: Some(1000) };
        let (packet, header) = form.build(to, from, 0);
        let mut good = [0; OFFLOAD_LEN];
        header.write(&mut good);
        // The byte of the header that is other than it should be, and its value.
        let hostile = [
            (0, 0x80), // a reserved flag
            (0, 4),    // coalesced segments
            (0, 0),    // segments without a checksum
            (1, 7),    // no such type
            (3, 0xff), // headers that are longer than the packet
            (6, 13),   // a sum that begins in the Ethernet header
            (8, 20),   // the checksum field of no protocol
        ];
        let mut failing = 0;
        for (at, value) in hostile {
            let mut bytes = good;
            bytes[at] = value;
            // An odd number, so that it is a guest's.
            let number = 2 * stations[0].next_write + 1;
            let mut buffer = stations[0].guest.packet(number, &packet);
            assert!(buffer.set_header(&bytes));
            stations[0].ring.submit_write_guest(buffer, number).expect("a credit");
            stations[0].writing += 1;
            failing += 1;
            stations[0].next_write += 1;
            settle(&mut stations, &mut HashMap::new());
        }
        let failed = std::mem::take(&mut stations[0].failed);
        assert_eq!(failed, vec![EntryError::Device(Status::InvalidArgument); failing]);
        for _ in 0..2 {
            assert!(stations[0].send(&packet, &header));
        }
        let frames = finished(&packet, &header);
        let mut expected = HashMap::from([(1, [&frames[..], &frames[..]].concat())]);
        settle(&mut stations, &mut expected);
        let counters = stations[0].interface.counters();
        assert!(counters.contains(&("cut in software", 2)), "{counters:?}");
    });
}

/// Goal: a ring gets what it accepts, in frames that have space for no more, whoever wraps its device;
/// and the next ring of the interface may accept more again.
#[test]
fn a_ring_gets_what_it_accepts() {
    guarded(|| {
        let network = unique("accepting");
        let start = |faulty: bool| {
            let embedded = quiet_network(&network);
            let builder = Interface::builder().offloads(offloads(ALL));
            let builder = match faulty {
                false => builder.device(embedded),
                true => builder.device(Faults::seeded(1).wrap(embedded)),
            };
            builder.start().expect("a port")
        };
        for wrapped in [false, true] {
            let (from, to) = (start(false), start(wrapped));
            let mut sender = from.ring(Direction::Write).drive(Drive::Inline).build().unwrap();
            let form =
                Form { v4: true, tcp: true, tagged: false, payload: 3000, segment: Some(1000) };
            let (packet, header) = form.build(to.mac(), from.mac(), 0);
            let segments = finished(&packet, &header);
            for (set, count) in [(0, 3), (1, 3), (ALL, 1), (1, 3), (ALL, 1)] {
                let builder = to.ring(Direction::Read).drive(Drive::Inline).depth(8);
                let mut ring = builder.receive_offloads(offloads(set)).build().unwrap();
                let room = if set == ALL { 65_553 } else { 1518 };
                assert!((room..room + 200).contains(&ring.alloc().unwrap().capacity()), "{room}");
                while let Some(frame) = ring.alloc() {
                    ring.submit_read(frame, 0).unwrap();
                }
                assert_eq!(ring.reap().count(), 0);
                let mut write = sender.alloc().unwrap();
                write.copy_from(&packet).unwrap();
                write.set_offload(&header).unwrap();
                sender.submit_write(write, 1).unwrap();
                assert_eq!(
                    sender.reap().map(|done| done.result).collect::<Vec<_>>(),
                    [Ok(packet.len())]
                );
                let mut frames = Vec::new();
                for done in ring.reap() {
                    let frame = done.take_packet().unwrap();
                    let header = frame.offload().unwrap().expect("the header stays");
                    let mut accepted = offloads(set);
                    accepted.virtio_header = true;
                    assert_eq!(software::left_by(&accepted, &header), Left::Nothing);
                    match header.is_plain() {
                        true => frames.push(frame.to_vec()),
                        false => frames.extend(finished(&frame, &header)),
                    }
                    if set != ALL {
                        assert!(frame.len() < 1518);
                    } else {
                        assert_eq!((frame.len(), count), (packet.len(), 1));
                    }
                }
                assert_eq!(frames, segments, "{set}");
            }
        }
    });
}

/// Goal: a device that cannot do it refuses a ring that accepts less than its interface gives, and no
/// other.
#[test]
fn a_device_that_cannot_says_so() {
    let refuses = |interface: &Interface, direction, set: u32| {
        let builder = interface.ring(direction).receive_offloads(offloads(set));
        match builder.build() {
            Ok(_) => false,
            Err(Error::Config(ConfigError::NotApplicable { what: "receive offloads", .. })) => true,
            Err(error) => panic!("{error}"),
        }
    };
    let loopback = Interface::builder().device(Loopback::new(1500)).start().unwrap();
    assert!(!refuses(&loopback, Direction::Both, 0), "it leaves no work");
    let queue = |_, _| ScriptQueue::new(|_| Ok(Progress::Idle));
    let script = Script::new(queue).limits(|caps| {
        caps.offloads = offloads(ALL);
        (caps.offloads.virtio_header, caps.headroom) = (true, OFFLOAD_LEN as u32);
    });
    let script = script.start();
    assert!(!refuses(&script, Direction::Read, ALL));
    assert!(refuses(&script, Direction::Read, 1));
    let no_ecn = script.ring(Direction::Read).receive_ecn(false).build();
    assert!(matches!(no_ecn, Err(Error::Config(ConfigError::NotApplicable { .. }))));
    let network = unique("refusing");
    let embedded = Interface::builder().offloads(offloads(ALL)).device(quiet_network(network));
    let embedded = embedded.start().unwrap();
    assert!(refuses(&embedded, Direction::Write, 1), "a ring that only writes accepts nothing");
    assert!(!refuses(&embedded, Direction::Both, 1));
}
