//! Captures record exactly what was on the wire, in a file that another reader understands.

mod forms;
mod live;

use std::borrow::Cow;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pcap_file::DataLink;
use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionOption;
use pcap_file::pcapng::{Block, PcapNgReader};
use vmring::device::pcap::{Capture, Replay};
use vmring::{Direction, Error, Interface, Loopback, RetryPolicy, Ring, RingOp, Status};

use crate::support::{
    every_way, guarded, inline, number_of, packet, packet_between, post, quiet_network, reap_n,
    send, unique,
};

/// A writer whose bytes the test can read.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tape {
    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Recorded {
    interface: u32,
    inbound: bool,
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct File {
    /// Name and MAC of each interface.
    interfaces: Vec<(String, [u8; 6])>,
    packets: Vec<Recorded>,
    times: Vec<Duration>,
}

/// Reads a capture with another project's reader. Panics if that reader does not understand it.
fn parse(bytes: &[u8]) -> File {
    let mut reader = PcapNgReader::new(bytes).expect("a section header");
    let mut file = File::default();
    while let Some(block) = reader.next_block() {
        match block.expect("a whole block") {
            Block::InterfaceDescription(interface) => {
                assert_eq!(interface.linktype, DataLink::ETHERNET);
                let (mut name, mut mac, mut resolution) = (String::new(), [0; 6], 0);
                for option in &interface.options {
                    match option {
                        InterfaceDescriptionOption::IfName(text) => name = text.to_string(),
                        InterfaceDescriptionOption::IfMacAddr(address) => {
                            mac.copy_from_slice(address);
                        }
                        InterfaceDescriptionOption::IfTsResol(digits) => resolution = *digits,
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(resolution, 9, "nanoseconds");
                file.interfaces.push((name, mac));
            }
            Block::EnhancedPacket(packet) => {
                assert_eq!(packet.original_len as usize, packet.data.len());
                let [EnhancedPacketOption::Flags(flags)] = packet.options[..] else {
                    panic!("{:?}", packet.options)
                };
                assert!(flags == 1 || flags == 2, "inbound or outbound");
                assert!((packet.interface_id as usize) < file.interfaces.len());
                file.times.push(packet.timestamp);
                file.packets.push(Recorded {
                    interface: packet.interface_id,
                    inbound: flags == 1,
                    bytes: packet.data.into_owned(),
                });
            }
            other => panic!("{other:?}"),
        }
    }
    file
}

/// Goal: two interfaces record to one file. The direction is the one that each guest sees, the
/// bytes are unchanged, and the times are of today and never go back.
#[test]
fn two_interfaces_record_both_directions_to_one_file() {
    guarded(|| {
        every_way(|way, poller| {
            let today = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let (tape, network) = (Tape::default(), unique("capture"));
            let capture = Capture::to_writer(tape.clone()).unwrap();
            let start = |name: &str| {
                let driver = capture.wrap(name, quiet_network(network.clone()));
                Interface::builder().device(driver).start().unwrap()
            };
            let interfaces = [start("left"), start("right")];
            let mut rings = [0, 1].map(|i: usize| {
                let builder = interfaces[i].ring(Direction::Both).drive(way.drive(poller));
                builder.build().unwrap()
            });
            let macs = [0, 1].map(|i: usize| interfaces[i].mac().into_array());
            // Send packets of several sizes in both directions.
            let mut expected = Vec::new();
            for (number, size) in [(0, 14), (1, 60), (2, 1514), (3, 61), (4, 1000), (5, 22)] {
                let from = number % 2;
                let to = 1 - from;
                let bytes = packet_between(macs[from], macs[to], number as u64, size);
                post(&mut rings[to], 100);
                // If the rings are inline, drive the receiver, so that the network has its read
                // before the packet comes.
                rings[to].reap().for_each(drop);
                let mut frame = rings[from].alloc().unwrap();
                frame.copy_from(&bytes).unwrap();
                rings[from].submit_write(frame, number as u64).unwrap();
                assert_eq!(reap_n(&mut rings[from], 1)[0].result, Ok(size));
                let received = reap_n(&mut rings[to], 1).remove(0);
                assert_eq!(received.frame.unwrap()[..], bytes[..]);
                for (end, inbound) in [(from, false), (to, true)] {
                    let interface = end as u32;
                    expected.push(Recorded { interface, inbound, bytes: bytes.clone() });
                }
            }
            // Neither refused nor cancelled entries were on the wire.
            let runt = rings[0].alloc().unwrap();
            rings[0].submit_write(runt, 9).unwrap();
            let refused = Err(Status::InvalidArgument.into());
            assert_eq!(reap_n(&mut rings[0], 1)[0].result, refused);
            post(&mut rings[0], 10);
            assert_eq!(capture.packets(), 12);
            rings.into_iter().for_each(drop);
            capture.finish().unwrap();

            let file = parse(&tape.bytes());
            let names = [("left".to_owned(), macs[0]), ("right".to_owned(), macs[1])];
            assert_eq!(file.interfaces, names);
            // The sender's and the receiver's interface may record a packet in either order.
            let position = |packet: &Recorded| {
                let at = |other| expected.iter().position(|e| e == other);
                at(packet).expect("it was sent") / 2
            };
            assert_eq!(file.packets.len(), expected.len());
            assert!(file.packets.iter().map(position).is_sorted(), "{:?}", file.packets);
            assert!(expected.iter().all(|packet| file.packets.contains(packet)));
            assert!(file.times.is_sorted(), "{:?}", file.times);
            let hour = Duration::from_secs(3600);
            assert!(file.times.iter().all(|time| (today - hour..today + hour).contains(time)));
        });
    });
}

/// Records to a real file, which is complete once the interface is gone.
#[test]
fn a_capture_file_is_complete_when_its_rings_are_closed() {
    guarded(|| {
        let path = std::env::temp_dir().join(format!("vmring-{}.pcapng", std::process::id()));
        let capture = Capture::create(&path).unwrap();
        let driver = capture.wrap("loop", Loopback::new(1500));
        let interface = Interface::builder().device(driver).start().unwrap();
        let mut ring = interface.ring(Direction::Both).build().unwrap();
        for number in 0..100 {
            post(&mut ring, number);
            send(&mut ring, number);
            reap_n(&mut ring, 2);
        }
        ring.close().unwrap();
        // `finish` is not needed.
        let file = parse(&std::fs::read(&path).unwrap());
        assert_eq!(capture.packets(), 200);
        for (direction, inbound) in [("out", false), ("in", true)] {
            let packets = file.packets.iter().filter(|packet| packet.inbound == inbound);
            let numbers: Vec<u64> = packets.map(|packet| number_of(&packet.bytes)).collect();
            assert!(numbers.iter().copied().eq(0..100), "{direction}: {numbers:?}");
        }
        assert_eq!(file.packets[0].bytes, packet(0, 60));
        capture.finish().unwrap();
        std::fs::remove_file(&path).unwrap();

        let nowhere = Capture::create("/nonexistent/directory/file.pcapng");
        assert!(matches!(nowhere, Err(Error::Io { .. })), "{nowhere:?}");
        let full = Capture::to_writer(Full { room: 20, tape: Tape::default() });
        assert!(matches!(full, Err(Error::Io { .. })), "{full:?}");
    });
}

/// A disk with space for `room` bytes.
struct Full {
    room: usize,
    tape: Tape,
}

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let n = bytes.len().min(self.room);
        self.room -= n;
        self.tape.write(&bytes[..n])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_writer_that_fails_is_reported_by_finish_and_packets_go_on() {
    guarded(|| {
        every_way(|way, poller| {
            let tape = Tape::default();
            // More than the capture's buffer, so that a write fails in the middle and not at the
            // end.
            let capture = Capture::to_writer(Full { room: 1_200_000, tape: tape.clone() }).unwrap();
            let driver = capture.wrap("loop", Loopback::new(65_000));
            let interface = Interface::builder().device(driver).start().unwrap();
            let mut ring = interface
                .ring(Direction::Both)
                .depth(4)
                .drive(way.drive(poller))
                .retry(RetryPolicy::default())
                .build()
                .unwrap();
            let round_trip = |ring: &mut vmring::Ring, number| {
                let mut frame = ring.alloc().unwrap();
                frame.copy_from(&packet(number, 60_000)).unwrap();
                ring.submit_write(frame, number).unwrap();
                post(ring, number);
                for done in reap_n(ring, 2) {
                    assert_eq!((done.user_data, done.result), (number, Ok(60_000)));
                    if done.op == RingOp::Read {
                        assert_eq!(done.frame.unwrap()[..], packet(number, 60_000)[..]);
                    }
                }
            };
            (0..50).for_each(|number| round_trip(&mut ring, number));
            let full = |result: Result<(), Error>| match result {
                Err(Error::Io { source, .. }) => {
                    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
                }
                other => panic!("{other:?}"),
            };
            full(capture.finish());
            // Those that were written whole.
            let recorded = capture.packets();
            assert!((10..100).contains(&recorded), "{recorded} packets");
            // Nothing is recorded after the gap, and the file stays incomplete.
            (50..55).for_each(|number| round_trip(&mut ring, number));
            assert_eq!(capture.packets(), recorded);
            full(capture.finish());
            ring.close().unwrap();
        });
        // A capture that cannot even write its beginning.
        let capture = Capture::to_writer(Full { room: 0, tape: Tape::default() });
        let failed = capture.and_then(|capture| capture.finish());
        assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    });
}

/// The wrapper does not change the ring's behaviour: cancel, cancel_and_wait and close work through it.
#[test]
fn a_recorded_device_lets_go_like_the_one_it_wraps() {
    guarded(|| {
        let capture = Capture::to_writer(io::sink()).unwrap();
        let driver = capture.wrap("loop", Loopback::new(1500));
        let interface = Interface::builder().device(driver).start().unwrap();
        let mut ring = inline(&interface, Direction::Both).build().unwrap();
        (0..8).for_each(|number| post(&mut ring, number));
        ring.cancel(3, 100).unwrap();
        assert_eq!(reap_n(&mut ring, 2).len(), 2);
        assert_eq!(ring.cancel_and_wait(crate::support::LONG).unwrap(), 7);
        ring.reap().for_each(drop);
        (0..4).for_each(|number| post(&mut ring, number));
        ring.close().unwrap();
        assert_eq!(ring.reap().len(), 4);
        assert_eq!((capture.packets(), interface.device_name()), (0, "loopback"));
    });
}

/// A file for this test only.
struct Scratch(PathBuf);

impl Scratch {
    fn holding(name: &str, bytes: &[u8]) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("replay {name}"));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A pcap file of these packets, each with its length on the wire.
fn pcap(link: DataLink, packets: &[(Vec<u8>, usize)]) -> Vec<u8> {
    let header =
        pcap_file::pcap::PcapHeader { datalink: link, snaplen: 1 << 20, ..Default::default() };
    let mut writer = pcap_file::pcap::PcapWriter::with_header(Vec::new(), header).unwrap();
    for (packet, len) in packets {
        let packet = pcap_file::pcap::PcapPacket {
            timestamp: Duration::from_secs(1),
            orig_len: *len as u32,
            data: Cow::Borrowed(packet),
        };
        writer.write_packet(&packet).unwrap();
    }
    writer.into_writer()
}

fn whole(packets: &[Vec<u8>]) -> Vec<(Vec<u8>, usize)> {
    packets.iter().map(|packet| (packet.clone(), packet.len())).collect()
}

fn write(ring: &mut Ring, packet: &[u8], user_data: u64) {
    let mut frame = ring.alloc().unwrap();
    frame.copy_from(packet).unwrap();
    ring.submit_write(frame, user_data).unwrap();
}

/// Returns everything the ring reads, with up to 3 reads posted at a time.
fn read_all(ring: &mut Ring, replay: &Replay) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while replay.left() > 0 {
        for user_data in 0..3 {
            post(ring, user_data);
        }
        // The last batch may be short.
        ring.wait(3, Some(Duration::from_millis(20)));
        ring.cancel_and_wait(Duration::from_secs(10)).unwrap();
        let done: Vec<_> = ring.reap().collect();
        packets.extend(done.iter().filter_map(|done| done.take_packet().ok()).map(|f| f.to_vec()));
    }
    packets
}

/// A replay reads what a capture has recorded: the packets of both directions, in order. It reads a
/// pcap file too.
#[test]
fn a_replay_reads_what_was_recorded() {
    let packets: Vec<Vec<u8>> = (0..10).map(|i| packet(i, 60 + 100 * i as usize)).collect();
    let tape = Tape::default();
    let capture = Capture::to_writer(tape.clone()).unwrap();
    let driver = capture.wrap("loop", Loopback::new(1500));
    let interface = Interface::builder().device(driver).start().unwrap();
    let mut ring = interface.ring(Direction::Both).build().unwrap();
    for packet in &packets {
        write(&mut ring, packet, 7);
    }
    reap_n(&mut ring, packets.len());
    drop((ring, interface));

    let files = [tape.bytes(), pcap(DataLink::ETHERNET, &whole(&packets))];
    for (name, bytes) in ["pcapng", "pcap"].into_iter().zip(files) {
        let file = Scratch::holding(name, &bytes);
        let replay = Replay::open(&file.0).unwrap();
        assert_eq!((replay.packets(), replay.left()), (10, 10), "{name}");
        let interface = Interface::builder().device(replay.clone()).start().unwrap();
        assert_eq!((interface.device_name(), interface.max_packet_size()), ("pcap", 1514));
        let mut ring = interface.ring(Direction::Both).build().unwrap();
        write(&mut ring, &packets[0], 9);
        reap_n(&mut ring, 1);
        assert_eq!(read_all(&mut ring, &replay), packets, "{name}");
        assert_eq!(interface.counters(), [("left", 0), ("discarded", 1)]);
        assert!(interface.drops().iter().all(|(_, n)| *n == 0));
        drop((ring, interface));
        let again = Interface::builder().device(replay).start().unwrap_err();
        assert!(again.to_string().contains("runs once"), "{again}");
    }
}

#[test]
fn a_replay_leaves_out_what_is_no_whole_packet_and_counts_it() {
    let packets = [(packet(0, 100), 1500), (packet(1, 9000), 9000), (packet(2, 70_000), 70_000)];
    let file = Scratch::holding("unfit", &pcap(DataLink::ETHERNET, &packets));
    let replay = Replay::open(&file.0).unwrap();
    assert_eq!(replay.packets(), 1);
    let interface = Interface::builder().device(replay.clone()).start().unwrap();
    assert_eq!((interface.mtu(), interface.max_packet_size()), (1500, 9000));
    let mut ring = interface.ring(Direction::Read).build().unwrap();
    // Post one read. A second one would look at the packets after it.
    post(&mut ring, 0);
    assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(9000));
    ring.cancel_and_wait(Duration::from_secs(10)).unwrap();
    assert_eq!(replay.left(), 0);
    let drops: Vec<_> = interface.drops().into_iter().filter(|(_, n)| *n > 0).collect();
    assert_eq!(drops, [("recorded incompletely", 1), ("too big", 1)]);
}

/// A simple packet block has no captured length, only the length on the wire.
#[test]
fn a_simple_packet_is_replayed_without_its_padding() {
    use pcap_file::pcapng::PcapNgWriter;
    use pcap_file::pcapng::blocks::interface_description::InterfaceDescriptionBlock;
    use pcap_file::pcapng::blocks::simple_packet::SimplePacketBlock;

    let mut writer = PcapNgWriter::new(Vec::new()).unwrap();
    let (linktype, options) = (DataLink::ETHERNET, Vec::new());
    let interface = InterfaceDescriptionBlock { linktype, snaplen: 0, options };
    writer.write_pcapng_block(interface).unwrap();
    let packets: Vec<_> = (61..65).map(|len| packet(len as u64, len)).collect();
    for packet in &packets {
        let (original_len, data) = (packet.len() as u32, Cow::Borrowed(&packet[..]));
        writer.write_pcapng_block(SimplePacketBlock { original_len, data }).unwrap();
    }
    let file = Scratch::holding("simple", &writer.into_inner());
    let replay = Replay::open(&file.0).unwrap();
    let interface = Interface::builder().device(replay.clone()).start().unwrap();
    let mut ring = interface.ring(Direction::Read).build().unwrap();
    assert_eq!(read_all(&mut ring, &replay), packets);
}

#[test]
fn a_replay_that_cannot_start_says_why() {
    let missing = Replay::open("no such file");
    assert!(matches!(missing, Err(Error::Io { what: "reading the capture", .. })), "{missing:?}");
    let mut offload = vmring::device::Offloads::default();
    offload.checksum = true;
    let started = Interface::builder().offloads(offload).device(Replay::nothing()).start();
    assert!(matches!(started, Err(Error::NotSupported { .. })));
    let started = Interface::builder().mtu(99).device(Replay::nothing()).start();
    assert!(matches!(started, Err(Error::Config(_))));
}

#[test]
fn from_nothing_nothing_comes_and_what_is_written_is_recorded() {
    let tape = Tape::default();
    let capture = Capture::to_writer(tape.clone()).unwrap();
    let driver = capture.wrap("out", Replay::nothing());
    let interface = Interface::builder().device(driver).start().unwrap();
    let mut ring = interface.ring(Direction::Both).build().unwrap();
    post(&mut ring, 0);
    write(&mut ring, &packet(5, 200), 1);
    let done = reap_n(&mut ring, 1);
    assert_eq!((done[0].op, done[0].result), (RingOp::Write, Ok(200)));
    assert_eq!(ring.wait(1, Some(Duration::from_millis(20))), 0);
    drop((ring, interface));
    let file = parse(&tape.bytes());
    assert_eq!(file.packets, [Recorded { interface: 0, inbound: false, bytes: packet(5, 200) }]);
}
