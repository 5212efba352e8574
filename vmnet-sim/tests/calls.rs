//! Reads and writes: the counts, the plans, the limits, and the statuses of a world that answers.

use std::ffi::c_int;
use std::ptr;
use std::time::{Duration, Instant};

use vmnet_sim::{CallPlan, Dead, Reported, Rules, Script, Value, World};

use crate::abi;
use crate::support::*;

/// Two interfaces of one network. The first has the script and receives frames from the second.
struct Pair {
    world: World,
    id: [u8; 16],
    a: Interface,
    b: Interface,
}

impl Pair {
    fn new(change: impl FnOnce(&mut Script)) -> Self {
        let (world, id, a) = one(change);
        let (_, b) = another(&world);
        Self { world, id, a, b }
    }

    /// Sends numbered frames to the first.
    fn feed(&self, numbers: std::ops::Range<u64>) {
        for i in numbers {
            self.b.send(&frame(self.a.mac(), self.b.mac(), i, 60));
        }
    }

    fn frames(&self, numbers: std::ops::Range<u64>) -> Vec<Vec<u8>> {
        numbers.map(|i| frame(self.b.mac(), self.a.mac(), i, 60)).collect()
    }

    /// What has arrived at the second.
    fn sent(&self) -> Vec<u64> {
        self.b.receive().iter().map(|frame| number(frame)).collect()
    }
}

fn numbers(read: &(u32, Vec<Vec<u8>>)) -> Vec<u64> {
    assert_eq!(read.0, SUCCESS);
    read.1.iter().map(|frame| number(frame)).collect()
}

#[test]
fn a_read_brings_what_waits_in_order_and_else_nothing() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        assert_eq!(numbers(&pair.a.read(4)), []);
        pair.feed(0..6);
        assert_eq!(numbers(&pair.a.read(4)), [0, 1, 2, 3]);
        assert_eq!(numbers(&pair.a.read(4)), [4, 5]);
        assert_eq!(numbers(&pair.a.read(4)), []);
        let counts = pair.world.counts(pair.id);
        assert_eq!((counts.reads, counts.packets_read), (4, 6));
    });
}

/// "Both are in/out": the flags and iov_len of the offered descriptors come back changed.
#[test]
fn a_read_changes_what_has_to_be_reset() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        pair.feed(0..1);
        let mut rooms = Packets::rooms(2, 1514);
        assert_eq!(rooms.read(pair.a.handle), (SUCCESS, 1));
        assert_eq!(rooms.packet(0).len(), 60);
        assert_eq!(rooms.iovecs[0].iov_len, 60);
        assert!(rooms.descriptors.iter().all(|descriptor| descriptor.vm_flags != 0));
    });
}

#[test]
fn reads_go_as_planned_one_plan_a_call() {
    guarded(|| {
        let fails = |reported| CallPlan::Fails { status: BUFFER_EXHAUSTED, sent: 9, reported };
        let pair = Pair::new(|script| {
            script.reads.extend([
                CallPlan::Takes(2),
                fails(Reported::Asked),
                fails(Reported::Done),
                fails(Reported::Zero),
                CallPlan::Well,
            ]);
        });
        pair.feed(0..6);
        assert_eq!(numbers(&pair.a.read(4)), [0, 1]);
        for count in [3, 0, 0] {
            let mut rooms = Packets::rooms(3, 1514);
            assert_eq!(rooms.read(pair.a.handle), (BUFFER_EXHAUSTED, count));
        }
        assert_eq!(numbers(&pair.a.read(4)), [2, 3, 4, 5]);
    });
}

