//! Random scripts for the simulated vmnet, and random operations on the rings over it meanwhile.
//!
//! Goal: whatever vmnet answers, each submission completes once. No packet whose write succeeded is
//! lost unless vmnet counts it as dropped or the interface ended. Packets keep their order, and
//! none arrives twice unless vmnet hid that it had sent it. Every frame returns to its pool, the
//! stop succeeds, and no block, queue or dictionary is left.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use vmnet_sim::{CallPlan, Dead, Events, Reported, Rules, World};
use vmring::{
    Direction, EntryError, Frame, Interface, Poller, RetryPolicy, Ring, RingOp, Status, Vmnet,
};

use crate::support::{LONG, Way, guarded, number_of, packet_between, stage};

const DEPTH: u32 = 64;

/// One operation of the test.
#[derive(Clone, Debug)]
enum Step {
    /// The first end sends this many packets. If the flag is set, the third one is not an Ethernet
    /// frame.
    Send(u8, bool),
    /// The second end posts this many reads.
    Post(u8),
    Reap,
    Wait(u8),
    /// Cancels one of the second end's reads, chosen by its position.
    Cancel(u8),
    Quiesce,
    Restart(usize),
    Sleep(usize, u32),
}

/// How vmnet behaves.
#[derive(Clone, Debug)]
struct Faults {
    retains: bool,
    limit: Option<u32>,
    macos: (u32, u32),
    events: Events,
    queue_depth: usize,
    reads: Vec<CallPlan>,
    writes: Vec<CallPlan>,
    failed_batch: (bool, Reported),
}

impl Faults {
    /// Whether vmnet may send packets without saying so. A count that equals the requested one says
    /// nothing either, because vmnet may have left it unchanged.
    fn hides(&self) -> bool {
        self.failed_batch.0
            || self.writes.iter().any(|plan| matches!(plan, CallPlan::Fails { sent: 1.., .. }))
    }
}

fn reported() -> impl Strategy<Value = Reported> {
    prop_oneof![Just(Reported::Asked), Just(Reported::Done), Just(Reported::Zero)]
}

fn plan(sent: std::ops::Range<usize>) -> impl Strategy<Value = CallPlan> {
    let status = prop_oneof![Just(1001_u32), Just(1002), Just(1003), Just(1007), Just(4711)];
    prop_oneof![
        3 => Just(CallPlan::Well),
        2 => (0_usize..6).prop_map(CallPlan::Takes),
        3 => (status, sent, reported())
            .prop_map(|(status, sent, reported)| CallPlan::Fails { status, sent, reported }),
    ]
}

fn faults() -> impl Strategy<Value = Faults> {
    let events = prop_oneof![
        Just(Events::Arrival),
        Just(Events::Edge),
        Just(Events::Level),
        Just(Events::Lost)
    ];
    let limit = prop_oneof![Just(None), Just(Some(1)), Just(Some(3)), Just(Some(256))];
    let depth = prop_oneof![3 => Just(1024_usize), 1 => Just(5_usize)];
    let macos = prop_oneof![Just((11, 0)), Just((15, 0)), Just((26, 0))];
    let plans = (vec(plan(0..1), 0..12), vec(plan(0..5), 0..12));
    let batch = (any::<bool>(), reported());
    (any::<bool>(), limit, macos, events, depth, plans, batch).prop_map(
        |(retains, limit, macos, events, queue_depth, (reads, writes), failed_batch)| Faults {
            retains,
            limit,
            macos,
            events,
            queue_depth,
            reads,
            writes,
            failed_batch,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1_u8..40, prop::bool::weighted(0.2)).prop_map(|(n, runt)| Step::Send(n, runt)),
        6 => (1_u8..40).prop_map(Step::Post),
        4 => Just(Step::Reap),
        2 => (1_u8..20).prop_map(Step::Wait),
        1 => any::<u8>().prop_map(Step::Cancel),
        1 => Just(Step::Quiesce),
        1 => (0_usize..2).prop_map(Step::Restart),
        1 => (0_usize..2, prop_oneof![Just(0_u32), Just(1001)])
            .prop_map(|(end, status)| Step::Sleep(end, status)),
    ]
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![Just(Way::Thread), Just(Way::Shared), Just(Way::Inline)]
}

/// The rings, and what has become of each submission.
struct Run {
    rings: [Ring; 2],
    interfaces: [Interface; 2],
    /// Free frames of each end.
    spare: [Vec<Frame>; 2],
    next: u64,
    runts: HashSet<u64>,
    /// Submissions that have not completed: writes of the first end by number, reads of the second
    /// end.
    writing: BTreeSet<u64>,
    reading: BTreeSet<u64>,
    written: BTreeMap<u64, Result<usize, EntryError>>,
    received: Vec<u64>,
    /// Read errors.
    refused: usize,
    cancels: usize,
}

