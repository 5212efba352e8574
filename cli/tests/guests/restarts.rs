//! Guests that boot again, and a server that does.

use super::*;

/// Goal: the port of a guest that has gone serves the next one, whether it was shut down or killed,
/// and the same guest has the same address.
#[test]
fn a_guest_comes_back_twenty_times() {
    if !can_serve() {
        return;
    }
    let Some(guest) = guest(Engine::Uml) else { return };
    let folder = Folder::new();
    let socket = folder.join("socket");
    let server = Server::start("embedded:lab", &[&socket], &[]);
    let guest = guest.nic(Nic::vhost_user(&socket));
    let mut addresses = Vec::new();
    for boot in 0..20 {
        let mut running = guest.clone().start();
        addresses.push(join(&mut running));
        if boot % 2 == 0 {
            assert!(running.power_off().success());
        }
    }
    addresses.dedup();
    assert_eq!(addresses.len(), 1, "{addresses:?}");
    assert_eq!(server.end()["ok"], true);
}

/// Goal: the rings of a machine that is reset begin anew on the same connection. It is reset three times,
/// or as often as `VMRING_GUEST_RESETS` says: each boot of an emulated machine takes some seconds.
#[test]
fn a_guest_of_qemu_is_reset() {
    if !can_serve() {
        return;
    }
    let Some(guest) = guest(Engine::Qemu) else { return };
    let folder = Folder::new();
    let socket = folder.join("socket");
    let server = Server::start("embedded:lab", &[&socket], &[]);
    let mut running = guest.nic(Nic::vhost_user(&socket)).start();
    let address = join(&mut running);
    let resets = std::env::var("VMRING_GUEST_RESETS").map_or(3, |n| n.parse().expect("a number"));
    for _ in 0..resets {
        running.reset();
        assert_eq!(join(&mut running), address);
    }
    drop(running);
    assert_eq!(server.end()["ok"], true);
}

/// Goal: a server that is killed under two guests and starts again loses no byte of their
/// connection. QEMU connects again each second.
#[test]
fn a_killed_server_starts_again_under_its_guests() {
    if !can_serve() {
        return;
    }
    let Some(guest) = guest(Engine::Qemu) else { return };
    let folder = Folder::new();
    let sockets = [folder.join("a"), folder.join("b")];
    let serve = || Server::start("embedded:lab", &[&sockets[0], &sockets[1]], &[]);
    let mut server = serve();
    let start = |socket: &Path| {
        let mut guest = guest.clone().nic(Nic::vhost_user(socket).reconnects()).start();
        let address = join(&mut guest);
        (guest, address)
    };
    let ((mut a, _), (mut b, address)) = (start(&sockets[0]), start(&sockets[1]));
    // 4 MB in at least five seconds.
    let program = "#!/bin/sh\nprintf '\\n'\nfor part in $(seq 50); do
        seq $((part * 10000 + 1000000)) $((part * 10000 + 1009999)) | tee -a /tmp/sent
        sleep 0.1
        done\n";
    let folder = "/tmp/cgi-bin";
    b.sh(&format!("mkdir {folder}; cat >{folder}/slow <<'END'\n{program}END\n"));
    b.sh(&format!("chmod 755 {folder}/slow; httpd -p 80 -h /tmp"));
    let received = a.begin(&format!(
        "cd /tmp; wget -q -O in http://{address}/cgi-bin/slow &
        until [ -s in ] && [ $(stat -c %s in) -gt 800000 ]; do sleep 0.1; done
        echo under way; wait; wc -c <in; sha256sum <in"
    ));
    a.wait_for("under way", 0);
    server.process.kill();
    thread::sleep(Duration::from_secs(1));
    server = serve();
    let received = a.finish(&received).output;
    let sent = b.sh("wc -c </tmp/sent; sha256sum </tmp/sent");
    assert_eq!(received, format!("under way\n{sent}"));
    assert!(sent.starts_with("4000000\n"), "{sent}");
    // The gateway is there again too, and its leases are new.
    for guest in [&mut a, &mut b] {
        join(guest);
    }
    drop((a, b));
    assert_eq!(server.end()["ok"], true);
}
