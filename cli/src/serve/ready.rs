//! The word that the server is ready, to whoever has started it: a service manager (sd_notify(3)), or
//! the reader of a descriptor (`--ready-fd`).

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use crate::failure::Failure;

/// Where the word goes, if anybody waits for it. The socket is connected at the start, because the
/// confinement forbids it later; that is why this is no crate, each of which connects when it tells.
#[derive(Debug, Default)]
pub(super) struct Ready {
    manager: Option<UnixDatagram>,
    reader: Option<File>,
}

impl Ready {
    /// The socket that the environment names, and the descriptor `fd`, which is inherited. It is called
    /// before anything else is opened, so that the number is not that of a descriptor of this process.
    ///
    /// A service manager that cannot be told is not waited for, and finds out by its own timeout.
    pub(super) fn from_environment(fd: Option<RawFd>) -> Result<Self, Failure> {
        let reader = fd.map(|fd| {
            super::listen::inherited(fd)
                .map(|fd: OwnedFd| File::from(fd))
                .map_err(|error| Failure::Usage(format!("--ready-fd {fd}: {error}")))
        });
        let reader = reader.transpose()?;
        let manager = std::env::var_os("NOTIFY_SOCKET").and_then(|name| connected(&name));
        Ok(Self { manager, reader })
    }

    /// Tells that guests can join. The reader of the descriptor gets a line, and then its end.
    pub(super) fn ready(&mut self) {
        self.tell_manager("READY=1");
        if let Some(mut reader) = self.reader.take() {
            // If it fails, nobody waits any more. A pipe has room for this.
            let _ = reader.write_all(b"READY=1\n");
        }
    }

    /// Tells that the server ends.
    pub(super) fn stopping(&self) {
        self.tell_manager("STOPPING=1");
    }

    fn tell_manager(&self, state: &str) {
        if let Some(socket) = &self.manager {
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
        let mut ready = Ready { manager: connected(path.as_os_str()), reader: None };
        std::fs::remove_file(&path).expect("the socket's name");
        ready.ready();
        let mut told = [0; 16];
        let len = waiting.recv(&mut told).expect("a word");
        assert_eq!(&told[..len], b"READY=1");
        assert!(connected(OsStr::new("/nonexistent/socket")).is_none());
        Ready::default().ready();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_word_arrives_at_an_abstract_name() {
        use std::os::linux::net::SocketAddrExt;
        let name = format!("vmring-ready-{}", std::process::id());
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("a name");
        let waiting = UnixDatagram::bind_addr(&address).expect("a socket");
        let manager = connected(OsStr::new(&format!("@{name}")));
        Ready { manager, reader: None }.stopping();
        let mut told = [0; 16];
        let len = waiting.recv(&mut told).expect("a word");
        assert_eq!(&told[..len], b"STOPPING=1");
    }
}
