//! What interfaces exchange: frames, leases, offload headers, and large frames.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vmnet_sim::{Value, World};

use crate::dhcp;
use crate::support::*;

#[test]
fn two_interfaces_exchange_frames_both_ways() {
    guarded(|| {
        let (world, _, a) = one(|_| ());
        let (_, b) = another(&world);
        let (there, back) = (frame(b.mac(), a.mac(), 1, 1514), frame(a.mac(), b.mac(), 2, 14));
        a.send(&there);
        b.send(&back);
        assert_eq!(b.receive(), [there]);
        assert_eq!(a.receive(), [back]);
        let all = frame(BROADCAST, a.mac(), 3, 60);
        a.send(&all);
        assert_eq!(b.receive(), [all]);
        assert_eq!(a.receive(), Vec::<Vec<u8>>::new());
    });
}

/// Each writer wakes the other's receiver on its own thread. Neither may wait for the other.
#[test]
fn two_interfaces_write_to_each_other_at_the_same_time() {
    guarded(|| {
        const N: u64 = 2000;
        let (world, _, a) = one(|script| script.queue_depth = N as usize);
        let (id, b) = another(&world);
        world.script(id, |script| script.queue_depth = N as usize);
        let (to_a, to_b) = (a.mac(), b.mac());
        let ends = [(a.handle as usize, to_b, to_a), (b.handle as usize, to_a, to_b)];
        let writers = ends.map(|(handle, to, from)| {
            thread::spawn(move || {
                for i in 0..N / 20 {
                    let batch: Vec<_> = (0..20).map(|j| frame(to, from, i * 20 + j, 60)).collect();
                    let handle = handle as crate::abi::Pointer;
                    assert_eq!(Packets::of(&batch).write(handle), (SUCCESS, 20));
                }
            })
        });
        for writer in writers {
            writer.join().expect("a writer");
        }
        for end in [&a, &b] {
            let numbers: Vec<u64> = end.receive().iter().map(|frame| number(frame)).collect();
            assert_eq!(numbers, (0..N).collect::<Vec<_>>());
        }
    });
}

#[test]
fn interfaces_of_other_worlds_modes_and_ranges_are_on_other_networks() {
    guarded(|| {
        let (world, _, a) = one(|_| ());
        let (_world, _, elsewhere) = one(|_| ());
        let host = Description::empty()
            .with("operation_mode", Value::U64(HOST_MODE))
            .of(world.interface_id());
        let host = Start::of(&host).interface();
        let range = Description::shared(world.interface_id())
            .with("start_address", text("10.0.0.1"))
            .with("end_address", text("10.0.0.9"))
            .with("subnet_mask", text("255.255.255.0"));
        let range = Start::of(&range).interface();
        a.send(&frame(BROADCAST, a.mac(), 1, 60));
        for other in [elsewhere, host, range] {
            assert_eq!(other.receive(), Vec::<Vec<u8>>::new());
        }
    });
}

#[test]
fn an_isolated_interface_hears_no_other() {
    guarded(|| {
        let (world, _, a) = one(|_| ());
        let isolated =
            Description::shared(world.interface_id()).with("enable_isolation", Value::Bool(true));
        let isolated = Start::of(&isolated).interface();
        for (from, to) in [(&a, &isolated), (&isolated, &a)] {
            from.send(&frame(BROADCAST, from.mac(), 1, 60));
            from.send(&frame(to.mac(), from.mac(), 2, 60));
            assert_eq!(to.receive(), Vec::<Vec<u8>>::new());
        }
        let lease = dhcp::lease(&isolated, isolated.mac()).expect("the gateway answers it");
        assert_eq!(lease.server, Ipv4Addr::new(192, 168, 64, 1));
    });
}

#[test]
fn the_gateway_gives_leases_by_mac_address() {
    guarded(|| {
        let (world, _, a) = one(|_| ());
        let (_, b) = another(&world);
        let of_a = dhcp::lease(&a, a.mac()).expect("a lease");
        let of_b = dhcp::lease(&b, b.mac()).expect("a lease");
        assert_eq!(of_a.server, Ipv4Addr::new(192, 168, 64, 1));
        assert_eq!(of_a.address.octets()[..3], [192, 168, 64]);
        assert_ne!(of_a.address, of_b.address);
        assert_eq!(dhcp::lease(&a, a.mac()), Some(of_a));
        // An event reports the answer, which arrives on the asking thread.
        a.listen();
        assert_eq!(dhcp::lease(&a, a.mac()), Some(of_a));
        a.event_after(0);
        a.quiet();
        // A MAC address of the guest's own works too.
        assert!(dhcp::lease(&a, [2, 0, 0, 0, 0, 1]).is_some());
    });
}

