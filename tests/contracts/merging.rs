//! Mergeable reads: one packet fills several posted reads.

use vmring::device::{PollContext, Progress};
use vmring::{ConfigError, Direction, Drive, EntryError, Error, Interface, Ring, RingOp, Status};

use crate::guest_memory::{Guest, HEADER};
use crate::support::{
    Dice, LONG, Script, ScriptQueue, drive_to_rest, every_way, guarded, inline, loopback, packet,
    packet_between, quiet_network, reap, unique,
};

/// The reads that one packet filled, each with the number of bytes in it.
pub(crate) type Group = Vec<(u64, usize)>;

/// Takes every completion. Returns the packets that arrived, and checks that nothing splits one.
pub(crate) fn arrivals(ring: &mut Ring) -> Vec<Group> {
    let (mut all, mut group, mut left) = (Vec::new(), Group::new(), 0);
    for done in ring.reap() {
        if done.op != RingOp::Read {
            assert!(group.is_empty(), "another completion is between the parts");
            continue;
        }
        let len = done.result.expect("it has a packet");
        assert!(group.is_empty() || done.more + 1 == left, "{group:?} {} {left}", done.more);
        left = done.more;
        group.push((done.user_data, len));
        if left == 0 {
            all.push(std::mem::take(&mut group));
        }
    }
    assert!(group.is_empty(), "the end of a packet is missing: {group:?}");
    all
}

/// The header in front of the packet in the buffers of a group, and the packet. Only the first buffer
/// has a header.
pub(crate) fn packet_of(guest: &Guest, group: &Group) -> ([u8; HEADER as usize], Vec<u8>) {
    let (mut header, mut packet) = ([0; HEADER as usize], Vec::new());
    for (i, (number, len)) in group.iter().enumerate() {
        let all = guest.all_bytes(*number);
        let (front, behind) = all.split_at(HEADER as usize);
        if i == 0 {
            header.copy_from_slice(front);
            packet.extend(&behind[..*len]);
        } else {
            packet.extend(&all[..*len]);
        }
    }
    (header, packet)
}

/// The packet in the buffers of a group. The header has their number and nothing else.
fn bytes(guest: &Guest, group: &Group) -> Vec<u8> {
    let (header, packet) = packet_of(guest, group);
    assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, group.len() as u8, 0]);
    packet
}

fn read(ring: &mut Ring, guest: &mut Guest, number: u64, packet: u32) {
    let buffer = guest.buffer_of(number, HEADER + packet);
    ring.submit_read_guest(buffer, number).expect("a read is taken");
}

fn write(ring: &mut Ring, guest: &mut Guest, number: u64, bytes: &[u8]) {
    let buffer = guest.packet(number, bytes);
    ring.submit_write_guest(buffer, number).expect("a write is taken");
}

/// A device of the test's that fills reads with each write, as the loopback does.
fn script() -> Interface {
    Script::new(|_, _| {
        ScriptQueue::new(|cx: &mut PollContext<'_>| {
            while let Some(from) = cx.take_write() {
                let mut packet = vec![0; from.len()];
                from.copy_to(&mut packet);
                let (mut parts, mut left) = (Vec::new(), &packet[..]);
                while !left.is_empty() {
                    let mut read = cx.take_read().expect("the test posts enough");
                    let guest = read.guest_mut().expect("the test posts a guest's");
                    let header = if parts.is_empty() { guest.header_len() } else { 0 };
                    let len = guest.segments().skip_bytes(header).copy_from(left);
                    left = &left[len..];
                    parts.push((read, len));
                }
                cx.complete_read_parts(parts);
                cx.complete_write(from);
            }
            Ok(Progress::Idle)
        })
    })
    .limits(|caps| {
        (caps.read_segments, caps.write_segments) = (256, 256);
        caps.merges_reads = true;
    })
    .start()
}

