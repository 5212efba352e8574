//! A device from its activation to its reset.

use std::sync::Arc;
use std::task::Poll;

use virtio_queue::{Queue, QueueT};
use vmring_rust_vmm::{
    ActiveQueue, Error, MemorySource, Negotiated, QueueConversionError, VirtioNet, virtio_queue,
};
use vmring_virtio::net::{Features, NetError, NetSettings};

use crate::guest::{
    CONFIG, Guest, Interrupts, STEP, frame, interface, mac, memory, poll, poll_both, queue, queues,
    start,
};

fn ready<T>(poll: Poll<T>) -> T {
    match poll {
        Poll::Ready(ready) => ready,
        Poll::Pending => panic!("nothing is on its way"),
    }
}

#[test]
fn the_configuration_space_is_read_as_bytes() {
    let (net, _, _, _) = start("config");
    let config = net.device().config();
    let mut bytes = [0xaa; 16];
    net.read_config(0, &mut bytes);
    assert_eq!(bytes[..6], config.mac);
    assert_eq!(bytes[6..8], 1u16.to_le_bytes(), "the link is up");
    assert_eq!(bytes[10..12], config.mtu.to_le_bytes());
    assert_eq!(bytes[12..], [0; 4], "behind the end");
    let mut two = [0xaa; 2];
    net.read_config(10, &mut two);
    assert_eq!(two, config.mtu.to_le_bytes());
    for offset in [12, 4096, u64::MAX] {
        net.read_config(offset, &mut two);
        assert_eq!(two, [0; 2]);
    }
}

/// Goal: two devices in turn serve one guest, and nothing is lost or comes twice. Method: what the first
/// one returns when it pauses goes through `virtio_queue::Queue` to the second.
#[test]
fn a_guest_goes_on_with_the_queue_states() {
    let (mut a, mut from, _, _) = start("goes on");
    let (mut b, mut to, memory, interrupts) = start("goes on");
    to.fill(2048, 16);
    poll(&mut b);
    let station = mac(&b);
    for number in 0..5 {
        assert!(from.send(&frame(mac(&a), station, 100, number)));
    }
    poll_both(&mut a, &mut b);
    assert_eq!(to.received().len(), 5);
    assert_eq!(interrupts.of(0), 1, "one for the burst");
    // It has sent one packet, and made another available that the device has not seen.
    assert!(to.send(&frame(station, mac(&a), 100, 0)));
    poll(&mut b);
    let states = ready(b.pause());
    assert!(to.send(&frame(station, mac(&a), 100, 1)));
    let snapshot = b.snapshot();
    assert_eq!(states.len(), 2);
    for (index, state) in &states {
        // All but the indices is what the transport had; virtio-queue accepts it.
        let event_idx = Features::from_bits(b.features()).has(Features::EVENT_IDX);
        let done = if *index == 0 { 5 } else { 1 };
        let expected = virtio_queue::QueueState {
            next_avail: done,
            next_used: done,
            event_idx_enabled: event_idx,
            ..queue(*index).state()
        };
        assert_eq!(*state, expected);
    }
    drop(b);
    let restored: Vec<_> = states
        .into_iter()
        .map(|(index, state)| ActiveQueue::new(index, Queue::try_from(state).unwrap().state()))
        .collect();
    let mut b = VirtioNet::new(interface("goes on"), NetSettings::default()).unwrap();
    b.activate(&memory, interrupts.function(), &snapshot[..], restored).unwrap();
    assert_eq!(mac(&b), station, "the driver's address");
    from.fill(2048, 8);
    poll_both(&mut a, &mut b);
    assert_eq!(to.tx.collect().len(), 2, "both packets were sent, each once");
    let sent: Vec<_> = from.received();
    assert_eq!(sent, [0, 1].map(|number| frame(station, mac(&a), 100, number)));
    // The guest's packet has shown the network where it is now. Eleven buffers are still posted.
    for number in 5..16 {
        assert!(from.send(&frame(mac(&a), station, 100, number)));
    }
    poll_both(&mut a, &mut b);
    let expected: Vec<_> = (5..16).map(|number| frame(mac(&a), station, 100, number)).collect();
    assert_eq!(to.received(), expected);
}

/// Goal: what a snapshot says of a queue holds, too.
#[test]
fn a_disabled_queue_stays_disabled() {
    let (mut a, mut from, _, _) = start("disabled");
    let (mut b, mut to, memory, interrupts) = start("disabled");
    to.fill(2048, 4);
    poll(&mut b);
    b.device_mut().enable_queue(0, false);
    let states = ready(b.pause());
    let (snapshot, station) = (b.snapshot(), mac(&b));
    drop(b);
    let mut b = VirtioNet::new(interface("disabled"), NetSettings::default()).unwrap();
    let queues = states.into_iter().map(|(index, state)| ActiveQueue::new(index, state));
    b.activate(&memory, interrupts.function(), &snapshot[..], queues).unwrap();
    poll(&mut b);
    let packet = frame(mac(&a), station, 100, 1);
    assert!(from.send(&packet));
    poll_both(&mut a, &mut b);
    assert_eq!(to.rx.used_index(), 0);
    b.device_mut().enable_queue(0, true);
    poll_both(&mut a, &mut b);
    assert_eq!(to.received(), [packet]);
}

