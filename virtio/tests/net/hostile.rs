//! Guests that break the rules. They harm nobody but themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmring_virtio::net::Features;

use crate::driver::{ARENA, Descriptor, NEXT, WRITE};
use crate::frontend::memory;
use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{FILE_LEN, Guest, HEADER, Options, interface, memory_of, poll_both};
use crate::support::{Dice, guarded, scaled};

/// Makes a broken chain available on a queue: a descriptor outside of the memory.
fn post_broken(guest: &mut Guest, rx: bool, head: u16) {
    let driver = if rx { &mut guest.rx } else { &mut guest.tx };
    let flags = if rx { WRITE } else { 0 };
    driver.set_descriptor(head, Descriptor { address: 0xdead_0000_0000, len: 100, flags, next: 0 });
    driver.make_available(head);
    driver.expose();
}

#[test]
fn a_broken_chain_costs_that_chain() {
    let without = Features::EVENT_IDX | Features::IN_ORDER;
    let options = Options { without, ..Options::default() };
    let [mut a, mut b] = [0, 1].map(|_| Guest::with(interface("broken chains"), &options));
    // Without IN_ORDER the driver takes descriptors from the end, so the first ones are free.
    b.post(&one_buffer(2048));
    post_broken(&mut b, true, 200);
    b.post(&one_buffer(2048));
    b.poll();
    let packets = [0, 1].map(|n| a.frame_to(b.mac(), 100, n));
    a.send(&packets[0]);
    post_broken(&mut a, false, 200);
    a.send(&packets[1]);
    poll_both(&mut a, &mut b);
    assert_eq!((b.rx.used_index(), a.tx.used_index()), (3, 3));
    // The broken one is in its place, with the used length 0.
    assert_eq!((b.rx.element(1), a.tx.element(1)), ((200, 0), (200, 0)));
    assert_eq!(b.rx.element(0).1, 112);
    assert_eq!(b.rx.element(2).1, 112);
    assert_eq!((a.stats().broken_chains, b.stats().broken_chains), (1, 1));
    assert!(!a.device.needs_reset());
}

#[test]
fn a_cyclic_chain_ends() {
    let [mut a, mut b] = pair("cycle");
    let cycle = Descriptor { address: ARENA, len: 16, flags: NEXT, next: 7 };
    a.tx.set_descriptor(7, cycle);
    a.tx.make_available(7);
    a.tx.expose();
    poll_both(&mut a, &mut b);
    assert_eq!((a.tx.used_index(), a.stats().broken_chains), (1, 1));
}

#[test]
fn a_broken_index_costs_the_queue_until_a_reset() {
    let [mut a, mut b] = pair("broken index");
    b.fill(&one_buffer(2048), 4);
    a.fill(&one_buffer(2048), 4);
    poll_both(&mut a, &mut b);
    a.tx.set_available_index(5000);
    a.poll();
    assert!(a.device.needs_reset());
    assert_eq!((a.device.take_broken_queue(), a.device.take_broken_queue()), (Some(1), None));
    assert_eq!((a.interrupts.config(), a.stats().broken_queues), (1, 1), "the driver is told once");
    for _ in 0..5 {
        assert!(!a.device.poll().again, "it does not spin");
    }
    assert!(a.device.arm(), "it sleeps");
    // The other queue goes on, and so does the other guest.
    let packet = b.frame_to(a.mac(), 60, 1);
    b.send(&packet);
    poll_both(&mut a, &mut b);
    assert_eq!(a.received(), [packet]);
    assert!(a.device.reset().is_ready());
    assert!(!a.device.needs_reset());
}

#[test]
fn a_receive_queue_with_a_broken_index_gives_back_what_it_has() {
    let [mut a, mut b] = pair("broken receiver");
    b.fill(&one_buffer(2048), 2);
    b.poll();
    b.rx.set_available_index(0x8000);
    let packet = a.frame_to(b.mac(), 60, 1);
    a.send(&packet);
    poll_both(&mut a, &mut b);
    assert!(b.device.needs_reset());
    assert_eq!(b.received(), [packet], "what was posted before is used");
    assert!(b.device.pause().is_ready());
}

