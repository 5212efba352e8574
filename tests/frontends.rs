//! The blocking and the asynchronous front-end. The latter runs under both of tokio's executors and
//! under `block_on` with a thread per task.

mod parity;
mod start_and_stop;
mod streams;

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::Progress;
use vmring::device::fault::Faults;
use vmring::{
    AsyncRing, BlockingRing, CloseReason, Direction, EntryError, Error, Frame, Interface, Loopback,
    Poller, Ring, Status, block_on,
};

use crate::support::{
    LONG, Script, ScriptQueue, Way, eventually, every_way, guarded, loopback, number_of, packet,
    scaled, stage, take_writes,
};

fn ring(interface: &Interface, way: Way, poller: &Poller) -> Ring {
    interface.ring(Direction::Both).drive(way.drive(poller)).build().expect("a ring")
}

fn is_closed<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Closed(CloseReason::Stopped)))
}

mod blocking {
    use super::*;

    fn front(interface: &Interface, way: Way, poller: &Poller) -> BlockingRing {
        BlockingRing::new(ring(interface, way, poller)).expect("reads are posted")
    }

    fn read(front: &mut BlockingRing) -> Frame {
        front.read_timeout(LONG).expect("an open ring").expect("a packet")
    }

    #[test]
    fn what_is_written_is_read_in_order() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let mut front = front(&interface, way, poller);
                for round in 0..scaled(100) {
                    for i in 0..10 {
                        let number = round * 10 + i;
                        let len = 22 + (number as usize * 37) % 1492;
                        front.write(&packet(number, len)).expect("it is taken");
                    }
                    for i in 0..10 {
                        let got = read(&mut front);
                        assert_eq!(number_of(&got), round * 10 + i, "{way:?}");
                        assert_eq!(*got, *packet(round * 10 + i, got.len()));
                    }
                }
            });
        });
    }

    #[test]
    fn a_read_with_nothing_to_read_ends_with_its_timeout() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let mut front = front(&interface, way, poller);
                for timeout in [Duration::ZERO, Duration::from_millis(20)] {
                    let start = Instant::now();
                    assert!(front.read_timeout(timeout).expect("an open ring").is_none());
                    assert!(start.elapsed() >= timeout, "{way:?}");
                }
                // The timeout loses no packet.
                front.write(&packet(1, 60)).expect("it is taken");
                assert_eq!(number_of(&read(&mut front)), 1);
            });
        });
    }

    #[test]
    fn a_packet_too_big_is_refused_before_anything_is_sent() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let mut front = front(&interface, way, poller);
                let too_big = front.write(&packet(1, 1515));
                assert!(matches!(too_big, Err(Error::Status(Status::PacketTooBig))), "{too_big:?}");
                let mut frame = front.alloc().expect("a frame");
                if frame.set_len(1515).is_ok() {
                    let too_big = front.write_frame(frame);
                    assert!(matches!(too_big, Err(Error::Status(Status::PacketTooBig))));
                }
                front.write(&packet(2, 1514)).expect("the largest there is");
                assert_eq!(number_of(&read(&mut front)), 2, "{way:?}: the first that was sent");
                assert_eq!(front.ring().stats().tx_packets, 1);
            });
        });
    }

    #[test]
    fn a_refusal_of_the_device_is_the_writes_answer() {
        guarded(|| {
            every_way(|way, poller| {
                let driver =
                    Faults::seeded(1).errors(1.0, Status::NotAuthorized).wrap(Loopback::new(1500));
                let interface = Interface::builder().device(driver).start().expect("it starts");
                let mut front = front(&interface, way, poller);
                let refused = front.write(&packet(1, 60));
                let expected = EntryError::Device(Status::NotAuthorized);
                assert!(matches!(refused, Err(Error::Entry(e)) if e == expected), "{refused:?}");
            });
        });
    }

    /// The SQ has one entry, and a posted read occupies it. No completion will say when it is free.
    #[test]
    fn a_full_submission_queue_holds_no_write_up() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let ring = interface.ring(Direction::Both).sq_depth(1).drive(way.drive(poller));
                let mut front = BlockingRing::new(ring.build().expect("a ring")).expect("posted");
                for number in 0..scaled(100) {
                    stage(format!("{way:?}: packet {number}"));
                    front.write(&packet(number, 60)).expect("it is taken");
                    assert_eq!(number_of(&read(&mut front)), number, "{way:?}");
                }
            });
        });
    }

    /// The device keeps a write and refuses a read meanwhile.
    #[test]
    fn a_read_that_fails_is_no_writes_answer() {
        const REFUSED: EntryError = EntryError::Device(Status::NotAuthorized);
        guarded(|| {
            every_way(|way, poller| {
                let interface = Script::new(|_, wake| {
                    let mut kept = None;
                    let sent = Arc::new(AtomicBool::new(false));
                    ScriptQueue::new(move |io| {
                        if let Some(write) = io.take_write() {
                            kept = Some(write);
                            let read = io.take_read().expect("reads are posted first");
                            io.fail(read, Status::NotAuthorized);
                            let (sent, wake) = (sent.clone(), wake.clone());
                            thread::spawn(move || {
                                thread::sleep(Duration::from_millis(50));
                                sent.store(true, Ordering::SeqCst);
                                wake.wake();
                            });
                        }
                        if sent.load(Ordering::SeqCst)
                            && let Some(write) = kept.take()
                        {
                            io.complete_write(write);
                        }
                        Ok(Progress::Idle)
                    })
                })
                .start();
                let mut front = front(&interface, way, poller);
                let start = Instant::now();
                front.write(&packet(1, 60)).expect("it is sent");
                assert!(start.elapsed() >= Duration::from_millis(50), "{way:?}: not sent yet");
                let failed = front.read_timeout(LONG);
                assert!(matches!(failed, Err(Error::Entry(REFUSED))), "{way:?}: {failed:?}");
                let next = front.read_timeout(Duration::ZERO);
                assert!(matches!(next, Ok(None)), "{way:?}: told once, not twice: {next:?}");
            });
        });
    }

    #[test]
    fn a_closed_ring_gives_its_packets_and_then_says_so() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let mut front = front(&interface, way, poller);
                for number in 0..3 {
                    front.write(&packet(number, 60)).expect("it is taken");
                }
                eventually("the packets arrive", || front.ring().stats().rx_packets == 3);
                front.ring().control().stop();
                for number in 0..3 {
                    assert_eq!(number_of(&read(&mut front)), number, "{way:?}");
                }
                for _ in 0..2 {
                    assert!(is_closed(&front.write(&packet(9, 60))), "{way:?}: write");
                    assert!(is_closed(&front.read_timeout(LONG)), "{way:?}: read_timeout");
                    assert!(is_closed(&front.read()), "{way:?}: read");
                }
            });
        });
    }

    #[test]
    fn a_reader_that_waits_hears_of_the_close() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let mut front = front(&interface, way, poller);
                let control = front.ring().control();
                let stopper = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    control.stop();
                });
                assert!(is_closed(&front.read()), "{way:?}");
                stopper.join().expect("it ends");
            });
        });
    }

    /// A caller that keeps every packet can still write. A read reports that the caller holds all
    /// frames, and reads work again once the caller has dropped some.
    #[test]
    fn frames_the_caller_holds_do_not_stop_the_ring() {
        guarded(|| {
            every_way(|way, poller| {
                let interface = loopback();
                let ring = interface.ring(Direction::Both).depth(4).drive(way.drive(poller));
                let mut front = BlockingRing::new(ring.build().expect("a ring")).expect("posted");
                let mut held = Vec::new();
                let mut sent = 0;
                loop {
                    stage(format!("{way:?}: write {sent}, {} packets held", held.len()));
                    front.write(&packet(sent, 60)).expect("holding packets stops no write");
                    sent += 1;
                    stage(format!("{way:?}: read, {} packets held", held.len()));
                    match front.read_timeout(LONG) {
                        Ok(packet) => held.extend(packet),
                        Err(Error::OutOfFrames) => break,
                        Err(error) => panic!("{error}"),
                    }
                }
                assert!(held.len() >= 4, "{way:?}: only {} could be held", held.len());
                stage(format!("{way:?}: {} are given back", held.len()));
                let mut expected = 0;
                for frame in held.drain(..) {
                    assert_eq!(number_of(&frame), expected, "{way:?}");
                    expected += 1;
                }
                while expected < sent {
                    assert_eq!(number_of(&read(&mut front)), expected, "{way:?}");
                    expected += 1;
                }
            });
        });
    }
}