/// Goal: a packet that is longer than a read fills the next ones too, in each way to drive a ring, and
/// with a device of a user's. The header of the first buffer has their number. The next packet goes
/// into the next read.
#[test]
fn a_packet_fills_as_many_reads_as_it_needs() {
    guarded(|| {
        every_way(|way, poller| {
            for interface in [loopback(), script()] {
                let mut guest = Guest::new(16, 1514);
                let builder = interface.ring(Direction::Both).depth(8).segment_table(guest.table());
                let builder = builder.mergeable_reads(true).drive(way.drive(poller));
                let mut ring = builder.build().expect("a ring");
                for (number, space) in (1..).zip([100, 8, 200, 1514, 0, 70]) {
                    read(&mut ring, &mut guest, number, space);
                }
                let packets = [packet(1, 300), packet(2, 60), packet(3, 81)];
                for (number, bytes) in (100..).zip(&packets) {
                    write(&mut ring, &mut guest, number, bytes);
                }
                while ring.in_flight() > ring.ready() {
                    ring.wait(9, Some(LONG));
                }
                let seen = arrivals(&mut ring);
                // The 12 bytes in which the first buffer has its header belong to the others' packet.
                let expected =
                    [vec![(1, 100), (2, 20), (3, 180)], vec![(4, 60)], vec![(5, 0), (6, 81)]];
                assert_eq!(seen, expected, "{way:?} {}", interface.device_name());
                for (group, packet) in seen.iter().zip(&packets) {
                    assert_eq!(bytes(&guest, group), *packet);
                }
                let stats = ring.stats();
                assert_eq!((stats.rx_packets, stats.rx_bytes), (3, 441));
                assert_eq!((stats.bounced_reads, stats.bounced_writes), (0, 0));
                assert_eq!((ring.in_flight(), guest.table().slots_in_use()), (0, 0));
            }
        });
    });
}

/// Goal: while the reads are too few for a packet, all of it waits. A cancel takes the reads back and
/// leaves the packet. It arrives when there are enough reads.
#[test]
fn a_packet_waits_for_all_the_reads_that_it_needs() {
    guarded(|| {
        let interface = loopback();
        let mut guest = Guest::new(16, 1514);
        let builder = inline(&interface, Direction::Both).depth(8).segment_table(guest.table());
        let mut ring = builder.mergeable_reads(true).build().expect("a ring");
        let sent = packet(1, 500);
        read(&mut ring, &mut guest, 1, 100);
        write(&mut ring, &mut guest, 100, &sent);
        drive_to_rest(&mut ring);
        assert!(arrivals(&mut ring).is_empty());
        read(&mut ring, &mut guest, 2, 387);
        drive_to_rest(&mut ring);
        assert!(arrivals(&mut ring).is_empty(), "a byte is missing");
        ring.cancel_and_wait(LONG).expect("they are cancelled");
        let cancelled: Vec<_> = reap(&mut ring).iter().map(|seen| seen.brief()).collect();
        let read_cancelled = |number| (RingOp::Read, number, Err(EntryError::Cancelled));
        assert_eq!(cancelled, [read_cancelled(1), read_cancelled(2)]);
        read(&mut ring, &mut guest, 3, 300);
        read(&mut ring, &mut guest, 4, 300);
        drive_to_rest(&mut ring);
        let seen = arrivals(&mut ring);
        assert_eq!(seen, [[(3, 300), (4, 200)]]);
        assert_eq!(bytes(&guest, &seen[0]), sent);
    });
}

