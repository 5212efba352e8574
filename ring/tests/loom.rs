//! Model checking of the queues, the credits, the doorbell, the free list and the end of a pool.
//! Loom tries every interleaving (within a preemption bound), and every value that the memory model
//! lets a load return.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p vmring-core --test loom`
//!
//! `LOOM_MAX_PREEMPTIONS` sets another bound; `-- --nocapture` shows how much was explored.
//!
//! Loom does not see a slot's bytes, which are raw memory. So each slot has a mark: a cell that
//! loom sees, which is written and read together with the bytes. If nothing orders two accesses,
//! loom reports a causality violation. All indices begin just below their wrap.
//!
//! Models named `without_...` run a copy of a protocol with a part left out, and must fail. They
//! show that the models beside them would find the bug.
#![cfg(loom)]

use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize as Uncounted;
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::{
    Backing, Class, CqConsumer, CqProducer, Depths, Frame, HeapBacking, Layout, Outcome, Pool,
    PushError, Reaped, Regions, SKIP_SUCCESS, SqConsumer, SqProducer, Submission, rings,
};

/// Explores `model` with at most `preemptions` preemptions in one run.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = builder.max_branches.max(10_000);
    let bound = builder.preemption_bound;
    let runs = Arc::new(Uncounted::new(0));
    let counted = runs.clone();
    let start = std::time::Instant::now();
    builder.check(move || {
        // An atomic of std: loom does not see it, so it adds no ordering.
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let (runs, name) = (runs.load(Ordering::Relaxed), std::thread::current());
    println!("{:?}: {runs} runs, bound {bound:?}, {:?}", name.name(), start.elapsed());
    assert!(runs > 1, "nothing was explored");
}

const SLOT_SIZE: u32 = 16;

/// A cell for each slot that represents the slot's bytes.
#[derive(Clone)]
struct Marks(Arc<[UnsafeCell<u64>]>);

// SAFETY: all accesses go through loom's cells, which report accesses that race.
unsafe impl Send for Marks {}
// SAFETY: shared accesses go through loom's cells too, which report accesses that race.
unsafe impl Sync for Marks {}

impl Marks {
    /// Writes a packet: `stamp`, into the frame and into the slot's mark.
    fn write(&self, frame: &mut Frame, stamp: u64) {
        frame.copy_from(&stamp.to_le_bytes()).unwrap();
        self.set(frame.slot(), stamp);
    }

    fn set(&self, slot: u32, stamp: u64) {
        self.0[slot as usize].with_mut(|mark| {
            // SAFETY: loom's `with_mut` has just checked that nobody else has access.
            unsafe { *mark = stamp }
        });
    }

    /// Reads the packet, which must be complete.
    fn read(&self, frame: &Frame) -> u64 {
        let mark = self.0[frame.slot() as usize].with(|mark| {
            // SAFETY: loom's `with` has just checked that nobody writes.
            unsafe { *mark }
        });
        assert_eq!(frame[..], mark.to_le_bytes(), "the bytes are not the ones last written");
        mark
    }
}

/// Memory that counts as written, in every slot, when it is freed.
struct Tracked {
    bytes: HeapBacking,
    marks: Marks,
    freed: Arc<Uncounted>,
}

// SAFETY: the bytes are those of a `HeapBacking`, which keeps the contract and is given to nobody
// else.
unsafe impl Backing for Tracked {
    fn base(&self) -> NonNull<u8> {
        self.bytes.base()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.freed.fetch_add(1, Ordering::Relaxed);
        if !std::thread::panicking() {
            self.marks.0.iter().for_each(|mark| mark.with_mut(|_| ()));
        }
    }
}

fn pool(slots: u32) -> (Pool, Marks, Arc<Uncounted>) {
    let marks = Marks((0..slots).map(|_| UnsafeCell::new(0)).collect());
    let freed = Arc::new(Uncounted::new(0));
    let bytes = HeapBacking::new((slots * SLOT_SIZE) as usize);
    let backing = Tracked { bytes, marks: marks.clone(), freed: freed.clone() };
    let layout = Layout { slots, slot_size: SLOT_SIZE, headroom: 0 };
    (Pool::new(Box::new(backing), layout).unwrap(), marks, freed)
}

fn regions(pool: &Pool) -> Regions {
    Regions::new(vec![pool.clone()]).unwrap()
}

/// How a thread parks in the model: with a token, like `std::thread::park`.
#[derive(Default)]
struct Token {
    state: Mutex<TokenState>,
    wakeup: Condvar,
}

#[derive(Default)]
struct TokenState {
    there: bool,
    unparks: u32,
}

impl Token {
    fn unparks(&self) -> u32 {
        self.state.lock().unwrap().unparks
    }
}

impl Park for Token {
    /// Waits for ever. If the wake-up does not come, this is a deadlock, which loom reports.
    fn park(&self, timeout: Option<Duration>) {
        assert_eq!(timeout, None);
        let mut state = self.state.lock().unwrap();
        while !state.there {
            state = self.wakeup.wait(state).unwrap();
        }
        state.there = false;
    }

    fn unpark(&self) {
        let mut state = self.state.lock().unwrap();
        state.there = true;
        state.unparks += 1;
        self.wakeup.notify_one();
    }
}

fn bell() -> Doorbell<Token> {
    Doorbell::new(Token::default())
}

/// Takes everything from the SQ and completes it.
fn turn(sq_consumer: &mut SqConsumer, cq_producer: &mut CqProducer, outcome: Outcome) {
    if sq_consumer.ready() == 0 {
        return;
    }
    loop {
        while let Some(packet) = sq_consumer.front() {
            let class = packet.class();
            let (frame, user_data) = packet.take();
            cq_producer.push(class, frame, user_data, outcome);
        }
        sq_consumer.retire();
        match sq_consumer.pop() {
            Some(Submission::Cancel { user_data, target }) => {
                cq_producer.push_cancel(target.is_none(), 0, user_data);
            }
            Some(Submission::Packet { .. }) => unreachable!("packets were taken"),
            None => break,
        }
    }
    cq_producer.publish();
}

// ------------------------------------------------------------------------------------------------
// The queues

/// Broken by: a Relaxed store or load of the SQ's tail; publishing before writing.
#[test]
fn submissions_arrive_whole_in_order_with_their_bytes_and_a_batch_at_once() {
    check(3, || {
        let (pool, marks, _) = pool(2);
        let depths = Depths { read: 1, write: 1, cancel: 1, sq: 4 };
        let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) =
            rings(depths, regions(&pool), u32::MAX - 1);
        let frames = [pool.alloc().unwrap(), pool.alloc().unwrap()];
        let sender = thread::spawn({
            let marks = marks.clone();
            move || {
                let [mut first, mut second] = frames;
                marks.write(&mut first, 1);
                sq_producer.push(Class::Write, first, 1).unwrap();
                marks.write(&mut second, 2);
                sq_producer.push(Class::Read, second, 2).unwrap();
                assert!(sq_producer.publish());
                sq_producer.push_cancel(Some(2), 3).unwrap();
                assert!(sq_producer.publish());
                sq_producer
            }
        });
        let mut kept = Vec::new();
        let mut seen = 0;
        while seen < 3 {
            let ready = sq_consumer.ready();
            if ready == 0 {
                thread::yield_now();
            } else if seen == 0 {
                assert!(ready >= 2, "half a batch");
            }
            while let Some(submission) = sq_consumer.pop() {
                seen += 1;
                match submission {
                    Submission::Packet { class: Class::Write, user_data: 1, buffer: frame }
                        if seen == 1 =>
                    {
                        kept.push(frame.into_frame().unwrap())
                    }
                    Submission::Packet { class: Class::Read, user_data: 2, buffer: frame }
                        if seen == 2 =>
                    {
                        kept.push(frame.into_frame().unwrap())
                    }
                    Submission::Cancel { user_data: 3, target: Some(2) } if seen == 3 => continue,
                    other => panic!("{other:?} came as number {seen}"),
                }
                assert_eq!(marks.read(kept.last().unwrap()), seen);
            }
        }
        assert_eq!(cq_consumer.in_flight(), 3);
        drop((sender.join().unwrap(), cq_consumer, sq_consumer, cq_producer));
        drop(kept);
        assert_eq!(pool.slots_out(), 0);
    });
}

