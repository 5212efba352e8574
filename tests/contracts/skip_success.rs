//! Writes whose success has no completion.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use vmring::device::{PollContext, PostedSlot, Progress};
use vmring::{
    Direction, Drive, EntryError, Error, Frame, Interface, RetryPolicy, Ring, RingOp, Status,
    SubmitErrorKind,
};

use super::{Gate, PATIENT, credits, pool};
use crate::notify::readable;
use crate::support::{
    LONG, Script, ScriptQueue, Way, drive_to_rest, eventually, every_way, filled, guarded,
    guarded_for, loopback, number_of, packet_between, post, quiet_network, reap, reap_n, scaled,
    send, stage, take_writes, unique,
};

/// Submits packet `number`, whose success is not wanted.
fn send_and_forget(ring: &mut Ring, number: u64) {
    let frame = filled(ring, number);
    ring.submit_write_skip_success(frame, number).expect("there are credits");
}

/// Nothing is left: no entry, no completion, no frame.
fn assert_at_rest(ring: &mut Ring) {
    assert_eq!((ring.in_flight(), ring.ready_now()), (0, 0));
    assert_eq!(ring.pools()[0].slots_out(), 0);
}

trait ReadyNow {
    fn ready_now(&mut self) -> usize;
}

impl ReadyNow for Ring {
    fn ready_now(&mut self) -> usize {
        self.reap().len()
    }
}

/// A device that completes each write at once.
fn null() -> Interface {
    let queue = |_, _| {
        ScriptQueue::new(|cx| {
            take_writes(cx);
            Ok(Progress::Idle)
        })
    };
    Script::new(queue).start()
}

#[test]
fn a_success_that_is_skipped_has_no_completion_and_gives_its_frame_and_credit_back() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = loopback();
            let mut ring =
                interface.ring(Direction::Both).depth(8).drive(way.drive(poller)).build().unwrap();
            let frames = ring.pools()[0].layout().slots;
            for round in 0..20_u64 {
                (0..4).for_each(|i| post(&mut ring, 100 + i));
                let batch: Vec<_> = (0..2).map(|i| (filled(&ring, 4 * round + i), i)).collect();
                assert_eq!(ring.submit_writes_skip_success(batch).unwrap(), 2);
                {
                    let frame = filled(&ring, 4 * round + 2);
                    let (mut sq, _) = ring.split();
                    sq.submit_write_skip_success(frame, 2).unwrap();
                    let frame = sq.alloc().map(|mut frame| {
                        frame.copy_from(&crate::support::packet(4 * round + 3, 60)).unwrap();
                        frame
                    });
                    assert_eq!(
                        sq.submit_writes_skip_success(frame.map(|frame| (frame, 3))).unwrap(),
                        1
                    );
                }
                let done = reap_n(&mut ring, 4);
                for (i, done) in done.into_iter().enumerate() {
                    assert_eq!((done.op, done.result), (RingOp::Read, Ok(60)));
                    let number = number_of(&done.frame.unwrap());
                    assert_eq!(number, 4 * round + i as u64, "they arrive in order");
                }
                // The packet may arrive before its write has ended.
                assert_eq!(ring.wait(1, Some(LONG)), 0, "a success is completed");
                assert_at_rest(&mut ring);
                assert_eq!(credits(&mut ring), (8, 8));
            }
            let stats = ring.stats();
            assert_eq!((stats.tx_packets, stats.tx_bytes), (80, 80 * 60), "counted as any other");
            assert_eq!(stats.rx_packets, 80);
            assert_eq!(ring.pools()[0].layout().slots, frames);
            ring.close().unwrap();
        });
    });
}

/// How a write can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Refused,
    Dropped,
    Exhausted,
    Cancelled,
    CancelledByRestart,
    Closed,
    DeviceFailed,
    DevicePanicked,
}

/// Goal: whatever ends a write without success, the caller hears of it and gets the frame. Method:
/// the device completes the first write, and does to the second what the case says.
#[test]
fn a_failure_completes_although_success_is_skipped() {
    use Failure::*;
    let cases = [
        Refused,
        Dropped,
        Exhausted,
        Cancelled,
        CancelledByRestart,
        Closed,
        DeviceFailed,
        DevicePanicked,
    ];
    guarded(move || {
        every_way(|way, poller| {
            for failure in cases {
                stage(format!("{way:?}, {failure:?}"));
                a_failure_completes(failure, way.drive(poller));
            }
        });
    });
}

