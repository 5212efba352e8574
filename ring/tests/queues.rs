//! Compares the four halves of a ring with a plain model, and tests the frames and pools under
//! them.
#![cfg(not(loom))]

use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::thread;
use std::time::Duration;
use vmring_core::doorbell::{Doorbell, Park};
use vmring_core::offload::OffloadHeader;
use vmring_core::{
    Backing, Buffer, Class, CqConsumer, CqProducer, CqeRef, Depths, Frame, FrontError, HeapBacking,
    Layout, LayoutError, Opcode, OutOfSpace, Outcome, Pool, PushError, Reaped, Regions,
    SKIP_SUCCESS, SqConsumer, SqProducer, Submission, rings,
};

/// The default configuration. Failing cases are kept beside those of the other crates.
fn config() -> ProptestConfig {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../proptest-regressions/ring-queues.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    }
}

/// Returns `full`, or `small` with `VMRING_TEST_SCALE=small`, which is for machines on which every
/// step is slow.
fn scale(full: u64, small: u64) -> u64 {
    match std::env::var("VMRING_TEST_SCALE") {
        Ok(scale) if scale == "small" => small,
        _ => full,
    }
}

const SLOT_SIZE: u32 = 64;
const HEADROOM: u32 = 16;
const CAPACITY: usize = (SLOT_SIZE - HEADROOM) as usize;

fn layout(slots: u32) -> Layout {
    Layout { slots, slot_size: SLOT_SIZE, headroom: HEADROOM }
}

fn pool(slots: u32) -> Pool {
    Pool::new(Box::new(HeapBacking::new((slots * SLOT_SIZE) as usize)), layout(slots)).unwrap()
}

/// Memory that counts how often it is freed.
struct Counted {
    bytes: HeapBacking,
    freed: Arc<AtomicUsize>,
}

// SAFETY: the bytes are those of a `HeapBacking`, which keeps the contract and is given to nobody
// else.
unsafe impl Backing for Counted {
    fn base(&self) -> NonNull<u8> {
        self.bytes.base()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.freed.fetch_add(1, Ordering::SeqCst);
    }
}

fn counted(slots: u32) -> (Pool, Arc<AtomicUsize>) {
    let freed = Arc::new(AtomicUsize::new(0));
    let bytes = HeapBacking::new((slots * SLOT_SIZE) as usize);
    let backing = Counted { bytes, freed: freed.clone() };
    (Pool::new(Box::new(backing), layout(slots)).unwrap(), freed)
}

// ------------------------------------------------------------------------------------------------
// The model

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        pool: usize,
    },
    DropFrame(usize),
    /// Submits one of the caller's frames after cutting `trim` bytes off its front.
    Push {
        class: Class,
        /// Whether a write skips success.
        skip: bool,
        frame: usize,
        len: usize,
        trim: usize,
    },
    PushForeign {
        write: bool,
    },
    PushCancel(Option<u64>),
    Publish,
    Look,
    Take(usize),
    /// Takes entries in their cells up to a cancel, and looks at the last one without taking it.
    TakeFront(usize),
    Retire,
    /// Counts the leading packets of a class whose length is at most `len`.
    Leading {
        write: bool,
        most: u32,
        len: usize,
    },
    /// Ends the leading writes whose length is at most `len`, in their places.
    EndWrites {
        most: u32,
        len: usize,
    },
    /// Looks at the leading writes whose length is at most `len`, and ends the first `end` of them.
    EndFrames {
        most: u32,
        len: usize,
        end: usize,
    },
    /// Takes leading reads.
    TakeReads {
        most: u32,
        count: usize,
    },
    /// Ends leading pairs of a write and a read whose packet's length is at most `len`.
    EndPairs {
        most: u32,
        len: usize,
    },
    /// Completes one of the entries that the poller has, in any order.
    Complete {
        which: usize,
        outcome: Outcome,
        len: usize,
        /// Whether a read is completed by `CqProducer::done_reads`, if that takes it.
        in_run: bool,
    },
    Show,
    LookForCompletions,
    Reap {
        count: usize,
        keep: bool,
    },
    /// Looks at the next completion and lets go of it, by a drop or by forgetting.
    LookAtFront {
        forget: bool,
    },
    /// Takes the next completion after a look at it.
    ReapFront,
    /// Moves completions forward, chosen by the lowest bits of their `user_data`.
    Select {
        chosen: u8,
    },
    DropSqProducer,
    DropCqConsumer,
    DropSqConsumer,
    DropCqProducer,
}

fn op() -> impl Strategy<Value = Op> {
    let outcome = prop_oneof![
        5 => Just(Outcome::Done),
        1 => Just(Outcome::Cancelled),
        1 => any::<u32>().prop_map(Outcome::Refused),
    ];
    let class = prop_oneof![Just(Class::Read), Just(Class::Write)];
    prop_oneof![
        60 => (0..2_usize).prop_map(|pool| Op::Alloc { pool }),
        10 => any::<usize>().prop_map(Op::DropFrame),
        80 => (class, any::<bool>(), any::<usize>(), 0..=CAPACITY, 0..=CAPACITY)
            .prop_map(|(class, skip, frame, len, trim)| Op::Push { class, skip, frame, len, trim }),
        5 => any::<bool>().prop_map(|write| Op::PushForeign { write }),
        15 => proptest::option::of(0..50_u64).prop_map(Op::PushCancel),
        50 => Just(Op::Publish),
        40 => Just(Op::Look),
        30 => (1..5_usize).prop_map(Op::Take),
        60 => (0..4_usize).prop_map(Op::TakeFront),
        40 => Just(Op::Retire),
        30 => (any::<bool>(), 0..6_u32, 0..=CAPACITY)
            .prop_map(|(write, most, len)| Op::Leading { write, most, len }),
        30 => (0..6_u32, 0..=CAPACITY).prop_map(|(most, len)| Op::EndWrites { most, len }),
        30 => (0..6_u32, 0..=CAPACITY).prop_map(|(most, len)| Op::EndPairs { most, len }),
        30 => (0..6_u32, 0..=CAPACITY, 0..6_usize)
            .prop_map(|(most, len, end)| Op::EndFrames { most, len, end }),
        30 => (0..6_u32, 0..6_usize).prop_map(|(most, count)| Op::TakeReads { most, count }),
        70 => (any::<usize>(), outcome, 0..=CAPACITY, any::<bool>()).prop_map(
            |(which, outcome, len, in_run)| Op::Complete { which, outcome, len, in_run }
        ),
        50 => Just(Op::Show),
        40 => Just(Op::LookForCompletions),
        60 => (1..5_usize, any::<bool>()).prop_map(|(count, keep)| Op::Reap { count, keep }),
        20 => any::<bool>().prop_map(|forget| Op::LookAtFront { forget }),
        20 => Just(Op::ReapFront),
        30 => any::<u8>().prop_map(|chosen| Op::Select { chosen }),
        1 => Just(Op::DropSqProducer),
        1 => Just(Op::DropCqConsumer),
        1 => Just(Op::DropSqConsumer),
        1 => Just(Op::DropCqProducer),
    ]
}

/// What a frame must be when it comes out again.
#[derive(Clone, Debug, PartialEq)]
struct Packet {
    pool: usize,
    slot: u32,
    headroom: usize,
    bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
enum Ask {
    Read(Packet),
    Write(Packet),
    /// A write that skips success.
    SkippingWrite(Packet),
    Cancel(Option<u64>),
}

impl Ask {
    fn packet(&self) -> Option<&Packet> {
        match self {
            Ask::Read(packet) | Ask::Write(packet) | Ask::SkippingWrite(packet) => Some(packet),
            Ask::Cancel(_) => None,
        }
    }

    fn class(&self) -> Class {
        match self {
            Ask::Read(_) => Class::Read,
            Ask::Write(_) | Ask::SkippingWrite(_) => Class::Write,
            Ask::Cancel(_) => Class::Cancel,
        }
    }

    fn opcode(&self) -> Opcode {
        match self {
            Ask::Read(_) => Opcode::Read,
            Ask::Write(_) | Ask::SkippingWrite(_) => Opcode::Write,
            Ask::Cancel(Some(_)) => Opcode::Cancel,
            Ask::Cancel(None) => Opcode::CancelAll,
        }
    }
}

#[derive(Clone, Debug)]
struct Done {
    user_data: u64,
    ask: Ask,
    outcome: Outcome,
    len: u32,
}

/// The real halves and, beside them, the model: which entry and which slot must be where.
struct World {
    pools: [Pool; 2],
    foreign: Pool,
    depths: Depths,
    start: u32,
    sq_producer: Option<SqProducer>,
    cq_consumer: Option<CqConsumer>,
    sq_consumer: Option<SqConsumer>,
    cq_producer: Option<CqProducer>,

    user: Vec<Frame>,
    next_user_data: u64,
    in_flight: [u32; 3],
    /// Entries that were written to the SQ and not taken. The last `sq_hidden` are not published.
    sq: VecDeque<(u64, Ask)>,
    sq_hidden: usize,
    /// How many entries of `sq` the `SqConsumer` saw at its last look.
    sq_known: usize,
    /// Entries that were taken in their cells, and whose cells are still occupied.
    sq_taken: usize,
    device: Vec<(u64, Ask, Option<Frame>)>,
    cq: VecDeque<Done>,
    cq_hidden: usize,
    cq_known: usize,
    submissions_shown: u32,
    completions_shown: u32,
    reaped: u32,
    /// Writes that have skipped their completion. The last `skips_hidden` are not published.
    skips: u32,
    skips_hidden: u32,
}

impl World {
    fn new(depths: Depths, slots: [u32; 2], start: u32) -> Self {
        let pools = slots.map(pool);
        let regions = Regions::new(pools.to_vec()).unwrap();
        let (sq_producer, cq_consumer, sq_consumer, cq_producer) = rings(depths, regions, start);
        Self {
            pools,
            foreign: pool(1),
            depths,
            start,
            sq_producer: Some(sq_producer),
            cq_consumer: Some(cq_consumer),
            sq_consumer: Some(sq_consumer),
            cq_producer: Some(cq_producer),
            user: Vec::new(),
            next_user_data: 0,
            in_flight: [0; 3],
            sq: VecDeque::new(),
            sq_hidden: 0,
            sq_known: 0,
            sq_taken: 0,
            device: Vec::new(),
            cq: VecDeque::new(),
            cq_hidden: 0,
            cq_known: 0,
            submissions_shown: 0,
            completions_shown: 0,
            reaped: 0,
            skips: 0,
            skips_hidden: 0,
        }
    }

