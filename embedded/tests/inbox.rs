//! Tests of the inbox: random operations against a plain model, and several threads.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmring_embedded::inbox::{Collector, Delivery, Inbox, Refused};
use vmring_embedded::packet::PacketBuffer;

const MAX_FRAME: usize = 64;

#[derive(Debug)]
struct Buffer {
    number: u32,
    bytes: Vec<u8>,
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl PacketBuffer for Buffer {}

fn buffer(number: u32) -> Buffer {
    Buffer { number, bytes: vec![0xee; MAX_FRAME] }
}

fn open(depth: u32, overflow: u32, start: u32) -> (Arc<Inbox<Buffer>>, Collector<Buffer>) {
    let inbox = Arc::new(Inbox::starting_at(depth, overflow, MAX_FRAME, start));
    let collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
    (inbox, collector)
}

/// A model of an inbox in plain collections.
struct Model {
    depth: usize,
    overflow: usize,
    /// The numbers of the buffers without a packet.
    free: VecDeque<u32>,
    /// The buffers with a packet.
    filled: VecDeque<(u32, Vec<u8>)>,
    waiting: VecDeque<Vec<u8>>,
    closed: bool,
}

impl Model {
    fn deliver(&mut self, frame: Vec<u8>) -> Delivery {
        if frame.len() > MAX_FRAME {
            Delivery::Dropped(Refused::TooBig)
        } else if self.closed {
            Delivery::Dropped(Refused::Closed)
        } else if self.waiting.is_empty() && !self.free.is_empty() {
            self.filled.push_back((self.free.pop_front().unwrap(), frame));
            Delivery::Direct
        } else if self.waiting.len() < self.overflow {
            self.waiting.push_back(frame);
            Delivery::Overflow
        } else {
            Delivery::Dropped(Refused::NoBuffer)
        }
    }

