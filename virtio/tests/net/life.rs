//! Pause, stop, reset, memory, and what else happens to a device that runs.

use std::sync::{Arc, Mutex};
use std::task::Poll;

use vmring_core::guest::{DirtyLog, GuestMemory};
use vmring_virtio::net::{Features, NetError, QueueSetup};

use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{Guest, HEADER, Options, frame, interface, memory, poll_both};

#[test]
fn a_disabled_queue_receives_nothing_and_is_emptied() {
    let [mut a, mut b] = pair("disabled");
    b.device.enable_queue(0, false);
    a.device.enable_queue(1, false);
    b.fill(&one_buffer(2048), 4);
    let packet = a.frame_to(b.mac(), 60, 1);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!(a.tx.collect().len(), 1, "it is taken");
    assert_eq!((a.stats().tx_disabled, a.stats().tx_packets), (1, 0));
    a.device.enable_queue(1, true);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!((a.stats().tx_packets, b.returned().len()), (1, 0));
    // A guest kicks its receive queue once, perhaps before it is enabled. What the network kept arrives.
    b.device.enable_queue(0, true);
    poll_both(&mut a, &mut b);
    assert_eq!(b.received(), [packet]);
}

#[test]
fn buffers_come_back_when_their_queue_is_disabled() {
    let [mut a, mut b] = pair("disabling");
    b.fill(&one_buffer(2048), 4);
    b.poll();
    b.device.enable_queue(0, false);
    let states = b.device.queue_states();
    assert_eq!(states[0].1.next_available, 0, "they are available again");
    a.send(&a.frame_to(b.mac(), 60, 1));
    poll_both(&mut a, &mut b);
    assert_eq!(b.returned().len(), 0);
}

#[test]
fn a_pause_moves_the_available_index_back_and_uses_nothing() {
    let [mut a, mut b] = pair("pause");
    b.fill(&one_buffer(2048), 8);
    b.poll();
    a.send(&a.frame_to(b.mac(), 60, 1));
    poll_both(&mut a, &mut b);
    assert_eq!(b.received().len(), 1);
    assert_eq!(b.device.queue_states()[0].1.next_available, 8);
    assert!(b.device.pause().is_ready());
    let state = b.device.queue_states()[0].1;
    assert_eq!((state.next_available, state.next_used), (1, 1));
    // Nothing arrives, nothing is taken, and nothing is written.
    let packets = [a.frame_to(b.mac(), 60, 2), b.frame_to(a.mac(), 60, 3)];
    a.send(&packets[0]);
    a.fill(&one_buffer(2048), 1);
    b.send(&packets[1]);
    poll_both(&mut a, &mut b);
    assert_eq!((b.returned().len(), b.tx.used_index()), (0, 0));
    b.device.resume();
    poll_both(&mut a, &mut b);
    poll_both(&mut a, &mut b);
    assert_eq!((b.received(), a.received()), (vec![packets[0].clone()], vec![packets[1].clone()]));
}

#[test]
fn a_queue_that_is_stopped_goes_on_where_it_was() {
    let [mut a, mut b] = pair("stop");
    let mut came = Vec::new();
    let packets: Vec<_> = (0..60).map(|n| frame(a.mac(), b.mac(), 80, n)).collect();
    b.fill(&one_buffer(2048), 40);
    for (number, packet) in packets.iter().enumerate() {
        a.send(packet);
        if number % 3 == 0 {
            a.poll();
        }
        b.poll();
        if number % 7 == 0 {
            let Poll::Ready(Some(state)) = b.device.stop_queue(0) else { panic!("it stops") };
            assert_eq!(state.next_available, state.next_used);
            assert_eq!(state.next_used, b.rx.used_index());
            assert!(!b.device.is_running(0));
            let Poll::Ready(Some(sent)) = a.device.stop_queue(1) else { panic!("it stops") };
            assert_eq!(sent.next_used, a.tx.used_index());
            b.start_queue(0, state.next_available);
            a.start_queue(1, sent.next_available);
        }
        came.extend(b.received());
        b.fill(&one_buffer(2048), 40);
        a.tx.collect();
    }
    poll_both(&mut a, &mut b);
    came.extend(b.received());
    assert_eq!(came, packets);
    assert!(matches!(b.device.stop_queue(1), Poll::Ready(Some(_))));
    assert!(matches!(b.device.stop_queue(1), Poll::Ready(None)), "it does not run");
    assert!(matches!(b.device.stop_queue(9), Poll::Ready(None)), "there is none");
}

