//! The way out of `vmring run-netns` over IPv6, and the tools for it.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::{World, answer, nobody, run};
use crate::host::ip;
use crate::{LIMIT, text};

/// The address of a server outside (RFC 3849), and that of the host.
const OUTSIDE: &str = "2001:db8:5::1";
const HOST: &str = "2001:db8:5::2";
/// The prefix of the command's network, and its gateway.
const PREFIX: &str = "fd12:3456:789a:1::/64";
const GATEWAY: &str = "fd12:3456:789a:1::1";
/// The command's address, which follows from the TAP's MAC address (RFC 4291, appendix A).
const OWN: &str = "fd12:3456:789a:1:6e:65ff:fe74:6e73";

impl World {
    /// A world with IPv6, or the reason why there is none.
    fn with_ipv6() -> Option<Self> {
        if !crate::tap::is_possible() {
            return None;
        }
        if !Path::new("/proc/sys/net/ipv6").exists() {
            eprintln!("skipped: this kernel has no IPv6");
            return None;
        }
        let world = Self::new();
        world.host.run(|| {
            let _ = std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
            ip(&format!("-6 address add {HOST}/64 dev w0 nodad"));
            ip(&format!("-6 route add default via {OUTSIDE}"));
        });
        world.outside.run(|| ip(&format!("-6 address add {OUTSIDE}/64 dev w1 nodad")));
        Some(world)
    }

    /// Runs a script as a command, and returns its lines.
    fn lines(&self, options: &[&str], script: &str) -> Vec<String> {
        let arguments = [&["--ipv6", PREFIX], options, &["--", "bash", "-c", script]].concat();
        let output = self.run_netns(&arguments);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{out}{err}");
        eprint!("{err}");
        out.lines().map(str::to_owned).collect()
    }
}

/// Whether a program is installed.
fn has(program: &str) -> bool {
    let script = format!("command -v {program}");
    let found = Command::new("sh").args(["-c", &script]).stdout(Stdio::null()).status();
    let is_there = found.is_ok_and(|status| status.success());
    if !is_there {
        eprintln!("skipped: there is no {program}");
    }
    is_there
}

/// A command has an address of the network's prefix when it starts, without any privilege.
#[test]
fn a_command_has_an_address_of_ipv6() {
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return eprintln!("skipped: this kernel has no IPv6");
    }
    let list = "cat /proc/net/if_inet6 | grep tap0; true";
    for (options, is_there) in [(&["--ipv6", PREFIX][..], true), (&["--no-ipv6"], false)] {
        let arguments = [options, &["--", "sh", "-c", list]].concat();
        let Some(output) = run(nobody(), &arguments) else { return };
        let out = text(&output.stdout);
        let has_address = out.contains("fd123456789a0001006e65fffe746e73");
        assert_eq!(has_address, is_there, "{out}{}", text(&output.stderr));
    }
}

/// curl and ping reach a server outside, and nothing else: neither the host, nor its loopback address by
/// way of the gateway's, nor what a rule denies.
#[test]
fn a_command_reaches_the_world_over_ipv6() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("curl") || !has("bash") || !has("ping") {
        return;
    }
    const LEN: usize = 3 << 20;
    // What is denied is there.
    let _denied = world.outside.run(|| TcpListener::bind((OUTSIDE, 8001)).expect("its port"));
    let _host = world.host.run(|| TcpListener::bind(("::", 8000)).expect("its port"));
    let listener = world.outside.run(|| TcpListener::bind((OUTSIDE, 80)).expect("its port"));
    let serving = world.outside.start(move || {
        let (stream, from) = listener.accept().expect("a client");
        answer(stream, &vec![b'x'; LEN]);
        from.ip().to_string()
    });
    let script = format!(
        "curl -6 -sS -m 100 'http://[{OUTSIDE}]/' | wc -c
         ping -6 -c 1 -W 20 {OUTSIDE} | grep -o ' 0% packet loss'
         ping -6 -c 1 -W 20 {GATEWAY} | grep -o ' 0% packet loss'
         for at in {OUTSIDE}/8001 {HOST}/8000 {GATEWAY}/8000 fd00:ec2::254/80 ::ffff:0:0/80; do
         if timeout 20 bash -c \"exec 3<>/dev/tcp/$at\" 2>/dev/null; then echo reached; \
         else echo refused; fi; done"
    );
    let lines = world.lines(&["--deny", "[2001:db8:5::]/48:8001"], &script);
    let length = LEN.to_string();
    let expected = [&length, " 0% packet loss", " 0% packet loss"];
    assert_eq!(lines[..3], expected);
    assert_eq!(lines[3..], ["refused"; 5]);
    assert_eq!(serving.recv_timeout(LIMIT).expect("the server has served"), HOST);
}

