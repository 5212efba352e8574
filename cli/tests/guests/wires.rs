//! `vmring bridge` between real guests and `vmring serve` below them, each on a wire of its VMM's own.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::*;

/// Lets the programs that this one starts have a descriptor, and returns its number.
fn inherited(socket: &impl AsRawFd) -> RawFd {
    let number = socket.as_raw_fd();
    // SAFETY: the call takes numbers only.
    let set = unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    number
}

/// Goal: packets of 9,000 bytes pass whole between guests that have addresses, and TCP uses them.
fn transfer_long_packets(guests: [(&mut Running, &str); 2]) {
    let [(one, address), (other, other_address)] = guests;
    for guest in [&mut *one, &mut *other] {
        guest.sh("ip link set eth0 mtu 9000");
    }
    // They have the headers of IPv4 and ICMP.
    one.sh(&format!("ping -A -c 3 -W 20 -s 8972 {other_address}"));
    let sent = |guest: &mut Running| -> u64 {
        let packets = guest.sh("cat /sys/class/net/eth0/statistics/tx_packets");
        packets.trim().parse().expect("a number")
    };
    let before = sent(one);
    transfer([(one, address), (other, other_address)]);
    // 4 MiB are 2,900 packets of 1,500 bytes, or 469 of 9,000. The rest are acknowledgements.
    let packets = sent(one) - before;
    assert!(packets < 2_000, "{packets} packets are too many for long ones");
}

/// A guest of this kind on this wire, with an address, which has nobody to ask for one.
fn on_wire(guest: Guest, nic: Nic, address: &str) -> Running {
    let mut guest = guest.nic(nic).start();
    guest.sh(&format!("ip addr add {address}/24 dev eth0 && ip link set eth0 up"));
    guest
}

/// Makes an end of a bridge, and the network card of its guest.
type Wire<'a> = &'a dyn Fn(&Folder) -> (String, Nic);

