//! ssh and scp.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use super::*;

const PORT: u16 = 2222;
const LEN: usize = 16 << 20;

/// A server of SSH outside, with keys and settings of its own, and the options of a client for it.
fn serve(world: &World, folder: &Path) -> (Daemon, String) {
    let at = |name: &str| folder.join(name).display().to_string();
    for key in ["host", "user"] {
        let mut command = Command::new("ssh-keygen");
        command.args(["-q", "-t", "ed25519", "-N", "", "-f", &at(key)]);
        succeeded(&command.output().expect("ssh-keygen runs"));
    }
    fs::copy(folder.join("user.pub"), folder.join("authorized")).expect("a file");
    let host = fs::read_to_string(folder.join("host.pub")).expect("a key");
    fs::write(folder.join("known"), format!("[{OUTSIDE}]:{PORT} {host}")).expect("a file");
    // The folder is below one that others may write into, perhaps.
    let settings = format!(
        "Port {PORT}\nListenAddress {OUTSIDE}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\n\
         PasswordAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n\
         AllowTcpForwarding yes\nSubsystem sftp internal-sftp\n",
        at("host"),
        at("authorized"),
    );
    fs::write(folder.join("settings"), settings).expect("a file");
    // It is empty: sshd hides in it. A unit of systemd usually makes it.
    fs::create_dir_all("/run/sshd").expect("the folder of sshd");
    fs::set_permissions("/run/sshd", fs::Permissions::from_mode(0o755)).expect("its own folder");
    let program = find("sshd").expect("it was found before");
    let server = Daemon::start(world.outside.command(program).args(["-D", "-f", &at("settings")]));
    until_bound(&world.outside, "tcp", PORT);
    let options = format!(
        "-F none -i '{}' -o UserKnownHostsFile='{}' -o BatchMode=yes -o ConnectTimeout=60 \
         -o ServerAliveInterval=1",
        at("user"),
        at("known")
    );
    (server, options)
}

#[test]
fn ssh_and_scp_carry_files_both_ways_and_a_port() {
    if !have(&["ssh", "scp", "sshd", "ssh-keygen"]) {
        return;
    }
    let accounts = fs::read_to_string("/etc/shadow").unwrap_or_default();
    if accounts.lines().any(|line| line.starts_with("root:!")) {
        return skip("nobody may log in as root here");
    }
    let (world, folder) = (World::new(), crate::scratch("programs-ssh"));
    fs::write(folder.join("body"), content(LEN)).expect("a file");
    let (_server, options) = serve(&world, &folder);
    // A server that only ssh's own host reaches.
    let behind = world.outside.run(|| TcpListener::bind("127.0.0.1:9000").expect("a port"));
    let serving = thread::spawn(move || {
        let (mut stream, _) = behind.accept().expect("a client");
        // What is not read would make the end a reset.
        assert!(stream.read(&mut [0; 4096]).expect("a request") > 0);
        stream.write_all(&content(LEN)).expect("it is written");
    });
    let script = format!(
        "cd '{}'; scp -q -P {PORT} {options} body root@{OUTSIDE}:'{0}'/put; \
         scp -q -P {PORT} {options} root@{OUTSIDE}:'{0}'/put got; \
         ssh -n -p {PORT} {options} root@{OUTSIDE} cat \"'{0}'/body\" >piped; \
         ssh -p {PORT} {options} root@{OUTSIDE} 'sha256sum' <body >fed; \
         ssh -n -N -p {PORT} {options} -L 127.0.0.1:9001:127.0.0.1:9000 root@{OUTSIDE} & \
         for i in $(seq 600); do \
           if curl -sS -m 60 --http0.9 http://127.0.0.1:9001/ -o forwarded 2>/dev/null; then break; fi; \
           sleep 0.1; \
         done; kill $!",
        folder.display()
    );
    guest(&world, &[], &script);
    serving.join().expect("it is fetched");
    let wanted = digest(&folder.join("body"));
    for name in ["put", "got", "piped", "forwarded"] {
        assert_eq!(digest(&folder.join(name)), wanted, "{name}");
    }
    let fed = fs::read_to_string(folder.join("fed")).expect("a digest");
    assert!(fed.starts_with(&wanted), "{fed}");
    fs::remove_dir_all(folder).expect("the folder of the test");
}
