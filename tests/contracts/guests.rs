//! Buffers in the memory of a guest, on rings whose device takes frames only and on those whose
//! device takes such buffers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use vmring::device::fault::Faults;
use vmring::device::pcap::Capture;
use vmring::device::{PollContext, Progress};
use vmring::guest::{GuestMapping, GuestMemory, GuestRegion};
use vmring::{
    Checksum, Direction, EntryError, GuestMmap, Interface, Loopback, OffloadHeader, Ring, RingOp,
    SegmentTable, Status, SubmitErrorKind,
};
use vmring_core::HeapBacking;

use crate::guest_memory::{Guest, HEADER};
use crate::sockets::{Folder, Wire};
use crate::support::{
    LONG, Script, ScriptQueue, drive_to_rest, every_way, guarded, inline, loopback, packet,
    quiet_network, reap, reap_n, unique,
};

/// The number of frames that a ring reserves for one direction.
const RESERVED: usize = 32;

fn brief(ring: &mut Ring) -> Vec<(RingOp, u64, Result<usize, EntryError>)> {
    reap(ring).iter().map(|seen| seen.brief()).collect()
}

fn read(ring: &mut Ring, guest: &mut Guest, number: u64) {
    let buffer = guest.buffer(number);
    ring.submit_read_guest(buffer, number).expect("a read is taken");
}

fn write(ring: &mut Ring, guest: &mut Guest, number: u64, bytes: &[u8]) {
    let buffer = guest.packet(number, bytes);
    ring.submit_write_guest(buffer, number).expect("a write is taken");
}

/// Goal: a packet goes from one guest's buffer into another's, in each way to drive a ring. The
/// completions have no frame, and the table is free again when they are reaped.
#[test]
fn a_packet_goes_from_a_guests_buffer_into_a_guests_buffer() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut guest = Guest::new(2, 1514);
            let builder = interface.ring(Direction::Both).depth(4).segment_table(guest.table());
            let mut ring = builder.drive(way.drive(poller)).build().expect("a ring");
            let bytes = packet(3, 700);
            read(&mut ring, &mut guest, 1);
            write(&mut ring, &mut guest, 2, &bytes);
            let mut seen: Vec<_> = reap_n(&mut ring, 2).iter().map(|seen| seen.brief()).collect();
            seen.sort_by_key(|(_, number, _)| *number);
            assert_eq!(seen, [(RingOp::Read, 1, Ok(700)), (RingOp::Write, 2, Ok(700))], "{way:?}");
            let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
            assert_eq!(guest.bytes(1, 700), (header, bytes), "{way:?}");
            assert_eq!(guest.table().slots_in_use(), 0, "{way:?}");
            let stats = ring.stats();
            assert_eq!((stats.rx_bytes, stats.tx_bytes), (700, 700), "{way:?}");
            // The device copied it from the one into the other.
            assert_eq!((stats.bounced_reads, stats.bounced_writes), (0, 0), "{way:?}");
        });
    });
}

/// Goal: reads that wait take no frame from the writes, and more reads than there are reserved frames
/// stay posted in their order. Nothing is lost, and every credit comes back.
#[test]
fn waiting_reads_leave_the_writes_their_frames() {
    guarded(|| {
        // A wrapper takes frames only.
        let wrapped = Faults::seeded(1).wrap(Loopback::new(1500));
        let interface = Interface::builder().device(wrapped).start().expect("it starts");
        let mut guest = Guest::new(300, 1514);
        let builder = inline(&interface, Direction::Both).read_depth(128).write_depth(128);
        let mut ring = builder.segment_table(guest.table()).build().expect("a ring");
        for number in 0..100 {
            read(&mut ring, &mut guest, number);
        }
        drive_to_rest(&mut ring);
        assert_eq!(ring.stats().bounced_reads, RESERVED as u64, "the others wait");
        for number in 1000..1100 {
            write(&mut ring, &mut guest, number, &packet(number, 60));
        }
        drive_to_rest(&mut ring);
        let seen = brief(&mut ring);
        let of = |op| seen.iter().filter(move |seen| seen.0 == op).map(|seen| (seen.1, seen.2));
        assert!(of(RingOp::Read).eq((0..100).map(|number| (number, Ok(60)))), "{seen:?}");
        assert!(of(RingOp::Write).eq((1000..1100).map(|number| (number, Ok(60)))), "{seen:?}");
        for number in 0..100 {
            assert_eq!(guest.bytes(number, 60).1, packet(1000 + number, 60));
        }
        assert_eq!((ring.in_flight(), guest.table().slots_in_use()), (0, 0));
        let (mut sq, _) = ring.split();
        assert_eq!((sq.read_credits(), sq.write_credits()), (128, 128));
    });
}