fn a_failure_completes(failure: Failure, drive: Drive<'_>) {
    let interface = Script::new(move |_, _| {
        ScriptQueue::new(move |cx| {
            while let Some(slot) = cx.take_write() {
                if slot.user_data() == 1 {
                    cx.complete_write(slot);
                    continue;
                }
                match failure {
                    Failure::Refused => cx.fail(slot, Status::NotAuthorized),
                    Failure::Dropped => drop(slot),
                    Failure::DeviceFailed => {
                        cx.put_back(slot);
                        return Err(Status::Failure);
                    }
                    Failure::DevicePanicked => panic!("as it was told to"),
                    // It takes nothing more.
                    _ => {
                        cx.put_back(slot);
                        break;
                    }
                }
            }
            Ok(Progress::Idle)
        })
    })
    .start();
    let few = RetryPolicy { attempts: 2, delay: Duration::from_micros(20) };
    let retry = if failure == Failure::Exhausted { few } else { PATIENT };
    let mut ring =
        interface.ring(Direction::Write).depth(4).retry(retry).drive(drive).build().unwrap();
    send_and_forget(&mut ring, 1);
    assert_eq!(ring.wait(1, Some(LONG)), 0);
    send_and_forget(&mut ring, 2);
    match failure {
        Failure::Cancelled => ring.cancel_and_wait(LONG).map(drop).unwrap(),
        Failure::CancelledByRestart => {
            // An inline ring takes part when it is driven below.
            let _ = interface.restart(Duration::ZERO);
        }
        Failure::Closed => ring.close().unwrap(),
        _ => {}
    }
    let done = reap_n(&mut ring, 1).pop().unwrap();
    let expected = match failure {
        Failure::Refused => EntryError::Device(Status::NotAuthorized),
        Failure::Dropped => EntryError::Abandoned,
        Failure::Exhausted => EntryError::Device(Status::BufferExhausted),
        Failure::Cancelled | Failure::CancelledByRestart | Failure::Closed => EntryError::Cancelled,
        Failure::DeviceFailed => EntryError::Device(Status::Failure),
        Failure::DevicePanicked => EntryError::DevicePanicked,
    };
    assert_eq!(done.brief(), (RingOp::Write, 2, Err(expected)));
    assert_eq!(number_of(&done.frame.unwrap()), 2, "with its frame");
    assert_at_rest(&mut ring);
    let stats = ring.stats();
    assert_eq!(stats.tx_packets, 1);
    let failed = stats.errors + stats.abandoned + stats.exhausted + stats.cancelled;
    assert_eq!(failed, 1, "{stats:?}");
}

/// A cancel finds such a write by its number as any other, and counts it.
#[test]
fn a_cancel_finds_writes_that_skip_success() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = Gate::default().start();
            let mut ring = interface
                .ring(Direction::Write)
                .depth(4)
                .retry(PATIENT)
                .drive(way.drive(poller))
                .build()
                .unwrap();
            send_and_forget(&mut ring, 7);
            send_and_forget(&mut ring, 8);
            send(&mut ring, 7);
            ring.cancel(7, 99).unwrap();
            let done: Vec<_> = reap_n(&mut ring, 3).iter().map(|done| done.brief()).collect();
            let cancelled = (RingOp::Write, 7, Err(EntryError::Cancelled));
            assert_eq!(done.iter().filter(|done| **done == cancelled).count(), 2, "{done:?}");
            assert!(done.contains(&(RingOp::Cancel, 99, Ok(2))), "{done:?}");
            assert_eq!(ring.in_flight(), 1);
        });
    });
}