    fn collect(&mut self) -> Option<(u32, Vec<u8>, bool)> {
        if let Some((number, frame)) = self.filled.pop_front() {
            return Some((number, frame, false));
        }
        if self.free.is_empty() || self.waiting.is_empty() {
            return None;
        }
        Some((self.free.pop_front()?, self.waiting.pop_front()?, true))
    }
}

#[derive(Clone, Debug)]
enum Step {
    Post,
    Deliver(Vec<u8>),
    /// Delivers several short frames by one claim, and the rest one by one.
    DeliverAll(Vec<u8>),
    /// As `DeliverAll`, but the frames of the claim are given to it together.
    FillAll(Vec<u8>),
    Collect,
    /// Collects several packets together, until the callee refuses the one with this number.
    CollectRun(u32, usize),
    Recall,
    /// Takes back the buffers whose number leaves this remainder.
    RecallIf(u32),
    Arm,
    Close,
    Reopen,
    /// Drops the receiving half and opens a new one.
    Replace,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Post),
        10 => prop::collection::vec(any::<u8>(), 0..=MAX_FRAME + 1).prop_map(Step::Deliver),
        3 => prop::collection::vec(any::<u8>(), 1..6).prop_map(Step::DeliverAll),
        3 => prop::collection::vec(any::<u8>(), 1..6).prop_map(Step::FillAll),
        8 => Just(Step::Collect),
        4 => (0u32..6, 0usize..6).prop_map(|(most, refused)| Step::CollectRun(most, refused)),
        1 => Just(Step::Recall),
        2 => (0u32..3).prop_map(Step::RecallIf),
        2 => Just(Step::Arm),
        1 => Just(Step::Close),
        2 => Just(Step::Reopen),
        1 => Just(Step::Replace),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Every buffer is in one place and comes back once. Every packet comes out once, complete, in
    /// order and in the oldest buffer. The indices wrap in some of the cases.
    #[test]
    fn behaves_like_a_plain_queue(
        depth in 0u32..3,
        overflow in prop_oneof![Just(0u32), Just(1), Just(2), Just(4)],
        start in prop_oneof![Just(0u32), u32::MAX - 8..=u32::MAX, (1u32 << 29) - 8..=1 << 29],
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let depth = 1 << depth;
        let (inbox, mut collector) = open(depth, overflow, start);
        let mut model = Model {
            depth: depth as usize,
            overflow: overflow as usize,
            free: VecDeque::new(),
            filled: VecDeque::new(),
            waiting: VecDeque::new(),
            closed: false,
        };
        let mut next = 0;
        for step in steps {
            match step {
                Step::Post => {
                    let full = model.free.len() + model.filled.len() >= model.depth;
                    prop_assert_eq!(collector.is_full(), full);
                    let posted = if next % 2 == 0 {
                        collector.post(buffer(next))
                    } else {
                        // A full inbox does not ask for a buffer.
                        let mut offered = Some(buffer(next));
                        let staged = collector.stage_all(|| offered.take());
                        collector.publish();
                        staged.and_then(|()| offered.map_or(Ok(()), Err))
                    };
                    match posted {
                        Ok(()) => {
                            prop_assert!(!full);
                            model.free.push_back(next);
                        }
                        Err(back) => {
                            prop_assert!(full);
                            prop_assert_eq!(back.number, next);
                        }
                    }
                    next += 1;
                }
                Step::Deliver(frame) => {
                    prop_assert_eq!(inbox.deliver(&frame), model.deliver(frame));
                }
                Step::DeliverAll(frames) => {
                    let mut claim = inbox.claim(frames.len());
                    let free = if model.closed || !model.waiting.is_empty() { 0 } else { model.free.len() };
                    prop_assert_eq!(claim.as_ref().map_or(0, |claim| claim.left()), free.min(frames.len()));
                    for byte in frames {
                        let expected = model.deliver(vec![byte]);
                        match &mut claim {
                            Some(claim) if claim.left() > 0 => {
                                prop_assert!(claim.fill(&[byte]));
                                prop_assert_eq!(expected, Delivery::Direct);
                            }
                            _ => prop_assert_eq!(inbox.deliver(&[byte]), expected),
                        }
                    }
                }
                Step::FillAll(bytes) => {
                    let frames: Vec<_> = bytes.into_iter().map(|byte| vec![byte]).collect();
                    let claim = inbox.claim(frames.len());
                    let free = if model.closed || !model.waiting.is_empty() { 0 } else { model.free.len() };
                    let count = free.min(frames.len());
                    prop_assert_eq!(claim.as_ref().map_or(0, |claim| claim.left()), count);
                    if let Some(mut claim) = claim {
                        let too_short = claim.fill_all(frames.iter().map(Vec::as_slice), 0);
                        prop_assert_eq!(too_short, (0, 0));
                        let filled = claim.fill_all(frames.iter().map(Vec::as_slice), 1);
                        prop_assert_eq!(filled, (count, count as u64));
                    }
                    for frame in frames.into_iter().take(count) {
                        prop_assert_eq!(model.deliver(frame), Delivery::Direct);
                    }
                }
                Step::CollectRun(most, refused) => {
                    let mut got = Vec::new();
                    let (count, bytes) = collector.collect_run(most, |buffer, len| {
                        if got.len() == refused {
                            return false;
                        }
                        let buffer = buffer.take().expect("a filled cell has a buffer");
                        got.push((buffer.number, buffer.bytes[..len].to_vec()));
                        true
                    });
                    let wanted = (most as usize).min(model.filled.len()).min(refused);
                    let expected: Vec<_> = model.filled.drain(..wanted).collect();
                    prop_assert_eq!(count as usize, wanted);
                    let wanted: usize = expected.iter().map(|(_, frame)| frame.len()).sum();
                    prop_assert_eq!(bytes, wanted as u64);
                    prop_assert_eq!(got, expected);
                }
                Step::Collect => {
                    let got = collector.collect().map(|packet| {
                        let frame = packet.buffer.bytes[..packet.len].to_vec();
                        (packet.buffer.number, frame, packet.overflow)
                    });
                    prop_assert_eq!(got, model.collect());
                }
                Step::Recall => {
                    let mut back = Vec::new();
                    let count = collector.recall(|buffer| back.push(buffer.number));
                    prop_assert_eq!(count, back.len());
                    prop_assert_eq!(back, model.free.drain(..).collect::<Vec<_>>());
                    // Recalled cells are free again when the packets before them have been
                    // collected.
                    while let Some((number, frame)) = model.filled.pop_front() {
                        let packet = collector.collect().unwrap();
                        prop_assert_eq!(packet.buffer.number, number);
                        prop_assert_eq!(&packet.buffer.bytes[..packet.len], &frame[..]);
                    }
                }
                Step::RecallIf(rest) => {
                    let matches = |number: u32| number % 3 == rest;
                    let mut back = Vec::new();
                    let count = collector
                        .recall_if(|buffer| matches(buffer.number), |buffer| back.push(buffer.number));
                    prop_assert_eq!(count, back.len());
                    let (taken, left): (Vec<_>, Vec<_>) =
                        model.free.drain(..).partition(|&number| matches(number));
                    prop_assert_eq!(back, taken);
                    model.free.extend(left);
                    while let Some((number, frame)) = model.filled.pop_front() {
                        let packet = collector.collect().unwrap();
                        prop_assert_eq!(packet.buffer.number, number);
                        prop_assert_eq!(&packet.buffer.bytes[..packet.len], &frame[..]);
                    }
                }
                Step::Arm => {
                    let ready = !model.filled.is_empty()
                        || (!model.free.is_empty() && !model.waiting.is_empty());
                    prop_assert_eq!(collector.is_ready(), ready);
                    prop_assert_eq!(collector.arm(), !ready);
                    prop_assert_eq!(inbox.ring(), !ready);
                }
                Step::Close => {
                    collector.close();
                    model.closed = true;
                }
                Step::Reopen => {
                    collector.reopen();
                    model.closed = false;
                }
                Step::Replace => {
                    let second = Inbox::open(&inbox, Arc::new(|| {}));
                    prop_assert!(second.is_none());
                    drop(collector);
                    prop_assert_eq!(inbox.deliver(&[1]), Delivery::Dropped(Refused::Closed));
                    collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
                    model.free.clear();
                    model.filled.clear();
                    model.waiting.clear();
                    model.closed = false;
                }
            }
            prop_assert_eq!(collector.posted(), model.free.len() + model.filled.len());
        }
    }
}