/// Goal: a packet that is too big for a guest's buffer is not cut. The buffer comes back empty, with
/// the reason, and the next packet goes into the next buffer.
#[test]
fn a_buffer_that_is_too_small_comes_back_empty() {
    guarded(|| {
        let interface = loopback();
        let mut guest = Guest::new(8, 1514);
        let builder = inline(&interface, Direction::Both).depth(8).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        let small = guest.buffer_of(1, HEADER + 99);
        ring.submit_read_guest(small, 1).expect("a read is taken");
        read(&mut ring, &mut guest, 2);
        write(&mut ring, &mut guest, 3, &packet(5, 100));
        write(&mut ring, &mut guest, 4, &packet(6, 100));
        drive_to_rest(&mut ring);
        let too_big = Err(EntryError::Device(Status::PacketTooBig));
        let mut seen = brief(&mut ring);
        seen.sort_by_key(|seen| seen.1);
        assert_eq!(seen[..2], [(RingOp::Read, 1, too_big), (RingOp::Read, 2, Ok(100))]);
        assert_eq!(guest.bytes(2, 100).1, packet(6, 100));
        assert_eq!(ring.stats().errors_by_status.of(Status::PacketTooBig), 1);
        // Exactly as long fits.
        let exact = guest.buffer_of(5, HEADER + 100);
        ring.submit_read_guest(exact, 5).expect("a read is taken");
        write(&mut ring, &mut guest, 6, &packet(7, 100));
        drive_to_rest(&mut ring);
        assert!(brief(&mut ring).contains(&(RingOp::Read, 5, Ok(100))));
    });
}

/// Goal: a header that asks for what the device does not do is refused, and costs its own packet
/// only. Method: such writes between others, among them some behind the first, to devices that take a
/// guest's buffers and to one that does not.
#[test]
fn a_header_that_was_not_negotiated_costs_its_own_packet() {
    guarded(|| {
        let wrapped = Faults::seeded(1).wrap(Loopback::new(1500));
        let embedded = quiet_network(unique("headers"));
        header_costs_its_own_packet(&loopback());
        header_costs_its_own_packet(
            &Interface::builder().device(wrapped).start().expect("it starts"),
        );
        header_costs_its_own_packet(
            &Interface::builder().device(embedded).start().expect("it starts"),
        );
        header_costs_its_own_packet(&takes_guests(256, 256, &Arc::default()).start());
    });
}

fn header_costs_its_own_packet(interface: &Interface) {
    let mut guest = Guest::new(24, 1514);
    let builder = inline(interface, Direction::Both).depth(16).segment_table(guest.table());
    let mut ring = builder.build().expect("a ring");
    for number in 100..106 {
        read(&mut ring, &mut guest, number);
    }
    let partial = OffloadHeader {
        checksum: Checksum::Partial { start: 34, offset: 6 },
        ..OffloadHeader::NONE
    };
    let mut asks = [0; HEADER as usize];
    partial.write(&mut asks);
    let mut unknown = [0; HEADER as usize];
    unknown[1] = 0x7f;
    for (number, header) in (0..).zip([None, Some(asks), None, Some(unknown), Some(asks), None]) {
        let mut buffer = guest.packet(number, &packet(number, 60));
        if let Some(header) = header {
            assert!(buffer.set_header(&header));
        }
        ring.submit_write_guest(buffer, number).expect("a write is taken");
    }
    drive_to_rest(&mut ring);
    let mut seen = brief(&mut ring);
    seen.retain(|seen| seen.0 == RingOp::Write);
    seen.sort_by_key(|seen| seen.1);
    let invalid = Err(EntryError::Device(Status::InvalidArgument));
    let results: Vec<_> = seen.iter().map(|seen| seen.2).collect();
    let expected = [Ok(60), invalid, Ok(60), invalid, invalid, Ok(60)];
    assert_eq!(results, expected, "{}", interface.device_name());
}

