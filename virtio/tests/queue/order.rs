//! Chains come back once each, in order, with their lengths.

use vmring_virtio::queue::{AddressSpace, BrokenQueue, Queue, QueueFeatures, QueueState};

use crate::driver::shapes;
use crate::driver::{ARENA, Descriptor, Driver, NEXT, Setup};
use crate::queue::{bytes_of, cut, fill, pop_whole, post_room, segments};
use crate::support::{self, Dice, scaled};

/// Posts one chain of `shape`, serves it and collects it.
fn round(driver: &mut Driver, queue: &mut Queue, shape: &shapes::Shape, n: u8) {
    let name = shape.name;
    let head = driver.post(&shape.buffers, shape.indirect).expect(name);
    let buffers = driver.buffers(head).to_vec();
    for buffer in buffers.iter().filter(|buffer| !buffer.writable) {
        driver.write(buffer.address, &vec![n; buffer.len as usize]);
    }
    driver.expose();
    assert_eq!(queue.fetch(8), Ok(1), "{name}");
    let chain = queue.pop().expect(name).expect(name);
    assert_eq!(segments(&chain), cut(driver, &buffers), "{name}");
    let sent = bytes_of(&chain);
    assert!(sent.iter().all(|byte| *byte == n), "{name}");
    assert_eq!(sent.len() as u64, chain.readable_len());
    let len = chain.writable_len() - chain.writable_len() / 3;
    fill(&chain, n, len);
    queue.push(len as u32);
    queue.flush();
    let returned = driver.collect();
    assert_eq!(returned.len(), 1, "{name}");
    assert_eq!((returned[0].head, u64::from(returned[0].len)), (head, len), "{name}");
    let writable = buffers.iter().filter(|buffer| buffer.writable);
    let got: Vec<u8> = writable.flat_map(|b| driver.read(b.address, b.len)).collect();
    assert!(got[..len as usize].iter().all(|byte| *byte == n), "{name}");
}

#[test]
fn the_buffers_of_real_drivers_are_served() {
    for addresses in [AddressSpace::Guest, AddressSpace::FrontEnd] {
        for in_order in [false, true] {
            // Most buffers cross regions in the second memory.
            for arena in [vec![0x10_0000], vec![5003; 60]] {
                let features = QueueFeatures { in_order, indirect: true, event_idx: false };
                let setup = Setup { features, addresses, arena, base: 65530, ..Setup::of(32) };
                let mut driver = Driver::new(&setup);
                let mut queue = driver.device();
                for n in 1..=3 {
                    for shape in shapes::all() {
                        round(&mut driver, &mut queue, &shape, n);
                    }
                }
            }
        }
    }
}

#[test]
fn every_size_works_over_the_end_of_its_indices() {
    for shift in 0..=15 {
        let size = 1 << shift;
        let mut driver = Driver::new(&Setup { base: 65535 - size / 2, ..Setup::of(size) });
        let mut queue = driver.device();
        let mut returned = 0;
        // Twice the whole ring, full.
        for _ in 0..2 {
            while driver.post(&[(4, true)], None).is_some() {}
            driver.expose();
            while queue.fetch(1000).expect("the index is possible") > 0 {
                while let Some(chain) = queue.pop() {
                    assert_eq!(chain.expect("it is whole").writable_len(), 4);
                }
            }
            assert_eq!(queue.outstanding(), size);
            (0..size).for_each(|i| queue.push(u32::from(i % 5)));
            queue.flush();
            let lens: Vec<_> = driver.collect().iter().map(|chain| chain.len).collect();
            returned += lens.len();
            assert!(lens.iter().enumerate().all(|(i, len)| *len == i as u32 % 5));
        }
        assert_eq!(returned, usize::from(size) * 2);
        let next = (65535 - size / 2).wrapping_add(size.wrapping_mul(2));
        assert_eq!(queue.state(), QueueState { next_available: next, next_used: next });
    }
}

#[test]
fn an_impossible_available_index_breaks_the_queue_and_not_the_process() {
    // Entries taken before, in flight, and the distance of the index from what was taken.
    for (taken, pushed, ahead) in [
        (0, 0, 9),
        (0, 0, 0xffff),
        (8, 0, 1),
        (8, 3, 4),
        (8, 8, 9),
        (3, 0, 0xffff),
        (3, 0, 0xfffd),
        (3, 2, 8),
    ] {
        let mut driver = Driver::new(&Setup { base: 65534, ..Setup::of(8) });
        let mut queue = driver.device();
        post_room(&mut driver, vec![4; taken.into()]);
        assert_eq!(queue.fetch(8), Ok(taken));
        pop_whole(&mut queue, taken);
        (0..pushed).for_each(|_| queue.push(0));
        queue.flush();
        let fetched = 65534_u16.wrapping_add(taken);
        let index = fetched.wrapping_add(ahead);
        driver.set_available_index(index);
        let broken = Err(BrokenQueue { index, fetched });
        assert_eq!(queue.fetch(8), broken, "{taken} {pushed} {ahead}");
        // It stays so, whatever the driver does.
        driver.set_available_index(fetched);
        assert_eq!(queue.fetch(8), broken);
        assert!(queue.pop().is_none());
        // What was taken before can be given back, for what it is worth.
        (pushed..taken).for_each(|_| queue.push(0));
        queue.flush();
        assert_eq!(driver.collect().len(), usize::from(taken));
    }
}

