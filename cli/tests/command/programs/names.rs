//! dig asks the gateway, and dnsmasq answers outside.

use std::net::{TcpListener, UdpSocket};

use super::*;

/// A second address of the world outside.
const OTHER: &str = "203.0.113.9";

/// A resolver outside, at this address. It knows a few names of `example.test`, and no other.
fn resolver(world: &World, at: &'static str, name: &str) -> Daemon {
    let long = (0..30).map(|n| format!("--txt-record=long.example.test,\"{n:0100}\""));
    let mut command = world.outside.command(find("dnsmasq").expect("it was found before"));
    command.args([
        "-k",
        "-C",
        "/dev/null",
        "--pid-file=",
        "--user=root",
        "--no-resolv",
        "--no-hosts",
    ]);
    command.args(["--bind-interfaces", "--cache-size=0", "--edns-packet-max=4096"]);
    command.args(["--local=/test/", &format!("--listen-address={at}")]);
    command.arg("--host-record=www.example.test,192.0.2.7,2001:db8::7");
    command.arg(format!("--txt-record=who.example.test,{name}"));
    // Names of somebody who wants guests to reach the host.
    command.arg(format!("--host-record=host.rebound.test,{HOST}"));
    command.arg("--host-record=metadata.rebound.test,169.254.169.254");
    let resolver = Daemon::start(command.args(long));
    until_answered(world, at);
    resolver
}

/// Waits until a resolver answers outside.
fn until_answered(world: &World, at: &str) {
    let ask = format!("dig +short +tries=1 +time=1 @{at} who.example.test TXT");
    until("the resolver answers", || run_in(&world.outside, &ask).stdout.starts_with(b"\""));
}

fn add_address(world: &World) {
    world.outside.run(|| crate::host::ip(&format!("address add {OTHER}/24 dev w1")));
}

#[test]
fn dig_asks_for_all_kinds_of_records() {
    if !have(&["dig", "dnsmasq"]) {
        return;
    }
    let world = World::new();
    let _resolver = resolver(&world, OUTSIDE, "first");
    let script = format!(
        "short() {{ dig +short +time=20 @{GATEWAY} \"$@\"; }}; \
         short www.example.test A; short www.example.test AAAA; short who.example.test TXT; \
         short +tcp www.example.test A; short host.internal A; \
         short +bufsize=4096 +notcp +ignore long.example.test TXT | wc -l; \
         short +bufsize=512 long.example.test TXT | wc -l; \
         dig +bufsize=512 +ignore @{GATEWAY} long.example.test TXT | grep -c 'flags:.* tc '; \
         dig @{GATEWAY} nobody.example.test | grep -o 'status: [A-Z]*'; \
         dig @{GATEWAY} host.internal AAAA | grep -o 'status: [A-Z]*'; \
         getent ahostsv4 www.example.test | head -n 1 | cut -d ' ' -f 1"
    );
    let said = guest(&world, &["--dns", OUTSIDE], &script);
    let wanted = [
        "192.0.2.7",
        "2001:db8::7",
        "\"first\"",
        "192.0.2.7",
        GATEWAY,
        "30",
        "30",
        "1",
        "status: NXDOMAIN",
        "status: NOERROR",
        "192.0.2.7",
    ];
    assert_eq!(said.lines().collect::<Vec<_>>(), wanted);
}

/// A resolver that has ended is passed over. Without another one, the guest is told so at once.
#[test]
fn dig_is_answered_although_a_resolver_has_ended() {
    if !have(&["dig", "dnsmasq"]) {
        return;
    }
    let world = World::new();
    add_address(&world);
    let (first, second) = (resolver(&world, OUTSIDE, "first"), resolver(&world, OTHER, "second"));
    let folder = crate::scratch("programs resolvers");
    let script = format!(
        "cd '{}'; ask() {{ dig +tries=1 +time=30 @{GATEWAY} who.example.test TXT; }}; \
         ask >1; touch asked; while ! [ -e killed ]; do sleep 0.05; done; \
         for i in $(seq 20); do ask >2 || true; if grep -q second 2; then break; fi; done; touch again; \
         while ! [ -e none ]; do sleep 0.05; done; ask >3 || true",
        folder.display()
    );
    let arguments = ["--dns", OUTSIDE, "--dns", OTHER, "--", "bash", "-c", &prepared(&script)];
    let child = world.start_run_netns(&arguments);
    let is_there = |name: &str| folder.join(name).exists();
    until("the first answer", || is_there("asked"));
    drop(first);
    fs::write(folder.join("killed"), "").expect("a file");
    until("the second answer", || is_there("again"));
    drop(second);
    fs::write(folder.join("none"), "").expect("a file");
    succeeded(&ended(child, &arguments));
    let answer = |name: &str| fs::read_to_string(folder.join(name)).expect("an answer");
    // A query that finds a resolver gone has failed. The next one goes to the other resolver.
    for (name, words) in [("1", "\"first\""), ("2", "\"second\""), ("3", "status: SERVFAIL")] {
        assert!(answer(name).contains(words), "{}", answer(name));
    }
}

