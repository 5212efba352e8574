//! The order in which packets and entries complete.

use std::sync::{Arc, Mutex};

use vmring::device::Progress;
use vmring::{Direction, EntryError, Ring, RingOp, Status};

use super::{PATIENT, credits};
use crate::support::{
    Dice, LONG, Script, ScriptQueue, drive_to_rest, every_way, guarded, inline, loopback,
    number_of, post, reap, reap_n, scaled, send, stage,
};

/// Goal: packets fill the posted slots in the order of their arrival, the slot posted first comes
/// first, and it makes no difference whether a packet came before or after the slot was posted.
#[test]
fn packets_complete_in_arrival_order_filling_the_longest_posted_first() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let build = |direction| {
                interface.ring(direction).drive(way.drive(poller)).retry(PATIENT).build().unwrap()
            };
            let (mut reader, mut writer) = (build(Direction::Read), build(Direction::Write));
            let (mut posted, mut arrived, mut seen) = (0, 0, 0);
            let mut dice = Dice::new(3);
            while seen < scaled(2000) {
                for _ in 0..dice.below(20).min(256 - (posted - seen)) {
                    post(&mut reader, posted);
                    posted += 1;
                }
                // Send no more than the loopback holds, so that no write has to wait.
                for _ in 0..dice.below(20).min(200_u64.saturating_sub(arrived - seen)) {
                    send(&mut writer, arrived);
                    arrived += 1;
                }
                // An inline writer sends when it is driven.
                writer.wait(0, None);
                let some = dice.below(2) as usize * writer.in_flight();
                for done in reap_n(&mut writer, some) {
                    assert!(done.result.is_ok());
                }
                if writer.in_flight() > 200 {
                    let n = writer.in_flight();
                    reap_n(&mut writer, n);
                }
                drive_to_rest(&mut writer);
                reader.wait(usize::from(posted > seen && arrived > seen), Some(LONG));
                for done in reap(&mut reader) {
                    let frame = done.frame.unwrap();
                    assert_eq!((done.user_data, number_of(&frame)), (seen, seen));
                    seen += 1;
                }
            }
        });
    });
}

/// Goal: on a loopback, packets keep their order and fill the longest posted read first. This holds
/// on each path: directly from writes to reads, through reads that were lent, and through the
/// device's own queue. Method: one ring, with a second ring beside it for a while.
#[test]
fn a_loopback_keeps_the_order_on_every_way_through_it() {
    guarded(|| {
        let interface = loopback();
        let mut ring = inline(&interface, Direction::Both).depth(64).build().unwrap();
        let (mut sent, mut posted) = (0, 0);
        let mut came = 0;
        let mut round = |ring: &mut Ring, writes: u64, reads: u64| {
            (sent..sent + writes).for_each(|number| send(ring, number));
            (posted..posted + reads).for_each(|number| post(ring, number));
            (sent, posted) = (sent + writes, posted + reads);
            drive_to_rest(ring);
            for done in reap(ring) {
                assert!(done.result.is_ok(), "{done:?}");
                if done.op == RingOp::Read {
                    let number = done.frame.as_deref().map(number_of);
                    assert_eq!((done.user_data, number), (came, Some(came)), "order");
                    came += 1;
                }
            }
            assert_eq!(came, sent.min(posted), "so many have both a write and a read");
        };
        stage("directly, and the rest waits");
        round(&mut ring, 3, 1);
        round(&mut ring, 2, 1);
        round(&mut ring, 0, 2);
        stage("what waited is gone, reads are left over");
        round(&mut ring, 1, 7);
        round(&mut ring, 1, 1);
        stage("another ring writes: reads are lent");
        let mut beside = inline(&interface, Direction::Write).depth(8).build().unwrap();
        round(&mut ring, 2, 9);
        beside.close().unwrap();
        stage("alone again, with lent reads and fresh ones");
        round(&mut ring, 1, 4);
        round(&mut ring, 16, 2);
        round(&mut ring, 5, 9);
        round(&mut ring, 4, 4);
    });
}

