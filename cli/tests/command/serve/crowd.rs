//! A server with a thousand guests on wires, all but a few of them idle.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;

use super::guest::{dhcp, dhcp_between, is_dhcp_answer, wanted};
use super::wires::{Wire, at, connected, exchange};
use super::*;

/// Guests that ask for a new address.
const NEW_GUESTS: usize = 50;
const GATEWAY: [u8; 4] = [10, 20, 0, 1];
/// Packets to all guests, more than are on their way to one of them and can wait for it.
const BROADCASTS: u32 = 1500;

/// The most guests that are idle.
const MOST: usize = 1000;

/// Guests that are idle. Under a sanitizer there are fewer.
fn idle_guests() -> usize {
    if std::env::var_os("VMRING_TEST_SCALE").is_some_and(|scale| scale == "small") {
        100
    } else {
        MOST
    }
}

fn skip(why: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

/// Raises the limit of open files of this process. Returns whether that is enough for `number` sockets.
fn can_open(number: usize) -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    // The other tests of this process have sockets too. macOS allows no more than this, whatever it says.
    limit.rlim_cur = limit.rlim_max.min(10_240);
    // SAFETY: the pointer is to a live rlimit.
    let raised = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } == 0;
    raised && limit.rlim_cur as usize > number + 512
}

/// A server for so many guests, which starts with a limit of 128 open files.
fn server(path: &Path, guests: usize) -> Server {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmring"));
    // SAFETY: getrlimit(2) and setrlimit(2) are safe to call between fork and exec, with a live limit.
    unsafe {
        command.pre_exec(|| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
            limit.rlim_cur = 128;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
            Ok(())
        })
    };
    let (listen, guests) = (at("qemu", path), guests.to_string());
    let network = ["serve", "--json", "--network", "embedded:lab,10.20.0.1/16"];
    let arguments = [&network[..], &["--connections", &guests, "--listen", &listen]].concat();
    Server::of(command.args(&arguments), &arguments)
}

fn mac_of(number: usize) -> [u8; 6] {
    let [high, low] = (number as u16).to_be_bytes();
    [0x52, 0x54, 0, 0x77, high, low]
}

type Frame = Vec<u8>;

/// Guests that take what comes, as a virtual machine does that has nothing to say.
struct Idle {
    sockets: Vec<UnixStream>,
}

impl Idle {
    /// Throws away what has come for them.
    fn drain(&mut self) {
        let mut bytes = vec![0; 1 << 16];
        for mut socket in &self.sockets {
            loop {
                match socket.read(&mut bytes) {
                    Ok(0) => panic!("an idle guest is cut off"),
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => panic!("an idle guest: {error}"),
                }
            }
        }
    }

    /// One more guest, which gets an address by DHCP and is silent from then on. With `known` it has had
    /// this address before, from this server, and keeps it.
    fn join(&mut self, path: &Path, known: Option<([u8; 4], [u8; 6])>) -> Frame {
        let mac = mac_of(self.sockets.len());
        let socket = connected(path);
        let mut wire = Wire::on(socket.try_clone().expect("the same socket"), mac);
        let mut answer = |message: Frame| {
            let start = Instant::now();
            loop {
                wire.send(&message);
                // The server is silent while it asks whether somebody has an address.
                while let Some(frame) = wire.next(Duration::from_millis(500)) {
                    if frame[..6] == mac && is_dhcp_answer(&frame) {
                        return frame;
                    }
                }
                assert!(start.elapsed() < LIMIT, "there is no answer to {mac:?}");
            }
        };
        let acknowledged = match known {
            None => {
                let offer = answer(dhcp(mac, 1, &[]));
                answer(dhcp(mac, 3, &wanted(&offer)))
            }
            Some((address, server)) => {
                answer(dhcp_between((mac, address), (server, GATEWAY), 3, &[]))
            }
        };
        socket.set_nonblocking(true).expect("it does not block");
        self.sockets.push(socket);
        acknowledged
    }
}

/// How many descriptors a server has.
#[cfg(target_os = "linux")]
pub(super) fn descriptors(server: &Server) -> usize {
    let id = server.child.as_ref().expect("it runs").id();
    std::fs::read_dir(format!("/proc/{id}/fd")).expect("it runs").count()
}

/// The resident memory of a server, in bytes.
#[cfg(target_os = "linux")]
fn resident(server: &Server) -> u64 {
    let id = server.child.as_ref().expect("it runs").id();
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
    let kilobytes = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
    kilobytes.expect("a number") * 1024
}

