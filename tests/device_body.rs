//! Every device behaves alike. One body runs on loopback, embedded, vmnet (simulated), TAP and sockets;
//! plain, under faults, as a completion engine, and recorded; driven in each of the three ways; with
//! packets in frames, and with every other packet in the memory of a guest, there also with buffers that
//! are smaller than a packet.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use vmring::device::fault::Faults;
use vmring::device::pcap::Capture;
use vmring::pool::HEADROOM_DEFAULT;
use vmring::{
    Direction, Driver, Frame, GuestBuffer, Interface, InterfaceBuilder, Loopback, Poller,
    RetryPolicy, Ring, RingOp,
};

use crate::guest_memory::Guest;
use crate::sockets::Wire;
use crate::support::{
    Way, every_way, guarded, packet_between, quiet_network, scaled, stage, unique,
};

const MTU: u32 = 9000;
const MAX: usize = MTU as usize + 14;
const SIZES: [usize; 4] = [14, 60, 1514, MAX];
const WRITES: u32 = 16;
const READS: u32 = 64;
/// Packets under way per lane. There are more reads posted at the receiver, so a network that drops
/// packets without a posted read drops none.
const WINDOW: u64 = 48;
/// The bytes of a small buffer, and how many packets are under way: 64 reads, of which half are small,
/// have space for them.
const SMALL: u32 = 2048;
const MERGEABLE_WINDOW: u64 = 12;

/// Where the packets of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Memory {
    Frames,
    /// Every other one in the memory of a guest.
    Both,
    /// As `Both`, and a packet may fill several small reads.
    Mergeable,
}

/// A kind of device to test: how to start its two ends.
trait Kind {
    /// Wraps the driver of one end, and builds its interface.
    fn wrap(&self, builder: InterfaceBuilder, inner: impl Driver)
    -> Box<dyn FnOnce() -> Interface>;

    /// Whether it keeps the order of packets and completions.
    fn ordered(&self) -> bool {
        true
    }

    /// Where packets can be, over a device that can merge reads. A wrapper cannot.
    fn memories(&self) -> &'static [Memory] {
        &UNMERGED
    }
}

const UNMERGED: [Memory; 2] = [Memory::Frames, Memory::Both];

fn start(builder: InterfaceBuilder, driver: impl Driver) -> Box<dyn FnOnce() -> Interface> {
    Box::new(move || builder.mtu(MTU).device(driver).start().expect("the device starts"))
}

struct Plain;

impl Kind for Plain {
    fn wrap(
        &self,
        builder: InterfaceBuilder,
        inner: impl Driver,
    ) -> Box<dyn FnOnce() -> Interface> {
        start(builder, inner)
    }

    fn memories(&self) -> &'static [Memory] {
        &[Memory::Frames, Memory::Both, Memory::Mergeable]
    }
}

struct Faulty {
    faults: Faults,
    ordered: bool,
}

impl Kind for Faulty {
    fn wrap(
        &self,
        builder: InterfaceBuilder,
        inner: impl Driver,
    ) -> Box<dyn FnOnce() -> Interface> {
        start(builder, self.faults.clone().wrap(inner))
    }

    fn ordered(&self) -> bool {
        self.ordered
    }
}

struct Recorded(Capture);

impl Kind for Recorded {
    fn wrap(
        &self,
        builder: InterfaceBuilder,
        inner: impl Driver,
    ) -> Box<dyn FnOnce() -> Interface> {
        start(builder, self.0.wrap("end", inner))
    }
}

/// Short batches, exhaustion, and wake-ups that come late or twice.
fn troubled(seed: u64) -> Faulty {
    let faults = Faults::seeded(seed)
        .short_batches(0.3)
        .exhaustion(0.2)
        .late_wakes(0.2, Duration::from_micros(300))
        .duplicate_wakes(0.3);
    Faulty { faults, ordered: true }
}

fn engine(seed: u64, reorder: bool) -> Faulty {
    let faults = Faults::seeded(seed).engine(Duration::from_micros(200), reorder);
    Faulty { faults, ordered: !reorder }
}