    fn packet(&self, frame: &Frame) -> Packet {
        let pool = self.pools.iter().position(|pool| pool.owns(frame)).expect("a frame of ours");
        Packet { pool, slot: frame.slot(), headroom: frame.headroom(), bytes: frame.to_vec() }
    }

    fn depth(&self, class: Class) -> u32 {
        match class {
            Class::Read => self.depths.read,
            Class::Write => self.depths.write,
            Class::Cancel => self.depths.cancel,
        }
    }

    /// The error that the `SqProducer` must return for one more entry of `class`.
    fn refusal(&self, class: Class) -> Option<PushError> {
        if self.in_flight[class as usize] == self.depth(class) {
            Some(PushError::NoCredit)
        } else if (self.sq.len() + self.sq_taken) as u32 == self.depths.sq {
            Some(PushError::SqFull)
        } else {
            None
        }
    }

    fn submitted(&mut self, user_data: u64, ask: Ask) {
        self.in_flight[ask.class() as usize] += 1;
        self.sq.push_back((user_data, ask));
        self.sq_hidden += 1;
    }

    fn show_submissions(&mut self) {
        self.submissions_shown += self.sq_hidden as u32;
        self.sq_hidden = 0;
    }

    fn show_completions(&mut self) {
        self.completions_shown += self.cq_hidden as u32;
        self.cq_hidden = 0;
    }

    /// The credits of skipped completions come back when the count is published.
    fn show_skips(&mut self) {
        self.in_flight[Class::Write as usize] -= self.skips_hidden;
        self.skips_hidden = 0;
    }

    fn push(&mut self, class: Class, skip: bool, mut frame: Frame) {
        let user_data = self.next_user_data;
        self.next_user_data += 1;
        let skip = skip && class == Class::Write;
        if !frame.is_empty() {
            frame[0] = user_data as u8;
        }
        let pool = self.pools.iter().position(|pool| pool.owns(&frame));
        let foreign = pool.is_none().then_some(PushError::ForeignPool);
        let expected = self.refusal(class).or(foreign);
        let before = (frame.slot(), frame.headroom(), frame.to_vec());
        let Some(sq_producer) = &mut self.sq_producer else { return };
        let pushed = match skip {
            true => sq_producer.push_skip_success(frame, user_data),
            false => sq_producer.push(class, frame, user_data),
        };
        match pushed {
            Ok(()) => {
                assert_eq!(expected, None);
                let (slot, headroom, bytes) = before;
                let packet = Packet { pool: pool.unwrap(), slot, headroom, bytes };
                self.submitted(
                    user_data,
                    match (class, skip) {
                        (Class::Read, _) => Ask::Read(packet),
                        (_, true) => Ask::SkippingWrite(packet),
                        (_, false) => Ask::Write(packet),
                    },
                );
            }
            Err((refusal, frame)) => {
                assert_eq!(Some(refusal), expected);
                assert_eq!((frame.slot(), frame.headroom(), frame.to_vec()), before);
                if pool.is_some() {
                    self.user.push(frame);
                }
            }
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Alloc { pool } => {
                let free = self.pools[pool].layout().slots - self.expected_out(pool);
                let frame = self.pools[pool].alloc();
                assert_eq!(frame.is_some(), free > 0);
                self.user.extend(frame.inspect(|frame| {
                    assert_eq!((frame.headroom(), frame.len()), (HEADROOM as usize, 0));
                    assert_eq!(frame.capacity(), CAPACITY);
                }));
            }
            Op::DropFrame(which) => {
                if !self.user.is_empty() {
                    self.user.swap_remove(which % self.user.len());
                }
            }
            Op::Push { class, skip, frame, len, trim } => {
                if self.user.is_empty() || self.sq_producer.is_none() {
                    return;
                }
                let mut frame = self.user.swap_remove(frame % self.user.len());
                frame.reset();
                frame.set_len(len).unwrap();
                frame.fill(len as u8);
                frame.trim_front(trim.min(len)).unwrap();
                self.push(class, skip, frame);
            }
            Op::PushForeign { write } => {
                let frame = self.foreign.alloc().expect("it came back each time");
                self.push(if write { Class::Write } else { Class::Read }, false, frame);
            }
            Op::PushCancel(target) => {
                let user_data = self.next_user_data;
                self.next_user_data += 1;
                let expected = self.refusal(Class::Cancel);
                let Some(sq_producer) = &mut self.sq_producer else { return };
                assert_eq!(sq_producer.push_cancel(target, user_data).err(), expected);
                if expected.is_none() {
                    self.submitted(user_data, Ask::Cancel(target));
                }
            }
            Op::Publish => {
                let Some(sq_producer) = &mut self.sq_producer else { return };
                assert_eq!(sq_producer.publish(), self.sq_hidden > 0);
                self.show_submissions();
            }
            Op::Look => {
                let Some(sq_consumer) = &mut self.sq_consumer else { return };
                self.sq_known = self.sq.len() - self.sq_hidden;
                assert_eq!(sq_consumer.ready() as usize, self.sq_known);
            }
            Op::Take(count) => {
                for _ in 0..count {
                    self.take();
                }
            }
            Op::TakeFront(count) => {
                for _ in 0..count {
                    self.take_front();
                }
                // An entry that is looked at and not taken stays.
                let class =
                    self.sq_consumer.as_mut().and_then(SqConsumer::front).map(|it| it.class());
                let next =
                    self.sq.front().filter(|_| self.sq_consumer.is_some() && self.sq_known > 0);
                let expected = next.map(|(_, ask)| ask.class());
                assert_eq!(class, expected.filter(|class| *class != Class::Cancel));
            }
            Op::Retire => {
                let Some(sq_consumer) = &mut self.sq_consumer else { return };
                sq_consumer.retire();
                self.sq_taken = 0;
            }
            Op::Leading { write, most, len } => {
                let Some(sq_consumer) = &self.sq_consumer else { return };
                let class = if write { Class::Write } else { Class::Read };
                let known = self.sq.iter().take(self.sq_known.min(most as usize));
                let expected = known.take_while(|(_, ask)| {
                    ask.class() == class
                        && ask.packet().is_some_and(|packet| packet.bytes.len() <= len)
                });
                let expected = expected.count() as u32;
                assert_eq!(sq_consumer.leading(class, most, |bytes| bytes.len() <= len), expected);
            }
            Op::EndWrites { most, len } => self.end_writes(most, len),
            Op::EndPairs { most, len } => self.end_pairs(most, len),
            Op::EndFrames { most, len, end } => self.end_frames(most, len, end),
            Op::TakeReads { most, count } => self.take_reads(most, count),
            Op::Complete { which, outcome, len, in_run } => {
                self.complete(which, outcome, len, in_run);
            }
            Op::Show => {
                let Some(cq_producer) = &mut self.cq_producer else { return };
                assert_eq!(cq_producer.publish(), self.cq_hidden > 0 || self.skips_hidden > 0);
                self.show_completions();
                self.show_skips();
            }
            Op::LookForCompletions => {
                let Some(cq_consumer) = &mut self.cq_consumer else { return };
                self.cq_known = self.cq.len() - self.cq_hidden;
                assert_eq!(cq_consumer.ready() as usize, self.cq_known);
            }
            Op::Reap { count, keep } => {
                for _ in 0..count {
                    self.reap(keep, CqConsumer::pop);
                }
            }
            Op::LookAtFront { forget } => {
                let Some(cq_consumer) = &mut self.cq_consumer else { return };
                let front = cq_consumer.front();
                let seen = front.as_ref().map(|it| {
                    let cqe = it.cqe();
                    (cqe.user_data(), cqe.opcode(), cqe.outcome(), cqe.len())
                });
                let next = self.cq.front().filter(|_| self.cq_known > 0);
                let expected =
                    next.map(|done| (done.user_data, done.ask.opcode(), done.outcome, done.len));
                assert_eq!(seen, expected);
                if forget {
                    #[allow(clippy::forget_non_drop)] // that it has no `Drop` is what is promised
                    std::mem::forget(front);
                }
            }
            Op::ReapFront => self.reap(true, |it| it.front().map(CqeRef::take)),
            Op::Select { chosen } => {
                let Some(cq_consumer) = &mut self.cq_consumer else { return };
                let is_chosen = |user_data: u64| chosen >> (user_data % 8) & 1 == 1;
                let mut seen = Vec::new();
                cq_consumer.select(|cqe| {
                    seen.push(cqe.user_data());
                    is_chosen(cqe.user_data())
                });
                let rest = self.cq.split_off(self.cq_known);
                let expected: Vec<_> = self.cq.iter().map(|done| done.user_data).collect();
                assert_eq!(seen, expected, "each known completion, oldest first");
                let (first, others): (Vec<_>, Vec<_>) =
                    self.cq.drain(..).partition(|done| is_chosen(done.user_data));
                self.cq_known = first.len();
                self.cq = first.into_iter().chain(others).chain(rest).collect();
                assert_eq!(cq_consumer.known() as usize, self.cq_known);
                let published = self.completions_shown - self.reaped;
                assert_eq!(cq_consumer.waiting(), published, "none entered or left the queue");
            }
            Op::DropSqProducer => {
                if self.sq_producer.take().is_some() {
                    self.show_submissions();
                }
            }
            Op::DropCqConsumer => self.cq_consumer = None,
            Op::DropSqConsumer => {
                self.sq_consumer = None;
                self.sq_taken = 0;
            }
            Op::DropCqProducer => {
                if self.cq_producer.take().is_some() {
                    self.show_completions();
                }
            }
        }
        // The `CqConsumer` keeps the SQ alive too, because it counts submissions.
        if self.sq_producer.is_none() && self.sq_consumer.is_none() && self.cq_consumer.is_none() {
            self.sq.clear();
        }
        if self.cq_producer.is_none() && self.cq_consumer.is_none() {
            self.cq.clear();
        }
    }

    fn take(&mut self) {
        let Some(sq_consumer) = &mut self.sq_consumer else { return };
        let submission = sq_consumer.pop();
        if self.sq_known == 0 {
            assert!(submission.is_none(), "{submission:?} was not seen at the last look");
            return;
        }
        self.sq_known -= 1;
        self.sq_taken = 0;
        let (expected, ask) = self.sq.pop_front().unwrap();
        let (got, frame) = match (submission.unwrap(), &ask) {
            (Submission::Packet { class: Class::Read, user_data, buffer: frame }, Ask::Read(_)) => {
                (user_data, frame.into_frame().ok())
            }
            (
                Submission::Packet { class: Class::Write, user_data, buffer: frame },
                Ask::Write(_) | Ask::SkippingWrite(_),
            ) => (user_data, frame.into_frame().ok()),
            (Submission::Cancel { user_data, target }, Ask::Cancel(wanted)) => {
                assert_eq!(target, *wanted);
                (user_data, None)
            }
            (other, _) => panic!("{other:?} instead of {ask:?}"),
        };
        assert_eq!(got, expected);
        assert_eq!(frame.as_ref().map(|frame| self.packet(frame)).as_ref(), ask.packet());
        self.device.push((got, ask, frame));
    }