/// Goal: buffers that are staged are seen together, when they are published or something else is
/// submitted. Those that are not published return with the ring.
#[test]
fn staged_buffers_are_seen_when_they_are_published() {
    guarded(|| {
        let interface = loopback();
        let mut guest = Guest::new(8, 1514);
        let builder = inline(&interface, Direction::Both).depth(4).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        for number in 0..2 {
            ring.stage_read_guest(guest.buffer(number), number).expect("a read is staged");
            let sent = guest.packet(10 + number, &packet(number, 60));
            ring.stage_write_guest(sent, 10 + number).expect("a write is staged");
        }
        assert!(brief(&mut ring).is_empty(), "nobody has seen them");
        ring.publish();
        drive_to_rest(&mut ring);
        assert_eq!(brief(&mut ring).len(), 4);
        ring.stage_read_guest(guest.buffer(2), 2).expect("a read is staged");
        write(&mut ring, &mut guest, 12, &packet(2, 60));
        drive_to_rest(&mut ring);
        assert_eq!(brief(&mut ring).len(), 2, "the write has published the read");
        ring.stage_read_guest(guest.buffer(3), 3).expect("a read is staged");
        assert!(guest.table().slots_in_use() > 0);
        drop(ring);
        assert_eq!(guest.table().slots_in_use(), 0);
    });
}

/// Goal: what cannot be submitted comes back with the buffer.
#[test]
fn a_guests_buffer_that_is_refused_comes_back() {
    guarded(|| {
        let interface = loopback();
        let mut guest = Guest::new(16, 4000);
        let mut other = Guest::new(1, 1514);
        let builder = inline(&interface, Direction::Both).depth(2).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        let foreign = other.buffer(1);
        let refused = ring.submit_read_guest(foreign, 1).expect_err("it is another table's");
        assert!(matches!(refused.kind, SubmitErrorKind::ForeignPool), "{refused}");
        assert_eq!(refused.buffer.capacity(), 1514);
        drop(refused);
        assert_eq!(other.table().slots_in_use(), 0);
        let long = guest.packet(2, &[0; 1515]);
        let refused = ring.submit_write_guest(long, 2).expect_err("it is too long");
        assert!(matches!(refused.kind, SubmitErrorKind::TooBig { len: 1515, max: 1514 }));
        for number in 3..5 {
            read(&mut ring, &mut guest, number);
        }
        let refused = ring.submit_read_guest(guest.buffer(5), 5).expect_err("no credit is left");
        assert!(refused.is_backpressure(), "{refused}");
        ring.close().expect("it closes");
        let refused = ring.submit_read_guest(refused.buffer, 5).expect_err("it is closed");
        assert!(matches!(refused.kind, SubmitErrorKind::Closed(_)), "{refused}");
        drop(refused);
        let seen = brief(&mut ring);
        assert_eq!(seen.len(), 2, "{seen:?}");
        drop(ring);
        guest.free(2);

        // A ring that takes no guest's buffers refuses them all.
        let mut plain = inline(&interface, Direction::Both).build().expect("a ring");
        let refused = plain.submit_read_guest(guest.buffer(6), 6).expect_err("it has no table");
        assert!(matches!(refused.kind, SubmitErrorKind::ForeignPool), "{refused}");
    });
}

/// Goal: a drain, a cancel, a restart and a close give every guest's buffer back once, wherever it is:
/// with a reserved frame in its place, or behind those that have one.
#[test]
fn guests_buffers_come_back_from_wherever_they_wait() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut guest = Guest::new(100, 1514);
            let builder = interface.ring(Direction::Both).depth(64).segment_table(guest.table());
            let mut ring = builder.drive(way.drive(poller)).build().expect("a ring");
            let mut next = 0;
            let mut post = |ring: &mut Ring, guest: &mut Guest| {
                let numbers = next..next + 50;
                next += 50;
                for number in numbers.clone() {
                    read(ring, guest, number);
                }
                numbers
            };
            let ended = |ring: &mut Ring, guest: &mut Guest, numbers: std::ops::Range<u64>| {
                let seen: Vec<_> = reap_n(ring, 50).iter().map(|seen| seen.brief()).collect();
                assert!(seen.iter().all(|seen| seen.2.is_err()), "{way:?}: {seen:?}");
                let mut ended: Vec<_> = seen.iter().map(|seen| seen.1).collect();
                ended.sort_unstable();
                assert!(ended.into_iter().eq(numbers.clone()), "{way:?}");
                numbers.for_each(|number| guest.free(number));
                assert_eq!(guest.table().slots_in_use(), 0, "{way:?}");
            };
            let numbers = post(&mut ring, &mut guest);
            ring.drain(LONG).expect("it drains");
            ended(&mut ring, &mut guest, numbers);
            ring.resume();
            let numbers = post(&mut ring, &mut guest);
            ring.cancel_and_wait(LONG).expect("it lets go");
            ended(&mut ring, &mut guest, numbers);
            let numbers = post(&mut ring, &mut guest);
            ring.close().expect("it closes");
            ended(&mut ring, &mut guest, numbers);
        });
    });
}

