//! Guests of QEMU that the helpers start whose part the command takes.

use super::*;

const VMRING: &str = env!("CARGO_BIN_EXE_vmring");

/// Goal: the command line of socket_vmnet's users: a daemon, and a client that starts QEMU with the connection
/// as `-netdev socket,fd=3`. Two guests get addresses of the daemon's network, and exchange what its digests
/// agree on.
#[test]
fn socket_vmnet_client_starts_qemu_with_a_lease() {
    let [Some(first), Some(second)] = [Engine::Qemu, Engine::Qemu].map(guest) else { return };
    let folder = Folder::new();
    let socket = folder.join("socket_vmnet").display().to_string();
    let mut command = Command::new(VMRING);
    command.args(["socket_vmnet", "--vmnet-gateway=192.168.105.1", &socket]);
    command.env_remove("VMRING_NETWORK").env_remove("SUDO_UID").env_remove("SUDO_GID");
    let said = Folder::new();
    let file = |name| File::create(said.join(name)).expect("a file in a new folder");
    command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
    let mut daemon = Server { process: Process::start(&mut command, said) };
    until("the daemon has its network", || {
        let said = daemon.said("stderr");
        assert!(daemon.process.ended().is_none(), "the daemon ends: {said}");
        said.contains("vmnet_start_address: 192.168.105.1") && Path::new(&socket).exists()
    });
    let start = |guest: Guest| {
        let words = [VMRING, "socket_vmnet_client", &socket, "--"];
        guest.launched_by(words).nic(Nic::netdev("socket,fd=3")).start()
    };
    let (mut one, mut other) = (start(first), start(second));
    let (address, other_address) = (join(&mut one), join(&mut other));
    assert!(address.starts_with("192.168.105."), "{address}");
    transfer([(&mut one, &address), (&mut other, &other_address)]);
    drop((one, other));
    daemon.terminate();
    let status = daemon.process.wait(LIMIT).expect("the daemon ends in time");
    assert!(status.success(), "{status}: {}", daemon.said("stderr"));
}

/// Goal: the command line of vmnet-helper's users: `vmnet-run` starts QEMU with a socket as
/// `-netdev dgram,local.type=fd,local.str=4`, which gets a lease from the helper.
#[test]
fn vmnet_run_starts_qemu_with_a_lease() {
    let Some(guest) = guest(Engine::Qemu) else { return };
    let words = [VMRING, "vmnet-run", "--operation-mode", "shared", "--"];
    let nic = Nic::netdev("dgram,local.type=fd,local.str=4");
    let mut guest = guest.launched_by(words).nic(nic).start();
    let address = join(&mut guest);
    assert!(address.starts_with("192.168.64."), "{address}");
    assert!(guest.power_off().success());
}
