//! The highest rate of datagrams at which almost none is lost.
//!
//! The sender and the receiver are to be no limit. The sender makes one call for many datagrams, or one
//! for each piece of them (`UDP_SEGMENT`). The receiver has a buffer for everything that comes between two
//! of its looks and takes datagrams together (`UDP_GRO`), so nobody has to wake it. Both sockets are
//! connected.

use std::io;
use std::mem;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::streams::Direction;
use super::way::Running;
use crate::net::check;
use crate::result::Result;

/// How the sender gives its datagrams to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sending {
    /// Each by itself, up to [`BATCH`] with a call (sendmmsg(2)).
    OneByOne,
    /// Up to [`BATCH`] in one piece, which the kernel cuts or leaves to others to cut (`UDP_SEGMENT`, as
    /// QUIC sends).
    InPieces,
}

impl Sending {
    pub(super) const ALL: [Self; 2] = [Self::OneByOne, Self::InPieces];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::OneByOne => "one by one",
            Self::InPieces => "in pieces",
        }
    }
}

/// What is looked for.
#[derive(Clone, Copy)]
pub(super) struct Search {
    pub(super) direction: Direction,
    pub(super) sending: Sending,
    /// Bytes of a datagram, without its headers.
    pub(super) len: usize,
    /// How long the rate that is found is lossless.
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
const FIRST: f64 = 20_000.0;
/// How often the interval between a rate that is lossless and one that is not is halved.
const HALVINGS: u32 = 4;
/// A rate is tried for this part of the time before the rate that is found is tried for all of it.
const PART: u32 = 10;
/// A rate that fails for the whole time is followed by one that is smaller by this factor.
const STEP: f64 = 0.93;
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
/// How many datagrams one call sends, and how many messages one receives.
const BATCH: usize = 64;
/// The most bytes of a piece. With the headers of one datagram, the kernel takes 65,535.
const PIECE: usize = 65_000;
/// The receiver sleeps so long between its looks.
const LOOK: Duration = Duration::from_micros(500);
/// How long the last datagrams may be on their way.
const DRAIN: Duration = Duration::from_millis(60);
/// The receiver's buffer in bytes, which holds what comes while the receiver does not run.
const BUFFER: libc::c_int = 64 << 20;
/// How often a flow is tried to be opened, and how long an attempt takes.
const OPENINGS: u32 = 10;
const OPENING: Duration = Duration::from_millis(200);
/// The bytes of the datagram that opens a flow. No search has this length.
const HELLO: usize = 5;

/// See the [module](self).
pub(super) fn search(running: &Running, search: Search) -> Result<Found> {
    let [client, server] = open(running)?;
    let (sender, receiver) = match search.direction {
        Direction::Out => (client, server),
        Direction::In => (server, client),
    };
    set(&receiver, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
    set(&receiver, libc::IPPROTO_UDP, libc::UDP_GRO, 1)?;
    if search.sending == Sending::InPieces {
        set(&sender, libc::IPPROTO_UDP, libc::UDP_SEGMENT, search.len as libc::c_int)?;
    }
    let (stop, arrived) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let counting = scope.spawn(|| count(&receiver, search.len, &stop, &arrived));
        let attempt = |rate, time| attempt(running, &sender, search, (rate, time), &arrived);
        let found = bisect(|rate| attempt(rate, search.time / PART))
            .and_then(|found| confirm(found, |rate| attempt(rate, search.time)));
        stop.store(true, Ordering::Relaxed);
        counting.join().map_err(|_| "the receiver panicked")??;
        found
    })
}