#[test]
fn writes_go_as_planned_one_plan_a_call() {
    guarded(|| {
        let fails = |sent, reported| CallPlan::Fails { status: BUFFER_EXHAUSTED, sent, reported };
        let pair = Pair::new(|script| {
            script.writes.extend([
                CallPlan::Well,
                CallPlan::Takes(2),
                CallPlan::Takes(0),
                fails(2, Reported::Asked),
                fails(2, Reported::Done),
                fails(2, Reported::Zero),
                fails(0, Reported::Asked),
                fails(99, Reported::Done),
            ]);
        });
        let expected: [(u32, usize, &[u64]); 9] = [
            (SUCCESS, 3, &[0, 1, 2]),
            (SUCCESS, 2, &[0, 1]),
            (SUCCESS, 0, &[]),
            (BUFFER_EXHAUSTED, 3, &[0, 1]),
            (BUFFER_EXHAUSTED, 2, &[0, 1]),
            (BUFFER_EXHAUSTED, 0, &[0, 1]),
            (BUFFER_EXHAUSTED, 3, &[]),
            (BUFFER_EXHAUSTED, 3, &[0, 1, 2]),
            (SUCCESS, 3, &[0, 1, 2]),
        ];
        for (status, count, sent) in expected {
            assert_eq!(pair.a.write(&pair.frames(0..3)), (status, count));
            assert_eq!(pair.sent(), sent);
        }
        let counts = pair.world.counts(pair.id);
        assert_eq!((counts.writes, counts.packets_written), (9, 3 + 2 + 6 + 3 + 3));
    });
}

#[test]
fn a_batch_with_a_bad_packet_fails_as_the_script_says() {
    guarded(|| {
        for (sends, reported, count, sent) in [
            (false, Reported::Asked, 3, &[][..]),
            (false, Reported::Done, 0, &[]),
            (true, Reported::Asked, 3, &[0]),
            (true, Reported::Done, 1, &[0]),
            (true, Reported::Zero, 0, &[0]),
        ] {
            let pair = Pair::new(|script| script.failed_batch = (sends, reported));
            for (bad, status) in [(13, INVALID_ARGUMENT), (1515, PACKET_TOO_BIG)] {
                let mut batch = pair.frames(0..3);
                batch[1].resize(bad, 0);
                assert_eq!(pair.a.write(&batch), (status, count));
                assert_eq!(pair.sent(), sent);
            }
        }
        // Every length from an empty Ethernet frame to a full one is accepted.
        let pair = Pair::new(|_| ());
        let mut batch = pair.frames(0..2);
        batch[0].resize(1514, 0);
        batch[1].truncate(14);
        assert_eq!(pair.a.write(&batch), (SUCCESS, 2));
        assert_eq!(pair.b.receive().iter().map(Vec::len).collect::<Vec<_>>(), [1514, 14]);
    });
}

#[test]
fn a_packet_can_stand_in_several_iovecs_if_the_script_says_so() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        let write = |interface: &Interface| {
            let mut packets = Packets::of(&pair.frames(5..6));
            let whole = packets.iovecs[0];
            let rest = whole.iov_base.cast::<u8>().wrapping_add(20).cast();
            packets.iovecs = vec![
                libc::iovec { iov_base: whole.iov_base, iov_len: 20 },
                libc::iovec { iov_base: rest, iov_len: 40 },
            ];
            packets.descriptors[0].vm_pkt_iov = packets.iovecs.as_mut_ptr();
            packets.descriptors[0].vm_pkt_iovcnt = 2;
            packets.write(interface.handle)
        };
        assert_eq!(write(&pair.a), (SUCCESS, 1));
        assert_eq!(pair.sent(), [5]);
        let one_only = pair.world.interface_id();
        pair.world.script(one_only, |script| script.several_iovecs = false);
        let one_only = Start::of(&Description::shared(one_only)).interface();
        assert_eq!(write(&one_only).0, INVALID_ARGUMENT);
        assert_eq!(pair.sent(), []);

        // Also in a read, where the packet fills the first iovec and continues in the second.
        pair.feed(8..9);
        let mut rooms = Packets::rooms(1, 1514);
        let (base, size) = (rooms.iovecs[0].iov_base, 1514);
        let rest = base.cast::<u8>().wrapping_add(20).cast();
        rooms.iovecs = vec![
            libc::iovec { iov_base: base, iov_len: 20 },
            libc::iovec { iov_base: rest, iov_len: size - 20 },
        ];
        rooms.descriptors[0].vm_pkt_iov = rooms.iovecs.as_mut_ptr();
        rooms.descriptors[0].vm_pkt_iovcnt = 2;
        assert_eq!(rooms.read(pair.a.handle), (SUCCESS, 1));
        assert_eq!(rooms.packet(0), frame(pair.a.mac(), pair.b.mac(), 8, 60));
        assert_eq!((rooms.iovecs[0].iov_len, rooms.iovecs[1].iov_len), (20, 40));
    });
}

