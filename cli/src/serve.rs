//! `vmring serve`: joins virtual machines to a network, over vhost-user and the wires of VMMs.
//!
//! Each connection of a guest is a port of one switch, which is an embedded network. Below a TAP or
//! vmnet that network has no gateway of its own, and a port that leads to the TAP or to vmnet. Each
//! connection over vhost-user has a thread, and all wires have one together. The main thread accepts
//! connections, and waits for their ends and for signals.

pub(crate) mod limits;
pub(crate) mod spec;

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod calls;
mod confine;
pub(crate) mod connection;
pub(crate) mod counts;
mod exposition;
mod folder;
mod identity;
mod kept;
mod links;
mod listen;
pub(crate) mod metrics;
mod network;
mod own_interface;
mod pid_file;
mod ready;
mod reports;
mod server;
mod sigbus;
mod summary;
mod table;
pub(crate) mod teller;
mod way_out;
mod wire;
mod wire_stats;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use vmring::IdlePolicy;

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::progress::Live;
use crate::recording::CaptureFile;
use crate::report::{print, print_json};
use crate::stop::Stop;
use crate::system;

use confine::{Confinement, Needs, folder};
use folder::{answers_of, place_of};
use identity::{Identity, Wish};
use kept::Kept;
use limits::{FILES, FILES_PER_DEVICE, FILES_PER_PAIR, FILES_PER_WIRE, SEATS_MAX};
use listen::{Listening, Passed};
use metrics::{Metrics, MetricsSpec};
use network::Network;
use pid_file::PidFile;
use ready::Ready as Readiness;
use reports::{Printer, Scraping};
use server::Server;
use sigbus::Places;
use spec::{ConnectSpec, Kind, ListenSpec, NetworkSpec, Place};
use summary::Summary;
use teller::{Console, Event, Ready, Teller};

pub(crate) fn run(args: &ServeArgs) -> Result<(), Failure> {
    serve(args, Rc::new(Console))
}

