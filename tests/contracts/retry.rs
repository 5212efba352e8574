//! Partial batches: retries of what a device does not take, their budget, and deadlines.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmring::device::Progress;
use vmring::{Direction, RetryPolicy, Ring, RingOp, Status};

use super::{Gate, full};
use crate::support::{
    Script, ScriptQueue, Way, every_way, filled, guarded, inline, loopback, number_of, post, reap,
    reap_n, scaled, send,
};

/// Goal: writes that the device does not take are retried, and the budget belongs to the stall. If
/// the device makes progress, however slowly, no write is exhausted.
#[test]
fn a_partial_batch_is_retried_within_the_budget_of_the_stall() {
    guarded(|| {
        every_way(|way, poller| {
            // Take one write in every third call that offers writes.
            let offers = Arc::new(AtomicU64::new(0));
            let count = offers.clone();
            let interface = Script::new(move |_, _| {
                let count = count.clone();
                ScriptQueue::new(move |io| {
                    if full(io) > 0
                        && count.fetch_add(1, Ordering::SeqCst) % 3 == 2
                        && let Some(slot) = io.take_write()
                    {
                        io.complete_write(slot);
                    }
                    Ok(Progress::Idle)
                })
            })
            .start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 5, delay: Duration::from_micros(10) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..50).map(|number| (filled(&ring, number), number)).collect();
            assert_eq!(ring.submit_writes(frames).unwrap(), 50);
            for (number, done) in reap_n(&mut ring, 50).iter().enumerate() {
                assert_eq!(done.brief(), (RingOp::Write, number as u64, Ok(60)));
            }
            let stats = ring.stats();
            assert_eq!((stats.tx_packets, stats.exhausted), (50, 0));
            assert!(stats.retries >= 100, "{stats:?}");
            assert!(offers.load(Ordering::SeqCst) >= 150);
        });
    });
}

/// Goal: a loopback without a reader holds 256 packets and then stalls. Past the budget, the posted
/// writes complete with `BufferExhausted` and their frames, and are counted.
#[test]
fn past_the_budget_writes_complete_with_buffer_exhausted() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring = interface
                .ring(Direction::Both)
                .depth(512)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let frames: Vec<_> = (0..300).map(|number| (filled(&ring, number), number)).collect();
            assert_eq!(ring.submit_writes(frames).unwrap(), 300);
            let mut done = reap_n(&mut ring, 300);
            for (number, done) in done.iter().enumerate() {
                let expected =
                    if number < 256 { Ok(60) } else { Err(Status::BufferExhausted.into()) };
                assert_eq!(done.brief(), (RingOp::Write, number as u64, expected));
                assert_eq!(number_of(done.frame.as_ref().unwrap()), number as u64);
            }
            let stats = ring.stats();
            assert_eq!((stats.tx_packets, stats.exhausted, stats.errors), (256, 44, 0));
            // The packets that were taken are not lost, and the ring still works.
            done.clear();
            (0..256).for_each(|number| post(&mut ring, number));
            for (number, done) in reap_n(&mut ring, 256).iter().enumerate() {
                assert_eq!(number_of(done.frame.as_ref().unwrap()), number as u64);
            }
            send(&mut ring, 1000);
            assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, 1000, Ok(60)));
        });
    });
}

/// Goal: there is one budget for the whole stall. Method: count the calls of a device that takes
/// nothing. A hundred entries cause no more calls than one. Later writes get one attempt each,
/// until the device takes something.
#[test]
fn the_retry_budget_belongs_to_the_stall_and_not_to_each_entry() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start();
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 7, delay: Duration::from_micros(50) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            let exhausted = Err(Status::BufferExhausted.into());
            let burst = |ring: &mut Ring, writes: u64| {
                let frames: Vec<_> = (0..writes).map(|n| (filled(ring, n), n)).collect();
                assert_eq!(ring.submit_writes(frames).unwrap() as u64, writes);
                let done = reap_n(ring, writes as usize);
                (done.iter().filter(|done| done.result == exhausted).count(), gate.offers())
            };
            // A batch is published in pieces of at least 4 entries. A poller on another processor may
            // see them one by one, and each piece that comes past the budget gets an attempt.
            let pieces = |writes: u64| if way == Way::Inline { 1 } else { writes.div_ceil(4) };
            let (failed, offers) = burst(&mut ring, 100);
            assert_eq!(failed, 100);
            assert!((7..7 + pieces(100)).contains(&offers), "{way:?}: {offers} offers");
            assert_eq!(burst(&mut ring, 1), (1, 1), "still the same stall");
            let (failed, offers) = burst(&mut ring, 50);
            assert_eq!(failed, 50);
            assert!((1..=pieces(50)).contains(&offers), "{way:?}: {offers} offers");
            gate.take(1);
            assert_eq!(burst(&mut ring, 1), (0, 1), "it takes one: the stall is over");
            gate.take(0);
            assert_eq!(burst(&mut ring, 3), (3, 7), "a new stall, a new budget");
            assert_eq!(ring.stats().exhausted, 154);
        });
    });
}