    fn take_front(&mut self) {
        let Some(sq_consumer) = &mut self.sq_consumer else { return };
        assert_eq!(sq_consumer.known() as usize, self.sq_known);
        let next = self.sq.front().filter(|(_, ask)| self.sq_known > 0 && ask.packet().is_some());
        let Some(sqe) = sq_consumer.front() else {
            assert!(next.is_none(), "{next:?} was not given");
            return;
        };
        let (class, skip) = (sqe.class(), sqe.flags() == SKIP_SUCCESS);
        let (buffer, user_data) = sqe.take();
        let frame = buffer.into_frame().unwrap();
        let (expected, ask) = self.sq.pop_front().unwrap();
        assert_eq!(skip, matches!(ask, Ask::SkippingWrite(_)));
        self.sq_known -= 1;
        self.sq_taken += 1;
        assert_eq!((class, user_data), (ask.class(), expected));
        assert_eq!(Some(&self.packet(&frame)), ask.packet());
        self.device.push((user_data, ask, Some(frame)));
    }

    fn end_writes(&mut self, most: u32, max: usize) {
        let (Some(sq_consumer), Some(cq_producer)) = (&mut self.sq_consumer, &mut self.cq_producer)
        else {
            return;
        };
        let mut seen = Vec::new();
        let ended = sq_consumer.end_writes(cq_producer, most, |packet| {
            let is_sent = packet.len() <= max;
            seen.extend(is_sent.then(|| packet.bytes().expect("a frame").to_vec()));
            is_sent
        });
        let known = self.sq.iter().take(self.sq_known.min(most as usize));
        let expected = known.map_while(|(_, ask)| match ask {
            Ask::Write(packet) => (packet.bytes.len() <= max).then(|| packet.bytes.clone()),
            _ => None,
        });
        assert_eq!(seen, expected.collect::<Vec<_>>());
        assert_eq!(ended as usize, seen.len());
        (0..ended).for_each(|_| self.moved_to_cq(None));
    }

    fn end_frames(&mut self, most: u32, max: usize, end: usize) {
        let (Some(sq_consumer), Some(cq_producer)) = (&mut self.sq_consumer, &mut self.cq_producer)
        else {
            return;
        };
        let is_like = |_: &Buffer, packet: &[u8]| packet.len() <= max;
        let seen = sq_consumer.with_leading_frames(cq_producer, most, is_like, |frames| {
            let seen: Vec<_> = frames.packets().map(<[u8]>::to_vec).collect();
            assert_eq!(frames.len(), seen.len());
            frames.end(end);
            let left: Vec<_> = frames.packets().map(<[u8]>::to_vec).collect();
            assert_eq!(left, seen[end.min(seen.len())..]);
            seen
        });
        let known = self.sq.iter().take(self.sq_known.min(most as usize));
        let expected = known.map_while(|(_, ask)| match ask {
            Ask::Write(packet) => (packet.bytes.len() <= max).then(|| packet.bytes.clone()),
            _ => None,
        });
        assert_eq!(seen, expected.collect::<Vec<_>>());
        (0..end.min(seen.len())).for_each(|_| self.moved_to_cq(None));
    }

    fn take_reads(&mut self, most: u32, count: usize) {
        let Some(sq_consumer) = &mut self.sq_consumer else { return };
        let taken: Vec<_> = sq_consumer.reads(most).take(count).collect();
        let known = self.sq.iter().take(self.sq_known.min(most as usize).min(count));
        let reads = known.take_while(|(_, ask)| ask.class() == Class::Read).count();
        assert_eq!(taken.len(), reads);
        for (buffer, user_data) in taken {
            let frame = buffer.into_frame().unwrap();
            let (expected, ask) = self.sq.pop_front().unwrap();
            self.sq_known -= 1;
            self.sq_taken += 1;
            assert_eq!(user_data, expected);
            assert_eq!(Some(&self.packet(&frame)), ask.packet());
            self.device.push((user_data, ask, Some(frame)));
        }
    }

    fn end_pairs(&mut self, most: u32, max: usize) {
        let (Some(sq_consumer), Some(cq_producer)) = (&mut self.sq_consumer, &mut self.cq_producer)
        else {
            return;
        };
        let mut passed = Vec::new();
        let ended = sq_consumer.end_pairs(cq_producer, most, |packet, space| {
            assert_eq!(packet.len(), space.len());
            let is_passed = packet.len() <= max;
            if is_passed {
                space.copy_from_slice(packet);
                passed.push(packet.to_vec());
            }
            is_passed
        });
        assert_eq!(ended as usize, passed.len());
        for packet in &passed {
            self.moved_to_cq(None);
            self.moved_to_cq(Some(packet));
        }
        // Why it has stopped.
        let next: Vec<_> = self.sq.iter().take(self.sq_known.min(2)).map(|(_, ask)| ask).collect();
        if ended < most
            && let [Ask::Write(from), Ask::Read(to)] = next[..]
        {
            let space = SLOT_SIZE as usize - to.headroom;
            assert!(from.bytes.len() > max.min(space), "{from:?} was not passed to {to:?}");
        }
    }

    /// The oldest entry of the SQ has moved to the CQ, with this packet if it is a read.
    fn moved_to_cq(&mut self, received: Option<&Vec<u8>>) {
        let (user_data, ask) = self.sq.pop_front().expect("it is known");
        self.sq_known -= 1;
        self.sq_taken += 1;
        let ask = match (ask, received) {
            (Ask::Read(packet), Some(bytes)) => {
                Ask::Read(Packet { bytes: bytes.clone(), ..packet })
            }
            (Ask::Write(packet), None) => Ask::Write(packet),
            other => panic!("{other:?} was moved"),
        };
        let len = ask.packet().expect("a packet").bytes.len() as u32;
        self.cq.push_back(Done { user_data, ask, outcome: Outcome::Done, len });
        self.cq_hidden += 1;
    }

    fn complete(&mut self, which: usize, outcome: Outcome, len: usize, in_run: bool) {
        if self.device.is_empty() || self.cq_producer.is_none() {
            return;
        }
        let (user_data, mut ask, frame) = self.device.swap_remove(which % self.device.len());
        let (mut outcome, mut len) = (outcome, len as u32);
        match frame {
            Some(mut frame) => {
                if let Ask::Read(_) = ask {
                    // The device writes a packet.
                    frame.reset();
                    frame.set_len(len as usize).unwrap();
                    frame.fill(user_data as u8 ^ 0x5a);
                    ask = Ask::Read(self.packet(&frame));
                }
                len = frame.len() as u32;
                let cq_producer = self.cq_producer.as_mut().unwrap();
                if outcome == Outcome::Done && matches!(ask, Ask::SkippingWrite(_)) {
                    cq_producer.skip(frame);
                    self.skips += 1;
                    self.skips_hidden += 1;
                    return;
                }
                let mut buffer = Some(Buffer::from(frame));
                if in_run && outcome == Outcome::Done && ask.class() == Class::Read {
                    let is_taken =
                        cq_producer.done_reads(1).push(&mut buffer, len as usize, user_data);
                    assert_eq!(is_taken, buffer.is_none());
                    // Only frames of the first pool are taken.
                    assert_eq!(buffer.is_some(), ask.packet().is_some_and(|it| it.pool == 1));
                }
                if let Some(buffer) = buffer {
                    cq_producer.push(ask.class(), buffer, user_data, outcome);
                }
            }
            None => {
                outcome = Outcome::Done;
                let cq_producer = self.cq_producer.as_mut().unwrap();
                cq_producer.push_cancel(ask == Ask::Cancel(None), len, user_data);
            }
        }
        self.cq.push_back(Done { user_data, ask, outcome, len });
        self.cq_hidden += 1;
    }

    fn reap(&mut self, keep: bool, take: impl FnOnce(&mut CqConsumer) -> Option<Reaped>) {
        let Some(cq_consumer) = &mut self.cq_consumer else { return };
        let reaped = take(cq_consumer);
        if self.cq_known == 0 {
            assert!(reaped.is_none(), "{reaped:?} was not seen at the last look");
            return;
        }
        let reaped = reaped.unwrap();
        self.cq_known -= 1;
        self.reaped += 1;
        let done = self.cq.pop_front().unwrap();
        assert_eq!(reaped.user_data, done.user_data);
        assert_eq!(reaped.opcode, done.ask.opcode());
        assert_eq!(reaped.outcome, done.outcome);
        assert_eq!(reaped.len, done.len);
        let frame = reaped.frame;
        let packet = frame.as_ref().map(|frame| self.packet(frame));
        assert_eq!(packet.as_ref(), done.ask.packet());
        self.in_flight[done.ask.class() as usize] -= 1;
        if keep {
            self.user.extend(frame);
        }
    }

    /// The conservation law: the number of slots of a pool that must not be in its free list.
    fn expected_out(&self, pool: usize) -> u32 {
        let ours = |frame: &&Frame| self.pools[pool].owns(frame);
        let there = |ask: &&Ask| ask.packet().is_some_and(|packet| packet.pool == pool);
        let count = self.user.iter().filter(ours).count()
            + self.device.iter().filter_map(|(_, _, frame)| frame.as_ref()).filter(ours).count()
            + self.sq.iter().map(|(_, ask)| ask).filter(there).count()
            + self.cq.iter().map(|done| &done.ask).filter(there).count();
        count as u32
    }