/// The executors. `Tiny` runs `block_on` on one thread per task.
#[derive(Clone, Copy, Debug)]
enum Executor {
    TokioMany,
    TokioOne,
    Tiny,
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Executor {
    const ALL: [Executor; 3] = [Executor::TokioMany, Executor::TokioOne, Executor::Tiny];

    /// Runs the tasks until all have ended.
    fn run(self, tasks: Vec<Task>) {
        let mut builder = match self {
            Executor::TokioMany => tokio::runtime::Builder::new_multi_thread(),
            Executor::TokioOne => tokio::runtime::Builder::new_current_thread(),
            Executor::Tiny => {
                let threads: Vec<_> =
                    tasks.into_iter().map(|task| thread::spawn(move || block_on(task))).collect();
                return threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
            }
        };
        let runtime = builder.worker_threads(2).enable_time().build().expect("a runtime");
        runtime.block_on(async {
            let tasks: Vec<_> = tasks.into_iter().map(tokio::spawn).collect();
            for task in tasks {
                task.await.expect("it ends");
            }
        });
    }
}

/// The two ways to drive the ring of an asynchronous front-end.
const POLLERS: [Way; 2] = [Way::Thread, Way::Shared];

/// Runs `body` under each executor with a ring on a thread and on a shared poller.
fn every_executor(body: impl Fn(Executor, AsyncRing)) {
    let poller = Poller::start().expect("a poller");
    for executor in Executor::ALL {
        for way in POLLERS {
            stage(format!("{executor:?}, {way:?}"));
            let interface = loopback();
            body(
                executor,
                AsyncRing::new(ring(&interface, way, &poller)).expect("reads are posted"),
            );
        }
    }
}

fn task(future: impl Future<Output = ()> + Send + 'static) -> Task {
    Box::pin(future)
}

/// Writes a packet, and tries again while the loopback is full.
async fn write(front: &AsyncRing, packet: &[u8]) {
    loop {
        match front.write(packet).await {
            Ok(()) => return,
            Err(Error::Entry(EntryError::Device(Status::BufferExhausted))) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Records which packets came. Each may come at most once.
#[derive(Default)]
struct Tally(Mutex<Vec<bool>>);

impl Tally {
    fn new(n: u64) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![false; n as usize])))
    }

