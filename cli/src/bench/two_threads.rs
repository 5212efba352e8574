//! A guest on each of two threads, between two inline rings, and beside them the bare loop.

use std::time::Instant;

use super::bare::Bare;
use super::carry::{Receives, Run, Sends};
use super::check::{Account, Pattern, Totals};
use super::endpoints::{Endpoint, Endpoints};
use super::intervals::{self, InPlace};
use super::limits::{PATIENCE, SAMPLE, WARM_UP, window};
use super::place::Processors;
use super::progress::Clock;
use super::setup::Setup;
use super::summary::{Rates, TwoThreadsSummary};
use crate::failure::Failure;

/// Measures both in turns. Returns the summary of each place that was seen, and the totals of the rings'
/// packets and of the bare loop's.
pub(crate) fn measure(
    setup: &Setup,
    processors: &Processors,
    endpoints: &mut Endpoints,
    clock: &mut Clock<'_>,
    may_lose: bool,
) -> Result<(Vec<TwoThreadsSummary>, [Totals; 2]), Failure> {
    let [from, to] = endpoints.addresses();
    let pattern = setup.pattern(from, to, SAMPLE);
    let (mut run, mut loop_run) = (Run::new(processors, may_lose), Run::new(processors, false));
    let mut bare = Bare::new(setup);
    let mut ours = |run: &mut Run<'_>, time| {
        let [first, last] = endpoints.two();
        let mut sender = RingSender::new(first, pattern, setup.batch);
        let mut receiver = RingReceiver { end: last, pattern, size: setup.size };
        run.carry(&mut sender, &mut receiver, time)
    };
    let mut bare = |run: &mut Run<'_>, time| {
        bare.ends(pattern, |sender, receiver| run.carry(sender, receiver, time))
    };
    ours(&mut run, WARM_UP)?;
    bare(&mut loop_run, WARM_UP)?;
    let places = intervals::measure(setup, Some(processors), clock, |time| {
        Ok((ours(&mut run, time)?, bare(&mut loop_run, time)?))
    })?;
    let summaries = places.into_iter().filter_map(|InPlace { place, intervals }| {
        let (ours, bare): (Vec<f64>, Vec<f64>) = intervals.into_iter().unzip();
        let (vmring, bare_loop) = (Rates::of(&ours, setup.size), Rates::of(&bare, setup.size));
        Some(TwoThreadsSummary::new(place?, vmring?, bare_loop?))
    });
    Ok((summaries.collect(), [run.totals(), loop_run.totals()]))
}

/// An inline ring that sends.
struct RingSender<'a> {
    end: &'a mut Endpoint,
    pattern: Pattern,
    batch: usize,
    account: Account,
    /// Packets with a number below this are not waited for any more.
    given_up: u64,
    /// Turns in which nothing could be sent, and since when the same numbers have arrived.
    idle: u32,
    waiting: Option<(u64, Instant)>,
}

impl<'a> RingSender<'a> {
    fn new(end: &'a mut Endpoint, pattern: Pattern, batch: usize) -> Self {
        let account = Account::default();
        Self { end, pattern, batch, account, given_up: 0, idle: 0, waiting: None }
    }

    /// On a device that loses packets, all of a window may be lost. Then others may be sent after a while.
    fn wait(&mut self, number: u64, arrived: u64) {
        self.idle = self.idle.wrapping_add(1);
        // The clock costs something.
        if !self.idle.is_multiple_of(1024) {
            return;
        }
        match self.waiting {
            Some((before, since)) if before == arrived => {
                if since.elapsed() >= PATIENCE {
                    self.given_up = number;
                }
            }
            _ => self.waiting = Some((arrived, Instant::now())),
        }
    }
}

impl Sends for RingSender<'_> {
    fn send(&mut self, number: &mut u64, arrived: u64) -> Result<bool, Failure> {
        let completed = self.end.collect(&mut self.account);
        // Nothing is sent to this end. What arrives is the network's own.
        self.end.spare.append(&mut self.end.read);
        self.end.post()?;
        let under_way = *number - arrived.max(self.given_up).min(*number);
        let batch = self.batch;
        if under_way as usize + batch > window(batch) || self.end.free.len() < batch {
            self.wait(*number, arrived);
            return Ok(completed > 0);
        }
        let pattern = &self.pattern;
        self.end.send(batch, |frame| {
            pattern.write(frame, *number);
            *number += 1;
        })?;
        Ok(true)
    }

    fn finish(&mut self) -> Result<bool, Failure> {
        self.end.collect(&mut self.account);
        Ok(self.end.writing == 0)
    }

    fn refused(&self) -> u64 {
        self.account.refused
    }
}

/// An inline ring that receives.
struct RingReceiver<'a> {
    end: &'a mut Endpoint,
    pattern: Pattern,
    size: usize,
}

impl Receives for RingReceiver<'_> {
    fn receive(&mut self, account: &mut Account) -> Result<bool, Failure> {
        // This also posts what was given back in the turn before.
        let completed = self.end.collect(account);
        for frame in &self.end.read {
            account.record(self.pattern.inspect(frame, self.size));
        }
        self.end.spare.append(&mut self.end.read);
        self.end.post()?;
        Ok(completed > 0)
    }
}

#[cfg(test)]
mod tests {
    use vmring::device::fault::Faults;

    use super::*;
    use crate::bench::endpoints::Driving;
    use crate::bench::faulty;

    /// Measures between two ports of a network, each behind these faults. Returns the totals of the rings
    /// and of the bare loop, and how many places were seen.
    fn totals(network: &str, fault: impl Fn() -> Faults, may_lose: bool) -> ([Totals; 2], usize) {
        let processors = Processors::choose(None).unwrap();
        faulty::measure(network, Driving::Inline, fault, |setup, endpoints, clock| {
            let (places, totals) = measure(setup, &processors, endpoints, clock, may_lose)?;
            assert!(places.iter().all(|place| place.times_bare_loop > 0.0), "{places:?}");
            Ok((totals, places.len()))
        })
    }

    #[test]
    fn every_packet_arrives_at_the_other_thread() {
        let ([ours, bare], places) = totals("two threads", || Faults::seeded(1), false);
        for totals in [ours, bare] {
            assert!(totals.sent > 0, "{totals:?}");
            assert_eq!((totals.arrived, totals.wrong(false)), (totals.sent, None));
        }
        // A single processor has no place.
        assert!(places > 0 || crate::system::processors() < 2);
    }

    #[test]
    fn packets_that_are_corrupt_between_threads_are_found_out() {
        let fault = || Faults::seeded(2).corruption(0.05);
        let ([ours, bare], _) = totals("two threads, bad bits", fault, true);
        assert!(ours.corrupt > 0, "{ours:?}");
        assert_eq!(bare.wrong(false), None);
        assert!(ours.wrong(true).is_some_and(|wrong| wrong.contains("corrupt")));
    }
}