    fn check(&mut self) {
        for pool in 0..2 {
            assert_eq!(self.pools[pool].slots_out(), self.expected_out(pool));
        }
        assert_eq!(self.foreign.slots_out(), 0);
        let owned: BTreeSet<_> = self
            .user
            .iter()
            .chain(self.device.iter().filter_map(|(_, _, frame)| frame.as_ref()))
            .map(|frame| (self.pools[0].owns(frame), frame.slot()))
            .collect();
        let frames = self.device.iter().filter(|(_, _, frame)| frame.is_some()).count();
        assert_eq!(owned.len(), self.user.len() + frames, "a slot is in two places");

        if let (Some(sq_producer), Some(sq_consumer)) = (&self.sq_producer, &self.sq_consumer) {
            let shown = self.start.wrapping_add(self.submissions_shown);
            assert_eq!(sq_consumer.submitted(), shown);
            assert_eq!(sq_producer.skipped(), self.skips - self.skips_hidden);
        }
        for class in [Class::Read, Class::Write, Class::Cancel] {
            let left = self.depth(class) - self.in_flight[class as usize];
            let refusal = self.refusal(class);
            let depth = self.depth(class);
            let Some(sq_producer) = &mut self.sq_producer else { continue };
            assert_eq!(sq_producer.check(class).err(), refusal);
            assert_eq!(sq_producer.available(class), left);
            assert_eq!(sq_producer.depth(class), depth);
        }
        if let Some(cq_consumer) = &self.cq_consumer {
            let skips_shown = self.skips - self.skips_hidden;
            let in_flight = self.submissions_shown - self.reaped - skips_shown;
            assert_eq!((cq_consumer.in_flight(), cq_consumer.skipped()), (in_flight, skips_shown));
            assert_eq!(cq_consumer.known() as usize, self.cq_known);
            assert_eq!(cq_consumer.index_of(3), self.start.wrapping_add(self.reaped + 3));
        }
        if let Some(cq_producer) = &self.cq_producer {
            assert_eq!(cq_producer.backlog() as usize, self.cq.len() - self.cq_hidden);
            assert_eq!(cq_producer.index(), self.start.wrapping_add(self.completions_shown));
            assert_eq!(cq_producer.skipped(), self.skips - self.skips_hidden);
        }
    }
}

fn start() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => (0..40_u32).prop_map(|before| u32::MAX - before),
        1 => Just(0),
        1 => any::<u32>(),
    ]
}

fn depths() -> impl Strategy<Value = Depths> {
    (0..6_u32, 0..6_u32, 0..3_u32, 0..5_u32).prop_map(|(read, write, cancel, sq)| Depths {
        read,
        write,
        cancel,
        sq: 1 << sq,
    })
}

proptest! {
    #![proptest_config(config())]

    /// Goal: a slot is in one place. A full SQ and a missing credit give the frame back. Entries
    /// come out once, in order, as they went in. Credits come back one by one. All frames return to
    /// their pools, whichever half is dropped first. Method: after each random step, every counter
    /// agrees with the model.
    #[test]
    fn the_four_halves_do_what_the_plain_model_does(
        depths in depths(),
        slots in [1..12_u32, 1..12_u32],
        start in start(),
        ops in proptest::collection::vec(op(), 0..400),
    ) {
        let mut world = World::new(depths, slots, start);
        world.check();
        for op in ops {
            world.apply(op);
            world.check();
        }
        let pools = world.pools.clone();
        drop(world);
        for pool in pools {
            prop_assert_eq!(pool.slots_out(), 0, "a frame did not come home");
            let frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
            let all: BTreeSet<_> = frames.iter().map(Frame::slot).collect();
            prop_assert_eq!(all, (0..pool.layout().slots).collect::<BTreeSet<_>>());
        }
    }

    /// After any sequence of moves, a frame's packet is where plain arithmetic puts it, and all
    /// ways to look at it agree. A refused move changes nothing.
    #[test]
    fn a_frames_window_moves_as_arithmetic_says(
        moves in proptest::collection::vec((0..6_u8, 0..80_usize), 0..40),
    ) {
        let pool = pool(1);
        let mut frame = pool.alloc().unwrap();
        frame.grow_front(HEADROOM as usize).unwrap();
        frame.set_len(SLOT_SIZE as usize).unwrap();
        let slot: Vec<u8> = (0..SLOT_SIZE as u8).collect();
        frame.copy_from_slice(&slot);
        frame.reset();
        let (mut offset, mut len) = (HEADROOM as usize, 0);
        for (kind, n) in moves {
            let (space, moved) = match kind {
                0 => {
                    let (space, result) = (SLOT_SIZE as usize - offset, frame.set_len(n));
                    (space, result.map(|()| len = n))
                }
                1 => {
                    let result = frame.trim_front(n).map_err(space_of);
                    (len, result.map(|()| (offset, len) = (offset + n, len - n)))
                }
                2 => (len, frame.trim_back(n).map(|()| len -= n)),
                3 => {
                    let result = frame.grow_front(n).map_err(space_of);
                    (offset, result.map(|()| (offset, len) = (offset - n, len + n)))
                }
                4 => {
                    frame.reset();
                    (offset, len) = (HEADROOM as usize, 0);
                    continue;
                }
                _ => {
                    // Copy the bytes that are there already, so that the slot keeps its pattern.
                    let space = SLOT_SIZE as usize - offset;
                    let bytes = vec![0; n];
                    let same = slot[offset..].get(..n).unwrap_or(&bytes);
                    (space, frame.copy_from(same).map(|()| len = n))
                }
            };
            match moved {
                Ok(()) => prop_assert!(n <= space),
                Err(refused) => {
                    prop_assert!(n > space);
                    prop_assert_eq!(refused, OutOfSpace { wanted: n, available: space });
                }
            }
            let expected = &slot[offset..][..len];
            prop_assert_eq!(frame.headroom(), offset);
            prop_assert_eq!(frame.len(), len);
            prop_assert_eq!(frame.is_empty(), len == 0);
            prop_assert_eq!(frame.capacity(), SLOT_SIZE as usize - offset);
            prop_assert_eq!(&*frame, expected);
            prop_assert_eq!(frame.as_ref(), expected);
            prop_assert_eq!(frame.as_mut(), expected);
            prop_assert_eq!(frame.view().bytes(), expected);
            prop_assert_eq!(&*frame.view_mut().bytes_mut(), expected);
            prop_assert_eq!(&*frame.buffer_mut(), &slot[offset..]);
        }
    }
}

// ------------------------------------------------------------------------------------------------
// Queues, by example

fn regions(pool: &Pool) -> Regions {
    Regions::new(vec![pool.clone()]).unwrap()
}

#[test]
fn a_retired_entry_that_is_forgotten_loses_its_slot_and_copies_none() {
    let pool = pool(2);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(2, 0, 0), regions(&pool), u32::MAX);
    for user_data in 0..2 {
        sq_producer.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
    }
    sq_producer.publish();
    sq_consumer.ready();
    while let Some(Submission::Packet { class: Class::Read, user_data, buffer: frame }) =
        sq_consumer.pop()
    {
        cq_producer.push(Class::Read, frame, user_data, Outcome::Done);
    }
    cq_producer.publish();
    cq_consumer.ready();
    std::mem::forget(cq_consumer.pop());
    let second = cq_consumer.pop().unwrap();
    assert_eq!(second.user_data, 1);
    // Both credits are back and both entries are gone. One slot is lost, with the forgotten frame.
    assert_eq!(sq_producer.available(Class::Read), 2);
    assert!(cq_consumer.pop().is_none());
    drop((sq_producer, cq_consumer, sq_consumer, cq_producer, second));
    assert_eq!(pool.slots_out(), 1);
}

/// Goal: a look at a completion, and a choice among completions that does not end, copy no slot and
/// lose none. Method: one look is forgotten, one choice panics half-way, and then the queue is
/// dropped with its entries.
#[test]
fn a_look_that_is_forgotten_and_a_choice_that_panics_lose_no_slot() {
    for reaped in 0..3 {
        let pool = pool(4);
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(4, 0, 0), regions(&pool), u32::MAX - 1);
        for user_data in 0..4 {
            sq_producer.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
        }
        sq_producer.publish();
        sq_consumer.ready();
        while let Some(Submission::Packet { class, user_data, buffer: frame }) = sq_consumer.pop() {
            cq_producer.push(class, frame, user_data, Outcome::Done);
        }
        cq_producer.publish();
        assert_eq!(cq_consumer.ready(), 4);
        #[allow(clippy::forget_non_drop)] // that it has no `Drop` is what is promised
        std::mem::forget(cq_consumer.front());
        assert_eq!(cq_consumer.known(), 4);
        let choice = catch_unwind(AssertUnwindSafe(|| {
            cq_consumer.select(|cqe| {
                assert!(cqe.user_data() < 3, "this choice panics, as it was told to");
                cqe.user_data() % 2 == 1
            });
        }));
        assert!(choice.is_err());
        assert_eq!(cq_consumer.ready(), 4, "every entry is still there");
        let taken: BTreeSet<_> =
            (0..reaped).map(|_| cq_consumer.pop().unwrap()).map(|it| it.user_data).collect();
        assert_eq!(taken.len(), reaped, "none came twice");
        assert_eq!(pool.slots_out(), 4 - reaped as u32);
        drop((sq_producer, cq_consumer, sq_consumer, cq_producer));
        assert_eq!(pool.slots_out(), 0);
    }
}

/// A ring of `depth` reads of `pool`, all of them done and published.
fn all_done(pool: &Pool, depth: u32) -> (SqProducer, CqConsumer, SqConsumer, CqProducer) {
    let (sq_producer, cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(depth, 0, 0), regions(pool), u32::MAX - 1);
    for n in 0..depth {
        sq_producer.push(Class::Read, pool.alloc().unwrap(), n.into()).unwrap();
    }
    sq_producer.publish();
    sq_consumer.ready();
    while let Some(sqe) = sq_consumer.front() {
        let (buffer, user_data) = sqe.take();
        cq_producer.push(Class::Read, buffer, user_data, Outcome::Done);
    }
    cq_producer.publish();
    (sq_producer, cq_consumer, sq_consumer, cq_producer)
}

/// Completions that are taken together are retired and give their credits back together, also if their
/// caller panics. Then the others stay.
#[test]
fn completions_are_taken_together() {
    let pool = pool(4);
    let (sq_producer, mut cq_consumer, ..) = all_done(&pool, 4);
    assert_eq!((cq_consumer.ready(), sq_producer.available(Class::Read)), (4, 0));
    let mut seen = Vec::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        cq_consumer.pop_all(|done| {
            seen.push(done.user_data);
            assert!(done.user_data != 1, "the second");
        });
    }));
    assert!(panicked.is_err());
    assert_eq!((cq_consumer.known(), sq_producer.available(Class::Read)), (2, 2));
    assert_eq!(pool.slots_out(), 2, "the frames of what was taken are free");
    cq_consumer.pop_all(|done| seen.push(done.user_data));
    assert_eq!((&seen[..], cq_consumer.in_flight()), (&[0, 1, 2, 3][..], 0));
    assert_eq!((sq_producer.available(Class::Read), pool.slots_out()), (4, 0));
}

