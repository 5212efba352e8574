//! The kernel's own TCP/IP stack as the demo's other guest: a thread with plain sockets, in the
//! network namespace of the thread that starts it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Ipv4Packet};

use super::guest::{Command, Guest, Pings, Received, Report, TCP_PORT, answer, request};
use super::limits::{
    ACCEPT_PATIENCE, CHUNK, CONNECT_TIMEOUT, CONTACT_TIMEOUT, PATIENCE, PING_TIMEOUT,
};
use crate::stream::Stream;

/// Starts the thread. Like a guest's, its reports carry `number`.
pub(crate) fn start(number: usize, reports: Sender<(usize, Report)>) -> io::Result<Guest> {
    Guest::on_thread("kernel".to_owned(), None, move |commands, progress| {
        let tell = |report| drop(reports.send((number, report)));
        Kernel { commands, progress, tell: &tell }.run();
    })
}

struct Kernel<'a> {
    commands: Receiver<Command>,
    progress: Arc<AtomicU64>,
    tell: &'a dyn Fn(Report),
}

impl Kernel<'_> {
    fn run(self) {
        while let Ok(command) = self.commands.recv() {
            let done = match command {
                Command::Quit => return,
                Command::Ping { target, count } => self.ping(target, count).map(Report::Pinged),
                Command::Receive { .. } => self.receive().map(Report::Received),
                Command::Send { target, bytes, stream, .. } => self.send(target, bytes, stream),
            };
            match done {
                Ok(report) => (self.tell)(report),
                Err(error) if error.kind() == ErrorKind::Interrupted => return,
                Err(error) => (self.tell)(Report::Failed(error.to_string())),
            }
        }
    }

    /// Retries `f` until it neither would block nor is interrupted. Returns
    /// [`ErrorKind::Interrupted`] if the thread is to end meanwhile.
    fn patiently<T>(&self, pause: Duration, mut f: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        loop {
            match f() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                done => return done,
            }
            // While it is busy, the only command that can come is the one to end.
            if self.commands.try_recv().is_ok() {
                return Err(ErrorKind::Interrupted.into());
            }
            thread::sleep(pause);
        }
    }

    fn receive(&self) -> io::Result<Received> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, TCP_PORT))?;
        listener.set_nonblocking(true)?;
        self.progress.store(0, Ordering::Relaxed);
        (self.tell)(Report::Listening);
        let (mut stream, _) = self.patiently(ACCEPT_PATIENCE, || listener.accept())?;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut hasher, mut bytes, mut finished) = (Sha256::new(), 0, Instant::now());
        let mut buffer = vec![0; CHUNK];
        loop {
            match self.patiently(Duration::ZERO, || stream.read(&mut buffer))? {
                0 => break,
                n => {
                    hasher.update(&buffer[..n]);
                    bytes += n as u64;
                    finished = Instant::now();
                    self.progress.store(bytes, Ordering::Relaxed);
                }
            }
        }
        Ok(Received { bytes, digest: hasher.finalize().into(), finished })
    }

    fn send(&self, target: Ipv4Addr, bytes: u64, mut data: Stream) -> io::Result<Report> {
        let started = Instant::now();
        let address = SocketAddrV4::new(target, TCP_PORT);
        let mut stream = TcpStream::connect_timeout(&address.into(), CONNECT_TIMEOUT)?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = vec![0; CHUNK];
        let mut left = bytes;
        while left > 0 {
            let n = left.min(CHUNK as u64) as usize;
            data.fill(&mut buffer[..n]);
            let mut rest = &buffer[..n];
            while !rest.is_empty() {
                let written = self.patiently(Duration::ZERO, || stream.write(rest))?;
                rest = &rest[written..];
            }
            left -= n as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        // The end of the stream says that everything has arrived.
        self.patiently(Duration::ZERO, || stream.read(&mut buffer))?;
        Ok(Report::Sent { started })
    }

    /// Pings as a guest does: one ping more than `count` makes contact, and does not count. Returns
    /// [`ErrorKind::Interrupted`] if the thread is to end meanwhile.
    fn ping(&self, target: Ipv4Addr, count: u32) -> io::Result<Pings> {
        let socket = icmp_socket()?;
        // A raw socket has no ports.
        socket.connect((target, 0))?;
        let mut pings = Pings::default();
        if echo(&socket, 0, CONTACT_TIMEOUT)?.is_none() {
            // The target does not answer at all.
            pings.sent = count;
            return Ok(pings);
        }
        for number in 1..=count {
            if self.commands.try_recv().is_ok() {
                return Err(ErrorKind::Interrupted.into());
            }
            pings.sent += 1;
            pings.round_trips.extend(echo(&socket, number as u16, PING_TIMEOUT)?);
        }
        Ok(pings)
    }
}

/// The round-trip time of one ping, if it is answered within `timeout`.
fn echo(socket: &UdpSocket, sequence: u16, timeout: Duration) -> io::Result<Option<Duration>> {
    let request = request(sequence);
    let mut packet = vec![0; request.buffer_len()];
    let checksums = ChecksumCapabilities::default();
    request.emit(&mut Icmpv4Packet::new_unchecked(&mut packet), &checksums);
    let sent = Instant::now();
    socket.send(&packet)?;
    let mut buffer = [0; 256];
    loop {
        let left = timeout.saturating_sub(sent.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut buffer) {
            // A raw socket also delivers the IP header.
            Ok(len) => {
                let packet = Ipv4Packet::new_checked(&buffer[..len]).ok();
                if packet.and_then(|packet| answer(packet.payload())) == Some(sequence) {
                    return Ok(Some(sent.elapsed()));
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A raw socket, as a `UdpSocket` because the calls of both are the same.
fn icmp_socket() -> io::Result<UdpSocket> {
    // SAFETY: all arguments are plain numbers.
    let fd = unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor has just been opened, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}