/// Broken by: a Relaxed store or load of the SQ's head; retiring an entry before it was copied out.
fn cells_of_the_sq_are_reused(
    take: impl Fn(&mut SqConsumer) -> Vec<(Frame, u64)> + Send + Sync + 'static,
) {
    check(3, move || {
        let (pool, marks, _) = pool(3);
        let depths = Depths { read: 0, write: 3, cancel: 0, sq: 1 };
        let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) =
            rings(depths, regions(&pool), u32::MAX);
        let frames = [0; 3].map(|_| pool.alloc().unwrap());
        let sender = thread::spawn({
            let marks = marks.clone();
            move || {
                for (n, mut frame) in (1..).zip(frames) {
                    marks.write(&mut frame, n);
                    while let Err((refusal, back)) = sq_producer.push(Class::Write, frame, n) {
                        assert_eq!(refusal, PushError::SqFull);
                        // The refused frame is complete.
                        assert_eq!(marks.read(&back), n);
                        frame = back;
                        thread::yield_now();
                    }
                    sq_producer.publish();
                }
                sq_producer
            }
        });
        let mut kept = Vec::new();
        while kept.len() < 3 {
            if sq_consumer.ready() == 0 {
                thread::yield_now();
            }
            for (frame, user_data) in take(&mut sq_consumer) {
                assert_eq!(user_data, kept.len() as u64 + 1);
                assert_eq!(marks.read(&frame), user_data);
                kept.push(frame);
            }
        }
        drop((sender.join().unwrap(), cq_consumer, sq_consumer, cq_producer));
    });
}

#[test]
fn an_sq_cell_is_not_written_before_it_was_copied_out() {
    cells_of_the_sq_are_reused(|sq_consumer| {
        let packets = std::iter::from_fn(|| match sq_consumer.pop()? {
            Submission::Packet { class: Class::Write, user_data, buffer: frame } => {
                Some((frame.into_frame().unwrap(), user_data))
            }
            _ => unreachable!(),
        });
        packets.collect()
    });
}

#[test]
fn an_sq_cell_is_not_written_before_its_entry_was_taken() {
    cells_of_the_sq_are_reused(|sq_consumer| {
        let packets = std::iter::from_fn(|| {
            let (buffer, user_data) = sq_consumer.front()?.take();
            Some((buffer.into_frame().unwrap(), user_data))
        })
        .collect();
        sq_consumer.retire();
        packets
    });
}

/// The reaper counts the entries in flight by the SQ's tail, without the poller in between.
///
/// Broken by: a Relaxed load of the tail in `Published::count`.
#[test]
fn who_sees_a_submission_in_flight_sees_what_its_thread_did_before() {
    check(3, || {
        let (pool, marks, _) = pool(2);
        let (sq_producer, cq_consumer, sq_consumer, cq_producer) =
            rings(Depths::new(1, 0, 0), regions(&pool), u32::MAX);
        let (frame, seen) = (pool.alloc().unwrap(), pool.alloc().unwrap());
        let sender = thread::spawn({
            let (slot, marks) = (seen.slot(), marks.clone());
            move || {
                marks.set(slot, 0);
                sq_producer.push(Class::Read, frame, 1).unwrap();
                sq_producer.publish();
                sq_producer
            }
        });
        if cq_consumer.in_flight() == 1 {
            marks.set(seen.slot(), 1);
        }
        drop((sender.join().unwrap(), seen, cq_consumer, sq_consumer, cq_producer));
    });
}

/// A ring of which `n` reads have been submitted, and taken by the poller.
#[allow(clippy::type_complexity)]
fn posted(
    n: u32,
    pool: &Pool,
    start: u32,
) -> (SqProducer, CqConsumer, SqConsumer, CqProducer, Vec<Frame>) {
    let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) =
        rings(Depths::new(n, 0, 0), regions(pool), start);
    for user_data in 1..=u64::from(n) {
        sq_producer.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
    }
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), n);
    let frames = std::iter::from_fn(|| match sq_consumer.pop()? {
        Submission::Packet { class: Class::Read, buffer, .. } => buffer.into_frame().ok(),
        other => panic!("{other:?}"),
    })
    .collect();
    (sq_producer, cq_consumer, sq_consumer, cq_producer, frames)
}