/// Serves as `args` say. `teller` says what happens.
pub(crate) fn serve(args: &ServeArgs, teller: Rc<dyn Teller>) -> Result<(), Failure> {
    let Some(wanted) = args.network.as_ref().filter(|_| !args.print_capabilities) else {
        return print_json(&Capabilities { kind: "net", features: [] });
    };
    args.dhcp.check(usize::from(wanted.has_dhcp()))?;
    args.nat.check(usize::from(wanted.is_embedded()))?;
    // Inherited descriptors come before any that this process opens.
    let mut ready = Readiness::from_environment(args.ready_fd)?;
    let passed = Passed::from_environment()?;
    let mut listens = listens(args);
    let adopt = |spec: &ListenSpec| Listening::adopted(spec, &passed);
    let adopted = listens.iter().map(adopt).collect::<Result<Vec<_>, _>>()?;
    passed.check(&listens)?;
    // From here on a signal ends the server with its report. The thread that looks at the signals starts
    // after the confinement, so that it is confined too.
    let of_way_out = if wanted.is_embedded() { args.nat.descriptors() } else { 0 };
    system::allow_open_files(u64::from(open_files(args, &listens)) + of_way_out);
    let signals = Stop::catch_signals_and(if teller.reports() { REPORTING } else { &[] })?;
    let live = if teller.reports() { Live::start() } else { Live::off() };
    let identity = identity(args)?;
    if keeps_privileges(args, wanted) && (args.user.is_some() || args.group.is_some()) {
        return Err(Failure::Usage(
            "the interface of each guest is started when it connects, which takes the privileges that \
             --user and --group give up; leave them or --per-client out"
                .to_owned(),
        ));
    }
    Identity::for_now(identity.as_ref(), || place(&mut listens))?;
    spec::check(&listens)?;
    spec::check_number(&listens, args.connections)?;
    let made = Identity::for_now(identity.as_ref(), || Made::new(&listens, adopted, args))?;
    let may_offload = listens.iter().any(ListenSpec::may_offload);
    let start = || Network::start(wanted, args, may_offload);
    let needs = needs(&listens, &made, wanted, args, live.is_watched());
    let mut confinement = Confinement::none("--no-sandbox");
    // What needs privileges starts with them, and everything else without them.
    let privileged = wanted.needs_privileges().then(start).transpose()?;
    // It looks at the host's rules, which a confined process cannot see.
    let obstacle = privileged.as_ref().and_then(|_| wanted.obstacle());
    if let Some(identity) = identity.as_ref().filter(|_| !keeps_privileges(args, wanted)) {
        identity.assume(needs.kept)?;
        teller.tell(&identity.event())?;
    }
    if !args.no_sandbox {
        confinement.drop_privileges(&needs);
    }
    let network = privileged.map_or_else(start, Ok)?;
    teller.tell(&Event::Started(network.facts()))?;
    listens.iter().try_for_each(|spec| network.check(spec))?;
    let Made { listenings, captures, pid_file, metrics } = made;
    let recordings = captures
        .into_iter()
        .map(|capture| capture.map(CaptureFile::start).transpose())
        .collect::<Result<Vec<_>, _>>()?;
    // The standard library opens files to count the processors, and remembers nothing. The library asks
    // it once.
    let _ = IdlePolicy::default();
    let over_vhost_user = listens.iter().any(|spec| !spec.is_wire());
    let seats = if over_vhost_user { args.connections.min(SEATS_MAX) } else { 0 };
    let places = Places::install(seats as usize)?;
    let connections = args.connections as usize;
    let entrances = listens.into_iter().zip(listenings).zip(recordings);
    let entrances = entrances.map(|((spec, listening), recording)| (spec, listening, recording));
    let mut server =
        Server::new(network, teller.clone(), entrances.collect(), connections, places)?;
    if !args.no_sandbox {
        confinement.restrict_calls(&needs);
    }
    let asker = server.asker();
    let stop = signals.watch_and(|| {}, move || asker.report())?;
    let counters = metrics.as_ref().map(|(metrics, _)| metrics.to_string());
    let scraping = metrics
        .map(|(metrics, bell)| Scraping::start(metrics, bell, server.asker()))
        .transpose()?;
    let (start, cpu) = (Instant::now(), system::cpu_time());
    let deadline = args.seconds.map(|seconds| start + Duration::from_secs(seconds));
    let time = || (start.elapsed(), system::cpu_time().saturating_sub(cpu));
    if let Some(place) = counters {
        teller.tell(&Event::Note(&format!("counters are at {place}")))?;
    }
    teller.tell(&Event::Ready(&ready_of(&server, &confinement, obstacle, args.seconds)))?;
    ready.ready();
    let mut printer = Printer::default();
    let serving = server.run(&stop, deadline, &live, |server| {
        printer.print(|| Summary::of(server, confinement.clone(), time(), true).printed(args.json));
    });
    ready.stopping();
    drop(live);
    let ended = server.end();
    drop((scraping, pid_file));
    let mut summary = Summary::of(&server, confinement, time(), false);
    // Reports the first failure.
    let outcome = serving.and(ended).and_then(|()| server.network.stop());
    summary.end(&outcome);
    printer.finish();
    if teller.reports() {
        summary.printed(args.json).and_then(|text| print(&text))?;
    }
    outcome
}

/// The signals that ask for a report, besides those that end the server. Ctrl-T raises SIGINFO on macOS.
const REPORTING: &[i32] = &[
    libc::SIGUSR1,
    #[cfg(target_os = "macos")]
    libc::SIGINFO,
];

/// Returns the user that the server becomes.
fn identity(args: &ServeArgs) -> Result<Option<Identity>, Failure> {
    let of_sudo = |name| std::env::var(name).ok();
    let (uid, gid) = (of_sudo("SUDO_UID"), of_sudo("SUDO_GID"));
    let sudo = (uid.as_deref(), gid.as_deref());
    Identity::of(Wish { user: args.user.as_deref(), group: args.group.as_deref(), sudo })
}

