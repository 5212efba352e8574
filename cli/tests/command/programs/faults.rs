//! The kernel's TCP over a link to the network that loses, damages, delays and reorders packets, and beside
//! port forwards that come and go. The network is in this process, so that a faulty device can be between the
//! guest and it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmring::device::embedded::nat::{
    Counter, HostPort, NatControl, NatReport, NatSettings, Protocol,
};
use vmring::device::fault::Faults;
use vmring::{Driver, Embedded, Interface, Status, Tap};

use super::*;
use crate::carry::carry;
use crate::host::ip;

/// A guest's kernel behind a TAP, which is joined to a network of this process.
struct Joined {
    guest: Host,
    stop: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Joined {
    fn new(driver: impl Driver) -> Self {
        let guest = Host::new();
        let tap = guest.run(|| {
            ip("link set lo up");
            ip("tuntap add t0 mode tap");
            ip(&format!("address add {GUEST}/24 dev t0"));
            ip("link set t0 up");
            ip(&format!("route add default via {GATEWAY}"));
            Interface::builder().device(Tap::named("t0").configure(false)).start().expect("a TAP")
        });
        let network = Interface::builder().device(driver).start().expect("a network");
        let ends = [tap, network].map(Arc::new);
        let stop = Arc::new(AtomicBool::new(false));
        let threads = [[0, 1], [1, 0]].map(|way| {
            let ([from, to], stop) = (way.map(|end| ends[end].clone()), stop.clone());
            thread::spawn(move || carry(&from, &to, || stop.load(Ordering::Relaxed)))
        });
        Self { guest, stop, threads: threads.into() }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of it was printed.
            let _ = thread.join();
        }
    }
}

/// A server at the host's loopback address that sends back what each client sends, when that has ended.
fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a client");
            stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).expect("all that it sends");
            stream.write_all(&bytes).expect("all of it comes back");
        }
    });
    port
}

fn exchange(at: SocketAddr, len: usize) {
    let mut stream = TcpStream::connect_timeout(&at, LIMIT).expect("it is reached");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    let bytes = content(len);
    stream.write_all(&bytes).expect("it is written");
    stream.shutdown(Shutdown::Write).expect("its end");
    let mut back = Vec::new();
    stream.read_to_end(&mut back).expect("it is read");
    assert!(bytes == back, "{} of {} bytes", back.len(), bytes.len());
}

fn gateway(port: u16) -> SocketAddr {
    (GATEWAY.parse::<Ipv4Addr>().expect("an address"), port).into()
}

/// Exchanges a stream through a faulty link, and returns what the translator has counted.
fn through(name: &str, faults: Faults, len: usize) -> NatReport {
    let (port, control) = (echo(), NatControl::default());
    let settings = NatSettings::new().host_port(HostPort { port, protocol: Protocol::Tcp });
    let network = Embedded::network(format!("faults {name} {}", std::process::id()));
    let joined = Joined::new(faults.wrap(network.nat(settings).nat_control(&control)));
    joined.guest.run(move || exchange(gateway(port), len));
    until("the flow is gone", || control.report().expect("a report").entries == 0);
    control.report().expect("a report")
}

#[test]
fn streams_survive_a_link_that_loses_and_damages_packets() {
    if !have(&[]) {
        return;
    }
    let faults = Faults::seeded(5).errors(0.01, Status::Failure).corruption(0.08);
    let report = through("loss", faults, 128 << 10);
    let counters = &report.counters;
    let again = counters[Counter::FastRetransmit] + counters[Counter::TimeoutRetransmit];
    assert!(again > 0, "{counters:?}");
}

#[test]
fn streams_survive_a_link_that_delays_and_reorders_packets() {
    if !have(&[]) {
        return;
    }
    through("delay", Faults::seeded(6).engine(Duration::from_millis(20), false), 4 << 20);
    through("order", Faults::seeded(7).engine(Duration::from_millis(3), true), 1 << 20);
}

#[test]
fn streams_survive_a_link_that_stops_and_goes_on() {
    if !have(&[]) {
        return;
    }
    let faults = Faults::seeded(8).exhaustion(0.3).short_batches(0.5).duplicate_wakes(0.2);
    through("stops", faults.late_wakes(0.05, Duration::from_millis(20)), 4 << 20);
}

/// Forwards are added and removed many times while a stream goes on. Each works, and none is left over.
#[test]
fn forwards_come_and_go_under_load() {
    if !have(&[]) {
        return;
    }
    const TIMES: usize = 300;
    let (port, control) = (echo(), NatControl::default());
    let settings = NatSettings::new().host_port(HostPort { port, protocol: Protocol::Tcp });
    let network = Embedded::network(format!("churn {}", std::process::id()));
    let joined = Joined::new(network.nat(settings).nat_control(&control));
    let inside = joined.guest.run(|| TcpListener::bind(("0.0.0.0", 7777)).expect("its port"));
    thread::spawn(move || {
        for stream in inside.incoming() {
            // The peer may have gone.
            let _ = stream.expect("a client").write_all(b"hello");
        }
    });
    // The network learns the guest's address.
    joined.guest.run(move || exchange(gateway(port), 10));
    let before = control.report().expect("a report");
    let load = joined.guest.start(move || exchange(gateway(port), 16 << 20));
    for number in 0..TIMES {
        let [tcp, udp] = ["", ",udp"].map(|kind| {
            let rule = format!("0={GUEST}:7777{kind}").parse().expect("a rule");
            control.add_forward(&rule).expect("a forward")
        });
        if number % 10 == 0 {
            let mut peer = TcpStream::connect(tcp).expect("a listener");
            peer.set_read_timeout(Some(LIMIT)).expect("a timeout");
            let mut hello = [0; 5];
            peer.read_exact(&mut hello).expect("the guest's greeting");
            assert_eq!(&hello, b"hello");
        }
        for (protocol, at) in [(Protocol::Tcp, tcp), (Protocol::Udp, udp)] {
            assert!(control.remove_forward(protocol, at, number % 2 == 0).expect("an answer"));
        }
    }
    load.recv_timeout(LIMIT).expect("the stream is whole");
    until("everything of the forwards is gone", || {
        let report = control.report().expect("a report");
        report.forwards.is_empty()
            && report.entries == 0
            && report.descriptors <= before.descriptors
    });
}
