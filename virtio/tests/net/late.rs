//! Interfaces that end writes late or in another order, several queues, and interfaces that restart.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use vmring_virtio::net::{Features, NetDevice, NetSettings, QueueSetup, ServeError, VhostUserNet};

use crate::driver::Driver;
use crate::frontend::{GET_VRING_BASE, Sent, copies};
use crate::net::basics::{one_buffer, pair};
use crate::net::guest::{
    Guest, Interrupts, Options, driver, frame, interface, layout, memory, of_flow, poll_both,
    readable, wide_interface,
};
use crate::net::remote::{Remote, Server};
use crate::net::wire::{Control, wire};
use crate::support::{LONG, eventually, guarded};

fn held(change: impl FnOnce(&mut vmring::device::Capabilities)) -> ([Guest; 2], Control) {
    let (interfaces, control) = wire(change);
    let guests = interfaces.map(|interface| Guest::with(interface, &Options::default()));
    (guests, control)
}

/// A device that takes a guest's memory itself, so that nothing is copied before it is sent.
fn in_place(caps: &mut vmring::device::Capabilities) {
    (caps.read_segments, caps.write_segments) = (256, 256);
}

#[test]
fn writes_that_end_in_another_order_are_used_in_order() {
    let ([mut a, mut b], control) = held(in_place);
    control.reverse();
    b.fill(&one_buffer(2048), 64);
    b.poll();
    for round in 0..5 {
        let packets: Vec<_> = (0..20).map(|n| a.frame_to(b.mac(), 60, round * 20 + n)).collect();
        packets.iter().for_each(|packet| a.send(packet));
        poll_both(&mut a, &mut b);
        // The driver checks the order of what it gets back.
        assert_eq!(a.tx.collect().len(), 20);
        assert_eq!(b.received(), packets);
        b.fill(&one_buffer(2048), 20);
    }
}

#[test]
fn a_stop_waits_for_writes_and_takes_no_more() {
    guarded("a stop that waits", || {
        let ([mut a, mut b], control) = held(in_place);
        b.fill(&one_buffer(2048), 64);
        b.poll();
        control.hold(true);
        a.send(&a.frame_to(b.mac(), 60, 1));
        a.poll();
        assert_eq!(a.tx.used_index(), 0, "it has not ended");
        assert!(a.device.stop_queue(1).is_pending());
        a.send(&a.frame_to(b.mac(), 60, 2));
        a.poll();
        assert!(a.device.stop_queue(1).is_pending());
        assert!(a.device.arm(), "whoever waits sleeps");
        assert!(!readable(&a.device, Duration::from_millis(10)));
        control.hold(false);
        assert!(readable(&a.device, LONG), "and is woken when it has ended");
        a.poll();
        let Poll::Ready(Some(state)) = a.device.stop_queue(1) else { panic!("it has ended") };
        assert_eq!((state.next_available, state.next_used), (1, 1));
        assert_eq!(a.tx.used_index(), 1);
        a.start_queue(1, 1);
        poll_both(&mut a, &mut b);
        assert_eq!((a.tx.used_index(), b.received().len()), (2, 2));
    });
}

#[test]
fn a_pause_and_new_memory_wait_for_writes() {
    guarded("a pause that waits", || {
        let ([mut a, mut b], control) = held(in_place);
        b.fill(&one_buffer(2048), 64);
        b.poll();
        control.hold(true);
        a.send(&a.frame_to(b.mac(), 60, 1));
        a.poll();
        let memory = a.memory.clone();
        assert!(a.device.pause().is_pending());
        assert!(a.device.set_memory(&memory).is_pending());
        control.hold(false);
        a.poll();
        assert!(a.device.pause().is_ready());
        assert!(matches!(a.device.set_memory(&memory), Poll::Ready(Ok(()))));
        a.device.resume();
        a.send(&a.frame_to(b.mac(), 60, 2));
        poll_both(&mut a, &mut b);
        assert_eq!(b.received().len(), 2);
    });
}

/// An interface that does not give posted reads back at once.
#[test]
fn buffers_that_the_interface_holds_on_to_come_back_later() {
    guarded("held reads", || {
        let ([mut a, mut b], control) = held(in_place);
        control.hold_reads(true);
        b.fill(&one_buffer(2048), 8);
        b.poll();
        b.device.enable_queue(0, false);
        assert!(b.device.pause().is_pending(), "they are not back");
        b.poll();
        assert!(b.device.arm(), "whoever waits sleeps");
        b.device.resume();
        // It is enabled again before they are back.
        b.device.enable_queue(0, true);
        b.poll();
        control.hold_reads(false);
        assert!(!b.device.arm() || readable(&b.device, LONG), "and is woken when they are");
        b.poll();
        let packet = a.frame_to(b.mac(), 60, 1);
        a.send(&packet);
        poll_both(&mut a, &mut b);
        assert_eq!(b.received(), [packet]);
        assert!(b.device.pause().is_ready());
        assert_eq!(b.device.queue_states()[0].1.next_available, 1);
    });
}