/// One end: a ring, and what it has sent and received.
struct End {
    ring: Ring,
    interface: Interface,
    /// Number of packets submitted.
    sent: u64,
    sent_bytes: u64,
    /// Numbers of the writes that have not completed, in submission order.
    written: VecDeque<u64>,
    received: u64,
    received_bytes: u64,
    /// If the order is not kept: packets sent to this end and not yet received, with their count.
    expected: HashMap<Vec<u8>, u32>,
    spare: Vec<Frame>,
    guest: Guest,
    memory: Memory,
    /// The parts of a packet that have come, and how many more there are.
    parts: (Vec<u8>, u16),
}

impl End {
    fn new(interface: Interface, memory: Memory, way: Way, poller: &Poller) -> Self {
        let guest = Guest::new((READS + WRITES) as usize, MAX);
        let ring = interface
            .ring(Direction::Both)
            .read_depth(READS)
            .write_depth(WRITES)
            .drive(way.drive(poller))
            .retry(RetryPolicy { attempts: 1_000_000, delay: Duration::from_micros(20) })
            // Let the indices wrap.
            .start_index(u32::MAX - 100)
            .segment_table(guest.table())
            .mergeable_reads(memory == Memory::Mergeable)
            .build()
            .expect("a ring");
        let mut end = Self {
            ring,
            interface,
            sent: 0,
            sent_bytes: 0,
            written: VecDeque::new(),
            received: 0,
            received_bytes: 0,
            expected: HashMap::new(),
            spare: Vec::new(),
            guest,
            memory,
            parts: (Vec::new(), 0),
        };
        end.spare.extend(std::iter::from_fn(|| end.ring.alloc()));
        assert_eq!(end.spare.len() as u32, READS + WRITES);
        let frames: Vec<_> = end.spare.drain(..READS as usize).zip(1_000_000..).collect();
        if memory == Memory::Frames {
            let posted = end.ring.submit_reads(frames).expect("reads are taken");
            assert_eq!(posted as u32, READS);
        } else {
            for (frame, number) in frames {
                if number % 2 == 0 {
                    end.ring.submit_read(frame, number).expect("a read is taken");
                } else {
                    let buffer = end.buffer(number);
                    end.ring.submit_read_guest(buffer, number).expect("a read");
                    end.spare.push(frame);
                }
            }
        }
        assert_eq!(end.ring.split().0.read_credits(), 0);
        end
    }

    fn mac(&self) -> [u8; 6] {
        self.interface.mac().into_array()
    }

    /// A buffer of the guest's for a read.
    fn buffer(&mut self, number: u64) -> GuestBuffer {
        match self.memory {
            Memory::Mergeable => self.guest.buffer_of(number, SMALL),
            _ => self.guest.buffer(number),
        }
    }

    /// How many packets to this end may be under way.
    fn window(&self) -> u64 {
        if self.memory == Memory::Mergeable { MERGEABLE_WINDOW } else { WINDOW }
    }
}

fn size_of(number: u64) -> usize {
    SIZES[(number % SIZES.len() as u64) as usize]
}