    /// Returns how many are still missing.
    fn saw(&self, packet: &[u8]) -> usize {
        let mut seen = self.0.lock().expect("nobody panicked");
        let number = number_of(packet) as usize;
        assert!(!std::mem::replace(&mut seen[number], true), "packet {number} came twice");
        seen.iter().filter(|seen| !**seen).count()
    }

    fn missing(&self) -> Vec<usize> {
        let seen = self.0.lock().expect("nobody panicked");
        seen.iter().enumerate().filter(|(_, seen)| !**seen).map(|(i, _)| i).collect()
    }
}

#[test]
fn many_readers_and_writers_share_a_ring() {
    const WRITERS: u64 = 6;
    guarded(|| {
        every_executor(|executor, front| {
            let each = scaled(200);
            let tally = Tally::new(WRITERS * each);
            let mut tasks = Vec::new();
            for _ in 0..5 {
                let (front, tally) = (front.clone(), tally.clone());
                tasks.push(task(async move {
                    while let Ok(packet) = front.read().await {
                        if tally.saw(&packet) == 0 {
                            // All packets have come. The other readers still wait for one, so stop
                            // the ring.
                            front.control().stop();
                        }
                    }
                }));
            }
            for writer in 0..WRITERS {
                let front = front.clone();
                tasks.push(task(async move {
                    for i in 0..each {
                        write(&front, &packet(writer * each + i, 60)).await;
                    }
                }));
            }
            executor.run(tasks);
            assert_eq!(tally.missing(), [0; 0], "{executor:?}");
        });
    });
}