#[test]
fn what_was_pushed_and_not_shown_is_no_room_for_the_driver() {
    let mut driver = Driver::new(&Setup::of(4));
    let mut queue = driver.device();
    post_room(&mut driver, [4; 4]);
    assert_eq!(queue.fetch(4), Ok(4));
    pop_whole(&mut queue, 4);
    (0..4).for_each(|_| queue.push(0));
    driver.set_available_index(5);
    assert_eq!(queue.fetch(4), Err(BrokenQueue { index: 5, fetched: 4 }));
}

#[test]
fn a_burst_is_as_long_as_it_was_asked_for() {
    let mut driver = Driver::new(&Setup::of(8));
    let mut queue = driver.device();
    post_room(&mut driver, [4; 5]);
    assert_eq!(queue.fetch(0), Ok(0));
    assert!(queue.pop().is_none());
    assert_eq!(queue.fetch(3), Ok(3));
    post_room(&mut driver, [4]);
    // What is left of a burst comes first.
    queue.pop().expect("it is there").expect("it is whole");
    assert_eq!(queue.fetch(8), Ok(2));
    assert_eq!(queue.fetch(1), Ok(1));
    pop_whole(&mut queue, 2);
    assert!(queue.pop().is_none());
    assert_eq!(queue.fetch(8), Ok(3));
}

#[test]
fn entries_are_copied_once() {
    let mut driver = Driver::new(&Setup::of(8));
    let mut queue = driver.device();
    let first = driver.post(&[(4, true)], None).expect("there is room");
    let second = driver.post(&[(5, true)], None).expect("there is room");
    driver.expose();
    assert_eq!(queue.fetch(8), Ok(2));
    // The driver changes its entries after they were fetched.
    (0..8).for_each(|_| driver.make_available(0));
    for (head, len) in [(first, 4), (second, 5)] {
        let chain = queue.pop().expect("it is there").expect("it is whole");
        assert_eq!(segments(&chain), cut(&driver, driver.buffers(head)));
        queue.push(len);
    }
    queue.flush();
    assert_eq!(driver.collect().len(), 2);
}

#[test]
fn what_was_popped_can_be_given_up() {
    let mut driver = Driver::new(&Setup { base: 65535, ..Setup::of(8) });
    let mut queue = driver.device();
    let heads = post_room(&mut driver, 1..=4);
    let pop =
        |queue: &mut Queue| queue.pop().expect("it is there").expect("it is whole").writable_len();
    assert_eq!(queue.fetch(8), Ok(4));
    (1..=3).for_each(|len| assert_eq!(pop(&mut queue), len));
    queue.push(1);
    queue.unpop(1);
    assert_eq!((pop(&mut queue), queue.outstanding()), (3, 2));
    queue.unpop(2);
    assert_eq!(queue.outstanding(), 0);
    let state = queue.state();
    assert_eq!(state, QueueState { next_available: 0, next_used: 65535 });
    queue.flush();
    assert_eq!(queue.state(), QueueState { next_available: 0, next_used: 0 });
    // The driver notices nothing, and another queue goes on.
    assert_eq!(driver.collect().iter().map(|chain| chain.head).collect::<Vec<_>>(), heads[..1]);
    let mut queue = driver.device_at(queue.state()).expect("it is the driver's");
    assert_eq!(queue.fetch(8), Ok(3));
    (2..=4).for_each(|len| assert_eq!(pop(&mut queue), len));
    (0..3).for_each(|_| queue.push(0));
    queue.flush();
    assert_eq!(driver.collect().iter().map(|chain| chain.head).collect::<Vec<_>>(), heads[1..]);
}