/// Goal: packets arrive in order, intact, with the right size and at the right position in their
/// frame, in full duplex. Write completions come in submission order, every credit comes back, and
/// the counters agree. Method: one or two ends, each of which sends `count` packets to the next
/// within a window.
fn body(
    make: Vec<Box<dyn FnOnce() -> Interface>>,
    memory: Memory,
    ordered: bool,
    way: Way,
    poller: &Poller,
) {
    let count = scaled(400);
    let start = |start: Box<dyn FnOnce() -> Interface>| End::new(start(), memory, way, poller);
    let mut ends: Vec<End> = make.into_iter().map(start).collect();
    let n = ends.len();
    let macs: Vec<[u8; 6]> = ends.iter().map(End::mac).collect();
    let bytes = |from: usize, number: u64| {
        packet_between(macs[from], macs[(from + 1) % n], number, size_of(number))
    };
    while ends.iter().any(|end| end.received < count || !end.written.is_empty()) {
        let mut moved = false;
        for from in 0..n {
            let to = (from + 1) % n;
            moved |= send(&mut ends, from, to, count, ordered, &bytes);
            let before = (from + n - 1) % n;
            moved |= receive(&mut ends[from], ordered, |number| bytes(before, number));
        }
        stage(format!(
            "{way:?}, {memory:?}: received {:?} of {count}",
            ends.iter().map(|end| end.received).collect::<Vec<_>>()
        ));
        if !moved {
            for end in &mut ends {
                end.ring.wait(1, Some(Duration::from_millis(1)));
            }
        }
    }

    stage(format!("{way:?}: the end"));
    for i in 0..n {
        let sender_bytes = ends[(i + n - 1) % n].sent_bytes;
        let end = &mut ends[i];
        assert_eq!(end.received_bytes, sender_bytes);
        assert!(end.expected.values().all(|count| *count == 0), "packets are missing");
        let stats = end.ring.stats();
        assert_eq!((stats.rx_packets, stats.rx_bytes), (count, end.received_bytes), "{stats:?}");
        assert_eq!((stats.tx_packets, stats.tx_bytes), (count, end.sent_bytes), "{stats:?}");
        assert_eq!((stats.errors, stats.exhausted, stats.abandoned, stats.cancelled), (0, 0, 0, 0));
        assert!((1..=count).contains(&stats.read_batches.count()));
        assert!((1..=count).contains(&stats.write_batches.count()));
        // Only the posted reads are in flight, and they come back.
        assert_eq!(end.ring.in_flight() as u32, READS);
        end.ring.cancel_and_wait(crate::support::LONG).expect("it lets go");
        end.spare.extend(end.ring.reap().filter_map(|done| done.take_frame()));
        assert_eq!(end.spare.len() as u32, READS + WRITES, "a frame is missing");
        assert_eq!(end.guest.table().slots_in_use(), 0, "a guest's buffer is missing");
        if memory == Memory::Frames {
            assert_eq!((stats.bounced_reads, stats.bounced_writes), (0, 0));
        }
        let (mut sq, _) = end.ring.split();
        assert_eq!((sq.read_credits(), sq.write_credits()), (READS, WRITES));
        let drops = end.interface.drops();
        assert!(drops.iter().all(|(_, n)| *n == 0), "{drops:?}");
    }
    for mut end in ends {
        end.ring.close().expect("it closes");
        end.interface.stop(crate::support::LONG).expect("it stops");
    }
}

fn send(
    ends: &mut [End],
    from: usize,
    to: usize,
    count: u64,
    ordered: bool,
    bytes: &impl Fn(usize, u64) -> Vec<u8>,
) -> bool {
    if ends[from].memory != Memory::Frames {
        return send_both(ends, from, to, count, ordered, bytes);
    }
    let under_way = ends[from].sent - ends[to].received;
    let window = ends[to].window().saturating_sub(under_way).min(count - ends[from].sent);
    let mut unsent = Vec::new();
    for number in ends[from].sent..ends[from].sent + window {
        let Some(mut frame) = ends[from].spare.pop() else { break };
        frame.reset();
        frame.copy_from(&bytes(from, number)).expect("a packet fits");
        unsent.push((frame, number));
    }
    // The iterator may offer more entries than there are credits. The rest stays in it.
    let mut offer = unsent.into_iter();
    let taken = ends[from].ring.submit_writes(offer.by_ref()).expect("writes are taken");
    for number in ends[from].sent..ends[from].sent + taken as u64 {
        ends[from].written.push_back(number);
        ends[from].sent_bytes += size_of(number) as u64;
        if !ordered {
            *ends[to].expected.entry(bytes(from, number)).or_default() += 1;
        }
    }
    ends[from].sent += taken as u64;
    ends[from].spare.extend(offer.map(|(frame, _)| frame));
    taken > 0
}

