//! One TCP stream: how fast it is, and what it costs.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::way::Running;
use crate::forward::busy;
use crate::result::Result;

/// What is written or read at once, as iperf3 does.
pub(super) const CHUNK: usize = 128 * 1024;
/// How long a stream runs before it is measured.
pub(super) const WARM_UP: Duration = Duration::from_millis(300);
/// A stream from which nothing comes for so long has failed.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// The bytes that are compared before anything is measured.
const CHECKED: usize = 256 << 10;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Out,
    In,
}

impl Direction {
    pub(super) const ALL: [Self; 2] = [Self::Out, Self::In];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Out => "to the world",
            Self::In => "from the world",
        }
    }
}

/// The result of one stream.
pub(super) struct Stream {
    pub(super) gbit_per_second: f64,
    /// Seconds of the translator's processor time per gigabyte, if it is a process.
    pub(super) own_cpu: Option<f64>,
    /// The same of the whole machine.
    pub(super) all_cpu: f64,
}

impl Stream {
    /// The stream that carried so many bytes, with the processor time that it took.
    pub(super) fn of(bytes: u64, passed: Duration, own: Option<Duration>, all: Duration) -> Self {
        let gigabytes = bytes as f64 / 1e9;
        Self {
            gbit_per_second: gigabytes * 8.0 / passed.as_secs_f64(),
            own_cpu: own.map(|time| time.as_secs_f64() / gigabytes),
            all_cpu: all.as_secs_f64() / gigabytes,
        }
    }
}

/// A client inside, and its server.
fn pair(running: &Running) -> Result<[TcpStream; 2]> {
    let server = running.servers.taken(0);
    let client = running.inside.inside(|| Ok(TcpStream::connect(server)?))?;
    let (served, _) = running.servers.taken.accept()?;
    for stream in [&client, &served] {
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
    }
    Ok([client, served])
}

/// Compares what arrives with what was sent, both ways.
pub(super) fn check(running: &Running) -> Result<()> {
    let [mut client, mut served] = pair(running)?;
    exchange(&mut client, &mut served)?;
    exchange(&mut served, &mut client)
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
    let bytes: Vec<u8> =
        (0..CHECKED as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    thread::scope(|scope| {
        let sent = scope.spawn(|| from.write_all(&bytes));
        let mut arrived = vec![0; CHECKED];
        to.read_exact(&mut arrived)?;
        sent.join().map_err(|_| "the sender panicked")??;
        if arrived != bytes { Err("other bytes arrived than were sent".into()) } else { Ok(()) }
    })
}

/// One stream of `time`.
pub(super) fn measure(running: &Running, direction: Direction, time: Duration) -> Result<Stream> {
    let [client, served] = pair(running)?;
    let (from, to) = match direction {
        Direction::Out => (client, served),
        Direction::In => (served, client),
    };
    measure_pair(from, to, time, || running.processor_time())
}

/// One stream between these sockets. `own` is the processor time of what carries it.
pub(super) fn measure_pair(
    mut from: TcpStream,
    mut to: TcpStream,
    time: Duration,
    own: impl Fn() -> Result<Option<Duration>>,
) -> Result<Stream> {
    let stop = AtomicBool::new(false);
    let stop = &stop;
    let end = to.try_clone()?;
    let both = from.try_clone()?;
    thread::scope(|scope| {
        scope.spawn(move || {
            let chunk = vec![0x5a; CHUNK];
            // It fails at the end, which closes the connection.
            while !stop.load(Ordering::Relaxed) && from.write_all(&chunk).is_ok() {}
        });
        let measured = receive(&mut to, time, own);
        stop.store(true, Ordering::Relaxed);
        for stream in [&end, &both] {
            let _ = stream.shutdown(Shutdown::Both);
        }
        measured
    })
}

/// Receives for `time`, after a while that is not measured.
pub(super) fn receive(
    to: &mut TcpStream,
    time: Duration,
    own: impl Fn() -> Result<Option<Duration>>,
) -> Result<Stream> {
    let mut chunk = vec![0; CHUNK];
    let mut read_for = |time: Duration| -> Result<(u64, Duration)> {
        let (begin, mut bytes) = (Instant::now(), 0);
        while begin.elapsed() < time {
            let count = to.read(&mut chunk)?;
            if count == 0 {
                return Err("the stream ended".into());
            }
            bytes += count as u64;
        }
        Ok((bytes, begin.elapsed()))
    };
    read_for(WARM_UP)?;
    let (own_before, all_before) = (own()?, busy()?);
    let (bytes, passed) = read_for(time)?;
    let (own_after, all_after) = (own()?, busy()?);
    let own = own_before.zip(own_after).map(|(before, after)| after.saturating_sub(before));
    Ok(Stream::of(bytes, passed, own, all_after.saturating_sub(all_before)))
}