/// Nothing comes that could be counted, and yet nobody sleeps for ever.
#[test]
fn what_waits_for_the_end_does_not_wait_for_completions_that_are_skipped() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start();
            let builder = interface.ring(Direction::Write).depth(8).retry(PATIENT);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            for round in 0..30 {
                stage(format!("{way:?}, round {round}"));
                gate.take(0);
                (0..4).for_each(|number| send_and_forget(&mut ring, number));
                send(&mut ring, 4);
                (5..8).for_each(|number| send_and_forget(&mut ring, number));
                assert_eq!((ring.in_flight(), credits(&mut ring)), (8, (0, 0)));
                let opener = thread::spawn({
                    let gate = gate.clone();
                    move || {
                        thread::sleep(Duration::from_micros(300 * (round % 4)));
                        gate.take(3);
                    }
                });
                let waiting = match round % 3 {
                    0 => ring.wait(8, Some(LONG)),
                    1 => {
                        let waiting = ring.drain(LONG).unwrap();
                        ring.resume();
                        waiting
                    }
                    _ => {
                        let start = Instant::now();
                        while ring.wait(usize::MAX, Some(Duration::from_secs(1))) < 1 {
                            assert!(start.elapsed() < LONG, "it never ends");
                        }
                        ring.cancel_and_wait(LONG).unwrap()
                    }
                };
                assert_eq!((waiting, ring.in_flight()), (1, 1));
                assert_eq!(credits(&mut ring), (0, 7), "one is to be reaped");
                assert_eq!(reap_n(&mut ring, 1)[0].brief(), (RingOp::Write, 4, Ok(60)));
                assert_eq!(credits(&mut ring), (0, 8));
                assert_at_rest(&mut ring);
                opener.join().unwrap();
            }
            // The ring closes with such writes in flight, and with one that has ended.
            gate.take(0);
            (0..8).for_each(|number| send_and_forget(&mut ring, number));
            ring.close().unwrap();
            let done = reap_n(&mut ring, 8);
            assert!(done.iter().all(|done| done.result == Err(EntryError::Cancelled)));
            drop(done);
            assert_at_rest(&mut ring);
        });
    });
}

/// A success that is skipped is no completion: it does not end a wait for one, if no submit was
/// refused.
#[test]
fn a_wait_for_a_packet_is_not_ended_by_skipped_successes() {
    guarded(|| {
        every_way(|way, poller| {
            let gate = Gate::default();
            let interface = gate.start();
            let builder = interface.ring(Direction::Both).depth(8).retry(PATIENT);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 50);
            gate.take(1);
            (0..8).for_each(|number| send_and_forget(&mut ring, number));
            let short = Duration::from_millis(20);
            let start = Instant::now();
            assert_eq!(ring.wait(1, Some(short)), 0);
            assert!(start.elapsed() >= short, "it ended early");
            eventually("the writes end", || {
                drive_to_rest(&mut ring);
                ring.in_flight() == 1
            });
            let before = ring.stats().notifications;
            assert!(ring.arm());
            (0..8).for_each(|number| send_and_forget(&mut ring, number));
            if way != Way::Inline {
                let sent = || ring.stats().tx_packets == 16;
                eventually("the writes end", sent);
                assert_eq!(ring.stats().notifications, before, "nobody is woken for them");
            }
        });
    });
}

struct Task(mpsc::Sender<()>);

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
    }
}

/// What a submitter may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    Credit,
    Frame,
    Space,
}

/// How it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sleep {
    Wait,
    Descriptor,
    Waker,
}

/// Goal: a submitter that was refused sleeps until it can submit again, although a read is in flight
/// that nobody answers. Method: the device takes nothing until the submitter sleeps.
#[test]
fn a_submitter_that_was_refused_sleeps_until_it_can_submit_again() {
    guarded(|| {
        every_way(|way, poller| {
            // An engine on a thread makes space at any time.
            let space = (way == Way::Inline).then_some(Lack::Space);
            for lack in [Lack::Credit, Lack::Frame].into_iter().chain(space) {
                for sleep in [Sleep::Wait, Sleep::Descriptor, Sleep::Waker] {
                    for batch in [false, true] {
                        stage(format!("{way:?}, {lack:?}, {sleep:?}, batch: {batch}"));
                        a_refused_submitter_sleeps(way.drive(poller), lack, sleep, batch);
                    }
                }
            }
        });
    });
}

