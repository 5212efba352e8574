//! QEMU's machine protocol: one JSON object a line, each way.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the socket as soon as it is there. QEMU greets when it has made its devices.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > LIMIT => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        assert!(qmp.line()?["QMP"].is_object(), "QEMU greets first");
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command, and returns its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> io::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{request}")?;
        loop {
            let mut answer = self.line()?;
            if !answer["error"].is_null() {
                return Err(io::Error::other(format!("{request}: {answer}")));
            }
            // The others are events.
            if !answer["return"].is_null() {
                return Ok(answer["return"].take());
            }
        }
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}
