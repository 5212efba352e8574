//! How a device sleeps, and what wakes it.

use std::io::{Write, pipe};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use vmring_virtio::Event;
use vmring_virtio::net::{Features, QueueSetup};

use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{Guest, Options, interface, poll_both, readable};
use crate::support::{LONG, eventually, guarded, is_constant};

const NOW: Duration = Duration::ZERO;

#[test]
fn a_notification_wakes_a_device_that_sleeps_and_costs_nothing_otherwise() {
    guarded("notifications", || {
        let [mut a, mut b] = pair("notify");
        poll_both(&mut a, &mut b);
        let notifier = a.device.notifier();
        notifier.notify(1);
        assert!(!a.device.arm(), "it was notified while it was awake");
        a.poll();
        assert!(a.device.arm());
        assert!(!readable(&a.device, Duration::from_millis(20)), "nothing has happened");
        let thread = std::thread::spawn(move || notifier.notify(1));
        assert!(readable(&a.device, LONG));
        thread.join().unwrap();
        a.poll();
        assert!(a.device.arm());
        assert!(!readable(&a.device, Duration::from_millis(20)), "one notification wakes once");
        assert!(a.stats().kicks >= 2);
    });
}

#[test]
fn a_packet_of_another_guest_wakes_it() {
    guarded("a packet wakes", || {
        let [mut a, mut b] = pair("packet wakes");
        b.fill(&one_buffer(2048), 8);
        poll_both(&mut a, &mut b);
        for number in 0..20 {
            assert!(b.device.arm(), "{number}");
            assert!(!readable(&b.device, NOW));
            a.send(&a.frame_to(b.mac(), 60, number));
            a.poll();
            assert!(readable(&b.device, LONG), "{number}");
            b.poll();
            assert_eq!(b.received().len(), 1);
            b.fill(&one_buffer(2048), 1);
            b.poll();
        }
    });
}

/// Both forms of asking for kicks: with flags and with indices.
#[test]
fn a_device_that_sleeps_is_kicked_and_one_that_works_is_not() {
    for without in [Features::EVENT_IDX, Features::NONE] {
        let options = Options { without, ..Options::default() };
        let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("kicks"), &options));
        b.fill(&one_buffer(2048), 64);
        poll_both(&mut a, &mut b);
        a.tx.needs_kick();
        for number in 0..5 {
            assert!(a.device.arm());
            let packet = a.frame_to(b.mac(), 60, number);
            a.send(&packet);
            assert!(a.tx.needs_kick(), "it sleeps, {without:?} {number}");
            assert!(!a.device.arm(), "there is a packet");
            poll_both(&mut a, &mut b);
            a.send(&packet);
            assert!(!a.tx.needs_kick(), "it is awake, {without:?} {number}");
            poll_both(&mut a, &mut b);
            assert_eq!(b.received().len(), 2);
            a.tx.collect();
            b.fill(&one_buffer(2048), 2);
        }
    }
}

/// A device with kick descriptors, which are pipes here.
#[test]
fn a_kick_descriptor_wakes_and_one_that_is_lost_does_not_spin() {
    guarded("kick descriptors", || {
        let [mut a, mut b] = pair("kick descriptors");
        b.fill(&one_buffer(2048), 8);
        assert!(matches!(a.device.stop_queue(1), Poll::Ready(Some(_))));
        let (reader, mut kick) = pipe().unwrap();
        // The front end has a copy, so the pipe outlives the device's own descriptor of it.
        let _copy = reader.try_clone().unwrap();
        let event = Event::kick(OwnedFd::from(reader)).unwrap().expect("a pipe is an event");
        let mut setup = QueueSetup::new(a.tx.layout());
        setup.kick = Some(Arc::new(event));
        a.device.start_queue(1, setup).unwrap();
        poll_both(&mut a, &mut b);
        assert!(a.device.arm());
        assert!(!readable(&a.device, NOW));
        a.send(&a.frame_to(b.mac(), 60, 1));
        kick.write_all(&[1; 8]).unwrap();
        assert!(readable(&a.device, LONG));
        let before = a.stats().kicks;
        poll_both(&mut a, &mut b);
        assert_eq!((b.received().len(), a.stats().kicks), (1, before + 1));
        assert!(a.device.arm());
        assert!(!readable(&a.device, NOW), "the kick was taken");
        drop(kick);
        assert!(readable(&a.device, LONG), "the end of the pipe");
        a.poll();
        assert_eq!(a.stats().kicks_lost, 1);
        assert!(a.device.arm());
        assert!(!readable(&a.device, NOW), "it is not waited for any more");
    });
}

#[test]
fn a_stopped_queue_is_not_waited_for() {
    let mut guest = Guest::new("stopped kick");
    assert!(matches!(guest.device.stop_queue(1), Poll::Ready(Some(_))));
    let (reader, mut kick) = pipe().unwrap();
    let event = Event::kick(OwnedFd::from(reader)).unwrap().expect("a pipe is an event");
    let event = Arc::new(event);
    let mut setup = QueueSetup::new(guest.tx.layout());
    setup.kick = Some(event.clone());
    guest.device.start_queue(1, setup).unwrap();
    guest.poll();
    assert!(matches!(guest.device.stop_queue(1), Poll::Ready(Some(_))));
    // Somebody else still has the descriptor open, as a front end has.
    kick.write_all(&[1; 8]).unwrap();
    guest.poll();
    assert!(guest.device.arm());
    assert!(!readable(&guest.device, NOW));
    drop(event);
}

#[test]
fn a_thread_serves_a_device_and_gives_it_back() {
    guarded("a device's thread", || {
        let [a, b] = pair("spawn");
        let Guest { device, tx, interrupts: _, memory: _, .. } = a;
        let mut b = b;
        let (mac_a, mac_b) = (device.config().mac, b.mac());
        b.fill(&one_buffer(2048), 64);
        b.poll();
        let thread = device.spawn("net-test").unwrap();
        let mut tx = tx;
        for number in 0..10 {
            let packet = crate::net::guest::frame(mac_a, mac_b, 100, number);
            let head = tx.post(&[(112, false)], None).unwrap();
            let address = tx.buffers(head)[0].address;
            tx.write(address, &[&[0; 12][..], &packet].concat());
            tx.expose();
            if tx.needs_kick() {
                thread.notify(1);
            }
            while b.rx.used_index() != number as u16 + 1 {
                let _ = b.device.poll();
                std::thread::yield_now();
            }
            assert_eq!(b.received(), [packet]);
        }
        assert!(thread.pause(LONG));
        let states = thread.call(|device| device.queue_states());
        assert_eq!(states[1].1.next_used, 10);
        thread.resume();
        let name = thread.call(|_| std::thread::current().name().map(str::to_owned));
        assert_eq!(name.as_deref(), Some("net-test"));
        // It sleeps when there is nothing to do.
        let stats = thread.stats_handle();
        eventually("it sleeps", || is_constant(|| stats.stats().wakes));
        let never = thread.call_until(Some(Duration::from_millis(10)), |_| Poll::<()>::Pending);
        assert!(never.is_none());
        let device = thread.stop();
        assert_eq!(device.stats().tx_packets, 10);
    });
}

#[test]
fn a_dropped_thread_ends() {
    guarded("a dropped thread", || {
        let guest = Guest::new("dropped");
        let stats = guest.device.stats_handle();
        let thread = guest.device.spawn("net-dropped").unwrap();
        thread.notify(0);
        drop(thread);
        assert_eq!(stats.stats().broken_queues, 0, "the counters outlive the device");
    });
}
