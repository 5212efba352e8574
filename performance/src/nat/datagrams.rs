//! The highest rate of datagrams at which almost none is lost.

use std::mem;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::way::Running;
use crate::net::check;
use crate::result::Result;

/// What is looked for.
#[derive(Clone, Copy)]
pub(super) struct Search {
    /// Bytes of a datagram, without its headers.
    pub(super) len: usize,
    /// How long each rate is tried.
    pub(super) time: Duration,
}

/// What was found.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub(super) per_second: f64,
    /// Microseconds of the translator's processor time for each datagram, if it is a process.
    pub(super) own_cpu: Option<f64>,
}

/// The first rate, in datagrams per second.
const FIRST: f64 = 10_000.0;
/// How often the interval between a rate that is lossless and one that is not is halved.
const HALVINGS: u32 = 5;
/// A rate that fails is tried once more, because others may have used the machine.
const TRIES: u32 = 2;
/// At most one in so many may be lost.
const LOSSLESS: u64 = 100_000;
/// The sender sleeps so long between its bursts.
const TICK: Duration = Duration::from_micros(200);
/// A burst has the datagrams of this time at most.
const LONGEST_BURST: Duration = Duration::from_millis(1);
/// A sender that reaches less than this part of a rate is at its own limit.
const REACHED: f64 = 0.95;
/// How many datagrams one call sends or receives.
const BATCH: usize = 64;
/// How long the last datagrams may be on their way.
const DRAIN: Duration = Duration::from_millis(100);
/// The receiver's buffer in bytes, which holds what comes while the receiver does not run.
const BUFFER: libc::c_int = 64 << 20;

/// See the [module](self).
pub(super) fn search(running: &Running, search: Search) -> Result<Found> {
    let receiver = &running.servers.datagrams;
    set_buffer(receiver)?;
    receiver.set_read_timeout(Some(Duration::from_millis(50)))?;
    let server = running.servers.taken(0);
    let sender = running.inside.inside(|| {
        let sender = UdpSocket::bind("0.0.0.0:0")?;
        sender.connect(server)?;
        Ok(sender)
    })?;
    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let counting = scope.spawn(|| count(receiver, search.len, &stop, &arrived));
        let found = bisect(|rate| attempt(running, &sender, search, rate, &arrived));
        stop.store(true, Ordering::Relaxed);
        counting.join().map_err(|_| "the receiver panicked")??;
        found
    })
}

/// One attempt at a rate.
enum Attempt {
    Lossless(Found),
    /// The same, and the sender was not fast enough for more.
    Most(Found),
    Lossy,
}

/// The highest rate that is lossless.
fn bisect(mut attempt: impl FnMut(f64) -> Result<Attempt>) -> Result<Found> {
    let mut best = None;
    let (mut rate, mut least_lossy) = (FIRST, f64::INFINITY);
    let mut halvings = 0;
    while halvings < HALVINGS {
        let mut result = Attempt::Lossy;
        for _ in 0..TRIES {
            result = attempt(rate)?;
            if !matches!(result, Attempt::Lossy) {
                break;
            }
        }
        match result {
            Attempt::Most(found) => return Ok(found),
            Attempt::Lossless(found) => best = Some((rate, found)),
            Attempt::Lossy => least_lossy = rate,
        }
        let most_lossless = best.map(|(rate, _)| rate);
        rate = match most_lossless {
            Some(rate) if least_lossy.is_infinite() => rate * 2.0,
            None => rate / 2.0,
            Some(rate) => {
                halvings += 1;
                (rate * least_lossy).sqrt()
            }
        };
        if rate < 100.0 {
            return Err("datagrams are lost at every rate".into());
        }
    }
    best.map(|(_, found)| found).ok_or_else(|| "no rate is lossless".into())
}

fn attempt(
    running: &Running,
    sender: &UdpSocket,
    search: Search,
    rate: f64,
    arrived: &AtomicU64,
) -> Result<Attempt> {
    let before = arrived.load(Ordering::Relaxed);
    let own_before = running.processor_time()?;
    let begin = Instant::now();
    let sent = send(sender, search, rate)?;
    let passed = begin.elapsed();
    // What is under way arrives, or is lost.
    let mut last = arrived.load(Ordering::Relaxed);
    loop {
        thread::sleep(DRAIN);
        let now = arrived.load(Ordering::Relaxed);
        if now == last {
            break;
        }
        last = now;
    }
    let own = own_before.zip(running.processor_time()?).map(|(before, after)| after - before);
    let lost = sent - (last - before).min(sent);
    if lost * LOSSLESS > sent {
        return Ok(Attempt::Lossy);
    }
    let per_second = sent as f64 / passed.as_secs_f64();
    let own_cpu = own.map(|time| time.as_secs_f64() * 1e6 / sent as f64);
    let found = Found { per_second, own_cpu };
    Ok(if per_second < rate * REACHED { Attempt::Most(found) } else { Attempt::Lossless(found) })
}

