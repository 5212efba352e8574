//! A TCP stream between two guests in user-mode Linux, over sequenced packets.

use std::path::{Path, PathBuf};
use std::time::Duration;

use vmring_guest::{Guest, Nic, Running};

use super::carriers::{Method, RelayThread, accept, listen};
use super::relay::Way;
use crate::guest_stream;
use crate::plan::Plan;
use crate::programs::{Measured, Programs};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::rounds::{Half, take_turns};
use crate::served::{Folder, Served};

pub(super) const NAME: &str = "wires, guests";

const ADDRESSES: [&str; 2] = ["10.9.0.1", "10.9.0.2"];
const PATIENCE: Duration = Duration::from_secs(60);

/// Two guests, and what carries their frames.
struct Pair {
    guests: [Running; 2],
    _server: Option<Served>,
    _relay: Option<RelayThread>,
    _folder: Folder,
}

impl Pair {
    fn start(method: Method<'_>, guest: &Guest) -> Result<Self> {
        let folder = Folder::new()?;
        let paths = folder.sockets();
        let (mut server, mut relay) = (None, None);
        match method {
            Method::Serve(program) => {
                let listens = paths.each_ref().map(|path| format!("bess:{}", path.display()));
                let arguments = ["serve", "--network", "embedded:performance"];
                server = Some(Served::start_with(program, &arguments, &listens, &folder)?);
            }
            _ => {
                let listeners = [listen(&paths[0])?, listen(&paths[1])?];
                let accepted = move || Ok([accept(&listeners[0])?, accept(&listeners[1])?]);
                relay = Some(RelayThread::start_after(accepted, Way::Messages)?);
            }
        }
        let start = |path: &PathBuf| {
            let path = path.display();
            let nic = Nic::vector(format!("transport=bess,dst={path},src={path}.own"));
            guest.clone().nic(nic).timeout(PATIENCE).start()
        };
        let mut guests = paths.each_ref().map(start);
        for (guest, address) in guests.iter_mut().zip(ADDRESSES) {
            guest.sh(&format!("ip addr add {address}/24 dev eth0; ip link set eth0 up"));
        }
        guests[0].sh(&format!("iperf3 --server --bind {} >/dev/null 2>&1 &", ADDRESSES[0]));
        Ok(Self { guests, _server: server, _relay: relay, _folder: folder })
    }
}

pub(super) fn run(plan: Plan, programs: Programs<'_>, vmring: &Path) -> Result<Measured> {
    let guest = match Guest::uml().and_then(|guest| guest.program("iperf3")) {
        Ok(guest) => guest,
        Err(missing) => return Ok(Err(missing.to_string())),
    };
    let methods = [Method::Serve(vmring), Method::Relay];
    let mut pairs = Vec::new();
    for method in methods {
        pairs.push((method, Pair::start(method, &guest)?));
    }
    let seconds = programs.stream_seconds;
    let halves: Vec<Half<1>> = take_turns(plan, &mut pairs, |(method, pair)| {
        let rate = guest_stream::run(&mut pair.guests[1], ADDRESSES[0], false, seconds);
        Ok(Some([rate.map_err(|error| format!("{}: {error}", method.name()))?]))
    })?;
    let mut table = Table::new(
        NAME,
        format!("one TCP stream of {seconds} s between two guests in user-mode Linux, over bess"),
        &["carried by"],
        &["Gbit/s"],
    );
    let mut wants = Vec::new();
    for half in &halves {
        half.begin(&mut table);
        let rows = methods.iter().zip(&half.values);
        let medians: Vec<f64> =
            rows.map(|(method, [rates])| table.row(&[method.name()], &[rates])).collect();
        let what = "wires, two guests over bess, TCP: vmring serve / relay";
        wants.extend(half.wants([Want::at_least(what, medians[0] / medians[1], 1.2)]));
    }
    Ok(Ok((table, wants)))
}
