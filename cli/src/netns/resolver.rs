//! The name server that the command finds: the gateway of its network.

use std::fs;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::Path;

use nix::mount::{MsFlags, mount};

/// Where programs look for their name server.
const FILE: &str = "/etc/resolv.conf";
const NOTHING: Option<&str> = None;

/// Keeps what is mounted in this namespace from being seen in others.
pub(super) fn detach() -> Result<(), String> {
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING)
        .map_err(|error| format!("detaching the mounts failed: {error}"))
}

/// Lets programs of this namespace ask `server`. The other settings of the machine stay.
pub(super) fn name(server: Ipv4Addr) -> Result<(), String> {
    // It is often a link, and what it leads to is what programs open.
    let Ok(target) = fs::canonicalize(FILE) else {
        let _ = writeln!(io::stderr(), "vmring: note: this machine has no {FILE}");
        return Ok(());
    };
    let failed = |error: &dyn std::fmt::Display| format!("replacing {FILE} failed: {error}");
    let before = fs::read_to_string(&target).unwrap_or_default();
    let own = std::env::temp_dir().join(format!("vmring-resolv-{}", std::process::id()));
    let written = write_new(&own, &with_server(&before, server));
    let mounted = written.map_err(|e| failed(&e)).and_then(|()| {
        mount(Some(&own), &target, NOTHING, MsFlags::MS_BIND, NOTHING).map_err(|e| failed(&e))
    });
    // The mount keeps what the file contains.
    let _ = fs::remove_file(&own);
    mounted
}

/// Writes a file that nobody has made before.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    fs::File::create_new(path)?.write_all(text.as_bytes())
}

/// The settings, with `server` as the only name server.
fn with_server(before: &str, server: Ipv4Addr) -> String {
    let others = before.lines().filter(|line| {
        let keyword = line.split_whitespace().next().unwrap_or_default();
        matches!(keyword, "search" | "domain" | "options")
    });
    let mut text = format!("nameserver {server}\n");
    for line in others {
        text.push_str(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_servers_are_replaced() {
        let before =
            "# by hand\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\nsearch lan\n";
        let after = with_server(before, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(after, "nameserver 10.0.0.1\noptions edns0\nsearch lan\n");
    }
}
