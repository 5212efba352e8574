//! Packets one way: as many as go from one endpoint to the other.

use std::time::{Duration, Instant};

use super::check::{Account, Pattern};
use super::endpoints::{Driving, Endpoints};
use super::intervals::{self, Places};
use super::limits::{NAP, PATIENCE, SAMPLE, TURNS, WARM_UP, window};
use super::place::Processors;
use super::progress::Clock;
use super::setup::Setup;
use crate::failure::Failure;

/// Measures packets per second, in intervals by the place of the processors. With [`Driving::Inline`] there is
/// one thread, and no place.
pub(crate) fn measure(
    setup: &Setup,
    driving: Driving,
    processors: &Processors,
    endpoints: &mut Endpoints,
    clock: &mut Clock<'_>,
) -> Result<(Account, Places<f64>), Failure> {
    let [from, to] = endpoints.addresses();
    let mut run = Run {
        pattern: setup.pattern(from, to, SAMPLE),
        account: Account::default(),
        size: setup.size,
        batch: setup.batch,
        window: window(setup.batch) as u64,
        given_up: 0,
        last_move: Instant::now(),
        is_inline: driving == Driving::Inline,
        endpoints,
    };
    run.go_on(WARM_UP, true)?;
    let processors = (driving != Driving::Inline).then_some(processors);
    let places = intervals::measure(setup, processors, clock, |time| {
        let (start, before) = (Instant::now(), run.account.arrived);
        run.go_on(time, true)?;
        let packets = run.account.arrived - before;
        Ok(packets as f64 / start.elapsed().as_secs_f64())
    })?;
    run.go_on(2 * PATIENCE, false)?;
    Ok((run.account, places))
}

struct Run<'a> {
    endpoints: &'a mut Endpoints,
    pattern: Pattern,
    account: Account,
    size: usize,
    batch: usize,
    window: u64,
    /// Packets with a number below this are not waited for any more.
    given_up: u64,
    last_move: Instant,
    is_inline: bool,
}

impl Run<'_> {
    /// Moves packets for `time`. If not `is_sent`, sends none and ends when all have arrived.
    fn go_on(&mut self, time: Duration, is_sent: bool) -> Result<(), Failure> {
        // Since the last call the processors may have been waited for.
        self.last_move = Instant::now();
        let deadline = self.last_move + time;
        let (mut turns, mut has_moved) = (0, false);
        loop {
            if is_sent {
                self.send()?;
            } else if self.under_way() == 0 {
                return Ok(());
            }
            let moved = self.take()?;
            has_moved |= moved;
            turns += 1;
            if moved && turns < TURNS {
                continue;
            }
            turns = 0;
            let now = Instant::now();
            if std::mem::take(&mut has_moved) {
                self.last_move = now;
            }
            if now >= deadline {
                return Ok(());
            }
            if moved {
                continue;
            }
            if self.under_way() == 0 || now - self.last_move < PATIENCE {
                self.sleep(deadline - now);
            } else {
                self.given_up = self.account.sent;
                self.last_move = now;
            }
        }
    }

    /// Packets that may still arrive. A packet that was overtaken is not waited for: on most
    /// networks it never arrives, and many of them would fill the window.
    fn under_way(&self) -> u64 {
        let Account { sent, next, .. } = self.account;
        self.account.under_way().min(sent - next.max(self.given_up))
    }

    /// Sends as many batches as there is space for.
    #[inline]
    fn send(&mut self) -> Result<(), Failure> {
        // Inline, one batch at a time: like a guest, it reads the packets before it writes more.
        let batches = if self.is_inline { 1 } else { u64::MAX };
        for _ in 0..batches.min(self.window) {
            let room = self.window.saturating_sub(self.under_way());
            let first = self.endpoints.first();
            if room < self.batch as u64 || first.free.len() < self.batch {
                break;
            }
            let (pattern, sent) = (&self.pattern, &mut self.account.sent);
            first.send(self.batch, |frame| {
                pattern.write(frame, *sent);
                *sent += 1;
            })?;
        }
        Ok(())
    }

    /// Handles what has arrived. Returns whether there was anything.
    #[inline]
    fn take(&mut self) -> Result<bool, Failure> {
        let completed = self.endpoints.collect(&mut self.account);
        let last = self.endpoints.last();
        for frame in &last.read {
            self.account.record(self.pattern.inspect(frame, self.size));
        }
        last.spare.append(&mut last.read);
        if !self.endpoints.is_loop() {
            // Nothing is sent to this endpoint. What arrives is the network's own.
            let first = self.endpoints.first();
            first.spare.append(&mut first.read);
        }
        self.endpoints.post()?;
        Ok(completed > 0)
    }

    fn sleep(&mut self, left: Duration) {
        let (under_way, batch) = (self.under_way(), self.batch as u64);
        // The packet that arrives last says that all have arrived. If none is in flight, only
        // writes are waited for.
        let (end, n) = match under_way {
            0 => (self.endpoints.first(), 1),
            _ => (self.endpoints.last(), under_way.min(batch) as usize),
        };
        end.ring.wait(n, Some(left.min(NAP)));
    }
}

#[cfg(test)]
mod tests {
    use vmring::device::fault::Faults;

    use super::*;
    use crate::bench::check::Totals;
    use crate::bench::faulty;

    /// Measures between two ports of a network, each behind these faults.
    fn totals(network: &str, driving: Driving, fault: impl Fn() -> Faults) -> Totals {
        faulty::measure(network, driving, fault, |setup, endpoints, clock| {
            let processors = Processors::choose(None)?;
            let (account, places) = measure(setup, driving, &processors, endpoints, clock)?;
            assert!(!places.is_empty(), "{account:?}");
            Ok(account.totals())
        })
    }

    #[test]
    fn a_device_without_faults_brings_every_packet() {
        for (network, driving) in
            [("no faults", Driving::Inline), ("no faults either", Driving::Poller)]
        {
            let totals = totals(network, driving, || Faults::seeded(1));
            assert_eq!(totals.arrived, totals.sent);
            assert_eq!(totals.wrong(false), None);
        }
    }

    #[test]
    fn a_device_that_corrupts_packets_is_found_out() {
        for (network, driving) in [("bad bits", Driving::Inline), ("more of them", Driving::Poller)]
        {
            let totals = totals(network, driving, || Faults::seeded(2).corruption(0.05));
            assert!(totals.corrupt > 0, "{totals:?}");
            assert!(totals.wrong(true).is_some_and(|wrong| wrong.contains("corrupt")));
        }
    }

    /// A refused packet is not lost, because the writer was told.
    #[test]
    fn packets_that_the_device_refuses_are_counted_apart() {
        let fault = || Faults::seeded(3).errors(0.01, vmring::Status::Failure);
        let totals = totals("refusals", Driving::Inline, fault);
        assert!(totals.refused > 0, "{totals:?}");
        assert_eq!(totals.wrong(false), None, "{totals:?}");
    }
}