#[test]
fn memory_is_replaced_while_packets_move_and_the_old_one_goes() {
    let [mut a, mut b] = pair("memory");
    b.fill(&one_buffer(2048), 40);
    b.poll();
    for number in 0..5 {
        let packet = a.frame_to(b.mac(), 100, number);
        a.send(&packet);
        a.poll();
        // The same mappings in another table, and one more region for a while.
        let old = b.memory.clone();
        let mut regions = old.regions().to_vec();
        let extra = Arc::new(vmring_core::HeapBacking::new(4096));
        let gone = Arc::downgrade(&extra);
        let region = vmring_core::guest::GuestRegion::new(0x9000_0000, extra);
        regions.push(region);
        let larger = GuestMemory::new(regions).unwrap();
        assert!(matches!(b.device.set_memory(&larger), Poll::Ready(Ok(()))));
        drop(larger);
        assert!(gone.upgrade().is_some(), "the device has it");
        b.poll();
        assert!(matches!(b.device.set_memory(&old), Poll::Ready(Ok(()))));
        assert!(gone.upgrade().is_none(), "nothing keeps the region that is gone");
        poll_both(&mut a, &mut b);
        assert_eq!(b.received(), [packet], "{number}");
    }
}

#[test]
fn a_queue_outside_of_new_memory_is_stopped() {
    let [mut a, mut b] = pair("lost memory");
    b.fill(&one_buffer(2048), 4);
    b.poll();
    let arena = GuestMemory::new([b.memory.regions()[1].clone()]).unwrap();
    let Poll::Ready(Err(error)) = b.device.set_memory(&arena) else { panic!("it is missing") };
    assert!(matches!(error, NetError::Queue { .. }), "{error}");
    assert!(!b.device.is_running(0) && !b.device.is_running(1));
    a.send(&a.frame_to(b.mac(), 60, 1));
    poll_both(&mut a, &mut b);
}

#[test]
fn a_reset_forgets_the_driver_and_another_one_begins() {
    let [mut a, mut b] = pair("reset");
    for round in 0..20 {
        b.fill(&one_buffer(2048), 4);
        b.poll();
        let packet = a.frame_to(b.mac(), 60, round);
        a.send(&packet);
        poll_both(&mut a, &mut b);
        assert_eq!(b.received(), [packet]);
        assert!(b.device.reset().is_ready());
        assert_eq!(b.device.accepted_features(), Features::NONE);
        let setup = QueueSetup::new(b.rx.layout());
        assert!(matches!(b.device.start_queue(0, setup), Err(NetError::Legacy)));
        // Firmware and then a system: other features, other indices.
        let without = if round % 2 == 0 { Features::EVENT_IDX } else { Features::IN_ORDER };
        let accepted = b.device.features().without(without);
        b.device.set_features(accepted).unwrap();
        b.rx = crate::net::guest::driver(&b.memory, 0, 256, accepted, 0);
        b.tx = crate::net::guest::driver(&b.memory, 1, 256, accepted, 0);
        b.start(0);
    }
}

#[test]
fn what_waits_for_one_driver_does_not_reach_the_next() {
    let [mut a, mut b] = pair("stale packets");
    b.poll();
    // The guest has no buffers, so the network keeps the packet.
    a.send(&a.frame_to(b.mac(), 60, 1));
    poll_both(&mut a, &mut b);
    let accepted = b.device.accepted_features();
    assert!(b.device.reset().is_ready());
    assert_eq!(b.stats().rx_discarded, 1);
    b.device.set_features(accepted).unwrap();
    b.rx = crate::net::guest::driver(&b.memory, 0, 256, accepted, 0);
    b.tx = crate::net::guest::driver(&b.memory, 1, 256, accepted, 0);
    b.start(0);
    b.fill(&one_buffer(2048), 4);
    b.poll();
    assert_eq!(b.received().len(), 0);
    let packet = a.frame_to(b.mac(), 60, 2);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!(b.received(), [packet]);
}