#[test]
fn what_is_more_than_the_queue_holds_is_dropped_and_counted() {
    guarded(|| {
        let pair = Pair::new(|script| script.queue_depth = 4);
        pair.feed(0..10);
        assert_eq!(numbers(&pair.a.read(10)), [0, 1, 2, 3]);
        assert_eq!(pair.world.counts(pair.id).dropped, 6);
        pair.feed(10..12);
        assert_eq!(numbers(&pair.a.read(10)), [10, 11]);
        assert_eq!(pair.world.counts(pair.id).dropped, 6);
    });
}

#[test]
fn after_the_hosts_sleep_an_interface_is_silent_or_fails_until_it_starts_again() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        pair.feed(0..1);
        pair.world.sleep(pair.id, Dead::Silent);
        pair.a.listen();
        pair.feed(1..2);
        assert_eq!(numbers(&pair.a.read(4)), []);
        assert_eq!(pair.a.write(&pair.frames(0..2)), (SUCCESS, 2));
        assert_eq!(pair.sent(), []);
        assert_eq!(pair.a.event_count(), 0);

        pair.world.sleep(pair.id, Dead::Fails(FAILURE));
        assert_eq!(pair.a.read(4).0, FAILURE);
        assert_eq!(pair.a.write(&pair.frames(0..2)).0, FAILURE);
        assert_eq!(pair.a.stop(), SUCCESS);

        let again = Start::of(&Description::shared(pair.id)).interface();
        assert_eq!(again.mac(), pair.a.mac());
        pair.b.send(&frame(again.mac(), pair.b.mac(), 7, 60));
        assert_eq!(numbers(&again.read(4)), [7]);
        assert_eq!(pair.world.counts(pair.id).starts, 2);
    });
}

#[test]
fn a_call_costs_what_the_script_says() {
    guarded(|| {
        let cost = Duration::from_millis(30);
        let pair = Pair::new(|script| script.call_cost = cost);
        let start = Instant::now();
        pair.a.read(1);
        pair.a.write(&pair.frames(0..1));
        assert!(start.elapsed() >= 2 * cost);
    });
}

#[test]
fn calls_can_be_free_of_charge() {
    guarded(|| {
        let pair = Pair::new(|script| script.free_of_charge = Some(700));
        let mut rooms = Packets::rooms(300, 1514);
        assert_eq!(rooms.read(pair.a.handle), (SUCCESS, 300));
        assert!(rooms.descriptors.iter().all(|descriptor| descriptor.vm_pkt_size == 700));
        assert_eq!(pair.a.write(&pair.frames(0..5)), (SUCCESS, 5));
        assert_eq!(pair.sent(), []);
    });
}

/// The limit is 200 packets if the parameters do not name another.
#[test]
fn a_batch_can_be_as_long_as_it_is_told_or_as_the_documents_say() {
    guarded(|| {
        for (limits, n) in [(Some(256), 256), (None, 200), (Some(1), 1)] {
            let pair = Pair::new(|script| {
                script.read_max_packets = limits;
                script.write_max_packets = limits;
            });
            assert_eq!(pair.a.write(&pair.frames(0..n as u64)), (SUCCESS, n));
            assert_eq!(pair.sent().len(), n);
            assert_eq!(pair.a.read(n).0, SUCCESS);
        }
        // Like a macOS that has no keys for it.
        let world = World::with(Rules::Answers, true);
        world.set_host(|host| host.macos = (14, 0));
        let old = Start::of(&Description::shared(world.interface_id())).interface();
        assert_eq!(old.read(200).0, SUCCESS);
        assert_eq!(old.read(201).0, TOO_MANY_PACKETS);
    });
}

