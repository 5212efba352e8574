//! iperf3, all ways.

use super::*;

/// What goes one way in a second at least, in bytes.
const LEAST: f64 = 1e6;
/// The port of the first server.
const FIRST_PORT: u16 = 5201;
/// Ways of TCP.
const STREAMS: [&str; 6] = ["", "-R", "-P 8", "-M 536", "-w 64K", "-R -w 64K"];

fn rates(mtu: &str, datagrams: &[&str]) {
    if !have(&["iperf3"]) {
        return;
    }
    let world = World::new();
    let mut ways: Vec<_> = STREAMS.iter().map(ToString::to_string).collect();
    ways.push("--bidir".to_owned());
    ways.extend(datagrams.iter().map(|way| format!("-u -b 40M {way}")));
    // One server for each, because a server may still read what its last client has sent.
    let servers: Vec<_> = (FIRST_PORT..)
        .zip(&ways)
        .map(|(port, _)| {
            let mut command = world.outside.command("iperf3");
            Daemon::start(command.args(["-4", "-s", "-1", "-p", &port.to_string()]))
        })
        .collect();
    let mut script = Vec::new();
    for (port, way) in (FIRST_PORT..).zip(&ways) {
        until_bound(&world.outside, "tcp", port);
        script.push(format!("iperf3 -c {OUTSIDE} -p {port} -J -t 1 {way}"));
    }
    let said = guest(&world, &["--mtu", mtu], &script.join("; "));
    drop(servers);
    let reports = serde_json::Deserializer::from_str(&said).into_iter::<Value>();
    let reports: Vec<_> = reports.map(|one| one.expect("a report of iperf3")).collect();
    assert_eq!(reports.len(), ways.len());
    for (report, way) in reports.iter().zip(&ways) {
        let end = &report["end"];
        let number = |value: &Value| {
            value.as_f64().unwrap_or_else(|| panic!("{way}: no number in {report:#}"))
        };
        if way.contains("-u ") {
            let (all, lost) = (number(&end["sum"]["packets"]), number(&end["sum"]["lost_packets"]));
            assert!(all > 100.0 && lost < all / 2.0, "{way}: {lost} of {all} lost");
        } else if way.contains("--bidir") {
            for sum in ["sum_received", "sum_received_bidir_reverse"] {
                assert!(number(&end[sum]["bytes"]) > 0.0, "{way}: {report:#}");
            }
        } else {
            let received = number(&end["sum_received"]["bytes"]);
            assert!(received > LEAST, "{way}: {received} bytes");
        }
    }
}

#[test]
fn iperf3_goes_all_ways() {
    // A guest's own fragments are dropped. Those towards it arrive.
    rates("1500", &["-l 1472", "-R -l 1472", "-R -l 8192"]);
}

#[test]
fn iperf3_goes_all_ways_in_large_frames() {
    rates("65520", &["-l 1472", "-l 8192", "-R -l 8192"]);
}