#[test]
fn what_was_not_offered_is_refused() {
    let mut device = Guest::new("features").device;
    let offered = device.features();
    assert!(offered.has(Features::VERSION_1 | Features::IN_ORDER | Features::EVENT_IDX));
    // The embedded network as it is here completes no checksums, and has one reader.
    assert!(!offered.has(Features::CSUM) && !offered.has(Features::MQ));
    assert!(!offered.has(Features::CTRL_VQ), "only with the setting");
    let error = device.set_features(offered | Features::CSUM).unwrap_err();
    assert!(matches!(error, NetError::NotOffered { bits: 1 }), "{error}");
}

/// Records what was marked.
#[derive(Default)]
struct Log(Mutex<Vec<(u64, u64)>>);

impl DirtyLog for Log {
    fn mark(&self, guest_address: u64, len: u64) {
        self.0.lock().unwrap().push((guest_address, len));
    }
}

#[test]
fn exactly_what_was_written_is_in_the_dirty_log() {
    let log = Arc::new(Log::default());
    let options = Options { dirty_log: Some(log.clone()), ..Options::default() };
    let mut a = Guest::new("dirty log");
    let mut b = Guest::with(interface("dirty log"), &options);
    b.post(&crate::net::basics::shape("netkvm, header apart"));
    b.post(&one_buffer(2048));
    b.poll();
    let buffers = [0, 2].map(|head| b.rx.buffers(head).to_vec());
    log.0.lock().unwrap().clear();
    a.send(&a.frame_to(b.mac(), 100, 1));
    a.send(&a.frame_to(b.mac(), 200, 2));
    poll_both(&mut a, &mut b);
    assert_eq!(b.received().len(), 2);
    let marks = log.0.lock().unwrap().clone();
    let arena: Vec<_> =
        marks.iter().copied().filter(|(address, _)| *address >= crate::driver::ARENA).collect();
    let [apart, one] = buffers;
    let expected = [
        (apart[0].address, HEADER as u64),
        (apart[1].address, 100),
        (one[0].address, HEADER as u64 + 200),
    ];
    assert_eq!(arena, expected);
    // The used index was published after them.
    let used = b.rx.layout().used;
    let index = marks.iter().position(|mark| mark.0 == used + 2).expect("the index is marked");
    let last = marks.iter().rposition(|mark| mark.0 >= crate::driver::ARENA).unwrap();
    assert!(last < index, "{marks:x?}");
}

#[test]
fn a_log_that_begins_while_buffers_are_posted_misses_nothing() {
    let log = Arc::new(Log::default());
    let [mut a, mut b] = pair("late log");
    b.post(&one_buffer(2048));
    b.poll();
    let regions = b.memory.regions().iter().cloned();
    let logged = GuestMemory::new(regions.map(|region| region.dirty_log(Some(log.clone()))));
    assert!(matches!(b.device.set_memory(&logged.unwrap()), Poll::Ready(Ok(()))));
    let buffer = b.rx.buffers(0)[0];
    a.send(&a.frame_to(b.mac(), 300, 1));
    poll_both(&mut a, &mut b);
    assert_eq!(b.received().len(), 1);
    assert!(log.0.lock().unwrap().contains(&(buffer.address, 312)));
}