/// Whether it needs its privileges as long as it serves. Its files belong to the caller of sudo all the
/// same.
fn keeps_privileges(args: &ServeArgs, network: &NetworkSpec) -> bool {
    args.per_client && network.needs_privileges()
}

/// How many files the server has open at most.
fn open_files(args: &ServeArgs, listens: &[ListenSpec]) -> u32 {
    let pairs = listens.iter().filter(|spec| !spec.is_wire()).filter_map(|spec| spec.queues);
    // A device has more of them than a wire, so most are open when the guests on wires have the places that
    // are left.
    let (devices, of_devices) = pairs.max().map_or((0, 0), |pairs| {
        let each = FILES_PER_DEVICE + FILES_PER_PAIR * u32::from(pairs);
        let devices = args.connections.min(SEATS_MAX);
        (devices, devices * each)
    });
    let has_wires = listens.iter().any(ListenSpec::is_wire);
    let of_wires = if has_wires { (args.connections - devices) * FILES_PER_WIRE } else { 0 };
    FILES + of_devices + of_wires
}

/// Puts sockets without a folder into the private one.
fn place(listens: &mut [ListenSpec]) -> Result<(), Failure> {
    for spec in listens {
        if let Place::Server(path) | Place::Client(path) = &mut spec.place {
            *path = place_of(path)?;
        }
        if let (Place::Client(path), true) = (&spec.place, spec.has_one_peer()) {
            spec.own = Some(match &spec.own {
                Some(own) => place_of(own)?,
                None => answers_of(path)?,
            });
        }
    }
    Ok(())
}

/// The files and sockets that the server makes for others. They are made as the user that it becomes.
struct Made {
    listenings: Vec<Listening>,
    captures: Vec<Option<CaptureFile>>,
    pid_file: Option<PidFile>,
    /// With the bell of its thread.
    metrics: Option<(Metrics, (UnixStream, UnixStream))>,
}

impl Made {
    fn new(
        listens: &[ListenSpec],
        adopted: Vec<Option<Listening>>,
        args: &ServeArgs,
    ) -> Result<Self, Failure> {
        let pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
        let listenings = listens.iter().zip(adopted).map(|(spec, adopted)| match adopted {
            Some(adopted) => Ok(adopted),
            None => Listening::open(spec),
        });
        let listenings = listenings.collect::<Result<_, _>>()?;
        let metrics = args.metrics.as_ref().map(|spec| match spec {
            MetricsSpec::Path(path) => Metrics::open(&MetricsSpec::Path(place_of(path)?)),
            MetricsSpec::Address(_) => Metrics::open(spec),
        });
        let failed = |error| Failure::Step(format!("the counters cannot be shown: {error}"));
        let metrics = metrics
            .transpose()?
            .map(|metrics| UnixStream::pair().map(|bell| (metrics, bell)).map_err(failed));
        let metrics = metrics.transpose()?;
        let capture =
            |spec: &ListenSpec| spec.capture.as_deref().map(CaptureFile::open).transpose();
        let captures = listens.iter().map(capture).collect::<Result<_, _>>()?;
        Ok(Self { listenings, captures, pid_file, metrics })
    }
}

/// Where guests can join, and what does not hold.
fn ready_of<'a>(
    server: &'a Server,
    confinement: &Confinement,
    obstacle: Option<String>,
    seconds: Option<u64>,
) -> Ready<'a> {
    let parts = confinement.parts();
    let incomplete = parts.iter().filter(|(_, part)| !part.complete);
    let notes = incomplete.map(|(what, part)| format!("{what}: {}", part.state)).chain(obstacle);
    Ready {
        sockets: server.entrances.iter().map(|entrance| &entrance.spec).collect(),
        notes: notes.collect(),
        network: server.network.name(),
        seconds,
    }
}

