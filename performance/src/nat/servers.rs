//! The servers outside. They are sockets of the world's namespace, and threads of this program.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::world::SERVERS;
use crate::net::Namespace;
use crate::result::Result;

/// The port of the echo servers.
const ECHO: u16 = 7;
/// The port of those that answer one request and close.
const ANSWER: u16 = 80;
/// The port of the listener whose connections the measurement takes.
const TAKEN: u16 = 5201;
/// The bytes of a request, and of its answer.
pub(super) const REQUEST: usize = 64;
/// How soon a server sees that it is to end.
const LOOK: i32 = 50;

/// The servers of one world.
pub(super) struct Servers {
    /// Its connections belong to whoever accepts them.
    pub(super) taken: TcpListener,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    pub(super) fn start(outside: &Namespace) -> Result<Self> {
        // A socket stays in the namespace in which it was made.
        let (taken, echo, answer) = outside.inside(|| {
            let listen = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port));
            let answer: std::result::Result<Vec<_>, _> =
                SERVERS.iter().map(|address| TcpListener::bind((*address, ANSWER))).collect();
            Ok((listen(TAKEN)?, listen(ECHO)?, answer?))
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let serve = |listener: TcpListener, with: fn(TcpStream)| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || serve(&listener, &stop, with))
        };
        threads.push(serve(echo, |stream| _ = thread::spawn(move || echo_bytes(stream))));
        threads.extend(answer.into_iter().map(|listener| serve(listener, answer_once)));
        Ok(Self { taken, stop, threads })
    }

    pub(super) fn echo(&self, server: usize) -> SocketAddrV4 {
        SocketAddrV4::new(SERVERS[server], ECHO)
    }

    pub(super) fn answer(&self, server: usize) -> SocketAddrV4 {
        SocketAddrV4::new(SERVERS[server], ANSWER)
    }

    pub(super) fn taken(&self, server: usize) -> SocketAddrV4 {
        SocketAddrV4::new(SERVERS[server], TAKEN)
    }

    /// The address of a server of datagrams, whose port the system chooses.
    pub(super) fn datagrams(&self, server: usize) -> SocketAddrV4 {
        SocketAddrV4::new(SERVERS[server], 0)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It panicked, if it returns an error. That was printed.
            let _ = thread.join();
        }
    }
}

/// Serves one connection after another until it is to stop.
fn serve(listener: &TcpListener, stop: &AtomicBool, with: fn(TcpStream)) {
    while !stop.load(Ordering::Relaxed) {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: poll reads and writes one pollfd, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, LOOK) } > 0
            && let Ok((stream, _)) = listener.accept()
        {
            with(stream);
        }
    }
}

/// Gives each byte back.
fn echo_bytes(mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let mut bytes = [0; 512];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) if stream.write_all(&bytes[..count]).is_ok() => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// Reads a request, answers it, and waits for the client to close.
fn answer_once(mut stream: TcpStream) {
    let mut bytes = [0; REQUEST];
    // A client that does not close has failed, and says so.
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    if stream.read_exact(&mut bytes).is_ok() && stream.write_all(&bytes).is_ok() {
        let _ = stream.read(&mut bytes);
    }
}
