//! What is counted and limited for each port.

use crate::config::Limits;
use crate::limits::{ERRORS_PER_SECOND, FIRST_WINDOW, LARGE_WINDOW, MAX_PORTS};
use crate::output::Port;
use crate::stats::{Counter, Counters};

/// Lets so many events pass per second, and as many at once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    /// How many microseconds of the allowance one event takes.
    cost: u64,
    /// When the bucket is full again, in microseconds.
    full_at: u64,
}

impl Bucket {
    pub(crate) fn new(per_second: u32) -> Self {
        Self { cost: 1_000_000 / u64::from(per_second.max(1)), full_at: 0 }
    }

    /// Whether the bucket has one event left.
    pub(crate) fn has(&self, now: u64) -> bool {
        self.full_at.max(now) + self.cost <= now + 1_000_000
    }

    /// Takes one event out of the bucket, if it has one.
    pub(crate) fn take(&mut self, now: u64) -> bool {
        let has = self.has(now);
        if has {
            self.full_at = self.full_at.max(now) + self.cost;
        }
        has
    }
}

/// What one port has.
#[derive(Debug)]
pub(crate) struct PortState {
    pub(crate) counters: Counters,
    pub(crate) flows: usize,
    pub(crate) half_open: usize,
    /// Its sockets that are not TCP's.
    pub(crate) sockets: usize,
    pub(crate) new_flows: Bucket,
    errors: Bucket,
    /// The second that `busy` is about.
    second: u32,
    /// The flows that had data from the guest in this second.
    busy: Busy,
    /// The flows that had data in the second before, and have had none in this one.
    busy_before: Busy,
}

/// Flows that count for their port's windows.
#[derive(Clone, Copy, Debug, Default)]
struct Busy {
    flows: u32,
    /// How many frames what they are offered fills.
    offered: u64,
}

/// What a flow counts for its port's windows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share {
    /// The second in which the guest last sent data.
    active_in: u32,
    /// How many KiB it has sent in that second, and how many in the one before. Each batch is
    /// rounded.
    lately: [u16; 2],
    /// How many frames the flow counts: what the guest was offered, but no more than the flow may have.
    offered: u16,
    /// How many bytes the guest puts into one frame, on average of its last batches.
    pub(crate) per_frame: u16,
}

impl Share {
    /// The share of a flow that has sent nothing.
    pub(crate) const NONE: Self =
        Self { active_in: u32::MAX, lately: [0; 2], offered: 0, per_frame: 0 };

    /// How many frames of this size a busy flow may have, if there are enough: it grows with what its guest
    /// has sent lately, twice as fast, so that it is ahead of the guest's congestion window.
    fn most(&self, frame: u32) -> u32 {
        let [now, before] = self.lately;
        FIRST_WINDOW + 2 * ((u32::from(now) + u32::from(before)) * 1024 / frame)
    }
}

/// A second, in the unit of all times.
pub(crate) const SECOND: u64 = 1_000_000;

/// The second of a time. It is less than `u32::MAX` for 136 years.
fn second(now: u64) -> u32 {
    (now / SECOND) as u32
}

/// All ports.
#[derive(Debug)]
pub(crate) struct Ports {
    ports: Vec<PortState>,
    /// The sum over all ports, with those that have left.
    pub(crate) counters: Counters,
    pub(crate) limits: Limits,
    pub(crate) flows: usize,
    pub(crate) half_open: usize,
    /// What TCP's sockets may cost the kernel, in bytes.
    pub(crate) tcp_kernel: u64,
    /// How many sockets TCP has.
    pub(crate) tcp_descriptors: usize,
    /// How many sockets the others have.
    pub(crate) other_descriptors: usize,
    new_flows: Bucket,
    /// What frames have cost, from guests and for them, in units of the table of prices.
    pub(crate) spent: u64,
}

impl Ports {
    pub(crate) fn new(limits: Limits) -> Self {
        let new_flows = Bucket::new(limits.new_flows_per_second);
        let counters = Counters::default();
        Self {
            ports: Vec::new(),
            counters,
            limits,
            flows: 0,
            half_open: 0,
            tcp_kernel: 0,
            tcp_descriptors: 0,
            other_descriptors: 0,
            new_flows,
            spent: 0,
        }
    }

