//! The asynchronous front-end as a stream of packets and as a sink for them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use futures_util::stream::FusedStream;
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use vmring::{PacketSink, Packets, SubmitErrorKind};

use super::*;

/// Sends packets with the numbers of a range through a sink, and tries again what the loopback had no
/// space for.
async fn feed(front: &AsyncRing, numbers: std::ops::Range<u64>) {
    let mut sink = front.packet_sink();
    for number in numbers {
        sink.feed(packet(number, 60)).await.expect("it is taken");
        // The loopback holds 256 packets.
        if number % 50 == 0 {
            sink.flush().await.expect("they were taken");
        }
    }
    sink.close().await.expect("they were taken");
}

/// Goal: what a sink sends comes out of a stream, whole, once and in order, and the stream ends with
/// the close.
#[test]
fn a_stream_gives_what_a_sink_was_fed() {
    guarded(|| {
        every_executor(|executor, front| {
            let n = scaled(1000);
            let (reader, sender) = (front.clone(), front);
            let sent = Arc::new(AtomicU64::new(0));
            let (read, ahead) = (Arc::new(AtomicU64::new(0)), sent.clone());
            let seen = read.clone();
            let tasks = vec![
                task(async move {
                    let mut packets = reader.packets();
                    while let Some(packet) = packets.next().await {
                        let packet = packet.expect("a packet");
                        assert_eq!(number_of(&packet), seen.load(Ordering::SeqCst), "{executor:?}");
                        if seen.fetch_add(1, Ordering::SeqCst) + 1 == n {
                            reader.close().await.expect("it closes");
                        }
                    }
                    assert!(packets.is_terminated());
                    assert!(packets.next().await.is_none(), "{executor:?}: it stays ended");
                }),
                task(async move {
                    while ahead.load(Ordering::SeqCst) < n {
                        let first = ahead.load(Ordering::SeqCst);
                        // No more than the loopback holds beyond what was read.
                        while first >= read.load(Ordering::SeqCst) + 100 {
                            Pause::default().await;
                        }
                        let last = (first + 100).min(n);
                        feed(&sender, first..last).await;
                        ahead.store(last, Ordering::SeqCst);
                    }
                }),
            ];
            executor.run(tasks);
            assert_eq!(sent.load(Ordering::SeqCst), n, "{executor:?}");
        });
    });
}

/// Goal: frames go from a stream into a sink without a copy. Method: an echo, which sends each frame
/// that came, a number of times.
#[test]
fn frames_of_a_stream_go_into_a_sink() {
    guarded(|| {
        every_executor(|executor, front| {
            let task = task(async move {
                let (mut packets, mut sink) = (front.packets(), front.frame_sink());
                write(&front, &packet(7, 60)).await;
                for _ in 0..scaled(100) {
                    let frame = packets.next().await.expect("it is open").expect("a packet");
                    assert_eq!(number_of(&frame), 7, "{executor:?}");
                    sink.send(frame).await.expect("it is taken");
                }
                front.close().await.expect("it closes");
                // The last one has come, and is delivered before the end.
                let last = packets.next().await.expect("not lost").expect("a packet");
                assert_eq!(number_of(&last), 7, "{executor:?}");
                assert!(packets.next().await.is_none());
                let refused = sink.send(last).await;
                assert!(is_closed(&refused), "{executor:?}: {refused:?}");
            });
            executor.run(vec![task]);
        });
    });
}

/// A device that fails some of its reads, and then does what `then` says.
fn fails_a_read(then: fn() -> Result<Progress, Status>) -> Interface {
    Script::new(move |_, _| {
        let mut failed = false;
        ScriptQueue::new(move |io| {
            if !failed && let Some(slot) = io.take_read() {
                failed = true;
                io.fail(slot, Status::NotAuthorized);
                let mut slot = io.take_read().expect("more than one read is posted");
                slot.copy_from(&packet(1, 60)).expect("it fits");
                io.complete_read(slot, 60);
                return Ok(Progress::More);
            }
            take_writes(io);
            if failed { then() } else { Ok(Progress::Idle) }
        })
    })
    .start()
}

/// The next item, within one poll.
fn now<S: Stream + Unpin>(stream: &mut S) -> Poll<Option<S::Item>> {
    stream.poll_next_unpin(&mut Context::from_waker(Waker::noop()))
}

fn packets(interface: &Interface, direction: Direction) -> (AsyncRing, Packets) {
    let ring = interface.ring(direction).depth(4).build().expect("a ring");
    let front = AsyncRing::new(ring).expect("reads are posted");
    let packets = front.packets();
    (front, packets)
}