#[test]
fn the_guest_is_told_of_its_link() {
    let (mut net, _guest, _memory, interrupts) = start("link");
    net.device_mut().set_link(false);
    assert_eq!((interrupts.of(CONFIG), interrupts.of(0)), (1, 0));
    let mut status = [0xff; 2];
    net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
}

/// Goal: a thread pauses with the same states, nothing moves while it does, and it goes on.
#[test]
fn a_thread_pauses_and_goes_on() {
    let (mut a, mut from, _, _) = start("thread");
    let (b, mut to, _, interrupts) = start("thread");
    to.fill(2048, 8);
    let station = mac(&b);
    let b = b.spawn("paused").unwrap();
    let states = b.pause(STEP).expect("it pauses");
    assert_eq!(states.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1]);
    assert!(states.iter().all(|(_, state)| (state.next_avail, state.next_used) == (0, 0)));
    let packet = frame(mac(&a), station, 100, 1);
    assert!(from.send(&packet));
    poll(&mut a);
    b.thread().call(|device| assert!(!device.poll().moved));
    assert_eq!(to.rx.used_index(), 0);
    b.resume();
    crate::support::eventually("the packet arrives", || to.rx.used_index() == 1);
    assert_eq!(to.received(), [packet]);
    let mut mac = [0; 6];
    b.read_config(0, &mut mac);
    assert_eq!(mac, station);
    // The device comes back, still active.
    let mut b = b.stop();
    assert!(interrupts.of(0) > 0);
    assert_eq!(ready(b.pause())[0].1.next_used, 1);
    b.resume();
    // A thread resets it, too: the next driver can come.
    let mut b = b.spawn("reset").unwrap().reset(STEP);
    assert_eq!(Arc::strong_count(&interrupts), 1, "the interrupt was given up");
    assert!(b.device().memory().regions().is_empty());
    let features = b.features();
    b.activate(&memory(), interrupts.function(), features, queues()).unwrap();
}

/// Goal: after a reset another driver negotiates again, and the old memory and interrupt are given up.
#[test]
fn a_device_is_reset_and_activated_again() {
    let (mut a, mut from, _, _) = start("again");
    let (mut b, mut to, first, interrupts) = start("again");
    let function = interrupts.function();
    assert!(matches!(b.activate(&first, function.clone(), 0, queues()), Err(Error::Active)));
    to.fill(2048, 8);
    poll(&mut b);
    let mapping = {
        use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
        use vmring_rust_vmm::vm_memory;
        Arc::downgrade(&first.memory().iter().next().unwrap().get_mmap())
    };
    ready(b.reset());
    drop((to, first));
    assert!(mapping.upgrade().is_none(), "the device has given the memory up");
    assert_eq!(Arc::strong_count(&interrupts), 2, "and the interrupt: only `function` has it");
    // Firmware accepts less than a system does.
    let memory = memory();
    let accepted = Features::VERSION_1.bits();
    let mut to = Guest::new(&memory, accepted);
    b.activate(&memory, function, accepted, queues()).unwrap();
    to.fill(2048, 8);
    let packet = frame(mac(&a), mac(&b), 90, 7);
    poll(&mut b);
    assert!(from.send(&packet));
    poll_both(&mut a, &mut b);
    assert_eq!(to.received(), [packet]);
    assert!(!ready(b.pause())[0].1.event_idx_enabled, "the features say so");
}

/// Goal: an activation that fails leaves a device that can be activated.
#[test]
fn a_failed_activation_leaves_nothing() {
    let mut net = VirtioNet::new(interface("failing"), NetSettings::default()).unwrap();
    let (memory, interrupts) = (memory(), Arc::new(Interrupts::default()));
    let features = net.features();
    let attempt = |net: &mut VirtioNet,
                   negotiated: Negotiated<'_>,
                   change: &dyn Fn(&mut virtio_queue::QueueState)| {
        let [mut rx, tx] = [0, 1].map(|index| queue(index).state());
        change(&mut rx);
        // The transmit queue starts first, and is stopped again.
        let queues = [(1, tx), (0, rx)].map(|(index, state)| ActiveQueue::new(index, state));
        net.activate(&memory, interrupts.function(), negotiated, queues)
    };
    let good = Negotiated::Features(features);
    let error = attempt(&mut net, Negotiated::Features(features | 1 << 63), &|_| {}).unwrap_err();
    assert!(
        matches!(error, Error::Net(NetError::NotOffered { bits: 0x8000_0000_0000_0000 })),
        "{error:?}"
    );
    let error = attempt(&mut net, Negotiated::Snapshot(b"nothing"), &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Net(NetError::Snapshot(_))), "{error:?}");
    let error = attempt(&mut net, Negotiated::Features(0), &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Net(NetError::Legacy)), "{error:?}");
    let error = attempt(&mut net, good, &|rx| rx.size = 3).unwrap_err();
    let size = QueueConversionError::Size { size: 3, max_size: 256 };
    assert!(matches!(error, Error::Queue { index: 0, source } if source == size), "{error:?}");
    let error = attempt(&mut net, good, &|rx| rx.used_ring = 0).unwrap_err();
    assert!(matches!(error, Error::Net(NetError::Queue { index: 0, .. })), "{error:?}");
    assert!(!net.device().is_running(1));
    assert_eq!(Arc::strong_count(&interrupts), 1);
    // A queue that the driver does not use is left out.
    attempt(&mut net, good, &|rx| rx.ready = false).unwrap();
    assert!(!net.device().is_running(0) && net.device().is_running(1));
    let memory = memory.snapshot().unwrap();
    assert_eq!(net.device().memory().regions().len(), memory.regions().len());
}

