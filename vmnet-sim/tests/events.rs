//! "Packets are available": when the event comes, how often, and with which estimate.

use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use block2::RcBlock;
use vmnet_sim::{Events, Rules, Script, World};

use crate::abi::Pointer;
use crate::support::*;

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

    fn feed(&self, n: u64) {
        for i in 0..n {
            self.b.send(&frame(self.a.mac(), self.b.mac(), i, 60));
        }
    }

    fn estimates(&self) -> Vec<u64> {
        drain(&self.a.queue);
        self.a.events.lock().expect("no panic").clone()
    }
}

/// Each arrival fires an event, whether packets are unread or not. An event that is already on the
/// queue stands for all.
#[test]
fn events_come_with_arrivals() {
    guarded(|| {
        let pair = Pair::new(|script| script.events = Events::Arrival);
        pair.a.listen();
        for n in 1..=3 {
            pair.feed(1);
            assert_eq!(pair.a.event_count(), n);
        }
        thread::sleep(SOON);
        assert_eq!(pair.a.event_count(), 3);
        assert_eq!(pair.world.counts(pair.id).events, 3);

        let (go, gate) = channel::<()>();
        pair.a.queue.exec_async(move || {
            let _ = gate.recv();
        });
        pair.feed(5);
        drop(go);
        assert_eq!(pair.estimates()[3..], [8]);
    });
}

#[test]
fn edge_events_come_only_when_nothing_waited() {
    guarded(|| {
        let pair = Pair::new(|script| script.events = Events::Edge);
        pair.a.listen();
        pair.feed(1);
        assert_eq!(pair.a.event_count(), 1);
        pair.feed(2);
        thread::sleep(SOON);
        assert_eq!(pair.a.event_count(), 1);
        assert_eq!(pair.a.receive().len(), 3);
        pair.feed(1);
        assert_eq!(pair.a.event_count(), 2);
    });
}

#[test]
fn level_events_come_as_long_as_packets_wait() {
    guarded(|| {
        let pair = Pair::new(|script| script.events = Events::Level);
        pair.a.listen();
        pair.feed(2);
        pair.a.event_after(5);
        assert_eq!(pair.a.receive().len(), 2);
        // One may have been on its way, however long that takes.
        let start = Instant::now();
        loop {
            let n = pair.a.event_count();
            thread::sleep(SOON);
            if pair.a.event_count() == n {
                break;
            }
            assert!(start.elapsed() < LONG, "events go on although nothing waits");
        }
        pair.a.quiet();
    });
}

#[test]
fn events_can_be_lost() {
    guarded(|| {
        let pair = Pair::new(|script| script.events = Events::Lost);
        pair.a.listen();
        pair.feed(3);
        thread::sleep(SOON);
        assert_eq!(pair.a.event_count(), 0);
        assert_eq!(pair.a.receive().len(), 3);
    });
}

#[test]
fn the_estimate_is_true_or_wrong_or_not_there() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        pair.a.listen();
        pair.feed(2);
        assert_eq!(pair.estimates().last(), Some(&2));
        pair.world.script(pair.id, |script| script.estimate = Some(Some(99)));
        pair.feed(1);
        assert_eq!(pair.estimates().last(), Some(&99));
        pair.world.script(pair.id, |script| script.estimate = None);
        pair.feed(1);
        assert_eq!(pair.estimates().last(), Some(&0));
    });
}

/// As measured: a callback that is set while a packet is unread is called for that packet.
#[test]
fn a_callback_that_is_set_is_called_for_what_waits() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        pair.feed(1);
        pair.a.listen();
        assert_eq!(pair.a.event_count(), 1);
    });
}

#[test]
fn a_read_that_takes_less_than_it_could_is_followed_by_an_event() {
    guarded(|| {
        let pair = Pair::new(|script| script.reads.push_back(vmnet_sim::CallPlan::Takes(1)));
        pair.a.listen();
        pair.feed(2);
        let n = pair.a.event_count();
        assert_eq!(pair.a.read(4).1.len(), 1);
        assert_eq!(pair.a.event_count(), n + 1);
    });
}

#[test]
fn setting_a_callback_replaces_it_and_null_takes_it_off() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        pair.a.listen();
        pair.feed(1);
        assert_eq!(pair.a.event_count(), 1);
        let (fired, events) = channel();
        let other = RcBlock::new(move |_: u32, _: Pointer| {
            let _ = fired.send(());
        });
        assert_eq!(pair.a.set_callback(1, queue(&pair.a.queue), block(&other)), SUCCESS);
        events.recv_timeout(LONG).expect("an event for what waits");
        pair.feed(1);
        events.recv_timeout(LONG).expect("an event for what came");
        assert_eq!(pair.a.event_count(), 1);
        pair.a.quiet();
        pair.feed(1);
        assert!(events.recv_timeout(SOON).is_err());
        assert_eq!(pair.a.stop(), SUCCESS);
    });
}

/// Unsetting a callback does not wait for one that runs. A job that is put on the queue afterwards
/// does.
#[test]
fn an_event_that_runs_goes_on_when_the_callback_is_taken_off() {
    guarded(|| {
        let pair = Pair::new(|_| ());
        let (go, gate) = channel::<()>();
        let (inside, began) = channel();
        let (ended, end) = channel();
        let gate = std::sync::Mutex::new(gate);
        let slow = RcBlock::new(move |_: u32, _: Pointer| {
            let _ = inside.send(());
            let _ = gate.lock().expect("no panic").recv();
            let _ = ended.send(());
        });
        assert_eq!(pair.a.set_callback(1, queue(&pair.a.queue), block(&slow)), SUCCESS);
        pair.feed(1);
        began.recv_timeout(LONG).expect("an event");
        assert_eq!(pair.a.set_callback(1, std::ptr::null(), std::ptr::null()), SUCCESS);
        assert!(end.recv_timeout(SOON).is_err());
        drop(go);
        drain(&pair.a.queue);
        end.try_recv().expect("the barrier waited for it");
        drop(slow);
        assert_eq!(pair.a.stop(), SUCCESS);
    });
}

/// As in a world where vmnet takes references: a caller that releases early is lucky.
#[test]
fn a_world_that_retains_keeps_blocks_and_queues_itself() {
    guarded(|| {
        let world = World::with(Rules::Strict, true);
        let id = world.interface_id();
        let a = Start::of(&Description::shared(id)).interface();
        let (_, b) = another(&world);
        let (fired, events) = channel();
        {
            let (to, callback) = (
                new_queue(),
                RcBlock::new(move |_: u32, _: Pointer| {
                    let _ = fired.send(());
                }),
            );
            assert_eq!(a.set_callback(1, queue(&to), block(&callback)), SUCCESS);
        }
        b.send(&frame(a.mac(), b.mac(), 1, 60));
        events.recv_timeout(LONG).expect("an event");
        assert!(!world.unreleased(SOON).is_empty());
        a.quiet();
        assert_eq!((a.stop(), b.stop()), (SUCCESS, SUCCESS));
        drop((a, b));
        assert!(world.unreleased(LONG).is_empty(), "{:?}", world.unreleased(SOON));
    });
}
