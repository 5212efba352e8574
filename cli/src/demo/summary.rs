//! The demo's results: one JSON object, or tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use serde::Serialize;
use vmring::Interface;
use vmring::stats::RingStats;

use super::guest::{Lease, Pings, Received};
use crate::report::{Batches, Table, bytes, grouped, percentile, round};

/// The name of the kernel where it is the other guest.
pub(crate) const KERNEL: &str = "kernel";

/// Everything that the demo found out. What it did not get to is `None`.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Summary {
    /// Whether every step succeeded.
    pub(crate) ok: bool,
    /// The step that failed, in a sentence.
    pub(crate) failed: Option<String>,
    /// Whether a signal ended it before its last step. Then it has not succeeded.
    pub(crate) interrupted: bool,
    pub(crate) device: String,
    pub(crate) mode: String,
    pub(crate) drive: String,
    /// How frames are moved, where there is a choice: `io_uring` or `plain`.
    pub(crate) engine: Option<&'static str>,
    /// What the device offloads.
    pub(crate) offloads: Vec<&'static str>,
    pub(crate) guests: Vec<GuestSummary>,
    pub(crate) ping: PingSummary,
    pub(crate) transfer: Option<TransferSummary>,
    /// The transfer in the other direction, if the other guest is the kernel.
    pub(crate) transfer_back: Option<TransferSummary>,
    /// What a guest has fetched from the host's side, by its network's way out.
    pub(crate) fetch: Option<TransferSummary>,
    pub(crate) idle: Option<IdleSummary>,
    /// Packets that did not arrive: those that the network dropped, and those that a guest's ring
    /// could not write or read.
    pub(crate) drops: u64,
    /// The same by reason, for the reasons that occurred.
    pub(crate) drops_by_reason: BTreeMap<String, u64>,
    pub(crate) capture: Option<CaptureSummary>,
}

#[derive(Debug, Serialize)]
pub(crate) struct GuestSummary {
    pub(crate) name: String,
    pub(crate) mac: String,
    pub(crate) mtu: u32,
    pub(crate) max_packet_size: u32,
    pub(crate) ipv4: Option<String>,
    pub(crate) prefix_length: Option<u8>,
    pub(crate) gateway: Option<String>,
    /// `None` also if the network has no way out.
    pub(crate) router: Option<String>,
    pub(crate) lease_seconds: Option<u32>,
    /// This and what follows are the counters of the guest's ring. The kernel has none.
    pub(crate) packets_read: Option<u64>,
    pub(crate) packets_written: Option<u64>,
    pub(crate) read_batches: Option<Batches>,
    pub(crate) write_batches: Option<Batches>,
    /// Writes that the device refused.
    pub(crate) writes_failed: Option<u64>,
}

impl GuestSummary {
    pub(crate) fn new(name: &str, interface: &Interface) -> Self {
        let info = interface.info();
        Self {
            name: name.to_owned(),
            mac: info.mac.to_string().to_lowercase(),
            mtu: info.mtu,
            max_packet_size: info.max_packet_size,
            ipv4: None,
            prefix_length: None,
            gateway: None,
            router: None,
            lease_seconds: None,
            packets_read: None,
            packets_written: None,
            read_batches: None,
            write_batches: None,
            writes_failed: None,
        }
    }

    pub(crate) fn set_lease(&mut self, lease: &Lease) {
        self.ipv4 = Some(lease.address.address().to_string());
        self.prefix_length = Some(lease.address.prefix_len());
        self.gateway = Some(lease.server.to_string());
        self.router = lease.router.map(|router| router.to_string());
        self.lease_seconds = lease.seconds;
    }

    pub(crate) fn set_counters(&mut self, stats: &RingStats) {
        self.packets_read = Some(stats.rx_packets);
        self.packets_written = Some(stats.tx_packets);
        self.read_batches = Some(Batches::of(stats.rx_packets, &stats.read_batches));
        self.write_batches = Some(Batches::of(stats.tx_packets, &stats.write_batches));
        self.writes_failed = Some(stats.errors + stats.exhausted);
    }
}

