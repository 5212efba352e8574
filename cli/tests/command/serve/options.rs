//! What else a server does for whoever has started it: reports on a signal, and counters.

use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;

use super::guest::{Guest, mac, packet};
use super::*;

const ON_LAB: [&str; 4] = ["serve", "--json", "--network", "embedded:lab"];

/// A signal asks for a report, and the server goes on. One that is not read holds up nobody.
#[test]
fn a_signal_asks_for_a_report() {
    let folder = scratch("serve report");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let mut server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    let stdout = server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let (sender, reports) = std::sync::mpsc::channel();
    let (begin, beginning) = std::sync::mpsc::channel::<()>();
    let reader = thread::spawn(move || {
        beginning.recv().expect("the test goes on");
        let all = serde_json::Deserializer::from_reader(BufReader::new(stdout));
        for report in all.into_iter::<Value>() {
            sender.send(report.expect("one JSON object after the other")).expect("it is read");
        }
    });
    server.signal("USR1");
    begin.send(()).expect("the reader waits");
    let report = reports.recv_timeout(LIMIT).expect("a report");
    assert_eq!((&report["running"], &report["ok"]), (&true.into(), &true.into()));
    let guest = &report["sockets"][0]["guests"][0];
    assert_eq!((&guest["guest"], &guest["counts"]["tx_packets"]), (&1.into(), &10.into()));
    assert_eq!(count(&report, 1, "rx_packets"), 10);
    exchange(&mut one, &mut two, 10..20);
    server.signal("TERM");
    let last = reports.recv_timeout(LIMIT).expect("a report");
    assert_eq!((&last["running"], count(&last, 0, "tx_packets")), (&false.into(), 20));
    assert_eq!(last["sockets"][0]["guests"], serde_json::json!([]));
    reader.join().expect("the output ends");

    // Nobody reads: hundreds of reports fill the pipe, and guests come and go as before.
    let mut server = Server::new(&["--listen", &listen(&a), "--listen", &listen(&b)]);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    let start = Instant::now();
    while !server.said().contains("is not read yet") {
        assert!(start.elapsed() < LIMIT, "{}", server.said());
        server.signal("USR1");
        thread::sleep(Duration::from_millis(2));
    }
    exchange(&mut one, &mut two, 0..10);
    let mut stdout = server.child.as_mut().expect("it runs").stdout.take().expect("piped");
    let reader = thread::spawn(move || stdout.read_to_end(&mut Vec::new()).map(drop));
    server.signal("TERM");
    assert_eq!(server.exit_code(), Some(0));
    reader.join().expect("it ends").expect("it can be read");
}

/// Asks for the counters, and returns the whole answer.
pub(super) fn scraped(stream: impl Read + Write + Send + 'static) -> String {
    asked(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
}

fn asked(mut stream: impl Read + Write + Send + 'static, request: &str) -> String {
    let request = request.to_owned();
    in_time("a scrape", move || {
        stream.write_all(request.as_bytes()).expect("it is sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    })
}

/// The value of the sample that begins like this.
fn sample(answer: &str, name: &str) -> f64 {
    sample_of(answer, name).unwrap_or_else(|| panic!("no {name} in {answer}"))
}

fn sample_of(answer: &str, name: &str) -> Option<f64> {
    let value = answer.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().parse().expect("a number"))
}

/// Goal: a monitoring system reads the counters, over TCP and over a socket of the Unix domain. Scrapers
/// that are silent, slow, or send rubbish cost the guests nothing and the others a little time.
#[test]
fn counters_are_shown_to_a_monitoring_system() {
    let folder = scratch("serve metrics");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let learning = format!("{},mac=learn", listen(&a));
    let arguments = ["--listen", &learning, "--listen", &listen(&b), "--metrics"];
    let server = Server::new(&[&arguments[..], &["127.0.0.1:0"]].concat());
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    server.until_said("/metrics");
    let said = server.said();
    let (_, address) = said.split_once("counters are at http://").expect("an address");
    let address = address.split('/').next().expect("an address").to_owned();
    let connect = || {
        let stream = TcpStream::connect(&address).expect("it listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
        stream
    };
    let answer = scraped(connect());
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a body");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let of = |name: &str, more: &str| format!("{name}{{socket=\"{}\"{more}}}", listen(&a));
    assert_eq!(sample(body, &of("vmring_guests", "")), 1.0);
    assert_eq!(sample(body, &of("vmring_device_total", ",counter=\"tx_packets\"")), 10.0);
    // What a port drops is seen while its guest is connected.
    one.send(&packet(mac(7), two.mac, 60, 1));
    let spoofed =
        || sample_of(&scraped(connect()), &of("vmring_port_drops_total", ",reason=\"spoofed\""));
    let start = Instant::now();
    while spoofed() != Some(1.0) {
        assert!(start.elapsed() < LIMIT, "it is not counted");
        thread::sleep(Duration::from_millis(5));
    }
    // Of one that is silent, one that is slow, and one that says too much.
    let silent = connect();
    let mut slow = connect();
    slow.write_all(b"GET /met").expect("it is sent");
    let mut long = connect();
    long.write_all(&[b'x'; 20_000]).expect("it is sent");
    exchange(&mut one, &mut two, 10..30);
    assert!(asked(connect(), "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(asked(connect(), "PUT /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    let answer = scraped(connect());
    assert_eq!(sample(&answer, &of("vmring_device_total", ",counter=\"tx_packets\"")), 31.0);
    for mut ended in [silent, slow] {
        assert_eq!(ended.read(&mut [0; 64]).expect("its end"), 0, "it has no answer");
    }
    drop((one, two));
    let start = Instant::now();
    while sample(&scraped(connect()), &of("vmring_guests", "")) > 0.0 {
        assert!(start.elapsed() < LIMIT, "the guests have gone");
        thread::sleep(Duration::from_millis(10));
    }
    let answer = scraped(connect());
    assert_eq!(sample(&answer, &of("vmring_device_total", ",counter=\"tx_packets\"")), 31.0);
    assert_eq!(sample(&answer, &of("vmring_connections_total", "")), 1.0);
    // One that is connected when the server ends holds it up no longer than a moment.
    let _silent = connect();
    server.report("TERM");

    let path = folder.join("metrics.sock");
    let place = format!("unix:{}", path.display());
    let server = Server::new(&[&arguments[..], &[&place]].concat());
    assert_eq!(path.symlink_metadata().expect("a socket").mode() & 0o777, 0o600);
    let answer = scraped(UnixStream::connect(&path).expect("it listens"));
    assert_eq!(sample(&answer, &of("vmring_guests", "")), 0.0);
    let second =
        vmring(&[&ON_LAB[..], &["--listen", "vhost-user:./x", "--metrics", &place]].concat());
    assert_eq!(second.status.code(), Some(1));
    assert!(unfolded(&second.stderr).contains("a server listens at"));
    drop(server);
    assert!(is_socket(&path), "it is left over");
    Server::new(&[&arguments[..], &[&place]].concat()).report("TERM");
    assert!(!path.exists() && !is_socket(&a));
}