#[test]
fn a_full_ring_waits_for_the_interface_and_not_for_the_guest() {
    guarded("a full ring", || {
        let (interfaces, control) = wire(in_place);
        let mut options = Options { without: Features::NONE, ..Options::default() };
        options.settings.depth = 4;
        let [mut a, mut b] = interfaces.map(|interface| Guest::with(interface, &options));
        b.fill(&one_buffer(2048), 64);
        b.poll();
        control.hold(true);
        for number in 0..10 {
            a.send(&a.frame_to(b.mac(), 60, number));
        }
        a.poll();
        assert!(a.device.arm(), "what the ring does not take is no reason to stay awake");
        control.hold(false);
        assert!(readable(&a.device, LONG));
        for _ in 0..5 {
            poll_both(&mut a, &mut b);
        }
        assert_eq!((a.tx.collect().len(), b.received().len()), (10, 10));
    });
}

/// The device below does not end a write, and does not end at all for a while. The connection ends
/// all the same, and the front end's memory is unmapped.
#[test]
fn a_connection_ends_although_the_interface_holds_on() {
    guarded("a connection that ends", || {
        let ([interface, _other], control) = wire(in_place);
        let device = VhostUserNet::new(interface, NetSettings::default()).unwrap();
        let (mut server, socket) = Server::with(device);
        let mut remote = Remote::new(socket, Features::NONE);
        remote.sync();
        control.hold(true);
        remote.send(&frame(remote.mac, [2, 0, 0, 0, 0, 9], 100, 1));
        eventually("the interface has it", || control.taken() == 1);
        // The front end waits for the ring, and then for nothing any more.
        remote.frontend.send(&Sent::state(GET_VRING_BASE, 1, 0));
        let Remote { frontend, file, rings, .. } = remote;
        drop((frontend, rings));
        let (device, ended) = server.join();
        assert!(matches!(ended, Err(ServeError::Stuck(_))), "{ended:?}");
        assert!(matches!(copies(&file), None | Some(1)), "the memory is unmapped");
        drop(device);
    });
}

#[test]
fn an_interface_that_restarts_loses_no_buffer() {
    guarded("a restart", || {
        let [mut a, mut b] = pair("restart");
        for number in 0..5 {
            b.fill(&one_buffer(2048), 8);
            poll_both(&mut a, &mut b);
            // The rings are inline: they let go when they are driven.
            let _ = b.device.interface().restart(Duration::ZERO);
            for _ in 0..10 {
                poll_both(&mut a, &mut b);
            }
            let packet = a.frame_to(b.mac(), 60, number);
            a.send(&packet);
            poll_both(&mut a, &mut b);
            assert_eq!(b.received(), [packet], "{number}");
            assert_eq!(b.device.failure(), None);
        }
    });
}

/// A guest with several pairs of queues, and the device behind it.
struct Wide {
    device: NetDevice,
    rx: Vec<Driver>,
    commands: Driver,
    interrupts: Arc<Interrupts>,
    memory: vmring::GuestMemory,
}

fn wide(interface: vmring::Interface, queue_pairs: u16) -> Wide {
    let interrupts = Arc::new(Interrupts::default());
    let mut settings = NetSettings::default();
    (settings.queue_pairs, settings.control_queue) = (queue_pairs, true);
    let mut device = NetDevice::new(interface, interrupts.clone(), settings).unwrap();
    let accepted = device.features().without(Features::EVENT_IDX);
    device.set_features(accepted).unwrap();
    let memory = memory(None);
    assert!(device.set_memory(&memory).is_ready());
    let pairs = device.queue_pairs();
    assert_eq!(device.config().max_virtqueue_pairs, pairs);
    let control = device.control_index();
    assert_eq!(control, pairs * 2);
    let rx: Vec<_> = (0..pairs)
        .map(|pair| {
            let arena = 0x4000_0000 + u64::from(pair) * 0x10_0000;
            driver(&memory, pair * 2, 64, accepted, 0).with_arena(arena)
        })
        .collect();
    let commands = driver(&memory, control, 16, accepted, 0).with_arena(0x4070_0000);
    for index in (0..pairs).map(|pair| pair * 2).chain([control]) {
        let size = if index == control { 16 } else { 64 };
        device.start_queue(index, QueueSetup::new(layout(index, size))).unwrap();
    }
    Wide { device, rx, commands, interrupts, memory }
}

impl Wide {
    fn set_pairs(&mut self, pairs: u16) -> u8 {
        let head = self.commands.post(&[(4, false), (1, true)], None).unwrap();
        let buffers = self.commands.buffers(head).to_vec();
        let bytes = [&[4, 0][..], &pairs.to_le_bytes()].concat();
        self.commands.write(buffers[0].address, &bytes);
        self.commands.expose();
        self.poll();
        assert_eq!(self.commands.collect().len(), 1);
        self.commands.read(buffers[1].address, 1)[0]
    }

    fn poll(&mut self) {
        for _ in 0..3 {
            while self.device.poll().again {}
        }
    }

