//! The translator of a network: its thread while that runs, and what it is asked.

use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use vmring_embedded::{Network, NetworkConfig, Router, RouterEnd};
use vmring_nat::limits::DNS_PORT;
use vmring_nat::sys::{Host, Waker, has_ipv6_route};
use vmring_nat::{Counters, ForwardError, ForwardRule, HostPort, Protocol, SocketError};

use super::limits::COMMAND_TIMEOUT;
use super::settings::NatSettings;
use super::worker::{self, Command, Commands, NatReport, Worker};
use crate::device::slot::PostedSlot;
use crate::error::{ConfigError, Error};
use crate::sync::Mutex;
use crate::sys::lock;

/// The translator of a network: what it is set to, and its thread while that runs.
pub(super) struct Translator {
    settings: NatSettings,
    network: NetworkConfig,
    gateway_mac: [u8; 6],
    commands: Arc<Commands>,
    thread: Mutex<Option<Running>>,
    /// Whether the gateway's role is set and the forwards of the settings are there.
    has_begun: Mutex<bool>,
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
        commands: Arc::default(),
        thread: Mutex::new(None),
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
        let host = Host::new()?;
        let waker = host.waker();
        let wake = waker.clone();
        end.set_wake(Arc::new(move || wake.wake()));
        let worker = Worker::new(host, &self.settings, &self.network, self.gateway_mac);
        let commands = Arc::clone(&self.commands);
        let thread = thread::Builder::new()
            .name("vmring-nat".to_owned())
            .spawn(move || worker::run(worker, end, &commands))?;
        let before = lock(&self.thread).replace(Running { thread, waker });
        if let Some(before) = before {
            // It has dropped the network's end, so it is about to end.
            let _ = before.thread.join();
        }
        Ok(())
    }

    fn stop(&self) {
        let running = lock(&self.thread).take();
        if let Some(Running { thread, waker }) = running {
            self.commands.stop();
            waker.wake();
            // It panicked, if it returns an error. That was printed.
            let _ = thread.join();
        }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn ports_of_gateway(&self) -> Vec<(u8, u16)> {
        let port = |port: &HostPort| {
            let number = match port.protocol {
                Protocol::Tcp => 6,
                Protocol::Udp => 17,
                _ => return None,
            };
            Some((number, port.port))
        };
        let dns = [6, 17].map(|number| (number, DNS_PORT));
        self.settings.host_ports.iter().filter_map(port).chain(dns).collect()
    }
}

/// Asks a translator's thread. Returns `None` if it does not run.
fn ask<T>(
    translator: &Translator,
    command: impl FnOnce(SyncSender<T>) -> Command,
) -> Result<Option<T>, Error> {
    let (answer, answers): (SyncSender<T>, Receiver<T>) = sync_channel(1);
    {
        let running = lock(&translator.thread);
        let Some(running) = running.as_ref().filter(|running| !running.thread.is_finished()) else {
            return Ok(None);
        };
        translator.commands.push(command(answer));
        running.waker.wake();
    }
    answers.recv_timeout(COMMAND_TIMEOUT).map(Some).map_err(|_| Error::Timeout(COMMAND_TIMEOUT))
}

/// Adds a forward. See [`NatControl::add_forward`](super::NatControl::add_forward).
pub(super) fn add(
    translator: &Translator,
    network: &Network<PostedSlot>,
    rule: &ForwardRule,
) -> Result<SocketAddr, Error> {
    network.start_router().map_err(Error::io("starting the translator"))?;
    let added = ask(translator, |answer| Command::Add(*rule, answer))?;
    // The thread has ended, because it has panicked.
    let added = added.ok_or(Error::Timeout(COMMAND_TIMEOUT))?;
    added.map_err(|error| refusal(error, rule))
}

/// Removes a forward. See [`NatControl::remove_forward`](super::NatControl::remove_forward).
pub(super) fn remove(
    translator: &Translator,
    protocol: Protocol,
    at: SocketAddr,
    cut: bool,
) -> Result<bool, Error> {
    let removed = ask(translator, |answer| Command::Remove(protocol, at, cut, answer))?;
    Ok(removed.unwrap_or(false))
}

/// What a translator does. See [`NatControl::report`](super::NatControl::report).
pub(super) fn report(translator: &Translator) -> Result<NatReport, Error> {
    Ok(ask(translator, Command::Report)?.unwrap_or_default())
}

/// What a translator has counted, or `None` if its thread does not run.
pub(super) fn counters_of(translator: &Translator) -> Result<Option<Counters>, Error> {
    Ok(ask(translator, Command::Report)?.map(|report| report.counters))
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
    let source = io::Error::from_raw_os_error(errno);
    Error::Io { what: "listening at the host's port", source }
}
