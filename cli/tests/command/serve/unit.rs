//! The units for systemd and the file for launchd: they are valid, and a server runs as they say.

use std::os::unix::process::CommandExt;

use super::guest::{Guest, mac};
use super::*;

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/systemd/vmring-serve@.service");

fn unit() -> String {
    std::fs::read_to_string(UNIT).expect("the unit")
}

#[test]
fn the_unit_is_valid() {
    let folder = scratch("serve unit");
    // The program has to be there.
    let unit = unit().replace("/usr/bin/vmring", env!("CARGO_BIN_EXE_vmring"));
    let file = folder.join("vmring-serve@.service");
    std::fs::write(&file, unit).expect("a file");
    let verified = match Command::new("systemd-analyze").arg("verify").arg(&file).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("skipped: systemd-analyze: {error}"),
    };
    // The same holds for the socket, which starts the service beside it.
    let socket = folder.join("vmring-serve@.socket");
    let there = std::fs::read_to_string(UNIT.replace(".service", ".socket")).expect("the unit");
    std::fs::write(&socket, there).expect("a file");
    let of_socket = Command::new("systemd-analyze").arg("verify").arg(&socket).output();
    let of_socket = of_socket.expect("it ran just now");
    let said = [text(&verified.stderr), text(&of_socket.stderr)].concat();
    assert!(of_socket.status.success(), "{said}");
    // It may say something of other units of the machine.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("vmring")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{said}");
}

/// Goal: a server works without capabilities from its start on, and where memory that can be written
/// never becomes executable (`MemoryDenyWriteExecute=`, which newer kernels have without a filter).
#[test]
fn a_server_runs_as_its_unit_says() {
    let unit = unit();
    for line in ["CapabilityBoundingSet=", "MemoryDenyWriteExecute=yes", "Type=notify"] {
        assert!(unit.lines().any(|own| own == line), "no {line}");
    }
    // PR_SET_MDWE and PR_MDWE_REFUSE_EXEC_GAIN of the kernel's `linux/prctl.h`.
    const DENY: (libc::c_int, libc::c_ulong) = (65, 1);
    let folder = scratch("serve as unit");
    let (a, b) = (folder.join("a.sock"), folder.join("b.sock"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    // SAFETY: prctl(2) is safe to call between fork and exec, and touches no memory.
    unsafe {
        command.pre_exec(|| {
            for capability in 0..64 {
                // A user who is not root has no capability to lose.
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
            // An older kernel does not have it.
            libc::prctl(DENY.0, DENY.1, 0, 0, 0);
            Ok(())
        })
    };
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--listen"];
    let (one, two) = (listen(&a), listen(&b));
    let arguments = [&arguments[..], &[&one, "--listen", &two]].concat();
    let server = Server::of(command.args(&arguments), &arguments);
    let (mut one, mut two) = (Guest::new(&a, mac(1)), Guest::new(&b, mac(2)));
    exchange(&mut one, &mut two, 0..10);
    let report = server.report("TERM");
    for part in PARTS {
        assert_eq!(report["sandbox"][part]["complete"], true, "{report:#}");
    }
}

/// Goal: a socket without a folder, the leases and the captures are where the unit lets the server write.
#[test]
fn names_are_where_the_unit_lets_a_server_write() {
    let unit = unit();
    for line in [
        "ProtectSystem=strict",
        "RuntimeDirectory=vmring-%i",
        "Environment=XDG_RUNTIME_DIR=%t/vmring-%i",
        "StateDirectory=vmring-%i",
        "WorkingDirectory=%S/vmring-%i",
    ] {
        assert!(unit.lines().any(|own| own == line), "no {line}");
    }
    let folder = scratch("serve unit names");
    let [runtime, state] = ["run", "lib"].map(|name| folder.join(name));
    for folder in [&runtime, &state] {
        std::fs::create_dir(folder).expect("a folder");
    }
    let listen = "vhost-user:vm0,capture=vm0.pcapng";
    let arguments = ["serve", "--json", "--network", "embedded:lab", "--lease-file", "leases"];
    let arguments = [&arguments[..], &["--listen", listen]].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    command.args(&arguments).env("XDG_RUNTIME_DIR", &runtime).current_dir(&state);
    let server = Server::of(&mut command, &arguments);
    let mut guest = Guest::new(&runtime.join("vmring/vm0"), mac(1));
    guest.post(16);
    guest.lease();
    drop(guest);
    server.report("TERM");
    for (name, least) in [("leases", 30), ("vm0.pcapng", 300)] {
        let len = state.join(name).metadata().expect(name).len();
        assert!(len > least, "{name} has {len} bytes");
    }
}

/// The file for launchd is a property list, and its command line is one that the command takes.
#[test]
fn the_file_for_launchd_is_valid() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../contrib/launchd/org.vmring.serve.plist");
    let print =
        "import json, plistlib, sys; print(json.dumps(plistlib.load(open(sys.argv[1], 'rb'))))";
    let read = match Command::new("python3").args(["-c", print, file]).output() {
        Ok(read) => read,
        Err(error) => return eprintln!("skipped: python3: {error}"),
    };
    assert!(read.status.success(), "{}", text(&read.stderr));
    let list: Value = serde_json::from_slice(&read.stdout).expect("a dictionary");
    assert_eq!(list["Umask"], 0o077);
    let arguments: Vec<_> = list["ProgramArguments"].as_array().expect("a list")[1..]
        .iter()
        .map(|word| word.as_str().expect("a word").replace("vmnet:shared", "embedded:lab"))
        .map(|word| word.replace("/Users/USER", "/nonexistent"))
        .collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    // Everything is in order but the user, who has another name.
    assert!(refused(&arguments).contains("there is no user 'USER'"));
}
