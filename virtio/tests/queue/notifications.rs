//! Kicks and interrupts: as many as are wanted, and none is lost.

use vmring_virtio::queue::{Queue, QueueFeatures};

use crate::driver::{Driver, Setup};
use crate::queue::{pop_whole, post_room};

fn guest(event_idx: bool, base: u16) -> (Driver, Queue) {
    let features = QueueFeatures { event_idx, ..QueueFeatures::default() };
    let driver = Driver::new(&Setup { features, base, ..Setup::of(8) });
    let queue = driver.device();
    (driver, queue)
}

/// Serves everything that is available, in one burst. Whether the driver wants an interrupt.
fn burst(driver: &mut Driver, queue: &mut Queue) -> bool {
    let count = queue.fetch(8).expect("the index is possible");
    pop_whole(queue, count);
    (0..count).for_each(|_| queue.push(0));
    queue.flush();
    let wanted = queue.needs_interrupt();
    assert!(!queue.needs_interrupt(), "there is at most one for a burst");
    assert_eq!(driver.collect().len(), usize::from(count));
    wanted
}

#[test]
fn an_interrupt_is_wanted_when_the_used_index_passes_the_event() {
    let (mut driver, mut queue) = guest(true, 65530);
    assert!(!burst(&mut driver, &mut queue), "nothing was used");
    // What a queue before has signalled is not known.
    driver.set_used_event(9999);
    post_room(&mut driver, [4; 1]);
    assert!(burst(&mut driver, &mut queue));
    // The index is 65531 now.
    for (event, count, wanted) in [
        (65531, 1, true),  // 65532: the first is wanted
        (65531, 1, false), // 65533: passed before
        (65535, 2, false), // 65535: the next is the one
        (65535, 1, true),  // 0
        (2, 3, true),      // 3: the last of a burst
        (2, 8, false),     // 11: passed before
        (18, 8, true),     // 19
        (19, 8, true),     // 27: the first of a burst
        (40, 8, false),    // 35
    ] {
        driver.set_used_event(event);
        post_room(&mut driver, vec![4; count]);
        assert_eq!(burst(&mut driver, &mut queue), wanted, "{event} {count}");
    }
    // The flag says nothing here.
    driver.set_no_interrupt(true);
    driver.set_used_event(35);
    post_room(&mut driver, [4; 1]);
    assert!(burst(&mut driver, &mut queue));
}

#[test]
fn an_interrupt_is_wanted_unless_the_flag_is_set() {
    let (mut driver, mut queue) = guest(false, 65535);
    for (no_interrupt, count, wanted) in
        [(true, 1, false), (false, 2, true), (false, 0, false), (true, 3, false), (false, 1, true)]
    {
        driver.set_no_interrupt(no_interrupt);
        post_room(&mut driver, vec![4; count]);
        assert_eq!(burst(&mut driver, &mut queue), wanted);
    }
    // The event says nothing here.
    driver.set_used_event(9999);
    post_room(&mut driver, [4; 1]);
    assert!(burst(&mut driver, &mut queue));
}

#[test]
fn several_flushes_before_a_look_want_what_one_would() {
    let (mut driver, mut queue) = guest(true, 0);
    post_room(&mut driver, [4; 1]);
    burst(&mut driver, &mut queue);
    driver.set_used_event(2);
    for _ in 0..4 {
        post_room(&mut driver, [4; 1]);
        assert_eq!(queue.fetch(8), Ok(1));
        queue.pop().expect("it is there").expect("it is whole");
        queue.push(0);
        queue.flush();
    }
    assert!(queue.needs_interrupt());
    assert!(!queue.needs_interrupt());
}

#[test]
fn a_whole_round_without_a_look_wants_an_interrupt() {
    let (mut driver, mut queue) = guest(true, 0);
    post_room(&mut driver, [4; 1]);
    assert!(burst(&mut driver, &mut queue));
    // Index 1. The event was passed 65,536 elements ago, at the first of them.
    driver.set_used_event(1);
    for i in 0..65536 / 8 {
        post_room(&mut driver, [4; 8]);
        assert_eq!(queue.fetch(8), Ok(8), "{i}");
        pop_whole(&mut queue, 8);
        (0..8).for_each(|_| queue.push(0));
        queue.flush();
        assert_eq!(driver.collect().len(), 8);
    }
    assert!(queue.needs_interrupt());
}

#[test]
fn kicks_are_wanted_when_the_device_says_so_with_an_event() {
    let (mut driver, mut queue) = guest(true, 65534);
    // A new queue wants them.
    post_room(&mut driver, [4; 1]);
    assert!(driver.needs_kick());
    burst(&mut driver, &mut queue);
    // It has not said that it wants more.
    post_room(&mut driver, [4; 2]);
    assert!(!driver.needs_kick());
    assert!(queue.enable_notifications(), "these are to be looked at");
    post_room(&mut driver, [4; 1]);
    assert!(!driver.needs_kick(), "the device knows that it has to look");
    burst(&mut driver, &mut queue);
    queue.disable_notifications();
    assert!(!queue.enable_notifications());
    assert_eq!(queue.state().next_available, 2);
    post_room(&mut driver, [4; 3]);
    assert!(driver.needs_kick());
    post_room(&mut driver, [4; 1]);
    assert!(!driver.needs_kick(), "it was kicked");
    burst(&mut driver, &mut queue);
}

#[test]
fn kicks_are_wanted_when_the_device_says_so_with_the_flag() {
    let (mut driver, mut queue) = guest(false, 65535);
    for _ in 0..2 {
        post_room(&mut driver, [4; 1]);
        assert!(driver.needs_kick());
        burst(&mut driver, &mut queue);
    }
    for _ in 0..2 {
        queue.disable_notifications();
        post_room(&mut driver, [4; 1]);
        assert!(!driver.needs_kick());
    }
    for _ in 0..2 {
        assert!(queue.enable_notifications());
    }
    burst(&mut driver, &mut queue);
    assert!(!queue.enable_notifications());
    post_room(&mut driver, [4; 1]);
    assert!(driver.needs_kick());
}

#[test]
fn what_was_given_up_is_to_be_looked_at() {
    for event_idx in [false, true] {
        let (mut driver, mut queue) = guest(event_idx, 0);
        post_room(&mut driver, [4; 2]);
        assert_eq!(queue.fetch(8), Ok(2));
        pop_whole(&mut queue, 2);
        assert!(!queue.enable_notifications());
        queue.unpop(1);
        assert!(queue.enable_notifications());
    }
}

#[test]
fn a_queue_that_died_silent_leaves_no_silence() {
    // One that did not want kicks, as its last word.
    let (mut driver, mut queue) = guest(false, 0);
    queue.disable_notifications();
    let state = queue.state();
    drop(queue);
    let mut queue = driver.device_at(state).expect("it is the driver's");
    post_room(&mut driver, [4; 1]);
    assert!(driver.needs_kick());
    burst(&mut driver, &mut queue);
    // One whose last event was passed.
    let (mut driver, mut queue) = guest(true, 0);
    post_room(&mut driver, [4; 3]);
    assert!(driver.needs_kick());
    burst(&mut driver, &mut queue);
    let state = queue.state();
    drop(queue);
    let mut queue = driver.device_at(state).expect("it is the driver's");
    driver.set_used_event(9999);
    post_room(&mut driver, [4; 1]);
    assert!(driver.needs_kick());
    assert!(burst(&mut driver, &mut queue));
}