/// The host's own resolvers are asked, and others when the host's file names others.
#[test]
fn dig_asks_the_resolvers_that_the_host_has_now() {
    if !have(&["dig", "dnsmasq", "unshare", "mount"]) {
        return;
    }
    if !Path::new("/etc/resolv.conf").exists() {
        return skip("this machine has no /etc/resolv.conf");
    }
    let world = World::new();
    add_address(&world);
    let _resolvers = [resolver(&world, OUTSIDE, "first"), resolver(&world, OTHER, "second")];
    let folder = crate::scratch("programs resolv.conf");
    let file = folder.join("resolv.conf");
    fs::write(&file, format!("nameserver {OUTSIDE}\n")).expect("a file");
    let ask = format!("dig +short @{GATEWAY} who.example.test TXT");
    let script = format!(
        "{ask}; echo 'nameserver {OTHER}' >'{}'; \
         for i in $(seq 100); do [ \"$({ask})\" = '\"second\"' ] && break; sleep 0.2; done; {ask}",
        file.display()
    );
    // The file is another one in the mounts of this command only.
    let outer = format!(
        "mount --bind '{}' \"$(readlink -f /etc/resolv.conf)\"; exec '{}' run-netns -- bash -c \"$1\"",
        file.display(),
        env!("CARGO_BIN_EXE_vmring")
    );
    let mut command = world.host.command("unshare");
    command.args(["-m", "bash", "-c", &prepared(&outer), "sh", &prepared(&script)]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let said = succeeded(&ended(child.expect("unshare starts"), &["unshare"]));
    assert_eq!(said.lines().collect::<Vec<_>>(), ["\"first\"", "\"second\""]);
}

/// What a name leads to is decided when a guest connects, whoever has answered (DNS rebinding).
#[test]
fn a_name_that_leads_to_the_host_leads_nowhere() {
    if !have(&["dig", "dnsmasq", "curl"]) {
        return;
    }
    let world = World::new();
    let _resolver = resolver(&world, OUTSIDE, "first");
    let listener = world.host.run(|| TcpListener::bind(("0.0.0.0", 8000)).expect("its port"));
    listener.set_nonblocking(true).expect("a socket");
    let script = format!(
        "dig +short @{GATEWAY} host.rebound.test; \
         for name in host metadata; do \
           curl -s -m 60 http://$name.rebound.test:8000/ && echo reached || echo refused; \
         done"
    );
    let said = guest(&world, &["--dns", OUTSIDE], &script);
    assert_eq!(said.lines().collect::<Vec<_>>(), [HOST, "refused", "refused"]);
    assert_eq!(listener.accept().expect_err("nobody").kind(), std::io::ErrorKind::WouldBlock);
}

/// A guest that asks much is told that it waits for too many answers, and asks again later.
#[test]
fn a_thousand_questions_at_once_are_bounded() {
    if !have(&["dig", "dnsmasq", "python3"]) {
        return;
    }
    let world = World::new();
    add_address(&world);
    // This one is silent.
    let silent = world.outside.run(|| UdpSocket::bind((OTHER, 53)).expect("its port"));
    let script = format!(
        "python3 -c '{}' {GATEWAY}",
        "import socket, sys, time\n\
         s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.connect((sys.argv[1], 53))\n\
         s.settimeout(1)\n\
         codes = {}\n\
         for n in range(1000):\n\
         \x20   q = n.to_bytes(2, \"big\") + bytes([1, 0, 0, 1, 0, 0, 0, 0, 0, 0])\n\
         \x20   s.send(q + b\"\\x04name\\x04test\\x00\\x00\\x01\\x00\\x01\")\n\
         \x20   if n % 20 == 19: time.sleep(0.01)\n\
         try:\n\
         \x20   while True:\n\
         \x20       code = s.recv(2000)[3] & 15\n\
         \x20       codes[code] = codes.get(code, 0) + 1\n\
         except socket.timeout: pass\n\
         print(sorted(codes), codes.get(2, 0))"
    );
    let said = guest(&world, &["--dns", OTHER], &script);
    // 192 of a port wait. The others are refused, apart from what the guest itself loses.
    let refused: u32 = said.trim().strip_prefix("[2] ").expect(&said).parse().expect("a number");
    assert!((20..=1000 - 192).contains(&refused), "{refused}");
    drop(silent);
}