/// Tasks that give up all the time: a future is dropped after any number of polls.
#[test]
fn a_storm_of_cancellations_loses_no_packet() {
    guarded(|| {
        every_executor(|executor, front| {
            let n = scaled(600);
            let tally = Tally::new(n);
            let mut tasks = Vec::new();
            for reader in 0..4 {
                let (front, tally) = (front.clone(), tally.clone());
                tasks.push(task(async move {
                    for polls in (0..4).cycle() {
                        // Odd readers always give up early. Even ones wait to the end now and then.
                        let patience = if reader % 2 == 0 && polls == 3 { u32::MAX } else { polls };
                        match GivesUp::new(front.read(), patience).await {
                            Some(Ok(packet)) => {
                                if tally.saw(&packet) == 0 {
                                    front.control().stop();
                                }
                            }
                            Some(Err(error)) => {
                                assert!(matches!(error, Error::Closed(_)), "{error}");
                                return;
                            }
                            None => Pause::default().await,
                        }
                    }
                }));
            }
            for writer in 0..2 {
                let front = front.clone();
                tasks.push(task(async move {
                    for number in (writer..n).step_by(2) {
                        // A future that is dropped before its first poll sends nothing.
                        drop(front.write(&packet(number, 60)));
                        write(&front, &packet(number, 60)).await;
                    }
                }));
            }
            executor.run(tasks);
            assert_eq!(tally.missing(), [0; 0], "{executor:?}");
        });
    });
}

/// A write whose future is dropped half-way sends its packet once or not at all.
#[test]
fn a_dropped_write_is_sent_at_most_once_and_disturbs_nobody() {
    guarded(|| {
        every_executor(|executor, front| {
            let n = scaled(400);
            let tally = Tally::new(2 * n + 1);
            let reader = {
                let (front, tally) = (front.clone(), tally.clone());
                task(async move {
                    loop {
                        let packet = front.read().await.expect("an open ring");
                        tally.saw(&packet);
                        if number_of(&packet) == 2 * n {
                            return;
                        }
                    }
                })
            };
            let writer = task(async move {
                for number in 0..n {
                    let dropped = packet(number, 60);
                    let _ = GivesUp::new(front.write(&dropped), number as u32 % 3).await;
                    write(&front, &packet(n + number, 60)).await;
                }
                write(&front, &packet(2 * n, 60)).await;
            });
            executor.run(vec![reader, writer]);
            // Every write that was awaited has arrived. Of the others, none came twice.
            let missing = tally.missing();
            assert!(missing.iter().all(|number| *number < n as usize), "{executor:?}: {missing:?}");
        });
    });
}

/// tokio's own timeouts drop the future that waits.
#[test]
fn timeouts_lose_no_packet() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Both).build().expect("a ring");
        let front = AsyncRing::new(ring).expect("reads are posted");
        let n = scaled(300);
        let tally = Tally::new(n);
        let reader = {
            let (front, tally) = (front.clone(), tally.clone());
            task(async move {
                for round in 0_u64.. {
                    let patience = Duration::from_micros(round % 5 * 50);
                    tokio::select! {
                        biased;
                        () = tokio::time::sleep(patience) => {}
                        packet = front.read() => {
                            if tally.saw(&packet.expect("an open ring")) == 0 {
                                return;
                            }
                        }
                    }
                }
            })
        };
        let writer = task(async move {
            for number in 0..n {
                write(&front, &packet(number, 60)).await;
                tokio::time::sleep(Duration::from_micros(number % 7 * 20)).await;
            }
        });
        stage("tokio, one thread");
        Executor::TokioOne.run(vec![reader, writer]);
        assert_eq!(tally.missing(), [0; 0]);
    });
}