/// Goal: the mapping is kept until the last entry that may use it has completed, and no longer.
#[test]
fn a_guests_memory_stays_until_its_entries_have_completed() {
    guarded(|| {
        let interface = loopback();
        let mapping: Arc<dyn GuestMapping> = Arc::new(HeapBacking::new(1 << 16));
        let memory = GuestMemory::new([GuestRegion::new(0, mapping.clone())]).expect("a region");
        let mut table = SegmentTable::new(memory, 64).expect("a table");
        let builder = inline(&interface, Direction::Both).depth(8).segment_table(&table);
        let mut ring = builder.build().expect("a ring");
        let buffer = table.buffer([(0, 2000)], HEADER).expect("it is there");
        ring.submit_read_guest(buffer, 1).expect("a read is taken");
        drive_to_rest(&mut ring);
        let nothing = GuestMemory::new([]).expect("no memory");
        assert!(!table.set_memory(nothing), "a read may fill it");
        assert_eq!(Arc::strong_count(&mapping), 2);
        ring.drain(LONG).expect("it drains");
        assert!(table.release_unused());
        assert_eq!(Arc::strong_count(&mapping), 1);
        assert_eq!(brief(&mut ring), [(RingOp::Read, 1, Err(EntryError::Cancelled))]);
    });
}

/// A device that takes a guest's buffers as they are, and echoes each write into a read.
fn takes_guests(read_segments: u32, write_segments: u32, seen: &Arc<AtomicU32>) -> Script {
    let seen = seen.clone();
    Script::new(move |_, _| {
        let seen = seen.clone();
        ScriptQueue::new(move |cx: &mut PollContext<'_>| {
            while cx.reads() > 0
                && let Some(from) = cx.take_write()
                && let Some(mut to) = cx.take_read()
            {
                for slot in [&from, &to] {
                    // A slice of such a buffer does not exist.
                    assert_eq!(slot.packet().is_none(), slot.guest().is_some());
                    seen.fetch_add(slot.guest().is_some().into(), Relaxed);
                }
                let len = to.copy_from_slot(&from).expect("the library gives no smaller buffer");
                cx.complete_read(to, len);
                cx.complete_write(from);
            }
            Ok(Progress::Idle)
        })
    })
    .limits(move |caps| {
        (caps.read_segments, caps.write_segments) = (read_segments, write_segments);
    })
}

/// Goal: a device gets the buffers that it says it takes, and frames for all others. Either way the
/// packets are right. Method: every number of segments that a device takes, with buffers of one to
/// six segments.
#[test]
fn a_device_gets_the_buffers_that_it_takes() {
    guarded(|| {
        for (reads, writes) in [(0, 0), (1, 20), (3, 3), (256, 0), (0, 256), (256, 256)] {
            let seen = Arc::new(AtomicU32::new(0));
            let interface = takes_guests(reads, writes, &seen).start();
            let mut guest = Guest::new(200, 1514);
            let builder =
                inline(&interface, Direction::Both).depth(64).segment_table(guest.table());
            let mut ring = builder.build().expect("a ring");
            for number in 0..60 {
                read(&mut ring, &mut guest, number);
                write(&mut ring, &mut guest, 100 + number, &packet(100 + number, 400));
                drive_to_rest(&mut ring);
            }
            let arrived: Vec<_> =
                brief(&mut ring).into_iter().filter(|seen| seen.0 == RingOp::Read).collect();
            assert_eq!(arrived.len(), 60);
            for (number, (_, user_data, result)) in (0..).zip(arrived) {
                assert_eq!((user_data, result), (number, Ok(400)));
                let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
                assert_eq!(guest.bytes(number, 400), (header, packet(100 + number, 400)));
            }
            let stats = ring.stats();
            let bounced = stats.bounced_reads + stats.bounced_writes;
            assert_eq!(u64::from(seen.load(Relaxed)) + bounced, 120, "{reads}, {writes}");
            assert_eq!(stats.bounced_reads == 60, reads == 0, "{reads}, {writes}");
            assert_eq!(stats.bounced_writes == 0, writes >= 6, "{reads}, {writes}");
        }
    });
}

