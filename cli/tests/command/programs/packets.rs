//! scapy sends odd segments of TCP, and tcpreplay what scapy has made up.

use std::io::{Read, Write};
use std::net::TcpListener;

use super::*;

/// What the server at port 19 sends at once.
const STREAM: usize = 60_000;

/// Servers outside: an echo at port 7, and one that sends [`STREAM`] bytes at port 19.
fn serve(world: &World) {
    let [echo, source] = [7, 19].map(|port| {
        world.outside.run(move || TcpListener::bind((OUTSIDE, port)).expect("its port"))
    });
    thread::spawn(move || {
        for stream in echo.incoming() {
            thread::spawn(move || -> std::io::Result<()> {
                let (mut stream, mut bytes) = (stream?, [0; 4096]);
                loop {
                    match stream.read(&mut bytes)? {
                        0 => return Ok(()),
                        len => stream.write_all(&bytes[..len])?,
                    }
                }
            });
        }
    });
    thread::spawn(move || {
        for stream in source.incoming() {
            thread::spawn(move || -> std::io::Result<()> {
                let bytes: Vec<u8> = (0..STREAM).map(|i| (i % 251) as u8).collect();
                let mut stream = stream?;
                stream.write_all(&bytes)?;
                // The guest ends it.
                stream.read_to_end(&mut Vec::new()).map(drop)
            });
        }
    });
}

/// A Python that has scapy.
fn python() -> Option<String> {
    let pythons = ["python3", "/usr/bin/python3"];
    let has = |python: &&&str| {
        let mut command = Command::new(python);
        command.args(["-c", "import scapy.all"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let python = pythons.iter().find(has);
    if python.is_none() {
        skip("there is no python3 with scapy");
    }
    python.map(ToString::to_string)
}

#[test]
fn odd_segments_of_scapy_do_no_harm() {
    if !have(&["tcpreplay"]) {
        return;
    }
    let Some(python) = python() else { return };
    let folder = crate::scratch("programs scapy");
    fs::write(folder.join("odd.py"), include_str!("odd.py")).expect("a file");
    let lab = Lab::new("programs packets", &[]);
    serve(&lab.world);
    let denied = lab.world.host.run(|| {
        let listener = TcpListener::bind(("127.0.0.1", 8000)).expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        listener
    });
    let replayed = folder.join("made-up.pcap").display().to_string();
    let guest = &lab.guests[0].host;
    let said =
        sh(guest, &format!("{python} '{}/odd.py' t0 {OUTSIDE} '{replayed}'", folder.display()));
    assert_eq!(said.lines().last(), Some("all is well"), "{said}");
    sh(guest, &format!("tcpreplay -q -t -i t0 '{replayed}' 2>&1"));
    // Everybody goes on after that.
    for guest in &lab.guests {
        let echo = format!("exec 3<>/dev/tcp/{OUTSIDE}/7; echo hello >&3; head -c 6 <&3");
        assert_eq!(sh(&guest.host, &format!("timeout 60 bash -c '{echo}'")), "hello\n");
    }
    assert_eq!(denied.accept().expect_err("nobody").kind(), std::io::ErrorKind::WouldBlock);
    let report = lab.end();
    let counters = &report.0["network"]["counters"];
    for name in [
        "NAT denied loopback",
        "NAT denied reserved",
        "NAT denied unspecified",
        "NAT TCP flags",
        "NAT TCP sequence",
        "NAT restarted",
        "NAT window rewind",
        "NAT malformed",
    ] {
        assert!(report.counter(name) > 0, "{name}: {counters:#}");
    }
}