fn a_refused_submitter_sleeps(drive: Drive<'_>, lack: Lack, sleep: Sleep, batch: bool) {
    let inline = matches!(drive, Drive::Inline);
    let gate = Gate::default();
    let interface = gate.start();
    let few = pool(4);
    let builder = interface.ring(Direction::Both).retry(PATIENT).depth(16).drive(drive);
    let mut ring = match lack {
        Lack::Credit => builder.write_depth(2).frames(8).build().unwrap(),
        Lack::Frame => builder.pool(&few).build().unwrap(),
        Lack::Space => builder.sq_depth(2).build().unwrap(),
    };
    post(&mut ring, 50);
    drive_to_rest(&mut ring);
    // Submits until it is refused. Returns how many were accepted.
    let fill = |ring: &mut Ring| {
        let mut accepted = 0;
        loop {
            let Some(mut frame) = ring.alloc() else {
                assert_eq!(lack, Lack::Frame);
                return accepted;
            };
            frame.copy_from(&crate::support::packet(1, 60)).unwrap();
            let answer = if batch {
                Ok(ring.submit_writes_skip_success([(frame, 1)]).unwrap())
            } else {
                ring.submit_write_skip_success(frame, 1).map(|()| 1).map_err(|error| error.kind)
            };
            match answer {
                Ok(1) => accepted += 1,
                Ok(_) => return accepted,
                Err(SubmitErrorKind::NoCredit) if lack == Lack::Credit => return accepted,
                Err(SubmitErrorKind::SqFull) if lack == Lack::Space => return accepted,
                Err(error) => panic!("{error}"),
            }
        }
    };
    let (sender, woken) = mpsc::channel();
    let waker = Waker::from(Arc::new(Task(sender)));
    for round in 0..3 {
        gate.take(0);
        assert!(fill(&mut ring) > 0, "round {round}: nothing was accepted");
        let opener = thread::spawn({
            let gate = gate.clone();
            move || {
                thread::sleep(Duration::from_millis(2));
                gate.take(1);
            }
        });
        let start = Instant::now();
        match sleep {
            Sleep::Wait => assert_eq!(ring.wait(1, Some(LONG)), 0),
            Sleep::Descriptor => {
                ring.completion_fd().unwrap();
                while ring.arm() {
                    let readable = readable(&ring, inline_nap(&ring, inline));
                    assert!(start.elapsed() < LONG, "no signal comes");
                    if readable && !inline {
                        break;
                    }
                }
            }
            Sleep::Waker => {
                let cx = &mut Context::from_waker(&waker);
                while ring.poll_ready(cx, 1).is_pending() {
                    let answer = woken.recv_timeout(inline_nap(&ring, inline));
                    assert!(start.elapsed() < LONG, "nobody wakes it");
                    if answer.is_ok() && !inline {
                        break;
                    }
                }
            }
        }
        assert!(start.elapsed() < LONG, "it slept until the end");
        opener.join().unwrap();
        assert!(fill(&mut ring) > 0, "nothing can be submitted after it");
        gate.take(usize::MAX);
        eventually("the writes end", || {
            let _ = ring.wait(1, Some(Duration::from_millis(1)));
            ring.in_flight() == 1
        });
    }
    assert_eq!(ring.in_flight(), 1, "the read");
    ring.close().unwrap();
    let done: Vec<_> = reap(&mut ring).iter().map(|done| done.brief()).collect();
    assert_eq!(done, [(RingOp::Read, 50, Err(EntryError::Cancelled))]);
}

/// The owner of an inline ring must not sleep longer than its next deadline.
fn inline_nap(ring: &Ring, inline: bool) -> Duration {
    match ring.next_deadline() {
        Some(at) if inline => {
            at.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
        }
        _ => LONG,
    }
}

/// The halves are on two threads. The submitter is refused while the reaper sleeps, which then tells it.
#[test]
fn a_refusal_on_another_thread_ends_a_wait_when_a_success_is_skipped() {
    guarded(|| {
        every_way(|way, poller| {
            let interface = null();
            let builder = interface.ring(Direction::Both).write_depth(2).read_depth(1);
            let mut ring = builder.drive(way.drive(poller)).build().unwrap();
            post(&mut ring, 50);
            let (mut sq, mut cq) = ring.into_split();
            let over = Arc::new(AtomicBool::new(false));
            let (tell, told) = mpsc::sync_channel::<()>(1);
            let reaper = thread::spawn({
                let over = over.clone();
                move || {
                    while !over.load(Ordering::Acquire) {
                        assert_eq!(cq.wait(1, Some(LONG)), 0);
                        let _ = tell.try_send(());
                    }
                    cq
                }
            });
            let packets = scaled(2_000);
            let mut refusals = 0;
            for n in 0..packets {
                stage(format!("{way:?}: packet {n}, {refusals} refusals"));
                let mut frame = loop {
                    match sq.alloc() {
                        Some(frame) => break frame,
                        None => told.recv_timeout(LONG).expect("the reaper tells of a free frame"),
                    }
                };
                frame.copy_from(&crate::support::packet(n, 60)).unwrap();
                while let Err(refused) = sq.submit_write_skip_success(frame, n) {
                    assert_eq!(refused.kind, SubmitErrorKind::NoCredit);
                    frame = refused.frame;
                    refusals += 1;
                    told.recv_timeout(LONG).expect("the reaper tells of a credit");
                }
            }
            over.store(true, Ordering::Release);
            sq.control().wake();
            let mut cq = reaper.join().unwrap();
            eventually("only the read is in flight", || {
                cq.wait(1, Some(Duration::from_millis(1)));
                cq.in_flight() == 1
            });
            assert_eq!(cq.stats().tx_packets, packets);
        });
    });
}