/// iperf3 goes both ways by TCP and out by UDP.
#[test]
fn iperf3_goes_all_ways_over_ipv6() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("iperf3") || !has("bash") {
        return;
    }
    // A server for each, because one may still read what its last client has sent.
    let ways = [("5201", ""), ("5202", "-R"), ("5203", "-u -b 20M -l 1400")];
    let mut servers = ways.map(|(port, _)| {
        let mut command = world.outside.command("iperf3");
        command.args(["-6", "-s", "-p", port]).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a server")
    });
    // A server may not listen yet.
    let script = ways.map(|(port, way)| {
        format!(
            "for i in $(seq 100); do said=$(iperf3 -6 -c {OUTSIDE} -p {port} -J -t 1 {way}) && break; \
             sleep 0.1; done; echo $said"
        )
    });
    let reports = world.lines(&[], &script.join("; "));
    for server in &mut servers {
        server.kill().and_then(|()| server.wait()).expect("it runs");
    }
    assert_eq!(reports.len(), ways.len(), "{reports:?}");
    for (report, (_, way)) in reports.iter().zip(ways) {
        let report: serde_json::Value = serde_json::from_str(report).expect("a report");
        let end = &report["end"];
        let sum = if way.contains("-u") { &end["sum"] } else { &end["sum_received"] };
        assert!(sum["bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{way}: {report:#}");
    }
}

/// A resolver outside that knows one address for all names.
fn resolve(query: &[u8]) -> Vec<u8> {
    // Behind the header and the question, there may be an option record, which is left out.
    let end = 12 + query[12..].iter().position(|&byte| byte == 0).expect("a name") + 5;
    let mut answer = query[..end].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[4..12].copy_from_slice(&[0, 1, 0, 1, 0, 0, 0, 0]);
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 53]);
    answer
}

/// dig gets answers from the gateway at its address of IPv6, over UDP and TCP, by way of a resolver of the
/// world over IPv4; and names of the network.
#[test]
fn a_command_asks_for_names_over_ipv6() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("dig") || !has("bash") {
        return;
    }
    let (udp, tcp) = world.outside.run(|| {
        let udp = UdpSocket::bind((super::OUTSIDE, 53)).expect("its port");
        (udp, TcpListener::bind((super::OUTSIDE, 53)).expect("its port"))
    });
    let serving = world.outside.start(move || {
        let over_udp = thread::spawn(move || {
            let mut buffer = [0; 512];
            let (len, from) = udp.recv_from(&mut buffer).expect("a query");
            udp.send_to(&resolve(&buffer[..len]), from).expect("the answer's way");
        });
        let (mut stream, _) = tcp.accept().expect("a client");
        let mut len = [0; 2];
        stream.read_exact(&mut len).expect("a length");
        let mut query = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut query).expect("a query");
        let answer = resolve(&query);
        let message = [&(answer.len() as u16).to_be_bytes()[..], &answer].concat();
        stream.write_all(&message).expect("the answer's way");
        over_udp.join().expect("the other one");
    });
    let dig = format!("dig +short +time=30 +tries=1 @{GATEWAY}");
    let script = format!(
        "{dig} www.example A; {dig} +tcp www.example A; {dig} host.internal AAAA; \
         {dig} gateway.internal AAAA; {dig} -x {GATEWAY}; {dig} host.internal A"
    );
    let lines = world.lines(&["--dns", super::OUTSIDE, "--host-port", "8000"], &script);
    let (v4, host) = ("192.0.2.53", "192.168.64.1");
    assert_eq!(lines, [v4, v4, GATEWAY, GATEWAY, "host.internal.", host]);
    serving.recv_timeout(LIMIT).expect("the resolver has answered both");
}

