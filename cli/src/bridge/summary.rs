//! The bridge's results: one JSON object, or tables.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use vmring::device::pcap::Replay;

use super::forwarding::Bridge;
use super::limits::TICK;
use super::spec::End;
use crate::failure::Failure;
use crate::report::{Batches, Table, bytes, grouped, offload_names, rate, round};

/// Everything that is reported about a bridge.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    /// Whether the bridge ended without a failure.
    pub(crate) ok: bool,
    /// The failure, in a sentence.
    pub(crate) failed: Option<String>,
    pub(crate) seconds: f64,
    /// Processor time of the whole process, in percent of one processor.
    pub(crate) cpu_percent: f64,
    pub(crate) ends: [EndSummary; 2],
    /// From the first end to the second, and back.
    #[serde(rename = "ways")]
    pub(crate) directions: [DirectionSummary; 2],
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct EndSummary {
    pub(crate) name: String,
    pub(crate) mtu: u32,
    pub(crate) max_packet_size: u32,
    pub(crate) offloads: Vec<&'static str>,
    /// What is wrong with the file that is replayed, in a sentence.
    pub(crate) note: Option<String>,
    /// Packets that the end's device, its whole network or its file has dropped.
    pub(crate) drops_by_reason: BTreeMap<&'static str, u64>,
    /// What else the end's device has counted.
    pub(crate) counters: BTreeMap<&'static str, u64>,
}

#[derive(Clone, Debug, Serialize)]
pub(crate) struct DirectionSummary {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) packets_read: u64,
    pub(crate) bytes_read: u64,
    pub(crate) packets_written: u64,
    pub(crate) bytes_written: u64,
    /// Checksums that were completed in software.
    pub(crate) checksums_completed: u64,
    /// Packets that were segmented in software: each is read once and written as several.
    pub(crate) packets_cut: u64,
    /// Packets that were merged with others in software.
    pub(crate) segments_merged: u64,
    /// The large packets that they became: each is read as several and written once.
    pub(crate) packets_merged: u64,
    /// Packets that the bridge did not pass on.
    pub(crate) drops: u64,
    /// The same by reason, for the reasons that occurred.
    pub(crate) drops_by_reason: BTreeMap<String, u64>,
    pub(crate) read_batches: Batches,
    pub(crate) write_batches: Batches,
}

impl Summary {
    pub(crate) fn of(bridge: &Bridge, time: Duration, cpu: Duration) -> Self {
        let end = |i: usize| {
            let End { name, interface, replay, .. } = &bridge.ends[i];
            let counters = interface.counters().into_iter().filter(|(_, n)| *n > 0);
            EndSummary {
                name: name.clone(),
                mtu: interface.mtu(),
                max_packet_size: interface.max_packet_size(),
                offloads: offload_names(bridge.ends[i].offloads()),
                note: replay.as_ref().and_then(Replay::note).map(str::to_owned),
                drops_by_reason: bridge.dropped_at(i).into_iter().collect(),
                counters: counters.collect(),
            }
        };
        let direction = |from: usize| {
            let to = 1 - from;
            let counts = &bridge.directions[from].counts;
            let (read, written) = (bridge.controls[from].stats(), bridge.controls[to].stats());
            DirectionSummary {
                from: bridge.ends[from].name.clone(),
                to: bridge.ends[to].name.clone(),
                packets_read: counts.packets_read,
                bytes_read: counts.bytes_read,
                packets_written: counts.packets_written,
                bytes_written: counts.bytes_written,
                checksums_completed: counts.checksums,
                packets_cut: counts.packets_cut,
                segments_merged: counts.segments_merged,
                packets_merged: counts.packets_merged,
                drops: counts.drops.values().sum(),
                drops_by_reason: counts.drops.clone(),
                read_batches: Batches::of(read.rx_packets, &read.read_batches),
                write_batches: Batches::of(written.tx_packets, &written.write_batches),
            }
        };
        Self {
            ok: true,
            failed: None,
            seconds: round(time.as_secs_f64(), 3),
            cpu_percent: round(100.0 * cpu.as_secs_f64() / time.as_secs_f64().max(1e-9), 3),
            ends: [end(0), end(1)],
            directions: [direction(0), direction(1)],
        }
    }

