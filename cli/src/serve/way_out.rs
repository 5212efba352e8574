//! What the way out of the server's network does, as it is reported. What it has counted is among the
//! network's counters.

use std::net::SocketAddr;

use serde::Serialize;
use vmring::MacAddr6;
use vmring::device::embedded::nat::{Carried, Guest, NatReport, Protocol};

use crate::report::{Table, bytes, grouped};

/// See the [module](self).
#[derive(Debug, Serialize)]
pub(super) struct WayOut {
    /// The flows that there are: TCP first.
    flows: Vec<Flow>,
    forwards: Vec<Forward>,
    /// Sockets and other descriptors of the translator.
    descriptors: usize,
}

#[derive(Debug, Serialize)]
struct Flow {
    protocol: String,
    guest: SocketAddr,
    /// Where the guest has sent to, or from where it is reached.
    remote: SocketAddr,
    /// The host's end of that.
    to: SocketAddr,
    /// Whether the handshake of TCP is complete, or both sides have sent.
    established: bool,
    #[serde(flatten)]
    moved: Moved,
}

#[derive(Debug, Serialize)]
struct Forward {
    protocol: String,
    at: SocketAddr,
    guest: String,
    guest_port: u16,
    flows: usize,
    accepted: u64,
    refused: u64,
    #[serde(flatten)]
    moved: Moved,
}

/// What has gone through a flow or a forward. TCP has no datagrams.
#[derive(Debug, Serialize)]
struct Moved {
    /// What the host's socket has taken.
    bytes_from_guest: u64,
    /// What the guest has acknowledged, or its port has taken.
    bytes_to_guest: u64,
    datagrams_from_guest: Option<u64>,
    datagrams_to_guest: Option<u64>,
}

impl Moved {
    fn of(protocol: Protocol, carried: &Carried) -> Self {
        let datagrams = |n| (protocol != Protocol::Tcp).then_some(n);
        Self {
            bytes_from_guest: carried.bytes_sent,
            bytes_to_guest: carried.bytes_received,
            datagrams_from_guest: datagrams(carried.datagrams_sent),
            datagrams_to_guest: datagrams(carried.datagrams_received),
        }
    }
}

impl WayOut {
    pub(super) fn of(report: NatReport) -> Self {
        let tcp = report.tcp_flows.iter().map(|flow| Flow {
            protocol: Protocol::Tcp.to_string(),
            guest: flow.guest,
            remote: flow.remote,
            to: flow.to,
            established: flow.established,
            moved: Moved::of(Protocol::Tcp, &flow.carried),
        });
        let others = report.datagram_flows.iter().map(|flow| Flow {
            protocol: flow.protocol.to_string(),
            guest: flow.guest,
            remote: flow.remote,
            to: flow.to,
            established: flow.stream,
            moved: Moved::of(flow.protocol, &flow.carried),
        });
        let flows = tcp.chain(others).collect();
        let forwards = report.forwards.iter().map(|forward| Forward {
            protocol: forward.protocol.to_string(),
            at: forward.at,
            guest: match forward.guest {
                Guest::Address(address) => address.to_string(),
                Guest::Mac(mac) => MacAddr6::from(mac).to_string(),
            },
            guest_port: forward.guest_port,
            flows: forward.flows,
            accepted: forward.accepted,
            refused: forward.refused,
            moved: Moved::of(forward.protocol, &forward.carried),
        });
        let forwards = forwards.collect();
        Self { flows, forwards, descriptors: report.descriptors }
    }

    /// The tables for people: forwards, and as many flows as fit on a page.
    pub(super) fn text(&self) -> String {
        const PAGE: usize = 20;
        let mut text = String::new();
        if !self.forwards.is_empty() {
            text.push_str("\nPort forwards\n");
            let mut table =
                Table::new(&["at", "to", "flows", "accepted", "refused", "from guest", "to guest"]);
            for one in &self.forwards {
                table.row([
                    format!("{} {}", one.protocol, one.at),
                    format!("{} {}", one.guest, one.guest_port),
                    grouped(one.flows as u64),
                    grouped(one.accepted),
                    grouped(one.refused),
                    bytes(one.moved.bytes_from_guest),
                    bytes(one.moved.bytes_to_guest),
                ]);
            }
            text.push_str(&table.text());
        }
        if !self.flows.is_empty() {
            text.push_str(&format!(
                "\nFlows to the outside: {}\n",
                grouped(self.flows.len() as u64)
            ));
            let mut table = Table::new(&["guest", "remote", "from guest", "to guest"]);
            for one in self.flows.iter().take(PAGE) {
                table.row([
                    format!("{} {}", one.protocol, one.guest),
                    one.remote.to_string(),
                    bytes(one.moved.bytes_from_guest),
                    bytes(one.moved.bytes_to_guest),
                ]);
            }
            text.push_str(&table.text());
        }
        text
    }
}