#[test]
fn a_buffer_that_is_too_small_is_returned_at_once() {
    let (_inbox, mut collector) = open(4, 0, 0);
    let small = Buffer { number: 7, bytes: vec![0; MAX_FRAME - 1] };
    assert_eq!(collector.post(small).unwrap_err().number, 7);
    assert_eq!(collector.posted(), 0);
}

/// What an inbox says about itself, and about its state while nothing else happens.
#[test]
fn an_inbox_tells_its_sizes_and_its_state() {
    let inbox = Arc::new(Inbox::<Buffer>::new(5, 3, MAX_FRAME));
    assert_eq!((inbox.depth(), inbox.max_frame()), (8, MAX_FRAME));
    assert!(inbox.is_closed(), "nobody receives yet");
    let mut collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
    assert!(!inbox.is_closed() && !inbox.frames_wait());
    assert_eq!(inbox.deliver(&[1]), Delivery::Overflow);
    assert!(inbox.frames_wait());
    collector.post(buffer(0)).unwrap();
    assert!(collector.collect().is_some() && !inbox.frames_wait());
    assert!(collector.arm() && collector.disarm(), "nobody rang");
    assert!(collector.arm() && inbox.ring() && !collector.disarm(), "somebody rang");
    collector.close();
    assert!(inbox.is_closed());
    collector.reopen();
    assert!(!inbox.is_closed());
    drop(collector);
    assert!(inbox.is_closed());
}