/// What `--print-capabilities` prints (QEMU's `docs/interop/vhost-user.rst`, "Backend program
/// conventions").
#[derive(Debug, Serialize)]
struct Capabilities {
    #[serde(rename = "type")]
    kind: &'static str,
    features: [&'static str; 0],
}

/// Every socket that the command line names.
fn listens(args: &ServeArgs) -> Vec<ListenSpec> {
    let path = args.socket_path.clone().map(Place::Server);
    let others = path.into_iter().chain(args.fd.map(Place::Descriptor));
    let others = others.map(|place| ListenSpec::new(Kind::VhostUser, place));
    let connects = args.connect.iter().map(|ConnectSpec(spec)| spec).cloned();
    let mut listens: Vec<_> = args.listen.iter().cloned().chain(connects).chain(others).collect();
    for spec in &mut listens {
        spec.mac.get_or_insert(args.mac);
        if spec.is_wire() {
            continue;
        }
        spec.queues.get_or_insert(args.queues);
        spec.demand_seals |= args.demand_seals;
        spec.announce |= args.guest_announce;
    }
    listens
}

/// What the server needs after its set-up.
fn needs(
    listens: &[ListenSpec],
    made: &Made,
    network: &NetworkSpec,
    args: &ServeArgs,
    terminal: bool,
) -> Needs {
    let own_paths = listens.iter().filter_map(ListenSpec::own_path);
    let own_paths = own_paths.chain(made.metrics.as_ref().and_then(|(metrics, _)| metrics.path()));
    let own_paths = own_paths.chain(made.pid_file.as_ref().map(PidFile::path));
    #[cfg(target_os = "linux")]
    let io_uring = args.engine != vmring::TapEngine::Plain;
    #[cfg(not(target_os = "linux"))]
    let io_uring = false;
    let nat =
        network.is_embedded() && !args.nat.no_nat && args.settings.mode == vmring::Mode::Shared;
    Needs {
        client: listens.iter().any(|spec| matches!(spec.place, Place::Client(_))),
        wires: listens.iter().any(ListenSpec::is_wire),
        terminal,
        tap: network.is_tap(),
        io_uring: network.is_tap() && io_uring,
        nat,
        resolvers: (nat && args.nat.dns.is_empty()).then(resolvers).flatten(),
        kept: Kept { hosts_end: network.changes_host(), low_ports: args.nat.has_low_port() },
        simulated: network.is_simulated(),
        sockets: own_paths.map(|path| folder(path).to_owned()).collect(),
        leases: args.dhcp.lease_file.as_deref().map(|file| folder(file).to_owned()),
    }
}

/// What has to be read to know the host's resolvers: the folder of the file that /etc/resolv.conf leads
/// to, because such a file is replaced, and the file alone if it is in /etc itself.
fn resolvers() -> Option<PathBuf> {
    let file = std::fs::canonicalize("/etc/resolv.conf").ok()?;
    match file.parent() {
        Some(folder) if folder != Path::new("/etc") => Some(folder.to_owned()),
        _ => Some(file),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Whole {
        #[command(flatten)]
        args: ServeArgs,
    }

    /// Goal: the limit of open files is enough for the most guests of both kinds together.
    #[test]
    fn there_are_files_for_devices_and_wires_together() {
        let files = |words: &str| {
            let words = format!("serve --network embedded:lab {words}");
            let Whole { args } = Whole::parse_from(words.split(' '));
            open_files(&args, &listens(&args))
        };
        let device = FILES_PER_DEVICE + 4 * FILES_PER_PAIR;
        for (words, expected) in [
            ("--listen qemu:a --connections 900", 900 * FILES_PER_WIRE),
            ("--listen vhost-user:a,queues=4 --connections 100", 100 * device),
            ("--listen vhost-user:a,queues=4 --connections 900", 512 * device),
            ("--listen vhost-user:a,queues=4 --listen qemu:b --connections 100", 100 * device),
            (
                "--listen vhost-user:a,queues=4 --listen qemu:b --connections 900",
                512 * device + 388 * FILES_PER_WIRE,
            ),
        ] {
            assert_eq!(files(words), FILES + expected, "{words}");
        }
    }
}
