//! Stops as scripts plan them, and what is left after one.

use std::time::{Duration, Instant};

use vmnet_sim::{Rules, World};

use crate::support::*;

#[test]
fn a_stop_can_be_refused_and_the_interface_goes_on() {
    guarded(|| {
        let (world, id, interface) = one(|script| script.stop.refused = Some(FAILURE));
        let (handler, answers) = status_block();
        assert_eq!(interface.stop_with(queue(&interface.queue), block(&handler)), FAILURE);
        assert!(answers.recv_timeout(SOON).is_err());
        interface.send(&frame(BROADCAST, interface.mac(), 1, 60));
        assert_eq!(world.counts(id).stops, 0);
        world.script(id, |script| script.stop.refused = None);
        assert_eq!(interface.stop(), SUCCESS);
        assert_eq!(world.counts(id).stops, 1);
    });
}

#[test]
fn a_stop_can_be_slow_or_fail() {
    guarded(|| {
        let slow = Duration::from_millis(100);
        let (_world, _, interface) = one(|script| {
            script.stop.handler = Some(slow);
            script.stop.status = FAILURE;
        });
        let start = Instant::now();
        assert_eq!(interface.stop(), FAILURE);
        assert!(start.elapsed() >= slow);
    });
}

#[test]
fn a_stop_can_go_unanswered_and_keeps_what_it_has() {
    guarded(|| {
        let (world, _, interface) = one(|script| script.stop.handler = None);
        let to = new_queue();
        let (handler, answers) = status_block();
        assert_eq!(interface.stop_with(queue(&to), block(&handler)), SUCCESS);
        assert!(answers.recv_timeout(SOON).is_err());
        drop((handler, to));
        let left = world.unreleased(SOON);
        assert!(left.contains(&"the stop's handler"), "{left:?}");
        assert!(left.contains(&"the stop's queue"), "{left:?}");
    });
}

#[test]
fn after_a_clean_stop_nothing_is_left_whether_vmnet_retains_or_not() {
    guarded(|| {
        for retains in [true, false] {
            let world = World::with(Rules::Strict, retains);
            let a = Start::of(&Description::shared(world.interface_id())).interface();
            let b = Start::of(&Description::shared(world.interface_id())).interface();
            a.listen();
            b.send(&frame(a.mac(), b.mac(), 1, 60));
            a.event_after(0);
            assert_eq!(a.receive().len(), 1);
            assert_eq!((a.stop(), b.stop()), (SUCCESS, SUCCESS));
            drop((a, b));
            let left = world.unreleased(LONG);
            assert!(left.is_empty(), "{left:?}");
        }
    });
}

#[test]
fn what_somebody_keeps_is_told() {
    guarded(|| {
        let world = World::new();
        let description = Description::shared(world.interface_id());
        let interface = Start::of(&description).interface();
        assert_eq!(interface.stop(), SUCCESS);
        let mut left = world.unreleased(SOON);
        left.sort_unstable();
        assert_eq!(left, ["the description", "the start's queue"]);
        drop((description, interface));
        assert!(world.unreleased(LONG).is_empty());
    });
}

#[test]
fn a_stopped_interface_has_left_its_network() {
    guarded(|| {
        let (world, _, a) = one(|_| ());
        let (_, b) = another(&world);
        b.send(&frame(a.mac(), b.mac(), 1, 60));
        assert_eq!(a.stop(), SUCCESS);
        b.send(&frame(a.mac(), b.mac(), 2, 60));
        assert_eq!(b.receive(), Vec::<Vec<u8>>::new());
        assert_eq!(b.stop(), SUCCESS);
    });
}