#[test]
fn discard_gives_back_every_buffer_and_counts_every_packet() {
    let (inbox, mut collector) = open(4, 4, u32::MAX - 1);
    for number in 0..2 {
        collector.post(buffer(number)).unwrap();
    }
    for _ in 0..5 {
        assert!(!matches!(inbox.deliver(&[1]), Delivery::Dropped(_)));
    }
    collector.post(buffer(2)).unwrap();
    let mut back = Vec::new();
    assert_eq!(collector.discard(|buffer| back.push(buffer.number)), 5);
    assert_eq!(back, [0, 1, 2]);
    collector.reopen();
    collector.post(buffer(3)).unwrap();
    assert_eq!(inbox.deliver(&[9]), Delivery::Direct, "nothing old is left");
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 9);
}

/// A buffer whose `as_mut` returns other bytes each time harms itself only. The inbox calls it when
/// the buffer is posted, and again when `recall_if` may have changed the buffer.
#[test]
fn a_buffer_that_misbehaves_harms_nobody_else() {
    struct Odd {
        calls: u32,
        bytes: [u8; 8],
        panics: bool,
    }
    impl AsMut<[u8]> for Odd {
        fn as_mut(&mut self) -> &mut [u8] {
            self.calls += 1;
            match (self.calls, self.panics) {
                (1, _) => &mut self.bytes,
                (_, true) => panic!("as_mut"),
                _ => &mut self.bytes[..3],
            }
        }
    }

    impl PacketBuffer for Odd {}
    let inbox = Arc::new(Inbox::new(4, 0, 8));
    let mut collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
    for panics in [false, true, false] {
        assert!(collector.post(Odd { calls: 0, bytes: [0; 8], panics }).is_ok());
    }
    assert_eq!(inbox.deliver(&[1; 8]), Delivery::Direct);
    assert_eq!(collector.collect().unwrap().buffer.bytes, [1; 8], "as it was posted");
    assert_eq!(collector.recall_if(|_| false, drop), 0);
    for _ in 0..2 {
        assert_eq!(inbox.deliver(&[2; 8]), Delivery::Direct);
        let packet = collector.collect().unwrap();
        assert_eq!((packet.len, packet.buffer.bytes), (0, [0; 8]), "it has no space any more");
    }
    collector.close();
}

/// If `recall_if` reallocates a buffer or moves its neighbours, no sender writes to the old bytes.
#[test]
fn a_choice_may_change_the_buffers() {
    let inbox = Arc::new(Inbox::<Vec<u8>>::new(4, 0, 8));
    let mut collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
    (0..4).for_each(|_| collector.post(vec![0; 8]).unwrap());
    for take in [false, true] {
        let mut seen = 0;
        let taken = collector.recall_if(
            |buffer| {
                *buffer = vec![0; 8];
                seen += 1;
                take && seen == 2
            },
            drop,
        );
        assert_eq!(taken, usize::from(take));
        assert_eq!(inbox.deliver(&[7; 8]), Delivery::Direct);
        assert_eq!(collector.collect().unwrap().buffer, [7; 8]);
    }
    assert_eq!(collector.posted(), 1);
}

/// Buffers that were staged and not published come back like the others, and no sender claims their
/// cells.
#[test]
fn staged_buffers_are_taken_back_too() {
    for all in [true, false] {
        let (inbox, mut collector) = open(4, 0, u32::MAX - 1);
        collector.post(buffer(0)).unwrap();
        (1..3).for_each(|number| collector.stage(buffer(number)).unwrap());
        let mut back = Vec::new();
        let take = |buffer: Buffer| back.push(buffer.number);
        match all {
            true => collector.recall(take),
            false => collector.recall_if(|buffer| buffer.number != 1, take),
        };
        if !all {
            assert_eq!(inbox.deliver(&[7]), Delivery::Direct);
            back.push(collector.collect().unwrap().buffer.number);
            back.sort_unstable();
        }
        assert_eq!(back, [0, 1, 2]);
        assert_eq!(inbox.deliver(&[7]), Delivery::Dropped(Refused::NoBuffer));
        assert!(inbox.claim(1).is_none() && collector.collect().is_none());
    }
}