/// `vmnet_network_identifier_key`: "no DHCP there".
#[test]
fn an_isolated_network_gives_no_leases_but_frames() {
    guarded(|| {
        let world = World::new();
        let on = |identifier| {
            let description = Description::empty()
                .with("operation_mode", Value::U64(HOST_MODE))
                .of(world.interface_id())
                .with("network_identifier", Value::Uuid(identifier));
            Start::of(&description).interface()
        };
        let (a, b, other) = (on([1; 16]), on([1; 16]), on([2; 16]));
        assert_eq!(dhcp::lease(&a, a.mac()), None);
        assert_eq!(b.receive().len(), 1); // the request
        a.send(&frame(BROADCAST, a.mac(), 1, 60));
        assert_eq!(b.receive().len(), 1);
        assert_eq!(other.receive(), Vec::<Vec<u8>>::new());
    });
}

fn offloading(world: &World, tso: bool, header: bool) -> ([u8; 16], Interface) {
    let id = world.interface_id();
    let description = Description::shared(id)
        .with("enable_tso", Value::Bool(tso))
        .with("enable_virtio_header", Value::Bool(header));
    (id, Start::of(&description).interface())
}

/// A large TCP packet as a guest leaves it for segmentation: 64 KiB after a header that says how.
#[test]
fn the_largest_frame_and_its_header_cross_unchanged() {
    guarded(|| {
        let world = World::new();
        let ((_, a), (_, b)) = (offloading(&world, true, true), offloading(&world, true, true));
        assert_eq!(a.max(), 65_550);
        let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0];
        for len in [60, 1514, 65_515, 65_535, 65_536, 65_549, 65_550] {
            for to in [b.mac(), BROADCAST] {
                let frame = frame(to, a.mac(), 9, len);
                a.send(&[&header[..], &frame].concat());
                let got = b.receive();
                assert_eq!(got.len(), 1, "{len}");
                assert_eq!(got[0][..10], header[..10]);
                assert_eq!(got[0][12..], frame);
            }
        }
        // More packets than there are buffers on the wire.
        let packet = [&header[..], &frame(b.mac(), a.mac(), 0, 65_550)].concat();
        for _ in 0..3 {
            assert_eq!(a.write(&vec![packet.clone(); 100]), (SUCCESS, 100));
            assert_eq!(b.receive().len(), 100);
        }
    });
}

#[test]
fn a_header_is_added_empty_and_taken_off_where_only_one_side_has_it() {
    guarded(|| {
        let world = World::new();
        let ((_, with), (_, without)) =
            (offloading(&world, false, true), offloading(&world, false, false));
        let plain = frame(with.mac(), without.mac(), 1, 1514);
        without.send(&plain);
        assert_eq!(with.receive(), [[&[0; 12][..], &plain].concat()]);
        let back = frame(without.mac(), with.mac(), 2, 1514);
        with.send(&[&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0][..], &back].concat());
        with.send(&[&[0; 12][..], &back].concat());
        assert_eq!(without.receive(), [back.clone(), back]);
    });
}

/// Both are on one bridge, as on a Mac. What the receiver does not accept is dropped there.
#[test]
fn a_frame_that_is_too_long_for_the_receiver_is_dropped_and_counted() {
    guarded(|| {
        let world = World::new();
        let ((_, a), (id, b)) = (offloading(&world, true, true), offloading(&world, false, false));
        let packet = |len| [&[0; 12][..], &frame(b.mac(), a.mac(), 1, len)].concat();
        a.send(&packet(1514));
        a.send(&packet(1515));
        a.send(&packet(65_550));
        assert_eq!(b.receive().len(), 1);
        assert_eq!(world.counts(id).dropped, 2);
    });
}

/// Nothing is lost between a reader and a writer that run at the same time.
#[test]
fn a_reader_beside_a_writer_gets_everything_in_order() {
    guarded(|| {
        const N: u64 = 5000;
        let (world, _, a) = one(|_| ());
        let id = world.interface_id();
        world.script(id, |script| script.queue_depth = usize::MAX);
        let b = Start::of(&Description::shared(id)).interface();
        let (handle, to, from) = (a.handle as usize, b.mac(), a.mac());
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..N / 10 {
                    let batch: Vec<_> = (0..10).map(|j| frame(to, from, i * 10 + j, 60)).collect();
                    let handle = handle as crate::abi::Pointer;
                    assert_eq!(Packets::of(&batch).write(handle), (SUCCESS, 10));
                }
                done.store(true, Ordering::Release);
            });
            let mut next = 0;
            loop {
                let last = done.load(Ordering::Acquire);
                for frame in b.receive() {
                    assert_eq!(number(&frame), next);
                    next += 1;
                }
                if last {
                    break;
                }
            }
            assert_eq!(next, N);
        });
    });
}
