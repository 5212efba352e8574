//! The memory of connections on which nothing happens.

use std::net::TcpStream;

use super::way::Running;
use super::world::SERVERS;
use crate::net::check;
use crate::result::Result;

/// How many connections there are, if there may be as many descriptors for their ends.
const FLOWS: usize = 10_000;
/// How many there are before the memory is looked at first, so that it has what the first ones need.
const FIRST: usize = 200;

/// Descriptors that are used for something else.
const OTHERS: usize = 400;

/// How many connections are measured: as many as this process has descriptors for. Lets it, and the
/// programs that it starts, have what the system lets it have.
pub(super) fn count() -> Result<usize> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit, which outlives the call.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: setrlimit reads one rlimit, which outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    let ends = usize::try_from(limit.rlim_cur)?.saturating_sub(OTHERS) / 2;
    Ok(ends.saturating_sub(FIRST).min(FLOWS))
}

/// The bytes of the translator's memory for each of `count` connections.
pub(super) fn measure(running: &Running, count: usize) -> Result<f64> {
    let mut all = Vec::with_capacity(2 * (count + FIRST));
    connect(running, FIRST, &mut all)?;
    let before = memory(running)?;
    connect(running, count, &mut all)?;
    Ok(memory(running)?.saturating_sub(before) as f64 / count as f64)
}

fn memory(running: &Running) -> Result<u64> {
    running.memory()?.ok_or_else(|| "the translator is no process".into())
}

/// Makes so many connections more, to all servers in turn.
fn connect(running: &Running, count: usize, all: &mut Vec<TcpStream>) -> Result<()> {
    let servers = &running.servers;
    let accepted: &mut Vec<TcpStream> = all;
    running.inside.inside(|| {
        for i in 0..count {
            accepted.push(TcpStream::connect(servers.taken(i % SERVERS.len()))?);
            accepted.push(servers.taken.accept()?.0);
        }
        Ok(())
    })
}
