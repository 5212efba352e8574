//! A device over an interface that keeps packets: what waits for them, and what does not.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};
use vmring_rust_vmm::{Error, vm_memory};

use crate::guest::{STEP, frame, mac, memory, poll, queues, start_over};
use crate::support::{eventually, guarded};
use crate::wire::wire;

const SHORT: Duration = Duration::from_millis(20);

/// Goal: memory that a packet is sent from stays mapped until the packet is sent.
#[test]
fn an_update_waits_for_packets_that_are_being_sent() {
    let ([a, _b], control) = wire(|_| {});
    let (mut net, mut guest, memory, _) = start_over(a);
    let mapping = Arc::downgrade(&memory.memory().iter().nth(1).unwrap().get_mmap());
    control.hold(true);
    assert!(guest.send(&frame(mac(&net), [0xff; 6], 100, 1)));
    poll(&mut net);
    // The VMM replaces the memory of the buffers, at the same addresses.
    let regions = memory.memory();
    let old = regions.iter().nth(1).unwrap();
    let (start, len) = (old.start_addr().0, old.size());
    let new = GuestRegionMmap::from_range(GuestAddress(start), len, None).unwrap();
    let (less, old) = regions.remove_region(GuestAddress(start), len as u64).unwrap();
    let more = less.insert_region(Arc::new(new)).unwrap();
    drop((regions, old, less));
    memory.lock().unwrap().replace(more);
    drop(guest);
    for _ in 0..3 {
        assert!(net.update_memory(&memory).is_pending());
        poll(&mut net);
        assert!(mapping.upgrade().is_some());
    }
    control.hold(false);
    poll(&mut net);
    assert!(matches!(net.update_memory(&memory), Poll::Ready(Ok(()))));
    assert!(mapping.upgrade().is_none());
    match net.pause() {
        Poll::Ready(states) => assert_eq!((states[1].1.next_avail, states[1].1.next_used), (1, 1)),
        Poll::Pending => panic!("it was sent"),
    }
}

/// Goal: a thread says when it has waited long enough, and what it was asked for comes later.
#[test]
fn a_thread_does_not_wait_for_ever() {
    guarded("a thread with a packet on its way", || {
        let ([a, _b], control) = wire(|_| {});
        let (net, mut guest, memory, _) = start_over(a);
        let station = mac(&net);
        control.hold(true);
        assert!(guest.send(&frame(station, [0xff; 6], 100, 1)));
        let net = net.spawn("late").unwrap();
        eventually("the packet is taken", || control.taken() == 1);
        assert!(matches!(net.update_memory(&memory, SHORT), Err(Error::Busy)));
        assert_eq!(net.pause(SHORT), None);
        control.hold(false);
        let states = net.pause(STEP).expect("the packet is sent");
        assert_eq!((states[1].1.next_avail, states[1].1.next_used), (1, 1));
        net.update_memory(&memory, STEP).unwrap();
        net.resume();
        assert_eq!(guest.tx.collect().len(), 1);
    });
}

/// Goal: a reset ends, whatever the interface keeps, and the next driver can come.
#[test]
fn a_reset_gives_up_what_does_not_end() {
    guarded("a reset with a packet on its way", || {
        let ([a, _b], control) = wire(|_| {});
        let (net, mut guest, _memory, interrupts) = start_over(a);
        control.hold(true);
        assert!(guest.send(&frame(mac(&net), [0xff; 6], 100, 1)));
        let net = net.spawn("given up").unwrap();
        eventually("the packet is taken", || control.taken() == 1);
        let mut net = net.reset(SHORT);
        assert!(!net.device().is_running(0) && !net.device().is_running(1));
        let features = net.features();
        net.activate(&memory(), interrupts.function(), features, queues()).unwrap();
    });
}