/// Goal: an error is an item once, and the stream goes on or ends as it says.
#[test]
fn an_error_is_an_item_once() {
    const REFUSED: EntryError = EntryError::Device(Status::NotAuthorized);
    guarded(|| {
        stage("a read that the device refused");
        let interface = fails_a_read(|| Ok(Progress::Idle));
        let (front, mut stream) = packets(&interface, Direction::Both);
        let mut seen = Vec::new();
        for _ in 0..2 {
            match block_on(stream.next()).expect("it is open") {
                Ok(packet) => seen.push(Ok(number_of(&packet))),
                Err(Error::Entry(error)) => seen.push(Err(error)),
                Err(error) => panic!("{error}"),
            }
        }
        seen.sort_by_key(|it| it.is_ok());
        assert_eq!(seen, [Err(REFUSED), Ok(1)]);
        assert!(now(&mut stream).is_pending(), "told once, not twice");
        block_on(front.close()).expect("it closes");
        assert!(block_on(stream.next()).is_none());

        stage("a device that fails for good");
        let interface = fails_a_read(|| Err(Status::SharingServiceBusy));
        let (_front, mut stream) = packets(&interface, Direction::Both);
        let mut items = Vec::new();
        while let Some(item) = block_on(stream.next()) {
            items.push(item);
        }
        let why = CloseReason::Failed(Status::SharingServiceBusy);
        let last = items.pop().expect("the reason");
        assert!(matches!(last, Err(Error::Closed(reason)) if reason == why), "{last:?}");
        assert_eq!(items.iter().filter(|item| item.is_ok()).count(), 1, "{items:?}");
        assert!(stream.is_terminated() && matches!(now(&mut stream), Poll::Ready(None)));

        stage("a ring that only writes");
        let interface = loopback();
        let (_front, mut stream) = packets(&interface, Direction::Write);
        let item = block_on(stream.next());
        let wrong = SubmitErrorKind::WrongDirection;
        assert!(matches!(item, Some(Err(Error::Submit(kind))) if kind == wrong), "{item:?}");
        assert!(block_on(stream.next()).is_none());
    });
}

/// Goal: a reader that holds every frame is told so, and the stream goes on when it drops some. If it
/// asks again without that, the stream ends: it would neither be woken nor have anything new to say.
#[test]
fn a_stream_without_frames_says_so_and_goes_on_or_ends() {
    guarded(|| {
        for drops in [true, false] {
            without_frames(drops);
        }
    });
}

fn without_frames(drops: bool) {
    let interface = loopback();
    let (front, mut stream) = packets(&interface, Direction::Both);
    let mut held = Vec::new();
    let mut sent = 0;
    loop {
        stage(format!("packet {sent}, {} are held", held.len()));
        block_on(front.write(&packet(sent, 60))).expect("holding packets stops no write");
        sent += 1;
        match block_on(stream.next()).expect("it is open") {
            Ok(packet) => held.push(packet),
            Err(Error::OutOfFrames) => break,
            Err(error) => panic!("{error}"),
        }
    }
    if drops {
        drop(held);
    } else {
        assert!(matches!(now(&mut stream), Poll::Ready(None)));
        assert!(stream.is_terminated());
        drop(held);
        stream = front.packets();
    }
    stage("they were given back");
    let last = block_on(stream.next()).expect("it is open").expect("a packet");
    assert_eq!(number_of(&last), sent - 1);
}

/// A device that takes writes only while it is told to.
struct Tap {
    interface: Interface,
    open: Arc<AtomicBool>,
    bell: Arc<Mutex<Option<vmring::device::Wake>>>,
}