/// As [`send`], one by one, with every other packet in the memory of a guest.
fn send_both(
    ends: &mut [End],
    from: usize,
    to: usize,
    count: u64,
    ordered: bool,
    bytes: &impl Fn(usize, u64) -> Vec<u8>,
) -> bool {
    let under_way = ends[from].sent - ends[to].received;
    let window = ends[to].window().saturating_sub(under_way).min(count - ends[from].sent);
    let before = ends[from].sent;
    for number in before..before + window {
        let end = &mut ends[from];
        let packet = bytes(from, number);
        let taken = if number % 2 == 0 {
            let Some(mut frame) = end.spare.pop() else { break };
            frame.reset();
            frame.copy_from(&packet).expect("a packet fits");
            end.ring.submit_write(frame, number).map_err(|refused| {
                assert!(refused.is_backpressure(), "{refused}");
                end.spare.push(refused.frame);
            })
        } else {
            let buffer = end.guest.packet(number, &packet);
            end.ring.submit_write_guest(buffer, number).map_err(|refused| {
                assert!(refused.is_backpressure(), "{refused}");
                end.guest.free(number);
            })
        };
        if taken.is_err() {
            break;
        }
        end.written.push_back(number);
        end.sent_bytes += packet.len() as u64;
        end.sent += 1;
        if !ordered {
            *ends[to].expected.entry(packet).or_default() += 1;
        }
    }
    ends[from].sent > before
}

fn receive(end: &mut End, ordered: bool, bytes: impl Fn(u64) -> Vec<u8>) -> bool {
    let mut moved = false;
    let (mut sq, mut cq) = end.ring.split();
    for done in cq.reap() {
        moved = true;
        let len = done.result.expect("nothing fails");
        let (number, more, packet) = (done.user_data, done.more, done.take_frame());
        let is_guests = end.memory != Memory::Frames && number % 2 == 1;
        assert_eq!(packet.is_none(), is_guests, "a guest's packet has no frame");
        match done.op {
            RingOp::Read => {
                let (parts, left) = &mut end.parts;
                let is_first = parts.is_empty();
                assert!(is_first || more + 1 == *left, "something is between the parts");
                match &packet {
                    Some(frame) => {
                        assert_eq!((frame.len(), frame.headroom()), (len, HEADROOM_DEFAULT));
                        parts.extend(&frame[..]);
                    }
                    None if is_first => {
                        let (header, bytes) = end.guest.bytes(number, len);
                        assert_eq!(header[..10], [0; 10]);
                        assert_eq!(header[10..], (more + 1).to_le_bytes());
                        parts.extend(bytes);
                    }
                    None => parts.extend(&end.guest.all_bytes(number)[..len]),
                }
                *left = more;
                end.received_bytes += len as u64;
                if more == 0 {
                    let arrived = std::mem::take(parts);
                    if ordered {
                        let expected = bytes(end.received);
                        assert_eq!(arrived.len(), expected.len(), "packet {}", end.received);
                        assert!(arrived == expected, "packet {} differs", end.received);
                    } else {
                        let left = end.expected.get_mut(&arrived).expect("it was sent like this");
                        *left = left.checked_sub(1).expect("it came twice");
                    }
                    end.received += 1;
                }
                match packet {
                    Some(frame) => sq.submit_read(frame, number).expect("a credit"),
                    None => {
                        end.guest.free(number);
                        let buffer = match end.memory {
                            Memory::Mergeable => end.guest.buffer_of(number, SMALL),
                            _ => end.guest.buffer(number),
                        };
                        sq.submit_read_guest(buffer, number).expect("a credit");
                    }
                }
            }
            RingOp::Write => {
                let at = match ordered {
                    true => Some(0),
                    false => end.written.iter().position(|number| *number == done.user_data),
                };
                let number = at.and_then(|at| end.written.remove(at));
                assert_eq!(number, Some(done.user_data), "writes complete in submission order");
                assert_eq!(len, size_of(done.user_data));
                match packet {
                    Some(frame) => end.spare.push(frame),
                    None => end.guest.free(done.user_data),
                }
            }
            _ => panic!("nothing was cancelled"),
        }
    }
    moved
}

fn every_case(memories: &[Memory], mut body: impl FnMut(Memory, Way, &Poller)) {
    for memory in memories {
        every_way(|way, poller| body(*memory, way, poller));
    }
}

fn on_loopback(kind: &impl Kind) {
    every_case(kind.memories(), |memory, way, poller| {
        let end = kind.wrap(Interface::builder(), Loopback::new(1500));
        body(vec![end], memory, kind.ordered(), way, poller);
    });
}

fn on_embedded(kind: &impl Kind) {
    every_case(kind.memories(), |memory, way, poller| {
        let network = unique("body");
        let end = || kind.wrap(Interface::builder(), quiet_network(network.clone()));
        body(vec![end(), end()], memory, kind.ordered(), way, poller);
    });
}

