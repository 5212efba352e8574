//! Counters for a monitoring system (`--metrics`): the text form of Prometheus, over HTTP, on a loopback
//! address or a socket of the Unix domain.
//!
//! A thread of its own answers one scraper after the other. It has nothing to do with packets, and a
//! scraper that says nothing or reads nothing loses its connection after [`PATIENCE`]. Further ones wait
//! in the kernel's queue, which is bounded.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use vmring_virtio::vhost_user::Listener;

use crate::failure::Failure;
use crate::system;

/// How long an exchange may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest request.
const REQUEST_MAX: usize = 8 * 1024;

/// Where the counters are, as the command line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MetricsSpec {
    Address(SocketAddr),
    Path(PathBuf),
}

impl FromStr for MetricsSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            format!("'{text}' {why}; use one like 127.0.0.1:9464, [::1]:9464 or unix:PATH")
        };
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(wrong("has no path")),
                path => Ok(Self::Path(path.into())),
            };
        }
        let address = match text.strip_prefix("localhost:") {
            Some(port) => {
                let port = port.parse().map_err(|_| wrong("has no port"))?;
                SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
            }
            None => text.parse().map_err(|_| wrong("is no address with a port"))?,
        };
        match address.ip().is_loopback() {
            true => Ok(Self::Address(address)),
            false => Err(wrong("is an address that others can reach")),
        }
    }
}

/// The socket that scrapers connect to.
#[derive(Debug)]
pub(super) enum Metrics {
    Tcp(TcpListener),
    Unix(Listener, PathBuf),
}

impl Metrics {
    pub(super) fn open(spec: &MetricsSpec) -> Result<Self, Failure> {
        match spec {
            MetricsSpec::Address(address) => {
                let bound = TcpListener::bind(address)
                    .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
                let failed = |error| Failure::Step(format!("--metrics {address}: {error}"));
                bound.map(Self::Tcp).map_err(failed)
            }
            MetricsSpec::Path(path) => match Listener::bind(path) {
                Ok(socket) => Ok(Self::Unix(socket, path.clone())),
                Err(error) => {
                    let sentence = format!("--metrics unix:{}: {error}", path.display());
                    Err(match error.kind() {
                        ErrorKind::AddrInUse | ErrorKind::TimedOut => Failure::Step(sentence),
                        _ => Failure::Usage(sentence),
                    })
                }
            },
        }
    }

    /// The path of its socket, if it has one.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::Unix(_, path) => Some(path),
            Self::Tcp(_) => None,
        }
    }

    fn accept(&self) -> io::Result<Option<Scraper>> {
        match self {
            Self::Unix(socket, _) => socket.accept()?.map(Scraper::unix).transpose(),
            Self::Tcp(socket) => match socket.accept() {
                Ok((stream, _)) => Scraper::tcp(stream).map(Some),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::ConnectionAborted => Ok(None),
                    _ => Err(error),
                },
            },
        }
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket, _) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }

    /// Answers scrapers with what `text` gives, until the other end of `stop` is closed or `text` gives
    /// nothing. Removes the file of its socket then.
    pub(super) fn run(self, stop: &UnixStream, text: impl Fn() -> Option<String>) {
        while !stopped(stop, self.descriptor(), libc::POLLIN, None) {
            match self.accept() {
                // What goes wrong with a scraper is the scraper's own business.
                Ok(Some(mut scraper)) => {
                    if let Err(Ended) = scraper.serve(stop, &text) {
                        return;
                    }
                }
                Ok(None) => {}
                // The limit of open files is reached, for example.
                Err(_) => {
                    if stopped(stop, stop.as_fd(), 0, Some(Instant::now() + PATIENCE)) {
                        return;
                    }
                }
            }
        }
    }
}

impl fmt::Display for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(_, path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(socket) => match socket.local_addr() {
                Ok(address) => write!(f, "http://{address}/metrics"),
                Err(error) => write!(f, "an unknown address: {error}"),
            },
        }
    }
}

/// The server ends.
struct Ended;

