//! The head of a request of HTTP/1.1, as a server of a test reads it.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

/// A request, up to its body.
pub(crate) struct Request {
    /// The method, like `GET`.
    pub(crate) method: String,
    /// The path, without the slash in front.
    pub(crate) path: String,
    /// How many bytes of a body follow.
    pub(crate) len: u64,
}

impl Request {
    /// Reads the next request of a connection, and tells a client to go on that waits for that. Returns
    /// `None` at the end of the stream.
    pub(crate) fn read(from: &mut BufReader<TcpStream>) -> std::io::Result<Option<Self>> {
        let (mut first, mut len) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if from.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            if line.trim().is_empty() {
                break;
            }
            let lower = line.to_ascii_lowercase();
            if let Some(number) = lower.strip_prefix("content-length:") {
                len = number.trim().parse().unwrap_or(0);
            }
            if lower.starts_with("expect: 100-continue") {
                from.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            if first.is_empty() {
                first = line;
            }
        }
        let mut words = first.split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let path = words.next().unwrap_or_default().trim_start_matches('/').to_owned();
        Ok(Some(Self { method, path, len }))
    }
}