/// A claim takes buffers for several frames at once: as many as are posted, in order with the
/// frames that are delivered one by one. It takes none if the inbox is closed, or while frames wait
/// in the overflow ring. Buffers that a claim leaves unfilled do not stop the receiver.
#[test]
fn a_claim_fills_several_buffers() {
    let (inbox, mut collector) = open(4, 1, u32::MAX - 1);
    assert!(inbox.claim(3).is_none(), "nothing is posted");
    (0..4).for_each(|number| collector.stage(buffer(number)).unwrap());
    assert!(inbox.claim(3).is_none(), "nothing is published");
    collector.publish();
    assert!(inbox.claim(0).is_none());
    let mut claim = inbox.claim(3).unwrap();
    assert_eq!(claim.left(), 3);
    assert!(claim.fill(&[1]));
    assert!(!claim.fill(&[0; MAX_FRAME + 1]), "too long");
    assert!(claim.fill(&[2; MAX_FRAME]));
    assert_eq!(inbox.deliver(&[4]), Delivery::Direct, "behind the claim");
    let first = collector.collect().unwrap();
    assert_eq!((first.buffer.number, first.len, first.buffer.bytes[0]), (0, 1, 1));
    assert_eq!(collector.collect().unwrap().len, MAX_FRAME);
    assert!(collector.collect().is_none(), "it is still claimed");
    drop(claim);
    assert_eq!(collector.collect().unwrap().len, 0);
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 4);

    collector.post(buffer(4)).unwrap();
    let mut claim = inbox.claim(9).unwrap();
    assert_eq!(claim.left(), 1);
    assert!(claim.fill(&[5]) && !claim.fill(&[6]));
    drop(claim);
    assert_eq!(inbox.deliver(&[6]), Delivery::Overflow);
    collector.post(buffer(5)).unwrap();
    assert!(inbox.claim(1).is_none(), "an older frame waits");
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 5);
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 6);
    collector.post(buffer(6)).unwrap();
    collector.close();
    assert!(inbox.claim(1).is_none(), "closed");
}

/// A frame that waits goes into a staged buffer, which publishes it: no sender finds more buffers
/// claimed than posted.
#[test]
fn a_frame_that_waits_takes_a_staged_buffer() {
    let (inbox, mut collector) = open(4, 1, u32::MAX);
    assert_eq!(inbox.deliver(&[1]), Delivery::Overflow);
    collector.stage(buffer(0)).unwrap();
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 1);
    assert!(inbox.claim(1).is_none());
    assert_eq!(inbox.deliver(&[2]), Delivery::Overflow);
    collector.post(buffer(1)).unwrap();
    assert_eq!(collector.collect().unwrap().buffer.bytes[0], 2);
}

/// A receiver that is dropped asleep is not woken, and its callback is dropped with it.
#[test]
fn a_receiver_that_is_gone_is_not_called() {
    let calls = Arc::new(AtomicU32::new(0));
    let inbox = Arc::new(Inbox::<Buffer>::new(4, 0, MAX_FRAME));
    let count = Arc::clone(&calls);
    let wake = Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    let mut collector = Inbox::open(&inbox, wake).unwrap();
    assert!(collector.arm());
    drop(collector);
    assert!(!inbox.ring(), "it is not armed");
    assert_eq!((calls.load(Ordering::SeqCst), Arc::strong_count(&calls)), (0, 1));
}

/// While a claimed buffer is not filled, no frame of the overflow ring goes into it.
#[test]
fn a_frame_that_waits_does_not_take_a_claimed_buffer() {
    let (inbox, mut collector) = open(4, 1, u32::MAX);
    collector.post(buffer(0)).unwrap();
    let mut claim = inbox.claim(1).unwrap();
    assert_eq!(inbox.deliver(&[2]), Delivery::Overflow);
    assert!(collector.collect().is_none() && !collector.is_ready());
    assert!(claim.fill(&[1]));
    let packet = collector.collect().unwrap();
    assert_eq!((packet.buffer.bytes[0], packet.overflow), (1, false));
    collector.post(packet.buffer).unwrap();
    let packet = collector.collect().unwrap();
    assert_eq!((packet.buffer.bytes[0], packet.overflow), (2, true));
}