    /// How many sockets there are.
    pub(crate) fn descriptors(&self) -> usize {
        self.tcp_descriptors + self.other_descriptors
    }

    /// How many sockets a port has at most: each flow of TCP has one, and some wait for it to end.
    pub(crate) fn descriptors_of(&self, port: Port) -> usize {
        self.ports.get(port.0 as usize).map_or(0, |state| state.flows + state.sockets)
    }

    /// A port's state. It is made when the port is first seen.
    ///
    /// # Panics
    ///
    /// If the port's number is not less than [`MAX_PORTS`].
    pub(crate) fn get(&mut self, port: Port) -> &mut PortState {
        let index = port.0 as usize;
        assert!(index < MAX_PORTS, "a network has no port {index}");
        if index >= self.ports.len() {
            let limits = self.limits.port;
            self.ports.resize_with(index + 1, || PortState {
                counters: Counters::default(),
                flows: 0,
                half_open: 0,
                sockets: 0,
                new_flows: Bucket::new(limits.new_flows_per_second),
                errors: Bucket::new(ERRORS_PER_SECOND),
                second: 0,
                busy: Busy::default(),
                busy_before: Busy::default(),
            });
        }
        &mut self.ports[index]
    }

    /// What is counted for a port.
    pub(crate) fn counters_of(&self, port: Port) -> Counters {
        self.ports.get(port.0 as usize).map_or_else(Counters::default, |state| state.counters)
    }

    /// Forgets a port, whose number another port may get.
    pub(crate) fn forget(&mut self, port: Port) {
        if let Some(state) = self.ports.get_mut(port.0 as usize) {
            state.counters = Counters::default();
        }
    }

    pub(crate) fn count(&mut self, port: Port, counter: Counter) {
        self.count_n(port, counter, 1);
    }

    pub(crate) fn count_n(&mut self, port: Port, counter: Counter, n: u64) {
        self.counters.add(counter, n);
        self.get(port).counters.add(counter, n);
    }

    /// Whether the port may get an ICMP error or a reset for no flow now.
    pub(crate) fn may_err(&mut self, port: Port, now: u64) -> bool {
        let may = self.get(port).errors.take(now);
        if !may {
            self.count(port, Counter::ErrorLimit);
        }
        may
    }

    /// Whether the port may open a flow now, and why not. It takes from the rates only if it may.
    pub(crate) fn may_open(&mut self, port: Port, now: u64) -> Result<(), Counter> {
        let limits = self.limits;
        if self.flows >= limits.flows || self.get(port).flows >= limits.port.flows {
            return Err(Counter::FlowLimit);
        }
        if self.half_open >= limits.half_open || self.get(port).half_open >= limits.port.half_open {
            return Err(Counter::HalfOpenLimit);
        }
        self.may_begin(port, now)
    }

    /// Whether the rates allow another flow of any protocol. It takes from them only if they do.
    pub(crate) fn may_begin(&mut self, port: Port, now: u64) -> Result<(), Counter> {
        if !self.new_flows.has(now) || !self.get(port).new_flows.take(now) {
            return Err(Counter::NewFlowLimit);
        }
        self.new_flows.take(now);
        Ok(())
    }

    /// Notes that a flow has so many bytes from the guest.
    pub(crate) fn note_active(&mut self, port: Port, share: &mut Share, bytes: u32, now: u64) {
        let second = second(now);
        if share.active_in != second {
            let state = self.get(port);
            state.leave(share, second);
            state.busy.flows += 1;
            let follows = Some(share.active_in) == second.checked_sub(1);
            share.lately = [0, if follows { share.lately[0] } else { 0 }];
            (share.active_in, share.offered) = (second, 0);
        }
        let kib = (bytes.saturating_add(512) / 1024).min(u16::MAX.into()) as u16;
        share.lately[0] = share.lately[0].saturating_add(kib);
    }

