//! [`Carrier`]: what carries frames between two clients, on the second processor: `vmring serve`, or a
//! relay on a thread of this program.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::clients::set_buffers;
use super::load::{Load, Wire};
use super::relay::{self, Way};
use crate::clock::Processor;
use crate::common::pin;
use crate::net::check;
use crate::result::Result;
use crate::served::{Folder, Served, usage};

/// The contenders.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Method<'a> {
    /// The `vmring` command at this path.
    Serve(&'a Path),
    /// One call receives a frame, and one sends it.
    Relay,
    /// Two batched hops, and nothing else.
    Hops,
}

impl Method<'_> {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Serve(_) => "vmring serve",
            Self::Relay => "relay, a read and a write a frame",
            Self::Hops => "two raw batched hops",
        }
    }
}

/// See the [module](self).
pub(super) struct Carrier(Running);

enum Running {
    Served { server: Served, _folder: Folder },
    Thread(RelayThread),
}

impl Carrier {
    /// Starts it. Also returns the sockets of the two clients.
    pub(super) fn start(method: Method<'_>, load: Load) -> Result<(Self, [OwnedFd; 2])> {
        let way = match (method, load.wire) {
            (Method::Serve(program), _) => return serve(program, load),
            (Method::Hops, Wire::Stream) => Way::Bytes,
            (Method::Hops, Wire::Datagram) => Way::Batches,
            (Method::Relay, Wire::Stream) => Way::Frames,
            (Method::Relay, Wire::Datagram) => Way::Messages,
        };
        let pair = || -> Result<(OwnedFd, OwnedFd)> {
            Ok(match load.wire {
                Wire::Stream => UnixStream::pair().map(|(near, far)| (near.into(), far.into()))?,
                Wire::Datagram => {
                    UnixDatagram::pair().map(|(near, far)| (near.into(), far.into()))?
                }
            })
        };
        let [(a, client_a), (b, client_b)] = [pair()?, pair()?];
        let relay = RelayThread::start([a, b], way)?;
        Ok((Self(Running::Thread(relay)), [client_a, client_b]))
    }

    /// The processor time of all its threads.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        match &self.0 {
            Running::Served { server, .. } => {
                usage(server.process()).map(|(nanoseconds, _)| Duration::from_nanos(nanoseconds))
            }
            Running::Thread(relay) => Ok(relay.clock.time()),
        }
    }
}

fn serve(program: &Path, load: Load) -> Result<(Carrier, [OwnedFd; 2])> {
    let folder = Folder::new()?;
    let paths = folder.sockets();
    let kind = if load.wire == Wire::Stream { "qemu" } else { "qemu-dgram" };
    let header = if load.header { ",vnet_hdr" } else { "" };
    let listens = paths.each_ref().map(|at| format!("{kind}:{}{header}", at.display()));
    let arguments = ["serve", "--network", "embedded:performance"];
    let server = Served::start_with(program, &arguments, &listens, &folder)?;
    let mut clients = paths.iter().map(|path| -> Result<OwnedFd> {
        Ok(match load.wire {
            Wire::Stream => UnixStream::connect(path)?.into(),
            Wire::Datagram => {
                let socket = UnixDatagram::bind(path.with_extension("client"))?;
                socket.connect(path)?;
                socket.into()
            }
        })
    });
    let (Some(a), Some(b)) = (clients.next(), clients.next()) else {
        return Err("there are two sockets".into());
    };
    let sockets = [a?, b?];
    drop(clients);
    Ok((Carrier(Running::Served { server, _folder: folder }), sockets))
}

/// A relay on the second processor.
pub(super) struct RelayThread {
    pub(super) clock: Processor,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl RelayThread {
    pub(super) fn start(sockets: [OwnedFd; 2], way: Way) -> Result<Self> {
        sockets.iter().try_for_each(set_buffers)?;
        Self::start_after(move || Ok(sockets), way)
    }

    /// Starts it. Its thread waits for the sockets.
    pub(super) fn start_after(
        sockets: impl FnOnce() -> Result<[OwnedFd; 2]> + Send + 'static,
        way: Way,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let (told, clock) = mpsc::channel();
        let thread = thread::spawn(move || {
            pin(1);
            // Nobody waits for it any more if this fails.
            let _ = told.send(Processor::of_this_thread()?);
            relay::run(&sockets()?, way, &seen)
        });
        let clock = clock.recv().map_err(|_| "a relay does not start")?;
        Ok(Self { clock, stop, thread: Some(thread) })
    }
}

impl Drop for RelayThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(Ok(Err(error))) = self.thread.take().map(JoinHandle::join) {
            eprintln!("a relay has ended: {error}");
        }
    }
}

/// A socket of sequenced packets that listens at a path.
pub(super) fn listen(path: &Path) -> Result<OwnedFd> {
    // SAFETY: the call takes numbers only.
    let fd = check(unsafe {
        libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0)
    })?;
    // SAFETY: the system has just opened it, and nobody else knows its number.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: it consists of numbers, for which zero is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let path = path.as_os_str().as_encoded_bytes();
    if path.len() >= address.sun_path.len() {
        return Err("the path of a socket is too long".into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = *from as libc::c_char;
    }
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address has `len` bytes, which the call reads.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::listen(socket.as_raw_fd(), 1) })?;
    Ok(socket)
}

/// Waits for a connection.
pub(super) fn accept(listener: &OwnedFd) -> Result<OwnedFd> {
    let (fd, none) = (listener.as_raw_fd(), std::ptr::null_mut());
    // SAFETY: null addresses ask for none.
    let fd = check(unsafe { libc::accept4(fd, none, none.cast(), libc::SOCK_CLOEXEC) })?;
    // SAFETY: the system has just opened it, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