#[test]
fn broken_chains_are_given_up_with_those_before_them() {
    let mut driver = Driver::new(&Setup::of(8));
    let mut queue = driver.device();
    driver.post(&[(1, true)], None).expect("there is room");
    driver.make_available(77);
    driver.post(&[(2, true)], None).expect("there is room");
    driver.make_available(78);
    driver.expose();
    let burst = |queue: &mut Queue| {
        assert_eq!(queue.fetch(8), Ok(4));
        (0..4).map(|_| queue.pop().expect("it is there").is_ok()).collect::<Vec<_>>()
    };
    assert_eq!(burst(&mut queue), [true, false, true, false]);
    queue.unpop(1);
    assert_eq!(queue.state().next_available, 2);
    queue.unpop(1);
    assert_eq!(queue.state().next_available, 0);
    assert_eq!(burst(&mut queue), [true, false, true, false]);
    queue.push(0);
    queue.push(0);
    queue.flush();
    assert_eq!(queue.state(), QueueState { next_available: 4, next_used: 4 });
}

#[test]
fn chains_that_another_queue_popped_are_popped_again() {
    let mut driver = Driver::new(&Setup::of(8));
    let mut queue = driver.device();
    post_room(&mut driver, 1..=3);
    assert_eq!(queue.fetch(8), Ok(3));
    pop_whole(&mut queue, 3);
    queue.push(0);
    queue.flush();
    queue.push(0);
    // The second is not shown. The queue ends here.
    let state = queue.state();
    assert_eq!(state, QueueState { next_available: 3, next_used: 1 });
    let mut queue = driver.device_at(state).expect("it is the driver's");
    assert_eq!(queue.fetch(8), Ok(2));
    for len in [2, 3] {
        assert_eq!(queue.pop().expect("it is there").expect("it is whole").writable_len(), len);
        queue.push(0);
    }
    queue.flush();
    assert_eq!(driver.collect().len(), 3);
}

#[test]
fn one_element_stands_for_a_batch_that_was_only_read() {
    let features = QueueFeatures { in_order: true, ..QueueFeatures::default() };
    let mut driver = Driver::new(&Setup { features, base: 65534, ..Setup::of(8) });
    let mut queue = driver.device();
    let unwritten = (0xffff_ffff, 0xffff_ffff);
    let used = driver.layout().used;
    driver.write(used + 4, &[0xff; 64]);
    let mut heads = Vec::new();
    // Sent, sent, received, received, sent, broken, sent, sent.
    for writable in [false, false, true, true, false] {
        heads.push(driver.post(&[(4, writable)], None).expect("there is room"));
    }
    driver.expose();
    assert_eq!(queue.fetch(8), Ok(5));
    pop_whole(&mut queue, 5);
    for written in [0, 0, 3, 4, 0] {
        queue.push(written);
    }
    queue.flush();
    let elements: Vec<_> = (0..8).map(|i| driver.element(65534_u16.wrapping_add(i))).collect();
    let element = |head: usize, len| (u32::from(heads[head]), len);
    // A batch ends with a chain that was written to, because its length counts.
    let first_batch = [element(2, 3), unwritten, unwritten];
    let rest = [element(3, 4), element(4, 0), unwritten, unwritten, unwritten];
    assert_eq!(elements, [first_batch.as_slice(), &rest].concat());
    assert_eq!(driver.collect().len(), 5);
    // A flush ends a batch too.
    for head in [5, 6] {
        assert_eq!(driver.post(&[(4, false)], None), Some(head));
        driver.expose();
        assert_eq!(queue.fetch(8), Ok(1));
        queue.pop().expect("it is there").expect("it is whole");
        queue.push(0);
        queue.flush();
    }
    assert_eq!((driver.element(3), driver.element(4)), ((5, 0), (6, 0)));
    assert_eq!(driver.collect().len(), 2);
}

/// Receives of a driver that reads each element, as DPDK's does in its in-order mode.
#[test]
fn a_chain_that_was_written_to_has_an_element_of_its_own() {
    let features = QueueFeatures { in_order: true, ..QueueFeatures::default() };
    let mut driver = Driver::new(&Setup { features, ..Setup::of(8) });
    let mut queue = driver.device();
    let heads = post_room(&mut driver, [64; 4]);
    assert_eq!(queue.fetch(8), Ok(4));
    pop_whole(&mut queue, 4);
    let lens = [64, 64, 0, 10];
    lens.iter().for_each(|len| queue.push(*len));
    queue.flush();
    for (i, (head, len)) in heads.into_iter().zip(lens).enumerate() {
        assert_eq!(driver.element(i as u16), (head.into(), len));
    }
    assert_eq!(driver.collect().len(), 4);
}

#[test]
fn a_used_length_is_at_most_the_room() {
    let mut driver = Driver::new(&Setup::of(8));
    let mut queue = driver.device();
    driver.post(&[(10, false), (6, true)], None).expect("there is room");
    driver.expose();
    assert_eq!(queue.fetch(8), Ok(1));
    assert!(queue.pop().is_some_and(|chain| chain.is_ok()));
    queue.push(7);
    queue.flush();
    assert_eq!(driver.collect()[0].len, 6);
}

