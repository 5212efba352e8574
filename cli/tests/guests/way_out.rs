//! Guests fetch from a server outside, by the way out of the server's network.

use std::io::{BufReader, Read};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::host::obstacle;
use crate::http::Request;
use crate::world::{HOST, OUTSIDE, World};

/// The environment variable with the length of what is fetched, in MiB.
const LENGTH: &str = "VMRING_FETCH_MIB";
/// What each MiB is: bytes that look random, and its number.
const MIB: usize = 1 << 20;

fn piece(number: usize) -> Vec<u8> {
    let bytes = (0..MIB as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8);
    let mut bytes: Vec<u8> = bytes.collect();
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    bytes
}

/// Writes so many MiB.
fn write_all(to: &mut impl Write, mib: usize) -> std::io::Result<()> {
    let mut bytes = piece(0);
    for number in 0..mib {
        bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
        to.write_all(&bytes)?;
    }
    Ok(())
}

/// The digest of so many MiB, as sha256sum prints it.
fn digest(mib: usize) -> String {
    let mut command = Command::new("sha256sum");
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut child = child.expect("sha256sum runs");
    write_all(&mut child.stdin.take().expect("piped"), mib).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    String::from_utf8(output.stdout).expect("a digest")
}

/// Answers the request of one client: `GET /N` with N MiB, `PUT` with the digest of what came.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let request = Request::read(&mut reader)?;
    let Request { method, path, len } = request.ok_or(std::io::ErrorKind::UnexpectedEof)?;
    if method == "GET" {
        let mib = path.parse().map_err(std::io::Error::other)?;
        let length = mib * MIB;
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
        return write_all(&mut stream, mib);
    }
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    std::io::copy(&mut (&mut reader).take(len), &mut sum.stdin.take().expect("piped"))?;
    let digest = sum.wait_with_output()?.stdout;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        digest.len()
    )?;
    stream.write_all(&digest)
}

/// Goal: a guest gets so many MiB by curl from a server outside, and puts 8 there, whose digests agree.
fn fetches(engine: Engine, wire: impl Fn(&str) -> (String, Nic), mib: usize) {
    if !can_serve() {
        return;
    }
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let Some(guest) = have(Guest::new(engine).and_then(|guest| guest.program("curl"))) else {
        return;
    };
    let asked = std::env::var(LENGTH).ok();
    let mib = asked.map_or(mib, |text| text.parse().expect("a number of MiB"));
    let world = World::new();
    let listener = world.outside.run(|| TcpListener::bind((OUTSIDE, 80)).expect("its port"));
    let serving = thread::spawn(move || {
        for _ in 0..2 {
            let (stream, peer) = listener.accept().expect("a client");
            assert_eq!(peer.ip().to_string(), HOST, "the guest comes as the host");
            answer(stream).expect("the client takes all of it");
        }
    });
    let folder = Folder::new();
    let (listen, nic) = wire(&folder.join("socket").display().to_string());
    let command = world.host.command(env!("CARGO_BIN_EXE_vmring"));
    let server = Server::start_by(command, "embedded:lab", &[], &["--listen", &listen]);
    // A GiB takes a while in an emulator.
    let time = LIMIT + Duration::from_secs(mib as u64);
    let mut guest = guest.timeout(time).nic(nic).start();
    join(&mut guest);
    let get = format!("curl -sS -m {} http://{OUTSIDE}/{mib} | sha256sum", time.as_secs());
    let start = Instant::now();
    assert_eq!(guest.sh(&get), digest(mib));
    let rate = mib as f64 / start.elapsed().as_secs_f64();
    // A figure for whoever runs this by hand.
    let _ = writeln!(std::io::stderr(), "{engine:?}: {mib} MiB, {rate:.0} MiB/s");
    guest.sh("dd if=/dev/urandom of=/tmp/own bs=1M count=8 2>/dev/null");
    let put = guest.sh(&format!("curl -sS -m 60 -T /tmp/own http://{OUTSIDE}/"));
    assert_eq!(put, guest.sh("sha256sum </tmp/own"));
    serving.join().expect("both were served");
    drop(guest);
    let report = server.end();
    assert_eq!(report["ok"], true, "{report}");
    let established = &report["network"]["counters"]["NAT TCP established"];
    assert_eq!(established.as_u64(), Some(2), "{report}");
}

fn vhost_user(path: &str) -> (String, Nic) {
    (format!("vhost-user:{path}"), Nic::vhost_user(path))
}

#[test]
fn user_mode_linux_fetches_from_outside_over_vhost_user() {
    fetches(Engine::Uml, vhost_user, 64);
}

#[test]
fn qemu_fetches_from_outside_over_vhost_user() {
    fetches(Engine::Qemu, vhost_user, 16);
}

#[test]
fn qemu_fetches_from_outside_over_a_stream() {
    let stream = |path: &str| {
        let nic = format!("stream,server=off,addr.type=unix,addr.path={path}");
        (format!("qemu:{path}"), Nic::netdev(nic))
    };
    fetches(Engine::Qemu, stream, 16);
}
