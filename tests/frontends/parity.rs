//! What the asynchronous front-end has in common with the blocking one: `alloc`, `write_frame`, and how
//! a close ends both.

use vmring::device::PostedSlot;
use vmring::{Drive, PoolBuilder, SubmitErrorKind};

use super::*;
use crate::support::inline;

fn is_wrong_direction<T>(result: &Result<T, Error>) -> bool {
    matches!(result, Err(Error::Submit(SubmitErrorKind::WrongDirection)))
}

/// Goal: frames go out and come back without a copy. Method: each packet is sent in the frame in which
/// the one before was received.
#[test]
fn frames_are_written_as_they_are() {
    guarded(|| {
        every_executor(|executor, front| {
            let task = task(async move {
                let mut frame = front.alloc().await.expect("a free frame");
                for number in 0..scaled(200) {
                    frame.copy_from(&packet(number, 60)).expect("it fits");
                    front.write_frame(frame).await.expect("it is taken");
                    frame = front.read().await.expect("an open ring");
                    assert_eq!(number_of(&frame), number, "{executor:?}");
                }
                assert_eq!(front.control().stats().tx_packets, scaled(200));
            });
            executor.run(vec![task]);
        });
    });
}

/// Goal: on a ring that only reads, every call that sends ends with the reason, in both front-ends.
/// Method: every frame is posted for reading, so a call that waits for one waits for ever.
#[test]
fn a_ring_that_only_reads_refuses_to_send() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in Way::ALL {
            stage(format!("{way:?}: blocking"));
            let interface = loopback();
            let build =
                || interface.ring(Direction::Read).depth(8).drive(way.drive(&poller)).build();
            let ring = build().expect("a ring");
            let pool = ring.pools()[0].clone();
            let mut front = BlockingRing::new(ring).expect("reads are posted");
            assert!(is_wrong_direction(&front.alloc()), "{way:?}");
            assert!(is_wrong_direction(&front.write(&packet(1, 60))), "{way:?}");
            drop(front);
            let ring = build().expect("a ring");
            let frame = ring.alloc().expect("a fresh ring has free frames");
            let mut front = BlockingRing::new(ring).expect("reads are posted");
            assert!(is_wrong_direction(&front.write_frame(frame)), "{way:?}");
            drop(front);
            eventually("every frame is home", || pool.slots_out() == 0);
            if way == Way::Inline {
                continue;
            }
            stage(format!("{way:?}: async"));
            let ring = build().expect("a ring");
            let frame = ring.alloc().expect("a fresh ring has free frames");
            let front = AsyncRing::new(ring).expect("reads are posted");
            assert!(is_wrong_direction(&block_on(front.alloc())), "{way:?}");
            assert!(is_wrong_direction(&block_on(front.write(&packet(1, 60)))), "{way:?}");
            assert!(is_wrong_direction(&block_on(front.write_frame(frame))), "{way:?}");
        }
    });
}

/// Goal: `alloc` ends with a typed error if nothing will bring a frame, and waits if a write will.
#[test]
fn an_alloc_waits_for_a_write_in_flight_and_for_nothing_else() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            stage(format!("{way:?}"));
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
            let front = AsyncRing::new(ring).expect("reads are posted");
            let mut held: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
            let refused = block_on(front.alloc());
            assert!(matches!(refused, Err(Error::OutOfFrames)), "{way:?}: {refused:?}");
            let mut frame = held.pop().expect("one of them");
            frame.copy_from(&packet(1, 60)).expect("it fits");
            let mut write = front.write_frame(frame);
            assert!(poll(&mut write, &Arc::default()).is_pending());
            let (mut alloc, wakes) = (front.alloc(), Arc::default());
            assert!(poll(&mut alloc, &wakes).is_pending(), "{way:?}: a write is in flight");
            taking.store(true, Ordering::SeqCst);
            bell.lock().expect("no panic").as_ref().expect("a queue was made").wake();
            eventually("the alloc is woken", || wakes.count() > 0);
            block_on(alloc).expect("the write's frame is free");
            block_on(write).expect("it was taken");
            front.control().stop();
            assert!(is_closed(&block_on(front.read())), "{way:?}: the reads are home");
            held.extend(std::iter::from_fn(|| pool.alloc()));
            assert!(is_closed(&block_on(front.alloc())), "{way:?}");
        }
    });
}