/// The tools that look at routers and neighbours (ndisc6) find what the gateway tells.
#[test]
fn the_tools_of_ipv6_find_the_gateway() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("bash") || !has("rdisc6") || !has("ndisc6") {
        return;
    }
    let script = format!("rdisc6 -1 -w 20000 tap0; ndisc6 -1 -w 20000 {GATEWAY} tap0");
    let told = world.lines(&[], &script).join("\n");
    for words in
        ["Router lifetime", "65535", PREFIX, "Recursive DNS server", GATEWAY, "65520", "link-layer"]
    {
        assert!(told.contains(words), "no {words} in {told}");
    }
}

/// dhcpcd asks for other information, as the advertisement's flag says, and is told the name server.
#[test]
fn a_client_of_dhcpv6_is_told_the_name_server() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("bash") || !has("dhcpcd") {
        return;
    }
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("run-netns-dhcpcd");
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = |name: &str| folder.join(name).display().to_string();
    let (script, told, config) = (path("script"), path("told"), path("config"));
    let text = format!("#!/bin/sh\necho \"$reason $new_dhcp6_name_servers\" >> {told}\n");
    std::fs::write(&script, text).expect("a script");
    std::fs::write(&config, "ipv6only\nnoipv4ll\noption dhcp6_name_servers\nduid ll\n")
        .expect("a file");
    let _ = std::fs::remove_file(&told);
    let run = format!(
        "chmod 755 {script}; timeout 60 dhcpcd -6 -B -f {config} -c {script} tap0 > {told}.log 2>&1 &
         for i in $(seq 500); do if grep -q INFORM6 {told}; then break; fi; sleep 0.1; done 2> /dev/null
         kill %1; cat {told}"
    );
    let lines = world.lines(&[], &run);
    let log = std::fs::read_to_string(format!("{told}.log")).unwrap_or_default();
    let _ = std::fs::remove_dir_all(&folder);
    let is_told = |line: &String| line.starts_with("INFORM6") && line.contains(GATEWAY);
    assert!(lines.iter().any(is_told), "{lines:?}\n{log}");
}

/// The command's default route comes with the host's, and goes with it.
#[test]
fn a_commands_default_route_follows_the_hosts() {
    let Some(world) = World::with_ipv6() else { return };
    if !has("bash") || !has("ping") {
        return;
    }
    let mark = format!("{}/run-netns-route-{}", env!("CARGO_TARGET_TMPDIR"), std::process::id());
    let _ = std::fs::remove_file(&mark);
    // A network that is used looks at the host's routes more often.
    let until = |what: &str| {
        format!(
            "for i in $(seq 400); do ping -c 1 -W 1 {} > /dev/null; \
             if {what} test -n \"$(ip -6 route show default)\"; then break; fi; sleep 0.1; done",
            super::OUTSIDE
        )
    };
    let script = format!(
        "ip -6 -o address show dev tap0 | grep -o {OWN}; {}; ip -6 route show default | wc -l; \
         touch {mark}; {}; ip -6 route show default | wc -l; \
         ping -6 -c 1 -W 60 {OUTSIDE} 2>&1 | grep -o unreachable",
        until(""),
        until("!")
    );
    thread::scope(|scope| {
        let command = scope.spawn(|| world.lines(&[], &script));
        let start = Instant::now();
        while !Path::new(&mark).exists() {
            assert!(start.elapsed() < LIMIT && !command.is_finished(), "there is no route");
            thread::sleep(Duration::from_millis(20));
        }
        world.host.run(|| ip("-6 route del default"));
        assert_eq!(command.join().expect("the command"), [OWN, "1", "0", "unreachable"]);
    });
    let _ = std::fs::remove_file(&mark);
}