#[test]
fn descriptors_may_point_at_the_rings_themselves() {
    let [mut a, mut b] = pair("rings as buffers");
    let layout = b.rx.layout();
    for address in [layout.descriptors, layout.available, layout.used] {
        b.rx.set_descriptor(3, Descriptor { address, len: 1536, flags: WRITE, next: 0 });
        b.rx.make_available(3);
        b.rx.expose();
        b.poll();
        let packet = a.frame_to(b.mac(), 200, 1);
        a.send(&packet);
        poll_both(&mut a, &mut b);
    }
    // What became of `b` is its own affair. The other guest still sends, and gets its buffers back.
    let sent = a.tx.collect();
    assert_eq!(sent.len(), 3);
}

#[test]
fn a_driver_that_makes_everything_available_again_and_again_does_not_spin() {
    let [mut a, mut b] = pair("flood");
    // One small chain, again and again, as often as the queue allows.
    a.tx.set_descriptor(0, Descriptor { address: ARENA, len: 4, flags: 0, next: 0 });
    for _ in 0..10 {
        for _ in 0..256 {
            a.tx.make_available(0);
        }
        a.tx.expose();
        let mut polls = 0;
        while a.device.poll().again {
            polls += 1;
            assert!(polls < 100, "the work of a poll has a bound");
        }
        b.poll();
    }
    assert_eq!(a.stats().tx_short, 2560);
}

/// Goal: a guest that changes its memory all the time harms its own packets only. Method: a thread
/// writes everywhere into the buffers of `a`, while `a` sends to `b`, and `b` and `c` exchange packets
/// that are checked whole.
#[test]
fn a_guest_that_scribbles_into_its_buffers_harms_only_itself() {
    guarded("a guest that scribbles", || {
        let file = memory(FILE_LEN);
        let interface = interface("scribble");
        let mut a = Guest::over(interface, &Options::default(), memory_of(&file));
        let [mut b, mut c] = [0, 1].map(|_| Guest::new("scribble"));
        let stop = Arc::new(AtomicBool::new(false));
        let scribbler = {
            // The same memory at other addresses, as in another process.
            let (memory, stop) = (memory_of(&file), stop.clone());
            std::thread::spawn(move || {
                let mut dice = Dice::new(7);
                while !stop.load(Ordering::Relaxed) {
                    // The headers, the packets and the indirect tables: everything but the rings.
                    let at = ARENA + dice.below(0x10_0000);
                    let bytes = dice.below(u64::MAX).to_le_bytes();
                    memory.slice(at, 8).expect("memory").copy_from(&bytes);
                    std::thread::yield_now();
                }
            })
        };
        let (mut sent, mut came) = (0u32, 0u32);
        for round in 0..scaled(400) as u32 {
            a.fill(&one_buffer(2048), 8);
            b.fill(&one_buffer(2048), 64);
            c.fill(&one_buffer(2048), 64);
            let own = a.frame_to(b.mac(), 900, round);
            a.send_in(&own, &[12, 400], Some(0));
            let other = c.frame_to(b.mac(), 700, round);
            c.send(&other);
            let answer = b.frame_to(c.mac(), 800, round);
            b.send(&answer);
            sent += 1;
            for _ in 0..2 {
                [&mut a, &mut b, &mut c].into_iter().for_each(Guest::poll);
            }
            // Broadcasts of the scribbler may be among them.
            let is_of = |bytes: &[u8], from: &[u8; 6]| bytes.get(6..12) == Some(from);
            let [mac_b, mac_c] = [b.mac(), c.mac()];
            for (len, bytes) in b.returned() {
                assert_eq!(len as usize, bytes.len());
                if bytes.len() > HEADER && is_of(&bytes[HEADER..], &mac_c) {
                    assert_eq!(bytes[HEADER..], other);
                    came += 1;
                }
            }
            let answers: Vec<_> = c.returned().into_iter().map(|one| one.1).collect();
            let answers: Vec<_> = (answers.iter())
                .filter(|bytes| bytes.len() > HEADER && is_of(&bytes[HEADER..], &mac_b))
                .collect();
            assert_eq!(answers.len(), 1);
            assert_eq!(answers[0][HEADER..], answer);
            b.tx.collect();
            c.tx.collect();
            a.tx.collect();
            a.rx.collect();
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().expect("the scribbler");
        assert_eq!(came, sent);
    });
}