/// Goal: one queue is reset, and set up elsewhere, while the other goes on.
#[test]
fn one_queue_is_reset() {
    let mut settings = NetSettings::default();
    settings.ring_reset = true;
    let mut net = VirtioNet::new(interface("one queue"), settings).unwrap();
    let (memory, interrupts) = (memory(), Arc::new(Interrupts::default()));
    let features = net.features();
    let mut guest = Guest::new(&memory, features);
    net.activate(&memory, interrupts.function(), features, queues()).unwrap();
    guest.fill(2048, 4);
    poll(&mut net);
    assert!(guest.send(&frame(mac(&net), [0xff; 6], 60, 1)));
    poll(&mut net);
    let state = ready(net.stop_queue(1)).expect("it ran");
    assert_eq!((state.next_avail, state.next_used, state.size), (1, 1, queue(1).size()));
    assert_eq!(ready(net.stop_queue(1)), None);
    assert_eq!(ready(net.pause()).len(), 1);
    net.resume();
    let mut smaller = queue(1);
    smaller.set_size(16);
    let mut state = smaller.state();
    (state.next_avail, state.next_used) = (1, 1);
    net.start_queue(ActiveQueue::new(1, state)).unwrap();
    assert!(matches!(
        net.start_queue(ActiveQueue::new(1, state)),
        Err(Error::Net(NetError::Running { index: 1 }))
    ));
    let states = ready(net.pause());
    assert_eq!((states.len(), states[1].1.size), (2, 16));
}

#[cfg(target_os = "linux")]
mod eventfds {
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
    use vmring_rust_vmm::{call_event, event_interrupt, kick_event, vmm_sys_util};

    use super::*;
    use crate::support::{eventually, guarded};

    /// Goal: kicks and calls are eventfds of the VMM, as its transport hands them over.
    #[test]
    fn kicks_and_calls_are_eventfds() {
        guarded("eventfds", || {
            let event = || EventFd::new(EFD_NONBLOCK).unwrap();
            let mut ends = [0, 1].map(|number| {
                let net = VirtioNet::new(interface("eventfds"), NetSettings::default()).unwrap();
                let (memory, station, features) = (memory(), mac(&net), net.features());
                let guest = Guest::new(&memory, features);
                let (kicks, calls) = ([event(), event()], [event(), event()]);
                let queues = [0, 1].map(|index: u16| {
                    let kick = kicks[usize::from(index)].try_clone().unwrap();
                    ActiveQueue::try_from((index, queue(index), kick)).unwrap()
                });
                let interrupt = event_interrupt([(0, &calls[0]), (1, &calls[1])], None).unwrap();
                let mut net = net;
                net.activate(&memory, interrupt, features, queues).unwrap();
                (net.spawn(&format!("eventfds {number}")).unwrap(), guest, station, kicks, calls)
            });
            let [from, to] = &mut ends;
            to.1.fill(2048, 32);
            to.1.rx.set_used_event(0);
            to.3[0].write(1).unwrap();
            for number in 0..20 {
                to.1.rx.set_used_event(to.1.rx.used_index());
                let packet = frame(from.2, to.2, 100, number);
                assert!(from.1.send(&packet));
                // A sleeping device wakes by the kick alone.
                from.3[1].write(1).unwrap();
                eventually("the guest is interrupted", || to.4[0].read().is_ok());
                assert_eq!(to.1.received(), [packet]);
                from.1.tx.collect();
            }
            assert!(from.0.thread().stats_handle().stats().kicks > 0);
        });
    }

    #[test]
    fn the_configuration_space_has_an_eventfd() {
        let mut net = VirtioNet::new(interface("config event"), NetSettings::default()).unwrap();
        let [queue, config] = [0, 1].map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        let interrupt = event_interrupt([(0, &queue), (1, &queue)], Some(&config)).unwrap();
        let features = net.features();
        net.activate(&memory(), interrupt, features, queues()).unwrap();
        net.device_mut().set_link(false);
        assert_eq!(config.read().unwrap(), 1);
        assert!(queue.read().is_err());
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        use std::os::fd::{FromRawFd, IntoRawFd};
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        // SAFETY: the file gives its descriptor up.
        let file = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
        for error in [kick_event(&file).unwrap_err(), call_event(&file).unwrap_err()] {
            assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
        }
    }
}