/// Goal: a thousand guests get addresses of a wide subnet from one server, which has started with a low
/// limit of open files. Each that is idle costs at most 1 MiB. Two that are not go on.
#[test]
fn a_thousand_idle_guests_cost_little_and_hold_up_nobody() {
    let number = idle_guests();
    if !can_open(MOST) {
        return skip("too few files can be open here");
    }
    let path = scratch("crowd").join("a.sock");
    // What a guest may cost depends on how many there may be, and not on how many there are.
    let server = server(&path, MOST + 2);
    let mut one = Wire::stream(&path, [0x52, 0x54, 0, 0x12, 0x34, 1]);
    let mut two = Wire::stream(&path, [0x52, 0x54, 0, 0x12, 0x34, 2]);
    exchange(&mut one, &mut two, 0..20);
    #[cfg(target_os = "linux")]
    let before = resident(&server);
    let mut idle = Idle { sockets: Vec::new() };
    let mut addresses = BTreeSet::new();
    let mut gateway = [0; 6];
    while idle.sockets.len() < number {
        // What all ask for goes to all. So most of them know their addresses.
        let known = (idle.sockets.len() >= NEW_GUESTS).then(|| {
            let of = |number: u16| [10, 20, 100 + number.to_be_bytes()[0], number.to_be_bytes()[1]];
            let free = (0..).map(of).find(|address| !addresses.contains(&address[..]));
            (free.expect("the subnet is wide"), gateway)
        });
        let acknowledged = idle.join(&path, known);
        gateway.copy_from_slice(&acknowledged[6..12]);
        // It is the field `yiaddr`.
        addresses.insert(acknowledged[58..62].to_vec());
    }
    assert_eq!(addresses.len(), number, "each has an address of its own");
    assert!(addresses.iter().all(|address| address[..2] == [10, 20]), "{addresses:?}");
    for number in 0..BROADCASTS {
        one.send(&packet(one.mac, [0xff; 6], 1514, number));
        if number.is_multiple_of(16) {
            idle.drain();
        }
    }
    exchange(&mut one, &mut two, 20..120);
    idle.drain();
    #[cfg(target_os = "linux")]
    {
        let each = resident(&server).saturating_sub(before) / number as u64;
        assert!(each <= 1 << 20, "an idle guest costs {each} bytes");
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["connections"], number + 2, "{report:#}");
}

/// Goal: guests that connect and leave as fast as they can, some within a frame or with a length above
/// the maximum, hold up nobody who is there, and leave no descriptor.
#[test]
fn connections_without_a_pause_hold_up_nobody_and_leave_nothing() {
    const THREADS: usize = 2;
    let path = scratch("crowd connects").join("a.sock");
    let server = server(&path, 64);
    let mut one = Wire::stream(&path, [0x52, 0x54, 0, 0x12, 0x34, 1]);
    let mut two = Wire::stream(&path, [0x52, 0x54, 0, 0x12, 0x34, 2]);
    exchange(&mut one, &mut two, 0..5);
    #[cfg(target_os = "linux")]
    let before = descriptors(&server);
    let each = 2 * idle_guests();
    let come_and_go = move |path: PathBuf| {
        for number in 0..each {
            let mut socket = connected(&path);
            let bytes: &[u8] = match number % 4 {
                0 => &[0xff; 4],
                1 => &[0, 0, 0, 60, 1, 2, 3],
                _ => &[],
            };
            socket.write_all(bytes).expect("it is taken");
        }
    };
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let path = path.clone();
            thread::spawn(move || come_and_go(path))
        })
        .collect();
    let mut exchanged = 0;
    while threads.iter().any(|thread| !thread.is_finished()) {
        exchange(&mut one, &mut two, 0..5);
        exchanged += 1;
    }
    threads.into_iter().for_each(|thread| thread.join().expect("each is let in"));
    assert!(exchanged > 0);
    // The last of them are let in, and leave.
    let mut last = Wire::stream(&path, [0x52, 0x54, 0, 0x12, 0x34, 3]);
    exchange(&mut one, &mut last, 0..5);
    drop(last);
    #[cfg(target_os = "linux")]
    {
        let start = Instant::now();
        while descriptors(&server) > before {
            assert!(start.elapsed() < LIMIT, "{} descriptors are left", descriptors(&server));
            exchange(&mut one, &mut two, 0..1);
        }
    }
    let report = server.report("TERM");
    assert_eq!(report["sockets"][0]["connections"], THREADS * each + 3, "{report:#}");
    assert_eq!(report["sockets"][0]["counts"]["peers"], THREADS * each + 3, "{report:#}");
}