impl Run {
    fn send(&mut self, n: u8, runt: bool) {
        for i in 0..n {
            let Some(mut frame) = self.spare[0].pop().or_else(|| self.rings[0].alloc()) else {
                return;
            };
            let number = self.next;
            let len = if runt && i == 2 { 13 } else { 60 };
            let [from, to] = [0, 1].map(|i: usize| self.interfaces[i].mac().into_array());
            frame.reset();
            frame.copy_from(&packet_between(from, to, number, len)).expect("it fits");
            match self.rings[0].submit_write(frame, number) {
                Ok(()) => {
                    self.next += 1;
                    if len == 13 {
                        self.runts.insert(number);
                    }
                    assert!(self.writing.insert(number));
                }
                Err(refused) => {
                    assert!(refused.is_backpressure(), "{}", refused.kind);
                    self.spare[0].push(refused.frame);
                    return;
                }
            }
        }
    }

    fn post(&mut self, n: u8) {
        for _ in 0..n {
            let Some(frame) = self.spare[1].pop().or_else(|| self.rings[1].alloc()) else { return };
            let number = self.next;
            match self.rings[1].submit_read(frame, number) {
                Ok(()) => {
                    self.next += 1;
                    assert!(self.reading.insert(number));
                }
                Err(refused) => {
                    assert!(refused.is_backpressure(), "{}", refused.kind);
                    self.spare[1].push(refused.frame);
                    return;
                }
            }
        }
    }

    fn reap(&mut self) -> bool {
        let mut moved = false;
        for end in 0..2 {
            for done in self.rings[end].reap() {
                moved = true;
                let (op, number, result) = (done.op, done.user_data, done.result);
                match op {
                    RingOp::Write => {
                        assert!(self.writing.remove(&number), "write {number} completed twice");
                        assert!(self.written.insert(number, result).is_none());
                    }
                    RingOp::Read => {
                        assert!(self.reading.remove(&number), "read {number} completed twice");
                        let frame = done.take_frame().expect("a read has its frame");
                        match result {
                            Ok(len) => {
                                assert_eq!(len, 60);
                                self.received.push(number_of(&frame));
                            }
                            Err(EntryError::Cancelled) => {}
                            Err(EntryError::Device(status)) => {
                                assert_ne!(status, Status::BufferExhausted);
                                self.refused += 1;
                            }
                            Err(error) => panic!("{error}"),
                        }
                        self.spare[end].push(frame);
                        continue;
                    }
                    _ => {
                        self.cancels -= 1;
                        continue;
                    }
                }
                self.spare[end].push(done.take_frame().expect("a write has its frame"));
            }
        }
        moved
    }

    /// Reaps until `done` returns true.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        stage(what);
        let start = Instant::now();
        while !done(self) {
            if !self.reap() {
                for ring in &mut self.rings {
                    ring.wait(1, Some(Duration::from_millis(1)));
                }
            }
            assert!(start.elapsed() < LONG, "it never happened: {what}");
        }
    }
}