/// If a `recall_if` panics half-way, the inbox stays valid: the buffers that were taken back are
/// gone, the others are posted, and no sender waits for ever.
#[test]
fn a_panic_while_choosing_leaves_the_others_posted() {
    let (inbox, mut collector) = open(8, 0, u32::MAX - 2);
    (0..6).for_each(|number| collector.post(buffer(number)).unwrap());
    let mut back = Vec::new();
    let choose = |buffer: &mut Buffer| {
        assert!(buffer.number < 4, "on purpose");
        buffer.number % 2 == 1
    };
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        collector.recall_if(choose, |buffer| back.push(buffer.number))
    }));
    assert!(caught.is_err());
    assert_eq!((back, collector.posted()), (vec![1, 3], 4));
    for number in [0, 2, 4, 5] {
        assert_eq!(inbox.deliver(&[7]), Delivery::Direct);
        assert_eq!(collector.collect().unwrap().buffer.number, number);
    }
    assert_eq!(inbox.deliver(&[7]), Delivery::Dropped(Refused::NoBuffer));
}

/// If the function of a `recall` panics half-way, the other buffers are out too, and a close does not
/// wait for them.
#[test]
fn a_panic_in_a_recall_leaves_no_buffer_behind() {
    let (inbox, mut collector) = open(8, 0, u32::MAX - 2);
    (0..6).for_each(|number| collector.post(buffer(number)).unwrap());
    assert_eq!(inbox.deliver(&[7]), Delivery::Direct);
    let mut back = Vec::new();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        collector.recall(|buffer| {
            back.push(buffer.number);
            assert!(buffer.number < 3, "on purpose");
        })
    }));
    assert!(caught.is_err());
    assert_eq!((back, collector.posted()), (vec![1, 2, 3], 1));
    assert_eq!(inbox.deliver(&[7]), Delivery::Dropped(Refused::NoBuffer));
    assert_eq!(collector.collect().unwrap().buffer.number, 0);
    (0..8).for_each(|number| collector.post(buffer(number)).unwrap());
    assert_eq!(inbox.deliver(&[7]), Delivery::Direct);
    collector.close();
    assert_eq!(collector.collect().unwrap().buffer.number, 0);
    assert_eq!(collector.recall(drop), 7);
}

/// A claim whose owner panics between two frames ends. What it has filled arrives, and the others come
/// back without bytes.
#[test]
fn a_panic_between_two_frames_of_a_claim_ends_it() {
    let (inbox, mut collector) = open(8, 0, u32::MAX - 2);
    (0..5).for_each(|number| collector.post(buffer(number)).unwrap());
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut claim = inbox.claim(4).unwrap();
        let frames = [1, 2, 3].map(|byte| [byte; 9]);
        frames.iter().for_each(|frame| assert!(claim.fill(frame) && frame[0] < 2, "on purpose"));
    }));
    assert!(caught.is_err());
    assert_eq!(inbox.deliver(&[7]), Delivery::Direct);
    for (number, len) in [(0, 9), (1, 9), (2, 0), (3, 0), (4, 1)] {
        let packet = collector.collect().unwrap();
        assert_eq!((packet.buffer.number, packet.len, packet.more), (number, len, false));
    }
    collector.close();
    assert_eq!(collector.posted(), 0);
}

/// A receiver that drops what has arrived copies nothing of it: frames that wait stay out of the buffers.
#[test]
fn what_is_discarded_is_not_copied() {
    let (inbox, mut collector) = open(4, 2, u32::MAX);
    assert_eq!([1, 2].map(|byte| inbox.deliver(&[byte])), [Delivery::Overflow; 2]);
    (0..3).for_each(|number| collector.post(buffer(number)).unwrap());
    let mut back = Vec::new();
    assert_eq!(collector.discard(|buffer| back.push(buffer)), 2);
    assert_eq!(back.iter().map(|buffer| buffer.bytes[0]).collect::<Vec<_>>(), [0xee; 3]);
}

