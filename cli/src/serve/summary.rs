//! The server's results: one JSON object, or tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

use super::confine::Confinement;
use super::counts::Counts;
use super::server::{End, Server};
use super::way_out::WayOut;
use crate::bridge::summary::Summary as UplinkSummary;
use crate::failure::Failure;
use crate::report::{Table, bytes, fold, grouped, in_json, round};

/// Everything that is reported about a server.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    /// Whether the server ended without a failure.
    ok: bool,
    /// The failure, in a sentence.
    failed: Option<String>,
    /// Whether it goes on.
    running: bool,
    seconds: f64,
    /// Processor time of the whole process, in percent of one processor.
    cpu_percent: f64,
    network: NetworkSummary,
    /// What the network's way out does, or did when the server began to end, if somebody has used it.
    way_out: Option<WayOut>,
    /// What went between the switch and the TAP or vmnet, at the end.
    uplink: Option<UplinkSummary>,
    /// How much the uplink has brought for the guests and taken from them.
    uplink_moved: Option<UplinkMoved>,
    sockets: Vec<SocketSummary>,
    sandbox: Confinement,
}

#[derive(Debug, Serialize)]
struct NetworkSummary {
    name: String,
    mtu: u32,
    max_packet_size: u32,
    /// What the gateway did and did not answer.
    counters: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
struct UplinkMoved {
    packets_to_guests: u64,
    bytes_to_guests: u64,
    packets_from_guests: u64,
    bytes_from_guests: u64,
}

/// A guest that is connected.
#[derive(Debug, Serialize)]
struct GuestSummary {
    guest: u64,
    seconds: f64,
    counts: BTreeMap<&'static str, u64>,
    drops_by_reason: BTreeMap<&'static str, u64>,
    port_counters: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
struct SocketSummary {
    name: String,
    #[serde(skip)]
    all: Counts,
    /// Connections since the start.
    connections: u64,
    /// What all guests of this socket have counted.
    counts: BTreeMap<&'static str, u64>,
    /// Packets that their ports of the network have dropped.
    drops_by_reason: BTreeMap<&'static str, u64>,
    /// What their ports have done in software, because of what a receiver does not do.
    port_counters: BTreeMap<&'static str, u64>,
    /// Packets of its guests that were not recorded in time. None of them was lost by that.
    unrecorded: u64,
    /// The guests that are connected.
    guests: Vec<GuestSummary>,
    /// The last connections that have ended, oldest first.
    ends: Vec<End>,
}

impl Summary {
    pub(super) fn of(
        server: &Server,
        sandbox: Confinement,
        time: (Duration, Duration),
        running: bool,
    ) -> Self {
        let network = &server.network;
        let (time, cpu) = time;
        let sockets = (0..server.entrances.len()).map(|i| SocketSummary::of(server, i)).collect();
        let moved = |[(packets_to_guests, bytes_to_guests), from]: [(u64, u64); 2]| {
            let (packets_from_guests, bytes_from_guests) = from;
            UplinkMoved {
                packets_to_guests,
                bytes_to_guests,
                packets_from_guests,
                bytes_from_guests,
            }
        };
        Self {
            ok: true,
            failed: None,
            running,
            seconds: round(time.as_secs_f64(), 3),
            cpu_percent: round(100.0 * cpu.as_secs_f64() / time.as_secs_f64().max(1e-9), 3),
            network: NetworkSummary {
                name: network.name().to_owned(),
                mtu: network.mtu(),
                max_packet_size: network.max_packet_size(),
                counters: network.counters().into_iter().collect(),
            },
            way_out: server.way_out().map(WayOut::of),
            uplink: server.uplink.clone(),
            uplink_moved: network.uplink().map(moved),
            sockets,
            sandbox,
        }
    }

    pub(super) fn end(&mut self, outcome: &Result<(), Failure>) {
        self.ok = outcome.is_ok();
        self.failed = outcome.as_ref().err().map(ToString::to_string);
    }

    /// What is printed: one JSON object, or the tables.
    pub(super) fn printed(&self, json: bool) -> Result<String, Failure> {
        if json { in_json(self) } else { Ok(fold(&self.text())) }
    }

    /// The tables for people.
    pub(super) fn text(&self) -> String {
        let network = &self.network;
        let mut text = format!(
            "{} (MTU {}), for {:.1} s, with {:.1} % of one processor\n",
            network.name, network.mtu, self.seconds, self.cpu_percent
        );
        let mut table = Table::new(&["socket", "guests", "to guests", "from guests", "dropped"]);
        for socket in &self.sockets {
            let moved = socket.all.moved();
            let way =
                |(packets, octets): (u64, u64)| format!("{} ({})", grouped(packets), bytes(octets));
            table.row([
                socket.name.clone(),
                grouped(socket.connections),
                way(moved.to),
                way(moved.from),
                grouped(moved.dropped),
            ]);
        }
        text.push_str(&table.text());
        for socket in &self.sockets {
            for (why, n) in socket.all.drops() {
                // Writing to a string does not fail.
                let _ = writeln!(text, "Dropped at {}: {} {why}", socket.name, grouped(n));
            }
            if socket.unrecorded > 0 {
                let n = grouped(socket.unrecorded);
                let _ = writeln!(text, "Not recorded in time at {}: {n}", socket.name);
            }
            for end in &socket.ends {
                let End { guest, seconds, how } = end;
                let _ = writeln!(text, "At {}: guest {guest}, {seconds} s: {how}", socket.name);
            }
        }
        if let Some(way_out) = &self.way_out {
            text.push_str(&way_out.text());
        }
        if let Some(uplink) = &self.uplink {
            let _ = write!(text, "\nUplink: {}", uplink.text());
        }
        text.push_str("\nSandbox\n");
        let mut table = Table::new(&["part", "state"]).left();
        for (name, part) in self.sandbox.parts() {
            table.row([name.to_owned(), part.state.clone()]);
        }
        text.push_str(&table.text());
        text
    }
}

impl SocketSummary {
    fn of(server: &Server, index: usize) -> Self {
        let entrance = &server.entrances[index];
        let all = server.counts_of(index);
        let guests = server.guests_of(index).map(|(guest, one)| {
            let Counts { device, drops, port } = one.counts();
            let seconds = round(one.time().as_secs_f64(), 3);
            let (counts, drops_by_reason, port_counters) = (device, drops, port);
            GuestSummary { guest, seconds, counts, drops_by_reason, port_counters }
        });
        Self {
            name: entrance.spec.to_string(),
            connections: entrance.connections,
            counts: all.device.clone(),
            drops_by_reason: all.drops.clone(),
            port_counters: all.port.clone(),
            unrecorded: entrance.unrecorded(),
            guests: guests.collect(),
            all,
            ends: entrance.ends.iter().cloned().collect(),
        }
    }
}