/// Goal: a frame that the ring refuses is refused with the reason, and returns to its pool.
#[test]
fn a_refused_frame_says_why_and_goes_home() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in POLLERS {
            stage(format!("{way:?}"));
            let interface = loopback();
            let ring = interface.ring(Direction::Both).depth(4).drive(way.drive(&poller));
            let front = AsyncRing::new(ring.build().expect("a ring")).expect("reads are posted");
            let stranger = PoolBuilder::new(2, 1600).build().expect("a pool");
            let frame = stranger.alloc().expect("a free frame");
            let refused = block_on(front.write_frame(frame));
            let expected = SubmitErrorKind::ForeignPool;
            assert!(matches!(refused, Err(Error::Submit(kind)) if kind == expected), "{refused:?}");
            let mut big = stranger.alloc().expect("it came back");
            big.set_len(1515).expect("it fits");
            let refused = block_on(front.write_frame(big));
            assert!(matches!(refused, Err(Error::Status(Status::PacketTooBig))), "{refused:?}");
            front.control().stop();
            let frame = stranger.alloc().expect("it came back");
            assert!(is_closed(&block_on(front.write_frame(frame))), "{way:?}");
            assert_eq!(stranger.slots_out(), 0);
        }
    });
}

/// Goal: a `write_frame` whose future is dropped half-way sends its packet once or not at all, and
/// loses no frame.
#[test]
fn a_dropped_write_of_a_frame_is_sent_at_most_once() {
    guarded(|| {
        every_executor(|executor, front| {
            let n = scaled(300);
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
                    let mut frame = front.alloc().await.expect("a free frame");
                    frame.copy_from(&packet(number, 60)).expect("it fits");
                    let _ = GivesUp::new(front.write_frame(frame), number as u32 % 3).await;
                    let _ = GivesUp::new(front.alloc(), number as u32 % 2).await;
                    write(&front, &packet(n + number, 60)).await;
                }
                write(&front, &packet(2 * n, 60)).await;
            });
            executor.run(vec![reader, writer]);
            let missing = tally.missing();
            assert!(missing.iter().all(|number| *number < n as usize), "{executor:?}: {missing:?}");
        });
    });
}

/// A device that keeps its reads. When it closes, it first gives one back cancelled, and only a later
/// call brings two packets.
fn brings_packets_late() -> (Interface, Arc<Mutex<Vec<PostedSlot>>>) {
    let keeper = Arc::new(Mutex::new(Vec::new()));
    let for_queue = keeper.clone();
    let interface = Script::new(move |_, _| {
        let kept = for_queue.clone();
        let closing = kept.clone();
        let mut asked = 0;
        ScriptQueue::new(move |io| {
            take_writes(io);
            kept.lock().expect("no panic").extend(std::iter::from_fn(|| io.take_read()));
            Ok(Progress::Idle)
        })
        .on_close(move |io| {
            asked += 1;
            let mut kept = closing.lock().expect("no panic");
            match asked {
                1 => kept.pop().into_iter().for_each(|slot| io.cancel(slot)),
                20 => {
                    for number in 0..2 {
                        let mut slot = kept.remove(0);
                        slot.copy_from(&packet(number, 60)).expect("it fits");
                        io.complete_read(slot, 60);
                    }
                    kept.drain(..).for_each(|slot| io.cancel(slot));
                }
                _ => {}
            }
            asked >= 20
        })
    })
    .start();
    (interface, keeper)
}

/// Goal: a reader hears of the close only when no packet can come any more. Method: the device brings
/// two packets late in its close, when another read was cancelled already.
#[test]
fn packets_that_come_during_the_close_are_read_first() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for way in Way::ALL {
            stage(format!("{way:?}: blocking"));
            let (interface, kept) = brings_packets_late();
            let mut front = BlockingRing::new(
                interface
                    .ring(Direction::Both)
                    .depth(4)
                    .drive(way.drive(&poller))
                    .build()
                    .expect("a ring"),
            )
            .expect("reads are posted");
            assert!(front.read_timeout(Duration::from_millis(20)).expect("it is open").is_none());
            eventually("the device keeps the reads", || {
                kept.lock().expect("no panic").len() == front.ring().in_flight()
            });
            front.ring().control().stop();
            for number in 0..2 {
                let packet = front.read().expect("a packet that came late");
                assert_eq!(number_of(&packet), number, "{way:?}");
            }
            assert!(is_closed(&front.read()), "{way:?}");
        }
        for way in POLLERS {
            stage(format!("{way:?}: async"));
            let (interface, kept) = brings_packets_late();
            let ring = interface.ring(Direction::Both).depth(4).drive(way.drive(&poller));
            let front = AsyncRing::new(ring.build().expect("a ring")).expect("reads are posted");
            let mut read = front.read();
            assert!(poll(&mut read, &Arc::default()).is_pending());
            eventually("the device keeps the reads", || kept.lock().expect("no panic").len() == 4);
            front.control().stop();
            assert_eq!(number_of(&block_on(read).expect("a packet that came late")), 0);
            assert_eq!(number_of(&block_on(front.read()).expect("another")), 1);
            assert!(is_closed(&block_on(front.read())), "{way:?}");
        }
    });
}