/// Goal: a wrapper sees the bytes of a guest's packets, although the device inside takes a guest's
/// buffers as they are.
#[test]
fn a_capture_has_the_packets_of_a_guest() {
    guarded(|| {
        let seen = Arc::new(AtomicU32::new(0));
        let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(unique("guests.pcapng"));
        let capture = Capture::create(&file).expect("a file");
        let device = capture.wrap("guest", takes_guests(256, 256, &seen));
        let interface = Interface::builder().device(device).start().expect("it starts");
        let mut guest = Guest::new(8, 1514);
        let builder = inline(&interface, Direction::Both).depth(4).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        let bytes = packet(77, 900);
        read(&mut ring, &mut guest, 1);
        write(&mut ring, &mut guest, 2, &bytes);
        drive_to_rest(&mut ring);
        assert_eq!(guest.bytes(1, 900).1, bytes);
        capture.finish().expect("it is written");
        let written = std::fs::read(&file).expect("a file");
        std::fs::remove_file(&file).expect("it is there");
        let copies = written.windows(bytes.len()).filter(|window| *window == bytes).count();
        assert_eq!((copies, seen.load(Relaxed)), (2, 0), "one in each direction");
    });
}

/// Goal: what a guest gives for sending is not written, whoever sends it. Method: the page is made
/// read-only, so that a write to it ends the process.
#[test]
fn what_a_guest_sends_is_not_written() {
    guarded(|| {
        let page = vmring::page_size();
        let mapping = Arc::new(GuestMmap::anonymous(2 * page).expect("a mapping"));
        let (start, bytes) = (mapping.start().as_ptr(), packet(9, 700));
        let memory = GuestMemory::new([GuestRegion::new(0, mapping)]).expect("a region");
        let table = SegmentTable::new(memory.clone(), 64).expect("a table");
        let sent = [(0, 12), (100, 300), (500, 400)];
        let mut buffer = table.buffer(sent, HEADER).expect("it is there");
        buffer.copy_from(&bytes).expect("it fits");
        drop(buffer);
        // SAFETY: it is the first page of the mapping, to which nobody has a reference.
        let made = unsafe { libc::mprotect(start.cast(), page, libc::PROT_READ) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        let seen = Arc::new(AtomicU32::new(0));
        let embedded = quiet_network(unique("read-only"));
        let wrapped = Faults::seeded(1).wrap(Loopback::new(1500));
        #[cfg(not(target_os = "macos"))]
        vmnet_takes_one_piece(&table, page as u64);
        let mut interfaces = vec![
            loopback(),
            takes_guests(256, 256, &seen).start(),
            Interface::builder().device(wrapped).start().expect("it starts"),
            Interface::builder().device(embedded).start().expect("it starts"),
        ];
        let (folder, mut peers) = (Folder::new(), Vec::new());
        let capture = Capture::create(folder.path("capture.pcapng")).expect("a file");
        let wrapped = capture.wrap("guest", Loopback::new(1500));
        interfaces.push(Interface::builder().device(wrapped).start().expect("it starts"));
        for wire in Wire::ALL {
            let [ours, peer] = wire.sockets();
            peers.push(peer);
            let driver = wire.driver().from_fd(ours);
            interfaces.push(Interface::builder().device(driver).start().expect("it starts"));
        }
        for interface in interfaces {
            let builder = inline(&interface, Direction::Both).depth(4).segment_table(&table);
            let mut ring = builder.build().expect("a ring");
            let read = table.buffer([(page as u64, 1600)], HEADER).expect("it is there");
            ring.submit_read_guest(read, 1).expect("a read is taken");
            let write = table.buffer(sent, HEADER).expect("it is there");
            ring.submit_write_guest(write, 2).expect("a write is taken");
            drive_to_rest(&mut ring);
            let ended = brief(&mut ring);
            assert!(ended.contains(&(RingOp::Write, 2, Ok(700))), "{ended:?}");
        }
        assert_eq!(seen.load(Relaxed), 2, "one of the devices took both buffers");
    });
}

/// A packet of one piece goes from the memory itself, and into it. One of two pieces is copied.
#[cfg(not(target_os = "macos"))]
fn vmnet_takes_one_piece(table: &SegmentTable, page: u64) {
    let world = vmnet_sim::World::with(vmnet_sim::Rules::Strict, false);
    let builder = Interface::builder().interface_id(world.interface_id());
    let interface = builder.device(world.enter(vmring::Vmnet::new)).start().expect("it starts");
    let builder = inline(&interface, Direction::Both).depth(4).segment_table(table);
    let mut ring = builder.build().expect("a ring");
    for (number, ranges) in
        [(1, vec![(0, 12), (100, 300)]), (2, vec![(0, 12), (100, 99), (500, 9)])]
    {
        let write = table.buffer(ranges, HEADER).expect("it is there");
        ring.submit_write_guest(write, number).expect("a write is taken");
    }
    drive_to_rest(&mut ring);
    assert_eq!(brief(&mut ring).len(), 2);
    for (number, ranges) in [(3, vec![(page, 1600)]), (4, vec![(page, 800), (page + 900, 800)])] {
        let read = table.buffer(ranges, HEADER).expect("it is there");
        ring.submit_read_guest(read, number).expect("a read is taken");
    }
    drive_to_rest(&mut ring);
    let stats = ring.stats();
    let bounced = (stats.bounced_reads, stats.bounced_writes);
    assert_eq!(bounced, (1, 1), "the header does not count as a piece of a write");
}

/// Goal: lengths that a device reports of a guest's buffer are checked as those of a frame are.
#[test]
fn hostile_lengths_of_a_guests_buffer_are_refused() {
    guarded(|| {
        let interface = Script::new(|_, _| {
            ScriptQueue::new(|cx: &mut PollContext<'_>| {
                while let Some(slot) = cx.take_read() {
                    let len = slot.user_data() as usize;
                    cx.complete_read(slot, len);
                }
                Ok(Progress::Idle)
            })
        })
        .limits(|caps| caps.read_segments = 256)
        .start();
        let mut guest = Guest::new(8, 1600);
        let builder = inline(&interface, Direction::Read).depth(8).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        let lengths = [0, 60, 128, 1600, 1601, u64::from(u32::MAX), 1 << 32, u64::MAX];
        for len in lengths {
            read(&mut ring, &mut guest, len);
        }
        drive_to_rest(&mut ring);
        for (len, (_, number, result)) in lengths.into_iter().zip(brief(&mut ring)) {
            let expected = match len {
                0..=1600 => Ok(len as usize),
                _ => Err(EntryError::Device(Status::InvalidArgument)),
            };
            assert_eq!((number, result), (len, expected));
        }
        assert_eq!(guest.table().slots_in_use(), 0);
    });
}