fn run(faults: &Faults, steps: &[Step], ways: [Way; 2]) {
    let world = World::with(Rules::Strict, faults.retains);
    world.set_host(|host| host.macos = faults.macos);
    let ids = [world.interface_id(), world.interface_id()];
    for id in ids {
        world.script(id, |script| {
            script.events = faults.events;
            script.queue_depth = faults.queue_depth;
            (script.read_max_packets, script.write_max_packets) = (faults.limit, faults.limit);
            script.reads.extend(&faults.reads);
            script.writes.extend(&faults.writes);
            script.failed_batch = faults.failed_batch;
        });
    }
    let poller = Poller::start().expect("a poller");
    let interfaces = ids.map(|id| {
        let vmnet = world.enter(Vmnet::new).safety_poll(Some(Duration::from_millis(2)));
        Interface::builder().interface_id(id).device(vmnet).start().expect("it starts")
    });
    let rings = [0, 1].map(|i: usize| {
        interfaces[i]
            .ring(Direction::Both)
            .depth(DEPTH)
            .drive(ways[i].drive(&poller))
            .retry(RetryPolicy { attempts: 4, delay: Duration::from_micros(200) })
            .start_index(u32::MAX - 20)
            .build()
            .expect("a ring")
    });
    let pools = [0, 1].map(|i: usize| rings[i].pools()[0].clone());
    let mut run = Run {
        rings,
        interfaces,
        spare: [Vec::new(), Vec::new()],
        next: 0,
        runts: HashSet::new(),
        writing: BTreeSet::new(),
        reading: BTreeSet::new(),
        written: BTreeMap::new(),
        received: Vec::new(),
        refused: 0,
        cancels: 0,
    };
    // An interface that stops loses the packets that were in it.
    let mut went = false;
    for step in steps {
        stage(format!("{step:?}"));
        match step {
            Step::Send(n, runt) => run.send(*n, *runt),
            Step::Post(n) => run.post(*n),
            Step::Reap => _ = run.reap(),
            Step::Wait(n) => _ = run.rings[1].wait(*n as usize, Some(Duration::from_micros(500))),
            Step::Cancel(place) => {
                let at = usize::from(*place) % run.reading.len().max(1);
                if let Some(target) = run.reading.iter().nth(at).copied()
                    && run.rings[1].cancel(target, 0).is_ok()
                {
                    run.cancels += 1;
                }
            }
            Step::Quiesce => {
                run.rings[1].cancel_and_wait(LONG).expect("it lets go");
                run.until("the quiesced reads", |run| run.reading.is_empty());
            }
            Step::Restart(end) => {
                went = true;
                restart(&mut run, *end);
            }
            Step::Sleep(end, status) => {
                went = true;
                let dead = if *status == 0 { Dead::Silent } else { Dead::Fails(*status) };
                world.sleep(ids[*end], dead);
                run.send(5, false);
                run.reap();
                restart(&mut run, *end);
            }
        }
    }

    // vmnet behaves well again, and everything completes.
    for id in ids {
        world.script(id, |script| {
            script.reads.clear();
            script.writes.clear();
        });
    }
    run.until("every write completes", |run| run.writing.is_empty() && run.cancels == 0);
    let arrives = |run: &Run| {
        let sent =
            run.written.iter().filter(|(_, result)| result.is_ok()).map(|(number, _)| *number);
        let received: HashSet<u64> = run.received.iter().copied().collect();
        sent.filter(|number| !received.contains(number)).count() as u64
    };
    stage("every packet arrives");
    let start = Instant::now();
    while !went && arrives(&run) > world.counts(ids[1]).dropped {
        run.post(40);
        if !run.reap() {
            run.rings.iter_mut().for_each(|ring| _ = ring.wait(1, Some(Duration::from_millis(1))));
        }
        assert!(start.elapsed() < LONG, "{} packets are lost", arrives(&run));
    }

    let mut seen = HashSet::new();
    let mut last = None;
    for number in &run.received {
        let result = run.written.get(number).expect("only what was sent is received");
        if !faults.hides() {
            assert!(seen.insert(*number), "packet {number} came twice");
            assert!(last < Some(*number), "packet {number} came after {last:?}");
        }
        last = Some(*number);
        assert!(!run.runts.contains(number), "{result:?}");
    }
    for number in &run.runts {
        // The packet was either refused, or never tried.
        assert!(run.written[number].is_err(), "packet {number} is no Ethernet frame");
    }

    for ring in &mut run.rings {
        ring.close().expect("it closes");
    }
    run.until("the reads come back", |run| run.reading.is_empty());
    let Run { rings, interfaces, spare, .. } = run;
    let out = spare.each_ref().map(|frames| frames.len() as u64);
    assert_eq!(pools.each_ref().map(|pool| u64::from(pool.slots_out())), out);
    for interface in &interfaces {
        interface.stop(LONG).expect("a clean stop");
    }
    for id in ids {
        assert_eq!(world.counts(id).starts, world.counts(id).stops);
    }
    drop((rings, interfaces, spare));
    assert_eq!(pools.each_ref().map(|pool| pool.slots_out()), [0, 0]);
    stage("everything is released");
    assert_eq!(world.unreleased(LONG), [""; 0]);
}

/// Restarts one end. An inline ring must be driven meanwhile.
fn restart(run: &mut Run, end: usize) {
    stage(format!("restart {end}"));
    std::thread::scope(|scope| {
        let interface = &run.interfaces[end];
        let restarting = scope.spawn(|| interface.restart(LONG));
        let start = Instant::now();
        while !restarting.is_finished() {
            assert!(start.elapsed() < LONG, "the restart does not end");
            run.rings[end].wait(1, Some(Duration::from_millis(1)));
            let _ = run.rings[end].reap().len();
        }
        restarting.join().expect("no panic").expect("it restarts");
    });
}

fn config() -> ProptestConfig {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/proptest-regressions/vmnet_faults.txt");
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_vmnet_answers_nothing_is_lost_or_left(
        faults in faults(),
        steps in vec(step(), 1..40),
        ways in [way(), way()],
    ) {
        guarded(move || run(&faults, &steps, ways));
    }
}
