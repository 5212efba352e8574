//! Short connections, and the round trip of one byte.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use super::servers::REQUEST;
use super::way::Running;
use super::world::SERVERS;
use crate::result::Result;

/// A connection on which nothing comes for so long has failed.
const SILENCE: Duration = Duration::from_secs(5);

/// Connections that were made, served and closed, and the translator's processor time for them.
pub(super) struct Connections {
    pub(super) per_second: f64,
    /// Microseconds of the translator's processor time for each, if it is a process.
    pub(super) own_cpu: Option<f64>,
}

/// Connects, asks, reads the answer and closes, again and again, with one client for each server.
pub(super) fn measure(running: &Running, time: Duration) -> Result<Connections> {
    let before = running.processor_time()?;
    let (count, passed) = running.inside.inside(|| {
        let begin = Instant::now();
        let count: Result<u64> = thread::scope(|scope| {
            let clients: Vec<_> = (0..SERVERS.len())
                .map(|server| scope.spawn(move || one_client(running, server, begin, time)))
                .collect();
            clients
                .into_iter()
                .map(|client| client.join().unwrap_or_else(|_| Err("a client panicked".into())))
                .sum()
        });
        Ok((count?, begin.elapsed()))
    })?;
    let own = before.zip(running.processor_time()?).map(|(before, after)| after - before);
    Ok(Connections {
        per_second: count as f64 / passed.as_secs_f64(),
        own_cpu: own.map(|time| time.as_secs_f64() * 1e6 / count as f64),
    })
}

fn one_client(running: &Running, server: usize, begin: Instant, time: Duration) -> Result<u64> {
    let mut count = 0;
    let request = [0x3c; REQUEST];
    while begin.elapsed() < time {
        let mut stream = TcpStream::connect(running.servers.answer(server))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.write_all(&request)?;
        let mut answer = [0; REQUEST];
        stream.read_exact(&mut answer)?;
        if answer != request {
            return Err("the answer has other bytes than the request".into());
        }
        count += 1;
    }
    Ok(count)
}

/// The median of the round trips of one byte in microseconds, in `time`. Both ends sleep meanwhile.
pub(super) fn round_trip(running: &Running, time: Duration) -> Result<f64> {
    let server = running.servers.echo(0);
    let mut stream = running.inside.inside(|| Ok(TcpStream::connect(server)?))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut trips = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < time || trips.len() < 3 {
        let start = Instant::now();
        stream.write_all(&[7])?;
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        trips.push(start.elapsed().as_nanos() as f64 / 1e3);
    }
    trips.sort_by(f64::total_cmp);
    Ok(trips[trips.len() / 2])
}