#[test]
fn a_device_that_gives_back_what_it_has_not_got_is_told_so() {
    let driver = Driver::new(&Setup::of(8));
    for misuse in [|queue: &mut Queue| queue.push(0), |queue: &mut Queue| queue.unpop(1)] {
        let mut queue = driver.device();
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| misuse(&mut queue)));
        assert!(told.is_err());
    }
}

#[test]
fn a_burst_allocates_nothing() {
    for in_order in [false, true] {
        let features = QueueFeatures { event_idx: in_order, indirect: true, in_order };
        let setup = Setup { features, arena: vec![5003; 60], ..Setup::of(32) };
        let mut driver = Driver::new(&setup);
        let mut queue = driver.device();
        let mut chains = 0;
        for shape in shapes::all().into_iter().cycle().take(100) {
            while driver.post(&shape.buffers, shape.indirect).is_some() {}
            driver.expose();
            let count = support::allocations(|| {
                for _ in 0..queue.fetch(32).expect("the index is possible") {
                    let chain = queue.pop().expect("it is there").expect("it is whole");
                    chains += chain.readable().chain(chain.writable()).count().min(1);
                }
                queue.unpop(queue.outstanding() / 2);
                while queue.pop().is_some() {}
                (0..queue.outstanding()).for_each(|_| queue.push(0));
                queue.flush();
                let _ = queue.needs_interrupt();
                queue.disable_notifications();
                let _ = queue.enable_notifications();
            });
            assert_eq!(count, 0, "{}", shape.name);
            driver.collect();
            // A broken chain costs no allocation either. It is the driver's next one.
            let head = driver.post(&[(1, false)], None).expect("there is room");
            let cycle = Descriptor { address: ARENA, len: 1, flags: NEXT, next: head };
            driver.set_descriptor(head, cycle);
            driver.expose();
            let count = support::allocations(|| {
                assert_eq!(queue.fetch(32), Ok(1));
                assert!(queue.pop().is_some_and(|chain| chain.is_err()));
                queue.flush();
            });
            assert_eq!(count, 0, "{}", shape.name);
            driver.collect();
        }
        assert!(chains > 100);
    }
}

/// Two threads, as a guest's processor and the device's are. Everything arrives, once and in order.
#[test]
fn a_driver_and_a_device_run_at_once() {
    const SIZE: u16 = 16;
    let total = scaled(20_000) as u32;
    for features in [
        QueueFeatures { event_idx: true, indirect: true, in_order: true },
        QueueFeatures::default(),
    ] {
        crate::support::guarded("the two threads", move || {
            let mut driver = Driver::new(&Setup { features, base: 65000, ..Setup::of(SIZE) });
            let mut queue = driver.device();
            let (kick, kicked) = std::sync::mpsc::channel::<()>();
            let (interrupt, interrupted) = std::sync::mpsc::channel::<()>();
            let device = std::thread::spawn(move || {
                let mut next = 0_u32;
                while next < total {
                    queue.disable_notifications();
                    loop {
                        let count = queue.fetch(8).expect("the index is possible");
                        for _ in 0..count {
                            let chain = queue.pop().expect("it is there").expect("it is whole");
                            assert_eq!(bytes_of(&chain), next.to_le_bytes());
                            queue.push(0);
                            next += 1;
                        }
                        queue.flush();
                        if queue.needs_interrupt() {
                            interrupt.send(()).expect("the driver is there");
                        }
                        if count == 0 && !queue.enable_notifications() {
                            break;
                        }
                    }
                    if next < total {
                        // A lost kick ends here.
                        kicked.recv_timeout(crate::support::LONG / 2).expect("a kick comes");
                    }
                }
            });
            let mut dice = Dice::new(1);
            let (mut sent, mut back) = (0_u32, 0_u32);
            while back < total {
                for _ in 0..=dice.below(4) {
                    if sent < total
                        && let Some(head) = driver.post(&[(4, false)], None)
                    {
                        driver.write(driver.buffers(head)[0].address, &sent.to_le_bytes());
                        sent += 1;
                    }
                }
                driver.expose();
                if driver.needs_kick() {
                    kick.send(()).expect("the device is there");
                }
                back += driver.collect().len() as u32;
                if sent - back == u32::from(SIZE) || sent == total && back < total {
                    // Nothing to do until the device has done something: sleep, but look again
                    // between the wish and the sleep.
                    driver.set_used_event(65000_u16.wrapping_add(back as u16));
                    let more = driver.collect().len() as u32;
                    back += more;
                    if more == 0 {
                        interrupted
                            .recv_timeout(crate::support::LONG / 2)
                            .expect("an interrupt comes");
                    }
                }
            }
            drop(kick);
            device.join().expect("the device's thread");
        });
    }
}