/// Goal: what is selected comes first, and both parts keep their order. Method: every choice of six.
#[test]
fn every_selection_keeps_both_orders() {
    for chosen in 0..64_u64 {
        let pool = pool(6);
        let (_sq_producer, mut cq_consumer, ..) = all_done(&pool, 6);
        cq_consumer.ready();
        let is_chosen = |n: u64| chosen >> n & 1 != 0;
        cq_consumer.select(|cqe| is_chosen(cqe.user_data()));
        assert_eq!(cq_consumer.known(), chosen.count_ones());
        // The others are known again.
        cq_consumer.ready();
        let mut seen = Vec::new();
        cq_consumer.pop_all(|done| seen.push(done.user_data));
        let (mut wanted, others): (Vec<_>, Vec<_>) = (0..6).partition(|n| is_chosen(*n));
        wanted.extend(others);
        assert_eq!(seen, wanted, "{chosen:#b}");
    }
}

/// Goal: a consumer says whether submissions wait, before and after it has looked at the queue.
#[test]
fn a_consumer_says_whether_more_waits() {
    let pool = pool(1);
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(1, 0, 0), regions(&pool), u32::MAX);
    assert!(!sq_consumer.has_more());
    sq_producer.push(Class::Read, pool.alloc().unwrap(), 1).unwrap();
    sq_producer.publish();
    assert!(sq_consumer.has_more());
    assert_eq!(sq_consumer.ready(), 1);
    assert!(sq_consumer.pop().is_some());
    assert!(!sq_consumer.has_more());
}

/// Four entries: two packets, a cancel, a packet.
fn mixed(pool: &Pool) -> (SqProducer, CqConsumer, SqConsumer, CqProducer) {
    let depths = Depths { read: 2, write: 2, cancel: 1, sq: 4 };
    let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) =
        rings(depths, regions(pool), u32::MAX);
    sq_producer.push(Class::Read, pool.alloc().unwrap(), 1).unwrap();
    sq_producer.push(Class::Write, pool.alloc().unwrap(), 2).unwrap();
    sq_producer.push_cancel(Some(1), 3).unwrap();
    sq_producer.push(Class::Read, pool.alloc().unwrap(), 4).unwrap();
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), 4);
    (sq_producer, cq_consumer, sq_consumer, cq_producer)
}

#[test]
fn packets_are_taken_up_to_a_cancel_and_make_space_together() {
    let pool = pool(4);
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) = mixed(&pool);
    assert_eq!(sq_producer.check(Class::Write), Err(PushError::SqFull));
    let mut taken = Vec::new();
    let mut take = |sq_consumer: &mut SqConsumer| {
        while let Some(packet) = sq_consumer.front() {
            taken.push((packet.class(), packet.take()));
        }
    };
    take(&mut sq_consumer);
    assert_eq!(sq_producer.check(Class::Write), Err(PushError::SqFull));
    sq_consumer.retire();
    assert_eq!(sq_producer.check(Class::Write), Ok(()));
    // There is no next one.
    take(&mut sq_consumer);
    let cancel = sq_consumer.pop();
    assert!(matches!(cancel, Some(Submission::Cancel { user_data: 3, target: Some(1) })));
    take(&mut sq_consumer);
    assert!(sq_consumer.pop().is_none());
    let seen: Vec<_> = taken.iter().map(|(class, (_, user_data))| (*class, *user_data)).collect();
    assert_eq!(seen, [(Class::Read, 1), (Class::Write, 2), (Class::Read, 4)]);
    let slots: BTreeSet<u32> =
        taken.iter().map(|(_, (taken, _))| taken.frame().unwrap().slot()).collect();
    assert_eq!((slots.len(), pool.slots_out()), (3, 3));
}

/// A write that skips success takes no cell of the CQ. Its credit and its frame come back together,
/// when the count is published. The ring's CQ has one cell, and the counts wrap.
#[test]
fn a_skipped_completion_gives_its_credit_and_its_frame_back() {
    let pool = pool(2);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(0, 1, 0), regions(&pool), u32::MAX - 1);
    assert!(!sq_producer.expects_skips());
    for n in 0..5 {
        assert_eq!(sq_producer.available(Class::Write), 1);
        sq_producer.push_skip_success(pool.alloc().unwrap(), n).unwrap();
        let (refusal, _) = sq_producer.push(Class::Write, pool.alloc().unwrap(), 9).unwrap_err();
        assert_eq!(refusal, PushError::NoCredit);
        sq_producer.publish();
        assert_eq!((sq_consumer.ready(), cq_consumer.in_flight()), (1, 1));
        let sqe = sq_consumer.front().unwrap();
        assert_eq!(sqe.flags(), SKIP_SUCCESS);
        let (frame, _) = sqe.take();
        sq_consumer.retire();
        if n % 2 == 1 {
            // A failure completes as every other one does.
            cq_producer.push(Class::Write, frame, n, Outcome::Cancelled);
            assert!(cq_producer.publish());
            assert_eq!((cq_consumer.ready(), cq_consumer.in_flight()), (1, 1));
            let done = cq_consumer.pop().unwrap();
            assert_eq!((done.user_data, done.outcome), (n, Outcome::Cancelled));
        } else {
            cq_producer.skip(frame);
            assert_eq!((sq_producer.available(Class::Write), cq_consumer.in_flight()), (0, 1));
            assert!(cq_producer.publish());
            assert!(!cq_producer.publish(), "it is published once");
            assert_eq!(cq_consumer.ready(), 0);
        }
        assert_eq!((cq_consumer.in_flight(), pool.slots_out()), (0, 0));
    }
    assert!(sq_producer.expects_skips());
    assert_eq!((sq_producer.skipped(), cq_consumer.skipped()), (3, 3));
}

/// Entries are published in whole cache lines: two of them, or eight if many entries are in flight.
#[test]
fn a_run_is_published_in_pieces_of_four_or_sixteen() {
    for start in [0, 1 << 20] {
        run_in_pieces(start);
    }
}

/// How many are in flight counts from the last completion that was reaped, not from the first
/// index.
fn run_in_pieces(start: u32) {
    let pool = pool(64);
    let (sq_producer, cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(64, 0, 0), regions(&pool), start);
    let mut shown = Vec::new();
    for n in 0..64 {
        if n == 20 || n == 40 {
            sq_producer.publish();
            sq_producer.begin_run(&cq_consumer);
        }
        sq_producer.push(Class::Read, pool.alloc().unwrap(), n).unwrap();
        sq_producer.publish_lines();
        shown.push(sq_consumer.ready());
    }
    let pieces = |n: usize| if n < 40 { n / 4 * 4 } else { (n / 16 * 16).max(40) };
    let expected: Vec<_> = (1..=64).map(|n| pieces(n) as u32).collect();
    assert_eq!(shown, expected);
}

/// Goal: who submits one by one publishes each entry, and in a run only the last of each piece.
#[test]
fn only_a_run_leaves_entries_unpublished() {
    let pool = pool(16);
    let (sq_producer, cq_consumer, _sq_consumer, _cq_producer) =
        rings(Depths::new(16, 0, 0), regions(&pool), 0);
    let ends = |count: u64| -> Vec<bool> {
        let ends_piece = |n| {
            sq_producer.push(Class::Read, pool.alloc().unwrap(), n).unwrap();
            sq_producer.ends_piece()
        };
        (0..count).map(ends_piece).collect()
    };
    assert_eq!((sq_producer.is_in_run(), ends(2)), (false, vec![true; 2]));
    sq_producer.begin_run(&cq_consumer);
    assert_eq!((sq_producer.is_in_run(), ends(3)), (true, vec![false, true, false]));
    sq_producer.end_run();
    assert_eq!((sq_producer.is_in_run(), ends(2)), (false, vec![true; 2]));
}

/// Goal: only a packet without a header, whether received or to be sent, counts as bare, and only below the
/// length that is asked for.
#[test]
fn a_bare_packet_has_no_header_and_is_shorter() {
    let pool = pool(2);
    let mut frame = pool.alloc().unwrap();
    for len in [0, 1, 9] {
        frame.set_len(len).unwrap();
        let end = len as u64;
        assert_eq!((frame.is_bare_below(end), frame.is_bare_below(end + 1)), (false, true));
        assert!(frame.is_bare_below(1 << 32));
    }
    frame.set_offload(&OffloadHeader::NONE).unwrap();
    assert!(!frame.is_bare_below(1 << 32));
    frame.clear_offload();
    assert!(frame.is_bare_below(10));
}

/// A ring's second pool is not its first.
#[test]
fn a_frame_is_of_the_first_pool_or_not() {
    let (first, second) = (pool(1), pool(1));
    let regions = Regions::new(vec![first.clone(), second.clone()]).expect("two");
    let is_of_first = |pool: &Pool| regions.is_of_first(&pool.alloc().unwrap());
    assert_eq!((is_of_first(&first), is_of_first(&second)), (true, false));
}

/// Writes that have ended without a completion are not in flight, so the pieces stay small.
#[test]
fn a_run_behind_skipped_writes_is_published_in_pieces_of_four() {
    let pool = pool(64);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(0, 64, 0), regions(&pool), 0);
    for n in 0..40 {
        sq_producer.push_skip_success(pool.alloc().unwrap(), n).unwrap();
    }
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), 40);
    while let Some(sqe) = sq_consumer.front() {
        let (buffer, _) = sqe.take();
        cq_producer.skip(buffer);
    }
    sq_consumer.retire();
    cq_producer.publish();
    assert_eq!((cq_consumer.ready(), cq_consumer.in_flight()), (0, 0));
    sq_producer.begin_run(&cq_consumer);
    for n in 0..4 {
        sq_producer.push(Class::Write, pool.alloc().unwrap(), n).unwrap();
        sq_producer.publish_lines();
    }
    assert_eq!(sq_consumer.ready(), 4);
}

/// A read completes always, whatever its submitter asks for.
#[test]
fn a_read_does_not_skip_success() {
    let pool = pool(1);
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(1, 0, 0), regions(&pool), 0);
    sq_producer.push_flagged(Class::Read, SKIP_SUCCESS, pool.alloc().unwrap(), 1).unwrap();
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), 1);
    assert_eq!(sq_consumer.front().map(|sqe| sqe.flags()), Some(0));
}

/// A taken entry belongs to its taker, even if it is never retired and whatever happens to the
/// queue.
#[test]
fn a_taken_entry_is_nobody_elses_and_one_that_is_left_stays() {
    let pool = pool(4);
    let (sq_producer, cq_consumer, mut sq_consumer, cq_producer) = mixed(&pool);
    let (buffer, user_data) = sq_consumer.front().unwrap().take();
    let frame = buffer.into_frame().unwrap();
    assert_eq!(sq_consumer.front().map(|next| next.class()), Some(Class::Write));
    drop((sq_producer, cq_consumer, sq_consumer, cq_producer));
    // Two slots were freed with the queue, and this one was not.
    assert_eq!((user_data, pool.slots_out()), (1, 1));
    let others: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    assert!(others.iter().all(|other| other.slot() != frame.slot()));
}

