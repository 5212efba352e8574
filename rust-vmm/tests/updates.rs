//! A device whose guest's memory changes, or is watched: updates while packets flow, and dirty bitmaps.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::thread;
use std::time::Instant;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};
use vmring_rust_vmm::{Error, vm_memory};
use vmring_virtio::net::NetError;

use crate::guest::{Memory, STEP, frame, mac, poll, poll_both, queue, start};
use crate::support::{LONG, eventually, guarded, scaled};

/// Where a region is added.
const ADDED: u64 = 0x9000_0000;

fn added() -> Arc<GuestRegionMmap<AtomicBitmap>> {
    let region = GuestRegionMmap::from_range(GuestAddress(ADDED), 0x10_0000, None);
    Arc::new(region.expect("a mapping"))
}

/// The pages that are dirty, by the numbers of the guest's addresses. It forgets them.
fn take_dirty(memory: &Memory, page: u64) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    for region in memory.iter() {
        let start = region.start_addr().0;
        let offsets = (0..region.len()).step_by(page as usize);
        let bitmap = region.get_mmap();
        pages.extend(
            offsets
                .filter(|offset| bitmap.bitmap().dirty_at(*offset as usize))
                .map(|offset| (start + offset) / page),
        );
        bitmap.bitmap().reset();
    }
    pages
}

/// Goal: the pages that the device has written are dirty, and no others. Method: what it has written
/// follows from the used lengths, and the used ring has pages of its own.
#[test]
fn exactly_what_was_written_is_dirty() {
    let page = vmring::page_size() as u64;
    let (mut a, mut from, _, _) = start("dirty");
    let (mut b, mut to, memory, _) = start("dirty");
    let memory = memory.memory().into_inner();
    for round in 0..scaled(200) as u32 {
        to.fill(if round % 2 == 0 { 2048 } else { 5000 }, 4);
        poll(&mut b);
        take_dirty(&memory, page);
        let mut expected = BTreeSet::new();
        let used = |index: u16| queue(index).state().used_ring / page;
        for number in 0..round % 3 {
            let packet = frame(mac(&a), mac(&b), 60 + (round as usize * 37) % 1400, number);
            assert!(from.send(&packet));
        }
        poll_both(&mut a, &mut b);
        from.tx.collect();
        for one in to.rx.collect() {
            let first = one.buffers[0].address;
            expected.extend(first / page..=(first + u64::from(one.len) - 1) / page);
            expected.insert(used(0));
            assert!(to.bytes(&one).len() >= 60);
        }
        // The guest sends too: that writes the used ring alone.
        if round % 5 == 0 {
            assert!(to.send(&frame(mac(&b), [0xff; 6], 60, round)));
            poll(&mut b);
            assert_eq!(to.tx.collect().len(), 1);
            expected.insert(used(1));
        }
        let dirty = take_dirty(&memory, page);
        // The device writes its wishes for notifications into the used ring at any time.
        let wishes = [used(0), used(1)];
        let but = |pages: &BTreeSet<u64>| {
            pages.iter().copied().filter(|page| !wishes.contains(page)).collect::<Vec<_>>()
        };
        assert_eq!(but(&dirty), but(&expected), "round {round}");
        assert!(expected.is_subset(&dirty), "round {round}: {expected:x?} {dirty:x?}");
    }
}

#[test]
fn an_update_replaces_the_memory_whole() {
    let (mut a, mut from, _, _) = start("update");
    let (mut b, mut to, memory, _) = start("update");
    to.fill(2048, 8);
    poll(&mut b);
    // Adding.
    let more = memory.memory().insert_region(added()).unwrap();
    let mapping: Weak<MmapRegion<_>> =
        Arc::downgrade(&more.find_region(GuestAddress(ADDED)).unwrap().get_mmap());
    memory.lock().unwrap().replace(more);
    assert_eq!(b.device().memory().regions().len(), 2, "the device has what it took");
    assert!(matches!(b.update_memory(&memory), Poll::Ready(Ok(()))));
    assert_eq!(b.device().memory().regions().len(), 3);
    let packet = frame(mac(&a), mac(&b), 200, 1);
    assert!(from.send(&packet));
    poll_both(&mut a, &mut b);
    assert_eq!(to.received(), [packet]);
    // Removing.
    let (less, removed) = memory.memory().remove_region(GuestAddress(ADDED), 0x10_0000).unwrap();
    memory.lock().unwrap().replace(less);
    drop(removed);
    assert!(mapping.upgrade().is_some(), "the device has it");
    assert!(matches!(b.update_memory(&memory), Poll::Ready(Ok(()))));
    assert!(mapping.upgrade().is_none(), "nobody has it");
    let packet = frame(mac(&a), mac(&b), 300, 2);
    assert!(from.send(&packet));
    poll_both(&mut a, &mut b);
    assert_eq!(to.received(), [packet]);
}

