//! The four halves of a ring against a plain model, and the frames and pools under them.
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
use vmring_core::{
    Backing, Class, Depths, Frame, FrontError, HeapBacking, Intake, Layout, LayoutError, Opcode,
    OutOfRoom, Outcome, Outlet, Pool, Reaper, Refusal, Regions, Submission, Submitter, rings,
};

/// The default, with failing cases kept beside those of the other crates.
fn config() -> ProptestConfig {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../proptest-regressions/ring-queues.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    }
}

/// `full`, or `small` where every step is slow: `VMRING_TEST_SCALE=small`.
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

/// Memory that counts how often it was freed.
struct Counted {
    bytes: HeapBacking,
    freed: Arc<AtomicUsize>,
}

// SAFETY: the bytes are those of a `HeapBacking`, given to nobody else.
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
        write: bool,
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
    /// Opens parcels up to a cancel, and lets the last one go.
    Open(usize),
    Retire,
    /// Counts the leading packets of a class that are at most so long.
    Leading {
        write: bool,
        most: u32,
        len: usize,
    },
    /// Completes one of the entries the poller has, in any order.
    Complete {
        which: usize,
        outcome: Outcome,
        len: usize,
    },
    Show,
    LookForCompletions,
    Reap {
        count: usize,
        keep: bool,
    },
    DropSubmitter,
    DropReaper,
    DropIntake,
    DropOutlet,
}

fn op() -> impl Strategy<Value = Op> {
    let outcome = prop_oneof![
        5 => Just(Outcome::Done),
        1 => Just(Outcome::Cancelled),
        1 => any::<u32>().prop_map(Outcome::Refused),
    ];
    prop_oneof![
        60 => (0..2_usize).prop_map(|pool| Op::Alloc { pool }),
        10 => any::<usize>().prop_map(Op::DropFrame),
        80 => (any::<bool>(), any::<usize>(), 0..=CAPACITY, 0..=CAPACITY)
            .prop_map(|(write, frame, len, trim)| Op::Push { write, frame, len, trim }),
        5 => any::<bool>().prop_map(|write| Op::PushForeign { write }),
        15 => proptest::option::of(0..50_u64).prop_map(Op::PushCancel),
        50 => Just(Op::Publish),
        40 => Just(Op::Look),
        30 => (1..5_usize).prop_map(Op::Take),
        60 => (0..4_usize).prop_map(Op::Open),
        40 => Just(Op::Retire),
        30 => (any::<bool>(), 0..6_u32, 0..=CAPACITY)
            .prop_map(|(write, most, len)| Op::Leading { write, most, len }),
        70 => (any::<usize>(), outcome, 0..=CAPACITY)
            .prop_map(|(which, outcome, len)| Op::Complete { which, outcome, len }),
        50 => Just(Op::Show),
        40 => Just(Op::LookForCompletions),
        60 => (1..5_usize, any::<bool>()).prop_map(|(count, keep)| Op::Reap { count, keep }),
        1 => Just(Op::DropSubmitter),
        1 => Just(Op::DropReaper),
        1 => Just(Op::DropIntake),
        1 => Just(Op::DropOutlet),
    ]
}

/// A frame as it must come out again.
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
    Cancel(Option<u64>),
}

impl Ask {
    fn packet(&self) -> Option<&Packet> {
        match self {
            Ask::Read(packet) | Ask::Write(packet) => Some(packet),
            Ask::Cancel(_) => None,
        }
    }

    fn class(&self) -> Class {
        match self {
            Ask::Read(_) => Class::Read,
            Ask::Write(_) => Class::Write,
            Ask::Cancel(_) => Class::Cancel,
        }
    }