/// Broken by: a Relaxed store or load of the CQ's tail; publishing before writing.
#[test]
fn completions_arrive_whole_in_order_with_their_bytes_and_a_batch_at_once() {
    check(3, || {
        let (pool, marks, _) = pool(3);
        let (sq_producer, mut cq_consumer, sq_consumer, mut cq_producer, frames) =
            posted(3, &pool, u32::MAX - 1);
        let poller = thread::spawn({
            let marks = marks.clone();
            move || {
                for (n, mut frame) in (1..).zip(frames) {
                    marks.write(&mut frame, n);
                    cq_producer.push(Class::Read, frame, n, Outcome::Refused(n as u32));
                    if n > 1 {
                        assert!(cq_producer.publish());
                    }
                }
                cq_producer
            }
        });
        let mut kept = Vec::new();
        while kept.len() < 3 {
            let ready = cq_consumer.ready();
            if ready == 0 {
                thread::yield_now();
            } else if kept.is_empty() {
                assert!(ready >= 2, "half a batch");
            }
            while let Some(reaped) = cq_consumer.pop() {
                let n = kept.len() as u64 + 1;
                let frame = reaped.frame.unwrap();
                assert_eq!((reaped.user_data, reaped.len), (n, 8));
                assert_eq!(reaped.outcome, Outcome::Refused(n as u32));
                assert_eq!(marks.read(&frame), n);
                kept.push(frame);
                assert_eq!(cq_consumer.in_flight(), 3 - kept.len() as u32);
            }
        }
        drop((poller.join().unwrap(), sq_producer, cq_consumer, sq_consumer));
    });
}

/// Demonstration: what the models above would report if the publish were Relaxed.
#[test]
#[should_panic(expected = "Causality violation")]
fn without_release_a_publish_lets_the_entry_be_read_while_it_is_written() {
    check(3, || {
        let (pool, marks, _) = pool(1);
        let mut frame = pool.alloc().unwrap();
        let tail = Arc::new(AtomicU32::new(u32::MAX));
        let entry = Arc::new(std::sync::Mutex::new(None));
        let sender = thread::spawn({
            let (marks, tail, entry) = (marks.clone(), tail.clone(), entry.clone());
            move || {
                marks.write(&mut frame, 1);
                // Loom does not see std's mutex, which moves the frame. So only `tail` could order
                // us.
                *entry.lock().unwrap() = Some(frame);
                tail.store(0, Ordering::Relaxed);
            }
        });
        if tail.load(Ordering::Acquire) == 0 {
            marks.read(entry.lock().unwrap().as_ref().unwrap());
        }
        sender.join().unwrap();
    });
}

// ------------------------------------------------------------------------------------------------
// Credits

/// The CQ is full of completions. One thread reaps them (`together`, or one by one), one submits as
/// credits come back, and one completes what was submitted, into the cells that the first has just copied
/// out.
fn reap_submit_and_complete_at_once(depth: u32, together: bool) {
    let (pool, marks, _) = pool(2 * depth);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer, frames) =
        posted(depth, &pool, u32::MAX);
    for (n, mut frame) in (1..).zip(frames) {
        marks.write(&mut frame, n);
        cq_producer.push(Class::Read, frame, n, Outcome::Done);
    }
    cq_producer.publish();
    let more: Vec<_> = (0..depth).map(|_| pool.alloc().unwrap()).collect();
    let sender = thread::spawn(move || {
        let mut accepted = 0;
        for (n, frame) in (u64::from(depth) + 1..).zip(more) {
            assert!(sq_producer.available(Class::Read) <= depth);
            match sq_producer.push(Class::Read, frame, n) {
                Ok(()) => accepted += u32::from(sq_producer.publish()),
                Err((refusal, _)) => {
                    assert_eq!(refusal, PushError::NoCredit);
                    break;
                }
            }
        }
        (accepted, sq_producer)
    });
    let complete = |sq_consumer: &mut SqConsumer, cq_producer: &mut CqProducer, marks: &Marks| {
        sq_consumer.ready();
        while let Some(submission) = sq_consumer.pop() {
            let Submission::Packet { class: Class::Read, user_data, buffer: mut frame } =
                submission
            else {
                unreachable!()
            };
            marks.write(frame.frame_mut().unwrap(), user_data);
            // Panics if a credit did not mean a free cell.
            cq_producer.push(Class::Read, frame, user_data, Outcome::Done);
            cq_producer.publish();
        }
    };
    let poller = thread::spawn({
        let marks = marks.clone();
        move || {
            complete(&mut sq_consumer, &mut cq_producer, &marks);
            (sq_consumer, cq_producer)
        }
    });
    let mut kept = Vec::new();
    let mut reap = |cq_consumer: &mut CqConsumer| {
        cq_consumer.ready();
        let mut keep = |reaped: Reaped| {
            let frame = reaped.frame.unwrap();
            assert_eq!(reaped.user_data, kept.len() as u64 + 1);
            assert_eq!(marks.read(&frame), reaped.user_data);
            kept.push(frame);
        };
        if together {
            cq_consumer.pop_all(keep);
        } else {
            while let Some(reaped) = cq_consumer.pop() {
                keep(reaped);
            }
        }
        assert!(cq_consumer.in_flight() <= depth, "in_flight wrapped");
    };
    reap(&mut cq_consumer);
    let (accepted, sq_producer) = sender.join().unwrap();
    let (mut sq_consumer, mut cq_producer) = poller.join().unwrap();
    complete(&mut sq_consumer, &mut cq_producer, &marks);
    reap(&mut cq_consumer);
    assert_eq!(kept.len() as u32, depth + accepted);
    assert_eq!(sq_producer.available(Class::Read), depth);
    drop((sq_producer, sq_consumer, cq_producer, cq_consumer));
}

/// Broken by: returning the credit before the entry was copied out; a Relaxed store or load of the
/// credits; a CQ with fewer cells than credits.
#[test]
fn a_credit_means_space_in_a_cq_of_one_cell() {
    check(3, || reap_submit_and_complete_at_once(1, false));
}

/// Like the model above, but credits come back one at a time.
#[test]
fn a_credit_means_space_in_a_cq_of_two_cells() {
    check(2, || reap_submit_and_complete_at_once(2, false));
}

/// Like the model above, but the credits of all completions come back together.
///
/// Broken by: returning the credits before the entries are retired.
#[test]
fn credits_that_come_back_together_mean_space_in_the_cq() {
    check(2, || reap_submit_and_complete_at_once(2, true));
}