/// Goal: two guests on two wires reach each other, with a transfer both ways whose digests agree.
fn meet(ends: [Wire<'_>; 2], engines: [Engine; 2]) {
    let [Some(first), Some(second)] = engines.map(guest) else { return };
    let folder = Folder::new();
    let [(one, one_nic), (other, other_nic)] = ends.map(|end| end(&folder));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    command.args(["bridge", &one, &other, "--json"]);
    let said = Folder::new();
    let file = |name| File::create(said.join(name)).expect("a file in a new folder");
    command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
    let mut bridge = Server { process: Process::start(&mut command, said) };
    until("the bridge says that both ends are joined", || {
        let said = bridge.said("stderr");
        assert!(bridge.process.ended().is_none(), "the bridge ends: {said}");
        said.contains("Ctrl-C ends it")
    });
    let (a, b) = ("10.9.0.1", "10.9.0.2");
    let mut one = on_wire(first, one_nic, a);
    let mut other = on_wire(second, other_nic, b);
    one.sh(&format!("ping -A -c 3 -W 10 {b}"));
    transfer([(&mut one, a), (&mut other, b)]);
    drop((one, other));
    let report = bridge.end();
    for way in report["ways"].as_array().expect("a list") {
        assert!(way["packets_written"].as_u64() > Some(1000), "{report}");
    }
    for end in report["ends"].as_array().expect("a list") {
        for reason in ["runt", "too big", "bad offload header", "other sender"] {
            assert_eq!(end["drops_by_reason"][reason].as_u64().unwrap_or(0), 0, "{report}");
        }
    }
}

#[test]
fn qemu_over_a_stream_meets_user_mode_linux_over_sequenced_packets() {
    let stream = |folder: &Folder| {
        let path = folder.join("a").display().to_string();
        let nic = format!("stream,server=off,addr.type=unix,addr.path={path}");
        (format!("qemu:{path}"), Nic::netdev(nic))
    };
    let bess = |folder: &Folder| {
        let path = folder.join("b").display().to_string();
        let nic = format!("transport=bess,dst={path},src={path}.own");
        (format!("bess:{path}"), Nic::vector(nic))
    };
    meet([&stream, &bess], [Engine::Qemu, Engine::Uml]);
}

#[test]
fn qemu_over_datagrams_meets_qemu_that_listens() {
    let dgram = |folder: &Folder| {
        let path = folder.join("a").display().to_string();
        let nic = format!(
            "dgram,local.type=unix,local.path={path}.vm,remote.type=unix,remote.path={path}"
        );
        (format!("qemu-dgram:{path}"), Nic::netdev(nic))
    };
    let server = |folder: &Folder| {
        let path = folder.join("b").display().to_string();
        let nic = format!("stream,server=on,addr.type=unix,addr.path={path}");
        (format!("qemu:{path},client"), Nic::netdev(nic))
    };
    meet([&dgram, &server], [Engine::Qemu, Engine::Qemu]);
}

/// Goal: one server gives leases to two guests on two wires, and they exchange what its digests agree on.
#[test]
fn one_server_joins_qemu_over_a_stream_and_user_mode_linux_over_sequenced_packets() {
    let [Some(first), Some(second)] = [Engine::Qemu, Engine::Uml].map(guest) else { return };
    let folder = Folder::new();
    let [a, b] = ["a", "b"].map(|name| folder.join(name).display().to_string());
    let listens = [format!("qemu:{a}"), format!("bess:{b}")];
    let server = Server::start(
        "embedded:lab",
        &[],
        &["--mtu", "9000", "--listen", &listens[0], "--listen", &listens[1]],
    );
    let stream = Nic::netdev(format!("stream,server=off,addr.type=unix,addr.path={a}"));
    let mut one = first.nic(stream).start();
    let mut other =
        second.nic(Nic::vector(format!("transport=bess,dst={b},src={b}.own,mtu=9000"))).start();
    let (address, other_address) = (join(&mut one), join(&mut other));
    transfer_long_packets([(&mut one, &address), (&mut other, &other_address)]);
    drop((one, other));
    let report = server.end();
    for socket in report["sockets"].as_array().expect("a list") {
        let counts = &socket["counts"];
        assert!(counts["tx_packets"].as_u64() > Some(400), "{report}");
        for name in ["rx_errors", "tx_errors", "tx_short", "tx_too_big"] {
            assert_eq!(counts[name].as_u64().unwrap_or(0), 0, "{report}");
        }
    }
}

/// Goal: the same for guests whose sockets are descriptors that the server and they have inherited.
#[test]
fn one_server_joins_guests_on_descriptors() {
    let [Some(first), Some(second)] = [Engine::Qemu, Engine::Uml].map(guest) else { return };
    let stream = UnixStream::pair().expect("sockets");
    let datagram = UnixDatagram::pair().expect("sockets");
    let listens = [
        format!("qemu:fd={}", inherited(&stream.0)),
        format!("qemu-dgram:fd={}", inherited(&datagram.0)),
    ];
    let server = Server::start(
        "embedded:lab",
        &[],
        &["--mtu", "9000", "--listen", &listens[0], "--listen", &listens[1]],
    );
    drop((stream.0, datagram.0));
    let qemu = Nic::netdev(format!("socket,fd={}", inherited(&stream.1)));
    let uml = Nic::vector(format!("transport=fd,fd={},mtu=9000", inherited(&datagram.1)));
    let mut one = first.nic(qemu).start();
    let mut other = second.nic(uml).start();
    drop((stream.1, datagram.1));
    let (address, other_address) = (join(&mut one), join(&mut other));
    transfer_long_packets([(&mut one, &address), (&mut other, &other_address)]);
    drop((one, other));
    assert_eq!(server.end()["ok"], true);
}

/// Goal: a server is killed and started again under running guests: QEMU that listens, QEMU that sends
/// datagrams, and user-mode Linux, which connects when its interface comes up. They go on with the
/// addresses that they have.
#[test]
fn a_server_is_started_again_under_guests_on_wires() {
    let engines = [Engine::Qemu, Engine::Qemu, Engine::Uml];
    let [Some(first), Some(second), Some(third)] = engines.map(guest) else { return };
    let folder = Folder::new();
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.join(name).display().to_string());
    let [connect, listen, bess] =
        [format!("qemu:{a}"), format!("qemu-dgram:{b}"), format!("bess:{c}")];
    let start = || {
        let sockets = ["--connect", &connect, "--listen", &listen, "--listen", &bess];
        Server::start("embedded:lab", &[], &[&["--mtu", "9000"], &sockets[..]].concat())
    };
    let server = start();
    let listens = Nic::netdev(format!("stream,server=on,addr.type=unix,addr.path={a}"));
    let sends = Nic::netdev(format!(
        "dgram,local.type=unix,local.path={b}.vm,remote.type=unix,remote.path={b}"
    ));
    let connects = Nic::vector(format!("transport=bess,dst={c},src={c}.own"));
    let mut one = first.nic(listens).start();
    let mut other = second.nic(sends).start();
    let mut last = third.nic(connects).start();
    let (address, other_address) = (join(&mut one), join(&mut other));
    join(&mut last);
    drop(server);
    let server = start();
    for guest in [&mut one, &mut other] {
        guest.sh(". /tmp/dhcp.eth0; ping -c 3 -i 0.2 -W 20 $router");
    }
    transfer_long_packets([(&mut one, &address), (&mut other, &other_address)]);
    // It binds its own path anew, and does not remove what is there.
    last.sh("ip link set eth0 down");
    std::fs::remove_file(format!("{c}.own")).expect("its socket");
    last.sh("ip link set eth0 up");
    last.sh(&format!("ping -A -c 3 -W 20 {address}"));
    drop((one, other, last));
    assert_eq!(server.end()["ok"], true);
}