#[test]
fn readers_that_wait_hear_of_the_close() {
    guarded(|| {
        every_executor(|executor, front| {
            let control = front.control();
            let waiting = Arc::new(AtomicU64::new(0));
            let mut tasks: Vec<_> = (0..5)
                .map(|_| {
                    let (front, waiting) = (front.clone(), waiting.clone());
                    task(async move {
                        waiting.fetch_add(1, Ordering::SeqCst);
                        assert!(is_closed(&front.read().await), "{executor:?}");
                        // Later calls get the same answer.
                        assert!(is_closed(&front.read().await), "{executor:?}");
                        assert!(is_closed(&front.write(&packet(1, 60)).await), "{executor:?}");
                    })
                })
                .collect();
            tasks.push(task(async move {
                while waiting.load(Ordering::SeqCst) < 5 {
                    Pause::default().await;
                }
                control.stop();
            }));
            executor.run(tasks);
        });
    });
}

#[test]
fn an_async_packet_too_big_is_refused_before_anything_is_sent() {
    guarded(|| {
        every_executor(|executor, front| {
            let task = task(async move {
                let too_big = front.write(&packet(1, 1515)).await;
                assert!(matches!(too_big, Err(Error::Status(Status::PacketTooBig))), "{too_big:?}");
                front.write(&packet(2, 1514)).await.expect("the largest there is");
                assert_eq!(number_of(&front.read().await.expect("a packet")), 2, "{executor:?}");
                assert_eq!(front.control().stats().tx_packets, 1);
            });
            executor.run(vec![task]);
        });
    });
}

/// The ring is closed and no frame is free to write with. The write still returns the error.
#[test]
fn a_write_on_a_closed_ring_does_not_wait_for_a_frame() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Both).depth(2).build().expect("a ring");
        let pool = ring.pools()[0].clone();
        let front = AsyncRing::new(ring).expect("reads are posted");
        front.control().stop();
        stage("the reads come home");
        assert!(is_closed(&block_on(front.read())));
        let held: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        stage(format!("a write while {} frames are held", held.len()));
        assert!(is_closed(&block_on(front.write(&packet(1, 60)))));
    });
}

/// Like the blocking front-end: holding packets stops no write, and a read reports that the caller
/// holds all frames.
#[test]
fn packets_held_and_given_back_let_the_readers_go_on() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            let interface = loopback();
            let ring = interface.ring(Direction::Both).depth(4).drive(way.drive(&poller));
            let front = AsyncRing::new(ring.build().expect("a ring")).expect("reads are posted");
            let mut held = Vec::new();
            let mut sent = 0;
            let error = loop {
                stage(format!("{way:?}: write {sent}, {} packets held", held.len()));
                block_on(front.write(&packet(sent, 60))).expect("holding packets stops no write");
                sent += 1;
                stage(format!("{way:?}: read, {} packets held", held.len()));
                match block_on(front.read()) {
                    Ok(packet) => held.push(packet),
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, Error::OutOfFrames), "{way:?}: {error}");
            assert!(held.len() >= 4, "{way:?}: only {} could be held", held.len());
            stage(format!("{way:?}: {} are given back", held.len()));
            let mut expected = 0;
            for frame in held.drain(..) {
                assert_eq!(number_of(&frame), expected, "{way:?}");
                expected += 1;
            }
            while expected < sent {
                let next = block_on(front.read()).expect("there are frames again");
                assert_eq!(number_of(&next), expected, "{way:?}");
                expected += 1;
            }
        }
    });
}

/// Nothing would wake the write when the caller frees a frame, so it must not wait.
#[test]
fn a_write_without_a_free_frame_says_so() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            let interface = loopback();
            let ring = interface.ring(Direction::Both).depth(2).frames(4).drive(way.drive(&poller));
            let ring = ring.build().expect("a ring");
            let pool = ring.pools()[0].clone();
            let front = AsyncRing::new(ring).expect("reads are posted");
            let held: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
            stage(format!("{way:?}: a write while {} frames are held", held.len()));
            let refused = block_on(front.write(&packet(1, 60)));
            assert!(matches!(refused, Err(Error::OutOfFrames)), "{way:?}: {refused:?}");
            drop(held);
            stage(format!("{way:?}: a write after they were given back"));
            block_on(front.write(&packet(2, 60))).expect("there are frames again");
            assert_eq!(number_of(&block_on(front.read()).expect("an open ring")), 2);
        }
    });
}