/// Like the models above, over several laps. One thread submits and completes, so that only the
/// credit orders it after the reaper.
///
/// Broken by: the same as above.
#[test]
fn credits_alone_keep_a_cq_from_overflowing_lap_after_lap() {
    check(3, || {
        let (pool, marks, _) = pool(1);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(1, 0, 0), regions(&pool), u32::MAX - 1);
        const LAPS: u64 = 4;
        let both_ends = thread::spawn({
            let (pool, marks) = (pool.clone(), marks.clone());
            move || {
                for n in 1..=LAPS {
                    while sq_producer.available(Class::Read) == 0 {
                        thread::yield_now();
                    }
                    // The reaper drops a frame only after it has returned the credit.
                    let mut frame = loop {
                        match pool.alloc() {
                            Some(frame) => break frame,
                            None => thread::yield_now(),
                        }
                    };
                    marks.write(&mut frame, n);
                    sq_producer.push(Class::Read, frame, n).unwrap();
                    sq_producer.publish();
                    turn(&mut sq_consumer, &mut cq_producer, Outcome::Done);
                }
                (sq_producer, sq_consumer, cq_producer)
            }
        });
        for n in 1..=LAPS {
            while cq_consumer.ready() == 0 {
                thread::yield_now();
            }
            let frame = cq_consumer.pop().unwrap().frame.unwrap();
            assert_eq!(marks.read(&frame), n);
        }
        drop((both_ends.join().unwrap(), cq_consumer));
    });
}

/// What the poller does with writes that skip success: the even ones succeed, the odd ones fail.
fn skip_or_fail(sq_consumer: &mut SqConsumer, cq_producer: &mut CqProducer, marks: &Marks) -> u64 {
    sq_consumer.ready();
    let mut ended = 0;
    while let Some(sqe) = sq_consumer.front() {
        assert_eq!(sqe.flags(), SKIP_SUCCESS);
        let (buffer, user_data) = sqe.take();
        let frame = buffer.into_frame().unwrap();
        assert_eq!(marks.read(&frame), user_data);
        ended += 1;
        if user_data % 2 == 0 {
            cq_producer.skip(frame);
        } else {
            // Panics if a credit did not mean a free cell.
            cq_producer.push(Class::Write, frame, user_data, Outcome::Cancelled);
        }
    }
    sq_consumer.retire();
    cq_producer.publish();
    ended
}

/// Writes that skip success, of which every second one fails and completes. The CQ has one cell, the
/// pool one slot: with the credit of a skipped success the frame has come back too.
///
/// Broken by: a Relaxed store or load of the count of skipped completions; counting before the frame
/// was freed; returning a credit for a failure too.
#[test]
fn a_skipped_success_means_a_credit_and_a_frame() {
    check(3, || {
        let (pool, marks, _) = pool(1);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 1, 0), regions(&pool), u32::MAX - 1);
        const LAPS: u64 = 4;
        let poller = thread::spawn({
            let marks = marks.clone();
            move || {
                let mut ended = 0;
                while ended < LAPS {
                    match skip_or_fail(&mut sq_consumer, &mut cq_producer, &marks) {
                        0 => thread::yield_now(),
                        n => ended += n,
                    }
                }
                (sq_consumer, cq_producer)
            }
        });
        for n in 0..LAPS {
            let mut frame = loop {
                if sq_producer.available(Class::Write) == 1 {
                    break pool.alloc().expect("a frame comes before its credit");
                }
                if cq_consumer.ready() == 0 {
                    thread::yield_now();
                }
                while let Some(done) = cq_consumer.pop() {
                    assert_eq!((done.user_data, done.outcome), (n - 1, Outcome::Cancelled));
                }
            };
            marks.write(&mut frame, n);
            sq_producer.push_skip_success(frame, n).unwrap();
            sq_producer.publish();
        }
        let ends = poller.join().unwrap();
        cq_consumer.ready();
        assert_eq!(cq_consumer.pop().unwrap().user_data, LAPS - 1);
        assert_eq!((cq_consumer.in_flight(), cq_consumer.skipped()), (0, 2));
        drop((ends, sq_producer, cq_consumer));
        assert_eq!(pool.slots_out(), 0);
    });
}

/// A reaper on a third thread counts what is in flight: never less than nothing, and never more than
/// there are credits.
///
/// Broken by: an `in_flight` that loads the SQ's tail before the count of skipped completions; a
/// Relaxed store or load of that count.
#[test]
fn what_is_in_flight_is_never_less_than_nothing() {
    check(3, || {
        let (pool, marks, _) = pool(2);
        let (sq_producer, cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 2, 0), regions(&pool), u32::MAX);
        let submitter = thread::spawn({
            let (pool, marks) = (pool.clone(), marks.clone());
            move || {
                for n in [0, 2] {
                    let mut frame = pool.alloc().unwrap();
                    marks.write(&mut frame, n);
                    sq_producer.push_skip_success(frame, n).unwrap();
                    sq_producer.publish();
                }
                sq_producer
            }
        });
        let poller = thread::spawn(move || {
            skip_or_fail(&mut sq_consumer, &mut cq_producer, &marks);
            skip_or_fail(&mut sq_consumer, &mut cq_producer, &marks);
            (sq_consumer, cq_producer)
        });
        assert!(cq_consumer.in_flight() <= 2);
        drop((submitter.join().unwrap(), poller.join().unwrap(), cq_consumer));
    });
}

/// Like `credits_alone_keep_a_cq_from_overflowing_lap_after_lap`, for cancels. Both opcodes return
/// their credits to one class, each by a counter of its own.
///
/// Broken by: a Relaxed load of either counter.
fn cancels_lap_after_lap(target: Option<u64>) {
    check(3, move || {
        let (pool, ..) = pool(1);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 0, 1), regions(&pool), u32::MAX);
        const LAPS: u64 = 3;
        let both_ends = thread::spawn(move || {
            for n in 1..=LAPS {
                while sq_producer.available(Class::Cancel) == 0 {
                    thread::yield_now();
                }
                sq_producer.push_cancel(target, n).unwrap();
                sq_producer.publish();
                sq_consumer.ready();
                assert!(matches!(sq_consumer.pop(), Some(Submission::Cancel { .. })));
                cq_producer.push_cancel(target.is_none(), 0, n);
                cq_producer.publish();
            }
            (sq_producer, sq_consumer, cq_producer)
        });
        for n in 1..=LAPS {
            while cq_consumer.ready() == 0 {
                thread::yield_now();
            }
            assert_eq!(cq_consumer.pop().unwrap().user_data, n);
        }
        drop((both_ends.join().unwrap(), cq_consumer));
    });
}

