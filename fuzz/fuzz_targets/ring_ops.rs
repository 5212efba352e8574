//! Random operations on inline rings over misbehaving devices. Whatever happens, every submission
//! completes exactly once, every slot is in one place, and nothing panics.
#![no_main]

use std::collections::BTreeSet;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmring::device::fault::Faults;
use vmring::{
    Direction, Drive, Frame, Interface, Loopback, Pool, PoolBuilder, RetryPolicy, Ring, RingOp,
    Status,
};

#[derive(Arbitrary, Debug)]
struct Case {
    seed: u64,
    short: bool,
    exhaust: bool,
    errors: bool,
    abandon: bool,
    fail_after: Option<u8>,
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
    Cancel(u8),
    CancelAll,
    Reap(u8),
    Quiesce,
    Restart,
    Close,
}

const SLOTS: u32 = 24;

struct World {
    ring: Ring,
    pool: Pool,
    frames: Vec<Frame>,
    /// Reads and writes that have not completed. `cancels` has the cancels.
    packets: BTreeSet<u64>,
    cancels: BTreeSet<u64>,
    next: u64,
}

impl World {
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
                assert!(self.packets.insert(number));
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
                assert!(self.packets.remove(&number), "an entry completed twice");
                self.frames.push(done.take_frame().expect("a frame comes back, always"));
            }
        }
    }

    /// Checks that every slot is free, in one of our frames, or in flight.
    fn check(&self) {
        assert_eq!(self.pool.slots_out() as usize, self.frames.len() + self.packets.len());
        assert_eq!(self.ring.in_flight(), self.packets.len() + self.cancels.len());
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
    let interface =
        Interface::builder().device(faults.wrap(Loopback::new(1500))).start().expect("it starts");
    let pool = PoolBuilder::new(SLOTS as usize, 1514).headroom(32).build().expect("memory");
    let ring = interface
        .ring(Direction::Both)
        .depth(8)
        .cancel_depth(4)
        .pool(&pool)
        .drive(Drive::Inline)
        .retry(RetryPolicy { attempts: 2, delay: Duration::ZERO })
        .close_timeout(Duration::from_millis(200))
        .start_index(case.start_index)
        .build()
        .expect("a ring");
    let (packets, cancels) = (BTreeSet::new(), BTreeSet::new());
    let mut world = World { ring, pool, frames: Vec::new(), packets, cancels, next: 0 };
    for step in case.steps.iter().take(512) {
        match *step {
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
    assert!(world.packets.is_empty() && world.cancels.is_empty(), "something never completed");
    world.frames.clear();
    assert_eq!(world.pool.slots_out(), 0);
});
