//! `vmring demo`: two guests get addresses, ping each other and move a gigabyte.

pub(crate) mod guest;
mod host;
#[cfg(target_os = "linux")]
mod kernel;
mod limits;
pub(crate) mod nic;
mod setup;
mod summary;
#[cfg(target_os = "linux")]
mod tap;

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use smoltcp::wire::Ipv4Cidr;
use vmring::{Interface, Poller, RingControl};

use crate::args::DemoArgs;
use crate::failure::Failure;
use crate::progress::{Progress, say};
use crate::recording::Recording;
use crate::report::{bytes, offload_names, print_json, print_report, round};
use crate::stop::Stop;
use crate::stream::Stream;
use crate::system;
use guest::{Command, Guest, Lease, Pings, Report};
use host::HostServer;
use limits::{
    BYTES, END_TIMEOUT, FETCH, LEASE_TIMEOUT, PINGS, PINGS_TIMEOUT, STALL_TIMEOUT, TICK, window,
};
use setup::{DemoNetwork, Settings};
use summary::{CaptureSummary, GuestSummary, IdleSummary, KERNEL, Summary, TransferSummary};

/// The guest that sends, and the one that receives.
const SENDER: usize = 0;
const RECEIVER: usize = 1;

pub(crate) fn run(args: &DemoArgs) -> Result<(), Failure> {
    let settings = Settings::of(args)?;
    #[cfg(target_os = "linux")]
    if settings.has_kernel() {
        return crate::tap::in_namespace(|| run_with(args, &settings))?;
    }
    run_with(args, &settings)
}

fn run_with(args: &DemoArgs, settings: &Settings) -> Result<(), Failure> {
    let (tell, reports) = channel();
    let stop = {
        let tell = tell.clone();
        // The receiver lives as long as the demo, and afterwards nobody needs the report.
        Stop::on_signals_then(move || drop(tell.send((0, Report::Stop))))?
    };
    let capture = match &args.capture {
        None => None,
        Some(path) => {
            // Finds invalid settings before the file is touched.
            drop(DemoNetwork::start(settings, None).map_err(Failure::starting)?);
            Some(Recording::create(path)?)
        }
    };
    let network =
        DemoNetwork::start(settings, capture.as_ref().map(|recording| &recording.capture));
    let network = match (network, &capture) {
        (Ok(network), _) => network,
        (Err(error), recording) => {
            if let Some(recording) = recording {
                recording.discard();
            }
            return Err(Failure::starting(error));
        }
    };
    let mut summary = Summary {
        device: network.sides[0].interface.device_name().to_owned(),
        offloads: offload_names(network.sides[0].interface.capabilities().offloads),
        mode: args.mode.to_string(),
        drive: args.drive.to_string(),
        ..Summary::default()
    };
    let channel = (tell, reports);
    let demo = Demo::start(network, settings, stop.clone(), channel, &mut summary)?;
    let steps = demo.steps(args, &mut summary);
    summary.interrupted = steps.is_err() && stop.is_wanted();
    let end = demo.end(&mut summary);
    let recorded = capture.map_or(Ok(()), |recording| {
        let finished = recording.finish();
        let (packets, lost) = (recording.capture.packets(), recording.capture.lost());
        summary.capture = Some(CaptureSummary { file: recording.name(), packets, lost });
        finished
    });
    // Reports the first failure.
    let outcome = steps.and(end).and(recorded);
    summary.ok = outcome.is_ok();
    summary.failed = outcome.as_ref().err().map(ToString::to_string);
    if args.json {
        print_json(&summary)?;
    } else {
        print_report(&summary.text())?;
    }
    outcome
}

/// A report and the number of the guest that sends it.
type Numbered = (usize, Report);

