//! The word that the server is ready, to whoever has started it (sd_notify(3)).

use std::ffi::OsStr;
use std::os::unix::net::UnixDatagram;

/// Where the word goes, if anybody waits for it. The socket is connected at the start, because the
/// confinement forbids it later.
#[derive(Debug)]
pub(super) struct Ready(Option<UnixDatagram>);

impl Ready {
    /// The socket that the environment names. A service manager that cannot be told is not waited for,
    /// and finds out by its own timeout.
    pub(super) fn from_environment() -> Self {
        Self(std::env::var_os("NOTIFY_SOCKET").and_then(|name| connected(&name)))
    }

    /// Tells a state, like `READY=1`.
    pub(super) fn tell(&self, state: &str) {
        if let Some(socket) = &self.0 {
            // If it fails, nobody waits any more.
            let _ = socket.send(state.as_bytes());
        }
    }
}

fn connected(name: &OsStr) -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    #[cfg(target_os = "linux")]
    {
        use std::os::linux::net::SocketAddrExt;
        use std::os::unix::ffi::OsStrExt;
        use std::os::unix::net::SocketAddr;
        // A name in the abstract namespace of Linux is written with an @ for its first byte, 0.
        if let Some(name) = name.as_bytes().strip_prefix(b"@") {
            socket.connect_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()?;
            return Some(socket);
        }
    }
    socket.connect(name).ok()?;
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_arrives() {
        let path = std::env::temp_dir().join(format!("vmring-ready-{}", std::process::id()));
        let waiting = UnixDatagram::bind(&path).expect("a socket");
        let ready = Ready(connected(path.as_os_str()));
        std::fs::remove_file(&path).expect("the socket's name");
        ready.tell("READY=1");
        let mut told = [0; 16];
        let len = waiting.recv(&mut told).expect("a word");
        assert_eq!(&told[..len], b"READY=1");
        assert!(connected(OsStr::new("/nonexistent/socket")).is_none());
        Ready(None).tell("READY=1");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_word_arrives_at_an_abstract_name() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("vmring-ready-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let waiting = UnixDatagram::bind_addr(&address).expect("a socket");
        Ready(connected(OsStr::new(&format!("@{name}")))).tell("STOPPING=1");
        let mut told = [0; 16];
        let len = waiting.recv(&mut told).expect("a word");
        assert_eq!(&told[..len], b"STOPPING=1");
    }
}