#[test]
fn a_world_that_answers_has_a_status_for_what_a_strict_one_aborts_on() {
    guarded(|| {
        let world = World::with(Rules::Answers, true);
        let id = world.interface_id();
        world.script(id, |script| script.write_max_packets = Some(2));
        let interface = Start::of(&Description::shared(id)).interface();
        let handle = interface.handle;
        let small = frame(BROADCAST, interface.mac(), 1, 60);
        let batch = |n: usize| Packets::of(&vec![small.clone(); n]);

        assert_eq!(batch(3).write(handle).0, TOO_MANY_PACKETS);
        assert_eq!(Packets::rooms(1, 1513).read(handle).0, INVALID_ARGUMENT);
        let spoilt = |spoil: fn(&mut Packets)| {
            let mut packets = batch(1);
            spoil(&mut packets);
            packets.write(handle).0
        };
        assert_eq!(spoilt(|packets| packets.descriptors[0].vm_pkt_iovcnt = 0), INVALID_ARGUMENT);
        assert_eq!(spoilt(|packets| packets.descriptors[0].vm_flags = 1), INVALID_ARGUMENT);
        assert_eq!(spoilt(|packets| packets.descriptors[0].vm_pkt_size = 59), INVALID_ARGUMENT);
        assert_eq!(spoilt(|packets| packets.iovecs[0].iov_base = ptr::null_mut()), 1003);
        assert_eq!(
            spoilt(|packets| packets.descriptors[0].vm_pkt_iov = ptr::null_mut()),
            INVALID_ARGUMENT
        );
        for mut count in [0, -1] as [c_int; 2] {
            // SAFETY: a handle, and a count for which vmnet looks at no descriptor.
            let status =
                unsafe { abi::vmnet_read(handle, batch(1).descriptors.as_mut_ptr(), &mut count) };
            assert_eq!(status, INVALID_ARGUMENT);
        }
        assert_eq!(interface.set_callback(0, ptr::null(), ptr::null()), INVALID_ARGUMENT);
        assert_eq!(
            interface.set_callback(1, queue(&interface.queue), ptr::null()),
            INVALID_ARGUMENT
        );

        assert_eq!(interface.stop(), SUCCESS);
        assert_eq!(batch(1).write(handle).0, INVALID_ARGUMENT);
        assert_eq!(interface.read(1).0, INVALID_ARGUMENT);
        assert_eq!(interface.set_callback(1, ptr::null(), ptr::null()), SETUP_INCOMPLETE);
        let (handler, answers) = status_block();
        assert_eq!(interface.stop_with(queue(&interface.queue), block(&handler)), INVALID_ARGUMENT);
        assert!(answers.recv_timeout(SOON).is_err());
    });
}

#[test]
fn the_virtio_header_is_in_the_largest_packet_or_is_not() {
    guarded(|| {
        for (counted, longest) in [(false, 1526), (true, 1514)] {
            let world = World::with(Rules::Answers, true);
            let id = world.interface_id();
            world.script(id, |script| script.header_in_max = counted);
            let description =
                Description::shared(id).with("enable_virtio_header", Value::Bool(true));
            let interface = Start::of(&description).interface();
            assert_eq!(interface.max(), 1514);
            let packet = |len| {
                let header = vec![0; 12];
                [header, frame(BROADCAST, interface.mac(), 1, len - 12)].concat()
            };
            assert_eq!(interface.write(&[packet(longest)]).0, SUCCESS);
            assert_eq!(interface.write(&[packet(longest + 1)]).0, PACKET_TOO_BIG);
            assert_eq!(Packets::rooms(1, longest).read(interface.handle).0, SUCCESS);
            assert_eq!(Packets::rooms(1, longest - 1).read(interface.handle).0, INVALID_ARGUMENT);
        }
    });
}
