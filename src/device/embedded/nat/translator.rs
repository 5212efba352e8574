//! The translator of a network: its threads while they run, and what they are asked.

use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use vmring_embedded::{Network, NetworkConfig, Router, RouterEnd};
use vmring_nat::limits::{DNS_PORT, FORWARDS};
use vmring_nat::sys::{Host, Waker, has_ipv6_route};
use vmring_nat::{Counters, ForwardError, ForwardRule, HostPort, Protocol, SocketError};

use super::guests::Directory;
use super::limits::COMMAND_TIMEOUT;
use super::settings::NatSettings;
use super::worker::{self, Command, Commands, NatReport, Worker};
use crate::device::slot::PostedSlot;
use crate::error::{ConfigError, Error};
use crate::sync::Mutex;
use crate::sys::lock;

/// The translator of a network: what it is set to, and its threads while they run.
pub(super) struct Translator {
    settings: NatSettings,
    network: NetworkConfig,
    gateway_mac: [u8; 6],
    workers: Box<[Place]>,
    /// What the threads know together, while there are any.
    directory: Mutex<Weak<Directory>>,
    /// It is held while forwards are added, if several threads have them.
    adding: Mutex<()>,
    /// Whether the gateway's role is set and the forwards of the settings are there.
    has_begun: Mutex<bool>,
}

/// The place of one thread.
#[derive(Default)]
struct Place {
    commands: Arc<Commands>,
    thread: Mutex<Option<Running>>,
}

struct Running {
    thread: thread::JoinHandle<()>,
    waker: Waker,
}

/// Gives a network its way out, unless it has it, and adds the forwards that it is set to.
pub(crate) fn set_up(
    network: &Arc<Network<PostedSlot>>,
    settings: &NatSettings,
) -> Result<(), Error> {
    let Some(gateway) = network.gateway() else { return Ok(()) };
    let router = network.set_router(Arc::new(Translator {
        settings: settings.clone(),
        network: network.config().clone(),
        gateway_mac: gateway.mac().into_array(),
        workers: (0..network.config().router_workers).map(|_| Place::default()).collect(),
        directory: Mutex::default(),
        adding: Mutex::default(),
        has_begun: Mutex::new(false),
    }));
    match router.and_then(|router| translator(router.clone())) {
        Some(translator) => translator.begin(network),
        None => Ok(()),
    }
}

/// The translator that a router is.
fn translator(router: Arc<dyn Router<PostedSlot>>) -> Option<Arc<Translator>> {
    router.as_any().downcast().ok()
}

/// The translator of a network, if it has one.
pub(super) fn translator_of(network: &Network<PostedSlot>) -> Option<Arc<Translator>> {
    translator(network.router()?.clone())
}

impl Translator {
    /// Sets whether the gateway leads to the world over IPv6, and adds the forwards of the settings: all of
    /// them or none. Only the first call does.
    fn begin(&self, network: &Network<PostedSlot>) -> Result<(), Error> {
        // The lock is held so that nobody joins before they are there.
        let mut has_begun = lock(&self.has_begun);
        if *has_begun {
            return Ok(());
        }
        if network.config().ipv6.is_some() {
            // The thread looks again, while it runs.
            network.set_ipv6_router(has_ipv6_route());
        }
        let mut added = Vec::new();
        for rule in &self.settings.forwards {
            match add(self, network, rule) {
                Ok(at) => added.push((rule, at)),
                Err(error) => {
                    for (rule, at) in added {
                        for index in 0..rule.count {
                            let at = SocketAddr::new(at.ip(), at.port() + index);
                            // It was there a moment ago.
                            let _ = remove(self, rule.protocol, at, true);
                        }
                    }
                    return Err(error);
                }
            }
        }
        *has_begun = true;
        Ok(())
    }
}