/// Goal: a close is awaited on the thread on which the other tasks run. They hear of it, what has come
/// is read first, and afterwards nothing waits for the device any more.
#[test]
fn a_close_is_awaited_beside_the_readers() {
    guarded(|| {
        every_executor(|executor, front| {
            let (reader, closer) = (front.clone(), front.clone());
            let read = Arc::new(AtomicU64::new(0));
            let seen = read.clone();
            let tasks = vec![
                task(async move {
                    while let Ok(packet) = reader.read().await {
                        assert_eq!(number_of(&packet), seen.fetch_add(1, Ordering::SeqCst));
                    }
                    assert!(is_closed(&reader.read().await), "{executor:?}");
                }),
                task(async move {
                    for number in 0..3 {
                        write(&closer, &packet(number, 60)).await;
                    }
                    // The loopback has delivered them, so the close must not take them back.
                    while closer.control().stats().rx_packets < 3 {
                        Pause::default().await;
                    }
                    closer.close().await.expect("a loopback lets go of everything");
                    assert!(is_closed(&closer.write(&packet(9, 60)).await), "{executor:?}");
                    closer.close().await.expect("closing twice is harmless");
                }),
            ];
            executor.run(tasks);
            assert_eq!(read.load(Ordering::SeqCst), 3, "{executor:?}");
            assert_eq!(front.control().closed(), Some(CloseReason::Stopped));
        });
    });
}

/// Goal: an awaited close says what was leaked, after the close timeout, and no task waits meanwhile:
/// the lock of the front-end is free. Method: the second device lets go in the end, and has time.
#[test]
fn an_awaited_close_says_what_was_leaked() {
    guarded(|| {
        let poller = Poller::start().expect("a poller");
        for (way, leaks) in POLLERS.into_iter().flat_map(|way| [(way, true), (way, false)]) {
            stage(format!("{way:?}, it leaks: {leaks}"));
            let kept = Arc::new(Mutex::new(Vec::new()));
            let lets_go = Arc::new(AtomicBool::new(false));
            let (keeper, may_let_go) = (kept.clone(), lets_go.clone());
            let interface = Script::new(move |_, _| {
                let (kept, closing, lets_go) = (keeper.clone(), keeper.clone(), may_let_go.clone());
                ScriptQueue::new(move |io| {
                    kept.lock().expect("no panic").extend(std::iter::from_fn(|| io.take_read()));
                    Ok(Progress::Idle)
                })
                .on_close(move |io| {
                    let lets_go = lets_go.load(Ordering::SeqCst);
                    if lets_go {
                        let mut kept = closing.lock().expect("no panic");
                        kept.drain(..).for_each(|slot| io.cancel(slot));
                    }
                    lets_go
                })
            })
            .start();
            let timeout = if leaks { Duration::from_millis(200) } else { LONG };
            let ring = interface.ring(Direction::Read).depth(4).close_timeout(timeout);
            let ring = ring.drive(way.drive(&poller)).build().expect("a ring");
            let front = AsyncRing::new(ring).expect("reads are posted");
            eventually("the device keeps the reads", || kept.lock().expect("no panic").len() == 4);
            let (mut close, wakes) = (front.close(), Arc::default());
            assert!(poll(&mut close, &wakes).is_pending());
            if leaks {
                let leaked = block_on(close);
                let expected = matches!(leaked, Err(Error::Leaked { slots: 4, .. }));
                assert!(expected, "{way:?}: {leaked:?}");
            } else {
                for _ in 0..20 {
                    // Each of these locks the front-end.
                    assert_eq!(front.control().stats().rx_packets, 0);
                    thread::sleep(Duration::from_millis(1));
                }
                assert_eq!(wakes.count(), 0, "{way:?}: the device has not let go");
                lets_go.store(true, Ordering::SeqCst);
                block_on(close).expect("it lets go");
            }
            assert!(is_closed(&block_on(front.read())), "{way:?}");
        }
    });
}

/// Goal: a close whose future is dropped goes on, and one that is never polled does nothing.
#[test]
fn a_dropped_close_goes_on() {
    guarded(|| {
        let interface = loopback();
        let ring = interface.ring(Direction::Both).drive(Drive::Thread).build().expect("a ring");
        let front = AsyncRing::new(ring).expect("reads are posted");
        drop(front.close());
        assert_eq!(front.control().closed(), None);
        let mut close = front.close();
        let _ = poll(&mut close, &Arc::default());
        drop(close);
        eventually("the ring is closed", || front.control().closed().is_some());
        assert!(is_closed(&block_on(front.read())));
        // The place of the ring is free again.
        eventually("another ring can be built", || {
            inline(&interface, Direction::Both).build().is_ok()
        });
    });
}