#[test]
fn reads_never_wait_behind_stuck_writes() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            gate.reads.store(usize::MAX, Ordering::SeqCst);
            let interface = gate.start();
            let mut ring = interface
                .ring(Direction::Both)
                .retry(RetryPolicy { attempts: u32::MAX, delay: Duration::from_secs(3600) })
                .drive(way.drive(poller))
                .build()
                .unwrap();
            (0..10).for_each(|number| send(&mut ring, number));
            for number in 100..scaled(200) + 100 {
                post(&mut ring, number);
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Read, number, Ok(60)));
            }
            assert_eq!(ring.in_flight(), 10);
        });
    });
}

#[test]
fn writes_never_wait_behind_reads() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            gate.take(usize::MAX);
            let interface = gate.start();
            let mut ring =
                interface.ring(Direction::Both).drive(way.drive(poller)).build().unwrap();
            (0..100).for_each(|number| post(&mut ring, number));
            for number in 1000..scaled(200) + 1000 {
                send(&mut ring, number);
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, number, Ok(60)));
            }
            assert_eq!(ring.in_flight(), 100);
        });
    });
}

/// Goal: on an inline ring, a stall does not make the caller sleep. Method: a retry delay of an
/// hour. `reap` returns at once (else the watchdog ends the test) and asks the device once, and
/// `next_deadline` says when to retry.
#[test]
fn inline_reap_never_sleeps_and_next_deadline_tells_when_to_come_back() {
    guarded(|| {
        let gate = Gate::default();
        let interface = gate.start();
        let hour = Duration::from_secs(3600);
        let mut ring = inline(&interface, Direction::Write)
            .retry(RetryPolicy { attempts: 100, delay: hour })
            .build()
            .unwrap();
        assert_eq!(ring.next_deadline(), None);
        let before = Instant::now();
        send(&mut ring, 1);
        for _ in 0..1000 {
            assert_eq!(ring.reap().len(), 0);
        }
        assert_eq!(gate.offers(), 1);
        let deadline = ring.next_deadline().expect("the write is to be tried again");
        assert!(deadline >= before + hour);
        // More writes do not bring the retry forward.
        send(&mut ring, 2);
        gate.take(usize::MAX);
        assert_eq!((ring.reap().len(), gate.offers()), (0, 0));
        ring.cancel_all(3).unwrap();
        assert_eq!(reap_n(&mut ring, 3).len(), 3);
        assert_eq!(ring.next_deadline(), None, "nothing is stuck any more");

        // With a short delay, `wait` returns by itself at that time.
        drop(ring);
        gate.take(0);
        let mut ring = inline(&interface, Direction::Write)
            .retry(RetryPolicy { attempts: 4, delay: Duration::from_millis(1) })
            .build()
            .unwrap();
        send(&mut ring, 1);
        assert_eq!(ring.wait(1, None), 1);
        assert_eq!(gate.offers(), 4);
        assert_eq!(reap(&mut ring)[0].result, Err(Status::BufferExhausted.into()));
    });
}

#[test]
fn times_too_long_for_the_clock_are_for_ever() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start_with(|caps| caps.safety_poll = Some(Duration::MAX));
            let mut ring = interface
                .ring(Direction::Write)
                .retry(RetryPolicy { attempts: 9, delay: Duration::MAX })
                .close_timeout(Duration::MAX)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            send(&mut ring, 1);
            assert_eq!(ring.wait(1, Some(Duration::from_millis(20))), 0, "it is not tried again");
            assert_eq!(ring.cancel_and_wait(Duration::MAX).unwrap(), 1);
            reap_n(&mut ring, 1);
            if way != Way::Inline {
                // The restart ends the stall.
                interface.restart(Duration::MAX).unwrap();
                gate.take(1);
                send(&mut ring, 2);
                assert_eq!(reap_n(&mut ring, 1)[0].result, Ok(60));
            }
            ring.close().unwrap();
            interface.stop(Duration::MAX).unwrap();
        });
    });
}