impl Tap {
    fn new() -> Self {
        let (open, bell) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(None)));
        let (opened, wake_of) = (open.clone(), bell.clone());
        let interface = Script::new(move |_, wake| {
            *wake_of.lock().expect("no panic") = Some(wake);
            let (open, mut kept) = (opened.clone(), Vec::new());
            ScriptQueue::new(move |io| {
                kept.extend(std::iter::from_fn(|| io.take_write()));
                if open.load(Ordering::SeqCst) {
                    kept.drain(..).for_each(|write| io.complete_write(write));
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        Self { interface, open, bell }
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        self.bell.lock().expect("no panic").as_ref().expect("a queue was made").wake();
    }
}

fn poll_ready(sink: &mut PacketSink<Vec<u8>>, wakes: &Arc<Wakes>) -> Poll<Result<(), Error>> {
    let waker = Waker::from(wakes.clone());
    Pin::new(sink).poll_ready(&mut Context::from_waker(&waker))
}

/// Goal: a sink takes as many packets as the ring has credits and one more, and then sleeps until the
/// device takes some. A flush sleeps until all were taken.
#[test]
fn a_sink_waits_for_the_device() {
    guarded(|| {
        let tap = Tap::new();
        let ring = tap.interface.ring(Direction::Write).depth(4).build().expect("a ring");
        let pool = ring.pools()[0].clone();
        let front = AsyncRing::new(ring).expect("a front-end");
        let (mut sink, wakes) = (front.packet_sink(), Arc::default());
        let mut taken = 0;
        while poll_ready(&mut sink, &wakes).is_ready() {
            assert!(taken < 6, "without a bound");
            Pin::new(&mut sink).start_send(packet(taken, 60)).expect("it is open");
            taken += 1;
        }
        assert_eq!(taken, 5, "four credits, and one that the sink holds");
        assert_eq!(wakes.count(), 0, "nothing to wake for");
        tap.open();
        eventually("the sink is woken", || wakes.count() > 0);
        stage("the flush");
        block_on(sink.flush()).expect("they were taken");
        assert_eq!(front.control().stats().tx_packets, 5);
        drop((sink, front));
        assert_eq!(pool.slots_out(), 0);
    });
}

/// Goal: a sink that is dropped sends what the ring has and not what it holds itself, and loses no
/// frame.
#[test]
fn a_dropped_sink_loses_no_frame() {
    guarded(|| {
        let tap = Tap::new();
        let ring = tap.interface.ring(Direction::Write).depth(2).build().expect("a ring");
        let pool = ring.pools()[0].clone();
        let front = AsyncRing::new(ring).expect("a front-end");
        let mut sink = front.packet_sink();
        for number in 0..3 {
            block_on(sink.feed(packet(number, 60))).expect("it is open");
        }
        drop(sink);
        tap.open();
        let mut next = front.packet_sink();
        block_on(next.send(packet(9, 60))).expect("the others make space");
        assert_eq!(front.control().stats().tx_packets, 3);
        drop((next, front));
        assert_eq!(pool.slots_out(), 0);
    });
}

/// Goal: a refusal of the device is the answer of the sink that sent the packet, once, and of nobody
/// else. The sink goes on.
#[test]
fn a_sink_reports_each_refusal_once() {
    guarded(|| {
        let refuses = Arc::new(AtomicBool::new(true));
        let refusing = refuses.clone();
        let interface = Script::new(move |_, _| {
            let refuses = refusing.clone();
            ScriptQueue::new(move |io| {
                while let Some(slot) = io.take_write() {
                    match refuses.load(Ordering::SeqCst) {
                        true => io.fail(slot, Status::NotAuthorized),
                        false => io.complete_write(slot),
                    }
                }
                Ok(Progress::Idle)
            })
        })
        .start();
        let ring = interface.ring(Direction::Write).depth(4).build().expect("a ring");
        let front = AsyncRing::new(ring).expect("a front-end");
        let (mut one, mut other) = (front.packet_sink(), front.packet_sink());
        let refused = block_on(one.send(packet(1, 60)));
        let expected = EntryError::Device(Status::NotAuthorized);
        assert!(matches!(refused, Err(Error::Entry(e)) if e == expected), "{refused:?}");
        refuses.store(false, Ordering::SeqCst);
        block_on(one.flush()).expect("told once, not twice");
        block_on(other.send(packet(2, 60))).expect("it is not its packet");
        block_on(one.send(packet(3, 60))).expect("the sink goes on");
        let too_big = block_on(one.send(packet(4, 1515)));
        assert!(matches!(too_big, Err(Error::Status(Status::PacketTooBig))), "{too_big:?}");
        block_on(one.send(packet(5, 60))).expect("the sink goes on");
        assert_eq!(front.control().stats().tx_packets, 3);
    });
}

/// Goal: a sink without a frame says so instead of waiting for what nobody brings, and a closed ring
/// ends a sink that waits.
#[test]
fn a_sink_that_nothing_can_serve_says_so() {
    guarded(|| {
        let tap = Tap::new();
        let ring = tap.interface.ring(Direction::Write).depth(2).build().expect("a ring");
        let pool = ring.pools()[0].clone();
        let front = AsyncRing::new(ring).expect("a front-end");
        let held: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
        let mut sink = front.packet_sink();
        let refused = block_on(sink.send(packet(1, 60)));
        assert!(matches!(refused, Err(Error::OutOfFrames)), "{refused:?}");
        drop(held);
        let read_only = tap.interface.ring(Direction::Read).depth(2).build().expect("a ring");
        let read_only = AsyncRing::new(read_only).expect("reads are posted");
        let wrong = block_on(read_only.packet_sink().send(packet(1, 60)));
        let direction = SubmitErrorKind::WrongDirection;
        assert!(matches!(wrong, Err(Error::Submit(kind)) if kind == direction), "{wrong:?}");
        // Two packets are in flight, and one waits.
        for number in 0..3 {
            block_on(sink.feed(packet(number, 60))).expect("it is open");
        }
        let wakes = Arc::default();
        assert!(poll_ready(&mut sink, &wakes).is_pending());
        front.control().stop();
        eventually("the sink hears of the close", || wakes.count() > 0);
        stage("the sink's answer");
        assert!(is_closed(&block_on(sink.flush())));
        assert!(is_closed(&block_on(sink.send(packet(4, 60)))));
    });
}

/// Goal: futures on a stream and on a sink that are dropped all the time lose no packet and send none
/// twice. Two tasks share the ring.
#[test]
fn streams_and_sinks_that_are_given_up_lose_no_packet() {
    guarded(|| {
        every_executor(|executor, front| {
            let n = scaled(400);
            let tally = Tally::new(n);
            let mut tasks = Vec::new();
            for _ in 0..2 {
                let (front, tally) = (front.clone(), tally.clone());
                tasks.push(task(async move {
                    let mut packets = front.packets();
                    for polls in (0..4).cycle() {
                        match GivesUp::new(packets.next(), polls).await {
                            Some(Some(packet)) => {
                                if tally.saw(&packet.expect("a packet")) == 0 {
                                    front.control().stop();
                                }
                            }
                            Some(None) => return,
                            None => Pause::default().await,
                        }
                    }
                }));
            }
            for writer in 0..2 {
                let front = front.clone();
                tasks.push(task(async move {
                    let mut sink = front.packet_sink();
                    for number in (writer..n).step_by(2) {
                        // Given up before the packet is handed over, or not.
                        let _ = GivesUp::new(sink.flush(), number as u32 % 3).await;
                        sink.feed(packet(number, 60)).await.expect("it is taken");
                        if number % 16 < 2 {
                            sink.flush().await.expect("they were taken");
                        }
                    }
                    sink.flush().await.expect("they were taken");
                }));
            }
            executor.run(tasks);
            assert_eq!(tally.missing(), [0; 0], "{executor:?}");
        });
    });
}

/// Goal: a waker that panics keeps neither a stream nor a sink asleep. Method: both sleep beside tasks
/// whose wakers panic.
#[test]
fn wakers_that_panic_keep_no_stream_and_no_sink_asleep() {
    struct Panics(AtomicU64);
    impl Wake for Panics {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
            panic!("this waker panics, as it was told to");
        }
    }
    guarded(|| {
        let tap = Tap::new();
        let ring = tap.interface.ring(Direction::Both).depth(2).build().expect("a ring");
        let front = AsyncRing::new(ring).expect("reads are posted");
        let panics = Waker::from(Arc::new(Panics(AtomicU64::new(0))));
        let mut bad: Vec<_> = (0..2).map(|_| front.packets()).collect();
        assert!(bad[0].poll_next_unpin(&mut Context::from_waker(&panics)).is_pending());
        let (mut sink, wakes) = (front.packet_sink(), Arc::default());
        while poll_ready(&mut sink, &wakes).is_ready() {
            Pin::new(&mut sink).start_send(packet(1, 60)).expect("it is open");
        }
        let (mut stream, heard) = (front.packets(), Arc::<Wakes>::default());
        let waker = Waker::from(heard.clone());
        assert!(stream.poll_next_unpin(&mut Context::from_waker(&waker)).is_pending());
        assert!(bad[1].poll_next_unpin(&mut Context::from_waker(&panics)).is_pending());
        tap.open();
        eventually("the sink is woken", || wakes.count() > 0);
        let flush = catch_unwind(AssertUnwindSafe(|| block_on(sink.flush())));
        flush.expect("its own panics only").expect("they were taken");
        front.control().stop();
        eventually("the stream is woken", || heard.count() > 0);
        assert!(block_on(stream.next()).is_none());
    });
}
