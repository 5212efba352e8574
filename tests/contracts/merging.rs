//! Mergeable reads: one packet fills several posted reads.

use vmring::device::{PollContext, Progress};
use vmring::{ConfigError, Direction, Error, Interface, Ring, RingOp};

use crate::guest::{Guest, HEADER};
use crate::support::{LONG, Script, ScriptQueue, every_way, guarded, inline, loopback, packet};

/// The reads that one packet filled, each with the number of bytes in it.
type Group = Vec<(u64, usize)>;

/// Takes every completion. Returns the packets that arrived, and checks that nothing splits one.
fn arrivals(ring: &mut Ring) -> Vec<Group> {
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

/// The packet in the buffers of a group. The first header has their number, and the others have none.
fn bytes(guest: &Guest, group: &Group) -> Vec<u8> {
    let mut packet = Vec::new();
    for (i, (number, len)) in group.iter().enumerate() {
        let all = guest.all_bytes(*number);
        let (header, behind) = all.split_at(HEADER as usize);
        if i == 0 {
            assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, group.len() as u8, 0]);
            packet.extend(&behind[..*len]);
        } else {
            packet.extend(&all[..*len]);
        }
    }
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
            {
                let interface = script();
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
        assert!(!refused(&script(), Direction::Both));
    });
}
