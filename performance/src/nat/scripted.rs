//! A stream of a guest in this program, beside one over the loopback interface.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
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
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Loopback => "socket pair over lo",
            Self::Veth => "socket pair over veth",
            Self::Guest => "scripted guest, vmring",
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
    for direction in Direction::ALL {
        check(&world, &servers, direction)?;
    }
    let mut wants = Vec::new();
    for direction in Direction::ALL {
        let mut all = [Method::Loopback, Method::Veth, Method::Guest]
            .map(|method| (method, [const { Vec::new() }; 3]));
        for _ in 0..rounds {
            for (method, [rate, own, machine]) in &mut all {
                let stream = measure(&world, &servers, *method, direction, time)
                    .map_err(|error| format!("{}, {}: {error}", method.name(), direction.name()))?;
                rate.push(stream.gbit_per_second);
                own.extend(stream.own_cpu);
                machine.push(stream.all_cpu);
            }
        }
        let medians = all.map(|(method, [rate, own, machine])| {
            table.row(&[direction.name(), method.name()], &[&rate, &own, &machine])
        });
        let what = format!("TCP {}: scripted guest / socket pair over lo", direction.name());
        wants.push(Want::at_least(what, medians[2] / medians[0], 0.85));
    }
    Ok(Ok((table, wants)))
}

/// A guest on the host of `world`, and the server of its connection. `work` runs there.
fn with_guest<T: Send>(
    world: &World,
    servers: &Servers,
    work: impl FnOnce(Guest, TcpStream) -> Result<T> + Send,
) -> Result<T> {
    world.host.inside(|| {
        let guest = Guest::connect(servers.taken(0))?;
        let (served, _) = servers.taken.accept()?;
        served.set_read_timeout(Some(SILENCE))?;
        served.set_write_timeout(Some(SILENCE))?;
        work(guest, served)
    })
}

/// Compares what arrives with what was sent.
fn check(world: &World, servers: &Servers, direction: Direction) -> Result<()> {
    let bytes: Vec<u8> = (0..CHECKED).map(byte_at).collect();
    with_guest(world, servers, |mut guest, mut served| {
        let stop = &AtomicBool::new(false);
        thread::scope(|scope| match direction {
            Direction::Out => {
                let sending = scope.spawn(move || guest.send_stream(stop, Some(CHECKED)));
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
    world: &World,
    servers: &Servers,
    method: Method,
    direction: Direction,
    time: Duration,
) -> Result<Stream> {
    let one_way = |client: TcpStream, served: TcpStream| {
        let (from, to) = match direction {
            Direction::Out => (client, served),
            Direction::In => (served, client),
        };
        streams::measure_pair(from, to, time, || Ok(None))
    };
    match method {
        Method::Loopback => {
            let (client, served) = world.host.inside(|| {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                let client = TcpStream::connect(listener.local_addr()?)?;
                Ok((client, listener.accept()?.0))
            })?;
            one_way(client, served)
        }
        Method::Veth => {
            let server = servers.taken(0);
            let client = world.host.inside(|| Ok(TcpStream::connect(server)?))?;
            one_way(client, servers.taken.accept()?.0)
        }
        Method::Guest => with_guest(world, servers, |guest, served| match direction {
            Direction::Out => guest_sends(guest, served, time),
            Direction::In => guest_receives(guest, served, time),
        }),
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