/// Method: a capture around a device that refuses some writes, and also one that holds each write for a
/// while on a thread of its own.
#[test]
fn wrappers_pass_on_that_success_is_skipped() {
    use vmring::device::fault::Faults;
    guarded(|| {
        every_way(|way, poller| {
            for held in [false, true] {
                let mut faults = Faults::seeded(7).errors(0.3, Status::NotAuthorized);
                if held {
                    faults = faults.engine(Duration::from_micros(200), true);
                }
                let tape = Tape::default();
                let capture = vmring::device::pcap::Capture::to_writer(tape).unwrap();
                let network = quiet_network(unique("skip"));
                let driver = capture.wrap("skip", faults.wrap(network));
                let interface = Interface::builder().device(driver).start().unwrap();
                let builder = interface.ring(Direction::Write).depth(16).retry(PATIENT);
                let mut ring = builder.drive(way.drive(poller)).build().unwrap();
                let (mut sent, mut failed) = (0, 0);
                let start = Instant::now();
                while sent < 400 || ring.in_flight() > 0 {
                    stage(format!("{way:?}, held: {held}, {sent} sent, {failed} failed"));
                    assert!(start.elapsed() < LONG, "it hangs");
                    if sent < 400
                        && let Some(mut frame) = ring.alloc()
                    {
                        frame.copy_from(&packet_between([2; 6], [0xff; 6], sent, 60)).unwrap();
                        match ring.submit_write_skip_success(frame, sent) {
                            Ok(()) => {
                                sent += 1;
                                continue;
                            }
                            Err(refused) => assert!(refused.is_backpressure(), "{refused}"),
                        }
                    }
                    ring.wait(1, Some(LONG));
                    for done in reap(&mut ring) {
                        let error = EntryError::Device(Status::NotAuthorized);
                        assert_eq!((done.op, done.result), (RingOp::Write, Err(error)));
                        assert_eq!(number_of(&done.frame.unwrap()), done.user_data);
                        failed += 1;
                    }
                }
                let stats = ring.stats();
                assert_eq!((stats.tx_packets, stats.errors), (400 - failed, failed));
                assert!(failed > 50, "{failed} of 400");
                assert_eq!(capture.packets(), 400 - failed, "what was sent is in the capture");
                assert_at_rest(&mut ring);
            }
        });
    });
}

/// A file in memory.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A queue that keeps its writes is restarted: some end in success, the others complete.
#[test]
fn a_restart_loses_no_write_that_skips_success() {
    guarded(|| {
        every_way(|way, poller| {
            let kept = Arc::new(Mutex::new(Vec::<PostedSlot>::new()));
            let give_back = |cx: &mut PollContext<'_>, kept: &Mutex<Vec<PostedSlot>>| {
                for slot in kept.lock().unwrap().drain(..) {
                    match slot.user_data() % 2 {
                        0 => cx.complete_write(slot),
                        _ => cx.cancel(slot),
                    }
                }
            };
            let interface = Script::new({
                let kept = kept.clone();
                move |_, _| {
                    let (polled, closed) = (kept.clone(), kept.clone());
                    ScriptQueue::new(move |cx| {
                        polled.lock().unwrap().extend(std::iter::from_fn(|| cx.take_write()));
                        Ok(Progress::Idle)
                    })
                    .on_close(move |cx| {
                        give_back(cx, &closed);
                        true
                    })
                }
            })
            .start();
            let mut ring =
                interface.ring(Direction::Write).depth(8).drive(way.drive(poller)).build().unwrap();
            for round in 0..20 {
                (0..8).for_each(|n| send_and_forget(&mut ring, n));
                eventually("the device keeps them", || {
                    let _ = ring.ready_now();
                    kept.lock().unwrap().len() == 8
                });
                match interface.restart(if way == Way::Inline { Duration::ZERO } else { LONG }) {
                    Err(Error::StopTimeout { .. }) if way == Way::Inline => {}
                    answer => answer.unwrap(),
                }
                let done: Vec<_> = reap_n(&mut ring, 4).iter().map(|done| done.brief()).collect();
                let cancelled = |n| (RingOp::Write, n, Err(EntryError::Cancelled));
                assert_eq!(done, [1, 3, 5, 7].map(cancelled), "round {round}");
                assert_at_rest(&mut ring);
                assert_eq!(credits(&mut ring), (0, 8));
            }
            assert_eq!(ring.stats().tx_packets, 80);
        });
    });
}

