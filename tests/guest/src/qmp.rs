//! QEMU's machine protocol: one JSON object a line, each way.

use std::io::{BufRead, BufReader, Write};
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
    /// Connects to the socket as soon as it is there.
    pub(crate) fn connect(path: &Path) -> Self {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < LIMIT, "QEMU's monitor: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        stream.set_read_timeout(Some(LIMIT)).expect("a time of more than 0");
        let mut qmp = Self { lines: BufReader::new(stream) };
        assert!(qmp.line()["QMP"].is_object(), "QEMU greets first");
        qmp.execute("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command, and returns its answer.
    ///
    /// # Panics
    ///
    /// Panics if QEMU answers with an error, or not at all.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.lines.get_mut(), "{request}").expect("QEMU's monitor reads");
        loop {
            let mut answer = self.line();
            assert!(answer["error"].is_null(), "{request}: {answer}");
            // The others are events.
            if !answer["return"].is_null() {
                return answer["return"].take();
            }
        }
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("QEMU's monitor answers in time");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }
}