/// The only frame is in a write in flight. A second write waits for it, even if the future of the
/// first was dropped.
#[test]
fn a_write_waits_for_the_frame_of_another() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            for dropped in [false, true] {
                stage(format!("{way:?}, the first is dropped: {dropped}"));
                let bell = Arc::new(Mutex::new(None));
                let taking = Arc::new(AtomicBool::new(false));
                let interface = {
                    let (bell, taking) = (bell.clone(), taking.clone());
                    Script::new(move |_, wake| {
                        *bell.lock().expect("no panic") = Some(wake);
                        let (taking, mut kept) = (taking.clone(), Vec::new());
                        ScriptQueue::new(move |io| {
                            kept.extend(std::iter::from_fn(|| io.take_write()));
                            if taking.load(Ordering::SeqCst) {
                                kept.drain(..).for_each(|write| io.complete_write(write));
                            }
                            Ok(Progress::Idle)
                        })
                    })
                    .start()
                };
                let ring = interface.ring(Direction::Both).depth(2).frames(4);
                let ring = ring.drive(way.drive(&poller)).build().expect("a ring");
                let pool = ring.pools()[0].clone();
                let front = AsyncRing::new(ring).expect("two reads are posted");
                let _held = pool.alloc().expect("the third frame");
                let mut first = front.write(&[1; 60]);
                assert!(poll(&mut first, &Arc::default()).is_pending());
                let first = (!dropped).then_some(first);
                let (mut second, wakes) = (front.write(&[2; 60]), Arc::default());
                assert!(poll(&mut second, &wakes).is_pending(), "{way:?}: it waits");
                taking.store(true, Ordering::SeqCst);
                bell.lock().expect("no panic").as_ref().expect("a queue was made").wake();
                eventually("the second is woken", || wakes.count() > 0);
                block_on(second).expect("the first one's frame is free");
                if let Some(first) = first {
                    block_on(first).expect("it is taken");
                }
                assert_eq!(front.control().stats().tx_packets, 2);
            }
        }
    });
}

/// Drops a waiting future, before and after its packet has come.
#[test]
fn a_dropped_reads_packet_goes_to_the_next_reader() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            for woken_first in [false, true] {
                stage(format!("{way:?}, woken first: {woken_first}"));
                let interface = loopback();
                let front = AsyncRing::new(ring(&interface, way, &poller)).expect("posted");
                let (mut first, mut second) = (front.read(), front.read());
                let (a, b) = (Arc::new(Wakes::default()), Arc::new(Wakes::default()));
                assert!(poll(&mut first, &a).is_pending());
                assert!(poll(&mut second, &b).is_pending());
                if !woken_first {
                    drop(first);
                    block_on(write(&front, &packet(7, 60)));
                } else {
                    block_on(write(&front, &packet(7, 60)));
                    eventually("both readers are woken", || a.count() > 0 && b.count() > 0);
                    drop(first);
                }
                let packet = block_on(second).expect("an open ring");
                assert_eq!(number_of(&packet), 7, "{way:?}");
            }
        }
    });
}