#[test]
fn the_credit_of_a_cancel_means_space_in_the_cq() {
    cancels_lap_after_lap(Some(7));
}

#[test]
fn the_credit_of_a_cancel_of_all_means_space_in_the_cq() {
    cancels_lap_after_lap(None);
}

// ------------------------------------------------------------------------------------------------
// The doorbell

/// Broken by: either fence missing; a look for work before arming; a `Park` without memory.
#[test]
fn no_wake_up_is_lost_in_either_direction() {
    check(2, || {
        let (pool, marks, _) = pool(1);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(1, 0, 0), regions(&pool), u32::MAX);
        let bells = Arc::new([bell(), bell()]);
        const LAPS: u64 = 2;
        let poller = thread::spawn({
            let (bells, marks) = (bells.clone(), marks.clone());
            move || {
                for n in 1..=LAPS {
                    while sq_consumer.ready() == 0 {
                        bells[0].sleep(None, || sq_consumer.ready() > 0);
                    }
                    let Some(Submission::Packet {
                        class: Class::Read,
                        user_data,
                        buffer: mut frame,
                    }) = sq_consumer.pop()
                    else {
                        unreachable!()
                    };
                    assert_eq!(user_data, n);
                    marks.write(frame.frame_mut().unwrap(), n);
                    cq_producer.push(Class::Read, frame, n, Outcome::Done);
                    cq_producer.publish();
                    bells[1].ring();
                }
                (sq_consumer, cq_producer)
            }
        });
        let mut frame = pool.alloc().unwrap();
        for n in 1..=LAPS {
            sq_producer.push(Class::Read, frame, n).unwrap();
            sq_producer.publish();
            bells[0].ring();
            while cq_consumer.ready() == 0 {
                bells[1].sleep(None, || cq_consumer.ready() > 0);
            }
            frame = cq_consumer.pop().unwrap().frame.unwrap();
            assert_eq!(marks.read(&frame), n);
        }
        assert!(bells.iter().all(|bell| u64::from(bell.parker().unparks()) <= LAPS));
        drop((poller.join().unwrap(), sq_producer, cq_consumer, frame));
    });
}

/// A thread that arms and then publishes work itself does not sleep, whether or not another thread
/// rings at the same time.
///
/// Broken by: not looking at the flag; a `Park` without memory.
#[test]
fn a_sleeper_that_rings_for_itself_does_not_sleep() {
    check(3, || {
        let bell = Arc::new(bell());
        let other = thread::spawn({
            let bell = bell.clone();
            move || bell.ring()
        });
        bell.arm();
        let own = bell.ring_oneself();
        // This waits for ever if nobody has rung.
        bell.parker().park(None);
        assert!(!bell.disarm());
        assert!(own ^ other.join().unwrap(), "one of the two has woken the sleeper");
    });
}

/// Broken by: a load and a store instead of the exchange in `wake`.
#[test]
fn of_two_ringers_exactly_one_pays_for_each_arming() {
    check(3, || {
        let bell = Arc::new(bell());
        let work = Arc::new(AtomicU32::new(0));
        let ringers: Vec<_> = (0..2)
            .map(|_| {
                let (bell, work) = (bell.clone(), work.clone());
                thread::spawn(move || {
                    work.fetch_add(1, Ordering::Release);
                    bell.ring()
                })
            })
            .collect();
        let (mut armings, mut own) = (0, 0);
        while work.load(Ordering::Acquire) < 2 {
            bell.arm();
            armings += 1;
            if work.load(Ordering::Acquire) < 2 {
                bell.parker().park(None);
            }
            own += u32::from(bell.disarm());
        }
        let paid: u32 = ringers.into_iter().map(|ringer| u32::from(ringer.join().unwrap())).sum();
        assert_eq!(paid + own, armings, "each arming ends once");
        assert_eq!(paid, bell.parker().unparks(), "who pays wakes");
    });
}

/// Work of two kinds, as an engine has: an entry in the SQ, and a request (a control flag) that the
/// last look reads with a Relaxed load.
///
/// Broken by: either fence missing.
#[test]
fn a_sleeper_that_looks_for_two_kinds_of_work_misses_neither() {
    check(3, || {
        let (pool, _, _) = pool(1);
        let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) =
            rings(Depths::new(1, 0, 0), regions(&pool), u32::MAX);
        let bell = Arc::new(bell());
        let request = Arc::new(AtomicU32::new(0));
        let frame = pool.alloc().unwrap();
        let submitting = thread::spawn({
            let bell = bell.clone();
            move || {
                sq_producer.push(Class::Read, frame, 1).unwrap();
                sq_producer.publish();
                bell.ring();
                sq_producer
            }
        });
        let requester = thread::spawn({
            let (bell, request) = (bell.clone(), request.clone());
            move || {
                request.fetch_or(1, Ordering::Release);
                bell.ring();
            }
        });
        let (mut taken, mut granted) = (None, false);
        while taken.is_none() || !granted {
            granted |=
                request.load(Ordering::Relaxed) != 0 && request.swap(0, Ordering::Acquire) != 0;
            sq_consumer.ready();
            taken = taken.or(sq_consumer.pop());
            if taken.is_none() || !granted {
                bell.sleep(None, || {
                    sq_consumer.ready() > 0 || request.load(Ordering::Relaxed) != 0
                });
            }
        }
        requester.join().unwrap();
        drop((submitting.join().unwrap(), cq_consumer, sq_consumer, cq_producer, taken));
    });
}

/// A copy of the doorbell with parts left out.
fn crippled_doorbell(sleeper_fence: bool, ringer_fence: bool) {
    check(3, move || {
        let shared = Arc::new((AtomicU32::new(0), AtomicU32::new(0), Token::default()));
        let ringer = thread::spawn({
            let shared = shared.clone();
            move || {
                let (asleep, work, token) = &*shared;
                work.store(1, Ordering::Release);
                if ringer_fence {
                    fence(Ordering::SeqCst);
                }
                if asleep.load(Ordering::Acquire) != 0 && asleep.swap(0, Ordering::Relaxed) == 1 {
                    token.unpark();
                }
            }
        });
        let (asleep, work, token) = &*shared;
        while work.load(Ordering::Acquire) == 0 {
            asleep.swap(1, Ordering::Release);
            if sleeper_fence {
                fence(Ordering::SeqCst);
            }
            if work.load(Ordering::Acquire) == 0 {
                token.park(None);
            }
            asleep.swap(0, Ordering::Relaxed);
        }
        ringer.join().unwrap();
    });
}

