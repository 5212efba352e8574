//! DPDK's virtio-user: two ports of one dpdk-testpmd, which hands every packet that comes from one
//! to the other.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;

use super::*;

const MACS: [&str; 2] = ["52:54:00:12:34:01", "52:54:00:12:34:02"];

/// Lets packets of this length go round between both ports for a while. Returns the server's report,
/// and what testpmd has printed, or `None` where it cannot run.
fn go_round(name: &str, options: &str, queues: u16, len: u32) -> Option<(Value, String)> {
    let folder = scratch(&format!("serve dpdk {name} {len}"));
    // Its files have names of their own length.
    let folder = folder.canonicalize().expect("a folder");
    let paths = ["a", "b"].map(|name| folder.join(format!("{name}.sock")));
    let listens = paths.each_ref().map(|path| listen(path));
    let pairs = queues.to_string();
    let counters = folder.join("metrics.sock");
    let server = Server::new(&[
        "--listen",
        &listens[0],
        "--listen",
        &listens[1],
        "--queues",
        &pairs,
        "--metrics",
        &format!("unix:{}", counters.display()),
    ]);
    let vdev = |port: usize| {
        let (path, mac) = (paths[port].display(), MACS[port]);
        format!("net_virtio_user{port},path={path},mac={mac},queues={queues},{options}")
    };
    let peer = |port: usize| format!("--eth-peer={port},{}", MACS[1 - port]);
    let output = std::fs::File::create(folder.join("output")).expect("a file");
    // Line by line, so that what it does can be waited for.
    let mut command = Command::new("stdbuf");
    command
        .args([
            "-oL",
            "dpdk-testpmd",
            "-l",
            "0,1",
            "--no-huge",
            "-m",
            "128",
            "--no-pci",
            "--no-telemetry",
        ])
        .args(["--file-prefix", "serve", "--vdev", &vdev(0), "--vdev", &vdev(1), "--", "-i"])
        .args(["--nb-cores=1", "--forward-mode=io", "--total-num-mbufs=4096"])
        .args([peer(0), peer(1), format!("--txpkts={len}")])
        .args([format!("--rxq={queues}"), format!("--txq={queues}")])
        .env("RUNTIME_DIRECTORY", &folder)
        .stdin(Stdio::piped())
        .stdout(output.try_clone().expect("a copy"))
        .stderr(output);
    let mut testpmd = match command.spawn() {
        Ok(child) => Testpmd(child),
        Err(error) => panic!("stdbuf: {error}"),
    };
    let mut input = testpmd.0.stdin.take().expect("piped");
    let read = || std::fs::read_to_string(folder.join("output")).unwrap_or_default();
    let mut testpmd_does = |command: &str, words: &str| {
        input.write_all(command.as_bytes()).expect("it reads");
        let start = Instant::now();
        while !read().contains(words) {
            let ended = testpmd.0.try_wait().expect("the process").is_some();
            assert!(!ended && start.elapsed() < LIMIT, "no '{words}' in:\n{}", read());
            thread::sleep(Duration::from_millis(10));
        }
    };
    testpmd_does("start tx_first 1\n", "packets/burst");
    let start = Instant::now();
    while received(&read()) < ENOUGH {
        assert!(start.elapsed() < LIMIT, "nothing moves any more:\n{}", read());
        testpmd_does("show port stats all\n", "RX-packets");
        thread::sleep(Duration::from_millis(50));
    }
    testpmd_does("stop\n", "Accumulated forward statistics");
    // What is on its way arrives in the rings: then nothing is counted any more, and both ends agree.
    let mut last = None;
    let start = Instant::now();
    loop {
        let stream = UnixStream::connect(&counters).expect("the server shows its counters");
        let ways = ways(&options::scraped(stream), &listens);
        if ways.iter().all(|(sent, received)| sent == received) && last == Some(ways) {
            break;
        }
        assert!(start.elapsed() < LIMIT, "(sent, received) each way: {ways:?}");
        last = Some(ways);
        thread::sleep(Duration::from_millis(10));
    }
    testpmd_does("quit\n", "Stopping port 0");
    drop(input);
    let start = Instant::now();
    while testpmd.0.try_wait().expect("the process").is_none() {
        assert!(start.elapsed() < LIMIT, "it does not end:\n{}", read());
        thread::sleep(Duration::from_millis(10));
    }
    Some((server.report("TERM"), read()))
}

/// Packets that have gone far enough round.
const ENOUGH: u64 = 2000;

/// For either way: what the server says that it took of the sender, and that it gave the other.
fn ways(answer: &str, listens: &[String; 2]) -> [(u64, u64); 2] {
    let of = |port: usize, counter: &str| {
        let name =
            format!("vmring_device_total{{socket=\"{}\",counter=\"{counter}\"}}", listens[port]);
        let value = answer.lines().find_map(|line| line.strip_prefix(&name));
        value.unwrap_or_else(|| panic!("no {name} in {answer}")).trim().parse().expect("a count")
    };
    [0, 1].map(|port| (of(port, "tx_packets"), of(1 - port, "rx_packets")))
}

/// What the second port has received, as testpmd has last said.
fn received(output: &str) -> u64 {
    let last = output.rsplit_once("RX-packets: ").map_or("", |(_, last)| last);
    last.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Ends with the test.
struct Testpmd(Child);

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Goal: packets go round between two ports of DPDK's virtio-user, and none of them is lost: neither by
/// the server, which counts what it takes and gives, nor by testpmd, which counts what it cannot send.
/// One burst is on its way, far below what would saturate anything.
#[test]
fn packets_of_dpdk_go_round_and_none_is_lost() {
    if thread::available_parallelism().is_ok_and(|count| count.get() < 2) {
        return eprintln!("skipped: dpdk-testpmd needs two processors");
    }
    for program in ["dpdk-testpmd", "stdbuf"] {
        if let Err(error) = Command::new(program).arg("--help").output()
            && error.kind() == ErrorKind::NotFound
        {
            return eprintln!("skipped: {program} is not installed");
        }
    }
    for (name, options, queues, lens) in [
        ("plain", "packed_vq=0", 1, &[64, 512, 1514][..]),
        ("merging", "mrg_rxbuf=1", 1, &[64, 1514]),
        ("in order", "mrg_rxbuf=0,in_order=1", 1, &[64, 1514]),
        ("neither", "mrg_rxbuf=0,in_order=0", 1, &[60, 1514]),
        ("short", "queue_size=64", 1, &[64]),
        ("two pairs", "mrg_rxbuf=1", 2, &[64, 1514]),
    ] {
        for len in lens {
            let what = format!("{name}, {len} bytes");
            let Some((report, output)) = go_round(name, options, queues, *len) else { return };
            for port in 0..2 {
                let (sent, received) =
                    (count(&report, port, "tx_packets"), count(&report, 1 - port, "rx_packets"));
                assert_eq!(sent, received, "{what}: {report:#}\n{output}");
                // Both bursts may go the same way for most of the time.
                assert!(2 * sent > ENOUGH, "{what}: only {sent} have gone round: {output}");
                assert_eq!(count(&report, port, "tx_bytes"), sent * u64::from(*len), "{what}");
                assert_eq!(report["sockets"][port]["drops_by_reason"], serde_json::json!({}));
            }
            let total = output.rsplit_once("Accumulated forward statistics").expect("statistics").1;
            assert!(
                total.contains("RX-dropped: 0 ") && total.contains("TX-dropped: 0 "),
                "{total}"
            );
        }
    }
}