    /// How many packets each queue has got.
    fn received(&mut self) -> Vec<usize> {
        self.rx.iter_mut().map(|rx| rx.collect().len()).collect()
    }
}

#[test]
fn several_pairs_are_switched_and_a_flow_stays_in_one() {
    let (interfaces, control) = wire(|caps| {
        in_place(caps);
        caps.reading_rings = 3;
    });
    let [interface, _] = interfaces;
    // The interface has three readers, so there are no more pairs.
    let mut guest = wide(interface, 8);
    assert_eq!(guest.device.queue_pairs(), 3);
    for rx in &mut guest.rx {
        for _ in 0..40 {
            rx.post(&[(2048, true)], None).unwrap();
        }
        rx.expose();
    }
    guest.poll();
    let inject = |flow: u8, count: u32| {
        for number in 0..count {
            let mut packet = frame([2; 6], [4; 6], 60, number);
            packet[14] = flow;
            control.inject(0, [0; 12], packet);
        }
    };
    // A driver begins with one pair, and everything arrives there.
    for flow in 0..3 {
        inject(flow, 2);
    }
    guest.poll();
    assert_eq!(guest.received(), [6, 0, 0]);
    assert_eq!([guest.set_pairs(0), guest.set_pairs(4)], [1, 1], "impossible numbers");
    assert_eq!(guest.set_pairs(3), 0);
    for flow in 0..3 {
        inject(flow, 2 + u32::from(flow));
    }
    guest.poll();
    assert_eq!(guest.received(), [2, 3, 4]);
    // Fewer again: the buffers of the others are available again, and nothing is lost.
    assert_eq!(guest.set_pairs(1), 0);
    for (index, state) in guest.device.queue_states().into_iter().skip(1).take(2) {
        assert_eq!(state.next_available, state.next_used, "queue {index}");
    }
    for flow in 0..3 {
        inject(flow, 1);
    }
    guest.poll();
    assert_eq!(guest.received(), [3, 0, 0]);
    assert!(guest.device.arm());
    assert!(guest.interrupts.of(2) > 0 && guest.interrupts.of(4) > 0);
    assert_eq!(guest.memory.regions().len(), 2);
}

/// The embedded network spreads flows over the pairs that a guest uses, and over no others; a flow stays
/// in its pair, and a guest that uses fewer pairs loses none of its flows.
#[test]
fn a_network_spreads_flows_over_the_pairs_in_use() {
    const FLOWS: u16 = 48;
    let name = "pairs in use";
    let mut guest = wide(wide_interface(name, 3), 8);
    assert_eq!(guest.device.queue_pairs(), 3, "the port has three queues");
    let mut sender = Guest::with(interface(name), &Options::default());
    let (to, from) = (guest.device.config().mac, sender.mac());
    // Which pair has got each flow.
    let mut spread = |guest: &mut Wide| {
        for rx in &mut guest.rx {
            while rx.post(&[(2048, true)], None).is_some() {}
            rx.expose();
        }
        guest.poll();
        (0..FLOWS).for_each(|flow| sender.send(&of_flow(from, to, flow)));
        while sender.device.poll().again {}
        sender.tx.collect();
        let mut pairs = vec![None; usize::from(FLOWS)];
        for _ in 0..4 {
            guest.poll();
            for (pair, rx) in guest.rx.iter_mut().enumerate() {
                for one in rx.collect() {
                    let at = one.buffers[0].address + 12 + 34;
                    let bytes = rx.read(at, 2);
                    let flow = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
                    assert_eq!(pairs[flow].replace(pair), None, "it comes once");
                }
            }
        }
        pairs.into_iter().map(|pair| pair.expect("it comes")).collect::<Vec<_>>()
    };
    assert!(spread(&mut guest).iter().all(|pair| *pair == 0), "a driver begins with one pair");
    assert_eq!(guest.set_pairs(3), 0);
    let all = spread(&mut guest);
    for pair in 0..3 {
        assert!(all.iter().filter(|of| **of == pair).count() > 4, "{all:?}");
    }
    assert_eq!(spread(&mut guest), all, "a flow stays");
    // A guest disables a queue by itself, as over vhost-user.
    for disabled in 0..3u16 {
        guest.device.enable_queue(disabled * 2, false);
        let others = spread(&mut guest);
        for (before, after) in all.iter().zip(&others) {
            assert!(*after != usize::from(disabled));
            assert!(*before == usize::from(disabled) || before == after, "no other flow moves");
        }
        guest.device.enable_queue(disabled * 2, true);
        assert_eq!(spread(&mut guest), all);
    }
    assert_eq!(guest.set_pairs(2), 0);
    assert!(spread(&mut guest).iter().all(|pair| *pair < 2));
    assert_eq!(guest.set_pairs(1), 0);
    assert!(spread(&mut guest).iter().all(|pair| *pair == 0));
    let drops = guest.device.interface().drops();
    assert!(drops.iter().all(|(_, count)| *count == 0), "{drops:?}");
}