impl Router<PostedSlot> for Translator {
    fn start(&self, mut end: RouterEnd<PostedSlot>) -> io::Result<()> {
        let place = &self.workers[end.worker()];
        let before = lock(&place.thread).take();
        if let Some(before) = before {
            // It has dropped the network's end, so it is about to end.
            let _ = before.thread.join();
        }
        let host = Host::new()?;
        let waker = host.waker();
        let wake = waker.clone();
        end.set_wake(Arc::new(move || wake.wake()));
        let worker = Worker::new(host, &self.settings, &self.network, self.gateway_mac);
        let directory = {
            let mut directory = lock(&self.directory);
            directory.upgrade().unwrap_or_else(|| {
                let new = Arc::new(worker.directory(&self.network));
                *directory = Arc::downgrade(&new);
                new
            })
        };
        let name = match end.worker() {
            0 => "vmring-nat".to_owned(),
            number => format!("vmring-nat-{number}"),
        };
        let commands = Arc::clone(&place.commands);
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || worker::run(worker, end, &directory, &commands))?;
        *lock(&place.thread) = Some(Running { thread, waker });
        Ok(())
    }

    fn stop(&self) {
        let running =
            |place: &Place| Some((lock(&place.thread).take()?, Arc::clone(&place.commands)));
        let all: Vec<_> = self.workers.iter().filter_map(running).collect();
        for (Running { waker, .. }, commands) in &all {
            commands.stop();
            waker.wake();
        }
        for (Running { thread, .. }, _) in all {
            // It panicked, if it returns an error. That was printed.
            let _ = thread.join();
        }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn ports_of_gateway(&self) -> Vec<(u8, u16)> {
        let port = |port: &HostPort| Some((number_of(port.protocol)?, port.port));
        let dns = [6, 17].map(|number| (number, DNS_PORT));
        self.settings.host_ports.iter().filter_map(port).chain(dns).collect()
    }
}

/// The answer of a thread that was asked.
struct Answer<T>(Receiver<T>, Instant);

impl<T> Answer<T> {
    fn wait(self) -> Result<T, Error> {
        let left = self.1.saturating_duration_since(Instant::now());
        self.0.recv_timeout(left).map_err(|_| Error::Timeout(COMMAND_TIMEOUT))
    }
}

impl Place {
    /// Asks the thread of this place. Returns `None` if it does not run.
    fn ask<T>(&self, command: impl FnOnce(SyncSender<T>) -> Command) -> Option<Answer<T>> {
        let (answer, answers) = sync_channel(1);
        let running = lock(&self.thread);
        let running = running.as_ref().filter(|running| !running.thread.is_finished())?;
        self.commands.push(command(answer));
        running.waker.wake();
        Some(Answer(answers, Instant::now() + COMMAND_TIMEOUT))
    }
}

impl Translator {
    /// Asks all threads that run, but for one if it is named, and waits for their answers.
    fn ask_all<T>(
        &self,
        but: Option<usize>,
        command: impl Fn(SyncSender<T>) -> Command,
    ) -> Result<Vec<T>, Error> {
        let places = self.workers.iter().enumerate();
        let others = places.filter(|(index, _)| Some(*index) != but);
        let asked: Vec<_> = others.filter_map(|(_, place)| place.ask(&command)).collect();
        asked.into_iter().map(Answer::wait).collect()
    }

    /// Adds the forward of one port, or of all ports of a rule if there is one thread.
    fn add_to(
        &self,
        worker: usize,
        rule: &ForwardRule,
    ) -> Result<Result<SocketAddr, ForwardError>, Error> {
        let asked = self.workers[worker].ask(|answer| Command::Add(*rule, answer));
        // The thread has ended, because it has panicked.
        asked.ok_or(Error::Timeout(COMMAND_TIMEOUT))?.wait()
    }

    /// Adds the forwards of a rule, each to the thread that has what its guest sends from there.
    fn add_to_several(
        &self,
        network: &Network<PostedSlot>,
        rule: &ForwardRule,
    ) -> Result<SocketAddr, Error> {
        let refused = |why| refusal(why, rule);
        let _one_at_a_time = lock(&self.adding);
        let rules = rule.ports().map_err(refused)?;
        let places = self.ask_all(None, Command::Places)?.concat();
        if places.len() + usize::from(rule.count) > FORWARDS {
            return Err(refused(ForwardError::TooMany));
        }
        let mut added = Vec::new();
        for one in rules {
            let at = SocketAddr::new(one.bind, one.port);
            let is_taken = one.port != 0 && places.contains(&(one.protocol, at));
            let one = match is_taken {
                true => Err(refused(ForwardError::InUse(one.port))),
                false => self.add_one(network, &one).and_then(|added| added.map_err(refused)),
            };
            match one {
                Ok(at) => added.push(at),
                Err(error) => {
                    for at in added {
                        // It was there a moment ago.
                        let _ = remove(self, rule.protocol, at, true);
                    }
                    return Err(error);
                }
            }
        }
        added.first().copied().ok_or_else(|| refused(ForwardError::Range))
    }