/// Goal: a queue whose memory goes away is stopped, and nothing else happens.
#[test]
fn a_queue_outside_of_the_new_memory_is_stopped() {
    let (mut net, _guest, _memory, _) = start("outside");
    let other = Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    match net.update_memory(&other) {
        Poll::Ready(Err(Error::Net(NetError::Queue { index: 1, .. }))) => {}
        result => panic!("{result:?}"),
    }
    assert!(!net.device().is_running(0) && !net.device().is_running(1));
    match net.pause() {
        Poll::Ready(states) => assert_eq!(states, []),
        Poll::Pending => panic!("nothing runs"),
    }
}

/// Goal: regions come and go while packets flow; each packet arrives once, whole and in order, and a
/// region that was removed is unmapped when the update returns.
#[test]
fn regions_come_and_go_while_packets_flow() {
    guarded("regions come and go", || {
        let (a, mut from, _, _) = start("flow");
        let (b, mut to, memory, _) = start("flow");
        let (mac_a, mac_b) = (mac(&a), mac(&b));
        let (a, b) = (a.spawn("a").unwrap(), b.spawn("b").unwrap());
        let stop = Arc::new(AtomicBool::new(false));
        let arrived = Arc::new(AtomicU32::new(0));
        let (notify_a, notify_b) = (a.thread().notifier(), b.thread().notifier());
        let flowing = thread::spawn({
            let (stop, arrived) = (stop.clone(), arrived.clone());
            move || {
                let (mut sent, mut received) = (0u32, 0u32);
                let began = Instant::now();
                // The network and the queue keep what is on its way: nothing is dropped.
                while !stop.load(Ordering::SeqCst) || received < sent {
                    assert!(began.elapsed() < LONG, "{received} of {sent} have arrived");
                    if to.fill(2048, 64) > 0 && to.rx.needs_kick() {
                        notify_b.notify(0);
                    }
                    for packet in to.received() {
                        let len = 60 + (received as usize * 31) % 1400;
                        assert_eq!(packet, frame(mac_a, mac_b, len, received));
                        received += 1;
                    }
                    arrived.store(received, Ordering::SeqCst);
                    from.tx.collect();
                    if sent - received < 16 && !stop.load(Ordering::SeqCst) {
                        let len = 60 + (sent as usize * 31) % 1400;
                        assert!(from.send(&frame(mac_a, mac_b, len, sent)));
                        sent += 1;
                        if from.tx.needs_kick() {
                            notify_a.notify(1);
                        }
                    } else {
                        thread::yield_now();
                    }
                }
                received
            }
        });
        for _ in 0..scaled(60) {
            let before = arrived.load(Ordering::SeqCst);
            let more = memory.memory().insert_region(added()).unwrap();
            let mapping =
                Arc::downgrade(&more.find_region(GuestAddress(ADDED)).unwrap().get_mmap());
            memory.lock().unwrap().replace(more);
            b.update_memory(&memory, STEP).unwrap();
            eventually("packets arrive", || arrived.load(Ordering::SeqCst) > before);
            let (less, removed) =
                memory.memory().remove_region(GuestAddress(ADDED), 0x10_0000).unwrap();
            memory.lock().unwrap().replace(less);
            drop(removed);
            b.update_memory(&memory, STEP).unwrap();
            assert!(mapping.upgrade().is_none(), "the mapping is gone");
        }
        stop.store(true, Ordering::SeqCst);
        let received = flowing.join().unwrap();
        assert!(u64::from(received) >= scaled(60));
        assert_eq!(b.thread().stats_handle().stats().rx_packets, u64::from(received));
        drop((a, b));
    });
}
