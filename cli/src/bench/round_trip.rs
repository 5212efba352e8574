//! Round trips of one packet: from its submit until the answer is reaped.

use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use vmring::Frame;

use super::check::{Account, Found, Pattern};
use super::endpoints::{Driving, Endpoints};
use super::intervals::{self, Places};
use super::limits::{PATIENCE, SPINS, WARM_UP_TRIPS};
use super::place::Processors;
use super::progress::Clock;
use super::setup::Setup;
use crate::failure::Failure;

/// Measures the nanoseconds of trips, by the place of the processors. With [`Driving::Inline`] there is one
/// thread, and no place.
pub(crate) fn measure(
    setup: &Setup,
    driving: Driving,
    processors: &Processors,
    endpoints: &mut Endpoints,
    clock: &mut Clock<'_>,
) -> Result<(Account, Places<Histogram<u64>>), Failure> {
    let [first, last] = endpoints.addresses();
    let mut run = Run {
        there: setup.pattern(first, last, 1),
        back: setup.pattern(last, first, 1),
        account: Account::default(),
        size: setup.size,
        sleeps: driving == Driving::Parked,
        endpoints,
    };
    for _ in 0..WARM_UP_TRIPS {
        if run.trip()?.is_none() {
            // A trip that fails warms up nothing.
            break;
        }
    }
    let longest = PATIENCE.as_nanos() as u64;
    let processors = (driving != Driving::Inline).then_some(processors);
    let places = intervals::measure(setup, processors, clock, |time| {
        let mut times = Histogram::new_with_bounds(1, longest, 3).expect("these are possible");
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if let Some(time) = run.trip()? {
                times.saturating_record(time.as_nanos() as u64);
            }
        }
        Ok(times)
    })?;
    Ok((run.account, places))
}

struct Run<'a> {
    endpoints: &'a mut Endpoints,
    there: Pattern,
    back: Pattern,
    account: Account,
    size: usize,
    sleeps: bool,
}

impl Run<'_> {
    /// Makes one trip. `None` if the packet is lost.
    fn trip(&mut self) -> Result<Option<Duration>, Failure> {
        let number = self.account.sent;
        self.account.sent += 1;
        self.endpoints.post()?;
        let first = self.endpoints.first();
        let Some(mut frame) = first.free.pop() else {
            return Err(Failure::Step(
                "the device does not return the frames that were written".to_owned(),
            ));
        };
        self.there.write(&mut frame, number);
        let start = Instant::now();
        first.write([frame].into_iter())?;
        let came = if self.endpoints.is_loop() {
            self.wait(false, number, self.there)?
        } else {
            match self.wait(true, number, self.there)? {
                None => None,
                Some(frame) => {
                    self.answer(frame)?;
                    self.wait(false, number, self.back)?
                }
            }
        };
        let time = start.elapsed();
        let Some(frame) = came else { return Ok(None) };
        let pattern = if self.endpoints.is_loop() { self.there } else { self.back };
        let found = pattern.inspect(&frame, self.size);
        self.account.record(found);
        self.endpoints.first().spare.push(frame);
        Ok((found == Found::Number(number)).then_some(time))
    }

    /// The last endpoint sends the packet back as it is, with the addresses exchanged.
    fn answer(&mut self, mut frame: Frame) -> Result<(), Failure> {
        let (to, from) = frame[..12].split_at_mut(6);
        to.swap_with_slice(from);
        // The work that was left for this endpoint is left for the next one.
        frame.forward_offload().map_err(|error| Failure::Step(error.to_string()))?;
        let last = self.endpoints.last();
        // Posts another frame in place of this one, which is not posted again yet.
        last.spare.extend(last.free.pop());
        last.write([frame].into_iter())
    }

    /// Waits for our next packet at an endpoint. Only looks at its number, because this is timed.
    /// Counts packets that are late or duplicated.
    fn wait(
        &mut self,
        last: bool,
        number: u64,
        pattern: Pattern,
    ) -> Result<Option<Frame>, Failure> {
        let start = Instant::now();
        let mut rounds = 0;
        loop {
            self.endpoints.collect(&mut self.account);
            let end = if last { self.endpoints.last() } else { self.endpoints.first() };
            while let Some(frame) = end.read.pop() {
                if pattern.is_number(&frame, number) {
                    return Ok(Some(frame));
                }
                self.account.record(pattern.inspect(&frame, self.size));
                end.spare.push(frame);
            }
            rounds += 1;
            if self.sleeps {
                // A write completes soon and without help, so it is not worth waking for.
                let n = end.writing + 1;
                end.ring.wait(n, Some(PATIENCE));
            } else if rounds % SPINS == 0 {
                // The other thread may have no processor.
                thread::yield_now();
            } else {
                hint::spin_loop();
                continue;
            }
            if start.elapsed() >= PATIENCE {
                return Ok(None);
            }
        }
    }
}
