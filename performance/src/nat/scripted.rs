//! A stream of a guest in this program, beside one over the loopback interface.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::guest::{Guest, byte_at};
use super::servers::Servers;
use super::streams::{self, Direction, SILENCE, Stream, WARM_UP};
use super::world::World;
use crate::forward::busy;
use crate::programs::{Measured, Programs};
use crate::report::{Table, Want};
use crate::result::Result;
use crate::served::thread_time;

pub(super) const NAME: &str = "nat, scripted guest";

/// The name of the translator's thread.
const TRANSLATOR: &str = "vmring-nat";
/// The bytes that are compared before anything is measured.
const CHECKED: u64 = 8 << 20;

/// What carries the stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Loopback,
    Veth,
    Guest,
    /// The guest reaches a server of its host over lo.
    GuestOverLoopback,
}

impl Method {
    const ALL: [Self; 4] = [Self::Loopback, Self::Veth, Self::Guest, Self::GuestOverLoopback];

    fn name(self) -> &'static str {
        match self {
            Self::Loopback => "socket pair over lo",
            Self::Veth => "socket pair over veth",
            Self::Guest => "scripted guest, vmring, veth",
            Self::GuestOverLoopback => "scripted guest, vmring, lo",
        }
    }
}

pub(super) fn run(rounds: u32, programs: Programs<'_>) -> Result<Measured> {
    let time = Duration::from_secs(programs.stream_seconds.into());
    let figures = &["Gbit/s", "translator CPU s/GB", "all CPU s/GB"];
    let about = format!(
        "one TCP stream of {} s; the guest is in this program, has packets of 64 KiB and no kernel",
        time.as_secs()
    );
    let mut table = Table::new(NAME, about, &["direction", "carried by"], figures);
    let world = World::new()?;
    let servers = Servers::start(&world.outside)?;
    let here = world.host.inside(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?))?;
    let ends =
        Ends { world: &world, outside: (&servers.taken, servers.taken(0)), here: at(&here)? };
    for direction in Direction::ALL {
        check(&ends, ends.outside, direction)?;
        check(&ends, ends.here, direction)?;
    }
    let mut wants = Vec::new();
    for direction in Direction::ALL {
        let mut all = Method::ALL.map(|method| (method, [const { Vec::new() }; 3]));
        for _ in 0..rounds {
            for (method, [rate, own, machine]) in &mut all {
                let stream = measure(&ends, *method, direction, time)
                    .map_err(|error| format!("{}, {}: {error}", method.name(), direction.name()))?;
                rate.push(stream.gbit_per_second);
                own.extend(stream.own_cpu);
                machine.push(stream.all_cpu);
            }
        }
        let medians = all.map(|(method, [rate, own, machine])| {
            table.row(&[direction.name(), method.name()], &[&rate, &own, &machine])
        });
        let [loopback, veth, outside, here] = medians;
        let what =
            |over| format!("TCP {}: scripted guest / socket pair, over {over}", direction.name());
        wants.push(Want::at_least(what("lo"), here / loopback, 0.85));
        wants.push(Want::at_least(what("veth"), outside / veth, 0.85));
    }
    Ok(Ok((table, wants)))
}

/// A listener, and the address at which a client on the host reaches it.
type Server<'a> = (&'a TcpListener, SocketAddrV4);

/// Where a stream may end.
struct Ends<'a> {
    world: &'a World,
    outside: Server<'a>,
    /// On the host itself, at the loopback address.
    here: Server<'a>,
}

fn at(listener: &TcpListener) -> Result<Server<'_>> {
    let port = listener.local_addr()?.port();
    Ok((listener, SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)))
}

/// A guest on the host, and the server's end of its connection. `work` runs there.
fn with_guest<T: Send>(
    ends: &Ends<'_>,
    (listener, address): Server<'_>,
    work: impl FnOnce(Guest, TcpStream) -> Result<T> + Send,
) -> Result<T> {
    ends.world.host.inside(|| {
        let guest = Guest::connect(address)?;
        let (served, _) = listener.accept()?;
        served.set_read_timeout(Some(SILENCE))?;
        served.set_write_timeout(Some(SILENCE))?;
        work(guest, served)
    })
}

