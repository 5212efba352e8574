//! Random operations on inline rings over misbehaving devices, and over one that fills several buffers
//! of a guest with one packet. Whatever happens, every submission completes exactly once (a write that
//! skips success at most once), every slot is in one place, and nothing panics.
#![no_main]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring::device::fault::Faults;
use vmring::guest::GuestRegion;
use vmring::{
    Direction, Drive, Frame, GuestMemory, GuestMmap, Interface, Loopback, Pool, PoolBuilder,
    RetryPolicy, Ring, RingOp, SegmentTable, Status,
};

#[derive(Arbitrary, Debug)]
struct Case {
    seed: u64,
    short: bool,
    exhaust: bool,
    errors: bool,
    abandon: bool,
    fail_after: Option<u8>,
    merges: bool,
    start_index: u32,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Alloc,
    Free(u8),
    Resize(u8, u16),
    Trim(u8, u16, bool),
    Read(u8),
    Write(u8),
    Reads(u8),
    WriteSilently(u8),
    ReadGuest(Ranges),
    WriteGuest(Ranges),
    Cancel(u8),
    CancelAll,
    Reap(u8),
    Quiesce,
    Restart,
    Close,
}

/// The pieces of a guest's buffer, which may overlap.
#[derive(Arbitrary, Debug)]
struct Ranges {
    header: bool,
    pieces: [(u16, u16); 3],
}

const SLOTS: u32 = 24;

/// What an entry in flight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Has {
    Frame,
    /// A frame that returns to its pool if the write succeeds, without a completion.
    SilentFrame,
    GuestsBuffer,
}

struct World {
    ring: Ring,
    pool: Pool,
    frames: Vec<Frame>,
    table: SegmentTable,
    /// Reads and writes that have not completed. `cancels` has the cancels.
    packets: BTreeMap<u64, Has>,
    cancels: BTreeSet<u64>,
    next: u64,
}

impl World {
    fn submit_guest(&mut self, ranges: &Ranges, read: bool) {
        let pieces = ranges.pieces.map(|(at, len)| (u64::from(at), u32::from(len % 1200)));
        let header = if ranges.header { 12 } else { 0 };
        let Ok(mut buffer) = self.table.buffer(pieces, header) else { return };
        if !read {
            buffer.set_header(&[0; 12]);
        }
        let number = self.next;
        let sent = match read {
            true => self.ring.submit_read_guest(buffer, number),
            false => self.ring.submit_write_guest(buffer, number),
        };
        if sent.is_ok() {
            self.next += 1;
            assert!(self.packets.insert(number, Has::GuestsBuffer).is_none());
        }
    }

    fn submit_silently(&mut self, at: u8) {
        if self.frames.is_empty() {
            return;
        }
        let frame = self.frames.swap_remove(usize::from(at) % self.frames.len());
        match self.ring.submit_write_skip_success(frame, self.next) {
            Ok(()) => {
                assert!(self.packets.insert(self.next, Has::SilentFrame).is_none());
                self.next += 1;
            }
            Err(refused) => self.frames.push(refused.frame),
        }
    }

    /// How many entries in flight have this.
    fn count(&self, has: Has) -> usize {
        self.packets.values().filter(|&&it| it == has).count()
    }

    fn submit(&mut self, at: u8, read: bool) {
        if self.frames.is_empty() {
            return;
        }
        let frame = self.frames.swap_remove(usize::from(at) % self.frames.len());
        let number = self.next;
        let sent = match read {
            true => self.ring.submit_read(frame, number),
            false => self.ring.submit_write(frame, number),
        };
        match sent {
            Ok(()) => {
                self.next += 1;
                assert!(self.packets.insert(number, Has::Frame).is_none());
            }
            Err(refused) => self.frames.push(refused.frame),
        }
    }

    fn cancel(&mut self, target: Option<u64>) {
        let sent = match target {
            Some(target) => self.ring.cancel(target, self.next),
            None => self.ring.cancel_all(self.next),
        };
        if sent.is_ok() {
            assert!(self.cancels.insert(self.next));
            self.next += 1;
        }
    }

    fn reap(&mut self, most: usize) {
        for done in self.ring.reap().take(most) {
            let number = done.user_data;
            if done.op == RingOp::Cancel {
                assert!(self.cancels.remove(&number), "a cancel completed twice");
                assert!(done.take_frame().is_none());
            } else {
                let has = self.packets.remove(&number).expect("an entry completed twice");
                match (has, done.take_frame()) {
                    (Has::GuestsBuffer, None) => {}
                    (Has::GuestsBuffer, Some(_)) => panic!("a frame comes from nowhere"),
                    (Has::SilentFrame, _) if done.result.is_ok() => panic!("it is not silent"),
                    (_, frame) => self.frames.push(frame.expect("a frame comes back, always")),
                }
            }
        }
    }

