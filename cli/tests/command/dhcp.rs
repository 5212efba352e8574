//! The options of the DHCP server.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{LIMIT, json, path, refused, scratch};

/// The addresses of the guests in a report, with their MAC addresses.
fn addresses(report: &Value) -> Vec<(String, String)> {
    let guests = report["guests"].as_array().expect("a list");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    guests.iter().map(|guest| (text(&guest["mac"]).to_uppercase(), text(&guest["ipv4"]))).collect()
}

#[test]
fn the_demo_gives_addresses_as_it_is_told() {
    let file = scratch("dhcp").join("leases");
    let range = "192.168.64.100-192.168.64.103";
    let run = || {
        json(&[
            "demo",
            "--json",
            "--bytes",
            "256K",
            "--lease-time",
            "1200",
            "--dhcp-range",
            range,
            "--lease-file",
            path(&file),
        ])
    };
    let (first, second) = (run(), run());
    let mut all = Vec::new();
    let leases = std::fs::read_to_string(&file).expect("a lease file");
    for report in [&first, &second] {
        assert_eq!(report["guests"][0]["lease_seconds"], 1200);
        for (mac, address) in addresses(report) {
            let address = address.split('/').next().expect("an address").to_owned();
            assert!(leases.contains(&format!("{mac} {address} ")), "{mac} {address}: {leases}");
            all.push(address);
        }
    }
    // The second run's guests are others, and get what the first run's do not have.
    all.sort();
    let expected = [100, 101, 102, 103].map(|last| format!("192.168.64.{last}"));
    assert_eq!(all, expected);
}

/// A run that is killed has written its leases, and the next one reads them.
#[test]
fn leases_outlive_a_kill() {
    let file = scratch("dhcp-kill").join("leases");
    let range = "192.168.64.50-192.168.64.53";
    let mut child = Command::new(env!("CARGO_BIN_EXE_vmring"))
        .args(["demo", "--idle", "600", "--dhcp-range", range, "--lease-file", path(&file)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let start = Instant::now();
    let leases = loop {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        if text.lines().count() == 3 && text.ends_with('\n') {
            break text;
        }
        if start.elapsed() > LIMIT {
            child.kill().expect("it can be killed");
            panic!("the leases are not in the file: {text}");
        }
        thread::sleep(Duration::from_millis(10));
    };
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    let report = json(&[
        "demo",
        "--json",
        "--bytes",
        "256K",
        "--dhcp-range",
        range,
        "--lease-file",
        path(&file),
    ]);
    for (_, address) in addresses(&report) {
        let address = address.split('/').next().expect("an address");
        assert!(!leases.contains(&format!(" {address} ")), "{address}: {leases}");
    }
}

#[test]
fn options_that_cannot_be_are_refused() {
    let folder = scratch("dhcp-refused");
    let other = folder.join("diary");
    std::fs::write(&other, "Dear diary").expect("a file");
    for (arguments, said) in [
        (&["demo", "--lease-time", "9"][..], "9 is not in 10 to "),
        (&["demo", "--dhcp-range", "10.0.0.5-10.0.0.9"], "cannot end"),
        (&["demo", "--dhcp-range", "192.168.64.9-192.168.64.5"], "cannot begin at 192.168.64.9"),
        (&["demo", "--reserve", "52:54:00:12:34:56=10.0.0.9"], "10.0.0.9 is not an address"),
        (&["demo", "--lease-file", path(&other)], "is not a lease file"),
        (
            &["bridge", "embedded:a", "embedded:b", "--lease-time", "60"],
            "--lease-time cannot be used: both ends have a DHCP server",
        ),
        (
            &["bridge", "pcap:a", "capture:b", "--lease-file", "c"],
            "--lease-file cannot be used: nothing here has a DHCP server",
        ),
    ] {
        let sentence = refused(arguments);
        assert!(sentence.contains(said), "{arguments:?}: {sentence}");
    }
    assert_eq!(std::fs::read_to_string(&other).expect("it is there"), "Dear diary");
}