/// Compares what arrives with what was sent.
fn check(ends: &Ends<'_>, server: Server<'_>, direction: Direction) -> Result<()> {
    let bytes: Vec<u8> = (0..CHECKED).map(byte_at).collect();
    with_guest(ends, server, |mut guest, mut served| {
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| match direction {
            Direction::Out => {
                // The guest's network stays until all has arrived: what ends with it is reset.
                let sending =
                    scope.spawn(move || guest.send_stream(stop, Some(CHECKED)).map(|()| guest));
                let mut arrived = vec![0; CHECKED as usize];
                let read = served.read_exact(&mut arrived);
                // The guest ends when all is acknowledged.
                if read.is_err() {
                    stop.store(true, Ordering::Relaxed);
                }
                sending.join().map_err(|_| "the guest panicked")??;
                read?;
                if arrived != bytes {
                    return Err("the server received other bytes than the guest sent".into());
                }
                Ok(())
            }
            Direction::In => {
                let received = AtomicU64::new(0);
                let received = &received;
                thread::scope(|scope| {
                    let receiving = scope.spawn(move || guest.receive_stream(stop, received, true));
                    let written = served.write_all(&bytes);
                    let begin = Instant::now();
                    while received.load(Ordering::Relaxed) < CHECKED && begin.elapsed() < SILENCE {
                        thread::sleep(Duration::from_millis(1));
                    }
                    stop.store(true, Ordering::Relaxed);
                    receiving.join().map_err(|_| "the guest panicked")??;
                    written?;
                    match received.load(Ordering::Relaxed) {
                        CHECKED => Ok(()),
                        count => Err(format!("{count} of {CHECKED} bytes arrived").into()),
                    }
                })
            }
        })
    })
}

fn measure(
    ends: &Ends<'_>,
    method: Method,
    direction: Direction,
    time: Duration,
) -> Result<Stream> {
    let pair = |(listener, address): Server<'_>| {
        let client = ends.world.host.inside(|| Ok(TcpStream::connect(address)?))?;
        let (served, _) = listener.accept()?;
        let (from, to) = match direction {
            Direction::Out => (client, served),
            Direction::In => (served, client),
        };
        streams::measure_pair(from, to, time, || Ok(None))
    };
    let guest = |server| {
        with_guest(ends, server, |guest, served| match direction {
            Direction::Out => guest_sends(guest, served, time),
            Direction::In => guest_receives(guest, served, time),
        })
    };
    match method {
        Method::Loopback => pair(ends.here),
        Method::Veth => pair(ends.outside),
        Method::Guest => guest(ends.outside),
        Method::GuestOverLoopback => guest(ends.here),
    }
}

/// The processor time of the translator's thread.
fn own() -> Result<Option<Duration>> {
    thread_time(TRANSLATOR)
}

fn guest_sends(mut guest: Guest, mut served: TcpStream, time: Duration) -> Result<Stream> {
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        let sending = scope.spawn(move || guest.send_stream(stop, None));
        let measured = streams::receive(&mut served, time, own);
        stop.store(true, Ordering::Relaxed);
        sending.join().map_err(|_| "the guest panicked")??;
        measured
    })
}

fn guest_receives(mut guest: Guest, mut served: TcpStream, time: Duration) -> Result<Stream> {
    let (stop, received) = (&AtomicBool::new(false), &AtomicU64::new(0));
    let end = served.try_clone()?;
    thread::scope(|scope| {
        let receiving = scope.spawn(move || guest.receive_stream(stop, received, false));
        let writing = scope.spawn(move || {
            let chunk = vec![0x5a; streams::CHUNK];
            while !stop.load(Ordering::Relaxed) && served.write_all(&chunk).is_ok() {}
        });
        thread::sleep(WARM_UP);
        let before = (own()?, busy()?, received.load(Ordering::Relaxed));
        let begin = Instant::now();
        thread::sleep(time);
        let (after, passed) = (received.load(Ordering::Relaxed), begin.elapsed());
        let (own, all) = (own()?, busy()?);
        stop.store(true, Ordering::Relaxed);
        let _ = end.shutdown(std::net::Shutdown::Both);
        writing.join().map_err(|_| "the writer panicked")?;
        receiving.join().map_err(|_| "the guest panicked")??;
        let (own_before, all_before, bytes_before) = before;
        let own = own_before.zip(own).map(|(before, after)| after.saturating_sub(before));
        Ok(Stream::of(after - bytes_before, passed, own, all.saturating_sub(all_before)))
    })
}
