//! What is counted and limited for each port.

use crate::config::Limits;
use crate::limits::{ERRORS_PER_SECOND, FIRST_WINDOW, MAX_PORTS};
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
    pub(crate) new_flows: Bucket,
    errors: Bucket,
    /// The second that `active` is about.
    second: u32,
    /// How many flows had data from the guest in this second, and in the one before.
    active: u32,
    active_before: u32,
    /// What these flows are offered in this second, in bytes.
    offered: u64,
}

/// The second of a time.
fn second(now: u64) -> u32 {
    (now / 1_000_000) as u32
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
        }
    }

    /// How many sockets there are.
    pub(crate) fn descriptors(&self) -> usize {
        self.tcp_descriptors + self.other_descriptors
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
                new_flows: Bucket::new(limits.new_flows_per_second),
                errors: Bucket::new(ERRORS_PER_SECOND),
                second: 0,
                active: 0,
                active_before: 0,
                offered: 0,
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

    /// Notes that a flow has data from the guest. `active_in` is the second in which it last had, and
    /// `offered` is what was noted for it then.
    pub(crate) fn note_active(
        &mut self,
        port: Port,
        active_in: &mut u32,
        offered: &mut u32,
        now: u64,
    ) {
        let second = second(now);
        if *active_in != second {
            (*active_in, *offered) = (second, 0);
            let state = self.get(port);
            state.turn_to(second);
            state.active += 1;
        }
    }

    /// Notes what a flow's guest may send. `offered` is what was noted before.
    pub(crate) fn note_offer(
        &mut self,
        port: Port,
        active_in: u32,
        offered: &mut u32,
        window: u32,
        now: u64,
    ) {
        let second = second(now);
        if self.limits.port.inbox_frames > 0 && active_in == second {
            let state = self.get(port);
            state.turn_to(second);
            state.offered = state.offered - u64::from(*offered) + u64::from(window);
            *offered = window;
        }
    }

    /// How many bytes a flow may be offered, so that what all busy flows of the port send fits into the
    /// port's inbox, with two segments for each at least.
    pub(crate) fn share(
        &mut self,
        port: Port,
        mss: u32,
        active_in: u32,
        offered: u32,
        now: u64,
    ) -> u32 {
        let frames = self.limits.port.inbox_frames;
        if frames == 0 {
            return u32::MAX;
        }
        let (all, second) = (frames.saturating_mul(mss), second(now));
        let state = self.get(port);
        state.turn_to(second);
        let busy = state.active.max(state.active_before).max(1);
        let share = if active_in == second {
            let others = state.offered - u64::from(offered);
            (all / busy).min(u64::from(all).saturating_sub(others) as u32)
        } else {
            (all / busy).min(FIRST_WINDOW * mss)
        };
        share.max(2 * mss)
    }
}

impl PortState {
    fn turn_to(&mut self, second: u32) {
        if second != self.second {
            let next = second == self.second.wrapping_add(1);
            self.active_before = if next { self.active } else { 0 };
            (self.second, self.active, self.offered) = (second, 0, 0);
        }
    }
}