    fn opcode(&self) -> Opcode {
        match self {
            Ask::Read(_) => Opcode::Read,
            Ask::Write(_) => Opcode::Write,
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

/// The real halves and, beside them, what must be where.
struct World {
    pools: [Pool; 2],
    foreign: Pool,
    depths: Depths,
    start: u32,
    submitter: Option<Submitter>,
    reaper: Option<Reaper>,
    intake: Option<Intake>,
    outlet: Option<Outlet>,

    user: Vec<Frame>,
    next_user_data: u64,
    in_flight: [u32; 3],
    /// Written to the SQ and not taken; the last `sq_hidden` are not published.
    sq: VecDeque<(u64, Ask)>,
    sq_hidden: usize,
    /// Of `sq`, what the intake saw at its last look.
    sq_known: usize,
    /// Opened, and still taking room in the SQ.
    sq_opened: usize,
    device: Vec<(u64, Ask, Option<Frame>)>,
    cq: VecDeque<Done>,
    cq_hidden: usize,
    cq_known: usize,
    submissions_shown: u32,
    completions_shown: u32,
    reaped: u32,
}

impl World {
    fn new(depths: Depths, slots: [u32; 2], start: u32) -> Self {
        let pools = slots.map(pool);
        let regions = Regions::new(pools.to_vec()).unwrap();
        let (submitter, reaper, intake, outlet) = rings(depths, regions, start);
        Self {
            pools,
            foreign: pool(1),
            depths,
            start,
            submitter: Some(submitter),
            reaper: Some(reaper),
            intake: Some(intake),
            outlet: Some(outlet),
            user: Vec::new(),
            next_user_data: 0,
            in_flight: [0; 3],
            sq: VecDeque::new(),
            sq_hidden: 0,
            sq_known: 0,
            sq_opened: 0,
            device: Vec::new(),
            cq: VecDeque::new(),
            cq_hidden: 0,
            cq_known: 0,
            submissions_shown: 0,
            completions_shown: 0,
            reaped: 0,
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

    /// What the submitter must say to one more entry of `class`.
    fn refusal(&self, class: Class) -> Option<Refusal> {
        if self.in_flight[class as usize] == self.depth(class) {
            Some(Refusal::NoCredit)
        } else if (self.sq.len() + self.sq_opened) as u32 == self.depths.sq {
            Some(Refusal::SqFull)
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

    fn push(&mut self, write: bool, mut frame: Frame) {
        let user_data = self.next_user_data;
        self.next_user_data += 1;
        let class = if write { Class::Write } else { Class::Read };
        if !frame.is_empty() {
            frame[0] = user_data as u8;
        }
        let pool = self.pools.iter().position(|pool| pool.owns(&frame));
        let foreign = pool.is_none().then_some(Refusal::ForeignPool);
        let expected = self.refusal(class).or(foreign);
        let before = (frame.slot(), frame.headroom(), frame.to_vec());
        let Some(submitter) = &mut self.submitter else { return };
        match submitter.push(class, frame, user_data) {
            Ok(()) => {
                assert_eq!(expected, None);
                let (slot, headroom, bytes) = before;
                let packet = Packet { pool: pool.unwrap(), slot, headroom, bytes };
                let ask = if write { Ask::Write(packet) } else { Ask::Read(packet) };
                self.submitted(user_data, ask);
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
            Op::Push { write, frame, len, trim } => {
                if self.user.is_empty() || self.submitter.is_none() {
                    return;
                }
                let mut frame = self.user.swap_remove(frame % self.user.len());
                frame.reset();
                frame.set_len(len).unwrap();
                frame.fill(len as u8);
                frame.trim_front(trim.min(len)).unwrap();
                self.push(write, frame);
            }
            Op::PushForeign { write } => {
                let frame = self.foreign.alloc().expect("it came back each time");
                self.push(write, frame);
            }
            Op::PushCancel(target) => {
                let user_data = self.next_user_data;
                self.next_user_data += 1;
                let expected = self.refusal(Class::Cancel);
                let Some(submitter) = &mut self.submitter else { return };
                assert_eq!(submitter.push_cancel(target, user_data).err(), expected);
                if expected.is_none() {
                    self.submitted(user_data, Ask::Cancel(target));
                }
            }
            Op::Publish => {
                let Some(submitter) = &mut self.submitter else { return };
                assert_eq!(submitter.publish(), self.sq_hidden > 0);
                self.show_submissions();
            }
            Op::Look => {
                let Some(intake) = &mut self.intake else { return };
                self.sq_known = self.sq.len() - self.sq_hidden;
                assert_eq!(intake.ready() as usize, self.sq_known);
            }
            Op::Take(count) => {
                for _ in 0..count {
                    self.take();
                }
            }
            Op::Open(count) => {
                for _ in 0..count {
                    self.open();
                }
                // Looked at and let go, it stays.
                let class = self.intake.as_mut().and_then(Intake::front).map(|it| it.class());
                let next = self.sq.front().filter(|_| self.intake.is_some() && self.sq_known > 0);
                let expected = next.map(|(_, ask)| ask.class());
                assert_eq!(class, expected.filter(|class| *class != Class::Cancel));
            }
            Op::Retire => {
                let Some(intake) = &mut self.intake else { return };
                intake.retire();
                self.sq_opened = 0;
            }
            Op::Leading { write, most, len } => {
                let Some(intake) = &self.intake else { return };
                let class = if write { Class::Write } else { Class::Read };
                let known = self.sq.iter().take(self.sq_known.min(most as usize));
                let expected = known.take_while(|(_, ask)| {
                    ask.class() == class
                        && ask.packet().is_some_and(|packet| packet.bytes.len() <= len)
                });
                let expected = expected.count() as u32;
                assert_eq!(intake.leading(class, most, |bytes| bytes.len() <= len), expected);
            }
            Op::Complete { which, outcome, len } => self.complete(which, outcome, len),
            Op::Show => {
                let Some(outlet) = &mut self.outlet else { return };
                assert_eq!(outlet.publish(), self.cq_hidden > 0);
                self.show_completions();
            }
            Op::LookForCompletions => {
                let Some(reaper) = &mut self.reaper else { return };
                self.cq_known = self.cq.len() - self.cq_hidden;
                assert_eq!(reaper.ready() as usize, self.cq_known);
            }
            Op::Reap { count, keep } => {
                for _ in 0..count {
                    self.reap(keep);
                }
            }
            Op::DropSubmitter => {
                if self.submitter.take().is_some() {
                    self.show_submissions();
                }
            }
            Op::DropReaper => self.reaper = None,
            Op::DropIntake => {
                self.intake = None;
                self.sq_opened = 0;
            }
            Op::DropOutlet => {
                if self.outlet.take().is_some() {
                    self.show_completions();
                }
            }
        }
        // The reaper watches the SQ too.
        if self.submitter.is_none() && self.intake.is_none() && self.reaper.is_none() {
            self.sq.clear();
        }
        if self.outlet.is_none() && self.reaper.is_none() {
            self.cq.clear();
        }
    }

    fn take(&mut self) {
        let Some(intake) = &mut self.intake else { return };
        let submission = intake.pop();
        if self.sq_known == 0 {
            assert!(submission.is_none(), "{submission:?} was not seen at the last look");
            return;
        }
        self.sq_known -= 1;
        self.sq_opened = 0;
        let (expected, ask) = self.sq.pop_front().unwrap();
        let (got, frame) = match (submission.unwrap(), &ask) {
            (Submission::Packet { class: Class::Read, user_data, frame }, Ask::Read(_))
            | (Submission::Packet { class: Class::Write, user_data, frame }, Ask::Write(_)) => {
                (user_data, Some(frame))
            }
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

    fn open(&mut self) {
        let Some(intake) = &mut self.intake else { return };
        assert_eq!(intake.known() as usize, self.sq_known);
        let next = self.sq.front().filter(|(_, ask)| self.sq_known > 0 && ask.packet().is_some());
        let Some(parcel) = intake.front() else {
            assert!(next.is_none(), "{next:?} was not given");
            return;
        };
        let class = parcel.class();
        let (frame, user_data) = parcel.open();
        let (expected, ask) = self.sq.pop_front().unwrap();
        self.sq_known -= 1;
        self.sq_opened += 1;
        assert_eq!((class, user_data), (ask.class(), expected));
        assert_eq!(Some(&self.packet(&frame)), ask.packet());
        self.device.push((user_data, ask, Some(frame)));
    }

    fn complete(&mut self, which: usize, outcome: Outcome, len: usize) {
        if self.device.is_empty() || self.outlet.is_none() {
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
                let outlet = self.outlet.as_mut().unwrap();
                outlet.push(ask.class(), frame, user_data, outcome);
            }
            None => {
                outcome = Outcome::Done;
                let outlet = self.outlet.as_mut().unwrap();
                outlet.push_cancel(ask == Ask::Cancel(None), len, user_data);
            }
        }
        self.cq.push_back(Done { user_data, ask, outcome, len });
        self.cq_hidden += 1;
    }

    fn reap(&mut self, keep: bool) {
        let Some(reaper) = &mut self.reaper else { return };
        let reaped = reaper.pop();
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
        let packet = reaped.frame.as_ref().map(|frame| self.packet(frame));
        assert_eq!(packet.as_ref(), done.ask.packet());
        self.in_flight[done.ask.class() as usize] -= 1;
        if keep {
            self.user.extend(reaped.frame);
        }
    }

    /// The conservation law: how many slots of a pool are not in its free list.
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

        for class in [Class::Read, Class::Write, Class::Cancel] {
            let left = self.depth(class) - self.in_flight[class as usize];
            let refusal = self.refusal(class);
            let depth = self.depth(class);
            let Some(submitter) = &mut self.submitter else { continue };
            assert_eq!(submitter.check(class).err(), refusal);
            assert_eq!(submitter.available(class), left);
            assert_eq!(submitter.depth(class), depth);
        }
        if let Some(reaper) = &self.reaper {
            assert_eq!(reaper.in_flight(), self.submissions_shown - self.reaped);
            assert_eq!(reaper.known() as usize, self.cq_known);
            assert_eq!(reaper.index_of(3), self.start.wrapping_add(self.reaped + 3));
        }
        if let Some(outlet) = &self.outlet {
            assert_eq!(outlet.backlog() as usize, self.cq.len() - self.cq_hidden);
            assert_eq!(outlet.index(), self.start.wrapping_add(self.completions_shown));
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

    /// One place per slot; full and no credit give the frame back; entries come out once, in order,
    /// as they went in; credits come back one by one; whatever half goes first, all frames come
    /// home. After each step every counter that can be asked agrees with the model.
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

    /// A frame's window after any sequence of moves is where plain arithmetic puts it, a refused
    /// move changes nothing, and all ways to look at it agree.
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
            let (room, moved) = match kind {
                0 => {
                    let (room, result) = (SLOT_SIZE as usize - offset, frame.set_len(n));
                    (room, result.map(|()| len = n))
                }
                1 => {
                    let result = frame.trim_front(n).map_err(room_of);
                    (len, result.map(|()| (offset, len) = (offset + n, len - n)))
                }
                2 => (len, frame.trim_back(n).map(|()| len -= n)),
                3 => {
                    let result = frame.grow_front(n).map_err(room_of);
                    (offset, result.map(|()| (offset, len) = (offset - n, len + n)))
                }
                4 => {
                    frame.reset();
                    (offset, len) = (HEADROOM as usize, 0);
                    continue;
                }
                _ => {
                    // What is there already, so that the slot keeps its pattern.
                    let room = SLOT_SIZE as usize - offset;
                    let bytes = vec![0; n];
                    let same = slot[offset..].get(..n).unwrap_or(&bytes);
                    (room, frame.copy_from(same).map(|()| len = n))
                }
            };
            match moved {
                Ok(()) => prop_assert!(n <= room),
                Err(refused) => {
                    prop_assert!(n > room);
                    prop_assert_eq!(refused, OutOfRoom { wanted: n, room });
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
            prop_assert_eq!(&*frame.room_mut(), &slot[offset..]);
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
    let (submitter, mut reaper, mut intake, mut outlet) =
        rings(Depths::new(2, 0, 0), regions(&pool), u32::MAX);
    for user_data in 0..2 {
        submitter.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
    }
    submitter.publish();
    intake.ready();
    while let Some(Submission::Packet { class: Class::Read, user_data, frame }) = intake.pop() {
        outlet.push(Class::Read, frame, user_data, Outcome::Done);
    }
    outlet.publish();
    reaper.ready();
    std::mem::forget(reaper.pop());
    let second = reaper.pop().unwrap();
    assert_eq!(second.user_data, 1);
    // Both credits are back, both entries are gone, one slot is.
    assert_eq!(submitter.available(Class::Read), 2);
    assert!(reaper.pop().is_none());
    drop((submitter, reaper, intake, outlet, second));
    assert_eq!(pool.slots_out(), 1);
}

/// Four entries: two packets, a cancel, a packet.
fn mixed(pool: &Pool) -> (Submitter, Reaper, Intake, Outlet) {
    let depths = Depths { read: 2, write: 2, cancel: 1, sq: 4 };
    let (submitter, reaper, mut intake, outlet) = rings(depths, regions(pool), u32::MAX);
    submitter.push(Class::Read, pool.alloc().unwrap(), 1).unwrap();
    submitter.push(Class::Write, pool.alloc().unwrap(), 2).unwrap();
    submitter.push_cancel(Some(1), 3).unwrap();
    submitter.push(Class::Read, pool.alloc().unwrap(), 4).unwrap();
    submitter.publish();
    assert_eq!(intake.ready(), 4);
    (submitter, reaper, intake, outlet)
}

#[test]
fn packets_are_taken_up_to_a_cancel_and_make_room_together() {
    let pool = pool(4);
    let (submitter, _reaper, mut intake, _outlet) = mixed(&pool);
    assert_eq!(submitter.check(Class::Write), Err(Refusal::SqFull));
    let mut taken = Vec::new();
    let mut take = |intake: &mut Intake| {
        while let Some(packet) = intake.front() {
            taken.push((packet.class(), packet.open()));
        }
    };
    take(&mut intake);
    assert_eq!(submitter.check(Class::Write), Err(Refusal::SqFull));
    intake.retire();
    assert_eq!(submitter.check(Class::Write), Ok(()));
    // The next is none.
    take(&mut intake);
    let cancel = intake.pop();
    assert!(matches!(cancel, Some(Submission::Cancel { user_data: 3, target: Some(1) })));
    take(&mut intake);
    assert!(intake.pop().is_none());
    let seen: Vec<_> = taken.iter().map(|(class, (_, user_data))| (*class, *user_data)).collect();
    assert_eq!(seen, [(Class::Read, 1), (Class::Write, 2), (Class::Read, 4)]);
    let slots: BTreeSet<u32> = taken.iter().map(|(_, (frame, _))| frame.slot()).collect();
    assert_eq!((slots.len(), pool.slots_out()), (3, 3));
}

/// Whole lines of entries, and the more of them together the more are on their way.
#[test]
fn a_run_is_published_in_pieces_of_four_or_sixteen() {
    let pool = pool(64);
    let (submitter, reaper, mut intake, _outlet) = rings(Depths::new(64, 0, 0), regions(&pool), 0);
    let mut shown = Vec::new();
    for n in 0..64 {
        if n == 20 || n == 40 {
            submitter.publish();
            submitter.begin_run(&reaper);
        }
        submitter.push(Class::Read, pool.alloc().unwrap(), n).unwrap();
        submitter.publish_lines();
        shown.push(intake.ready());
    }
    let pieces = |n: usize| if n < 40 { n / 4 * 4 } else { (n / 16 * 16).max(40) };
    let expected: Vec<_> = (1..=64).map(|n| pieces(n) as u32).collect();
    assert_eq!(shown, expected);
}

/// An opened parcel is its taker's, also if the SQ never hears of it: what becomes of the queue is no
/// matter.
#[test]
fn a_parcel_that_was_opened_is_nobody_elses_and_one_that_was_not_stays() {
    let pool = pool(4);
    let (submitter, reaper, mut intake, outlet) = mixed(&pool);
    let (frame, user_data) = intake.front().unwrap().open();
    assert_eq!(intake.front().map(|next| next.class()), Some(Class::Write));
    drop((submitter, reaper, intake, outlet));
    // Two went home with the queue, and this one did not.
    assert_eq!((user_data, pool.slots_out()), (1, 1));
    let others: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    assert!(others.iter().all(|other| other.slot() != frame.slot()));
}

#[test]
fn a_completion_without_a_submission_panics_and_the_frame_goes_home() {
    let pool = pool(3);
    let (submitter, reaper, intake, mut outlet) =
        rings(Depths::new(2, 0, 0), regions(&pool), u32::MAX);
    for _ in 0..2 {
        outlet.push(Class::Read, pool.alloc().unwrap(), 0, Outcome::Done);
    }
    let frame = pool.alloc().unwrap();
    let one_more = AssertUnwindSafe(|| outlet.push(Class::Read, frame, 0, Outcome::Done));
    assert!(catch_unwind(one_more).is_err());
    assert_eq!(pool.slots_out(), 2);
    let foreign = self::pool(1);
    let frame = foreign.alloc().unwrap();
    let stranger = AssertUnwindSafe(|| outlet.push(Class::Read, frame, 0, Outcome::Done));
    assert!(catch_unwind(stranger).is_err());
    assert_eq!(foreign.slots_out(), 0);
    drop((submitter, reaper, intake, outlet));
    assert_eq!(pool.slots_out(), 0);
}

#[test]
fn a_full_class_leaves_room_for_the_others() {
    let pool = pool(2);
    let (submitter, _reaper, mut intake, _outlet) = rings(Depths::new(1, 1, 1), regions(&pool), 0);
    let push = |class| submitter.push(class, pool.alloc().unwrap(), 0);
    push(Class::Read).unwrap();
    assert_eq!(submitter.check(Class::Read), Err(Refusal::NoCredit));
    assert_eq!(submitter.check(Class::Write), Ok(()));
    submitter.push_cancel(None, 1).unwrap();
    assert_eq!(submitter.push_cancel(None, 1), Err(Refusal::NoCredit));
    submitter.push(Class::Write, pool.alloc().unwrap(), 2).unwrap();
    submitter.publish();
    assert_eq!(intake.ready(), 3);
}

#[test]
fn depths_make_an_sq_with_room_for_every_credit() {
    assert_eq!(Depths::new(1, 1, 1).sq, 4);
    assert_eq!(Depths::new(2, 2, 0).sq, 4);
    assert_eq!(Depths::new(u32::MAX, u32::MAX, 1).sq, vmring_core::DEPTH_MAX);
}

#[test]
#[should_panic(expected = "power of two")]
fn an_sq_whose_size_is_not_a_power_of_two_is_a_programmers_mistake() {
    rings(Depths { read: 1, write: 1, cancel: 1, sq: 3 }, regions(&pool(1)), 0);
}

/// The sum is not taken modulo 2^32, which would leave the CQ less room than there are credits.
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
    assert!(Regions::new(vec![pool; (1 << 16) + 1]).is_none());
}

#[test]
fn an_entry_of_any_region_comes_back_as_a_frame_of_its_pool() {
    let pools: Vec<_> = (0..300).map(|_| pool(1)).collect();
    let (submitter, _reaper, mut intake, _outlet) =
        rings(Depths::new(0, 512, 0), Regions::new(pools.clone()).unwrap(), u32::MAX);
    for pool in &pools {
        submitter.push(Class::Write, pool.alloc().unwrap(), 0).unwrap();
    }
    submitter.publish();
    assert_eq!(intake.ready(), 300);
    for pool in &pools {
        let Some(Submission::Packet { class: Class::Write, frame, .. }) = intake.pop() else {
            panic!("one is missing")
        };
        assert!(pool.owns(&frame));
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
    assert_eq!(new(16, 64, 64), Err(LayoutError::NoRoom));
    assert_eq!(new(16, 64, u32::MAX), Err(LayoutError::NoRoom));
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

/// Of a frame without an offload header.
fn room_of(error: FrontError) -> OutOfRoom {
    match error {
        FrontError::Room(error) => error,
        FrontError::Offload(error) => panic!("there is no header: {error}"),
    }
}

#[test]
fn an_error_about_room_says_what_was_asked_and_what_there_is() {
    let mut frame = pool(1).alloc().unwrap();
    let error = frame.set_len(49).unwrap_err();
    assert_eq!(error.to_string(), "49 bytes were asked of a frame that has 48");
    let error = frame.copy_from(&[0; 100]).unwrap_err();
    assert_eq!(error, OutOfRoom { wanted: 100, room: 48 });
    let refused = OutOfRoom { wanted: usize::MAX, room: 0 };
    assert_eq!(frame.trim_front(usize::MAX), Err(FrontError::Room(refused)));
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
fn the_memory_outlives_the_pools_handles_until_the_last_frame_is_home() {
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
    let (submitter, reaper, mut intake, mut outlet) =
        rings(Depths::new(3, 0, 0), regions(&pool), u32::MAX);
    let mut last = pool.alloc().unwrap();
    for user_data in 0..2 {
        submitter.push(Class::Read, pool.alloc().unwrap(), user_data).unwrap();
    }
    submitter.publish();
    intake.ready();
    let Some(Submission::Packet { class: Class::Read, user_data, frame }) = intake.pop() else {
        panic!("no entry")
    };
    outlet.push(Class::Read, frame, user_data, Outcome::Done);
    drop(pool);
    drop((submitter, reaper, intake, outlet));
    assert_eq!(freed.load(Ordering::SeqCst), 0);
    last.copy_from(b"still here").unwrap();
    drop(last);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

#[test]
fn frames_dropped_on_other_threads_come_home() {
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
    // Each was dropped at once, so the last one home is handed out again and again.
    assert_eq!(again.len(), 1);
    drop(pool);
    assert_eq!(freed.load(Ordering::SeqCst), 1);
}

/// Four threads take and return the slots of one small pool; each writes its number over the whole
/// slot and must find it there before it returns it.
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
// Threads

/// Parks as `std::thread::park` does, whichever thread it is.
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

/// A sum that notices bytes of another packet, of another length, or in another order.
fn checksum(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ bytes.len() as u64, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5)
    })
}

/// Packet number `n`: its checksum in front, then bytes that follow from `n`.
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

/// A device that fills reads and checks writes, both in order; sleeps whenever it has nothing to do.
fn serve(mut intake: Intake, mut outlet: Outlet, bells: &[Doorbell<Token>; 2], total: u64) {
    let (mut reads, mut writes) = (0, 0);
    while reads + writes < total {
        if intake.ready() == 0 {
            bells[0].sleep(None, || intake.ready() > 0);
            continue;
        }
        while let Some(submission) = intake.pop() {
            match submission {
                Submission::Packet { class: Class::Read, user_data, mut frame } => {
                    write_packet(&mut frame, reads);
                    reads += 1;
                    outlet.push(Class::Read, frame, user_data, Outcome::Done);
                }
                Submission::Packet { class: Class::Write, user_data, frame } => {
                    check_packet(&frame, writes);
                    writes += 1;
                    outlet.push(Class::Write, frame, user_data, Outcome::Done);
                }
                _ => unreachable!("nobody cancels"),
            }
        }
        outlet.publish();
        bells[1].ring();
    }
}

/// One thread submits and reaps, the other serves; both sleep on doorbells without a timeout, so a
/// wake-up that is lost hangs the test.
#[test]
fn two_threads_pass_whole_packets_both_ways_and_wake_each_other() {
    let each = scale(200_000, 2_000);
    let pool = pool(48);
    let (submitter, mut reaper, intake, outlet) =
        rings(Depths { read: 16, write: 16, cancel: 0, sq: 8 }, regions(&pool), u32::MAX - 999);
    let bells = Arc::new([(); 2].map(|()| Doorbell::new(Token::default())));
    let poller = thread::spawn({
        let bells = bells.clone();
        move || serve(intake, outlet, &bells, 2 * each)
    });
    let mut frames: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    let (mut asked, mut sent, mut arrived, mut written) = (0, 0, 0, 0);
    while arrived + written < 2 * each {
        loop {
            // In turn, so that neither direction waits for the other.
            let class = if asked <= sent && asked < each { Class::Read } else { Class::Write };
            let count = if class == Class::Read { &mut asked } else { &mut sent };
            if *count == each {
                break;
            }
            let Some(mut frame) = frames.pop() else { break };
            if class == Class::Write {
                write_packet(&mut frame, *count);
            }
            match submitter.push(class, frame, *count) {
                Ok(()) => *count += 1,
                Err((refusal, frame)) => {
                    assert_ne!(refusal, Refusal::ForeignPool);
                    frames.push(frame);
                    break;
                }
            }
        }
        if submitter.publish() {
            bells[0].ring();
        }
        if reaper.ready() == 0 {
            bells[1].sleep(None, || reaper.ready() > 0);
        }
        reaper.ready();
        while let Some(reaped) = reaper.pop() {
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
    assert_eq!(reaper.in_flight(), 0);
    drop(frames);
    assert_eq!(pool.slots_out(), 0);
}

/// One thread submits, one serves, one reaps and drops the frames, which the first takes from the
/// free list again.
#[test]
fn three_threads_share_a_ring_and_a_free_list() {
    let total = scale(200_000, 2_000);
    let pool = pool(8);
    let (submitter, mut reaper, mut intake, mut outlet) =
        rings(Depths { read: 4, write: 0, cancel: 0, sq: 2 }, regions(&pool), u32::MAX - 500);
    thread::scope(|scope| {
        let pool = &pool;
        scope.spawn(move || {
            let mut asked = 0;
            while asked < total {
                let taken = match pool.alloc() {
                    Some(frame) => submitter.push(Class::Read, frame, asked).is_ok(),
                    None => false,
                };
                if taken {
                    submitter.publish();
                    asked += 1;
                } else {
                    thread::yield_now();
                }
            }
        });
        scope.spawn(|| {
            let mut served = 0;
            while served < total {
                if intake.ready() == 0 {
                    thread::yield_now();
                }
                while let Some(submission) = intake.pop() {
                    let Submission::Packet { class: Class::Read, user_data, mut frame } =
                        submission
                    else {
                        unreachable!("nobody writes or cancels")
                    };
                    assert_eq!(user_data, served);
                    write_packet(&mut frame, served);
                    outlet.push(Class::Read, frame, user_data, Outcome::Done);
                    served += 1;
                }
                outlet.publish();
            }
        });
        let mut arrived = 0;
        while arrived < total {
            if reaper.ready() == 0 {
                thread::yield_now();
            }
            while let Some(reaped) = reaper.pop() {
                assert_eq!(reaped.user_data, arrived);
                check_packet(&reaped.frame.unwrap(), arrived);
                arrived += 1;
            }
        }
    });
    assert_eq!(pool.slots_out(), 0);
}