/// Goal: a guest that posts no more reads before a packet arrives does not wait for ever. A packet for
/// which all its reads are too few is dropped and counted when the ring goes to sleep, and the next
/// packet arrives.
#[test]
fn a_packet_for_which_all_reads_are_too_few_does_not_block_the_next() {
    guarded(|| {
        let name = unique("too-few");
        let port = || Interface::builder().device(quiet_network(&name)).start();
        let (to, from) = (port().expect("it starts"), port().expect("it starts"));
        for (receiver, sender) in [(&to, &from), (&loopback(), &loopback())] {
            let sender = if receiver.device_name() == "loopback" { receiver } else { sender };
            let mut guest = Guest::new(16, 1514);
            let builder = inline(receiver, Direction::Read).depth(8).segment_table(guest.table());
            let mut reads = builder.mergeable_reads(true).build().expect("a ring");
            let mut writes = inline(sender, Direction::Write).depth(8).build().expect("a ring");
            let between = |number, len| {
                let (from, to) = (sender.mac().into_array(), receiver.mac().into_array());
                packet_between(from, to, number, len)
            };
            for number in 1..=3 {
                read(&mut reads, &mut guest, number, 100);
            }
            drive_to_rest(&mut reads);
            let short = between(2, 312);
            for bytes in [&between(1, 500), &short] {
                let mut frame = writes.alloc().expect("a frame");
                frame.copy_from(bytes).expect("it fits");
                writes.submit_write(frame, 9).expect("a write is taken");
                drive_to_rest(&mut writes);
            }
            drive_to_rest(&mut reads);
            assert_eq!(reads.ready(), 0, "the first packet waits for reads");
            while !reads.arm() && reads.ready() == 0 {}
            let seen = arrivals(&mut reads);
            assert_eq!(seen, [[(1, 100), (2, 112), (3, 100)]], "{}", receiver.device_name());
            assert_eq!(bytes(&guest, &seen[0]), short);
            let dropped: u64 = receiver.drops().iter().map(|(_, count)| count).sum();
            assert_eq!(dropped, 1, "{:?}", receiver.drops());
        }
    });
}