    /// Checks that every slot is free, in one of our frames, or in flight.
    fn check(&self) {
        let (silent, guests) = (self.count(Has::SilentFrame), self.count(Has::GuestsBuffer));
        let known = self.frames.len() + self.count(Has::Frame);
        // It is not known which of the silent writes have succeeded.
        assert!((known..=known + silent).contains(&(self.pool.slots_out() as usize)));
        let known = self.packets.len() - silent + self.cancels.len();
        assert!((known..=known + silent).contains(&self.ring.in_flight()));
        assert!(self.table.slots_in_use() as usize <= guests);
    }
}

fuzz_target!(|case: Case| {
    let part = |on: bool| if on { 0.3 } else { 0.0 };
    let mut faults = Faults::seeded(case.seed)
        .short_batches(part(case.short))
        .exhaustion(part(case.exhaust))
        .errors(part(case.errors), Status::MemFailure)
        .abandon(part(case.abandon));
    if let Some(after) = case.fail_after {
        faults = faults.fail_after(after.into(), Status::InvalidAccess);
    }
    let builder = Interface::builder();
    let interface = match case.merges {
        true => builder.device(Loopback::new(1500)),
        false => builder.device(faults.wrap(Loopback::new(1500))),
    };
    let interface = interface.start().expect("it starts");
    let mapping = Arc::new(GuestMmap::anonymous(0x1_0000 + 0x1000).expect("memory"));
    let memory = GuestMemory::new([GuestRegion::new(0, mapping)]).expect("a region");
    let table = SegmentTable::new(memory, 64).expect("a table");
    let pool = PoolBuilder::new(SLOTS as usize, 1514).headroom(32).build().expect("memory");
    let ring = interface
        .ring(Direction::Both)
        .depth(8)
        .cancel_depth(4)
        .pool(&pool)
        .segment_table(&table)
        .mergeable_reads(case.merges)
        .drive(Drive::Inline)
        .retry(RetryPolicy { attempts: 2, delay: Duration::ZERO })
        .close_timeout(Duration::from_millis(200))
        .start_index(case.start_index)
        .build()
        .expect("a ring");
    let (packets, cancels) = (BTreeMap::new(), BTreeSet::new());
    let mut world = World { ring, pool, frames: Vec::new(), table, packets, cancels, next: 0 };
    for step in case.steps.iter().take(512) {
        match *step {
            Step::WriteSilently(at) => world.submit_silently(at),
            Step::ReadGuest(ref ranges) => world.submit_guest(ranges, true),
            Step::WriteGuest(ref ranges) => world.submit_guest(ranges, false),
            Step::Alloc => world.frames.extend(world.ring.alloc()),
            Step::Free(at) if !world.frames.is_empty() => {
                world.frames.swap_remove(usize::from(at) % world.frames.len());
            }
            Step::Resize(at, len) if !world.frames.is_empty() => {
                let n = world.frames.len();
                let _ = world.frames[usize::from(at) % n].set_len(len.into());
            }
            Step::Trim(at, by, front) if !world.frames.is_empty() => {
                let n = world.frames.len();
                let frame = &mut world.frames[usize::from(at) % n];
                let _ =
                    if front { frame.trim_front(by.into()) } else { frame.grow_front(by.into()) };
            }
            Step::Read(at) => world.submit(at, true),
            Step::Write(at) => world.submit(at, false),
            Step::Reads(n) => (0..n % 16).for_each(|at| world.submit(at, true)),
            Step::Cancel(back) => world.cancel(Some(world.next.wrapping_sub(back.into()))),
            Step::CancelAll => world.cancel(None),
            Step::Reap(most) => world.reap(most.into()),
            Step::Quiesce => {
                world.ring.cancel_and_wait(Duration::from_secs(5)).expect("the device lets go");
            }
            Step::Restart => {
                // The restart happens when the ring is driven.
                let _ = interface.restart(Duration::ZERO);
            }
            Step::Close => world.ring.close().expect("the device lets go"),
            _ => {}
        }
        world.check();
    }
    world.ring.close().expect("the device lets go");
    world.reap(usize::MAX);
    world.check();
    world.packets.retain(|_, has| *has != Has::SilentFrame);
    assert!(world.packets.is_empty() && world.cancels.is_empty(), "something never completed");
    world.frames.clear();
    assert_eq!((world.pool.slots_out(), world.table.slots_in_use()), (0, 0));
});
