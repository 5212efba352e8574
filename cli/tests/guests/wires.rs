//! `vmring bridge` between real guests, each on a wire of its VMM's own.

use super::*;

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