/// Goal: a device that fills one read with each packet refuses such a ring, and so does a ring that
/// only writes.
#[test]
fn mergeable_reads_are_refused_where_they_cannot_be() {
    guarded(|| {
        let refused = |interface: &Interface, direction| {
            let built = inline(interface, direction).mergeable_reads(true).build();
            matches!(
                built,
                Err(Error::Config(ConfigError::NotApplicable { what: "mergeable reads", .. }))
            )
        };
        let plain =
            Script::new(|_, _| ScriptQueue::new(|_: &mut PollContext<'_>| Ok(Progress::Idle)));
        assert!(refused(&plain.start(), Direction::Read));
        assert!(refused(&loopback(), Direction::Write));
        assert!(!refused(&loopback(), Direction::Both));
    });
}

/// Goal: a read with a reserved frame in the place of a guest's buffer takes a whole packet. As one of
/// several parts it fails, with the parts behind it, and the ring goes on.
#[test]
fn a_reserved_frame_is_no_part_of_a_packet() {
    guarded(|| {
        let device = Script::new(|_, _| {
            ScriptQueue::new(|io| {
                let mut slots: Vec<_> = std::iter::from_fn(|| io.take_read()).collect();
                if slots.is_empty() {
                    return Ok(Progress::Idle);
                }
                let reserved: Vec<_> = slots.iter().map(|slot| slot.is_reserved()).collect();
                assert_eq!(reserved, [true, true, false]);
                if let Some(space) = slots[0].buffer_mut() {
                    space[..60].fill(7);
                }
                io.complete_read_parts(slots.drain(..1).map(|slot| (slot, 60)));
                io.complete_read_parts(slots.into_iter().map(|slot| (slot, 60)));
                Ok(Progress::Idle)
            })
        });
        let device = device.limits(|caps| {
            (caps.reading_rings, caps.read_segments, caps.merges_reads) = (1, 1, true);
        });
        let interface = device.start();
        let mut guest = Guest::new(8, 1514);
        let builder = inline(&interface, Direction::Read).segment_table(guest.table());
        let mut ring = builder.mergeable_reads(true).build().expect("a ring");
        for (number, pieces) in [(0, 3), (1, 3), (2, 1)] {
            let buffer = guest.buffer_in(number, HEADER + 1514, pieces);
            ring.submit_read_guest(buffer, number).expect("it is taken");
        }
        let ended: Vec<_> = reap(&mut ring).iter().map(|done| done.brief().2).collect();
        let refused = Err(EntryError::Device(Status::InvalidArgument));
        assert_eq!(ended, [Ok(60), refused, refused]);
        assert_eq!(bytes(&guest, &vec![(0, 60)]), vec![7; 60]);
        assert_eq!(ring.stats().bounced_reads, 2);
    });
}

/// Goal: whatever the sizes of packets and reads are, every packet arrives once, whole and in order.
/// Method: random sizes over a network, from frames and from a guest's memory, with rings of a thread
/// and inline ones. Reads are posted as they come back.
#[test]
fn packets_of_all_sizes_arrive_whole_and_in_order() {
    guarded(|| {
        for (seed, drive) in [(1, Drive::Inline), (2, Drive::Thread), (3, Drive::Inline)] {
            let name = unique("merging");
            let port = || Interface::builder().device(quiet_network(&name)).start();
            let (to, from) = (port().expect("it starts"), port().expect("it starts"));
            let mut dice = Dice::new(seed);
            let (mut guest, mut sending) = (Guest::new(64, 1514), Guest::new(64, 1514));
            let builder = to.ring(Direction::Read).depth(64).segment_table(guest.table());
            let mut reads = builder.mergeable_reads(true).drive(drive).build().expect("a ring");
            let builder = from.ring(Direction::Write).depth(16).segment_table(sending.table());
            let mut writes = builder.drive(drive).build().expect("a ring");
            let (mut sent, mut seen, mut next) = (0, 0, 0);
            let mut lengths = Vec::new();
            let mut post = |reads: &mut Ring, guest: &mut Guest, dice: &mut Dice| {
                while reads.in_flight() < 64 {
                    // Together they have space for every packet, so none is dropped.
                    read(reads, guest, next, 100 + dice.below(300) as u32);
                    next += 1;
                }
            };
            while seen < 2000 {
                // An inline ring does not sleep before the reads are posted, so packets may wait for
                // them.
                if matches!(drive, Drive::Thread) || dice.below(4) > 0 {
                    post(&mut reads, &mut guest, &mut dice);
                    drive_to_rest(&mut reads);
                }
                let burst = 1 + dice.below(3);
                for _ in 0..burst {
                    let len = 60 + dice.below(1455) as usize;
                    lengths.push(len);
                    let bytes =
                        packet_between(from.mac().into_array(), to.mac().into_array(), sent, len);
                    if dice.below(2) == 0 {
                        let mut frame = writes.alloc().expect("a frame");
                        frame.copy_from(&bytes).expect("it fits");
                        writes.submit_write(frame, sent).expect("a write is taken");
                    } else {
                        write(&mut writes, &mut sending, sent, &bytes);
                    }
                    sent += 1;
                }
                while writes.in_flight() > 0 {
                    writes.wait(1, Some(LONG));
                    for done in reap(&mut writes) {
                        assert!(done.brief().2.is_ok(), "{done:?}");
                        if done.frame.is_none() {
                            sending.free(done.user_data);
                        }
                    }
                }
                post(&mut reads, &mut guest, &mut dice);
                while seen < sent {
                    assert!(reads.wait(1, Some(LONG)) > 0, "{seen} of {sent} came");
                    for group in arrivals(&mut reads) {
                        let bytes = bytes(&guest, &group);
                        let expected = packet_between(
                            from.mac().into_array(),
                            to.mac().into_array(),
                            seen,
                            lengths[seen as usize],
                        );
                        assert_eq!(bytes, expected);
                        group.iter().for_each(|(number, _)| guest.free(*number));
                        seen += 1;
                    }
                }
            }
            assert_eq!(to.drops().iter().map(|(_, count)| count).sum::<u64>(), 0);
        }
    });
}