    /// Adds the forward of one port to the thread that has what its guest sends from there.
    fn add_one(
        &self,
        network: &Network<PostedSlot>,
        rule: &ForwardRule,
    ) -> Result<Result<SocketAddr, ForwardError>, Error> {
        let number = number_of(rule.protocol).unwrap_or(0);
        let worker = network.router_worker(number, rule.guest_port);
        let added = self.add_to(worker, rule)?;
        if !matches!(added, Err(ForwardError::InUse(_))) || rule.protocol != Protocol::Udp {
            return Ok(added);
        }
        // A flow of another thread may have the port.
        self.ask_all(Some(worker), |answer| Command::GiveUp(rule.port, answer))?;
        self.add_to(worker, rule)
    }
}

/// Adds a forward. See [`NatControl::add_forward`](super::NatControl::add_forward).
pub(super) fn add(
    translator: &Translator,
    network: &Network<PostedSlot>,
    rule: &ForwardRule,
) -> Result<SocketAddr, Error> {
    network.start_router().map_err(Error::io("starting the translator"))?;
    match translator.workers.len() {
        1 => translator.add_to(0, rule)?.map_err(|why| refusal(why, rule)),
        _ => translator.add_to_several(network, rule),
    }
}

/// Removes a forward. See [`NatControl::remove_forward`](super::NatControl::remove_forward).
pub(super) fn remove(
    translator: &Translator,
    protocol: Protocol,
    at: SocketAddr,
    cut: bool,
) -> Result<bool, Error> {
    let removed = translator.ask_all(None, |answer| Command::Remove(protocol, at, cut, answer))?;
    Ok(removed.contains(&true))
}

/// What the threads of a translator do together, or `None` if none runs.
fn report_of_all(translator: &Translator) -> Result<Option<NatReport>, Error> {
    let mut reports = translator.ask_all(None, Command::Report)?.into_iter();
    let first = reports.next();
    Ok(first.map(|first| {
        reports.fold(first, |mut all, other| {
            all.add(other);
            all
        })
    }))
}

/// What a translator does. See [`NatControl::report`](super::NatControl::report).
pub(super) fn report(translator: &Translator) -> Result<NatReport, Error> {
    Ok(report_of_all(translator)?.unwrap_or_default())
}

/// What a translator has counted, or `None` if no thread of it runs.
pub(super) fn counters_of(translator: &Translator) -> Result<Option<Counters>, Error> {
    Ok(report_of_all(translator)?.map(|report| report.counters))
}

/// The number of a protocol with ports (IANA's protocol numbers).
fn number_of(protocol: Protocol) -> Option<u8> {
    match protocol {
        Protocol::Tcp => Some(6),
        Protocol::Udp => Some(17),
        _ => None,
    }
}

/// The error of a forward that was refused.
fn refusal(error: ForwardError, rule: &ForwardRule) -> Error {
    let errno = match error {
        ForwardError::InUse(_) => libc::EADDRINUSE,
        ForwardError::NoPrivilege(_) => libc::EACCES,
        ForwardError::NoAddress => libc::EADDRNOTAVAIL,
        ForwardError::NoDescriptor => libc::EMFILE,
        ForwardError::System(SocketError::Other(errno)) if errno != 0 => errno,
        error => return ConfigError::Invalid(format!("the forward {rule}: {error}")).into(),
    };
    let system = io::Error::from_raw_os_error(errno);
    let why = match error {
        ForwardError::System(_) => system.to_string(),
        error => error.to_string(),
    };
    let source = io::Error::new(system.kind(), format!("the forward {rule}: {why}"));
    Error::Io { what: "listening at the host's port", source }
}