/// Goal: a device that drops or forgets its slots harms a guest's buffers no more than frames.
#[test]
fn a_slot_that_is_dropped_gives_the_guests_buffer_back() {
    guarded(|| {
        for segments in [0, 256] {
            let interface = Script::new(|_, _| {
                ScriptQueue::new(|cx: &mut PollContext<'_>| {
                    while let Some(slot) = cx.take_read() {
                        drop(slot);
                    }
                    while let Some(slot) = cx.take_write() {
                        std::thread::spawn(move || drop(slot)).join().expect("no panic");
                    }
                    Ok(Progress::Idle)
                })
            })
            .limits(move |caps| (caps.read_segments, caps.write_segments) = (segments, segments))
            .start();
            let mut guest = Guest::new(8, 1514);
            let builder = inline(&interface, Direction::Both).depth(4).segment_table(guest.table());
            let mut ring = builder.build().expect("a ring");
            for round in 0..20 {
                read(&mut ring, &mut guest, round);
                write(&mut ring, &mut guest, 100 + round, &packet(1, 60));
                drive_to_rest(&mut ring);
                let seen = brief(&mut ring);
                assert!(
                    seen.len() == 2 && seen.iter().all(|s| s.2 == Err(EntryError::Abandoned)),
                    "{seen:?}"
                );
                assert_eq!(guest.table().slots_in_use(), 0);
                guest.free(round);
                guest.free(100 + round);
            }
        }
    });
}

/// Goal: packets of every length up to the longest go through the same two buffers.
#[test]
fn packets_of_every_length_go_through_a_guests_buffers() {
    guarded(|| {
        let interface =
            Interface::builder().device(Loopback::new(9000)).start().expect("it starts");
        let mut guest = Guest::new(4, 9014);
        let builder = inline(&interface, Direction::Both).depth(2).segment_table(guest.table());
        let mut ring = builder.build().expect("a ring");
        for round in 0..50 {
            let bytes = packet(round, 14 + 180 * round as usize);
            read(&mut ring, &mut guest, 1);
            write(&mut ring, &mut guest, 2, &bytes);
            drive_to_rest(&mut ring);
            assert_eq!(brief(&mut ring).len(), 2);
            assert_eq!(guest.bytes(1, bytes.len()).1, bytes);
            guest.free(1);
            guest.free(2);
        }
    });
}