#[test]
fn a_completion_without_a_submission_panics_and_the_frame_is_freed() {
    let pool = pool(3);
    let (sq_producer, cq_consumer, sq_consumer, mut cq_producer) =
        rings(Depths::new(2, 0, 0), regions(&pool), u32::MAX);
    for _ in 0..2 {
        cq_producer.push(Class::Read, pool.alloc().unwrap(), 0, Outcome::Done);
    }
    let frame = pool.alloc().unwrap();
    let one_more = AssertUnwindSafe(|| cq_producer.push(Class::Read, frame, 0, Outcome::Done));
    assert!(catch_unwind(one_more).is_err());
    assert_eq!(pool.slots_out(), 2);
    let foreign = self::pool(1);
    let frame = foreign.alloc().unwrap();
    let stranger = AssertUnwindSafe(|| cq_producer.push(Class::Read, frame, 0, Outcome::Done));
    assert!(catch_unwind(stranger).is_err());
    assert_eq!(foreign.slots_out(), 0);
    drop((sq_producer, cq_consumer, sq_consumer, cq_producer));
    assert_eq!(pool.slots_out(), 0);
}

#[test]
fn a_full_class_leaves_space_for_the_others() {
    let pool = pool(2);
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(1, 1, 1), regions(&pool), 0);
    let push = |class| sq_producer.push(class, pool.alloc().unwrap(), 0);
    push(Class::Read).unwrap();
    assert_eq!(sq_producer.check(Class::Read), Err(PushError::NoCredit));
    assert_eq!(sq_producer.check(Class::Write), Ok(()));
    sq_producer.push_cancel(None, 1).unwrap();
    assert_eq!(sq_producer.push_cancel(None, 1), Err(PushError::NoCredit));
    sq_producer.push(Class::Write, pool.alloc().unwrap(), 2).unwrap();
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), 3);
}

/// Goal: a credit comes back to the class that it was taken from, also that of a cancel of everything, which
/// has a number of its own. Method: rounds of one entry of a class, each until no credit is left.
#[test]
fn a_credit_comes_back_to_its_class() {
    let pool = pool(1);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(1, 1, 1), regions(&pool), 0);
    let classes = [Class::Read, Class::Write, Class::Cancel];
    let available = |sq_producer: &SqProducer| classes.map(|class| sq_producer.available(class));
    for round in 0..3 {
        for all in [true, false] {
            sq_producer.push_cancel((!all).then_some(7), round).expect("it has come back");
            assert_eq!(available(&sq_producer), [1, 1, 0]);
            sq_producer.publish();
            sq_consumer.ready();
            assert!(sq_consumer.pop().is_some());
            cq_producer.push_cancel(all, 0, round);
            cq_producer.publish();
            cq_consumer.ready();
            assert!(cq_consumer.pop().is_some());
            assert_eq!(available(&sq_producer), [1; 3]);
        }
        for (class, left) in [(Class::Read, [0, 1, 1]), (Class::Write, [1, 0, 1])] {
            sq_producer.push(class, pool.alloc().unwrap(), round).expect("it has come back");
            assert_eq!(available(&sq_producer), left);
            sq_producer.publish();
            sq_consumer.ready();
            let (buffer, _) = sq_consumer.front().expect("it was published").take();
            sq_consumer.retire();
            cq_producer.push(class, buffer, round, Outcome::Done);
            cq_producer.publish();
            cq_consumer.ready();
            drop(cq_consumer.pop().expect("it is done"));
            assert_eq!(available(&sq_producer), [1; 3]);
        }
    }
}

/// A cancel carries no frame. If one came through `push`, its credit would be returned to another
/// class.
#[test]
fn a_cancel_with_a_frame_is_refused_and_costs_nothing() {
    let pool = pool(1);
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(1, 1, 1), regions(&pool), 0);
    let frame = pool.alloc().unwrap();
    let (reason, frame) = sq_producer.push(Class::Cancel, frame, 7).unwrap_err();
    assert_eq!(reason, PushError::WrongClass);
    assert_eq!(
        [Class::Read, Class::Write, Class::Cancel].map(|c| sq_producer.available(c)),
        [1; 3]
    );
    assert!(!sq_producer.publish());
    assert_eq!(sq_consumer.ready(), 0);
    sq_producer.push(Class::Write, frame, 8).unwrap();
}

#[test]
fn depths_make_an_sq_with_space_for_every_credit() {
    assert_eq!(Depths::new(1, 1, 1).sq, 4);
    assert_eq!(Depths::new(2, 2, 0).sq, 4);
    assert_eq!(Depths::new(u32::MAX, u32::MAX, 1).sq, vmring_core::DEPTH_MAX);
}

#[test]
#[should_panic(expected = "power of two")]
fn an_sq_whose_size_is_not_a_power_of_two_is_a_programmers_mistake() {
    rings(Depths { read: 1, write: 1, cancel: 1, sq: 3 }, regions(&pool(1)), 0);
}

/// The sum is not computed modulo 2^32, which would leave the CQ with fewer cells than credits.
#[test]
fn more_credits_than_a_ring_may_have_are_a_programmers_mistake() {
    let max = vmring_core::DEPTH_MAX;
    for (read, write, cancel) in
        [(1 << 31, 1 << 31, 1), (max, 0, 1), (max / 2, max / 2, 1), (u32::MAX, u32::MAX, u32::MAX)]
    {
        let depths = Depths { read, write, cancel, sq: 4 };
        let made = std::panic::catch_unwind(|| rings(depths, regions(&pool(1)), 0));
        let panic = made.err().unwrap_or_else(|| panic!("{depths:?} were taken"));
        let message = panic.downcast_ref::<String>().expect("it says why");
        assert!(message.contains("credits"), "{message}");
    }
}

#[test]
fn regions_are_between_one_pool_and_65536() {
    assert!(Regions::new(Vec::new()).is_none());
    let pool = pool(1);
    assert!(Regions::new(vec![pool.clone(); 1 << 16]).is_some());
    assert!(Regions::new(vec![pool.clone(); (1 << 16) + 1]).is_none());
    let listed = Regions::new(vec![pool.clone(), self::pool(2)]).unwrap();
    let slots: Vec<_> = listed.pools().iter().map(|pool| pool.layout().slots).collect();
    assert_eq!(slots, [1, 2]);
}

#[test]
fn a_backing_is_empty_if_it_has_no_bytes() {
    assert!(HeapBacking::new(0).is_empty());
    assert!(!HeapBacking::new(1).is_empty() && HeapBacking::new(1).len() == 1);
}

#[test]
fn an_entry_of_any_region_comes_back_as_a_frame_of_its_pool() {
    let pools: Vec<_> = (0..300).map(|_| pool(1)).collect();
    let (sq_producer, _cq_consumer, mut sq_consumer, _cq_producer) =
        rings(Depths::new(0, 512, 0), Regions::new(pools.clone()).unwrap(), u32::MAX);
    for pool in &pools {
        sq_producer.push(Class::Write, pool.alloc().unwrap(), 0).unwrap();
    }
    sq_producer.publish();
    assert_eq!(sq_consumer.ready(), 300);
    for pool in &pools {
        let Some(Submission::Packet { class: Class::Write, buffer: frame, .. }) = sq_consumer.pop()
        else {
            panic!("one is missing")
        };
        assert!(pool.owns(frame.frame().unwrap()));
    }
}

// ------------------------------------------------------------------------------------------------
// Frames and pools

#[test]
fn a_layout_that_cannot_be_is_refused_with_its_reason() {
    let new = |slots, slot_size, headroom| {
        Pool::new(Box::new(HeapBacking::new(1024)), Layout { slots, slot_size, headroom })
            .map(|pool| pool.capacity())
    };
    assert_eq!(new(16, 64, 0), Ok(64));
    assert_eq!(new(16, 64, 63), Ok(1));
    assert_eq!(new(1, 1, 0), Ok(1));
    assert_eq!(new(0, 64, 0), Err(LayoutError::Zero));
    assert_eq!(new(16, 0, 0), Err(LayoutError::Zero));
    assert_eq!(new(1 << 31, 1, 0), Err(LayoutError::TooLarge));
    assert_eq!(new(1, 1 << 31, 0), Err(LayoutError::TooLarge));
    assert_eq!(new(16, 64, 64), Err(LayoutError::NoSpace));
    assert_eq!(new(16, 64, u32::MAX), Err(LayoutError::NoSpace));
    assert_eq!(new(17, 64, 0), Err(LayoutError::NotEnoughMemory));
    let most = (1 << 31) - 1;
    assert_eq!(new(most, most, 0), Err(LayoutError::NotEnoughMemory));
}