/// Eight packets arrive in one batch and cause one wake-up, which must reach all eight readers.
#[test]
fn one_wake_lets_every_reader_proceed() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            stage(format!("{way:?}"));
            let bell = Arc::new(Mutex::new(None));
            let batch = Arc::new(AtomicBool::new(false));
            let interface = {
                let (bell, batch) = (bell.clone(), batch.clone());
                Script::new(move |_, wake| {
                    *bell.lock().expect("no panic") = Some(wake);
                    let batch = batch.clone();
                    ScriptQueue::new(move |io| {
                        for number in 0..if batch.swap(false, Ordering::SeqCst) { 8 } else { 0 } {
                            let mut slot = io.take_read().expect("eight readers, eight reads");
                            slot.copy_from(&packet(number, 60)).expect("it fits");
                            io.complete_read(slot, 60);
                        }
                        Ok(Progress::Idle)
                    })
                })
                .start()
            };
            let front = AsyncRing::new(ring(&interface, way, &poller)).expect("reads are posted");
            let mut reads: Vec<_> =
                (0..8).map(|_| (front.read(), Arc::new(Wakes::default()))).collect();
            for (read, wakes) in &mut reads {
                assert!(poll(read, wakes).is_pending());
            }
            batch.store(true, Ordering::SeqCst);
            bell.lock().expect("no panic").as_ref().expect("a queue was made").wake();
            eventually("every reader is woken", || {
                reads.iter().all(|(_, wakes)| wakes.count() > 0)
            });
            let mut numbers = Vec::new();
            for (read, wakes) in &mut reads {
                match poll(read, wakes) {
                    Poll::Ready(packet) => numbers.push(number_of(&packet.expect("it is open"))),
                    Poll::Pending => panic!("woken, and its packet is not there"),
                }
            }
            assert_eq!(numbers, (0..8).collect::<Vec<_>>(), "{way:?}");
        }
    });
}

/// The SQ has one entry, a posted read occupies it, and the poller takes it only later. No
/// completion will say when it has.
#[test]
fn a_full_submission_queue_delays_a_write_and_no_more() {
    /// Whether the device was called, and whether the call may return.
    #[derive(Default)]
    struct Gate {
        entered: AtomicBool,
        open: AtomicBool,
    }
    guarded(|| {
        for executor in Executor::ALL {
            for way in POLLERS {
                stage(format!("{executor:?}, {way:?}"));
                let poller = Poller::start().expect("a poller");
                let gate = Arc::new(Gate::default());
                let interface = {
                    let gate = gate.clone();
                    Script::new(move |_, _| {
                        let gate = gate.clone();
                        ScriptQueue::new(move |io| {
                            gate.entered.store(true, Ordering::SeqCst);
                            while !gate.open.load(Ordering::SeqCst) {
                                thread::sleep(Duration::from_millis(1));
                            }
                            take_writes(io);
                            Ok(Progress::Idle)
                        })
                    })
                    .start()
                };
                let ring = interface.ring(Direction::Both).sq_depth(1).drive(way.drive(&poller));
                let front = AsyncRing::new(ring.build().expect("a ring")).expect("posted");
                eventually("the poller is with the device", || gate.entered.load(Ordering::SeqCst));
                // This fills the SQ.
                let mut read = front.read();
                assert!(poll(&mut read, &Arc::default()).is_pending());
                let mut write = front.write(&[2; 60]);
                assert!(poll(&mut write, &Arc::default()).is_pending());
                stage(format!("{executor:?}, {way:?}: the write waits for the poller"));
                let opener = thread::spawn(move || {
                    thread::sleep(Duration::from_millis(20));
                    gate.open.store(true, Ordering::SeqCst);
                });
                executor.run(vec![task(async move { write.await.expect("it is taken") })]);
                opener.join().expect("it ends");
                assert_eq!(front.control().stats().tx_packets, 1);
            }
        }
    });
}

/// Nothing would drive an inline ring when a write must be retried.
#[test]
fn an_async_front_end_refuses_a_ring_that_no_poller_drives() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        let interface = loopback();
        let refused = AsyncRing::new(ring(&interface, Way::Inline, &poller));
        let Err(Error::Config(why)) = refused else { panic!("{refused:?}") };
        assert!(why.to_string().contains("Drive::Inline"), "{why}");
    });
}

/// If the device never takes a packet, the write ends when its retry budget ends, although no other
/// event wakes the ring.
#[test]
fn a_stalled_write_ends_when_its_budget_does() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            stage(format!("{way:?}"));
            let wall = Script::new(|_, _| ScriptQueue::new(|_| Ok(Progress::Idle))).start();
            let front = AsyncRing::new(ring(&wall, way, &poller)).expect("reads are posted");
            let stalled = block_on(front.write(&packet(1, 60)));
            let expected = EntryError::Device(Status::BufferExhausted);
            assert!(matches!(stalled, Err(Error::Entry(e)) if e == expected), "{stalled:?}");
        }
    });
}