    /// Notes what a flow's guest may send, in frames of this size.
    ///
    /// A window is not taken back (RFC 9293, 3.8.6). So that a flow that was busy and now sends little does
    /// not keep others from sending until it has used up its large window, what it has beyond
    /// [`most`](Share::most) does not count.
    pub(crate) fn note_offer(
        &mut self,
        port: Port,
        share: &mut Share,
        (window, frame): (u32, u32),
        now: u64,
    ) {
        if self.limits.port.inbox_frames == 0 {
            return;
        }
        let window = window.div_ceil(frame).min(share.most(frame)).min(u16::MAX.into()) as u16;
        let second = second(now);
        if let Some(busy) = self.get(port).busy_of(share, second) {
            busy.offered = busy.offered - u64::from(share.offered) + u64::from(window);
            share.offered = window;
        }
    }

    /// Notes that a flow has ended.
    pub(crate) fn note_end(&mut self, port: Port, share: &mut Share, now: u64) {
        self.get(port).leave(share, second(now));
        *share = Share::NONE;
    }

    /// How many bytes a flow may be offered, so that what all busy flows of the port send fits into one
    /// half of the port's inbox. The other half is for what no window limits: acknowledgments,
    /// datagrams, and what is sent again. A flow may have two segments at least, or one where two of
    /// each do not fit. `frame` is how many bytes the guest puts into one frame, not less than `mss`.
    ///
    /// A flow that sends little has little, so that it does not keep others from sending.
    pub(crate) fn share(
        &mut self,
        port: Port,
        (mss, frame): (u32, u32),
        share: &Share,
        now: u64,
    ) -> u32 {
        let frames = self.limits.port.inbox_frames;
        if frames == 0 {
            return u32::MAX;
        }
        let (all, second) = ((frames / 2).max(1), second(now));
        let state = self.get(port);
        let own = state.busy_of(share, second).is_some();
        let others = Busy {
            flows: state.busy.flows + state.busy_before.flows - u32::from(own),
            offered: state.busy.offered + state.busy_before.offered
                - if own { u64::from(share.offered) } else { 0 },
        };
        let fair = all / (others.flows + 1);
        let left = u64::from(all).saturating_sub(others.offered) as u32;
        let most = if own { share.most(frame) } else { FIRST_WINDOW };
        let least = if fair >= 2 { 2 } else { 1 };
        let frames = fair.min(left).min(most).max(least);
        let large = frames.saturating_mul(frame).min(LARGE_WINDOW);
        large.max(frames.saturating_mul(mss))
    }
}

impl PortState {
    fn turn_to(&mut self, second: u32) {
        if second != self.second {
            let next = second == self.second.wrapping_add(1);
            self.busy_before = if next { self.busy } else { Busy::default() };
            (self.second, self.busy) = (second, Busy::default());
        }
    }

    /// Where a flow counts in this second, if it does.
    fn busy_of(&mut self, share: &Share, second: u32) -> Option<&mut Busy> {
        self.turn_to(second);
        if share.active_in == second {
            Some(&mut self.busy)
        } else if Some(share.active_in) == second.checked_sub(1) {
            Some(&mut self.busy_before)
        } else {
            None
        }
    }