/// Goal: packets from other rings can fill all reads of a ring, and not only as many as the device
/// queues (256). Method: a reader that also writes, first alone, then with another writer beside
/// it.
#[test]
fn reads_on_a_loopback_are_there_for_every_writing_ring() {
    const COUNT: u64 = 512;
    guarded(|| {
        let interface = loopback();
        let depth = |direction| inline(&interface, direction).depth(COUNT as u32);
        let mut reader = depth(Direction::Both).build().unwrap();
        (0..COUNT).for_each(|number| post(&mut reader, number));
        drive_to_rest(&mut reader);
        let mut writer = depth(Direction::Write).build().unwrap();
        drive_to_rest(&mut reader);
        (0..COUNT).for_each(|number| send(&mut writer, number));
        for done in reap_n(&mut writer, COUNT as usize) {
            assert!(done.result.is_ok(), "{done:?}");
        }
        let came = reap_n(&mut reader, COUNT as usize);
        let numbers = came.iter().map(|done| done.frame.as_deref().map_or(u64::MAX, number_of));
        assert!(numbers.eq(0..COUNT), "{came:?}");
    });
}

/// Goal: the device gets writes in submission order, even if it takes them in irregular pieces.
#[test]
fn writes_reach_the_device_in_submission_order() {
    guarded(|| {
        every_way(|way, poller| {
            let count = scaled(2000);
            let order: Arc<Mutex<Vec<u64>>> = Arc::default();
            let seen = order.clone();
            let interface = Script::new(move |_, _| {
                let (seen, mut dice) = (seen.clone(), Dice::new(5));
                ScriptQueue::new(move |io| {
                    // Take some, put some of those back, and leave the rest.
                    let mut taken = Vec::new();
                    for _ in 0..dice.below(8) {
                        taken.extend(io.take_write());
                    }
                    let keep = dice.below(taken.len() as u64 + 1) as usize;
                    for slot in taken.drain(keep..).rev() {
                        io.put_back(slot);
                    }
                    for slot in taken {
                        seen.lock().unwrap().push(number_of(slot.packet().unwrap()));
                        io.complete_write(slot);
                    }
                    Ok(Progress::Idle)
                })
            })
            .limits(|caps| caps.max_write_batch = 5)
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .write_depth(64)
                .retry(PATIENT)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let (mut sent, mut completed) = (0, 0);
            while completed < count {
                while sent < count && credits(&mut ring).1 > 0 {
                    send(&mut ring, sent);
                    sent += 1;
                }
                for done in reap_n(&mut ring, 1) {
                    assert_eq!(done.brief(), (RingOp::Write, completed, Ok(60)));
                    completed += 1;
                }
            }
            assert!(order.lock().unwrap().iter().copied().eq(0..count));
        });
    });
}

/// Goal: an entry that is cancelled or refused does not wait for the entries before it.
#[test]
fn cancelled_and_failed_entries_complete_at_once() {
    guarded(|| {
        every_way(|way, poller| {
            // The device refuses number 3 and keeps all other writes.
            let interface = Script::new(|_, _| {
                let mut kept = Vec::new();
                let keeping = Arc::new(Mutex::new(Vec::new()));
                let closing = keeping.clone();
                ScriptQueue::new(move |io| {
                    while let Some(slot) = io.take_write() {
                        if slot.user_data() == 3 {
                            io.fail(slot, Status::InvalidArgument);
                        } else {
                            kept.push(slot);
                        }
                    }
                    keeping.lock().unwrap().append(&mut kept);
                    Ok(Progress::Idle)
                })
                .on_close(move |io| {
                    closing.lock().unwrap().drain(..).for_each(|slot| io.cancel(slot));
                    true
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Both)
                .drive(way.drive(poller))
                .retry(PATIENT)
                .build()
                .unwrap();
            (1..=3).for_each(|number| send(&mut ring, number));
            let done = reap_n(&mut ring, 1).remove(0);
            assert_eq!(done.brief(), (RingOp::Write, 3, Err(Status::InvalidArgument.into())));
            // This device never takes reads.
            (10..20).for_each(|number| post(&mut ring, number));
            ring.cancel(15, 100).unwrap();
            let done: Vec<_> = reap_n(&mut ring, 2).iter().map(|done| done.brief()).collect();
            assert!(done.contains(&(RingOp::Read, 15, Err(EntryError::Cancelled))), "{done:?}");
            assert!(done.contains(&(RingOp::Cancel, 100, Ok(1))), "{done:?}");
            assert_eq!(ring.in_flight(), 11);
        });
    });
}
