//! Intervals of a measurement, each in one place of the processors.

use std::thread;
use std::time::{Duration, Instant};

use super::limits::LOOK_PAUSE;
use super::place::{Distance, Place, Processors};
use super::progress::Clock;
use super::setup::Setup;
use crate::failure::Failure;

/// What the intervals of one place were.
#[derive(Debug, PartialEq)]
pub(crate) struct InPlace<T> {
    /// `None` if there is only one processor, or if only one thread was measured.
    pub(crate) place: Option<Place>,
    pub(crate) intervals: Vec<T>,
}

/// The places that were seen, near before far.
pub(crate) type Places<T> = Vec<InPlace<T>>;

/// Measures intervals by `measure`, and returns them by the place where the processors were before and after
/// each. An interval during which they moved is repeated. With [`both`](Setup::both), goes on until either
/// place has all intervals, or until that time has passed. `processors` is `None` if only one thread is
/// measured.
pub(crate) fn measure<T>(
    setup: &Setup,
    processors: Option<&Processors>,
    clock: &mut Clock<'_>,
    mut measure: impl FnMut(Duration) -> Result<T, Failure>,
) -> Result<Places<T>, Failure> {
    let (count, time) = setup.intervals();
    let count = count as usize;
    let look = || processors.and_then(Processors::look);
    let index = |place: Place| usize::from(place.distance == Distance::Far);
    let mut places: [(Vec<f64>, Vec<T>); 2] = Default::default();
    let mut before = look();
    // Only two threads have places, and only processors that move have both.
    let deadline = setup.both.filter(|_| before.is_some()).map(|both| Instant::now() + both);
    let mut tries = 0;
    loop {
        let is_over = match deadline {
            Some(deadline) => {
                places.iter().all(|(_, intervals)| intervals.len() >= count)
                    || tries >= count && Instant::now() >= deadline
            }
            // Processors that move all the time leave fewer intervals, and not a run without an end.
            None => {
                places.iter().map(|(_, intervals)| intervals.len()).sum::<usize>() >= count
                    || tries >= 2 * count
            }
        };
        if is_over {
            break;
        }
        if before.is_some_and(|place| places[index(place)].1.len() >= count) {
            // The other place is waited for.
            thread::sleep(LOOK_PAUSE);
            before = look();
        } else {
            let interval = measure(time)?;
            tries += 1;
            let after = look();
            if before.map(|place| place.distance) == after.map(|place| place.distance) {
                let (trips, intervals) = &mut places[before.map_or(0, index)];
                trips.extend(before.into_iter().chain(after).map(|place| place.round_trip_ns));
                intervals.push(interval);
            }
            before = after;
        }
        if !clock.tick() {
            break;
        }
    }
    let seen = places.into_iter().filter(|(_, intervals)| !intervals.is_empty());
    Ok(seen.map(|(trips, intervals)| InPlace { place: Place::of(trips), intervals }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::faulty;
    use crate::stop::Stop;

    fn measured(both: Option<Duration>, is_looked_at: bool) -> Places<u32> {
        let setup = Setup { both, ..faulty::setup() };
        let processors = Processors::choose(None).unwrap();
        let stop = Stop::new().unwrap();
        let mut clock = Clock::start(&stop, setup.time, None);
        let mut number = 0;
        let count = |_| {
            number += 1;
            Ok(number)
        };
        measure(&setup, is_looked_at.then_some(&processors), &mut clock, count).unwrap()
    }

    #[test]
    fn one_thread_has_no_place() {
        let all = [InPlace { place: None, intervals: vec![1, 2, 3, 4, 5] }];
        assert_eq!(measured(None, false), all);
        // It does not wait for one either.
        assert_eq!(measured(Some(Duration::from_secs(3600)), false), all);
    }

    #[test]
    fn each_place_has_its_own_intervals() {
        for both in [None, Some(Duration::from_millis(100))] {
            let places = measured(both, true);
            let counts: Vec<_> = places.iter().map(|place| place.intervals.len()).collect();
            assert!(counts.iter().all(|count| (1..=5).contains(count)), "{places:?}");
            let distances: Vec<_> =
                places.iter().map(|of| of.place.map(|of| of.distance)).collect();
            let mut different = distances.clone();
            different.dedup();
            assert_eq!(distances, different);
            let has_place = crate::system::processors() > 1;
            assert!(distances.iter().all(|distance| distance.is_some() == has_place), "{places:?}");
        }
    }
}