/// The control for the three demonstrations below: without an omission, the copy is right.
#[test]
fn the_copied_doorbell_with_both_fences_loses_nothing() {
    crippled_doorbell(true, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_sleepers_fence_a_wake_up_is_lost() {
    crippled_doorbell(false, true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_ringers_fence_a_wake_up_is_lost() {
    crippled_doorbell(true, false);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_any_fence_a_wake_up_is_lost() {
    crippled_doorbell(false, false);
}

// ------------------------------------------------------------------------------------------------
// Arm against post

/// The reaping half's bell, as in `vmring`: the sleeper waits for an index of the CQ.
struct CqBell {
    bell: Doorbell<Token>,
    wanted: AtomicU32,
}

impl CqBell {
    fn new() -> Arc<Self> {
        Arc::new(Self { bell: bell(), wanted: AtomicU32::new(0) })
    }

    /// Arms for `n` completions and looks once more. Returns false if they are there.
    fn arm(&self, cq_consumer: &mut CqConsumer, n: u32) -> bool {
        self.wanted.store(cq_consumer.index_of(n), Ordering::Relaxed);
        self.bell.arm();
        let armed = cq_consumer.ready() < n;
        if !armed {
            self.bell.disarm();
        }
        armed
    }

    /// Follows a publish: wakes the sleeper if enough is published for it.
    fn post(&self, cq_producer: &CqProducer) -> bool {
        let index = cq_producer.index();
        self.bell.ring_if(|| index.wrapping_sub(self.wanted.load(Ordering::Relaxed)) < 1 << 31)
    }
}

/// Broken by: either fence missing; arming with Relaxed (the ringer reads an old index); comparing
/// indices without regard to the wrap.
#[test]
fn arming_for_two_completions_is_answered_by_the_second_once() {
    check(3, || {
        let (pool, _, _) = pool(2);
        let (sq_producer, mut cq_consumer, sq_consumer, mut cq_producer, frames) =
            posted(2, &pool, u32::MAX);
        let cq = CqBell::new();
        let poller = thread::spawn({
            let cq = cq.clone();
            move || {
                let mut paid = Vec::new();
                for (n, frame) in (1..).zip(frames) {
                    cq_producer.push(Class::Read, frame, n, Outcome::Done);
                    cq_producer.publish();
                    paid.push(cq.post(&cq_producer));
                }
                (paid, cq_producer)
            }
        });
        if cq.arm(&mut cq_consumer, 2) {
            cq.bell.parker().park(None);
            assert_eq!(cq_consumer.ready(), 2, "woken by fewer than it waits for");
        }
        let (paid, cq_producer) = poller.join().unwrap();
        assert!(!paid[0], "one completion woke a sleeper that wanted two");
        assert_eq!(u32::from(paid[1]), cq.bell.parker().unparks());
        let kept: Vec<_> = std::iter::from_fn(|| cq_consumer.pop()).collect();
        assert_eq!(kept.len(), 2);
        drop((kept, cq_producer, sq_producer, cq_consumer, sq_consumer));
    });
}

fn arm_anew(index_first: bool) {
    check(3, move || {
        let (pool, _, _) = pool(2);
        let (sq_producer, mut cq_consumer, sq_consumer, mut cq_producer, mut frames) =
            posted(2, &pool, u32::MAX);
        let cq = CqBell::new();
        let frame = frames.pop().unwrap();
        let poller = thread::spawn({
            let cq = cq.clone();
            move || {
                cq_producer.push(Class::Read, frame, 1, Outcome::Done);
                cq_producer.publish();
                cq.post(&cq_producer);
                cq_producer
            }
        });
        // Two completions do not come, so the sleeper then waits for one.
        assert!(cq.arm(&mut cq_consumer, 2));
        while cq_consumer.ready() == 0 {
            let armed = if index_first {
                cq.arm(&mut cq_consumer, 1)
            } else {
                cq.bell.arm();
                cq.wanted.store(cq_consumer.index_of(1), Ordering::Relaxed);
                cq_consumer.ready() == 0
            };
            if armed {
                cq.bell.parker().park(None);
            }
        }
        let kept = cq_consumer.pop();
        drop((poller.join().unwrap(), kept, frames, sq_producer, cq_consumer, sq_consumer));
    });
}

/// Broken by: either fence missing; arming with Relaxed, so that a ringer reads the older index.
#[test]
fn arming_anew_with_a_smaller_index_is_not_lost() {
    arm_anew(true);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_the_index_before_the_arming_a_wake_up_is_lost() {
    arm_anew(false);
}

// ------------------------------------------------------------------------------------------------
// A poller's two levels of doorbells

/// The poller of `vmring` in miniature: rings whose `Park` sets a bit in a ready set (with words of
/// one bit here), sets the word's bit in the summary, and rings the poller's own bell.
struct MiniPoller {
    bell: Doorbell<Token>,
    ready: [AtomicU64; 2],
    words: AtomicU64,
}

struct ReadyBit {
    poller: Arc<MiniPoller>,
    place: usize,
}

impl Park for ReadyBit {
    fn park(&self, _: Option<Duration>) {}

    fn unpark(&self) {
        self.poller.ready[self.place].fetch_or(1, Ordering::Release);
        self.poller.words.fetch_or(1 << self.place, Ordering::Release);
        self.poller.bell.ring();
    }
}

impl MiniPoller {
    fn collect(&self, mut each: impl FnMut(usize)) {
        if self.words.load(Ordering::Relaxed) == 0 {
            return;
        }
        let words = self.words.swap(0, Ordering::Acquire);
        for place in (0..2).filter(|place| words & 1 << place != 0) {
            if self.ready[place].swap(0, Ordering::Acquire) != 0 {
                each(place);
            }
        }
    }
}

/// Broken by: a summary bit that is set before its word; clearing a word before its summary bit;
/// the poller's last look anywhere but after its arming; any fence of either level missing.
#[test]
fn no_ring_is_lost_through_two_levels_of_doorbells() {
    check(2, || {
        let poller = Arc::new(MiniPoller {
            bell: bell(),
            ready: [AtomicU64::new(0), AtomicU64::new(0)],
            words: AtomicU64::new(0),
        });
        // For each ring: its bell, and the number of entries ever published.
        let rings = Arc::new([0, 1].map(|place| {
            let bell = Doorbell::new(ReadyBit { poller: poller.clone(), place });
            (bell, AtomicU32::new(0))
        }));
        // Every ring sleeps.
        rings.iter().for_each(|(bell, _)| bell.arm());
        let ringers = [&[0][..], &[1, 0]].map(|places| {
            let rings = rings.clone();
            thread::spawn(move || {
                for &place in places {
                    let (bell, published) = &rings[place];
                    published.fetch_add(1, Ordering::Release);
                    bell.ring();
                }
            })
        });
        let mut active = BTreeSet::new();
        let mut taken = [0; 2];
        while taken != [2, 1] {
            poller.collect(|place| {
                active.insert(place);
            });
            let mut worked = false;
            active.retain(|&place| {
                let (bell, published) = &rings[place];
                let now = published.load(Ordering::Acquire);
                if now != taken[place] {
                    taken[place] = now;
                    worked = true;
                    return true;
                }
                // The ring goes to sleep, unless an entry came.
                bell.arm();
                let awake = published.load(Ordering::Acquire) != now;
                if awake {
                    bell.disarm();
                }
                worked |= awake;
                awake
            });
            if !worked && active.is_empty() {
                poller.bell.sleep(None, || poller.words.load(Ordering::Acquire) != 0);
            }
        }
        for ringer in ringers {
            ringer.join().unwrap();
        }
    });
}

// ------------------------------------------------------------------------------------------------
// Close

/// The real halves between three threads: a submitter that looks at a flag before it pushes, a
/// poller that ends with a last turn after it was told to stop, and a closer that takes the
/// poller's halves over and turns them whenever it reaps.
///
/// Broken by: a closer that does not drain the SQ after the hand-over; a poller whose last look
/// does not see the stop; either fence missing.
#[test]
fn a_submission_that_races_close_completes_once_or_comes_back_refused() {
    check(2, || {
        let (pool, marks, _) = pool(2);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 2, 0), regions(&pool), u32::MAX);
        // The bell, the closed flag that the submitter looks at, and the stop that the poller looks
        // at.
        let shared = Arc::new((bell(), AtomicU32::new(0), AtomicU32::new(0)));
        let mut frames = [pool.alloc().unwrap(), pool.alloc().unwrap()];
        for (n, frame) in (0..).zip(&mut frames) {
            marks.write(frame, n);
        }
        let submitting = thread::spawn({
            let shared = shared.clone();
            move || {
                let (bell, closed, _) = &*shared;
                let (mut accepted, mut refused) = (Vec::new(), Vec::new());
                for (n, frame) in (0..).zip(frames) {
                    if closed.load(Ordering::Acquire) != 0 {
                        refused.push(frame);
                        continue;
                    }
                    sq_producer.push(Class::Write, frame, n).unwrap();
                    sq_producer.publish();
                    bell.ring();
                    accepted.push(n);
                }
                (accepted, refused, sq_producer)
            }
        });
        let poller = thread::spawn({
            let shared = shared.clone();
            move || {
                let (bell, _, stop) = &*shared;
                loop {
                    let stopped = stop.swap(0, Ordering::Acquire) != 0;
                    let outcome = if stopped { Outcome::Cancelled } else { Outcome::Done };
                    turn(&mut sq_consumer, &mut cq_producer, outcome);
                    if stopped {
                        return (sq_consumer, cq_producer);
                    }
                    bell.sleep(None, || {
                        sq_consumer.ready() > 0 || stop.load(Ordering::Relaxed) != 0
                    });
                }
            }
        });
        let (bell, closed, stop) = &*shared;
        closed.store(1, Ordering::Release);
        stop.fetch_or(1, Ordering::Release);
        bell.ring();
        let (mut sq_consumer, mut cq_producer) = poller.join().unwrap();
        let mut completed = Vec::new();
        let mut reap = |cq_consumer: &mut CqConsumer| {
            turn(&mut sq_consumer, &mut cq_producer, Outcome::Cancelled);
            cq_consumer.ready();
            while let Some(reaped) = cq_consumer.pop() {
                let frame = reaped.frame.unwrap();
                assert_eq!(marks.read(&frame), reaped.user_data);
                completed.push((reaped.user_data, frame));
            }
        };
        // This may be too early for the submitter's last entry. The next reap finds that one.
        reap(&mut cq_consumer);
        let (accepted, refused, sq_producer) = submitting.join().unwrap();
        reap(&mut cq_consumer);
        assert_eq!(cq_consumer.in_flight(), 0);
        let numbers: Vec<_> = completed.iter().map(|(n, _)| *n).collect();
        assert_eq!(numbers, accepted, "each accepted entry completes once, in order");
        assert_eq!(completed.len() + refused.len(), 2);
        drop((completed, refused, sq_producer, cq_consumer, sq_consumer, cq_producer));
        assert_eq!(pool.slots_out(), 0);
    });
}

/// The owner of a closed ring's two bells sleeps until something completes. The entry comes from a
/// submitter that looked at the flag before it was set. The submitter rings the engine's bell, but
/// that goes to a poller that no longer has the ring. So a submitter that finds the engine's bell
/// armed on a closed ring rings the reaper's bell too.
///
/// Broken by: leaving out that second ring; leaving out the owner's arming of the engine's bell.
#[test]
fn a_submission_that_races_close_wakes_the_reaper_that_took_over() {
    struct Nobody;
    impl Park for Nobody {
        fn park(&self, _: Option<Duration>) {}
        fn unpark(&self) {}
    }
    check(3, || {
        let (pool, _, _) = pool(1);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 1, 0), regions(&pool), u32::MAX);
        let shared = Arc::new((Doorbell::new(Nobody), bell(), AtomicU32::new(0)));
        let frame = pool.alloc().unwrap();
        let submitting = thread::spawn({
            let shared = shared.clone();
            move || {
                let (engine_bell, cq_bell, closed) = &*shared;
                sq_producer.push(Class::Write, frame, 1).unwrap();
                sq_producer.publish();
                if engine_bell.ring() && closed.load(Ordering::Acquire) != 0 {
                    cq_bell.ring();
                }
                sq_producer
            }
        });
        let (engine_bell, cq_bell, closed) = &*shared;
        closed.store(1, Ordering::Release);
        let reaped = loop {
            turn(&mut sq_consumer, &mut cq_producer, Outcome::Cancelled);
            cq_consumer.ready();
            if let Some(reaped) = cq_consumer.pop() {
                break reaped;
            }
            cq_bell.arm();
            engine_bell.arm();
            if sq_consumer.ready() == 0 {
                cq_bell.parker().park(None);
            }
            cq_bell.disarm();
            engine_bell.disarm();
        };
        assert_eq!(reaped.outcome, Outcome::Cancelled);
        drop((submitting.join().unwrap(), reaped, cq_consumer, sq_consumer, cq_producer));
    });
}

// ------------------------------------------------------------------------------------------------
// The pool

/// Broken by: a free list without tags (the same head is back, but the link that was read is
/// stale); a Relaxed push or pop (the next owner races with the last owner's bytes).
fn two_threads_share_two_slots(used: bool) {
    check(3, move || {
        let (pool, marks, freed) = pool(2);
        if used {
            drop(pool.alloc());
        }
        let other = thread::spawn({
            let (pool, marks) = (pool.clone(), marks.clone());
            move || {
                let mut held: Vec<_> = std::iter::from_fn(|| pool.alloc()).take(2).collect();
                for (n, frame) in (10..).zip(&mut held) {
                    marks.write(frame, n);
                }
                // The first slot returns while the second stays out.
                if !held.is_empty() {
                    drop(held.remove(0));
                }
                held
            }
        });
        let mut held: Vec<_> = std::iter::from_fn(|| pool.alloc()).take(2).collect();
        for (n, frame) in (20..).zip(&mut held) {
            marks.write(frame, n);
        }
        let theirs = other.join().unwrap();
        for (n, frame) in (20..).zip(&held) {
            assert_eq!(marks.read(frame), n);
        }
        let all: Vec<_> = held.into_iter().chain(theirs).collect();
        let slots: BTreeSet<_> = all.iter().map(Frame::slot).collect();
        assert_eq!(slots.len(), all.len(), "a slot was handed out twice");
        assert_eq!(pool.slots_out() as usize, all.len());
        drop(all);
        let all = [pool.alloc().unwrap(), pool.alloc().unwrap()];
        assert_ne!(all[0].slot(), all[1].slot());
        assert!(pool.alloc().is_none());
        drop(all);
        assert_eq!(pool.slots_out(), 0);
        drop(pool);
        assert_eq!(freed.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn two_threads_never_hold_one_slot_and_lose_none() {
    two_threads_share_two_slots(false);
}

/// Broken by: a tag that begins anew at a push or a pop. The first slot is back with the tag that
/// it had before.
#[test]
fn a_used_slot_that_is_back_is_not_taken_for_the_same_list() {
    two_threads_share_two_slots(true);
}

/// Two threads drop frames that a third allocated, while the third allocates again.
///
/// Broken by: a Relaxed push or pop; a push that does not try again when its exchange fails.
#[test]
fn frames_return_from_other_threads() {
    check(3, || {
        let (pool, marks, freed) = pool(2);
        let droppers = [1, 2].map(|n| {
            let (mut frame, marks) = (pool.alloc().unwrap(), marks.clone());
            thread::spawn(move || {
                marks.write(&mut frame, n);
                drop(frame);
            })
        });
        let mut early = pool.alloc();
        if let Some(frame) = &mut early {
            marks.write(frame, 3);
        }
        for dropper in droppers {
            dropper.join().unwrap();
        }
        let mut rest: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        assert_eq!(rest.len() + usize::from(early.is_some()), 2, "a slot was lost");
        rest.iter_mut().for_each(|frame| marks.write(frame, 4));
        assert!(early.is_none_or(|frame| marks.read(&frame) == 3));
        drop((rest, pool));
        assert_eq!(freed.load(Ordering::Relaxed), 1);
    });
}

/// Broken by: a Relaxed decrement, or no Acquire before the freeing (it races with the last owner's
/// bytes); handles and slots in two counts; a load instead of the decrement's own result.
#[test]
fn the_memory_goes_once_after_both_the_last_frame_and_the_last_handle() {
    check(3, || {
        let (pool, marks, freed) = pool(2);
        let holders = [1, 2].map(|n| {
            let mut frame = pool.alloc().unwrap();
            let (marks, freed) = (marks.clone(), freed.clone());
            thread::spawn(move || {
                marks.write(&mut frame, n);
                assert_eq!(freed.load(Ordering::Relaxed), 0, "freed under a frame");
                drop(frame);
            })
        });
        assert_eq!(freed.load(Ordering::Relaxed), 0, "freed under a handle");
        drop(pool);
        for holder in holders {
            holder.join().unwrap();
        }
        assert_eq!(freed.load(Ordering::Relaxed), 1);
    });
}

/// The last owners of a pool's slots are dropped at once: a frame on one thread, a queue with
/// entries inside on another (one of them written and not published), and the handle on a third.
///
/// Broken by: a queue that forgets its entries; a half that forgets what it has not published; a
/// queue whose drop frees its pools before its entries.
#[test]
fn a_ring_dropped_with_entries_inside_returns_its_frames() {
    check(2, || {
        let (pool, marks, freed) = pool(3);
        let (sq_producer, cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(0, 3, 0), regions(&pool), u32::MAX);
        let mut frames = [0; 3].map(|_| pool.alloc().unwrap()).into_iter();
        for user_data in 0..2 {
            sq_producer.push(Class::Write, frames.next().unwrap(), user_data).unwrap();
        }
        sq_producer.publish();
        // One entry in the CQ, one in the SQ, and one written to the SQ and not published.
        sq_consumer.ready();
        let Some(Submission::Packet { class: Class::Write, user_data, buffer: frame }) =
            sq_consumer.pop()
        else {
            unreachable!()
        };
        let mut last = frames.next().unwrap();
        let submitting = thread::spawn({
            let marks = marks.clone();
            move || {
                marks.write(&mut last, 2);
                sq_producer.push(Class::Write, last, 2).unwrap();
                drop(sq_producer);
            }
        });
        let polling = thread::spawn({
            let (mut frame, marks) = (frame.into_frame().unwrap(), marks.clone());
            move || {
                marks.write(&mut frame, 0);
                cq_producer.push(Class::Write, frame, user_data, Outcome::Done);
                drop(cq_producer);
                drop(sq_consumer);
            }
        });
        drop(pool);
        drop(cq_consumer);
        submitting.join().unwrap();
        polling.join().unwrap();
        assert_eq!(freed.load(Ordering::Relaxed), 1, "the memory stayed, or went twice");
    });
}