/// All pings, and those of each pair.
#[derive(Debug, Default, Serialize)]
pub(crate) struct PingSummary {
    pub(crate) sent: u32,
    pub(crate) received: usize,
    pub(crate) rtt_us_p50: Option<f64>,
    pub(crate) rtt_us_p99: Option<f64>,
    pub(crate) rtt_us_max: Option<f64>,
    pub(crate) paths: Vec<PathSummary>,
    #[serde(skip)]
    rtts: Vec<f64>,
}

#[derive(Debug, Serialize)]
pub(crate) struct PathSummary {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) sent: u32,
    pub(crate) received: usize,
    pub(crate) rtt_us_p50: Option<f64>,
    pub(crate) rtt_us_p99: Option<f64>,
    pub(crate) rtt_us_max: Option<f64>,
}

impl PingSummary {
    pub(crate) fn add(&mut self, from: String, to: String, pings: &Pings) {
        let mut rtts: Vec<_> =
            pings.round_trips.iter().map(|rtt| round(rtt.as_secs_f64() * 1e6, 1)).collect();
        rtts.sort_by(f64::total_cmp);
        self.paths.push(PathSummary {
            from,
            to,
            sent: pings.sent,
            received: rtts.len(),
            rtt_us_p50: percentile(&rtts, 0.5),
            rtt_us_p99: percentile(&rtts, 0.99),
            rtt_us_max: percentile(&rtts, 1.0),
        });
        self.sent += pings.sent;
        self.rtts.append(&mut rtts);
        self.rtts.sort_by(f64::total_cmp);
        self.received = self.rtts.len();
        self.rtt_us_p50 = percentile(&self.rtts, 0.5);
        self.rtt_us_p99 = percentile(&self.rtts, 0.99);
        self.rtt_us_max = percentile(&self.rtts, 1.0);
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct TransferSummary {
    pub(crate) from: String,
    pub(crate) to: String,
    /// Bytes that arrived.
    pub(crate) bytes: u64,
    /// The time from the first packet of the connection until the last byte was hashed.
    pub(crate) seconds: f64,
    pub(crate) gbit_per_s: f64,
    /// All packets that crossed the network for the transfer: data and acknowledgements.
    pub(crate) packets: u64,
    pub(crate) data_packets: u64,
    pub(crate) packets_per_s: f64,
    pub(crate) sha256_ok: bool,
    /// The digest of what arrived.
    pub(crate) sha256: String,
}

impl TransferSummary {
    /// A transfer between two that are named, which began at `started`. `bytes` of this digest were sent.
    pub(crate) fn of(
        (from, to): (String, String),
        (started, received): (Instant, &Received),
        (bytes, digest): (u64, [u8; 32]),
        (packets, data_packets): (u64, u64),
    ) -> Self {
        let seconds = received.finished.saturating_duration_since(started).as_secs_f64();
        Self {
            from,
            to,
            bytes: received.bytes,
            seconds: round(seconds, 6),
            gbit_per_s: round(received.bytes as f64 * 8.0 / seconds / 1e9, 3),
            packets,
            data_packets,
            packets_per_s: round(packets as f64 / seconds, 0),
            sha256_ok: digest == received.digest && received.bytes == bytes,
            sha256: received.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

#[derive(Debug, Serialize)]
pub(crate) struct IdleSummary {
    pub(crate) seconds: f64,
    /// Processor time of the whole process, in percent of one processor.
    pub(crate) cpu_percent: f64,
    pub(crate) next_packet_arrived: bool,
}

#[derive(Debug, Serialize)]
pub(crate) struct CaptureSummary {
    pub(crate) file: String,
    pub(crate) packets: u64,
    /// Packets that were left out, because the file or the reader of a pipe was too slow.
    pub(crate) lost: u64,
}

impl Summary {
    /// The tables for people.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} on the {} device, {} mode, {}\n",
            if self.has_kernel() { "A guest and the kernel" } else { "Two guests" },
            self.device,
            self.mode,
            match (self.drive.as_str(), self.has_kernel()) {
                ("inline", false) => "rings driven by the guests' own threads",
                ("shared", false) => "rings driven by one shared thread",
                (_, false) => "rings driven by a thread each",
                ("inline", true) => "the ring driven by the guest's own thread",
                (_, true) => "the ring driven by a thread of its own",
            }
        );
        if let Some(engine) = self.engine {
            let how = if engine == "plain" { "read(2) and write(2)" } else { engine };
            let offloads = self.offloads.join(", ");
            let offloads = if offloads.is_empty() { "none" } else { &offloads };
            let _ = writeln!(text, "Frames moved by {how}; offloads: {offloads}");
        } else if !self.offloads.is_empty() {
            let offloads = self.offloads.join(", ");
            let _ = writeln!(text, "Offloads: {offloads}; the guests send packets of 64 KiB");
        }
        text.push_str(&self.interfaces());
        text.push_str(&self.round_trips());
        text.push_str(&self.moved());
        // Writing to a string does not fail.
        if let Some(idle) = &self.idle {
            let arrived = if idle.next_packet_arrived { "arrived" } else { "did not arrive" };
            let _ = writeln!(
                text,
                "\nIdle: {:.2} % of one processor for {:.1} s, and the next packet {arrived}",
                idle.cpu_percent, idle.seconds
            );
        }
        let _ = writeln!(text, "\nDrops: {}", self.dropped());
        if let Some(capture) = &self.capture {
            let _ = write!(text, "Capture: {}, {} packets", capture.file, capture.packets);
            let _ = match capture.lost {
                0 => writeln!(text),
                lost => writeln!(text, "; {lost} were not recorded in time"),
            };
        }
        if self.interrupted {
            text.push_str("The demo was ended before its time: this is what it found so far.\n");
        }
        text
    }

    /// Counts `n` packets that did not arrive.
    pub(crate) fn count_drops(&mut self, reason: &str, n: u64) {
        if n > 0 {
            *self.drops_by_reason.entry(reason.to_owned()).or_default() += n;
            self.drops += n;
        }
    }

    fn has_kernel(&self) -> bool {
        self.guests.iter().any(|guest| guest.name == KERNEL)
    }

    fn interfaces(&self) -> String {
        let mut table = Table::new(&["", "MAC", "MTU", "address", "router", "lease"]).left();
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "none".to_owned());
        for guest in &self.guests {
            let address = guest.ipv4.as_ref().zip(guest.prefix_length);
            table.row([
                guest.name.clone(),
                guest.mac.clone(),
                guest.mtu.to_string(),
                or_none(address.map(|(address, length)| format!("{address}/{length}"))),
                or_none(guest.router.clone()),
                or_none(guest.lease_seconds.map(lease)),
            ]);
        }
        table.text()
    }

    fn round_trips(&self) -> String {
        if self.ping.paths.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&["ping", "answered", "p50", "p99", "max"]);
        let us = |rtt: Option<f64>| rtt.map_or_else(String::new, |rtt| format!("{rtt:.1} us"));
        for path in &self.ping.paths {
            table.row([
                format!("{} to {}", path.from, path.to),
                format!("{} of {}", path.received, path.sent),
                us(path.rtt_us_p50),
                us(path.rtt_us_p99),
                us(path.rtt_us_max),
            ]);
        }
        format!("\nRound-trip times\n{}", table.text())
    }

    fn moved(&self) -> String {
        let mut text = String::new();
        let named = |name, transfer| std::iter::repeat(name).zip(transfer);
        let all = named("Transfer", &self.transfer).chain(named("Transfer", &self.transfer_back));
        for (what, transfer) in all.chain(named("The way out", &self.fetch)) {
            let _ = writeln!(
                text,
                "\n{what}: {} from {} to {} in {:.2} s, SHA-256 {}\n  {:.2} Gbit/s, {} \
                 packets per second, {} packets",
                bytes(transfer.bytes),
                transfer.from,
                transfer.to,
                transfer.seconds,
                if transfer.sha256_ok { "matches" } else { "DOES NOT MATCH" },
                transfer.gbit_per_s,
                grouped(transfer.packets_per_s as u64),
                grouped(transfer.packets),
            );
        }
        let mut table = Table::new(&["ring of", "read", "per batch", "written", "per batch"]);
        for guest in &self.guests {
            let packets = guest.packets_read.zip(guest.packets_written);
            let batches = guest.read_batches.zip(guest.write_batches);
            let Some(((read, written), (reads, writes))) = packets.zip(batches) else { continue };
            table.row([
                guest.name.clone(),
                grouped(read),
                format!("{:.1}", reads.mean),
                grouped(written),
                format!("{:.1}", writes.mean),
            ]);
        }
        let _ = write!(text, "\nPackets and the mean size of batches\n{}", table.text());
        text
    }

    fn dropped(&self) -> String {
        if self.drops == 0 {
            return "none".to_owned();
        }
        let reasons: Vec<_> =
            self.drops_by_reason.iter().map(|(why, n)| format!("{} {why}", grouped(*n))).collect();
        reasons.join(", ")
    }
}

/// A time in the largest unit in which it is a whole number.
fn lease(seconds: u32) -> String {
    match seconds {
        s if s % 3600 == 0 => format!("{} h", s / 3600),
        s if s % 60 == 0 => format!("{} min", s / 60),
        s => format!("{s} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn pings_of_all_paths_add_up() {
        let mut summary = PingSummary::default();
        let pings = |us: &[u64]| Pings {
            sent: us.len() as u32 + 1,
            round_trips: us.iter().map(|us| Duration::from_micros(*us)).collect(),
        };
        summary.add("a".into(), "b".into(), &pings(&[30, 10, 20]));
        summary.add("b".into(), "a".into(), &pings(&[40]));
        assert_eq!((summary.sent, summary.received), (6, 4));
        assert_eq!((summary.rtt_us_p50, summary.rtt_us_p99), (Some(20.0), Some(40.0)));
        assert_eq!(summary.paths[0].rtt_us_max, Some(30.0));
    }

    #[test]
    fn the_widest_tables_fit_into_80_columns() {
        let guest = || GuestSummary {
            name: "guest0".into(),
            mac: "52:54:00:12:34:56".into(),
            mtu: 65_521,
            max_packet_size: 65_535,
            ipv4: Some("192.168.100.254".into()),
            prefix_length: Some(24),
            gateway: None,
            router: Some("192.168.100.254".into()),
            lease_seconds: Some(86_399),
            packets_read: Some(9_999_999_999),
            packets_written: Some(9_999_999_999),
            read_batches: Some(Batches { mean: 1023.9, ..Batches::default() }),
            write_batches: Some(Batches { mean: 1023.9, ..Batches::default() }),
            writes_failed: Some(0),
        };
        let mut summary = Summary { guests: vec![guest(), guest()], ..Summary::default() };
        let slow = Pings { sent: 50, round_trips: vec![Duration::from_secs(1); 50] };
        summary.ping.add("guest1".into(), "gateway".into(), &slow);
        for line in summary.text().lines() {
            assert!(line.chars().count() <= crate::report::WIDTH, "{line}");
        }
        assert!(summary.text().contains("86399 s"), "{}", summary.text());
    }

    #[test]
    fn a_run_that_got_nowhere_still_reads() {
        let summary = Summary { device: "embedded".into(), ..Summary::default() };
        let text = summary.text();
        assert!(text.contains("Drops: none"), "{text}");
        let json = serde_json::to_value(&summary).unwrap();
        for key in ["mode", "guests", "ping", "transfer", "drops"] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
    }
}