#[test]
fn a_link_that_is_down_moves_nothing() {
    let [mut a, mut b] = pair("link");
    b.fill(&one_buffer(2048), 4);
    b.poll();
    b.device.set_link(false);
    assert_eq!((b.device.config().status, b.interrupts.config()), (0, 1));
    a.send(&a.frame_to(b.mac(), 60, 1));
    b.send(&b.frame_to(a.mac(), 60, 2));
    poll_both(&mut a, &mut b);
    assert_eq!((b.returned().len(), b.tx.collect().len()), (0, 1));
    assert_eq!((b.stats().tx_packets, b.stats().tx_disabled), (0, 1));
    b.device.set_link(true);
    poll_both(&mut a, &mut b);
    assert_eq!((b.device.config().status, b.interrupts.config(), b.received().len()), (1, 2, 1));
    b.device.set_link(true);
    assert_eq!(b.interrupts.config(), 2, "nothing has changed");
}

#[test]
fn an_mtu_is_what_the_interface_carries() {
    let mut guest = Guest::new("mtu");
    assert_eq!(guest.device.config().mtu, 1500);
    assert!(guest.device.set_mtu(1400) && guest.device.config().mtu == 1400);
    assert!(!guest.device.set_mtu(1501) && !guest.device.set_mtu(67));
    assert_eq!(guest.device.config().mtu, 1400);
}

#[test]
fn an_announcement_is_a_rarp_packet_to_everybody() {
    let [mut a, mut b] = pair("announcement");
    b.fill(&one_buffer(2048), 4);
    b.poll();
    let mac = a.mac();
    assert!(a.device.announce(mac));
    poll_both(&mut a, &mut b);
    let received = b.received();
    assert_eq!(received.len(), 1);
    let packet = &received[0];
    assert_eq!((packet.len(), &packet[..6], &packet[6..12]), (60, &[0xff; 6][..], &mac[..]));
    assert_eq!(packet[12..22], [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&packet[22..28], &packet[32..38]), (&mac[..], &mac[..]));
    assert_eq!(a.stats().announcements, 1);
    // A guest without a control queue cannot be asked to do it.
    a.device.request_announcement();
    poll_both(&mut a, &mut b);
    assert_eq!((b.received().len(), a.interrupts.config()), (1, 0));
}

#[test]
fn an_interface_that_ends_is_a_failure_and_no_end_of_the_guest() {
    let [mut a, mut b] = pair("failure");
    b.fill(&one_buffer(2048), 4);
    b.poll();
    a.poll();
    assert_eq!(b.device.failure(), None);
    // The rings are inline, so they end when they are driven.
    let _ = b.device.interface().stop(std::time::Duration::ZERO);
    b.send(&b.frame_to(a.mac(), 60, 1));
    poll_both(&mut a, &mut b);
    b.send(&b.frame_to(a.mac(), 60, 2));
    poll_both(&mut a, &mut b);
    assert!(b.device.failure().is_some());
    assert_eq!(b.tx.collect().len(), 2, "the guest gets its buffers back");
    assert!(b.device.arm(), "it does not spin");
    assert!(b.device.pause().is_ready());
    assert_eq!(b.device.queue_states()[0].1.next_available, 0, "no buffer was lost");
}

#[test]
fn a_device_without_memory_refuses_queues() {
    let guest = Guest::new("no memory");
    let mut device = guest.device;
    assert!(matches!(device.stop_queue(0), Poll::Ready(Some(_))));
    assert!(matches!(device.stop_queue(1), Poll::Ready(Some(_))));
    assert!(matches!(device.set_memory(&GuestMemory::new([]).unwrap()), Poll::Ready(Ok(()))));
    let error = device.start_queue(0, QueueSetup::new(guest.rx.layout())).unwrap_err();
    assert!(matches!(error, NetError::Queue { index: 0, .. }), "{error}");
    let error = device.start_queue(7, QueueSetup::new(guest.rx.layout())).unwrap_err();
    assert!(matches!(error, NetError::QueueIndex { index: 7 }), "{error}");
    assert!(matches!(device.set_memory(&memory(None)), Poll::Ready(Ok(()))));
    device.start_queue(0, QueueSetup::new(guest.rx.layout())).unwrap();
    let error = device.start_queue(0, QueueSetup::new(guest.rx.layout())).unwrap_err();
    assert!(matches!(error, NetError::Running { index: 0 }), "{error}");
}