/// Opens a flow: the client's socket inside and the server's outside, connected to each other.
fn open(running: &Running) -> Result<[UdpSocket; 2]> {
    let server = running.outside(|| Ok(UdpSocket::bind(running.servers.datagrams(0))?))?;
    let at = server.local_addr()?;
    let client = running.inside.inside(|| {
        let client = UdpSocket::bind("0.0.0.0:0")?;
        client.connect(at)?;
        Ok(client)
    })?;
    server.set_read_timeout(Some(OPENING))?;
    for _ in 0..OPENINGS {
        client.send(&[0; HELLO])?;
        match server.recv_from(&mut [0; HELLO]) {
            Ok((HELLO, peer)) => {
                server.connect(peer)?;
                server.set_read_timeout(None)?;
                return Ok([client, server]);
            }
            Ok(_) => return Err("another datagram came than was sent".into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err("no datagram arrives".into())
}

/// One attempt at a rate.
enum Attempt {
    Lossless(Found),
    /// The same, and the sender was not fast enough for more.
    Most(Found),
    Lossy,
}

/// The best of some attempts at a rate.
fn try_rate(rate: f64, mut attempt: impl FnMut(f64) -> Result<Attempt>) -> Result<Attempt> {
    let mut best = Attempt::Lossy;
    for _ in 0..TRIES {
        best = match (attempt(rate)?, best) {
            (Attempt::Lossless(found), _) => return Ok(Attempt::Lossless(found)),
            (Attempt::Most(one), Attempt::Most(other)) if one.per_second < other.per_second => {
                Attempt::Most(other)
            }
            (Attempt::Lossy, best) => best,
            (most, _) => most,
        };
    }
    Ok(best)
}

/// The highest rate that is lossless.
fn bisect(mut attempt: impl FnMut(f64) -> Result<Attempt>) -> Result<Found> {
    let mut best = None;
    let (mut rate, mut least_lossy) = (FIRST, f64::INFINITY);
    let mut halvings = 0;
    while halvings < HALVINGS {
        match try_rate(rate, &mut attempt)? {
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

/// The highest rate up to this one that is lossless in attempts that take longer.
fn confirm(found: Found, mut attempt: impl FnMut(f64) -> Result<Attempt>) -> Result<Found> {
    let mut rate = found.per_second;
    while rate >= 100.0 {
        if let Attempt::Lossless(found) | Attempt::Most(found) = attempt(rate)? {
            return Ok(found);
        }
        rate *= STEP;
    }
    Err("datagrams are lost at every rate".into())
}

fn attempt(
    running: &Running,
    sender: &UdpSocket,
    search: Search,
    (rate, time): (f64, Duration),
    arrived: &AtomicU64,
) -> Result<Attempt> {
    let before = arrived.load(Ordering::Relaxed);
    let own_before = running.processor_time()?;
    let begin = Instant::now();
    let sent = send(sender, search, rate, time)?;
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

/// Sends datagrams at this rate for a time, and returns how many.
fn send(sender: &UdpSocket, search: Search, rate: f64, time: Duration) -> Result<u64> {
    let bytes = vec![0x77; search.len * BATCH];
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: search.len };
    // SAFETY: an mmsghdr is plain old data, and all zeroes (no address, no control) are a valid value.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut part;
        message.msg_hdr.msg_iovlen = 1;
    }
    let at_once = match search.sending {
        Sending::OneByOne => BATCH,
        Sending::InPieces => BATCH.min(PIECE / search.len),
    };
    let (begin, mut sent) = (Instant::now(), 0_u64);
    loop {
        let passed = begin.elapsed().min(time);
        let due = (passed.as_secs_f64() * rate) as u64;
        // A sender that was not allowed to run for long does not catch up with a burst that nobody would
        // send.
        let most = (rate * LONGEST_BURST.as_secs_f64()).max(4.0) as u64;
        let mut burst = due.saturating_sub(sent).min(most);
        while burst > 0 {
            let batch = burst.min(at_once as u64) as usize;
            let done = match search.sending {
                // SAFETY: the messages, their one part and the bytes outlive the call, which only reads
                // the bytes.
                Sending::OneByOne => check(unsafe {
                    libc::sendmmsg(sender.as_raw_fd(), messages.as_mut_ptr(), batch as u32, 0)
                })? as u64,
                Sending::InPieces => {
                    sender.send(&bytes[..batch * search.len])?;
                    batch as u64
                }
            };
            sent += done;
            burst -= done;
        }
        if passed >= time {
            return Ok(sent);
        }
        thread::sleep(TICK);
    }
}

/// Counts what arrives until it is to stop.
fn count(receiver: &UdpSocket, len: usize, stop: &AtomicBool, arrived: &AtomicU64) -> Result<()> {
    let mut bytes = vec![0_u8; BATCH << 16];
    let mut parts: Vec<libc::iovec> = bytes
        .chunks_exact_mut(1 << 16)
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
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        });
        match received {
            Ok(received) => {
                let all = &messages[..received as usize];
                // A message is one datagram, or several of the same length.
                if all
                    .iter()
                    .any(|one| one.msg_len == 0 || !(one.msg_len as usize).is_multiple_of(len))
                {
                    return Err("a datagram arrived with another length".into());
                }
                let count: usize = all.iter().map(|one| one.msg_len as usize / len).sum();
                arrived.fetch_add(count as u64, Ordering::Relaxed);
                if received as usize == BATCH {
                    continue;
                }
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR) => {}
                _ => return Err(error.into()),
            },
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Sets an option that is an int.
fn set(socket: &UdpSocket, level: i32, option: i32, value: libc::c_int) -> Result<()> {
    // SAFETY: the option is one int, which outlives the call.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
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
            assert!(found <= limit && found >= limit * 0.93, "{found} of {limit}");
        }
        assert_eq!(found(f64::INFINITY, 500_000.0), 500_000.0);
        assert_eq!(found(50.0, f64::INFINITY), 0.0);
    }

    #[test]
    fn a_rate_that_fails_in_the_end_is_lowered() {
        let start = Found { per_second: 80_000.0, own_cpu: None };
        let try_one = |rate: f64| {
            let found = Found { per_second: rate, own_cpu: None };
            Ok(if rate > 60_000.0 { Attempt::Lossy } else { Attempt::Lossless(found) })
        };
        let found = confirm(start, try_one).map_or(0.0, |found| found.per_second);
        assert!(found <= 60_000.0 && found > 60_000.0 * STEP, "{found}");
        assert!(confirm(start, |_| Ok(Attempt::Lossy)).is_err());
    }
}