/// Sends datagrams at this rate, and returns how many.
fn send(sender: &UdpSocket, search: Search, rate: f64) -> Result<u64> {
    let bytes = vec![0x77; search.len];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: an mmsghdr is plain old data, and all zeroes (no address, no control) are a valid value.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut part;
        message.msg_hdr.msg_iovlen = 1;
    }
    let (begin, mut sent) = (Instant::now(), 0_u64);
    loop {
        let passed = begin.elapsed().min(search.time);
        let due = (passed.as_secs_f64() * rate) as u64;
        // A sender that was not allowed to run for long does not catch up with a burst that nobody would
        // send.
        let most = (rate * LONGEST_BURST.as_secs_f64()).max(4.0) as u64;
        let mut burst = due.saturating_sub(sent).min(most);
        while burst > 0 {
            let batch = burst.min(BATCH as u64);
            // SAFETY: the messages, their one part and the bytes outlive the call, which only reads the
            // bytes.
            let done = check(unsafe {
                libc::sendmmsg(sender.as_raw_fd(), messages.as_mut_ptr(), batch as u32, 0)
            })?;
            sent += done as u64;
            burst -= done as u64;
        }
        if passed >= search.time {
            return Ok(sent);
        }
        thread::sleep(TICK);
    }
}

/// Counts what arrives until it is to stop.
fn count(receiver: &UdpSocket, len: usize, stop: &AtomicBool, arrived: &AtomicU64) -> Result<()> {
    let mut bytes = vec![0_u8; BATCH * 2048];
    let mut parts: Vec<libc::iovec> = bytes
        .chunks_exact_mut(2048)
        .map(|chunk| libc::iovec { iov_base: chunk.as_mut_ptr().cast(), iov_len: chunk.len() })
        .collect();
    // SAFETY: as in `send`.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for (message, part) in messages.iter_mut().zip(&mut parts) {
        message.msg_hdr.msg_iov = part;
        message.msg_hdr.msg_iovlen = 1;
    }
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the messages, their parts and the bytes outlive the call.
        let received = check(unsafe {
            libc::recvmmsg(
                receiver.as_raw_fd(),
                messages.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_WAITFORONE,
                std::ptr::null_mut(),
            )
        });
        match received {
            Ok(received) => {
                let all = &messages[..received as usize];
                if all.iter().any(|message| message.msg_len as usize != len) {
                    return Err("a datagram arrived with another length".into());
                }
                arrived.fetch_add(received as u64, Ordering::Relaxed);
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => {}
                _ => return Err(error.into()),
            },
        }
    }
    Ok(())
}

fn set_buffer(socket: &UdpSocket) -> Result<()> {
    let bytes = BUFFER;
    // SAFETY: the option is one int, which outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as u32,
        )
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rate that is found for a translator that loses above `limit`, and a sender that reaches `most`.
    fn found(limit: f64, most: f64) -> f64 {
        let try_one = |rate: f64| {
            let per_second = rate.min(most);
            let found = Found { per_second, own_cpu: None };
            Ok(match () {
                () if per_second > limit => Attempt::Lossy,
                () if most < rate * REACHED => Attempt::Most(found),
                () => Attempt::Lossless(found),
            })
        };
        bisect(try_one).map_or(0.0, |found| found.per_second)
    }

    #[test]
    fn the_highest_lossless_rate_is_found() {
        for limit in [300.0, 9_000.0, 10_000.0, 77_000.0, 1_234_567.0] {
            let found = found(limit, f64::INFINITY);
            assert!(found <= limit && found >= limit * 0.97, "{found} of {limit}");
        }
        assert_eq!(found(f64::INFINITY, 500_000.0), 500_000.0);
        assert_eq!(found(50.0, f64::INFINITY), 0.0);
    }
}