#[test]
fn a_refused_layout_frees_its_memory() {
    let freed = Arc::new(AtomicUsize::new(0));
    let backing = Counted { bytes: HeapBacking::new(1), freed: freed.clone() };
    assert!(Pool::new(Box::new(backing), layout(1)).is_err());
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

/// The error of a frame without an offload header.
fn space_of(error: FrontError) -> OutOfSpace {
    match error {
        FrontError::Space(error) => error,
        error => panic!("there is no header: {error}"),
    }
}

#[test]
fn an_error_about_space_says_what_was_asked_and_what_there_is() {
    let mut frame = pool(1).alloc().unwrap();
    let error = frame.set_len(49).unwrap_err();
    assert_eq!(error.to_string(), "49 bytes were requested, but only 48 are available");
    let error = frame.copy_from(&[0; 100]).unwrap_err();
    assert_eq!(error, OutOfSpace { wanted: 100, available: 48 });
    let refused = OutOfSpace { wanted: usize::MAX, available: 0 };
    assert_eq!(frame.trim_front(usize::MAX), Err(FrontError::Space(refused)));
}

#[test]
fn frames_are_disjoint_and_aligned_pieces_of_the_memory() {
    let pool = pool(8);
    let mut frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    assert_eq!(frames.len(), 8);
    for frame in &mut frames {
        frame.grow_front(HEADROOM as usize).unwrap();
        frame.set_len(SLOT_SIZE as usize).unwrap();
        let slot = frame.slot() as u8;
        frame.fill(slot);
    }
    let base = frames.iter().map(|frame| frame.as_ptr() as usize).min().unwrap();
    for frame in &frames {
        assert!(frame.iter().all(|&byte| u32::from(byte) == frame.slot()));
        let place = (frame.as_ptr() as usize - base) as u32;
        assert_eq!(place, frame.slot() * SLOT_SIZE);
    }
}

#[test]
fn the_memory_outlives_the_pools_handles_until_the_last_frame_returns() {
    let (pool, freed) = counted(3);
    let other = pool.clone();
    let mut frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    drop((pool, other));
    for frame in &mut frames {
        frame.copy_from(b"still here").unwrap();
    }
    while let Some(frame) = frames.pop() {
        assert_eq!(freed.load(Ordering::SeqCst), 0);
        assert_eq!(&*frame, b"still here");
    }
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

#[test]
fn the_memory_outlives_a_ring_that_is_dropped_with_entries_inside() {
    let (pool, freed) = counted(3);
    let (sq_producer, cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(3, 0, 0), regions(&pool), u32::MAX);
    let mut last = pool.alloc().unwrap();
    for user_data in 0..2 {
        sq_producer.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
    }
    sq_producer.publish();
    sq_consumer.ready();
    let Some(Submission::Packet { class: Class::Read, user_data, buffer: frame }) =
        sq_consumer.pop()
    else {
        panic!("no entry")
    };
    cq_producer.push(Class::Read, frame, user_data, Outcome::Done);
    drop(pool);
    drop((sq_producer, cq_consumer, sq_consumer, cq_producer));
    assert_eq!(freed.load(Ordering::SeqCst), 0);
    last.copy_from(b"still here").unwrap();
    drop(last);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

#[test]
fn frames_dropped_on_other_threads_return() {
    let (pool, freed) = counted(64);
    let frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    assert_eq!(pool.slots_out(), 64);
    let mut frames = frames.into_iter();
    thread::scope(|scope| {
        for _ in 0..4 {
            let some: Vec<_> = frames.by_ref().take(16).collect();
            scope.spawn(move || drop(some));
        }
    });
    assert_eq!(pool.slots_out(), 0);
    let again: BTreeSet<_> = std::iter::from_fn(|| pool.alloc())
        .map(|frame| (frame.slot(), frame.len()))
        .take(64)
        .collect();
    // Each was dropped at once, so the slot that returned last is given out again and again.
    assert_eq!(again.len(), 1);
    drop(pool);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

/// Four threads take and return the slots of one small pool. Each thread writes its number over the
/// whole slot and must find it there before it returns the slot.
#[test]
fn no_slot_has_two_owners_under_load() {
    let rounds = scale(100_000, 1_000);
    let (pool, freed) = counted(5);
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for number in 0..4_u8 {
            let (pool, barrier) = (pool.clone(), &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut held = VecDeque::new();
                for round in 0..rounds {
                    if let Some(mut frame) = pool.alloc() {
                        frame.set_len(CAPACITY).unwrap();
                        frame.fill(number);
                        held.push_back(frame);
                    }
                    if held.len() > (round % 3) as usize {
                        let frame = held.pop_front().unwrap();
                        assert!(frame.iter().all(|&byte| byte == number), "two owners");
                    }
                }
            });
        }
    });
    assert_eq!(pool.slots_out(), 0);
    drop(pool);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

// ------------------------------------------------------------------------------------------------
// The doorbell, on one thread

/// Counts the calls and notes the last timeout.
#[derive(Default)]
struct Counts {
    parks: AtomicUsize,
    unparks: AtomicUsize,
    timeout: Mutex<Option<Duration>>,
}

impl Park for Counts {
    fn park(&self, timeout: Option<Duration>) {
        self.parks.fetch_add(1, Ordering::SeqCst);
        *self.timeout.lock().unwrap() = timeout;
    }

    fn unpark(&self) {
        self.unparks.fetch_add(1, Ordering::SeqCst);
    }
}

/// Each step of the doorbell says what it did. An `Arc` of a `Park` passes both calls on.
#[test]
fn a_doorbell_says_whom_it_woke() {
    let park = Arc::new(Counts::default());
    let bell = Doorbell::new(Arc::clone(&park));
    let unparks = || park.unparks.load(Ordering::SeqCst);
    assert!(!bell.is_armed() && !bell.ring() && !bell.ring_oneself() && !bell.disarm());
    assert_eq!(unparks(), 0, "nobody sleeps");
    bell.arm();
    assert!(bell.is_armed() && bell.disarm() && !bell.is_armed() && !bell.disarm());
    bell.arm();
    assert!(!bell.ring_if(|| false) && bell.is_armed(), "it waits for something else");
    assert!(bell.ring() && !bell.ring() && !bell.disarm());
    bell.arm();
    assert!(bell.ring_oneself() && !bell.ring_oneself());
    assert_eq!(unparks(), 2);

    let timeout = Some(Duration::from_secs(7));
    assert!(!bell.sleep(timeout, || true), "there is work");
    assert_eq!((park.parks.load(Ordering::SeqCst), bell.is_armed()), (0, false));
    assert!(bell.sleep(timeout, || false));
    assert_eq!((park.parks.load(Ordering::SeqCst), bell.is_armed()), (1, false));
    assert_eq!(*park.timeout.lock().unwrap(), timeout);
}

// ------------------------------------------------------------------------------------------------
// Threads

/// Parks like `std::thread::park`, but is not bound to a thread.
#[derive(Default)]
struct Token {
    there: Mutex<bool>,
    wakeup: Condvar,
}

impl Park for Token {
    fn park(&self, timeout: Option<Duration>) {
        assert_eq!(timeout, None);
        let there = self.there.lock().unwrap();
        *self.wakeup.wait_while(there, |there| !*there).unwrap() = false;
    }

    fn unpark(&self) {
        *self.there.lock().unwrap() = true;
        self.wakeup.notify_one();
    }
}

/// A checksum that differs if bytes are of another packet, if the length differs, or if the order
/// does.
fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ bytes.len() as u64, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5)
    })
}

/// Packet number `n`: its checksum, and then bytes that depend on `n`.
fn write_packet(frame: &mut Frame, n: u64) {
    frame.reset();
    let len = 8 + (n % (CAPACITY as u64 - 7)) as usize;
    frame.set_len(len).unwrap();
    for (i, byte) in frame[8..].iter_mut().enumerate() {
        *byte = (n as usize).wrapping_mul(31).wrapping_add(i) as u8;
    }
    let sum = checksum(n, &frame[8..]);
    frame[..8].copy_from_slice(&sum.to_be_bytes());
}

fn check_packet(frame: &Frame, n: u64) {
    let view = frame.view();
    assert_eq!(view.be64(0), Some(checksum(n, &frame[8..])), "packet {n} is not whole");
}

/// A device that fills reads and checks writes, both in order. It sleeps when it has nothing to do.
fn serve(
    mut sq_consumer: SqConsumer,
    mut cq_producer: CqProducer,
    bells: &[Doorbell<Token>; 2],
    total: u64,
) {
    let (mut reads, mut writes) = (0, 0);
    while reads + writes < total {
        if sq_consumer.ready() == 0 {
            bells[0].sleep(None, || sq_consumer.ready() > 0);
            continue;
        }
        while let Some(submission) = sq_consumer.pop() {
            match submission {
                Submission::Packet { class: Class::Read, user_data, buffer: mut frame } => {
                    write_packet(frame.frame_mut().unwrap(), reads);
                    reads += 1;
                    cq_producer.push(Class::Read, frame, user_data, Outcome::Done);
                }
                Submission::Packet { class: Class::Write, user_data, buffer: frame } => {
                    check_packet(frame.frame().unwrap(), writes);
                    writes += 1;
                    cq_producer.push(Class::Write, frame, user_data, Outcome::Done);
                }
                _ => unreachable!("nobody cancels"),
            }
        }
        cq_producer.publish();
        bells[1].ring();
    }
}

/// One thread submits and reaps, the other serves. Both sleep on doorbells without a timeout, so a
/// lost wake-up hangs the test.
#[test]
fn two_threads_pass_whole_packets_both_ways_and_wake_each_other() {
    let each = scale(200_000, 2_000);
    let pool = pool(48);
    let (sq_producer, mut cq_consumer, sq_consumer, cq_producer) =
        rings(Depths { read: 16, write: 16, cancel: 0, sq: 8 }, regions(&pool), u32::MAX - 999);
    let bells = Arc::new([(); 2].map(|()| Doorbell::new(Token::default())));
    let poller = thread::spawn({
        let bells = bells.clone();
        move || serve(sq_consumer, cq_producer, &bells, 2 * each)
    });
    let mut frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    let (mut asked, mut sent, mut arrived, mut written) = (0, 0, 0, 0);
    while arrived + written < 2 * each {
        loop {
            // Reads and writes take turns, so that neither direction waits for the other.
            let class = if asked <= sent && asked < each { Class::Read } else { Class::Write };
            let count = if class == Class::Read { &mut asked } else { &mut sent };
            if *count == each {
                break;
            }
            let Some(mut frame) = frames.pop() else { break };
            if class == Class::Write {
                write_packet(&mut frame, *count);
            }
            match sq_producer.push(class, frame, *count) {
                Ok(()) => *count += 1,
                Err((refusal, frame)) => {
                    assert_ne!(refusal, PushError::ForeignPool);
                    frames.push(frame);
                    break;
                }
            }
        }
        if sq_producer.publish() {
            bells[0].ring();
        }
        if cq_consumer.ready() == 0 {
            bells[1].sleep(None, || cq_consumer.ready() > 0);
        }
        cq_consumer.ready();
        while let Some(reaped) = cq_consumer.pop() {
            let frame = reaped.frame.unwrap();
            if reaped.opcode == Opcode::Read {
                assert_eq!(reaped.user_data, arrived);
                assert_eq!(reaped.len as usize, frame.len());
                check_packet(&frame, arrived);
                arrived += 1;
            } else {
                assert_eq!(reaped.user_data, written);
                written += 1;
            }
            frames.push(frame);
        }
    }
    poller.join().unwrap();
    assert_eq!(cq_consumer.in_flight(), 0);
    drop(frames);
    assert_eq!(pool.slots_out(), 0);
}