/// Runs on the macOS driver over the simulated vmnet, which aborts on a misuse.
#[cfg(not(target_os = "macos"))]
fn on_vmnet(kind: &impl Kind) {
    every_case(&UNMERGED, |memory, way, poller| {
        // It is not known whether vmnet keeps references to the objects it is given. Test both.
        let retains = way == Way::Thread;
        let world = vmnet_sim::World::with(vmnet_sim::Rules::Strict, retains);
        let end = || {
            let builder = Interface::builder().interface_id(world.interface_id());
            kind.wrap(builder, vmring::Vmnet::new())
        };
        body(vec![end(), end()], memory, kind.ordered(), way, poller);
        assert_eq!(world.unreleased(crate::support::LONG), [""; 0]);
    });
}

/// Runs on two TAPs on a bridge, in their own network namespace.
#[cfg(target_os = "linux")]
fn on_tap(engine: vmring::TapEngine, kind: impl Kind + Send + 'static) {
    use crate::netns::{in_namespace, sh};
    in_namespace(move || {
        sh("ip link add br0 mtu 9000 type bridge mcast_snooping 0 && ip link set br0 up");
        every_case(kind.memories(), |memory, way, poller| {
            let end = |name: &str| {
                let builder = Interface::builder().mode(vmring::Mode::Bridged("br0".to_owned()));
                kind.wrap(builder, vmring::Tap::named(name).engine(engine))
            };
            body(vec![end("left"), end("right")], memory, kind.ordered(), way, poller);
            // Wait: a program that another test starts inherits our descriptors and keeps them
            // until its exec.
            crate::support::eventually("the interfaces take their TAPs with them", || {
                sh("ip -o link show type tun").is_empty()
            });
        });
    });
}

/// Runs on the two ends of a socket pair.
fn on_socket(wire: Wire, kind: &impl Kind) {
    every_case(&UNMERGED, |memory, way, poller| {
        let [one, other] = wire.pair().map(|socket| kind.wrap(Interface::builder(), socket));
        body(vec![one, other], memory, kind.ordered(), way, poller);
    });
}

fn sink() -> Capture {
    Capture::to_writer(std::io::sink()).expect("a capture")
}

macro_rules! on_every_device {
    ($($name:ident: $kind:expr;)+) => {$(
        mod $name {
            use super::*;

            #[test]
            fn loopback() {
                guarded(|| on_loopback(&$kind));
            }

            #[test]
            fn embedded() {
                guarded(|| on_embedded(&$kind));
            }

            #[cfg(not(target_os = "macos"))]
            #[test]
            fn vmnet() {
                guarded(|| on_vmnet(&$kind));
            }

            #[test]
            fn stream_socket() {
                guarded(|| on_socket(Wire::Stream, &$kind));
            }

            #[test]
            fn stream_socket_with_headers() {
                guarded(|| on_socket(Wire::StreamWithHeaders, &$kind));
            }

            #[test]
            fn datagram_socket() {
                guarded(|| on_socket(Wire::Datagram, &$kind));
            }

            #[test]
            fn datagram_socket_with_headers() {
                guarded(|| on_socket(Wire::DatagramWithHeaders, &$kind));
            }

            #[cfg(target_os = "linux")]
            #[test]
            fn socket_of_sequenced_packets() {
                guarded(|| on_socket(Wire::Seqpacket, &$kind));
            }

            #[cfg(target_os = "linux")]
            #[test]
            fn socket_of_sequenced_packets_with_headers() {
                guarded(|| on_socket(Wire::SeqpacketWithHeaders, &$kind));
            }

            #[cfg(target_os = "linux")]
            #[test]
            fn tap_by_io_uring() {
                on_tap(vmring::TapEngine::IoUring, $kind);
            }

            #[cfg(target_os = "linux")]
            #[test]
            fn tap_by_plain_calls() {
                on_tap(vmring::TapEngine::Plain, $kind);
            }
        }
    )+};
}

on_every_device! {
    plain: Plain;
    with_short_batches_exhaustion_and_bad_wakes: troubled(1);
    as_a_completion_engine: engine(2, false);
    as_a_completion_engine_out_of_order: engine(3, true);
    recorded: Recorded(sink());
}