/// The running guests, and what stays on this thread.
struct Demo {
    names: [&'static str; 2],
    guests: Vec<Guest>,
    interfaces: Vec<Interface>,
    controls: Vec<RingControl>,
    reports: Receiver<Numbered>,
    stop: Stop,
    /// What the demo does now, for the sentence that says what a signal has cut short.
    step: RefCell<String>,
    /// What a guest fetches from.
    host: Option<HostServer>,
    /// Kept as long as its rings exist.
    poller: Option<Poller>,
}

impl Demo {
    fn start(
        network: DemoNetwork,
        settings: &Settings,
        stop: Stop,
        (tell, reports): (Sender<Numbered>, Receiver<Numbered>),
        summary: &mut Summary,
    ) -> Result<Self, Failure> {
        let poller = network.poller;
        let other = if settings.has_kernel() { KERNEL } else { "guest1" };
        let mut demo = Self {
            names: ["guest0", other],
            guests: Vec::new(),
            interfaces: Vec::new(),
            controls: Vec::new(),
            reports,
            stop,
            step: RefCell::default(),
            host: settings.host(),
            poller,
        };
        for (number, side) in network.sides.into_iter().enumerate() {
            let (interface, control, nic) = side.into_nic();
            summary.guests.push(GuestSummary::new(demo.names[number], &interface));
            let guest = Guest::start(number, interface.mac(), nic, control.clone(), tell.clone())
                .map_err(|error| Failure::Step(format!("a guest's thread: {error}")))?;
            demo.guests.push(guest);
            demo.interfaces.push(interface);
            demo.controls.push(control);
        }
        #[cfg(target_os = "linux")]
        if settings.has_kernel() {
            let mut kernel = GuestSummary::new(KERNEL, &demo.interfaces[0]);
            kernel.mac = tap::HOST_MAC.to_string().to_lowercase();
            summary.guests.push(kernel);
            let kernel = kernel::start(demo.guests.len(), tell)
                .map_err(|error| Failure::Step(format!("the kernel's thread: {error}")))?;
            demo.guests.push(kernel);
        }
        Ok(demo)
    }

    fn steps(&self, args: &DemoArgs, summary: &mut Summary) -> Result<(), Failure> {
        let leases = self.get_addresses(summary)?;
        self.ping_all(&leases, summary)?;
        let bytes = args.bytes.map(|size| size.0);
        if let Some(bytes) = bytes.or(args.idle.is_none().then_some(BYTES)) {
            let there = self.transfer((SENDER, RECEIVER), bytes, &leases)?;
            whole(summary.transfer.insert(there), bytes)?;
            if self.has_kernel() {
                let back = self.transfer((RECEIVER, SENDER), bytes, &leases)?;
                whole(summary.transfer_back.insert(back), bytes)?;
            }
            if let Some(host) = &self.host {
                let bytes = bytes.min(FETCH);
                let fetched = self.fetch(host, bytes, &leases)?;
                whole(summary.fetch.insert(fetched), bytes)?;
            }
        }
        if let Some(seconds) = args.idle {
            self.idle(Duration::from_secs(seconds), &leases, summary)?;
        }
        Ok(())
    }

    fn has_kernel(&self) -> bool {
        self.names[1] == KERNEL
    }

    /// Names the step that begins now.
    fn begin(&self, step: impl Into<String>) {
        *self.step.borrow_mut() = step.into();
    }

    /// Fails if a signal has asked the demo to end.
    fn go_on(&self) -> Result<(), Failure> {
        if !self.stop.is_wanted() {
            return Ok(());
        }
        Err(Failure::Step(format!("a signal ended the demo while {}", self.step.borrow())))
    }

    /// The next report, or `None` at the `deadline`. Fails if a guest has failed, and if a signal
    /// has asked the demo to end.
    fn next(&self, deadline: Instant) -> Result<Option<(usize, Report)>, Failure> {
        self.go_on()?;
        let left = deadline.saturating_duration_since(Instant::now());
        match self.reports.recv_timeout(left) {
            Ok((_, Report::Stop)) => {
                self.go_on()?;
                Ok(None)
            }
            Ok((number, Report::Failed(why))) => {
                Err(Failure::Step(format!("{}: {why}", self.names[number])))
            }
            Ok(report) => Ok(Some(report)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Failure::Step("the guests' threads have ended".to_owned()))
            }
        }
    }