    /// A flow counts no more.
    fn leave(&mut self, share: &Share, second: u32) {
        if let Some(busy) = self.busy_of(share, second) {
            busy.flows -= 1;
            busy.offered -= u64::from(share.offered);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// More bytes than a port's windows hold.
    const MUCH: u32 = 1 << 30;

    /// Goal: a flow counts for its port's windows for a second after its last data, whenever the clock
    /// turns, and not after its end.
    #[test]
    fn a_flow_counts_until_a_second_after_its_data() {
        let mut limits = Limits::default();
        limits.port.inbox_frames = 200;
        let (mut ports, port, mss) = (Ports::new(limits), Port(2), 1000);
        let size = (mss, mss);
        let [mut first, mut second] = [Share::NONE; 2];
        let at = |tenths: u64| tenths * 100_000;
        // Even in the first second of all, nobody has sent anything.
        assert_eq!(ports.share(port, size, &first, at(0)), FIRST_WINDOW * mss);
        ports.note_active(port, &mut first, MUCH, at(9));
        assert_eq!(ports.share(port, size, &first, at(9)), 100 * mss);
        ports.note_offer(port, &mut first, (100 * mss, mss), at(9));
        // The clock has turned. Another flow gets nothing of what is promised.
        ports.note_active(port, &mut second, MUCH, at(11));
        assert_eq!(ports.share(port, size, &second, at(11)), 2 * mss);
        ports.note_offer(port, &mut second, (2 * mss, mss), at(11));
        // The first one's window closes, and becomes the other's.
        ports.note_offer(port, &mut first, (60 * mss, mss), at(12));
        assert_eq!(ports.share(port, size, &second, at(12)), 40 * mss);
        assert_eq!(ports.share(port, size, &first, at(12)), 50 * mss);
        // After two turns it counts no more, and one that ends counts no more at once.
        assert_eq!(ports.share(port, size, &second, at(20)), 100 * mss);
        ports.note_active(port, &mut first, MUCH, at(21));
        assert_eq!(ports.share(port, size, &first, at(21)), 50 * mss);
        ports.note_end(port, &mut second, at(21));
        assert_eq!(ports.share(port, size, &first, at(21)), 100 * mss);
    }

    /// Goal: a flow that has sent a few bytes leaves the others their windows, and one that sends much has
    /// its own as soon as it needs it.
    #[test]
    fn windows_grow_with_what_was_sent() {
        let mut limits = Limits::default();
        limits.port.inbox_frames = 256;
        let (mut ports, port, now) = (Ports::new(limits), Port(2), 5_000_000);
        let [mut control, mut data] = [Share::NONE; 2];
        ports.note_active(port, &mut control, 165, now);
        assert_eq!(ports.share(port, (1000, 1000), &control, now), FIRST_WINDOW * 1000);
        ports.note_offer(port, &mut control, (FIRST_WINDOW * 1000, 1000), now);
        ports.note_active(port, &mut data, 10_000, now);
        assert_eq!(ports.share(port, (1000, 1000), &data, now), (FIRST_WINDOW + 20) * 1000);
        ports.note_active(port, &mut data, 990_000, now);
        assert_eq!(ports.share(port, (1000, 1000), &data, now), 64_000);
    }

    /// Goal: a flow that was busy and now sends little counts a small window after two seconds, whatever it
    /// still has, and has no more than that. One that goes on sending counts what it has.
    #[test]
    fn a_large_window_counts_as_long_as_it_is_used() {
        let mut limits = Limits::default();
        limits.port.inbox_frames = 256;
        let (mut ports, port, size) = (Ports::new(limits), Port(2), (1000, 1000));
        let [mut old, mut new] = [Share::NONE; 2];
        let at = |second: u64| second * 1_000_000;
        for (second, bytes, others) in
            [(5, MUCH, 2), (6, MUCH, 2), (7, 100, 2), (8, 100, 64), (10, MUCH, 2), (11, 100, 2)]
        {
            ports.note_active(port, &mut old, bytes, at(second));
            ports.note_offer(port, &mut old, (128_000, 1000), at(second));
            ports.note_active(port, &mut new, MUCH, at(second));
            assert_eq!(ports.share(port, size, &new, at(second)), others * 1000, "{second}");
            let most = if others == 2 { 64 } else { FIRST_WINDOW };
            assert_eq!(ports.share(port, size, &old, at(second)), most * 1000, "{second}");
        }
    }

    /// Goal: a guest that fills its frames may send more bytes in as many frames, and one that does not
    /// leaves it its part.
    #[test]
    fn windows_count_frames_of_the_guests_size() {
        let mut limits = Limits::default();
        limits.port.inbox_frames = 200;
        let (mut ports, port, now) = (Ports::new(limits), Port(2), 5_000_000);
        let [mut large, mut small] = [Share::NONE; 2];
        ports.note_active(port, &mut large, MUCH, now);
        assert_eq!(ports.share(port, (1000, 8000), &large, now), 800_000);
        assert_eq!(ports.share(port, (1000, 30_000), &large, now), LARGE_WINDOW);
        assert_eq!(ports.share(port, (30_000, 30_000), &large, now), 3_000_000);
        ports.note_offer(port, &mut large, (800_000, 8000), now);
        ports.note_active(port, &mut small, MUCH, now);
        assert_eq!(ports.share(port, (1000, 1000), &small, now), 2000);
        ports.note_offer(port, &mut large, (400_000, 8000), now);
        assert_eq!(ports.share(port, (1000, 1000), &small, now), 50_000);
        // The large one goes over to small frames.
        ports.note_offer(port, &mut large, (100_000, 1000), now);
        assert_eq!(ports.share(port, (1000, 1000), &small, now), 2000);
    }
}
