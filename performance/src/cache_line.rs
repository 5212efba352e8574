//! The round trip of a cache line between two processors, which says where they are, and how trips are
//! timed.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::common::{pin, pinned, processors};
use crate::place::Place;
use crate::result::Result;

/// Longer than anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// Round trips that are not measured.
const WARM_UP: usize = 100;
const MOST_NS: u64 = 1_000_000_000;

/// How long the round trip of a cache line is measured in one turn of a look.
const LINE_TURN: Duration = Duration::from_millis(1);

/// Where the two processors are now. The round trip is the median of this many turns.
pub(crate) fn place(turns: u32) -> Result<Place> {
    let turns = if processors() < 2 { 0 } else { turns };
    let trip = |_| pinned(|| Ok(line(LINE_TURN)?.value_at_quantile(0.5) as f64));
    Ok(Place::of((0..turns).map(trip).collect::<Result<_>>()?))
}

/// A cache line of its own.
#[repr(align(128))]
pub(crate) struct Line(pub(crate) AtomicU32);

/// Times one trip after the other, with one look at the clock for each.
pub(crate) fn trips(
    time: Duration,
    mut trip: impl FnMut() -> Result<()>,
) -> Result<Histogram<u64>> {
    for _ in 0..WARM_UP {
        trip()?;
    }
    let mut times = Histogram::new_with_max(MOST_NS, 3)?;
    let start = Instant::now();
    let mut before = start;
    loop {
        trip()?;
        let now = Instant::now();
        times.saturating_record((now - before).as_nanos() as u64);
        if now - start >= time {
            return Ok(times);
        }
        before = now;
    }
}

/// Spins until `done`, but not for ever.
pub(crate) fn spin(mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut rounds = 0_u32;
    let start = Instant::now();
    while !done()? {
        rounds += 1;
        hint::spin_loop();
        if rounds.is_multiple_of(20_000) {
            if start.elapsed() > PATIENCE {
                return Err("nothing came back".into());
            }
            thread::yield_now();
        }
    }
    Ok(())
}

/// The round trips of a cache line to the other processor and back. Each contains one look at the clock.
pub(crate) fn line(time: Duration) -> Result<Histogram<u64>> {
    let (there, back, over) = (Line(0.into()), Line(0.into()), AtomicBool::new(false));
    thread::scope(|scope| {
        let far = scope.spawn(|| {
            pin(1);
            let mut seen = 0;
            let mut rounds = 0_u32;
            while !over.load(Ordering::Relaxed) {
                let now = there.0.load(Ordering::Acquire);
                if now != seen {
                    seen = now;
                    back.0.store(now, Ordering::Release);
                }
                rounds = rounds.wrapping_add(1);
                hint::spin_loop();
                if rounds.is_multiple_of(20_000) {
                    thread::yield_now();
                }
            }
        });
        let mut number = 0_u32;
        let times = trips(time, || {
            number = number.wrapping_add(1);
            there.0.store(number, Ordering::Release);
            spin(|| Ok(back.0.load(Ordering::Acquire) == number))
        });
        over.store(true, Ordering::Relaxed);
        far.join().map_err(|_| "the far end panicked")?;
        times
    })
}
