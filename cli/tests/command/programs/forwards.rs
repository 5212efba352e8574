//! Ports of the host that lead to a guest.

use std::net::{TcpStream, UdpSocket};

use super::*;

/// curl reaches a guest's server by the host's loopback address, not by the host's other address. The guest
/// has sent nothing before.
#[test]
fn curl_reaches_a_guest_by_the_hosts_loopback_address_only() {
    if !have(&["curl", "python3"]) {
        return;
    }
    let (world, folder) = (World::new(), crate::scratch("programs forwards"));
    fs::write(folder.join("body"), content(4 << 20)).expect("a file");
    let script = format!(
        "cd '{}'; python3 -m http.server 80 >/dev/null 2>log & \
         while ! grep -q ':0050 00000000:0000 0A' /proc/net/tcp; do sleep 0.05; done; touch up; \
         python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
         s.bind((\"\", 7))\n\
         while True: s.sendto(*s.recvfrom(2000))' & \
         while ! [ -e done ]; do sleep 0.05; done; kill $(jobs -p)",
        folder.display()
    );
    let forwards = [
        "--forward=8080=192.168.64.2:80",
        "--forward=8081-8083=192.168.64.2:80",
        "--forward=0.0.0.0:8090=192.168.64.2:80",
    ];
    let datagrams = "--forward=7007=192.168.64.2:7,udp";
    let script = prepared(&script);
    let arguments = [&forwards[..], &[datagrams, "--", "bash", "-c", &script]].concat();
    let child = world.start_run_netns(&arguments);
    until_bound(&world.host, "tcp", 8080);
    until("the guest listens", || folder.join("up").exists());
    let get = |at: &str| format!("curl -sS -m 100 http://{at}/body | sha256sum | cut -d ' ' -f 1");
    let wanted = digest(&folder.join("body"));
    for at in ["127.0.0.1:8080", "127.0.0.1:8081"] {
        assert_eq!(sh(&world.host, &get(at)).trim(), wanted, "{at}");
    }
    // Neither the world nor the host itself reaches it by the host's other address.
    for host in [&world.outside, &world.host] {
        let refused = host.run(|| TcpStream::connect((HOST, 8080))).expect_err("nobody listens");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    // A forward at all addresses lets the world in, and the guest sees who comes. The host is the gateway.
    assert_eq!(sh(&world.outside, &get(&format!("{HOST}:8090"))).trim(), wanted);
    let log = fs::read_to_string(folder.join("log")).expect("the server's log");
    let from = |address: &str| log.lines().any(|line| line.starts_with(&format!("{address} - ")));
    assert!(from(OUTSIDE) && from(GATEWAY), "{log}");
    // A second network does not get a port that is in use, and says which.
    let second = world.run_netns(&[forwards[0], "--", "true"]);
    let said = text(&second.stderr);
    assert!(!second.status.success() && said.contains("port 8080 is in use"), "{said}");
    // UDP comes back. What is lost while the guest's program starts is sent again.
    world.host.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket.connect("127.0.0.1:7007").expect("it is connected");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let mut bytes = [0; 100];
        until("an echo", || {
            let sent = socket.send(b"are you there?");
            sent.is_ok()
                && socket.recv(&mut bytes).is_ok_and(|len| &bytes[..len] == b"are you there?")
        });
    });
    fs::write(folder.join("done"), "").expect("a file");
    succeeded(&ended(child, &arguments));
    // With its network, the port has gone.
    let refused = world.host.run(|| TcpStream::connect(("127.0.0.1", 8080)));
    assert_eq!(refused.expect_err("nobody listens").kind(), std::io::ErrorKind::ConnectionRefused);
}

/// Somebody without privileges gets a privileged port from nobody, and is told so.
#[test]
fn a_privileged_port_is_refused_by_a_sentence() {
    if !have(&["setpriv"]) {
        return;
    }
    let world = World::new();
    let mut command = world.host.command("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        env!("CARGO_BIN_EXE_vmring"),
    ]);
    command.args(["run-netns", "--forward", "80=192.168.64.2", "--", "true"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = ended(child.expect("setpriv starts"), &["setpriv"]);
    let said = text(&output.stderr);
    if said.contains("lets no user make")
        || said.contains("execute")
        || said.contains("/dev/net/tun")
    {
        return skip(said);
    }
    assert!(!output.status.success() && said.contains("may not listen at port 80"), "{said}");
}