/// Waits until `fd` is ready or `stop` is closed, and no longer than `until`. Returns whether `stop` is
/// closed.
fn stopped(stop: &UnixStream, fd: BorrowedFd<'_>, events: i16, until: Option<Instant>) -> bool {
    let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
    let mut polls = [poll(stop.as_raw_fd(), libc::POLLIN), poll(fd.as_raw_fd(), events)];
    if events == 0 {
        polls[1].fd = -1;
    }
    // Rounded up, so that a short sleep does not become a busy loop.
    let millis = until.map_or(-1, |at| {
        let left = at.saturating_duration_since(Instant::now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    system::poll(&mut polls, millis);
    polls[0].revents != 0
}

/// A connection, which does not wait.
struct Scraper {
    stream: Box<dyn Exchange>,
    until: Instant,
}

trait Exchange: Read + Write + AsFd {}
impl<T: Read + Write + AsFd> Exchange for T {}

impl Scraper {
    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: Box::new(stream), until: Instant::now() + PATIENCE })
    }

    fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream: Box::new(stream), until: Instant::now() + PATIENCE })
    }

    /// Reads a request and answers it.
    fn serve(&mut self, stop: &UnixStream, text: impl Fn() -> Option<String>) -> Result<(), Ended> {
        let mut request = Vec::new();
        while !request.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut piece = [0; 1024];
            let read = self.wait(stop, libc::POLLIN, |stream| stream.read(&mut piece))?;
            let Some(len) = read.filter(|len| *len > 0) else { return Ok(()) };
            request.extend_from_slice(&piece[..len]);
            if request.len() > REQUEST_MAX {
                return Ok(());
            }
        }
        let answer = match refusal(&request) {
            None => answer("200 OK", &text().ok_or(Ended)?),
            Some((status, body)) => answer(status, body),
        };
        let mut left = answer.as_bytes();
        while !left.is_empty() {
            match self.wait(stop, libc::POLLOUT, |stream| stream.write(left))? {
                Some(len) if len > 0 => left = &left[len..],
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Waits until this does something. `None` if it fails, or the time is over.
    fn wait(
        &mut self,
        stop: &UnixStream,
        events: i16,
        mut f: impl FnMut(&mut dyn Exchange) -> io::Result<usize>,
    ) -> Result<Option<usize>, Ended> {
        while Instant::now() < self.until {
            match f(&mut *self.stream) {
                Ok(len) => return Ok(Some(len)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Ok(None),
            }
            if stopped(stop, self.stream.as_fd(), events, Some(self.until)) {
                return Err(Ended);
            }
        }
        Ok(None)
    }
}

/// What is wrong with a request for the counters: a status, and a sentence.
fn refusal(request: &[u8]) -> Option<(&'static str, &'static str)> {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, path, version) = (words.next()?, words.next(), words.next());
    let path = path.map(|path| path.split(|byte| *byte == b'?').next().unwrap_or_default());
    if !version.is_some_and(|version| version.starts_with(b"HTTP/1.")) {
        return Some(("400 Bad Request", "this is no request of HTTP/1.1\n"));
    }
    match (method, path) {
        (b"GET", Some(b"/metrics")) => None,
        (b"GET", _) => Some(("404 Not Found", "the counters are at /metrics\n")),
        _ => Some(("405 Method Not Allowed", "the counters are read with GET\n")),
    }
}

fn answer(status: &str, body: &str) -> String {
    // "text/plain; version=0.0.4" is Prometheus's text exposition format.
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_for_this_machine_alone() {
        for (text, address) in [
            ("127.0.0.1:9464", "127.0.0.1:9464"),
            ("[::1]:1", "[::1]:1"),
            ("127.9.9.9:0", "127.9.9.9:0"),
            ("localhost:80", "127.0.0.1:80"),
        ] {
            let address = address.parse().expect(address);
            assert_eq!(text.parse(), Ok(MetricsSpec::Address(address)));
        }
        assert_eq!("unix:/run/m".parse(), Ok(MetricsSpec::Path("/run/m".into())));
        for (text, said) in [
            (
                "0.0.0.0:9464",
                "'0.0.0.0:9464' is an address that others can reach; use one like 127.",
            ),
            ("[::]:9464", "that others can reach"),
            ("192.168.1.1:80", "that others can reach"),
            ("9464", "is no address with a port"),
            ("127.0.0.1", "is no address with a port"),
            ("localhost:x", "has no port"),
            ("example.org:80", "is no address with a port"),
            ("unix:", "has no path"),
        ] {
            let sentence = text.parse::<MetricsSpec>().expect_err(text);
            assert!(sentence.contains(said), "{sentence}");
        }
    }

    #[test]
    fn a_request_is_for_the_counters_or_gets_a_sentence() {
        let status = |request: &str| refusal(request.as_bytes()).map(|(status, _)| &status[..3]);
        for (request, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", None),
            ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", None),
            ("GET / HTTP/1.1\r\n\r\n", Some("404")),
            ("GET /metricsx HTTP/1.1\r\n\r\n", Some("404")),
            ("POST /metrics HTTP/1.1\r\n\r\n", Some("405")),
            ("GET /metrics\r\n\r\n", Some("400")),
            ("GET /metrics HTTP/2\r\n\r\n", Some("400")),
            ("\r\n\r\n", Some("400")),
            ("\0\u{7f} \r\n\r\n", Some("400")),
        ] {
            assert_eq!(status(request), expected, "{request:?}");
        }
    }
}