    pub(crate) fn end(&mut self, outcome: &Result<(), Failure>) {
        self.ok = outcome.is_ok();
        self.failed = outcome.as_ref().err().map(ToString::to_string);
    }

    /// The tables for people.
    pub(crate) fn text(&self) -> String {
        let [a, b] = &self.ends;
        let mut text = format!(
            "{} and {}, for {:.1} s, with {:.1} % of one processor\n",
            a.name, b.name, self.seconds, self.cpu_percent
        );
        let mut table = Table::new(&["end", "MTU", "max packet", "offloads"]).left();
        for end in &self.ends {
            let none = "none".to_owned();
            let offloads = if end.offloads.is_empty() { none } else { end.offloads.join(", ") };
            let (mtu, max) = (end.mtu.to_string(), end.max_packet_size.to_string());
            table.row([end.name.clone(), mtu, max, offloads]);
        }
        text.push_str(&table.text());
        let mut table =
            Table::new(&["from", "read", "per batch", "written", "per batch", "bytes", "dropped"]);
        for direction in &self.directions {
            table.row([
                direction.from.clone(),
                grouped(direction.packets_read),
                format!("{:.1}", direction.read_batches.mean),
                grouped(direction.packets_written),
                format!("{:.1}", direction.write_batches.mean),
                bytes(direction.bytes_written),
                grouped(direction.drops),
            ]);
        }
        // Writing to a string does not fail.
        let _ = write!(text, "\nPackets and the mean size of batches\n{}", table.text());
        for direction in &self.directions {
            let (from, to) = (&direction.from, &direction.to);
            if direction.checksums_completed + direction.packets_cut > 0 {
                let _ = writeln!(
                    text,
                    "In software from {from} to {to}: {} checksums completed, {} packets cut",
                    grouped(direction.checksums_completed),
                    grouped(direction.packets_cut),
                );
            }
            if direction.packets_merged > 0 {
                let _ = writeln!(
                    text,
                    "Merged from {from} to {to}: {} packets into {}",
                    grouped(direction.segments_merged),
                    grouped(direction.packets_merged),
                );
            }
            for (why, n) in &direction.drops_by_reason {
                let _ = writeln!(text, "Dropped from {from} to {to}: {} {why}", grouped(*n));
            }
        }
        for end in &self.ends {
            if let Some(note) = &end.note {
                let _ = writeln!(text, "About {}: {note}", end.name);
            }
            for (why, n) in &end.drops_by_reason {
                let _ = writeln!(text, "Dropped by {}: {} {why}", end.name, grouped(*n));
            }
        }
        text
    }
}

/// A line that says how much has moved in the last second.
pub(super) fn rates(before: [(u64, u64); 2], now: [(u64, u64); 2], dropped: u64) -> String {
    let way = |i: usize| {
        let (packets, octets) = (now[i].0 - before[i].0, now[i].1 - before[i].1);
        rate(packets, octets, TICK)
    };
    format!("there {}, back {}, {} dropped", way(0), way(1), grouped(dropped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_fits_into_a_line() {
        let line = rates([(5, 500), (0, 0)], [(4_500_005, 5_625_000_500), (1234, 99_999)], 7);
        let said = "there 4.5 Mpps 45.00 Gbit/s, back 1.2 kpps 0.00 Gbit/s, 7 dropped";
        assert_eq!(line, said);
        let most = (99_000_000, 12_000_000_000);
        let line = rates([(0, 0); 2], [most; 2], 999_999_999);
        assert!(line.len() <= crate::report::WIDTH - 2, "{line}");
        assert!(rates([(0, 0); 2], [(999, 9), (1, 1)], 0).starts_with("there 999 pps "));
    }
}
