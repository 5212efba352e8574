//! Guests on the embedded network: leases, pings, and transfers with and without offload.

use super::*;

/// What a guest's device does about checksums and segmentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Offload {
    On,
    Off,
}

/// A guest on the network of the server, with its address. If the guest is to have offload, and the
/// server offers none, reports that the test is skipped.
fn joined(
    guest: Guest,
    engine: Engine,
    socket: &Path,
    offload: Offload,
) -> Option<(Running, String)> {
    let nic = Nic::vhost_user(socket);
    let nic = match (engine, offload) {
        // The device does not even offer it.
        (Engine::Qemu, Offload::Off) => nic.device(
            "csum=off,guest_csum=off,gso=off,host_tso4=off,host_tso6=off,host_ecn=off,\
             host_ufo=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off",
        ),
        _ => nic,
    };
    let mut guest = guest.nic(nic).start();
    if (engine, offload) == (Engine::Uml, Offload::Off) {
        // It has no options for the device. What it receives stays as it was negotiated.
        guest.sh("ethtool -K eth0 tx off sg off tso off gso off gro off");
    }
    let features = guest.sh("ethtool -k eth0");
    if offload == Offload::On && features.contains("tx-checksum-ip-generic: off [fixed]") {
        skip("the server offers no offload");
        return None;
    }
    let state = if offload == Offload::On { "on" } else { "off" };
    for feature in ["tx-checksumming", "tcp-segmentation-offload"] {
        let line = format!("{feature}: {state}");
        assert!(features.contains(&line), "{engine:?}: not {line}:\n{features}");
    }
    let address = join(&mut guest);
    Some((guest, address))
}

/// Two guests of these kinds get leases, ping the gateway and each other, and transfer bytes both
/// ways.
fn transfers(one: (Engine, Offload), other: (Engine, Offload)) {
    if !can_serve() {
        return;
    }
    let (Some(first), Some(second)) = (guest(one.0), guest(other.0)) else { return };
    let folder = Folder::new();
    let sockets = [folder.join("a"), folder.join("b")];
    let server = Server::start("embedded:lab", &[&sockets[0], &sockets[1]], &[]);
    let Some((mut a, address)) = joined(first, one.0, &sockets[0], one.1) else { return };
    let joined = joined(second, other.0, &sockets[1], other.1);
    let Some((mut b, other_address)) = joined else { return };
    b.sh(&format!("ping -c 3 -i 0.2 -W 5 {address}"));
    transfer([(&mut a, &address), (&mut b, &other_address)]);
    drop((a, b));
    let report = server.end();
    assert_eq!(report["ok"], true, "{report}");
}

#[test]
fn two_guests_transfer_with_offload() {
    transfers((Engine::Uml, Offload::On), (Engine::Uml, Offload::On));
}

#[test]
fn two_guests_transfer_without_offload() {
    transfers((Engine::Uml, Offload::Off), (Engine::Uml, Offload::Off));
}

/// Goal: what one guest leaves to its device is done for the other, which cannot take it.
#[test]
fn a_guest_with_offload_and_one_without_transfer() {
    transfers((Engine::Uml, Offload::On), (Engine::Qemu, Offload::Off));
}

#[test]
fn qemu_and_user_mode_linux_transfer_with_offload() {
    transfers((Engine::Qemu, Offload::On), (Engine::Uml, Offload::On));
}

/// Goal: packets of 9,000 bytes go whole between guests.
#[test]
fn guests_send_jumbo_frames() {
    if !can_serve() {
        return;
    }
    let (Some(first), Some(second)) = (guest(Engine::Uml), guest(Engine::Qemu)) else { return };
    let folder = Folder::new();
    let sockets = [folder.join("a"), folder.join("b")];
    let server = Server::start("embedded:lab", &[&sockets[0], &sockets[1]], &["--mtu", "9000"]);
    // Without offload each frame is one packet.
    let joined = |guest, engine, socket| {
        joined(guest, engine, socket, Offload::Off).expect("it needs nothing of the server")
    };
    let (mut a, a_address) = joined(first, Engine::Uml, &sockets[0]);
    let (mut b, b_address) = joined(second, Engine::Qemu, &sockets[1]);
    for guest in [&mut a, &mut b] {
        guest.sh("ip link set eth0 mtu 9000");
    }
    // With the headers of IPv4 and ICMP.
    b.sh(&format!("ping -c 3 -i 0.2 -W 5 -s 8972 {a_address}"));
    let packets = |guest: &mut Running| -> u64 {
        let packets = guest.sh("cat /sys/class/net/eth0/statistics/tx_packets");
        packets.trim().parse().expect("a number")
    };
    let before = packets(&mut b);
    transfer([(&mut a, &a_address), (&mut b, &b_address)]);
    // 4 MiB are 2,900 packets of 1,500 bytes, or 469 of 9,000. The rest are acknowledgements.
    let sent = packets(&mut b) - before;
    assert!(sent < 2_000, "{sent} packets are too many for long ones");
    drop((a, b));
    assert_eq!(server.end()["ok"], true);
}