/// A `recall_if` keeps the other buffers within the senders' reach. More buffers are posted than
/// frames ever come at a time, and there is no overflow ring: no frame is dropped, whether any
/// buffer is taken back or not.
#[test]
fn taking_back_some_buffers_drops_no_frame_that_the_others_suffice_for() {
    let frames: u32 = if cfg!(debug_assertions) { 5_000 } else { 50_000 };
    let (inbox, mut collector) = open(64, 0, u32::MAX - 1000);
    (0..48).for_each(|number| collector.post(buffer(number)).unwrap());
    let collected = Arc::new(AtomicU32::new(0));
    let senders: Vec<_> = (0..2)
        .map(|_| {
            let (inbox, collected) = (inbox.clone(), collected.clone());
            std::thread::spawn(move || {
                for number in 0..frames {
                    assert_eq!(inbox.deliver(&number.to_le_bytes()), Delivery::Direct);
                    // The sender is at most 16 frames ahead of the receiver.
                    while (2 * number).saturating_sub(collected.load(Ordering::Acquire)) > 16 {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let mut seen = 0;
    let mut round = 0;
    while seen < 2 * frames {
        round += 1;
        let mut back = Vec::new();
        // The number of no buffer, or of one of the last that were posted.
        let target = if round % 2 == 0 { u32::MAX } else { round % 48 };
        collector.recall_if(|buffer| buffer.number == target, |buffer| back.push(buffer));
        while let Some(packet) = collector.collect() {
            seen += 1;
            back.push(packet.buffer);
        }
        for buffer in back {
            collector.post(buffer).unwrap();
        }
        collected.store(seen, Ordering::Release);
        std::thread::yield_now();
    }
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    assert_eq!(collector.posted(), 48);
}

/// Three senders deliver to one receiver that posts, recalls, sleeps and wakes. Every accepted
/// frame arrives once, complete, and in its sender's order. Every buffer comes back, and no thread
/// hangs.
#[test]
fn many_senders_under_threads_lose_nothing() {
    const SENDERS: u32 = 3;
    let frames: u32 = if cfg!(debug_assertions) { 20_000 } else { 200_000 };
    let started = Instant::now();
    for overflow in [0, 4] {
        let inbox = Arc::new(Inbox::starting_at(8, overflow, MAX_FRAME, u32::MAX - 1000));
        let receiver = std::thread::current();
        let mut collector = Inbox::open(&inbox, Arc::new(move || receiver.unpark())).unwrap();
        let finished = Arc::new(AtomicU32::new(0));
        let senders: Vec<_> = (0..SENDERS)
            .map(|id| {
                let (inbox, finished) = (inbox.clone(), finished.clone());
                std::thread::spawn(move || {
                    let mut taken = Vec::new();
                    for number in 0..frames {
                        let len = 12 + (number as usize * 7) % (MAX_FRAME - 12);
                        let mut frame = vec![(id * 31 + number) as u8; len];
                        frame[..4].copy_from_slice(&id.to_le_bytes());
                        frame[4..8].copy_from_slice(&number.to_le_bytes());
                        frame[8..12].copy_from_slice(&(len as u32).to_le_bytes());
                        match inbox.deliver(&frame) {
                            Delivery::Direct | Delivery::Overflow => taken.push(number),
                            Delivery::Dropped(Refused::NoBuffer) => std::thread::yield_now(),
                            other => panic!("{other:?}"),
                        }
                        if number.is_multiple_of(5) {
                            inbox.ring();
                        }
                    }
                    finished.fetch_add(1, Ordering::Release);
                    inbox.ring();
                    taken
                })
            })
            .collect();
        let mut spare: Vec<Buffer> = (0..8).map(buffer).collect();
        let mut seen = vec![Vec::new(); SENDERS as usize];
        let mut rounds = 0u32;
        loop {
            assert!(started.elapsed() < Duration::from_secs(120), "stuck");
            let done = finished.load(Ordering::Acquire) == SENDERS;
            rounds += 1;
            if rounds.is_multiple_of(64) {
                collector.recall(|buffer| spare.push(buffer));
            }
            while let Some(buffer) = spare.pop() {
                if let Err(buffer) = collector.post(buffer) {
                    spare.push(buffer); // recalled cells wait for the packets before them
                    break;
                }
            }
            let mut any = false;
            while let Some(packet) = collector.collect() {
                any = true;
                let word = |at: usize| {
                    u32::from_le_bytes(packet.buffer.bytes[at..at + 4].try_into().unwrap())
                };
                let (id, number) = (word(0), word(4));
                assert_eq!(word(8) as usize, packet.len);
                assert!(
                    packet.buffer.bytes[12..packet.len]
                        .iter()
                        .all(|&b| b == (id * 31 + number) as u8)
                );
                seen[id as usize].push(number);
                spare.push(packet.buffer);
            }
            if done && !any {
                break;
            }
            if !any && spare.is_empty() && collector.arm() {
                if finished.load(Ordering::Acquire) < SENDERS {
                    std::thread::park_timeout(Duration::from_secs(10));
                }
                collector.disarm();
            }
        }
        for (sender, seen) in senders.into_iter().zip(&seen) {
            assert_eq!(&sender.join().unwrap(), seen);
        }
        collector.close();
        collector.recall(|buffer| spare.push(buffer));
        let mut numbers: Vec<_> = spare.iter().map(|buffer| buffer.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..8).collect::<Vec<_>>());
    }
}

/// The receiver closes while senders run. Afterwards it gets each buffer back, and no sender writes
/// to it.
#[test]
fn close_under_threads_gets_every_buffer_back_untouched() {
    let inbox = Arc::new(Inbox::new(8, 8, MAX_FRAME));
    let stop = Arc::new(AtomicU32::new(0));
    let senders: Vec<_> = (0..2u8)
        .map(|id| {
            let (inbox, stop) = (inbox.clone(), stop.clone());
            std::thread::spawn(move || {
                while stop.load(Ordering::Relaxed) == 0 {
                    if matches!(inbox.deliver(&[id; MAX_FRAME]), Delivery::Dropped(_)) {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    for _ in 0..500 {
        let mut collector = Inbox::open(&inbox, Arc::new(|| {})).unwrap();
        for number in 0..8 {
            collector.post(buffer(number)).unwrap();
        }
        if let Some(packet) = collector.collect() {
            collector.post(packet.buffer).unwrap();
        }
        let mut back = Vec::new();
        collector.discard(|buffer| back.push(buffer));
        back.iter_mut().for_each(|buffer| buffer.bytes.fill(0x55));
        std::thread::yield_now();
        assert!(back.iter().all(|buffer| buffer.bytes.iter().all(|&byte| byte == 0x55)));
        let mut numbers: Vec<_> = back.iter().map(|buffer| buffer.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..8).collect::<Vec<_>>());
    }
    stop.store(1, Ordering::Relaxed);
    for sender in senders {
        sender.join().unwrap();
    }
}

/// Short frames are copied in two pieces that overlap, longer ones in one.
#[test]
fn a_frame_of_each_length_arrives_whole_and_writes_nothing_behind_it() {
    const SPACE: usize = 300;
    let inbox = Arc::new(Inbox::<Vec<u8>>::new(2, 0, SPACE));
    let mut collector = Inbox::open(&inbox, Arc::new(|| ())).unwrap();
    for len in 0..=SPACE {
        let frame: Vec<u8> = (0..len).map(|i| (i % 251) as u8 + 1).collect();
        for _ in 0..2 {
            collector.post(vec![0; SPACE]).unwrap();
        }
        assert_eq!(inbox.deliver(&frame), Delivery::Direct);
        let mut claim = inbox.claim(1).unwrap();
        assert_eq!(claim.fill_all([&frame[..]].into_iter(), SPACE), (1, len as u64));
        drop(claim);
        for _ in 0..2 {
            let packet = collector.collect().unwrap();
            assert_eq!((packet.len, &packet.buffer[..len]), (len, &frame[..]), "{len} bytes");
            assert!(packet.buffer[len..].iter().all(|byte| *byte == 0), "behind {len} bytes");
        }
    }
}