/// Goal: a ring of such writes only works for ever at full depth. Method: a million of them (fewer on
/// slow machines) over each device, and nothing but `wait` between them when the ring is full. The
/// indices wrap. The last packet arrives, or is counted.
#[test]
fn a_ring_of_skipped_successes_only_works_at_full_depth() {
    guarded_for(LONG * 10, || {
        every_way(|way, poller| {
            stage(format!("null, {way:?}"));
            a_million(&null(), way.drive(poller));

            stage(format!("embedded, {way:?}"));
            let network = quiet_network(unique("million"));
            let interface = Interface::builder().device(network).start().unwrap();
            a_million(&interface, way.drive(poller));

            stage(format!("loopback, {way:?}"));
            let interface = loopback();
            let reads = Arc::new(AtomicU64::new(0));
            let over = Arc::new(AtomicBool::new(false));
            let reading = interface.ring(Direction::Read).drive(Drive::Shared(poller));
            let mut reading = reading.build().unwrap();
            let frames: Vec<_> = std::iter::from_fn(|| reading.alloc()).collect();
            assert_eq!(reading.submit_reads(frames.into_iter().zip(0..)).unwrap(), 256);
            let reader = thread::spawn({
                let (reads, over) = (reads.clone(), over.clone());
                move || {
                    while !over.load(Ordering::Acquire) {
                        reading.wait(1, Some(Duration::from_millis(100)));
                        let (mut sq, mut cq) = reading.split();
                        for done in cq.reap() {
                            let Ok(frame) = done.take_packet() else { continue };
                            reads.fetch_add(1, Ordering::Relaxed);
                            sq.submit_read(frame, 0).unwrap();
                        }
                    }
                }
            });
            let sent = a_million(&interface, way.drive(poller));
            eventually("every packet arrives", || reads.load(Ordering::Relaxed) == sent);
            over.store(true, Ordering::Release);
            reader.join().unwrap();
        });
    });
}

/// Sends them, and returns how many.
fn a_million(interface: &Interface, drive: Drive<'_>) -> u64 {
    let n = scaled(1_000_000);
    let builder = interface.ring(Direction::Write).depth(256).retry(PATIENT);
    let mut ring = builder.drive(drive).start_index(u32::MAX - 300).build().unwrap();
    let packet = packet_between([2; 6], [0xff; 6], 1, 60);
    let mut sent = 0;
    let mut fullest = 0;
    let mut last = (0, Instant::now());
    while sent < n {
        let free = |ring: &Ring| -> Option<Frame> {
            let mut frame = ring.alloc()?;
            frame.copy_from(&packet).unwrap();
            Some(frame)
        };
        let batch: Vec<_> = std::iter::from_fn(|| free(&ring)).take((n - sent) as usize).collect();
        let mut batch = batch.into_iter().zip(sent..);
        sent += ring.submit_writes_skip_success(batch.by_ref()).unwrap() as u64;
        drop(batch);
        fullest = fullest.max(ring.in_flight());
        if last.0 < sent {
            last = (sent, Instant::now());
        }
        assert!(last.1.elapsed() < LONG, "it hangs after {sent} packets, {ring:?}");
        assert_eq!(ring.wait(256, Some(LONG)), 0, "a success is completed");
    }
    assert_eq!(ring.drain(LONG).unwrap(), 0);
    assert_eq!(fullest, 256, "the ring was never full");
    assert_eq!(ring.stats().tx_packets, n);
    assert_at_rest(&mut ring);
    ring.close().unwrap();
    n
}
