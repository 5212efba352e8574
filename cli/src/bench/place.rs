//! Which two processors a measurement uses, and how far apart they are. What two threads cost depends on it:
//! within a group of cores a cache line goes to the other processor and back in little more than a hundred
//! nanoseconds, and between groups or sockets in several hundred. The host of a virtual machine may change it
//! at any time.

use std::hint;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::limits::{LOOK, PATIENCE, SPINS, WARM_UP_TRIPS};
use super::queue::Line;
use crate::failure::Failure;
use crate::report::{percentile, round};
use crate::system;

/// A round trip of this many nanoseconds or more is between processors that are far apart.
const FAR_NS: f64 = 250.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Distance {
    Near,
    Far,
}

impl Distance {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Distance::Near => "near",
            Distance::Far => "far",
        }
    }
}

/// What a look at the two processors has found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Place {
    pub(crate) distance: Distance,
    /// The median time in nanoseconds in which a cache line goes to the other processor and back, with a look
    /// at the clock.
    pub(crate) round_trip_ns: f64,
}

impl Place {
    /// The place where the round trips take these nanoseconds. `None` if there was none.
    pub(crate) fn of(mut trips: Vec<f64>) -> Option<Self> {
        trips.sort_by(f64::total_cmp);
        let ns = round(percentile(&trips, 0.5)?, 0);
        let distance = if ns >= FAR_NS { Distance::Far } else { Distance::Near };
        Some(Self { distance, round_trip_ns: ns })
    }
}

/// The two processors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Processors {
    /// Their numbers. Where threads cannot be kept on a processor, the system chooses.
    pub(crate) pair: Option<[usize; 2]>,
    /// The number of processors that this process may use.
    pub(crate) count: usize,
}

impl Processors {
    /// Those that were asked for, or the first two that this process may use.
    pub(crate) fn choose(asked: Option<[usize; 2]>) -> Result<Self, Failure> {
        let (usable, count) = (system::usable_processors(), system::processors());
        let Some([a, b]) = asked else {
            let pair = usable.and_then(|usable| Some([*usable.first()?, *usable.get(1)?]));
            return Ok(Self { pair, count });
        };
        let Some(usable) = usable else {
            return Err(Failure::Usage(
                "this system does not keep a thread on a processor, so --cpus chooses none"
                    .to_owned(),
            ));
        };
        if let Some(wrong) = [a, b].into_iter().find(|cpu| !usable.contains(cpu)) {
            return Err(Failure::Usage(format!("this process may not use processor {wrong}")));
        }
        Ok(Self { pair: Some([a, b]), count })
    }

    /// Keeps the calling thread on the first or the second of them. If that is not possible, it stays where
    /// it is, which a look shows.
    pub(crate) fn pin(&self, side: usize) {
        if let Some(pair) = self.pair {
            system::pin_to(pair[side]);
        }
    }

    /// Where they are now. `None` if there is only one.
    pub(crate) fn look(&self) -> Option<Place> {
        if self.count < 2 {
            return None;
        }
        let (there, back) = (Line(AtomicU32::new(0)), Line(AtomicU32::new(0)));
        let over = AtomicBool::new(false);
        let trips = thread::scope(|scope| {
            scope.spawn(|| {
                self.pin(1);
                let (mut seen, mut rounds) = (0, 0_u32);
                while !over.load(Ordering::Relaxed) {
                    // Nothing is handed over but the line itself, so nothing has to be ordered.
                    let now = there.0.load(Ordering::Relaxed);
                    if now != seen {
                        seen = now;
                        back.0.store(now, Ordering::Relaxed);
                    }
                    wait(&mut rounds);
                }
            });
            let near = scope.spawn(|| {
                self.pin(0);
                let trips = trips(&there.0, &back.0);
                over.store(true, Ordering::Relaxed);
                trips
            });
            near.join().ok()
        });
        Place::of(vec![trips?.value_at_quantile(0.5) as f64])
    }
}

#[inline]
fn wait(rounds: &mut u32) {
    *rounds = rounds.wrapping_add(1);
    if rounds.is_multiple_of(100 * SPINS) { thread::yield_now() } else { hint::spin_loop() }
}

/// Nanoseconds of trips of a cache line to the other side and back.
fn trips(there: &AtomicU32, back: &AtomicU32) -> Histogram<u64> {
    let longest = PATIENCE.as_nanos() as u64;
    let mut times = Histogram::<u64>::new_with_bounds(1, longest, 3).expect("these are possible");
    let (start, mut rounds) = (Instant::now(), 0);
    let mut before = start;
    for number in 1.. {
        there.store(number, Ordering::Relaxed);
        while back.load(Ordering::Relaxed) != number {
            wait(&mut rounds);
        }
        let now = Instant::now();
        if number > WARM_UP_TRIPS {
            times.saturating_record((now - before).as_nanos() as u64);
            if now - start >= LOOK {
                break;
            }
        }
        before = now;
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boundary_lies_between_the_two_places() {
        let distance = |trips: &[f64]| Place::of(trips.to_vec()).map(|place| place.distance);
        assert_eq!(distance(&[]), None);
        assert_eq!(distance(&[130.0, 131.0, 9000.0]), Some(Distance::Near));
        assert_eq!(distance(&[FAR_NS - 1.0]), Some(Distance::Near));
        assert_eq!(distance(&[FAR_NS]), Some(Distance::Far));
    }

    #[test]
    fn a_look_finds_a_round_trip_if_there_are_two_processors() {
        let processors = Processors::choose(None).expect("nothing was asked for");
        let place = processors.look();
        assert_eq!(place.is_some(), processors.count > 1);
        assert!(place.is_none_or(|place| place.round_trip_ns > 0.0), "{place:?}");
        let one = Processors { count: 1, ..processors };
        assert_eq!(one.look(), None);
    }

    #[test]
    fn only_processors_that_may_be_used_can_be_chosen() {
        let wrong = Processors::choose(Some([0, 4095])).unwrap_err();
        assert_eq!(wrong.exit_code(), 2);
        let expected = if cfg!(target_os = "linux") { "processor 4095" } else { "--cpus" };
        assert!(wrong.to_string().contains(expected), "{wrong}");
    }
}
