//! `vmring serve`: joins virtual machines to a network, over vhost-user.
//!
//! Each connection of a front end is a port of one switch, which is an embedded network. Below a TAP or
//! vmnet that network has no gateway of its own, and a port that leads to the TAP or to vmnet. Each
//! connection has a thread. The main thread accepts connections, and waits for their ends and for
//! signals.

pub(crate) mod limits;
pub(crate) mod spec;

mod connection;
mod counts;
mod listen;
mod network;
mod ready;
mod server;
mod sigbus;
mod summary;

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::args::ServeArgs;
use crate::failure::Failure;
use crate::progress::{Live, say};
use crate::report::{print_json, print_report};
use crate::stop::Stop;
use crate::system;

use listen::Listening;
use network::Network;
use ready::Ready;
use server::Server;
use sigbus::Places;
use spec::{ListenSpec, Place};
use summary::Summary;

pub(crate) fn run(args: &ServeArgs) -> Result<(), Failure> {
    let Some(wanted) = args.network.as_ref().filter(|_| !args.print_capabilities) else {
        return print_json(&Capabilities { kind: "net", features: [] });
    };
    let listens = listens(args);
    spec::check(&listens)?;
    args.dhcp.check(usize::from(wanted.has_dhcp()))?;
    let adopted = (listens.iter()).map(Listening::adopted).collect::<Result<Vec<_>, _>>()?;
    // From here on a signal ends the server with its report.
    let signals = Stop::catch_signals()?;
    let ready = Ready::from_environment();
    let live = Live::start();
    let entrances = (listens.iter().cloned().zip(adopted))
        .map(|(spec, adopted)| match adopted {
            Some(adopted) => Ok((spec, adopted)),
            None => Listening::open(&spec).map(|listening| (spec, listening)),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let network = Network::start(wanted, args)?;
    listens.iter().try_for_each(|spec| network.check(spec))?;
    let places = Places::install(args.connections as usize)?;
    let mut server = Server::new(network, entrances, places)?;
    let stop = signals.watch(|| {})?;
    let (start, cpu) = (Instant::now(), system::cpu_time());
    let deadline = args.seconds.map(|seconds| start + Duration::from_secs(seconds));
    say(&format!(
        "  guests can join {}{}",
        server.network.name(),
        match args.seconds {
            Some(seconds) => format!(" for {seconds} s"),
            None => "; Ctrl-C ends it".to_owned(),
        }
    ));
    if let Some(obstacle) = wanted.obstacle() {
        say(&format!("  note: {obstacle}"));
    }
    ready.tell("READY=1");
    let serving = server.run(&stop, deadline, &live);
    ready.tell("STOPPING=1");
    drop(live);
    let ended = server.end();
    let time = (start.elapsed(), system::cpu_time().saturating_sub(cpu));
    let mut summary = Summary::of(&mut server, time);
    // Reports the first failure.
    let outcome = serving.and(ended).and_then(|()| server.network.stop());
    summary.end(&outcome);
    if args.json {
        print_json(&summary)?;
    } else {
        print_report(&summary.text())?;
    }
    outcome
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
    let others = path.into_iter().chain(args.fd.map(Place::Descriptor)).map(ListenSpec::new);
    let mut listens: Vec<_> = args.listen.iter().cloned().chain(others).collect();
    for spec in &mut listens {
        spec.mac.get_or_insert(args.mac);
        spec.queues.get_or_insert(args.queues);
        spec.demand_seals |= args.demand_seals;
    }
    listens
}