/// One thread submits, one serves, and one reaps and drops the frames. The first thread takes them
/// from the free list again.
#[test]
fn three_threads_share_a_ring_and_a_free_list() {
    let total = scale(200_000, 2_000);
    let pool = pool(8);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths { read: 4, write: 0, cancel: 0, sq: 2 }, regions(&pool), u32::MAX - 500);
    thread::scope(|scope| {
        let pool = &pool;
        scope.spawn(move || {
            let mut asked = 0;
            while asked < total {
                let taken = match pool.alloc() {
                    Some(frame) => sq_producer.push(Class::Read, frame, asked).is_ok(),
                    None => false,
                };
                if taken {
                    sq_producer.publish();
                    asked += 1;
                } else {
                    thread::yield_now();
                }
            }
        });
        scope.spawn(|| {
            let mut served = 0;
            while served < total {
                if sq_consumer.ready() == 0 {
                    thread::yield_now();
                }
                while let Some(submission) = sq_consumer.pop() {
                    let Submission::Packet { class: Class::Read, user_data, buffer: mut frame } =
                        submission
                    else {
                        unreachable!("nobody writes or cancels")
                    };
                    assert_eq!(user_data, served);
                    write_packet(frame.frame_mut().unwrap(), served);
                    cq_producer.push(Class::Read, frame, user_data, Outcome::Done);
                    served += 1;
                }
                cq_producer.publish();
            }
        });
        let mut arrived = 0;
        while arrived < total {
            if cq_consumer.ready() == 0 {
                thread::yield_now();
            }
            while let Some(reaped) = cq_consumer.pop() {
                assert_eq!(reaped.user_data, arrived);
                check_packet(&reaped.frame.unwrap(), arrived);
                arrived += 1;
            }
        }
    });
    assert_eq!(pool.slots_out(), 0);
}

/// Goal: entries move to the CQ of their own ring only, because a region's number says nothing in another.
/// Method: two rings of the same pool.
#[test]
fn writes_end_in_the_queue_of_their_own_ring() {
    let pool = pool(2);
    let ring = || rings(Depths::new(1, 1, 1), Regions::new(vec![pool.clone()]).expect("one"), 0);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) = ring();
    let (.., mut foreign) = ring();
    let mut frame = pool.alloc().expect("a free slot");
    frame.copy_from(b"packet").expect("it fits");
    sq_producer.push(Class::Write, frame, 7).expect("a credit");
    sq_producer.publish();
    sq_consumer.ready();
    let all = |_: &Buffer| true;
    assert_eq!(sq_consumer.end_writes(&mut foreign, 9, all), 0);
    assert_eq!(sq_consumer.end_pairs(&mut foreign, 9, |_, _| true), 0);
    let none = sq_consumer.with_leading_frames(&mut foreign, 9, |_, _| true, |it| it.is_empty());
    assert!(none);
    assert_eq!(sq_consumer.end_writes(&mut cq_producer, 9, all), 1);
    cq_producer.publish();
    cq_consumer.ready();
    let done = cq_consumer.pop().expect("it is done");
    assert_eq!((done.user_data, done.opcode, done.outcome), (7, Opcode::Write, Outcome::Done));
    assert_eq!(done.frame.as_deref(), Some(&b"packet"[..]));
}

/// Goal: the oldest writes are a list that gets shorter as they end, whatever is asked for. Method: two of
/// three writes are alike.
#[test]
fn leading_frames_are_counted_as_they_end() {
    let pool = pool(3);
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(3, 3, 3), Regions::new(vec![pool.clone()]).expect("one"), 0);
    for (user_data, packet) in [&b"one"[..], b"two", b"three"].into_iter().enumerate() {
        let mut frame = pool.alloc().expect("a free slot");
        frame.copy_from(packet).expect("it fits");
        sq_producer.push(Class::Write, frame, user_data as u64).expect("a credit");
    }
    sq_producer.publish();
    sq_consumer.ready();
    let like = |_: &Buffer, packet: &[u8]| packet.len() == 3;
    sq_consumer.with_leading_frames(&mut cq_producer, 9, like, |frames| {
        assert_eq!((frames.len(), frames.is_empty()), (2, false));
        assert_eq!(frames.packets().collect::<Vec<_>>(), [b"one", b"two"]);
        frames.end(1);
        assert_eq!((frames.len(), frames.is_empty()), (1, false));
        assert_eq!(frames.packets().collect::<Vec<_>>(), [b"two"]);
        frames.end(9);
        assert_eq!((frames.len(), frames.is_empty()), (0, true));
        assert_eq!(frames.packets().len(), 0);
    });
    cq_producer.publish();
    cq_consumer.ready();
    let mut done = || cq_consumer.pop().map(|done| done.user_data);
    assert_eq!([done(), done(), done()], [Some(0), Some(1), None]);
}

/// Goal: entries move to a CQ that was full and was reaped since, and no more entries than there are. Method:
/// rounds in the same cells. The first ones move entry by entry, until at some time the CQ's producer knows
/// of no space. Behind the last pair are the entries of earlier rounds.
#[test]
fn pairs_move_as_far_as_there_are_entries() {
    let pool = pool(8);
    for singly in 0..8 {
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(4, 4, 1), regions(&pool), 0);
        for round in 0..=singly + 4 {
            let pairs = if round < singly + 4 { 4 } else { 1 };
            for class in [Class::Write, Class::Read].repeat(pairs as usize) {
                sq_producer.push(class, pool.alloc().unwrap(), 0).unwrap();
            }
            sq_producer.publish();
            sq_consumer.ready();
            if round < singly {
                while let Some(sqe) = sq_consumer.front() {
                    let class = sqe.class();
                    let (buffer, user_data) = sqe.take();
                    cq_producer.push(class, buffer, user_data, Outcome::Done);
                }
            } else {
                assert_eq!(sq_consumer.end_pairs(&mut cq_producer, 9, |_, _| true), pairs);
            }
            sq_consumer.retire();
            cq_producer.publish();
            assert_eq!(cq_consumer.ready(), 2 * pairs);
            cq_consumer.pop_all(drop);
            assert_eq!(pool.slots_out(), 0);
        }
    }
}

/// Goal: a pair moves only if its packet was passed, and a packet is not passed to a read that has no space for
/// it.
#[test]
fn a_pair_whose_packet_is_not_passed_stays() {
    let pool = pool(2);
    for is_short in [false, true] {
        let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
            rings(Depths::new(1, 1, 1), regions(&pool), 0);
        let mut write = pool.alloc().expect("a free slot");
        write.copy_from(&[7; CAPACITY]).expect("it fits");
        let mut read = pool.alloc().expect("a free slot");
        if is_short {
            read.set_len(1).expect("there is space for a byte");
            read.trim_front(1).expect("there is a byte");
        }
        sq_producer.push(Class::Write, write, 0).expect("a credit");
        sq_producer.push(Class::Read, read, 1).expect("a credit");
        sq_producer.publish();
        sq_consumer.ready();
        let mut end = |is_passed: bool| {
            let mut calls = 0;
            let ended = sq_consumer.end_pairs(&mut cq_producer, 9, |packet, space| {
                calls += 1;
                space.copy_from_slice(packet);
                is_passed
            });
            (ended, calls)
        };
        let expected = if is_short { [(0, 0), (0, 0)] } else { [(0, 1), (1, 1)] };
        assert_eq!([end(false), end(true)], expected);
        cq_producer.publish();
        assert_eq!(cq_consumer.ready(), if is_short { 0 } else { 2 });
        let done: Vec<_> = std::iter::from_fn(|| cq_consumer.pop()).collect();
        let received = done.last().and_then(|done| done.frame.as_deref());
        assert_eq!(received, (!is_short).then_some(&[7; CAPACITY][..]));
    }
    assert_eq!(pool.slots_out(), 0);
}

/// Goal: a run of completions takes no more than its number, and no packet that its frame has no bytes for.
/// What it does not take comes back whole.
#[test]
fn a_run_of_completions_gives_back_what_it_does_not_take() {
    let pool = pool(2);
    let regions = Regions::new(vec![pool.clone()]).expect("one");
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(2, 1, 1), regions, 0);
    for number in 0..2 {
        let frame = pool.alloc().expect("a free slot");
        sq_producer.push(Class::Read, frame, number).expect("a credit");
    }
    sq_producer.publish();
    sq_consumer.ready();
    let mut taken: Vec<_> = sq_consumer.reads(2).collect();
    let [mut second, mut first] = [(); 2].map(|()| taken.pop().map(|(buffer, _)| buffer));
    let mut run = cq_producer.done_reads(1);
    assert!(!run.push(&mut first, CAPACITY + 1, 0) && first.is_some(), "it is too long");
    assert!(run.push(&mut first, CAPACITY, 0) && first.is_none(), "it fits");
    assert!(!run.push(&mut first, 1, 1), "there is no buffer");
    assert!(!run.push(&mut second, 1, 1), "one was wanted");
    drop(run);
    let second = second.expect("it was left");
    cq_producer.push(Class::Read, second, 1, Outcome::Cancelled);
    cq_producer.publish();
    cq_consumer.ready();
    let done: Vec<_> = std::iter::from_fn(|| cq_consumer.pop()).collect();
    let seen: Vec<_> = done.iter().map(|it| (it.user_data, it.len as usize, it.outcome)).collect();
    assert_eq!(seen, [(0, CAPACITY, Outcome::Done), (1, 0, Outcome::Cancelled)]);
    drop(done);
    assert_eq!(pool.slots_out(), 0);
}

/// Goal: if the device panics while it looks at a write, the write is in one place. Method: a panic at the
/// second of three; then the first is done, and the others can be taken.
#[test]
fn a_panic_leaves_a_write_in_its_queue() {
    let pool = pool(4);
    let regions = Regions::new(vec![pool.clone()]).expect("one");
    let (sq_producer, mut cq_consumer, mut sq_consumer, mut cq_producer) =
        rings(Depths::new(1, 3, 1), regions, u32::MAX);
    for number in 0..3 {
        let frame = pool.alloc().expect("a free slot");
        sq_producer.push(Class::Write, frame, number).expect("a credit");
    }
    sq_producer.publish();
    sq_consumer.ready();
    let mut looks = 0;
    let ended = catch_unwind(AssertUnwindSafe(|| {
        sq_consumer.end_writes(&mut cq_producer, 9, |_| {
            looks += 1;
            assert!(looks < 2, "the device's panic");
            true
        })
    }));
    assert!(ended.is_err());
    assert_eq!((sq_consumer.known(), pool.slots_out()), (2, 3));
    assert_eq!(sq_consumer.end_writes(&mut cq_producer, 1, |_| true), 1);
    drop((sq_producer, sq_consumer));
    cq_producer.publish();
    cq_consumer.ready();
    let done: Vec<_> = std::iter::from_fn(|| cq_consumer.pop()).map(|it| it.user_data).collect();
    assert_eq!(done, [0, 1]);
    drop((cq_consumer, cq_producer));
    assert_eq!(pool.slots_out(), 0);
}
