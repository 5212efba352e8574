//! hping3: floods, fragments, and packets in somebody else's name.

use super::*;
use crate::host::ip;

/// An address outside that never answers.
const BLACK_HOLE: &str = "203.0.113.66";
/// How long a flood lasts, in seconds.
const FLOOD: u32 = 2;

fn lab(name: &str) -> Lab {
    let lab = Lab::new(name, &[]);
    lab.world.host.run(|| {
        ip(&format!("neighbour add {BLACK_HOLE} lladdr 02:00:00:00:00:66 dev w0 nud permanent"));
    });
    web::serve(&lab.world, content(8 << 20), &crate::scratch(&format!("{name} web")));
    lab
}

/// Gets a little from the server outside, in a second or two if nothing is in the way.
fn get(seconds: u32) -> String {
    format!("curl -sS -m {seconds} http://{OUTSIDE}/1000 | wc -c")
}

/// A flood of SYN fills what its own port may have half open. The flows that the guest has, and other
/// guests, go on.
#[test]
fn a_flood_of_syn_leaves_other_connections_alone() {
    if !have(&["hping3", "curl"]) {
        return;
    }
    let lab = lab("programs flood");
    let [hostile, good] = &lab.guests;
    let script = format!(
        "curl -sS -m 100 --limit-rate 2M http://{OUTSIDE}/{} | wc -c & sleep 0.5; \
         timeout {FLOOD} hping3 -q -S --flood -p 80 {BLACK_HOLE} >/dev/null 2>&1 || true; wait",
        6 << 20
    );
    thread::scope(|scope| {
        let flooding = scope.spawn(|| sh(&hostile.host, &script));
        thread::sleep(Duration::from_millis(1000));
        let several = (0..10).map(|_| get(30)).collect::<Vec<_>>().join("; ");
        assert_eq!(sh(&good.host, &several), "1000\n".repeat(10));
        let got = flooding.join().expect("the flood ends");
        assert_eq!(got.trim(), (6 << 20).to_string(), "the connection of the guest that floods");
    });
    let report = lab.end();
    let refused = report.counter("NAT half open limit") + report.counter("NAT new flow limit");
    assert!(refused > 100, "{refused} SYN were refused");
}

/// Handshakes that the guest resets leave nothing. Attempts to reach a black hole keep nobody from
/// connecting elsewhere.
#[test]
fn unfinished_handshakes_are_in_nobodys_way() {
    if !have(&["hping3", "curl"]) {
        return;
    }
    let lab = lab("programs handshakes");
    let [guest, _] = &lab.guests;
    // The guest's kernel knows nothing of these connections, and resets them.
    let script = format!("hping3 -q -S -c 300 -i u2500 -p 80 {OUTSIDE} 2>&1; {}", get(20));
    let said = sh(&guest.host, &script);
    assert!(said.trim_end().ends_with("\n1000"), "{said}");
    let script = format!(
        "for i in $(seq 10); do curl -s -m 60 http://{BLACK_HOLE}/ & done; sleep 0.5; {}; \
         kill $(jobs -p); wait || true",
        get(20)
    );
    let start = Instant::now();
    assert_eq!(sh(&guest.host, &script).trim(), "1000");
    // An attempt that stands in the way would take the 30 s after which the translator gives up.
    assert!(start.elapsed() < Duration::from_secs(25), "{:?}", start.elapsed());
    // More than a port may have half open: none has kept its place.
    assert!(lab.end().counter("NAT guest reset") >= 250);
}

/// Fragments, sources that are not the guest's, and destinations that no guest reaches are refused, and
/// counted by their reason.
#[test]
fn what_is_refused_is_counted() {
    if !have(&["hping3", "curl"]) {
        return;
    }
    let lab = lab("programs refused");
    // The network knows whose address this is.
    assert_eq!(sh(&lab.guests[1].host, &get(60)).trim(), "1000");
    assert_eq!(sh(&lab.guests[0].host, &get(60)).trim(), "1000");
    let listening = lab.world.host.run(|| {
        ip("address add 169.254.169.254/32 dev lo");
        let at = [HOST, "127.0.0.1", "169.254.169.254"];
        at.map(|address| {
            let listener = std::net::TcpListener::bind((address, 8000)).expect("a port");
            listener.set_nonblocking(true).expect("a socket");
            listener
        })
    });
    let hping =
        |options: &str| format!("hping3 -q -c 20 -i u1000 {options} >/dev/null 2>&1 || true; ");
    let script = [
        hping(&format!("-f -d 100 --udp -p 9 {OUTSIDE}")),
        hping(&format!("-S -a 10.9.9.9 -p 80 {OUTSIDE}")),
        hping(&format!("-S -a 192.168.64.3 -p 80 {OUTSIDE}")),
        hping(&format!("-S -a {GATEWAY} -p 80 {OUTSIDE}")),
        // A land attack.
        hping(&format!("-S -a {OUTSIDE} -s 80 -k -p 80 {OUTSIDE}")),
        hping("-S -p 8000 169.254.169.254"),
        hping(&format!("-S -p 8000 {HOST}")),
        hping(&format!("-S -p 22 {GATEWAY}")),
        hping("-S -p 80 192.168.64.77"),
        get(60),
    ];
    assert_eq!(sh(&lab.guests[0].host, &script.concat()).trim(), "1000");
    for listener in listening {
        let nobody = listener.accept().expect_err("no guest reaches it");
        assert_eq!(nobody.kind(), std::io::ErrorKind::WouldBlock);
    }
    let report = lab.end();
    let counters = &report.0["network"]["counters"];
    for name in [
        "NAT fragment",
        "NAT source outside",
        "NAT source taken",
        "NAT source gateway",
        "NAT denied link local",
        "NAT denied host",
    ] {
        assert!(report.counter(name) >= 20, "{name}: {counters:#}");
    }
}