    /// Waits for a report that `pick` accepts.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        what: &str,
        mut pick: impl FnMut(usize, Report) -> Option<T>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + timeout;
        while let Some((number, report)) = self.next(deadline)? {
            if let Some(picked) = pick(number, report) {
                return Ok(picked);
            }
        }
        Err(Failure::Step(format!("{what} within {} seconds", timeout.as_secs())))
    }

    fn get_addresses(&self, summary: &mut Summary) -> Result<[Lease; 2], Failure> {
        self.begin("the guests asked for addresses");
        let mut leases = [None; 2];
        let leases = self.wait_for(LEASE_TIMEOUT, "a guest got no address", |number, report| {
            if let Report::Leased(lease) = report {
                summary.guests[number].set_lease(&lease);
                leases[number] = Some(lease);
                if self.has_kernel() {
                    // The server that answered is the kernel itself.
                    let own = Lease {
                        address: Ipv4Cidr::new(lease.server, lease.address.prefix_len()),
                        router: None,
                        seconds: None,
                        ..lease
                    };
                    summary.guests[1].set_lease(&own);
                    leases[1] = Some(own);
                }
            }
            leases[0].zip(leases[1])
        })?;
        let leases = [leases.0, leases.1];
        for (number, lease) in leases.iter().enumerate() {
            say(&format!("  {} has the address {}", self.names[number], lease.address));
        }
        if leases[0].address.address() == leases[1].address.address() {
            return Err(Failure::Step("both guests got the same address".to_owned()));
        }
        Ok(leases)
    }

    fn ping(&self, from: usize, target: Ipv4Addr, count: u32) -> Result<Pings, Failure> {
        self.guests[from].tell(Command::Ping { target, count });
        let what = format!("{} did not finish its pings of {target}", self.names[from]);
        self.wait_for(PINGS_TIMEOUT, &what, |number, report| match report {
            Report::Pinged(pings) if number == from => Some(pings),
            _ => None,
        })
    }

    fn ping_all(&self, leases: &[Lease; 2], summary: &mut Summary) -> Result<(), Failure> {
        let address = |guest: usize| (self.names[guest], leases[guest].address.address());
        let gateway = |guest: usize| ("gateway", leases[guest].server);
        // In this order the guests have to resolve few MACs; see `CONTACT_TIMEOUT`.
        let paths = [(0, address(1)), (1, address(0)), (1, gateway(1)), (0, gateway(0))];
        // With the kernel, the other guest is the gateway.
        let paths = if self.has_kernel() { &paths[..2] } else { &paths[..] };
        for &(from, (to, target)) in paths {
            self.begin(format!("{} pinged {to}", self.names[from]));
            let pings = self.ping(from, target, PINGS)?;
            let answered = pings.round_trips.len();
            summary.ping.add(self.names[from].to_owned(), to.to_owned(), &pings);
            if answered < PINGS as usize {
                return Err(Failure::Step(format!(
                    "{answered} of {PINGS} pings from {} to {to} ({target}) were answered",
                    self.names[from]
                )));
            }
        }
        let (sent, p50) = (summary.ping.sent, summary.ping.rtt_us_p50.unwrap_or_default());
        say(&format!("  {sent} of {sent} pings answered, half of them within {p50:.1} us"));
        Ok(())
    }

    fn transfer(
        &self,
        (from, to): (usize, usize),
        bytes: u64,
        leases: &[Lease; 2],
    ) -> Result<TransferSummary, Failure> {
        let window = window(self.interfaces[0].mtu());
        self.begin(format!("{} began to listen", self.names[to]));
        self.guests[to].tell(Command::Receive { window, from: None });
        self.wait_for(END_TIMEOUT, "the receiving guest did not listen", |_, report| {
            matches!(report, Report::Listening).then_some(())
        })?;
        let before = self.written();
        let stream = Stream::new(bytes ^ 0x766d_7269_6e67);
        let target = leases[to].address.address();
        let names = (self.names[from], self.names[to]);
        let what = format!("sending {} from {} to {}", self::bytes(bytes), names.0, names.1);
        let mut progress = Progress::of_bytes(&what, bytes);
        let begin = |arrived: &str| {
            let all = self::bytes(bytes);
            self.begin(format!("{} sent {all} to {}: {arrived} had arrived", names.0, names.1));
        };
        begin("nothing");
        self.guests[from].tell(Command::Send { target, bytes, stream: stream.clone(), window });

        let (mut started, mut received) = (None, None);
        let counter = &self.guests[to].progress;
        let mut moved = (0, Instant::now());
        let (started, received) = loop {
            match self.next(Instant::now() + TICK)? {
                Some((_, Report::Sent { started: at })) => started = Some(at),
                Some((_, Report::Received(all))) => received = Some(all),
                _ => {}
            }
            if let (Some(started), Some(received)) = (started, &received) {
                break (started, received.clone());
            }
            let position = counter.load(Ordering::Relaxed);
            progress.at(position);
            if position > moved.0 {
                begin(&self::bytes(position));
                moved = (position, Instant::now());
            } else if moved.1.elapsed() > STALL_TIMEOUT {
                return Err(Failure::Step(format!(
                    "the transfer has stalled after {} of {bytes} bytes",
                    position
                )));
            }
        };
        drop(progress);
        let after = self.written();

        // The expected digest is computed here and not while sending, so that the time above
        // contains only the transfer.
        say("  checking what arrived");
        self.begin("the command checked what had arrived");
        let digest = stream.digest(bytes, || self.go_on())?;
        let data_packets = after[from] - before[from];
        let packets = data_packets + after[to] - before[to];
        let names = (names.0.to_owned(), names.1.to_owned());
        let moved = (started, &received);
        Ok(TransferSummary::of(names, moved, (bytes, digest), (packets, data_packets)))
    }

    /// A guest fetches something from the host's side, by the network's way out.
    fn fetch(
        &self,
        host: &HostServer,
        bytes: u64,
        leases: &[Lease; 2],
    ) -> Result<TransferSummary, Failure> {
        let guest = RECEIVER;
        let from = (leases[guest].server, host.port());
        let stream = Stream::new(bytes ^ 0x686f_7374);
        let failed = |error| Failure::Step(format!("the server on the host's side: {error}"));
        let (window, before) = (window(self.interfaces[0].mtu()), self.controls[guest].stats());
        let name = self.names[guest];
        self.begin(format!("{name} fetched {} from the host", self::bytes(bytes)));
        host.serve(stream.clone(), bytes).map_err(failed)?;
        let started = Instant::now();
        self.guests[guest].tell(Command::Receive { window, from: Some(from) });
        let mut moved = (0, Instant::now());
        let received = loop {
            if let Some((_, Report::Received(all))) = self.next(Instant::now() + TICK)? {
                break all;
            }
            let position = self.guests[guest].progress.load(Ordering::Relaxed);
            if position > moved.0 {
                moved = (position, Instant::now());
            } else if moved.1.elapsed() > STALL_TIMEOUT {
                return Err(Failure::Step(format!(
                    "what {name} fetched has stalled after {position} of {bytes} bytes"
                )));
            }
        };
        let after = self.controls[guest].stats();
        let digest = stream.digest(bytes, || self.go_on())?;
        let data_packets = after.rx_packets - before.rx_packets;
        let packets = data_packets + after.tx_packets - before.tx_packets;
        let names = (format!("the host, {}:{},", from.0, from.1), name.to_owned());
        let moved = (started, &received);
        Ok(TransferSummary::of(names, moved, (bytes, digest), (packets, data_packets)))
    }

    /// Packets that each guest has written so far. For the kernel: those that the guest has read.
    fn written(&self) -> [u64; 2] {
        let of = |number: usize| self.controls.get(number).map(RingControl::stats);
        let first = of(0).unwrap_or_default();
        [first.tx_packets, of(1).map_or(first.rx_packets, |other| other.tx_packets)]
    }

    fn idle(
        &self,
        time: Duration,
        leases: &[Lease; 2],
        summary: &mut Summary,
    ) -> Result<(), Failure> {
        let what = if self.has_kernel() { "the guest idles" } else { "both guests idle" };
        let mut progress = Progress::of_time(what, time);
        self.begin(if self.has_kernel() { "the guest idled" } else { "both guests idled" });
        let (start, cpu) = (Instant::now(), system::cpu_time());
        let tick = if progress.is_watched() { Duration::from_secs(1) } else { time };
        while start.elapsed() < time {
            // Guests may renew their leases. No other report is expected.
            self.next((Instant::now() + tick).min(start + time))?;
            progress.at_time(start.elapsed());
        }
        let (elapsed, cpu) = (start.elapsed(), system::cpu_time().saturating_sub(cpu));
        drop(progress);
        let pings = self.ping(SENDER, leases[RECEIVER].address.address(), 1)?;
        let next_packet_arrived = pings.round_trips.len() == 1;
        summary.idle = Some(IdleSummary {
            seconds: round(elapsed.as_secs_f64(), 3),
            cpu_percent: round(100.0 * cpu.as_secs_f64() / elapsed.as_secs_f64(), 3),
            next_packet_arrived,
        });
        if next_packet_arrived {
            Ok(())
        } else {
            Err(Failure::Step("after idling, a ping was not answered".to_owned()))
        }
    }

    /// Ends the guests and collects their counters.
    fn end(self, summary: &mut Summary) -> Result<(), Failure> {
        let Self { names, guests, interfaces, controls, reports, poller, .. } = self;
        let mut ended = true;
        for guest in guests {
            ended &= guest.quit(END_TIMEOUT);
        }
        for (number, control) in controls.iter().enumerate() {
            summary.guests[number].set_counters(&control.stats());
        }
        #[cfg(target_os = "linux")]
        if names[1] == KERNEL {
            summary.engine = Some(crate::tap::engine(&interfaces[0]));
            let dropped = crate::tap::dropped();
            summary.count_drops("for a full TAP", dropped);
        }
        for (reason, n) in interfaces.iter().flat_map(Interface::drops) {
            summary.count_drops(reason, n);
        }
        drop((interfaces, poller));
        let mut outcome = Ok(());
        for (number, report) in reports.try_iter() {
            match report {
                Report::Failed(why) => {
                    let failure = Failure::Step(format!("{}: {why}", names[number]));
                    outcome = outcome.and(Err(failure));
                }
                Report::Ended(losses) => {
                    losses.iter().for_each(|(reason, n)| summary.count_drops(reason, *n));
                }
                _ => {}
            }
        }
        if !ended {
            let why = format!("a guest's thread did not end within {} s", END_TIMEOUT.as_secs());
            outcome = outcome.and(Err(Failure::Step(why)));
        }
        outcome
    }
}

/// Fails if the transfer did not deliver every byte as it was sent.
fn whole(transfer: &TransferSummary, bytes: u64) -> Result<(), Failure> {
    if transfer.sha256_ok {
        return Ok(());
    }
    let TransferSummary { bytes: got, from, to, .. } = transfer;
    Err(Failure::Step(format!(
        "what arrived is not what was sent: {got} of {bytes} bytes from {from} to {to}, and the \
         SHA-256 differs"
    )))
}