/// The futures hold the ring. When the last one is dropped, the ring closes and its frames return
/// to their pool.
#[test]
fn futures_outlive_their_front_end() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Both).build().expect("a ring");
        let pool = ring.pools()[0].clone();
        let front = AsyncRing::new(ring).expect("reads are posted");
        let other = front.clone();
        let (mut read, control) = (front.read(), front.control());
        assert!(poll(&mut read, &Arc::default()).is_pending());
        drop(front);
        block_on(write(&other, &packet(3, 60)));
        drop(other);
        assert_eq!(control.closed(), None, "the read keeps it open");
        assert_eq!(number_of(&block_on(&mut read).expect("an open ring")), 3);
        drop(read);
        assert_eq!(control.closed(), Some(CloseReason::Stopped));
        assert_eq!(pool.slots_out(), 0);
    });
}

/// An executor may poll a task in its waker, that is, inside the code that wakes it.
#[test]
fn a_waker_may_poll_at_once() {
    /// A task that is polled by its waker.
    struct Eager {
        task: Mutex<Option<Task>>,
        again: AtomicBool,
    }
    impl Wake for Eager {
        fn wake(self: Arc<Self>) {
            self.again.store(true, Ordering::SeqCst);
            // If the lock is taken, another call is polling the task, and it looks at `again`
            // afterwards.
            while let Ok(mut task) = self.task.try_lock()
                && self.again.swap(false, Ordering::SeqCst)
            {
                let waker = Waker::from(self.clone());
                if let Some(running) = &mut *task
                    && running.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
                {
                    *task = None;
                }
            }
        }
    }
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            let interface = loopback();
            let front = AsyncRing::new(ring(&interface, way, &poller)).expect("reads are posted");
            let n = scaled(200);
            let tally = Tally::new(n);
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    let (front, tally) = (front.clone(), tally.clone());
                    let task = task(async move {
                        while let Ok(packet) = front.read().await {
                            tally.saw(&packet);
                        }
                    });
                    Arc::new(Eager { task: Mutex::new(Some(task)), again: AtomicBool::new(false) })
                })
                .collect();
            readers.iter().cloned().for_each(Wake::wake);
            for number in 0..n {
                stage(format!("{way:?}: packet {number}"));
                block_on(write(&front, &packet(number, 60)));
            }
            eventually("every packet is read", || {
                readers.iter().cloned().for_each(Wake::wake);
                tally.missing().is_empty()
            });
            front.control().stop();
            eventually("every reader ends", || {
                readers.iter().cloned().for_each(Wake::wake);
                readers.iter().all(|reader| reader.task.lock().expect("no panic").is_none())
            });
        }
    });
}

/// Counts its wake-ups.
#[derive(Default)]
struct Wakes(AtomicU64);

impl Wakes {
    fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll<F: Future + Unpin>(future: &mut F, wakes: &Arc<Wakes>) -> Poll<F::Output> {
    let waker = Waker::from(wakes.clone());
    Pin::new(future).poll(&mut Context::from_waker(&waker))
}

/// Drops its future if that is still pending after `polls` polls and is polled once more.
struct GivesUp<F> {
    future: Option<F>,
    polls: u32,
}

impl<F> GivesUp<F> {
    fn new(future: F, polls: u32) -> Self {
        Self { future: Some(future), polls }
    }
}

impl<F: Future + Unpin> Future for GivesUp<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            self.future = None;
        }
        let Some(future) = &mut self.future else { return Poll::Ready(None) };
        if let Poll::Ready(output) = Pin::new(future).poll(cx) {
            return Poll::Ready(Some(output));
        }
        if self.polls < u32::MAX {
            self.polls -= 1;
            // Ask for the next poll at once, so that giving up does not depend on an event.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

/// Yields to the other tasks once.
#[derive(Default)]
struct Pause(bool);

impl Future for Pause {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        thread::yield_now();
        Poll::Pending
    }
}
